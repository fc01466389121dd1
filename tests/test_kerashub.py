"""Networks of KerasHub: small ones made here, saved as presets and .keras files; extracted, trained on and fine-tuned."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import paint_noise
from helpers import ROOT, STRESS
from PIL import Image

from features.errors import ConfigurationError
from features.extraction.extraction import extract_features
from features.networks import finding
from features.networks.finding import find_backbone
from features.networks.hub import HubFolder
from features.networks.kerasfiles import ModelFile, Preset
from features.networks.kerashub import HubConfig, check_classes, read_converter
from features.networks.network import Network, resolve_network
from features.networks.reference import reference_images, relative_difference
from features.pixels.decode import resize_image
from features.recipe import NetworkOptions, Normalisation, PixelRule

needs_hub = pytest.mark.skipif(importlib.util.find_spec("keras_hub") is None, reason="keras-hub is not installed")
SIDE = 24
SCALE, OFFSET = [1 / 57.0, 1 / 58.0, 1 / 59.0], [-2.0, -1.9, -1.8]
VIT = {"image_shape": [SIDE, SIDE, 3], "patch_size": [8, 8], "use_class_token": True}


def config_of(name: str, /, **settings: Any) -> dict[str, Any]:
    """A configuration as KerasHub writes it."""
    registered = f"keras_hub>{name}"
    return {"module": "keras_hub.src.models", "class_name": name, "config": settings, "registered_name": registered}


def converter_of(**changes: Any) -> dict[str, Any]:
    plain = {
        "name": "vi_t_image_converter", "trainable": True, "dtype": {"config": {"name": "float32"}},
        "image_size": [SIDE, SIDE], "scale": SCALE, "offset": OFFSET, "interpolation": "bilinear", "antialias": False,
        "crop_to_aspect_ratio": True, "pad_to_aspect_ratio": False, "bounding_box_format": "yxyx",
    }  # fmt: skip
    return config_of("ViTImageConverter", **{key: value for key, value in (plain | changes).items() if value != ...})


def preset_of(folder: Path, config: Any, **files: Any) -> Path:
    """A folder with a configuration, weights that nobody reads, and further JSON files."""
    folder.mkdir(parents=True)
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "model.weights.h5").write_bytes(b"x")
    return folder


# ---------------------------------------------------------------------------------------- what the files say
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"resize": "keras", "fit": "crop"}),
        ({"antialias": True, "crop_to_aspect_ratio": False}, {"resize": "antialias", "fit": "stretch"}),
        ({"antialias": True, "interpolation": "bicubic"}, {"resize": "bicubic", "fit": "crop"}),
        ({"image_size": [32, 48]}, {"height": 32, "width": 48}),
        ({"image_size": None}, {"height": 20, "width": 28}),  # the size of the network
        ({"image_size": ..., "height": 64, "width": 64}, {"height": 64, "width": 64}),  # of the first release
        ({"scale": 0.5, "offset": None}, {"mean": (0.0, 0.0, 0.0), "std": (2.0, 2.0, 2.0)}),
        ({"scale": None, "offset": 3}, {"mean": (-3.0, -3.0, -3.0), "std": (1.0, 1.0, 1.0)}),
        ({"scale": 0.5, "mean": [1.0, 2.0, 3.0], "variance": [4.0, 4.0, 4.0], "offset": ...},
         {"mean": (2.0, 4.0, 6.0), "std": (4.0, 4.0, 4.0)}),
    ],
)  # fmt: skip
def test_a_converter_is_read_as_it_computes(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    plain: dict[str, Any] = {
        "height": SIDE, "width": SIDE, "resize": "keras", "fit": "crop", "scale": 1.0,
        "mean": (114.0, 1.9 * 58, 1.8 * 59), "std": (57.0, 58.0, 59.0), "channels": "rgb",
    }  # fmt: skip
    found = dataclasses.asdict(read_converter(Path("c.json"), converter_of(**changes), (20, 28)))
    for key, value in (plain | expected).items():
        assert found[key] == (pytest.approx(value) if isinstance(value, tuple) else value), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation": "bicubic"}, "'antialias' is False, expected true with the interpolation bicubic"),
        ({"interpolation": "nearest"}, "'interpolation' is 'nearest', expected one of bilinear, bicubic"),
        ({"pad_to_aspect_ratio": True}, "'pad_to_aspect_ratio' is True, expected false"),
        ({"scale": 0}, "'scale' is 0, expected a number above 0"),
        ({"scale": [0.1, 0.1, -1]}, "'scale' is .*expected three numbers above 0"),
        ({"scale": ...}, "ViTImageConverter does not say 'scale'"),  # BLIP-2 has its own numbers in its code
        ({"patch_size": 16}, "has the key 'patch_size', which is not known here"),  # Gemma cuts patches itself
        ({"data_format": "channels_first"}, "'data_format' is 'channels_first'"),
        ({"image_size": [0, 24]}, "'image_size' is .*expected height and width of 1 to 4096 pixels"),
        ({"image_size": "24"}, "'image_size' is '24'"),
    ],
)
def test_a_converter_that_does_something_else_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_converter(Path("c.json"), converter_of(**changes), None)
    assert "--preprocess FILE.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "settings", "prefix"),
    [
        ("ViTBackbone", {}, 1),
        ("ViTBackbone", {"use_class_token": False}, 0),
        ("DeiTBackbone", {}, 2),
        ("DINOV2Backbone", {}, 1),
        ("DINOV2Backbone", {"num_register_tokens": 4}, 5),
        ("DINOV3Backbone", {"num_register_tokens": 4}, 5),
        ("SigLIPVisionEncoder", {}, 0),
        ("MiTBackbone", {}, None),
        ("ResNetBackbone", {}, None),
    ],
)
def test_the_tokens_before_those_of_the_image_are_known_by_class(
    name: str, settings: dict[str, Any], prefix: int | None
) -> None:
    found = HubConfig.of(Path("config.json"), config_of(name, **settings))
    assert found is not None
    assert found.prefix_tokens == prefix


def test_a_preset_says_its_size_pixels_and_normalisation_without_keras(tmp_path: Path) -> None:
    folder = preset_of(tmp_path / "p", config_of("ViTBackbone", **VIT), image_converter=converter_of())
    found = find_backbone(f"preset:{folder}")
    assert find_backbone(str(folder)) == found  # the folder alone is enough
    assert (found.name, found.place) == ("model", f"preset:{folder}")
    assert found.pixel_rule(NetworkOptions()) == PixelRule(SIDE, SIDE, resize="keras", fit="crop")
    how = found.normalisation(NetworkOptions())
    assert how is not None
    assert (how.scale, how.std, how.channels) == (1.0, pytest.approx((57.0, 58.0, 59.0)), "rgb")
    assert found.prefix_tokens(NetworkOptions()) == 1
    with pytest.raises(
        ConfigurationError, match=r"received 32x32, but .*model.weights.h5 takes images of 24x24 pixels only"
    ):
        found.pixel_rule(NetworkOptions(image_size=32))

    (folder / "image_converter.json").unlink()
    inside = config_of("ViTImageClassifierPreprocessor", image_converter=converter_of(scale=1.0, offset=0.0))
    (folder / "preprocessor.json").write_text(json.dumps(inside))
    assert find_backbone(f"preset:{folder}").normalisation(NetworkOptions()) == Normalisation()
    (folder / "preprocessor.json").unlink()
    with pytest.raises(
        ConfigurationError, match=r"nothing says how images are prepared .*image_converter\.json"
    ) as caught:
        find_backbone(f"preset:{folder}").normalisation(NetworkOptions())
    assert len(str(caught.value)) < 1000


def test_networks_that_interpolate_their_positions_take_whole_patches_of_any_size(tmp_path: Path) -> None:
    shape = {"image_shape": [518, 518, 3], "patch_size": 14}
    folder = preset_of(
        tmp_path / "p", config_of("DINOV2Backbone", **shape), image_converter=converter_of(image_size=[224, 224])
    )
    found = find_backbone(f"preset:{folder}")
    assert isinstance(found, Preset)
    assert found.pixel_rule(NetworkOptions()).height == 224
    assert found.pixel_rule(NetworkOptions(image_size=280)).width == 280
    message = r"received 240x240, but .* patches of 14x14 pixels; use --image-size 238$"
    with pytest.raises(ConfigurationError, match=message):
        found.pixel_rule(NetworkOptions(image_size=240))


@pytest.mark.slow
def test_a_network_may_have_been_made_for_images_that_are_no_whole_patches(tmp_path: Path) -> None:
    """SigLIP so400m has 27 x 27 patches of 14 pixels in 384."""
    shape = {"image_shape": [384, 384, 3], "patch_size": 14}
    folder = preset_of(
        tmp_path / "p", config_of("SigLIPVisionEncoder", **shape), image_converter=converter_of(image_size=[384, 384])
    )
    found = find_backbone(f"preset:{folder}")
    assert found.pixel_rule(NetworkOptions()).height == 384
    with pytest.raises(ConfigurationError, match="cannot be loaded as a preset"):  # not because of its size
        found.build((384, 384))
    with pytest.raises(ConfigurationError, match=r"patches of 14x14 pixels; use --image-size 392$"):
        found.build((385, 385))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is no folder.*nothing is fetched from Kaggle"),
        (lambda folder: folder.mkdir(), r"has no config\.json with model\.weights\.h5"),
        (lambda folder: preset_of(folder, {"class_name": "Functional", "module": "keras", "config": {}}),
         "received the class Functional of keras, expected one of KerasHub"),
        (lambda folder: preset_of(folder, ["x"]), "expected an object of JSON"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_preset_is_refused(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / "vit_base_patch16_224_imagenet")
    with pytest.raises(ConfigurationError, match=message):
        find_backbone(f"preset:{tmp_path / 'vit_base_patch16_224_imagenet'}").pixel_rule(NetworkOptions())


def test_only_classes_of_keras_and_kerashub_are_made() -> None:
    check_classes(Path("c"), config_of("ViTBackbone", **VIT, dtype={"module": "keras", "class_name": "DTypePolicy"}))
    for inner in (
        {"module": "os", "class_name": "system", "config": {}},
        {"module": "keras_nlp.models", "class_name": "X", "config": {}},
        {"module": "keras", "class_name": "Dense", "registered_name": "mine>Dense"},
        {"module": None, "class_name": "Own", "registered_name": "mine>Own"},
        {"module": "kerasfoo.layers", "class_name": "X"},
    ):
        with pytest.raises(ConfigurationError, match="only classes of Keras and KerasHub"):
            check_classes(Path("c"), config_of("ViTBackbone", layers=[{"a": inner}]))


def keras_file(path: Path, config: Any) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", b"")
    return path


def test_a_keras_file_of_kerashub_says_its_size_and_asks_for_a_description(tmp_path: Path) -> None:
    """It was taken for a network of any size that prepares its pixels itself."""
    found = find_backbone(str(keras_file(tmp_path / "vit.keras", config_of("ViTBackbone", **VIT))))
    assert isinstance(found, ModelFile)
    assert found.default_size == (SIDE, SIDE)
    with pytest.raises(ConfigurationError, match=r"vit\.keras: nothing says how images are prepared"):
        found.pixel_rule(NetworkOptions())
    given = NetworkOptions(preprocess=Normalisation(1 / 255))
    assert found.normalisation(given) == Normalisation(1 / 255)
    assert found.pixel_rule(given) == PixelRule(SIDE, SIDE)
    assert found.prefix_tokens(given) == 1


def test_the_keras_file_of_a_task_contains_its_image_converter(tmp_path: Path) -> None:
    parts = {
        "backbone": config_of("ViTBackbone", **VIT),
        "preprocessor": config_of("P", image_converter=converter_of()),
    }
    found = find_backbone(str(keras_file(tmp_path / "task.keras", config_of("ViTImageClassifier", **parts))))
    how = found.normalisation(NetworkOptions())
    assert how is not None
    assert how.std == pytest.approx((57.0, 58.0, 59.0))
    assert found.pixel_rule(NetworkOptions()).fit == "crop"


def test_a_preset_on_a_hub_keeps_its_pinned_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = preset_of(tmp_path / "p", config_of("ViTBackbone", **VIT), image_converter=converter_of())
    pinned = HubFolder(folder, f"hf:keras/vit@{'a' * 40}", "a" * 40, "apache-2.0")
    monkeypatch.setattr(finding, "hub_folder", lambda name: pinned)
    found = find_backbone("hf:keras/vit")
    assert isinstance(found, Preset)
    assert (found.folder, found.place) == (folder, pinned.name)


@pytest.mark.slow
def test_a_keras_file_on_a_hub_keeps_its_pinned_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keras_file(tmp_path / "vit.keras", config_of("ViTBackbone", **VIT))
    monkeypatch.setattr(finding, "hub_folder", lambda name: HubFolder(tmp_path, f"{name}@{'a' * 40}", "a" * 40, "mit"))
    found = find_backbone("hf:owner/name")
    assert (type(found), found.place) == (ModelFile, f"hf:owner/name@{'a' * 40}")


@pytest.mark.slow
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras printed the whole configuration."""
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    folder = preset_of(tmp_path / "p", config_of("ViTBackbone", **VIT), image_converter=converter_of())
    file = keras_file(tmp_path / "vit.keras", config_of("ViTBackbone", **VIT))
    for backbone in (find_backbone(f"preset:{folder}"), find_backbone(str(file))):
        with pytest.raises(
            ConfigurationError, match="the package keras-hub is not installed here: pip install keras-hub"
        ):
            backbone.build((SIDE, SIDE))


