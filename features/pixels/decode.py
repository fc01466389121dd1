"""Decode image files to ``uint8`` pixels. An unreadable image gets a reason from ``REASONS``.

Pillow decodes. Its global settings are never changed, so all functions may be called from many threads.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import logging
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageFile
from PIL import features as pillow

from features.errors import ConfigurationError, UnreadableImageError
from features.machine import installed_version
from features.pixels import jpeg
from features.pixels.limits import (
    MAX_BYTES,
    MAX_PIXELS,
    NO_MEMORY,
    check_file,
    check_picture,
    check_size,
    decoded_bytes,
    jpeg_segments,
    memory,
    png_chunks,
)
from features.pixels.resizing import crop_window, edge_window, pad_window, resize_image
from features.pixels.samples import Samples, to_rgb
from features.pixels.scientific import Reader, reader_of
from features.pixels.tiff import needs_options
from features.recipe import PixelRule

logger = logging.getLogger(__name__)

REASON_MEANINGS = {
    "empty": "the file has no bytes",
    "not-an-image": "no decoder knows the first bytes: text, HEIC, PDF, a web page saved as .jpg",
    "truncated": "the data end before the image does",
    NO_MEMORY: "memory ended while it was decoded; it is tried again by the next extraction",
    "too-large": "more pixels, bytes, memory, scans or parts than the limit (features/pixels/limits.py)",
    "unreadable": "it begins like an image, but the decoder or the disk refuses the rest",
    "missing": "no such file, or a broken link",
    "no-permission": "the file may not be read",
    "not-a-file": "a folder, pipe, socket or device",
}
REASONS: tuple[str, ...] = tuple(REASON_MEANINGS)

# A closed list: Pillow would otherwise also try decoders that start other programs (EPS runs Ghostscript).
_PLUGINS = {
    "JPEG": "Jpeg",
    "PNG": "Png",
    "GIF": "Gif",
    "BMP": "Bmp",
    "WEBP": "WebP",
    "TIFF": "Tiff",
    "PPM": "Ppm",
    "JPEG2000": "Jpeg2K",
    "ICO": "Ico",
    "AVIF": "Avif",
}
for _plugin in _PLUGINS.values():
    try:
        importlib.import_module(f"PIL.{_plugin}ImagePlugin")
    except ImportError:  # an older Pillow has no AVIF
        logger.debug("Pillow has no decoder %s", _plugin)

# Exceptions of Pillow's decoders on hostile bytes. Warning: a caller may have turned warnings into errors.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    MemoryError,
    Warning,
)
_END_OF_DATA = (EOFError, IndexError, struct.error)
_END_OF_DATA_WORDS = (
    "truncat",
    "unexpected end",
    "end of file",
    "reached eof",
    "but only got",
    "not enough image data",
    "cannot load this image",  # a header, and no data after it
)

_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_TURNING_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of texts that may hold an orientation
_PLANE_BYTES = 24  # bytes per pixel of scaling values of any type: a plane in float64, and the picture
_ROWS = 256  # rows of deep grey that are scaled at a time

# Decoders that read only as far as they must: if one of them reached the end of the file, it needed more data.
_READ_STEP_BY_STEP = ("JPEG", "PNG", "TIFF")

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_TRANSPOSITIONS[tag] for tag in (5, 6, 7, 8)}
_ORIENTATION_TAG = 0x0112
_BITS_TAG, _PHOTOMETRIC_TAG = 258, 262


class Upright(NamedTuple):
    """One decoded image before resizing.

    Parameters
    ----------
    image : PIL.Image.Image
        RGB, loaded, with its orientation applied.
    width, height : int
        Size of the image in the file after its orientation was applied, in pixels. ``image`` is smaller if the decoder
        shrank it.
    """

    image: Image.Image
    width: int
    height: int


class Decoded(NamedTuple):
    """One image, ready for a batch.

    Parameters
    ----------
    pixels : uint8, (rule.height, rule.width, 3), 0-255
        RGB, C-contiguous, possibly read-only.
    width, height : int
        Size of the image in the file after its orientation was applied, in pixels.
    """

    pixels: np.ndarray
    width: int
    height: int


@functools.cache
def decoder_version() -> str:
    """Return the versions of all that decides whether an image can be decoded: this package, Pillow and its libraries."""
    found = {name: pillow.version(name) for name in sorted({*pillow.modules, *pillow.codecs})}
    if (reader := installed_version("pydicom", "")) != "":
        found["pydicom"] = reader
    libraries = " ".join(f"{name} {number}" for name, number in found.items() if number)
    return f"{installed_version('bottleneck-features')}, Pillow {PIL.__version__}: {libraries}"


def read_bytes(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return all bytes of a regular file; links are followed. A pipe is refused and never waited for.

    Raises
    ------
    UnreadableImageError
        With the reason ``missing``, ``no-permission``, ``not-a-file``, ``too-large`` or ``unreadable``.
    """
    try:
        # Checked before the file is opened, because opening a device may have an effect, and again
        # afterwards, because the file may have been replaced in between.
        _require_regular(os.stat(path).st_mode, path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            _require_regular(status.st_mode, path)
            if status.st_size > max_bytes:
                raise UnreadableImageError("too-large", f"{path}: {status.st_size} bytes; the limit is {max_bytes}")
            # The file may be growing, so the size found above does not limit what is read.
            data = file.read(status.st_size + 1)
            while more := file.read(min(len(data) + 65536, max_bytes + 1 - len(data))):
                data += more
            if len(data) > max_bytes:
                raise UnreadableImageError("too-large", f"{path}: it grew beyond the limit of {max_bytes} bytes")
            return data
    except UnreadableImageError:
        raise
    except PermissionError as error:
        raise UnreadableImageError("no-permission", f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL character in the name
        raise UnreadableImageError("missing", f"{path!r}: {error}") from error
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
        link = " (a broken link)" if absent and os.path.islink(path) else ""
        raise UnreadableImageError("missing" if absent else "unreadable", f"{path}: {error.strerror}{link}") from error


def _require_regular(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a socket or device"
        raise UnreadableImageError("not-a-file", f"{path} is {kind}")


def decode_image(data: bytes, rule: PixelRule, *, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode the first frame of an image file, upright, as RGB, and resize it by ``rule``.

    Grey values of more than 8 bits are scaled to 0-255, transparent images are laid over white, and CMYK is converted
    without a colour profile. This rule is fixed; its name is ``features.recipe.COLOUR_RULE``. ``rule`` may choose channels
    and values instead, and must for files of other channels or of values that have no white of their own.

    Parameters
    ----------
    data : bytes
        A whole image file.
    rule : PixelRule
        Size, resampling and fit. ``antialias`` is Pillow's bilinear filter, ``keras`` equals
        ``keras.utils.image_dataset_from_directory`` rounded to whole grey levels; JPEG files differ by about
        one level on average, because TensorFlow decodes them with libjpeg's fast, less accurate transform.
    max_pixels : int
        Larger images are refused after their header is read, before any pixel is decoded.

    Raises
    ------
    UnreadableImageError
        ``reason`` is ``empty``, ``not-an-image``, ``truncated``, ``too-large``, ``no-memory`` or ``unreadable``.
    """
    with decoding(data, rule, max_pixels=max_pixels) as upright:
        return Decoded(resize_image(upright.image, rule), upright.width, upright.height)


def decode_upright(data: bytes, rule: PixelRule) -> Upright:
    """Do the part of ``decode_image`` before the resize; ``rule`` says how far the decoder may shrink the image.

    Raises
    ------
    UnreadableImageError
        As ``decode_image``.
    """
    with decoding(data, rule) as upright:
        return upright


@contextlib.contextmanager
def decoding(data: bytes, rule: PixelRule, *, max_pixels: int = MAX_PIXELS) -> Iterator[Upright]:
    """Decode as ``decode_upright``, and hold the image's share of the memory of all threads as long as the context lasts.

    One thread must not enter a second one inside: it might wait for itself.

    Raises
    ------
    UnreadableImageError
        As ``decode_image``.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ConfigurationError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, so half an image would pass as a whole one; set it to False"
        )
    if not data:
        raise UnreadableImageError("empty", "0 bytes")
    check_file(data)
    with contextlib.ExitStack() as held:
        try:
            upright = _decoded(data, rule, max_pixels, held)
        except UnreadableImageError as error:
            held.close()
            pixels = _without_metadata(data)
            if pixels is None:
                raise
            try:
                upright = _decoded(pixels, rule, max_pixels, held)
            except UnreadableImageError:
                raise error from None
            logger.debug("metadata ignored: %s", error)
        yield upright


def _decoded(data: bytes, rule: PixelRule, max_pixels: int, held: contextlib.ExitStack) -> Upright:
    """Decode an image, turn it upright and convert it to RGB; ``held`` keeps its share of the memory."""
    if (read := reader_of(data, rule)) is not None:
        return _from_samples(read, data, rule, max_pixels, held)
    image = _open(data)
    check_picture(image, data, max_pixels)
    held.enter_context(memory.held(decoded_bytes(image)))
    try:
        size = _shrink_on_load(image, rule) if rule.decode == "fast" and image.format == "JPEG" else None
        if image.format == "PPM" and getattr(image, "tile", [("",)])[0][0] == "ppm":
            image = _scaled_pixmap(image, data)
        pixels = jpeg.loaded(image, data) if image.format == "JPEG" else None
        if pixels is None:
            image.load()
            pixels = image
        if image.format == "ICO":  # it may hold a larger image than its header says
            check_picture(image, data, max_pixels)
        if image.format == "PNG":
            _scale_transparent_colour(image, bits=data[24])
        # Only now, because Pillow rotates a TIFF by itself while loading, and then removes the tag.
        method = _orientation(image)
        upright = pixels if method is None else pixels.transpose(method)
        rgb = _chosen(image, upright, data, rule) if rule.chooses else _to_rgb(upright)
        return Upright(rgb, *(size or upright.size))
    except UnreadableImageError:
        raise
    except _DECODER_ERRORS as error:
        raise _refusal(error, image.format or "image", data) from error


def _from_samples(read: Reader, data: bytes, rule: PixelRule, max_pixels: int, held: contextlib.ExitStack) -> Upright:
    """Read an image that Pillow does not read as it is."""

    def admit(width: int, height: int, need: int) -> None:
        need += width * height * _PLANE_BYTES
        check_size(width, height, need, "its values", max_pixels)
        held.enter_context(memory.held(need))

    try:
        samples = read(data, rule, admit)
        image = Image.fromarray(to_rgb(samples, rule))
        method = _TRANSPOSITIONS.get(samples.orientation)
        upright = image if method is None else image.transpose(method)
        return Upright(upright, *upright.size)
    except UnreadableImageError:
        raise
    except _DECODER_ERRORS as error:
        raise _refusal(error, "TIFF", data) from error


def _chosen(image: Image.Image, upright: Image.Image, data: bytes, rule: PixelRule) -> Image.Image:
    """Take the channels and values that ``rule`` names of an image that Pillow has decoded."""
    deep = image.mode.startswith("I") or image.mode == "F"
    if rule.scale and image.format == "PNG" and data[24] == 16 and not deep:
        raise UnreadableImageError(
            "unreadable", "PNG: colours of 16 bits are read with 8. Leave --scale out, or save it as TIFF"
        )
    values = np.asarray(upright if deep else _to_rgb(upright))
    inverted = deep and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == 0
    return Image.fromarray(to_rgb(Samples.of(image.format or "image", values, inverted=inverted), rule))


def _without_metadata(data: bytes) -> bytes | None:
    """Return a PNG or JPEG with only what decides its pixels; None if it is neither or holds nothing else."""
    decides: Callable[[bytes], bool]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        start, parts, decides = 8, png_chunks(data), _chunk_decides
    elif data.startswith(b"\xff\xd8"):
        start, parts, decides = 2, jpeg_segments(data), _segment_decides
    else:
        return None
    kept, last = [data[:start]], start
    for begin, last in parts:
        if decides(data[begin:last]):
            kept.append(data[begin:last])
    pixels = b"".join([*kept, data[last:]])
    return pixels if len(pixels) < len(data) else None


def _chunk_decides(chunk: bytes) -> bool:
    whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
    turns = chunk[4:8] == b"eXIf" or (chunk[4:8] in _TEXT_CHUNKS and chunk.startswith(_TURNING_TEXTS, 8))
    return chunk[4:8] in _PIXEL_CHUNKS or (turns and whole)


def _segment_decides(segment: bytes) -> bool:
    """Whether a segment of a JPEG decides its pixels: libjpeg uses the markers of JFIF and Adobe if they are whole."""
    kind, content = segment[-1] if len(segment) < 2 else segment[1], segment[4:]
    if kind == 0xE1:
        return content.startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"))
    if kind in (0xE0, 0xEE):
        return content.startswith(b"JFIF\0" if kind == 0xE0 else b"Adobe") and len(content) >= (
            14 if kind == 0xE0 else 12
        )
    return kind != 0xFE and not 0xE0 <= kind <= 0xEF


def _open(data: bytes) -> Image.Image:
    """Read only the header of an image.

    ``Image.open`` is not used because above its own size limit it warns (which only process-wide state
    can silence) or raises, and because it hides why a header was refused.
    """
    prefix = data[:16].ljust(16, b"\0")  # some signature tests of older releases of Pillow need two bytes
    for name in _PLUGINS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or accept is None or accept(prefix) is not True:
            continue
        stream = io.BytesIO(data)
        try:
            return factory(stream, "")
        except _DECODER_ERRORS as error:
            if name in _READ_STEP_BY_STEP and stream.tell() >= len(data):
                raise UnreadableImageError("truncated", f"{name}: the file ends within its header") from error
            if name == "TIFF" and (options := needs_options(data)):
                raise UnreadableImageError("unreadable", options) from error
            if name == "AVIF" and b"avif" not in data[8:64]:  # HEIC, which uses the same container as AVIF
                break
            raise _refusal(error, name, data) from error
    raise UnreadableImageError(
        "not-an-image", f"the first bytes, {data[:16]!r}, match no known format ({', '.join(_PLUGINS)})"
    )


def _refusal(error: BaseException, name: str, data: bytes) -> UnreadableImageError:
    """Find the reason for an exception that the decoder ``name`` raised."""
    text = str(error) or type(error).__name__
    ended = isinstance(error, _END_OF_DATA) or isinstance(error.__cause__, _END_OF_DATA)
    bomb = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
    if isinstance(error, MemoryError):
        reason = NO_MEMORY
    elif bomb or "decompressed data too large" in text.lower():  # the latter: a text or colour profile in a PNG
        reason = "too-large"
    elif ended or any(word in text.lower() for word in _END_OF_DATA_WORDS) or _promised_length(data, name) > len(data):
        reason = "truncated"
    else:
        reason = "unreadable"
    return UnreadableImageError(reason, f"{name}: {text}")


def _promised_length(data: bytes, name: str) -> int:
    """Return the size in bytes that a container declares, or 0. Its decoder cannot tell truncated from damaged data."""
    if name == "WEBP":
        return 8 + int.from_bytes(data[4:8], "little")
    position = 0
    if name in ("AVIF", "JPEG2000"):  # a row of boxes, each beginning with its own length
        while position + 8 <= len(data) and (length := int.from_bytes(data[position : position + 4], "big")) >= 8:
            position += length
    return position


def _shrink_on_load(image: Image.Image, rule: PixelRule) -> tuple[int, int]:
    """Make libjpeg decode no more pixels than ``rule`` needs; return the upright size of the whole image."""
    method = _orientation(image)
    turned = method in _SIDEWAYS
    width, height = image.size[::-1] if turned else image.size
    if rule.fit == "crop":  # the window that is kept must have at least the target's size
        _, _, inner_width, inner_height = crop_window(width, height, rule)
        wanted = (-(-width * rule.width // inner_width), -(-height * rule.height // inner_height))
    elif rule.fit == "pad":
        wanted = pad_window(width, height, rule)[2:]
    elif rule.edge is not None:
        wanted = edge_window(width, height, rule)[2:]
    else:
        wanted = (rule.width, rule.height)
    image.draft(None, wanted[::-1] if turned else wanted)
    return width, height


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Return what the EXIF or XMP orientation requires; damaged metadata are ignored."""
    try:
        return _TRANSPOSITIONS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DECODER_ERRORS as error:
        logger.debug("metadata ignored: %s", error)
        return None


def _scaled_pixmap(image: Any, data: bytes) -> Image.Image:
    """Decode a binary PPM whose largest value is not 255, as Pillow does in Python, one sample a microsecond."""
    _, _, offset, (_, largest) = image.tile[0]
    white = 65535 if image.mode == "I" else 255
    kind = np.dtype(np.uint8 if largest < 256 else ">u2")
    count = image.width * image.height * len(image.getbands())
    if len(data) < offset + count * kind.itemsize:
        raise UnreadableImageError("truncated", f"PPM: {len(data)} bytes, expected {offset + count * kind.itemsize}")
    scaled = np.minimum(np.rint(np.arange(256**kind.itemsize) / largest * white), white)
    table = scaled.astype(np.int32 if image.mode == "I" else np.uint8)
    return Image.frombytes(image.mode, image.size, table[np.frombuffer(data, kind, count, offset)].tobytes())


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_deep_grey_to_8_bits(image)).convert("RGB")
    if image.mode == "La":  # grey premultiplied by its alpha, which Pillow converts to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        coloured = image if image.mode == "RGBA" else image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(coloured, mask=coloured.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_transparent_colour(image: Image.Image, *, bits: int) -> None:
    """Scale the transparent colour of a PNG to 8 bits, because Pillow scales only the samples."""
    transparent = image.info.get("transparency")
    if image.mode == "L" and bits in (2, 4) and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**bits - 1)
    elif image.mode == "RGB" and bits == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _deep_grey_to_8_bits(image: Image.Image) -> np.ndarray:
    """Scale grey of 16 or 32 bits or floating point to uint8, (h, w); Pillow's ``convert`` would clip it.

    A file does not say which value is white. It is taken to be 65535 for 16 bits. For 32 bits it is 65535 if no value
    is larger, else the largest integer. For floating point it is the smallest of 1, 255 and 65535 that no value
    exceeds, else the largest value. Negative values and NaN are black. A TIFF may state that it has 12 bits (white is
    4095), or that zero is white.
    """
    bands = [(top, min(top + _ROWS, image.height)) for top in range(0, image.height, _ROWS)]

    def values_of(top: int, bottom: int) -> np.ndarray:
        band = np.asarray(image.crop((0, top, image.width, bottom)))
        return np.nan_to_num(band.astype(np.float32), posinf=np.inf)

    largest = 0.0
    for top, bottom in bands:
        values = values_of(top, bottom)
        largest = max(largest, float(values.max(initial=0, where=np.isfinite(values))))
    scales = {"I": (65535.0, 2.0**31 - 1), "F": (1.0, 255.0, 65535.0, largest)}.get(image.mode, (65535.0,))
    tags = getattr(image, "tag_v2", {})  # only a TIFF has them
    if tags.get(_BITS_TAG) == (12,):
        scales = (4095.0,)
    white = next((scale for scale in scales if largest <= scale), scales[-1])
    transparent = image.info.get("transparency")
    grey = np.empty((image.height, image.width), np.uint8)
    for top, bottom in bands:
        values = values_of(top, bottom)
        if tags.get(_PHOTOMETRIC_TAG) == 0:
            values = np.float32(white) - values
        grey[top:bottom] = (np.clip(values, 0, white) * np.float32(255 / white) + np.float32(0.5)).astype(np.uint8)
        if isinstance(transparent, int):
            grey[top:bottom][values == transparent] = 255
    return grey
