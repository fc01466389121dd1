"""The layer graph of a Keras model: stable layer names, tensors by layer, and where the graph can be cut in two.

It works for functional and Sequential models on any Keras backend. Only ``graph_nodes`` reads Keras' private call
records (``_keras_history``, ``_inbound_nodes``), and only ``with_true_shapes`` writes to ``_shape``; they have not changed
since Keras 3.0.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from features.errors import ConfigurationError, nearest

_LARGEST_TAIL = 0.5  # largest share of the layers with kernels that may follow a boundary


def snake_case(class_name: str) -> str:
    """Turn a class name into the word that Keras uses for it in automatic layer names and in weights files.

    Examples
    --------
    >>> snake_case("SeparableConv2D"), snake_case("InputLayer"), snake_case("ReLU")
    ('separable_conv2d', 'input_layer', 're_lu')
    """
    split = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", class_name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", split).lower()


def stable_names(layers: Sequence[Any]) -> list[str]:
    """Return the layer names that the same model would have in a fresh process.

    Keras numbers unnamed layers over the whole process: the last layer of a second MobileNetV3Large is
    ``activation_39``, not ``activation_19``. Here the numbers of each kind of layer start from the beginning again;
    names that were chosen explicitly stay as they are.

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
    """Return the output tensor of every layer that is called once and has one output, in topological order.

    A layer with several outputs counts if one of them is the output of the model. Input layers are left out, and layers
    inside nested models, which ``layer_shapes`` has. ``layer.output`` is not used, because for a nested model it is a
    tensor of the inner graph.
    """
    import keras

    nodes = graph_nodes(model)
    calls = Counter(id(operation) for operation, _, _ in nodes)
    ends = {id(tensor) for tensor in model.outputs}
    found = {}
    for operation, _, outputs in nodes:
        tensors = outputs if len(outputs) == 1 else [tensor for tensor in outputs if id(tensor) in ends]
        is_layer = isinstance(operation, keras.layers.Layer) and not isinstance(operation, keras.layers.InputLayer)
        if is_layer and calls[id(operation)] == len(tensors) == 1:
            found[operation.name] = tensors[0]
    return found


def layer_shapes(model: Any) -> dict[str, tuple[Any, ...]]:
    """Return the output shape, without the batch axis, of every layer in topological order.

    A layer inside a nested model is called ``OUTER/INNER`` and comes before the layer ``OUTER`` itself.
    """
    shapes: dict[str, tuple[Any, ...]] = {}
    nested = {
        operation.name: (operation, inputs[0]) for operation, inputs, _ in graph_nodes(model) if _is_nested(operation)
    }
    for name, tensor in layer_tensors(model).items():
        if name in nested:
            shapes |= {f"{name}/{inner}": shape for inner, shape in _inner_shapes(*nested[name]).items()}
        shapes[name] = tuple(tensor.shape[1:])
    return shapes


def layer_tensor(model: Any, name: str) -> Any:
    """Return the output tensor of a layer, as a function of the input of ``model``; ``OUTER/INNER`` lies in a nested model."""
    import keras

    outer, _, inner = name.partition("/")
    if not inner:
        return layer_tensors(model)[name]
    nested, value = next(
        (operation, inputs[0]) for operation, inputs, _ in graph_nodes(model) if operation.name == outer
    )
    return keras.Model(nested.inputs[0], layer_tensor(nested, inner), name=f"{outer}_{inner.replace('/', '_')}")(value)


def _is_nested(operation: Any) -> bool:
    """Whether an operation is itself a model of layers with one input."""
    import keras

    return isinstance(operation, keras.Model) and len(getattr(operation, "inputs", None) or ()) == 1


def _inner_shapes(nested: Any, value: Any) -> dict[str, tuple[Any, ...]]:
    """Return the shapes of the layers of a nested model that is called with the tensor ``value``."""
    import keras

    names = list(layer_shapes(nested))
    every = keras.Model(nested.inputs[0], [layer_tensor(nested, name) for name in names])
    outputs = every.compute_output_spec(keras.KerasTensor(value.shape, value.dtype))
    return {name: tuple(output.shape[1:]) for name, output in zip(names, outputs, strict=True)}


