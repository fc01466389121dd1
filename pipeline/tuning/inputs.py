"""The input of the trained layers: which rows there are, and where their cut features come from.

images ─┬─ trunk, once ─────────── KeptFeatures ────┐
        └─ augment, trunk, each epoch ─ LiveViews ──┼─▶ batches(rows, epoch) ─▶ pipeline.tuning.training
store ──── read ────────────────── pipeline.tuning.cached ─┘

What does not change between epochs stays on a GPU, if it fits (`on_device`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from features.augmentation import AugmentSpec
from features.errors import RunError, StoreError, UnreadableImageError
from features.files import printable
from features.networks.backend import is_out_of_memory, load_keras
from features.pixels.batches import batches, loaded
from features.pixels.views import DecodedViews, decode_views
from features.progress import Progress
from features.recipe import PixelRule
from features.sources.imageset import ImageSet
from features.sources.scan import united
from features.sources.splits import SPLITS, SplitRule, assign_splits
from features.store.schema import data_digest
from pipeline.labels.file import LABEL, Labels
from pipeline.labels.overlay import applied, applied_to_target, record_of

logger = logging.getLogger(__name__)
KEPT_BYTES = 1 << 30  # trunk features up to this size are kept in memory, larger ones in a file
DEVICE_BYTES = 2 << 30  # features up to this size stay on a GPU
PLAIN = 0  # the epoch number that stands for view 0 of every image
Trunk = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows to train and measure on, with the splits that the extraction assigned to them.

    Parameters
    ----------
    description : str
        Where the rows come from, for messages.
    paths : sequence of str
        Names of the images.
    labels : int32 (n,), or uint8 or float64 (n, c)
        Index into the classes; of another task the target, see `features.targets.Target`.
    splits : int8, (n,)
        Index into ``SPLITS``; images that could not be read are in ``unlabelled``.
    sha256 : uint8, (n, 32)
        Content hashes; zeros for images that could not be read.
    digest : str
        ``features.store.schema.data_digest`` of the readable rows, which a feature store of the same rows would have.
    classes : tuple of str
        Class names, or the columns of the target.
    labelled_by : mapping
        The labels file that was put over the labels, as a run records it; empty if there was none.
    """

    description: str
    paths: Sequence[str]
    labels: np.ndarray
    splits: np.ndarray
    sha256: np.ndarray
    digest: str
    classes: tuple[str, ...]
    labelled_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split, ascending."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def by_content(self, rows: np.ndarray) -> np.ndarray:
        """Sort rows by content hash, an order that depends neither on names nor on the kind of source."""
        return np.array(sorted(rows.tolist(), key=lambda row: self.sha256[row].tobytes()), dtype=np.int64)


def read_data(
    images: ImageSet, rule: SplitRule, pool: Executor, labels: Labels | None = None, target: str = LABEL
) -> Data:
    """Hash every image and assign its split; then put a labels file over labels and splits, if there is one.

    Raises
    ------
    RunError
        If no image could be read.
    LabelsError
        If no decision is about one of the images.
    """

    def digest(row: int) -> bytes:
        try:
            return hashlib.sha256(images.read(row)).digest()
        except UnreadableImageError as error:
            logger.warning("%s is unreadable (%s); left out", printable(images.paths[row]), error)
            return b""

    hashes = list(pool.map(digest, range(len(images))))
    readable = np.array([row for row, value in enumerate(hashes) if value], dtype=np.int64)
    if not len(readable):
        raise RunError(f"{images.description}: none of {len(images)} images could be read")
    sha256 = np.zeros((len(images), 32), np.uint8)
    sha256[readable] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    one_each, kept = united(images, hashes)
    readable = readable[np.isin(readable, kept)]
    places = np.searchsorted(kept, readable)  # of the readable rows among those that are kept
    groups = None if images.groups is None else [images.groups[row] for row in readable]
    splits = np.full(len(images), SPLITS.index("unlabelled"), np.int8)
    splits[readable], _ = assign_splits(
        one_each.strata[places], images.given_splits[readable], groups, sha256[readable], rule
    )
    rows = splits[readable], groups, sha256[readable]
    values, splits[readable], digest_of_rows, classes, record = _labelled(one_each.some(places), rows, labels, target)
    every = np.zeros(
        (len(images), *values.shape[1:]), values.dtype
    )  # of rows without a split, the values do not matter
    every[readable] = values
    return Data(images.description, images.paths, every, splits, sha256, digest_of_rows, classes, record)


