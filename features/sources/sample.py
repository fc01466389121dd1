"""The built-in sample: scikit-learn's 1,797 handwritten digits as PNG files, the same bytes on every machine."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from features.cache import cache_path
from features.errors import SourceError, nearest
from features.ownership import make_folder
from features.pixels.png import plain_png
from features.temporary import temporary_folder

logger = logging.getLogger(__name__)
SAMPLE = "sample:digits"
# sha256 over the sha256 of every file, in row order. Another value would change the splits of the sample for all users.
SAMPLE_DIGEST = "85c7aa2c0b27194de1abf2a3510fb2fd2e36702239515ec0ac8d8ade7fabf12f"


def sample_folder(name: str, *, again: bool = False) -> Path:
    """Return the folder of a sample; its files are written on first use, and ``again`` if what lies there is damaged.

    Raises
    ------
    SourceError
        If the sample is unknown, or the cache folder cannot be written.
    """
    if name != SAMPLE:
        raise SourceError(f"there is no sample {name!r}; expected {SAMPLE!r}{nearest(name, [SAMPLE])}")
    folder = cache_path("digits")
    try:
        if again and folder.exists():
            logger.warning("%s does not hold the images that were written, so they are written again", folder)
            with temporary_folder(folder) as temporary:
                folder.rename(temporary / "damaged")
        if not folder.is_dir():
            make_folder(folder.parent)
            with temporary_folder(folder) as temporary:
                made = temporary / "digits"
                _write_digits(made)
                try:
                    made.rename(folder)
                except OSError:
                    if not folder.is_dir():  # otherwise another process has just written the same files
                        raise
    except OSError as error:
        raise SourceError(f"{folder} cannot be written ({error}); set BOTTLENECK_CACHE to a writable folder") from error
    return folder


def _write_digits(folder: Path) -> None:
    """Write scikit-learn's handwritten digits (8x8, 17 grey levels) as 32x32 PNG files in folders 0 to 9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    for label in digits.target_names:
        make_folder(folder / str(label))
    for index, (pixels, label) in enumerate(zip(grey, digits.target, strict=True)):
        (folder / str(label) / f"{index:04d}.png").write_bytes(plain_png(pixels))
