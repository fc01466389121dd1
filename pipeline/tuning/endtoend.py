"""Joins a run's head to the network that made its features, checked by recipe, and cuts the result in two.

run | store -> recipe -> network -> trunk (pixels -> cut tensor, frozen) + tail (cut tensor -> logits, trained)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from features.errors import ConfigurationError, RunError, nearest
from features.machine import how_to_install
from features.networks.backbones import MODEL_SUFFIX, boundary_of, build_backbone, feature_model, preprocess
from features.networks.backend import load_keras
from features.networks.graph import cut_at, layer_tensors, valid_cuts, with_true_shapes
from features.networks.hub import is_hub_name
from features.networks.keras_engine import KerasEngine
from features.networks.kerasfiles import PREFIX
from features.networks.modelfile import keep_positions, untrained_copy
from features.networks.network import Network, resolve_network
from features.networks.quantised import find, networks_of_runs, networks_of_store
from features.networks.weights import IMAGENET, RANDOM
from features.recipe import Recipe
from pipeline.heads.head import Head
from pipeline.runs.folder import Run
from pipeline.tuning.settings import ALL, HEAD, LAST_BLOCK

if TYPE_CHECKING:
    from features.store.reader import FeatureStore

logger = logging.getLogger(__name__)
BATCHNORM_MODES = ("frozen", "affine", "train")
PIXELS = "pixels"  # name of the cut if every layer is trained: the tail then takes pixels


@dataclasses.dataclass(frozen=True)
class Origin:
    """What made some features, as a run or a store notes it.

    Parameters
    ----------
    name : str
        Run folder or store, for messages.
    made : str
        What the features were used for, for messages.
    recipe : Recipe
        Their recipe.
    backbone, weights : str
        Where network and weights were, as given to the extraction.
    places : tuple of Path
        Folders in which a file that has moved is looked for.
    networks : tuple of Path
        Folders of quantised networks.
    own : Path, optional
        Folder of a run, whose fine-tuned network no other file replaces.
    """

    name: str
    made: str
    recipe: Recipe
    backbone: str
    weights: str
    places: tuple[Path, ...]
    networks: tuple[Path, ...]
    own: Path | None = None

    @classmethod
    def of_run(cls, run: Run) -> Origin:
        """The origin of the features that a run's head was trained on."""
        folder = run.folder
        return cls(
            name=str(folder),
            made="its head was trained on features",
            recipe=run.recipe,
            backbone=run.backbone_argument,
            weights=run.weights_argument,
            places=(folder, folder.parent, folder.parent.parent),
            networks=(networks_of_runs(folder.parent), networks_of_store(Path(run.config["features"]["store"]))),
            own=folder,
        )

    @classmethod
    def of_store(cls, store: FeatureStore, name: str) -> Origin:
        """The origin of one feature set of a store."""
        return cls(
            name=str(store.path),
            made="it holds features",
            recipe=store.recipes[name],
            backbone=str(store.provenance.get("backbone", "")),
            weights=str(store.provenance.get("weights", IMAGENET)),
            places=(store.path.resolve().parent,),
            networks=(networks_of_store(store.path),),
        )


def network_of(run: Run, weights: str | None = None, *, device: str = "auto", quantised: str | None = None) -> Network:
    """Find the network whose features the run's head was trained on; parameters and errors are those of `network_from`."""
    return network_from(Origin.of_run(run), weights, device=device, quantised=quantised)


