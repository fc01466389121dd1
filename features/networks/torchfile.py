"""Read the tensors of a PyTorch file as data. Nothing in the file is executed, and PyTorch is not needed.

    .pth -> pickle -> an interpreter that knows tensors and plain values -> {"name": StoredTensor} -> array

``torch.save`` writes a pickle, which is a program: unpickling calls any function that it names. Here the few
instructions that a dict of tensors needs are interpreted, every other one is refused, and a name from the file is only
compared with a list. Two containers are known: the zip archive of PyTorch 1.6 and later, and the older plain file, in
which five pickles are followed by the values. Both are described by ``torch/serialization.py``.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from features.errors import WeightsError, brief

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the first pickle of the older container
DESCRIPTION = "data.pkl"  # member of the zip archive that holds the pickle
_LARGEST_PICKLE = 16 << 20  # bytes; a dict of 300 tensors takes 40,000
_MOST_INSTRUCTIONS = 1_000_000  # of all pickles of a file; a dict of 300 tensors takes 11,000
_LARGEST_RANK = 8
_STORAGES = {"torch FloatStorage": "<f4", "torch HalfStorage": "<f2", "torch LongStorage": "<i8"}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_EXPECTED = "expected a state dict: float32, float16 or int64 tensors by name, as torch.save(model.state_dict(), FILE) writes it"


@dataclasses.dataclass(frozen=True)
class _Name:
    """One of the names that a pickle may use, ``module name``. It stands for itself; nothing is imported."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Values that lie elsewhere in the file, as a pickle declares them."""

    key: str
    dtype: np.dtype[Any]
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor that is the whole of a storage; axes may be in another order."""

    storage: _Storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a PyTorch file that has not been read yet; ``stored[()]`` reads it, as of an HDF5 dataset.

    Parameters
    ----------
    read : callable
        Returns the bytes of the storage.
    dtype : numpy.dtype
        float32, float16 or int64, little-endian.
    shape, strides : tuple of int
        Lengths of the axes, and elements from one value to the next along each axis.
    """

    read: Callable[[], bytes]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def transposed(self, *axes: int) -> StoredTensor:
        """Return the tensor with its axes in another order; nothing is read."""
        shape, strides = (tuple(values[axis] for axis in axes) for values in (self.shape, self.strides))
        return dataclasses.replace(self, shape=shape, strides=strides)

    def __getitem__(self, everything: Any) -> np.ndarray:
        order = sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis])  # as the values lie in the file
        values = np.frombuffer(self.read(), self.dtype).reshape([self.shape[axis] for axis in order])
        return np.array(values.transpose([order.index(axis) for axis in range(len(order))]))


def torch_tensors(file: BinaryIO, origin: str) -> dict[str, StoredTensor]:
    """Read the description of the tensors in a PyTorch file; their values are read when they are asked for.

    Parameters
    ----------
    file : binary file
        Stays open as long as tensors are read.
    origin : str
        Name of the file in messages.

    Raises
    ------
    WeightsError
        If the file is damaged, holds anything but tensors by name, or declares what it does not hold. Types and
        functions that it names are reported, never used.
    """
    try:
        legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
        return _legacy(file, origin) if legacy else _archive(file, origin)
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, IndexError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{origin} is damaged: {brief(str(error) or type(error).__name__, 200)}") from error


def _archive(file: BinaryIO, origin: str) -> dict[str, StoredTensor]:
    archive = zipfile.ZipFile(file)
    members = {member.filename: member for member in archive.infolist()}
    found = [name for name in members if name.endswith(f"/{DESCRIPTION}")]
    if len(found) != 1:
        raise WeightsError(f"{origin} holds {len(found)} members {DESCRIPTION!r}; {_EXPECTED}")
    folder = found[0].removesuffix(DESCRIPTION)

    def size(name: str) -> int:
        """Return the bytes of a member; torch.save never compresses, so they are as many in the file as in memory."""
        if members[name].compress_type != zipfile.ZIP_STORED:
            raise WeightsError(f"{origin}: its member {brief(name, 100)!r} is compressed; {_EXPECTED}")
        return members[name].file_size

    order = f"{folder}byteorder"
    if order in members and size(order) < 10 and archive.read(order) != b"little":
        raise WeightsError(f"{origin}: its numbers are big-endian; {_EXPECTED}")
    if size(found[0]) > _LARGEST_PICKLE:
        raise WeightsError(f"{origin}: its description takes over {_LARGEST_PICKLE} bytes; {_EXPECTED}")
    tensors = _tensors(_Interpreter(io.BytesIO(archive.read(found[0])), origin).load(), origin)

    def reader(storage: _Storage) -> Callable[[], bytes]:
        name = f"{folder}data/{storage.key}"
        _check_size(storage, size(name) if name in members else 0, origin)
        return lambda: archive.read(name)

    return _stored(tensors, reader)


