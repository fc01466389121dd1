"""Files are written whole or not at all, and nothing but files is replaced."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from features.errors import StoreError
from features.files import atomic_file


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a regular file"), atomic_file(tmp_path / "pipe") as temporary:
        temporary.write_text("gone")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_file(tmp_path / "kept") as temporary:
        temporary.write_text("new")
        raise RuntimeError("half-way")
    assert (tmp_path / "kept").read_text() == "old"
    assert os.listdir(tmp_path) == ["kept"]
