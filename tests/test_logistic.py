"""Logistic regression by Keras: the predictions of scikit-learn, in chunks, from the store, under the run ids of before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from features.networks.backend import load_keras
from pipeline.heads import logistic
from pipeline.heads.kinds import load_head, make_head
from pipeline.heads.logistic import fit_logistic
from pipeline.presets import LogisticParameters


def test_a_head_of_before_is_described_as_before() -> None:
    assert LogisticParameters(C=0.1).described() == {"C": 0.1, "folds": 5}
    assert LogisticParameters(C=0.1, solver="keras").described() == {"C": 0.1, "folds": 5, "solver": "keras"}


def rows_of(classes: int, count: int = 400, width: int = 24, signal: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Rows of overlapping classes, the first ones more frequent."""
    generator = np.random.default_rng(0)
    y = np.minimum(generator.integers(0, classes, count), generator.integers(0, classes, count))
    y[:classes] = np.arange(classes)
    centres = generator.standard_normal((classes, width))
    return (signal * centres[y] + generator.standard_normal((count, width))).astype(np.float32), y


def reading(X: np.ndarray, asked: list[int]) -> Any:
    def pieces(size: int) -> Iterator[np.ndarray]:
        asked.append(size)
        return (X[start : start + size] for start in range(0, len(X), size))

    return pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "C", "weight", "chunk", "device"),
    [
        (2, 1e-2, None, 1 << 20, "cpu"),
        (2, 10.0, "balanced", 4 * 24 * 150, "gpu"),  # three chunks, the last of 100 rows, which stay on the device
        (5, 1.0, "balanced", 4 * 24 * 150, "cpu"),  # three chunks, sent for every gradient
        (3, 100.0, None, 1 << 20, "gpu"),
    ],
)
def test_probabilities_are_those_of_scikit_learn(
    monkeypatch: pytest.MonkeyPatch, classes: int, C: float, weight: str | None, chunk: int, device: str
) -> None:
    from sklearn.linear_model import LogisticRegression

    load_keras()
    monkeypatch.setattr(logistic, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(logistic, "choose_device", lambda _: device)
    rows, labels = rows_of(classes, 800)
    (X, fresh), y = (rows[:400], rows[400:]), labels[:400]
    asked: list[int] = []
    expected = LogisticRegression(C=C, class_weight=weight, tol=1e-8, max_iter=10_000).fit(X.astype(np.float64), y)
    found = fit_logistic(LogisticRegression(C=C, class_weight=weight, max_iter=1000), reading(X, asked), y, X.shape[1])
    for part in (X, fresh):
        np.testing.assert_allclose(found.predict_proba(part), expected.predict_proba(part), rtol=0, atol=1e-4)
    assert found.coef_.shape == expected.coef_.shape
    assert set(asked) == {min(len(X), chunk // (4 * 24))}
    assert (len(asked) > 1) == (device == "cpu")


@pytest.mark.parametrize(
    ("steps", "success", "slope", "said"),
    [
        (7, True, 1.0, False),
        (7, False, 5e-5, False),
        (7, False, 1.0, True),
        (7, False, np.nan, True),
        (100, True, 0, True),
    ],
)
def test_a_minimum_that_was_not_found_is_said(steps: int, success: bool, slope: float, said: bool) -> None:
    found = SimpleNamespace(nit=steps, success=success, jac=np.array([0, -slope]))
    estimator = SimpleNamespace(max_iter=100, tol=1e-4)
    assert (logistic._not_converged(found, estimator) is not None) == said


@pytest.mark.slow
def test_the_head_chooses_the_same_penalty(tmp_path: Path) -> None:
    X, y = rows_of(3, 120, 160, signal=0.15)  # fewer rows than columns
    found = {}
    for solver in ("scikit-learn", "keras"):
        head = make_head("logistic", classes=("a", "b", "c"), solver=solver)
        history = head.fit(X, y)
        (tmp_path / solver).mkdir()
        head.save(tmp_path / solver)
        found[solver] = history["C"], load_head(tmp_path / solver).predict_proba(X)
    assert found["keras"][0] == found["scikit-learn"][0]
    np.testing.assert_allclose(found["keras"][1], found["scikit-learn"][1], rtol=0, atol=1e-3)
