"""How a known network starts: what was worked out once is not worked out again, and what must be checked again is."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from test_onnx_networks import EXPECTED, HOW, IMAGES, network

from features.networks import keras_runtime, openvino_engine
from features.networks.backbones import BACKBONES, Backbone, Description
from features.networks.network import resolve_network
from features.networks.openvino_engine import OpenVinoEngine, is_installed
from features.networks.reference import reference_images, relative_difference
from features.recipe import NetworkOptions

pytestmark = pytest.mark.skipif(not is_installed(), reason="OpenVINO is not installed (pip install openvino)")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images in the calls of engines so far."""
    seen: list[int] = []
    call = OpenVinoEngine.__call__

    def counted(engine: OpenVinoEngine, images: np.ndarray) -> object:
        seen.append(len(images))
        return call(engine, images)

    monkeypatch.setattr(OpenVinoEngine, "__call__", counted)
    return seen


def opened(folder: Path, batch_size: int = 3) -> OpenVinoEngine:
    path, how = folder / "net.onnx", folder / "how.json"
    if not path.exists():
        how.write_text(json.dumps(HOW))
        network(path, end="vector")
    found = resolve_network(NetworkOptions(str(path), engine="openvino", preprocess=str(how)))
    engine = found.engine(found.recipes, batch_size=batch_size)
    assert isinstance(engine, OpenVinoEngine)
    return engine


@pytest.mark.slow
def test_a_conversion_is_checked_once_and_again_where_another_result_is_possible(
    cache: Path, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "processors", lambda: 1)  # so that a pass takes as many images as a batch
    (expected,) = opened(tmp_path)(IMAGES).values()
    assert passes == [3, 1, 3]  # the reference images in batches of 3, and ours
    passes.clear()
    (again,) = opened(tmp_path)(IMAGES).values()
    np.testing.assert_array_equal(again, expected)
    assert passes == [3]
    passes.clear()
    opened(tmp_path, batch_size=1)  # one image per pass
    assert passes == [1, 1, 1, 1]
    passes.clear()
    monkeypatch.setattr(openvino_engine, "processor", lambda: "another one")
    opened(tmp_path)
    assert passes == [3, 1]
    passes.clear()
    monkeypatch.setattr(openvino_engine, "processor", lambda: None)  # this system does not tell
    opened(tmp_path)
    opened(tmp_path)
    assert passes == [3, 1] * 2


@pytest.mark.slow
def test_a_proof_that_another_wrote_is_none(cache: Path, tmp_path: Path, passes: list[int]) -> None:
    opened(tmp_path)
    for proof in (cache / "proofs").iterdir():
        proof.write_bytes(b"true")
    passes.clear()
    opened(tmp_path)
    assert passes == [3, 1]


@pytest.mark.slow
def test_what_depends_on_no_image_is_computed_once(cache: Path, tmp_path: Path) -> None:
    plain = opened(tmp_path)(IMAGES)
    model = onnx.load(tmp_path / "net.onnx")
    turned = helper.make_node("Transpose", ["across"], ["kernel"], perm=[1, 0, 2, 3])
    (kernel,) = (item for item in model.graph.initializer if item.name == "kernel")
    kernel.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(kernel).transpose(1, 0, 2, 3), "across"))
    model.graph.node.insert(0, turned)
    onnx.save(model, tmp_path / "net.onnx")
    for path in (cache / "openvino").iterdir():
        path.unlink()
    (values,), (expected,) = opened(tmp_path)(IMAGES).values(), plain.values()
    assert relative_difference(values, expected) <= 1e-6
    (path,) = (cache / "openvino").iterdir()
    kept = np.load(io.BytesIO(path.read_bytes()[64:]))["model"].tobytes().decode()
    assert 'type="Convolution"' in kept
    assert kept.count('type="Transpose"') == 1  # of the pixels


def class_token(nodes: list[Any], inputs: list[Any]) -> None:
    """Give every image the same first token, as vision transformers do: as many as there are images in the batch."""
    numbers = {"first_one": [0], "end": [1], "ones": [5]}
    nodes += [
        helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(values, np.int64)))
        for name, values in numbers.items()
    ]
    zeros = onnx.numpy_helper.from_array(np.arange(5, dtype=np.float32)[None])
    nodes += [
        helper.make_node("Constant", [], ["token"], value=zeros),
        helper.make_node("Shape", ["pixels"], ["lengths"]),
        helper.make_node("Slice", ["lengths", "first_one", "end"], ["images"]),
        helper.make_node("Concat", ["images", "ones"], ["wanted"], axis=0),
        helper.make_node("Expand", ["token", "wanted"], ["tokens"]),
        helper.make_node("Add", ["logits", "tokens"], ["out"]),
    ]


