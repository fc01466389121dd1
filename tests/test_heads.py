"""Heads: known answers, round trips, refusals; the Keras network and predict_proba are one function."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import listing

from features.errors import ConfigurationError, FormatVersionError, HeadError, UntrustedHeadError
from pipeline.heads.classifier_table import CLASSIFIERS
from pipeline.heads.classifiers import SklearnHead, climb, row_space
from pipeline.heads.dense import KerasHead
from pipeline.heads.estimators import find_class
from pipeline.heads.kinds import Head, load_head, make_head, resolve_pool
from pipeline.heads.models.linear import Linear
from pipeline.heads.persistence import TRUSTED_TYPES
from pipeline.heads.pooling import pool_features
from pipeline.scores.metrics import evaluate, softmax
from pipeline.scores.selection import stratified_folds

SKLEARN = ["logistic", "ridge", "linear-svm", "sgd", "lda", "knn"]
LINEAR = ["logistic", "ridge", "linear-svm", "sgd", "lda"]
KERAS = ["dropout-linear", "mlp-256"]
HEAD_KEYS = [
    "format",
    "kind",
    "layer",
    "pool",
    "input_shape",
    "classes",
    "fingerprint",
    "scaler",
    "hidden",
    "activation",
    "dropout",
    "temperature",
]


def blobs(
    rows: int, columns: int, classes: int, *, distance: float = 4.0, seed: int = 0, centres: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussians of unit width around random corners, rows sorted by class."""
    corners = np.random.default_rng(centres).normal(size=(classes, columns))
    corners *= distance / np.linalg.norm(corners, axis=1, keepdims=True)
    labels = np.sort(np.arange(rows) % classes).astype(np.int32)
    X = corners[labels] + np.random.default_rng(seed + 1).normal(size=(rows, columns))
    return (3 * X + 10).astype(np.float32), labels


def fitted(name: str, *, classes: int = 3, columns: int = 6, rows: int = 90, **params: Any) -> tuple[Head, np.ndarray]:
    X, y = blobs(rows, columns, classes)
    head = make_head(name, classes=[f"class {k}" for k in range(classes)], layer="last", fingerprint="f" * 64, **params)
    head.fit(X, y, X_validation=X[::3], y_validation=y[::3])
    return head, blobs(40, columns, classes, seed=5)[0]


shared = functools.cache(fitted)  # for tests that leave the head as it is


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------ features
def test_pooling_gives_the_numbers_of_numpy() -> None:
    X = np.random.default_rng(0).normal(size=(5, 3, 4, 2)).astype(np.float32)
    assert pool_features(X, "avg") == pytest.approx(X.mean(axis=(1, 2)), abs=1e-6)
    assert (pool_features(X, "max") == X.max(axis=(1, 2))).all()
    assert (pool_features(X, "flatten") == X.reshape(5, 24)).all()
    tokens = X.reshape(5, -1, X.shape[3])  # as a transformer gives them
    for pool in ("avg", "max", "flatten"):
        assert pool_features(tokens, pool) == pytest.approx(pool_features(X, pool), abs=1e-6)
    assert resolve_pool("logistic", None, tokens.shape[1:]) == "avg"
    assert (pool_features(X[:, 0, 0], "none") == X[:, 0, 0]).all()


def test_float16_is_averaged_in_float32() -> None:
    X = np.full((2, 40, 40, 1), 60_000, np.float16)  # the sum does not fit float16
    assert pool_features(X, "avg").tolist() == [[60_000.0], [60_000.0]]


def test_pooling_in_pieces_is_the_same_and_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    X = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    whole = pool_features(X, "none")
    monkeypatch.setattr("pipeline.heads.pooling.CHUNK_BYTES", 24)  # two rows
    assert (pool_features(X, "none") == whole).all()
    assert not np.shares_memory(whole, X)


def test_rows_that_are_not_finite_are_counted() -> None:
    X = np.ones((5, 2), np.float32)
    X[1, 0], X[3, 1] = np.nan, np.inf
    with pytest.raises(HeadError, match="2 of 5 rows"):
        pool_features(X, "none")


