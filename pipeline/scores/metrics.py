"""Scores of predicted probabilities against labels, and the calibration of margins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from features.errors import HeadError
from pipeline.intervals import wilson_interval

BINS = 15  # of the calibration error


def evaluate(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Score the predictions of one split.

    Parameters
    ----------
    probabilities : float64, (n, c), 0-1, rows sum to 1
        Column k belongs to ``classes[k]``.
    labels : int32, (n,), 0 to c - 1
        True classes.
    classes : sequence of str, c names
        Used for the number of classes and in messages.

    Returns
    -------
    dict
        ``accuracy``; ``accuracy_interval`` [low, high], see `pipeline.intervals.wilson_interval`; ``balanced_accuracy``, the mean
        recall over the classes that occur; ``macro_f1`` over the classes that occur or are predicted;
        ``log_loss`` in nats; ``roc_auc`` (one against the rest, averaged over classes; None if a class does not
        occur); ``ece``, the expected calibration error; ``n``, the number of rows.

    Raises
    ------
    HeadError
        There are no rows, shapes do not fit, probabilities are not finite, or a label is outside the classes.

    Examples
    --------
    >>> scores = evaluate(np.array([[0.8, 0.2], [0.4, 0.6]]), np.array([0, 1]), ("cat", "dog"))
    >>> scores["accuracy"], scores["roc_auc"], round(scores["log_loss"], 4), round(scores["ece"], 4)
    (1.0, 1.0, 0.367, 0.3)
    """
    from sklearn.metrics import roc_auc_score

    probabilities = np.asarray(probabilities, dtype=np.float64)
    labels = np.asarray(labels)
    _check(probabilities, labels, classes)
    predictions = probabilities.argmax(axis=1)
    correct = predictions == labels
    table = confusion(labels, predictions, len(classes))
    hits, support, predicted = table.diagonal(), table.sum(axis=1), table.sum(axis=0)
    occurring, met = support > 0, support + predicted > 0
    scored = [1] if len(classes) == 2 else range(len(classes))
    auc = [roc_auc_score(labels == k, probabilities[:, k]) for k in scored] if occurring.all() else None
    return {
        "accuracy": float(correct.mean()),
        "accuracy_interval": wilson_interval(int(correct.sum()), len(labels)),
        "balanced_accuracy": float(np.mean(hits[occurring] / support[occurring])),
        "macro_f1": float(np.mean(2 * hits[met] / (support + predicted)[met])),
        "log_loss": log_loss(probabilities, labels),
        "roc_auc": None if auc is None else float(np.mean(auc)),
        "ece": calibration_error(probabilities, labels),
        "n": len(labels),
    }


def confusion(labels: np.ndarray, predictions: np.ndarray, classes_count: int) -> np.ndarray:
    """Count rows by (true class, predicted class).

    Returns
    -------
    int64, (c, c)
        One row per true class, one column per predicted class.

    Examples
    --------
    >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    cells = np.asarray(labels, dtype=np.int64) * classes_count + np.asarray(predictions, dtype=np.int64)
    return np.bincount(cells, minlength=classes_count**2).reshape(classes_count, classes_count)


def log_loss(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean of -ln(probability of the true class); probabilities are clipped to [eps, 1 - eps], as in scikit-learn."""
    smallest = np.finfo(np.float64).eps
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(np.average(-np.log(np.clip(chosen, smallest, 1 - smallest)), weights=weights))


def balanced_weights(y: np.ndarray) -> np.ndarray:
    """Weight of each row, float64 (n,) with mean 1, such that all classes that occur have the same total weight."""
    return np.asarray(class_weights(y)[y])


def class_weights(y: np.ndarray, classes: int = 0) -> np.ndarray:
    """Weight of each class, float64 (c,): rows / (classes that occur x rows of the class), scikit-learn's "balanced"."""
    counts = np.bincount(y, minlength=classes)
    return len(y) / (np.count_nonzero(counts) * np.maximum(counts, 1))


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance between probabilities and the one-hot label, 0-2 (Brier 1950)."""
    return float(np.square(probabilities - np.eye(probabilities.shape[1])[labels]).sum(axis=1).mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of the predicted class over 15 bins (low, high] of equal width.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


def softmax(outputs: np.ndarray) -> np.ndarray:
    """Softmax of each row: float64, (n, c)."""
    from scipy import special

    return np.asarray(special.softmax(np.asarray(outputs, dtype=np.float64), axis=1))


def two_columns(margins: np.ndarray) -> np.ndarray:
    """Turn the single margin m of two classes into [0, m]; leave the margins of more classes as they are."""
    return np.hstack([np.zeros_like(margins), margins]) if margins.shape[1] == 1 else margins


def fit_temperature(margins: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Find the temperature T > 0 that minimises the log loss of softmax(margins / T); return T and that loss.

    Parameters
    ----------
    margins : float64, (n, c)
        Margins of rows that the classifier was not fitted on.
    y : int32, (n,)
        Labels.
    weights : float64, (n,), optional
        Weights of the rows.

    Notes
    -----
    Temperature scaling: Guo et al., ICML 2017. As in Platt (1999) the targets are smoothed, here as if one row in n + 1
    had a wrong label, so that T does not tend to zero if the classes are perfectly separated.
    """
    from scipy.optimize import minimize_scalar

    def loss(log: float) -> float:
        return smoothed_log_loss(margins / np.exp(log), y, weights)

    found = minimize_scalar(loss, bounds=(-9, 9), method="bounded")
    return float(np.exp(found.x)), float(found.fun)


def smoothed_log_loss(outputs: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Log loss of softmax(outputs) against smoothed targets; see `fit_temperature`."""
    from scipy import special

    logs = special.log_softmax(outputs, axis=1)
    doubt = 1 / (len(y) + 1)
    true = logs[np.arange(len(y)), y]
    others = (logs.sum(axis=1) - true) / (outputs.shape[1] - 1)
    return float(-np.average((1 - doubt) * true + doubt * others, weights=weights))


def _check(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    expected = (len(labels), len(classes))
    if probabilities.shape != expected or not len(labels):
        raise HeadError(
            f"probabilities: received shape {probabilities.shape}, expected {expected} with at least one row: "
            f"{len(labels)} labels and {len(classes)} classes"
        )
    odd = int(np.sum(~np.isfinite(probabilities).all(axis=1)))
    if odd:
        raise HeadError(f"probabilities: {odd} of {len(labels)} rows are not finite; expected numbers from 0 to 1")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise HeadError(
            f"labels: received values {labels.min()} to {labels.max()}, expected 0 to {len(classes) - 1} "
            "(unlabelled rows, -1, cannot be scored)"
        )
