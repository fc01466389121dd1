"""Assemble the finished store from rows that already exist.

    image set + known rows --assemble()--> features.h5 with all rows, or an index of the shards that contain them
    index + shards --pack()--> features.h5 with all rows

Splits and labels are decided here, from the source and the content hashes. Rows are copied in blocks, so the memory
needed does not grow with the number of images.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import IntegrityError, SourceError
from features.extraction.known import Identities, KnownRows
from features.extraction.planning import Plan
from features.files import atomic_file, printable
from features.machine import software_versions
from features.progress import Progress, counted
from features.recipe import Recipe
from features.scratch import scratch, taken
from features.sources.advice import empty_splits
from features.sources.imageset import ImageSet
from features.sources.scan import united
from features.sources.splits import (
    SplitRule,
    assign_splits,
    find_conflicts,
    find_leakage,
    warnings_about,
    warnings_about_target,
)
from features.store.reader import FeatureStore
from features.store.schema import PLACE, FeatureSpec, ImageTable, Quarantine, ShardTable, digest_rows
from features.store.writer import StoreWriter
from features.targets import STRATUM
from features.texts import Texts

logger = logging.getLogger(__name__)
BLOCK_BYTES = 4 << 20
MAY_BE = ("reading", "limit", "license")  # entries of the provenance that not every store has
ENOUGH = 4  # images of a class from which stratified:0.6,0.2,0.2 gives some to each split
FEW_HINT = f". --split stratified:0.6,0.2,0.2 gives each split some of every {{}} that has {ENOUGH} images"
GROUPS_HINT = ". Whole groups were drawn by chance; --split stratified divides them so that each {} is in each split"


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything that a finished store contains apart from its features; the fields are named as in ``FeatureStore``.

    Parameters
    ----------
    images : ImageTable
        One row per readable image.
    quarantine : Quarantine
        The images that could not be read.
    classes : tuple of str
        Class names, in the order of the labels.
    source : str
        Description of the image source.
    split_rule : str
        How images without a given split were assigned to one.
    provenance : dict
        How the features were made: engine, batch size, network, weights, root of the source, and so on.
    """

    images: ImageTable
    quarantine: Quarantine
    classes: tuple[str, ...]
    source: str
    split_rule: str
    provenance: Mapping[str, Any]


def table_of(
    images: ImageSet, identities: Identities, rule: SplitRule, *, strict: bool = False
) -> tuple[ImageTable, Quarantine]:
    """Separate the images into readable rows and quarantine, and assign each row to a split.

    Raises
    ------
    SourceError
        If no image could be read; with ``strict``, if the same bytes are found in two splits.
    """
    if images.united:
        digests = zip(map(bytes, identities.sha256), identities.reasons.tolist(), strict=True)
        images, kept = united(images, [sha256 if reason < 0 else b"" for sha256, reason in digests])
        identities = identities.some(kept)
    good, bad = np.flatnonzero(identities.reasons < 0), np.flatnonzero(identities.reasons >= 0).tolist()
    if not len(good):
        first = f"{images.paths[bad[0]]}: {identities.reason(bad[0])}" if bad else "there are none"
        raise SourceError(f"{images.description}: none of {len(images)} images could be read ({first})")
    sha256 = taken(identities.sha256, good)
    groups = None if images.groups is None else tuple(images.groups[index] for index in good)
    strata = images.strata[good]
    splits, warnings = assign_splits(strata, images.given_splits[good], groups, sha256, rule)
    table = ImageTable(
        paths=Texts.of(images.paths).some(good),
        sha256=sha256,
        labels=images.labels[good],
        splits=splits,
        groups=groups,
        widths=taken(identities.widths, good),
        heights=taken(identities.heights, good),
        sizes=taken(images.sizes, good),
        mtimes_ns=taken(images.mtimes_ns, good),
        columns={name: tuple(values[index] for index in good) for name, values in images.columns.items()},
        target=None if images.target is None else images.target.some(good),
        versions=None if images.versions is None else _versions(images, good),
    )
    given = images.given_splits[good]
    hint = _hint(rule, given, grouped=groups is not None)
    enough = ENOUGH if hint == FEW_HINT else 0
    hint = hint.format("class" if table.target is None else STRATUM[table.target.task])
    if table.target is None:
        warnings += warnings_about(table.labels, table.splits, images.classes, hint, enough, whole=not images.left_out)
    else:
        warnings += warnings_about_target(table.target, table.splits, hint)
    empty = empty_splits(strata, table.splits, groups, sha256, str(rule), given)
    warnings += [f"no labelled image is in {split}: {advice}" for split, advice in empty.items() if split != "test"]
    for message in warnings:
        logger.warning("%s", message)
    values = table.labels if table.target is None else table.target.codes
    if conflicts := find_conflicts(sha256, values, splits, table.paths):
        logger.warning(
            "%s the same bytes as one of another label in the same split, so one label is wrong: %s"
            if table.target is not None
            else "%s the same bytes as one of another class in the same split, so one label is wrong: %s",
            counted(len(conflicts), "image", "has"), _equal(conflicts),
        )  # fmt: skip
    leaks = find_leakage(sha256, splits, table.paths)
    if leaks:
        pairs = _equal(leaks)
        message = f"leakage: {counted(len(leaks), 'image', 'is')} in two splits with the same bytes: {pairs}"
        if strict:
            raise SourceError(f"{message}. Remove one of each pair, or omit --strict; nothing was written.")
        logger.warning("%s", message)
    quarantine = Quarantine(
        paths=tuple(images.paths[index] for index in bad),
        sha256=identities.sha256[bad],
        reasons=tuple(str(identities.reason(index)) for index in bad),
        sizes=images.sizes[bad] if bad else np.zeros(0, np.int64),
        mtimes_ns=images.mtimes_ns[bad] if bad else np.zeros(0, np.int64),
    )
    return table, quarantine


