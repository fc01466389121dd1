"""Read images that lie in Parquet files, in a column of structs ``{bytes, path}`` as data sets of Hugging Face have it.

    files --columns but the images--> labels or targets, groups, splits | FILE/ROW --_Column: row groups, batch by batch--> bytes

The column of images is read in the order in which images are asked for; only a few megabytes of it are kept.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import json
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from features.errors import SourceError, StoreError, UnreadableImageError, nearest
from features.machine import pyarrow_for
from features.scratch import scratch
from features.sources.arrow import kind_of, open_table
from features.sources.blocks import File, on_disk, prefixes, versions_of
from features.sources.cells import cell_text, padded, read_target, target_columns
from features.sources.folders import File as ImageFile
from features.sources.folders import Files
from features.sources.reading import split_of
from features.sources.splits import NOT_GIVEN, listed
from features.targets import CLASSIFICATION, Target
from features.texts import Coded, GrowingCoded, GrowingTexts

_BATCH = 16  # rows that are read at a time
_KEPT_BYTES, _KEPT_ROWS, _MOST_ROWS = 64 << 20, 4 * _BATCH, 1024  # of rows that were read and perhaps not asked for yet
_CURSORS = 4  # places of one file that are read in turn: as many as shards in flight, and some
_LONGEST_LABEL = 200


class Rows(NamedTuple):
    """One row per image, in the order of the files."""

    root: Path | str
    files: Files
    names: Sequence[str]
    splits: np.ndarray
    groups: Sequence[str] | None
    read: Callable[[str], bytes]
    target: Target | None = None
    versions: Sequence[str] | None = None


def image_column(path: File) -> str | None:
    """Return the name of the column that holds images as bytes; None for a manifest, which has paths, and for other files."""
    pyarrow = pyarrow_for(path)
    if on_disk(path) is None:
        path.stat()  # that there is none is no matter of columns
    with contextlib.suppress(OSError, ValueError, pyarrow.ArrowException), open_table(pyarrow, path) as table:
        return _image_column(pyarrow, table.schema_arrow)
    return None


def _image_column(pyarrow: ModuleType, schema: Any) -> str | None:
    if "path" in (name.strip().lower() for name in schema.names):
        return None
    for field in schema:
        inner = field.type
        if pyarrow.types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
            inner = inner.field("bytes").type
            if _is_bytes(pyarrow, inner):
                return str(field.name)
    return next(
        (name for name in ("image", "img") if name in schema.names and _is_bytes(pyarrow, schema.field(name).type)),
        None,
    )


def is_plain(types: Any, kind: Any, *, lists: bool = False) -> bool:
    """Whether a column of a type of pyarrow holds one plain value per image, such as text; ``lists``: or a list of such values."""
    if lists and (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        kind = kind.value_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in (*tests, types.is_date, types.is_timestamp, types.is_decimal, types.is_null))


def _is_bytes(pyarrow: ModuleType, kind: Any) -> bool:
    """Whether a column may hold images; one that holds nothing but nulls has no type."""
    types = pyarrow.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind))


def open_tables(
    root: Path | str, paths: Sequence[File], target: str | None, *, labelled: bool = True, task: str = CLASSIFICATION
) -> Rows:
    """List the images of Parquet files; no image is read.

    Parameters
    ----------
    root : Path or str
        What names all files: their folder, a pattern, or the only file itself.
    paths : sequence of Path or InBucket
        The files; images are named by row, and by file and row if there are several.
    target : str, optional
        The column of labels, ``label`` by default: text, or whole numbers, with names where the file has those of Hugging Face.
        For other tasks also several names with commas between them; see `features.sources.cells.read_target`.
    labelled : bool
        Whether labels are needed.
    task : {"classification", "multilabel", "regression"}
        What the target columns hold.

    Raises
    ------
    SourceError
        If a file is damaged, has no images or no such column, or a label is no class name; the message names the row.
    """
    pyarrow = pyarrow_for(paths[0])
    names, groups, found = _Names(), _Names(), GrowingTexts()
    plain = labelled and task == CLASSIFICATION
    targets = _Targets(target) if labelled and not plain else None
    parts: list[tuple[int, tuple[int, ...], int | None]] = []  # rows, stamp and split of each file
    columns: dict[str, _Column] = {}
    for path, prefix in zip(paths, prefixes(root, paths), strict=True):
        status = path.stat()
        with _reading(pyarrow, path), open_table(pyarrow, path) as table:
            table_rows, schema = table.metadata.num_rows, table.schema_arrow
            images = _image_column(pyarrow, schema)
            if images is None:
                raise SourceError(
                    f"{path}: no column of images, received {listed(schema.names)}; expected structs of bytes and path"
                )
            label = _label_column(path, schema, images, target) if plain else None
            if targets is not None:
                targets.add(pyarrow, path, table, images)
            names.add(pyarrow, path, table, label)
            names.refuse_mixture(label)
            groups.add(pyarrow, path, table, "group")
        digits = max(6, len(str(table_rows)))
        for number in range(table_rows):
            found.append(f"{prefix}{number:0{digits}d}")
        # The size of an image is not known before it is read; FORMAT.md says that it is then 0.
        parts.append((table_rows, ImageFile.of("", status, 0).stamp, _split(path)))
        nested = pyarrow.types.is_struct(schema.field(images).type)
        columns[prefix] = _Column(path, f"{images}.bytes" if nested else images, (status.st_size, status.st_mtime_ns))
    total, done = sum(rows for rows, _, _ in parts), 0
    if not total:
        raise SourceError(f"{root}: holds no images, its tables have no rows")
    stamps, splits = scratch((total, 4), "<i8"), np.full(total, NOT_GIVEN, np.int8)
    for rows, stamp, code in parts:
        stamps[done : done + rows] = stamp
        splits[done : done + rows] = NOT_GIVEN if code is None else code
        done += rows
    if (splits == NOT_GIVEN).any():
        splits[:] = NOT_GIVEN
    read = None if targets is None else targets.read(task, root)
    versions = versions_of(paths, [rows for rows, _, _ in parts])
    return Rows(
        root, Files(found.texts(), stamps), names.coded(), splits, groups.coded(), _Reader(columns), read, versions
    )


def _split(path: File) -> int | None:
    """Return the split that the name of a file says, or that of its folder if ``save_to_disk`` has made one for each split."""
    saved = on_disk(path)
    of_folder = saved is not None and (saved.parent.parent / "dataset_dict.json").is_file()
    return split_of(path.stem) if not of_folder or saved is None else split_of(saved.parent.name)


@contextlib.contextmanager
def _reading(pyarrow: ModuleType, path: File) -> Iterator[None]:
    """Turn an error of pyarrow into a ``SourceError``."""
    try:
        yield
    except (SourceError, StoreError):
        raise
    except (OSError, ValueError, OverflowError, KeyError, pyarrow.ArrowException) as error:
        raise SourceError(
            f"{path} is not {kind_of(path)}, or is damaged: {error}. Download or save it again"
        ) from error


def _label_column(path: File, schema: Any, images: str, target: str | None) -> str | None:
    wanted = target or "label"
    if wanted in schema.names and wanted != images:
        return wanted
    others = [name for name in schema.names if name not in (images, "group")]
    if target is None and not others:
        return None
    raise SourceError(
        f"{path}: no column {wanted!r} of labels, received {listed(schema.names)}; name one with --target{nearest(wanted, others)}"
    )


class _Names:
    """Class names or groups: a column of all files."""

    def __init__(self) -> None:
        self._found, self._numbered = (
            GrowingCoded(),
            dict[bool, File](),
        )  # whether it is numbers alone -> first such file

    def add(self, pyarrow: ModuleType, path: File, table: Any, column: str | None) -> None:
        """Read the column of one file, which may lack it."""
        schema = table.schema_arrow
        texts: Iterator[str] = itertools.repeat("", table.metadata.num_rows)
        if column is not None and column in schema.names:
            kind = _value_type(pyarrow, schema, column)
            if not pyarrow.types.is_null(kind):
                self._numbered.setdefault(pyarrow.types.is_integer(kind) and not _names(schema, column), path)
            texts = _texts(pyarrow, path, table, column)
        for text in texts:
            self._found.append(text)

    def coded(self) -> Coded:
        """Return what was read; numbers have as many digits as the largest one of all files."""
        found = self._found.coded()
        return found if False in self._numbered else found.changed(padded(found.texts))

    def refuse_mixture(self, column: str | None) -> None:
        """Refuse numbers in one file and names in another: nothing says which number is which name."""
        if len(self._numbered) > 1:
            raise SourceError(
                f"{self._numbered[True]}: the column {column!r} holds numbers without names, that of {self._numbered[False].name} "
                "names; save both alike: with text, or with the names of the numbers in the metadata of Hugging Face"
            )


class _Targets:
    """The cells of the target columns of all files, as text."""

    def __init__(self, target: str | None) -> None:
        self._target = target
        self._cells: dict[str, GrowingTexts] = {}
        self._files: list[tuple[File, int]] = []  # and the rows up to its end

    def add(self, pyarrow: ModuleType, path: File, table: Any, images: str) -> None:
        """Read the columns of one file; they must be those of the first one."""

        def refuse(what: str) -> NoReturn:
            raise SourceError(f"{path}: {what}")

        schema = table.schema_arrow
        titles = list(target_columns(schema.names, self._target, (images.lower(), "group"), refuse))
        if self._files and set(titles) != set(self._cells):
            refuse(
                f"its target columns are {listed(titles)}, but those of {self._files[0][0].name} {listed(list(self._cells))}"
            )
        for title in titles:
            kind = schema.field(title).type
            if not is_plain(pyarrow.types, kind, lists=True):
                refuse(
                    f"the column {title!r} holds {kind}; expected a text, a number, or a list of labels for each image"
                )
            into = self._cells.setdefault(title, GrowingTexts())
            named = _names(schema, title)
            for row, value in enumerate(_values(table, title), 1):
                try:
                    into.append(cell_text(_named(value, named) if named else value))
                except (ValueError, TypeError) as problem:  # the names of classes may be a stranger's
                    refuse(f"row {row}: {title}: {problem}")
        self._files.append((path, (self._files[-1][1] if self._files else 0) + table.metadata.num_rows))

    def read(self, task: str, root: Path | str) -> Target:
        """Turn the cells into a target; what does not fit is refused with its file and row."""

        def refuse(row: int, what: str) -> NoReturn:
            number = bisect.bisect_right(self._files, row, key=operator.itemgetter(1))
            before = self._files[number - 1][1] if number else 0
            raise SourceError(f"{self._files[number][0]}, row {row - before + 1}: {what}")

        return read_target(task, {title: cells.texts() for title, cells in self._cells.items()}, str(root), refuse)


def _named(value: Any, names: Sequence[str]) -> Any:
    """The class names of a number or of a list of numbers, as the file gives them."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if value is None or value < 0:
        return None
    if value >= len(names):
        raise ValueError(f"received {value}, but the file names {len(names)} classes, 0 to {len(names) - 1}")
    return names[value]


