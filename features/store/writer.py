"""Write a finished file from blocks of rows: a store, an index of shards, or a shard, as FORMAT.md specifies it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from features.canonical import canonical_json
from features.errors import StoreError
from features.files import PatientFile
from features.store.schema import (
    FORMAT,
    FURTHER_COLUMNS,
    IMAGE_COLUMNS,
    PLACE,
    QUARANTINE_COLUMNS,
    SHARD_COLUMNS,
    TARGETS,
    TEXT_ATTRIBUTE_LIMIT,
    FeatureSpec,
    ImageTable,
    Quarantine,
    ShardTable,
    attribute_of,
    attributes_digest,
    block_hash,
    block_rows,
    root_groups,
    values_group,
)
from features.texts import Texts

if TYPE_CHECKING:
    import h5py


class StoreWriter:
    """Write a finished file from blocks of rows that arrive in order.

    Parameters
    ----------
    path : Path
        File to create; pass the temporary path that ``atomic_file`` yields.
    kind : {"store", "index", "shard"}
        A shard has no labels and splits, because they are assigned at assembly. An index holds no features, but
        their places in the shards.
    rows : int
        Number of rows of every feature set.
    features : mapping of str to FeatureSpec
        Feature sets by name.
    version : int
        The least format version of the file: 2 for images with a target.
    """

    def __init__(
        self, path: Path, *, kind: str, rows: int, features: Mapping[str, FeatureSpec], version: int = 1
    ) -> None:
        self._sink = PatientFile(path)
        self._file = _new_file(self._sink)
        self._rows = rows
        self._attributes: dict[str, dict[str, str | int]] = {"/": {}}
        self._open: dict[str, _HashedDataset] = {}
        with self._checked():
            for name in root_groups(kind):
                self._group(f"/{name}")
            version = max([version, *(spec.recipe.format_version for spec in features.values())])
            self._set("/", format=FORMAT, format_version=version, kind=kind)
            for name, spec in features.items():
                key = f"/{values_group(kind)}/{name}"
                dtype, shape = (PLACE, (3,)) if kind == "index" else (np.dtype(spec.recipe.dtype), spec.shape)
                dataset = self._create(key, (rows, spec.views, *shape), dtype)
                self._set(key, recipe=spec.recipe.canonical, fingerprint=spec.recipe.fingerprint)
                if kind == "index":
                    self._set(key, shape=canonical_json(list(spec.shape)))
                self._open[name] = dataset

    def append(self, name: str, block: np.ndarray) -> None:
        """Append rows to one feature set.

        Parameters
        ----------
        name : str
            Name of the feature set.
        block : float32 or float16, (k, views, ...); in the index of a sharded store int32, (k, views, 3)
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
        shards: ShardTable | None = None,
    ) -> None:
        """Write the tables, the checksums and the attributes, and close the file."""
        for dataset in self._open.values():
            if dataset.position != self._rows:
                raise StoreError(f"{dataset.key}: received {dataset.position} rows, expected {self._rows}")
        with self._checked():
            self._table("/images", IMAGE_COLUMNS, images)
            self._table("/quarantine", QUARANTINE_COLUMNS, quarantine)
            if images.columns:
                values = (images.columns[name] for name in sorted(images.columns))
                for key, texts in zip(
                    FURTHER_COLUMNS, (sorted(images.columns), [*itertools.chain(*values)]), strict=True
                ):
                    self._strings(key, texts)
            if images.target is not None:
                key = f"{TARGETS}/{images.target.name}"
                self._column(f"{key}/values", images.target.values)
                self._strings(f"{key}/columns", images.target.columns)
            if shards is not None:
                self._table("/shards", SHARD_COLUMNS, shards)
            self._strings("/classes", classes)
            self._set("/", source=source, split_rule=split_rule, provenance=canonical_json(provenance or {}))
            for dataset in list(self._open.values()):
                dataset.write_checksums(self._group)
            self._set("/", attributes_sha256=attributes_digest(self._attributes))
            self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()
        self._sink.close()

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """Close the file on any error. An error of the disk is raised instead of the one that libhdf5 makes of it."""
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
                # An empty text is stored as one NUL, because HDF5 has no string type of length 0.
                stored = np.bytes_(value.encode("utf-8", "surrogateescape") or b"\0")
                if len(stored) > TEXT_ATTRIBUTE_LIMIT:
                    raise StoreError(f"attribute {name} of {key}: {len(stored)} bytes, at most {TEXT_ATTRIBUTE_LIMIT}")
            self._file[key].attrs.create(name, stored, dtype=None if isinstance(value, str) else "<i8")
            if name != "attributes_sha256":
                self._attributes.setdefault(key, {})[name] = value

    def _create(self, key: str, shape: tuple[int, ...], dtype: np.dtype) -> _HashedDataset:
        group, _, name = key.rpartition("/")
        parent = self._group(group)
        dataset = parent.create_dataset(name, shape=shape, dtype=dtype.newbyteorder("<"), track_times=False)
        return _HashedDataset(key, dataset)

    def _group(self, key: str) -> h5py.Group:
        """Return a group, which is made if it is missing, without the times that h5py would give it."""
        import h5py

        group = self._file
        for name in filter(None, key.split("/")):
            if name not in group:
                made = h5py.h5g.create(
                    group.id, name.encode("utf-8", "surrogateescape"), gcpl=_without_times(h5py.h5p.GROUP_CREATE)
                )
                made.close()
            group = group[name]
        return group

    def _table(self, key: str, columns: Mapping[str, Any], table: ImageTable | Quarantine | ShardTable) -> None:
        for name, kind in columns.items():
            values = getattr(table, attribute_of(name))
            if values is None:
                continue
            if kind is None:
                self._strings(f"{key}/{name}", values)
            else:
                self._column(f"{key}/{name}", np.asarray(values, dtype=kind[0]).reshape(-1, *kind[1]))

    def _strings(self, key: str, values: Sequence[str]) -> None:
        texts = Texts.of(values)
        self._column(f"{key}/utf8", texts.utf8)
        self._column(f"{key}/ends", texts.ends)

    def _column(self, key: str, values: np.ndarray) -> None:
        column = self._create(key, values.shape, values.dtype)
        column.append(values)
        self._open[key] = column


