"""Read ``.npz`` files in the Keras convention: ``x_train y_train x_test y_test``, and ``x_val y_val``.

Each image is returned as an uncompressed PNG, so that the following steps treat it like any other image file. Labels
are read when the file is opened. Pixels are read when the first image is requested, and stay in memory.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from features.errors import SourceError, UnreadableImageError
from features.pixels.npy import HEADER_BYTES, NpyHeader, npy_header
from features.pixels.png import plain_png, png_size
from features.sources.archives import Archive, open_zip
from features.sources.folders import File
from features.sources.splits import SPLIT_WORDS, listed

logger = logging.getLogger(__name__)

MAX_ARRAY_BYTES = 8 << 30
# Ending of an array's name -> folder in the paths of its images; sorted by folder.
_FOLDERS = {"test": "test", "train": "train", "val": "validation", "validation": "validation"}


class _Subset(NamedTuple):
    folder: str
    name: str
    header: NpyHeader
    labels: list[int]


def open_arrays(path: Path) -> tuple[list[File], list[str], list[int], Callable[[str], bytes]]:
    """List the images of an ``.npz``. Nothing is unpickled, and no array is allocated before its size is checked.

    ``x_*`` are ``uint8``, (n, h, w), (n, h, w, 1) or (n, h, w, 3), 0-255; ``y_*`` whole numbers, (n,) or (n, 1), -1
    for unlabelled. Only ``x_test`` may lack labels.

    Returns
    -------
    files : list of File
        Sorted by path: ``train/000123`` is row 123 of ``x_train``.
    labels : list of str
        The numbers as class names, with leading zeros so that they sort as numbers; empty if unlabelled.
    splits : list of int
        Indices into ``SPLITS``.
    read : callable
        Path -> PNG, the same bytes on every machine; may be called from many threads.

    Raises
    ------
    SourceError
        If an array cannot be used; the message names it.
    """
    status = os.stat(path)
    archive = open_zip(path, member_limit=MAX_ARRAY_BYTES)
    names = {member.removesuffix(".npy") for member in archive.members if member.endswith(".npy")}
    subsets = [_subset(archive, word, names) for word in _FOLDERS if names & {f"x_{word}", f"y_{word}"}]
    if not subsets:
        received = listed(sorted(names)) or "no arrays"
        raise SourceError(f"{path} holds {received}; expected x_train, y_train and, optionally, x_test, y_test")
    if names >= {"x_val", "x_validation"}:
        _refuse(archive, "x_validation", "stands beside 'x_val'; expected only one of them")
    if others := sorted(names - {f"{kind}_{word}" for kind in "xy" for word in _FOLDERS}):
        logger.warning("%s: arrays of other names are left out: %s", path, listed(others))
    width = len(str(max((label for subset in subsets for label in subset.labels), default=0)))
    files, labels, splits = list[File](), list[str](), list[int]()
    for folder, _, header, numbers in subsets:
        digits, size = max(6, len(str(len(numbers)))), png_size(header.shape)
        files += [File.of(f"{folder}/{number:0{digits}d}", status, size) for number in range(len(numbers))]
        labels += [f"{number:0{width}d}" if number >= 0 else "" for number in numbers]
        splits += [SPLIT_WORDS[folder]] * len(numbers)
    if not files:
        raise SourceError(f"{path} holds no images: its arrays are empty")
    return files, labels, splits, _Pixels(archive, subsets)


def _subset(archive: Archive, word: str, names: set[str]) -> _Subset:
    """Check the arrays of one split and read its labels; the pixels are not read yet."""
    x, y = f"x_{word}", f"y_{word}"
    if x not in names:
        _refuse(archive, y, f"has no matching array {x!r}")
    header = _header(archive, x)
    shape, dtype = header.shape, header.dtype
    if dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        hint = ": scale it by 255 and round" if dtype.kind == "f" else ""
        hint = hint or (": channels go last" if len(shape) == 4 and shape[1] in (1, 3) else "")
        _refuse(archive, x, f"is {dtype} {shape}; expected uint8, 0-255, (n, h, w) or (n, h, w, 3){hint}")
    if not shape[1] * shape[2]:
        _refuse(archive, x, f"has the shape {shape}: its images have no pixels")
    if y in names:
        labels = _labels(archive, y, shape[0])
    elif word == "test":
        labels = [-1] * shape[0]
    else:
        _refuse(archive, x, f"has no matching array {y!r}; only x_test may lack labels")
    return _Subset(_FOLDERS[word], x, header, labels)


def _labels(archive: Archive, name: str, count: int) -> list[int]:
    header = _header(archive, name)
    shape, dtype = header.shape, header.dtype
    if dtype.kind not in "iu" or shape not in ((count,), (count, 1)):
        hint = f"; if it is one-hot, save {name}.argmax(1)" if len(shape) == 2 and shape[1] > 1 else ""
        _refuse(archive, name, f"is {dtype} {shape}; expected whole numbers, ({count},) or ({count}, 1){hint}")
    labels: list[int] = _array(archive, name, header).ravel().tolist()
    if min(labels, default=0) < -1:
        _refuse(archive, name, f"holds the label {min(labels)}; expected 0 or more, or -1 for unlabelled")
    return labels


def _refuse(archive: Archive, name: str, problem: str) -> NoReturn:
    raise SourceError(f"{archive.path}: the array {name!r} {problem}")


def _header(archive: Archive, name: str) -> NpyHeader:
    """Read the header of an array, and check the declared size against the bytes that are present."""
    try:
        return npy_header(_bytes(archive, name, HEADER_BYTES), archive.members[f"{name}.npy"].size)
    except UnreadableImageError as error:
        _refuse(archive, name, error.detail)


def _array(archive: Archive, name: str, header: NpyHeader) -> np.ndarray:
    return header.array(_bytes(archive, name))


def _bytes(archive: Archive, name: str, limit: int | None = None) -> bytes:
    try:
        return archive.read(f"{name}.npy", limit)
    except UnreadableImageError as error:
        raise SourceError(f"{archive.path} is damaged: {error.detail}. Download or save it again.") from error


class _Pixels:
    """The function path -> PNG. An array is read when its first image is requested, one at a time to save memory."""

    def __init__(self, archive: Archive, subsets: Sequence[_Subset]) -> None:
        self._archive, self._subsets = archive, {subset.folder: subset for subset in subsets}
        self._arrays: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def __call__(self, path: str) -> bytes:
        folder, number = path.split("/")
        with self._lock:
            if folder not in self._arrays:
                subset = self._subsets[folder]
                self._arrays[folder] = _array(self._archive, subset.name, subset.header)
        pixels = self._arrays[folder][int(number)]
        return plain_png(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
