"""Temporary names that say which process made them, so that what a killed process left is removed by the next one.

    .report.html.MACHINE-PROCESS-BORN-TOKEN.tmp     beside the file or folder that it will become

MACHINE is a digest of host name, machine id and process namespace; BORN one of the last boot and the time at which the
process was started, because the numbers of processes are used again. What belongs to a process that runs, or of which
that cannot be known, stays; of another machine, which may share the file system, it stays for ``PATIENCE_DAYS``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from features.errors import StoreError

PATIENCE_DAYS = 30
NAME_BYTES = 200  # of 255 that a file system allows; longer names are cut
_UNKNOWN = "0" * 8
_MARK = re.compile(r"\.([0-9a-f]{8})-([1-9]\d*)-([0-9a-f]{8})-[0-9a-f]{8}\.tmp")


def temporary_path(path: Path) -> Path:
    """Return a new hidden name beside ``path``. What dead processes left in the folder is removed first, once a process."""
    _sweep_once(path.parent, os.getpid())
    name = path.name
    while len(os.fsencode(name)) > NAME_BYTES:
        name = name[:-1]
    return path.with_name(f".{name}.{_machine()}-{os.getpid()}-{_born(os.getpid())}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def temporary_folder(path: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """Make a folder of a temporary name beside ``path``, and remove it at the end if it still has that name."""
    folder = temporary_path(path)
    folder.mkdir(mode)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def system_folder() -> Iterator[Path]:
    """Make a folder in the system's folder for temporary files that only this user can read; it is removed at the end."""
    with temporary_folder(system_root() / "bottleneck", mode=0o700) as folder:
        yield folder


def system_root() -> Path:
    """Return the system's folder for temporary files. ``tempfile`` would try it with a file, which a kill would leave."""
    if tempfile.tempdir is None:
        wanted = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
        for folder in filter(None, [*wanted, "/tmp"]):
            if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
                return Path(os.path.abspath(folder))
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise StoreError(
            "there is no folder for temporary files that can be written; make /tmp writable, or set TMPDIR"
        ) from error


@contextlib.contextmanager
def temporary_files_together() -> Iterator[None]:
    """Let ``tempfile`` use a folder of this process's own, also for libraries, whose files would outlive a SIGKILL.

    Where the system's folder cannot be written, everything is as without this function.
    """
    before, folder = tempfile.tempdir, None
    with contextlib.suppress(OSError):
        folder = temporary_path(system_root() / "bottleneck")
        folder.mkdir(0o700)
        tempfile.tempdir = str(folder)
        # Without a writable home Matplotlib keeps a folder here, and complains at exit if it is gone by then. What is
        # registered first is called last.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        yield
    finally:
        tempfile.tempdir = before
        if folder is not None and not any(folder.glob("matplotlib-*")):
            shutil.rmtree(folder, ignore_errors=True)


def sweep_dead(folder: Path) -> None:
    """Remove the temporary files and folders that dead processes left in ``folder``; what cannot be removed stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            mark = _MARK.search(entry.name) if entry.name.startswith(".") and entry.name.endswith(".tmp") else None
            if mark and mark.end() == len(entry.name) and _is_dead(entry, *mark.groups()):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


@functools.lru_cache(maxsize=1024)
def _sweep_once(folder: Path, process: int) -> None:
    sweep_dead(folder)


def _is_dead(entry: os.DirEntry[str], machine: str, process: str, born: str) -> bool:
    if machine != _machine():
        try:
            return entry.stat(follow_symlinks=False).st_mtime < time.time() - PATIENCE_DAYS * 86400
        except OSError:
            return False
    try:
        os.kill(int(process), 0)  # a signal that does nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it belongs to another user
        pass
    now = _born(int(process))
    return _UNKNOWN not in (now, born) and now != born


@functools.cache
def _machine() -> str:
    facts = [platform.node()]
    with contextlib.suppress(OSError):
        facts.append(Path("/etc/machine-id").read_text())
    with contextlib.suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))  # of a container
    return _digest(facts)


def _born(process: int) -> str:
    """Digest the start of a process; zeros where that is not known: it has gone, is hidden, or there is no ``/proc``."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        # proc(5): the fields from the third on; the second may hold blanks and brackets
        fields = Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return "zombie" if fields[0] == "Z" else _digest([boot, fields[19]])  # it has ended, and nobody asked how
    except (OSError, IndexError):
        return _UNKNOWN


def _digest(facts: list[str]) -> str:
    return hashlib.sha256("\0".join(facts).encode("utf-8", "backslashreplace")).hexdigest()[:8]
