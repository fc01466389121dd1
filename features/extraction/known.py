"""What is known of images and rows before and while an extraction runs: stores and shards, as columns in files.

    stores, shards --KnownRows.add()--> entries --by path, version, content, cell--> number of an entry

An entry is one row of a store or shard, or one image of its quarantine. Entries take some 100 bytes each in a file without
a name, and what finds them as much again, so the memory of the process does not grow with them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from features.extraction.shard import KILLS_WORKER
from features.recipe import Cell, Recipe
from features.scratch import Growing, scratch, taken
from features.sources.remote import is_address
from features.store.reader import FeatureStore
from features.texts import KEY_BYTES, Lookup, keys_of

_STEP = 1 << 14  # entries that are made or compared at a time
_ENTRY = np.dtype([
    ("sha256", "u1", 32), ("path", "u1", KEY_BYTES), ("version", "u1", KEY_BYTES), ("size", "<i8"), ("mtime_ns", "<i8"),
    ("width", "<i4"), ("height", "<i4"), ("source", "<i4"), ("row", "<i4"), ("reason", "<i2"), ("here", "?"), ("fresh", "?"),
])  # fmt: skip


def cells_of(recipes: Iterable[Recipe], views: Iterable[int]) -> frozenset[Cell]:
    """Return the cells of all given views of all given recipes."""
    return frozenset(recipe.cell(view) for recipe, view in itertools.product(recipes, views))


@dataclasses.dataclass(frozen=True)
class Identities:
    """What images are, without reading them again.

    Parameters
    ----------
    sha256 : uint8, (n, 32)
    widths, heights : int32, (n,)
        In pixels; 0 for unreadable images.
    reasons : int16, (n,)
        Index into ``words``, -1 for readable images.
    words : tuple of str
        Why images are unreadable.
    """

    sha256: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    reasons: np.ndarray
    words: tuple[str, ...]

    def some(self, rows: np.ndarray) -> Identities:
        """Return those of some rows, int64 (k,)."""
        sha256, widths, heights, reasons = (
            taken(column, rows) for column in (self.sha256, self.widths, self.heights, self.reasons)
        )
        return Identities(sha256, widths, heights, reasons, self.words)

    def reason(self, row: int) -> str | None:
        """Return why an image is unreadable; None if it is not."""
        code = int(self.reasons[row])
        return None if code < 0 else self.words[code]


class KnownRows:
    """Rows that already exist in the old store and in committed shards. Entries are numbered from 0; -1 is none."""

    def __init__(self) -> None:
        self.sources: list[FeatureStore] = []
        self._views: list[tuple[int, ...]] = []
        self._groups: dict[frozenset[Cell], list[int]] = {}  # cells -> numbers of the sources that hold them
        self._log = Growing(_ENTRY)
        self._words: list[str] = []
        self._found: dict[object, Lookup] = {}  # made when first needed after the last entry
        self._entries: np.ndarray | None = None

    def add(self, store: FeatureStore, views: Sequence[int], *, root: str, fresh: bool = False) -> None:
        """Add the rows of a store or shard.

        Parameters
        ----------
        store : FeatureStore
            The store or shard.
        views : sequence of int
            The views on its view axis, in order.
        root : str
            Root of the source now. A path means the same file only if the store was made from the same root.
        fresh : bool
            Whether the shard was made in this run. If not, files that could not be read at all are tried again, because
            the permission, disk or network may have been repaired.
        """
        here, source = store.provenance.get("root") == root, len(self.sources)
        self.sources.append(store)
        self._views.append(tuple(views))
        self._groups.setdefault(cells_of(store.recipes.values(), views), []).append(source)
        images, quarantine, present = store.images, store.quarantine, store.present()
        for start in range(0, len(images), _STEP):
            rows = np.arange(start, min(start + _STEP, len(images)))
            paths = images.paths[start : start + _STEP]
            part = self._new(
                paths, images.sha256[rows], images.sizes[rows], images.mtimes_ns[rows], source, fresh=fresh
            )
            part["width"], part["height"], part["reason"], part["here"] = (
                images.widths[rows],
                images.heights[rows],
                -1,
                here,
            )
            part["row"] = np.where(present[rows], rows, -1)
            if images.versions is not None:
                part["version"] = _version_keys(images.versions[start : start + _STEP])
                part["version"][[not here and not is_address(path) for path in paths]] = 0
            self._log.extend(part)
        columns = (quarantine.paths, quarantine.sha256, quarantine.sizes, quarantine.mtimes_ns)
        part = self._new(*columns, source, fresh=fresh)
        part["row"], part["reason"] = -1, [self._code(reason) for reason in quarantine.reasons]
        part["here"] = here & quarantine.sha256.any(axis=1)
        self._log.extend(part)
        self._found, self._entries = {}, None
        if store.kind == "shard":
            store.forget_tables()

    def __len__(self) -> int:
        return len(self._log)

    # -- entries by what is asked for
    def at_path(self, paths: np.ndarray) -> np.ndarray:
        """Return the last entry with each path in this source, int64, (n,); ``paths`` are keys, uint8, (n, 16)."""
        return self._lookup("path", "here", lambda all_: all_["here"]).last(paths)

    def fresh(self, paths: np.ndarray) -> np.ndarray:
        """Return the entry of each path that was read for a shard of this run, int64, (n,)."""
        return self._lookup("path", "fresh", lambda all_: all_["fresh"]).last(paths)

    def at_time(self, paths: np.ndarray, sizes: np.ndarray, mtimes_ns: np.ndarray) -> np.ndarray:
        """Return the entries of images that had these paths, sizes and modification times, int64, (n,)."""
        found = self.at_path(paths)
        return self._only(
            found, lambda part, rows: (part["size"] == sizes[rows]) & (part["mtime_ns"] == mtimes_ns[rows])
        )

    def at_version(self, paths: np.ndarray, sizes: np.ndarray, versions: Sequence[str]) -> np.ndarray:
        """Return the entries of objects that had these addresses, sizes and versions, int64, (n,)."""
        wanted = _version_keys(versions)
        found = self._lookup("path", "version", lambda all_: all_["version"].any(axis=1)).last(paths)
        found[~wanted.any(axis=1)] = -1

        def same(part: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return np.asarray((part["size"] == sizes[rows]) & (part["version"] == wanted[rows]).all(axis=1))

        return self._only(found, same)

    def of_content(self, sha256: np.ndarray) -> np.ndarray:
        """Return the first entry with each content under any path, int64, (n,), a readable one if there is one."""
        found = self._readable.first(sha256)
        lacking = np.flatnonzero(found < 0)
        if len(lacking):
            found[lacking] = self._refused.first(sha256[lacking])
        return found

    def of_one(self, sha256: bytes) -> int:
        """Return the first entry with one content, as ``of_content`` does."""
        found = self._readable.row(sha256)
        return found if found >= 0 else self._refused.row(sha256)

    def locate(self, cell: Cell, sha256: np.ndarray) -> np.ndarray:
        """Return the entry whose source holds a cell of each content, int64, (n,)."""
        found = scratch((len(sha256),), "<i8")
        found[:] = -1
        for cells, sources in self._groups.items():
            lacking = np.flatnonzero(found < 0)
            if cell in cells and len(lacking):
                held = self._lookup(
                    "sha256",
                    cells,
                    lambda all_, held_by=sources: (all_["row"] >= 0) & np.isin(all_["source"], held_by),  # type: ignore[misc]
                )
                found[lacking] = held.last(taken(sha256, lacking))
        return found

    def has_size(self, sizes: np.ndarray) -> np.ndarray:
        """Whether content of each size may be known, bool, (n,)."""
        if not len(self) or not len(sizes):
            return np.zeros(len(sizes), bool)
        kills = self._words.index(KILLS_WORKER) if KILLS_WORKER in self._words else -1
        reasons = self._all["reason"]
        known = np.unique(self._all["size"][(reasons < 0) | (reasons == kills)])
        places = np.minimum(np.searchsorted(known, sizes), len(known) - 1)
        return np.asarray(known[places] == sizes) if len(known) else np.zeros(len(sizes), bool)

    # -- what entries say
    def places(self, entries: np.ndarray) -> np.ndarray:
        """Return where the rows of entries are, int32, (n, 2): number of the source, row."""
        found = scratch((len(entries), 2), "<i4")
        for start in range(0, len(entries), _STEP):
            part = self._all[entries[start : start + _STEP]]
            found[start : start + len(part), 0], found[start : start + len(part), 1] = part["source"], part["row"]
        return found

    def sha256(self, entries: np.ndarray) -> np.ndarray:
        """Return the content hashes of entries, uint8, (n, 32)."""
        return taken(self._all["sha256"], entries)

    def identities(self, entries: np.ndarray) -> Identities:
        """Return what the images of entries are."""
        sha256, widths, heights, reasons = (
            taken(self._all[name], entries) for name in ("sha256", "width", "height", "reason")
        )
        return Identities(sha256, widths, heights, reasons, tuple(self._words))

    def is_refused(self, entries: np.ndarray, reason: str | None = None) -> np.ndarray:
        """Whether entries are unreadable images, for one reason or any; bool, (n,), False where the entry is -1."""
        if not self._words or (reason is not None and reason not in self._words):
            return np.zeros(len(entries), bool)
        code = None if reason is None else self._words.index(reason)
        reasons = self._all["reason"][np.maximum(entries, 0)]
        return np.asarray((entries >= 0) & ((reasons >= 0) if code is None else (reasons == code)))

    def same_content(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether pairs of entries have the same content, bool, (n,); False where one is -1."""
        same = np.asarray((first == second) & (first >= 0))
        others = np.flatnonzero(~same & (first >= 0) & (second >= 0))
        for start in range(0, len(others), _STEP):
            rows = others[start : start + _STEP]
            same[rows] = (self._all["sha256"][first[rows]] == self._all["sha256"][second[rows]]).all(axis=1)
        return same

    def in_first_source(self, entries: np.ndarray) -> int:
        """Count the entries whose content is a row of the first source, the old store."""
        entries = entries[entries >= 0]
        mine = (self._all["source"][entries] == 0) & (self._all["reason"][entries] < 0)
        others = entries[~mine]
        if not len(others):
            return int(mine.sum())
        held = self._lookup("sha256", 0, lambda all_: (all_["source"] == 0) & (all_["reason"] < 0))
        return int(mine.sum()) + int((held.first(self.sha256(others)) >= 0).sum())

    def view_position(self, source: int, view: int) -> int:
        """Return the index of a view on the view axis of a source."""
        return self._views[source].index(view)

    # -- inside
    @property
    def _all(self) -> np.ndarray:
        if self._entries is None:
            self._entries = self._log.array()
        return self._entries

    @property
    def _readable(self) -> Lookup:
        return self._lookup("sha256", "readable", lambda all_: all_["reason"] < 0)

    @property
    def _refused(self) -> Lookup:
        return self._lookup("sha256", "refused", lambda all_: (all_["reason"] >= 0) & all_["sha256"].any(axis=1))

    def _lookup(self, column: str, name: object, chosen: Callable[[np.ndarray], Any]) -> Lookup:
        if name not in self._found:
            self._found[name] = Lookup(self._all[column], np.flatnonzero(chosen(self._all)))
        return self._found[name]

    def _only(self, found: np.ndarray, same: Callable[[np.ndarray, np.ndarray], Any]) -> np.ndarray:
        """Set those entries to -1 that differ; ``same`` is told some entries and their rows."""
        there = np.flatnonzero(found >= 0)
        for start in range(0, len(there), _STEP):
            rows = there[start : start + _STEP]
            found[rows[~same(self._all[found[rows]], rows)]] = -1
        return found

    def _new(
        self,
        paths: Sequence[str],
        sha256: np.ndarray,
        sizes: np.ndarray,
        mtimes_ns: np.ndarray,
        source: int,
        *,
        fresh: bool,
    ) -> np.ndarray:
        part = np.zeros(len(paths), _ENTRY)
        part["path"], part["sha256"], part["size"] = keys_of(paths, len(paths)), sha256, sizes
        part["mtime_ns"], part["source"], part["fresh"] = mtimes_ns, source, fresh
        return part

    def _code(self, reason: str) -> int:
        if reason not in self._words:
            self._words.append(reason)
        return self._words.index(reason)


def _version_keys(versions: Sequence[str]) -> np.ndarray:
    """Return keys of versions, uint8, (n, 16); zeros where none is known."""
    keys = keys_of(versions, len(versions))
    keys[[not version for version in versions]] = 0
    return keys