def _legacy(file: BinaryIO, origin: str) -> dict[str, StoredTensor]:
    """Read the older container: magic number, version, machine, description, names of the storages, then their values.

    Before the values of each storage stands their number, as int64.
    """
    file.seek(0)
    head = io.BytesIO(file.read(_LARGEST_PICKLE))
    interpreter = _Interpreter(head, origin)
    _, version, machine, described, keys = (interpreter.load() for _ in range(5))
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise WeightsError(
            f"{origin} was written by another version of PyTorch or on a big-endian machine; {_EXPECTED}"
        )
    tensors = _tensors(described, origin)
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    listed = set(filter(_is_text, keys)) if type(keys) is list else set()
    if listed != storages.keys() or len(listed) != len(keys):
        raise WeightsError(f"{origin} is damaged: its list of storages does not fit its tensors")
    file.seek(0, io.SEEK_END)
    end, place = file.tell(), head.tell()
    starts: dict[str, int] = {}
    for key in keys:
        file.seek(place)
        held = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
        starts[key] = place + 8
        place = starts[key] + held
        for size in (held, max(0, min(place, end) - starts[key])):  # as the file says, and as it is
            _check_size(storages[key], size, origin)

    def reader(storage: _Storage) -> Callable[[], bytes]:
        def read() -> bytes:
            file.seek(starts[storage.key])
            return file.read(storage.count * storage.dtype.itemsize)

        return read

    return _stored(tensors, reader)


def _tensors(described: Any, origin: str) -> dict[str, _Tensor]:
    """Take the tensors from what the pickle describes, which must be a dict of nothing else."""
    if not isinstance(described, dict):
        raise WeightsError(f"{origin} holds {_kind(described)}; {_EXPECTED}")
    for name, value in described.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            inner = next((key for key, held in described.items() if isinstance(held, dict)), None)
            hint = (
                "" if inner is None else f". If the weights are in it, save torch.load(FILE)[{brief(str(inner), 60)!r}]"
            )
            raise WeightsError(f"{origin}: {brief(str(name), 60)!r} is {_kind(value)}; {_EXPECTED}{hint}")
    storages: dict[str, _Storage] = {}
    for tensor in described.values():
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise WeightsError(f"{origin} is damaged: two tensors describe one storage in different ways")
    return described


def _stored(tensors: dict[str, _Tensor], reader: Callable[[_Storage], Callable[[], bytes]]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(reader(tensor.storage), tensor.storage.dtype, tensor.shape, tensor.strides)
        for name, tensor in tensors.items()
    }


def _check_size(storage: _Storage, held: int, origin: str) -> None:
    declared = storage.count * storage.dtype.itemsize
    if held != declared:
        raise WeightsError(f"{origin} is damaged: a tensor declares {declared} bytes of values, the file holds {held}")


def _kind(value: Any) -> str:
    return (
        "one tensor" if isinstance(value, _Tensor) else f"a value of the type {type(value).__name__.strip('_').lower()}"
    )


