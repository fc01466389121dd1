"""Derive classes, splits and groups from the paths of images in a folder or an archive.

files --Reading, names of the folders--> which folders are splits, and which level is the class --> one row per image
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from features.errors import SourceError, nearest
from features.files import quoted
from features.progress import counted
from features.sources.folders import IMAGE_SUFFIXES, ODD_CHARACTERS, File
from features.sources.reading import Reading, split_of
from features.sources.splits import NOT_GIVEN, SPLIT_WORDS, SPLITS, UNLABELLED, listed

logger = logging.getLogger(__name__)
Parts = Mapping[str, Sequence[str]]  # folder -> its names from the level of splits or classes on
Row = tuple[str, int, str]  # class, index into SPLITS or NOT_GIVEN, and group


class Tree(NamedTuple):
    """The images that are kept, with their classes, given splits and groups, and the reading that gives them again."""

    files: list[File]
    names: list[str]
    splits: list[int]
    groups: list[str]
    reading: Reading


class _Layout(NamedTuple):
    """Which folders are splits (index into ``SPLITS`` by name), and on which level, from 1, the class folders are."""

    splits: Mapping[str, int]
    level: int
    grouped: bool = False  # whether folders of the other level are groups


def read_tree(root: Path | str, files: Sequence[File], folders: Sequence[str], reading: Reading, skip: int = 0) -> Tree:
    """Derive classes and splits from the paths of images; the first ``skip`` folders of each path are ignored.

    Raises
    ------
    SourceError
        If there are no images, or if it is not certain which folders are classes and which are splits.
    """
    if not files:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(
            f"{root} holds no images: {len(folders)} folder{'s were' if len(folders) > 1 else ' was'} searched for {known}. "
            "Give the folder that holds them; for training it has one folder for each class, as in cat/1.jpg and dog/1.jpg"
        )
    # Decide once per folder: there are few folders, but there may be millions of files.
    parents = [os.path.dirname(file.path) for file in files]
    parts: Parts = {parent: parent.split("/")[skip:] if parent else [] for parent in set(parents)}
    if not any(parts.values()):
        if not reading.settled and (reading.split_folders or reading.class_level):
            raise SourceError(
                f"{root} holds images and no class folders, so --split-folders and --class-level mean nothing: leave them "
                "out, or give the folder that holds the class folders"
            )
        return Tree(list(files), [""] * len(files), [NOT_GIVEN] * len(files), [], reading)
    asked = reading
    doubled = _doubled(parts, asked)
    parts = {parent: _plain(part, doubled) for parent, part in parts.items()}
    layout, reading = _decide(root, parts, asked, checked=not skip)
    if doubled and layout.splits and not reading.split_folders:  # only what is recorded is read like this again
        pairs = ",".join(f"{SPLITS[code]}={top}" for top, code in layout.splits.items())
        reading = dataclasses.replace(reading, split_folders=pairs)
    nested = {part[0] for part in parts.values() if len(part) > 1}
    rows = {parent: _row(part, layout, nested) for parent, part in parts.items()}
    classes = {row[0] for row in rows.values() if row} - {""}
    if not (reading.settled or asked.split_folders or asked.class_level):
        _check_names(root, classes, layout, nested)
    if odd := sorted(name for name in classes if ODD_CHARACTERS.search(name)):
        raise SourceError(f"{root}: the name of the class folder {odd[0]!r} is not plain UTF-8 text; rename it")
    kept = [(file, row) for file, parent in zip(files, parents, strict=True) if (row := rows[parent]) is not None]
    if not kept:
        raise SourceError(f"{root}: no image lies in a class folder; leave --class-level out, or give another folder")
    _warn_left_out(root, parents, parts, rows, layout)
    if not (reading.settled or layout.splits or asked.class_level):
        _warn_of_collections(root, parts)
    depth = 2 if layout.splits else layout.level
    used = {"/".join(part[:length]) for part in parts.values() for length in range(depth + 1)}
    inner = ["/".join(_plain(folder.split("/")[skip:], doubled)) for folder in folders]
    bare = [folder for folder in inner if folder.count("/") < depth and folder not in used]
    if bare:
        logger.warning("%s: folders without images are not classes: %s", root, listed(bare))
    names, splits, groups = ([row[column] for _, row in kept] for column in range(3))
    return Tree([file for file, _ in kept], names, splits, groups, reading)  # type: ignore[arg-type]


def _doubled(parts: Parts, reading: Reading) -> set[str]:
    """The split folders that hold one folder of their own name and nothing else, as some archives unpack to."""
    if reading.class_level == 1 or (not reading.split_folders and (reading.settled or reading.class_level)):
        return set()
    below: dict[str, set[str]] = {}
    for part in parts.values():
        below.setdefault((*part, "")[0], set()).add((*part, "", "")[1])
    doubled = {top for top, held in below.items() if held == {top} and top}
    return {top for top in doubled if top in reading.codes or split_of(top) is not None} if len(below) > 1 else set()


def _plain(part: Sequence[str], doubled: set[str]) -> Sequence[str]:
    """The names of a folder without the second of two equal ones."""
    return part[1:] if len(part) > 1 and part[0] == part[1] and part[0] in doubled else part


def _row(part: Sequence[str], layout: _Layout, nested: set[str]) -> Row | None:
    """Return class, split and group of the images in a folder; None if they are left out."""
    name = part[layout.level - 1] if len(part) >= layout.level else None
    other = part[2 - layout.level] if len(part) > 2 - layout.level else ""
    if not layout.splits:
        return None if name is None else (name, NOT_GIVEN, other if layout.grouped else "")
    if other not in layout.splits:
        return None
    if name is not None:
        return name, layout.splits[other], ""
    return ("", UNLABELLED, "") if other not in nested else None


def _warn_left_out(
    root: Path | str, parents: Sequence[str], parts: Parts, rows: Mapping[str, Row | None], layout: _Layout
) -> None:
    left_out = Counter(parent for parent in parents if rows[parent] is None)
    if not left_out:
        return
    others = sorted(
        {part[2 - layout.level] for parent in left_out if len(part := parts[parent]) > 1} - set(layout.splits)
    )
    also = f", those in {listed(others)} too" if layout.splits and others else ""
    logger.warning("%s: left out: %s beside the class folders%s", root, counted(left_out.total(), "image"), also)


def _warn_of_collections(root: Path | str, parts: Parts) -> None:
    """Log which classes were taken where no class folder holds images, only folders of its own with other names."""
    outer, inner = ({part[level] for part in parts.values() if len(part) == 2} for level in (0, 1))
    if len(inner) > 1 and {len(part) for part in parts.values()} == {2}:
        logger.warning(
            "%s: the classes are %s; no image lies in them directly. If the folders inside are the classes (%s), add "
            "--class-level 2", root, listed(sorted(outer), 3), listed(sorted(inner), 3),
        )  # fmt: skip


def _decide(root: Path | str, parts: Parts, reading: Reading, *, checked: bool) -> tuple[_Layout, Reading]:
    """Find out which folders are splits and which are classes; return the reading that needs no guess."""
    level = reading.class_level or 2
    present = {part[2 - level] for part in parts.values() if len(part) > 2 - level}
    absent = [folder for folder in reading.codes if folder not in present]
    if absent and not reading.settled:
        raise SourceError(
            f"{root}: no folder {absent[0]!r} with images where the split folders are expected, only "
            f"{listed(sorted(present))}{nearest(absent[0], present)}"
        )
    if (reading.split_folders or reading.class_level) and not absent:  # else the folders have been renamed since
        return _Layout(reading.codes, level, grouped=not reading.codes), reading
    tops = {part[0] for part in parts.values() if part}
    plain = {top: SPLIT_WORDS[top.lower()] for top in sorted(tops) if top.lower() in SPLIT_WORDS}
    if not reading.settled and plain.keys() != tops and (found := _recognised(root, parts, tops)):
        text = ",".join(f"{SPLITS[code]}={top}" for top, code in found.items())
        logger.warning(
            "%s: split folders, as their names say: %s. If they are classes, add --class-level 1",
            root, text.replace(",", ", "),
        )  # fmt: skip
        return _Layout(found, 2), dataclasses.replace(reading, split_folders=text)
    nested = {part[0] for part in parts.values() if len(part) > 1}
    codes = set(plain.values())
    if (0 in codes or len(codes) > 1) and (plain.keys() == tops or plain.keys() & nested):
        _check_splits(root, plain, nested, tops)
        return _Layout(plain, 2), reading
    if checked:
        _check_depth(root, parts)
    return _Layout({}, 1), reading


def _recognised(root: Path | str, parts: Parts, tops: set[str]) -> dict[str, int]:
    """Return the splits of the top folders if all have names of splits; empty if they are not alike.

    Raises
    ------
    SourceError
        If all hold the same folders, so that each of the two levels may be the classes.
    """
    below: dict[str, set[str]] = {top: set() for top in sorted(tops)}
    for part in parts.values():
        if len(part) > 1:
            below[part[0]].add(part[1])
    holders = Counter(name for held in below.values() for name in held)
    names = holders.keys()
    alike = len(names) > 1 and all(2 * len(held) >= len(names) for held in below.values())
    alike = alike and 2 * sum(count > 1 for count in holders.values()) >= len(names)
    found = {top: split_of(top, alone=not alike) for top in below}
    codes = [code for code in found.values() if code is not None]
    certain = len(codes) == len(set(codes)) == len(tops) > 1 and "," not in "".join(tops)
    if certain and all(below[top] or found[top] == 2 for top in tops):
        return dict(zip(found, codes, strict=True))
    if not alike:
        return {}
    first, last = next(iter(below)), max(below)
    inner = {split_of(name, alone=True) for name in names}
    if None not in inner and len(inner) == len(names):  # cat/train, cat/test, dog/train, dog/test
        pairs = ",".join(f"{SPLITS[split_of(name) or 0]}={name}" for name in sorted(names))
        way = f"--class-level 1 --split-folders {quoted(pairs)}"
    else:
        way = f"--split-folders {quoted(f'train={first},test={last}')}"
    raise SourceError(
        f"{root}: {listed(list(below), 4)} all hold the same folders, {listed(sorted(names), 4)}, so it is not certain which "
        f"are the classes. If some are splits, rename them to train, validation and test, or add {way}. Otherwise add "
        f"--class-level 2 if {next(iter(sorted(names)))!r} is a class, or --class-level 1 if {first!r} is one; the other "
        "level is then kept as the group of the images, which is never divided between splits."
    )


def _check_names(root: Path | str, classes: set[str], layout: _Layout, nested: set[str]) -> None:
    """Refuse classes that are named like splits; below split folders only if all are, as a class may be called train."""
    alone = sorted(name for name in classes if split_of(name, alone=True) is not None)
    if not alone or (layout.splits and len(alone) < len(classes)):
        return
    pairs = layout.splits or {top: code for top in sorted(nested) if (code := split_of(top)) is not None}
    way = "--split-folders " + quoted(",".join(f"{SPLITS[code]}={top}" for top, code in pairs.items()))
    splits = f"If they are splits, add {way}, which leaves other folders out. " if pairs and not layout.splits else ""
    raise SourceError(
        f"{root}: {listed(alone)} would be {'classes' if len(alone) > 1 else 'a class'}, but such names are those of splits. "
        "Put the images of each class into a folder of its own, as in train/cat/1.jpg; or, if the file names hold the "
        f"classes, write a CSV manifest path,label,split. {splits}"
        f"If they are classes, add {way if layout.splits else '--class-level 1'}."
    )


def _check_splits(root: Path | str, plain: Mapping[str, int], nested: set[str], tops: set[str]) -> None:
    if others := tops - plain.keys():
        pairs = ",".join(f"{SPLITS[code]}={top}" for top, code in plain.items())
        raise SourceError(
            f"{root} mixes split folders ({listed(sorted(plain))}) with other folders of images "
            f"({listed(sorted(others))}): move one kind elsewhere, write a CSV manifest, or leave the others out with "
            f"--split-folders {pairs}"
        )
    by_code: dict[int, str] = {}
    for top, code in plain.items():
        if code in by_code:
            raise SourceError(f"{root}: {by_code[code]!r} and {top!r} both mean {SPLITS[code]}; merge or rename them")
        by_code[code] = top
        if top not in nested and SPLITS[code] != "test":
            raise SourceError(
                f"{os.path.join(root, top)} holds images but no class folders; expected {top}/CLASS/IMAGE"
            )


def _check_depth(root: Path | str, parts: Parts) -> None:
    """Refuse a folder whose class folders lie inside a single other folder: all images would form one class."""
    common = os.path.commonpath(parts)
    if common and common not in parts:
        depth = common.count("/") + 1
        below = sorted({part[depth] for part in parts.values()})
        raise SourceError(
            f"{root} holds a single folder, {parts[next(iter(parts))][0]!r}, and the folders with images are inside "
            f"({listed(below)}): give {os.path.join(root, common)}. If they are all one class, write a CSV manifest"
        )
