"""Size and time do not say that a file is unchanged; the notes of this machine do, and without one the file is hashed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    ROOT,
    NumpyNetwork,
    assert_rows_are_their_images,
    call_pipeline,
    extract,
    listing,
    paint,
    paint_folder,
)
from PIL import Image, ImageFile

from features.errors import ConfigurationError, SourceError
from features.extraction import notes, planning
from features.extraction.extraction import Extraction
from features.extraction.notes import Notes
from features.extraction.options import ExtractionOptions
from features.extraction.running import Advance, MadeShard, Work, run_here
from features.extraction.shard import KILLS_WORKER, refuse_image
from features.sources.imageset import ImageSet
from features.sources.scan import scan
from features.store.reader import FeatureStore

TIME = 1_700_000_000_000_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four images of two classes, all of one size and one time."""
    root = tmp_path / "images"
    for number, name in enumerate(["cat/1.bmp", "cat/2.bmp", "dog/1.bmp", "dog/2.bmp"]):
        os.utime(paint(root / name, (50 * number, 9, 9)), ns=(TIME, TIME))
    return root


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the images that are read."""
    read, found = ImageSet.read_path, list[str]()

    def counted(images: ImageSet, path: str) -> bytes:
        found.append(path)
        return read(images, path)

    monkeypatch.setattr(ImageSet, "read_path", counted)
    return found


def state(path: Path) -> tuple[int, int, bytes]:
    return path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()


def exchange(first: Path, second: Path) -> None:
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def edit(path: Path, colour: tuple[int, int, int]) -> None:
    """Other content of the same size; the program sets the time back."""
    size, before = path.stat().st_size, path.stat().st_mtime_ns
    Image.new("RGB", (8, 8), colour).save(path)
    os.utime(path, ns=(before, before))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (size, before)


# --- what is unchanged ------------------------------------------------------------------------------------
def test_two_files_that_change_places_change_their_labels(source: Path, tmp_path: Path) -> None:
    network = NumpyNetwork()
    extract(source, tmp_path / "f.h5", network)
    exchange(source / "cat/1.bmp", source / "dog/1.bmp")
    result = extract(source, tmp_path / "f.h5", network)
    assert_rows_are_their_images(result.store, source)
    assert (result.written, result.inferred, result.counts["moved"], result.counts["removed"]) == (True, 0, 2, 0)
    result.store.verify()


@pytest.mark.slow
def test_an_edit_with_the_time_set_back_is_seen(source: Path, tmp_path: Path, reads: list[str]) -> None:
    extract(source, tmp_path / "f.h5")
    edit(source / "dog/2.bmp", (1, 2, 3))
    reads.clear()
    result = extract(source, tmp_path / "f.h5")
    assert set(reads) == {"dog/2.bmp"}
    assert_rows_are_their_images(result.store, source)
    assert (result.inferred, result.counts["changed"], result.counts["hashed"]) == (1, 1, 1)


def test_what_is_noted_is_not_read(source: Path, tmp_path: Path, reads: list[str]) -> None:
    extract(source, tmp_path / "f.h5")
    reads.clear()
    result = extract(source, tmp_path / "f.h5")
    assert (reads, result.written, result.counts["cached"], result.counts["hashed"]) == ([], False, 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "sharded"])
def test_without_a_note_images_are_hashed_once_and_the_store_stays(
    source: Path, tmp_path: Path, cache: Path, reads: list[str], layout: str
) -> None:
    network, out = NumpyNetwork(), tmp_path / "f.h5"
    extract(source, out, network, layout=layout)
    before, made, names = state(out), sum(network.batches), listing(tmp_path / "f.h5.parts")
    shutil.rmtree(cache)
    for hashed in (4, 0):
        reads.clear()
        result = extract(source, out, network)
        assert (len(reads), result.counts["hashed"], result.counts["cached"]) == (hashed, hashed, 4)
        assert (result.written, result.inferred) == (False, 0)
    assert (state(out), sum(network.batches), listing(tmp_path / "f.h5.parts")) == (before, made, names)


def test_a_fresh_checkout_is_hashed_once_and_the_store_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.h5"
    extract(source, out)
    before = state(out)
    for path in source.rglob("*.bmp"):  # other inodes, other times
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    counts = [extract(source, out).counts["hashed"] for _ in range(2)]
    assert counts == [4, 0]
    assert state(out) == before


def test_the_command_says_how_many_were_hashed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.stages import extract as stage

    monkeypatch.setattr(
        stage, "prepare", lambda images, out, options, **_: Extraction(scan(images), NumpyNetwork(), out, options)
    )
    extract(source, tmp_path / "f.h5")
    shutil.rmtree(os.environ["BOTTLENECK_CACHE"])
    result = call_pipeline("extract", source, "--out", tmp_path / "f.h5", "--dry-run")
    assert "4 images (4 cached, 4 hashed), 0 to infer" in result.stdout
    result = call_pipeline("extract", source, "--out", tmp_path / "f.h5")
    assert "  4 images hashed, none new\n  nothing to do: 4 rows cached, 0 inferred, file untouched" in result.stdout
    result = call_pipeline("extract", source, "--out", tmp_path / "f.h5", "--trust-times", "--rehash")
    assert result.returncode == 2
    assert "give one of them" in result.stderr


def test_rehash_reads_what_is_noted(source: Path, tmp_path: Path, reads: list[str]) -> None:
    extract(source, tmp_path / "f.h5")
    reads.clear()
    assert extract(source, tmp_path / "f.h5", rehash=True).written is False
    assert len(reads) == 4


@pytest.mark.slow
def test_trust_times_reads_nothing_and_notes_nothing(
    source: Path, tmp_path: Path, cache: Path, reads: list[str]
) -> None:
    out = tmp_path / "f.h5"
    extract(source, out)
    shutil.rmtree(cache)
    exchange(source / "cat/1.bmp", source / "dog/1.bmp")
    reads.clear()
    result = extract(source, out, trust_times=True)
    assert (reads, result.written, result.counts["hashed"]) == ([], False, 0)  # as asked for: the exchange is not seen
    assert not cache.exists()  # what only times say is not worth a note
    result = extract(source, out)
    assert result.counts["moved"] == 2
    assert_rows_are_their_images(result.store, source)
    os.utime(source / "cat/2.bmp", ns=(TIME + 1, TIME + 1))
    assert extract(source, out, trust_times=True).counts["hashed"] == 1
    assert extract(source, out, trust_times=True).counts["hashed"] == 0  # the store has the new time
    with pytest.raises(ConfigurationError, match="give one of them"):
        ExtractionOptions(rehash=True, trust_times=True)


@pytest.mark.slow
def test_notes_of_one_root_do_not_serve_another(source: Path, tmp_path: Path, reads: list[str]) -> None:
    extract(source, tmp_path / "f.h5")
    shutil.copytree(source, tmp_path / "copy")
    reads.clear()
    result = extract(tmp_path / "copy", tmp_path / "f.h5")
    assert (len(reads), result.inferred) == (4, 0)
    for root in (source, tmp_path / "copy"):
        reads.clear()
        assert extract(root, tmp_path / "f.h5").counts["hashed"] == 0
        assert reads == []


@pytest.mark.slow
def test_an_unreadable_file_is_tried_again_only_without_a_note(source: Path, tmp_path: Path, cache: Path) -> None:
    (source / "cat" / "3.bmp").write_bytes(b"BM" + b"no image" * 9)
    out, options = tmp_path / "f.h5", {"max_unreadable": 0.5}
    assert extract(source, out, **options).counts["unreadable"] == 1
    before = state(out)
    again = extract(source, out, **options)
    assert (again.counts["unreadable"], again.counts["changed"], again.written) == (1, 0, False)
    shutil.rmtree(cache)  # as after an upgrade, which may read more kinds of files
    again = extract(source, out, **options)
    assert (again.counts["unreadable"], again.counts["changed"], again.written) == (1, 1, False)
    assert state(out) == before
    assert listing(tmp_path / "images") == sorted(listing(source))


@pytest.mark.slow
def test_an_image_that_ends_its_process_is_not_tried_again_without_a_note(
    source: Path, tmp_path: Path, cache: Path
) -> None:
    """Not even on another path: every try may cost a worker. Only another content or ``--rehash`` is one more."""
    tried: list[str] = []

    def run_shards(work: Work, advance: Advance) -> Generator[MadeShard, None, None]:
        tried.extend(path for spec in work.specs for path in spec.paths)
        for spec in work.specs:
            for row in range(len(spec)):
                one = spec.part(row, row + 1)
                if one.paths == ("cat/1.bmp",):
                    record = refuse_image(one, work.folder, read=work.reader(), reason=KILLS_WORKER)
                    yield MadeShard(spec, record, "")
                else:
                    for made in run_here(dataclasses.replace(work, specs=(one,)), advance):
                        yield dataclasses.replace(made, planned=spec)

    def run(**options: object) -> FeatureStore:
        asked = ExtractionOptions(batch_size=4, max_unreadable=0.5, **options)
        return Extraction(scan(source), NumpyNetwork(), tmp_path / "f.h5", asked, run_shards).run().store

    assert run().quarantine.reasons == (KILLS_WORKER,)
    shutil.rmtree(cache)
    tried.clear()
    assert run().quarantine.reasons == (KILLS_WORKER,)
    (source / "cat/1.bmp").rename(source / "cat/9.bmp")
    assert run().quarantine.paths == ("cat/9.bmp",)
    assert tried == []
    assert len(run(rehash=True)) == 4
    assert tried == ["cat/9.bmp"]


@pytest.mark.slow
def test_a_run_that_was_stopped_leaves_notes_of_what_it_read(source: Path, tmp_path: Path, reads: list[str]) -> None:
    paint_folder(source, {"cow": 60}, start=300)
    network, out = NumpyNetwork(), tmp_path / "f.h5"
    network.fail_after = 4
    with pytest.raises(KeyboardInterrupt):
        extract(source, out, network)
    done = sum(network.batches)
    reads.clear()
    result = extract(source, out, network)
    assert sum(network.batches) == 64
    assert len(set(reads)) == 64 - done  # what the first run made is not read again, not even hashed
    assert_rows_are_their_images(result.store, source)


# --- what was removed -------------------------------------------------------------------------------------
def test_a_moved_file_is_not_a_removed_one(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "f.h5")
    (source / "cat/1.bmp").rename(source / "dog/9.bmp")
    (source / "dog/2.bmp").unlink()
    result = extract(source, tmp_path / "f.h5")
    assert (result.counts["moved"], result.counts["removed"], result.counts["cached"]) == (1, 1, 2)


def test_a_copy_that_goes_is_removed(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "cat/1.bmp", source / "cat/copy.bmp")
    extract(source, tmp_path / "f.h5")
    (source / "cat/copy.bmp").unlink()
    result = extract(source, tmp_path / "f.h5")
    assert (result.counts["moved"], result.counts["removed"], result.counts["cached"]) == (0, 1, 4)


# --- where notes are bad or cannot be kept ----------------------------------------------------------------
def test_notes_that_somebody_else_wrote_are_not_used(
    source: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "f.h5"
    extract(source, out)
    [path] = (cache / "notes").iterdir()
    exchange(source / "cat/1.bmp", source / "dog/1.bmp")
    images, notes = scan(source), Notes.read(out, str(source))
    notes.replaced(images.paths, images.stamps, [*map(bytes, notes.sha256)]).write()  # "all is as it was"
    path.write_bytes(b"0" * 64 + path.read_bytes()[64:])
    result = extract(source, out)
    assert_rows_are_their_images(result.store, source)
    assert result.counts["hashed"] == 4
    assert [record.getMessage() for record in caplog.records if "is not used" in record.getMessage()] == [
        f"{path} is not used (it does not carry this user's signature); images are read and hashed again"
    ]


def refusing(code: int) -> Callable[..., Any]:
    def write(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return write


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_cache_costs_one_line(
    source: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("features.extraction.notes.write_signed", refusing(code))
    result = extract(source, tmp_path / "f.h5")
    assert_rows_are_their_images(result.store, source)
    [message] = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert os.strerror(code) in message
    assert "--trust-times" in message
    assert extract(source, tmp_path / "f.h5").counts["hashed"] == 4


def test_paths_that_are_not_utf8_are_noted(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "cache" / "notes" / "x.npz")
    stamps = np.arange(8, dtype=np.int64).reshape(2, 4)
    made = notes.replaced(["a\udcff.png", "b"], stamps, [b"1" * 32, None])
    assert (made.paths, made.stamps.tolist()) == (["a\udcff.png"], [[0, 1, 2, 3]])
    fixed = Notes.read(tmp_path / "f.h5", "/r")
    fixed.updated(["a\udcff.png", "b"], stamps, [b"1" * 32, b"2" * 32]).write()
    again = Notes.read(tmp_path / "f.h5", "/r")
    assert again.hashes(["b", "a\udcff.png", "c"], stamps[[1, 0, 0]]) == [b"2" * 32, b"1" * 32, None]
    assert again.hashes(["b"], stamps[[0]]) == [None]
    more = again.updated(["b"], stamps[[0]], [b"3" * 32])
    assert more.hashes(["a\udcff.png", "b"], stamps[[0, 0]]) == [b"1" * 32, b"3" * 32]
    assert more.updated(["b"], stamps[[0]], [b"3" * 32]) is more


@pytest.mark.slow
def test_two_extractions_at_once_leave_notes_of_both(source: Path, tmp_path: Path, reads: list[str]) -> None:
    outs = [tmp_path / f"{number}.h5" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda out: extract(source, out), [*outs]):
            assert_rows_are_their_images(result.store, source)
    reads.clear()
    for out in outs:
        assert extract(source, out).counts["hashed"] == 0
    assert reads == []


@pytest.mark.slow
@pytest.mark.parametrize("home", ["missing", "read-only"])
def test_a_home_that_cannot_be_written_costs_lines_and_no_more(source: Path, tmp_path: Path, home: str) -> None:
    """With the real command, on a network of numpy, in a process that has no cache and no key."""
    place = {"missing": "/proc/no home", "read-only": "/proc/self"}[home]  # where root cannot write either
    environment = {"HOME": place, "BOTTLENECK_CACHE": "", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
    command = [sys.executable, ROOT / "tests" / "faults.py", tmp_path / "log", "--numpy", "8", "--"]
    command += ["extract", source, "--out", tmp_path / "f.h5"]
    for hashed in (0, 4):
        done = subprocess.run(
            [*map(str, command), "--json"],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["hashed"] == hashed
        assert "Traceback" not in done.stderr
        said = [line for line in done.stderr.splitlines() if "classes without images" not in line]
        assert len([line for line in said if line.startswith("WARNING")]) == 1, done.stderr


# --- a store that cannot be written -----------------------------------------------------------------------
def test_a_store_in_a_read_only_folder_is_used_if_there_is_nothing_to_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.h5"
    extract(source, out)
    before = state(out)
    monkeypatch.setattr("tempfile.TemporaryFile", refusing(errno.EROFS))
    result = extract(source, out)
    assert (result.written, result.counts["cached"], len(result.store)) == (False, 4, 4)
    assert state(out) == before
    (source / "cat/1.bmp").unlink()
    with pytest.raises(OSError, match="Read-only file system"):
        extract(source, out)
    with pytest.raises(OSError, match="Read-only file system"):
        extract(source, tmp_path / "other.h5")


# --- archives ---------------------------------------------------------------------------------------------
def pack(source: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(source, arcname=".")
    os.utime(path, ns=(TIME, TIME))
    return path


def same_size(first: Path, second: Path) -> None:
    """Make two archives of the same length; gzip ignores zeros at the end."""
    short, long = sorted([first, second], key=lambda path: path.stat().st_size)
    with open(short, "ab") as file:
        file.write(bytes(long.stat().st_size - short.stat().st_size))
    for path in (first, second):
        os.utime(path, ns=(TIME, TIME))


def colours(store: FeatureStore) -> dict[str, int]:
    return dict(zip(store.images.paths, store.array("last.avg")[:, 0, 0].astype(int).tolist(), strict=True))


@pytest.mark.slow
def test_an_archive_of_the_same_size_and_time_is_expanded_again(source: Path, tmp_path: Path) -> None:
    first = pack(source, tmp_path / "a.tar.gz")
    edit(source / "dog/2.bmp", (111, 9, 9))
    second = pack(source, tmp_path / "b.tar.gz")
    same_size(first, second)
    assert colours(extract(first, tmp_path / "f.h5").store)["dog/2.bmp"] == 150
    second.replace(first)
    result = extract(first, tmp_path / "f.h5")
    assert colours(result.store)["dog/2.bmp"] == 111
    assert (result.inferred, result.counts["hashed"]) == (1, 4)


def test_a_flipped_byte_in_the_expanded_copy_is_found(
    source: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = pack(source, tmp_path / "a.tar.gz")
    scan(path)
    [copy] = (cache / "archives").glob("*.tar")
    good, times = copy.read_bytes(), copy.stat().st_mtime_ns
    with open(copy, "r+b") as file:
        file.seek(good.index(b"\x96\x09") if b"\x96\x09" in good else len(good) // 2)
        file.write(b"\x55")
    os.utime(copy, ns=(times, times))
    assert copy.read_bytes() != good
    assert colours(extract(path, tmp_path / "f.h5").store)["dog/2.bmp"] == 150
    assert copy.read_bytes() == good
    assert f"{copy} is not used (its digest is not the one noted); the archive is expanded again" in caplog.text
    os.utime(copy, ns=(times + 1, times + 1))  # another stamp, the same content: hashed, not expanded
    inode = copy.stat().st_ino
    scan(path)
    assert copy.stat().st_ino == inode


def test_a_disk_that_is_full_behind_the_expanded_copy(
    source: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(source, tmp_path / "a.tar.gz")
    with monkeypatch.context() as patch, pytest.raises(SourceError, match=r"cannot be expanded into .*No space left"):
        patch.setattr("features.sources.archives.write_signed", refusing(errno.ENOSPC))
        scan(path)
    assert listing(cache) == ["archives"]
    assert len(scan(path)) == 4


def test_rehash_expands_an_archive_again(source: Path, tmp_path: Path, cache: Path) -> None:
    path = pack(source, tmp_path / "a.tar.gz")
    scan(path)
    [copy] = (cache / "archives").glob("*.tar")
    before = copy.stat().st_ino
    scan(path)
    assert copy.stat().st_ino == before
    scan(path, trust="nothing")
    assert copy.stat().st_ino != before
    os.link(path, tmp_path / "link")  # changes the change time alone
    scan(path, trust="times")
    assert [*(cache / "archives").glob("*.tar")] == [copy]
    scan(path)
    assert [*(cache / "archives").glob("*.tar")] != [copy]


@pytest.mark.slow
def test_an_image_for_which_memory_ended_is_tried_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is whole: it was decoded beside something that took the memory."""
    out, file_load = tmp_path / "f.h5", ImageFile.ImageFile.load
    ended = [True]
    content = (source / "cat/2.bmp").read_bytes()

    def load_or_end(image: Any) -> Any:
        if ended[0] and image.fp is not None and image.fp.getvalue() == content:
            raise MemoryError
        return file_load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load_or_end)
    result = extract(source, out, max_unreadable=0.5)
    assert (result.store.quarantine.paths, result.store.quarantine.reasons) == (("cat/2.bmp",), ("no-memory",))
    assert not result.store.quarantine.sha256.any()
    ended[0] = False
    result = extract(source, out)
    assert (len(result.store), len(result.store.quarantine), result.inferred) == (4, 0, 1)
    assert_rows_are_their_images(result.store, source)


