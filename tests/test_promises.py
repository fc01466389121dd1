"""What runs promise of their answers: which rows may tell, where it is kept, and what predict, evaluate and the board make of it."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import made_run
from test_sweeps import logistic
from test_train_head import Store, make_store

from features.errors import ConfigurationError, FormatVersionError, HeadError
from pipeline.config import MetricsFile, parse
from pipeline.exporting.artefacts import AnsweringCard, Card, read_card, write_card
from pipeline.heads.kinds import make_head
from pipeline.heads.promises import Asked, check_rows, promised
from pipeline.predicting.files import Prediction, Rows
from pipeline.runs.board import board_of, leaderboard, starred, take_run
from pipeline.runs.folder import Run, read_predictions
from pipeline.runs.writing import add_scores
from pipeline.scores.answers import find_threshold, kept, least_probability
from pipeline.stages.train_head import train_head
from pipeline.sweeps.sweep import run_sweep, summary
from pipeline.sweeps.sweep_file import single
from pipeline.tables import board_text, group_lines, promise_lines

ANSWERS: dict[str, Any] = {
    "rows": "validation",
    "grouped": False,
    "abstain": {
        "precision": 0.9,
        "threshold": 0.75,
        "n": 100,
        "answered": 80,
        "right": 79,
        "bound": 0.94,
        "needed": 29,
        "coverage": 0.8,
    },
    "sets": {"coverage": 0.9, "least": 0.3},
}
NONE = {**ANSWERS, "abstain": {**ANSWERS["abstain"], "threshold": None, "answered": 0, "right": 0, "coverage": 0.0}}


def store_with_columns(rows: int = 600) -> Store:
    store = make_store(rows=rows, shift=2.0)
    store.images.columns = {"camera": tuple("ab"[row % 2] for row in range(rows))}
    return store


def lines(values: list[tuple[str | None, int, int]]) -> list[dict[str, Any]]:
    return [
        {"value": name, "n": n, "right": right, "accuracy": right / n, "accuracy_interval": [0.0, 1.0]}
        for name, n, right in values
    ]


# --- asking ------------------------------------------------------------------------------------------------


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--abstain-precision: received 1\.0, expected 0\.5 to 0\.9999"):
        Asked(1.0)
    with pytest.raises(ConfigurationError, match=r"--set-coverage: received 0\.2"):
        Asked(None, 0.2)
    assert Asked(0.99).coverage == 0.9
    assert (Asked(None, 0.95).option, Asked(0.99).option, Asked().option) == (
        "--set-coverage",
        "--abstain-precision",
        "",
    )


def test_rows_that_chose_a_head_or_ended_its_training_promise_nothing() -> None:
    asked, plain, keras = Asked(0.9), make_head("logistic"), make_head("dense")
    with pytest.raises(ConfigurationError, match=r"chosen by the validation images.*Add --folds 5"):
        check_rows(asked, [plain, plain], "validation", folds=False)
    with pytest.raises(ConfigurationError, match=r"'dense' keeps the epoch.*--param stop_on=train, or --folds 5"):
        check_rows(asked, [keras], "", folds=False)
    with pytest.raises(ConfigurationError, match=r"Add --param stop_on=train \(in a sweep file"):
        check_rows(asked, [plain, keras], "cv", folds=True)
    check_rows(asked, [plain, plain], "cv", folds=True)
    check_rows(asked, [keras], "", folds=True)
    check_rows(asked, [make_head("dense", stop_on="train")], "", folds=False)
    check_rows(Asked(), [keras, keras], "validation", folds=False)


# --- keeping -----------------------------------------------------------------------------------------------


def test_a_promise_is_of_format_2_which_the_last_release_refuses_and_others_stay_as_they_are(tmp_path: Path) -> None:
    run = made_run(tmp_path, "logistic-0000000001")
    before = (run.folder / "metrics.json").read_bytes()
    assert json.loads(before)["format"] == 1
    assert "answers" not in json.loads(before)
    more = add_scores(run, answers=ANSWERS)
    written = json.loads((run.folder / "metrics.json").read_text())
    assert written["format"] == 2
    assert more.metrics["answers"] == written["answers"] == ANSWERS
    with pytest.raises(FormatVersionError, match=r"format 2 is not known here \(expected 1\)"):
        parse(MetricsFile, written, "metrics.json")
    (run.folder / "metrics.json").write_bytes(before)
    add_scores(Run.open(run.folder), test=None or run.metrics["validation"])
    assert json.loads((run.folder / "metrics.json").read_text())["format"] == 1


def test_a_damaged_promise_is_refused(tmp_path: Path) -> None:
    run = add_scores(made_run(tmp_path, "logistic-0000000001"), answers=ANSWERS)
    path = run.folder / "metrics.json"
    values = json.loads(path.read_text())
    values["answers"]["abstain"]["threshold"] = "0.5; rm"
    path.write_text(json.dumps(values))
    with pytest.raises(Exception, match=r"metrics.json: answers.abstain.threshold: received"):
        Run.open(run.folder)


@pytest.mark.slow
def test_validation_tells_about_a_single_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are those of the functions on predictions.csv; the run id and all other figures stay the same."""
    store = store_with_columns()
    monkeypatch.setattr("pipeline.runs.writing.plot_run", lambda *_: None)
    plain = train_head(store, "logistic", runs=tmp_path / "plain", params={"C": 0.1})
    asked = train_head(
        store, "logistic", runs=tmp_path / "asked", params={"C": 0.1}, asked=Asked(0.9, 0.8, ("camera",))
    )
    assert asked.run_id == plain.run_id
    assert {key: value for key, value in asked.metrics.items() if key not in ("answers", "groups", "format")} == {
        key: value for key, value in plain.metrics.items() if key != "format"
    }
    rows = read_predictions(Run.open(asked.folder))
    right = rows.probabilities.argmax(axis=1) == rows.labels
    expected = find_threshold(rows.probabilities.max(axis=1), right, 0.9)
    answers = asked.metrics["answers"]
    assert expected.threshold is not None
    assert (answers["rows"], answers["grouped"]) == ("validation", False)
    assert answers["abstain"] == {**expected._asdict(), "coverage": expected.coverage}
    assert answers["sets"] == {"coverage": 0.8, "least": least_probability(rows.probabilities, rows.labels, 0.8)}
    table = asked.metrics["groups"]["validation"]["camera"]
    assert [line["value"] for line in table] == ["a", "b"]
    assert sum(line["right"] for line in table) == right.sum()
    later = train_head(
        store, "logistic", runs=tmp_path / "plain", params={"C": 0.1}, asked=Asked(0.9, 0.8, ("camera",))
    )
    assert later.cached
    assert later.metrics == asked.metrics


