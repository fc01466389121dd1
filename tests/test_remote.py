"""Images in buckets and on web servers: the same features, nothing read twice, nothing reached that must not be."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import logging
import lzma
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import NumpyNetwork, paint_folder
from PIL import Image
from stores import Objects, objects, table, tar

from features.errors import SourceError, UnreadableImageError
from features.extraction.extraction import Extraction, ExtractionResult, pack_store
from features.extraction.options import ExtractionOptions
from features.sources import blocks, remote, web
from features.sources.objects import Found, UnavailableError, without_secrets
from features.sources.scan import reader_of, scan, source_in, takes_target
from features.store.reader import FeatureStore
from pipeline.labels.file import append_decisions, new_decision, value_of
from pipeline.runs.datasets import source_of
from pipeline.stages.train_head import train_head

SECRET = "hush-hush-123"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Objects]:
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.001)
    with objects() as serving:
        yield serving


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A bucket in memory that holds the images of a folder."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.001)
    files = fsspec.filesystem("memory")
    folder = paint_folder(tmp_path / "images", {"cat": 4, "dog": 3})
    for path in folder.rglob("*.png"):
        files.pipe(f"/bucket/photos/{path.relative_to(folder)}", path.read_bytes())
    yield files
    files.rm("/bucket", recursive=True)


def run(source: str | Path, out: Path, **options: Any) -> ExtractionResult:
    asked = ExtractionOptions(**options)
    images = scan(source, hosts=asked.allow_host)
    return Extraction(images, NumpyNetwork(), out, asked).run()  # type: ignore[arg-type]


def manifest(path: Path, rows: dict[str, str]) -> Path:
    path.write_text("path,label\n" + "".join(f"{row},{label}\n" for row, label in rows.items()))
    return path


# --- buckets ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bucket_has_the_features_of_the_folder_and_is_read_once(bucket: Any, tmp_path: Path) -> None:
    source = "memory://bucket/photos"
    first = run(source, tmp_path / "a.h5")
    there = run(tmp_path / "images", tmp_path / "b.h5").store
    np.testing.assert_array_equal(first.store.array("last.avg"), there.array("last.avg"))
    assert first.store.images.paths == there.images.paths
    assert first.store.classes == ("cat", "dog")
    assert first.store.provenance["root"] == source
    assert source_of(first.store.source, first.store.provenance["root"]) == source
    again = run(source, tmp_path / "a.h5")
    assert (again.inferred, again.counts["hashed"], again.written) == (0, 0, False)
    new = (tmp_path / "images" / "cat" / "0000.png").read_bytes()
    bucket.pipe("/bucket/photos/dog/0009.png", new[:-12] + new[-12:])
    added = run(source, tmp_path / "a.h5")
    assert (added.inferred, added.counts["cached"], added.counts["hashed"]) == (
        0,
        7,
        1,
    )  # the same bytes under a new name
    read = reader_of(source)
    assert read is not None
    assert pickle.loads(pickle.dumps(read))("dog/0009.png") == new  # noqa: S301


@pytest.mark.slow
def test_another_machine_needs_no_object_whose_version_is_that_of_the_store(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "memory://bucket/photos"
    store = run(source, tmp_path / "a.h5").store
    assert store.images.versions == scan(source).versions
    assert all(store.images.versions or [""])
    assert h5py.File(tmp_path / "a.h5").attrs["format_version"] == 2
    run(tmp_path / "images", tmp_path / "b.h5")
    assert h5py.File(tmp_path / "b.h5").attrs["format_version"] == 1
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(remote.Reader, "__call__", None)  # nothing may be read
    again = run(source, tmp_path / "a.h5")
    assert (again.inferred, again.counts["hashed"], again.counts["cached"], again.written) == (0, 0, 7, False)
    whole = (tmp_path / "a.h5").read_bytes()
    assert pack_store(tmp_path / "a.h5", tmp_path / "c.h5").images.versions == store.images.versions
    assert (tmp_path / "c.h5").read_bytes() == whole


def test_an_object_that_is_replaced_after_the_listing_is_read_again(bucket: Any, tmp_path: Path) -> None:
    images = scan("memory://bucket/photos")
    other = (tmp_path / "images" / "dog" / "0000.png").read_bytes()
    bucket.pipe("/bucket/photos/cat/0000.png", other)
    Extraction(images, NumpyNetwork(), tmp_path / "a.h5", ExtractionOptions()).run()  # type: ignore[arg-type]
    assert images.replaced == {"cat/0000.png"}
    again = run("memory://bucket/photos", tmp_path / "a.h5")
    assert again.counts["hashed"] + again.inferred == 1
    row = again.store.images.paths.index("cat/0000.png")
    assert again.store.images.sha256[row].tobytes() == hashlib.sha256(other).digest()


def test_what_is_wrong_with_a_bucket_is_said(bucket: Any) -> None:
    with pytest.raises(SourceError, match="memory://nowhere does not exist: there is no such bucket or folder"):
        scan("memory://nowhere")
    with pytest.raises(SourceError, match="holds no images"):
        bucket.pipe("/bucket/empty/readme.txt", b"-")
        scan("memory://bucket/empty")
    for address in ("ftp://host/x", "zip://a.png::s3://bucket/a.zip", "file:///etc", "http+unix://x/y"):
        with pytest.raises(SourceError, match=r"expected an address of s3://, gs://"):
            scan(address)
    with pytest.raises(
        SourceError, match="memory://bucket//photos: a folder has no name; expected one / between names"
    ):
        scan("memory://bucket//photos")
    for address in ("s3://", "s3:///", "gs://?x"):
        with pytest.raises(SourceError, match=r"names no bucket; expected (s3|gs)://BUCKET/FOLDER"):
            scan(address)
    with pytest.raises(
        SourceError, match=r"s3:/bucket/photos does not exist; an address begins with s3:// \(in Python, give text"
    ):
        scan(Path("s3://bucket/photos"))
    with pytest.raises(SourceError, match="a web server has no listing"):
        scan("https://host.org/photos")
    for name in ("a.zip", "a.npz", "photos-{0..3}"):
        with pytest.raises(SourceError, match=r"from a bucket class folders, tars, \.parquet and \.csv are read"):
            scan(f"memory://bucket/{name}")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError("Access Denied"), r"https://b/x: may not be read \(Access Denied\)\. Check the credentials"),
        (UnavailableError("SlowDown"), r"https://b/x: no answer in 8 tries \(SlowDown\)\. What is finished is kept"),
    ],
)
def test_what_fails_is_tried_again_or_refused(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    calls = 0

    def call() -> bytes:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(SourceError, match=expected):
        remote.tried(call, "https://b/x?token=1")
    assert calls == (1 if isinstance(error, PermissionError) else 8)
    assert all(0.05 * 2**k <= pause <= 0.15 * 2**k for k, pause in enumerate(pauses))


# --- files of many images in a bucket ---------------------------------------------------------------------


@pytest.fixture
def shards(bucket: Any, tmp_path: Path) -> Path:
    """Two tars, two Parquet files and a manifest of the same images, in ``memory://bucket`` and in a folder."""
    folder = tmp_path / "images"
    files = sorted(folder.rglob("*.png"))
    for number, part in enumerate((files[:4], files[4:])):
        members = [(f"{k}.png", file.read_bytes()) for k, file in enumerate(part)]
        tar(
            folder / f"s-{number}.tar",
            [*members, *((f"{k}.cls", file.parent.name.encode()) for k, file in enumerate(part))],
        )
        pictures, labels = [file.read_bytes() for file in part], [file.parent.name for file in part]
        table(folder / f"p-{number}.parquet", pictures, rows=2, label=labels)
    manifest(folder / "m.csv", {str(file.relative_to(folder)): file.parent.name for file in files})
    tar(folder / "folders.tar", [(str(file.relative_to(folder)), file.read_bytes()) for file in files])
    for name, kind, compress in (
        ("s-0", "gz", gzip.compress),
        ("s-1", "gz", gzip.compress),
        ("folders", "xz", lzma.compress),
    ):
        (folder / f"{name}.tar.{kind}").write_bytes(compress((folder / f"{name}.tar").read_bytes()))
    for path in (*folder.glob("*.*"), *files):
        bucket.pipe(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
    return folder


KINDS = (
    "s-{0..1}.tar",
    "s-{}.tar",
    "s-*.tar",
    "s-0.tar",
    "p-{0..1}.parquet",
    "p-*.parquet",
    "p-1.parquet",
    "m.csv",
    "folders.tar",
    "s-1.tar.gz",
    "s-{0..1}.tar.gz",
    "folders.tar.xz",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_files_of_many_images_in_a_bucket_are_read_as_those_on_a_disk(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = f"memory://bucket/{name}"
    found = run(source, tmp_path / "a.h5").store
    expected = run(f"{shards}/{name.replace('*', '{}')}", tmp_path / "b.h5").store
    np.testing.assert_array_equal(found.array("last.avg"), expected.array("last.avg"))
    assert found.images.paths == expected.images.paths
    assert [found.classes[label] for label in found.images.labels] == [
        expected.classes[label] for label in expected.images.labels
    ]
    root = found.provenance["root"]
    assert source_in(root, found.source) == (source if name == "m.csv" else root)
    assert takes_target(source)
    read = reader_of(root)  # as workers of a cluster find it
    assert read is not None
    assert [hashlib.sha256(read(path)).digest() for path in found.images.paths] == [*map(bytes, found.images.sha256)]
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "elsewhere"))  # another machine: only versions tell
    again = run(source, tmp_path / "a.h5")
    assert (again.inferred, again.counts["hashed"], again.counts["cached"], again.written) == (0, 0, len(found), False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s-{}.tar", "p-{}.parquet"])
def test_only_a_new_file_of_images_is_inferred(bucket: Any, shards: Path, tmp_path: Path, kind: str) -> None:
    later = f"/bucket/{kind.replace('{}', '1')}"
    data = bucket.cat_file(later)
    bucket.rm(later)
    assert run(f"memory://bucket/{kind}", tmp_path / "a.h5").inferred == 4
    bucket.pipe(later, data)
    result = run(f"memory://bucket/{kind}", tmp_path / "a.h5")
    assert (result.inferred, result.counts["cached"]) == (3, 4)


def test_a_folder_of_parquet_files_in_a_bucket_is_what_a_pattern_of_them_is(
    bucket: Any, shards: Path, tmp_path: Path
) -> None:
    for split, number in (("train", 0), ("test", 1)):
        bucket.pipe(f"/bucket/hub/data/{split}-0.parquet", (shards / f"p-{number}.parquet").read_bytes())
    store = run("memory://bucket/hub", tmp_path / "a.h5").store
    assert (store.source, store.provenance["root"]) == ("memory://bucket/hub/data/*.parquet",) * 2
    assert store.images.paths[0] == "test-0.parquet/000000"
    assert store.images.splits.tolist() == [2] * 3 + [0] * 4
    assert scan("memory://bucket/hub/data").given_splits.tolist() == [2] * 3 + [0] * 4
    bucket.pipe("/bucket/hub/none.txt", b"-")
    bucket.rm("/bucket/hub/data", recursive=True)
    with pytest.raises(SourceError, match="memory://bucket/hub holds no images"):
        scan("memory://bucket/hub")


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What has been read of files in buckets, in small blocks of which few stay in memory: names, first and last bytes."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 700)
    monkeypatch.setattr(blocks, "_KEPT", 3)
    blocks._blocks.clear()
    found: list[tuple[str, int, int]] = []
    get = remote.Bucket.get_range

    def counted(self: remote.Bucket, address: str, start: int, stop: int) -> bytes:
        found.append((address.rpartition("/")[2], start, stop))
        return get(self, address, start, stop)

    monkeypatch.setattr(remote.Bucket, "get_range", counted)
    return found


def each_block_once(folder: Path, *names: str) -> list[tuple[str, int, int]]:
    sizes = {name: (folder / name).stat().st_size for name in names}
    return [(name, start, min(start + 700, size)) for name, size in sizes.items() for start in range(0, size, 700)]


def test_a_tar_is_read_once_in_order_in_blocks_of_which_few_are_in_memory(
    shards: Path, ranges: list[tuple[str, int, int]]
) -> None:
    images = scan("memory://bucket/s-0.tar")
    once = each_block_once(shards, "s-0.tar")
    assert ranges == once[: len(ranges)]
    assert len(ranges) >= len(once) - 14  # what follows the end mark
    ranges.clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(images.read, range(4)))
    assert found == [path.read_bytes() for path in sorted(shards.rglob("*.png"))[:4]]
    assert ranges == []  # the listing kept them
    assert len(blocks._blocks) <= 3


@pytest.mark.slow
def test_tars_are_read_once_by_an_extraction_and_not_at_all_by_the_next_plan(
    bucket: Any, shards: Path, tmp_path: Path, ranges: list[tuple[str, int, int]]
) -> None:
    source = "memory://bucket/s-{0..1}.tar"
    assert run(source, tmp_path / "a.h5").inferred == 7
    assert sorted(ranges) == sorted(set(ranges))
    assert {*ranges} <= {*each_block_once(shards, "s-0.tar", "s-1.tar")}
    ranges.clear()
    again = run(source, tmp_path / "a.h5")
    assert (again.inferred, again.written, ranges) == (0, False, [])
    images = scan(source)
    assert images.read(0) == (shards / "cat" / "0000.png").read_bytes()
    assert [archive.file.kept for archive in images.reader._tars.values()] == [None, None]  # type: ignore[union-attr]
    ranges.clear()
    bucket.pipe("/bucket/s-1.tar", (shards / "s-0.tar").read_bytes())  # only what has changed is listed again
    assert run(source, tmp_path / "a.h5").store.images.paths[-1] == "s-1.tar/3.png"
    assert {name for name, _, _ in ranges} == {"s-1.tar"}


def test_blocks_that_a_fork_reads_do_not_take_the_place_of_others(
    bucket: Any, tmp_path: Path, ranges: list[tuple[str, int, int]]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 40), np.uint8)
    for k in range(4):
        Image.fromarray(pixels[k]).save(tmp_path / f"{k}.png")
    expected = [(tmp_path / f"{k}.png").read_bytes() for k in range(4)]
    tar(tmp_path / "big.tar", [*((f"{k}.png", expected[k]) for k in range(4)), ("0.cls", b"a")])
    bucket.pipe("/bucket/big.tar", (tmp_path / "big.tar").read_bytes())
    images = scan("memory://bucket/big.tar")
    assert (images.read(0), images.read(1)) == (expected[0], expected[1])
    blocks._blocks.clear()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: [images.read(2), images.read(3)])
    child.start()
    images.read(3)
    child.join()
    assert child.exitcode == 0
    blocks._blocks.clear()
    ranges.clear()
    assert [images.read(row) for row in range(4)] == expected
    assert {*ranges} < {*each_block_once(tmp_path, "big.tar")}


