"""Heads that are scikit-learn classifiers: how each is fitted, searched and loaded again."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import HeadError
from pipeline.config import DenseParameters
from pipeline.dense import DENSE, KerasHead
from pipeline.head import Head, History, Progress, check_finite, two_columns
from pipeline.metrics import brier_score, fit_temperature, log_loss, softmax
from pipeline.pooling import CHUNK_BYTES

ONE_THREAD_SIZE = 1 << 24  # numbers in the feature matrix
SEARCH_STEPS = 6  # values that are usually tried, for the progress bar
SEARCH_ROWS = 20_000  # rows that a regularisation strength is chosen on; more change it little and cost much

# The only types that a head.skops may name besides those that skops 0.16 trusts by itself. Never extended by
# what a file asks for.
TRUSTED_TYPES = (
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.metrics._dist_metrics.EuclideanDistance64",
    "sklearn.neighbors._ball_tree.BallTree",
    "sklearn.neighbors._kd_tree.KDTree",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.tree._tree.Tree",
    "sklearn.utils._bunch.Bunch",
)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """How a scikit-learn class is fitted.

    Parameters
    ----------
    parameter : str
        What cross-validation chooses.
    values : tuple
        Linear: three powers of ten, (least, start, greatest), between which the best half decade is looked for.
        Else: the values to compare.
    linear : bool
        ``coef_ X + intercept_`` gives the margins.
    margins : bool
        The margins are not log odds: a temperature is fitted on out-of-fold margins.
    fixed, search : mapping
        Further arguments; those of ``search`` hold only while values are compared.
    """

    parameter: str
    values: tuple[Any, ...]
    linear: bool = True
    margins: bool = True
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CLASSIFIERS = {
    # Searched with the tolerance of the last fit: stopping earlier is a penalty too, and would mislead the choice.
    "sklearn.linear_model.LogisticRegression": Classifier("C", (-6, -2, 3), margins=False, fixed={"max_iter": 1000}),
    "sklearn.linear_model.RidgeClassifier": Classifier("alpha", (-2, 3, 7)),
    "sklearn.svm.LinearSVC": Classifier("C", (-7, -4, 2), fixed={"dual": True}, search={"tol": 1e-2}),
    "sklearn.neighbors.KNeighborsClassifier": Classifier(
        "n_neighbors", (1, 3, 5, 7, 11, 15, 21, 31), linear=False, fixed={"algorithm": "brute"}
    ),
}


class SklearnHead(Head):
    """A scikit-learn classifier on pooled, standardised features."""

    parameters: Any
    files = ("head.json", "head.skops")

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.estimator: Any = None
        self.row = CLASSIFIERS[self.kind]

    def warm_up(self) -> None:
        self._class()

    @property
    def parameter_count(self) -> int | None:
        return self.estimator.coef_.size + self._outputs if self.row.linear else None

    def _train(
        self, Z: np.ndarray, y: np.ndarray, held_out: tuple[np.ndarray, np.ndarray] | None, progress: Progress
    ) -> History:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        # Below some 100 MB, handing out threads for each step takes longer than the step: five times on a busy machine.
        with threadpool_limits(limits=1 if Z.size < ONE_THREAD_SIZE else None):
            return self._fit(Z, y, progress)

    def _fit(self, Z: np.ndarray, y: np.ndarray, progress: Progress) -> History:
        rows, combination = Z, None
        if self.row.linear:
            # An L2-penalised solution lies in the span of the rows, so with fewer rows than columns nothing is lost.
            rows, combination = row_space(Z) if Z.shape[1] > len(Z) else (Z.astype(np.float64), None)
        value, history = self._search(rows, y, progress)
        self.estimator = self._new(value).fit(rows, y)
        if combination is not None:
            self.estimator.coef_ = self.estimator.coef_ @ combination @ Z
            self.estimator.n_features_in_ = Z.shape[1]
        return history

    def _class(self) -> Any:
        module, _, name = self.kind.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def _new(self, value: float, **more: Any) -> Any:
        made = self._class()(**{self.row.parameter: value}, **self.row.fixed, **more)
        return made.set_params(random_state=self.seed) if "random_state" in made.get_params() else made

    def _search(self, Z: np.ndarray, y: np.ndarray, progress: Progress) -> tuple[Any, History]:
        """Choose the parameter by out-of-fold score, and keep the temperature that goes with it."""
        given = getattr(self.parameters, self.row.parameter)
        folds = stratified_folds(y, self.parameters.folds, self.seed)
        values = self._values(given, y, folds)
        if folds.max() < 0 or (len(values) == 1 and not self.row.margins):
            return values[0], {self.row.parameter: [values[0]]}
        history: History = {self.row.parameter: [], "score": [], "accuracy": []}
        temperatures: dict[float, float] = {}

        def score(value: Any) -> float:
            found, temperatures[value], accuracy = self._score(value, Z, y, folds)
            for column, number in zip(history.values(), (value, found, accuracy), strict=True):
                column.append(number)
            progress("train-head", len(temperatures), max(len(temperatures), len(values)))
            return found

        if self.row.linear and given is None:
            least, start, greatest = self.row.values
            chosen = climb(score, start, least, greatest)
        else:
            chosen = min(values, key=score)
        self.temperature = temperatures[chosen]
        return chosen, history

    def _values(self, given: Any, y: np.ndarray, folds: np.ndarray) -> list[Any]:
        """What to compare; one value where it is given or nothing can be compared."""
        if self.row.linear:
            start = 10.0 ** self.row.values[1]
            return [start] * SEARCH_STEPS if given is None and folds.max() >= 0 else [given or start]
        voters = len(y) if given or folds.max() < 0 else int(np.sum(folds != -2) - np.bincount(folds[folds >= 0]).max())
        values = [value for value in ([given] if given else self.row.values) if value <= voters]
        if not values:
            raise HeadError(f"{self.row.parameter}={given}: there are only {voters} training rows")
        return values if folds.max() >= 0 else values[:1]

    def _score(self, value: float, Z: np.ndarray, y: np.ndarray, folds: np.ndarray) -> tuple[float, float, float]:
        """Out-of-fold score (low is good), temperature and accuracy of one parameter value."""
        from sklearn.exceptions import ConvergenceWarning

        used = folds != -2
        outputs = np.zeros((len(y), len(self.classes)))
        for fold in range(folds.max() + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a rough fit ranks values well enough
                rows = used & (folds != fold)
                model = self._new(value, **self.row.search).fit(Z[rows], y[rows])
            outputs[folds == fold] = self._outputs_of(model, Z[folds == fold])
        tested = folds >= 0
        outputs, y = outputs[tested], y[tested]
        accuracy = float(np.mean(outputs.argmax(axis=1) == y))
        if self.row.margins and self.row.linear:
            temperature, loss = fit_temperature(outputs, y)
            return loss, temperature, accuracy
        if self.row.linear:
            return log_loss(softmax(outputs), y), 1.0, accuracy
        return brier_score(outputs, y), 1.0, accuracy  # votes may be 0, which the log loss does not forgive

    def _outputs_of(self, model: Any, Z: np.ndarray) -> np.ndarray:
        if not self.row.linear:
            return model.predict_proba(Z)
        return two_columns(Z @ np.atleast_2d(model.coef_).T + model.intercept_)

    def _probabilities(self, Z: np.ndarray) -> np.ndarray:
        outputs = self._outputs_of(self.estimator, Z)
        return softmax(outputs / self.temperature) if self.row.linear else outputs

    def as_dense(self) -> KerasHead:
        """The same function as a Keras head, which can be fine-tuned; linear classifiers only.

        Raises
        ------
        HeadError
            If the classifier is not linear.
        """
        if not self.row.linear:
            raise HeadError(f"head {self.name!r} is not a network; train a linear or Keras head instead")
        head = KerasHead(self.name, DENSE, DenseParameters(), pool=self.pool, seed=self.seed)
        for name in ("classes", "layer", "fingerprint", "input_shape", "mean", "std", "temperature"):
            setattr(head, name, getattr(self, name))
        kernel = np.atleast_2d(self.estimator.coef_).T
        bias = np.broadcast_to(self.estimator.intercept_, (self._outputs,))
        if self._outputs > 1:
            # What all classes share does not change the softmax, but would cost the float32 network digits.
            kernel, bias = kernel - kernel.mean(axis=1, keepdims=True), bias - bias.mean()
        head.network.get_layer("logits").set_weights([kernel, bias])
        return head

    def _network(self) -> Any:
        return self.as_dense().network

    def _save_weights(self, folder: Path) -> None:
        import skops.io

        skops.io.dump(self.estimator, folder / "head.skops")

    def _load_weights(self, folder: Path) -> None:
        path = folder / "head.skops"
        estimator = _load_skops(path)
        found = f"{type(estimator).__module__}.{type(estimator).__qualname__}"
        if type(estimator) is not self._class():
            raise HeadError(f"{path}: holds a {found}, head.json says {self.kind}")
        expected: dict[str, Any] = {"n_features_in_": len(self.mean), "classes_": list(range(len(self.classes)))}
        if self.row.linear:
            expected["coef_"] = (self._outputs, len(self.mean))
        for attribute, value in expected.items():
            stored: Any = getattr(estimator, attribute, None)
            shown = np.shape(np.atleast_2d(stored)) if attribute == "coef_" else stored
            if not np.array_equal(np.asarray(shown), np.asarray(value)):
                raise HeadError(f"{path}: {attribute} is {shown}, head.json asks for {value}")
        if self.row.linear:
            check_finite(path, [estimator.coef_, estimator.intercept_])
        self.estimator = estimator


# ------------------------------------------------------------------------------------------------- search
def stratified_folds(y: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Deal the rows of each class over the folds.

    Returns
    -------
    int64, (n,)
        Fold of each row; -1: only ever trained on (its class has one row), -2: left out, so that at most
        `SEARCH_ROWS` take part. All -1 where no class has two rows.
    """
    generator = np.random.default_rng(seed)
    result = np.full(len(y), -1, dtype=np.int64)
    share = min(1.0, SEARCH_ROWS / len(y))
    start = 0  # the next class goes on where the last one stopped, which keeps the folds equally large
    counts = np.bincount(y)
    folds = min(folds, int(counts.max()))
    for k in np.flatnonzero(counts):
        rows = generator.permutation(np.flatnonzero(y == k))
        kept = max(2, round(share * len(rows)))
        result[rows[kept:]] = -2
        if len(rows) > 1:
            result[rows[:kept]] = (start + np.arange(len(rows[:kept]))) % folds
            start += len(rows[:kept])
    return result


