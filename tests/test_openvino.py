"""The OpenVINO engine: Keras's numbers, kept files that are whole or made again, starts without Keras."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, listing, recipe

from features.errors import BottleneckError, ConfigurationError, OpenVinoError
from features.networks import openvino_engine
from features.networks.keras_engine import KerasEngine
from features.networks.network import Network, resolve_network
from features.networks.openvino_engine import OpenVinoEngine, is_installed, supports
from features.networks.reference import reference_images, relative_difference
from features.pixels.decode import decode_image
from features.recipe import NetworkOptions, PixelRule, Recipe

needs_openvino = pytest.mark.skipif(not is_installed(), reason="OpenVINO is not installed (pip install openvino)")
REAL = {
    "mobilenetv2": "mobilenet_v2_1.0_224_no_top.weights.h5",
    "mobilenetv2-0.35": "mobilenet_v2_0.35_224_no_top.weights.h5",
    "vgg16": "vgg16_no_top.weights.h5",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own; converted models lie in its folder ``openvino``."""
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def photographs(assets: Path, rule: PixelRule, count: int) -> np.ndarray:
    paths = sorted((assets / "images" / "cats_and_dogs_filtered" / "validation").rglob("*.jpg"))
    chosen = paths[:: len(paths) // count][:count]
    return np.stack([decode_image(path.read_bytes(), rule).pixels for path in chosen])


def network(assets: Path, name: str, size: int, **options: Any) -> Network:
    return resolve_network(
        NetworkOptions(name, weights=str(assets / "weights" / REAL[name]), image_size=(size, size), **options)
    )


def builder(of: Network) -> Callable[[], tuple[Any, Callable[[Any], Any]]]:
    from features.networks.backbones import feature_model, preprocess

    def build() -> tuple[Any, Callable[[Any], Any]]:
        model = feature_model(of.load(), [(item.layer, item.pooling) for item in of.recipes])
        return model, preprocess(of.backbone.preprocessing)

    return build


def open_engine(recipes: Any, build: Callable[[], tuple[Any, Callable[[Any], Any]]], **options: Any) -> OpenVinoEngine:
    rule = recipes[0].pixels
    return openvino_engine.open_engine(
        recipes, lambda: openvino_engine.from_keras(*build(), rule.height, rule.width), **options
    )


RECIPES = (recipe("out", "avg", 24), recipe("out", "none", 24))


class Toy:
    """A small convolutional network with an output of each kind, and how often it was asked for."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self) -> tuple[Any, Callable[[Any], Any]]:
        import keras

        self.built += 1
        keras.utils.set_random_seed(7)
        make = keras.layers
        image = keras.Input((24, 24, 3))
        tensor = make.Conv2D(8, 3, strides=2, use_bias=False)(image)
        tensor = make.ReLU()(make.BatchNormalization(beta_initializer="random_normal")(tensor))
        tensor = make.Conv2D(6, 3, activation="relu")(tensor)
        model = keras.Model(image, [make.GlobalAveragePooling2D()(tensor), make.Identity()(tensor)])
        return model, lambda pixels: pixels / 127.5 - 1

    def live(self, images: np.ndarray) -> list[np.ndarray]:
        model, preprocess = self()
        self.built -= 1
        return [np.asarray(output) for output in model(preprocess(images.astype(np.float32)), training=False)]


def open_toy(toy: Toy, **options: Any) -> OpenVinoEngine:
    return open_engine(RECIPES, toy, **{"source": "a" * 64, "batch_size": 8, **options})


def pictures(count: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# -------------------------------------------------------------------------------------------- without OpenVINO
def test_reference_images_are_varied_and_always_the_same() -> None:
    images = reference_images(40, 56)
    assert images.shape == (4, 40, 56, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, reference_images(40, 56))
    assert images.std(axis=(1, 2)).min() > 20  # every channel of every picture
    neighbours = np.abs(np.diff(images.astype(int), axis=2)).mean()
    assert neighbours < 0.5 * images.std()  # soft, unlike white noise
    assert len({image.tobytes() for image in images}) == 4


def test_the_difference_by_hand() -> None:
    assert relative_difference(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == 0.1
    assert relative_difference(np.full(2, 1e-9), np.zeros(2)) == np.inf
    assert relative_difference(np.array([np.nan]), np.ones(1)) == np.inf
    assert relative_difference(np.array([np.inf]), np.array([np.inf])) == np.inf
    assert relative_difference(np.ones(2), np.ones((2, 1))) == np.inf


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: False)
    toy = Toy()
    with pytest.raises(OpenVinoError, match=r"pip install .*\[openvino\]") as caught:
        open_toy(toy)
    assert isinstance(caught.value, BottleneckError)
    assert toy.built == 0


def test_the_kept_file_depends_on_what_decides_the_network_and_on_nothing_else() -> None:
    def key(source: str = "a", **changes: Any) -> Any:
        rule = PixelRule(24, 24, **{name: changes.pop(name) for name in ("resize", "fit") if name in changes})
        values = {"backbone": "vgg16", "weights": "0" * 64, "layer": "x", "pooling": "avg", "preprocessing": "vgg16"}
        return openvino_engine._about([Recipe(**{**values, "pixels": rule, **changes})], source, "keras")

    assert key() == key(dtype="float16") == key(resize="keras") == key(fit="crop") == key(seed=3)
    others = [key("b"), key(backbone="model"), key(weights="1" * 64), key(layer="y"), key(pooling="max")]
    others += [key(preprocessing="none"), key(pixels=PixelRule(24, 25))]
    assert all(other != key() for other in others)


# ---------------------------------------------------------------------------------------------- Keras's numbers
@needs_openvino
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "layers"),
    [
        ("mobilenetv2-0.35", 96, ["boundary", "block_3_expand_BN", "out_relu"]),
        ("mobilenetv2", 160, []),
        ("vgg16", 64, ["block3_pool", "boundary", "block5_pool"]),
    ],
)
def test_real_weights_on_photographs_give_the_features_of_keras(
    assets: Path, cache: Path, name: str, size: int, layers: list[str]
) -> None:
    net = network(assets, name, size, layers=layers)
    build = builder(net)
    model, preprocess = build()
    keras_engine = KerasEngine(model, preprocess, net.recipes, batch_size=16, device="cpu")
    images = photographs(assets, net.recipes[0].pixels, 16)
    expected = keras_engine(images)
    for batch_size in (1, 5, 16):
        engine = open_engine(net.recipes, build, source=net.weights.sha256, batch_size=batch_size)
        parts = [engine(images[start : start + batch_size]) for start in range(0, 16, batch_size)]
        assert engine.images_inferred == 16
        for item in net.recipes:
            got = np.concatenate([part[item.name] for part in parts])
            assert got.dtype == np.float32
            assert np.abs(got).max() > 0.1
            assert relative_difference(got, expected[item.name]) <= 1e-4, (item.name, batch_size)
    assert len(listing(cache / "openvino")) == 1


@needs_openvino
@pytest.mark.slow
def test_an_images_features_depend_neither_on_its_neighbours_nor_on_padding_nor_on_threads(cache: Path) -> None:
    toy = Toy()
    engine = open_toy(toy, threads=3, batch_size=7)
    images = pictures(7)
    whole = engine(images)
    for name, expected in zip(("out.avg", "out"), toy.live(images), strict=True):
        assert relative_difference(whole[name], expected) <= 1e-5
        for count in (1, 2, 3, 5, 6):
            np.testing.assert_array_equal(engine(images[-count:])[name], whole[name][-count:])
    mirrored = images[:, :, ::-1]  # no copy: strides that OpenVINO does not take
    np.testing.assert_array_equal(engine(mirrored)["out"], engine(mirrored.copy())["out"])
    with ThreadPoolExecutor(6) as callers:
        orders = [np.random.default_rng(seed).permutation(7) for seed in range(60)]
        for order, got in zip(orders, callers.map(lambda order: engine(images[order]), orders), strict=True):
            np.testing.assert_array_equal(got["out.avg"], whole["out.avg"][order])
    assert engine.images_inferred == 7 + 1 + 2 + 3 + 5 + 6 + 1 + 2 + 3 + 5 + 6 + 14 + 60 * 7


@needs_openvino
@pytest.mark.slow
def test_other_batches_are_refused(cache: Path) -> None:
    engine = open_toy(Toy(), batch_size=4)
    assert (engine.name, engine.device, engine.names) == ("openvino", "cpu", ["out.avg", "out"])
    for wrong in (pictures(5), pictures(2, 25), pictures(2).astype(np.float32)):
        with pytest.raises(ConfigurationError, match=r"expected uint8 \(4, 24, 24, 3\)"):
            engine(wrong)
    assert engine(pictures(0))["out.avg"].shape == (0, 6)


@needs_openvino
@pytest.mark.slow
def test_bfloat16_is_another_arithmetic_with_float32_outputs(assets: Path, cache: Path) -> None:
    net = network(assets, "mobilenetv2-0.35", 96)
    options: Any = {"source": net.weights.sha256, "batch_size": 8}
    exact = open_engine(net.recipes, builder(net), **options)
    if not supports("bfloat16"):
        with pytest.raises(OpenVinoError, match="does not compute in bfloat16 on this processor"):
            open_engine(net.recipes, builder(net), precision="bfloat16", **options)
        return
    rough = open_engine(net.recipes, builder(net), precision="bfloat16", **options)
    images = photographs(assets, net.recipes[0].pixels, 8)
    got, expected = rough(images)["out_relu.avg"], exact(images)["out_relu.avg"]
    assert got.dtype == np.float32
    assert 1e-3 < relative_difference(got, expected) < 0.5
    assert len(listing(cache / "openvino")) == 1  # both from the same file


@needs_openvino
def test_float16_is_left_to_others(cache: Path) -> None:
    with pytest.raises(OpenVinoError, match="does not compute in float16 on this processor"):
        open_toy(Toy(), precision="float16")


# --------------------------------------------------------------------------------------------------- kept files
@needs_openvino
@pytest.mark.slow
def test_a_kept_file_is_used_and_a_damaged_one_is_made_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy()
    images = pictures(8)
    with caplog.at_level(logging.WARNING, logger="features"):
        expected = open_toy(toy)(images)["out"]
        open_toy(toy)
    assert toy.built == 1
    assert caplog.records == []
    (path,) = (cache / "openvino").iterdir()
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    damages = {"empty": b"", "garbage": b"garbage" * 99, "cut": whole[: len(whole) // 2], "longer": whole + b"\0"}
    for place in generator.integers(0, len(whole), 8).tolist():
        damages[f"flip at {place}"] = whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
    for number, (kind, data) in enumerate(damages.items(), 2):
        path.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="features"):
            np.testing.assert_array_equal(open_toy(toy)(images)["out"], expected)
        assert toy.built == number, kind
        (record,) = caplog.records
        assert f"{path} is not used" in record.getMessage(), kind
        assert listing(cache / "openvino") == [path.name]
        assert openvino_engine._read(path, openvino_engine._about(RECIPES, "a" * 64, "keras")) is not None


@needs_openvino
@pytest.mark.slow
def test_a_whole_file_that_gives_other_numbers_is_made_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy()
    open_toy(toy)
    (path,) = (cache / "openvino").iterdir()
    about = openvino_engine._about(RECIPES, "a" * 64, "keras")
    found = openvino_engine._read(path, about)
    assert found is not None
    kept, _ = found
    kept["output_1"] = kept["output_1"] * np.float32(1.001)
    openvino_engine._write(about, kept)
    with caplog.at_level(logging.WARNING, logger="features"):
        open_toy(toy)
    assert toy.built == 2
    (record,) = caplog.records
    assert (
        "out: OpenVINO float32 differs from the original by 0.001 (relative L2), at most 0.0001" in record.getMessage()
    )
    open_toy(toy)
    assert toy.built == 2


@needs_openvino
@pytest.mark.slow
def test_another_source_has_its_own_file(cache: Path) -> None:
    toy = Toy()
    for source in ("a" * 64, "b" * 64, "a" * 64):
        open_toy(toy, source=source)
    assert toy.built == 2
    assert len(listing(cache / "openvino")) == 2


@needs_openvino
@pytest.mark.slow
def test_a_conversion_that_differs_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = openvino_engine.from_keras

    def wrong(*arguments: Any) -> dict[str, np.ndarray]:
        kept = convert(*arguments)
        return {**kept, "output_0": kept["output_0"] + np.float32(0.5)}

    monkeypatch.setattr(openvino_engine, "from_keras", wrong)
    with pytest.raises(OpenVinoError, match=r"out\.avg: OpenVINO float32 differs from the original by"):
        open_toy(Toy())
    assert listing(cache) == []


@needs_openvino
@pytest.mark.slow
def test_a_network_that_does_not_convert_is_said_to(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any) -> None:
        raise Exception("Cannot convert\n the operation Foo")  # plain, as from OpenVINO's converter

    monkeypatch.setattr(openvino_engine, "write_graph", write)
    with pytest.raises(OpenVinoError, match=r"OpenVINO cannot convert functional.*: the operation Foo"):
        open_toy(Toy())
    assert listing(cache) == []


@needs_openvino
@pytest.mark.slow
def test_a_full_disk_is_not_the_fault_of_the_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")  # what OpenVINO says of a full disk

    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(openvino_engine, "write_graph", write)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0))
    with pytest.raises(OpenVinoError, match=r"cannot be written: .*No space left on device") as caught:
        open_toy(Toy())
    assert "functional" not in str(caught.value)
    assert "cannot convert" not in str(caught.value)


@needs_openvino
@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "file" / "cache"))
    toy = Toy()
    with caplog.at_level(logging.WARNING, logger="features"):
        got = open_toy(toy)(pictures(2))["out"]
    assert relative_difference(got, toy.live(pictures(2))[1]) <= 1e-5
    assert [record.getMessage().split(" (")[0][-20:] for record in caplog.records] == ["could not be written"]


# ------------------------------------------------------------------------------------------------- second starts
_SECOND_START = """
import json, sys, time
import numpy as np
from features.machine import peak_memory
from features.networks.network import resolve_network
from features.recipe import NetworkOptions
from features.networks.openvino_engine import open_engine
net = resolve_network(NetworkOptions("mobilenetv2-0.35", weights=sys.argv[1], image_size=(96, 96)))
def build():
    raise AssertionError("Keras was asked")
engine = open_engine(net.recipes, build, source=net.weights.sha256, batch_size=32)
rows = engine(np.load(sys.argv[2]))["out_relu.avg"]
seconds = time.process_time()  # of all processors together
np.save(sys.argv[3], rows)
heavy = [name for name in ("keras", "tensorflow", "h5py", "openvino_telemetry") if sys.modules.get(name) is not None]
print(json.dumps({"seconds": seconds, "heavy": heavy, "peak_mib": peak_memory() / 2**20}))
"""


@needs_openvino
@pytest.mark.slow
def test_a_second_start_needs_no_keras_and_reports_to_nobody(
    assets: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(assets, "mobilenetv2-0.35", 96)
    images = photographs(assets, net.recipes[0].pixels, 32)
    np.save(tmp_path / "images.npy", images)
    expected = open_engine(net.recipes, builder(net), source=net.weights.sha256, batch_size=32)(images)
    home = tmp_path / "home"  # where the telemetry package would put its client id
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    weights = str(assets / "weights" / REAL["mobilenetv2-0.35"])
    files = [str(tmp_path / name) for name in ("images.npy", "rows.npy")]
    result = subprocess.run(
        [sys.executable, "-c", _SECOND_START, weights, *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["heavy"] == []
    assert found["peak_mib"] <= 600
    assert found["seconds"] <= 3, found
    np.testing.assert_array_equal(np.load(files[1]), expected["out_relu.avg"])
    assert listing(home) == []
