"""Several labels and numbers: checks, scores, folds, heads, runs and their comparison."""

from __future__ import annotations

import hashlib
import json
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import call_pipeline, paint
from labelling import Book
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    log_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)
from sklearn.neighbors import KNeighborsRegressor
from targeted import labels_of, numbers_of, target_store, thirds

import pipeline.stages.evaluate
import pipeline.stages.predict
from features.errors import ConfigurationError, HeadError, LabelsError, RunError, SourceError
from features.pixels.decode import decode_image
from features.recipe import PixelRule
from features.store.reader import FeatureStore
from pipeline.heads.kinds import head_of, load_head, make_head
from pipeline.heads.promises import Asked
from pipeline.runs.board import leaderboard, take_run
from pipeline.runs.folder import Run, read_predictions
from pipeline.stages.evaluate import evaluate
from pipeline.stages.evaluate import summary as evaluated_text
from pipeline.stages.predict import predict
from pipeline.stages.predict import summary as predicted_text
from pipeline.stages.train_head import train_head
from pipeline.sweeps.sweep import run_sweep
from pipeline.sweeps.sweep_file import Choice, SweepFile, SweepHead
from pipeline.tasks.bootstrap import row_weights
from pipeline.tasks.folds import iterative_folds
from pipeline.tasks.multilabel import balanced_weights, best_threshold
from pipeline.tasks.table import ALL_CHOICES, TASKS, task_of

U = 255
MULTILABEL, REGRESSION = TASKS["multilabel"], TASKS["regression"]
pytestmark = pytest.mark.usefixtures("without_plots")


# ---------------------------------------------------------------------------------------------------- scores
@pytest.mark.slow
def test_scores_of_labels_are_those_of_scikit_learn() -> None:
    _, y = labels_of(200)
    values = np.random.default_rng(2).random(y.shape) * 0.6 + 0.4 * y
    scores = MULTILABEL.evaluate(values, y, ("a", "b", "c"))
    assert scores["average_precision"] == pytest.approx(average_precision_score(y, values, average="macro"))
    assert scores["micro_average_precision"] == pytest.approx(average_precision_score(y, values, average="micro"))
    assert scores["roc_auc"] == pytest.approx(roc_auc_score(y, values, average="macro"))
    assert scores["log_loss"] == pytest.approx(np.mean([log_loss(y[:, k], values[:, k]) for k in range(3)]))
    thresholds = np.array([line["threshold"] for line in scores["per_class"]])
    assert scores["f1"] == pytest.approx(f1_score(y, values >= thresholds, average="macro"))
    assert scores["exact_match"] == pytest.approx(((values >= thresholds) == y).all(axis=1).mean())
    for k, line in enumerate(scores["per_class"]):
        assert line["average_precision"] == pytest.approx(average_precision_score(y[:, k], values[:, k]))
        every = [f1_score(y[:, k], values[:, k] >= value) for value in np.unique(values[:, k])]
        assert line["f1"] == pytest.approx(max(every))
    low, high = scores["average_precision_interval"]
    assert 0.8 < low < scores["average_precision"] < high < 1


def test_the_interval_of_the_average_precision_counts_rows_as_often_as_they_are_drawn() -> None:
    from pipeline.tasks.multilabel import _sampled_precision

    _, y = labels_of(60, labels=2)
    values = np.round(np.random.default_rng(3).random(y.shape), 1)  # with equal ones
    found = _sampled_precision(values, y)
    for sample in (0, 7):
        rows = np.repeat(np.arange(60), row_weights(60)[sample].astype(int))
        assert found[sample] == pytest.approx(average_precision_score(y[rows], values[rows], average="macro"), abs=1e-5)


def test_unknown_cells_count_nowhere() -> None:
    y = np.array([[1, U], [0, 1], [U, 0], [1, 1]], np.uint8)
    values = np.array([[0.9, 0.1], [0.2, 0.7], [0.4, 0.3], [0.6, 0.8]])
    scores = MULTILABEL.evaluate(values, y, ("a", "b"))
    assert [(line["n"], line["positives"]) for line in scores["per_class"]] == [(3, 2), (3, 2)]
    assert scores["average_precision"] == scores["exact_match"] == scores["f1"] == 1
    other = values.copy()
    other[0, 1], other[2, 0] = 0.99, 0.99
    assert MULTILABEL.evaluate(other, y, ("a", "b")) == scores


