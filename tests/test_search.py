"""Nearest neighbours: the rows and cosines of the plain definition, in pieces, projected, with ties, and from damaged stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import recipe
from test_streaming import write_store

from features.errors import IntegrityError
from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec
from features.store.writer import StoreWriter
from pipeline.search.neighbours import nearest, nearest_of_all
from pipeline.search.vectors import Vectors, widened


def made(path: Path, X: np.ndarray) -> FeatureStore:
    return write_store(path, [X], np.arange(len(X)) % 2, np.arange(len(X)) % 3)


def plain(X: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cosines by the definition, in float64; of equal ones the first row."""
    X, queries = (values.astype(np.float64) for values in (X, queries))
    cosines = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (X / np.linalg.norm(X, axis=1)[:, None]).T
    rows = np.argsort(-np.round(cosines, 12), axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(cosines, rows, 1)


def smooth(count: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows whose spectrum falls like that of features of a network."""
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(count, columns)) * np.arange(1, columns + 1) ** -0.8
    return (hidden @ np.linalg.qr(generator.normal(size=(columns, columns)))[0]).astype(np.float32)


@pytest.mark.slow
def test_the_nearest_rows_are_those_of_the_definition_piece_by_piece(tmp_path: Path) -> None:
    X = smooth(3000, 256)
    vectors = Vectors(made(tmp_path / "features.h5", X))
    vectors._step = 700  # five pieces
    queries = np.array([0, 1500, 2999, 3, 3])
    found = nearest(vectors, vectors.at(queries), 7)
    rows, cosines = plain(X, X[queries], 7)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.similarity, cosines, atol=2e-6)
    assert found.rows[:, 0].tolist() == queries.tolist()
    np.testing.assert_array_equal(vectors.gathered(queries), vectors.at(queries))


def test_only_the_rows_asked_for_are_searched(tmp_path: Path) -> None:
    X = smooth(500, 20)
    vectors, rows = Vectors(made(tmp_path / "features.h5", X)), np.arange(7, 500, 3)
    expected, _ = plain(X[rows], X[:4], 5)
    np.testing.assert_array_equal(nearest(vectors, vectors.at(np.arange(4)), 5, rows=rows).rows, rows[expected])
    everything = nearest(vectors, vectors.at(np.arange(4)), 600, rows=rows)
    assert sorted(everything.rows[2].tolist()) == rows.tolist()  # fewer than were asked for


@pytest.mark.slow
def test_of_equal_rows_the_first_ones_are_given(tmp_path: Path) -> None:
    X = np.ones((2500, 8), np.float32)
    X[100:200, 0] = 5
    vectors = Vectors(made(tmp_path / "features.h5", X))
    vectors._step = 300
    found = nearest(vectors, vectors.at(np.array([0, 150])), 6)
    assert found.rows.tolist() == [[0, 1, 2, 3, 4, 5], [100, 101, 102, 103, 104, 105]]
    assert found.similarity.max() <= 1
    all_rows = nearest_of_all(vectors, 3)
    assert all_rows.rows[0].tolist() == [1, 2, 3]
    assert all_rows.rows[1].tolist() == [0, 2, 3]
    assert all_rows.rows[2499].tolist() == [0, 1, 2]  # crowded out of its own neighbours by rows like it


def test_a_row_of_zeros_is_similar_to_none(tmp_path: Path) -> None:
    X = smooth(50, 6)
    X[9] = 0
    vectors = Vectors(made(tmp_path / "features.h5", X))
    assert nearest(vectors, vectors.at(np.array([9])), 2).similarity.tolist() == [[0.0, 0.0]]


def test_spatial_features_are_averaged(tmp_path: Path) -> None:
    X = np.random.default_rng(0).random((40, 3, 3, 5)).astype(np.float32)
    vectors = Vectors(made(tmp_path / "features.h5", X))
    rows, _ = plain(X.mean(axis=(1, 2)), X.mean(axis=(1, 2))[:3], 4)
    np.testing.assert_array_equal(nearest(vectors, vectors.of_features(X[:3]), 4).rows, rows)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 320])
def test_the_neighbours_of_all_rows_leave_out_each_row_itself(tmp_path: Path, columns: int) -> None:
    X = smooth(900, columns)
    X[5] = X[800]  # a copy is a neighbour
    vectors = Vectors(made(tmp_path / "features.h5", X))
    rows, cosines = plain(X, X, 6)
    exact = nearest_of_all(vectors, 5, exact=True)
    others = np.array([[row for row in line if row != own][:5] for own, line in enumerate(rows.tolist())])
    np.testing.assert_array_equal(exact.rows, others)
    assert exact.rows[5, 0] == 800
    np.testing.assert_allclose(exact.similarity[:, 0], cosines[:, 1], atol=2e-6)
    found = nearest_of_all(vectors, 5)
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.rows.tolist(), others.tolist(), strict=True)]) > 0.99
    same = found.rows == exact.rows
    np.testing.assert_allclose(found.similarity[same], exact.similarity[same], atol=2e-6)
    few = np.arange(100, 400, 2)
    part = nearest_of_all(vectors, 4, rows=few)
    expected, _ = plain(X[few], X[few], 5)
    assert np.mean(part.rows == few[expected[:, 1:]]) > 0.99


@pytest.mark.slow
def test_features_without_structure_are_searched_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In noise of 1,000 columns, 256 of them say little about neighbours: it takes too many candidates."""
    X = np.random.default_rng(0).normal(size=(1500, 1000)).astype(np.float32)
    vectors = Vectors(made(tmp_path / "features.h5", X))
    caplog.set_level("INFO")
    rows, _ = plain(X, X[:50], 4)
    np.testing.assert_array_equal(nearest_of_all(vectors, 3).rows[:50], rows[:, 1:])
    assert "all neighbours are computed exactly" in caplog.text


def test_one_row_has_no_neighbours(tmp_path: Path) -> None:
    vectors = Vectors(made(tmp_path / "features.h5", smooth(3, 4)))
    assert nearest_of_all(vectors, 5, rows=np.array([1])).rows.shape == (1, 0)


@pytest.mark.slow
def test_a_damaged_block_is_refused_on_first_use(tmp_path: Path) -> None:
    X = smooth(3000, 256)
    path = tmp_path / "features.h5"
    made(path, X)
    data = bytearray(path.read_bytes())
    place = data.find(X[2500].tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    vectors = Vectors(FeatureStore.open(path))
    queries = vectors.at(np.arange(3))  # whose block is whole
    with pytest.raises(IntegrityError, match="rows 2048 to 2999 are not what was written"):
        nearest(vectors, queries, 3)


def test_every_half_is_the_float_that_numpy_makes_of_it() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    out = np.empty(len(finite), np.float32)
    widened(finite, out)
    np.testing.assert_array_equal(out.view(np.uint32), finite.astype(np.float32).view(np.uint32))


def test_float16_rows_are_searched_like_float32_ones(tmp_path: Path) -> None:
    X = smooth(400, 30).astype(np.float16)
    spec = FeatureSpec(recipe(dtype="float16"), 1, (30,))
    writer = StoreWriter(tmp_path / "half.h5", kind="store", rows=400, features={spec.recipe.name: spec})
    writer.append(spec.recipe.name, X[:, None])
    table = made(tmp_path / "other.h5", X.astype(np.float32))
    writer.finish(images=table.images, quarantine=table.quarantine, classes=table.classes)
    vectors = Vectors(FeatureStore.open(tmp_path / "half.h5"))
    rows, cosines = plain(X, X[:9], 5)
    found = nearest(vectors, vectors.at(np.arange(9)), 5)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.similarity, cosines, atol=2e-6)
