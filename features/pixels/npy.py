"""Read the header of a ``.npy`` array and check what it declares against the bytes that are there; nothing is unpickled."""

from __future__ import annotations

import io
import tokenize
from typing import NamedTuple

import numpy as np

from features.errors import UnreadableImageError

MAGIC = b"\x93NUMPY"
HEADER_BYTES = 1 << 14  # numpy refuses headers above 10,000 characters
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, tokenize.TokenError, OverflowError, RecursionError, MemoryError)


class NpyHeader(NamedTuple):
    """Shape, order and type of an array, and where its values begin."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    offset: int

    def array(self, data: bytes) -> np.ndarray:
        """Return the array in the bytes of the whole file, without a copy."""
        return np.frombuffer(data, self.dtype, offset=self.offset).reshape(
            self.shape, order="F" if self.fortran else "C"
        )


def npy_header(start: bytes, size: int) -> NpyHeader:
    """Read a header.

    Parameters
    ----------
    start : bytes
        The first ``HEADER_BYTES`` of the file, or all of it.
    size : int
        Size of the whole file in bytes.

    Raises
    ------
    UnreadableImageError
        If it is no header of version 1.0 or 2.0, declares Python objects, or another size than there is; ``detail`` goes on
        after the name of the array.
    """
    stream = io.BytesIO(start[:HEADER_BYTES])
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(stream)
    except KeyError:
        raise UnreadableImageError(
            "unreadable", "has a format version other than 1.0 or 2.0; save it with numpy.savez"
        ) from None
    except _HEADER_ERRORS as error:
        raise UnreadableImageError("unreadable", f"has no valid header ({error})") from error
    if dtype.hasobject:
        raise UnreadableImageError("unreadable", "holds Python objects, which are never unpickled; save it as numbers")
    declared, there = dtype.itemsize, size - stream.tell()
    for length in shape:  # the product in numpy would overflow
        declared *= length
    if declared != there or any(length < 0 for length in shape):
        raise UnreadableImageError(
            "truncated" if declared > there else "unreadable",
            f"is declared as {dtype} {shape}, which is {declared} bytes, but {there} are present",
        )
    return NpyHeader(shape, fortran, dtype, stream.tell())