def test_a_label_that_no_image_of_a_split_has_is_left_out_of_the_means() -> None:
    y = np.array([[1, 0], [0, 0], [1, 0]], np.uint8)
    scores = MULTILABEL.evaluate(np.array([[0.9, 0.1], [0.2, 0.7], [0.8, 0.2]]), y, ("a", "b"))
    assert scores["average_precision"] == 1
    assert (scores["per_class"][1]["average_precision"], scores["per_class"][1]["threshold"]) == (None, 0.5)


def test_thresholds_of_validation_are_used_for_the_test_split() -> None:
    y = np.array([[1], [0], [1], [0]], np.uint8)
    validation = MULTILABEL.evaluate(np.array([[0.3], [0.1], [0.4], [0.2]]), y, ("a",))
    assert validation["per_class"][0]["threshold"] == pytest.approx(0.25)
    assert MULTILABEL.evaluate(np.array([[0.26], [0.24], [0.1], [0.9]]), y, ("a",), validation)["exact_match"] == 0.5
    assert best_threshold(np.array([0.5, 0.5, 0.1]), np.array([True, False, False])) == pytest.approx(0.3)


def test_scores_of_numbers_are_those_of_scikit_learn() -> None:
    _, y = numbers_of(200)
    values = y + np.random.default_rng(2).normal(size=y.shape) * [0.5, 8]
    scores = REGRESSION.evaluate(values, y, ("a", "b"))
    for k, line in enumerate(scores["per_column"]):
        assert line["mae"] == pytest.approx(mean_absolute_error(y[:, k], values[:, k]))
        assert line["rmse"] == pytest.approx(root_mean_squared_error(y[:, k], values[:, k]))
        assert line["r2"] == pytest.approx(r2_score(y[:, k], values[:, k]))
        assert line["spearman"] == pytest.approx(spearmanr(y[:, k], values[:, k]).statistic)
    assert scores["r2"] == pytest.approx(r2_score(y, values))
    assert scores["mae"] == pytest.approx(mean_absolute_error(y, values))
    rows = np.repeat(np.arange(200), row_weights(200)[3].astype(int))
    from pipeline.tasks.regression import _sampled

    sampled = _sampled(values[:, 0], y[:, 0], row_weights(200))
    assert sampled["r2"][3] == pytest.approx(r2_score(y[rows, 0], values[rows, 0]), abs=1e-6)
    assert sampled["mae"][3] == pytest.approx(mean_absolute_error(y[rows, 0], values[rows, 0]), abs=1e-6)


def test_constant_validation_numbers_have_no_r2() -> None:
    y = np.array([[2.0], [2.0], [np.nan]])
    scores = REGRESSION.evaluate(np.array([[1.0], [2.0], [9.0]]), y, ("a",))
    assert (scores["r2"], scores["r2_interval"], scores["spearman"], scores["mae"]) == (None, None, None, 0.5)


# ---------------------------------------------------------------------------------------------------- checks, folds
@pytest.mark.parametrize(
    ("task", "y", "said"),
    [
        ("multilabel", [[1, 0], [0, 0]], "no training image has the label 'b'"),
        ("multilabel", [[1, 1], [0, 1]], "no training image lacks the label 'b'"),
        ("multilabel", [[1, U], [0, U]], "no training image has the label 'b'"),
        ("regression", [[1, 2], [0, 2]], "the same value of 'b'"),
        ("regression", [[1, np.nan], [0, np.nan]], "the same value of 'b'"),
    ],
)
def test_what_cannot_be_learned_is_refused(task: str, y: Any, said: str) -> None:
    values = np.array(y, np.uint8 if task == "multilabel" else np.float64)
    with pytest.raises(HeadError, match=said):
        TASKS[task].check(values, 2, ("a", "b"))


