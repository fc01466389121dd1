"""Deterministic augmentation: view 0 is the plain image, view k a random variation that is always the same.

    (seed, content hash, k) --draw_view()--> ViewParameters --render_views()--> uint8 pixels
    bytes --decode_views()--> uint8 pixels of all requested views

The parameters of a view depend only on the seed, the image's sha256 and k: not on the order of the images, nor on
batch, shard, thread, process or the other views. Pixels are computed with integers, element-wise IEEE arithmetic and
Pillow's fixed-point resize only. Floating-point numbers are never summed, because the order would differ between
processors.

A view is resampled as few times as possible. A crop is cut from the whole decoded image and resized once, by the
recipe's own rule, so a small window keeps its detail. Zoom, shift and rotation are one affine map of the resized
image, as in Keras; a flip needs no resampling. (Combining the map with the resize would lose the antialiasing.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from features.augmentation import AugmentSpec
from features.pixels.decode import decode_image, decoding
from features.pixels.resizing import resize_image
from features.recipe import PixelRule

CROP_ATTEMPTS = 10  # as in torchvision
_BAND = 32  # rows computed at a time, so that the intermediate arrays stay in the processor's cache
_GREY = (np.float32(0.299), np.float32(0.587), np.float32(0.114))  # ITU-R BT.601, as in Pillow's "L"
_FINE = 2.0**24  # sine and cosine are rounded to 1 / _FINE, because mathematical libraries differ in the last bit

Resize = Callable[[Image.Image, PixelRule], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ViewParameters:
    """The changes that turn an image into one view, applied in this order; the defaults change nothing.

    Parameters
    ----------
    crop : (int, int, int, int) or None
        Left, top, width and height of a window, in pixels of the decoded image.
    flip : bool
        Mirror left and right.
    angle : float
        Rotation about the centre, counter-clockwise, in degrees.
    zoom : (float, float)
        Factors of the visible width and height; 1.3 shows more of the image, and everything smaller, as in Keras.
    shift : (float, float)
        Shift to the right and down, as fractions of width and height, before the rotation.
    brightness, contrast, saturation : float
        Factors; 1 changes nothing.
    hue : float
        Rotation of the hue in full circles; 0 changes nothing.
    """

    crop: tuple[int, int, int, int] | None = None
    flip: bool = False
    angle: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def draw_view(
    spec: AugmentSpec, *, seed: int, sha256: bytes, view: int, width: int, height: int, aspect: float = 1.0
) -> ViewParameters:
    """Draw the parameters of one view; the same arguments always give the same result.

    Each parameter has a fixed place in the stream of random numbers, so changing one range does not affect the others.

    Parameters
    ----------
    spec : AugmentSpec
        Ranges of the parameters.
    seed : int
        The recipe's seed.
    sha256 : bytes
        Hash of the image file, 32 bytes.
    view : int
        Number of the view; 0 is the plain image.
    width, height : int
        Size of the decoded image in pixels; a crop is drawn from it.
    aspect : float
        Width / height of the target.
    """
    if view < 0 or len(sha256) != 32:
        raise ValueError(f"received view {view} and a hash of {len(sha256)} bytes, expected 0 or more, and 32 bytes")
    if view == 0:
        return ViewParameters()
    key = hashlib.sha256(f"view:{seed}:{sha256.hex()}:{view}".encode("ascii")).digest()[:16]
    # The raw stream is used, because NumPy promises stability only for bit generators, not for distributions (NEP 19).
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(12 + 2 * CROP_ATTEMPTS)
    unit = [int(value >> 11) / 2**53 for value in raw.tolist()]  # [0, 1)
    centred = [2 * value - 1 for value in unit]
    return ViewParameters(
        crop=_draw_crop(spec, unit[10:], width, height, aspect),
        flip=spec.horizontal_flip and unit[0] < 0.5,
        angle=spec.rotation_degrees * centred[1],
        zoom=(1 + spec.zoom * centred[2], 1 + spec.zoom * centred[3]),
        shift=(spec.shift * centred[4], spec.shift * centred[5]),
        brightness=1 + spec.brightness * centred[6],
        contrast=1 + spec.contrast * centred[7],
        saturation=1 + spec.saturation * centred[8],
        hue=spec.hue * centred[9],
    )


def _draw_crop(
    spec: AugmentSpec, unit: Sequence[float], width: int, height: int, aspect: float
) -> tuple[int, int, int, int] | None:
    """Draw a window like torchvision's ``RandomResizedCrop.get_params``: ten tries, else the largest centred window."""
    if spec.crop_scale is None:
        return None
    low, high = (ratio * aspect for ratio in spec.crop_ratio)
    smallest, largest = spec.crop_scale
    across, down, *tries = unit
    for share, slant in zip(tries[::2], tries[1::2], strict=True):
        area = width * height * (smallest + (largest - smallest) * share)
        ratio = math.exp(math.log(low) + (math.log(high) - math.log(low)) * slant)
        inner_width, inner_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < inner_width <= width and 0 < inner_height <= height:
            left, top = int(across * (width - inner_width + 1)), int(down * (height - inner_height + 1))
            return left, top, inner_width, inner_height
    inner_width = min(width, max(1, round(height * high)))
    inner_height = min(height, max(1, round(width / low)))
    return (width - inner_width) // 2, (height - inner_height) // 2, inner_width, inner_height


