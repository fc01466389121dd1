"""Any number of labels for each image: sigmoid cross-entropy for each label, average precision.

An unknown label counts nowhere: neither in training nor in a score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeFloat

from features.errors import HeadError
from features.sources.splits import listed
from features.targets import UNKNOWN, known_cells
from pipeline.config import Count, GroupLine, LabelAnswers, Settings, Share, check_classes
from pipeline.intervals import wilson_interval
from pipeline.scores.answers import (
    answers_kept,
    class_sets,
    conformal_quantile,
    find_label_threshold,
    is_answered,
    sets_kept,
)
from pipeline.scores.metrics import BINS
from pipeline.scores.selection import WORST_GROUP
from pipeline.tasks.bootstrap import percentiles, row_weights
from pipeline.tasks.folds import iterative_folds
from pipeline.tasks.shown import Calibration, Column, Judged, Line, Table, Tile, Words
from pipeline.tasks.task import Rows, Scores, Task, metrics_file, packed

HALF = 0.5  # the threshold of a label that holds nowhere in the validation split
WRONG_LABELS = 3  # labels of one image that a report names
_CELLS = {0: "0", 1: "1", UNKNOWN: ""}


class LabelScores(Settings):
    """Scores of one label; those that need images with and without it are None where there are none."""

    name: str
    n: int = Field(ge=0, le=10**12)
    positives: int = Field(ge=0, le=10**12)
    average_precision: Share | None
    roc_auc: Share | None
    f1: Share | None
    threshold: Share


class MultilabelScores(Settings):
    """Scores of one split; means are over the labels that have a score."""

    average_precision: Share
    average_precision_interval: tuple[Share, Share]
    micro_average_precision: Share
    roc_auc: Share | None
    f1: Share
    exact_match: Share
    exact_match_interval: tuple[Share, Share]
    log_loss: NonNegativeFloat
    ece: Share
    n: Count
    per_class: Annotated[tuple[LabelScores, ...], Field(min_length=1)]


class Multilabel(Task):
    """Targets uint8 (n, c): 1, 0, or 255 for unknown. Predictions are the probability of each label."""

    name = "multilabel"
    things = "labels"
    choices = ("average_precision", "micro_average_precision", "f1", WORST_GROUP)
    promises = ("--abstain-precision", "--set-coverage", "--by")
    metrics_models = (metrics_file(MultilabelScores, LabelAnswers, GroupLine),)
    score = "mean average precision"
    no_gain = f"the {score} is no higher than that of"
    scores_model = MultilabelScores

    def check(self, y: np.ndarray, rows: int, names: Sequence[str]) -> tuple[str, ...]:
        if y.ndim != 2 or len(y) != rows or y.shape[1] != (len(names) or y.shape[1]) or not y.size:
            raise HeadError(f"labels: received {y.shape}, expected {rows} rows of {len(names) or 'some'} labels")
        names = tuple(names) or tuple(str(k) for k in range(y.shape[1]))
        check_classes(names)
        for value, what in ((1, "has"), (0, "lacks")):
            missing = [name for name, there in zip(names, (y == value).any(axis=0), strict=True) if not there]
            if missing:
                raise HeadError(
                    f"no training image {what} the label {listed(missing)}, so it cannot be learned. Add such images; or "
                    "extract again with --split stratified, which gives train some of each label, or without the label "
                    "(features are kept)"
                )
        return names

    def folds(self, y: np.ndarray, folds: int, seed: int, groups: np.ndarray | None) -> np.ndarray:
        return iterative_folds(y == 1, folds, seed, groups)

    def outputs(self, names: int) -> int:
        return names

    def activate(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        from scipy.special import expit

        return np.asarray(expit(np.asarray(logits, np.float64) / temperature))

    loss_name = activation = "sigmoid"

    def network_targets(
        self, y: np.ndarray, scale: tuple[np.ndarray, np.ndarray] | None, *, balanced: bool = False
    ) -> np.ndarray:
        return packed(y, scale, balanced_weights(y) if balanced else None)

    def loss(self, predictions: np.ndarray, y: np.ndarray, trained: np.ndarray) -> float:
        return cell_loss(predictions, y)

    def evaluate(
        self, predictions: np.ndarray, y: np.ndarray, names: Sequence[str], before: Mapping[str, Any] | None = None
    ) -> Scores:
        """Score predictions; the threshold of each label is that of ``before``, else the one with the best F1 here."""
        from sklearn.metrics import average_precision_score

        values = np.asarray(predictions, np.float64)
        _check(values, y, names)
        known = known_cells(y)
        chosen = (
            [line["threshold"] for line in before["per_class"]]
            if before and before["per_class"]
            else [None] * len(names)
        )
        lines = [
            _label_scores(name, values[there, k], y[there, k] == 1, threshold)
            for k, (name, there, threshold) in enumerate(zip(names, known.T, chosen, strict=True))
        ]
        holds = values >= np.array([line["threshold"] for line in lines])
        right = ((holds == (y == 1)) | ~known).all(axis=1)
        truth, flat = y[known] == 1, values[known]
        return {
            "average_precision": (macro := _mean(lines, "average_precision")),
            "average_precision_interval": percentiles(_sampled_precision(values, y), macro),
            "micro_average_precision": float(average_precision_score(truth, flat)) if truth.any() else 0.0,
            "roc_auc": _mean(lines, "roc_auc") if any(line["roc_auc"] is not None for line in lines) else None,
            "f1": _mean(lines, "f1"),
            "exact_match": float(right.mean()),
            "exact_match_interval": wilson_interval(int(right.sum()), len(right)),
            "log_loss": cell_loss(values, y),
            "ece": _calibration(flat, truth),
            "n": len(y),
            "per_class": lines,
        }

    def chosen(self, rows: Callable[[], Rows], names: Sequence[str]) -> Scores | None:
        y, values = rows()
        return self.evaluate(values, y, names)

    def order(self, scores: Mapping[str, Any], by: str) -> tuple[float, float]:
        return -scores[by], scores["log_loss"]

    def low(self, scores: Mapping[str, Any], by: str, rows: Callable[[], Rows] | None) -> float:
        """The interval of the mean average precision; that of another score is taken to be equally wide."""
        return float(scores[by] - scores["average_precision"] + scores["average_precision_interval"][0])

    def columns(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "images": scores["n"],
            "mean AP": scores["average_precision"],
            "95 % interval": scores["average_precision_interval"],
            "F1": scores["f1"],
            "all labels right": scores["exact_match"],
        }

    def board(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        names = ("average_precision", "average_precision_interval", "micro_average_precision", "f1", "exact_match")
        return {name: scores[name] for name in (*names, "log_loss", "ece", "n")}

    def promise(
        self, values: np.ndarray, y: np.ndarray, asked: tuple[float | None, float], groups: np.ndarray | None
    ) -> dict[str, Any]:
        """Sets that hold all labels of an image: its score is the least probability of a label that it has.

        With a precision, the probability from which on labels are sure. Unknown labels count nowhere.
        """
        found: dict[str, Any] = {}
        if asked[0] is not None:
            sure = find_label_threshold(*_surest(values, y), asked[0], groups)
            found["abstain"] = {**sure._asdict(), "coverage": sure.coverage, "given": "labels"}
        least = np.where(y == 1, np.asarray(values, np.float32), 1.0).min(axis=1)
        return {
            **found,
            "sets": {"coverage": asked[1], "least": max(0.0, -conformal_quantile(-least, asked[1], groups))},
        }

    def kept(self, values: np.ndarray, y: np.ndarray, answers: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if abstain := answers.get("abstain"):
            given, wrong = (is_answered(some, abstain["threshold"]) for some in _surest(values, y))
            found["abstain"] = answers_kept(int(given.sum()), int((given & ~wrong).sum()), len(y), abstain)
        inside = class_sets(values, answers["sets"]["least"])
        return {**found, "sets": sets_kept(inside, (inside | (y != 1)).all(axis=1), answers["sets"])}

    def told(self, values: np.ndarray, names: Sequence[str], answers: Mapping[str, Any]) -> dict[str, Any]:
        """Whether no label is sure enough (``abstain``), those that are (``sure``), and the set that holds all labels."""
        found: dict[str, Any] = {}
        if abstain := answers.get("abstain"):
            sure = is_answered(values, abstain["threshold"])
            found = {
                "abstain": not sure.any(),
                "sure": [name for name, there in zip(names, sure, strict=True) if there],
            }
        inside = class_sets(values, answers["sets"]["least"])
        return {**found, "set": [name for name, there in zip(names, inside, strict=True) if there]}

    board_columns = (
        Column("average_precision", "Mean AP", "descending", "Mean of the average precisions of the labels"),
        Column("micro_average_precision", "Micro AP", "descending", "Average precision of all labels together"),
        Column("f1", "F1", "descending", "Mean F1 of the labels, at thresholds chosen on the validation images"),
        Column("exact_match", "All right", "descending", "Share of the images all of whose labels are right"),
        Column("log_loss", "Log loss"),
    )
    mistakes = Words(
        "Most confident mistakes",
        "A label is far on the wrong side of its threshold: look here for wrong or missing labels.",
        "There are no mistakes among",
    )
    hits = Words(
        "Least confident correct predictions",
        "All labels are right, but one only just: more images like these would help most.",
        "It gets all labels right of no validation image.",
    )

    def headline(self, scores: Mapping[str, Any]) -> str:
        right = round(scores["exact_match"] * scores["n"])
        return f"gets all labels right of {right:,} of {scores['n']:,} validation images"

    def tiles(self, scores: Mapping[str, Any]) -> list[Tile]:
        low, high = scores["exact_match_interval"]
        return [
            Tile("Micro AP", scores["micro_average_precision"]),
            Tile("ROC AUC", scores["roc_auc"], "" if scores["roc_auc"] is not None else "no label has both"),
            Tile("F1", scores["f1"]),
            Tile("All labels right", scores["exact_match"], f"{low:.4f} to {high:.4f}"),
            Tile("Log loss", scores["log_loss"]),
            Tile("Calibration error", scores["ece"]),
        ]

    def judge(self, values: np.ndarray, y: np.ndarray, before: Mapping[str, Any]) -> Judged:
        """Wrong: a known label is on the other side of its threshold; sure: by the farthest of those, else by the nearest."""
        margins, known = values - thresholds_of(before), known_cells(y)
        missed = known & ((margins >= 0) != (y == 1))
        wrong, far = missed.any(axis=1), np.abs(margins)
        return Judged(wrong, np.where(wrong, np.where(missed, far, 0).max(axis=1), np.where(known, far, 1).min(axis=1)))

    def lines(self, values: np.ndarray, y: Any, names: Sequence[str], before: Mapping[str, Any]) -> list[Line]:
        held, margins = labels_of(values, names, before), values - thresholds_of(before)
        wrong = np.flatnonzero(known_cells(y) & ((margins >= 0) != (y == 1)))
        wrong = wrong[np.argsort(-np.abs(margins[wrong]), kind="stable")][:WRONG_LABELS]
        found = [Line("", ", ".join(held) or "no label")]
        found += [Line("is:" if y[k] == 1 else "is not:", names[k], float(values[k])) for k in wrong.tolist()]
        if not len(wrong):
            nearest = int(np.abs(margins).argmin())
            found.append(Line("nearest:", names[nearest], float(values[nearest])))
        return found

    def kinds(self, y: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """The rarest label that holds."""
        holds = y == 1
        rarest = np.where(holds, holds.sum(axis=0), len(y) + 1).argmin(axis=1)
        return np.where(holds.any(axis=1), rarest, len(names)), (*names, "no label")

    def table(self, scores: Mapping[str, Any]) -> Table:
        hint = (
            "AP: average precision, the mean of the precision over the images that have the label. F1 is that at the "
            "threshold, which was chosen on the validation images."
        )
        columns = (
            Column("average_precision", "AP"),
            Column("roc_auc", "ROC AUC"),
            Column("f1", "F1"),
            Column("threshold", "Threshold"),
            Column("positives", "With it", "descending"),
            Column("n", "Known", "descending"),
        )
        return Table("Labels", hint, "Label", columns, tuple(scores["per_class"]))

    def calibration(self, values: np.ndarray, y: np.ndarray) -> Calibration:
        known = known_cells(y)
        hint = "Do 80 % of the labels hold that are given a probability of 80 %? If so, the bars reach the diagonal."
        return Calibration(hint, "probability", "labels", "hold", values[known], y[known] == 1)

    def header(self, names: Sequence[str]) -> list[str]:
        return [*(f"true:{name}" for name in names), *names]

    def cells(self, y: Any, values: np.ndarray, names: Sequence[str]) -> list[str]:
        return [*(_CELLS[int(value)] for value in y), *(f"{value:.9g}" for value in values)]

    def parsed(self, lines: Sequence[Sequence[str]], names: Sequence[str]) -> Rows:
        numbers = {text: value for value, text in _CELLS.items()}
        y = [[numbers[cell] for cell in line[2 : 2 + len(names)]] for line in lines]
        values = [line[2 + len(names) :] for line in lines]
        shape = len(lines), len(names)
        return np.array(y, np.uint8).reshape(shape), np.array(values, np.float64).reshape(shape)

    def given(self, values: np.ndarray, names: Sequence[str], before: Mapping[str, Any]) -> list[int]:
        chosen = set(labels_of(values, names, before))
        return [number for number, name in enumerate(names) if name in chosen]

    def answer(self, values: np.ndarray, names: Sequence[str], before: Mapping[str, Any]) -> dict[str, Any]:
        return {"labels": labels_of(values, names, before)}


def balanced_weights(y: np.ndarray) -> np.ndarray:
    """Weight of each cell, float64 (n, c): known / (2 x those alike in its column), 0 for unknown; scikit-learn's "balanced"."""
    known = known_cells(y)
    positives, total = (y == 1).sum(axis=0), known.sum(axis=0)
    shares = np.where(y == 1, total / (2 * np.maximum(positives, 1)), total / (2 * np.maximum(total - positives, 1)))
    return np.asarray(shares * known)


