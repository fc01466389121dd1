"""Decide what has to be computed; write nothing.

    scan + old store + committed shards --make_plan()--> known rows, shard specs, counts

Rows are found by content hash and cell (``Recipe.cell``: fingerprint and view), so a moved, renamed or relabelled
image costs no inference, and more views or layers cost only theirs. An image whose path, size and modification time are unchanged is not read again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from features.errors import ConfigurationError, FormatVersionError, IntegrityError, UnreadableImageError
from features.extraction.journal import PartsFolder
from features.extraction.options import ExtractionOptions
from features.extraction.shard import ShardSpec, rows_per_shard
from features.recipe import Cell, Recipe
from features.sources.scan import ImageSet
from features.store.reader import FeatureStore

if TYPE_CHECKING:
    from features.networks.network import Network

logger = logging.getLogger(__name__)
Location = tuple[int, int]  # source, row
Group = tuple[tuple[int, ...], tuple[int, ...]]  # what is missing of an image: numbers of recipes, and views
VIEW_FIELDS = ("augmentation", "seed")  # what decides views 1 and above, and not view 0
BASE_FIELDS_FREE = ("layer", "pooling", "dtype")  # data sets of one store may differ in these only


@dataclasses.dataclass(frozen=True)
class Identity:
    """What is known of one image without reading it again: its hash and size in pixels, or why it was refused."""

    sha256: bytes
    width: int = 0
    height: int = 0
    reason: str | None = None


def cells_of(recipes: Iterable[Recipe], views: Iterable[int]) -> frozenset[Cell]:
    """All views of all data sets."""
    return frozenset(recipe.cell(view) for recipe, view in itertools.product(recipes, views))


class KnownRows:
    """Rows that exist already, in the old store and in committed shards, found by content hash."""

    def __init__(self) -> None:
        self.sources: list[FeatureStore] = []
        self._views: list[tuple[int, ...]] = []
        self._rows: dict[frozenset[Cell], dict[bytes, Location]] = {}
        self._by_path: dict[str, tuple[int, int, Identity]] = {}
        self._fresh: set[str] = set()
        self.sizes: set[int] = set()

    def add(self, store: FeatureStore, views: Sequence[int], *, root: str, fresh: bool = False) -> None:
        """Make the rows of a store or shard known.

        Parameters
        ----------
        store : FeatureStore
            Store or shard.
        views : sequence of int
            The views that its view axis holds.
        root : str
            Where the source lies now. Size and time speak for a file only in the folder where they were noted.
        fresh : bool
            Made in this very run: a file of which no byte could be read is then settled, else it is tried again, as
            permission, disk or network may have been mended.
        """
        same_place = store.provenance.get("root") == root
        if fresh:
            self._fresh.update(store.images.paths, store.quarantine.paths)
        source = len(self.sources)
        self.sources.append(store)
        self._views.append(tuple(views))
        rows = self._rows.setdefault(cells_of(store.recipes.values(), views), {})
        images, quarantine = store.images, store.quarantine
        hashes = [digest.tobytes() for digest in images.sha256]
        columns = (images.paths, hashes, images.sizes, images.mtimes_ns, images.widths, images.heights)
        present = store.present()
        for row, (path, sha256, size, mtime, width, height) in enumerate(zip(*columns, strict=True)):
            if present[row]:
                rows[sha256] = (source, row)
            self.sizes.add(int(size))
            if same_place:
                self._by_path[path] = (int(size), int(mtime), Identity(sha256, int(width), int(height)))
        refused = (quarantine.paths, quarantine.sha256, quarantine.sizes, quarantine.mtimes_ns, quarantine.reasons)
        for path, digest, size, mtime, reason in zip(*refused, strict=True):
            if not same_place or not (fresh or digest.any()):
                continue
            self._by_path[path] = (int(size), int(mtime), Identity(digest.tobytes(), reason=reason))

    def path_known(self, path: str) -> bool:
        """Whether an image of that path has been seen before, whatever its content."""
        return path in self._by_path

    def is_fresh(self, path: str) -> bool:
        """Whether an image was read in this very run."""
        return path in self._fresh

    def content_at(self, path: str) -> bytes | None:
        """Hash of what was last seen under that path."""
        return self._by_path[path][2].sha256 if path in self._by_path else None

    def identity(self, path: str, size: int, mtime_ns: int) -> Identity | None:
        """Identity of an image whose path, size and time are as they were; None if it has to be read."""
        known = self._by_path.get(path)
        return known[2] if known is not None and known[:2] == (size, mtime_ns) else None

    def identity_of_content(self, sha256: bytes) -> Identity | None:
        """Identity of readable content seen before under any path."""
        for rows in self._rows.values():
            if sha256 in rows:
                source, row = rows[sha256]
                images = self.sources[source].images
                return Identity(sha256, int(images.widths[row]), int(images.heights[row]))
        return None

    def locate(self, cell: Cell, sha256: bytes) -> Location | None:
        """Source and row that hold a cell."""
        for cells, rows in self._rows.items():
            if cell in cells and sha256 in rows:
                return rows[sha256]
        return None

    def view_position(self, source: int, view: int) -> int:
        """Where a view lies on the view axis of a source."""
        return self._views[source].index(view)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an extraction would do.

    Parameters
    ----------
    images : ImageSet
        The source as scanned.
    recipes : tuple of Recipe
        Data sets of the finished store: those asked for and those that it had.
    views : int
        Views of every data set.
    specs : tuple of ShardSpec
        Shards to make.
    known : KnownRows
        Rows that exist.
    identities : list of Identity or None
        One per image; None where it has to be read.
    counts : Counter
        ``cached moved new changed removed unreadable``, in images.
    old : FeatureStore or None
        The store as it is.
    layout : {"packed", "sharded"}
        Whether the finished store is one file, or an index of shards.
    superseded : tuple of str
        Shards of another recipe, which go when the store is replaced.
    """

    images: ImageSet
    recipes: tuple[Recipe, ...]
    views: int
    specs: tuple[ShardSpec, ...]
    known: KnownRows
    identities: list[Identity | None]
    counts: Counter[str]
    old: FeatureStore | None
    layout: str = "packed"
    superseded: tuple[str, ...] = ()

    @property
    def to_infer(self) -> int:
        """Images of which something goes through the network (those to be read may yet prove unreadable)."""
        return len({path for spec in self.specs for path in spec.paths})

    @property
    def passes(self) -> int:
        """Views of images that go through the network."""
        return sum(len(spec) * len(spec.views) for spec in self.specs)


