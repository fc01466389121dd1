"""Heads of scikit-learn's kinds for several labels or numbers: logistic regressions, ridge regression, nearest neighbours.

rows, targets (n, c) --out-of-fold loss of each penalty, all columns together--> value --fit--> model of arrays
rows in the store --those that are in a fold, as many as fit--> value --the same fit, piece by piece--> the same model

All columns of a head share one penalty, or number of neighbours. Unknown targets count neither in a fit nor in a loss.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, HeadError
from features.progress import Progress
from features.scratch import scratch
from features.targets import known_cells
from pipeline.config import History, Settings, TargetHeadFile
from pipeline.heads.classifier_table import CLASSIFIERS
from pipeline.heads.columns_math import alike, one_piece, pieces_of, solve_logistic, solve_ridge, solver_bytes
from pipeline.heads.costs import shown
from pipeline.heads.dense import KerasHead
from pipeline.heads.head import Head
from pipeline.heads.models.columns import Columns, NeighbourMeans
from pipeline.heads.models.model import Model
from pipeline.heads.persistence import load_arrays
from pipeline.heads.prepared import ArrayRows, Prepared
from pipeline.heads.search import climb, row_space, times
from pipeline.heads.streaming import FeatureStream
from pipeline.presets import DENSE, PRESETS, ClassifierParameters, DenseParameters, Preset
from pipeline.tasks.multilabel import balanced_weights
from pipeline.tasks.task import squared_loss

REFUSED = ("pca", "choose", "solver")  # parameters of heads of classes that mean nothing here
SEARCH_BYTES = 28  # of a number of a row while values are compared: as read, in float64, and those of a fold
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
    def streams(self) -> bool:
        return True

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

        if isinstance(data.train, FeatureStream):
            rows_of, folds_of = self._sample(data.train, data.groups)
            value, history = self._search(rows_of.flat, rows_of.labels, folds_of, progress)
            self.model = self._streamed(data.train, value, data.memory)
            self.chosen = {self.row.parameter: float(value)}
            return history
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

    def _sample(self, train: FeatureStream, groups: np.ndarray | None) -> tuple[ArrayRows, np.ndarray]:
        """The rows that are compared on in memory, too, each view a row, and their folds; fewer where memory does not suffice."""
        folds = self.task.folds(train.labels, self.parameters.folds, self.seed, groups)
        used = np.flatnonzero(folds != -2)
        most = max(2 * self.parameters.folds, train.memory_bytes // (SEARCH_BYTES * train.width * train.views))
        if getattr(self.parameters, self.row.parameter) is not None:
            used = used[:1]
        elif len(used) > most:
            used = np.sort(np.random.default_rng(self.seed).permutation(used)[:most])
        part = train.take(used)
        Z = np.concatenate([values.reshape(-1, part.width) for _, values in part.all_views(part.views)])
        return ArrayRows(Z, np.repeat(part.labels, part.views, axis=0)), np.repeat(folds[used], part.views)

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

    @abc.abstractmethod
    def _streamed(self, rows: FeatureStream, value: Any, memory: int) -> Model:
        """Fit all views of rows that stay in the store, with at most so many bytes: the model that `_solved` gives."""

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
        coef, intercept = solve_logistic(
            one_piece(rows), y == 1, self._weights(y), value, tolerance=1e-3 if quick else 1e-8
        )
        return Columns(coef if combination is None else times(coef @ combination, Z), intercept)

    def _streamed(self, rows: FeatureStream, value: Any, memory: int) -> Model:
        y = np.repeat(rows.labels, rows.views, axis=0)
        return Columns(*solve_logistic(pieces_of(rows), y == 1, self._weights(y), value))

    def _weights(self, y: np.ndarray) -> np.ndarray:
        balanced = getattr(self.parameters, "class_weight", None)
        return balanced_weights(y) if balanced else known_cells(y).astype(np.float64)


class RidgeColumns(ColumnsHead):
    """Linear regression with an L2 penalty, scikit-learn's ``Ridge``; each number is fitted to the rows where it is known."""

    def _solved(self, Z: np.ndarray, y: np.ndarray, value: Any, *, quick: bool = False) -> Model:
        from sklearn.linear_model import Ridge

        coef, intercept = np.zeros((y.shape[1], Z.shape[1])), np.zeros(y.shape[1])
        for columns, rows in alike(known_cells(y)):
            made = Ridge(alpha=value).fit(np.asarray(Z[rows], np.float64), y[np.ix_(rows, columns)])
            coef[columns], intercept[columns] = made.coef_.reshape(len(columns), -1), made.intercept_
        return Columns(coef, intercept)

    def _streamed(self, rows: FeatureStream, value: Any, memory: int) -> Model:
        if (need := solver_bytes(rows.width)) > memory:
            raise HeadError(
                f"head {self.name!r}: the products of {rows.width:,} columns take {shown(need)}, but only {shown(memory)} are left for "
                "them. Give more (--memory), or use another pooling, or dropout-linear"
            )
        return Columns(*solve_ridge(pieces_of(rows), np.repeat(rows.labels, rows.views, axis=0), value))


class NeighbourColumns(ColumnsHead):
    """Means over the nearest training rows. Rows that do not fit into memory lie in a file without a name."""

    def _solved(self, Z: np.ndarray, y: np.ndarray, value: Any, *, quick: bool = False) -> Model:
        values = np.where(known_cells(y), y, np.nan).astype(np.float64)
        if not 1 <= value <= len(Z):
            raise HeadError(f"n_neighbors: received {value}, expected at most {len(Z)}, the rows to fit")
        return NeighbourMeans(np.asarray(Z, np.float32), values, np.nanmean(values, axis=0), int(value))

    def _streamed(self, rows: FeatureStream, value: Any, memory: int) -> Model:
        kept = scratch((len(rows) * rows.views, rows.width), np.float32)
        for piece, Z in pieces_of(rows)():
            kept[piece] = Z
        return self._solved(kept, np.repeat(rows.labels, rows.views, axis=0), value)

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
