"""Plan an extraction: find out what has to be computed, without writing anything.

    scan + old store + committed shards --make_plan()--> known rows, shard specs, counts

Rows are found by content hash and cell (``Recipe.cell``: fingerprint and view), so an image that was moved, renamed or
relabelled needs no inference, and additional views or layers are computed alone. An image that is as noted on this
machine (``features.extraction.notes``) is not read again; any other is hashed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from features.errors import ConfigurationError, FormatVersionError, IntegrityError, UnreadableImageError
from features.extraction.journal import PartsFolder
from features.extraction.notes import Notes
from features.extraction.options import ExtractionOptions
from features.extraction.shard import KILLS_WORKER, ShardSpec, rows_per_shard
from features.pixels.batches import loaded
from features.pixels.decode import decoder_version
from features.progress import Progress
from features.recipe import Cell, Recipe
from features.sources.remote import is_address
from features.sources.scan import ImageSet
from features.store.reader import FeatureStore

if TYPE_CHECKING:
    from features.networks.network import Network

logger = logging.getLogger(__name__)
Location = tuple[int, int]  # number of the store or shard in KnownRows.sources, row
Group = tuple[tuple[int, ...], tuple[int, ...]]  # what is missing of an image: indices of recipes, and views
VIEW_FIELDS = ("augmentation", "seed")  # fields that affect views 1 and above, but not view 0
HASHED_AHEAD = 64  # images read ahead
BASE_FIELDS_FREE = ("layer", "pooling", "dtype")  # the only fields in which feature sets of one store may differ


@dataclasses.dataclass(frozen=True)
class Identity:
    """What is known about an image without reading it again: its sha256 and size in pixels, or why it is unreadable."""

    sha256: bytes
    width: int = 0
    height: int = 0
    reason: str | None = None


def cells_of(recipes: Iterable[Recipe], views: Iterable[int]) -> frozenset[Cell]:
    """Return the cells of all given views of all given recipes."""
    return frozenset(recipe.cell(view) for recipe, view in itertools.product(recipes, views))


class KnownRows:
    """Rows that already exist in the old store and in committed shards, found by content hash."""

    def __init__(self) -> None:
        self.sources: list[FeatureStore] = []
        self._views: list[tuple[int, ...]] = []
        self._rows: dict[frozenset[Cell], dict[bytes, Location]] = {}
        self._by_content: dict[bytes, Identity] = {}
        self._by_path: dict[str, tuple[int, int, Identity]] = {}
        self._by_version: dict[str, tuple[int, str, Identity]] = {}
        self._fresh: dict[str, Identity] = {}
        self.sizes: set[int] = set()

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
        same_place = store.provenance.get("root") == root
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
            identity = self._by_content.get(sha256)
            if identity is None or identity.reason is not None:
                identity = self._by_content[sha256] = Identity(sha256, int(width), int(height))
            if same_place:
                self._by_path[path] = (int(size), int(mtime), identity)
            if fresh:
                self._fresh[path] = identity
        for path, size, version, sha256 in zip(images.paths, images.sizes, images.versions or (), hashes, strict=False):
            if version and (same_place or is_address(path)):
                self._by_version[path] = (int(size), version, self._by_content[sha256])
        refused = (quarantine.paths, quarantine.sha256, quarantine.sizes, quarantine.mtimes_ns, quarantine.reasons)
        for path, digest, size, mtime, reason in zip(*refused, strict=True):
            identity = Identity(digest.tobytes(), reason=reason)
            if fresh:
                self._fresh[path] = identity
            if reason == KILLS_WORKER:
                self.sizes.add(int(size))
            if digest.any():
                self._by_content.setdefault(identity.sha256, identity)
                if same_place:
                    self._by_path[path] = (int(size), int(mtime), identity)

    def path_known(self, path: str) -> bool:
        """Whether an image with this path has been seen before, with any content."""
        return path in self._by_path

    def fresh(self, path: str) -> Identity | None:
        """Return the identity of the image with this path if it was read for a shard of this run."""
        return self._fresh.get(path)

    def content_at(self, path: str) -> bytes | None:
        """Return the sha256 of the content last seen under this path; None if the path is unknown."""
        return self._by_path[path][2].sha256 if path in self._by_path else None

    def at_time(self, path: str, size: int, mtime_ns: int) -> Identity | None:
        """Return the identity of the image that had this path, size and modification time; None if there was none."""
        known = self._by_path.get(path)
        return known[2] if known is not None and known[:2] == (size, mtime_ns) else None

    def at_version(self, path: str, size: int, version: str) -> Identity | None:
        """Return the identity of the object that had this address, size and version; None if there was none."""
        known = self._by_version.get(path)
        return known[2] if known is not None and version and known[:2] == (size, version) else None

    def of_content(self, sha256: bytes | None) -> Identity | None:
        """Return the identity of content seen before under any path; None if it is new."""
        return None if sha256 is None else self._by_content.get(sha256)

    def locate(self, cell: Cell, sha256: bytes) -> Location | None:
        """Find the source and row that contain a cell of an image; None if there are none."""
        for cells, rows in self._rows.items():
            if cell in cells and sha256 in rows:
                return rows[sha256]
        return None

    def view_position(self, source: int, view: int) -> int:
        """Return the index of a view on the view axis of a source."""
        return self._views[source].index(view)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an extraction is going to do.

    Parameters
    ----------
    images : ImageSet
        The scanned source.
    recipes : tuple of Recipe
        Recipes of all feature sets of the finished store: the requested ones and those that it already has.
    views : int
        Number of views of every feature set.
    specs : tuple of ShardSpec
        The shards to make.
    known : KnownRows
        The rows that exist already.
    identities : list of Identity or None
        One per image; None if the image has to be read.
    counts : Counter
        Number of images that are ``cached moved new changed removed unreadable``, and of those that were ``hashed``
        because nothing is noted about them, or something else.
    notes : Notes
        What was noted about the files before.
    old : FeatureStore or None
        The existing store; None if there is none or it is replaced.
    layout : {"packed", "sharded"}
        Whether the finished store is one file, or an index of shards.
    superseded : tuple of str
        Names of shards with another recipe, which are deleted when the store is replaced.
    """

    images: ImageSet
    recipes: tuple[Recipe, ...]
    views: int
    specs: tuple[ShardSpec, ...]
    known: KnownRows
    identities: list[Identity | None]
    counts: Counter[str]
    old: FeatureStore | None
    notes: Notes
    layout: str = "packed"
    superseded: tuple[str, ...] = ()

    @property
    def to_infer(self) -> int:
        """Number of images that go through the network; some of them may turn out to be unreadable."""
        return len({path for spec in self.specs for path in spec.paths})

    @property
    def passes(self) -> int:
        """Number of views that go through the network."""
        return sum(len(spec) * len(spec.views) for spec in self.specs)


