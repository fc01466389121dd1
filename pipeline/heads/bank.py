"""The bank: many dense heads with the same rows and batches, trained together in one compiled pass.

The heads of a bank have the same shape and see the same batches. They differ in learning rate, weight decay, dropout,
seed, label smoothing, feature noise, and in whether they see augmented views. Their kernels are joined into one wide
matrix, so that a step is one matrix product forward, one backward and one Adam update, and the steps of an epoch are
one compiled call. Random numbers depend only on (head seed, step, row, column), so a head does not depend on the other
heads, except for the rounding of the products. The views that are drawn, like the order of rows, belong to the batches.
A single head is a bank of one; without dropout and noise it equals Keras's ``fit`` on the same batches.

The mathematics is in `pipeline.heads.bank_math`; this module decides which heads are trained together, and how long.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from features.errors import ConfigurationError, HeadError
from features.networks.backend import load_keras
from features.networks.engines import choose_device
from features.progress import Progress
from pipeline.config import History
from pipeline.heads.bank_math import LOSSES, BankSpec, check_given, forward, ops, programs, spread
from pipeline.heads.epochs import Patience
from pipeline.heads.pooling import chunks
from pipeline.heads.prepared import ArrayRows, Rows
from pipeline.scores.metrics import softmax, two_columns

CACHE_BYTES = 8 << 20  # kernels and moments of one chunk on a CPU, so that they stay in its cache between steps
ROWS_BYTES = 32 << 20  # rows sent to the device in one call
VALIDATION_ROWS = 1024  # rows scored in one call


@dataclasses.dataclass(frozen=True)
class BankHead:
    """The settings that may differ between the heads of a bank.

    Parameters
    ----------
    learning_rate, weight_decay : float
        As in ``keras.optimizers.Adam``: the decay is decoupled and also applies to the biases.
    dropout : float, or tuple of float, 0 <= rate < 1
        As in `pipeline.presets.DenseParameters`: the rate before the last dense layer, or before each one.
    seed : int, 0 to 2**32 - 1
        Random seed of initial weights, dropout and noise.
    label_smoothing : float, 0-1
        Share of the target that is spread evenly over all classes.
    feature_noise : float, >= 0
        Standard deviation of Gaussian noise added to the features before dropout, in the unit of the features.
    draws : bool
        True: each epoch uses one randomly drawn view of each row. False: always view 0.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    dropout: float | tuple[float, ...] = 0.0
    seed: int = 0
    label_smoothing: float = 0.0
    feature_noise: float = 0.0
    draws: bool = False

    def __post_init__(self) -> None:
        check_given("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "a number above 0")
        check_given("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or a positive number")
        check_given("feature_noise", self.feature_noise, 0 <= self.feature_noise < math.inf, "0 or a positive number")
        check_given("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing <= 1, "a number from 0 to 1")
        rates = self.dropout if isinstance(self.dropout, tuple) else (self.dropout,)
        check_given("dropout", self.dropout, all(0 <= rate < 1 for rate in rates), "0 <= rate < 1")
        check_given("seed", self.seed, 0 <= self.seed < 2**32, "a whole number from 0 to 4294967295")


@dataclasses.dataclass(frozen=True)
class BankResult:
    """One trained head.

    Parameters
    ----------
    weights : tuple of float32 arrays
        Kernel and bias of each layer after `best_epoch`, in the order of Keras's ``get_weights``.
    history : dict of str to list of float
        ``epoch loss`` and, with validation rows, ``val_loss val_accuracy`` (of numbers ``val_r2``) for each epoch until the head stopped. If
        the last loss is not finite, training diverged.
    best_epoch : int
        Epoch, counted from 1, with the lowest validation log loss; without validation rows the last epoch with a
        finite loss. 0: there was no such epoch, and these are the initial weights.
    """

    weights: tuple[np.ndarray, ...]
    history: History
    best_epoch: int


def train_bank(
    spec: BankSpec,
    heads: Sequence[BankHead],
    X: np.ndarray,
    y: np.ndarray,
    X_validation: np.ndarray | None = None,
    y_validation: np.ndarray | None = None,
    *,
    memory_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> list[BankResult]:
    """Check arrays and train heads on them with `train_rows`.

    Parameters
    ----------
    spec, heads : BankSpec, sequence of BankHead
        Settings that all heads share, and the settings of each head.
    X : float16 or float32, (n, d)
        Standardised features of the training rows, for instance a read-only memory map; they are read in pieces.
    y : int, (n,), 0 to classes - 1
        Labels.
    X_validation, y_validation : optional
        Validation rows, used for early stopping and to choose the epoch.
    memory_bytes, progress
        See `train_rows`.

    Raises
    ------
    ConfigurationError
        There are no heads, the number of dropout rates is wrong, or one head needs more memory than allowed.
    HeadError
        Rows are not finite, training and validation rows differ in width, or labels are out of range.
    """
    y, width = np.asarray(y), _check_rows("training", X, y, spec)
    held_out = None
    if X_validation is not None and y_validation is not None and len(y_validation):
        held_out = ArrayRows(X_validation, np.asarray(y_validation))
        columns = _check_rows("validation", X_validation, held_out.labels, spec)
        if columns != width:
            raise HeadError(f"validation rows: received {columns} columns, expected {width} as in the training rows")
    return train_rows(spec, heads, ArrayRows(X, y), held_out, memory_bytes=memory_bytes, progress=progress)


def train_rows(
    spec: BankSpec,
    heads: Sequence[BankHead],
    train: Rows,
    held_out: Rows | None = None,
    *,
    memory_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> list[BankResult]:
    """Train heads together.

    Parameters
    ----------
    spec, heads : BankSpec, sequence of BankHead
        Settings that all heads share, and the settings of each head.
    train, held_out : Rows
        Standardised training and validation rows, finite, with labels from 0 to classes - 1. The validation rows are
        used for early stopping and to choose the epoch.
    memory_bytes : int
        Memory for kernels, moments and intermediate values. If it does not hold all heads, groups of them are trained
        one after the other.
    progress : callable, optional
        Called with ("train-head", epochs done, epochs in all).

    Returns
    -------
    list of BankResult
        In the order of `heads`. A head that diverges does not stop the others; its history shows it.

    Raises
    ------
    ConfigurationError
        There are no heads, the number of dropout rates is wrong, or one head needs more memory than allowed.
    """
    check_given("heads", "none", bool(heads), "at least one")
    if train.views == 1:
        heads = [dataclasses.replace(head, draws=False) for head in heads]
    width = train.width
    rates = np.array([_dropout_rates(spec, head) for head in heads], np.float32)
    numbers = sum(rows * columns for rows, columns in _shapes(spec, width))
    # Kernels, two moments and the best kernels so far, and the same again while a step or repacking makes new ones.
    need = 4 * (8 * numbers + 4 * min(spec.batch_size, len(train)) * (width + 4 * spec.hidden + 4 * spec.outputs))
    if need > memory_bytes:
        raise ConfigurationError(
            f"memory: {memory_bytes / 1e6:.3g} MB are left for training, but one such head needs {need / 1e6:.3g} MB; "
            "give more (--memory), or use a smaller batch_size or another pooling"
        )
    at_once = memory_bytes // need
    load_keras()
    # A GPU is fastest with everything in one chunk.
    many = at_once if choose_device("auto") == "gpu" else max(1, min(at_once, CACHE_BYTES // (12 * numbers)))
    # Heads with the same inputs are neighbours; among them, heads with similar learning rates, which stop together.
    order = sorted(range(len(heads)), key=lambda k: (_inputs(heads[k], rates[k]), heads[k].learning_rate))
    turns = [order[start : start + at_once] for start in range(0, len(order), at_once)]
    results: dict[int, BankResult] = {}
    for number, turn in enumerate(turns):

        def tell(epoch: int, before: int = number * spec.epochs) -> None:
            if progress:
                progress("train-head", before + epoch, len(turns) * spec.epochs)

        bank = _Bank(spec, [heads[k] for k in turn], rates[turn], width, many)
        results.update(zip(turn, bank.train(train, held_out, tell), strict=True))
    return [results[k] for k in range(len(heads))]


def predict(spec: BankSpec, result: BankResult, X: np.ndarray) -> np.ndarray:
    """Predict class probabilities with one trained head: float64, (n, classes)."""
    layers = zip(result.weights[::2], result.weights[1::2], strict=True)
    kernels = [np.vstack(layer)[(None,) * (1 + number)] for number, layer in enumerate(layers)]
    parts = [np.zeros((0, spec.outputs))]
    for rows in chunks(X):
        logits, _ = forward(spec, kernels, ops.convert_to_tensor(X[rows], "float32")[None], 1)
        parts.append(ops.convert_to_numpy(logits)[0, 0].astype(np.float64))
    return softmax(two_columns(np.concatenate(parts)))


def initial_weights(spec: BankSpec, seed: int, width: int) -> tuple[np.ndarray, ...]:
    """Kernel and bias of each layer before training, float32.

    A hidden layer is Glorot-uniform (Glorot and Bengio 2010), as in Keras; the last layer is zero, as in
    `pipeline.heads.keras_fit`.
    """
    return _split_bias(_initial_kernels(spec, seed, width))


# ------------------------------------------------------------------------------------------------------ a turn
@dataclasses.dataclass
class _Chunk:
    """Heads that one compiled call trains."""

    slots: np.ndarray  # (G, M): index of the head, -1 for an empty slot
    settings: dict[str, Any]  # tensors (G, M), or (G,) for settings that are equal within a group
    tensors: list[list[Any]]  # kernels, their two moments, the best kernels so far; each a list by layer


class _Bank:
    """The heads that fit into memory together, in chunks of about ``many`` heads."""

    def __init__(self, spec: BankSpec, heads: Sequence[BankHead], rates: np.ndarray, width: int, many: int) -> None:
        self.spec, self.heads, self.rates = spec, heads, rates
        self.inputs = [_inputs(head, rate) for head, rate in zip(heads, rates, strict=True)]
        sizes = collections.Counter(collections.Counter(self.inputs).values())

        def pieces(members: int) -> int:
            return sum(-(-size // members) * count for size, count in sizes.items())

        # The group size with the least work, assuming that preparing a group's inputs costs as much as one more head.
        self.members = min(range(1, min(many, max(sizes)) + 1), key=lambda members: pieces(members) * (members + 1))
        groups = max(1, many // self.members)
        self.groups = -(-pieces(self.members) // -(-pieces(self.members) // groups))
        shared = dataclasses.replace(spec, epochs=1, patience=0, order_seed=0, class_weights=None)
        drops = tuple(bool(column.any()) for column in rates.T)
        self.draws = tuple(sorted({head.draws for head in heads}))
        noisy, mixed = any(head.feature_noise for head in heads), len(self.draws) > 1
        self.run, self.score = programs(shared, drops=drops, noisy=noisy, mixed=mixed)
        kernels = {k: _initial_kernels(spec, head.seed, width) for k, head in enumerate(heads)}
        self.chunks = [self._chunk(slots, [kernels]) for slots in self._slots(range(len(heads)))]
        for chunk in self.chunks:
            zeros = [ops.zeros_like(kernel) for kernel in chunk.tensors[0]]
            chunk.tensors += [zeros, zeros, list(chunk.tensors[0])]

    def train(self, train: Rows, held_out: Rows | None, tell: Callable[[int], None]) -> list[BankResult]:
        count = len(self.heads)
        alive, best_epoch = np.ones(count, bool), np.zeros(count, int)
        waiting = Patience(self.spec.patience, np.full(count, np.inf), np.zeros(count, int))
        logs: list[History] = [{} for _ in self.heads]
        kernels: dict[int, list[np.ndarray]] = {}
        for epoch in range(self.spec.epochs):
            scores = {"epoch": np.full(count, epoch + 1.0), "loss": self._run_epoch(train, epoch)}
            better = alive & np.isfinite(scores["loss"])
            if held_out is not None:
                scores["val_loss"], scores[f"val_{LOSSES[self.spec.loss].name}"] = self._score_rows(held_out)
                better &= waiting.lower(np.where(better, scores["val_loss"], np.inf))
            for k, name in itertools.product(np.flatnonzero(alive), scores):
                logs[k].setdefault(name, []).append(float(scores[name][k]))
            best_epoch[better] = epoch + 1
            alive &= np.isfinite(scores["loss"]) & ~waiting.over
            self._keep(better)
            tell(epoch + 1)
            if not alive.any():
                break
            self._drop(alive, kernels)
        self._drop(np.zeros(count, bool), kernels)
        return [BankResult(_split_bias(kernels[k]), logs[k], int(best_epoch[k])) for k in range(count)]

    def _run_epoch(self, train: Rows, epoch: int) -> np.ndarray:
        """Train all heads for one epoch and return the mean training loss of each, float64, (heads,)."""
        batch = min(self.spec.batch_size, len(train))
        steps = -(-len(train) // batch)
        span = min(steps, max(1, min(ROWS_BYTES // (4 * batch * train.width), train.at_once // batch)))
        losses: list[list[Any]] = [[] for _ in self.chunks]
        pieces = train.epoch(epoch, size=span * batch, seed=self.spec.order_seed, draws=self.draws)
        for start, (X, y) in zip(range(0, steps, span), pieces, strict=True):
            shares = 1 / np.clip(len(y) - batch * np.arange(span), 1, batch)
            rows, labels, weights = (
                values.reshape(span, batch, *values.shape[1:]) for values in self._padded(X, y, span * batch)
            )
            first, count = np.int32(epoch * steps + start), np.int32(min(span, steps - start))
            data = [rows.swapaxes(1, 2), labels, weights, shares.astype(np.float32), first, count]
            tensors = [ops.convert_to_tensor(values) for values in data]
            for chunk, sums in zip(self.chunks, losses, strict=True):
                *state, loss = self.run(chunk.tensors[:3], chunk.settings, *tensors)
                chunk.tensors[:3] = map(list, state)
                sums.append(loss)
        return self._by_head(losses, len(train))

    def _score_rows(self, held_out: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Log loss and accuracy of each head on the validation rows."""
        size = min(len(held_out), VALIDATION_ROWS)
        losses: list[list[Any]] = [[] for _ in self.chunks]
        rights: list[list[Any]] = [[] for _ in self.chunks]
        for piece, Z in held_out.pieces(size):
            padded = self._padded(Z, held_out.labels[piece], size, weigh=False)
            tensors = [ops.convert_to_tensor(values) for values in padded]
            for number, chunk in enumerate(self.chunks):
                loss, right = self.score(chunk.tensors[0], chunk.settings, *tensors)
                losses[number].append(loss)
                rights[number].append(right)
        return self._by_head(losses, len(held_out)), self._by_head(rights, len(held_out))

    def _padded(
        self, X: np.ndarray, y: np.ndarray, rows: int, *, weigh: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pad features, labels and weights to ``rows`` rows; the added rows have weight 0."""
        kind = np.int32 if y.ndim == 1 else np.float32
        features, labels, weights = X, np.zeros((rows, *y.shape[1:]), kind), np.zeros(rows, np.float32)
        if len(y) < rows or X.dtype != np.float32:
            features = np.zeros((rows, *X.shape[1:]), np.float32)
            features[: len(y)] = X
        labels[: len(y)] = y
        by_class = self.spec.class_weights if weigh else None
        weights[: len(y)] = 1 if by_class is None else np.array(by_class)[y]
        return features, labels, weights

    def _by_head(self, sums: Sequence[Sequence[Any]], rows: int) -> np.ndarray:
        """Divide the sums of each head by the number of rows; NaN for heads that are no longer in a chunk."""
        means = np.full(len(self.heads), np.nan)
        for chunk, parts in zip(self.chunks, sums, strict=True):
            total = np.asarray(sum(ops.convert_to_numpy(part).astype(np.float64) for part in parts))
            means[chunk.slots[chunk.slots >= 0]] = total[chunk.slots >= 0] / rows
        return means

    def _keep(self, better: np.ndarray) -> None:
        """Store the present kernels of the heads marked in ``better`` as their best ones."""
        for chunk in self.chunks:
            chosen = spread(ops.convert_to_tensor(better[chunk.slots] & (chunk.slots >= 0)), chunk.tensors[0])
            chunk.tensors[3] = [
                ops.where(*parts) for parts in zip(chosen, chunk.tensors[0], chunk.tensors[3], strict=True)
            ]

    def _drop(self, alive: np.ndarray, kernels: dict[int, list[np.ndarray]]) -> None:
        """Remove stopped heads once the others fit into fewer chunks. Until then they are trained on without effect."""
        slots = self._slots(np.flatnonzero(alive))
        if len(slots) == len(self.chunks):
            return
        new = [self._chunk(part, []) for part in slots]
        for kind in range(4):  # one after the other to save memory
            found = self._taken(kind)
            for chunk in new:
                chunk.tensors.append(self._packed(chunk.slots, found))
        kernels.update({k: [part.copy() for part in best] for k, best in found.items() if not alive[k]})
        self.chunks = new

    def _slots(self, numbers: Iterable[int]) -> np.ndarray:
        """Index of the head in each slot, -1 for an empty one: int, (chunks, G, M)."""
        pieces: list[list[int]] = []
        for _, alike in itertools.groupby(numbers, key=lambda k: self.inputs[k]):
            group = list(alike)
            for start in range(0, len(group), self.members):
                piece = group[start : start + self.members]
                pieces.append(piece + [-1] * (self.members - len(piece)))
        pieces += [[-1] * self.members] * (-len(pieces) % self.groups)
        return np.array(pieces, int).reshape(-1, self.groups, self.members)

    def _chunk(self, slots: np.ndarray, kinds: Sequence[dict[int, list[np.ndarray]]]) -> _Chunk:
        names = "learning_rate", "weight_decay", "label_smoothing", "feature_noise"
        columns = {name: [*(getattr(head, name) for head in self.heads), 0] for name in names}
        columns |= {"feature_dropout": [*self.rates[:, 0], 0], "dropout": [*self.rates[:, -1], 0]}
        values = {name: np.array(column, np.float32)[slots] for name, column in columns.items()}
        values["seed"] = np.array([*(head.seed for head in self.heads), 0], np.uint32).view(np.int32)[slots]
        variants = [*(self.draws.index(head.draws) for head in self.heads), 0]
        values["variant"] = np.array(variants, np.int32)[slots]  # which variant of the rows on the device a group uses
        values |= {"group_seed": values["seed"][:, 0]}
        values |= {name: values[name][:, 0] for name in ("variant", "feature_noise", "feature_dropout")}
        settings = {name: ops.convert_to_tensor(value) for name, value in values.items()}
        return _Chunk(slots, settings, [self._packed(slots, found) for found in kinds])

    def _packed(self, slots: np.ndarray, found: dict[int, list[np.ndarray]]) -> list[Any]:
        """Stack the kernels of single heads into the tensors of a chunk, one per layer."""
        tensors = []
        for layer, like in enumerate(next(iter(found.values()))):
            stack = np.zeros((*slots.shape, *like.shape), np.float32)
            for place, k in np.ndenumerate(slots):
                if k >= 0:
                    stack[place] = found[k][layer]
            if layer == 0:
                stack = stack.swapaxes(1, 2).reshape(len(slots), len(like), -1)
            tensors.append(ops.convert_to_tensor(stack))
        return tensors

    def _taken(self, kind: int) -> dict[int, list[np.ndarray]]:
        """Take the kernels of each head out of all chunks; the chunks no longer hold them afterwards."""
        found: dict[int, list[np.ndarray]] = collections.defaultdict(list)
        for chunk in self.chunks:
            for layer, tensor in enumerate(chunk.tensors[kind]):
                stack = ops.convert_to_numpy(tensor)
                if layer == 0:
                    stack = stack.reshape(self.groups, stack.shape[1], self.members, -1).swapaxes(1, 2)
                for place, k in np.ndenumerate(chunk.slots):
                    if k >= 0:
                        found[k].append(stack[place])
            chunk.tensors[kind] = []
        return found


# ----------------------------------------------------------------------------------------------------- helpers
def _shapes(spec: BankSpec, width: int) -> list[tuple[int, int]]:
    """Shapes of the kernels, including the row of the bias."""
    sizes = [width, spec.hidden, spec.outputs] if spec.hidden else [width, spec.outputs]
    return [(rows + 1, columns) for rows, columns in itertools.pairwise(sizes)]


def _initial_kernels(spec: BankSpec, seed: int, width: int) -> list[np.ndarray]:
    kernels = [np.zeros(shape, np.float32) for shape in _shapes(spec, width)]
    if spec.hidden:
        limit = math.sqrt(6 / (width + spec.hidden))
        generator = np.random.Generator(np.random.Philox(key=seed))
        kernels[0][:-1] = generator.uniform(-limit, limit, (width, spec.hidden))
    return kernels


def _split_bias(kernels: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Split kernels whose last row is the bias into kernel and bias, alternating."""
    return tuple(part for kernel in kernels for part in (kernel[:-1], kernel[-1]))


def _dropout_rates(spec: BankSpec, head: BankHead) -> list[float]:
    """Dropout rate before each dense layer."""
    layers = 2 if spec.hidden else 1
    rates = list(head.dropout) if isinstance(head.dropout, tuple) else [0.0] * (layers - 1) + [head.dropout]
    check_given("dropout", head.dropout, len(rates) == layers, f"{layers} rates, one before each dense layer")
    return rates


def _inputs(head: BankHead, rates: np.ndarray) -> tuple[float, ...]:
    """Key that is equal for heads which receive equal inputs: the same views, and the same dropout and noise on them."""
    varied = rates[0] or head.feature_noise
    noise = (head.seed, float(rates[0]), head.feature_noise) if varied else (-1.0, 0.0, 0.0)
    return (float(head.draws), *noise)


def _check_rows(name: str, X: np.ndarray, y: np.ndarray, spec: BankSpec) -> int:
    """Check rows and labels before training and return the number of columns."""
    if X.ndim != 2 or X.dtype not in (np.float16, np.float32) or y.shape != X.shape[:1] or not X.size:
        what = f"{X.dtype} {X.shape} with labels {y.shape}"
        raise HeadError(f"{name} rows: received {what}, expected float16 or float32 (n, d) with labels (n,)")
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= spec.classes:
        what = f"{y.dtype} from {y.min()} to {y.max()}"
        raise HeadError(f"{name} labels: received {what}, expected integers from 0 to {spec.classes - 1}")
    bad = sum(int((~np.isfinite(X[rows]).all(axis=1)).sum()) for rows in chunks(X))
    if bad:
        raise HeadError(f"{name} rows: {bad} of {len(X)} hold values that are not finite; extract them again")
    return int(X.shape[1])
