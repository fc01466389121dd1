"""Signatures with a key that only this user has: they tell what the user's own runs wrote from what was put there.

The key is 32 random bytes in the user's configuration folder, made when it is first needed.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import logging
import os
import secrets
from pathlib import Path

from features.ownership import foreign, make_folder
from features.temporary import temporary_path

logger = logging.getLogger(__name__)
KEY_BYTES = 32


def signature(data: bytes | str, purpose: str) -> str:
    """Sign data, or a digest of it, for one purpose.

    Parameters
    ----------
    data : bytes or str
        What is signed; of large data, its sha256.
    purpose : str
        What the data are for. A signature for one purpose is not valid for another, so a file cannot be passed off as
        one of another kind or name.

    Returns
    -------
    str
        HMAC-SHA256 (RFC 2104), 64 hexadecimal digits.
    """
    content = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    about = purpose.encode("utf-8", "surrogateescape")
    return hmac.digest(user_key(), len(about).to_bytes(8, "big") + about + content, "sha256").hex()


def is_signed(data: bytes | str, purpose: str, claimed: str) -> bool:
    """Whether ``claimed`` is the signature of these data for this purpose; the time does not depend on the answer."""
    return hmac.compare_digest(signature(data, purpose).encode(), claimed.encode("utf-8", "replace"))


def key_file() -> Path:
    """Return the path of the key: ``$XDG_CONFIG_HOME/bottleneck-features/key``, or below ``~/.config``.

    A relative ``XDG_CONFIG_HOME`` is ignored, as the XDG Base Directory Specification 0.8 says.

    Raises
    ------
    RuntimeError
        If there is no home folder.
    """
    given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".config") / "bottleneck-features" / "key"


@functools.cache
def user_key() -> bytes:
    """Return the user's key; where it cannot be kept safely, one of this process only."""
    try:
        return _kept_key(key_file())
    except (OSError, RuntimeError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        logger.warning(
            "this user has no key that later runs will know (%s): what this run keeps is made again next time. Set "
            "XDG_CONFIG_HOME to a folder that only you can write.",
            reason,
        )
        return secrets.token_bytes(KEY_BYTES)


def _kept_key(path: Path) -> bytes:
    """Return the key in a file, which is made if it is missing.

    Raises
    ------
    OSError
        If it cannot be read or made.
    ValueError
        If others could read or change it, or it is not a key.
    """
    if reason := foreign(path):
        raise ValueError(reason)
    if not path.exists():
        _make_key(path)
        if reason := foreign(path):  # somebody was faster
            raise ValueError(reason)
    with open(path, "rb") as file:
        mode, key = os.fstat(file.fileno()).st_mode, file.read(KEY_BYTES + 1)
    if mode & 0o077:
        raise ValueError(f"{path} may be read by others; remove it, and a new key is made")
    if len(key) != KEY_BYTES:
        raise ValueError(f"{path} is not a key of {KEY_BYTES} bytes; remove it, and a new one is made")
    return key


def _make_key(path: Path) -> None:
    """Write a new key; of several processes that do so at the same time, the first one decides."""
    make_folder(path.parent.parent)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
