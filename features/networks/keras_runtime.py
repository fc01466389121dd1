"""Networks that Keras builds: described by building them once, converted for OpenVINO, run by the Keras engine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from features.cache import cache_path, keep_json, kept_json
from features.canonical import digest_of
from features.errors import ConfigurationError
from features.networks.backbones import (
    Backbone,
    Description,
    boundary_of,
    build_backbone,
    feature_model,
    last_layer,
    preprocess,
)
from features.networks.engines import Engine
from features.networks.graph import layer_shapes
from features.networks.weights import WeightsFile, load_weights
from features.recipe import Recipe

MEMO_VERSION = 5


class KerasRuntime:
    """See ``features.networks.network.Runtime``."""

    engines = ("keras", "openvino")

    def describe(
        self, backbone: Backbone, weights: WeightsFile, size: tuple[int, int], layers: Sequence[str]
    ) -> Description:
        """Describe a network; a description in the cache is used instead of building the network again."""
        key = digest_of([MEMO_VERSION, backbone.name, weights.sha256, list(size), importlib.metadata.version("keras")])
        memo = cache_path("backbones", f"{key}.json")
        known = kept_description(memo)
        if known is not None:
            return known
        model = build_backbone(backbone, size)
        digest = load_weights(model, backbone, weights)
        shapes = {name: shape for name, shape in layer_shapes(model).items() if None not in shape}
        try:
            boundary: str | None = boundary_of(backbone, model)
        except ConfigurationError:
            boundary = None
        description = Description(digest, shapes, last_layer(model), boundary)
        keep_description(memo, description)
        return description

    def load(self, backbone: Backbone, weights: WeightsFile, size: tuple[int, int]) -> Any:
        """Build the network as a ``keras.Model`` and load its weights."""
        model = build_backbone(backbone, size)
        load_weights(model, backbone, weights)
        return model

    def graph(self, backbone: Backbone, recipes: Sequence[Recipe]) -> Any:
        """Refuse: Keras has no ONNX graph of this kind of network."""
        raise ConfigurationError(f"{backbone.name}: a network of Keras has no graph of an ONNX file")

    def converted(self, backbone: Backbone, weights: WeightsFile, recipes: Sequence[Recipe]) -> dict[str, np.ndarray]:
        """Convert for OpenVINO; the outputs for the reference batch are those of Keras."""
        from features.networks.openvino_engine import from_keras

        rule = recipes[0].pixels
        return from_keras(self._features(backbone, weights, recipes), _preprocess(recipes), rule.height, rule.width)

    def engine(
        self,
        backbone: Backbone,
        weights: WeightsFile,
        recipes: Sequence[Recipe],
        *,
        batch_size: int,
        device: str,
        precision: str,
    ) -> Engine:
        """Open the Keras engine."""
        from features.networks.keras_engine import KerasEngine

        model = self._features(backbone, weights, recipes)
        return KerasEngine(
            model, _preprocess(recipes), recipes, batch_size=batch_size, device=device, precision=precision
        )

    def _features(self, backbone: Backbone, weights: WeightsFile, recipes: Sequence[Recipe]) -> Any:
        rule = recipes[0].pixels
        model = self.load(backbone, weights, (rule.height, rule.width))
        return feature_model(model, [(recipe.layer, recipe.pooling, recipe.prefix_tokens) for recipe in recipes])


def _preprocess(recipes: Sequence[Recipe]) -> Callable[[Any], Any]:
    return preprocess(recipes[0].preprocessing, recipes[0].normalisation)


def kept_description(path: Any) -> Description | None:
    """Read a description that ``keep_description`` wrote; None if there is none that can be used."""
    values = kept_json(path)
    try:
        layers = {str(name): tuple(int(length) for length in shape) for name, shape in values.pop("layers")}
        return Description(layers=layers, **values)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def keep_description(path: Any, description: Description) -> None:
    """Write a description to a file of the cache, its layers in their order."""
    keep_json(path, {**dataclasses.asdict(description), "layers": [[*item] for item in description.layers.items()]})
