"""ONNX files as networks: small files made here, right or refused; and a real vision transformer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
from helpers import paint_folder, recipe
from hubs import commit, running_hub
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from features.errors import BottleneckError, ConfigurationError, IntegrityError, UnreadableImageError, WeightsError
from features.extraction.extraction import extract_features
from features.networks.backbones import Description
from features.networks.network import _warn_of_single_numbers, resolve_network
from features.networks.onnx_graph import INPUT, Output, composed, outline_of, read_model
from features.networks.reference import reference_images, relative_difference
from features.pixels.decode import resize_image
from features.recipe import NetworkOptions, Normalisation, PixelRule, Recipe
from features.store.reader import FeatureStore
from features.store.schema import attributes_digest
from pipeline.cli import main

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
HOW = {
    "format": "bottleneck-preprocess 1", "size": [8, 8], "resize": "bicubic", "fit": "crop:10", "scale": 1 / 255,
    "mean": list(MEAN), "std": list(STD),
}  # fmt: skip
KERNEL = np.random.default_rng(0).normal(0, 0.3, (5, 3, 2, 2)).astype(np.float32)
BIAS = np.linspace(-0.5, 0.5, 5).astype(np.float32)


def normalised(images: np.ndarray, how: Normalisation = Normalisation(1 / 255, MEAN, STD)) -> np.ndarray:  # noqa: B008
    pixels = images.astype(np.float64)[..., :: -1 if how.channels == "bgr" else 1]
    return (pixels * how.scale - how.mean) / how.std


def convolved(values: np.ndarray) -> np.ndarray:
    """The network of these tests by NumPy: patches of 2x2 -> 5 channels, relu. (n, h, w, 3) -> (n, h/2, w/2, 5)."""
    n, height, width, _ = values.shape
    patches = values.reshape(n, height // 2, 2, width // 2, 2, 3)
    return np.maximum(np.einsum("nhiwjc,kcij->nhwk", patches, KERNEL.astype(np.float64)) + BIAS, 0)


def network(
    path: Path,
    *,
    batch: Any = "n",
    size: Sequence[Any] = (8, 8),
    layout: str = "NCHW",
    dtype: int = TensorProto.FLOAT,
    end: str = "spatial",
    opset: int = 17,
    channels: Any = 3,
    extra: Callable[[list[Any], list[Any]], None] | None = None,
) -> Path:
    """Write an ONNX file: convolution and relu, then spatial output, tokens with a first one of ones, or a mean."""
    half = {TensorProto.FLOAT16: np.float16}.get(dtype, np.float32)
    nodes, weights = [], [
        numpy_helper.from_array(KERNEL.astype(half), "kernel"), numpy_helper.from_array(BIAS.astype(half), "bias"),
    ]  # fmt: skip
    shape = [batch, channels, *size] if layout == "NCHW" else [batch, *size, channels]
    given = "pixels"
    if dtype == TensorProto.UINT8:
        nodes.append(helper.make_node("Cast", [given], ["as_float"], to=TensorProto.FLOAT))
        given = "as_float"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [given], ["turned"], perm=[0, 3, 1, 2]))
        given = "turned"
    nodes.append(helper.make_node("Conv", [given, "kernel", "bias"], ["conv"], strides=[2, 2]))
    nodes.append(helper.make_node("Relu", ["conv"], ["relu"]))
    last = "relu"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", ["relu"], ["back"], perm=[0, 2, 3, 1]))
        last = "back"
    if end == "tokens":
        weights.append(numpy_helper.from_array(np.array([0, 5, -1], np.int64), "shape"))
        nodes.append(helper.make_node("Reshape", [last, "shape"], ["flat"]))
        nodes.append(helper.make_node("Transpose", ["flat"], ["patches"], perm=[0, 2, 1]))
        nodes.append(helper.make_node("ReduceMean", ["patches"], ["first"], axes=[1], keepdims=1))
        nodes.append(helper.make_node("Neg", ["first"], ["class_token"]))
        nodes.append(helper.make_node("Concat", ["class_token", "patches"], ["last_hidden_state"], axis=1))
        last = "last_hidden_state"
    if end == "vector":
        nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"]))
        last = "logits"
    inputs = [helper.make_tensor_value_info("pixels", dtype, shape)]
    if extra is not None:
        extra(nodes, inputs)
    kind = TensorProto.FLOAT16 if dtype == TensorProto.FLOAT16 else TensorProto.FLOAT
    graph = helper.make_graph(nodes, "tiny", inputs, [helper.make_tensor_value_info(last, kind, None)], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def how(tmp_path: Path) -> str:
    path = tmp_path / "how.json"
    path.write_text(json.dumps(HOW))
    return str(path)


def features(path: Path, engine: str, images: np.ndarray, **options: Any) -> np.ndarray:
    found = resolve_network(NetworkOptions(str(path), engine=engine, **options))
    made = found.engine(found.recipes, batch_size=len(images))
    assert made.name == engine
    (values,) = made(images).values()
    return values


IMAGES = reference_images(8, 8, 3)
EXPECTED = convolved(normalised(IMAGES))
TOKENS = EXPECTED.reshape(3, 16, 5)
FIRST = -TOKENS.mean(axis=1)


# -------------------------------------------------------------------------------------------------- right
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("made", "options", "expected"),
    [
        ({}, {}, EXPECTED.mean(axis=(1, 2))),
        ({}, {"pooling": "max"}, EXPECTED.max(axis=(1, 2))),
        ({}, {"pooling": "flatten"}, EXPECTED.reshape(3, -1)),
        ({}, {"pooling": "none"}, EXPECTED),
        ({"layout": "NHWC"}, {}, EXPECTED.mean(axis=(1, 2))),
        ({"layout": "NHWC", "size": ("h", "w")}, {"pooling": "none"}, EXPECTED),
        ({"batch": 1}, {}, EXPECTED.mean(axis=(1, 2))),
        ({"batch": 2, "size": (8, "w")}, {"pooling": "none"}, EXPECTED),
        ({"size": ("height", "width"), "channels": "num_channels"}, {}, EXPECTED.mean(axis=(1, 2))),
        ({"layout": "NHWC", "channels": "channels"}, {}, EXPECTED.mean(axis=(1, 2))),
        ({"opset": 13}, {"layers": ("conv",), "pooling": "avg"}, None),
        ({"end": "tokens"}, {"prefix_tokens": 1}, FIRST),
        ({"end": "tokens"}, {"pooling": "tokens", "prefix_tokens": 1}, TOKENS.mean(axis=1)),
        ({"end": "tokens"}, {"pooling": "cls+tokens", "prefix_tokens": 1}, np.hstack([FIRST, TOKENS.mean(axis=1)])),
        ({"end": "tokens"}, {"pooling": "tokens", "prefix_tokens": 0}, (FIRST + TOKENS.sum(axis=1)) / 17),
        ({"end": "tokens"}, {}, (FIRST + TOKENS.sum(axis=1)) / 17),
        ({"end": "tokens"}, {"pooling": "none"}, np.concatenate([FIRST[:, None], TOKENS], axis=1)),
        ({"end": "tokens"}, {"layers": ("relu",), "pooling": "none"}, EXPECTED),
        ({"end": "vector"}, {}, EXPECTED.mean(axis=(1, 2))),
    ],
)  # fmt: skip
def test_small_files_give_what_numpy_gives(
    engine: str, made: dict[str, Any], options: dict[str, Any], expected: Any, how: str, tmp_path: Path
) -> None:
    path = network(tmp_path / "net.onnx", **made)
    received = features(path, engine, IMAGES, preprocess=how, **options)
    if expected is None:  # before the relu
        kept = normalised(IMAGES).reshape(3, 4, 2, 4, 2, 3)
        expected = (np.einsum("nhiwjc,kcij->nhwk", kept, KERNEL.astype(np.float64)) + BIAS).mean(axis=(1, 2))
    assert received.dtype == np.float32
    assert relative_difference(received, expected) < 2e-6


def turned(nodes: list[Any], inputs: list[Any]) -> None:
    """The output of the network with its axes in the other order, and names that are hard to keep."""
    order = [0, 2, 3, 1] if nodes[-1].output[0] == "relu" else [0, 3, 1, 2]
    nodes.append(helper.make_node("Transpose", [nodes[-1].output[0]], ["turned over"], perm=order))
    for name in ("a/b", "a|b", "."):
        nodes.append(helper.make_node("Identity", ["relu"], [name]))
    nodes.append(helper.make_node("GlobalAveragePool", ["relu"], ["means"]))
    nodes.append(helper.make_node("Flatten", ["means"], ["relu.avg"]))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("size", "side"), [((8, 8), (4, 4)), ((12, 8), (6, 4))])
def test_a_tensor_inside_may_have_its_axes_in_another_order_than_the_input(
    engine: str, layout: str, size: tuple[int, int], side: tuple[int, int], how: str, tmp_path: Path
) -> None:
    path = network(tmp_path / "net.onnx", layout=layout, size=("h", "w"), extra=turned)
    images = reference_images(*size, 3)
    expected = convolved(normalised(images))
    assert expected.shape == (3, *side, 5)
    for pooling, value in (("avg", expected.mean(axis=(1, 2))), ("none", expected)):
        options = {"layers": ("turned over",), "pooling": pooling, "preprocess": how, "image_size": size}
        assert relative_difference(features(path, engine, images, **options), value) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "pooling", "message"),
    [
        (("a/b", "a|b"), None, r"layers 'a/b' and 'a\|b' would both be kept under the name 'a\|b'"),
        (("relu", "relu.avg"), "avg", r"layers 'relu' and 'relu\.avg' would both be kept under the name 'relu\.avg'"),
        ((".",), "none", r"layer '\.' cannot be kept"),
    ],
)
def test_layers_whose_names_in_a_store_would_be_one(
    layers: tuple[str, ...], pooling: str | None, message: str, how: str, tmp_path: Path
) -> None:
    path = network(tmp_path / "net.onnx", extra=turned)
    options = NetworkOptions(str(path), layers=layers, pooling=pooling, preprocess=how)
    with pytest.raises(ConfigurationError, match=message):
        resolve_network(options)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_half_precision_weights_are_computed_with_in_float32(engine: str, how: str, tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", dtype=TensorProto.FLOAT16)
    rounded = [KERNEL.astype(np.float16).astype(np.float64), BIAS.astype(np.float16).astype(np.float64)]
    patches = normalised(IMAGES).reshape(3, 4, 2, 4, 2, 3)
    expected = np.maximum(np.einsum("nhiwjc,kcij->nhwk", patches, rounded[0]) + rounded[1], 0).mean(axis=(1, 2))
    assert relative_difference(features(path, engine, IMAGES, preprocess=how), expected) < 2e-6


@pytest.mark.slow
def test_uint8_and_bgr(how: str, tmp_path: Path) -> None:
    path = network(tmp_path / "bytes.onnx", dtype=TensorProto.UINT8)
    expected = convolved(IMAGES.astype(np.float64)).mean(axis=(1, 2))
    received = features(path, "onnxruntime", IMAGES, preprocess=Normalisation(), image_size=8)
    assert relative_difference(received, expected) < 2e-6
    with pytest.raises(ConfigurationError, match="takes uint8 pixels, so it prepares them itself"):
        resolve_network(NetworkOptions(str(path), preprocess=how))
    path = network(tmp_path / "net.onnx")
    turned = Normalisation(1 / 255, MEAN, STD, "bgr")
    received = features(path, "openvino", IMAGES, preprocess=turned, image_size=8)
    assert relative_difference(received, convolved(normalised(IMAGES, turned)).mean(axis=(1, 2))) < 2e-6


@pytest.mark.slow
def test_a_description_beside_the_file_is_read_and_its_numbers_are_in_the_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    network(folder / "onnx" / "model.onnx", end="tokens", size=("h", "w"))
    config = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 8, "patch_size": 2}))
    (recipe,) = resolve_network(NetworkOptions(str(folder))).recipes
    assert (recipe.backbone, recipe.layer, recipe.pooling) == ("onnx", "last_hidden_state", "cls")
    assert (recipe.pixels.resize, recipe.pixels.fit, recipe.pixels.height) == ("bicubic", "stretch", 8)
    assert recipe.normalisation == Normalisation(1 / 255, MEAN, STD)
    assert recipe.format_version == 2
    # The place does not matter, the numbers do; and the recipe alone resolves to itself.
    moved = folder.rename(tmp_path / "moved")
    found = resolve_network(NetworkOptions(str(moved)))
    assert found.recipes == (recipe,)
    assert found.backbone_argument == str(moved)
    config["image_mean"] = [0.5, 0.5, 0.5]
    (moved / "preprocessor_config.json").write_text(json.dumps(config))
    (other,) = resolve_network(NetworkOptions(str(moved))).recipes
    assert recipe.difference(other) == {
        "normalisation": (recipe.to_dict()["normalisation"], other.to_dict()["normalisation"])
    }
    again = resolve_network(recipe.options(str(moved), "imagenet"))
    assert again.recipes == (recipe,)


VIT = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "resample": 3, "image_mean": MEAN, "image_std": STD,
}  # fmt: skip


def transformer(folder: Path, kind: str) -> Path:
    """A network with 17 tokens of which the first is of the class, and a description; ``fixed`` takes 7 x 7 pixels alone."""
    network(folder / "model.onnx", end="tokens", size=(7, 7) if kind == "fixed" else ("h", "w"))
    (folder / "preprocessor_config.json").write_text(json.dumps(VIT))
    config = {"model_type": "vit" if kind == "fixed" else kind, "patch_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vit", {}, None),
        ("vit", {"pooling": "cls+tokens", "image_size": (6, 10)}, None),
        ("swin", {"image_size": 7}, None),  # whose patches are merged
        ("fixed", {"image_size": 7}, None),
        ("deit", {}, r"17 tokens for 8x8 pixels in patches of 2x2, so 1 of them .*says 2\. Give --prefix-tokens 1$"),
        ("vit", {"layers": ("patches",), "pooling": "cls"}, "0 of them .*says 1. Give --prefix-tokens 0, or --pooling avg$"),
        ("vit", {"layers": ("patches",), "pooling": "tokens", "prefix_tokens": 0}, None),
        ("siglip_vision_model", {"pooling": "cls"}, "cls takes the class token of 'last_hidden_state', but this network has none"),
        ("siglip_vision_model", {"pooling": "tokens"}, "so 1 of them .*says 0"),
        ("vit", {"image_size": 7}, "received 7x7, but .*json divides images into patches of 2x2 pixels; use --image-size 8$"),
    ],
)  # fmt: skip
def test_what_a_description_says_of_tokens_is_compared_with_their_number(
    kind: str, options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    asked = NetworkOptions(str(transformer(tmp_path / "net", kind)), **options)
    if message is None:
        assert resolve_network(asked).recipes
        return
    with pytest.raises(ConfigurationError, match=message) as caught:
        resolve_network(asked)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_number_of_tokens_that_the_user_gives_is_only_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(transformer(tmp_path / "net", "deit"))
    resolve_network(NetworkOptions(folder, pooling="tokens", prefix_tokens=1))
    assert caplog.messages == []
    resolve_network(NetworkOptions(folder, pooling="tokens", prefix_tokens=3))
    (message,) = caplog.messages
    assert message.endswith("so 1 of them stand before those of the image, not 3 (--prefix-tokens)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "pooling", "prefix"),
    [("vit_tiny_patch2_reg1_gap_8", "tokens", 1), ("vit_tiny_patch2_8", "cls", None), ("vit_tiny_patch2_8.gap", "avg", None)],
)  # fmt: skip
def test_a_register_is_no_class_token(architecture: str, pooling: str, prefix: int | None, tmp_path: Path) -> None:
    network(tmp_path / "model.onnx", end="tokens")
    about = {"input_size": [3, 8, 8], "crop_pct": 1.0, "interpolation": "bicubic", "mean": MEAN, "std": STD}
    name, _, gap = architecture.partition(".")
    config = {"architecture": name, "global_pool": "avg" if gap else "token", "pretrained_cfg": about}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (recipe,) = resolve_network(NetworkOptions(str(tmp_path))).recipes
    assert (recipe.pooling, recipe.prefix_tokens) == (pooling, prefix)
    if pooling == "tokens":
        with pytest.raises(ConfigurationError, match=r"cls takes the class token .* but this network has none"):
            resolve_network(NetworkOptions(str(tmp_path), pooling="cls"))


def classifier(output: str, classes: int) -> Callable[[list[Any], list[Any]], None]:
    def extra(nodes: list[Any], inputs: list[Any]) -> None:
        weights = numpy_helper.from_array(np.zeros((5, classes), np.float32), "fc")
        nodes.append(helper.make_node("Constant", [], ["fc"], value=weights))
        nodes.append(helper.make_node("MatMul", ["logits", "fc"], [output]))

    return extra


@pytest.mark.slow
def test_a_network_that_ends_in_scores_is_warned_about_and_the_tensor_before_named(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for output, classes, said in (
        ("output", 1000, True),
        ("output", 512, False),
        ("logits_2", 7, True),
        ("image_embeds", 7, False),
    ):
        caplog.clear()
        path = network(tmp_path / f"{output}{classes}.onnx", end="vector", extra=classifier(output, classes))
        model = onnx.load(path)
        constant = next(node for node in model.graph.node if node.op_type == "Constant")
        model.graph.initializer.append(constant.attribute[0].t)
        model.graph.initializer[-1].name = "fc"
        model.graph.node.remove(constant)
        del model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
        onnx.save(model, path)
        resolve_network(NetworkOptions(str(path), preprocess=how))
        resolve_network(NetworkOptions(str(path), preprocess=how, layers=("logits",)))
        expected = (
            f"the network ends in a classifier: its last layer {output} gives scores of {classes} classes, and these would be the "
            "features. The layer before it knows more about an image: --layer logits"
        )
        assert caplog.messages == ([expected] if said else []), output


@pytest.mark.slow
def test_weights_beside_the_file_are_part_of_its_digest(how: str, tmp_path: Path) -> None:
    path = network(tmp_path / "in one" / "net.onnx")
    whole = features(path, "onnxruntime", IMAGES, preprocess=how)
    model = onnx.load(path)
    beside = tmp_path / "apart" / "net.onnx"
    beside.parent.mkdir()
    onnx.save(model, beside, save_as_external_data=True, location="net.onnx_data", size_threshold=0)
    np.testing.assert_array_equal(features(beside, "onnxruntime", IMAGES, preprocess=how), whole)
    first = resolve_network(NetworkOptions(str(beside), preprocess=how)).weights.sha256
    data = bytearray((beside.parent / "net.onnx_data").read_bytes())
    data[3] ^= 1
    (beside.parent / "net.onnx_data").write_bytes(data)
    assert resolve_network(NetworkOptions(str(beside), preprocess=how)).weights.sha256 != first
    (beside.parent / "net.onnx_data").write_bytes(data[:40])
    with pytest.raises(WeightsError, match=r"net\.onnx_data: has 40 bytes, but net\.onnx expects more"):
        resolve_network(NetworkOptions(str(beside), preprocess=how, layers=("conv",)))
    (beside.parent / "net.onnx_data").unlink()
    with pytest.raises(WeightsError, match=r"its weights 'net\.onnx_data' are not beside it"):
        read_model(beside)


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["net.onnx", "net.onnx_data"])
def test_what_is_read_is_what_was_hashed(changed: str, how: str, tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "whole.onnx"))
    path = tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="net.onnx_data", size_threshold=0)
    options = NetworkOptions(str(path), preprocess=how, engine="onnxruntime")
    found = resolve_network(options)
    whole = (tmp_path / changed).read_bytes()
    (tmp_path / "other").write_bytes(whole)
    (tmp_path / "other").replace(tmp_path / changed)  # the same bytes, but nobody has looked
    with pytest.raises(WeightsError, match=f"{changed} was changed while it was read. Run the command again"):
        found.engine(found.recipes, batch_size=3)
    again = resolve_network(options)
    assert again.recipes == found.recipes
    (values,) = again.engine(again.recipes, batch_size=3)(IMAGES).values()
    assert relative_difference(values, EXPECTED.mean(axis=(1, 2))) < 2e-6


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "link", "sub\\..\\x", ""])
def test_weights_outside_the_folder_are_not_read(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    path = network(folder / "net.onnx")
    (tmp_path / "secret").write_bytes(bytes(1000))
    (folder / "link").symlink_to(tmp_path / "secret")
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match="outside its folder, and are not read"):
        read_model(path)


def quantised(nodes: list[Any], inputs: list[Any]) -> None:
    """A sigmoid of bytes, which is ONNX Runtime's own."""
    numbers = {"scale": np.float32(1 / 64), "zero": np.uint8(7), "scale_2": np.float32(1 / 256), "zero_2": np.uint8(0)}
    for name, value in numbers.items():
        nodes.insert(0, helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name)))
    nodes.append(helper.make_node("QuantizeLinear", ["relu", "scale", "zero"], ["bytes"]))
    own = helper.make_node("QLinearSigmoid", ["bytes", *numbers], ["curved"], domain="com.microsoft")
    nodes.extend([own, helper.make_node("DequantizeLinear", ["curved", "scale_2", "zero_2"], ["floats"])])