def _texts(pyarrow: ModuleType, path: File, table: Any, column: str) -> Iterator[str]:
    """Yield the values of a column as class names, empty for null."""
    schema = table.schema_arrow
    kind, named, plain = schema.field(column).type, _names(schema, column), _value_type(pyarrow, schema, column)
    tests = ("is_string", "is_large_string", "is_integer", "is_boolean", "is_null")
    if not any(getattr(pyarrow.types, test)(plain) for test in tests):
        raise SourceError(
            f"{path}: the column {column!r} holds {kind}; expected class names or whole numbers. For several labels of an image "
            "add --task multilabel, for numbers --task regression"
        )
    whole = pyarrow.types.is_integer(plain)
    for row, value in enumerate(_values(table, column), 1):
        if value is None or (whole and value < 0):
            yield ""
        elif not whole:
            yield _name(path, column, row, str(value))
        elif not named:
            yield str(value)
        elif value >= len(named):
            raise SourceError(
                f"{path}, row {row}: the {column} is {value}, but the file names {len(named)} classes, 0 to {len(named) - 1}"
            )
        else:
            yield named[value]


def _value_type(pyarrow: ModuleType, schema: Any, column: str) -> Any:
    kind = schema.field(column).type
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _values(table: Any, column: str) -> Iterator[Any]:
    for batch in table.iter_batches(columns=[column]):
        yield from batch.column(0).to_pylist()


