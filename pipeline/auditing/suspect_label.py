"""The check ``suspect-label``: labels that the images speak against.

out-of-fold probabilities, labels --`pipeline.auditing.confident`--> P(class | pixels, label) --> score, class suggested, flags
"""

from __future__ import annotations

import numpy as np

from features.progress import counted
from pipeline.auditing.check import Finding, spread
from pipeline.auditing.material import Material


class SuspectLabel:
    """Labels that are more likely wrong than right, by a head that had not seen the image.

    The score is the probability that the label is wrong; a label above a half is flagged. The most probable other class is
    suggested.
    """

    name, about, pixels = "suspect-label", "its label is more likely wrong than right", False

    def __call__(self, material: Material) -> Finding:
        """Judge all labelled rows that a head has judged."""
        rows, likely = material.likely
        count, labels = len(material), material.labels[rows]
        flag, suggested = np.zeros(count, bool), np.full(count, -1, np.int32)
        if not len(rows):
            nothing = "there are not two classes with training images to tell apart"
            return Finding(spread(count, rows, np.zeros(0)), flag, nothing, suggested)
        every = np.arange(len(rows))
        score = 1 - likely[every, labels]
        others = likely.copy()
        others[every, labels] = -1
        flag[rows] = score > 0.5
        suggested[rows] = others.argmax(axis=1)
        share = float(score[np.isin(rows, material.train)].mean())
        summary = f"an estimated {share:.1%} of the training labels are wrong; no single one is likely to be"
        if flag.any():
            found = counted(int(flag.sum()), "label", "is")
            summary = f"{found} more likely wrong than right; an estimated {share:.1%} of the training labels are wrong"
        return Finding(spread(count, rows, score), flag, summary, suggested, {"estimated_share_of_wrong_labels": share})
