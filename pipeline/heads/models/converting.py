"""Turn a fitted scikit-learn classifier, in memory or described by a file, into a model of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.heads.models.ensembles import Averaged, Calibrated, Voting
from pipeline.heads.models.linear import ACTIVATIONS, Gaussian, Layers, Linear, Projected, SupportVectors
from pipeline.heads.models.model import DamagedModelError, Model
from pipeline.heads.models.neighbours import METRICS, Neighbours
from pipeline.heads.models.parts import NotPlainError, Part, live
from pipeline.heads.models.trees import Boosting, Forest

_METRICS = {**{name: name for name in METRICS}, "l1": "manhattan", "cityblock": "manhattan", "l2": "euclidean"}
# Linear classes whose probabilities, where they have any, are the softmax of their outputs.
_LOG_ODDS = ("LogisticRegression", "LogisticRegressionCV", "LinearDiscriminantAnalysis")
_MARGINS = (
    "LinearSVC",
    "RidgeClassifier",
    "RidgeClassifierCV",
    "Perceptron",
    "PassiveAggressiveClassifier",
    "SGDClassifier",
)
# Classes whose probabilities as a member of an ensemble are those of our model.
_MEMBERS = (
    *(*_LOG_ODDS, "KNeighborsClassifier", "DecisionTreeClassifier", "ExtraTreeClassifier", "RandomForestClassifier"),
    *(
        "ExtraTreesClassifier",
        "GradientBoostingClassifier",
        "HistGradientBoostingClassifier",
        "GaussianNB",
        "MLPClassifier",
    ),
    *("BaggingClassifier", "CalibratedClassifierCV", "AdaBoostClassifier"),
)
# Classes whose decision function, or probabilities if they have none, are the outputs of our model.
_CALIBRATED = (
    *(
        *_LOG_ODDS,
        *_MARGINS,
        "SVC",
        "NuSVC",
        "KNeighborsClassifier",
        "DecisionTreeClassifier",
        "RandomForestClassifier",
    ),
    *("ExtraTreesClassifier", "HistGradientBoostingClassifier"),
)


def model_of(estimator: Any, columns: int) -> Model:
    """Turn a fitted classifier, or a pipeline of principal components and a classifier, into a model of arrays.

    Raises
    ------
    NotPlainError
        If arrays cannot describe it; the message says why.
    """
    part = live(estimator)
    if not isinstance(part, Part):
        raise NotPlainError(f"{type(estimator).__name__} is not a class of scikit-learn")
    try:
        model = model_of_part(part)
        model.check(columns, class_count(part))
    except DamagedModelError as problem:
        raise NotPlainError(str(problem)) from problem
    return model


def classifier_of(part: Part) -> Part:
    """The classifier in a pipeline of the steps pca and classifier; anything else as it is.

    Raises
    ------
    DamagedModelError
        If the pipeline has other steps.
    """
    return _steps(part)[1] if part.short == "Pipeline" else part


def class_count(part: Part) -> int:
    """Number of classes of a classifier, which are numbered from 0."""
    part = classifier_of(part)
    if not part.has("classes_") and part.has("_label_binarizer"):
        part = part.part("_label_binarizer")  # ridge before scikit-learn 1.7
    classes = part.array("classes_", "iu")
    if not np.array_equal(classes, np.arange(classes.size)):
        raise NotPlainError(f"its classes_ are {str(classes.tolist()[:20])[:80]}, expected 0, 1, 2, ...")
    return int(classes.size)


def model_of_part(part: Part) -> Model:
    """Turn a described classifier into a model of arrays, which is not checked yet.

    Raises
    ------
    NotPlainError, DamagedModelError
        If arrays cannot describe it, or if it is impossible.
    """
    if part.short == "Pipeline":
        pca, classifier = _steps(part)
        if pca.short != "PCA" or pca["whiten"] is not False:
            raise DamagedModelError("its pca step is not a PCA without whitening")
        return Projected(pca.array("components_"), pca.array("mean_"), model_of_part(classifier))
    if part.short not in CONVERTERS:
        raise NotPlainError(f"{part.name} is not one of the classes that are stored as arrays")
    return CONVERTERS[part.short](part)


def _steps(part: Part) -> tuple[Part, Part]:
    steps = part["steps"]
    good = isinstance(steps, list) and all(isinstance(step, list) and len(step) == 2 for step in steps)
    if not good or [step[0] for step in steps] != ["pca", "classifier"] or not isinstance(steps[1][1], Part):
        raise DamagedModelError("it contains a pipeline, expected one of the steps pca and classifier")
    if not isinstance(steps[0][1], Part):
        raise DamagedModelError("its pca step is not a PCA without whitening")
    return steps[0][1], steps[1][1]


def _linear(part: Part) -> Model:
    coef = np.atleast_2d(part.array("coef_"))
    intercept = part.array("intercept_").reshape(-1)
    if len(intercept) not in (1, len(coef)):
        raise DamagedModelError(f"intercept_ has {len(intercept)} values, coef_ {len(coef)} rows")
    return Linear(coef, np.broadcast_to(intercept, (len(coef),)).copy())


def _separate(part: Part) -> bool:
    """Whether a logistic regression was fitted for each class against the rest, as scikit-learn before 1.8 could."""
    return (part.has("solver") and part["solver"] == "liblinear") or (
        part.has("multi_class") and part["multi_class"] == "ovr"
    )


def _searched_regression(part: Part) -> Model:
    model = _linear(part)
    count = class_count(part)
    if count > 2 and _separate(part):
        return Calibrated(model, np.full(count, -1.0), np.zeros(count))  # normalised logistic functions
    return model


def _neighbours(part: Part) -> Model:
    metric = _METRICS.get(part.text("effective_metric_"))
    weights = part["weights"]
    more = part["effective_metric_params_"]
    given = {key for key, value in more.items() if value is not None} if isinstance(more, dict) else {"?"}
    p = more.get("p", 2.0) if given <= {"p"} else None
    if metric is None or weights not in (None, "uniform", "distance") or not isinstance(p, int | float):
        raise NotPlainError(f"metric {part['metric']!r} with weights {weights!r} is not stored as arrays")
    by_radius = part.short == "RadiusNeighborsClassifier"
    return Neighbours(
        rows=part.array("_fit_X"),
        labels=part.array("_y", "iu"),
        classes=class_count(part),
        metric=metric,
        p=float(p),
        by_distance=weights == "distance",
        count=None if by_radius else int(part.number("n_neighbors")),
        radius=part.number("radius") if by_radius else None,
        outlier=_outlier(part) if by_radius else -1,
    )


def _outlier(part: Part) -> int:
    """The class of rows without a neighbour, -1 if there is none."""
    label = part["outlier_label_"]
    if isinstance(label, list) and len(label) == 1:
        label = label[0]
    if label is None:
        return -1
    if isinstance(label, np.ndarray) and label.size == 1 and label.dtype.kind in "iu":
        label = int(label.reshape(())[()])
    if type(label) is not int or not 0 <= label < class_count(part):
        raise NotPlainError("outlier_label is not one of the classes")
    return label


def _flat(trees: Sequence[dict[str, np.ndarray]], **more: Any) -> dict[str, Any]:
    """Put the nodes of trees one after the other; children get the numbers that they then have."""
    sizes = [len(tree["left"]) for tree in trees]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    if not trees or starts[-1] >= 1 << 31 or not min(sizes):
        raise DamagedModelError("it has no trees, or too many nodes")
    for tree, size in zip(trees, sizes, strict=True):
        if any(len(values) != size for values in tree.values()):
            raise DamagedModelError("a tree's nodes are not as many as its values")
    found = {name: np.concatenate([tree[name] for tree in trees]) for name in trees[0]}
    shift = np.repeat(starts[:-1], sizes)
    most = np.repeat(sizes, sizes)
    for name in ("left", "right"):
        children = found[name].astype(np.int64)
        if ((children < -1) | (children >= most)).any():
            raise DamagedModelError("a tree has indices out of bounds")
        found[name] = np.where(children < 0, -1, children + shift).astype(np.int32)
    columns = found["feature"]
    inner = found["left"] >= 0
    if ((columns[inner] < 0) | (columns[inner] >= 1 << 31)).any():
        raise DamagedModelError("a tree has indices out of bounds")
    found["feature"] = np.where(inner, columns, 0).astype(np.int32)
    return {**found, "starts": starts[:-1].astype(np.int32), **more}


def _fields(nodes: np.ndarray, **names: str) -> dict[str, np.ndarray]:
    if nodes.ndim != 1 or not set(names.values()) <= set(nodes.dtype.names or ()):
        raise DamagedModelError("the nodes of a tree lack a field")
    found = {ours: nodes[theirs] for ours, theirs in names.items()}
    if any(values.ndim != 1 or values.dtype.kind not in "fiub" for values in found.values()):
        raise DamagedModelError("the nodes of a tree are not numbers")
    return found


def _tree(part: Part) -> dict[str, np.ndarray]:
    """The nodes of a decision tree of scikit-learn; ``values`` is (nodes, outputs x classes)."""
    tree = part.part("tree_")
    found = _fields(
        tree.array("nodes", "V"),
        left="left_child",
        right="right_child",
        feature="feature",
        threshold="threshold",
        missing="missing_go_to_left",
    )
    values = tree.array("values")
    if values.ndim != 3 or values.shape[1] != 1:
        raise DamagedModelError(f"the values of a tree have shape {values.shape}")
    return {**found, "values": values[:, 0].astype(np.float64)}


def _forest(part: Part) -> Model:
    trees = [_tree(tree) for tree in (part.parts("estimators_") if part.has("estimators_") else [part])]
    if len({tree["values"].shape[1] for tree in trees}) > 1:
        raise DamagedModelError("its trees have different classes")
    return Forest(**_flat(trees, float32=True))


def _gradient_boosting(part: Part) -> Model:
    classes, loss = class_count(part), part.text("loss")
    if loss not in ("log_loss", "exponential"):
        raise NotPlainError(f"loss {loss!r} is not stored as arrays")
    twice = 2.0 if loss == "exponential" else 1.0  # its probabilities are those of the doubled sum
    trees = [_tree(tree) for tree in part.parts("estimators_")]
    return Boosting(
        **_flat(trees, float32=True), base=_prior(part, classes), scale=twice * part.number("learning_rate")
    )


def _prior(part: Part, classes: int) -> np.ndarray:
    """Log odds that boosting starts from: zero, or the shares of the classes."""
    if part["init_"] == "zero":
        return np.zeros(1 if classes == 2 else classes)
    start = part.part("init_")
    if start.short != "DummyClassifier" or start["strategy"] != "prior":
        raise NotPlainError(f"boosting that starts from {start.name} is not stored as arrays")
    shares = start.array("class_prior_").reshape(-1)
    if len(shares) != classes or not (shares > 0).all():
        raise DamagedModelError("the shares of the classes are impossible")
    if classes == 2:
        return np.array([np.log(shares[1] / (1 - shares[1]))])
    return np.asarray(np.log(shares) - np.log(shares).mean(), np.float64)


def _histogram_boosting(part: Part) -> Model:
    trees = []
    for predictor in part.parts("_predictors"):
        nodes = predictor.array("nodes", "V")
        names = {"left": "left", "right": "right", "feature": "feature_idx", "threshold": "num_threshold"}
        found = _fields(
            nodes, **names, missing="missing_go_to_left", values="value", leaf="is_leaf", sets="is_categorical"
        )
        if found.pop("sets").any():
            raise NotPlainError("boosting on categories is not stored as arrays")
        leaf = found.pop("leaf") != 0
        for side in ("left", "right"):
            found[side] = np.where(leaf, -1, found[side].astype(np.int64))
        trees.append({**found, "values": found["values"].astype(np.float64)[:, None]})
    base = part.array("_baseline_prediction").astype(np.float64).reshape(-1)
    return Boosting(**_flat(trees, float32=False), base=base, scale=1.0)


def _support_vectors(part: Part) -> Model:
    if part["probability"] is True or part["_sparse"] is True or part["decision_function_shape"] != "ovr":
        raise NotPlainError(
            "an SVC with probability=True, or one margin for each pair of classes, is not stored as arrays"
        )
    kernel = part["kernel"]
    if kernel not in ("linear", "poly", "rbf", "sigmoid"):
        raise NotPlainError(f"an SVC with kernel {str(kernel)[:40]!r} is not stored as arrays")
    return SupportVectors(
        kernel=kernel,
        gamma=part.number("_gamma"),
        coef0=part.number("coef0"),
        degree=int(part.number("degree")),
        vectors=part.array("support_vectors_").astype(np.float64),
        counts=part.array("_n_support", "iu"),
        dual=part.array("_dual_coef_"),
        intercept=part.array("_intercept_"),
    )


def _layers(part: Part) -> Model:
    activation, last = part.text("activation"), part.text("out_activation_")
    if activation not in ACTIVATIONS or last != ("logistic" if class_count(part) == 2 else "softmax"):
        raise NotPlainError(f"layers with {activation!r} and {last!r} are not stored as arrays")
    return Layers(activation, _arrays(part, "coefs_"), _arrays(part, "intercepts_"))


def _arrays(part: Part, name: str) -> tuple[np.ndarray, ...]:
    found = part[name]
    if not isinstance(found, list) or not all(isinstance(item, np.ndarray) for item in found):
        raise NotPlainError(f"{name} of {part.short} is not a list of arrays")
    return tuple(found)


def _gaussian(part: Part) -> Model:
    return Gaussian(*(part.array(name) for name in ("theta_", "var_", "class_prior_")))


def _members(part: Part, classes: int, allowed: Sequence[str] = _MEMBERS) -> list[Model]:
    """Models of the members of an ensemble, all of which know all classes."""
    members = part.parts("estimators_")
    for member in members:
        if member.short not in allowed or class_count(member) != classes:
            raise NotPlainError(f"a {part.short} of {member.name} is not stored as arrays")
        if member.short.startswith("LogisticRegression") and _separate(member) and classes > 2:
            raise NotPlainError("an ensemble of one-against-rest regressions is not stored as arrays")
    return [model_of_part(member) for member in members]


def _bagging(part: Part) -> Model:
    columns, wide = _arrays(part, "estimators_features_"), int(part.number("n_features_in_"))
    members = _members(part, class_count(part))
    if all(np.array_equal(seen, np.arange(wide)) for seen in columns):
        columns = ()
    return Averaged(tuple(members), np.full(len(members), 1 / max(1, len(members))), columns)


def _boosted_votes(part: Part) -> Model:
    classes = class_count(part)
    members = _members(part, classes)
    return Voting(tuple(members), part.array("estimator_weights_").astype(np.float64)[: len(members)], classes)


def _calibration(part: Part) -> Model:
    members = []
    for fitted in part.parts("calibrated_classifiers_"):
        inner = fitted.part("estimator")
        scales = fitted.parts("calibrators")
        sigmoid = fitted["method"] == "sigmoid" and all(scale.short == "_SigmoidCalibration" for scale in scales)
        if not sigmoid or inner.short not in _CALIBRATED or class_count(inner) != class_count(part):
            raise NotPlainError(
                f"a calibration of {inner.name} by {str(fitted['method'])[:40]} is not stored as arrays"
            )
        slopes, offsets = (np.array([scale.number(name) for scale in scales]) for name in ("a_", "b_"))
        model = _linear(inner) if inner.short in _LOG_ODDS else model_of_part(inner)  # it takes the decisions
        members.append(Calibrated(model, slopes, offsets))
    return Averaged(tuple(members), np.full(len(members), 1 / max(1, len(members))), ())


CONVERTERS: dict[str, Callable[[Part], Model]] = {
    **dict.fromkeys((*_LOG_ODDS, *_MARGINS), _linear),
    "LogisticRegressionCV": _searched_regression,
    **dict.fromkeys(("KNeighborsClassifier", "RadiusNeighborsClassifier"), _neighbours),
    **dict.fromkeys(("DecisionTreeClassifier", "ExtraTreeClassifier"), _forest),
    **dict.fromkeys(("RandomForestClassifier", "ExtraTreesClassifier"), _forest),
    "GradientBoostingClassifier": _gradient_boosting,
    "HistGradientBoostingClassifier": _histogram_boosting,
    **dict.fromkeys(("SVC", "NuSVC"), _support_vectors),
    "MLPClassifier": _layers,
    "GaussianNB": _gaussian,
    "BaggingClassifier": _bagging,
    "AdaBoostClassifier": _boosted_votes,
    "CalibratedClassifierCV": _calibration,
}