def _surest(values: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest probability of a known label of each image, and of one that does not hold; -inf where there is none."""
    known = known_cells(y)
    surest = np.where(known, values, -np.inf).max(axis=1)
    return surest, np.where(known & (y != 1), values, -np.inf).max(axis=1)


def thresholds_of(before: Mapping[str, Any]) -> np.ndarray:
    """The threshold of each label that was chosen on the validation split, float64 (c,)."""
    return np.array([line["threshold"] for line in before["per_class"]])


def labels_of(values: np.ndarray, names: Sequence[str], before: Mapping[str, Any]) -> list[str]:
    """The labels whose probability reaches the threshold that was chosen on the validation split."""
    thresholds = {line["name"]: line["threshold"] for line in before["per_class"]}
    return [name for name, value in zip(names, values, strict=True) if value >= thresholds[name]]


def cell_loss(values: np.ndarray, y: np.ndarray) -> float:
    """Mean of -ln(probability of what is true) over the known cells; clipped as in scikit-learn."""
    known, smallest = known_cells(y), np.finfo(np.float64).eps
    chosen = np.where(y == 1, values, 1 - values)[known]
    return float(-np.log(np.clip(chosen, smallest, 1 - smallest)).mean())


def _label_scores(name: str, values: np.ndarray, truth: np.ndarray, threshold: float | None) -> dict[str, Any]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    both = bool(truth.any()) and not truth.all()
    if threshold is None:
        threshold = best_threshold(values, truth)
    holds = values >= threshold
    hits = int((holds & truth).sum())
    return {
        "name": name,
        "n": len(truth),
        "positives": int(truth.sum()),
        "average_precision": float(average_precision_score(truth, values)) if truth.any() else None,
        "roc_auc": float(roc_auc_score(truth, values)) if both else None,
        "f1": 2 * hits / int(holds.sum() + truth.sum()) if truth.any() else None,
        "threshold": float(threshold),
    }


def best_threshold(values: np.ndarray, truth: np.ndarray) -> float:
    """The threshold with the best F1, halfway to the next lower value; of equal ones the highest; 0.5 without positives."""
    if not truth.any():
        return HALF
    order = np.argsort(-values, kind="stable")
    ranked, hits = values[order], np.cumsum(truth[order])
    last = np.append(ranked[1:] < ranked[:-1], True)  # of equal values
    f1 = np.where(last, 2 * hits / (np.arange(1, len(values) + 1) + hits[-1]), -1)
    best = int(np.argmax(f1))
    return float((ranked[best] + ranked[best + 1]) / 2) if best + 1 < len(ranked) else float(ranked[best])


def _sampled_precision(values: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The mean average precision of each sample of the bootstrap, float64, (samples,)."""
    weights, known = row_weights(len(y)), known_cells(y)
    found = []
    for k in np.flatnonzero((y == 1).any(axis=0)):
        rows = np.flatnonzero(known[:, k])
        rows = rows[np.argsort(-values[rows, k], kind="stable")]
        ranked = values[rows, k]
        ends = np.searchsorted(-ranked, -ranked, side="right") - 1  # equal values are one threshold
        weight = weights[:, rows]
        positive = weight * (y[rows, k] == 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = (np.cumsum(positive, axis=1) / np.cumsum(weight, axis=1))[:, ends]
            found.append(np.nansum(precision * positive, axis=1) / positive.sum(axis=1))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.mean(found, axis=0), np.float64)


def _calibration(values: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error of the probability of a label over 15 bins of equal width; see `calibration_error`."""
    bins = np.clip(np.ceil(values * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return float(np.abs(np.bincount(bins, weights=truth - values, minlength=BINS)).sum() / len(values))


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([line[name] for line in lines if line[name] is not None] or [0.0]))


def _check(values: np.ndarray, y: np.ndarray, names: Sequence[str]) -> None:
    expected = (len(y), len(names))
    if values.shape != expected or y.shape != expected or not y.size:
        raise HeadError(f"predictions: received {values.shape} for targets {y.shape}, expected {expected} for both")
    if odd := int(np.sum(~np.isfinite(values).all(axis=1))):
        raise HeadError(f"predictions: {odd} of {len(y)} rows are not finite")
    if not known_cells(y).any():
        raise HeadError("none of the targets is known, so predictions cannot be scored")
