"""Heads: the small models trained on cached features, Keras or scikit-learn, behind one interface.

Every head does the same to a row: pool it to one vector, standardise that with the training rows' mean and
standard deviation, compute one logit per class (two classes: one logit m, read as [0, m]), softmax.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.backend import load_keras
from features.errors import ConfigurationError, HeadError, nearest
from pipeline.config import (
    FORMAT_VERSION,
    DenseParameters,
    HeadFile,
    KnnParameters,
    LinearSvmParameters,
    LogisticParameters,
    RidgeParameters,
    Settings,
    parse,
)
from pipeline.metrics import brier_score, fit_temperature, log_loss, softmax

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
History = dict[str, list[float]]

DENSE = "dense"
POOLS = ("none", "avg", "max", "flatten")
CHUNK_BYTES = 64 << 20
ONE_THREAD_SIZE = 1 << 24  # numbers in the feature matrix
SEARCH_STEPS = 6  # values that are usually tried, for the progress bar
LEAST_DEVIATION = 0.1  # of a column, as a share of the root mean square over all columns
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


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named head: its kind (`HeadFile.kind`), default parameters and default pooling of spatial features."""

    kind: str
    parameters: Settings
    pool: str = "avg"


PRESETS = {
    "logistic": Preset("sklearn.linear_model.LogisticRegression", LogisticParameters()),
    "ridge": Preset("sklearn.linear_model.RidgeClassifier", RidgeParameters()),
    "linear-svm": Preset("sklearn.svm.LinearSVC", LinearSvmParameters()),
    "knn": Preset("sklearn.neighbors.KNeighborsClassifier", KnnParameters()),
    "dropout-linear": Preset(DENSE, DenseParameters(dropout=0.2)),
    "mlp-256": Preset(DENSE, DenseParameters(hidden=(256,), dropout=0.5), pool="flatten"),
}


