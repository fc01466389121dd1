"""An ONNX file as a network: what it takes and gives, and the same graph from uint8 pixels to pooled features.

    path --read_model()--> checked model --outline_of()--> Outline
    model, outputs --composed()--> model: uint8 (n, h, w, 3) -> float32 output_0, output_1, ...

A model file is untrusted input. Its weights may lie in other files, which must be in its own folder; nothing is read
from elsewhere. The package ``onnx`` only parses; ONNX Runtime or OpenVINO compute.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from features.errors import ConfigurationError, WeightsError, nearest
from features.files import printable
from features.recipe import Normalisation

PREFIX = "bottleneck/"  # of all tensors that are added to a model
INPUT = f"{PREFIX}images"
_MOST_BYTES = (1 << 31) - 1  # of a protobuf message
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # whose operators ONNX Runtime has
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
_SCALED_BY_BATCH = "DynamicQuantizeLinear"  # its output depends on all images of a batch
_LONGEST_NAME = 300
_LARGEST_BATCH = 1024
_DEEPEST = 6  # graphs within graphs: ONNX Runtime looks at each level twice from the one above
_AFTER_SCORES = ("Softmax", "LogSoftmax", "Sigmoid", "Identity", "Cast", "Add", "Squeeze", "Flatten", "Reshape")
_PUBLISHED_CLASSES = (1000, 1001, 11821, 21841, 21842, 21843)  # of ImageNet, and of its larger sets
_TYPES = {1: "float32", 10: "float16", 2: "uint8"}  # of an input of pixels: TensorProto.FLOAT, FLOAT16, UINT8


@dataclasses.dataclass(frozen=True)
class Outline:
    """What is known of an ONNX file without running it.

    Parameters
    ----------
    input : str
        Name of the only input that is not a weight.
    type : {"float32", "float16", "uint8"}
        Type of the input.
    layout : {"NCHW", "NHWC"}
        Order of its axes.
    batch, height, width : int or None
        Fixed lengths of its axes; None for any. A model that is quantised while it runs has the batch 1, because its
        numbers depend on the largest one in the batch.
    outputs : tuple of str
        Names of the outputs of the graph.
    before_scores : str or None
        The tensor before the scores of classes, if the first output seems to hold such.
    external : tuple of str
        Names of the files with weights, relative to the folder of the model.
    """

    input: str
    type: str
    layout: str
    batch: int | None
    height: int | None
    width: int | None
    outputs: tuple[str, ...]
    before_scores: str | None
    external: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int] | None:
        """Fixed height and width of the images in pixels; None if the file accepts any size."""
        return None if self.height is None or self.width is None else (self.height, self.width)


class Output(NamedTuple):
    """One tensor to compute: its name, its pooling as in recipes, its rank, the prefix of tokens, the order of spatial axes."""

    layer: str
    pooling: str
    rank: int
    prefix: int | None = None
    layout: str = "NCHW"


def check_size(path: Path) -> None:
    """Raise ``WeightsError`` for a file that is too large to be one, before anything reads it whole."""
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise WeightsError(
            f"{path}: an ONNX file holds at most 2 GB, received {size / 1e9:.1f} GB. Export it again with its weights beside "
            "it (external data)"
        )


def read_model(path: Path, *, weights: bool = True) -> Any:
    """Read an ONNX file and refuse what no runtime here could run, or what reads files from elsewhere.

    Parameters
    ----------
    path : Path
        The file.
    weights : bool
        Read the weights that lie in other files, too.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    WeightsError
        If the file cannot be read, is truncated or not an ONNX model, or its weights are missing or lie outside its folder.
    ConfigurationError
        If the model contains operators that are not part of ONNX.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf's class is not one of Python's
        pointer = " (a pointer of Git LFS: fetch it by git lfs pull)" if is_pointer(path) else ""
        raise WeightsError(
            f"{path}: not an ONNX file, or only a part of one{pointer}. Download or export it again"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise WeightsError(f"{path}: not an ONNX model: it contains no graph. Download or export it again")
    if _depth(model.graph) > _DEEPEST:
        raise ConfigurationError(
            f"{path}: has graphs within graphs, deeper than {_DEEPEST}, which no runtime loads in time. Export the network "
            "without conditions"
        )
    strange = sorted({f"{node.domain}.{node.op_type}" for node in _nodes(model.graph) if node.domain not in _DOMAINS})
    if strange or model.functions:
        names = strange or [f"{function.domain}.{function.name}" for function in model.functions]
        raise ConfigurationError(
            f"{path}: contains operators that are not part of ONNX: {_list(names)}. Export the network without them"
        )
    if not any(item.domain in ("", "ai.onnx") and item.version > 0 for item in model.opset_import):
        raise ConfigurationError(f"{path}: does not say which version of ONNX's operators it has. Export it again")
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor)
        else:
            _check_numbers(path, tensor)
    if weights and any(_external(model.graph)):
        try:
            onnx.load_external_data_for_model(model, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise WeightsError(f"{path}: its weights cannot be read: {shown(str(error))}") from error
        if any(_external(model.graph)):
            raise WeightsError(
                f"{path}: has sparse weights in another file, which are not read. Export it with them inside"
            )
    return model


def is_pointer(path: Path) -> bool:
    """Whether a file only says where Git LFS has its content."""
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def outline_of(path: Path, model: Any) -> Outline:
    """Find the input of pixels and what else must be known of a model before it is run.

    Raises
    ------
    ConfigurationError
        If the model does not have exactly one input of images, or has no output.
    """
    given = {tensor.name for tensor in model.graph.initializer} | {
        item.values.name for item in model.graph.sparse_initializer
    }
    inputs = [value for value in model.graph.input if value.name not in given]
    images = [value for value in inputs if len(value.type.tensor_type.shape.dim) == 4]
    words = ", ".join(f"{shown(value.name)} {_shape_text(value)}" for value in inputs[:4]) or "none"
    words += f" and {len(inputs) - 4} more" if len(inputs) > 4 else ""
    if len(inputs) > 1 and len(images) == 1:
        raise ConfigurationError(
            f"{path}: has the inputs {words}; expected images alone. This is a network of images and something else, such as "
            "text: give the file of its vision part, often called vision_model.onnx"
        )
    if len(inputs) != 1 or not images:
        raise ConfigurationError(
            f"{path}: has the inputs {words}; expected exactly one, of images: (n, 3, h, w) or (n, h, w, 3)"
        )
    (value,) = images
    kind = value.type.tensor_type.elem_type
    if kind not in _TYPES:
        raise ConfigurationError(f"{path}: its input {shown(value.name)} has the element type {kind}, expected float32")
    if not model.graph.output:
        raise ConfigurationError(f"{path}: has no output")
    lengths = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in _dims(value)]
    layout = _layout(path, value, lengths)
    height, width = lengths[2:] if layout == "NCHW" else lengths[1:3]
    if (lengths[0] or 0) > _LARGEST_BATCH:
        raise ConfigurationError(
            f"{path}: takes batches of {lengths[0]} images, at most {_LARGEST_BATCH} are possible here. Export it with a "
            "dynamic batch axis"
        )
    outputs = tuple(output.name for output in model.graph.output)
    external = tuple(sorted({_location(tensor) for tensor in _external(model.graph)}))
    scaled = any(node.op_type == _SCALED_BY_BATCH for node in _nodes(model.graph))
    batch = 1 if scaled and lengths[0] is None else lengths[0]
    before = _before_scores(model.graph, outputs[0])
    return Outline(value.name, _TYPES[kind], layout, batch, height, width, outputs, before, external)


