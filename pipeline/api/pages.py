"""HTML of results for notebooks: tables, interval bars, a confusion matrix. Everything that is shown is escaped.

lines of a result --> escaped HTML, without scripts, styles of its own inside each element
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from features.files import printable

SCORES = ("accuracy", "macro_auroc", "r2", "mae", "log_loss", "n")  # in the repr, where a task has them
FOLDS = {
    "cv_accuracy": "accuracy",
    "cv_average_precision": "average_precision",
    "cv_r2": "r2",
}  # by folds, by validation
BOARD = (
    "head",
    "settings",
    *FOLDS.values(),
    "mae",
    *FOLDS,
    "log_loss",
    "parameters",
    "fit_seconds",
)  # columns, if known
SHOWN = 50  # lines of a table
CLASSES = 30  # classes of a confusion matrix
LONG = 60  # characters of a value in a repr
LEFT_OUT = {"sha256"}  # 64 characters wide, and no person reads them; `to_dict` and `to_pandas` have them
CELL = "padding:2px 8px;text-align:left;white-space:nowrap"
TEXT = "padding:2px 8px;text-align:left;min-width:20em;overflow-wrap:anywhere"  # of a long value, which is broken into lines


def short(value: Any) -> str:
    """Return a value in a few characters.

    Examples
    --------
    >>> short(0.123456), short("a" * 100)[:5], short(None)
    ('0.1235', "'aaaa", 'None')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    text = printable(repr(value))
    return text if len(text) <= LONG else f"{text[: LONG - 4]}...{text[-1]}"


def _cell(value: Any) -> Markup:
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        return escape(f"{value:.4g}")
    if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
        return escape(short(value))
    return escape("" if value is None else printable(str(value)))


def _style(value: Any) -> str:
    return TEXT if type(value) is str and len(value) > LONG else CELL  # markup is no text


def table(lines: Sequence[Mapping[str, Any]], *, caption: str = "") -> str:
    """Return a table of lines, the first `SHOWN` of them.

    Examples
    --------
    >>> table([{"class": "<b>"}]).count("&lt;b&gt;")
    1
    """
    shown = lines[:SHOWN]
    names = [name for name in dict.fromkeys(name for line in shown for name in line) if name not in LEFT_OUT]
    head = Markup("").join(Markup('<th style="{}">{}</th>').format(CELL, name) for name in names)
    rows = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup('<td style="{}">{}</td>').format(_style(line.get(name)), _cell(line.get(name))) for name in names
            )
        )
        for line in shown
    )
    return _framed(Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, rows), caption) + (
        str(Markup("<p>and {} more: to_dict(), to_pandas()</p>").format(len(lines) - SHOWN))
        if len(lines) > SHOWN
        else ""
    )


def _framed(inner: Markup, caption: str) -> str:
    said = Markup("<p><code>{}</code></p>").format(caption) if caption else Markup("")
    return str(Markup('<div style="overflow-x:auto;max-width:100%">{}{}</div>').format(said, inner))


def board(rows: Sequence[Mapping[str, Any]], *, caption: str = "") -> str:
    """Return the table of a leaderboard, with the interval of each score as a bar."""
    columns = [name for name in BOARD if any(row.get(name) is not None for row in rows)]
    score = next((name for name in (*FOLDS, *FOLDS.values()) if name in columns), "accuracy")
    lines = [
        {
            "": "*" if row["chosen"] else "",
            "run": row["run_id"],
            **_bar(row, score),
            **{name: row.get(name) for name in columns},
        }
        for row in rows
    ]
    return table(lines, caption=caption)


def _bar(row: Mapping[str, Any], score: str) -> dict[str, Any]:
    """The interval of a score of a row as a bar from 0 to 1, if it has one there."""
    limits = row.get("cv_interval" if score in FOLDS else f"{score}_interval")
    if not limits or not 0 <= limits[0] <= limits[1] <= 1:
        return {}
    low, high, value = (round(100 * number, 1) for number in (*limits, row[score]))
    title = f"{value:.1f} %, interval {low:.1f} to {high:.1f} %{' by folds' if score in FOLDS else ''}"
    return {
        "0 to 1": Markup(
            '<svg width="120" height="12" role="img" aria-label="{}"><title>{}</title>'
            '<rect x="0" y="5" width="100%" height="2" fill="#ccc"></rect>'
            '<rect x="{}%" y="2" width="{}%" height="8" fill="#56b4e9"></rect>'
            '<rect x="{}%" y="0" width="2" height="12" fill="currentColor"></rect></svg>'
        ).format(title, title, low, max(0.5, round(high - low, 1)), value)
    }


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Return a confusion matrix: true classes in lines, predicted ones in columns, darker for more images."""
    if len(classes) > CLASSES:
        return str(Markup("<p>confusion of {} classes: .confusion, .confused</p>").format(len(classes)))
    head = Markup("").join(Markup('<th style="{}">{}</th>').format(CELL, printable(name)) for name in classes)
    lines = []
    for name, counts in zip(classes, matrix, strict=True):
        cells = []
        for count in counts:
            share = count / max(1, sum(counts))
            style = f"{CELL};text-align:right;background:rgba(86,180,233,{share:.2f})"
            style += ";color:#000" if share > 0.6 else ""  # elsewhere that of the page, which may be dark
            cells.append(Markup('<td style="{}">{}</td>').format(style, count or ""))
        lines.append(Markup('<tr><th style="{}">{}</th>{}</tr>').format(CELL, printable(name), Markup("").join(cells)))
    inner = Markup("<table><thead><tr><th>true \\ predicted</th>{}</tr></thead><tbody>{}</tbody></table>")
    return _framed(inner.format(head, Markup("").join(lines)), "")


def pictures(cards: Sequence[tuple[str, str]]) -> str:
    """Return pictures with captions; each is (address of data, caption)."""
    items = [
        Markup(
            '<figure style="display:inline-block;margin:4px;width:120px;vertical-align:top">'
            '<img src="{}" alt="{}" style="max-width:120px"><figcaption style="font-size:11px;word-break:break-word">{}'
            "</figcaption></figure>"
        ).format(data, caption, caption)
        for data, caption in cards
    ]
    return str(Markup("<div>{}</div>").format(Markup("").join(items)))
