"""Views: a number that changes here makes every cached view of every user wrong, so pixels and draws are frozen."""

from __future__ import annotations

import colorsys
import hashlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, recipe
from PIL import Image, ImageEnhance

from features.augmentation import FILLS, PRESETS, AugmentSpec
from features.errors import ConfigurationError, UnreadableImageError
from features.pixels.decode import decode_image, resize_image
from features.pixels.views import ViewParameters, apply_view, decode_views, draw_view, render_views
from features.recipe import PixelRule, Recipe

RULE = PixelRule(24, 32)
SHA256 = hashlib.sha256(b"an image").digest()


def picture(height: int = 45, width: int = 60, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, made of integers only."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) * 3 % 256], axis=-1)
    noise = (np.arange(smooth.size).reshape(smooth.shape) + 1000 * seed) ** 2 % 1009 % 16
    return np.minimum(smooth + noise, 255).astype(np.uint8)


def render(
    preset: str | AugmentSpec,
    views: Sequence[int],
    *,
    pixels: np.ndarray | None = None,
    rule: PixelRule = RULE,
    seed: int = 0,
    sha256: bytes = SHA256,
) -> np.ndarray:
    spec = AugmentSpec.parse(preset) if isinstance(preset, str) else preset
    image = Image.fromarray(picture() if pixels is None else pixels)
    return render_views(image, rule, spec, seed=seed, sha256=sha256, views=views, resize=resize_image)


def draws(preset: str | AugmentSpec, count: int = 2000, width: int = 500, height: int = 375) -> list[ViewParameters]:
    spec = AugmentSpec.parse(preset) if isinstance(preset, str) else preset
    return [draw_view(spec, seed=0, sha256=SHA256, view=k, width=width, height=height) for k in range(1, count + 1)]


# Frozen. A changed digest means that the views in users' stores can no longer be made: raise AUGMENT_VERSION then.
# To print them anew: PYTHONPATH=.:tests python -c "import test_views as t; t.print_digests()"
DIGESTS = {
    "none": "a87194f49e48b2dd",
    "flip": "09ee6922ac7e8211",
    "flip-rotation": "5524f5530c1a1a71",
    "crop-flip": "2cc7241ad7134e05",
    "crop-rotation-jitter": "3f2664629f37cd14",
    "flip-zoom-shift-rotation": "20712166d3137f19",
}


def digest(preset: str) -> str:
    return hashlib.sha256(render(preset, range(8)).tobytes()).hexdigest()[:16]


def print_digests() -> None:
    for preset in PRESETS:
        print(f'    "{preset}": "{digest(preset)}",')


@pytest.mark.parametrize("preset", PRESETS)
def test_pixels_of_every_preset_are_frozen(preset: str) -> None:
    assert digest(preset) == DIGESTS[preset]


def test_draws_are_frozen() -> None:
    everything = AugmentSpec(True, 30, 0.3, 0.3, (0.5, 1), (0.75, 1.25), 0.2, 0.2, 0.2, 0.05, "nearest")
    drawn = draw_view(everything, seed=7, sha256=SHA256, view=3, width=500, height=375)
    assert drawn == ViewParameters(
        crop=(94, 46, 370, 318),
        flip=True,
        angle=27.112639440039917,
        zoom=(1.14208938701342, 1.241747673935229),
        shift=(0.2638127540095641, 0.28774493077656177),
        brightness=0.8870256226129984,
        contrast=0.9198467370049482,
        saturation=0.9645584153996505,
        hue=-0.049530864659308095,
    )


def test_fields_of_presets_are_frozen() -> None:
    """What the published recipes of the design say, number by number."""
    assert PRESETS["flip-rotation"] == AugmentSpec(horizontal_flip=True, rotation_degrees=0.1 * 360, fill="reflect")
    assert PRESETS["crop-flip"] == AugmentSpec(True, crop_scale=(0.08, 1), crop_ratio=(3 / 4, 4 / 3))
    assert PRESETS["flip-zoom-shift-rotation"] == AugmentSpec(True, 30, 0.3, 0.3, fill="nearest")
    assert PRESETS["crop-rotation-jitter"] == AugmentSpec(
        True, 15, 0, 0, (0.8, 1), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, fill="constant"
    )


# ---------------------------------------------------------------- what a view depends on


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    "rule",
    [RULE, PixelRule(32, 24, fit="crop"), PixelRule(20, 20, fit="pad"), PixelRule(30, 20, resize="keras", fit="pad")],
    ids=lambda rule: f"{rule.resize}-{rule.fit}",
)
def test_view_0_is_what_decode_image_gives(preset: str, kind: str, rule: PixelRule) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, kind)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        pixels = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(
        render(preset, [0], pixels=pixels, rule=rule)[0], decode_image(buffer.getvalue(), rule).pixels
    )


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["full", "fast"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_views_of_a_file_do_not_depend_on_which_are_asked_for(preset: str, decode: str, fit: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    data = encoded(picture(300, 400), "JPEG", exif=exif.tobytes())
    rule, spec = PixelRule(24, 32, fit=fit, decode=decode), PRESETS[preset]

    def views(*numbers: int) -> np.ndarray:
        result = decode_views(data, rule, spec, seed=1, sha256=SHA256, views=numbers)
        assert (result.width, result.height) == (300, 400)
        return result.pixels

    together = views(0, 1, 2, 3)
    np.testing.assert_array_equal(together[0], decode_image(data, rule).pixels)
    np.testing.assert_array_equal(views(3, 0, 0, 1), together[[3, 0, 0, 1]])
    np.testing.assert_array_equal(views(0, 0), together[[0, 0]])
    np.testing.assert_array_equal(views(2), together[[2]])


def test_a_fast_decode_keeps_every_pixel_for_a_crop_and_only_for_it() -> None:
    data = encoded(picture(300, 400), "JPEG")
    fast, full = (PixelRule(24, 32, decode=decode) for decode in ("fast", "full"))
    for preset in ("crop-flip", "flip-rotation"):
        one, two = (
            decode_views(data, rule, PRESETS[preset], seed=1, sha256=SHA256, views=range(3)).pixels
            for rule in (fast, full)
        )
        assert (one[0] != two[0]).any()
        assert ((one[1:] != two[1:]).any()) == (preset == "flip-rotation")


def test_a_refusal_of_the_file_is_that_of_decode_image() -> None:
    for data, reason in ((b"", "empty"), (b"text", "not-an-image"), (encoded(picture(), "PNG")[:800], "truncated")):
        with pytest.raises(UnreadableImageError) as caught:
            decode_views(data, RULE, PRESETS["flip"], seed=0, sha256=SHA256, views=(1, 2))
        assert caught.value.reason == reason


@pytest.mark.parametrize("resize", ["antialias", "keras"])
def test_without_ranges_every_view_is_plain(resize: str) -> None:
    rule = PixelRule(24, 32, resize=resize)
    views = render(AugmentSpec(fill="constant"), range(5), rule=rule)
    for view in views[1:]:
        np.testing.assert_array_equal(view, views[0])
    assert AugmentSpec().is_plain
    assert AugmentSpec(fill="nearest", crop_ratio=(1, 1)).is_plain
    assert not any(PRESETS[name].is_plain for name in PRESETS if name != "none")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("none", "flip")])
