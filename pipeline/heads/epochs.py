"""Epochs until validation gets no better: one rule for everything that is trained pass by pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.heads.head import History, Progress


def train_epochs(
    pass_over: Callable[[int], dict[str, float]],
    measure: Callable[[], tuple[float, float]] | None,
    snapshot: Callable[[], Any],
    *,
    epochs: int,
    patience: int,
    progress: Progress | None = None,
) -> tuple[History, Any]:
    """Train pass by pass.

    Parameters
    ----------
    pass_over : callable
        Trains one epoch, counted from 1; what it returns goes into the history.
    measure : callable, optional
        Log loss and accuracy of the validation rows.
    snapshot : callable
        Copies what is trained.
    epochs, patience : int
        Upper limit of passes; epochs without a lower log loss before training stops, 0: never.
    progress : callable, optional
        Called with ("train-head", epochs done, epochs).

    Returns
    -------
    history : dict of str to list of float
        ``epoch``, what ``pass_over`` gives, and with validation ``val_loss val_accuracy``.
    best : object
        The snapshot of the epoch with the lowest log loss; without validation, of the last.
    """
    history: History = {"epoch": []}
    lowest, waited, best = np.inf, 0, None
    for epoch in range(1, epochs + 1):
        row = {"epoch": float(epoch), **pass_over(epoch)}
        waited += 1
        if measure is not None:
            row["val_loss"], row["val_accuracy"] = measure()
            if row["val_loss"] < lowest:
                lowest, waited, best = row["val_loss"], 0, snapshot()
        for name, value in row.items():
            history.setdefault(name, []).append(value)
        if progress:
            progress("train-head", epoch, epochs)
        if measure is not None and patience and waited >= patience:
            break
    return history, snapshot() if best is None else best
