"""Assign images to train, validation and test: splits that the source gives are kept, a rule decides the others."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from features.errors import ConfigurationError, nearest
from features.progress import counted
from features.targets import Target, known_cells

SPLITS = ("train", "validation", "test", "unlabelled")
NOT_GIVEN, UNLABELLED = -1, 3
SPLIT_WORDS = {"train": 0, "validation": 1, "val": 1, "valid": 1, "test": 2}
SPLIT_KINDS = ("hash", "stratified")
_STEP = 1 << 14  # images that are drawn at a time
DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)
# Option -> the given split that a share is taken from, and the split that it goes to
MOVES = {"validation-from-train": ("train", "validation"), "test-from-validation": ("validation", "test")}


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """How images without a given split get one.

    Parameters
    ----------
    kind : {"hash", "stratified"}
        ``hash`` looks at each image alone, at its group or its content, so an image never changes its split when
        others are added; the fractions hold on average. ``stratified`` meets the fractions in each class to within
        one image, or as nearly as whole groups allow, but images may change their split when others are added.
    fractions : tuple of three float
        Fractions of train, validation and test; they add up to 1.
    seed : int
        Another seed gives other splits.
    validation_from_train, test_from_validation : float, 0 to below 1
        Share of the given train (validation) images that moves to validation (test), drawn by hash; with ``stratified``,
        whole groups that hold about this share. Nothing else changes a given split.

    Examples
    --------
    >>> SplitRule.parse("stratified:0.75,0.25").fractions
    (0.75, 0.25, 0.0)
    >>> str(SplitRule.parse("hash:0.7,0.15,0.15", seed=3)), str(SplitRule())
    ('hash:0.7,0.15,0.15@3', 'hash')
    >>> SplitRule.parse("hash+validation-from-train:0.1").validation_from_train
    0.1
    """

    kind: str = "hash"
    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS
    seed: int = 0
    validation_from_train: float = 0.0
    test_from_validation: float = 0.0

    def __post_init__(self) -> None:
        for name, share in self._moved.items():
            if not 0 <= share < 1:
                raise ConfigurationError(f"{name}: received {share}, expected a share from 0 to below 1")
        if self.kind not in SPLIT_KINDS:
            hint = nearest(self.kind, SPLIT_KINDS)
            raise ConfigurationError(
                f"split: received {self.kind!r}, expected {' or '.join(SPLIT_KINDS)}, optionally with shares of train, "
                f"validation and test, such as stratified:0.8,0.1,0.1{hint}"
            )
        inside = len(self.fractions) == 3 and all(0 <= share <= 1 for share in self.fractions)
        if not inside or abs(sum(self.fractions) - 1) > 1e-9 or self.fractions[0] == 0:
            raise ConfigurationError(
                f"split: received the fractions {self.fractions}, expected train, validation and test "
                "between 0 and 1, train above 0, which add up to 1, such as 0.8,0.1,0.1"
            )

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> SplitRule:
        """Parse ``hash``, ``stratified``, or either with two (no test) or three fractions: ``hash:0.7,0.15,0.15``.

        ``+validation-from-train:0.1`` and ``+test-from-validation:0.2`` may follow. A seed after ``@``, as ``str``
        writes it, takes precedence over ``seed``.
        """
        text, at, stated = text.strip().partition("@")
        if at:
            if (
                not stated.removeprefix("-").isdecimal() or len(stated) > 100
            ):  # Python refuses to read thousands of digits
                raise ConfigurationError(f"split: received the seed {stated!r:.100}, expected a whole number after '@'")
            seed = int(stated)
        text, *additions = text.split("+")
        moved: dict[str, Any] = {}
        for addition in additions:
            name, _, share = addition.strip().partition(":")
            value = number_or_none(share)
            if name not in MOVES or value is None:
                known = " or ".join(f"+{name}:SHARE" for name in MOVES)
                raise ConfigurationError(f"split: received '+{addition}', expected {known}, such as 0.2")
            moved[name.replace("-", "_")] = value
        kind, colon, rest = text.strip().partition(":")
        if not colon:
            return cls(kind, seed=seed, **moved)
        shares = [number_or_none(part) for part in rest.split(",")]
        if None in shares or len(shares) not in (2, 3):
            raise ConfigurationError(
                f"split: received {text!r}, expected two or three numbers after the colon, "
                "train, validation and test, as in 'hash:0.7,0.15,0.15'"
            )
        train, validation, test = [share for share in shares if share is not None] + [0.0] * (3 - len(shares))
        return cls(kind, (train, validation, test), seed, **moved)

    def __str__(self) -> str:
        seed = f"@{self.seed}" if self.seed else ""
        added = "".join(f"+{name}:{share!r}" for name, share in self._moved.items() if share)
        if self.fractions == DEFAULT_FRACTIONS:
            return self.kind + added + seed
        shown = self.fractions if self.fractions[2] else self.fractions[:2]
        return f"{self.kind}:{','.join(map(repr, shown))}{added}{seed}"

    @property
    def _moved(self) -> dict[str, float]:
        return dict(zip(MOVES, (self.validation_from_train, self.test_from_validation), strict=True))


def assign_splits(
    labels: np.ndarray, given_splits: np.ndarray, groups: Sequence[str] | None, sha256: np.ndarray, rule: SplitRule
) -> tuple[np.ndarray, list[str]]:
    """Assign a split to every image. Given splits are kept; images without a label become ``unlabelled``.

    Each image draws u = (first 8 bytes of sha256(seed in decimal + key), big-endian) / 2^64, where key is its group
    in UTF-8, or the sha256 of its content if it has no group. ``hash``: train if u < train share, validation if
    u < train + validation share, else test; so a group, or identical files, never cross splits. ``stratified``: each
    class is sorted by u and divided by largest remainders; identical files of one class stay together.

    ``stratified`` divides whole groups as ``_divide_groups`` says; images without a group as if there were no groups.

    With ``rule.test_from_validation``, a given validation image moves to test if its u, drawn with the word
    ``test-from-validation`` between seed and key, is below that share; ``rule.validation_from_train`` likewise.
    With ``stratified`` and groups, they are divided between the two splits in these shares.

    Parameters
    ----------
    labels : int32, (n,)
    given_splits : int8, (n,)
        Index into ``SPLITS``, -1 for not given.
    groups : sequence of str, length n, or None
    sha256 : uint8, (n, 32)
        Hash of the content of each file.
    rule : SplitRule

    Returns
    -------
    splits : int8, (n,)
        Index into ``SPLITS``.
    warnings : list of str
        Groups that lie in more than one split because of given splits, and parts of the rule that concern no image.
    """
    splits = np.array(given_splits, dtype=np.int8)
    splits[np.asarray(labels) < 0] = UNLABELLED
    digests = np.asarray(sha256, dtype=np.uint8)

    def draws_of(rows: np.ndarray, word: str = "") -> np.ndarray:
        steps = (rows[start : start + _STEP].tolist() for start in range(0, len(rows), _STEP))
        each = itertools.chain.from_iterable(steps)
        if groups is None:
            keys = (digests[row].tobytes() for row in each)
        else:
            keys = (_group_key(groups[row]) if groups[row] else digests[row].tobytes() for row in each)
        return _draws(keys, f"{rule.seed}{word}")

    given = splits.copy()
    for word, share in rule._moved.items():
        source, target = (SPLITS.index(name) for name in MOVES[word])
        rows = np.flatnonzero(given == source) if share else np.zeros(0, np.int64)
        if rule.kind == "stratified" and groups is not None and len(rows):
            divided = _divide(labels, groups, rows, draws_of(rows, word), (1 - share, share, 0.0))
            splits[rows] = np.where(divided == 0, source, target)
        else:
            splits[rows[draws_of(rows, word) < share]] = target
    rows = np.flatnonzero(splits == NOT_GIVEN)
    draws = draws_of(rows)
    if rule.kind == "stratified":
        splits[rows] = _divide(labels, groups, rows, draws, rule.fractions)
    else:
        train, validation, test = rule.fractions
        # A split with share 0 must stay empty even if the other shares add up to just below 1, or if u rounds to 1.
        last = np.inf if test == 0 else train + validation
        splits[rows] = np.searchsorted([last if validation == 0 else train, last], draws, side="right")
    return splits, _crossing_groups(groups, splits) + _unused(rule, given)


def _unused(rule: SplitRule, given: np.ndarray) -> list[str]:
    """Name the parts of a rule that were asked for and concern no image; ``given`` are the splits before the rule."""
    found = [
        f"--{word} {share} has no effect: no image lies in a given split {MOVES[word][0]!r}"
        for word, share in rule._moved.items()
        if share and not (given == SPLITS.index(MOVES[word][0])).any()
    ]
    asked = (rule.kind, rule.fractions) != (SplitRule().kind, DEFAULT_FRACTIONS) and not any(rule._moved.values())
    if asked and len(given) and not (given == NOT_GIVEN).any():
        found.append(f"--split {rule.kind} has no effect: every image has a split of its own, which is kept")
    return found


def _group_key(group: str) -> bytes:
    return group.encode("utf-8", "surrogateescape")


def _draws(keys: Iterable[bytes], salt: str) -> np.ndarray:
    prefix, drawn = salt.encode("ascii"), list[np.ndarray]()
    heads = (hashlib.sha256(prefix + key).digest()[:8] for key in keys)
    while some := b"".join(itertools.islice(heads, _STEP)):
        drawn.append(np.frombuffer(some, dtype=">u8").astype(np.float64) / 2.0**64)
    return np.concatenate([np.zeros(0), *drawn])


def _divide(
    labels: np.ndarray, groups: Sequence[str] | None, rows: np.ndarray, draws: np.ndarray, fractions: Sequence[float]
) -> np.ndarray:
    """Divide rows by ``_divide_groups`` where they have a group, else by ``_stratify``; int8, in the order of ``rows``."""
    labels = np.asarray(labels)[rows]
    if groups is None:
        return _stratify(labels, draws, fractions)
    named = np.array([bool(groups[row]) for row in rows], bool)
    splits = np.empty(len(rows), np.int8)
    splits[~named] = _stratify(labels[~named], draws[~named], fractions)
    if named.any():
        names = np.array([groups[row] for row in rows], object)[named]
        _, of_row = np.unique(names, return_inverse=True)
        splits[named] = _divide_groups(labels[named], of_row, draws[named], fractions)[of_row]
    return splits


def _divide_groups(labels: np.ndarray, groups: np.ndarray, draws: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """Assign whole groups to train, validation and test so that each class has about the fractions in each of them.

    Groups of rare classes come first, then large groups, then those of a small draw. A group goes to train if train still
    lacks one of its classes; otherwise to the split that lacks most of its classes, measured by the share that is filled
    (iterative stratification: Sechidis, Tsoumakas, Vlahavas, ECML PKDD 2011, applied to groups). So no split and no class
    stays empty where there are enough groups.

    Parameters
    ----------
    labels : int32, (n,)
    groups : int64, (n,)
        Number of the group of each row.
    draws : float64, (n,)
        The same for all rows of a group.
    fractions : sequence of float, length 3

    Returns
    -------
    int8, (groups,)
        Index into ``SPLITS``.
    """
    count = int(groups.max()) + 1
    held = np.zeros((count, int(labels.max()) + 2))  # images by class; the last column is all of them
    np.add.at(held, (groups, labels), 1)
    held[:, -1] = held.sum(axis=1)
    held = held[:, held.any(axis=0)]
    of_class = held / held.sum(axis=0)
    draw = np.empty(count)
    draw[groups] = draws
    holders = (held > 0).sum(axis=0)
    rarest = np.where(held > 0, holders, count + 1).min(axis=1)
    shares = np.maximum(np.asarray(fractions, dtype=np.float64), 1e-12)[:, None]
    filled = np.zeros((3, held.shape[1]))
    splits = np.zeros(count, np.int8)
    for group in np.lexsort((draw, -held[:, -1], rarest)).tolist():
        mine = of_class[group]
        lacks = (filled[0, :-1] == 0) & (mine[:-1] > 0)
        need = np.where(np.asarray(fractions) > 0, ((1 - filled / shares) * mine).sum(axis=1), -np.inf)
        splits[group] = 0 if lacks.any() else int(np.argmax(np.round(need, 9)))
        filled[splits[group]] += mine
    return splits


def _stratify(labels: np.ndarray, draws: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    splits = np.empty(len(labels), dtype=np.int8)
    order = np.lexsort((draws, labels))
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        exact = np.asarray(fractions) * len(rows)
        counts = np.floor(exact + 1e-9).astype(np.int64)
        remainders = np.round(exact - counts, 9)
        counts[np.argsort(-remainders, kind="stable")[: len(rows) - counts.sum()]] += 1
        # Identical files draw the same u; all of them take the place of the first.
        places = np.arange(len(rows))
        places[1:][np.diff(draws[rows]) == 0] = 0
        places = np.maximum.accumulate(places)
        splits[rows] = np.searchsorted(counts.cumsum()[:2], places, side="right")
    return splits


def _crossing_groups(groups: Sequence[str] | None, splits: np.ndarray) -> list[str]:
    first: dict[str, int] = {}
    crossing: dict[str, None] = {}
    for group, split in zip(groups or (), splits.tolist() if groups is not None else (), strict=True):
        if group and split != UNLABELLED and first.setdefault(group, split) != split:
            crossing[group] = None
    if not crossing:
        return []
    return [
        f"{counted(len(crossing), 'group', 'lies')} in more than one split, because of given splits: {listed(list(crossing))}"
    ]


def find_leakage(sha256: np.ndarray, splits: np.ndarray, paths: Sequence[str]) -> list[tuple[str, str]]:
    """Find identical files that lie in two of train, validation and test.

    Parameters
    ----------
    sha256 : uint8, (n, 32)
    splits : int8, (n,)
    paths : sequence of str, length n

    Returns
    -------
    list of (path, path)
        The first of several identical files, with the first of them in each other split; in row order.
    """
    in_a_split = (splits >= 0) & (splits != UNLABELLED)
    return _equal_but_unlike(sha256, np.zeros_like(splits), splits, in_a_split, paths)


def find_conflicts(
    sha256: np.ndarray, labels: np.ndarray, splits: np.ndarray, paths: Sequence[str]
) -> list[tuple[str, str]]:
    """Find identical files of one split that have different labels.

    Parameters
    ----------
    sha256 : uint8, (n, 32)
    labels : int32, (n,)
        Index into the classes; -1 for unlabelled, which is no other label.
    splits : int8, (n,)
    paths : sequence of str, length n

    Returns
    -------
    list of (path, path)
        The first of several identical files, with the first of them of each other label; in row order.
    """
    return _equal_but_unlike(sha256, splits, labels, labels >= 0, paths)


def _equal_but_unlike(
    sha256: np.ndarray, parts: np.ndarray, values: np.ndarray, counted: np.ndarray, paths: Sequence[str]
) -> list[tuple[str, str]]:
    """Of identical files in one part, pair the first with the first of each other value; only rows that are ``counted``."""
    contents = np.ascontiguousarray(sha256, dtype=np.uint8).reshape(-1, 32).view("S32").ravel()
    rows = np.flatnonzero(counted)
    order = rows[np.argsort(contents[rows], kind="stable")]
    again = np.zeros(len(order) + 1, bool)  # whether a row has the content of the one before
    for start in range(1, len(order), _STEP):
        some = order[start - 1 : start + _STEP]
        again[start : start + len(some) - 1] = contents[some[1:]] == contents[some[:-1]]
    order = order[again[:-1] | again[1:]]  # few as a rule
    order = order[np.lexsort((order, contents[order], parts[order]))]
    equal = (contents[order][1:] == contents[order][:-1]) & (parts[order][1:] == parts[order][:-1])
    as_before, as_next = np.insert(equal, 0, False)[: len(order)], np.append(equal, False)[: len(order)]
    repeated = as_before | as_next
    pairs = []
    first: dict[int, int] = {}
    for same, row in zip(as_before[repeated].tolist(), order[repeated].tolist(), strict=True):
        first = first if same else {}
        value = int(values[row])
        if first and value not in first:
            pairs.append((next(iter(first.values())), row))
        first.setdefault(value, row)
    return [(paths[row], paths[other]) for row, other in sorted(pairs)]


def warnings_about(
    labels: np.ndarray,
    splits: np.ndarray,
    classes: Sequence[str],
    hint: str = "",
    enough: int = 0,
    *,
    whole: bool = True,
) -> list[str]:
    """Return warnings about what would harm training: too few classes or images, and classes without images in a split.

    Parameters
    ----------
    labels : int32, (n,)
    splits : int8, (n,)
        Index into ``SPLITS``.
    classes : sequence of str
    hint : str
        What is said after the first split that lacks a class which the hint helps.
    enough : int
        Number of images from which it helps a class.
    whole : bool
        Whether these are all images of the source. If not, that a split lacks a class says nothing.
    """
    labelled = np.asarray(labels) >= 0
    if not labelled.any():
        return [
            "no image has a label: features can be kept, but nothing can be trained. To train, put the images of each "
            "class into a folder of its name, or write a CSV manifest path,label"
        ]
    counts = np.zeros((len(classes), len(SPLITS)), dtype=np.int64)
    np.add.at(counts, (np.asarray(labels)[labelled], np.asarray(splits)[labelled]), 1)
    totals = counts.sum(axis=1)
    messages = []
    if (totals > 0).sum() == 1:
        messages.append(f"only one class has images, {classes[int(totals.argmax())]!r}: training needs two")
    if (totals < 2).any():
        messages.append(f"classes with fewer than 2 images: {_named(classes, totals < 2)}")
    for code, split in enumerate(SPLITS[:3] if whole else ()):
        absent = (counts[:, code] == 0) & (totals > 0)
        if counts[:, code].any() and absent.any():
            messages.append(f"classes without images in {split}: {_named(classes, absent)}")
            if (totals[absent] >= enough).any():
                messages[-1] += hint
                hint = ""
    return messages


def warnings_about_target(target: Target, splits: np.ndarray, hint: str = "") -> list[str]:
    """Return warnings about what would harm training on a target: columns of a split in which all known values are equal.

    Parameters
    ----------
    target : Target
    splits : int8, (n,)
        Index into ``SPLITS``.
    hint : str
        What is said after the first warning, if it is about a single split.
    """
    if not target.known.any():
        return ["no image has a known target: features can be kept, but nothing can be trained"]
    messages = []
    found = _equal_columns(target, np.ones(len(splits), bool))
    if found.any():
        messages.append(f"all images have the same value, or none, of {_named(target.columns, found)}")
    for code, split in enumerate(SPLITS[:3]):
        alone = _equal_columns(target, splits == code) & ~found
        if (splits == code).any() and alone.any():
            messages.append(f"all images of {split} have the same value of {_named(target.columns, alone)}{hint}")
            hint = ""
    return messages


def _equal_columns(target: Target, rows: np.ndarray) -> np.ndarray:
    """Whether the known values of a column are equal in these rows: bool, (columns,)."""
    values, known = target.values[rows].astype(np.float64), known_cells(target.values[rows])
    low, high = np.where(known, values, np.inf), np.where(known, values, -np.inf)
    return np.asarray(low.min(axis=0, initial=np.inf) >= high.max(axis=0, initial=-np.inf))


def _named(classes: Sequence[str], mask: np.ndarray) -> str:
    return listed([name for name, chosen in zip(classes, mask, strict=True) if chosen])


def number_or_none(text: str) -> float | None:
    """Return ``text`` as a number, or None if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return None


def listed(names: Sequence[str], count: int = 8) -> str:
    """Return the first few names, quoted, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more
