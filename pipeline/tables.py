"""Format rows of plain values as text: aligned columns for a person, CSV for a program."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from features.files import printable
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
    cells = [[cell_text(row[name]) for name in names] for row in rows]
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


def metrics_text(
    metrics: Mapping[str, Any], columns: Callable[[Mapping[str, Any]], dict[str, Any]] = score_columns
) -> str:
    """Format the metrics of a run for a person, one row per split that was scored, with the columns of its task."""
    rows = []
    for split in ("validation", "averaged", "test"):
        values = metrics.get(split)
        if values:
            name = f"validation, mean of {values['views']} views" if split == "averaged" else split
            rows.append({"split": name, **columns(values)})
    return table_text(rows, "  ")


def promise_lines(answers: Mapping[str, Any] | None, indent: str = "  ") -> list[str]:
    """Say for a person what a run promises of its answers, see `pipeline.config.Answers`; nothing where that is nothing."""
    if not answers:
        return []
    of_labels = "given" in (answers.get("abstain") or {}) or "abstain" not in answers
    things, held = ("labels", "all labels") if of_labels else ("classes", "the true class")
    of = {"validation": "validation images", "cv": "training images, out of fold"}[answers["rows"]]
    of = f"groups of {of}" if answers["grouped"] else of
    lines, abstain = [], answers.get("abstain")
    if abstain and abstain["threshold"] is not None:
        lines.append(
            f"{'all labels' if of_labels else 'answers'} from a confidence of {abstain['threshold']:.6g} on are right in at least "
            f"{abstain['precision']:.4g}{' of the images that have one' if of_labels else ''} (95 % sure): {abstain['answered']} of {abstain['n']} {of} answered, {abstain['right']} of them right"
        )
    elif abstain:
        few = f"{abstain['n']} {of} are too few: it takes {abstain['needed']} answers without a fault"
        many = f"none of the {abstain['n']} {of} is answered, because wrong ones are among the surest"
        lines.append(
            f"no confidence is known from which on at least {abstain['precision']:.4g} of the answers are right: "
            f"{few if abstain['n'] < abstain['needed'] else many}; every answer is withheld"
        )
    if sets := answers.get("sets"):
        lines.append(
            f"sets of the {things} of probability {sets['least']:.4g} or more hold {held} of {sets['coverage']:.4g} of images"
        )
    if intervals := answers.get("intervals"):
        widths = ", ".join(
            "too few images to say" if width is None else f"{width:.4g}" for width in intervals["half_widths"]
        )
        lines.append(
            f"predictions plus and minus {widths} hold the true value of {intervals['coverage']:.4g} of images"
        )
    return [indent + line for line in lines]


def group_lines(groups: Mapping[str, Any] | None, indent: str = "  ") -> list[str]:
    """Format tables by group, see `pipeline.scores.groups.group_table`, for a person; nothing where there are none."""
    lines = []
    for rows, tables in (groups or {}).items():
        for column, table in tables.items():
            shown = [
                {
                    column: RARE if line["value"] is None else shortened(str(line["value"]), 40),
                    "images": line["n"],
                    **{title: line[key] for key, title in _OF_GROUP.items() if key in line},
                }
                for line in table
            ]
            where = "validation" if rows == "validation" else "training images, out of fold"
            lines += [f"{indent}by {printable(column)}, {where}", table_text(shown, indent)]
    return lines


# Entry of a line of a table by group -> its heading.
_OF_GROUP = {
    "accuracy": "accuracy",
    "accuracy_interval": "95 % interval",
    "mae": "mean abs. error",
    "mae_interval": "95 % interval",
    "rmse": "RMSE",
}
RARE = "(rare values)"  # those of too few images for a line of their own
# Column of the leaderboard -> its heading.
_HEADINGS = {
    "run_id": "run",
    "settings": "settings",
    "features": "features",
    "accuracy": "accuracy",
    "accuracy_interval": "95 % interval",
    "average_precision": "mean AP",
    "average_precision_interval": "95 % interval",
    "r2": "R2",
    "r2_interval": "95 % interval",
    "cv_average_precision": "folds",
    "cv_r2": "folds",
    "cv_accuracy": "folds",
    "cv_interval": "folds, 95 %",
    "worst_group_accuracy": "worst group",
    "worst_group_mae": "worst group",
    "worst_group_interval": "worst, 95 %",
    "worst_group": "which",
    "answered": "answered",
    "test_accuracy": "test",
    "test_average_precision": "test",
    "test_r2": "test",
    "f1": "F1",
    "exact_match": "all right",
    "mae": "mean abs. error",
    "rmse": "RMSE",
    "spearman": "Spearman",
    "log_loss": "log loss",
    "ece": "ece",
    "n": "images",
    "fit_seconds": "seconds",
    "parameters": "parameters",
}
# What goes first: a column, and the characters to which it may be shortened; 0: it is left out.
_GO_FIRST = (
    *(("ece", 0), ("images", 0), ("parameters", 0), ("seconds", 0), ("settings", 30), ("log loss", 0)),
    *(
        ("settings", 16),
        ("features", 16),
        ("run", 20),
        ("features", 0),
        ("settings", 0),
        ("worst, 95 %", 0),
        ("which", 16),
        ("test", 0),
        ("95 % interval", 0),
    ),
)
_WIDE = 60  # most characters of the settings of a run


def board_text(rows: Sequence[Mapping[str, Any]], most: int | None = None, *, width: int | None = None) -> str:
    """Format the leaderboard for a person: only what differs between the runs; an asterisk marks the chosen one.

    The head is not a column, because run ids begin with it. What all runs of a table have in common stands below it.

    Parameters
    ----------
    rows : sequence of mapping
        Rows made by `pipeline.runs.board.leaderboard`. There is one table for each data set and state.
    most : int, optional
        Maximum number of rows of a table to show in addition to the chosen one; default: all.
    width : int, optional
        Number of columns of the terminal. Columns are left out, and texts shortened, until the table fits.
    """
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        tables.setdefault(_title(row), []).append(row)
    return "\n\n".join(
        (f"{title}\n" if title else "") + _board(alike, most, width) for title, alike in tables.items()
    ) or table_text([])


def _title(row: Mapping[str, Any]) -> str:
    """Data set and state of a row; empty if all rows have the same."""
    if "data_set" not in row and "stale" not in row:
        return ""
    name = printable(f"{row['data_set']} {row['data']}" if "data_set" in row else str(row["data"]))
    return f"{name}, {row['state']} (stale)" if row.get("stale") else name


def _board(rows: Sequence[Mapping[str, Any]], most: int | None, width: int | None) -> str:
    """Format the rows of one table."""
    rows = [row for number, row in enumerate(rows) if most is None or number < most or row["chosen"]]
    settings = [re.split(r" (?=\w+=)", row["settings"]) if row["settings"] else [] for row in rows]
    common = {"all": _shared(settings)}
    for head in dict.fromkeys(row["head"] for row in rows):
        own = [given for row, given in zip(rows, settings, strict=True) if row["head"] == head]
        common[str(head)] = [item for item in _shared(own) if item not in common["all"]]
    alike = {name for name in ("features", "n") if len(rows) > 1 and len({str(row[name]) for row in rows}) == 1}
    lines: list[dict[str, Any]] = []
    for row, given in zip(rows, settings, strict=True):
        differs = [item for item in given if item not in common["all"] and item not in common[str(row["head"])]]
        values = {**row, "settings": shortened(" ".join(differs), _WIDE)}
        if "accuracy" in row:
            values["accuracy_interval"] = interval_of(row)
        shown = [name for name in _HEADINGS if name not in alike and any(name in one for one in rows)]
        named = {_HEADINGS[name]: values.get(name) for name in shown}
        lines.append({"": "*" if row["chosen"] else "", **named})
    blank = {name for name in lines[0] if name and all(line[name] in ("", None) for line in lines)}
    lines, gone = _fitting([{name: line[name] for name in line if name not in blank} for line in lines], width)
    common["all"] = [*(f"{_HEADINGS[name]} {rows[0][name]}" for name in sorted(alike)), *common["all"]]
    below = [printable(f"{head}: {', '.join(items)}") for head, items in common.items() if items]
    if seen := max(row.get("test_seen", 0) for row in rows):
        below.append(f"test: {seen:,} test images judged by an audit before, so test scores may be too good")
    below += [f"left out to fit {width} columns: {', '.join(gone)}; --csv prints all"] if gone else []
    return "\n".join([table_text(lines), *(part for text in below for part in textwrap.wrap(text, width or len(text)))])


def _shared(settings: Sequence[list[str]]) -> list[str]:
    """The settings that all of several runs have; none for a single run."""
    return [item for item in settings[0] if len(settings) > 1 and all(item in others for others in settings)]


def _fitting(lines: list[dict[str, Any]], width: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Leave out columns and shorten texts until the table is at most ``width`` wide; name the columns that went."""
    gone = []
    for name, least in _GO_FIRST if width is not None else ():
        excess = max(map(len, table_text(lines).split("\n"))) - int(width or 0)
        if excess <= 0 or name not in lines[0]:
            continue
        if least:
            longest = max(len(str(line[name])) for line in lines)
            lines = [{**line, name: shortened(str(line[name]), max(least, longest - excess))} for line in lines]
        else:
            gone.append(name)
            lines = [{key: value for key, value in line.items() if key != name} for line in lines]
    return lines, gone


def shortened(text: str, most: int = 60) -> str:
    """Shorten a long name to ``most`` characters by cutting out the middle, as names differ at both ends.

    Examples
    --------
    >>> shortened("a name of many characters", 11)
    'a nam…cters'
    """
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def cell_text(value: Any) -> str:
    """A value as tables show it: numbers with four digits, intervals as "low to high", nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list | tuple):
        return " to ".join(cell_text(item) for item in value)
    return printable(str(value))
