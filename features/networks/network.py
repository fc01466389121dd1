"""Resolve the options to a network, its weights and its recipes, and open the engine that computes them.

Recipes need the digest of the weights and the shapes of the layers. Keras determines them once for each weights file
and they are cached by its sha256, so a run with nothing to compute never imports Keras.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from features.errors import ConfigurationError, OpenVinoError, nearest
from features.files import quoted
from features.machine import keras_backend
from features.networks.backbones import BOUNDARY, Backbone, Description
from features.networks.engines import Engine, choose_engine
from features.networks.finding import find_backbone
from features.networks.keras_runtime import KerasRuntime
from features.networks.onnxfile import OnnxRuntime
from features.networks.quantised import SUFFIX, checked
from features.networks.weights import WeightsFile, resolve_weights
from features.recipe import MEAN_STD, MOST_PREFIX, TOKEN_POOLINGS, NetworkOptions, Recipe

logger = logging.getLogger(__name__)


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
    quantised: Path | None = None  # file of the quantised network

    @property
    def row_bytes(self) -> int:
        """Bytes that one view of one image takes over all feature sets."""
        return sum(
            int(np.prod(pooled_shape(self.description.layers[item.layer], item.pooling)))
            * np.dtype(item.dtype).itemsize
            for item in self.recipes
        )

    @property
    def license(self) -> str | None:
        """Licence of the weights, as the hub or the files beside them name it; None if nothing does."""
        return self.backbone.license

    def load(self) -> Any:
        """Build the network as a ``keras.Model`` and load its weights.

        Raises
        ------
        ConfigurationError
            If it was not made by Keras.
        """
        rule = self.recipes[0].pixels
        return self._runtime.load(self.backbone, self.weights, (rule.height, rule.width))

    def graph(self, recipe: Recipe) -> Any:
        """Return the network as an ``onnx.ModelProto``: see ``features.networks.onnx_graph.composed``.

        Raises
        ------
        ConfigurationError
            If it does not come as an ONNX file.
        """
        return self._runtime.graph(self.backbone, [recipe])

    def conversion(self) -> Mapping[str, np.ndarray]:
        """Return the network in float32 as OpenVINO runs it, proven; see ``features.networks.openvino_engine.conversion``.

        Raises
        ------
        OpenVinoError
            If OpenVINO cannot run it.
        """
        from features.networks.openvino_engine import conversion

        return conversion(
            self.recipes, self._convert(self.recipes), source=self.weights.sha256, by=self._runtime.engines[0]
        )

    def _convert(self, recipes: Sequence[Recipe]) -> Callable[[], dict[str, np.ndarray]]:
        return lambda: self._runtime.converted(self.backbone, self.weights, recipes)

    @property
    def own_engine(self) -> str:
        """The engine of the library that the network came from, which defines its features."""
        return self._runtime.engines[0]

    @property
    def _runtime(self) -> Runtime:
        return RUNTIMES[self.backbone.runtime]

    def engine(self, recipes: Sequence[Recipe], *, batch_size: int, device: str = "auto") -> Engine:
        """Open an engine that computes the feature sets of these recipes in a single pass.

        Raises
        ------
        ConfigurationError
            If a GPU is requested of OpenVINO.
        OpenVinoError
            If OpenVINO cannot run the network and Keras would give other features, as in half precision and int8.
        """
        from features.networks.openvino_engine import open_engine

        runtime, precision = self._runtime, recipes[0].precision.partition(":")[0]
        if self.engine_name == "openvino" and device == "gpu":
            raise ConfigurationError(
                f"device: a GPU was asked for, but openvino runs only on the CPU. Use --engine {runtime.engines[0]}."
            )
        if precision == "int8" and self.quantised is not None:
            from features.networks.quantising import open_quantised

            return open_quantised(self.quantised, recipes, batch_size=batch_size)
        if self.engine_name == "openvino":
            try:
                return open_engine(
                    recipes,
                    self._convert(recipes),
                    source=self.weights.sha256,
                    by=runtime.engines[0],
                    batch_size=batch_size,
                    precision=precision,
                )
            except OpenVinoError as error:
                other = runtime.engines[0]
                if precision != "float32":
                    raise OpenVinoError(f"{error}. Use --engine {other}, or --precision float32.") from error
                logger.warning("%s; using %s, which computes the same features more slowly", error, NAMES[other])
        return runtime.engine(
            self.backbone, self.weights, recipes, batch_size=batch_size, device=device, precision=precision
        )


class Runtime(Protocol):
    """What one kind of network can do: describe itself, be converted for OpenVINO, and run by its own engine."""

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that run it: first its own, then those that need a conversion."""
        ...

    def describe(
        self, backbone: Any, weights: WeightsFile, size: tuple[int, int], layers: Sequence[str]
    ) -> Description:
        """Describe the network for images of this height and width; ``layers`` are those that were asked for."""
        ...

    def load(self, backbone: Any, weights: WeightsFile, size: tuple[int, int]) -> Any:
        """Build a ``keras.Model``, or raise ``ConfigurationError`` and say what to do."""
        ...

    def graph(self, backbone: Any, recipes: Sequence[Recipe]) -> Any:
        """Return an ``onnx.ModelProto`` from uint8 pixels to features, or raise ``ConfigurationError``."""
        ...

    def converted(self, backbone: Any, weights: WeightsFile, recipes: Sequence[Recipe]) -> dict[str, np.ndarray]:
        """Convert for ``features.networks.openvino_engine.open_engine``."""
        ...

    def engine(
        self,
        backbone: Any,
        weights: WeightsFile,
        recipes: Sequence[Recipe],
        *,
        batch_size: int,
        device: str,
        precision: str,
    ) -> Engine:
        """Open the kind's own engine."""
        ...


