"""The head behind the page: trained anew on the labels as they are now, in a thread of its own.

    labels.csv --overlay--> training rows --logistic head--> predictions of all rows --folds--> suspicion of each label

The head is a logistic regression on pooled, standardised features, like that of `train-head --head logistic`. Its penalty, of a
few, is chosen once, on training rows held out; each later fit starts from the last one, and takes a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import BottleneckError
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from pipeline.auditing.confident import Noise, learn
from pipeline.heads.pooling import choose_pool, chunks, column_statistics, pool_features
from pipeline.heads.prepared import group_codes, standardise
from pipeline.intervals import paired_interval
from pipeline.labels.file import LABEL, Labels, read_labels
from pipeline.labels.overlay import target_of, with_labels
from pipeline.review.rows import Catalogue
from pipeline.scores.metrics import log_loss, softmax, two_columns
from pipeline.scores.selection import USUAL_FOLDS, stratified_folds
from pipeline.search.vectors import Vectors as Directions

logger = logging.getLogger(__name__)

MOST_TRAINED = 20_000  # training rows of a fit; of more, a sample that holds every row with a decision
MOST_SEARCHED = 2_000  # training rows on which the penalty is chosen
PENALTIES, SEARCH_FOLDS = (0.01, 0.1, 1.0), 4
MOST_POINTS = 60  # points of the learning curve; when there are more, every second one is left out
MOST_HEADER = 200  # bytes of a labels file that hold no decision
REPLAYED = 8  # points of the curve of an earlier session's decisions
GATHER_SECONDS = 0.12  # decisions that arrive within it are learned together
LOOK_SECONDS = 2.0  # between looks at the file, which other programs may write
USUAL_C = 0.1
VALIDATION, TEST = SPLITS.index("validation"), SPLITS.index("test")


class Vectors:
    """View 0 of a feature set, pooled to one vector for each image, float32 ``(n, d)``; read when it is needed."""

    def __init__(self, store: FeatureStore, name: str | None = None) -> None:
        self.name = store.feature_set(name)
        shape = store.shape(self.name)
        self._array = store.array(self.name)
        self._pool = choose_pool(None, "avg", shape[2:])
        self.rows = shape[0]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of these rows, float32 ``(k, d)``, a copy."""
        return pool_features(self._array[rows, 0], self._pool)

    def pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield all vectors, some rows at a time."""
        for piece in chunks(np.broadcast_to(np.float32(0), (self.rows, *self._array.shape[2:]))):
            yield piece, pool_features(self._array[piece, 0], self._pool)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A fitted logistic regression, and the mean and deviation of the rows that it was fitted to."""

    codes: np.ndarray  # int64, (c,): the class of each column
    mean: np.ndarray
    std: np.ndarray
    estimator: Any

    def probabilities(self, X: np.ndarray) -> np.ndarray:
        """Class probabilities of vectors, float64, ``(k, c)``; ``X`` is overwritten."""
        standardise(X, self.mean, self.std)
        return softmax(two_columns(X @ self.estimator.coef_.T.astype(np.float32) + self.estimator.intercept_))

    def columns(self, labels: np.ndarray) -> np.ndarray:
        """Return the column of each label's class, int64 ``(k,)``; -1 if it has none."""
        places = np.full(max(int(self.codes.max()), int(labels.max(initial=0))) + 2, -1, np.int64)
        places[self.codes] = np.arange(len(self.codes))
        return np.asarray(places[labels])  # the last place stands for -1


