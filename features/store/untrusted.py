"""Read the structure of an untrusted HDF5 file and check it against the schema, before any value is used.

path --read_structure()--> attributes, and for every array its shape, type, offset and block checksums
structure --check_tables()--> number of rows            structure --read_recipes()--> recipes of the feature sets
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from features.errors import FormatVersionError, IntegrityError, StoreError
from features.recipe import Recipe
from features.store.schema import (
    FORMAT,
    FORMAT_VERSIONS,
    FURTHER_COLUMNS,
    IMAGE_COLUMNS,
    OPTIONAL_COLUMNS,
    PLACE,
    QUARANTINE_COLUMNS,
    ROOT_ATTRIBUTES,
    SHARD_COLUMNS,
    TARGET_TYPES,
    TARGETS,
    TEXT_ATTRIBUTE_LIMIT,
    attributes_digest,
    block_rows,
    root_groups,
    values_group,
)

if TYPE_CHECKING:
    import h5py

_ROW_LIMIT = 1 << 40  # values in one row, even of an array without rows
WAY_OUT = "Move the file away and extract again; no row of it is used."


@dataclasses.dataclass(frozen=True)
class Structure:
    """The structure of a file. The caller closes ``descriptor``, which is -1 if the file was not kept open."""

    root: Mapping[str, str | int]
    attributes: Mapping[str, Mapping[str, str | int]]
    attributes_digest: str
    entries: Mapping[str, Entry]
    descriptor: int


def read_structure(path: Path, kinds: Sequence[str], *, keep_open: bool) -> Structure:
    """Check the structure of a file, but not its values.

    Parameters
    ----------
    path : Path
        The file.
    kinds : sequence of {"store", "index", "shard"}
        The kinds that are accepted.
    keep_open : bool
        Keep the file open, so that its rows stay the same when a writer replaces it. Shards are not kept open: they
        never change, and there may be more of them than a process may open.

    Raises
    ------
    IntegrityError, FormatVersionError
        If the file does not follow FORMAT.md.
    """
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        handle = file.id.get_vfd_handle()
        size = os.fstat(handle).st_size
        _check_version(path, file)
        attributes: dict[str, dict[str, str | int]] = {}
        datasets: dict[str, h5py.h5d.DatasetID] = {}
        _walk(h5py.h5g.open(file.id, b"/"), "", attributes, datasets, set())
        root = attributes["/"]
        stated = root.pop("attributes_sha256", None)
        if stated != attributes_digest(attributes):
            raise IntegrityError("the attributes are not what was written (attributes_sha256 differs)")
        if sorted({*root, "attributes_sha256"}) != sorted(ROOT_ATTRIBUTES) or root["kind"] not in kinds:
            raise IntegrityError(
                f"root attributes: received kind {root.get('kind')!r}, expected {' or '.join(map(repr, kinds))}"
            )
        _check_objects(str(root["kind"]), attributes, datasets)
        checksums = {key.removeprefix("/checksums"): datasets.pop(key) for key in list(datasets) if _is_checksum(key)}
        if set(checksums) != set(datasets):
            odd = sorted(set(checksums) ^ set(datasets))
            raise IntegrityError(f"arrays without a checksum, or checksums without an array: {', '.join(odd[:5])}")
        entries = {key: Entry.read(key, data, checksums[key], size) for key, data in datasets.items()}
        return Structure(root, attributes, str(stated), entries, os.dup(handle) if keep_open else -1)


def _check_version(path: Path, file: h5py.File) -> None:
    import h5py

    found = {}
    for name in ("format", "format_version"):
        found[name] = _attribute(file.id, "/", name.encode()) if h5py.h5a.exists(file.id, name.encode()) else None
    if found["format"] != FORMAT:
        raise IntegrityError(f"not a feature store (format is {found['format']!r}, expected {FORMAT!r})")
    if found["format_version"] not in FORMAT_VERSIONS:
        raise FormatVersionError(
            f"{path}: format version {found['format_version']} is not known to this release, which reads "
            f"versions {' and '.join(map(str, FORMAT_VERSIONS))}. Install a newer bottleneck-features, or extract again into another file."
        )


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one contiguous array lies in the file, and the checksums of its blocks."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    digests: np.ndarray

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @classmethod
    def read(cls, key: str, dataset: h5py.h5d.DatasetID, checksum: h5py.h5d.DatasetID, file_size: int) -> Entry:
        import h5py

        shape, dtype, offset = _checked_storage(key, dataset, file_size)
        blocks = -(-shape[0] // block_rows(shape, dtype))
        sum_shape, sum_dtype, _ = _checked_storage(f"/checksums{key}", checksum, file_size)
        if sum_shape != (blocks, 32) or sum_dtype != np.dtype("u1"):
            raise IntegrityError(f"/checksums{key}: received {sum_shape}, expected {(blocks, 32)}")
        digests = np.zeros(sum_shape, "u1")
        if blocks:
            checksum.read(h5py.h5s.ALL, h5py.h5s.ALL, digests)
        return cls(shape, dtype, offset, digests)


def _checked_storage(key: str, dataset: h5py.h5d.DatasetID, file_size: int) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape, dtype and file offset of an array that lies wholly inside this file, contiguous and unfiltered."""
    import h5py

    properties, extent = dataset.get_create_plist(), dataset.shape
    if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count() or extent is None:
        raise IntegrityError(f"{key}: not a contiguous array of this file (chunked, virtual, external or empty)")
    dtype = dataset.dtype
    if dtype.kind not in "uif" or dtype.hasobject:
        raise IntegrityError(f"{key}: element type {dtype.str} is not allowed")
    if not extent:
        raise IntegrityError(f"{key}: received a scalar, expected rows")
    shape = tuple(int(length) for length in extent)
    if (shape[0] and 0 in shape[1:]) or math.prod(max(1, length) for length in shape[1:]) > _ROW_LIMIT:
        raise IntegrityError(
            f"{key}: received shape {shape}, expected rows of at least one value and at most {_ROW_LIMIT}"
        )
    declared = dtype.itemsize * math.prod(shape)  # Python integers, so that the product does not overflow
    offset = dataset.get_offset()
    if declared and (offset is None or offset + declared > file_size or dataset.get_storage_size() != declared):
        raise IntegrityError(f"{key}: declares {declared} bytes, which the file of {file_size} bytes does not hold")
    return shape, dtype, int(offset or 0)


