"""Files in buckets that hold many images: tars, Parquet files and manifests, read block by block as files on a disk are.

    address --InBucket.stat()--> size, version        .open() --seek, read--> blocks, each read once, a few kept for all threads

``InBucket`` has what ``Path`` offers of a file, so that one code reads both. Each block is of the version that was listed, or an
error: a file that was replaced in between never gives a wrong image. What is read to list a tar is nearly all of it, so these
blocks are kept on the disk for the images that are read next, while there is room.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import io
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np

from features.errors import SourceError
from features.pixels.limits import MAX_BYTES
from features.progress import Progress
from features.scratch import unnamed_file
from features.sources.objects import Found, UnavailableError, without_secrets
from features.sources.remote import Bucket, checked, is_address, store_of, tried
from features.texts import Coded

BLOCK_BYTES = 4 << 20
_KEPT = 16  # blocks, of all files together
_FREE = 0.1  # share of a disk that stays free when blocks are kept there
_LISTED_AT_ONCE = 8  # files
_T = TypeVar("_T")


class Status(NamedTuple):
    """What ``os.stat`` says of a file: size, times and inode change whenever the version of the object does."""

    st_size: int
    st_mtime_ns: int
    st_ino: int
    st_ctime_ns: int


class InBucket:
    """A file in a bucket.

    Parameters
    ----------
    address : str
        Of ``s3://`` or ``gs://``.

    Raises
    ------
    SourceError
        If the address is none of a bucket; and by every method, if there is no such file, it may not be read, the store does not
        answer, or the file was replaced since it was first looked at.
    """

    def __init__(self, address: str) -> None:
        self.address = without_secrets(checked(address, buckets_only=True))
        path = PurePosixPath(self.address)
        self.name, self.stem, self.suffix = path.name, path.stem, path.suffix
        self.kept: _OnDisk | None = None
        self.room: _OnDisk | None = None  # where blocks are kept once the file is listed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None, "room": None}  # a file without a name is this process's own

    def __str__(self) -> str:
        return self.address

    @property
    def parent(self) -> str:
        """Address of the folder that holds the file."""
        return self.address.rpartition("/")[0]

    @functools.cached_property
    def found(self) -> Found:
        """Size and version when the file was first looked at."""
        return self._look()

    def stat(self) -> Status:
        """Return size, times and inode."""
        file = self.found.file("")
        return Status(file.size, file.mtime_ns, file.inode, file.ctime_ns)

    def is_file(self) -> bool:
        """Whether there was such a file when it was first looked at."""
        if "found" not in self.__dict__:
            try:
                self.found = tried(lambda: self._store.look(self.address), self.address)
            except FileNotFoundError:
                return False
        return True

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file; may be called from many threads, each reads its own stream."""
        return cast("BinaryIO", _Stream(self))

    def open_once(self) -> BinaryIO:
        """Open the file to read most of it: its blocks are kept on the disk until the process ends, while there is room."""
        self.kept = self.kept or self.room or _OnDisk()
        return self.open()

    def open_in_order(self) -> BinaryIO:
        """Open the file to read it once from its beginning to its end: none of its blocks is kept on the disk."""
        self.kept = None
        return self.open()

    def read_bytes(self) -> bytes:
        """Return all bytes of a small file."""
        if self.found.size > MAX_BYTES:
            raise SourceError(f"{self}: has {self.found.size} bytes, expected at most {MAX_BYTES}; download it")
        return self.open().read()

    def block(self, number: int) -> bytes:
        """Return one block, from those that are kept or from the store."""
        key = (os.getpid(), self.address, self.found, number)
        with _lock:
            future, mine = _blocks.get(key), key not in _blocks
            future = _blocks.setdefault(key, Future() if future is None else future)
            _blocks.move_to_end(key)
            while len(_blocks) > _KEPT:
                _blocks.popitem(last=False)
        if mine:
            try:
                future.set_result(self._fetched(number))
            except BaseException as error:  # noqa: BLE001  it is raised below
                with _lock:
                    _blocks.pop(key, None)
                future.set_exception(error)
        return future.result()

    @property
    def _store(self) -> Bucket:
        return cast("Bucket", store_of(self.address, frozenset()))

    def _look(self) -> Found:
        try:
            return tried(lambda: self._store.look(self.address), self.address)
        except FileNotFoundError as error:
            raise SourceError(f"{self} does not exist: there is no such object or bucket") from error

    def _fetched(self, number: int) -> bytes:
        if self.kept is None:
            return self._downloaded(number)
        if (data := self.kept.get(self.address, number)) is None:
            self.kept.put(self.address, number, data := self._downloaded(number))
        return data

    def _downloaded(self, number: int) -> bytes:
        start, stop = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self.found.size)

        def fetch() -> bytes:
            data = self._store.get_range(self.address, start, stop)
            if len(data) != stop - start and self._store.look(self.address) == self.found:
                raise UnavailableError(f"received {len(data)} of {stop - start} bytes")
            return data

        try:
            data = tried(fetch, self.address)
        except FileNotFoundError as error:
            raise SourceError(f"{self} has been removed since it was listed; put it back and run again") from error
        now = self._look()
        if (now.size, now.version) != (self.found.size, self.found.version):
            raise SourceError(f"{self} has been changed since it was listed; run again")
        return data