def _hint(rule: SplitRule, given: np.ndarray, *, grouped: bool) -> str:
    """What gives each split images of each class; empty if no split rule does."""
    if grouped:
        return "" if rule.kind == "stratified" or (given >= 0).all() else GROUPS_HINT
    even = SplitRule("stratified", (0.6, 0.2, 0.2), rule.seed)
    return "" if rule == even or (given >= 0).any() else FEW_HINT


def _equal(pairs: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{printable(first)} = {printable(second)}" for first, second in pairs[:10])


def _versions(images: ImageSet, rows: np.ndarray) -> tuple[str, ...]:
    """Return the versions of some objects; that of one that was another version when it was read is not known."""
    assert images.versions is not None
    return tuple("" if images.paths[row] in images.replaced else images.versions[row] for row in rows)


def is_current(plan: Plan, contents: Contents, *, with_times: bool = False) -> bool:
    """Whether the existing store already has these contents, so that nothing needs to be written.

    Modification times do not count, unless the next run will trust them.
    """
    store = plan.old
    return (
        store is not None
        and (store.kind == "index") == (plan.layout == "sharded")
        and bool(store.present().all())
        and store.classes == contents.classes
        and all(store.provenance.get(name) == contents.provenance.get(name) for name in {*contents.provenance, *MAY_BE})
        and (store.source, store.split_rule) == (contents.source, contents.split_rule)
        and {item.fingerprint for item in store.recipes.values()} == {item.fingerprint for item in plan.recipes}
        and all(store.views(name) == plan.views for name in store.names)
        and _same(store.images, contents.images, with_times=with_times)
        and _same(store.quarantine, contents.quarantine, with_times=with_times)
    )


def assemble(out: Path, plan: Plan, contents: Contents, progress: Progress | None = None) -> None:
    """Write the store from the known rows of a plan; on an error, ``out`` stays as it was before.

    In the sharded layout, ``out`` becomes an index, which contains the place of every row in the shards.

    Raises
    ------
    StoreError
        If the store cannot be written.
    IntegrityError
        If a row that should be known is missing.
    """
    known, recipes, views, table = plan.known, plan.recipes, plan.views, contents.images
    places = {recipe.name: [_places(known, recipe, view, table) for view in range(views)] for recipe in recipes}
    specs = {}
    for recipe in recipes:
        source = int(places[recipe.name][0][0, 0])
        specs[recipe.name] = FeatureSpec(recipe, views, known.sources[source].shape(recipe.name)[2:])
    shards: ShardTable | None = None
    blocks: Mapping[str, Iterable[np.ndarray]]
    if plan.layout == "sharded":
        blocks, shards = _index(known, places)
    else:
        blocks = {recipe.name: _blocks(recipe, specs[recipe.name], places[recipe.name], known) for recipe in recipes}
    provenance = {**contents.provenance, "software": software_versions()}
    write_store(out, specs, blocks, dataclasses.replace(contents, provenance=provenance), shards, progress)


def pack(store: FeatureStore, out: Path, progress: Progress | None = None) -> None:
    """Copy a store into one file, block by block; on an error, ``out`` stays as it was before.

    Raises
    ------
    IntegrityError
        If a shard is damaged or missing.
    StoreError
        If ``out`` cannot be written.
    """
    specs = {
        name: FeatureSpec(recipe, store.views(name), store.shape(name)[2:]) for name, recipe in store.recipes.items()
    }
    blocks = {name: _slices(store.array(name), rows_of_block(spec)) for name, spec in specs.items()}
    contents = Contents(**{field.name: getattr(store, field.name) for field in dataclasses.fields(Contents)})
    write_store(out, specs, blocks, contents, None, progress)


def write_store(
    out: Path,
    features: Mapping[str, FeatureSpec],
    blocks: Mapping[str, Iterable[np.ndarray]],
    contents: Contents,
    shards: ShardTable | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a store from blocks of rows, or, as an index, of places; ``out`` is whole or as it was before."""
    kind, rows = "store" if shards is None else "index", len(contents.images)
    total, done = len(features) * rows, 0
    with atomic_file(out) as temporary:
        version = contents.images.format_version
        writer = StoreWriter(temporary, kind=kind, rows=rows, features=features, version=version)
        try:
            for name in features:
                for block in blocks[name]:
                    writer.append(name, block)
                    done += len(block)
                    if progress:
                        progress("assemble", done, total)
            writer.finish(**vars(contents), shards=shards)
        finally:
            writer.close()


def _slices(array: Any, step: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), step):
        yield array[start : start + step]


def rows_of_block(spec: FeatureSpec) -> int:
    row_bytes = int(np.prod(spec.shape, dtype=np.int64)) * spec.views * np.dtype(spec.recipe.dtype).itemsize
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def _index(
    known: KnownRows, places: Mapping[str, Sequence[np.ndarray]]
) -> tuple[dict[str, list[np.ndarray]], ShardTable]:
    """Return the place of every row in the shards, by feature set, and the table of the shards that are used."""
    digests: dict[str, bytes] = {}
    for source in known.sources:
        shards = {source.path.stem: source.digest}
        if source.kind == "index":
            shards = dict(zip(source.shards.names, map(bytes, source.shards.digests), strict=True))
        if any(digests.setdefault(name, digest) != digest for name, digest in shards.items()):
            raise IntegrityError(f"{source.path}: two different shards have the same name. Nothing was written.")
    names = sorted(digests)
    number_of = {name: number for number, name in enumerate(names)}
    found = {}
    for name, by_view in places.items():
        result = scratch((len(by_view[0]), len(by_view), 3), PLACE)
        for view, wanted in enumerate(by_view):
            for number in np.unique(wanted[:, 0]):
                here, source = np.flatnonzero(wanted[:, 0] == number), known.sources[number]
                position = known.view_position(int(number), view)
                if source.kind == "shard":
                    shard, row = number_of[source.path.stem], wanted[here, 1]
                    result[here, view] = np.stack(np.broadcast_arrays(shard, row, position), axis=-1)
                else:
                    before = source.places(name)[wanted[here, 1], position]
                    renumbered = np.array([number_of[shard] for shard in source.shards.names], PLACE)
                    result[here, view] = np.column_stack([renumbered[before[:, 0]], before[:, 1:]])
        found[name] = result
    used = np.unique(np.concatenate([result[..., 0].reshape(-1) for result in found.values()]))
    for result in found.values():
        result[..., 0] = np.searchsorted(used, result[..., 0])
    table = ShardTable(tuple(names[number] for number in used), digest_rows(digests[names[number]] for number in used))
    return {name: [result] for name, result in found.items()}, table


def _places(known: KnownRows, recipe: Recipe, view: int, table: ImageTable) -> np.ndarray:
    """Return source and row of each image, int32, (n, 2)."""
    entries = known.locate(recipe.cell(view), table.sha256)
    if len(lacking := np.flatnonzero(entries < 0)):
        raise IntegrityError(
            f"{printable(table.paths[int(lacking[0])])}: {recipe.name}, view {view}, was not made of the bytes that it has now. "
            "The file changed during the run, or without a change of size and time. Run again without --trust-times."
        )
    return known.places(entries)


def _blocks(recipe: Recipe, spec: FeatureSpec, places: Sequence[np.ndarray], known: KnownRows) -> Iterator[np.ndarray]:
    step = rows_of_block(spec)
    for start in range(0, len(places[0]), step):
        stop = min(start + step, len(places[0]))
        block = np.empty((stop - start, spec.views, *spec.shape), dtype=recipe.dtype)
        for view in range(spec.views):
            wanted = places[view][start:stop]
            for source in np.unique(wanted[:, 0]):
                here = np.flatnonzero(wanted[:, 0] == source)
                rows = known.sources[source].array(recipe.name)
                block[here, view] = rows[wanted[here, 1], known.view_position(int(source), view)]
        yield block


def _same(first: ImageTable | Quarantine, second: ImageTable | Quarantine, *, with_times: bool) -> bool:
    mine, theirs = vars(first), vars(second)
    return all(
        np.array_equal(value, theirs[key]) if isinstance(value, np.ndarray) else value == theirs[key]
        for key, value in mine.items()
        if with_times or key not in ("mtimes_ns", "versions") or (value is None) != (theirs[key] is None)
    )
