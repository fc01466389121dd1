"""Read WebDataset tars, such as ``shard-{000000..000099}.tar``: members of one key are one image and its label.

    pattern --expanded()--> tars --open_archive()--> members --by key--> image + .cls, .json or .txt --> one row per image

A tar is read once to list it, with its labels; what it holds is kept (see ``tarindex``). Images are then read where they
lie, so a run that was killed goes on inside a tar.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import logging
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np

from features.errors import SourceError, UnreadableImageError, nearest
from features.progress import Progress, counted
from features.scratch import Growing
from features.sources.archives import TAR_SUFFIXES, TEXT_ENDINGS, Archive, open_archive
from features.sources.blocks import are_there, file_at, matching, opened, prefixes, versions_of
from features.sources.cells import cell_text, padded, read_target, target_columns, target_titles
from features.sources.folders import IMAGE_SUFFIXES, ODD_CHARACTERS, File, Files, is_ignored
from features.sources.objects import without_secrets
from features.sources.reading import split_of
from features.sources.remote import is_address
from features.sources.splits import NOT_GIVEN, listed
from features.sources.tarindex import Trust
from features.targets import CLASSIFICATION, Target
from features.texts import GrowingCoded, GrowingTexts, Lookup, keys_of

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_ALL = "{}"  # all numbers that there are
MOST_TARS = 100_000
_LABEL_BYTES = 1 << 20  # of a member that holds a label
_LONGEST_LABEL = 200  # characters; longer ones are captions
_STEP = 4096  # members that are looked at together
_NAMED = 8  # keys that a warning names
_LABEL_KEY = "label"  # of a .json member
_MOST_KEYS = 1000  # of .json members that a message may name


class Samples(NamedTuple):
    """One row per image, in the order of the files."""

    root: Path | str
    files: Files
    names: Sequence[str]
    splits: np.ndarray
    groups: Sequence[str] | None
    read: Callable[[str], bytes]
    target: Target | None = None
    versions: Sequence[str] | None = None


def is_pattern(source: str) -> bool:
    """Whether the name of a source stands for several tars."""
    if "*" in source and (is_address(source) or source.lower().endswith((*TAR_SUFFIXES, ".parquet"))):
        return True
    return _RANGE.search(source) is not None or _ALL in source


def root_of(pattern: str) -> Path | str:
    """Return what names the files of a pattern whatever their numbers, so that more of them change nothing about the others."""
    if is_address(pattern):
        return without_secrets(_RANGE.sub(_ALL, pattern))
    return Path(os.path.abspath(os.path.expanduser(_RANGE.sub(_ALL, pattern))))


def expanded(pattern: str) -> list[str]:
    """Return the names that a pattern stands for, in order; ``{}`` stands for all numbers that there are, ``*`` for any text.

    Raises
    ------
    SourceError
        If it counts down, stands for more than 100,000, or there are no such files.

    Examples
    --------
    >>> expanded("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    if is_address(pattern) and (_ALL in pattern or "*" in pattern):
        return matching(pattern)
    if _ALL in pattern or "*" in pattern:
        return _there(os.path.expanduser(pattern))
    texts = _RANGE.split(pattern)
    ranges, total = [], 1
    for first, last in zip(texts[1::3], texts[2::3], strict=True):
        count = int(last) - int(first) + 1
        total *= max(count, 0)
        if not 0 < total <= MOST_TARS:
            raise SourceError(
                f"{pattern}: received {{{first}..{last}}}, expected two numbers in ascending order and at most {MOST_TARS} files"
            )
        ranges.append([f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)])
    return [
        "".join(itertools.chain(*zip(texts[::3], (*numbers, ""), strict=True)))
        for numbers in itertools.product(*ranges)
    ]


def _there(pattern: str) -> list[str]:
    parts = (r"[^/]*".join(map(re.escape, part.split("*"))) for part in pattern.split(_ALL))
    wanted, found = re.compile(r"(\d+)".join(parts)), list[tuple[list[int], str]]()
    for name in glob.glob("*".join(map(glob.escape, pattern.replace(_ALL, "*").split("*")))):
        if match := wanted.fullmatch(name):
            found.append(([*map(int, match.groups())], name))
    if not found:
        raise SourceError(f"{pattern}: no such files; {{}} stands for the numbers in their names, and * for any text")
    return [name for _, name in sorted(found)]


