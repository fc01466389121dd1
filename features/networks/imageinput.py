"""What a network wants to be given: the type of a description, and the checks of the untrusted JSON it is read from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, brief, nearest
from features.files import named, read_small
from features.recipe import LARGEST_SIDE

WAY = "Say it in a file of your own with --preprocess FILE.json."
Statistics = tuple[list[float], list[float]]  # mean and standard deviation of the channels
CLIP: Statistics = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET: Statistics = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF: Statistics = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_LARGEST = 16 << 20  # bytes; a config.json may name 21,843 classes
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """How the pixels of an image become the input of a network: decoded, resized, ``(pixel * scale - mean) / std``.

    Parameters
    ----------
    height, width : int
        Size of the input in pixels, 1-4096.
    resize : {"antialias", "bicubic", "keras"}
        Filter, as in ``features.recipe.PixelRule``; ``antialias`` is Pillow's bilinear filter.
    fit : str
        ``stretch``, ``crop``, ``pad``, or ``crop:EDGE``: the shorter edge is resized to EDGE pixels, and the centre of
        the image is cut out.
    scale : float
        Factor of the pixels, which are 0-255; often 1/255.
    mean, std : (float, float, float)
        Subtracted from, and divided by, per channel in the order of ``channels``; ``std`` is positive.
    channels : {"rgb", "bgr"}
        Order of the channels of the input.
    source : Path
        The file that says so.
    prefix_tokens : int or None
        Tokens before those of the image (class token, registers), 0-64; None if the files do not say.
    class_token : bool or None
        Whether the first of these tokens is a class token, and not a register; None if the files do not say.
    patch : int or None
        Side of the patches of which each becomes a token, in pixels; None if the files do not say or there are none.
    license : str or None
        Licence of the weights, as the file names it.
    """

    height: int
    width: int
    resize: str
    fit: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: str
    source: Path
    prefix_tokens: int | None = None
    class_token: bool | None = None
    patch: int | None = None
    license: str | None = None


def read_json(path: Path) -> Mapping[str, Any]:
    def no_number(word: str) -> float:
        raise ValueError(f"{word} is no number of JSON")

    try:
        with named(path):
            values = json.loads(read_small(path, _LARGEST), parse_constant=no_number)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"{path} cannot be read as JSON: {brief(str(reason), 200)}. {WAY}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: received {brief(repr(values), 80)}, expected an object of JSON. {WAY}")
    return values


class Fields:
    """The values of a JSON object, each checked when it is asked for; ``null`` counts as absent."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = {key: value for key, value in values.items() if value is not None}

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = _ABSENT) -> Any:
        found = self._values.get(key, default)
        if found is _ABSENT:
            raise ConfigurationError(f"{self.path} does not say {key!r}. {WAY}")
        return found

    def error(self, key: str, expected: str, way: str = WAY) -> ConfigurationError:
        received = brief(repr(self._values.get(key)), 120)
        return ConfigurationError(f"{self.path}: {key!r} is {received}, expected {expected}. {way}")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def number(self, key: str, default: Any = _ABSENT, least: float = -math.inf) -> float:
        value = self.get(key, default)
        if not _is_number(value) or not value > least:
            raise self.error(key, "a number" if least == -math.inf else f"a number above {least:g}")
        return float(value)

    def whole(self, key: str, low: int, high: int, default: Any = _ABSENT) -> int:
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"a whole number from {low} to {high}")
        return value

    def triple(self, key: str, default: Any = _ABSENT, least: float = -math.inf) -> tuple[float, float, float]:
        value = self.get(key, default)
        if not (isinstance(value, list) and len(value) == 3 and all(_is_number(x) and x > least for x in value)):
            raise self.error(key, "three numbers" + ("" if least == -math.inf else f" above {least:g}"))
        return float(value[0]), float(value[1]), float(value[2])

    def choice(self, key: str, known: tuple[str, ...], default: Any = _ABSENT) -> str:
        value = self.get(key, default)
        if value not in known:
            raise self.error(key, f"one of {', '.join(known)}{nearest(str(value)[:80], known)}")
        return str(value)

    def pair(self, key: str, value: Any) -> tuple[int, int]:
        """Check a size: a number for both sides, or height and width."""
        sides = value if isinstance(value, list) else [value, value]
        if len(sides) != 2 or not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides):
            raise self.error(key, f"height and width of 1 to {LARGEST_SIDE} pixels")
        return sides[0], sides[1]

    def inner(self, key: str) -> Fields:
        """Return an object in this one; an empty one if it is absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "an object of JSON")
        return Fields(self.path, value)

    def text(self, key: str) -> str | None:
        value = self.get(key, None)
        return brief(value, 100) if isinstance(value, str) and value.isprintable() else None


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def check_patches(path: Path, patch: int | None, size: tuple[int, int]) -> None:
    """Raise ``ConfigurationError`` unless images of this height and width are whole patches: the rest would be cut off."""
    if patch is not None and any(side % patch for side in size):
        height, width = (max(patch, round(side / patch) * patch) for side in size)
        raise ConfigurationError(
            f"image size: received {size[0]}x{size[1]}, but {path} divides images into patches of {patch}x{patch} pixels; use "
            f"--image-size {height if height == width else f'{height}x{width}'}"
        )


def crop_rule(values: Fields, edge: int, crop: tuple[int, int]) -> str:
    """Return the fit that resizes the shortest edge to ``edge`` pixels and keeps the centre, height x width pixels."""
    if not max(crop) <= edge <= LARGEST_SIDE:
        raise ConfigurationError(
            f"{values.path}: images whose shortest edge has {edge} pixels are cropped to {crop[0]}x{crop[1]}, expected an edge "
            f"of {max(crop)} to {LARGEST_SIDE}. {WAY}"
        )
    return f"crop:{edge}"
