"""Notes of this machine on image files: which content a file had when it was read, and how to tell that it is unchanged.

    image set --stamps--> note of the last run --same stamp--> content hash | else the file is read and hashed

Size and time do not tell: they stay the same when two files are exchanged, and many programs set the time back. Nobody
can set the change time (ctime) of a file back, so a file whose inode, change time, modification time and size are as
noted is unchanged. The notes lie in the cache folder, one file for each store and image root: they are worth something
on one machine only, and the store itself stays the same.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from features.cache import cache_path, signed_file, write_signed
from features.canonical import digest_of
from features.pixels.decode import decoder_version
from features.scratch import kept, scratch, written
from features.texts import Lookup, Texts, keys_of

logger = logging.getLogger(__name__)
_STEP = 1 << 14  # files that are compared or written at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Notes:
    """What is noted about the files of one image root.

    Parameters
    ----------
    path : Path
        Where the notes are kept.
    paths : Texts
        Paths as the source names them.
    stamps : int64, (n, 4)
        Inode, change time and modification time in nanoseconds, size in bytes.
    sha256 : uint8, (n, 32)
        Hash of the content.
    decoder : str
        Versions of what tried to decode the files (``features.pixels.decode.decoder_version``).
    """

    path: Path
    paths: Texts = dataclasses.field(default_factory=lambda: Texts.of(()))
    stamps: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 4), np.int64))
    sha256: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 32), np.uint8))
    decoder: str = dataclasses.field(default_factory=lambda: decoder_version())

    @classmethod
    def read(cls, store: Path, root: str) -> Notes:
        """Read the notes on the images in ``root`` whose features are in ``store``; empty if there are none."""
        path = cache_path("notes", f"{digest_of([os.path.realpath(store), root])}.npz")
        try:
            status = os.stat(path)
            return _kept(path, (status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size))
        except OSError:
            return cls.read_file(path)

    @classmethod
    def read_file(cls, path: Path) -> Notes:
        """Read a file of notes; empty if there is none."""
        try:
            with signed_file(path) as file, np.load(file, allow_pickle=False) as archive:
                paths = _texts(archive["paths"])
                stamps, sha256 = (kept(archive[name]) for name in ("stamps", "sha256"))
                decoder = archive["decoder"].tobytes().decode() if "decoder" in archive.files else ""
            if stamps.shape != (len(paths), 4) or sha256.shape != (len(paths), 32):
                raise ValueError("its columns differ in length")
            return cls(path, paths, stamps, sha256, decoder)
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s is not used (%s); images are read and hashed again", path, error)
            return cls(path)

    @functools.cached_property
    def _index(self) -> Lookup:
        return Lookup(keys_of(self.paths, len(self.paths)))

    def rows(self, paths: Sequence[str], stamps: np.ndarray) -> np.ndarray:
        """Return the row of the note on each file that is as noted, int64, (n,), -1 for the others.

        Parameters
        ----------
        paths : sequence of str, length n
            Paths as the source names them.
        stamps : int64, (n, 4)
            Of the files now.
        """
        same = len(paths) == len(self.paths) and self.paths == paths
        rows = np.arange(len(paths)) if same else self._index.last(keys_of(paths, len(paths)))
        there = np.flatnonzero(rows >= 0)
        for start in range(0, len(there), _STEP):
            some = there[start : start + _STEP]
            rows[some[(self.stamps[rows[some]] != stamps[some]).any(axis=1)]] = -1
        return rows

    def hashes(self, paths: Sequence[str], stamps: np.ndarray) -> list[bytes | None]:
        """Return the content hash of each file that is as noted, None for the others; parameters are those of ``rows``."""
        return [None if row < 0 else self.sha256[row].tobytes() for row in self.rows(paths, stamps).tolist()]

    def of(self, paths: Sequence[str], stamps: np.ndarray, sha256: np.ndarray) -> Notes:
        """Return notes on these files alone, made now; columns are those of ``Notes``."""
        return Notes(self.path, Texts.of(paths), stamps, sha256)

    def replaced(self, paths: Sequence[str], stamps: np.ndarray, hashes: Sequence[bytes | None]) -> Notes:
        """Return notes on these files alone; files without a hash are left out."""
        rows = [row for row, sha256 in enumerate(hashes) if sha256 is not None]
        digests = np.frombuffer(b"".join(filter(None, hashes)), np.uint8).reshape(-1, 32)
        return self.of([paths[row] for row in rows], stamps[rows], digests)

    def updated(self, paths: Sequence[str], stamps: np.ndarray, hashes: Sequence[bytes | None]) -> Notes:
        """Return these notes with those on some files in place of what was noted about them."""
        news = [None if noted == now else now for noted, now in zip(self.hashes(paths, stamps), hashes, strict=True)]
        if not any(news):
            return self
        new = self.replaced(paths, stamps, news)
        others = set(new.paths)
        rest = [row for row, path in enumerate(self.paths) if path not in others]
        stamps_of, sha256 = (
            np.concatenate([a[rest], b]) for a, b in ((self.stamps, new.stamps), (self.sha256, new.sha256))
        )
        return self.of([*(self.paths[row] for row in rest), *new.paths], stamps_of, sha256)

    def write(self, before: Notes | None = None) -> None:
        """Keep the notes, unless they are as ``before``; a warning says if they cannot be kept."""
        if before is self or (before is not None and self._same(before)):
            return
        columns = {"paths": _joined(self.paths), "decoder": np.frombuffer(self.decoder.encode(), np.uint8)}
        columns |= {"stamps": self.stamps, "sha256": self.sha256}
        try:
            with written(lambda file: np.savez(file, **columns)) as content:  # type: ignore[arg-type]
                write_signed(self.path, content)
        except OSError as error:  # the notes only save time
            logger.warning(
                "%s could not be written (%s); the next run reads and hashes the images again, unless you add --trust-times",
                *(self.path, error.strerror or error),
            )

    def _same(self, other: Notes) -> bool:
        columns = ((self.stamps, other.stamps), (self.sha256, other.sha256))
        same = (self.paths, self.decoder) == (other.paths, other.decoder)
        return same and all(np.array_equal(*pair) for pair in columns)


def _joined(paths: Texts) -> np.ndarray:
    """Return texts in UTF-8, each with a NUL behind it, uint8."""
    found = scratch((len(paths.utf8) + len(paths),), "u1")
    done = 0
    encoded = paths.encoded()
    while some := [*itertools.islice(encoded, _STEP)]:
        data = b"".join(b"%s\0" % text for text in some)
        found[done : done + len(data)] = np.frombuffer(data, "u1")
        done += len(data)
    return found[:done]


def _texts(joined: np.ndarray) -> Texts:
    """Return the texts of which ``_joined`` made an array; what follows the last NUL is left out."""
    ends = np.flatnonzero(joined == 0)
    joined = joined[: int(ends[-1]) if len(ends) else 0]
    return Texts(kept(joined[joined != 0]), kept(ends - np.arange(len(ends))))


@functools.lru_cache(maxsize=2)
def _kept(path: Path, stamp: tuple[int, ...]) -> Notes:
    """The notes in a file as long as it stays the same."""
    return Notes.read_file(path)
