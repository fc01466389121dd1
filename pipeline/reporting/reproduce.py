"""The commands that make a run again, derived from its ``config.yaml`` and, if it can be found, its store."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from features.augmentation import PRESETS as PRESETS_OF_VIEWS
from features.augmentation import AugmentSpec
from features.files import printable
from features.networks.backbones import BACKBONES
from features.networks.descriptions import FORMAT
from features.networks.quantised import networks_of_runs, place_in
from features.recipe import NetworkOptions, Normalisation, PixelRule, Recipe
from features.sources.scan import is_manifest, source_in
from pipeline.presets import PRESETS, EstimatorParameters
from pipeline.runs.folder import Run
from pipeline.tuning.settings import TuningSettings

# Settings of fine-tuning that have no option of their own and are given by --param.
PARAMETERS = ("momentum", "nesterov", "weight_decay", "warmup_epochs", "class_weight", "initial_epoch")


def commands(run: Run, *, start: Run | None = None, views: int | None = None, root: str = "") -> list[str]:
    """List the commands ``extract``, ``train-head`` and, for a fine-tuned run, ``finetune``, ready to be typed.

    Parameters
    ----------
    run : Run
        The run to make again.
    start : Run, optional
        The run that a fine-tuned run started from.
    views : int, optional
        Number of views in the store, if it can be found.
    root : str
        Absolute folder of the images as the store notes it, since the run may know only a relative path.

    Returns
    -------
    list of str
        Commands quoted for a POSIX shell, each one line whatever the fields hold; a line that begins with ``#`` says what
        is unknown.
    """
    head = run if start is None else start
    lines = []
    if run.config["stage"] == "finetune" and start is None:
        lines.append(
            _comment(f"the run it was fine-tuned from, {(run.config['finetune'] or {}).get('start')}, is not here")
        )
    else:
        lines += [*_extract(head, _source(head, root), views), _train(head)]
    if run.config["stage"] == "finetune":
        lines += _finetune(run, _source(run, root))
    return lines


def _source(run: Run, root: str) -> str:
    """Source of the images, as an absolute path if that is certain."""
    source = str(run.config["features"]["source"])
    if not root or source.startswith("sample:") or PurePath(source).is_absolute():
        return source
    name, folder = PurePath(source).name, PurePath(root)
    return source_in(root, source) if is_manifest(source) or folder.name == name else source


def _extract(run: Run, source: str, views: int | None) -> list[str]:
    features, recipe = run.config["features"], Recipe.from_dict(run.config["features"]["recipe"])
    pixels = recipe.pixels
    words = ["bottleneck", "extract", _place(source), "--out", features["store"]]
    words += ["--backbone", features["backbone"], "--weights", features["weights"]]
    words += ["--layer", recipe.layer, "--pooling", recipe.pooling, "--image-size", f"{pixels.height}x{pixels.width}"]
    before = []
    if recipe.normalisation is not None:  # the description may lie elsewhere than beside the network
        file = f"{PurePath(features['store']).with_suffix('')}.preprocess.json"
        before.append(f"{_line(['echo', _description(recipe)])} > {_line([_place(file)])}")
        words += ["--preprocess", file]
    precision, _, engine = recipe.precision.partition(":")
    usual = {"decode": "full", "dtype": "float32", "precision": "float32"}
    if recipe.normalisation is None:  # otherwise the description of the network may say something else
        usual |= _usual_pixels(recipe)
    given = {"resize": pixels.resize, "fit": pixels.fit, "decode": pixels.decode, "dtype": recipe.dtype}
    given |= {"precision": precision, "engine": engine.partition("-")[0]}
    given |= {"channels": pixels.channels, "scale": pixels.scale, "frame": str(pixels.frame or "")}
    if recipe.quantised is not None:
        given["quantised"] = _place(str(place_in(networks_of_runs(run.folder.parent), recipe.quantised)))
    given["prefix-tokens"] = "" if recipe.prefix_tokens is None else str(recipe.prefix_tokens)
    for name, value in given.items():
        if value and value != usual.get(name):
            words += [f"--{name}", value]
    words += ["--split", features["split_rule"] or "hash"]
    words += ["--task", run.config["task"]] if "task" in run.config else []
    if features["target"]:
        words += ["--target", features["target"]]
    for name, value in run.reading.record.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    notes = []
    if recipe.augmentation is not None:
        preset, note = _preset(recipe.augmentation)
        words += ["--views", str(views or "VIEWS"), "--augment", preset, "--seed", str(recipe.seed)]
        if views is None:
            notes.append(_comment("VIEWS: the number of views in the store, which was not found"))
        notes += note
    return [*notes, *before, _line(words)]


def _description(recipe: Recipe) -> str:
    """Return how images are prepared as the JSON that ``--preprocess`` takes."""
    pixels, how = recipe.pixels, recipe.normalisation or Normalisation()
    said = {"format": FORMAT, "size": [pixels.height, pixels.width], "resize": pixels.resize, "fit": pixels.fit}
    return json.dumps(said | how.to_dict())


def _usual_pixels(recipe: Recipe) -> dict[str, str]:
    """Return the values of ``--resize`` and ``--fit`` that a network has without them, at this image size."""
    pixels = recipe.pixels
    own = PixelRule(pixels.height, pixels.width)
    if recipe.backbone in BACKBONES:
        asked = NetworkOptions(recipe.backbone, image_size=(pixels.height, pixels.width))
        own = BACKBONES[recipe.backbone].pixel_rule(asked)
    return {"resize": own.resize, "fit": own.fit}


def _train(run: Run) -> str:
    head, features = run.config["head"], run.config["features"]
    words = [
        "bottleneck",
        "train-head",
        _place(features["store"]),
        "--features",
        features["name"],
        "--head",
        head["name"],
    ]
    preset = PRESETS.get(head["name"])
    usual: Mapping[str, Any] = (preset.parameters if preset else EstimatorParameters()).described()
    for name, value in head["parameters"].items():
        if name not in usual or usual[name] != value:
            words += ["--param", f"{name}={_value(value)}"]
    if head["pool"] not in ("none", preset.pool if preset else "avg"):
        words += ["--pool", head["pool"]]
    if run.config["seed"]:
        words += ["--seed", str(run.config["seed"])]
    if run.metrics["cv"]:
        words += ["--folds", str(run.metrics["cv"]["folds"])]
    words += _labels(run)
    return _line([*words, "--runs", str(run.folder.resolve().parent)])


def _finetune(run: Run, source: str) -> list[str]:
    settings, root = run.config["finetune"] or {}, run.folder.resolve().parent
    usual = TuningSettings().model_dump(mode="json")
    words = ["bottleneck", "finetune", str(root / str(settings.get("start", "RUN")))]
    cache = settings.get("from_cache")
    words += ["--from-cache", cache["path"]] if cache else ["--images", source]
    given = {name: value for name, value in settings.items() if name in usual and value != usual[name]}
    augment = given.pop("augment", None)
    notes: list[str] = []
    if augment is not None:
        preset, notes = (augment, []) if isinstance(augment, str) else _preset(AugmentSpec.from_dict(augment))
        words += ["--augment", preset]
    for name, value in given.items():
        if name in PARAMETERS:
            words += ["--param", f"{name}={_value(value)}"]
        else:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [*notes, _line([*words, *_labels(run), "--runs", str(root)])]


def _labels(run: Run) -> list[str]:
    return ["--labels", _place(run.labels["path"])] if run.labels else []


def _preset(spec: AugmentSpec) -> tuple[str, list[str]]:
    """Return the value of ``--augment``; for an augmentation that is no preset, a placeholder and a line about it."""
    if spec.name in PRESETS_OF_VIEWS:
        return spec.name, []
    usual = AugmentSpec().to_dict()
    own = ", ".join(f"{name}={value!r}" for name, value in spec.to_dict().items() if usual[name] != value)
    text = f"AUGMENT: AugmentSpec({own}) is not a preset; it can be given in Python only (augment=...)"
    return "AUGMENT", [_comment(text)]


def _value(value: Any) -> str:
    """Format a value as ``--param`` reads it: as JSON, or as text that is not JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)


def _place(path: str) -> str:
    """Return a path that cannot be taken for an option."""
    return f"./{path}" if path.startswith("-") else path


def _comment(text: str) -> str:
    return printable(f"# {text}")


def _line(words: list[str]) -> str:
    return printable(" ".join(shlex.quote(str(word)) for word in words))