def network_from(
    made: Origin, weights: str | None = None, *, device: str = "auto", quantised: str | None = None
) -> Network:
    """Find the network that made the features of a run or a store.

    Parameters
    ----------
    made : Origin
        What is known of it.
    weights : str, optional
        Where the weights, or the model file, are now, if they have moved since the extraction. They are recognised by
        their digest, which is part of the recipe.
    device : {"auto", "cpu", "gpu"}
        Where the network will run.
    quantised : str, optional
        Where the file of the quantised network is, if it is in none of the usual places.

    Raises
    ------
    ConfigurationError
        If the quantised network of features in int8 is lost.
    RunError
        If the file is missing, or the network that is found has another recipe, such as other weights.
    """
    recipe = made.recipe
    if recipe.quantised is not None:
        quantised = str(find(recipe.quantised, made.networks, quantised))
    elif quantised is not None:
        raise ConfigurationError(
            f"--quantised {quantised}: {Path(made.name).name} is of {recipe.precision} features, not int8; leave it out"
        )
    network = resolve_network(recipe.options(*_places(made, weights), device=device, quantised=quantised))
    differences = recipe.plain.difference(network.recipes[0])
    if "precision" in differences:
        raise RunError(
            f"{made.name}: its features were computed in {recipe.precision}, which is not available here "
            f"({network.recipes[0].precision} is). Install the engine that computed them (for openvino: "
            f"{how_to_install('openvino')}; for others set KERAS_BACKEND), or extract again in float32."
        )
    if differences:
        listed = "; ".join(f"{field}: {before} -> {now}" for field, (before, now) in differences.items())
        raise RunError(
            f"{made.name}: {made.made} of another network ({listed}). "
            "Give the weights or the model file that made them with --weights."
        )
    return network


def _places(made: Origin, given: str | None) -> tuple[str, str]:
    """Return where a network and its weights are now, as options of an extraction."""
    backbone, weights = made.backbone, given or made.weights
    file = Path(backbone)
    if file.suffix.lower() == MODEL_SUFFIX:
        if given is not None and Path(given).suffix.lower() == MODEL_SUFFIX and file.parent != made.own:
            return given, IMAGENET  # a model file has its own weights
        return str(file if file.is_file() else _moved(made, file)), weights
    if backbone.startswith(PREFIX):  # so does a preset
        file = Path(backbone.removeprefix(PREFIX))
        place = given or (file if file.exists() else _moved(made, file))
        return f"{PREFIX}{str(place).removeprefix(PREFIX)}", IMAGENET
    if file.is_absolute() or is_hub_name(backbone):  # an ONNX file, its folder, or their name on a hub
        if given is None and file.is_absolute() and not file.exists():
            given = str(_moved(made, file))
        return given or backbone, IMAGENET
    if given is None and weights not in (IMAGENET, RANDOM) and not Path(weights).is_file():
        return backbone, str(_moved(made, Path(weights)))
    return backbone, weights


def _moved(made: Origin, file: Path) -> Path:
    """Look for a file or folder that is not where it was: beside the run or store, or here, under the same name."""
    for folder in (*made.places, Path.cwd()):
        found = folder.resolve() / file.name
        if found.exists():
            logger.warning("%s is no longer there; using %s if its digest is that of the features", file, found)
            return found
    raise RunError(
        f"{made.name}: the file of its network, {file}, is no longer there. Name the place where it is now with --weights FILE; "
        "it is recognised by its digest."
    )


def check_float32(recipe: Recipe) -> None:
    """Raise ``ConfigurationError`` if a run cannot be fine-tuned because of the precision of its features."""
    if recipe.precision != "float32":
        raise ConfigurationError(
            f"the head was trained on features computed in {recipe.precision.partition(':')[0]}; fine-tuning continues from "
            "float32 ones. Extract with --precision float32 into another file, and train the head on that."
        )


