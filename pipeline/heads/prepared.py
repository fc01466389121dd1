"""Rows as heads are trained on: selected, pooled and standardised once; in memory, in files that processes share, or
still in the store.

    arrays | store --pool--> views (n, K, d) --mean and deviation of view 0--> `Prepared` --epochs, pieces--> heads

Where an image has several views, dense heads draw one of them per epoch, scikit-learn heads see all, as rows of their
own; what is scored is view 0.
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
PLAIN = (False,)  # one copy of each row, view 0


class Rows(Protocol):
    """Vectors with their labels, wherever they are: `ArrayRows`, or `pipeline.heads.streaming.FeatureStream`."""

    @property
    def labels(self) -> np.ndarray:
        """int32, (n,)."""

    @property
    def views(self) -> int:
        """Views of each row."""

    @property
    def width(self) -> int:
        """Columns."""

    @property
    def at_once(self) -> int:
        """Rows that may be asked for at once."""

    def __len__(self) -> int: ...

    def epoch(self, number: int, *, size: int, seed: int, draws: Sequence[bool] = PLAIN) -> Iterator[Batch]:
        """Every row once, shuffled, ``size`` at a time; only the last piece is smaller.

        Parameters
        ----------
        number : int
            Of the epoch, from 0.
        seed : int
            Of the order, and of the views.
        draws : sequence of bool
            What is wanted of each row: True for a view that is drawn anew in each epoch, False for view 0.

        Returns
        -------
        iterator of (float32, (k, len(draws), d)) and (int32, (k,))
            Features and labels.
        """

    def pieces(self, size: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """View 0 of all rows in their order: where a piece stands, and float32, (k, d), ``size`` rows but for the last."""

    def take(self, chosen: np.ndarray) -> Self:
        """Some of the rows, by their ascending numbers or as a mask."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayRows:
    """Rows of an array in memory, or of a memory map.

    Parameters
    ----------
    values : float16 or float32, (N, d) or (N, K, d)
        Vectors, or all views of each.
    labels : int32, (n,)
        Of the rows that are chosen.
    chosen : int64, (n,), optional
        Numbers of these rows; all without it. They are read when they are asked for.
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
        return self.values.shape[1]

    @property
    def width(self) -> int:
        return self.values.shape[2]

    @property
    def at_once(self) -> int:
        return max(1, len(self))

    @property
    def flat(self) -> np.ndarray:
        """All views of all rows, those of one row beside each other: (n * K, d); no copy unless rows were chosen."""
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
    """What a head is trained on.

    Parameters
    ----------
    pool : str
        How rows were pooled.
    input_shape : tuple of int
        Of a stored row.
    mean, std : float32, (d,)
        What was subtracted from and divided out of each column: of view 0 of the training rows, so that a head that
        sees views and one that does not standardise alike.
    train : Rows
        Training rows; read-only where they lie in a file.
    held_out : Rows, optional
        Validation rows.
    groups : int64, (n,), optional
        Rows of one group stay together in folds.
    folder : Path, optional
        Where the arrays lie: another process opens them there instead of receiving a copy.
    memory : int
        Bytes that training may take beside them.
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
        """Some of the training rows, by their ascending numbers or as a mask."""
        groups = None if self.groups is None else self.groups[rows]
        return dataclasses.replace(self, train=self.train.take(rows), groups=groups, folder=None)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.folder is not None:
            fields |= {"train": self.train.labels, "held_out": self.held_out and self.held_out.labels}
        return _again, (fields,)


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
    """Pool rows to vectors and standardise them with the training rows' statistics.

    Parameters
    ----------
    X, X_validation : float16 or float32, (n, d) or (n, h, w, c)
        Features, as stored.
    y, y_validation : int32, (n,)
        Labels.
    pool : {"none", "avg", "max", "flatten"}
        How.
    scale : bool
        Standardise; without it mean is 0 and deviation 1.
    groups : sequence of str, optional
        Group of each training row; "" is a group of its own for each row.
    folder : Path, optional
        An empty folder for the arrays. They are then made a piece at a time and mapped read-only.

    Raises
    ------
    HeadError
        If values are not finite, in training or validation; the number of rows is named.
    """
    width, held_out = pooled_width(X.shape[1:], pool), None
    Z = _room(folder, "train", (len(X), 1, width))
    pool_features(X, pool, out=Z[:, 0])
    if X_validation is not None and y_validation is not None and len(y_validation):
        check_rows(X_validation, X.shape[1:])
        V = _room(folder, "validation", (len(X_validation), 1, width))
        pool_features(X_validation, pool, out=V[:, 0])
        held_out = ArrayRows(V, np.asarray(y_validation))
    shape = tuple(int(size) for size in X.shape[1:])
    return _finished(pool, shape, ArrayRows(Z, np.asarray(y)), held_out, groups, folder, scale=scale)


