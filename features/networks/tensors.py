"""Weight tensors of a model under names that depend on no container, and the containers they are read from.

    file -> [(layer, [(variable, array)])] or {"layer/variable": array} -> checked against the model -> assigned

Nothing is assigned before everything fits. Containers are told apart by content, never by file name.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from features.canonical import canonical_json
from features.errors import WeightsError, nearest
from features.files import whole_file
from features.networks.graph import snake_case, stable_names

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_ZIP_MAGIC = b"PK\x03\x04"
_LARGEST_MEMBER = 4 << 30  # bytes; the largest official file, ConvNeXtXLarge, has 1.4e9
_NUMBERED = re.compile(r"^variable(_\d+)?$")  # Keras numbers unnamed variables over the whole process
CONTAINERS = ("hdf5", "keras", "npz")


def model_tensors(model: Any) -> dict[str, Any]:
    """Variables of a model by canonical name ``layer/variable``, in the order of its layers.

    Automatic layer names are numbered within the model (``features.networks.graph.stable_names``), and an automatic variable
    name loses its number. Equal names inside a layer are told apart by their position: ``kernel``, ``kernel_1``.
    """
    named: dict[str, Any] = {}
    for name, layer in zip(stable_names(model.layers), model.layers, strict=True):
        for variable in layer.weights:
            base = f"{name}/{_NUMBERED.sub('variable', variable.name)}"
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
    """Write arrays by canonical name, whole or not at all (``whole_file``)."""
    with whole_file(path) as file:
        np.savez(file, **dict(tensors))  # type: ignore[arg-type]  # keys are tensor names, none is "allow_pickle"


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


Layers = list[tuple[str, list[tuple[str, np.ndarray]]]]  # what a legacy file holds, in its order


def read_legacy(path: Path | BinaryIO) -> Layers | None:
    """Layers of a legacy HDF5 file that have weights, in its order; None for a file of another structure.

    The official files are of this kind: attributes ``layer_names`` and, in each group, ``weight_names``. A whole
    legacy model keeps the same under ``model_weights``.
    """
    import h5py

    with h5py.File(path, "r") as file:
        group = _legacy_group(file)
        if group is None:
            return None
        layers = []
        for layer in _names(group, "layer_names"):
            weights = [(name, _read(group[layer], name)) for name in _names(group[layer], "weight_names")]
            if weights:
                layers.append((layer, weights))
        return layers


def _fit_hdf5(model: Any, source: Path | BinaryIO, origin: str) -> list[tuple[Any, np.ndarray]]:
    import h5py

    layers = read_legacy(source)
    if layers is not None:
        return _fit_in_order(model, layers, origin)
    with h5py.File(source, "r") as file:
        if "layers" not in file:
            raise WeightsError(
                f"{origin}: an HDF5 file without the group 'layers' of Keras 3 or the attribute 'layer_names' of "
                f"older versions; it holds {', '.join(list(file)[:5]) or 'nothing'}"
            )
        names = {id(variable): name for name, variable in model_tensors(model).items()}
        pairs = []
        for variable, place in _keras3_places(model.layers, "layers"):
            values = _read(file, place) if place in file else None
            pairs.append((variable, _checked(names[id(variable)], variable, values, f"{origin} ({place})")))
        return pairs


def _fit_by_name(model: Any, tensors: Mapping[str, np.ndarray], origin: str) -> list[tuple[Any, np.ndarray]]:
    named = model_tensors(model)
    surplus = [name for name in tensors if name not in named]
    pairs = [(variable, _checked(name, variable, tensors.get(name), origin)) for name, variable in named.items()]
    if surplus:
        raise WeightsError(f"{origin}: {surplus[0]!r} is no tensor of this backbone{nearest(surplus[0], named)}")
    return pairs


def _fit_in_order(model: Any, source: Layers, origin: str) -> list[tuple[Any, np.ndarray]]:
    """Pair layers by position, as Keras does; by name if the file has more of them (a classifier on top)."""
    names = {id(variable): name for name, variable in model_tensors(model).items()}
    targets = [layer for layer in model.layers if layer.weights]
    by_name = dict(source)
    if len(source) != len(targets) and all(layer.name in by_name for layer in targets):
        source = [(layer.name, by_name[layer.name]) for layer in targets]
    pairs = []
    for index, layer in enumerate(targets):
        received, weights = source[index] if index < len(source) else ("nothing", [])
        # legacy files list what is trained before what is counted
        for place, variable in enumerate(layer.trainable_weights + layer.non_trainable_weights):
            weight, values = weights[place] if place < len(weights) else ("nothing", None)
            where = f"{origin} (layer {index} there: {received!r}, {weight!r})"
            pairs.append((variable, _checked(names[id(variable)], variable, values, where)))
        if len(weights) > len(layer.weights):
            raise WeightsError(
                f"{origin}: layer {received!r} has {len(weights)} tensors, {layer.name!r} takes {len(layer.weights)}"
            )
    if len(source) > len(targets):
        raise WeightsError(
            f"{origin} holds {len(source)} layers with weights, this backbone has {len(targets)}; "
            f"the first one too many is {source[len(targets)][0]!r}. It belongs to another architecture."
        )
    return pairs


def _checked(name: str, variable: Any, values: np.ndarray | None, origin: str) -> np.ndarray:
    expected = tuple(int(length) for length in variable.shape)
    received = "no such tensor" if values is None else f"shape {values.shape}"
    if values is None or values.shape != expected:
        raise WeightsError(
            f"{origin} does not fit: first misfit at {name!r}, received {received}, expected shape {expected}. "
            "It belongs to another architecture or width: choose the --backbone it was made for, or other --weights."
        )
    return values


def _keras3_places(layers: Iterable[Any], prefix: str) -> Iterator[tuple[Any, str]]:
    """Every variable with its path in a Keras 3 weights file: layers are numbered by class, variables by position."""
    import keras

    counts: dict[str, int] = {}
    for layer in layers:
        word = snake_case(type(layer).__name__)
        count = counts.get(word, 0)
        counts[word] = count + 1
        place = f"{prefix}/{word}_{count}" if count else f"{prefix}/{word}"
        if isinstance(layer, keras.Model):
            yield from _keras3_places(layer.layers, f"{place}/layers")
        else:
            yield from ((variable, f"{place}/vars/{index}") for index, variable in enumerate(layer.weights))


def _legacy_group(file: Any) -> Any:
    for group in (file, file.get("model_weights")):
        if group is not None and ("layer_names" in group.attrs or "layer_names0" in group.attrs):
            return group
    return None


def _names(group: Any, attribute: str) -> Sequence[str]:
    """A list of names; Keras spreads lists beyond 64 KiB over ``name0``, ``name1``, ..."""
    if attribute in group.attrs:
        parts = [group.attrs[attribute]]
    else:
        parts = []
        while f"{attribute}{len(parts)}" in group.attrs:
            parts.append(group.attrs[f"{attribute}{len(parts)}"])
    return [name.decode("utf-8") if isinstance(name, bytes) else str(name) for part in parts for name in part]


def _read(group: Any, path: str) -> np.ndarray:
    dataset = group[path]
    if not hasattr(dataset, "dtype") or dataset.dtype.kind not in "biuf":
        raise WeightsError(f"{group.file.filename}: {path!r} is no array of numbers")
    if dataset.is_virtual or dataset.external or dataset.file.filename != group.file.filename:
        raise WeightsError(f"{group.file.filename}: {path!r} points to another file, which is not followed")
    return np.asarray(dataset[()])
