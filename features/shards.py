"""The unit of extraction: a spec names images and recipes, ``extract_shard`` makes one durable shard of them.

    spec -> read bytes -> decode, render views (threads) -> batch -> infer -> rows -> shard file -> record -> journal

A shard's name is derived from its spec, so making it twice gives the same file. Shards lie in a folder beside
the store (``features.h5.parts/``) with an append-only journal; assembly (``features.assembly``) copies them into one
file, or makes an index of them and they stay.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TypeVar

import numpy as np

from features.errors import ExtractionError, IntegrityError, StoreError, UnreadableImageError
from features.files import atomic_file, file_digest, printable, writing
from features.layout import FeatureSpec, ImageTable, Quarantine, digest_rows
from features.recipe import Recipe, canonical_json, digest_of
from features.store import FeatureStore, is_shard_name, shard_path
from features.views import DecodedViews, decode_views
from features.writer import StoreWriter

logger = logging.getLogger(__name__)
SHARD_BYTES = 64 << 20  # rows of one shard, over all its data sets and views
SHARD_ROWS_MIN, SHARD_ROWS_MAX = 32, 2048
WINDOW_MIN = 8  # images read ahead, however many views each has
JOURNAL_VERSION = 1
KILLS_WORKER = "kills-worker"  # reason for an image that was never decoded, because the process that reads it dies
Item = TypeVar("Item")
Result = TypeVar("Result")
Infer = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """What one shard is made of; nothing in it depends on the machine or on other shards.

    Parameters
    ----------
    root : str
        Where the source lies; paths are relative to it.
    paths : tuple of str
        Images, in row order, as the source names them.
    sizes, mtimes_ns : tuple of int
        File size in bytes and modification time in nanoseconds, as the scan saw them.
    recipes : tuple of Recipe
        Feature data sets to make; they share pixel rule, augmentation and seed.
    views : tuple of int
        Views to make, ascending.
    attempt : int
        Sets it apart from a shard of the same images that is there already. Those of equal path, size and time may
        have other content, and a shard never changes.
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
        """The spec of some of its rows, which has an identity of its own."""
        columns = {name: getattr(self, name)[start:stop] for name in ("paths", "sizes", "mtimes_ns")}
        return dataclasses.replace(self, **columns)

    @functools.cached_property
    def identity(self) -> str:
        """20 hexadecimal digits derived from everything above."""
        images = [list(row) for row in zip(self.paths, self.sizes, self.mtimes_ns, strict=True)]
        fingerprints = [recipe.fingerprint for recipe in self.recipes]
        return digest_of([self.root, images, fingerprints, list(self.views), self.attempt])[:20]


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard without opening it: name, checksum, views, and whether a store needs it."""

    identity: str
    sha256: str
    views: tuple[int, ...]
    kept: bool = False


def rows_per_shard(row_bytes: int, batch_size: int) -> int:
    """Rows of one shard: about 64 MiB, between 32 and 2048, whole batches.

    Parameters
    ----------
    row_bytes : int
        Bytes of one image over all data sets and views.
    batch_size : int
        Pictures of one forward pass; a shard of whole batches wastes no padding.

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
) -> ShardRecord:
    """Make one shard file in ``folder``. The same spec gives the same rows, however often it is made.

    Parameters
    ----------
    spec : ShardSpec
        What to make.
    folder : Path
        Where the shard file goes, under its identity.
    read : callable
        Path -> bytes; raises ``UnreadableImageError``.
    infer : callable
        ``uint8, (n, h, w, 3)`` with n <= batch_size -> ``{data set: float32, (n, ...)}``.
    decoders : Executor
        Threads that read and decode.
    batch_size : int
        Pictures of one forward pass: views of one image or of several.
    advance : callable, optional
        Told how many images have just been dealt with, all their views.

    Raises
    ------
    ExtractionError
        If a feature is not finite in the stored dtype.
    StoreError
        If the shard cannot be written.
    """
    rule, views = spec.recipes[0].pixels, len(spec.views)
    refused: list[tuple[int, bytes, str]] = []
    good: list[tuple[int, bytes, int, int]] = []  # index in the spec, sha256, width, height
    features: dict[str, np.ndarray] = {}  # views behind each other, image by image
    batch = np.empty((batch_size, rule.height, rule.width, 3), dtype=np.uint8)
    filled = inferred = 0

    def flush() -> None:
        nonlocal filled, inferred
        for name, rows in _stored(infer(batch[:filled]), spec.recipes).items():
            if name not in features:
                features[name] = np.empty((len(spec) * views, *rows.shape[1:]), rows.dtype)
            features[name][inferred : inferred + filled] = rows
        whole = (inferred + filled) // views - inferred // views
        inferred, filled = inferred + filled, 0
        if advance and whole:
            advance(whole)

    load = functools.partial(load_views, read, spec)
    window = 2 * batch_size if views == 1 else max(2 * batch_size // views, WINDOW_MIN)
    for index, (sha256, outcome) in enumerate(ahead(decoders, load, spec.paths, window)):
        if isinstance(outcome, UnreadableImageError):
            logger.warning("%s is unreadable (%s); set aside", printable(spec.paths[index]), outcome)
            refused.append((index, sha256, outcome.reason))
            if advance:
                advance(1)
            continue
        good.append((index, sha256, outcome.width, outcome.height))
        for pixels in outcome.pixels:
            batch[filled] = pixels
            filled += 1
            if filled == batch_size:
                flush()
    if filled:
        flush()
    kept = {name: rows[:inferred].reshape(len(good), views, *rows.shape[1:]) for name, rows in features.items()}
    return _write(spec, folder, good, refused, kept)


def refuse_image(spec: ShardSpec, folder: Path, *, read: Callable[[str], bytes], reason: str) -> ShardRecord:
    """Make the shard of a single image that is set aside without being decoded: its bytes are hashed and that is all."""
    try:
        sha256 = hashlib.sha256(read(spec.paths[0])).digest()
    except UnreadableImageError as error:
        sha256, reason = bytes(32), error.reason
    return _write(spec, folder, [], [(0, sha256, reason)], {})


def load_views(
    read: Callable[[str], bytes], spec: ShardSpec, path: str
) -> tuple[bytes, DecodedViews | UnreadableImageError]:
    """Read one image of a spec and render its views: content hash (zeros if no byte was read), and views or refusal."""
    sha256, recipe = bytes(32), spec.recipes[0]
    try:
        data = read(path)
        sha256 = hashlib.sha256(data).digest()
        return sha256, decode_views(
            data, recipe.pixels, recipe.augmentation, seed=recipe.seed, sha256=sha256, views=spec.views
        )
    except UnreadableImageError as error:
        return sha256, error


def ahead(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], window: int) -> Iterator[Result]:
    """Map in order with at most ``window`` results waiting, so that memory stays constant."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _stored(outputs: Mapping[str, np.ndarray], recipes: Sequence[Recipe]) -> dict[str, np.ndarray]:
    """Cast to the stored dtype; a value that is not finite there is an error that names the layer."""
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


def _write(
    spec: ShardSpec,
    folder: Path,
    good: Sequence[tuple[int, bytes, int, int]],
    refused: Sequence[tuple[int, bytes, str]],
    arrays: Mapping[str, np.ndarray],
) -> ShardRecord:
    path = shard_path(folder, spec.identity)
    there = find_shard(path) if path.is_file() else None
    if there is not None:  # another worker has made it, as this one was thought to be lost: its checksum may be noted
        return there
    path.unlink(missing_ok=True)  # damaged
    with atomic_file(path, once=True) as temporary:
        features = {}
        for recipe in spec.recipes:
            shape = arrays[recipe.name].shape[2:] if arrays else (0,)
            features[recipe.name] = FeatureSpec(recipe, len(spec.views), shape)
        writer = StoreWriter(temporary, kind="shard", rows=len(good), features=features)
        try:
            for name, rows in arrays.items():
                writer.append(name, rows)
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
                    reasons=tuple(row[2] for row in refused),
                    sizes=np.array([spec.sizes[row[0]] for row in refused], np.int64),
                    mtimes_ns=np.array([spec.mtimes_ns[row[0]] for row in refused], np.int64),
                ),
                provenance={"views": list(spec.views), "root": spec.root},
            )
        finally:
            writer.close()
    return ShardRecord(spec.identity, file_digest(path), spec.views)


class PartsFolder:
    """The shards of an unfinished extraction, or of a sharded store, and their journal, one JSON line each.

    A torn last line, a missing shard or one whose checksum differs costs that shard and nothing else; a shard
    that was renamed into place but not entered before a crash is found again. Files of other names are not ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "manifest.jsonl"
        self.records: dict[str, ShardRecord] = {}

    def read(self) -> None:
        """Look what is there, and change nothing: the journal, and shards that it lacks."""
        self.records = {}
        lines = self.journal.read_bytes().splitlines() if self.journal.is_file() else []
        for record in filter(None, map(_parse_record, lines)):
            if shard_path(self.path, record.identity).is_file():
                self.records[record.identity] = record
        for path in self._files():
            if path.stem not in self.records and (found := find_shard(path)) is not None:
                self.records[found.identity] = found

    def open(self) -> None:
        """Make the folder ready for new shards: left-over temporary files go, what was found is in the journal."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._sweep()
        self._rewrite()

    def commit(self, record: ShardRecord) -> None:
        """Enter one finished shard; durable when this returns."""
        with writing(self.journal), open(self.journal, "ab") as stream:
            stream.write(_record_line(record))
            stream.flush()
            os.fsync(stream.fileno())
        self.records[record.identity] = record

    def shards(self, *, known: Collection[str] = ()) -> Iterator[tuple[ShardRecord, FeatureStore]]:
        """Open every committed shard whose checksum holds; one that does not is left out with a warning.

        Parameters
        ----------
        known : collection of str
            Shards to leave out: those that the index of the store vouches for.
        """
        for identity, record in list(self.records.items()):
            if identity in known:
                continue
            path = shard_path(self.path, identity)
            if file_digest(path) != record.sha256:
                logger.warning("%s is damaged (checksum differs); its images are computed again", path)
                del self.records[identity]
                continue
            shard = FeatureStore.open_shard(path)
            if any(shard.views(name) != len(record.views) for name in shard.names):
                raise IntegrityError(f"{path}: holds other views than {self.journal} says. Move it away and run again.")
            yield record, shard

    def drop(self, identities: Collection[str]) -> None:
        """Remove these shards."""
        for identity in identities:
            shard_path(self.path, identity).unlink(missing_ok=True)
            self.records.pop(identity, None)

    def keep(self, identities: Collection[str]) -> None:
        """Remove every shard but these, and note that a sharded store needs them."""
        self._sweep()  # other machines may have died while this one was at work
        if set(self.records) == set(identities) and all(record.kept for record in self.records.values()):
            return
        self.drop([path.stem for path in self._files() if path.stem not in identities])
        self.records = {key: dataclasses.replace(record, kept=True) for key, record in self.records.items()}
        self._rewrite()

    def remove(self) -> None:
        """Remove shards, journal and folder. The journal goes first, so that a crash in between leaves orphans only."""
        for name in [self.journal, *self._files(), *self.path.glob(".*.tmp")]:
            name.unlink(missing_ok=True)
        if self.path.exists() and any(self.path.iterdir()):
            logger.warning("%s holds files that are not ours; it is left", self.path)
        elif self.path.exists() and not self.path.is_symlink():  # a link may lead to a disk of its own
            self.path.rmdir()

    def any_shard(self) -> bool:
        """Whether a shard lies there, entered or not."""
        return bool(self._files())

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.path.glob("*.h5")) if is_shard_name(path.stem) and path.is_file()]

    def _sweep(self) -> None:
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        with atomic_file(self.journal) as temporary:
            temporary.write_bytes(b"".join(map(_record_line, self.records.values())))


def find_shard(path: Path) -> ShardRecord | None:
    """The record of a shard file that is not in the journal; None, with a warning, if it cannot be used."""
    try:
        shard = FeatureStore.open_shard(path)
        shard.verify()
        views = tuple(int(view) for view in shard.provenance["views"])
        return ShardRecord(path.stem, file_digest(path), views)
    except (StoreError, IntegrityError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is in no journal and is not used (%s)", path, error)
        return None


def _record_line(record: ShardRecord) -> bytes:
    values = {**dataclasses.asdict(record), "version": JOURNAL_VERSION}
    return canonical_json(values).encode("ascii") + b"\n"


def _parse_record(line: bytes) -> ShardRecord | None:
    """A record as it was written; None for a line torn by a crash, whose shard is found again by its file."""
    try:
        values = json.loads(line)
        if values.pop("version") != JOURNAL_VERSION:
            return None
        record = ShardRecord(**{**values, "views": tuple(values["views"])})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    texts = isinstance(record.identity, str) and isinstance(record.sha256, str) and isinstance(record.kept, bool)
    if not texts or not is_shard_name(record.identity) or not all(type(view) is int for view in record.views):
        return None
    return record
