"""What runs on labels and numbers promise: sets that hold all labels, and intervals that hold a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from targeted import labels_of, numbers_of, target_store, thirds

from features.errors import ConfigurationError
from pipeline.config import parse_one_of
from pipeline.exporting.artefacts import CARDS, TargetCard
from pipeline.heads.promises import Asked
from pipeline.predicting.files import Prediction
from pipeline.predicting.targets import TargetRows
from pipeline.runs.board import answered, leaderboard
from pipeline.runs.folder import Run, read_predictions
from pipeline.scores.groups import worst_of
from pipeline.stages.train_head import train_head
from pipeline.tables import group_lines, promise_lines
from pipeline.tasks.table import TASKS

MULTILABEL, REGRESSION = TASKS["multilabel"], TASKS["regression"]
pytestmark = pytest.mark.usefixtures("without_plots")


def test_a_set_of_labels_holds_all_that_an_image_has() -> None:
    """Of 19 images the second lowest probability of a label that holds; one without a label is always held."""
    values = np.stack([np.arange(1, 20) / 20, np.full(19, 0.01)], axis=1)
    y = np.tile(np.array([1, 0], np.uint8), (19, 1))
    y[5] = [0, 255]
    told = MULTILABEL.promise(values, y, (None, 0.9), None)
    assert told["sets"]["least"] == pytest.approx(2 / 20)
    kept = MULTILABEL.kept(np.array([[0.9, 0.2], [0.03, 0.9]]), np.array([[1, 0], [1, 1]], np.uint8), told)
    assert (kept["sets"]["coverage"], kept["sets"]["mean_size"]) == (0.5, 1.5)
    assert MULTILABEL.told(np.array([0.9, 0.01]), ("a", "b"), told) == {"set": ["a"]}


def test_labels_are_given_from_the_probability_on_from_which_they_are_right() -> None:
    """60 images have a right label at 0.9; 40 a right one at 0.7 beside a wrong one at 0.6; 10 a wrong one at 0.3, 5 an unknown."""
    values = np.array([[0.9, 0.1]] * 60 + [[0.7, 0.6]] * 40 + [[0.3, 0.1]] * 10 + [[0.2, 0.99]] * 5)
    y = np.array([[1, 0]] * 100 + [[0, 0]] * 10 + [[0, 255]] * 5, np.uint8)
    told = MULTILABEL.promise(values, y, (0.95, 0.9), None)
    abstain = told["abstain"]
    assert (abstain["threshold"], abstain["answered"], abstain["right"], abstain["n"]) == (
        np.float32(0.7),
        100,
        100,
        115,
    )
    assert abstain["bound"] == pytest.approx(0.05 ** (1 / 100))
    kept = MULTILABEL.kept(
        np.array([[0.8, 0.9], [0.7, 0.1], [0.6, 0]]), np.array([[1, 0], [1, 0], [1, 1]], np.uint8), told
    )
    assert [kept["abstain"][name] for name in ("answered", "right", "precision")] == [2, 1, 0.5]
    expected = {"abstain": False, "sure": ["a"], "set": MULTILABEL.told(values[0], ("a", "b"), told)["set"]}
    assert MULTILABEL.told(np.array([0.75, 0.65]), ("a", "b"), told) == expected
    assert MULTILABEL.told(np.array([0.69, 0.65]), ("a", "b"), told)["abstain"]
    few = MULTILABEL.promise(values[:50], y[:50], (0.99, 0.9), None)["abstain"]
    assert (few["threshold"], few["coverage"], few["needed"]) == (None, 0, 299)
    grouped = MULTILABEL.promise(values, y, (0.95, 0.9), np.arange(115) // 5)["abstain"]
    assert (grouped["n"], grouped["threshold"]) == (23, None)  # 23 groups are fewer than the 59 that it takes


@pytest.mark.slow
def test_labels_that_are_given_are_right_as_often_as_was_promised() -> None:
    """Of 40 divisions, the true share on other rows is below the promise in at most a tenth."""
    generator, below, answered = np.random.default_rng(5), 0, []
    for _ in range(40):
        values = generator.beta(0.4, 0.6, (3000, 4))
        y = (generator.random(values.shape) < values**1.3).astype(np.uint8)  # the probabilities are too high
        told = MULTILABEL.promise(values[:1000], y[:1000], (0.9, 0.9), None)
        kept = MULTILABEL.kept(values[1000:], y[1000:], told)["abstain"]
        answered.append(kept["coverage"])
        below += kept["answered"] > 0 and kept["precision"] < 0.9
    assert below <= 4
    assert np.mean(answered) > 0.1


def test_an_interval_is_half_a_width_around_a_number() -> None:
    y = np.array([[0.0, 1.0]] * 19)
    y[:, 1] = np.nan
    y[0, 1] = 5
    values = np.stack([np.arange(1, 20.0), np.zeros(19)], axis=1)
    told = REGRESSION.promise(values, y, (None, 0.9), None)
    assert told == {"intervals": {"coverage": 0.9, "half_widths": [18.0, None]}}
    kept = REGRESSION.kept(np.array([[1.0, 3], [-30, 0]]), np.array([[0, np.nan], [0, np.nan]]), told)["intervals"]
    assert [one["coverage"] for one in kept["numbers"]] == [0.5, None]
    assert REGRESSION.told(np.array([2.0, 1.0]), ("a", "b"), told) == {"interval": {"a": [-16, 20], "b": None}}


@pytest.mark.parametrize(("task", "made"), [("multilabel", labels_of), ("regression", numbers_of)])
def test_the_mean_coverage_is_what_was_promised(task: str, made: Any) -> None:
    """Over 20 divisions, within 2 points: the figures that the benchmark gives for real images."""
    X, y = made(900, 3)
    weights = np.linalg.lstsq(
        np.c_[X, np.ones(len(X))][:300], np.where(np.isfinite(y), y, 0)[:300].astype(float), rcond=None
    )[0]
    values = np.c_[X, np.ones(len(X))] @ weights
    values = np.clip(values, 0, 1) if task == "multilabel" else values
    held = []
    for seed in range(20):
        tell, new = np.array_split(300 + np.random.default_rng(seed).permutation(600), 2)
        told = TASKS[task].promise(values[tell], y[tell], (None, 0.9), None)
        kept = TASKS[task].kept(values[new], y[new], told)
        held.append((kept.get("sets") or kept["intervals"]["numbers"][0])["coverage"])
    assert abs(np.mean(held) - 0.9) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "head", "precision", "told"),
    [
        (labels_of, "logistic", None, "hold all labels of 0.9"),
        (labels_of, "logistic", 0.6, "all labels from a confidence of"),
        (numbers_of, "ridge", None, "plus and minus"),
    ],
)
def test_a_run_keeps_its_promise_in_its_files(
    tmp_path: Path, made: Any, head: str, precision: float | None, told: str
) -> None:
    X, y = made(300)
    store = target_store(tmp_path / "t.h5", X, y, thirds(300), [f"c{k}" for k in range(y.shape[1])])
    plain = train_head(store, head, runs=tmp_path / "plain")
    found = train_head(store, head, runs=tmp_path / "runs", asked=Asked(precision, 0.9))
    assert found.run_id == plain.run_id
    run = Run.open(found.folder)
    rows, answers = read_predictions(run), run.metrics["answers"]
    expected = run.task.promise(rows.probabilities, rows.labels, (precision, 0.9), None)
    assert answers == {"rows": "validation", "grouped": False, **json.loads(json.dumps(expected))}
    assert "answers" not in json.loads((plain.folder / "metrics.json").read_text())
    assert told in promise_lines(answers)[0]
    again = train_head(store, head, runs=tmp_path / "runs", asked=Asked(precision, 0.9))
    assert again.metrics["answers"] == answers
    lines = TargetRows("jsonl", run.classes, run.task, run.metrics["validation"], answers)
    line = json.loads(lines.text(Prediction("a.png", rows.probabilities[0], "")))
    assert {key: line[key] for key in ("abstain", "sure", "set", "interval") if key in line} == run.task.told(
        rows.probabilities[0], run.classes, answers
    )
    withheld = [lines.withholds(Prediction("a.png", values, "")) for values in rows.probabilities]
    assert sum(withheld) == (len(withheld) - answers["abstain"]["answered"] if precision else 0)
    (row,) = leaderboard(tmp_path / "runs")
    assert (row["answered"] is not None, answered(run)["answered_precision"]) == (precision is not None, precision)
    values: dict[str, Any] = {
        "artefact": "onnx",
        "run": "r",
        "classes": run.classes,
        "recipe": {},
        "input": "",
        "output": "",
        "packages": {},
    }
    card = TargetCard(**values, task=run.task.name, answers=answers)  # type: ignore[arg-type]
    written = card.model_dump(mode="json")
    assert json.loads(json.dumps(written["answers"])) == answers
    assert parse_one_of(CARDS, written, "card") == card
    assert "answers" not in TargetCard(**values, task=run.task.name).model_dump(mode="json")  # type: ignore[arg-type]


def test_labels_have_tables_by_group(tmp_path: Path) -> None:
    X, y = labels_of(300)
    groups = tuple("ab"[row % 2] for row in range(300))
    store = target_store(tmp_path / "t.h5", X, y, thirds(300), ["x", "y", "z"], groups)
    run = train_head(store, "logistic", runs=tmp_path / "runs", asked=Asked(by=("group",)))
    table = run.metrics["groups"]["validation"]["group"]
    assert [(line["value"], line["n"]) for line in table] == [("a", 30), ("b", 30)]
    assert sum(line["right"] for line in table) / 60 == pytest.approx(run.metrics["validation"]["exact_match"])
    (row,) = leaderboard(tmp_path / "runs", by="worst_group_accuracy")
    assert row["worst_group_accuracy"] == min(line["accuracy"] for line in table)


@pytest.mark.slow
def test_numbers_have_errors_by_group(tmp_path: Path) -> None:
    """The table is that of the predictions, and the leaderboard compares by its largest error."""
    X, y = numbers_of(300, 1)
    groups = tuple("abc"[row % 3] if row < 290 else str(row) for row in range(300))
    y[np.array(groups) == "b"] += np.random.default_rng(0).normal(0, 5, (groups.count("b"), 1))
    store = target_store(tmp_path / "n.h5", X, y, thirds(300), ["x"], groups)
    for alpha in (1.0, 1e5):
        run = train_head(store, "ridge", runs=tmp_path / "runs", params={"alpha": alpha}, asked=Asked(by=("group",)))
        table, rows = run.metrics["groups"]["validation"]["group"], read_predictions(Run.open(run.folder))
        of = np.array([groups[int(path.split(".")[0])] for path in rows.paths])
        errors = np.abs(rows.labels - rows.probabilities)[:, 0]
        assert [line["value"] for line in table] == ["a", "b", "c", None]
        for line, some in zip(table, [*(of == name for name in "abc"), ~np.isin(of, list("abc"))], strict=True):
            assert (line["n"], line["mae"]) == (some.sum(), pytest.approx(errors[some].mean(), rel=1e-6))
            assert line["rmse"] == pytest.approx(np.sqrt(np.square(errors[some]).mean()), rel=1e-6)
            assert line["mae_interval"][0] <= line["mae"] <= line["mae_interval"][1]
    board = leaderboard(tmp_path / "runs", by="worst_group_accuracy")
    worst = [
        max(
            line["mae"]
            for line in Run.open(tmp_path / "runs" / row["run_id"]).metrics["groups"]["validation"]["group"][:3]
        )
        for row in board
    ]
    assert [row["worst_group_mae"] for row in board] == worst == sorted(worst)
    assert board[0]["worst_group"] == "group 'b'"
    assert leaderboard(tmp_path / "runs", by="worst_group_mae") == board
    assert "mean abs. error" in "\n".join(group_lines(Run.open(run.folder).metrics["groups"]))
    with pytest.raises(ConfigurationError, match=r"choose: received 'worst_group_mae'.*--task multilabel"):
        MULTILABEL.choice("worst_group_mae")


def test_the_line_of_rare_values_is_no_worst_group() -> None:
    rare = {"value": None, "n": 4, "right": 0, "accuracy": 0.0}
    night = {"value": "night", "n": 20, "right": 10, "accuracy": 0.5}
    assert worst_of({"light": [night, rare]}) == {**night, "column": "light"}
    assert worst_of({"light": [rare]})["value"] is None