def prepare_stream(
    train: Any,
    held_out: Any,
    *,
    views: int,
    scale: bool,
    groups: Sequence[str] | np.ndarray | None = None,
    folder: Path | None = None,
) -> Prepared:
    """`prepare` for rows of a store, which are read a piece at a time, with the first so many views of each.

    Parameters
    ----------
    train, held_out : FeatureStream
        Not standardised.
    """
    arrays = []
    for name, stream, kept in (("train", train, views), ("validation", held_out, 1)):
        Z = _room(folder, name, (len(stream), kept, stream.width))
        for piece, values in stream.all_views(kept):
            Z[piece] = values
        arrays.append(ArrayRows(Z, stream.labels))
    shape = tuple(train.store.shape(train.name)[2:])
    return _finished(train.pool, shape, arrays[0], arrays[1], groups, folder, scale=scale)


def standardise(Z: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """In place, a piece at a time."""
    for rows in chunks(Z):
        Z[rows] -= mean
        Z[rows] /= std


def group_codes(groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """Names -> numbers; each row without a name gets one of its own."""
    names = np.array([name or f"\0{row}" for row, name in enumerate(groups)])
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


# ------------------------------------------------------------------------------------------ what is drawn
def row_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Order of the training rows in an epoch, counted from 0: int64, (rows,)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(rows)


def drawn_views(seed: int, epoch: int, rows: int, views: int) -> np.ndarray:
    """View that each row shows in an epoch, counted from 0: int64, (rows,), 0 to views - 1.

    It comes from (seed, epoch, row) alone: the generator's number for row r does not depend on how many rows there are.
    """
    key = np.array([seed, (1 << 63) + epoch], np.uint64)  # other numbers than those of the order
    return (np.random.Generator(np.random.Philox(key=key)).random(rows) * views).astype(np.int64)


def chosen_views(drawn: np.ndarray | None, rows: np.ndarray, draws: Sequence[bool]) -> np.ndarray:
    """View of each row for each of ``draws``: int64, (k, len(draws))."""
    found = np.zeros((len(rows), len(draws)), np.int64)
    if drawn is not None:
        found[:, np.asarray(draws)] = drawn[rows, None]
    return found


# -------------------------------------------------------------------------------------------------- files
def _finished(
    pool: str,
    shape: tuple[int, ...],
    train: ArrayRows,
    held_out: ArrayRows | None,
    groups: Sequence[str] | np.ndarray | None,
    folder: Path | None,
    *,
    scale: bool,
) -> Prepared:
    """Standardise pooled rows, and map them if they lie in files."""
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


def _room(folder: Path | None, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if folder is None:
        return np.empty(shape, np.float32)
    return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)


def _mapped(folder: Path, name: str, labels: np.ndarray, written: Any = None) -> ArrayRows:
    if written is not None:
        written.flush()
    return ArrayRows(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False), labels)


def _again(fields: dict[str, Any]) -> Prepared:
    folder = fields["folder"]
    if folder is not None:
        for field, name in (("train", "train"), ("held_out", "validation")):
            if fields[field] is not None:
                fields[field] = _mapped(folder, name, fields[field])
    return Prepared(**fields)
