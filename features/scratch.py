"""Arrays with a row for each image that take no memory of the process: files without a name, in the cache folder.

    values --Growing--> a file, once they are many --array()--> memory-mapped        shape --scratch()--> memory-mapped zeros

A file without a name is gone when the process ends, however it ends. Small arrays, and all of them where no such file can be
made, lie in memory.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from features.cache import cache_path
from features.errors import StoreError
from features.ownership import make_folder

SMALL = 1 << 20  # bytes up to which an array lies in memory
_STEP = 1 << 16  # rows that are copied at a time
_WAITING = 4096  # single values that are collected before they become rows


def scratch(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array of zeros, in a file of its own if it is large."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > SMALL and hasattr(os, "posix_fallocate"):
        with contextlib.suppress(OSError), unnamed_file() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and ends the process later
            return np.memmap(file, dtype, "r+", shape=shape).view(np.ndarray)
    return np.zeros(shape, dtype)


def taken(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return some rows of an array, int64 (k,), without a copy if they are all of them in order."""
    if len(rows) == len(values) and (not len(rows) or (int(rows[0]) == 0 and bool((np.diff(rows) == 1).all()))):
        return values
    found = scratch((len(rows), *values.shape[1:]), values.dtype)
    for start in range(0, len(rows), _STEP):
        part = rows[start : start + _STEP]
        found[start : start + len(part)] = values[part]
    return found


def kept(values: np.ndarray) -> np.ndarray:
    """Return the same values, in a file of their own if they are many."""
    if values.nbytes <= SMALL:
        return values
    found = scratch(values.shape, values.dtype)
    found[:] = values
    return found


@contextlib.contextmanager
def written(write: Callable[[BinaryIO], Any]) -> Iterator[memoryview | mmap.mmap]:
    """Yield what a function writes to a file; where no file can be made, it is written to memory."""
    try:
        file = unnamed_file()
    except OSError:
        memory = io.BytesIO()
        write(memory)
        yield memory.getbuffer()
        return
    with file:
        write(file)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


class Growing:
    """An array to which rows are added at its end.

    Parameters
    ----------
    dtype : str or dtype
    row : tuple of int
        Shape of a row.
    """

    def __init__(self, dtype: str | np.dtype, row: tuple[int, ...] = ()) -> None:
        self._dtype, self._row = np.dtype(dtype), row
        self._waiting: list[Any] = []
        self._blocks: list[np.ndarray] = []
        self._bytes, self._length = 0, 0
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return self._length + len(self._waiting)

    def append(self, row: Any) -> None:
        """Add one row."""
        self._waiting.append(row)
        if len(self._waiting) >= _WAITING:
            self._settle()

    def extend(self, rows: Sequence[Any] | np.ndarray) -> None:
        """Add rows."""
        self._settle()
        self._add(np.asarray(rows, self._dtype).reshape(-1, *self._row))

    def array(self) -> np.ndarray:
        """Return the rows so far; what is added later is not in it."""
        self._settle()
        if self._file is None:
            return np.concatenate([np.empty((0, *self._row), self._dtype), *self._blocks])
        self._spill()
        return np.memmap(self._file, self._dtype, "r", shape=(self._length, *self._row)).view(np.ndarray)

    def _settle(self) -> None:
        if self._waiting:
            rows, self._waiting = self._waiting, []
            self._add(np.array(rows, self._dtype).reshape(-1, *self._row))

    def _add(self, rows: np.ndarray) -> None:
        self._length += len(rows)
        self._bytes += rows.nbytes
        self._blocks.append(rows)
        if self._bytes > SMALL:
            with contextlib.suppress(OSError):
                self._file = self._file or unnamed_file()
            if self._file is not None:
                self._spill()

    def _spill(self) -> None:
        """Move the blocks in memory to the file; a disk that is full is a ``StoreError``."""
        assert self._file is not None
        try:
            self._file.seek(0, os.SEEK_END)
            for block in self._blocks:
                self._file.write(np.ascontiguousarray(block).data)
            self._file.flush()
        except OSError as error:
            raise StoreError(
                f"{cache_path('scratch')} has no room for what is known of the images ({error.strerror or error}): free some, or "
                "set BOTTLENECK_CACHE to a folder with more"
            ) from error
        self._blocks, self._bytes = [], 0


def unnamed_file() -> BinaryIO:
    """Make an empty file in the cache folder that has no name: it is gone when the process ends, however it ends."""
    folder = cache_path("scratch")
    make_folder(folder)
    return tempfile.TemporaryFile(dir=folder)  # it has no name
