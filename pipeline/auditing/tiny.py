"""The check ``tiny``: images much smaller than the others.

widths and heights in the store --> shorter edge --bound--> flags
"""

from __future__ import annotations

import numpy as np

from features.progress import counted
from pipeline.auditing.check import Finding, below, spread
from pipeline.auditing.material import Material

LEAST = 64  # pixels of the shorter edge; or half of the median edge, if that is less, for data sets of small images


class Tiny:
    """Images with a shorter edge of fewer than `LEAST` pixels, and than half of the usual."""

    name, about, pixels = "tiny", "it is much smaller than the others", False

    def __call__(self, material: Material) -> Finding:
        """Judge all rows by the sizes in the store."""
        rows, table = material.rows, material.table
        edges = np.minimum(table.widths[rows], table.heights[rows]).astype(np.float64)
        usual = float(np.median(edges)) if len(rows) else 0.0
        bound = min(LEAST, usual / 2)
        flag = np.zeros(len(material), bool)
        flag[rows[edges < bound]] = True
        summary = f"no image is below {bound:.0f} pixels; the median of the shorter edges is {usual:.0f}"
        if flag.any():
            found = counted(int(flag.sum()), "image", "has")
            summary = f"{found} a shorter edge below {bound:.0f} pixels; the median is {usual:.0f}"
        return Finding(spread(len(material), rows, below(edges, bound)), flag, summary, info={"median": usual})
