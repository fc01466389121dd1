"""Which engine runs, in which precision, and what happens when memory does not suffice."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import save_network
from helpers import ROOT, call_pipeline, paint_folder, recipe, rounds, run_pipeline, run_without

from features.errors import ConfigurationError, OpenVinoError
from features.extraction.extraction import extract_features
from features.extraction.options import ExtractionOptions
from features.machine import how_to_install
from features.networks import engines, keras_engine
from features.networks import network as networks
from features.networks.backbones import BACKBONES
from features.networks.backend import is_out_of_memory
from features.networks.engines import choose_engine
from features.networks.reference import reference_images
from features.recipe import NetworkOptions
from features.store.reader import FeatureStore
from pipeline.predicting.options import PredictOptions


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with or without OpenVINO, a GPU and bfloat16."""

    from features import machine as machine_of

    def build(*, openvino: bool, gpu: bool, bfloat16: bool) -> None:
        monkeypatch.setattr(engines, "is_installed", lambda: openvino)
        monkeypatch.setattr(machine_of, "_GPU_NODES", ("/dev/null",) if gpu else ())
        monkeypatch.setattr(engines, "keras_backend", lambda: "tensorflow")
        monkeypatch.setattr(engines, "has_bfloat16", lambda: bfloat16)

    return build


def chosen_engine(engine: str, precision: str, device: str) -> str:
    return choose_engine(NetworkOptions(engine=engine, precision=precision, device=device))


@pytest.mark.parametrize(
    ("openvino", "gpu", "bfloat16", "asked", "chosen"),
    [
        (True, False, True, ("auto", "float32", "auto"), "openvino"),
        (False, False, True, ("auto", "float32", "auto"), "keras"),
        (True, True, True, ("auto", "float32", "auto"), "keras"),  # a GPU is Keras's
        (True, True, True, ("auto", "float32", "cpu"), "openvino"),
        (True, True, True, ("openvino", "float32", "auto"), "openvino"),
        (True, False, True, ("keras", "float32", "auto"), "keras"),
        (True, False, True, ("auto", "bfloat16", "auto"), "openvino"),
        (True, False, False, ("auto", "bfloat16", "auto"), "keras"),
        (True, False, True, ("auto", "float16", "auto"), "keras"),
        (False, False, True, ("openvino", "float32", "auto"), "keras"),
    ],
)
def test_the_engine_is_chosen_by_what_is_there(
    machine: Any, openvino: bool, gpu: bool, bfloat16: bool, asked: tuple[str, str, str], chosen: str
) -> None:
    machine(openvino=openvino, gpu=gpu, bfloat16=bfloat16)
    assert chosen_engine(*asked) == chosen


def test_a_gpu_gets_larger_batches(machine: Any) -> None:
    machine(openvino=True, gpu=True, bfloat16=True)
    assert ExtractionOptions().batch_size == PredictOptions().batch_size == 256
    for asked in ({"device": "cpu"}, {"engine": "openvino"}):
        assert ExtractionOptions(**asked).batch_size == 32
    assert ExtractionOptions(batch_size=7).batch_size == PredictOptions(batch_size=7).batch_size == 7
    machine(openvino=True, gpu=False, bfloat16=True)
    assert ExtractionOptions().batch_size == PredictOptions().batch_size == 32