class DecodedViews(NamedTuple):
    """Views of one image, ready for a batch.

    Parameters
    ----------
    pixels : uint8, (views, rule.height, rule.width, 3), 0-255
        RGB, possibly read-only.
    width, height : int
        Size of the image in the file after its orientation was applied, in pixels.
    """

    pixels: np.ndarray
    width: int
    height: int


def decode_views(
    data: bytes, rule: PixelRule, spec: AugmentSpec | None, *, seed: int, sha256: bytes, views: Sequence[int]
) -> DecodedViews:
    """Decode an image file once, and render views of it. View 0 is what ``decode_image`` returns.

    With ``decode="fast"`` all views are made from the shrunk image, unless ``spec`` crops. The smallest crop needs
    every pixel, so the image is then decoded in full for the other views, and once more, shrunk, for view 0.

    Parameters
    ----------
    data : bytes
        A whole image file.
    rule : PixelRule
        Decoding and resizing.
    spec : AugmentSpec or None
        Ranges of the parameters; None for no augmentation.
    seed : int
        The recipe's seed.
    sha256 : bytes
        Hash of ``data``, 32 bytes.
    views : sequence of int
        Numbers of the requested views, in any order.

    Raises
    ------
    UnreadableImageError
        As ``decode_image``.
    """
    if all(view == 0 for view in views):
        plain = decode_image(data, rule)
        return DecodedViews(np.broadcast_to(plain.pixels, (len(views), *plain.pixels.shape)), plain.width, plain.height)
    spec = spec or AugmentSpec()
    shrunk_apart = spec.crop_scale is not None and rule.decode == "fast"
    with decoding(data, dataclasses.replace(rule, decode="full") if shrunk_apart else rule) as upright:
        pixels = render_views(upright.image, rule, spec, seed=seed, sha256=sha256, views=views, resize=resize_image)
    if shrunk_apart and 0 in views:
        pixels[[view == 0 for view in views]] = decode_image(data, rule).pixels
    return DecodedViews(pixels, upright.width, upright.height)


def render_views(
    image: Image.Image,
    rule: PixelRule,
    spec: AugmentSpec,
    *,
    seed: int,
    sha256: bytes,
    views: Sequence[int],
    resize: Resize,
) -> np.ndarray:
    """Render views of one decoded image; if no view crops, it is also resized only once.

    Parameters
    ----------
    image : PIL.Image.Image
        Decoded, upright, RGB, at its own size.
    rule : PixelRule
        Size and resampling. A crop fills the whole target: it replaces the rule's ``fit``.
    spec : AugmentSpec
        Ranges of the parameters.
    seed : int
        The recipe's seed.
    sha256 : bytes
        Hash of the image file, 32 bytes.
    views : sequence of int
        Numbers of the requested views, in any order.
    resize : callable
        ``(image, rule) -> uint8, (rule.height, rule.width, 3)``, such as ``features.pixels.resizing.resize_image``.

    Returns
    -------
    uint8, (len(views), rule.height, rule.width, 3), 0-255
        RGB.
    """
    result = np.empty((len(views), rule.height, rule.width, 3), np.uint8)
    plain: np.ndarray | None = None
    for position, view in enumerate(views):
        parameters = draw_view(
            spec,
            seed=seed,
            sha256=sha256,
            view=view,
            width=image.width,
            height=image.height,
            aspect=rule.width / rule.height,
        )
        if parameters.crop is not None:
            left, top, width, height = parameters.crop
            window = image.crop((left, top, left + width, top + height))
            pixels = resize(window, dataclasses.replace(rule, fit="stretch"))
        else:
            pixels = plain = resize(image, rule) if plain is None else plain
        result[position] = apply_view(pixels, parameters, fill=spec.fill)
    return result


