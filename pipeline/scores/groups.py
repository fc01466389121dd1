"""How right a model is on each part of the images: values of a column of the manifest, or groups.

value of each row, right or wrong --`group_table`--> a line for each value --`worst_of`--> the line of the lowest accuracy
rows of each value --what a task says of them, `lines_by`--> the same for other scores
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from features.errors import ConfigurationError, nearest
from pipeline.intervals import wilson_interval
from pipeline.tables import RARE, shortened

FEW_ROWS = 10  # values of fewer rows share one line, as a single image would make such a value the best or the worst
MOST_VALUES = 200  # of a column: lines of a table
LONGEST_VALUE = 100  # characters of a value in a table
GROUP = "group"  # the name under which the groups of a store are asked for


def group_table(values: Sequence[str], right: np.ndarray) -> list[dict[str, Any]]:
    """Count the rows of each value and how many are right.

    Parameters
    ----------
    values : sequence of str, length n
        Value of each row.
    right : bool, (n,)
        Whether its answer is right.

    Returns
    -------
    list of dict
        By value: ``value``, ``n``, ``right``, ``accuracy`` and ``accuracy_interval``, see
        `pipeline.intervals.wilson_interval`. The last line, whose ``value`` is None, counts the rows of all values that
        have fewer than `FEW_ROWS` of them.

    Examples
    --------
    >>> [(line["value"], line["n"], line["right"]) for line in group_table(["a"] * 10 + ["b", "c"], np.arange(12) > 2)]
    [('a', 10, 7), (None, 2, 2)]
    """
    return lines_by(values, lambda rows: accuracy_of(right[rows]))


def accuracy_of(right: np.ndarray) -> dict[str, Any]:
    """The entries of a line about rows that are right or not, bool, (k,)."""
    hits, n = int(right.sum()), len(right)
    return {"right": hits, "accuracy": hits / n, "accuracy_interval": wilson_interval(hits, n)}


def lines_by(values: Sequence[str], scored: Callable[[np.ndarray], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make a line for each value, as `group_table`: its ``value``, ``n``, and what ``scored`` says of its rows, int64 (k,)."""
    names, member, sizes = np.unique(np.asarray(values, dtype=object), return_inverse=True, return_counts=True)
    large = sizes >= FEW_ROWS
    parts: list[tuple[str | None, np.ndarray]] = [
        (shortened(str(names[k]), LONGEST_VALUE), np.flatnonzero(member == k)) for k in np.flatnonzero(large)
    ]
    if not large.all():
        parts.append((None, np.flatnonzero(~large[member])))
    return [{"value": name, "n": len(rows), **scored(rows)} for name, rows in parts]


def worst_of(
    tables: Mapping[str, Iterable[Mapping[str, Any]]],
    worth: Callable[[Mapping[str, Any]], float] = operator.itemgetter("accuracy"),
) -> dict[str, Any]:
    """The line of the lowest accuracy in tables by column, with its ``column``; of equal ones, that of most rows.

    The line of rare values is no group, and counts only where there is no other. ``worth``: a score of a line instead of the
    accuracy, higher is better.
    """
    every = [{**line, "column": column} for column, table in tables.items() for line in table]
    lines = [line for line in every if line["value"] is not None] or every
    return min(lines, key=lambda line: (worth(line), -line["n"]))


def name_of(line: Mapping[str, Any]) -> str:
    """A line with its column, in words for a person.

    Examples
    --------
    >>> [name_of({"column": "light", "value": value}) for value in ("night", "", None)]
    ["light 'night'", "light ''", 'light (rare values)']
    """
    return f"{line['column']} {RARE}" if line["value"] is None else f"{line['column']} {line['value']!r}"


def values_of(images: Any, names: Sequence[str], where: str) -> dict[str, tuple[str, ...]]:
    """Values of all rows of a store by column; ``group`` stands for its groups.

    Parameters
    ----------
    images : features.store.schema.ImageTable
        The images of a store.
    names : sequence of str
        The columns.
    where : str
        The store, for messages.

    Raises
    ------
    ConfigurationError
        If there is no such column, or it has more than `MOST_VALUES` values of `FEW_ROWS` rows.
    """
    known = {**images.columns, **({} if images.groups is None else {GROUP: images.groups})}
    found = {}
    for name in names:
        if name not in known:
            has = f"it has {', '.join(sorted(known))}{nearest(name, known)}" if known else "it has none"
            raise ConfigurationError(
                f"--by {name}: {where} has no such column: {has}. Columns come from a manifest (path,label,{name}); extract "
                "again with one that has it (features are kept)"
            )
        _, sizes = np.unique(np.asarray(known[name], dtype=object), return_counts=True)
        if (count := int(np.sum(sizes >= FEW_ROWS))) > MOST_VALUES:
            raise ConfigurationError(
                f"--by {name}: {where} has {count:,} values of {FEW_ROWS} or more images in this column; a table takes at most "
                f"{MOST_VALUES}. Give a column with fewer values"
            )
        found[name] = tuple(known[name])
    return found
