"""Forgetting images: rows, shards, quarantine and notes are gone from every byte, and a kill leaves one state or the other."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, NumpyNetwork, assert_rows_are_their_images, extract, listing, paint_folder, rounds

from features.cache import cache_path
from features.extraction.forgetting import forget, held
from features.extraction.notes import Notes
from features.store.reader import FeatureStore, parts_folder

GONE = ("cat/0003.png", "dog/0001.png", "cat/broken.png")


def photos(folder: Path) -> Path:
    paint_folder(folder / "photos", {"cat": 40, "dog": 30})
    (folder / "photos/cat/broken.png").write_bytes(b"no picture at all")
    return folder / "photos"


def hashes_of(source: Path, names: tuple[str, ...] = GONE) -> list[bytes]:
    return [hashlib.sha256((source / name).read_bytes()).digest() for name in names]


def traces(folder: Path, needles: list[bytes]) -> list[str]:
    """Files under a folder that hold one of these byte strings in their contents, or in their names."""
    found = []
    for path in sorted(folder.rglob("*")):
        data = os.fsencode(path.name) + (path.read_bytes() if path.is_file() else b"")
        if any(needle in data for needle in needles):
            found.append(str(path.relative_to(folder)))
    return found


def needles_of(hashes: list[bytes]) -> list[bytes]:
    raw = [*hashes, *(digest.hex().encode() for digest in hashes)]
    return [*raw, *(name.encode() for name in GONE)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "sharded"])
def test_no_byte_of_the_folder_holds_what_was_forgotten(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))  # other tests have notes of the same images
    source, out = photos(tmp_path), tmp_path / "store" / "features.h5"
    out.parent.mkdir()
    extract(source, out, layout=layout, max_unreadable=0.5)
    hashes = hashes_of(source)
    assert traces(out.parent, needles_of(hashes)) != []
    before = FeatureStore.open(out)
    kept = [path for path in before.images.paths if path not in GONE]
    splits = dict(zip(before.images.paths, before.images.splits.tolist(), strict=True))
    found = forget(out, hashes)
    assert (found.rows, found.quarantined, set(found.paths)) == (2, 1, set(GONE))
    after = FeatureStore.open(out)
    after.verify()
    assert list(after.images.paths) == kept
    assert [splits[path] for path in kept] == after.images.splits.tolist()
    assert len(after.quarantine) == 0
    assert_rows_are_their_images(after, source)
    assert traces(out.parent, needles_of(hashes)) == []
    assert traces(cache_path("notes"), needles_of(hashes)) == []
    assert not held(out, hashes)
    assert not forget(out, hashes)


@pytest.mark.slow
def test_the_notes_of_other_images_stay(tmp_path: Path) -> None:
    source, out = photos(tmp_path), tmp_path / "features.h5"
    extract(source, out, max_unreadable=0.5)
    before = Notes.read(out, str(source))
    assert "cat/0003.png" in before.paths
    forget(out, hashes_of(source))
    assert set(before.paths) - set(Notes.read(out, str(source)).paths) == set(GONE)


@pytest.mark.slow
def test_only_shards_that_held_a_row_are_written_again(tmp_path: Path) -> None:
    source, out = photos(tmp_path), tmp_path / "features.h5"
    extract(source, out, layout="sharded", max_unreadable=0.5)
    before = set(listing(parts_folder(out)))
    forget(out, hashes_of(source, ("cat/0003.png",)))
    after = set(listing(parts_folder(out)))
    assert (len(before - after), len(after - before)) == (1, 1)
    network = NumpyNetwork()
    (source / "cat/0003.png").unlink()
    extract(source, out, network, max_unreadable=0.5)  # nothing is missing but what was forgotten
    assert network.batches == []
    assert_rows_are_their_images(FeatureStore.open(out), source)


@pytest.mark.slow
def test_an_unfinished_extraction_loses_the_shard_that_holds_the_image(tmp_path: Path) -> None:
    source, out = photos(tmp_path), tmp_path / "features.h5"
    extract(source, out, max_unreadable=0.5)
    paint_folder(source, {"emu": 30}, start=200)
    network = NumpyNetwork()
    network.fail_after = 5
    with pytest.raises(KeyboardInterrupt):
        extract(source, out, network, max_unreadable=0.5)
    shards = list(parts_folder(out).glob("*.h5"))
    names = [path for shard in shards for path in FeatureStore.open_shard(shard).images.paths]
    hashes = hashes_of(source, (names[0],))
    assert names[0].startswith("emu/")
    found = forget(out, hashes)
    assert (found.rows, found.shards, found.paths) == (0, 1, (names[0],))
    assert traces(tmp_path / "features.h5.parts", hashes) == []
    assert len(FeatureStore.open(out)) == 70


def test_a_store_without_any_row_left_can_be_read(tmp_path: Path) -> None:
    source, out = paint_folder(tmp_path / "photos", {"cat": 3}), tmp_path / "features.h5"
    extract(source, out)
    forget(out, hashes_of(source, ("cat/0000.png", "cat/0001.png", "cat/0002.png")))
    after = FeatureStore.open(out)
    after.verify()
    assert (len(after), after.classes, after.shape("last.avg")) == (0, ("cat",), (0, 1, 3))


KILLED = """
import os, signal, sys
from pathlib import Path
import features.files, features.extraction.journal
from features.extraction.forgetting import forget

left = 0
def counted(function):
    def call(*arguments, **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)
    return call

hashes = [bytes.fromhex(text) for text in sys.argv[1].split(",")]
for path in sys.argv[2:]:  # each in a process of its own, which need not import anything
    child = os.fork()
    if not child:
        left = int(Path(path).parent.name)
        for name in ("replace", "unlink", "fsync", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        forget(Path(path), hashes)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
    if status != -signal.SIGKILL:
        break
"""


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize("layout", ["packed", "sharded"])
def test_a_kill_leaves_the_state_before_or_after(tmp_path: Path, layout: str) -> None:
    """Killed before each change of a file in turn; the same call then finishes the work."""
    source = photos(tmp_path)
    hashes = hashes_of(source)
    made = tmp_path / "made" / "features.h5"
    made.parent.mkdir()
    extract(source, made, layout=layout, max_unreadable=0.5)
    stores = [tmp_path / str(step) / "features.h5" for step in range(0, 60, max(1, 60 // rounds(60)))]
    for out in stores:
        shutil.copytree(made.parent, out.parent)
    command = [sys.executable, "-c", KILLED, ",".join(digest.hex() for digest in hashes), *map(str, stores)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ends = list(map(int, done.stdout.split()))
    assert ends[0] == -signal.SIGKILL
    assert ends[-1] in (0, -signal.SIGKILL), done.stderr
    assert ends[-1] == 0 or len(stores) < 60, "the last step was never reached"
    for out in stores[: len(ends)]:
        state = FeatureStore.open(out)
        state.verify()
        assert len(state) in (70, 68)
        forget(out, hashes)
        after = FeatureStore.open(out)
        after.verify()
        assert len(after) == 68
        assert traces(out.parent, needles_of(hashes)) == []
