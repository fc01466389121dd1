"""Pixels beyond 8-bit RGB: files of many channels, deep values and DICOM, with values worked out by hand."""

from __future__ import annotations

import importlib
import io
import itertools
import logging
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import NumpyNetwork, recipe
from PIL import Image

from features.errors import ConfigurationError, UnreadableImageError
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.pixels.decode import decode_image
from features.recipe import NetworkOptions, PixelRule, Recipe
from features.sources.scan import scan
from features.store.reader import FeatureStore


def decoded(data: bytes, height: int, width: int, **options: Any) -> list[list[list[int]]]:
    """Pixels at their own size, so nothing is resized."""
    pixels: list[list[list[int]]] = decode_image(data, PixelRule(height, width, **options)).pixels.tolist()
    return pixels


def npy(values: Any, dtype: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(values, dtype))
    return stream.getvalue()


def lzw(data: bytes) -> bytes:
    """TIFF's LZW without a dictionary: a clear code before every 200 bytes, then each byte as a code of 9 bits."""
    codes = [code for start in range(0, len(data), 200) for code in (256, *data[start : start + 200])] + [257]
    bits = "".join(f"{code:09b}" for code in codes)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8))


PACKERS: dict[int, Callable[[bytes], bytes]] = {1: bytes, 5: lzw, 8: zlib.compress}


def tiff(
    *pictures: np.ndarray,
    order: str = "<",
    compression: int = 1,
    predictor: int = 1,
    apart: bool = False,
    rows: int | None = None,
    tile: int = 0,
    photometric: int = 1,
    orientation: int = 1,
) -> bytes:
    """A TIFF of arrays (h, w, c), written by the specification (TIFF 6.0), strip by strip or tile by tile."""
    out = bytearray(b"II" if order == "<" else b"MM") + struct.pack(f"{order}HL", 42, 8)
    for number, values in enumerate(pictures):
        height, width, samples = values.shape
        numbers = np.diff(values, axis=1, prepend=np.zeros_like(values[:, :1])) if predictor == 2 else values
        numbers = numbers.astype(values.dtype.newbyteorder(order))
        planes = [numbers[..., k : k + 1] for k in range(samples)] if apart else [numbers]
        step = tile or rows or height
        pieces = []
        for plane in planes:
            across = range(0, width, tile) if tile else [0]
            for top, left in itertools.product(range(0, height, step), across):
                piece = plane[top : top + step, left : left + (tile or width)]
                if tile:
                    piece = np.pad(piece, ((0, tile - piece.shape[0]), (0, tile - piece.shape[1]), (0, 0)))
                pieces.append(PACKERS[compression](piece.tobytes()))
        kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
        bits, where, sizes = [values.dtype.itemsize * 8] * samples, (324 if tile else 273), (325 if tile else 279)
        tags: dict[int, tuple[str, list[int]]] = {
            256: ("L", [width]), 257: ("L", [height]), 258: ("H", bits), 259: ("H", [compression]), 262: ("H", [photometric]),
            274: ("H", [orientation]), 277: ("H", [samples]), 284: ("H", [2 if apart else 1]), 317: ("H", [predictor]),
            339: ("H", [kind] * samples), where: ("L", [0] * len(pieces)), sizes: ("L", [len(piece) for piece in pieces]),
        }  # fmt: skip
        tags |= {322: ("L", [tile]), 323: ("L", [tile])} if tile else {278: ("L", [step])}
        start = len(out) + 2 + 12 * len(tags) + 4
        beyond = {tag: struct.pack(f"{order}{len(v)}{t}", *v) for tag, (t, v) in tags.items()}
        lists_size = sum(len(data) for data in beyond.values() if len(data) > 4)
        offsets = np.cumsum([start + lists_size, *map(len, pieces)]).tolist()
        end = offsets.pop()
        beyond[where] = struct.pack(f"{order}{len(offsets)}L", *offsets)
        out += struct.pack(f"{order}H", len(tags))
        lists = b""
        for tag in sorted(tags):
            letter, held = tags[tag][0], beyond[tag]
            value = held.ljust(4, b"\0") if len(held) <= 4 else struct.pack(f"{order}L", start + len(lists))
            lists += held if len(held) > 4 else b""
            out += struct.pack(f"{order}HHL", tag, 3 if letter == "H" else 4, len(tags[tag][1])) + value
        out += struct.pack(f"{order}L", end if number + 1 < len(pictures) else 0) + lists + b"".join(pieces)
    return bytes(out)


