"""The kinds of head: made by name, read back from a file. All are behind the interface of `pipeline.heads.head.Head`.

`KINDS` has a row for each. What a name stands for is in `pipeline.presets`; dense layers are in `pipeline.heads.dense`,
scikit-learn classifiers in `pipeline.heads.classifiers`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.canonical import check_choice
from features.errors import HeadError, RunError
from features.recipe import POOLINGS
from pipeline.config import parse
from pipeline.heads.classifiers import CLASSIFIERS, EstimatorHead, SklearnHead
from pipeline.heads.dense import KerasHead
from pipeline.heads.head import Head
from pipeline.heads.pooling import choose_pool, pooled_width
from pipeline.presets import DENSE, PRESETS, Preset, find_preset
from pipeline.runs.folder import Run

KINDS: dict[str, type[Head]] = {DENSE: KerasHead, **dict.fromkeys(CLASSIFIERS, SklearnHead)}


def register(name: str, preset: Preset, kind: type[Head]) -> None:
    """Add a head under a name of its own, and its kind; afterwards it can be trained, swept, saved and loaded."""
    PRESETS[name], KINDS[preset.kind] = preset, kind


def make_head(
    name: str,
    /,
    *,
    pool: str | None = None,
    seed: int = 0,
    classes: Sequence[str] = (),
    layer: str = "",
    fingerprint: str = "",
    **params: Any,
) -> Head:
    """An untrained head.

    Parameters
    ----------
    name : str
        Key of `PRESETS`, or the import path of a scikit-learn classifier.
    pool : {"none", "avg", "max", "flatten"}, optional
        Pooling of spatial features; default: the preset's. Features that are vectors need none.
    seed : int
        Seed of the folds, initial values, dropout and the order of rows.
    classes : sequence of str
        Class names; default: ``"0"``, ``"1"``, ... as far as the labels go.
    layer, fingerprint : str
        Kept in ``head.json``.
    **params
        Parameters of the preset: fields of `LogisticParameters`, ..., `DenseParameters`.

    Raises
    ------
    ConfigurationError
        Unknown head, parameter or pooling.
    """
    if pool is not None:
        check_choice("pool", pool, POOLINGS)
    preset = find_preset(name)
    kind = EstimatorHead if preset.by_path else KINDS[preset.kind]
    parameters = kind.parse_parameters(name, preset, params, len(classes) or 3)
    head = kind(name, preset.kind, parameters, pool=pool, usual_pool=preset.pool, seed=seed)
    head.classes, head.layer, head.fingerprint = tuple(classes), layer, fingerprint
    return head


def load_head(folder: str | Path) -> Head:
    """Rebuild a saved head. The folder is untrusted input: nothing in it is executed.

    Raises
    ------
    HeadError
        A missing or malformed file, weights of other shapes, or a type that is not on our list.
    """
    folder = Path(folder)
    path = folder / "head.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise HeadError(f"{path}: cannot be read: {problem}") from problem
    named = values.get("kind") if isinstance(values, dict) else None
    kind = KINDS.get(named, EstimatorHead) if isinstance(named, str) else EstimatorHead
    stored = parse(kind.file_model, values, str(path), error=HeadError)
    name, parameters = kind.restored(path, stored)
    head = kind(name, stored.kind, parameters, pool=stored.pool)
    head.classes, head.layer, head.fingerprint = stored.classes, stored.layer, stored.fingerprint
    head.input_shape, head.temperature = stored.input_shape, stored.temperature
    head.mean = np.array(stored.scaler.mean, np.float32)
    head.std = np.array(stored.scaler.std, np.float32)
    columns = pooled_width(stored.input_shape, stored.pool)
    if (len(head.mean), len(head.std)) != (columns, columns):
        raise HeadError(
            f"{path}: scaler has {len(head.mean)} means and {len(head.std)} deviations, expected {columns} for "
            f"features {stored.input_shape} pooled by {stored.pool!r}"
        )
    head._load_weights(folder)
    return head


def head_of(run: Run) -> Head:
    """The head of a run, rebuilt from its files.

    Raises
    ------
    HeadError
        If a file of it is malformed.
    RunError
        If it is not the head of this run.
    """
    head = load_head(run.folder)
    for name, own, noted in (
        ("classes", head.classes, run.classes),
        ("fingerprint", head.fingerprint, run.config["features"]["fingerprint"]),
    ):
        if own != noted:
            raise RunError(f"{run.folder / 'head.json'}: {name} is {own!r}, config.yaml says {noted!r}")
    head.name = run.config["head"]["name"]
    return head


def can_finetune(run: Run) -> bool:
    """Whether the head of a run is a Keras network, or equal to one, so that fine-tuning can start from it."""
    name = run.config["head"]["name"]
    kind = PRESETS[name].kind if name in PRESETS else name
    return set(KerasHead.files) <= set(run.config["model"]) or KINDS.get(kind, EstimatorHead).has_dense_form(kind)


def resolve_pool(name: str, pool: str | None, shape: Sequence[int]) -> str:
    """Pooling of a preset for rows of this shape; see `pipeline.heads.pooling.choose_pool`."""
    return choose_pool(pool, find_preset(name).pool, shape)