def test_views_seeds_and_contents_differ(preset: str) -> None:
    views = render(preset, range(6))
    others = [render(preset, [1], seed=1)[0], render(preset, [1], sha256=bytes(32))[0]]
    assert len({pixels.tobytes() for pixels in [*views, *others]}) == 8


def test_the_order_and_number_of_views_do_not_matter() -> None:
    views = render("crop-rotation-jitter", range(6))
    shuffled = [5, 0, 3, 3, 1]
    np.testing.assert_array_equal(render("crop-rotation-jitter", shuffled), views[shuffled])
    np.testing.assert_array_equal(render("crop-rotation-jitter", [4])[0], views[4])


@pytest.mark.slow
def test_threads_do_not_matter() -> None:
    images = [(picture(seed=number), hashlib.sha256(bytes([number])).digest()) for number in range(12)]

    def work(number: int) -> bytes:
        pixels, sha256 = images[number]
        return render("crop-rotation-jitter", range(4), pixels=pixels, sha256=sha256).tobytes()

    alone = [work(number) for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, reversed(range(12)))) == alone[::-1]


def test_a_changed_range_leaves_the_other_draws_alone() -> None:
    small, large = (draws(AugmentSpec(True, 10, zoom, crop_scale=(0.5, 1)), 20) for zoom in (0.0, 0.3))
    assert [(one.flip, one.angle, one.crop) for one in small] == [(one.flip, one.angle, one.crop) for one in large]
    assert all(one.zoom == (1.0, 1.0) for one in small)


