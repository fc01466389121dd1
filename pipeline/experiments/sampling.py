"""Some of the images of a source, copied with a manifest, so that an experiment can be tried on them.

source --sample()--> the source itself | folder of copies with images.csv
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from features.canonical import digest_of
from features.errors import SourceError
from features.files import atomic_file, printable, writing
from features.sources.imageset import ImageSet
from features.sources.scan import scan
from features.sources.splits import SPLITS

logger = logging.getLogger(__name__)


def sample(source: str, folder: Path, classes: Sequence[str], limit: int | None) -> str:
    """Return the source itself, or a manifest of copies of some of its images."""
    images = scan(source)
    only = [images.classes.index(name) for name in classes if name in images.classes]
    if classes and len(only) < len(classes) and len(images.classes) != len(classes):
        raise SourceError(
            f"{images.description}: has the classes {', '.join(images.classes[:20])}; this experiment is about "
            f"{' and '.join(classes)}, or any {len(classes)} classes of your own"
        )
    some_classes = 0 < len(only) < len(images.classes)
    if not some_classes and limit is None:
        return source
    rows = np.flatnonzero(np.isin(images.labels, only) if some_classes else np.ones(len(images), bool))
    if limit is not None:
        rows = images.evenly(limit, rows)
    return str(copied(images, rows, folder / "images", splits=True))


def copied(images: ImageSet, rows: np.ndarray, folder: Path, *, splits: bool) -> Path:
    """Copy some images under their own names and write a manifest of them. A file that is already equal is left alone."""
    lines = []
    for row in rows.tolist():
        name = name_in_a_folder(images.paths[row])
        data, path = images.read(row), folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)
        label = images.classes[images.labels[row]] if images.labels[row] >= 0 else ""
        given = SPLITS[images.given_splits[row]] if splits and images.given_splits[row] >= 0 else ""
        lines.append([name, label, given, images.groups[row] if images.groups else ""])
    manifest = folder / "images.csv"
    with (
        atomic_file(manifest) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "split", "group"])
        writer.writerows(lines)
    logger.info("%s: %d of %d images", printable(str(manifest)), len(lines), len(images))
    return manifest


def name_in_a_folder(name: str) -> str:
    """Make a relative name that stays inside the folder. Images from arrays get the suffix ``.png``."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        path = PurePosixPath(digest_of(name)[:16], path.name)
    return str(path if path.suffix else path.with_suffix(".png"))
