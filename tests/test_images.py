"""Every pixel value is asserted: a wrong colour or a turned image trains a worse model without a word."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from features.errors import ConfigurationError, UnreadableImageError
from features.pixels import decode as images
from features.pixels.decode import (
    REASON_MEANINGS,
    REASONS,
    crop_window,
    decode_image,
    pad_window,
    read_bytes,
)
from features.recipe import PixelRule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on files damaged on purpose

# 2 rows x 3 columns, all different, so that each of the eight orientations gives another picture.
SMALL = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 255, 255], [255, 0, 255]]], dtype=np.uint8
)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, **limits: int) -> np.ndarray:
    """Pixels at the image's own size, so that no resampling hides a value."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    pixels = decode_image(data, PixelRule(height, width), **limits).pixels
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    return pixels


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def refusal(data: bytes, **limits: int) -> UnreadableImageError:
    with pytest.raises(UnreadableImageError) as caught:
        decode_image(data, PixelRule(8, 8), **limits)
    assert caught.value.reason in REASONS
    return caught.value


# --- orientation ------------------------------------------------------------------------------------------

ORIENTED = {  # EXIF 2.3, table of tag 274: where row 0 and column 0 of the file belong
    1: SMALL,
    2: SMALL[:, ::-1],
    3: SMALL[::-1, ::-1],
    4: SMALL[::-1],
    5: SMALL.transpose(1, 0, 2),
    6: SMALL.transpose(1, 0, 2)[:, ::-1],
    7: SMALL.transpose(1, 0, 2)[::-1, ::-1],
    8: SMALL.transpose(1, 0, 2)[::-1],
}


def test_a_refusal_shows_only_bytes_of_the_file() -> None:
    assert str(refusal(b"hello\n")).startswith(r"not-an-image: the first bytes, b'hello\n', match no known format")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(SMALL, kind, exif=exif.tobytes(), **({"lossless": True} if kind == "WEBP" else {}))
    expected = ORIENTED[orientation]
    height, width = expected.shape[:2]
    result = decode_image(data, PixelRule(height, width))
    np.testing.assert_array_equal(result.pixels, expected)
    assert (result.width, result.height) == (width, height)


def test_orientation_of_a_jpeg() -> None:
    left_dark = np.zeros((16, 32, 3), dtype=np.uint8)
    left_dark[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: left becomes top
    result = decode_image(encoded(left_dark, "JPEG", exif=exif.tobytes()), PixelRule(32, 16))
    assert (result.width, result.height) == (16, 32)
    assert result.pixels[:14].max() < 10
    assert result.pixels[18:].min() > 245


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense" * 9])
def test_damaged_exif_does_not_cost_the_image(exif: bytes) -> None:
    grey = np.full((8, 8, 3), 90, dtype=np.uint8)
    assert np.abs(decoded(encoded(grey, "JPEG", exif=exif)).astype(int) - 90).max() <= 1


def test_unknown_orientation_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(decoded(encoded(SMALL, exif=exif.tobytes())), SMALL)


# --- colour -----------------------------------------------------------------------------------------------


def grey_row(*values: int) -> np.ndarray:
    return np.repeat(np.array([values], dtype=np.uint8)[:, :, None], 3, axis=2)


def test_grey_one_bit_and_palette() -> None:
    np.testing.assert_array_equal(decoded(encoded(np.array([[0, 7, 255]], np.uint8))), grey_row(0, 7, 255))
    one_bit = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(decoded(encoded(one_bit)), grey_row(0, 255, 255))
    palette = Image.fromarray(SMALL).quantize(6)
    assert palette.mode == "P"
    np.testing.assert_array_equal(decoded(encoded(palette)), SMALL)


def test_transparency_is_laid_over_white() -> None:
    colours = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 51]]], np.uint8)
    # alpha 51/255 = 0.2: 0.2 * (10, 20, 30) + 0.8 * 255 = (206, 208, 210)
    expected = np.array([[[10, 20, 30], [255, 255, 255], [206, 208, 210]]], np.uint8)
    np.testing.assert_array_equal(decoded(encoded(colours)), expected)
    grey_alpha = Image.fromarray(np.array([[[100, 255], [100, 0], [100, 51]]], np.uint8))
    assert grey_alpha.mode == "LA"
    np.testing.assert_array_equal(decoded(encoded(grey_alpha)), grey_row(100, 255, 224))