class _HashedDataset:
    """An array that is written from front to back, and hashed in blocks of rows while it is written."""

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
            # In small steps, because h5py copies the data that it passes to a file object.
            self._dataset[self.position : self.position + step] = block[done : done + step]
            self._hash.update(block[done : done + step].data)
            done += step
            self.position += step
            if self.position % self._block_rows == 0:
                self._close_block()

    def _close_block(self) -> None:
        self._digests.append(self._hash.digest())
        self._hash = block_hash(self.key, self._dataset.dtype, self._dataset.shape, len(self._digests))

    def write_checksums(self, group_of: Callable[[str], h5py.Group]) -> None:
        if self.position % self._block_rows:
            self._close_block()
        digests = np.frombuffer(b"".join(self._digests), dtype="u1").reshape(-1, 32)
        group, _, name = f"/checksums{self.key}".rpartition("/")
        group_of(group).create_dataset(name, data=digests, track_times=False)


def _new_file(sink: PatientFile) -> h5py.File:
    """Create an HDF5 file without any time in it, so that the same contents give the same bytes."""
    import h5py

    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, sink)
    # With v110 every metadata structure has a checksum, so a flipped bit causes an error and not a wrong value.
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    identifier = h5py.h5f.create(
        repr(sink).encode(), h5py.h5f.ACC_EXCL, fcpl=_without_times(h5py.h5p.FILE_CREATE), fapl=access
    )
    return h5py.File(identifier)


def _without_times(kind: Any) -> Any:
    """Return a creation property list of a kind, whose objects have no times."""
    import h5py

    properties = h5py.h5p.create(kind)
    properties.set_obj_track_times(False)
    return properties