def _is_checksum(key: str) -> bool:
    return key.startswith("/checksums/")


def _walk(
    group: h5py.h5g.GroupID,
    key: str,
    attributes: dict[str, dict[str, str | int]],
    datasets: dict[str, Any],
    seen: set[int],
) -> None:
    """Collect attributes and arrays. Only hard links are followed, to a limited depth, and each object only once.

    The low-level interface of h5py reads a store of 20 arrays in half the time that the usual one needs.
    """
    import h5py

    if key.count("/") > 4:
        raise IntegrityError(f"{key}: groups are nested more deeply than the format allows")
    _check_new(group, key, seen)
    attributes[key or "/"] = _attributes(group, key or "/")
    for link in _names(group):
        path = f"{key}/{link.decode('utf-8', 'surrogateescape')}"
        if group.links.get_info(link).type != h5py.h5l.TYPE_HARD:
            raise IntegrityError(f"{path}: a soft or external link, which a feature store never has")
        item = h5py.h5o.open(group, link)
        if isinstance(item, h5py.h5g.GroupID):
            _walk(item, path, attributes, datasets, seen)
        elif isinstance(item, h5py.h5d.DatasetID):
            _check_new(item, path, seen)
            datasets[path] = item
            attributes[path] = _attributes(item, path)
        else:
            raise IntegrityError(f"{path}: neither a group nor an array")


def _names(group: h5py.h5g.GroupID) -> list[bytes]:
    """Return the names of the links in a group, read in the order in which they are stored and sorted here.

    If libhdf5 (up to 1.14.6) sorts them, it builds a table, and it crashes when it frees this table uninitialised
    after it met a damaged link (https://github.com/HDFGroup/hdf5/issues/5375).
    """
    import h5py

    names: list[bytes] = []
    group.links.iterate(names.append, order=h5py.h5.ITER_NATIVE)
    return sorted(names)


def _check_new(item: Any, key: str, seen: set[int]) -> None:
    """Refuse a second name for an object: one object under many names makes a short file endless."""
    import h5py

    address = h5py.h5o.get_info(item).addr
    if address in seen:
        raise IntegrityError(f"{key or '/'}: a second name for the same object")
    seen.add(address)


def _check_objects(kind: str, attributes: Mapping[str, Mapping[str, str | int]], datasets: Mapping[str, Any]) -> None:
    """Refuse groups and attributes that the format does not have."""
    known = {"/", *(f"/{name}" for name in root_groups(kind))}
    for key in datasets:
        parts = key.split("/")
        known |= {"/".join(parts[:length]) for length in range(2, len(parts) + 1)}
    odd = sorted(set(attributes) - known)
    values = f"/{values_group(kind)}/"
    odd += sorted(key for key in attributes if attributes[key] and key != "/" and not key.startswith(values))
    if odd:
        raise IntegrityError(f"groups or attributes that the format does not have: {', '.join(odd[:5])}")


def _attributes(owner: Any, key: str) -> dict[str, str | int]:
    import h5py

    names: list[bytes] = []
    h5py.h5a.iterate(owner, lambda name, *_: names.append(name))
    return {name.decode("utf-8", "surrogateescape"): _attribute(owner, key, name) for name in names}


def _attribute(owner: Any, key: str, name: bytes) -> str | int:
    import h5py

    attribute = h5py.h5a.open(owner, name)
    dtype, shape = attribute.dtype, attribute.shape
    if shape != () or (dtype.kind != "S" and dtype != np.dtype("<i8")) or dtype.itemsize > TEXT_ATTRIBUTE_LIMIT:
        raise IntegrityError(
            f"attribute {name.decode(errors='replace')} of {key}: type {dtype.str} {shape} is not allowed"
        )
    value = np.zeros((), dtype)
    attribute.read(value)
    return bytes(value.item()).decode("utf-8", "surrogateescape") if dtype.kind == "S" else int(value)


def check_tables(structure: Structure) -> int:
    """Check the arrays of all tables against the schema, and return the number of images (rows)."""
    kind, entries = str(structure.root["kind"]), structure.entries
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    shards = {"/shards": SHARD_COLUMNS} if kind == "index" else {}
    known = {"/images": IMAGE_COLUMNS, "/quarantine": QUARANTINE_COLUMNS, **shards}
    for group, columns in known.items():
        for name, column in columns.items():
            key = f"{group}/{name}"
            if column is not None:
                expected[key] = column
            elif key not in OPTIONAL_COLUMNS or f"{key}/ends" in entries:
                expected |= {f"{key}/utf8": ("u1", ()), f"{key}/ends": ("<i8", ())}
    further = FURTHER_COLUMNS if f"{FURTHER_COLUMNS[0]}/ends" in entries else ()
    for key in ("/classes", *further):
        expected |= {f"{key}/utf8": ("u1", ()), f"{key}/ends": ("<i8", ())}
    if "/images/version/ends" in entries and (kind == "shard" or structure.root["format_version"] == 1):
        raise IntegrityError(f"/images/version: received in a {kind} of version 1, expected in a store of version 2")
    targets = _check_target(structure)
    tables = {key for key in entries if not key.startswith(f"/{values_group(kind)}/")} - targets
    if tables != set(expected):
        raise IntegrityError(f"unknown or missing arrays: {', '.join(sorted(tables ^ set(expected))[:5])}")
    counts: dict[str, set[int]] = {group: set() for group in known}
    for key, (dtype, tail) in expected.items():
        entry = entries[key]
        if entry.dtype != np.dtype(dtype) or entry.shape[1:] != tail:
            raise IntegrityError(f"{key}: received {entry.dtype.str} {entry.shape}, expected {dtype} (n, {tail})")
        if not key.endswith("/utf8") and not key.startswith(("/classes", "/columns")):
            counts["/" + key.split("/")[1]].add(entry.shape[0])
    for group, lengths in counts.items():
        if len(lengths) != 1:
            raise IntegrityError(f"{group}: columns of different lengths {sorted(lengths)}")
    rows = counts["/images"].pop()
    for key in targets:
        if key.endswith("/values") and entries[key].shape[0] != rows:
            raise IntegrityError(f"{key}: has {entries[key].shape[0]} rows, expected {rows}")
    return rows


