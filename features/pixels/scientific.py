"""Images that Pillow does not read as they are: NumPy arrays, DICOM, TIFFs of many channels or deep values.

    bytes --reader_of()--> reader --within the limits--> Samples (h, w, c)

A further kind is a reader and a line of ``_READERS``.
"""

from __future__ import annotations

from collections.abc import Callable

from features.errors import UnreadableImageError
from features.pixels.dicom import is_dicom, read_dicom
from features.pixels.npy import MAGIC, npy_header
from features.pixels.samples import Samples
from features.pixels.tiff import is_deep, read_tiff
from features.recipe import PixelRule

# Called with width, height and the bytes that the values take, before they are read.
Admit = Callable[[int, int, int], None]
Reader = Callable[[bytes, PixelRule, Admit], Samples]


def reader_of(data: bytes, rule: PixelRule) -> Reader | None:
    """Return the reader of a file; None if Pillow decodes it."""
    return next((reader for is_kind, reader in _READERS if is_kind(data, rule)), None)


def _read_npy(data: bytes, rule: PixelRule, admit: Admit) -> Samples:
    try:
        header = npy_header(data, len(data))
    except UnreadableImageError as error:
        raise UnreadableImageError(error.reason, f"NPY: the array {error.detail}") from error
    shape, dtype = header.shape, header.dtype
    if dtype.kind not in "buif" or dtype.itemsize > 8 or len(shape) not in (2, 3) or not all(shape):
        hint = "; save each image in a file of its own" if len(shape) > 3 else ""
        raise UnreadableImageError(
            "unreadable", f"NPY: the array is {dtype} {shape}; expected numbers, (h, w) or (h, w, channels){hint}"
        )
    admit(shape[1], shape[0], len(data))
    return Samples.of("NPY", header.array(data))


_READERS: tuple[tuple[Callable[[bytes, PixelRule], bool], Reader], ...] = (
    (lambda data, rule: data.startswith(MAGIC), _read_npy),
    (lambda data, rule: is_dicom(data), read_dicom),
    (is_deep, read_tiff),
)
