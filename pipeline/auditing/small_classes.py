"""The check ``small-class``: classes with too few training images to learn or to judge them.

labels of training rows --count--> classes below the bound --> flags of their rows
"""

from __future__ import annotations

import numpy as np

from features.files import printable
from features.progress import counted
from pipeline.auditing.check import Finding, below, spread
from pipeline.auditing.material import Material

LEAST = 10  # training images of a class; the 95 % interval of an accuracy of fewer is wider than 0.5


class SmallClass:
    """Classes with fewer than `LEAST` training images; copies of a file count once."""

    name, about, pixels = "small-class", f"its class has fewer than {LEAST} training images", False

    def __call__(self, material: Material) -> Finding:
        """Judge all labelled rows by their class."""
        rows, train = material.labelled, material.train
        kinds = np.unique(np.stack([material.copies[train], material.labels[train]]), axis=1)[1]
        counts = np.bincount(kinds, minlength=len(material.classes))
        flag = np.zeros(len(material), bool)
        flag[rows] = counts[material.labels[rows]] < LEAST
        few = {name: int(n) for name, n in zip(material.classes, counts, strict=True) if n < LEAST}
        summary = f"every class has at least {LEAST} training images"
        if few:
            some = ", ".join(f"{printable(name)} {n}" for name, n in sorted(few.items(), key=lambda item: item[1])[:5])
            summary = f"{counted(len(few), 'class', 'has')} fewer than {LEAST} training images: {some}"
        score = below(counts[material.labels[rows]], LEAST)
        return Finding(spread(len(material), rows, score), flag, summary, info={"classes": few})
