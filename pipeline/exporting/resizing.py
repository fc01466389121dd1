"""The resize of ``features.pixels.resizing`` as a graph: uint8 images of any size in, exactly the same pixel values out.

It consists of ``keras.ops`` on symbolic tensors, so that a saved model needs no class of this project and every converter
accepts it:

    lengths -> window -> weights of each target pixel -> one matrix product along each axis, rounded in between

``antialias`` is Pillow's bilinear filter: triangle weights in 22-bit fixed point, values rounded between the two passes
(``precompute_coeffs`` and ``normalize_coeffs_8bpc`` in https://github.com/python-pillow/Pillow, Resample.c).
Integers up to 2^31 and float32 sums below 2^24 are exact in every runtime, so the values are equal, not just close.
``bicubic`` is Pillow's too. Its weights are exact in float64; in float32, which all runtimes have, about one value in 10,000
may differ by one.
``keras`` is computed in integers too, but ``features.pixels.resizing`` follows TensorFlow's float32. Where the exact value lies
half-way between two integers, its rounding may differ from ours by one (0.1 % of the values, at some sizes 3 %).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from features.errors import ConfigurationError
from features.recipe import PixelRule

# Pillow's weights have 22 bits and pixels 8, more than a float32 sum can hold: a weight is split into 11 and 11 bits.
_HALF_BITS = 11
_HALF = 1 << _HALF_BITS
# Digits of the long division that gives a weight: int32 holds a remainder times 2^8 while remainders stay below 2^23.
_DIGITS = (8, 7, 7)


class Axis(NamedTuple):
    """How one axis is resized. The numbers are Python integers or symbolic tensors.

    Parameters
    ----------
    positions : int32, (length of the image,)
        0, 1, 2, ...
    first, length : int
        First pixel and length of the window that is taken from the image.
    size : int
        Length of the result, in pixels.
    start, inner : int
        First pixel and length of the resized window within the result; the rest is black.
    """

    positions: Any
    first: Any
    length: Any
    size: int
    start: Any
    inner: Any

    @property
    def padded(self) -> bool:
        """Whether the resized window is surrounded by black pixels."""
        return not isinstance(self.start, int)


def longest_side(size: int) -> int:
    """Longest side of an image for which int32 can hold the weights, for a target of ``size`` pixels.

    Examples
    --------
    >>> longest_side(224), longest_side(32)
    (30651, 11585)
    """
    # Weights sum to about 2 x length x length / size, which must stay below 2^23.
    return int((size << 22) ** 0.5)


def resized(images: Any, rule: PixelRule, precision: str = "float32") -> Any:
    """Resize images by ``rule`` within a graph.

    Parameters
    ----------
    images : uint8, symbolic, (n, h, w, 3), 0-255
        RGB pixels; n, h and w are unknown.
    rule : PixelRule
        The pixel rule; its ``decode`` does not matter, as the images are decoded already.
    precision : {"float32", "float64"}
        In which the weights of ``bicubic`` are computed.

    Returns
    -------
    float32, symbolic, (n, rule.height, rule.width, 3)
        Integers 0-255, equal to those of ``features.pixels.resizing.resize_image``.
    """
    across, down = _axes(_positions(images[0, 0, :, 0]), _positions(images[0, :, 0, 0]), rule)
    if rule.resize == "keras":
        return _two_neighbours(images, across, down)
    cubic = functools.partial(_cubic, precision=precision)
    return _antialiased(images, across, down, cubic if rule.resize == "bicubic" else _triangular)


def check_rule(rule: PixelRule) -> None:
    """Raise ``ConfigurationError`` for a rule that different runtimes would compute differently."""
    if (rule.resize, rule.fit) == ("keras", "pad"):
        raise ConfigurationError(
            "pixels of --resize keras --fit pad cannot be exported: the window that Keras computes depends on float32 "
            "rounding, in which runtimes differ. Supported: antialias with stretch, crop or pad; keras with stretch or crop"
        )
    if rule.resize == "keras" and rule.edge is not None:
        raise ConfigurationError(
            f"pixels of --resize keras --fit {rule.fit} cannot be exported. Supported: antialias or bicubic with {rule.fit}; "
            "keras with stretch or crop"
        )
    if rule.resize == "keras" and 4 * 255 * rule.width * rule.height >= 1 << 31:
        raise ConfigurationError(
            f"pixels of --resize keras can be exported up to 1450x1450, received {rule.height}x{rule.width}; "
            "antialias has no such limit"
        )


def _positions(line: Any) -> Any:
    """Number the pixels of a line 0, 1, 2, ...; this is computed, because a symbolic shape holds no numbers."""
    from keras import ops

    return ops.cumsum(ops.ones_like(line, dtype="int32")) - 1


# -------------------------------------------------------------------------------------------------- windows
def _axes(xs: Any, ys: Any, rule: PixelRule) -> tuple[Axis, Axis]:
    """Describe both axes, with the windows of ``features.pixels.resizing.crop_window`` and ``pad_window``."""
    from keras import ops

    width, height = ops.max(xs) + 1, ops.max(ys) + 1
    left = top = 0
    inside = (0, 0, rule.width, rule.height)
    if rule.fit == "crop":
        # Keras divides in float32, which below 2^24 gives the same whole numbers.
        window_width = _at_least_one(ops.minimum(width, height * rule.width // rule.height))
        window_height = _at_least_one(ops.minimum(height, width * rule.height // rule.width))
        left, top = (width - window_width) // 2, (height - window_height) // 2
        width, height = window_width, window_height
    elif rule.fit == "pad":
        inside = _padded(width, height, rule)
    elif rule.edge is not None:
        inside = _centred(width, height, rule)
    start_x, start_y, inner_width, inner_height = inside
    return (
        Axis(xs, left, width, rule.width, start_x, inner_width),
        Axis(ys, top, height, rule.height, start_y, inner_height),
    )


def _padded(width: Any, height: Any, rule: PixelRule) -> tuple[Any, Any, Any, Any]:
    from keras import ops

    wide = width * rule.height >= height * rule.width
    flat = _at_least_one((2 * height * rule.width + width) // (2 * width))
    narrow = _at_least_one((2 * width * rule.height + height) // (2 * height))
    inner_width, inner_height = ops.where(wide, rule.width, narrow), ops.where(wide, flat, rule.height)
    return (rule.width - inner_width) // 2, (rule.height - inner_height) // 2, inner_width, inner_height


def _centred(width: Any, height: Any, rule: PixelRule) -> tuple[Any, Any, Any, Any]:
    """Return where the resized image begins within the part that is kept, which is before it, and its width and height."""
    from keras import ops

    edge, narrow = int(rule.edge or 0), width <= height
    inner_width = ops.where(narrow, edge, edge * width // height)
    inner_height = ops.where(narrow, edge * height // width, edge)
    margins = inner_width - rule.width, inner_height - rule.height
    # Half of the margin, rounded half to even.
    left, top = ((margin + (margin // 2) % 2) // 2 for margin in margins)
    return -left, -top, inner_width, inner_height


def _at_least_one(number: Any) -> Any:
    from keras import ops

    return ops.maximum(number, 1)


# -------------------------------------------------------------------------------------------------- antialias
def _antialiased(images: Any, across: Axis, down: Axis, weights: Callable[[Axis], Any]) -> Any:
    """Resize along the width and then along the height, as Pillow does."""
    from keras import ops

    planes = ops.transpose(ops.cast(images, "float32"), (0, 3, 1, 2))
    columns, rows = (_halves(weights(axis)) for axis in (across, down))
    return ops.transpose(_along_height(_along_width(planes, columns), rows), (0, 2, 3, 1))


def _along_width(planes: Any, weights: Any) -> Any:
    from keras import ops

    sums = ops.matmul(planes, ops.transpose(weights))
    return _pixel_values(*ops.split(sums, 2, axis=-1))


def _along_height(planes: Any, weights: Any) -> Any:
    from keras import ops

    sums = ops.matmul(weights, planes)
    return _pixel_values(*ops.split(sums, 2, axis=-2))


def _halves(fixed: Any) -> Any:
    """Split weights in units of 2^-22 into upper halves, then lower halves, so that float32 holds their sums.

    Returns
    -------
    float32, symbolic, (2 x size, length of the image), whole numbers below 2^11 (2^11 for a whole upper half)
    """
    from keras import ops

    upper = fixed // _HALF
    return ops.cast(ops.concatenate([upper, fixed - upper * _HALF], axis=0), "float32")


def _distances(axis: Axis) -> tuple[Any, Any, Any]:
    """Return how far each pixel is from each target pixel, the filter's unit of length, and what belongs to the image.

    Both lengths are in 1 / (2 x inner) of an image pixel. The weights are zero where a pixel does not belong.
    """
    from keras import ops

    x = ops.expand_dims(axis.positions - axis.first, 0)
    j = ops.expand_dims(_targets(axis), 1) if axis.padded else _targets(axis)[:, None]
    distance = ops.abs((2 * x + 1) * axis.inner - axis.length * (2 * j + 1))
    inside = _within(x, axis.length)
    if axis.padded:
        inside = ops.logical_and(inside, _within(j, axis.inner))
    return distance, 2 * ops.maximum(axis.length, axis.inner), inside


def _triangular(axis: Axis) -> Any:
    """Compute the weight of every pixel for every target pixel, in units of 2^-22: int32, (size, length of the image)."""
    from keras import ops

    distance, reach, inside = _distances(axis)
    triangle = ops.where(inside, ops.maximum(reach - distance, 0), 0)
    total = _at_least_one(ops.sum(triangle, axis=1, keepdims=True))
    # Long division: triangle / total x 2^22, rounded half up.
    fixed, rest = 0, triangle
    for bits in _DIGITS:
        rest = rest * (1 << bits)
        digit = rest // total
        fixed, rest = fixed * (1 << bits) + digit, rest - digit * total
    return fixed + ops.cast(2 * rest >= total, "int32")


def _cubic(axis: Axis, precision: str) -> Any:
    """Like ``_triangular``, for the cubic filter of Keys with a = -0.5, as in Pillow; some weights are negative."""
    from keras import ops

    distance, reach, inside = _distances(axis)
    t = ops.cast(distance, precision) / ops.cast(reach, precision)
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    zero = ops.zeros_like(t)  # a plain 0.0 would be float32
    values = ops.where(inside, ops.where(t < 1, near, ops.where(t < 2, far, zero)), zero)
    total = ops.sum(values, axis=1, keepdims=True)
    total = ops.where(ops.abs(total) > 0.25, total, ops.ones_like(total))  # 0 beside a padded image
    return ops.cast(ops.floor(values / total * float(1 << 2 * _HALF_BITS) + 0.5), "int32")


def _targets(axis: Axis) -> Any:
    from keras import ops

    targets = np.arange(axis.size, dtype=np.int32)
    return ops.subtract(targets, axis.start) if axis.padded else targets


def _within(numbers: Any, end: Any) -> Any:
    from keras import ops

    return ops.logical_and(ops.greater_equal(numbers, 0), ops.less(numbers, end))


def _pixel_values(upper: Any, lower: Any) -> Any:
    """Combine the sums over both halves of the weights into integers, rounded half up."""
    from keras import ops

    carried = ops.floor((lower + 2.0 ** (2 * _HALF_BITS - 1)) * (1.0 / _HALF))
    return ops.clip(ops.floor((upper + carried) * (1.0 / _HALF)), 0.0, 255.0)


# -------------------------------------------------------------------------------------------------- keras
def _two_neighbours(images: Any, across: Axis, down: Axis) -> Any:
    """Interpolate linearly between the two nearest pixels of each axis, in integers, rounded half to even at the end."""
    from keras import ops

    above, below, share_y = _neighbours(down)
    first, second, share_x = _neighbours(across)
    lines = ops.take(images, ops.concatenate([above, below], axis=0), axis=1)
    left, right = (ops.cast(ops.take(lines, columns, axis=2), "int32") for columns in (first, second))
    share_x = ops.reshape(share_x, (1, 1, -1, 1))
    upper, lower = ops.split(left * (2 * across.size - share_x) + right * share_x, 2, axis=1)
    share_y = ops.reshape(share_y, (1, -1, 1, 1))
    sums = upper * (2 * down.size - share_y) + lower * share_y
    whole = 4 * across.size * down.size
    levels = sums // whole
    rest = 2 * (sums - levels * whole)
    odd = ops.equal(levels - levels // 2 * 2, 1)
    up = ops.logical_or(ops.greater(rest, whole), ops.logical_and(ops.equal(rest, whole), odd))
    return ops.cast(levels, "float32") + ops.cast(up, "float32")


def _neighbours(axis: Axis) -> tuple[Any, Any, Any]:
    """Find both neighbours of each target centre, and the share of the second one in units of 1 / (2 x size)."""
    from keras import ops

    unit = 2 * axis.size
    centres = ops.maximum(axis.length * (2 * np.arange(axis.size, dtype=np.int32) + 1) - axis.size, 0)
    lower = centres // unit
    share = centres - lower * unit
    upper = ops.minimum(lower + 1, axis.length - 1)
    return axis.first + lower, axis.first + upper, share
