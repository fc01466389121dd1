"""The schema of a store as FORMAT.md specifies it: tables, column types and block checksums. No HDF5 is used here."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from features.canonical import canonical_json
from features.recipe import Recipe
from features.targets import TYPES, Target
from features.texts import Texts

FORMAT = "bottleneck-features"
FORMAT_VERSIONS = (1, 2)  # that are read; a file is written with the lowest that allows its recipes and targets
CHECKSUM_BLOCK_BYTES = 1 << 20  # rows are hashed in blocks of about this size
TEXT_ATTRIBUTE_LIMIT = 60_000  # bytes; larger attributes would not fit into the object header
PLACE = np.dtype("<i4")  # a place is three such numbers: shard, row, position on the shard's view axis
_STEP = 1 << 16  # rows that are hashed at a time

_ARRAYS = ("sha256", "labels", "splits", "widths", "heights", "sizes", "mtimes_ns")  # of `ImageTable`


@dataclasses.dataclass(frozen=True)
class ImageTable:
    """What is known about each image: one entry per row of every feature set, in row order.

    Parameters
    ----------
    paths : sequence of str
        Path inside the source, with ``/`` between folders; of a store, a ``Texts``, which makes each when it is asked for.
    sha256 : uint8, (n, 32)
        Hash of the bytes that were decoded.
    labels : int32, (n,)
        Index into the classes, -1 for unlabelled.
    splits : int8, (n,)
        Index into ``features.sources.scan.SPLITS``.
    groups : tuple of str or None
        Group of each image, if the source has groups.
    widths, heights : int32, (n,)
        Size of the decoded image in pixels, after its orientation was applied and before resizing.
    sizes : int64, (n,)
        File size in bytes.
    mtimes_ns : int64, (n,)
        Modification time in nanoseconds since 1970.
    columns : mapping of str to tuple of str, length n
        Further columns of the source, by name.
    target : Target, optional
        What is to be predicted where it is not one class: the labels are then all -1.
    versions : tuple of str, optional
        What the store of each image calls its version, such as an ETag; empty where it says none or the image is a file.
    """

    paths: Sequence[str]
    sha256: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    groups: tuple[str, ...] | None
    widths: np.ndarray
    heights: np.ndarray
    sizes: np.ndarray
    mtimes_ns: np.ndarray
    columns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    target: Target | None = None
    versions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def format_version(self) -> int:
        """Lowest version of the store's format that has a place for this table; see FORMAT.md."""
        return 1 if self.target is None and self.versions is None else 2

    @property
    def strata(self) -> np.ndarray:
        """A number for rows that are alike, int32, (n,), -1 for unlabelled: the label, or `Target.strata`."""
        return self.labels if self.target is None else self.target.strata

    def some(self, rows: np.ndarray) -> ImageTable:
        """Return some rows, int64 (k,), in that order."""
        return ImageTable(
            paths=Texts.of(self.paths).some(rows),
            groups=None if self.groups is None else tuple(map(self.groups.__getitem__, rows.tolist())),
            columns={name: tuple(map(values.__getitem__, rows.tolist())) for name, values in self.columns.items()},
            target=None if self.target is None else self.target.some(rows),
            versions=None if self.versions is None else tuple(map(self.versions.__getitem__, rows.tolist())),
            **{name: getattr(self, name)[rows] for name in _ARRAYS},
        )