def test_unchanged_tars_in_a_bucket_are_asked_for_once_each(
    shards: Path, monkeypatch: pytest.MonkeyPatch, ranges: list[tuple[str, int, int]]
) -> None:
    source, asked, look = "memory://bucket/s-{0..1}.tar", list[str](), remote.Bucket.look

    def counted(self: remote.Bucket, address: str) -> Found:
        asked.append(address.rpartition("/")[2])
        return look(self, address)

    scan(source)
    monkeypatch.setattr(remote.Bucket, "look", counted)
    scan(source)
    assert sorted(asked) == ["s-0.tar", "s-1.tar"]


def test_rehash_lists_a_tar_in_a_bucket_again(shards: Path, ranges: list[tuple[str, int, int]]) -> None:
    for source in ("memory://bucket/s-0.tar", "memory://bucket/s-{0..1}.tar"):
        scan(source)
        ranges.clear()
        scan(source, trust="times")
        assert ranges == []
        scan(source, trust="nothing")
        assert ("s-0.tar", 0, 700) in ranges


def test_on_a_full_disk_no_blocks_are_kept_and_the_images_are_read_again(
    shards: Path, monkeypatch: pytest.MonkeyPatch, ranges: list[tuple[str, int, int]]
) -> None:
    monkeypatch.setattr(blocks, "_FREE", 1.1)
    images = scan("memory://bucket/s-0.tar")
    ranges.clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(images.read, range(4)))
    assert found == [path.read_bytes() for path in sorted(shards.rglob("*.png"))[:4]]
    assert ranges
    assert len(ranges) == len(set(ranges))  # what several threads need is asked for once