def is_webdataset(archive: Archive) -> bool:
    """Whether the images of a tar have labels beside them under the same key, and no class folders."""
    folder, beside = None, False
    for sample in _by_key(archive, refuse=False):
        if sample.image:
            if folder not in (None, os.path.dirname(sample.image)):
                return False
            folder = os.path.dirname(sample.image)
            beside = beside or bool(sample.labels)
    return beside


def open_tars(
    pattern: str,
    trust: Trust,
    target: str | None,
    progress: Progress | None = None,
    *,
    labelled: bool = True,
    task: str = CLASSIFICATION,
) -> Samples:
    """List the images of the tars that ``pattern`` stands for; see ``samples_of``. Progress is that of the tars.

    Raises
    ------
    SourceError
        As there; and if a tar is missing or damaged.
    """
    paths = [file_at(name) for name in expanded(pattern)]
    if missing := [path.name for path, there in zip(paths, are_there(paths), strict=True) if not there]:
        raise SourceError(
            f"{pattern}: {len(missing)} of {len(paths)} files are missing: {listed(missing)}. Put them there, or change the numbers"
        )
    archives = opened(paths, lambda path: open_archive(path, trust), progress)
    return samples_of(root_of(pattern), archives, target, labelled=labelled, task=task)


def samples_of(
    root: Path | str,
    archives: Sequence[Archive],
    target: str | None,
    *,
    labelled: bool = True,
    task: str = CLASSIFICATION,
) -> Samples:
    """List the images of tars with their labels; no image is read.

    Parameters
    ----------
    root : Path or str
        What names all tars: their pattern, or the only tar itself.
    archives : sequence of Archive
        The tars.
    target : str, optional
        Key of the label in ``.json`` members, ``label`` by default. If given, ``.cls`` and ``.txt`` members are not used. For
        other tasks also several keys with commas between them; see `features.sources.cells.read_target`. A list may be a list
        of JSON; a member that lacks a key does not know it.
    labelled : bool
        Whether labels are needed.
    task : {"classification", "multilabel", "regression"}
        What the labels are.

    Raises
    ------
    SourceError
        If a key has two images, a label cannot be read, or there are no images; the message names the member.
    """
    paths, stamps, names, splits = GrowingTexts(), Growing("<i8", (4,)), GrowingCoded(), Growing("i1")
    tars, ends = dict[str, Archive](), list[int]()
    targets = _Targets(root, target) if labelled and task != CLASSIFICATION else None
    bare, alone, keys = _Some(), _Some(), list[str]()  # of a .json member without a label
    for archive, prefix in zip(archives, prefixes(root, [archive.path for archive in archives]), strict=True):
        tars[prefix] = archive
        ends.append(len(splits))
        status, code = archive.status, split_of(archive.path.name.split(".")[0])
        for sample in _by_key(archive):
            if not sample.image:
                alone.add(f"{prefix}{sample.key}")
                continue
            name, known = "", not labelled
            if targets is not None:
                known = targets.add(archive, sample)
            elif labelled:
                name = _label(archive, sample, target)
                known = bool(name)
                keys = keys if known or keys or target is not None else _keys(archive, sample)
            if not known:
                bare.add(prefix + sample.image)
            file = File.of(prefix + sample.image, status, sample.size)
            paths.append(file.path)
            stamps.append(file.stamp)
            names.append(name)
            splits.append(NOT_GIVEN if code is None else code)
    if not len(splits):
        raise SourceError(
            f"{root}: no images in {counted(len(archives), 'tar')}; expected members such as 0001.jpg and 0001.cls"
        )
    hint = f". --target names the key of the label in .json members, one of {listed(keys)}" if keys else ""
    for lacking, what, more in ((bare, "no label", hint), (alone, "a label and no image", "")):
        if lacking.count:
            logger.warning("%s: %s %s: %s%s", root, counted(lacking.count, "key", "has"), what, lacking, more)
    given = splits.array()
    if (given == NOT_GIVEN).any():  # names of some tars only say little
        given = np.full(len(given), NOT_GIVEN, np.int8)
    found = names.coded()
    files = Files(paths.texts(), stamps.array())
    read = None if targets is None else targets.read(task, files.paths)
    versions = versions_of([archive.path for archive in archives], np.diff([*ends, len(splits)]).tolist())
    return Samples(root, files, found.changed(padded(found.texts)), given, None, _Reader(tars), read, versions)


