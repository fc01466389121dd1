"""A labels file that a test writes decision by decision, and a small store whose classes differ in colour."""

from __future__ import annotations

import hashlib
from pathlib import Path

from helpers import extract, paint

from features.store.reader import FeatureStore
from pipeline.labels.file import Decision, append_decisions


class Book:
    """A labels file that is written decision by decision, each later than the one before."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def add(self, image: str, value: str, target: str = "label", by: str = "ann") -> Book:
        """Decide about an image, known by its sha256, or, where there is no image, by a word."""
        digest = image if len(image) == 64 else hashlib.sha256(image.encode()).hexdigest()
        self.count += 1
        utc = f"2026-01-01T00:00:00.{self.count:06d}Z"
        identity = hashlib.md5(f"{self.path}{self.count}".encode(), usedforsecurity=False).hexdigest()
        append_decisions(self.path, [Decision(digest, image[:8], target, value, "", by, utc, identity)])
        return self


def coloured_store(folder: Path, *, train: int = 6, validation: int = 4) -> FeatureStore:
    """Reddish cats and bluish dogs in ``images/SPLIT/CLASS``, and their channel means in ``features.h5``."""
    for split, count in (("train", train), ("validation", validation)):
        for name, colour in (("cat", (200, 40)), ("dog", (40, 200))):
            for number in range(count):
                red, blue = (value + number * 3 for value in colour)
                paint(folder / "images" / split / name / f"{number}.png", (red, 9 if split == "train" else 8, blue))
    return extract(folder / "images", folder / "features.h5").store


def sha256_of(store: FeatureStore, path: str) -> str:
    """The content hash of the image of that path."""
    return store.images.sha256[store.images.paths.index(path)].tobytes().hex()
