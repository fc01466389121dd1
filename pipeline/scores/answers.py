"""Answers one can act on: from which confidence on a model is right often enough, and sets or intervals that hold the truth.

    held-out rows: confidence, right --`find_threshold`--> confidence below which no answer is given
    held-out rows: score of the truth --`conformal_quantile`--> sets of classes, or the half width of an interval

The rows must have had no part in training the model or in choosing it. What is promised holds for new images of the kind that
these rows are, on average over the draw of both. Where rows have groups (patients, cameras), the groups must be
exchangeable instead of the rows: a new image is then one of a new group.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.intervals import wilson_interval

DOUBT = 0.05  # chance that the precision of the answers is below the one asked for
SURE = 1e-9  # rounding of the last bits in sums of shares


class Abstention(NamedTuple):
    """The confidence from which on answers are given, and how right they were on the held-out rows.

    ``threshold`` is None if no confidence suffices: then no answer is given. Of ``n`` rows, one for each group,
    ``answered`` had at least this confidence, and ``right`` of them were right. ``bound`` is the one-sided 95 % lower bound of
    the precision, at least ``precision``; 0 without a threshold. ``needed`` is how many answers without a fault the
    bound needs.
    """

    precision: float
    threshold: float | None
    n: int
    answered: int
    right: int
    bound: float
    needed: int

    @property
    def coverage(self) -> float:
        """Share of the held-out rows that were answered."""
        return self.answered / self.n


def lower_bound(right: int, n: int) -> float:
    """One-sided 95 % lower bound of a share (Clopper and Pearson, Biometrika 26, 1934).

    Examples
    --------
    >>> [round(lower_bound(*counts), 4) for counts in ((299, 299), (298, 299), (0, 10))]
    [0.99, 0.9842, 0.0]
    """
    from scipy import special

    return float(special.betaincinv(right, n - right + 1, DOUBT)) if right else 0.0


def is_enough(right: int, n: int, precision: float) -> bool:
    """Whether `lower_bound` is at least ``precision``: so few faults would be rare if the true share were lower."""
    from scipy import special

    return n > 0 and bool(special.bdtr(n - right, n, 1 - precision) <= DOUBT)


def faultless(precision: float) -> int:
    """Number of answers, all right, whose `lower_bound` reaches a precision, 0-1.

    Examples
    --------
    >>> [faultless(precision) for precision in (0.9, 0.95, 0.99)]
    [29, 59, 299]
    """
    return math.ceil(math.log(DOUBT) / math.log(precision))


def steps(rows: int, precision: float) -> Iterator[int]:
    """Numbers of answers to test, in this order: each is the least at which one more fault is allowed; all rows come last.

    They depend on nothing but the number of rows and the precision, as a sequence that is fixed beforehand must.

    Examples
    --------
    >>> list(steps(1000, 0.99))
    [299, 473, 628, 773, 913, 1000]
    """
    last = 0
    for faults in range(rows):
        more = range(last + 1, rows + 1)
        found = bisect.bisect_left(more, True, key=functools.partial(_forgives, faults, precision))
        if found == len(more):
            break
        last = more[found]
        yield last
    if 0 < last < rows:
        yield rows


def _forgives(faults: int, precision: float, n: int) -> bool:
    return is_enough(n - faults, n, precision)


def find_threshold(
    confidence: np.ndarray, right: np.ndarray, precision: float, groups: np.ndarray | None = None
) -> Abstention:
    """Find the lowest confidence from which on answers are right with a given precision.

    Parameters
    ----------
    confidence : float, (n,)
        What the model says of its answer; higher is surer. It is compared in float32.
    right : bool, (n,)
        Whether the answer is right.
    precision : float, 0 < precision < 1
        Share of the answers that shall be right.
    groups : int, (n,), optional
        Group of each row. One row of each, drawn with a fixed seed, is used, because rows of a group are alike: as many
        of them tell less than the bound assumes.

    Notes
    -----
    Learn then test (Angelopoulos et al., 2021) with fixed-sequence testing: the hypotheses "the precision at this confidence is
    too low" are tested from the strictest threshold on, each at 5 %, and the first that is not rejected ends the
    sequence. The chance that the threshold found has too low a precision is then at most 5 %, if answers of more confidence are
    not less often right.

    Examples
    --------
    >>> found = find_threshold(np.linspace(0, 1, 400), np.arange(400) >= 60, 0.95)
    >>> found.answered, found.right, round(found.threshold, 3)
    (336, 336, 0.16)
    """
    confidence = np.asarray(confidence, np.float32)
    return find_label_threshold(confidence, np.where(right, -np.inf, confidence), precision, groups)


def find_label_threshold(
    surest: np.ndarray, surest_wrong: np.ndarray, precision: float, groups: np.ndarray | None = None
) -> Abstention:
    """Find the lowest probability from which on labels are given, so that all that an image is given are right often enough.

    An image is one decision, however many labels it is given, as its labels depend on each other. It is answered if it is given
    any label, and right if none of these is wrong. So the share of images with a wrong label among those answered is
    bounded, and with it the share of wrong labels, an image counting once. Other parameters and notes are those of
    `find_threshold`.

    Parameters
    ----------
    surest : float, (n,)
        Largest probability of a label of each image.
    surest_wrong : float, (n,)
        Largest probability of a label that does not hold; -inf if there is none.

    Examples
    --------
    >>> found = find_label_threshold(np.full(100, 0.9), np.full(100, 0.6), 0.95)
    >>> round(found.threshold, 3), found.answered, found.right
    (0.9, 100, 100)
    """
    confidence, wrong = np.asarray(surest, np.float32), np.asarray(surest_wrong, np.float32)
    if groups is not None:
        rows = one_of_each(groups)
        confidence, wrong = confidence[rows], wrong[rows]
    order = np.argsort(-confidence, kind="stable")
    falling, faults = confidence[order], np.sort(-wrong)
    needed = faultless(precision)
    found = Abstention(precision, None, len(order), 0, 0, 0.0, needed)
    for step in steps(len(order), precision):
        threshold = falling[step - 1]
        answered = int(
            np.searchsorted(-falling, -threshold, side="right")
        )  # rows that are just as sure are answered too
        count = answered - int(np.searchsorted(faults, -threshold, side="right"))
        if not is_enough(count, answered, precision):
            break
        found = Abstention(
            precision, float(threshold), len(order), answered, count, lower_bound(count, answered), needed
        )
    return found


def is_answered(confidence: np.ndarray, threshold: float | None) -> np.ndarray:
    """Whether answers of a confidence are given, bool, (n,); none is where ``threshold`` is None."""
    if threshold is None:
        return np.zeros(np.shape(confidence), bool)
    return np.asarray(np.asarray(confidence, np.float32) >= np.float32(threshold))


def one_of_each(groups: np.ndarray) -> np.ndarray:
    """Rows of a sample with one row of each group, drawn with a fixed seed: int64, ascending."""
    order = np.random.default_rng(0).permutation(len(groups))
    return np.sort(order[np.unique(np.asarray(groups)[order], return_index=True)[1]])


def conformal_quantile(scores: np.ndarray, coverage: float, groups: np.ndarray | None = None) -> float:
    """The score that a new row does not exceed with a given chance; infinite if there are too few rows to say.

    Parameters
    ----------
    scores : float, (n,)
        Score of each held-out row; higher is stranger.
    coverage : float, 0 < coverage < 1
        The chance. It holds exactly for finite n, and is exceeded by at most 1 / (n + 1) where scores differ.
    groups : int, (n,), optional
        Group of each row. Groups are then taken to be exchangeable, and a new row to be of a new group.

    Notes
    -----
    Without groups it is the ceil((n + 1) coverage)-th smallest score (Vovk, Gammerman and Shafer, 2005). With k groups each of
    them has the weight 1 / (k + 1), shared by its rows (Lee, Barber and Willett, 2023), which is the same if each row
    is a group.

    Examples
    --------
    >>> [conformal_quantile(np.arange(1, 20), coverage) for coverage in (0.9, 0.5, 0.99)]
    [18.0, 10.0, inf]
    """
    scores = np.asarray(scores, np.float64)
    codes = np.arange(len(scores)) if groups is None else groups
    _, member, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    weight = np.cumsum(1 / sizes[member[order]])
    place = int(np.searchsorted(weight, (len(sizes) + 1) * coverage - SURE))
    return float(scores[order[place]]) if place < len(order) else math.inf


def least_probability(
    probabilities: np.ndarray, labels: np.ndarray, coverage: float, groups: np.ndarray | None = None
) -> float:
    """The probability that a class needs to be in the set of an image: such sets hold the true class with a given chance.

    Parameters
    ----------
    probabilities : float, (n, c), 0-1
        Probabilities of held-out rows, compared in float32.
    labels : int, (n,), 0 to c - 1
        True classes.
    coverage, groups
        As in `conformal_quantile`.

    Returns
    -------
    float, 0-1
        0 if there are too few rows: then every class is in every set.

    Notes
    -----
    Least ambiguous sets (Sadinle, Lei and Wasserman, Journal of the American Statistical Association 114, 2019): of all sets of this
    coverage they are the smallest on average. A set is empty where no class is likely enough.
    """
    true = np.asarray(probabilities, np.float32)[np.arange(len(labels)), labels]
    return max(0.0, -conformal_quantile(-true.astype(np.float64), coverage, groups))


def class_sets(probabilities: np.ndarray, least: float) -> np.ndarray:
    """Which classes are in the set of each image, bool, (n, c); see `least_probability`."""
    return np.asarray(np.asarray(probabilities, np.float32) >= np.float32(least))


def half_width(targets: np.ndarray, predicted: np.ndarray, coverage: float, groups: np.ndarray | None = None) -> float:
    """Half the width of an interval around a prediction that holds the true value with a given chance.

    Parameters
    ----------
    targets, predicted : float, (n,)
        True and predicted values of held-out rows, in the unit of the target.
    coverage, groups
        As in `conformal_quantile`.

    Returns
    -------
    float
        Infinite if there are too few rows.

    Examples
    --------
    >>> half_width(np.zeros(9), np.array([1, -2, 3, -4, 5, -6, 7, -8, 9]), 0.8)
    8.0
    """
    return conformal_quantile(np.abs(np.asarray(targets, np.float64) - predicted), coverage, groups)


def kept(probabilities: np.ndarray, labels: np.ndarray, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Count how far a promise is kept on other labelled images.

    Parameters
    ----------
    probabilities : float, (n, c), 0-1
        Probabilities of the images.
    labels : int, (n,), 0 to c - 1
        True classes.
    answers : mapping
        The promise, `pipeline.config.Answers`.

    Returns
    -------
    dict
        ``abstain`` (None if no precision was asked for): the ``asked`` precision, ``threshold``, how many are
        ``answered`` and ``right``, the ``precision`` with its 95 % ``interval`` (None if none is answered) and the ``coverage``.
        ``sets``: the ``asked`` coverage, ``least``, the ``coverage`` with its ``interval``, the ``mean_size`` of sets and how
        many are ``empty``.
    """
    n, abstain, sets = len(labels), answers["abstain"], answers["sets"]
    found: dict[str, Any] = {"abstain": None}
    if abstain:
        given = is_answered(probabilities.max(axis=1), abstain["threshold"])
        answered, right = int(given.sum()), int(np.sum(probabilities.argmax(axis=1)[given] == labels[given]))
        found["abstain"] = answers_kept(answered, right, n, abstain)
    inside = class_sets(probabilities, sets["least"])
    found["sets"] = sets_kept(inside, inside[np.arange(n), labels], sets)
    return found


def answers_kept(answered: int, right: int, n: int, abstain: Mapping[str, Any]) -> dict[str, Any]:
    """The entry ``abstain`` of `kept`, from how many of ``n`` images are answered, and how many of these are right."""
    return {
        "asked": abstain["precision"],
        "threshold": abstain["threshold"],
        "answered": answered,
        "right": right,
        "precision": right / answered if answered else None,
        "interval": wilson_interval(right, answered) if answered else None,
        "coverage": answered / n,
    }


def sets_kept(inside: np.ndarray, held: np.ndarray, sets: Mapping[str, Any]) -> dict[str, Any]:
    """Count sets, bool (n, c), and which of them hold what is true, bool (n,); the entry ``sets`` of `kept`."""
    hits, sizes = int(held.sum()), inside.sum(axis=1)
    return {
        "asked": sets["coverage"],
        "least": sets["least"],
        "coverage": hits / len(held),
        "interval": wilson_interval(hits, len(held)),
        "mean_size": float(sizes.mean()),
        "empty": int(np.sum(sizes == 0)),
    }
