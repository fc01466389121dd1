"""Heads: the small models trained on cached features, Keras or scikit-learn, behind one interface.

`PRESETS` names them, `make_head` makes one, `load_head` reads one back. What all of them do is in `pipeline.heads.head`,
what only some do in `pipeline.heads.dense` (Keras) and `pipeline.heads.classifiers` (scikit-learn).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, HeadError, nearest
from pipeline.config import (
    DenseParameters,
    EstimatorParameters,
    HeadFile,
    KnnParameters,
    LdaParameters,
    LinearSvmParameters,
    LogisticParameters,
    RidgeParameters,
    Settings,
    SgdParameters,
    parse,
)
from pipeline.heads.classifiers import SklearnHead
from pipeline.heads.dense import DENSE, KerasHead
from pipeline.heads.estimators import check_estimator, find_class, is_path
from pipeline.heads.head import Head
from pipeline.heads.keras_fit import dropout_rates
from pipeline.heads.pooling import POOLS, choose_pool, pooled_width


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named head: its kind (`HeadFile.kind`), default parameters and default pooling of spatial features."""

    kind: str
    parameters: Settings
    pool: str = "avg"


PRESETS = {
    "logistic": Preset("sklearn.linear_model.LogisticRegression", LogisticParameters()),
    "ridge": Preset("sklearn.linear_model.RidgeClassifier", RidgeParameters()),
    "linear-svm": Preset("sklearn.svm.LinearSVC", LinearSvmParameters()),
    "sgd": Preset("sklearn.linear_model.SGDClassifier", SgdParameters()),
    "lda": Preset("sklearn.discriminant_analysis.LinearDiscriminantAnalysis", LdaParameters()),
    "knn": Preset("sklearn.neighbors.KNeighborsClassifier", KnnParameters()),
    "dense": Preset(DENSE, DenseParameters()),
    "dropout-linear": Preset(DENSE, DenseParameters(dropout=0.2)),
    "mlp-256": Preset(DENSE, DenseParameters(hidden=(256,), dropout=0.5, learning_rate=3e-4), pool="flatten"),
    # The heads of published recipes, as they were trained.
    "linear-sgd": Preset(
        DENSE, DenseParameters(optimizer="sgd", learning_rate=1e-3, momentum=0.9, weight_decay=1e-3, epochs=20)
    ),
    "mlp-256-sgd": Preset(DENSE, DenseParameters(hidden=(256,), optimizer="sgd", learning_rate=1e-3)),
    "mlp-1024-128": Preset(
        DENSE,
        DenseParameters(hidden=(1024, 128), optimizer="sgd", learning_rate=1e-3, momentum=0.9, nesterov=True),
        pool="flatten",
    ),
    "mlp-1024-1024": Preset(
        DENSE,
        DenseParameters(
            hidden=(1024, 1024),
            dropout=(0.0, 0.5, 0.0),
            optimizer="sgd",
            learning_rate=1e-4,
            momentum=0.9,
            patience=10,
        ),
        pool="flatten",
    ),
}


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
        Key of `PRESETS`.
    pool : {"none", "avg", "max", "flatten"}, optional
        Pooling of spatial features; default: the preset's. Features that are vectors need none.
    seed : int
        Of folds, initial values, dropout and order.
    classes : sequence of str
        Class names; default: ``"0"``, ``"1"``, ... as far as the labels go.
    layer, fingerprint : str
        Kept in ``head.json``.
    **params
        Of the preset: fields of `LogisticParameters`, ..., `DenseParameters`.

    Raises
    ------
    ConfigurationError
        Unknown head, parameter or pooling.
    """
    if pool is not None and pool not in POOLS:
        raise ConfigurationError(f"pool: received {pool!r}, expected one of {', '.join(POOLS)}{nearest(pool, POOLS)}")
    preset = find_preset(name)
    parameters: Settings
    if isinstance(preset.parameters, EstimatorParameters):
        parameters = _estimator_parameters(name, params, len(classes) or 3)
    else:
        values = {**preset.parameters.model_dump(), **params}
        parameters = parse(type(preset.parameters), values, f"head {name!r}")
    if isinstance(parameters, DenseParameters):
        dropout_rates(parameters)
    head = _head_class(preset.kind)(name, preset.kind, parameters, pool=pool, usual_pool=preset.pool, seed=seed)
    head.classes, head.layer, head.fingerprint = tuple(classes), layer, fingerprint
    return head


def find_preset(name: str) -> Preset:
    """The preset of that name, or one made for an import path.

    Raises
    ------
    ConfigurationError
        If it is neither; the nearest names are given.
    """
    if is_path(name):
        return Preset(name, EstimatorParameters())
    if name not in PRESETS:
        raise ConfigurationError(
            f"head: received {name!r}, expected one of {', '.join(PRESETS)}, or a classifier of scikit-learn such as "
            f"sklearn.ensemble.RandomForestClassifier{nearest(name, PRESETS)}"
        )
    return PRESETS[name]


def _estimator_parameters(name: str, params: dict[str, Any], classes: int) -> EstimatorParameters:
    """Ours and the classifier's own stand side by side."""
    ours = {key: value for key, value in params.items() if key in ("folds", "scale", "pca")}
    own = {key: value for key, value in params.items() if key not in ours}
    check_estimator(name, own, classes)
    return parse(EstimatorParameters, {**ours, "params": own}, f"head {name!r}")


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
    stored = parse(HeadFile, values, str(path), error=HeadError)
    name, parameters = _named(path, stored)
    head = _head_class(stored.kind)(name, stored.kind, parameters, pool=stored.pool)
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


def resolve_pool(name: str, pool: str | None, shape: Sequence[int]) -> str:
    """Pooling of a preset for rows of this shape; see `pipeline.heads.pooling.choose_pool`."""
    return choose_pool(pool, find_preset(name).pool, shape)


def _named(path: Path, stored: HeadFile) -> tuple[str, Settings]:
    """Name and parameters of a head whose kind is known; how it was trained stands in the run."""
    if stored.kind == DENSE:
        values = {"hidden": stored.hidden, "activation": stored.activation, "dropout": stored.dropout}
        parameters = parse(DenseParameters, values, str(path), error=HeadError)
        try:
            dropout_rates(parameters)
        except ConfigurationError as problem:
            raise HeadError(f"{path}: {problem}") from problem
        return DENSE, parameters
    for name, preset in PRESETS.items():
        if preset.kind == stored.kind:
            return name, preset.parameters
    try:
        find_class(stored.kind)
    except ConfigurationError as problem:
        raise HeadError(
            f"{path}: kind is {stored.kind!r}, expected one of dense, sklearn.MODULE.CLASS: {problem}"
        ) from problem
    return stored.kind, EstimatorParameters()


def _head_class(kind: str) -> type[Head]:
    return KerasHead if kind == DENSE else SklearnHead
