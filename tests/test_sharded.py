"""A sharded store reads as a packed one does: an index, and shards that stay where they were made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ROOT,
    NumpyNetwork,
    as_engine,
    assert_rows_are_their_images,
    call_pipeline,
    extract,
    listing,
    paint,
    paint_folder,
    recipe,
)

from features.errors import ConfigurationError, FormatVersionError, IntegrityError, StoreError
from features.extraction.extraction import pack_store
from features.extraction.journal import PartsFolder
from features.store.reader import FeatureStore, parts_folder, shard_path
from features.store.schema import FeatureSpec, ImageTable, Quarantine, ShardTable
from features.store.writer import StoreWriter

pytestmark = pytest.mark.slow  # dozens of whole extractions

ROWS, WIDTH, SHARD_ROWS = 200_000, 256, 2048


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return paint_folder(tmp_path / "images", {"cat": 13, "dog": 20})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "f.h5"


def assert_same(first: FeatureStore, second: FeatureStore) -> None:
    assert first.names == second.names
    for name in first.names:
        np.testing.assert_array_equal(np.asarray(first.array(name)), np.asarray(second.array(name)))
    for column, values in vars(first.images).items():
        np.testing.assert_array_equal(values, getattr(second.images, column))
    for column, values in vars(first.quarantine).items():
        np.testing.assert_array_equal(values, getattr(second.quarantine, column))
    assert (first.classes, first.split_rule, first.source) == (second.classes, second.split_rule, second.source)
    assert first.quarantine.paths == second.quarantine.paths


def test_a_sharded_store_reads_as_the_packed_one(source: Path, out: Path, tmp_path: Path) -> None:
    (source / "cat" / "bad.png").write_bytes(b"no image")
    network = NumpyNetwork([recipe(), recipe("corner")])
    sharded = extract(source, out, network, layout="sharded").store
    packed = extract(source, tmp_path / "p.h5", NumpyNetwork([recipe(), recipe("corner")])).store
    assert (sharded.kind, packed.kind) == ("index", "store")
    assert len(sharded.shards.names) == 3
    assert listing(parts_folder(out)) == sorted([*(f"{name}.h5" for name in sharded.shards.names), "manifest.jsonl"])
    assert_same(sharded, packed)
    assert_rows_are_their_images(sharded, source)
    for split in ("train", "validation", None):
        for mine, theirs in zip(sharded.load(split, "corner.avg"), packed.load(split, "corner.avg"), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert sharded.data_digest == packed.data_digest
    assert sharded.verify() > packed.verify()


def test_indexing_is_that_of_numpy(source: Path, out: Path) -> None:
    array = extract(source, out, layout="sharded").store.array()
    whole = array[:]
    assert (array.shape, array.dtype, len(array), array.ndim) == (whole.shape, whole.dtype, len(whole), whole.ndim)
    rows = np.random.default_rng(0).permutation(33)
    for key in (5, -1, slice(3, 30, 4), rows, rows % 2 == 0, (rows, 0), (slice(None), 0), ([2, 2, 7], slice(0, 1)), []):
        np.testing.assert_array_equal(array[key], whole[key])
    with pytest.raises(IndexError, match=r"by images and views only"):
        array[0, 0, 1]
    for key in (..., (..., 0), (slice(None), ...), np.ones((33, 1, 3), bool)):
        with pytest.raises(IndexError):
            array[key]
    with pytest.raises(IndexError, match="out of bounds"):
        array[33]


def test_increments_keep_the_shards_that_are_used(source: Path, out: Path) -> None:
    network = NumpyNetwork()
    before = set(extract(source, out, network, layout="sharded").store.shards.names)
    result = extract(source, out, network)
    assert (sum(network.batches), result.written) == (33, False)

    for number in range(3):
        paint(source / "cat" / f"new{number}.png", (200, 100, number))
    (source / "dog").rename(source / "wolf")
    result = extract(source, out, network)
    assert sum(network.batches) == 33 + 3
    assert (result.store.kind, result.store.classes) == ("index", ("cat", "wolf"))
    assert before < set(result.store.shards.names)
    assert_rows_are_their_images(result.store, source)

    for path in (source / "wolf").iterdir():  # every row of the last shards
        path.unlink()
    result = extract(source, out, network, overwrite=True)
    assert sum(network.batches) == 36
    assert len(result.store.shards.names) < len(before)
    # What the state before needed stays for one run more, as it may have readers.
    assert {path.stem for path in parts_folder(out).glob("*.h5")} > set(result.store.shards.names)
    assert not extract(source, out, network).written
    assert {path.stem for path in parts_folder(out).glob("*.h5")} == set(result.store.shards.names)
    assert_rows_are_their_images(result.store, source)
    result.store.verify()


def test_a_missing_shard_is_named_and_only_its_images_are_computed_again(source: Path, out: Path) -> None:
    network = NumpyNetwork()
    store = extract(source, out, network, layout="sharded").store
    lost = shard_path(parts_folder(out), store.shards.names[0])
    rows = (store.places("last.avg")[..., 0] == 0).sum()
    lost.unlink()
    with pytest.raises(IntegrityError, match=rf"{lost.name}: the shard is missing.*only the images of this shard are"):
        FeatureStore.open(out).load()
    with pytest.raises(IntegrityError, match=lost.name):
        FeatureStore.open(out).verify()
    result = extract(source, out, network)
    assert sum(network.batches) == 33 + rows
    assert_rows_are_their_images(result.store, source)
    result.store.verify()


def test_a_changed_or_exchanged_shard_is_found(source: Path, out: Path) -> None:
    store = extract(source, out, layout="sharded").store
    first, second = (shard_path(parts_folder(out), name) for name in store.shards.names[:2])
    data = first.read_bytes()
    offset = FeatureStore.open_shard(first).array().offset
    first.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
    with pytest.raises(
        IntegrityError, match=rf"{first.name}: /features/last.avg rows 0 to \d+ are not what was written"
    ):
        FeatureStore.open(out).load()
    with pytest.raises(IntegrityError, match=first.name):
        FeatureStore.open(out).verify()
    first.write_bytes(second.read_bytes())
    for check in (FeatureStore.load, FeatureStore.verify):
        with pytest.raises(IntegrityError, match=rf"{first.name}: the shard is not the one that was written"):
            check(FeatureStore.open(out))


def test_packing_gives_the_packed_store_and_removes_the_shards(source: Path, out: Path, tmp_path: Path) -> None:
    extract(source, out, layout="sharded")
    packed = extract(source, tmp_path / "p.h5").store
    aside = pack_store(out, tmp_path / "aside.h5")
    assert_same(aside, packed)
    assert parts_folder(out).exists()
    with pytest.raises(StoreError, match=r"aside\.h5: exists already"):
        pack_store(out, tmp_path / "aside.h5")
    assert_same(pack_store(out), packed)
    assert not parts_folder(out).exists()
    network = NumpyNetwork()
    assert (extract(source, out, network).store.kind, network.batches) == ("store", [])
    assert_same(pack_store(out), packed)  # once more changes nothing


def test_the_layout_changes_one_way_only(source: Path, out: Path) -> None:
    network = NumpyNetwork()
    extract(source, out, network, layout="sharded")
    assert extract(source, out, network, layout="packed").store.kind == "store"
    assert sum(network.batches) == 33
    assert not parts_folder(out).exists()
    with pytest.raises(ConfigurationError, match="cannot become a sharded store"):
        extract(source, out, network, layout="sharded")
    with pytest.raises(ConfigurationError, match=r"layout: received 'shards'.*did you mean 'sharded'"):
        extract(source, out, network, layout="shards")


def test_an_added_layer_and_an_interrupted_increment(source: Path, out: Path) -> None:
    extract(source, out, layout="sharded")
    network = NumpyNetwork([recipe(), recipe("corner")])
    network.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        extract(source, out, network)
    assert FeatureStore.open(out).names == ("last.avg",)  # as it was
    FeatureStore.open(out).verify()
    result = extract(source, out, network)
    assert sum(network.batches) == 33  # the new layer, once
    assert result.store.names == ("corner.avg", "last.avg")
    np.testing.assert_allclose(result.store.array("corner.avg")[:], result.store.array("last.avg")[:], rtol=1e-6)
    assert_rows_are_their_images(result.store, source)


def test_the_command_line_packs(source: Path, out: Path) -> None:
    extract(source, out, layout="sharded")
    result = call_pipeline("verify", out)
    assert result.returncode == 0, result.stderr
    result = call_pipeline("pack", out)
    assert result.returncode == 0, result.stderr
    assert FeatureStore.open(out).kind == "store"
    assert not parts_folder(out).exists()


def hide_a_change(path: Path, colour: tuple[int, int, int]) -> None:
    """Other pixels, the same size and time."""
    before = path.stat()
    paint(path, colour)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_shard_is_never_written_over(source: Path, out: Path) -> None:
    extract(source, out, layout="sharded")
    network = NumpyNetwork()
    first, second = source / "cat" / "a.bmp", source / "dog" / "b.bmp"
    paint(first, (200, 200, 200))
    extract(source, out, network)
    second.write_bytes(first.read_bytes())
    reader = extract(source, out, network).store
    assert sum(network.batches) == 1  # the copy has its row in the shard of the other
    hide_a_change(first, (5, 5, 5))
    after = extract(source, out, network, rehash=True).store
    assert sum(network.batches) == 2
    for store, colour in ((reader, 200), (after, 5)):
        rows = dict(zip(store.images.paths, store.array()[:, 0][:, 0], strict=True))
        assert (rows["cat/a.bmp"], rows["dog/b.bmp"]) == (colour, 200)
    after.verify()


def test_a_lost_shard_made_anew_with_other_rounding_is_another_shard(source: Path, out: Path) -> None:
    store = extract(source, out, layout="sharded").store
    shard_path(parts_folder(out), store.shards.names[1]).unlink()

    class Rounded(NumpyNetwork):
        def engine(self, recipes, **options):
            inner = super().engine(recipes, **options)
            return as_engine(lambda batch: {key: rows * np.float32(1 + 2**-23) for key, rows in inner(batch).items()})

    network = Rounded()
    network.fail_after = 0
    with pytest.raises(KeyboardInterrupt):
        extract(source, out, network)
    result = extract(source, out, network)
    assert result.written
    result.store.verify()
    assert_rows_are_their_images(result.store, source)


def test_packing_keeps_what_is_not_in_the_index_yet(source: Path, out: Path) -> None:
    extract(source, out, layout="sharded")
    for number in range(20):
        paint(source / "cat" / f"new{number}.png", (200, 100, number))
    network = NumpyNetwork()
    network.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        extract(source, out, network)
    (out.parent / f".{out.name}.0badcafe.tmp").write_bytes(b"of a killed process")
    assert len(pack_store(out)) == 33
    assert not list(out.parent.glob(".*.tmp"))
    result = extract(source, out, network)
    assert sum(network.batches) == 20
    assert_rows_are_their_images(result.store, source)
    assert listing(out.parent) == sorted(["f.h5", "images", *(f"images/{name}" for name in listing(source))])


def test_a_killed_clean_up_is_finished_by_the_next_run(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the new store and the removal of the old shards, which are of another recipe."""
    for layout in ("packed", "sharded"):
        extract(source, out, layout="sharded", overwrite=True)
        for name in ("drop", "keep", "remove"):
            monkeypatch.setattr(PartsFolder, name, lambda *_: None)
        extract(source, out, NumpyNetwork([recipe(seed=1)]), overwrite=True, layout=layout)
        monkeypatch.undo()
        network = NumpyNetwork([recipe(seed=1)])
        result = extract(source, out, network)
        assert network.batches == []
        assert result.store.kind == ("store" if layout == "packed" else "index")
        left = {path.stem for path in parts_folder(out).glob("*.h5")}
        assert left == set(result.store.shards.names)
        out.unlink()
        shutil.rmtree(parts_folder(out), ignore_errors=True)