def _name(path: File, column: str, row: int, text: str) -> str:
    text = text.strip()
    if len(text) > _LONGEST_LABEL:
        raise SourceError(
            f"{path}, row {row}: the {column} is {text[:40]!r}..., which is no class name; choose a column with --target"
        )
    return text


def _names(schema: Any, column: str) -> list[str]:
    """Return the class names that Hugging Face's metadata give the numbers of a column; none if they do not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column].get("names") or features[column]["feature"]["names"]
        return [str(name) for name in names]
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
        return []


class _Reader:
    """The function path -> bytes; may be called from many threads."""

    def __init__(self, columns: dict[str, _Column]) -> None:
        self._columns = columns

    def __call__(self, path: str) -> bytes:
        folder, slash, row = path.rpartition("/")
        return self._columns[folder + slash].read(int(row))


@dataclasses.dataclass
class _Cursor:
    """A place from which a row group is being read on."""

    group: int
    next_row: int
    table: Any
    batches: Iterator[Any]


class _Column:
    """The images of one file. Rows that are asked for in order are read once, whatever the size of the row groups."""

    def __init__(self, path: File, name: str, state: tuple[int, int]) -> None:
        self._path, self._name, self._state = path, name, state
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._cursors: list[_Cursor] = []
        self._rows: OrderedDict[int, bytes | None] = OrderedDict()
        self._bytes = 0

    def read(self, row: int) -> bytes:
        """Return the bytes of one image; ``UnreadableImageError`` if the row has none."""
        pyarrow = pyarrow_for(self._path)
        with self._lock, _reading(pyarrow, self._path):
            if row not in self._rows:
                self._advance(pyarrow, row)
            data = self._rows[row]
        if data is None:
            raise UnreadableImageError(
                "missing", f"{self._path}, row {row + 1}: the image has no bytes, only a path or nothing"
            )
        return data

    def _advance(self, pyarrow: ModuleType, row: int) -> None:
        cursor = self._cursor(pyarrow, row)
        while cursor.next_row <= row:
            values = next(cursor.batches).column(0)
            if pyarrow.types.is_struct(values.type):
                values = values.field("bytes")
            for data in values.to_pylist():
                self._rows[cursor.next_row] = data
                self._bytes += len(data or b"")
                cursor.next_row += 1
            while len(self._rows) > (_KEPT_ROWS if self._bytes > _KEPT_BYTES else _MOST_ROWS):
                self._bytes -= len(self._rows.popitem(last=False)[1] or b"")

    def _cursor(self, pyarrow: ModuleType, row: int) -> _Cursor:
        """Return the nearest place before a row from which its row group is being read, or open one at its start."""
        if not self._starts:
            self._check_unchanged()
            with open_table(pyarrow, self._path) as table:
                sizes = [table.metadata.row_group(number).num_rows for number in range(table.metadata.num_row_groups)]
            self._starts = list(itertools.accumulate(sizes, initial=0))[:-1]
        group = max(number for number, start in enumerate(self._starts) if start <= row)
        near = [cursor for cursor in self._cursors if cursor.group == group and cursor.next_row <= row]
        if near:
            cursor = max(near, key=lambda cursor: cursor.next_row)
            self._cursors.remove(cursor)
        else:
            cursor = self._open(pyarrow, group)
        self._cursors.append(cursor)
        while len(self._cursors) > _CURSORS:
            self._cursors.pop(0).table.close()
        return cursor

    def _open(self, pyarrow: ModuleType, group: int) -> _Cursor:
        self._check_unchanged()
        # With a buffer of its own, a row group is read page by page and never as a whole.
        table = open_table(pyarrow, self._path, buffer_size=1 << 20, pre_buffer=False)
        batches = table.iter_batches(_BATCH, row_groups=[group], columns=[self._name], use_threads=False)
        return _Cursor(group, self._starts[group], table, batches)

    def _check_unchanged(self) -> None:
        status = self._path.stat()
        if (status.st_size, status.st_mtime_ns) != self._state:
            raise SourceError(f"{self._path} has been changed since its rows were listed; run again")