def climb(score: Callable[[float], float], start: int, least: int, greatest: int) -> float:
    """The value with the lowest score, in half decades: decades from ``10**start`` on, then the halves beside.

    The out-of-fold score of an L2 penalty has one valley; walking to it saves the slow, weakly penalised fits.
    """
    tried: dict[float, float] = {}

    def at(exponent: float) -> float:
        if exponent not in tried:
            tried[exponent] = score(10.0**exponent)
        return tried[exponent]

    best = float(start)
    for step in (1, -1):
        while least <= best + step <= greatest and at(best) > at(best + step):
            best += step
    return 10.0 ** min((best, best - 0.5, best + 0.5), key=at)


def row_space(Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in an orthonormal basis of their span.

    Returns
    -------
    coordinates : float64, (n, r), r <= n
        The same distances and inner products as the rows of ``Z``.
    combination : float64, (r, n)
        ``combination @ Z`` is the basis.
    """
    gram = np.zeros((len(Z), len(Z)))
    step = max(1, CHUNK_BYTES // (8 * len(Z)))
    for start in range(0, Z.shape[1], step):
        columns = Z[:, start : start + step].astype(np.float64)
        gram += columns @ columns.T
    values, vectors = np.linalg.eigh(gram)
    kept = values > values[-1] * len(Z) * np.finfo(np.float64).eps
    lengths = np.sqrt(values[kept])
    return vectors[:, kept] * lengths, (vectors[:, kept] / lengths).T


def _load_skops(path: Path) -> Any:
    """Read a skops file with our own list of types, never the file's."""
    import skops.io
    from skops.io.exceptions import UntrustedTypesFoundException

    try:
        foreign = sorted(set(skops.io.get_untrusted_types(file=path)) - set(TRUSTED_TYPES))
        if foreign:
            raise HeadError(f"{path}: holds types that are not loaded from a file: {', '.join(foreign)}")
        return skops.io.load(path, trusted=list(TRUSTED_TYPES))
    except (zipfile.BadZipFile, UntrustedTypesFoundException, OSError) as problem:
        raise HeadError(f"{path}: is not a head that can be loaded: {problem}") from problem
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, IndexError, RecursionError) as problem:
        if isinstance(problem, HeadError):
            raise
        raise HeadError(f"{path}: is not a head that can be loaded: {problem!r}") from problem