WORKER = """
import hashlib, random, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from PIL import Image
from test_views import picture
from features.augmentation import PRESETS
from features.pixels.decode import resize_image
from features.recipe import PixelRule
from features.pixels.views import render_views

workers, batch_size = int(sys.argv[1]), int(sys.argv[2])

def load(number):
    image, sha256 = Image.fromarray(picture(seed=number)), hashlib.sha256(bytes([number])).digest()
    options = dict(seed=3, sha256=sha256, views=range(4), resize=resize_image)
    return np.stack([render_views(image, PixelRule(48, 40), spec, **options) for spec in PRESETS.values()])

numbers = list(range(20))
random.Random(workers).shuffle(numbers)
digests = {}
with ThreadPoolExecutor(workers) as pool:
    for start in range(0, 20, batch_size):
        part = numbers[start : start + batch_size]
        for number, pixels in zip(part, np.stack(list(pool.map(load, part)))):
            digests[number] = hashlib.sha256(pixels.tobytes()).hexdigest()
print(*[digests[number] for number in range(20)], sep="\\n")
"""


@pytest.mark.slow
def test_two_processes_with_other_workers_and_batches_give_the_same_bits() -> None:
    command, paths = [sys.executable, "-c", WORKER], {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""}
    one, four = (
        subprocess.run([*command, *numbers], env=paths, capture_output=True, text=True, check=True, timeout=120).stdout
        for numbers in (("1", "7"), ("4", "20"))
    )
    assert one == four
    assert len(set(one.split())) == 20


def test_the_image_is_resized_once_unless_a_view_crops() -> None:
    image = Image.fromarray(picture())
    calls: list[tuple[int, int]] = []

    def resize(image: Image.Image, rule: PixelRule) -> np.ndarray:
        calls.append(image.size)
        return resize_image(image, rule)

    for preset, count in (("flip-zoom-shift-rotation", 1), ("crop-flip", 5)):
        calls.clear()
        render_views(image, RULE, PRESETS[preset], seed=0, sha256=SHA256, views=range(5), resize=resize)
        assert len(calls) == count


@pytest.mark.parametrize(("view", "sha256"), [(-1, SHA256), (1, b"short")])
def test_an_impossible_key_is_refused(view: int, sha256: bytes) -> None:
    with pytest.raises(ValueError, match="expected 0 or more, and 32 bytes"):
        draw_view(PRESETS["flip"], seed=0, sha256=sha256, view=view, width=1, height=1)


# ---------------------------------------------------------------- distributions


def assert_uniform(values: Sequence[float], low: float, high: float) -> None:
    """In bounds, near both of them, and each quarter holds about a quarter."""
    shares = (np.array(values) - low) / (high - low)
    assert 0 <= shares.min() < 0.01
    assert 0.99 < shares.max() <= 1
    np.testing.assert_allclose(np.histogram(shares, 4, (0, 1))[0] / len(shares), 0.25, atol=0.04)


