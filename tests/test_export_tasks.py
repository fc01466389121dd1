"""Exported models of several labels and numbers give what predict gives."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import SIZE, save_network
from helpers import STRESS, paint

from features.extraction.extraction import extract_features
from features.store.reader import FeatureStore
from pipeline.runs.folder import Run
from pipeline.stages.evaluate import evaluate
from pipeline.stages.export import export
from pipeline.stages.predict import predict
from pipeline.stages.train_head import train_head

pytestmark = pytest.mark.slow  # loads Keras and converts networks
CASES = [("multilabel", "logistic", "onnx"), ("regression", "dense", "keras")]
FORMATS = ["keras", "saved_model", "onnx", "openvino", "litert"]
if STRESS:
    CASES = [
        (task, head, name)
        for task, head in (
            ("multilabel", "logistic"),
            ("multilabel", "dense"),
            ("regression", "ridge"),
            ("regression", "dense"),
        )
        for name in FORMATS
    ]


def manifest_of(folder: Path) -> Path:
    """Images of one colour, with labels and numbers that follow from it."""
    lines = ["path,tags,red,green,split"]
    for number, (red, green) in enumerate(np.random.default_rng(0).integers(0, 256, (40, 2)).tolist()):
        paint(folder / f"{number}.png", (red, green, 90), (40, 40))
        tags = ";".join(name for name, value in (("red", red), ("green", green)) if value > 120) or ";"
        lines.append(f"{number}.png,{tags},{red},{green},{('train', 'validation')[number % 4 == 0]}")
    path = folder / "m.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(path: Path) -> np.ndarray:
    with open(path, newline="") as stream:
        return np.array([[float(cell) for cell in row[-3:-1]] for row in list(csv.reader(stream))[1:]])


TARGETS = {"multilabel": "tags", "regression": "red,green"}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureStore]:
    """Features for each task: of a small network, in `make stress` of MobileNetV2."""
    folder = tmp_path_factory.mktemp("export-tasks")
    manifest = manifest_of(folder / "images")
    network: dict[str, Any] = {"weights": "random", "image_size": (32, 32)}
    if not STRESS:
        network = {"backbone": str(save_network(folder / "n.keras")), "image_size": (SIZE, SIZE)}
    return {
        task: extract_features(manifest, folder / f"{task}.h5", task=task, target=target, engine="keras", **network)
        for task, target in TARGETS.items()
    }


@pytest.mark.parametrize(("task", "head", "name"), CASES)
def test_an_exported_model_predicts_as_its_run(
    stores: dict[str, FeatureStore], tmp_path: Path, task: str, head: str, name: str
) -> None:
    store, target = stores[task], TARGETS[task]
    manifest = store.path.parent / "images" / "m.csv"
    params = {"epochs": 3} if head == "dense" else {}
    run = Run.open(train_head(store, head, runs=tmp_path / "runs", params=params).folder)
    suffix = {"keras": ".keras", "onnx": ".onnx", "litert": ".tflite"}.get(name, "")
    out = tmp_path / f"model{suffix}"
    document = export(run.folder, format=name, out=out)
    assert document["parity_gap"] <= document["tolerance"]
    predict(run.folder, manifest.parent, out=tmp_path / "run.csv", device="cpu")
    predict(out, manifest.parent, out=tmp_path / "model.csv")
    mine, theirs = rows_of(tmp_path / "run.csv"), rows_of(tmp_path / "model.csv")
    assert abs(mine - theirs).max() / max(1, abs(mine).max()) < (1e-3 if name == "litert" else 1e-4)
    scores = evaluate(out, manifest, target=target, split="validation")["scores"]
    first = run.task.choices[0]
    assert scores[first] == pytest.approx(run.metrics["validation"][first], abs=0.02)
