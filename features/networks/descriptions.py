"""How images are prepared for a network, read from the files beside it and never guessed.

    preprocessor_config.json or processor_config.json | config.json of timm | open_clip_config.json --find_image_input()--> ImageInput
    --preprocess FILE.json --read_preprocess()--> ImageInput

What a file leaves out has the default of the library that it was written for: transformers 4, timm 1
(``create_transform``) or open_clip 2 (``PreprocessCfg``). What it asks for and this project does not do is refused by
its key. The files are untrusted: sizes, types and numbers are checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from features.errors import ConfigurationError, brief, nearest
from features.files import read_small
from features.networks.imageinput import (
    CLIP,
    IMAGENET,
    WAY,
    Fields,
    ImageInput,
    crop_rule,
    read_json,
)
from features.networks.processors import read_transformers
from features.recipe import LARGEST_SIDE, MOST_PREFIX, PixelRule

FORMAT = "bottleneck-preprocess 1"
_LARGEST_CARD = 1 << 20  # bytes
_TOLERANCE = 1e-4  # to which two descriptions of one network agree
_INTERPOLATIONS = {"bilinear": "antialias", "bicubic": "bicubic"}


def find_image_input(folder: Path) -> ImageInput:
    """Read the description in the folder of a network; for a folder called ``onnx``, also from the one around it.

    If there are several descriptions they must agree, because one that contradicts belongs to another network, and
    nothing tells which of the two. Numbers of tokens, patch and licence come from the first file that says them.

    Raises
    ------
    ConfigurationError
        If there is none (the message shows what to write), a file is not what it should be, it asks for something that
        is not done here, or two contradict each other.
    """
    places = _places(folder)
    found = [found for place in places for read in _READERS if (found := read(place)) is not None]
    if not found:
        raise ConfigurationError(missing_description(places[-1]))
    first = found[0]
    for other in found[1:]:
        _check_agreement(first, other)
        said = {name: getattr(other, name) for name in ("prefix_tokens", "class_token", "patch", "license")}
        first = dataclasses.replace(
            first, **{name: value for name, value in said.items() if getattr(first, name) is None}
        )
    return first


def _places(folder: Path) -> list[Path]:
    """Return where files about the network in a folder lie; the last is what its user calls the folder of the network."""
    return [folder, folder.parent] if folder.name == "onnx" else [folder]


def card_license(folder: Path) -> str | None:
    """Read what the model card of the network in a folder, its ``README.md``, names as the licence; None if there is none.

    A model card begins with lines of YAML between ``---``: ``license``, and ``license_name`` for one that is not common.
    """
    for place in _places(folder):
        with contextlib.suppress(OSError):
            text = read_small(place / "README.md", _LARGEST_CARD).decode("utf-8", "replace").replace("\r\n", "\n")
            head = re.match(r"---\n(.*?\n)---", text, re.DOTALL)
            named = _named(head[1], "license") if head else []
            if head and named:
                further = [f"({name})" for name in _named(head[1], "license_name")]
                return brief(" ".join([", ".join(named), *further]), 100)
    return None


def _named(lines: str, key: str) -> list[str]:
    """Return the words that lines of YAML give a key: one, or a list on one line or several."""
    found = re.search(rf"^{key}:(.*(?:\n *- .*)*)", lines, re.MULTILINE)
    return re.findall(r"\w[\w.+-]*", found[1]) if found else []


def read_preprocess(path: Path) -> ImageInput:
    """Read the project's own JSON for ``--preprocess``.

    It has the keys ``format`` ("bottleneck-preprocess 1"), ``size`` [height, width], ``resize``, ``fit``, ``scale``,
    ``mean``, ``std``, and optionally ``channels`` ("rgb") and ``prefix_tokens``, all as in ``ImageInput``.

    Raises
    ------
    ConfigurationError
        If the file cannot be read, a key is unknown or missing, or a value is not allowed.
    """
    values = Fields(path, read_json(path))
    if values.get("format") != FORMAT:
        raise values.error("format", repr(FORMAT), f"{path} is no description of this project. {_example()}")
    known = ("format", "size", "resize", "fit", "scale", "mean", "std", "channels", "prefix_tokens")
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{path}: unknown key {brief(key, 80)!r}{nearest(key, known)}. {_example()}")
    height, width = values.pair("size", values.get("size"))
    fit = str(values.get("fit"))
    try:
        PixelRule(height, width, fit=fit)
    except ConfigurationError:
        raise values.error(
            "fit", f"stretch, crop, pad or crop:EDGE with an EDGE of {max(height, width)} to 4096"
        ) from None
    prefix = values.get("prefix_tokens", None)
    return ImageInput(
        height=height,
        width=width,
        resize=values.choice("resize", ("antialias", "bicubic", "keras")),
        fit=fit,
        scale=values.number("scale", least=0.0),
        mean=values.triple("mean"),
        std=values.triple("std", least=0.0),
        channels=values.choice("channels", ("rgb", "bgr"), "rgb"),
        source=path,
        prefix_tokens=None if prefix is None else values.whole("prefix_tokens", 0, MOST_PREFIX),
    )


def missing_description(
    place: Path,
    looked_for: str = "preprocessor_config.json, processor_config.json, timm's config.json and open_clip_config.json",
) -> str:
    """Return the message for a network without a description: what was looked for, and what to write."""
    return (
        f"{place}: nothing says how images are prepared for this network (looked for {looked_for}), and that is not "
        f"guessed. {_example()}"
    )


def _example() -> str:
    example = {"format": FORMAT, "size": [224, 224], "resize": "bicubic", "fit": "crop:256", "scale": 1 / 255}
    example |= {"mean": IMAGENET[0], "std": IMAGENET[1], "channels": "rgb", "prefix_tokens": 1}
    return (
        "Write FILE.json and give --preprocess FILE.json. An example with ImageNet's numbers, which are not those of every "
        f"network (its page has them; omit prefix_tokens if it gives no tokens):\n{json.dumps(example)}"
    )


def _check_agreement(first: ImageInput, other: ImageInput) -> None:
    differ = []
    for field in dataclasses.fields(ImageInput):
        mine, theirs = getattr(first, field.name), getattr(other, field.name)
        if field.name in ("source", "license", "class_token", "patch") or (
            field.name == "prefix_tokens" and None in (mine, theirs)
        ):
            continue
        numbers = field.name in ("scale", "mean", "std")
        pairs = zip(*([mine, theirs] if isinstance(mine, tuple) else [[mine], [theirs]]), strict=True)
        if not all(math.isclose(a, b, rel_tol=_TOLERANCE) if numbers else a == b for a, b in pairs):
            differ.append(f"{field.name} {mine} and {theirs}")
    if differ:
        raise ConfigurationError(
            f"{first.source} and {other.source.name} beside it contradict each other: {brief('; '.join(differ), 400)}. Remove "
            f"the one that does not belong to this network, or say it in a file of your own with --preprocess FILE.json."
        )


# -------------------------------------------------------------------------------------- timm, open_clip
def _read_timm(folder: Path) -> ImageInput | None:
    path = folder / "config.json"
    if not path.exists():
        return None
    whole = Fields(path, read_json(path))
    if "pretrained_cfg" not in whole and not {"architecture", "input_size"} <= set(whole):
        return None
    values = whole.inner("pretrained_cfg") if "pretrained_cfg" in whole else whole
    shape = values.get("input_size")
    if not isinstance(shape, list) or len(shape) != 3 or shape[0] != 3:
        raise values.error("input_size", "[3, height, width]")
    size = values.pair("input_size", shape[1:])
    share = values.number("crop_pct", least=0.0)
    mode = values.choice("crop_mode", ("center", "squash"), "center")
    if mode == "squash" and share != 1:
        edge = math.floor(size[0] / share)
        raise values.error(
            "crop_pct",
            "1 where crop_mode is squash: an image that was stretched is not cropped here",
            f'{WAY} Nearest is "fit": "crop:{edge}", which keeps the proportions of the image.',
        )
    if mode == "center" and size[0] != size[1]:
        raise values.error("input_size", "a square where crop_mode is center")
    architecture = str(whole.get("architecture", ""))
    prefix, class_token = _timm_tokens(architecture, whole)
    return ImageInput(
        height=size[0],
        width=size[1],
        resize=_INTERPOLATIONS[values.choice("interpolation", tuple(_INTERPOLATIONS))],
        fit="stretch" if mode == "squash" else crop_rule(values, math.floor(size[0] / share), size),
        scale=1 / 255,
        mean=values.triple("mean"),
        std=values.triple("std", least=0.0),
        channels="rgb",
        source=path,
        prefix_tokens=prefix,
        class_token=class_token,
        patch=_timm_patch(architecture, whole),
        license=values.text("license"),
    )


def _timm_tokens(architecture: str, whole: Fields) -> tuple[int | None, bool | None]:
    """Return how many tokens stand before those of the image, and whether the first is a class token, if timm's name tells.

    ``regN`` are N registers; ``gap`` and ``siglip`` stand for no class token, a pooling by ``token`` for one.
    """
    settings = whole.inner("model_args")
    words = architecture.split("_")
    found = [int(word[3:]) for word in words if re.fullmatch(r"reg\d{1,2}", word)]
    registers = settings.whole("reg_tokens", 0, 32, found[0] if found else 0)
    without = "gap" in words or "siglip" in words
    if not settings.flag("class_token", not without):
        return registers, False
    if "distilled" in words:
        return 2, True
    return (1 + registers, True) if found or registers or whole.get("global_pool", None) == "token" else (None, None)


def _timm_patch(architecture: str, whole: Fields) -> int | None:
    found = re.search(r"_patch(\d{1,3})(_|$)", "" if architecture.startswith("swin") else architecture)
    patch = whole.inner("model_args").get("patch_size", int(found[1]) if found else None)
    return patch if type(patch) is int and 1 <= patch <= LARGEST_SIDE else None


def _read_open_clip(folder: Path) -> ImageInput | None:
    path = folder / "open_clip_config.json"
    if not path.exists():
        return None
    whole = Fields(path, read_json(path))
    vision = whole.inner("model_cfg").inner("vision_cfg")
    values = whole.inner("preprocess_cfg")
    size = values.pair("size", values.get("size", None) or vision.get("image_size"))
    values.choice("mode", ("RGB",), "RGB")
    shortest = values.choice("resize_mode", ("shortest", "squash"), "shortest") == "shortest"
    if shortest and size[0] != size[1]:
        raise vision.error("image_size", "a square where resize_mode is shortest")
    timm = str(vision.get("timm_model_name", ""))
    patch = vision.get("patch_size", None)
    prefix, class_token = _timm_tokens(timm, vision) if timm else (1 if type(patch) is int else None, None)
    return ImageInput(
        height=size[0],
        width=size[1],
        resize=_INTERPOLATIONS[values.choice("interpolation", tuple(_INTERPOLATIONS), "bicubic")],
        fit=f"crop:{size[0]}" if shortest else "stretch",
        scale=1 / 255,
        mean=values.triple("mean", CLIP[0]),
        std=values.triple("std", CLIP[1], least=0.0),
        channels="rgb",
        source=path,
        prefix_tokens=prefix,
        class_token=class_token,
        patch=_timm_patch(timm, vision) if timm else (patch if type(patch) is int else None),
    )


_READERS: tuple[Callable[[Path], ImageInput | None], ...] = (read_transformers, _read_timm, _read_open_clip)
