"""scikit-learn classifiers by import path: found, made from plain values, and tried on a few rows before training."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from features.errors import ConfigurationError, nearest
from pipeline.heads.models.converting import model_of
from pipeline.heads.models.parts import NotPlainError
from pipeline.heads.persistence import foreign_types
from pipeline.presets import is_path

_PATH = re.compile(r"sklearn\.([a-z][a-z_]*)\.([A-Za-z]\w*)")
TRIAL_ROWS, TRIAL_COLUMNS = 20, 6  # size of a trial: rows of each class, and columns
_SMALL = {"n_estimators": 4, "max_iter": 20, "n_init": 1}  # upper limits in a trial


CLASSIFIER, REGRESSOR = "classifier", "regressor"  # what a class may be looked for as


def find_class(path: str, what: str = CLASSIFIER) -> Any:
    """Import the classifier, or regressor, ``sklearn.MODULE.CLASS``; it must be public in scikit-learn.

    Raises
    ------
    ConfigurationError
        If there is no such classifier; the message suggests the nearest name.
    """
    import sklearn

    match = _PATH.fullmatch(path)
    modules = [name for name in sklearn.__all__ if name.islower()]
    if match is None or match[1] not in modules:
        received = path.split(".")[1] if path.count(".") else path
        raise ConfigurationError(
            f"head {path!r}: expected sklearn.MODULE.CLASS such as sklearn.svm.LinearSVC{nearest(received, modules)}"
        )
    module = importlib.import_module(f"sklearn.{match[1]}")
    names = [name for name, found in vars(module).items() if name[0] != "_" and _is_a(found, what)]
    if match[2] not in names:
        word = f"is not a {what}" if match[2] in vars(module) else "does not exist"
        raise ConfigurationError(f"head {path!r} {word}{nearest(match[2], names) or f' (known: {names})'}")
    return getattr(module, match[2])


def make_estimator(path: str, params: Mapping[str, Any], seed: int, what: str = CLASSIFIER) -> Any:
    """Make an unfitted classifier, or regressor.

    Parameters
    ----------
    path : str
        ``sklearn.MODULE.CLASS``.
    params : mapping
        Arguments of the class. A value that is an import path, or a mapping from an import path to arguments, is
        replaced by that classifier.
    seed : int
        Value of every ``random_state`` that is not given.

    Raises
    ------
    ConfigurationError
        The class or an argument is unknown (the nearest name is suggested), or the class refuses an argument.
    """
    found = find_class(path, what)
    known = [name for name in inspect.signature(found).parameters if name not in ("args", "kwargs")]
    for name in params:
        if name not in known:
            hint = nearest(name, known) or f" (known: {', '.join(known)})"
            raise ConfigurationError(f"head {path!r}: unknown parameter {name!r}{hint}")
    try:
        made = found(**{name: _value(value, seed) for name, value in params.items()})
    except (TypeError, ValueError) as problem:
        raise ConfigurationError(f"head {path!r}: {problem}") from problem
    free = [
        name for name, value in made.get_params().items() if name.split("__")[-1] == "random_state" and value is None
    ]
    return made.set_params(**dict.fromkeys(free, seed))


def check_estimator(path: str, params: Mapping[str, Any], classes: int = 3) -> None:
    """Fit a classifier to a few rows to check that it accepts its parameters and can be loaded from a run later.

    The trial uses at most three classes.

    Raises
    ------
    ConfigurationError
        If it fails; the message names the parameter, or the types that are not trusted when loading.
    """
    _tried(path, json.dumps(params, sort_keys=True, default=str), min(classes, 3))


@functools.lru_cache(maxsize=256)
def _tried(path: str, params: str, classes: int) -> None:
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    values = json.loads(params)
    made = make_estimator(path, values, 0)
    small = {
        name: min(count, value)
        for name, value in made.get_params().items()
        if (count := _SMALL.get(name.split("__")[-1])) and isinstance(value, int)
    }
    labels = np.repeat(np.arange(classes), TRIAL_ROWS)
    rows = np.random.default_rng(0).normal(size=(len(labels), TRIAL_COLUMNS)).astype(np.float32) + labels[:, None]
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore")  # such as those about convergence, which mean nothing on a few rows
        try:
            made.set_params(**small).fit(rows, labels)
        except Exception as problem:  # whatever a class raises, it is not a head
            raise ConfigurationError(f"head {path!r}: {_first_line(problem)}") from problem
        foreign = _foreign(made)
    if foreign:
        raise ConfigurationError(
            f"head {path!r} is refused: once fitted it contains {', '.join(foreign)}, which is not on the list of types "
            "that may be loaded from a file, so the run could never be opened again; choose another classifier"
        )
    if not hasattr(made, "predict_proba") and not hasattr(made, "decision_function"):
        raise ConfigurationError(f"head {path!r} gives neither probabilities nor margins; choose another classifier")
    wanted = (1,) if classes == 2 else (1, classes)
    if not hasattr(made, "predict_proba") and made.decision_function(rows[:1]).shape != wanted:
        raise ConfigurationError(f"head {path!r}: needs one margin per class; set decision_function_shape: ovr")


def _foreign(fitted: Any) -> list[str]:
    """Types in a fitted classifier that are neither stored as arrays nor loaded from a file."""
    try:
        model_of(fitted, TRIAL_COLUMNS)
    except NotPlainError:
        return foreign_types(fitted)
    return []


def _is_a(found: Any, what: str) -> bool:
    from sklearn.base import ClassifierMixin, RegressorMixin

    mixin = {CLASSIFIER: ClassifierMixin, REGRESSOR: RegressorMixin}[what]
    return inspect.isclass(found) and issubclass(found, mixin) and hasattr(found, "fit")


def _value(value: Any, seed: int) -> Any:
    if is_path(value):
        return make_estimator(value, {}, seed)
    if isinstance(value, Mapping) and len(value) == 1 and is_path(next(iter(value))):
        ((path, params),) = value.items()
        return make_estimator(path, params or {}, seed)
    return value


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or repr(problem)).splitlines()[0]
