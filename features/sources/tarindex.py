"""What a tar holds, kept in the cache folder: an unchanged tar is not read again to list it.

Index --keep()--> arrays in one signed file, named after the tar and its state --kept()--> Index, memory-mapped
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from features.cache import cache_path, signed_file, write_signed
from features.canonical import canonical_json
from features.scratch import written
from features.sources.blocks import File, Status, on_disk
from features.temporary import sweep_dead
from features.texts import Texts

logger = logging.getLogger(__name__)

Trust = Literal["notes", "times", "nothing"]

_FORMAT = "bottleneck-tar-index 1"
LARGE = 1 << 17  # bytes of an index above which it is not copied to memory
_ALIGNED = 64  # bytes; where each array begins is a multiple of it
_HEADER = 16  # digits that say how long the header is
_DTYPES = {"utf8": "u1", "ends": "<i8", "numbers": "<i8", "rows": "<i8", "small": "u1", "small_ends": "<i8"}


class Index(NamedTuple):
    """What was found when an archive was listed.

    Parameters
    ----------
    paths : Texts
        Paths of the members.
    numbers : int64, (n, 5)
        The fields of each ``Member``.
    rows : int64, (k,)
        Which members are small texts that were read at once, ascending.
    small : Texts
        Their bytes.
    folders : list of str
        Folders that the archive lists.
    """

    paths: Texts
    numbers: np.ndarray
    rows: np.ndarray
    small: Texts
    folders: list[str]

    def text(self, row: int) -> bytes | None:
        """Return the bytes of a small member; None if they were not read at once."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            return None
        return self.small[place].encode("utf-8", "surrogateescape")


def name_of(tar: File, status: os.stat_result | Status) -> str:
    """Return under which name something about a tar is kept in the cache: its key, size and times, and its inode."""
    path = on_disk(tar)
    key = hashlib.sha256(os.fsencode(str(tar) if path is None else os.path.realpath(path))).hexdigest()[:20]
    return f"{key}-{status.st_size}-{status.st_mtime_ns}-{status.st_ino}-{status.st_ctime_ns}"


def trusted(place: Path, trust: Trust) -> Path:
    """Return what is kept at a place; with ``"times"``, also of a tar with another inode and change time."""
    if trust != "times":
        return place
    times = place.name.rsplit("-", 2)[0]
    return next(iter(sorted(place.parent.glob(f"{times}-*{place.suffix}"))), place)


def drop_others(place: Path) -> None:
    """Remove what is kept of the same tar before it changed."""
    key = place.name.split("-")[0]
    for former in set(place.parent.glob(f"{key}-*")) - {place}:
        former.unlink(missing_ok=True)


def place_of(tar: File) -> Path | None:
    """Return where the index of a tar, as it is now, is kept; None if nothing tells whether it has changed."""
    if on_disk(tar) is None and not tar.found.version:  # type: ignore[union-attr]
        return None
    name = name_of(tar, tar.stat())
    # In one of 256 folders, so that those of very many tars are found as fast as those of a few.
    return cache_path("tars", name[:2], f"{name}.index")


def kept(place: Path, trust: Trust) -> Index | None:
    """Return the index kept at a place, or None.

    Parameters
    ----------
    place : Path
        Of ``place_of``.
    trust : {"notes", "times", "nothing"}
        Whether the tar must have the inode and times of then, its size and the time of its last change, or is always listed.
    """
    if trust == "nothing":
        return None
    place = trusted(place, trust)
    try:
        with signed_file(place) as file:
            return _read(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is not used (%s); the tar is listed again", place, error)
        return None


def keep(place: Path, index: Index) -> None:
    """Keep an index, in place of those of the same tar before it changed; without room it is made again next time."""
    try:
        with written(lambda file: _write(file, index)) as content:
            write_signed(place, content)
        sweep_dead(place.parent)
        drop_others(place)
    except OSError as error:
        logger.info("%s could not be written (%s)", place, error)


def _write(file: BinaryIO, index: Index) -> None:
    arrays = (index.paths.utf8, index.paths.ends, index.numbers, index.rows, index.small.utf8, index.small.ends)
    lengths = dict(zip(_DTYPES, map(len, arrays), strict=True))
    header = canonical_json({"format": _FORMAT, "folders": index.folders, "lengths": lengths}).encode("ascii")
    file.write(b"%0*d" % (_HEADER, len(header)) + header)
    for dtype, array in zip(_DTYPES.values(), arrays, strict=True):
        file.write(bytes(-file.tell() % _ALIGNED))
        file.write(np.ascontiguousarray(array, dtype).data)


def _number_of_next(file: BinaryIO) -> int:
    """Return the number that the next open file would have."""
    os.close(number := os.dup(file.fileno()))
    return number


def _read(file: BinaryIO) -> Index:
    """Read an index; a large one stays open as one file, while half of the files that may be open are left to others."""
    start = file.tell()
    header = json.loads(file.read(int(file.read(_HEADER))))
    if header["format"] != _FORMAT:
        raise ValueError(f"received format {header['format']!r}, expected {_FORMAT!r}")
    place, arrays = file.tell(), list[Any]()
    whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped = len(whole) > LARGE and _number_of_next(file) < os.sysconf("SC_OPEN_MAX") // 2
    for name, dtype in _DTYPES.items():
        place += (start - place) % _ALIGNED
        found = np.frombuffer(whole, dtype, int(header["lengths"][name]) * (5 if name == "numbers" else 1), place)
        arrays.append(found if mapped else found.copy())
        place += found.nbytes
    utf8, ends, numbers, rows, small, small_ends = arrays
    return Index(
        Texts(utf8, ends), numbers.reshape(-1, 5), rows, Texts(small, small_ends), [*map(str, header["folders"])]
    )