class Head(abc.ABC):
    """A model from features to class probabilities. Made by `make_head` or `load_head`.

    Attributes
    ----------
    name, kind : str
        Preset; ``"dense"`` or the dotted path of the scikit-learn class.
    parameters : Settings
        How it is trained.
    pool : str or None
        Pooling of spatial features; None until `fit` where the preset's default is to be used.
    classes : tuple of str
        Class names, in label order.
    layer, fingerprint : str
        Backbone layer and fingerprint of the features.
    input_shape : tuple of int
        Shape of one stored row.
    mean, std : float32, (d,)
        Of the pooled training rows; ``std`` has a lower bound, see `LEAST_DEVIATION`.
    temperature : float
        Margins are divided by it.
    """

    def __init__(self, name: str, kind: str, parameters: Settings, *, pool: str | None = None, seed: int = 0) -> None:
        self.name = name
        self.kind = kind
        self.parameters = parameters
        self.pool = pool
        self.seed = seed
        self.classes: tuple[str, ...] = ()
        self.layer = ""
        self.fingerprint = ""
        self.input_shape: tuple[int, ...] = ()
        self.mean = self.std = np.zeros(0, np.float32)
        self.temperature = 1.0

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        *,
        X_validation: np.ndarray | None = None,
        y_validation: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> History:
        """Train.

        Parameters
        ----------
        X : float16 or float32, (n, d) or (n, h, w, c)
            Features of the training rows.
        y : int32, (n,), 0 to c - 1
            Labels; every class must occur.
        X_validation, y_validation : optional
            For early stopping of Keras heads; scikit-learn heads do not look at them.
        progress : callable, optional
            Called with ("train-head", done, total).

        Returns
        -------
        dict of str to list of float
            Columns of ``history.csv``: epochs, or the grid that was searched.

        Raises
        ------
        HeadError
            Features that are not finite or cannot be pooled so, a class without rows, diverging training.
        """
        y = np.asarray(y)
        self._check_labels(y, len(X))
        self.input_shape = tuple(int(size) for size in X.shape[1:])
        self.pool = resolve_pool(self.name, self.pool, self.input_shape)
        Z = pool_features(X, self.pool)
        self.mean, self.std = _column_statistics(Z)
        self._standardise(Z)
        held_out = None
        if X_validation is not None and y_validation is not None and len(y_validation):
            held_out = self._prepare(X_validation), np.asarray(y_validation)
        return self._train(Z, y, held_out, progress or (lambda stage, done, total: None))

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Class probabilities.

        Parameters
        ----------
        X : float16 or float32, (n, *input_shape)
            Features, as stored.

        Returns
        -------
        float64, (n, c), 0-1, rows sum to 1
        """
        self._check_fitted()
        parts = [self._probabilities(self._prepare(X[rows])) for rows in _chunks(X)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes)))

    def save(self, folder: Path) -> None:
        """Write ``head.json`` and the weights into an existing folder."""
        self._check_fitted()
        (folder / "head.json").write_text(json.dumps(self._description()) + "\n", encoding="utf-8")
        self._save_weights(folder)

    @property
    def network(self) -> Any:
        """A functional ``keras.Model`` from a stored row (``input_shape``) to logits, everything included.

        Softmax of the logits divided by `temperature` is `predict_proba` (sigmoid of the one logit of two classes).
        """
        self._check_fitted()
        return self._network()

    @abc.abstractmethod
    def warm_up(self) -> None:
        """Import the library behind the head, so that the time of `fit` is its own."""

    @property
    @abc.abstractmethod
    def parameter_count(self) -> int | None:
        """Trained numbers; None where the notion does not apply."""

    @property
    @abc.abstractmethod
    def files(self) -> tuple[str, ...]:
        """Names of the files that `save` writes."""

    @abc.abstractmethod
    def _train(
        self, Z: np.ndarray, y: np.ndarray, held_out: tuple[np.ndarray, np.ndarray] | None, progress: Progress
    ) -> History: ...

    @abc.abstractmethod
    def _probabilities(self, Z: np.ndarray) -> np.ndarray: ...

    @abc.abstractmethod
    def _network(self) -> Any: ...

    @abc.abstractmethod
    def _save_weights(self, folder: Path) -> None: ...

    @abc.abstractmethod
    def _load_weights(self, folder: Path) -> None: ...

    @property
    def _outputs(self) -> int:
        return 1 if len(self.classes) == 2 else len(self.classes)

    def _prepare(self, X: np.ndarray) -> np.ndarray:
        if X.shape[1:] != self.input_shape:
            raise HeadError(f"features: received rows of shape {X.shape[1:]}, this head takes {self.input_shape}")
        assert self.pool is not None
        Z = pool_features(X, self.pool)
        self._standardise(Z)
        return Z

    def _standardise(self, Z: np.ndarray) -> None:
        Z -= self.mean
        Z /= self.std

    def _check_fitted(self) -> None:
        if not self.input_shape:
            raise HeadError(f"head {self.name!r} is not trained yet; call fit first")

    def _check_labels(self, y: np.ndarray, rows: int) -> None:
        if y.shape != (rows,) or not rows:
            raise HeadError(f"labels: received shape {y.shape} for {rows} rows of features")
        if y.min() < 0:
            raise HeadError(f"labels: {int((y < 0).sum())} training rows are unlabelled (-1)")
        self.classes = self.classes or tuple(str(k) for k in range(int(y.max()) + 1))
        counts = np.bincount(y, minlength=len(self.classes))
        if len(counts) > len(self.classes):
            raise HeadError(f"labels: received {len(counts) - 1}, expected 0 to {len(self.classes) - 1}")
        missing = [repr(self.classes[k]) for k in np.flatnonzero(counts == 0)]
        if missing:
            raise HeadError(
                f"no training rows of {', '.join(missing)}: every class needs some; "
                "give the class more images or another split (--split), or leave it out"
            )
        if len(self.classes) < 2:
            raise HeadError(f"all training rows are of one class ({self.classes[0]!r}); a classifier needs two")

    def _description(self) -> dict[str, Any]:
        """Content of ``head.json``."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "layer": self.layer,
            "pool": self.pool,
            "input_shape": self.input_shape,
            "classes": self.classes,
            "fingerprint": self.fingerprint,
            "scaler": {"mean": self.mean.tolist(), "std": self.std.tolist()},
            "hidden": (),
            "activation": None,
            "dropout": 0.0,
            "temperature": self.temperature,
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
        return _two_columns(Z @ np.atleast_2d(model.coef_).T + model.intercept_)

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
            _check_finite(path, [estimator.coef_, estimator.intercept_])
        self.estimator = estimator


