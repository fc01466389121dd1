"""A table of bad and odd image files: each gives the right pixels or the right reason, and none stops a run.

The name of a file says its kind. A row of the table makes the file from a picture of its own, so that features
that ended up in the wrong row would be seen.

What cannot be told from the outside is in the table as it is: a file that was cut and then *closed* in an orderly way
(``*-closed-early``) decodes, its lost part grey or black, for no decoder reports it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import as_engine, numpy_network, paint_folder, recipe
from PIL import Image
from PIL import features as pillow

from features.errors import UnreadableImageError
from features.extraction.extraction import Extraction, ExtractionResult
from features.extraction.options import ExtractionOptions
from features.pixels.decode import REASONS, decode_image, read_bytes
from features.pixels.limits import MAX_BYTES
from features.recipe import PixelRule, Recipe
from features.sources.imageset import ImageSet
from features.sources.scan import scan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on files damaged on purpose

Made = tuple[bytes, np.ndarray]  # a file and the pixels expected of it, uint8 (h, w, 3)
GOOD: dict[str, tuple[Callable[[str], Made], float]] = {}
BAD: dict[str, tuple[Callable[[str], bytes], str]] = {}


def good(name: str, tolerance: float = 0) -> Callable[[Callable[[str], Made]], Callable[[str], Made]]:
    def enter(make: Callable[[str], Made]) -> Callable[[str], Made]:
        assert name not in GOOD
        GOOD[name] = functools.cache(make), tolerance
        return make

    return enter


def bad(name: str, reason: str, make: Callable[[str], bytes] | bytes) -> None:
    assert name not in BAD
    assert name not in GOOD
    BAD[name] = (lambda _: make) if isinstance(make, bytes) else make, reason


# --- what files are made of -------------------------------------------------------------------------------


def picture(name: str) -> np.ndarray:
    """Two rows of three blocks of 8x8, each of one colour: no turn leaves it as it is, and JPEG keeps it."""
    colours = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return np.kron(colours, np.ones((8, 8, 1), np.uint8))


def plane(name: str) -> np.ndarray:
    """One channel of the picture, uint8 (16, 24)."""
    return picture(name)[:, :, 0].copy()


def alpha() -> np.ndarray:
    return np.kron(np.array([[255, 0, 51], [128, 255, 254]], np.uint8), np.ones((8, 8), np.uint8))


def noise(height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=np.uint8)[:, :, None], 3, axis=2)


def over_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    share = opacity[:, :, None] / 255
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


def without_ink(inks: np.ndarray) -> np.ndarray:
    """CMYK to RGB by the textbook, without a colour profile."""
    return np.rint((255.0 - inks[:, :, :3]) * (255.0 - inks[:, :, 3:]) / 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(image: Image.Image | np.ndarray, **options: object) -> bytes:
    return encoded(image, "JPEG", **{"quality": 100, "subsampling": 0, **options})


def indexed(name: str) -> Image.Image:
    image = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones((8, 8), np.uint8)), mode="P")
    image.putpalette(picture(name)[::8, ::8].tobytes())
    return image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")


def png(
    rows: np.ndarray, width: int, colour_type: int, *extra: bytes, bits: int = 8, height: int | None = None
) -> bytes:
    """A PNG of any depth; ``rows`` are bytes, or big-endian words, (h, ...). ``extra`` chunks come before the data."""
    header = struct.pack(">IIBBBBB", width, len(rows) if height is None else height, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return PNG_START + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", data) + PNG_END


def colour_png(name: str, *extra: bytes, **header: int) -> bytes:
    return png(picture(name), header.pop("width", 24), 2, *extra, **header)


def tiff(samples: np.ndarray, photometric: int, *, bits: int, kind: int = 1, extra: int | None = None) -> bytes:
    """An uncompressed little-endian TIFF of kinds that Pillow reads and does not write; kind 1 unsigned, 3 float."""
    height, width = samples.shape[0], 24
    channels = samples.shape[2] if samples.ndim == 3 else 1
    count = 10 + (extra is not None)
    start = 8 + 2 + 12 * count + 4
    entries = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, start + 4 * (channels > 1)),
    ]
    entries += [(277, channels), (278, height), (279, samples.nbytes), (339, kind)]
    entries = sorted(entries if extra is None else [*entries, (338, extra)])
    directory = b""
    for tag, value in entries:
        if tag in (258, 339) and channels == 2:  # one value per channel, and two still fit
            directory += struct.pack("<HHIHH", tag, 3, 2, value, value)
        else:
            directory += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    padding = bytes(4 * (channels > 1))
    return b"II*\0" + struct.pack("<IH", 8, count) + directory + bytes(4) + padding + samples.tobytes()


def bmp(
    body: bytes, bits: int, *, height: int = 16, width: int = 24, compression: int = 0, palette: bytes = b""
) -> bytes:
    sizes = (len(body), 0, 0, len(palette) // 4, 0)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, *sizes) + palette
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(body), 0, 0, 14 + len(header)) + header + body


def cut(kind: str, end: int, **options: object) -> Callable[[str], bytes]:
    """A file of noise up to ``end``; below zero as in a slice."""
    return lambda _: encoded(noise(), kind, **options)[:end]


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def changed(data: bytes, position: int, value: bytes) -> bytes:
    return data[:position] + value + data[position + len(value) :]


# --- good: JPEG -------------------------------------------------------------------------------------------

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF 2.3, tag 274
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}

for _orientation in UPRIGHT:

    @good(f"jpeg-orientation-{_orientation}.jpg", tolerance=2)
    def _(name: str, orientation: int = _orientation) -> Made:
        exif = with_orientation(orientation)
        return jpeg(picture(name), exif=exif.tobytes()), UPRIGHT[orientation](picture(name))


_JPEGS: dict[str, Mapping[str, object]] = {
    "jpeg-plain.jpg": {},
    "jpeg-progressive.jpg": {"progressive": True},
    "jpeg-no-huffman-optimisation.jpe": {"optimize": False},
    "jpeg-restart-markers.jpg": {"restart_marker_blocks": 1},
    "jpeg-profile-of-garbage.jpg": {"icc_profile": b"no profile at all" * 9},
    "jpeg-comment-of-60-kB.jpg": {"comment": b"x" * 60_000},
    "jpeg-exif-of-garbage.jpg": {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"},
}
for _name, _options in _JPEGS.items():

    @good(_name, tolerance=2)
    def _(name: str, options: Mapping[str, object] = _options) -> Made:
        return jpeg(picture(name), **options), picture(name)


@good("jpeg-grey.jpg", tolerance=1)
def _(name: str) -> Made:
    return jpeg(Image.fromarray(plane(name))), grey(plane(name))


def inks(name: str) -> np.ndarray:
    return np.dstack([picture(name), plane(name)[::-1] // 2])


@good("jpeg-cmyk.jpg", tolerance=3)
def _(name: str) -> Made:
    return jpeg(Image.fromarray(inks(name), mode="CMYK")), without_ink(inks(name))


@good("jpeg-ycck.jpg", tolerance=4)
def _(name: str) -> Made:
    """Transform 2 of the Adobe marker: C, M and Y are turned into luma and chroma, K is not."""
    luma = np.asarray(Image.fromarray(inks(name)[:, :, :3].copy()).convert("YCbCr"))
    planes = np.dstack([255 - luma, inks(name)[:, :, 3]])  # Pillow stores every plane inverted
    data = jpeg(Image.fromarray(planes, mode="CMYK"))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    return changed(data, transform, b"\2"), without_ink(inks(name))


@good("jpeg-trailing-junk.jpg", tolerance=2)
def _(name: str) -> Made:
    return jpeg(picture(name)) + b"<!-- served by -->" * 50, picture(name)


@good("jpeg-of-two-pictures-mpo.jpg", tolerance=2)
def _(name: str) -> Made:
    second = Image.fromarray(255 - picture(name))
    options = {"quality": 100, "subsampling": 0, "save_all": True, "append_images": [second]}
    return encoded(picture(name), "MPO", **options), picture(name)


@good("jpeg-closed-early.jpg", tolerance=2)
def _(name: str) -> Made:
    tall = np.kron(picture(name), np.ones((4, 4, 1), np.uint8))
    data = jpeg(tall, quality=100, restart_marker_rows=1)
    fifth = data.index(b"\xff\xd3")  # after four rows of blocks: 32 lines
    expected = decode_image(data[:fifth] + b"\xff\xd9", PixelRule(64, 96)).pixels.copy()
    expected[:32] = tall[:32]  # known; what lies below is libjpeg's choice
    return data[:fifth] + b"\xff\xd9", expected


# --- good: PNG --------------------------------------------------------------------------------------------


@good("png-named-jpeg.jpg")
def _(name: str) -> Made:
    return encoded(picture(name), "PNG"), picture(name)


@good("jpeg-named-png.PNG", tolerance=2)
def _(name: str) -> Made:
    return jpeg(picture(name)), picture(name)


_METADATA = {
    "png-large-text.png": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(5 << 20))),
    "png-large-profile.png": chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(6 << 20))),
    "png-checksum-of-resolution-wrong.png": chunk(b"pHYs", struct.pack(">IIB", 3000, 3000, 1))[:-1] + b"?",
    "png-short-resolution.png": chunk(b"pHYs", b"\0"),
    "png-short-gamma.png": chunk(b"gAMA", b"\0"),
    "png-text-of-garbage.png": chunk(b"zTXt", b"k\0\0no zlib"),
    "png-checksum-of-exif-wrong.png": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0")[:-1] + b"?",
}
for _name, _chunk in _METADATA.items():

    @good(_name)
    def _(name: str, extra: bytes = _chunk) -> Made:
        return colour_png(name, extra), picture(name)

    @good("after-" + _name)
    def _(name: str, extra: bytes = _chunk) -> Made:
        return colour_png(name)[: -len(PNG_END)] + extra + PNG_END, picture(name)


for _name, _content in {"jfif": b"\xe0JFIF\0", "adobe": b"\xeeAdobe\0", "profile": b"\xe2ICC_PROFILE\0"}.items():

    @good(f"jpeg-short-{_name}.jpg", tolerance=2)
    def _(name: str, content: bytes = _content) -> Made:
        data = jpeg(picture(name), exif=with_orientation(6).tobytes())
        segment = b"\xff" + content[:1] + struct.pack(">H", len(content) + 1) + content[1:]
        return data[:2] + segment + data[2:], UPRIGHT[6](picture(name))


@good("png-upright-despite-its-metadata.png")
def _(name: str) -> Made:
    exif = with_orientation(6).tobytes().removeprefix(b"Exif\0\0")
    data = colour_png(name, _METADATA["png-large-text.png"], chunk(b"eXIf", exif))
    return data, UPRIGHT[6](picture(name))


_XMP = b'<x:xmpmeta><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'


@good("png-upright-by-xmp-despite-its-metadata.png")
def _(name: str) -> Made:
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _XMP)
    return colour_png(name, _METADATA["png-checksum-of-resolution-wrong.png"], xmp), UPRIGHT[6](picture(name))


@good("png-upright-by-raw-exif-despite-its-metadata.png")
def _(name: str) -> Made:
    exif = with_orientation(6).tobytes()
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(exif)}\n{exif.hex()}\n".encode()))
    return colour_png(name, _METADATA["png-checksum-of-resolution-wrong.png"], text), UPRIGHT[6](picture(name))


@good("jpeg-upright-by-xmp-despite-its-metadata.jpg", tolerance=2)
def _(name: str) -> Made:
    def segment(kind: bytes, body: bytes) -> bytes:
        return b"\xff" + kind + struct.pack(">H", len(body) + 2) + body

    metadata = segment(b"\xe0", b"JFIF\0") + segment(b"\xe1", b"http://ns.adobe.com/xap/1.0/\0" + _XMP)
    data = jpeg(picture(name))
    return data[:2] + metadata + data[2:], UPRIGHT[6](picture(name))


@good("jpeg-of-90-scans.jpg", tolerance=2)
def _(name: str) -> Made:
    return scans(80)(name), picture(name)


@good("jpeg-with-scans-in-its-metadata.jpg", tolerance=2)
def _(name: str) -> Made:
    """A thumbnail, and a film after the picture, may hold the bytes of a marker."""
    data = jpeg(picture(name))
    return data[:2] + b"\xff\xec" + struct.pack(">H", 2 + 800) + b"\xff\xda" * 400 + data[
        2:
    ] + b"\xff\xda" * 900, picture(name)


@good("png-grey-16-bits.png")
def _(name: str) -> Made:
    deep = plane(name).astype(np.uint16) * 257 + 100
    return encoded(np.minimum(deep, 65535).astype(np.uint16), "PNG"), grey(plane(name))


@good("png-colour-16-bits.png")
def _(name: str) -> Made:
    return png(picture(name).astype(">u2") * 257, 24, 2, bits=16), picture(name)


@good("png-colour-16-bits-one-transparent.png")
def _(name: str) -> Made:
    colours = (picture(name).astype(np.uint16) << 8 | 7).astype(">u2")
    expected = picture(name)
    expected[:8, :8] = 255
    return png(colours, 24, 2, chunk(b"tRNS", colours[0, 0].tobytes()), bits=16), expected


@good("png-16-bits-grey-alpha.png", tolerance=1)
def _(name: str) -> Made:
    pairs = np.dstack([plane(name), alpha()]).astype(">u2") * 257
    return png(pairs, 24, 4, bits=16), over_white(grey(plane(name)), alpha())


@good("png-1-bit.png")
def _(name: str) -> Made:
    bits = np.random.default_rng(1).integers(0, 2, (16, 24), dtype=np.uint8)
    return png(np.packbits(bits, axis=1), 24, 0, bits=1), grey(bits * 255)


for _transparent in (False, True):

    @good(f"png-4-bits{'-one-transparent' * _transparent}.png")
    def _(name: str, transparent: bool = _transparent) -> Made:
        nibbles = plane(name) >> 4
        expected = grey(nibbles * 17)
        clear = np.unique(nibbles)[1]  # neither black nor white
        if transparent:
            expected[nibbles == clear] = 255
        extra = [chunk(b"tRNS", struct.pack(">H", clear))] if transparent else []
        return png(nibbles[:, ::2] << 4 | nibbles[:, 1::2], 24, 0, *extra, bits=4), expected


@good("png-palette.png")
def _(name: str) -> Made:
    return encoded(indexed(name), "PNG"), picture(name)


@good("png-palette-one-transparent.png")
def _(name: str) -> Made:
    expected = picture(name)
    expected[8:, 16:] = 255
    return encoded(indexed(name), "PNG", transparency=5), expected


@good("png-palette-table-of-alpha.png", tolerance=1)
def _(name: str) -> Made:
    return encoded(indexed(name), "PNG", transparency=alpha()[::8, ::8].tobytes()), over_white(picture(name), alpha())


@good("png-palette-too-short.png")
def _(name: str) -> Made:
    index = np.asarray(indexed(name))
    expected = picture(name)
    expected[8:, 8:] = 0  # entries 4 and 5 are not there
    return png(index, 24, 3, chunk(b"PLTE", picture(name)[::8, ::8].tobytes()[:12])), expected


@good("png-grey-alpha.png", tolerance=1)
def _(name: str) -> Made:
    return encoded(np.dstack([plane(name), alpha()]), "PNG"), over_white(grey(plane(name)), alpha())


@good("png-rgba.png", tolerance=1)
def _(name: str) -> Made:
    return encoded(np.dstack([picture(name), alpha()]), "PNG"), over_white(picture(name), alpha())


@good("png-orientation-in-eXIf.png")
def _(name: str) -> Made:
    return encoded(picture(name), "PNG", exif=with_orientation(8)), UPRIGHT[8](picture(name))


@good("png-profile-of-garbage.png")
def _(name: str) -> Made:
    return colour_png(name, chunk(b"iCCP", b"name\0\0garbage")), picture(name)


@good("png-with-checksum-of-data-wrong.png")
def _(name: str) -> Made:
    """The data's own checksum, which zlib looks at, is right."""
    data = colour_png(name)
    return changed(data, len(data) - len(PNG_END) - 4, b"\1\2\3\4"), picture(name)


