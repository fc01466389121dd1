"""Heads of scikit-learn's kinds for several labels or numbers: logistic regressions, ridge regression, nearest neighbours.

rows, targets (n, c) --out-of-fold loss of each penalty, all columns together--> value --fit--> model of arrays

All columns of a head share one penalty, or number of neighbours. Unknown targets count neither in a fit nor in a loss.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, HeadError
from features.progress import Progress
from features.targets import known_cells
from pipeline.config import History, Settings, TargetHeadFile
from pipeline.heads.classifier_table import CLASSIFIERS
from pipeline.heads.dense import KerasHead
from pipeline.heads.head import Head
from pipeline.heads.models.columns import Columns, NeighbourMeans
from pipeline.heads.models.model import Model
from pipeline.heads.persistence import load_arrays
from pipeline.heads.prepared import ArrayRows, Prepared
from pipeline.heads.search import climb, row_space, times
from pipeline.presets import DENSE, PRESETS, ClassifierParameters, DenseParameters, Preset
from pipeline.tasks.multilabel import balanced_weights
from pipeline.tasks.task import squared_loss

REFUSED = ("pca", "choose", "solver")  # parameters of heads of classes that mean nothing here
SEARCH_STEPS = 6  # values that a search usually tries, for the progress bar


class ColumnsHead(Head):
    """A head of several columns whose parameter may be chosen by cross-validation."""

    parameters: ClassifierParameters
    file_models = (TargetHeadFile,)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.model: Model | None = None
        self.chosen: dict[str, float] = {}
        self.row = CLASSIFIERS[self.kind]

    @classmethod
    def parse_parameters(cls, name: str, preset: Preset, params: Mapping[str, Any], classes: int) -> Settings:
        if refused := sorted(set(params) & set(REFUSED)):
            raise ConfigurationError(
                f"head {name!r}: {refused[0]} is a parameter for classes alone; for labels and numbers leave it out"
            )
        return super().parse_parameters(name, preset, params, classes)

    @classmethod
    def restored(cls, path: Path, stored: Any) -> tuple[str, Settings]:
        return next((name, preset.parameters) for name, preset in PRESETS.items() if preset.kind == stored.kind)

    @classmethod
    def has_dense_form(cls, kind: str) -> bool:
        return CLASSIFIERS[kind].linear

    def warm_up(self) -> None:
        import scipy.optimize
        import sklearn.linear_model  # noqa: F401

        _ = scipy.optimize

    @property
    def fitted(self) -> Model:
        """What predicts."""
        self._check_fitted()
        assert self.model is not None
        return self.model

    @property
    def files(self) -> tuple[str, ...]:
        return self.fitted.files

    @property
    def parameter_count(self) -> int | None:
        return self.fitted.parameter_count

    def fit_bytes(self, rows: int, columns: int, views: int = 1) -> int:
        return 3 * 8 * rows * views * columns  # a copy in float64, and those of a fold

    def _train(self, data: Prepared, progress: Progress) -> History:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        assert isinstance(data.train, ArrayRows)
        rows = data.train
        Z, y = rows.flat, np.repeat(rows.labels, rows.views, axis=0)
        folds = np.repeat(self.task.folds(rows.labels, self.parameters.folds, self.seed, data.groups), rows.views)
        small = Z.size < 1 << 22
        with threadpool_limits(limits=1 if small else None):
            value, history = self._search(Z, y, folds, progress)
            self.model = self._solved(Z, y, value)
        self.chosen = {self.row.parameter: float(value)}
        return history

    def _search(self, Z: np.ndarray, y: np.ndarray, folds: np.ndarray, progress: Progress) -> tuple[Any, History]:
        """Choose the parameter by the loss of rows held out."""
        name, given = self.row.parameter, getattr(self.parameters, self.row.parameter)
        usual = 10.0 ** self.row.values[1] if self.row.climbs else self.row.values[2]
        if given is not None or folds.max() < 1:
            value = usual if given is None else given
            return value, {name: [float(value)]}
        history: History = {name: [], "score": []}
        parts = [(np.flatnonzero((folds != fold) & (folds != -2)), folds == fold) for fold in range(folds.max() + 1)]
        self._memory: dict[int, Any] = {}

        def score(value: Any) -> float:
            losses = [
                self._loss(self._held_out(number, Z, y, rows, tested, value), y[tested], y[rows])
                for number, (rows, tested) in enumerate(parts)
            ]
            found = float(np.mean(losses))
            history[name].append(float(value))
            history["score"].append(found)
            progress("train-head", len(history[name]), max(len(history[name]), SEARCH_STEPS))
            return found

        try:
            if self.row.climbs:
                least, start, greatest = self.row.values
                return climb(score, start, least, greatest), history
            values = [value for value in self.row.values if value <= min(len(rows) for rows, _ in parts)]
            return min(values, key=score), history
        finally:
            self._memory = {}

    def _held_out(
        self, number: int, Z: np.ndarray, y: np.ndarray, rows: np.ndarray, tested: np.ndarray, value: Any
    ) -> np.ndarray:
        """Predictions for the rows in a fold by a model fitted on ``rows``."""
        model = self._solved(Z[rows], y[rows], value, quick=True)
        return self._of(model, Z[tested])

    def _loss(self, predictions: np.ndarray, y: np.ndarray, trained: np.ndarray) -> float:
        """Loss of predictions for held-out rows with targets ``y``; ``trained`` are those of the rows of the fit."""
        return self.task.loss(predictions, y, trained)

    @abc.abstractmethod
    def _solved(self, Z: np.ndarray, y: np.ndarray, value: Any, *, quick: bool = False) -> Model:
        """Fit rows; ``quick``: well enough to compare values."""

    def _of(self, model: Model, Z: np.ndarray) -> np.ndarray:
        outputs = model.outputs(Z)
        return self.task.activate(outputs) if model.soft else outputs

    def _probabilities(self, Z: np.ndarray) -> np.ndarray:
        return self._of(self.fitted, Z)

    def as_dense(self) -> KerasHead:
        layer = self.fitted.dense()
        if layer is None:
            raise HeadError(f"head {self.name!r} has no equivalent network; train a linear or Keras head instead")
        head = KerasHead(self.name, DENSE, DenseParameters(), pool=self.pool, seed=self.seed)
        for name in ("task", "classes", "layer", "fingerprint", "input_shape", "mean", "std", "temperature"):
            setattr(head, name, getattr(self, name))
        head.weights = list(layer)
        return head

    def _network(self) -> Any:
        return self.as_dense().network

    def _save_weights(self, folder: Path) -> Mapping[str, Any]:
        return {"model": self.fitted.save(folder)["model"], "chosen": self.chosen}

    def _load_weights(self, folder: Path, stored: Any, *, trust: bool) -> None:
        self.chosen = stored.chosen
        size = {"columns": len(self.mean), "classes": len(self.classes)}
        self.model = load_arrays(folder, stored.model, **size, of_columns=True)


class LogisticColumns(ColumnsHead):
    """One logistic regression for each label, as scikit-learn's ``LogisticRegression``, all solved together."""

    def _solved(self, Z: np.ndarray, y: np.ndarray, value: Any, *, quick: bool = False) -> Model:
        rows, combination = np.asarray(Z, np.float64), None
        if Z.shape[1] > len(Z):
            rows, combination = row_space(Z)  # an exact reduction, as there are fewer rows than columns
        weights = known_cells(y).astype(np.float64)
        if getattr(self.parameters, "class_weight", None):
            weights = balanced_weights(y)
        coef, intercept = solve_logistic(rows, y == 1, weights, value, tolerance=1e-3 if quick else 1e-8)
        return Columns(coef if combination is None else times(coef @ combination, Z), intercept)


