"""Scores of a run on labelled images: values worked out by hand, what is set aside counted, classes that do not fit refused."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import paint
from labelling import Book
from test_predict import CLASSES, PAINT, PROMISE, Colours

import pipeline.stages.evaluate
from features.errors import ConfigurationError, SourceError, TooManyUnreadableError
from features.sources.reading import Reading
from pipeline.cli import main
from pipeline.stages.evaluate import evaluate, summary
from pipeline.tasks.table import CLASSIFICATION


@pytest.fixture(autouse=True)
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A run of three classes, which was validated on one red image; its store is gone."""
    made = SimpleNamespace(
        classes=CLASSES, run_id="colours", target=None, labels=None, reading=Reading(settled=True), task=CLASSIFICATION
    )
    made.config, made.folder = {"features": {"store": str(tmp_path / "gone.h5"), "data_digest": "0" * 64}}, tmp_path
    made.metrics = {"validation": {"n": 1}}
    digest = hashlib.sha256(paint(tmp_path / "red.png", PAINT["red"]).read_bytes()).hexdigest()
    (tmp_path / "predictions.csv").write_text(
        f"path,sha256,label,predicted,correct\nr,{digest},ape,ape,true,0.8,0.1,0.1\n"
    )
    monkeypatch.setattr(pipeline.stages.evaluate, "taken", lambda path, *_, **__: (made, []))
    monkeypatch.setattr(pipeline.stages.evaluate, "RunModel", lambda run, **options: Colours())
    return made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two kinds of images, of which three in five are recognised, and one that is broken."""
    folder = tmp_path / "new"
    for label, names in (("ape", ("red", "green", "grey")), ("bee", ("green", "blue"))):
        for name in names:
            paint(folder / label / f"{name}.png", PAINT[name])
    (folder / "bee" / "broken.png").write_bytes(b"no image")
    return folder


def test_scores_of_a_labelled_folder_are_those_worked_out_by_hand(images: Path) -> None:
    document = evaluate("run", images)
    assert document["format"] == 1
    assert [document[key] for key in ("run", "split", "images", "evaluated", "unlabelled")] == [
        "colours",
        None,
        6,
        5,
        0,
    ]
    assert (document["unreadable"], document["absent"]) == ({"not-an-image": 1}, ["file"])
    assert (document["classes"], document["confusion"]) == (list(CLASSES), [[2, 1, 0], [0, 1, 1], [0, 0, 0]])
    scores = document["scores"]
    assert (scores["accuracy"], scores["n"], scores["roc_auc"]) == (0.6, 5, None)
    assert scores["accuracy_interval"] == pytest.approx([0.230724, 0.882379], abs=1e-6)
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    smallest = np.finfo(float).eps
    assert scores["log_loss"] == pytest.approx(-np.log([0.8, smallest, 1 / 3, 1, 0.08]).mean(), rel=1e-6)
    assert scores["ece"] == pytest.approx((0.2 + 1 + 2 / 3 + 0.88) / 5)
    shares = {
        line["name"]: [line[key] for key in ("n", "predicted", "precision", "recall")] for line in document["per_class"]
    }
    assert shares == {"ape": [3, 2, 1.0, 2 / 3], "bee": [2, 2, 0.5, 0.5], "file": [0, 1, 0.0, None]}
    bins = [(round(line["high"] * 15), line["n"], line["accuracy"]) for line in document["reliability"]]
    assert bins == [(5, 1, 1.0), (12, 1, 1.0), (14, 1, 0.0), (15, 2, 0.5)]
    gaps = [line["n"] * abs(line["accuracy"] - line["confidence"]) for line in document["reliability"]]
    assert sum(gaps) / 5 == pytest.approx(scores["ece"])
    assert [(pair["label"], pair["predicted"], pair["count"]) for pair in document["confused"]] == [
        ("ape", "bee", 1),
        ("bee", "file", 1),
    ]


def test_the_command_prints_a_document_or_tables(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "run", str(images), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(evaluate("run", images)))
    assert main(["evaluate", "run", str(images)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{images}: 5 images by colours; set aside: 1 not-an-image"
    assert said[2].split()[:5] == ["5", "0.6000", "0.2307", "to", "0.8824"]
    assert ["ape", "3", "1.0000", "0.6667", "0.8000"] in [line.split() for line in said]
    assert ["bee", "0", "1", "1"] in [line.split() for line in said]  # its line of the confusion matrix
    assert ["0.93", "to", "1.00", "2", "1.0000", "0.5000"] in [line.split() for line in said]


def test_images_that_the_run_was_made_with_are_counted_by_content(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = evaluate("run", images)
    assert document["seen"] == {"train": None, "validation": 1}
    assert "of these 5 images, the run was made with 1 to validate it" in caplog.text
    (images / "ape" / "red.png").unlink()
    caplog.clear()
    assert evaluate("run", images)["seen"] == {"train": None, "validation": 0}
    assert "was made with" not in caplog.text


def test_damaged_predictions_of_the_run_do_not_cost_the_scores(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = evaluate("run", images)["scores"]
    (tmp_path / "predictions.csv").write_text("path,sha256\nr,no digest\n")
    document = evaluate("run", images)
    assert (document["scores"], document["seen"]) == (expected, {"train": None, "validation": None})
    assert "cannot be read as predictions" in caplog.text


def test_how_far_a_promise_is_kept_is_said(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five images, blue and both green ones are sure; of these one green one is taken for a bee and is an ape."""
    monkeypatch.setattr(Colours, "answers", PROMISE)
    document = evaluate("run", images)
    assert [document["answers"]["abstain"][key] for key in ("asked", "answered", "right", "coverage")] == [
        0.9,
        3,
        1,
        0.6,
    ]
    assert document["answers"]["abstain"]["precision"] == pytest.approx(1 / 3)
    assert document["answers"]["sets"]["coverage"] == 0.6
    said = summary(document)
    assert "answered: 3 of 5 images (0.6000), right in 0.3333 of them" in said
    assert "at least 0.9 was asked for" in said
    assert "sets: 0.6000 hold the true class" in said


