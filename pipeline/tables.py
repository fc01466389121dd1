"""Format rows of plain values as text: aligned columns for a person, CSV for a program."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.intervals import interval_of


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as CSV with a header line; the text is empty if there are no rows.

    Examples
    --------
    >>> csv_text([{"a": 1, "b": "x,y"}])
    'a,b\\n1,"x,y"\\n'
    """
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue()


def table_text(rows: Sequence[Mapping[str, Any]], indent: str = "") -> str:
    """Format rows in aligned columns, numbers to the right; each line begins with ``indent``.

    Examples
    --------
    >>> print(table_text([{"head": "knn", "accuracy": 0.5}, {"head": "ridge", "accuracy": 0.75}]))
    head   accuracy
    knn      0.5000
    ridge    0.7500
    """
    if not rows:
        return "no runs"
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[column]) for line in cells)) for column, name in enumerate(names)]
    numeric = [all(isinstance(row[name], int | float | None) for row in rows) for name in names]
    lines = []
    for line in [names, *cells]:
        padded = zip(line, widths, numeric, strict=True)
        lines.append(
            indent
            + "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in padded).rstrip()
        )
    return "\n".join(lines)


def score_columns(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores by `pipeline.scores.metrics.evaluate` that a person looks at first, as columns of a table."""
    return {
        "images": scores["n"],
        "accuracy": scores["accuracy"],
        "95 % interval": interval_of(scores),
        "log loss": scores["log_loss"],
    }


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Format the metrics of a run for a person, one row per split that was scored."""
    rows = []
    for split in ("validation", "averaged", "test"):
        values = metrics.get(split)
        if values:
            name = f"validation, mean of {values['views']} views" if split == "averaged" else split
            rows.append({"split": name, **score_columns(values)})
    return table_text(rows, "  ")


def board_text(rows: Sequence[Mapping[str, Any]], most: int | None = None) -> str:
    """Format the leaderboard for a person: some columns that are equal in all rows are omitted, an asterisk marks the choice.

    Parameters
    ----------
    rows : sequence of mapping
        Rows made by `pipeline.runs.board.leaderboard`.
    most : int, optional
        Maximum number of rows to show in addition to the chosen one; default: all.
    """
    shown = [row for number, row in enumerate(rows) if most is None or number < most or row["chosen"]]
    names = ["run_id", "head", "settings", "features", "accuracy", "accuracy_interval", "cv_accuracy", "test_accuracy"]
    names += ["log_loss", "ece", "n", "fit_seconds", "parameters", "data", "comparable"]
    alike = {"features", "n", "data", "comparable"}
    kept = [
        name
        for name in names
        if any(str(row[name]) not in ("", "None") for row in shown)
        and (name not in alike or len({str(row[name]) for row in shown}) > 1)
    ]
    shown = [{**row, "accuracy_interval": interval_of(row)} for row in shown]
    lines = [{"": "*" if row["chosen"] else "", **{name: row[name] for name in kept}} for row in shown]
    return table_text(lines)


def counted(count: int, noun: str) -> str:
    """Format a number of things, with the plural of the noun.

    Examples
    --------
    >>> counted(1, "run"), counted(1500, "image")
    ('1 run', '1,500 images')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shortened(text: str, most: int = 60) -> str:
    """Shorten a long name to ``most`` characters by cutting out the middle, as names differ at both ends.

    Examples
    --------
    >>> shortened("a name of many characters", 11)
    'a nam…cters'
    """
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list | tuple):
        return " to ".join(_cell(item) for item in value)
    return str(value)