class RidgeColumns(ColumnsHead):
    """Linear regression with an L2 penalty, scikit-learn's ``Ridge``; each number is fitted to the rows where it is known."""

    def _solved(self, Z: np.ndarray, y: np.ndarray, value: Any, *, quick: bool = False) -> Model:
        from sklearn.linear_model import Ridge

        coef, intercept = np.zeros((y.shape[1], Z.shape[1])), np.zeros(y.shape[1])
        for columns, rows in _alike(known_cells(y)):
            made = Ridge(alpha=value).fit(np.asarray(Z[rows], np.float64), y[np.ix_(rows, columns)])
            coef[columns], intercept[columns] = made.coef_.reshape(len(columns), -1), made.intercept_
        return Columns(coef, intercept)


class NeighbourColumns(ColumnsHead):
    """Means over the nearest training rows."""

    def _solved(self, Z: np.ndarray, y: np.ndarray, value: Any, *, quick: bool = False) -> Model:
        values = np.where(known_cells(y), y, np.nan).astype(np.float64)
        if not 1 <= value <= len(Z):
            raise HeadError(f"n_neighbors: received {value}, expected at most {len(Z)}, the rows to fit")
        return NeighbourMeans(np.asarray(Z, np.float32), values, np.nanmean(values, axis=0), int(value))

    def _loss(self, predictions: np.ndarray, y: np.ndarray, trained: np.ndarray) -> float:
        return squared_loss(predictions, y, trained)  # a share of neighbours may be 0, where a log loss is infinite

    def _held_out(
        self, number: int, Z: np.ndarray, y: np.ndarray, rows: np.ndarray, tested: np.ndarray, value: Any
    ) -> np.ndarray:
        if number not in self._memory:  # distances are computed once for all values
            most = min(len(rows), max(self.row.values))
            model = self._solved(Z[rows], y[rows], most)
            assert isinstance(model, NeighbourMeans)
            self._memory[number] = model, model.nearest(Z[tested], most)
        model, nearest = self._memory[number]
        return np.asarray(model.means(nearest[:, :value]))


