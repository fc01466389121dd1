"""Read the ``preprocessor_config.json`` of transformers, with the ``config.json`` of the network beside it.

Networks of images and texts may have the same in ``processor_config.json``, under the key ``image_processor``. What the files leave out has the default of the class of transformers 4 that they name; so every class is known by name
here, or refused. A key that may change pixels and is not done here is refused too.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, brief, nearest
from features.networks.imageinput import (
    CLIP,
    HALF,
    IMAGENET,
    WAY,
    Fields,
    ImageInput,
    Statistics,
    crop_rule,
    read_json,
)
from features.recipe import LARGEST_SIDE, MOST_PREFIX

_PILLOW_FILTERS = {2: "antialias", 3: "bicubic"}  # numbers of PIL.Image.Resampling
_REFUSED_FILTERS = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}
_OF_TIMM = "TimmWrapperImageProcessor"
_AUDIO, _VIDEO, _TEXT = "audio", "video", "text"
_OTHER_MODALITIES = {
    "sampling_rate": _AUDIO,
    "feature_size": _AUDIO,
    "n_fft": _AUDIO,
    "num_mel_bins": _AUDIO,
    "chunk_length": _AUDIO,
    "num_frames": _VIDEO,
    "do_sample_frames": _VIDEO,
    "video_processor_type": _VIDEO,
    "temporal_patch_size": _VIDEO,
    "tokenizer_class": _TEXT,
    "vocab_size": _TEXT,
}
# Keys of a preprocessor_config.json that are read here, or do not change pixels.
_READ = "do_resize size do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean image_std resample"
_HARMLESS = (
    "image_processor_type feature_extractor_type processor_class _valid_processor_keys do_convert_rgb do_reduce_labels "
    "default_to_square data_format input_data_format return_tensors device disable_grouping image_seq_length "
    "transformers_version _processor_class"
)
_KNOWN_KEYS = frozenset(f"{_READ} {_HARMLESS}".split())


@dataclasses.dataclass(frozen=True)
class _Processor:
    """The defaults of an image processor of transformers; a ``size`` that is a number is the shorter edge or a square."""

    size: int
    resample: int
    statistics: Statistics
    crop: int | None = None
    by_edge: bool = False
    flip: bool = False
    normalize: bool = True
    further: frozenset[str] = frozenset()


# By the name of the class without ImageProcessor, FeatureExtractor and Fast. "Image" is a class of transformers.js.
_PROCESSORS = {
    "Beit": _Processor(256, 3, HALF, crop=224),
    "Bit": _Processor(224, 3, CLIP, crop=224, by_edge=True),
    "CLIP": _Processor(224, 3, CLIP, crop=224, by_edge=True),
    "ConvNext": _Processor(384, 2, HALF, by_edge=True, further=frozenset({"crop_pct"})),
    "DINOv3ViT": _Processor(224, 2, IMAGENET),
    "DeiT": _Processor(256, 3, HALF, crop=224),
    "EfficientNet": _Processor(346, 0, HALF),
    "Image": _Processor(224, 3, IMAGENET, crop=224, by_edge=True),
    "MobileNetV1": _Processor(256, 2, HALF, crop=224, by_edge=True),
    "MobileNetV2": _Processor(256, 2, HALF, crop=224, by_edge=True),
    "MobileViT": _Processor(
        224, 2, HALF, crop=256, by_edge=True, flip=True, normalize=False, further=frozenset({"do_flip_channel_order"})
    ),
    "Siglip": _Processor(224, 3, HALF),
    "ViT": _Processor(224, 2, HALF),
}
# model_type of a config.json -> the image processor it has unless a file names one, and its tokens before the patches
# without registers; None if it has no such tokens.
_MODELS: dict[str, tuple[str, int | None]] = {
    "beit": ("Beit", 1),
    "clip": ("CLIP", 1),
    "clip_vision_model": ("CLIP", 1),
    "convnext": ("ConvNext", None),
    "convnextv2": ("ConvNext", None),
    "data2vec-vision": ("Beit", 1),
    "deit": ("DeiT", 2),  # those without the second token, which is for distillation, have the type vit
    "dinov2": ("Bit", 1),
    "dinov2_with_registers": ("Bit", 1),
    "dinov3_convnext": ("DINOv3ViT", None),
    "dinov3_vit": ("DINOv3ViT", 1),
    "ijepa": ("ViT", 0),
    "mobilenet_v1": ("MobileNetV1", None),
    "mobilenet_v2": ("MobileNetV2", None),
    "mobilevit": ("MobileViT", None),
    "regnet": ("ConvNext", None),
    "resnet": ("ConvNext", None),
    "siglip": ("Siglip", 0),
    "siglip2": ("Siglip", 0),
    "siglip_vision_model": ("Siglip", 0),
    "siglip2_vision_model": ("Siglip", 0),
    "swin": ("ViT", None),
    "swinv2": ("ViT", None),
    "vit": ("ViT", 1),
    "vit_msn": ("ViT", 1),
}
_REGISTERS_MUST_BE_SAID = ("dinov2_with_registers", "dinov3_vit")


def read_transformers(folder: Path) -> ImageInput | None:
    path = folder / "preprocessor_config.json"
    if path.exists():
        values = Fields(path, read_json(path))
    elif (path := folder / "processor_config.json").exists() and "image_processor" in (whole := read_json(path)):
        values = Fields(path, whole).inner("image_processor")
    else:
        return None
    if values.get("image_processor_type", None) == _OF_TIMM:
        return None  # the config.json beside it says it
    _check_modality(values)
    model = Fields(folder / "config.json", read_json(folder / "config.json") if _has_config(folder) else {})
    kind, processor = _processor(values, str(model.get("model_type", "")))
    _check_keys(values, kind, processor)
    height, width, fit = _geometry(values, kind, processor)
    mean, std = processor.statistics
    normalize = values.flag("do_normalize", processor.normalize)
    flip = "do_flip_channel_order" in processor.further and values.flag("do_flip_channel_order", processor.flip)
    prefix, patch = _tokens(model)
    return ImageInput(
        height=height,
        width=width,
        resize=_pillow_filter(values, processor),
        fit=fit,
        scale=values.number("rescale_factor", 1 / 255, least=0.0) if values.flag("do_rescale", True) else 1.0,
        mean=values.triple("image_mean", mean) if normalize else (0.0, 0.0, 0.0),
        std=values.triple("image_std", std, least=0.0) if normalize else (1.0, 1.0, 1.0),
        channels="bgr" if flip else "rgb",
        source=path,
        prefix_tokens=prefix,
        patch=patch,
    )


def _check_modality(values: Fields) -> None:
    found = [(_OTHER_MODALITIES[key], f"its key {key!r}") for key in values if key in _OTHER_MODALITIES]
    for key in ("image_processor_type", "feature_extractor_type"):
        kind = str(values.get(key, ""))
        if re.search(r"video|vivit", kind, re.IGNORECASE):
            found.append((_VIDEO, f"its {key} is {brief(kind, 80)!r}"))
    for modality, sign in found[:1]:
        raise ConfigurationError(
            f"{values.path} describes {modality} ({sign}), expected still images. Give a network of images."
        )


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _processor(values: Fields, model_type: str) -> tuple[str, _Processor]:
    """Find the image processor by its name, or by the type of the model where no name is given."""
    named_as = values.get("image_processor_type", None) or values.get("feature_extractor_type", None)
    if named_as is None:
        if model_type not in _MODELS:
            raise ConfigurationError(
                f"{values.path} names no image_processor_type, and config.json beside it no known model_type (received "
                f"{brief(model_type, 80)!r}). {WAY}"
            )
        kind = _MODELS[model_type][0]
    else:
        kind = re.sub(r"(ImageProcessor|FeatureExtractor)$", "", str(named_as).removesuffix("Fast"))
    if kind == "Image":
        _check_all_is_said(values)
    if kind not in _PROCESSORS or "auto_map" in values:
        what = "code of its own (auto_map)" if "auto_map" in values else f"{brief(str(named_as), 80)!r}"
        known = ", ".join(sorted(_PROCESSORS))
        raise ConfigurationError(
            f"{values.path}: images are prepared by {what}, which is not known here. Known are those of {known}. {WAY}"
        )
    return kind, _PROCESSORS[kind]


def _check_all_is_said(values: Fields) -> None:
    """Raise an error unless a file says everything, because its class has no defaults of its own."""
    further = {
        "do_center_crop": ["crop_size"],
        "do_rescale": ["rescale_factor"],
        "do_normalize": ["image_mean", "image_std"],
    }
    needed = ["do_resize", "size", "resample", *further]
    needed += [other for key, others in further.items() if values.get(key, False) for other in others]
    for key in needed:
        values.get(key)


def _check_keys(values: Fields, kind: str, processor: _Processor) -> None:
    for key in values:
        value = values.get(key)
        if key in _KNOWN_KEYS or key in processor.further or value is False or value in ([], {}):
            continue
        raise ConfigurationError(
            f"{values.path}: {key!r} is {brief(repr(value), 80)}, which may change pixels and is not done here"
            f"{nearest(key, _KNOWN_KEYS | processor.further)}. {WAY}"
        )
    if kind == "EfficientNet" and values.flag("include_top", True):
        raise ConfigurationError(
            f"{values.path}: 'include_top' is true, so pixels are divided by image_std twice, which is not done here. {WAY}"
        )


def _pillow_filter(values: Fields, processor: _Processor) -> str:
    number = values.get("resample", processor.resample)
    if type(number) is not int or number not in _PILLOW_FILTERS:
        name = _REFUSED_FILTERS.get(number, "unknown") if type(number) is int else "no number"
        raise ConfigurationError(
            f"{values.path}: 'resample' is {brief(repr(number), 40)} ({name}), expected 2 (bilinear) or 3 (bicubic): no other "
            f"filter of Pillow is used here. {WAY}"
        )
    return _PILLOW_FILTERS[number]


def _geometry(values: Fields, kind: str, processor: _Processor) -> tuple[int, int, str]:
    """Return height and width of the input in pixels, and the fit."""
    if not values.flag("do_resize", True):
        raise values.error("do_resize", "true, because all images of a batch have one size")
    edge, box = _size(values, processor)
    if kind == "ConvNext":
        if edge is None:
            raise values.error("size", "a shortest_edge, which ConvNextImageProcessor needs")
        if edge >= 384:
            return edge, edge, "stretch"
        share = values.number("crop_pct", 224 / 256, least=0.0)
        return edge, edge, crop_rule(values, int(edge / share), (edge, edge))
    if values.flag("do_center_crop", processor.crop is not None):
        if processor.crop is None:
            raise values.error("do_center_crop", f"false, because {kind}ImageProcessor does not crop")
        crop = _box(values, "crop_size", values.get("crop_size", processor.crop))
        if edge is not None:
            return *crop, crop_rule(values, edge, crop)
        if box != crop:
            edge = max(*(box or crop), *crop)
            raise values.error(
                "crop_size",
                f"the size {box}: an image that was stretched is not cropped here",
                f'{WAY} Nearest is "fit": "crop:{edge}", which keeps the proportions of the image.',
            )
        return *crop, "stretch"
    if box is None:
        raise values.error("size", "height and width, or a crop: by its shortest edge alone, images differ in size")
    return *box, "stretch"


def _size(values: Fields, processor: _Processor) -> tuple[int | None, tuple[int, int] | None]:
    """Return the shortest edge or the height and width to which images are resized; the other one is None."""
    size = values.get("size", processor.size)
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return values.pair("size", size["shortest_edge"])[0], None
    if type(size) is int and processor.by_edge:
        return values.pair("size", size)[0], None
    return None, _box(values, "size", size)


def _box(values: Fields, key: str, size: Any) -> tuple[int, int]:
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        return values.pair(key, [size["height"], size["width"]])
    if type(size) is not int:
        raise values.error(key, 'a number, {"shortest_edge": n} or {"height": n, "width": n}')
    return values.pair(key, size)


def _tokens(model: Fields) -> tuple[int | None, int | None]:
    """Return the number of tokens before those of the image, and the side of a patch, as a config.json says them.

    Networks without such tokens have patches that they merge, or of which they cut off nothing.
    """
    model_type = str(model.get("model_type", ""))
    inner = model.inner("vision_config")
    vision = inner if list(inner) else model
    _, prefix = _MODELS.get(model_type, ("", None))
    patch = None if prefix is None else vision.get("patch_size", None)
    registers = model.get("num_register_tokens", None if model_type in _REGISTERS_MUST_BE_SAID else 0)
    if prefix is None or registers is None:
        prefix = None
    elif prefix:
        prefix += model.whole("num_register_tokens", 0, MOST_PREFIX - prefix, 0)
    return prefix, patch if type(patch) is int and 1 <= patch <= LARGEST_SIDE else None
