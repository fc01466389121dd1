"""Put the decisions of a labels file over labels and splits.

    labels, splits of a store or of images + Labels --effective--> Effective, counted --with_labels--> RelabelledStore

Nothing is computed anew, and nothing is written: without the labels file the store is as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import BottleneckError, LabelsError, UnreadableImageError, nearest
from features.files import printable
from features.progress import counted
from features.sources.imageset import ImageSet
from features.sources.splits import SPLITS, UNLABELLED, listed, number_or_none
from features.store.reader import FeatureStore
from features.store.relabelled import RelabelledStore
from features.store.schema import digest_rows
from features.targets import MULTILABEL, REGRESSION, Target, known_cells
from features.targets import UNKNOWN as UNKNOWN_LABEL
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

    ``known`` says whether a decision is about any of the rows.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    splits: np.ndarray
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
        If there are decisions, and none is about an image of the store; or a value does not fit the task of the store.
    """
    labels = labels if isinstance(labels, Labels) else read_labels(labels)
    table, original = store.images, store.classes
    if table.target is not None:
        rows_of = table.splits, table.groups, table.sha256
        target, splits, counts = applied_to_target(labels, str(store.path), table.target, *rows_of, target_of(store))
        return RelabelledStore(store, original, table.labels, splits, record_of(labels, counts), target)
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
    found, counts = _over(images, labels, target, sha256)
    # Files have no split here. What an audit judged before was a test image of the store.
    return found, dataclasses.replace(counts, seen=int((labels.latest(sha256, SEEN) >= 0).sum()))


def _over(images: ImageSet, labels: Labels, target: str, sha256: np.ndarray) -> tuple[ImageSet, Counts]:
    splits = np.where(images.strata < 0, UNLABELLED, TRAIN).astype(np.int8)
    if images.target is not None:
        rows = images.target, splits, None, sha256, target
        about, _, counts = applied_to_target(labels, images.description, *rows)
        return dataclasses.replace(images, target=about), counts
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
        raise _not_about(labels, name, len(found.labels))
    return found


def applied_to_target(
    labels: Labels, name: str, target: Target, splits: np.ndarray, groups: Any, sha256: np.ndarray, word: str
) -> tuple[Target, np.ndarray, Counts]:
    """Apply decisions to rows as `effective_target` does; ``name`` and errors are those of `applied`."""
    if len(labels) and not _is_known(labels, sha256):
        raise _not_about(labels, name, len(sha256))
    return effective_target(labels, target, splits, groups, sha256, word)


def _not_about(labels: Labels, name: str, images: int) -> LabelsError:
    return LabelsError(
        f"{labels.path}: none of its {counted(len(labels), 'decision')} is about one of the {counted(images, 'image')} of "
        f"{name}. Decisions belong to the bytes of an image: give the labels file of these images, or the images of this file"
    )


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
    words, values, decided = _decided(labels, sha256, target)
    names = [None if word is None else class_of(word) for word in words]
    used = {names[value] for value in np.unique(values).tolist()} - {None}
    every = sorted({*classes, *(name for name in used if name is not None)})
    number = {name: place for place, name in enumerate(every)}
    of_class = np.array([*(number[name] for name in classes), -1], np.int32)
    of_value = np.array([-1 if name is None else number.get(name, -1) for name in names], np.int32)
    before = of_class[given]
    after = np.where(decided, of_value[values], before)
    held, was = (np.bincount(some[some >= 0], minlength=len(every)) for some in (after, before))
    kept = np.array([name for name in range(len(every)) if held[name] or not was[name]], np.int64)
    renumbered = np.full(len(every) + 1, -1, np.int32)
    renumbered[kept] = np.arange(len(kept))
    counts = dataclasses.replace(
        _counted(labels, target, splits, sha256, before >= 0, after >= 0, after != before),
        new_classes=tuple(name for name in every if name not in classes),
        gone_classes=tuple(name for place, name in enumerate(every) if was[place] and not held[place]),
    )
    now = _splits(labels, target, splits, groups, sha256, after >= 0)
    return Effective(tuple(every[place] for place in kept), renumbered[after], now, counts, _is_known(labels, sha256))


