"""Early stopping: one rule for everything that is trained epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from features.progress import Progress
from pipeline.config import History


class Patience:
    """Counts the epochs without a lower validation loss, for one head or for many heads at once.

    Parameters
    ----------
    limit : int
        Number of such epochs after which training stops; 0: it never stops early.
    lowest, waited : float and int, or arrays of them
        Lowest loss so far, and number of epochs since then.
    """

    def __init__(self, limit: int, lowest: Any = np.inf, waited: Any = 0) -> None:
        self.limit, self.lowest, self.waited = limit, lowest, waited

    def lower(self, loss: Any) -> Any:
        """Record the loss of the next epoch and return whether it is lower than all earlier ones."""
        lower = loss < self.lowest
        self.waited = np.where(lower, 0, self.waited + 1)
        self.lowest = np.where(lower, loss, self.lowest)
        return lower

    @property
    def over(self) -> Any:
        """Whether training should stop."""
        return self.waited >= self.limit if self.limit else np.zeros(np.shape(self.waited), bool)


def train_epochs(
    pass_over: Callable[[int], dict[str, float]],
    measure: Callable[[], tuple[float, float]] | None,
    snapshot: Callable[[], Any],
    *,
    epochs: int,
    patience: int,
    progress: Progress | None = None,
    measured: str = "accuracy",
) -> tuple[History, Any]:
    """Train epoch by epoch with early stopping.

    Parameters
    ----------
    pass_over : callable
        Trains the epoch of a given number, counted from 1, and returns values for the history.
    measure : callable, optional
        Returns log loss and accuracy of the validation rows.
    snapshot : callable
        Returns a copy of the trained weights.
    epochs, patience : int
        Maximum number of epochs; epochs without a lower log loss after which training stops, 0: it never stops early.
    progress : callable, optional
        Called with ("train-head", epochs done, epochs).
    measured : str
        What the second value of ``measure`` is.

    Returns
    -------
    history : dict of str to list of float
        ``epoch``, the values returned by ``pass_over`` and, with validation, ``val_loss val_accuracy``.
    best : object
        The snapshot of the epoch with the lowest log loss; without validation, of the last epoch.
    """
    history: History = {"epoch": []}
    waiting, best = Patience(patience), None
    for epoch in range(1, epochs + 1):
        row = {"epoch": float(epoch), **pass_over(epoch)}
        if measure is not None:
            row["val_loss"], row[f"val_{measured}"] = measure()
            if waiting.lower(row["val_loss"]):
                best = snapshot()
        for name, value in row.items():
            history.setdefault(name, []).append(value)
        if progress:
            progress("train-head", epoch, epochs)
        if waiting.over:
            break
    return history, snapshot() if best is None else best
