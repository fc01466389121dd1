"""Resolve the options to a network, its weights and its recipes, and open the engine that computes them.

Recipes need the digest of the weights and the shapes of the layers. Keras determines them once for each weights file
and they are cached by its sha256, so a run with nothing to compute never imports Keras.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.cache import cache_path, signed_file, write_signed
from features.canonical import canonical_json, digest_of
from features.errors import ConfigurationError, OpenVinoError, nearest
from features.files import quoted
from features.machine import keras_backend
from features.networks.backbones import (
    BOUNDARY,
    Backbone,
    boundary_of,
    build_backbone,
    feature_model,
    find_backbone,
    last_layer,
    preprocess,
)
from features.networks.engines import Engine
from features.networks.graph import layer_shapes
from features.networks.weights import WeightsFile, load_weights, resolve_weights
from features.recipe import NetworkOptions, PixelRule, Recipe

logger = logging.getLogger(__name__)
MEMO_VERSION = 5


@dataclasses.dataclass(frozen=True)
class Description:
    """What recipes need to know about a network with its weights, for one image size.

    Parameters
    ----------
    digest : str
        sha256 over the weight tensors; for a model file, over the tensors and the architecture.
    layers : dict of str to tuple of int
        Output shape, without the batch axis, of every layer with one output, in graph order; ``OUTER/INNER`` in nested
        models.
    last : str
        Layer that gives the output of the network.
    boundary : str or None
        Layer before the last convolutional block; None if no single tensor separates that block.
    """

    digest: str
    layers: dict[str, tuple[int, ...]]
    last: str
    boundary: str | None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with verified weights, and the recipes of the feature sets to compute with it."""

    backbone: Backbone
    backbone_argument: str
    weights: WeightsFile
    weights_argument: str
    recipes: tuple[Recipe, ...]
    description: Description
    engine_name: str = "keras"

    @property
    def row_bytes(self) -> int:
        """Bytes that one view of one image takes over all feature sets."""
        return sum(
            int(np.prod(pooled_shape(self.description.layers[item.layer], item.pooling)))
            * np.dtype(item.dtype).itemsize
            for item in self.recipes
        )

    def load(self) -> Any:
        """Build the network as a ``keras.Model`` and load its weights."""
        rule = self.recipes[0].pixels
        model = build_backbone(self.backbone, (rule.height, rule.width))
        load_weights(model, self.backbone, self.weights)
        return model

    def engine(self, recipes: Sequence[Recipe], *, batch_size: int, device: str = "auto") -> Engine:
        """Open an engine that computes the feature sets of these recipes in a single pass.

        Raises
        ------
        ConfigurationError
            If a GPU is requested of OpenVINO.
        OpenVinoError
            If OpenVINO cannot run the network and Keras would give other features, as in half precision.
        """
        from features.networks.keras_engine import KerasEngine
        from features.networks.openvino_engine import open_engine

        precision = recipes[0].precision.partition(":")[0]

        def build() -> tuple[Any, Any]:
            model = feature_model(self.load(), [(recipe.layer, recipe.pooling) for recipe in recipes])
            return model, preprocess(self.backbone)

        if self.engine_name == "openvino" and device == "gpu":
            raise ConfigurationError(
                "device: a GPU was asked for, but openvino runs only on the CPU. Use --engine keras."
            )
        if self.engine_name == "openvino":
            try:
                return open_engine(
                    recipes, build, source=self.weights.sha256, batch_size=batch_size, precision=precision
                )
            except OpenVinoError as error:
                if precision != "float32":
                    raise OpenVinoError(f"{error}. Use --engine keras, or --precision float32.") from error
                logger.warning("%s; using Keras, which computes the same features more slowly", error)
        model, prepare = build()
        return KerasEngine(model, prepare, recipes, batch_size=batch_size, device=device, precision=precision)


def resolve_network(options: NetworkOptions) -> Network:
    """Find the network, its weights and its layers, and write one recipe per feature set.

    Parameters
    ----------
    options : NetworkOptions
        The options of the network.

    Raises
    ------
    ConfigurationError
        If a name is unknown; the message suggests the nearest ones.
    WeightsError
        If the weights cannot be found or do not fit.
    """
    from features.networks.engines import choose_engine

    row = find_backbone(options.backbone)
    engine = choose_engine(options)
    by = engine if engine == "openvino" else f"keras-{keras_backend()}"
    rule = PixelRule.of(options, row.default_size)
    file = resolve_weights(row, options.weights)
    description = describe(row, file, (rule.height, rule.width))
    chosen: dict[tuple[str, str], Recipe] = {}
    for layer in [_layer(name, description, row) for name in options.layers] or [description.last]:
        pooled = _pooling(options, description.layers[layer])
        chosen[layer, pooled] = Recipe(
            backbone=row.name,
            weights=description.digest,
            layer=layer,
            pooling=pooled,
            pixels=rule,
            preprocessing=row.preprocessing,
            dtype=options.dtype,
            precision=options.precision if options.precision == "float32" else f"{options.precision}:{by}",
        )
    _check_pooling(options, [(layer, description.layers[layer]) for layer, _ in chosen])
    if not options.layers and row.classifier is not None:
        _warn_of_classifier(row.classifier, description)
    # Absolute paths, so that a later stage finds the same network from any working directory.
    backbone = options.backbone if row.own_weights is None else str(row.own_weights.resolve())
    weights = str(file.path.resolve()) if file.route == "file" and file.path is not None else options.weights
    return Network(row, backbone, file, weights, tuple(chosen.values()), description, engine)


