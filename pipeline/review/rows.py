"""Classes and rows by their numbers: class names in the order of their keys, and which rows hold the same bytes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from pipeline.labels.file import keys_of


class Catalogue:
    """Class names in a fixed order: those of the store, then new ones as they appear. A code is a place in this order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._lock = list(names), threading.Lock()
        self._codes = {name: code for code, name in enumerate(names)}

    def code(self, name: str) -> int:
        """Return the code of a class; a new one is added."""
        with self._lock:
            if name not in self._codes:
                self._codes[name] = len(self._names)
                self._names.append(name)
            return self._codes[name]

    def find(self, name: str) -> int:
        """Return the code of a class, or -1 if there is none of this name."""
        return self._codes.get(name, -1)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, by code."""
        return tuple(self._names)


class Copies:
    """Finds all rows of the same bytes.

    Parameters
    ----------
    sha256 : uint8, (n, 32)
        Content hash of each row.
    """

    def __init__(self, sha256: np.ndarray) -> None:
        keys = keys_of(sha256)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def rows(self, digest: bytes) -> np.ndarray:
        """Return the rows whose bytes have this hash, int64, ascending."""
        (key,) = keys_of(np.frombuffer(digest, np.uint8))
        low, high = (int(np.searchsorted(self._keys, key, side)) for side in ("left", "right"))
        return np.sort(self._order[low:high])
