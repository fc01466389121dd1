"""Read the cells of target columns of a manifest: lists of labels, columns of 0 and 1, or numbers.

cells of each column -> kind of the cells -> `features.targets.Target`; what does not fit is refused, with its row
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np

from features.sources.reading import MISSING_WORDS
from features.sources.splits import number_or_none
from features.targets import MULTILABEL, REGRESSION, TYPES, UNKNOWN, Target

SEPARATORS = (";", "|")
_TRUTH = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
Cells = Mapping[str, Sequence[str]]  # column -> the text of each row, without blanks around it
Refuse = Callable[[int, str], NoReturn]  # row, what is wrong with it


def read_target(task: str, name: str, cells: Cells, refuse: Refuse) -> Target:
    """Turn the cells of target columns into a target.

    Parameters
    ----------
    task : {"multilabel", "regression"}
        A single column of labels holds lists, with ``;`` or ``|`` between the labels, unless all its cells are 0, 1 or blank.
        Several columns hold 0, 1 or blank. Numbers are written with a point. A blank cell, ``nan`` or ``null`` is unknown;
        a list that is a lone separator has no label.
    name : str
        The columns, as the user named them.
    cells : mapping of str to sequence of str
        Text of each row, by column.
    refuse : callable
        Called with a row and what is wrong with it; raises the error that names the file and the row.
    """
    return _READERS[task](name, cells, refuse)


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
