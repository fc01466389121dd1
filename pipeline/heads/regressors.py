"""scikit-learn regressors by import path, kept as arrays: those whose prediction is ``coef_`` times a row plus ``intercept_``.

path --found, tried on a few rows--> fitted to each number --its arrays predict as it does--> `Columns`
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, HeadError
from features.progress import Progress
from features.targets import known_cells
from pipeline.config import History, Settings, parse
from pipeline.heads.columns import ColumnsHead
from pipeline.heads.estimators import REGRESSOR, find_class, make_estimator
from pipeline.heads.head import Head
from pipeline.heads.models.columns import Columns
from pipeline.heads.models.model import Model
from pipeline.heads.prepared import ArrayRows, Prepared
from pipeline.heads.streaming import FeatureStream
from pipeline.presets import EstimatorParameters, Preset

TRIAL = (40, 6)  # rows and columns of a trial
CLOSE = 1e-4  # by how much arrays may predict otherwise than the regressor, of its largest prediction (float32 rows)
EXAMPLES = "sklearn.linear_model.Lasso, ElasticNet or HuberRegressor, or sklearn.svm.LinearSVR"


class RegressorHead(ColumnsHead):
    """A linear regressor of scikit-learn named by its import path, with its own parameters, none of which is searched."""

    parameters: EstimatorParameters

    def __init__(self, *args: Any, **keywords: Any) -> None:
        Head.__init__(self, *args, **keywords)
        self.model: Model | None = None
        self.chosen: dict[str, float] = {}

    @classmethod
    def parse_parameters(cls, name: str, preset: Preset, params: Mapping[str, Any], classes: int) -> Settings:
        """Separate the parameters that all heads have from those of the regressor, and try it on a few rows."""
        common = {key: value for key, value in params.items() if key in ("folds", "scale")}
        own = {key: value for key, value in params.items() if key not in common}
        _tried(name, json.dumps(own, sort_keys=True, default=str))
        return parse(EstimatorParameters, {**common, "params": own}, f"head {name!r}")

    @classmethod
    def restored(cls, path: Path, stored: Any) -> tuple[str, Settings]:
        try:
            find_class(stored.kind, REGRESSOR)
        except ConfigurationError as problem:
            raise HeadError(f"{path}: kind is {stored.kind!r}, which is no regressor: {problem}") from problem
        return stored.kind, EstimatorParameters()

    @classmethod
    def has_dense_form(cls, kind: str) -> bool:
        return True

    @property
    def streams(self) -> bool:
        return False

    def _streamed(self, rows: FeatureStream, value: Any, memory: int) -> Model:
        raise NotImplementedError  # a class of scikit-learn takes all rows at once

    def _train(self, data: Prepared, progress: Progress) -> History:
        assert isinstance(data.train, ArrayRows)
        rows = data.train
        y = np.repeat(rows.labels, rows.views, axis=0)
        self.model = self._solved(rows.flat, y, None)
        progress("train-head", 1, 1)
        return {"rows": [float(len(rows.labels))]}

    def _solved(self, Z: np.ndarray, y: np.ndarray, value: Any, *, quick: bool = False) -> Model:
        """Fit each number to the rows where it is known."""
        parts = []
        for column, known in zip(y.T, known_cells(y).T, strict=True):
            made = make_estimator(self.kind, self.parameters.params, self.seed, REGRESSOR)
            try:
                made.fit(Z[known], column[known])
            except ValueError as problem:
                raise HeadError(f"head {self.name!r}: {str(problem).splitlines()[0]}") from problem
            parts.append(_arrays(self.name, made, Z[known]))
        return Columns(np.array([coef for coef, _ in parts]), np.array([intercept for _, intercept in parts]))


def _arrays(name: str, fitted: Any, Z: np.ndarray) -> tuple[np.ndarray, float]:
    """The arrays of a fitted regressor, float64 (d,) and a number, after they have predicted as it does.

    Raises
    ------
    ConfigurationError
        If it has none, or is more than they are, as one with a link function or a kernel.
    """
    coef, intercept = getattr(fitted, "coef_", None), getattr(fitted, "intercept_", None)
    if coef is not None and intercept is not None and np.size(coef) == Z.shape[1] and np.size(intercept) == 1:
        weights, constant = np.ravel(np.asarray(coef, np.float64)), float(np.ravel(intercept)[0])
        expected = np.ravel(fitted.predict(Z[:100]))
        found = Z[:100].astype(np.float64) @ weights + constant
        if np.abs(found - expected).max() <= CLOSE * max(1.0, float(np.abs(expected).max())):
            return weights, constant
    raise ConfigurationError(
        f"head {name!r} cannot be kept as plain arrays: on numbers a head by import path is a linear regressor, such as {EXAMPLES}"
    )


@functools.lru_cache(maxsize=256)
def _tried(path: str, params: str) -> None:
    """Fit a regressor to a few rows: it must accept its parameters and be kept as arrays."""
    made = make_estimator(path, json.loads(params), 0, REGRESSOR)
    generator = np.random.default_rng(0)
    rows = generator.normal(size=TRIAL).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as those about convergence, which mean nothing on a few rows
        try:
            made.fit(rows, 5 + rows[:, 0] + 0.1 * generator.normal(size=len(rows)))
        except Exception as problem:  # whatever a class raises, it is not a head
            raise ConfigurationError(f"head {path!r}: {(str(problem) or repr(problem)).splitlines()[0]}") from problem
        _arrays(path, made, rows)