def fit(X: np.ndarray, labels: np.ndarray, C: float, before: Linear | None = None) -> Linear:
    """Fit a logistic regression to vectors of at least two classes, from where an earlier one ended; ``X`` is overwritten."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    mean, std = column_statistics((X[piece] for piece in chunks(X)), X.shape[1])
    standardise(X, mean, std)
    codes, y = np.unique(labels, return_inverse=True)
    estimator = LogisticRegression(C=C, max_iter=300, warm_start=True)
    if before is not None and np.array_equal(before.codes, codes):
        estimator.coef_, estimator.intercept_ = before.estimator.coef_.copy(), before.estimator.intercept_.copy()
    with warnings.catch_warnings(), threadpool_limits(limits=1):  # the page needs the other processor
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(X, y)
    return Linear(codes, mean, std, estimator)


def suspicion_of(chances: np.ndarray, columns: np.ndarray, noise: Noise) -> np.ndarray:
    """The probability that each label is wrong, which is the score of the audit's check ``suspect-label``.

    Parameters
    ----------
    chances : float64, (n, c), 0-1
        Probabilities by a head that was not trained on the row.
    columns : int64, (n,)
        Column of the label; -1: the label has no column, which speaks neither for nor against it.
    noise : Noise
        How labels come from classes.

    Returns
    -------
    float32, (n,), 0-1; NaN without a column
    """
    found, known = np.full(len(columns), np.nan, np.float32), np.flatnonzero(columns >= 0)
    found[known] = 1 - noise.of_class(chances[known], columns[known])[np.arange(len(known)), columns[known]]
    return found


@dataclasses.dataclass(frozen=True)
class Scores:
    """What heads say of every row; never changed. Of a training row speaks only a head that was not trained on it.

    Parameters
    ----------
    predicted : int32, (n,)
        Code of the predicted class; -1 where no head has judged the row yet.
    confidence : float32, (n,), 0-1
        Probability of the predicted class.
    margin : float32, (n,), 0-1
        Probability of the predicted class minus that of the next one.
    suspicion : float32, (n,), 0-1
        See `suspicion_of`; NaN where nothing was judged. It follows the labels when training rows have been judged too.
    judges : int8, (n,)
        Place in ``heads`` of the head that has judged a row.
    heads : tuple of Linear
        The head of all training rows, then those of the folds.
    ranked : bool
        Whether training rows were judged under the labels of this training.
    flipped : int64
        Rows without a decision whose class, by the head of all training rows, the last training has changed.
    """

    predicted: np.ndarray
    confidence: np.ndarray
    margin: np.ndarray
    suspicion: np.ndarray
    judges: np.ndarray
    heads: tuple[Linear, ...]
    ranked: bool
    flipped: np.ndarray

    @classmethod
    def none(cls, rows: int) -> Scores:
        """Return the scores of rows that nobody has judged."""
        nan = np.full(rows, np.nan, np.float32)
        return cls(
            np.full(rows, -1, np.int32), nan, nan, nan, np.zeros(rows, np.int8), (), False, np.zeros(0, np.int64)
        )

    def judged(self, rows: np.ndarray, head: Linear, judge: int, chances: np.ndarray) -> None:
        """Fill in what a head says of some rows, while these scores are being made."""
        best = np.partition(chances, -2, axis=1)[:, -2:]
        self.predicted[rows] = head.codes[chances.argmax(axis=1)]
        self.confidence[rows], self.margin[rows] = best[:, 1], best[:, 1] - best[:, 0]
        self.judges[rows] = judge

    def copy(self) -> Scores:
        """Return scores that can be filled in without changing these."""
        arrays = ("predicted", "confidence", "margin", "suspicion", "judges")
        return dataclasses.replace(self, **{name: getattr(self, name).copy() for name in arrays})


@dataclasses.dataclass(frozen=True)
class Point:
    """One training: how many decisions there were, and what it predicted for the validation rows (codes)."""

    decisions: int
    predicted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Known:
    """The effective labels (codes) and splits of all rows at one moment, the decisions made, and the rows they are about."""

    labels: np.ndarray
    splits: np.ndarray
    decisions: int
    decided: np.ndarray


class Learner:
    """Trains the head whenever the labels have changed.

    Parameters
    ----------
    store : FeatureStore
        The store, without decisions.
    path : Path
        The labels file; it may not exist yet.
    catalogue : Catalogue
        Class names.
    tell : callable
        Called in the learner's thread with what has happened: ``("labels", Labels)`` when the file has changed,
        ``("splits", int8 (n,))``, those in effect, ``("scores", Scores)``, and ``("learning", dict)``, the `summary`.
    name : str, optional
        Feature set, if the store has several.
    """

    def __init__(
        self,
        store: FeatureStore,
        path: Path,
        catalogue: Catalogue,
        tell: Callable[[str, Any], None],
        name: str | None = None,
    ) -> None:
        self.store, self.path, self.catalogue, self.tell = store, path, catalogue, tell
        self.vectors = Vectors(store, name)
        self._directions = Directions(store, name)
        self.validation = store.rows("validation")
        self.status: dict[str, Any] = {"status": "learning", "message": "the head is being trained"}
        self.trained = 0
        self.C: float | None = None
        self._original = store.images.labels[self.validation]
        self._corrected = self._original
        self._priority = np.random.default_rng(0).random(len(store))
        self._groups = self._groups_of(store)
        self._points: list[Point] = []
        self._scores = Scores.none(len(store))
        self._head: Linear | None = None
        self._predicted: np.ndarray | None = None
        self._seen: tuple[int, ...] | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)

    # -- the thread
    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Let it look at the file now."""
        self._wake.set()

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self.look()
            except BottleneckError as error:
                self._say(status="impossible", message=str(error))
            except Exception as error:  # the page goes on without a head and says why
                logger.exception("the head could not be trained")
                self._say(status="impossible", message=f"the head could not be trained: {error}")
            self._wake.wait(LOOK_SECONDS)
            if self._wake.is_set() and not self._closed.is_set():
                time.sleep(GATHER_SECONDS)

    def look(self) -> None:
        """Read the labels file if it has changed since, and learn from it."""
        self._wake.clear()
        stamp = self._stamp()
        if stamp == self._seen:
            return
        first, self._seen = self._seen is None, stamp
        if not stamp:
            known = self.known(None)
        else:
            labels = read_labels(self.path)
            self.tell("labels", labels)
            if first:
                self._replay(labels)
            known = self.known(labels)
        self.tell("splits", known.splits)
        if self.learn(known):
            self._rank(known)

    def _replay(self, labels: Labels) -> None:
        """Train on the labels as they were after some of the earlier decisions, for the learning curve."""
        self.learn(self.known(None))
        for size in np.linspace(0, labels.size, REPLAYED + 1).astype(int)[1:-1].tolist():
            earlier = read_labels(self.path, size) if size > MOST_HEADER else None
            if earlier is not None and 0 < len(earlier) < len(labels):
                self.learn(self.known(earlier), silent=True)

    def _stamp(self) -> tuple[int, ...]:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return ()
        return (status.st_ino, status.st_size, status.st_mtime_ns)

    def distances(self, row: int) -> np.ndarray:
        """Return the cosine distance of every row to one of them, float32 ``(n,)``, 0-2; that of the row itself is -1."""
        query = self._directions.gathered(np.array([row]))[0]
        found = np.empty(len(self.store), np.float32)
        for rows, values in self._directions.pieces():
            found[rows] = 1 - values @ query
        found[row] = -1
        return found

    # -- learning
    def known(self, labels: Labels | None) -> Known:
        """Lay decisions over the store."""
        table = self.store.images
        if labels is None or not len(labels):
            return Known(table.labels, table.splits, 0, np.zeros(len(table), bool))
        laid = with_labels(self.store, labels)
        codes = np.array([*map(self.catalogue.code, laid.classes), -1], np.int32)
        decided = labels.latest(table.sha256, target_of(self.store), LABEL, "") >= 0
        return Known(codes[laid.images.labels], laid.images.splits, len(labels), decided)

    def learn(self, known: Known, *, silent: bool = False) -> bool:
        """Train on these labels and predict every row; False if there are fewer than two classes to train on."""
        rows = self._training_rows(known)
        labels = known.labels[rows]
        if len(np.unique(labels)) < 2:
            self._say(status="impossible", message="fewer than two classes have a labelled training image: label some")
            return False
        started = time.monotonic()
        if not silent:
            self._say(status="learning", message="the head is being trained")
        if self.C is None:
            self.C = self._choose(rows, labels)
        head = fit(self.vectors.take(rows), labels, self.C, self._head)
        predicted = self._judge(head, known, rows)
        self.trained, self._head, self._predicted = self.trained + 1, head, predicted
        self._points.append(Point(known.decisions, predicted[self.validation]))
        if len(self._points) > MOST_POINTS:
            del self._points[1:-1:2]
        self._corrected = known.labels[self.validation]
        if not silent:
            self.tell("scores", self._scores)
            self._say(status="ready", message="", seconds=round(time.monotonic() - started, 3))
        return True

    def _training_rows(self, known: Known) -> np.ndarray:
        """Labelled rows of the training split, int64, ascending; a sample if there are many."""
        rows = np.flatnonzero((known.splits == 0) & (known.labels >= 0))
        if len(rows) <= MOST_TRAINED:
            return rows
        order = np.argsort(np.where(known.decided[rows], -1.0, self._priority[rows]), kind="stable")
        return np.sort(rows[order[:MOST_TRAINED]])

    def _choose(self, rows: np.ndarray, labels: np.ndarray) -> float:
        """Choose the penalty with the lowest log loss on rows held out, which are some of these; `USUAL_C` where few are."""
        some = np.argsort(self._priority[rows])[:MOST_SEARCHED]
        rows, y = rows[some], np.unique(labels[some], return_inverse=True)[1]
        folds = stratified_folds(y, SEARCH_FOLDS, 0, np.unique(self._groups[rows], return_inverse=True)[1])
        X = self.vectors.take(rows)
        losses = dict.fromkeys(PENALTIES, 0.0)
        for fold in range(min(2, folds.max() + 1)):  # two of them tell powers of ten apart
            inside, head = folds == fold, None
            if not np.isin(y[inside], y[~inside]).all() or len(np.unique(y[~inside])) < 2:
                continue
            for C in PENALTIES:  # from strong to weak, each from where the last one ended
                head = fit(X[~inside], y[~inside], C, head)
                columns = np.searchsorted(head.codes, y[inside])
                losses[C] += log_loss(head.probabilities(X[inside]), columns)
        return min(losses, key=losses.__getitem__) if any(losses.values()) else USUAL_C

    def _judge(self, head: Linear, known: Known, trained: np.ndarray) -> np.ndarray:
        """Score all rows but those that the head was trained on, which keep their scores; return all predictions (codes)."""
        scores, predicted = self._scores.copy(), np.empty(self.vectors.rows, np.int32)
        unseen = np.ones(self.vectors.rows, bool)
        unseen[trained] = False
        for piece, X in self.vectors.pieces():
            chances, rows = head.probabilities(X), np.arange(self.vectors.rows)[piece]
            predicted[piece] = head.codes[chances.argmax(axis=1)]
            some = unseen[piece]
            scores.judged(rows[some], head, 0, chances[some])
        flipped = np.zeros(0, np.int64)
        if self._predicted is not None:
            free = (self.store.images.splits != TEST) & ~known.decided
            flipped = np.flatnonzero((predicted != self._predicted) & free)
        heads = (head, *self._scores.heads[1:])
        self._scores = dataclasses.replace(scores, heads=heads, ranked=False, flipped=flipped)
        return predicted

    def _rank(self, known: Known) -> None:
        """Judge training rows by heads that were trained on other folds; groups and copies stay together."""
        rows = self._training_rows(known)
        labels, scores, heads = known.labels[rows], self._scores.copy(), list(self._scores.heads[:1])
        assert self.C is not None
        y = np.unique(labels, return_inverse=True)[1]
        folds = stratified_folds(y, USUAL_FOLDS, 0, np.unique(self._groups[rows], return_inverse=True)[1])
        X = self.vectors.take(rows)
        chances = np.full((len(rows), y.max() + 1), np.nan)
        for fold in range(folds.max() + 1):
            inside = folds == fold
            if self._wake.is_set() or len(np.unique(labels[~inside])) < 2:  # newer decisions come first
                return
            head = fit(X[~inside], labels[~inside], self.C)
            heads.append(head)
            found = head.probabilities(X[inside])
            scores.judged(rows[inside], head, len(heads) - 1, found)
            chances[inside] = 0
            chances[np.ix_(inside, np.searchsorted(heads[0].codes, head.codes))] = found
        self._suspect(scores, known, rows[folds >= 0], chances[folds >= 0], heads[0])
        self._scores = dataclasses.replace(scores, heads=tuple(heads), ranked=True)
        self.tell("scores", self._scores)
        self._say(**self.status)

    def _suspect(self, scores: Scores, known: Known, rows: np.ndarray, chances: np.ndarray, head: Linear) -> None:
        """Fill in the suspicion of all rows, from what heads that had not seen them say of training rows, (n, c)."""
        scores.suspicion[:] = np.nan
        if not len(rows):
            return
        columns = head.columns(known.labels[rows])
        noise = learn(chances, columns)
        scores.suspicion[rows] = suspicion_of(chances, columns, noise)
        trained = np.zeros(self.vectors.rows, bool)
        trained[self._training_rows(known)] = True
        for piece, X in self.vectors.pieces():
            others = piece.start + np.flatnonzero(~trained[piece])
            values = head.probabilities(X[others - piece.start])
            scores.suspicion[others] = suspicion_of(values, head.columns(known.labels[others]), noise)

    @staticmethod
    def _groups_of(store: FeatureStore) -> np.ndarray:
        """Rows that must lie in one fold: those of a group, else those of the same bytes."""
        table = store.images
        if table.groups is not None:
            return group_codes(table.groups)
        keys = np.ascontiguousarray(table.sha256).view("V32").ravel()
        return np.unique(keys, return_inverse=True)[1].astype(np.int64)

    # -- what the page says
    def _say(self, **said: Any) -> None:
        self.status = said
        self.tell("learning", self.summary())

    def summary(self) -> dict[str, Any]:
        """Describe the last training: what it changed on the validation rows, the learning curve, and how many flipped."""
        scores = self._scores
        return {
            **self.status,
            "trained": self.trained,
            "ranked": scores.ranked,
            "flipped": len(scores.flipped),
            "flips": scores.flipped[:24].tolist(),
            "original": self._change(self._original),
            "corrected": self._change(self._corrected),
            "curve": [self._point(point) for point in self._points],
        }

    def _change(self, truth: np.ndarray) -> dict[str, Any] | None:
        """Compare the first head with the last one on the same validation rows; None without rows or heads."""
        known = truth >= 0
        if not self._points or not known.any():
            return None
        before, after = ((self._points[k].predicted == truth)[known] for k in (0, -1))
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        return {
            "n": int(known.sum()),
            "before": float(before.mean()),
            "after": float(after.mean()),
            "gained": gained,
            "lost": lost,
            "interval": paired_interval(gained, lost, int(known.sum())),
        }

    def _point(self, point: Point) -> dict[str, Any]:
        values: dict[str, Any] = {"decisions": point.decisions}
        for name, truth in (("original", self._original), ("corrected", self._corrected)):
            known = truth >= 0
            values[name] = float((point.predicted == truth)[known].mean()) if known.any() else None
        return values
