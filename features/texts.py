"""Many texts in a few bytes each: sequences of str that make a str only when it is asked for.

texts --Texts.of()--> UTF-8 and ends        texts that repeat --Coded.of()--> each once, and a number for each place
keys --Lookup--> sorted --first(), last()--> rows
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from features.scratch import Growing, scratch, taken

_STEP = 4096  # texts that are made at a time
KEY_BYTES = 16


class Texts(Sequence[str]):
    """A sequence of texts; equal to a tuple or list of the same texts.

    Parameters
    ----------
    utf8 : uint8, (bytes,)
        All texts one after the other. Bytes that are not UTF-8 become lone surrogates and back.
    ends : int64, (n,)
        End of each text.
    """

    def __init__(self, utf8: np.ndarray, ends: np.ndarray) -> None:
        self.utf8, self.ends = utf8, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Keep texts; those that are kept already are returned as they are."""
        if isinstance(texts, Texts):
            return texts
        found = GrowingTexts()
        for text in texts:
            found.append(text)
        return found.texts()

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self.some(np.arange(start, stop, step))
            before, after = self._start(start), self._start(max(start, stop))
            return Texts(self.utf8[before:after], self.ends[start : max(start, stop)] - before)
        row = operator.index(index)
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(index)
        return self.utf8[self._start(row) : self.ends[row]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (text.decode("utf-8", "surrogateescape") for text in self.encoded())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.utf8, other.utf8)
        if isinstance(other, tuple | list):
            return len(self) == len(other) and all(map(operator.eq, self, other))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = f", and {len(self) - 8} more" if len(self) > 8 else ""
        return f"Texts({', '.join(map(repr, self[:8]))}{more})"

    def encoded(self) -> Iterator[bytes]:
        """Yield the bytes of each text."""
        for begin in range(0, len(self), _STEP):
            offset = last = self._start(begin)
            ends = self.ends[begin : begin + _STEP].tolist()
            data = self.utf8[offset : ends[-1]].tobytes()
            for end in ends:
                yield data[last - offset : end - offset]
                last = end

    def some(self, rows: np.ndarray) -> Texts:
        """Return the texts of some rows, int64 (k,), in that order."""
        if len(rows) == len(self) and bool((rows == np.arange(len(self))).all()):
            return self
        parts = (rows[start : start + _STEP].tolist() for start in range(0, len(rows), _STEP))
        return Texts.of(map(self.__getitem__, itertools.chain.from_iterable(parts)))

    def _start(self, row: int) -> int:
        return int(self.ends[row - 1]) if row else 0


class GrowingTexts:
    """Texts that are added one by one."""

    def __init__(self) -> None:
        self._utf8, self._ends, self._end = Growing("u1"), Growing("<i8"), 0
        self._waiting: list[bytes] = []

    def append(self, text: str) -> None:
        """Add a text at the end."""
        self._waiting.append(text.encode("utf-8", "surrogateescape"))
        if len(self._waiting) >= _STEP:
            self._settle()

    def texts(self) -> Texts:
        """Return the texts so far."""
        self._settle()
        return Texts(self._utf8.array(), self._ends.array())

    def _settle(self) -> None:
        some, self._waiting = self._waiting, []
        self._utf8.extend(np.frombuffer(b"".join(some), "u1"))
        ends = self._end + np.cumsum(np.fromiter(map(len, some), "<i8", len(some)))
        self._ends.extend(ends)
        self._end = int(ends[-1]) if some else self._end


class Coded(Sequence[str]):
    """A sequence of texts of which many are equal.

    Parameters
    ----------
    texts : sequence of str
        Each text once.
    codes : int32, (n,)
        Index into ``texts``.
    """

    def __init__(self, texts: Sequence[str], codes: np.ndarray) -> None:
        self.texts, self.codes = texts, codes

    @classmethod
    def of(cls, texts: Iterable[str]) -> Coded:
        """Keep each text once."""
        found = GrowingCoded()
        for text in texts:
            found.append(text)
        return found.coded()

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Coded: ...
    def __getitem__(self, index: Any) -> Any:
        return Coded(self.texts, self.codes[index]) if isinstance(index, slice) else self.texts[self.codes[index]]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _STEP):
            yield from map(self.texts.__getitem__, self.codes[start : start + _STEP].tolist())

    def changed(self, texts: Sequence[str]) -> Coded:
        """Return the same places with other texts."""
        return Coded(texts, self.codes)


