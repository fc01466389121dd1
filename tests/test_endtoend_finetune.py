"""Fine-tuning a real network with real weights, its checks before and after, and what it refuses."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import paint_folder, part, run_pipeline
from photographs import some_cats_and_dogs, weights_of

from features.errors import ParityError, RunError
from features.extraction.extraction import extract_features, prepare
from features.extraction.options import ExtractionOptions
from features.store.reader import FeatureStore
from pipeline.heads.kinds import head_of
from pipeline.runs.folder import Run
from pipeline.stages.finetune import finetune
from pipeline.stages.predict import predict
from pipeline.stages.train_head import RunResult, train_head
from pipeline.tuning.endtoend import (
    network_of,
    split_for_training,
)
from pipeline.tuning.settings import TuningSettings
from pipeline.tuning.training import Tail

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]


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


def test_a_second_extraction_loads_no_network(pictures: Path, store: FeatureStore, small: dict[str, Any]) -> None:
    extraction = prepare(pictures, store.path, ExtractionOptions(**small))
    assert extraction.plan().to_infer == 0
    before = store.path.stat().st_mtime_ns
    result = extraction.run()
    assert (result.inferred, result.written, store.path.stat().st_mtime_ns) == (0, False, before)


@pytest.fixture(scope="module")
def weak(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A head of one epoch leaves something to gain, so that an epoch of fine-tuning is kept; and the network's weights."""
    params = {"epochs": 1, "learning_rate": 1e-4}
    folder = train_head(store, "dropout-linear", runs=tmp_path_factory.mktemp("weak"), params=params).folder
    return folder, weights_by_name(folder)


def weights_by_name(run: str | Path) -> dict[str, np.ndarray]:
    layers = network_of(Run.open(run)).load().layers
    return {f"{layer.name}/{weight.name}": np.asarray(weight) for layer in layers for weight in layer.weights}


@pytest.mark.pain(5)
@pytest.mark.stress
@pytest.mark.parametrize(("bn", "trained_tensors"), part([("frozen", 18), ("affine", 54)], "affine"))
def test_pain_05_moving_statistics_are_bit_identical_after_fine_tuning(
    pictures: Path, weak: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, bn: str, trained_tensors: int
) -> None:
    run, before = weak
    document = finetune(run, pictures, runs=tmp_path, bn=bn, unfreeze="100", epochs=2, learning_rate=1e-5)
    assert document["after"]["log_loss"] < document["before"]["log_loss"]
    assert document["trainable_variables"] == trained_tensors + 2
    after = weights_by_name(document["run"])
    assert after.keys() == before.keys()
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert len(before) > 250
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
    document = finetune(trained.folder, tmp_path / "images", unfreeze="head", epochs=1, runs=tmp_path / "runs")
    assert document["parity_gap"] <= 1e-4


def test_half_precision_features_pass_the_gate_with_their_own_tolerance(
    pictures: Path, small: dict[str, Any], tmp_path: Path
) -> None:
    store = extract_features(pictures, tmp_path / "f.h5", dtype="float16", **small)
    assert store.array().dtype == np.float16
    params = {"epochs": 60, "patience": 0, "learning_rate": 0.01}
    run = train_head(store, "dropout-linear", runs=tmp_path / "runs", params=params)
    assert 0 < finetune(run.folder, pictures, unfreeze="head", epochs=1)["parity_gap"] <= 1e-2


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
