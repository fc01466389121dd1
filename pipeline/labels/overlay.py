"""Put the decisions of a labels file over labels and splits.

    labels, splits of a store or of images + Labels --effective--> Effective, counted --with_labels--> RelabelledStore

Nothing is computed anew, and nothing is written: without the labels file the store is as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import BottleneckError, LabelsError, UnreadableImageError
from features.files import printable
from features.progress import counted
from features.sources.scan import ImageSet
from features.sources.splits import SPLITS, UNLABELLED, listed
from features.store.reader import FeatureStore
from features.store.relabelled import RelabelledStore
from features.store.schema import digest_rows
from pipeline.labels.file import (
    EXCLUDE,
    LABEL,
    SEEN,
    SPLIT,
    UNKNOWN,
    WITHDRAWN,
    Labels,
    class_of,
    first_of,
    keys_of,
    last_of,
    read_labels,
)

TRAIN, TEST = SPLITS.index("train"), SPLITS.index("test")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a labels file did to the rows of a data set.

    Parameters
    ----------
    decided : int
        Rows about which there is a decision.
    corrected : int
        Rows that have another class than before.
    added : int
        Rows without a label that have one now.
    unknown, excluded : int
        Rows that are left out of training and scores.
    tested : int
        Rows of the test split whose label is another one, or gone.
    new_classes, gone_classes : tuple of str
        Classes that the data set does not have, and classes that no row has any more.
    elsewhere : int
        Images that decisions are about and that the data set does not have.
    other_targets : int
        Decisions about other targets, which change nothing here.
    seen : int
        Rows of the test split that an audit judged before, so that later test figures are too good.
    """

    decided: int = 0
    corrected: int = 0
    added: int = 0
    unknown: int = 0
    excluded: int = 0
    tested: int = 0
    new_classes: tuple[str, ...] = ()
    gone_classes: tuple[str, ...] = ()
    elsewhere: int = 0
    other_targets: int = 0
    seen: int = 0

    def __str__(self) -> str:
        said = [
            f"{counted(count, 'label')} {word}" if count else ""
            for count, word in ((self.corrected, "corrected"), (self.added, "added"))
        ]
        out = [
            f"{count:,} {word}" if count else ""
            for count, word in ((self.unknown, "unknown"), (self.excluded, "excluded"))
        ]
        if any(out):
            said.append(f"{' and '.join(filter(None, out))} (not trained on, not scored)")
        if self.tested:
            said.append(f"{self.tested:,} of these in the test split")
        if self.new_classes:
            said.append(f"new: {listed(self.new_classes)}")
        if self.gone_classes:
            said.append(f"without images now: {listed(self.gone_classes)}")
        if self.elsewhere:
            said.append(f"{counted(self.elsewhere, 'image')} not here")
        if self.other_targets:
            said.append(f"{counted(self.other_targets, 'decision')} about another target")
        if self.seen:
            said.append(f"{counted(self.seen, 'test image')} judged by an audit before")
        return printable("; ".join(filter(None, said)) or "no label changed")


