"""Backbone, cache and head with real weights: cached features are those of a live network, and the parts fit together."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photographs import some_cats_and_dogs, weights_of

from features.errors import ConfigurationError
from features.extraction.extraction import extract_features, prepare
from features.extraction.options import ExtractionOptions
from features.networks.keras_engine import xla_of
from features.networks.network import Network, resolve_network
from features.pixels.decode import decode_image
from features.recipe import NetworkOptions, PixelRule
from features.store.reader import FeatureStore
from pipeline.heads.kinds import make_head
from pipeline.tasks.table import CLASSIFICATION
from pipeline.tuning.endtoend import (
    batch_normalizations,
    split_for_training,
    use_stored_statistics,
)
from pipeline.tuning.settings import TuningSettings
from pipeline.tuning.training import Tail

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]


def pixels_of(store: FeatureStore, source: Path, rule: PixelRule) -> np.ndarray:
    return np.stack([decode_image((source / path).read_bytes(), rule).pixels for path in store.images.paths])


def relative_difference(received: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(received - expected).max() / np.abs(expected).max())


@pytest.fixture(
    scope="module", params=[("mobilenet_v2_1.0_224", "mobilenetv2", 224), ("vgg16", "vgg16", 96)], ids=lambda p: p[1]
)
def live(request: pytest.FixtureRequest, assets: Path) -> tuple[str, str, int, Any]:
    """Keras' own model with Keras' own loading, our name for it, and the size of its images."""
    import keras

    file, name, size = request.param
    builder = {"mobilenetv2": keras.applications.MobileNetV2, "vgg16": keras.applications.VGG16}[name]
    model = builder(include_top=False, weights=None, input_shape=(size, size, 3), pooling="avg")
    model.load_weights(weights_of(assets, file))
    return name, weights_of(assets, file), size, model


@pytest.mark.pain(3)
def test_pain_03_features_are_those_of_a_live_network_with_its_own_preprocessing(
    live: tuple[str, str, int, Any], assets: Path, tmp_path: Path
) -> None:
    import keras

    name, weights, side, model = live
    module = {"mobilenetv2": keras.applications.mobilenet_v2, "vgg16": keras.applications.vgg16}[name]
    source = some_cats_and_dogs(assets, tmp_path / "images", 4)
    options = {"backbone": name, "weights": weights, "image_size": side}
    stores = {
        size: extract_features(source, tmp_path / f"{size}.h5", batch_size=size, **options) for size in (1, 5, 16)
    }
    assert {len(store) for store in stores.values()} == {12}
    pixels = pixels_of(stores[1], source, PixelRule(side, side)).astype(np.float32)
    expected = np.asarray(model(module.preprocess_input(pixels.copy()), training=False))
    assert np.abs(expected).max() > 0.1  # real weights: nothing passes because everything is tiny
    wrong = np.asarray(model(pixels / 255, training=False))
    results = {}
    for size, store in stores.items():
        assert store.images.paths == stores[1].images.paths
        results[size] = relative_difference(store.array()[:, 0], expected)
        assert relative_difference(store.array()[:, 0], wrong) > 0.1
    assert max(results.values()) <= 1e-5, results


def test_two_layers_in_one_pass_with_exact_splits(assets: Path, tmp_path: Path) -> None:
    source = tmp_path / "flowers"
    for name in ("daffodil", "colts_foot"):
        (source / name).mkdir(parents=True)
        for path in sorted((assets / "images" / "flowers17" / name).iterdir())[:20]:
            shutil.copy(path, source / name)
    weights = weights_of(assets, "vgg16")
    layers = ("block4_pool", "block5_pool")
    options = {"backbone": "vgg16", "weights": weights, "layers": layers, "image_size": (96, 96)}
    result = prepare(source, tmp_path / "f.h5", ExtractionOptions(split="stratified:0.75,0.25", **options)).run()
    store = result.store
    assert result.inferred == 40  # one pass for both layers
    assert store.names == layers
    assert [store.shape(name) for name in layers] == [(40, 1, 6, 6, 512), (40, 1, 3, 3, 512)]
    assert [store.classes[label] for label in store.images.labels] == [
        path.split("/")[0] for path in store.images.paths
    ]
    counts = Counter(zip(store.images.labels.tolist(), store.images.splits.tolist(), strict=True))
    assert counts == {(0, 0): 15, (0, 1): 5, (1, 0): 15, (1, 1): 5}
    # the later layer follows from the earlier one
    network = resolve_network(NetworkOptions("vgg16", weights=weights, layers=layers, image_size=(96, 96)))
    import keras

    model = network.load()
    tail = keras.Model(model.get_layer("block4_pool").output, model.get_layer("block5_pool").output)
    again = np.asarray(tail(np.array(store.array("block4_pool")[:, 0])))
    assert relative_difference(again, store.array("block5_pool")[:, 0]) <= 1e-5


@pytest.fixture(scope="module")
def published(assets: Path) -> Network:
    return resolve_network(
        NetworkOptions("mobilenetv2", weights=weights_of(assets, "mobilenet_v2_1.0_224"), image_size=(160, 160))
    )


def fitted_head(columns: int) -> Any:
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(64, columns)).astype(np.float32), np.arange(64, dtype=np.int32) % 2
    head = make_head("dropout-linear", classes=("cat", "dog"), epochs=1)
    head.fit(X, y)
    return head


@pytest.mark.parametrize(("bn", "variables", "parameters"), [("affine", 56, 1_862_721), ("frozen", 20, 1_840_897)])
def test_parameter_counts_are_the_published_ones(published: Network, bn: str, variables: int, parameters: int) -> None:
    head = fitted_head(1280)
    split = split_for_training(published, published.recipes[0], head, unfreeze="100", bn=bn)
    assert split.backbone.count_params() == 2_257_984
    assert head.parameter_count == 1281
    assert split.cut == "block_10_project_BN"
    trainable = split.tail.trainable_variables
    assert (len(trainable), sum(int(np.prod(item.shape)) for item in trainable)) == (variables, parameters)
    assert split.trunk.trainable_variables == []


def test_xla_is_left_out_where_it_is_slow(published: Network) -> None:
    split = split_for_training(published, published.recipes[0], fitted_head(1280), unfreeze="100")
    assert Tail(split, 1.0, TuningSettings()).model.jit_compile is False  # depthwise convolutions on a processor
    import keras

    plain = keras.layers.Conv2D(1, 1)
    assert xla_of([plain]) == "auto"
    assert xla_of([plain, keras.layers.SeparableConv2D(1, 1)]) is False


def test_stored_statistics_change_nothing_at_inference(published: Network) -> None:
    model = published.load()
    batch = np.random.default_rng(0).uniform(-1, 1, (2, 160, 160, 3)).astype(np.float32)
    expected = np.asarray(model(batch, training=False))
    assert np.abs(expected).max() > 1
    for layer in batch_normalizations(model):
        use_stored_statistics(layer)
    np.testing.assert_array_equal(np.asarray(model(batch, training=False)), expected)
    np.testing.assert_array_equal(np.asarray(model(batch, training=True)), expected)


@pytest.mark.pain(6)
@pytest.mark.parametrize("unfreeze", ["last-block", "block5_conv2", "-3"])
def test_pain_06_a_head_goes_on_vgg16_and_its_weights_fit(assets: Path, unfreeze: str) -> None:
    network = resolve_network(
        NetworkOptions("vgg16", weights=weights_of(assets, "vgg16"), layers=["block5_pool"], image_size=(64, 64))
    )
    generator = np.random.default_rng(0)
    X = generator.normal(size=(30, 2, 2, 512)).astype(np.float32)
    head = make_head("mlp-256", classes=("a", "b", "c"), epochs=1)
    head.fit(X, np.arange(30, dtype=np.int32) % 3)
    split = split_for_training(network, network.recipes[0], head, unfreeze=unfreeze)
    pixels = generator.integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    (features,) = network.engine(network.recipes, batch_size=4)(pixels).values()
    import keras

    prepared = keras.applications.vgg16.preprocess_input(pixels.astype(np.float32))
    tensor = split.trunk(prepared, training=False)
    assert {id(item) for item in split.trunk.weights}.isdisjoint(id(item) for item in split.tail.weights)
    composed = split.tail(tensor, training=False)
    whole = head.network(network.load()(prepared, training=False), training=False)
    assert relative_difference(np.asarray(composed), np.asarray(whole)) <= 1e-6
    received = CLASSIFICATION.activate(np.asarray(split.tail(tensor, training=False), np.float64), head.temperature)
    np.testing.assert_allclose(received, head.predict_proba(features), atol=1e-5)


def test_unfreezing_behind_the_features_and_unknown_layers(published: Network) -> None:
    head = fitted_head(1280)
    with pytest.raises(ConfigurationError, match="did you mean 'block_11_expand'"):
        split_for_training(published, published.recipes[0], head, unfreeze="block11_expand")
    with pytest.raises(ConfigurationError, match="received layer 154, expected one of the network's layers 0 to 153"):
        split_for_training(published, published.recipes[0], head, unfreeze="154")
    with pytest.raises(ConfigurationError, match="frozen, affine"):
        split_for_training(published, published.recipes[0], head, bn="train")


def test_unknown_layer_and_backbone_offer_the_nearest(assets: Path) -> None:
    weights = weights_of(assets, "vgg16")
    with pytest.raises(ConfigurationError, match="has no layer 'block5_pol'; did you mean 'block5_pool'"):
        resolve_network(NetworkOptions("vgg16", weights=weights, layers=["block5_pol"]))
    with pytest.raises(ConfigurationError, match="vgg16"):
        resolve_network(NetworkOptions("vgg61"))
