"""What a report says of one run, worked out from its files: tables, calibration, mistakes. Pure numpy, no pictures."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from features.errors import RunError
from features.files import printable
from pipeline.config import History
from pipeline.runs.folder import Run, read_history, read_predictions
from pipeline.scores.metrics import BINS, confusion

MATRIX_CLASSES = 30  # above this a confusion matrix cannot be read, and the most confused pairs are listed
PAIRS = 40
CARDS = 12
ROUNDING = 1e-6  # of float32 probabilities
LARGEST = 1e100  # numbers that a chart can be scaled to


@dataclasses.dataclass(frozen=True)
class Rows:
    """Validation rows of a run.

    Parameters
    ----------
    paths : tuple of str, length n
        As the source names them.
    sha256 : tuple of bytes, length n
        Content hash of each image.
    labels : int32, (n,)
        True classes.
    probabilities : float64, (n, c), 0-1
        Of each class.
    classes : tuple of str, length c
        Names.
    """

    paths: tuple[str, ...]
    sha256: tuple[bytes, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """Most probable class, int64, (n,)."""
        return self.probabilities.argmax(axis=1)

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        """Probability of that class, float64, (n,)."""
        return self.probabilities.max(axis=1)

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """Whether it is the true one, bool, (n,)."""
        return self.predicted == self.labels

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Confusion matrix, int64, (c, c), true classes down."""
        return confusion(self.labels, self.predicted, len(self.classes))

    @classmethod
    def of(cls, run: Run) -> Rows:
        """Read ``predictions.csv``.

        Raises
        ------
        RunError
            If it is not what a run writes, or not about the images that ``metrics.json`` is about.
        """
        found, path = read_predictions(run), run.folder / "predictions.csv"
        if len(found.paths) != run.metrics["validation"]["n"]:
            raise RunError(
                f"{path}: holds {len(found.paths)} images, metrics.json is about {run.metrics['validation']['n']}; "
                "one of them was edited or cut off; train the head again"
            )
        if not ((found.probabilities >= -ROUNDING) & (found.probabilities <= 1 + ROUNDING)).all():
            raise RunError(f"{path}: holds probabilities that are not from 0 to 1; train the head again")
        digests = tuple(digest.tobytes() for digest in found.sha256)
        return cls(tuple(found.paths), digests, found.labels, found.probabilities, run.classes)


def curves_of(run: Run) -> History:
    """Columns of ``history.csv`` that a chart can show: numbers throughout."""
    history = read_history(run.folder)
    return {name: values for name, values in history.items() if all(abs(value) <= LARGEST for value in values)}


