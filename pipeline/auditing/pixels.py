"""How bright, varied and sharp image files are; measured once for the checks that need pixels.

file --read, checked by its hash--> decoded small --> `Pixels`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from features.errors import UnreadableImageError
from features.machine import processors
from features.pixels.decode import decode_upright
from features.progress import Progress
from features.recipe import PixelRule

SIDE = 256  # pixels of the longer edge of an image that is measured; a larger one is reduced to it
STEP = 256  # images between two reports of progress


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Measures of some rows, float64, (n,) each, NaN for images that could not be read.

    Parameters
    ----------
    brightness : 0-1
        Grey level that 99 % of the pixels do not exceed.
    spread : 0-1
        Standard deviation of the channel that varies most.
    sharpness : >= 0
        Standard deviation of the Laplacian over that of the grey levels; 0 for an image of one grey level.
    """

    brightness: np.ndarray
    spread: np.ndarray
    sharpness: np.ndarray


def measure(
    wanted: Sequence[tuple[str, bytes]], read: Callable[[str, bytes], bytes | None], progress: Progress
) -> Pixels:
    """Measure image files, given by path and sha256."""

    def one(item: tuple[str, bytes]) -> tuple[float, float, float]:
        data = read(*item)
        if data is None:
            return np.nan, np.nan, np.nan
        try:
            image = decode_upright(data, PixelRule(SIDE, SIDE, decode="fast")).image
        except UnreadableImageError:
            return np.nan, np.nan, np.nan
        image.thumbnail((SIDE, SIDE))
        return measures_of(np.asarray(image.convert("RGB"), np.float32) / 255)

    found = []
    with ThreadPoolExecutor(processors()) as pool:
        for number, values in enumerate(pool.map(one, wanted), 1):
            found.append(values)
            if number % STEP == 0:
                progress("pixels", number, len(wanted))
    return Pixels(*np.array(found, np.float64).reshape(-1, 3).T)


def measures_of(pixels: np.ndarray) -> tuple[float, float, float]:
    """Brightness, spread and sharpness of an image, float32, (h, w, 3), 0-1; see `Pixels`."""
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601
    deviation = float(grey.std())
    edges = np.zeros(1, np.float32)
    if min(grey.shape) > 2:
        inner = grey[1:-1, 1:-1]
        edges = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    sharpness = float(edges.std()) / deviation if deviation > 1e-6 else 0.0
    return float(np.quantile(grey, 0.99)), float(pixels.std(axis=(0, 1)).max()), sharpness
