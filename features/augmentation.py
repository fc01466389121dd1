"""The ranges from which the random views of an image are drawn, and named presets of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from features.errors import ConfigurationError, check_range, nearest

AUGMENT_VERSION = 1  # increased when the same numbers would give different pixels
FILLS = ("reflect", "nearest", "constant")
_LIMITS = {
    "rotation_degrees": (0.0, 180.0),
    "zoom": (0.0, 0.9),
    "shift": (0.0, 1.0),
    "brightness": (0.0, 1.0),
    "contrast": (0.0, 1.0),
    "saturation": (0.0, 1.0),
    "hue": (0.0, 0.5),
}
_PAIR_LIMITS = {"crop_scale": (0.01, 1.0), "crop_ratio": (0.1, 10.0)}


def _number(name: str, value: object, limits: tuple[float, float]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"augmentation: {name}: received {value!r}, expected a number")
    check_range(f"augmentation: {name}", value, *limits)
    return float(value)


def _pair(name: str, value: object, limits: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigurationError(f"augmentation: {name}: received {value!r}, expected two numbers")
    low, high = (_number(name, item, limits) for item in value)
    if low > high:
        raise ConfigurationError(f"augmentation: {name}: received {low} to {high}, expected the smaller number first")
    return low, high


@dataclasses.dataclass(frozen=True)
class AugmentSpec:
    """The ranges from which random views are drawn; the default is no augmentation. Part of the recipe.

    Every value is drawn uniformly unless stated otherwise.

    Parameters
    ----------
    horizontal_flip : bool
        Mirror a view left to right with probability 1/2.
    rotation_degrees : float
        Largest angle in either direction, 0-180 degrees (Keras' ``RandomRotation(f)`` is ``360 * f``).
    zoom : float
        The visible extent is scaled by a factor in [1 - zoom, 1 + zoom], drawn separately for width and height;
        0-0.9 (Keras' ``zoom_range``).
    shift : float
        Largest shift in either direction, as a fraction of width and height, 0-1 (Keras' ``width_shift_range`` and
        ``height_shift_range``).
    crop_scale : (float, float) or None
        Fraction of the image's area that a crop keeps, 0.01-1; None for no crop.
    crop_ratio : (float, float)
        Aspect ratio (width / height) of a crop relative to that of the target, 0.1-10; its logarithm is drawn
        uniformly (torchvision's ``RandomResizedCrop``, whose target is square).
    brightness, contrast, saturation : float
        x of a factor in [1 - x, 1 + x], 0-1. They are applied in this order, then the hue (torchvision's
        ``ColorJitter``).
    hue : float
        Largest rotation of the hue in either direction, 0-0.5 of a full circle.
    fill : {"reflect", "nearest", "constant"}
        How the area outside the image is filled: ``reflect`` mirrors the image at its edge
        (d c b a | a b c d | d c b a), ``nearest`` repeats the edge, ``constant`` is black.

    Raises
    ------
    ConfigurationError
        If a value has the wrong type or is out of range.

    Examples
    --------
    >>> from features import AugmentSpec
    >>> AugmentSpec.parse("flip-rotation").rotation_degrees
    36.0
    """

    horizontal_flip: bool = False
    rotation_degrees: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    fill: str = "reflect"

    def __post_init__(self) -> None:
        if not isinstance(self.horizontal_flip, bool):
            raise ConfigurationError(
                f"augmentation: horizontal_flip: received {self.horizontal_flip!r}, expected a bool"
            )
        # Stored as floats, so that 15 and 15.0 have the same fingerprint.
        for name, limits in _LIMITS.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), limits))
        for name, limits in _PAIR_LIMITS.items():
            if getattr(self, name) is not None or name == "crop_ratio":
                object.__setattr__(self, name, _pair(name, getattr(self, name), limits))
        if self.fill not in FILLS:
            raise ConfigurationError(
                f"augmentation: fill: received {self.fill!r}, expected one of {', '.join(FILLS)}"
                f"{nearest(str(self.fill), FILLS)}"
            )

    @property
    def name(self) -> str:
        """Name of the preset with these values, or ``"custom"``. Only the values decide the pixels."""
        return next((name for name, preset in PRESETS.items() if preset == self), "custom")

    @property
    def is_plain(self) -> bool:
        """Whether every view would equal the plain image."""
        return self == dataclasses.replace(AugmentSpec(), crop_ratio=self.crop_ratio, fill=self.fill)

    @classmethod
    def parse(cls, text: str) -> AugmentSpec:
        """Return the preset named ``text``.

        Raises
        ------
        ConfigurationError
            If there is no such preset; the message lists all and names the nearest.
        """
        if text not in PRESETS:
            raise ConfigurationError(
                f"augmentation: received {text!r}, expected one of {', '.join(PRESETS)}{nearest(text, PRESETS)}"
            )
        return PRESETS[text]

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON returns them, with the version of the algorithm."""
        values = dataclasses.asdict(self)
        lists = {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
        return {"version": AUGMENT_VERSION, **values, **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AugmentSpec:
        """Rebuild a specification from ``to_dict``.

        Raises
        ------
        ConfigurationError
            For another version, unknown or missing fields, or values out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigurationError(f"augmentation: received {type(values).__name__}, expected a mapping of fields")
        fields = dict(values)
        version = fields.pop("version", None)
        if version != AUGMENT_VERSION:
            raise ConfigurationError(
                f"augmentation: received version {version!r}, expected {AUGMENT_VERSION}; another release wrote it"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigurationError(f"augmentation has no field {name!r}{nearest(str(name), known)}")
        missing = [name for name in known if name not in fields]
        if missing:
            raise ConfigurationError(f"augmentation: these fields are missing: {', '.join(missing)}")
        return cls(**fields)


PRESETS: dict[str, AugmentSpec] = {
    "none": AugmentSpec(),
    "flip": AugmentSpec(horizontal_flip=True),
    "flip-rotation": AugmentSpec(horizontal_flip=True, rotation_degrees=36.0),
    "crop-flip": AugmentSpec(horizontal_flip=True, crop_scale=(0.08, 1.0)),
    "crop-rotation-jitter": AugmentSpec(
        horizontal_flip=True,
        rotation_degrees=15.0,
        crop_scale=(0.8, 1.0),
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        hue=0.05,
        fill="constant",
    ),
    "flip-zoom-shift-rotation": AugmentSpec(
        horizontal_flip=True, rotation_degrees=30.0, zoom=0.3, shift=0.3, fill="nearest"
    ),
}
