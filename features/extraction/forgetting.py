"""Leave images out of a store on request: a new store is assembled, and no file that held them stays beside it.

    store + content hashes --> shards without these rows (durable) --> new packed file or index --> old shards removed

A kill at any moment leaves the store as it was before or as it is after, and the same call finishes the work.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import IntegrityError, UnreadableImageError
from features.extraction.assembly import Contents, rows_of_block, write_store
from features.extraction.journal import PartsFolder
from features.extraction.notes import Notes
from features.extraction.shard import ShardRecord, ShardRows, ShardSpec, write_shard
from features.files import behind_link, locked, sweep
from features.progress import Progress
from features.store.reader import FeatureStore, parts_folder, shard_path
from features.store.schema import FeatureSpec, ShardTable, digest_rows

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """What a store held of the images that are to be forgotten.

    Parameters
    ----------
    paths : tuple of str
        Paths of the rows and of the quarantined images.
    rows, quarantined : int
        Number of rows, and of images in the quarantine.
    shards : int
        Number of shards beside the store that hold some of them.
    """

    paths: tuple[str, ...]
    rows: int
    quarantined: int
    shards: int

    def __bool__(self) -> bool:
        return bool(self.rows or self.quarantined or self.shards)


def held(path: Path, hashes: Collection[bytes]) -> Forgotten:
    """Say what a store and the shards beside it hold of images with these content hashes; nothing is changed."""
    store = FeatureStore.open(path)
    wanted = digest_rows(hashes)
    rows = np.flatnonzero(_among(store.images.sha256, wanted)).tolist()
    refused = np.flatnonzero(_among(store.quarantine.sha256, wanted)).tolist()
    parts = PartsFolder(parts_folder(path))
    parts.read()
    paths = [store.images.paths[row] for row in rows] + [store.quarantine.paths[row] for row in refused]
    shards = 0
    for identity in parts.records:
        shard = FeatureStore.open_shard(shard_path(parts.path, identity))
        if _holds(shard, wanted):
            shards += 1
            paths += [shard.images.paths[row] for row in np.flatnonzero(_among(shard.images.sha256, wanted)).tolist()]
    return Forgotten(tuple(dict.fromkeys(paths)), len(rows), len(refused), shards)


def forget(path: Path, hashes: Collection[bytes], progress: Progress | None = None) -> Forgotten:
    """Leave rows and quarantined images with these content hashes out of a store.

    A shard that the store uses is written again without them. Any other shard that holds one, of an unfinished extraction or
    an earlier state, is removed whole: its other images are computed again if they are still wanted.

    Parameters
    ----------
    path : Path
        The store, packed or sharded.
    hashes : collection of bytes, 32 each
        sha256 of the images' bytes.
    progress : callable, optional
        Called with ``("assemble", done, total)``.

    Returns
    -------
    Forgotten
        What was there before.

    Raises
    ------
    LockedError
        If another process writes the store.
    IntegrityError
        If a shard that holds one of these rows is damaged or missing.
    StoreError
        If the new store cannot be written; the old one is then untouched.
    """
    path, wanted = behind_link(path), digest_rows(hashes)
    with locked(path):
        sweep(path)
        found = held(path, hashes)
        if not found:
            return found
        store = FeatureStore.open(path)
        _forget_notes(store, wanted, found.paths)
        parts = PartsFolder(parts_folder(path))
        parts.read()
        holding = [
            name for name in parts.records if _holds(FeatureStore.open_shard(shard_path(parts.path, name)), wanted)
        ]
        if found.rows or found.quarantined:
            _write_without(path, store, wanted, parts, progress)
        if holding:
            parts.drop(holding)
            parts.open()
            if not parts.records:
                parts.remove()
    return found


def _write_without(
    path: Path, store: FeatureStore, wanted: np.ndarray, parts: PartsFolder, progress: Progress | None
) -> None:
    """Write the store without these rows; in the sharded layout, first the shards that hold some of them."""
    kept = np.flatnonzero(~_among(store.images.sha256, wanted))
    specs = {
        name: FeatureSpec(recipe, store.views(name), store.shape(name)[2:]) for name, recipe in store.recipes.items()
    }
    fields = {field.name: getattr(store, field.name) for field in dataclasses.fields(Contents)}
    contents = Contents(
        **{
            **fields,
            "images": store.images.some(kept),
            "quarantine": store.quarantine.some(np.flatnonzero(~_among(store.quarantine.sha256, wanted))),
        }
    )
    if store.kind != "index":
        blocks: dict[str, Any] = {
            name: _rows(store.array(name), kept, rows_of_block(spec)) for name, spec in specs.items()
        }
        write_store(path, specs, blocks, contents, None, progress)
        return
    places = {name: store.places(name)[kept] for name in store.names}
    names, digests = list(store.shards.names), [bytes(digest) for digest in store.shards.digests]
    for number, name in enumerate(names):
        shard = FeatureStore.open_shard(shard_path(parts.path, name)) if name in parts.records else None
        if shard is None or not _holds(shard, wanted):
            continue
        record, row_of = _rewritten(shard, wanted, parts)
        names[number] = record.identity
        digests[number] = FeatureStore.open_shard(shard_path(parts.path, record.identity)).digest
        for place in places.values():
            here = place[..., 0] == number
            place[here, 1] = row_of[place[here, 1]]
    used = np.unique(np.concatenate([place[..., 0].reshape(-1) for place in places.values()]))
    for place in places.values():
        place[..., 0] = np.searchsorted(used, place[..., 0])
    table = ShardTable(tuple(names[number] for number in used), digest_rows(digests[number] for number in used))
    parts.open()  # the journal names the new shards before the index needs them
    write_store(path, specs, {name: [place] for name, place in places.items()}, contents, table, progress)


def _rewritten(shard: FeatureStore, wanted: np.ndarray, parts: PartsFolder) -> tuple[ShardRecord, np.ndarray]:
    """Write a shard without these images; return its record, and the new row of each old one, -1 for those left out."""
    shard.verify()
    table, refused = shard.images, shard.quarantine
    good = np.flatnonzero(~_among(table.sha256, wanted))
    bad = np.flatnonzero(~_among(refused.sha256, wanted))
    views = tuple(int(view) for view in shard.provenance["views"])
    spec = ShardSpec(
        root=str(shard.provenance["root"]),
        paths=(*(table.paths[row] for row in good.tolist()), *(refused.paths[row] for row in bad.tolist())),
        sizes=(*table.sizes[good].tolist(), *refused.sizes[bad].tolist()),
        mtimes_ns=(*table.mtimes_ns[good].tolist(), *refused.mtimes_ns[bad].tolist()),
        recipes=tuple(shard.recipes.values()),
        views=views,
    )
    rows = ShardRows(
        [
            (number, table.sha256[row].tobytes(), int(table.widths[row]), int(table.heights[row]))
            for number, row in enumerate(good.tolist())
        ],
        {name: np.asarray(shard.array(name)[good]) for name in shard.names},
        [
            (len(good) + number, refused.sha256[row].tobytes(), UnreadableImageError(refused.reasons[row]))
            for number, row in enumerate(bad.tolist())
        ],
    )
    while _is_another(shard_path(parts.path, spec.identity), rows):
        spec = dataclasses.replace(spec, attempt=spec.attempt + 1)
    before = parts.records[shard.path.stem]
    record = dataclasses.replace(write_shard(spec, parts.path, rows), kept=before.kept)
    parts.records[record.identity] = record
    row_of = np.full(len(shard), -1, np.int64)
    row_of[good] = np.arange(len(good))
    return record, row_of


def _is_another(path: Path, rows: ShardRows) -> bool:
    """Whether a file has the name of a new shard and other contents; the same ones were left by a call that was killed."""
    if not path.is_file():
        return False
    try:
        return FeatureStore.open_shard(path).images.sha256.tobytes() != b"".join(row[1] for row in rows.images)
    except IntegrityError:
        return False  # half a file, which is replaced


def _forget_notes(store: FeatureStore, wanted: np.ndarray, paths: Collection[str]) -> None:
    """Leave the images out of what is noted on this machine about the files of the store."""
    gone = set(paths)
    for root in {str(store.provenance.get("root", "")), ""}:
        before = Notes.read(store.path, root)
        hashes = [
            None if path in gone else sha256.tobytes() for path, sha256 in zip(before.paths, before.sha256, strict=True)
        ]
        among = _among(before.sha256, wanted)
        hashes = [None if out else sha256 for out, sha256 in zip(among.tolist(), hashes, strict=True)]
        if None in hashes:
            before.replaced(before.paths, before.stamps, hashes).write(before)


def _holds(shard: FeatureStore, wanted: np.ndarray) -> bool:
    return bool(_among(shard.images.sha256, wanted).any() or _among(shard.quarantine.sha256, wanted).any())


def _among(sha256: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of these digests, uint8 (n, 32), are among others, bool (n,)."""
    return np.isin(np.ascontiguousarray(sha256).view("S32")[:, 0], np.ascontiguousarray(wanted).view("S32")[:, 0])


def _rows(array: Any, rows: np.ndarray, step: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), step):
        yield array[rows[start : start + step]]
