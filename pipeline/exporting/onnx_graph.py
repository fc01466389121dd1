"""A network from an ONNX file and a head as one ONNX graph, from pixels of any size to probabilities.

images --resizing, converted from Keras--> pixels --the file's own graph--> features --dense layers--> probabilities
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from PIL import Image

from features.errors import ConfigurationError, RunError
from features.networks.backend import load_keras
from features.networks.network import Network
from features.networks.onnx_engine import session_of
from features.networks.onnx_graph import INPUT as PIXELS
from features.networks.onnx_graph import PREFIX, Builder, out_of_the_way, output_name
from features.networks.reference import relative_difference
from features.pixels.resizing import resize_image
from features.recipe import PixelRule, Recipe
from pipeline.exporting.assembled import folded
from pipeline.exporting.formats import INPUT, OUTPUT, silenced, to_onnx
from pipeline.exporting.resizing import resized
from pipeline.heads.dense import KerasHead
from pipeline.tuning.parity import LAYER_TOLERANCE

_LAST: dict[str, tuple[str, dict[str, int]]] = {  # activation of the outputs -> operator and its attributes
    "softmax": ("Softmax", {"axis": 1}),
    "sigmoid": ("Sigmoid", {}),
    "linear": ("Identity", {}),
}
_OPSETS = (13, 18)  # in which the resizing can be converted; it runs in later ones, too


@dataclasses.dataclass(frozen=True)
class OnnxAssembled:
    """See ``pipeline.exporting.assembled.Assembled``; ``model`` is an ``onnx.ModelProto``."""

    network: Network
    recipe: Recipe
    model: Any

    @classmethod
    def join(cls, network: Network, recipe: Recipe, head: KerasHead) -> OnnxAssembled:
        """See ``pipeline.exporting.assembled.Assembler``.

        Raises
        ------
        ConfigurationError
            If the network takes batches of one size only, or everything together takes more than 2 GB.
        RunError
            If the operators of the network are so old that they cannot be joined with others.
        """
        pool = head.pool or "none"
        taken = recipe if pool == "none" else dataclasses.replace(recipe, pooling=pool)
        return cls(network, taken, joined(network, taken, head))

    @property
    def bytes(self) -> int:
        return int(self.model.ByteSize())

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run([OUTPUT], {INPUT: pixels[None]})[0], np.float64)

    def reopened(self, model: Any) -> OnnxAssembled:
        return OnnxAssembled(self.network, self.recipe, model)

    def stage_that_differs(self, pixels: np.ndarray) -> str:
        """Name the resizing, the layer of the recipe, or the head: within the file's own graph nothing is compared."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        names = [PIXELS, output_name(0)]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        scaled, features = session_of(model.SerializeToString()).run(names, {INPUT: pixels[None]})
        expected = resize_image(Image.fromarray(pixels), self.recipe.pixels)[None]
        if relative_difference(scaled, expected) > LAYER_TOLERANCE:
            return "resized"
        (reference,) = self.network.engine([self.recipe], batch_size=1)(expected).values()
        return self.recipe.layer if relative_difference(features, reference) > LAYER_TOLERANCE else OUTPUT

    @functools.cached_property
    def _session(self) -> Any:
        return session_of(self.model.SerializeToString())


