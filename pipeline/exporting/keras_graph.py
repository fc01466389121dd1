"""A network of Keras and a head as one Keras model, from pixels of any size to probabilities."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from features.networks.backbones import feature_model, last_layer, pooling_layer, preprocess
from features.networks.backend import load_keras
from features.networks.graph import with_true_shapes
from features.networks.modelfile import is_of_hub
from features.networks.network import Network
from features.networks.reference import relative_difference
from features.pixels.resizing import resize_image
from features.recipe import Recipe
from pipeline.exporting.assembled import folded
from pipeline.exporting.formats import INPUT
from pipeline.exporting.resizing import resized
from pipeline.heads.dense import KerasHead
from pipeline.tuning.parity import LAYER_TOLERANCE, first_difference


@dataclasses.dataclass(frozen=True)
class KerasAssembled:
    """See ``pipeline.exporting.assembled.Assembled``."""

    network: Network
    recipe: Recipe
    model: Any

    @classmethod
    def join(cls, network: Network, recipe: Recipe, head: KerasHead) -> KerasAssembled:
        """See ``pipeline.exporting.assembled.Assembler``."""
        return cls(network, recipe, assemble(network, recipe, head))

    @property
    def bytes(self) -> int:
        return 4 * int(self.model.count_params())  # float32

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        (output,) = _outputs_of(self.model, pixels[None])
        return np.asarray(load_keras().ops.convert_to_numpy(output), np.float64)

    def reopened(self, model: Any) -> KerasAssembled:
        return dataclasses.replace(self, model=model)

    def stage_that_differs(self, pixels: np.ndarray) -> str:
        """Name the first layer whose output differs."""
        keras = load_keras()
        stages = keras.Model(
            self.model.inputs[0], [self.model.get_layer(name).output for name in ("resized", "preprocessed")]
        )
        scaled, prepared = (keras.ops.convert_to_numpy(value) for value in _outputs_of(stages, pixels[None]))
        expected = resize_image(Image.fromarray(pixels), self.recipe.pixels)[None].astype(np.float32)
        if relative_difference(scaled, expected) > LAYER_TOLERANCE:
            return "resized"
        reference = keras.ops.convert_to_numpy(
            preprocess(self.recipe.preprocessing, self.recipe.normalisation)(expected)
        )
        if relative_difference(prepared, reference) > LAYER_TOLERANCE:
            return "preprocessed"
        found = first_difference(self.model.get_layer("backbone"), _features(self.network, self.recipe), reference)
        if found:
            return str(found[0])
        return str(next(layer.name for layer in self.model.layers if isinstance(layer, keras.layers.Dense)))


def assemble(network: Network, recipe: Recipe, head: KerasHead) -> Any:
    """Build one functional model, from pixels to probabilities, of Keras's own layers, so that it opens without this project.

    Parameters
    ----------
    network : Network
        The network and its weights.
    recipe : Recipe
        Recipe of the features that the head takes.
    head : KerasHead
        The head. Its scaler and temperature are folded into its first and last layer.

    Returns
    -------
    keras.Model
        uint8 (n, h, w, 3), any n, h, w -> float32 (n, c). It is not trainable, so that BatchNorm uses its stored
        statistics in any mode. The layers ``resized``, ``preprocessed`` and ``backbone`` are its stages.
    """
    keras = load_keras()
    layers = keras.layers
    features = _features(network, recipe)
    images = keras.Input((None, None, 3), dtype="uint8", name=INPUT)
    pixels = layers.Identity(dtype="float32", name="resized")(resized(images, recipe.pixels))
    values = layers.Identity(dtype="float32", name="preprocessed")(
        preprocess(recipe.preprocessing, recipe.normalisation)(pixels)
    )
    (values,) = _listed(features(values))
    if head.pool not in (None, "none"):
        values = pooling_layer(head.pool, len(values.shape) - 1, name="pool")(values)
    matrices = folded(head)
    for number, (kernel, bias) in enumerate(matrices, 1):
        last = number == len(matrices)
        activation = head.task.activation if last else head.parameters.activation
        dense = layers.Dense(len(bias), activation, name="probabilities" if last else f"hidden_{number}")
        values = dense(values)
        dense.set_weights([kernel, bias])
    model = keras.Model(images, values, name="pixels_to_probabilities")
    model.trainable = False
    model(keras.ops.zeros((1, 2, 2, 3), "uint8"), training=False)  # the ONNX converter needs a model that was called
    return model


def _features(network: Network, recipe: Recipe) -> Any:
    model, layer = network.load(), recipe.layer
    if is_of_hub(model) and layer == last_layer(model):
        keras = load_keras()
        images = keras.Input(model.inputs[0].shape[1:])
        given = keras.tree.map_structure(lambda _: images, model.input)
        model, layer = with_true_shapes(keras.Model(images, model(given))), model.name
    model = feature_model(model, [(layer, recipe.pooling, recipe.prefix_tokens)])
    model.name = "backbone"
    return model


def _outputs_of(model: Any, images: np.ndarray) -> list[Any]:
    """Run a model in inference mode and return its outputs as a list."""
    return _listed(model(load_keras().ops.convert_to_tensor(images), training=False))


def _listed(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
