"""Small pictures of a run's images for the report: found in the source, checked by content, encoded as data URIs."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image

from features.errors import BottleneckError, SourceError, UnreadableImageError
from features.machine import processors
from features.pixels.decode import decode_image, decode_upright
from features.recipe import PixelRule
from features.sources.imageset import ImageSet
from features.sources.reading import Reading
from features.sources.scan import scan

T = TypeVar("T")

_PLAIN = Reading(settled=True)
CARD, TILE = 192, 80  # sides in pixels; multiples of 16, so that the tiles of a JPEG do not bleed into each other
TILES_ACROSS = 20
CARD_QUALITY, TILE_QUALITY = 72, 58


class Pictures:
    """Images of one data set, found by the path that a run knows them by.

    Parameters
    ----------
    sources : sequence of str
        Sources to try; the first one that can be scanned and holds one of ``paths`` is used.
    paths : sequence of str
        Paths of some of the images.
    reading : Reading, optional
        How the run's classes were read from them.
    pixels : PixelRule, optional
        How the run's images are decoded; its channels and values are those of the pictures.
    """

    def __init__(
        self,
        sources: Sequence[str],
        paths: Sequence[str],
        reading: Reading | None = None,
        pixels: PixelRule = PixelRule(TILE, TILE),  # noqa: B008  frozen
    ) -> None:
        self._pixels = pixels
        self.failures: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.missing = "the run does not say where its images are"
        self._images: ImageSet | None = None
        self._rows: dict[str, int] = {}
        for source in dict.fromkeys(source for source in sources if source):
            try:
                images = scan(source, labelled=False, reading=reading or _PLAIN)
            except (BottleneckError, OSError) as problem:
                self.missing = str(problem)
                continue
            rows = {path: row for row, path in enumerate(images.paths)}
            if any(path in rows for path in paths):
                self._images, self._rows, self.missing = images, rows, ""
                return
            self.missing = f"{source} holds other images"

    def read(self, path: str, sha256: bytes | None) -> bytes | None:
        """Read an image file if it exists and has not changed; otherwise return None and count it in ``failures``."""
        if self._images is None:
            return None
        if path not in self._rows:
            self._failed("missing")
            return None
        try:
            data = self._images.read(self._rows[path])
        except UnreadableImageError as problem:
            self._failed(problem.reason)
            return None
        except SourceError:  # an archive that was changed or removed since
            self._failed("missing")
            return None
        if sha256 is not None and hashlib.sha256(data).digest() != sha256:
            self._failed("changed")
            return None
        return data

    def _failed(self, reason: str) -> None:
        with self._lock:  # several threads count
            self.failures[reason] += 1

    def cards(self, wanted: Sequence[tuple[str, bytes | None]], size: int = CARD) -> list[str]:
        """Make data URIs of whole images that fit ``size`` pixels; an empty string if an image cannot be shown."""
        return self._each(wanted, lambda data: jpeg_uri(whole_image(data, size, self._pixels), CARD_QUALITY), "")

    def sprite(self, wanted: Sequence[tuple[str, bytes | None]]) -> tuple[str, list[int]]:
        """Put tiles, row by row, into one picture; return its data URI (empty without tiles) and each image's tile or -1."""
        rule = self._pixels.small(TILE, fit="crop")
        tiles = self._each(wanted, lambda data: decode_image(data, rule).pixels, None)
        known = [tile for tile in tiles if tile is not None]
        if not known:
            return "", [-1] * len(tiles)
        across = min(TILES_ACROSS, len(known))
        down = -(-len(known) // across)
        sheet = np.full((down * TILE, across * TILE, 3), 127, np.uint8)
        places, used = [], 0
        for tile in tiles:
            places.append(-1 if tile is None else used)
            if tile is not None:
                y, x = (used // across) * TILE, (used % across) * TILE
                sheet[y : y + TILE, x : x + TILE] = tile
                used += 1
        return jpeg_uri(Image.fromarray(sheet), TILE_QUALITY), places

    def _each(self, wanted: Sequence[tuple[str, bytes | None]], make: Callable[[bytes], T], none: T) -> list[T]:
        def one(item: tuple[str, bytes | None]) -> T:
            data = self.read(*item)
            if data is None:
                return none
            try:
                return make(data)
            except UnreadableImageError as problem:
                self._failed(problem.reason)
                return none

        if self._images is None:
            return [none] * len(wanted)
        with ThreadPoolExecutor(processors()) as pool:
            return list(pool.map(one, wanted))


def whole_image(
    data: bytes,
    size: int,
    pixels: PixelRule = PixelRule(TILE, TILE),  # noqa: B008  frozen
) -> Image.Image:
    """Decode an image file and fit it into a square of ``size`` pixels; small ones are enlarged by a whole factor.

    ``pixels`` says which channels and values are shown.

    Raises
    ------
    UnreadableImageError
        If ``features.pixels.decode.decode_upright`` cannot decode it.
    """
    image = decode_upright(data, pixels.small(size)).image
    step = size // max(image.size)
    if step > 1:
        return image.resize((image.width * step, image.height * step), Image.Resampling.NEAREST)
    if max(image.size) > size:
        image.thumbnail((size, size), Image.Resampling.BILINEAR)
    return image


def jpeg_uri(image: Image.Image, quality: int) -> str:
    """Encode an image as ``data:image/jpeg;base64,...``."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
