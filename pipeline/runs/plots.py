"""Plots of a run, drawn without a display and saved as images in its folder.

A plot is as wide as one column of a page (3.5 inches, type of at least 7 points), or two where the classes need more
room. The colours blue and vermillion of Okabe and Ito (Color Universal Design, 2008) can be distinguished with all kinds
of colour vision, and never carry a meaning alone: lines also differ in dash and marker, cells in position and number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.targets import UNKNOWN
from pipeline.config import History
from pipeline.scores.metrics import confusion
from pipeline.tables import shortened
from pipeline.tasks.table import TASKS

LABELLED_CLASSES = 30  # above this a confusion matrix has no room for names
COLUMN, PAGE = 3.5, 7.0  # inches
DPI = 200
BLUE, VERMILLION, INK, RULE, EMPTY = "#0072B2", "#D55E00", "#222222", "#D9DDE2", "#F4F5F7"
LABEL_LENGTH = 18  # characters of a class name
STYLE: dict[Any, Any] = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
}

MOST_NUMBERS = 4  # panels of predicted numbers
MOST_CLASSES = 1000  # upper limit for a confusion matrix: with more classes, each is smaller than a pixel


def plot_run(
    folder: Path,
    history: History,
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    task: str = "classification",
) -> None:
    """Draw the plot of a task, such as the confusion matrix, and, if the head was trained in epochs, the learning curves.

    Parameters
    ----------
    folder : Path
        Folder to make; receives the plot of the task (``confusion.png``, up to `MOST_CLASSES` classes; ``labels.png``;
        ``numbers.png``) and ``learning.png``.
    history : dict of str to list of float
        Columns of ``history.csv``.
    labels : int32, (n,)
        Labels of the validation rows.
    probabilities : float64, (n, c), 0-1
        Predictions of the same rows.
    classes : sequence of str
        Class names, in label order.
    task : str
        Name of the task.
    """
    import matplotlib

    folder.mkdir()
    with matplotlib.rc_context(STYLE):
        name, draw = PLOTS[task]
        if len(classes) <= MOST_CLASSES:
            draw(labels, probabilities, classes).savefig(folder / f"{name}.png", dpi=DPI)
        if "epoch" in history:
            _learning(history, TASKS[task].loss_label).savefig(folder / "learning.png", dpi=DPI)


def shades(table: np.ndarray) -> np.ndarray:
    """Colours of a confusion matrix, float64, (c, c, 3), 0-1.

    Correct predictions range from pale grey to blue by their share of the true class, mistakes from pale grey to
    vermillion by the square root of their share, so that rare mistakes are visible.
    """
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    hit = np.eye(len(table), dtype=bool)
    strength = np.where(hit, share, 0.8 * np.sqrt(share))[..., None]
    target = np.where(hit[..., None], _rgb(BLUE), _rgb(VERMILLION))
    return np.asarray(_rgb(EMPTY) + strength * (target - _rgb(EMPTY)))


def ink_on(colour: np.ndarray) -> str:
    """Choose white or dark text, whichever has more contrast (relative luminance of WCAG 2.1)."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.0637 else INK


