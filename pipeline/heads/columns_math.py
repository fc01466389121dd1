"""Regressions of several columns on rows that come piece by piece, in memory or from the store.

rows --pieces, again for every gradient--> L-BFGS: logistic regressions        rows --sums of products--> ridge regressions
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from features.targets import known_cells
from pipeline.heads.streaming import FeatureStream

# Yields the places of some rows among all, and the rows: float32 or float64, (k, d). It may be called again.
Pieces = Callable[[], Iterator[tuple[slice, np.ndarray]]]


def one_piece(Z: np.ndarray) -> Pieces:
    """Rows in memory as one piece."""
    return lambda: iter([(slice(0, len(Z)), Z)])


def pieces_of(rows: FeatureStream) -> Pieces:
    """All views of the rows of a stream, those of an image next to each other."""

    def read() -> Iterator[tuple[slice, np.ndarray]]:
        for piece, Z in rows.all_views(rows.views):
            yield slice(piece.start * rows.views, piece.stop * rows.views), Z.reshape(-1, rows.width)

    return read


def solve_logistic(
    pieces: Pieces, holds: np.ndarray, weights: np.ndarray, C: float, tolerance: float = 1e-8
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise the log loss of one logistic regression for each column, all together, by L-BFGS.

    The loss of a column is that of scikit-learn's ``LogisticRegression``: half the squared norm of its coefficients plus C
    times the weighted sum of the log losses; the intercept is not penalised.

    Parameters
    ----------
    pieces : callable
        The rows, n of them with d columns.
    holds : bool, (n, c)
    weights : float64, (n, c)
        0 for unknown cells.
    C : float
        Inverse of the penalty.
    tolerance : float
        Greatest component of the gradient of the mean loss at which the search ends.

    Returns
    -------
    coef : float64, (c, d)
    intercept : float64, (c,)
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    n, c = holds.shape
    d = next(pieces())[1].shape[1]
    signs, scale = np.where(holds, 1.0, -1.0), 1.0 / (C * n)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel = flat.reshape(d + 1, c)
        total, gradient = 0.0, np.zeros((d + 1, c))
        for piece, rows in pieces():
            Z = np.asarray(rows, np.float64)
            margins = signs[piece] * (Z @ kernel[:-1] + kernel[-1])
            slope = -signs[piece] * weights[piece] * expit(-margins) / n
            total += (weights[piece] * np.logaddexp(0, -margins)).sum()
            gradient[:-1] += Z.T @ slope
            gradient[-1] += slope.sum(axis=0)
        gradient[:-1] += scale * kernel[:-1]
        return float(total / n + 0.5 * scale * np.square(kernel[:-1]).sum()), gradient.ravel()

    start = np.zeros((d + 1, c))
    options = {
        "maxiter": 1000,
        "maxfun": 5000,
        "gtol": tolerance,
        "ftol": 0.0 if tolerance < 1e-5 else 1e-7,
        "maxcor": 20,
    }
    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(d + 1, c)
    return np.ascontiguousarray(found[:-1].T), found[-1].copy()


def solver_bytes(columns: int) -> int:
    """Bytes that `solve_ridge` takes for rows of so many columns: their products, a copy, and its factor."""
    return 3 * 8 * columns**2


def solve_ridge(pieces: Pieces, y: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regressions of numbers, scikit-learn's ``Ridge``, each on the rows where it is known, by the normal equations.

    Rows are read once for all numbers that are known in the same rows.

    Parameters
    ----------
    pieces : callable
        The rows, n of them with d columns.
    y : float64, (n, c)
        NaN for unknown.
    alpha : float
        The penalty; the intercept is not penalised.

    Returns
    -------
    coef : float64, (c, d)
    intercept : float64, (c,)
    """
    from scipy.linalg import solve

    d = next(pieces())[1].shape[1]
    coef, intercept = np.zeros((y.shape[1], d)), np.zeros(y.shape[1])
    for columns, rows in alike(known_cells(y)):
        middle = y[np.ix_(rows, columns)].mean(axis=0)  # of products of large numbers little would be left
        products, sums, sides = np.zeros((d, d)), np.zeros(d), np.zeros((d, len(columns)))
        for piece, values in pieces():
            some = rows[np.searchsorted(rows, piece.start) : np.searchsorted(rows, piece.stop)]
            Z = np.asarray(values[some - piece.start], np.float64)
            products += Z.T @ Z
            sums += Z.sum(axis=0)
            sides += Z.T @ (y[np.ix_(some, columns)] - middle)
        products -= np.outer(sums, sums / len(rows))
        products[np.diag_indices(d)] += alpha
        found = solve(products, sides, assume_a="pos", overwrite_a=True)
        coef[columns] = found.T
        intercept[columns] = middle - sums / len(rows) @ found
    return coef, intercept


def alike(known: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns that are known in the same rows, and these rows, ascending."""
    patterns: dict[bytes, list[int]] = {}
    for k, column in enumerate(known.T):
        patterns.setdefault(np.packbits(column).tobytes(), []).append(k)
    for columns in patterns.values():
        yield np.array(columns), np.flatnonzero(known[:, columns[0]])