def test_overwriting_keeps_the_layout_and_a_lost_index_is_made_again(source: Path, out: Path) -> None:
    extract(source, out, layout="sharded")
    other = NumpyNetwork([recipe(seed=1)])
    assert extract(source, out, other, overwrite=True).store.kind == "index"
    out.unlink()
    again = extract(source, out, other)
    assert (again.store.kind, sum(other.batches)) == ("index", 33)


def test_one_damaged_shard_costs_its_own_rows_and_no_other_layer(source: Path, out: Path) -> None:
    both = NumpyNetwork([recipe(), recipe("corner")])
    store = extract(source, out, both, layout="sharded").store
    shard = shard_path(parts_folder(out), store.shards.names[0])
    data = bytearray(shard.read_bytes())
    data[FeatureStore.open_shard(shard).array("last.avg").offset] ^= 1
    shard.write_bytes(data)
    network = NumpyNetwork()
    result = extract(source, out, NumpyNetwork([recipe(), recipe("corner")]), overwrite=True)
    assert result.store.names == ("corner.avg", "last.avg")
    assert result.inferred == (store.places("last.avg")[..., 0] == 0).sum()
    result.store.verify()
    assert network.batches == []


def test_lost_shards_are_not_lost_images(source: Path, out: Path, tmp_path: Path) -> None:
    store = extract(source, out, layout="sharded").store
    for name in store.shards.names[1:]:
        shard_path(parts_folder(out), name).unlink()
    network = NumpyNetwork()
    assert_rows_are_their_images(extract(source, out, network).store, source)
    assert sum(network.batches) == 33 - (store.places("last.avg")[..., 0] == 0).sum()
    out.rename(tmp_path / "moved.h5")
    with pytest.raises(IntegrityError, match=r"the folder of its shards, moved\.h5\.parts, is not beside it; move"):
        FeatureStore.open(tmp_path / "moved.h5").load()
    (tmp_path / "link.h5").symlink_to(tmp_path / "moved.h5")
    parts_folder(out).rename(parts_folder(tmp_path / "moved.h5"))
    assert len(FeatureStore.open(tmp_path / "link.h5").load()[0]) == 33


