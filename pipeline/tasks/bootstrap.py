"""95 % intervals of scores that have no formula: the Poisson bootstrap, in which each row counts Poisson(1) times.

Hanley and MacGibbon, Creating non-parametric bootstrap samples using Poisson frequencies, Computer Methods and Programs in
Biomedicine 83, 2006. The draws are the same each time, so that scores are.
"""

from __future__ import annotations

import numpy as np

MOST, LEAST, NUMBERS = 200, 40, 20_000_000  # samples, fewer where the rows are many


def row_weights(rows: int) -> np.ndarray:
    """How often each row counts in each sample: float32, (samples, rows)."""
    samples = int(np.clip(NUMBERS // max(1, rows), LEAST, MOST))
    return np.random.default_rng(0).poisson(1.0, (samples, rows)).astype(np.float32)


def percentiles(values: np.ndarray, estimate: float) -> list[float]:
    """The interval from the scores of the samples, [low, high]; samples without a score (NaN) are left out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return [estimate, estimate]
    low, high = np.percentile(known, (2.5, 97.5))
    return [min(float(low), estimate), max(float(high), estimate)]
