"""What is known of an object in a store that is no disk, and how its address is written without secrets."""

from __future__ import annotations

import hashlib
import time
from typing import NamedTuple

from features.sources.folders import File


class UnavailableError(OSError):
    """A store that does not answer as it should at the moment; the request is worth another try."""


class Found(NamedTuple):
    """Size in bytes, the version (ETag, else the time of the last change; empty if neither is known), and that time."""

    size: int = 0
    version: str = ""
    mtime_ns: int = 0

    def file(self, path: str) -> File:
        """Return the object as a file, whose stamp changes whenever the version does, and always if there is none."""
        if not self.version:
            return File(path, self.size, self.mtime_ns, 0, time.time_ns())
        digest = hashlib.sha256(self.version.encode("utf-8", "surrogateescape")).digest()
        first, second = (int.from_bytes(digest[start : start + 8], "little") >> 1 for start in (0, 8))
        return File(path, self.size, self.mtime_ns, first, second)


def without_secrets(address: str) -> str:
    """Return an address without user, password, query and fragment, which may hold signatures.

    Examples
    --------
    >>> without_secrets("https://me:pass@host.org:8443/a b.jpg?X-Amz-Signature=1#x")
    'https://host.org:8443/a b.jpg'
    """
    scheme, separator, rest = address.partition("://")
    place, slash, path = rest.partition("/")
    path = path.split("?")[0].split("#")[0] if scheme.lower() in ("http", "https") else path
    return f"{scheme.lower()}{separator}{place.rpartition('@')[2].split('?')[0]}{slash}{path}"
