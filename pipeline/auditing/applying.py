"""An audit and the labels file: under which labels a store is audited, and what the audit writes.

labels file --with_labels--> store --audit--> suggestions --precise enough, training rows only--> decisions of a machine
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError
from features.progress import counted
from features.store.reader import FeatureStore
from pipeline.auditing.material import TEST, TRAIN, Read
from pipeline.auditing.stage import Audit
from pipeline.labels.file import (
    LABEL,
    MACHINE,
    SEEN,
    Decision,
    append_decisions,
    is_person,
    last_of,
    new_decision,
    read_labels,
    value_of,
)
from pipeline.labels.overlay import target_of, with_labels
from pipeline.reporting.thumbnails import Pictures

# Least estimated precision of the suggestions that are applied: the mean of their probabilities. 0.95 is promised; with 17 classes
# the mean was two to three points too high (tests/benchmarks/README.md), with two it was not.
PRECISION = 0.97
BY = f"{MACHINE}audit"


def labelled(store: FeatureStore, path: Path | None, *, may_be_new: bool) -> FeatureStore:
    """Return the store under a labels file, if one is given; one that is to be written may not exist yet."""
    if path is None or (may_be_new and not path.exists()):
        return store
    return with_labels(store, path)


def reader(store: FeatureStore, images: str) -> Read:
    """Return what reads the image files of a store from a source, each checked by its hash.

    Raises
    ------
    ConfigurationError
        If the source holds none of them.
    """
    pictures = Pictures([images], store.images.paths)
    if pictures.missing:
        raise ConfigurationError(f"--images {images}: {pictures.missing}")
    return pictures.read


def suggestions(found: Audit, but: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Suggestions that are certain enough to be applied without a person.

    The probability of a class, given pixels and label, is that of `pipeline.auditing.confident`. The surest suggestions are
    taken, as many as keep the mean of these probabilities at `PRECISION`, and none that is more likely wrong than right.

    Parameters
    ----------
    found : Audit
        An audit with the check ``suspect-label``.
    but : int64, (m,), optional
        Rows that are left alone, and do not count.

    Returns
    -------
    rows : int64, (k,), ascending
        Training rows. Files that have several labels, or lie in other splits too, are left to a person.
    classes : int32, (k,)
        Class suggested for each.
    sure : float64, (k,), 0-1
        These probabilities; their mean is the estimated precision.
    """
    material = found.material
    rows, likely = material.likely
    if not len(rows):
        return rows, np.zeros(0, np.int32), np.zeros(0)
    sure, classes = likely.max(axis=1), likely.argmax(axis=1).astype(np.int32)
    possible = (classes != material.labels[rows]) & (sure > 0.5)
    possible &= np.isin(rows, _plain(material.copies, material.labels, material.splits))
    if but is not None:
        possible &= ~np.isin(rows, but)
    order = np.flatnonzero(possible)
    order = order[np.argsort(-sure[order], kind="stable")]
    precise = np.cumsum(sure[order]) >= PRECISION * np.arange(
        1, len(order) + 1
    )  # no True follows a False: they descend
    taken = np.sort(order[precise])
    return rows[taken], classes[taken], sure[taken]


def _plain(copies: np.ndarray, labels: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Labelled training rows whose bytes occur with no other label and in no other split, int64, ascending."""
    odd = (splits != TRAIN) | (labels < 0)
    count = int(copies.max(initial=-1)) + 1
    least, most = np.full(count, np.iinfo(np.int32).max), np.full(count, -1)
    np.minimum.at(least, copies, labels)
    np.maximum.at(most, copies, labels)
    mixed = (least != most) | (np.bincount(copies, odd, count) > 0)
    return np.flatnonzero(~mixed[copies])


def record(found: Audit, path: Path, *, apply: bool) -> dict[str, Any]:
    """Append what an audit decided to a labels file: suggestions with ``apply``, and which test images were judged.

    Images whose last decision is a person's stay as they are, also where the person took a decision back.
    """
    store, table = found.store, found.store.images
    labels = read_labels(path) if path.exists() else None
    target, decisions, left, estimate = target_of(store), list[Decision](), 0, None
    if apply:
        rows, classes, sure = suggestions(found)
        if labels is not None and len(labels):
            people = np.array([is_person(word) for word in labels.people.words], bool)
            about = np.flatnonzero(labels.about(target, LABEL, ""))
            places = last_of(labels.sha256[about], about, table.sha256)
            decided = np.flatnonzero((places >= 0) & people[labels.people.codes[places]])
            left = int(np.isin(rows, decided).sum())
            rows, classes, sure = suggestions(found, but=decided)
        estimate = float(sure.mean()) if len(sure) else None
        for row, name in zip(rows.tolist(), classes.tolist(), strict=True):
            value, earlier = (value_of(store.classes[k]) for k in (name, table.labels[row]))
            decisions.append(
                new_decision(table.sha256[row], table.paths[row], value, target=target, earlier=earlier, by=BY)
            )
    applied = len(decisions)
    if found.material.include_test:
        rows = np.flatnonzero(table.splits == TEST)
        if labels is not None:
            rows = rows[labels.latest(table.sha256[rows], SEEN) < 0]
        decisions += [
            new_decision(table.sha256[row], table.paths[row], "audit", target=SEEN, by=BY) for row in rows.tolist()
        ]
    if decisions:
        append_decisions(path, decisions)
    return {
        "file": str(path),
        "applied": applied,
        "estimated_precision": estimate,
        "left_to_people": left,
        "test_images_noted": len(decisions) - applied,
    }


def said(recorded: dict[str, Any]) -> str:
    """Summarise what `record` did with suggestions."""
    if not recorded["applied"]:
        return f"{recorded['file']}: no suggestion is certain enough to be applied"
    text = (
        f"{recorded['file']}: {counted(recorded['applied'], 'label')} changed, of which an estimated "
        f"{recorded['estimated_precision']:.1%} are right"
    )
    left = recorded["left_to_people"]
    return text + (f"; {counted(left, 'image')} that people decided about left alone" if left else "")
