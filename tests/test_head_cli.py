"""``train-head`` as it is typed: memory, views, logs, and every mistake with one clear error."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import listing
from test_streaming import write_store

from features.machine import how_to_install
from pipeline.cli import main
from pipeline.runs.tensorboard import write_history

# Trains, and reads event files with TensorBoard.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four views of 600 rows of three classes, sorted."""
    generator = np.random.default_rng(0)
    labels = np.arange(600) // 200
    corners = 2 * generator.normal(size=(3, 8))
    X = corners[labels][:, None] + generator.normal(size=(600, 4, 8))
    splits = np.array([0, 0, 0, 1, 2])[np.arange(600) % 5]
    return write_store(tmp_path_factory.mktemp("cli") / "f.h5", [X.astype(np.float32)], labels, splits, 4).path


def typed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    code = main(["train-head", *map(str, arguments)])
    found = capsys.readouterr()
    return code, found.out, found.err


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def columns(run: Path) -> dict[str, list[float]]:
    with open(run / "history.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


# ----------------------------------------------------------------------------------- one run, many wishes
def test_memory_views_and_logs_on_the_command_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wishes = ["--tensorboard", tmp_path / "logs", "--average-views", "--test"]
    head = ["--head", "dense", "--param", "epochs=4", "--param", "batch_size=8"]
    arguments = [file, "--runs", tmp_path / "runs", *head, *wishes]
    code, out, err = typed(capsys, *arguments, "--memory", "20kB")
    assert code == 0, err
    assert ", from rows that were streamed from the store" in out
    (run,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    heads, *rows = out.splitlines()[-4:]
    assert re.split(" {2,}", heads.strip()) == ["split", "images", "accuracy", "95 % interval", "log loss"]
    names = {"validation": "validation", "validation, mean of 4 views": "averaged", "test": "test"}
    for row, (name, key) in zip(rows, names.items(), strict=True):
        low, high = metrics[key]["accuracy_interval"]
        scores = [f"{metrics[key]['accuracy']:.4f}", f"{low:.4f} to {high:.4f}", f"{metrics[key]['log_loss']:.4f}"]
        assert re.split(" {2,}", row.strip()) == [name, "120", *scores]
    assert (metrics["averaged"]["views"], metrics["averaged"]["n"], metrics["test"]["n"]) == (4, 120, 120)
    assert json.loads((run / "environment.json").read_text())["memory"] == 20_000
    history = columns(run)
    epochs = history.pop("epoch")
    assert epochs == [1, 2, 3, 4]
    assert set(history) == {"loss", "val_loss", "val_accuracy"}
    found = scalars(tmp_path / "logs" / run.name)
    assert set(found) == set(history)
    for name, values in history.items():
        assert [step for step, _ in found[name]] == [1, 2, 3, 4]
        assert [value for _, value in found[name]] == pytest.approx(values, rel=1e-6)
    # Again, and in memory: the same run, nothing trained, one log.
    code, out, err = typed(capsys, *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["cached"] is True
    assert json.loads(out)["metrics"] == metrics
    assert len(listing(tmp_path / "logs")) == 2
    assert scalars(tmp_path / "logs" / run.name) == found


def test_logs_of_a_sweep(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "version: 1\nheads:\n- {head: dense, grid: {epochs: [2], views: [draw, plain]}}\n- {head: knn}\n"
        "- {head: sklearn.naive_bayes.GaussianNB}\n"
    )
    runs = tmp_path / "runs"
    code, _, err = typed(
        capsys, file, "--heads", path, "--runs", runs, "--tensorboard", tmp_path / "logs", "--average-views"
    )
    assert code == 0, err
    names = sorted(run.name for run in runs.iterdir())
    assert len(names) == 4
    assert sorted(folder.name for folder in (tmp_path / "logs").iterdir()) == names
    for name in names:
        found, history = scalars(tmp_path / "logs" / name), columns(runs / name)
        history.pop("epoch", None)
        assert set(found) == set(history)
        for column, values in history.items():
            assert [step for step, _ in found[column]] == list(range(1, len(values) + 1))
            assert [value for _, value in found[column]] == pytest.approx(values, rel=1e-6)
        assert json.loads((runs / name / "metrics.json").read_text())["averaged"]["views"] == 4
    assert {len(scalars(tmp_path / "logs" / name)["loss"]) for name in names if name.startswith("dense")} == {2}


def test_logs_need_a_package_and_a_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match=r"taken|directory"):
        (tmp_path / "taken" / "x").mkdir()
    code, _, err = typed(capsys, file, "--runs", tmp_path / "runs", "--tensorboard", tmp_path / "taken")
    assert code == 1
    assert f"error: {tmp_path / 'taken'}" in err
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    code, _, err = typed(capsys, file, "--runs", tmp_path / "none", "--tensorboard", tmp_path / "logs")
    assert code == 2
    assert how_to_install("tensorboard") in err
    assert not (tmp_path / "none").exists() or not listing(tmp_path / "none")  # said before anything is trained


def test_a_history_without_columns_is_an_empty_log(tmp_path: Path) -> None:
    path = write_history(tmp_path, "some-run", {"epoch": [1.0]})
    assert path.parent == tmp_path / "some-run"
    assert scalars(path.parent) == {}
    assert listing(tmp_path) == ["some-run", f"some-run/{path.name}"]


# ------------------------------------------------------------------------------------------------ mistakes
def small(path: Path, X: np.ndarray | None = None, **changes: Any) -> Path:
    """A store of 40 rows of two classes; three of four are train."""
    values = {"labels": np.arange(40) // 20, "splits": np.array([0, 0, 0, 1])[np.arange(40) % 4]} | changes
    if X is None:
        X = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) + 3 * values["labels"][:, None]
    return write_store(path, [X.astype(np.float32)], values["labels"], values["splits"]).path


MISTAKES: dict[str, tuple[int, list[str], str]] = {
    "unknown head": (2, ["--head", "logistics"], "did you mean 'logistic'"),
    "unknown parameter": (2, ["--head", "dense", "--param", "learning_rat=1"], "did you mean 'learning_rate'"),
    "unknown parameter of scikit-learn": (
        2,
        ["--head", "sklearn.svm.LinearSVC", "--param", "CC=1"],
        "unknown parameter 'CC'",
    ),
    "a value out of range": (2, ["--head", "dense", "--param", "dropout=1"], "dropout"),
    "views of a plain store": (2, ["--head", "ridge", "--average-views"], "has only one view of each image"),
    "a size that is none": (2, ["--memory", "much"], "--memory: received 'much', expected a size such as 2GB"),
    "too little memory": (1, ["--head", "logistic", "--memory", "500b"], "needs all rows in memory: 30 x 6 features"),
    "too little for batches": (2, ["--head", "linear-sgd", "--memory", "1kB"], "batches of 32 rows of 6 columns need"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_error_with_the_way_out(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, arguments, message = MISTAKES[mistake]
    found, out, err = typed(capsys, small(tmp_path / "f.h5"), "--runs", tmp_path / "runs", *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (found, out, len(errors)) == (code, "", 1), err
    assert message in errors[0]
    assert "Traceback" not in err
    assert not [path for path in tmp_path.rglob("*") if path.name in ("metrics.json", "head.json")]


def test_rows_that_cannot_be_trained_on_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = np.array([0, 0, 0, 1])[np.arange(40) % 4]
    no_dog = np.where((np.arange(40) >= 20) & (splits == 0), 1, splits)
    bad = np.zeros((40, 6), np.float32)
    bad[7, 3] = np.nan
    stores = {
        "no training rows of '1'": small(tmp_path / "missing.h5", splits=no_dog),
        "all training rows are of one class ('0')": small(tmp_path / "single.h5", labels=np.zeros(40, int)),
        "there are no validation rows": small(tmp_path / "all.h5", splits=np.zeros(40, int)),
    }
    for message, path in stores.items():
        for head in ("logistic", "dense", "sklearn.naive_bayes.GaussianNB"):
            code, out, err = typed(capsys, path, "--runs", tmp_path / "runs", "--head", head)
            assert (code, out) == (1, ""), err
            assert message in err
            assert err.count("error: ") == 1
    assert not list((tmp_path / "runs").glob("*/metrics.json"))


def test_a_value_that_is_not_finite_is_found_with_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = np.ones((40, 6), np.float32)
    bad[7, 3] = np.nan
    for head in ("logistic", "dense"):
        code, _, err = typed(capsys, small(tmp_path / f"{head}.h5", bad), "--runs", tmp_path / "runs", "--head", head)
        assert code in (1, 3), err
        assert "hold values that are not finite" in err


def test_a_solver_that_needs_more_memory_is_refused_with_the_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    X = np.random.default_rng(0).normal(size=(40, 7, 7, 512)).astype(np.float32)
    path = small(tmp_path / "f.h5", X)
    solver = ["--head", "sklearn.linear_model.LogisticRegression", "--param", "solver=newton-cholesky"]
    code, _, err = typed(capsys, path, *solver, "--pool", "flatten", "--memory", "2GB", "--runs", tmp_path / "runs")
    assert code == 1
    assert "needs about 10.1 GB of memory for 30 x 25088 features, but only 2.0 GB are allowed" in err
    code, _, err = typed(capsys, path, *solver, "--pool", "avg", "--memory", "2GB", "--runs", tmp_path / "runs")
    assert code == 0, err
