"""Write files atomically and durably, lock them against a second writer, hash them, and print their paths safely."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import os
import shlex
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from features.errors import BottleneckError, LockedError, StoreError, WeightsError
from features.ownership import make_folder
from features.temporary import sweep_dead, temporary_path


@contextlib.contextmanager
def atomic_file(path: Path, *, once: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit flush it to disk and rename it, else remove it.

    With ``once``, a file that has appeared at ``path`` in the meantime is kept, and the new file is removed.

    Raises
    ------
    StoreError
        If the folder cannot be written or the disk is full; ``path`` is then as it was before.
    """
    with writing(path), _replacement(path, once=once) as temporary:
        yield temporary


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` raised while ``path`` is written into a ``StoreError``."""
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
def enough_room(folder: Path, size: int) -> Iterator[None]:
    """Blame the disk if a library fails while it writes ``size`` bytes into ``folder`` and fewer are free.

    Libraries in C++ say "iostream error" of a full disk, and remove what they had written.

    Raises
    ------
    OSError
        With ``ENOSPC``; errors of the file system and those that have another cause are passed on.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if shutil.disk_usage(folder).free >= size:
            raise
        reason = f"{os.strerror(errno.ENOSPC)}: at least {size / 1e6:.1f} MB are needed"
        raise OSError(errno.ENOSPC, reason, str(folder)) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open an ``atomic_file`` for writing, for files of a cache, which only this user may write; a missing folder is created.

    Raises
    ------
    OSError
        As the file system raises it: the caller decides whether the file matters.
    """
    make_folder(path.parent)
    with _replacement(path) as temporary, open(temporary, "xb", opener=_for_this_user) as file:
        yield file


def _for_this_user(path: str, flags: int) -> int:
    return os.open(path, flags, 0o644)


@contextlib.contextmanager
def _replacement(path: Path, *, once: bool = False) -> Iterator[Path]:
    """Do what ``atomic_file`` and ``whole_file`` have in common; an ``OSError`` is passed on."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file; give another name", str(path))
    temporary = temporary_path(path)
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
    """Hold the writer's lock of the store ``out``; wait for it for at most ``seconds``.

    Raises
    ------
    LockedError
        If another process holds the lock; the message names the process.
    """
    import filelock

    holder, path = _lock_files(out)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout as error:
        who = holder.read_text() if holder.exists() else "another process"
        raise LockedError(f"{out} is being written by {who}. Wait until that process has ended, or stop it.") from error
    try:
        with writing(out):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # before the release: filelock refuses a lock on an unlinked file
        lock.release()


def seems_locked(out: Path) -> bool:
    """Whether the writer's lock of ``out`` has files: its holder is at work, or was killed and left them."""
    return any(path.exists() for path in _lock_files(out))


def _lock_files(out: Path) -> tuple[Path, Path]:
    return out.with_name(f".{out.name}.writer"), out.with_name(f".{out.name}.lock")


def behind_link(path: Path) -> Path:
    """Return the target of a symbolic link, so that it is replaced and not the link; any other path unchanged."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def sweep(out: Path) -> None:
    """Remove the temporary files that a killed process left beside a store. The caller must hold the writer's lock."""
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


class PatientFile:
    """A new file for libhdf5, whose methods never raise while the library writes.

    When libhdf5 cannot flush a file, it leaves the file half open, keeps its disk space until the process ends, and
    then crashes. Therefore, after the first error (a full disk, a quota, Ctrl-C) every call does nothing and reports
    success; ``check`` raises the error. The class has the methods that ``h5py.File`` needs of a file object.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._position = self._end = 0
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close the file; closing it again is harmless."""
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
        """Do nothing, because nothing is buffered here."""

    def _attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a system call, or None if this call or an earlier one failed."""
        if self._error is None:
            try:
                return call(self._descriptor, *arguments)
            except BaseException as error:  # noqa: BLE001  including Ctrl-C: `check` raises it
                self._error = error
        return None


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that new file names in it survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_small(path: Path, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes, which may come from a stranger: no pipe is waited for.

    Raises
    ------
    OSError
        If it cannot be read, is no regular file or is larger.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = stream.read(min(status.st_size, most) + 1)  # for which memory is taken at once
        if len(data) == status.st_size + 1:  # it has grown, or is one of /proc
            data += stream.read(most + 1 - len(data))
    if len(data) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
    return data


def file_digest(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with named(path), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_stamp(path: Path) -> tuple[int, int, int, int]:
    """Return inode, change time, modification time and size: what changes if another file comes to lie there."""
    status = os.stat(path)
    return status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size


@dataclasses.dataclass(frozen=True)
class HashedFile:
    """A file as it was when it was hashed.

    Parameters
    ----------
    path : Path
        The file.
    sha256 : str
        64 hexadecimal digits.
    stamp : tuple of int
        ``file_stamp`` from before it was read.
    """

    path: Path
    sha256: str
    stamp: tuple[int, int, int, int]

    @classmethod
    def of(cls, path: Path) -> HashedFile:
        stamp = file_stamp(path)
        return cls(path, file_digest(path), stamp)

    def check(self) -> None:
        """Raise ``WeightsError`` if what was read since it was hashed may be something else."""
        if file_stamp(self.path) != self.stamp:
            raise WeightsError(
                f"{self.path} was changed while it was read. Run the command again when nothing writes it"
            )


def quoted(path: str | Path) -> str:
    """Return a path as one word of a POSIX shell, for a command that a message offers to type."""
    return shlex.quote(str(path))


def printable_lines(text: str) -> str:
    """Return text of several lines as any terminal can show it; see `printable`. Text that is printable stays as it is."""
    return "\n".join(map(printable, text.split("\n")))


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Give an ``OSError`` that names no file the name of this one: a failed read, such as EIO, names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def printable(path: str) -> str:
    """Return a path as text that any terminal can show: control characters and bytes that are not UTF-8 are escaped."""
    text = path.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode("ascii") for mark in text)


def writable_folder(folder: Path) -> None:
    """Create a folder if it is missing, check, before any work, that files can be created in it, and tidy it up.

    Raises
    ------
    StoreError
        If they cannot.
    """
    with _checking(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _try_to_write(folder)
    sweep_dead(folder)


def creatable_folder(folder: Path) -> None:
    """Check, before any work, that files can be created in a folder that may be missing; create nothing.

    Raises
    ------
    StoreError
        If they cannot.
    """
    with _checking(folder):
        _try_to_write(next(path for path in (folder, *folder.absolute().parents) if path.exists()))


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):  # it has no name, so a killed process leaves nothing behind
        pass


@contextlib.contextmanager
def _checking(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        in_the_way = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        reason = f"{in_the_way} is a file, not a folder" if in_the_way else error.strerror or error
        raise StoreError(f"{folder}: cannot write there ({reason}). Give another folder.") from error
