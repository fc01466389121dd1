"""Write scikit-learn classifiers to skops files, and read them with a fixed list of trusted types."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import HeadError

# The only types that a head.skops may contain besides those that skops 0.16 trusts by itself. The list is never
# extended by what a file asks for.
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


def foreign_types(estimator: Any) -> list[str]:
    """Types in a fitted estimator that `load_estimator` would refuse."""
    import skops.io

    return sorted(set(skops.io.get_untrusted_types(data=skops.io.dumps(estimator))) - set(TRUSTED_TYPES))


def save_estimator(estimator: Any, path: Path) -> None:
    """Write a fitted estimator to a skops file."""
    import skops.io

    skops.io.dump(estimator, path)


def load_estimator(path: Path) -> Any:
    """Read an estimator from a skops file, which is untrusted input.

    Raises
    ------
    HeadError
        If the file contains a type that is not trusted, or is not a valid skops file.
    """
    import skops.io
    from skops.io.exceptions import UntrustedTypesFoundException

    try:
        foreign = sorted(set(skops.io.get_untrusted_types(file=path)) - set(TRUSTED_TYPES))
        if foreign:
            raise HeadError(f"{path}: contains types that must not be loaded from a file: {', '.join(foreign)}")
        estimator = skops.io.load(path, trusted=list(TRUSTED_TYPES))
        check_structures(estimator, path)
        return estimator
    except (zipfile.BadZipFile, UntrustedTypesFoundException, OSError) as problem:
        raise HeadError(f"{path}: cannot be loaded as a head: {problem}; train the head again") from problem
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, IndexError, RecursionError) as problem:
        if isinstance(problem, HeadError):
            raise
        raise HeadError(f"{path}: cannot be loaded as a head: {problem!r}; train the head again") from problem


def check_structures(estimator: Any, path: Path) -> None:
    """Refuse estimators whose indices are out of bounds: scikit-learn follows them in C without a check.

    Decision trees are checked node by node, the counts of support vectors must agree, and neighbour trees are rebuilt
    from their rows.

    Raises
    ------
    HeadError
        If an index or a count is wrong; the message names the file.
    """
    for item in _parts(estimator, set()):
        kind = type(item).__name__
        if kind == "Tree":
            state = item.__getstate__()
            nodes, width, values = state["nodes"], item.n_features, state["values"]
            leaf = (nodes["left_child"] == -1) & (nodes["right_child"] == -1)
            good = len(nodes) == state["node_count"] == len(values)
            good &= _leads_on(nodes, "left_child", "right_child", "feature", leaf, width)
        elif kind == "TreePredictor":
            nodes, width = item.nodes, getattr(estimator, "n_features_in_", 0)
            good = _leads_on(nodes, "left", "right", "feature_idx", nodes["is_leaf"].astype(bool), width)
            categorical = nodes["is_categorical"].astype(bool)
            sets = min(len(item.raw_left_cat_bitsets), len(item.binned_left_cat_bitsets))
            good &= bool((nodes["bitset_idx"][categorical] < sets).all())
        elif kind in ("SVC", "NuSVC"):
            count, pairs = len(item.support_vectors_), len(item.classes_) * (len(item.classes_) - 1) // 2
            good = item._n_support.sum() == count and (item._n_support >= 0).all()
            good &= item._dual_coef_.shape == (len(item.classes_) - 1, count) and item._intercept_.shape == (pairs,)
            good &= item.support_vectors_.shape == (count, item.n_features_in_)
            good &= len(item._n_support) == len(item.classes_)
        elif getattr(item, "_tree", None) is not None:
            rows = np.asarray(item._fit_X, np.float64)
            good = rows.ndim == 2 and bool(np.isfinite(rows).all())
            if good:
                more = item.effective_metric_params_ or {}
                item._tree = type(item._tree)(rows, item.leaf_size, metric=item.effective_metric_, **more)
        else:
            continue
        if not good:
            raise HeadError(f"{path}: its {kind} has indices out of bounds; the file was edited or damaged")


def _leads_on(nodes: Any, left: str, right: str, feature: str, leaf: np.ndarray, width: int) -> bool:
    """Whether every inner node leads to later nodes and tests an existing column."""
    inner = np.flatnonzero(~leaf)
    sides = [nodes[name][inner].astype(np.int64) for name in (left, right)]
    columns = nodes[feature][inner].astype(np.int64)
    on = all(((side > inner) & (side < len(nodes))).all() for side in sides)
    return bool(len(nodes) and on and ((columns >= 0) & (columns < width)).all())


def _parts(item: Any, seen: set[int]) -> Iterator[Any]:
    """Yield an estimator and all scikit-learn objects inside it."""
    if id(item) in seen or isinstance(item, str | bytes | int | float | type(None)):
        return
    seen.add(id(item))
    if isinstance(item, list | tuple):
        inner: list[Any] = list(item)
    elif isinstance(item, dict):
        inner = list(item.values())
    elif isinstance(item, np.ndarray):
        inner = item.ravel().tolist() if item.dtype == object else []
    elif type(item).__module__.startswith("sklearn."):
        yield item
        inner = list(getattr(item, "__dict__", {}).values())
    else:
        inner = []
    for part in inner:
        yield from _parts(part, seen)
