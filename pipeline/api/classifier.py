"""A classifier of images for scikit-learn: a frozen network, whose features are kept, and any head.

    paths, y --FeatureExtractor, each image once--> float32 (n, d) --Head--> classes, probabilities

Only who uses it imports scikit-learn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from features.errors import ConfigurationError
from features.transformer import FeatureExtractor, items_of

HEAD = "head__"  # prefix of the head's parameters in ``set_params`` and grids


class BottleneckClassifier(ClassifierMixin, BaseEstimator):
    """Classify images by the features of a frozen network, for ``cross_val_score`` and ``GridSearchCV``.

    Parameters
    ----------
    backbone : str or FeatureExtractor
        Name of a network; or an extractor with all that it takes (layer, image size, precision, ...).
    head : str
        Name of a head (pipeline/README.md), or a class such as ``sklearn.svm.LinearSVC``.
    params : dict, optional
        Parameters of the head. ``head__C`` in ``set_params`` and in a grid is the parameter ``C``.
    store : path, optional
        Where features are kept, so that folds, candidates and other processes compute none again: a folder, or a file
        ``.h5``. None keeps nothing. An extractor has its own.
    weights : str
        ``"imagenet"``, ``"random"`` or a file. An extractor has its own.
    seed : int
        Random seed of the head.

    Attributes
    ----------
    classes_ : (c,)
        Classes, sorted.
    head_ : pipeline.heads.head.Head
        The trained head.
    extractor_ : FeatureExtractor
        What computes the features.

    Examples
    --------
    >>> from pathlib import Path
    >>> from sklearn.model_selection import GridSearchCV
    >>> from features import FeatureExtractor
    >>> from pipeline import BottleneckClassifier
    >>> paths = sorted(Path("photos").glob("*/*.png"))
    >>> y = [path.parent.name for path in paths]
    >>> extractor = FeatureExtractor("network.keras", store="features-cache")
    >>> search = GridSearchCV(BottleneckClassifier(extractor, "logistic"), {"head__C": [0.01, 1.0]}, cv=2).fit(paths, y)
    >>> search.predict_proba(paths[:3]).shape, search.classes_.tolist()
    ((3, 2), ['cat', 'dog'])
    """

    def __init__(
        self,
        backbone: str | FeatureExtractor = "mobilenetv2",
        head: str = "logistic",
        *,
        params: Mapping[str, Any] | None = None,
        store: str | os.PathLike[str] | None = "features-cache",
        weights: str = "imagenet",
        seed: int = 0,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.params = params
        self.store = store
        self.weights = weights
        self.seed = seed

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters; with ``deep`` those of the head too, as ``head__NAME``."""
        own: dict[str, Any] = super().get_params(deep=deep)
        return own | {f"{HEAD}{name}": value for name, value in (self.params or {}).items()} if deep else own

    def set_params(self, **params: Any) -> Self:
        """Set parameters; ``head__NAME`` is one of the head."""
        ours = {name.removeprefix(HEAD): params.pop(name) for name in list(params) if name.startswith(HEAD)}
        super().set_params(**params)
        if ours:
            self.params = {**(self.params or {}), **ours}
        return self

    def fit(self, X: Any, y: Any) -> Self:
        """Compute the features that are not kept yet, and train the head.

        Parameters
        ----------
        X : sequence of paths, (n,), or uint8, (n, h, w, 3), 0-255
            Image files or pixels.
        y : (n,)
            Class of each.

        Raises
        ------
        ConfigurationError
            If a name or value cannot be used, or ``y`` is not one class for each image.
        HeadError
            If the head cannot be trained on these images.
        UnreadableImageError
            Names the images that cannot be read.
        """
        from pipeline.heads.kinds import make_head

        labels, count = np.asarray(y), len(items_of(X))
        if labels.shape != (count,):
            raise ConfigurationError(f"y: received shape {labels.shape}, expected one class for each of {count} images")
        classes, numbers = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ConfigurationError(f"y: received {len(classes)} class, expected two or more")
        head = make_head(self.head, seed=self.seed, classes=[str(name) for name in classes], **dict(self.params or {}))
        given = self.backbone
        extractor = (
            given
            if isinstance(given, FeatureExtractor)
            else FeatureExtractor(given, weights=self.weights, store=self.store)
        )
        head.fit(extractor.fit_transform(X), numbers.astype(np.int32))
        self.classes_, self.head_, self.extractor_ = classes, head, extractor
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, float64 (n, c), in the order of ``classes_``."""
        check_is_fitted(self)
        return np.asarray(self.head_.predict_proba(self.extractor_.transform(X)))

    def predict(self, X: Any) -> np.ndarray:
        """Return the likeliest class of each image, (n,)."""
        likeliest = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[likeliest])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.no_validation = True
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        return tags
