"""Make models again from their descriptions: plain values and named arrays."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.heads.models.columns import Columns, NeighbourMeans
from pipeline.heads.models.ensembles import Averaged, Calibrated, Voting
from pipeline.heads.models.linear import Gaussian, Layers, Linear, Projected, SupportVectors
from pipeline.heads.models.model import Model, need
from pipeline.heads.models.neighbours import Neighbours
from pipeline.heads.models.trees import Boosting, Forest

MODELS: tuple[type[Model], ...] = (
    *(Linear, Projected, Layers, SupportVectors, Gaussian),
    *(Neighbours, Forest, Boosting, Averaged, Voting, Calibrated, Columns, NeighbourMeans),
)
KINDS: dict[str, type[Model]] = {model.kind: model for model in MODELS}
DEEPEST = 8  # models inside models
Arrays = Callable[[str], np.ndarray]  # name -> array; KeyError if there is none


def restored(values: Any, arrays: Arrays, prefix: str = "", depth: int = 0) -> Model:
    """Make a model from what `Model.described` gave. `Model.check` still has to be called.

    Raises
    ------
    DamagedModelError
        If the values are not those of a model.
    KeyError
        If an array is missing.
    """
    need(isinstance(values, Mapping) and depth < DEEPEST, f"expected models inside models, at most {DEEPEST} deep")
    kind = values.get("kind")
    need(isinstance(kind, str) and kind in KINDS, f"kind is {str(kind)[:40]!r}, expected one of {', '.join(KINDS)}")
    model = KINDS[kind]
    hints = typing.get_type_hints(model)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(typing.cast(Any, model))}
    wanted = {"kind", *(name for name, hint in fields.items() if hint is not np.ndarray)}
    need(set(values) == wanted, f"a {kind} has the keys {_names(values)}, expected {_names(wanted)}")
    found: dict[str, Any] = {}
    for field, hint in fields.items():
        name, value = prefix + field, values.get(field)
        if hint is np.ndarray:
            found[field] = arrays(name)
        elif hint is Model:
            found[field] = restored(value, arrays, f"{name}.", depth + 1)
        elif hint == tuple[Model, ...]:
            need(isinstance(value, list), f"{name}: expected a list of models")
            inner = enumerate(typing.cast(list[Any], value))
            found[field] = tuple(restored(item, arrays, f"{name}.{number}.", depth + 1) for number, item in inner)
        elif hint == tuple[np.ndarray, ...]:
            need(type(value) is int and value >= 0, f"{name}: expected a number of arrays")
            found[field] = tuple(arrays(f"{name}.{number}") for number in range(typing.cast(int, value)))
        else:
            found[field] = _plain(name, value, hint)
    return model(**found)


def _plain(name: str, value: Any, hint: Any) -> Any:
    """A number, text or truth value of the type that a field has."""
    kinds = typing.get_args(hint) or (hint,)
    if type(value) is int and float in kinds and int not in kinds and abs(value) < 1 << 53:
        value = float(value)
    good = type(value) in kinds and not (isinstance(value, float) and not math.isfinite(value))
    need(good, f"{name}: received {str(value)[:40]!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _names(keys: Any) -> str:
    return ", ".join(sorted(str(key)[:40] for key in list(keys)[:20]))