def with_true_shapes(model: Any) -> Any:
    """Give the tensors of a model the shapes that its layers give, which are not always those that they announce.

    A layer may announce a shape (``compute_output_shape``) that is wrong or has gaps, and Keras believes it. One forward
    pass tells. What Keras's own layers announce is trusted, so most models are returned as they are at once.

    Returns
    -------
    keras.Model
        The same object.
    """
    import keras

    gaps = any(None in tensor.shape[1:] for _, _, outputs in graph_nodes(model) for tensor in outputs)
    if gaps or any(_announces_itself(layer) for layer in model._flatten_layers(include_self=False)):
        _correct_shapes(model, keras.ops.zeros((1, *model.inputs[0].shape[1:])))
    return model


def _correct_shapes(model: Any, value: Any) -> None:
    """Correct the tensors of a model, and what its layers announce, nested ones too, to what they give for ``value``."""
    import keras

    nodes = [node for node in graph_nodes(model) if not isinstance(node[0], keras.layers.InputLayer)]
    tensors = {id(tensor): tensor for _, _, outputs in nodes for tensor in outputs}
    values = keras.Model(model.inputs[0], [*tensors.values()])(value, training=False)
    given = dict(zip(tensors, [values] if hasattr(values, "shape") else values, strict=True))
    given[id(model.inputs[0])] = value
    calls = Counter(id(operation) for operation, _, _ in nodes)
    for operation, inputs, outputs in nodes:
        shapes = [tuple(given[id(tensor)].shape[1:]) for tensor in outputs]
        if _is_nested(operation):
            _correct_shapes(operation, given[id(inputs[0])])
        elif calls[id(operation)] == 1 and shapes != [tuple(tensor.shape[1:]) for tensor in outputs]:
            operation.compute_output_spec = functools.partial(_true_spec, operation.compute_output_spec, shapes)
        for tensor, shape in zip(outputs, shapes, strict=True):
            tensor._shape = (tensor.shape[0], *shape)


def _true_spec(announce: Callable[..., Any], shapes: Sequence[tuple[int, ...]], *args: Any, **options: Any) -> Any:
    import keras

    announced = announce(*args, **options)
    pairs = zip(keras.tree.flatten(announced), shapes, strict=True)
    tensors = [keras.KerasTensor((tensor.shape[0], *shape), tensor.dtype) for tensor, shape in pairs]
    return keras.tree.pack_sequence_as(announced, tensors)


def _announces_itself(layer: Any) -> bool:
    """Whether the shape that a layer announces comes from code that is not Keras's."""
    methods = (type(layer).compute_output_shape, type(layer).compute_output_spec)
    return any(method.__module__.partition(".")[0] != "keras" for method in methods)


def valid_cuts(model: Any) -> list[str]:
    """Return the layers whose single output tensor lies on every path from input to output, in topological order.

    The input and the layer that gives the output are left out, because a cut there would separate nothing.
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
    """Cut a model in two at a layer; both halves share the layers of ``model``.

    Parameters
    ----------
    model : keras.Model
        A model with one input and one output.
    layer : str
        One of ``valid_cuts(model)``.

    Returns
    -------
    tuple of keras.Model
        The trunk, from the input to the layer's output, and the tail, from there to the output.

    Raises
    ------
    ConfigurationError
        If the graph cannot be cut there; the message lists the nearest valid cuts.
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
        f"{model.name} cannot be cut at {layer!r}, because other paths to the output bypass it. "
        f"Nearest valid cuts before it: {', '.join(before) or 'none'}; after it: {', '.join(after) or 'none'}"
    )