RUNTIMES: dict[str, Runtime] = {"keras": KerasRuntime(), "onnx": OnnxRuntime()}
NAMES = {"keras": "Keras", "onnxruntime": "ONNX Runtime"}


def resolve_network(options: NetworkOptions) -> Network:
    """Find the network, its weights and its layers, and write one recipe per feature set.

    Parameters
    ----------
    options : NetworkOptions
        The options of the network.

    Raises
    ------
    ConfigurationError
        If a name is unknown; the message suggests the nearest ones. If the precision is int8, and there is no quantised
        network of these features.
    WeightsError
        If the weights cannot be found or do not fit.
    """
    row = find_backbone(options.backbone)
    runtime = RUNTIMES[row.runtime]
    engine = choose_engine(options, runtime.engines)
    by = engine if engine == "openvino" else f"keras-{keras_backend()}"
    if options.precision == "int8" and options.quantised is None:
        raise ConfigurationError(
            "precision: int8 needs a quantised network, which extract makes from images; name its file with --quantised "
            f"FILE{SUFFIX}"
        )
    rule, normalisation, prefix = row.pixel_rule(options), row.normalisation(options), row.prefix_tokens(options)
    file = resolve_weights(row, options.weights)
    description = runtime.describe(row, file, (rule.height, rule.width), options.layers)
    chosen: dict[tuple[str, str], Recipe] = {}
    for layer in [_layer(name, description, row) for name in options.layers] or [description.last]:
        pooled = _pooling(options, description.layers[layer], prefix, row.has_class_token(options))
        chosen[layer, pooled] = Recipe(
            backbone=row.name,
            weights=description.digest,
            layer=layer,
            pooling=pooled,
            pixels=rule,
            preprocessing=row.preprocessing if normalisation is None else MEAN_STD,
            dtype=options.dtype,
            precision="float32" if options.precision in ("float32", "int8") else f"{options.precision}:{by}",
            normalisation=normalisation,
            prefix_tokens=_prefix(options, layer, pooled, prefix),
        )
    _check_pooling(options, [(layer, description.layers[layer]) for layer, _ in chosen])
    _check_names([*chosen.values()])
    for (layer, pooled), recipe in chosen.items():
        if pooled in TOKEN_POOLINGS and len(description.layers[layer]) == 2:
            _check_tokens(options, row, recipe, description.layers[layer][0], prefix)
    _warn_of_single_numbers(chosen.values(), description)
    if not options.layers and row.classifier is not None:
        _warn_of_classifier(row.classifier, description)
    # Absolute paths, so that a later stage finds the same network from any working directory.
    backbone = options.backbone if row.place is None else row.place
    weights = str(file.path.resolve()) if file.route == "file" and file.path is not None else options.weights
    network = Network(row, backbone, file, weights, tuple(chosen.values()), description, engine)
    return network if options.quantised is None else _quantised(network, Path(options.quantised).absolute())


def _quantised(network: Network, file: Path) -> Network:
    """Return the network in int8, by the file of the quantised network."""
    digest = checked(file, network.recipes)
    recipes = (dataclasses.replace(item, precision="int8", quantised=digest) for item in network.recipes)
    return dataclasses.replace(network, recipes=tuple(recipes), quantised=file)