def make_plan(
    images: ImageSet,
    network: Network,
    out: Path,
    parts: PartsFolder,
    options: ExtractionOptions,
    readers: Executor,
    progress: Progress | None = None,
) -> Plan:
    """Compare a source with the features that already exist.

    Parameters
    ----------
    images : ImageSet
        The scanned source.
    network : Network
        The network; its ``recipes`` and ``row_bytes`` are used.
    out : Path
        The store, which may exist already.
    parts : PartsFolder
        The committed shards of an interrupted run or of a sharded store.
    options : ExtractionOptions
        The options. A store that has more views than requested keeps them, with their augmentation.
    readers : Executor
        Threads that hash files whose size has been seen before.
    progress : callable, optional
        Called with ``(stage, done, total)``.

    Raises
    ------
    ConfigurationError
        If, without ``overwrite``, ``out`` or its shards have another recipe, or most images of ``out`` are missing from
        the source; or if a packed store is to become a sharded one.
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
        of_this_store = record.kept or overwrite  # or belongs to an earlier state of it
        if found <= cells or (of_this_store and found & cells):
            known.add(shard, record.views, root=root)
        elif of_this_store:
            superseded.append(record.identity)
        else:
            raise ConfigurationError(
                f"{parts.path}: holds {len(shard)} images of an interrupted extraction with another recipe or more views. "
                "Run that command again to finish it, choose another --out, or add --overwrite to drop them."
            )

    notes = Notes.read(out, root)
    identities, hashed = _identities(images, known, notes, readers, options, progress)
    groups, counts = _missing(images, wanted, views, known, identities)
    counts["hashed"] = hashed
    taken = {*parts.records, *(() if old is None else old.shards.names)}
    specs = []
    for (numbers, views_of_group), rows in groups.items():
        recipes = tuple(wanted[number] for number in numbers)
        step = options.shard_rows or rows_per_shard(network.row_bytes * len(views_of_group), options.batch_size)
        for start in range(0, len(rows), step):
            specs.append(_spec(images, rows[start : start + step], recipes, views_of_group).untaken(taken))
    if old is not None:
        counts["removed"] = _removed(old, images, identities)
        if not overwrite:
            _refuse_losses(old, images, identities, out)
    return Plan(images, wanted, views, tuple(specs), known, identities, counts, old, notes, layout, tuple(superseded))


def _old_store(out: Path, *, overwrite: bool) -> FeatureStore | None:
    """Open the existing store; None if there is none. A damaged one is an error, or None with ``overwrite``."""
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
        logger.warning("%s; the store is replaced", error)
        return None


def _layout(wanted: str | None, old: FeatureStore | None, parts: PartsFolder, out: Path) -> str:
    """Return the requested layout, else that of the store; kept shards mean sharded, even if the index is lost."""
    if old is not None and old.kind == "store" and wanted == "sharded":
        raise ConfigurationError(
            f"{out}: is one packed file, which cannot become a sharded store. Choose another --out, or omit --layout."
        )
    is_sharded = any(record.kept for record in parts.records.values()) if old is None else old.kind == "index"
    return wanted or ("sharded" if is_sharded else "packed")


def _with_what_is_there(
    old: FeatureStore, wanted: Sequence[Recipe], views: int, out: Path
) -> tuple[tuple[Recipe, ...], int]:
    """Return the recipes and the number of views of the finished store: the requested ones and those it already has.

    All of them get the same augmentation and seed.
    """
    names = {recipe.name for recipe in wanted}
    recipes = (*wanted, *(recipe for name, recipe in sorted(old.recipes.items()) if name not in names))
    before = max(old.views(name) for name in old.names)
    drawn = next((item for item in (*wanted, *old.recipes.values()) if item.augmentation is not None), None)
    if drawn is not None:  # _same_base has checked that it is the same for all
        recipes = tuple(item.augmented(drawn.augmentation, drawn.seed) for item in recipes)
    if before > views:
        logger.info("%s: keeps its %d views, although %d are requested", out, before, views)
    return recipes, max(views, before)


def _same_base(old: FeatureStore, wanted: Sequence[Recipe], out: Path, *, overwrite: bool) -> bool:
    """Whether rows of the old store can be used, as its recipes differ from ``wanted`` in ``BASE_FIELDS_FREE`` only.

    Augmentation and seed are compared only if both sides have augmented views. False means that the store is replaced,
    as ``overwrite`` allows.

    Raises
    ------
    ConfigurationError
        If other fields differ, without ``overwrite``.
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
            f"{out}: holds views with another augmentation ({listed}). Omit --views and --augment to keep them, choose "
            "another --out, or add --overwrite to replace the store."
        )
    raise ConfigurationError(
        f"{out}: holds features of another recipe ({listed}). No row of it can be reused. "
        "Choose another --out, or add --overwrite to replace the store."
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _identities(
    images: ImageSet,
    known: KnownRows,
    notes: Notes,
    readers: Executor,
    options: ExtractionOptions,
    progress: Progress | None,
) -> tuple[list[Identity | None], int]:
    """Return the identity of each image as far as it is known, and how many images were read to find it out."""
    identities: list[Identity | None] = [None] * len(images)
    sizes = images.sizes.tolist()
    if options.trust == "notes":
        identities = [known.of_content(sha256) for sha256 in notes.hashes(images.paths, images.stamps)]
        if notes.decoder != decoder_version():  # which may decode what another one could not
            identities = [item if item is None or item.reason in (None, KILLS_WORKER) else None for item in identities]
    elif options.trust == "times":
        columns = zip(images.paths, sizes, images.mtimes_ns.tolist(), strict=True)
        identities = [known.at_time(*column) for column in columns]
    if options.trust != "nothing" and images.versions is not None:  # stores say it, whatever is noted on this machine
        columns = zip(images.paths, sizes, images.versions, strict=True)
        pairs = zip(identities, columns, strict=True)
        identities = [known.at_version(*column) if item is None else item for item, column in pairs]
    # The same content has the same size, so only a file of a known size can have known content.
    unknown = [index for index, identity in enumerate(identities) if identity is None and sizes[index] in known.sizes]
    reasons = {None} if options.rehash else {None, KILLS_WORKER}
    # Few are read ahead, so that Ctrl-C does not wait for all of them.
    hashes = loaded(readers, lambda index: hashlib.sha256(images.read(index)).digest(), unknown, HASHED_AHEAD)
    for done, (index, sha256) in enumerate(hashes, 1):
        # What cannot be read is read again for a shard, which records the reason. What could not be decoded before is
        # tried again, because later releases decode more, unless it would end process after process.
        found = None if isinstance(sha256, UnreadableImageError) else known.of_content(sha256)
        if found is not None and found.reason in reasons:
            identities[index] = found
        if progress:
            progress("hash", done, len(unknown))
    return identities, len(unknown)


def _refuse_losses(
    old: FeatureStore,
    images: ImageSet,
    identities: Sequence[Identity | None],
    out: Path,
) -> None:
    """Raise ``ConfigurationError`` if features would be lost that were hardly meant to be."""
    if left_out := _removed(old, images, identities, of=images.left_out):
        raise ConfigurationError(
            f"{out}: holds {left_out} images that --limit {len(images)} leaves out, and would lose their features. Choose "
            "another --out, or omit --limit."
        )
    before = {digest.tobytes() for digest in old.images.sha256}
    kept = sum(identity is not None and identity.sha256 in before for identity in identities)
    if 2 * kept < len(old):
        raise ConfigurationError(
            f"{out}: holds {len(old)} images of {old.source}, but only {kept} of them are in {images.description}"
            f"{f', of which --limit takes {len(images)} images' if images.left_out else ''}. "
            "If images are missing by mistake, restore them; else choose another --out or add --overwrite."
        )


def _removed(
    old: FeatureStore, images: ImageSet, identities: Sequence[Identity | None], of: frozenset[str] | None = None
) -> int:
    """Count the rows of the old store, or those of some paths, whose file is gone and whose content has no new path."""
    before, now = set(old.images.paths), set(images.paths)
    gone = Counter(
        digest.tobytes()
        for path, digest in zip(old.images.paths, old.images.sha256, strict=True)
        if path not in now and (of is None or path in of)
    )
    arrived = Counter(
        identity.sha256
        for path, identity in zip(images.paths, identities, strict=True)
        if identity is not None and path not in before
    )
    return (gone - arrived).total()


def _missing(
    images: ImageSet,
    recipes: Sequence[Recipe],
    views: int,
    known: KnownRows,
    identities: Sequence[Identity | None],
) -> tuple[dict[Group, list[int]], Counter[str]]:
    """Group the images by their missing cells, in row order; each group is made together. Also count the images.

    An image is in one group for each set of recipes that lacks some of its views, so no existing cell is made again.
    """
    counts: Counter[str] = Counter(cached=0, moved=0, new=0, changed=0, removed=0, unreadable=0, hashed=0)
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
        counts["cached" if known.content_at(images.paths[index]) == identity.sha256 else "moved"] += 1
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
