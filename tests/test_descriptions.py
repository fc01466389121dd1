"""How images are prepared is read from the published files, value by value; what is not done is refused by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from features.errors import ConfigurationError
from features.networks.descriptions import card_license, find_image_input, missing_description, read_preprocess
from features.networks.imageinput import ImageInput

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
FACTOR = 0.00392156862745098  # as transformers writes 1/255

DINOV2 = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": FACTOR,
    "size": {"shortest_edge": 256},
}
DINOV2_MODEL = {
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "image_size": 518,
    "model_type": "dinov2",
    "num_channels": 3,
    "patch_size": 14,
}
CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
CONVNEXT = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}
SIGLIP = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": FACTOR,
    "size": {"height": 224, "width": 224},
}
VIT = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": 224,
}
TIMM_DINOV2 = {
    "architecture": "vit_small_patch14_reg4_dinov2",
    "num_classes": 0,
    "num_features": 384,
    "global_pool": "token",
    "pretrained_cfg": {
        "tag": "lvd142m",
        "custom_load": False,
        "input_size": [3, 518, 518],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    },
}
TIMM_MOBILENET = {
    "architecture": "mobilenetv3_small_100",
    "num_classes": 1000,
    "num_features": 1024,
    "pretrained_cfg": {
        "tag": "lamb_in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 1000,
        "pool_size": [7, 7],
        "first_conv": "conv_stem",
        "classifier": "classifier",
    },
}
LAION = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}
OWN = {
    "format": "bottleneck-preprocess 1",
    "size": [224, 192],
    "resize": "antialias",
    "fit": "crop:256",
    "scale": 1,
    "mean": [103.939, 116.779, 123.68],
    "std": [1, 1, 1],
    "channels": "bgr",
    "prefix_tokens": 5,
}
PREPROCESSOR, CONFIG, OPEN_CLIP = "preprocessor_config.json", "config.json", "open_clip_config.json"
PROCESSOR = "processor_config.json"
NAMES = {"preprocessor": PREPROCESSOR, "processor": PROCESSOR, "config": CONFIG, "open_clip": OPEN_CLIP}


def folder_of(tmp_path: Path, **files: Any) -> Path:
    for name, values in files.items():
        (tmp_path / NAMES[name]).write_text(json.dumps(values))
    return tmp_path


def expected(fit: str, resize: str, mean: tuple[float, ...], std: tuple[float, ...], **others: Any) -> dict[str, Any]:
    values = {"height": 224, "width": 224, "fit": fit, "resize": resize, "mean": mean, "std": std, "channels": "rgb"}
    return {**values, "scale": FACTOR, "prefix_tokens": None, "patch": None, "license": None, **others}


DINOV3 = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "disable_grouping": None,
    "do_center_crop": None,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "resample": 2,
    "rescale_factor": FACTOR,
    "return_tensors": None,
    "size": {"height": 224, "width": 224},
}
MOBILECLIP = {
    "crop_size": {"height": 256, "width": 256},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_processor_type": "CLIPFeatureExtractor",
    "resample": 2,
    "rescale_factor": FACTOR,
    "size": {"shortest_edge": 256},
}
NONE, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
DEIT = {
    **VIT,
    "feature_extractor_type": "DeiTFeatureExtractor",
    "crop_size": 224,
    "do_center_crop": True,
    "resample": 3,
    "size": 256,
}
SIGLIP2 = {**SIGLIP, "do_convert_rgb": None, "image_processor_type": "SiglipImageProcessorFast", "resample": 2}
TIMM_EVA = {
    "architecture": "eva02_small_patch14_224",
    "num_classes": 0,
    "num_features": 384,
    "global_pool": "avg",
    "pretrained_cfg": {
        "tag": "mim_in22k", "custom_load": False, "input_size": [3, 224, 224], "fixed_input_size": True,
        "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center", "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711], "num_classes": 0, "license": "mit", "first_conv": "patch_embed.proj",
    },
}  # fmt: skip

PUBLISHED = {
    "facebook/dinov3-vits16-pretrain-lvd1689m": (
        {"preprocessor": DINOV3, "config": {"model_type": "dinov3_vit", "num_register_tokens": 4, "patch_size": 16}},
        expected("stretch", "antialias", MEAN, STD, prefix_tokens=5, patch=16),
    ),
    "Xenova/mobileclip_s0": (
        {"preprocessor": MOBILECLIP},
        expected("crop:256", "antialias", NONE, ONE, height=256, width=256),
    ),
    "openai/clip-vit-base-patch32": (
        {
            "preprocessor": CLIP,
            "config": {"model_type": "clip", "vision_config": {"patch_size": 32, "image_size": 224}},
        },
        expected("crop:224", "bicubic", CLIP_MEAN, CLIP_STD, prefix_tokens=1, patch=32),
    ),
    "microsoft/beit-base-patch16-224": (
        {
            "preprocessor": {
                **VIT,
                "feature_extractor_type": "BeitFeatureExtractor",
                "crop_size": 224,
                "do_center_crop": False,
                "resample": 2,
            },
            "config": {"model_type": "beit", "patch_size": 16, "image_size": 224},
        },
        expected("stretch", "antialias", HALF, HALF, prefix_tokens=1, patch=16),
    ),
    "microsoft/swin-tiny-patch4-window7-224": (
        {
            "preprocessor": {**CONVNEXT, "crop_pct": None, "feature_extractor_type": "ViTFeatureExtractor"},
            "config": {"model_type": "swin", "patch_size": 4, "window_size": 7, "image_size": 224},
        },
        expected("stretch", "bicubic", MEAN, STD),
    ),
    "apple/mobilevit-small": (
        {
            "preprocessor": {
                "crop_size": {"height": 256, "width": 256},
                "do_center_crop": True,
                "do_flip_channel_order": True,
                "do_rescale": True,
                "do_resize": True,
                "image_processor_type": "MobileViTImageProcessor",
                "resample": 2,
                "rescale_factor": FACTOR,
                "size": {"shortest_edge": 288},
            },
            "config": {"model_type": "mobilevit", "patch_size": 2, "image_size": 256},
        },
        expected("crop:288", "antialias", NONE, ONE, height=256, width=256, channels="bgr"),
    ),
    "google/mobilenet_v2_1.0_224": (
        {
            "preprocessor": {
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": [0.5, 0.5, 0.5],
                "image_processor_type": "MobileNetV2ImageProcessor",
                "image_std": [0.5, 0.5, 0.5],
                "resample": 2,
                "rescale_factor": FACTOR,
                "size": {"shortest_edge": 256},
            },
            "config": {"model_type": "mobilenet_v2", "image_size": 224},
        },
        expected("crop:256", "antialias", HALF, HALF),
    ),
    "facebook/regnet-y-040": (
        {"preprocessor": CONVNEXT, "config": {"model_type": "regnet", "num_channels": 3}},
        expected("crop:256", "bicubic", MEAN, STD),
    ),
    "facebook/vit-mae-base": (
        {
            "preprocessor": {
                **CONVNEXT,
                "crop_pct": None,
                "feature_extractor_type": "ViTFeatureExtractor",
                "resample": 2,
            },
            "config": {"model_type": "vit_mae", "patch_size": 16, "image_size": 224},
        },
        expected("stretch", "antialias", MEAN, STD),
    ),
    "google/siglip2-base-patch16-224": (
        {"preprocessor": SIGLIP2, "config": {"model_type": "siglip", "vision_config": {"patch_size": 16}}},
        expected("stretch", "antialias", HALF, HALF, prefix_tokens=0, patch=16),
    ),
    "openai/clip-vit-base-patch32, of transformers 5": (
        {
            "processor": {
                "image_processor": {**CLIP, "image_processor_type": "CLIPImageProcessorFast"},
                "processor_class": "CLIPProcessor",
            },
            "config": {"model_type": "clip", "vision_config": {"patch_size": 32}},
        },
        expected("crop:224", "bicubic", CLIP_MEAN, CLIP_STD, prefix_tokens=1, patch=32),
    ),
    "timm/eva02_small_patch14_224.mim_in22k": (
        {"config": TIMM_EVA},
        expected("crop:248", "bicubic", CLIP_MEAN, CLIP_STD, patch=14, license="mit"),
    ),
    "timm/mobilenetv3_small_100.lamb_in1k, by transformers": (
        {
            "preprocessor": {
                "image_processor_type": "TimmWrapperImageProcessor",
                "pretrained_cfg": TIMM_MOBILENET["pretrained_cfg"],
            },
            "config": {**TIMM_MOBILENET, "model_type": "timm_wrapper"},
        },
        expected("crop:256", "bicubic", MEAN, STD),
    ),
    "timm/ViT-B-16-SigLIP": (
        {
            "open_clip": {
                "model_cfg": {
                    "embed_dim": 768,
                    "init_logit_bias": -10,
                    "custom_text": True,
                    "vision_cfg": {
                        "image_size": 224,
                        "timm_model_name": "vit_base_patch16_siglip_224",
                        "timm_model_pretrained": False,
                        "timm_pool": "map",
                        "timm_proj": "none",
                    },
                },
                "preprocess_cfg": {
                    "mean": [0.5, 0.5, 0.5],
                    "std": [0.5, 0.5, 0.5],
                    "interpolation": "bicubic",
                    "resize_mode": "squash",
                },
            },
        },
        expected("stretch", "bicubic", HALF, HALF, prefix_tokens=0, patch=16),
    ),
    "apple/MobileCLIP-S1-OpenCLIP": (
        {
            "open_clip": {
                "model_cfg": {
                    "embed_dim": 512,
                    "vision_cfg": {
                        "timm_model_name": "fastvit_mci1",
                        "timm_model_pretrained": False,
                        "timm_pool": "avg",
                        "timm_proj": None,
                        "timm_drop": 0.0,
                        "timm_drop_path": 0.0,
                        "image_size": 256,
                    },
                },
                "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"},
            },
        },
        expected("crop:256", "antialias", NONE, ONE, height=256, width=256),
    ),
    "facebook/dinov2-small": (
        {"preprocessor": DINOV2, "config": DINOV2_MODEL},
        expected("crop:256", "bicubic", MEAN, STD, prefix_tokens=1, patch=14),
    ),
    "facebook/dinov2-with-registers-small": (
        {
            "preprocessor": DINOV2,
            "config": {**DINOV2_MODEL, "model_type": "dinov2_with_registers", "num_register_tokens": 4},
        },
        expected("crop:256", "bicubic", MEAN, STD, prefix_tokens=5, patch=14),
    ),
    "google/siglip-base-patch16-224": (
        {
            "preprocessor": SIGLIP,
            "config": {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}},
        },
        expected("stretch", "bicubic", HALF, HALF, prefix_tokens=0),
    ),
    "google/vit-base-patch16-224": (
        {"preprocessor": VIT, "config": {"model_type": "vit", "patch_size": 16, "image_size": 224}},
        expected("stretch", "antialias", HALF, HALF, prefix_tokens=1, patch=16),
    ),
    "facebook/convnext-tiny-224": (
        {"preprocessor": CONVNEXT, "config": {"model_type": "convnext", "patch_size": 4}},
        expected("crop:256", "bicubic", MEAN, STD),  # it has patches, and no tokens
    ),
    "microsoft/resnet-50": (
        {"preprocessor": CONVNEXT, "config": {"model_type": "resnet", "num_channels": 3}},
        expected("crop:256", "bicubic", MEAN, STD),
    ),
    "timm/vit_small_patch14_reg4_dinov2.lvd142m": (
        {"config": TIMM_DINOV2},
        expected(
            "crop:518", "bicubic", MEAN, STD, height=518, width=518, prefix_tokens=5, patch=14, license="apache-2.0"
        ),
    ),
    "timm/mobilenetv3_small_100.lamb_in1k": ({"config": TIMM_MOBILENET}, expected("crop:256", "bicubic", MEAN, STD)),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": (
        {"open_clip": LAION},
        expected("crop:224", "bicubic", CLIP_MEAN, CLIP_STD, prefix_tokens=1, patch=32),
    ),
}


def said(found: ImageInput, like: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(found, name) for name in like}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_read_value_by_value(name: str, tmp_path: Path) -> None:
    files, values = PUBLISHED[name]
    found = find_image_input(folder_of(tmp_path, **files))
    assert said(found, values) == {**values, "scale": pytest.approx(1 / 255, rel=1e-12)}
    order = ["preprocessor", "processor", "config", "open_clip"]["by transformers" in name and 2 :]
    assert found.source == tmp_path / NAMES[next(kind for kind in order if kind in files)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"preprocessor": DEIT, "config": {"model_type": "deit", "patch_size": 16}},
            r"'crop_size' is 224, expected the size \(256, 256\): an image that was stretched is not cropped here\. Say it in a "
            r'file of your own with --preprocess FILE\.json\. Nearest is "fit": "crop:256", which keeps the proportions of the image\.$',
        ),
        (
            {
                "preprocessor": {
                    **VIT, "crop_size": {"height": 289, "width": 289}, "do_center_crop": False, "include_top": True, "resample": 0,
                    "image_processor_type": "EfficientNetImageProcessor", "rescale_offset": False,
                },
            },
            r"'include_top' is True, which may change pixels and is not done here\. .*--preprocess FILE\.json",
        ),
        (
            {"preprocessor": {**SIGLIP, "image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256, "patch_size": 16}},
            "'Siglip2ImageProcessor', which is not known here",
        ),
        ({"processor": {"processor_class": "CLIPProcessor"}}, "nothing says how images are prepared"),
        ({"preprocessor": {"image_processor_type": "TimmWrapperImageProcessor"}}, "nothing says how images are prepared"),
    ],
)  # fmt: skip
def test_what_is_published_and_not_done_is_refused_with_the_way(
    files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        find_image_input(folder_of(tmp_path, **files))
    assert len(str(caught.value)) <= 1000


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"size": {"shortest_edge": 384}}, {"fit": "stretch", "height": 384, "width": 384}),
        ({"size": {"shortest_edge": 288}, "crop_pct": 0.95}, {"fit": "crop:303", "height": 288}),  # int(288 / 0.95)
        ({"resample": 2}, {"resize": "antialias"}),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "scale": 1 / 255}),
        ({"do_rescale": False}, {"scale": 1.0, "mean": MEAN}),
        ({"rescale_factor": 0.5}, {"scale": 0.5}),
        (
            {"image_processor_type": "ConvNextImageProcessorFast", "feature_extractor_type": "Other"},
            {"fit": "crop:256"},
        ),
        ({"device": None, "do_pad": False, "do_reduce_labels": True}, {"fit": "crop:256"}),
    ],
)
def test_every_key_that_is_read_has_its_effect(change: dict[str, Any], values: dict[str, Any], tmp_path: Path) -> None:
    found = find_image_input(folder_of(tmp_path, preprocessor={**CONVNEXT, **change}))
    assert said(found, values) == values


@pytest.mark.parametrize(
    ("values", "channels", "fit"),
    [
        (
            {
                "image_processor_type": "MobileViTImageProcessor",
                "size": {"shortest_edge": 288},
                "crop_size": {"height": 256, "width": 256},
            },
            "bgr",
            "crop:288",
        ),
        ({"image_processor_type": "BeitImageProcessor", "size": 224, "do_center_crop": False}, "rgb", "stretch"),
        ({"image_processor_type": "DeiTImageProcessor", "size": 224}, "rgb", "stretch"),
        (
            {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": {"height": 8, "width": 9}},
            "rgb",
            "stretch",
        ),
        (
            {**DINOV2, "image_processor_type": None, "feature_extractor_type": "ImageFeatureExtractor"},
            "rgb",
            "crop:256",
        ),
    ],
)
def test_other_image_processors(values: dict[str, Any], channels: str, fit: str, tmp_path: Path) -> None:
    found = find_image_input(folder_of(tmp_path, preprocessor=values))
    assert (found.channels, found.fit) == (channels, fit)
    if channels == "bgr":
        assert (found.height, found.mean, found.std) == (256, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        ({"model_type": "deit"}, 2),
        ({"model_type": "dinov2", "num_register_tokens": 4}, 5),
        ({"model_type": "dinov2_with_registers"}, None),
        ({"model_type": "dinov3_vit", "num_register_tokens": 4}, 5),
        ({"model_type": "clip_vision_model"}, 1),
        ({"model_type": "siglip_vision_model"}, 0),
        ({"model_type": "beit"}, 1),
        ({"model_type": "swin"}, None),
        ({"model_type": "mobilenet_v2"}, None),
        ({"model_type": "something"}, None),
        ({}, None),
    ],
)
def test_tokens_before_the_patches_by_the_type_of_the_model(
    model: dict[str, Any], prefix: int | None, tmp_path: Path
) -> None:
    assert find_image_input(folder_of(tmp_path, preprocessor=DINOV2, config=model)).prefix_tokens == prefix


@pytest.mark.parametrize(
    ("change", "prefix"),
    [
        ({"architecture": "vit_medium_patch16_reg4_gap_256", "global_pool": "avg"}, 4),
        ({"architecture": "vit_base_patch16_siglip_224", "global_pool": "map"}, 0),
        ({"architecture": "vit_base_patch16_224"}, 1),
        ({"architecture": "deit_base_distilled_patch16_224"}, 2),
        ({"architecture": "vit_base_patch16_224", "model_args": {"class_token": False}}, 0),
        ({"architecture": "vit_base_patch16_224", "model_args": {"reg_tokens": 2}}, 3),
        ({"architecture": "vit_base_patch16_224", "global_pool": "avg"}, None),
        ({"architecture": "swin_tiny_patch4_window7_224", "global_pool": "avg"}, None),
    ],
)
def test_tokens_before_the_patches_by_the_name_in_timm(
    change: dict[str, Any], prefix: int | None, tmp_path: Path
) -> None:
    assert find_image_input(folder_of(tmp_path, config={**TIMM_DINOV2, **change})).prefix_tokens == prefix


def test_timm_squash_and_its_flat_form_in_exports(tmp_path: Path) -> None:
    flat = {**TIMM_MOBILENET["pretrained_cfg"], "architecture": "mobilenetv3_small_100", "crop_mode": "squash"}  # type: ignore[dict-item]
    found = find_image_input(folder_of(tmp_path, config={**flat, "crop_pct": 1.0, "interpolation": "bilinear"}))
    assert (found.fit, found.resize, found.height) == ("stretch", "antialias", 224)


@pytest.mark.parametrize(
    ("change", "fit", "resize"),
    [
        ({"interpolation": "bilinear", "resize_mode": "squash"}, "stretch", "antialias"),
        ({"size": 256}, "crop:256", "bicubic"),
        ({"size": [192, 256], "resize_mode": "squash"}, "stretch", "bicubic"),
    ],
)
def test_open_clip_says_how_it_resizes(change: dict[str, Any], fit: str, resize: str, tmp_path: Path) -> None:
    values = {**LAION, "preprocess_cfg": {**LAION["preprocess_cfg"], **change}}
    found = find_image_input(folder_of(tmp_path, open_clip=values))
    assert (found.fit, found.resize) == (fit, resize)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 1}, r"'resample' is 1 \(lanczos\), expected 2 \(bilinear\) or 3 \(bicubic\)"),
        ({"resample": 0}, r"'resample' is 0 \(nearest\)"),
        ({"resample": "3"}, r"'resample' is '3' \(no number\)"),
        ({"rescale_offset": True}, r"'rescale_offset' is True, which may change pixels and is not done here"),
        ({"do_pad": True}, r"'do_pad' is True, which may change pixels"),
        ({"do_color_quantize": True}, "'do_color_quantize'"),
        ({"do_flip_channel_order": True}, "'do_flip_channel_order'"),
        ({"crop_pct": 0.9}, "'crop_pct'"),
        ({"auto_map": {"AutoImageProcessor": "x--y"}}, r"code of its own \(auto_map\)"),
        ({"image_processor_type": "LevitImageProcessor"}, "'LevitImageProcessor', which is not known here"),
        ({"image_processor_type": 5}, "'5', which is not known here"),
        ({"do_resize": False}, "'do_resize' is False, expected true"),
        ({"do_resize": 1}, "'do_resize' is 1, expected true or false"),
        ({"do_center_crop": False}, "by its shortest edge alone, images differ in size"),
        ({"size": {"shortest_edge": 200}}, "shortest edge has 200 pixels are cropped to 224x224"),
        ({"size": {"height": 256, "width": 256}}, "an image that was stretched is not cropped here"),
        ({"size": {"longest_edge": 256}}, "expected a number"),
        ({"size": {"shortest_edge": 224, "longest_edge": 224}}, "expected a number"),
        ({"size": {"shortest_edge": 5000}}, "1 to 4096 pixels"),
        ({"size": {"shortest_edge": True}}, "1 to 4096 pixels"),
        ({"crop_size": 0}, "1 to 4096 pixels"),
        ({"crop_size": 224.5}, "expected a number"),
        ({"image_mean": [0.5]}, "'image_mean' is .*, expected three numbers"),
        ({"image_mean": [0.5, 0.5, True]}, "expected three numbers"),
        ({"image_mean": [0.5, 0.5, 10**400]}, "expected three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "'image_std' is .*, expected three numbers above 0"),
        ({"rescale_factor": -1}, "'rescale_factor' is -1, expected a number above 0"),
        ({"sampling_rate": 16000}, r"describes audio \(its key 'sampling_rate'\), expected still images"),
        ({"num_frames": 16}, r"describes video \(its key 'num_frames'\)"),
        ({"image_processor_type": "VideoMAEImageProcessor"}, "describes video .its image_processor_type is 'VideoMAE"),
        ({"feature_extractor_type": "VivitFeatureExtractor"}, "describes video"),
        ({"tokenizer_class": "CLIPTokenizer"}, r"describes text \(its key 'tokenizer_class'\)"),
    ],
)
def test_what_is_not_done_or_not_right_is_refused_by_its_key(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        find_image_input(folder_of(tmp_path, preprocessor={**DINOV2, **change}))
    assert str(tmp_path / PREPROCESSOR) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "border"}, "'crop_mode' is 'border', expected one of center, squash"),
        (
            {"crop_mode": "squash", "crop_pct": 0.9},
            r"'crop_pct' is 0.9, expected 1 where crop_mode is squash.*crop:575",
        ),
        ({"interpolation": "nearest"}, "'interpolation' is 'nearest'"),
        ({"input_size": [1, 28, 28]}, r"'input_size' is \[1, 28, 28\], expected \[3, height, width\]"),
        ({"input_size": [3, 224, 192]}, "a square where crop_mode is center"),
        ({"crop_pct": 0}, "'crop_pct' is 0, expected a number above 0"),
        ({"crop_pct": 1e-300}, "expected an edge of 518 to 4096"),
        ({"std": None}, "does not say 'std'"),
        ({"mean": "imagenet"}, "'mean' is 'imagenet', expected three numbers"),
    ],
)
def test_timm_that_is_not_done_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {**TIMM_DINOV2, "pretrained_cfg": {**TIMM_DINOV2["pretrained_cfg"], **change}}  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match=message):
        find_image_input(folder_of(tmp_path, config=values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_mode": "longest"}, "'resize_mode' is 'longest', expected one of shortest, squash"),
        ({"mode": "L"}, "'mode' is 'L', expected one of RGB"),
        ({"interpolation": "random"}, "'interpolation' is 'random'"),
        ({"size": [224, 192]}, "a square where resize_mode is shortest"),
    ],
)
def test_open_clip_that_is_not_done_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {**LAION, "preprocess_cfg": {**LAION["preprocess_cfg"], **change}}
    with pytest.raises(ConfigurationError, match=message):
        find_image_input(folder_of(tmp_path, open_clip=values))


def test_several_descriptions_that_agree_complete_each_other(tmp_path: Path) -> None:
    rounded = {**CLIP, "image_mean": [0.4815, 0.4578, 0.4082]}
    assert find_image_input(folder_of(tmp_path, preprocessor=rounded, open_clip=LAION)).mean == (0.4815, 0.4578, 0.4082)
    found = find_image_input(folder_of(tmp_path, preprocessor=CLIP, open_clip=LAION))
    assert (found.source.name, found.prefix_tokens, found.patch) == (PREPROCESSOR, 1, 32)


def test_descriptions_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    values = {**LAION, "preprocess_cfg": {"resize_mode": "squash", "mean": [0.5, 0.5, 0.5]}}
    with pytest.raises(ConfigurationError) as caught:
        find_image_input(folder_of(tmp_path, preprocessor=CLIP, open_clip=values))
    assert str(caught.value) == (
        f"{tmp_path / PREPROCESSOR} and {OPEN_CLIP} beside it contradict each other: fit crop:224 and stretch; mean "
        "(0.48145466, 0.4578275, 0.40821073) and (0.5, 0.5, 0.5). Remove the one that does not belong to this network, or say it in a file of your own with --preprocess FILE.json."
    )


def test_a_folder_called_onnx_has_its_description_around_it(tmp_path: Path) -> None:
    folder_of(tmp_path, preprocessor=DINOV2)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "other").mkdir()
    assert find_image_input(tmp_path / "onnx").fit == "crop:256"
    with pytest.raises(ConfigurationError, match="nothing says how images are prepared"):
        find_image_input(tmp_path / "other")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\ntags:\n- dino\nlicense: apache-2.0\nlanguage: en\n---\n# DINOv2\nlicense: mine\n", "apache-2.0"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("---\nlicense:\n- cc-by-4.0\n- mit\ntags:\n- x\n---\n", "cc-by-4.0, mit"),
        ("---\nlicense: [mit, bsd]\n---\n", "mit, bsd"),
        ("---\nlicense: other\nlicense_name: dinov3-license\n---\n", "other (dinov3-license)"),
        ("---\nlicense: other\n", None),
        ("license: mit\n", None),
        ("---\ntags: x\n---\n", None),
        ("\u001b[31m", None),
        (f"---\nlicense: {'x' * (1 << 20)}\n---\n", None),
    ],
)
def test_the_licence_that_a_model_card_names(card: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    assert card_license(tmp_path / "onnx") is None
    (tmp_path / "README.md").write_bytes(card.encode())
    assert card_license(tmp_path / "onnx") == card_license(tmp_path) == licence


def test_the_message_for_a_missing_description_can_be_pasted(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_image_input(tmp_path)
    message = str(caught.value)
    assert message == missing_description(tmp_path)
    assert len(message) <= 1000
    assert "--preprocess FILE.json" in message
    (tmp_path / "mine.json").write_text(message.splitlines()[-1])
    found = read_preprocess(tmp_path / "mine.json")
    assert said(found, like := expected("crop:256", "bicubic", MEAN, STD, scale=1 / 255, prefix_tokens=1)) == like


def test_the_projects_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(OWN))
    assert read_preprocess(path) == ImageInput(
        height=224,
        width=192,
        resize="antialias",
        fit="crop:256",
        scale=1.0,
        mean=(103.939, 116.779, 123.68),
        std=(1.0, 1.0, 1.0),
        channels="bgr",
        source=path,
        prefix_tokens=5,
    )
    path.write_text(json.dumps({key: value for key, value in OWN.items() if key not in ("channels", "prefix_tokens")}))
    found = read_preprocess(path)
    assert (found.channels, found.prefix_tokens) == ("rgb", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "bottleneck-preprocess 2"},
            "'format' is 'bottleneck-preprocess 2', expected 'bottleneck-preprocess 1'",
        ),
        ({"means": [1, 2, 3]}, "unknown key 'means'; did you mean 'mean'"),
        ({"scale": None}, "does not say 'scale'"),
        ({"scale": 0}, "'scale' is 0, expected a number above 0"),
        ({"resize": "lanczos"}, "'resize' is 'lanczos', expected one of antialias, bicubic, keras"),
        (
            {"fit": "crop:200"},
            "'fit' is 'crop:200', expected stretch, crop, pad or crop:EDGE with an EDGE of 224 to 4096",
        ),
        ({"fit": "crop:5000"}, "'fit' is 'crop:5000'"),
        ({"fit": ["crop"]}, "expected stretch"),
        ({"size": [0, 224]}, "expected height and width of 1 to 4096 pixels"),
        ({"channels": "rgba"}, "'channels' is 'rgba', expected one of rgb, bgr"),
        ({"prefix_tokens": -1}, "'prefix_tokens' is -1, expected a whole number from 0 to 64"),
        ({"prefix_tokens": 1.0}, "expected a whole number"),
    ],
)
def test_the_projects_own_file_is_checked(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**OWN, **change}))
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_preprocess(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[1]", r"received \[1\], expected an object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"size": NaN}', "NaN is no number of JSON"),
        (
            '{"format": "bottleneck-preprocess 1", "size": [1, 1], "fit": "crop", "resize": "keras", "scale": 1e999}',
            "'scale' is inf",
        ),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "cannot be read as JSON"),
        (" " * ((16 << 20) + 1), "larger than 16,777,216 bytes"),
    ],
)
def test_hostile_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, "latin-1")
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_preprocess(path)
    assert len(str(caught.value)) <= 1000


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_preprocess(tmp_path / "missing.json")
    (tmp_path / PREPROCESSOR).mkdir()
    with pytest.raises(ConfigurationError, match="cannot be read as JSON"):
        find_image_input(tmp_path)