@dataclasses.dataclass(frozen=True)
class Effective:
    """Classes, labels int32 (n,) and splits int8 (n,) under a labels file.

    ``excluded`` is bool (n,); ``known`` says whether a decision is about any of the rows.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    splits: np.ndarray
    excluded: np.ndarray
    counts: Counts
    known: bool


def target_of(store: FeatureStore) -> str:
    """Return the word for the target of a store in the column ``target``: its label column, or `LABEL`."""
    return str(store.provenance.get("target") or LABEL)


def with_labels(store: FeatureStore, labels: Labels | str | Path) -> RelabelledStore:
    """Return the store under the labels and splits that a labels file gives it; features are untouched.

    Parameters
    ----------
    store : FeatureStore
        The store.
    labels : Labels or Path
        The decisions.

    Returns
    -------
    RelabelledStore
        ``labelled_by`` holds what a run records, see `record_of`. See `effective` for the rules.

    Raises
    ------
    LabelsError
        If there are decisions, and none is about an image of the store; or the store is for another task than classes.
    """
    labels = labels if isinstance(labels, Labels) else read_labels(labels)
    table, original = store.images, store.classes
    if table.target is not None:
        raise LabelsError(
            f"{store.path}: is for --task {table.target.task}, and labels files are put over classes only; leave it out"
        )
    rows = table.labels, table.splits, table.groups, table.sha256
    found = applied(labels, str(store.path), original, *rows, target_of(store))
    return RelabelledStore(store, found.classes, found.labels, found.splits, record_of(labels, found.counts))


def as_trained(
    store: FeatureStore, record: Mapping[str, Any] | None, instead: str | Path | None = None
) -> FeatureStore:
    """Put the labels file that a run records over its store, as it was when the run was trained.

    Parameters
    ----------
    store : FeatureStore
        The store.
    record : mapping or None
        `pipeline.runs.folder.Run.labels`; without one the store is returned as it is.
    instead : Path, optional
        Where the file is now.

    Raises
    ------
    LabelsError
        If the file is gone, or does not begin any more as it was.
    """
    if not record:
        return store
    path = instead or record["path"]
    try:
        labels = read_labels(path, record["size"])
    except (BottleneckError, OSError):  # the path may be a stranger's, so nothing of the file is shown
        labels = None
    if labels is None or labels.digest != record["sha256"]:
        raise LabelsError(
            f"{path}: does not begin any more as the labels file under which the run was trained; say where that is with "
            "--labels"
        )
    return with_labels(store, labels)


def labelled_images(images: ImageSet, labels: Labels, target: str, pool: Executor) -> tuple[ImageSet, Counts]:
    """Put a labels file over the labels of images, which are read for their content hash. Given splits stay.

    Parameters
    ----------
    images : ImageSet
        The images. Those that cannot be read keep their labels.
    labels : Labels
        The decisions.
    target : str
        As for `effective`.
    pool : Executor
        Threads that read.

    Raises
    ------
    LabelsError
        If there are decisions, and none is about one of the images.
    """

    def digest(row: int) -> bytes:
        try:
            return hashlib.sha256(images.read(row)).digest()
        except UnreadableImageError:
            return bytes(32)

    sha256 = digest_rows(pool.map(digest, range(len(images))))
    splits = np.where(images.labels < 0, UNLABELLED, TRAIN).astype(np.int8)
    found = applied(labels, images.description, images.classes, images.labels, splits, None, sha256, target)
    return dataclasses.replace(images, classes=found.classes, labels=found.labels), found.counts


def labels_said(record: Mapping[str, Any]) -> str:
    """Say in words what a run records about its labels file."""
    return f"{printable(record['path'])}: {_counts_of(record)}"


def _counts_of(record: Mapping[str, Any]) -> Counts:
    fields = {field.name: record.get(field.name, 0) for field in dataclasses.fields(Counts)}
    return Counts(**fields | {"new_classes": (), "gone_classes": ()})


def account(store: RelabelledStore) -> str:
    """Say in words what a labels file did to a store."""
    before, after = set(store.original.classes), set(store.classes)
    new, gone = tuple(sorted(after - before)), tuple(sorted(before - after))
    return str(dataclasses.replace(_counts_of(store.labelled_by), new_classes=new, gone_classes=gone))


def excluded_rows(store: FeatureStore, labels: Labels) -> np.ndarray:
    """Return which rows of a store a labels file excludes, bool, (n,)."""
    table = store.images
    values = _values(labels, labels.latest(table.sha256, target_of(store), LABEL, ""))
    is_excluded = np.array([*(value == EXCLUDE for value in labels.values.words), False], bool)
    return np.asarray(is_excluded[values])


def applied(labels: Labels, name: str, *rows: Any) -> Effective:
    """Apply decisions to rows as `effective` does; ``name`` is their data set.

    Raises
    ------
    LabelsError
        If there are decisions, and none is about one of the rows.
    """
    found = effective(labels, *rows)
    if len(labels) and not found.known:
        raise LabelsError(
            f"{labels.path}: none of its {counted(len(labels), 'decision')} is about one of the "
            f"{counted(len(found.labels), 'image')} of {name}. Decisions belong to the bytes of an image: give the labels "
            "file of these images, or the images of this file"
        )
    return found


def record_of(labels: Labels, counts: Counts) -> dict[str, Any]:
    """Return what a run records about its labels file, as plain values."""
    numbers = {
        name: value if isinstance(value, int) else len(value) for name, value in dataclasses.asdict(counts).items()
    }
    return {
        "path": str(Path(labels.path).resolve()),
        "sha256": labels.digest,
        "size": labels.size,
        "decisions": len(labels),
        **numbers,
    }


def effective(
    labels: Labels,
    classes: Sequence[str],
    given: np.ndarray,
    splits: np.ndarray,
    groups: Sequence[str] | None,
    sha256: np.ndarray,
    target: str = LABEL,
) -> Effective:
    """Apply decisions to rows.

    - A decision holds for all rows with the same bytes; the last one that was not withdrawn counts.
    - A row that has a split keeps it. `UNKNOWN` and `EXCLUDE` make a row unlabelled while they hold.
    - A row without a split that gets a class takes the split of its bytes, else that of its group, else one that a decision
      about `SPLIT` gave it before it had a class, else train. Rows are taken in the order of their first class, and count
      for their group from then on, so that later decisions never change a split.
    - A class that no row has any more goes.

    Parameters
    ----------
    labels : Labels
        The decisions.
    classes : sequence of str
        Class names of the rows, sorted.
    given : int32, (n,)
        Labels of the rows, index into ``classes``, -1 for unlabelled.
    splits : int8, (n,)
        Index into ``SPLITS``.
    groups : sequence of str, length n, or None
        Group of each row; empty for none.
    sha256 : uint8, (n, 32)
        Content hashes.
    target : str
        The target that is decided about. Decisions that name none, or `LABEL`, are about it too.
    """
    places = labels.latest(sha256, target, LABEL, "")
    values = _values(labels, places)  # of each row; the last word stands for no decision
    words = [*labels.values.words, None]
    names = [None if word is None else class_of(word) for word in words]
    used = {names[value] for value in np.unique(values).tolist()} - {None}
    every = sorted({*classes, *(name for name in used if name is not None)})
    number = {name: place for place, name in enumerate(every)}
    of_class = np.array([*(number[name] for name in classes), -1], np.int32)
    of_value = np.array([-1 if name is None else number.get(name, -1) for name in names], np.int32)
    decided, before = places >= 0, of_class[given]
    after = np.where(decided, of_value[values], before)
    now = np.where(decided & (after < 0), UNLABELLED, splits).astype(np.int8)
    rows, given_splits = _late(labels, target, splits, groups, sha256)
    late = np.full(len(splits), UNLABELLED, np.int8)
    late[rows] = given_splits
    now = np.where((splits == UNLABELLED) & (after >= 0), late, now)

    held, was = (
        np.bincount(after[after >= 0], minlength=len(every)),
        np.bincount(before[before >= 0], minlength=len(every)),
    )
    kept = np.array([name for name in range(len(every)) if held[name] or not was[name]], np.int64)
    renumbered = np.full(len(every) + 1, -1, np.int32)
    renumbered[kept] = np.arange(len(kept))
    known = np.isin(keys_of(labels.sha256), keys_of(sha256))
    is_word = {word: np.array([each == word for each in words], bool)[values] for word in (UNKNOWN, EXCLUDE)}
    changed = decided & (after != before)
    counts = Counts(
        decided=int(decided.sum()),
        corrected=int((changed & (before >= 0) & (after >= 0)).sum()),
        added=int((changed & (before < 0)).sum()),
        unknown=int(is_word[UNKNOWN].sum()),
        excluded=int(is_word[EXCLUDE].sum()),
        tested=int((changed & (splits == TEST)).sum()),
        new_classes=tuple(name for name in every if name not in classes),
        gone_classes=tuple(name for place, name in enumerate(every) if was[place] and not held[place]),
        other_targets=int((~labels.about(target, LABEL, "", SPLIT, SEEN)).sum()),
        seen=int(((labels.latest(sha256, SEEN) >= 0) & (splits == TEST)).sum()),
        elsewhere=len(np.unique(keys_of(labels.sha256)[~known])),
    )
    return Effective(
        tuple(every[place] for place in kept), renumbered[after], now, is_word[EXCLUDE], counts, bool(known.any())
    )


def _values(labels: Labels, places: np.ndarray) -> np.ndarray:
    """The number of the value of each row's decision; for rows without one that of a further word behind all others."""
    values = np.append(labels.values.codes, len(labels.values.words)).astype(np.int64)
    return values[np.where(places < 0, len(labels), places)]


