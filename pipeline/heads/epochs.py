"""Epochs until validation gets no better: one rule for everything that is trained pass by pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from features.progress import Progress
from pipeline.config import History


class Patience:
    """Counts epochs without a lower validation loss, of one training or of many at a time.

    Parameters
    ----------
    limit : int
        Epochs to wait; 0: for ever.
    lowest, waited : float and int, or arrays of them
        Lowest loss so far, and epochs since then.
    """

    def __init__(self, limit: int, lowest: Any = np.inf, waited: Any = 0) -> None:
        self.limit, self.lowest, self.waited = limit, lowest, waited

    def lower(self, loss: Any) -> Any:
        """Take the loss of one epoch more; whether it is lower than all before."""
        lower = loss < self.lowest
        self.waited = np.where(lower, 0, self.waited + 1)
        self.lowest = np.where(lower, loss, self.lowest)
        return lower

    @property
    def over(self) -> Any:
        """Whether the limit is reached."""
        return self.waited >= self.limit if self.limit else np.zeros(np.shape(self.waited), bool)


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
    waiting, best = Patience(patience), None
    for epoch in range(1, epochs + 1):
        row = {"epoch": float(epoch), **pass_over(epoch)}
        if measure is not None:
            row["val_loss"], row["val_accuracy"] = measure()
            if waiting.lower(row["val_loss"]):
                best = snapshot()
        for name, value in row.items():
            history.setdefault(name, []).append(value)
        if progress:
            progress("train-head", epoch, epochs)
        if waiting.over:
            break
    return history, snapshot() if best is None else best
