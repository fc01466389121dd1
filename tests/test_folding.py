"""BatchNorm folded into the layer before it: the same numbers from fewer layers, or the network as it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import part

from features.networks.backbones import build_backbone, feature_model, preprocess
from features.networks.finding import find_backbone
from features.networks.folding import TOLERANCE, affine, fold_batch_norms, foldable, largest_difference
from features.networks.graph import layer_tensors
from features.networks.weights import load_weights, resolve_weights

REAL = {
    "mobilenetv2": "mobilenet_v2_1.0_224_no_top.weights.h5",
    "mobilenetv2-0.35": "mobilenet_v2_0.35_224_no_top.weights.h5",
    "vgg16": "vgg16_no_top.weights.h5",
}


def load(name: str, size: int, weights: str) -> Any:
    backbone = find_backbone(name)
    model = build_backbone(backbone, (size, size))
    load_weights(model, backbone, resolve_weights(backbone, weights))
    return model


def shake(model: Any) -> None:
    """Random statistics and parameters in every BatchNormalization, none of them 0 or 1."""
    import keras

    generator = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(generator.normal(0, 0.3, shape))
            layer.moving_variance.assign(generator.uniform(0.5, 2, shape))
            if layer.beta is not None:
                layer.beta.assign(generator.normal(0, 0.3, shape))
            if layer.gamma is not None:
                layer.gamma.assign(generator.uniform(0.5, 1.5, shape))


def images(size: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


def outputs(model: Any, batch: np.ndarray) -> list[np.ndarray]:
    result = model(batch, training=False)
    return [np.asarray(output) for output in (result if isinstance(result, list) else [result])]


def norms(model: Any) -> list[str]:
    import keras

    return [layer.name for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


def assert_same_function(folded: Any, model: Any, batch: np.ndarray, tolerance: float = TOLERANCE) -> None:
    expected = outputs(model, batch)
    assert all(np.abs(one).max() > 0 and np.isfinite(one).all() for one in expected)
    assert largest_difference(outputs(folded, batch), expected) <= tolerance


def test_the_difference_is_the_worst_tensors() -> None:
    ones, off = np.ones(3), np.array([1.0, 1.0, 1.5])
    assert largest_difference([ones, off], [ones, ones]) == 0.5
    assert largest_difference([np.zeros(2)], [np.zeros(2)]) == 0.0
    assert largest_difference([np.full(2, 1e-30)], [np.zeros(2)]) == np.inf
    assert largest_difference([np.ones((2, 2))], [np.ones(2)]) == np.inf
    assert np.isnan(largest_difference([np.array([np.nan])], [np.ones(1)]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "count"), [("mobilenetv2", 96, 52), ("mobilenetv2-0.35", 96, 52)])
def test_real_weights_give_the_same_features(assets: Path, name: str, size: int, count: int) -> None:
    model = load(name, size, str(assets / "weights" / REAL[name]))
    kept = feature_model(model, [("out_relu", "avg"), ("block_15_add", "none")])
    apply = preprocess(find_backbone(name).preprocessing)
    before = kept.get_weights()
    folded = fold_batch_norms(kept, apply(images(size)))
    assert len(norms(kept)) == count
    assert norms(folded) == []
    other = apply(np.random.default_rng(2).uniform(0, 255, (3, size, size, 3)).astype(np.float32))  # not the proof's
    assert_same_function(folded, kept, other)
    for one, two in zip(kept.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_a_network_without_batch_norm_is_returned_as_it_is(assets: Path) -> None:
    model = load("vgg16", 64, str(assets / "weights" / REAL["vgg16"]))
    assert fold_batch_norms(model, images(64)) is model


@pytest.mark.slow
@pytest.mark.stress  # every family there
@pytest.mark.parametrize(
    ("name", "size", "left"),
    part([
        ("resnet50", 64, 0),
        ("efficientnetb0", 64, 0),
        ("mobilenetv3small", 64, 0),
        ("xception", 96, 0),  # separable convolutions
        ("resnet50v2", 64, 17),  # in front of the convolution stays what cannot move over the padding
        ("densenet121", 64, 62),
    ], "mobilenetv3small", "xception", "resnet50v2"),
)  # fmt: skip
def test_every_family_folds_what_follows_a_convolution(name: str, size: int, left: int) -> None:
    model = load(name, size, "random")
    shake(model)
    kept = feature_model(model, [(list(layer_tensors(model))[-1], "avg")])
    batch = preprocess(find_backbone(name).preprocessing)(images(size))
    folded = fold_batch_norms(kept, batch)
    assert folded is not kept
    assert len(norms(folded)) == left
    assert_same_function(folded, kept, batch)


@pytest.mark.slow
def test_an_output_between_convolution_and_norm_keeps_that_pair(assets: Path) -> None:
    model = load("mobilenetv2-0.35", 96, str(assets / "weights" / REAL["mobilenetv2-0.35"]))
    asked = [("Conv1", "none"), ("block_3_expand_BN", "none"), ("block_5_project", "avg"), ("out_relu", "avg")]
    kept = feature_model(model, asked)
    batch = images(96, 2) / 127.5 - 1
    folded = fold_batch_norms(kept, batch)
    assert norms(folded) == ["bn_Conv1", "block_5_project_BN"]  # what comes out of block_3_expand_BN is the new layer's
    assert_same_function(folded, kept, batch)
    bare = outputs(folded, batch)[0]
    np.testing.assert_array_equal(bare, np.asarray(model.get_layer("Conv1")(batch)))


def layers() -> Any:
    import keras

    return keras.layers


def small(*middle: Any, size: int = 9, channels: int = 4) -> Any:
    import keras

    image = keras.Input((size, size, channels))
    tensor = image
    for layer in middle:
        tensor = layer(tensor)
    model = keras.Model(image, tensor)
    shake(model)
    return model


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("center", "scale"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("kind", ["Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense"])
def test_each_kind_with_and_without_bias_gamma_and_beta(kind: str, center: bool, scale: bool, bias: bool) -> None:
    made: dict[str, dict[str, Any]] = {
        "Conv2D": {"filters": 6, "kernel_size": 3, "strides": 2, "groups": 2},
        "DepthwiseConv2D": {"kernel_size": 3, "depth_multiplier": 3, "padding": "same"},
        "SeparableConv2D": {"filters": 5, "kernel_size": 3, "depth_multiplier": 2},
        "Dense": {"units": 7},
    }
    kernel = getattr(layers(), kind)(use_bias=bias, bias_initializer="random_normal", **made[kind])
    model = small(kernel, layers().BatchNormalization(center=center, scale=scale, epsilon=0.1), layers().ReLU())
    batch = noise(3, 9, 9, 4)
    folded = fold_batch_norms(model, batch)
    assert norms(folded) == []
    assert_same_function(folded, model, batch, 1e-6)


@pytest.mark.slow
def test_scale_and_shift_by_hand() -> None:
    norm = layers().BatchNormalization(epsilon=0.25)
    norm.build((None, 2))
    norm.set_weights([np.array([2.0, 1.0]), np.array([0.5, 0.0]), np.array([3.0, -1.0]), np.array([3.75, 0.0])])
    scale, shift = affine(norm)
    np.testing.assert_array_equal(scale, [1.0, 2.0])  # 2 / sqrt(4), 1 / sqrt(0.25)
    np.testing.assert_array_equal(shift, [-2.5, 2.0])


@pytest.mark.slow
def test_what_must_not_be_folded() -> None:
    import keras

    make = keras.layers

    class Own(keras.layers.Conv2D):
        """Computes something else."""

        def call(self, inputs: Any) -> Any:
            return super().call(inputs) * 2

    refused = {
        "an activation between": [make.Conv2D(4, 3, activation="relu"), make.BatchNormalization()],
        "another layer between": [make.Conv2D(4, 3), make.Dropout(0.5), make.BatchNormalization()],
        "norm first": [make.BatchNormalization(), make.Conv2D(4, 3, padding="same")],
        "another axis": [make.Conv2D(4, 3), make.BatchNormalization(axis=1)],
        "a subclass": [Own(4, 3), make.BatchNormalization()],
        "another kind": [make.Conv2DTranspose(4, 3), make.BatchNormalization()],
        "another precision": [make.Conv2D(4, 3), make.BatchNormalization(dtype="mixed_bfloat16")],
    }
    for why, middle in refused.items():
        model = small(*middle)
        assert foldable(model) == [], why
        assert fold_batch_norms(model, noise(2, 9, 9, 4)) is model, why

    image = keras.Input((9, 9, 4))
    shared = make.Conv2D(4, 3, padding="same")
    twice = keras.Model(image, make.BatchNormalization()(shared(shared(image))))
    assert foldable(twice) == []
    tensor = make.Conv2D(4, 3)(image)
    both = keras.Model(image, make.Add()([make.BatchNormalization()(tensor), tensor]))
    assert foldable(both) == []
    named = keras.Model(image, [make.BatchNormalization()(tensor), tensor])
    assert foldable(named) == []
    norm = make.BatchNormalization()
    reused = keras.Model(image, make.Add()([norm(make.Conv2D(4, 3)(image)), norm(make.Conv2D(4, 3)(image))]))
    assert foldable(reused) == []


@pytest.mark.slow
def test_a_nested_model_and_the_layers_that_stay_are_shared() -> None:
    import keras

    make = keras.layers
    inner = small(make.Conv2D(4, 3, padding="same"), make.BatchNormalization(name="inner_norm"))
    dense = make.Dense(3)
    model = small(make.Conv2D(4, 3, padding="same"), make.BatchNormalization(), inner, dense)
    batch = noise(2, 9, 9, 4)
    folded = fold_batch_norms(model, batch)
    assert norms(folded) == []
    assert inner in folded.layers
    assert norms(inner) == ["inner_norm"]
    assert dense in folded.layers
    assert_same_function(folded, model, batch, 1e-6)


@pytest.mark.slow
def test_what_cannot_be_proven_is_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    make = layers()
    model = small(make.Conv2D(4, 3), make.BatchNormalization())
    # Before the mean is taken away, float32 has lost all but multiples of 8: folded it would be right, but not equal.
    model.layers[1].bias.assign(np.full(4, 1e8))
    model.layers[2].moving_mean.assign(np.full(4, 1e8))
    with caplog.at_level(logging.WARNING, logger="features.networks.folding"):
        assert fold_batch_norms(model, noise(2, 9, 9, 4)) is model
    assert "folding BatchNormalization changes the outputs by" in caplog.text
    assert "runs without folding" in caplog.text


@pytest.mark.slow
def test_a_sequential_model_is_left() -> None:
    import keras

    model = keras.Sequential([keras.Input((9, 9, 4)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()])
    assert fold_batch_norms(model, noise(2, 9, 9, 4)) is model
