"""The real weights and photographs that several tests use."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

CATS_DOGS = "images/cats_and_dogs_filtered"


def weights_of(assets: Path, name: str) -> str:
    return str(assets / "weights" / f"{name}_no_top.weights.h5")


def some_cats_and_dogs(assets: Path, folder: Path, count: int) -> Path:
    """The first images of each class, as ``train`` and ``validation``."""
    for split, kind in itertools.product(("train", "validation"), ("cats", "dogs")):
        target = folder / split / kind
        target.mkdir(parents=True)
        source = sorted((assets / CATS_DOGS / split / kind).iterdir())
        for path in source[: count if split == "train" else count // 2]:
            shutil.copy(path, target)
    return folder
