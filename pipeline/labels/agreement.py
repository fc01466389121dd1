"""Where people disagree about an image.

Labels --the last decision of each person about each image--> images that several judged --> alike, or listed
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.labels.file import SEEN, SPLIT, WITHDRAWN, Labels, is_person, keys_of

LISTED = 50  # images about which people disagree that are listed


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far people agree.

    Parameters
    ----------
    images : int
        Images that at least two people judged.
    alike : int
        Those of them about which all agree.
    disagreements : tuple of (str, dict)
        Path of an image, and the value that each person gave it last; the first `LISTED`.
    """

    images: int
    alike: int
    disagreements: tuple[tuple[str, dict[str, str]], ...]

    @property
    def rate(self) -> float | None:
        """Share of the images about which all agree, 0-1; None if no image was judged by several people."""
        return self.alike / self.images if self.images else None


def agreement(labels: Labels) -> Agreement:
    """Compare the last decisions of all people; those of machines, about splits, and withdrawn ones do not count."""
    people = np.array([is_person(word) for word in labels.people.words] or [False], bool)
    places = np.flatnonzero(people[labels.people.codes] & ~labels.about(SPLIT, SEEN))
    _, images = np.unique(keys_of(labels.sha256[places]), return_inverse=True)
    things = images.astype(np.int64) * len(labels.targets.words) + labels.targets.codes[places]
    judgements = things * len(labels.people.words) + labels.people.codes[places]
    order = np.argsort(judgements, kind="stable")
    last = order[np.append(np.diff(judgements[order]) != 0, True)[: len(order)]]
    values = labels.values.codes[places]
    withdrawn = np.array([word == WITHDRAWN for word in labels.values.words] or [False], bool)
    last = last[~withdrawn[values[last]]]
    last = last[np.argsort(things[last], kind="stable")]
    starts = np.flatnonzero(np.append(True, np.diff(things[last]) != 0)[: len(last)])
    counts = np.diff(np.append(starts, len(last)))
    low, high = (op.reduceat(values[last], starts) if len(starts) else values[:0] for op in (np.minimum, np.maximum))
    several, unlike = counts > 1, low != high
    listed = []
    for start, count in zip(starts[unlike][:LISTED].tolist(), counts[unlike][:LISTED].tolist(), strict=True):
        said = [labels.decisions[place] for place in places[last[start : start + count]].tolist()]
        listed.append((said[-1].path, {one.by: one.value for one in said}))
    return Agreement(int(several.sum()), int((several & ~unlike).sum()), tuple(listed))
