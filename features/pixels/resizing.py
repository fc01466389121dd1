"""Resize decoded images to the size of a ``PixelRule``: Pillow's filters, and the one of ``keras``.

    image --window of the rule--> resized across --> resized down --> uint8 pixels

Where it could be built, ``_resize.c`` does what Pillow would do, with the same grey levels in a quarter of the time.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import numpy as np
from PIL import Image

from features.errors import UnreadableImageError
from features.pixels.limits import NO_MEMORY
from features.recipe import PixelRule

logger = logging.getLogger(__name__)

_MOST_RESIZED = 1 << 26  # pixels of a resized image of which crop:EDGE keeps the centre; more only by a strip
_STRIP = 8 << 20  # bytes that are handed over at a time: Pillow keeps images above 16 MiB in several blocks


def resize_image(image: Image.Image, rule: PixelRule) -> np.ndarray:
    """Resize a decoded image to the size of ``rule``, by its ``fit`` and ``resize``.

    Returns
    -------
    uint8, (rule.height, rule.width, 3), 0-255
        RGB, C-contiguous, possibly read-only.

    Raises
    ------
    UnreadableImageError
        With the reason ``no-memory``, if there is not enough of it.
    """
    try:
        return _resize(image, rule)
    except MemoryError as error:
        raise UnreadableImageError(NO_MEMORY, f"{image.width}x{image.height}: no memory to resize it") from error


def _resize(image: Image.Image, rule: PixelRule) -> np.ndarray:
    if rule.fit == "crop":
        left, top, width, height = crop_window(*image.size, rule)
        if (width, height) != image.size:
            image = image.crop((left, top, left + width, top + height))
    if rule.edge is not None:
        left, top, width, height = edge_window(*image.size, rule)
        if width * height > _MOST_RESIZED:
            raise UnreadableImageError(
                "too-large", f"{image.width}x{image.height}: {rule.fit} makes {width}x{height} pixels of it"
            )
        return _resample(image, width, height, rule, (left, top, left + rule.width, top + rule.height))
    if rule.fit != "pad":
        return _resample(image, rule.width, rule.height, rule)
    left, top, width, height = pad_window(*image.size, rule)
    pixels = np.zeros((rule.height, rule.width, 3), np.uint8)
    pixels[top : top + height, left : left + width] = _resample(image, width, height, rule)
    return pixels


def _resample(
    image: Image.Image, width: int, height: int, rule: PixelRule, part: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Resize an image to width x height pixels; return all of them or a part: left, top, right and bottom."""
    left, top, right, bottom = part or (0, 0, width, height)
    if rule.resize == "keras":
        return np.ascontiguousarray(_resample_keras(np.asarray(image), width, height)[top:bottom, left:right])
    wanted = (image, width, height, rule.resize == "bicubic", (left, top, right, bottom))
    if (module := extension()) is not None:
        try:
            return _by_extension(*wanted, module)
        except ValueError as error:  # Pillow keeps it in several blocks, as PILLOW_BLOCK_SIZE says
            logger.debug("Pillow resizes: %s", error)
    return _by_pillow(*wanted)


def _by_pillow(
    image: Image.Image, width: int, height: int, bicubic: bool, part: tuple[int, int, int, int]
) -> np.ndarray:
    # The width is resized first in every release of Pillow. From version 13 on, Pillow would choose the faster order,
    # which changes grey levels by one.
    left, top, right, bottom = part
    kind = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    across = image.resize((width, image.height), kind)
    if (left, right) != (0, width):  # a part resized by Pillow's own box would differ, as its corners are float32
        across = across.crop((left, 0, right, across.height))
    return np.asarray(across.resize((right - left, height), kind))[top:bottom]


def _by_extension(
    image: Image.Image, width: int, height: int, bicubic: bool, part: tuple[int, int, int, int], module: Any
) -> np.ndarray:
    """Return what ``_by_pillow`` does, computed by ``_resize.c`` from Pillow's own memory."""
    left, top, right, bottom = part
    lines = np.empty((image.height, right - left, 3), np.uint8)
    step = max(1, _STRIP // (4 * image.width))
    for row in range(0, image.height, step):
        end = min(row + step, image.height)
        strip = image if step >= image.height else image.crop((0, row, image.width, end))
        _, array = strip.__arrow_c_array__()
        module.across(array, image.width, width, left, bicubic, lines[row:end])
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    module.down(lines, height, top, bicubic, pixels)
    return pixels


@functools.cache
def extension() -> Any:
    """Return the module made of ``_resize.c``; None if it was not built, or does not give Pillow's grey levels here."""
    try:
        module = importlib.import_module("features.pixels._resize")
    except ImportError as error:
        logger.debug("Pillow resizes: %s", error)
        return None
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (47, 61, 3)).astype(np.uint8))
    for bicubic in (False, True):
        for size in ((23, 80), (90, 17)):
            whole = (noise, *size, bicubic, (0, 0, *size))
            try:
                same = np.array_equal(_by_extension(*whole, module), _by_pillow(*whole))
            except ValueError:
                same = False
            if not same:
                logger.warning("features/pixels/_resize.c does not give the grey levels of this Pillow; Pillow resizes")
                return None
    return module


