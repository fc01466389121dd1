"""Decode ordinary JPEG files with simplejpeg, if it is installed: the grey levels of Pillow, in less time.

Both are libjpeg-turbo. Pillow reads the header, and decodes all that simplejpeg does not decode without a warning, so it
alone says which files are refused, and why.
"""

from __future__ import annotations

import functools
import importlib
import io
import logging
from typing import Any

import numpy as np
from PIL import Image

from features.pixels.resizing import extension

logger = logging.getLogger(__name__)
_CHANNELS = {"L": 1, "RGB": 3}  # not CMYK
_SMALLEST = 8  # pixels of a side; a picture that is shrunk to less may have the same size at two scales


def loaded(image: Any, data: bytes) -> Image.Image | None:
    """Decode the pixels of a JPEG.

    Parameters
    ----------
    image : PIL.JpegImagePlugin.JpegImageFile
        Its header, perhaps with a ``draft`` of a smaller size; it is not changed.
    data : bytes
        The file.

    Returns
    -------
    PIL.Image.Image or None
        What ``image.load()`` and a conversion to RGB would give; None if Pillow has to decode the file.
    """
    simplejpeg = decoder()
    if simplejpeg is None:
        return None
    return _decoded(simplejpeg, image, data)


def _decoded(simplejpeg: Any, image: Any, data: bytes) -> Image.Image | None:
    if _CHANNELS.get(image.mode) != image.layers or min(image.size) < _SMALLEST:
        return None
    width, height = image.size
    pixels = Image.new("RGB", image.size, None)
    try:
        # Nobody else knows this image yet, so its memory may be written.
        memory = extension().memory(pixels.__arrow_c_array__()[1], width, height)
        found = simplejpeg.decode_jpeg(data, "RGBX", min_height=height, min_width=width, buffer=memory)
        if found.shape != (height, width, 4):
            raise ValueError(f"it found {found.shape} in a file of {width}x{height} pixels")
    except ValueError as error:  # a warning of the decoder, or an image that Pillow keeps in several blocks
        logger.debug("Pillow decodes: %s", error)
        return None
    return pixels


@functools.cache
def decoder() -> Any:
    """Return simplejpeg; None if it is not installed, or its grey levels are not those of Pillow."""
    try:
        simplejpeg = importlib.import_module("simplejpeg")
    except ImportError as error:
        logger.debug("Pillow decodes: %s", error)
        return None
    if extension() is None:
        return None
    levels = np.random.default_rng(0).integers(0, 256, (45, 67, 3)).astype(np.uint8)
    for mode, subsampling, progressive in (("RGB", 0, False), ("RGB", 1, True), ("RGB", 2, False), ("L", 0, True)):
        buffer = io.BytesIO()
        Image.fromarray(levels).convert(mode).save(buffer, "JPEG", subsampling=subsampling, progressive=progressive)
        for size in (levels.shape[1::-1], (30, 20)):
            image = Image.open(buffer)
            image.draft(None, size)
            found = _decoded(simplejpeg, image, buffer.getvalue())
            if found is None or found.tobytes() != image.convert("RGB").tobytes():
                logger.warning("simplejpeg does not give the grey levels of this Pillow; Pillow decodes")
                return None
    return simplejpeg
