"""Features selected, pooled and standardised once, for all heads that take them so; in memory, or in files that
processes share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.pooling import check_rows, chunks, column_statistics, pool_features, pooled_width


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
        What was subtracted from and divided out of each column.
    Z : float32, (n, d)
        Training rows; read-only where they lie in a file.
    y : int32, (n,)
        Their labels.
    held_out : (float32 (m, d), int32 (m,)), optional
        Validation rows and labels.
    groups : int64, (n,), optional
        Rows of one group stay together in folds.
    folder : Path, optional
        Where the arrays lie: another process opens them there instead of receiving a copy.
    """

    pool: str
    input_shape: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    Z: np.ndarray
    y: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray] | None = None
    groups: np.ndarray | None = None
    folder: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.folder is not None:
            fields["Z"] = None
            fields["held_out"] = None if self.held_out is None else (None, self.held_out[1])
        return _again, (fields,)


class Subset:
    """Some rows of an array, read only when they are asked for."""

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self._array, self._rows = array, rows
        self.dtype, self.ndim, self.shape = array.dtype, array.ndim, (len(rows), *array.shape[1:])
        self.size = int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, chosen: Any) -> np.ndarray:
        return self._array[self._rows[chosen]]


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
    Z = pool_features(X, pool, out=_room(folder, "train", X, pool))
    mean, std = np.zeros(Z.shape[1], np.float32), np.ones(Z.shape[1], np.float32)
    if scale:
        mean, std = column_statistics(Z)
    standardise(Z, mean, std)
    held_out = None
    if X_validation is not None and y_validation is not None and len(y_validation):
        check_rows(X_validation, X.shape[1:])
        V = pool_features(X_validation, pool, out=_room(folder, "validation", X_validation, pool))
        standardise(V, mean, std)
        held_out = _sealed(folder, "validation", V), np.asarray(y_validation)
    shape = tuple(int(size) for size in X.shape[1:])
    codes = None if groups is None else group_codes(groups)
    return Prepared(pool, shape, mean, std, _sealed(folder, "train", Z), np.asarray(y), held_out, codes, folder)


def standardise(Z: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """In place, a piece at a time."""
    for rows in chunks(Z):
        Z[rows] -= mean
        Z[rows] /= std


def group_codes(groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """Names -> numbers; each row without a name gets one of its own."""
    names = np.array([name or f"\0{row}" for row, name in enumerate(groups)])
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _room(folder: Path | None, name: str, X: np.ndarray, pool: str) -> np.ndarray | None:
    if folder is None:
        return None
    shape = len(X), pooled_width(X.shape[1:], pool)
    return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)


def _sealed(folder: Path | None, name: str, array: np.ndarray) -> np.ndarray:
    if folder is None:
        return array
    array.flush()  # type: ignore[attr-defined]
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def _again(fields: dict[str, Any]) -> Prepared:
    folder = fields["folder"]
    if folder is not None:
        fields["Z"] = np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False)
        if fields["held_out"] is not None:
            validation = np.load(folder / "validation.npy", mmap_mode="r", allow_pickle=False)
            fields["held_out"] = validation, fields["held_out"][1]
    return Prepared(**fields)