def class_table(rows: Rows) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of images of each class; None where there is nothing to divide by.

    Precision: of those predicted as the class, the share that is; recall: of the class, the share that is found;
    F1: their harmonic mean, 2 hits / (images + predictions).
    """
    hits, support, predicted = rows.table.diagonal(), rows.table.sum(axis=1), rows.table.sum(axis=0)
    return [
        {
            "name": printable(name),
            "n": int(support[k]),
            "predicted": int(predicted[k]),
            "precision": _share(hits[k], predicted[k]),
            "recall": _share(hits[k], support[k]),
            "f1": _share(2 * hits[k], support[k] + predicted[k]),
        }
        for k, name in enumerate(rows.classes)
    ]


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def confused_pairs(rows: Rows, limit: int = PAIRS) -> list[dict[str, Any]]:
    """Which class is taken for which other one, most often first, with the share of the true class."""
    table = rows.table.copy()
    np.fill_diagonal(table, 0)
    where = np.argwhere(table)
    order = np.argsort(-table[where[:, 0], where[:, 1]], kind="stable")[:limit]
    support = rows.table.sum(axis=1)
    return [
        {
            "label": printable(rows.classes[a]),
            "predicted": printable(rows.classes[b]),
            "count": int(table[a, b]),
            "n": int(support[a]),
            "share": float(table[a, b] / support[a]),
        }
        for a, b in where[order].tolist()
    ]


def matrix(rows: Rows) -> list[dict[str, Any]]:
    """Rows of the confusion matrix, for up to `MATRIX_CLASSES` classes.

    Each cell has a count, its share of the true class, and a step 0-10 of shade: of the hits that of the share, of
    the mistakes that of its root, so that rare ones are seen.
    """
    support = rows.table.sum(axis=1)
    lines = []
    for k, name in enumerate(rows.classes):
        cells = []
        for j, count in enumerate(rows.table[k].tolist()):
            share = count / support[k] if support[k] else 0.0
            step = math.ceil(10 * (share if j == k else math.sqrt(share)) - 1e-9)
            cells.append({"count": count, "share": share, "hit": j == k, "step": step, "name": rows.classes[j]})
        lines.append({"name": printable(name), "n": int(support[k]), "cells": cells})
    return lines


def reliability(rows: Rows) -> list[dict[str, Any]]:
    """Bins of the confidence, (low, high], that hold images: n, mean confidence, share that is right.

    The bins of ``pipeline.scores.metrics.calibration_error``: the mean of |accuracy - confidence|, weighted by n, is the ECE.
    """
    bins = np.clip(np.ceil(rows.confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return [
        {
            "low": k / BINS,
            "high": (k + 1) / BINS,
            "n": int(inside.sum()),
            "confidence": float(rows.confidence[inside].mean()),
            "accuracy": float(rows.correct[inside].mean()),
        }
        for k in range(BINS)
        if (inside := bins == k).any()
    ]


def most_confident_mistakes(rows: Rows, limit: int = CARDS) -> list[int]:
    """Row numbers of wrong predictions, the most confident first."""
    wrong = np.flatnonzero(~rows.correct)
    return wrong[np.argsort(-rows.confidence[wrong], kind="stable")][:limit].tolist()


def least_confident_hits(rows: Rows, limit: int = CARDS) -> list[int]:
    """Row numbers of right predictions, the least confident first."""
    right = np.flatnonzero(rows.correct)
    return right[np.argsort(rows.confidence[right], kind="stable")][:limit].tolist()


def card(rows: Rows, number: int) -> dict[str, Any]:
    """What is said of one image: file, class, prediction, and what came second."""
    ranked = np.argsort(-rows.probabilities[number], kind="stable")[:2].tolist()
    return {
        "file": printable(rows.paths[number]),
        "name": printable(rows.paths[number].rpartition("/")[2]),
        "label": printable(rows.classes[rows.labels[number]]),
        "predicted": printable(rows.classes[ranked[0]]),
        "correct": bool(rows.correct[number]),
        "confidence": float(rows.confidence[number]),
        "of_label": float(rows.probabilities[number, rows.labels[number]]),
        "second": printable(rows.classes[ranked[1]]),
        "of_second": float(rows.probabilities[number, ranked[1]]),
    }


def sample_rows(rows: Rows, limit: int, seed: int = 0) -> np.ndarray:
    """Row numbers to show where there is no room for all: mistakes up to a third of them, else drawn; int64, sorted."""
    if len(rows) <= limit:
        return np.arange(len(rows))
    generator = np.random.default_rng(seed)
    wrong = np.flatnonzero(~rows.correct)
    kept = wrong if len(wrong) <= limit // 3 else generator.choice(wrong, limit // 3, replace=False)
    others = np.setdiff1d(np.arange(len(rows)), kept)
    return np.sort(np.concatenate([kept, generator.choice(others, limit - len(kept), replace=False)]))


def exact_duplicates(
    sha256: np.ndarray, splits: np.ndarray, labels: np.ndarray, paths: Sequence[str]
) -> dict[str, Any]:
    """Files with the same bytes: how many in all, and groups that lie in two of train, validation and test.

    Parameters
    ----------
    sha256 : uint8, (n, 32)
        Content hashes.
    splits : int8, (n,)
        0, 1, 2 for train, validation and test.
    labels : int32, (n,)
        Classes; the same bytes may bear two of them.
    paths : sequence of str
        Names.
    """
    keys = np.ascontiguousarray(sha256).view("V32").ravel()
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    crossing, conflicts = [], 0
    members = np.flatnonzero(counts[inverse] > 1)
    order = members[np.argsort(inverse[members], kind="stable")]
    edges = np.flatnonzero(np.diff(inverse[order])) + 1
    for group in np.split(order, edges) if len(order) else ():
        conflicts += len(set(labels[group].tolist())) > 1
        if len(set(splits[group].tolist()) & {0, 1, 2}) > 1:
            crossing.append([printable(paths[row]) for row in group.tolist()])
    return {"copies": int(counts.sum() - len(counts)), "crossing": crossing, "conflicts": conflicts}
