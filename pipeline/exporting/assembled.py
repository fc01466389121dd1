"""Joins network and head into one model, from pixels of any size to probabilities, and finds where it differs."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
from PIL import Image

from features.errors import HeadError
from features.networks.backbones import feature_model, pooling_layer, preprocess
from features.networks.backend import load_keras
from features.networks.network import Network
from features.networks.reference import relative_difference
from features.pixels.decode import resize_image
from features.recipe import Recipe
from pipeline.exporting.formats import INPUT
from pipeline.exporting.resizing import check_rule, resized
from pipeline.heads.dense import KerasHead
from pipeline.heads.head import Head
from pipeline.heads.kinds import can_finetune, head_of
from pipeline.runs.folder import Run
from pipeline.tuning.parity import LAYER_TOLERANCE, first_difference

logger = logging.getLogger(__name__)


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
    values = layers.Identity(dtype="float32", name="preprocessed")(preprocess(network.backbone)(pixels))
    (values,) = _listed(features(values))
    if head.pool not in (None, "none"):
        values = pooling_layer(head.pool, len(values.shape) - 1, name="pool")(values)
    matrices = folded(head)
    for number, (kernel, bias) in enumerate(matrices, 1):
        last = number == len(matrices)
        activation = "softmax" if last else head.parameters.activation
        dense = layers.Dense(len(bias), activation, name="probabilities" if last else f"hidden_{number}")
        values = dense(values)
        dense.set_weights([kernel, bias])
    model = keras.Model(images, values, name="pixels_to_probabilities")
    model.trainable = False
    model(keras.ops.zeros((1, 2, 2, 3), "uint8"), training=False)  # the ONNX converter needs a model that was called
    return model


def folded(head: KerasHead) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute kernel and bias of each layer of a head, with scaler and temperature folded in and one column per class.

    Returns
    -------
    list of (float32 (d, u), float32 (u,))
        Softmax of the last layer's output gives the probabilities.
    """
    parts = [np.asarray(part, np.float64) for part in head.weights]
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    kernel, bias = pairs[0]
    kernel = kernel / head.std[:, None].astype(np.float64)
    pairs[0] = kernel, bias - head.mean.astype(np.float64) @ kernel
    kernel, bias = (part / head.temperature for part in pairs[-1])
    if len(bias) == 1:  # a single logit m for two classes means [0, m]
        kernel, bias = np.hstack([np.zeros_like(kernel), kernel]), np.append(0.0, bias)
    pairs[-1] = kernel, bias
    return [(kernel.astype(np.float32), bias.astype(np.float32)) for kernel, bias in pairs]


def _features(network: Network, recipe: Recipe) -> Any:
    model = feature_model(network.load(), [(recipe.layer, recipe.pooling, recipe.prefix_tokens)])
    model.name = "backbone"
    return model


def head_and_layers(run: Run) -> tuple[Head, KerasHead]:
    """Return the head of a run, and the same as dense layers.

    Raises
    ------
    HeadError
        If no layers can replace it; the message lists the heads that they can.
    """
    if not can_finetune(run):
        raise HeadError(
            f"head {run.config['head']['name']!r} is neither linear nor a network, so no layers can replace it. Heads that can be exported: "
            "logistic, ridge, linear-svm, sgd, lda, and those made of dense layers (dense, dropout-linear, mlp-256)"
        )
    head = head_of(run)
    return head, head.as_dense()  # type: ignore[return-value]


def exact_recipe(run: Run) -> Recipe:
    """Return the run's recipe in float32; ``ConfigurationError`` if a graph cannot compute its pixels exactly."""
    recipe = run.recipe
    check_rule(recipe.pixels)
    if recipe.precision == "float32":
        return recipe
    logger.warning("%s: features were computed in %s; the artefact computes in float32", run.folder, recipe.precision)
    return dataclasses.replace(recipe, precision="float32")


def first_stage_that_differs(model: Any, network: Network, recipe: Recipe, pixels: np.ndarray) -> str:
    """Name the first layer of an assembled model whose output differs from that of the run's own network.

    Parameters
    ----------
    model : keras.Model
        Result of `assemble`, possibly saved and loaded again.
    network, recipe
        As for `assemble`.
    pixels : uint8, (h, w, 3), 0-255
        One image.
    """
    keras = load_keras()
    stages = keras.Model(model.inputs[0], [model.get_layer(name).output for name in ("resized", "preprocessed")])
    scaled, prepared = (keras.ops.convert_to_numpy(value) for value in outputs_of(stages, pixels[None]))
    expected = resize_image(Image.fromarray(pixels), recipe.pixels)[None].astype(np.float32)
    if relative_difference(scaled, expected) > LAYER_TOLERANCE:
        return "resized"
    reference = keras.ops.convert_to_numpy(preprocess(network.backbone)(expected))
    if relative_difference(prepared, reference) > LAYER_TOLERANCE:
        return "preprocessed"
    found = first_difference(model.get_layer("backbone"), _features(network, recipe), reference)
    if found:
        return str(found[0])
    return str(next(layer.name for layer in model.layers if isinstance(layer, keras.layers.Dense)))


def outputs_of(model: Any, images: np.ndarray) -> list[Any]:
    """Run a model in inference mode and return its outputs as a list."""
    return _listed(model(load_keras().ops.convert_to_tensor(images), training=False))


def _listed(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