def check_layer(path: Path, model: Any, name: str) -> None:
    """Raise ``ConfigurationError`` unless a node of the graph computes this tensor, under a name that can be shown."""
    names = [output for node in model.graph.node for output in node.output if output]
    if name not in names:
        inside = [other for other in names if name in other]
        near = (
            f"; the last ones that contain this: {_list(inside[-3:])}."
            if inside
            else nearest(shown(name), map(shown, names))
        )
        raise ConfigurationError(
            f"{path} has no tensor {shown(name)!r}{near or '.'} Its outputs are "
            f"{_list([output.name for output in model.graph.output])}; its last tensors {_list(names[-5:])}"
        )
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise ConfigurationError(
            f"{path}: the name of its tensor {shown(name)!r} is too long or cannot be printed. Give another one with --layer"
        )


def composed(
    model: Any, outline: Outline, outputs: Sequence[Output], *, normalisation: Normalisation, size: tuple[int, int]
) -> Any:
    """Return a model from pixels to features: the graph between its normalisation and its pooling, without the rest.

    Parameters
    ----------
    model : onnx.ModelProto
        As ``read_model`` returns it, with weights; not changed.
    outline : Outline
        Its outline.
    outputs : sequence of Output
        The tensors to compute.
    normalisation : Normalisation
        How pixels become the input.
    size : (int, int)
        Height and width of the images in pixels.

    Returns
    -------
    onnx.ModelProto
        Input ``INPUT``: uint8 (n, h, w, 3), RGB; the batch is fixed where that of the model is. Outputs ``output_0``,
        ... float32 (n, ...) in the given order; spatial ones as (h, w, c).

    Raises
    ------
    ConfigurationError
        If it has loops, which may have no end, or random numbers.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    for field in ("metadata_props", "training_info", "doc_string"):
        made.ClearField(field)
    graph = made.graph
    names = [output_name(index) for index in range(len(outputs))]
    renamed = out_of_the_way(graph, lambda name: name.startswith(PREFIX) or name in names)
    _only_float32(graph)
    opset = next(item.version for item in made.opset_import if item.domain in ("", "ai.onnx"))
    builder = Builder(opset, PREFIX)
    _front(builder, dataclasses.replace(outline, input=renamed(outline.input)), normalisation)
    graph_nodes = list(graph.node)
    front, builder.nodes = builder.nodes, []
    for index, output in enumerate(outputs):
        _back(builder, output._replace(layer=renamed(output.layer)), names[index])
    nodes, used = _needed([*front, *graph_nodes, *builder.nodes], names)
    _check_operators(nodes)
    weights = [tensor for tensor in [*graph.initializer, *builder.constants] if tensor.name in used]
    sparse = [tensor for tensor in graph.sparse_initializer if tensor.values.name in used]
    batch = outline.batch if outline.batch is not None else "n"
    shape = [batch, *size, 3]
    inputs = [onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, shape)]
    results = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
    made.graph.CopyFrom(onnx.helper.make_graph(nodes, graph.name or "network", inputs, results, weights))
    made.graph.sparse_initializer.extend(sparse)
    return made


def output_name(index: int) -> str:
    """Name of the output of this number in a composed model."""
    return f"output_{index}"


class Builder:
    """Collects nodes and constants; tensors are numbered under a prefix.

    Parameters
    ----------
    opset : int
        Version of the operators of ONNX.
    prefix : str
        What the names of tensors begin with; ``PREFIX``, or longer, so that no model has it.
    """

    def __init__(self, opset: int, prefix: str) -> None:
        self.opset = opset
        self._prefix = prefix
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._count = 0

    def add(self, operator: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return its name."""
        import onnx

        self._count += 1
        name = name or f"{self._prefix}{operator}_{self._count}"
        self.nodes.append(onnx.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: Any, dtype: Any) -> str:
        """Add a constant and return its name."""
        import onnx

        name = f"{self._prefix}constant_{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def reduced(self, operator: str, value: str, axes: list[int], name: str | None = None) -> str:
        """Add a reduction over some axes, which are not kept, and return its name."""
        if self.opset >= 18:  # the axes became an input
            return self.add(operator, value, self.constant(axes, np.int64), name=name, keepdims=0)
        return self.add(operator, value, name=name, axes=axes, keepdims=0)