@pytest.mark.parametrize("kind", ["s-0.tar", "p-0.parquet"])
def test_a_file_that_is_replaced_after_the_listing_gives_no_wrong_image(
    bucket: Any, shards: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    scan(f"memory://bucket/{kind}")
    images = scan(f"memory://bucket/{kind}")  # it finds the list of a tar, and reads no block of it
    blocks._blocks.clear()
    bucket.pipe(f"/bucket/{kind}", (shards / kind.replace("0", "1")).read_bytes())
    with pytest.raises(SourceError, match="has been changed since it was listed; run again"):
        images.read(0)
    bucket.rm(f"/bucket/{kind}")
    with pytest.raises(SourceError, match="has been removed since it was listed; put it back"):
        images.read(0)


def test_a_compressed_tar_in_a_bucket_is_expanded_once_for_each_version(
    bucket: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    source, ranges, get = "memory://bucket/s-0.tar.gz", list[int](), remote.Bucket.get_range

    def counted(self: remote.Bucket, address: str, start: int, stop: int) -> bytes:
        ranges.append(start)
        return get(self, address, start, stop)

    monkeypatch.setattr(blocks, "BLOCK_BYTES", 200)
    monkeypatch.setattr(remote.Bucket, "get_range", counted)
    images = scan(source)
    assert ranges == list(range(0, len(bucket.cat_file("/bucket/s-0.tar.gz")), 200))  # once, in order
    (copy,) = (tmp_path / "cache" / "archives").glob("*.tar")
    assert copy.read_bytes() == (shards / "s-0.tar").read_bytes()
    there = scan(f"{shards}/s-0.tar")
    assert [images.read(row) for row in range(4)] == [there.read(row) for row in range(4)]
    assert list(scan(source).versions or ()) == list(images.versions or ()) != [""] * 4
    assert ranges == sorted(set(ranges))  # nothing was read again
    bucket.pipe("/bucket/s-0.tar.gz", (shards / "s-1.tar.gz").read_bytes())
    assert scan(source).paths == ("0.png", "1.png", "2.png")
    (other,) = (tmp_path / "cache" / "archives").glob("*.tar")  # the former is gone
    assert other.read_bytes() == (shards / "s-1.tar").read_bytes()
    with pytest.raises(SourceError, match=r"\.tar has been removed since its members were listed"):
        images.read(0)


def test_a_compressed_tar_that_is_replaced_while_it_is_expanded_is_refused(
    bucket: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 200)
    get = remote.Bucket.get_range

    def replacing(self: remote.Bucket, address: str, start: int, stop: int) -> bytes:
        data = get(self, address, start, stop)
        bucket.pipe("/bucket/s-0.tar.gz", (shards / "s-1.tar.gz").read_bytes())
        return data

    with monkeypatch.context() as patch, pytest.raises(SourceError, match=r"s-0\.tar\.gz has been changed since"):
        patch.setattr(remote.Bucket, "get_range", replacing)
        scan("memory://bucket/s-0.tar.gz")
    assert not list((tmp_path / "cache" / "archives").glob("*"))
    bucket.pipe("/bucket/cut.tar.gz", (shards / "s-0.tar.gz").read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"cut\.tar\.gz cannot be read as a compressed tar archive"):
        scan("memory://bucket/cut.tar.gz")
    assert not list((tmp_path / "cache" / "archives").glob("*"))


def test_what_is_wrong_with_a_file_of_images_in_a_bucket_is_said(bucket: Any, shards: Path) -> None:
    whole = bucket.cat_file("/bucket/s-0.tar")
    cases: dict[str, tuple[bytes | None, str]] = {
        "cut.tar": (whole[:1200], r"memory://bucket/cut\.tar cannot be read as a tar archive"),
        "cut.parquet": (bucket.cat_file("/bucket/p-0.parquet")[:-9], r"memory://bucket/cut\.parquet is not Parquet, or is damaged"),
        "gone.tar": (None, r"memory://bucket/gone\.tar does not exist: there is no such object or bucket"),
        "gone.csv": (None, r"memory://bucket/gone\.csv does not exist"),
        "gone-*.parquet": (None, r"memory://bucket/gone-\*\.parquet: no such files"),
        "s-{0..2}.tar": (None, r"1 of 3 files are missing: 's-2\.tar'"),
        "up.csv": (b"path,label\n../else.png,cat\n", r"up\.csv, line 2: '\.\./else\.png' leaves the folder of the manifest"),
        "local.csv": (b"path,label\n/etc/passwd,cat\n", r"local\.csv, line 2: '/etc/passwd' leaves the folder of the manifest"),
        "inside.csv": (b"path,label\nhttps://127.0.0.1/a.png,cat\n", r"inside a private network"),
        "none.csv": (b"path,label\nnone.png,cat\n", r"none\.csv: none of its 1 files exists, for example memory://bucket/none\.png"),
        "empty.parquet": (b"", r"empty\.parquet is not Parquet"),
    }  # fmt: skip
    for name, (data, expected) in cases.items():
        if data is not None:
            bucket.pipe(f"/bucket/{name}", data)
        with pytest.raises(SourceError, match=expected):
            scan(f"memory://bucket/{name}")


@pytest.mark.slow
def test_a_store_that_fails_now_and_then_gives_the_same_blocks(
    bucket: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 500)
    blocks._blocks.clear()
    calls, get = itertools.count(), remote.Bucket.get_range

    def faulty(self: remote.Bucket, address: str, start: int, stop: int) -> bytes:
        number = next(calls)
        if number % 3 == 0:
            raise UnavailableError("SlowDown")
        data = get(self, address, start, stop)
        return data[:-1] if number % 3 == 1 and number % 2 else data

    monkeypatch.setattr(remote.Bucket, "get_range", faulty)
    for name in ("s-{0..1}.tar", "p-{0..1}.parquet"):
        found = run(f"memory://bucket/{name}", tmp_path / f"{name[0]}.h5").store
        expected = run(f"{shards}/{name}", tmp_path / f"{name[0]}-local.h5").store
        np.testing.assert_array_equal(found.array("last.avg"), expected.array("last.avg"))


# --- manifests that point anywhere ------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_may_mix_files_and_addresses(server: Objects, tmp_path: Path) -> None:
    folder = paint_folder(tmp_path / "images", {"cat": 2, "dog": 2})
    files = sorted(folder.rglob("*.png"))
    server.objects = {f"/{k}.png": file.read_bytes() for k, file in enumerate(files)}
    rows = {
        f"{server.address}/0.png?X-Amz-Signature={SECRET}": "cat", "images/cat/0001.png": "cat",
        f"http://me:{SECRET}@127.0.0.1:{server.server_address[1]}/2.png": "dog", str(files[3]): "dog",
    }  # fmt: skip
    source = manifest(tmp_path / "m.csv", rows)
    result = run(source, tmp_path / "a.h5", allow_host="127.0.0.1")
    expected = run(folder, tmp_path / "b.h5").store
    np.testing.assert_array_equal(result.store.array("last.avg"), expected.array("last.avg"))
    assert result.store.images.paths == (
        f"{server.address}/0.png", "images/cat/0001.png", f"{server.address}/2.png", "images/dog/0001.png",
    )  # fmt: skip
    asked = len(server.asked)
    again = run(source, tmp_path / "a.h5", allow_host="127.0.0.1")
    assert (again.inferred, again.counts["hashed"]) == (0, 0)
    assert len(server.asked) > asked
    assert set(server.asked[asked:]) == {"HEAD /0.png", "HEAD /2.png"}


@pytest.mark.slow
def test_no_secret_is_written(server: Objects, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not into a store, its shards and journal, notes, a run, a labels file, the log or a message."""
    caplog.set_level(logging.DEBUG, "features")
    caplog.set_level(logging.DEBUG, "pipeline")
    files = sorted(paint_folder(tmp_path / "images", {"cat": 4, "dog": 4}).rglob("*.png"))
    server.objects = {f"/{k}.png": file.read_bytes() for k, file in enumerate(files)} | {"/bad.png": b"no image"}
    server.fault = lambda number, request: number == 3 and not request.reply(503, b"", {})
    address = f"http://me:{SECRET}@127.0.0.1:{server.server_address[1]}"
    rows = {f"{address}/{name}.png?sig={SECRET}": "cat" if name < 4 else "dog" for name in range(8)}
    rows |= {f"{address}/{name}.png?sig={SECRET}": "cat" for name in ("bad", "gone")}
    source = manifest(tmp_path / "m.csv", rows)
    options = {"max_unreadable": 1, "split": "stratified:0.5,0.25,0.25"}
    store = run(source, tmp_path / "out" / "a.h5", allow_host="127.0.0.1", layout="sharded", **options).store
    train_head(store, "logistic", runs=tmp_path / "out" / "runs")
    decision = new_decision(store.images.sha256[0], store.images.paths[0], value_of("dog"))
    append_decisions(tmp_path / "out" / "labels.csv", [decision])
    with pytest.raises(SourceError) as refusal:
        run(source, tmp_path / "out" / "b.h5")
    cache = Path(os.environ["BOTTLENECK_CACHE"]) if "BOTTLENECK_CACHE" in os.environ else tmp_path / "out"
    written = [path.read_bytes() for place in (tmp_path / "out", cache) for path in place.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert (tmp_path / "out" / "labels.csv").read_bytes().count(b"http://127.0.0.1") == 1
    assert not any(SECRET.encode() in content for content in written)
    assert SECRET not in caplog.text
    assert SECRET not in str(refusal.value)


@pytest.mark.slow
def test_addresses_inside_a_private_network_are_not_reached(server: Objects, tmp_path: Path) -> None:
    server.objects = {"/a.png": b"secret"}
    port = server.server_address[1]
    for host in (
        "127.0.0.1",
        "localhost",
        "[::1]",
        "169.254.169.254",
        "10.1.2.3",
        "192.168.0.1",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
    ):
        source = manifest(tmp_path / "m.csv", {f"https://{host}:{port}/a.png": "cat"})
        with pytest.raises(SourceError, match=r"inside a private network.*--allow-host"):
            scan(source)
    with pytest.raises(
        SourceError, match=r"expected an address of https://; if the manifest is yours, add --allow-host"
    ):
        scan(manifest(tmp_path / "m.csv", {f"{server.address}/a.png": "cat"}))
    assert server.asked == []


def test_a_redirect_into_a_private_network_is_not_followed(server: Objects) -> None:
    server.redirects = {"/a.png": f"http://localhost:{server.server_address[1]}/b.png", "/c.png": "/d.png"}
    server.objects = {"/b.png": b"secret", "/d.png": b"image"}
    inside = web.Web(frozenset({"127.0.0.1"}))
    with pytest.raises(SourceError, match="localhost"):
        inside.get(f"{server.address}/a.png")
    assert inside.get(f"{server.address}/c.png")[0] == b"image"
    server.redirects = {"/c.png": "/c.png"}
    with pytest.raises(UnreadableImageError, match="more than 5 redirects"):
        inside.get(f"{server.address}/c.png")


@pytest.mark.parametrize(
    ("number", "public"),
    [("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.0.0.1", False), ("100.64.0.1", False),
     ("169.254.1.1", False), ("::1", False), ("fe80::1%eth0", False), ("fd00::1", False), ("::ffff:10.0.0.1", False),
     ("2002:7f00:1::", False), ("224.0.0.1", False), ("0.0.0.0", False), ("64:ff9b::808:808", True),
     ("64:ff9b::7f00:1", False), ("64:ff9b:1::808:808", False), ("::7f00:1", False)],
)  # fmt: skip
def test_which_numbers_are_public(number: str, public: bool) -> None:
    assert web.is_public(number) is public


@pytest.mark.slow
def test_a_server_that_fails_now_and_then_gives_the_same_images(server: Objects, tmp_path: Path) -> None:
    folder = paint_folder(tmp_path / "images", {"cat": 6, "dog": 6})
    files = sorted(folder.rglob("*.png"))
    server.objects = {f"/{k}.png": file.read_bytes() for k, file in enumerate(files)}

    def fault(number: int, request: Any) -> bool:
        if number % 10 == 0:
            request.connection.close()
            request.close_connection = True
        elif number % 10 == 3:
            request.reply(503, b"busy", {})
        elif number % 10 == 7:
            request.reply(200, server.objects[request.path], {}, sent=20)
        return number % 10 in (0, 3, 7)

    server.fault = fault
    rows = {f"{server.address}/{k}.png": file.parent.name for k, file in enumerate(files)}
    found = run(manifest(tmp_path / "m.csv", rows), tmp_path / "a.h5", allow_host="127.0.0.1").store
    expected = run(folder, tmp_path / "b.h5").store
    np.testing.assert_array_equal(found.array("last.avg"), expected.array("last.avg"))


def test_a_missing_object_is_a_missing_image_and_a_forbidden_one_an_error(server: Objects, tmp_path: Path) -> None:
    folder = paint_folder(tmp_path / "images", {"cat": 1})
    server.objects = {"/0.png": (folder / "cat/0000.png").read_bytes()}
    rows = {f"{server.address}/0.png": "cat", f"{server.address}/1.png": "cat"}
    store = run(manifest(tmp_path / "m.csv", rows), tmp_path / "a.h5", allow_host="127.0.0.1", max_unreadable=1).store
    assert (store.quarantine.paths, store.quarantine.reasons) == ((f"{server.address}/1.png",), ("missing",))
    server.fault = lambda number, request: request.path == "/0.png" and not request.reply(403, b"", {})
    with pytest.raises(SourceError, match=r"/0\.png: may not be read \(the server answers 403"):
        run(manifest(tmp_path / "m.csv", rows), tmp_path / "c.h5", allow_host="127.0.0.1", max_unreadable=1)


def test_a_slow_server_is_waited_for(server: Objects, tmp_path: Path) -> None:
    folder = paint_folder(tmp_path / "images", {"cat": 1, "dog": 1})
    files = {f"/{path.parent.name}.png": path.read_bytes() + bytes(900) for path in folder.rglob("*.png")}
    server.objects, server.rate = files, 5000  # bytes a second
    rows = {f"{server.address}{name}": name[1:4] for name in files}
    result = run(manifest(tmp_path / "m.csv", rows), tmp_path / "a.h5", allow_host="127.0.0.1")
    assert len(result.store) == 2
    digests = [hashlib.sha256(data).digest() for data in files.values()]
    assert [row.tobytes() for row in result.store.images.sha256] == digests
    assert sorted(request for request in server.asked if request.startswith("GET")) == sorted(f"GET {n}" for n in files)


@pytest.mark.slow
def test_objects_that_come_and_go_during_the_run_are_the_next_ones_to_read(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = scan("memory://bucket/photos")
    data = bucket.cat("/bucket/photos/dog/0000.png")
    bucket.pipe("/bucket/photos/dog/new.png", data + b" ")
    bucket.rm("/bucket/photos/cat/0003.png")
    first = Extraction(images, NumpyNetwork(), tmp_path / "a.h5", ExtractionOptions(max_unreadable=0.5)).run()  # type: ignore[arg-type]
    assert (first.store.quarantine.paths, first.store.quarantine.reasons) == (("cat/0003.png",), ("missing",))
    assert first.inferred == 6
    again = run("memory://bucket/photos", tmp_path / "a.h5")
    assert (again.inferred, again.counts["new"], again.counts["cached"]) == (1, 1, 6)
    assert again.store.images.paths[6] == "dog/new.png"


@pytest.mark.slow
def test_added_objects_only_are_read(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("memory://bucket/photos", tmp_path / "a.h5")
    bucket.pipe("/bucket/photos/dog/new.png", bucket.cat("/bucket/photos/dog/0000.png") + b"  ")
    read: list[str] = []
    whole = remote.Reader.__call__
    monkeypatch.setattr(remote.Reader, "__call__", lambda self, path: read.append(path) or whole(self, path))  # type: ignore[func-returns-value]
    images = scan("memory://bucket/photos")
    Extraction(images, NumpyNetwork(), tmp_path / "a.h5", ExtractionOptions()).plan()  # type: ignore[arg-type]
    assert read == []  # a plan reads none: none has the size of one that is known
    assert run("memory://bucket/photos", tmp_path / "a.h5").inferred == 1
    assert read == ["dog/new.png"]


def test_secrets_leave_an_address() -> None:
    assert without_secrets("HTTPS://me:p@ss@host/a%20b.jpg?x=1#y") == "https://host/a%20b.jpg"
    assert without_secrets("s3://bucket/what? #1.jpg") == "s3://bucket/what? #1.jpg"
    assert without_secrets("https://host?token=1") == "https://host"


def test_a_store_of_addresses_opens_anywhere(bucket: Any, tmp_path: Path) -> None:
    run("memory://bucket/photos", tmp_path / "a.h5")
    assert FeatureStore.open(tmp_path / "a.h5").source == "memory://bucket/photos"
