"""Read a feature store. Nothing in the file is trusted.

``features/FORMAT.md`` is normative. ``features.store.writer`` writes these files. ``features.store.untrusted`` checks
the structure of a file before any value of it is used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from features.canonical import canonical_json
from features.errors import ConfigurationError, IntegrityError, StoreError, nearest
from features.files import named, quoted
from features.progress import Progress
from features.recipe import Recipe
from features.scratch import scratch
from features.sources.splits import SPLITS
from features.store.schema import (
    FURTHER_COLUMNS,
    IMAGE_COLUMNS,
    QUARANTINE_COLUMNS,
    TARGETS,
    ImageTable,
    Quarantine,
    ShardTable,
    attribute_of,
    block_hash,
    block_rows,
    data_digest,
    values_group,
)
from features.store.sharded import ShardedArray, by_shard
from features.store.untrusted import WAY_OUT, check_tables, read_recipes, read_structure, reading
from features.targets import UNKNOWN, Target
from features.texts import Texts

logger = logging.getLogger(__name__)
_SHARD_NAME = re.compile("[0-9a-f]{20}")


def parts_folder(path: Path) -> Path:
    """Return the folder of a store's shards, which lies beside the file and not beside a link to it."""
    path = Path(os.path.realpath(path))
    return path.with_name(path.name + ".parts")


def is_shard_name(text: str) -> bool:
    """Whether ``text`` is a valid name of a shard."""
    return _SHARD_NAME.fullmatch(text) is not None


def shard_path(folder: Path, identity: str) -> Path:
    """Return the path of the shard with that identity."""
    return folder / f"{identity}.h5"


