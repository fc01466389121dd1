"""Plots of a run: images for its folder, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.head import History
from pipeline.metrics import confusion

LABELLED_CLASSES = 30  # above this a confusion matrix has no room for names


def plot_run(
    folder: Path, history: History, labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> None:
    """Confusion matrix and, for epochs, learning curves.

    Parameters
    ----------
    folder : Path
        Made here; gets ``confusion.png`` and ``learning.png``.
    history : dict of str to list of float
        Columns of ``history.csv``.
    labels : int32, (n,)
        Of the validation rows.
    probabilities : float64, (n, c), 0-1
        Of the same rows.
    classes : sequence of str
        Class names, in label order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir()
    table = confusion(labels, probabilities.argmax(axis=1), len(classes))
    figure = Figure(figsize=(6, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(table / np.maximum(table.sum(axis=1, keepdims=True), 1), vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title="validation images")
    if len(classes) <= LABELLED_CLASSES:
        names = [name if len(name) <= 20 else name[:19] + "…" for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(classes)), names, parse_math=False)
        for row, column in np.argwhere(table):
            dark = table[row, column] > table[row].sum() / 2
            axes.text(
                column, row, table[row, column], ha="center", va="center", color="white" if dark else "black", size=8
            )
    figure.savefig(folder / "confusion.png", dpi=100)
    if "epoch" in history:
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name in ("loss", "val_loss"):
            if name in history:
                axes.plot(history["epoch"], history[name], label={"loss": "training", "val_loss": "validation"}[name])
        axes.set(xlabel="epoch", ylabel="log loss")
        axes.legend()
        figure.savefig(folder / "learning.png", dpi=100)