def make_plan(
    images: ImageSet,
    network: Network,
    out: Path,
    parts: PartsFolder,
    options: ExtractionOptions,
    readers: Executor,
) -> Plan:
    """Compare a source with what is already computed.

    Parameters
    ----------
    images : ImageSet
        The source.
    network : Network
        Its ``recipes`` and ``row_bytes`` are read.
    out : Path
        The store, which may exist.
    parts : PartsFolder
        Committed shards of an interrupted run.
    options : ExtractionOptions
        What is asked for. A store keeps the views that it has beyond those, and what they are drawn from.
    readers : Executor
        Threads that hash files whose size has been seen before.

    Raises
    ------
    ConfigurationError
        If ``out`` or its shards hold another recipe, or most of its images are missing, without ``overwrite``; if a
        packed store is to become a sharded one.
    """
    overwrite, views = options.overwrite, options.views
    old = _old_store(out, overwrite=overwrite)
    layout = _layout(options.layout, old, parts, out)
    wanted = tuple(recipe.augmented(options.augmentation, options.seed) for recipe in network.recipes)
    if old is not None and not _same_base(old, wanted, out, overwrite=overwrite):
        old = None
    if old is not None:
        wanted, views = _with_what_is_there(old, wanted, views, out)

    known, root = KnownRows(), str(images.root)
    if old is not None:
        known.add(old, range(min(old.views(name) for name in old.names)), root=root)
    cells = cells_of(wanted, range(views))
    superseded = []
    for record, shard in parts.shards(known=() if old is None else old.shards.names):
        found = cells_of(shard.recipes.values(), record.views)
        of_this_store = record.kept or overwrite  # or of an earlier state of it
        if found <= cells or (of_this_store and found & cells):
            known.add(shard, record.views, root=root)
        elif of_this_store:
            superseded.append(record.identity)
        else:
            raise ConfigurationError(
                f"{parts.path}: holds {len(shard)} images of an interrupted extraction with another recipe or more views. "
                "Run that command again to finish it, give another --out, or --overwrite to drop them."
            )

    identities, moved = _identities(images, known, readers, rehash=options.rehash)
    groups, counts = _missing(images, wanted, views, known, identities, moved)
    taken = {*parts.records, *(() if old is None else old.shards.names)}
    specs = []
    for (numbers, views_of_group), rows in groups.items():
        recipes = tuple(wanted[number] for number in numbers)
        step = options.shard_rows or rows_per_shard(network.row_bytes * len(views_of_group), options.batch_size)
        for start in range(0, len(rows), step):
            specs.append(_spec(images, rows[start : start + step], recipes, views_of_group).untaken(taken))
    if old is not None:
        counts["removed"] = len(set(old.images.paths) - set(images.paths))
        before = {digest.tobytes() for digest in old.images.sha256}
        kept = sum(identity is not None and identity.sha256 in before for identity in identities)
        if not overwrite and 2 * kept < len(old):
            raise ConfigurationError(
                f"{out}: holds {len(old)} images of {old.source}, and only {kept} of them are in {images.description}. "
                "If images are missing for a while, bring them back; else give another --out, or --overwrite to go on."
            )
    return Plan(images, wanted, views, tuple(specs), known, identities, counts, old, layout, tuple(superseded))