class _OnDisk:
    """Blocks of several files in one file without a name in the cache folder, which is gone when nothing refers to it."""

    def __init__(self) -> None:
        self._lock, self._places, self._end = threading.Lock(), dict[tuple[str, int], tuple[int, int]](), 0
        self._file: BinaryIO | None = None
        self._process = os.getpid()
        with contextlib.suppress(OSError):
            self._file = unnamed_file()

    def put(self, address: str, number: int, data: bytes) -> None:
        """Keep a block; nothing is kept where the disk is nearly full, nor by a fork, which has the same file."""
        if self._file is None or self._process != os.getpid():
            return
        with contextlib.suppress(OSError), self._lock:
            disk = os.statvfs(self._file.fileno())
            if disk.f_bavail > _FREE * disk.f_blocks and os.pwrite(self._file.fileno(), data, self._end) == len(data):
                self._places[address, number] = (self._end, len(data))
                self._end += len(data)

    def get(self, address: str, number: int) -> bytes | None:
        """Return a block that was kept; None if it was not."""
        with self._lock:
            place = self._places.get((address, number))
        return None if place is None or self._file is None else os.pread(self._file.fileno(), place[1], place[0])


_blocks: OrderedDict[tuple[int, str, Found, int], Future[bytes]] = OrderedDict()
_lock = threading.Lock()


class _Stream(io.BufferedIOBase):
    """A file in a bucket from a place on."""

    def __init__(self, file: InBucket) -> None:
        self._file, self._place, self._size = file, 0, file.found.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence])
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._place + size)
        parts = []
        while self._place < stop:
            number, begin = divmod(self._place, BLOCK_BYTES)
            part = self._file.block(number)[begin : begin + stop - self._place]
            self._place += len(part)
            parts.append(part)
        return b"".join(parts)

    read1 = read


File = Path | InBucket


def file_at(text: str) -> File:
    """Return a file on a disk or in a bucket."""
    return InBucket(text) if is_address(text) else Path(os.path.abspath(os.path.expanduser(text)))


def on_disk(file: File | str) -> Path | None:
    """Return the path of a file or folder; None if it lies in a bucket."""
    return file if isinstance(file, Path) else None


def root_at(file: File | str) -> Path | str:
    """Return what names a file or folder in a store: a path, or an address."""
    return on_disk(file) or str(file)


def are_there(files: Sequence[File]) -> list[bool]:
    """Return which of several files there are; those in a bucket are asked for several at a time."""
    return _each(files, lambda file: file.is_file(), None)


def opened(files: Sequence[File], open_one: Callable[[File], _T], progress: Progress | None) -> list[_T]:
    """Open each of several files, those in a bucket several at a time; progress is called with ``("list", done, total)``."""
    remote = [file for file in files if isinstance(file, InBucket)]
    room = _OnDisk() if remote else None
    for file in remote:
        file.room = room
    return _each(files, open_one, progress)


def _each(files: Sequence[File], work: Callable[[File], _T], progress: Progress | None) -> list[_T]:
    pool, found = ThreadPoolExecutor(1 if all(map(on_disk, files)) else _LISTED_AT_ONCE), list[_T]()
    try:
        for one in pool.map(work, files):
            found.append(one)
            if progress is not None:
                progress("list", len(found), len(files))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def for_arrow(file: File) -> Any:
    """Return what pyarrow reads a file from."""
    return on_disk(file) or file.open("rb")


def prefixes(root: object, files: Sequence[File]) -> list[str]:
    """Return what stands before the names of images in each of several files: its path inside the folder of all, and ``/``.

    It is empty for a single file that is itself the ``root``.
    """
    if [str(file) for file in files] == [str(root)]:
        return [""]
    keys = [str(file).rpartition("://")[2] for file in files]
    common = os.path.commonpath([os.path.dirname(key) for key in keys])
    return [f"{os.path.relpath(key, common)}/" for key in keys]


def versions_of(files: Sequence[File], counts: Sequence[int]) -> Coded | None:
    """Return the version of the file that holds each image, given the numbers of images; None for files on a disk."""
    if all(isinstance(file, Path) for file in files):
        return None
    texts = tuple("" if isinstance(file, Path) else file.found.version for file in files)
    return Coded(texts, np.repeat(np.arange(len(files), dtype=np.int32), counts))


def matching(pattern: str) -> list[str]:
    """Return the addresses that a pattern with ``*`` or ``{}`` in its last component stands for; numbers in their order.

    Raises
    ------
    SourceError
        If there are none, or the folder cannot be listed.
    """
    folder, _, name = checked(pattern, buckets_only=True).rpartition("/")
    if "*" in folder or "{}" in folder:
        raise SourceError(f"{without_secrets(pattern)}: expected * or {{}} in the last component only")
    bucket = cast("Bucket", store_of(folder, frozenset()))
    try:
        listed = tried(lambda: bucket.list(folder), folder)
    except FileNotFoundError as error:
        raise SourceError(f"{without_secrets(folder)} does not exist: there is no such bucket or folder") from error
    parts = (fnmatch.translate(part).removesuffix(r"\Z").removesuffix(r"\z") for part in name.split("{}"))
    wanted = re.compile(r"(\d+)".join(parts))
    found = [each for each in listed if "/" not in each and wanted.fullmatch(each)]
    if not found:
        raise SourceError(f"{without_secrets(pattern)}: no such files")
    return [f"{folder}/{each}" for each in sorted(found, key=lambda each: (_numbers(wanted, each), each))]


def tables_below(folder: str) -> str:
    """Return the pattern of the Parquet files in a folder of a bucket, or in its folder ``data``; empty if there are none."""
    for place in (folder, f"{folder}/data"):
        with contextlib.suppress(SourceError):
            if matching(pattern := f"{place}/*.parquet"):
                return pattern
    return ""


def _numbers(pattern: re.Pattern[str], name: str) -> list[int]:
    match = pattern.fullmatch(name)
    return [] if match is None else [int(group) for group in match.groups()]
