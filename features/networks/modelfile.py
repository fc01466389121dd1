"""Keras model files: read what they say without Keras, and load the model in safe mode."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, brief
from features.files import quoted
from features.networks.backend import load_keras_hub
from features.networks.graph import graph_nodes, layer_tensors, stable_names, with_true_shapes
from features.networks.kerashub import PACKAGE, HubConfig, mentions_hub

logger = logging.getLogger(__name__)
_LARGEST_CONFIG = 64 << 20  # bytes of JSON
_LARGEST_EXPANSION = 1000  # bytes of weights for each byte of the file, which may be compressed; Keras allows the same
_SMALL = 64 << 20  # bytes of weights that are never refused
_LARGEST_OUTPUT = 4 << 30  # bytes that one layer may give for one image
_DAMAGED = (
    OSError,
    KeyError,
    ValueError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)  # deep JSON: RuntimeError
_SCORES = ("softmax", "sigmoid")  # activations that make scores of classes


class ModelConfig:
    """What a ``.keras`` file says about its model, read without Keras.

    Attributes
    ----------
    size : tuple of int or None
        Height and width of its input in pixels; None if it accepts any size.
    classifier : tuple of str or None
        Layer that makes scores of classes at the end of the network, and the layer before it; None if there is none.
    keras : str
        Version of Keras that wrote the file; empty if it does not say.
    hub : HubConfig or None
        What it says of its network, if that is one of KerasHub.
    has_hub_classes : bool
        Whether KerasHub is needed to open it.
    is_layered : bool
        Whether it lists the layers of its model, which tell the size.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; ``ConfigurationError`` if it is missing or is not a Keras model."""
        if not path.is_file():
            raise ConfigurationError(f"backbone: the model file {path} does not exist")
        try:
            with zipfile.ZipFile(path) as archive:
                config = _read_json(archive, "config.json")
                about = _read_json(archive, "metadata.json") if "metadata.json" in archive.namelist() else None
        except _DAMAGED as error:
            raise ConfigurationError(
                f"{path} is not a Keras model file (a zip with config.json): {error}. Write one with model.save('NAME.keras')"
            ) from error
        self.keras = str(about.get("keras_version", ""))[:20] if isinstance(about, Mapping) else ""
        self.hub, self.has_hub_classes = HubConfig.of(path, config), mentions_hub(config)
        self.is_layered = bool(_layers(config))
        self.size = _image_size(config) if self.hub is None else self.hub.size
        self.classifier = _classifier(_layers(config))


def _read_json(archive: zipfile.ZipFile, name: str) -> Any:
    size = archive.getinfo(name).file_size
    if size > _LARGEST_CONFIG:
        raise ValueError(f"{name} has {size} bytes, at most {_LARGEST_CONFIG} are allowed")
    return json.loads(archive.read(name))


def _layers(config: Any) -> Sequence[Any]:
    """Return the descriptions of the layers of a functional or Sequential model; none if it has no such list."""
    inner = config.get("config") if isinstance(config, Mapping) else None
    layers = inner.get("layers") if isinstance(inner, Mapping) else None
    return layers if isinstance(layers, list) and all(isinstance(layer, Mapping) for layer in layers) else ()


def _image_size(config: Any) -> tuple[int, int] | None:
    for layer in _layers(config):
        settings = layer.get("config")
        if layer.get("class_name") == "InputLayer" and isinstance(settings, Mapping):
            shape = settings.get("batch_shape", settings.get("batch_input_shape"))  # Keras 3, Keras 2
            sizes = shape[1:3] if isinstance(shape, list) and len(shape) == 4 else []
            return (sizes[0], sizes[1]) if all(type(size) is int for size in sizes) and sizes else None
    return None  # no list of layers, or the input is not an image: open_model reports it


def _classifier(layers: Sequence[Any], prefix: str = "") -> tuple[str, str] | None:
    """Find the layer that makes scores at the end of a list of layers, and the one before it, ``OUTER/INNER`` if nested.

    In the files of functional models, too, the last layer of the list is the one that gives the output, unless layers
    run beside each other.
    """
    named = [
        (f"{prefix}{_plain_name(str(_settings(layer).get('name')))}", layer)
        for layer in layers
        if layer.get("class_name") != "InputLayer"
    ]
    if not named:
        return None
    name, last = named[-1]
    if inner := _layers(last):
        return _classifier(inner, f"{name}/")
    scores = last.get("class_name") == "Softmax" or _settings(last).get("activation") in _SCORES
    return (name, named[-2][0]) if scores and len(named) > 1 else None


def _settings(layer: Any) -> Mapping[str, Any]:
    found = layer.get("config")
    return found if isinstance(found, Mapping) else {}


def load_model_file(path: Path, size: tuple[int, int]) -> Any:
    """Load the model of a ``.keras`` file for images of one size, without running code from the file or compiling it.

    Parameters
    ----------
    path : Path
        A functional or Sequential model with one input (n, height, width, 3) and one output.
    size : tuple of int
        Height and width in pixels.

    Returns
    -------
    keras.Model
        The model with the weights of the file.

    Raises
    ------
    ConfigurationError
        If the file cannot be loaded in safe mode, or its model has other inputs or outputs.
    """

    return sized_model(path, open_model(path), size)


def sized_model(path: Path, model: Any, size: tuple[int, int]) -> Any:
    """Check that a model is one from images to features in float32, and return it for images of one size.

    Parameters
    ----------
    path : Path
        Where it comes from, for messages.
    model : keras.Model
        With its weights.
    size : tuple of int
        Height and width in pixels.
    """
    import keras

    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ConfigurationError(f"{path}: expected a functional or Sequential model with an input, not a subclass")
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) != 1 or len(model.outputs) != 1 or len(shapes[0]) != 4 or shapes[0][3] != 3:
        raise ConfigurationError(
            f"{path}: expected one input (n, height, width, 3) and one output, received inputs {shapes[:3]} and "
            f"{len(model.outputs)} outputs"
        )
    fixed = shapes[0][1:3]
    if any(have not in (None, want) for have, want in zip(fixed, size, strict=True)):
        raise ConfigurationError(
            f"{path} takes images of {fixed[0]}x{fixed[1]} pixels, received {size[0]}x{size[1]}. Omit --image-size."
        )
    half = {layer.name: layer.compute_dtype for layer in model._flatten_layers(include_self=False)}
    if odd := sorted(name for name, dtype in half.items() if dtype != "float32"):
        raise ConfigurationError(
            f"{path}: layer {odd[0]} computes in {half[odd[0]]}, expected float32. Save the model with the "
            "dtype policy float32, and choose another precision with --precision."
        )
    if None not in fixed:
        sized = _with_own_positions(model)
        if is_of_hub(sized):
            _use_stable_names(sized)
        _check_outputs(path, sized)
    else:
        sized = untrained_copy(model, size)
        _check_outputs(path, sized)
        sized.set_weights(model.get_weights())
    last, tensor = list(layer_tensors(sized).items())[-1]
    if tensor is not sized.outputs[0]:
        logger.warning(
            "%s: its output is not that of a layer; the features are those of its last layer, %s, unless --layer names another",
            *(path, last),
        )
    return with_true_shapes(sized)


def _with_own_positions(model: Any) -> Any:
    """Copy a network of KerasHub that interpolates its positions to one that has them for its own images.

    DINOv2 trains the interpolated ones. Only if the others have the same shape, they can be saved as they are, see
    ``keep_positions``.
    """
    settings = model.get_config() if is_of_hub(model) else {}
    shape = settings.get("image_shape")
    if tuple(settings.get("position_embedding_shape") or ())[:2] in ((), tuple(shape or ())[:2]):
        return model
    copy = type(model).from_config({**settings, "position_embedding_shape": shape})
    for mine, theirs in zip(copy.weights, model.weights, strict=True):
        if mine.shape == theirs.shape:
            mine.assign(theirs)
    keep_positions(copy)
    return copy


def keep_positions(model: Any) -> None:
    """Take over the positions that a DINOv2 of KerasHub has learned into those that it saves; other models stay.

    KerasHub does so itself on saving, but not if the sum of the changes is negative (release 0.32).
    """
    for layer in model.layers:
        if hasattr(layer, "interpolated_position_embeddings"):
            layer.position_embeddings.assign(layer.interpolated_position_embeddings)


def untrained_copy(model: Any, size: tuple[int, int] | None = None) -> Any:
    """Make the same model with new weights; with a size, for images of this height and width only.

    Networks of KerasHub are made by their class where it takes a size, because the configurations of some of their layers
    are not whole.
    """
    import keras

    settings = model.get_config() if is_of_hub(model) else {}
    if settings and (size is None or "image_shape" in settings):
        copy = type(model).from_config(settings if size is None else {**settings, "image_shape": (*size, 3)})
    else:
        image = None if size is None else keras.Input((*size, 3), name=model.inputs[0].name)
        given = None if image is None else keras.tree.map_structure(lambda _: image, model.input)
        copy = keras.models.clone_model(model, input_tensors=given)
    if settings:
        _use_stable_names(copy)
    return copy


def is_of_hub(model: Any) -> bool:
    """Whether a network is of a class of KerasHub, which can be saved although not each of its layers can."""
    return type(model).__module__.partition(".")[0] == PACKAGE


def _use_stable_names(model: Any) -> None:
    """Name the layers of a network of KerasHub as in a fresh process; other models have names of their own."""
    for layer, name in zip(model.layers, stable_names(model.layers), strict=True):
        layer.name = name


def _check_outputs(path: Path, model: Any) -> None:
    for operation, _, outputs in graph_nodes(model):
        values = max(math.prod(length for length in tensor.shape[1:] if length) for tensor in outputs)
        if 4 * values > _LARGEST_OUTPUT:
            raise ConfigurationError(
                f"{path}: layer {operation.name} gives {4 * values} bytes for one image, at most {_LARGEST_OUTPUT} are "
                "allowed. Give a smaller --image-size, or another network."
            )


def open_model(path: Path) -> Any:
    """Load a ``.keras`` file in safe mode: no code of the file runs, and no layer is larger than its weights.

    Raises
    ------
    ConfigurationError
        If Keras cannot load it; the message has the reason in a few words and the way out.
    """
    import keras

    about = ModelConfig(path)
    version = about.keras
    if about.has_hub_classes:
        load_keras_hub(path)
    try:
        _check_file(path)
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except ConfigurationError:
        raise
    except Exception as error:  # layers of a file raise errors of any type while they are made
        reason = reason_of(error)
        if version.startswith(("1.", "2.")):
            raise ConfigurationError(
                f"{path} was written by Keras {version}, and Keras {keras.__version__} cannot open it ({brief(reason.partition('. ')[0], 150)}). "
                f"If it is a network of keras.applications, name it and take only the numbers: --backbone NAME --weights {quoted(path)}. "
                "Otherwise load its weights into the same layers made with Keras 3, and save that model."
            ) from error
        raise ConfigurationError(
            f"{path} cannot be loaded in safe mode: {reason}. If the model contains Lambda layers or custom classes, "
            "save it again without them."
        ) from error
    if about.hub is not None:
        model = getattr(model, "backbone", model)  # of a task
    renamed = _use_plain_names(model)
    if renamed:
        logger.warning(
            "%s: layers that TensorFlow cannot run under their names are renamed: %s", path, "; ".join(renamed[:8])
        )
    return model


def _plain_name(name: str) -> str:
    """Return a name that TensorFlow takes for a scope: letters, digits and ``_.-`` instead of blanks, accents and the like."""
    plain = re.sub(r"[^A-Za-z0-9_.>-]", "_", name)
    return plain if plain[:1].isalnum() or plain[:1] == "." else f"x{plain}"


def _use_plain_names(model: Any, prefix: str = "") -> list[str]:
    """Rename a model and its layers, nested ones too, where TensorFlow refuses the name; return ``OLD -> NEW`` of layers."""
    import keras

    renamed: list[str] = []
    if not isinstance(model, keras.Model):
        return renamed
    model.name = _plain_name(model.name)
    taken = {layer.name for layer in model.layers}
    for layer in model.layers:
        name = layer.name if re.fullmatch(r"[A-Za-z0-9_.>-]+", layer.name) else _plain_name(layer.name)
        while name != layer.name and name in taken:
            name += "_"
        if name != layer.name:
            renamed.append(f"{prefix}{layer.name} -> {name}")
            layer.name = name
        taken.add(name)
        if isinstance(layer, keras.Model):
            renamed += _use_plain_names(layer, f"{name}/")
    return renamed


def _check_file(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        config = _read_json(archive, "config.json")
        held = archive.getinfo("model.weights.h5").file_size
    check_memory(path, config, held)


def check_memory(path: Path, config: Any, held: int) -> None:
    """Refuse a model whose layers declare far more weights than the ``held`` bytes of its file, before memory is taken."""
    needed = _declared_bytes(config)
    if needed > max(_SMALL, _LARGEST_EXPANSION * held):
        raise ConfigurationError(
            f"{path}: its layers declare {needed} bytes of weights, but the file holds {held}. It is damaged, or made to fill "
            "the memory."
        )


def _declared_bytes(config: Any) -> int:
    """Build a model of variables that have a shape and no values, and add up their sizes as float32.

    Keras makes such variables in a ``StatelessScope``, and draws their values when the scope ends. Here it never ends:
    it belongs to a thread, and is dropped with it.
    """
    import keras

    found: list[int | Exception] = []

    def build() -> None:
        keras.StatelessScope().__enter__()
        try:
            with keras.saving.custom_object_scope(_uncompiled(config)):
                model = keras.saving.deserialize_keras_object(_without_training(config), safe_mode=True)
            found.append(sum(4 * math.prod(variable.shape) for variable in model.variables))
        except Exception as error:  # noqa: BLE001  layers raise errors of any type while they are made
            found.append(error)

    thread = threading.Thread(target=build, name="measure")
    thread.start()
    thread.join()
    (result,) = found
    if isinstance(result, Exception):
        raise result
    return result


def _without_training(config: Any) -> Any:
    """Leave out how models are trained, at every depth: an optimizer has a variable with a value, which the scope refuses."""
    if isinstance(config, list):
        return [_without_training(item) for item in config]
    if isinstance(config, dict):
        return {key: _without_training(value) for key, value in config.items() if key != "compile_config"}
    return config


def _uncompiled(config: Any) -> dict[str, type]:
    """Return by its name the class of a task of KerasHub, changed so that it does not give itself an optimizer."""
    import keras

    name = config.get("registered_name") if isinstance(config, Mapping) else None
    task = keras.saving.get_registered_object(name) if mentions_hub({"registered_name": name}) else None
    if not isinstance(task, type):
        return {}
    return {str(name): type(task.__name__, (task,), {"compile": lambda self, *args, **kwargs: None})}


def reason_of(error: BaseException) -> str:
    """Take the reason from an error of Keras, which may quote the whole configuration before it or nothing after it."""
    text = " ".join(str(error).split()) or type(error).__name__
    for sign in ("Exception encountered:", "Example error message for object"):
        if sign in text:
            text = text.rpartition(sign)[2].strip()
    return brief(text, 300).rstrip(".")
