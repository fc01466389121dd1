"""The best columns of many queries, as their values arrive in blocks.

values, columns --above the worst that is kept--> numbers that sort by value, then column --the largest--> columns, values
"""

from __future__ import annotations

import numpy as np

EMPTY = np.iinfo(np.int64).min
ROOM = 64  # places at least, beside those that are kept, for what arrives


class Best:
    """The best columns of each query so far; of equal values the lowest columns, if columns arrive in ascending order.

    Parameters
    ----------
    queries : int, at most 65,536
        Number of queries.
    count : int
        Number of columns that are kept for each.

    Attributes
    ----------
    floor : float32, (queries,)
        The worst value that is kept: what is not above it need not be added. It is replaced, never changed.
    """

    def __init__(self, queries: int, count: int) -> None:
        self.count = count
        self.floor = np.full(queries, -np.inf, np.float32)
        self._room = max(count // 2, ROOM)
        self._keys = np.full((queries, self._room + count), EMPTY)
        self._used = np.zeros(queries, np.int64)  # of the places beside those that are kept

    def add(self, queries: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        """Add values, float32 (m,), of columns, int64 (m,), below 2^32, for queries, int (m,)."""
        order = np.argsort(queries.astype(np.uint16), kind="stable")
        queries, keys = queries[order], _keys(values[order], columns[order])
        while len(queries):
            sizes = np.bincount(queries, minlength=len(self._used))
            place = np.arange(len(queries)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + self._used[queries]
            fits = place < self._room
            self._keys[queries[fits], place[fits]] = keys[fits]
            self._used = np.minimum(self._used + sizes, self._room)
            # Where half of the room is taken, or there is no floor yet; it costs time, and spares what is not added then.
            self._keep_best(np.flatnonzero((self._used > self._room // 2) | (np.isneginf(self.floor) & (sizes > 0))))
            queries, keys = queries[~fits], keys[~fits]
            better = keys > self._keys[queries, -self.count]
            queries, keys = queries[better], keys[better]

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Columns, int64 (queries, count), and values, float32, best first; those of fewer values are undefined."""
        best = np.sort(np.partition(self._keys, -self.count, axis=1)[:, -self.count :], axis=1)[:, ::-1]
        return (1 << 32) - 1 - (best & 0xFFFFFFFF), _values(best)

    def _keep_best(self, full: np.ndarray) -> None:
        keys = np.partition(self._keys[full], -self.count, axis=1)
        worst = keys[:, -self.count].copy()
        keys[:, : -self.count] = EMPTY
        self._keys[full], self._used[full] = keys, 0
        floor = self.floor.copy()
        floor[full] = np.where(worst > EMPTY, _values(worst), -np.inf)
        self.floor = floor


def above(values: np.ndarray, floor: np.ndarray, count: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Lines and columns of the values, float32 (n, m), that may be among the ``count`` best along an axis.

    ``floor``, float32 (n,) for axis 1, (m,) for axis 0, is that of the queries. Where there is none yet, it is taken from these
    values.
    """
    floor = np.expand_dims(floor, axis)
    if values.shape[axis] > count and np.isneginf(floor).any():
        own = np.partition(values, -count, axis=axis).take([-count], axis=axis)
        floor = np.maximum(floor, np.nextafter(own, np.float32(-np.inf)))
    lines, columns = np.divmod(np.flatnonzero((values > floor).reshape(-1)), values.shape[1])
    return lines, columns


def _keys(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Numbers, int64, that sort like the values, and where these are equal, against the columns."""
    bits = (values + np.float32(0)).view(np.int32).astype(np.int64)  # there is one zero then
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return np.asarray((ordered << 32) | ((1 << 32) - 1 - columns))


def _values(keys: np.ndarray) -> np.ndarray:
    bits = keys >> 32
    return np.asarray(np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int32).view(np.float32))
