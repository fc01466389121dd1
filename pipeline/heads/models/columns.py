"""Models for several labels or numbers of an image: one output for each column, whatever the number of columns."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from pipeline.heads.models.linear import Product
from pipeline.heads.models.model import WORKING, Model, check_floats, need, pieces


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(Product):
    """A product with one output for each column: log odds of labels, or numbers."""

    kind: ClassVar[str] = "columns"
    of_columns: ClassVar[bool] = True

    def check(self, columns: int, classes: int) -> None:
        check_floats("coef", self.coef, classes, columns)
        check_floats("intercept", self.intercept, classes)

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        return self.product(Z)


@dataclasses.dataclass(frozen=True, eq=False)
class NeighbourMeans(Model):
    """Means over the ``count`` nearest training rows, by Euclidean distance, of those whose value is known.

    ``rows`` is float32 (m, d), ``values`` float64 (m, c) with NaN for unknown, ``prior`` float64 (c,): the answer where none
    of the nearest rows is known.
    """

    kind: ClassVar[str] = "neighbour-means"
    of_columns: ClassVar[bool] = True
    rows: np.ndarray
    values: np.ndarray
    prior: np.ndarray
    count: int

    def check(self, columns: int, classes: int) -> None:
        check_floats("rows", self.rows, None, columns)
        check_floats("prior", self.prior, classes)
        need(self.values.shape == (len(self.rows), classes), f"values has shape {self.values.shape}")
        need(self.values.dtype.kind == "f" and not np.isinf(self.values).any(), "values holds infinite ones")
        need(1 <= self.count <= len(self.rows), f"count is {self.count}, of {len(self.rows)} rows")

    def nearest(self, Z: np.ndarray, most: int) -> np.ndarray:
        """Numbers of the ``most`` nearest rows, nearest first, of equal ones the first: int64, (n, most).

        ``rows`` are taken some at a time, as they may lie in a file.
        """
        found = np.empty((len(Z), most), np.int64)
        step = max(most, WORKING // max(1, self.rows.shape[1]))
        for part in pieces(Z, min(len(self.rows), step + most)):
            rows = Z[part].astype(np.float64)
            best = np.zeros((len(rows), 0))
            numbers = np.zeros((len(rows), 0), np.int64)
            for start in range(0, len(self.rows), step):
                theirs = self.rows[start : start + step].astype(np.float64)
                distances = np.square(theirs).sum(axis=1) - 2 * (rows @ theirs.T)
                best = np.concatenate([best, distances], axis=1)
                places = np.broadcast_to(np.arange(start, start + len(theirs)), distances.shape)
                numbers = np.concatenate([numbers, places], axis=1)
                order = np.argsort(best, axis=1, kind="stable")[:, :most]
                best, numbers = np.take_along_axis(best, order, 1), np.take_along_axis(numbers, order, 1)
            found[part] = numbers
        return found

    def means(self, nearest: np.ndarray) -> np.ndarray:
        """Means of the known values of some rows each: float64, (n, c)."""
        values = self.values[nearest]
        known = np.isfinite(values)
        counts = known.sum(axis=1)
        sums = np.where(known, values, 0).sum(axis=1)
        return np.where(counts > 0, sums / np.maximum(counts, 1), self.prior)

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        return self.means(self.nearest(Z, self.count))
