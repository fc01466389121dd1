"""Standard input, output and error of a command: whether they are closed, full or broken, nothing else suffers.

A closed descriptor is opened on the null device, because the next file that is opened would get its number, and messages
would be written into that file. Text for standard error that cannot be written is dropped; no work stops for it.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

NAMES = ("standard input", "standard output", "standard error")
_closed: set[int] = set()


def is_closed(number: int) -> bool:
    """Whether a descriptor, 0 to 2, was closed when the command began (``<&-``, ``>&-``, ``2>&-``)."""
    return number in _closed


class _Output(io.FileIO):
    """Writes all bytes, and waits where the other end must read first although it asked not to be waited for."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while rest:
            try:
                written = super().write(rest)
            except OSError as error:
                if self.fileno() == 2:
                    break
                error.filename = NAMES[self.fileno()]
                raise
            if written is None:  # O_NONBLOCK is set, and the pipe is full
                select.select([], [self], [])
            rest = rest[written or 0 :]
        return len(data)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Guard the three streams of this process; streams that a caller has replaced are left as they are.

    Then an ``OSError`` of writing to standard output has the name of the stream as its ``filename``.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            _closed.add(number)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # as long as the process lives
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _text(stream: TextIO | None, number: int) -> TextIO:
    """Make a text stream with the settings of ``stream``, which is None if the descriptor was closed."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        _Output(number),  # it writes everything, as buffered streams do
        encoding=getattr(stream, "encoding", "utf-8"),
        errors=getattr(stream, "errors", "backslashreplace"),
        newline="\n",
        line_buffering=number == 2 or getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )
