"""All stages on another backend of Keras, without TensorFlow: the numbers are those that TensorFlow gave.

``make test-jax`` and ``make test-torch`` run this file; with ``STRESS=1`` they also run MobileNetV2 with its real weights, which JAX
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
TINY = ("--backbone", GOLDEN / "tiny.keras")
SOME = 12  # numbers are compared
EACH = 20  # images per class of real photographs
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
EXPECTED: dict[str, list[float]] = {
    "features": [0.5340563, 0.04671244, 0.3130646, 0.3816994, 0.0, 0.1529587, 0.275357, 2.079156, 1.252184, 0.0, 1.096324, 0.4127764],
    "dropout-linear": [0.3712522, 0.2762874, 0.3370488, 0.3216371, 0.3399476, 0.3101302, 0.2855109, 0.327011, 0.3664103, 0.3465579, 0.3913601, 0.3860883],
    "mlp-256": [0.3337738, 0.3315665, 0.3332385, 0.3324263, 0.3336213, 0.3322797, 0.3330927, 0.3350081, 0.3345873, 0.3339003, 0.3347791, 0.3341689],
    "linear-sgd": [0.335264, 0.3314743, 0.3333472, 0.3333285, 0.3331452, 0.3337034, 0.3307812, 0.3341676, 0.3352582, 0.3347304, 0.3362846, 0.3354245],
    "from images": [0.3431477, 0.3212956, 0.3322553, 0.3325001, 0.3305834, 0.3352094, 0.3161695, 0.3363564, 0.3435989, 0.3409187, 0.3498828, 0.3449462],
    "with augmentation": [0.3389574, 0.3194854, 0.3339234, 0.331289, 0.3342142, 0.3283027, 0.3295227, 0.3487249, 0.3411913, 0.3353745, 0.3544013, 0.3487262],
    "from a store": [0.34314, 0.3212741, 0.3322395, 0.3324855, 0.3305736, 0.3352009, 0.3161521, 0.33635, 0.343594, 0.3409136, 0.3498836, 0.3449438],
    "sweep": [0.3422589, 0.3615587, 0.3329487, 0.3341633, 0.3667981],
    "evaluate": [1.038959],
}
REAL = [
    2.437184, 0.2373586, 0.0, 0.0, 0.5851847, 0.0, 0.0, 0.0, 0.0, 3.41575, 2.970788, 0.0, 0.0506123, 0.0, 0.0, 0.0, 1.210935, 0.0, 0.157447, 0.0,
    1.20116, 2.285975, 0.0, 0.7012756, 2.734783, 1.144886, 0.7484754, 0.0361412, 3.714622, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1299608, 0.2218151, 0.6889718, 0.3391429, 1.537202, 0.0,
]
# VGG16 with its real weights: a head; the last block tuned with it; and the head alone tuned for as long.
REAL_HEAD = [0.3247897, 0.4610728, 0.5610432, 0.8482606]
REAL_TUNED = [0.1000683, 0.1085767, 0.8293185, 0.9987108]
REAL_TUNED_HEAD = [0.3079416, 0.4618199, 0.5688916, 0.8735808]
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


def extract(out: str, *words: object) -> np.ndarray:
    """Features of the images by name: (n, d)."""
    call("extract", "images", "--split", "stratified:0.7,0.3", "--out", out, *words)
    store = FeatureStore.open(out)
    features = np.array(store.array(store.names[0])[:])
    return features.reshape(len(features), -1)


def check_kept(what: str, received: Any, scale: float = 1.0) -> None:
    """Compare with what TensorFlow gave."""
    check(np.ravel(received)[:SOME], EXPECTED.get(what, []), scale)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with images; every run lies in its ``runs``."""
    place = tmp_path_factory.mktemp("backend")
    shutil.copytree(GOLDEN / "images", place / "images")
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.runs.writing.plot_run", lambda folder, *_: folder.mkdir())
        yield place


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    extract("boundary.h5", *TINY, "--engine", "keras", "--layer", "boundary")
    return extract("features.h5", *TINY, "--engine", "keras")


@pytest.fixture(scope="module")
def runs(features: np.ndarray) -> dict[str, str]:
    """Folders of the trained heads, by name."""
    return {
        name: call("train-head", "features.h5", "--head", name, *(f"--param={item}" for item in params))["run"]
        for name, params in HEADS.items()
    }


@pytest.fixture(scope="module")
def tuned(runs: dict[str, str]) -> dict[str, Any]:
    """What `finetune` says of each kind, from a head without dropout: its random numbers are those of the backend."""
    return {kind: call("finetune", runs["linear-sgd"], *words) for kind, words in TUNED.items()}


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


def test_features_are_those_of_tensorflow(features: np.ndarray) -> None:
    check_kept("features", features[::8], scale=float(features.max()))


def photographs(folder: Path, kinds: dict[str, Path], each: int) -> None:
    """Copy the first photographs of each class into the folder `images`."""
    for kind, source in kinds.items():
        (folder / "images" / kind).mkdir(parents=True)
        for path in sorted(source.iterdir())[:each]:
            shutil.copy(path, folder / "images" / kind)