def _front(builder: Builder, outline: Outline, how: Normalisation) -> None:
    """From ``INPUT`` to the input of the model: ``(pixel * scale - mean) / std`` in the order of its axes."""
    value = builder.add("Cast", INPUT, to=1)
    if how.channels == "bgr":
        value = builder.add("Gather", value, builder.constant([2, 1, 0], np.int64), axis=3)
    if how.scale != 1:
        value = builder.add("Mul", value, builder.constant(how.scale, np.float32))
    if any(how.mean):
        value = builder.add("Sub", value, builder.constant(how.mean, np.float32))
    if how.std != (1.0, 1.0, 1.0):
        value = builder.add("Div", value, builder.constant(how.std, np.float32))
    if outline.layout == "NCHW":
        value = builder.add("Transpose", value, perm=[0, 3, 1, 2])
    builder.add("Cast", value, name=outline.input, to=2 if outline.type == "uint8" else 1)


def _back(builder: Builder, output: Output, name: str) -> None:
    """From a tensor of the model to features, named ``name``: pooled, float32, spatial ones as (h, w, c)."""
    value = builder.add("Cast", output.layer, to=1)
    axes = [1] if output.rank == 3 else [2, 3] if output.layout == "NCHW" else [1, 2]
    if output.pooling in ("avg", "max"):
        builder.reduced("ReduceMean" if output.pooling == "avg" else "ReduceMax", value, axes, name)
    elif output.pooling in ("cls", "tokens", "cls+tokens"):
        parts = []
        if output.pooling != "tokens":
            parts.append(builder.add("Gather", value, builder.constant(0, np.int64), axis=1))
        if output.pooling != "cls":
            ends = [np.iinfo(np.int64).max]
            bounds = [builder.constant(numbers, np.int64) for numbers in ([output.prefix or 0], ends, [1])]
            parts.append(builder.reduced("ReduceMean", builder.add("Slice", value, *bounds), [1]))
        builder.add(
            "Concat" if len(parts) > 1 else "Identity", *parts, name=name, **({"axis": 1} if len(parts) > 1 else {})
        )
    else:
        if output.rank == 4 and output.layout == "NCHW":
            value = builder.add("Transpose", value, perm=[0, 2, 3, 1])
        flat = output.pooling == "flatten"
        builder.add("Flatten" if flat else "Identity", value, name=name, **({"axis": 1} if flat else {}))