def test_only_our_shards_are_touched_and_none_is_deleted_unread(source: Path, out: Path, tmp_path: Path) -> None:
    network = NumpyNetwork()
    network.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        extract(source, out, network)
    parts = parts_folder(out)
    (parts / "manifest.jsonl").unlink()
    (parts / "old.h5").mkdir()
    (parts / ("a" * 20 + ".h5")).write_bytes(b"no shard")
    other = tmp_path / "other.h5"
    extract(source, other)
    keep = other.read_bytes()
    line = {
        "identity": "../other",
        "sha256": hashlib.sha256(keep).hexdigest(),
        "views": [0],
        "version": 1,
        "kept": True,
    }
    (parts / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    assert_rows_are_their_images(extract(source, out, network).store, source)
    assert sum(network.batches) == 33
    assert other.read_bytes() == keep
    assert listing(parts) == ["old.h5"]


def test_shards_of_a_later_release_stay(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(source, out, layout="sharded")
    before = listing(parts_folder(out))
    monkeypatch.setattr("features.store.untrusted.FORMAT_VERSIONS", (0,))
    with pytest.raises(FormatVersionError, match="Install a newer"):
        extract(source, out)
    assert listing(parts_folder(out)) == before


def test_an_image_that_rotted_is_set_aside_when_a_layer_is_added(source: Path, out: Path) -> None:
    extract(source, out)
    path = source / "cat" / "0003.png"
    size, times = path.stat().st_size, path.stat()
    path.write_bytes(b"x" * size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    store = extract(source, out, NumpyNetwork([recipe(), recipe("corner")])).store
    assert store.quarantine.paths == ("cat/0003.png",)
    assert_rows_are_their_images(store, source)


def test_a_store_given_to_another_process_is_that_one_or_an_error(source: Path, out: Path) -> None:
    store = extract(source, out).store
    opener, arguments = store.__reduce__()  # what travels to the other process
    assert opener(*arguments).data_digest == store.data_digest
    paint(source / "cat" / "new.png", (1, 2, 3))
    extract(source, out)
    with pytest.raises(StoreError, match="was brought up to date after it was passed to this process"):
        opener(*arguments)
    assert store.array().filename is None  # nobody opens another store by its name


def synthetic(out: Path, rows: int) -> Path:
    """A sharded store whose row i is i, i + 1, ..."""
    hashes = np.zeros((rows, 32), np.uint8)
    hashes[:, :8] = np.arange(rows, dtype=np.uint64)[:, None].view(np.uint8).reshape(rows, 8)
    none = Quarantine((), np.zeros((0, 32), np.uint8), (), np.zeros(0, np.int64), np.zeros(0, np.int64))
    spec = {"last.avg": FeatureSpec(recipe(), 1, (WIDTH,))}

    def table(start: int, stop: int, code: int) -> ImageTable:
        n = stop - start
        return ImageTable(
            paths=tuple(f"class/{number:07d}.jpg" for number in range(start, stop)),
            sha256=hashes[start:stop],
            labels=np.full(n, code, np.int32),
            splits=np.full(n, code, np.int8),
            groups=None,
            **dict.fromkeys(("widths", "heights"), np.full(n, 8, np.int32)),
            **dict.fromkeys(("sizes", "mtimes_ns"), np.full(n, 9, np.int64)),
        )

    folder = parts_folder(out)
    folder.mkdir()
    places, digests, names = np.zeros((rows, 1, 3), np.int32), b"", []
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        stop = min(start + SHARD_ROWS, rows)
        names.append(f"{number:020x}")
        writer = StoreWriter(shard_path(folder, names[-1]), kind="shard", rows=stop - start, features=spec)
        values = np.arange(start, stop, dtype=np.float32)[:, None, None] + np.arange(WIDTH, dtype=np.float32)
        writer.append("last.avg", values)
        writer.finish(images=table(start, stop, -1), quarantine=none, provenance={"views": [0], "root": ""})
        digests += FeatureStore.open_shard(shard_path(folder, names[-1])).digest
        places[start:stop, 0, 0], places[start:stop, 0, 1] = number, np.arange(stop - start)
    writer = StoreWriter(out, kind="index", rows=rows, features=spec)
    writer.append("last.avg", places)
    shards = ShardTable(tuple(names), np.frombuffer(digests, np.uint8).reshape(-1, 32))
    writer.finish(images=table(0, rows, 0), quarantine=none, classes=("class",), shards=shards)
    return out


WATCHED = """
import sys, time
import numpy, h5py
from features.machine import peak_memory
from features.extraction.journal import PartsFolder
from features.store.reader import FeatureStore
from features.extraction.extraction import pack_store
before, start = peak_memory(), time.process_time()
store = FeatureStore.open(sys.argv[1])
opened = time.process_time() - start
store.verify()
pack_store(sys.argv[1], sys.argv[2])
print(opened, (peak_memory() - before) / 2**20)
"""


@pytest.mark.slow
def test_200_000_rows_open_at_once_and_are_verified_and_packed_in_constant_memory(tmp_path: Path) -> None:
    out = synthetic(tmp_path / "f.h5", ROWS)
    store = FeatureStore.open(out)
    rows = np.random.default_rng(0).integers(0, ROWS, 500)
    np.testing.assert_array_equal(store.array()[rows, 0], rows[:, None] + np.arange(WIDTH, dtype=np.float32))

    def watched(path: Path) -> tuple[float, float]:
        command = [sys.executable, "-c", WATCHED, str(path), str(path.with_suffix(".packed"))]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        opened, grown = map(float, result.stdout.split())
        return opened, grown

    opened, grown = watched(out)
    assert opened < 1
    small = synthetic(tmp_path / "small.h5", ROWS // 20)
    # 185 MB of features more; what grows is the table of images, about 420 bytes each
    assert grown - watched(small)[1] < 110
    packed = FeatureStore.open(out.with_suffix(".packed"))
    np.testing.assert_array_equal(packed.array()[rows, 0], rows[:, None] + np.arange(WIDTH, dtype=np.float32))
    assert packed.verify() > 0


def test_a_hostile_index_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "f.h5"
    none = Quarantine((), np.zeros((0, 32), np.uint8), (), np.zeros(0, np.int64), np.zeros(0, np.int64))
    zeros = np.zeros(2, np.int64)
    images = ImageTable(
        ("a/1", "a/2"), np.zeros((2, 32), np.uint8), zeros, zeros.astype(np.int8), None, zeros, zeros, zeros, zeros
    )
    parts_folder(out).mkdir()
    shard = shard_path(parts_folder(out), "0" * 20)
    spec = {"last.avg": FeatureSpec(recipe(), 1, (3,))}
    writer = StoreWriter(shard, kind="shard", rows=2, features=spec)
    writer.append("last.avg", np.ones((2, 1, 3), np.float32))
    undecided = ImageTable(**{**vars(images), "labels": zeros - 1, "splits": (zeros - 1).astype(np.int8)})
    writer.finish(images=undecided, quarantine=none)
    digest = np.frombuffer(FeatureStore.open_shard(shard).digest, np.uint8)[None]

    def written(
        name: str = "0" * 20, place: tuple[int, int, int] = (0, 1, 0), width: int = 3, layer: str = "last"
    ) -> FeatureStore:
        out.unlink(missing_ok=True)
        other = recipe(layer)
        writer = StoreWriter(out, kind="index", rows=2, features={other.name: FeatureSpec(other, 1, (width,))})
        writer.append(other.name, np.array([[(0, 0, 0)], [place]], np.int32))
        writer.finish(images=images, quarantine=none, classes=("a",), shards=ShardTable((name,), digest))
        return FeatureStore.open(out)

    np.testing.assert_array_equal(written().load()[0], np.ones((2, 3)))
    for options, message in (
        ({"name": "../../" + "0" * 14}, "invalid name of a shard"),
        ({"name": "1" * 20}, "the shard is missing"),
        ({"place": (1, 0, 0)}, "shard"),
        ({"place": (-1, 0, 0)}, "shard"),
        ({"place": (0, 2, 0)}, "a place lies outside"),
        ({"place": (0, 0, 1)}, "a place lies outside"),
        ({"place": (0, -1, 0)}, "a place lies outside"),
        ({"width": 4}, "does not hold the feature set last.avg"),
        ({"width": 2 * 10**10}, "does not hold the feature set last.avg"),
        ({"width": 2**62}, "attribute shape|does not hold"),
        ({"layer": "corner"}, "does not hold the feature set corner.avg"),
    ):
        for check in (FeatureStore.load, FeatureStore.verify):
            with pytest.raises(IntegrityError, match=message):
                check(written(**options))  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="attribute shape"):
        written(width=0)
