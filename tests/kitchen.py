"""What the tests of published experiments share: running one with few images, and what its runs have to say."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main

FLOWERS = "images/flowers17"
MOBILENET, VGG = "weights/mobilenet_v2_1.0_224_no_top.weights.h5", "weights/vgg16_no_top.weights.h5"


def cook(capsys: pytest.CaptureFixture[str], *arguments: Any, images: int = 64) -> dict[str, dict[str, dict[str, Any]]]:
    """A recipe with a few images and two epochs: way -> step -> its line."""
    typed = ["recipe", *map(str, arguments), "--limit", str(images), "--epochs", "2", "--json"]
    assert main(typed) == 0, capsys.readouterr().err
    out, errors = capsys.readouterr()
    assert "retracing" not in errors
    assert "Traceback" not in errors
    document = json.loads(out)
    assert (document["format"], document["recipe"]) == (1, arguments[0])
    ways: dict[str, dict[str, dict[str, Any]]] = {}
    for line in document["steps"]:
        assert line["seconds"] >= 0
        ways.setdefault(line["way"], {})[line["step"]] = line
    return ways


def history(run: str) -> dict[str, list[float]]:
    with open(Path(run) / "history.csv", newline="") as stream:
        lines = list(csv.DictReader(stream))
    return {name: [float(line[name]) for line in lines] for name in lines[0]}


def assert_best_epoch_is_kept(line: dict[str, Any]) -> None:
    """The most accurate on validation, of those the one with the lowest loss; and that is what the run predicts."""
    columns = history(line["document"]["run"])
    best = max(zip(columns["val_accuracy"], (-loss for loss in columns["val_loss"]), strict=True))
    after = line["document"]["after"]
    assert (after["accuracy"], -after["log_loss"]) == pytest.approx(best, abs=1e-12)
    assert line["accuracy"] == after["accuracy"]
    assert after["n"] == line["n"] > 0


def predicted(line: dict[str, Any]) -> list[dict[str, str]]:
    with open(line["document"]["out"], newline="") as stream:
        return list(csv.DictReader(stream))
