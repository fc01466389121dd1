"""Fold BatchNormalization into the layer with a kernel right before it, which saves passes over memory.

With stored statistics, BatchNormalization is an affine map per channel (Ioffe & Szegedy 2015,
https://arxiv.org/abs/1502.03167, equation 11), so the kernel and bias of the preceding layer can absorb it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from typing import Any

import numpy as np

from features.networks.graph import graph_nodes

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # largest accepted relative difference, max|a-b| / max|b|, of the folded model on the test batch
_KINDS = ("Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A layer with a kernel, and the BatchNormalization that is the only reader of its output."""

    kernel: Any
    norm: Any


def fold_batch_norms(model: Any, batch: np.ndarray) -> Any:
    """Fold the BatchNormalizations of a model, and check on a batch that the outputs stay the same.

    Parameters
    ----------
    model : keras.Model
        A functional model with one input; it is not modified. Its outputs may be those of any layers: if the tensor
        between a kernel and its BatchNormalization is itself an output, that pair is not folded.
    batch : float32, (n, ...)
        Input for the check. On a GPU, check in full float32: TensorFloat-32 alone makes a difference of 1e-3.

    Returns
    -------
    keras.Model
        A new model that shares all layers with ``model`` except the folded ones. If nothing can be folded, or an
        output would differ by more than ``TOLERANCE`` (which is logged), ``model`` itself.
    """
    import keras

    if not isinstance(model, keras.Model) or isinstance(model, keras.Sequential) or not getattr(model, "inputs", None):
        logger.info("%s is not a functional model; nothing is folded", getattr(model, "name", model))
        return model
    pairs = foldable(model)
    if not pairs:
        logger.debug("%s has no BatchNormalization right after a layer with a kernel", model.name)
        return model
    folded = _rebuilt(model, pairs)
    found = largest_difference(_outputs(folded, batch), _outputs(model, batch))
    if not found <= TOLERANCE:  # true for NaN too
        logger.warning(
            "%s: folding BatchNormalization changes the outputs by %.2g (relative), at most %.0e is allowed; "
            "the network runs without folding, which is slower",
            model.name,
            found,
            TOLERANCE,
        )
        return model
    logger.debug("%s: folded %d BatchNormalizations, relative difference %.2g", model.name, len(pairs), found)
    return folded


def foldable(model: Any) -> list[Pair]:
    """Return the pairs of layers of ``model`` that can be merged into one, in topological order.

    Both layers are called once; the tensor between them has no other reader and is not an output of the model; the
    layer with the kernel has no activation; and the statistics are per channel of the kernel's output.
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
        # exactly these classes: a subclass may compute something else
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
    """Return the largest relative difference, max|a-b| / max|b| per tensor.

    It is infinite if two shapes differ, and NaN if a tensor contains NaN.

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
        with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN, which exceeds every tolerance
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
    """Make one layer, of the same class as ``kernel``, that computes what both compute."""
    import keras

    scale, shift = affine(norm)
    layer = type(kernel).from_config({**kernel.get_config(), "use_bias": True})
    layer.build_from_config(kernel.get_build_config())
    weights = [value.astype(np.float64) for value in kernel.get_weights()]
    bias = weights.pop() if kernel.use_bias else np.zeros_like(scale)
    # A depthwise kernel has the shape (h, w, channels, multiplier). A separable layer has two kernels; the second one
    # makes the output channels.
    depthwise = isinstance(kernel, keras.layers.DepthwiseConv2D)
    weights[-1] *= scale.reshape(weights[-1].shape[-2:]) if depthwise else scale
    layer.set_weights([value.astype(np.float32) for value in [*weights, bias * scale + shift]])
    return layer


def affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and shift per channel of a BatchNormalization with stored statistics, each float64, (channels,)."""
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
