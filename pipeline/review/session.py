"""What the page shows and does: rows in an order, decisions on disk before anyone hears of them, and undoing.

    labels.csv <--append, fsync-- decisions <-- rows and a value;   filters + order + scores --> row numbers --> items

Test rows are not shown: labels that were corrected by looking at a head's mistakes would make every later test figure too good.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import RequestError, nearest
from features.files import printable
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from pipeline.labels.file import (
    EXCLUDE,
    LABEL,
    UNKNOWN,
    WITHDRAWN,
    Decision,
    Labels,
    append_decisions,
    class_of,
    new_decision,
    value_of,
)
from pipeline.labels.overlay import target_of
from pipeline.review.learning import TEST, Learner, Scores
from pipeline.review.rows import Catalogue, Copies

ORDERS = ("suspicion", "uncertainty", "class", "file", "similar")
OPEN, KEPT, CHANGED, IS_UNKNOWN, EXCLUDED = range(5)
STATES = ("open", "kept", "changed", "unknown", "excluded")
MOST_ROWS = 200_000  # rows of one answer about an order
MOST_ITEMS = 400  # rows of one answer about items
MOST_DECIDED = 5_000  # rows of one decision
MOST_GROUPS = 300  # groups that a menu lists
MOST_CLASSES = 1_000
MOST_NAME = 100  # characters of a new class
UNDOABLE = 50  # last batches of the file that a new page can undo


@dataclasses.dataclass(frozen=True)
class Query:
    """Which rows, and in which order; empty text means that a filter is not set.

    Parameters
    ----------
    by : str
        One of `ORDERS`.
    near : int
        Row that the others are compared with, for ``similar``.
    label, predicted : str
        Name of a class; ``label`` is the effective one.
    split, state : str
        One of ``SPLITS`` or `STATES`; ``state`` may also be ``decided`` or ``flipped``.
    group : str
        Name of a group.
    text : str
        Part of a path, upper and lower case alike.
    """

    by: str = "suspicion"
    near: int = -1
    label: str = ""
    predicted: str = ""
    split: str = ""
    state: str = ""
    group: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("order", self.by, ORDERS),
            ("split", self.split, ("", *SPLITS)),
            ("state", self.state, ("", "decided", "flipped", *STATES)),
        ):
            if value not in known:
                raise RequestError(
                    f"{name}: received {value!r}, expected one of {', '.join(known)}{nearest(value, known)}"
                )


class Session:
    """One review of a store: what was decided, what the head says, and what the page asks for. Many threads may use it.

    Parameters
    ----------
    store : FeatureStore
        The store, without decisions.
    path : Path
        The labels file. It is made with the first decision.
    by : str
        Who decides; recorded in each row of the file.
    tell : callable, optional
        Called with the name and the content of each event that all open pages should hear of.
    """

    def __init__(
        self, store: FeatureStore, path: Path, *, by: str, tell: Callable[[str, Any], None] = lambda name, value: None
    ) -> None:
        self.store, self.path, self.by, self._tell = store, path, by, tell
        table = store.images
        self.catalogue, self.copies = Catalogue(store.classes), Copies(table.sha256)
        self._given = table.splits != TEST
        self.shown = self._given  # without rows that decisions have made test rows, as their group is one
        self._lock, self._writing = threading.RLock(), threading.Lock()
        self._texts = [printable(path).lower() for path in table.paths]
        self._group_names, self._group_codes = self._groups()
        self._labels = table.labels.copy()
        self._states = np.zeros(len(store), np.int8)
        self._by = np.full(len(store), -1, np.int32)
        self._people = Catalogue([])
        self._target = target_of(store)
        self._known: dict[str, tuple[Decision, str]] = {}  # decisions that can be taken back, and to what, by id
        self._batches: list[list[str]] = []
        self._clock = 0  # counts writes; the page keeps the latest of what it hears about a row
        self._size = 0  # of the file when we last wrote it
        self._scores = Scores.none(len(store))
        self.learner = Learner(store, path, self.catalogue, self._hear)

    def _groups(self) -> tuple[tuple[str, ...], np.ndarray]:
        groups = self.store.images.groups
        if groups is None:
            return (), np.full(len(self.store), -1)
        names, codes = np.unique(np.array(groups, dtype=object), return_inverse=True)
        return tuple(names), codes

    # -- decisions
    def decide(self, rows: Sequence[int], value: str) -> dict[str, Any]:
        """Write a decision about some rows to the file, and return once it is on the disk.

        Parameters
        ----------
        rows : sequence of int
            Rows that are shown; the decision holds for all rows of the same bytes.
        value : str
            As in the labels file: a class, which may be new, ``unknown`` or ``exclude``. Empty: keep what each row has.

        Returns
        -------
        dict
            ``batch`` for `undo`, ``saved`` decisions in this batch, the ``rows`` that changed, their `items`, and `counts`.

        Raises
        ------
        RequestError
            If a row is not shown, or the value cannot be a class.
        LabelsError, StoreError
            If the file cannot be written; then nothing has changed.
        """
        self._check_value(value)
        with self._writing:
            with self._lock:
                firsts = {bytes(self.store.images.sha256[row]): row for row in self._shown_rows(rows)}
                held = {row: self._value(row) for row in firsts.values()}
                decisions = [self._new(row, value or was, was) for row, was in held.items() if value or was]
                is_open = [self._states[row] == OPEN for row, was in held.items() if value or was]
            return self._write(
                decisions,
                back=[WITHDRAWN if first else one.earlier for one, first in zip(decisions, is_open, strict=True)],
            )

    def undo(self, batch: Sequence[str]) -> dict[str, Any]:
        """Take a batch back by further rows of the file; an image that has another label by now keeps it.

        Raises
        ------
        RequestError
            If nothing can be taken back.
        """
        with self._writing:
            with self._lock:
                decisions = []
                for one, back in (self._known[name] for name in dict.fromkeys(batch) if name in self._known):
                    rows = self.copies.rows(bytes.fromhex(one.sha256))
                    if len(rows) and self._value(int(rows[0])) == one.value:
                        decisions.append(self._new(int(rows[0]), back, one.value))
            answer = self._write(decisions) if decisions else None
            with self._lock:  # only now: what could not be written can be taken back later
                for name in batch:
                    self._known.pop(name, None)
                self._batches = [names for names in self._batches if set(names) != set(batch)]
            if answer is None:
                raise RequestError("there is nothing to take back: these images have been decided about again since")
            return answer

    def _new(self, row: int, value: str, earlier: str) -> Decision:
        table = self.store.images
        return new_decision(
            table.sha256[row], table.paths[row], value, target=self._target, earlier=earlier, by=self.by
        )

    def _write(self, decisions: list[Decision], *, back: Sequence[str] = ()) -> dict[str, Any]:
        """Append to the file, wait for the disk, and only then believe it; `undo` leads to the values in ``back``."""
        if decisions:
            append_decisions(self.path, decisions)
        with self._lock:
            self._size = self.path.stat().st_size if decisions else self._size
            self._clock += 1
            changed = [row for one in decisions for row in self._apply(one)]
            ids = [one.id for one in decisions]
            if back:
                self._known |= {one.id: (one, value) for one, value in zip(decisions, back, strict=True)}
                self._batches.append(ids)
            counts = self.counts()
            rows = [row for row in changed if self.shown[row]]
            items = self.items(rows[:MOST_ITEMS])
        self.learner.wake()
        self._tell("decided", {"items": items, "more": len(rows) > MOST_ITEMS, "counts": counts})
        return {"batch": ids, "saved": len(ids), "rows": rows, "items": items, "counts": counts}

    def _apply(self, decision: Decision) -> list[int]:
        """Note one decision; return its rows."""
        rows = self.copies.rows(bytes.fromhex(decision.sha256))
        self._set(rows, decision.value, self._people.code(decision.by))
        return [int(row) for row in rows]

    def _set(self, rows: np.ndarray, value: str, by: int | np.ndarray) -> None:
        """Let a value hold for some rows."""
        original, name = self.store.images.labels[rows], class_of(value)
        self._by[rows] = by
        if value == WITHDRAWN:
            self._labels[rows], self._states[rows], self._by[rows] = original, OPEN, -1
        elif name is None:
            self._labels[rows], self._states[rows] = -1, EXCLUDED if value == EXCLUDE else IS_UNKNOWN
        else:
            code = self.catalogue.code(name)
            self._labels[rows], self._states[rows] = code, np.where(original == code, KEPT, CHANGED)

    def _check_value(self, value: str) -> None:
        if not isinstance(value, str):
            raise RequestError(f"value: received {value!r:.40}, expected the name of a class")
        name = class_of(value)
        if name is not None and self.catalogue.find(name) < 0:
            if not 0 < len(name) <= MOST_NAME or not name.isprintable() or name != name.strip():
                raise RequestError(f"class {name[:MOST_NAME]!r}: expected 1 to {MOST_NAME} printable characters")
            if len(self.catalogue.names) >= MOST_CLASSES:
                raise RequestError(
                    f"class {name!r}: there are {MOST_CLASSES} classes already, and no more can be added here"
                )

    def _shown_rows(self, rows: Sequence[int], most: int = MOST_DECIDED) -> Sequence[int]:
        if not isinstance(rows, list) or not 0 < len(rows) <= most:
            raise RequestError(f"rows: expected a list of 1 to {most} rows")
        for row in rows:
            if type(row) is not int or not 0 <= row < len(self._given) or not self._given[row]:
                raise RequestError(f"row {row!r:.20}: expected the number of a row that is shown")
        return rows

    def _original(self, row: int) -> str:
        """The label that the store has, as a value."""
        label = int(self.store.images.labels[row])
        return WITHDRAWN if label < 0 else value_of(self.store.classes[label])

    def _value(self, row: int) -> str:
        """What holds for a row now, as a value."""
        state, label = self._states[row], int(self._labels[row])
        if state in (EXCLUDED, IS_UNKNOWN):
            return EXCLUDE if state == EXCLUDED else UNKNOWN
        return WITHDRAWN if label < 0 else value_of(self.catalogue.names[label])

    # -- what the learner says
    def _hear(self, kind: str, value: Any) -> None:
        if kind == "scores":
            with self._lock:
                self._scores = value
        elif kind == "labels":
            self.adopt(value)
        elif kind == "splits":
            with self._lock:
                self.shown = self._given & (value != TEST)
        else:
            self._tell(kind, value)

    def adopt(self, labels: Labels) -> None:
        """Take over what the file says, which other programs and people may have written."""
        with self._writing, self._lock:
            if labels.size < self._size <= _size_of(self.path):
                return  # read before our last decision was written; the next look sees it
            self._clock += 1
            before = self._labels.copy(), self._states.copy()
            places = labels.latest(self.store.images.sha256, self._target, LABEL, "")
            rows = np.flatnonzero(places >= 0)
            self._labels[:], self._states[:], self._by[:] = self.store.images.labels, OPEN, -1
            people = np.array([self._people.code(name) for name in labels.people.words], np.int32)
            values, codes = labels.values.codes[places[rows]], labels.people.codes[places[rows]]
            for value in np.unique(values).tolist():
                inside = values == value
                self._set(rows[inside], labels.values.words[value], people[codes[inside]])
            if not self._size:
                self._batches = self._batches_of(labels.decisions[-UNDOABLE:] if len(labels) else [])
            self._size = labels.size
            same = all(np.array_equal(*pair) for pair in zip(before, (self._labels, self._states), strict=True))
            counts = self.counts()
        if not same:
            self._tell("decided", {"items": [], "more": True, "counts": counts})

    def _batches_of(self, decisions: Sequence[Decision]) -> list[list[str]]:
        """Make each of an earlier session's last decisions one that can be taken back."""
        held: dict[str, str] = {}  # the last value of each image, of those decided here
        known = {}
        for one in decisions:
            rows = self.copies.rows(bytes.fromhex(one.sha256))
            if not len(rows) or one.target not in (self._target, LABEL, ""):
                continue
            if one.value != WITHDRAWN:
                usual = WITHDRAWN if one.earlier == self._original(int(rows[0])) else one.earlier
                known[one.id] = one, held.get(one.sha256, usual)
            held[one.sha256] = one.value
        self._known |= known
        return [[name] for name in known]

    # -- what the page asks
    def counts(self) -> dict[str, Any]:
        """Count the shown rows by state and by effective class."""
        with self._lock:
            states = Counter(self._states[self.shown].tolist())
            labels = self._labels[self.shown]
            classes = np.bincount(labels[labels >= 0], minlength=len(self.catalogue.names))
            return {
                "states": {name: states.get(k, 0) for k, name in enumerate(STATES)},
                "classes": [
                    {"name": name, "value": value_of(name), "count": int(count)}
                    for name, count in zip(self.catalogue.names, classes.tolist(), strict=False)
                ],
                "unlabelled": int((labels < 0).sum()),
            }

    def describe(self) -> dict[str, Any]:
        """Describe the session for a page that has just been opened."""
        with self._lock:
            splits = self.store.images.splits
            groups = self._group_codes[self.shown & (self._group_codes >= 0)]
            sizes = np.bincount(groups, minlength=len(self._group_names))
            largest = np.argsort(-sizes, kind="stable")[:MOST_GROUPS].tolist()
            return {
                "format": 1,
                "title": printable(self.store.path.name),
                "file": printable(str(self.path)),
                "by": printable(self.by),
                "images": int(self.shown.sum()),
                "hidden": int((~self.shown).sum()),
                "original_classes": len(self.store.classes),
                "splits": [
                    {"name": name, "count": int(count)}
                    for k, name in enumerate(SPLITS)
                    if k != TEST and (count := (splits == k).sum())
                ],
                "groups": [{"name": self._group_names[k], "count": int(sizes[k])} for k in largest if sizes[k]],
                "counts": self.counts(),
                "learning": self.learner.summary(),
                "undo": self._batches[-UNDOABLE:],
            }

    def order(self, query: Query) -> dict[str, Any]:
        """Return the numbers of the rows of a query, in its order; at most `MOST_ROWS`, and how many there are."""
        with self._lock:
            rows = np.flatnonzero(self._mask(query))
            key = self._key(query, rows)
            chosen = rows if key is None else rows[np.argsort(key, kind="stable")]
        return {"rows": chosen[:MOST_ROWS].tolist(), "total": len(chosen)}

    def _mask(self, query: Query) -> np.ndarray:
        mask: np.ndarray = self.shown.copy()
        if query.label:
            mask &= self._labels == self._code(query.label)
        if query.split:
            mask &= self.store.images.splits == SPLITS.index(query.split)
        if query.group:
            mask &= self._group_codes == _place(self._group_names, query.group)
        if query.predicted:
            mask &= self._scores.predicted == self._code(query.predicted)
        if query.state == "decided":
            mask &= self._states != OPEN
        elif query.state == "flipped":
            flipped = np.zeros(len(mask), bool)
            flipped[self._scores.flipped] = True
            mask &= flipped
        elif query.state:
            mask &= self._states == STATES.index(query.state)
        if query.text:
            wanted = query.text.lower()
            mask &= np.fromiter((wanted in text for text in self._texts), bool, len(mask))
        return mask

    def _code(self, name: str) -> int:
        """The code of a class; a number that no row has if there is none of this name."""
        code = self.catalogue.find(name)
        return code if code >= 0 else -9

    def _key(self, query: Query, rows: np.ndarray) -> np.ndarray | None:
        """Numbers to sort the rows by, ascending; None: as in the store."""
        key: np.ndarray | None = None
        if query.by == "class":
            labels = self._labels[rows]
            key = np.where(labels < 0, len(self.catalogue.names), labels)
        elif query.by == "similar":
            if not 0 <= query.near < len(self.shown) or not self.shown[query.near]:
                raise RequestError(f"near: received {query.near}, expected a row that is shown")
            key = self.learner.distances(query.near)[rows]
        elif query.by == "uncertainty":
            key = self._scores.margin[rows]
        elif query.by == "suspicion":
            key = -self._scores.suspicion[rows]  # NaN comes last
        return key

    def items(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Describe rows for their tiles."""
        with self._lock:
            checked = self._shown_rows(list(rows), MOST_ITEMS) if rows else []
            return [self._item(row) for row in checked if self.shown[row]]

    def _item(self, row: int) -> dict[str, Any]:
        table, names = self.store.images, self.catalogue.names
        scores, label, original, by = self._scores, self._labels[row], table.labels[row], self._by[row]
        path = printable(table.paths[row])
        item = {
            "row": row,
            "clock": self._clock,
            "path": path,
            "name": path.rpartition("/")[2],
            "label": names[label] if label >= 0 else "",
            "original": names[original] if original >= 0 else "",
            "split": SPLITS[table.splits[row]],
            "group": printable(table.groups[row]) if table.groups is not None else "",
            "state": STATES[self._states[row]],
            "by": printable(self._people.names[by]) if by >= 0 else "",
            "width": int(table.widths[row]),
            "height": int(table.heights[row]),
        }
        if scores.predicted[row] >= 0:
            suspicion = float(scores.suspicion[row])
            item |= {
                "predicted": names[scores.predicted[row]],
                "confidence": round(float(scores.confidence[row]), 4),
                "suspicion": None if np.isnan(suspicion) else round(suspicion, 4),
            }
        return item

    def detail(self, row: int) -> dict[str, Any]:
        """Describe one row for the large view: as `items`, with the classes that the head finds most probable."""
        described = self.items([row])
        if not described:
            raise RequestError(f"row {row}: has become a row of the test split, like its group, and is not shown")
        item = described[0]
        with self._lock:
            scores = self._scores
        if scores.heads:
            head = scores.heads[scores.judges[row]]
            chances = head.probabilities(self.learner.vectors.take(np.array([row])))[0]
            best, names = np.argsort(-chances, kind="stable")[:5].tolist(), self.catalogue.names
            item["probable"] = [{"name": names[head.codes[k]], "p": round(float(chances[k]), 4)} for k in best]
            item["unseen"] = "predicted" in item
        return item


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _place(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else -2