def test_what_is_missing_is_said(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine(openvino=False, gpu=False, bfloat16=False)
    chosen_engine("openvino", "float32", "auto")
    assert f"OpenVINO is not installed ({how_to_install('openvino')}); using keras" in caplog.text
    caplog.clear()
    machine(openvino=True, gpu=False, bfloat16=False)
    chosen_engine("auto", "float32", "auto")
    assert caplog.messages == []


NONE = "this processor has no bfloat16 instructions"
SLOW = ". It is slower than float32 here"
KERAS = ", so OpenVINO does not compute in it; using keras"


@pytest.mark.parametrize(
    ("engine", "gpu", "bfloat16", "said"),
    [
        ("auto", False, True, []),
        ("auto", False, False, [NONE + SLOW]),
        ("keras", False, False, [NONE + SLOW]),
        ("openvino", False, False, [NONE + KERAS + SLOW]),
        ("openvino", True, False, [NONE + KERAS]),
        ("auto", True, False, []),
    ],
)
def test_bfloat16_on_a_processor_without_it_is_one_line(
    machine: Any, engine: str, gpu: bool, bfloat16: bool, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    machine(openvino=True, gpu=gpu, bfloat16=bfloat16)
    chosen_engine(engine, "bfloat16", "auto")
    assert caplog.messages == said


@pytest.mark.parametrize(("bfloat16", "end"), [(True, "that has it"), (False, "that has it, unlike this one")])
def test_bfloat16_of_an_onnx_network_needs_openvino(
    machine: Any, bfloat16: bool, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine(openvino=True, gpu=False, bfloat16=bfloat16)
    engine = "onnxruntime" if bfloat16 else "auto"
    with pytest.raises(ConfigurationError, match=f"onnxruntime computes in float32; received bfloat16.*{end}$"):
        choose_engine(NetworkOptions(engine=engine, precision="bfloat16"), ("onnxruntime", "openvino"))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("openvno", "float32", "auto"), "engine: received 'openvno'.*did you mean 'openvino'"),
        (("auto", "bf16", "auto"), "precision: received 'bf16', expected one of float32, bfloat16, float16"),
        (("auto", "float32", "cuda"), "device: received 'cuda', expected one of auto, cpu, gpu"),
        (("openvino", "float16", "auto"), "openvino runs only on the CPU, in float32 or bfloat16; received precision"),
        (("openvino", "float32", "gpu"), "received precision float32 and device gpu"),
    ],
)
def test_names_that_are_unknown_or_do_not_go_together(asked: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        chosen_engine(*asked)


class ResourceExhaustedError(Exception):
    """As TensorFlow's is called."""


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


class AcceleratorError(RuntimeError):
    """As torch's is called for what CUDA says."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ResourceExhaustedError("OOM when allocating tensor"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes."),  # JAX
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB"),
        AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        RuntimeError("Failed copying input tensor to GPU:0: Dst tensor is not initialized."),  # TensorFlow
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("Failed to allocate memory for requested buffer of size 1073741824"),  # ONNX Runtime
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:24]}",
)
def test_out_of_memory_is_recognised_in_every_spelling(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_an_error_that_followed_from_out_of_memory_is_recognised_too() -> None:
    """A capture that fails for lack of memory may end in another error."""
    with pytest.raises(RuntimeError, match="previous error") as caught, contextlib.ExitStack() as capture:
        capture.callback(ended_badly)
        raise OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(caught.value)


def ended_badly() -> None:
    raise AcceleratorError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"),
    ],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


class Device(keras_engine.KerasEngine):
    """An engine whose device holds so many images, and sums them."""

    def __init__(self, room: int, batch_size: int) -> None:
        self.names, self.batch_size, self._step, self._shape = ["sum"], batch_size, batch_size, (batch_size, 2, 2, 3)
        self.room, self.images_inferred, self.passes = room, 0, []

    def _forward_pass(self, images: np.ndarray) -> list[np.ndarray]:
        self.passes.append(self._step)
        if self._step > self.room:
            raise ResourceExhaustedError("no memory")
        return [images.sum(axis=(1, 2, 3)).astype(np.float32)]


def test_the_batch_is_halved_as_often_as_needed_when_memory_does_not_suffice(caplog: pytest.LogCaptureFixture) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 3), dtype=np.uint8)
    expected = images.sum(axis=(1, 2, 3))
    device = Device(room=4, batch_size=7)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(device(images)["sum"], expected)
        np.testing.assert_array_equal(device(images[:3])["sum"], expected[:3])
        np.testing.assert_array_equal(device(images)["sum"], expected)
    assert caplog.messages == [
        "out of memory with batches of 7 images; continuing with 4. Use --batch-size 4 to start with that."
    ]
    assert device.passes == [7, 4, 4, 4, 4, 4]
    assert device.images_inferred == 17
    small = Device(room=1, batch_size=7)
    np.testing.assert_array_equal(small(images)["sum"], expected)
    assert small.passes == [7, 4, 2, *[1] * 7]
    with pytest.raises(ResourceExhaustedError):
        Device(room=0, batch_size=1)(images[:1])


def test_a_network_that_openvino_cannot_run_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OpenVinoError("OpenVINO cannot convert numpy: no rule for Erfinv")

    made: list[dict[str, Any]] = []
    monkeypatch.setattr("features.networks.openvino_engine.open_engine", refuse)
    monkeypatch.setattr(networks.KerasRuntime, "engine", lambda *_, **options: made.append(options))
    description = networks.Description("0" * 64, {"last": (3,)}, "last", None)
    weights = networks.WeightsFile(None, "1" * 64, "random")

    def network(precision: str) -> networks.Network:
        recipes = (recipe(precision=precision),)
        return networks.Network(BACKBONES["vgg16"], "numpy", weights, "random", recipes, description, "openvino")

    network("float32").engine(network("float32").recipes, batch_size=4)
    assert made == [{"batch_size": 4, "device": "auto", "precision": "float32"}]
    assert "no rule for Erfinv; using Keras, which computes the same features more slowly" in caplog.text
    with pytest.raises(OpenVinoError, match=r"Erfinv\. Use --engine keras, or --precision float32"):
        network("bfloat16:openvino").engine(network("bfloat16:openvino").recipes, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near_and_not_equal(assets: Path, precision: str) -> None:
    weights = str(next((assets / "weights").glob("mobilenet_v2_1.0_224*")))
    options = {"weights": weights, "image_size": (96, 96), "engine": "keras"}
    single, half = (
        networks.resolve_network(NetworkOptions(**options, precision=kind)) for kind in ("float32", precision)
    )
    assert half.recipes[0].precision == f"{precision}:keras-tensorflow"
    assert single.recipes[0].fingerprint != half.recipes[0].fingerprint
    images = reference_images(96, 96, 4)
    (expected,), (found,) = (net.engine(net.recipes, batch_size=4)(images).values() for net in (single, half))
    assert expected.dtype == found.dtype == np.float32
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    low, high = {"bfloat16": (0.01, 0.4), "float16": (1e-4, 0.05)}[precision]
    assert low < difference < high


@pytest.mark.slow
def test_the_command_line_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    for arguments, message in (
        (("--engine", "onnx"), "engine: received 'onnx', expected one of auto, keras, openvino"),
        (("--precision", "int4"), "precision: received 'int4'"),
        (("--decode", "faster"), "decode: received 'faster', expected one of full, fast"),
    ):
        result = call_pipeline("extract", "sample:digits", "--out", tmp_path / "f.h5", *arguments)
        assert result.returncode == 2
        assert message in result.stderr
    assert not (tmp_path / "f.h5").exists()


@pytest.mark.slow
def test_extraction_with_a_kept_model_imports_no_keras(assets: Path, tmp_path: Path) -> None:
    network = ["--backbone", "mobilenetv2-0.35", "--image-size", "96", "--engine", "openvino", "--weights"]
    network.append(str(next((assets / "weights").glob("mobilenet_v2_0.35_224*"))))
    first, second = (
        paint_folder(tmp_path / name, {"cat": 20, "dog": 20}, start) for name, start in (("a", 0), ("b", 99))
    )
    result = call_pipeline("extract", first, "--out", tmp_path / "a.h5", *network)
    assert result.returncode == 0, result.stderr
    heavy = {"tensorflow", "keras", "sklearn", "jax", "torch"}
    again = run_without(heavy, "extract", second, "--out", tmp_path / "b.h5", *network)
    assert again.returncode == 0, again.stderr
    assert "40 inferred (40 new)" in again.stdout
    store = FeatureStore.open(tmp_path / "b.h5")
    assert store.provenance["engine"] == "openvino"
    with_keras = extract_features(
        second, tmp_path / "k.h5", backbone="mobilenetv2-0.35", image_size=96, engine="keras", weights=network[-1]
    )
    assert store.recipes["out_relu.avg"].fingerprint == with_keras.recipes["out_relu.avg"].fingerprint
    np.testing.assert_allclose(store.array()[:], with_keras.array()[:], rtol=0, atol=1e-4 * with_keras.array().max())


WATCH_MEMORY = """
import sys
import numpy as np
from features.networks.network import resolve_network
from features.recipe import NetworkOptions

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

network = resolve_network(NetworkOptions("mobilenetv2-0.35", sys.argv[1], image_size=96, engine=sys.argv[2]))
engine = network.engine(network.recipes, batch_size=4)
assert engine.name.startswith(sys.argv[2]), engine.name
pixels = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
kept, count = [], int(sys.argv[3])
for number in range(count):
    engine(pixels)
    if number + 1 in (count // 10, count):
        kept.append(resident())
print(*kept)
"""


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.pain(7)
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not say how much memory is resident"
)
@pytest.mark.parametrize("engine", ["keras", "openvino"])
def test_pain_07_memory_stays_flat_over_thousands_of_batches(assets: Path, engine: str) -> None:
    weights = next((assets / "weights").glob("mobilenet_v2_0.35_224*"))
    command = [sys.executable, "-c", WATCH_MEMORY, str(weights), engine, str(rounds(5000))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    early, late = map(int, result.stdout.split())
    assert late < 1.05 * early


@pytest.mark.slow
def test_a_broken_openvino_is_as_good_as_none(tmp_path: Path) -> None:
    """Keras runs instead, and it is said; a folder that happens to be called so is no package."""
    source = paint_folder(tmp_path / "images", {"cat": 6, "dog": 6})
    (tmp_path / "broken" / "openvino").mkdir(parents=True)
    (tmp_path / "broken" / "openvino" / "__init__.py").write_text("raise ImportError('libopenvino.so is missing')")
    network = ("--backbone", save_network(tmp_path / "tiny.keras"), "--json")
    for folder, warned in (("broken", True), ("plain", False)):
        path = os.pathsep.join((str(tmp_path / folder), str(ROOT)))
        (tmp_path / "plain" / "openvino").mkdir(parents=True, exist_ok=True)
        out = tmp_path / f"{folder}.h5"
        result = run_pipeline(
            "extract", source, "--out", out, *network, PYTHONPATH=path, BOTTLENECK_CACHE=str(tmp_path)
        )
        assert result.returncode == 0, result.stderr
        engine = json.loads(result.stdout)["provenance"]["engine"]
        if warned:
            assert engine == "keras-tensorflow"
            assert "cannot be imported: libopenvino.so is missing; using Keras" in result.stderr
        else:  # the folder hides no installed package
            assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_half_precision_runs_predict_as_they_were_made_and_are_not_fine_tuned(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"cat": 30, "dog": 30})
    network = ("--backbone", "mobilenetv2-0.35", "--weights", "random", "--image-size", 32, "--engine", "keras")
    out = tmp_path / "f.h5"
    half = ("--precision", "bfloat16", "--decode", "fast", "--split", "stratified")
    assert call_pipeline("extract", source, "--out", out, *network, *half).returncode == 0
    head = ("--head", "dropout-linear", "--param", "epochs=2", "--json")
    run = json.loads(call_pipeline("train-head", out, *head, "--runs", tmp_path / "runs").stdout)["run"]
    predicted = call_pipeline("predict", run, source)
    assert predicted.returncode == 0, predicted.stderr
    with open(Path(run) / "predictions.csv") as kept:
        stored = {row["path"]: row for row in csv.DictReader(kept)}
    live = {row["file"]: row for row in csv.DictReader(predicted.stdout.splitlines())}
    for file, row in stored.items():
        assert float(live[file]["cat"]) == pytest.approx(float(row["cat"]), abs=2e-3)
    refused = call_pipeline("finetune", run, "--images", source)
    assert refused.returncode == 2
    assert "features computed in bfloat16; fine-tuning continues from float32 ones" in refused.stderr
    other = run_pipeline("predict", run, source, KERAS_BACKEND="torch")
    assert "computed in bfloat16:keras-tensorflow, which is not available here" in other.stderr
    assert other.returncode == 1


@pytest.mark.slow
def test_keras_settings_that_would_change_the_numbers_are_refused(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"cat": 3, "dog": 3})
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text('{"floatx": "float16", "backend": "tensorflow"}')
    network = ("--backbone", "mobilenetv2-0.35", "--weights", "random", "--image-size", 32)
    environment = {"KERAS_HOME": str(tmp_path / ".keras"), "BOTTLENECK_CACHE": str(tmp_path / "cache")}
    result = run_pipeline("extract", source, "--out", tmp_path / "f.h5", *network, **environment)
    assert result.returncode == 2
    assert "Keras is set to floatx 'float16'" in result.stderr
    assert not (tmp_path / "f.h5").exists()
