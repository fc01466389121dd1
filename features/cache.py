"""The user's cache folder: what lies there can be made again, and is believed only if this user's own runs wrote it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from features.canonical import canonical_json
from features.errors import StoreError
from features.files import whole_file
from features.ownership import foreign
from features.signing import is_signed, signature
from features.temporary import system_root, temporary_path

logger = logging.getLogger(__name__)
CACHE_NAME = "bottleneck-features"
_SIGNATURE_BYTES = 64


def cache_path(*names: str) -> Path:
    """Return the absolute path of a file or folder in the cache. It is created by the code that writes to it, not here.

    The cache is ``BOTTLENECK_CACHE`` if set, else ``$XDG_CACHE_HOME/bottleneck-features``, else
    ``~/.cache/bottleneck-features`` (XDG Base Directory Specification 0.8, which also says that a relative
    ``XDG_CACHE_HOME`` must be ignored). Where another user could write it, or there is no home folder, a warning says
    so, and a private folder takes its place until the process ends.
    """
    try:
        folder = wanted_folder()
    except RuntimeError as error:
        return _private_folder(f"the cache has no home folder ({error})").joinpath(*names)
    path = folder.joinpath(*names)
    if reason := foreign(folder) or foreign(path):
        return _private_folder(f"the cache {folder} is not used, because {reason}").joinpath(*names)
    return path


def wanted_folder() -> Path:
    """Return the folder of the cache, whether or not it can be used; raises ``RuntimeError`` without a home folder."""
    if own := os.environ.get("BOTTLENECK_CACHE"):
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / CACHE_NAME


@functools.cache
def _private_folder(problem: str) -> Path:
    folder = temporary_path(system_root() / CACHE_NAME)
    try:
        folder.mkdir(0o700)
    except OSError as error:
        raise StoreError(
            f"{problem}, and no folder can be made in {folder.parent} ({error.strerror}); set TMPDIR or BOTTLENECK_CACHE to a "
            "folder that only you can write"
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.warning(
        "%s: what this run keeps goes to %s and is removed at its end. Set BOTTLENECK_CACHE to a folder that only you can "
        "write, or remove what others could have written.",
        *(problem, folder),
    )
    return folder


def write_signed(path: Path, content: bytes | memoryview | mmap.mmap) -> str:
    """Write a file of the cache with this user's signature in front, and return that; the file is whole or as it was before.

    Raises
    ------
    OSError
        As the file system raises it: the caller decides whether the file matters.
    """
    with whole_file(path) as file:  # before the key is made, so that a home without both is said once
        seal = signature(hashlib.sha256(content).hexdigest(), _purpose(path))
        file.write(seal.encode("ascii"))
        file.write(content)
    return seal


@contextlib.contextmanager
def signed_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that ``write_signed`` made, at the beginning of its content.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not as this user wrote it: damaged, of another name, or signed with another key.
    """
    with open(path, "rb") as file:
        claimed = file.read(_SIGNATURE_BYTES).decode("ascii", "replace")
        if not is_signed(hashlib.file_digest(file, "sha256").hexdigest(), _purpose(path), claimed):
            raise ValueError("it does not carry this user's signature")
        file.seek(_SIGNATURE_BYTES)
        yield file


def seal_of(file: BinaryIO) -> str:
    """Return the signature of a file that ``signed_file`` opened: it tells contents apart without hashing them again."""
    file.seek(0)
    return file.read(_SIGNATURE_BYTES).decode("ascii")


def kept_json(path: Path) -> Any:
    """Read what ``keep_json`` wrote; None if there is nothing or, with a warning, if it is not as this user wrote it."""
    try:
        with signed_file(path) as file:
            return json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is not used (%s); it is made again", path, error)
        return None


def keep_json(path: Path, values: Any) -> None:
    """Write plain values to a file of the cache; a failure costs a warning and the time to find them out again."""
    try:
        write_signed(path, canonical_json(values).encode("ascii"))
    except OSError as error:
        logger.warning("%s could not be written (%s)", path, error)


def _purpose(path: Path) -> str:
    return f"cache/{path.parent.name}/{path.name}"