def test_transparency_outside_an_alpha_channel() -> None:
    palette = Image.fromarray(SMALL).quantize(6)
    index = palette.getpixel((1, 0))
    expected = SMALL.copy()
    expected[0, 1] = 255
    np.testing.assert_array_equal(decoded(encoded(palette, transparency=index)), expected)  # one index
    alphas = bytes(0 if entry == index else 255 for entry in range(6))
    np.testing.assert_array_equal(decoded(encoded(palette, transparency=alphas)), expected)  # a table
    np.testing.assert_array_equal(decoded(encoded(palette, "GIF", transparency=index)), expected)
    np.testing.assert_array_equal(decoded(encoded(SMALL, transparency=(0, 255, 0))), expected)  # one colour
    grey = encoded(np.array([[0, 7, 255]], np.uint8), transparency=7)
    np.testing.assert_array_equal(decoded(grey), grey_row(0, 255, 255))


def test_cmyk_inverts_and_darkens() -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 255, 0, 128]]], np.uint8)
    picture = Image.fromarray(inks, mode="CMYK")
    expected = np.array([[[255, 255, 255], [0, 255, 255], [0, 0, 0], [127, 0, 127]]], np.uint8)
    np.testing.assert_array_equal(decoded(encoded(picture, "TIFF")), expected)
    wide = picture.resize((64, 16), Image.Resampling.NEAREST)
    pixels = decoded(encoded(wide, "JPEG", quality=100))  # Adobe stores it inverted
    assert np.abs(pixels[8, 8::16].astype(int) - expected[0]).max() <= 4


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = grey_row(0, 0, 1, 1, 128, 255)  # round(value / 257)
    for kind in ("PNG", "TIFF", "PPM"):  # Pillow calls the modes I;16, I;16 and I
        np.testing.assert_array_equal(decoded(encoded(deep, kind)), expected, err_msg=kind)


