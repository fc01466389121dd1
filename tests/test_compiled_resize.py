"""The compiled resize gives the very grey levels of Pillow, and everything works where it could not be compiled.

Where it was not built these tests hold Pillow against itself; `test_wheel.py` says whether it is built.
"""

from __future__ import annotations

import logging
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from features.pixels import resizing
from features.pixels.decode import decode_upright
from features.pixels.resizing import crop_window, edge_window, extension, pad_window, resize_image
from features.recipe import PixelRule

KINDS = {"antialias": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def by_pillow(image: Image.Image, rule: PixelRule) -> np.ndarray:
    """The definition: Pillow's filter on the whole image, first across, then down."""

    def resized(picture: Image.Image, width: int, height: int) -> np.ndarray:
        kind = KINDS[rule.resize]
        return np.asarray(picture.resize((width, picture.height), kind).resize((width, height), kind))

    if rule.fit == "crop":
        left, top, width, height = crop_window(*image.size, rule)
        return resized(image.crop((left, top, left + width, top + height)), rule.width, rule.height)
    if rule.fit == "pad":
        left, top, width, height = pad_window(*image.size, rule)
        canvas = np.zeros((rule.height, rule.width, 3), np.uint8)
        canvas[top : top + height, left : left + width] = resized(image, width, height)
        return canvas
    if rule.edge is not None:
        left, top, width, height = edge_window(*image.size, rule)
        return resized(image, width, height)[top : top + rule.height, left : left + rule.width]
    return resized(image, rule.width, rule.height)


def noise(height: int, width: int) -> Image.Image:
    """Levels at both ends of the range, where bicubic overshoots, beside all others."""
    levels = np.random.default_rng(height * 10_000 + width).integers(-128, 384, (height, width, 3), np.int16)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def check(image: Image.Image, rule: PixelRule) -> None:
    pixels = resize_image(image, rule)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, by_pillow(image, rule), err_msg=f"{image.size} {rule}")


sides = st.integers(1, 70)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(sides, sides),
    target=st.tuples(sides, sides),
    resize=st.sampled_from(sorted(KINDS)),
    fit=st.sampled_from(["stretch", "crop", "pad", "edge"]),
    more=st.integers(0, 40),
)
def test_any_size_is_resized_as_by_pillow(
    size: tuple[int, int], target: tuple[int, int], resize: str, fit: str, more: int
) -> None:
    rule = PixelRule(*target, resize, fit if fit != "edge" else f"crop:{max(target) + more}")
    check(noise(*size), rule)


@pytest.mark.slow
@pytest.mark.parametrize("resize", sorted(KINDS))
@pytest.mark.parametrize("size", [(2200, 1000), (4200, 1030), (3, 30_000), (30_000, 3)])
def test_large_images_which_pillow_keeps_in_several_blocks_are_resized_as_by_pillow(
    size: tuple[int, int], resize: str
) -> None:
    check(noise(*size), PixelRule(64, 48, resize))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["cats_and_dogs_filtered", "flowers17"])
def test_photographs_are_resized_as_by_pillow(folder: str, assets: Path) -> None:
    files = sorted((assets / "images" / folder).rglob("*.jpg"))[::250]
    assert len(files) >= 5
    for file in files:
        image = decode_upright(file.read_bytes(), PixelRule(224, 224)).image
        for side in (160, 224, 260):
            for resize in KINDS:
                for fit in ("stretch", "crop", "pad", f"crop:{side * 8 // 7}"):
                    check(image, PixelRule(side, side, resize, fit))


def test_without_the_extension_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "features.pixels._resize", None)
    extension.cache_clear()
    try:
        assert extension() is None
        check(noise(50, 70), PixelRule(32, 24, "bicubic", "crop:40"))
    finally:
        extension.cache_clear()


def test_an_extension_that_gives_other_levels_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong:
        @staticmethod
        def across(*arguments: object) -> None:
            np.asarray(arguments[-1])[:] = 7

        @staticmethod
        def down(*arguments: object) -> None:
            np.asarray(arguments[-1])[:] = 7

    monkeypatch.setitem(sys.modules, "features.pixels._resize", Wrong)
    extension.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, resizing.__name__):
            assert extension() is None
        assert "does not give the grey levels of this Pillow" in caplog.text
        check(noise(50, 70), PixelRule(32, 24))
    finally:
        extension.cache_clear()


class Refusing:
    """What the extension does with an image that Pillow keeps in several blocks, as `PILLOW_BLOCK_SIZE` may say."""

    @staticmethod
    def across(*arguments: object) -> None:
        raise ValueError("Image is in multiple array blocks")

    down = across


def test_an_image_that_the_extension_refuses_is_resized_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "extension", lambda: Refusing)
    check(noise(50, 70), PixelRule(32, 24, "bicubic", "crop:40"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "features.pixels._resize", Refusing)
    extension.cache_clear()
    try:
        assert extension() is None
    finally:
        extension.cache_clear()


def test_weights_are_rounded_after_every_step_on_all_processors() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    (built,) = project["tool"]["setuptools"]["ext-modules"]
    assert "-ffp-contract=off" in built["extra-compile-args"]


def test_the_extension_refuses_arrays_that_do_not_fit() -> None:
    module = extension()
    if module is None:
        pytest.skip("the extension was not built")
    _, array = noise(10, 8).__arrow_c_array__()
    lines, pixels = np.zeros((10, 5, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)
    module.across(array, 8, 5, 0, False, lines)
    module.down(lines, 4, 0, False, pixels)
    assert pixels.any()
    readonly = lines.copy()
    readonly.flags.writeable = False
    for arguments in (
        (array, 9, 5, 0, False, lines),  # more pixels than the image has
        (array, 8, 4, 0, False, lines),  # wider than the target
        (array, 8, 5, 1, False, lines),
        (array, 8, 5, -1, False, lines),
        (array, 0, 5, 0, False, lines),
        (array, 8, 5, 0, False, lines[:9]),
        (array, 8, 5, 0, False, lines[..., :2].copy()),
        (array, 8, 5, 0, False, lines.astype(np.int16)),
        (array, 8, 5, 0, False, lines[::2]),
        (array, 8, 5, 0, False, readonly),
        (lines, 8, 5, 0, False, lines),
    ):
        with pytest.raises((ValueError, BufferError)):
            module.across(*arguments)
    for arguments in (
        (lines, 4, 1, False, pixels),
        (lines, 4, 0, False, pixels[:, :4].copy()),
        (lines, 3, 0, False, pixels),
        (lines[:0], 4, 0, False, pixels),
    ):
        with pytest.raises((ValueError, BufferError)):
            module.down(*arguments)
