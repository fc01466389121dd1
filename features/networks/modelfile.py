"""Keras model files: read the image size without Keras, and load the model in safe mode."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError

_LARGEST_CONFIG = 64 << 20  # bytes of JSON


def file_image_size(path: Path) -> tuple[int, int] | None:
    """Read height and width of a ``.keras`` file's input without Keras; None if it accepts any size.

    Raises
    ------
    ConfigurationError
        If the file is missing or is not a Keras model.
    """
    if not path.is_file():
        raise ConfigurationError(f"backbone: the model file {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("config.json").file_size
            config: Any = json.loads(archive.read("config.json")) if size <= _LARGEST_CONFIG else None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigurationError(
            f"{path} is not a Keras model file (a zip with config.json): {error}. Write one with model.save('NAME.keras')"
        ) from error
    try:
        inputs = [layer["config"] for layer in config["config"]["layers"] if layer["class_name"] == "InputLayer"]
        _, height, width, _ = inputs[0]["batch_shape"]
    except (KeyError, IndexError, TypeError, ValueError):
        return None  # no list of layers, or the input is not an image: load_model_file reports it
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


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
    import keras

    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be loaded in safe mode: {str(error).strip().splitlines()[0]} If the model contains Lambda "
            "layers or custom classes, save it again without them."
        ) from error
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ConfigurationError(f"{path}: expected a functional or Sequential model with an input, not a subclass")
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) != 1 or len(model.outputs) != 1 or len(shapes[0]) != 4 or shapes[0][3] != 3:
        raise ConfigurationError(
            f"{path}: expected one input (n, height, width, 3) and one output, received inputs {shapes} and "
            f"{len(model.outputs)} outputs"
        )
    fixed = shapes[0][1:3]
    if any(have not in (None, want) for have, want in zip(fixed, size, strict=True)):
        raise ConfigurationError(
            f"{path} takes images of {fixed[0]}x{fixed[1]} pixels, received {size[0]}x{size[1]}. Omit --image-size."
        )
    if None not in fixed:
        return model
    sized = keras.models.clone_model(model, input_tensors=keras.Input((*size, 3), name=model.inputs[0].name))
    sized.set_weights(model.get_weights())
    return sized