@pytest.mark.slow
def test_of_few_validation_rows_those_out_of_fold_tell_about_a_single_head(tmp_path: Path) -> None:
    store = store_with_columns(200)  # 40 validation rows, fewer than 95 % needs; 140 training rows
    result = run_sweep([store], single("logistic", {"C": 0.1}), runs=tmp_path, jobs=1, folds=5, asked=Asked(0.95))
    answers = Run.open(tmp_path / result.runs[0]).metrics["answers"]
    assert (answers["rows"], answers["abstain"]["n"]) == ("cv", 140)
    again = run_sweep([store], single("logistic", {"C": 0.1}), runs=tmp_path, jobs=1, folds=5, asked=Asked(0.95))
    assert again.cached == 1
    assert Run.open(tmp_path / again.runs[0]).metrics["answers"] == answers
    other = run_sweep([store], single("logistic", {"C": 0.1}), runs=tmp_path, jobs=1, folds=5, asked=Asked(0.98))
    assert other.trained == 1  # a run keeps no rows out of fold


@pytest.mark.slow
def test_of_a_sweep_only_the_chosen_head_promises_and_not_by_what_chose_it(tmp_path: Path) -> None:
    store = store_with_columns()
    with pytest.raises(ConfigurationError, match="--folds 5"):
        run_sweep([store], logistic(), runs=tmp_path, jobs=1, asked=Asked(0.9))
    assert not list(tmp_path.iterdir())
    result = run_sweep([store], logistic(), runs=tmp_path, jobs=1, folds=2, asked=Asked(0.8))
    chosen = next(row for row in result.board if row["chosen"])
    promising = [run_id for run_id in result.runs if Run.open(tmp_path / run_id).metrics.get("answers")]
    assert promising == [chosen["run_id"]]
    assert chosen["answers"]["rows"] == "validation"
    assert "are right in at least 0.8" in summary(result, tmp_path)


