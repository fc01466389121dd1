"""Heads as our own arrays say what scikit-learn says, from memory, from ``head.npz`` and from an older ``head.skops``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.errors import HeadError
from pipeline.heads.estimators import make_estimator
from pipeline.heads.models.archive import Archive
from pipeline.heads.models.converting import CONVERTERS, class_count, model_of, model_of_part
from pipeline.heads.models.document import KINDS, restored
from pipeline.heads.models.neighbours import Neighbours
from pipeline.heads.models.parts import NotPlainError, Part
from pipeline.heads.models.skops_file import read_skops
from pipeline.scores.metrics import softmax, two_columns

COLUMNS = 7
TOLERANCE = 1e-6  # in probability; scikit-learn computes some of them in float32
NEAREST, RADIUS = "sklearn.neighbors.KNeighborsClassifier", "sklearn.neighbors.RadiusNeighborsClassifier"
MACHINE, LAYERS = "sklearn.svm.SVC", "sklearn.neural_network.MLPClassifier"
GRADIENT, BAGGING = "sklearn.ensemble.GradientBoostingClassifier", "sklearn.ensemble.BaggingClassifier"
CALIBRATION, BOOSTED = "sklearn.calibration.CalibratedClassifierCV", "sklearn.ensemble.AdaBoostClassifier"
LOGISTIC, FOREST = "sklearn.linear_model.LogisticRegression", "sklearn.ensemble.RandomForestClassifier"
HISTOGRAM = "sklearn.ensemble.HistGradientBoostingClassifier"
SMALL = {"n_estimators": 4}

CLASSIFIERS: list[tuple[str, dict[str, Any]]] = [
    (LOGISTIC, {}),
    ("sklearn.linear_model.LogisticRegressionCV", {"Cs": 2, "cv": 2}),
    ("sklearn.linear_model.RidgeClassifier", {"fit_intercept": False}),
    ("sklearn.linear_model.RidgeClassifierCV", {}),
    ("sklearn.linear_model.Perceptron", {}),
    ("sklearn.linear_model.SGDClassifier", {"average": True}),
    ("sklearn.svm.LinearSVC", {}),
    ("sklearn.discriminant_analysis.LinearDiscriminantAnalysis", {"solver": "lsqr", "shrinkage": 0.3}),
    (NEAREST, {"n_neighbors": 3, "algorithm": "brute"}),
    (NEAREST, {"weights": "distance", "algorithm": "kd_tree"}),
    (NEAREST, {"n_neighbors": 4, "algorithm": "ball_tree", "weights": "distance", "p": 3}),
    (NEAREST, {"n_neighbors": 4, "p": 1}),
    (NEAREST, {"n_neighbors": 4, "metric": "cosine"}),
    (NEAREST, {"n_neighbors": 4, "metric": "chebyshev"}),
    (RADIUS, {"radius": 20.0, "weights": "distance"}),
    (RADIUS, {"radius": 3.0, "outlier_label": "most_frequent"}),
    (RADIUS, {"radius": 3.0, "outlier_label": 1, "algorithm": "brute"}),
    ("sklearn.tree.DecisionTreeClassifier", {}),
    ("sklearn.tree.ExtraTreeClassifier", {"max_depth": 4}),
    (FOREST, SMALL),
    ("sklearn.ensemble.ExtraTreesClassifier", {**SMALL, "class_weight": "balanced"}),
    (GRADIENT, SMALL),
    (GRADIENT, {**SMALL, "init": "zero"}),
    (GRADIENT, {**SMALL, "loss": "exponential"}),
    (HISTOGRAM, {"max_iter": 4, "min_samples_leaf": 3}),
    (MACHINE, {}),
    (MACHINE, {"kernel": "linear"}),
    (MACHINE, {"kernel": "poly", "coef0": 1.0}),
    (MACHINE, {"kernel": "sigmoid"}),
    ("sklearn.svm.NuSVC", {"nu": 0.2}),
    (LAYERS, {"hidden_layer_sizes": [6], "max_iter": 30}),
    (LAYERS, {"hidden_layer_sizes": [6, 5], "activation": "tanh", "max_iter": 30}),
    (LAYERS, {"hidden_layer_sizes": [6], "activation": "logistic", "max_iter": 30}),
    ("sklearn.naive_bayes.GaussianNB", {}),
    (BAGGING, SMALL),
    (BAGGING, {**SMALL, "estimator": LOGISTIC, "max_features": 0.5}),
    (BOOSTED, SMALL),
    (BOOSTED, {**SMALL, "estimator": LOGISTIC}),
    (CALIBRATION, {"cv": 2, "estimator": "sklearn.svm.LinearSVC"}),
    (CALIBRATION, {"cv": 2, "estimator": {FOREST: SMALL}}),
    (CALIBRATION, {"cv": 2, "estimator": MACHINE, "ensemble": False}),
]
# What arrays do not describe.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("sklearn.discriminant_analysis.QuadraticDiscriminantAnalysis", {}),
    ("sklearn.naive_bayes.BernoulliNB", {}),
    (MACHINE, {"decision_function_shape": "ovo"}),
    (CALIBRATION, {"cv": 2, "estimator": "sklearn.svm.LinearSVC", "method": "isotonic"}),
    (CALIBRATION, {"cv": 2, "estimator": {GRADIENT: SMALL}}),
]


@functools.cache
def rows(classes: int, count: int = 90, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around a centre of each class, which overlap, and labels."""
    labels = np.arange(count) % classes
    centres = np.random.default_rng(classes).normal(size=(classes, COLUMNS))
    noise = np.random.default_rng(seed).normal(size=(count, COLUMNS))
    return (noise + 1.2 * centres[labels]).astype(np.float32), labels