@pytest.mark.parametrize("grouped", [False, True])
def test_folds_have_each_label_alike(grouped: bool) -> None:
    holds = np.random.default_rng(0).random((400, 5)) < [0.02, 0.05, 0.2, 0.5, 0.9]
    groups = np.arange(400) // 2 if grouped else None
    folds = iterative_folds(holds, 5, 0, groups)
    counts = np.array([holds[folds == fold].sum(axis=0) for fold in range(5)])
    assert (np.bincount(folds) >= 70).all()
    assert (abs(counts - holds.sum(axis=0) / 5) <= 4).all()
    assert (counts[:, 0] >= holds[:, 0].sum() // 5 - 1).all()
    if groups is not None:
        assert (folds[::2] == folds[1::2]).all()
    assert (iterative_folds(holds, 5, 0, groups) == folds).all()
    assert (iterative_folds(holds[:1], 5, 0) == -1).all()


# ---------------------------------------------------------------------------------------------------- heads
def standardised(X: np.ndarray) -> np.ndarray:
    return (X - X.mean(axis=0)) / X.std(axis=0)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("weight", [None, "balanced"])
def test_logistic_is_one_regression_of_scikit_learn_for_each_label(wide: bool, weight: str | None) -> None:
    X, y = labels_of(60, columns=100) if wide else labels_of(200, unknown=0.1)
    head = make_head("logistic", task=MULTILABEL, C=0.3, class_weight=weight)
    head.fit(X, y)
    Z, found = standardised(X.astype(np.float64)), head.predict_proba(X)
    for k in range(3):
        known = y[:, k] != U
        alone = LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000, class_weight=weight)
        alone.fit(Z[known], y[known, k])
        np.testing.assert_allclose(found[:, k], alone.predict_proba(Z)[:, 1], atol=1e-5)
    assert (balanced_weights(y) == 0).sum() == (y == U).sum()


def test_ridge_is_that_of_scikit_learn_for_each_number() -> None:
    X, y = numbers_of(200, unknown=0.1)
    head = make_head("ridge", task=REGRESSION, alpha=3.0)
    head.fit(X, y)
    Z = standardised(X.astype(np.float64))
    for k in range(2):
        known = np.isfinite(y[:, k])
        alone = Ridge(alpha=3.0).fit(Z[known], y[known, k])
        np.testing.assert_allclose(head.predict_proba(X)[:, k], alone.predict(Z), rtol=1e-5)


@pytest.mark.parametrize("task", [MULTILABEL, REGRESSION])
def test_neighbours_are_those_of_scikit_learn(task: Any) -> None:
    X, y = labels_of(200) if task is MULTILABEL else numbers_of(200)
    head = make_head("knn", task=task, n_neighbors=7)
    head.fit(X[:150], y[:150])
    mean, std = X[:150].mean(axis=0), X[:150].std(axis=0)
    alone = KNeighborsRegressor(7).fit((X[:150] - mean) / std, y[:150].astype(float))
    np.testing.assert_allclose(head.predict_proba(X[150:]), alone.predict((X[150:] - mean) / std), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_searched_penalty_is_good() -> None:
    X, y = labels_of(200)
    head = make_head("logistic", task=MULTILABEL)
    history = head.fit(X, y)
    assert history["C"][int(np.argmin(history["score"]))] == head.chosen["C"]  # type: ignore[attr-defined]
    numbers = make_head("ridge", task=REGRESSION)
    assert len(numbers.fit(*numbers_of(200))["alpha"]) > 3


@pytest.mark.parametrize("name", ["logistic", "knn"])
def test_a_saved_head_predicts_the_same(tmp_path: Path, name: str) -> None:
    X, y = labels_of(60)
    head = make_head(name, task=MULTILABEL, classes=("a", "b", "c"))
    head.fit(X, y)
    head.save(tmp_path)
    again = load_head(tmp_path)
    assert again.task is MULTILABEL
    np.testing.assert_array_equal(again.predict_proba(X), head.predict_proba(X))


def test_heads_that_do_not_fit_a_task_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"head 'logistic' does not fit --task regression.*use ridge, knn"):
        make_head("logistic", task=REGRESSION)
    with pytest.raises(ConfigurationError, match=r"does not fit --task multilabel"):
        make_head("sklearn.svm.LinearSVC", task=MULTILABEL)
    with pytest.raises(ConfigurationError, match="pca is a parameter for classes alone"):
        make_head("logistic", task=MULTILABEL, pca=3)


