"""scikit-learn classifiers by their import path: found, made from plain values, and tried on a handful of rows before
any real ones are spent on them."""

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
from pipeline.heads.persistence import foreign_types
from pipeline.presets import is_path

_PATH = re.compile(r"sklearn\.([a-z][a-z_]*)\.([A-Za-z]\w*)")
TRIAL_ROWS, TRIAL_COLUMNS = 20, 6  # rows of each class
_SMALL = {"n_estimators": 4, "max_iter": 20, "n_init": 1}  # in a trial


def find_class(path: str) -> Any:
    """The classifier of ``sklearn.MODULE.CLASS``, as scikit-learn documents it.

    Raises
    ------
    ConfigurationError
        If there is none; the nearest names are given.
    """
    import sklearn

    match = _PATH.fullmatch(path)
    modules = [name for name in sklearn.__all__ if name.islower()]
    if match is None or match[1] not in modules:
        received = path.split(".")[1] if path.count(".") else path
        raise ConfigurationError(
            f"head {path!r}: expected sklearn.MODULE.CLASS, such as sklearn.svm.LinearSVC{nearest(received, modules)}"
        )
    module = importlib.import_module(f"sklearn.{match[1]}")
    names = [name for name, found in vars(module).items() if name[0] != "_" and _is_classifier(found)]
    if match[2] not in names:
        word = "is no classifier" if match[2] in vars(module) else "does not exist"
        raise ConfigurationError(f"head {path!r} {word}{nearest(match[2], names) or f' (known: {names})'}")
    return getattr(module, match[2])


def make_estimator(path: str, params: Mapping[str, Any], seed: int) -> Any:
    """An unfitted classifier.

    Parameters
    ----------
    path : str
        ``sklearn.MODULE.CLASS``.
    params : mapping
        Arguments. One that is an import path, or a mapping from one to arguments, is a classifier itself.
    seed : int
        For every ``random_state`` that is not given.

    Raises
    ------
    ConfigurationError
        Unknown class or argument (the nearest is named), or one that the class refuses.
    """
    found = find_class(path)
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
    """Fit a classifier to a handful of rows: its parameters are accepted, and what is fitted can be loaded again.

    Of more than three classes it is tried on three.

    Raises
    ------
    ConfigurationError
        Saying which parameter, or which types are not on our list.
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
        warnings.simplefilter("ignore")  # about convergence; real rows will tell
        try:
            made.set_params(**small).fit(rows, labels)
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as problem:
            raise ConfigurationError(f"head {path!r}: {_first_line(problem)}") from problem
        foreign = foreign_types(made)
    if foreign:
        raise ConfigurationError(
            f"head {path!r} is refused: once fitted it holds {', '.join(foreign)}, which is not on the list of types "
            "that are loaded from a file, so the run could never be opened again"
        )
    if not hasattr(made, "predict_proba") and not hasattr(made, "decision_function"):
        raise ConfigurationError(f"head {path!r} gives neither probabilities nor margins")
    wanted = (1,) if classes == 2 else (1, classes)
    if not hasattr(made, "predict_proba") and made.decision_function(rows[:1]).shape != wanted:
        raise ConfigurationError(f"head {path!r}: one margin per class is needed (decision_function_shape: ovr)")


def _is_classifier(found: Any) -> bool:
    from sklearn.base import ClassifierMixin

    return inspect.isclass(found) and issubclass(found, ClassifierMixin) and hasattr(found, "fit")


def _value(value: Any, seed: int) -> Any:
    if is_path(value):
        return make_estimator(value, {}, seed)
    if isinstance(value, Mapping) and len(value) == 1 and is_path(next(iter(value))):
        ((path, params),) = value.items()
        return make_estimator(path, params or {}, seed)
    return value


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or repr(problem)).splitlines()[0]