def apply_view(pixels: np.ndarray, parameters: ViewParameters, *, fill: str) -> np.ndarray:
    """Apply flip, geometry and colour to an image of the target's size; the crop is not applied here.

    Parameters
    ----------
    pixels : uint8, (h, w, 3), 0-255
        RGB; not changed.
    parameters : ViewParameters
        The changes. The default returns ``pixels`` unchanged.
    fill : {"reflect", "nearest", "constant"}
        How the area outside the image is filled.

    Returns
    -------
    uint8, (h, w, 3), 0-255
        Interpolated bilinearly, rounded to the nearest level (halves up).
    """
    if parameters.flip:
        pixels = pixels[:, ::-1]
    if (parameters.angle, parameters.zoom, parameters.shift) != (0.0, (1.0, 1.0), (0.0, 0.0)):
        pixels = _warp(pixels, *_source_map(parameters, *pixels.shape[:2]), fill)
    colour = (parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue)
    return pixels if colour == (1.0, 1.0, 1.0, 0.0) else _jitter(pixels, parameters)


def _source_map(parameters: ViewParameters, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the affine map from target to source positions in pixels: (2, 2) matrix and (2,) offset, x before y.

    source - centre = rotation (zoom (target - centre) - shift), as in Keras' ``apply_affine_transform``.
    """
    angle = math.radians(parameters.angle)
    cosine, sine = (round(value * _FINE) / _FINE for value in (math.cos(angle), math.sin(angle)))
    (zoom_x, zoom_y), centre_x, centre_y = parameters.zoom, (width - 1) / 2, (height - 1) / 2
    shift_x, shift_y = parameters.shift[0] * width, parameters.shift[1] * height
    matrix = np.array([[cosine * zoom_x, -sine * zoom_y], [sine * zoom_x, cosine * zoom_y]])
    offset = np.array(
        [
            centre_x - matrix[0, 0] * centre_x - matrix[0, 1] * centre_y - cosine * shift_x + sine * shift_y,
            centre_y - matrix[1, 0] * centre_x - matrix[1, 1] * centre_y - sine * shift_x - cosine * shift_y,
        ]
    )
    return matrix, offset


def _warp(pixels: np.ndarray, matrix: np.ndarray, offset: np.ndarray, fill: str) -> np.ndarray:
    """Interpolate bilinearly at ``matrix @ (x, y) + offset``.

    Pillow's ``transform`` is not used: it truncates, which darkens by half a level, and can only fill with a colour.
    """
    height, width = pixels.shape[:2]
    corners = np.array([[0, width - 1, 0, width - 1], [0, 0, height - 1, height - 1]])
    reach = matrix[:, :1] * corners[0] + matrix[:, 1:] * corners[1] + offset[:, None]
    # Extend the image as far as the map reaches, so that no position needs the fill rule afterwards.
    first, last = np.floor(reach.min(axis=1)).astype(int) - 1, np.floor(reach.max(axis=1)).astype(int) + 2
    extended = _extend(pixels, (first[1], last[1]), (first[0], last[0]), fill)
    line = extended.shape[1]
    planes = [extended[..., channel].astype(np.float32).ravel() for channel in range(3)]
    across = np.arange(width)
    columns = matrix[0, 0] * across + (offset[0] - first[0])
    rows = matrix[1, 0] * across + (offset[1] - first[1])
    result = np.empty((height, width, 3), np.uint8)
    for start in range(0, height, _BAND):
        down = np.arange(start, min(start + _BAND, height))[:, None]
        x, y = columns + matrix[0, 1] * down, rows + matrix[1, 1] * down
        left, top = np.floor(x), np.floor(y)
        right_share, lower_share = (x - left).astype(np.float32), (y - top).astype(np.float32)
        here = (top * line + left).astype(np.int64)
        for channel, plane in enumerate(planes):
            upper = _between(plane.take(here), plane.take(here + 1), right_share)
            lower = _between(plane.take(here + line), plane.take(here + line + 1), right_share)
            result[start : start + _BAND, :, channel] = _between(upper, lower, lower_share) + np.float32(0.5)
    return result


def _between(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Interpolate linearly between two temporary arrays, which are overwritten."""
    second -= first
    second *= share
    second += first
    return second


def _extend(pixels: np.ndarray, rows: tuple[int, int], columns: tuple[int, int], fill: str) -> np.ndarray:
    """Return rows and columns from the first to the last number, both included, of the image extended by ``fill``."""
    if fill == "constant":  # add a black border, which is then repeated
        pixels = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
        rows, columns = (rows[0] + 1, rows[1] + 1), (columns[0] + 1, columns[1] + 1)
    for axis, (first, last) in enumerate((rows, columns)):
        positions, length = np.arange(first, last + 1), pixels.shape[axis]
        if fill == "reflect":
            positions %= 2 * length
            positions = np.minimum(positions, 2 * length - 1 - positions)
        pixels = pixels.take(np.clip(positions, 0, length - 1), axis=axis)
    return pixels


def _jitter(pixels: np.ndarray, parameters: ViewParameters) -> np.ndarray:
    """Change brightness, contrast, saturation, hue in this order (torchvision shuffles it); clip to 0-255 each time."""
    result = np.empty(pixels.shape, np.uint8)
    bands = [slice(start, start + _BAND) for start in range(0, len(pixels), _BAND)]
    mean = np.float32(0)
    if parameters.contrast != 1:
        grey = (_grey(_brightened(pixels[band], parameters)) + np.float32(0.5) for band in bands)
        # The sum of integers does not depend on their order.
        total = sum(int(levels.astype(np.uint8).sum(dtype=np.int64)) for levels in grey)
        mean = np.float32(total / (pixels.shape[0] * pixels.shape[1]))
    for band in bands:
        planes = _brightened(pixels[band], parameters)
        if parameters.contrast != 1:
            planes = [_blend(plane, mean, parameters.contrast) for plane in planes]
        if parameters.saturation != 1:
            grey_band = _grey(planes)
            planes = [_blend(plane, grey_band, parameters.saturation) for plane in planes]
        if parameters.hue != 0:
            planes = _turn_hue(planes, parameters.hue)
        for channel, plane in enumerate(planes):
            result[band, :, channel] = plane + np.float32(0.5)
    return result


def _brightened(pixels: np.ndarray, parameters: ViewParameters) -> list[np.ndarray]:
    planes = [pixels[..., channel].astype(np.float32) for channel in range(3)]
    return [_blend(plane, np.float32(0), parameters.brightness) for plane in planes]


def _blend(plane: np.ndarray, other: np.ndarray | np.float32, factor: float) -> np.ndarray:
    """Blend ``factor`` of a plane with ``1 - factor`` of another (a factor above 1 extrapolates); clip to 0-255."""
    return np.clip((plane - other) * np.float32(factor) + other, np.float32(0), np.float32(255))


def _grey(planes: Sequence[np.ndarray]) -> np.ndarray:
    red, green, blue = (plane * weight for plane, weight in zip(planes, _GREY, strict=True))
    return red + green + blue


def _turn_hue(planes: Sequence[np.ndarray], turns: float) -> list[np.ndarray]:
    """Rotate the hue of HSV, keeping saturation and value.

    The conversion back to RGB needs no cases:
    value - chroma * clip(min(k, 4 - k), 0, 1) with k = n + 6 hue (mod 6) and n = 5, 3, 1.
    """
    red, green, blue = planes
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    divisor = np.where(chroma == 0, np.float32(1), chroma)
    hue = np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = np.where(value == red, (green - blue) / divisor, hue) + np.float32(6 * turns)
    turned = []
    for number in (5, 3, 1):
        k = hue + np.float32(number)
        k -= 6 * np.floor(k / 6)
        turned.append(value - chroma * np.clip(np.minimum(k, 4 - k), np.float32(0), np.float32(1)))
    return turned
