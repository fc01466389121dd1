"""The interface of a check: it is called with the material of an audit and returns a finding about every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from features.progress import counted

if TYPE_CHECKING:
    from pipeline.auditing.material import Material


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check says about the rows of a store.

    Parameters
    ----------
    score : float32, (n,), 0-1
        How suspicious each row is: 1 most. NaN for rows that the check cannot judge or that the audit leaves out.
    flag : bool, (n,)
        Rows to look at.
    summary : str
        One line for a person.
    suggested : int32, (n,), optional
        Index of the class that the check suggests, -1 for none; None if it suggests no classes.
    info : mapping
        What else it found, as values of JSON.
    """

    score: np.ndarray
    flag: np.ndarray
    summary: str
    suggested: np.ndarray | None = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def judged(self) -> np.ndarray:
        """Whether each row has a score, bool, (n,)."""
        return np.asarray(~np.isnan(self.score))

    def worst(self, limit: int) -> np.ndarray:
        """Flagged rows, int64, the most suspicious first, at most ``limit``."""
        rows = np.flatnonzero(self.flag)
        return rows[np.argsort(-self.score[rows], kind="stable")][:limit]


class Check(Protocol):
    """One kind of thing that may be wrong.

    Attributes
    ----------
    name : str
        As it stands in ``audit.csv``.
    about : str
        What a flag means, in a few words.
    pixels : bool
        Whether the check needs the image files.
    """

    name: str
    about: str
    pixels: bool

    def __call__(self, material: Material) -> Finding:
        """Judge the rows of ``material``."""


def spread(count: int, rows: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Put the scores of some rows into an array for all, float32, (count,), clipped to 0-1; NaN elsewhere."""
    found = np.full(count, np.nan, np.float32)
    found[rows] = np.clip(score, 0, 1)
    return found


def below(values: np.ndarray, bound: float) -> np.ndarray:
    """Score of values that are suspicious if they are small: 1 at 0, more than a half below ``bound``, 0 far above it."""
    return np.asarray(bound / np.maximum(bound + values, np.finfo(np.float64).tiny))


def flag_below(material: Material, values: np.ndarray, bound: float, word: str) -> Finding:
    """Flag the rows of an audit whose value, float64 (n,), NaN for those that are not known, is below a bound."""
    rows = np.flatnonzero(~np.isnan(values))
    flag = values < bound  # NaN is not
    found = counted(int(flag.sum()), "image", "is") if flag.any() else "no image is"
    missing = len(material.rows) - len(rows)
    left = f"; {counted(missing, 'image')} could not be read" if missing else ""
    return Finding(spread(len(values), rows, below(values[rows], bound)), flag, f"{found} {word}{left}")