@pytest.mark.parametrize(
    ("name", "pool", "shape", "expected"),
    [
        ("logistic", None, (1280,), "none"),
        ("logistic", None, (7, 7, 512), "avg"),
        ("mlp-256", None, (7, 7, 512), "flatten"),
        ("mlp-256", "max", (7, 7, 512), "max"),
        ("ridge", "flatten", (1280,), "none"),
    ],
)
def test_pooling_default(name: str, pool: str | None, shape: tuple[int, ...], expected: str) -> None:
    assert resolve_pool(name, pool, shape) == expected


@pytest.mark.parametrize(
    ("pool", "shape", "message"),
    [
        ("avg", (1280,), "needs spatial features"),
        ("none", (7, 7, 512), "use avg, max or flatten"),
        ("none", (36, 16), "use avg, max or flatten"),
        (None, (2, 7, 7, 512), r"but heads expect \(d,\), \(tokens, c\) or \(h, w, c\); use --pool flatten"),
    ],
)
def test_pooling_that_makes_no_vector_is_refused(pool: str | None, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        resolve_pool("logistic", pool, shape)


def test_features_are_standardised_with_the_training_rows() -> None:
    X = np.array([[1.0, 5.0, 1e6], [3.0, 5.0, 1e6 + 1], [5.0, 5.0, 1e6], [7.0, 5.0, 1e6 + 1]], np.float32)
    head = make_head("logistic", C=1.0)
    head.fit(X, np.array([0, 0, 1, 1], np.int32))
    assert head.mean.tolist() == [4.0, 5.0, 1e6 + 0.5]
    # a constant column is divided by a tenth of the root mean square deviation, not by something near zero
    assert head.std == pytest.approx([np.sqrt(5), 0.1 * np.sqrt((5 + 0 + 0.25) / 3), 0.5])


def test_columns_that_hardly_vary_are_not_blown_up() -> None:
    generator = np.random.default_rng(0)
    X = (generator.normal(size=(40, 3)) * [1.0, 1.0, 1e-7]).astype(np.float32)
    head = make_head("logistic", C=1.0)
    head.fit(X, np.arange(40, dtype=np.int32) % 2)
    other = np.array([[0.0, 0.0, 0.01]], np.float32)  # nothing new in the columns that count
    plain = head.predict_proba(np.zeros((1, 3), np.float32))
    assert np.abs(head.predict_proba(other) - plain).max() < 0.01


# ------------------------------------------------------------------------------------------------ choices
def test_folds_keep_every_class_in_every_training_part() -> None:
    y = np.repeat([0, 1, 2, 3], [1, 2, 10, 47])
    folds = stratified_folds(y, 5, seed=0)
    assert folds[0] == -1
    for fold in range(5):
        assert set(y[folds != fold]) == {0, 1, 2, 3}
        assert 10 <= (folds == fold).sum() <= 13
        assert (y[folds == fold] == 2).sum() == 2
    assert (folds == stratified_folds(y, 5, seed=0)).all()
    assert (stratified_folds(np.array([0, 1, 2]), 5, seed=0) == -1).all()


def test_folds_of_many_rows_use_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.scores.selection.SEARCH_ROWS", 100)
    y = np.repeat([0, 1], [900, 100])
    folds = stratified_folds(y, 5, seed=0)
    assert [(folds[y == k] >= 0).sum() for k in (0, 1)] == [90, 10]
    assert (folds == -2).sum() == 900


@pytest.mark.parametrize(("valley", "start", "expected"), [(-2.4, 0, -2.5), (2.2, 0, 2.0), (9.0, 0, 3.5), (0.1, 0, 0)])
def test_climb_walks_to_the_valley(valley: float, start: int, expected: float) -> None:
    asked = []

    def score(value: float) -> float:
        asked.append(value)
        return (np.log10(value) - valley) ** 2

    assert climb(score, start, -3, 3) == pytest.approx(10**expected)
    assert len(asked) == len(set(asked)) <= 7


def test_row_space_keeps_inner_products() -> None:
    Z = np.random.default_rng(0).normal(size=(6, 30)).astype(np.float32)
    Z[5] = Z[4]  # dependent rows
    coordinates, combination = row_space(Z)
    assert coordinates.shape == (6, 5)
    assert coordinates @ coordinates.T == pytest.approx((Z @ Z.T).astype(float), abs=1e-4)
    assert coordinates @ combination @ Z == pytest.approx(Z.astype(float), abs=1e-5)


# ------------------------------------------------------------------------------------------- scikit-learn
def test_logistic_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    X, y = blobs(90, 6, 3)
    head = make_head("logistic", C=0.3)
    assert head.fit(X, y) == {"C": [0.3]}
    Z = (X - head.mean) / head.std
    model = LogisticRegression(C=0.3, max_iter=1000).fit(Z, y)
    assert head.predict_proba(X) == pytest.approx(model.predict_proba(Z), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameter"), [("logistic", "C"), ("ridge", "alpha"), ("linear-svm", "C")])
@pytest.mark.parametrize("classes", [2, 3])
def test_more_columns_than_rows_change_nothing(name: str, parameter: str, classes: int) -> None:
    """The fit in the space of the rows is the fit in the space of the columns."""
    X, y = blobs(30, 200, classes)
    head = make_head(name, **{parameter: 0.01 if parameter == "C" else 100.0})
    assert isinstance(head, SklearnHead)
    head.fit(X, y)
    Z = ((X - head.mean) / head.std).astype(np.float64)
    fixed = dict(CLASSIFIERS[head.kind].fixed)
    model = find_class(head.kind)(**{parameter: getattr(head.parameters, parameter)}, **fixed).fit(Z, y)
    assert isinstance(head.fitted, Linear)
    assert head.fitted.coef == pytest.approx(np.atleast_2d(model.coef_), abs=2e-4)
    margins = model.decision_function(Z)
    assert head.fitted.outputs(Z)[:, 1 if classes == 2 else slice(None)] == pytest.approx(margins, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ridge", "linear-svm"])
def test_margins_become_probabilities_by_one_temperature(name: str) -> None:
    head, X = shared(name, classes=2)
    assert isinstance(head, SklearnHead)
    margins = head.fitted.outputs((X - head.mean) / head.std)[:, 1]
    expected = 1 / (1 + np.exp(-margins / head.temperature))
    assert head.temperature != 1
    assert head.predict_proba(X)[:, 1] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SKLEARN)
@pytest.mark.parametrize("classes", [2, 4])
def test_search_separates_the_blobs(name: str, classes: int) -> None:
    X, y = blobs(240, 10, classes, distance=6)
    head = make_head(name)
    history = head.fit(X, y)
    assert list(history) == [CLASSIFIERS[head.kind].parameter, "score", "accuracy"]
    assert len({len(column) for column in history.values()}) == 1
    test, labels = blobs(400, 10, classes, distance=6, seed=9)
    scores = evaluate(head.predict_proba(test), labels, head.classes)
    assert scores["accuracy"] > 0.97
    assert scores["ece"] < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("name", SKLEARN)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_loaded_head_gives_the_same_probabilities(name: str, classes: int, tmp_path: Path) -> None:
    head, X = shared(name, classes=classes)
    head.save(tmp_path)
    assert listing(tmp_path) == ["head.json", "head.npz"] == sorted(head.files)
    again = load_head(tmp_path)
    assert (again.predict_proba(X) == head.predict_proba(X)).all()
    assert (again.name, again.kind, again.classes, again.layer) == (name, head.kind, head.classes, "last")
    assert isinstance(head, SklearnHead)
    assert isinstance(again, SklearnHead)
    assert again.chosen == head.chosen
    assert list(head.chosen) == [CLASSIFIERS[head.kind].parameter]
    again.save(tmp_path)
    assert (load_head(tmp_path).predict_proba(X) == head.predict_proba(X)).all()


@pytest.mark.parametrize("name", SKLEARN)
def test_one_row_per_class_is_enough_to_fit(name: str) -> None:
    head = make_head(name)
    rows = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], np.float32), np.array([0, 1, 2], np.int32)
    if name == "lda":
        with pytest.raises(HeadError, match="'lda': scikit-learn cannot fit it to these rows: The number of samples"):
            head.fit(*rows)
        return
    head.fit(*rows)
    assert head.predict_proba(np.array([[3.9, 0.1]], np.float32)).argmax() == 1


