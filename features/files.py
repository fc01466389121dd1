"""Files on disk: whole or absent, durable, named by their hash, shown safely."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from features.errors import StoreError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on a clean exit make it durable and rename it, else remove it.

    Raises
    ------
    StoreError
        If the folder cannot be written or the disk is full; ``path`` is then as it was before.
    """
    try:
        with _replacement(path) as temporary:
            yield temporary
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{path}: could not be written ({error.strerror or error}). Expected a writable folder with enough "
            "free space; what was there before is untouched."
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
def _replacement(path: Path) -> Iterator[Path]:
    """What both have in common; OSError passes through."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
    """Make sure, before any work, that files can be created in a folder.

    Raises
    ------
    StoreError
        If not.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(f"{folder}: cannot write there ({error.strerror or error}). Give another folder.") from error
