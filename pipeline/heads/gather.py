"""Get the rows of a store that heads are trained on.

store --they fit into memory--> read once: `Prepared` in memory or in files
      --they do not-----------> `FeatureStream`: read piece by piece, by heads that can do so; other heads are refused
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, HeadError, nearest
from features.sources.advice import empty_splits
from features.sources.splits import SPLITS
from pipeline.heads.costs import shown
from pipeline.heads.head import Head
from pipeline.heads.kinds import heads_of, make_head
from pipeline.heads.prepared import Prepared, group_codes, prepare_stream
from pipeline.heads.streaming import FeatureStream
from pipeline.tasks.table import names_of, targets_of, task_of

MOST_GROUPS = 200  # that are left out one at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """Training and validation rows of one feature set, with one pooling.

    Parameters
    ----------
    store : FeatureStore
        The store to read.
    name : str
        Name of the feature set.
    pool : {"none", "avg", "max", "flatten"}
        Pooling of spatial features.
    views : int
        Number of views of each training row that are used.
    memory : int
        Bytes that training may use.
    """

    store: Any
    name: str
    pool: str
    views: int
    memory: int

    @property
    def need(self) -> int:
        """Bytes that training in memory needs: the rows, and the same again for what training makes of them."""
        return 2 * self.views * self.stream("train").nbytes

    @property
    def streamed(self) -> bool:
        """Whether the rows stay in the store."""
        return self.need > self.memory

    def stream(self, split: str) -> FeatureStream:
        """Make a stream of the rows of a split, not standardised."""
        rows = self.store.rows(split)
        labels, half = targets_of(self.store, rows), self.memory // 2  # the other half is for what training makes
        return FeatureStream(self.store, self.name, rows, labels, half, self.pool)

    def check(self, head: Head) -> None:
        """Refuse a head that cannot be trained on these rows within ``memory``.

        Raises
        ------
        HeadError
            If the labels cannot be trained on, or memory does not suffice; the message then gives both figures and the
            heads that need less.
        """
        rows = self.stream("train")
        head.check_labels(rows.labels, len(rows))
        if self.streamed and not head.streams:
            can = ", ".join(name for name in heads_of(head.task) if make_head(name, task=head.task).streams)
            raise HeadError(
                f"head {head.name!r} needs all rows in memory: {self.views * len(rows)} x {rows.width} features and the work "
                f"on them take {shown(self.need)}, but only {shown(self.memory)} are allowed. Give more (--memory), or use "
                f"another pooling or a head that reads rows piece by piece: {can}"
            )

    def prepare(self, *, scale: bool, folder: Path | None = None) -> Prepared:
        """Prepare the rows in memory, or in files in ``folder``; rows that do not fit into memory stay in the store.

        Raises
        ------
        HeadError
            If the files do not fit on the disk.
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
        left = self.memory // 4  # the stream uses half of the memory
        return Prepared(self.pool, shape, mean, std, train, held_out, codes, memory=left)


def train_groups(store: Any) -> list[str] | None:
    """Group of each training row; None if the store has no groups."""
    groups = store.images.groups
    return None if groups is None else [groups[row] for row in store.rows("train")]


def rows_for(head: Head, store: Any, name: str, split: str) -> FeatureStream:
    """Make a stream of the rows of a split, pooled and standardised as a trained head needs them, for ordered reading."""
    rows = store.rows(split)
    return FeatureStream(store, name, rows, targets_of(store, rows), 0, head.pool or "none", head.mean, head.std)


def feature_set(store: Any, name: str | None) -> str:
    """Find a feature set of the store by its name, or the only one.

    Raises
    ------
    ConfigurationError
        If there is no feature set of that name (the nearest is suggested), or there are several and no name is given.
    """
    if name is not None and name in store.names:
        return name
    if name is not None:
        held = ", ".join(store.names)
        raise ConfigurationError(f"{store.path}: no feature set {name!r}, it holds {held}{nearest(name, store.names)}")
    if len(store.names) != 1:
        raise ConfigurationError(f"{store.path}: several feature sets, use --features with {' or '.join(store.names)}")
    return str(store.names[0])


def views_seen(head: Head, store: Any, name: str) -> int:
    """Number of views of each image that a head is trained on."""
    return head.views_used(store.shape(name)[1])


def needs_rows(store: Any, *splits: str) -> None:
    """Check that a store has labels and that none of the given splits is empty.

    Raises
    ------
    HeadError
        If not; the message says how to mend it.
    """
    if not names_of(store) and store.labelled_by:
        raise HeadError(
            f"{store.path}: under {_labels_said(store)} none of its images has a label, so there is nothing to learn. "
            "Leave --labels out, or take decisions back"
        )
    if not names_of(store):
        raise HeadError(
            f"{store.path}: none of its images has a label, so there is nothing to learn. Put the images of each class into "
            "a folder named after the class, or write a CSV manifest path,label, and extract again (features are kept)"
        )
    table = store.images
    for split in splits:
        if not len(store.rows(split)):
            empty = empty_splits(table.strata, table.splits, table.groups, table.sha256, store.split_rule)
            out = ". Or leave --test out" if split == "test" else ""
            if store.labelled_by and len(np.flatnonzero(store.original.images.splits == SPLITS.index(split))):
                raise HeadError(
                    f"{store.path}: {_labels_said(store)} takes out all {split} rows; take decisions back, or leave "
                    f"--labels out{out}"
                )
            why = empty.get(split, "no image with a label could be read")
            raise HeadError(f"{store.path}: there are no {split} rows: {why} (features are kept){out}")


def _labels_said(store: Any) -> str:
    labels = store.labelled_by
    return f"{labels['path']} ({labels['unknown']:,} unknown, {labels['excluded']:,} excluded)"


def groups_to_leave_out(store: Any) -> int:
    """Count the groups of the training rows, for as many folds that each leave out one of them.

    Raises
    ------
    HeadError
        If there are no groups, a single one, or more than `MOST_GROUPS`.
    """
    names = train_groups(store)
    count = 0 if names is None else len(np.unique(group_codes(names)))
    if count < 2:
        has = "has no groups" if names is None else "has training rows of one group only"
        raise HeadError(
            f"--folds leave-one-group-out: {store.path} {has}. Extract again with a manifest that has a column 'group', or "
            "with --class-level, which makes groups of the other folders; or give a number of folds"
        )
    if count > MOST_GROUPS:
        raise HeadError(
            f"--folds leave-one-group-out: {store.path} has {count} groups, and each head would be trained as often; at most "
            f"{MOST_GROUPS} are allowed. --folds 10 keeps groups together too"
        )
    return count


def can_fold(store: Any) -> bool:
    """Whether the training rows of a store can be divided into folds, groups kept together."""
    names = train_groups(store)
    y = targets_of(store, store.rows("train"))
    return bool(task_of(store).folds(y, 2, 0, None if names is None else group_codes(names)).max() >= 0)


def needs_folds(store: Any) -> None:
    """Check that the training rows of a store can be divided into folds.

    Raises
    ------
    HeadError
        If not; the message says how to mend it.
    """
    if not can_fold(store):
        raise HeadError(
            f"--folds: {store.path}: no class has two training rows (in different groups, if there are groups), so none can "
            "be held out; leave --folds out"
        )


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > 0.9 * free:
        raise HeadError(
            f"{folder.parent}: the standardised rows need {shown(need)} of disk space while the sweep runs, but only "
            f"{shown(free)} are free. Free some space, or give another folder with --runs"
        )
