"""Logistic regression where Keras computes, on any backend and device, for more rows than scikit-learn is fast with.

    rows, a chunk at a time -> log loss and gradient on the device -> L-BFGS on the host -> coefficients

The loss is that of scikit-learn's ``LogisticRegression``: the weighted mean of the log loss over all rows, plus
``|coef|^2 / (2 C w)`` with ``w`` the sum of the weights; intercepts are not penalised. Its gradient has a closed form, so that
no backend has to differentiate (Bishop, Pattern Recognition and Machine Learning, 2006, equations 4.91 and 4.109). Rows are
sent as float32 and computed with in float64: in float32, L-BFGS ends before weak penalties have their effect.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from features.networks.engines import choose_device

CHUNK_BYTES = 64 << 20  # of the rows that are sent to the device at a time
RESIDENT_BYTES = 4 << 30  # rows of at most so many bytes stay on a GPU; others are sent for every gradient
TIGHTER = 1e-3  # share of scikit-learn's tolerance of the gradient: then probabilities are right to 1e-4
LINE_SEARCH = 50  # steps at most, as in scikit-learn

# Called with a number of rows; yields float32 (k, d) of so many rows, in the order of the labels; only the last has fewer.
Pieces = Callable[[int], Iterator[np.ndarray]]


def solver_memory(rows: int, columns: int, outputs: int) -> int:
    """Bytes that ``fit_logistic`` allocates on the host: copies of a chunk, and L-BFGS's vectors."""
    return 3 * min(4 * rows * columns, CHUNK_BYTES) + 30 * 8 * outputs * columns


def fit_logistic(estimator: Any, pieces: Pieces, labels: np.ndarray, width: int) -> Any:
    """Fit a ``sklearn.linear_model.LogisticRegression`` by Keras instead of by its own solver.

    Parameters
    ----------
    estimator : LogisticRegression
        Unfitted, of which ``C``, ``tol``, ``max_iter`` and ``class_weight`` are used.
    pieces : callable
        The rows; see ``Pieces``. It is called again for every gradient unless the rows stay on a GPU.
    labels : int, (n,)
        Labels of the rows, at least two different ones.
    width : int
        Number of columns, d.

    Returns
    -------
    LogisticRegression
        ``estimator`` with ``coef_``, float64 (1 or c, d), and all else that a fitted one has.
    """
    from scipy.optimize import minimize
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils.class_weight import compute_sample_weight

    classes, targets = np.unique(labels, return_inverse=True)
    weights = compute_sample_weight(estimator.class_weight, labels)
    outputs = 1 if len(classes) == 2 else len(classes)
    total, gradient_of = float(weights.sum()), _gradient(_Chunks(pieces, targets, weights, width), outputs)
    penalty = 1 / (estimator.C * total)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        values = flat.reshape(width + 1, outputs)
        loss, gradient = gradient_of(values)
        gradient /= total
        gradient[:-1] += penalty * values[:-1]
        return loss / total + penalty / 2 * float(np.square(values[:-1]).sum()), gradient.ravel()

    found = minimize(
        objective,
        np.zeros((width + 1) * outputs),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": estimator.max_iter,
            "maxls": LINE_SEARCH,
            "gtol": TIGHTER * estimator.tol,
            "ftol": np.finfo(np.float64).eps,
        },
    )
    if (left := _not_converged(found, estimator)) is not None:
        warnings.warn(f"L-BFGS stopped after {found.nit} steps: {left}", ConvergenceWarning, stacklevel=2)
    values = found.x.reshape(width + 1, outputs)
    estimator.classes_, estimator.n_features_in_ = classes, width
    estimator.coef_, estimator.intercept_ = np.ascontiguousarray(values[:-1].T), values[-1].copy()
    estimator.n_iter_ = np.array([found.nit], np.int32)
    return estimator


def _not_converged(found: Any, estimator: Any) -> str | None:
    """Return why the minimum was not found; None if it was, as nearly as scikit-learn asks."""
    steepest = float(np.abs(found.jac).max())
    if found.nit < estimator.max_iter and (found.success or steepest <= estimator.tol):
        return None
    return f"the largest slope is still {steepest:.2g}, at most {estimator.tol:g} is wanted"


class _Chunks:
    """Rows, targets and weights as tensors of one size, the last padded with rows of weight 0."""

    def __init__(self, pieces: Pieces, targets: np.ndarray, weights: np.ndarray, width: int) -> None:
        self._pieces, self._targets, self._weights, self._width = pieces, targets, weights, width
        self._size = max(1, min(len(targets), CHUNK_BYTES // (4 * width)))
        stay = choose_device("auto") == "gpu" and 4 * width * len(targets) <= RESIDENT_BYTES
        self._kept = list(self._sent()) if stay else None

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        return iter(self._kept) if self._kept is not None else self._sent()

    def _sent(self) -> Iterator[tuple[Any, Any, Any]]:
        done, size = 0, self._size
        for piece in self._pieces(size):
            rows = np.zeros((size, self._width), np.float32)
            targets, weights = np.zeros(size, np.int32), np.zeros(size)
            end = done + len(piece)
            rows[: len(piece)] = piece
            targets[: len(piece)], weights[: len(piece)] = self._targets[done:end], self._weights[done:end]
            yield _tensor(rows, "float32"), _tensor(targets, "int32"), _tensor(weights, "float64")
            done = end


def _tensor(array: np.ndarray, dtype: str) -> Any:
    from keras import ops

    with _float64():
        return ops.convert_to_tensor(array, dtype=dtype)


def _float64() -> contextlib.AbstractContextManager[Any]:
    """Let JAX compute in float64 in a block; the other backends do so when they are asked."""
    import keras

    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)  # type: ignore[no-any-return]


def _gradient(chunks: _Chunks, outputs: int) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """Return a function: float64 (d + 1, outputs), the intercepts last -> sum of the weighted losses, and its gradient."""
    from keras import ops

    from features.networks.keras_engine import compiled

    def of_chunk(rows: Any, targets: Any, weights: Any, kernel: Any, bias: Any) -> tuple[Any, Any, Any]:
        rows = ops.cast(rows, "float64")
        logits = ops.add(rows @ kernel, bias)  # Keras's product of torch's float64 is float32
        if outputs == 1:
            truth = ops.cast(ops.expand_dims(targets, 1), "float64")
            losses = ops.sum(ops.softplus(logits) - ops.multiply(truth, logits), axis=1)
            chances = ops.sigmoid(logits)
        else:
            truth = ops.one_hot(targets, outputs, dtype="float64")
            losses = ops.logsumexp(logits, axis=1) - ops.sum(ops.multiply(truth, logits), axis=1)
            chances = ops.softmax(logits, axis=1)
        errors = ops.multiply(ops.subtract(chances, truth), ops.expand_dims(weights, 1))
        loss = ops.sum(ops.multiply(losses, weights))
        return loss, ops.transpose(rows) @ errors, ops.sum(errors, axis=0)

    step = compiled(of_chunk)

    def of_all(values: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = (_tensor(part, "float64") for part in (values[:-1], values[-1]))
        loss, gradient = 0.0, np.zeros_like(values)
        for chunk in chunks:
            with _float64():
                more, by_kernel, by_bias = (ops.convert_to_numpy(found) for found in step(*chunk, kernel, bias))
            loss += float(more)
            gradient[:-1] += by_kernel
            gradient[-1] += by_bias
        return loss, gradient

    return of_all
