"""What a function is given as the place of a run or of images, as paths."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from features.errors import ConfigurationError

Place = str | Path
RunPlace = str | os.PathLike[str]  # a trained head, a fine-tuned network and an opened run are paths of their folders


def image_files(images: Place | Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Return the paths of image files, one after another as they are asked for.

    Raises
    ------
    ConfigurationError
        If one is no path.
    """
    one = isinstance(images, str | Path) or not isinstance(images, Iterable)
    return map(_image_file, [images] if one else images)  # type: ignore[arg-type]


def _image_file(image: object) -> str:
    if not isinstance(image, str | os.PathLike):
        raise ConfigurationError(
            f"images: received an object of type {type(image).__name__}, expected the paths of image files. Save pixels "
            "to a file, or use BottleneckClassifier, whose predict takes pixels"
        )
    return os.fspath(image)