def nearest_earlier_cut(model: Any, layer_index: int) -> str:
    """Return the last valid cut before ``model.layers[layer_index]``.

    Parameters
    ----------
    model : keras.Model
        A model with one input and one output.
    layer_index : int
        Index of the first layer to train; a negative index counts from the end.

    Raises
    ------
    ConfigurationError
        If the index is out of range, or there is no valid cut before it.
    """
    count = len(model.layers)
    if not -count <= layer_index < count:
        raise ConfigurationError(f"{model.name} has {count} layers; received the layer index {layer_index}")
    frozen = {layer.name for layer in model.layers[: layer_index % count]}
    earlier = [name for name in valid_cuts(model) if name in frozen]
    if not earlier:
        raise ConfigurationError(
            f"{model.name}: no single tensor separates the graph before layer {layer_index} "
            f"({model.layers[layer_index].name!r}). Train the network end to end, or start at a later layer."
        )
    return earlier[-1]


def boundary_by_rule(model: Any) -> str:
    """Find the boundary, the layer just before the last stage of a network, from its graph.

    Among the layers with weights, find the last one whose output area (height times width) is larger than that of
    the final one. The last stage begins with the layer with weights after it, and the boundary is the last valid cut
    before that. The boundary then moves back past at most one layer with a kernel if fewer values have to be stored
    there: to the input of an inverted residual instead of its expansion, or to a tensor instead of its padded copy.
    At most half of the layers with kernels may follow the boundary.

    In a transformer, the last stage is its last block: it begins behind the last valid cut before the last layer that
    holds attention and gives tokens.

    Raises
    ------
    ConfigurationError
        If the graph has no such cut, like that of NASNet, where every cell reads the two cells before it, or that of a
        transformer whose blocks are all in one layer.
    """
    blocks = _attention_layers(model)
    if len(blocks) > 1:
        return _before(model, blocks[-1])
    nodes = [(operation, outputs[0]) for operation, _, outputs in graph_nodes(model)]
    names = [operation.name for operation, _ in nodes]
    areas = [
        (index, tensor.shape[1] * tensor.shape[2])
        for index, (operation, tensor) in enumerate(nodes)
        if getattr(operation, "weights", ()) and len(tensor.shape) == 4 and None not in tensor.shape[1:]
    ]
    if not areas and blocks:
        raise ConfigurationError(
            f"{model.name} has no boundary: all blocks of its transformer are in one layer, {blocks[0]!r}, so the last one "
            "cannot be separated. To train the network, train all of it: --unfreeze all"
        )
    if not areas:
        raise ConfigurationError(
            f"{model.name} has no boundary layer, because no layer has both weights and a 4-D output of known size. Name a layer."
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
    return str(names[chosen])


def _attention_layers(model: Any) -> list[str]:
    """Return the layers that hold attention and give as many tokens as they take, in topological order."""
    return [
        operation.name
        for operation, inputs, outputs in graph_nodes(model)
        if inputs
        and len(outputs[0].shape) == 3
        and tuple(outputs[0].shape) == tuple(inputs[0].shape)
        and any("Attention" in type(layer).__name__ for layer in getattr(operation, "_flatten_layers", tuple)())
    ]


def _before(model: Any, layer: str) -> str:
    names = [operation.name for operation, _, _ in graph_nodes(model)]
    earlier = [name for name in valid_cuts(model) if names.index(name) < names.index(layer)]
    if not earlier:
        raise ConfigurationError(
            f"{model.name} has no boundary: no single tensor separates its last block, which has the layer {layer!r}. To train "
            "the network, train all of it: --unfreeze all"
        )
    return earlier[-1]


def _has_kernel(operation: Any) -> bool:
    return any(len(variable.shape) >= 2 for variable in getattr(operation, "weights", ()))


def _values(tensor: Any) -> int:
    return math.prod(length for length in tensor.shape[1:] if length)


def graph_nodes(model: Any) -> list[tuple[Any, list[Any], list[Any]]]:
    """Return the calls that lead to the outputs of ``model``, as (operation, inputs, outputs), in topological order.

    The graph is walked backwards from the outputs, so calls of the same layers in other models do not matter.
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
