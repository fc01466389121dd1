"""Backbone, cache and head with real weights: cached features are those of a live network, and the parts fit together."""

from __future__ import annotations

import csv
import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import paint_folder, run_pipeline

from features.errors import ConfigurationError, ParityError, RunError
from features.extraction.extraction import extract_features, prepare
from features.extraction.options import ExtractionOptions
from features.networks.keras_engine import xla_of
from features.networks.network import Network, resolve_network
from features.pixels.decode import decode_image
from features.recipe import NetworkOptions, PixelRule
from features.store.reader import FeatureStore
from pipeline.finetune import finetune
from pipeline.heads.kinds import head_of, make_head
from pipeline.predict import predict
from pipeline.runs.folder import Run
from pipeline.train_head import RunResult, train_head
from pipeline.tuning.endtoend import (
    batch_normalizations,
    network_of,
    probabilities_of,
    split_for_training,
    use_stored_statistics,
)
from pipeline.tuning.settings import TuningSettings
from pipeline.tuning.training import Tail

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]
CATS_DOGS = "images/cats_and_dogs_filtered"


def weights_of(assets: Path, name: str) -> str:
    return str(assets / "weights" / f"{name}_no_top.weights.h5")


def some_cats_and_dogs(assets: Path, folder: Path, count: int) -> Path:
    """The first images of each class, as ``train`` and ``validation``."""
    for split, kind in itertools.product(("train", "validation"), ("cats", "dogs")):
        target = folder / split / kind
        target.mkdir(parents=True)
        source = sorted((assets / CATS_DOGS / split / kind).iterdir())
        for path in source[: count if split == "train" else count // 2]:
            shutil.copy(path, target)
    return folder


@pytest.fixture(scope="module")
def pictures(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_cats_and_dogs(assets, tmp_path_factory.mktemp("pictures"), 48)


@pytest.fixture(scope="module")
def small(assets: Path) -> dict[str, Any]:
    """Options of a small, real network: MobileNetV2 0.35 at 96 pixels."""
    weights = weights_of(assets, "mobilenet_v2_0.35_224")
    return {"backbone": "mobilenetv2-0.35", "weights": weights, "image_size": (96, 96)}


@pytest.fixture(scope="module")
def store(pictures: Path, small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return extract_features(pictures, tmp_path_factory.mktemp("store") / "f.h5", **small)


@pytest.fixture(scope="module")
def trained(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train_head(store, "dropout-linear", runs=tmp_path_factory.mktemp("runs"), params={"epochs": 20})


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


def test_a_second_extraction_loads_no_network(pictures: Path, store: FeatureStore, small: dict[str, Any]) -> None:
    extraction = prepare(pictures, store.path, ExtractionOptions(**small))
    assert extraction.plan().to_infer == 0
    before = store.path.stat().st_mtime_ns
    result = extraction.run()
    assert (result.inferred, result.written, store.path.stat().st_mtime_ns) == (0, False, before)


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
    received = probabilities_of(np.asarray(split.tail(tensor, training=False)), head.temperature)
    np.testing.assert_allclose(received, head.predict_proba(features), atol=1e-5)


@pytest.mark.pain(5)
@pytest.mark.parametrize(("bn", "trained_tensors"), [("frozen", 18), ("affine", 54)])
def test_pain_05_moving_statistics_are_bit_identical_after_fine_tuning(
    pictures: Path, store: FeatureStore, tmp_path: Path, bn: str, trained_tensors: int
) -> None:
    # A head of one epoch leaves something to gain, so that an epoch of fine-tuning is kept and the weights move.
    weak = train_head(store, "dropout-linear", runs=tmp_path, params={"epochs": 1, "learning_rate": 1e-4})
    before = network_of(Run.open(weak.folder)).load()
    document = finetune(weak.folder, pictures, bn=bn, unfreeze="100", epochs=2, learning_rate=1e-5)
    assert document["after"]["log_loss"] < document["before"]["log_loss"]
    assert document["trainable_variables"] == trained_tensors + 2
    after = network_of(Run.open(document["run"])).load()
    moved = []
    for old, new in zip(before.layers, after.layers, strict=True):
        for first, second in zip(old.weights, new.weights, strict=True):
            if not np.array_equal(np.asarray(first), np.asarray(second)):
                moved.append(f"{old.name}/{first.name}")
    assert not [name for name in moved if "moving" in name]
    assert len(moved) == trained_tensors
    assert any(name.endswith("gamma") for name in moved) == (bn == "affine")


def test_finetune_reports_before_after_and_parity_and_is_not_repeated(
    pictures: Path, trained: RunResult, tmp_path: Path
) -> None:
    first = finetune(trained.folder, pictures, epochs=1, runs=tmp_path)
    assert first["parity_gap"] <= 1e-4
    assert first["before"]["accuracy"] == trained.metrics["validation"]["accuracy"]
    assert first["after"]["accuracy"] >= first["before"]["accuracy"]
    again = finetune(trained.folder, pictures, epochs=1, runs=tmp_path)
    assert (again["cached"], again["run"], again["after"]) == (True, first["run"], first["after"])


def test_prediction_equals_the_cached_head_and_names_what_it_cannot_read(
    pictures: Path, store: FeatureStore, trained: RunResult, tmp_path: Path
) -> None:
    shutil.copytree(pictures / "validation" / "cats", tmp_path / "images")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "predictions.csv"
    document = predict(trained.folder, tmp_path / "images", out=out)
    assert (document["images"], document["predicted"], document["unreadable"]) == (25, 24, 1)
    rows = {row["file"]: row for row in csv.DictReader(out.read_text().splitlines())}
    assert list(rows) == sorted(rows)
    assert rows.pop("broken.jpg") == {
        "file": "broken.jpg", "class": "", "probability": "", "cats": "", "dogs": "", "error": "not-an-image"
    }  # fmt: skip
    probabilities = head_of(Run.open(trained.folder)).predict_proba(store.load()[0])
    for path, expected in zip(store.images.paths, probabilities, strict=True):
        if path.startswith("validation/cats/"):
            row = rows.pop(path.rsplit("/", 1)[1])
            assert row["class"] == ("cats", "dogs")[int(expected.argmax())]
            assert abs(float(row["cats"]) - expected[0]) < 1e-4
    assert not rows


def test_other_weights_are_refused_with_both_digests(trained: RunResult, pictures: Path) -> None:
    with pytest.raises(RunError, match=r"another network \(weights: [0-9a-f]{64} -> [0-9a-f]{64}\).*--weights"):
        finetune(trained.folder, pictures, weights="random")


def test_other_images_and_other_numbers_stop_before_the_first_step(
    trained: RunResult, pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "images")
    for path in (tmp_path / "images" / "validation" / "cats").iterdir():
        shutil.copy(pictures / "train" / "dogs" / "dog.0.jpg", path)
    with pytest.raises(RunError, match=r"24 of 48 validation images of dropout-linear-\w+ are not here"):
        finetune(trained.folder, tmp_path / "images", runs=tmp_path / "runs")
    run = tmp_path / trained.run_id
    shutil.copytree(trained.folder, run)
    lines = (run / "predictions.csv").read_text().splitlines()
    fields = lines[1].split(",")
    fields[-2:] = ["0.5", "0.5"]
    (run / "predictions.csv").write_text("\n".join([lines[0], ",".join(fields), *lines[2:]]) + "\n")
    with pytest.raises(
        ParityError, match=r"before fine-tuning: probabilities of validation/cats/.* differ by"
    ) as caught:
        finetune(run, pictures, runs=tmp_path / "runs")
    assert caught.value.exit_code == 3
    assert list((tmp_path / "runs").iterdir()) == []


def test_renamed_images_are_found_by_content(trained: RunResult, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "images")
    for path in (tmp_path / "images").rglob("*.jpg"):
        path.rename(path.with_name(f"new_{path.name}"))
    document = finetune(trained.folder, tmp_path / "images", epochs=1, runs=tmp_path / "runs")
    assert document["parity_gap"] <= 1e-4


def test_half_precision_features_pass_the_gate_with_their_own_tolerance(
    pictures: Path, small: dict[str, Any], tmp_path: Path
) -> None:
    store = extract_features(pictures, tmp_path / "f.h5", dtype="float16", **small)
    assert store.array().dtype == np.float16
    params = {"epochs": 60, "patience": 0, "learning_rate": 0.01}
    run = train_head(store, "dropout-linear", runs=tmp_path / "runs", params=params)
    assert 0 < finetune(run.folder, pictures, epochs=1)["parity_gap"] <= 1e-2


@pytest.mark.parametrize("bn", ["frozen", "affine"])
def test_a_nested_model_file_keeps_its_statistics_and_opens_in_a_new_process(
    pictures: Path, tmp_path: Path, bn: str
) -> None:
    import keras

    start = tensor = keras.Input((64, 64, 3))
    for filters in (8, 16, 24):
        tensor = keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)(tensor)
        tensor = keras.layers.ReLU()(keras.layers.BatchNormalization()(tensor))
    inner = keras.Model(start, tensor, name="inner")
    image = keras.Input((64, 64, 3))
    outputs = keras.layers.Conv2D(8, 1)(inner(keras.layers.Rescaling(1 / 127.5, -1)(image)))
    outputs = keras.layers.ReLU()(keras.layers.BatchNormalization(name="outer")(outputs))
    keras.Model(image, outputs).save(tmp_path / "nested.keras")
    store = extract_features(pictures, tmp_path / "f.h5", backbone=str(tmp_path / "nested.keras"))
    run = train_head(store, "dropout-linear", runs=tmp_path / "runs", params={"epochs": 2})
    # an untrained network gains nothing certain: look at what the steps did, not at what was kept
    start = Run.open(run.folder)
    network = network_of(start)
    split = split_for_training(network, start.recipe, head_of(start), unfreeze="2", bn=bn)
    before = split.statistics()
    assert len(before) == 2 * 4
    tail = Tail(split, 1.0, TuningSettings(learning_rate=1e-3, batch_size=8))
    generator = np.random.default_rng(0)
    for _ in range(3):
        features = generator.normal(size=(8, *split.tail.input_shape[1:])).astype(np.float32)
        tail.step(features, np.arange(8, dtype=np.int32) % 2)
    assert all(map(np.array_equal, before, split.statistics()))
    trainable = {variable.path.rsplit("/", 1)[-1] for variable in split.tail.trainable_variables}
    assert ("gamma" in trainable) == (bn == "affine")
    if bn == "affine":  # what follows does not depend on it
        return
    document = finetune(run.folder, pictures, unfreeze="2", bn=bn, epochs=1, learning_rate=1e-4)
    predicted = run_pipeline("predict", document["run"], pictures / "validation" / "cats")
    assert predicted.returncode == 0, predicted.stderr
    assert len(predicted.stdout.splitlines()) == 25


def test_other_classes_are_listed(trained: RunResult, tmp_path: Path) -> None:
    paint_folder(tmp_path / "images", {"cats": 3, "wolves": 3})
    with pytest.raises(RunError, match="without its class 'dogs'; 'wolves' is no class of the run"):
        finetune(trained.folder, tmp_path / "images")


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
