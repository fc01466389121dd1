"""What is known before an extraction: which entry is found where several fit, and that a million of them take no memory."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import NumpyNetwork

from features.extraction.known import KnownRows
from features.extraction.shard import KILLS_WORKER
from features.recipe import Recipe
from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec, ImageTable, Quarantine, digest_rows
from features.store.writer import StoreWriter
from features.texts import Texts, keys_of

RECIPE: Recipe = NumpyNetwork().recipes[0]


def sha(text: object) -> bytes:
    return hashlib.sha256(str(text).encode()).digest()


def store(
    path: Path,
    rows: Sequence[tuple[str, bytes]],
    refused: Sequence[tuple[str, bytes, str]] = (),
    *,
    root: str = "/images",
    versions: tuple[str, ...] | None = None,
    recipe: Recipe = RECIPE,
) -> FeatureStore:
    """A store of these images: path, hash. Row ``k`` is ``k`` pixels wide and has ``10 + k`` bytes."""
    count, bad = len(rows), len(refused)
    writer = StoreWriter(
        path, kind="store", rows=count, features={recipe.name: FeatureSpec(recipe, 1, (1,))}, version=2
    )
    writer.append(recipe.name, np.zeros((count, 1, 1), np.float32))
    numbers = np.arange(count)
    writer.finish(
        images=ImageTable(
            Texts.of(name for name, _ in rows), digest_rows(digest for _, digest in rows), np.full(count, -1, np.int32),
            np.full(count, 3, np.int8), None, numbers.astype(np.int32), numbers.astype(np.int32), 10 + numbers, 100 + numbers,
            versions=versions,
        ),
        quarantine=Quarantine(
            tuple(name for name, _, _ in refused), digest_rows(digest for _, digest, _ in refused),
            tuple(reason for _, _, reason in refused), np.full(bad, 7), np.full(bad, 8),
        ),
        provenance={"root": root},
    )  # fmt: skip
    return FeatureStore.open(path)


def keys(*paths: str) -> np.ndarray:
    return keys_of(paths, len(paths))


def digests(*texts: object) -> np.ndarray:
    return digest_rows(map(sha, texts))


def test_of_several_entries_the_right_one_is_found(tmp_path: Path) -> None:
    known = KnownRows()
    assert known.at_path(keys("a")).tolist() == known.of_content(digests("A")).tolist() == [-1]
    assert known.has_size(np.array([10])).tolist() == [False]
    first = store(tmp_path / "1.h5", [("a", sha("A")), ("b", sha("B"))], [("x", sha("X"), "truncated"), ("y", bytes(32), "missing")])  # fmt: skip
    known.add(first, (0,), root="/images")  # entries 0 to 3
    second = [("x", sha("X")), ("b", sha("C")), ("a2", sha("A"))]
    known.add(
        store(tmp_path / "2.h5", second, [("k", sha("K"), KILLS_WORKER)]), (0,), root="/images", fresh=True
    )  # 4 to 7
    known.add(store(tmp_path / "3.h5", [("a", sha("D"))], root="/elsewhere"), (0,), root="/images")  # 8
    assert known.of_content(digests("A", "B", "X", "C", "K", "Z")).tolist() == [
        0,
        1,
        4,
        5,
        7,
        -1,
    ]  # readable before refused
    assert [known.of_one(sha(text)) for text in "AXKZ"] == [0, 4, 7, -1]
    # of two entries with one path the last; what lies elsewhere, or was never read, says nothing about a path
    assert known.at_path(keys("a", "b", "x", "y", "z")).tolist() == [0, 5, 4, -1, -1]
    assert known.fresh(keys("a", "b", "x", "k")).tolist() == [-1, 5, 4, 7]
    assert known.at_time(keys("a", "a"), np.array([10, 11]), np.array([100, 100])).tolist() == [0, -1]
    cell = RECIPE.cell(0)
    found = known.locate(cell, digests("A", "B", "D", "K"))
    assert found.tolist() == [6, 1, 8, -1]  # of two rows the last one
    assert known.places(found[:3]).tolist() == [[1, 2], [0, 1], [2, 0]]
    assert known.locate(RECIPE.cell(1), digests("A")).tolist() == [-1]
    assert known.has_size(np.array([9, 10, 7, 8])).tolist() == [False, True, True, False]  # 7: it ends its process
    assert known.is_refused(np.array([0, 2, 7, -1])).tolist() == [False, True, True, False]
    assert known.is_refused(np.array([0, 2, 7, -1]), KILLS_WORKER).tolist() == [False, False, True, False]
    assert known.same_content(np.array([0, 0, 2, -1]), np.array([6, 1, 4, -1])).tolist() == [True, False, True, False]
    assert known.in_first_source(np.array([0, 6, 4, 8, -1])) == 2
    identities = known.identities(np.array([5, 2]))
    assert (identities.widths.tolist(), identities.reasons.tolist()) == ([1, 0], [-1, 0])
    assert (identities.reason(0), identities.reason(1), identities.sha256[1].tobytes()) == (None, "truncated", sha("X"))


def test_a_version_counts_at_its_address_or_in_its_place(tmp_path: Path) -> None:
    known = KnownRows()
    rows = [("s3://b/a.png", sha("A")), ("c.png", sha("C")), ("d.png", sha("D"))]
    known.add(store(tmp_path / "1.h5", rows, versions=("v1", "v2", "")), (0,), root="/elsewhere")
    asked = keys("s3://b/a.png", "s3://b/a.png", "c.png", "d.png")
    assert known.at_version(asked, np.array([10, 10, 11, 12]), ("v1", "v2", "v2", "")).tolist() == [0, -1, -1, -1]
    known.add(store(tmp_path / "2.h5", rows, versions=("v3", "v2", "")), (0,), root="/images")
    assert known.at_version(asked, np.array([10, 10, 11, 12]), ("v3", "v1", "v2", "")).tolist() == [3, -1, 4, -1]
    assert known.at_version(asked[:1], np.array([11]), ("v3",)).tolist() == [-1]  # of another size


@pytest.mark.slow
def test_what_is_known_takes_at_most_200_bytes_an_image(tmp_path: Path) -> None:
    count = 40_000
    opened = store(tmp_path / "a.h5", [(f"{number:08d}", sha(number)) for number in range(count)])
    paths = keys_of(opened.images.paths, count)
    tracemalloc.start()
    known = KnownRows()
    known.add(opened, (0,), root="/images")
    every = known.at_path(paths)
    same = np.array_equal(every, np.arange(count)) and np.array_equal(known.of_content(known.sha256(every)), every)
    same &= np.array_equal(known.places(known.locate(RECIPE.cell(0), known.sha256(every)))[:, 1], every)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same
    assert peak / count < 200
