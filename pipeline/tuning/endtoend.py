"""Backbone and head as one network again: the very weights that made the features, checked by fingerprint.

run -> recipe -> network -> trunk (pixels -> cut tensor, frozen) + tail (cut tensor -> logits, trained)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from features.errors import ConfigurationError, RunError, nearest
from features.networks.backbones import build_backbone, feature_model, preprocess
from features.networks.backend import load_keras
from features.networks.graph import cut_at, layer_tensors, valid_cuts
from features.networks.keras_engine import KerasEngine
from features.networks.network import BOUNDARY, Network, resolve_network
from features.recipe import Recipe
from pipeline.heads.head import Head
from pipeline.runs.folder import Run
from pipeline.scores.metrics import softmax
from pipeline.tuning.settings import ALL, HEAD, LAST_BLOCK

BATCHNORM_MODES = ("frozen", "affine", "train")
PIXELS = "pixels"  # the cut of a network that is trained as a whole


def network_of(run: Run, weights: str | None = None, *, device: str = "auto") -> Network:
    """The network whose features the run's head was trained on.

    Parameters
    ----------
    run : Run
        Of any head.
    weights : str, optional
        Where the weights are now, if not where the extraction found them.
    device : {"auto", "cpu", "gpu"}
        Where it is to run.

    Raises
    ------
    RunError
        If backbone or weights are not those of the run.
    """
    recipe = run.recipe
    options = recipe.options(run.backbone_argument, weights or run.weights_argument, device=device)
    network = resolve_network(options)
    differences = recipe.plain.difference(network.recipes[0])
    if "precision" in differences:
        raise RunError(
            f"{run.folder}: its features were computed in {recipe.precision}, which is not at hand here "
            f"({network.recipes[0].precision} is). Install what computed them (for openvino: pip install "
            "'bottleneck-features[openvino]'; else set KERAS_BACKEND), or extract again in float32."
        )
    if differences:
        listed = "; ".join(f"{field}: {before} -> {now}" for field, (before, now) in differences.items())
        raise RunError(
            f"{run.folder}: its head was trained on features of another network ({listed}). "
            "Give the weights that made them with --weights."
        )
    return network


@dataclasses.dataclass(frozen=True)
class Split:
    """A network cut in two for training.

    Parameters
    ----------
    original : keras.Model
        The backbone as it was loaded, of ordinary layers.
    backbone : keras.Model
        The backbone that the tail shares its layers with: the original, or a copy with other BatchNorm layers.
    trunk : keras.Model or None
        Preprocessed pixels -> cut tensor, the original's layers. Never trained, never in training mode. None where the cut is `PIXELS`.
    tail : keras.Model
        Cut tensor -> logits, the head included; from `PIXELS` it is the whole network, preprocessing too.
    head : keras.Model
        The last part of the tail.
    pool : str
        Layer of the tail that gives the head its features.
    cut : str
        Layer whose output is the cut tensor, or `PIXELS`.
    """

    original: Any
    backbone: Any
    trunk: Any
    tail: Any
    head: Any
    pool: str
    cut: str

    def statistics_variables(self) -> list[Any]:
        """Moving mean and variance of every BatchNorm layer, nested ones too."""
        layers = batch_normalizations(self.backbone)
        return [item for layer in layers for item in (layer.moving_mean, layer.moving_variance)]

    def statistics(self) -> list[np.ndarray]:
        """Copies of their values."""
        convert = load_keras().ops.convert_to_numpy
        return [np.array(convert(item)) for item in self.statistics_variables()]

    def layers_of_tail(self) -> list[Any]:
        """The backbone's layers in the tail, nested ones too, without the head's."""
        keras = load_keras()
        head = {id(layer) for layer in self.head._flatten_layers()}
        layers = self.tail._flatten_layers(include_self=False)
        return [layer for layer in layers if id(layer) not in head and not isinstance(layer, keras.Model)]

    def trained_backbone(self) -> Any:
        """The original with the trained weights: it can be saved and opened without any class of ours."""
        if self.original is not self.backbone:
            self.original.set_weights(self.backbone.get_weights())
        return self.original


def split_for_training(
    network: Network,
    recipe: Recipe,
    head: Head,
    *,
    unfreeze: str = LAST_BLOCK,
    bn: str = "frozen",
    scratch: bool = False,
    cut_of: Callable[[list[str]], str] = lambda cuts: cuts[-1],
) -> Split:
    """Put a head on a backbone and make the layers from ``unfreeze`` on trainable.

    Parameters
    ----------
    network : Network
        Backbone and weights.
    recipe : Recipe
        The features that the head takes.
    head : Head
        A head with a Keras network.
    unfreeze : str
        ``"last-block"``, ``"all"``, ``"head"``, the name of the first layer to train, or its number in ``model.layers``.
    bn : {"frozen", "affine", "train"}
        ``frozen``: BatchNorm layers are not trained. ``affine``: their gamma and beta are, in layers whose call
        forces inference statistics. In both, moving statistics are never updated: ``base(x, training=False)`` alone
        does not ensure that under ``fit`` in Keras 3.15. ``train``: as Keras trains them, from scratch only.
    scratch : bool
        Draw the backbone's weights anew, by Keras's own initialisers and the global seed.
    cut_of : callable
        Chooses among the cuts before the first trained layer, in graph order, the first of which is `PIXELS`; the
        last by default.

    Raises
    ------
    ConfigurationError
        For an unknown mode or layer, or one behind the features.
    """
    if recipe.precision != "float32":
        raise ConfigurationError(
            f"the head was trained on features computed in {recipe.precision.partition(':')[0]}; fine-tuning continues from "
            "float32 ones. Extract with --precision float32 into another file, and train the head on that."
        )
    modes = BATCHNORM_MODES if scratch else BATCHNORM_MODES[:2]
    if bn not in modes:
        raise ConfigurationError(f"bn: received {bn!r}, expected one of {', '.join(modes)}{nearest(bn, modes)}")
    keras = load_keras()
    original = untrained(network) if scratch else network.load()
    first = first_trainable(original, unfreeze, network)
    backbone = with_stored_statistics(original) if bn == "affine" else original
    names = [layer.name for layer in backbone.layers]
    if names.index(recipe.layer) < first < len(names):
        raise ConfigurationError(
            f"unfreeze: {names[first]!r} lies behind the features, which are taken at {recipe.layer!r}; there is "
            "nothing to train. Extract a later --layer, or unfreeze an earlier one."
        )
    for index, layer in enumerate(backbone.layers):
        layer.trainable = index >= first  # a nested model passes this on to all its layers
    if bn == "frozen":
        for layer in batch_normalizations(backbone):
            layer.trainable = False
    features = feature_model(backbone, [(recipe.layer, recipe.pooling)])
    whole = keras.Model(features.inputs[0], head.network(features.outputs[0]), name="end_to_end")
    frozen = set(names[:first])
    cut = cut_of([PIXELS, *(name for name in valid_cuts(whole) if name in frozen)])
    parts = (head.network, features.layers[-1].name, cut)
    if cut == PIXELS:
        pixels = keras.Input(features.inputs[0].shape[1:], name=PIXELS)
        tail = keras.Model(pixels, whole(preprocess(network.backbone)(pixels)), name="from_pixels")
        return Split(original, backbone, None, tail, *parts)
    _, tail = cut_at(whole, cut)
    # Of the original's ordinary layers, whose BatchNorm can be folded: faster, and what a store's features went through.
    trunk = keras.Model(original.inputs[0], layer_tensors(original)[cut], name="trunk")
    trunk.trainable = False
    return Split(original, backbone, trunk, tail, *parts)


def untrained(network: Network) -> Any:
    """The backbone's architecture with new weights, as Keras draws them."""
    keras = load_keras()
    if network.backbone.own_weights is not None:
        return keras.models.clone_model(network.load())
    rule = network.recipes[0].pixels
    return build_backbone(network.backbone, (rule.height, rule.width))


