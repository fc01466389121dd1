"""ONNX files whose conversion would never end, or take any amount of memory: it is ended."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from test_hostile_onnx import changed, then
from test_onnx_networks import EXPECTED, IMAGES

from features.errors import ConfigurationError
from features.networks import converting
from features.networks.network import resolve_network
from features.networks.openvino_engine import is_installed
from features.recipe import NetworkOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="OpenVINO is not installed (pip install openvino)"),
]
node = helper.make_node


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))


def signs(count: int) -> list[Any]:
    """Changes of sign, which OpenVINO compiles together: twice as many take several times as long."""
    names = ["first", *(f"s{n}" for n in range(count - 1)), "y"]
    return [node("Softmax", ["logits"], ["first"], axis=1)] + [
        node("Relu" if n % 2 else "Neg", [names[n]], [names[n + 1]]) for n in range(count)
    ]


def limited(
    nodes: Sequence[Any], limits: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **weights: Any
) -> Any:
    monkeypatch.setattr(converting, "limits_of", lambda length, pixels: limits)
    path, how = changed(tmp_path, then(*nodes, **weights))
    network = resolve_network(NetworkOptions(str(path), engine="openvino", preprocess=how))
    return network.engine(network.recipes, batch_size=3)


def test_a_conversion_that_takes_too_long_is_ended_and_onnx_runtime_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="features"):
        engine = limited(signs(1000), (4 << 30, 4), tmp_path, monkeypatch)
    (record,) = caplog.records
    assert record.getMessage() == (
        "OpenVINO cannot convert the network: it takes more than 4 seconds of processor time; using ONNX Runtime, which "
        "computes the same features more slowly"
    )
    assert engine.name == "onnxruntime"
    (values,) = engine(IMAGES).values()
    logits = np.exp(EXPECTED.mean(axis=(1, 2)))
    expected = logits / logits.sum(axis=1, keepdims=True)
    for n in range(1000):
        expected = np.maximum(expected, 0) if n % 2 else -expected
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_a_conversion_that_takes_too_much_memory_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        node("ReduceMax", ["logits"], ["one"], axes=[1], keepdims=1),
        node("Expand", ["one", "s"], ["many"]),  # 128 MB for every image
        node("Neg", ["many"], ["less"]),
        node("ReduceMax", ["less"], ["last"], axes=[1], keepdims=1),
        node("Add", ["logits", "last"], ["y"]),
    ]
    with pytest.raises(ConfigurationError) as caught:
        limited(nodes, (300 << 20, 60), tmp_path, monkeypatch, s=np.array([1, 32_000_000]))
    assert str(caught.value) == (
        "ONNX Runtime cannot run the network: it takes more than 315 MB of memory. Check where the file comes from, or export "
        "it again"
    )
