"""Shards, the units of an extraction: a spec names images and recipes, and ``extract_shard`` makes one file of them.

    spec -> read bytes -> decode, render views (threads) -> batch -> infer -> rows in memory -> shard file -> record -> journal

The name of a shard is derived from its spec, so making it twice gives the same file. Shards are stored in a folder
beside the store (``features.h5.parts/``) and recorded in a journal (``features.extraction.journal``). The assembly
(``features.extraction.assembly``) copies them into one file, or makes an index of them and keeps them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from features.canonical import digest_of
from features.errors import ExtractionError, IntegrityError, StoreError, UnreadableImageError
from features.files import atomic_file, file_digest, printable
from features.pixels.batches import batches, loaded
from features.pixels.limits import NO_MEMORY, watch
from features.pixels.processes import DecodeProcesses, Job
from features.pixels.views import DecodedViews, decode_views
from features.recipe import PixelRule, Recipe
from features.store.reader import FeatureStore, shard_path
from features.store.schema import FeatureSpec, ImageTable, Quarantine, digest_rows
from features.store.writer import StoreWriter

logger = logging.getLogger(__name__)
SHARD_BYTES = 64 << 20  # bytes of one shard over all its feature sets and views
SHARD_ROWS_MIN, SHARD_ROWS_MAX = 32, 2048
KILLS_WORKER = "kills-worker"  # reason given for an image that was not decoded, because it kills the worker process
Infer = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """The specification of one shard; it depends neither on the machine nor on other shards.

    Parameters
    ----------
    root : str
        Root of the image source; paths are relative to it.
    paths : tuple of str
        Paths of the images as the source names them, in row order.
    sizes, mtimes_ns : tuple of int
        File size in bytes and modification time in nanoseconds, as found by the scan.
    recipes : tuple of Recipe
        Recipes of the feature sets to compute; they share pixel rule, augmentation and seed.
    views : tuple of int
        Views to compute, ascending.
    attempt : int
        Distinguishes the shard from an existing shard of the same images: a shard is never changed, but images of the
        same path, size and time may have new content.
    """

    root: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    mtimes_ns: tuple[int, ...]
    recipes: tuple[Recipe, ...]
    views: tuple[int, ...] = (0,)
    attempt: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, start: int, stop: int) -> ShardSpec:
        """Return the spec of the rows from ``start`` to before ``stop``; it has an identity of its own."""
        columns = {name: getattr(self, name)[start:stop] for name in ("paths", "sizes", "mtimes_ns")}
        return dataclasses.replace(self, **columns)

    def untaken(self, taken: Collection[str]) -> ShardSpec:
        """The same shard under a name that none of these has."""
        spec = self
        while spec.identity in taken:
            spec = dataclasses.replace(spec, attempt=spec.attempt + 1)
        return spec

    @property
    def pixels(self) -> PixelRule:
        """How the images are decoded and resized; all recipes share this rule."""
        return self.recipes[0].pixels

    def render(self, data: bytes, sha256: bytes) -> DecodedViews:
        """Decode the views of one image from its bytes and their sha256; raises ``UnreadableImageError``."""
        recipe = self.recipes[0]
        return decode_views(data, recipe.pixels, recipe.augmentation, seed=recipe.seed, sha256=sha256, views=self.views)

    @property
    def job(self) -> Job:
        """What processes do with each image."""
        recipe = self.recipes[0]
        return Job(self.root, recipe.pixels, recipe.augmentation, recipe.seed, self.views)

    @functools.cached_property
    def identity(self) -> str:
        """Name of the shard: 20 hexadecimal digits of the sha256 over all fields."""
        images = [list(row) for row in zip(self.paths, self.sizes, self.mtimes_ns, strict=True)]
        fingerprints = [recipe.fingerprint for recipe in self.recipes]
        return digest_of([self.root, images, fingerprints, list(self.views), self.attempt])[:20]


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """What one shard holds, in memory.

    Parameters
    ----------
    images : list of (int, bytes, int, int)
        One entry per row: index in the spec, sha256, width and height of the decoded image in pixels.
    features : dict of str to float32 or float16, (rows, views, ...)
        Features by feature set; empty where no image could be read.
    refused : list of (int, bytes, UnreadableImageError)
        Images without a row: index in the spec, sha256 (zeros where no byte was read), and why.
    """

    images: list[tuple[int, bytes, int, int]]
    features: dict[str, np.ndarray]
    refused: list[tuple[int, bytes, UnreadableImageError]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """The journal's record of a finished shard.

    It holds its name, its sha256, its views, whether a sharded store needs it, and the engine that made it, which is empty if that
    is not known, or if a store says it.
    """

    identity: str
    sha256: str
    views: tuple[int, ...]
    kept: bool = False
    engine: str = ""


def rows_per_shard(row_bytes: int, batch_size: int) -> int:
    """Return the number of rows per shard: about 64 MiB, between 32 and 2048 rows, in whole batches.

    Parameters
    ----------
    row_bytes : int
        Bytes of one image over all feature sets and views.
    batch_size : int
        Views per forward pass; in a shard of whole batches nothing is wasted on padding.

    Examples
    --------
    >>> rows_per_shard(1280 * 4, 32), rows_per_shard(25088 * 4, 32), rows_per_shard(10**9, 32)
    (2048, 640, 32)
    """
    rows = min(SHARD_ROWS_MAX, max(SHARD_ROWS_MIN, SHARD_BYTES // max(1, row_bytes)))
    return max(batch_size, rows // batch_size * batch_size)


def extract_shard(
    spec: ShardSpec,
    folder: Path,
    *,
    read: Callable[[str], bytes],
    infer: Infer,
    decoders: Executor,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
    processes: DecodeProcesses | None = None,
) -> ShardRecord:
    """Make one shard file in ``folder``; the same spec always gives the same rows.

    Parameters
    ----------
    spec : ShardSpec
        The shard to make.
    folder : Path
        Folder for the shard file, which is named after the spec's identity.
    read : callable
        Takes a path and returns the bytes of the image, or raises ``UnreadableImageError``.
    infer : callable
        Takes ``uint8, (n, h, w, 3)`` with n <= batch_size and returns ``{feature set: float32, (n, ...)}``.
    decoders : Executor
        Threads that read and decode images.
    batch_size : int
        Views per forward pass, of one image or of several.
    advance : callable, optional
        Called with the number of images that have just been finished with all their views.
    processes : DecodeProcesses, optional
        Processes that read and decode the images, which are files, instead of ``read`` and ``decoders``.

    Raises
    ------
    ExtractionError
        If a feature is not finite in the stored dtype.
    StoreError
        If the shard cannot be written.
    """
    rows = infer_shard(
        spec,
        read=read,
        infer=infer,
        decoders=decoders,
        batch_size=batch_size,
        advance=advance,
        processes=processes,
    )
    for index, _, error in rows.refused:
        logger.warning("%s is unreadable (%s); quarantined", printable(spec.paths[index]), error)
    return write_shard(spec, folder, rows)


def infer_shard(
    spec: ShardSpec,
    *,
    read: Callable[[str], bytes],
    infer: Infer,
    decoders: Executor,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
    processes: DecodeProcesses | None = None,
) -> ShardRows:
    """Compute the rows of one shard and write nothing; parameters and errors are those of ``extract_shard``."""
    views = len(spec.views)
    hashes: dict[int, bytes] = {}

    def decoded() -> Iterator[tuple[int, DecodedViews | UnreadableImageError]]:
        if processes is None:
            yield from loaded(decoders, load, range(len(spec)), 2 * batch_size // views)
            return
        for index, hashes[index], outcome in processes.decoded(spec.job, spec.paths):
            yield index, outcome

    def load(index: int) -> DecodedViews:
        data = read(spec.paths[index])
        hashes[index] = hashlib.sha256(data).digest()
        with watch.over(spec.paths[index]):
            return spec.render(data, hashes[index])

    rows = ShardRows([], {})
    features: dict[str, np.ndarray] = {}  # image by image, the views of each in order
    inferred = 0
    for batch in batches(decoded(), spec.pixels, batch_size):
        for index, error in batch.refused:
            # Without a hash, the next extraction tries it again.
            sha256 = bytes(32) if error.reason == NO_MEMORY else hashes.get(index, bytes(32))
            rows.refused.append((index, sha256, error))
        rows.images.extend((index, hashes[index], decoded.width, decoded.height) for index, decoded in batch.done)
        if len(batch.pixels):
            for name, values in _stored(infer(batch.pixels), spec.recipes).items():
                if name not in features:
                    features[name] = np.empty((len(spec) * views, *values.shape[1:]), values.dtype)
                features[name][inferred : inferred + len(values)] = values
            inferred += len(batch.pixels)
        if advance and (finished := len(batch.done) + len(batch.refused)):
            advance(finished)
    for name, values in features.items():
        rows.features[name] = values[:inferred].reshape(len(rows.images), views, *values.shape[1:])
    return rows


def refuse_image(spec: ShardSpec, folder: Path, *, read: Callable[[str], bytes], reason: str) -> ShardRecord:
    """Make the shard of a single image that is quarantined without being decoded; its bytes are only hashed."""
    try:
        sha256, refusal = hashlib.sha256(read(spec.paths[0])).digest(), UnreadableImageError(reason)
    except UnreadableImageError as error:
        sha256, refusal = bytes(32), error
    return write_shard(spec, folder, ShardRows([], {}, [(0, sha256, refusal)]))


def _stored(outputs: Mapping[str, np.ndarray], recipes: Sequence[Recipe]) -> dict[str, np.ndarray]:
    """Cast features to the stored dtype; ``ExtractionError`` if a value is not finite in that dtype."""
    result = {}
    for recipe in recipes:
        with np.errstate(over="ignore"):
            rows = np.asarray(outputs[recipe.name]).astype(recipe.dtype, copy=True)
        if not np.isfinite(rows).all():
            largest = float(np.nanmax(np.abs(np.asarray(outputs[recipe.name], dtype=np.float64))))
            raise ExtractionError(
                f"layer {recipe.layer}: a feature is not finite as {recipe.dtype} (largest magnitude {largest:.4g}). "
                "Store it with --dtype float32, or check the weights."
            )
        result[recipe.name] = rows
    return result


def write_shard(spec: ShardSpec, folder: Path, rows: ShardRows) -> ShardRecord:
    """Make the file of one shard; a whole one that has its name is left as it is."""
    good, refused = rows.images, rows.refused
    path = shard_path(folder, spec.identity)
    there = find_shard(path) if path.is_file() else None
    if there is not None:  # another worker has replaced this one; the journal may already have its checksum
        return there
    path.unlink(missing_ok=True)  # damaged
    with atomic_file(path, once=True) as temporary:
        features = {}
        for recipe in spec.recipes:
            shape = rows.features[recipe.name].shape[2:] if rows.features else (0,)
            features[recipe.name] = FeatureSpec(recipe, len(spec.views), shape)
        writer = StoreWriter(temporary, kind="shard", rows=len(good), features=features)
        try:
            for name, values in rows.features.items():
                writer.append(name, values)
            rows_of = [row[0] for row in good]
            writer.finish(
                images=ImageTable(
                    paths=tuple(spec.paths[index] for index in rows_of),
                    sha256=digest_rows(row[1] for row in good),
                    labels=np.full(len(good), -1, np.int32),
                    splits=np.full(len(good), -1, np.int8),
                    groups=None,
                    widths=np.array([row[2] for row in good], np.int32),
                    heights=np.array([row[3] for row in good], np.int32),
                    sizes=np.array([spec.sizes[index] for index in rows_of], np.int64),
                    mtimes_ns=np.array([spec.mtimes_ns[index] for index in rows_of], np.int64),
                ),
                quarantine=Quarantine(
                    paths=tuple(spec.paths[row[0]] for row in refused),
                    sha256=digest_rows(row[1] for row in refused),
                    reasons=tuple(row[2].reason for row in refused),
                    sizes=np.array([spec.sizes[row[0]] for row in refused], np.int64),
                    mtimes_ns=np.array([spec.mtimes_ns[row[0]] for row in refused], np.int64),
                ),
                provenance={"views": list(spec.views), "root": spec.root},
            )
        finally:
            writer.close()
    return ShardRecord(spec.identity, file_digest(path), spec.views)


def find_shard(path: Path) -> ShardRecord | None:
    """Read the record of a shard file that the journal lacks; None, with a warning, if the file cannot be used."""
    try:
        shard = FeatureStore.open_shard(path)
        shard.verify()
        views = tuple(int(view) for view in shard.provenance["views"])
        return ShardRecord(path.stem, file_digest(path), views)
    except (StoreError, IntegrityError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is not in the journal and cannot be used (%s)", path, error)
        return None