@pytest.mark.slow
def test_draws_are_uniform_over_their_ranges() -> None:
    moved = draws("flip-zoom-shift-rotation")
    assert 0.46 < np.mean([one.flip for one in moved]) < 0.54
    assert_uniform([one.angle for one in moved], -30, 30)
    for axis in (0, 1):
        assert_uniform([one.zoom[axis] for one in moved], 0.7, 1.3)
        assert_uniform([one.shift[axis] for one in moved], -0.3, 0.3)
    coloured = draws("crop-rotation-jitter")
    for name in ("brightness", "contrast", "saturation"):
        assert_uniform([getattr(one, name) for one in coloured], 0.8, 1.2)
    assert_uniform([one.hue for one in coloured], -0.05, 0.05)
    together = [[one.angle, *one.zoom, *one.shift, one.flip] for one in moved]
    assert np.abs(np.corrcoef(np.transpose(together)) - np.eye(6)).max() < 0.08


def test_crops_keep_to_area_and_ratio() -> None:
    crops = np.array([one.crop for one in draws("crop-flip", width=500, height=500)])
    left, top, width, height = crops.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert (left + width).max() == 500
    assert (top + height).max() == 500
    area, ratio = width * height / 250_000, width / height
    assert 0.079 < area.min() < 0.09
    assert 0.95 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.02  # as often wide as tall


def test_a_crop_has_the_ratio_of_a_target_that_is_not_square() -> None:
    spec = AugmentSpec(crop_scale=(0.1, 0.1), crop_ratio=(1, 1))
    drawn = draw_view(spec, seed=0, sha256=SHA256, view=1, width=1000, height=1000, aspect=4.0)
    assert drawn.crop is not None
    assert drawn.crop[2:] == (round(math.sqrt(400_000)), round(math.sqrt(25_000)))


@pytest.mark.parametrize(
    ("width", "height", "crop"), [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (1, 1, (0, 0, 1, 1))]
)
def test_where_no_crop_fits_the_largest_centred_one_is_taken(
    width: int, height: int, crop: tuple[int, int, int, int]
) -> None:
    spec = AugmentSpec(crop_scale=(0.9, 1.0))
    assert draw_view(spec, seed=0, sha256=SHA256, view=1, width=width, height=height).crop == crop


# ---------------------------------------------------------------- geometry

