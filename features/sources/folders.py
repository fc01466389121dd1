"""Find the images below a folder: which files count, which folders are entered, what is left out and reported."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from features.errors import SourceError
from features.progress import counted
from features.sources.splits import listed

logger = logging.getLogger(__name__)

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".jp2",
    ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".npy", ".dcm", ".dicom",
})
# fmt: on
# Besides all hidden ones: what macOS, Windows, Synology and QNAP put into folders, recycle bins and snapshots included.
# Lower case; "recycled" alone may well be a class.
# fmt: off
IGNORED_NAMES = frozenset({
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information", "found.000",
    "lost+found", "@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "@tmp", "@sharebin", "network trash folder",
    "temporary items",
})
# fmt: on

ODD_CHARACTERS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8

# Links to folders are followed at the depths of split and class folders, as Keras does, but not below them.
_LINKED_DEPTH = 2


class File(NamedTuple):
    """An image file: path with ``/``, and what tells whether it has changed; all numbers are -1 if it is missing.

    Parameters
    ----------
    path : str
        Path inside the source.
    size : int
        Size in bytes.
    mtime_ns, inode, ctime_ns : int
        Modification time in nanoseconds, inode and change time in nanoseconds; in an archive, those of the archive.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int = -1
    ctime_ns: int = -1

    @property
    def stamp(self) -> tuple[int, int, int, int]:
        """What changes whenever the file does: inode, change time, modification time, size."""
        return self.inode, self.ctime_ns, self.mtime_ns, self.size

    @classmethod
    def of(cls, path: str, status: Any, size: int | None = None) -> File:
        """Return a file with the status, as of ``os.stat``, of its own or, if ``size`` is given, of the archive that it is in."""
        inode = status.st_ino & (1 << 63) - 1  # some file systems use all 64 bits; stores of numbers have a sign
        size = status.st_size if size is None else size
        return cls(path, size, status.st_mtime_ns, inode, status.st_ctime_ns)


class Files(NamedTuple):
    """The columns of many files: their paths, and their stamps, int64, (n, 4)."""

    paths: Sequence[str]
    stamps: np.ndarray

    @classmethod
    def of(cls, files: Sequence[File]) -> Files:
        """Return the columns of files."""
        stamps = np.array([file.stamp for file in files], np.int64).reshape(-1, 4)
        return cls(tuple(file.path for file in files), stamps)


def look_at(root: Path, path: str) -> File:
    """Return what is to be known of a file, which may be missing."""
    try:
        return File.of(path, os.stat(os.path.join(root, path)))
    except OSError:
        return File(path, -1, -1)


def walk(root: Path) -> tuple[list[File], list[str]]:
    """Return the images at any depth, and all folders, both relative to ``root`` and sorted by code point.

    No folder is entered twice, whatever links lead to it; real folders are entered before linked ones.
    """
    files: list[File] = []
    folders: list[str] = []
    left_out: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    pending, linked, skipped = [""], list[str](), list[str]()
    while pending or linked:
        if not pending:
            linked.sort(reverse=True)
        relative = pending.pop() if pending else linked.pop()
        folder = os.path.join(root, relative)
        prefix = f"{relative}/" if relative else ""
        depth = prefix.count("/")
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                skipped.append(relative)
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.append(relative)
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if is_ignored(name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(prefix + name)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        (linked if depth < _LINKED_DEPTH else skipped).append(prefix + name)
                    elif suffix_of(name) in IMAGE_SUFFIXES:
                        files.append(_look_at_entry(entry, prefix + name))
                    else:
                        left_out[suffix_of(name) or "no suffix"] += 1
        except OSError as error:
            raise SourceError(f"{folder} cannot be listed ({error.strerror}); every folder must be readable") from error
    warn_left_out(root, left_out)
    if skipped:
        logger.warning("%s: links to folders that are not followed: %s", root, listed(sorted(skipped)))
    return sorted(files), sorted(folders)


def is_ignored(name: str) -> bool:
    """Whether a file or folder of that name is skipped silently: it is hidden, or made by an operating system."""
    return name[0] == "." or name.casefold() in IGNORED_NAMES


def suffix_of(name: str) -> str:
    """Return the suffix in lower case with its dot; empty if there is none."""
    return os.path.splitext(name)[1].lower()


def warn_left_out(root: Path | str, left_out: Counter[str]) -> None:
    """Log how many files of which suffix are left out because they are not images."""
    if left_out:
        kinds = [f"{suffix} {count}" for suffix, count in sorted(left_out.items())]
        number = counted(left_out.total(), "file")
        logger.warning("%s: left out: %s of other kinds: %s", root, number, ", ".join(kinds[:20]))


def _look_at_entry(entry: os.DirEntry[str], path: str) -> File:
    try:
        return File.of(path, entry.stat())
    except OSError:  # a broken link: kept, so that it is listed as missing
        return File(path, -1, -1)
