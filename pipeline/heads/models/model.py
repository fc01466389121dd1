"""The interface of models that consist of arrays, and the checks that all of them share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from pipeline.scores.metrics import softmax

ARRAYS = "head.npz"
WORKING = 1 << 22  # numbers in a temporary matrix: rows are evaluated in pieces


class DamagedModelError(ValueError):
    """An array or a number of a model read from a file is impossible; the text says which."""


class Model(abc.ABC):
    """A classifier as arrays. Subclasses are frozen dataclasses of arrays, numbers, texts and further models.

    Attributes
    ----------
    kind : str
        Its name in ``head.json``.
    softened : bool
        Value of `soft` for all models of a class.
    of_columns : bool
        Whether it predicts several labels or numbers instead of classes.
    files : tuple of str
        Names of the files of a head of this kind.
    """

    kind: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ("head.json", ARRAYS)
    softened: ClassVar[bool] = False
    of_columns: ClassVar[bool] = False

    @property
    def soft(self) -> bool:
        """Whether softmax turns the outputs into probabilities; otherwise they are probabilities."""
        return self.softened

    @abc.abstractmethod
    def check(self, columns: int, classes: int) -> None:
        """Check shapes, ranges and indices, so that no input of this width can read outside an array or never end.

        Parameters
        ----------
        columns : int
            Number of columns of the rows that it will be given.
        classes : int, >= 2
            Number of classes.

        Raises
        ------
        DamagedModelError
            If something does not fit.
        """

    @abc.abstractmethod
    def outputs(self, Z: np.ndarray) -> np.ndarray:
        """Compute logits or margins if `soft`, otherwise probabilities: float64, (n, c), of rows (n, d).

        Two classes with a single logit or margin m have the outputs [0, m].
        """

    def probabilities(self, Z: np.ndarray) -> np.ndarray:
        """Probabilities: float64, (n, c), without a temperature."""
        return softmax(self.outputs(Z)) if self.soft else self.outputs(Z)

    def described(self, prefix: str = "") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Turn the model into plain values for ``head.json`` and arrays for ``head.npz``.

        An array is named by its field and, inside another model, by the fields that lead to it: ``model.coef``. Items of
        a tuple are numbered: ``weights.0``; the plain values hold their number.
        """
        values: dict[str, Any] = {"kind": self.kind}
        arrays: dict[str, np.ndarray] = {}
        for field in dataclasses.fields(cast(Any, self)):
            value, name = getattr(self, field.name), prefix + field.name
            if isinstance(value, np.ndarray):
                arrays[name] = value
            elif isinstance(value, Model):
                values[field.name], inner = value.described(f"{name}.")
                arrays |= inner
            elif isinstance(value, tuple) and all(isinstance(item, Model) for item in value) and value:
                both = [item.described(f"{name}.{number}.") for number, item in enumerate(value)]
                values[field.name] = [plain for plain, _ in both]
                for _, inner in both:
                    arrays |= inner
            elif isinstance(value, tuple):
                values[field.name] = len(value)
                arrays |= {f"{name}.{number}": item for number, item in enumerate(value)}
            else:
                values[field.name] = value
        return values, arrays

    def save(self, folder: Path) -> dict[str, Any]:
        """Write `files` but ``head.json`` to a folder; return what ``head.json`` says beside what all heads say."""
        values, arrays = self.described()
        with open(folder / ARRAYS, "wb") as file:
            np.savez(file, **cast(Any, arrays))
        return {"format": 2, "model": values}

    @property
    def parameter_count(self) -> int | None:
        """Number of trained parameters; None where counting them makes no sense."""
        return None

    def dense(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Kernel (d, o) and bias (o,) of an equivalent dense layer, with o = 1 for two classes; None if there is none."""
        return None


def need(good: bool | np.bool_, what: str) -> None:
    """Raise `DamagedModelError` with a text, unless ``good``."""
    if not good:
        raise DamagedModelError(what)


def check_floats(name: str, values: np.ndarray, *shape: int | None, least: float = -np.inf) -> None:
    """Check that an array is float32 or float64, finite, not below ``least``, and of a shape; None fits any length."""
    _check_shape(name, values, shape)
    need(values.dtype.kind == "f" and values.dtype.itemsize in (4, 8), f"{name} is {values.dtype}, expected floats")
    need(np.isfinite(values).all(), f"{name} holds values that are not finite")
    need((values >= least).all(), f"{name} holds values below {least:g}")


def check_integers(name: str, values: np.ndarray, *shape: int | None, least: int, below: int) -> None:
    """Check that an array holds integers from ``least`` to ``below`` - 1 and is of a shape; None fits any length."""
    _check_shape(name, values, shape)
    need(
        values.dtype.kind in "iu" and np.can_cast(values.dtype, np.int64),
        f"{name} is {values.dtype}, expected integers",
    )
    inside = not values.size or (values.min() >= least and values.max() < below)
    need(inside, f"{name} holds indices out of bounds: expected {least} to {below - 1}")


def _check_shape(name: str, values: np.ndarray, shape: tuple[int | None, ...]) -> None:
    fits = values.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, values.shape, strict=True))
    need(
        fits, f"{name} has shape {values.shape}, expected ({', '.join('any' if n is None else str(n) for n in shape)})"
    )


def pieces(Z: np.ndarray, width: int) -> Iterator[slice]:
    """Slices of the rows for which a matrix of ``width`` columns has at most `WORKING` numbers."""
    step = max(1, WORKING // max(1, width))
    return (slice(start, start + step) for start in range(0, len(Z), step))


def in_pieces(Z: np.ndarray, width: int, classes: int) -> tuple[np.ndarray, Iterator[slice]]:
    """Make an empty result, float64 (n, classes), and the slices to fill it by."""
    return np.zeros((len(Z), classes)), pieces(Z, width)
