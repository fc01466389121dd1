"""What half precision costs: the same images in float32, and a head on both.

some images -> chosen engine, stored type | Keras, float32 -> relative error, change of a head's accuracy
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import numpy as np

from features.errors import UnreadableImageError
from features.images import decode_image
from features.sources import ImageSet

if TYPE_CHECKING:
    from features.networks import Network

logger = logging.getLogger(__name__)
FOLDS = 5


def check_precision(
    network: Network, images: ImageSet, count: int, *, decoders: Executor, batch_size: int = 32, device: str = "auto"
) -> dict[str, Any]:
    """Compare the chosen precision and stored type with float32.

    Parameters
    ----------
    network : Network
        What makes the features; its recipes say how they are stored.
    images : ImageSet
        The source. Labelled images are taken, at even distances in its order.
    count : int
        Images to compare, at least 1.
    decoders : Executor
        Threads that read and decode.
    batch_size : int
        Images of one forward pass.
    device : {"auto", "cpu", "gpu"}
        Where both run.

    Returns
    -------
    dict
        ``images`` compared, and by data set ``relative_error``, that is ||a-b|| / ||b|| over all of them, and
        ``accuracy`` and ``accuracy_float32``: of a logistic head, cross-validated on the same folds; null where no
        class has two images. Features with height and width are averaged over them for the head.
    """
    chosen = _some(images, count)
    rule = network.recipes[0].pixels

    def load(index: int) -> np.ndarray | None:
        try:
            return decode_image(images.read(index), rule).pixels
        except UnreadableImageError:
            return None

    decoded = dict(zip(chosen, decoders.map(load, chosen), strict=True))
    pixels = {index: values for index, values in decoded.items() if values is not None}
    labels = images.labels[list(pixels)]
    exact = dataclasses.replace(
        network,
        recipes=tuple(dataclasses.replace(item, precision="float32", dtype="float32") for item in network.recipes),
        engine_name="keras",
    )
    batches = [list(pixels.values())[start : start + batch_size] for start in range(0, len(pixels), batch_size)]
    found, expected = (_run(item, batches, batch_size, device) for item in (network, exact))
    report = {}
    for recipe in network.recipes:
        stored = found[recipe.name].astype(recipe.dtype).astype(np.float32)
        reference = expected[recipe.name]
        report[recipe.name] = {
            "relative_error": float(np.linalg.norm(stored - reference) / max(float(np.linalg.norm(reference)), 1e-30)),
            "accuracy": _accuracy(stored, labels),
            "accuracy_float32": _accuracy(reference, labels),
        }
    return {"images": len(pixels), "data_sets": report}


def _some(images: ImageSet, count: int) -> list[int]:
    rows = np.flatnonzero(images.labels >= 0)
    rows = rows if len(rows) else np.arange(len(images))
    return [
        int(row) for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]
    ]


def _run(network: Network, batches: Sequence[list[np.ndarray]], batch_size: int, device: str) -> dict[str, np.ndarray]:
    engine = network.engine(network.recipes, batch_size=batch_size, device=device)
    outputs = [engine(np.stack(batch)) for batch in batches]
    return {recipe.name: np.concatenate([output[recipe.name] for output in outputs]) for recipe in network.recipes}


def _accuracy(features: np.ndarray, labels: np.ndarray) -> float | None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes, counts = np.unique(labels, return_counts=True)
    enough = np.isin(labels, classes[counts >= 2])
    if (counts >= 2).sum() < 2 or (labels < 0).all():
        return None
    X = features.mean(axis=tuple(range(1, features.ndim - 1))) if features.ndim > 2 else features
    folds = StratifiedKFold(min(FOLDS, int(counts[counts >= 2].min())), shuffle=True, random_state=0)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return float(cross_val_score(head, X[enough], labels[enough], cv=folds).mean())