def edge_window(width: int, height: int, rule: PixelRule) -> tuple[int, int, int, int]:
    """Return left and top of the part that ``crop:EDGE`` keeps, and width and height of the resized image it lies in.

    The arithmetic is that of torchvision's ``Resize(EDGE)`` (the longer edge is truncated) and ``CenterCrop`` (half of
    the margin, rounded half to even).

    Examples
    --------
    >>> edge_window(500, 340, PixelRule(224, 224, fit="crop:256"))
    (76, 16, 376, 256)
    """
    edge = int(rule.edge or 0)
    short, long = sorted((width, height))
    longer = edge * long // short
    inner_width, inner_height = (edge, longer) if width <= height else (longer, edge)
    return round((inner_width - rule.width) / 2), round((inner_height - rule.height) / 2), inner_width, inner_height


def crop_window(width: int, height: int, rule: PixelRule) -> tuple[int, int, int, int]:
    """Return left, top, width and height of the largest centred window with the aspect ratio of ``rule``.

    The arithmetic, including float32 and truncation, is that of Keras' ``crop_to_aspect_ratio=True``
    (``keras.utils.image_utils.smart_resize``).

    Examples
    --------
    >>> crop_window(500, 340, PixelRule(200, 200))
    (80, 0, 340, 340)
    """
    window_height = max(min(height, int(np.float32(width * rule.height) / np.float32(rule.width))), 1)
    window_width = max(min(width, int(np.float32(height * rule.width) / np.float32(rule.height))), 1)
    return (width - window_width) // 2, (height - window_height) // 2, window_width, window_height


def pad_window(width: int, height: int, rule: PixelRule) -> tuple[int, int, int, int]:
    """Return left, top, width and height, in the target, of the whole image scaled to fit; the rest is black.

    With ``resize="keras"`` the arithmetic is that of ``image_dataset_from_directory(...,
    pad_to_aspect_ratio=True)``, that is, of ``tf.image.resize_with_pad`` in float32. For some sizes (8 in
    100 at 224) its result is one pixel short of the target. Otherwise the arithmetic is exact.

    Examples
    --------
    >>> pad_window(500, 340, PixelRule(224, 224))
    (0, 36, 224, 152)
    """
    if rule.resize == "keras":
        sides, targets = np.array([[width, height], [rule.width, rule.height]], dtype=np.float32)
        fitted = sides / (sides / targets).max()
        left, top = (int(margin) for margin in np.maximum((targets - fitted) // 2, 0))
        inner_width, inner_height = (max(int(side), 1) for side in fitted)
        return left, top, inner_width, inner_height
    if width * rule.height >= height * rule.width:
        inner_width, inner_height = rule.width, max((2 * height * rule.width + width) // (2 * width), 1)
    else:
        inner_width, inner_height = max((2 * width * rule.height + height) // (2 * height), 1), rule.height
    return (rule.width - inner_width) // 2, (rule.height - inner_height) // 2, inner_width, inner_height


def _resample_keras(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize bilinearly at half-pixel centres without antialiasing, columns first, in float32, then round.

    The arithmetic is that of TensorFlow's ``ResizeBilinear`` kernel (``half_pixel_centers=True``). Only the two
    rows and two columns next to each target centre are read.
    """
    rows, row_weight = _taps(pixels.shape[0], height)
    columns, column_weight = _taps(pixels.shape[1], width)
    lines = pixels.take(rows.ravel(), axis=0)
    left, right = (lines.take(column, axis=1).astype(np.float32) for column in columns)
    right -= left
    right *= column_weight[:, None]
    right += left
    upper, lower = right[:height], right[height:]
    lower -= upper
    lower *= row_weight[:, None, None]
    lower += upper
    return np.asarray(np.rint(lower, out=lower), np.uint8)


def _taps(length: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two source positions next to each target centre, and their weights.

    Returns
    -------
    positions : int64, (2, target)
        Lower and upper neighbour, 0 to ``length - 1``.
    weight : float32, (target,), 0-1
        Share of the upper neighbour.
    """
    scale = np.float32(length) / np.float32(target)
    centres = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floors = np.floor(centres)
    positions = np.stack([np.maximum(floors, 0), np.minimum(np.ceil(centres), length - 1)]).astype(np.int64)
    return positions, centres - floors