def untrained_head(head: Head) -> Head:
    """A head of the same layers with new weights, which standardises nothing: there are no features yet."""
    new = head.fresh()
    new.pool, new.input_shape = head.pool, head.input_shape
    new.mean, new.std = np.zeros_like(head.mean), np.ones_like(head.std)
    return new


def first_trainable(backbone: Any, unfreeze: str, network: Network) -> int:
    """Number in ``backbone.layers`` of the first layer to train; the number of layers if none is."""
    names = [layer.name for layer in backbone.layers]
    if unfreeze in (ALL, HEAD):
        return 0 if unfreeze == ALL else len(names)
    if unfreeze == LAST_BLOCK:
        boundary = network.description.boundary
        if boundary is None:
            raise ConfigurationError(
                f"unfreeze: {network.backbone.name} has no {BOUNDARY}: no single tensor separates its last block. Give the "
                f"first layer to train, or its number; the last layers are {', '.join(names[-5:])}"
            )
        return names.index(boundary) + 1
    if unfreeze.lstrip("-").isdecimal():
        number = int(unfreeze)
        if not -len(names) <= number < len(names):
            raise ConfigurationError(
                f"unfreeze: received layer {number}, the backbone has layers 0 to {len(names) - 1}"
            )
        return number % len(names)
    if unfreeze not in names:
        raise ConfigurationError(
            f"unfreeze: {network.backbone.name} has no layer {unfreeze!r}{nearest(unfreeze, names) or '.'} "
            f"Use {LAST_BLOCK}, {ALL}, {HEAD}, a layer name, or a layer number; the last layers are {', '.join(names[-5:])}"
        )
    return names.index(unfreeze)