def _check_target(structure: Structure) -> set[str]:
    """Check the arrays of the target, and return their paths; empty if there is none."""
    found = {key for key in structure.entries if key.startswith(f"{TARGETS}/")}
    if not found:
        return found
    names = {key.split("/")[2] for key in found}
    expected = {f"{TARGETS}/{name}/{part}" for name in names for part in ("values", "columns/utf8", "columns/ends")}
    kind, version = structure.root["kind"], structure.root["format_version"]
    if len(names) != 1 or found != expected or kind == "shard" or version == 1:
        raise IntegrityError(
            f"{TARGETS}: received {', '.join(sorted(found)[:5])} in a {kind} of version {version}, expected the values and "
            "columns of one target, in a store of version 2"
        )
    for key in found:
        entry = structure.entries[key]
        if key.endswith("/values"):
            good = len(entry.shape) == 2 and entry.dtype in TARGET_TYPES
        else:
            good = len(entry.shape) == 1 and entry.dtype == np.dtype("u1" if key.endswith("/utf8") else "<i8")
        if not good:
            raise IntegrityError(f"{key}: received {entry.dtype.str} {entry.shape}")
    return found


def read_recipes(structure: Structure, rows: int) -> tuple[dict[str, Recipe], dict[str, tuple[int, ...]]]:
    """Read the recipe of every feature set and, from an index, the shape of one view of one image."""
    kind = str(structure.root["kind"])
    recipes, row_shapes = dict[str, Recipe](), dict[str, tuple[int, ...]]()
    group, extra = f"/{values_group(kind)}/", ["shape"] if kind == "index" else []
    for key, entry in structure.entries.items():
        if not key.startswith(group):
            continue
        values = structure.attributes.get(key, {})
        if sorted(values) != ["fingerprint", "recipe", *extra]:
            raise IntegrityError(f"{key}: attributes {sorted(values)}, expected fingerprint and recipe")
        recipe = Recipe.from_dict(json.loads(str(values["recipe"])))
        name = key.removeprefix(group)
        if (recipe.canonical, recipe.fingerprint, recipe.name) != (values["recipe"], values["fingerprint"], name):
            raise IntegrityError(f"{key}: the fingerprint or the name does not match its recipe")
        if recipe.format_version > int(structure.root["format_version"]):
            raise IntegrityError(f"{key}: its recipe needs format version {recipe.format_version}")
        dtype = PLACE if kind == "index" else np.dtype(recipe.dtype)
        if entry.dtype != dtype or len(entry.shape) < 3 or entry.shape[0] != rows or not entry.shape[1]:
            raise IntegrityError(f"{key}: received {entry.dtype.str} {entry.shape}, expected {dtype} and {rows} rows")
        if kind == "index":
            row_shapes[name] = _row_shape(key, entry.shape, str(values["shape"]))
        recipes[name] = recipe
    if not recipes:
        raise IntegrityError(f"{group[:-1]}: no feature set")
    return recipes, row_shapes


def _row_shape(key: str, places: tuple[int, ...], text: str) -> tuple[int, ...]:
    """Return the shape of one view of one image, as an index states it."""
    shape = json.loads(text)
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise IntegrityError(f"{key}: attribute shape is {text[:40]}, expected positive lengths")
    if places[2:] != (3,):
        raise IntegrityError(f"{key}: received the shape {places}, expected (images, views, 3)")
    return tuple(shape)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error of the HDF5 library or of a parser into a ``StoreError`` that names the file and the way out."""
    try:
        yield
    except (StoreError, FormatVersionError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}. {WAY_OUT}") from error
    except PermissionError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        if "file signature not found" in str(error):
            raise IntegrityError(
                f"{path}: not a readable feature store, nor any HDF5 file. Give the file that bottleneck extract wrote "
                "(for --out a name that is free); if this was it, it is damaged: move it away and extract again"
            ) from error
        raise IntegrityError(f"{path}: not a readable feature store ({error}). {WAY_OUT}") from error
