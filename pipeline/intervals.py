"""The 95 % interval of an accuracy, by one formula wherever an interval is recorded, shown or compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def wilson_interval(correct: int, n: int) -> list[float]:
    """95 % interval of an accuracy, [low, high]: Wilson's score interval (Wilson 1927; Agresti and Coull 1998).

    A better count never has a lower bound below that of a worse one: both bounds rise with ``correct``.

    Examples
    --------
    >>> [[round(bound, 3) for bound in wilson_interval(correct, 24)] for correct in (24, 23, 0)]
    [[0.862, 1.0], [0.798, 0.993], [0.0, 0.138]]
    """
    doubt = Z_95**2 / n
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