@pytest.mark.slow
def test_a_sweep_chooses_by_the_worst_group(tmp_path: Path) -> None:
    store = store_with_columns()
    result = run_sweep([store], logistic(choose="worst_group_accuracy", by=["camera"]), runs=tmp_path, jobs=1, folds=3)
    runs = [Run.open(tmp_path / run_id) for run_id in result.runs]
    assert all({"validation", "cv"} == set(run.metrics["groups"]) for run in runs)
    for run in runs:
        assert sum(line["n"] for line in run.metrics["groups"]["cv"]["camera"]) == run.metrics["cv"]["n"]
    worst = [min(line["accuracy"] for line in run.metrics["groups"]["cv"]["camera"]) for run in runs]
    assert result.board[0]["worst_group_accuracy"] == max(worst)
    with pytest.raises(ConfigurationError, match=r"--by group: features\.h5 has no such column: it has camera"):
        run_sweep([store], logistic(choose="worst_group_accuracy"), runs=tmp_path / "other", jobs=1)
    more = run_sweep([store], logistic(by=["camera"]), runs=tmp_path, jobs=1)
    assert more.cached == 3


def test_a_run_that_validation_ended_or_chose_promises_nothing(tmp_path: Path) -> None:
    store = make_store()
    for name, chosen_by in (("dense", ""), ("logistic", "validation")):
        run = made_run(tmp_path, f"{name}-0000000001", head=name)
        with pytest.raises(
            HeadError, match=r"The run is kept\. Train with --folds 5, and Keras heads with --param stop_on"
        ):
            promised(run, store, Asked(0.9), chosen_by)


def test_a_streamed_head_that_validation_ended_is_known(tmp_path: Path) -> None:
    run = made_run(tmp_path, "sgd-0000000001", head="sgd")
    assert not run.uses_validation
    for parameters, expected in (({}, True), ({"solver": "keras"}, False)):
        run.environment["streamed"] = True
        run.config["head"]["parameters"] = parameters
        assert run.uses_validation is expected


# --- telling -----------------------------------------------------------------------------------------------


def cells(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_rows_say_what_is_withheld_and_which_classes_are_possible() -> None:
    rows = Rows("csv", ("cat", "dog", "set"), answers=ANSWERS)
    sure, torn, lost = np.array([0.8, 0.15, 0.05]), np.array([0.35, 0.34, 0.31]), None
    table = cells(rows.header + "".join(rows.text(Prediction("x.jpg", values)) for values in (sure, torn, lost)))
    assert table[0] == ["file", "class", "probability", "abstain", "set", "cat", "dog", "p:set", "error"]
    assert table[1][3:5] == ["false", '["cat"]']
    assert table[2][3:5] == ["true", '["cat", "dog", "set"]']
    assert len(table[3]) == len(table[0])
    assert rows.withholds(Prediction("x.jpg", torn))
    assert not rows.withholds(Prediction("x.jpg", sure))
    assert not rows.withholds(Prediction("x.jpg", None, "missing"))
    top = Rows("csv", ("cat", "dog"), 1, ANSWERS)
    assert cells(top.header)[0] == ["file", "class_1", "probability_1", "abstain", "set", "error"]
    assert cells(top.text(Prediction("x.jpg", np.array([0.29, 0.71]))))[0][3:] == ["true", '["dog"]', ""]
    document = json.loads(Rows("jsonl", ("cat", "dog"), answers=NONE).text(Prediction("x.jpg", np.array([1.0, 0.0]))))
    assert (document["abstain"], document["set"], document["error"]) == (True, ["cat"], None)
    plain = Rows("csv", ("abstain", "set"))
    assert plain.header == "file,class,probability,abstain,set,error\n"  # as ever, where nothing is promised


def test_sets_alone_withhold_nothing() -> None:
    rows = Rows("csv", ("cat", "dog"), answers={**ANSWERS, "abstain": None})
    assert cells(rows.header)[0][:4] == ["file", "class", "probability", "set"]
    assert rows.withholding is None


def test_how_far_a_promise_is_kept_is_counted() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.74, 0.26], [0.5, 0.5]])
    found = kept(probabilities, np.array([0, 1, 0, 1]), ANSWERS)
    assert found["abstain"] == {
        "asked": 0.9, "threshold": 0.75, "answered": 2, "right": 1, "precision": 0.5,
        "interval": pytest.approx([0.0945, 0.9055], abs=1e-4), "coverage": 0.5,
    }  # fmt: skip
    assert (found["sets"]["coverage"], found["sets"]["mean_size"], found["sets"]["empty"]) == (0.75, 1.25, 0)
    none = kept(probabilities, np.array([0, 1, 0, 1]), NONE)
    assert (none["abstain"]["answered"], none["abstain"]["precision"], none["abstain"]["interval"]) == (0, None, None)