def joined(network: Network, recipe: Recipe, head: KerasHead) -> Any:
    """Join resizing, network and head to an ``onnx.ModelProto``: uint8 (n, h, w, 3), any n, h, w -> float32 (n, c)."""
    import onnx

    model = network.graph(recipe)
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    if fixed:
        raise ConfigurationError(
            f"{network.backbone_argument}: takes batches of {fixed} images only, but an artefact takes any number. Export the "
            "network with a dynamic batch axis, and extract again"
        )
    out_of_the_way(model.graph, {INPUT, OUTPUT}.__contains__)
    model, opset = _recent(model)
    front = _resizing(recipe.pixels, opset)
    back = Builder(opset, f"{PREFIX}head/")
    _dense(back, head)
    graph = model.graph
    nodes = [*front.graph.node, *graph.node, *back.nodes]
    weights = [*front.graph.initializer, *graph.initializer, *back.constants]
    kinds = onnx.TensorProto
    inputs = [onnx.helper.make_tensor_value_info(INPUT, kinds.UINT8, ["n", "height", "width", 3])]
    outputs = [onnx.helper.make_tensor_value_info(OUTPUT, kinds.FLOAT, ["n", len(head.classes)])]
    whole = onnx.helper.make_graph(nodes, "pixels_to_probabilities", inputs, outputs, weights)
    whole.sparse_initializer.extend(graph.sparse_initializer)
    model.graph.CopyFrom(whole)
    model.ir_version = max(model.ir_version, front.ir_version)
    try:
        model.SerializeToString()
    except ValueError as error:
        raise ConfigurationError(
            f"{network.backbone_argument}: takes more than 2 GB with its weights, and an ONNX file holds no more"
        ) from error
    return model


def _recent(model: Any) -> tuple[Any, int]:
    """Bring the model to a version of the operators that the resizing can have, and return both."""
    import onnx

    opset = next(item for item in model.opset_import if item.domain in ("", "ai.onnx"))
    if opset.version >= _OPSETS[0]:
        return model, opset.version
    try:
        return onnx.version_converter.convert_version(model, _OPSETS[0]), _OPSETS[0]
    except Exception as error:  # it raises errors of any class
        raise RunError(
            f"the network has operators of ONNX's version {opset.version}, which cannot be brought to version {_OPSETS[0]}: "
            "export it again with a newer opset, and extract again"
        ) from error


def _resizing(rule: PixelRule, opset: int) -> Any:
    """Convert the resizing from Keras: an ``onnx.ModelProto`` from ``images`` to the uint8 pixels that the network takes."""
    import onnx

    keras = load_keras()
    images = keras.Input((None, None, 3), dtype="uint8", name=INPUT)
    pixels = keras.layers.Identity(dtype="uint8")(keras.ops.cast(resized(images, rule, "float64"), "uint8"))
    with silenced():
        model = to_onnx(keras.Model(images, pixels), PIXELS, min(opset, _OPSETS[1]))
    prefix = f"{PREFIX}resized/"
    names = {INPUT: INPUT, PIXELS: PIXELS}
    if opset > _OPSETS[1]:
        model = onnx.version_converter.convert_version(model, opset)
    for node in model.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [name and names.get(name, prefix + name) for name in tensors]
        node.name = prefix + node.name
    for tensor in model.graph.initializer:
        tensor.name = prefix + tensor.name
    return model


def _dense(builder: Builder, head: KerasHead) -> None:
    matrices = folded(head)
    value = output_name(0)
    for number, (kernel, bias) in enumerate(matrices, 1):
        value = builder.add("Gemm", value, builder.constant(kernel, np.float32), builder.constant(bias, np.float32))
        if number < len(matrices):
            value = _activated(builder, value, head.parameters.activation)
    operator, attributes = _LAST[head.task.activation]
    builder.add(operator, value, name=OUTPUT, **attributes)


def _activated(builder: Builder, value: str, activation: str) -> str:
    """Apply an activation as ``keras.activations`` does."""
    if activation == "silu":
        return builder.add("Mul", value, builder.add("Sigmoid", value))
    if activation == "gelu":
        scaled = builder.add("Mul", value, builder.constant(0.5**0.5, np.float32))
        grown = builder.add("Add", builder.add("Erf", scaled), builder.constant(1, np.float32))
        return builder.add("Mul", builder.add("Mul", value, builder.constant(0.5, np.float32)), grown)
    return builder.add(activation.capitalize(), value)  # Relu, Elu, Selu, Tanh and Sigmoid have the defaults of Keras
