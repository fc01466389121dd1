"""What the files of KerasHub say, read without Keras: the class of a network, its size, its tokens, its preprocessing.

    config of a .keras file or preset --HubConfig.of()--> HubConfig
    image_converter.json, or the same inside preprocessor.json --read_converter()--> ImageInput

A converter of KerasHub resizes an image and computes ``pixel * scale + offset``. What has no exact counterpart here is
refused by its key. The files are untrusted: classes, sizes, types and numbers are checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, brief
from features.networks.imageinput import WAY, Fields, ImageInput
from features.recipe import LARGEST_SIDE, MOST_PREFIX

PACKAGE = "keras_hub"
# Tokens before those of the image, in the output of each class; others give no tokens, or their number is not known.
_PREFIX: dict[str, Callable[[Fields], int]] = {
    "CLIPVisionEncoder": lambda settings: 1,
    "DeiTBackbone": lambda settings: 2,  # class and distillation
    "DINOV2Backbone": lambda settings: 1 + settings.whole("num_register_tokens", 0, MOST_PREFIX - 1, 0),
    "DINOV3Backbone": lambda settings: 1 + settings.whole("num_register_tokens", 0, MOST_PREFIX - 1, 4),
    "SigLIPVisionEncoder": lambda settings: 0,
    "ViTBackbone": lambda settings: int(settings.flag("use_class_token", True)),
}
_ANY_SIZE = ("DINOV2Backbone", "DINOV3Backbone")  # they interpolate their positions
_RESIZE = {("bilinear", False): "keras", ("bilinear", True): "antialias", ("bicubic", True): "bicubic"}
_CONVERTER = (
    *("name", "trainable", "dtype", "image_size", "height", "width", "scale", "offset", "mean", "variance", "data_format"),
    *("crop_to_aspect_ratio", "pad_to_aspect_ratio", "interpolation", "antialias", "bounding_box_format"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """A network of KerasHub, as its configuration describes it.

    Parameters
    ----------
    path : Path
        The file that says so.
    name : str
        Class, such as ``ViTBackbone``.
    settings : Mapping
        Arguments of the class.
    converter : Mapping or None
        The image converter, if the file is that of a task, which has one.
    """

    path: Path
    name: str
    settings: Mapping[str, Any]
    converter: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, path: Path, config: Any) -> HubConfig | None:
        """Read a configuration; None if it is not that of a class of KerasHub. A task is read as its backbone."""
        if not isinstance(config, Mapping) or not isinstance(config.get("config"), Mapping):
            return None
        named = str(config.get("registered_name")), str(config.get("module"))
        if not (named[0].startswith(f"{PACKAGE}>") or named[1].partition(".")[0] == PACKAGE):
            return None
        settings = config["config"]
        if isinstance(settings.get("backbone"), Mapping):
            inner = cls.of(path, settings["backbone"])
            found = converter_of(settings.get("preprocessor"))
            return None if inner is None else dataclasses.replace(inner, converter=found)
        return cls(path, str(config.get("class_name"))[:80], settings)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its images in pixels; None if it accepts any size."""
        shape = self.settings.get("image_shape", self.settings.get("input_shape"))
        sides = shape[:2] if isinstance(shape, list) and len(shape) == 3 else []
        good = sides and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides)
        return (sides[0], sides[1]) if good else None

    @property
    def takes_any_size(self) -> bool:
        """Whether the same weights also serve a network for other images than those of ``size``."""
        return self.size is None or self.name in _ANY_SIZE

    @property
    def patch(self) -> int | None:
        """Side of a patch in pixels; None if it has no patches, or they are no squares."""
        side = self.settings.get("patch_size")
        side = side[0] if isinstance(side, list) and len(side) == 2 and side[0] == side[1] else side
        return side if type(side) is int and 1 <= side <= LARGEST_SIDE else None

    @property
    def prefix_tokens(self) -> int | None:
        """Tokens before those of the image; None if it gives none, or their number is not known."""
        count = _PREFIX.get(self.name)
        return None if count is None else count(Fields(self.path, self.settings))

    def image_input(self, path: Path, converter: Mapping[str, Any]) -> ImageInput:
        """Read an image converter from ``path`` for this network; see ``read_converter``."""
        return dataclasses.replace(read_converter(path, converter, self.size), patch=self.patch)


