"""Read WebDataset tars, such as ``shard-{000000..000099}.tar``: members of one key are one image and its label.

    pattern --expanded()--> tars --open_archive()--> members --by key--> image + .cls, .json or .txt --> one row per image

Tars are listed once, in order. Images are then read where they lie, so a run that was killed goes on inside a tar.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from features.errors import SourceError, UnreadableImageError, nearest
from features.progress import counted
from features.sources.archives import Archive, Trust, open_archive
from features.sources.folders import IMAGE_SUFFIXES, ODD_CHARACTERS, File, is_ignored, suffix_of
from features.sources.reading import split_of
from features.sources.splits import NOT_GIVEN, listed

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_ALL = "{}"  # all numbers that there are
MOST_TARS = 100_000
_LABEL_BYTES = 1 << 20  # of a member that holds a label
_LONGEST_LABEL = 200  # characters; longer ones are captions
_LABEL_KEY = "label"  # of a .json member


class Samples(NamedTuple):
    """One row per image, in the order of the files."""

    root: Path
    files: list[File]
    names: list[str]
    splits: list[int]
    groups: list[str] | None
    read: Callable[[str], bytes]


def is_pattern(source: str) -> bool:
    """Whether the name of a source stands for several tars."""
    return _RANGE.search(source) is not None or _ALL in source


def root_of(pattern: str) -> Path:
    """Return what names the files of a pattern whatever their numbers, so that more of them change nothing about the others."""
    return Path(os.path.abspath(os.path.expanduser(_RANGE.sub(_ALL, pattern))))


def expanded(pattern: str) -> list[str]:
    """Return the names that a pattern stands for, in order; ``{}`` stands for all numbers that there are.

    Raises
    ------
    SourceError
        If it counts down, stands for more than 100,000, or there are no such files.

    Examples
    --------
    >>> expanded("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    if _ALL in pattern:
        wanted = re.compile(r"(\d+)".join(map(re.escape, pattern.split(_ALL))))
        found = [name for name in glob.glob(glob.escape(pattern).replace(_ALL, "*")) if wanted.fullmatch(name)]
        if not found:
            raise SourceError(f"{pattern}: no such files; {{}} stands for the numbers in their names")
        return sorted(found, key=lambda name: [*map(int, wanted.fullmatch(name).groups())])  # type: ignore[union-attr]
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


def is_webdataset(archive: Archive) -> bool:
    """Whether the images of a tar have labels beside them under the same key, and no class folders."""
    labels = {key for key, ending in map(_key, archive.members) if ending in _LABELS}
    images = [member for member in archive.members if suffix_of(member) in IMAGE_SUFFIXES]
    folders = {os.path.dirname(member) for member in images}
    return bool(labels) and len(folders) == 1 and any(_key(member)[0] in labels for member in images)


def open_tars(pattern: str, trust: Trust, target: str | None, *, labelled: bool = True) -> Samples:
    """List the images of the tars that ``pattern`` stands for; see ``samples_of``.

    Raises
    ------
    SourceError
        As there; and if a tar is missing or damaged.
    """
    paths = [Path(os.path.abspath(os.path.expanduser(name))) for name in expanded(pattern)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise SourceError(
            f"{pattern}: {len(missing)} of {len(paths)} files are missing: {listed(missing)}. Put them there, or change the numbers"
        )
    return samples_of(root_of(pattern), [open_archive(path, trust) for path in paths], target, labelled=labelled)


def samples_of(root: Path, archives: Sequence[Archive], target: str | None, *, labelled: bool = True) -> Samples:
    """List the images of tars with their labels; no image is read.

    Parameters
    ----------
    root : Path
        What names all tars: their pattern, or the only tar itself.
    archives : sequence of Archive
        The tars.
    target : str, optional
        Key of the label in ``.json`` members, ``label`` by default. If given, ``.cls`` and ``.txt`` members are not used.
    labelled : bool
        Whether labels are needed.

    Raises
    ------
    SourceError
        If a key has two images, a label cannot be read, or there are no images; the message names the member.
    """
    files, names, tars = list[File](), list[str](), dict[str, Archive]()
    splits, bare, alone = list[int](), list[str](), list[str]()
    common = os.path.commonpath([archive.path.parent for archive in archives])
    for archive in archives:
        prefix = "" if archive.path == root else f"{archive.path.relative_to(common)}/"
        tars[prefix] = archive
        status = os.stat(archive.path)
        found = _by_key(archive)
        before = len(files)
        for key, sample in found.items():
            if not sample.image:
                alone.append(f"{prefix}{key}")
                continue
            name = _label(archive, sample, target) if labelled else ""
            if labelled and not name:
                bare.append(prefix + sample.image)
            files.append(File.of(prefix + sample.image, status, archive.members[sample.image].size))
            names.append(name)
        code = split_of(archive.path.name.split(".")[0])
        splits += [NOT_GIVEN if code is None else code] * (len(files) - before)
    if not files:
        raise SourceError(
            f"{root}: no images in {counted(len(archives), 'tar')}; expected members such as 0001.jpg and 0001.cls"
        )
    for lacking, what in ((bare, "no label"), (alone, "a label and no image")):
        if lacking:
            logger.warning("%s: %s %s: %s", root, counted(len(lacking), "key", "has"), what, listed(lacking))
    if NOT_GIVEN in splits:  # names of some tars only say little
        splits = [NOT_GIVEN] * len(files)
    return Samples(root, files, _padded(names), splits, None, _Reader(tars))


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
    image: str = ""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)  # ending -> member


def _key(member: str) -> tuple[str, str]:
    """Return key and ending of a member: what comes before and after the first dot of its name."""
    folder, slash, name = member.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _by_key(archive: Archive) -> dict[str, _Sample]:
    found: dict[str, _Sample] = {}
    for member in archive.members:
        if any(is_ignored(part) for part in member.split("/")):
            continue
        key, ending = _key(member)
        if ending in _LABELS:
            found.setdefault(key, _Sample()).labels[ending] = member
        elif f".{ending}" in IMAGE_SUFFIXES:
            sample = found.setdefault(key, _Sample())
            if sample.image:
                _refuse(archive, member, f"and {sample.image!r} have one key: expected one image for each key")
            sample.image = member
    return found


def _refuse(archive: Archive, member: str, problem: str) -> NoReturn:
    raise SourceError(f"{archive.path}: the member {member!r} {problem}")


def _label(archive: Archive, sample: _Sample, target: str | None) -> str:
    """Return the label of a sample; empty if it has none."""
    for ending, read in _LABELS.items():
        if (member := sample.labels.get(ending)) is None or (target is not None and ending != "json"):
            continue
        if archive.members[member].size > _LABEL_BYTES:
            _refuse(archive, member, f"has {archive.members[member].size} bytes; expected a label")
        try:
            text = archive.read(member).decode("utf-8-sig")
            name = read(text, target).strip()
        except UnreadableImageError as error:
            _refuse(archive, member, f"is damaged: {error.detail}. Download or pack the tar again")
        except (ValueError, TypeError, RecursionError) as error:
            _refuse(archive, member, f"holds no label: {error}")
        if len(name) > _LONGEST_LABEL or ODD_CHARACTERS.search(name):
            _refuse(
                archive, member, f"holds {name[:40]!r}, which is no class name; name the class in .cls or .json members"
            )
        return name
    return ""


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
        raise ValueError(f"{key!r} is {value!r:.40}, expected a class name or a whole number")
    return "" if value is None else str(value)


# Ending of a member -> how its label is read; the first that a key has is taken.
_LABELS: dict[str, Callable[[str, str | None], str]] = {"cls": _from_text, "json": _from_json, "txt": _from_text}


def _padded(names: list[str]) -> list[str]:
    """Write whole numbers with leading zeros, so that they sort as numbers."""
    given = [name for name in names if name]
    if not all(name.isascii() and name.isdecimal() for name in given):
        return names
    width = max((len(str(int(name))) for name in given), default=0)
    return [f"{int(name):0{width}d}" if name else "" for name in names]