@functools.cache
def stored_statistics_layer() -> Any:
    """BatchNormalization that normalises with its stored statistics whatever it is told, gamma and beta trainable."""
    import keras

    @keras.saving.register_keras_serializable(package="bottleneck")
    class StoredStatisticsBatchNormalization(keras.layers.BatchNormalization):
        def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
            return super().call(inputs, training=False, mask=mask)

    return StoredStatisticsBatchNormalization


def with_stored_statistics(model: Any) -> Any:
    """A copy of a model, with its weights, whose BatchNorm layers never compute or update statistics."""
    import keras

    def clone(layer: Any) -> Any:
        kind = type(layer)
        if isinstance(layer, keras.layers.BatchNormalization):
            kind = stored_statistics_layer()
        return kind.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy.set_weights(model.get_weights())
    return copy


def batch_normalizations(model: Any) -> list[Any]:
    """Every BatchNorm layer of a model, also inside nested models."""
    import keras

    found = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            found.append(layer)
        elif isinstance(layer, keras.Model):
            found += batch_normalizations(layer)
    return found


def trunk_function(
    split: Split, network: Network, recipe: Recipe, *, batch_size: int, device: str
) -> Callable[[np.ndarray], np.ndarray]:
    """The trunk as a compiled function of pixels, uint8 (n, h, w, 3) -> cut features; pixels themselves where there is none."""
    if split.trunk is None:
        return lambda pixels: pixels
    cut = dataclasses.replace(recipe, layer=split.cut, pooling="none", dtype="float32")
    engine = KerasEngine(split.trunk, preprocess(network.backbone), [cut], batch_size=batch_size, device=device)
    return lambda pixels: engine(pixels)[cut.name]


def probabilities_of(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Softmax of logits; one logit m of two classes is read as [0, m].

    Parameters
    ----------
    logits : float, (n, c), or (n, 1) for two classes
        Outputs of a network.
    temperature : float
        Logits are divided by it.

    Returns
    -------
    float64, (n, c), rows sum to 1
    """
    outputs = np.asarray(logits, dtype=np.float64) / temperature
    return softmax(np.hstack([np.zeros_like(outputs), outputs]) if outputs.shape[1] == 1 else outputs)
