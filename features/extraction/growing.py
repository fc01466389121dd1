"""A store that grows by what it lacks: an index, and shards beside it that are added and merged, never changed.

    missing rows -> shard, entered in the journal (durable) -> ... -> index of all shards (tables and places, no features)

Adding rows writes those rows and the index. After a crash, the shards that the journal names and the index does not
are taken up by the next process that adds rows.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, IntegrityError, StoreError
from features.extraction.assembly import Contents, write_store
from features.extraction.journal import PartsFolder
from features.extraction.shard import ShardRows, ShardSpec, write_shard
from features.files import locked, sweep, writable_folder
from features.recipe import Recipe
from features.sources.splits import UNLABELLED
from features.store.reader import FeatureStore, parts_folder, shard_path
from features.store.schema import FeatureSpec, ImageTable, Quarantine, ShardTable, digest_rows

COPY_BYTES = 4 << 20
SMALL_SHARDS = 8  # shards of at most half a shard's rows that a store may have; more of them are merged
NO_ROWS = np.zeros(0, np.int64)
Append = Callable[[ShardSpec, ShardRows], None]


class GrowingStore:
    """Rows of one recipe, found by content hash.

    Parameters
    ----------
    path : Path
        The store, which may not be there yet.
    recipe : Recipe
        What its rows are made by.
    source : str
        Only a store of this source grows; any other is read and never changed.

    Attributes
    ----------
    store : FeatureStore or None
        The store as it was last read; None if there is none.
    rows : dict of bytes to int
        Content hash -> row.

    Raises
    ------
    ConfigurationError
        If the store is of another recipe.
    """

    def __init__(self, path: Path, recipe: Recipe, source: str) -> None:
        self.path, self.recipe, self._source = path, recipe, source
        self.store: FeatureStore | None = None
        self.rows: dict[bytes, int] = {}
        self._read()

    @property
    def grows(self) -> bool:
        """Whether rows may be added."""
        return self.store is None or self.store.source == self._source

    def files(self, mtimes_ns: Sequence[int]) -> dict[tuple[str, int, int], bytes]:
        """Files of these modification times: absolute path, size in bytes, time in nanoseconds -> content hash."""
        if self.store is None:
            return {}
        table, root = self.store.images, str(self.store.provenance.get("root", ""))
        rows = np.flatnonzero(np.isin(table.mtimes_ns, np.array(mtimes_ns, np.int64)))
        paths = [os.path.join(root, table.paths[row]) for row in rows.tolist()]
        columns = (paths, table.sizes[rows].tolist(), table.mtimes_ns[rows].tolist())
        return dict(zip(zip(*columns, strict=True), _as_bytes(table.sha256[rows]), strict=True))

    def copy(self, wanted: Mapping[bytes, Sequence[int]], features: np.ndarray) -> None:
        """Copy stored rows.

        Parameters
        ----------
        wanted : mapping of bytes to sequence of int
            Content hash of a stored row -> the lines it is copied to.
        features : float32, (lines, d)
            Where to.
        """
        if self.store is None or not wanted:
            return
        rows = np.array([self.rows[sha256] for sha256, lines in wanted.items() for _ in lines])
        try:
            _copy_rows(self.store, self.recipe.name, rows, np.concatenate([*wanted.values()]), features)
        except IntegrityError:
            # Since the store was read, another process may have merged shards and removed those of before.
            if not self._read() or not wanted.keys() <= self.rows.keys():
                raise
            self.copy(wanted, features)

    @contextlib.contextmanager
    def extending(
        self, *, shard_rows: int, provenance: Mapping[str, Any], lock_timeout: float = 0.0
    ) -> Iterator[Append]:
        """Hold the writer's lock, and give a function that adds a shard of rows, durable when it returns.

        ``store`` and ``rows`` are read anew first, as another process may have added rows. They do not show what is
        added. The index is written at the end, also after an error.

        Parameters
        ----------
        shard_rows : int
            Rows of a large shard, for merging small ones.
        provenance : mapping
            Kept in the store.
        lock_timeout : float
            Seconds to wait for another process that writes the store.

        Raises
        ------
        LockedError
            If another process still writes the store after that time.
        ConfigurationError
            If the shards beside the store are not its own.
        """
        writable_folder(self.path.parent)
        with locked(self.path, seconds=lock_timeout):
            sweep(self.path)
            self._read()
            if not self.grows:
                raise StoreError(f"{self.path}: an extraction has just made it, and it is not changed. Run again.")
            parts = PartsFolder(parts_folder(self.path))
            parts.read()
            added = self._left_behind(parts)
            parts.open()
            before = set(self._shard_names())
            sizes: dict[str, int] = {}  # rows of each shard, once the index is written

            def append(spec: ShardSpec, rows: ShardRows) -> None:
                record = write_shard(spec.untaken(before | parts.records.keys()), parts.path, rows)
                parts.commit(record)
                added.append(FeatureStore.open_shard(shard_path(parts.path, record.identity)))

            def write(moved: np.ndarray) -> None:
                for start in range(0, len(moved), shard_rows):
                    append(*self._shard_of(moved[start : start + shard_rows]))
                if added:
                    sizes.clear()
                    sizes.update(self._write_index(added, provenance, without=moved))
                    added.clear()

            packed = self.store is not None and self.store.kind == "store"
            write(np.arange(len(self.rows)) if packed else NO_ROWS)
            self._read()
            try:
                yield append
            finally:
                write(NO_ROWS)
                if not parts.records:
                    parts.remove()  # nothing was computed: leave nothing behind
            small = [name for name, rows in sizes.items() if rows <= shard_rows // 2]
            if len(small) > SMALL_SHARDS:
                self._read()
                write(self._rows_in(small))
            # Shards of the state before stay until rows are added again: it may have readers.
            parts.keep((before | sizes.keys()) & parts.records.keys())

    # -- inside
    def _read(self) -> bool:
        """Read the store if it is not the one that was read last; whether it is another."""
        if self.store is not None and self.store.in_place():
            return False
        before, self.store, self.rows = self.store, None, {}
        if self.path.exists():
            self.store = store = FeatureStore.open(self.path)
            self._check_recipe(store)
            rows = np.flatnonzero(store.present())
            self.rows = dict(zip(_as_bytes(store.images.sha256[rows]), rows.tolist(), strict=True))
        return before is not self.store

    def _check_recipe(self, store: FeatureStore) -> None:
        held = [*store.recipes.values()]
        if all(recipe.fingerprint != self.recipe.fingerprint for recipe in held):
            differences = self.recipe.difference(held[0]).items()
            fields = "; ".join(f"{field} is {theirs!s:.40}, not {mine!s:.40}" for field, (mine, theirs) in differences)
            raise ConfigurationError(
                f"{self.path}: holds features of another recipe ({fields}). Give another store, or a folder (a path that "
                "does not end in .h5), which gets a file per recipe."
            )

    def _shard_names(self) -> tuple[str, ...]:
        return () if self.store is None else self.store.shards.names

    def _left_behind(self, parts: PartsFolder) -> list[FeatureStore]:
        """Shards with rows that the store lacks, as the process that made them was killed before it wrote the index."""
        kept = {name for name, record in parts.records.items() if record.kept}  # of this state or the one before
        seen, found = set(self.rows), []
        for _, shard in parts.shards(known=() if self.store is None else {*self._shard_names(), *kept}):
            if shard.provenance.get("root") != "" or shard.recipes != {self.recipe.name: self.recipe}:
                raise ConfigurationError(
                    f"{parts.path}: holds images of an interrupted extraction, or of another recipe. Run that again to "
                    "finish it, give another store, or remove that folder to drop them."
                )
            hashes = set(_as_bytes(shard.images.sha256))
            if hashes - seen:
                found.append(shard)
                seen |= hashes
        return found

    def _rows_in(self, shards: Sequence[str]) -> np.ndarray:
        """Rows that lie in these shards, int64, ascending."""
        assert self.store is not None
        numbers = [number for number, name in enumerate(self.store.shards.names) if name in shards]
        places = self.store.places(self.recipe.name)[:, 0, 0]
        return np.flatnonzero(np.isin(places, numbers) & self.store.present())

    def _shard_of(self, rows: np.ndarray) -> tuple[ShardSpec, ShardRows]:
        """A shard of stored rows."""
        assert self.store is not None
        table, name = self.store.images, self.recipe.name
        spec = ShardSpec(
            root="",
            paths=tuple(table.paths[row] for row in rows),
            sizes=tuple(table.sizes[rows].tolist()),
            mtimes_ns=tuple(table.mtimes_ns[rows].tolist()),
            recipes=(self.recipe,),
        )
        numbers = range(len(rows))
        columns = (numbers, _as_bytes(table.sha256[rows]), table.widths[rows].tolist(), table.heights[rows].tolist())
        features = np.empty((len(rows), 1, *self.store.shape(name)[2:]), self.recipe.dtype)
        _copy_rows(self.store, name, rows, np.array(numbers), features)
        return spec, ShardRows([*zip(*columns, strict=True)], {name: features})

    def _write_index(
        self, added: Sequence[FeatureStore], provenance: Mapping[str, Any], without: np.ndarray
    ) -> dict[str, int]:
        """Write the index of the rows that there are, without some of them, and of shards; rows of each of its shards."""
        name, names, digests = self.recipe.name, [], []
        tables: list[tuple[ImageTable, np.ndarray]] = []
        places: list[np.ndarray] = []
        if self.store is not None and self.store.kind == "index":
            kept = self.store.present()
            kept[without] = False
            tables.append((self.store.images, np.flatnonzero(kept)))
            places.append(self.store.places(name)[kept])
            used, places[0][..., 0] = np.unique(places[0][..., 0], return_inverse=True)
            names += [self.store.shards.names[number] for number in used]
            digests += [self.store.shards.digests[number].tobytes() for number in used]
        for shard in added:
            rows = np.arange(len(shard))
            tables.append((shard.images, rows))
            places.append(np.stack(np.broadcast_arrays(len(names), rows, 0), axis=-1)[:, None])
            names.append(shard.path.stem)
            digests.append(shard.digest)
        nothing = Quarantine((), digest_rows(()), (), np.zeros(0, np.int64), np.zeros(0, np.int64))
        contents = Contents(_joined(tables), nothing, (), self._source, "", {**provenance, "root": ""})
        features = {name: FeatureSpec(self.recipe, 1, added[0].shape(name)[2:])}
        write_store(self.path, features, {name: places}, contents, ShardTable(tuple(names), digest_rows(digests)))
        rows_of = np.bincount(np.concatenate(places)[:, 0, 0], minlength=len(names))
        return dict(zip(names, rows_of.tolist(), strict=True))


def _as_bytes(digests: np.ndarray) -> list[bytes]:
    return list(digests.view("V32")[:, 0].tolist())


def _joined(chosen: Sequence[tuple[ImageTable, np.ndarray]]) -> ImageTable:
    """One table of rows of several, without labels."""

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(table, name)[rows] for table, rows in chosen])

    sha256 = column("sha256")
    return ImageTable(
        paths=tuple(itertools.chain(*(map(table.paths.__getitem__, rows.tolist()) for table, rows in chosen))),
        sha256=sha256,
        labels=np.full(len(sha256), -1, np.int32),
        splits=np.full(len(sha256), UNLABELLED, np.int8),
        groups=None,
        widths=column("widths"),
        heights=column("heights"),
        sizes=column("sizes"),
        mtimes_ns=column("mtimes_ns"),
    )


def _copy_rows(store: FeatureStore, name: str, rows: np.ndarray, lines: np.ndarray, out: np.ndarray) -> None:
    """``out[lines] = `` view 0 of these rows, flattened where ``out`` is; a few MiB of the store at a time."""
    step = max(1, COPY_BYTES // (4 * int(np.prod(store.shape(name)[2:]))))
    order = np.argsort(rows, kind="stable")
    for some in np.split(order, np.flatnonzero(np.diff(rows[order] // step)) + 1) if len(order) else ():
        start = int(rows[some[0]])
        stored = store.read(name, start, int(rows[some[-1]]) + 1)
        out[lines[some]] = stored[rows[some] - start, 0].reshape(len(some), *out.shape[1:])
