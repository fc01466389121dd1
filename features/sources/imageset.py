"""Images and what is known about each of them, whatever the kind of their source.

source --scan()--> ImageSet --read(row)--> bytes of one image        ImageSet --some(rows)--> ImageSet
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from features.machine import processors
from features.pixels.decode import read_bytes
from features.targets import Target

_WAITING = 16  # threads that wait for a store at the same time


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and what is known about each; row ``i`` of every column is image ``i``.

    Parameters
    ----------
    description : str
        The source as the user named it, for messages.
    root : Path or str
        Absolute path of the folder or archive to which ``paths`` are relative, the pattern of several archives, or an address.
    paths : sequence of str, length n
        With ``/`` between folders. Sorted by code point, or in the manifest's order; absolute if a manifest
        points outside ``root``. A name that is not UTF-8 contains lone surrogates (``os.fsdecode``): the file can be
        opened with it, but it must be encoded with ``errors="surrogateescape"``.
    labels : int32, (n,)
        Index into ``classes``, -1 for unlabelled.
    classes : tuple of str
        Sorted by code point.
    given_splits : int8, (n,)
        Index into ``SPLITS``, -1 if the source gives none.
    groups : tuple of str, length n, or None
        Images of one group must stay in one split; empty for an image without a group.
    stamps : int64, (n, 4)
        Inode, change time and modification time in nanoseconds since 1970, size in bytes: one of them changes whenever
        the file does. All are -1 for a missing file. In an archive, inode and times are those of the archive.
    columns : mapping of str to tuple of str, length n
        Further columns of a manifest, as text.
    reader : callable, optional
        Path -> bytes, if the images are not files on disk.
    reading : dict
        ``Reading.record``: what it takes to read the same classes and splits again; empty for a plain source.
    left_out : frozenset of str
        Paths of further images of the source, if these are `some` of them.
    target : Target, optional
        What is to be predicted where it is not one class; there are no classes then, and all ``labels`` are -1.
    united : bool
        Whether images of the same bytes are one image that has the labels of all of them: those of several class folders.
    replaced : set of str
        Paths of objects in a store that were another version when they were read; it grows while images are read.
    versions : sequence of str, length n, optional
        What a store calls the version of each object, or of the one that holds the image, such as its ETag; empty if it says
        none or the image is a file.
    """

    description: str
    root: Path | str
    paths: Sequence[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    given_splits: np.ndarray
    groups: tuple[str, ...] | None
    stamps: np.ndarray
    columns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    reader: Callable[[str], bytes] | None = dataclasses.field(default=None, repr=False)
    reading: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    target: Target | None = None
    united: bool = False
    replaced: Set[str] = frozenset()
    versions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def sizes(self) -> np.ndarray:
        """Size in bytes, int64, (n,); -1 for a missing file."""
        return self.stamps[:, 3]

    @property
    def mtimes_ns(self) -> np.ndarray:
        """Modification time in nanoseconds since 1970, int64, (n,); -1 for a missing file."""
        return self.stamps[:, 2]

    @property
    def strata(self) -> np.ndarray:
        """A number for images that are alike, int32, (n,), -1 for unlabelled: the label, or `Target.strata`."""
        return self.labels if self.target is None else self.target.strata

    @property
    def threads(self) -> int:
        """How many threads read and decode: one for each processor, more where reading is waiting for a store."""
        return processors() if self.versions is None else max(_WAITING, processors())

    def evenly(self, limit: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Choose at most ``limit`` of these rows, or of all, taken in turn from each class and given split.

        Returns
        -------
        int64, ascending
        """
        rows = np.arange(len(self)) if rows is None else rows
        kinds = self.strata[rows].astype(np.int64) * 8 + self.given_splits[rows]
        place = np.empty(len(rows), np.int64)  # how many of its kind come before a row
        for kind in np.unique(kinds):
            of_kind = np.flatnonzero(kinds == kind)
            place[of_kind] = np.arange(len(of_kind))
        return np.sort(rows[np.lexsort((rows, place))[:limit]])

    def some(self, rows: np.ndarray) -> ImageSet:
        """Return the images of these rows, with all classes."""

        def chosen(values: Sequence[str]) -> tuple[str, ...]:
            return tuple(values[row] for row in rows.tolist())

        paths = chosen(self.paths)
        return dataclasses.replace(
            self,
            paths=paths,
            left_out=self.left_out | (set(self.paths) - set(paths)),
            labels=self.labels[rows],
            given_splits=self.given_splits[rows],
            groups=None if self.groups is None else chosen(self.groups),
            stamps=self.stamps[rows],
            columns={name: chosen(values) for name, values in self.columns.items()},
            versions=None if self.versions is None else chosen(self.versions),
            target=None if self.target is None else self.target.some(rows),
        )

    def read(self, index: int) -> bytes:
        """Return the bytes of one image file; may be called from many threads.

        Raises
        ------
        UnreadableImageError
            As raised by ``features.pixels.decode.read_bytes``; with the reason ``truncated`` or ``unreadable`` for a
            damaged member of an archive.
        SourceError
            If an archive was changed or removed after it was scanned.
        """
        return self.read_path(self.paths[index])

    def read_path(self, path: str) -> bytes:
        """Return the bytes of the image file with this path; see ``read``."""
        return self.reader(path) if self.reader is not None else read_bytes(os.path.join(self.root, path))