class _Some:
    """How many there are, and the first of them."""

    def __init__(self) -> None:
        self.count, self._first = 0, list[str]()

    def add(self, name: str) -> None:
        self.count += 1
        if self.count <= _NAMED:
            self._first.append(name)

    def __str__(self) -> str:
        return listed(self._first) + (f" and {self.count - len(self._first)} more" if self.count > _NAMED else "")


class _Reader:
    """The function path -> bytes."""

    def __init__(self, tars: dict[str, Archive]) -> None:
        self._tars = tars

    def __call__(self, path: str) -> bytes:
        end = path.find(".tar/") + 5 if "" not in self._tars else 0
        while path[:end] not in self._tars:
            end = path.index("/", end) + 1
        return self._tars[path[:end]].read(path[end:])


@dataclasses.dataclass
class _Sample:
    key: str
    image: str
    size: int
    labels: dict[str, int]  # ending -> number of the member


def _key(member: str) -> tuple[str, str]:
    """Return key and ending of a member: what comes before and after the first dot of its name."""
    folder, slash, name = member.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _by_key(archive: Archive, *, refuse: bool = True) -> Iterator[_Sample]:
    """Yield the members of each key together, in the order of its first one, wherever they lie in the tar.

    With ``refuse``, two images of one key are an error.
    """
    kinds, rows, keys = Growing("u1"), Growing("<i8"), GrowingTexts()
    for row, member in enumerate(archive.members):
        key, ending = _key(member)
        kind = _ENDINGS.index(ending) if ending in _ENDINGS else 0
        if (kind or f".{ending}" in IMAGE_SUFFIXES) and not any(is_ignored(part) for part in member.split("/")):
            keys.append(key)
            kinds.append(kind)
            rows.append(row)
    texts, paths = keys.texts(), archive.members.paths
    numbers = keys_of(texts, len(texts))
    first = Lookup(numbers).first(numbers)  # members of one key have the same first one
    order = np.argsort(first, kind="stable")
    columns = (first[order], order, kinds.array()[order], rows.array()[order])
    step = range(0, len(order), _STEP)
    each = itertools.chain.from_iterable(
        zip(*(column[start : start + _STEP].tolist() for column in columns), strict=True) for start in step
    )
    for _, group in itertools.groupby(each, key=operator.itemgetter(0)):
        members = list(group)
        sample = _Sample(texts[members[0][1]], "", 0, {})
        for _, _, kind, row in members:
            if kind:
                sample.labels[_ENDINGS[kind]] = row
            elif sample.image and refuse:
                _refuse(archive, paths[row], f"has the key of {sample.image!r}: expected one image for each key")
            else:
                sample.image, sample.size = paths[row], archive.members.at(row).size
        yield sample


def _refuse(archive: Archive, member: str, problem: str) -> NoReturn:
    raise SourceError(f"{archive.path}: the member {member!r} {problem}")


def _label(archive: Archive, sample: _Sample, target: str | None) -> str:
    """Return the label of a sample; empty if it has none."""
    for ending, read in _LABELS.items():
        if ending not in sample.labels or (target is not None and ending != "json"):
            continue
        member, name = _read_member(archive, sample, ending, read, target)
        name = name.strip()
        if len(name) > _LONGEST_LABEL or ODD_CHARACTERS.search(name):
            _refuse(
                archive, member, f"holds {name[:40]!r}, which is no class name; name the class in .cls or .json members"
            )
        return name
    return ""


def _keys(archive: Archive, sample: _Sample) -> list[str]:
    """Return the keys of the ``.json`` member from which no label was read."""
    if next((ending for ending in _LABELS if ending in sample.labels), "") != "json":
        return []
    values = _read_member(archive, sample, "json", json.loads)[1]
    return list(values) if isinstance(values, dict) else []


