"""Which engine runs, in which precision, and what happens when memory does not suffice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import recipe, run_pipeline

from features import engines, networks
from features.engines import choose_engine, is_out_of_memory
from features.errors import ConfigurationError
from features.openvino_engine import OpenVinoError, reference_images


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with or without OpenVINO, a GPU and bfloat16."""

    def build(*, openvino: bool, gpu: bool, bfloat16: bool) -> None:
        monkeypatch.setattr(engines, "is_installed", lambda: openvino)
        monkeypatch.setattr(engines, "_GPU_NODES", ("/dev/null",) if gpu else ())
        monkeypatch.setattr(engines, "has_bfloat16", lambda: bfloat16)

    return build


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
    assert choose_engine(*asked) == chosen


def test_what_is_missing_is_said(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine(openvino=False, gpu=False, bfloat16=False)
    choose_engine("openvino", "float32", "auto")
    assert "OpenVINO is not installed (pip install 'bottleneck-features[openvino]'); Keras is used" in caplog.text
    choose_engine("auto", "bfloat16", "auto")
    assert "this processor has no bfloat16: it is computed all the same, but slower" in caplog.text
    caplog.clear()
    choose_engine("auto", "float32", "auto")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("openvno", "float32", "auto"), "engine: received 'openvno'.*did you mean 'openvino'"),
        (("auto", "bf16", "auto"), "precision: received 'bf16', expected one of float32, bfloat16, float16"),
        (("auto", "float32", "cuda"), "device: received 'cuda', expected one of auto, cpu, gpu"),
        (("openvino", "float16", "auto"), "openvino computes in float32 or bfloat16 on processors; received precision"),
        (("openvino", "float32", "gpu"), "received precision float32 and device gpu"),
    ],
)
def test_names_that_are_unknown_or_do_not_go_together(asked: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        choose_engine(*asked)


class ResourceExhaustedError(Exception):
    """As TensorFlow's is called."""


def test_out_of_memory_is_recognised() -> None:
    assert is_out_of_memory(ResourceExhaustedError("OOM when allocating tensor"))
    assert is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"))  # JAX
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


class Device(engines.KerasEngine):
    """An engine whose device holds so many images, and sums them."""

    def __init__(self, room: int, batch_size: int) -> None:
        self.names, self.batch_size, self._step, self._shape = ["sum"], batch_size, batch_size, (batch_size, 2, 2, 3)
        self.room, self.images_inferred, self.passes = room, 0, []

    def _forward_pass(self, images: np.ndarray) -> list[np.ndarray]:
        self.passes.append(self._step)
        if self._step > self.room:
            raise ResourceExhaustedError("no memory")
        return [images.sum(axis=(1, 2, 3)).astype(np.float32)]


def test_the_batch_is_halved_once_when_memory_does_not_suffice(caplog: pytest.LogCaptureFixture) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 3), dtype=np.uint8)
    expected = images.sum(axis=(1, 2, 3))
    device = Device(room=4, batch_size=7)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(device(images)["sum"], expected)
        np.testing.assert_array_equal(device(images[:3])["sum"], expected[:3])
        np.testing.assert_array_equal(device(images)["sum"], expected)
    assert caplog.messages == [
        "out of memory with batches of 7 images; going on with 4. Give --batch-size 4 to begin with that."
    ]
    assert device.passes == [7, 4, 4, 4, 4, 4]
    assert device.images_inferred == 17
    with pytest.raises(ResourceExhaustedError):
        Device(room=2, batch_size=7)(images)  # half is still too much
    with pytest.raises(ResourceExhaustedError):
        Device(room=0, batch_size=1)(images[:1])


def test_a_network_that_openvino_cannot_run_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OpenVinoError("OpenVINO cannot convert numpy: no rule for Erfinv")

    made: list[dict[str, Any]] = []
    monkeypatch.setattr("features.openvino_engine.open_engine", refuse)
    monkeypatch.setattr(engines, "KerasEngine", lambda *_, **options: made.append(options))
    monkeypatch.setattr(networks.Network, "load", lambda self: None)
    monkeypatch.setattr(networks, "feature_model", lambda *_: None)
    monkeypatch.setattr(networks, "preprocess", lambda _: None)
    description = networks.Description("0" * 64, {"last": (3,)}, "last", None)
    weights = networks.WeightsFile(None, "1" * 64, "random")

    def network(precision: str) -> networks.Network:
        recipes = (recipe(precision=precision),)
        return networks.Network(None, "numpy", weights, "random", recipes, description, "openvino")  # type: ignore[arg-type]

    network("float32").engine(network("float32").recipes, batch_size=4)
    assert made == [{"batch_size": 4, "device": "auto", "precision": "float32"}]
    assert "no rule for Erfinv; Keras is used, which gives the same features more slowly" in caplog.text
    with pytest.raises(OpenVinoError, match=r"Erfinv\. Give --engine keras, or --precision float32"):
        network("bfloat16:openvino").engine(network("bfloat16:openvino").recipes, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near_and_not_equal(assets: Path, precision: str) -> None:
    weights = str(next((assets / "weights").glob("mobilenet_v2_1.0_224*")))
    options = {"weights": weights, "image_size": (96, 96), "engine": "keras"}
    single, half = (
        networks.resolve_network("mobilenetv2", **options, precision=kind) for kind in ("float32", precision)
    )
    assert half.recipes[0].precision == f"{precision}:keras"
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
        (("--precision", "int8"), "precision: received 'int8'"),
        (("--decode", "faster"), "decode: received 'faster', expected one of full, fast"),
    ):
        result = run_pipeline("extract", "sample:digits", "--out", tmp_path / "f.h5", *arguments)
        assert result.returncode == 2
        assert message in result.stderr
    assert not (tmp_path / "f.h5").exists()
