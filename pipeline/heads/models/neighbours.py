"""A model that keeps its training rows: the nearest ones, or all within a radius, vote."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from features.errors import HeadError
from pipeline.heads.models.model import Model, check_floats, check_integers, in_pieces, need

# Our names of distances, and SciPy's where it computes them.
METRICS = {
    "euclidean": "",
    "cosine": "",
    "manhattan": "cityblock",
    "chebyshev": "chebyshev",
    "minkowski": "minkowski",
}
EQUAL = 1e-13  # a squared distance below this share of the squared lengths is rounding: the rows are equal


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbours(Model):
    """Votes of training rows: float32 or float64, (m, d), with integer ``labels`` (m,).

    The ``count`` nearest rows vote, of equal distances the first ones; or all rows up to ``radius``, with ``outlier`` the
    class of rows that have none, -1 if there is no such class. One of ``count`` and ``radius`` is None. With
    ``by_distance`` the votes are weighted by 1 / distance, and only rows at distance 0 vote where there are any.
    ``p`` is the exponent of the Minkowski distance.
    """

    kind: ClassVar[str] = "neighbours"
    rows: np.ndarray
    labels: np.ndarray
    classes: int
    metric: str
    p: float
    by_distance: bool
    count: int | None
    radius: float | None
    outlier: int

    def check(self, columns: int, classes: int) -> None:
        need(self.metric in METRICS, f"metric is {self.metric[:40]!r}, expected {', '.join(METRICS)}")
        need(self.classes == classes, f"classes is {self.classes}, expected {classes}")
        need(1e-3 < self.p < 1e3, f"p is {self.p:g}, expected 0.001 to 1000")
        check_floats("rows", self.rows, None, columns)
        check_integers("labels", self.labels, len(self.rows), least=0, below=classes)
        need((self.count is None) != (self.radius is None), "expected either count or radius")
        need(
            self.count is None or 1 <= self.count <= len(self.rows), f"count is {self.count}, of {len(self.rows)} rows"
        )
        need(-1 <= self.outlier < classes, f"outlier is {self.outlier}, expected -1 to {classes - 1}")

    def _distances(self, Z: np.ndarray) -> np.ndarray:
        if self.metric == "cosine":  # in the precision of the rows, as scikit-learn does
            lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (Z, self.rows)]
            ours, theirs = (
                rows / np.where(size == 0, 1, size) for rows, size in zip((Z, self.rows), lengths, strict=True)
            )
            return np.asarray(np.clip(1 - ours @ theirs.T, 0, 2), np.float64)
        ours, theirs = np.asarray(Z, np.float64), np.asarray(self.rows, np.float64)
        if self.metric == "euclidean":
            lengths_of = np.square(ours).sum(axis=1)[:, None] + np.square(theirs).sum(axis=1)
            squares = lengths_of - 2 * (ours @ theirs.T)
            return np.sqrt(np.where(squares < EQUAL * lengths_of, 0, squares))
        from scipy.spatial.distance import cdist

        more = {"p": self.p} if self.metric == "minkowski" else {}
        return np.asarray(cdist(ours, theirs, METRICS[self.metric], **more))

    def _voting(self, distances: np.ndarray) -> np.ndarray:
        """Which rows vote: bool, (n, m)."""
        if self.count is None:
            return np.asarray(distances <= self.radius)
        if self.count == len(self.rows):
            return np.ones(distances.shape, bool)
        last = np.partition(distances, self.count - 1, axis=1)[:, self.count - 1, None]
        closer, equal = distances < last, distances == last
        free = self.count - closer.sum(axis=1, keepdims=True)
        return np.asarray(closer | (equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= free)))

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        found, rows = in_pieces(Z, len(self.rows) + self.classes, self.classes)
        for part in rows:
            distances = self._distances(Z[part])
            row, column = np.nonzero(self._voting(distances))
            votes = np.ones(len(row))
            if self.by_distance:
                away = distances[row, column]
                same = np.zeros(len(distances), bool)
                same[row[away == 0]] = True
                with np.errstate(divide="ignore"):
                    votes = np.where(same[row], away == 0, 1 / away)
            size = len(distances) * self.classes
            table = np.bincount(row * self.classes + self.labels[column], votes, size).reshape(-1, self.classes)
            totals = table.sum(axis=1, keepdims=True)
            alone = totals[:, 0] == 0
            if alone.any() and self.outlier < 0:
                raise HeadError(
                    f"{int(alone.sum())} rows have no training row within the radius of {self.radius:g}; train the head "
                    "with a larger radius, or with outlier_label=most_frequent"
                )
            found[part] = table / np.where(totals == 0, 1, totals)
            found[part][alone] = np.eye(self.classes)[self.outlier]
        return found
