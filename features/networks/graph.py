"""The layer graph of a Keras model: stable names, tensors by layer, and where a single tensor separates it.

Pure graph work, for any functional or Sequential model on any Keras backend. ``_nodes`` is the one place that
reads Keras' private call records (``_keras_history``, ``_inbound_nodes``); they have been the same since Keras 3.0.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from features.errors import ConfigurationError, nearest

_LARGEST_TAIL = 0.5  # share of the layers with kernels that may lie behind a boundary


def snake_case(class_name: str) -> str:
    """The word that Keras makes of a class for automatic names and in weight files.

    Examples
    --------
    >>> snake_case("SeparableConv2D"), snake_case("InputLayer"), snake_case("ReLU")
    ('separable_conv2d', 'input_layer', 're_lu')
    """
    split = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", class_name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", split).lower()


def stable_names(layers: Sequence[Any]) -> list[str]:
    """Layer names as a fresh process would give them.

    Keras numbers unnamed layers over the whole process: the last layer of a second MobileNetV3Large is
    ``activation_39``, not ``activation_19``. Here the lowest number of each kind becomes none, and the others move
    down with it; names that someone chose stay.

    Parameters
    ----------
    layers : sequence of keras.Layer
        The layers of one model.

    Returns
    -------
    list of str
        One name per layer, in the order of ``layers``.
    """
    names = [layer.name for layer in layers]
    numbered: dict[str, list[tuple[int, int]]] = {}
    for position, layer in enumerate(layers):
        word = snake_case(type(layer).__name__)
        found = re.fullmatch(rf"{re.escape(word)}(?:_(\d+))?", layer.name)
        if found:
            numbered.setdefault(word, []).append((int(found[1] or 0), position))
    for word, entries in numbered.items():
        first = min(number for number, _ in entries)
        for number, position in entries:
            names[position] = f"{word}_{number - first}" if number > first else word
    return names


def layer_tensors(model: Any) -> dict[str, Any]:
    """Output tensor of every layer that is called once and gives one tensor, in topological order, without inputs.

    ``layer.output`` is not asked, because for a nested model that is a tensor of the inner graph.
    """
    import keras

    nodes = graph_nodes(model)
    calls = Counter(id(operation) for operation, _, _ in nodes)
    return {
        operation.name: outputs[0]
        for operation, _, outputs in nodes
        if isinstance(operation, keras.layers.Layer)
        and not isinstance(operation, keras.layers.InputLayer)
        and calls[id(operation)] == len(outputs) == 1
    }


def valid_cuts(model: Any) -> list[str]:
    """Layers whose single output tensor lies on every path from the input to the output, in topological order.

    The input and the layer that gives the output are left out: cutting there separates nothing.
    """
    nodes = graph_nodes(model)
    last_use = {id(tensor): index for index, (_, inputs, _) in enumerate(nodes) for tensor in inputs}
    last_use.update((id(tensor), len(nodes)) for tensor in model.outputs)
    tensors = layer_tensors(model)
    ends = {id(tensor) for tensor in model.outputs}
    cuts: list[str] = []
    live: set[int] = set()
    for index, (operation, inputs, outputs) in enumerate(nodes):
        live -= {id(tensor) for tensor in inputs if last_use[id(tensor)] == index}
        live |= {id(tensor) for tensor in outputs if id(tensor) in last_use}
        tensor = tensors.get(operation.name)
        if tensor is not None and live == {id(tensor)} and not live & ends:
            cuts.append(operation.name)
    return cuts


def cut_at(model: Any, layer: str) -> tuple[Any, Any]:
    """Two models that share the layers of ``model`` and compose to it.

    Parameters
    ----------
    model : keras.Model
        One input, one output.
    layer : str
        A valid cut.

    Returns
    -------
    tuple of keras.Model
        Trunk, from the input to the layer's output, and tail, from there to the output.

    Raises
    ------
    ConfigurationError
        If no single tensor separates the graph there; the nearest valid cuts are listed.
    """
    import keras

    check_cut(model, layer)
    tensor = layer_tensors(model)[layer]
    trunk = keras.Model(model.inputs[0], tensor, name=f"{model.name}_trunk")
    return trunk, keras.Model(tensor, model.outputs[0], name=f"{model.name}_tail")


def check_cut(model: Any, layer: str) -> None:
    """Raise ``ConfigurationError`` unless ``layer`` is a valid cut of ``model``."""
    cuts = valid_cuts(model)
    if layer in cuts:
        return
    order = list(layer_tensors(model))
    if layer not in order:
        raise ConfigurationError(f"{model.name} has no layer {layer!r}{nearest(layer, order)}")
    place = order.index(layer)
    before = [name for name in cuts if order.index(name) < place][-2:]
    after = [name for name in cuts if order.index(name) > place][:2]
    raise ConfigurationError(
        f"{model.name} cannot be cut at {layer!r}: other paths lead past it to the output. "
        f"Nearest valid cuts before it: {', '.join(before) or 'none'}; after it: {', '.join(after) or 'none'}"
    )


def nearest_earlier_cut(model: Any, layer_index: int) -> str:
    """The last valid cut before ``model.layers[layer_index]``.

    Parameters
    ----------
    model : keras.Model
        One input, one output.
    layer_index : int
        Index of the first layer that is to be trained; negative ones count from the end.

    Raises
    ------
    ConfigurationError
        If the index does not exist, or everything before it is an input or a branch.
    """
    count = len(model.layers)
    if not -count <= layer_index < count:
        raise ConfigurationError(f"{model.name} has {count} layers; received the layer index {layer_index}")
    frozen = {layer.name for layer in model.layers[: layer_index % count]}
    earlier = [name for name in valid_cuts(model) if name in frozen]
    if not earlier:
        raise ConfigurationError(
            f"{model.name}: no single tensor separates the graph before layer {layer_index} "
            f"({model.layers[layer_index].name!r}). Train it end to end, or start at a later layer."
        )
    return earlier[-1]


def boundary_by_rule(model: Any) -> str:
    """The layer just before the last stage, found from the graph.

    The last stage begins at the first layer with weights behind the last one whose output is larger (in height
    times width) than that of the last layer with weights; the boundary is the last valid cut before it. From
    there it moves back over at most one layer with a kernel if that leaves fewer values to store: the input of
    an inverted residual instead of its expansion, a tensor instead of its padded copy. It must leave at most half
    of the layers with kernels to the tail.

    Raises
    ------
    ConfigurationError
        If the graph has no such cut, as NASNet's, where every cell reads the two before it.
    """
    nodes = [(operation, outputs[0]) for operation, _, outputs in graph_nodes(model)]
    names = [operation.name for operation, _ in nodes]
    areas = [
        (index, tensor.shape[1] * tensor.shape[2])
        for index, (operation, tensor) in enumerate(nodes)
        if getattr(operation, "weights", ()) and len(tensor.shape) == 4 and None not in tensor.shape[1:]
    ]
    if not areas:
        raise ConfigurationError(
            f"{model.name} has no layer with weights and a 4-D output of known size, so no boundary"
        )
    final = areas[-1][1]
    larger = [index for index, area in areas if area > final]
    start = next(index for index, _ in areas if index > (larger[-1] if larger else -1))
    cuts = [names.index(name) for name in valid_cuts(model)]
    before = [index for index in cuts if index < start]
    kernels = [index for index, (operation, _) in enumerate(nodes) if _has_kernel(operation)]
    chosen = before[-1] if before else -1
    for index in reversed(before):
        if sum(index < kernel <= before[-1] for kernel in kernels) > 1:
            break
        if _values(nodes[index][1]) < _values(nodes[chosen][1]):
            chosen = index
    tail = sum(kernel > chosen for kernel in kernels)
    if tail > _LARGEST_TAIL * len(kernels):
        where = f"the last is {names[chosen]!r}, which leaves" if before else "there is none, which leaves"
        raise ConfigurationError(
            f"{model.name} has no valid interior cut: a single tensor separates its graph only near the ends "
            f"({where} {tail} of {len(kernels)} layers with kernels behind it). Train a head only, or name the "
            "layer to unfreeze from."
        )
    return names[chosen]


def _has_kernel(operation: Any) -> bool:
    return any(len(variable.shape) >= 2 for variable in getattr(operation, "weights", ()))


def _values(tensor: Any) -> int:
    return math.prod(length for length in tensor.shape[1:] if length)


def graph_nodes(model: Any) -> list[tuple[Any, list[Any], list[Any]]]:
    """Calls that lead to the outputs of ``model``, as (operation, inputs, outputs), in topological order.

    Walked back from the outputs, so that calls of the same layers in other models do not matter.
    """
    order: list[tuple[Any, list[Any], list[Any]]] = []
    done: set[int] = set()
    stack = [(tensor, False) for tensor in reversed(model.outputs)]
    while stack:
        tensor, expanded = stack.pop()
        operation, index, _ = tensor._keras_history
        node = operation._inbound_nodes[index]
        if id(node) in done:
            continue
        if expanded:
            done.add(id(node))
            order.append((operation, list(node.input_tensors), list(node.output_tensors)))
            continue
        stack.append((tensor, True))
        stack.extend((parent, False) for parent in reversed(node.input_tensors))
    return order
