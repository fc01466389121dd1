"""Rows of a feature set as vectors of length 1, read from the store a piece at a time.

stored rows --pool--> (k, d) --normalise--> float32, length 1, so that a product of two of them is their cosine
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from features.machine import processors
from features.pixels.batches import ahead
from features.store.schema import CHECKSUM_BLOCK_BYTES, block_rows
from pipeline.heads.pooling import choose_pool, pool_features, pooled_width

if TYPE_CHECKING:
    from features.store.reader import FeatureStore

READ_BYTES = 4 << 20  # of one read, as stored
# Every float16 as float32, by its bits: looking them up takes less than half the time that NumPy takes to convert.
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
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

    def pieces(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield row numbers, int64 (k,), and their vectors, float32 (k, d), in order; all rows by default.

        Rows are read and normalised by threads a little ahead of their use. A row of zeros stays zeros: it is similar to none.

        Parameters
        ----------
        rows : int64, (n,), ascending, optional
            The rows to read.
        """
        readers = min(processors(), READERS)
        with ThreadPoolExecutor(readers, "vectors") as pool:
            yield from ahead(pool, self._piece, self._cut(rows), readers + 1)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of these rows, float32 (n, d), in their order; a row may be named more than once."""
        wanted, place = np.unique(rows, return_inverse=True)
        none = np.zeros((0, self.width), np.float32)
        return np.concatenate([none, *(values for _, values in self.pieces(wanted))])[place]

    def gathered(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of few rows that lie far apart, float32 (n, d): only these are read, through a memory map."""
        return self._vectors(np.asarray(self._store.array(self.name)[rows, 0]))

    def of_features(self, values: np.ndarray) -> np.ndarray:
        """Turn features as a network gives them, (n, ...), into vectors like those of the store, float32 (n, d)."""
        return self._vectors(values)

    # -- inside
    def _cut(self, rows: np.ndarray | None) -> Iterator[np.ndarray]:
        if rows is None:
            yield from (
                np.arange(start, min(start + self._step, self._count)) for start in range(0, self._count, self._step)
            )
        elif len(rows):
            yield from np.split(rows, np.flatnonzero(np.diff(rows // self._step)) + 1)

    def _piece(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, last = int(rows[0]), int(rows[-1])
        stored = self._store.read(self.name, first, last + 1)[:, 0]
        return rows, self._vectors(stored if len(rows) == len(stored) else stored[rows - first])

    def _vectors(self, stored: np.ndarray) -> np.ndarray:
        if self._pool == "none":  # finite, as the store has checked
            values = (
                stored.astype(np.float32) if stored.dtype != np.float16 else np.take(HALVES, stored.view(np.uint16))
            )
        else:
            values = pool_features(stored, self._pool)
        return normalised(values)


def normalised(values: np.ndarray) -> np.ndarray:
    """Divide rows, float32 (n, d), by their lengths, in place; a row of zeros stays as it is."""
    lengths = np.sqrt(np.einsum("nd,nd->n", values, values))
    values /= np.where(lengths > 0, lengths, 1)[:, None]
    return values