@pytest.mark.slow
def test_a_conversion_takes_any_number_of_images_per_pass(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "processors", lambda: 1)
    (tmp_path / "how.json").write_text(json.dumps(HOW))
    path = network(tmp_path / "net.onnx", end="vector", extra=class_token)
    model = onnx.load(path)
    model.graph.output[0].name = "out"
    onnx.save(model, path)
    expected = EXPECTED.mean(axis=(1, 2)) + np.arange(5)
    for batch_size in (3, 1, 2):
        engine = opened(tmp_path, batch_size)
        assert engine.images_per_pass == batch_size
        values = np.concatenate(
            [engine(IMAGES[at : at + batch_size])["out"] for at in range(0, len(IMAGES), batch_size)]
        )
        assert relative_difference(values, expected.astype(np.float32)) <= 1e-5
    assert len(list((cache / "openvino").iterdir())) == 1


# ----------------------------------------------------------------------------------------- one network, any size
@dataclasses.dataclass(frozen=True)
class Tiny(Backbone):
    """A row of the table: strides of 2 pad by the image's being odd or even."""

    def build(self, size: tuple[int, int]) -> Any:
        import keras

        image = keras.Input((*size, 3), name="image")
        tensor = keras.layers.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="first")(image)
        tensor = keras.layers.Conv2D(5, 3, strides=2, padding="same", name="second")(tensor)
        return keras.Model(image, tensor, name=f"tiny_{size[0]}")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "tiny", Tiny("tiny", "none", 96))


def run(size: tuple[int, int]) -> tuple[Description, dict[str, np.ndarray]]:
    layers = ("first", "second")
    found = resolve_network(NetworkOptions("tiny", weights="random", image_size=size, layers=layers, engine="openvino"))
    engine = found.engine(found.recipes, batch_size=3)
    assert engine.name == "openvino"
    return found.description, dict(engine(reference_images(*size, count=3)))


def no_keras(*_: object) -> None:
    raise AssertionError("Keras was asked")


@pytest.mark.slow
def test_one_conversion_serves_every_size_of_the_same_graph(
    cache: Path, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (160, 224)
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "other"))
    expected = run(size)
    assert expected[1]["second"].shape == (3, 40, 56, 5)
    monkeypatch.setenv("BOTTLENECK_CACHE", str(cache))
    run((96, 128))
    monkeypatch.setattr(keras_runtime, "build_backbone", no_keras)
    description, values = run(size)
    assert description == expected[0]
    for name in ("first", "second"):
        np.testing.assert_array_equal(values[name], expected[1][name])
    assert len(list((cache / "openvino").iterdir())) == 1
    for other in ((161, 224), (160, 96), (64, 128)):  # of another graph, or smaller than what is known
        with pytest.raises(AssertionError, match="Keras was asked"):
            run(other)


@pytest.mark.slow
def test_a_conversion_that_is_wrong_at_a_second_size_serves_one_alone(
    cache: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = openvino_engine.second_size

    def wrong(*arguments: Any) -> dict[str, np.ndarray]:
        arrays = second(*arguments)
        return {**arrays, "other_output_1": arrays["other_output_1"] * np.float32(1.01)}

    monkeypatch.setattr(openvino_engine, "second_size", wrong)
    _, expected = run((96, 128))
    monkeypatch.setattr(openvino_engine, "second_size", second)
    asked = []
    converted = keras_runtime.KerasRuntime.converted
    monkeypatch.setattr(keras_runtime.KerasRuntime, "converted", lambda *given: asked.append(1) or converted(*given))
    np.testing.assert_array_equal(run((96, 128))[1]["second"], expected["second"])
    assert asked == []
    run((160, 192))
    assert asked == [1]


@pytest.mark.slow
def test_networks_that_pad_by_the_size_are_the_same_every_32_pixels() -> None:
    from features.networks.backbones import build_backbone
    from features.networks.weights import architecture_of

    row = BACKBONES["mobilenetv2-0.35"]
    first, same, other = (architecture_of(build_backbone(row, (size, size))) for size in (128, 192, 150))
    assert first == same
    assert first != other


@pytest.mark.slow
def test_a_network_that_was_built_to_be_described_is_not_built_again(
    cache: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = keras_runtime.build_backbone
    monkeypatch.setattr(keras_runtime, "build_backbone", lambda *given: built.append(given[1]) or build(*given))
    options = NetworkOptions("tiny", weights="random", image_size=(32, 48), layers=("second",), engine="keras")
    found = resolve_network(options)
    engine = found.engine(found.recipes, batch_size=3)
    first = dict(engine(reference_images(32, 48, count=3)))
    assert built == [(32, 48)]
    model = found.load()  # a caller may train what it is given, so nobody else has it
    for item in model.weights:
        item.assign(item * 0 + 7)
    again = found.engine(found.recipes, batch_size=3)(reference_images(32, 48, count=3))
    np.testing.assert_array_equal(again["second"], first["second"])
    assert built == [(32, 48)] * 3