ROW = np.repeat(np.array([[10, 20, 30, 40]], np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("fill", "right", "left"),
    [
        ("reflect", [30, 20, 10, 10], [40, 40, 30, 20]),
        ("nearest", [10, 10, 10, 10], [40, 40, 40, 40]),
        ("constant", [0, 0, 0, 10], [40, 0, 0, 0]),
    ],
)
def test_fill_by_hand(fill: str, right: list[int], left: list[int]) -> None:
    for share, expected in ((0.75, right), (-0.75, left)):
        moved = apply_view(ROW, ViewParameters(shift=(share, 0.0)), fill=fill)
        np.testing.assert_array_equal(moved, np.repeat(np.array([expected], np.uint8)[..., None], 3, axis=2))
        column = apply_view(ROW.transpose(1, 0, 2), ViewParameters(shift=(0.0, share)), fill=fill)
        np.testing.assert_array_equal(column[:, 0, 0], expected)


@pytest.mark.parametrize(
    ("fill", "expected"), [("reflect", [10, 15, 25, 35]), ("nearest", [10, 15, 25, 35]), ("constant", [5, 15, 25, 35])]
)
def test_half_a_pixel_is_the_mean_of_two(fill: str, expected: list[int]) -> None:
    moved = apply_view(ROW, ViewParameters(shift=(0.125, 0.0)), fill=fill)
    np.testing.assert_array_equal(moved[0, :, 1], expected)


def test_values_are_rounded_not_cut() -> None:
    pixels = np.repeat(np.array([[0, 1, 0, 1]], np.uint8)[..., None], 3, axis=2)
    quarter = apply_view(pixels, ViewParameters(shift=(1 / 16, 0.0)), fill="nearest")  # 0 1/4 3/4.. of neighbours
    np.testing.assert_array_equal(quarter[0, :, 0], [0, 1, 0, 1])


def test_a_wide_reflection_repeats_the_image() -> None:
    far = apply_view(ROW, ViewParameters(zoom=(4.0, 1.0)), fill="reflect")
    # Positions -4.5, -0.5, 3.5, 7.5 of ... 4 3 2 1 | 1 2 3 4 | 4 3 2 1 ...
    np.testing.assert_array_equal(far[0, :, 0], [40, 10, 40, 10])


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("side", [5, 40])
def test_right_angles_are_exact(fill: str, side: int) -> None:
    pixels = picture(side, side)
    for turns in (1, 2, -1):
        turned = apply_view(pixels, ViewParameters(angle=90.0 * turns), fill=fill)
        np.testing.assert_array_equal(turned, np.rot90(pixels, turns))
    oblong = picture(7, 40)
    np.testing.assert_array_equal(apply_view(oblong, ViewParameters(angle=180.0, flip=True), fill=fill), oblong[::-1])


def test_a_flip_is_exact_and_comes_before_the_rotation() -> None:
    pixels = picture(20, 20)
    np.testing.assert_array_equal(apply_view(pixels, ViewParameters(flip=True), fill="reflect"), pixels[:, ::-1])
    both = apply_view(pixels, ViewParameters(flip=True, angle=90.0), fill="reflect")
    np.testing.assert_array_equal(both, np.rot90(pixels[:, ::-1]))


def test_zoom_2_shows_twice_as_much() -> None:
    pixels = np.full((8, 8, 3), 200, np.uint8)
    shown = apply_view(pixels, ViewParameters(zoom=(2.0, 2.0)), fill="constant")[..., 0]
    assert (shown[2:6, 2:6] == 200).all()
    assert shown.sum() == 16 * 200


@pytest.mark.parametrize(
    ("fill", "mode"), [("reflect", "reflect"), ("nearest", "nearest"), ("constant", "grid-constant")]
)
@pytest.mark.parametrize("number", range(4))
def test_the_affine_map_equals_scipy(fill: str, mode: str, number: int) -> None:
    from scipy.ndimage import affine_transform

    drawn = draws(AugmentSpec(rotation_degrees=180, zoom=0.5, shift=0.5), 4)[number]
    pixels = picture(37, 50)
    angle, (height, width) = math.radians(drawn.angle), pixels.shape[:2]
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # row before column
    matrix = rotation @ np.diag(drawn.zoom[::-1])
    centre, shift = (
        np.array([(height - 1) / 2, (width - 1) / 2]),
        np.array([drawn.shift[1] * height, drawn.shift[0] * width]),
    )
    offset = centre - matrix @ centre - rotation @ shift
    ours = apply_view(pixels, drawn, fill=fill)
    for channel in range(3):
        plane = pixels[..., channel].astype(np.float64)
        theirs = affine_transform(plane, matrix, offset, order=1, mode=mode)
        assert np.abs(ours[..., channel] - theirs).max() <= 0.5 + 1e-3


@pytest.mark.slow
def test_the_flowers_preset_moves_as_keras_does() -> None:
    from keras.src.legacy.preprocessing.image import apply_affine_transform

    pixels = picture(40, 40)  # Keras swaps the centre's coordinates of an image that is not square
    for drawn in draws("flip-zoom-shift-rotation", 6):
        theirs = apply_affine_transform(
            pixels.astype(np.float32)[:, ::-1] if drawn.flip else pixels.astype(np.float32),
            theta=drawn.angle,
            tx=-drawn.shift[0] * 40,
            ty=-drawn.shift[1] * 40,
            zx=drawn.zoom[0],
            zy=drawn.zoom[1],
            row_axis=0,
            col_axis=1,
            channel_axis=2,
            fill_mode="nearest",
        )
        assert np.abs(apply_view(pixels, drawn, fill="nearest") - theirs).max() <= 0.501


@pytest.mark.slow
def test_the_cats_and_dogs_preset_turns_as_keras_does() -> None:
    from keras import ops

    pixels = picture(40, 40)
    for drawn in draws(AugmentSpec(rotation_degrees=36), 6):
        sine, cosine = math.sin(math.radians(drawn.angle)), math.cos(math.radians(drawn.angle))
        x, y = (39 - (cosine * 39 - sine * 39)) / 2, (39 - (sine * 39 + cosine * 39)) / 2  # as RandomRotation
        transform = ops.convert_to_tensor([[cosine, -sine, x, sine, cosine, y, 0.0, 0.0]], "float32")
        theirs = ops.image.affine_transform(
            pixels[None].astype(np.float32), transform, interpolation="bilinear", fill_mode="reflect"
        )
        difference = np.abs(apply_view(pixels, drawn, fill="reflect") - np.asarray(theirs)[0])
        assert np.quantile(difference, 0.99) <= 0.51
        assert difference.mean() < 0.3


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_a_crop_is_cut_from_the_whole_image_and_fills_the_target(fit: str) -> None:
    spec = AugmentSpec(crop_scale=(0.2, 0.5))
    pixels = picture(300, 500)
    views = render(spec, range(1, 5), pixels=pixels, rule=PixelRule(24, 32, fit=fit))
    for view, pixels_of_view in enumerate(views, start=1):
        drawn = draw_view(spec, seed=0, sha256=SHA256, view=view, width=500, height=300, aspect=32 / 24)
        assert drawn.crop is not None
        left, top, width, height = drawn.crop
        whole = Image.fromarray(pixels[top : top + height, left : left + width])
        across = whole.resize((32, height), Image.Resampling.BILINEAR)
        expected = across.resize((32, 24), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(pixels_of_view, np.asarray(expected))


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)],
)
@pytest.mark.parametrize("factor", [0.0, 0.8, 1.2, 1.7])
def test_factors_act_as_pillow_enhances(name: str, enhancer: type, factor: float) -> None:
    pixels = picture()
    theirs = np.asarray(enhancer(Image.fromarray(pixels)).enhance(factor)).astype(int)
    parameters: dict[str, Any] = {name: factor}
    ours = apply_view(pixels, ViewParameters(**parameters), fill="reflect").astype(int)
    assert np.abs(ours - theirs).max() <= 1  # Pillow cuts fractions off


