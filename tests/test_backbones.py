"""The table, the graph rules (cuts, boundaries, names), model files, and what comes out of a feature model."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, part

from features.errors import ConfigurationError
from features.networks.backbones import BACKBONES, boundary_of, build_backbone, feature_model, last_layer, preprocess
from features.networks.finding import find_backbone
from features.networks.graph import (
    boundary_by_rule,
    cut_at,
    layer_tensors,
    nearest_earlier_cut,
    snake_case,
    stable_names,
    valid_cuts,
)
from features.networks.official import OFFICIAL, WHEELS
from features.networks.weights import load_weights, model_digest, resolve_weights, tensor_digest
from features.recipe import NetworkOptions, PixelRule

# name, image size, last layer, boundary; a representative of every family
REPRESENTATIVES = [
    ("convnexttiny", 64, "layer_normalization", "convnext_tiny_downsampling_block_2"),
    ("densenet121", 64, "relu", "pool4_pool"),
    ("efficientnetb0", 64, "top_activation", "block5c_add"),
    ("efficientnetv2b0", 32, "top_activation", "block5e_add"),
    ("efficientnet-lite0", 64, "top_relu", "block_14_add"),
    ("inceptionv3", 96, "mixed10", "mixed7"),
    ("mobilenet-0.25", 64, "conv_pw_13_relu", "conv_pw_11_relu"),
    ("mobilenetv2-0.35", 64, "out_relu", "block_15_add"),
    ("mobilenetv3large", 64, "activation_19", "expanded_conv_11_add"),
    ("mobilenetv3small-0.75", 32, "activation_17", "expanded_conv_7_add"),
    ("resnet50", 64, "conv5_block3_out", "conv4_block6_out"),
    ("resnet50v2", 64, "post_relu", "conv4_block6_out"),
    ("vgg16", 32, "block5_pool", "block4_pool"),
    ("vgg19", 64, "block5_pool", "block4_pool"),
    ("xception", 96, "block14_sepconv2_act", "add_10"),
]


def pixels(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (count, height, width, 3)).astype(np.float32)


def untrained(name: str, *size: int) -> Any:
    """A network whose outputs are neither zero nor saturated, without any file."""
    backbone = find_backbone(name)
    model = build_backbone(backbone, (size[0], size[-1]))
    load_weights(model, backbone, resolve_weights(backbone, "random"))
    return model


def run(model: Any, images: np.ndarray) -> Any:
    return model(images, training=False)


# --------------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("vgg16", "vgg16"),
        ("VGG-16", "vgg16"),
        ("MobileNet_V2", "mobilenetv2"),
        ("mobilenetv2-0.35", "mobilenetv2-0.35"),
        ("MobileNetV2_0.35", "mobilenetv2-0.35"),
        ("EfficientNet-V2-B0", "efficientnetv2b0"),
        ("resnet_50", "resnet50"),
        ("NASNetMobile", "nasnetmobile"),
        ("EfficientNet_Lite0", "efficientnet-lite0"),
    ],
)
def test_a_name_is_found_whatever_its_case_and_hyphens(given: str, name: str) -> None:
    assert find_backbone(given) is BACKBONES[name]


def test_names_stay_apart_without_hyphens() -> None:
    plain = {name.replace("-", "") for name in BACKBONES}
    lite = {"efficientnet-lite0", "efficientnet-lite2"}
    assert len(plain) == len(BACKBONES) == len(OFFICIAL) + 2 == 54
    assert set(OFFICIAL) == set(BACKBONES) - lite
    assert set(WHEELS) == {"mobilenetv2", "vgg16"} | lite


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"received 'resnet500'.*did you mean 'resnet50' or"):
        find_backbone("resnet500")
    with pytest.raises(ConfigurationError, match="the known names are convnexttiny"):
        find_backbone("zzz")
    with pytest.raises(
        ConfigurationError, match="no such folder, and a repository on a hub is called hf:a/dinov2-small"
    ):
        find_backbone("a/dinov2-small")


@pytest.mark.slow
def test_neither_the_table_nor_finding_weights_imports_keras(tmp_path: Path) -> None:
    weights = tmp_path / "w.npz"
    np.savez(weights, **{"a/kernel": np.zeros(2, np.float32)})
    code = (
        "import sys; from features.networks.finding import find_backbone; from features.networks.weights import *;"
        f"row = find_backbone('vgg16'); file = resolve_weights(row, {str(weights)!r});"
        "assert known_digest(row, file) is None; print('keras' in sys.modules, 'tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"


# ------------------------------------------------------------------------------------------- every family
@pytest.mark.slow
@pytest.mark.stress  # every family there
@pytest.mark.parametrize(
    ("name", "size", "last", "boundary"),
    part(
        REPRESENTATIVES, "convnexttiny", "efficientnet-lite0", "mobilenetv2-0.35", "mobilenetv3small-0.75", "resnet50"
    ),
    ids=str,
)
def test_a_family_builds_cuts_and_keeps_its_names(name: str, size: int, last: str, boundary: str) -> None:
    import keras

    backbone = find_backbone(name)
    model = untrained(name, size)
    assert last_layer(model) == last
    assert boundary_of(backbone, model) == boundary

    images = preprocess(backbone.preprocessing)(pixels(2, size, size))
    trunk, tail = cut_at(model, boundary)
    whole = np.asarray(run(model, images))
    assert np.abs(whole).max() > 1e-3  # else the comparison would say nothing
    np.testing.assert_array_equal(np.asarray(run(tail, run(trunk, images))), whole)
    assert {id(item) for item in trunk.weights + tail.weights} == {id(item) for item in model.weights}

    larger = untrained(name, size + 32)  # Keras' automatic numbers have moved on by now
    assert [layer.name for layer in larger.layers] == [layer.name for layer in model.layers]
    assert tensor_digest(larger) == tensor_digest(model)
    assert boundary_of(backbone, larger) == boundary
    keras.backend.clear_session()


@pytest.mark.slow
def test_nasnet_has_no_boundary_and_says_so() -> None:
    backbone = find_backbone("nasnetmobile")
    model = build_backbone(backbone, (32, 32))
    with pytest.raises(ConfigurationError, match=r"no valid interior cut.*'stem_bn1', which leaves 195 of 196"):
        boundary_of(backbone, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_the_rule_finds_the_boundaries_of_the_table(name: str) -> None:
    backbone = find_backbone(name)
    assert boundary_by_rule(build_backbone(backbone, (64, 64))) == backbone.boundary


@pytest.mark.slow
@pytest.mark.pain(3)
def test_pain_03_preprocessing_belongs_to_the_network() -> None:
    """1/255 on VGG16 cannot happen: the row holds the builder and its own preprocessing."""
    import keras

    image = np.array([[[[255.0, 127.5, 0.0]]]], np.float32)
    expected = {
        "vgg16": [0 - 103.939, 127.5 - 116.779, 255 - 123.68],  # caffe: BGR less the means
        "mobilenetv2": [1.0, 0.0, -1.0],
        "densenet121": [(1 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, -0.406 / 0.225],
        "efficientnetb0": [255.0, 127.5, 0.0],  # inside the network
    }
    for name, values in expected.items():
        apply = preprocess(find_backbone(name).preprocessing)
        given = image.copy()
        np.testing.assert_allclose(np.asarray(apply(given))[0, 0, 0], values, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(given, image)  # the caller's pixels are not changed
        np.testing.assert_allclose(
            np.asarray(apply(keras.ops.convert_to_tensor(image)))[0, 0, 0], values, rtol=1e-5, atol=1e-5
        )
        symbolic = keras.Input((1, 1, 3))
        inside = keras.Model(symbolic, apply(symbolic * 1.0))
        np.testing.assert_allclose(np.asarray(inside(image))[0, 0, 0], values, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_too_small_images_are_refused_with_the_limit() -> None:
    with pytest.raises(ConfigurationError, match=r"vgg16 cannot be built for images of 16x16 pixels.*at least 32x32"):
        build_backbone(find_backbone("vgg16"), (16, 16))


# ---------------------------------------------------------------------------------------------- features
@pytest.mark.slow
def test_feature_models_pool_as_numpy_does_in_one_pass() -> None:
    model = untrained("mobilenetv2-0.35", 64, 96)
    images = pixels(3, 64, 96) / 127.5 - 1
    wanted = [("out_relu", "avg"), ("out_relu", "none"), ("block_3_project_BN", "max"), ("block_15_add", "flatten")]
    results = [np.asarray(item) for item in run(feature_model(model, wanted), images)]

    last = np.asarray(run(model, images))
    tensors = layer_tensors(model)
    import keras

    third, fifteenth = (
        np.asarray(item)
        for item in run(keras.Model(model.input, [tensors["block_3_project_BN"], tensors["block_15_add"]]), images)
    )
    assert [item.dtype for item in results] == [np.float32] * 4
    np.testing.assert_allclose(results[0], last.mean(axis=(1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(results[1], last)
    np.testing.assert_array_equal(results[2], third.max(axis=(1, 2)))
    np.testing.assert_array_equal(results[3], fifteenth.reshape(3, -1))
    single = run(feature_model(model, [("out_relu", "avg")]), images)
    np.testing.assert_array_equal(np.asarray(single[0] if isinstance(single, list | tuple) else single), results[0])


@pytest.mark.slow
def test_a_nested_layer_gives_the_tensor_of_the_outer_graph() -> None:
    """``layer.output`` of ConvNeXt's stem belongs to another graph; asking it would not connect to the image."""
    model = untrained("convnexttiny", 64)
    images = pixels(2, 64, 64)
    [stem] = run(feature_model(model, [("convnext_tiny_stem", "none"), ("convnext_tiny_stem", "avg")]), images)[:1]
    expected = model.get_layer("convnext_tiny_stem")(model.get_layer("convnext_tiny_prestem_normalization")(images))
    np.testing.assert_allclose(np.asarray(stem), np.asarray(expected), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- cuts
@pytest.mark.slow
def test_cuts_lie_only_where_one_tensor_separates_the_graph() -> None:
    model = build_backbone(find_backbone("mobilenetv2"), (64, 64))
    cuts = valid_cuts(model)
    assert cuts[0] == "Conv1"
    assert cuts[-1] == "Conv_1_bn"
    assert "block_10_project_BN" in cuts
    assert {"block_11_expand", "block_11_expand_relu", "block_11_project_BN", "out_relu"}.isdisjoint(cuts)

    assert model.layers[100].name == "block_11_expand_relu"
    assert nearest_earlier_cut(model, 100) == "block_10_project_BN"
    with pytest.raises(
        ConfigurationError, match=r"before it: block_10_project, block_10_project_BN; after it: block_11"
    ):
        cut_at(model, "block_11_expand_relu")
    with pytest.raises(ConfigurationError, match=r"no layer 'block_15_ad'; did you mean 'block_15_add'"):
        cut_at(model, "block_15_ad")
    with pytest.raises(ConfigurationError, match="no single tensor separates the graph before layer 0"):
        nearest_earlier_cut(model, 0)
    with pytest.raises(ConfigurationError, match="has 154 layers; received the layer index 154"):
        nearest_earlier_cut(model, 154)


@pytest.mark.slow
def test_the_cut_before_the_first_fifteen_layers_of_vgg16() -> None:
    model = build_backbone(find_backbone("vgg16"), (32, 32))
    assert nearest_earlier_cut(model, 15) == "block4_pool"
    assert nearest_earlier_cut(model, -4) == "block4_pool"
    assert len(valid_cuts(model)) == 17  # every layer but the input and the last


def test_words_and_numbers_of_automatic_names() -> None:
    assert [snake_case(word) for word in ("SeparableConv2D", "ReLU", "InputLayer")] == [
        "separable_conv2d",
        "re_lu",
        "input_layer",
    ]

    class Conv2D:
        def __init__(self, name: str) -> None:
            self.name = name

    given = ["conv2d_94", "mine_1", "conv2d_97", "conv2d_95"]
    assert stable_names([Conv2D(name) for name in given]) == ["conv2d", "mine_1", "conv2d_3", "conv2d_1"]
    fresh = ["conv2d", "conv2d_2", "conv2d_10"]
    assert stable_names([Conv2D(name) for name in fresh]) == fresh


# -------------------------------------------------------------------------------------------- model files
def small_model(path: Path, shape: tuple[int | None, int | None, int], *, sequential: bool = False) -> Path:
    import keras

    layers = [
        keras.layers.Rescaling(1 / 255, name="scale"),
        keras.layers.Conv2D(4, 3, strides=2, activation="relu", name="first"),
        keras.layers.Conv2D(5, 3, name="second"),
    ]
    if sequential:
        model = keras.Sequential([keras.Input(shape), *layers])
    else:
        image = output = keras.Input(shape)
        for layer in layers:
            output = layer(output)
        model = keras.Model(image, output)
    model.save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_file_is_a_backbone(tmp_path: Path, *, sequential: bool) -> None:
    import keras

    path = small_model(tmp_path / "mine.KERAS.keras", (20, 30, 3), sequential=sequential)
    backbone = find_backbone(str(path))
    assert (backbone.name, backbone.preprocessing, backbone.default_size) == ("model", "none", (20, 30))
    model = build_backbone(backbone, (20, 30))
    images = pixels(2, 20, 30)
    np.testing.assert_array_equal(
        np.asarray(run(model, preprocess(backbone.preprocessing)(images))),
        np.asarray(run(keras.saving.load_model(path), images)),
    )
    file = resolve_weights(backbone)
    assert (file.path, file.route) == (path, "model file")
    assert load_weights(model, backbone, file) == model_digest(keras.saving.load_model(path))
    assert (last_layer(model), valid_cuts(model)) == ("second", ["scale", "first"])
    with pytest.raises(ConfigurationError, match="takes images of 20x30 pixels, received 30x30"):
        build_backbone(backbone, (30, 30))
    with pytest.raises(ConfigurationError, match="contains its own weights"):
        resolve_weights(backbone, "random")


@pytest.mark.slow
def test_a_model_file_of_any_size_takes_the_one_asked_for(tmp_path: Path) -> None:
    import keras

    path = small_model(tmp_path / "any.keras", (None, None, 3))
    backbone = find_backbone(str(path))
    with pytest.raises(ConfigurationError, match="--image-size"):
        _ = backbone.default_size
    assert backbone.pixel_rule(NetworkOptions(str(path), image_size=(24, 18))) == PixelRule(24, 18)
    assert backbone.pixel_rule(NetworkOptions(str(path), image_size=24)) == PixelRule(24, 24)
    model = build_backbone(backbone, (24, 18))
    assert layer_tensors(model)["second"].shape == (None, 9, 6, 5)
    images = pixels(1, 24, 18)
    np.testing.assert_array_equal(
        np.asarray(run(model, images)), np.asarray(run(keras.saving.load_model(path), images))
    )


@pytest.mark.slow
def test_a_model_file_that_runs_code_or_takes_no_images_is_refused(tmp_path: Path) -> None:
    import keras

    image = keras.Input((8, 8, 3))
    keras.Model(image, keras.layers.Lambda(lambda tensor: tensor * 2)(image)).save(tmp_path / "lambda.keras")
    with pytest.raises(ConfigurationError, match="cannot be loaded in safe mode"):
        build_backbone(find_backbone(str(tmp_path / "lambda.keras")), (8, 8))
    flat = keras.Input((8,))
    keras.Model(flat, keras.layers.Dense(2)(flat)).save(tmp_path / "flat.keras")
    with pytest.raises(ConfigurationError, match=r"expected one input \(n, height, width, 3\)"):
        build_backbone(find_backbone(str(tmp_path / "flat.keras")), (8, 8))


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        find_backbone(str(tmp_path / "absent.keras"))
    (tmp_path / "text.keras").write_text("hello")
    with pytest.raises(ConfigurationError, match="is not a Keras model file"):
        find_backbone(str(tmp_path / "text.keras"))
    for damage, name in ((b"\xff\xff", "flipped.keras"), (b"\x00\x00", "short.keras")):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("config.json", json.dumps(list(range(999))))
        data = bytearray((tmp_path / name).read_bytes())
        start = 30 + len("config.json")
        data[start : start + 2] = damage
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigurationError, match="is not a Keras model file"):
            find_backbone(str(tmp_path / name))
    with zipfile.ZipFile(tmp_path / "odd.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"config": []}))
    assert find_backbone(str(tmp_path / "odd.keras")).fixed_size is None


def described(path: Path, layers: list[dict[str, Any]], version: str = "3.15.1", **config: Any) -> Path:
    """A .keras file of which only the description is there."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": version}))
        archive.writestr(
            "config.json", json.dumps({"class_name": "Functional", **config, "config": {"layers": layers}})
        )
        archive.writestr("model.weights.h5", b"")
    return path


def layer(kind: str, name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": {"name": name, **config}}


IMAGE = layer("InputLayer", "image", batch_shape=[None, 96, 64, 3])


@pytest.mark.pain(19)
@pytest.mark.parametrize(
    ("layers", "classifier"),
    [
        (
            [IMAGE, layer("GlobalAveragePooling2D", "pool"), layer("Dense", "top", activation="softmax")],
            ("top", "pool"),
        ),
        ([IMAGE, layer("Dense", "logits", activation="linear"), layer("Softmax", "scores")], ("scores", "logits")),
        ([IMAGE, layer("Dense", "x"), layer("Activation", "scores", activation="sigmoid")], ("scores", "x")),
        (
            [
                IMAGE,
                layer("Sequential", "net", layers=[layer("Conv2D", "c"), layer("Dense", "d", activation="softmax")]),
            ],
            ("net/d", "net/c"),
        ),
        ([IMAGE, layer("Dense", "embedding", activation="linear")], None),
        ([IMAGE], None),
    ],
)
def test_the_classifier_of_a_model_file_is_found_without_keras(
    tmp_path: Path, layers: list[dict[str, Any]], classifier: tuple[str, str] | None
) -> None:
    backbone = find_backbone(str(described(tmp_path / "m.keras", layers)))
    assert (backbone.classifier, backbone.default_size) == (classifier, (96, 64))


@pytest.mark.pain(18)
def test_a_file_of_keras_2_fixes_its_image_size_too(tmp_path: Path) -> None:
    image = layer("InputLayer", "input_1", batch_input_shape=[None, 96, 64, 3])
    assert find_backbone(str(described(tmp_path / "k2.keras", [image], "2.15.0"))).default_size == (96, 64)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"config":' * 100_000 + "1" + "}" * 100_000])
def test_a_deep_description_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with zipfile.ZipFile(tmp_path / "deep.keras", "w") as archive:
        archive.writestr("config.json", text)
    with pytest.raises(ConfigurationError, match=r"is not a Keras model file .*recursion") as caught:
        find_backbone(str(tmp_path / "deep.keras"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["model.h5", "my/net.weights.h5", "net.pt"])
def test_other_model_files_get_the_way_out(name: str) -> None:
    with pytest.raises(ConfigurationError, match="received the file") as caught:
        find_backbone(name)
    for way in (f"--backbone NAME --weights {name}", "save it with Keras 3 as model.save('NAME.keras')"):
        assert way in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.slow
@pytest.mark.parametrize("name", ["my model", "(x) modèle"])
def test_names_that_tensorflow_refuses_are_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A model, a layer and a nested model may have any name; TensorFlow takes only some for the scopes of its graph."""
    import keras

    from features.networks.network import resolve_network
    from features.recipe import NetworkOptions

    image = keras.Input((8, 8, 3))
    conv = keras.layers.Conv2D(2, 3, name=f"{name} conv")(image)
    inner = keras.Model(image, keras.layers.GlobalAveragePooling2D(name=name)(conv), name=name)
    keras.Model(image, inner(image), name=name).save(tmp_path / f"{name}.keras")
    images = pixels(2, 8, 8).astype(np.uint8)
    expected = np.asarray(keras.Model(image, conv)(images)).mean(axis=(1, 2))
    network = resolve_network(NetworkOptions(str(tmp_path / f"{name}.keras")))
    engine = network.engine(network.recipes, batch_size=2, device="cpu")
    [features] = engine(images).values()
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
    assert "layers that TensorFlow cannot run under their names are renamed: " in caplog.text


@pytest.mark.slow
def test_a_layer_inside_a_nested_model_gives_its_features(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """OUTER/INNER names it; a classifier at the end is warned about, and the layer before it is named.

    Both models are compiled, as most saved models are: such a file could not be opened.
    """
    import keras

    from features.networks.network import resolve_network
    from features.recipe import NetworkOptions

    image = keras.Input((None, None, 3))
    conv = keras.layers.Conv2D(4, 3, name="conv")(image)
    inner = keras.Model(image, keras.layers.ReLU(name="relu")(conv), name="inner")
    scale, pool = keras.layers.Rescaling(1 / 255, name="scale"), keras.layers.GlobalAveragePooling2D(name="pool")
    head = keras.layers.Dense(3, activation="softmax", name="scores")
    inner.compile("adam", "mse")
    model = keras.Sequential([keras.Input((16, 12, 3)), scale, inner, pool, head])
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10)), "sparse_categorical_crossentropy"
    )
    model.save(tmp_path / "net.keras")
    images = pixels(2, 16, 12)
    expected = np.asarray(keras.Model(inner.inputs, conv)(scale(images)))

    backbone = str(tmp_path / "net.keras")
    network = resolve_network(NetworkOptions(backbone, layers=("inner/conv", "inner/relu"), pooling="avg"))
    assert network.description.layers["inner/conv"] == (14, 10, 4)
    assert list(network.description.layers) == ["scale", "inner/conv", "inner/relu", "inner", "pool", "scores"]
    assert [recipe.name for recipe in network.recipes] == ["inner|conv.avg", "inner|relu.avg"]
    found = feature_model(network.load(), [("inner/conv", "none"), ("inner/relu", "avg")])(images)
    np.testing.assert_allclose(np.asarray(found[0]), expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(found[1]), np.maximum(expected, 0).mean(axis=(1, 2)), atol=1e-5)
    assert not caplog.records
    with pytest.raises(ConfigurationError, match="no layer 'inner/cnov'; did you mean 'inner/conv'"):
        resolve_network(NetworkOptions(backbone, layers=("inner/cnov",)))

    scores = resolve_network(NetworkOptions(backbone))
    assert (scores.recipes[0].layer, scores.recipes[0].pooling) == ("scores", "none")
    (record,) = caplog.records
    assert "gives scores of 3 classes" in record.message
    assert record.message.endswith("--layer pool")
    with pytest.raises(ConfigurationError, match=r"layer 'scores' gives \(3,\). Leave out --pooling"):
        resolve_network(NetworkOptions(backbone, pooling="avg"))