def effective_target(
    labels: Labels,
    target: Target,
    splits: np.ndarray,
    groups: Sequence[str] | None,
    sha256: np.ndarray,
    name: str,
) -> tuple[Target, np.ndarray, Counts]:
    """Apply decisions to rows of several labels or numbers: the target and the splits in effect, as `effective` does.

    A value is the labels that hold, with ``;`` or ``|`` between them (a lone one: none holds), or the number of each column,
    with ``;`` between them and nothing where it is not known.

    Raises
    ------
    LabelsError
        If a value is no such list; labels and columns are those of the target.
    """
    words, codes, decided = _decided(labels, sha256, name)
    cells = np.full((len(words), target.values.shape[1]), _UNKNOWN_CELL[target.task], target.values.dtype)
    for code in np.unique(codes[decided]).tolist():
        if class_of(str(words[code])) is not None:
            cells[code] = _CELLS[target.task](labels.path, target.columns, str(words[code]))
    values = np.where(decided[:, None], cells[codes], target.values).astype(target.values.dtype)
    after = dataclasses.replace(target, values=values)
    unlike = (known_cells(values) != known_cells(target.values)) | (known_cells(values) & (values != target.values))
    counts = _counted(labels, name, splits, sha256, target.known, after.known, unlike.any(axis=1))
    return after, _splits(labels, name, splits, groups, sha256, after.known), counts


def _tags(path: Path, columns: Sequence[str], text: str) -> np.ndarray:
    held = {word.strip() for word in re.split("[;|]", text)} - {""}
    if strange := sorted(held - set(columns)):
        raise LabelsError(
            f"{path}: the label {strange[0]!r:.80} is none of the target, expected {', '.join(columns)[:300]}"
            f"{nearest(strange[0], columns)}"
        )
    return np.array([name in held for name in columns], np.uint8)


def _numbers(path: Path, columns: Sequence[str], text: str) -> np.ndarray:
    parts = [part.strip() for part in text.split(";")]
    found = [number_or_none(part) if part else float("nan") for part in parts]
    if len(found) != len(columns) or None in found or np.isinf(np.array(found, np.float64)).any():
        raise LabelsError(
            f"{path}: received {text!r:.80}, expected {counted(len(columns), 'number')} with ';' between them, of "
            f"{', '.join(columns)[:300]}"
        )
    return np.array(found, np.float64)


_CELLS: dict[str, Callable[[Path, Sequence[str], str], np.ndarray]] = {MULTILABEL: _tags, REGRESSION: _numbers}
_UNKNOWN_CELL = {MULTILABEL: UNKNOWN_LABEL, REGRESSION: float("nan")}


def _decided(labels: Labels, sha256: np.ndarray, target: str) -> tuple[list[str | None], np.ndarray, np.ndarray]:
    """All values, the number of each row's value, int64 (n,), and whether there is a decision about it, bool (n,).

    The last value, None, stands for no decision.
    """
    places = labels.latest(sha256, target, LABEL, "")
    return [*labels.values.words, None], _values(labels, places), places >= 0


def _is_known(labels: Labels, sha256: np.ndarray) -> bool:
    """Whether a decision is about any of the rows."""
    return bool(np.isin(keys_of(labels.sha256), keys_of(sha256)).any())


def _splits(
    labels: Labels,
    target: str,
    splits: np.ndarray,
    groups: Sequence[str] | None,
    sha256: np.ndarray,
    labelled: np.ndarray,
) -> np.ndarray:
    """The splits in effect, int8 (n,), of rows that are now ``labelled``, bool (n,), or not."""
    late = np.full(len(splits), UNLABELLED, np.int8)
    rows, taken = _late(labels, target, splits, groups, sha256)
    late[rows] = taken
    _, _, decided = _decided(labels, sha256, target)
    now = np.where(decided & ~labelled, UNLABELLED, splits)
    return np.where(labelled & (splits == UNLABELLED), late, now).astype(np.int8)


def _counted(
    labels: Labels,
    target: str,
    splits: np.ndarray,
    sha256: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    unlike: np.ndarray,
) -> Counts:
    """Count rows: labelled ``before`` and ``after``, and whether their labels are ``unlike``; bool (n,) each."""
    words, values, decided = _decided(labels, sha256, target)
    known, changed = np.isin(keys_of(labels.sha256), keys_of(sha256)), decided & unlike
    unknown, excluded = (np.array([word == each for word in words], bool)[values] for each in (UNKNOWN, EXCLUDE))
    return Counts(
        decided=int(decided.sum()),
        corrected=int((changed & before & after).sum()),
        added=int((changed & ~before).sum()),
        unknown=int(unknown.sum()),
        excluded=int(excluded.sum()),
        tested=int((changed & (splits == TEST)).sum()),
        other_targets=int((~labels.about(target, LABEL, "", SPLIT, SEEN)).sum()),
        seen=int(((labels.latest(sha256, SEEN) >= 0) & (splits == TEST)).sum()),
        elsewhere=len(np.unique(keys_of(labels.sha256)[~known])),
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