def fitted(path: str, params: dict[str, Any], classes: int) -> Any:
    X, y = rows(classes)
    return make_estimator(path, params, 0).fit(X, y)


def said(estimator: Any, Z: np.ndarray) -> np.ndarray:
    """Probabilities of scikit-learn; of margins, their softmax."""
    if hasattr(estimator, "predict_proba"):
        return np.asarray(estimator.predict_proba(Z))
    margins = estimator.decision_function(Z)
    return softmax(two_columns(margins[:, None] if margins.ndim == 1 else margins))


def name_of(value: Any) -> str:
    return value.rpartition(".")[2] if isinstance(value, str) else ",".join(map(str, value.values()))[:40]


@pytest.mark.slow  # fits 41 classifiers, twice
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("path", "params"), CLASSIFIERS, ids=name_of)
def test_arrays_say_what_scikit_learn_says(path: str, params: dict[str, Any], classes: int, tmp_path: Path) -> None:
    import skops.io

    if params.get("loss") == "exponential" and classes > 2:
        pytest.skip("of two classes only")
    estimator = fitted(path, params, classes)
    Z = np.concatenate([rows(classes, 120, seed=1)[0], rows(classes)[0][:10]])
    expected = said(estimator, Z)
    model = model_of(estimator, COLUMNS)
    # scikit-learn normalises naive Bayes in float32
    tolerance = 5e-6 if path.endswith("GaussianNB") else TOLERANCE
    np.testing.assert_allclose(model.probabilities(Z), expected, rtol=0, atol=tolerance)

    values = json.loads(json.dumps(model.save(tmp_path)))["model"]
    with Archive(tmp_path / "head.npz") as archive:
        again = restored(values, lambda name: archive.array(f"{name}.npy"))
    again.check(COLUMNS, classes)
    assert (again.probabilities(Z) == model.probabilities(Z)).all()

    skops.io.dump(estimator, tmp_path / "head.skops")
    with Archive(tmp_path / "head.skops") as archive:
        part = read_skops(archive)
        older = model_of_part(part)
        older.check(COLUMNS, class_count(part))
    assert (older.probabilities(Z) == model.probabilities(Z)).all()


def test_every_class_and_every_kind_of_model_is_among_them() -> None:
    tried = {path.rpartition(".")[2] for path, _ in CLASSIFIERS}
    assert tried == set(CONVERTERS) - {"PassiveAggressiveClassifier"}  # which is deprecated
    made = {
        model_of(fitted(path, params, 2), COLUMNS).kind for path, params in CLASSIFIERS if path in (LOGISTIC, NEAREST)
    }
    assert made < set(KINDS)


def test_an_ensemble_on_principal_components() -> None:
    from sklearn.decomposition import PCA
    from sklearn.pipeline import Pipeline

    X, y = rows(3)
    ensemble = make_estimator(BAGGING, {**SMALL, "estimator": NEAREST, "max_features": 0.5}, 0)
    whole = Pipeline([("pca", PCA(4, random_state=0)), ("classifier", ensemble)]).fit(X, y)
    model = model_of(whole, COLUMNS)
    assert model.described()[0]["model"]["kind"] == "averaged"
    np.testing.assert_allclose(model.probabilities(X), whole.predict_proba(X), rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("path", "params"), OTHERS, ids=name_of)
def test_what_arrays_do_not_describe_is_said(path: str, params: dict[str, Any]) -> None:
    with pytest.raises(NotPlainError):
        model_of(fitted(path, params, 3), COLUMNS)


@pytest.mark.parametrize("fitted_by", [{"solver": "liblinear"}, {"solver": "lbfgs", "multi_class": "ovr"}])
def test_a_regression_of_each_class_against_the_rest(fitted_by: dict[str, str]) -> None:
    """scikit-learn before 1.8 could make one. Its probabilities are normalised logistic functions, not a softmax."""
    draw = np.random.default_rng(0)
    coef, intercept, Z = draw.normal(size=(3, COLUMNS)), draw.normal(size=3), rows(3)[0]

    def found(**more: str) -> np.ndarray:
        attributes = {"coef_": coef, "intercept_": intercept, "classes_": np.arange(3), **more}
        model = model_of_part(
            Part("sklearn.linear_model._logistic.LogisticRegressionCV", attributes, lambda value: value)
        )
        model.check(COLUMNS, 3)
        return model.probabilities(Z)

    shares = 1 / (1 + np.exp(-(Z @ coef.T + intercept)))
    np.testing.assert_allclose(found(**fitted_by), shares / shares.sum(axis=1, keepdims=True), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found(solver="lbfgs"), softmax(Z @ coef.T + intercept), rtol=0, atol=1e-12)