@pytest.mark.slow
def test_what_keras_cannot_open_is_refused_in_a_few_words(tmp_path: Path) -> None:
    """A layer far larger than the file, one that makes gigabytes of one image, and a network of Keras 2."""
    import keras

    path = small_model(tmp_path / "good.keras", (20, 30, 3))

    def edited(name: str, old: str, new: str, version: str = keras.__version__) -> Path:
        with zipfile.ZipFile(path) as good, zipfile.ZipFile(tmp_path / name, "w") as bad:
            bad.writestr("metadata.json", json.dumps({"keras_version": version}))
            bad.writestr("model.weights.h5", good.read("model.weights.h5"))
            text = good.read("config.json").decode()
            assert old in text
            bad.writestr("config.json", text.replace(old, new))
        return tmp_path / name

    cases = {
        edited(
            "wide.keras", '"filters": 5', '"filters": 5000000000'
        ): r"its layers declare 7\d+ bytes of weights, but the file holds \d+\.",
        edited("odd.keras", '"filters": 5', '"filters": -5'): "cannot be loaded in safe mode: ",
        edited("k2.keras", '"class_name": "Functional"', '"class_name": "tf_keras.Functional"', "2.15.0"): (
            r"was written by Keras 2.15.0, and Keras 3.* cannot open it .*--backbone NAME --weights"
        ),
    }
    for made, message in cases.items():
        with pytest.raises(ConfigurationError, match=message) as caught:
            build_backbone(find_backbone(str(made)), (20, 30))
        assert len(str(caught.value)) < 700, made
    image = keras.Input((20, 30, 3))
    keras.Model(image, keras.layers.UpSampling2D(10_000, name="up")(image)).save(tmp_path / "large.keras")
    with pytest.raises(ConfigurationError, match="layer up gives 720000000000 bytes for one image"):
        build_backbone(find_backbone(str(tmp_path / "large.keras")), (20, 30))


