"""Networks of several labels or numbers: the bank and Keras, unknown cells, and runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from targeted import labels_of, numbers_of, target_store, thirds

from features.errors import ConfigurationError
from pipeline.heads.bank import BankHead, train_rows
from pipeline.heads.bank_math import BankSpec
from pipeline.heads.kinds import head_of, load_head, make_head
from pipeline.heads.prepared import ArrayRows, prepare
from pipeline.runs.folder import Run, read_predictions
from pipeline.sweeps.sweep import run_sweep
from pipeline.sweeps.sweep_file import SweepFile, SweepHead
from pipeline.tasks.table import TASKS
from pipeline.tasks.task import packed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]  # loads Keras
NAMES = ("a", "b", "c")


def rows(task: str, unknown: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    return labels_of(unknown=unknown) if task == "multilabel" else numbers_of(unknown=unknown)


def fitted(task: str, X: np.ndarray, y: np.ndarray, name: str = "dense", **params: Any) -> Any:
    head = make_head(name, task=TASKS[task], classes=NAMES[: y.shape[1]], **params)
    head.fit(X[:200], y[:200], X_validation=X[200:], y_validation=y[200:])
    return head


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_head_of_the_bank_is_what_it_is_alone(task: str) -> None:
    X, y = rows(task, unknown=0.1)
    grid = [
        {"learning_rate": rate, "hidden": hidden, "dropout": drop, "epochs": 4, "patience": 0}
        for hidden in ((), (8,))
        for rate in (3e-3, 1e-2)
        for drop in (0.0, 0.2)
    ]
    alone = [fitted(task, X, y, **params).predict_proba(X) for params in grid]
    for start in (0, 4):
        heads = [make_head("dense", task=TASKS[task], **params) for params in grid[start : start + 4]]
        data = prepare(X[:200], y[:200], pool="none", X_validation=X[200:], y_validation=y[200:])
        heads[0].train_together(heads, data)
        for head, expected in zip(heads, alone[start : start + 4], strict=True):
            scale = 1 if task == "multilabel" else np.nanstd(y, axis=0)
            assert abs((head.predict_proba(X) - expected) / scale).max() < 1e-4


@pytest.mark.parametrize("name", ["dense", "linear-sgd"])  # by the bank, by Keras
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_unknown_cells_have_no_part_in_training(task: str, name: str) -> None:
    X, y = rows(task, unknown=0.3)
    head = fitted(task, X, y, name, learning_rate=0.05, epochs=8)
    loss = TASKS[task].evaluate(head.predict_proba(X[200:]), y[200:], NAMES[: y.shape[1]])
    assert loss[TASKS[task].choices[0]] > 0.75


@pytest.mark.parametrize("loss", ["sigmoid", "squared"])
def test_what_stands_in_a_cell_without_weight_does_not_matter(loss: str) -> None:
    X, y = labels_of(unknown=0.3)
    targets = packed(y, None)
    other = targets.copy()
    other[:, :3][targets[:, 3:] == 0] = 0.77
    spec = BankSpec(classes=3, epochs=2, loss=loss)
    first, second = (
        train_rows(spec, [BankHead(0.01)], ArrayRows(X, labels), ArrayRows(X, labels))[0] for labels in (targets, other)
    )
    np.testing.assert_array_equal(first.weights[0], second.weights[0])
    assert first.history == second.history


def test_a_linear_network_of_numbers_comes_near_to_least_squares() -> None:
    X, y = numbers_of()
    head = fitted("regression", X, y, learning_rate=0.02, epochs=120, patience=0)
    solution, *_ = np.linalg.lstsq(np.c_[X[:200], np.ones(200)], y[:200], rcond=None)
    expected = np.c_[X, np.ones(300)] @ solution
    assert (abs(head.predict_proba(X) - expected).max(axis=0) < 0.15 * y.std(axis=0)).all()


def test_positive_weights_raise_the_probability_of_rare_labels() -> None:
    X, y = labels_of()
    y[np.random.default_rng(0).random(len(y)) < 0.8, 0] = 0
    plain, weighted = (
        fitted("multilabel", X, y, epochs=20, learning_rate=0.02, class_weight=w) for w in (None, "balanced")
    )
    assert weighted.predict_proba(X)[:, 0].mean() > plain.predict_proba(X)[:, 0].mean() + 0.1


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_runs_of_networks(tmp_path: Path, task: str) -> None:
    X, y = rows(task)
    store = target_store(tmp_path / "f.h5", X, y, thirds(len(X)), NAMES[: y.shape[1]])
    dense = SweepHead(head="dense", grid={"learning_rate": [0.01, 0.03], "epochs": [15]})
    heads = [dense, SweepHead(head="mlp-256-sgd", grid={"epochs": [4], "learning_rate": [0.05]})]
    result = run_sweep([store], SweepFile(version=1, heads=heads), runs=tmp_path / "runs", folds=2, jobs=1)
    assert not result.failed
    assert len(result.runs) == 3
    for run_id in result.runs:
        run = Run.open(tmp_path / "runs" / run_id)
        found = read_predictions(run).probabilities
        assert abs(head_of(run).predict_proba(store.load("validation")[0]) / found - 1).max() < 1e-3
        assert run.metrics["validation"][run.task.choices[0]] > 0.3
        assert run.metrics["cv"]["folds"] == 2
    again = load_head(tmp_path / "runs" / result.runs[0])
    assert again.task is TASKS[task]
    logits = np.asarray(again.network(X))
    np.testing.assert_allclose(again.task.activate(logits), again.predict_proba(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("task", "name"), [("multilabel", "calibrate"), ("regression", "label_smoothing")])
def test_parameters_that_mean_nothing_are_refused(task: str, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} does not fit --task {task}"):
        make_head("dense", task=TASKS[task], **{name: 0.1})