@good("png-without-end.png")
def _(name: str) -> Made:
    return colour_png(name)[: -len(PNG_END)], picture(name)


@good("png-closed-early.png")
def _(name: str) -> Made:
    expected = picture(name)
    expected[8:] = 0
    return png(picture(name)[:8], 24, 2, height=16), expected


@good("png-animated.png")
def _(name: str) -> Made:
    second = Image.fromarray(255 - picture(name))
    return encoded(picture(name), "PNG", save_all=True, append_images=[second]), picture(name)


@good("png-animated-besides-its-picture.apng")
def _(name: str) -> Made:
    others = [Image.fromarray(255 - picture(name)), Image.fromarray(picture(name)[::-1].copy())]
    return encoded(picture(name), "PNG", save_all=True, append_images=others, default_image=True), picture(name)


for _shape in ((1, 1), (1, 30_000), (30_000, 1)):

    @good(f"png-{_shape[1]}x{_shape[0]}.png")
    def _(name: str, shape: tuple[int, int] = _shape) -> Made:
        pixels = np.full((*shape, 3), picture(name)[0, 0], np.uint8)
        return encoded(pixels, "PNG"), pixels


# --- good: other formats ----------------------------------------------------------------------------------


@good("gif-animated.gif")
def _(name: str) -> Made:
    second = Image.fromarray(255 - picture(name))
    return encoded(indexed(name), "GIF", save_all=True, append_images=[second]), picture(name)


