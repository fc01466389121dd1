"""What a task tells a report of a run: plain values, which the page sets as columns, tiles, tables, cards and charts.

scores, predictions, targets --`Task`--> `Column`, `Tile`, `Table`, `Line`, `Judged`, `Calibration` --report--> HTML
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Column(NamedTuple):
    """A column of scores: its key, its heading, the order that is sorted first, and an explanation."""

    key: str
    title: str
    first: str = "ascending"
    hint: str = ""


class Tile(NamedTuple):
    """A score that stands alone; ``value`` None: it has none."""

    label: str
    value: float | None
    note: str = ""


class Table(NamedTuple):
    """A line for each label or number: its name by ``key``, and the ``columns``."""

    title: str
    hint: str
    what: str
    columns: tuple[Column, ...]
    lines: tuple[dict[str, Any], ...]


class Line(NamedTuple):
    """A line of a card: words before a name, the name, and a number behind it."""

    before: str
    name: str
    number: float | None = None


class Words(NamedTuple):
    """How a report speaks of some images: a heading, what to look for there, and what is said where there are none."""

    title: str
    hint: str
    none: str


class Judged(NamedTuple):
    """Of each prediction, bool (n,) and float64 (n,): whether it is wrong, and how sure (or how far off) it is."""

    wrong: np.ndarray
    surety: np.ndarray


class Calibration(NamedTuple):
    """Probabilities, float64 (m,), and whether what they are about is so, bool (m,); in words: what they are, and counted."""

    hint: str
    probability: str
    things: str
    holds: str
    values: np.ndarray
    truth: np.ndarray