@dataclasses.dataclass(frozen=True)
class Split:
    """A network and its head, joined and cut in two for training.

    Parameters
    ----------
    backbone : keras.Model
        The network, which shares its layers with trunk and tail.
    trunk : keras.Model or None
        Preprocessed pixels -> cut tensor. It is never trained and never runs in training mode. None if the cut is `PIXELS`.
    tail : keras.Model
        Cut tensor -> logits, including the head. If the cut is `PIXELS`, the whole network including preprocessing.
    head : keras.Model
        The head, which is the last part of the tail.
    pool : str
        Name of the tail's layer whose output the head takes.
    cut : str
        Name of the layer whose output is the cut tensor, or `PIXELS`.
    """

    backbone: Any
    trunk: Any
    tail: Any
    head: Any
    pool: str
    cut: str

    def statistics_variables(self) -> list[Any]:
        """List moving mean and variance of every BatchNorm layer, including those within other layers."""
        layers = batch_normalizations(self.backbone)
        return [item for layer in layers for item in (layer.moving_mean, layer.moving_variance)]

    def statistics(self) -> list[np.ndarray]:
        """Copy the values of the `statistics_variables`."""
        convert = load_keras().ops.convert_to_numpy
        return [np.array(convert(item)) for item in self.statistics_variables()]

    def layers_of_tail(self) -> list[Any]:
        """List the tail's layers, including those of nested models, but without the head's."""
        keras = load_keras()
        head = {id(layer) for layer in self.head._flatten_layers()}
        layers = self.tail._flatten_layers(include_self=False)
        return [layer for layer in layers if id(layer) not in head and not isinstance(layer, keras.Model)]

    def trained_backbone(self) -> Any:
        """Return the network with the trained weights, to be saved; it is made of the layers that it was loaded with."""
        keep_positions(self.backbone)
        return self.backbone


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
    """Join a head to a network, make the layers from ``unfreeze`` on trainable, and cut the result in two.

    Parameters
    ----------
    network : Network
        The network and its weights.
    recipe : Recipe
        Recipe of the features that the head takes; its precision must be float32.
    head : Head
        A head that is a Keras model.
    unfreeze : str
        ``"last-block"``, ``"all"``, ``"head"``, the name of the first layer to train, or its number in ``model.layers``.
    bn : {"frozen", "affine", "train"}
        ``frozen``: BatchNorm layers are not trained. ``affine``: their gamma and beta are trained, and each call of theirs
        uses the stored statistics. In both, moving statistics are never updated: ``base(x, training=False)`` alone
        does not ensure that under ``fit`` in Keras 3.15. ``train``: they are trained as Keras does it, from scratch only.
    scratch : bool
        Draw new weights for the network, with Keras's own initialisers and the global seed.
    cut_of : callable
        Receives the possible cuts before the first trained layer, in graph order and beginning with `PIXELS`, and
        returns the one to use; by default the last.

    Raises
    ------
    ConfigurationError
        If the mode or the layer is unknown, the layer comes after the features, or the features are not float32.
    """
    check_float32(recipe)
    modes = BATCHNORM_MODES if scratch else BATCHNORM_MODES[:2]
    if bn not in modes:
        raise ConfigurationError(f"bn: received {bn!r}, expected one of {', '.join(modes)}{nearest(bn, modes)}")
    keras = load_keras()
    backbone = untrained(network) if scratch else network.load()
    first = first_trainable(backbone, unfreeze, network)
    names = [layer.name for layer in backbone.layers]
    if recipe.layer not in names:
        raise ConfigurationError(
            f"the head was trained on features of {recipe.layer!r}, a layer inside a nested model, and fine-tuning starts only "
            "from layers of the network itself. Extract a layer without / in its name, or save the inner model as a file."
        )
    if names.index(recipe.layer) < first < len(names):
        raise ConfigurationError(
            f"unfreeze: {names[first]!r} comes after {recipe.layer!r}, whose output the head takes, so there is nothing "
            "to train. Extract features of a later --layer, or unfreeze from an earlier one."
        )
    for index, layer in enumerate(backbone.layers):
        layer.trainable = index >= first  # a layer passes this on to all layers within it
    for layer in batch_normalizations(backbone):
        if bn == "frozen":
            layer.trainable = False
        elif bn == "affine":
            use_stored_statistics(layer)
    features = feature_model(backbone, [(recipe.layer, recipe.pooling, recipe.prefix_tokens)])
    whole = keras.Model(features.inputs[0], head.network(features.outputs[0]), name="end_to_end")
    frozen = set(names[:first])
    cut = cut_of([PIXELS, *(name for name in valid_cuts(whole) if name in frozen)])
    parts = (head.network, features.layers[-1].name, cut)
    if cut == PIXELS:
        pixels = keras.Input(features.inputs[0].shape[1:], name=PIXELS)
        tail = keras.Model(
            pixels, whole(preprocess(recipe.preprocessing, recipe.normalisation)(pixels)), name="from_pixels"
        )
        return Split(backbone, None, tail, *parts)
    _, tail = cut_at(whole, cut)
    trunk = keras.Model(backbone.inputs[0], layer_tensors(backbone)[cut], name="trunk")
    trunk.trainable = False
    return Split(backbone, trunk, tail, *parts)