def _pooling(options: NetworkOptions, shape: tuple[int, ...], prefix: int | None, has_class: bool) -> str:
    """Choose the pooling of a layer: what was asked for; else, for the last layer, the class token or the mean; else none."""
    if len(shape) == 1:  # a vector has nothing to pool
        return "none"
    if options.pooling is not None:
        return options.pooling
    if options.layers:
        return "none"
    tokens = ("cls" if has_class else "tokens") if len(shape) == 2 and prefix else None
    return tokens or ("avg" if len(shape) in (2, 3) else "none")


def _prefix(options: NetworkOptions, layer: str, pooled: str, prefix: int | None) -> int | None:
    """Return the prefix that a pooling needs, and refuse to guess it."""
    if pooled not in ("tokens", "cls+tokens"):
        return None
    if prefix is None:
        raise ConfigurationError(
            f"pooling: {pooled} needs to know how many tokens of {layer!r} stand before those of the image (a class token, "
            "registers), which the description of the network does not say. Give --prefix-tokens: 1 for a class token, 0 for "
            "none, 5 for a class token and four registers"
        )
    return prefix


def _check_pooling(options: NetworkOptions, layers: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse a pooling that no layer, or not every layer, allows."""
    for layer, shape in layers:
        if options.pooling in TOKEN_POOLINGS and len(shape) not in (1, 2):
            raise ConfigurationError(
                f"pooling: {options.pooling} is for (tokens, channels), but layer {layer!r} gives {shape}. Use --pooling avg."
            )
    if options.pooling not in ("avg", "max"):
        return
    odd = [(layer, shape) for layer, shape in layers if len(shape) > 3]
    if odd or all(len(shape) == 1 for _, shape in layers):
        layer, shape = (odd or layers)[0]
        raise ConfigurationError(
            f"pooling: {options.pooling} is for (height, width, channels) or (tokens, channels), but layer {layer!r} gives "
            f"{shape}. " + ("Use --pooling flatten." if odd else "Leave out --pooling.")
        )


def _check_names(recipes: Sequence[Recipe]) -> None:
    """Refuse layers that cannot be kept under their names."""
    taken: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name == ".":
            raise ConfigurationError(f"layer {recipe.layer!r} cannot be kept: HDF5 has no array of this name")
        other = taken.setdefault(recipe.name, recipe)
        if other is not recipe:
            raise ConfigurationError(
                f"layers {other.layer!r} and {recipe.layer!r} would both be kept under the name {recipe.name!r}. Extract them "
                "into stores of their own"
            )


def _check_tokens(options: NetworkOptions, row: Backbone, recipe: Recipe, tokens: int, prefix: int | None) -> None:
    """Refuse a class token where there is none; compare the number of tokens with that of the patches, behind which they stand."""
    if recipe.pooling != "tokens" and not row.has_class_token(options):
        raise ConfigurationError(
            f"pooling: {recipe.pooling} takes the class token of {recipe.layer!r}, but this network has none. Use --pooling tokens; "
            "or, if it has one, say so with --prefix-tokens 1"
        )
    patch, pixels = row.patch(options), recipe.pixels
    before = -1 if patch is None else tokens - (pixels.height // patch) * (pixels.width // patch)
    if patch is None or prefix is None or before == prefix or not 0 <= before <= MOST_PREFIX:
        return
    text = (
        f"layer {recipe.layer!r} gives {tokens} tokens for {pixels.height}x{pixels.width} pixels in patches of {patch}x{patch}, so "
        f"{before} of them stand before those of the image"
    )
    if options.prefix_tokens is None:
        raise ConfigurationError(
            f"pooling: {text}, but the description of the network says {prefix}. Give --prefix-tokens {before}"
            + (", or --pooling avg" if not before else "")
        )
    logger.warning("%s, not %d (--prefix-tokens)", text, prefix)


def _warn_of_single_numbers(recipes: Iterable[Recipe], description: Description) -> None:
    for recipe in recipes:
        if np.prod(pooled_shape(description.layers[recipe.layer], recipe.pooling)) == 1:
            logger.warning(
                "%s is a single number for each image, from which a head learns next to nothing: name another layer with --layer",
                recipe.name,
            )


def _warn_of_classifier(classifier: tuple[str, str], description: Description) -> None:
    """Warn that the features will be the scores of a classifier, and name the layer before it."""
    last, before = classifier
    if last.partition("/")[0] != description.last:
        return
    pool = " --pooling avg" if len(description.layers.get(before, ())) > 1 else ""
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
    >>> pooled_shape((257, 384), "cls"), pooled_shape((257, 384), "cls+tokens")
    ((384,), (768,))
    """
    if pooling == "flatten":
        return (int(np.prod(shape)),)
    if pooling == "cls+tokens":
        return (2 * shape[-1],)
    return shape if pooling == "none" else shape[-1:]


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