class FeatureStore:
    """A feature store opened for reading. The file is untrusted: every value is checked before it is returned.

    Examples
    --------
    >>> from features import FeatureStore
    >>> store = FeatureStore.open("features.h5")
    >>> X, y = store.load(split="train")
    >>> X.shape, y.shape, store.classes
    ((28, 16), (28,), ('cat', 'dog'))
    """

    labelled_by: Mapping[str, Any] = MappingProxyType({})  # what gave the labels, if they are not those of the file

    def __init__(self, path: str | Path, *, kinds: tuple[str, ...] = ("store", "index")) -> None:
        self.path, self._kinds = Path(path), kinds
        self._descriptor: int | None = None
        self._verified: set[str] = set()
        self._verified_blocks: set[tuple[str, int]] = set()
        self._shards: dict[int, FeatureStore] = {}
        self._damaged: set[int] = set()
        with reading(self.path):
            self._open()

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open a store.

        Raises
        ------
        StoreError
            If there is no such file.
        FormatVersionError
            If this release does not know the format version.
        IntegrityError
            If it is not a feature store, or its structure does not follow FORMAT.md.
        """
        return cls(path)

    @classmethod
    def open_shard(cls, path: str | Path) -> FeatureStore:
        """Open one shard. Its labels and splits are assigned later, at assembly or in an index."""
        return cls(Path(path), kinds=("shard",))

    def __reduce__(self) -> tuple[Callable[..., FeatureStore], tuple[Path]]:
        # Open files are not pickled.
        return functools.partial(_open_again, kinds=self._kinds, digest=self.digest), (self.path,)

    # -- what is inside
    @property
    def names(self) -> tuple[str, ...]:
        """Names of the feature sets, sorted."""
        return tuple(sorted(self.recipes))

    def feature_set(self, name: str | None = None) -> str:
        """Return the name of a feature set, that of the only one by default; ``ConfigurationError`` if there is no such one."""
        if name is None:
            if len(self.recipes) == 1:
                return next(iter(self.recipes))
            raise ConfigurationError(
                f"{self.path} holds {len(self.recipes)} feature sets: name one of {', '.join(self.names)}"
            )
        if name not in self.recipes:
            raise ConfigurationError(
                f"{self.path} has no feature set {name!r}; it holds {', '.join(self.names)}{nearest(name, self.names)}"
            )
        return name

    def __len__(self) -> int:
        """Number of images (rows)."""
        return self._rows

    def __repr__(self) -> str:
        sets = ", ".join(f"{name} {'x'.join(map(str, self.shape(name)))}" for name in self.names)
        return f"<{type(self).__name__} {str(self.path)!r}: {len(self)} images; {sets}>"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one feature set, ``(images, views, ...)``."""
        entry = self._entries[self._key_of(name)]
        return entry.shape if self.kind != "index" else (*entry.shape[:2], *self._row_shapes[name])

    def views(self, name: str) -> int:
        """Return the number of views in one feature set."""
        return self.shape(name)[1]

    @functools.cached_property
    def images(self) -> ImageTable:
        """The table of images, verified against its checksums."""
        absent = {name for name in ("group", "version") if f"/images/{name}/ends" not in self._entries}
        names = set(IMAGE_COLUMNS) - absent
        columns = {"groups": None, **self._columns("/images", names - {"path"}), "columns": self._further_columns()}
        columns["paths"] = self._texts_of("/images/path")
        table = ImageTable(**columns, target=self._target())
        # The rows of a shard have no labels and splits until assembly.
        splits = (-1, -1) if self.kind == "shard" else (0, len(SPLITS) - 1)
        self._check_range("/images/label", table.labels, -1, len(self.classes) - 1)
        self._check_range("/images/split", table.splits, *splits)
        return table

    @functools.cached_property
    def quarantine(self) -> Quarantine:
        """Images that could not be read."""
        return Quarantine(**self._columns("/quarantine", QUARANTINE_COLUMNS))

    def forget_tables(self) -> None:
        """Free the tables that were read; they are read again when they are asked for."""
        for name in ("images", "quarantine"):
            vars(self).pop(name, None)

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        names = self._strings_of("/classes")
        if list(names) != sorted(set(names)):
            raise IntegrityError(f"{self.path}: /classes are not sorted, or one occurs twice. {WAY_OUT}")
        return names

    @functools.cached_property
    def data_digest(self) -> str:
        """sha256 of the classes and of each row's content hash, label and split: it identifies training data."""
        table = self.images
        return data_digest(self.classes, table.sha256, table.labels, table.splits, table.target)

    @functools.cached_property
    def shards(self) -> ShardTable:
        """The shards that hold the features of a sharded store; none in a packed one."""
        if self.kind != "index":
            return ShardTable((), np.zeros((0, 32), np.uint8))
        table = ShardTable(self._strings_of("/shards/name"), self._values_of("/shards/digest"))
        if not all(map(is_shard_name, table.names)):
            raise IntegrityError(f"{self.path}: /shards/name holds an invalid name of a shard. {WAY_OUT}")
        return table

    def places(self, name: str) -> np.ndarray:
        """Return the places of a sharded store's rows, int32, ``(images, views, 3)``: shard, row, view position."""
        return self._verified_map(self._key_of(name))

    def present(self) -> np.ndarray:
        """Return whether each row is present, bool, ``(images,)``; rows of missing or known damaged shards are not."""
        numbers = range(len(self.shards.names))
        here = np.array([n not in self._damaged and self._shard_path(n).is_file() for n in numbers], bool)
        every = np.ones(len(self), bool)
        for name in self.names if not here.all() else ():
            places = self.places(name)[..., 0]
            self._check_range(f"/places/{name}", places, 0, len(here) - 1)
            every &= here[places].all(axis=1)
        return every

    def in_place(self) -> bool:
        """Whether the path still leads to this very file, and not to another that a writer has put there."""
        assert self._descriptor is not None  # a shard never changes
        return self.path.exists() and os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))

    @functools.cached_property
    def digest(self) -> bytes:
        """sha256 of everything that decides the content of the file: its attributes and the checksums of all blocks."""
        listed = {key: [entry.dtype.str, list(entry.shape)] for key, entry in sorted(self._entries.items())}
        digest = hashlib.sha256(canonical_json([self._attributes_digest, listed]).encode("ascii"))
        for key in sorted(self._entries):
            digest.update(self._entries[key].digests.tobytes())
        return digest.digest()

    # -- arrays
    def rows(self, split: str | None = None) -> np.ndarray:
        """Return the row numbers of one split, int64, ascending; all rows if ``split`` is None."""
        if split is None:
            return np.arange(len(self), dtype=np.int64)
        if split not in SPLITS:
            raise ConfigurationError(
                f"split: received {split!r}, expected one of {', '.join(SPLITS)}, or None for all rows{nearest(split, SPLITS)}"
            )
        return np.flatnonzero(self.images.splits == SPLITS.index(split))

    @property
    def y(self) -> np.ndarray:
        """What is to be predicted of each row: labels, int32 (n,), or the values of the target (n, columns)."""
        table = self.images
        return table.labels if table.target is None else table.target.values

    def load(
        self, split: str | None = None, name: str | None = None, views: int | str = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the features and the labels of one split.

        Parameters
        ----------
        split : {"train", "validation", "test", "unlabelled"}, optional
            By default all rows.
        name : str, optional
            Feature set; may be left out if there is only one.
        views : int or "all"
            One view (0 is the plain image), or all of them.

        Returns
        -------
        X : float32 or float16, (n, ...), or (n, K, ...) with ``views="all"``
            Read-only and memory-mapped if the rows of the split are contiguous, else a copy.
        y : int32, (n,)
            Labels, -1 for unlabelled. If the store has a target, its values: uint8 or float64, (n, columns).

        Raises
        ------
        IntegrityError
            If the checksum of a block of rows does not match.
        """
        name = self.feature_set(name)
        array = self.array(name)
        rows = self.rows(split)
        labels = self.y[rows]
        chosen: Any = slice(None)
        if views != "all":
            if not isinstance(views, int) or not 0 <= views < array.shape[1]:
                raise ConfigurationError(f"views: received {views!r}, {name} has views 0 to {array.shape[1] - 1}")
            chosen = views
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            return array[rows[0] : rows[-1] + 1, chosen], labels
        return array[rows, chosen], labels

    def array(self, name: str | None = None) -> np.ndarray | ShardedArray:
        """Return one whole feature set, ``(images, views, ...)``, read-only; it is verified on first use.

        In a packed store it is memory-mapped. In a sharded store it is an object that copies the rows it is indexed by.
        """
        name = self.feature_set(name)
        values = self._verified_map(self._key_of(name))
        if self.kind != "index":
            return values
        rows_of = functools.partial(self._shard_rows, name)
        return ShardedArray(values, self._row_shapes[name], np.dtype(self.recipes[name].dtype), rows_of)

    def read(self, name: str | None, start: int, stop: int) -> np.ndarray:
        """Return contiguous rows of one feature set, ``(stop - start, views, ...)``; blocks are verified on first use.

        Use it to read a feature set larger than memory. It does not map the file, because mapped pages count as memory
        of the process.
        """
        name = self.feature_set(name)
        key, (images, *row) = self._key_of(name), self.shape(name)
        start, stop, _ = slice(start, stop).indices(images)
        entry = self._entries[key]
        size, step = (stop - start) * entry.row_bytes, block_rows(entry.shape, entry.dtype)
        if self.kind == "index" or not 0 < size < 1 << 30:  # one system call reads no more than this
            return self.array(name)[start : max(start, stop)]
        whole = range(-(-start // step), -(-stop // step) if stop == images else stop // step)
        self._check_blocks(key, {start // step, (stop - 1) // step} - set(whole))
        with self._stream() as stream:
            data = os.pread(stream.fileno(), size, entry.offset + start * entry.row_bytes)
        if len(data) != size:
            raise IntegrityError(f"{self.path}: {key} rows {start} to {stop - 1} are cut off. {WAY_OUT}")
        if key not in self._verified and (new := {(key, block) for block in whole} - self._verified_blocks):
            for _, block in sorted(new):  # what was read is what is verified: the file is read once
                begin = (block * step - start) * entry.row_bytes
                self._verified_block(key, block, memoryview(data)[begin : begin + step * entry.row_bytes])
            self._verified_blocks |= new
        return np.frombuffer(data, entry.dtype).reshape(stop - start, *row)

    def verify(self, progress: Progress | None = None) -> int:
        """Recompute every checksum.

        Returns
        -------
        int
            Number of blocks verified.

        Raises
        ------
        IntegrityError
            If a checksum differs; the message names the array and the rows of the first such block.
        """
        blocks = sum(len(entry.digests) for entry in self._entries.values())
        total, done = blocks + len(self.shards.names), 0
        for key in self._entries:
            for _ in self._verify_blocks(key):
                done += 1
                if progress:
                    progress("verify", done, total)
        here = {name: dict(by_shard(self.places(name))) for name in self.names} if self.kind == "index" else {}
        for number in range(len(self.shards.names)):
            shard = self._open_shard(number)
            blocks += shard.verify()
            for name, groups in here.items():
                if number in groups:
                    self._check_holds(shard, number, name, self.places(name).reshape(-1, 3)[groups[number]])
            done += 1
            if progress:
                progress("verify", done, total)
        if any(set(groups) - set(range(len(self.shards.names))) for groups in here.values()):
            raise IntegrityError(f"{self.path}: a place lies in a shard that does not exist. {WAY_OUT}")
        _ = self.images, self.quarantine  # reading them checks texts, labels and splits
        return blocks

    def set_damaged_shards_aside(self) -> None:
        """Verify each shard. A damaged one is logged, and its rows count as missing from then on."""
        for number in range(len(self.shards.names)):
            try:
                self._open_shard(number).verify()
            except IntegrityError as error:
                logger.warning("%s", error)
                self._damaged.add(number)

    # -- inside
    def _key_of(self, name: str) -> str:
        return f"/{values_group(self.kind)}/{self.feature_set(name)}"

    def _open(self) -> None:
        beside = Path(f"{self.path}.h5")
        hint = f"; did you mean {str(beside)!r}?" if beside.is_file() else ""
        if not self.path.exists():
            if hint:
                raise StoreError(f"{self.path}: no such feature store{hint}")
            raise StoreError(
                f"{self.path}: no such feature store. Make it with: bottleneck extract IMAGES --out {quoted(self.path)}"
            )
        if not self.path.is_file():
            if self.path.is_dir():
                if hint:
                    raise IntegrityError(f"{self.path}: is a folder, and a feature store is a file{hint}")
                raise IntegrityError(
                    f"{self.path}: is a folder, and a feature store is a file, such as {self.path / 'features.h5'}. To "
                    f"make one of a folder of images: bottleneck extract {quoted(self.path)} --out features.h5"
                )
            raise IntegrityError("not a feature store, but a pipe or a device")
        structure = read_structure(self.path, self._kinds, keep_open="shard" not in self._kinds)
        if structure.descriptor >= 0:
            self._descriptor = structure.descriptor
            weakref.finalize(self, os.close, structure.descriptor)
        root = structure.root
        self._entries, self._attributes_digest = structure.entries, structure.attributes_digest
        self.kind, self.source, self.split_rule = str(root["kind"]), str(root["source"]), str(root["split_rule"])
        self.provenance = json.loads(str(root["provenance"]))
        if not isinstance(self.provenance, dict):
            raise IntegrityError(f"attribute provenance: received {str(root['provenance'])[:40]}, expected an object")
        self._rows = check_tables(structure)
        self.recipes, self._row_shapes = read_recipes(structure, self._rows)

    def _shard_path(self, number: int) -> Path:
        return shard_path(parts_folder(self.path), self.shards.names[number])

    def _open_shard(self, number: int) -> FeatureStore:
        """Open a shard, and check by its digest that it is the one from which the index was made."""
        path = self._shard_path(number)
        if not path.parent.is_dir():
            raise IntegrityError(
                f"{self.path}: the folder of its shards, {path.parent.name}, is not beside it; move them together"
            )
        try:
            shard = FeatureStore.open_shard(path)
        except (StoreError, FileNotFoundError) as error:
            raise IntegrityError(
                f"{path}: the shard is missing; it belongs to {self.path}. If that was brought up to date in the "
                "meantime, open it again; else run the extraction again: only the images of this shard are computed."
            ) from error
        if shard.digest != self.shards.digests[number].tobytes():
            raise IntegrityError(
                f"{path}: the shard is not the one that was written for {self.path}. Move it away and run the "
                "extraction again: only its images are computed."
            )
        return shard

    def _shard_rows(self, name: str, number: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        if not 0 <= number < len(self.shards.names):
            raise IntegrityError(f"{self.path}: a place lies in shard {number} of {len(self.shards.names)}. {WAY_OUT}")
        if number not in self._shards:
            self._shards[number] = self._open_shard(number)
        self._check_holds(self._shards[number], number, name)
        return functools.partial(self._shards[number]._values_at, name)

    def _check_holds(self, shard: FeatureStore, number: int, name: str, places: np.ndarray | None = None) -> None:
        """Check that a shard has the feature set that the index names, and all of these places."""
        recipe, mine = shard.recipes.get(name), self.recipes[name]
        same = recipe is not None and (recipe == mine or self._only_view_0(shard, number, name, recipe))
        if not same or shard.shape(name)[2:] != self._row_shapes[name]:
            raise IntegrityError(f"{shard.path} does not hold the feature set {name} of {self.path}. {WAY_OUT}")
        if places is not None and ((places < 0).any() or (places[:, 1:] >= shard.shape(name)[:2]).any()):
            raise IntegrityError(f"{self.path}: a place lies outside {shard.path}. {WAY_OUT}")

    def _only_view_0(self, shard: FeatureStore, number: int, name: str, recipe: Recipe) -> bool:
        """Whether the index uses only view 0 of this shard, which depends on neither augmentation nor seed."""
        places, views = self.places(name), shard.provenance.get("views")
        here = places[..., 0] == number
        position = views.index(0) if isinstance(views, list) and 0 in views else -1
        of_view_0 = not here[:, 1:].any() and bool((places[here[:, 0], 0, 2] == position).all())
        return recipe.plain == self.recipes[name].plain and of_view_0

    @contextlib.contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        source = self.path if self._descriptor is None else os.dup(self._descriptor)
        with named(self.path), open(source, "rb", buffering=0) as stream:
            yield stream

    def _verified_map(self, key: str) -> np.ndarray:
        if key not in self._verified:
            self._check_blocks(key, range(len(self._entries[key].digests)))
            self._verified.add(key)
        return self._map(key)

    def _values_at(self, name: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Values of one view of one row each, ``(n, ...)``; only the blocks of these rows are verified."""
        key, shape = self._key_of(name), self.shape(name)
        if (rows < 0).any() or (rows >= shape[0]).any() or (views < 0).any() or (views >= shape[1]).any():
            raise IntegrityError(f"{self.path}: a place lies outside this shard, which has {shape[:2]} rows and views")
        with reading(self.path):
            self._check_blocks(key, np.unique(rows // block_rows(shape, self._entries[key].dtype)).tolist())
            return np.asarray(self._map(key)[rows, views])

    def _check_blocks(self, key: str, blocks: Iterable[int]) -> None:
        """Verify those of these blocks that were not verified before."""
        if key in self._verified or not (new := {(key, block) for block in blocks} - self._verified_blocks):
            return
        with self._stream() as stream:
            for _, block in sorted(new):
                self._read_block(stream, key, block)
        self._verified_blocks |= new

    def _map(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        if 0 in entry.shape:
            return np.zeros(entry.shape, dtype=entry.dtype)
        with self._stream() as stream:
            array = np.memmap(stream, dtype=entry.dtype, mode="r", offset=entry.offset, shape=entry.shape)
        return array  # without a file name, because a later store may have that name

    def _verify_blocks(self, key: str) -> Iterator[np.ndarray]:
        """Yield verified blocks of rows. They are read and not mapped: mapped pages count as memory of the process."""
        with self._stream() as stream:
            for block in range(len(self._entries[key].digests)):
                yield self._read_block(stream, key, block)

    def _read_block(self, stream: BinaryIO, key: str, block: int) -> np.ndarray:
        entry = self._entries[key]
        start, count = self._extent(key, block)
        data = os.pread(stream.fileno(), count * entry.row_bytes, entry.offset + start * entry.row_bytes)
        return self._verified_block(key, block, data)

    def _extent(self, key: str, block: int) -> tuple[int, int]:
        """The first row of a block, and its number of rows."""
        entry = self._entries[key]
        step = block_rows(entry.shape, entry.dtype)
        return block * step, min(step, entry.shape[0] - block * step)

    def _verified_block(self, key: str, block: int, data: bytes | memoryview) -> np.ndarray:
        """The rows of a block that has been read, if they are what was written."""
        entry = self._entries[key]
        start, count = self._extent(key, block)
        where = f"{self.path}: {key} rows {start} to {start + count - 1}"
        digest = block_hash(key, entry.dtype, entry.shape, block)
        digest.update(data)
        if len(data) != count * entry.row_bytes or digest.digest() != entry.digests[block].tobytes():
            raise IntegrityError(f"{where} are not what was written (checksum differs). {WAY_OUT}")
        rows = np.frombuffer(data, entry.dtype).reshape(count, *entry.shape[1:])
        bad = np.isinf if key.startswith(f"{TARGETS}/") else _is_not_finite  # an unknown number is NaN
        if entry.dtype.kind == "f" and bad(rows).any():
            raise IntegrityError(f"{where} hold values that are not finite. {WAY_OUT}")
        return rows

    def _check_range(self, key: str, values: np.ndarray, low: int, high: int) -> None:
        if len(values) and not low <= int(values.min()) <= int(values.max()) <= high:
            raise IntegrityError(
                f"{self.path}: {key} holds {values.min()} to {values.max()}, expected {low} to {high}. {WAY_OUT}"
            )

    def _columns(self, group: str, names: Iterable[str]) -> dict[str, Any]:
        return {attribute_of(name): self._column_of(group, name) for name in names}

    def _column_of(self, group: str, name: str) -> Any:
        key = f"{group}/{name}"
        known = IMAGE_COLUMNS if group == "/images" else QUARANTINE_COLUMNS
        return self._strings_of(key) if known[name] is None else self._values_of(key)

    def _further_columns(self) -> dict[str, tuple[str, ...]]:
        if f"{FURTHER_COLUMNS[0]}/ends" not in self._entries:
            return {}
        names, values = map(self._strings_of, FURTHER_COLUMNS)
        if list(names) != sorted(set(names)) or len(values) != len(names) * len(self):
            raise IntegrityError(f"{self.path}: {len(names)} further columns have {len(values)} values. {WAY_OUT}")
        return {name: values[number * len(self) : (number + 1) * len(self)] for number, name in enumerate(names)}

    def _target(self) -> Target | None:
        key = next((key for key in self._entries if key.startswith(f"{TARGETS}/") and key.endswith("/values")), None)
        if key is None:
            return None
        group = key.removesuffix("/values")
        columns, values = self._strings_of(f"{group}/columns"), self._values_of(key)
        if len(set(columns)) != len(columns) or len(columns) != values.shape[1]:
            raise IntegrityError(f"{self.path}: {group} names {len(columns)} columns of {values.shape[1]}. {WAY_OUT}")
        if values.dtype.kind == "u" and not np.isin(values, (0, 1, UNKNOWN)).all():
            raise IntegrityError(f"{self.path}: {key} holds other numbers than 0, 1 and {UNKNOWN}. {WAY_OUT}")
        return Target(group.removeprefix(f"{TARGETS}/"), columns, values)

    def _values_of(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        found, done = scratch(entry.shape, entry.dtype), 0
        for rows in self._verify_blocks(key):
            found[done : done + len(rows)] = rows
            done += len(rows)
        return found

    def _strings_of(self, key: str) -> tuple[str, ...]:
        return tuple(self._texts_of(key))

    def _texts_of(self, key: str) -> Texts:
        blob, ends = self._values_of(f"{key}/utf8"), self._values_of(f"{key}/ends")
        first, last = (int(ends[0]), int(ends[-1])) if len(ends) else (0, 0)
        if len(blob) != last or first < 0 or (ends[1:] < ends[:-1]).any():
            raise IntegrityError(f"{self.path}: {key} has string ends that do not fit its text. {WAY_OUT}")
        return Texts(blob, ends)


def _is_not_finite(values: np.ndarray) -> np.ndarray:
    """Which values are infinite or NaN; of float16 by the bits of the exponent, in a fraction of NumPy's time."""
    if values.dtype == np.float16:
        return np.asarray((values.view(np.uint16) & 0x7C00) == 0x7C00)
    return np.asarray(~np.isfinite(values))


def _open_again(path: Path, *, kinds: tuple[str, ...], digest: bytes) -> FeatureStore:
    """Open a store again, in another process; a store that has changed is an error."""
    store = FeatureStore(path, kinds=kinds)
    if store.digest != digest:
        raise StoreError(f"{path} was brought up to date after it was passed to this process. Open it again.")
    return store
