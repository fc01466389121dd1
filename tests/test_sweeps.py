"""Sweeps: what a file comes to, runs trained once, failures that stay alone, one chosen head, one look at the test split."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, call_pipeline, extract, leave, listing, paint_folder, recipe
from test_train_head import Store, make_store

from features.errors import ConfigurationError, HeadError, RunError
from features.temporary import temporary_path
from pipeline.cli import main
from pipeline.heads.classifiers import SklearnHead
from pipeline.heads.costs import announcement, parse_memory, shown
from pipeline.heads.fitting import cross_validate, fit_companions, fit_one
from pipeline.heads.kinds import head_of, make_head
from pipeline.heads.prepared import ArrayRows, Prepared, prepare
from pipeline.runs.board import leaderboard
from pipeline.runs.folder import Run
from pipeline.runs.tensorboard import log_run
from pipeline.runs.writing import add_plots
from pipeline.stages.train_head import train_head
from pipeline.sweeps.sweep import run_sweep
from pipeline.sweeps.sweep_file import SweepFile, Trial, expand, read_sweep, single
from pipeline.sweeps.workers import Lost, in_parallel

CS = [0.001, 0.1, 10.0]
FAST = {"epochs": [3], "learning_rate": [0.01, 0.03]}


def sweep(*heads: dict[str, Any], **more: Any) -> SweepFile:
    return SweepFile.model_validate({"version": 1, "heads": list(heads), **more})


def logistic(**more: Any) -> SweepFile:
    return sweep({"head": "logistic", "grid": {"C": CS}}, **more)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---------------------------------------------------------------------------------------------- the file
def test_a_sweep_file_comes_to_its_combinations(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sweep.yaml",
        "version: 1\nseed: 7\nheads:\n"
        "- {head: dense, grid: {dropout: [0, 0.5], pool: [avg]}, log: {learning_rate: [1e-4, 1e-2, 3]}}\n"
        "- {head: knn, grid: {n_neighbors: [3], seed: [1, 2]}}\n- {head: logistic}\n",
    )
    trials = expand(read_sweep(path))
    assert len(trials) == 6 + 2 + 1
    rates = [0.0001, 0.001, 0.01]
    assert [trial.params["learning_rate"] for trial in trials[:6]] == rates * 2
    assert trials[0] == Trial("dense", {"dropout": 0, "learning_rate": 0.0001, "order_seed": 7}, "avg", 7)
    assert [trial.seed for trial in trials[6:]] == [1, 2, 7]
    assert str(trials[6]) == "knn n_neighbors=3"


def test_random_search_draws_some_combinations_once() -> None:
    entry = {"head": "dense", "log": {"learning_rate": [1e-5, 1, 40], "weight_decay": [1e-5, 1, 40]}, "random": 30}
    trials = expand(sweep(entry))
    assert len({str(trial) for trial in trials}) == len(trials) == 30
    assert trials == expand(sweep(entry))
    assert trials != expand(sweep(entry, seed=1))
    assert len(expand(sweep({**entry, "random": 5000}))) == 1600


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nheads: [{head: logistics}]", "heads.0: head: received 'logistics'.*did you mean 'logistic'"),
        ("version: 1\nheads: [{head: knn, grid: {neighbors: [1]}}]", "'neighbors'; did you mean 'n_neighbors'"),
        ("version: 1\nheads: [{head: knn, grid: {n_neighbors: [0]}}]", "n_neighbors: received 0"),
        ("version: 1\nheads: [{head: knn, gird: {}}]", "unknown key 'heads.0.gird'; did you mean 'grid'"),
        ("version: 2\nheads: [{head: knn}]", "version: received 2, expected 1"),
        ("heads: [{head: knn}]", "the key 'version' is missing"),
        ("version: 1\nheads: []", "heads: received"),
        (
            "version: 1\nheads: [{head: knn, grid: {n_neighbors: 3}}]",
            r"heads.0.grid: received 3, expected a valid list",
        ),
        ("version: 1\nheads: [{head: dense, log: {learning_rate: [0, 1, 3]}}]", "received 0, expected greater than 0"),
        (
            "version: 1\nheads: [{head: dense, grid: {l2: [1]}, log: {l2: [1, 2, 2]}}]",
            "l2 is given in both grid and log",
        ),
        ("version: 1\nheads: [{head: dense, log: {l2: [1, 2, 9999], mixup: [1, 2, 9999]}}]", "more than 100,000 heads"),
        ("version: 1\nheads: [{head: dense, log: {l2: [1, 2, 1000000000]}}]", "log.2: received 1000000000"),
        (
            "version: 1\nheads: [{head: dense, random: 1, log: {l2: &n [1, 2, 100000], mixup: *n, momentum: *n, alpha: *n}}]",
            r"1e\+20 combinations are too many to draw from",
        ),
        ("version: 1\nheads: [{head: knn, grid: {pool: [avgs]}}]", "pool: received 'avgs'"),
        ("version: 1\nheads: [{head: knn, grid: {seed: [-1]}}]", "seed: received -1"),
        ("version: 1\nheads: [{head: dense, grid: {dropout: [[0.1, 0.2]]}}]", "received 2 rates, expected 1"),
        ("version: 1\nversion: 1\nheads: [{head: knn}]", "'version' is given twice"),
        ("version: 1\nheads: [{head: !!python/object/apply:os.system [true]}]", "not valid YAML"),
    ],
)
def test_a_wrong_sweep_file_is_refused_and_the_place_named(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "sweep.yaml", text)
    with pytest.raises(ConfigurationError, match=r"(?s)sweep\.yaml: .*" + message):
        expand(read_sweep(path), str(path))


# ---------------------------------------------------------------------------------------------- sweeping
@pytest.mark.slow
@pytest.mark.pain(12)
def test_pain_12_many_heads_on_one_store_and_no_output_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new head needs no extraction and touches no run that is there."""
    store = make_store()
    first = run_sweep([store], logistic(), runs=tmp_path, jobs=1)
    assert (first.trained, first.cached, first.failed) == (3, 0, [])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    more = run_sweep(
        [store], sweep({"head": "logistic", "grid": {"C": [*CS, 1.0]}}, {"head": "ridge"}), runs=tmp_path, jobs=1
    )
    assert (more.trained, more.cached) == (2, 3)
    assert len(set(more.runs)) == 5
    assert set(first.runs) < set(more.runs)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained or read again")

    monkeypatch.setattr(SklearnHead, "_train", refuse)
    monkeypatch.setattr(Store, "load", refuse)
    again = run_sweep([store], logistic(), runs=tmp_path, jobs=1)
    assert (again.trained, again.cached, again.runs) == (0, 3, first.runs)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_run_of_a_sweep_is_the_run_of_the_head_alone(tmp_path: Path) -> None:
    store = make_store(shift=0.7)
    result = run_sweep([store], sweep({"head": "ridge", "grid": {"alpha": [3.0]}}), runs=tmp_path / "a", jobs=1)
    alone = train_head(store, "ridge", runs=tmp_path / "b", params={"alpha": 3.0})
    assert result.runs == [alone.run_id]
    run = Run.open(tmp_path / "a" / alone.run_id)
    assert run.metrics == alone.metrics
    assert run.config == Run.open(alone.folder).config
    assert listing(run.folder) == listing(alone.folder)  # the plots of the best few are there too


