"""Numerical helpers of scikit-learn heads: the search for a penalty, and rows expressed in a basis of their span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.heads.pooling import CHUNK_BYTES


def climb(score: Callable[[float], Any], start: int, least: int, greatest: int) -> float:
    """Find the power of ten with the lowest score: first whole exponents, starting at ``start``, then half exponents.

    The out-of-fold score of an L2 penalty has a single minimum; walking to it avoids the slow fits with weak penalties.
    """
    tried: dict[float, Any] = {}

    def at(exponent: float) -> Any:
        if exponent not in tried:
            tried[exponent] = score(10.0**exponent)
        return tried[exponent]

    best = float(start)
    for step in (1, -1):
        while least <= best + step <= greatest and at(best) > at(best + step):
            best += step
    return float(10.0 ** min((best, best - 0.5, best + 0.5), key=at))


def row_space(Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Express rows in an orthonormal basis of their span.

    Returns
    -------
    coordinates : float64, (n, r), r <= n
        Coordinates of the rows, with the same distances and inner products as the rows of ``Z``.
    combination : float64, (r, n)
        ``combination @ Z`` is the basis.
    """
    gram = np.zeros((len(Z), len(Z)))
    step = max(1, CHUNK_BYTES // (8 * len(Z)))
    for start in range(0, Z.shape[1], step):
        columns = Z[:, start : start + step].astype(np.float64)
        gram += columns @ columns.T
    values, vectors = np.linalg.eigh(gram)
    kept = values > values[-1] * len(Z) * np.finfo(np.float64).eps
    lengths = np.sqrt(values[kept])
    return vectors[:, kept] * lengths, (vectors[:, kept] / lengths).T


def times(left: np.ndarray, Z: np.ndarray) -> np.ndarray:
    """Compute ``left @ Z`` in float64, a few columns at a time, so that ``Z`` is not copied as a whole."""
    step = max(1, CHUNK_BYTES // (8 * len(Z)))
    parts = [left @ Z[:, start : start + step].astype(np.float64) for start in range(0, Z.shape[1], step)]
    return np.concatenate(parts, axis=-1)
