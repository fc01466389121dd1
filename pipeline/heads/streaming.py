"""Training from a store that does not fit into memory: rows are read piece by piece, shuffled and standardised.

    store --read stretches of rows in random order--> window --shuffle--> batches --> bank | Keras | partial_fit

A window holds as many rows as fit into half of the memory budget. It is filled from hundreds of short stretches of rows
from the whole store, so that batches are mixed even if the store is sorted by class. Rows are in memory only while they
are needed; validation rows are read in order, in pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from features.errors import ConfigurationError, HeadError, check_range
from features.progress import Progress
from pipeline.config import History
from pipeline.heads.epochs import train_epochs
from pipeline.heads.pooling import column_statistics, pool_features, pooled_width
from pipeline.heads.prepared import PLAIN, Batch, Rows, chosen_views, drawn_views
from pipeline.scores.metrics import fit_temperature, two_columns

if TYPE_CHECKING:
    from features.store.reader import FeatureStore

READ_BYTES = 4 << 20  # size of one read, as stored
RUNS_OF_A_WINDOW = 512  # stretches per window; the shares of 10 sorted classes in it then vary by 0.013 around 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStream:
    """Rows of one feature set as pooled and standardised vectors, never all in memory; see `pipeline.heads.prepared.Rows`.

    Parameters
    ----------
    store : FeatureStore
        The store to read.
    name : str
        Name of the feature set.
    rows : int64, (n,), ascending
        Row numbers, such as ``store.rows("train")``.
    labels : int32, (n,), 0 to c - 1
        Labels of these rows.
    memory_bytes : int
        Bytes that the stream may use. Half of them hold the window that is shuffled; the rest is for batches and for
        their consumer.
    pool : {"none", "avg", "max", "flatten"}
        Pooling of spatial features.
    mean, std : float32, (d,), optional
        Mean to subtract and deviation to divide by; see `statistics`.

    Raises
    ------
    ConfigurationError
        If the numbers of rows and labels differ, or row numbers are not ascending or not in the store.
    """

    store: FeatureStore
    name: str
    rows: np.ndarray
    labels: np.ndarray
    memory_bytes: int
    pool: str = "none"
    mean: np.ndarray | None = None
    std: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.rows.shape != self.labels.shape[:1] or self.rows.ndim != 1:
            raise ConfigurationError(f"stream: labels: received {self.labels.shape}, expected {self.rows.shape}")
        if len(self.rows) and (self.rows[0] < 0 or self.rows[-1] >= len(self.store) or (np.diff(self.rows) <= 0).any()):
            raise ConfigurationError(f"stream: rows: expected ascending row numbers from 0 to {len(self.store) - 1}")

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def width(self) -> int:
        """Number of columns of a pooled row."""
        return pooled_width(self.store.shape(self.name)[2:], self.pool)

    @functools.cached_property
    def views(self) -> int:
        """Number of views of each row."""
        return self.store.shape(self.name)[1]

    @property
    def nbytes(self) -> int:
        """Bytes that one view of all rows would need in memory, pooled, as float32."""
        return 4 * self.width * len(self.rows)

    @property
    def at_once(self) -> int:
        """Number of rows that may be requested in one batch; their consumer makes several copies of them."""
        return max(1, self._window // 8)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each column of view 0; see `pipeline.heads.pooling.column_statistics`."""
        return column_statistics((Z for _, Z in self.pieces()), self.width)

    def take(self, chosen: np.ndarray) -> FeatureStream:
        """Select rows by ascending index or by a mask."""
        return dataclasses.replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    def pieces(self, size: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """View 0 of all rows in order, in pieces of ``size`` rows: the position of a piece, and its float32 (k, d)."""
        read = ((piece, self._read(piece)[:, 0]) for piece in self._runs(READ_BYTES))
        if size is None:
            yield from read
            return
        done, waiting = 0, np.empty((0, self.width), np.float32)
        for _, Z in read:
            waiting = np.concatenate([waiting, Z])
            while len(waiting) >= size:
                yield slice(done, done + size), waiting[:size]
                done, waiting = done + size, waiting[size:]
        if len(waiting):
            yield slice(done, done + len(waiting)), waiting

    def all_views(self, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The first ``count`` views of all rows in order: the position of each piece, and its float32 (k, count, d)."""
        for piece in self._runs(READ_BYTES):
            yield piece, self._read(piece, np.tile(np.arange(count), (piece.stop - piece.start, 1)))

    def epoch(self, number: int, *, size: int, seed: int, draws: Sequence[bool] = PLAIN) -> Iterator[Batch]:
        """Every row once, in random order, in batches; only the last batch may be smaller.

        The order depends on ``seed``, ``number``, ``size`` and the memory budget.

        Parameters
        ----------
        number : int
            Number of the epoch, from 0.
        size : int
            Rows per batch.
        seed : int
            Random seed of the order and of the views.
        draws : sequence of bool
            See `pipeline.heads.prepared.Rows.epoch`.

        Returns
        -------
        iterator of (float32, (k, len(draws), d)) and (int32, (k,))
            Features and labels; later batches do not overwrite them.

        Raises
        ------
        ConfigurationError
            If the memory budget does not hold four batches, two of them in the window.
        HeadError
            If a row has no label.
        """
        check_range("batch size", size, 1, 1 << 20)
        if self.labels.ndim == 1 and (unlabelled := int((self.labels < 0).sum())):
            raise HeadError(f"labels: {unlabelled} training rows are unlabelled (-1); label or remove them")
        least = 4 * size * self._row_bytes
        if self.memory_bytes < least:
            raise ConfigurationError(
                f"memory: batches of {size} rows of {self.width} columns need at least {least / 1e6:.3g} MB; "
                f"received {self.memory_bytes / 1e6:.3g} MB. Give more, choose a smaller batch size, or pool the features"
            )
        generator = np.random.default_rng([seed, number])
        drawn = drawn_views(seed, number, len(self.store), self.views) if any(draws) else None
        window = min(len(self), self._window)
        features = np.empty((window, len(draws), self.width), np.float32)
        labels = np.empty((window, *self.labels.shape[1:]), self.labels.dtype)
        filled = 0
        runs = self._runs(min(READ_BYTES, window * self._stored_bytes // RUNS_OF_A_WINDOW))
        for place in generator.permutation(len(runs)):
            run = runs[place]
            values = self._read(run, chosen_views(drawn, self.rows[run], draws))
            done = 0
            while done < len(values):
                count = min(len(values) - done, window - filled)
                features[filled : filled + count] = values[done : done + count]
                labels[filled : filled + count] = self.labels[run][done : done + count]
                filled, done = filled + count, done + count
                if filled == window:
                    order = generator.permutation(window)
                    whole = window - window % size
                    yield from _cut(features, labels, order[:whole], size)
                    # Rows that do not fill a batch move on to the next window.
                    filled = window - whole
                    features[:filled], labels[:filled] = features[order[whole:]], labels[order[whole:]]
        yield from _cut(features, labels, generator.permutation(filled), size)

    @property
    def _row_bytes(self) -> int:
        """Bytes of a row in the window. If there are views, two are counted, so that the order is equal for any draws."""
        return 4 * self.width * min(2, self.views)

    @property
    def _window(self) -> int:
        return self.memory_bytes // (2 * self._row_bytes)

    @property
    def _stored_bytes(self) -> int:
        _, *row = self.store.shape(self.name)
        return int(np.prod(row)) * np.dtype(self.store.recipes[self.name].dtype).itemsize

    def _runs(self, size: int) -> list[slice]:
        """Cut the rows into stretches of neighbours, each within ``size`` bytes of the store."""
        step = max(1, size // self._stored_bytes)
        edges = np.flatnonzero(np.diff(self.rows // step)) + 1
        bounds = [0, *edges.tolist(), len(self.rows)]
        return [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]

    def _read(self, piece: slice, views: np.ndarray | None = None) -> np.ndarray:
        """Read the given views, (k, V), of each row as float32, (k, V, d); by default view 0."""
        rows = self.rows[piece]
        stored = self.store.read(self.name, int(rows[0]), int(rows[-1]) + 1)
        if views is None:
            views = np.zeros((len(rows), 1), np.int64)
        chosen = stored[(rows - rows[0])[:, None], views]
        Z = pool_features(chosen.reshape(-1, *chosen.shape[2:]), self.pool).reshape(*views.shape, -1)
        if self.mean is not None and self.std is not None:
            Z -= self.mean
            Z /= self.std
        return Z


@dataclasses.dataclass(frozen=True)
class StreamedFit:
    """An ``SGDClassifier`` fitted on standardised rows, the temperature of its margins, and its history."""

    estimator: Any
    temperature: float
    history: History


def fit_sgd_streaming(
    estimator: Any,
    train: Rows,
    held_out: Rows | None = None,
    *,
    classes: int,
    epochs: int = 20,
    patience: int = 5,
    batch_size: int = 1024,
    seed: int = 0,
    progress: Progress | None = None,
) -> StreamedFit:
    """Train a ``sklearn.linear_model.SGDClassifier`` by partial fits; each epoch draws one view of each row.

    The average is computed here, over the weights after each partial fit, because across partial fits scikit-learn
    confuses the averaged intercept with the trained one (seen in 1.9).

    Parameters
    ----------
    estimator : SGDClassifier
        Not fitted; its class weights are None or a mapping of numbers.
    train, held_out : Rows
        Rows, standardised alike. Early stopping uses the log loss of the held-out rows at their best temperature, which
        becomes the temperature of the head.
    classes : int
        Number of classes; a batch may lack some of them.
    epochs, patience : int
        Maximum number of epochs; epochs without a lower loss after which training stops, 0: it never stops early. The
        weights of the best epoch are kept.
    batch_size : int
        Rows of one partial fit. As a partial fit takes one row after the other, this only decides the speed, and how
        often the average is updated.
    seed : int
        Random seed of the order.
    progress : callable, optional
        Called with ("train-head", epochs done, epochs).

    Raises
    ------
    HeadError
        If training diverges.
    """
    temperature, size = 1.0, min(batch_size, train.at_once)
    averaged = bool(estimator.average)
    estimator.set_params(average=False)
    sums = [np.zeros(()), np.zeros(())]  # sums of coefficients and intercepts, weighted by the rows of each partial fit
    seen = 0

    def solution() -> tuple[np.ndarray, np.ndarray]:
        if averaged:
            return sums[0] / seen, sums[1] / seen
        return estimator.coef_.copy(), estimator.intercept_.copy()

    def pass_over(epoch: int) -> dict[str, float]:
        nonlocal seen
        for X, y in train.epoch(epoch - 1, size=size, seed=seed, draws=(train.views > 1,)):
            estimator.partial_fit(X[:, 0], y, classes=np.arange(classes))
            seen += len(y)
            for k, values in enumerate((estimator.coef_, estimator.intercept_)):
                sums[k] = sums[k] + len(y) * values
        if not np.isfinite(estimator.coef_).all():
            raise HeadError(f"training diverged in epoch {epoch}: choose a larger alpha or a smaller learning rate")
        return {}

    def measure() -> tuple[float, float]:
        nonlocal temperature
        assert held_out is not None
        coefficients, intercepts = solution()
        margins = [Z @ coefficients.T + intercepts for _, Z in held_out.pieces()]
        outputs = two_columns(np.concatenate(margins))
        temperature, loss = fit_temperature(outputs, held_out.labels)
        return loss, float(np.mean(outputs.argmax(axis=1) == held_out.labels))

    history, best = train_epochs(
        pass_over,
        measure if held_out is not None and len(held_out) else None,
        lambda: (*solution(), temperature),
        epochs=epochs,
        patience=patience,
        progress=progress,
    )
    estimator.coef_, estimator.intercept_, temperature = best
    estimator.set_params(average=averaged)
    return StreamedFit(estimator, temperature, history)


def _cut(features: np.ndarray, labels: np.ndarray, order: np.ndarray, size: int) -> Iterator[Batch]:
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield features[chosen], labels[chosen]
