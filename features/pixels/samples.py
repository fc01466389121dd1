"""From the values of an image of any channels and type to 8-bit RGB, as the recipe says.

    Samples (h, w, c) --channels--> one or three planes --scale--> uint8 (h, w, 3)

Every step is element by element in float64, so every machine gives the same pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from features.errors import UnreadableImageError
from features.recipe import PixelRule, parse_channels, parse_scale

_ROWS = 256  # rows that are scaled at a time
Range = tuple[float, float]


class Samples(NamedTuple):
    """The values of an image as its file holds them.

    Parameters
    ----------
    kind : str
        Format of the file, for messages.
    values : integers or floating point, (h, w, c)
        The values.
    full : (float, float)
        The range of the file's type, which ``--scale dtype`` takes.
    shown : (float, float) or None
        Which values are black and white without ``--scale``; None if nothing says it.
    inverted : bool
        Whether the lowest value is white.
    orientation : int
        The EXIF orientation, 1-8; 1 is upright.
    """

    kind: str
    values: np.ndarray
    full: Range
    shown: Range | None
    inverted: bool = False
    orientation: int = 1

    @classmethod
    def of(cls, kind: str, values: np.ndarray, *, inverted: bool = False) -> Samples:
        """Describe an array, (h, w) or (h, w, c).

        Only masks, bytes and 16-bit numbers without a sign have a white of their own.
        """
        values, kind_of = values[..., None] if values.ndim == 2 else values, values.dtype.kind
        if kind_of in "bf":
            full = (0.0, 1.0)
        else:
            bounds = np.iinfo(values.dtype)
            full = (float(bounds.min), float(bounds.max))
        plain = kind_of == "b" or (kind_of == "u" and values.dtype.itemsize <= 2)
        return cls(kind, values, full, full if plain else None, inverted)


def to_rgb(samples: Samples, rule: PixelRule) -> np.ndarray:
    """Choose channels and scale them.

    Returns
    -------
    uint8, (h, w, 3), 0-255
        RGB.

    Raises
    ------
    UnreadableImageError
        With the reason ``unreadable``, if the file lacks a channel, or if a channel or a scale must be named; the message
        names the option.
    """
    planes = _planes(samples, rule.channels)
    ranges = [_range_of(samples, plane, rule.scale) for plane in planes]
    height, width = samples.values.shape[:2]
    result = np.empty((height, width, 3), np.uint8)
    for number, (plane, (low, high)) in enumerate(zip(planes, ranges, strict=True)):
        for top in range(0, height, _ROWS):
            band = _grey(plane[top : top + _ROWS], low, high, inverted=samples.inverted)
            if len(planes) == 1:
                result[top : top + _ROWS] = band[..., None]
            else:
                result[top : top + _ROWS, :, number] = band
    return result


def _planes(samples: Samples, channels: str) -> list[np.ndarray]:
    """Return the one or three planes, (h, w), that the recipe or else the file names."""
    count = samples.values.shape[2]
    if not channels:
        if count not in (1, 3):
            raise UnreadableImageError(
                "unreadable",
                f"{samples.kind}: {count} channels, expected 1 or 3. Choose three by number, such as --channels 3,2,1, or add "
                "--channels mean or --channels first",
            )
        return [samples.values[..., number] for number in range(count)]
    chosen = parse_channels(channels)
    if missing := [number + 1 for number in chosen if number >= count]:
        raise UnreadableImageError(
            "unreadable",
            f"{samples.kind}: no channel {missing[0]}, it has {count}. Choose others with --channels, counted from 1",
        )
    if chosen:
        return [samples.values[..., number] for number in chosen]
    total = samples.values[..., 0].astype(np.float64)
    for number in range(1, count):  # one after the other, so that the order of the sum is the same everywhere
        total += samples.values[..., number]
    return [total / count]


def _range_of(samples: Samples, plane: np.ndarray, scale: str) -> Range:
    """Return the values that become 0 and 255 in a plane."""
    if not scale:
        if samples.shown is None:
            raise UnreadableImageError(
                "unreadable",
                f"{samples.kind}: {samples.values.dtype} values, of which nothing says what is black and what white. Add --scale "
                "LOW:HIGH, such as --scale 0:4095, or --scale percentile:1,99, or --scale dtype",
            )
        return samples.shown
    kind, low, high = parse_scale(scale)
    if kind == "dtype":
        return samples.full
    if kind == "values":
        return low, high
    finite = plane[np.isfinite(plane)]
    if not finite.size:
        return 0.0, 0.0
    found = np.percentile(finite.astype(np.float64), [low, high])
    return float(found[0]), float(found[1])


def _grey(band: np.ndarray, low: float, high: float, *, inverted: bool) -> np.ndarray:
    """Scale values to uint8, halves up; where ``low`` and ``high`` are equal, what is above them is white. NaN is black."""
    values = band.astype(np.float64)
    if high > low:
        values = (np.clip(values, low, high) - low) * 255 / (high - low)
    else:
        values = np.where(values > low, 255.0, 0.0)
    if inverted:
        values = 255 - values
    return (np.where(np.isnan(values), 0, values) + 0.5).astype(np.uint8)