class _Interpreter:
    """Interpret the pickles in a stream: plain values, ordered dicts and tensors, and nothing else.

    Every instruction takes a bounded time, but for those that take values off the stack, which others put there.
    Nothing is followed deeper than one level, so neither nesting nor repetition in the memo costs anything.
    """

    def __init__(self, stream: BinaryIO, origin: str) -> None:
        self.stream, self.origin = stream, origin
        self.left = _MOST_INSTRUCTIONS

    def load(self) -> Any:
        """Interpret the next pickle of the stream and return its value."""
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        for instruction, argument, _ in pickletools.genops(self.stream):
            self.left -= 1
            if self.left < 0:
                raise WeightsError(f"{self.origin}: its description takes over {_MOST_INSTRUCTIONS} steps; {_EXPECTED}")
            if instruction.name == "STOP":
                return self.stack.pop()
            self._step(instruction.name, argument)
        raise EOFError("its pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                self.stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                self.stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                self._push(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(tuple(self._popped(int(name[-1]))))
            case "APPEND" | "APPENDS":
                items = self._popped(1) if name == "APPEND" else self._marked()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._popped(2) if name == "SETITEM" else self._marked()
                self._top(dict).update(self._pairs(items))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self._push(self._name(argument))
            case "STACK_GLOBAL":
                self._push(self._name(" ".join(filter(_is_text, self._popped(2)))))
            case "REDUCE":
                self._push(self._called(*self._popped(2)))
            case "BUILD":  # the state of an ordered dict, such as the versions of its layers; not needed
                self.stack.pop()
                self._top(dict)
            case "BINPERSID":
                self._push(self._storage(self.stack.pop()))
            case _:
                what = f"{name} {brief(argument, 100)}" if isinstance(argument, str) else name
                raise WeightsError(
                    f"{self.origin}: its pickle holds the instruction {what}, which is not run; {_EXPECTED}"
                )

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _popped(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) < count:
            raise IndexError("its pickle takes more values than it has made")
        del self.stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        """Take the values since the last mark."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"its pickle treats {_kind(self.stack[-1])} as a {kind.__name__}")
        return self.stack[-1]

    def _pairs(self, items: Sequence[Any]) -> list[tuple[Any, Any]]:
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if not all(type(key) in (str, int) for key, _ in pairs):
            raise ValueError("its pickle has a key that is neither a text nor an integer")
        return pairs

    def _name(self, text: str) -> _Name:
        if text not in _STORAGES and text not in (_DICT, _TENSOR):
            raise WeightsError(
                f"{self.origin}: its pickle names {brief(text.replace(' ', '.'), 100)}, which is not imported or run; {_EXPECTED}"
            )
        return _Name(text)

    def _storage(self, words: Any) -> _Storage:
        """``("storage", type, key, device, number of values)``, and in the older container None, for no view."""
        if type(words) is tuple and len(words) in (5, 6) and words[0] == "storage" and words[5:] in ((), (None,)):
            _, kind, key, _, count = words[:5]
            if isinstance(kind, _Name) and kind.text in _STORAGES and type(key) is str and _are_lengths((count,)):
                return _Storage(key, np.dtype(_STORAGES[kind.text]), count)
        raise ValueError("its pickle describes a storage in an unknown way")

    def _called(self, function: Any, arguments: Any) -> Any:
        if function == _Name(_DICT) and arguments == ():
            return {}
        if function != _Name(_TENSOR) or type(arguments) is not tuple or len(arguments) != 6:
            raise ValueError("its pickle makes a tensor or a dict in an unknown way")
        storage, offset, shape, strides = arguments[:4]
        if type(storage) is not _Storage or not _are_lengths(shape) or not _are_lengths(strides):
            raise ValueError("its pickle describes a tensor in an unknown way")
        if type(offset) is not int or offset != 0 or not _covers(shape, strides, storage.count):
            raise WeightsError(
                f"{self.origin}: a tensor of shape {brief(str(shape), 100)} is not the whole of its {storage.count} stored values. "
                "Save copies: torch.save({name: value.clone() for name, value in model.state_dict().items()}, FILE)"
            )
        return _Tensor(storage, shape, strides)


def _is_text(value: Any) -> bool:
    return type(value) is str


def _are_lengths(values: Any) -> bool:
    """Whether this is a short tuple of numbers of elements, so that every product of them is a small calculation."""
    return (
        type(values) is tuple
        and len(values) <= _LARGEST_RANK
        and all(type(value) is int and 0 <= value < 1 << 60 for value in values)
    )


def _covers(shape: tuple[int, ...], strides: tuple[int, ...], count: int) -> bool:
    """Whether a tensor uses each of ``count`` values once, in any order of its axes.

    Examples
    --------
    >>> _covers((2, 3), (3, 1), 6), _covers((2, 3), (1, 2), 6), _covers((2, 3), (0, 1), 6), _covers((), (), 1)
    (True, True, False, True)
    """
    if len(shape) != len(strides) or math.prod(shape) != count:
        return False
    step = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and stride != step:
            return False
        step *= length
    return True