@good("gif-transparent.gif")
def _(name: str) -> Made:
    expected = picture(name)
    expected[:8, 8:16] = 255
    return encoded(indexed(name), "GIF", transparency=1), expected


@good("gif-without-last-byte.gif")
def _(name: str) -> Made:
    return encoded(indexed(name), "GIF")[:-1], picture(name)  # the mark of the end; every pixel is there


@good("webp-lossy.webp", tolerance=6)
def _(name: str) -> Made:
    smooth = np.broadcast_to(picture(name)[0, 0], (16, 24, 3)).copy()  # chroma is kept at half the size
    return encoded(smooth, "WEBP", quality=100), smooth


@good("webp-lossless-alpha.webp", tolerance=1)
def _(name: str) -> Made:
    data = encoded(np.dstack([picture(name), alpha()]), "WEBP", lossless=True, exact=True)
    return data, over_white(picture(name), alpha())


@good("webp-animated.webp")
def _(name: str) -> Made:
    second = Image.fromarray(255 - picture(name))
    return encoded(picture(name), "WEBP", lossless=True, save_all=True, append_images=[second]), picture(name)


if pillow.check("avif"):

    @good("avif.avif", tolerance=3)
    def _(name: str) -> Made:
        return encoded(picture(name), "AVIF", quality=100, subsampling="4:4:4"), picture(name)

    bad("avif-cut.avif", "truncated", cut("AVIF", -2))


