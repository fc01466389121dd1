"""Fold BatchNormalization into the layer with a kernel right before it: fewer passes over memory, the same numbers.

With stored statistics a BatchNormalization is an affine map per channel (Ioffe & Szegedy 2015,
https://arxiv.org/abs/1502.03167, equation 11), so kernel and bias of the layer before it can take it over.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from typing import Any

import numpy as np

from features.networks.graph import graph_nodes

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # relative difference, max|a-b| / max|b|, that a folded model may have on the batch of the proof
_KINDS = ("Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A layer with a kernel, and the BatchNormalization that alone reads it."""

    kernel: Any
    norm: Any


def fold_batch_norms(model: Any, batch: np.ndarray) -> Any:
    """The same function with fewer layers, proven on a batch.

    Parameters
    ----------
    model : keras.Model
        Functional, one input; not changed. Its outputs may lie at any layer: where the tensor between kernel and
        BatchNormalization is itself an output, that pair stays as it is.
    batch : float32, (n, ...)
        Input of the model for the proof. On a GPU prove in full float32: TensorFloat-32 alone differs by 1e-3.

    Returns
    -------
    keras.Model
        A new model that shares every layer with ``model`` but the folded ones; ``model`` itself where nothing can
        be folded or an output would differ by more than ``TOLERANCE``, which is logged.
    """
    import keras

    if not isinstance(model, keras.Model) or isinstance(model, keras.Sequential) or not getattr(model, "inputs", None):
        logger.info("%s is no functional model; BatchNormalization is not folded", getattr(model, "name", model))
        return model
    pairs = foldable(model)
    if not pairs:
        logger.debug("%s has no BatchNormalization right behind a layer with a kernel", model.name)
        return model
    folded = _rebuilt(model, pairs)
    found = largest_difference(_outputs(folded, batch), _outputs(model, batch))
    if not found <= TOLERANCE:  # also NaN
        logger.warning(
            "%s: with BatchNormalization folded the outputs differ by %.2g relative, at most %.0e is allowed; "
            "the network runs as it was built, which is slower",
            model.name,
            found,
            TOLERANCE,
        )
        return model
    logger.debug("%s: %d BatchNormalization folded, relative difference %.2g", model.name, len(pairs), found)
    return folded


def foldable(model: Any) -> list[Pair]:
    """Pairs of ``model`` that can become one layer, in topological order.

    Both are called once, nothing else reads the tensor between them, which is no output either, the kernel's layer
    has no activation of its own, and statistics and kernel have the same channels.
    """
    import keras

    nodes = graph_nodes(model)
    calls = Counter(id(operation) for operation, _, _ in nodes)
    readers = Counter(id(tensor) for _, inputs, _ in nodes for tensor in inputs)
    readers.update(id(tensor) for tensor in model.outputs)
    kinds = {getattr(keras.layers, name) for name in _KINDS}
    makers = {
        id(outputs[0]): operation
        for operation, _, outputs in nodes
        # the very classes: a subclass may compute something else
        if type(operation) in kinds and calls[id(operation)] == len(outputs) == 1
    }
    pairs = []
    for operation, inputs, _ in nodes:
        if type(operation) is not keras.layers.BatchNormalization or calls[id(operation)] > 1 or len(inputs) != 1:
            continue
        kernel = makers.get(id(inputs[0]))
        if kernel is None or readers[id(inputs[0])] > 1 or not _fits(kernel, operation, len(inputs[0].shape)):
            continue
        pairs.append(Pair(kernel, operation))
    return pairs


def largest_difference(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Largest relative difference, max|a-b| / max|b| per tensor; infinite where shapes differ, NaN for NaN.

    Examples
    --------
    >>> largest_difference([np.array([1.0, 2.5])], [np.array([1.0, 2.0])])
    0.25
    >>> largest_difference([np.zeros(2)], [np.zeros(2)])
    0.0
    """
    ratios = [0.0]
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        with np.errstate(invalid="ignore"):  # infinity minus infinity: NaN, which no tolerance accepts
            difference = float(np.abs(one - other).max(initial=0))
            scale = float(np.abs(other).max(initial=0))
        ratios.append(difference / scale if scale else float("inf") if difference else 0.0)
    return float(np.max(ratios))  # NaN stays NaN


def _fits(kernel: Any, norm: Any, rank: int) -> bool:
    import keras

    axis = norm.axis if isinstance(norm.axis, int) else -2
    return (
        getattr(kernel, "data_format", "channels_last") == "channels_last"
        and axis in (-1, rank - 1)
        and kernel.activation in (None, keras.activations.linear)
        and kernel.dtype_policy.name == norm.dtype_policy.name
        and not getattr(kernel, "lora_enabled", False)
        and getattr(kernel, "quantization_mode", None) is None
    )


def _rebuilt(model: Any, pairs: list[Pair]) -> Any:
    import keras

    merged = {id(pair.kernel): (pair.kernel, pair.norm) for pair in pairs}
    gone = {id(pair.norm) for pair in pairs}

    def replace(layer: Any) -> Any:
        return _merge(*merged[id(layer)]) if id(layer) in merged else layer

    def call(layer: Any, *inputs: Any, **options: Any) -> Any:
        return inputs[0] if id(layer) in gone else layer(*inputs, **options)

    return keras.models.clone_model(model, clone_function=replace, call_function=call)


def _merge(kernel: Any, norm: Any) -> Any:
    """One layer of the kernel's kind that does the work of both."""
    import keras

    scale, shift = affine(norm)
    layer = type(kernel).from_config({**kernel.get_config(), "use_bias": True})
    layer.build_from_config(kernel.get_build_config())
    weights = [value.astype(np.float64) for value in kernel.get_weights()]
    bias = weights.pop() if kernel.use_bias else np.zeros_like(scale)
    # A depthwise kernel is (h, w, channels, multiplier); of the two separable ones the last makes the channels.
    depthwise = isinstance(kernel, keras.layers.DepthwiseConv2D)
    weights[-1] *= scale.reshape(weights[-1].shape[-2:]) if depthwise else scale
    layer.set_weights([value.astype(np.float32) for value in [*weights, bias * scale + shift]])
    return layer


def affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift per channel that a BatchNormalization with stored statistics applies, float64, (channels,)."""
    import keras

    mean, variance, gamma, beta = (
        None if weight is None else np.asarray(keras.ops.convert_to_numpy(weight), np.float64)
        for weight in (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
    )
    assert mean is not None
    assert variance is not None
    scale = 1 / np.sqrt(variance + norm.epsilon)
    scale = scale if gamma is None else scale * gamma
    return scale, (0.0 if beta is None else beta) - mean * scale


def _outputs(model: Any, batch: np.ndarray) -> list[np.ndarray]:
    import keras

    outputs = model(keras.ops.convert_to_tensor(batch), training=False)
    listed = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    return [keras.ops.convert_to_numpy(output).astype(np.float64) for output in listed]
