"""The nearest class mean, by direction: for 1 to 20 images a class, where heads with more freedom have nothing to choose it by.

    rows - mean of all rows --> unit length --> mean of each class --> unit length --> cosine --temperature--> probabilities

Rows are not standardised: deviations of a few rows are noise, and dividing by them costs up to 18 points of accuracy (Wang et al.,
SimpleShot, 2019, centre and normalise instead). The cosine to a class mean is a linear function of the row, up to the length of
the row, so that the head is kept, fine-tuned and exported like any linear one. The temperature is fitted on rows out of
fold. A class of a single image leaves none; where all are, the temperature stays 1, and the probabilities are cautious: close
to each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipeline.heads.classifiers import SklearnHead
from pipeline.heads.models.linear import Linear, Projected

TINY = 1e-12  # least length of a row that is divided by


class Means(NamedTuple):
    """Margins ``Z @ coef_.T + intercept_``: float64, (o, d) and (o,), o = 1 for two classes."""

    coef_: np.ndarray
    intercept_: np.ndarray

    @classmethod
    def of(cls, Z: np.ndarray, y: np.ndarray) -> Means:
        """Find the directions of the means of the classes 0, 1, ... of rows, float (n, d), labels int (n,)."""
        centre = Z.mean(axis=0, dtype=np.float64)
        rows = Z - centre
        lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)
        means = np.stack([(rows / lengths)[y == k].mean(axis=0) for k in range(int(y.max()) + 1)])
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), TINY)
        coef = means / lengths.mean()
        if len(coef) == 2:
            coef = coef[1:] - coef[:1]
        return cls(coef, -coef @ centre)


class NearestMeanHead(SklearnHead):
    """The class whose mean of the training rows has the most similar direction."""

    def warm_up(self) -> None:
        """Import nothing: NumPy fits it."""

    def _made(self, value: Any, Z: np.ndarray, y: np.ndarray, **more: Any) -> Means:
        return Means.of(Z, y)

    def _keep(self, estimator: Any, value: Any, projection: Any = None) -> None:
        model = Linear(estimator.coef_, estimator.intercept_)
        self.model = model if projection is None else Projected(projection.components_, projection.mean_, model)
