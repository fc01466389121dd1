"""Weight tensors of a model under names that depend on no container, and the containers they are read from.

    file -> [(layer, [(variable, array)])] or {"layer/variable": array} -> checked against the model -> assigned

Nothing is assigned before everything fits. Containers are told apart by content, never by file name.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from features.errors import WeightsError, nearest
from features.graph import snake_case, stable_names
from features.recipe import canonical_json

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_ZIP_MAGIC = b"PK\x03\x04"
_LARGEST_MEMBER = 4 << 30  # bytes; the largest official file, ConvNeXtXLarge, has 1.4e9
CONTAINERS = ("hdf5", "keras", "npz")


def model_tensors(model: Any) -> dict[str, Any]:
    """Variables of a model by canonical name ``layer/variable``, in the order of its layers.

    Automatic layer names are numbered within the model (``features.graph.stable_names``). Inside a layer that holds
    other layers, equal variable names are told apart by their position: ``kernel``, ``kernel_1``.
    """
    named: dict[str, Any] = {}
    for name, layer in zip(stable_names(model.layers), model.layers, strict=True):
        for variable in layer.weights:
            base = f"{name}/{variable.name}"
            unique, count = base, 0
            while unique in named:
                count += 1
                unique = f"{base}_{count}"
            named[unique] = variable
    return named


def digest_of_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, shapes and numbers, sorted by name.

    Parameters
    ----------
    tensors : mapping of str to numpy.ndarray
        By canonical name. Floating point of up to 32 bits counts as little-endian float32, float64 as itself,
        everything else as int64, so that neither container nor backend matters.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = np.asarray(tensors[name])
        floating = values.dtype.kind not in "biu"  # bfloat16 has the kind "V"
        dtype = ("<f8" if values.dtype == np.float64 else "<f4") if floating else "<i8"
        digest.update(canonical_json([name, dtype, list(values.shape)]).encode("ascii") + b"\n")
        digest.update(np.ascontiguousarray(values, dtype=dtype).data)
    return digest.hexdigest()


def container_of(path: Path) -> str:
    """One of ``CONTAINERS``, from the first bytes and, for a zip archive, its members.

    Raises
    ------
    WeightsError
        If the file cannot be read or is none of them.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
        if magic == _HDF5_MAGIC:
            return "hdf5"
        if magic.startswith(_ZIP_MAGIC):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if "model.weights.h5" in names:
                return "keras"
            if names and all(name.endswith(".npy") for name in names):
                return "npz"
    except (OSError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    raise WeightsError(
        f"{path} is no weights file: expected HDF5 (.weights.h5, .h5), a Keras archive (.keras) or .npz with keys "
        f"'layer/variable', received a file of {path.stat().st_size} bytes that begins with {magic!r}"
    )


def assign_from_file(model: Any, path: Path) -> None:
    """Give every variable of ``model`` its value from a file of any known container.

    Parameters
    ----------
    model : keras.Model
        Not frozen yet.
    path : Path
        Keras 3 ``.weights.h5``, legacy ``.h5`` (order of layers, or their names where the file has more layers than
        the model), ``.keras`` (only its tensors are read, no code or configuration), or ``.npz``.

    Raises
    ------
    WeightsError
        If the file is damaged, or its tensors do not fit; the first tensor that does not is named. The model is
        then unchanged.
    """
    container = container_of(path)
    try:
        if container == "npz":
            pairs = _fit_by_name(model, read_npz(path), str(path))
        elif container == "keras":
            with zipfile.ZipFile(path) as archive:
                pairs = _fit_hdf5(model, io.BytesIO(read_member(archive, "model.weights.h5")), str(path))
        else:
            pairs = _fit_hdf5(model, path, str(path))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} is damaged: {error}. Delete it, or give another file.") from error
    for variable, values in pairs:
        variable.assign(values)
    for layer in model.layers:
        if hasattr(layer, "finalize_state"):  # Normalization derives its constants from mean and variance
            layer.finalize_state()


def is_legacy_hdf5(path: Path) -> bool:
    """Whether an HDF5 file has the structure of the official files (attribute ``layer_names``).

    Raises
    ------
    WeightsError
        If it cannot be opened, for instance because it was cut short.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return _legacy_group(file) is not None
    except OSError as error:
        raise WeightsError(f"{path} is damaged: {error}") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file by key; Python objects are refused.

    Raises
    ------
    WeightsError
        If the file is damaged or holds anything but numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            tensors = {str(name): archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    odd = [name for name, values in tensors.items() if values.dtype.kind not in "biuf"]
    if odd:
        raise WeightsError(f"{path}: {odd[0]!r} has the dtype {tensors[odd[0]].dtype}, expected numbers")
    return tensors


def write_npz(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays whole or not at all: temporary name in the same folder, fsync, rename."""
    with atomic_file(path) as file:
        np.savez(file, **dict(tensors))  # type: ignore[arg-type]  # keys are array names, none is "allow_pickle"


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """One member of a zip archive, within the size limit.

    Raises
    ------
    WeightsError
        If it is missing or declares more than 4 GiB.
    """
    if name not in archive.namelist():
        raise WeightsError(f"{archive.filename} has no member {name!r}")
    size = archive.getinfo(name).file_size
    if size > _LARGEST_MEMBER:
        raise WeightsError(f"{archive.filename}: {name!r} declares {size} bytes, more than {_LARGEST_MEMBER}")
    return archive.read(name)