class GrowingCoded:
    """Texts of which many are equal, added one by one."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._codes = Growing("<i4")

    def append(self, text: str) -> None:
        """Add a text at the end."""
        self._codes.append(self._numbers.setdefault(text, len(self._numbers)))

    def coded(self) -> Coded:
        """Return the texts so far."""
        return Coded(tuple(self._numbers), self._codes.array())


def keys_of(texts: Iterable[str], count: int) -> np.ndarray:
    """Return a key for each of ``count`` texts, uint8, (count, 16): of its own for each text (BLAKE2b)."""
    found, row = scratch((count, KEY_BYTES), "u1"), 0
    encoded = texts.encoded() if isinstance(texts, Texts) else (t.encode("utf-8", "surrogateescape") for t in texts)
    while some := b"".join(map(_key, itertools.islice(encoded, _STEP))):
        number = len(some) // KEY_BYTES
        found[row : row + number] = np.frombuffer(some, "u1").reshape(-1, KEY_BYTES)
        row += number
    return found


def key_of(text: str) -> bytes:
    """Return the key of one text, 16 bytes."""
    return _key(text.encode("utf-8", "surrogateescape"))


def _key(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


class Lookup:
    """Rows by key.

    Parameters
    ----------
    keys : uint8, (n, width)
        All keys.
    rows : int64, (k,), optional
        The rows that can be found, in the order in which ``first`` and ``last`` see them; by default all.
    """

    def __init__(self, keys: np.ndarray, rows: np.ndarray | None = None) -> None:
        plain = _plain(np.ascontiguousarray(keys) if rows is None else taken(keys, rows))
        order = np.argsort(plain, kind="stable")
        self.sorted = scratch(plain.shape, plain.dtype)
        self.rows = scratch(order.shape, "<i4" if len(keys) < 1 << 31 else "<i8")
        for start in range(0, len(order), 1 << 16):
            part = order[start : start + (1 << 16)]
            self.sorted[start : start + len(part)] = plain[part]
            self.rows[start : start + len(part)] = part if rows is None else rows[part]

    def first(self, wanted: np.ndarray) -> np.ndarray:
        """Return the first row of each key, int64, (m,), -1 for those that are not there."""
        return self._found(wanted, last=False)

    def last(self, wanted: np.ndarray) -> np.ndarray:
        """Return the last row of each key, int64, (m,), -1 for those that are not there."""
        return self._found(wanted, last=True)

    def row(self, key: bytes) -> int:
        """Return the first row of one key, -1 if it is not there."""
        place = int(np.searchsorted(self.sorted, np.bytes_(key)))
        found = place < len(self.sorted) and bytes(self.sorted[place : place + 1].tobytes()) == key
        return int(self.rows[place]) if found else -1

    def repeated(self) -> np.ndarray:
        """Return the rows whose key an earlier row has, ascending."""
        return np.sort(self.rows[1:][self.sorted[1:] == self.sorted[:-1]])

    def _found(self, wanted: np.ndarray, *, last: bool) -> np.ndarray:
        rows = scratch((len(wanted),), "<i8")
        for start in range(0, len(wanted), 1 << 16):
            part = _plain(wanted[start : start + (1 << 16)])
            places = np.searchsorted(self.sorted, part, side="right" if last else "left") - int(last)
            inside = (places >= 0) & (places < len(self.sorted))
            inside[inside] = self.sorted[places[inside]] == part[inside]
            found = np.full(len(part), -1, np.int64)
            found[inside] = self.rows[places[inside]]
            rows[start : start + len(part)] = found
        return rows


def _plain(keys: np.ndarray) -> np.ndarray:
    """See rows of bytes as one value each that numpy can sort; equal bytes at the end do not make two of them equal."""
    return np.ascontiguousarray(keys).view(f"S{keys.shape[1]}").reshape(-1)
