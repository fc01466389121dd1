"""Nearest neighbours by the cosine of features: exact for queries, and for all rows of a store with each other.

queries x rows, a piece at a time --products--> the best of each query so far --> row numbers, cosines
all rows --project to few columns--> block x block, each pair once --the best of each row--> exact cosines --> row numbers, cosines
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from features.errors import check_range
from features.machine import processors
from features.pixels.batches import ahead
from features.progress import Progress
from pipeline.search.best import Best, above
from pipeline.search.vectors import Vectors

logger = logging.getLogger(__name__)
PROJECTED = 256  # columns after projection
SAMPLE = 2048  # rows from which the projection is learned
TOGETHER = 16  # probes whose products with all rows are in memory
PROBES = 256  # rows whose neighbours are found exactly, to learn how many candidates are needed
SURE = 0.996  # share of the probes' neighbours that has to be among the candidates
# Comparing a candidate costs as much as the products that the projection spares for so many rows. With more candidates all is
# computed exactly.
ROWS_A_CANDIDATE = 200
QUERIES = 4096  # compared with one piece of rows at a time
ROWS = 4096  # of a block, each of which is compared with each
LINES = 256  # rows of one product: 4 MB with those of a block, which stays in the processor's cache
GATHER_BYTES = 1 << 20  # vectors that are compared exactly at a time


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
        turned = np.ascontiguousarray(queries[start : start + QUERIES]).T
        best = Best(turned.shape[1], min(k, count))
        with _one_thread_each():
            for piece, values in vectors.pieces(rows, functools.partial(_products, turned)):
                lines, columns = above(values, best.floor, best.count, 0)
                best.add(columns, piece[lines], values[lines, columns])
                done += len(piece)
                if progress:
                    progress("similar", done, total)
        found.rows[start : start + QUERIES], found.similarity[start : start + QUERIES] = best.sorted()
    np.clip(found.similarity, -1, 1, out=found.similarity)
    return found


def _products(turned: np.ndarray, some: np.ndarray) -> np.ndarray:
    return np.asarray(some @ turned)


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
    true neighbours. If it takes so many that comparing them costs more than it spares, everything is computed exactly.

    Parameters
    ----------
    vectors : Vectors
        The rows.
    k : int, at least 1
        Number of neighbours of each row; fewer are given if there are not so many rows.
    rows : int64, (n,), ascending, optional
        These rows alone, with each other.
    exact : bool
        Without a projection, which may take several times as long.
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
        count = _candidates_needed(vectors, rows, estimates, k, generator)
        if count * ROWS_A_CANDIDATE <= max(len(rows), k * ROWS_A_CANDIDATE):
            best = _best_of_all(lambda part: estimates[part], len(rows), count, progress)
            return _compared(vectors, rows, best, k)
        logger.info("it would take %d candidates for each row; all neighbours are computed exactly", count)
        del estimates
    best = _best_of_all(lambda part: vectors.read(rows[part]), len(rows), k, progress)
    places, cosines = (np.concatenate(column) for column in zip(*(some.sorted() for some in best), strict=True))
    return Neighbours(rows[places], np.clip(cosines, -1, 1))


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
    return min(max(k, int(np.quantile(ranks, SURE, method="higher"))), len(rows) - 1)


def _best_of_all(read: Callable[[slice], np.ndarray], rows: int, count: int, progress: Progress | None) -> list[Best]:
    """The rows with the highest products with each row, itself left out, for each block of rows.

    Each pair of blocks is multiplied once, by one thread: its products serve the rows of both. For every row, others arrive in
    ascending order.
    """
    ends = np.linspace(0, rows, -(-rows // ROWS) + 1).astype(int).tolist()
    blocks = [slice(*pair) for pair in itertools.pairwise(ends)]
    best = [Best(block.stop - block.start, count) for block in blocks]
    pairs = [(first, second) for first in range(len(blocks)) for second in range(first, len(blocks))]

    kept = functools.lru_cache(processors() + 1)(lambda block: read(blocks[block]))  # the first one of a pair stays

    def hits(pair: tuple[int, int]) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        first, second = pair
        mine, others = kept(first), kept(second)
        found = []
        step = (
            len(mine) if np.isneginf(best[second].floor).any() else LINES
        )  # the best of a whole block make a good floor
        for start in range(0, len(mine), step):
            values = mine[start : start + step] @ others.T
            if first == second:
                np.fill_diagonal(values[:, start:], -np.inf)
            lines, columns = above(values, best[first].floor[start : start + step], count, 1)
            found.append((first, lines + start, columns + blocks[second].start, values[lines, columns]))
            if first != second:
                lines, columns = above(values, best[second].floor, count, 0)
                found.append((second, columns, lines + start + blocks[first].start, values[lines, columns]))
        return found

    with ThreadPoolExecutor(processors(), "neighbours") as pool, _one_thread_each():
        for done, found in enumerate(ahead(pool, hits, pairs, processors() + 1), 1):
            for side in {pair_side for pair_side, *_ in found}:
                best[side].add(*map(np.concatenate, zip(*(hit for of, *hit in found if of == side), strict=True)))
            if progress:
                progress("neighbours", done * rows // len(pairs), rows)
    return best


def _compared(vectors: Vectors, rows: np.ndarray, best: list[Best], k: int) -> Neighbours:
    """The k of the candidates of each row that are most similar by exact cosines."""
    found = Neighbours(np.empty((len(rows), k), np.int64), np.empty((len(rows), k), np.float32))
    sizes = [len(some.floor) for some in best]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    step = max(1, GATHER_BYTES // (4 * vectors.width * best[0].count))

    def compare(block: int) -> None:
        candidates = best[block].sorted()[0]
        space = np.empty((step * best[block].count, vectors.width), np.float32)
        for start in range(0, len(candidates), step):
            picked = candidates[start : start + step]
            few = np.arange(starts[block] + start, starts[block] + start + len(picked))
            theirs = vectors.gathered(rows[picked.reshape(-1)], space[: picked.size])
            mine = vectors.gathered(rows[few])
            cosines = np.matmul(theirs.reshape(*picked.shape, -1), mine[:, :, None])[..., 0]
            best_first = np.lexsort((picked, -cosines))[:, :k]
            found.rows[few] = rows[np.take_along_axis(picked, best_first, 1)]
            found.similarity[few] = np.clip(np.take_along_axis(cosines, best_first, 1), -1, 1)

    with ThreadPoolExecutor(processors(), "neighbours") as pool, _one_thread_each():
        list(pool.map(compare, range(len(best))))
    return found


def _without_own(found: Neighbours, rows: np.ndarray, k: int) -> Neighbours:
    """Leave each row out of its own neighbours, or the last of them where many equal rows have crowded it out."""
    own = found.rows == rows[:, None]
    own[~own.any(axis=1), -1] = True
    return Neighbours(*(column[~own].reshape(len(rows), k) for column in found))


def _one_thread_each() -> contextlib.AbstractContextManager[object]:
    """Let each of our threads multiply by itself: BLAS's own threads would wait for one another."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    return threadpool_limits(1)  # type: ignore[no-any-return]
