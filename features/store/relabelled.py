"""A store under other labels and splits. Its features are those of the file, which is not touched.

store, classes, labels, splits --> RelabelledStore: images, classes, rows() and data_digest are the new ones
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from features.errors import ConfigurationError
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from features.targets import Target


class RelabelledStore(FeatureStore):
    """A store whose rows have other labels and splits; everything else is that of ``store``.

    Parameters
    ----------
    store : FeatureStore
        The store.
    classes : sequence of str
        Class names, sorted.
    labels : int32, (n,)
        Index into ``classes``, -1 for unlabelled.
    splits : int8, (n,)
        Index into ``features.sources.splits.SPLITS``.
    labelled_by : mapping
        Where they come from, as plain values.
    target : Target, optional
        What is to be predicted instead of the target of the store, if it has one.

    Raises
    ------
    ConfigurationError
        If there are not as many as the store has rows, or one of them is out of range.
    """

    def __init__(
        self,
        store: FeatureStore,
        classes: Sequence[str],
        labels: np.ndarray,
        splits: np.ndarray,
        labelled_by: Mapping[str, Any],
        target: Target | None = None,
    ) -> None:
        for name, values, most in (("labels", labels, len(classes) - 1), ("splits", splits, len(SPLITS) - 1)):
            low = -1 if name == "labels" else 0
            if values.shape != (len(store),) or (len(values) and not low <= values.min() <= values.max() <= most):
                raise ConfigurationError(
                    f"{store.path}: {name}: received {values.shape}, expected {len(store)} numbers from {low} to {most}"
                )
        table, labels, splits = store.images, labels.astype(np.int32), splits.astype(np.int8)
        images = dataclasses.replace(table, labels=labels, splits=splits, target=target)
        self.__dict__.update({key: value for key, value in vars(store).items() if key != "data_digest"})
        self._store = store  # whose open file this one reads
        self.images, self.classes, self.labelled_by = images, tuple(classes), dict(labelled_by)

    @property
    def original(self) -> FeatureStore:
        """The store under its own labels."""
        return self._store

    def __reduce__(self) -> tuple[Callable[..., FeatureStore], tuple[Any, ...]]:
        table = self.images
        again = functools.partial(RelabelledStore, labelled_by=self.labelled_by, target=table.target)
        return again, (self._store, self.classes, table.labels, table.splits)
