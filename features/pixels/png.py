"""Write an array of pixels as a PNG whose bytes do not depend on any library's version."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_DEFLATE_BLOCK = 65535


def plain_png(pixels: np.ndarray) -> bytes:
    """Return an uncompressed PNG of pixels, uint8, (h, w) or (h, w, 3) (PNG 1.2, chapter 3; RFC 1950 and 1951).

    It is not written by Pillow because the bytes decide the splits, and Pillow's bytes depend on its build of zlib.
    """
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + pixels[0].size), np.uint8)  # each line begins with its filter, 0
    lines[:, 1:] = pixels.reshape(height, -1)
    raw = lines.tobytes()
    stored = b"".join(
        struct.pack("<BHH", start + _DEFLATE_BLOCK >= len(raw), len(block), len(block) ^ 0xFFFF) + block
        for start in range(0, len(raw), _DEFLATE_BLOCK)
        if (block := raw[start : start + _DEFLATE_BLOCK])
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    body = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )


def png_size(shape: tuple[int, ...]) -> int:
    """Return the size in bytes of one such PNG from an array of shape ``(n, h, w)`` or ``(n, h, w, channels)``."""
    raw = shape[1] * (1 + shape[2] * (shape[3] if len(shape) == 4 else 1))
    return 63 + raw + 5 * -(-raw // _DEFLATE_BLOCK)