@pytest.mark.slow
def test_parameter_count() -> None:
    assert shared("logistic", classes=2)[0].parameter_count == 7
    assert shared("ridge", classes=3)[0].parameter_count == 21
    assert shared("knn", classes=3)[0].parameter_count is None


def test_more_neighbours_than_rows_are_refused() -> None:
    with pytest.raises(HeadError, match="n_neighbors: received 91, expected at most 90"):
        fitted("knn", n_neighbors=91)


# ---------------------------------------------------------------------------------------------- refusals
def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'logistic'"):
        make_head("logistics")
    with pytest.raises(
        ConfigurationError, match="head 'dropout-linear': unknown key 'learn_rate'; did you mean 'learning_rate'"
    ):
        make_head("dropout-linear", learn_rate=0.1)
    with pytest.raises(ConfigurationError, match="C: received -1, expected greater than 0"):
        make_head("logistic", C=-1)
    with pytest.raises(ConfigurationError, match="did you mean 'avg'"):
        make_head("logistic", pool="avgs")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 1, 1], "no training rows of 'c'"),
        ([0, 1, 2, -1], "1 training rows are unlabelled"),
        ([0, 1, 2, 3], "received a label of 3, expected 0 to 2"),
        ([0, 1, 2], r"shape \(3,\), expected one label for each of 4 rows"),
    ],
)
def test_labels_that_cannot_be_trained_on(labels: list[int], message: str) -> None:
    head = make_head("logistic", classes=("a", "b", "c"))
    with pytest.raises(HeadError, match=message):
        head.fit(np.zeros((4, 2), np.float32), np.array(labels, np.int32))