@good("jpeg-2000.jp2")
def _(name: str) -> Made:
    return encoded(picture(name), "JPEG2000"), picture(name)


@good("icon.ico")
def _(name: str) -> Made:
    return encoded(picture(name), "ICO", sizes=[(24, 16)]), picture(name)


@good("icon-of-bitmap.ico")
def _(name: str) -> Made:
    """24 bits a pixel, then a mask of 1 bit a pixel, its rows filled up to 4 bytes; the height counts both."""
    expected = picture(name)
    expected[:8, :8] = 255
    mask = b"".join([bytes(4)] * 8 + [b"\xff\0\0\0"] * 8)
    bitmap = bmp(picture(name)[::-1, :, ::-1].tobytes() + mask, 24, height=32)[14:]
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 24, 16, 0, 0, 1, 24, len(bitmap), 22) + bitmap, expected


@good("bmp-24-bits-top-down.bmp")
def _(name: str) -> Made:
    return bmp(picture(name)[:, :, ::-1].tobytes(), 24, height=-16), picture(name)


@good("bmp-32-bits.bmp")
def _(name: str) -> Made:
    unused = np.zeros((16, 24), np.uint8)  # the fourth byte is no alpha: all zero, as most programs write it
    return bmp(np.dstack([picture(name)[::-1, :, ::-1], unused]).tobytes(), 32), picture(name)


