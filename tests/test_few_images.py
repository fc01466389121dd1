"""Heads for 1 to 20 images a class: what they compute, and that columns of mere noise do not drown the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.heads.kinds import load_head, make_head
from pipeline.scores.metrics import softmax


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def rows_of(classes: int, shots: int, columns: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes differ in the first few columns; the others hold faint noise."""
    generator = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes), shots).astype(np.int32)
    X = generator.normal(size=(len(labels), columns)) * 0.05 + 3
    X[:, :classes] += 2 * np.eye(classes)[labels] + 0.2 * generator.normal(size=(len(labels), classes))
    return X.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_the_nearest_mean_is_that_of_the_cosines(classes: int, tmp_path: Path) -> None:
    X, y = rows_of(classes, 6)
    head = make_head("nearest-mean")
    history = head.fit(X, y)
    assert history["accuracy"] == [1.0]
    assert (head.mean == 0).all()
    assert (head.std == 1).all()
    centred = X - X.mean(axis=0, dtype=np.float64)
    means = unit(np.stack([unit(centred)[y == k].mean(axis=0) for k in range(classes)]))
    new = rows_of(classes, 5, seed=1)[0]
    margins = (new - X.mean(axis=0, dtype=np.float64)) @ means.T / np.linalg.norm(centred, axis=1).mean()
    np.testing.assert_allclose(head.predict_proba(new), softmax(margins / head.temperature), atol=1e-6)
    np.testing.assert_array_equal(margins.argmax(axis=1), (unit(new - X.mean(axis=0)) @ means.T).argmax(axis=1))
    head.save(tmp_path)
    again = load_head(tmp_path)
    np.testing.assert_allclose(again.predict_proba(new), head.predict_proba(new), atol=1e-12)
    assert again.kind == "nearest-mean"
    assert again.parameter_count == (classes if classes > 2 else 1) * 31
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.json", "head.npz"]


def test_components_lead_to_the_same_kind_of_head() -> None:
    X, y = rows_of(3, 6)
    whole, part = make_head("nearest-mean"), make_head("nearest-mean", pca=3)
    whole.fit(X, y)
    part.fit(X, y)
    new, labels = rows_of(3, 5, seed=1)
    assert (part.predict_proba(new).argmax(axis=1) == labels).all()
    kernel, bias = part.fitted.dense()  # type: ignore[attr-defined]
    assert (kernel.shape, bias.shape) == ((30, 3), (3,))


def test_one_image_of_each_class_is_enough_and_makes_nobody_sure() -> None:
    """No row can be held out, so nothing tells how sure to be: probabilities stay close to each other."""
    X, y = rows_of(5, 1)
    new, labels = rows_of(5, 20, seed=1)
    for name in ("nearest-mean", "logistic-shrunk"):
        head = make_head(name)
        head.fit(X, y)
        found = head.predict_proba(new)
        assert (found.argmax(axis=1) == labels).all(), name
        assert head.temperature == 1
        assert found.max() < 0.6, name
        assert np.abs(found.sum(axis=1) - 1).max() < 1e-12
    plain = make_head("logistic")
    plain.fit(X, y)
    assert (plain.predict_proba(new).argmax(axis=1) == labels).mean() < 1  # noise, blown up to the spread of the rest


def test_equal_rows_are_no_division_by_zero() -> None:
    X, y = np.ones((4, 3), np.float32), np.array([0, 1, 0, 1], np.int32)
    head = make_head("nearest-mean")
    head.fit(X, y)
    np.testing.assert_allclose(head.predict_proba(X), 0.5)


@pytest.mark.slow
def test_the_shrunk_logistic_is_scikit_learns_on_the_features_as_they_are() -> None:
    from sklearn.linear_model import LogisticRegression

    X, y = rows_of(3, 8)
    head = make_head("logistic-shrunk", C=0.3)
    head.fit(X, y)
    other = LogisticRegression(C=0.3, max_iter=1000, tol=1e-8).fit(X.astype(np.float64), y)
    np.testing.assert_allclose(head.predict_proba(X), other.predict_proba(X.astype(np.float64)), atol=1e-3)
    assert make_head("logistic-shrunk").parameters.described() == {"folds": 5, "scale": False, "C": None}