def dicom(
    values: np.ndarray, *, syntax: str = "1.2.840.10008.1.2.1", pixels: bytes | None = None, **tags: Any
) -> bytes:
    """A DICOM file of values (frames, h, w) or (h, w), with a patient's name that nobody must keep."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    file = pydicom.dataset.Dataset()
    file.file_meta = meta
    file.PatientName, file.PatientBirthDate = "Doe^Johanna", "19700102"
    bits = values.dtype.itemsize * 8
    frames = values if values.ndim == 3 else values[None]
    file.Rows, file.Columns = frames.shape[1:3]
    if len(frames) > 1:
        file.NumberOfFrames = len(frames)
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = bits
    file.HighBit, file.PixelRepresentation = bits - 1, int(values.dtype.kind == "i")
    for name, value in tags.items():
        setattr(file, name, value)
    file.HighBit = file.BitsStored - 1
    encapsulate = importlib.import_module("pydicom.encaps").encapsulate
    file.PixelData = values.tobytes() if pixels is None else encapsulate([pixels])
    file["PixelData"].VR = "OB" if bits == 8 or pixels is not None else "OW"
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, file, enforce_file_format=True)
    return stream.getvalue()


# --- kinds of files, and the pixels that they give ---------------------------------------------------------


def rle(*planes: bytes) -> bytes:
    """DICOM's RLE (PS3.5, annex G) of planes of bytes without a run, the highest byte of the values first."""
    parts = [bytes([len(plane) - 1]) + plane + bytes((len(plane) + 1) % 2) for plane in planes]
    offsets = np.cumsum([64, *map(len, parts)])[:-1].tolist()
    return struct.pack("<16L", len(parts), *offsets, *[0] * (15 - len(parts))) + b"".join(parts)


def saved(values: Any, dtype: Any, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.array(values, dtype)).save(stream, kind, **options)
    return stream.getvalue()


def grey(*rows: tuple[int, ...]) -> list[list[list[int]]]:
    return [[[value] * 3 for value in row] for row in rows]


def tiles() -> bytes:
    values = np.zeros((17, 18, 2), np.int16)
    values[16, 17], values[0, 16] = (-1000, 1000), (1000, -500)
    return tiff(values, tile=16, compression=8)


def colours(*pixels: tuple[int, ...], apart: int = 0, space: str = "RGB") -> bytes:
    """A DICOM file of one row of colours."""
    values = np.array(pixels, np.uint8)
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": space, "PlanarConfiguration": apart}
    held = np.ascontiguousarray(values.T if apart else values)
    return dicom(held, Rows=1, Columns=len(values), **tags)  # type: ignore[arg-type]


DEEP = [[0, 128, 129, 257 * 200, 65535]]  # 257 is 65535 / 255
ON_WHITE_65535 = grey((0, 0, 1, 200, 255))  # 128 / 257 is rounded down, 129 / 257 up
FIVE = [[[0, 255, 510, 9999, 1], [1, 2, 3, 0, 0]]]
PAIRS = [[[0, 2], [2, 4], [4, 6], [6, 8], [100, np.nan]]]  # means 1 3 5 7 and none
CT = np.array([[-24, 1000, 1040, 1064, 3000]], np.int16)  # in Hounsfield units -1048 -24 16 40 1976
RESCALED = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "WindowCenter": "40.5", "WindowWidth": "81"}
EXACT = {"WindowCenter": ["50", "9"], "WindowWidth": ["100", "1"], "VOILUTFunction": "LINEAR_EXACT"}
PAGES = [np.full((1, 2, 1), value, np.uint16) for value in (100, 200, 300)]
FLOATS = np.array([[[0.0, -1.0], [0.5, 1.0]], [[1.0, 0.0], [2.0, np.nan]]], np.float32)
SIX = np.arange(12, dtype=np.uint8).reshape(2, 1, 6)
FOUR = np.array([[[0, 1000, 2000, 40000], [100, 900, 60000, 7]]], np.uint16)

