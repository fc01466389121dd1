"""The mathematics of the bank: random numbers by position, forward pass, gradients and Adam, compiled for chunks of heads.

A chunk holds G groups of M heads. The heads of a group have equal inputs (the same views, and either the same seed,
dropout and noise on the features or no dropout and noise), so their first kernels form one matrix
``(G, d + 1, M * units)``. Second kernels are ``(G, M, units + 1, outputs)``. The last row of a kernel is its bias, and
an empty slot has learning rate 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from features.errors import ConfigurationError, nearest
from features.networks.backend import load_keras
from features.networks.keras_engine import compiled

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7  # the defaults of Keras's Adam


@dataclasses.dataclass(frozen=True)
class BankSpec:
    """The settings that all heads of a bank share.

    Parameters
    ----------
    classes : int
        Number of classes; two classes have a single logit.
    hidden : int
        Units of the hidden layer; 0: a linear head.
    activation : str
        Activation of the hidden layer, a key of `SLOPES`.
    epochs, batch_size : int
        Passes over the rows; rows per step (the last step of an epoch may have fewer).
    patience : int
        Epochs without a lower validation log loss after which a head stops; 0: it never stops early.
    order_seed : int
        Random seed of the row order.
    class_weights : tuple of float, optional
        Weight of each class in the loss, like ``class_weight`` of ``fit``. Validation is not weighted.
    loss : {"softmax", "sigmoid", "squared"}
        Loss of the logits: of one class, int32 (n,); or of ``classes`` labels or numbers, whose targets and weights are
        float32 (n, 2 classes), see `pipeline.tasks.task.packed`.
    """

    classes: int
    hidden: int = 0
    activation: str = "relu"
    epochs: int = 50
    patience: int = 5
    batch_size: int = 32
    order_seed: int = 0
    class_weights: tuple[float, ...] | None = None
    loss: str = "softmax"

    def __post_init__(self) -> None:
        least = {
            "classes": 2 if self.loss == "softmax" else 1,
            "hidden": 0,
            "epochs": 1,
            "patience": 0,
            "batch_size": 1,
            "order_seed": 0,
        }
        for name, low in least.items():
            check_given(name, getattr(self, name), getattr(self, name) >= low, f"{low} or more")
        known = f"one of {', '.join(SLOPES)}{nearest(self.activation, SLOPES)}"
        check_given("activation", self.activation, self.activation in SLOPES, known)
        weights = (1.0,) * self.classes if self.class_weights is None else self.class_weights
        good = len(weights) == self.classes and all(0 <= weight < math.inf for weight in weights)
        check_given("class_weights", weights, good, f"{self.classes} finite numbers of 0 or more")

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return 1 if self.classes == 2 and self.loss == "softmax" else self.classes

    def weighted(self, class_weights: tuple[float, ...] | None) -> BankSpec:
        """Return the same settings with these class weights."""
        return dataclasses.replace(self, class_weights=class_weights)


# ---------------------------------------------------------------------------------------------- random numbers
class _Late:
    """``keras.ops``, imported when it is first used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(load_keras().ops, name)


ops: Any = _Late()


def draws(seeds: Any, step: Any, purpose: int, rows: int, columns: int) -> Any:
    """Uniform random numbers by position: a hash of (seed, purpose, step, row, column), equal on all backends and devices.

    Parameters
    ----------
    seeds : int32 tensor, (...)
        One seed per head or group.
    step : int32 tensor, ()
        Step, counted from the start of training.
    purpose : int
        Distinguishes several draws within one step.

    Returns
    -------
    float32 tensor, (..., rows, columns), 0 <= value < 1
    """
    row_keys = _mix(_mix(_mix(_mix(seeds) + purpose) + step)[..., None] + ops.arange(rows, dtype="int32"))
    column_keys = _mix(ops.arange(columns, dtype="int32") + 0x632BE5AB)  # without it row 0 of seed 0 is all zeros
    mixed = _mix(ops.bitwise_xor(row_keys[..., None], column_keys))
    return ops.cast(_shifted(mixed, 8), "float32") * 2.0**-24