# -------------------------------------------------------------------------------------------- whole networks
@dataclasses.dataclass(frozen=True)
class Made:
    """A network of KerasHub with its preset folder and ``.keras`` file."""

    network: Any
    converter: Any
    preset: Path
    file: Path

    def forward(self, pixels: np.ndarray) -> np.ndarray:
        """What the network itself gives on its own preprocessing."""
        import keras

        return np.asarray(keras.ops.convert_to_numpy(self.network(self.converter(pixels), training=False)))


def networks(hub: Any) -> dict[str, tuple[Any, Any]]:
    shape, statistics = (SIDE, SIDE, 3), {"image_size": (SIDE, SIDE), "scale": SCALE, "offset": OFFSET}
    heads = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "image_shape": shape, "patch_size": 8}
    models, layers = hub.models, hub.layers
    return {
        "resnet18": (
            models.ResNetBackbone([64], [7], [64, 64, 64, 64], [2, 2, 2, 2], [1, 2, 2, 2], "basic_block",
                                  image_shape=(None, None, 3)),
            layers.ResNetImageConverter(**statistics),
        ),
        "vit": (models.ViTBackbone(**heads, mlp_dim=32), layers.ViTImageConverter(**statistics)),
        "dinov2": (
            models.DINOV2Backbone(**heads, intermediate_dim=32, num_register_tokens=2, position_embedding_shape=(40, 40, 3)),
            layers.DINOV2ImageConverter(**statistics, interpolation="bicubic", antialias=True, crop_to_aspect_ratio=False),
        ),
        "siglip": (
            models.SigLIPVisionEncoder(**heads, intermediate_dim=32, name="siglip"),
            layers.SigLIPImageConverter(image_size=(SIDE, SIDE), scale=1 / 127.5, offset=-1, antialias=True),
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    from features.networks.backend import load_keras_hub

    folder = tmp_path_factory.mktemp("hub")
    hub = load_keras_hub(folder)
    import keras

    keras.utils.set_random_seed(3)
    found = {}
    for name, (network, converter) in networks(hub).items():
        network.save_to_preset(str(folder / name))
        converter.save_to_preset(str(folder / name))
        network.save(folder / f"{name}.keras")
        found[name] = Made(network, converter, folder / name, folder / f"{name}.keras")
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_noise(tmp_path_factory.mktemp("pictures") / "images")


def pixels_of(pictures: Path, store: Any) -> np.ndarray:
    return np.stack([np.asarray(Image.open(pictures / path)) for path in store.images.paths])


def features(network: Network, images: np.ndarray) -> np.ndarray:
    (found,) = network.engine(network.recipes, batch_size=len(images))(images).values()
    return found


POOLED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "resnet18": lambda maps: maps.mean(axis=(1, 2)),
    "vit": lambda tokens: tokens[:, 0],
    "dinov2": lambda tokens: tokens[:, 0],
    "siglip": lambda vector: vector,
}
HOW = {"resnet18": "avg", "vit": "cls", "dinov2": "cls", "siglip": "none"}


@pytest.mark.slow
@needs_hub
@pytest.mark.parametrize("name", HOW)
def test_features_are_the_networks_own_forward_pass_on_its_own_preprocessing(made: dict[str, Made], name: str) -> None:
    images = reference_images(SIDE, SIDE, 5)
    of = made[name]
    network = resolve_network(NetworkOptions(f"preset:{of.preset}", engine="keras"))
    assert (network.recipes[0].pooling, network.recipes[0].preprocessing) == (HOW[name], "mean-std")
    expected = POOLED[name](of.forward(images))
    assert np.abs(expected).max() > 1e-2
    assert relative_difference(features(network, images), expected) < 1e-5

    how = network.recipes[0].normalisation
    again = resolve_network(NetworkOptions(str(of.file), engine="keras", preprocess=how, image_size=SIDE))
    assert again.recipes[0].weights == network.recipes[0].weights  # the same network, however it was saved
    if name == "vit":
        import keras_hub

        models = keras_hub.models  # a classifier, which gives itself an optimizer
        prepared = models.ViTImageClassifierPreprocessor(image_converter=of.converter)
        models.ViTImageClassifier(backbone=of.network, num_classes=3, preprocessor=prepared).save(
            of.file.parent / "task.keras"
        )
        task = resolve_network(NetworkOptions(str(of.file.parent / "task.keras"), engine="keras"))
        assert task.recipes[0].fingerprint == network.recipes[0].fingerprint
        assert relative_difference(features(task, images), expected) < 1e-5

        converted = resolve_network(NetworkOptions(f"preset:{of.preset}", pooling="cls+tokens"))
        assert converted.engine_name == "openvino"
        tokens = of.forward(images)
        both = np.concatenate([tokens[:, 0], tokens[:, 1:].mean(axis=1)], axis=1)
        assert relative_difference(features(converted, images), both) < 1e-5
    if name == "dinov2":
        (folder_pooled,) = resolve_network(NetworkOptions(f"preset:{of.preset}", pooling="tokens")).recipes
        assert folder_pooled.prefix_tokens == 3


@pytest.mark.slow
@needs_hub
def test_a_network_that_interpolates_its_positions_takes_another_size(made: dict[str, Made]) -> None:
    import keras_hub

    of = made["dinov2"]
    larger = keras_hub.models.DINOV2Backbone.from_preset(str(of.preset), image_shape=(32, 32, 3))
    images = reference_images(32, 32, 3)
    network = resolve_network(NetworkOptions(f"preset:{of.preset}", engine="keras", image_size=32, pooling="cls"))
    scaled = images * np.float32(SCALE) + np.float32(OFFSET)
    assert relative_difference(features(network, images), np.asarray(larger(scaled))[:, 0]) < 1e-5


def efficientnet() -> Any:
    """A network whose blocks are layers with BatchNorm within them."""
    import keras_hub

    one = {name: [1] for name in ("stackwise_num_repeats", "stackwise_strides")}
    return keras_hub.models.EfficientNetBackbone(
        stackwise_kernel_sizes=[3], stackwise_input_filters=[8], stackwise_output_filters=[16], **one,
        stackwise_expansion_ratios=[2], stackwise_squeeze_and_excite_ratios=[0.25], stackwise_block_types=["v1"],
        width_coefficient=1.0, depth_coefficient=1.0,
    )  # fmt: skip


def numbers(model: Any) -> dict[str, np.ndarray]:
    import keras

    return {weight.path: keras.ops.convert_to_numpy(weight).copy() for weight in model.weights}


@pytest.mark.slow
@needs_hub
def test_batchnorm_within_a_layer_keeps_its_statistics(tmp_path: Path) -> None:
    import keras_hub

    from pipeline.heads.kinds import make_head
    from pipeline.tuning.endtoend import split_for_training
    from pipeline.tuning.settings import TuningSettings
    from pipeline.tuning.training import Tail

    efficientnet().save_to_preset(str(tmp_path))
    keras_hub.layers.ImageConverter(image_size=(SIDE, SIDE), scale=SCALE, offset=OFFSET).save_to_preset(str(tmp_path))
    network = resolve_network(NetworkOptions(f"preset:{tmp_path}", engine="keras"))
    images, labels = reference_images(SIDE, SIDE, 8), np.arange(8, dtype=np.int32) % 2
    head = make_head("dropout-linear", classes=("cat", "dog"), epochs=1)
    head.fit(features(network, images), labels)
    changed: dict[str, set[str]] = {}
    for bn in ("frozen", "affine"):
        split = split_for_training(network, network.recipes[0], head, unfreeze="all", bn=bn)
        before = numbers(split.backbone)
        within = {path for path in before if path.startswith("block1a")}
        statistics = [path for path in before if "moving" in path]
        assert len(statistics) == len(split.statistics()) == 2 * 5
        assert len(within & {*statistics}) == 2 * 3
        Tail(split, 1.0, TuningSettings(learning_rate=1e-2, batch_size=8)).step(images, labels)
        changed[bn] = {path for path, now in numbers(split.backbone).items() if not np.array_equal(before[path], now)}
        assert not changed[bn] & {*statistics}
    norms = {path for path in before if path.endswith(("/gamma", "/beta")) and path in within}
    assert len(norms) == 2 * 3
    assert norms <= changed["affine"]
    assert not norms & changed["frozen"]


@pytest.mark.slow
@needs_hub
def test_networks_are_taken_by_their_output_and_their_last_block(tmp_path: Path) -> None:
    """DeiT's encoder has further outputs; EfficientNet has another word for its size; MiT's blocks are layers."""
    import keras_hub

    models, shape = keras_hub.models, (SIDE, SIDE, 3)
    heads = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
    converter = keras_hub.layers.ImageConverter(image_size=shape[:2], scale=SCALE, offset=OFFSET)
    images = reference_images(SIDE, SIDE, 3)
    for network, pool, boundary in (
        (models.DeiTBackbone(image_shape=shape, patch_size=8, **heads), lambda tokens: tokens[:, 0], None),
        (efficientnet(), lambda maps: maps.mean(axis=(1, 2)), None),
        (
            models.MiTBackbone([1, 2], 2, [1, 2], [2, 1], 0.0, [7, 3], [4, 2], image_shape=shape, hidden_dims=[16, 32]),
            lambda maps: maps.mean(axis=(1, 2)), "hierarchical_encoder_1_0",
        ),
    ):  # fmt: skip
        folder = tmp_path / type(network).__name__
        network.save_to_preset(str(folder))
        converter.save_to_preset(str(folder))
        found = resolve_network(NetworkOptions(f"preset:{folder}", engine="keras"))
        expected = pool(np.asarray(network(converter(images), training=False)))
        assert relative_difference(features(found, images), expected) < 1e-5, folder.name
        assert found.description.boundary == boundary, folder.name


@pytest.mark.slow
@needs_hub
@pytest.mark.parametrize("size", [(37, 50), (50, 37), (20, 61)])
def test_pixels_are_those_of_the_converter(size: tuple[int, int]) -> None:
    """KerasHub keeps fractions of grey levels; files have none. Bicubic ones are also held to 0-255."""
    import keras_hub

    image = reference_images(*size, 1)[0]
    for more, rule in (
        ({}, {"resize": "keras", "fit": "crop"}),
        ({"antialias": True, "crop_to_aspect_ratio": False}, {"resize": "antialias"}),
        ({"antialias": True, "interpolation": "bicubic"}, {"resize": "bicubic", "fit": "crop"}),
    ):
        theirs = np.asarray(keras_hub.layers.ImageConverter(image_size=(SIDE, SIDE), **more)(image.astype(np.float32)))
        ours = resize_image(Image.fromarray(image), PixelRule(SIDE, SIDE, **rule))
        assert np.abs(np.clip(theirs, 0, 255) - ours).max() < 1.5, more


@pytest.mark.slow
@needs_hub
def test_shapes_are_those_of_a_forward_pass_where_a_layer_announces_others(made: dict[str, Made]) -> None:
    """The embedding of KerasHub's SigLIP announces one token too many."""
    of = made["siglip"]
    assert of.network.get_layer("siglip_embedding").output.shape == (None, 10, 16)
    names = ("siglip_embedding", "siglip_post_layer_norm")
    network = resolve_network(NetworkOptions(f"preset:{of.preset}", layers=names, pooling="tokens", engine="keras"))
    assert [network.description.layers[name] for name in names] == [(9, 16), (9, 16)]
    assert network.description.boundary == "siglip_encoder_block_0"
    images = reference_images(SIDE, SIDE, 4)
    found = network.engine(network.recipes, batch_size=4)(images)
    tokens = np.asarray(of.network.get_layer("siglip_embedding")(of.converter(images)))
    assert tokens.shape == (4, 9, 16)
    assert relative_difference(found["siglip_embedding.tokens"], tokens.mean(axis=1)) < 1e-5
    (first,) = resolve_network(
        NetworkOptions(f"preset:{of.preset}", layers=names[:1], pooling="cls", prefix_tokens=1)
    ).recipes
    model = network.load()
    from features.networks.backbones import feature_model

    one = feature_model(model, [(first.layer, "cls", None)])(of.converter(images), training=False)
    assert relative_difference(np.asarray(one[0] if isinstance(one, list) else one), tokens[:, 0]) < 1e-5


def predicted(run: Path, pictures: Path, store: Any, folder: Path) -> np.ndarray:
    """Probabilities of all images of a store, by ``predict``."""
    from pipeline.stages.predict import predict

    predict(run, [str(pictures / path) for path in store.images.paths], out=folder / "out.csv")
    rows = list(csv.DictReader((folder / "out.csv").read_text().splitlines()))
    (folder / "out.csv").unlink()
    return np.array([[float(row[name]) for name in ("brick", "leaf")] for row in rows])


@pytest.mark.slow
@needs_hub
@pytest.mark.stress  # all four of them there; here one without and one with a last block
@pytest.mark.parametrize("name", HOW if STRESS else ("vit", "siglip"))
def test_from_extraction_to_a_fine_tuned_network(
    made: dict[str, Made], pictures: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.heads.kinds import head_of
    from pipeline.runs.folder import Run
    from pipeline.stages.finetune import finetune
    from pipeline.stages.train_head import train_head
    from pipeline.tuning.endtoend import network_of

    of = made[name]
    engine = "keras"
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    store = extract_features(pictures, tmp_path / "f.h5", backbone=f"preset:{of.preset}", engine=engine, batch_size=16)
    ((feature_set, _),) = store.recipes.items()
    expected = POOLED[name](of.forward(pixels_of(pictures, store)))
    assert relative_difference(store.array(feature_set)[:, 0], expected) < 1e-5

    run = train_head(store, "logistic", runs=tmp_path / "runs").folder
    live = head_of(Run.open(run)).predict_proba(expected)
    np.testing.assert_allclose(predicted(run, pictures, store, tmp_path), live, atol=1e-4)

    options = {"epochs": 1, "batch_size": 16, "augment": "none"}
    if name in ("vit", "dinov2"):
        with pytest.raises(
            ConfigurationError, match=r"unfreeze: .* all blocks of its transformer are in one layer, .*--unfreeze all"
        ):
            finetune(run, pictures, **options)
        options["unfreeze"] = "all"
    report = finetune(run, pictures, **options)
    assert report["trainable_parameters"] > 2000  # more than the head
    tuned = Run.open(report["run"])
    assert tuned.recipe.normalisation == store.recipes[feature_set].normalisation
    if name != "resnet18":  # whose first epoch makes it worse, so its start is kept
        assert tuned.recipe.weights != store.recipes[feature_set].weights
    network = network_of(tuned)  # found again from the file of the run, with its preprocessing
    own = features(dataclasses.replace(network, engine_name="keras"), pixels_of(pictures, store))
    np.testing.assert_allclose(
        predicted(tuned.folder, pictures, store, tmp_path), head_of(tuned).predict_proba(own), atol=1e-4
    )


SAVED = [(name, suffix) for name in HOW for suffix in ("keras", "onnx")]


@pytest.mark.slow
@needs_hub
@pytest.mark.stress  # all of them there
@pytest.mark.parametrize(("name", "suffix"), SAVED if STRESS else [("vit", "keras"), ("siglip", "onnx")])
def test_a_preset_is_exported_with_its_head(
    made: dict[str, Made], pictures: Path, name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of ViT cannot be saved by itself, its GELU has an operation that ONNX has not; SigLIP announces wrong shapes."""
    from pipeline.stages.export import export
    from pipeline.stages.train_head import train_head

    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    options = {"engine": "keras", "batch_size": 16, "pooling": "cls+tokens" if HOW[name] == "cls" else None}
    folder = shutil.copytree(made[name].preset, tmp_path / "there" / "net")
    store = extract_features(pictures, tmp_path / "f.h5", backbone=f"preset:{folder}", **options)
    run = train_head(store, "logistic", runs=tmp_path / "runs", params={"C": 3e-3}).folder
    folder.rename(tmp_path / "net")  # it is found beside the runs
    expected = predicted(run, pictures, store, tmp_path)
    assert np.ptp(expected[:, 0]) > 1e-3
    document = export(run, format=suffix, out=tmp_path / f"model.{suffix}")
    assert document["parity_gap"] <= 1e-4
    np.testing.assert_allclose(predicted(tmp_path / f"model.{suffix}", pictures, store, tmp_path), expected, atol=1e-5)


@pytest.mark.slow
@needs_hub
def test_neither_tensorflow_text_nor_kaggle_nor_a_network_is_needed(made: dict[str, Made]) -> None:
    code = """
import socket, sys
for name in ("tensorflow_text", "kagglehub", "kagglesdk"):
    sys.modules[name] = None
def refused(*arguments):
    raise AssertionError("reached for the network")
socket.socket.connect = refused
from features.networks.network import resolve_network
from features.recipe import NetworkOptions
print(resolve_network(NetworkOptions(sys.argv[1])).recipes[0].pooling)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"preset:{made['vit'].preset}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cls\n"
