"""Draw what the network will see: a grid of sample images, or all views of a few images, decoded as ``extract`` does."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from features.augmentation import AugmentSpec
from features.errors import ConfigurationError, TooManyUnreadableError, UnreadableImageError, check_range
from features.files import printable
from features.networks.finding import find_backbone
from features.pixels.views import decode_views
from features.progress import counted
from features.recipe import NetworkOptions, PixelRule
from features.sources.imageset import ImageSet
from features.sources.reading import Reading
from features.sources.scan import scan
from pipeline.outputs import files_of, output_file, refuse_overwriting
from pipeline.reporting.grids import COLUMNS, Cell, check_page, check_picture, draw_grid, rows_of

logger = logging.getLogger(__name__)
IMAGES, AUGMENTED_IMAGES, VIEWS = 24, 5, 6
MOST_IMAGES, MOST_VIEWS = 400, 24


@dataclasses.dataclass(frozen=True)
class PreviewOptions(NetworkOptions):
    """Options of a preview. Of ``NetworkOptions`` only the fields about pixels are used, and ``backbone`` for its image size.

    Parameters
    ----------
    augment : str
        Name of a preset. Each image then fills a row with its views, the plain image first.
    views : int, optional
        Number of views, 1-24, including the plain image; default 6.
    seed : int
        Random seed of the views, as for ``extract``, and of the choice of images.
    count : int, optional
        Number of images, 1-400; default 24, or 5 with ``augment``.
    target : str, optional
        Label column of a manifest.
    split_folders, class_level
        Which folders are splits and which are classes, as for ``extract``.
    """

    augment: str = "none"
    views: int | None = None
    seed: int = 0
    count: int | None = None
    target: str | None = None
    split_folders: str = ""
    class_level: int = 0


def preview(images: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Draw a grid of images and return a description of it.

    Parameters
    ----------
    images : str or Path
        Any image source.
    out : Path
        PNG or JPEG file.
    **options
        Fields of `PreviewOptions`: ``image_size``, ``fit``, ``augment``, ``views``, ``count``, ...

    Returns
    -------
    dict
        ``out``, ``images`` drawn as paths, ``views``, ``image_size`` and ``unreadable``, the number of images that were skipped.

    Raises
    ------
    ConfigurationError
        An unknown option, views without an augmentation, a page that is too large, or an ``out`` that is one of the images.
    SourceError
        If there are no images.
    TooManyUnreadableError
        If none of the chosen images can be read.
    """
    asked = PreviewOptions(**options)
    spec, views, seed = AugmentSpec.parse(asked.augment), asked.views, asked.seed
    if views is not None and views > 1 and spec.is_plain:
        raise ConfigurationError(
            f"--views {views} needs --augment: without it all views are the plain image; add --augment flip-rotation"
        )
    shown = 1 if spec.is_plain else VIEWS if views is None else views
    wanted = (IMAGES if spec.is_plain else AUGMENTED_IMAGES) if asked.count is None else asked.count
    check_range("views", shown, 1, MOST_VIEWS)
    check_range("count", wanted, 1, MOST_IMAGES)
    rule = find_backbone(asked.backbone).pixel_rule(asked)
    check_picture(Path(out))
    source = scan(images, target=asked.target, reading=Reading(asked.split_folders, asked.class_level))
    drawn_most = min(wanted, len(source))
    if spec.is_plain:
        check_page(-(-drawn_most // COLUMNS), min(COLUMNS, drawn_most), rule.height, rule.width)
    else:
        check_page(drawn_most, shown, rule.height, rule.width)
    path = output_file(out, "--out", "preview.png")
    refuse_overwriting(path, "--out", files_of(source))
    rows: list[tuple[int, list[Cell]]] = []
    unreadable = 0
    for row in sample_images(source, len(source), seed):
        if len(rows) == wanted or unreadable > 10 * wanted:
            break
        try:
            rows.append((row, _cells(source, row, rule, spec, seed, shown)))
        except UnreadableImageError as problem:
            unreadable += 1
            logger.warning("%s is unreadable (%s) and skipped", printable(source.paths[row]), problem)
    if not rows:
        raise TooManyUnreadableError(f"{images}: none of {unreadable} images could be read; nothing was drawn")
    rows.sort(key=lambda item: (source.labels[item[0]], item[0]))  # images of one class are side by side
    cells = [drawn for _, drawn in rows]
    classes = f", {len(source.classes)} classes" if source.classes else ""
    title = f"{printable(PurePath(source.description).name)}: {len(rows)} of {counted(len(source), 'image')}{classes}, {rule.height}x{rule.width} {rule.fit}"
    if spec.is_plain:
        draw_grid(rows_of([drawn[0] for drawn in cells]), path, title=title)
    else:
        headings = ["view 0, plain", *(f"view {view}" for view in range(1, shown))]
        draw_grid(cells, path, title=f"{title}, {asked.augment}, seed {seed}", headings=headings)
    return {
        "format": 1,
        "out": str(out),
        "images": [printable(source.paths[row]) for row, _ in rows],
        "views": shown,
        "augment": asked.augment,
        "image_size": [rule.height, rule.width],
        "unreadable": unreadable,
    }


def summary(document: dict[str, Any]) -> str:
    """Describe the result for a person."""
    views = f", {document['views']} views of each ({document['augment']})" if document["views"] > 1 else ""
    skipped = f"; {document['unreadable']} unreadable images skipped" if document["unreadable"] else ""
    height, width = document["image_size"]
    return f"{document['out']}: {counted(len(document['images']), 'image')} at {height}x{width}{views}{skipped}"


def sample_images(source: ImageSet, count: int, seed: int = 0) -> list[int]:
    """Draw row numbers of images at random, one of each class in turn, so that all classes come early.

    Parameters
    ----------
    source : ImageSet
        Labels may be missing.
    count : int
        Largest number of rows.
    seed : int
        Random seed.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(source))
    labels = source.labels[order]
    turns = np.empty(len(order), np.int64)
    for label in np.unique(labels):
        turns[labels == label] = np.arange(int((labels == label).sum()))
    return [int(row) for row in order[np.argsort(turns, kind="stable")][:count]]


def _cells(source: ImageSet, row: int, rule: PixelRule, spec: AugmentSpec, seed: int, views: int) -> list[Cell]:
    data = source.read(row)
    pixels = decode_views(data, rule, spec, seed=seed, sha256=hashlib.sha256(data).digest(), views=range(views)).pixels
    label = int(source.labels[row])
    name = source.paths[row].rpartition("/")[2]
    captions: Sequence[tuple[str, str]] = [(source.classes[label], name) if label >= 0 else (name, "")]
    captions = [*captions, *[("", "")] * (views - 1)]
    return [Cell(view, *caption) for view, caption in zip(pixels, captions, strict=True)]
