"""Training from a store that does not fit into memory: rows read piece by piece, shuffled, standardised.

    store --read runs of rows in random order--> window --shuffle--> batches --> partial_fit | train_on_batch

A window is as many rows as half of the memory budget holds, and is filled from hundreds of short runs from all over
the store, so that a store sorted by class gives mixed batches. What is not asked for at the moment is not in memory:
validation goes through in order, in pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from features.errors import ConfigurationError, HeadError, check_range
from pipeline.head import History, Progress, two_columns
from pipeline.metrics import fit_temperature, log_loss, softmax
from pipeline.pooling import LEAST_DEVIATION, pool_features, pooled_width

if TYPE_CHECKING:
    from features.store import FeatureStore

READ_BYTES = 4 << 20  # of one read, as stored
RUNS_OF_A_WINDOW = 512  # the shares of 10 sorted classes in a window of that many runs vary by 0.013 around 0.1
Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStream:
    """Rows of one data set, view 0, as pooled and standardised vectors; at no time all of them.

    Parameters
    ----------
    store : FeatureStore
        Where the rows are.
    name : str
        Feature data set.
    rows : int64, (n,), ascending
        Row numbers, such as ``store.rows("train")``.
    labels : int32, (n,), 0 to c - 1
        Of these rows.
    memory_bytes : int
        What the stream may keep in memory. Half of it is the window that is shuffled; the rest is left to batches,
        and to whoever takes them.
    pool : {"none", "avg", "max", "flatten"}
        Pooling of spatial features.
    mean, std : float32, (d,), optional
        Taken off and divided by; see `standardised`.

    Raises
    ------
    ConfigurationError
        If rows and labels do not belong together.
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
        if self.rows.shape != self.labels.shape or self.rows.ndim != 1:
            raise ConfigurationError(f"stream: {self.rows.shape} rows and {self.labels.shape} labels, expected as many")
        if len(self.rows) and (self.rows[0] < 0 or self.rows[-1] >= len(self.store) or (np.diff(self.rows) <= 0).any()):
            raise ConfigurationError(f"stream: expected ascending row numbers, 0 to {len(self.store) - 1}")

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def width(self) -> int:
        """Columns of a pooled row."""
        return pooled_width(self.store.shape(self.name)[2:], self.pool)

    @property
    def nbytes(self) -> int:
        """What all rows would take in memory, pooled, as float32."""
        return 4 * self.width * len(self.rows)

    def standardised(self) -> FeatureStream:
        """The same rows, standardised with their own mean and deviation, found in one pass.

        Pieces are put together as Chan, Golub and LeVeque do (The American Statistician 37, 1983,
        equation 1.5); the least deviation is that of `pipeline.pooling.column_statistics`.
        """
        count = 0
        mean, squares = np.zeros(self.width), np.zeros(self.width)
        low, high = np.full(self.width, np.inf, np.float32), np.full(self.width, -np.inf, np.float32)
        for _, Z in self.in_order():
            low, high = np.minimum(low, Z.min(axis=0)), np.maximum(high, Z.max(axis=0))
            here = Z.mean(axis=0, dtype=np.float64)
            total, shift = count + len(Z), here - mean
            squares += np.square(Z - here).sum(axis=0) + np.square(shift) * (count * len(Z) / total)
            mean += shift * (len(Z) / total)
            count = total
        std = np.sqrt(squares / max(count, 1)).astype(np.float32)
        std[low == high] = 0
        least = np.float32(LEAST_DEVIATION * np.sqrt(np.mean(np.square(std, dtype=np.float64))))
        std = np.maximum(std, least) if least else np.ones_like(std)
        return dataclasses.replace(self, mean=mean.astype(np.float32), std=std)

    def in_order(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows in their order, in pieces: where they stand among the rows, and float32, (k, d)."""
        for piece in self._runs(READ_BYTES):
            yield piece, self._read(piece)

    def batches(self, *, batch_size: int, seed: int | tuple[int, ...]) -> Iterator[Batch]:
        """Every row once, in random order, in batches; only the last one is smaller.

        The order depends on ``seed``, ``batch_size`` and the memory budget. Give each epoch its own seed.

        Returns
        -------
        iterator of (float32, (k, d)) and (int32, (k,))
            Features and labels; they stay as they are when the next batch is made.

        Raises
        ------
        ConfigurationError
            If the memory does not hold two batches.
        HeadError
            If a row has no label.
        """
        check_range("batch size", batch_size, 1, 1 << 20)
        if (self.labels < 0).any():
            raise HeadError(f"labels: {int((self.labels < 0).sum())} training rows are unlabelled (-1)")
        least = 4 * self.width * batch_size * 4
        if self.memory_bytes < least:
            raise ConfigurationError(
                f"memory: batches of {batch_size} rows of {self.width} columns need at least {-(-least >> 20)} MB; "
                f"received {self.memory_bytes >> 20} MB. Give more, a smaller batch size, or pool the features."
            )
        generator = np.random.default_rng(seed)
        window = min(len(self), self.memory_bytes // (2 * 4 * self.width))
        features, labels, filled = np.empty((window, self.width), np.float32), np.empty(window, np.int32), 0
        runs = self._runs(min(READ_BYTES, window * self._stored_bytes // RUNS_OF_A_WINDOW))
        for number in generator.permutation(len(runs)):
            run, values = runs[number], self._read(runs[number])
            done = 0
            while done < len(values):
                count = min(len(values) - done, window - filled)
                features[filled : filled + count] = values[done : done + count]
                labels[filled : filled + count] = self.labels[run][done : done + count]
                filled, done = filled + count, done + count
                if filled == window:
                    order = generator.permutation(window)
                    whole = window - window % batch_size
                    yield from _cut(features, labels, order[:whole], batch_size)
                    # What makes no whole batch goes on to the next window.
                    filled = window - whole
                    features[:filled], labels[:filled] = features[order[whole:]], labels[order[whole:]]
        yield from _cut(features, labels, generator.permutation(filled), batch_size)

    @property
    def _stored_bytes(self) -> int:
        _, *row = self.store.shape(self.name)
        return int(np.prod(row)) * np.dtype(self.store.recipes[self.name].dtype).itemsize

    def _runs(self, size: int) -> list[slice]:
        """Cut the rows into runs of neighbours, each within so many bytes of the store."""
        step = max(1, size // self._stored_bytes)
        edges = np.flatnonzero(np.diff(self.rows // step)) + 1
        bounds = [0, *edges.tolist(), len(self.rows)]
        return [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]

    def _read(self, piece: slice) -> np.ndarray:
        rows = self.rows[piece]
        stored = self.store.read(self.name, int(rows[0]), int(rows[-1]) + 1)
        Z = pool_features(stored[rows - rows[0], 0], self.pool)
        if self.mean is not None and self.std is not None:
            Z -= self.mean
            Z /= self.std
        return Z


def stream_batches(
    store: FeatureStore,
    name: str,
    rows: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int | tuple[int, ...],
    memory_bytes: int,
    pool: str = "none",
) -> Iterator[Batch]:
    """One epoch of shuffled batches from a store; see `FeatureStream.batches`."""
    return FeatureStream(store, name, rows, labels, memory_bytes, pool).batches(batch_size=batch_size, seed=seed)


@dataclasses.dataclass(frozen=True)
class StreamedFit:
    """A fitted ``SGDClassifier`` on standardised rows, the temperature of its margins, and its history."""

    estimator: Any
    temperature: float
    history: History


def fit_sgd_streaming(
    train: FeatureStream,
    validation: FeatureStream | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    classes: int,
    epochs: int = 20,
    patience: int = 5,
    batch_size: int = 1024,
    seed: int = 0,
    progress: Progress | None = None,
) -> StreamedFit:
    """Train a ``sklearn.linear_model.SGDClassifier`` by partial fits.

    Parameters
    ----------
    train, validation : FeatureStream
        Standardised alike. Validation is what early stopping looks at, by log loss at the best temperature.
    parameters : mapping, optional
        Of the classifier, such as ``{"loss": "log_loss", "alpha": 1e-4}``; class weights as a mapping of numbers.
    classes : int
        Number of classes, also of those that a batch lacks.
    epochs, patience : int
        Upper limit of passes; epochs without a lower loss before training stops, 0: never. The best epoch is kept.
    batch_size : int
        Rows of one partial fit. It takes one row after the other, so this decides the speed only.
    seed : int
        Of the order.
    progress : callable, optional
        Called with ("train-head", epochs done, epochs).
    """
    from sklearn.linear_model import SGDClassifier

    estimator = SGDClassifier(random_state=seed, **(parameters or {}))
    temperature = 1.0
    batch_size = min(batch_size, max(1, train.memory_bytes // (16 * train.width)))

    def pass_over(epoch: int) -> dict[str, float]:
        for X, y in train.batches(batch_size=batch_size, seed=(seed, epoch)):
            estimator.partial_fit(X, y, classes=np.arange(classes))
        if not np.isfinite(estimator.coef_).all():
            raise HeadError(f"training diverged in epoch {epoch}: give a larger alpha, or a smaller learning rate")
        return {}

    def margins(Z: np.ndarray) -> np.ndarray:
        return two_columns(estimator.decision_function(Z).reshape(len(Z), -1))

    def snapshot() -> tuple[np.ndarray, np.ndarray, float]:
        return estimator.coef_.copy(), estimator.intercept_.copy(), temperature

    def measure() -> tuple[float, float]:
        nonlocal temperature
        assert validation is not None
        outputs = over_pieces(margins, validation)
        temperature, loss = fit_temperature(outputs, validation.labels)
        return loss, float(np.mean(outputs.argmax(axis=1) == validation.labels))

    history, best = _early_stopping(
        pass_over, measure if validation is not None and len(validation) else None, snapshot, epochs, patience, progress
    )
    estimator.coef_, estimator.intercept_, temperature = best
    return StreamedFit(estimator, temperature, history)


def fit_keras_streaming(
    model: Any,
    train: FeatureStream,
    validation: FeatureStream | None = None,
    *,
    epochs: int,
    patience: int,
    batch_size: int,
    seed: int = 0,
    class_weight: Mapping[int, float] | None = None,
    progress: Progress | None = None,
) -> History:
    """Train a compiled Keras model from vectors to logits; it ends with the weights of its best epoch.

    Parameters
    ----------
    model : keras.Model
        Compiled; input (n, d), output (n, c), or (n, 1) for two classes.
    train, validation : FeatureStream
        Standardised alike. Validation is what early stopping looks at, by log loss.
    epochs, patience, batch_size : int
        As of `pipeline.config.DenseParameters`.
    seed : int
        Of the order.
    class_weight : mapping of int to float, optional
        Weight of each label in the loss.
    progress : callable, optional
        Called with ("train-head", epochs done, epochs).

    Returns
    -------
    dict of str to list of float
        ``epoch loss``, and with validation ``val_loss val_accuracy``.

    Raises
    ------
    HeadError
        If training diverges.
    """
    import keras

    binary = model.output_shape[-1] == 1

    def pass_over(epoch: int) -> dict[str, float]:
        total = 0.0
        for X, y in train.batches(batch_size=batch_size, seed=(seed, epoch)):
            targets = y[:, None].astype(np.float32) if binary else y
            model.reset_metrics()  # else Keras gives the mean over all batches so far
            total += len(y) * model.train_on_batch(X, targets, class_weight=class_weight, return_dict=True)["loss"]
        if not np.isfinite(total):
            raise HeadError(f"training diverged in epoch {epoch}: lower the learning rate")
        return {"loss": float(total / len(train))}

    def logits(Z: np.ndarray) -> np.ndarray:
        return two_columns(keras.ops.convert_to_numpy(model(Z, training=False)).astype(np.float64))

    def measure() -> tuple[float, float]:
        assert validation is not None
        outputs = over_pieces(logits, validation)
        accuracy = float(np.mean(outputs.argmax(axis=1) == validation.labels))
        return log_loss(softmax(outputs), validation.labels), accuracy

    has_validation = validation is not None and len(validation)
    history, best = _early_stopping(
        pass_over, measure if has_validation else None, model.get_weights, epochs, patience, progress
    )
    model.set_weights(best)
    return history


def over_pieces(function: Callable[[np.ndarray], np.ndarray], stream: FeatureStream) -> np.ndarray:
    """A function of float32, (k, d) -> (k, ...) applied to all rows, piece by piece; its results, in row order."""
    return np.concatenate([function(Z) for _, Z in stream.in_order()])


def _cut(features: np.ndarray, labels: np.ndarray, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield features[chosen], labels[chosen]


def _early_stopping(
    pass_over: Callable[[int], dict[str, float]],
    measure: Callable[[], tuple[float, float]] | None,
    snapshot: Callable[[], Any],
    epochs: int,
    patience: int,
    progress: Progress | None,
) -> tuple[History, Any]:
    """Epochs until validation gets no better; the history, and the snapshot of the best epoch (the last without it)."""
    history: History = {"epoch": []}
    lowest, waited, best = np.inf, 0, None
    for epoch in range(1, epochs + 1):
        row = {"epoch": float(epoch), **pass_over(epoch)}
        if measure is not None:
            row["val_loss"], row["val_accuracy"] = measure()
        for name, value in row.items():
            history.setdefault(name, []).append(value)
        if progress:
            progress("train-head", epoch, epochs)
        waited += 1
        if measure is None or row["val_loss"] < lowest:
            lowest, waited, best = row.get("val_loss", np.inf), 0, snapshot()
        if measure is not None and patience and waited >= patience:
            break
    return history, best