@pytest.mark.slow
def test_only_the_best_few_are_plotted_and_the_others_can_be(tmp_path: Path) -> None:
    values = [float(value) for value in np.geomspace(1e-4, 1e3, 8)]
    result = run_sweep([make_store()], sweep({"head": "logistic", "grid": {"C": values}}), runs=tmp_path, jobs=1)
    plotted = {run_id for run_id in result.runs if (tmp_path / run_id / "plots").is_dir()}
    assert plotted == {row["run_id"] for row in result.board[:5]}
    run = Run.open(tmp_path / result.board[-1]["run_id"])
    add_plots(run)
    add_plots(run)
    assert listing(run.folder / "plots") == ["confusion.png"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    store = make_store()
    heads = sweep({"head": "logistic", "grid": {"C": CS}}, {"head": "knn", "grid": {"n_neighbors": [1, 3]}})
    one = run_sweep([store], heads, runs=tmp_path / "one", jobs=1, folds=3)
    two = run_sweep([store], heads, runs=tmp_path / "two", jobs=2, folds=3)
    assert one.runs == two.runs
    for run_id in one.runs:
        assert Run.open(tmp_path / "one" / run_id).metrics == Run.open(tmp_path / "two" / run_id).metrics


@pytest.mark.slow
def test_a_failing_head_is_reported_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heads = sweep({"head": "knn", "grid": {"n_neighbors": [3, 1000, 5]}}, {"head": "lda", "grid": {"pca": [99]}})
    with caplog.at_level(logging.WARNING):
        result = run_sweep([make_store()], heads, runs=tmp_path, jobs=1)
    assert (result.trained, len(result.runs), len(result.board)) == (2, 2, 2)
    assert [item["head"] for item in result.failed] == ["knn n_neighbors=1000 on last.avg", "lda pca=99 on last.avg"]
    assert "n_neighbors: received 1000, expected at most 84" in result.failed[0]["reason"]
    assert "expected at most 4 for features of shape (84, 4)" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_heads_without_probabilities_are_trained_in_processes_as_in_one(tmp_path: Path) -> None:
    """A classifier that only gives margins has come back from another process, where it was a copy."""
    names = ("sklearn.linear_model.Perceptron", "sklearn.svm.LinearSVC", "sklearn.linear_model.RidgeClassifier")
    heads = sweep(*({"head": name} for name in names))
    one, two = (run_sweep([make_store()], heads, runs=tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2))
    assert (one.failed, two.failed, two.trained) == ([], [], 3)
    for run_id in one.runs:
        assert Run.open(tmp_path / "1" / run_id).metrics == Run.open(tmp_path / "2" / run_id).metrics


class OddError(Exception):
    """An error of a type that no library has told us of."""


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("problem", [OddError("odd"), MemoryError(), AttributeError("no predict_proba"), OSError("io")])
@pytest.mark.parametrize("place", ["_train", "_probabilities", "_save_weights"])
def test_whatever_one_head_raises_the_others_go_on(
    place: str, problem: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = getattr(SklearnHead, place)

    def fails(head: Any, *args: Any) -> Any:
        if head.parameters.n_neighbors == 3:
            raise problem
        return plain(head, *args)

    monkeypatch.setattr(SklearnHead, place, fails)
    heads = sweep({"head": "knn", "grid": {"n_neighbors": [1, 3, 5]}})
    if isinstance(problem, OSError) and place == "_save_weights":  # no head could be written
        with pytest.raises(RunError, match=r"could not be written \(io\)"):
            run_sweep([make_store()], heads, runs=tmp_path, jobs=1)
        return
    result = run_sweep([make_store()], heads, runs=tmp_path, jobs=1)
    assert (result.trained, len(result.runs), len(result.board)) == (2, 2, 2)
    assert [item["head"] for item in result.failed] == ["knn n_neighbors=3 on last.avg"]
    assert type(problem).__name__ in result.failed[0]["reason"]
    assert listing(tmp_path) == sorted(name for name in listing(tmp_path) if name.startswith("knn"))


@pytest.mark.slow
def test_whatever_a_single_head_raises_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(head: Any, Z: np.ndarray) -> np.ndarray:
        raise OddError("odd")

    monkeypatch.setattr(SklearnHead, "_probabilities", fails)
    with pytest.raises(HeadError, match="head 'knn': OddError: odd"):
        train_head(make_store(), "knn", runs=tmp_path)
    assert listing(tmp_path) == []


@pytest.mark.usefixtures("without_plots")
def test_predictions_that_are_no_numbers_fail_their_head_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SklearnHead._probabilities
    monkeypatch.setattr(
        SklearnHead,
        "_probabilities",
        lambda head, Z: plain(head, Z) * (np.nan if head.parameters.n_neighbors == 3 else 1),
    )
    heads = sweep({"head": "knn", "grid": {"n_neighbors": [1, 3]}})
    result = run_sweep([make_store()], heads, runs=tmp_path, jobs=1)
    assert (result.trained, [item["reason"] for item in result.failed]) == (
        1,
        ["probabilities: 24 of 24 rows are not finite; expected numbers from 0 to 1"],
    )


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_no_other_head_with_it() -> None:
    """Of twelve calls one kills its process, one gives what cannot be sent, and one ends the interpreter."""
    parent = os.getpid()

    def call(number: int) -> Any:
        assert os.getpid() != parent
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 9:
            os._exit(0)
        return (item for item in ()) if number == 6 else number**2

    found = dict(in_parallel(call, [(number,) for number in range(12)], 2))
    lost = {number: found.pop(number) for number in (3, 6, 9)}
    assert found == {number: number**2 for number in range(12) if number not in lost}
    assert all(isinstance(value, Lost) for value in lost.values())
    assert "its process was killed each time" in lost[3].reason
    assert "cannot be sent between processes" in lost[6].reason
    assert "--n-jobs 1" in lost[6].reason
    assert "was killed" in lost[9].reason


def test_one_head_of_a_bank_that_fails_is_found_and_the_others_are_trained() -> None:
    class Stub:
        def __init__(self, number: int) -> None:
            self.number, self.seed, self.name = number, 0, "stub"

        def warm_up(self) -> None: ...

        @classmethod
        def train_together(cls, heads: list[Stub], data: Any) -> list[dict[str, list[float]]]:
            if len(heads) > 6:
                raise MemoryError
            if any(head.number == 5 for head in heads):
                raise OddError("the fifth")
            return [{"epoch": [1.0]} for _ in heads]

        def predict_rows(self, rows: Any) -> np.ndarray:
            return np.full((1, 2), self.number)

    prepared: Any = SimpleNamespace(held_out=[], streamed=False)
    outcomes = fit_companions([Stub(number) for number in range(10)], prepared, 0)  # type: ignore[list-item,misc]
    assert outcomes[5] == "OddError: the fifth"
    found = [one.probabilities[0, 0] for one in outcomes if not isinstance(one, str)]
    assert found == [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.slow
def test_rows_that_cannot_be_trained_on_fail_every_head_once_each(tmp_path: Path) -> None:
    store = make_store()
    store.arrays["last.avg"][store.rows("validation")[:2]] = np.nan
    result = run_sweep([store], logistic(), runs=tmp_path, jobs=1)
    assert (result.trained, result.runs, result.board) == (0, [], [])
    assert {item["reason"] for item in result.failed} == {
        "features: 2 of 24 rows hold values that are not finite; extract them again"
    }
    assert listing(tmp_path) == []
    store.images.splits[store.images.splits == 1] = 0
    with pytest.raises(HeadError, match="no validation rows"):
        run_sweep([store], logistic(), runs=tmp_path, jobs=1)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        assert (stage, total) == ("heads", 3)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep([make_store()], logistic(), runs=tmp_path, jobs=1, progress=stop)
    assert len(leaderboard(tmp_path)) == 2
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert run_sweep([make_store()], logistic(), runs=tmp_path, jobs=1).trained == 1


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_every_data_set_of_every_store(tmp_path: Path) -> None:
    store = make_store()
    store.arrays["block"] = np.repeat(store.arrays["last.avg"][:, None, None], 2, axis=1)
    store.recipes["block"] = recipe("block", "none")
    other = dataclasses.replace(make_store(shift=3.0), data_digest="e" * 64)
    heads = sweep({"head": "logistic", "grid": {"C": [0.1], "pool": ["avg", "flatten"]}})
    result = run_sweep([store, other], heads, runs=tmp_path, jobs=1)
    pools = [Run.open(tmp_path / run_id).config["head"]["pool"] for run_id in result.runs]
    assert sorted(pools) == ["avg", "flatten", "none", "none"]  # vectors need no pooling: one run, not two
    assert sum(row["chosen"] for row in result.board) == 1
    assert {row["comparable"] for row in result.board} == {True, False}
    with pytest.raises(ConfigurationError, match=r"no feature set 'blok'.*'block'"):
        run_sweep([store], heads, runs=tmp_path, names=["blok"], jobs=1)


# ---------------------------------------------------------------------------------------------- judging
@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_folds_judge_by_rows_that_were_held_out(tmp_path: Path) -> None:
    """A head that only remembers is perfect on its own rows, and is not on held-out ones."""
    store = make_store(shift=0.4)
    heads = sweep({"head": "knn", "grid": {"n_neighbors": [1, 15]}}, {"head": "logistic"})
    result = run_sweep([store], heads, runs=tmp_path, jobs=1, folds=5)
    for run_id in result.runs:
        held_out = Run.open(tmp_path / run_id).metrics["cv"]
        assert (held_out["folds"], held_out["n"]) == (5, 84)
        assert 0.3 < held_out["accuracy"] < 0.9
    accuracies = [row["cv_accuracy"] for row in result.board]
    assert accuracies == sorted(accuracies, reverse=True)
    assert run_sweep([store], heads, runs=tmp_path, jobs=1, folds=5).trained == 0
    assert run_sweep([store], heads, runs=tmp_path, jobs=1).trained == 0
    assert run_sweep([store], heads, runs=tmp_path, jobs=1, folds=3).trained == 3  # other folds are other scores


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logistic", "ridge", "knn", "sklearn.naive_bayes.GaussianNB"])
def test_what_a_fit_holds_out_anyway_is_the_cross_validation(name: str) -> None:
    store = make_store(shift=0.7)
    X, y = store.load("train", "last.avg")
    V, labels = store.load("validation", "last.avg")
    params = {"logistic": {"C": 0.1}, "ridge": {"alpha": 3.0}, "knn": {"n_neighbors": 5}}.get(name, {})
    head = make_head(name, classes=store.classes, **params)
    prepared = prepare(X, y, pool="none", X_validation=V, y_validation=labels)
    again = cross_validate(head.fresh(), prepared, 5)
    fitted = fit_one(head, prepared, 5)
    assert not isinstance(fitted, str)
    assert fitted.out_of_fold is not None
    assert (fitted.out_of_fold.argmax(axis=1) == again.argmax(axis=1)).all()


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_few_validation_images_are_not_asked_which_head_is_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, heads = make_store(shift=0.4), sweep({"head": "knn", "grid": {"n_neighbors": [1, 15]}})
    with_folds = run_sweep([store], heads, runs=tmp_path / "a", jobs=1, folds=5)
    usual = run_sweep([store], heads, runs=tmp_path / "b", jobs=1, folds=None)
    assert "only 24 validation images, so heads are compared by 5 folds" in caplog.text
    chosen = [[(row["run_id"], row["chosen"], row["cv_accuracy"]) for row in one.board] for one in (with_folds, usual)]
    assert chosen[0] == chosen[1]
    assert run_sweep([store], heads, runs=tmp_path / "b", jobs=1, folds=None).trained == 0
    caplog.clear()
    for options in ({"folds": 0}, {}):
        by_validation = run_sweep([store], heads, runs=tmp_path / "c", jobs=1, **options)
        assert {row["cv_accuracy"] for row in by_validation.board} == {None}
    # what is there stays as it is, one head has nothing to be compared with, and 30 images are enough
    assert run_sweep([store], heads, runs=tmp_path / "c", jobs=1, folds=None).trained == 0
    assert (
        run_sweep([store], single("knn", {}), runs=tmp_path / "d", jobs=1, folds=None).board[0]["cv_accuracy"] is None
    )
    monkeypatch.setattr("pipeline.sweeps.sweep.FEW", 24)
    assert run_sweep([store], heads, runs=tmp_path / "e", jobs=1, folds=None).board[0]["cv_accuracy"] is None
    store.images.groups = ("all",) * len(store.images.labels)  # type: ignore[attr-defined]
    monkeypatch.setattr("pipeline.sweeps.sweep.FEW", 30)
    assert run_sweep([store], heads, runs=tmp_path / "f", jobs=1, folds=None).board[0]["cv_accuracy"] is None
    assert "validation images" not in caplog.text


@pytest.mark.slow
def test_groups_stay_together_in_the_folds_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six copies of each animal: with its siblings among the neighbours, an animal is always recognised."""
    store = make_store(rows=120, shift=0.0)
    animals = np.arange(120) // 6
    store.arrays["last.avg"] = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)[animals]
    store.arrays["last.avg"] += 1e-3 * np.random.default_rng(1).normal(size=(120, 4)).astype(np.float32)
    store.images.splits[:] = 0
    store.images.splits[:3] = store.images.splits[-3:] = 1
    heads = sweep({"head": "knn", "grid": {"n_neighbors": [1]}})
    seen = run_sweep([store], heads, runs=tmp_path / "a", jobs=1, folds=5).board[0]["cv_accuracy"]
    store.images.groups = tuple(f"animal {k}" for k in animals)  # type: ignore[attr-defined]
    kept = run_sweep([store], heads, runs=tmp_path / "b", jobs=1, folds=5).board[0]["cv_accuracy"]
    assert seen == 1
    assert kept < 0.8


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_the_test_split_is_touched_once_for_the_chosen_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(shift=0.7)
    result = run_sweep([store], logistic(), runs=tmp_path, jobs=1, test=True)
    (chosen,) = [row for row in result.board if row["chosen"]]
    looked = [row["run_id"] for row in leaderboard(tmp_path) if row["test_accuracy"] is not None]
    assert looked == [chosen["run_id"]]
    assert chosen["test_accuracy"] == Run.open(tmp_path / looked[0]).metrics["test"]["accuracy"]
    run_sweep([store], logistic(), runs=tmp_path, jobs=1, test=True)
    assert "already used" not in caplog.text
    knn = sweep({"head": "knn", "grid": {"n_neighbors": [3]}})
    run_sweep([store], knn, runs=tmp_path, jobs=1, test=True)
    assert f"the test split was already used for {chosen['run_id']}" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_choosing_by_balanced_accuracy(tmp_path: Path) -> None:
    store = make_store(rows=200, shift=0.5)
    store.images.splits[(store.images.labels == 1) & (np.arange(200) % 8 > 0)] = 3
    heads = sweep({"head": "logistic", "grid": {"C": [1e-6, 0.1], "class_weight": [None, "balanced"]}})
    result = run_sweep([store], heads.model_copy(update={"choose": "balanced_accuracy"}), runs=tmp_path, jobs=1)
    recalls = [row["balanced_accuracy"] for row in result.board]
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] > result.board[-1]["balanced_accuracy"] == 0.5  # always the larger class
    assert [row["run_id"] for row in leaderboard(tmp_path, by="balanced_accuracy")] == [
        row["run_id"] for row in result.board
    ]
    with pytest.raises(ConfigurationError, match="did you mean 'balanced_accuracy'"):
        leaderboard(tmp_path, by="balanced")


@pytest.mark.pain(15)
@pytest.mark.slow
def test_pain_15_class_names_are_in_every_artefact(tmp_path: Path) -> None:
    result = run_sweep([make_store(classes=("Katze", "Hund ü", "1e5"))], logistic(), runs=tmp_path, jobs=1)
    folder = tmp_path / result.runs[0]
    run = Run.open(folder)
    assert run.classes == head_of(run).classes == ("Katze", "Hund ü", "1e5")
    assert (folder / "predictions.csv").read_text().splitlines()[0].endswith(",Katze,Hund ü,1e5")
    assert json.loads((folder / "head.json").read_text())["classes"] == ["Katze", "Hund ü", "1e5"]


# ---------------------------------------------------------------------------------------------- memory
def test_memory_is_read_as_people_write_it() -> None:
    assert [parse_memory(text) for text in ("2GB", "500 mb", "1.5GiB", "800")] == [2 * 10**9, 5 * 10**8, 3 << 29, 800]
    for text in ("lots", "-1GB", "0", "2 XB", ""):
        with pytest.raises(ConfigurationError, match="--memory: received"):
            parse_memory(text)


def test_a_solver_that_needs_too_much_is_refused_with_the_figure(tmp_path: Path) -> None:
    """newton-cholesky builds a Hessian over all coefficients: 25,089 squared, twice, in float64."""
    store = make_store(rows=40, columns=25_088)
    path = "sklearn.linear_model.LogisticRegression"
    head = make_head(path, solver="newton-cholesky", classes=("a", "b"))
    assert head.fit_bytes(28, 25_088) >= 2 * 8 * 25_089**2
    assert shown(head.fit_bytes(28, 25_088)) == "10.1 GB"
    heads = single(path, {"solver": "newton-cholesky"})
    result = run_sweep([store], heads, runs=tmp_path, jobs=1, memory=parse_memory("2GB"))
    assert (
        "needs about 10.1 GB of memory for 28 x 25088 features, but only 2.0 GB are allowed"
        in result.failed[0]["reason"]
    )
    with pytest.raises(HeadError, match=r"needs about 10\.1 GB .*--memory"):
        train_head(store, path, runs=tmp_path, params={"solver": "newton-cholesky"}, memory=parse_memory("2GB"))


@pytest.mark.slow
def test_workers_are_as_many_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    def recorded(function: Any, calls: Any, jobs: int) -> Any:
        turns.append((jobs, [call[0].name for call in calls]))
        return in_parallel(function, calls, 1)

    monkeypatch.setattr("pipeline.sweeps.sweep.in_parallel", recorded)
    needs = {"knn": 1000, "ridge": 4000, "lda": 20000}
    monkeypatch.setattr(SklearnHead, "fit_bytes", lambda head, *_: needs[head.name])
    heads = sweep(*({"head": name} for name in needs))
    result = run_sweep([make_store()], heads, runs=tmp_path, jobs=4, memory=10_000)
    assert turns == [(4, ["knn"]), (2, ["ridge"])]
    assert [item["head"] for item in result.failed] == ["lda on last.avg"]


# Processor seconds of one fit, its search included, measured on one core: 500 standardised rows of 1,280 columns.
MEASURED = {"logistic": 0.8, "ridge": 0.5, "linear-svm": 0.9, "lda": 27.4, "knn": 0.3}


@pytest.mark.parametrize("name", MEASURED)
def test_estimates_of_time_are_near_what_was_measured(name: str) -> None:
    head = make_head(name, classes=[str(k) for k in range(10)])
    assert MEASURED[name] / 4 <= head.fit_seconds(500, 1280) <= MEASURED[name] * 4


def test_a_head_that_takes_long_is_announced_with_what_is_cheaper() -> None:
    six = [str(k) for k in range(6)]
    said = announcement(make_head("sgd", classes=six), 4000, 1280)
    assert said.startswith("sgd takes about 3 minutes on one core for 4,000 x 1,280 features and 6 classes; cheaper: ")
    assert "alpha=0.01 takes about 40 s" in said
    assert "pca=128 takes about 20 s" in said
    assert "lda takes about 70 s" in announcement(make_head("lda", classes=six), 4000, 1792)
    assert announcement(make_head("sgd", classes=six, alpha=0.01), 4000, 1280) == ""
    assert ", with 5 folds; cheaper: pca=128 takes" in announcement(
        make_head("sgd", classes=six, alpha=0.01), 4000, 1280, folds=5
    )
    assert announcement(make_head("logistic", classes=six), 4000, 1280) == ""
    boosted = make_head("sklearn.ensemble.HistGradientBoostingClassifier", classes=six, max_iter=50)
    assert "takes about 3 minutes" in announcement(boosted, 4000, 1280)
    deep = announcement(make_head("mlp-1024-1024", classes=six), 4000, 25_088)
    assert "mlp-1024-1024 takes about" in deep
    assert "epochs=10 takes about" in deep


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_long_heads_are_announced_before_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.heads.costs.LONG", 1e-9)
    plain, said = SklearnHead._train, []

    def train(head: Any, *args: Any) -> Any:
        said.append([record.getMessage() for record in caplog.records])
        return plain(head, *args)

    monkeypatch.setattr(SklearnHead, "_train", train)
    train_head(make_store(), "knn", runs=tmp_path / "a")
    assert len(said) == 1
    assert said[0][0].startswith(
        "knn takes about 1 s on one core for 84 x 4 features and 2 classes; cheaper: n_neighbors="
    )
    caplog.clear()
    heads = sweep({"head": "knn", "grid": {"n_neighbors": [1, 3]}}, {"head": "logistic"})
    run_sweep([make_store()], heads, runs=tmp_path / "b", jobs=1)
    assert sorted(text.split()[0] for text in said[1] if "on one core" in text) == ["knn", "logistic"]
    assert len(said) == 4


def values(prepared: Prepared) -> np.ndarray:
    assert isinstance(prepared.train, ArrayRows)
    return prepared.train.values


def test_prepared_rows_in_files_are_those_in_memory(tmp_path: Path) -> None:
    X = np.random.default_rng(0).normal(size=(50, 2, 2, 3)).astype(np.float16)
    y = np.arange(50, dtype=np.int32) % 2
    plain = prepare(X, y, pool="avg", X_validation=X[:9], y_validation=y[:9], groups=["a"] * 20 + [""] * 30)
    filed = prepare(X, y, pool="avg", X_validation=X[:9], y_validation=y[:9], groups=plain.groups, folder=tmp_path)
    assert listing(tmp_path) == ["train.npy", "validation.npy"]
    assert plain.held_out is not None
    assert filed.held_out is not None
    assert (values(filed) == values(plain)).all()
    assert [(Z == V).all() for (_, Z), (_, V) in zip(filed.held_out.pieces(), plain.held_out.pieces(), strict=True)]
    assert values(plain).mean(axis=0) == pytest.approx(np.zeros((1, 3)), abs=1e-6)
    assert not values(filed).flags.writeable
    make, (fields,) = filed.__reduce__()
    assert fields["train"].shape == (50,)  # what goes to a worker has labels in it, but no rows
    assert (values(make(fields)) == values(plain)).all()


def test_some_rows_of_an_array() -> None:
    array = np.arange(12, dtype=np.float32).reshape(6, 2)
    part = ArrayRows(array, np.arange(6)).take(np.array([0, 2, 5]))
    assert (len(part), part.width, part.views, part.labels.tolist()) == (3, 2, 1, [0, 2, 5])
    assert part.flat.tolist() == [[0, 1], [4, 5], [10, 11]]
    assert [Z.tolist() for _, Z in part.pieces(2)] == [[[0, 1], [4, 5]], [[10, 11]]]
    again = part.take(np.array([False, True, True]))
    assert [piece for piece, _ in again.pieces()] == [slice(0, 2)]
    assert sorted(y for _, labels in again.epoch(0, size=1, seed=0) for y in labels) == [2, 5]


# -------------------------------------------------------------------------------------------------- Keras
@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_dense_heads_of_a_sweep_are_trained_together_and_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.heads import dense
    from pipeline.heads.bank import train_rows

    banks = []

    def recorded(spec: Any, heads: Any, *args: Any, **keywords: Any) -> Any:
        banks.append((spec.hidden, spec.class_weights is not None, len(heads)))
        return train_rows(spec, heads, *args, **keywords)

    monkeypatch.setattr(dense, "train_rows", recorded)
    store = make_store(classes=("cat", "dog", "eel"), shift=0.7)
    heads = sweep(
        {"head": "dense", "grid": {**FAST, "dropout": [0, 0.3], "label_smoothing": [0, 0.1]}},
        {"head": "dense", "grid": {**FAST, "hidden": [[4]]}},
        {"head": "dense", "grid": {**FAST, "class_weight": ["balanced"]}},
        {"head": "linear-sgd", "grid": {"epochs": [2]}},
    )
    result = run_sweep([store], heads, runs=tmp_path / "a", jobs=1)
    assert banks == [(0, False, 8), (4, False, 2), (0, True, 2)]
    assert (result.trained, len(result.runs)) == (13, 13)
    X, _ = store.load("validation", "last.avg")
    for trial in [expand(heads)[k] for k in (0, 5, 8, 11)]:
        alone = train_head(store, trial.name, runs=tmp_path / "b", params=trial.params)
        assert alone.run_id in result.runs
        both = [head_of(Run.open(tmp_path / part / alone.run_id)).predict_proba(X) for part in ("a", "b")]
        assert both[0] == pytest.approx(both[1], abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_folds_and_failures_in_a_bank(tmp_path: Path) -> None:
    store = make_store(classes=("cat", "dog", "eel"), shift=0.7)
    heads = sweep({"head": "dense", "grid": {"epochs": [20], "learning_rate": [0.03, 1e37], "seed": [0, 1]}})
    result = run_sweep([store], heads, runs=tmp_path, jobs=1, folds=4)
    assert [row["cv_accuracy"] > 0.5 for row in result.board] == [True, True]
    assert len(result.failed) == 2
    assert "training diverged in epoch 1: lower learning_rate" in result.failed[0]["reason"]
    assert {Run.open(tmp_path / run_id).metrics["cv"]["n"] for run_id in result.runs} == {84}


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_one_failing_store_takes_no_run_of_another(tmp_path: Path) -> None:
    """The same head on data sets of one name: of a store that it cannot be trained on, and of one that it can."""
    good, few = make_store(), make_store()
    few.images.splits[np.flatnonzero(few.images.splits == 0)[4:]] = 3
    few.data_digest = "e" * 64
    result = run_sweep([few, good], sweep({"head": "knn", "grid": {"n_neighbors": [5]}}), runs=tmp_path, jobs=1)
    assert (result.trained, len(result.runs), len(result.board), len(result.failed)) == (1, 1, 1, 1)


def test_folds_that_cannot_be_dealt_are_refused(tmp_path: Path) -> None:
    store = make_store()
    store.images.groups = ("all",) * len(store.images.labels)  # type: ignore[attr-defined]
    with pytest.raises(HeadError, match=r"--folds: .*in different groups, if there are groups"):
        run_sweep([store], logistic(), runs=tmp_path, folds=3)


def test_a_choice_that_there_is_not_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="choose: received 'acc', expected one of accuracy"):
        run_sweep([make_store()], logistic().model_copy(update={"choose": "acc"}), runs=tmp_path)
    assert not listing(tmp_path)


@pytest.mark.slow
def test_a_head_is_refused_before_rows_are_read_to_warn_of_duplicates(tmp_path: Path) -> None:
    store, called = make_store(), []
    knn = sweep({"head": "knn", "grid": {"n_neighbors": [3]}})
    result = run_sweep([store], knn, runs=tmp_path, memory=500, ready=lambda: called.append(1))
    assert ("needs all rows in memory" in result.failed[0]["reason"], called) == (True, [])
    with pytest.raises(HeadError, match="needs all rows in memory"):
        train_head(store, "knn", runs=tmp_path, memory=500, ready=lambda: called.append(1))
    for _ in range(2):
        run_sweep([store], knn, runs=tmp_path, jobs=1, ready=lambda: called.append(1))
        train_head(store, "knn", runs=tmp_path, ready=lambda: called.append(1))
    assert len(called) == 2  # once each: the second time there is nothing to train


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_damaged_files_of_one_run_stop_no_sweep_and_no_leaderboard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store()
    first = run_sweep([store], logistic(), runs=tmp_path, jobs=1)
    for run_id in first.runs:
        shutil.rmtree(tmp_path / run_id / "plots")
        (tmp_path / run_id / "history.csv").write_text("rows\nmany\n")
        (tmp_path / run_id / "predictions.csv").write_text("path\na\n")
    with pytest.raises(RunError, match=r"history\.csv: column 'rows' holds a value that is not a number"):
        log_run(tmp_path / "logs", tmp_path / first.runs[0])
    more = sweep({"head": "logistic", "grid": {"C": [*CS, 1.0]}})
    result = run_sweep([store], more.model_copy(update={"choose": "balanced_accuracy"}), runs=tmp_path, jobs=1)
    assert (result.trained, len(result.board)) == (1, 4)
    assert "predictions.csv: cannot be read as predictions of 2 classes" in caplog.text
    assert len(leaderboard(tmp_path, by="balanced_accuracy")) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_what_killed_processes_left_behind_goes(tmp_path: Path) -> None:
    (run_id,) = run_sweep([make_store()], single("knn", {}), runs=tmp_path / "a", jobs=1).runs
    runs = tmp_path / "b"
    runs.mkdir()
    leave(runs, "sweep", run_id, "folder")
    kept = temporary_path(runs / "sweep")
    kept.mkdir()
    run_sweep([make_store()], single("knn", {}), runs=runs, jobs=1)
    assert {path.name for path in runs.iterdir()} == {run_id, kept.name}


# ------------------------------------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    source = paint_folder(folder / "images", {"cat": 60, "dog": 60})
    extract(source, folder / "f.h5", split="stratified:0.7,0.2,0.1", batch_size=16)
    return folder / "f.h5"


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_sweep_on_the_command_line_and_again_without_keras(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path / "sweep.yaml",
        "version: 1\nheads:\n- {head: logistic, log: {C: [1e-3, 1, 3]}}\n"
        "- {head: dense, grid: {epochs: [2], learning_rate: [0.01, 0.1]}}\n- {head: knn, grid: {n_neighbors: [999]}}\n",
    )
    arguments = ["train-head", str(file), "--heads", str(path), "--runs", str(tmp_path / "runs"), "--n-jobs", "2"]
    first = call_pipeline(*arguments, "--test", "--json")
    assert first.returncode == 1, first.stderr  # one head failed, and the others are there
    document = json.loads(first.stdout)
    assert document["format"] == 1
    assert (document["trained"], document["cached"], len(document["failed"])) == (5, 0, 1)
    assert document["chosen"] in document["runs"]
    assert "knn n_neighbors=999 on last.avg failed: " in first.stderr
    code = (
        f"import sys\nfrom pipeline.cli import main\ncode = main({arguments!r})\n"
        "sys.exit(code + 10 * bool({'keras', 'tensorflow', 'matplotlib'} & set(sys.modules)))"
    )
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 1, again.stderr
    assert "0 trained, 5 already there, 1 failed" in again.stdout
    assert "failed: knn n_neighbors=999 on last.avg" in again.stdout
    assert main(["leaderboard", str(tmp_path / "runs")]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line[:2].strip() in ("", "*")]
    assert len(table) == 6  # what all of them share stands below
    assert sum(line.startswith("*") for line in table) == 1
    nothing = write(tmp_path / "nothing.yaml", "version: 1\nheads: [{head: knn, grid: {n_neighbors: [998, 999]}}]")
    assert main(["train-head", str(file), "--heads", str(nothing), "--runs", str(tmp_path / "none")]) == 1
    assert "0 trained, 0 already there, 2 failed" in capsys.readouterr().out
    assert main(["train-head", str(file), "--heads", str(path), "--head", "knn"]) == 2
    assert "give one or the other" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_an_interrupted_sweep_of_processes_goes_on_where_it_was(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ", ".join(str(value) for value in range(5, 13))
    path = write(
        tmp_path / "sweep.yaml",
        f"version: 1\nheads: [{{head: sklearn.ensemble.RandomForestClassifier, grid: {{n_estimators: [80], max_depth: [{values}]}}}}]",
    )
    command = [sys.executable, "-m", "pipeline", "train-head", str(file), "--heads", str(path)]
    command += ["--runs", str(tmp_path / "runs"), "--n-jobs", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list((tmp_path / "runs").glob("sklearn*/metrics.json"))) < 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; all finished work is kept" in stderr
    done = len(leaderboard(tmp_path / "runs"))
    assert 3 <= done < 8
    assert [item for item in (tmp_path / "runs").iterdir() if item.name.startswith(".")] == []
    capsys.readouterr()
    assert main([*command[3:-1], "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["trained"], result["cached"]) == (8 - done, done)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_run_of_a_newer_release_is_kept_and_stops_no_other_head(tmp_path: Path) -> None:
    store, heads = make_store(), sweep({"head": "logistic", "grid": {"C": [0.1, 1.0]}})
    first = run_sweep([store], heads, runs=tmp_path, jobs=1)
    path = tmp_path / first.runs[0] / "config.yaml"
    path.write_text(path.read_text().replace("format: 1", "format: 9"))
    more = sweep({"head": "logistic", "grid": {"C": [0.1, 1.0, 10.0]}})
    again = run_sweep([store], more, runs=tmp_path, jobs=1)
    assert (again.trained, again.cached, len(again.board)) == (1, 1, 2)
    assert [item["reason"].partition(": ")[2][:8] for item in again.failed] == ["format 9"]
    assert "format: 9" in path.read_text()