def solve_logistic(
    Z: np.ndarray, holds: np.ndarray, weights: np.ndarray, C: float, tolerance: float = 1e-8
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise the log loss of one logistic regression for each column, all together, by L-BFGS.

    The loss of a column is that of scikit-learn's ``LogisticRegression``: half the squared norm of its coefficients plus C
    times the weighted sum of the log losses; the intercept is not penalised.

    Parameters
    ----------
    Z : float64, (n, d)
    holds : bool, (n, c)
    weights : float64, (n, c)
        0 for unknown cells.
    C : float
        Inverse of the penalty.
    tolerance : float
        Greatest component of the gradient of the mean loss at which the search ends.

    Returns
    -------
    coef : float64, (c, d)
    intercept : float64, (c,)
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    n, d = Z.shape
    c = holds.shape[1]
    signs, scale = np.where(holds, 1.0, -1.0), 1.0 / (C * n)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel = flat.reshape(d + 1, c)
        margins = signs * (Z @ kernel[:-1] + kernel[-1])
        slope = -signs * weights * expit(-margins) / n
        value = (weights * np.logaddexp(0, -margins)).sum() / n + 0.5 * scale * np.square(kernel[:-1]).sum()
        gradient = np.vstack([Z.T @ slope + scale * kernel[:-1], slope.sum(axis=0)])
        return float(value), gradient.ravel()

    start = np.zeros((d + 1, c))
    options = {
        "maxiter": 1000,
        "maxfun": 5000,
        "gtol": tolerance,
        "ftol": 0.0 if tolerance < 1e-5 else 1e-7,
        "maxcor": 20,
    }
    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(d + 1, c)
    return np.ascontiguousarray(found[:-1].T), found[-1].copy()


def _alike(known: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns that are known in the same rows, and these rows."""
    patterns: dict[bytes, list[int]] = {}
    for k, column in enumerate(known.T):
        patterns.setdefault(np.packbits(column).tobytes(), []).append(k)
    for columns in patterns.values():
        yield np.array(columns), np.flatnonzero(known[:, columns[0]])