def _old_store(out: Path, *, overwrite: bool) -> FeatureStore | None:
    """The store as it is. One that is damaged is an error, or, to be overwritten, as good as none."""
    if not out.exists():
        return None
    try:
        store = FeatureStore.open(out)
        if overwrite and store.kind == "index":
            store.set_damaged_shards_aside()
        elif overwrite:
            store.verify()
        return store
    except (IntegrityError, FormatVersionError) as error:
        if not overwrite or out.is_dir():
            raise
        logger.warning("%s; it is replaced", error)
        return None


def _layout(wanted: str | None, old: FeatureStore | None, parts: PartsFolder, out: Path) -> str:
    """As asked for, or as the store is; shards that were kept belong to a sharded one, even where its index is gone."""
    if old is not None and old.kind == "store" and wanted == "sharded":
        raise ConfigurationError(
            f"{out}: is one packed file, which cannot become a sharded store. Give another --out, or leave --layout out."
        )
    is_sharded = any(record.kept for record in parts.records.values()) if old is None else old.kind == "index"
    return wanted or ("sharded" if is_sharded else "packed")


def _with_what_is_there(
    old: FeatureStore, wanted: Sequence[Recipe], views: int, out: Path
) -> tuple[tuple[Recipe, ...], int]:
    """Data sets and views of the finished store: those asked for and those it has, all drawn from one specification."""
    names = {recipe.name for recipe in wanted}
    recipes = (*wanted, *(recipe for name, recipe in sorted(old.recipes.items()) if name not in names))
    before = max(old.views(name) for name in old.names)
    drawn = next((item for item in (*wanted, *old.recipes.values()) if item.augmentation is not None), None)
    if drawn is not None:  # the same for all that have one, as was checked
        recipes = tuple(item.augmented(drawn.augmentation, drawn.seed) for item in recipes)
    if before > views:
        logger.info("%s: keeps its %d views, though %d are asked for", out, before, views)
    return recipes, max(views, before)


