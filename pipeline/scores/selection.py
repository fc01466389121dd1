"""Choosing honestly: folds that keep classes and groups, intervals, and ties that go to the simpler and faster head."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.scores.metrics import RESAMPLES

SEARCH_ROWS = 20_000  # rows that take part in cross-validation; more change a choice little and cost much
CHOICES = ("accuracy", "balanced_accuracy")


def stratified_folds(y: np.ndarray, folds: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Deal the rows of each class over the folds; rows of one group go to one fold.

    Returns
    -------
    int64, (n,)
        Fold of each row; -1: only ever trained on (its class has one row, or one group), -2: left out, so that about
        `SEARCH_ROWS` take part. All -1 where no class has two rows.
    """
    if groups is not None and len(np.unique(groups)) < len(groups):
        return _grouped_folds(y, folds, seed, groups)
    generator = np.random.default_rng(seed)
    result = np.full(len(y), -1, dtype=np.int64)
    share = min(1.0, SEARCH_ROWS / len(y))
    start = 0  # the next class goes on where the last one stopped, which keeps the folds equally large
    counts = np.bincount(y)
    folds = min(folds, int(counts.max()))
    for k in np.flatnonzero(counts):
        rows = generator.permutation(np.flatnonzero(y == k))
        kept = max(2, round(share * len(rows)))
        result[rows[kept:]] = -2
        if len(rows) > 1:
            result[rows[:kept]] = (start + np.arange(len(rows[:kept]))) % folds
            start += len(rows[:kept])
    return result


def _grouped_folds(y: np.ndarray, folds: int, seed: int, groups: np.ndarray) -> np.ndarray:
    from sklearn.model_selection import StratifiedGroupKFold

    result = np.full(len(y), -1, dtype=np.int64)
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    sizes = np.bincount(groups)[names]
    kept = names[: max(2, int(np.searchsorted(np.cumsum(sizes), SEARCH_ROWS, side="right")))]
    rows = np.flatnonzero(np.isin(groups, kept))
    result[~np.isin(groups, kept)] = -2
    folds = min(folds, len(kept))
    if folds < 2:
        return np.full(len(y), -1, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer rows than folds, which are seen to below
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for fold, (_, tested) in enumerate(splitter.split(rows, y[rows], groups[rows])):
            result[rows[tested]] = fold
    for fold in range(folds):
        trained_on = np.unique(y[(result != -2) & (result != fold)])
        result[(result == fold) & ~np.isin(y, trained_on)] = -1  # else its class would be unknown to this fold
    found, result[result >= 0] = np.unique(result[result >= 0], return_inverse=True)
    return result if len(found) > 1 else np.full(len(y), -1, dtype=np.int64)


def balanced_accuracy_interval(labels: np.ndarray, predicted: np.ndarray, seed: int = 0) -> list[float]:
    """95 % percentile bootstrap of the mean recall, rows drawn within each class that occurs, [low, high]."""
    generator = np.random.default_rng(seed)
    recalls = []
    for k in np.unique(labels):
        right = predicted[labels == k] == k
        recalls.append(generator.binomial(len(right), right.mean(), size=RESAMPLES) / len(right))
    return [float(bound) for bound in np.quantile(np.mean(recalls, axis=0), (0.025, 0.975))]


class Candidate(NamedTuple):
    """What is compared (high is good), trained numbers (None: without a count), seconds of training."""

    score: float
    parameters: int | None
    seconds: float


def choose(candidates: Sequence[Candidate], low: float) -> int:
    """Number of the one to choose: of those that the best one's interval does not tell apart, the simplest and fastest.

    Parameters
    ----------
    candidates : sequence of Candidate
        Best first.
    low : float
        Lower end of the best one's interval.

    Notes
    -----
    Simple: few parameters; a head without a count (neighbours, trees) comes after those with one. Fast: the power of
    ten of the seconds, as smaller differences are noise. What is as simple and as fast goes by the score.
    """

    def order(number: int) -> tuple[float, ...]:
        candidate = candidates[number]
        count = math.inf if candidate.parameters is None else candidate.parameters
        return count, math.floor(math.log10(max(candidate.seconds, 0.1))), number

    return min((number for number, one in enumerate(candidates) if one.score >= low), key=order, default=0)
