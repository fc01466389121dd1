"""Plan an extraction: find out what has to be computed, without writing anything.

    scan + old store + committed shards --make_plan()--> known rows, shard specs, counts

Rows are found by content hash and cell (``Recipe.cell``: fingerprint and view), so an image that was moved, renamed or
relabelled needs no inference, and additional views or layers are computed alone. An image that is as noted on this
machine (``features.extraction.notes``) is not read again; any other is hashed. What is known lies in `KnownRows`
(``features.extraction.known``); here an image is the number of an entry there, so that a million of them take no memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from features.errors import ConfigurationError, FormatVersionError, IntegrityError, UnreadableImageError
from features.extraction.journal import PartsFolder
from features.extraction.known import KnownRows, cells_of
from features.extraction.notes import Notes
from features.extraction.options import ExtractionOptions
from features.extraction.shard import KILLS_WORKER, ShardSpec, rows_per_shard
from features.pixels.batches import loaded
from features.pixels.decode import decoder_version
from features.progress import Progress, counted
from features.recipe import Recipe
from features.scratch import scratch, taken
from features.sources.imageset import ImageSet
from features.store.reader import FeatureStore
from features.texts import Lookup, keys_of

if TYPE_CHECKING:
    from features.networks.network import Network

logger = logging.getLogger(__name__)
Group = tuple[tuple[int, ...], tuple[int, ...]]  # what is missing of an image: indices of recipes, and views
VIEW_FIELDS = ("augmentation", "seed")  # fields that affect views 1 and above, but not view 0
HASHED_AHEAD = 64  # images read ahead
BASE_FIELDS_FREE = ("layer", "pooling", "dtype")  # the only fields in which feature sets of one store may differ


class Specs(Sequence[ShardSpec]):
    """The shards to make, each of which is built when it is asked for.

    Parameters
    ----------
    images : ImageSet
        The source.
    groups : sequence of (rows, recipes, views)
        Rows of images that lack the same, int64, ascending; what they lack.
    steps : sequence of int
        Most rows of a shard, for each group.
    taken : collection of str
        Names that no shard may have.
    """

    def __init__(
        self,
        images: ImageSet,
        groups: Sequence[tuple[np.ndarray, tuple[Recipe, ...], tuple[int, ...]]],
        steps: Sequence[int],
        taken: Collection[str],
    ) -> None:
        self._images, self._groups, self._taken = images, groups, taken
        numbered = enumerate(zip(groups, steps, strict=True))
        self._parts = [
            (number, start, start + step)
            for number, (group, step) in numbered
            for start in range(0, len(group[0]), step)
        ]
        self._built = functools.lru_cache(maxsize=8)(self._build)

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> ShardSpec: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardSpec]: ...
    def __getitem__(self, index: Any) -> Any:
        return [*map(self._built, self._parts[index])] if isinstance(index, slice) else self._built(self._parts[index])

    @property
    def images(self) -> int:
        """Number of images that are in at least one shard."""
        rows = [group[0] for group in self._groups]
        return len(rows[0]) if len(rows) == 1 else len(np.unique(np.concatenate([np.zeros(0, np.int64), *rows])))

    def _build(self, part: tuple[int, int, int]) -> ShardSpec:
        number, start, stop = part
        rows, recipes, views = self._groups[number]
        some, images = rows[start:stop], self._images
        spec = ShardSpec(
            root=str(images.root),
            paths=tuple(images.paths[row] for row in some.tolist()),
            sizes=tuple(images.sizes[some].tolist()),
            mtimes_ns=tuple(images.mtimes_ns[some].tolist()),
            recipes=recipes,
            views=views,
        )
        return spec.untaken(self._taken) if self._taken else spec


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
    specs : Specs
        The shards to make.
    known : KnownRows
        The rows that exist already.
    keys : uint8, (n, 16)
        Of the paths of the images; see ``features.texts.keys_of``.
    identities : int64, (n,)
        Entry of ``known`` that says what each image is; -1 if the image has to be read.
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
    specs: Specs
    known: KnownRows
    keys: np.ndarray
    identities: np.ndarray
    counts: Counter[str]
    old: FeatureStore | None
    notes: Notes
    layout: str = "packed"
    superseded: tuple[str, ...] = ()

    @property
    def to_infer(self) -> int:
        """Number of images that go through the network; some of them may turn out to be unreadable."""
        return self.specs.images

    @property
    def passes(self) -> int:
        """Number of views that go through the network."""
        return sum(len(spec) * len(spec.views) for spec in self.specs)

    def identities_now(self) -> np.ndarray:
        """Return the entry that says what each image is, from the shards made since or as planned: int64, (n,), or -1."""
        found = self.known.fresh(self.keys)
        np.copyto(found, self.identities, where=found < 0)
        return found


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

    notes, keys = Notes.read(out, root), keys_of(images.paths, len(images))
    identities, hashed = _identities(images, keys, known, notes, readers, options, progress)
    groups, counts = _missing(keys, wanted, views, known, identities)
    counts["hashed"] = hashed
    lacking = [(rows, tuple(wanted[number] for number in numbers), some) for (numbers, some), rows in groups.items()]
    steps = [
        options.shard_rows or rows_per_shard(network.row_bytes * len(some), options.batch_size)
        for _, _, some in lacking
    ]
    specs = Specs(images, lacking, steps, {*parts.records, *(() if old is None else old.shards.names)})
    if old is not None:
        counts["removed"] = _removed(old, images, keys, known, identities)
        if not overwrite:
            _refuse_losses(old, images, keys, known, identities, out)
    return Plan(images, wanted, views, specs, known, keys, identities, counts, old, notes, layout, tuple(superseded))


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
    keys: np.ndarray,
    known: KnownRows,
    notes: Notes,
    readers: Executor,
    options: ExtractionOptions,
    progress: Progress | None,
) -> tuple[np.ndarray, int]:
    """Return the entry of each image as far as it is known, int64, (n,), and how many images were read to find it out."""
    found = scratch((len(images),), "<i8")
    found[:] = -1
    if options.trust == "notes":
        noted = notes.rows(images.paths, images.stamps)
        there = np.flatnonzero(noted >= 0)
        found[there] = known.of_content(taken(notes.sha256, noted[there]))
        if notes.decoder != decoder_version():  # which may decode what another one could not
            found[known.is_refused(found) & ~known.is_refused(found, KILLS_WORKER)] = -1
    elif options.trust == "times":
        found = known.at_time(keys, images.sizes, images.mtimes_ns)
        if images.versions is not None:
            found[images.mtimes_ns == 0] = -1  # their server says no time that could be trusted
    if options.trust != "nothing" and images.versions is not None:  # stores say it, whatever is noted on this machine
        np.copyto(found, known.at_version(keys, images.sizes, images.versions), where=found < 0)
    # The same content has the same size, so only a file of a known size can have known content.
    unknown = np.flatnonzero(found < 0)
    unknown = unknown[known.has_size(images.sizes[unknown])]
    # Few are read ahead, so that Ctrl-C does not wait for all of them.
    hashes = loaded(readers, lambda index: hashlib.sha256(images.read(index)).digest(), map(int, unknown), HASHED_AHEAD)
    for done, (index, sha256) in enumerate(hashes, 1):
        # What cannot be read is read again for a shard, which records the reason. What could not be decoded before is
        # tried again, because later releases decode more, unless it would end process after process.
        if not isinstance(sha256, UnreadableImageError):
            entry = np.array([known.of_one(sha256)])
            again = known.is_refused(entry) & (options.rehash | ~known.is_refused(entry, KILLS_WORKER))
            found[index] = -1 if again else entry[0]
        if progress:
            progress("hash", done, len(unknown))
    return found, len(unknown)


def _refuse_losses(
    old: FeatureStore, images: ImageSet, keys: np.ndarray, known: KnownRows, identities: np.ndarray, out: Path
) -> None:
    """Raise ``ConfigurationError`` if features would be lost that were hardly meant to be."""
    if images.left_out and (left_out := _removed(old, images, keys, known, identities, of=images.left_out)):
        raise ConfigurationError(
            f"{out}: holds {left_out} images that --limit {len(images)} leaves out, and would lose their features. Choose "
            "another --out, or omit --limit."
        )
    kept = known.in_first_source(identities)
    if 2 * kept < len(old):
        raise ConfigurationError(
            f"{out}: holds {len(old)} images of {old.source}, but only {kept} of them are in {images.description}"
            f"{f', of which --limit takes {len(images)} images' if images.left_out else ''}. "
            "If images are missing by mistake, restore them; else choose another --out or add --overwrite."
        )
    if kept < len(old) and old.classes and not images.classes and images.target is None:
        raise ConfigurationError(
            f"{out}: holds {len(old)} images of {counted(len(old.classes), 'class')} of {old.source}; of {images.description}, which has "
            f"no classes, {kept} of them would stay, without labels. Give the folder that holds the class folders; else choose "
            "another --out or add --overwrite."
        )


def _removed(
    old: FeatureStore,
    images: ImageSet,
    keys: np.ndarray,
    known: KnownRows,
    identities: np.ndarray,
    of: frozenset[str] | None = None,
) -> int:
    """Count the rows of the old store, or those of some paths, whose file is gone and whose content has no new path."""
    paths = old.images.paths
    if paths == images.paths:
        return 0
    before = keys_of(paths, len(paths))
    lost = np.flatnonzero(Lookup(keys).first(before) < 0)
    if of is not None:
        lost = np.array([row for row in lost.tolist() if paths[row] in of], np.int64)
    if not len(lost):
        return 0
    arrived = np.flatnonzero((identities >= 0) & (Lookup(before).first(keys) < 0))
    gone = Counter(map(bytes, old.images.sha256[lost]))
    return (gone - Counter(map(bytes, known.sha256(identities[arrived])))).total()


def _missing(
    keys: np.ndarray, recipes: Sequence[Recipe], views: int, known: KnownRows, identities: np.ndarray
) -> tuple[dict[Group, np.ndarray], Counter[str]]:
    """Group the images by their missing cells, in row order; each group is made together. Also count the images.

    An image is in one group for each set of recipes that lacks some of its views, so no existing cell is made again.
    """
    before, unknown, refused = known.at_path(keys), identities < 0, known.is_refused(identities)
    readable = np.flatnonzero(~unknown & ~refused)
    same = known.same_content(before[readable], identities[readable])
    counts: Counter[str] = Counter(
        cached=int(same.sum()), moved=int((~same).sum()), new=int((unknown & (before < 0)).sum()),
        changed=int((unknown & (before >= 0)).sum()), removed=0, unreadable=int(refused.sum()), hashed=0,
    )  # fmt: skip
    lacks = np.zeros((len(readable), views, len(recipes)), bool)
    sha256 = known.sha256(identities[readable])
    for view, number in np.ndindex(views, len(recipes)):
        lacks[:, view, number] = known.locate(recipes[number].cell(view), sha256) < 0
    first: dict[Group, tuple[int, int]] = {}  # row and place where a group is first needed
    parts: dict[Group, list[np.ndarray]] = {}

    def add(group: Group, rows: np.ndarray, place: int = 0) -> None:
        first[group] = min(first.get(group, (len(keys), 0)), (int(rows[0]), place))
        parts.setdefault(group, []).append(rows)

    if unknown.any():
        add((tuple(range(len(recipes))), tuple(range(views))), np.flatnonzero(unknown))
    some = np.flatnonzero(lacks.any(axis=(1, 2)))
    cells = lacks[some].reshape(len(some), views * len(recipes))
    patterns, of_row = np.unique(cells, axis=0, return_inverse=True) if len(some) else (cells, np.zeros(0, np.int64))
    for number, pattern in enumerate(patterns.reshape(-1, views, len(recipes))):
        lacking: dict[tuple[int, ...], list[int]] = {}  # recipes -> views
        for view in range(views):
            if pattern[view].any():
                lacking.setdefault(tuple(np.flatnonzero(pattern[view]).tolist()), []).append(view)
        for place, (numbers, missing_views) in enumerate(lacking.items()):
            add((numbers, tuple(missing_views)), readable[some[of_row.reshape(-1) == number]], place)
    return {group: np.sort(np.concatenate(parts[group])) for group in sorted(parts, key=first.__getitem__)}, counts
