"""Numerical helpers of scikit-learn heads: the search for a penalty, and rows in the space that they span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.heads.pooling import CHUNK_BYTES


def climb(score: Callable[[float], Any], start: int, least: int, greatest: int) -> float:
    """The value with the lowest score, in half decades: decades from ``10**start`` on, then the halves beside.

    The out-of-fold score of an L2 penalty has one valley; walking to it saves the slow, weakly penalised fits.
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
    return 10.0 ** min((best, best - 0.5, best + 0.5), key=at)


def row_space(Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in an orthonormal basis of their span.

    Returns
    -------
    coordinates : float64, (n, r), r <= n
        The same distances and inner products as the rows of ``Z``.
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
    """``left @ Z`` in float64, some columns at a time: no copy of all rows."""
    step = max(1, CHUNK_BYTES // (8 * len(Z)))
    parts = [left @ Z[:, start : start + step].astype(np.float64) for start in range(0, Z.shape[1], step)]
    return np.concatenate(parts, axis=-1)
