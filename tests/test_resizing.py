"""What goes into an exported graph: the resize, with the very pixels of Pillow, and the head folded into matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from features.errors import ConfigurationError
from features.pixels.decode import resize_image
from features.recipe import PixelRule
from pipeline.exporting.assembled import folded
from pipeline.exporting.resizing import check_rule, longest_side, resized
from pipeline.heads.kinds import make_head

pytestmark = pytest.mark.slow
# height, width: down, up, both, exact, tall (which Pillow 13 resizes height first), lines and single pixels
SIZES = (
    (375, 500), (500, 375), (224, 224), (96, 80), (448, 448), (336, 336), (447, 449), (225, 223), (223, 225), (300, 200),
    (113, 77), (1000, 90), (90, 1000), (31, 33), (5, 7), (1, 300), (300, 1), (2, 1), (1, 1), (1201, 1603),
)  # fmt: skip


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3)).astype(np.uint8)


def resizer(rule: PixelRule, precision: str = "float32") -> Any:
    import keras

    images = keras.Input((None, None, 3), dtype="uint8")
    return keras.Model(images, resized(images, rule, precision))


# -------------------------------------------------------------------------------------------------- resize
@pytest.mark.parametrize("size", [(224, 224), (96, 80)])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad", "crop:250"])
def test_the_graph_gives_the_very_grey_levels_of_pillow(fit: str, size: tuple[int, int]) -> None:
    rule = PixelRule(*size, fit=fit)
    model = resizer(rule)
    for height, width in SIZES:
        pixels = noise(height, width)
        received = np.asarray(model(pixels[None]))[0]
        np.testing.assert_array_equal(
            received, resize_image(Image.fromarray(pixels), rule), err_msg=f"{height}x{width}"
        )


def test_a_batch_is_resized_image_by_image_and_the_longest_side_is_still_exact() -> None:
    rule = PixelRule(32, 32)
    model = resizer(rule)
    pair = np.stack([noise(50, 41), 255 - noise(50, 41)])
    expected = np.stack([resize_image(Image.fromarray(pixels), rule) for pixels in pair])
    np.testing.assert_array_equal(np.asarray(model(pair)), expected)
    longest = noise(3, longest_side(32))
    np.testing.assert_array_equal(np.asarray(model(longest[None]))[0], resize_image(Image.fromarray(longest), rule))


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_the_rule_of_keras_differs_by_one_level_and_only_where_a_value_lies_half_way(fit: str) -> None:
    rule = PixelRule(224, 224, resize="keras", fit=fit)
    model = resizer(rule)
    shares = []
    for height, width in SIZES:
        pixels = noise(height, width)
        received = np.asarray(model(pixels[None]))[0]
        gaps = np.abs(received - resize_image(Image.fromarray(pixels), rule))
        assert gaps.max() <= 1, (height, width)
        shares.append(np.mean(gaps > 0))
    assert max(shares) < 0.02
    assert np.median(shares) < 0.002


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad", "crop:256"])
def test_bicubic_is_exact_in_float64_and_else_differs_by_one_level_in_one_of_ten_thousand_values(
    fit: str, precision: str
) -> None:
    rule = PixelRule(224, 224, resize="bicubic", fit=fit)
    model = resizer(rule, precision)
    gaps = []
    for height, width in SIZES:
        pixels = noise(height, width)
        received = np.asarray(model(pixels[None]))[0]
        gaps.append(np.abs(received - resize_image(Image.fromarray(pixels), rule)).ravel())
    assert max(gap.max() for gap in gaps) <= (1 if precision == "float32" else 0)
    assert np.mean(np.concatenate(gaps) > 0) < 2e-4


def test_pixels_that_no_graph_gives_exactly_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="Supported: antialias or bicubic with crop:256; keras with stretch"):
        check_rule(PixelRule(224, 224, resize="keras", fit="crop:256"))
    with pytest.raises(ConfigurationError, match="Supported: antialias with stretch, crop or pad"):
        check_rule(PixelRule(224, 224, resize="keras", fit="pad"))
    with pytest.raises(ConfigurationError, match="up to 1450x1450, received 2000x2000"):
        check_rule(PixelRule(2000, 2000, resize="keras"))


# -------------------------------------------------------------------------------------------------- heads
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["logistic", "linear-svm", "lda", "mlp-256"])
def test_a_folded_head_gives_its_probabilities(name: str, count: int) -> None:
    generator = np.random.default_rng(0)
    y = np.arange(90, dtype=np.int32) % count
    X = (generator.normal(3, 2, (90, 20)) + y[:, None]).astype(np.float32)
    head = make_head(name, **({"epochs": 40, "learning_rate": 0.01} if name == "mlp-256" else {}))
    head.fit(X, y)
    values = X
    matrices = folded(head.as_dense())  # type: ignore[arg-type]
    for kernel, bias in matrices[:-1]:
        values = np.maximum(values @ kernel + bias, 0)
    kernel, bias = matrices[-1]
    outputs = np.exp(values @ kernel + bias)
    expected = head.predict_proba(X)
    assert np.ptp(expected[:, 0]) > 0.3
    np.testing.assert_allclose(outputs / outputs.sum(axis=1, keepdims=True), expected, atol=1e-5)
