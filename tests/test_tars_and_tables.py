"""Images in tars of WebDataset and in Parquet files: what is read, in which order, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import NumpyNetwork, paint_folder
from PIL import Image
from stores import kill_series, table, tar

from features import scratch
from features.errors import ConfigurationError, SourceError, StoreError, UnreadableImageError
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources import archives, tarindex
from features.sources.imageset import ImageSet
from features.sources.parquet import open_tables
from features.sources.scan import reader_of, scan, source_in, takes_target
from features.sources.webdataset import expanded
from features.store.reader import FeatureStore


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def labels_of(source: str | Path, **options: Any) -> dict[str, str]:
    images = scan(source, **options)
    return {
        path: images.classes[label] if label >= 0 else ""
        for path, label in zip(images.paths, images.labels, strict=True)
    }


def extracted(source: str | Path, out: Path, **options: Any) -> FeatureStore:
    images = scan(source)
    Extraction(images, NumpyNetwork(), out, ExtractionOptions(**options)).run()  # type: ignore[arg-type]
    return FeatureStore.open(out)


# --- tars -------------------------------------------------------------------------------------------------


def test_a_pattern_stands_for_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("a-{8..10}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar"]
    assert expanded("{1..2}/{00..01}.tar") == ["1/00.tar", "1/01.tar", "2/00.tar", "2/01.tar"]
    for number in (9, 10, 2):
        tar(tmp_path / f"s-{number}.tar", {})
    assert expanded(f"{tmp_path}/s-{{}}.tar") == [f"{tmp_path}/s-{number}.tar" for number in (2, 9, 10)]
    tar(tmp_path / "t[1]-x.tar", {})
    assert expanded(f"{tmp_path}/s-*.tar") == [f"{tmp_path}/s-{number}.tar" for number in (10, 2, 9)]
    assert expanded(f"{tmp_path}/*-{{}}.tar") == [f"{tmp_path}/s-{number}.tar" for number in (2, 9, 10)]
    assert expanded(f"{tmp_path}/t[1]*.tar") == [f"{tmp_path}/t[1]-x.tar"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/s-{}.tar") == [f"{tmp_path}/s-{number}.tar" for number in (2, 9, 10)]
    with pytest.raises(SourceError, match=r"received \{5\.\.3\}, expected two numbers in ascending order"):
        expanded("a-{5..3}.tar")
    with pytest.raises(SourceError, match="no such files"):
        expanded(f"{tmp_path}/t-{{}}.tar")
    with pytest.raises(SourceError, match="at most 100000 files"):
        expanded("a-{0..99999}-{0..9}.tar")


def test_labels_come_from_cls_json_and_txt(tmp_path: Path) -> None:
    tar(tmp_path / "s-000.tar", {"0.cls": b"3", "0.png": png(0), "1.png": png(1), "1.cls": b"12\n"})
    tar(
        tmp_path / "s-001.tar",
        {"0.png": png(2), "0.txt": b"7", "1.png": png(3), "1.json": b'{"label": 3, "kind": "big"}'},
    )
    pattern = f"{tmp_path}/s-{{000..001}}.tar"
    assert labels_of(pattern) == {
        "s-000.tar/0.png": "03", "s-000.tar/1.png": "12", "s-001.tar/0.png": "07", "s-001.tar/1.png": "03",
    }  # fmt: skip
    assert labels_of(pattern, target="kind") == {
        "s-000.tar/0.png": "", "s-000.tar/1.png": "", "s-001.tar/0.png": "", "s-001.tar/1.png": "big",
    }  # fmt: skip
    images = scan(pattern)
    assert [images.read(row) for row in range(4)] == [png(0), png(1), png(2), png(3)]
    assert labels_of(tmp_path / "s-000.tar") == {"0.png": "03", "1.png": "12"}
    assert takes_target(pattern)
    assert takes_target(tmp_path / "s-000.tar")


def test_splits_come_from_the_names_of_all_tars(tmp_path: Path) -> None:
    for split in ("train", "val"):
        tar(tmp_path / split / "images" / f"{split}-0.tar", {"a.png": png(1), "a.cls": b"cat"})
    tables = scan(f"{tmp_path}/train/images/train-{{0..0}}.tar")
    assert tables.given_splits.tolist() == [0]
    tar(tmp_path / "x-0.tar", {"a.png": png(1), "a.cls": b"cat"})
    assert scan(f"{tmp_path}/x-{{0..0}}.tar").given_splits.tolist() == [-1]


def test_tars_that_are_wrong_are_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar(tmp_path / "a-0.tar", {"0.png": png(0), "0.cls": b"cat", "1.png": png(1), "2.cls": b"dog"})
    assert labels_of(tmp_path / "a-0.tar") == {"0.png": "cat", "1.png": ""}
    assert "1 key has no label: '1.png'" in caplog.text
    assert "1 key has a label and no image: '2'" in caplog.text
    cases: list[tuple[list[tuple[str, bytes]], str]] = [
        ([("0.png", png(0)), ("0.jpg", png(1)), ("0.cls", b"1")], "member '0.jpg' has the key of '0.png'"),
        ([("0.png", png(0)), ("0.png", png(1)), ("0.cls", b"1")], "member '0.png' occurs twice"),
        ([("0.png", png(0)), ("0.json", b"[1")], "member '0.json' holds no label"),
        ([("0.png", png(0)), ("0.cls", b"\xff\xfe")], "member '0.cls' holds no label"),
        ([("0.png", png(0)), ("0.txt", b"a photo of " * 30)], r"member '0\.txt' holds .* which is no class name"),
    ]
    for members, expected in cases:
        with pytest.raises(SourceError, match=expected):
            scan(tar(tmp_path / "b-0.tar", members))
    with pytest.raises(SourceError, match=r"'lable'.*did you mean 'label'"):
        scan(tar(tmp_path / "b-0.tar", {"0.png": png(0), "0.json": b'{"label": 1}'}), target="lable")
    caplog.clear()
    members = [(f"{k}{end}", data) for k in range(2) for end, data in ((".png", png(k)), (".json", b'{"animal": "cat", "age": 3}'))]  # fmt: skip
    scan(tar(tmp_path / "b-0.tar", members))
    assert (
        "2 keys have no label: '0.png', '1.png'. --target names the key of the label in .json members, one of 'animal', 'age'"
        in caplog.text
    )
    whole = (tmp_path / "a-0.tar").read_bytes()
    (tmp_path / "a-1.tar").write_bytes(whole[:2000])
    with pytest.raises(SourceError, match=r"a-1\.tar cannot be read as a tar archive"):
        scan(f"{tmp_path}/a-{{0..1}}.tar")
    with pytest.raises(SourceError, match=r"2 of 3 files are missing: 'a-2\.tar', 'a-3\.tar'"):
        scan(f"{tmp_path}/a-{{1..3}}.tar")
    with pytest.raises(ConfigurationError, match="--class-level"):
        from features.sources.reading import Reading

        scan(tmp_path / "a-0.tar", reading=Reading(class_level=1))


def test_all_tars_of_a_folder_with_their_splits(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        tar(tmp_path / f"{split}-000.tar", {"0.png": png(number), "0.cls": b"cat"})
    images = scan(f"{tmp_path}/*.tar")
    splits = {"test-000.tar/0.png": 2, "train-000.tar/0.png": 0, "val-000.tar/0.png": 1}
    assert dict(zip(images.paths, images.given_splits.tolist(), strict=True)) == splits
    read = reader_of(str(images.root))
    assert read is not None
    assert read("val-000.tar/0.png") == images.read(2) == png(1)
    assert source_in(str(images.root), f"{tmp_path}/*.tar") == str(images.root)
    assert takes_target(f"{tmp_path}/*.tar")


def test_a_folder_of_tars_is_told_how_they_are_named(tmp_path: Path) -> None:
    for number in range(2):
        tar(tmp_path / f"s-{number}.tar", {"a.png": png(number), "a.cls": b"cat"})
    with pytest.raises(
        SourceError, match=r"holds 2 tars and no images outside of them; give the tars, in quotes: '/.*/\*\.tar'"
    ):
        scan(tmp_path)
    assert labels_of(f"{tmp_path}/*.tar") == {"s-0.tar/a.png": "cat", "s-1.tar/a.png": "cat"}


def test_a_tar_of_class_folders_stays_one(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"cat/0.png": png(0), "cat/0.txt": b"a cat", "dog/1.png": png(1)})
    assert labels_of(tmp_path / "a.tar") == {"cat/0.png": "cat", "dog/1.png": "dog"}
    assert not takes_target(tmp_path / "a.tar")
    with pytest.raises(ConfigurationError, match="names a column of a manifest"):
        scan(tmp_path / "a.tar", target="label")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def indexes(cache: Path) -> list[Path]:
    return sorted((cache / "tars").glob("*/*.index"))


def described(images: ImageSet) -> tuple[object, ...]:
    labels = None if images.labels is None else images.labels.tolist()
    return (
        [*images.paths], labels, images.classes, images.given_splits.tolist(), images.stamps.tolist(),
        [images.read(row) for row in range(len(images))],
    )  # fmt: skip


def test_a_tar_is_listed_once_and_anew_when_it_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listed: list[str] = []
    real = archives._listed

    def counted(path: Path, file: Path) -> archives.Archive:
        listed.append(path.name)
        return real(path, file)

    monkeypatch.setattr(archives, "_listed", counted)
    for number in range(2):
        members = [(f"{k}{end}", data) for k in range(3) for end, data in ((".png", png(10 * number + k)), (".json", b'{"label": %d, "note": "%s"}' % (k, b"n" * 70000 * k)))]  # fmt: skip
        tar(tmp_path / f"s-{number}.tar", [*members, ("x\udcff.png", png(99)), ("none.cls", b"")])
    pattern = f"{tmp_path}/s-{{0..1}}.tar"
    first = described(scan(pattern))
    assert listed == ["s-0.tar", "s-1.tar"]
    assert len(indexes(cache)) == 2
    assert described(scan(pattern)) == first  # of two texts of each tar more than 64 KiB are read again
    assert described(scan(pattern, trust="times")) == first
    assert takes_target(tmp_path / "s-1.tar")
    assert listed == ["s-0.tar", "s-1.tar"]
    assert described(scan(pattern, trust="nothing")) == first
    assert listed == ["s-0.tar", "s-1.tar"] * 2
    os.link(tmp_path / "s-0.tar", tmp_path / "link")  # changes the change time alone
    scan(pattern, trust="times")
    assert listed == ["s-0.tar", "s-1.tar"] * 2
    scan(pattern)
    assert listed == [*["s-0.tar", "s-1.tar"] * 2, "s-0.tar"]
    tar(tmp_path / "s-1.tar", {"0.png": png(7), "0.cls": b"new"})
    assert labels_of(tmp_path / "s-1.tar") == {"0.png": "new"}
    assert len(indexes(cache)) == 2  # the former one is gone
    for index, harm in zip(indexes(cache), (lambda data: data[:-1], lambda data: data[:100]), strict=True):
        index.write_bytes(harm(index.read_bytes()))
    listed.clear()
    found = described(scan(pattern))
    assert found[0] == [*(path for path in first[0] if path.startswith("s-0")), "s-1.tar/0.png"]  # type: ignore[attr-defined]
    assert listed == ["s-0.tar", "s-1.tar"]
    assert caplog.text.count("the tar is listed again") == 2
    index = indexes(cache)[0]
    content = bytearray(index.read_bytes())
    content[-1] ^= 1
    index.write_bytes(content)
    assert described(scan(pattern)) == found
    with monkeypatch.context() as other:
        other.setattr(tarindex, "_FORMAT", "bottleneck-tar-index 0")
        scan(tmp_path / "s-1.tar", trust="nothing")
    caplog.clear()
    assert described(scan(pattern)) == found
    assert "received format 'bottleneck-tar-index 0', expected 'bottleneck-tar-index 1'" in caplog.text


def test_the_lists_of_many_tars_take_no_open_files(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        tar(tmp_path / f"s-{number}.tar", {"0.png": png(number), "0.cls": b"a", "1.png": png(9), "1.json": b"{}"})
    pattern = f"{tmp_path}/s-{{0..7}}.tar"
    first, open_files = scan(pattern), len(os.listdir("/dev/fd"))
    again = scan(pattern)
    assert len(os.listdir("/dev/fd")) == open_files
    monkeypatch.setattr(tarindex, "LARGE", 0)  # as for a tar of very many images
    mapped = scan(pattern)
    assert len(os.listdir("/dev/fd")) <= open_files + 8
    assert described(mapped) == described(again) == described(first)
    open_files = len(os.listdir("/dev/fd"))
    with contextlib.ExitStack() as three:
        free = [three.enter_context(open(tmp_path / "s-0.tar", "rb")).fileno() for _ in range(3)][-1]
    with limited("RLIMIT_NOFILE", 2 * (free + 3)):
        few = scan(pattern)
    assert open_files < len(os.listdir("/dev/fd")) <= open_files + 4
    assert described(few) == described(first)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_tar_that_is_replaced_while_it_is_opened_never_gives_the_members_of_the_other(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def made(name: str, label: bytes, *numbers: int) -> Path:
        path = tar(tmp_path / "plain", [*((f"{k}.png", png(k)) for k in numbers), ("7.cls", label)])
        data = path.read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        return tmp_path / name

    path = made(name, b"old", 1, 7)
    if name == "a.tar":
        scan(path)  # its list is known
    other, numbers = made(f"other-{name}", b"new", 7, 2, 3), {"7.png": 7, "1.png": 1, "2.png": 2, "3.png": 3}
    where = tarindex.place_of if name == "a.tar" else archives._expanded  # what is seen of the old tar

    def replaced(*given: Any) -> Any:
        found = where(*given)
        if other.exists():
            other.replace(path)
        return found

    with monkeypatch.context() as between:
        between.setattr(tarindex if name == "a.tar" else archives, where.__name__, replaced)
        images = scan(path)
    for row, member in enumerate(images.paths):
        assert images.read(row) == png(numbers[member])
    after = scan(path)
    assert [*after.paths] == ["7.png", "2.png", "3.png"]
    assert [after.read(row) for row in range(3)] == [png(7), png(2), png(3)]
    assert after.classes == ("new",)
    assert not {*map(tuple, images.stamps.tolist())} & {*map(tuple, after.stamps.tolist())}  # nothing noted is believed


def test_times_before_1970_tell_tars_apart(tmp_path: Path, cache: Path) -> None:
    path = tar(tmp_path / "a.tar", {"0.png": png(0), "0.cls": b"old"})
    os.utime(path, ns=(-5, -5))
    assert labels_of(path) == {"0.png": "old"}
    tar(path, {"0.png": png(0), "0.cls": b"new"})
    os.utime(path, ns=(-6, -6))
    assert labels_of(path, trust="times") == {"0.png": "new"}


@contextlib.contextmanager
def limited(name: str, limit: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    number = getattr(resource, name)
    limits = resource.getrlimit(number)
    resource.setrlimit(number, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(number, limits)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_full_disk_is_not_blamed_on_the_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    images = [png(k) for k in range(40)]
    if kind == "tar":
        path = tar(tmp_path / "a.tar", {f"{k}.png": data for k, data in enumerate(images)})
    else:
        path = table(tmp_path / "a.parquet", images, label=[*range(40)])
    monkeypatch.setattr(scratch, "SMALL", 0)  # as if they were many
    monkeypatch.setattr(scratch, "_WAITING", 1)
    with limited("RLIMIT_FSIZE", 100), pytest.raises(StoreError, match=r"scratch has no room .*set BOTTLENECK_CACHE"):
        scan(path)


def test_labels_for_which_the_disk_has_no_room_are_read_from_the_tar(tmp_path: Path, cache: Path) -> None:
    members = [(f"{k}{end}", data) for k in range(80) for end, data in ((".png", png(k)), (".json", b'{"label": "c%d", "note": "%s"}' % (k % 3, b"n" * 30000)))]  # fmt: skip
    path = tar(tmp_path / "a.tar", members)
    with limited("RLIMIT_FSIZE", 1 << 20):
        found = labels_of(path)
    assert found == {f"{k}.png": f"c{k % 3}" for k in range(80)}
    assert labels_of(path, trust="nothing") == labels_of(path) == found


def test_a_list_that_cannot_be_kept_costs_nothing_else(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar(tmp_path / "s-0.tar", {"0.png": png(7), "0.cls": b"new"})

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarindex, "write_signed", full)
    assert labels_of(path) == {"0.png": "new"}
    assert indexes(cache) == []


# --- Parquet ----------------------------------------------------------------------------------------------


def one(path: Path) -> tuple[Path, list[Path]]:
    return path, [path]


def test_numbers_get_the_names_of_the_file(tmp_path: Path) -> None:
    one = table(tmp_path / "a.parquet", [png(1), png(2), png(3)], names=["cat", "dog"], label=[1, 0, None])
    assert labels_of(one) == {"000000": "dog", "000001": "cat", "000002": ""}
    two = table(tmp_path / "b.parquet", [png(1), png(2)], label=[3, 12], kind=["x", "y"], group=["g", None])
    assert labels_of(two) == {"000000": "03", "000001": "12"}
    assert list(labels_of(two, target="kind").values()) == ["x", "y"]
    assert scan(two).groups == ("g", "")
    assert takes_target(two)


def test_splits_come_from_the_names_of_files_in_a_folder(tmp_path: Path) -> None:
    for name, label in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 1)):
        table(tmp_path / "data" / f"{name}.parquet", [png(label)], names=["cat", "dog"], label=[label])
    images = scan(tmp_path)
    assert images.paths == (
        "test-00000-of-00001.parquet/000000",
        "train-00000-of-00002.parquet/000000",
        "train-00001-of-00002.parquet/000000",
    )
    assert images.given_splits.tolist() == [2, 0, 0]
    assert images.classes == ("cat", "dog")
    assert len(scan(f"{tmp_path}/data/train-{{00000..00001}}-of-00002.parquet")) == 2


def arrow(path: Path, images: Sequence[bytes | None], names: Sequence[str] = (), rows: int = 2, **columns: Any) -> Path:
    """A file as ``save_to_disk`` writes it, of the same rows as ``table``."""
    whole = pq.read_table(table(path.with_suffix(".parquet"), images, names=names, **columns))
    path.with_suffix(".parquet").unlink()
    with pa.ipc.new_stream(path, whole.schema) as stream:
        stream.write_table(whole, max_chunksize=rows)
    (path.parent / "state.json").write_text("{}")
    return path


def test_arrow_files_are_read_as_parquet_files_are(tmp_path: Path) -> None:
    pictures = [png(number) for number in range(9)]
    one = arrow(tmp_path / "one" / "data-00000-of-00001.arrow", pictures, ["cat", "dog"], label=[0, 1, 0] * 3)
    assert labels_of(one) == {f"{row:06d}": "dog" if row % 3 == 1 else "cat" for row in range(9)}
    assert labels_of(one.parent) == {f"{one.name}/{row:06d}": "dog" if row % 3 == 1 else "cat" for row in range(9)}
    images = scan(one.parent)
    order = [*range(0, 9, 2), *range(8, -1, -3), 0, 8]
    assert [images.read(row) for row in order] == [pictures[row] for row in order]
    read = reader_of(str(images.root))
    assert read is not None
    assert read(images.paths[5]) == pictures[5]
    for split in ("train", "test"):
        arrow(tmp_path / "two" / split / "data-00000-of-00001.arrow", pictures[:3], label=["a", "b", "a"])
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    both = scan(tmp_path / "two")
    assert both.given_splits.tolist() == [2, 2, 2, 0, 0, 0]
    assert both.paths[3] == "train/data-00000-of-00001.arrow/000000"
    assert both.read(4) == pictures[1]


@pytest.mark.slow
def test_arrow_files_that_are_wrong_are_refused(tmp_path: Path) -> None:
    path = arrow(tmp_path / "a.arrow", [png(1), None], label=[0, 1])
    images = scan(path)
    with pytest.raises(UnreadableImageError, match=r"missing: .*a\.arrow, row 2: the image has no bytes"):
        images.read(1)
    whole = path.read_bytes()
    listed = scan(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="has been changed since its rows were listed"):
        listed.read(0)
    for data in (whole[: len(whole) // 2], b"no arrow", b""):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"a\.arrow"):
            scan(path)
    noise = np.random.default_rng(0)
    for _ in range(200):  # it never ends the process
        damaged = bytearray(whole)
        damaged[int(noise.integers(len(whole)))] ^= 1 << int(noise.integers(8))
        path.write_bytes(damaged)
        with contextlib.suppress(SourceError, UnreadableImageError):
            found = scan(path)
            for row in range(len(found)):
                found.read(row)


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    pictures = [png(number) for number in range(100)]
    rows = open_tables(*one(table(tmp_path / "a.parquet", pictures, rows=30, label=[0] * 100)), None)
    order = [*range(0, 100, 2), *range(99, 0, -2), 0, 50]
    assert [rows.read(rows.files.paths[row]) for row in order] == [pictures[row] for row in order]


@pytest.mark.slow
def test_a_large_row_group_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.sources.parquet._KEPT_BYTES", 2 << 20)
    monkeypatch.setattr("features.sources.parquet._KEPT_ROWS", 16)
    noise = np.random.default_rng(0)
    pictures = [noise.bytes(1 << 18) for _ in range(8)] * 16
    rows = open_tables(*one(table(tmp_path / "a.parquet", pictures, label=[0] * len(pictures))), None)
    before, most = pa.total_allocated_bytes(), 0
    for row, path in enumerate(rows.files.paths):
        assert rows.read(path) == pictures[row]
        most = max(most, pa.total_allocated_bytes() - before)
    column = rows.read._columns[""]  # type: ignore[attr-defined]
    assert column._bytes <= (2 + 4) << 20  # at least a batch of 16
    assert most < 16 << 20  # of 32 MB


def test_tables_that_are_wrong_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = scan(table(path, [None, png(1)], label=[0, 1]))
    with pytest.raises(UnreadableImageError, match=r"missing: .*a\.parquet, row 1: the image has no bytes"):
        images.read(0)
    assert images.read(1) == png(1)
    table(path, [png(1)], label=[5], names=["cat", "dog"])
    with pytest.raises(SourceError, match=r"a\.parquet, row 1: the label is 5, but the file names 2 classes, 0 to 1"):
        scan(path)
    table(path, [png(1)], labels=[5])
    with pytest.raises(
        SourceError, match=r"no column 'label' of labels, received 'image', 'labels'; .*did you mean 'labels'"
    ):
        scan(path)
    table(path, [png(1)], label=[0.5])
    with pytest.raises(SourceError, match="the column 'label' holds double; expected class names or whole numbers"):
        scan(path)
    table(path, [], label=pa.array([], pa.int64()))
    with pytest.raises(SourceError, match="holds no images, its tables have no rows"):
        scan(path)
    listed = scan(table(path, [png(1), png(2)], label=[0, 1]))
    table(path, [png(3), png(4), png(5)], label=[0, 1, 1])
    with pytest.raises(SourceError, match="has been changed since its rows were listed; run again"):
        listed.read(0)


@pytest.mark.slow
def test_a_column_of_nulls_holds_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = table(tmp_path / "a.parquet", [None, None], label=[0, 1])
    for images in (None, pa.nulls(2), pa.array([{"bytes": None, "path": "1.png"}] * 2)):  # the last two without a type
        if images is not None:
            pq.write_table(pa.table({"image": images, "label": [0, 1]}), path)
        with pytest.raises(SourceError, match=r"a\.parquet: none of 2 images could be read \(000000: missing\)"):
            extracted(path, tmp_path / "f.h5")
        assert "a.parquet, row 2: the image has no bytes, only a path or nothing" in caplog.text
        caplog.clear()


def test_numbers_in_one_file_and_names_in_another_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["cat", "dog"], [], [])):
        table(tmp_path / f"s-{number}.parquet", [png(0), png(1)], names=names, label=[0, 1])
    table(tmp_path / "s-3.parquet", [png(0), png(1)], label=[None, None])
    with pytest.raises(
        SourceError, match=r"s-1\.parquet: the column 'label' holds numbers without names, that of s-0\.parquet"
    ):
        scan(f"{tmp_path}/s-{{0..3}}.parquet")
    assert [*labels_of(f"{tmp_path}/s-{{1..3}}.parquet").values()] == ["0", "1", "0", "1", "", ""]


def test_numbers_in_several_files_are_the_same_classes_and_groups(tmp_path: Path) -> None:
    for number, labels in enumerate(([0, 3, None], [12, 3, 9])):
        table(tmp_path / f"s-{number}.parquet", [png(10 * number + k) for k in range(3)], label=labels, group=labels)
    images = scan(f"{tmp_path}/s-{{0..1}}.parquet")
    assert images.classes == ("00", "03", "09", "12")
    assert [*(images.groups or ())] == ["00", "03", "", "12", "03", "09"]
    assert [*labels_of(tmp_path / "s-0.parquet").values()] == ["0", "3", ""]


def test_labels_that_are_null_are_no_labels(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", [png(1), png(2)], label=pa.nulls(2))
    assert list(labels_of(path).values()) == ["", ""]


# --- several labels, or numbers -----------------------------------------------------------------------------


def told(kind: str, folder: Path, columns: dict[str, list[Any]]) -> str:
    """Images with these values in tars, in Parquet files, or in a manifest of Parquet or CSV; as many files as there can be."""
    count = len(next(iter(columns.values())))
    if kind == "tars":
        for row in range(count):
            values = {name: cells[row] for name, cells in columns.items() if cells[row] is not None}
            tar(folder / f"s-{row}.tar", {"0.png": png(row), "0.json": json.dumps(values).encode()})
        return f"{folder}/s-{{}}.tar"
    if kind == "tables":
        for row in range(count):
            some = {name: pa.array(cells)[row : row + 1] for name, cells in columns.items()}
            table(folder / f"s-{row}.parquet", [png(row)], **some)
        return str(folder)
    folder.mkdir(exist_ok=True)
    paths = [f"{row}.png" for row in range(count)]
    for row, name in enumerate(paths):
        (folder / name).write_bytes(png(row))
    if kind == "parquet":
        pq.write_table(pa.table({"path": paths, **columns}), folder / "m.parquet")
        return str(folder / "m.parquet")
    texts = [
        [
            ";".join(["", *cell]) or ";" if isinstance(cell, list) else "" if cell is None else str(cell)
            for cell in cells
        ]
        for cells in columns.values()
    ]
    lines = [",".join(["path", *columns]), *(",".join(row) for row in zip(paths, *texts, strict=True))]
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "m.csv")


SOURCES = ("tars", "tables", "parquet", "csv")
TAGS = ["sea;sun", "sun", None, ";"]


@pytest.mark.parametrize("kind", SOURCES)
def test_targets_are_read_alike_from_every_source(tmp_path: Path, kind: str) -> None:
    U = 255
    source = told(kind, tmp_path / "a", {"tags": TAGS, "cat": [1, 0, None, 1], "age": [7.5, None, -3.0, 1e3]})
    found = scan(source, target="tags", task="multilabel")
    assert found.target is not None
    assert (found.target.name, found.target.columns) == ("tags", ("sea", "sun"))
    assert found.target.values.tolist() == [[1, 1], [0, 1], [U, U], [0, 0]]
    assert (found.classes, found.labels.tolist(), found.given_splits.tolist()) == ((), [-1] * 4, [-1, -1, 3, -1])
    both = scan(source, target="Cat,age", task="regression").target
    assert both is not None
    assert both.columns == ("cat", "age")
    np.testing.assert_array_equal(both.values, [[1, 7.5], [0, np.nan], [np.nan, -3], [1, 1000]])
    truths = scan(source, target="cat", task="multilabel").target
    assert truths is not None
    assert truths.values.tolist() == [[1], [0], [U], [1]]
    assert takes_target(source)
    lists = told(kind, tmp_path / "b", {"tags": [["sea", "sun"], ["sun"], None, []]})
    assert scan(lists, target="tags", task="multilabel").target == found.target


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("task", "columns", "target", "said"),
    [
        ("multilabel", {"tags": ["a;b", "c", "a|b"]}, "tags", "tags is 'a|b', with another separator than 'a;b'"),
        ("multilabel", {"cat": ["1", "2"], "dog": ["0", "1"]}, "cat,dog", "cat is '2', expected 1, 0, or nothing"),
        ("multilabel", {"cat": ["1", "0"]}, "cat,dgo", "no column 'dgo' for the target"),
        ("multilabel", {"cat": ["1", "0"]}, "cat,cat", "each once"),
        ("multilabel", {"tags": ["nan", "null"]}, "tags", "every cell of 'tags' is blank"),
        ("regression", {"age": ["1", "old"]}, "age", "age is 'old', expected a number"),
        ("regression", {"age": ["1", "inf"]}, "age", "age is 'inf', expected a finite number"),
    ],
)
def test_targets_that_do_not_fit_are_refused_alike(
    tmp_path: Path, kind: str, task: str, columns: dict[str, list[Any]], target: str, said: str
) -> None:
    source = told(kind, tmp_path / "a", columns)
    with pytest.raises(SourceError) as refused:
        scan(source, target=target, task=task)
    assert said in str(refused.value)
    assert len(str(refused.value)) <= 1000
    if " is '" in said:  # it is the last row
        last = len(next(iter(columns.values()))) - 1
        place = {"tars": f"'s-{last}.tar/0.png'", "tables": f"s-{last}.parquet, row 1", "csv": f"line {last + 2}"}
        assert place.get(kind, f"row {last + 1}") in str(refused.value)


@pytest.mark.slow
def test_the_row_is_named_where_numbers_become_text(tmp_path: Path) -> None:
    count = 90_000
    path = table(tmp_path / "a.parquet", [b"x"] * count, age=["7"] * (count - 1) + ["seven"])
    with pytest.raises(SourceError, match=rf"a\.parquet, row {count}: age is 'seven', expected a number"):
        scan(path, target="age", task="regression")


def test_what_only_tars_and_tables_have(tmp_path: Path) -> None:
    """Texts beside images, lists of the numbers of classes, lists that cannot be written as text, other columns in a file."""
    words = tar(tmp_path / "a.tar", {"0.png": png(0), "0.txt": b"sea;sun\n", "1.png": png(1), "1.cls": b"sun"})
    target = scan(words, task="multilabel").target
    assert target is not None
    assert (target.name, target.columns, target.values.tolist()) == ("label", ("sea", "sun"), [[1, 1], [0, 1]])
    features = {"tags": {"feature": {"names": ["sea", "sun"], "_type": "ClassLabel"}, "_type": "Sequence"}}
    path = table(tmp_path / "b" / "0.parquet", [png(0), png(1)], tags=[[0, 1], []])
    named = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(pq.read_table(path).replace_schema_metadata(named), path)
    target = scan(path, target="tags", task="multilabel").target
    assert target is not None
    assert (target.columns, target.values.tolist()) == (("sea", "sun"), [[1, 1], [0, 0]])
    table(tmp_path / "b" / "1.parquet", [png(2)], label=["sea"])
    wrong = [
        (tmp_path / "b", "1.parquet: no column 'tags' for the target, received 'image', 'label'"),
        (
            table(tmp_path / "c.parquet", [png(0)], tags=[["a;b"]]),
            r"c\.parquet: row 1: tags: the label 'a;b' of a list has a ';'",
        ),
        (table(tmp_path / "d.parquet", [png(0)], tags=[{"a": 1}]), r"d\.parquet: the column 'tags' holds struct"),
        (
            tar(tmp_path / "e.tar", {"0.png": png(0), "0.json": b'{"tags": {"a": 1}}'}),
            "member '0.json' holds no label: received",
        ),
        (
            tar(tmp_path / "f.tar", {"0.png": png(0), "0.json": b'{"tags": 1, "Tags ": 2}'}),
            "two keys are named 'Tags '",
        ),
        (tar(tmp_path / "g.tar", {"0.png": png(0), "0.json": b"{}"}), "no column 'tags' for the target, received ;"),
    ]
    for source, expected in wrong:
        with pytest.raises(SourceError, match=expected):
            scan(source, target="tags", task="multilabel")
    with pytest.raises(SourceError, match="--task multilabel"):
        scan(path, target="tags")
    with pytest.raises(SourceError, match="--task multilabel"):
        scan(tar(tmp_path / "h.tar", {"0.png": png(0), "0.json": b'{"tags": ["a"]}'}), target="tags")


# --- all of them ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tars", "tables"])
def test_the_features_are_those_of_the_folder_and_only_new_images_are_inferred(tmp_path: Path, kind: str) -> None:
    folder = paint_folder(tmp_path / "images", {"cat": 5, "dog": 4})
    files = sorted(folder.rglob("*.png"))
    if kind == "tars":
        for number, part in enumerate((files[:5], files[5:])):
            members = [(f"{k:03d}.png", file.read_bytes()) for k, file in enumerate(part)]
            members += [(f"{k:03d}.cls", file.parent.name.encode()) for k, file in enumerate(part)]
            tar(tmp_path / f"s-{number}.tar", members)
        first, both = f"{tmp_path}/s-{{0..0}}.tar", f"{tmp_path}/s-{{0..1}}.tar"
    else:
        for number, part in enumerate((files[:5], files[5:])):
            table(tmp_path / f"s-{number}.parquet", [file.read_bytes() for file in part], rows=2, label=[file.parent.name for file in part])  # fmt: skip
        first, both = f"{tmp_path}/s-{{0..0}}.parquet", f"{tmp_path}/s-{{0..1}}.parquet"
    expected = extracted(folder, tmp_path / "folder.h5")
    extracted(first, tmp_path / "s.h5")
    result = Extraction(scan(both), NumpyNetwork(), tmp_path / "s.h5", ExtractionOptions()).run()  # type: ignore[arg-type]
    assert (result.inferred, result.counts["cached"]) == (4, 5)
    found = FeatureStore.open(tmp_path / "s.h5")
    np.testing.assert_array_equal(found.array("last.avg"), expected.array("last.avg"))
    assert found.images.sha256.tolist() == expected.images.sha256.tolist()
    assert found.images.labels.tolist() == expected.images.labels.tolist()
    read = reader_of(str(scan(both).root))  # as workers of a cluster find it
    assert read is not None
    assert [read(path) for path in found.images.paths] == [file.read_bytes() for file in files]
    again = Extraction(scan(both), NumpyNetwork(), tmp_path / "s.h5", ExtractionOptions()).run()  # type: ignore[arg-type]
    assert (again.inferred, again.counts["hashed"], again.written) == (0, 0, False)


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["tars", "tables"])
def test_a_run_that_was_killed_gives_the_same_store(tmp_path: Path, kind: str) -> None:
    for number in range(2):
        pictures = [png(100 * number + k) for k in range(60)]
        if kind == "tars":
            tar(
                tmp_path / f"s-{number}.tar",
                [(f"{k:03d}{end}", data) for k, picture in enumerate(pictures) for end, data in ((".png", picture), (".cls", b"%d" % (k % 2)))],
            )  # fmt: skip
        else:
            table(tmp_path / f"s-{number}.parquet", pictures, rows=7, label=[k % 2 for k in range(60)])
    kill_series(f"{tmp_path}/s-{{0..1}}.{'tar' if kind == 'tars' else 'parquet'}", tmp_path)