def _mix(words: Any) -> Any:
    """Hash 32-bit words (lowbias32 of Wellons's hash-prospector). They are signed: PyTorch lacks unsigned arithmetic."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        words = ops.bitwise_xor(words, _shifted(words, shift)) * factor
    return ops.bitwise_xor(words, _shifted(words, 16))


def _shifted(words: Any, bits: int) -> Any:
    """Shift words to the right, filling with zeros."""
    return ops.bitwise_and(ops.bitwise_right_shift(words, bits), (1 << (32 - bits)) - 1)


def _normal(seeds: Any, step: Any, rows: int, columns: int) -> Any:
    """Standard normal numbers by the inverse distribution function, which XLA computes faster than Box-Muller."""
    return math.sqrt(2) * ops.erfinv(2 * draws(seeds, step, 1, rows, columns) - (1 - 2.0**-24))


def _mask(seeds: Any, rates: Any, step: Any, purpose: int, rows: int, columns: int) -> Any:
    """Dropout as a factor: 0 for dropped values, 1 / (1 - rate) for the others."""
    rates = rates[..., None, None]
    return ops.where(draws(seeds, step, purpose, rows, columns) >= rates, 1 / (1 - rates), 0.0)


# ------------------------------------------------------------------------------------------------- mathematics
# Derivatives of keras.activations, as Keras has no automatic differentiation that works on all backends.
SLOPES: dict[str, Callable[[Any], Any]] = {
    "relu": lambda z: ops.cast(z > 0, "float32"),
    "gelu": lambda z: 0.5 * (1 + ops.erf(z / 2**0.5)) + z * ops.exp(-0.5 * z * z) / math.sqrt(2 * math.pi),
    "elu": lambda z: ops.where(z > 0, 1.0, ops.exp(z)),
    "selu": lambda z: 1.0507009873554805 * ops.where(z > 0, 1.0, 1.6732632423543772 * ops.exp(z)),
    "silu": lambda z: ops.sigmoid(z) * (1 + z * (1 - ops.sigmoid(z))),
    "tanh": lambda z: 1 - ops.square(ops.tanh(z)),
    "sigmoid": lambda z: ops.sigmoid(z) * (1 - ops.sigmoid(z)),
}


def forward(spec: BankSpec, kernels: Sequence[Any], x: Any, members: int, mask: Any = 1.0) -> tuple[Any, list[Any]]:
    """Logits (G, M, b, outputs) of inputs (G or 1, b, d), and the intermediate values that `_gradients` needs."""
    inputs = _with_ones(x)
    z = ops.matmul(inputs, kernels[0])
    z = ops.swapaxes(ops.reshape(z, (*z.shape[:2], members, z.shape[2] // members)), 1, 2)
    if not spec.hidden:
        return z, [inputs]
    hidden = _with_ones(getattr(load_keras().activations, spec.activation)(z) * mask)
    return ops.matmul(hidden, kernels[1]), [inputs, z, hidden]


def _gradients(spec: BankSpec, kernels: Sequence[Any], kept: list[Any], slope: Any, mask: Any) -> list[Any]:
    """Gradients of the loss with respect to the kernels, from those with respect to the logits (backpropagation)."""
    found = []
    if spec.hidden:
        _, z, hidden = kept
        found = [ops.matmul(ops.swapaxes(hidden, -1, -2), slope)]
        slope = ops.matmul(slope, ops.swapaxes(kernels[1][..., :-1, :], -1, -2)) * mask * SLOPES[spec.activation](z)
    groups, members, rows, units = slope.shape
    slope = ops.reshape(ops.swapaxes(slope, 1, 2), (groups, rows, members * units))
    return [ops.matmul(ops.swapaxes(kept[0], -1, -2), slope), *found]


def _softmax(spec: BankSpec, logits: Any, labels: Any, smoothing: Any) -> tuple[Any, Any]:
    one_hot = ops.cast(labels[:, None], "float32") if spec.outputs == 1 else ops.one_hot(labels, spec.classes)
    target = one_hot * (1 - smoothing) + smoothing / spec.classes
    if spec.outputs == 1:
        whole, probability = ops.softplus(logits), ops.sigmoid(logits)
    else:
        whole = ops.logsumexp(logits, axis=-1, keepdims=True)
        probability = ops.exp(logits - whole)
    return whole[..., 0] - ops.sum(target * logits, axis=-1), probability - target


def _sigmoid(spec: BankSpec, logits: Any, labels: Any, smoothing: Any) -> tuple[Any, Any]:
    target, share = labels[:, : spec.classes], labels[:, spec.classes :] / spec.classes
    target = target * (1 - smoothing) + smoothing / 2
    return ops.sum(share * (ops.softplus(logits) - target * logits), axis=-1), share * (ops.sigmoid(logits) - target)


def _squared(spec: BankSpec, logits: Any, labels: Any, smoothing: Any) -> tuple[Any, Any]:
    target, share = labels[:, : spec.classes], labels[:, spec.classes :] / spec.classes
    return ops.sum(share * ops.square(logits - target), axis=-1) / 2, share * (logits - target)


def _right_class(spec: BankSpec, logits: Any, labels: Any) -> Any:
    guess = logits[..., 0] > 0 if spec.outputs == 1 else ops.argmax(logits, axis=-1)
    return ops.cast(ops.equal(ops.cast(guess, "int32"), labels), "float32")


def _right_labels(spec: BankSpec, logits: Any, labels: Any) -> Any:
    holds = ops.cast(logits > 0, "float32")
    right = ops.cast(ops.equal(holds, labels[:, : spec.classes]), "float32")
    return ops.sum(labels[:, spec.classes :] * right, axis=-1) / spec.classes


def _explained(spec: BankSpec, logits: Any, labels: Any) -> Any:
    return 1 - 2 * _squared(spec, logits, labels, 0.0)[0]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of logits (G, M, b, outputs).

    Parameters
    ----------
    values : callable
        Loss of each row, (G, M, b), and its gradient with respect to the logits (G, M, b, outputs); labels that are unknown
        have no share in it.
    measure : callable
        A score of each row, (G, M, b), that is easier to read.
    name : str
        What the mean of the measure is called in a history.
    """

    values: Callable[[BankSpec, Any, Any, Any], tuple[Any, Any]]
    measure: Callable[[BankSpec, Any, Any], Any]
    name: str