def test_factors_by_hand() -> None:
    pixels = np.array([[[100, 100, 100], [200, 200, 200]], [[0, 0, 0], [255, 0, 0]]], np.uint8)
    bright = apply_view(pixels, ViewParameters(brightness=1.5), fill="reflect")
    np.testing.assert_array_equal(bright, [[[150] * 3, [255] * 3], [[0] * 3, [255, 0, 0]]])
    # The mean of the grey levels 100, 200, 0 and 76 (0.299 * 255) is 94.
    flat = apply_view(pixels, ViewParameters(contrast=0.5), fill="reflect")
    np.testing.assert_array_equal(flat, [[[97] * 3, [147] * 3], [[47] * 3, [175, 47, 47]]])
    grey = apply_view(pixels, ViewParameters(saturation=0.0), fill="reflect")
    np.testing.assert_array_equal(grey, [[[100] * 3, [200] * 3], [[0] * 3, [76] * 3]])


def test_contrast_sees_the_brightened_image_as_a_whole() -> None:
    pixels = picture(70, 33)  # more than one band of rows
    both = apply_view(pixels, ViewParameters(brightness=1.2, contrast=0.0), fill="reflect")
    bright = Image.fromarray(np.clip(pixels * 1.2, 0, 255).round().astype(np.uint8))
    assert (both == both[0, 0, 0]).all()
    assert abs(int(both[0, 0, 0]) - np.asarray(bright.convert("L")).mean()) < 1


@pytest.mark.parametrize("turns", [-0.5, -0.05, 0.03, 1 / 3])
def test_hue_turns_as_in_colorsys(turns: float) -> None:
    pixels = np.concatenate(
        [picture(6, 40), np.full((1, 40, 3), 77, np.uint8), np.eye(3, dtype=np.uint8)[None, [0, 1, 2, 0] * 10] * 255]
    )
    ours = apply_view(pixels, ViewParameters(hue=turns), fill="reflect").reshape(-1, 3)
    for before, after in zip(pixels.reshape(-1, 3) / 255, ours, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = np.array(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)) * 255
        assert np.abs(after - expected).max() <= 0.501


