"""All stages on another backend of Keras, without TensorFlow: the numbers are those that TensorFlow gave.

``make test-jax`` and ``make test-torch`` run this file; with ``STRESS=1`` they also take MobileNetV2 with its real weights, which JAX
compiles for minutes. With ``KERAS_BACKEND=tensorflow`` it shows that the numbers still are TensorFlow's.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, STRESS

from features.store.reader import FeatureStore
from pipeline.cli import main

BACKEND = os.environ.get("KERAS_BACKEND")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BACKEND is None, reason="KERAS_BACKEND is not set: run make test-jax or make test-torch"),
]
GOLDEN = ROOT / "tests" / "golden" / "runs"
WEIGHTS = "mobilenet_v2_0.35_224_no_top.weights.h5"
SOME = 12  # numbers are compared
EACH = 20  # images per class of real photographs
WORLDS = {"tiny": (), "real": ("--image-size", "96", "--batch-size", "16")}
TUNE = ("--epochs", "2", "--batch-size", "8", "--optimizer", "sgd", "--learning-rate", "0.01")
HEADS = {
    "dropout-linear": ("epochs=5", "learning_rate=0.01"),  # of the bank
    "mlp-256": ("epochs=5", "hidden=[16]", "feature_noise=0.1"),
    "linear-sgd": ("epochs=5",),  # by Keras's own steps
}
TUNED = {
    "from images": ("--images", "images", *TUNE),
    "with augmentation": ("--images", "images", "--augment", "flip-rotation", *TUNE),
    "from a store": ("--from-cache", "boundary.h5", "--bn", "affine", *TUNE),
}
# Made with TensorFlow 2.21 and Keras 3.15.1.
# fmt: off
EXPECTED: dict[str, dict[str, list[float]]] = {
    "tiny": {
        "features": [0.5340563, 0.04671244, 0.3130646, 0.3816994, 0.0, 0.1529587, 0.275357, 2.079156, 1.252184, 0.0, 1.096324, 0.4127764],
        "dropout-linear": [0.3712522, 0.2762874, 0.3370488, 0.3216371, 0.3399476, 0.3101302, 0.2855109, 0.327011, 0.3664103, 0.3465579, 0.3913601, 0.3860883],
        "mlp-256": [0.3337738, 0.3315665, 0.3332385, 0.3324263, 0.3336213, 0.3322797, 0.3330927, 0.3350081, 0.3345873, 0.3339003, 0.3347791, 0.3341689],
        "linear-sgd": [0.335264, 0.3314743, 0.3333472, 0.3333285, 0.3331452, 0.3337034, 0.3307812, 0.3341676, 0.3352582, 0.3347304, 0.3362846, 0.3354245],
        "from images": [0.3725264, 0.2561415, 0.3320345, 0.3149835, 0.3313992, 0.3100584, 0.2608386, 0.3259816, 0.3804078, 0.3560035, 0.4145345, 0.4038636],
        "with augmentation": [0.3728507, 0.2570252, 0.3348948, 0.3176637, 0.3280707, 0.3046958, 0.2673005, 0.3358394, 0.3756216, 0.349374, 0.4195505, 0.4094811],
        "from a store": [0.3724162, 0.2557865, 0.3318482, 0.31476, 0.3313202, 0.3100347, 0.2606489, 0.3259949, 0.3804624, 0.3560199, 0.4146918, 0.4039506],
    },
    "real": {},
}
# fmt: on


def call(*words: object) -> Any:
    """A command, and the document that it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main([*map(str, words), "--quiet", "--json"])
    assert code == 0, words
    return json.loads(said.getvalue())