def test_one_class_is_refused() -> None:
    with pytest.raises(HeadError, match="all training rows are of one class"):
        make_head("logistic").fit(np.zeros((4, 2), np.float32), np.zeros(4, np.int32))


def test_a_head_is_trained_before_it_predicts(tmp_path: Path) -> None:
    head = make_head("logistic")
    for act in (lambda: head.predict_proba(np.zeros((1, 2))), lambda: head.save(tmp_path), lambda: head.network):
        with pytest.raises(HeadError, match="not trained yet"):
            act()


@pytest.mark.slow
def test_features_of_another_shape_are_refused() -> None:
    head, X = shared("logistic", classes=3)
    with pytest.raises(HeadError, match=r"received rows of shape \(5,\), but this head expects \(6,\)"):
        head.predict_proba(X[:, :5])


@pytest.mark.slow
def test_head_json_has_exactly_the_promised_keys(tmp_path: Path) -> None:
    head, _ = shared("ridge", classes=3)
    head.save(tmp_path)
    values = json.loads((tmp_path / "head.json").read_text())
    assert list(values) == [*HEAD_KEYS, "model", "chosen"]
    assert (values["format"], values["model"]) == (2, {"kind": "linear"})
    assert values["kind"] == "sklearn.linear_model.RidgeClassifier"
    assert values["scaler"]["mean"] == head.mean.tolist()
    assert (values["input_shape"], values["pool"], values["hidden"]) == ([6], "none", [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 1.0}, "unknown key 'temprature'; did you mean 'temperature'"),
        ({"kind": "os.system"}, "kind is 'os.system', expected dense or sklearn"),
        ({"model": {"kind": "liner"}}, "kind is 'liner', expected one of linear, projected"),
        ({"model": {"kind": "linear", "coef": 3}}, "a linear has the keys coef, kind, expected kind"),
        ({"format": 1}, "unknown key 'model'"),
        ({"temperature": 0}, "temperature: received 0, expected greater than 0"),
        ({"input_shape": [5]}, "6 means and 6 deviations, expected 5"),
        ({"classes": ["a", "b"]}, r"coef has shape \(3, 6\), expected \(1, 6\)"),
        (
            {"input_shape": [2], "scaler": {"mean": [0, 0], "std": [1, 1]}},
            r"coef has shape \(3, 6\), expected \(3, 2\)",
        ),
    ],
)
def test_an_edited_head_json_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    shared("ridge", classes=3)[0].save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(HeadError, match=message):
        load_head(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    shared("ridge", classes=3)[0].save(tmp_path)
    edit(tmp_path, format=9)
    with pytest.raises(FormatVersionError, match="format 9 is not known"):
        load_head(tmp_path)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"head\.json: cannot be read"):
        load_head(tmp_path)
    shared("ridge", classes=3)[0].save(tmp_path)
    (tmp_path / "head.npz").unlink()
    with pytest.raises(HeadError, match=r"head\.npz: cannot be loaded as a head"):
        load_head(tmp_path)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    shared("ridge", classes=3)[0].save(tmp_path)
    proof = tmp_path / "executed"
    (tmp_path / "head.npz").write_bytes(f"cposix\nsystem\n(S'touch {proof}'\ntR.".encode())
    with pytest.raises(HeadError, match="cannot be loaded as a head"):
        load_head(tmp_path)
    assert not proof.exists()