# Kind -> its file, and what options make of it. All numbers were worked out by hand; a half is rounded up.
KINDS: dict[str, tuple[Callable[[], bytes], list[tuple[dict[str, Any], list[list[list[int]]]]]]] = {
    "NPY of bytes": (lambda: npy([[[1, 2, 3], [4, 5, 6]]], np.uint8), [({}, [[[1, 2, 3], [4, 5, 6]]])]),
    "NPY of bytes, grey": (lambda: npy([[7, 250]], np.uint8), [({}, grey((7, 250)))]),
    "NPY of a mask": (lambda: npy([[True, False]], np.bool_), [({}, grey((255, 0)))]),
    "NPY of 16 bits": (lambda: npy(DEEP, np.uint16), [({}, ON_WHITE_65535)]),
    "NPY of 16 bits, big-endian": (lambda: npy(DEEP, ">u2"), [({}, ON_WHITE_65535)]),
    "NPY of five channels": (lambda: npy(FIVE, np.uint16), [
        ({"channels": "3,2,1", "scale": "0:510"}, [[[255, 128, 0], [2, 1, 1]]]),  # 127.5; 1.5 1 0.5
        ({"channels": "4", "scale": "0:510"}, grey((255, 0))),
    ]),
    "NPY of floats": (lambda: npy(PAIRS, np.float32), [
        ({"channels": "mean", "scale": "percentile:0,100"}, grey((0, 85, 170, 255, 0))),  # from 1 to 7
        ({"channels": "first", "scale": "percentile:25,75"}, grey((0, 0, 128, 255, 255))),  # from 2 to 6
    ]),
    "NPY with a sign, in the order of Fortran": (lambda: npy(np.asfortranarray([[1, -4], [2, 4]]), np.int16), [
        ({"scale": "-4:4"}, grey((159, 0), (191, 255))),  # 5 and 6 eighths: 159.375 191.25
    ]),
    "NPY of 32 bits": (lambda: npy([[0, 2**31]], np.uint32), [({"scale": "dtype"}, grey((0, 128)))]),
    "PNG of 16 bits": (lambda: saved(DEEP, np.uint16, "PNG"), [
        ({}, ON_WHITE_65535), ({"scale": "0:258"}, grey((0, 127, 128, 255, 255))),  # 126.5 127.5
    ]),
    "PNG of RGB": (lambda: saved([[[10, 20, 30]]], np.uint8, "PNG"), [
        ({"channels": "3,2,1"}, [[[30, 20, 10]]]), ({"channels": "mean", "scale": "0:40"}, grey((128,))),
    ]),
    "PPM of 16 bits": (lambda: b"P6 2 1 65535\n" + bytes([0, 0, 128, 0, 255, 255, 1, 1, 0, 127, 200, 200]), [
        ({}, [[[0, 128, 255], [1, 0, 200]]]),
    ]),
    "TIFF of bytes": (lambda: saved([[10, 60]], np.uint8, "TIFF"), [({"scale": "10:60"}, grey((0, 255)))]),
    "TIFF of 16 bits": (lambda: saved(DEEP, np.uint16, "TIFF"), [
        ({}, ON_WHITE_65535), ({"scale": "0:258"}, grey((0, 127, 128, 255, 255))),
    ]),
    "BigTIFF": (lambda: saved(DEEP, np.uint16, "TIFF", big_tiff=True), [
        ({}, ON_WHITE_65535), ({"scale": "0:258"}, grey((0, 127, 128, 255, 255))),
    ]),
    "TIFF of six channels": (lambda: tiff(SIX, rows=1), [
        ({"channels": "6,1,2"}, [[[5, 0, 1]], [[11, 6, 7]]]),
        ({"channels": "mean", "scale": "0:255"}, grey((3,), (9,))),  # 2.5 8.5
    ]),
    "TIFF of 16 bits and four channels, deflate, predictor, big-endian": (
        lambda: tiff(FOUR, order=">", compression=8, predictor=2, photometric=2), [
            ({"channels": "1,2,3", "scale": "0:2000"}, [[[0, 128, 255], [13, 115, 255]]]),  # 12.75 114.75
            ({"channels": "4", "scale": "dtype"}, grey((156, 0))),  # 155.6
        ]),
    "TIFF of floats, channels apart, LZW": (lambda: tiff(FLOATS, compression=5, apart=True, rows=1), [
        ({"channels": "1", "scale": "0:1"}, grey((0, 128), (255, 255))),
        ({"channels": "2", "scale": "-1:1"}, grey((0, 255), (128, 0))),
    ]),
    "TIFF of tiles, with a sign": (tiles, [
        ({"channels": "2,1,1", "scale": "-1000:1000"}, [
            [[128] * 3] * 16 + [[64, 255, 255], [128] * 3], *[[[128] * 3] * 18] * 15,  # a quarter of 255 is 63.75
            [[128] * 3] * 17 + [[255, 0, 0]],
        ]),
    ]),
    "TIFF of three grey pictures": (lambda: tiff(*PAGES), [
        ({"channels": "3,1,2", "scale": "0:400"}, [[[191, 64, 128]] * 2]),  # 191.25 63.75 127.5
        ({"channels": "mean", "scale": "0:400"}, grey((128, 128))),
        ({}, grey((0, 0))),  # the first, of 65535: 100 / 257
    ]),
    "TIFF on its side": (lambda: tiff(np.array([[[0], [65535]]], np.uint16), orientation=6), [
        ({"scale": "dtype"}, grey((0,), (255,))),
    ]),
    "TIFF whose 0 is white": (lambda: tiff(np.array([[[0], [65535]]], np.uint16), photometric=0), [
        ({"scale": "dtype"}, grey((255, 0))),
    ]),
    "DICOM, a CT": (lambda: dicom(CT, **RESCALED), [
        ({}, grey((0, 0, 51, 128, 255))),  # the window makes 0 black and 80 white (PS3.3, C.11.2.1.2)
        ({"scale": "-24:1976"}, grey((0, 0, 5, 8, 255))),  # 5.1 8.16
    ]),
    "DICOM, exact window, the first of two": (lambda: dicom(np.array([[0, 20, 100]], np.uint16), **EXACT), [
        ({}, grey((0, 51, 255))),  # from 0 to 100 (PS3.3, C.11.2.1.3.2)
    ]),
    "DICOM, 12 bits with a sign": (lambda: dicom(np.array([[-2048, 0, 2047]], np.int16), BitsStored=12), [
        ({}, grey((0, 128, 255))),  # 127.53
    ]),
    "DICOM, MONOCHROME1": (
        lambda: dicom(np.array([[0, 2048, 4095]], np.uint16), PhotometricInterpretation="MONOCHROME1", BitsStored=12), [
            ({}, grey((255, 127, 0))),  # 255 - 127.53
        ]),
    "DICOM, three frames": (lambda: dicom(np.array([[[1, 2]], [[3, 4]], [[5, 6]]], np.uint8)), [
        ({"frame": 2}, grey((3, 4))), ({"frame": 3}, grey((5, 6))),
    ]),
    "DICOM of RGB": (lambda: colours((1, 2, 3), (4, 5, 6)), [({}, [[[1, 2, 3], [4, 5, 6]]])]),
    "DICOM of RGB, channels apart": (lambda: colours((1, 2, 3), (4, 5, 6), apart=1), [({}, [[[1, 2, 3], [4, 5, 6]]])]),
    "DICOM of YBR": (lambda: colours((76, 85, 255), (128, 128, 128), space="YBR_FULL"), [
        ({}, [[[254, 0, 0], [128, 128, 128]]]),  # 76 + 1.402 x 127 is 254.05, the others 0.1 and -0.2
    ]),
    "DICOM, RLE": (
        lambda: dicom(
            np.array([[0, 1000, 4095]], np.uint16), BitsStored=12, syntax="1.2.840.10008.1.2.5",
            pixels=rle(bytes([0, 3, 15]), bytes([0, 232, 255])),  # 1000 is 3 x 256 + 232
        ), [({}, grey((0, 62, 255)))]),  # 62.27
    "DICOM, JPEG": (
        lambda: dicom(
            np.zeros((8, 8), np.uint8), syntax="1.2.840.10008.1.2.4.50",
            pixels=saved([[130] * 8] * 8, np.uint8, "JPEG", quality=100),
        ), [({}, grey(*[(130,) * 8] * 8))]),
    "DICOM, JPEG 2000": (
        lambda: dicom(
            np.zeros((2, 3), np.uint8), syntax="1.2.840.10008.1.2.4.90",
            pixels=saved([[0, 1, 2], [3, 4, 255]], np.uint8, "JPEG2000", irreversible=False, no_jp2=True),
        ), [({}, grey((0, 1, 2), (3, 4, 255)))]),
}  # fmt: skip