@pytest.mark.slow
def test_what_openvino_does_not_take_runs_by_onnx_runtime_and_is_said(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = network(tmp_path / "net.onnx", extra=quantised)
    found = resolve_network(NetworkOptions(str(path), preprocess=how, layers=("floats",)))
    assert found.engine_name == "openvino"
    engine = found.engine(found.recipes, batch_size=3)
    assert engine.name == "onnxruntime"
    assert "; using ONNX Runtime, which computes the same features more slowly" in caplog.text
    (values,) = engine(IMAGES).values()
    expected = 1 / (1 + np.exp(-EXPECTED))
    assert np.abs(values - expected).max() < 1 / 128  # a step before and after the curve
    assert np.ptp(expected) > 0.2


# -------------------------------------------------------------------------------------------------- refused
def text_input(nodes: list[Any], inputs: list[Any]) -> None:
    inputs.insert(0, helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", 77]))


def second_image(nodes: list[Any], inputs: list[Any]) -> None:
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n", 3, 8, 8]))


def own_operator(nodes: list[Any], inputs: list[Any]) -> None:
    nodes.append(helper.make_node("Secret", ["relu"], ["odd"], domain="my.company"))


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ({"extra": text_input}, {}, "of images and something else, such as text: give the file of its vision part"),
        ({"extra": second_image}, {}, r"has the inputs pixels \(n, 3, 8, 8\), mask .*; expected exactly one, of images"),
        ({"extra": own_operator}, {}, r"operators that are not part of ONNX: my\.company\.Secret"),
        ({"channels": 1}, {}, r"its input pixels is \(n, 1, 8, 8\); expected images of 3 channels"),
        ({"dtype": TensorProto.INT64}, {}, "its input pixels has the element type 7, expected float32"),
        ({}, {"image_size": 16}, "received 16x16, but .* takes images of 8x8 pixels only"),
        ({}, {"engine": "keras"}, "engine: received 'keras', expected onnxruntime or openvino for"),
        ({}, {"weights": "random"}, "contains its own weights"),
        ({}, {"engine": "onnxruntime", "precision": "bfloat16"}, "onnxruntime computes in float32; received bfloat16"),
        ({}, {"precision": "float16"}, "onnxruntime computes in float32; received float16"),
    ],
)  # fmt: skip
def test_small_files_are_refused(
    made: dict[str, Any], options: dict[str, Any], message: str, how: str, tmp_path: Path
) -> None:
    path = network(tmp_path / "net.onnx", **made)
    with pytest.raises(BottleneckError, match=message) as caught:
        resolve_network(NetworkOptions(str(path), **{"preprocess": how, **options}))
    assert len(str(caught.value)) < 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ({}, {"layers": ("rulu",)}, r"has no tensor 'rulu'; did you mean 'relu'\? Its outputs are relu"),
        ({}, {"layers": ("rel",)}, r"has no tensor 'rel'; the last ones that contain this: relu\. Its outputs are relu"),
        ({"end": "tokens"}, {"pooling": "tokens"}, "needs to know how many tokens of 'last_hidden_state' stand before"),
        ({}, {"pooling": "cls"}, r"pooling: cls is for \(tokens, channels\), but layer 'relu' gives \(4, 4, 5\)"),
        ({}, {"layers": ("boundary",)}, "has no boundary"),
        ({"end": "tokens", "size": ("h", "w")}, {"image_size": 7, "layers": ("patches",), "pooling": "avg"}, None),
        ({"opset": 99}, {}, "cannot load the network: "),
    ],
)  # fmt: skip
def test_what_only_a_run_shows_is_refused(
    made: dict[str, Any], options: dict[str, Any], message: str | None, how: str, tmp_path: Path
) -> None:
    path = network(tmp_path / "net.onnx", **made)
    if message is None:  # a size that leaves a part of a patch over is fine for this convolution
        (recipe,) = resolve_network(NetworkOptions(str(path), preprocess=how, **options)).recipes
        assert (recipe.pixels.height, recipe.pixels.fit) == (7, "crop:8")
        return
    with pytest.raises(BottleneckError, match=message) as caught:
        resolve_network(NetworkOptions(str(path), preprocess=how, **options))
    assert len(str(caught.value)) < 1000