@dataclasses.dataclass(frozen=True)
class Quarantine:
    """Images that could not be read: path, hash of the bytes (zeros if there were none), reason, size and time."""

    paths: tuple[str, ...]
    sha256: np.ndarray
    reasons: tuple[str, ...]
    sizes: np.ndarray
    mtimes_ns: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def some(self, rows: np.ndarray) -> Quarantine:
        """Return some images, int64 (k,), in that order."""
        return Quarantine(
            tuple(map(self.paths.__getitem__, rows.tolist())),
            self.sha256[rows],
            tuple(map(self.reasons.__getitem__, rows.tolist())),
            self.sizes[rows],
            self.mtimes_ns[rows],
        )


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Recipe and shape of one feature set, an array ``(rows, views, *shape)`` of ``recipe.dtype``."""

    recipe: Recipe
    views: int
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ShardTable:
    """The shards to which an index refers: the name and the ``FeatureStore.digest`` of each."""

    names: tuple[str, ...]
    digests: np.ndarray


# Column name -> (dtype, trailing shape); None stands for a list of strings.
IMAGE_COLUMNS: dict[str, tuple[str, tuple[int, ...]] | None] = {
    "path": None,
    "sha256": ("u1", (32,)),
    "label": ("<i4", ()),
    "split": ("i1", ()),
    "group": None,
    "width": ("<i4", ()),
    "height": ("<i4", ()),
    "size": ("<i8", ()),
    "mtime_ns": ("<i8", ()),
    "version": None,
}
QUARANTINE_COLUMNS: dict[str, tuple[str, tuple[int, ...]] | None] = {
    "path": None,
    "sha256": ("u1", (32,)),
    "reason": None,
    "size": ("<i8", ()),
    "mtime_ns": ("<i8", ()),
}
SHARD_COLUMNS: dict[str, tuple[str, tuple[int, ...]] | None] = {"name": None, "digest": ("u1", (32,))}
# Names of the further columns, and their values, one column after the other.
FURTHER_COLUMNS = ("/columns/name", "/columns/value")
OPTIONAL_COLUMNS = {"/images/group", "/images/version"}
TARGETS = "/targets"  # the group that holds one group for the target, with its values and the names of its columns
TARGET_TYPES = tuple(TYPES.values())
ROOT_ATTRIBUTES = ("attributes_sha256", "format", "format_version", "kind", "provenance", "source", "split_rule")


def digest_rows(digests: Iterable[bytes]) -> np.ndarray:
    """Return digests of 32 bytes each as one array, uint8, (n, 32)."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def values_group(kind: str) -> str:
    """Return the name of the group that holds the features or, in an index, their places."""
    return "places" if kind == "index" else "features"


def root_groups(kind: str) -> tuple[str, ...]:
    """Return the names of the groups directly under the root of a store, an index or a shard."""
    shards = ("shards",) if kind == "index" else ()
    return (values_group(kind), *shards, "images", "classes", "quarantine", "checksums")


def data_digest(
    classes: Sequence[str], sha256: np.ndarray, labels: np.ndarray, splits: np.ndarray, target: Target | None = None
) -> str:
    """Return the sha256 of the classes and of each row's content hash, label and split: it identifies training data.

    A target adds its task, its columns and its values.
    """
    digest = hashlib.sha256(canonical_json(list(classes)).encode("ascii"))
    for column in (sha256, labels.astype("<i4"), splits.astype("i1")):
        for start in range(0, len(column), _STEP):
            digest.update(np.ascontiguousarray(column[start : start + _STEP]).tobytes())
    if target is not None:
        digest.update(canonical_json([target.task, list(target.columns)]).encode("ascii"))
        digest.update(np.ascontiguousarray(target.values).tobytes())
    return digest.hexdigest()


def block_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the number of rows in one block of an array."""
    return max(1, CHECKSUM_BLOCK_BYTES // max(1, dtype.itemsize * math.prod(shape[1:])))


def block_hash(key: str, dtype: np.dtype, shape: tuple[int, ...], block: int) -> Any:
    """Start the hash of one block. It covers the block's place too, so that exchanged blocks or arrays are detected."""
    return hashlib.sha256(f"{key}|{dtype.str}|{list(shape)}|{block}|".encode("utf-8", "surrogateescape"))


def attributes_digest(attributes: Mapping[str, Mapping[str, str | int]]) -> str:
    """Return the hexadecimal sha256 of all attributes, given as ``{object path: {name: value}}``."""
    plain = {key: dict(values) for key, values in attributes.items() if values}
    return hashlib.sha256(canonical_json(plain).encode("ascii")).hexdigest()


def attribute_of(column: str) -> str:
    """Return the attribute of ``ImageTable``, ``Quarantine`` or ``ShardTable`` that holds a column: its plural."""
    return {"sha256": "sha256", "mtime_ns": "mtimes_ns"}.get(column, f"{column}s")
