"""Read rows that lie in many shards as one array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def by_shard(places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each shard number of ``places``, int32 (..., 3), ascending, and the flat positions of its places, int64."""
    numbers = places[..., 0].reshape(-1)
    order = np.argsort(numbers, kind="stable")
    shards, starts = np.unique(numbers[order], return_index=True)
    yield from zip(shards.tolist(), np.split(order, starts[1:]), strict=False)


class ShardedArray:
    """An array whose rows lie in many files. It is indexed like a numpy array, by rows and views, and returns copies.

    Parameters
    ----------
    places : int32, (images, views, 3)
        Number of the shard, row in the shard, and position on its view axis.
    shape : tuple of int
        Shape of one view of one image.
    dtype : numpy.dtype
        Element type of the values.
    open_shard : callable
        Number of a shard -> a function of rows and positions on the view axis, int32, (n,) each, that gives the
        verified values there, (n, *shape), or raises ``IntegrityError`` where there is no such place.
    """

    def __init__(
        self,
        places: np.ndarray,
        shape: tuple[int, ...],
        dtype: np.dtype,
        open_shard: Callable[[int], Callable[[np.ndarray, np.ndarray], np.ndarray]],
    ) -> None:
        self._places, self._row_shape, self._open_shard = places, shape, open_shard
        self.shape: tuple[int, ...] = (*places.shape[:2], *shape)
        self.dtype = dtype
        self.ndim, self.nbytes = len(self.shape), int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Return the rows and views that are chosen by numpy's indexing of the first two axes.

        Raises
        ------
        IndexError
            If more than two axes are indexed. Index the returned array instead.
        IntegrityError
            If a place does not exist in its shard, or the shard is damaged or missing.
        """
        if key is Ellipsis or (isinstance(key, tuple) and (len(key) > 2 or any(part is Ellipsis for part in key))):
            raise IndexError("a sharded array can be indexed by images and views only: array[rows, views][..., more]")
        places = self._places[key]
        if places.shape[-1:] != (3,) or places.ndim < 1:
            raise IndexError(f"{key!r} indexes more than images and views")
        flat = places.reshape(-1, 3)
        # Every shard is opened before memory is allocated.
        shards = [(here, self._open_shard(shard)) for shard, here in by_shard(flat)]
        values = np.empty((len(flat), *self._row_shape), self.dtype)
        for here, values_at in shards:
            values[here] = values_at(flat[here, 1], flat[here, 2])
        return values.reshape(*places.shape[:-1], *self._row_shape)