def test_a_third_of_a_turn_makes_red_green() -> None:
    red = np.array([[[250, 0, 0]]], np.uint8)
    np.testing.assert_array_equal(apply_view(red, ViewParameters(hue=1 / 3), fill="reflect"), [[[0, 250, 0]]])


def test_the_given_pixels_are_not_changed() -> None:
    pixels = picture()
    before = pixels.copy()
    for drawn in [*draws("flip-zoom-shift-rotation", 3), *draws("crop-rotation-jitter", 3)]:
        for fill in FILLS:
            apply_view(pixels, drawn, fill=fill)
    np.testing.assert_array_equal(pixels, before)


# ---------------------------------------------------------------- specification and recipe


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_know_their_names(name: str) -> None:
    spec = AugmentSpec.parse(name)
    again = AugmentSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.name == name
    assert AugmentSpec(rotation_degrees=1).name == "custom"


def test_whole_numbers_and_fractions_are_one_specification() -> None:
    assert AugmentSpec(rotation_degrees=15, crop_scale=[1, 1]).to_dict() == {  # type: ignore[arg-type]
        "version": 1,
        "horizontal_flip": False,
        "rotation_degrees": 15.0,
        "zoom": 0.0,
        "shift": 0.0,
        "crop_scale": [1.0, 1.0],
        "crop_ratio": [0.75, 4 / 3],
        "brightness": 0.0,
        "contrast": 0.0,
        "saturation": 0.0,
        "hue": 0.0,
        "fill": "reflect",
    }
    assert isinstance(AugmentSpec(rotation_degrees=15).rotation_degrees, float)


def test_a_recipe_holds_specification_and_seed() -> None:
    spec = PRESETS["crop-rotation-jitter"]
    plain, one = recipe(), recipe(augmentation=spec, seed=1)
    stored = Recipe.from_dict(json.loads(one.canonical))
    assert stored.fingerprint == one.fingerprint
    assert stored.augmentation == spec
    assert (stored, hash(stored)) == (one, hash(one))
    others = [plain, recipe(augmentation=spec), recipe(augmentation=PRESETS["flip"], seed=1)]
    assert len({item.fingerprint for item in [one, *others]}) == 4


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"'flip-rotate', expected one of none, flip, .* 'flip-rotation'"):
        AugmentSpec.parse("flip-rotate")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fill": "mirror"}, "fill: received 'mirror', expected one of reflect, nearest, constant"),
        ({"fill": "nearst"}, "did you mean 'nearest'"),
        ({"horizontal_flip": 1}, "horizontal_flip: received 1, expected a bool"),
        ({"rotation_degrees": 181}, "rotation_degrees: received 181, expected 0.0 to 180.0"),
        ({"rotation_degrees": True}, "rotation_degrees: received True, expected a number"),
        ({"zoom": math.nan}, "zoom: received nan"),
        ({"zoom": 1.0}, "zoom: received 1.0, expected 0.0 to 0.9"),
        ({"hue": "0.1"}, "hue: received '0.1', expected a number"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale: received 0.0, expected 0.01 to 1.0"),
        ({"crop_scale": 0.5}, "crop_scale: received 0.5, expected two numbers"),
        ({"crop_scale": (1.0, 0.5)}, "crop_scale: received 1.0 to 0.5, expected the smaller number first"),
        ({"crop_ratio": None}, "crop_ratio: received None, expected two numbers"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AugmentSpec(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "augmentation: received version 2, expected 1"),
        ({"rotation_degree": 1}, "no field 'rotation_degree'; did you mean 'rotation_degrees'"),
        ({"zoom": None}, "zoom: received None"),
    ],
)
def test_a_stored_specification_is_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AugmentSpec.from_dict({**AugmentSpec().to_dict(), **change})
    with pytest.raises(ConfigurationError, match="received list, expected a mapping of fields"):
        AugmentSpec.from_dict([change])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="these fields are missing: zoom, fill"):
        AugmentSpec.from_dict(
            {key: value for key, value in AugmentSpec().to_dict().items() if key not in ("zoom", "fill")}
        )