def _late(
    labels: Labels, target: str, splits: np.ndarray, groups: Sequence[str] | None, sha256: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows without a split that have, or had, a class from a decision, and the split that each of them takes."""
    is_class = np.array([class_of(word) is not None for word in labels.values.words] or [False], bool)
    places = np.flatnonzero(labels.about(target, LABEL, "") & is_class[labels.values.codes])
    first = first_of(labels.sha256[places], places, sha256)
    rows = np.flatnonzero((splits == UNLABELLED) & (first >= 0))
    rows = rows[np.argsort(first[rows], kind="stable")]
    placed = np.flatnonzero(splits != UNLABELLED)
    same = first_of(sha256[placed], placed, sha256[rows])
    assigned = _assigned(labels, places, sha256[rows])
    of_group: dict[str, int] = {}
    if groups is not None and len(rows):
        for row in placed.tolist():
            of_group.setdefault(groups[row], int(splits[row]))
        of_group.pop("", None)
    of_bytes: dict[bytes, int] = {}
    taken = []
    for row, twin, asked in zip(rows.tolist(), same.tolist(), assigned.tolist(), strict=True):
        key, group = sha256[row].tobytes(), groups[row] if groups is not None else ""
        split = int(splits[twin]) if twin >= 0 else of_bytes.get(key, of_group.get(group, asked))
        of_bytes[key] = split
        if group:
            of_group.setdefault(group, split)
        taken.append(split)
    return rows, np.array(taken, np.int8)


def _assigned(labels: Labels, of_class: np.ndarray, sha256: np.ndarray) -> np.ndarray:
    """The split, int8 (n,), that decisions gave each image before its first class; train if none did.

    Parameters
    ----------
    labels : Labels
        The decisions.
    of_class : int64, (k,), ascending
        Places of the decisions that give a class.
    sha256 : uint8, (n, 32)
        Content hashes of the images.
    """
    places = np.flatnonzero(labels.about(SPLIT))
    codes = {word: SPLITS.index(word) for word in SPLITS[:UNLABELLED]} | {WITHDRAWN: TRAIN}
    if strange := {labels.values.words[code] for code in labels.values.codes[places].tolist()} - codes.keys():
        raise LabelsError(
            f"{labels.path}: a decision about the split of an image says {min(strange)!r:.80}; expected train, validation "
            "or test"
        )
    first = first_of(labels.sha256[of_class], of_class, labels.sha256[places])
    places = places[(first < 0) | (places < first)]
    last = last_of(labels.sha256[places], places, sha256)
    return np.array(
        [TRAIN if k < 0 else codes[labels.values.words[labels.values.codes[k]]] for k in last.tolist()], np.int8
    )
