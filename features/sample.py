"""The embedded sample: scikit-learn's 1,797 handwritten digits as PNG class folders, the same bytes everywhere."""

from __future__ import annotations

import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np

from features.cache import cache_folder
from features.errors import SourceError, nearest

SAMPLE, SAMPLE_IMAGES = "sample:digits", 1797


def sample_folder(name: str) -> Path:
    """The folder of a sample, written when it is first asked for.

    Raises
    ------
    SourceError
        For an unknown sample, or a cache folder that cannot be written.
    """
    if name != SAMPLE:
        raise SourceError(f"there is no sample {name!r}; expected {SAMPLE!r}{nearest(name, [SAMPLE])}")
    folder = cache_folder() / "digits"
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".digits-", dir=folder.parent) as temporary:
                made = Path(temporary) / "digits"
                _write_digits(made)
                try:
                    made.rename(folder)
                except OSError:
                    if not folder.is_dir():  # else another process was faster, with the same files
                        raise
    except OSError as error:
        raise SourceError(f"cannot write the sample to {folder} ({error}); set BOTTLENECK_CACHE to a folder") from error
    return folder


def _write_digits(folder: Path) -> None:
    """scikit-learn's handwritten digits, 8x8 of 17 grey levels, as 32x32 PNG files in folders 0 to 9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    for label in digits.target_names:
        (folder / str(label)).mkdir(parents=True)
    for index, (pixels, label) in enumerate(zip(grey, digits.target, strict=True)):
        (folder / str(label) / f"{index:04d}.png").write_bytes(_grey_png(pixels))


def _grey_png(pixels: np.ndarray) -> bytes:
    """An uncompressed PNG of uint8, (h, w), up to 65535 bytes (PNG 1.2, chapter 3; RFC 1950 and 1951).

    Written by hand because the bytes decide the splits, and Pillow's depend on the zlib it was built with.
    """
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(lines), len(lines) ^ 0xFFFF) + lines
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stored + struct.pack(">I", zlib.adler32(lines))), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data
