"""Targets that are not one class for each image: several labels, of which any number hold, or numbers.

cells of a manifest | class folders -> `Target`: names and values of columns, what is unknown -> store -> heads
"""

from __future__ import annotations

import dataclasses

import numpy as np

CLASSIFICATION, MULTILABEL, REGRESSION = TASKS = ("classification", "multilabel", "regression")
UNKNOWN = 255  # of a label that may or may not hold; an unknown number is NaN
TYPES: dict[str, np.dtype] = {MULTILABEL: np.dtype("u1"), REGRESSION: np.dtype("<f8")}
STRATUM = {MULTILABEL: "label", REGRESSION: "range of numbers"}  # what a stratified split has some of in each part
BINS = 10  # of a number, so that each split has small and large ones
OFTEN = 8  # images from which a set of labels is a stratum of its own


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What is to be predicted of each image, apart from a single class.

    Parameters
    ----------
    name : str
        As the user named it, such as ``tags`` or ``age,weight``, with ``|`` for ``/``.
    columns : tuple of str
        Names of the labels or numbers; each occurs once.
    values : uint8 or float64, (n, columns)
        uint8: 1 where a label holds, 0 where it does not, 255 where that is unknown. float64: numbers, NaN if unknown.
    """

    name: str
    columns: tuple[str, ...]
    values: np.ndarray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Target) or self.values.dtype != other.values.dtype:
            return False
        same = np.array_equal(self.values, other.values, equal_nan=self.task == REGRESSION)
        return (self.name, self.columns) == (other.name, other.columns) and same

    __hash__ = None  # type: ignore[assignment]

    @property
    def task(self) -> str:
        """The task that these targets are for, as their type says: ``multilabel`` or ``regression``."""
        return next(task for task, kind in TYPES.items() if kind == self.values.dtype)

    @property
    def known(self) -> np.ndarray:
        """Whether at least one column of a row is known, bool, (n,); other rows are unlabelled."""
        return np.asarray(known_cells(self.values).any(axis=1))

    @property
    def strata(self) -> np.ndarray:
        """A number for rows that are alike, int32, (n,), -1 for unlabelled rows; splits and samples have some of each.

        Of labels it is the rarest one that holds, or their number where none does; sets of labels that many images have are
        told apart. Of numbers it is the tenth in which the first known one lies.
        """
        found = strata_of(self.values)
        found[~self.known] = -1
        return found

    @property
    def codes(self) -> np.ndarray:
        """A number for each set of equal values, int32, (n,); -1 for unlabelled rows."""
        numbers: dict[bytes, int] = {}
        found = [numbers.setdefault(row.tobytes(), len(numbers)) for row in self.values]
        return np.where(self.known, np.array(found, np.int32), -1)

    def some(self, rows: np.ndarray) -> Target:
        """Return the targets of some rows, by index or by a mask."""
        return dataclasses.replace(self, values=self.values[rows])


def known_cells(values: np.ndarray) -> np.ndarray:
    """Whether each cell is known: bool, of the shape of ``values``."""
    return np.asarray(np.isfinite(values) if values.dtype.kind == "f" else values != UNKNOWN)


def strata_of(values: np.ndarray) -> np.ndarray:
    """Strata of rows with at least one known column, int32, (n,); see `Target.strata`."""
    if values.dtype.kind == "f":
        known = known_cells(values)
        first = values[np.arange(len(values)), known.argmax(axis=1)] if len(values) else np.zeros(0)
        rows = np.flatnonzero(np.isfinite(first))
        edges = np.quantile(first[rows], np.linspace(0, 1, BINS + 1)[1:-1]) if len(rows) else np.zeros(0)
        found = np.zeros(len(values), np.int32)
        found[rows] = np.searchsorted(edges, first[rows], side="right")
        return found
    holds = values == 1
    counts = holds.sum(axis=0)
    rarity = np.where(holds, counts, len(values) + 1)
    rarest = rarity.argmin(axis=1) if len(values) else np.zeros(0, np.int64)
    found = np.where(holds.any(axis=1), rarest, values.shape[1]).astype(np.int32)
    sets: dict[bytes, list[int]] = {}
    for place, packed in enumerate(np.packbits(holds, axis=1)):
        sets.setdefault(packed.tobytes(), []).append(place)
    for number, alike in enumerate(rows for rows in sets.values() if len(rows) >= OFTEN):
        found[alike] = values.shape[1] + 1 + number
    return found
