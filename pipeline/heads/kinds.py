"""The kinds of head: heads are made by name here and loaded from files. All implement `pipeline.heads.head.Head`.

`KINDS` has one row per kind, `OF_TASK` one for each kind that fits another task than classification. Names of heads are defined in `pipeline.presets`, heads of dense layers in
`pipeline.heads.dense`, heads of scikit-learn classifiers in `pipeline.heads.classifiers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.canonical import check_choice
from features.errors import ConfigurationError, HeadError, RunError
from features.files import read_small
from features.recipe import POOLINGS
from pipeline.config import TargetHeadFile, parse, parse_one_of
from pipeline.heads.classifier_table import CLASSIFIERS, NEAREST_MEAN
from pipeline.heads.classifiers import EstimatorHead, SklearnHead
from pipeline.heads.columns import LogisticColumns, NeighbourColumns, RidgeColumns
from pipeline.heads.dense import KerasHead
from pipeline.heads.head import Head
from pipeline.heads.models.archive import MOST_TEXT, bounded_json
from pipeline.heads.nearest_mean import NearestMeanHead
from pipeline.heads.pooling import choose_pool, pooled_width
from pipeline.heads.regressors import RegressorHead
from pipeline.presets import DENSE, PRESETS, Preset, find_preset, is_path
from pipeline.runs.folder import Run
from pipeline.tasks.table import CLASSIFICATION, TASKS
from pipeline.tasks.task import Task

KINDS: dict[str, type[Head]] = {
    DENSE: KerasHead,
    **dict.fromkeys(CLASSIFIERS, SklearnHead),
    NEAREST_MEAN: NearestMeanHead,
}
_LOGISTIC, _RIDGE = "sklearn.linear_model.LogisticRegression", "sklearn.linear_model.RidgeClassifier"
_NEIGHBOURS = "sklearn.neighbors.KNeighborsClassifier"
OF_TASK: dict[str, dict[str, type[Head]]] = {
    "multilabel": {_LOGISTIC: LogisticColumns, _NEIGHBOURS: NeighbourColumns, DENSE: KerasHead},
    "regression": {_RIDGE: RidgeColumns, _NEIGHBOURS: NeighbourColumns, DENSE: KerasHead},
}


# Task -> the kind of heads that are named by an import path of scikit-learn.
BY_PATH: dict[str, type[Head]] = {CLASSIFICATION.name: EstimatorHead, "regression": RegressorHead}


def register(name: str, preset: Preset, kind: type[Head]) -> None:
    """Register a named head and its kind. From then on it can be trained, used in sweeps, saved and loaded."""
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
    task: Task = CLASSIFICATION,
    **params: Any,
) -> Head:
    """Make an untrained head.

    Parameters
    ----------
    name : str
        Key of `PRESETS`, or the import path of a scikit-learn classifier.
    pool : {"none", "avg", "max", "flatten"}, optional
        Pooling of spatial features; default: the preset's. Features that are vectors need none.
    seed : int
        Random seed of the folds, initial weights, dropout and row order.
    classes : sequence of str
        Class names; default: ``"0"``, ``"1"``, ... up to the highest label.
    layer, fingerprint : str
        Stored in ``head.json``.
    task : Task
        What is predicted.
    **params
        Parameters of the preset: fields of `LogisticParameters`, ..., `DenseParameters`.

    Raises
    ------
    ConfigurationError
        If the head, a parameter or the pooling is unknown, or heads of this kind do not fit the task.
    """
    if pool is not None:
        check_choice("pool", pool, POOLINGS)
    preset = find_preset(name)
    kind = kind_of(name, preset, task)
    if refused := sorted(set(task.refused) & set(params)):
        raise ConfigurationError(f"head {name!r}: {refused[0]} does not fit --task {task.name}; leave it out")
    parameters = kind.parse_parameters(name, preset, params, len(classes) or 3)
    head = kind(name, preset.kind, parameters, pool=pool, usual_pool=preset.pool, seed=seed)
    head.task, head.classes, head.layer, head.fingerprint = task, tuple(classes), layer, fingerprint
    return head


def kind_of(name: str, preset: Preset, task: Task) -> type[Head]:
    """Return the class of heads of a name for a task.

    Raises
    ------
    ConfigurationError
        If there is none; the heads that fit are named.
    """
    fitting = KINDS if task is CLASSIFICATION else OF_TASK[task.name]
    found = BY_PATH.get(task.name) if preset.by_path else fitting.get(preset.kind)
    if found is None:
        raise ConfigurationError(
            f"head {name!r} does not fit --task {task.name}, which the store is for: use {', '.join(heads_of(task))}"
        )
    return found


def heads_of(task: Task) -> list[str]:
    """Names of the heads that fit a task."""
    fitting = KINDS if task is CLASSIFICATION else OF_TASK[task.name]
    return [name for name, preset in PRESETS.items() if preset.kind in fitting]


def load_head(folder: str | Path, *, trust: bool = False) -> Head:
    """Load a saved head. The folder is untrusted input: nothing in it is executed.

    Parameters
    ----------
    folder : Path
        Run folder.
    trust : bool
        Load objects of scikit-learn from a file that this user has not signed. Only types on a fixed list are loaded, so
        that nothing is executed, but an edited file can crash the process or read and write outside its memory.

    Raises
    ------
    HeadError
        A file is missing or malformed, or weights have the wrong shape.
    UntrustedHeadError
        The head is one of the few that need ``trust``.
    """
    folder = Path(folder)
    path = folder / "head.json"
    try:
        values = bounded_json(read_small(path, MOST_TEXT))
    except (OSError, ValueError, RecursionError) as problem:
        raise HeadError(f"{path}: cannot be read: {problem}") from problem
    named = values.get("kind") if isinstance(values, dict) else None
    kind = KINDS.get(named, EstimatorHead) if isinstance(named, str) else EstimatorHead
    task = CLASSIFICATION
    if isinstance(values, dict) and values.get("format") == TargetHeadFile.model_fields["format"].default:
        checked = parse(TargetHeadFile, values, str(path), error=HeadError)
        task, fitting = TASKS[checked.task], OF_TASK[checked.task].get(checked.kind)
        if fitting is None and is_path(checked.kind):
            fitting = BY_PATH.get(checked.task)
        if fitting is None:
            raise HeadError(f"{path}: a head of kind {checked.kind!r} is not known for {checked.task}; train it again")
        kind = fitting
    stored = parse_one_of(kind.file_models, values, str(path), error=HeadError)
    name, parameters = kind.restored(path, stored)
    head = kind(name, stored.kind, parameters, pool=stored.pool)
    head.task = task
    head.classes, head.layer, head.fingerprint = stored.classes, stored.layer, stored.fingerprint
    head.input_shape, head.temperature = stored.input_shape, stored.temperature
    head.mean = np.array(stored.scaler.mean, np.float32)
    head.std = np.array(stored.scaler.std, np.float32)
    columns = pooled_width(stored.input_shape, stored.pool)
    if (len(head.mean), len(head.std)) != (columns, columns):
        raise HeadError(
            f"{path}: scaler has {len(head.mean)} means and {len(head.std)} deviations, expected {columns} of each for "
            f"features of shape {stored.input_shape} with pooling {stored.pool!r}; train the head again"
        )
    head._load_weights(folder, stored, trust=trust)
    return head


def head_of(run: Run, *, trust: bool = False) -> Head:
    """Load the head of a run from the run folder; ``trust`` as in `load_head`.

    Raises
    ------
    HeadError
        If one of its files is malformed.
    RunError
        If the head in the folder belongs to another run.
    """
    head = load_head(run.folder, trust=trust)
    for name, own, noted in (
        ("task", head.task.name, run.task.name),
        ("classes", head.classes, run.classes),
        ("fingerprint", head.fingerprint, run.config["features"]["fingerprint"]),
    ):
        if own != noted:
            raise RunError(f"{run.folder / 'head.json'}: {name} is {own!r}, but config.yaml says {noted!r}")
    head.name = run.config["head"]["name"]
    return head


def layered(task: Task) -> list[str]:
    """Names of the heads of a task that are, or have an equivalent of, dense layers."""
    fitting = KINDS if task is CLASSIFICATION else OF_TASK[task.name]
    return [name for name in heads_of(task) if fitting[PRESETS[name].kind].has_dense_form(PRESETS[name].kind)]


def can_finetune(run: Run) -> bool:
    """Whether fine-tuning can start from a run: its head is a Keras network or has an equivalent one."""
    name = run.config["head"]["name"]
    kind = PRESETS[name].kind if name in PRESETS else name
    if set(KerasHead.files) <= set(run.config["model"]):
        return True
    fitting = KINDS if run.task is CLASSIFICATION else OF_TASK[run.task.name]
    found = fitting.get(kind, BY_PATH.get(run.task.name))
    return found is not None and found.has_dense_form(kind)


def resolve_pool(name: str, pool: str | None, shape: Sequence[int]) -> str:
    """Choose the pooling for rows of this shape, by default that of the preset; see `pooling.choose_pool`."""
    return choose_pool(pool, find_preset(name).pool, shape)