def _read_member(
    archive: Archive, sample: _Sample, ending: str, read: Callable[..., _T], *more: object
) -> tuple[str, _T]:
    """Return the name of a member of a sample, and what ``read`` makes of its text (and of ``more``)."""
    row = sample.labels[ending]
    member, size = archive.members.paths[row], archive.members.at(row).size
    if size > _LABEL_BYTES:
        _refuse(archive, member, f"has {size} bytes; expected a label")
    try:
        return member, read(archive.read_row(row).decode("utf-8-sig"), *more)
    except SourceError:
        raise
    except UnreadableImageError as error:
        _refuse(archive, member, f"is damaged: {error.detail}. Download or pack the tar again")
    except (ValueError, TypeError, RecursionError) as error:
        _refuse(archive, member, f"holds no label: {error}")


class _Targets:
    """The cells of the targets of all samples, as text: those of the keys of a ``.json`` member, or that of another one."""

    def __init__(self, root: Path | str, target: str | None) -> None:
        self._root, self._target = root, target
        wanted = {
            title.lower() for title in [*target_titles(target, ()), *target_titles(target, [(target or "").lower()])]
        }
        self._cells = {title: GrowingTexts() for title in sorted(wanted)}
        self._titles: dict[str, str] = {}  # as the first member writes them
        self._seen: dict[str, None] = {}  # keys of members, for messages

    def add(self, archive: Archive, sample: _Sample) -> bool:
        """Read the members of one sample; return whether one of its cells is not blank."""
        found: dict[str, str] = {}
        for ending in _LABELS:
            if ending in sample.labels and (ending == "json" or self._target is None):
                read = self._of_json if ending == "json" else _of_text
                found = _read_member(archive, sample, ending, read)[1]
                break
        for title, into in self._cells.items():
            into.append(found.get(title, ""))
        return any(found.values())

    def _of_json(self, text: str) -> dict[str, str]:
        values, found = json.loads(text), dict[str, str]()
        if not isinstance(values, dict):
            raise ValueError(f"received {type(values).__name__}, expected keys and values")
        for key, value in values.items():
            if len(self._seen) < _MOST_KEYS:
                self._seen.setdefault(key)
            title = key.strip().lower()
            if title in found:
                raise ValueError(f"two keys are named {key!r}")
            if title in self._cells:
                self._titles.setdefault(title, key.strip())
                found[title] = cell_text(value)
        return found

    def read(self, task: str, paths: Sequence[str]) -> Target:
        """Turn the cells into a target; what does not fit is refused with the name of its image."""

        def refuse(what: str) -> NoReturn:
            raise SourceError(f"{self._root}: {what}")

        if self._target is None:
            self._titles.setdefault(_LABEL_KEY, _LABEL_KEY)
        header = list(dict.fromkeys([*self._titles.values(), *self._seen]))
        titles = target_columns(header, self._target, (), refuse)
        cells = {title: self._cells[title.lower()].texts() for title in titles}
        return read_target(
            task, cells, str(self._root), lambda row, what: refuse(f"the labels of {paths[row]!r}: {what}")
        )


def _of_text(text: str) -> dict[str, str]:
    return {_LABEL_KEY: text.strip()}


def _from_text(text: str, target: str | None) -> str:
    return text


def _from_json(text: str, target: str | None) -> str:
    key, values = target or _LABEL_KEY, json.loads(text)
    if isinstance(values, dict) and target is None and key not in values:
        return ""
    if not isinstance(values, dict) or key not in values:
        known = list(values) if isinstance(values, dict) else []
        raise ValueError(f"no key {key!r}, received {listed(known) or type(values).__name__}{nearest(key, known)}")
    value = values[key]
    if isinstance(value, dict | list | float):
        raise ValueError(
            f"{key!r} is {value!r:.40}, expected a class name or a whole number. For several labels of an image add --task "
            "multilabel, for numbers --task regression"
        )
    return "" if value is None else str(value)


# Ending of a member -> how its label is read; the first that a key has is taken.
_LABELS: dict[str, Callable[[str, str | None], str]] = {"cls": _from_text, "json": _from_json, "txt": _from_text}
_ENDINGS = ("", *TEXT_ENDINGS)  # kinds of members; the first is an image