# ---------------------------------------------------------------------------------------------------- runs
@pytest.fixture(params=["multilabel", "regression"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureStore:
    X, values = labels_of(unknown=0.05) if request.param == "multilabel" else numbers_of(unknown=0.05)
    names = ("a", "b", "c")[: values.shape[1]]
    return target_store(tmp_path / "f.h5", X, values, thirds(len(X)), names)


def linear(store: FeatureStore) -> str:
    return {"multilabel": "logistic", "regression": "ridge"}[task_of(store).name]


@pytest.mark.slow
def test_a_run_of_another_task(tmp_path: Path, store: FeatureStore) -> None:
    task, name = task_of(store), linear(store)
    result = train_head(store, name, runs=tmp_path / "runs", test=True)
    run = Run.open(result.folder)
    assert (run.config["format"], run.config["task"], run.metrics["format"]) == (2, task.name, 2)
    assert run.task is task
    rows = read_predictions(run)
    expected = store.images.target.values[store.rows("validation")]  # type: ignore[union-attr]
    np.testing.assert_array_equal(rows.labels, expected)
    X, _ = store.load("validation")
    np.testing.assert_allclose(head_of(run).predict_proba(X), rows.probabilities, rtol=1e-7)
    first = task.choices[0]
    assert task.evaluate(rows.probabilities, rows.labels, run.classes)[first] == pytest.approx(
        run.metrics["validation"][first]
    )
    assert run.metrics["validation"][first] > 0.8
    assert run.metrics["test"]["n"] == 60
    assert train_head(store, name, runs=tmp_path / "runs").cached
    assert take_run(tmp_path / "runs").run.run_id == run.run_id


@pytest.mark.slow
def test_a_changed_target_is_another_run(tmp_path: Path, store: FeatureStore) -> None:
    first = train_head(store, "knn", runs=tmp_path / "runs").run_id
    target = store.images.target
    assert target is not None
    values = target.values.copy()
    values[0, 0] = 1 - values[0, 0] if target.task == "multilabel" else 7
    other = target_store(tmp_path / "g.h5", store.load()[0], values, store.images.splits, target.columns)
    assert train_head(other, "knn", runs=tmp_path / "runs").run_id != first


@pytest.mark.slow
def test_heads_are_compared_by_the_score_of_their_task(tmp_path: Path, store: FeatureStore) -> None:
    heads = [SweepHead(head="knn", grid={"n_neighbors": [1, 9]}), SweepHead(head=linear(store))]
    result = run_sweep([store], SweepFile(version=1, heads=heads), runs=tmp_path / "runs", folds=3, jobs=1, test=True)
    first = task_of(store).choices[0]
    assert not result.failed
    assert [row["head"] for row in result.board if row["chosen"]] == [linear(store)]
    assert [row[f"cv_{first}"] for row in result.board] == sorted(
        (row[f"cv_{first}"] for row in result.board), reverse=True
    )
    assert [row[f"test_{first}"] is not None for row in result.board] == [True, False, False]
    board = leaderboard(tmp_path / "runs", folds=False)
    assert board[0][first] == max(row[first] for row in board)
    with pytest.raises(ConfigurationError, match=f"expected {first} or .* for runs of --task {task_of(store).name}"):
        leaderboard(tmp_path / "runs", by="balanced_accuracy")
    said = call_pipeline("leaderboard", tmp_path / "runs")
    assert {"average_precision": "mean AP", "r2": "R2"}[first] in said.stdout


@pytest.mark.slow
def test_numbers_are_compared_by_a_smaller_error(tmp_path: Path) -> None:
    X, values = numbers_of()
    store = target_store(tmp_path / "f.h5", X, values, thirds(len(X)), ("a", "b"))
    for name in ("knn", "ridge"):
        train_head(store, name, runs=tmp_path / "runs")
    for by in ("mae", "rmse", "r2"):
        board = leaderboard(tmp_path / "runs", by=by)
        assert [(row["head"], row["chosen"]) for row in board] == [("ridge", True), ("knn", False)]


def test_a_precision_is_not_promised_of_numbers(tmp_path: Path) -> None:
    X, y = numbers_of(100)
    store = target_store(tmp_path / "n.h5", X, y, thirds(100), ("a", "b"))
    said = r"--abstain-precision: does not fit --task regression.* no confidence .* fits is --set-coverage and --by"
    with pytest.raises(ConfigurationError, match=said):
        train_head(store, "knn", runs=tmp_path / "runs", asked=Asked(precision=0.9))


def test_a_run_that_was_edited_is_refused(tmp_path: Path, store: FeatureStore) -> None:
    folder = train_head(store, "knn", runs=tmp_path / "runs").folder
    for name, old, new in [
        ("config.yaml", "task: ", "task: classification #"),
        ("metrics.json", '"n": 60', '"n": -1'),
        ("head.json", '"kind": "sklearn.neighbors.KNeighborsClassifier"', '"kind": "dense"'),
        ("head.npz", '"neighbour-means"', '"linear"'),
    ]:
        path = folder / name.replace(".npz", ".json")
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises((RunError, HeadError), match=name):
            head_of(Run.open(folder))
        path.write_text(text)
    head_of(Run.open(folder))


# ---------------------------------------------------------------------------------------------------- answers
COLOURS = {"red": (250, 0, 0), "both": (200, 180, 0), "grey": (9, 9, 9)}


class Colours:
    """A model without a network: red and green of the first pixel, each as a share of 250."""

    name, batch_size, answers = "colours", 2, None

    def __init__(self, run: Run, **options: Any) -> None:
        self.classes, self.task, self.before = run.classes, run.task, run.metrics["validation"]

    def load(self, data: bytes) -> np.ndarray:
        return decode_image(data, PixelRule(4, 4)).pixels

    def __call__(self, images: Any) -> np.ndarray:
        return np.stack(images)[:, 0, 0, :2].astype(np.float64) / 250


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a run of a task on two columns, red and green, whose model are colours; and three images with a manifest."""
    for name, colour in COLOURS.items():
        paint(tmp_path / "new" / f"{name}.png", colour)
    (tmp_path / "new" / "broken.png").write_bytes(b"none")

    def made(task: str, cells: dict[str, str], header: str) -> tuple[Path, Path]:
        X, values = (labels_of if task == "multilabel" else numbers_of)(100, 2)
        store = target_store(tmp_path / f"{task}.h5", X, values, thirds(100), ("red", "green"))
        folder = train_head(store, "knn", runs=tmp_path / "runs").folder
        lines = [f"path,{header}", *(f"{name}.png,{cell}" for name, cell in cells.items())]
        (tmp_path / "new" / "m.csv").write_text("\n".join(lines) + "\n")
        monkeypatch.setattr(pipeline.stages.predict, "RunModel", Colours)
        monkeypatch.setattr(pipeline.stages.evaluate, "RunModel", Colours)
        return folder, tmp_path / "new" / "m.csv"

    return made


def test_predict_gives_labels_and_probabilities(answering: Any, tmp_path: Path) -> None:
    folder, _ = answering("multilabel", {}, "t")
    metrics = json.loads((folder / "metrics.json").read_text())
    for line, threshold in zip(metrics["validation"]["per_class"], (0.75, 0.5), strict=True):
        line["threshold"] = threshold
    (folder / "metrics.json").write_text(json.dumps(metrics))
    document = predict(folder, tmp_path / "new", out=tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text().splitlines() == [
        "file,labels,red,green,error",
        'both.png,"[""red"", ""green""]",0.8,0.72,',
        "broken.png,,,,not-an-image",
        "grey.png,[],0.036,0.036,",
        'red.png,"[""red""]",1,0,',
    ]
    assert (document["classes"], document["predicted"], document["labelled"]) == ({"red": 2, "green": 1}, 3, 0)
    assert "red         2" in predicted_text(document)
    predict(folder, tmp_path / "new", out=tmp_path / "p.jsonl")
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert first == {
        "file": "both.png",
        "labels": ["red", "green"],
        "predictions": {"red": 0.8, "green": 0.72},
        "error": None,
    }
    with pytest.raises(ConfigurationError, match=r"--top: is for runs of classes"):
        predict(folder, tmp_path / "new", out=tmp_path / "q.csv", top=1)


def test_predict_gives_numbers(answering: Any, tmp_path: Path) -> None:
    folder, _ = answering("regression", {}, "t")
    document = predict(folder, tmp_path / "new", out=tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text().splitlines()[:2] == ["file,red,green,error", "both.png,0.8,0.72,"]
    assert document["classes"] == {}
    assert "numbers of each image" in predicted_text(document)


@pytest.mark.slow
def test_evaluate_scores_labels_and_numbers_of_a_manifest(answering: Any) -> None:
    folder, manifest = answering("multilabel", {"red": "red", "both": "red;green", "grey": ";", "broken": "red"}, "t")
    document = evaluate(folder, manifest, target="t")
    assert (document["evaluated"], document["unreadable"]) == (3, {"not-an-image": 1})
    assert document["scores"]["average_precision"] == 1
    assert "mean AP" in evaluated_text(document)
    folder, manifest = answering("regression", {"red": "0,1", "both": "0.7,0.8", "grey": "0,1"}, "green,red")
    document = evaluate(folder, manifest, target="green,red")
    assert document["scores"]["per_column"][1]["mae"] == pytest.approx((0.72 - 0.7 + 0.036) / 3)
    manifest.write_text("path,green\nred.png,1\n")
    with pytest.raises(SourceError, match="lacks 'red'"):
        evaluate(folder, manifest, target="green")
    manifest.write_text("path,green,blue\nred.png,1,1\n")
    with pytest.raises(SourceError, match=r"has 'blue', which colours does not know"):
        evaluate(folder, manifest, target="green,blue")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "cells", "value"),
    [("multilabel", {"red": "red", "both": "red;green", "grey": "green"}, "green"),
     ("regression", {"red": "0,1", "both": "0.7,0.8", "grey": "0,1"}, "1;9")],
)  # fmt: skip
def test_evaluate_scores_under_a_labels_file(
    answering: Any, tmp_path: Path, task: str, cells: dict[str, str], value: str
) -> None:
    """The file decides what is true of an image, and which images are scored."""
    folder, manifest = answering(task, cells, "t" if task == "multilabel" else "green,red")
    target = "t" if task == "multilabel" else "green,red"
    digest = {name: hashlib.sha256((tmp_path / "new" / f"{name}.png").read_bytes()).hexdigest() for name in COLOURS}
    book = Book(tmp_path / "labels.csv").add(digest["red"], value, target).add(digest["grey"], "exclude")
    before, after = (
        evaluate(folder, manifest, target=target),
        evaluate(folder, manifest, target=target, labels=book.path),
    )
    assert (before["evaluated"], after["evaluated"]) == (3, 2)
    assert (after["labels"]["corrected"], after["labels"]["excluded"]) == (1, 1)
    assert "labels" not in before
    if task == "multilabel":
        chosen = Run.open(folder).metrics["validation"]["per_class"]
        holds = [value >= line["threshold"] for value, line in zip((1, 0), chosen, strict=True)]
        both = [value >= line["threshold"] for value, line in zip((0.8, 0.72), chosen, strict=True)]
        assert after["scores"]["exact_match"] == np.mean([holds == [False, True], both == [True, True]])
    else:
        assert [line["mae"] for line in after["scores"]["per_column"]] == pytest.approx([0, (9 + 0.02) / 2])
    with pytest.raises(LabelsError, match="none of its 1 decision is about one of the 3 images"):
        evaluate(folder, manifest, target=target, labels=Book(tmp_path / "other.csv").add("x", value).path)


@pytest.mark.slow
def test_numbers_have_no_class_weights_in_fine_tuning(tmp_path: Path, store: FeatureStore) -> None:
    train_head(store, linear(store), runs=tmp_path / "runs")
    done = call_pipeline("finetune", tmp_path / "runs", "--images", tmp_path, "--param", "class_weight=balanced")
    assert done.returncode in (1, 2)
    assert ("class_weight" in done.stderr and "does not fit" in done.stderr) == (task_of(store).name == "regression")


def test_a_sweep_file_knows_the_scores_of_all_tasks() -> None:
    assert typing.get_args(Choice) == ALL_CHOICES


def test_probabilities_are_sigmoids() -> None:
    np.testing.assert_allclose(MULTILABEL.activate(np.array([[0.0, 3.0]]), 2.0), expit([[0.0, 1.5]]))
