"""Rows of a store for the heads that are to be trained on them.

store --they fit into memory--> read once, `Prepared` in memory or in files
      --they do not-----------> `FeatureStream`: left in the store, for heads that take pieces; the others are refused
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, HeadError, nearest
from pipeline.heads.costs import shown
from pipeline.heads.head import Head
from pipeline.heads.kinds import make_head
from pipeline.heads.prepared import Prepared, group_codes, prepare_stream
from pipeline.heads.streaming import FeatureStream
from pipeline.presets import PRESETS
from pipeline.scores.selection import stratified_folds


@dataclasses.dataclass(frozen=True)
class Source:
    """Training and validation rows of one data set, as heads of one pooling take them.

    Parameters
    ----------
    store : FeatureStore
    name : str
        Data set.
    pool : str
        Pooling of spatial features.
    views : int
        Views of each training row that are looked at.
    memory : int
        Bytes that training may take.
    """

    store: Any
    name: str
    pool: str
    views: int
    memory: int

    @property
    def need(self) -> int:
        """Bytes to train in memory: the rows, and as much again for what training makes of them."""
        return 2 * self.views * self.stream("train").nbytes

    @property
    def streamed(self) -> bool:
        """Whether the rows stay in the store."""
        return self.need > self.memory

    def stream(self, split: str) -> FeatureStream:
        """The rows of a split, not standardised."""
        rows = self.store.rows(split)
        labels, half = self.store.images.labels[rows], self.memory // 2  # the other half is for what training makes
        return FeatureStream(self.store, self.name, rows, labels, half, self.pool)

    def check(self, head: Head) -> None:
        """Refuse a head that cannot be trained on these rows in so much memory.

        Raises
        ------
        HeadError
            For labels that cannot be trained on; for want of memory, with both figures and the heads that need less.
        """
        rows = self.stream("train")
        head.check_labels(rows.labels, len(rows))
        if self.streamed and not head.streams:
            can = ", ".join(name for name in PRESETS if make_head(name).streams)
            raise HeadError(
                f"head {head.name!r} takes all rows at once: {self.views * len(rows)} x {rows.width} features and what it "
                f"makes of them need {shown(self.need)}, {shown(self.memory)} are allowed. Give more (--memory), "
                f"another pooling, or a head that is trained piece by piece: {can}"
            )

    def prepare(self, *, scale: bool, folder: Path | None = None) -> Prepared:
        """The rows, in memory or in the store; with ``folder`` in files instead of in memory.

        Raises
        ------
        HeadError
            If they do not fit on the disk.
        """
        train, held_out = self.stream("train"), self.stream("validation")
        groups = train_groups(self.store)
        if not self.streamed:
            if folder is not None:
                _check_disk(folder, self.views * train.nbytes + held_out.nbytes)
            prepared = prepare_stream(train, held_out, views=self.views, scale=scale, groups=groups, folder=folder)
            return dataclasses.replace(prepared, memory=self.memory)
        mean, std = (
            train.statistics() if scale else (np.zeros(train.width, np.float32), np.ones(train.width, np.float32))
        )
        train, held_out = (dataclasses.replace(rows, mean=mean, std=std) for rows in (train, held_out))
        shape = tuple(self.store.shape(self.name)[2:])
        codes = None if groups is None else group_codes(groups)
        left = self.memory // 4  # half of it is the stream's
        return Prepared(self.pool, shape, mean, std, train, held_out, codes, memory=left)


def train_groups(store: Any) -> list[str] | None:
    """Group of each training row, where there are groups."""
    groups = store.images.groups
    return None if groups is None else [groups[row] for row in store.rows("train")]


def rows_for(head: Head, store: Any, name: str, split: str) -> FeatureStream:
    """Rows of a split as a trained head takes them: pooled and standardised its way. To be read in their order."""
    rows = store.rows(split)
    return FeatureStream(store, name, rows, store.images.labels[rows], 0, head.pool or "none", head.mean, head.std)


def feature_set(store: Any, name: str | None) -> str:
    """A feature set of the store by name, or the only one.

    Raises
    ------
    ConfigurationError
        If there is none of that name (the nearest is named), or several and none is named.
    """
    if name is not None and name in store.names:
        return name
    if name is not None:
        held = ", ".join(store.names)
        raise ConfigurationError(f"{store.path}: no data set {name!r}, it holds {held}{nearest(name, store.names)}")
    if len(store.names) != 1:
        raise ConfigurationError(f"{store.path}: several data sets, name one of {', '.join(store.names)} (--features)")
    return store.names[0]


def views_seen(head: Head, store: Any, name: str) -> int:
    """Views of each image that a head is trained on."""
    return head.views_used(store.shape(name)[1])


def needs_rows(store: Any, *splits: str) -> None:
    """Refuse a store in which a split is empty.

    Raises
    ------
    HeadError
        With the way out.
    """
    if not store.classes:
        raise HeadError(
            f"{store.path}: none of its images has a label, so there is nothing to learn. Put the images of each class into a "
            "folder of its name, or write a CSV manifest path,label, and extract again (features are kept)"
        )
    for split in splits:
        if not len(store.rows(split)):
            out = ", or leave --test out" if split == "test" else ""
            raise HeadError(
                f"{store.path}: there are no {split} rows; extract again with --split hash:0.8,0.1,0.1, or, where the "
                f"images bring their own splits, --validation-from-train 0.1 (features are kept){out}"
            )


def needs_folds(store: Any) -> None:
    """Refuse a store of whose training rows none can be held out for the others.

    Raises
    ------
    HeadError
        With the way out.
    """
    names = train_groups(store)
    y = store.images.labels[store.rows("train")]
    if stratified_folds(y, 2, 0, None if names is None else group_codes(names)).max() < 0:
        raise HeadError(
            f"--folds: {store.path}: no class has two training rows, of two groups where there are groups, so that one could "
            "be held out; leave --folds out"
        )


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > 0.9 * free:
        raise HeadError(
            f"{folder.parent}: the standardised rows take {shown(need)} there while the sweep runs, {shown(free)} are "
            "free. Free some space, or give another --runs folder"
        )