class KerasHead(Head):
    """Dense layers on pooled, standardised features, trained with Keras. Two classes have one logit."""

    parameters: DenseParameters
    files = ("head.json", "head.weights.h5")

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._built: tuple[Any, Any] | None = None

    def warm_up(self) -> None:
        load_keras()

    @property
    def parameter_count(self) -> int | None:
        return int(self._network().count_params())

    def _train(
        self, Z: np.ndarray, y: np.ndarray, held_out: tuple[np.ndarray, np.ndarray] | None, progress: Progress
    ) -> History:
        keras = load_keras()

        settings = self.parameters
        keras.utils.set_random_seed(self.seed)
        self._built = build_network(self, settings)
        body = self._built[1]
        binary = self._outputs == 1
        body.compile(
            optimizer=_optimizer(settings),
            loss=keras.losses.BinaryCrossentropy(from_logits=True)
            if binary
            else keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy") if binary else "accuracy"],
        )
        report = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: progress("train-head", epoch + 1, settings.epochs)
        )
        callbacks, validation = [report], None
        if held_out is not None:
            validation = held_out[0], self._targets(held_out[1])
            patience = settings.patience or settings.epochs
            callbacks.append(
                keras.callbacks.EarlyStopping(monitor="val_loss", patience=patience, restore_best_weights=True)
            )
        # fit shuffles all rows anew each epoch: rows sorted by class are no trouble.
        log = body.fit(
            Z,
            self._targets(y),
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            shuffle=True,
            validation_data=validation,
            validation_batch_size=1024,
            callbacks=callbacks,
            verbose=0,
        ).history
        if not np.isfinite(log["loss"]).all():
            raise HeadError(
                f"training diverged in epoch {int(np.argmin(np.isfinite(log['loss']))) + 1}: "
                f"lower learning_rate (now {settings.learning_rate:g})"
            )
        columns = {
            name: [float(value) for value in log[name]] for name in ("loss", "val_loss", "val_accuracy") if name in log
        }
        return {"epoch": [float(epoch + 1) for epoch in range(len(log["loss"]))], **columns}

    def _targets(self, y: np.ndarray) -> np.ndarray:
        return y.astype(np.float32)[:, None] if self._outputs == 1 else y

    def _probabilities(self, Z: np.ndarray) -> np.ndarray:
        keras = load_keras()

        _, body = self._parts()
        logits = keras.ops.convert_to_numpy(body(Z, training=False)).astype(np.float64)
        return softmax(_two_columns(logits) / self.temperature)

    def _network(self) -> Any:
        return self._parts()[0]

    def _parts(self) -> tuple[Any, Any]:
        if self._built is None:
            self._built = build_network(self, self.parameters)
        return self._built

    def _save_weights(self, folder: Path) -> None:
        self._network().save_weights(folder / "head.weights.h5")

    def _load_weights(self, folder: Path) -> None:
        path = folder / "head.weights.h5"
        network = self._network()
        try:
            network.load_weights(path)
        except (OSError, ValueError, KeyError) as problem:
            shapes = [tuple(variable.shape) for variable in network.trainable_variables]
            raise HeadError(
                f"{path}: the weights do not fit head.json, which asks for {shapes}: {problem}"
            ) from problem
        _check_finite(path, network.get_weights())

    def _description(self) -> dict[str, Any]:
        settings = self.parameters
        more = {"hidden": settings.hidden, "activation": settings.activation, "dropout": settings.dropout}
        return {**super()._description(), **more}