def test_a_promise_in_words() -> None:
    said = promise_lines(ANSWERS)
    assert said[0].startswith(
        "  answers from a confidence of 0.75 on are right in at least 0.9 (95 % sure): 80 of 100 validation"
    )
    assert "0.3 or more hold the true class of 0.9 of images" in said[1]
    assert (
        "it takes 299 answers without a fault"
        in promise_lines({**NONE, "abstain": {**NONE["abstain"], "precision": 0.99, "needed": 299}})[0]
    )
    assert "wrong ones are among the surest" in promise_lines(NONE)[0]
    assert promise_lines(NONE)[0].startswith(
        "  no confidence is known from which on at least 0.9 of the answers are right: none of"
    )
    assert promise_lines(None) == []
    shown = group_lines({"validation": {"camera": lines([("a", 10, 9), (None, 2, 1)])}})
    assert shown[0] == "  by camera, validation"
    assert "(rare values)" in shown[1]


def test_the_board_compares_by_the_worst_group_and_shows_what_is_answered(tmp_path: Path) -> None:
    better = made_run(tmp_path, "logistic-0000000001", accuracy=0.9, images=100)
    fairer = made_run(tmp_path, "ridge-0000000002", accuracy=0.88, images=100, head="ridge", parameters=9)
    made_run(tmp_path, "lda-0000000003", accuracy=0.95, images=100, head="lda")
    with pytest.raises(ConfigurationError, match=r"none of 3 runs has tables by group\. Train with --by"):
        leaderboard(tmp_path, by="worst_group_accuracy")
    add_scores(better, groups={"validation": {"light": lines([("day", 80, 78), ("night", 20, 12)])}})
    add_scores(fairer, groups={"validation": {"light": lines([("day", 80, 70), ("night", 20, 18)])}}, answers=ANSWERS)
    runs = [Run.open(folder) for folder in sorted(tmp_path.iterdir())]
    board = board_of(runs, by="worst_group_accuracy")
    assert [row["run_id"][:4] for row in board] == ["ridg", "logi", "lda-"]
    assert [(row["worst_group"], row["worst_group_accuracy"]) for row in board] == [
        ("light 'day'", 0.875),
        ("light 'night'", 0.6),
        ("", None),
    ]
    assert [row["answered"] for row in board] == [0.8, None, None]
    assert starred(runs, "worst_group_accuracy").run_id == "ridge-0000000002"
    assert starred(runs).run_id == starred(runs, "accuracy").run_id
    text = board_text(board)
    assert "worst group" in text.splitlines()[0]
    assert "answered" in text.splitlines()[0]
    assert "worst_group" not in board_of([Run.open(tmp_path / "lda-0000000003")])[0]


def test_a_run_that_its_own_images_chose_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_scores(made_run(tmp_path, "logistic-0000000001", accuracy=0.9), answers=ANSWERS)
    take_run(tmp_path)
    assert "also chose it" not in caplog.text
    made_run(tmp_path, "ridge-0000000002", accuracy=0.5, head="ridge")
    take_run(tmp_path)
    assert "the images that set its threshold also chose it among 2 runs" in caplog.text


def test_the_card_of_an_artefact_carries_the_promise(tmp_path: Path) -> None:
    values = {
        "artefact": "keras", "run": "r", "classes": ["a", "b"], "recipe": {}, "input": "", "output": "", "packages": {},
    }  # fmt: skip
    for card in (Card.model_validate(values), AnsweringCard.model_validate({**values, "answers": ANSWERS})):
        path = tmp_path / f"{card.format}.keras"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", "{}")
        write_card(path, card)
        assert read_card(path)[1] == card
    assert (card.format, card.model_dump(mode="json")["answers"]) == (2, ANSWERS)
