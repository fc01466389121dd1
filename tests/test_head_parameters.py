"""What heads can be told: presets of published recipes, every dense parameter, scikit-learn by import path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import part
from test_heads import blobs

from features.errors import ConfigurationError, HeadError
from pipeline.heads.classifiers import SklearnHead
from pipeline.heads.dense import KerasHead
from pipeline.heads.kinds import load_head, make_head
from pipeline.heads.models.linear import Projected
from pipeline.heads.prepared import prepare
from pipeline.presets import PRESETS
from pipeline.scores.metrics import evaluate

FOREST = "sklearn.ensemble.RandomForestClassifier"
BY_PATH: dict[str, dict[str, Any]] = {
    FOREST: {"n_estimators": 20, "max_depth": 6},
    "sklearn.ensemble.HistGradientBoostingClassifier": {"max_iter": 10},
    "sklearn.neighbors.KNeighborsClassifier": {"algorithm": "kd_tree", "n_neighbors": 3},
    "sklearn.neural_network.MLPClassifier": {"hidden_layer_sizes": [8], "max_iter": 2000},
    "sklearn.calibration.CalibratedClassifierCV": {"estimator": {"sklearn.svm.LinearSVC": {"C": 0.1}}},
    "sklearn.svm.LinearSVC": {"C": 0.1},
    "sklearn.svm.SVC": {"kernel": "rbf"},
    "sklearn.linear_model.LogisticRegression": {"C": 0.5},
}


# ------------------------------------------------------------------------------------------------ presets
def test_presets_are_the_heads_of_the_published_recipes() -> None:
    def said(name: str) -> dict[str, Any]:
        return PRESETS[name].parameters.model_dump()

    assert said("dropout-linear") | {"hidden": (), "dropout": 0.2} == said("dropout-linear")
    assert said("mlp-256") | {"hidden": (256,), "activation": "relu", "dropout": 0.5} == said("mlp-256")
    nesterov = {"hidden": (1024, 128), "optimizer": "sgd", "learning_rate": 1e-3, "nesterov": True}
    assert said("mlp-1024-128") | nesterov == said("mlp-1024-128")
    deep = {"hidden": (1024, 1024), "dropout": (0.0, 0.5, 0.0), "learning_rate": 1e-4, "momentum": 0.9}
    assert said("mlp-1024-1024") | deep | {"optimizer": "sgd"} == said("mlp-1024-1024")
    assert PRESETS["mlp-1024-1024"].pool == PRESETS["mlp-256"].pool == "flatten"
    pooled = {"hidden": (256,), "optimizer": "sgd", "learning_rate": 1e-3, "dropout": 0.0}
    assert said("mlp-256-sgd") | pooled == said("mlp-256-sgd")
    assert PRESETS["mlp-256-sgd"].pool == "avg"
    linear = {"hidden": (), "optimizer": "sgd", "learning_rate": 1e-3, "momentum": 0.9, "weight_decay": 1e-3}
    assert said("linear-sgd") | linear | {"epochs": 20} == said("linear-sgd")


# ------------------------------------------------------------------------------------------ scikit-learn
@pytest.mark.slow
@pytest.mark.parametrize("path", BY_PATH)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifier_by_its_import_path(path: str, classes: int, tmp_path: Path) -> None:
    X, y = blobs(150, 5, classes, distance=6)
    head = make_head(path, classes=[f"class {k}" for k in range(classes)], **BY_PATH[path])
    head.fit(X, y)
    test, labels = blobs(90, 5, classes, distance=6, seed=4)
    probabilities = head.predict_proba(test)
    assert evaluate(probabilities, labels, head.classes)["accuracy"] > 0.9
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(90))
    head.save(tmp_path)
    again = load_head(tmp_path)
    assert (again.kind, again.predict_proba(test).tolist()) == (path, probabilities.tolist())


def test_parameters_by_import_path_are_scikit_learns() -> None:
    from sklearn.ensemble import RandomForestClassifier

    X, y = blobs(90, 6, 3)
    head = make_head(FOREST, scale=False, n_estimators=7, max_features=2, seed=5)
    head.fit(X, y)
    model = RandomForestClassifier(n_estimators=7, max_features=2, random_state=5).fit(X, y)
    assert head.predict_proba(X) == pytest.approx(model.predict_proba(X))
    assert head.parameters.described() == {"folds": 5, "scale": False, "n_estimators": 7, "max_features": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("sklearn.svm.LinearSVM", {}, r"'sklearn.svm.LinearSVM' does not exist; did you mean 'LinearSVC'"),
        ("sklearn.svmm.LinearSVC", {}, "expected sklearn.MODULE.CLASS.*did you mean 'svm'"),
        ("sklearn.linear_model.Ridge", {}, "is not a classifier .*'RidgeClassifier'"),
        ("sklearn.svm._classes.LinearSVC", {}, "expected sklearn.MODULE.CLASS"),
        ("sklearn.utils.os.system", {}, "expected sklearn.MODULE.CLASS"),
        (FOREST, {"n_estimator": 5}, "unknown parameter 'n_estimator'; did you mean 'n_estimators'"),
        (FOREST, {"criterion": "ginny"}, "The 'criterion' parameter of RandomForestClassifier must be"),
        (FOREST, {"folds": 1}, "folds: received 1, expected greater than or equal to 2"),
        (
            "sklearn.gaussian_process.GaussianProcessClassifier",
            {},
            "is refused: once fitted it contains .*not on the list",
        ),
        ("sklearn.ensemble.VotingClassifier", {}, "missing 1 required positional argument: 'estimators'"),
        ("sklearn.svm.LinearSVC", {"C": "much"}, "The 'C' parameter of LinearSVC must be a float"),
        ("sgdd", {}, "did you mean 'sgd'"),
    ],
)
def test_what_cannot_be_had_is_refused_before_fitting(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_head(name, **params)


@pytest.mark.slow
def test_projection_and_no_scaling() -> None:
    X, y = blobs(90, 12, 3)
    head = make_head("logistic", C=0.5, pca=4)
    head.fit(X, y)
    assert isinstance(head, SklearnHead)
    Z = (X - head.mean) / head.std
    assert isinstance(head.fitted, Projected)
    assert head.fitted.components.shape == (4, 12)
    assert head.fitted.parameter_count == 3 * 4 + 3
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    projection = PCA(4).fit(Z)
    model = LogisticRegression(C=0.5, max_iter=1000).fit(projection.transform(Z), y)
    assert head.predict_proba(X) == pytest.approx(model.predict_proba(projection.transform(Z)), abs=1e-4)
    plain = make_head("logistic", C=0.5, scale=False)
    plain.fit(X, y)
    assert (plain.mean == 0).all()
    assert (plain.std == 1).all()
    with pytest.raises(HeadError, match=r"pca: received 13, expected at most 12 for features of shape \(90, 12\)"):
        make_head("logistic", C=0.5, pca=13).fit(X, y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params"), [("logistic", {"C": 1e-3}), ("ridge", {"alpha": 100.0}), ("sgd", {"alpha": 0.1})]
)
def test_class_weights_help_the_rare_class(name: str, params: dict[str, Any]) -> None:
    X, y = blobs(400, 5, 2, distance=2)
    kept = np.concatenate([np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:20]])
    test, labels = blobs(400, 5, 2, distance=2, seed=6)
    recalls = []
    for weight in (None, "balanced"):
        head = make_head(name, class_weight=weight, **params)
        head.fit(X[kept], y[kept])
        recalls.append(evaluate(head.predict_proba(test), labels, head.classes)["balanced_accuracy"])
    assert recalls[1] > recalls[0] + 0.05


@pytest.mark.slow
def test_choosing_by_balanced_accuracy() -> None:
    X, y = blobs(400, 5, 2, distance=2)
    kept = np.concatenate([np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:20]])
    head = make_head("logistic", choose="balanced_accuracy")
    head.fit(X[kept], y[kept])
    plain = make_head("logistic")
    plain.fit(X[kept], y[kept])
    assert isinstance(head, SklearnHead)
    assert isinstance(plain, SklearnHead)
    test, labels = blobs(400, 5, 2, distance=2, seed=6)
    scores = [evaluate(one.predict_proba(test), labels, one.classes)["balanced_accuracy"] for one in (head, plain)]
    assert scores[0] >= scores[1]
    assert head.chosen["C"] >= plain.chosen["C"]


def test_new_parameters_leave_older_run_ids_alone() -> None:
    assert make_head("logistic").parameters.described() == {"C": None, "folds": 5}
    assert make_head("logistic", class_weight="balanced").parameters.described() == {
        "C": None,
        "folds": 5,
        "class_weight": "balanced",
    }
    assert make_head("dense").parameters.described()["order_seed"] == 0


@pytest.mark.slow
def test_groups_reach_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def folds(y: np.ndarray, count: int, seed: int, groups: np.ndarray | None) -> np.ndarray:
        seen.append(groups)
        return np.arange(len(y)) % count

    monkeypatch.setattr("pipeline.heads.classifiers.stratified_folds", folds)
    X, y = blobs(40, 4, 2)
    make_head("logistic").fit(X, y, groups=["a", "b", "", ""] * 10)
    assert len(np.unique(seen[0])) == 22  # rows without a group are groups of their own
    assert (seen[0][::4] == seen[0][0]).all()


# -------------------------------------------------------------------------------------------------- dense
DENSE: list[dict[str, Any]] = [
    {"hidden": [16], "batch_norm": True},
    {"hidden": [16, 8], "dropout": 0.2},
    {"l2": 1e-3, "optimizer": "rmsprop", "momentum": 0.5},
    {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "schedule": "cosine"},
    {"mixup": 0.2, "hidden": [16], "feature_noise": 0.1, "label_smoothing": 0.1},
    {"hidden": [16], "activation": "gelu", "label_smoothing": 0.05, "feature_noise": 0.1, "dropout": 0.3},
]


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize("params", DENSE, ids=lambda params: "-".join(params))
@pytest.mark.parametrize("classes", part([2, 3], 3))
def test_dense_parameters_train_save_and_load(params: dict[str, Any], classes: int, tmp_path: Path) -> None:
    X, y = blobs(300, 12, classes, distance=6)
    test, labels = blobs(200, 12, classes, distance=6, seed=7)
    head = make_head("dense", **{"learning_rate": 0.01, "epochs": 15, **params})
    history = head.fit(X, y, X_validation=test, y_validation=labels)
    assert list(history) == ["epoch", "loss", "val_loss", "val_accuracy"]
    probabilities = head.predict_proba(test)
    scores = evaluate(probabilities, labels, head.classes)
    assert scores["accuracy"] > 0.95
    assert scores["log_loss"] == pytest.approx(
        min(history["val_loss"]), rel=1e-3
    )  # of the best epoch, no penalty in it
    head.save(tmp_path)
    assert load_head(tmp_path).predict_proba(test) == pytest.approx(probabilities, abs=1e-6)
    again = head.fresh()
    again.fit(X, y, X_validation=test, y_validation=labels)
    assert again.predict_proba(test) == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.slow
def test_batch_norm_is_folded_into_the_dense_layer() -> None:
    X, y = blobs(200, 6, 3)
    head = make_head("dense", hidden=[8], batch_norm=True, epochs=5)
    head.fit(X, y)
    assert isinstance(head, KerasHead)
    assert [part.shape for part in head.weights] == [(6, 8), (8,), (8, 3), (3,)]
    names = [layer.name for layer in head.network.layers]
    assert names == ["features", "standardize", "hidden_1", "logits"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])  # the bank; Keras's fit
def test_dense_class_weights_help_the_rare_class(optimizer: str) -> None:
    X, y = blobs(400, 5, 2, distance=2)
    kept = np.concatenate([np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:20]])
    test, labels = blobs(400, 5, 2, distance=2, seed=6)
    recalls = []
    for weight in (None, "balanced"):
        head = make_head("dense", class_weight=weight, learning_rate=0.03, epochs=60, optimizer=optimizer)
        head.fit(X[kept], y[kept])
        recalls.append(evaluate(head.predict_proba(test), labels, head.classes)["balanced_accuracy"])
    assert recalls[1] > recalls[0] + 0.05


@pytest.mark.slow
def test_a_head_alone_is_a_bank_of_one() -> None:
    """`make_head(...).fit` gives the weights that the bank gives."""
    from pipeline.heads.bank import BankHead, BankSpec, train_bank

    X, y = blobs(200, 6, 3)
    head = make_head("dense", dropout=0.3, weight_decay=1e-2, epochs=4, order_seed=3, seed=2)
    head.fit(X, y)
    assert isinstance(head, KerasHead)
    Z = (X - head.mean) / head.std
    (result,) = train_bank(
        BankSpec(3, epochs=4, order_seed=3), [BankHead(weight_decay=1e-2, dropout=0.3, seed=2)], Z.astype(np.float32), y
    )
    for ours, theirs in zip(head.weights, result.weights, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_calibration_lowers_the_log_loss_and_leaves_the_accuracy() -> None:
    X, y = blobs(60, 30, 2, distance=2)
    held_out = blobs(400, 30, 2, distance=2, seed=3)
    scores = []
    for calibrate in (False, True):
        head = make_head("dense", calibrate=calibrate, learning_rate=0.05, patience=0, epochs=60, optimizer="sgd")
        head.fit(X, y, X_validation=held_out[0], y_validation=held_out[1])
        scores.append(evaluate(head.predict_proba(held_out[0]), held_out[1], head.classes))
    assert head.temperature != 1
    assert scores[1]["log_loss"] < scores[0]["log_loss"]
    assert scores[1]["accuracy"] == scores[0]["accuracy"]


# -------------------------------------------------------------------------------------------------- pains
@pytest.mark.slow
@pytest.mark.pain(13)
@pytest.mark.parametrize("name", ["dense", "dropout-linear", "mlp-256", "linear-sgd", "sgd"])
def test_pain_13_rows_sorted_by_class_converge(name: str) -> None:
    """The order of the rows in the store is not the order of training: sorted and shuffled rows end alike."""
    X, y = blobs(600, 20, 6, distance=6)
    assert (np.diff(y) >= 0).all()
    held_out, labels = blobs(300, 20, 6, distance=6, seed=7)
    shuffled = np.random.default_rng(0).permutation(len(y))
    found = []
    for rows in (np.arange(len(y)), shuffled):
        head = make_head(name)
        head.fit(X[rows], y[rows], X_validation=held_out, y_validation=labels)
        found.append(evaluate(head.predict_proba(held_out), labels, head.classes)["accuracy"])
    assert found[0] > 0.95
    assert abs(found[0] - found[1]) < 0.02


@pytest.mark.pain(15)
@pytest.mark.filterwarnings("error")
def test_pain_15_logistic_regression_converges_within_its_limit() -> None:
    """On columns as wild as raw features are: scales from 1e-3 to 1e4, offsets, one that never varies."""
    X, y = blobs(300, 40, 5, distance=3)
    X = X * np.geomspace(1e-3, 1e4, 40, dtype=np.float32) + 100
    X[:, 7] = 3
    for C in (1e-3, 1.0, 1e3):
        head = make_head("logistic", C=C)
        head.fit(X, y)
        assert isinstance(head, SklearnHead)
        assert head.arguments["max_iter"] == 1000  # reaching it is a warning, which is an error here


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "linear-sgd"])  # trained by the bank, and by Keras
def test_rows_held_back_from_training_decide_when_it_stops(name: str) -> None:
    """Then nothing of the validation rows, labels turned round here, reaches the head; by default they decide."""
    X, y = blobs(200, 6, 2, distance=2)
    held_out, labels = blobs(100, 6, 2, distance=2, seed=7)
    found = {}
    for stop_on in ("train", "validation"):
        for turned in (False, True):
            head = make_head(name, stop_on=stop_on, epochs=8, learning_rate=0.1, patience=2, calibrate=True)
            head.fit(X, y, X_validation=held_out, y_validation=1 - labels if turned else labels)
            found[stop_on, turned] = head.predict_proba(held_out)
    assert (found["train", False] == found["train", True]).all()
    assert not np.allclose(found["validation", False], found["validation", True])
    alone = make_head(name, stop_on="train", epochs=8, learning_rate=0.1, patience=2, calibrate=True)
    alone.fit(X, y)  # there need be no validation rows
    assert (alone.predict_proba(held_out) == found["train", False]).all()
    with pytest.raises(HeadError, match="stop_on=train: no class has two training rows"):
        make_head(name, stop_on="train").fit(X[[0, -1]], y[[0, -1]])


def test_the_rows_held_back_are_a_tenth_and_of_no_group_that_is_trained_on() -> None:
    X, y = blobs(200, 3, 2)
    animals = [f"animal {row // 4}" for row in range(len(y))]
    head = make_head("dense", stop_on="train")
    assert isinstance(head, KerasHead)
    for groups in (None, animals):
        data = prepare(X, y, pool="none", X_validation=X, y_validation=y, groups=groups)
        inner = head.stopping(data)
        assert inner.held_out is not None
        assert (len(inner.train), len(inner.held_out)) == (180, 20)
        trained, held = (np.concatenate([Z for _, Z in rows.pieces()]) for rows in (inner.train, inner.held_out))
        where = {row.tobytes(): number for number, (_, Z) in enumerate(data.train.pieces(1)) for row in Z}
        sides = [{animals[where[row.tobytes()]] for row in rows} for rows in (trained, held)]
        assert bool(sides[0] & sides[1]) == (groups is None)
        assert groups or np.bincount(inner.held_out.labels).tolist() == [10, 10]


def test_a_parameter_added_later_moves_no_run_id() -> None:
    described = make_head("dense").parameters.described()
    assert make_head("dense", stop_on="validation").parameters.described() == described
    assert make_head("dense", stop_on="train").parameters.described() == described | {"stop_on": "train"}
