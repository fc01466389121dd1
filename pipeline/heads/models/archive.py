"""Read zip archives of arrays that may come from a stranger: nothing is allocated that the file does not hold."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from features.errors import HeadError

MOST_DIRECTORY = 32 << 20  # bytes of the table of contents, about 400,000 members
MOST_TEXT = 128 << 20  # bytes of a JSON text
MOST_VALUES = 3_000_000  # values in a JSON text: of a file of scikit-learn, some 4,000 trees
MOST_AGAIN = 64 << 20  # bytes that may be read beside each member once: objects of scikit-learn share small arrays
_ENDS, _ENDS_LARGE = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")  # APPNOTE 6.3.10, 4.3.16 and 4.3.14
_LOCATOR = 20
UNREADABLE = (zipfile.BadZipFile, struct.error, ValueError, OSError, EOFError, NotImplementedError, RuntimeError)


class Archive:
    """A zip archive of arrays and JSON; its members are stored, not compressed, and do not overlap. A context manager.

    Raises
    ------
    HeadError
        If the file is not such an archive.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if not path.is_file():
                raise OSError("there is no such file")
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(open(path, "rb"))
                size = os.fstat(file.fileno()).st_size
                if _directory_bytes(file, size) > MOST_DIRECTORY:
                    raise zipfile.BadZipFile("its table of contents is missing or too large")
                self._zip = stack.enter_context(zipfile.ZipFile(file))
                self._stack = stack.pop_all()
        except UNREADABLE as problem:
            raise self.damaged(str(problem)) from problem
        self._left = size + MOST_AGAIN
        members = self._zip.infolist()
        self._members = {member.filename: member for member in members}
        with contextlib.ExitStack() as stack:
            stack.callback(self._stack.close)
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                    raise self.damaged(f"{member.filename[:80]!r} is compressed, which no release writes")
            if sum(member.file_size for member in members) > size or len(self._members) != len(members):
                raise self.damaged("its members overlap")
            stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def damaged(self, reason: str) -> HeadError:
        """Make the error for a file that is not as it was written."""
        return HeadError(
            f"{self._path}: cannot be loaded as a head: {reason[:300]}; the file was edited or damaged, so train the head again"
        )

    def read(self, name: str) -> bytes:
        """Return a member.

        Raises
        ------
        HeadError
            If it is missing or damaged, or members are read again and again.
        """
        self._left -= self._members[name].file_size if name in self._members else 0
        if self._left < 0:
            raise self.damaged(f"{name[:80]!r} is used many times, which takes more memory than the file")
        try:
            return self._zip.read(self._members[name])
        except KeyError as problem:
            raise self.damaged(f"{name[:80]!r} is missing") from problem
        except UNREADABLE as problem:
            raise self.damaged(f"{name[:80]!r}: {problem}") from problem

    def array(self, name: str) -> np.ndarray:
        """Return an array of numbers from a member in NumPy's format; objects are refused.

        Raises
        ------
        HeadError
            If it is missing or not such an array, or declares another size than it has.
        """
        data = self.read(name)
        stream = io.BytesIO(data)
        try:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of the array format")
            header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = header(stream)
            start = stream.tell()
            if dtype.hasobject or any(length < 0 for length in shape):
                raise ValueError(f"{dtype} of shape {shape}")
            if math.prod(shape) * dtype.itemsize != len(data) - start or not dtype.itemsize:
                raise ValueError(f"{len(data) - start} bytes cannot be {dtype} of shape {shape}")
            values = np.frombuffer(data, dtype, offset=start)
            return values.reshape(shape, order="F" if by_column else "C")
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, OverflowError) as problem:
            raise self.damaged(f"{name[:80]!r}: {problem}") from problem

    def json(self, name: str) -> Any:
        """Return a member in JSON.

        Raises
        ------
        HeadError
            If it is missing, not JSON, or holds more than `MOST_VALUES` values.
        """
        if name in self._members and self._members[name].file_size > MOST_TEXT:
            raise self.damaged(f"{name[:80]!r} is larger than {MOST_TEXT} bytes")
        try:
            return bounded_json(self.read(name))
        except (ValueError, RecursionError) as problem:
            if isinstance(problem, HeadError):
                raise
            raise self.damaged(f"{name[:80]!r}: {problem}") from problem


def bounded_json(data: bytes) -> Any:
    """Decode JSON of at most `MOST_TEXT` bytes and `MOST_VALUES` values; `ValueError` or `RecursionError` if it is not."""
    if not is_bounded(data):
        raise ValueError(f"holds more than {MOST_TEXT} bytes or {MOST_VALUES} values")
    return json.loads(data)


def is_bounded(data: bytes) -> bool:
    """Whether JSON has at most `MOST_TEXT` bytes and `MOST_VALUES` values."""
    return len(data) <= MOST_TEXT and sum(map(data.count, (b",", b"[", b"{"))) <= MOST_VALUES


def _directory_bytes(file: BinaryIO, size: int) -> int:
    """Size of the table of contents that `zipfile` would read, of a file without a comment at its end."""
    file.seek(max(0, size - _ENDS.size - _LOCATOR - _ENDS_LARGE.size))
    end = file.read()
    if len(end) < _ENDS.size or end[-_ENDS.size :][:4] != b"PK\5\6":
        return MOST_DIRECTORY + 1
    bytes_32 = int(_ENDS.unpack(end[-_ENDS.size :])[5])
    if end[:4] == b"PK\6\6":  # many members, or a large file
        return max(bytes_32 % 0xFFFFFFFF, int(_ENDS_LARGE.unpack_from(end)[8]))
    return bytes_32
