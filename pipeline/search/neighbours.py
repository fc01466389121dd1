"""Nearest neighbours by the cosine of features: exact for queries, and for all rows of a store with each other.

queries x rows, a piece at a time --products--> the best of each query so far --> row numbers, cosines
all rows --project to few columns--> candidates of each row --exact cosines--> row numbers, cosines
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from features.errors import check_range
from features.machine import processors
from features.pixels.batches import ahead
from features.progress import Progress
from pipeline.search.vectors import Vectors

logger = logging.getLogger(__name__)
PROJECTED = 256  # columns after projection
SAMPLE = 2048  # rows from which the projection is learned
TOGETHER = 16  # probes whose products with all rows are in memory
PROBES = 256  # rows whose neighbours are found exactly, to learn how many candidates are needed
SURE = 0.996  # share of the probes' neighbours that has to be among the candidates
MOST_CANDIDATES = 1024  # where more are needed, all is computed exactly
QUERIES = 4096  # compared with one piece of rows at a time
OWN_ROWS, OTHER_ROWS = 256, 4096  # sides of one product of projected rows; 4 MB, which stays in the processor's cache
GATHER_BYTES = 32 << 20  # vectors that are compared exactly at a time


class Neighbours(NamedTuple):
    """The nearest rows of each query, most similar first; of equally similar rows the first.

    Parameters
    ----------
    rows : int64, (q, k)
        Row numbers in the store.
    similarity : float32, (q, k), -1 to 1
        Cosines.
    """

    rows: np.ndarray
    similarity: np.ndarray


def nearest(
    vectors: Vectors,
    queries: np.ndarray,
    k: int,
    *,
    rows: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Neighbours:
    """Find the rows most similar to each query, exactly, in one pass over the store for every 4,096 queries.

    Parameters
    ----------
    vectors : Vectors
        The rows to search.
    queries : float32, (q, d)
        Vectors of length 1.
    k : int, at least 1
        Number of neighbours of each query; fewer are given if there are not so many rows.
    rows : int64, (n,), ascending, optional
        Search these rows alone.
    progress : callable, optional
        Called with ``("similar", done, total)``, in rows.
    """
    check_range("k", k, 1, 1_000_000)
    count = len(vectors) if rows is None else len(rows)
    total, done = count * -(-len(queries) // QUERIES), 0
    found = Neighbours(
        np.zeros((len(queries), min(k, count)), np.int64), np.zeros((len(queries), min(k, count)), np.float32)
    )
    for start in range(0, len(queries), QUERIES):
        some = np.ascontiguousarray(queries[start : start + QUERIES])
        best = _Best(len(some), min(k, count))
        for piece, values in vectors.pieces(rows):
            best.add(some @ values.T, piece)
            done += len(piece)
            if progress:
                progress("similar", done, total)
        found.rows[start : start + QUERIES], found.similarity[start : start + QUERIES] = best.sorted()
    return found


def nearest_of_all(
    vectors: Vectors,
    k: int,
    *,
    rows: np.ndarray | None = None,
    exact: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Neighbours:
    """Find the rows most similar to each row, itself left out.

    Vectors of more than 256 columns are projected to 256 principal components. Candidates are the rows that are most similar
    there, and are compared exactly. How many candidates it takes is measured on 256 rows: as many as hold 99.6 % of their
    true neighbours. If that takes more than 1,024, everything is computed exactly.

    Parameters
    ----------
    vectors : Vectors
        The rows.
    k : int, at least 1
        Number of neighbours of each row; fewer are given if there are not so many rows.
    rows : int64, (n,), ascending, optional
        These rows alone, with each other.
    exact : bool
        Without a projection, which takes several times as long.
    seed : int
        Random seed of the samples.
    progress : callable, optional
        Called with ``("neighbours", done, total)``, in rows.

    Returns
    -------
    Neighbours
        One line for each of ``rows``, or for each row of the store.
    """
    check_range("k", k, 1, 1_000_000)
    rows = np.arange(len(vectors)) if rows is None else rows
    k = min(k, len(rows) - 1)
    if k < 1:
        return Neighbours(np.zeros((len(rows), 0), np.int64), np.zeros((len(rows), 0), np.float32))
    if not exact and vectors.width > PROJECTED:
        generator = np.random.default_rng(seed)
        estimates = _projected(vectors, rows, generator)
        if count := _candidates_needed(vectors, rows, estimates, k, generator):
            return _reranked(vectors, rows, estimates, k, count, progress)
        logger.info("features cannot be projected to %d columns; all neighbours are computed exactly", PROJECTED)
    return _without_own(_all_exactly(vectors, rows, k + 1, progress), rows, k)


class _Best:
    """The best columns of each query so far. Values come in blocks; only those above a query's worst are looked at."""

    def __init__(self, queries: int, count: int) -> None:
        self._count = count
        self._floor = np.full(queries, -np.inf, np.float32)
        self._query = self._column = np.zeros(0, np.int64)
        self._value = np.zeros(0, np.float32)
        self._sorted = 0

    def add(self, values: np.ndarray, columns: np.ndarray) -> None:
        """Add values, float32 (q, m), of columns, int64 (m,)."""
        hits = np.flatnonzero(self._above(values).reshape(-1))
        if not len(hits):
            return
        query, place = np.divmod(hits, values.shape[1])
        self._query = np.concatenate([self._query, query])
        self._column = np.concatenate([self._column, columns[place]])
        self._value = np.concatenate([self._value, values.reshape(-1)[hits]])
        if len(self._query) - self._sorted > max(len(self._floor) * self._count // 4, 1024):
            self._compress()

    def _above(self, values: np.ndarray) -> np.ndarray:
        """Which values may be among the best, bool (q, m); while there is no floor yet, the best of this block alone."""
        columns = values.shape[1]
        if self._floor[0] > -np.inf or columns <= self._count:
            return values > self._floor[:, None]
        worst = np.partition(values, columns - self._count, axis=1)[:, columns - self._count, None]
        above, equal = values > worst, values == worst
        room = self._count - above.sum(axis=1, keepdims=True)
        return np.asarray(above | (equal & (np.cumsum(equal, axis=1) <= room)))

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Columns and values of each query, (q, count), best first."""
        self._compress()
        shape = (len(self._floor), self._count)
        return self._column.reshape(shape), np.clip(self._value.reshape(shape), -1, 1)

    def _compress(self) -> None:
        order = np.lexsort((self._column, -self._value, self._query))
        sizes = np.bincount(self._query, minlength=len(self._floor))
        ends = np.cumsum(sizes)
        place = np.arange(len(order)) - np.repeat(ends - sizes, sizes)
        kept = order[place < self._count]
        full = sizes >= self._count
        self._floor[full] = self._value[order[(ends - sizes)[full] + self._count - 1]]
        self._query, self._column, self._value = self._query[kept], self._column[kept], self._value[kept]
        self._sorted = len(kept)


def _projected(vectors: Vectors, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The rows in principal components of a sample, float32 (n, PROJECTED), whose products estimate cosines.

    Components are those of the second moments, not of the covariance: they keep the products of rows best.
    """
    sample = vectors.at(np.sort(generator.choice(rows, min(SAMPLE, len(rows)), replace=False)))
    if sample.shape[1] <= len(sample):
        basis = np.linalg.eigh(sample.T @ sample)[1][:, -PROJECTED:]
    else:
        sizes, turns = np.linalg.eigh(sample @ sample.T)
        basis = sample.T @ (turns[:, -PROJECTED:] / np.sqrt(np.maximum(sizes[-PROJECTED:], np.finfo(np.float32).tiny)))
    estimates, done = np.empty((len(rows), basis.shape[1]), np.float32), 0
    for piece, values in vectors.pieces(rows):
        np.matmul(values, basis, out=estimates[done : done + len(piece)])
        done += len(piece)
    return estimates


def _candidates_needed(
    vectors: Vectors, rows: np.ndarray, estimates: np.ndarray, k: int, generator: np.random.Generator
) -> int:
    """How many of the rows with the best estimates hold almost all true neighbours; 0 if it takes too many."""
    probes = np.sort(generator.choice(len(rows), min(PROBES, len(rows)), replace=False))
    found = nearest(vectors, vectors.at(rows[probes]), k + 1, rows=rows)
    true = _without_own(found, rows[probes], k)
    ranks = np.empty(true.rows.shape, np.int64)
    for start in range(0, len(probes), TOGETHER):
        some = probes[start : start + TOGETHER]
        products = estimates[some] @ estimates.T
        products[np.arange(len(some)), some] = -np.inf
        for line, values in enumerate(products, start):
            theirs = values[np.searchsorted(rows, true.rows[line])]
            ranks[line] = 1 + np.count_nonzero(values > theirs[:, None], axis=1)
    needed = max(k, int(np.quantile(ranks, SURE, method="higher")))
    most = min(MOST_CANDIDATES, len(rows) - 1)
    return min(needed, most) if needed <= MOST_CANDIDATES else 0


def _reranked(
    vectors: Vectors, rows: np.ndarray, estimates: np.ndarray, k: int, count: int, progress: Progress | None
) -> Neighbours:
    """Compare the candidates of each row exactly."""
    found = Neighbours(np.empty((len(rows), k), np.int64), np.empty((len(rows), k), np.float32))
    # Neighbours often lie side by side in the store. In a random order, good candidates are met early.
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = estimates[order]
    step = max(1, GATHER_BYTES // (4 * vectors.width * (count + 1)))

    def candidates(start: int) -> tuple[int, np.ndarray]:
        own = np.arange(start, min(start + OWN_ROWS, len(rows)))
        best = _Best(len(own), count + 1)
        for begin in range(0, len(rows), OTHER_ROWS):
            others = shuffled[begin : begin + OTHER_ROWS]
            best.add(estimates[start : start + OWN_ROWS] @ others.T, order[begin : begin + OTHER_ROWS])
        chosen = best.sorted()[0]
        for few in np.split(own, range(step, len(own), step)):
            picked = chosen[few - start]
            mine = vectors.gathered(rows[few])
            theirs = vectors.gathered(rows[picked.reshape(-1)]).reshape(*picked.shape, -1)
            cosines = np.matmul(theirs, mine[:, :, None])[..., 0]
            cosines[picked == few[:, None]] = -np.inf
            best_first = np.lexsort((picked, -cosines))[:, :k]
            found.rows[few] = rows[np.take_along_axis(picked, best_first, 1)]
            found.similarity[few] = np.clip(np.take_along_axis(cosines, best_first, 1), -1, 1)
        return start, own

    with ThreadPoolExecutor(processors(), "neighbours") as pool, _one_thread_each():
        for start, own in ahead(pool, candidates, range(0, len(rows), OWN_ROWS), 2 * processors()):
            if progress:
                progress("neighbours", start + len(own), len(rows))
    return found


def _all_exactly(vectors: Vectors, rows: np.ndarray, k: int, progress: Progress | None) -> Neighbours:
    parts = []
    for start in range(0, len(rows), QUERIES):
        some = rows[start : start + QUERIES]
        parts.append(nearest(vectors, vectors.at(some), k, rows=rows))
        if progress:
            progress("neighbours", start + len(some), len(rows))
    return Neighbours(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _without_own(found: Neighbours, rows: np.ndarray, k: int) -> Neighbours:
    """Leave each row out of its own neighbours, or the last of them where many equal rows have crowded it out."""
    own = found.rows == rows[:, None]
    own[~own.any(axis=1), -1] = True
    return Neighbours(*(column[~own].reshape(len(rows), k) for column in found))


def _one_thread_each() -> contextlib.AbstractContextManager[object]:
    """Let each of our threads multiply by itself: BLAS's own threads would wait for one another."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    return threadpool_limits(1)  # type: ignore[no-any-return]