def untrained(network: Network) -> Any:
    """Build the network's architecture with new weights, drawn by Keras's initialisers."""
    if network.backbone.own_weights is not None:
        return with_true_shapes(untrained_copy(network.load()))
    rule = network.recipes[0].pixels
    return build_backbone(network.backbone, (rule.height, rule.width))


def untrained_head(head: Head) -> Head:
    """Make a head of the same layers with new weights. It does not standardise, as there are no features yet."""
    new = head.fresh()
    new.pool, new.input_shape = head.pool, head.input_shape
    new.mean, new.std = np.zeros_like(head.mean), np.ones_like(head.std)
    return new


def first_trainable(backbone: Any, unfreeze: str, network: Network) -> int:
    """Find the first layer to train, as an index into ``backbone.layers``; the number of layers if none is trained."""
    names = [layer.name for layer in backbone.layers]
    if unfreeze in (ALL, HEAD):
        return 0 if unfreeze == ALL else len(names)
    if unfreeze == LAST_BLOCK:
        boundary = network.description.boundary
        if boundary is None:
            try:
                boundary = boundary_of(network.backbone, backbone)
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"unfreeze: {error}; or give the name or number of the first layer to train: the last layers are "
                    f"{', '.join(names[-5:])}"
                ) from error
        return names.index(boundary) + 1
    if unfreeze.lstrip("-").isdecimal():
        number = int(unfreeze)
        if not -len(names) <= number < len(names):
            raise ConfigurationError(
                f"unfreeze: received layer {number}, expected one of the network's layers 0 to {len(names) - 1}"
            )
        return number % len(names)
    if unfreeze not in names:
        raise ConfigurationError(
            f"unfreeze: {network.backbone.name} has no layer {unfreeze!r}{nearest(unfreeze, names) or '.'} "
            f"Use {LAST_BLOCK}, {ALL}, {HEAD}, a layer name, or a layer number; the last layers are {', '.join(names[-5:])}"
        )
    return names.index(unfreeze)


def use_stored_statistics(layer: Any) -> None:
    """Make every call of a BatchNorm layer use its stored statistics and leave them alone; gamma and beta can be trained."""
    call = layer.call  # of the class, as is what is saved

    def with_stored(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return call(inputs, training=False, mask=mask)

    layer.call = with_stored


def batch_normalizations(layer: Any) -> list[Any]:
    """List every BatchNorm layer of a model or layer, including those within other layers."""
    import keras

    found = []
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        found += [inner] if isinstance(inner, keras.layers.BatchNormalization) else batch_normalizations(inner)
    return found


def trunk_function(
    split: Split, network: Network, recipe: Recipe, *, batch_size: int, device: str
) -> Callable[[np.ndarray], np.ndarray]:
    """Compile the trunk to a function, uint8 pixels (n, h, w, 3) -> cut features; without a trunk these are the pixels."""
    if split.trunk is None:
        return lambda pixels: pixels
    cut = dataclasses.replace(recipe, layer=split.cut, pooling="none", dtype="float32")
    engine = KerasEngine(
        split.trunk, preprocess(recipe.preprocessing, recipe.normalisation), [cut], batch_size=batch_size, device=device
    )
    return lambda pixels: engine(pixels)[cut.name]
