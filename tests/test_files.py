"""Files are written whole or not at all, and nothing but files is replaced."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
from helpers import extract, paint_folder

from features.errors import StoreError
from features.files import atomic_file, enough_room, file_digest


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a regular file"), atomic_file(tmp_path / "pipe") as temporary:
        temporary.write_text("gone")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_the_disk_is_blamed_for_what_a_library_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=5_000_000))
    with pytest.raises(RuntimeError, match="iostream"), enough_room(tmp_path, 5_000_000):
        raise RuntimeError("basic_ios::clear: iostream error")  # what OpenVINO says
    needed = r"No space left on device: at least 6\.0 MB are needed"
    with pytest.raises(OSError, match=needed) as caught, enough_room(tmp_path, 6_000_000):
        raise RuntimeError("basic_ios::clear: iostream error")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(PermissionError), enough_room(tmp_path, 6_000_000):
        raise PermissionError("another cause")


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_file(tmp_path / "kept") as temporary:
        temporary.write_text("new")
        raise RuntimeError("half-way")
    assert (tmp_path / "kept").read_text() == "old"
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux has a file that always gives EIO")
def test_a_disk_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error: '/proc/self/mem'"):
        file_digest(broken)
    store = extract(paint_folder(tmp_path / "images", {"cat": 9, "dog": 9}), tmp_path / "f.h5").store
    monkeypatch.setattr(os, "dup", lambda descriptor: os.open(broken, os.O_RDONLY))
    for read in (store.verify, store.load):
        with pytest.raises(OSError, match="Input/output error") as caught:
            read()
        assert str(store.path) in str(caught.value)
