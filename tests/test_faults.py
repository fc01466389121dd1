"""Processes that are killed, interrupted, or run out of disk or time: nothing computed is lost, nothing wrong is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faults import (
    contents,
    differences,
    finish,
    inferred,
    kill,
    kill_often,
    run,
    start,
    wait_for_images,
    wait_for_place,
)
from finetuning import save_network
from helpers import ROOT, listing, paint_folder, rounds

from features.files import PatientFile
from features.store.reader import FeatureStore, parts_folder

pytestmark = pytest.mark.slow
SHARD = 32
IN_FLIGHT = 2 * SHARD  # images that a kill may cost
NUMPY = ["--numpy", 64]
IMAGES = rounds(6000)
KILLS = rounds(40)


def command(source: Path, out: Path, *more: object) -> list[object]:
    return ["extract", source, "--out", out, "--shard-rows", SHARD, "--workers", 2, *more]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images, 600 or ten times as many, and the store of a run that nothing disturbed; left as they are."""
    folder = tmp_path_factory.mktemp("reference")
    source = paint_folder(folder / "images", {"cat": IMAGES - 280, "dog": 280})
    run(folder / "log", *command(source, folder / "whole" / "f.h5"), options=NUMPY)
    return source, folder / "whole" / "f.h5"


@pytest.mark.stress
def test_killed_anywhere_and_run_again_gives_the_same_store(reference: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = reference
    out, log = tmp_path / "out" / "f.h5", tmp_path / "log2"
    again = command(source, out)
    hits = kill_often(KILLS, IMAGES, log, again, [*NUMPY, "--delay", 0.02], seed=3)
    full = {"start": 4, "extract": 20, "assembly": 8, "clean-up": 8}
    assert hits == (full if KILLS == 40 else dict.fromkeys(full, 1))
    run(log, *again, options=NUMPY)
    assert differences(whole, out) == []
    assert len(contents(out)) > 40
    assert IMAGES <= inferred(log) <= IMAGES + KILLS * IN_FLIGHT
    assert listing(tmp_path / "out") == ["f.h5"]
    before = out.stat()
    run(log, *again, options=NUMPY)  # and now there is nothing to do
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_kill_during_an_update_leaves_the_old_store(reference: tuple[Path, Path], tmp_path: Path) -> None:
    source = shutil.copytree(reference[0], tmp_path / "images")
    out = shutil.copytree(reference[1].parent, tmp_path / "out") / "f.h5"
    old = out.read_bytes()
    paint_folder(source, {"owl": 100}, start=IMAGES)
    log = tmp_path / "log3"
    for place in ("extract", "assembly"):
        process = start(log, *command(source, out), options=[*NUMPY, "--delay", 0.05, "--stall", "assembly"])
        assert wait_for_images(process, log, 40) if place == "extract" else wait_for_place(process, log, place)
        process.kill()
        finish(process)
        assert out.read_bytes() == old
        assert len(FeatureStore.open(out)) == IMAGES
        assert listing(out.parent) != ["f.h5"]  # it was at work
    run(log, *command(source, out), options=NUMPY)
    assert len(FeatureStore.open(out)) == IMAGES + 100
    assert 100 <= inferred(log) <= 100 + 2 * IN_FLIGHT
    assert listing(out.parent) == ["f.h5"]


@pytest.mark.stress
def test_a_sharded_store_killed_anywhere_and_run_again_is_the_same(
    reference: tuple[Path, Path], tmp_path: Path
) -> None:
    source, whole = reference
    out, log = tmp_path / "out" / "f.h5", tmp_path / "log2"
    again = [*command(source, out), "--layout", "sharded"]
    places = ["extract"] * rounds(20) + ["assembly"] * rounds(10)  # at the index, when all shards are there
    for place in places:
        process = start(log, *again, options=[*NUMPY, "--delay", 0.02, "--stall", "assembly"])
        reached = wait_for_images(process, log, 60) if place == "extract" else wait_for_place(process, log, place)
        assert reached, finish(process)
        kill(process)
        assert not out.exists()
    run(log, *again, options=NUMPY)
    assert IMAGES <= inferred(log) <= IMAGES + len(places) * IN_FLIGHT
    assert FeatureStore.open(out).kind == "index"
    assert {path.stem for path in parts_folder(out).glob("*.h5")} == set(FeatureStore.open(out).shards.names)
    for _ in range(rounds(10)):
        process = start(log, "pack", out, options=[*NUMPY, "--stall", "assembly"])
        assert wait_for_place(process, log, "assembly"), finish(process)
        kill(process)
        assert FeatureStore.open(out).kind == "index"
        FeatureStore.open(out).verify()
    run(log, "pack", out)
    assert differences(whole, out) == []
    assert listing(tmp_path / "out") == ["f.h5"]


@pytest.mark.stress
def test_a_keras_backbone_killed_and_run_again_gives_the_same_store(tmp_path: Path) -> None:
    images = rounds(3200)
    source = paint_folder(tmp_path / "images", {"cat": images // 2, "dog": images // 2})
    network = ("--backbone", "mobilenetv2-0.35", "--weights", "random", "--image-size", 32)
    run(tmp_path / "log", *command(source, tmp_path / "whole.h5", *network))
    out, log = tmp_path / "out" / "f.h5", tmp_path / "log2"
    hits = kill_often(KILLS, images, log, command(source, out, *network), ["--delay", 0.1], seed=5)
    assert sum(hits.values()) == KILLS
    run(log, *command(source, out, *network))
    assert differences(tmp_path / "whole.h5", out) == []
    assert np.ptp(FeatureStore.open(out).array()) > 0
    assert images <= inferred(log) <= images + KILLS * IN_FLIGHT
    assert listing(out.parent) == ["f.h5"]


def test_ctrl_c_finishes_the_shards_in_flight_and_says_what_to_do(reference: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = reference
    out, log = tmp_path / "out" / "f.h5", tmp_path / "log2"
    process = start(log, *command(source, out), options=[*NUMPY, "--delay", 0.05])
    assert wait_for_images(process, log, 100)
    process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert code == 130
    assert "stopping after the shards in flight" in errors
    assert "Run the same command again to resume." in errors
    assert "Traceback" not in errors
    assert 100 <= inferred(log) < IMAGES
    assert listing(tmp_path / "out")[0] == "f.h5.parts"
    assert not [name for name in listing(tmp_path / "out") if "tmp" in name or "lock" in name or "writer" in name]
    run(log, *command(source, out), options=NUMPY)
    assert inferred(log) == IMAGES  # none was lost, none made twice
    assert differences(whole, out) == []
    assert listing(tmp_path / "out") == ["f.h5"]


def test_ctrl_c_during_assembly_and_clean_up(reference: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = reference
    out, log = tmp_path / "out" / "f.h5", tmp_path / "log2"
    for place in ("assembly", "clean-up"):
        process = start(log, *command(source, out), options=[*NUMPY, "--stall", place])
        assert wait_for_place(process, log, place, 2)
        process.send_signal(signal.SIGINT)
        code, errors = finish(process)
        assert (code, "Traceback" in errors) == (130, False)
    run(log, *command(source, out), options=NUMPY)
    assert inferred(log) == IMAGES
    assert differences(whole, out) == []
    assert listing(tmp_path / "out") == ["f.h5"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, 8 MB; the tests need the right to mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, pages: int) -> Path:
    """Leave so many pages of 4096 bytes free."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 4096 * pages))
    assert shutil.disk_usage(disk).free == 4096 * pages
    return filler


@pytest.mark.stress
def test_a_full_disk_is_said_and_costs_nothing(small_disk: Path, tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"cat": 100, "dog": 100})
    options = ["--numpy", 640]
    out, log = small_disk / "f.h5", tmp_path / "log"
    run(log, *command(source, out), options=options)
    paint_folder(source, {"owl": 100}, start=2000)
    old = out.read_bytes()
    whole = tmp_path / "whole.h5"
    shutil.copy(out, whole)
    run(log, *command(source, whole), options=options)
    # From no room at all, over the shards and the store, to a few pages short of enough.
    shards, store = 100, -(-whole.stat().st_size // 4096)
    enough = shards + store
    points = [*np.linspace(0, enough, rounds(60)).astype(int).tolist(), *range(enough - rounds(20), enough + 1)]
    said = set()
    for pages in points:
        filler = fill(small_disk, pages)
        process = start(log, *command(source, out), options=options)
        code, errors = finish(process)
        if code == 0 and pages > store:
            said.add("enough")
        else:
            assert code == 1, (pages, code, errors)
            assert "could not be written (No space left on device" in errors, (pages, errors)
            assert "enough free space" in errors
            assert "Traceback" not in errors
            assert out.read_bytes() == old
            assert not [name for name in listing(small_disk) if name.endswith((".tmp", ".lock", ".writer"))]
            said.add("shard" if ".parts/" in errors else "store")
        filler.unlink()
        run(log, *command(source, out), options=options)
        assert differences(whole, out) == []
        assert listing(small_disk) == ["f.h5"]
        out.write_bytes(old)
    assert {"shard", "store"} <= said


CLOSE_ON_FULL_DISK = """
import os, sys
from pathlib import Path
from test_store import write
from features.errors import StoreError
try:
    write(Path(sys.argv[1]))
except StoreError as error:
    print(error)
    held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name.isdecimal()
            and os.path.lexists(f"/proc/self/fd/{name}")]
    print("held", [name for name in held if "deleted" in name])
"""


def test_a_disk_that_fills_up_at_the_last_byte_crashes_nothing(small_disk: Path, tmp_path: Path) -> None:
    """libhdf5 writes its own structures last; where it is told of a full disk there, the process dies at its end."""
    from test_store import write

    need = -(-write(tmp_path / "f.h5").stat().st_size // 4096)
    for short in (1, 2, 3, 5, 8, 13, need // 2, need):
        filler = fill(small_disk, need - short)
        arguments = [sys.executable, "-c", CLOSE_ON_FULL_DISK, str(small_disk / "f.h5")]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, ""), short
        assert f"{small_disk / 'f.h5'}: could not be written (No space left on device" in done.stdout
        assert "held []" in done.stdout
        assert listing(small_disk) == ["filler"]
        filler.unlink()


def test_a_patient_file_keeps_the_first_error(tmp_path: Path) -> None:
    file = PatientFile(tmp_path / "x")
    file.seek(10)
    assert file.write(bytearray(b"abc")) == 3
    assert (file.seek(0, os.SEEK_END), file.tell()) == (13, 13)
    file.seek(8)
    assert file.read(5) == b"\0\0abc"
    assert file.read(7) == b"\0\0abc\0\0"
    file.check()
    os.close(file._descriptor)
    assert file.write(bytearray(b"lost")) == 4
    assert file.truncate(100) == 100
    assert file.read(3) == b"\0\0\0"
    for _ in range(2):
        with pytest.raises(OSError, match="Bad file descriptor"):
            file.check()
    assert (tmp_path / "x").stat().st_size == 13
    with pytest.raises(FileExistsError):
        PatientFile(tmp_path / "x")


def peak_memory(tmp_path: Path, backbone: Path, images: int) -> int:
    """Kilobytes of a whole extracting process at their highest."""
    source = paint_folder(tmp_path / f"images{images}", {"cat": images // 2, "dog": images // 2})
    out = tmp_path / f"{images}.h5"
    run(tmp_path / "log", "extract", source, "--out", out, "--backbone", backbone, "--engine", "keras")
    assert len(FeatureStore.open(out)) == images
    return int((tmp_path / "log").read_text().split()[-1])


@pytest.mark.stress
@pytest.mark.pain(7)
def test_pain_07_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    images = rounds(2_000)
    backbone = save_network(tmp_path / "tiny.keras")
    few, many = (peak_memory(tmp_path, backbone, count) for count in (images, 10 * images))
    print(f"peak memory: {few // 1024} MB for {images} images, {many // 1024} MB for ten times as many")
    assert many < 1.1 * few