def save_as_skops(head: Head, estimator: Any, folder: Path) -> None:
    """Write a head as a release did that knew no arrays, without a signature."""
    import skops.io

    head.save(folder)
    values = json.loads((folder / "head.json").read_text())
    values = {key: value for key, value in values.items() if key not in ("model", "chosen")}
    (folder / "head.json").write_text(json.dumps(values | {"format": 1}))
    for name in ("head.npz", "head.skops.signature"):
        (folder / name).unlink(missing_ok=True)
    skops.io.dump(estimator, folder / "head.skops")


@pytest.mark.slow
def test_foreign_types_in_a_skops_file_are_named_and_not_made_even_if_trusted(tmp_path: Path) -> None:
    """The file's own list of types is not what it is trusted by."""
    import os

    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    head, X = fitted("sklearn.discriminant_analysis.QuadraticDiscriminantAnalysis")
    model = QuadraticDiscriminantAnalysis().fit(X, np.arange(40) % 3)
    proof = tmp_path / "executed"
    model.priors = functools.partial(os.system, f"touch {proof}")
    save_as_skops(head, model, tmp_path)
    with pytest.raises(HeadError, match=r"types that must not be loaded from a file: .*system"):
        load_head(tmp_path, trust=True)
    assert not proof.exists()


@pytest.mark.slow
def test_a_head_that_arrays_do_not_describe_needs_the_signature_of_this_user_or_trust(tmp_path: Path) -> None:
    head, X = fitted("sklearn.discriminant_analysis.QuadraticDiscriminantAnalysis")
    head.save(tmp_path)
    assert listing(tmp_path) == ["head.json", "head.skops", "head.skops.signature"] == sorted(head.files)
    assert json.loads((tmp_path / "head.json").read_text())["format"] == 1
    expected = head.predict_proba(X)
    assert (load_head(tmp_path).predict_proba(X) == expected).all()
    claimed = (tmp_path / "head.skops.signature").read_text()
    for other in ("", claimed.replace(claimed[0], "g"), "0" * 64):
        (tmp_path / "head.skops.signature").write_text(other)
        with pytest.raises(
            UntrustedHeadError,
            match=r"head\.skops: .*QuadraticDiscriminantAnalysis.*--trust.*remove the run and train it again",
        ):
            load_head(tmp_path)
        assert (load_head(tmp_path, trust=True).predict_proba(X) == expected).all()
    (tmp_path / "head.skops.signature").write_text(claimed)
    data = bytearray((tmp_path / "head.skops").read_bytes())
    at = data.index(b"\x93NUMPY") + 130
    data[at] ^= 1
    (tmp_path / "head.skops").write_bytes(data)
    with pytest.raises(HeadError):
        load_head(tmp_path)


@pytest.mark.slow
def test_a_head_of_an_earlier_release_that_is_of_another_class_is_refused(tmp_path: Path) -> None:
    from sklearn.linear_model import RidgeClassifier

    head, X = fitted("ridge")
    save_as_skops(head, RidgeClassifier().fit(X, np.arange(40) % 3), tmp_path)
    assert load_head(tmp_path).predict_proba(X).shape == (40, 3)
    edit(tmp_path, kind="sklearn.svm.LinearSVC")
    with pytest.raises(
        HeadError, match=r"contains a sklearn\.linear_model\._ridge\.RidgeClassifier, but head\.json says"
    ):
        load_head(tmp_path)
    save_as_skops(head, RidgeClassifier().fit(X, np.arange(40) % 4), tmp_path)
    with pytest.raises(HeadError, match=r"classes_ are 4, but head.json expects 3"):
        load_head(tmp_path, trust=True)


@pytest.mark.slow
def test_the_list_of_trusted_types_is_what_scikit_learn_needs() -> None:
    """Each entry is needed by a classifier, and none of these needs more (skops 0.16)."""
    import skops.io
    from sklearn import calibration, ensemble, linear_model, neighbors, neural_network, tree

    models = [
        tree.DecisionTreeClassifier(),
        ensemble.HistGradientBoostingClassifier(max_iter=2),
        neural_network.MLPClassifier((4,), max_iter=4000),
        neural_network.MLPClassifier((4,), solver="sgd", max_iter=2000),
        calibration.CalibratedClassifierCV(linear_model.LogisticRegression()),
        neighbors.KNeighborsClassifier(algorithm="ball_tree"),
        neighbors.KNeighborsClassifier(algorithm="kd_tree"),
        ensemble.VotingClassifier([("tree", tree.DecisionTreeClassifier())]),
    ]
    X, y = blobs(60, 3, 3, distance=20)
    needed = {name for model in models for name in skops.io.get_untrusted_types(data=skops.io.dumps(model.fit(X, y)))}
    assert needed == set(TRUSTED_TYPES)


