"""Pool stored features to vectors, and compute the statistics that standardise them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from features.errors import HeadError

CHUNK_BYTES = 16 << 20
LEAST_DEVIATION = 0.1  # lower bound of a column's deviation, as a share of the root mean square over all columns


def choose_pool(asked: str | None, usual: str, shape: Sequence[int]) -> str:
    """Choose the pooling for rows of this shape: ``asked``, or else ``usual``; always ``none`` for vectors.

    Raises
    ------
    HeadError
        If rows are none of (d,), (tokens, c) and (h, w, c), or the pooling does not turn them into vectors.
    """
    if len(shape) == 1:
        if asked in ("avg", "max"):
            raise HeadError(f"pool: {asked!r} needs spatial features, but these are vectors ({shape[0]}); leave it out")
        return "none"
    if len(shape) not in (2, 3) and (asked or usual) != "flatten":
        raise HeadError(
            f"features: received rows of shape {tuple(shape)}, but heads expect (d,), (tokens, c) or (h, w, c); use --pool flatten"
        )
    chosen = asked or usual
    if chosen == "none":
        raise HeadError(f"pool: 'none' leaves shape {tuple(shape)}, but heads need vectors; use avg, max or flatten")
    return chosen


def pooled_width(shape: Sequence[int], pool: str) -> int:
    """Number of columns after pooling."""
    return int(np.prod(shape)) if pool in ("none", "flatten") else shape[-1]


def pool_features(X: np.ndarray, pool: str, *, out: np.ndarray | None = None) -> np.ndarray:
    """Pool rows to vectors, piece by piece. The result is always a copy, written to ``out`` if it is given.

    Parameters
    ----------
    X : float16 or float32, (n, d), (n, tokens, c) or (n, h, w, c)
        Features, as stored; averages are computed in float32.
    pool : {"none", "avg", "max", "flatten"}
        Pooling of spatial features, or of tokens.

    Returns
    -------
    float32, (n, d) or (n, c)

    Raises
    ------
    HeadError
        If values are not finite; the message gives the number of such rows.
    """
    pooled = np.empty((len(X), pooled_width(X.shape[1:], pool)), dtype=np.float32) if out is None else out
    bad, axes = 0, tuple(range(1, X.ndim - 1))
    for rows in chunks(X):
        piece = np.asarray(X[rows], dtype=np.float32)
        if pool == "avg":
            piece = piece.mean(axis=axes)
        elif pool == "max":
            piece = piece.max(axis=axes)
        pooled[rows] = piece.reshape(len(piece), -1)
        bad += int(np.sum(~np.isfinite(pooled[rows]).all(axis=1)))
    if bad:
        raise HeadError(f"features: {bad} of {len(X)} rows hold values that are not finite; extract them again")
    return pooled


def check_rows(X: np.ndarray, shape: Sequence[int]) -> None:
    """Refuse rows of the wrong shape.

    Raises
    ------
    HeadError
        If the shapes differ; the message gives both.
    """
    if X.shape[1:] != tuple(shape):
        raise HeadError(f"features: received rows of shape {X.shape[1:]}, but this head expects {tuple(shape)}")


def chunks(X: np.ndarray) -> Iterator[slice]:
    """Slices that cut the rows into pieces of at most `CHUNK_BYTES`, counted as float32."""
    rows = max(1, CHUNK_BYTES // max(1, 4 * int(np.prod(X.shape[1:]))))
    return (slice(start, start + rows) for start in range(0, len(X), rows))


def column_statistics(pieces: Iterable[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, float32, (d,), in one pass over pieces of rows, (k, d).

    Sums are float64 and combined as in Chan, Golub and LeVeque (The American Statistician 37, 1983, equation 1.5). The
    deviation has the lower bound `LEAST_DEVIATION`: dividing by the deviation of a nearly constant column (5e-7 has
    occurred) would amplify any difference on other images, and every step of later fine-tuning. If no column varies,
    all deviations are 1.
    """
    count = 0
    mean, squares = np.zeros(width), np.zeros(width)
    low, high = np.full(width, np.inf, np.float32), np.full(width, -np.inf, np.float32)
    for Z in pieces:
        low, high = np.minimum(low, Z.min(axis=0)), np.maximum(high, Z.max(axis=0))
        here = Z.mean(axis=0, dtype=np.float64)
        total, shift = count + len(Z), here - mean
        squares += np.square(Z - here).sum(axis=0) + np.square(shift) * (count * len(Z) / total)
        mean += shift * (len(Z) / total)
        count = total
    std = np.sqrt(squares / max(count, 1)).astype(np.float32)
    std[low == high] = 0
    least = np.float32(LEAST_DEVIATION * np.sqrt(np.mean(np.square(std, dtype=np.float64))))
    return mean.astype(np.float32), np.maximum(std, least) if least else np.ones_like(std)
