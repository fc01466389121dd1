"""Find a network by its name or place: a row of the table, a ``.keras`` file, an ONNX file or its folder, a name on a hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from features.errors import ConfigurationError, nearest
from features.files import quoted
from features.networks.backbones import BACKBONES, MODEL_SUFFIX, Backbone
from features.networks.hub import PREFIX, hub_folder, is_hub_name, is_name
from features.networks.kerasfiles import find_model_file, find_preset
from features.networks.onnxfile import find_onnx

_EXPECTED = "the name of a network, a .keras or .onnx file, a folder with an ONNX file, preset:FOLDER, or hf:OWNER/NAME"
_OTHER_FILES = (
    ".h5",
    ".hdf5",
    ".pb",
    ".tflite",
    ".pt",
    ".pth",
    ".safetensors",
)  # that people take for a backbone


def find_backbone(name: str) -> Backbone:
    """Find a network by name or by the path of a model file.

    Parameters
    ----------
    name : str
        Key of ``BACKBONES``, where case, ``-`` and ``_`` do not matter; or the path of a ``.keras`` or ``.onnx`` file, or
        of a folder with an ONNX file and its description; ``preset:FOLDER``; or ``hf:OWNER/NAME@REVISION``.

    Raises
    ------
    ConfigurationError
        If the name is unknown (the message suggests the nearest ones), or the file is missing or not a model.

    Examples
    --------
    >>> find_backbone("MobileNet_V2").name, find_backbone("efficientnet-v2-b0").size
    ('mobilenetv2', 224)
    >>> find_backbone("mobilenetv2-0.35").options
    (('alpha', 0.35),)
    """
    for find in FINDERS:
        if (found := find(name)) is not None:
            return found
    if Path(name).suffix.lower() in _OTHER_FILES or Path(name).is_file():
        raise ConfigurationError(
            f"backbone: received the file {name!r}, expected {_EXPECTED}. If it holds the "
            f"weights of such a network, name the network: --backbone NAME --weights {quoted(name)}. If it is a whole model, load "
            "it with the library that wrote it, save it with Keras 3 as model.save('NAME.keras'), and give that file"
        )
    raise ConfigurationError(f"backbone: received {name!r}, expected {_EXPECTED}{_hint(name)}")


def _hint(name: str) -> str:
    """Return the end of a sentence that says what an unknown name may have meant."""
    if name.count("/") == 1 and is_name(PREFIX + name):
        return f"; there is no such folder, and a repository on a hub is called {PREFIX}{name}"
    sizes = [key for key in BACKBONES if "-0." not in key and "-1." not in key]
    return nearest(name, BACKBONES) or (
        f"; the known names are {', '.join(sizes)}, and of MobileNets narrower ones such as mobilenetv2-0.35. Others (DINOv2, "
        "CLIP, SigLIP, those of timm) come as ONNX files"
    )


def _table_row(name: str) -> Backbone | None:
    rows = [row for key, row in BACKBONES.items() if _plain(key) == _plain(name)]
    return BACKBONES.get(name) or (rows[0] if len(rows) == 1 else None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _on_hub(name: str) -> Backbone | None:
    """Fetch a network by its name on a hub, ``hf:OWNER/NAME@REVISION``, unless it is in the cache."""
    if not is_hub_name(name):
        return None
    folder = hub_folder(name)
    files = sorted(folder.path.glob(f"*{MODEL_SUFFIX}"))
    found = (
        find_onnx(str(folder.path))
        or find_preset(str(folder.path))
        or (find_model_file(str(files[0])) if files else None)
    )
    if found is None:
        raise ConfigurationError(
            f"backbone: {name} holds neither an ONNX file nor a preset of KerasHub nor one {MODEL_SUFFIX} file"
        )
    return dataclasses.replace(found, given=folder.name, hub_license=folder.license)


# Functions asked in this order for a network of a given name; each returns None if it knows none. To add a kind of
# network, write a subclass of ``Backbone`` and add a line here.
FINDERS: list[Callable[[str], Backbone | None]] = [_on_hub, find_model_file, find_preset, _table_row, find_onnx]
