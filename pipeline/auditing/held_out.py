"""Probabilities of the logistic head for rows that it was not trained on.

    rows --standardise, in principal components if they are many--> folds --one head each, its C chosen by log loss--> probabilities

Each training row is judged by a head that saw neither the row, nor a copy of its bytes, nor its group. All other rows are
judged by the head of all training rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from features.machine import processors
from features.progress import Progress
from pipeline.heads.classifier_table import CLASSIFIERS
from pipeline.heads.estimators import make_estimator
from pipeline.heads.pooling import column_statistics
from pipeline.heads.search import climb, row_space
from pipeline.presets import PRESETS
from pipeline.scores.metrics import log_loss
from pipeline.scores.selection import SEARCH_ROWS, stratified_folds

FOLDS = 5
MOST_NUMBERS = 1 << 23  # numbers of a matrix that heads are fitted to; a larger one is projected
COMPONENTS = 256  # principal components that it is projected to
LOGISTIC = PRESETS["logistic"].kind
TOLERANCE = 1e-3  # of the gradient: ten times scikit-learn's, in half of the time; the ranking of suspects is the same

# Yields float32 (k, d): the vectors of some rows, in order.
Vectors = Callable[[np.ndarray], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Probabilities by heads that had not seen the row.

    Parameters
    ----------
    probabilities : float32, (n, c), 0-1
        One line for each training row, in order; NaN where a class has a single row or group, so that it cannot be left out.
    strength : float
        The ``C`` of the head.
    of_others : float32, (m, c), 0-1
        One line for each other row, by the head of all training rows.
    """

    probabilities: np.ndarray
    strength: float
    of_others: np.ndarray


def held_out(
    vectors: Vectors,
    train: np.ndarray,
    labels: np.ndarray,
    others: np.ndarray,
    classes: int,
    *,
    groups: np.ndarray | None,
    copies: np.ndarray,
    seed: int,
    progress: Progress,
) -> HeldOut:
    """Judge rows by the logistic head.

    Parameters
    ----------
    vectors : callable
        Called with row numbers, ascending; see `Vectors`.
    train, others : int64, (n,) and (m,), ascending
        Row numbers.
    labels : int, (n,), 0 to c - 1
        Labels of the training rows, at least two different ones.
    groups : int64, (n,), optional
        Number of the group of each training row.
    copies : int64, (n,)
        Number of the content of each training row: rows with the same bytes have the same number.
    seed : int
        Random seed of the folds.
    """
    transform = _transform(vectors, train, seed)
    Z = np.concatenate([transform(piece) for piece in vectors(train)])
    if Z.shape[1] > len(Z):  # an exact reduction, as there are fewer rows than columns
        coordinates, combination = row_space(Z)
        basis = (combination @ Z).T
        Z, whole = coordinates, transform
        transform = lambda piece: whole(piece) @ basis  # noqa: E731
    folds = _folds(labels, groups, copies, seed, len(labels))
    strength, chances = _searched(Z, labels, classes, _folds(labels, groups, copies, seed, SEARCH_ROWS), seed, progress)
    if chances is None:
        chances = _out_of_fold(Z, labels, classes, folds, strength, seed)
    of_others = [np.zeros((0, classes), np.float32)]
    if len(others):
        with _approximate():
            model = _fitted(Z, labels, strength, seed)
        of_others += [_probabilities(model, transform(piece), classes) for piece in vectors(others)]
    return HeldOut(chances, strength, np.concatenate(of_others))


def _searched(
    Z: np.ndarray, y: np.ndarray, classes: int, folds: np.ndarray, seed: int, progress: Progress
) -> tuple[float, np.ndarray | None]:
    """Choose ``C`` by log loss; return it and its probabilities, or None in place of these if not every row was in use."""
    least, start, most = CLASSIFIERS[LOGISTIC].values
    tested = folds >= 0
    if not tested.any():
        return 10.0**start, None
    best, kept, steps = np.inf, None, 0

    def loss(strength: float) -> float:
        nonlocal best, kept, steps
        chances = _out_of_fold(Z, y, classes, folds, strength, seed)
        found, steps = log_loss(chances[tested], y[tested]), steps + 1
        if found < best:
            best, kept = found, chances
        progress("audit", steps, 0)
        return found

    strength = climb(loss, start, least, most)
    return strength, None if (folds == -2).any() else kept


def _transform(vectors: Vectors, train: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that standardises vectors and, where there are many training rows, projects them."""
    width = next(vectors(train[:1])).shape[1]
    mean, std = column_statistics(vectors(train), width)

    def scaled(piece: np.ndarray) -> np.ndarray:
        return np.asarray((piece - mean) / std)

    if len(train) * width <= MOST_NUMBERS or width <= COMPONENTS:
        return scaled
    chosen = train
    if len(train) > SEARCH_ROWS:
        chosen = np.sort(np.random.default_rng(seed).choice(train, SEARCH_ROWS, replace=False))
    gram = sum(_inner(map(scaled, vectors(chosen))), np.zeros((width, width), np.float32))
    basis = np.linalg.eigh(gram)[1][:, -COMPONENTS:]
    return lambda piece: scaled(piece) @ basis


def _inner(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    return (piece.T @ piece for piece in pieces)


def _folds(labels: np.ndarray, groups: np.ndarray | None, copies: np.ndarray, seed: int, most: int) -> np.ndarray:
    """Fold of each row as in `stratified_folds`; copies of the same bytes are in one fold, and so is a group."""
    if groups is not None:
        return stratified_folds(labels, FOLDS, seed, _together(groups, copies), most=most)
    _, first, place = np.unique(copies, return_index=True, return_inverse=True)
    return stratified_folds(labels[first], FOLDS, seed, most=most)[place]


def _together(groups: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Number rows such that those of a group, and copies in several groups, have the same number: int64, (n,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = int(max(groups.max(), copies.max())) + 1
    links = coo_array((np.ones(len(groups), np.int8), (groups, size + copies)), shape=(2 * size, 2 * size))
    return np.asarray(connected_components(links, directed=False)[1][groups], np.int64)


def _out_of_fold(
    Z: np.ndarray, y: np.ndarray, classes: int, folds: np.ndarray, strength: float, seed: int
) -> np.ndarray:
    """Probabilities of the rows in a fold, float32 (n, c), NaN elsewhere; folds take turns on the processors."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    found = np.full((len(y), classes), np.nan, np.float32)

    def judge(fold: int) -> None:
        rows, tested = (folds != -2) & (folds != fold), folds == fold
        found[tested] = _probabilities(_fitted(Z[rows], y[rows], strength, seed), Z[tested], classes)

    # One thread for each fold: the threads of a matrix product would wait for each other.
    with threadpool_limits(1), _approximate(), ThreadPoolExecutor(processors(), "folds") as pool:
        list(pool.map(judge, range(folds.max(initial=-1) + 1)))
    return found


def _fitted(Z: np.ndarray, y: np.ndarray, strength: float, seed: int) -> Any:
    estimator = make_estimator(LOGISTIC, {"C": strength, "tol": TOLERANCE, **CLASSIFIERS[LOGISTIC].fixed}, seed)
    return estimator.fit(Z, y)


@contextlib.contextmanager
def _approximate() -> Iterator[None]:
    """Say nothing of fits that stop early: an approximate one is good enough for ranking."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _probabilities(model: Any, Z: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities in the columns of all classes, float32, (n, c); 0 for those that the model has never seen."""
    found = np.zeros((len(Z), classes), np.float32)
    found[:, model.classes_] = model.predict_proba(Z)
    return found
