"""Folds that respect classes and groups, intervals of scores, and a choice that prefers simple and fast heads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.intervals import wilson_interval

SEARCH_ROWS = 20_000  # rows used in cross-validation; more rows cost much and rarely change a choice
FEW = 30  # validation images; with fewer, one of them moves the accuracy by more than 3 points
USUAL_FOLDS = 5  # folds that are suggested, and used in a sweep, where validation images are few
WORST_GROUP = "worst_group_accuracy"  # of the tables by group that a run has
CHOICES = ("accuracy", "balanced_accuracy", WORST_GROUP)


def stratified_folds(
    y: np.ndarray, folds: int, seed: int, groups: np.ndarray | None = None, *, most: int | None = None
) -> np.ndarray:
    """Distribute the rows of each class evenly over folds; the rows of a group are in one fold.

    Parameters
    ----------
    y : int32, (n,)
        Labels.
    folds : int
        Number of folds; fewer are made if no class has as many rows.
    seed : int
        Random seed of the distribution.
    groups : int64, (n,), optional
        Group of each row.
    most : int, optional
        Number of rows to use, about; default: `SEARCH_ROWS`.

    Returns
    -------
    int64, (n,)
        Fold of each row. -1: the row is only used for training, as its class has a single row or group. -2: the row is
        not used, so that about ``most`` rows are. All are -1 if no class has two rows.
    """
    most = SEARCH_ROWS if most is None else most
    if groups is not None and len(np.unique(groups)) < len(groups):
        return _grouped_folds(y, folds, seed, groups, most)
    generator = np.random.default_rng(seed)
    result = np.full(len(y), -1, dtype=np.int64)
    share = min(1.0, most / len(y))
    start = 0  # each class continues at the fold where the last one stopped, which keeps the folds equally large
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


def _grouped_folds(y: np.ndarray, folds: int, seed: int, groups: np.ndarray, most: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedGroupKFold

    result = np.full(len(y), -1, dtype=np.int64)
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    sizes = np.bincount(groups)[names]
    kept = names[: max(2, int(np.searchsorted(np.cumsum(sizes), most, side="right")))]
    rows = np.flatnonzero(np.isin(groups, kept))
    result[~np.isin(groups, kept)] = -2
    folds = min(folds, len(kept))
    if folds < 2:
        return np.full(len(y), -1, dtype=np.int64)
    if folds == len(kept):  # one group is left out at a time
        result[rows] = np.unique(groups[rows], return_inverse=True)[1]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about classes with fewer rows than folds, handled below
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            for fold, (_, tested) in enumerate(splitter.split(rows, y[rows], groups[rows])):
                result[rows[tested]] = fold
    for fold in range(folds):
        trained_on = np.unique(y[(result != -2) & (result != fold)])
        result[(result == fold) & ~np.isin(y, trained_on)] = -1  # otherwise the fold's training rows lack this class
    found, result[result >= 0] = np.unique(result[result >= 0], return_inverse=True)
    return result if len(found) > 1 else np.full(len(y), -1, dtype=np.int64)


def balanced_accuracy_interval(labels: np.ndarray, predicted: np.ndarray) -> list[float]:
    """95 % interval of the mean recall, [low, high], from Wilson's interval of the recall of each class that occurs.

    The distances of the bounds from the recalls are added as independent errors (MOVER: Zou and Donner, Statistics in
    Medicine 27, 2008). As for one accuracy, both bounds rise with the number of correct predictions of any class.
    """
    counts = [(int(np.sum(predicted[labels == k] == k)), int(np.sum(labels == k))) for k in np.unique(labels)]
    recalls = np.array([correct / n for correct, n in counts])
    low, high = np.array([wilson_interval(*count) for count in counts]).T
    below, above = (float(np.linalg.norm(bound - recalls)) / len(counts) for bound in (low, high))
    return [float(recalls.mean()) - below, float(recalls.mean()) + above]


class Candidate(NamedTuple):
    """A head to choose from: score (higher is better), number of parameters (None: unknown), training time in seconds."""

    score: float
    parameters: int | None
    seconds: float


def choose(candidates: Sequence[Candidate], low: float) -> int:
    """Choose the simplest and fastest of the candidates whose score lies within the interval of the best one.

    Parameters
    ----------
    candidates : sequence of Candidate
        Candidates, best score first.
    low : float
        Lower end of the interval of the best score.

    Returns
    -------
    int
        Index of the chosen candidate.

    Notes
    -----
    Candidates are compared by the number of parameters (those without a count, such as neighbours and trees, come last),
    then by the power of ten of their training time, as smaller differences are noise, then by their score.
    """

    def order(number: int) -> tuple[float, ...]:
        candidate = candidates[number]
        count = math.inf if candidate.parameters is None else candidate.parameters
        return count, math.floor(math.log10(max(candidate.seconds, 0.1))), number

    return min((number for number, one in enumerate(candidates) if one.score >= low), key=order, default=0)
