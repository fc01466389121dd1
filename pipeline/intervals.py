"""The 95 % interval of an accuracy, and of the difference of two, by one formula wherever one is recorded, shown or compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def wilson_interval(correct: int, n: int, z: float = Z_95) -> list[float]:
    """Interval of an accuracy, [low, high], 95 % by default: Wilson's score interval (Wilson 1927; Agresti and Coull 1998).

    A better count never has a lower bound below that of a worse one: both bounds rise with ``correct``. ``z`` is the
    quantile of the normal distribution.

    Examples
    --------
    >>> [[round(bound, 3) for bound in wilson_interval(correct, 24)] for correct in (24, 23, 0)]
    [[0.862, 1.0], [0.798, 0.993], [0.0, 0.138]]
    """
    doubt = z**2 / n
    centre = correct / n + doubt / 2
    half = math.sqrt(correct * (n - correct) / n * doubt / n + doubt**2 / 4)
    low, high = (centre - half) / (1 + doubt), (centre + half) / (1 + doubt)
    return [low if correct else 0.0, high if correct < n else 1.0]  # free of rounding at the ends


def interval_of(scores: Mapping[str, Any]) -> list[float]:
    """`wilson_interval` of scores, from their ``accuracy`` and ``n``.

    Earlier releases recorded a percentile bootstrap in ``accuracy_interval``. Intervals are shown and compared by this
    function, so that those of old and new runs are of one kind.
    """
    return wilson_interval(round(scores["accuracy"] * scores["n"]), scores["n"])


def paired_interval(gained: int, lost: int, n: int) -> list[float]:
    """95 % interval of the difference of two accuracies on the same images, [low, high].

    Wald's interval after half an image is added to each of the four cells (Agresti and Min, Statistics in Medicine 24, 2005).
    Images that both predict rightly, or both wrongly, tell nothing about the difference, so it is narrower than the two
    intervals of the accuracies suggest.

    Parameters
    ----------
    gained, lost : int
        Number of images that only the first one, and only the second one, predicts rightly.
    n : int
        Number of all images.

    Examples
    --------
    >>> [[round(bound, 3) for bound in paired_interval(*counts)] for counts in ((6, 3, 100), (12, 2, 100), (0, 0, 100))]
    [[-0.031, 0.09], [0.026, 0.17], [-0.019, 0.019]]
    """
    difference = (gained - lost) / (n + 2)
    half = Z_95 * math.sqrt((gained + lost + 1) / (n + 2) - difference**2) / math.sqrt(n + 2)
    return [max(-1.0, difference - half), min(1.0, difference + half)]
