"""One class for each image: log loss, softmax, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from features.errors import HeadError
from pipeline import config
from pipeline.intervals import interval_of
from pipeline.scores.answers import find_threshold, kept, least_probability
from pipeline.scores.metrics import balanced_weights, evaluate, log_loss, softmax, two_columns
from pipeline.scores.selection import CHOICES, balanced_accuracy_interval, stratified_folds
from pipeline.tasks.shown import Calibration, Column, Judged, Line, Tile, Words
from pipeline.tasks.task import Rows, Scores, Task


class Classification(Task):
    """Labels int32 (n,); predictions are probabilities that add up to 1. Two classes have a single logit."""

    name = "classification"
    format = 1
    things = "classes"
    choices = CHOICES
    score = "accuracy"
    no_gain = "no more validation images are classified correctly than by"
    metrics_models = config.METRICS_FILES
    scores_model = config.Scores
    one_class = True
    promises = ("--abstain-precision", "--set-coverage", "--by")

    @property
    def head_file(self) -> dict[str, Any]:
        return {}

    @property
    def run_file(self) -> dict[str, Any]:
        return {"format": self.format}

    def check(self, y: np.ndarray, rows: int, names: Sequence[str]) -> tuple[str, ...]:
        if y.shape != (rows,) or not rows:
            raise HeadError(f"labels: received shape {y.shape}, expected one label for each of {rows} rows of features")
        if y.min() < 0:
            raise HeadError(f"labels: {int((y < 0).sum())} training rows are unlabelled (-1); label or remove them")
        classes = tuple(names) or tuple(str(k) for k in range(int(y.max()) + 1))
        config.check_classes(classes)
        counts = np.bincount(y, minlength=len(classes))
        if len(counts) > len(classes):
            raise HeadError(f"labels: received a label of {len(counts) - 1}, expected 0 to {len(classes) - 1}")
        missing = [repr(classes[k]) for k in np.flatnonzero(counts == 0)]
        if missing:
            raise HeadError(
                f"no training rows of {', '.join(missing)}: every class needs at least one. "
                "Add images of the class, choose another split (--split), or leave the class out"
            )
        if len(classes) < 2:
            raise HeadError(
                f"all training rows are of one class ({classes[0]!r}), but a classifier needs at least two. Add images "
                "of another class and extract again (existing features are kept)"
            )
        return classes

    def folds(self, y: np.ndarray, folds: int, seed: int, groups: np.ndarray | None) -> np.ndarray:
        return stratified_folds(y, folds, seed, groups)

    def outputs(self, names: int) -> int:
        return 1 if names == 2 else names

    def activate(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        return softmax(two_columns(logits) / temperature)

    loss_name = activation = "softmax"
    refused = ()

    def network_targets(
        self, y: np.ndarray, scale: tuple[np.ndarray, np.ndarray] | None, *, balanced: bool = False
    ) -> np.ndarray:
        return y

    def row_weights(self, y: np.ndarray) -> np.ndarray | None:
        return balanced_weights(y)

    def loss(self, predictions: np.ndarray, y: np.ndarray, trained: np.ndarray) -> float:
        return log_loss(predictions, y)

    def evaluate(
        self, predictions: np.ndarray, y: np.ndarray, names: Sequence[str], before: Mapping[str, Any] | None = None
    ) -> Scores:
        return evaluate(predictions, y, names)

    def order(self, scores: Mapping[str, Any], by: str) -> tuple[float, float]:
        return -scores[by], scores["log_loss"]

    def low(self, scores: Mapping[str, Any], by: str, rows: Callable[[], Rows] | None) -> float:
        low = interval_of(scores)[0]
        if by != "balanced_accuracy":
            return low
        if rows is None:  # the interval of the accuracy, shifted, as both intervals are about equally wide
            return float(low + scores["balanced_accuracy"] - scores["accuracy"])
        labels, values = rows()
        return balanced_accuracy_interval(labels, values.argmax(axis=1))[0]

    def gained(self, scores: Mapping[str, Any], rival: Mapping[str, Any]) -> str:
        return f"{(scores['accuracy'] - rival['accuracy']) * scores['n']:+.0f} of {scores['n']} images"

    def columns(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "images": scores["n"],
            "accuracy": scores["accuracy"],
            "95 % interval": interval_of(scores),
            "log loss": scores["log_loss"],
        }

    def board(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        names = ("accuracy", "accuracy_interval", "balanced_accuracy", "log_loss", "ece", "n")
        return {name: scores[name] for name in names}

    def board_folds(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        return {"cv_accuracy": scores.get("accuracy"), "cv_interval": scores.get("accuracy_interval")}

    def promise(
        self, values: np.ndarray, y: np.ndarray, asked: tuple[float | None, float], groups: np.ndarray | None
    ) -> dict[str, Any]:
        precision, coverage = asked
        abstain = None
        if precision is not None:
            found = find_threshold(values.max(axis=1), values.argmax(axis=1) == y, precision, groups)
            abstain = {**found._asdict(), "coverage": found.coverage}
        sets = {"coverage": coverage, "least": least_probability(values, y, coverage, groups)}
        return {"abstain": abstain, "sets": sets}

    def kept(self, values: np.ndarray, y: np.ndarray, answers: Mapping[str, Any]) -> dict[str, Any]:
        return kept(values, y, answers)

    board_columns = (
        Column("accuracy", "Accuracy", "descending"),
        Column("balanced_accuracy", "Balanced", "descending", "Balanced accuracy: mean recall over the classes"),
        Column("log_loss", "Log loss"),
        Column("ece", "ECE", hint="Expected calibration error"),
    )
    mistakes = Words(
        "Most confident mistakes",
        "Wrong with high confidence: look here for wrong labels.",
        "There are no mistakes among",
    )
    hits = Words(
        "Least confident correct predictions",
        "Correct, but only just: more images like these would help most.",
        "It gets no validation image right.",
    )

    def interval(self, scores: Mapping[str, Any]) -> list[float]:
        return interval_of(scores)

    def headline(self, scores: Mapping[str, Any]) -> str:
        return f"gets {round(scores['accuracy'] * scores['n']):,} of {scores['n']:,} validation images right"

    def tiles(self, scores: Mapping[str, Any]) -> list[Tile]:
        return [
            Tile("Balanced accuracy", scores["balanced_accuracy"]),
            Tile("Macro F1", scores["macro_f1"]),
            Tile("Log loss", scores["log_loss"]),
            Tile("ROC AUC", scores["roc_auc"], "" if scores["roc_auc"] is not None else "a class does not occur"),
            Tile("Calibration error", scores["ece"]),
        ]

    def judge(self, values: np.ndarray, y: np.ndarray, before: Mapping[str, Any]) -> Judged:
        return Judged(np.asarray(values.argmax(axis=1) != y), np.asarray(values.max(axis=1)))

    def lines(self, values: np.ndarray, y: Any, names: Sequence[str], before: Mapping[str, Any]) -> list[Line]:
        best, second = np.argsort(-values, kind="stable")[:2].tolist()
        other = ("next:", second) if best == y else ("is:", int(y))
        return [
            Line("", names[best], float(values[best])),
            Line(other[0], names[other[1]], float(values[other[1]])),
        ]

    def kinds(self, y: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        return y, tuple(names)

    def calibration(self, values: np.ndarray, y: np.ndarray) -> Calibration:
        hint = "Are 80 % of the images predicted with 80 % confidence correct? If so, the bars reach the diagonal."
        found = self.judge(values, y, {})
        return Calibration(hint, "confidence", "images", "correct", found.surety, ~found.wrong)

    def given(self, values: np.ndarray, names: Sequence[str], before: Mapping[str, Any]) -> list[int]:
        return [int(values.argmax())]

    def header(self, names: Sequence[str]) -> list[str]:
        return ["label", "predicted", "correct", *names]

    def cells(self, y: Any, values: np.ndarray, names: Sequence[str]) -> list[str]:
        guess = int(values.argmax())
        return [names[y], names[guess], str(guess == y).lower(), *(f"{value:.9g}" for value in values)]

    def parsed(self, lines: Sequence[Sequence[str]], names: Sequence[str]) -> Rows:
        numbers = {name: k for k, name in enumerate(names)}
        labels = np.array([numbers[line[2]] for line in lines], np.int32)
        return labels, np.array([line[5:] for line in lines], np.float64).reshape(len(lines), len(names))