def _same_base(old: FeatureStore, wanted: Sequence[Recipe], out: Path, *, overwrite: bool) -> bool:
    """Whether the old store was made as the new one would be, but for layers and views. Else refuse, or replace it.

    What views are drawn from is compared only where both sides have views.
    """
    differences: dict[str, tuple[object, object]] = {}
    for recipe in wanted:
        for name, before in old.recipes.items():
            if before.augmentation is None or recipe.augmentation is None:
                fields = before.plain.difference(recipe.plain)
            else:
                fields = before.difference(recipe)
            if name != recipe.name:
                fields = {field: pair for field, pair in fields.items() if field not in BASE_FIELDS_FREE}
            differences |= fields
    if not differences:
        return True
    if overwrite:
        return False
    listed = "; ".join(
        f"{field}: {_short(before)} -> {_short(now)}" for field, (before, now) in sorted(differences.items())
    )
    if all(field.partition(".")[0] in VIEW_FIELDS for field in differences):
        raise ConfigurationError(
            f"{out}: holds views drawn in another way ({listed}). Leave --views and --augment out to keep them, give "
            "another --out, or --overwrite to replace the store."
        )
    raise ConfigurationError(
        f"{out}: holds features of another recipe ({listed}). No row of it can be used. "
        "Give another --out, or --overwrite to replace it."
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _identities(
    images: ImageSet, known: KnownRows, readers: Executor, *, rehash: bool
) -> tuple[list[Identity | None], set[int]]:
    """Identity of each image without inference, and which of them were found by content only."""
    columns = zip(images.paths, images.sizes.tolist(), images.mtimes_ns.tolist(), strict=True)
    by_path: list[Identity | None] = [known.identity(*column) for column in columns]
    identities: list[Identity | None] = [None if rehash else identity for identity in by_path]
    # The same content has the same size: a file of a size never seen cannot be one that was moved.
    sizes = images.sizes.tolist()
    suspects = [i for i, identity in enumerate(identities) if identity is None and sizes[i] in known.sizes]
    moved = set()
    for index, digest in zip(suspects, readers.map(_hasher(images), suspects), strict=True):
        found = known.identity_of_content(digest) if digest is not None else None
        if found is not None:
            identities[index] = found
            if known.content_at(images.paths[index]) != digest:
                moved.add(index)
    return identities, moved


def _hasher(images: ImageSet) -> Callable[[int], bytes | None]:
    def content_hash(index: int) -> bytes | None:
        try:
            return hashlib.sha256(images.read(index)).digest()
        except UnreadableImageError:
            return None  # it is read again in a shard, where the refusal is recorded

    return content_hash


def _missing(
    images: ImageSet,
    recipes: Sequence[Recipe],
    views: int,
    known: KnownRows,
    identities: Sequence[Identity | None],
    moved: Iterable[int],
) -> tuple[dict[Group, list[int]], Counter[str]]:
    """Images with the same missing cells, in row order: they go into shards together.

    Views of which the same data sets are missing are made together; so no cell is made that is there.
    """
    counts: Counter[str] = Counter(cached=0, moved=0, new=0, changed=0, removed=0, unreadable=0)
    moved = set(moved)
    cells = [[recipe.cell(view) for recipe in recipes] for view in range(views)]
    everything = (tuple(range(len(recipes))), tuple(range(views)))
    groups: dict[Group, list[int]] = {}
    for index, identity in enumerate(identities):
        if identity is None:
            counts["changed" if known.path_known(images.paths[index]) else "new"] += 1
            groups.setdefault(everything, []).append(index)
            continue
        if identity.reason is not None:
            counts["unreadable"] += 1
            continue
        counts["moved" if index in moved else "cached"] += 1
        lacking: dict[tuple[int, ...], list[int]] = {}  # recipes -> views
        for view in range(views):
            numbers = tuple(n for n, cell in enumerate(cells[view]) if known.locate(cell, identity.sha256) is None)
            if numbers:
                lacking.setdefault(numbers, []).append(view)
        for numbers, missing_views in lacking.items():
            groups.setdefault((numbers, tuple(missing_views)), []).append(index)
    return groups, counts


def _spec(images: ImageSet, rows: Sequence[int], recipes: tuple[Recipe, ...], views: tuple[int, ...]) -> ShardSpec:
    part = np.array(rows)
    return ShardSpec(
        root=str(images.root),
        paths=tuple(images.paths[index] for index in rows),
        sizes=tuple(images.sizes[part].tolist()),
        mtimes_ns=tuple(images.mtimes_ns[part].tolist()),
        recipes=recipes,
        views=views,
    )