for _sign in (1, -1):

    @good(f"bmp-run-lengths{'-top-down' * (_sign < 0)}.bmp")
    def _(name: str, sign: int = _sign) -> Made:
        palette = np.dstack([picture(name)[::8, ::8, ::-1], np.zeros((2, 3), np.uint8)]).tobytes()
        rows = [bytes([8, 0, 8, 1, 8, 2, 0, 0])] * 8 + [bytes([8, 3, 8, 4, 8, 5, 0, 0])] * 8
        body = b"".join(rows[::-sign]) + b"\0\1"
        return bmp(body, 8, compression=1, palette=palette, height=16 * sign), picture(name)


@good("pixmap-16-bits.ppm")
def _(name: str) -> Made:
    return b"P6 24 16 65535\n" + (picture(name).astype(">u2") * 257).tobytes(), picture(name)


@good("greymap-10-bits.pgm")
def _(name: str) -> Made:
    deep = np.rint(plane(name) / 255 * 1023).astype(">u2")
    return b"P5 24 16 1023\n" + deep.tobytes(), grey(plane(name))


@good("greymap-of-text.pgm")
def _(name: str) -> Made:
    return f"P2 # a comment\n24 16 255\n{' '.join(map(str, plane(name).ravel()))}\n".encode(), grey(plane(name))


_TIFFS: dict[str, tuple[str, float]] = {"raw": ("raw", 0), "lzw": ("tiff_lzw", 0), "jpeg": ("jpeg", 2)}
for _name, (_compression, _tolerance) in _TIFFS.items():

    @good(f"tiff-{_name}.tif", _tolerance)
    def _(name: str, compression: str = _compression) -> Made:
        options = {"quality": 100} if compression == "jpeg" else {}
        image = np.broadcast_to(picture(name)[0, 0], (16, 24, 3)).copy() if compression == "jpeg" else picture(name)
        return encoded(image, "TIFF", compression=compression, **options), image


@good("tiff-cmyk.tif", tolerance=1)
def _(name: str) -> Made:
    return encoded(Image.fromarray(inks(name), mode="CMYK"), "TIFF"), without_ink(inks(name))


@good("tiff-of-pages.tiff")
def _(name: str) -> Made:
    second = Image.fromarray(255 - picture(name))
    return encoded(picture(name), "TIFF", save_all=True, append_images=[second]), picture(name)


@good("tiff-orientation-6.tif")
def _(name: str) -> Made:
    return encoded(picture(name), "TIFF", exif=with_orientation(6)), UPRIGHT[6](picture(name))


for _photometric, _word in ((1, "black"), (0, "white")):  # which one zero is

    @good(f"tiff-8-bits-zero-is-{_word}.tif")
    def _(name: str, photometric: int = _photometric) -> Made:
        return tiff(plane(name), photometric, bits=8), grey(plane(name) if photometric else 255 - plane(name))

    @good(f"tiff-16-bits-zero-is-{_word}.tif")
    def _(name: str, photometric: int = _photometric) -> Made:
        deep = plane(name).astype("<u2") * 257
        return tiff(deep, photometric, bits=16), grey(plane(name) if photometric else 255 - plane(name))

    @good(f"tiff-float-zero-is-{_word}.tif")
    def _(name: str, photometric: int = _photometric) -> Made:
        unit = (plane(name) / 255).astype("<f4")
        return tiff(unit, photometric, bits=32, kind=3), grey(plane(name) if photometric else 255 - plane(name))


@good("tiff-12-bits-packed.tif")
def _(name: str) -> Made:
    deep = np.rint(plane(name) / 255 * 4095).astype(np.uint16)
    left, right = deep[:, ::2], deep[:, 1::2]
    packed = np.dstack([left >> 4, (left & 15) << 4 | right >> 8, right & 255]).astype(np.uint8)
    return tiff(packed.reshape(16, 36), 1, bits=12), grey(plane(name))


@good("tiff-grey-alpha.tif", tolerance=1)
def _(name: str) -> Made:
    pairs = np.dstack([plane(name), alpha()])
    return tiff(pairs, 1, bits=8, extra=2), over_white(grey(plane(name)), alpha())


@good("tiff-grey-times-alpha.tif", tolerance=2)
def _(name: str) -> Made:
    product = np.rint(plane(name) / 255 * alpha()).astype(np.uint8)
    return tiff(np.dstack([product, alpha()]), 1, bits=8, extra=1), over_white(grey(plane(name)), alpha())


@good("tiff-lab.tif", tolerance=2)
def _(name: str) -> Made:
    """Without colour, lightness alone decides: CIE 1976 to luminance, and sRGB's curve (IEC 61966-2-1)."""
    channels = np.dstack([plane(name), np.zeros((16, 24, 2), np.uint8)])
    lightness = plane(name) / 255 * 100
    luminance = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    curve = np.where(luminance > 0.0031308, 1.055 * luminance ** (1 / 2.4) - 0.055, 12.92 * luminance)
    return encoded(Image.frombytes("LAB", (24, 16), channels.tobytes()), "TIFF"), grey(np.rint(curve * 255))


# --- bad --------------------------------------------------------------------------------------------------