def _needed(nodes: Sequence[Any], outputs: Sequence[str]) -> tuple[list[Any], set[str]]:
    """Return the nodes that these tensors depend on, in their order, and the names of all tensors they read."""
    used, kept = set(outputs), []
    for node in reversed(nodes):
        if used & {name for name in node.output if name}:
            kept.append(node)
            used |= _reads(node)
    return kept[::-1], used


def _check_operators(nodes: Sequence[Any]) -> None:
    """Refuse what may never end, or gives other numbers for the same image."""
    for node in nodes:
        inner = [node, *(child for graph in _graphs(node) for child in _nodes(graph))]
        for one in inner:
            if one.op_type in _RANDOM:
                raise ConfigurationError(
                    f"the network has the operator {one.op_type}: the same image would get other features each time. Export "
                    "it for inference"
                )
            if one.op_type != "If" and any(_graphs(one)):
                raise ConfigurationError(
                    f"the network has the operator {shown(one.op_type)}, a loop, which may have no end. Export it without loops, "
                    "or take a tensor before it with --layer"
                )


def _reads(node: Any) -> set[str]:
    """Names of the tensors that a node reads; a graph inside it may read any tensor of the graph around it."""
    inner = (name for graph in _graphs(node) for child in graph.node for name in _reads(child))
    outputs = (value.name for graph in _graphs(node) for value in graph.output)
    return {name for name in (*node.input, *inner, *outputs) if name}


def _graphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for inner in _graphs(node):
            yield from _nodes(inner)


def _depth(graph: Any) -> int:
    return max((1 + _depth(inner) for node in graph.node for inner in _graphs(node)), default=0)