def _labelled(
    images: ImageSet, rows: tuple[np.ndarray, Any, np.ndarray], labels: Labels | None, target: str
) -> tuple[np.ndarray, np.ndarray, str, tuple[str, ...], dict[str, Any]]:
    """Targets, splits, digest and names of rows under a labels file, if there is one, and its record.

    ``rows`` are the splits, groups and content hashes of the images.
    """
    splits, _, sha256 = rows
    if images.target is not None:
        about, record = images.target, dict[str, Any]()
        if labels is not None:
            about, splits, counts = applied_to_target(labels, images.description, about, *rows, target)
            record = record_of(labels, counts)
        return about.values, splits, data_digest((), sha256, images.labels, splits, about), about.columns, record
    classes, values, record = images.classes, images.labels, {}
    if labels is not None:
        found = applied(labels, images.description, classes, values, *rows, target)
        classes, values, splits, record = found.classes, found.labels, found.splits, record_of(labels, found.counts)
    return values, splits, data_digest(classes, sha256, values, splits), classes, record


class Inputs(Protocol):
    """A source of cut features."""

    def readable(self, rows: np.ndarray) -> np.ndarray:
        """Return those of ``rows`` that have features, in the same order."""

    def batches(self, rows: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield ``(rows, features (k, ...))`` in the order of ``rows``. An epoch may read any view; `PLAIN` reads view 0.

        The features are an array, or a tensor of Keras's backend.
        """


class ImagePass:
    """Passes images through the frozen trunk in batches. Unreadable images are left out, with one warning each.

    Parameters
    ----------
    images : ImageSet
        The images.
    trunk : callable
        ``uint8, (n, h, w, 3)`` -> ``(n, ...)``.
    rule : PixelRule
        How the images are decoded and resized.
    pool : Executor
        Threads that read and decode.
    batch_size : int
        Images per forward pass.
    """

    def __init__(self, images: ImageSet, trunk: Trunk, rule: PixelRule, pool: Executor, batch_size: int) -> None:
        self.images, self.trunk, self.rule, self.pool, self.batch_size = images, trunk, rule, pool, batch_size
        self._refused: set[int] = set()

    def features(
        self, rows: np.ndarray, decode: Callable[[int, bytes], DecodedViews]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ``(rows, features (k, ...))`` in the order of ``rows``; ``decode`` takes a row and the bytes of its file."""

        def load(row: int) -> DecodedViews:
            return decode(row, self.images.read(row))

        coming = loaded(self.pool, load, rows.tolist(), 2 * self.batch_size)
        for batch in batches(coming, self.rule, self.batch_size):
            for row, error in batch.refused:
                if row not in self._refused:
                    logger.warning("%s is unreadable (%s); left out", printable(self.images.paths[row]), error)
                self._refused.add(row)
            if len(batch.pixels):
                yield np.array([row for row, _ in batch.done], np.int64), self.trunk(batch.pixels)


class KeptFeatures:
    """Trunk features of plain images. They are computed once, as neither trunk nor images change between epochs.

    Up to 1 GiB is kept in memory, more in a temporary file.

    Parameters
    ----------
    source : ImagePass
        Computes the features.
    rows : int64, (n,)
        Rows of the images.
    folder : Path
        Folder of the temporary file, if one is needed.
    progress : callable, optional
        Called with ``("trunk", done, total)``.
    """

    def __init__(self, source: ImagePass, rows: np.ndarray, folder: Path, progress: Progress | None) -> None:
        self._batch_size = source.batch_size
        self._place: dict[int, int] = {}
        self._array: np.ndarray = np.zeros((0,), np.float32)

        def plain(row: int, data: bytes) -> DecodedViews:
            return decode_views(data, source.rule, None, seed=0, sha256=b"", views=[PLAIN])

        for done, features in source.features(rows, plain):
            start = len(self._place)
            if not start:
                self._array = _allocated((len(rows), *features.shape[1:]), features.dtype, folder)
            self._array[start : start + len(features)] = features
            self._place |= {row: start + offset for offset, row in enumerate(done.tolist())}
            if progress:
                progress("trunk", len(self._place), len(rows))

    def readable(self, rows: np.ndarray) -> np.ndarray:
        return np.array([row for row in rows.tolist() if row in self._place], dtype=np.int64)

    def batches(self, rows: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            yield batch, self._array[[self._place[row] for row in batch.tolist()]]


class LiveViews:
    """A new view of each image in each epoch: decoded and augmented on threads, then passed through the frozen trunk.

    View k of an image depends only on seed, content and k, so epoch k has the same pixels as view k in a store.

    Parameters
    ----------
    source : ImagePass
        Computes the features.
    data : Data
        Rows of the images.
    spec : AugmentSpec
        Augmentation that the views are drawn from.
    seed : int
        Seed of the views.
    plain : Inputs
        Features of the plain images, which are used to measure.
    """

    def __init__(self, source: ImagePass, data: Data, spec: AugmentSpec, seed: int, plain: Inputs) -> None:
        self._source, self._data, self._spec, self._seed, self._plain = source, data, spec, seed, plain

    def readable(self, rows: np.ndarray) -> np.ndarray:
        plain = set(self._plain.readable(rows).tolist()) | set(self._data.rows("train").tolist())
        return np.array([row for row in rows.tolist() if row in plain], dtype=np.int64)

    def batches(self, rows: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if epoch == PLAIN:
            yield from self._plain.batches(rows, PLAIN)
            return

        def drawn(row: int, data: bytes) -> DecodedViews:
            content = self._data.sha256[row].tobytes()
            return decode_views(data, self._source.rule, self._spec, seed=self._seed, sha256=content, views=[epoch])

        yield from self._source.features(rows, drawn)


class DeviceFeatures:
    """Features of plain images that stay on the device; a batch is gathered there.

    Parameters
    ----------
    source : Inputs
        Where they come from, once.
    rows : int64, (n,)
        Rows of the images.
    batch_size : int
        Rows per batch.
    """

    def __init__(self, source: Inputs, rows: np.ndarray, batch_size: int) -> None:
        self._rows, self._batch_size = source.readable(rows), batch_size
        self._place = {row: place for place, row in enumerate(self._rows.tolist())}
        parts = [features for _, features in source.batches(self._rows, PLAIN)]
        self._features = load_keras().ops.convert_to_tensor(np.concatenate(parts))

    def readable(self, rows: np.ndarray) -> np.ndarray:
        return np.array([row for row in rows.tolist() if row in self._place], dtype=np.int64)

    def batches(self, rows: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, Any]]:
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            places = np.array([self._place[row] for row in batch.tolist()], np.int32)
            yield batch, load_keras().ops.take(self._features, places, axis=0)


def on_device(source: Inputs, rows: np.ndarray, batch_size: int) -> Inputs:
    """Keep the features of plain images on the device if they fit, else return ``source``."""
    some = source.readable(rows)[:1]
    if not len(some):
        return source
    _, first = next(source.batches(some, PLAIN))
    if first.nbytes * len(rows) > DEVICE_BYTES:
        return source
    try:
        return DeviceFeatures(source, rows, batch_size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        logger.info("the features before the trained layers do not fit on the device; each batch is sent")
        return source


def _allocated(shape: tuple[int, ...], dtype: np.dtype, folder: Path) -> np.ndarray:
    needed = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if needed <= KEPT_BYTES:
        return np.empty(shape, dtype)
    free = shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise StoreError(
            f"{folder}: the features before the trained layers need {needed >> 20} MiB of disk space, {free >> 20} MiB "
            "are free. Free some space, give another --runs folder, or unfreeze from a later layer."
        )
    with tempfile.TemporaryFile(dir=folder, prefix=".finetune-") as file:  # it has no name, so it is gone once unmapped
        return np.memmap(file, dtype, "w+", shape=shape)
