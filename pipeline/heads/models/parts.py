"""scikit-learn objects as a class name and attributes, whether they are in memory or described by a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class NotPlainError(Exception):
    """A classifier, or an attribute of it, has no equivalent in arrays here; the text says which."""


class Part:
    """A scikit-learn object whose attributes are decoded when they are asked for.

    Parameters
    ----------
    name : str
        ``sklearn.MODULE.CLASS``, as scikit-learn names it itself.
    attributes : mapping
        Undecoded attributes.
    decode : callable
        Turns one into a number, text, None, list, mapping, array or `Part`; anything else into `NOTHING`.
    """

    def __init__(self, name: str, attributes: Mapping[str, Any], decode: Callable[[Any], Any]) -> None:
        self.name, self._attributes, self._decode = name, attributes, decode

    @property
    def short(self) -> str:
        """The name of the class, if it is scikit-learn's."""
        return self.name.rpartition(".")[2] if self.name.startswith("sklearn.") else ""

    def has(self, name: str) -> bool:
        """Whether there is an attribute of this name."""
        return name in self._attributes

    def __getitem__(self, name: str) -> Any:
        if name not in self._attributes:
            raise NotPlainError(f"{self.short} has no {name}")
        return self._decode(self._attributes[name])

    def part(self, name: str) -> Part:
        """An attribute that is an object."""
        found: Part = self._expected(name, self[name], Part)
        return found

    def parts(self, name: str) -> list[Part]:
        """An attribute that is a list of objects, or of lists of objects, as one list."""
        found: list[Part] = []
        for item in self._expected(name, self[name], list):
            for inner in item if isinstance(item, list) else [item]:
                found.append(self._expected(name, inner, Part))
        return found

    def array(self, name: str, kinds: str = "f") -> np.ndarray:
        """An attribute that is an array, number or list of numbers, whose dtype is of one of these kinds."""
        values = self[name]
        if all(type(value) in (int, float) for value in (values if isinstance(values, list) else [values])):
            values = np.array(values)
        found: np.ndarray = self._expected(name, values, np.ndarray)
        if found.dtype.kind not in kinds:
            raise NotPlainError(f"{name} of {self.short} is {found.dtype}")
        return found

    def number(self, name: str) -> float:
        """An attribute that is a number."""
        value = self[name]
        if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "fiu":
            value = value.item()
        return float(self._expected(name, value, int | float))

    def text(self, name: str) -> str:
        """An attribute that is a text."""
        found: str = self._expected(name, self[name], str)
        return found

    def _expected(self, name: str, value: Any, kind: Any) -> Any:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise NotPlainError(f"{name} of {self.short} is {type(value).__name__}")
        return value


NOTHING = object()  # what is not decoded: functions, types, random states


def live(value: Any) -> Any:
    """Decode an attribute of a fitted classifier, or the classifier itself."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [live(item) for item in value]
    if isinstance(value, dict):
        return {key: live(item) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return live(value.tolist()) if value.dtype.hasobject and not value.dtype.names else value
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name.startswith("sklearn."):
        state = value.__getstate__()
        return Part(name, state if isinstance(state, dict) else {}, live)
    return NOTHING