def test_how_many_kinds_of_files_there_are() -> None:
    assert Counter(re.split("[ ,]", kind)[0] for kind in KINDS) == {
        "NPY": 9, "PNG": 2, "PPM": 1, "TIFF": 9, "BigTIFF": 1, "DICOM": 11,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_of_each_kind_are_those_worked_out_by_hand(kind: str) -> None:
    make, expected = KINDS[kind]
    data = make()
    for options, pixels in expected:
        assert decoded(data, len(pixels), len(pixels[0]), **options) == pixels, options


# --- refusals and the recipe --------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (npy(np.zeros((2, 2, 6)), np.uint8), {}, r"NPY: 6 channels, expected 1 or 3\. Choose .* --channels 3,2,1"),
        (npy(np.zeros((2, 2, 2)), np.uint8), {"channels": "3"}, "NPY: no channel 3, it has 2"),
        (npy([[0.5]], np.float32), {}, r"NPY: float32 values, .* --scale LOW:HIGH"),
        (npy([[5]], np.int16), {"channels": "1"}, r"NPY: int16 values, .* --scale LOW:HIGH"),
        (npy([[[[1]]]], np.uint8), {}, "expected numbers, .*; save each image in a file of its own"),
        (npy([["a"]], "U1"), {}, "the array is <U1"),
        (npy(np.zeros((0, 4)), np.uint8), {}, r"the array is uint8 \(0, 4\)"),
        (npy([[1, 2]], np.uint8)[:-1], {}, "truncated: NPY: the array is declared as"),
        (tiff(np.zeros((2, 2, 6), np.uint8)), {}, "TIFF: 6 channels of uint8; choose .* --channels 3,2,1"),
        (tiff(np.zeros((2, 2, 2), np.float64)), {}, "TIFF: 2 channels of float64; .* --scale LOW:HIGH"),
        (tiff(np.zeros((9, 9, 6), np.uint8))[:-20], {"channels": "1"}, "truncated: TIFF"),
        (b"II*\0", {"channels": "1"}, "truncated"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_with_the_option_that_reads_it(
    data: bytes, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UnreadableImageError, match=expected):
        decode_image(data, PixelRule(2, 2, **options))


def test_no_declared_size_is_believed() -> None:
    head = npy(np.zeros((2, 2)), np.uint8).replace(b"(2, 2)", b"(99999, 99999)"[:14])
    with pytest.raises(UnreadableImageError, match="declared"):
        decode_image(head, PixelRule(2, 2))
    bomb = tiff(np.zeros((64, 64, 6), np.uint8), compression=8)
    wide = bomb.replace(struct.pack("<HHLL", 256, 4, 1, 64), struct.pack("<HHLL", 256, 4, 1, 60_000))
    with pytest.raises(UnreadableImageError):
        decode_image(wide, PixelRule(2, 2, channels="1"))
    with pytest.raises(UnreadableImageError, match="too-large: 11x10 pixels"):
        decode_image(npy(np.zeros((10, 11)), np.uint8), PixelRule(2, 2), max_pixels=100)


def test_dicom_that_is_not_read_is_named() -> None:
    values = np.zeros((2, 2), np.uint8)
    for tags, expected in (
        ({"syntax": "1.2.840.10008.1.2.4.70", "pixels": b"\xff\xd8"}, "DICOM: compressed as JPEG Lossless"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "DICOM: expected one of MONOCHROME1"),
        ({"BitsAllocated": 16, "BitsStored": 16}, r"DICOM: damaged \(\w+\)$"),
    ):
        with pytest.raises(UnreadableImageError, match=expected):
            decode_image(dicom(values, **tags), PixelRule(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UnreadableImageError, match="DICOM: no frame 3, it has 1"):
        decode_image(dicom(values), PixelRule(2, 2, frame=3))
    with pytest.raises(UnreadableImageError, match="DICOM: 3 frames; take one of them with --frame 1 to --frame 3"):
        decode_image(dicom(np.zeros((3, 2, 2), np.uint8)), PixelRule(2, 2))
    curved = dicom(values, WindowCenter="50", WindowWidth="100", VOILUTFunction="SIGMOID")
    with pytest.raises(UnreadableImageError, match="DICOM: uint8 values, of which nothing says what is black"):
        decode_image(curved, PixelRule(2, 2))


def test_no_name_of_a_patient_gets_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for number in range(4):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = dicom(np.full((4, 4), number * 1000, np.uint16))
        path.write_bytes(data if number else data[:-10])  # one is damaged
    options = ExtractionOptions(max_unreadable=1, layout="sharded")
    Extraction(scan(tmp_path / "images"), NumpyNetwork((recipe(),)), tmp_path / "out" / "s.h5", options).run()  # type: ignore[arg-type]
    store = FeatureStore.open(tmp_path / "out" / "s.h5")
    assert len(store) == 3
    assert store.quarantine.paths == ("a/0.dcm",)
    files = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 2
    for text in ("Doe", "Johanna", "19700102"):
        assert not any(text.encode() in content for content in files)
        assert text not in caplog.text


def test_options_are_part_of_the_recipe_and_old_fingerprints_stay() -> None:
    plain = recipe()
    assert "channels" not in plain.canonical
    chosen = Recipe.from_dict({**plain.to_dict(), "channels": "3,2,1", "scale": "0:4095", "frame": 2})
    assert chosen.format_version == 2
    assert plain.format_version == 1
    assert chosen.difference(plain).keys() == {"channels", "scale", "frame"}
    assert Recipe.from_dict(chosen.to_dict()) == chosen
    same = PixelRule(8, 8, channels=" 3, 2,1", scale="0.0:4095.0", frame=2)
    assert same == chosen.pixels
    again = PixelRule.of(chosen.options("numpy", "none"), 8)
    assert again == chosen.pixels


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"channels": "1,2"}, "channels: received '1,2', expected three numbers counted from 1"),
        ({"channels": "0"}, "channels: received '0'"),
        ({"channels": "rgb"}, "channels: received 'rgb'"),
        ({"scale": "5:5"}, r"scale: received '5:5', expected LOW:HIGH"),
        ({"scale": "percentile:99,1"}, "scale: received"),
        ({"scale": "percentile:1,101"}, "scale: received"),
        ({"scale": "0:inf"}, "scale: received"),
        ({"frame": -1}, "frame: received -1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        NetworkOptions(**options)
