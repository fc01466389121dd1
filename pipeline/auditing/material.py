"""What the checks of one audit share; each is computed once, when a check first asks for it.

store --pool--> vectors --> out-of-fold probabilities, joint of labels and classes; nearest neighbours
image files --decode small--> brightness, spread, sharpness
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from features.progress import Progress
from features.sources.splits import SPLITS
from pipeline.auditing import confident
from pipeline.auditing.held_out import HeldOut, held_out
from pipeline.auditing.pixels import Pixels, measure
from pipeline.heads.pooling import choose_pool
from pipeline.heads.prepared import group_codes
from pipeline.heads.streaming import FeatureStream
from pipeline.search.neighbours import Neighbours, nearest_of_all
from pipeline.search.vectors import Vectors

if TYPE_CHECKING:
    from features.store.reader import FeatureStore

TEST = SPLITS.index("test")
TRAIN = SPLITS.index("train")
NEIGHBOURS = 10  # of each row
# Called with a path and the sha256 of an image; returns its bytes, or None if there is no such image.
Read = Callable[[str, bytes], bytes | None]


class Material:
    """The rows of a store, and what checks ask about them.

    Parameters
    ----------
    store : FeatureStore
        The store; its labels are those that are audited.
    name : str
        Feature set. View 0 is used; spatial features are averaged.
    include_test : bool
        Whether rows of the test split are judged too.
    exact : bool
        Whether neighbours are searched without projection.
    seed : int
        Random seed of folds and samples.
    read : callable, optional
        Reads image files; see `Read`. Without it, checks of pixels are left out.
    """

    def __init__(
        self,
        store: FeatureStore,
        name: str,
        *,
        include_test: bool = False,
        exact: bool = False,
        seed: int = 0,
        read: Read | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        self.store, self.name, self.include_test, self.exact = store, name, include_test, exact
        self.seed, self.read, self.progress = seed, read, progress
        self.table, self.classes = store.images, store.classes
        self.labels, self.splits = self.table.labels, self.table.splits
        self._pool = choose_pool(None, "avg", store.shape(name)[2:])

    def __len__(self) -> int:
        return len(self.store)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Rows that are judged, int64, ascending: all but those of the test split, unless they are included."""
        return np.arange(len(self)) if self.include_test else np.flatnonzero(self.splits != TEST)

    @functools.cached_property
    def labelled(self) -> np.ndarray:
        """Rows that are judged and have a label, int64, ascending."""
        return np.asarray(self.rows[self.labels[self.rows] >= 0])

    @functools.cached_property
    def train(self) -> np.ndarray:
        """Training rows with a label, int64, ascending."""
        return np.flatnonzero((self.splits == TRAIN) & (self.labels >= 0))

    @functools.cached_property
    def copies(self) -> np.ndarray:
        """Number of the content of each row, int64, (n,): rows with the same bytes have the same number."""
        keys = np.ascontiguousarray(self.table.sha256).view("V32").ravel()
        return np.asarray(np.unique(keys, return_inverse=True)[1], np.int64)

    def vectors(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the pooled vectors of rows, which ascend, in order: float32 (k, d)."""
        stream = FeatureStream(self.store, self.name, rows, self.labels[rows], 0, self._pool)
        return (values for _, values in stream.pieces())

    @functools.cached_property
    def held_out(self) -> HeldOut | None:
        """Probabilities of the logistic head for rows that it has not seen; None if there is nothing to learn from."""
        if len(np.unique(self.labels[self.train])) < 2:
            return None
        groups = None
        if self.table.groups is not None:
            groups = group_codes([self.table.groups[row] for row in self.train.tolist()])
        return held_out(
            self.vectors,
            self.train,
            self.labels[self.train],
            np.setdiff1d(self.labelled, self.train),
            len(self.classes),
            groups=groups,
            copies=self.copies[self.train],
            seed=self.seed,
            progress=self.progress,
        )

    @functools.cached_property
    def probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows that a head which had not seen them has judged, int64 (m,), and its probabilities, float32 (m, c)."""
        found = self.held_out
        if found is None:
            return np.zeros(0, np.int64), np.zeros((0, len(self.classes)), np.float32)
        rows = np.concatenate([self.train, np.setdiff1d(self.labelled, self.train)])
        values = np.concatenate([found.probabilities, found.of_others])
        known = ~np.isnan(values[:, 0])
        order = np.argsort(rows[known])
        return rows[known][order], values[known][order]

    @functools.cached_property
    def likely(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows that such a head has judged, int64 (m,), and P(class | pixels, label), float64 (m, c)."""
        rows, values = self.probabilities
        chosen, labels = np.isin(rows, self.train), self.labels[rows]
        if not chosen.any():
            return rows[:0], np.zeros((0, len(self.classes)))
        return rows, confident.learn(values[chosen], labels[chosen]).of_class(values, labels)

    @functools.cached_property
    def near(self) -> Neighbours:
        """The ten nearest neighbours of each of ``rows`` among these."""
        vectors = Vectors(self.store, self.name)
        return nearest_of_all(
            vectors, NEIGHBOURS, rows=self.rows, exact=self.exact, seed=self.seed, progress=self.progress
        )

    @functools.cached_property
    def pixels(self) -> Pixels:
        """Measures of the image files of all rows; NaN for those that are not judged, or cannot be read."""
        assert self.read is not None
        wanted = [(self.table.paths[row], self.table.sha256[row].tobytes()) for row in self.rows.tolist()]
        found = dataclasses.astuple(measure(wanted, self.read, self.progress))
        columns = []
        for values in found:
            columns.append(np.full(len(self), np.nan))
            columns[-1][self.rows] = values
        return Pixels(*columns)
