"""The feature store: the only module that opens feature files. Read, write, verify.

``FORMAT.md`` beside this file is normative. Blocks of rows flow in through ``StoreWriter`` and become one
finished file or none (``features.files.atomic_file``); ``FeatureStore`` reads a finished file and trusts nothing in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from features.errors import ConfigurationError, FormatVersionError, IntegrityError, StoreError, nearest
from features.files import PatientFile
from features.layout import (
    FORMAT,
    FORMAT_VERSION,
    IMAGE_COLUMNS,
    OPTIONAL_COLUMNS,
    QUARANTINE_COLUMNS,
    ROOT_ATTRIBUTES,
    ROOT_GROUPS,
    FeatureSpec,
    ImageTable,
    Quarantine,
    attributes_digest,
    block_hash,
    block_rows,
    data_digest,
    image_columns,
    quarantine_columns,
)
from features.recipe import Recipe, canonical_json
from features.splits import SPLITS

if TYPE_CHECKING:
    import h5py

_TEXT_ATTRIBUTE_LIMIT = 60_000  # bytes; larger attributes leave the object header
_ROW_LIMIT = 1 << 40  # values of one row, in a data set that may have no rows
_WAY_OUT = "Move the file away and extract again; no row of it is used."
Progress = Callable[[str, int, int], None]


class StoreWriter:
    """Write a finished file from blocks of rows that arrive in order.

    Parameters
    ----------
    path : Path
        File to create (give the temporary name of ``atomic_file``).
    kind : {"store", "shard"}
        A shard has no labels and splits: they are decided at assembly.
    rows : int
        Number of rows of every data set.
    features : mapping of str to FeatureSpec
        Data sets by name.
    """

    def __init__(self, path: Path, *, kind: str, rows: int, features: Mapping[str, FeatureSpec]) -> None:
        import h5py

        self._sink = PatientFile(path)
        # v110: every metadata structure carries a checksum, so a flipped bit is an error and not another value.
        self._file = h5py.File(self._sink, "w-", libver=("v110", "v110"))
        self._rows = rows
        self._attributes: dict[str, dict[str, str | int]] = {"/": {}}
        self._open: dict[str, _HashedDataset] = {}
        with self._checked():
            for name in ROOT_GROUPS:
                self._file.create_group(name)
            self._set("/", format=FORMAT, format_version=FORMAT_VERSION, kind=kind)
            for name, spec in features.items():
                key = f"/features/{name}"
                dataset = self._create(key, (rows, spec.views, *spec.shape), np.dtype(spec.recipe.dtype))
                self._set(key, recipe=spec.recipe.canonical, fingerprint=spec.recipe.fingerprint)
                self._open[name] = dataset

    def append(self, name: str, block: np.ndarray) -> None:
        """Append rows to one feature data set.

        Parameters
        ----------
        name : str
            Data set.
        block : float32 or float16, (k, views, ...)
            The next k rows.
        """
        with self._checked():
            self._open[name].append(block)

    def finish(
        self,
        *,
        images: ImageTable,
        quarantine: Quarantine,
        classes: Sequence[str] = (),
        source: str = "",
        split_rule: str = "",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the tables, the checksums and the attributes, and close the file."""
        for name, dataset in self._open.items():
            if dataset.position != self._rows:
                raise StoreError(f"/features/{name}: {dataset.position} rows were written, {self._rows} promised")
        with self._checked():
            self._table("/images", IMAGE_COLUMNS, image_columns(images))
            self._table("/quarantine", QUARANTINE_COLUMNS, quarantine_columns(quarantine))
            self._strings("/classes", classes)
            self._set("/", source=source, split_rule=split_rule, provenance=canonical_json(provenance or {}))
            for dataset in list(self._open.values()):
                dataset.write_checksums(self._file)
            self._set("/", attributes_sha256=attributes_digest(self._attributes))
            self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()
        self._sink.close()

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """An error of the disk ends the writing, and comes before what the library made of it."""
        try:
            yield
            self._sink.check()
        except BaseException:
            self.close()
            self._sink.check()
            raise

    def _set(self, key: str, **values: str | int) -> None:
        for name, value in values.items():
            stored: Any = value
            if isinstance(value, str):
                # One NUL behind an empty text: HDF5 has no string type of length 0.
                stored = np.bytes_(value.encode("utf-8", "surrogateescape") or b"\0")
                if len(stored) > _TEXT_ATTRIBUTE_LIMIT:
                    raise StoreError(f"attribute {name} of {key}: {len(stored)} bytes, at most {_TEXT_ATTRIBUTE_LIMIT}")
            self._file[key].attrs.create(name, stored, dtype=None if isinstance(value, str) else "<i8")
            if name != "attributes_sha256":
                self._attributes.setdefault(key, {})[name] = value

    def _create(self, key: str, shape: tuple[int, ...], dtype: np.dtype) -> _HashedDataset:
        dataset = self._file.create_dataset(key, shape=shape, dtype=dtype.newbyteorder("<"), track_times=False)
        return _HashedDataset(key, dataset)

    def _table(self, key: str, known: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        for name, kind in known.items():
            values = columns[name]
            if values is None:
                continue
            if kind is None:
                self._strings(f"{key}/{name}", values)
            else:
                self._column(f"{key}/{name}", np.asarray(values, dtype=kind[0]).reshape(-1, *kind[1]))

    def _strings(self, key: str, values: Sequence[str]) -> None:
        encoded = [value.encode("utf-8", "surrogateescape") for value in values]
        self._file.require_group(key)
        self._column(f"{key}/utf8", np.frombuffer(b"".join(encoded), dtype="u1"))
        lengths = np.fromiter((len(text) for text in encoded), dtype="<i8", count=len(encoded))
        self._column(f"{key}/ends", np.cumsum(lengths, dtype="<i8"))

    def _column(self, key: str, values: np.ndarray) -> None:
        column = self._create(key, values.shape, values.dtype)
        column.append(values)
        self._open[key] = column


class _HashedDataset:
    """A data set written front to back, hashed in blocks of rows on the way."""

    def __init__(self, key: str, dataset: h5py.Dataset) -> None:
        self.key, self._dataset, self.position = key, dataset, 0
        self._block_rows = block_rows(dataset.shape, dataset.dtype)
        self._hash, self._digests = block_hash(key, dataset.dtype, dataset.shape, 0), []  # type: ignore[var-annotated]

    def append(self, block: np.ndarray) -> None:
        expected = self._dataset.shape[1:]
        if block.shape[1:] != expected or self.position + len(block) > self._dataset.shape[0]:
            raise StoreError(
                f"{self.key}: received rows {block.shape} after row {self.position}, expected {self._dataset.shape}"
            )
        block = np.ascontiguousarray(block, dtype=self._dataset.dtype)
        done = 0
        while done < len(block):
            step = min(len(block) - done, self._block_rows - self.position % self._block_rows)
            # In small steps: h5py copies what it hands to a file object.
            self._dataset[self.position : self.position + step] = block[done : done + step]
            self._hash.update(block[done : done + step].data)
            done += step
            self.position += step
            if self.position % self._block_rows == 0:
                self._close_block()

    def _close_block(self) -> None:
        self._digests.append(self._hash.digest())
        self._hash = block_hash(self.key, self._dataset.dtype, self._dataset.shape, len(self._digests))

    def write_checksums(self, file: h5py.File) -> None:
        if self.position % self._block_rows:
            self._close_block()
        digests = np.frombuffer(b"".join(self._digests), dtype="u1").reshape(-1, 32)
        file.create_dataset(f"/checksums{self.key}", data=digests, track_times=False)


class FeatureStore:
    """A finished feature file, opened for reading. Untrusted: every value is checked before it is handed out.

    Examples
    --------
    >>> store = FeatureStore.open("features.h5")                      # doctest: +SKIP
    >>> X, y = store.load(split="train")                              # doctest: +SKIP
    """

    def __init__(self, path: Path, *, kind: str) -> None:
        self.path = path
        self._kind = kind
        self._descriptor: int | None = None
        self._verified: set[str] = set()
        with _reading(path):
            self._read_structure(kind)

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open a store.

        Raises
        ------
        StoreError
            If there is no such file.
        FormatVersionError
            If it is of a version unknown to this release.
        IntegrityError
            If it is not a feature store, or its structure is not what FORMAT.md says.
        """
        return cls(Path(path), kind="store")

    @classmethod
    def open_shard(cls, path: str | Path) -> FeatureStore:
        """Open one shard of an unfinished extraction. Its labels and splits are not yet decided."""
        return cls(Path(path), kind="shard")

    def __reduce__(self) -> tuple[Callable[..., FeatureStore], tuple[Path]]:
        return functools.partial(FeatureStore, kind=self._kind), (self.path,)  # open files do not travel

    # -- what is inside
    @property
    def names(self) -> tuple[str, ...]:
        """Names of the feature data sets, sorted."""
        return tuple(sorted(self.recipes))

    def __len__(self) -> int:
        """Number of images (rows)."""
        return self._rows

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one data set, ``(images, views, ...)``."""
        return self._entries[f"/features/{self._data_set(name)}"].shape

    def views(self, name: str) -> int:
        """Number of views in one data set."""
        return self.shape(name)[1]

    @functools.cached_property
    def images(self) -> ImageTable:
        """The table of images, verified against its checksums."""
        column = functools.partial(self._column_of, "/images")
        table = ImageTable(
            paths=column("path"),
            sha256=column("sha256"),
            labels=column("label"),
            splits=column("split"),
            groups=column("group") if "/images/group/ends" in self._entries else None,
            widths=column("width"),
            heights=column("height"),
            sizes=column("size"),
            mtimes_ns=column("mtime_ns"),
        )
        # Rows of a shard get their labels and splits at assembly.
        splits = (0, len(SPLITS) - 1) if self._kind == "store" else (-1, -1)
        self._check_range("/images/label", table.labels, -1, len(self.classes) - 1)
        self._check_range("/images/split", table.splits, *splits)
        return table

    @functools.cached_property
    def quarantine(self) -> Quarantine:
        """Images that could not be read."""
        column = functools.partial(self._column_of, "/quarantine")
        return Quarantine(
            paths=column("path"),
            sha256=column("sha256"),
            reasons=column("reason"),
            sizes=column("size"),
            mtimes_ns=column("mtime_ns"),
        )

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        names = self._strings_of("/classes")
        if list(names) != sorted(set(names)):
            raise IntegrityError(f"{self.path}: /classes are not sorted, or one is there twice. {_WAY_OUT}")
        return names

    @functools.cached_property
    def data_digest(self) -> str:
        """sha256 over classes and every row's content hash, label and split: what a head was trained on."""
        table = self.images
        return data_digest(self.classes, table.sha256, table.labels, table.splits)

    # -- arrays
    def rows(self, split: str | None = None) -> np.ndarray:
        """Row numbers of one split, int64, ascending; all rows without ``split``."""
        if split is None:
            return np.arange(len(self), dtype=np.int64)
        if split not in SPLITS:
            raise ConfigurationError(
                f"split: received {split!r}, expected one of {', '.join(SPLITS)}{nearest(split, SPLITS)}"
            )
        return np.flatnonzero(self.images.splits == SPLITS.index(split))

    def load(
        self, split: str | None = None, name: str | None = None, views: int | str = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of one split, each row with its own label.

        Parameters
        ----------
        split : {"train", "validation", "test", "unlabelled"}, optional
            All rows without it.
        name : str, optional
            Feature data set; may be left out where there is one.
        views : int or "all"
            One view (0 is the plain image), or all of them.

        Returns
        -------
        X : float32 or float16, (n, ...), or (n, K, ...) with ``views="all"``
            Memory-mapped, read-only, where the split is one run of rows; else a copy.
        y : int32, (n,)
            Labels, -1 for unlabelled.

        Raises
        ------
        IntegrityError
            If a block of rows is not what was written.
        """
        name = self._data_set(name)
        array = self.array(name)
        rows = self.rows(split)
        labels = self.images.labels[rows]
        chosen: Any = slice(None)
        if views != "all":
            if not isinstance(views, int) or not 0 <= views < array.shape[1]:
                raise ConfigurationError(f"views: received {views!r}, {name} has views 0 to {array.shape[1] - 1}")
            chosen = views
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            return array[rows[0] : rows[-1] + 1, chosen], labels
        return array[rows, chosen], labels

    def array(self, name: str | None = None) -> np.ndarray:
        """One whole data set, ``(images, views, ...)``, memory-mapped and read-only, verified on first use."""
        key = f"/features/{self._data_set(name)}"
        if key not in self._verified:
            for _ in self._verify_blocks(key):
                pass
            self._verified.add(key)
        return self._map(key)

    def verify(self, progress: Progress | None = None) -> int:
        """Recompute every checksum.

        Returns
        -------
        int
            Number of blocks verified.

        Raises
        ------
        IntegrityError
            Naming the data set and the rows of the first block that differs.
        """
        total = sum(len(entry.digests) for entry in self._entries.values())
        done = 0
        for key in self._entries:
            for _ in self._verify_blocks(key):
                done += 1
                if progress:
                    progress("verify", done, total)
        _ = self.images, self.quarantine  # texts are whole, labels and splits are in range
        return done

    # -- inside
    def _data_set(self, name: str | None) -> str:
        if name is None:
            if len(self.recipes) == 1:
                return next(iter(self.recipes))
            raise ConfigurationError(
                f"{self.path} holds {len(self.recipes)} data sets: name one of {', '.join(self.names)}"
            )
        if name not in self.recipes:
            raise ConfigurationError(
                f"{self.path} has no data set {name!r}; it holds {', '.join(self.names)}{nearest(name, self.names)}"
            )
        return name

    def _read_structure(self, kind: str) -> None:
        import h5py

        if not self.path.exists():
            raise StoreError(
                f"{self.path}: no such feature store. Make it with: bottleneck extract IMAGES --out {self.path}"
            )
        if not self.path.is_file():
            raise IntegrityError("not a feature store, but a folder, a pipe or a device")
        with h5py.File(self.path, "r", locking=False) as file:
            handle = file.id.get_vfd_handle()
            size = os.fstat(handle).st_size
            if self._kind == "store":
                # Its own hold on the file: when a writer puts another one in its place, these rows stay these.
                # Shards never change, and there may be more of them than a process may open.
                self._descriptor = os.dup(handle)
                weakref.finalize(self, os.close, self._descriptor)
            self._check_version(file)
            attributes: dict[str, dict[str, str | int]] = {}
            datasets: dict[str, h5py.Dataset] = {}
            _walk(file, "", attributes, datasets, set())
            _check_objects(attributes, datasets)
            root = attributes["/"]
            stated = root.pop("attributes_sha256", None)
            if stated != attributes_digest(attributes):
                raise IntegrityError("the attributes are not what was written (attributes_sha256 differs)")
            if sorted({*root, "attributes_sha256"}) != sorted(ROOT_ATTRIBUTES) or root["kind"] != kind:
                raise IntegrityError(f"root attributes: received kind {root.get('kind')!r}, expected a {kind}")
            checksums = {
                key.removeprefix("/checksums"): datasets.pop(key) for key in list(datasets) if _is_checksum(key)
            }
            if set(checksums) != set(datasets):
                odd = sorted(set(checksums) ^ set(datasets))
                raise IntegrityError(f"data sets and checksums do not pair: {', '.join(odd[:5])}")
            self._entries = {key: _Entry.read(key, data, checksums[key], size) for key, data in datasets.items()}
        self.source = str(root["source"])
        self.split_rule = str(root["split_rule"])
        self.provenance = json.loads(str(root["provenance"]))
        if not isinstance(self.provenance, dict):
            raise IntegrityError(f"attribute provenance: received {str(root['provenance'])[:40]}, expected an object")
        self._check_columns()
        self.recipes = self._read_recipes(attributes)

    def _check_version(self, file: h5py.File) -> None:
        found = {}
        for name in ("format", "format_version"):
            found[name] = _attribute(file, name) if name in file.attrs else None
        if found["format"] != FORMAT:
            raise IntegrityError(f"not a feature store (format is {found['format']!r}, expected {FORMAT!r})")
        if found["format_version"] != FORMAT_VERSION:
            raise FormatVersionError(
                f"{self.path}: format version {found['format_version']} is not known to this release, which reads "
                f"version {FORMAT_VERSION}. Install a newer bottleneck-features, or extract again into another file."
            )

    def _check_columns(self) -> None:
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for group, columns in (("/images", IMAGE_COLUMNS), ("/quarantine", QUARANTINE_COLUMNS)):
            for name, kind in columns.items():
                key = f"{group}/{name}"
                if kind is not None:
                    expected[key] = kind
                elif key not in OPTIONAL_COLUMNS or f"{key}/ends" in self._entries:
                    expected |= {f"{key}/utf8": ("u1", ()), f"{key}/ends": ("<i8", ())}
        expected |= {"/classes/utf8": ("u1", ()), "/classes/ends": ("<i8", ())}
        tables = {key for key in self._entries if not key.startswith("/features/")}
        if tables != set(expected):
            raise IntegrityError(f"unknown or missing data sets: {', '.join(sorted(tables ^ set(expected))[:5])}")
        counts: dict[str, set[int]] = {"/images": set(), "/quarantine": set()}
        for key, (dtype, tail) in expected.items():
            entry = self._entries[key]
            if entry.dtype != np.dtype(dtype) or entry.shape[1:] != tail:
                raise IntegrityError(f"{key}: received {entry.dtype.str} {entry.shape}, expected {dtype} (n, {tail})")
            if not key.endswith("/utf8") and not key.startswith("/classes"):
                counts["/" + key.split("/")[1]].add(entry.shape[0])
        for group, lengths in counts.items():
            if len(lengths) != 1:
                raise IntegrityError(f"{group}: columns of different lengths {sorted(lengths)}")
        self._rows = counts["/images"].pop()

    def _read_recipes(self, attributes: Mapping[str, Mapping[str, str | int]]) -> dict[str, Recipe]:
        recipes: dict[str, Recipe] = {}
        for key, entry in self._entries.items():
            if not key.startswith("/features/"):
                continue
            values = attributes.get(key, {})
            if sorted(values) != ["fingerprint", "recipe"]:
                raise IntegrityError(f"{key}: attributes {sorted(values)}, expected fingerprint and recipe")
            recipe = Recipe.from_dict(json.loads(str(values["recipe"])))
            name = key.removeprefix("/features/")
            if (recipe.canonical, recipe.fingerprint, recipe.name) != (values["recipe"], values["fingerprint"], name):
                raise IntegrityError(f"{key}: the fingerprint or the name is not that of its recipe")
            if (
                entry.dtype != np.dtype(recipe.dtype)
                or len(entry.shape) < 3
                or entry.shape[0] != self._rows
                or not entry.shape[1]
            ):
                raise IntegrityError(
                    f"{key}: received {entry.dtype.str} {entry.shape}, expected {recipe.dtype} and {self._rows} rows"
                )
            recipes[name] = recipe
        if not recipes:
            raise IntegrityError("/features: no data set")
        return recipes

    def _stream(self) -> BinaryIO:
        return open(self.path if self._descriptor is None else os.dup(self._descriptor), "rb", buffering=0)

    def _map(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        if 0 in entry.shape:
            return np.zeros(entry.shape, dtype=entry.dtype)
        with self._stream() as stream:
            array = np.memmap(stream, dtype=entry.dtype, mode="r", offset=entry.offset, shape=entry.shape)
        array.filename = str(self.path)  # joblib opens it again by name
        return array

    def _verify_blocks(self, key: str) -> Iterator[np.ndarray]:
        """Blocks of rows that are what was written. Read, not mapped: what is mapped counts as memory of the process."""
        entry = self._entries[key]
        step = block_rows(entry.shape, entry.dtype)
        with self._stream() as stream:
            for block, start in enumerate(range(0, entry.shape[0], step)):
                count = min(step, entry.shape[0] - start)
                where = f"{self.path}: {key} rows {start} to {start + count - 1}"
                data = os.pread(stream.fileno(), count * entry.row_bytes, entry.offset + start * entry.row_bytes)
                digest = block_hash(key, entry.dtype, entry.shape, block)
                digest.update(data)
                if len(data) != count * entry.row_bytes or digest.digest() != entry.digests[block].tobytes():
                    raise IntegrityError(f"{where} are not what was written (checksum differs). {_WAY_OUT}")
                rows = np.frombuffer(data, entry.dtype).reshape(count, *entry.shape[1:])
                if entry.dtype.kind == "f" and not np.isfinite(rows).all():
                    raise IntegrityError(f"{where} hold values that are not finite. {_WAY_OUT}")
                yield rows

    def _check_range(self, key: str, values: np.ndarray, low: int, high: int) -> None:
        if len(values) and not low <= int(values.min()) <= int(values.max()) <= high:
            raise IntegrityError(
                f"{self.path}: {key} holds {values.min()} to {values.max()}, expected {low} to {high}. {_WAY_OUT}"
            )

    def _column_of(self, group: str, name: str) -> Any:
        key = f"{group}/{name}"
        known = IMAGE_COLUMNS if group == "/images" else QUARANTINE_COLUMNS
        return self._strings_of(key) if known[name] is None else self._values_of(key)

    def _values_of(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        return np.concatenate([np.empty((0, *entry.shape[1:]), entry.dtype), *self._verify_blocks(key)])

    def _strings_of(self, key: str) -> tuple[str, ...]:
        blob, ends = self._values_of(f"{key}/utf8").tobytes(), self._values_of(f"{key}/ends")
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        if len(blob) != (int(ends[-1]) if len(ends) else 0) or (ends < starts).any():
            raise IntegrityError(f"{self.path}: {key} has string ends that do not fit its text. {_WAY_OUT}")
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        return tuple(blob[start:end].decode("utf-8", "surrogateescape") for start, end in pairs)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where one contiguous data set lies in the file, and the checksums of its blocks."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    digests: np.ndarray

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @classmethod
    def read(cls, key: str, dataset: h5py.Dataset, checksum: h5py.Dataset, file_size: int) -> _Entry:
        shape, dtype, offset = _checked_layout(key, dataset, file_size)
        blocks = -(-shape[0] // block_rows(shape, dtype))
        sum_shape, sum_dtype, _ = _checked_layout(f"/checksums{key}", checksum, file_size)
        if sum_shape != (blocks, 32) or sum_dtype != np.dtype("u1"):
            raise IntegrityError(f"/checksums{key}: received {sum_shape}, expected {(blocks, 32)}")
        return cls(shape, dtype, offset, checksum[()] if blocks else np.zeros((0, 32), "u1"))


def _checked_layout(key: str, dataset: h5py.Dataset, file_size: int) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and file offset of a data set that lies wholly inside this file, contiguous and unfiltered."""
    import h5py

    properties = dataset.id.get_create_plist()
    if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count() or dataset.shape is None:
        raise IntegrityError(f"{key}: not a contiguous data set of this file (chunked, virtual, external or empty)")
    dtype = dataset.dtype
    if dtype.kind not in "uif" or dtype.hasobject:
        raise IntegrityError(f"{key}: element type {dtype.str} is not allowed")
    if not dataset.shape:
        raise IntegrityError(f"{key}: a scalar, expected rows")
    shape = tuple(int(length) for length in dataset.shape)
    if (shape[0] and 0 in shape[1:]) or math.prod(max(1, length) for length in shape[1:]) > _ROW_LIMIT:
        raise IntegrityError(
            f"{key}: received shape {shape}, expected rows of at least one value and at most {_ROW_LIMIT}"
        )
    declared = dtype.itemsize * math.prod(shape)  # Python integers: a product over 64 bits must not look small
    offset = dataset.id.get_offset()
    if declared and (offset is None or offset + declared > file_size or dataset.id.get_storage_size() != declared):
        raise IntegrityError(f"{key}: declares {declared} bytes, which the file of {file_size} bytes does not hold")
    return shape, dtype, int(offset or 0)


def _is_checksum(key: str) -> bool:
    return key.startswith("/checksums/")


def _walk(
    group: Any, key: str, attributes: dict[str, dict[str, str | int]], datasets: dict[str, Any], seen: set[int]
) -> None:
    """Collect attributes and data sets, following hard links only, to a bounded depth and each object once."""
    import h5py

    if key.count("/") > 4:
        raise IntegrityError(f"{key}: groups nested deeper than the format has")
    _check_new(group, key, seen)
    attributes[key or "/"] = {name: _attribute(group, name) for name in group.attrs}
    for name in _names(group):
        path = f"{key}/{name}"
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise IntegrityError(f"{path}: a soft or external link, which a feature store never has")
        kind = group.get(name, getclass=True)
        if kind is h5py.Group:
            _walk(group[name], path, attributes, datasets, seen)
        elif kind is h5py.Dataset:
            _check_new(group[name], path, seen)
            datasets[path] = group[name]
            attributes[path] = {item: _attribute(group[name], item) for item in group[name].attrs}
        else:
            raise IntegrityError(f"{path}: neither a group nor a data set")


def _names(group: Any) -> list[str]:
    """Names of the links in a group, in the order in which they are stored, then sorted here.

    To sort them itself libhdf5 (up to 1.14.6) builds a table, which it frees uninitialised where a link is damaged:
    a crash (https://github.com/HDFGroup/hdf5/issues/5375).
    """
    import h5py

    names: list[bytes] = []
    group.id.links.iterate(names.append, order=h5py.h5.ITER_NATIVE)
    return sorted(name.decode("utf-8", "surrogateescape") for name in names)


def _check_new(item: Any, key: str, seen: set[int]) -> None:
    """One object under many names makes a short file endless."""
    import h5py

    address = h5py.h5o.get_info(item.id).addr
    if address in seen:
        raise IntegrityError(f"{key or '/'}: another name for an object that has one")
    seen.add(address)


def _check_objects(attributes: Mapping[str, Mapping[str, str | int]], datasets: Mapping[str, Any]) -> None:
    """No group, and no attribute, where the format has none."""
    known = {"/", *(f"/{name}" for name in ROOT_GROUPS)}
    for key in datasets:
        parts = key.split("/")
        known |= {"/".join(parts[:length]) for length in range(2, len(parts) + 1)}
    odd = sorted(set(attributes) - known)
    odd += sorted(key for key in attributes if attributes[key] and key != "/" and not key.startswith("/features/"))
    if odd:
        raise IntegrityError(f"groups or attributes that the format does not have: {', '.join(odd[:5])}")


def _attribute(owner: Any, name: str) -> str | int:
    dtype, shape = owner.attrs.get_id(name).dtype, owner.attrs.get_id(name).shape
    if shape != () or (dtype.kind != "S" and dtype != np.dtype("<i8")) or dtype.itemsize > _TEXT_ATTRIBUTE_LIMIT:
        raise IntegrityError(f"attribute {name} of {owner.name}: type {dtype.str} {shape} is not allowed")
    value = owner.attrs[name]
    return value.decode("utf-8", "surrogateescape") if dtype.kind == "S" else int(value)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever the HDF5 library or a parser says of a damaged file becomes one error that names the file."""
    try:
        yield
    except (StoreError, FormatVersionError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}. {_WAY_OUT}") from error
    except PermissionError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise IntegrityError(f"{path}: not a readable feature store ({error}). {_WAY_OUT}") from error