bad("empty.jpg", "empty", b"")
bad("text.jpg", "not-an-image", b"This is not a picture of a cat.\n")
bad("zeros.jpg", "not-an-image", bytes(5000))
bad("error-page.jpg", "not-an-image", b"<!DOCTYPE html><html><title>404 Not Found</title></html>")
bad("json-error.jpg", "not-an-image", b'{"error": "rate limited"}')
bad("drawing.png", "not-an-image", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
bad("document.jpg", "not-an-image", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n")
bad("postscript.jpg", "not-an-image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
bad("photo-of-a-telephone.jpg", "not-an-image", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300))
bad("pointer-of-git-lfs.jpg", "not-an-image", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
bad("photoshop.jpg", "not-an-image", b"8BPS\0\1" + bytes(200))

# A JPEG is refused as soon as its last byte is missing, although every pixel may be there: libjpeg has not seen the
# end. A PNG is not: its data end with a checksum of their own.
bad("jpeg-of-2-bytes.jpg", "not-an-image", cut("JPEG", 2))
for _length in (3, 4, 11, 20, 100, 400, 700):
    bad(f"jpeg-of-{_length}-bytes.jpg", "truncated", cut("JPEG", _length))
for _missing in (1, 2, 10, 1000):
    bad(f"jpeg-without-last-{_missing}-bytes.jpg", "truncated", cut("JPEG", -_missing))
bad("jpeg-without-data.jpg", "truncated", lambda name: jpeg(picture(name)).partition(b"\xff\xda")[0])
bad("jpeg-progressive-cut.jpg", "truncated", cut("JPEG", 1200, progressive=True))
bad("jpeg-after-junk.jpg", "not-an-image", lambda name: b"\r\n" + jpeg(picture(name)))


def jpeg_header(offset: int, value: bytes) -> Callable[[str], bytes]:
    """Bytes of the frame header replaced: offset 1 is the process, 4 the depth, 5 the height and 7 the width."""

    def make(name: str) -> bytes:
        data = jpeg(picture(name))
        return changed(data, data.index(b"\xff\xc0") + offset, value)

    return make


bad("jpeg-bomb-65500x65500.jpg", "too-large", jpeg_header(5, struct.pack(">HH", 65500, 65500)))
bad("jpeg-no-width.jpg", "unreadable", jpeg_header(7, b"\0\0"))
bad("jpeg-no-height.jpg", "unreadable", jpeg_header(5, b"\0\0"))
bad("jpeg-12-bits.jpg", "unreadable", jpeg_header(4, b"\x0c"))
bad("jpeg-lossless.jpg", "unreadable", jpeg_header(1, b"\xc3"))

for _length in (8, 12, 20, 40, 3000):
    bad(f"png-of-{_length}-bytes.png", "truncated", cut("PNG", _length))
bad("png-of-4-bytes.png", "not-an-image", PNG_START[:4])
bad("png-without-data.png", "truncated", lambda name: colour_png(name)[:33] + PNG_END)
bad("png-no-width.png", "unreadable", lambda name: colour_png(name, width=0))
bad("png-no-height.png", "unreadable", lambda name: colour_png(name, height=0))
bad("png-checksum-of-header-wrong.png", "unreadable", lambda name: changed(colour_png(name), 29, b"\1\2\3\4"))
bad("png-checksum-in-data-wrong.png", "unreadable", lambda name: changed(colour_png(name), -20, b"\1\2\3\4"))
bad("png-without-palette.png", "unreadable", lambda name: png(np.asarray(indexed(name)), 24, 3))
bad("png-bomb-30000x30000.png", "too-large", lambda name: colour_png(name, width=30_000, height=30_000))
bad("png-10000000x1.png", "too-large", lambda name: colour_png(name, width=10_000_000, height=1))
bad("png-1x10000000.png", "too-large", lambda name: colour_png(name, width=1, height=10_000_000))
bad("png-checksum-of-transparency-wrong.png", "unreadable",
    lambda name: changed(colour_png(name, chunk(b"tRNS", bytes(6))), 33 + 8 + 6, b"\1\2\3\4"))  # fmt: skip


def scans(count: int, *, side: bytes | None = None) -> Callable[[str], bytes]:
    """A progressive JPEG whose last scan is repeated; with another ``side``, its header says so, not its data."""

    def make(name: str) -> bytes:
        data = jpeg(picture(name), progressive=True)
        tables, end = data.rindex(b"\xff\xc4"), data.rindex(b"\xff\xd9")
        data = data[:end] + data[tables:end] * count + data[end:]
        return changed(data, data.index(b"\xff\xc2") + 5, 2 * side) if side else data

    return make


bad("jpeg-of-5000-scans.jpg", "too-large", scans(5000))
bad("jpeg-of-60-scans-10000x10000.jpg", "too-large", scans(50, side=struct.pack(">H", 10_000)))
bad("jpeg-of-many-segments.jpg", "too-large",
    lambda name: changed(jpeg(picture(name)), 2, b"\xff\xfe\0\2" * 210_000))  # fmt: skip
bad("png-of-many-chunks.png", "too-large", lambda name: colour_png(name, chunk(b"tEXt", b"a\0b") * 210_000))
bad("gif-of-many-blocks.gif", "too-large", b"GIF89a\4\0\4\0\0\0\0\x21\xfe" + b"\1x" * 210_000 + b"\0,")
bad("pixmap-after-a-comment.ppm", "too-large", b"P6\n#" + b"x" * 48_000_000 + b"\n2 2\n255\n" + bytes(12))
bad("pixmap-as-text.ppm", "too-large", b"P3\n3000 3000\n255\n" + b"0 " * 27_000_000)
bad("pixmap-of-1000-cut.ppm", "truncated", b"P6 24 16 1000\n" + bytes(2000))
bad(
    "tiff-of-many-tiles.tif",
    "too-large",
    b"II*\0" + struct.pack("<IHHHII", 8, 1, 324, 4, 250_000, 26) + bytes(1_000_100),
)
bad("tiff-big-of-many-strips.tif", "too-large",
    b"MM\0+\0\x08\0\0" + struct.pack(">QQHHQQ", 16, 1, 273, 4, 250_000, 64) + bytes(1_000_100))  # fmt: skip
bad("jpeg-2000-of-60-million-pixels.jp2", "too-large",
    lambda name: encoded(picture(name), "JPEG2000").replace(struct.pack(">II", 16, 24), struct.pack(">II", 6000, 10_000))
    .replace(struct.pack(">II", 24, 16), struct.pack(">II", 10_000, 6000)))  # fmt: skip

bad("gif-cut.gif", "truncated", cut("GIF", 2000))
bad("gif-without-picture.gif", "truncated", b"GIF89a\4\0\4\0\0\0\0;")
bad("gif-bomb.gif", "too-large", lambda name: changed(encoded(indexed(name), "GIF"), 6, b"\xff\xff\xff\xff"))
bad("webp-cut.webp", "truncated", cut("WEBP", -2))
bad("tiff-cut.tif", "truncated", cut("TIFF", -2))
bad("tiff-lzw-cut.tif", "truncated", cut("TIFF", -2, compression="tiff_lzw"))
bad("tiff-of-8-bytes.tif", "truncated", b"II*\0\x08\0\0\0")
bad("jpeg-2000-cut.jp2", "truncated", cut("JPEG2000", -2))
bad("bmp-cut.bmp", "truncated", cut("BMP", -2))
bad("bmp-run-lengths-cut.bmp", "truncated", bmp(b"\x08\1\0\0", 8, compression=1, palette=bytes(range(16))))
bad("bmp-no-width.bmp", "unreadable", bmp(bytes(100), 24, width=0))
bad("bmp-width-below-0.bmp", "too-large", bmp(bytes(100), 24, width=-24))
bad("pixmap-cut.ppm", "truncated", b"P6 24 16 255\n" + bytes(1000))
bad("pixmap-no-width.ppm", "unreadable", b"P6 0 16 255\n" + bytes(1000))


# --- bad already as a file --------------------------------------------------------------------------------


def enormous(path: Path) -> None:
    path.write_bytes(PNG_START)
    os.truncate(path, MAX_BYTES + 1)  # a hole: takes no room on the disk


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "link-to-nothing.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "missing"),
    "link-to-itself.jpg": (lambda path: path.symlink_to(path.name), "missing"),
    "pipe.jpg": (os.mkfifo, "not-a-file"),
    "link-to-a-device.jpg": (lambda path: path.symlink_to("/dev/zero"), "not-a-file"),
    "forbidden.jpg": (lambda path: path.write_bytes(jpeg(noise())), "no-permission"),
    "enormous.png": (enormous, "too-large"),
    "vanished.jpg": (Path.touch, "missing"),
}


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """``forbidden.jpg`` may not be opened; root, who may run the tests, would not mind its mode."""
    real = os.open

    def refuse(path: str | Path, *arguments: int, **options: int) -> int:
        if os.fspath(path).endswith("forbidden.jpg"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)


# --- one by one -------------------------------------------------------------------------------------------


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **_: object) -> None:
        pytest.fail(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)


def test_the_table_is_wide() -> None:
    assert len(GOOD) + len(BAD) + len(PLACES) >= 100
    assert {reason for _, reason in [*BAD.values(), *PLACES.values()]} == set(REASONS) - {"no-memory"}


@pytest.mark.parametrize("name", GOOD)
def test_odd_file_gives_its_pixels(name: str) -> None:
    make, tolerance = GOOD[name]
    data, expected = make(name)
    height, width = expected.shape[:2]
    result = decode_image(data, PixelRule(min(height, 4096), min(width, 4096)))
    assert (result.width, result.height) == (width, height)
    difference = np.abs(result.pixels.astype(int) - expected[:4096, :4096].astype(int))
    assert difference.max() <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_file_gives_its_reason(name: str, no_programs: None) -> None:
    make, reason = BAD[name]
    with pytest.raises(UnreadableImageError) as caught:
        decode_image(make(name), PixelRule(8, 8))
    assert (caught.value.reason, bool(caught.value.detail)) == (reason, True)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", PLACES)
def test_bad_place_gives_its_reason(name: str, tmp_path: Path, forbidden: None) -> None:
    make, reason = PLACES[name]
    make(tmp_path / name)
    if name == "vanished.jpg":
        (tmp_path / name).unlink()
    with pytest.raises(UnreadableImageError, match=name) as caught:
        read_bytes(tmp_path / name)
    assert caught.value.reason == reason


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UnreadableImageError, match=r"folder\.jpg is a folder") as caught:
        read_bytes(tmp_path / "folder.jpg")
    assert caught.value.reason == "not-a-file"


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size looked up before reading is no longer true: all is read that there is, up to the limit."""
    path, content = tmp_path / "a.bin", bytes(range(250)) * 1000
    path.write_bytes(content)
    real = os.fstat

    def earlier(descriptor: int) -> os.stat_result:
        fields = list(real(descriptor))
        fields[6] = 10  # st_size
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", earlier)
    assert read_bytes(path) == read_bytes(path, max_bytes=len(content)) == content
    with pytest.raises(UnreadableImageError, match=r"grew beyond the limit of 249999") as caught:
        read_bytes(path, max_bytes=len(content) - 1)
    assert caught.value.reason == "too-large"


# --- all at once ------------------------------------------------------------------------------------------


class NumpyNetwork:
    """Channel means; notes how many images go through it."""

    backbone_argument, weights_argument = "numpy", "none"
    license: str | None = None
    row_bytes = 12

    def __init__(self) -> None:
        self.recipes = (recipe(),)
        self.batches: list[int] = []

    def engine(self, recipes: Sequence[Recipe], *, batch_size: int, device: str) -> Callable[[np.ndarray], object]:
        def infer(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            self.batches.append(len(batch))
            return numpy_network(batch)

        return as_engine(infer)


def extract(images: ImageSet, out: Path, network: NumpyNetwork) -> ExtractionResult:
    options = {"batch_size": 7, "shard_rows": 28, "workers": 4, "max_unreadable": 0.9}
    return Extraction(images, network, out, ExtractionOptions(**options)).run()  # type: ignore[arg-type]


def channel_means(pixels: np.ndarray) -> np.ndarray:
    """The features of an image, from the pixels it should have and not from its file."""
    resized = Image.fromarray(np.ascontiguousarray(pixels)).resize((8, 8), Image.Resampling.BILINEAR)
    return np.asarray(resized).astype(np.float64).mean(axis=(0, 1))


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_all_of_them_among_normal_images_in_one_run(tmp_path: Path, forbidden: None) -> None:
    root, classes = tmp_path / "images", ("bird", "cat", "dog")
    paint_folder(root, dict.fromkeys(classes, 9), start=1000)
    paint_folder(root, {"cat/folder.jpg": 1}, start=1500)  # a folder of such a name is entered
    expected = {
        path.relative_to(root).as_posix(): (channel_means(np.asarray(Image.open(path))), 0.0)
        for path in root.rglob("*.png")
    }
    reasons = {}
    for number, name in enumerate(sorted([*GOOD, *BAD, *PLACES])):
        path = root / classes[number % 3] / name
        if name in GOOD:
            make, tolerance = GOOD[name]
            data, pixels = make(name)
            path.write_bytes(data)
            expected[path.relative_to(root).as_posix()] = channel_means(pixels), tolerance
            continue
        if name in BAD:
            path.write_bytes(BAD[name][0](name))
        else:
            PLACES[name][0](path)
        reasons[path.relative_to(root).as_posix()] = (BAD.get(name) or PLACES[name])[1]
    images = scan(root)
    next(root.rglob("vanished.jpg")).unlink()

    network = NumpyNetwork()
    result = extract(images, tmp_path / "f.h5", network)
    store = result.store
    assert dict(zip(store.quarantine.paths, store.quarantine.reasons, strict=True)) == reasons
    assert store.images.paths == tuple(sorted(expected))
    assert sum(network.batches) == result.inferred == len(store) == len(expected)
    assert store.classes == classes
    assert [store.classes[label] for label in store.images.labels] == [
        path.split("/")[0] for path in store.images.paths
    ]
    rows = store.array("last.avg")[:, 0]
    for image, row, digest in zip(store.images.paths, rows, store.images.sha256, strict=True):
        means, tolerance = expected[image]
        np.testing.assert_allclose(row, means, rtol=1e-6, atol=tolerance + 1e-6, err_msg=image)
        assert hashlib.sha256((root / image).read_bytes()).digest() == digest.tobytes()
    # No row would have passed for another: they differ by more than is tolerated.
    distances = np.abs(rows[:, None] - rows[None]).max(axis=2) + np.diag(np.full(len(rows), np.inf))
    tolerances = np.array([expected[path][1] for path in store.images.paths])
    assert (distances > tolerances).all()

    again = extract(images, tmp_path / "f.h5", network)
    assert (again.inferred, again.written, sum(network.batches)) == (0, False, len(expected))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_bad_images_under_odd_names_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = paint_folder(tmp_path / "images", {"a": 4, "b": 4})
    names = ["line\nbreak.jpg", "\x1b[31mred.jpg", "Ünïcode 图.jpg", " space .jpg", os.fsdecode(b"\xff\xfe.jpg")]
    for name in names:
        (root / "a" / name).write_bytes(b"no image")
    store = extract(scan(root), tmp_path / "f.h5", NumpyNetwork()).store
    assert sorted(store.quarantine.paths) == sorted(f"a/{name}" for name in names)
    assert set(store.quarantine.reasons) == {"not-an-image"}
    assert len(store) == 8
    assert "\x1b" not in caplog.text
    assert "line\nbreak" not in caplog.text
