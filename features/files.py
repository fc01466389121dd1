"""Files on disk: whole or absent, durable, held by one writer, named by their hash, shown safely."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from features.errors import BottleneckError, ConfigurationError, LockedError, StoreError

CACHE_NAME = "bottleneck-features"


@contextlib.contextmanager
def atomic_file(path: Path, *, once: bool = False) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on a clean exit make it durable and rename it, else remove it.

    With ``once`` a file that has come there meanwhile stays, and this one goes.

    Raises
    ------
    StoreError
        If the folder cannot be written or the disk is full; ``path`` is then as it was before.
    """
    with writing(path), _replacement(path, once=once) as temporary:
        yield temporary


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of ``path`` what the file system refuses while it is written, as StoreError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BottleneckError):
            raise
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                reason += f", {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free"
        raise StoreError(
            f"{path}: could not be written ({reason}). Expected a writable folder with enough free space; what was "
            "there before is untouched. Make room and run the same command again."
        ) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """`atomic_file` opened for writing, in a folder that is made if it is missing; for files of a cache.

    Raises
    ------
    OSError
        As the file system does: the caller decides whether the file mattered.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacement(path) as temporary, open(temporary, "xb") as file:
        yield file


@contextlib.contextmanager
def _replacement(path: Path, *, once: bool = False) -> Iterator[Path]:
    """What both have in common; OSError passes through."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file; give another name", str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        if not (once and path.exists()):
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(out: Path, *, seconds: float = 0.0) -> Iterator[None]:
    """Hold the writer's lock of a store, after waiting for it at most so many seconds.

    Raises
    ------
    LockedError
        Naming the process that holds it.
    """
    import filelock

    holder = out.with_name(f".{out.name}.writer")
    path = out.with_name(f".{out.name}.lock")
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout as error:
        who = holder.read_text() if holder.exists() else "another process"
        raise LockedError(f"{out}: {who} is writing it. Wait for it to end, or stop it.") from error
    try:
        with writing(out):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # while it is held: filelock does not accept a lock on a file without a name
        lock.release()


def behind_link(path: Path) -> Path:
    """The file that a link leads to, so that the link stays one; any other path as it was given."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def sweep(out: Path) -> None:
    """Remove what a process that was killed left beside a store; nobody else writes while its lock is held."""
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


class PatientFile:
    """A new file for a library that cannot bear an error while it writes.

    libhdf5 leaves a file that it could not flush half open, keeps its space until the process ends, and crashes
    there. So from the first error on (a full disk, a quota, Ctrl-C) every call succeeds and does nothing, and
    ``check`` raises that error. It has what ``h5py.File`` asks of a file object.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._position = self._end = 0
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raise the first error there was."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Give the file back to the system; more than once is harmless."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (self._end if whence == os.SEEK_END else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        data = self._attempt(os.pread, size, self._position) or b""
        return data.ljust(size, b"\0")

    def write(self, data: bytearray) -> int:
        self._end = max(self._end, self._position + len(data))
        rest, position = memoryview(data), self._position
        while rest and (written := self._attempt(os.pwrite, rest, position)):
            rest, position = rest[written:], position + written
        return len(data)

    def truncate(self, size: int) -> int:
        self._end = size
        self._attempt(os.ftruncate, size)
        return size

    def flush(self) -> None:
        """Nothing is held back."""

    def _attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a system call; None from the first error on."""
        if self._error is None:
            try:
                return call(self._descriptor, *arguments)
            except BaseException as error:  # noqa: BLE001  Ctrl-C too: `check` raises it
                self._error = error
        return None


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """sha256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def printable(path: str) -> str:
    """A path as text that any terminal takes: bytes that are no UTF-8 and control characters are escaped."""
    text = path.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode("ascii") for mark in text)


def writable_folder(folder: Path) -> None:
    """Make a folder, if it is missing, and make sure, before any work, that files can be created in it.

    Raises
    ------
    StoreError
        If not.
    """
    with _checking(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _try_to_write(folder)


def creatable_folder(folder: Path) -> None:
    """Make sure, before any work, that files can be created in a folder that may be missing; nothing is made.

    Raises
    ------
    StoreError
        If not.
    """
    with _checking(folder):
        _try_to_write(next(path for path in (folder, *folder.absolute().parents) if path.exists()))


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):  # without a name, so that a kill leaves nothing
        pass


@contextlib.contextmanager
def _checking(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        in_the_way = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        reason = f"{in_the_way} is a file, no folder" if in_the_way else error.strerror or error
        raise StoreError(f"{folder}: cannot write there ({reason}). Give another folder.") from error


def cache_folder() -> Path:
    """The user's cache folder, absolute. It is not made here; whoever writes into it makes it.

    ``BOTTLENECK_CACHE`` if set, else ``$XDG_CACHE_HOME/bottleneck-features``, else
    ``~/.cache/bottleneck-features`` (XDG Base Directory Specification 0.8, which also says that a
    relative ``XDG_CACHE_HOME`` is to be ignored).

    Raises
    ------
    ConfigurationError
        If there is no home folder to put it in.
    """
    try:
        if own := os.environ.get("BOTTLENECK_CACHE"):
            return Path(own).expanduser().absolute()
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (shared if shared.is_absolute() else Path.home() / ".cache") / CACHE_NAME
    except RuntimeError as error:
        raise ConfigurationError(f"no home folder for the cache ({error}); set BOTTLENECK_CACHE to a folder") from error
