"""Prepared rows: selected, pooled and standardised once. They are in memory, in files shared by processes, or in the store.

    arrays | store --pool--> views (n, K, d) --mean and deviation of view 0--> `Prepared` --epochs, pieces--> heads

If an image has several views, dense heads draw one of them in each epoch, and scikit-learn heads use all of them as
separate rows. Scores are computed on view 0.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from pipeline.heads.pooling import check_rows, chunks, column_statistics, pool_features, pooled_width

Batch = tuple[np.ndarray, np.ndarray]
PLAIN = (False,)  # value of ``draws`` for view 0 only


class Rows(Protocol):
    """Vectors and labels, in memory (`ArrayRows`) or in the store (`pipeline.heads.streaming.FeatureStream`)."""

    @property
    def labels(self) -> np.ndarray:
        """Label of each row: int32, (n,)."""

    @property
    def views(self) -> int:
        """Number of views of each row."""

    @property
    def width(self) -> int:
        """Number of columns."""

    @property
    def at_once(self) -> int:
        """Number of rows that may be requested in one batch."""

    def __len__(self) -> int: ...

    def epoch(self, number: int, *, size: int, seed: int, draws: Sequence[bool] = PLAIN) -> Iterator[Batch]:
        """Every row once, in random order, in batches of ``size`` rows; only the last batch may be smaller.

        Parameters
        ----------
        number : int
            Number of the epoch, from 0.
        seed : int
            Random seed of the order and of the views.
        draws : sequence of bool
            Variants of each row to return: True for a view drawn anew in each epoch, False for view 0.

        Returns
        -------
        iterator of (float32, (k, len(draws), d)) and (int32, (k,))
            Features and labels.
        """

    def pieces(self, size: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """View 0 of all rows in order, in pieces of ``size`` rows: the position of a piece, and its float32 (k, d)."""

    def take(self, chosen: np.ndarray) -> Self:
        """Select rows by ascending index or by a mask."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayRows:
    """Rows of an array in memory, or of a memory map.

    Parameters
    ----------
    values : float16 or float32, (N, d) or (N, K, d)
        Vectors, or all views of each row.
    labels : int32, (n,)
        Labels of the chosen rows.
    chosen : int64, (n,), optional
        Indices of the chosen rows; default: all rows. They are read only when requested.
    """

    values: np.ndarray
    labels: np.ndarray
    chosen: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.values.ndim == 2:
            object.__setattr__(self, "values", self.values[:, None])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def views(self) -> int:
        return int(self.values.shape[1])

    @property
    def width(self) -> int:
        return int(self.values.shape[2])

    @property
    def at_once(self) -> int:
        return max(1, len(self))

    @property
    def flat(self) -> np.ndarray:
        """All views of all rows, (n * K, d), the views of a row next to each other; a copy only if ``chosen`` is set."""
        values = self.values if self.chosen is None else self.values[self.chosen]
        return values.reshape(-1, self.width)

    def epoch(self, number: int, *, size: int, seed: int, draws: Sequence[bool] = PLAIN) -> Iterator[Batch]:
        order = row_order(seed, number, len(self))
        drawn = drawn_views(seed, number, len(self.values), self.views) if any(draws) else None
        for start in range(0, len(order), size):
            here = order[start : start + size]
            rows = here if self.chosen is None else self.chosen[here]
            yield self.values[rows[:, None], chosen_views(drawn, rows, draws)], self.labels[here]

    def pieces(self, size: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        plain = self.values[:, 0]
        for piece in chunks(plain) if size is None else (slice(a, a + size) for a in range(0, len(self), size)):
            piece = slice(piece.start, min(piece.stop, len(self)))
            if piece.start < piece.stop:
                yield piece, np.asarray(plain[piece if self.chosen is None else self.chosen[piece]])

    def take(self, chosen: np.ndarray) -> ArrayRows:
        numbers = np.arange(len(self)) if self.chosen is None else self.chosen
        return ArrayRows(self.values, self.labels[chosen], numbers[chosen])


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The rows that a head is trained on.

    Parameters
    ----------
    pool : {"none", "avg", "max", "flatten"}
        How the rows were pooled.
    input_shape : tuple of int
        Shape of a stored row.
    mean, std : float32, (d,)
        Mean that was subtracted from each column, and deviation that it was divided by. They come from view 0 of the
        training rows, so that heads standardise alike whether or not they use other views.
    train : Rows
        Training rows; read-only if they are in a file.
    held_out : Rows, optional
        Validation rows.
    groups : int64, (n,), optional
        Group of each training row; folds keep the rows of a group together.
    folder : Path, optional
        Folder of the files with the arrays. Other processes open these files instead of receiving a copy.
    memory : int
        Bytes that training may use in addition to the rows.
    """

    pool: str
    input_shape: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    train: Rows
    held_out: Rows | None = None
    groups: np.ndarray | None = None
    folder: Path | None = None
    memory: int = sys.maxsize

    @property
    def y(self) -> np.ndarray:
        """Labels of the training rows."""
        return self.train.labels

    @property
    def streamed(self) -> bool:
        """Whether the rows are still in the store."""
        return not isinstance(self.train, ArrayRows)

    def part(self, rows: np.ndarray) -> Prepared:
        """Select training rows by ascending index or by a mask."""
        groups = None if self.groups is None else self.groups[rows]
        return dataclasses.replace(self, train=self.train.take(rows), groups=groups, folder=None)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.folder is not None:
            fields |= {"train": self.train.labels, "held_out": self.held_out and self.held_out.labels}
        return _reopened, (fields,)


def prepare(
    X: np.ndarray,
    y: np.ndarray,
    *,
    pool: str,
    scale: bool = True,
    X_validation: np.ndarray | None = None,
    y_validation: np.ndarray | None = None,
    groups: Sequence[str] | np.ndarray | None = None,
    folder: Path | None = None,
) -> Prepared:
    """Pool rows to vectors and standardise them with the statistics of the training rows.

    Parameters
    ----------
    X, X_validation : float16 or float32, (n, d) or (n, h, w, c)
        Features, as stored.
    y, y_validation : int32, (n,)
        Labels.
    pool : {"none", "avg", "max", "flatten"}
        Pooling of spatial features.
    scale : bool
        Whether to standardise; if not, the mean is 0 and the deviation 1.
    groups : sequence of str, optional
        Group of each training row; each row with group "" is a group of its own.
    folder : Path, optional
        An empty folder for the arrays. They are then written there piece by piece and mapped read-only.

    Raises
    ------
    HeadError
        If training or validation values are not finite; the message gives the number of such rows.
    """
    width, held_out = pooled_width(X.shape[1:], pool), None
    Z = _allocate(folder, "train", (len(X), 1, width))
    pool_features(X, pool, out=Z[:, 0])
    if X_validation is not None and y_validation is not None and len(y_validation):
        check_rows(X_validation, X.shape[1:])
        V = _allocate(folder, "validation", (len(X_validation), 1, width))
        pool_features(X_validation, pool, out=V[:, 0])
        held_out = ArrayRows(V, np.asarray(y_validation))
    shape = tuple(int(size) for size in X.shape[1:])
    return _standardised(pool, shape, ArrayRows(Z, np.asarray(y)), held_out, groups, folder, scale=scale)


def prepare_stream(
    train: Any,
    held_out: Any,
    *,
    views: int,
    scale: bool,
    groups: Sequence[str] | np.ndarray | None = None,
    folder: Path | None = None,
) -> Prepared:
    """Prepare rows of a store, which are read piece by piece; see `prepare`.

    Parameters
    ----------
    train, held_out : FeatureStream
        Rows that are not standardised yet.
    views : int
        Number of views of each training row to use, starting with view 0.
    """
    arrays = []
    for name, stream, kept in (("train", train, views), ("validation", held_out, 1)):
        Z = _allocate(folder, name, (len(stream), kept, stream.width))
        for piece, values in stream.all_views(kept):
            Z[piece] = values
        arrays.append(ArrayRows(Z, stream.labels))
    shape = tuple(train.store.shape(train.name)[2:])
    return _standardised(train.pool, shape, arrays[0], arrays[1], groups, folder, scale=scale)


def standardise(Z: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Standardise rows in place, piece by piece."""
    for rows in chunks(Z):
        Z[rows] -= mean
        Z[rows] /= std


def group_codes(groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """Number the groups: int64, (n,). Each row without a group name gets a number of its own."""
    names = np.array([name or f"\0{row}" for row, name in enumerate(groups)])
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


# ------------------------------------------------------------------------------------- random order and views
def row_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Random order of the training rows in an epoch (counted from 0): int64, (rows,)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(rows)


def drawn_views(seed: int, epoch: int, rows: int, views: int) -> np.ndarray:
    """Random view of each row in an epoch (counted from 0): int64, (rows,), 0 to views - 1.

    It depends only on (seed, epoch, row), as the generator's number for a row does not depend on the number of rows.
    """
    key = np.array([seed, (1 << 63) + epoch], np.uint64)  # not the key of `row_order`
    return (np.random.Generator(np.random.Philox(key=key)).random(rows) * views).astype(np.int64)


def chosen_views(drawn: np.ndarray | None, rows: np.ndarray, draws: Sequence[bool]) -> np.ndarray:
    """Number of the view to use for each row and each entry of ``draws``: int64, (k, len(draws))."""
    found = np.zeros((len(rows), len(draws)), np.int64)
    if drawn is not None:
        found[:, np.asarray(draws)] = drawn[rows, None]
    return found


# -------------------------------------------------------------------------------------------------- files
def _standardised(
    pool: str,
    shape: tuple[int, ...],
    train: ArrayRows,
    held_out: ArrayRows | None,
    groups: Sequence[str] | np.ndarray | None,
    folder: Path | None,
    *,
    scale: bool,
) -> Prepared:
    """Standardise pooled rows; if they are in files, map these read-only."""
    mean, std = np.zeros(train.width, np.float32), np.ones(train.width, np.float32)
    if scale:
        plain = train.values[:, 0]
        mean, std = column_statistics((plain[piece] for piece in chunks(plain)), train.width)
    for rows in (train, held_out):
        if rows is not None and scale:
            standardise(rows.values, mean, std)
    codes = None if groups is None else group_codes(groups)
    if folder is not None:
        train = _mapped(folder, "train", train.labels, train.values)
        held_out = held_out and _mapped(folder, "validation", held_out.labels, held_out.values)
    return Prepared(pool, shape, mean, std, train, held_out, codes, folder)


def _allocate(folder: Path | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if folder is None:
        return np.empty(shape, np.float32)
    return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)


def _mapped(folder: Path, name: str, labels: np.ndarray, written: Any = None) -> ArrayRows:
    if written is not None:
        written.flush()
    return ArrayRows(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False), labels)


def _reopened(fields: dict[str, Any]) -> Prepared:
    folder = fields["folder"]
    if folder is not None:
        for field, name in (("train", "train"), ("held_out", "validation")):
            if fields[field] is not None:
                fields[field] = _mapped(folder, name, fields[field])
    return Prepared(**fields)
