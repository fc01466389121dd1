"""A Keras model file as a backbone: what is known without Keras, and loading it in safe mode."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError

_LARGEST_CONFIG = 64 << 20  # bytes of JSON


def file_image_size(path: Path) -> tuple[int, int] | None:
    """Height and width that the input of a ``.keras`` file fixes, read without Keras; None if it takes any.

    Raises
    ------
    ConfigurationError
        If the file is missing or no Keras model.
    """
    if not path.is_file():
        raise ConfigurationError(f"backbone: the model file {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("config.json").file_size
            config: Any = json.loads(archive.read("config.json")) if size <= _LARGEST_CONFIG else None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigurationError(
            f"{path} is no Keras model file (a zip archive with config.json): {error}. Write one with model.save('NAME.keras')"
        ) from error
    try:
        inputs = [layer["config"] for layer in config["config"]["layers"] if layer["class_name"] == "InputLayer"]
        _, height, width, _ = inputs[0]["batch_shape"]
    except (KeyError, IndexError, TypeError, ValueError):
        return None  # no layer list, or an input that is no image: load_model_file says so
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def load_model_file(path: Path, size: tuple[int, int]) -> Any:
    """The model of a ``.keras`` file for images of one size; no code in the file is run, nothing is compiled.

    Parameters
    ----------
    path : Path
        Functional or Sequential, one input (n, height, width, 3), one output.
    size : tuple of int
        Height and width in pixels.

    Returns
    -------
    keras.Model
        With the weights of the file.

    Raises
    ------
    ConfigurationError
        If it cannot be loaded so, or takes other inputs.
    """
    import keras

    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be loaded in safe mode: {str(error).strip().splitlines()[0]} Models with Lambda layers or "
            "classes of your own must be saved again without them."
        ) from error
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ConfigurationError(f"{path}: expected a functional or Sequential model with an input, no subclassed one")
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) != 1 or len(model.outputs) != 1 or len(shapes[0]) != 4 or shapes[0][3] != 3:
        raise ConfigurationError(
            f"{path}: expected one input (n, height, width, 3) and one output, received inputs {shapes} and "
            f"{len(model.outputs)} outputs"
        )
    fixed = shapes[0][1:3]
    if any(have not in (None, want) for have, want in zip(fixed, size, strict=True)):
        raise ConfigurationError(f"{path} takes images of {fixed[0]}x{fixed[1]} pixels, received {size[0]}x{size[1]}")
    if None not in fixed:
        return model
    sized = keras.models.clone_model(model, input_tensors=keras.Input((*size, 3), name=model.inputs[0].name))
    sized.set_weights(model.get_weights())
    return sized