def test_real_weights_are_fine_tuned_as_by_tensorflow(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block of VGG16, behind its trunk in every pass, and from the layer before it in a store.

    Tuning the block moves probabilities by a third: much further than its head alone, tuned for as long, would.
    """
    monkeypatch.chdir(tmp_path)
    flowers = assets / "images" / "flowers17"
    photographs(tmp_path, {kind: flowers / kind for kind in ("bluebell", "daffodil")}, 6)
    weights = assets / "weights" / "vgg16_no_top.weights.h5"
    words = ("--backbone", "vgg16", "--weights", weights, "--image-size", 32, "--engine", "keras")
    extract("features.h5", *words)
    head = ("--head", "linear-sgd", "--param=epochs=3", "--param=learning_rate=0.01")
    run = call("train-head", "features.h5", *head)["run"]
    check(probabilities(run), REAL_HEAD)
    sources = [("--images", "images")]
    if STRESS or BACKEND != "jax":  # which compiles every network anew
        extract("boundary.h5", *words, "--layer", "boundary")
        sources.append(("--from-cache", "boundary.h5"))
    for source in sources:
        tuned = call("finetune", run, *source, *TUNE)
        assert tuned["parity_gap"] < 1e-5
        received = probabilities(tuned["run"])
        check(received, REAL_TUNED)
        for untuned in (REAL_HEAD, REAL_TUNED_HEAD):
            assert np.abs(np.subtract(received, untuned)).max() > 0.3


@pytest.mark.skipif(not STRESS, reason="JAX compiles for minutes: STRESS=1")
def test_features_of_real_weights_are_those_of_tensorflow(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = assets / "images" / "cats_and_dogs_filtered" / "validation"
    photographs(tmp_path, {kind: pictures / kind for kind in ("cats", "dogs")}, EACH)
    weights = assets / "weights" / "mobilenet_v2_0.35_224_no_top.weights.h5"
    words = ("--backbone", "mobilenetv2-0.35", "--weights", weights, "--image-size", 96, "--engine", "keras")
    features = extract("real.h5", *words)[::8, ::160]
    check(features.ravel(), REAL, scale=float(features.max()))


def test_other_engines_and_workers_make_the_same_features(features: np.ndarray) -> None:
    check(extract("openvino.h5", *TINY, "--engine", "openvino"), features, scale=float(features.max()))
    np.testing.assert_array_equal(extract("workers.h5", *TINY, "--engine", "keras", "--cluster", "local:2"), features)


@pytest.mark.parametrize("head", HEADS)
def test_heads_say_what_those_of_tensorflow_say(runs: dict[str, str], head: str) -> None:
    check_kept(head, probabilities(runs[head]))


@pytest.mark.parametrize("kind", TUNED)
def test_fine_tuned_networks_say_what_those_of_tensorflow_say(tuned: dict[str, Any], kind: str) -> None:
    assert tuned[kind]["parity_gap"] < 1e-5
    check_kept(kind, probabilities(tuned[kind]["run"]))


def test_an_export_predicts_what_its_run_predicts(tuned: dict[str, Any]) -> None:
    run, out = tuned["from images"]["run"], "tuned.keras"
    assert call("export", run, "--format", "keras", "--out", out)["parity_gap"] < 1e-5
    said = []
    for model in (run, out):
        call("predict", model, "images", "--format", "jsonl", "--out", name := f"{len(said)}-{out}.jsonl")
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        said.append([list(json.loads(line)["probabilities"].values()) for line in lines])
    assert len(said[0]) == 36
    check(said[0], said[1])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it converts")
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_what_only_tensorflow_converts_is_refused_with_a_way_out(runs: dict[str, str], name: str) -> None:
    out = "none.onnx" if name == "onnx" else "none"
    said = refused("export", runs["dropout-linear"], "--format", name, "--out", out)
    assert f"format {name}: the conversion needs TensorFlow, but Keras runs on {BACKEND}. Use --format keras" in said


def test_a_sweep_is_trained_evaluated_and_reported(runs: dict[str, str], tuned: dict[str, Any]) -> None:
    Path("sweep.yaml").write_text(
        "version: 1\nheads:\n"
        "  - {head: dropout-linear, grid: {epochs: [4], learning_rate: [0.003, 0.01]}}\n"
        "  - {head: mlp-256, grid: {hidden: [[8]], epochs: [4]}}\n"
        "  - {head: linear-sgd, grid: {epochs: [3]}}\n"
        "  - {head: logistic, grid: {C: [0.01]}}\n"
    )
    answer = call("train-head", "features.h5", "--heads", "sweep.yaml", "--runs", "sweep", "--n-jobs", "1")
    assert (answer["trained"], answer["failed"]) == (5, [])
    check_kept("sweep", [probabilities(Path("sweep", run))[0] for run in answer["runs"]])
    check_kept("evaluate", [call("evaluate", Path("sweep", answer["runs"][0]), "images")["scores"]["log_loss"]])
    assert len(call("leaderboard", "runs")) == len(HEADS) + len(TUNED)
    assert call("report", "runs", "--out", "report.html")["runs"] == len(HEADS) + len(TUNED)
