"""Read the values of a TIFF of any number of channels, deeper than Pillow gives them.

    directory --_page()--> strips or tiles --libtiff, as rows of bytes--> numbers --> (h, w, c)

Pillow reads the directory and, through libtiff, expands the data: they are given to it as a grey picture whose pixels are
their bytes. So no decoder is added, and no more is expanded than the picture has room for.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import TiffImagePlugin

from features.errors import UnreadableImageError
from features.pixels.samples import Samples
from features.recipe import PixelRule, parse_channels

Admit = Callable[[int, int, int], None]
_COMPRESSIONS = {5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 34925: "LZMA", 50000: "zstd"}
_TYPES = {1: "u", 2: "i", 3: "f"}  # by the tag SampleFormat
_KNOWN_TYPES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
_GREY_OR_RGB = (0, 1, 2)  # values of the tag PhotometricInterpretation
_MOST_PAGES = 256
_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, Warning)


class _Page(NamedTuple):
    """One picture of a TIFF; the tags of TIFF 6.0 that decide its values."""

    width: int
    height: int
    samples: int
    dtype: np.dtype  # in the byte order of the file
    compression: int
    predictor: int
    photometric: int
    orientation: int
    apart: bool  # whether each channel has strips of its own
    rows: int  # of a strip or tile
    columns: int
    tiled: bool
    offsets: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int, np.dtype]:
        return self.height, self.width, self.samples, self.dtype


def is_deep(data: bytes, rule: PixelRule) -> bool:
    """Whether a recipe that chooses channels or values needs more of this file than Pillow gives: 8 bits of grey or RGB."""
    if not rule.chooses or data[:2] not in (b"II", b"MM"):
        return False
    try:
        directory = next(_directories(data))
        bits, samples = directory.get(258, (1,)), _number(directory, 277, 1)
        pages = bool(directory.next) and samples == 1 and bool(rule.channels)
        grey_or_rgb = _number(directory, 262, 1) in _GREY_OR_RGB
    except _ERRORS:
        return False  # Pillow says what is wrong
    return grey_or_rgb and min(bits) >= 8 and (max(bits) > 8 or samples not in (1, 3) or pages)


def needs_options(data: bytes) -> str:
    """Say which options read a TIFF that Pillow refuses; empty if none does."""
    try:
        page = _page(data, next(_directories(data)))
    except (UnreadableImageError, *_ERRORS):
        return ""
    deep = page.dtype.kind != "u" or page.dtype.itemsize > 2
    return (
        f"TIFF: {page.samples} channels of {page.dtype.name}; choose some by number, such as --channels 3,2,1, or add "
        f"--channels mean or --channels first{', and --scale LOW:HIGH or --scale percentile:1,99' if deep else ''}"
    )


def read_tiff(data: bytes, rule: PixelRule, admit: Admit) -> Samples:
    """Read the first picture; if it has a single channel and channels are chosen, the pictures of the file are the channels.

    Raises
    ------
    UnreadableImageError
        If the file is damaged, or of a kind that is not read; the message names it.
    """
    pages = (_page(data, directory) for directory in _directories(data))
    first = next(pages)
    wanted = parse_channels(rule.channels) if rule.channels else (0,)
    count = max(wanted, default=_MOST_PAGES) + 1 if first.samples == 1 else 1
    channels = [first]
    for page in pages:
        if len(channels) == count:
            break
        if page.shape != first.shape:
            raise _refuse(
                f"picture {len(channels) + 1} is {page.dtype.name} {page.width}x{page.height}, the first is {first.dtype.name} "
                f"{first.width}x{first.height}; expected channels of one size and type"
            )
        channels.append(page)
    if len(channels) > _MOST_PAGES:
        raise _refuse(f"more than {_MOST_PAGES} pictures; choose some by number, such as --channels 3,2,1")
    size = first.width * first.height * first.dtype.itemsize
    admit(first.width, first.height, size * first.samples * len(channels) * 2)
    if len(channels) == 1:
        values = _values(data, first)
    else:
        planes = np.zeros((len(channels), first.height, first.width), first.dtype.newbyteorder("="))
        for number in wanted or range(len(channels)):
            if number < len(channels):
                planes[number] = _values(data, channels[number])[..., 0]
        values = planes.transpose(1, 2, 0)
    samples = Samples.of("TIFF", values, inverted=first.photometric == 0)
    return samples._replace(orientation=first.orientation)


def _refuse(problem: str, reason: str = "unreadable") -> UnreadableImageError:
    return UnreadableImageError(reason, f"TIFF: {problem}")


def _directories(data: bytes) -> Iterator[Any]:
    """Yield the directory of one picture after another; always the same object."""
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" else 8])  # "+": a BigTIFF
    stream, seen = io.BytesIO(data), set[int]()
    while (position := directory.next) and position not in seen and len(seen) <= _MOST_PAGES:
        seen.add(position)
        stream.seek(position)
        directory.load(stream)
        yield directory


def _number(directory: Any, tag: int, default: int) -> int:
    value = directory.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _page(data: bytes, directory: Any) -> _Page:
    """Read the tags of one picture; refuses what is not read here."""
    width, height, samples = (_number(directory, tag, default) for tag, default in ((256, 0), (257, 0), (277, 1)))
    bits, formats = set(directory.get(258, (1,))), set(directory.get(339, (1,)))
    order = "<" if data[:2] == b"II" else ">"
    kind = f"{_TYPES.get(min(formats), '?')}{min(bits) // 8}"
    if len(bits) > 1 or len(formats) > 1 or min(bits) % 8 or kind not in _KNOWN_TYPES:
        raise _refuse(
            f"samples of {'/'.join(map(str, sorted(bits)))} bits; expected integers of 8, 16, 32 or 64 bits or floats"
        )
    compression, predictor = _number(directory, 259, 1), _number(directory, 317, 1)
    if compression != 1 and compression not in _COMPRESSIONS:
        name = TiffImagePlugin.COMPRESSION_INFO.get(compression, f"number {compression}")
        raise _refuse(f"many channels or deep values with the compression {name}; save it with deflate, LZW or without")
    if predictor not in (1, 2) or _number(directory, 266, 1) != 1:
        raise _refuse(f"the predictor {predictor} or the fill order; save it with predictor 2 or without")
    tiled = 324 in directory
    columns = _number(directory, 322, 0) if tiled else width
    rows = _number(directory, 323, 0) if tiled else min(height, _number(directory, 278, height))
    apart = _number(directory, 284, 1) == 2 and samples > 1
    offsets, counts = (tuple(directory.get(tag, ())) for tag in ((324, 325) if tiled else (273, 279)))
    if min(width, height, samples, columns, rows) < 1:
        raise _refuse(f"{width}x{height} pixels, {samples} channels")
    pieces = -(-width // columns) * -(-height // rows) * (samples if apart else 1)
    if len(offsets) != pieces or len(counts) != pieces:
        raise _refuse(f"{len(offsets)} strips or tiles, expected {pieces}")
    return _Page(
        width, height, samples, np.dtype(order + kind), compression, predictor, _number(directory, 262, 1),
        _number(directory, 274, 1), apart, rows, columns, tiled, offsets, counts,
    )  # fmt: skip


def _values(data: bytes, page: _Page) -> np.ndarray:
    """Return the values of a picture in the byte order of this machine, (h, w, samples)."""
    across, down = -(-page.width // page.columns), -(-page.height // page.rows)
    each, channels = across * down, 1 if page.apart else page.samples
    lines = down * across * page.rows if page.tiled else page.height
    planes = []
    for start in range(0, len(page.offsets), each):
        places = zip(page.offsets[start : start + each], page.counts[start : start + each], strict=True)
        pieces = [data[offset : offset + count] for offset, count in places]
        if [len(piece) for piece in pieces] != list(page.counts[start : start + each]):
            raise _refuse("the data of a strip or tile are not all there", "truncated")
        line = page.columns * channels * page.dtype.itemsize
        raw = _expanded(pieces, page, line, lines)
        values = raw.view(page.dtype).astype(page.dtype.newbyteorder("=")).reshape(lines, page.columns, channels)
        if page.predictor == 2 and page.compression != 1:
            values = np.cumsum(values, axis=1, dtype=values.dtype)
        if page.tiled:
            values = values.reshape(down, across, page.rows, page.columns, channels).transpose(0, 2, 1, 3, 4)
            values = values.reshape(down * page.rows, across * page.columns, channels)
        planes.append(values[: page.height, : page.width])
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)


def _expanded(pieces: list[bytes], page: _Page, line: int, lines: int) -> np.ndarray:
    """Return the bytes of strips or tiles that lie one below the other, uint8, (lines, line)."""
    if page.compression == 1:
        data, wanted = b"".join(pieces), line * lines
        if len(data) < wanted:
            raise _refuse(f"{len(data)} bytes of values, expected {wanted}", "truncated")
        return np.frombuffer(data, np.uint8, wanted).reshape(lines, line)
    picture = TiffImagePlugin.TiffImageFile(
        io.BytesIO(_grey_tiff(pieces, page.compression, line, lines, page.rows)), ""
    )
    picture.load()
    return np.asarray(picture).reshape(lines, line)


def _grey_tiff(pieces: list[bytes], compression: int, line: int, lines: int, rows: int) -> bytes:
    """Return a grey TIFF of 8 bits with these strips, ``line`` pixels wide and ``lines`` high."""
    offsets = np.cumsum([8, *map(len, pieces)]).tolist()
    start, count = offsets.pop(), len(pieces)
    tags = (256, 257, 258, 259, 262, 273, 277, 278, 279)
    beyond = start + 2 + 12 * len(tags) + 4
    where, sizes = (beyond, beyond + 4 * count) if count > 1 else (offsets[0], len(pieces[0]))
    numbers = (line, lines, 8, compression, 1, where, 1, rows, sizes)
    entries = [
        struct.pack("<HHLL", tag, 4, count if tag in (273, 279) else 1, number)
        for tag, number in zip(tags, numbers, strict=True)
    ]
    lists = struct.pack(f"<{2 * count}L", *offsets, *map(len, pieces)) if count > 1 else b""
    return b"".join(
        [struct.pack("<2sHL", b"II", 42, start), *pieces, struct.pack("<H", len(tags)), *entries, bytes(4), lists]
    )
