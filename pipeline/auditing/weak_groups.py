"""The check ``weak-group``: groups of images that the head gets wrong more often than the rest.

predictions of held-out rows, columns of the manifest --count--> accuracy of each value, with its interval --> flags
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from features.files import printable
from features.progress import counted
from pipeline.auditing.check import Finding, spread
from pipeline.auditing.material import Material
from pipeline.intervals import wilson_interval

MOST_VALUES = 200  # different values of a column; with more it is no grouping of the images
LEAST = 5  # images of a group that is judged
DOUBT = 0.05  # chance that any group of a column is flagged though none is weaker than the rest


class WeakGroup:
    """Values of ``group``, and of every other column of the manifest, with a low accuracy.

    Accuracy is that of a head which had not seen the row. A group is weak if all of its interval lies below the accuracy of
    the other rows; the interval is Wilson's, widened for the number of groups that are compared (Bonferroni). The score of
    a row is the share of mistakes in its weakest group.
    """

    name, about, pixels = "weak-group", "its group is recognised less often than the others", False

    def __call__(self, material: Material) -> Finding:
        """Judge all rows that a head has judged."""
        rows, values = material.probabilities
        right = np.array([], bool) if not len(rows) else values.argmax(axis=1) == material.labels[rows]
        score, flag, lines = np.full(len(rows), np.nan), np.zeros(len(material), bool), []
        for column, cells in _columns(material):
            names, codes = np.unique(np.array([cells[row] for row in rows.tolist()], object), return_inverse=True)
            known = np.array([name != "" for name in names], bool)
            if not 2 <= known.sum() <= MOST_VALUES:
                continue
            judged = known & (np.bincount(codes, minlength=len(names)) >= LEAST)
            for code in np.flatnonzero(judged).tolist():
                inside = codes == code
                line = _line(right, inside, int(judged.sum()))
                lines.append({"column": printable(column), "value": printable(str(names[code])), **line})
                score[inside] = np.fmax(score[inside], 1 - line["accuracy"])
                flag[rows[inside]] |= line["weak"]
        lines.sort(key=lambda line: (not line["weak"], line["accuracy"]))
        return Finding(spread(len(material), rows, score), flag, _summary(lines), info={"groups": lines})


def _columns(material: Material) -> Iterator[tuple[str, Sequence[str]]]:
    if material.table.groups is not None:
        yield "group", material.table.groups
    yield from material.table.columns.items()


def _line(right: np.ndarray, inside: np.ndarray, compared: int) -> dict[str, Any]:
    """Accuracy of a group, its 95 % interval, and whether it is weaker than the rest."""
    correct, n = int(right[inside].sum()), int(inside.sum())
    rest = float(right[~inside].mean()) if n < len(right) else 0.0
    high = wilson_interval(correct, n, NormalDist().inv_cdf(1 - DOUBT / (2 * compared)))[1]
    interval = wilson_interval(correct, n)
    return {"n": n, "accuracy": correct / n, "interval": interval, "rest": rest, "weak": high < rest}


def _summary(lines: Sequence[dict[str, Any]]) -> str:
    weak = [line for line in lines if line["weak"]]
    if not lines:
        return "no column of the data groups the images"
    if not weak:
        return f"none of {counted(len(lines), 'group')} is weaker than the rest"
    low, high = weak[0]["interval"]
    first = f"{weak[0]['column']} {weak[0]['value']}: {weak[0]['accuracy']:.3f} ({low:.3f} to {high:.3f})"
    return (
        f"{counted(len(weak), 'group', 'is')} weaker than the rest, the weakest {first}, others {weak[0]['rest']:.3f}"
    )