def make_head(
    name: str,
    /,
    *,
    pool: str | None = None,
    seed: int = 0,
    classes: Sequence[str] = (),
    layer: str = "",
    fingerprint: str = "",
    **params: Any,
) -> Head:
    """An untrained head.

    Parameters
    ----------
    name : str
        Key of `PRESETS`.
    pool : {"none", "avg", "max", "flatten"}, optional
        Pooling of spatial features; default: the preset's. Features that are vectors need none.
    seed : int
        Of folds, initial values, dropout and order.
    classes : sequence of str
        Class names; default: ``"0"``, ``"1"``, ... as far as the labels go.
    layer, fingerprint : str
        Kept in ``head.json``.
    **params
        Of the preset: fields of `LogisticParameters`, ..., `DenseParameters`.

    Raises
    ------
    ConfigurationError
        Unknown head, parameter or pooling.
    """
    if name not in PRESETS:
        raise ConfigurationError(
            f"head: received {name!r}, expected one of {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        )
    if pool is not None and pool not in POOLS:
        raise ConfigurationError(f"pool: received {pool!r}, expected one of {', '.join(POOLS)}{nearest(pool, POOLS)}")
    preset = PRESETS[name]
    values = {**preset.parameters.model_dump(), **params}
    parameters = parse(type(preset.parameters), values, f"head {name!r}")
    head = _head_class(preset.kind)(name, preset.kind, parameters, pool=pool, seed=seed)
    head.classes, head.layer, head.fingerprint = tuple(classes), layer, fingerprint
    return head


def load_head(folder: str | Path) -> Head:
    """Rebuild a saved head. The folder is untrusted input: nothing in it is executed.

    Raises
    ------
    HeadError
        A missing or malformed file, weights of other shapes, or a type that is not on our list.
    """
    folder = Path(folder)
    path = folder / "head.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise HeadError(f"{path}: cannot be read: {problem}") from problem
    stored = parse(HeadFile, values, str(path), error=HeadError)
    if stored.kind != DENSE and stored.kind not in CLASSIFIERS:
        known = [DENSE, *CLASSIFIERS]
        hint = nearest(stored.kind, known)
        raise HeadError(f"{path}: kind is {stored.kind!r}, expected one of {', '.join(known)}{hint}")
    name = next((name for name, preset in PRESETS.items() if preset.kind == stored.kind != DENSE), DENSE)
    parameters: Settings
    if stored.kind == DENSE:
        values = {"hidden": stored.hidden, "activation": stored.activation, "dropout": stored.dropout}
        parameters = parse(DenseParameters, values, str(path), error=HeadError)
    else:
        parameters = PRESETS[name].parameters
    head = _head_class(stored.kind)(name, stored.kind, parameters, pool=stored.pool)
    head.classes, head.layer, head.fingerprint = stored.classes, stored.layer, stored.fingerprint
    head.input_shape, head.temperature = stored.input_shape, stored.temperature
    head.mean = np.array(stored.scaler.mean, np.float32)
    head.std = np.array(stored.scaler.std, np.float32)
    columns = pooled_width(stored.input_shape, stored.pool)
    if (len(head.mean), len(head.std)) != (columns, columns):
        raise HeadError(
            f"{path}: scaler has {len(head.mean)} means and {len(head.std)} deviations, expected {columns} for "
            f"features {stored.input_shape} pooled by {stored.pool!r}"
        )
    head._load_weights(folder)
    return head


def _head_class(kind: str) -> type[Head]:
    return KerasHead if kind == DENSE else SklearnHead


# ------------------------------------------------------------------------------------------------ features
def resolve_pool(name: str, pool: str | None, shape: Sequence[int]) -> str:
    """Pooling for rows of this shape: what was asked for, else the preset's default; ``none`` for vectors.

    Raises
    ------
    HeadError
        For rows that are neither (d,) nor (h, w, c), and for poolings that make no vector of them.
    """
    if len(shape) == 1:
        if pool in ("avg", "max"):
            raise HeadError(f"pool: {pool!r} needs spatial features, these are vectors of {shape[0]}; leave it out")
        return "none"
    if len(shape) != 3:
        raise HeadError(f"features: rows of shape {tuple(shape)}; heads take (d,) or (h, w, c)")
    chosen = pool or PRESETS[name].pool
    if chosen == "none":
        raise HeadError(f"pool: 'none' leaves {tuple(shape)}, a head needs a vector; use avg, max or flatten")
    return chosen


def pooled_width(shape: Sequence[int], pool: str) -> int:
    """Columns after pooling."""
    return int(np.prod(shape)) if pool in ("none", "flatten") else shape[-1]


def pool_features(X: np.ndarray, pool: str) -> np.ndarray:
    """Pool rows to vectors, a piece at a time; always a copy.

    Parameters
    ----------
    X : float16 or float32, (n, d) or (n, h, w, c)
        Features, as stored; averages are taken in float32.
    pool : {"none", "avg", "max", "flatten"}
        How.

    Returns
    -------
    float32, (n, d) or (n, c)

    Raises
    ------
    HeadError
        If values are not finite; the number of rows is named.
    """
    pooled = np.empty((len(X), pooled_width(X.shape[1:], pool)), dtype=np.float32)
    bad = 0
    for rows in _chunks(X):
        piece = np.asarray(X[rows], dtype=np.float32)
        if pool == "avg":
            piece = piece.mean(axis=(1, 2))
        elif pool == "max":
            piece = piece.max(axis=(1, 2))
        pooled[rows] = piece.reshape(len(piece), -1)
        bad += int(np.sum(~np.isfinite(pooled[rows]).all(axis=1)))
    if bad:
        raise HeadError(f"features: {bad} of {len(X)} rows hold values that are not finite; extract them again")
    return pooled


def _chunks(X: np.ndarray) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // max(1, 4 * int(np.prod(X.shape[1:]))))
    return (slice(start, start + rows) for start in range(0, len(X), rows))


def _column_statistics(Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, summed in float64; the deviation is at least `LEAST_DEVIATION`.

    Dividing by the deviation of a column that hardly varies (5e-7 was met) would blow up whatever the column does on
    other images, and every step of fine-tuning behind it. Where nothing varies at all, all deviations are 1.
    """
    mean = Z.mean(axis=0, dtype=np.float64)
    squares = np.zeros(Z.shape[1])
    for rows in _chunks(Z):
        squares += np.square(Z[rows] - mean).sum(axis=0)
    std = np.sqrt(squares / len(Z)).astype(np.float32)
    std[Z.min(axis=0) == Z.max(axis=0)] = 0
    least = LEAST_DEVIATION * np.sqrt(np.mean(np.square(std, dtype=np.float64)))
    return mean.astype(np.float32), np.maximum(std, np.float32(least)) if least else np.ones_like(std)


# ------------------------------------------------------------------------------------------------- margins
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


def _two_columns(margins: np.ndarray) -> np.ndarray:
    """One margin m of two classes becomes [0, m]."""
    return np.hstack([np.zeros_like(margins), margins]) if margins.shape[1] == 1 else margins


# ------------------------------------------------------------------------------------------- Keras, skops
@functools.cache
def standardize_layer() -> Any:
    """The Keras layer class ``(x - mean) / std``: constants, no weights. Made late, as Keras is slow to import."""
    keras = load_keras()
    base: Any = keras.layers.Layer

    @keras.saving.register_keras_serializable(package="bottleneck")
    class Standardize(base):
        """``(x - mean) / std`` over the last axis."""

        def __init__(self, mean: Sequence[float], std: Sequence[float], **keywords: Any) -> None:
            super().__init__(**keywords)
            self.mean = np.asarray(mean, dtype=np.float32)
            self.std = np.asarray(std, dtype=np.float32)

        def call(self, inputs: Any) -> Any:
            mean, std = (keras.ops.convert_to_tensor(value, dtype=inputs.dtype) for value in (self.mean, self.std))
            return (inputs - mean) / std

        def compute_output_shape(self, input_shape: Any) -> Any:
            return input_shape

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "mean": self.mean.tolist(), "std": self.std.tolist()}

    return Standardize


def build_network(head: Head, settings: DenseParameters) -> tuple[Any, Any]:
    """The whole network of a head, and the part after pooling and standardisation; they share their layers."""
    keras = load_keras()

    layers = keras.layers
    pooling = {
        "none": [],
        "avg": [layers.GlobalAveragePooling2D(data_format="channels_last", name="pool")],
        "max": [layers.GlobalMaxPooling2D(data_format="channels_last", name="pool")],
        "flatten": [layers.Flatten(data_format="channels_last", name="pool")],
    }[head.pool or "none"]
    dense = [
        layers.Dense(units, activation=settings.activation, name=f"hidden_{number}")
        for number, units in enumerate(settings.hidden, 1)
    ]
    # Zeros: a head starts at even chances, and a linear one needs no luck.
    dense.append(layers.Dense(head._outputs, kernel_initializer="zeros", name="logits"))
    chain = []
    for number, (rate, layer) in enumerate(zip(_dropout_rates(settings), dense, strict=True), 1):
        chain += [layers.Dropout(rate, name=f"dropout_{number}"), layer] if rate else [layer]
    features = keras.Input(head.input_shape, name="features")
    vector = keras.Input((len(head.mean),), name="standardized")
    standardize = standardize_layer()(head.mean, head.std, name="standardize")
    network = keras.Model(features, _apply([*pooling, standardize, *chain], features), name="head")
    return network, keras.Model(vector, _apply(chain, vector), name="head_body")


def _apply(layers: Sequence[Any], tensor: Any) -> Any:
    return functools.reduce(lambda value, layer: layer(value), layers, tensor)


def _dropout_rates(settings: DenseParameters) -> list[float]:
    """Rate in front of each dense layer."""
    layers = len(settings.hidden) + 1
    if isinstance(settings.dropout, tuple):
        if len(settings.dropout) != layers:
            raise ConfigurationError(
                f"dropout: received {len(settings.dropout)} rates, expected {layers}, one in front of each dense layer"
            )
        return list(settings.dropout)
    return [0.0] + [settings.dropout] * (layers - 1) if layers > 1 else [settings.dropout]


def _optimizer(settings: DenseParameters) -> Any:
    keras = load_keras()

    common = {"learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay or None}
    if settings.optimizer == "sgd":
        return keras.optimizers.SGD(momentum=settings.momentum, nesterov=settings.nesterov, **common)
    if settings.optimizer == "rmsprop":
        return keras.optimizers.RMSprop(momentum=settings.momentum, **common)
    return keras.optimizers.Adam(**common)


def _check_finite(path: Path, weights: Sequence[np.ndarray]) -> None:
    if not all(np.isfinite(values).all() for values in weights):
        raise HeadError(f"{path}: holds weights that are not finite; train the head again")


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