def _pooling(options: NetworkOptions, shape: tuple[int, ...]) -> str:
    """Choose the pooling of a layer: what was asked for; else ``avg`` for the last layer, if it is spatial; else none."""
    if len(shape) == 1:  # a vector has nothing to pool
        return "none"
    if options.pooling is not None:
        return options.pooling
    return "none" if options.layers or len(shape) != 3 else "avg"


def _check_pooling(options: NetworkOptions, layers: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse a pooling that no layer, or not every layer, allows."""
    if options.pooling not in ("avg", "max"):
        return
    odd = [(layer, shape) for layer, shape in layers if len(shape) > 3]
    if odd or all(len(shape) == 1 for _, shape in layers):
        layer, shape = (odd or layers)[0]
        raise ConfigurationError(
            f"pooling: {options.pooling} is for (height, width, channels) or (tokens, channels), but layer {layer!r} gives "
            f"{shape}. " + ("Use --pooling flatten." if odd else "Leave out --pooling.")
        )


def _warn_of_classifier(classifier: tuple[str, str], description: Description) -> None:
    """Warn that the features will be the scores of a classifier, and name the layer before it."""
    last, before = classifier
    if last.partition("/")[0] != description.last or before not in description.layers:
        return
    pool = " --pooling avg" if len(description.layers[before]) > 1 else ""
    logger.warning(
        "the network ends in a classifier: its last layer %s gives scores of %d classes, and these would be the features. "
        "The layer before it knows more about an image: --layer %s%s",
        *(last, description.layers[description.last][-1], quoted(before), pool),
    )


def pooled_shape(shape: tuple[int, ...], pooling: str) -> tuple[int, ...]:
    """Return the shape of a layer's output after pooling, without the batch axis.

    Examples
    --------
    >>> pooled_shape((7, 7, 512), "avg"), pooled_shape((7, 7, 512), "flatten"), pooled_shape((7, 7, 512), "none")
    ((512,), (25088,), (7, 7, 512))
    """
    if pooling == "flatten":
        return (int(np.prod(shape)),)
    return shape if pooling == "none" else shape[-1:]


def describe(backbone: Backbone, file: WeightsFile, size: tuple[int, int]) -> Description:
    """Describe a network; a description in the cache is used instead of building the network again."""
    key = digest_of([MEMO_VERSION, backbone.name, file.sha256, list(size), importlib.metadata.version("keras")])
    memo = cache_path("backbones", f"{key}.json")
    known = _read_memo(memo)
    if known is not None:
        return known
    model = build_backbone(backbone, size)
    digest = load_weights(model, backbone, file)
    layers = {name: shape for name, shape in layer_shapes(model).items() if None not in shape}
    try:
        boundary: str | None = boundary_of(backbone, model)
    except ConfigurationError:
        boundary = None
    description = Description(digest, layers, last_layer(model), boundary)
    _write_memo(memo, description)
    return description


def _layer(name: str, description: Description, backbone: Backbone) -> str:
    if name == BOUNDARY:
        if description.boundary is None:
            raise ConfigurationError(
                f"{backbone.name} has no boundary, because no single tensor separates its last block. Use --layer NAME."
            )
        return description.boundary
    if name not in description.layers:
        names = list(description.layers)
        raise ConfigurationError(
            f"{backbone.name} has no layer {name!r}{nearest(name, names) or '.'} Its last layers are {', '.join(names[-5:])}"
        )
    return name


def _read_memo(path: Path) -> Description | None:
    if not path.exists():
        return None
    try:
        with signed_file(path) as file:
            values = json.load(file)
        layers = {str(name): tuple(int(length) for length in shape) for name, shape in values.pop("layers")}
        return Description(layers=layers, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is not used (%s); the network is described again", path, error)
        return None


def _write_memo(path: Path, description: Description) -> None:
    values = {**dataclasses.asdict(description), "layers": [[*item] for item in description.layers.items()]}
    try:
        write_signed(path, canonical_json(values).encode("ascii"))
    except OSError as error:  # the memo only saves time
        logger.warning("%s could not be written (%s)", path, error)
