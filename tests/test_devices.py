"""Which GPU a process sees, which backend of Keras runs where TensorFlow is not installed, and what is said when memory ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from features import machine
from features.errors import ConfigurationError
from features.machine import VISIBLE, gpus, keras_backend, may_have_gpu, take_device
from features.networks import engines
from features.networks.backend import place_of
from pipeline.cluster.connection import parts
from pipeline.commands.common import guarded
from pipeline.tuning import inputs


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with three GPUs, where nothing has been imported that would have seen them."""
    for number in range(3):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.setattr(machine, "_CARDS", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(machine, "_GPU_NODES", (str(tmp_path / "nvidia0"),))
    for name in ("tensorflow", "jax", "torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in (VISIBLE, "JAX_PLATFORMS", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.usefixtures("cards")
def test_a_process_sees_only_the_gpu_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (gpus(), may_have_gpu()) == (["0", "1", "2"], True)
    assert [take_device(device) for device in ("auto", "gpu")] == ["auto", "gpu"]
    assert VISIBLE not in os.environ
    assert take_device("gpu:2") == "gpu"
    assert (os.environ[VISIBLE], os.environ["CUDA_DEVICE_ORDER"], gpus()) == ("2", "PCI_BUS_ID", ["2"])
    monkeypatch.setenv(VISIBLE, "GPU-5a, GPU-7b, -1, 3")  # as CUDA reads it, up to the first that is none
    assert gpus() == ["GPU-5a", "GPU-7b"]
    assert take_device("gpu:1") == "gpu"
    assert os.environ[VISIBLE] == "GPU-7b"
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setenv(VISIBLE, "2,0")  # numbers in the order that CUDA has by itself, which is kept
    assert take_device("gpu:1") == "gpu"
    assert (os.environ[VISIBLE], "CUDA_DEVICE_ORDER" in os.environ) == ("0", False)


@pytest.mark.usefixtures("cards")
def test_on_the_processor_no_gpu_is_seen() -> None:
    assert take_device("cpu") == "cpu"
    assert (os.environ[VISIBLE], os.environ["JAX_PLATFORMS"]) == ("", "cpu")
    assert (gpus(), may_have_gpu(), may_have_gpu("gpu")) == ([], False, False)
    with pytest.raises(ConfigurationError, match="received 'gpu:0', but this process can use no NVIDIA GPU"):
        take_device("gpu:0")


def test_without_a_gpu_nothing_is_changed(cards: Path) -> None:
    (cards / "nvidia0").unlink()
    assert take_device("cpu") == "cpu"
    assert VISIBLE not in os.environ


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize("device", ["gpu:3", "gpu:", "gpu:-1", "gpu:x"])
def test_a_gpu_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"received '{device}', but this process can use gpu:0 to gpu:2; see"):
        take_device(device)
    assert VISIBLE not in os.environ


@pytest.mark.usefixtures("cards")
def test_a_library_that_has_started_sees_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", machine)
    with pytest.raises(ConfigurationError, match="but jax has been imported and sees all GPUs"):
        take_device("gpu:1")


@pytest.mark.usefixtures("cards")
def test_local_workers_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [part[VISIBLE] for part in parts(5)] == ["0", "1", "2", "0", "1"]
    take_device("gpu:1")
    assert [part[VISIBLE] for part in parts(2)] == ["1", "1"]
    monkeypatch.setenv(VISIBLE, "")
    assert not any(VISIBLE in part for part in parts(2))


def test_keras_calls_a_processor_by_its_kind_alone() -> None:
    assert [place_of(device) for device in ("cpu", "gpu")] == ["cpu", "gpu:0"]


@pytest.mark.parametrize(
    ("backend", "advice"),
    [
        ("tensorflow", r"pip install 'tensorflow\[and-cuda\]'"),
        ("jax", r"pip install 'jax\[cuda12\]'"),
        ("torch", "pip install torch, see https://pytorch.org"),
    ],
)
def test_advice_is_for_the_backend_that_runs(monkeypatch: pytest.MonkeyPatch, backend: str, advice: str) -> None:
    monkeypatch.setattr(engines, "_gpu_count", lambda: 0)
    monkeypatch.setattr(engines, "keras_backend", lambda: backend)
    with pytest.raises(ConfigurationError, match=rf"Install the CUDA build of the backend \({advice}\) and check the"):
        engines.choose_device("gpu")


@pytest.mark.parametrize(
    ("installed", "file", "named", "expected"),
    [
        ({"tensorflow", "jax", "torch"}, None, None, "tensorflow"),
        ({"torch"}, None, None, "torch"),
        ({"jax", "torch"}, "tensorflow", None, "jax"),  # Keras writes it into its file before anybody has chosen
        ({"jax", "torch"}, "torch", None, "torch"),
        ({"torch"}, "openvino", None, "openvino"),  # somebody has chosen that
        ({"torch"}, None, "jax", "jax"),  # and is told that it is not installed
        (set(), None, None, "tensorflow"),
    ],
)
def test_the_backend_is_one_that_is_installed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: set[str],
    file: str | None,
    named: str | None,
    expected: str,
) -> None:
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    if file is not None:
        (tmp_path / "keras.json").write_text(json.dumps({"backend": file}))
    monkeypatch.setenv("KERAS_BACKEND", named or "")
    assert keras_backend() == expected


def test_the_end_of_memory_is_one_line_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    def train(batch_size: int = 64, fault: str = "") -> None:
        raise RuntimeError(fault)

    with pytest.raises(typer.Exit) as caught:
        guarded(train)(batch_size=64, fault="CUDA out of memory.\nTried to allocate 2.00 GiB")
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == (
        "error: memory did not suffice: CUDA out of memory. Tried to allocate 2.00 GiB. All finished work is kept. Give "
        "--batch-size 32, or --device cpu, or end other programs that use the device; then run the same command again\n"
    )
    with pytest.raises(RuntimeError, match="shapes do not match"):
        guarded(train)(batch_size=64, fault="shapes do not match")


class Features:
    """Cut features of rows 0 to 9, of 40 bytes a row; row 3 could not be read."""

    def readable(self, rows: np.ndarray) -> np.ndarray:
        return rows[rows != 3]

    def batches(self, rows: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(rows), 4):
            part = rows[start : start + 4]
            yield part, np.repeat(part[:, None], 10, axis=1).astype(np.float32)


@pytest.mark.parametrize(("room", "fault", "kept"), [(400, None, True), (399, None, False), (400, "alloc", False)])
def test_features_stay_on_the_device_only_if_they_fit(
    monkeypatch: pytest.MonkeyPatch, room: int, fault: str | None, kept: bool
) -> None:
    def copied(*_: Any) -> Any:
        if fault:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return "on the device"

    monkeypatch.setattr(inputs, "DEVICE_BYTES", room)
    monkeypatch.setattr(inputs, "DeviceFeatures", copied)
    source = Features()
    assert inputs.on_device(source, np.arange(10), 4) == ("on the device" if kept else source)


@pytest.mark.slow
def test_features_on_the_device_are_those_of_their_rows() -> None:
    kept = inputs.on_device(Features(), np.arange(10), 3)
    assert isinstance(kept, inputs.DeviceFeatures)
    assert kept.readable(np.array([9, 3, 1])).tolist() == [9, 1]
    found = [
        (rows.tolist(), np.asarray(features)[:, 0].tolist())
        for rows, features in kept.batches(np.array([9, 1, 5, 0]), 7)
    ]
    assert found == [([9, 1, 5], [9, 1, 5]), ([0], [0])]