@pytest.mark.slow
def test_tokens_are_pooled_as_asked(tmp_path: Path) -> None:
    import keras

    from features.networks.network import resolve_network
    from features.recipe import NetworkOptions

    image = keras.Input((16, 16, 3))
    patches = keras.layers.Reshape((4, 5))(keras.layers.Conv2D(5, 8, strides=8)(image))
    keras.Model(image, keras.layers.LayerNormalization(name="norm")(patches)).save(tmp_path / "tokens.keras")

    def pooling(asked: str | None, *layers: str) -> str:
        return (
            resolve_network(NetworkOptions(str(tmp_path / "tokens.keras"), layers=layers, pooling=asked))
            .recipes[0]
            .pooling
        )

    assert [pooling(asked, "norm") for asked in ("avg", "max", "flatten", "none", None)] == [
        *("avg", "max", "flatten", "none", "none")
    ]
    assert pooling(None) == "avg"  # of the last layer, which no head would take as tokens
    model = keras.saving.load_model(tmp_path / "tokens.keras")
    images = pixels(2, 16, 16)
    tokens = np.asarray(model(images))
    found = feature_model(model, [("norm", kind) for kind in ("avg", "max", "flatten", "none")])(images)
    expected = [tokens.mean(axis=1), tokens.max(axis=1), tokens.reshape(2, 20), tokens]
    for values, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(values), right, atol=1e-6)


@pytest.mark.slow
def test_two_model_files_with_the_same_tensors_are_two_recipes(tmp_path: Path) -> None:
    """What is computed with the tensors decides the features as much as they do."""
    import keras

    from features.networks.network import resolve_network
    from features.recipe import NetworkOptions

    def saved(name: str, activation: str, strides: int) -> str:
        image = keras.Input((16, 16, 3), name="image")
        kernel = keras.layers.Conv2D(
            4, 3, strides=strides, activation=activation, kernel_initializer="ones", name="conv"
        )
        keras.Model(image, kernel(image), name="net").save(tmp_path / name)
        return str(tmp_path / name)

    paths = [
        saved("a.keras", "relu", 1),
        saved("b.keras", "relu", 1),
        saved("c.keras", "tanh", 1),
        saved("d.keras", "relu", 2),
    ]
    a, b, c, d = (resolve_network(NetworkOptions(path, image_size=(16, 16))).recipes[0].fingerprint for path in paths)
    assert a == b
    assert len({a, c, d}) == 3
