"""The check ``outlier``: images that resemble no other image.

cosines to the nearest neighbours --mean distance--> far from the usual --> flags
"""

from __future__ import annotations

import numpy as np

from features.progress import counted
from pipeline.auditing.check import Finding, spread
from pipeline.auditing.material import Material

FAR = 3.0  # spans between the quartiles above the upper one: "far out" (Tukey, Exploratory Data Analysis, 1977)


class Outlier:
    """Images whose mean cosine distance to their ten nearest neighbours is far above the usual.

    The mean distance to the k nearest neighbours as the score of an outlier: Angiulli and Pizzuti, PKDD 2002. Distances are
    compared as logarithms, because they are skewed to the right. The score is 1 - 2**(-distance / bound), a half at the bound.
    """

    name, about, pixels = "outlier", "it resembles no other image", False

    def __call__(self, material: Material) -> Finding:
        """Judge all rows."""
        rows, near = material.rows, material.near
        flag = np.zeros(len(material), bool)
        if near.similarity.shape[1] == 0:
            return Finding(spread(len(material), rows[:0], np.zeros(0)), flag, "there are no other images")
        distance = np.maximum(1 - near.similarity.mean(axis=1, dtype=np.float64), 1e-6)
        low, high = np.quantile(np.log(distance), (0.25, 0.75))
        bound = float(np.exp(high + FAR * (high - low)))
        flag[rows[distance > bound]] = True
        summary = "no image is far from all others"
        if flag.any():
            summary = (
                f"{counted(int(flag.sum()), 'image', 'is')} far from all others (cosine distance above {bound:.2f})"
            )
        score = 1 - np.exp2(-distance / bound)
        return Finding(spread(len(material), rows, score), flag, summary, info={"bound": bound})