def sixteen_bit_png(samples: np.ndarray, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that Pillow cannot write; samples (h, w, channels) uint16."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = b"".join(chunk(*extra) for extra in chunks) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def test_sixteen_bit_png_with_colour_or_transparency() -> None:
    colour = np.array([[[0, 32768, 65535]]], np.uint16)
    np.testing.assert_array_equal(decoded(sixteen_bit_png(colour, 2)), [[[0, 128, 255]]])
    grey = np.array([[[0], [1000], [65535]]], np.uint16)
    see_through = (b"tRNS", struct.pack(">H", 1000))
    np.testing.assert_array_equal(decoded(sixteen_bit_png(grey, 0, see_through)), grey_row(0, 255, 255))


def test_wide_integers_and_floats() -> None:
    integers = np.array([[-5, 0, 3 * 2**29, 2**31 - 1]], np.int32)
    np.testing.assert_array_equal(decoded(encoded(integers, "TIFF")), grey_row(0, 0, 191, 255))
    unit = np.array([[-1.0, np.nan, 0.5, 1.0]], np.float32)
    np.testing.assert_array_equal(decoded(encoded(unit, "TIFF")), grey_row(0, 0, 128, 255))
    grey = np.array([[0.0, 2.0, 200.4]], np.float32)
    np.testing.assert_array_equal(decoded(encoded(grey, "TIFF")), grey_row(0, 2, 200))
    huge = np.array([[0.0, 6e5, 1e6]], np.float32)
    np.testing.assert_array_equal(decoded(encoded(huge, "TIFF")), grey_row(0, 153, 255))
    infinite = np.array([[0.0, 1.0, np.inf]], np.float32)
    np.testing.assert_array_equal(decoded(encoded(infinite, "TIFF")), grey_row(0, 255, 255))


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_animations_give_their_first_frame(kind: str, options: dict[str, object]) -> None:
    frames = [Image.fromarray(SMALL), Image.fromarray(255 - SMALL), Image.fromarray(SMALL[::-1].copy())]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(decoded(data), SMALL)


def test_every_listed_format_decodes() -> None:
    grey = np.full((16, 16, 3), 120, np.uint8)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF"):
        pixels = decoded(encoded(grey, kind))
        assert np.abs(pixels.astype(int) - 120).max() <= 2, kind


# --- refusals ---------------------------------------------------------------------------------------------


def test_reasons_are_documented() -> None:
    assert tuple(REASON_MEANINGS) == REASONS
    assert len(set(REASONS)) == len(REASONS) == 9
    assert all(REASON_MEANINGS.values())


def test_empty_text_and_unsupported() -> None:
    assert refusal(b"").reason == "empty"
    assert refusal(b"<!DOCTYPE html><html>404</html>").reason == "not-an-image"
    assert refusal(b"\0" * 5000).reason == "not-an-image"
    assert refusal(b"P").reason == "not-an-image"
    assert refusal(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 300).reason == "not-an-image"
    assert refusal(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0" * 300).reason == "not-an-image"
    assert refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").reason == "not-an-image"  # no Ghostscript
    assert "JPEG" in str(refusal(b"GET / HTTP/1.1"))


@pytest.mark.pain(10)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_pain_10_truncated_files_are_refused_with_a_reason(kind: str, share: float) -> None:
    data = encoded(noise(64, 96), kind)
    error = refusal(data[: int(len(data) * share)])
    assert error.reason == "truncated"
    assert error.detail.startswith(kind)


def test_truncated_progressive_jpeg_and_tiff() -> None:
    progressive = encoded(noise(64, 96), "JPEG", progressive=True)
    assert refusal(progressive[: len(progressive) // 2]).reason == "truncated"
    tiff = encoded(noise(64, 96), "TIFF", compression="tiff_lzw")
    assert refusal(tiff[: len(tiff) // 2]).reason in ("truncated", "unreadable")


def test_pillow_asked_to_forgive_truncation_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigurationError, match="LOAD_TRUNCATED_IMAGES"):
        decode_image(encoded(SMALL), PixelRule(2, 3))


def header_only_png(width: int, height: int) -> bytes:
    data = bytearray(encoded(SMALL))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize("size", [(9_600, 10_417), (14_000, 14_000), (2**31 - 1, 2**31 - 1)])
def test_header_bombs_are_refused_at_once_and_without_warnings(size: tuple[int, int]) -> None:
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own limit would warn about the first and raise on the others
        error = refusal(header_only_png(*size))
    assert error.reason == "too-large"
    assert f"{size[0]}x{size[1]}" in error.detail
    assert time.process_time() - start < 0.5


def test_limit_is_inclusive_and_adjustable() -> None:
    data = encoded(noise(10, 10))
    assert decode_image(data, PixelRule(4, 4), max_pixels=100).width == 10
    assert refusal(data, max_pixels=99).reason == "too-large"


def test_icon_that_hides_a_larger_image_is_refused() -> None:
    icon = bytearray(encoded(noise(64, 64), "ICO", sizes=[(64, 64)]))
    icon[6:8] = bytes([16, 16])  # the directory says 16x16
    assert refusal(bytes(icon), max_pixels=1024).reason == "too-large"


@pytest.mark.slow
@pytest.mark.pain(10)
def test_pain_10_damaged_bytes_never_raise_anything_else() -> None:
    """Seeded random damage to each format ends in pixels or in a named reason."""
    randomness = random.Random(7)
    picture = noise(24, 32)
    files = [encoded(picture, kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM", "ICO", "AVIF")]
    outcomes = set()
    for turn in range(1200):
        data = bytearray(files[turn % len(files)])
        for _ in range(randomness.choice([1, 4, 20])):
            data[randomness.randrange(min(len(data), randomness.choice([64, 10_000])))] = randomness.randrange(256)
        try:
            decode_image(bytes(data), PixelRule(8, 8), max_pixels=1_000_000)
            outcomes.add("decoded")
        except UnreadableImageError as error:
            outcomes.add(error.reason)
    assert {"decoded", "unreadable", "too-large"} <= outcomes <= {"decoded", *REASONS}


# --- reading ----------------------------------------------------------------------------------------------


def read_refusal(path: Path | str, **limits: int) -> UnreadableImageError:
    with pytest.raises(UnreadableImageError) as caught:
        read_bytes(path, **limits)
    return caught.value


def test_read_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a.bin")
    assert read_bytes(tmp_path / "a.bin") == read_bytes(str(tmp_path / "link")) == b"abc"
    assert read_refusal(tmp_path / "a.bin", max_bytes=2).reason == "too-large"


def test_read_bytes_refuses_what_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert read_refusal(tmp_path / "absent.jpg").reason == "missing"
    assert "a broken link" in read_refusal(tmp_path / "dangling").detail
    assert read_refusal(tmp_path / "loop").reason == "missing"
    assert read_refusal("a\0b").reason == "missing"
    assert read_refusal(tmp_path).reason == "not-a-file"
    assert read_refusal("/dev/zero").reason == "not-a-file"


def test_read_bytes_does_not_wait_on_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    caught: list[str] = []
    worker = threading.Thread(target=lambda: caught.append(read_refusal(pipe).reason), daemon=True)
    worker.start()
    worker.join(5)
    assert caught == ["not-a-file"]


def test_read_bytes_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"abc")
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything, so the refusal is played

        def refuse(*_: object) -> int:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "open", refuse)
    assert read_refusal(path).reason == "no-permission"


# --- resizing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 70), (7, 200), (200, 33), (64, 48)])
def test_antialias_is_pillow_width_first(size: tuple[int, int]) -> None:
    """In that order in every release of Pillow; from 13 on it chooses the order by the sizes."""
    picture = noise(48, 64)
    across = Image.fromarray(picture).resize((size[0], 48), Image.Resampling.BILINEAR)
    expected = np.asarray(across.resize(size, Image.Resampling.BILINEAR))
    pixels = decode_image(encoded(picture), PixelRule(size[1], size[0])).pixels
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("resize", ["antialias", "keras"])
def test_same_size_changes_nothing(resize: str) -> None:
    picture = noise(48, 64)
    pixels = decode_image(encoded(picture), PixelRule(48, 64, resize)).pixels
    np.testing.assert_array_equal(pixels, picture)
    assert pixels.flags.c_contiguous


def bilinear(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel centres, pixel by pixel, straight from the definition."""
    rows, columns = picture.shape[:2]
    result = np.empty((height, width, 3))
    for y in range(height):
        for x in range(width):
            v, u = (y + 0.5) * rows / height - 0.5, (x + 0.5) * columns / width - 0.5
            top, left = int(np.floor(v)), int(np.floor(u))
            corners = {
                (i, j): picture[min(max(i, 0), rows - 1), min(max(j, 0), columns - 1)].astype(float)
                for i in (top, top + 1)
                for j in (left, left + 1)
            }
            upper = corners[top, left] * (left + 1 - u) + corners[top, left + 1] * (u - left)
            lower = corners[top + 1, left] * (left + 1 - u) + corners[top + 1, left + 1] * (u - left)
            result[y, x] = upper * (top + 1 - v) + lower * (v - top)
    return result


@pytest.mark.parametrize("size", [(5, 9), (23, 31), (40, 6), (1, 1)])
def test_keras_rule_follows_the_definition(size: tuple[int, int]) -> None:
    picture = noise(20, 30)
    pixels = decode_image(encoded(picture), PixelRule(*size, "keras")).pixels
    assert np.abs(pixels - bilinear(picture, *size)).max() <= 0.501
    assert pixels.flags.c_contiguous


def test_crop_takes_the_centred_window() -> None:
    picture = noise(40, 100)
    window = Image.fromarray(picture[:, 30:70].copy())
    bilinear_filter = Image.Resampling.BILINEAR
    pixels = decode_image(encoded(picture), PixelRule(16, 16, fit="crop")).pixels
    np.testing.assert_array_equal(
        pixels, np.asarray(window.resize((16, 40), bilinear_filter).resize((16, 16), bilinear_filter))
    )
    result = decode_image(encoded(picture), PixelRule(16, 16, "keras", "crop"))
    assert np.abs(result.pixels - bilinear(np.asarray(window), 16, 16)).max() <= 0.501
    assert (result.width, result.height) == (100, 40)  # the file's size, not the window's


@pytest.mark.parametrize("resize", ["antialias", "keras"])
def test_pad_keeps_the_whole_image_centred_on_black(resize: str) -> None:
    picture = noise(40, 100) // 2 + 100
    pixels = decode_image(encoded(picture), PixelRule(20, 20, resize, "pad")).pixels
    stretched = decode_image(encoded(picture), PixelRule(8, 20, resize)).pixels
    np.testing.assert_array_equal(pixels[6:14], stretched)
    assert pixels[:6].max() == pixels[14:].max() == 0
    tall = decode_image(encoded(picture.transpose(1, 0, 2).copy()), PixelRule(20, 20, resize, "pad")).pixels
    assert np.abs(tall.astype(int) - pixels.transpose(1, 0, 2)).max() <= 1  # columns are rounded before rows
    assert tall[:, :6].max() == tall[:, 14:].max() == 0


def test_geometry() -> None:
    assert crop_window(500, 340, PixelRule(200, 200)) == (80, 0, 340, 340)
    assert crop_window(341, 500, PixelRule(224, 224)) == (0, 79, 341, 341)
    assert crop_window(100, 100, PixelRule(50, 100)) == (0, 25, 100, 50)
    assert crop_window(1, 1000, PixelRule(224, 224)) == (0, 499, 1, 1)
    assert pad_window(500, 341, PixelRule(224, 224)) == (0, 35, 224, 153)
    assert pad_window(341, 500, PixelRule(224, 224)) == (35, 0, 153, 224)
    assert pad_window(100, 100, PixelRule(50, 100)) == (25, 0, 50, 50)
    assert pad_window(1, 1000, PixelRule(224, 224)) == (111, 0, 1, 224)
    assert pad_window(1, 1000, PixelRule(224, 224, "keras")) == (111, 0, 1, 224)


@pytest.mark.parametrize("target", [150, 160, 224])
def test_exact_padding_always_fills_one_side(target: int) -> None:
    for width in range(1, 3000):
        left, _, inner_width, _ = pad_window(width, max(width // 2, 1), PixelRule(target, target))
        assert (left, inner_width) == (0, target)


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1)])
@pytest.mark.parametrize("resize", ["antialias", "keras"])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_a_line_of_pixels_needs_no_square_canvas(shape: tuple[int, int], resize: str, fit: str) -> None:
    data = encoded(np.full((*shape, 3), 255, np.uint8))
    pixels = decode_image(data, PixelRule(16, 16, resize, fit)).pixels  # the padded square is 900 megapixels
    assert pixels.shape == (16, 16, 3)
    assert fit == "pad" or pixels.min() == 255


def test_threads_give_the_same_pixels() -> None:
    files = [encoded(noise(60, 80, seed), "JPEG") for seed in range(24)]
    rule = PixelRule(32, 32, "keras", "crop")
    alone = [decode_image(data, rule).pixels for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_image(data, rule).pixels, files))
    np.testing.assert_array_equal(alone, together)


# --- against Keras ----------------------------------------------------------------------------------------

FITS = {"stretch": {}, "crop": {"crop_to_aspect_ratio": True}, "pad": {"pad_to_aspect_ratio": True}}


def keras_dataset(folder: Path, size: tuple[int, int], fit: str) -> np.ndarray:
    import keras

    dataset = keras.utils.image_dataset_from_directory(
        folder, labels=None, image_size=size, shuffle=False, batch_size=32, verbose=False, **FITS[fit]
    )
    return np.rint(next(iter(dataset)).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(160, 160), (224, 150)])
def test_keras_rule_equals_image_dataset_from_directory(
    assets: Path, tmp_path: Path, fit: str, size: tuple[int, int]
) -> None:
    """Equal to the last bit, the decoder of lossy files apart."""
    (tmp_path / "cats").mkdir()
    sources = sorted((assets / "images/cats_and_dogs_filtered/train/cats").glob("*.jpg"))[:20]
    for source in sources:
        with Image.open(source) as image:
            image.save(tmp_path / "cats" / f"{source.stem}.png")
    rule = PixelRule(*size, "keras", fit)
    files = sorted((tmp_path / "cats").iterdir())
    ours = np.stack([decode_image(file.read_bytes(), rule).pixels for file in files])
    assert len(ours) == 20
    np.testing.assert_array_equal(ours, keras_dataset(tmp_path, size, fit))


@pytest.mark.slow
@pytest.mark.parametrize("fit", FITS)
def test_keras_rule_on_jpeg_differs_by_the_decoder_only(assets: Path, tmp_path: Path, fit: str) -> None:
    """TensorFlow decodes with libjpeg's fast inverse cosine transform, Pillow with the accurate one."""
    (tmp_path / "cats").mkdir()
    sources = sorted((assets / "images/cats_and_dogs_filtered/train/cats").glob("*.jpg"))[:20]
    for source in sources:
        shutil.copy(source, tmp_path / "cats" / source.name)
    rule = PixelRule(160, 160, "keras", fit)
    ours = np.stack([decode_image(source.read_bytes(), rule).pixels for source in sources])
    difference = np.abs(ours - keras_dataset(tmp_path, (160, 160), fit))
    assert difference.mean() <= 1.0  # grey levels
    assert difference.max() <= 5


# ---------------------------------------------------------------------------------------- shrink on load
def gradient(height: int, width: int) -> Image.Image:
    """Smooth, so that two ways of shrinking it differ by a level or two only; red grows rightwards, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_fast_decoding_shrinks_on_load_and_shows_the_same_picture(
    fit: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(600, 800), "JPEG", quality=95, exif=exif)
    full = decode_image(data, PixelRule(90, 120, fit=fit))
    shrunk: list[tuple[int, int]] = []
    whole = images._to_rgb
    monkeypatch.setattr(images, "_to_rgb", lambda image: shrunk.append(image.size) or whole(image))
    fast = decode_image(data, PixelRule(90, 120, fit=fit, decode="fast"))
    size = (800, 600) if orientation == 1 else (600, 800)
    assert (fast.width, fast.height) == (full.width, full.height) == size  # of the file, not of what was decoded
    # the smallest of 1/1, 1/2, 1/4, 1/8 that still has the pixels wanted: 120x90, or 68x90 where that is padded
    scale = 8 if (orientation, fit) == (6, "pad") else 4
    assert shrunk == [(size[0] // scale, size[1] // scale)]
    assert np.abs(fast.pixels.astype(int) - full.pixels).max() <= 4


def test_fast_decoding_changes_nothing_where_nothing_can_be_left_out() -> None:
    small, png = encoded(gradient(150, 200), "JPEG"), encoded(gradient(600, 800))
    for data in (small, png):
        full, fast = (decode_image(data, PixelRule(90, 120, decode=decode)) for decode in ("full", "fast"))
        np.testing.assert_array_equal(full.pixels, fast.pixels)
    with pytest.raises(UnreadableImageError) as caught:
        decode_image(encoded(gradient(600, 800), "JPEG")[:-900], PixelRule(90, 120, decode="fast"))
    assert caught.value.reason == "truncated"
