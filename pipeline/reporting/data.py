"""What a report says about one run, computed from its files with numpy: tables, calibration, mistakes. Draws nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from features.errors import RunError
from features.files import printable
from pipeline.config import History
from pipeline.runs.folder import Run, read_history, read_predictions
from pipeline.scores.metrics import BINS, confusion
from pipeline.tasks.shown import Judged
from pipeline.tasks.table import CLASSIFICATION
from pipeline.tasks.task import Task

MATRIX_CLASSES = 30  # with more classes a confusion matrix is unreadable, and only the most confused pairs are listed
PAIRS = 40  # confused pairs that are listed
CARDS = 12  # mistakes, and correct predictions, that are shown
ROUNDING = 1e-6  # float32 probabilities may be outside 0-1 by this much
LARGEST = 1e100  # largest absolute value that a chart can show


@dataclasses.dataclass(frozen=True)
class Rows:
    """Validation rows of a run.

    Parameters
    ----------
    paths : tuple of str, length n
        Names of the images in their source.
    sha256 : tuple of bytes, length n
        Content hash of each image.
    labels : int32, (n,)
        True classes.
    probabilities : float64, (n, c), 0-1
        Probability of each class.
    classes : tuple of str, length c
        Names of the classes.
    task : Task
        What was predicted; of another task than classes ``labels`` are its targets (n, c), and ``probabilities`` its
        predictions.
    before : mapping
        Scores of the validation split, by which the task judges predictions.
    """

    paths: tuple[str, ...]
    sha256: tuple[bytes, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]
    task: Task = CLASSIFICATION
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """Most probable class, int64, (n,)."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @functools.cached_property
    def judged(self) -> Judged:
        """Which predictions are wrong, and how sure they are."""
        return self.task.judge(self.probabilities, self.labels, self.before)

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the predicted class, float64, (n,); of other tasks see `Task.judge`."""
        return self.judged.surety

    @property
    def correct(self) -> np.ndarray:
        """Whether the predicted class is the true one, bool, (n,); of other tasks see `Task.judge`."""
        return np.asarray(~self.judged.wrong)

    @property
    def table(self) -> np.ndarray:
        """Confusion matrix, int64, (c, c); its rows are true classes, its columns predicted ones. It grows with c squared."""
        return confusion(self.labels, self.predicted, len(self.classes))

    @functools.cached_property
    def support(self) -> np.ndarray:
        """Number of images of each class, int64, (c,)."""
        return np.bincount(self.labels, minlength=len(self.classes))

    @classmethod
    def of(cls, run: Run) -> Rows:
        """Read ``predictions.csv``.

        Raises
        ------
        RunError
            If the file is malformed, or holds probabilities that are none.
        """
        found, path = read_predictions(run), run.folder / "predictions.csv"
        inside = (found.probabilities >= -ROUNDING) & (found.probabilities <= 1 + ROUNDING)
        if run.task.answers and not inside.all():
            raise RunError(f"{path}: holds probabilities that are not between 0 and 1; train the head again")
        digests = tuple(digest.tobytes() for digest in found.sha256)
        before = run.metrics["validation"]
        return cls(tuple(found.paths), digests, found.labels, found.probabilities, run.classes, run.task, before)


def curves_of(run: Run) -> History:
    """Read the columns of ``history.csv`` that a chart can show: no value is beyond `LARGEST`."""
    history = read_history(run.folder)
    return {name: values for name, values in history.items() if all(abs(value) <= LARGEST for value in values)}


def class_table(rows: Rows) -> list[dict[str, Any]]:
    """Compute precision, recall, F1 and number of images of each class; None instead of a division by 0.

    Precision: share of the images predicted as the class that belong to it. Recall: share of the class's images that
    are predicted as it. F1: harmonic mean of both, 2 hits / (images + predictions).
    """
    count = len(rows.classes)
    hits, predicted = (np.bincount(some, minlength=count) for some in (rows.labels[rows.correct], rows.predicted))
    support = rows.support
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
    """List which class is mistaken for which other one, most often first, with the share of the true class."""
    wrong = np.stack([rows.labels, rows.predicted], axis=1)[~rows.correct]
    where, counts = np.unique(wrong, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [
        {
            "label": printable(rows.classes[a]),
            "predicted": printable(rows.classes[b]),
            "count": count,
            "n": int(rows.support[a]),
            "share": float(count / rows.support[a]),
        }
        for (a, b), count in zip(where[order].tolist(), counts[order].tolist(), strict=True)
    ]


def matrix(rows: Rows) -> list[dict[str, Any]]:
    """Describe the rows of the confusion matrix, for up to `MATRIX_CLASSES` classes.

    Each cell has a count, its share of the true class, and a shade from 0 to 10. The shade follows the share for hits,
    and the share's square root for mistakes, so that rare ones are visible.
    """
    lines = []
    for k, (name, counts) in enumerate(zip(rows.classes, rows.table.tolist(), strict=True)):
        cells = []
        for j, count in enumerate(counts):
            share = count / rows.support[k] if rows.support[k] else 0.0
            step = math.ceil(10 * (share if j == k else math.sqrt(share)) - 1e-9)
            cells.append({"count": count, "share": share, "hit": j == k, "step": step, "name": rows.classes[j]})
        lines.append({"name": printable(name), "n": int(rows.support[k]), "cells": cells})
    return lines


def reliability(rows: Rows) -> list[dict[str, Any]]:
    """Describe the bins of confidence, (low, high], that hold images: number, mean confidence and accuracy.

    Of labels it is the probability of each known one, and the share of them that hold; numbers have no bins.

    These are the bins of ``pipeline.scores.metrics.calibration_error``: the mean of |accuracy - confidence| over them,
    weighted by their numbers of images, is the expected calibration error (ECE).
    """
    found = rows.task.calibration(rows.probabilities, rows.labels)
    if found is None:
        return []
    bins = np.clip(np.ceil(found.values * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return [
        {
            "low": k / BINS,
            "high": (k + 1) / BINS,
            "n": int(inside.sum()),
            "confidence": float(found.values[inside].mean()),
            "accuracy": float(found.truth[inside].mean()),
        }
        for k in range(BINS)
        if (inside := bins == k).any()
    ]


def most_confident_mistakes(rows: Rows, limit: int = CARDS) -> list[int]:
    """Find the rows of wrong predictions, the most confident first."""
    wrong = np.flatnonzero(~rows.correct)
    return [int(row) for row in wrong[np.argsort(-rows.confidence[wrong], kind="stable")][:limit]]


def least_confident_hits(rows: Rows, limit: int = CARDS) -> list[int]:
    """Find the rows of correct predictions, the least confident first."""
    right = np.flatnonzero(rows.correct)
    return [int(row) for row in right[np.argsort(rows.confidence[right], kind="stable")][:limit]]


def card(rows: Rows, number: int) -> dict[str, Any]:
    """Describe one image: its file, and what its task says of it, see `pipeline.tasks.task.Task.lines`."""
    told = rows.task.lines(rows.probabilities[number], rows.labels[number], rows.classes, rows.before)
    return {
        "file": printable(rows.paths[number]),
        "name": printable(rows.paths[number].rpartition("/")[2]),
        "correct": bool(rows.correct[number]) if rows.task.answers else None,
        "lines": [line._replace(before=printable(line.before), name=printable(line.name)) for line in told],
    }


def sample_rows(rows: Rows, limit: int, seed: int = 0) -> np.ndarray:
    """Choose up to ``limit`` rows, int64, sorted: at most a third are mistakes, the others are drawn from the rest."""
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
    """Find files with the same bytes: count all copies, and list groups in more than one of train, validation and test.

    Parameters
    ----------
    sha256 : uint8, (n, 32)
        Content hashes.
    splits : int8, (n,)
        Index into ``SPLITS``; 0, 1, 2 are train, validation and test.
    labels : int32, (n,)
        Classes; copies of a file may have different ones.
    paths : sequence of str
        Names of the files.
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
