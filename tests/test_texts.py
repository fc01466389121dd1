"""Many texts and rows in files without a name: the same values as lists, next to no memory, nothing left behind."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from features import scratch as files
from features import texts
from features.scratch import Growing, scratch, taken
from features.sources import webdataset
from features.sources.scan import scan
from features.texts import Coded, Lookup, Texts, key_of, keys_of

NAMES = ["a/1.png", "", "dög/2.png", "bad\udcff/3.png", "a/1.png", "x" * 300]


@pytest.fixture(params=[1 << 20, 4], ids=["memory", "file"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """Arrays lie in memory, or all of them in files."""
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SMALL", request.param)
    return int(request.param)


@pytest.mark.usefixtures("small")
def test_texts_are_those_of_a_list(tmp_path: Path) -> None:
    names = [*NAMES, *(f"{number:06d}" for number in range(9000))]
    found = Texts.of(names)
    assert found == names
    assert found == tuple(names)
    assert tuple(names) == found
    assert found != names[:-1]
    assert [found[0], found[3], found[-1], found[4999]] == [names[0], names[3], names[-1], names[4999]]
    assert list(found[2:5]) == names[2:5]
    assert list(found[2:5][1:]) == names[3:5]
    assert list(found[::-3000]) == names[::-3000]
    assert found.some(np.array([5, 0, 8000])) == [names[5], names[0], names[8000]]
    assert found.some(np.arange(len(names))) is found
    assert found[len(names) :] == []
    with pytest.raises(IndexError):
        found[len(names)]
    assert not any(path.is_file() for path in tmp_path.rglob("*"))  # what there is has no name


@pytest.mark.usefixtures("small")
def test_rows_are_found_by_key() -> None:
    names = ["b", "a", "b", "c", "a", "b"]
    lookup, wanted = Lookup(keys_of(names, 6)), keys_of(["a", "b", "c", "d"], 4)
    assert lookup.first(wanted).tolist() == [1, 0, 3, -1]
    assert lookup.last(wanted).tolist() == [4, 5, 3, -1]
    assert lookup.repeated().tolist() == [2, 4, 5]
    assert [lookup.row(key_of(name)) for name in "abcd"] == [1, 0, 3, -1]
    some = Lookup(keys_of(names, 6), np.array([2, 4]))
    assert some.first(wanted).tolist() == [4, 2, -1, -1]


def test_keys_that_end_in_zeros_differ() -> None:
    keys = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], np.uint8)
    assert Lookup(keys).first(keys).tolist() == [0, 1, 2, 3]
    assert Lookup(keys).row(b"\1\0") == 0
    assert Lookup(keys[1:]).row(b"\1\0") == -1


@pytest.mark.usefixtures("small")
def test_arrays_grow_row_by_row() -> None:
    growing = Growing("<i8", (2,))
    for number in range(5000):
        growing.append((number, -number))
    before = growing.array()
    growing.extend(np.array([[7, 8]]))
    assert before[4999].tolist() == [4999, -4999]
    assert (len(before), len(growing), growing.array()[-1].tolist()) == (5000, 5001, [7, 8])
    assert taken(before, np.arange(5000)) is before
    np.testing.assert_array_equal(taken(before, np.array([3, 1])), [[3, -3], [1, -1]])
    assert scratch((3, 2), "i4").tolist() == [[0, 0]] * 3
    coded = Coded.of(["cat", "dog", "cat"])
    assert (list(coded), coded[1], list(coded.changed(("x", "y")))) == (["cat", "dog", "cat"], "dog", ["x", "y", "x"])


def test_a_full_disk_costs_memory_and_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "SMALL", 4)
    monkeypatch.setattr(files, "unnamed_file", full)
    assert scratch((5,), "<i8").tolist() == [0] * 5
    growing = Growing("<i8")
    growing.extend(range(9000))
    assert growing.array().tolist() == list(range(9000))


def shard(path: Path, count: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            for ending, data in (("png", b"x"), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number:07d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def table(path: Path, count: int) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = pa.array(
        [{"bytes": b"x", "path": None}] * count, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    parquet.write_table(pa.table({"image": images, "label": pa.array([k % 2 for k in range(count)])}), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name", "few", "many"), [(table, "a.parquet", 5000, 15000), (shard, "a.tar", 700, 2100)]
)
def test_listing_takes_less_than_200_bytes_an_image(
    make: Callable[[Path, int], Path], name: str, few: int, many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SMALL", 1 << 12)
    for step in (files, "_WAITING"), (texts, "_STEP"), (webdataset, "_STEP"):
        monkeypatch.setattr(*step, 64)  # what waits in memory is constant, and small beside these few images
    peaks = []
    for count in (few, many):
        source = make(tmp_path / f"{count}-{name}", count)
        scan(source)  # what is imported and cached once does not count
        tracemalloc.start()
        images = scan(source)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (len(images), images.classes) == (count, ("0", "1"))
        assert images.labels.tolist() == [k % 2 for k in range(count)]
    assert (peaks[1] - peaks[0]) / (many - few) <= 200
