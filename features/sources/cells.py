"""Read the cells of target columns: lists of labels, columns of 0 and 1, or numbers. One place decides for all sources.

values of a manifest, Parquet, JSON -`cell_text`-> cells of each column -> `features.targets.Target`; what does not fit is
refused, with its row
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn

import numpy as np

from features.errors import SourceError, nearest
from features.sources.folders import ODD_CHARACTERS
from features.sources.reading import MISSING_WORDS
from features.sources.splits import listed, number_or_none
from features.targets import MULTILABEL, REGRESSION, TYPES, UNKNOWN, Target

SEPARATORS = (";", "|")
_TRUTH = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
Cells = Mapping[str, Sequence[str]]  # column -> the text of each row, without blanks around it
Refuse = Callable[[int, str], NoReturn]  # row, what is wrong with it


def target_columns(
    header: Sequence[str], target: str | None, taken: Sequence[str], refuse: Callable[[str], NoReturn]
) -> dict[str, int]:
    """Positions of the target columns by their names, in the order in which the user named them; case does not matter.

    Parameters
    ----------
    header : sequence of str
        Names of all columns.
    target : str, optional
        A name, or several with commas between them; ``label`` by default.
    taken : sequence of str
        Columns that mean something else, such as ``path``.
    refuse : callable
        Called with what is wrong; raises the error that names the file.
    """
    names = [name.strip().lower() for name in header]
    found: dict[str, int] = {}
    for title in target_titles(target, names):
        if title.lower() not in names or not title:
            refuse(
                f"no column {title!r} for the target, received {', '.join(map(repr, header))[:300]}{nearest(title, header)}; name "
                "the columns with --target, as in --target age,weight"
            )
        place = names.index(title.lower())
        if title.lower() in taken or place in found.values() or not title.strip("."):
            other = f"other columns than {', '.join(taken[:-1])} and {taken[-1]}" if taken else "columns"
            refuse(f"--target names {title!r}, expected {other}, each once")
        found[header[place].strip()] = place
    return found


def target_titles(target: str | None, names: Collection[str]) -> list[str]:
    """Names of the target columns as the user wrote them: one, if there is such a column in ``names``, else those between commas."""
    whole = "label" if target is None else target.strip()
    return [whole] if whole.lower() in names else [part.strip() for part in whole.split(",")]


def cell_text(value: object) -> str:
    """Text of a value that a table or a JSON file holds; a list has a separator before each label.

    Raises
    ------
    ValueError
        If it is neither a text, a number, a truth, nothing, nor a list of these.

    Examples
    --------
    >>> [cell_text(value) for value in ("sea", 2.5, None, float("nan"), True, ["sea", "sun"], [])]
    ['sea', '2.5', '', '', 'True', ';sea;sun', ';']
    """
    if value is None or value != value:
        return ""
    if isinstance(value, list):
        words = [_word(item) for item in value]
        return "".join(f"{SEPARATORS[0]}{word}" for word in words) or SEPARATORS[0]
    if isinstance(value, dict):
        raise ValueError(f"received {value!r:.60}, expected a text, a number, or a list of labels")
    return str(value).strip()


def _word(item: object) -> str:
    word = cell_text(item)
    if SEPARATORS[0] in word:
        raise ValueError(
            f"the label {word[:60]!r} of a list has a {SEPARATORS[0]!r}, which separates labels: replace it"
        )
    return word


def read_target(task: str, cells: Cells, where: str, refuse: Refuse) -> Target:
    """Turn the cells of target columns into a target. Its name is those of the columns.

    Parameters
    ----------
    task : {"multilabel", "regression"}
        A single column of labels holds lists, with ``;`` or ``|`` between the labels, unless all its cells are 0, 1 or blank.
        Several columns hold 0, 1 or blank. Numbers are written with a point. A blank cell, ``nan`` or ``null`` is unknown;
        a list that is a lone separator has no label.
    cells : mapping of str to sequence of str
        Text of each row, by column.
    where : str
        The source, for messages.
    refuse : callable
        Called with a row and what is wrong with it; raises the error that names the file and the row.

    Raises
    ------
    SourceError
        If every cell is blank.
    """
    found = _READERS[task](",".join(cells).replace("/", "|"), cells, refuse)
    if not found.known.any():
        raise SourceError(
            f"{where}: every cell of {listed(list(cells))} is blank, so nothing can be learned. Name other columns "
            "with --target; or keep features alone: leave --task and --target out"
        )
    return found


def _is_blank(text: str) -> bool:
    return not text or text.casefold() in MISSING_WORDS


def _numbers(name: str, cells: Cells, refuse: Refuse) -> Target:
    values = np.full((len(next(iter(cells.values()))), len(cells)), np.nan)
    for column, (title, texts) in enumerate(cells.items()):
        for row, text in enumerate(texts):
            if _is_blank(text):
                continue
            number = number_or_none(text)
            if number is None or "_" in text:
                comma = number_or_none(text.replace(",", "."))
                hint = f"; write {comma:g}" if comma is not None and "," in text else ""
                refuse(row, f"{title} is {text[:60]!r}, expected a number, or nothing where it is unknown{hint}")
            if not math.isfinite(number):
                refuse(row, f"{title} is {text!r}, expected a finite number, or nothing where it is unknown")
            values[row, column] = number
    return Target(name, tuple(cells), values.astype(TYPES[REGRESSION]))


def _labels(name: str, cells: Cells, refuse: Refuse) -> Target:
    texts = next(iter(cells.values()))
    if len(cells) > 1 or all(_is_blank(text) or text.casefold() in _TRUTH for text in texts):
        return _truths(name, cells, refuse)
    separator = ""
    first = 0  # the row of the first separator
    lists: list[set[str] | None] = []
    for row, text in enumerate(texts):
        if ODD_CHARACTERS.search(text):
            refuse(row, f"{name} {text[:60]!r} is not plain UTF-8 text")
        found = [mark for mark in SEPARATORS if mark in text]
        separator, first = (separator, first) if separator or not found else (found[0], row)
        if any(mark != separator for mark in found):
            refuse(
                row,
                f"{name} is {text[:60]!r}, with another separator than {texts[first][:60]!r}: write {SEPARATORS[0]!r} "
                f"everywhere, or {SEPARATORS[1]!r}",
            )
        words = {word.strip() for word in text.split(separator)} - {""} if separator else {text}
        lists.append(None if _is_blank(text) else words)
    columns = sorted(set().union(*(words for words in lists if words is not None)))
    number = {word: place for place, word in enumerate(columns)}
    values = np.zeros((len(lists), len(columns)), TYPES[MULTILABEL])
    for row, held in enumerate(lists):
        if held is None:
            values[row] = UNKNOWN
        else:
            values[row, [number[word] for word in held]] = 1
    return Target(name, tuple(columns), values)


def _truths(name: str, cells: Cells, refuse: Refuse) -> Target:
    values = np.full((len(next(iter(cells.values()))), len(cells)), UNKNOWN, TYPES[MULTILABEL])
    for column, (title, texts) in enumerate(cells.items()):
        for row, text in enumerate(texts):
            truth = _TRUTH.get(text.casefold())
            if truth is not None:
                values[row, column] = truth
            elif not _is_blank(text):
                refuse(row, f"{title} is {text[:60]!r}, expected 1, 0, or nothing where it is unknown")
    return Target(name, tuple(cells), values)


_READERS: dict[str, Callable[[str, Cells, Refuse], Target]] = {MULTILABEL: _labels, REGRESSION: _numbers}


def padded(names: Sequence[str]) -> Sequence[str]:
    """Write whole numbers with leading zeros, so that they sort as numbers; other names stay as they are."""
    given = [name for name in names if name]
    if not all(name.isascii() and name.isdecimal() for name in given):
        return names
    width = max((len(str(int(name))) for name in given), default=0)
    return [f"{int(name):0{width}d}" if name else "" for name in names]
