"""The tasks by name, and what a store holds for each."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.tasks.classification import Classification
from pipeline.tasks.multilabel import Multilabel
from pipeline.tasks.regression import Regression
from pipeline.tasks.task import Task

CLASSIFICATION: Task = Classification()
TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, Multilabel(), Regression())}
WORST_GROUPS = tuple(dict.fromkeys(task.worst_group for task in TASKS.values()))  # choices that need tables by group
ALL_CHOICES = tuple(dict.fromkeys(by for task in TASKS.values() for by in task.choices))


def task_named(name: str) -> Task:
    """The task of a name."""
    return TASKS[name]


def task_of(store: Any) -> Task:
    """The task that a store was made for."""
    target = store.images.target
    return CLASSIFICATION if target is None else TASKS[target.task]


def names_of(store: Any) -> tuple[str, ...]:
    """Names of what is predicted: the classes, or the columns of the target."""
    target = store.images.target
    return tuple(store.classes if target is None else target.columns)


def targets_of(store: Any, rows: np.ndarray) -> np.ndarray:
    """What is to be predicted of some rows: labels, int32 (n,), or values, uint8 or float64 (n, columns)."""
    target = store.images.target
    return np.asarray(store.images.labels[rows] if target is None else target.values[rows])