def test_files_that_are_none(how: str, tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(BottleneckError) as caught:
            resolve_network(NetworkOptions(name, preprocess=how))
        return str(caught.value)

    assert "does not exist" in refusal(str(tmp_path / "none.onnx"))
    (tmp_path / "page.onnx").write_text("<html>404</html>")
    assert "not an ONNX file, or only a part of one" in refusal(str(tmp_path / "page.onnx"))
    (tmp_path / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "(a pointer of Git LFS: fetch it by git lfs pull)" in refusal(str(tmp_path / "pointer.onnx"))
    path = network(tmp_path / "net.onnx")
    whole = path.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    assert "not an ONNX" in refusal(str(tmp_path / "cut.onnx"))
    (tmp_path / "empty.onnx").write_bytes(b"")
    assert "not an ONNX model: it contains no graph" in refusal(str(tmp_path / "empty.onnx"))
    with open(tmp_path / "huge.onnx", "wb") as file:
        file.truncate((1 << 31) + 5)
    assert "at most 2 GB, received 2.1 GB" in refusal(str(tmp_path / "huge.onnx"))
    (tmp_path / "folder").mkdir()
    assert "backbone: received" in refusal(str(tmp_path / "folder"))
    network(tmp_path / "folder" / "decoder.onnx")
    assert "holds decoder.onnx, but none of onnx/vision_model.onnx, vision_model.onnx, onnx/model.onnx" in refusal(
        str(tmp_path / "folder")
    )


def test_without_a_description_nothing_is_guessed(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    with pytest.raises(ConfigurationError, match="nothing says how images are prepared") as caught:
        resolve_network(NetworkOptions(str(path)))
    assert '"format": "bottleneck-preprocess 1"' in str(caught.value)
    (tmp_path / "mine" / "onnx").mkdir(parents=True)
    network(tmp_path / "mine" / "onnx" / "model.onnx")
    with pytest.raises(ConfigurationError, match=rf"^{tmp_path}/mine: nothing says"):  # where the description would lie
        resolve_network(NetworkOptions(str(tmp_path / "mine")))


def test_features_of_a_single_number_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    found = Description("0" * 64, {"map": (224, 224, 1), "tokens": (5, 2)}, "map", None)
    _warn_of_single_numbers([recipe(layer="map", pooling="avg"), recipe(layer="tokens", pooling="avg")], found)
    (message,) = caplog.messages
    assert message.startswith("map.avg is a single number for each image")


def test_only_what_is_needed_stays_in_a_composed_model(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", end="tokens")
    model = read_model(path)
    outline = outline_of(path, model)
    made = composed(model, outline, [Output("relu", "avg", 4)], normalisation=Normalisation(), size=(8, 8))
    assert [node.op_type for node in made.graph.node] == [
        "Cast",
        "Transpose",
        "Cast",
        "Conv",
        "Relu",
        "Cast",
        "ReduceMean",
    ]
    assert [value.name for value in made.graph.input] == [INPUT]
    assert {tensor.name for tensor in made.graph.initializer} == {"kernel", "bias"}
    assert len(model.graph.node) == 7  # the model itself is as it was


# -------------------------------------------------------------------------------------------------- whole ways
@pytest.mark.slow
def test_an_extraction_starts_again_without_onnx_and_without_keras(how: str, tmp_path: Path) -> None:
    images = paint_folder(tmp_path / "images", {"cat": 6, "dog": 6})
    path = network(tmp_path / "net.onnx", end="tokens")
    program = (
        "import json, sys; from features.extraction.extraction import prepare;"
        "from features.extraction.options import ExtractionOptions;"
        "options = ExtractionOptions(backbone=sys.argv[3], preprocess=sys.argv[4], prefix_tokens=1, batch_size=4);"
        "found = prepare(sys.argv[1], sys.argv[2], options).run();"
        "names = ('keras', 'tensorflow', 'onnx', 'onnxruntime', 'openvino', 'openvino_telemetry');"
        "print(json.dumps([found.inferred, [name for name in names if sys.modules.get(name) is not None]]))"
    )

    def run(out: str) -> Any:
        line = [sys.executable, "-c", program, str(images), str(tmp_path / out), str(path), how]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    inferred, heavy = run("a.h5")
    assert (inferred, "keras" in heavy, "tensorflow" in heavy) == (12, False, False)
    assert run("b.h5") == [12, ["openvino"]]  # from the kept conversion
    assert run("b.h5") == [0, []]  # nothing to do
    store = FeatureStore.open(tmp_path / "a.h5")
    with open(tmp_path / "a.h5", "rb") as first, open(tmp_path / "b.h5", "rb") as second:
        assert first.read() == second.read()
    (recipe,) = store.recipes.values()
    assert (recipe.pooling, recipe.prefix_tokens) == ("cls", None)
    rows, _ = store.load()
    pixels = np.stack([centre(images / name) for name in store.images.paths])
    tokens = convolved(normalised(pixels)).reshape(12, 16, 5)
    assert relative_difference(rows, -tokens.mean(axis=1)) < 2e-6


def centre(path: Path) -> np.ndarray:
    """torchvision's Resize(10, bicubic) and CenterCrop(8), by Pillow; width first."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    short, long = sorted(image.size)
    size = (10, 10 * long // short) if image.width <= image.height else (10 * long // short, 10)
    kind = Image.Resampling.BICUBIC
    pixels = np.asarray(image.resize((size[0], image.height), kind).resize(size, kind))
    left, top = round((size[0] - 8) / 2), round((size[1] - 8) / 2)
    return pixels[top : top + 8, left : left + 8]


@pytest.mark.slow
def test_a_store_of_version_2_says_so_and_a_lower_number_is_refused(how: str, tmp_path: Path) -> None:
    images = paint_folder(tmp_path / "images", {"cat": 3, "dog": 3})
    path = network(tmp_path / "net.onnx")
    extract_features(images, tmp_path / "a.h5", backbone=str(path), preprocess=how, layout="sharded", shard_rows=3)
    shards = sorted((tmp_path / "a.h5.parts").glob("*.h5"))
    assert len(shards) == 2
    for file in (tmp_path / "a.h5", *shards):
        with h5py.File(file, "r+") as store:
            assert store.attrs["format_version"] == 2
            attributes = {"/": dict(store.attrs)}
            store.visititems(lambda name, item: attributes.update({f"/{name}": dict(item.attrs)}))  # noqa: B023
            plain = {
                key: {name: plain_value(value) for name, value in values.items()} for key, values in attributes.items()
            }
            plain["/"].pop("attributes_sha256")
            plain["/"]["format_version"] = 1
            store.attrs.modify("format_version", 1)
            store.attrs.modify("attributes_sha256", np.bytes_(attributes_digest(plain)))
        with pytest.raises(IntegrityError, match="its recipe needs format version 2"):
            (FeatureStore.open if file.name == "a.h5" else FeatureStore.open_shard)(file)


def plain_value(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else int(value)


def test_every_new_value_needs_version_2_and_no_old_one_does() -> None:
    old = recipe("out", "avg", 24)
    assert (old.format_version, old.fingerprint) == (1, Recipe.from_dict(old.to_dict()).fingerprint)
    assert {"normalisation", "prefix_tokens"} & old.to_dict().keys() == set()
    new = [
        {"pooling": "cls"}, {"pooling": "tokens", "prefix_tokens": 0}, {"pooling": "cls+tokens", "prefix_tokens": 5},
        {"normalisation": Normalisation(), "preprocessing": "mean-std"},
        {"pixels": PixelRule(24, 24, resize="bicubic")}, {"pixels": PixelRule(24, 24, fit="crop:24")},
    ]  # fmt: skip
    made = [dataclasses.replace(old, **values) for values in new]
    assert [one.format_version for one in made] == [2] * len(new)
    assert len({one.fingerprint for one in [old, *made]}) == len(new) + 1
    for one in made:
        assert Recipe.from_dict(json.loads(one.canonical)) == one


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pooling": "tokens"}, "prefix tokens: received None with the pooling tokens"),
        ({"prefix_tokens": 1}, "prefix tokens: received 1 with the pooling avg"),
        ({"normalisation": Normalisation()}, "expected a normalisation only with 'mean-std'"),
        ({"preprocessing": "mean-std"}, "expected a normalisation only with 'mean-std'"),
    ],
)
def test_fields_that_do_not_belong_together(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        dataclasses.replace(recipe("out", "avg", 24), **wrong)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"fit": "crop:"}, "expected crop:EDGE with a number of pixels, such as crop:256"),
        ({"fit": "crop:0256"}, "expected crop:EDGE"),
        ({"fit": "crop:-3"}, "expected crop:EDGE"),
        ({"fit": "crop:23"}, r"expected an edge of 24 \(the image size\) to 4096"),
        ({"fit": "crop:9999"}, "to 4096 pixels"),
    ],
)
def test_edges_that_cannot_be(rule: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PixelRule(24, 24, **rule)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"std": (1, 0, 1)}, "std: received .* expected three numbers above 0"),
        ({"mean": (1, 2)}, "mean: received .* expected three numbers"),
        ({"mean": (1, float("nan"), 2)}, "mean"),
        ({"scale": 0}, "scale: received 0"),
        ({"channels": "gbr"}, "channels: received 'gbr'"),
    ],
)
def test_numbers_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Normalisation(**values)


@pytest.mark.parametrize("resize", ["antialias", "bicubic", "keras"])
@pytest.mark.parametrize("size", [(50, 40), (40, 50), (33, 33), (300, 7), (7, 300), (1, 90), (90, 1)])
def test_an_edge_is_resized_and_the_centre_cut_out(size: tuple[int, int], resize: str) -> None:
    """As torchvision: resize the shorter edge, then cut; compared with resizing the whole image by the plain rule."""
    width, height = size
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8)
    received = resize_image(Image.fromarray(pixels), PixelRule(24, 24, resize=resize, fit="crop:30"))
    short, long = sorted(size)
    inner = (30, 30 * long // short) if width <= height else (30 * long // short, 30)
    left, top = round((inner[0] - 24) / 2), round((inner[1] - 24) / 2)
    kinds = {"antialias": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    if resize == "keras":
        whole = resize_image(Image.fromarray(pixels), PixelRule(inner[1], inner[0], resize="keras"))
    else:
        whole = np.asarray(
            Image.fromarray(pixels).resize((inner[0], height), kinds[resize]).resize(inner, kinds[resize])
        )
    np.testing.assert_array_equal(received, whole[top : top + 24, left : left + 24])


def test_a_strip_that_an_edge_would_make_huge_is_set_aside() -> None:
    strip = Image.new("RGB", (60_000, 2))
    with pytest.raises(UnreadableImageError, match="crop:256 makes 7680000x256 pixels of it") as caught:
        resize_image(strip, PixelRule(224, 224, fit="crop:256"))
    assert caught.value.reason == "too-large"


@pytest.mark.slow
def test_a_network_is_taken_from_a_hub_by_name_and_used_again_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    paint_folder(tmp_path / "photos", {"cat": 12, "dog": 12})
    config = {"do_resize": True, "size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": 8, "resample": 3}
    config |= {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    config |= {"image_processor_type": "BitImageProcessor"}
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.files["onnx/model.onnx"] = network(tmp_path / "made.onnx", end="tokens", size=("h", "w")).read_bytes()
        hub.files["preprocessor_config.json"] = json.dumps(config).encode()
        hub.files["config.json"] = json.dumps({"model_type": "dinov2", "image_size": 8, "patch_size": 2}).encode()
        assert main(["extract", "photos", "--out", "a.h5", "--backbone", "hf:owner/name"]) == 0
    store = FeatureStore.open(tmp_path / "a.h5")
    (recipe,) = store.recipes.values()
    assert (recipe.pooling, recipe.pixels) == ("cls", PixelRule(8, 8, resize="bicubic", fit="crop:10"))
    assert store.provenance["backbone"] == f"hf:owner/name@{commit('a')}"
    assert store.provenance["license"] == "apache-2.0"
    assert f"network: hf:owner/name@{commit('a')}; licence: apache-2.0\n" in capsys.readouterr().out
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # and the server has gone
    assert main(["extract", "photos", "--out", "a.h5", "--backbone", "hf:owner/name"]) == 0
    assert "0 inferred" in capsys.readouterr().out
    assert main(["train-head", "a.h5", "--head", "logistic"]) == 0
    assert main(["predict", "runs", "photos/cat", "--out", "p.csv"]) == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 13
