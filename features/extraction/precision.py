"""Measure the effect of half precision: compute some images in float32 too, and train a head on both.

some images -> chosen engine, stored type | the network's own engine, float32 -> relative error, accuracy of a head on each
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import numpy as np

from features.errors import UnreadableImageError
from features.networks.reference import evenly_spread
from features.pixels.decode import decode_image
from features.sources.imageset import ImageSet

if TYPE_CHECKING:
    from features.networks.network import Network

FOLDS = 5


def check_precision(
    network: Network,
    images: ImageSet,
    rows: Sequence[int],
    *,
    decoders: Executor,
    batch_size: int = 32,
    device: str = "auto",
) -> dict[str, Any]:
    """Compare features in the chosen precision and stored type with features in float32.

    Parameters
    ----------
    network : Network
        The network; its recipes determine the precision and the stored type.
    images : ImageSet
        The scanned source.
    rows : sequence of int
        Indices of the images to compare; see ``some_rows``.
    decoders : Executor
        Threads that read and decode images.
    batch_size : int
        Images per forward pass; no more than these are held in memory at a time.
    device : {"auto", "cpu", "gpu"}
        Device that both engines run on.

    Returns
    -------
    dict
        For each feature set: ``images``, the number compared; ``relative_error``, which is ||a-b|| / ||b|| over all of
        them; ``accuracy`` and ``accuracy_float32`` of a logistic head, cross-validated on the same folds, None unless
        two classes have two images each. For the head, features are averaged over height and width.
    """
    rule = network.recipes[0].pixels
    exact = dataclasses.replace(
        network,
        recipes=tuple(item.in_float32 for item in network.recipes),
        engine_name=network.own_engine,
    )
    engines = [item.engine(item.recipes, batch_size=batch_size, device=device) for item in (network, exact)]
    tallies = {recipe.name: _Tally(recipe.dtype) for recipe in network.recipes}

    def load(row: int) -> np.ndarray | None:
        try:
            return decode_image(images.read(row), rule).pixels
        except UnreadableImageError:
            return None  # the image became unreadable after the extraction

    compared: list[int] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        decoded = [
            (row, pixels) for row, pixels in zip(part, decoders.map(load, part), strict=True) if pixels is not None
        ]
        if decoded:
            compared += [row for row, _ in decoded]
            found, expected = (engine(np.stack([pixels for _, pixels in decoded])) for engine in engines)
            for name, tally in tallies.items():
                tally.add(found[name], expected[name])
    labels = images.labels[compared]
    return {name: {"images": len(compared), **tally.report(labels)} for name, tally in tallies.items() if compared}


class _Tally:
    """The running sums of squares and the pooled features of one feature set."""

    def __init__(self, dtype: str) -> None:
        self._dtype, self._error, self._scale = dtype, 0.0, 0.0
        self._stored: list[np.ndarray] = []
        self._exact: list[np.ndarray] = []

    def add(self, found: np.ndarray, expected: np.ndarray) -> None:
        stored = found.astype(self._dtype).astype(np.float32)
        self._error += float(np.square(stored - expected, dtype=np.float64).sum())
        self._scale += float(np.square(expected, dtype=np.float64).sum())
        for kept, values in ((self._stored, stored), (self._exact, expected)):
            kept.append(values.mean(axis=tuple(range(1, values.ndim - 1))) if values.ndim > 2 else values)

    def report(self, labels: np.ndarray) -> dict[str, float | None]:
        return {
            "relative_error": float(np.sqrt(self._error / max(self._scale, 1e-30))),
            "accuracy": _accuracy(np.concatenate(self._stored), labels),
            "accuracy_float32": _accuracy(np.concatenate(self._exact), labels),
        }


def some_rows(labels: np.ndarray, readable: Sequence[int], count: int) -> list[int]:
    """Choose ``count`` evenly spaced rows to compare, out of the labelled readable ones, or all readable if none is."""
    rows = np.asarray(readable, dtype=np.int64)
    labelled = rows[labels[rows] >= 0]
    rows = labelled if len(labelled) else rows
    return [int(row) for row in rows[evenly_spread(len(rows), count)]]


def _accuracy(features: np.ndarray, labels: np.ndarray) -> float | None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes, counts = np.unique(labels, return_counts=True)
    enough = np.isin(labels, classes[counts >= 2])
    if (counts >= 2).sum() < 2 or (labels < 0).all():
        return None
    folds = StratifiedKFold(min(FOLDS, int(counts[counts >= 2].min())), shuffle=True, random_state=0)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return float(cross_val_score(head, features[enough], labels[enough], cv=folds).mean())