def _tensors(graph: Any) -> Iterator[Any]:
    """All tensors of numbers that a graph holds, those within its nodes too."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in _graphs(node):
            yield from _tensors(inner)


def out_of_the_way(graph: Any, taken: Callable[[str], bool]) -> Callable[[str], str]:
    """Rename the tensors of a graph, and of the graphs within it, whose names are taken.

    Returns
    -------
    callable
        Takes the former name of a tensor and returns its present one.
    """
    parts = [graph, *(inner for node in _nodes(graph) for inner in _graphs(node))]
    values = [value for part in parts for value in (*part.initializer, *part.input, *part.output, *part.value_info)]
    values += [sparse.values for part in parts for sparse in part.sparse_initializer]
    lists = [names for part in parts for node in part.node for names in (node.input, node.output)]
    known = {value.name for value in values}.union(*lists)
    new: dict[str, str] = {}
    for name in sorted(filter(taken, known)):
        new[name] = f"of the model/{name}"
        while new[name] in known:
            new[name] += "'"
    for value in values:
        value.name = new.get(value.name, value.name)
    for names in lists:
        names[:] = [new.get(name, name) for name in names]
    return lambda name: new.get(name, name)


def _only_float32(graph: Any) -> None:
    """Turn half precision into float32, so that a network gives the same features by every runtime."""
    import onnx

    half = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    for tensor in _tensors(graph):
        if tensor.data_type in half:
            try:
                values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            except ValueError as error:
                raise WeightsError(
                    f"the weights {shown(tensor.name)!r} have a wrong size. Download the file again"
                ) from error
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in _nodes(graph):
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in half:
                attribute.i = onnx.TensorProto.FLOAT


def shown(text: str, most: int = 60) -> str:
    """Shorten a name from a model file, and escape what a terminal would obey."""
    return printable(text[:most]) + ("..." if len(text) > most else "")


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:5])) + (", ..." if len(names) > 5 else "")


# -------------------------------------------------------------------------------------------------- inputs
def _dims(value: Any) -> Any:
    return value.type.tensor_type.shape.dim


def _shape_text(value: Any) -> str:
    names = [str(dim.dim_value or shown(dim.dim_param) or "any") for dim in _dims(value)]
    return "(" + ", ".join(names[:6]) + (", ...)" if len(names) > 6 else ")")


def _layout(path: Path, value: Any, lengths: Sequence[int | None]) -> str:
    """Find where the three channels are: where the length is 3, or else where the name of the axis says so."""
    named = ["chan" in dim.dim_param.lower() or dim.dim_param.lower() == "c" for dim in _dims(value)]
    for position, layout in ((1, "NCHW"), (3, "NHWC")):
        if lengths[position] == 3 or (lengths[position] is None and named[position]):
            return layout
    if lengths[1] is None or lengths[3] is None:
        return "NCHW" if lengths[1] is None else "NHWC"  # PyTorch names no axis unless asked to
    raise ConfigurationError(
        f"{path}: its input {shown(value.name)} is {_shape_text(value)}; expected images of 3 channels, (n, 3, h, w) or (n, h, w, 3)"
    )


def spatial_layout(shape: Sequence[int], size: tuple[int, int], usual: str) -> str:
    """Find the order of the axes of a spatial tensor, which is not always that of the input.

    Swin and ConvNeXt have (n, h, w, c) inside although they take (n, c, h, w); files made from TensorFlow the other way
    round.

    Parameters
    ----------
    shape : sequence of int
        All four lengths of the tensor.
    size : (int, int)
        Height and width of the images in pixels.
    usual : {"NCHW", "NHWC"}
        Order of the input, which holds unless only the other one has the proportions of the images.

    Examples
    --------
    >>> spatial_layout((2, 768, 7, 7), (224, 224), "NCHW"), spatial_layout((2, 7, 7, 768), (224, 224), "NCHW")
    ('NCHW', 'NHWC')
    """

    def fits(height: int, width: int) -> bool:
        return abs(height * size[1] - width * size[0]) < max(size)  # lengths are rounded to whole steps

    fitting = {"NCHW": fits(*shape[2:]), "NHWC": fits(*shape[1:3])}
    (other,) = {*fitting} - {usual}
    return other if fitting[other] and not fitting[usual] else usual


# --------------------------------------------------------------------------------------------------- scores
def _before_scores(graph: Any, output: str) -> str | None:
    """Find the tensor before the layer that makes scores of classes, if an output seems to hold such: by names and numbers."""
    made = {name: node for node in graph.node for name in node.output if name}
    widths = {tensor.name: [*tensor.dims] for tensor in graph.initializer}
    named, node = any(word in output.lower() for word in ("logit", "prob")), made.get(output)
    while node is not None and node.op_type in _AFTER_SCORES:
        named |= node.op_type in ("Softmax", "LogSoftmax")
        node = next((made[name] for name in node.input if name in made), None)
    if node is None or node.op_type not in ("Gemm", "MatMul") or len(widths.get(node.input[1], ())) != 2:
        return None
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    classes = widths[node.input[1]][0 if turned else 1]
    return str(node.input[0]) if named or classes in _PUBLISHED_CLASSES else None


# -------------------------------------------------------------------------------------------------- weights
def _check_numbers(path: Path, tensor: Any) -> None:
    """Refuse a tensor that declares more numbers than the file holds: a few bytes would become any amount of memory."""
    typed = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
    most = 4 * len(tensor.raw_data) + 8 * sum(len(getattr(tensor, name)) for name in typed)  # of 2 bits, or packed
    if any(length < 0 for length in tensor.dims) or math.prod(tensor.dims) > most:
        raise WeightsError(
            f"{path}: its weights {shown(tensor.name)!r} declare the shape {shown(str([*tensor.dims]))}, but the file does not "
            "hold so many numbers. Download or export it again"
        )


def _external(graph: Any) -> Iterator[Any]:
    import onnx

    return (tensor for tensor in _tensors(graph) if tensor.data_location == onnx.TensorProto.EXTERNAL)


def _entries(tensor: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _location(tensor: Any) -> str:
    return _entries(tensor).get("location", "")


def _check_external(path: Path, tensor: Any) -> None:
    location, folder = _location(tensor), path.parent.resolve()
    parts = PurePosixPath(location).parts
    file = folder / location
    inside = bool(parts) and ".." not in parts and not PurePosixPath(location).is_absolute() and "\\" not in location
    if not inside or "\0" in location or not file.resolve().is_relative_to(folder):
        raise WeightsError(
            f"{path}: its weights lie in {shown(location)!r}, outside its folder, and are not read. Copy the model and its weights "
            "into one folder (cp -rL where these are links)"
        )
    if not file.is_file():
        raise WeightsError(f"{path}: its weights {shown(location)!r} are not beside it. Put that file into {folder}")
    entries = _entries(tensor)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise WeightsError(
            f"{file}: has {file.stat().st_size} bytes, but {path.name} expects more. Download or export both again"
        )
