"""Backbone and head as one network again: the very weights that made the features, checked by fingerprint.

run -> recipe -> network -> trunk (pixels -> cut tensor, frozen) + tail (cut tensor -> logits, trained)
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from features.backbones import feature_model, preprocess
from features.engines import KerasEngine
from features.errors import ConfigurationError, ParityError, RunError, UnreadableImageError, nearest
from features.files import printable
from features.graph import cut_at, nearest_earlier_cut
from features.images import Decoded, decode_image
from features.networks import BOUNDARY, Network, resolve_network
from features.recipe import PixelRule, Recipe
from features.shards import ahead
from pipeline.head import Head
from pipeline.metrics import softmax
from pipeline.runs import Run

BATCHNORM_MODES = ("frozen", "affine")
LAST_BLOCK = "last-block"
# In probability. Heads trained on float16 features were trained on rounded numbers, the network gives them unrounded.
PARITY_TOLERANCE = {"float32": 1e-4, "float16": 1e-2}


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
    network = resolve_network(
        run.backbone_argument,
        weights=weights or run.weights_argument,
        layers=[recipe.layer],
        pooling=recipe.pooling,
        image_size=(recipe.pixels.height, recipe.pixels.width),
        resize=recipe.pixels.resize,
        fit=recipe.pixels.fit,
        dtype=recipe.dtype,
        decode=recipe.pixels.decode,
        device=device,
        **_arithmetic(recipe),
    )
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


def _arithmetic(recipe: Recipe) -> dict[str, str]:
    precision, _, engine = recipe.precision.partition(":")
    return {"precision": precision, "engine": engine.partition("-")[0] or "auto"}


@dataclasses.dataclass(frozen=True)
class Split:
    """A network cut in two for training.

    Parameters
    ----------
    original : keras.Model
        The backbone as it was loaded, of ordinary layers.
    backbone : keras.Model
        The backbone that trunk and tail share their layers with: the original, or a copy with other BatchNorm layers.
    trunk : keras.Model
        Preprocessed pixels -> cut tensor. Never trained, never in training mode.
    tail : keras.Model
        Cut tensor -> logits, the head included.
    cut : str
        Layer whose output is the cut tensor.
    """

    original: Any
    backbone: Any
    trunk: Any
    tail: Any
    cut: str

    def statistics(self) -> list[np.ndarray]:
        """Moving means and variances of every BatchNorm layer, nested ones too."""
        import keras

        layers = batch_normalizations(self.backbone)
        return [
            np.array(keras.ops.convert_to_numpy(item))
            for layer in layers
            for item in (layer.moving_mean, layer.moving_variance)
        ]

    def trained_backbone(self) -> Any:
        """The original with the trained weights: it can be saved and opened without any class of ours."""
        if self.original is not self.backbone:
            self.original.set_weights(self.backbone.get_weights())
        return self.original


def split_for_training(
    network: Network, recipe: Recipe, head: Head, *, unfreeze: str = LAST_BLOCK, bn: str = "frozen"
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
        ``"last-block"``, the name of the first layer to train, or its number in ``model.layers``.
    bn : {"frozen", "affine"}
        ``frozen``: BatchNorm layers are not trained. ``affine``: their gamma and beta are, in layers whose call
        forces inference statistics. Moving statistics are never updated: ``base(x, training=False)`` alone does
        not ensure that under ``fit`` in Keras 3.15.

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
    import keras

    if bn not in BATCHNORM_MODES:
        raise ConfigurationError(
            f"bn: received {bn!r}, expected one of {', '.join(BATCHNORM_MODES)}{nearest(bn, BATCHNORM_MODES)}"
        )
    original = network.load()
    first = first_trainable(original, unfreeze, network)
    backbone = with_stored_statistics(original) if bn == "affine" else original
    names = [layer.name for layer in backbone.layers]
    if names.index(recipe.layer) < first:
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
    output = features.outputs[0]
    whole = keras.Model(features.inputs[0], head.network(output), name="end_to_end")
    cut = nearest_earlier_cut(backbone, first)
    trunk, tail = cut_at(whole, cut)
    return Split(original, backbone, trunk, tail, cut)


def first_trainable(backbone: Any, unfreeze: str, network: Network) -> int:
    """Number in ``backbone.layers`` of the first layer to train."""
    names = [layer.name for layer in backbone.layers]
    if unfreeze == LAST_BLOCK:
        boundary = network.description.boundary
        if boundary is None:
            raise ConfigurationError(
                f"{network.backbone.name} has no {BOUNDARY}: no single tensor separates its last block"
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
            f"unfreeze: {network.backbone.name} has no layer {unfreeze!r}{nearest(unfreeze, names)} "
            f"Use {LAST_BLOCK}, a layer name, or a layer number; the last layers are {', '.join(names[-5:])}"
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


def trunk_engine(split: Split, network: Network, recipe: Recipe, *, batch_size: int, device: str) -> KerasEngine:
    """The trunk as a compiled function of pixels; its one output is called by the cut."""
    cut = dataclasses.replace(recipe, layer=split.cut, pooling="none", dtype="float32")
    return KerasEngine(split.trunk, preprocess(network.backbone), [cut], batch_size=batch_size, device=device)


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


def decoded_batches(
    read: Callable[[int], bytes],
    rows: Sequence[int],
    rule: PixelRule,
    pool: Executor,
    batch_size: int,
) -> Iterator[tuple[list[int], np.ndarray, dict[int, UnreadableImageError]]]:
    """Batches of decoded images in the order of ``rows``.

    Yields
    ------
    rows : list of int
        Those that could be read.
    pixels : uint8, (len(rows), h, w, 3)
        Their pixels.
    refused : dict of int to UnreadableImageError
        The others met since the last batch.
    """
    good: list[int] = []
    pixels = np.empty((batch_size, rule.height, rule.width, 3), np.uint8)
    refused: dict[int, UnreadableImageError] = {}

    def load(row: int) -> Decoded | UnreadableImageError:
        try:
            return decode_image(read(row), rule)
        except UnreadableImageError as error:
            return error

    for row, outcome in zip(rows, ahead(pool, load, rows, 2 * batch_size), strict=True):
        if isinstance(outcome, UnreadableImageError):
            refused[row] = outcome
            continue
        pixels[len(good)] = outcome.pixels
        good.append(row)
        if len(good) == batch_size:
            yield good, pixels, refused
            good, refused = [], {}
    if good or refused:
        yield good, pixels[: len(good)], refused


def cached_predictions(run: Run, limit: int) -> tuple[list[bytes], np.ndarray]:
    """What the run's head gave from cached features, evenly spread over validation.

    Returns
    -------
    sha256 : list of bytes
        Content of the images, at most ``limit``: they may have been renamed since.
    probabilities : float64, (n, c)
        One row per image.
    """
    path = Path(run.folder) / "predictions.csv"
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        rows = list(csv.reader(stream))[1:]
    if not rows:
        raise RunError(f"{path}: holds no predictions to compare with")
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(limit, len(rows))).astype(int))
    count = len(run.classes)
    try:
        hashes = [bytes.fromhex(rows[index][1]) for index in chosen]
        values = np.array([[float(value) for value in rows[index][-count:]] for index in chosen])
    except (ValueError, IndexError) as error:
        raise RunError(f"{path}: is damaged ({error}); train the head again") from error
    return hashes, values


def check_parity(received: np.ndarray, expected: np.ndarray, paths: Sequence[str], what: str, dtype: str) -> float:
    """Largest difference in probability, or an error that names the image.

    Parameters
    ----------
    received, expected : float64, (n, c)
        Probabilities of the same images.
    paths : sequence of str
        Their names, for the message.
    what : str
        Where the comparison is made, for the message.
    dtype : {"float32", "float16"}
        How the features were stored, which decides the tolerance.

    Raises
    ------
    ParityError
        If it exceeds ``PARITY_TOLERANCE``.
    """
    gaps = np.abs(received - expected).max(axis=1)
    worst = int(np.argmax(gaps))
    if not gaps[worst] <= PARITY_TOLERANCE[dtype]:
        raise ParityError(
            f"{what}: probabilities of {printable(paths[worst])} differ by {gaps[worst]:.2e}, at most "
            f"{PARITY_TOLERANCE[dtype]:.0e} is allowed for {dtype} features. The images or the weights are not those "
            "that made the features: extract again, or give the right --images and --weights."
        )
    return float(gaps[worst])
