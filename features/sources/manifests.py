"""Read CSV and Parquet manifests: ``path,label[,split][,group]``, one row per image. Every error names the row.

For the tasks of `features.targets`, other columns than ``label`` may be the targets; `features.sources.cells` reads these.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from features.errors import SourceError, nearest
from features.machine import pyarrow_for
from features.sources.blocks import File, for_arrow, on_disk
from features.sources.cells import cell_text, read_target, target_columns, target_titles
from features.sources.folders import IMAGE_SUFFIXES, ODD_CHARACTERS, suffix_of
from features.sources.objects import without_secrets
from features.sources.parquet import is_plain
from features.sources.remote import checked, is_address
from features.sources.splits import NOT_GIVEN, SPLIT_WORDS, listed, number_or_none
from features.targets import CLASSIFICATION, Target

logger = logging.getLogger(__name__)

_PATH_COLUMNS = ("file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "paths")


class Manifest(NamedTuple):
    """The columns of a manifest, one entry per image, in its order; an empty label or group means none.

    ``columns`` holds the other columns by name, as text; ``target`` is what the tasks other than classification predict.
    ``addresses`` holds the whole addresses of the paths that are some; the paths lack passwords and queries.
    """

    paths: list[str]
    labels: list[str]
    splits: list[int]
    groups: list[str]
    columns: dict[str, tuple[str, ...]]
    target: Target | None = None
    addresses: Mapping[str, str] = MappingProxyType({})


def read_manifest(manifest: File, target: str | None, *, labelled: bool = True, task: str = CLASSIFICATION) -> Manifest:
    """Read a manifest; the image files are not accessed.

    Parameters
    ----------
    manifest : Path or InBucket
        CSV in UTF-8, or Parquet (``.parquet``), which needs ``pyarrow``. The rows of one in a bucket are addresses, or relative to it.
    target : str or None
        Name of the label column, ``label`` by default; for other tasks also several names with commas between them.
    labelled : bool
        Whether labels are needed. If False, no label column is looked for.
    task : {"classification", "multilabel", "regression"}
        What the target columns hold; see `features.sources.cells.read_target`.

    Raises
    ------
    SourceError
        If a row cannot be understood (the message names it), or if the target does not hold class names.
    """
    plain = labelled and task == CLASSIFICATION
    lines = _parquet_rows(manifest, target, lists=not plain) if _is_parquet(manifest) else _csv_rows(manifest)
    header = next(lines, (1, []))[1]
    columns = _columns(manifest, header, target, labelled=plain)
    wanted = (
        target_columns(header, target, ("path", "split", "group"), lambda what: _refuse_line(manifest, 1, what))
        if labelled and not plain
        else {}
    )
    taken = {*columns.values(), *wanted.values()}
    others = {number: name.strip() for number, name in enumerate(header) if number not in taken}
    kept: dict[int, list[str]] = {number: [] for number, name in others.items() if name}
    first_line: dict[str, int] = {}
    names, splits, groups = [], [], []
    addresses: dict[str, str] = {}
    targets: dict[str, list[str]] = {title: [] for title in wanted}
    for line, row in lines:
        if len(row) != len(header):
            _refuse_line(
                manifest, line, f"received {len(row)} fields, expected {len(header)} (quote a field that holds a comma)"
            )
        path = _manifest_path(manifest, line, row[columns["path"]])
        if is_address(path):
            addresses[path] = row[columns["path"]].strip()
        elif on_disk(manifest) is None:
            addresses[path] = f"{manifest.parent}/{path}"
        if path in first_line:
            _refuse_line(manifest, line, f"{path!r} is already listed in {_place(manifest, first_line[path])}")
        first_line[path] = line
        read = {key: index for key, index in {**columns, **wanted}.items() if key != "path"}
        cells = {key: row[index].strip() for key, index in read.items()}  # blanks after commas go
        for key, cell in cells.items():
            if cell[:1] == '"' != row[read[key]][:1]:
                _refuse_line(
                    manifest,
                    line,
                    f"a blank before the quotes of the {key} {cell!r} makes them a part of it: remove it",
                )
            if ODD_CHARACTERS.search(cell):
                _refuse_line(manifest, line, f"{key} {cell!r} is not plain UTF-8 text")
        names.append(cells.get("label", ""))
        groups.append(cells.get("group", ""))
        splits.append(_split_code(manifest, line, cells.get("split", "")))
        for title, texts in targets.items():
            texts.append(cells[title])
        for number, values in kept.items():
            values.append(row[number])
    if not first_line:
        raise SourceError(f"{manifest} lists no images")
    _refuse_other_targets(manifest, target or "label", [name for name in names if name])
    further = {others[number]: tuple(values) for number, values in kept.items()}
    found = None
    if targets:
        of_row = list(first_line.values())
        found = read_target(task, targets, str(manifest), lambda row, what: _refuse_line(manifest, of_row[row], what))
    return Manifest(list(first_line), names, splits, groups, further, found, addresses)


def _is_parquet(manifest: File) -> bool:
    return manifest.suffix.lower() == ".parquet"


def _place(manifest: File, line: int) -> str:
    """Describe where a row is: a line of CSV, where line 1 is the header, or a row of Parquet, counted from 1."""
    if not _is_parquet(manifest):
        return f"line {line}"
    return f"row {line - 1}" if line > 1 else "columns"


def _refuse_line(manifest: File, line: int, message: str) -> NoReturn:
    raise SourceError(f"{manifest}, {_place(manifest, line)}: {message}")


def _csv_rows(manifest: File) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank, each with the number of the line on which it starts."""
    try:
        data = manifest.read_bytes()
    except OSError as error:
        raise SourceError(f"{manifest} cannot be read: {error.strerror}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SourceError(f"{manifest} is UTF-16 text; save it as CSV in UTF-8")
    if b"\0" in data:
        _refuse_line(manifest, data.count(b"\n", 0, data.index(b"\0")) + 1, "a NUL character; expected UTF-8 text")
    csv.field_size_limit(max(csv.field_size_limit(), len(data)))  # of all readers of this process; never lowered
    reader = csv.reader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        _refuse_line(manifest, line, f"not valid CSV: {error}")


def _parquet_rows(manifest: File, target: str | None, *, lists: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield the same from Parquet: every value as text, null as an empty text; columns of other types are left out.

    ``lists``: columns of the target may hold lists.
    """
    pyarrow = pyarrow_for(manifest)
    line = 1
    try:
        with pyarrow.parquet.ParquetFile(for_arrow(manifest)) as table:
            schema = table.schema_arrow
            titles = {title.lower() for title in target_titles(target, [name.lower() for name in schema.names])}
            plain = [
                number
                for number, field in enumerate(schema)
                if is_plain(pyarrow.types, field.type, lists=lists and field.name.strip().lower() in titles)
            ]
            names = [schema.names[number] for number in plain]
            left_out = [name for number, name in enumerate(schema.names) if number not in plain]
            for name in left_out:
                if name.strip().lower() in ("path", "split", "group", *titles):
                    kind = schema.field(name).type
                    _refuse_line(
                        manifest, 1, f"{name!r} holds {kind}; expected one plain value per image, such as text"
                    )
            if left_out:
                logger.warning("%s: columns that hold no plain values are left out: %s", manifest, listed(left_out))
            yield line, names
            for batch in table.iter_batches():
                for row in zip(*(batch.column(number).to_pylist() for number in plain), strict=True):
                    line += 1
                    yield line, [cell_text(cell) if isinstance(cell, list) else _text(cell) for cell in row]
    except SourceError:
        raise
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise SourceError(f"{manifest} is not Parquet, or is damaged: {error}") from error


def _text(cell: Any) -> str:
    return "" if cell is None or cell != cell else str(cell)  # NaN is null too


def _columns(manifest: File, header: Sequence[str], target: str | None, *, labelled: bool) -> dict[str, int]:
    """Return the positions of those of the columns ``path``, ``label``, ``split`` and ``group`` that are present."""
    names = [name.strip().lower() for name in header]
    twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if twice:
        _refuse_line(manifest, 1, f"two columns are named {twice[0]!r}")
    shown = ", ".join(map(repr, header))
    if "path" not in names:
        likely = [name for name in names if name in _PATH_COLUMNS]
        hint = f"; rename {likely[0]!r} to 'path'" if likely else nearest("path", names)
        if len(names) == 1 and re.search("[;\t|]", names[0]):
            hint = "; fields must be separated by commas"
        elif any(suffix_of(name) in IMAGE_SUFFIXES for name in names):
            hint = "; line 1 seems to be an image: write the names of the columns above it"
        _refuse_line(
            manifest, 1, f"no column 'path', received {shown or 'nothing'}; expected path,label[,split][,group]{hint}"
        )
    found: dict[str, int] = {name: names.index(name) for name in ("path", "split", "group") if name in names}
    if not labelled:
        return found
    wanted = "label" if target is None else target.strip().lower()
    if wanted in ("path", "split"):
        raise SourceError(f"{manifest}: the column {target!r} cannot be the target; expected a column of class names")
    if wanted in names:
        found["label"] = names.index(wanted)
    elif target is not None:
        _refuse_line(manifest, 1, f"no column {target!r} for the target, received {shown}{nearest(target, header)}")
    elif set(names) - {*found, ""}:
        _refuse_line(
            manifest,
            1,
            f"no column 'label', received {shown}; name the column of classes with --target, or rename it to 'label'",
        )
    return found


def _manifest_path(manifest: File, line: int, text: str) -> str:
    if not text.strip():
        _refuse_line(manifest, line, "the path is empty")
    if "\0" in text:
        _refuse_line(manifest, line, f"a NUL character in the path {text!r}")
    if is_address(text):
        try:
            return without_secrets(checked(text))
        except SourceError as error:
            _refuse_line(manifest, line, str(error))
    path = os.path.normpath(text)
    if on_disk(manifest) is None:
        if os.path.isabs(path) or path.partition("/")[0] == "..":
            _refuse_line(
                manifest, line, f"{text!r} leaves the folder of the manifest; expected a path inside it, or an address"
            )
        return path
    inside = f"{manifest.parent}{os.sep}"
    return path[len(inside) :] if path.startswith(inside) else path


def _split_code(manifest: File, line: int, word: str) -> int:
    code = SPLIT_WORDS.get(word.lower(), None if word else NOT_GIVEN)
    if code is None:
        known = ", ".join(SPLIT_WORDS)
        _refuse_line(manifest, line, f"unknown split {word!r}; expected {known} or nothing{nearest(word, SPLIT_WORDS)}")
    return code


def _refuse_other_targets(manifest: File, column: str, labels: Sequence[str]) -> None:
    """Refuse labels that are measurements or lists of classes, because an image must have a single class.

    Labels count as measurements if all are numbers, at least one is not whole, and more than half are distinct.
    They count as lists if ``|`` or ``;`` splits more than half of them, or if it splits one of them into words of
    which one is also a whole label or occurs in another list.
    """
    distinct = set(labels)
    if len(labels) > 2 and len(distinct) > len(labels) / 2:
        numbers = [number_or_none(label) for label in distinct]
        if None not in numbers and any(number is not None and not number.is_integer() for number in numbers):
            raise SourceError(
                f"{manifest}: the column {column!r} looks like a measurement ({len(distinct)} different numbers, "
                f"such as {labels[0]}); expected class names. To predict numbers, add --task regression; else write ranges as "
                "names, or choose another target"
            )
    words_of = {label: [word.strip() for word in re.split("[|;]", label)] for label in sorted(distinct)}
    lists = {label: words for label, words in words_of.items() if len(words) > 1}
    if not lists:
        return
    uses = Counter(word for words in lists.values() for word in set(words))
    mixed = next(
        (label for label, words in lists.items() if any(word in distinct or uses[word] > 1 for word in words)), None
    )
    if mixed is not None or sum(label in lists for label in labels) > len(labels) / 2:
        raise SourceError(
            f"{manifest}: the column {column!r} seems to hold several classes per image, such as {mixed or min(lists)!r}; "
            "expected one. To predict several labels for each image, add --task multilabel; else choose another column with "
            "--target, or, if '|' and ';' are part of the class names, replace them"
        )
