"""The check ``near-duplicate``: images that are almost equal, within and across classes and splits.

nearest neighbours of each row ---------------------+--> pairs at or above the threshold --> flags
pairs across splits (`pipeline.sweeps.leakage`) ----+
"""

from __future__ import annotations

from typing import Any

import numpy as np

from features.files import printable
from features.progress import counted
from features.sources.splits import SPLITS
from pipeline.auditing.check import Finding, spread
from pipeline.auditing.material import Material
from pipeline.sweeps.leakage import THRESHOLD, near_duplicates

LISTED = 100  # pairs that ``info`` names


class NearDuplicate:
    """Images with a neighbour whose features have a cosine of at least `THRESHOLD`, which is the score.

    Pairs across splits are found by `near_duplicates`, those with the test split too: what leaks into it is no label.
    Within a split the ten nearest neighbours of each image are looked at.
    """

    name, about, pixels = "near-duplicate", "another image is almost equal", False

    def __call__(self, material: Material) -> Finding:
        """Judge all rows."""
        rows, near = material.rows, material.near
        place = {path: row for row, path in enumerate(material.table.paths)}
        across = near_duplicates(material.store, material.name, limit=LISTED)
        similar: dict[tuple[int, int], float] = {}
        for pair in across.pairs:
            similar[_ordered(place[pair.first], place[pair.second])] = pair.similarity
        lines, columns = np.nonzero(near.similarity >= THRESHOLD)
        for line, column in zip(lines.tolist(), columns.tolist(), strict=True):
            pair_of_rows = _ordered(int(rows[line]), int(near.rows[line, column]))
            similar.setdefault(pair_of_rows, float(near.similarity[line, column]))
        ends, cosines = np.array(list(similar), np.int64).reshape(-1, 2), np.array(list(similar.values()))
        best = np.full(len(material), np.nan)
        best[rows] = near.similarity[:, 0] if near.similarity.shape[1] else 0
        for side in ends.T:
            np.fmax.at(best, side, cosines)
        score = spread(len(material), rows, best[rows])
        flag = np.nan_to_num(score) >= np.float32(THRESHOLD)
        return Finding(score, flag, _summary(material, ends, across.found), info=_info(material, ends, cosines, across))


def _ordered(first: int, second: int) -> tuple[int, int]:
    return (first, second) if first < second else (second, first)


def _kinds(material: Material, ends: np.ndarray) -> dict[str, np.ndarray]:
    """What each pair is, bool (n,) each."""
    labels, splits, copies = (values[ends] for values in (material.labels, material.splits, material.copies))
    known = (labels >= 0).all(axis=1) & np.isin(ends, material.rows).all(axis=1)
    return {
        "copies": copies[:, 0] == copies[:, 1],
        "across_classes": known & (labels[:, 0] != labels[:, 1]),
        "across_splits": splits[:, 0] != splits[:, 1],
    }


def _summary(material: Material, ends: np.ndarray, across: int) -> str:
    if not len(ends):
        return "no two images are almost equal"
    kinds = {name: int(found.sum()) for name, found in _kinds(material, ends).items()}
    crossing = max(across, kinds["across_splits"])
    return (
        f"{counted(len(ends), 'pair')}: {kinds['copies']:,} of equal files, {kinds['across_classes']:,} across classes, "
        f"{crossing:,} across splits"
    )


def _info(material: Material, ends: np.ndarray, cosines: np.ndarray, across: Any) -> dict[str, Any]:
    kinds, table = _kinds(material, ends), material.table
    order = np.lexsort((-cosines, ~kinds["across_classes"], ~kinds["across_splits"]))[:LISTED]
    hidden = set(range(len(material))) - set(material.rows.tolist()) if len(order) else set()

    def label(row: int) -> str | None:
        shown = material.labels[row] >= 0 and row not in hidden
        return printable(material.classes[material.labels[row]]) if shown else None

    return {
        "threshold": THRESHOLD,
        "pairs_found": len(ends),
        **{name: int(found.sum()) for name, found in kinds.items()},
        "capped": across.capped,
        "pairs": [
            {
                "paths": [printable(table.paths[row]) for row in ends[k].tolist()],
                "splits": [SPLITS[table.splits[row]] for row in ends[k].tolist()],
                "labels": [label(row) for row in ends[k].tolist()],
                "similarity": round(float(cosines[k]), 4),
            }
            for k in order.tolist()
        ],
    }
