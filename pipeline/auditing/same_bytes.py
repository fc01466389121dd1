"""The check ``same-bytes``: one file under two labels.

sha256 of each row --group--> labels of each content --differ--> flags
"""

from __future__ import annotations

import numpy as np

from features.files import printable
from features.progress import counted
from pipeline.auditing.check import Finding, spread
from pipeline.auditing.material import Material

LISTED = 100  # contents that ``info`` names


class SameBytes:
    """Labels of copies of the same file that contradict each other.

    The score is the share of the copies with another label. The most frequent label is suggested if there is only one.
    """

    name, about, pixels = "same-bytes", "the same file has two labels", False

    def __call__(self, material: Material) -> Finding:
        """Judge all labelled rows."""
        rows, count = material.labelled, len(material)
        labels, copies = material.labels[rows], material.copies[rows]
        order = np.argsort(copies, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(copies[order])) + 1) if len(order) else []
        score, suggested, listed = np.zeros(len(rows)), np.full(count, -1, np.int32), []
        for group in (found for found in groups if len(found) > 1):
            values, times = np.unique(labels[group], return_counts=True)
            if len(values) == 1:
                continue
            score[group] = 1 - times[np.searchsorted(values, labels[group])] / len(group)
            most = values[times == times.max()]
            if len(most) == 1:
                suggested[rows[group]] = np.where(labels[group] == most[0], -1, most[0])
            listed.append([self._named(material, row) for row in rows[group].tolist()])
        flag = np.zeros(count, bool)
        flag[rows[score > 0]] = True
        summary = "no file has two labels"
        if listed:
            summary = f"{counted(len(listed), 'file', 'has')} several labels: {' = '.join(listed[0][:3])}"
        return Finding(spread(count, rows, score), flag, summary, suggested, {"files": listed[:LISTED]})

    @staticmethod
    def _named(material: Material, row: int) -> str:
        return printable(f"{material.table.paths[row]} ({material.classes[material.labels[row]]})")