def converter_of(preprocessor: Any) -> Mapping[str, Any] | None:
    """Return the image converter in the configuration of a preprocessor; None if there is none."""
    settings = preprocessor.get("config") if isinstance(preprocessor, Mapping) else None
    found = settings.get("image_converter") if isinstance(settings, Mapping) else None
    return found if isinstance(found, Mapping) else None


def read_converter(path: Path, converter: Mapping[str, Any], size: tuple[int, int] | None) -> ImageInput:
    """Read an image converter of KerasHub.

    Parameters
    ----------
    path : Path
        The file that it was read from.
    converter : Mapping
        Its configuration: class and arguments.
    size : tuple of int or None
        Height and width that the network takes, for a converter that does not resize.

    Raises
    ------
    ConfigurationError
        If it does something that is not done here; the message names the key.
    """
    raw = converter.get("config")
    values = Fields(path, raw if isinstance(raw, Mapping) else {})
    name = brief(str(converter.get("class_name")), 60)
    for key in values:
        if key not in _CONVERTER:
            raise ConfigurationError(f"{path}: {name} has the key {brief(key, 60)!r}, which is not known here. {WAY}")
    if not isinstance(raw, Mapping) or "scale" not in raw:  # get_config of a plain converter always writes it
        raise ConfigurationError(f"{path}: {name} does not say 'scale'. {WAY}")
    if values.get("data_format", "channels_last") != "channels_last":
        raise values.error("data_format", "channels_last")
    shape = [values.get("height"), values.get("width")] if "height" in values else values.get("image_size", size)
    height, width = values.pair("image_size", [*shape] if isinstance(shape, (list, tuple)) else shape)
    if values.flag("pad_to_aspect_ratio"):  # it pads before it resizes, which mixes the border with black
        raise values.error("pad_to_aspect_ratio", "false")
    kind = values.choice("interpolation", ("bilinear", "bicubic"), "bilinear")
    resize = _RESIZE.get((kind, values.flag("antialias")))
    if resize is None:
        raise values.error("antialias", "true with the interpolation bicubic: there is none without it here")
    mean, std = _statistics(values)
    fit = "crop" if values.flag("crop_to_aspect_ratio", True) else "stretch"
    return ImageInput(height, width, resize, fit, 1.0, mean, std, "rgb", path)


def _statistics(values: Fields) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Turn ``pixel * scale + offset`` into the mean and standard deviation of ``(pixel - mean) / std``."""
    scale = _channels(values, "scale", 1.0, least=0.0)
    offset = _channels(values, "offset", 0.0)
    if "variance" in values or "mean" in values:  # of files of the first release
        variance = values.triple("variance", least=0.0)
        offset = tuple(-mean / v**0.5 for mean, v in zip(values.triple("mean"), variance, strict=True))
        scale = tuple(factor / v**0.5 for factor, v in zip(scale, variance, strict=True))
    mean = [-shift / factor for shift, factor in zip(offset, scale, strict=True)]
    std = [1 / factor for factor in scale]
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _channels(values: Fields, key: str, default: float, least: float = float("-inf")) -> tuple[float, ...]:
    if isinstance(values.get(key, default), list):
        return values.triple(key, least=least)
    return (values.number(key, default, least=least),) * 3


def check_classes(path: Path, config: Any) -> None:
    """Raise ``ConfigurationError`` if a configuration names a class that is neither of Keras nor of KerasHub."""
    rest = [config]
    while rest:
        item = rest.pop()
        if isinstance(item, list):
            rest.extend(item)
        elif isinstance(item, Mapping):
            rest.extend(item.values())
            name, module, registered = (item.get(key) for key in ("class_name", "module", "registered_name"))
            good = module is None or str(module).partition(".")[0] in ("keras", PACKAGE, "builtins")
            if not good or not (registered in (None, name) or str(registered).startswith(f"{PACKAGE}>")):
                shown = brief(f"{registered or name} of {module}", 120)
                raise ConfigurationError(
                    f"{path}: names the class {shown}, but only classes of Keras and KerasHub are made from such a file"
                )


def mentions_hub(config: Any) -> bool:
    """Whether a configuration names a class of KerasHub anywhere."""
    rest = [config]
    while rest:
        item = rest.pop()
        if isinstance(item, Mapping):
            if str(item.get("module")).partition(".")[0] == PACKAGE or str(item.get("registered_name")).startswith(
                f"{PACKAGE}>"
            ):
                return True
            rest.extend(item.values())
        elif isinstance(item, list):
            rest.extend(item)
    return False
