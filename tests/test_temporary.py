"""Temporary names say whose they are; what a dead process left goes, what may still be in use stays."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers import LEAVE, ROOT, leave, listing

from features import temporary
from features.errors import ConfigurationError
from features.files import atomic_file, writable_folder
from features.temporary import (
    sweep_dead,
    system_folder,
    system_root,
    temporary_files_together,
    temporary_folder,
    temporary_path,
)
from pipeline.stages.export import export


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path: Path) -> None:
    left = leave(tmp_path, "r.html", "folder", "a.b.c")
    (left[1] / "inside").write_bytes(b"x")
    mark = left[0].name.removeprefix(".r.html.").removesuffix(".tmp")
    mine = temporary_path(tmp_path / "r.html")
    # of this process, of one that cannot be understood, of another program, and a file with no dot before it
    stay = [mine, tmp_path / ".r.html.0badcafe.tmp", tmp_path / f".x.{mark}.tmp.png", tmp_path / f"r.html.{mark}.tmp"]
    for path in stay:
        path.write_bytes(b"kept")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"kept")
    (tmp_path / f".link.{mark}.tmp").symlink_to(outside)
    sweep_dead(tmp_path)
    assert listing(tmp_path) == sorted(path.name for path in stay)
    assert (outside / "file").read_bytes() == b"kept"
    sweep_dead(tmp_path / "missing")


def test_a_process_that_runs_keeps_its_files_and_a_number_used_again_does_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVE, str(tmp_path), "stay"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        path = Path(other.stdout.readline().strip())
        machine, number, born, token = path.name.split(".")[2].split("-")
        again = path.with_name(f".stay.{machine}-{number}-{'0' * 7}1-{token}.tmp")  # the same number, started earlier
        again.write_bytes(b"of one before it")
        sweep_dead(tmp_path)
        assert (path.exists(), again.exists()) == (True, False)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how: a zombie
        sweep_dead(tmp_path)
        assert listing(tmp_path) == []
    assert born == path.name.split("-")[2]


def test_another_machine_is_given_thirty_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = leave(tmp_path, "f")
    monkeypatch.setattr(temporary, "_machine", lambda: "01234567")
    sweep_dead(tmp_path)
    assert path.exists()
    for days, exists in ((29, True), (31, False)):
        os.utime(path, (time.time() - days * 86400,) * 2)
        sweep_dead(tmp_path)
        assert path.exists() == exists


def test_without_proc_only_a_missing_number_counts_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "_born", lambda process: "0" * 8)
    mine = temporary_path(tmp_path / "mine")
    mine.touch()
    (other,) = leave(tmp_path, "other")
    assert other.exists()
    sweep_dead(tmp_path)
    assert listing(tmp_path) == [mine.name]


def test_names_differ_lie_beside_and_are_never_too_long(tmp_path: Path) -> None:
    for name in ("a", "x" * 250, "ä" * 120, "日" * 80, os.fsdecode(b"\xff" * 220)):
        one, two = (temporary_path(tmp_path / name) for _ in range(2))
        assert one != two
        assert one.parent == tmp_path
        one.touch()
    assert len(listing(tmp_path)) == 5


def test_folders_go_at_the_end_and_stay_if_renamed(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "run") as folder:
        (folder / "a").touch()
    assert listing(tmp_path) == []
    with temporary_folder(tmp_path / "run") as folder:
        (folder / "a").touch()
        folder.rename(tmp_path / "run")
    assert listing(tmp_path) == ["run", "run/a"]


@pytest.mark.slow
def test_every_way_to_write_begins_by_tidying_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = (tmp_path / name for name in "abc")
    for folder in (one, two, three):
        folder.mkdir()
        leave(folder, "f", "folder")
    with atomic_file(one / "other") as path:
        path.write_bytes(b"x")
    assert listing(one) == ["other"]
    writable_folder(two)
    assert listing(two) == []
    monkeypatch.setattr(tempfile, "tempdir", str(three))
    with system_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert listing(three) == [folder.name]
    assert listing(three) == []


def test_the_systems_folder_is_found_without_writing_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setenv("TEMP", str(tmp_path))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: pytest.fail("it tries the folder with a file"))
    assert system_root() == tmp_path
    with temporary_files_together():
        assert Path(str(tempfile.tempdir)).parent == tmp_path
    assert (tempfile.tempdir, listing(tmp_path)) == (None, [])
    monkeypatch.delenv("TEMP")
    monkeypatch.delenv("TMP", raising=False)
    assert system_root() == Path("/tmp")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert system_root() == tmp_path


def test_libraries_put_their_temporary_files_with_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_files_together():
        made = Path(tempfile.mkdtemp())
        assert made.parent.parent == tmp_path
        assert len(listing(tmp_path)) == 2
    assert (tempfile.tempdir, listing(tmp_path)) == (str(tmp_path), [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with temporary_files_together():
        assert tempfile.gettempdir() == str(tmp_path / "missing")


def test_an_export_killed_after_its_last_step_is_tidied_up_by_one_that_is_refused(tmp_path: Path) -> None:
    """The file is there then, so that the same command is refused; its folder must not stay for that."""
    (tmp_path / "m.keras").write_bytes(b"whole")
    leave(tmp_path, "m.keras", "folder")
    with pytest.raises(ConfigurationError, match=r"m\.keras exists; remove it"):
        export(tmp_path / "runs", format="keras", out=tmp_path / "m.keras")
    assert listing(tmp_path) == ["m.keras"]