def test_a_manifest_and_a_split_of_it(images: Path, run: SimpleNamespace) -> None:
    lines = [("ape/red.png", "ape", "train"), ("ape/green.png", "ape", "test"), ("bee/green.png", "bee", "test")]
    with open(images / "new.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "kind", "split"), *lines, ("bee/blue.png", "", "test")])
    run.target = "kind"  # the column that the run learned
    document = evaluate("run", images / "new.csv")
    assert (document["images"], document["unlabelled"], document["scores"]["accuracy"]) == (3, 1, 2 / 3)
    document = evaluate("run", images / "new.csv", split="test")
    assert (document["images"], document["scores"]["accuracy"], document["split"]) == (2, 0.5, "test")
    assert document["confusion"][:2] == [[0, 1, 0], [0, 1, 0]]
    with pytest.raises(
        SourceError, match=r"no labelled images in the split 'validation' \(its own splits: train, test\)"
    ):
        evaluate("run", images / "new.csv", split="validation")
    with pytest.raises(ConfigurationError, match=r"split: received 'tests'.*did you mean 'test'"):
        evaluate("run", images / "new.csv", split="tests")


def test_only_a_class_with_a_really_near_name_is_suggested() -> None:
    source = SimpleNamespace(description="new", classes=("pansy", "tulip"), labels=np.array([0, 1, 0]))
    with pytest.raises(SourceError) as caught:
        pipeline.stages.evaluate._labels(source, np.arange(3), "flowers", ("daisy", "tulips"))  # type: ignore[arg-type]
    assert "'pansy' (2 images), 'tulip' (1 image); did you mean 'tulips'?; expected daisy" in str(caught.value)


def test_classes_that_the_run_does_not_know_are_named_before_anything_is_loaded(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(pipeline.stages.evaluate, "RunModel", refuse)
    (images / "bee").rename(images / "bees")
    message = (
        r"new: 3 images of classes that colours does not know: 'bees' \(3 images\); did you mean 'bee'\?; expected ape, bee, "
        r"file\. Rename the folders or labels"
    )
    with pytest.raises(SourceError, match=message):
        evaluate("run", images)
    for number in range(40):
        paint(images / f"{number:03d}{'x' * 200}" / "a.png", PAINT["red"])
    with pytest.raises(SourceError, match="and 36 more; expected") as caught:
        evaluate("run", images)
    assert len(str(caught.value)) < 1000
    with pytest.raises(SourceError, match="no image has a label, so there is nothing to compare with"):
        evaluate("run", images / "ape")


def test_images_of_which_none_can_be_read_have_no_scores(images: Path) -> None:
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(TooManyUnreadableError, match="none of 6 labelled images could be read"):
        evaluate("run", images)
    assert main(["evaluate", "run", str(images)]) == 4


def test_a_summary_of_many_classes_lists_the_most_confused_pairs(images: Path) -> None:
    document = evaluate("run", images)
    document["classes"] = [f"class {k}" for k in range(11)]
    said = summary(document).splitlines()
    assert ["ape", "bee", "1"] in [line.split() for line in said]
    assert "  most often confused" in said


def test_a_run_of_folders_with_two_levels_is_scored_on_plain_folders_too(images: Path, run: SimpleNamespace) -> None:
    run.reading = Reading(class_level=2)
    assert evaluate("run", images)["evaluated"] == 5


def test_a_labels_file_decides_what_is_right_and_what_is_scored(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = evaluate("run", images)
    digest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in images.rglob("*.png")}
    book = Book(tmp_path / "labels.csv").add(digest["green.png"], "bee").add(digest["red.png"], "exclude")
    document = evaluate("run", images, labels=book.path)
    # green is there twice, as an ape and as a bee: the decision holds for both
    assert (plain["confusion"], document["confusion"]) == (
        [[2, 1, 0], [0, 1, 1], [0, 0, 0]],
        [[1, 0, 0], [0, 2, 1], [0, 0, 0]],
    )
    assert (document["images"], document["evaluated"], document["unlabelled"]) == (5, 4, 1)
    assert (document["labels"]["corrected"], document["labels"]["excluded"]) == (1, 1)
    assert f"{book.path}: 1 label corrected; 1 excluded (not trained on, not scored)" in caplog.text
    assert "labels" not in plain
    with pytest.raises(SourceError, match="1 image of classes that colours does not know: 'wolf'"):
        evaluate("run", images, labels=book.add(digest["blue.png"], "wolf").path)
