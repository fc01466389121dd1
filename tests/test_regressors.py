"""Linear regressors of scikit-learn by import path: the numbers of scikit-learn, kept as arrays; others are refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from targeted import labels_of, numbers_of, target_store, thirds

from features.errors import ConfigurationError
from pipeline.heads.kinds import head_of, make_head
from pipeline.runs.folder import Run
from pipeline.stages.train_head import train_head
from pipeline.tasks.table import TASKS

REGRESSION = TASKS["regression"]
pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("sklearn.linear_model.Lasso", {"alpha": 0.1}),
        ("sklearn.linear_model.HuberRegressor", {"alpha": 0.01}),
        ("sklearn.linear_model.BayesianRidge", {}),
        ("sklearn.svm.LinearSVR", {"C": 0.5}),
    ],
)
def test_a_regressor_predicts_as_scikit_learn_does(path: str, params: dict[str, Any]) -> None:
    X, y = numbers_of(200, unknown=0.1)
    head = make_head(path, task=REGRESSION, **params)
    head.fit(X, y)
    module, name = path.rsplit(".", 1)
    made = getattr(importlib.import_module(module), name)(**params)
    made = made.set_params(random_state=0) if "random_state" in made.get_params() else made
    Z = ((X - X.mean(axis=0)) / X.std(axis=0)).astype(np.float32)
    for k in range(y.shape[1]):
        known = np.isfinite(y[:, k])
        expected = made.fit(Z[known], y[known, k]).predict(Z)
        np.testing.assert_allclose(head.predict_proba(X)[:, k], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_its_run_is_opened_without_trust_and_predicts_the_same(tmp_path: Path) -> None:
    X, y = numbers_of(300)
    store = target_store(tmp_path / "n.h5", X, y, thirds(300), ["a", "b"])
    found = train_head(store, "sklearn.linear_model.Lasso", runs=tmp_path / "runs", params={"alpha": 0.1})
    run = Run.open(found.folder)
    assert run.metrics["validation"]["r2"] > 0.9
    assert {path.name for path in run.folder.iterdir()} >= {"head.json", "head.npz"}
    assert not list(run.folder.glob("*.skops"))
    again = head_of(run)
    fresh = make_head("sklearn.linear_model.Lasso", task=REGRESSION, alpha=0.1)
    rows = store.rows("train")
    fresh.fit(X[rows], y[rows])
    np.testing.assert_allclose(again.predict_proba(X), fresh.predict_proba(X), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("sklearn.linear_model.PoissonRegressor", "cannot be kept as plain arrays.*a linear regressor, such as"),
        ("sklearn.ensemble.RandomForestRegressor", "cannot be kept as plain arrays"),
        ("sklearn.linear_model.LogisticRegression", "is not a regressor"),
        ("sklearn.linear_model.Laso", "does not exist; did you mean 'Lasso'"),
    ],
)
def test_what_is_no_linear_regressor_is_refused(path: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make_head(path, task=REGRESSION)


def test_a_regressor_is_for_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a classifier"):
        make_head("sklearn.linear_model.Lasso")
    with pytest.raises(ConfigurationError, match=r"does not fit --task multilabel.*: use logistic, knn"):
        make_head("sklearn.linear_model.Lasso", task=TASKS["multilabel"])
    X, y = labels_of(60)
    store = target_store(tmp_path / "t.h5", X, y, thirds(60), ["a", "b", "c"])
    with pytest.raises(ConfigurationError, match="does not fit --task multilabel"):
        train_head(store, "sklearn.linear_model.Lasso", runs=tmp_path / "runs")
