"""Read weights files of all kinds, and name the tensors of a model independently of the kind of file.

    file -> [(layer, [(variable, stored)])] or {"layer/variable": stored} -> check against the model -> read, assign

Files are untrusted. A stored tensor is read only if it has the shape that the model needs, and tensors are assigned
only after all of them fit. In HDF5 only hard links to values inside the same file are followed. The kind of file is
recognised by its content, never by its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from features.canonical import canonical_json
from features.errors import WeightsError, nearest
from features.files import whole_file
from features.networks.graph import snake_case, stable_names
from features.networks.torchfile import DESCRIPTION, LEGACY_MAGIC, StoredTensor, torch_tensors

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_ZIP_MAGIC = b"PK\x03\x04"
_LARGEST_MEMBER = 4 << 30  # bytes; the largest official file, that of ConvNeXtXLarge, has 1.4e9
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_NUMBERED = re.compile(r"^variable(_\d+)?$")  # Keras numbers unnamed variables over the whole process


def model_tensors(model: Any) -> dict[str, Any]:
    """Return the variables of a model by canonical name, ``layer/variable``, in the order of its layers.

    Automatic layer names are numbered within the model (``features.networks.graph.stable_names``), and automatic
    variable names lose their number. Equal names inside a layer are numbered: ``kernel``, ``kernel_1``.
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
    """Compute the sha256 over names, shapes and values, sorted by name.

    Parameters
    ----------
    tensors : mapping of str to numpy.ndarray
        Arrays by canonical name. Floating-point values of up to 32 bits are hashed as little-endian float32, float64
        as float64 and everything else as int64, so neither the kind of file nor the backend matters.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = np.asarray(tensors[name])
        floating = values.dtype.kind not in "biu"  # the kind of bfloat16 is "V"
        dtype = ("<f8" if values.dtype == np.float64 else "<f4") if floating else "<i8"
        digest.update(canonical_json([name, dtype, list(values.shape)]).encode("ascii") + b"\n")
        digest.update(np.ascontiguousarray(values, dtype=dtype).data)
    return digest.hexdigest()


def container_of(path: Path) -> str:
    """Recognise a weights file by its first bytes and, in a zip archive, its members: ``hdf5``, ``keras``, ``npz``, ``torch``.

    Raises
    ------
    WeightsError
        If the file cannot be read or is of another kind.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(len(LEGACY_MAGIC))
        if magic.startswith(_HDF5_MAGIC):
            return "hdf5"
        if magic == LEGACY_MAGIC:
            return "torch"
        if magic.startswith(_ZIP_MAGIC):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if "model.weights.h5" in names:
                return "keras"
            if names and all(name.endswith(".npy") for name in names):
                return "npz"
            if any(name.endswith(f"/{DESCRIPTION}") for name in names):
                return "torch"
    except (OSError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    raise WeightsError(
        f"{path} is not a weights file: expected HDF5 (.weights.h5, .h5), a Keras archive (.keras), .npz with keys "
        f"'layer/variable' or a PyTorch file (.pth), received a file of {path.stat().st_size} bytes that begins with {magic[:8]!r}"
    )


def _not_from_torch(_: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    raise WeightsError("a PyTorch file does not fit this network; expected HDF5, a Keras archive or .npz")


def assign_from_file(
    model: Any,
    path: Path,
    from_torch: Callable[[Mapping[str, StoredTensor]], dict[str, StoredTensor]] = _not_from_torch,
) -> None:
    """Assign to every variable of ``model`` its value from a weights file of any known kind.

    Parameters
    ----------
    model : keras.Model
        A model that is not frozen yet.
    path : Path
        Keras 3 ``.weights.h5``; legacy ``.h5`` (layers are matched by order, or by name if the file has more layers
        than the model); ``.keras`` (only its tensors are read, no code or configuration); ``.npz``; or a state dict of
        PyTorch.
    from_torch : callable
        Gives the tensors of a state dict their canonical names and axes; ``features.networks.backbones.Backbone.from_torch``.

    Raises
    ------
    WeightsError
        If the file is damaged, or its tensors do not fit; the message names the first one that does not. The model
        then remains unchanged.
    """
    container = container_of(path)
    try:
        if container == "npz":
            with _stored_npz(path) as tensors:
                pairs = _fit_by_name(model, tensors, str(path))
        elif container == "torch":
            with open(path, "rb") as file:
                pairs = _fit_by_name(model, from_torch(torch_tensors(file, str(path))), str(path))
        elif container == "keras":
            with zipfile.ZipFile(path) as archive:
                pairs = _fit_hdf5(model, io.BytesIO(read_member(archive, "model.weights.h5")), str(path))
        else:
            pairs = _fit_hdf5(model, path, str(path))
    except _DAMAGED as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is damaged: {error}. Delete it, or use another file.") from error
    for variable, values in pairs:
        variable.assign(values)
    for layer in model.layers:
        if hasattr(layer, "finalize_state"):  # Normalization computes its constants from mean and variance
            layer.finalize_state()


def is_legacy_hdf5(path: Path) -> bool:
    """Whether an HDF5 file is structured like the official files, with an attribute ``layer_names``.

    Raises
    ------
    WeightsError
        If the file cannot be opened, for instance because it is truncated.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return _legacy_group(file, str(path)) is not None
    except OSError as error:
        raise WeightsError(f"{path} is damaged: {error}") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an ``.npz`` file, by key; Python objects are refused.

    Raises
    ------
    WeightsError
        If the file is damaged, contains anything but numbers, or an array that is not as long as it declares.
    """
    with _stored_npz(path) as tensors:
        return {name: stored[()] for name, stored in tensors.items()}


@dataclasses.dataclass(frozen=True)
class _StoredArray:
    """An array in a zip archive that has not been read yet; ``stored[()]`` reads it, as of an HDF5 dataset."""

    archive: zipfile.ZipFile
    member: zipfile.ZipInfo
    shape: tuple[int, ...]

    def __getitem__(self, everything: Any) -> np.ndarray:
        with self.archive.open(self.member) as stream:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


@contextlib.contextmanager
def _stored_npz(path: Path) -> Iterator[dict[str, _StoredArray]]:
    """Open an ``.npz`` file and read the headers of its arrays, which must be numbers of the declared length."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield {
                member.filename.removesuffix(".npy"): _stored_array(archive, member, path)
                for member in archive.infolist()
            }
    except _DAMAGED as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is damaged: {error}") from error


def _stored_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> _StoredArray:
    with archive.open(member) as stream:
        shape, _, dtype = _NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
        declared = stream.tell() + dtype.itemsize * math.prod(shape)
    if dtype.kind not in "biuf":
        raise WeightsError(f"{path}: {member.filename!r} has the dtype {dtype}, expected numbers")
    if declared != member.file_size:
        raise WeightsError(
            f"{path} is damaged: {member.filename!r} declares {declared} bytes (shape {shape}), its member {member.file_size}"
        )
    return _StoredArray(archive, member, shape)


def write_npz(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays by canonical name to an ``.npz`` file, completely or not at all (``whole_file``)."""
    with whole_file(path) as file:
        np.savez(file, **dict(tensors))  # type: ignore[arg-type]  # keys are tensor names, none is "allow_pickle"


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read one member of a zip archive.

    Raises
    ------
    WeightsError
        If the member is missing or its declared size is over 4 GiB.
    """
    if name not in archive.namelist():
        raise WeightsError(f"{archive.filename} has no member {name!r}")
    size = archive.getinfo(name).file_size
    if size > _LARGEST_MEMBER:
        raise WeightsError(f"{archive.filename}: {name!r} declares {size} bytes, at most {_LARGEST_MEMBER} are allowed")
    return archive.read(name)


Layers = list[tuple[str, list[tuple[str, Any]]]]  # layers of a legacy file in its order: (variable, stored tensor)


def _fit_hdf5(model: Any, source: Path | BinaryIO, origin: str) -> list[tuple[Any, np.ndarray]]:
    import h5py

    with h5py.File(source, "r") as file:
        group = _legacy_group(file, origin)
        if group is not None:
            return _fit_in_order(model, _legacy_layers(group, origin), origin)
        layers = _inside(file, "layers", origin)
        if not isinstance(layers, h5py.Group):
            raise WeightsError(
                f"{origin}: expected an HDF5 file with the group 'layers' (Keras 3) or the attribute 'layer_names' "
                f"(older versions), received one that contains {', '.join(list(file)[:5]) or 'nothing'}"
            )
        names = {id(variable): name for name, variable in model_tensors(model).items()}
        pairs = []
        # The network may be a layer of the model that was saved, as in a classifier built around it.
        prefixes = ["layers", *(f"layers/{name}/layers" for name in sorted(layers) if name.isidentifier())]
        _, first = next(_keras3_places(model.layers, ""), (None, ""))
        prefix = next((prefix for prefix in prefixes if _inside(file, prefix + first, origin) is not None), "layers")
        for variable, place in _keras3_places(model.layers, prefix):
            stored = _stored(file, place, origin)
            pairs.append((variable, _checked(names[id(variable)], variable, stored, f"{origin} ({place})")))
        return pairs


def _legacy_layers(group: Any, origin: str) -> Layers:
    """List the layers with weights of a legacy HDF5 file, in its order.

    The official files have an attribute ``layer_names`` and, in the group of each layer, an attribute ``weight_names``.
    In the file of a whole legacy model, the same is found in the group ``model_weights``.
    """
    import h5py

    layers = []
    for layer in _names(group, "layer_names"):
        inner = _inside(group, layer, origin)
        if not isinstance(inner, h5py.Group):
            raise WeightsError(f"{origin} is damaged: it has no group for its layer {layer!r}")
        weights = [(name, _stored(inner, name, origin)) for name in _names(inner, "weight_names")]
        if weights:
            layers.append((layer, weights))
    return layers


def _fit_by_name(model: Any, tensors: Mapping[str, Any], origin: str) -> list[tuple[Any, np.ndarray]]:
    named = model_tensors(model)
    surplus = [name for name in tensors if name not in named]
    pairs = [(variable, _checked(name, variable, tensors.get(name), origin)) for name, variable in named.items()]
    if surplus:
        raise WeightsError(f"{origin}: {surplus[0]!r} is not a tensor of this network{nearest(surplus[0], named)}")
    return pairs


def _fit_in_order(model: Any, source: Layers, origin: str) -> list[tuple[Any, np.ndarray]]:
    """Match layers by position, as Keras does; by name if the file has more of them (such as a classifier)."""
    names = {id(variable): name for name, variable in model_tensors(model).items()}
    targets = [layer for layer in model.layers if layer.weights]
    by_name = dict(source)
    if len(source) != len(targets) and all(layer.name in by_name for layer in targets):
        source = [(layer.name, by_name[layer.name]) for layer in targets]
    pairs = []
    for index, layer in enumerate(targets):
        received, weights = source[index] if index < len(source) else ("nothing", [])
        # legacy files list the trainable weights before the non-trainable ones
        for place, variable in enumerate(layer.trainable_weights + layer.non_trainable_weights):
            weight, stored = weights[place] if place < len(weights) else ("nothing", None)
            where = f"{origin} (layer {index} in the file: {received!r}, {weight!r})"
            pairs.append((variable, _checked(names[id(variable)], variable, stored, where)))
        if len(weights) > len(layer.weights):
            raise WeightsError(
                f"{origin}: layer {received!r} has {len(weights)} tensors, {layer.name!r} needs {len(layer.weights)}. If it is "
                f"a network inside a model, save it alone: model.get_layer({received!r}).save_weights('NAME.weights.h5')"
            )
    if len(source) > len(targets):
        raise WeightsError(
            f"{origin} contains {len(source)} layers with weights, this network has {len(targets)}; "
            f"the first surplus one is {source[len(targets)][0]!r}. The file belongs to another architecture."
        )
    return pairs


def _checked(name: str, variable: Any, stored: Any, origin: str) -> np.ndarray:
    """Read a stored tensor, which has a ``shape``, if it has the shape of the variable; None stands for a missing one."""
    expected = tuple(int(length) for length in variable.shape)
    received = "no such tensor" if stored is None else f"shape {stored.shape}"
    if stored is None or stored.shape != expected:
        raise WeightsError(
            f"{origin} does not fit: the first mismatch is {name!r}, received {received}, expected shape {expected}. "
            "The file belongs to another architecture or width: choose the --backbone it was made for, or other --weights."
        )
    return np.asarray(stored[()])


def _keras3_places(layers: Iterable[Any], prefix: str) -> Iterator[tuple[Any, str]]:
    """Yield every variable with its path in a Keras 3 weights file: layers are numbered by class, variables by place."""
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


def _legacy_group(file: Any, origin: str) -> Any:
    for group in (file, _inside(file, "model_weights", origin)):
        if group is not None and ("layer_names" in group.attrs or "layer_names0" in group.attrs):
            return group
    return None


def _names(group: Any, attribute: str) -> Sequence[str]:
    """Read a list of names; Keras splits lists over 64 KiB into the attributes ``name0``, ``name1``, ..."""
    if attribute in group.attrs:
        parts = [group.attrs[attribute]]
    else:
        parts = []
        while f"{attribute}{len(parts)}" in group.attrs:
            parts.append(group.attrs[f"{attribute}{len(parts)}"])
    if any(np.ndim(part) != 1 for part in parts):
        raise ValueError(f"its attribute {attribute!r} is not a list")
    return [name.decode("utf-8") if isinstance(name, bytes) else str(name) for part in parts for name in part]


def _inside(group: Any, path: str, origin: str) -> Any:
    """Return what lies at ``path`` below a group of an HDF5 file, reached by hard links only; None if there is nothing."""
    import h5py

    item = group
    for word in path.split("/"):
        link = item.get(word, getlink=True) if isinstance(item, h5py.Group) and word else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise WeightsError(f"{origin}: {path!r} lies behind a soft or external link, which is not followed")
        item = item[word]
    return item


def _stored(group: Any, path: str, origin: str) -> Any:
    """Return an array of numbers that lies wholly in the file, not read yet; None if there is nothing at ``path``."""
    import h5py

    dataset = _inside(group, path, origin)
    if dataset is None:
        return None
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "biuf" or dataset.shape is None:
        raise WeightsError(f"{origin}: {path!r} is not an array of numbers")
    if dataset.is_virtual or dataset.external:
        raise WeightsError(f"{origin}: {path!r} points to another file, which is not followed")
    return dataset