LOSSES = {
    "softmax": Loss(_softmax, _right_class, "accuracy"),
    "sigmoid": Loss(_sigmoid, _right_labels, "accuracy"),
    "squared": Loss(_squared, _explained, "r2"),
}


def _with_ones(x: Any) -> Any:
    return ops.concatenate([x, ops.ones_like(x[..., :1])], axis=-1)


def spread(values: Any, kernels: Sequence[Any]) -> list[Any]:
    """Reshape one number per head, (G, M), so that it multiplies the kernels."""
    groups, members = values.shape
    columns = kernels[0].shape[-1]
    wide = ops.broadcast_to(values[..., None], (groups, members, columns // members))
    return [ops.reshape(wide, (groups, 1, columns)), values[..., None, None]][: len(kernels)]


@functools.lru_cache(maxsize=8)
def programs(
    spec: BankSpec, *, drops: tuple[bool, ...], noisy: bool, mixed: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compile two functions: one trains a chunk for a number of steps, the other scores it on rows.

    Training rows are (steps, V, b, d) with V variants of each batch, such as view 0 and a drawn view; with ``mixed``
    there is more than one variant, and each group chooses its own.
    """

    of_rows = LOSSES[spec.loss]

    def train(state: Any, per: Any, rows: Any, labels: Any, weights: Any, shares: Any, first: Any, steps: Any) -> Any:
        smoothing = per["label_smoothing"][..., None, None]
        # Reshaped outside the loop, in which the index arithmetic would prevent vectorisation of the update.
        paces, decays = spread(per["learning_rate"], state[0]), spread(per["weight_decay"], state[0])
        shrinks = [1 - pace * decay for pace, decay in zip(paces, decays, strict=True)]
        batch, width = rows.shape[2:]

        def step(i: Any, carry: Any) -> Any:
            kernels, means, squares, losses = carry
            now, mask = first + i, 1.0
            x = ops.take(rows[i], per["variant"], axis=0) if mixed else rows[i]
            if noisy:
                x = x + per["feature_noise"][:, None, None] * _normal(per["group_seed"], now, batch, width)
            if drops[0]:
                x = x * _mask(per["group_seed"], per["feature_dropout"], now, 2, batch, width)
            if spec.hidden and drops[1]:
                mask = _mask(per["seed"], per["dropout"], now, 3, batch, spec.hidden)
            logits, kept = forward(spec, kernels, x, per["seed"].shape[1], mask)
            loss, slope = of_rows.values(spec, logits, labels[i], smoothing)
            slopes = _gradients(spec, kernels, kept, slope * (weights[i] * shares[i])[:, None], mask)
            means = [m + (g - m) * (1 - BETA_1) for m, g in zip(means, slopes, strict=True)]
            squares = [v + (g * g - v) * (1 - BETA_2) for v, g in zip(squares, slopes, strict=True)]
            count = ops.cast(now + 1, "float32")
            unbias = ops.sqrt(1 - ops.power(BETA_2, count)) / (1 - ops.power(BETA_1, count))
            kernels = [
                kernel * shrink - pace * unbias * m / (ops.sqrt(v) + EPSILON)
                for kernel, shrink, pace, m, v in zip(kernels, shrinks, paces, means, squares, strict=True)
            ]
            return kernels, means, squares, losses + ops.sum(loss * weights[i], axis=-1)

        return ops.fori_loop(0, steps, step, (*state, ops.zeros_like(per["learning_rate"])))

    def score(kernels: Any, per: Any, x: Any, labels: Any, weights: Any) -> Any:
        groups, members = per["seed"].shape
        first = ops.swapaxes(kernels[0], 0, 1)  # without dropout and noise all groups have the same inputs
        merged = [ops.reshape(first, (1, first.shape[0], groups * first.shape[2]))]
        merged += [ops.reshape(kernel, (1, groups * members, *kernel.shape[2:])) for kernel in kernels[1:]]
        logits, _ = forward(spec, merged, x[None], groups * members)
        loss, _ = of_rows.values(spec, logits, labels, 0.0)
        right = of_rows.measure(spec, logits, labels)
        return [ops.reshape(ops.sum(value * weights, axis=-1), (groups, members)) for value in (loss, right)]

    return compiled(train, fuse=True), compiled(score, fuse=True)


def check_given(name: str, received: object, good: bool, expected: str) -> None:
    """Raise ``ConfigurationError`` with the received and the expected value unless ``good``."""
    if not good:
        raise ConfigurationError(f"{name}: received {received}, expected {expected}")