def test_an_array_that_a_file_names_again_and_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of trees of one array would take thousands of times the memory of the file."""
    monkeypatch.setattr("pipeline.heads.models.archive.MOST_AGAIN", 5_000)
    np.savez(tmp_path / "head.npz", large=np.zeros(1_000))
    with Archive(tmp_path / "head.npz") as archive:
        archive.array("large.npy")
        with pytest.raises(HeadError, match=r"'large\.npy' is used many times, which takes more memory than the file"):
            archive.array("large.npy")


def test_of_equally_near_rows_the_first_ones_vote() -> None:
    """scikit-learn takes any of them. Here every row is there three times, with three labels."""
    X = np.repeat(np.random.default_rng(0).normal(size=(20, COLUMNS)).astype(np.float32), 3, axis=0)
    y = np.arange(60) % 3
    estimator = make_estimator(NEAREST, {"n_neighbors": 4, "algorithm": "brute"}, 0).fit(X, y)
    assert (model_of(estimator, COLUMNS).probabilities(X) == [0.5, 0.25, 0.25]).all()


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "manhattan"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_of_many_equal_rows_the_first_ones_vote_however_many_are_asked_about(metric: str, dtype: Any) -> None:
    """Five rows, each there 333 times in any order and with any label. Where all of them vote, scikit-learn agrees."""
    from sklearn.metrics import pairwise_distances

    generator = np.random.default_rng(0)
    base, which = generator.normal(size=(5, 1283)).astype(dtype), generator.permutation(np.arange(1665) % 5)
    y, Z = generator.integers(0, 3, 1665), generator.normal(size=(7, 1283)).astype(dtype)
    for count in (4, 333, 350, 666):
        params = {"n_neighbors": count, "algorithm": "brute", "metric": metric}
        estimator = make_estimator(NEAREST, params, 0).fit(base[which], y)
        model = model_of(estimator, 1283)
        rank = pairwise_distances(Z, base, metric=metric).argsort(axis=1).argsort(axis=1)
        voters = rank[:, which].argsort(axis=1, kind="stable")[:, :count]
        expected = np.stack([np.bincount(y[rows], minlength=3) / count for rows in voters])
        np.testing.assert_allclose(model.probabilities(Z), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            np.concatenate([model.probabilities(one[None]) for one in Z]), expected, rtol=0, atol=1e-12
        )
        if count % 333 == 0:
            np.testing.assert_allclose(estimator.predict_proba(Z), expected, rtol=0, atol=1e-12)


def test_a_row_without_a_neighbour_is_an_error_with_a_way_out() -> None:
    model = model_of(fitted(RADIUS, {"radius": 3.0}, 2), COLUMNS)
    with pytest.raises(HeadError, match=r"1 rows have no training row within the radius of 3.*outlier_label"):
        model.probabilities(np.full((1, COLUMNS), 100.0, np.float32))


def test_many_rows_are_predicted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.heads.models import model as interface

    Z = rows(3, 120, seed=1)[0]
    for path, params in ((NEAREST, {}), (FOREST, SMALL), (GRADIENT, SMALL), (MACHINE, {})):
        model = model_of(fitted(path, dict(params), 3), COLUMNS)
        whole = model.probabilities(Z)
        with monkeypatch.context() as patch:
            patch.setattr(interface, "WORKING", 1000)
            np.testing.assert_allclose(model.probabilities(Z), whole, rtol=0, atol=1e-12)


def changed(field: str, change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Any]], None]:
    def edit(fields: dict[str, Any]) -> None:
        fields[field] = change(fields[field])

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (changed("labels", lambda labels: labels + 2), "labels holds indices out of bounds: expected 0 to 2"),
        (changed("labels", lambda labels: labels.astype(np.uint64)), "labels is uint64, expected integers"),
        (changed("labels", lambda labels: labels[1:]), r"labels has shape \(89,\), expected \(90\)"),
        (changed("rows", lambda values: values.astype(np.float16)), "rows is float16, expected floats"),
        (changed("rows", lambda values: values[:, 1:]), r"rows has shape \(90, 6\), expected \(any, 7\)"),
        (changed("count", lambda _: 91), "count is 91, of 90 rows"),
        (changed("radius", lambda _: 1.0), "expected either count or radius"),
        (changed("metric", lambda _: "precomputed"), "metric is 'precomputed'"),
    ],
)
def test_neighbours_are_checked(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    model = model_of(fitted(NEAREST, {}, 3), COLUMNS)
    fields = dict(vars(model))
    edit(fields)
    with pytest.raises(ValueError, match=message):
        Neighbours(**fields).check(COLUMNS, 3)
