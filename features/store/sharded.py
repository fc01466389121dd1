"""Rows that lie in many shards, read as one array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def by_shard(places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """For each shard of ``places`` (int32, (..., 3)), ascending, where it stands among them, int64, flat."""
    numbers = places[..., 0].reshape(-1)
    order = np.argsort(numbers, kind="stable")
    shards, starts = np.unique(numbers[order], return_index=True)
    yield from zip(shards.tolist(), np.split(order, starts[1:]), strict=False)


class ShardedArray:
    """What ``numpy`` would show of rows that lie in many files: ``array[rows]`` and ``array[rows, views]``, as copies.

    Parameters
    ----------
    places : int32, (images, views, 3)
        Shard, row in it, and position on its view axis.
    shape : tuple of int
        Shape of one view of one image.
    dtype : numpy.dtype
        Of the values.
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
        self.shape, self.dtype = (*places.shape[:2], *shape), dtype
        self.ndim, self.nbytes = len(self.shape), int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        """The rows, and views, that numpy's indexing of the first two axes chooses.

        Raises
        ------
        IndexError
            For more than two axes: index what is returned.
        IntegrityError
            If a place is not in its shard, or the shard is damaged or missing.
        """
        if key is Ellipsis or (isinstance(key, tuple) and (len(key) > 2 or any(part is Ellipsis for part in key))):
            raise IndexError("only images and views of a sharded array can be chosen: array[rows, views][..., more]")
        places = self._places[key]
        if places.shape[-1:] != (3,) or places.ndim < 1:
            raise IndexError(f"{key!r} chooses more than images and views")
        flat = places.reshape(-1, 3)
        # Opened before any memory is asked for.
        shards = [(here, self._open_shard(shard)) for shard, here in by_shard(flat)]
        values = np.empty((len(flat), *self._row_shape), self.dtype)
        for here, values_at in shards:
            values[here] = values_at(flat[here, 1], flat[here, 2])
        return values.reshape(*places.shape[:-1], *self._row_shape)
