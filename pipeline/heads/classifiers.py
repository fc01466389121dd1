"""Heads that are scikit-learn classifiers: how they are fitted, how their parameter is chosen, how they are loaded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, HeadError
from features.networks.backend import load_keras
from features.progress import Progress
from pipeline.config import ArraysHeadFile, HeadFile, History, Settings, parse
from pipeline.heads.classifier_table import CLASSIFIERS, OTHER
from pipeline.heads.costs import solver_bytes, solver_seconds
from pipeline.heads.dense import KerasHead
from pipeline.heads.estimators import check_estimator, find_class, make_estimator
from pipeline.heads.head import Head
from pipeline.heads.logistic import fit_logistic, solver_memory
from pipeline.heads.models.converting import model_of
from pipeline.heads.models.model import Model
from pipeline.heads.models.parts import NotPlainError
from pipeline.heads.persistence import Wrapped, load_arrays, load_skops
from pipeline.heads.prepared import ArrayRows, Prepared
from pipeline.heads.search import climb, row_space, times
from pipeline.heads.streaming import FeatureStream, fit_sgd_streaming
from pipeline.presets import DENSE, PRESETS, ClassifierParameters, DenseParameters, EstimatorParameters, Preset
from pipeline.scores.metrics import (
    balanced_weights,
    brier_score,
    class_weights,
    confusion,
    fit_temperature,
    log_loss,
    softmax,
    two_columns,
)
from pipeline.scores.selection import SEARCH_ROWS, stratified_folds

logger = logging.getLogger(__name__)
SMALL = 1 << 24  # a feature matrix of fewer numbers is copied to float64 and fitted with a single thread
# What scikit-learn raises for rows or parameters that a classifier cannot handle.
REFUSALS = (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RuntimeError, MemoryError)
FEW_COLUMNS = 128  # principal components that are offered where a head would take long
SEARCH_STEPS = 6  # values that a search usually tries, for the progress bar
STREAMED = "sklearn.linear_model.SGDClassifier"  # the only class here that can be fitted piece by piece


class SklearnHead(Head):
    """A scikit-learn classifier on pooled, standardised features, optionally projected onto principal components."""

    parameters: ClassifierParameters
    file_models = (HeadFile, ArraysHeadFile)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.model: Model | None = None
        self.chosen: dict[str, float] = {}  # value of the parameter that may be searched
        self.row = CLASSIFIERS.get(self.kind, OTHER)

    @classmethod
    def restored(cls, path: Path, stored: HeadFile) -> tuple[str, Settings]:
        return next((name, preset.parameters) for name, preset in PRESETS.items() if preset.kind == stored.kind)

    @classmethod
    def has_dense_form(cls, kind: str) -> bool:
        return CLASSIFIERS[kind].linear if kind in CLASSIFIERS else False

    def warm_up(self) -> None:
        find_class(self.kind)
        if self.by_keras:
            load_keras()

    @property
    def by_keras(self) -> bool:
        """Whether Keras minimises the loss of the scikit-learn class, on a GPU where there is one."""
        return getattr(self.parameters, "solver", "") == "keras"

    @property
    def fitted(self) -> Model:
        """What predicts: arrays, or a classifier of scikit-learn that arrays do not describe."""
        self._check_fitted()
        assert self.model is not None
        return self.model

    @property
    def files(self) -> tuple[str, ...]:
        return self.fitted.files

    @property
    def parameter_count(self) -> int | None:
        return self.fitted.parameter_count

    @property
    def margins(self) -> bool:
        """Whether the outputs are margins, which a temperature turns into probabilities."""
        if self.kind in CLASSIFIERS:
            return self.row.margins
        # This needs an object: some classes give probabilities only with certain parameters.
        return not hasattr(self._new(None), "predict_proba")

    @property
    def given(self) -> Any:
        """The given value of the parameter that would otherwise be searched; None if there is none."""
        return getattr(self.parameters, self.row.parameter) if self.searchable else None

    @property
    def searchable(self) -> bool:
        """Whether this head has a parameter that cross-validation can choose."""
        return bool(self.row.parameter)

    @property
    def streams(self) -> bool:
        return (self.kind == STREAMED or self.by_keras) and self.parameters.pca is None

    def _train(self, data: Prepared, progress: Progress) -> History:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        # Below about 100 MB, distributing a step over threads takes longer than the step: 5 times on a busy machine.
        small = len(data.train) * data.train.views * data.train.width < SMALL
        with threadpool_limits(limits=1 if small else None):
            try:
                if isinstance(data.train, FeatureStream):
                    return self._fit_streamed(data.train, data, progress)
                assert isinstance(data.train, ArrayRows)
                return self._fit(data.train, data.groups, progress)
            except REFUSALS as problem:
                if isinstance(problem, HeadError):
                    raise
                text = (str(problem).strip() or repr(problem)).splitlines()[0]
                raise HeadError(f"head {self.name!r}: scikit-learn cannot fit it to these rows: {text}") from problem

    def _fit(self, train: ArrayRows, groups: np.ndarray | None, progress: Progress) -> History:
        Z, y = train.flat, np.repeat(train.labels, train.views)
        projection = None if self.parameters.pca is None else self._projection(Z)
        if projection is not None:
            Z = np.asarray(projection.transform(Z))
        rows, combination = Z, None
        if self.row.spanned and self.searchable and Z.shape[1] > len(Z):
            rows, combination = row_space(Z)  # an exact reduction, as there are fewer rows than columns
        elif self.row.linear and Z.size < SMALL:
            rows = Z.astype(np.float64)
        value, history = self._search(rows, train, groups, progress)
        estimator = self._made(value, rows, y)
        if combination is not None:
            estimator.coef_ = times(estimator.coef_ @ combination, Z)
            estimator.n_features_in_ = Z.shape[1]
        self._keep(estimator, value, projection)
        return history

    def _keep(self, estimator: Any, value: Any, projection: Any = None) -> None:
        """Turn a fitted classifier, of principal components or not, into what predicts; note the parameter's value."""
        from sklearn.pipeline import Pipeline

        self.chosen = {self.row.parameter: float(value)} if self.searchable else {}
        whole = estimator
        if projection is not None:
            whole = Pipeline([("pca", projection), ("classifier", estimator)])
        try:
            self.model = model_of(whole, len(self.mean))
        except NotPlainError as reason:
            logger.debug("%s: %s; it is kept as an object of scikit-learn", self.name, reason)
            self.model = Wrapped(whole)

    def _fit_streamed(self, train: FeatureStream, data: Prepared, progress: Progress) -> History:
        """Train by partial fits; the penalty is first chosen on a sample of the rows."""
        value = self.given
        if self.searchable and value is None:
            sample, groups = self._sample(train, data.groups)
            value, _ = self._search(sample.flat, sample, groups, lambda stage, done, total: None)
        estimator = self._new(value)
        if self.by_keras:
            fit_logistic(estimator, lambda size: (Z for _, Z in train.pieces(size)), train.labels, train.width)
            self._keep(estimator, value)
            return {"rows": [float(len(train))]}
        if estimator.class_weight == "balanced":
            weights = class_weights(data.y, len(self.classes))
            estimator.set_params(class_weight=dict(enumerate(weights.tolist())))
        fitted = fit_sgd_streaming(
            estimator,
            data.train,
            data.held_out,
            classes=len(self.classes),
            patience=2,
            seed=self.seed,
            progress=progress,
        )
        self.temperature, self.out_of_fold = fitted.temperature, None
        self._keep(fitted.estimator, value)
        return fitted.history

    def _sample(self, train: FeatureStream, groups: np.ndarray | None) -> tuple[ArrayRows, np.ndarray | None]:
        """View 0 of a random, stratified sample of at most `SEARCH_ROWS` rows, fewer where memory does not suffice."""
        share = min(SEARCH_ROWS, train.memory_bytes // (16 * train.width)) / len(train)
        generator, y = np.random.default_rng(self.seed), train.labels
        by_class = [generator.permutation(np.flatnonzero(y == k)) for k in range(len(self.classes))]
        chosen = np.sort(np.concatenate([rows[: max(2, round(share * len(rows)))] for rows in by_class]))
        part = train.take(chosen)
        Z = np.concatenate([piece for _, piece in part.pieces()])
        return ArrayRows(Z, part.labels), None if groups is None else groups[chosen]

    def _projection(self, Z: np.ndarray) -> Any:
        """A fitted PCA."""
        from sklearn.decomposition import PCA

        most = min(Z.shape)
        if self.parameters.pca > most:
            raise HeadError(
                f"pca: received {self.parameters.pca}, expected at most {most} for features of shape {Z.shape}"
            )
        return PCA(self.parameters.pca, random_state=self.seed).fit(Z)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments of the scikit-learn class other than the searched parameter."""
        return self.row.fixed

    def fit_bytes(self, rows: int, columns: int, views: int = 1) -> int:
        """Estimate, generously, the bytes of copies of the rows and of the solver; each view of an image is a row.

        The figures follow scikit-learn's source: the type each class converts its input to, and its solver's matrices.
        """
        rows, searched = rows * views, min(rows, SEARCH_ROWS) * views
        outputs = 1 if len(self.classes) == 2 else len(self.classes)
        need, components = 0, self.parameters.pca
        if components is not None:
            need += 12 * rows * columns + 8 * min(rows, columns) ** 2 + 4 * rows * components
            columns = min(components, columns)
        spanned = self.row.spanned and self.searchable and columns > rows
        if spanned:
            need += 8 * 3 * rows**2  # inner products, their eigenvectors, the coordinates
            columns = rows
        double = spanned or (self.row.linear and rows * columns < SMALL)
        need += 8 * rows * columns * double
        if self.margins or self.folds or (self.searchable and self.given is None):
            need += (8 if double else 4) * searched * columns
        if self.by_keras:
            return need + solver_memory(rows, columns, outputs)
        return need + solver_bytes(self.kind.rpartition(".")[2], self.arguments, rows, columns, outputs)

    def fit_seconds(self, rows: int, columns: int, views: int = 1) -> float:
        if self.by_keras:
            return 0.0  # it depends on the device
        rows, searched = rows * views, min(rows, SEARCH_ROWS) * views
        columns = min(columns, self.parameters.pca or columns)
        if self.row.spanned and self.searchable:
            columns = min(columns, rows)
        outputs = 1 if len(self.classes) == 2 else len(self.classes)
        folds, tried = (
            self.parameters.folds - 1,
            1,
        )  # as many fits to all but one fold cost about ``folds - 1`` whole ones
        if self.searchable and self.given is None:
            tried = SEARCH_STEPS if self.row.climbs else len(self.row.values)
        elif not self.margins:
            folds = 0
        name, arguments = self.kind.rpartition(".")[2], self.arguments
        once = solver_seconds(name, arguments, rows, columns, outputs)
        return once + tried * folds * solver_seconds(name, arguments, searched, columns, outputs)

    def cheaper(self, columns: int) -> list[dict[str, Any]]:
        given: list[dict[str, Any]] = []
        if self.searchable and self.given is None:
            middle = 10.0 ** self.row.values[1] if self.row.climbs else self.row.values[len(self.row.values) // 2]
            given.append({self.row.parameter: middle})
        if self.parameters.pca is None and columns > FEW_COLUMNS:
            given.append({"pca": FEW_COLUMNS})
        return given

    def _new(self, value: Any, **more: Any) -> Any:
        values = {self.row.parameter: value, **self.row.fixed, **more}
        if getattr(self.parameters, "class_weight", None):
            values["class_weight"] = "balanced"
        return make_estimator(self.kind, values, self.seed)

    def _made(self, value: Any, Z: np.ndarray, y: np.ndarray, **more: Any) -> Any:
        """Make an estimator and fit it to rows in memory."""
        estimator = self._new(value, **more)
        if not self.by_keras:
            return estimator.fit(Z, y)
        return fit_logistic(
            estimator, lambda size: (Z[start : start + size] for start in range(0, len(Z), size)), y, Z.shape[1]
        )

    def _search(
        self, Z: np.ndarray, rows: ArrayRows, groups: np.ndarray | None, progress: Progress
    ) -> tuple[Any, History]:
        """Choose the parameter by its out-of-fold score, and keep the temperature that belongs to it.

        ``Z`` holds all views of the rows, possibly in other coordinates; the views of one image are in one fold.
        """
        views, y = rows.views, np.repeat(rows.labels, rows.views)
        folds = np.repeat(stratified_folds(rows.labels, self.parameters.folds, self.seed, groups), views)
        searched = self.searchable and self.given is None
        kept = not searched and self.folds == self.parameters.folds  # a search would be biased in its own favour
        values = self._values(y, folds)
        name = self.row.parameter if self.searchable else ""
        if folds.max() < 0 or not (searched or self.margins or kept):
            return values[0], {name: [values[0]]} if name else {"rows": [float(len(y))]}
        history: History = {**({name: []} if name else {}), "score": [], "accuracy": []}
        temperatures: dict[Any, float] = {}

        def score(value: Any) -> Any:
            outputs, tested = self._held_out(value, Z, y, folds)
            found, loss, temperatures[value], accuracy = self._score(outputs, y[tested])
            columns = {name: value, "score": loss, "accuracy": accuracy}
            for column, numbers in history.items():
                numbers.append(columns[column])
            if kept:
                self.out_of_fold = np.full((len(y), len(self.classes)), np.nan)
                self.out_of_fold[tested] = softmax(outputs / temperatures[value]) if self._soft else outputs
                self.out_of_fold = self.out_of_fold[::views]
            progress("train-head", len(temperatures), max(len(temperatures), len(values)))
            return found

        if searched and self.row.climbs:
            least, start, greatest = self.row.values
            chosen = climb(score, start, least, greatest)
        else:
            chosen = min(values, key=score)
        self.temperature = temperatures[chosen]
        return chosen, history

    def _values(self, y: np.ndarray, folds: np.ndarray) -> list[Any]:
        """The values to compare: a single one where the value is given or there are no folds to compare on."""
        if not self.searchable:
            return [None]
        if self.row.climbs:
            start = 10.0 ** self.row.values[1]
            return [start] * SEARCH_STEPS if self.given is None and folds.max() >= 0 else [self.given or start]
        values = list(self.row.values) if self.given is None else [self.given]
        if self.row.parameter == "n_neighbors":
            most = len(y)
            if folds.max() >= 0 and (self.given is None or self.folds == self.parameters.folds):
                most = int(np.sum(folds != -2) - np.bincount(folds[folds >= 0]).max())
            values = [value for value in values if value <= most]
            if not values:
                raise HeadError(f"n_neighbors: received {self.given}, expected at most {most}, the rows to fit")
        return values if folds.max() >= 0 else values[:1]

    def _held_out(self, value: Any, Z: np.ndarray, y: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Outputs for the rows in a fold, each by a model fitted on the other folds, and the mask of these rows."""
        from sklearn.exceptions import ConvergenceWarning

        used = folds != -2
        outputs = np.zeros((len(y), len(self.classes)))
        more = self.row.search if self.given is None else {}
        for fold in range(folds.max() + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # an approximate fit is good enough for ranking
                rows = used & (folds != fold)
                model = self._made(value, Z[rows], y[rows], **more)
            outputs[folds == fold] = self._outputs_of(model, Z[folds == fold])
        tested = folds >= 0
        return outputs[tested], tested

    def _score(self, outputs: np.ndarray, y: np.ndarray) -> tuple[Any, float, float, float]:
        """Score of one parameter value (lower is better), and its loss, temperature and accuracy."""
        guess = outputs.argmax(axis=1)
        accuracy = float(np.mean(guess == y))
        balanced = getattr(self.parameters, "class_weight", None) is not None
        weights = balanced_weights(y) if balanced else None
        temperature = 1.0
        if self.margins:
            temperature, loss = fit_temperature(outputs, y, weights)
        elif self.row.linear:
            loss = log_loss(softmax(outputs), y, weights)
        else:
            loss = brier_score(outputs, y)  # probabilities from votes can be 0, where the log loss is infinite
        if getattr(self.parameters, "choose", "log_loss") == "log_loss":
            return loss, loss, temperature, accuracy
        table = confusion(y, guess, len(self.classes))
        support = table.sum(axis=1)
        recall = float(np.mean((table.diagonal() / np.maximum(support, 1))[support > 0]))
        return (-recall, loss), loss, temperature, accuracy

    @property
    def _soft(self) -> bool:
        """Whether softmax turns the outputs into probabilities."""
        return self.row.linear or self.margins

    def _outputs_of(self, model: Any, Z: np.ndarray) -> np.ndarray:
        if self.row.linear:
            return two_columns(Z @ np.atleast_2d(model.coef_).T + model.intercept_)
        if self.margins:
            margins = model.decision_function(Z)
            return two_columns(margins[:, None] if margins.ndim == 1 else margins)
        return np.asarray(model.predict_proba(Z), np.float64)

    def _probabilities(self, Z: np.ndarray) -> np.ndarray:
        outputs = self.fitted.outputs(Z)
        return softmax(outputs / self.temperature) if self.fitted.soft else outputs

    def as_dense(self) -> KerasHead:
        layer = self.fitted.dense()
        if layer is None:
            raise HeadError(f"head {self.name!r} has no equivalent network; train a linear or Keras head instead")
        head = KerasHead(self.name, DENSE, DenseParameters(), pool=self.pool, seed=self.seed)
        for name in ("classes", "layer", "fingerprint", "input_shape", "mean", "std", "temperature"):
            setattr(head, name, getattr(self, name))
        kernel, bias = layer
        if self._outputs > 1:
            # A shift common to all classes does not change the softmax, but costs the float32 network precision.
            kernel, bias = kernel - kernel.mean(axis=1, keepdims=True), bias - bias.mean()
        head.weights = [kernel, bias]
        return head

    def _network(self) -> Any:
        return self.as_dense().network

    def _save_weights(self, folder: Path) -> Mapping[str, Any]:
        more = self.fitted.save(folder)
        return {**more, "chosen": self.chosen} if more else more

    def _load_weights(self, folder: Path, stored: HeadFile, *, trust: bool) -> None:
        columns, classes = len(self.mean), len(self.classes)
        if isinstance(stored, ArraysHeadFile):
            self.chosen = stored.chosen
            self.model = load_arrays(folder, stored.model, columns=columns, classes=classes)
        else:
            self.model = load_skops(folder, self.kind, columns=columns, classes=classes, trust=trust)


class EstimatorHead(SklearnHead):
    """A scikit-learn classifier named by its import path, with its own parameters, none of which is searched."""

    parameters: EstimatorParameters

    @classmethod
    def parse_parameters(cls, name: str, preset: Preset, params: Mapping[str, Any], classes: int) -> Settings:
        """Separate the parameters that all heads have from those of the classifier, which go to ``params``."""
        common = {key: value for key, value in params.items() if key in ("folds", "scale", "pca")}
        own = {key: value for key, value in params.items() if key not in common}
        check_estimator(name, own, classes)
        return parse(EstimatorParameters, {**common, "params": own}, f"head {name!r}")

    @classmethod
    def restored(cls, path: Path, stored: HeadFile) -> tuple[str, Settings]:
        try:
            find_class(stored.kind)
        except ConfigurationError as problem:
            raise HeadError(
                f"{path}: kind is {stored.kind!r}, expected dense or sklearn.MODULE.CLASS: {problem}"
            ) from problem
        return stored.kind, EstimatorParameters()

    @property
    def searchable(self) -> bool:
        return False

    @property
    def arguments(self) -> Mapping[str, Any]:
        return self.parameters.params

    def _new(self, value: Any, **more: Any) -> Any:
        return make_estimator(self.kind, self.parameters.params, self.seed)
