"""Rows of a feature set as vectors of length 1, read from the store a piece at a time.

stored rows --pool--> (k, d) --normalise--> float32, length 1, so that a product of two of them is their cosine

Work goes in slices that stay in the processor's cache from the stored number to what is made of the vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from features.machine import processors
from features.pixels.batches import ahead
from features.store.schema import CHECKSUM_BLOCK_BYTES, block_rows
from pipeline.heads.pooling import choose_pool, pool_features, pooled_width

if TYPE_CHECKING:
    from features.store.reader import FeatureStore

READ_BYTES = 4 << 20  # of one read, as stored
SLICE_BYTES = (
    2 << 20
)  # of vectors, so that they stay in the cache; threads that take turns too often wait for each other
READERS = 8  # threads that read, at most: each holds a few pieces


class Vectors:
    """View 0 of one feature set of a store. Spatial features and tokens are averaged.

    Parameters
    ----------
    store : FeatureStore
        The store; its checksums are verified on first use.
    name : str, optional
        Feature set; may be left out if the store has only one.

    Attributes
    ----------
    width : int
        Number of columns, d.

    Raises
    ------
    ConfigurationError
        If there is no such feature set.
    """

    def __init__(self, store: FeatureStore, name: str | None = None) -> None:
        self._store = store
        self.name = store.feature_set(name)
        shape = store.shape(self.name)
        dtype = np.dtype(store.recipes[self.name].dtype)
        self._pool = choose_pool(None, "avg", shape[2:])
        self.width = pooled_width(shape[2:], self._pool)
        self._count = len(store)
        blocks = READ_BYTES // CHECKSUM_BLOCK_BYTES
        self._step = max(1, blocks) * block_rows(shape, dtype)  # whole blocks, so that each is verified once

    def __len__(self) -> int:
        """Number of rows of the store."""
        return self._count

    def pieces(
        self, rows: np.ndarray | None = None, make: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield row numbers, int64 (k,), and their vectors, float32 (k, d), in order; all rows by default.

        Rows are read and normalised by threads a little ahead of their use. A row of zeros stays zeros: it is similar to none.

        Parameters
        ----------
        rows : int64, (n,), ascending, optional
            The rows to read.
        make : callable, optional
            Called by the threads with some vectors, float32 (m, d), which it must not keep. What it makes of them, (m, ...),
            is yielded in their place.
        """
        readers = min(processors(), READERS)
        with ThreadPoolExecutor(readers, "vectors") as pool:
            yield from ahead(pool, lambda some: self._piece(some, make), self._cut(rows), readers + 1)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of these rows, float32 (n, d), in their order; a row may be named more than once."""
        wanted, place = np.unique(rows, return_inverse=True)
        none = np.zeros((0, self.width), np.float32)
        return np.concatenate([none, *(values for _, values in self.pieces(wanted))])[place]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of rows, int64 (n,), ascending, as float32 (n, d); the calling thread reads them."""
        return np.concatenate([self._piece(some)[1] for some in self._cut(rows)])

    def gathered(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return the vectors of few rows that lie far apart, float32 (n, d): only these are read, through a memory map.

        ``out``, float32 (n, d), takes them; fresh memory for each call takes longer than the copy.
        """
        out = np.empty((len(rows), self.width), np.float32) if out is None else out
        array = self._array
        if self._pool != "none":
            out[:] = pool_features(np.asarray(array[rows, 0]), self._pool)
        elif self._store.kind != "index" and array.dtype == np.float32:
            # As bytes: NumPy would copy the whole file where its numbers do not lie at multiples of four.
            stored = array.reshape(-1, self.width).view(np.uint8)
            np.take(stored, rows * array.shape[1], axis=0, out=out.view(np.uint8), mode="clip")
        else:
            widened(np.asarray(array[rows, 0]), out)
        return normalised(out)

    def of_features(self, values: np.ndarray) -> np.ndarray:
        """Turn features as a network gives them, (n, ...), into vectors like those of the store, float32 (n, d)."""
        return self._vectors(values)

    # -- inside
    @functools.cached_property
    def _array(self) -> Any:  # mapped once, as each new map is read page by page again
        return self._store.array(self.name)

    def _cut(self, rows: np.ndarray | None) -> Iterator[np.ndarray]:
        if rows is None:
            yield from (
                np.arange(start, min(start + self._step, self._count)) for start in range(0, self._count, self._step)
            )
        elif len(rows):
            yield from np.split(rows, np.flatnonzero(np.diff(rows // self._step)) + 1)

    def _piece(
        self, rows: np.ndarray, make: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        first, last = int(rows[0]), int(rows[-1])
        stored = self._store.read(self.name, first, last + 1)[:, 0]
        return rows, self._vectors(stored if len(rows) == len(stored) else stored[rows - first], make)

    def _vectors(self, stored: np.ndarray, make: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        step = max(1, SLICE_BYTES // (4 * self.width))
        out = np.empty((len(stored) if make is None else min(step, len(stored)), self.width), np.float32)
        made = []
        for start in range(0, len(stored), step):
            some = stored[start : start + step]
            values = out[: len(some)] if make else out[start : start + step]
            if self._pool == "none":
                widened(some, values)  # finite, as the store has checked
            else:
                values[:] = pool_features(some, self._pool)
            normalised(values)
            if make:
                made.append(make(values))
        return np.concatenate(made) if make and made else out


def widened(values: np.ndarray, out: np.ndarray) -> None:
    """Write finite values, float16 or float32, as float32 into ``out``.

    NumPy converts halves one by one. Here sign, exponent and fraction of many are moved to their places in a float32, and a
    product corrects the exponent, whose offset is 15 in the one and 127 in the other; it is exact, for subnormal ones too.
    """
    if values.dtype != np.float16:
        out[:] = values
        return
    bits = out.view(np.int32)
    bits[:] = values.view(np.int16)  # with copies of the sign, of which the mask keeps one
    bits <<= 13
    bits &= np.int32(~0x70001FFF)
    out *= np.float32(2.0**112)


def normalised(values: np.ndarray) -> np.ndarray:
    """Divide rows, float32 (n, d), by their lengths, in place; a row of zeros stays as it is."""
    lengths = np.sqrt(np.einsum("nd,nd->n", values, values))
    values /= np.where(lengths > 0, lengths, 1)[:, None]
    return values
