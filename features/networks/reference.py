"""How engines are compared: on fixed reference images, by the relative difference of their outputs."""

from __future__ import annotations

import numpy as np

REFERENCES = 4  # images


def reference_images(height: int, width: int, count: int = REFERENCES) -> np.ndarray:
    """Make images of soft coloured blotches in three sizes; every call gives the same images.

    Returns
    -------
    uint8, (count, height, width, 3), 0-255
    """
    generator = np.random.Generator(np.random.Philox(key=0))
    total = np.zeros((count, height, width, 3))
    for cells, strength in ((3, 48.0), (9, 32.0), (27, 16.0)):
        rows, columns = (
            np.maximum(0, 1 - np.abs(np.linspace(0, cells - 1, length)[:, None] - np.arange(cells)))
            for length in (height, width)
        )
        blotches = generator.standard_normal((count, cells, cells, 3)) * strength
        total += np.einsum("hr,nrcd,wc->nhwd", rows, blotches, columns, optimize=True)
    return np.clip(total + 128, 0, 255).astype(np.uint8)


def relative_difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative L2 difference, ``||a-b|| / ||b||``; infinite if shapes differ or a number is not finite.

    Examples
    --------
    >>> relative_difference(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    0.1
    >>> relative_difference(np.zeros(2), np.zeros(2))
    0.0
    """
    if got.shape != expected.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):  # from infinity minus infinity
        difference = float(np.linalg.norm(got.astype(np.float64) - expected))
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    if not np.isfinite(difference) or (difference and not scale):
        return float("inf")
    return difference / scale if difference else 0.0


def evenly_spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` evenly spaced integers from 0 to ``count - 1``, including the first and the last.

    Examples
    --------
    >>> evenly_spread(10, 4), evenly_spread(2, 4), evenly_spread(0, 4)
    ([0, 3, 6, 9], [0, 1], [])
    """
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist() if count else []