def _confusion(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> Any:
    table, count = confusion(labels, probabilities.argmax(axis=1), len(classes)), len(classes)
    named = count <= LABELLED_CLASSES
    side = COLUMN if count <= 8 else min(PAGE, 2.2 + 0.2 * count) if named else COLUMN
    figure, axes = new_figure(side, side)
    colours = shades(table)
    axes.imshow(colours, interpolation="nearest")
    total = int(table.sum())
    title = f"{total:,} validation images, {table.trace() / max(total, 1):.1%} right"
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.spines[:].set_visible(False)
    if named:
        names = [shortened(name, LABEL_LENGTH) for name in classes]
        across = 0 if count <= 3 and max(map(len, names)) <= 10 else 90
        axes.set_xticks(range(count), names, rotation=across, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
        axes.tick_params(length=0)
        # Thin white lines between the cells.
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
        for row, column in np.argwhere(table):
            style = {"ha": "center", "va": "center", "size": 9 if count <= 8 else 7}
            axes.text(column, row, f"{table[row, column]:,}", color=ink_on(colours[row, column]), **style)
    return figure


def _learning(history: History, loss: str) -> Any:
    """Draw the loss and, if known, the score in a second panel below it, over the same epochs."""
    epochs = history["epoch"]
    panels = {
        loss: {"loss": "training", "val_loss": "validation"},
        "accuracy": {"accuracy": "training", "val_accuracy": "validation"},
        "mean AP": {"val_average_precision": "validation"},
        "R2": {"val_r2": "validation"},
    }
    shown = {label: [name for name in names if name in history] for label, names in panels.items()}
    shown = {label: names for label, names in shown.items() if names}
    figure, found = new_figure(COLUMN, 0.4 + 1.7 * len(shown), panels=len(shown))
    styles = {"training": (BLUE, "-", "o"), "validation": (VERMILLION, "--", "s")}
    kept = epochs[int(np.argmin(history["val_loss"]))] if "val_loss" in history else None
    for axes, (label, names) in zip(np.ravel(found), shown.items(), strict=True):
        axes.grid(axis="y")
        if kept is not None:
            axes.axvline(kept, color=INK, linewidth=0.7, linestyle=":", label=f"lowest, epoch {kept:g}")
        for name in names:
            colour, dash, marker = styles[panels[label][name]]
            style = {"color": colour, "linestyle": dash, "marker": marker, "markevery": max(1, len(epochs) // 12)}
            axes.plot(epochs, history[name], label=panels[label][name], **style)
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    first = np.ravel(found)[0]
    handles, titles = first.get_legend_handles_labels()
    order = sorted(range(len(titles)), key=lambda k: titles[k].startswith("lowest"))
    figure.legend(
        [handles[k] for k in order], [titles[k] for k in order], loc="outside upper left", ncols=3, fontsize=7
    )
    np.ravel(found)[-1].set_xlabel("epoch")
    return figure


def _labels(targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> Any:
    """Draw the average precision of each label beside its share of the images, which a guess would reach."""
    from sklearn.metrics import average_precision_score

    found = []
    for name, truth, values in zip(classes, targets.T, probabilities.T, strict=True):
        known = truth != UNKNOWN
        if (truth[known] == 1).any():
            precision = float(average_precision_score(truth[known] == 1, values[known]))
            found.append((precision, float(np.mean(truth[known] == 1)), name))
    found = sorted(found)[-LABELLED_CLASSES:]
    figure, axes = new_figure(COLUMN, 0.8 + 0.17 * max(3, len(found)))
    places = np.arange(len(found))
    axes.barh(places, [one[0] for one in found], color=BLUE, height=0.7, label="average precision")
    axes.plot([one[1] for one in found], places, "|", color=VERMILLION, markersize=8, label="share of images")
    axes.set_yticks(places, [shortened(one[2], LABEL_LENGTH) for one in found], parse_math=False)
    axes.set(xlim=(0, 1), title=f"{len(targets):,} validation images")
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    return figure


def _numbers(targets: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Any:
    """Draw predictions against what is true, of the first numbers."""
    shown = names[:MOST_NUMBERS]
    figure, panels = new_figure(COLUMN, 0.4 + 2.6 * len(shown), panels=len(shown), shared=False)
    for axes, name, truth, values in zip(np.ravel(panels), shown, targets.T, predicted.T, strict=False):
        known = np.isfinite(truth)
        both = np.concatenate([truth[known], values[known]])
        ends = [both.min(), both.max()] if len(both) else [0, 1]
        axes.plot(ends, ends, color=INK, linewidth=0.7, linestyle=":")
        axes.plot(truth[known], values[known], "o", color=BLUE, markersize=2, alpha=0.5)
        axes.set(xlabel="true", ylabel="predicted")
        axes.set_title(shortened(name, 40), parse_math=False)
    return figure


Plot = Callable[[np.ndarray, np.ndarray, Sequence[str]], Any]
# Task -> name of its plot, and what draws it.
PLOTS: dict[str, tuple[str, Plot]] = {
    "classification": ("confusion", _confusion),
    "multilabel": ("labels", _labels),
    "regression": ("numbers", _numbers),
}


def new_figure(width: float, height: float, *, panels: int = 1, shared: bool = True) -> tuple[Any, Any]:
    """Make a figure of this size in inches, and its axes, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(panels, 1, sharex=shared and panels > 1)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
