"""Networks that Keras builds: described by building them once, converted for OpenVINO, run by the Keras engine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
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
from features.networks.sizes import Size, another, kin, shape_at
from features.networks.weights import WeightsFile, architecture_of, load_weights, model_digest
from features.recipe import Recipe

logger = logging.getLogger(__name__)
MEMO_VERSION = 5


class KerasRuntime:
    """See ``features.networks.network.Runtime``."""

    engines = ("keras", "openvino")

    def __init__(self) -> None:
        self._built: tuple[Any, Any] | None = None  # what `describe` built, for the next `load`

    def describe(self, backbone: Backbone, weights: WeightsFile, size: Size, layers: Sequence[str]) -> Description:
        """Describe a network; a description in the cache, of this size or two of its kin, saves building it again."""
        memo = _memo(backbone, weights, size)
        known = kept_description(memo) or _described_by_kin(_memo(backbone, weights, ["kin", *kin(size)]), size)
        if known is not None:
            return known
        model = build_backbone(backbone, size)
        digest = load_weights(model, backbone, weights)
        description = _description(backbone, model, digest)
        keep_description(memo, description)
        self._built = (backbone, weights, size), model
        return description

    def load(self, backbone: Backbone, weights: WeightsFile, size: Size) -> Any:
        """Build the network as a ``keras.Model`` and load its weights, unless that was just done to describe it."""
        (built, model), self._built = self._built or (None, None), None
        if built == (backbone, weights, size):
            return model
        model = build_backbone(backbone, size)
        load_weights(model, backbone, weights)
        return model

    def graph(self, backbone: Backbone, recipes: Sequence[Recipe]) -> Any:
        """Refuse: Keras has no ONNX graph of this kind of network."""
        raise ConfigurationError(f"{backbone.name}: a network of Keras has no graph of an ONNX file")

    def converted(self, backbone: Backbone, weights: WeightsFile, recipes: Sequence[Recipe]) -> dict[str, np.ndarray]:
        """Convert for OpenVINO; the outputs are those of Keras, and those at a second size if the network is the same there."""
        from features.networks.openvino_engine import from_keras, second_size

        size = recipes[0].pixels.height, recipes[0].pixels.width
        model = self.load(backbone, weights, size)
        kept = from_keras(_features(model, recipes), _preprocess(recipes), *size)
        other = another(size)
        try:
            second = _same_at(other, backbone, model, recipes[0].weights)
            kept |= second_size(_features(second, recipes), _preprocess(recipes), *other)
        except ConfigurationError as error:
            logger.debug("the conversion is for one size: %s", error)
            return kept
        descriptions = [_description(backbone, each, recipes[0].weights) for each in (model, second)]
        known = [[[*at], _plain(each)] for at, each in zip((size, other), descriptions, strict=True)]
        keep_json(_memo(backbone, weights, ["kin", *kin(size)]), known)
        return kept

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

        model = self.load(backbone, weights, (recipes[0].pixels.height, recipes[0].pixels.width))
        return KerasEngine(
            _features(model, recipes),
            _preprocess(recipes),
            recipes,
            batch_size=batch_size,
            device=device,
            precision=precision,
        )


def _features(model: Any, recipes: Sequence[Recipe]) -> Any:
    return feature_model(model, [(recipe.layer, recipe.pooling, recipe.prefix_tokens) for recipe in recipes])


def _preprocess(recipes: Sequence[Recipe]) -> Callable[[Any], Any]:
    return preprocess(recipes[0].preprocessing, recipes[0].normalisation)


def _same_at(size: Size, backbone: Backbone, model: Any, digest: str) -> Any:
    """Build a network at another size, with the same weights; ``ConfigurationError`` if it is another network there, or none."""
    if backbone.fixed_size is not None:
        raise ConfigurationError(f"{backbone.name} takes one size")
    try:
        second = build_backbone(backbone, size)
        same = architecture_of(second) == architecture_of(model)
        same &= [item.shape for item in second.weights] == [item.shape for item in model.weights]
    except Exception as error:  # layers raise errors of any type while they are made
        raise ConfigurationError(f"{backbone.name} is none at {size[0]}x{size[1]} pixels: {error}") from error
    if not same:
        raise ConfigurationError(f"{backbone.name} is another network at {size[0]}x{size[1]} pixels")
    for mine, its in zip(second.weights, model.weights, strict=True):
        mine.assign(its)
    # The digest of a network of one's own holds the shapes of its layers, mostly.
    if backbone.own_weights is not None and model_digest(second) != digest:
        raise ConfigurationError(f"{backbone.name} has another digest at {size[0]}x{size[1]} pixels")
    return second


# ------------------------------------------------------------------------------------------------ descriptions
def _memo(backbone: Backbone, weights: WeightsFile, size: Sequence[int | str]) -> Path:
    key = digest_of([MEMO_VERSION, backbone.name, weights.sha256, list(size), importlib.metadata.version("keras")])
    return cache_path("backbones", f"{key}.json")


def _description(backbone: Backbone, model: Any, digest: str) -> Description:
    shapes = {name: shape for name, shape in layer_shapes(model).items() if None not in shape}
    try:
        boundary: str | None = boundary_of(backbone, model)
    except ConfigurationError:
        boundary = None
    return Description(digest, shapes, last_layer(model), boundary)


def _described_by_kin(path: Path, size: Size) -> Description | None:
    """Describe a network at a size from its descriptions at two others; None if there are none, or they do not tell."""
    known = kept_json(path)
    if known is None:
        return None
    try:
        (first, one), (second, other) = [((int(at[0]), int(at[1])), _of_plain(values)) for at, values in known]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    shapes = {
        name: shape_at(size, [(first, shape), (second, other.layers.get(name, ()))])
        for name, shape in one.layers.items()
    }
    found = {name: shape for name, shape in shapes.items() if shape is not None}
    same = [*one.layers] == [*other.layers] and (one.last, one.boundary) == (other.last, other.boundary)
    return dataclasses.replace(one, layers=found) if same and len(found) == len(shapes) else None


def kept_description(path: Path) -> Description | None:
    """Read a description that ``keep_description`` wrote; None if there is none that can be used."""
    try:
        return _of_plain(kept_json(path))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def keep_description(path: Path, description: Description) -> None:
    """Write a description to a file of the cache, its layers in their order."""
    keep_json(path, _plain(description))


def _plain(description: Description) -> dict[str, Any]:
    return {**dataclasses.asdict(description), "layers": [[*item] for item in description.layers.items()]}


def _of_plain(values: Any) -> Description:
    layers = {str(name): tuple(int(length) for length in shape) for name, shape in values.pop("layers")}
    return Description(layers=layers, **values)