# -------------------------------------------------------------------------------------------------- Keras
def logits_to_probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    logits = np.asarray(logits, np.float64) / temperature
    return softmax(np.hstack([np.zeros_like(logits), logits]) if logits.shape[1] == 1 else logits)


@pytest.mark.slow
def test_dropout_linear_on_1280_features_has_1281_parameters() -> None:
    X, y = blobs(40, 1280, 2)
    head = make_head("dropout-linear", epochs=1)
    head.fit(X, y)
    assert head.parameter_count == 1281
    assert sum(int(np.prod(v.shape)) for v in head.network.trainable_variables) == 1281
    assert head.network.count_params() == 1281
    assert head.network.output_shape == (None, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KERAS, "logistic", "ridge", "linear-svm"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("pool", ["avg", "max", "flatten"])
def test_network_and_predict_proba_agree_on_spatial_features(
    name: str, classes: int, pool: str, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    y = np.sort(np.arange(45) % classes).astype(np.int32)
    X = (generator.normal(size=(45, 4, 3, 5)) + y[:, None, None, None]).astype(np.float16)
    head = make_head(name, pool=pool, **({"epochs": 3, "learning_rate": 0.1} if name in KERAS else {}))
    head.fit(X, y, X_validation=X, y_validation=y)
    expected = head.predict_proba(X)
    assert head.network.input_shape == (None, 4, 3, 5)
    assert expected.std() > 0.05
    received = logits_to_probabilities(head.network.predict(X.astype(np.float32), verbose=0), head.temperature)
    assert received == pytest.approx(expected, abs=1e-5)
    head.save(tmp_path)
    assert load_head(tmp_path).predict_proba(X) == pytest.approx(expected, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("pca", [None, 3])
def test_a_linear_head_becomes_an_equal_keras_head(name: str, classes: int, pca: int | None, tmp_path: Path) -> None:
    head, X = shared(name, classes=classes, pca=pca)
    assert isinstance(head, SklearnHead)
    dense = head.as_dense()
    kernel, bias = dense.weights
    assert (kernel.shape, bias.shape) == ((6, dense._outputs), (dense._outputs,))
    assert dense.predict_proba(X) == pytest.approx(head.predict_proba(X), abs=1e-5)
    received = logits_to_probabilities(dense.network.predict(X, verbose=0), head.temperature)
    assert received == pytest.approx(head.predict_proba(X), abs=1e-5)
    dense.save(tmp_path)
    loaded = load_head(tmp_path)
    assert isinstance(loaded, KerasHead)
    assert loaded.temperature == head.temperature
    assert loaded.predict_proba(X) == pytest.approx(head.predict_proba(X), abs=1e-6)
    with pytest.raises(HeadError, match="has no equivalent network"):
        _ = shared("knn", classes=3)[0].network


@pytest.mark.slow
@pytest.mark.parametrize("name", KERAS)
def test_a_saved_keras_head_comes_back(name: str, tmp_path: Path) -> None:
    head, X = fitted(name, epochs=4)
    head.save(tmp_path)
    assert listing(tmp_path) == ["head.json", "head.weights.h5"] == sorted(head.files)
    values = json.loads((tmp_path / "head.json").read_text())
    assert list(values) == HEAD_KEYS
    assert values["kind"] == "dense"
    assert values["hidden"] == ([256] if name == "mlp-256" else [])
    again = load_head(tmp_path)
    assert (again.predict_proba(X) == head.predict_proba(X)).all()


@pytest.mark.slow
def test_the_network_can_be_saved_and_loaded_by_keras(tmp_path: Path) -> None:
    import keras

    head, X = fitted("mlp-256", epochs=2)
    head.network.save(tmp_path / "head.keras")
    again = keras.saving.load_model(tmp_path / "head.keras")
    assert again.predict(X, verbose=0) == pytest.approx(head.network.predict(X, verbose=0), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERAS)
@pytest.mark.parametrize("classes", [2, 5])
def test_keras_heads_learn_from_rows_sorted_by_class(name: str, classes: int) -> None:
    X, y = blobs(300, 20, classes, distance=6)
    held_out, labels = blobs(200, 20, classes, distance=6, seed=7)
    head = make_head(name)
    history = head.fit(X, y, X_validation=held_out, y_validation=labels)
    assert list(history) == ["epoch", "loss", "val_loss", "val_accuracy"]
    scores = evaluate(head.predict_proba(held_out), labels, head.classes)
    assert scores["accuracy"] > 0.97
    assert scores["log_loss"] == pytest.approx(min(history["val_loss"]), rel=1e-4)  # the best epoch was kept


@pytest.mark.slow
def test_the_same_seed_gives_the_same_head() -> None:
    first, X = fitted("mlp-256", epochs=3, seed=4)
    assert (first.predict_proba(X) == fitted("mlp-256", epochs=3, seed=4)[0].predict_proba(X)).all()
    assert not (first.predict_proba(X) == fitted("mlp-256", epochs=3, seed=5)[0].predict_proba(X)).all()


@pytest.mark.slow
def test_training_without_validation_runs_all_epochs() -> None:
    X, y = blobs(60, 4, 2)
    head = make_head("dropout-linear", epochs=7)
    history = head.fit(X, y)
    assert history["epoch"] == [1, 2, 3, 4, 5, 6, 7]
    assert list(history) == ["epoch", "loss"]


@pytest.mark.slow
def test_patience_stops_early_and_progress_is_told() -> None:
    X, y = blobs(60, 4, 2, distance=1)
    told: list[tuple[str, int, int]] = []
    head = make_head("dropout-linear", epochs=200, patience=2, learning_rate=0.1)
    history = head.fit(X, y, X_validation=X, y_validation=1 - y, progress=lambda *values: told.append(values))
    assert len(history["epoch"]) < 20
    assert told == [("train-head", epoch, 200) for epoch in range(1, len(told) + 1)]


@pytest.mark.slow
def test_dropout_may_be_given_for_each_layer() -> None:
    X, y = blobs(30, 4, 2)
    head = make_head("dropout-linear", hidden=[8, 8], dropout=[0, 0.5, 0], epochs=1, optimizer="sgd", momentum=0.9)
    head.fit(X, y)
    names = [layer.name for layer in head.network.layers]
    assert names == ["features", "standardize", "hidden_1", "dropout_2", "hidden_2", "logits"]
    with pytest.raises(ConfigurationError, match="received 2 rates, expected 1"):
        make_head("dropout-linear", dropout=[0.1, 0.2]).fit(X, y)


@pytest.mark.slow
def test_diverging_training_is_an_error() -> None:
    X, y = blobs(60, 4, 3)
    with pytest.raises(HeadError, match=r"training diverged in epoch \d+: lower learning_rate"):
        make_head("mlp-256", optimizer="sgd", learning_rate=1e20, epochs=3).fit(X, y)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["logistic", pytest.param("dropout-linear", marks=pytest.mark.slow)])
def test_weights_that_are_not_finite_are_refused(kind: str, tmp_path: Path) -> None:
    head, _ = fitted(kind, **({"epochs": 1} if kind in KERAS else {}))
    if isinstance(head, SklearnHead):
        assert isinstance(head.fitted, Linear)
        head.fitted.coef[0, 0] = np.nan
    else:
        layer = head.network.get_layer("logits")
        layer.set_weights([np.full((6, 3), np.inf), np.zeros(3)])
    head.save(tmp_path)
    with pytest.raises(HeadError, match=r"holds (weights|values) that are not finite"):
        load_head(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_weights_of_another_shape_are_refused_and_both_shapes_named(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, columns in ((small, 6), (large, 9)):
        folder.mkdir()
        fitted("dropout-linear", columns=columns, epochs=1)[0].save(folder)
    (small / "head.weights.h5").write_bytes((large / "head.weights.h5").read_bytes())
    with pytest.raises(HeadError, match=r"(?s)head\.weights\.h5: .*\(6, 3\).*\(9, 3\)"):
        load_head(small)
    (small / "head.weights.h5").write_bytes(b"no weights")
    with pytest.raises(HeadError, match=r"head\.weights\.h5: the weights do not fit head\.json"):
        load_head(small)