def refused(*words: object) -> str:
    """A command that fails, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([*map(str, words), "--quiet"]) == 2
    return said.getvalue()


def probabilities(run: str | Path) -> list[float]:
    """Of the second class, for the validation images of a run."""
    with open(Path(run) / "predictions.csv", newline="", encoding="utf-8") as stream:
        return [float(line[-1]) for line in list(csv.reader(stream))[1:]]


def check(received: Any, expected: Any, scale: float = 1.0) -> None:
    np.testing.assert_allclose(
        received, expected, rtol=0, atol=1e-5 * scale, err_msg=repr(np.round(received, 7).tolist())
    )


class World:
    """A working folder with images and the stores of their features; every run lies in its ``runs``."""

    def __init__(self, name: str, folder: Path, assets: Path) -> None:
        self.expected = EXPECTED[name]
        if name == "tiny":
            shutil.copytree(GOLDEN / "images", folder / "images")
            network: tuple[object, ...] = ("--backbone", GOLDEN / "tiny.keras")
        else:
            for kind in ("cats", "dogs"):
                (folder / "images" / kind).mkdir(parents=True)
                pictures = sorted((assets / "images" / "cats_and_dogs_filtered" / "validation" / kind).iterdir())
                for path in pictures[:EACH]:
                    shutil.copy(path, folder / "images" / kind)
            network = ("--backbone", "mobilenetv2-0.35", "--weights", assets / "weights" / WEIGHTS)
        self.extracting = ("images", "--split", "stratified:0.7,0.3", *network, *WORLDS[name])

    def extract(self, out: str, *words: str) -> np.ndarray:
        """Features of some images, and some columns of them."""
        call("extract", *self.extracting, "--out", out, *words)
        store = FeatureStore.open(out)
        features = np.array(store.array(store.names[0])[:])
        features = features.reshape(len(features), -1)
        return features[::8, :: max(1, features.shape[1] // 8)]

    def check(self, what: str, received: Any, scale: float = 1.0) -> None:
        """Compare with what TensorFlow gave."""
        check(np.ravel(received)[:SOME], self.expected.get(what, []), scale)


@pytest.fixture(
    scope="module",
    autouse=True,
    params=["tiny", pytest.param("real", marks=pytest.mark.skipif(not STRESS, reason="minutes: STRESS=1"))],
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("backend")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.runs.writing.plot_run", lambda folder, *_: folder.mkdir())
        yield World(request.param, folder, assets)


@pytest.fixture(scope="module")
def features(world: World) -> np.ndarray:
    world.extract("boundary.h5", "--engine", "keras", "--layer", "boundary")
    return world.extract("features.h5", "--engine", "keras")


@pytest.fixture(scope="module")
def runs(features: np.ndarray) -> dict[str, str]:
    """Folders of the trained heads, by name."""
    return {
        name: call("train-head", "features.h5", "--head", name, *(f"--param={item}" for item in params))["run"]
        for name, params in HEADS.items()
    }


@pytest.fixture(scope="module")
def tuned(runs: dict[str, str]) -> dict[str, Any]:
    """What `finetune` says of each kind."""
    return {kind: call("finetune", runs["dropout-linear"], *words) for kind, words in TUNED.items()}


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it is the backend")
def test_tensorflow_is_not_there() -> None:
    assert importlib.util.find_spec("tensorflow") is None


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX keeps what it compiles")
def test_what_jax_compiles_is_kept_in_our_cache(own_cache: Path) -> None:
    code = (
        "from features.networks.backend import load_keras; load_keras(); import jax; jax.jit(lambda x: 3 * x + 1)(2.0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in (own_cache / "jax").glob("jit__lambda*")]


def test_features_are_those_of_tensorflow(world: World, features: np.ndarray) -> None:
    world.check("features", features, scale=float(features.max()))


def test_other_engines_and_workers_make_the_same_features(world: World, features: np.ndarray) -> None:
    check(world.extract("openvino.h5", "--engine", "openvino"), features, scale=float(features.max()))
    np.testing.assert_array_equal(world.extract("workers.h5", "--engine", "keras", "--cluster", "local:2"), features)


@pytest.mark.parametrize("head", HEADS)
def test_heads_say_what_those_of_tensorflow_say(world: World, runs: dict[str, str], head: str) -> None:
    world.check(head, probabilities(runs[head]))


@pytest.mark.parametrize("kind", TUNED)
def test_fine_tuned_networks_say_what_those_of_tensorflow_say(world: World, tuned: dict[str, Any], kind: str) -> None:
    assert tuned[kind]["parity_gap"] < 1e-5
    world.check(kind, probabilities(tuned[kind]["run"]))


@pytest.mark.parametrize("kind", ["dropout-linear", "from images"])
def test_an_export_predicts_what_its_run_predicts(runs: dict[str, str], tuned: dict[str, Any], kind: str) -> None:
    run = runs[kind] if kind in runs else tuned[kind]["run"]
    out = f"{kind.partition(' ')[0]}.keras"
    assert call("export", run, "--format", "keras", "--out", out)["parity_gap"] < 1e-5
    said = []
    for model in (run, out):
        call("predict", model, "images", "--format", "jsonl", "--out", name := f"{len(said)}-{out}.jsonl")
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        said.append([list(json.loads(line)["probabilities"].values()) for line in lines])
    assert len(said[0]) in (36, 2 * EACH)
    check(said[0], said[1])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it converts")
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_what_only_tensorflow_converts_is_refused_with_a_way_out(runs: dict[str, str], name: str) -> None:
    out = "none.onnx" if name == "onnx" else "none"
    said = refused("export", runs["dropout-linear"], "--format", name, "--out", out)
    assert f"format {name}: the conversion needs TensorFlow, but Keras runs on {BACKEND}. Use --format keras" in said


def test_a_sweep_is_trained_evaluated_and_reported(world: World, runs: dict[str, str], tuned: dict[str, Any]) -> None:
    Path("sweep.yaml").write_text(
        "version: 1\nheads:\n"
        "  - {head: dropout-linear, grid: {epochs: [4], learning_rate: [0.003, 0.03]}}\n"
        "  - {head: mlp-256, grid: {hidden: [[8]], epochs: [4]}}\n"
        "  - {head: linear-sgd, grid: {epochs: [3]}}\n"
        "  - {head: logistic, grid: {C: [0.01]}}\n"
    )
    answer = call("train-head", "features.h5", "--heads", "sweep.yaml", "--runs", "sweep", "--n-jobs", "1")
    assert (answer["trained"], answer["failed"]) == (5, [])
    world.check("sweep", [probabilities(Path("sweep", run))[0] for run in answer["runs"]])
    world.check("evaluate", [call("evaluate", "sweep", "images")["scores"]["log_loss"]])
    assert len(call("leaderboard", "runs")) == len(HEADS) + len(TUNED)
    assert call("report", "runs", "--out", "report.html")["runs"] == len(HEADS) + len(TUNED)
