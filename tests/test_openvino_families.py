"""Networks of every family converted for OpenVINO give the numbers of Keras."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from helpers import part
from test_openvino import builder, needs_openvino, network, open_engine, photographs, pictures

from features.networks.keras_engine import KerasEngine
from features.networks.network import resolve_network
from features.networks.reference import relative_difference
from features.recipe import NetworkOptions

pytestmark = [pytest.mark.slow, needs_openvino]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))


@pytest.mark.stress  # every family there
@pytest.mark.parametrize(
    ("name", "size"),
    part(
        [("efficientnetb0", 64), ("resnet50", 64), ("xception", 96), ("mobilenetv3small", 64), ("convnexttiny", 64)],
        "mobilenetv3small",
        "convnexttiny",
    ),
)
def test_every_family_converts(name: str, size: int) -> None:
    net = resolve_network(NetworkOptions(name, weights="random", image_size=(size, size)))
    build = functools.cache(builder(net))
    engine = open_engine(net.recipes, build, source=net.weights.sha256, batch_size=4)
    images = pictures(4, size)
    expected = KerasEngine(*build(), net.recipes, batch_size=4, device="cpu")(images)
    for item in net.recipes:
        assert np.abs(expected[item.name]).max() > 0
        assert relative_difference(engine(images)[item.name], expected[item.name]) <= 1e-4


def test_many_outputs_keep_their_order(assets: Path) -> None:
    names = [f"block_{number}_project_BN" for number in range(1, 14)]  # converted, they come as 0, 1, 10, 11, 12, 2
    net = network(assets, "mobilenetv2-0.35", 96, layers=names, pooling="avg")
    build = functools.cache(builder(net))
    engine = open_engine(net.recipes, build, source=net.weights.sha256, batch_size=4)
    images = photographs(assets, net.recipes[0].pixels, 4)
    expected = KerasEngine(*build(), net.recipes, batch_size=4, device="cpu")(images)
    got = engine(images)
    assert list(got) == [f"{name}.avg" for name in names]
    for name, values in got.items():
        assert relative_difference(values, expected[name]) <= 1e-4