@pytest.mark.slow
def test_what_another_decoder_refused_is_tried_again_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    (source / "dog/3.bmp").write_bytes(b"BM of a kind that this Pillow does not read")
    out = tmp_path / "f.h5"

    def run() -> tuple[list[str], bool]:
        reads.clear()
        result = extract(source, out, max_unreadable=0.5)
        return list(reads), result.written

    assert run()[1]
    assert run() == ([], False)
    monkeypatch.setattr(notes, "decoder_version", lambda: "Pillow 99")
    monkeypatch.setattr(planning, "decoder_version", lambda: "Pillow 99")
    assert run() == (["dog/3.bmp"], False)  # decoded again, in vain
    assert run() == ([], False)
    Image.new("RGB", (8, 8)).save(source / "dog/3.bmp")
    assert run()[1]
    assert run() == ([], False)


def test_notes_are_read_once_as_long_as_their_file_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, stamps = tmp_path / "f.h5", np.arange(8).reshape(2, 4)
    opened, signed_file = list[Path](), notes.signed_file
    monkeypatch.setattr(notes, "signed_file", lambda path: opened.append(path) or signed_file(path))
    Notes.read(store, "").replaced(["a", "b"], stamps, [b"1" * 32, b"2" * 32]).write()
    opened.clear()
    assert [Notes.read(store, "").hashes(["b", "c"], stamps[[1, 0]]) for _ in range(3)] == [[b"2" * 32, None]] * 3
    assert len(opened) == 1
    Notes.read(store, "").updated(["c"], stamps[:1], [b"3" * 32]).write()
    assert Notes.read(store, "").hashes(["b", "c"], stamps[[1, 0]]) == [b"2" * 32, b"3" * 32]
    assert len(opened) == 2
    path = opened[0]
    path.write_bytes(b"\0" * path.stat().st_size)
    assert Notes.read(store, "").paths == []  # damaged in place
    path.unlink()
    assert Notes.read(store, "").paths == []
