"""How labels are read from a source, where its plain form does not decide it: which folders are classes, which labels are one."""

from __future__ import annotations

import dataclasses
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from features.errors import ConfigurationError, nearest
from features.sources.splits import SPLIT_WORDS, SPLITS, number_or_none

logger = logging.getLogger(__name__)

MISSING_WORDS = frozenset({"nan", "null", "n/a", "#n/a", "<na>"})  # "none" and "missing" may well be classes
_NAMED = 8  # groups of labels that a warning lists

# Words of folders that hold splits. Around them there may be numbers and words that say nothing, as in "seg_train".
_WORDS = {"training": 0, "trainval": 0, "trn": 0, "validate": 1, "dev": 1, "testing": 2, "tst": 2, **SPLIT_WORDS}
# fmt: off
_FILLERS = frozenset({
    "set", "sets", "data", "dataset", "image", "images", "img", "imgs", "jpg", "photos", "pictures", "seg", "split", "splits",
    "folder", "dir", "samples",
})
# fmt: on
_GLUED = re.compile("(?:set|sets|data|dataset|images|imgs|img)$")  # as in "trainset"


@dataclasses.dataclass(frozen=True)
class Reading:
    """How classes, splits and groups are read from a source.

    Parameters
    ----------
    split_folders : str
        ``SPLIT=FOLDER`` pairs, separated by commas, such as ``train=Training,test=Testing``; a split may be given several
        folders. They are on the level of folders that is not ``class_level``.
    class_level : {0, 1, 2}
        Level of the class folders, counted from 1 for the outermost. The folders of the other level become the group of
        their images, unless they are ``split_folders``. 0: 2 with ``split_folders``, else decided by the folders' names.
    merge_labels : bool
        Whether labels that look alike become one class, the most frequent of them, and words such as ``nan`` no label.
    settled : bool
        Whether nothing may be guessed or refused: folders are split folders only if they are named ``train``,
        ``validation``, ``val``, ``valid`` and ``test``. Stores and runs without a recorded reading were read like this.

    Raises
    ------
    ConfigurationError
        If a value is none of these.
    """

    split_folders: str = ""
    class_level: int = 0
    merge_labels: bool = False
    settled: bool = False

    def __post_init__(self) -> None:
        if self.class_level not in (0, 1, 2) or isinstance(self.class_level, bool):
            raise ConfigurationError(f"class level: received {self.class_level!r}, expected 1 or 2")
        _ = self.codes

    @classmethod
    def recorded(cls, fields: Mapping[str, Any]) -> Reading:
        """Return the reading that a store or run has recorded; empty means that the plain form of the source decided."""
        if not isinstance(fields, Mapping):
            raise ConfigurationError(f"reading: received {fields!r:.40}, expected a mapping")
        known = {field.name: type(field.default) for field in dataclasses.fields(cls) if field.name != "settled"}
        if wrong := sorted(name for name, value in fields.items() if type(value) is not known.get(name)):
            raise ConfigurationError(f"reading: received {wrong[0]!r}, expected {', '.join(known)}")
        return cls(**fields, settled=True)

    @property
    def record(self) -> dict[str, Any]:
        """What a store or run records: the fields that are not at their default; most often none."""
        record = dataclasses.asdict(dataclasses.replace(self, settled=False))
        return {name: value for name, value in record.items() if value}

    @property
    def codes(self) -> dict[str, int]:
        """Index into ``SPLITS`` by the name of a split folder."""
        codes: dict[str, int] = {}
        for pair in self.split_folders.split(",") if self.split_folders else ():
            word, equals, folder = pair.partition("=")
            code, folder = SPLIT_WORDS.get(word.strip().lower()), folder.rstrip("/")
            if not equals or code is None or not folder or folder in codes:
                hint = nearest(word.strip(), SPLITS[:3]) if equals else ""
                raise ConfigurationError(
                    f"split folders: received {pair.strip()!r}, expected SPLIT=FOLDER pairs with the splits train, "
                    f"validation and test and each folder once, such as train=Training,test=Testing{hint}"
                )
            codes[folder] = code
        return codes


def split_of(name: str, *, alone: bool = False) -> int | None:
    """Return the split, an index into ``SPLITS``, that the name of a folder contains as a word; None if it names no one.

    Parameters
    ----------
    name : str
        Name of a folder.
    alone : bool
        Whether there may be no other words beside it but numbers and words such as "set" and "images".

    Examples
    --------
    >>> split_of("TrainingSet"), split_of("seg_test", alone=True), split_of("fold_1")
    (0, 2, None)
    >>> split_of("test tubes"), split_of("test tubes", alone=True)
    (2, None)
    """
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\\W\\d_]+", name)]
    words = [word if word in _WORDS else _GLUED.sub("", word) or word for word in words]
    found = {_WORDS[word] for word in words if word in _WORDS}
    others = [word for word in words if word not in _WORDS and word not in _FILLERS]
    return found.pop() if len(found) == 1 and not (alone and others) else None


def look_alikes(counts: Mapping[str, int]) -> list[list[str]]:
    """Group the labels that a person would take for one: equal up to case, blanks, Unicode form or the form of a number.

    Parameters
    ----------
    counts : mapping of str to int
        Number of images by label.

    Returns
    -------
    list of list of str
        Groups of at least two labels, each with the most frequent label first; sorted.

    Examples
    --------
    >>> look_alikes({"Cat": 5, "cat ": 9, "dog": 3, "0": 1, "0.0": 1})
    [['0', '0.0'], ['cat ', 'Cat']]
    """
    groups: dict[object, list[str]] = {}
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        plain = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        number = number_or_none(plain) if plain.isascii() and "_" not in plain else None
        # from 2^53 on, and for NaN, a float is not one number
        groups.setdefault(number if number is not None and abs(number) < 2**53 else plain, []).append(label)
    return sorted(group for group in groups.values() if len(group) > 1)


def read_labels(description: str, names: Sequence[str], reading: Reading) -> list[str]:
    """Merge labels that look alike if ``reading`` says so, else warn of them; empty names are images without a label."""
    counts = Counter(name for name in names if name)
    alike = look_alikes(counts)
    missing = [name for name in sorted(counts) if name.strip().casefold() in MISSING_WORDS]
    if reading.merge_labels:
        merged = {other: group[0] for group in alike for other in group[1:]} | dict.fromkeys(missing, "")
        return [merged.get(name, name) for name in names]
    if reading.settled:
        return list(names)

    def shown(labels: Sequence[str]) -> str:
        return " and ".join(f"{label!a} ({counts[label]})" for label in labels)

    more = f", and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
    if alike:
        logger.warning(
            "%s: classes that look alike: %s%s; the numbers are images. --merge-labels makes each a single class",
            description, "; ".join(shown(group[:3]) for group in alike[:_NAMED]), more,
        )  # fmt: skip
    if missing:
        logger.warning(
            "%s: the class %s looks like a missing label; the number is images. --merge-labels leaves them unlabelled",
            description, shown(missing[:_NAMED]),
        )  # fmt: skip
    return list(names)
