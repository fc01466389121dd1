"""The audit of a store: all checks on the same material, and what they found as a table, rows of a file, a document.

store --> `Material` --each check--> `Audit`: findings by name --> table, audit.csv, document
"""

from __future__ import annotations

import csv
import dataclasses
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from features.errors import ConfigurationError, nearest
from features.files import printable, whole_file
from features.progress import Progress
from features.sources.splits import SPLITS
from pipeline.auditing.blurred import Blurred
from pipeline.auditing.check import Check, Finding
from pipeline.auditing.dark import Dark
from pipeline.auditing.flat import Flat
from pipeline.auditing.material import Material, Read
from pipeline.auditing.near_duplicate import NearDuplicate
from pipeline.auditing.outlier import Outlier
from pipeline.auditing.same_bytes import SameBytes
from pipeline.auditing.small_classes import SmallClass
from pipeline.auditing.suspect_label import SuspectLabel
from pipeline.auditing.tiny import Tiny
from pipeline.auditing.weak_groups import WeakGroup
from pipeline.heads.gather import feature_set
from pipeline.tables import table_text

if TYPE_CHECKING:
    from features.store.reader import FeatureStore

CHECKS: tuple[Check, ...] = (
    SuspectLabel(),
    SameBytes(),
    NearDuplicate(),
    Outlier(),
    WeakGroup(),
    SmallClass(),
    Tiny(),
    Dark(),
    Flat(),
    Blurred(),
)
COLUMNS = ("check", "path", "sha256", "score", "flag", "label", "suggested")
WORST = 20  # rows of each check in the document


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found. All arrays have one entry for each row of the store, in its order.

    Parameters
    ----------
    store : FeatureStore
        The store, with the labels that were audited.
    findings : dict of str to Finding
        By name of the check.
    material : Material
        What the checks shared, such as the probabilities of held-out rows.
    seconds : float
        How long it took.
    """

    store: FeatureStore
    findings: dict[str, Finding]
    material: Material
    seconds: float

    def __getitem__(self, check: str) -> Finding:
        """Return the finding of a check."""
        return self.findings[check]


def audit(
    store: FeatureStore,
    name: str | None = None,
    *,
    checks: Sequence[str] = (),
    include_test: bool = False,
    exact: bool = False,
    read: Read | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Audit:
    """Look for wrong labels, odd images, duplicates and weak groups in a store.

    Parameters
    ----------
    store : FeatureStore
        The store; with `pipeline.labels.overlay.with_labels`, the labels of a file are audited.
    name : str, optional
        Feature set; may be left out if the store has only one.
    checks : sequence of str
        Names of the checks to make; default: all.
    include_test : bool
        Whether to judge rows of the test split too. Labels that were corrected with a look at the test split make its
        scores too good, so it is left out by default.
    exact : bool
        Search neighbours without projection, which takes longer and finds all of the nearest ones.
    read : callable, optional
        Reads an image file by its path and sha256, such as `pipeline.reporting.thumbnails.Pictures.read`. Without it the
        checks of pixels are left out.
    seed : int
        Random seed of folds and samples.
    progress : callable, optional
        Called with a stage, the number done and the total.

    Raises
    ------
    ConfigurationError
        If there is no such feature set or check, or a check of pixels is asked for without ``read``.

    Examples
    --------
    >>> found = audit(FeatureStore.open("features.h5"))                     # doctest: +SKIP
    >>> found["suspect-label"].score, found["suspect-label"].suggested      # doctest: +SKIP
    """
    started = time.perf_counter()
    chosen = _chosen(checks, pixels=read is not None)
    material = Material(
        store,
        feature_set(store, name),
        include_test=include_test,
        exact=exact,
        seed=seed,
        read=read,
        progress=progress or (lambda stage, done, total: None),
    )
    findings = {check.name: check(material) for check in chosen}
    return Audit(store, findings, material, time.perf_counter() - started)


def _chosen(names: Sequence[str], *, pixels: bool) -> list[Check]:
    known = {check.name: check for check in CHECKS}
    for name in names:
        if name not in known:
            raise ConfigurationError(f"--check: no check {name!r}; there are {', '.join(known)}{nearest(name, known)}")
        if known[name].pixels and not pixels:
            raise ConfigurationError(f"--check {name}: needs the image files; give their place with --images")
    return [check for check in CHECKS if (check.name in names or not names) and (pixels or not check.pixels)]


def write_csv(found: Audit, path: Path) -> int:
    """Write ``audit.csv``, complete or not at all: a line for each check and row that it judged, the worst first.

    Returns
    -------
    int
        Number of lines, without the heading.
    """
    count = 0
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, finding in found.findings.items():
            for line in _lines(found.store, name, finding):
                writer.writerow(line)
                count += 1
        text.flush()
        text.detach()
    return count


def _lines(store: FeatureStore, name: str, finding: Finding) -> Iterator[tuple[object, ...]]:
    table, classes = store.images, ("", *store.classes)
    rows = np.flatnonzero(finding.judged)
    rows = rows[np.lexsort((-finding.score[rows], ~finding.flag[rows]))]
    suggested = np.full(len(store), -1) if finding.suggested is None else finding.suggested
    for row in rows.tolist():
        yield (
            name,
            table.paths[row],
            table.sha256[row].tobytes().hex(),
            f"{finding.score[row]:.6g}",
            int(finding.flag[row]),
            classes[table.labels[row] + 1],
            classes[suggested[row] + 1],
        )


def document(found: Audit) -> dict[str, Any]:
    """Describe an audit as values of JSON."""
    store, material = found.store, found.material
    counts = {name: int((store.images.splits[material.rows] == code).sum()) for code, name in enumerate(SPLITS)}
    head = material.held_out if "suspect-label" in found.findings else None
    return {
        "format": 1,
        "features": str(store.path),
        "feature_set": material.name,
        "data_digest": store.data_digest,
        "rows": {name: count for name, count in counts.items() if count},
        "include_test": material.include_test,
        "C": None if head is None else head.strength,
        "seconds": round(found.seconds, 3),
        "checks": [
            {
                "check": name,
                "judged": int(finding.judged.sum()),
                "flagged": int(finding.flag.sum()),
                "summary": finding.summary,
                **finding.info,
                "worst": [_worst(store, finding, row) for row in finding.worst(WORST).tolist()],
            }
            for name, finding in found.findings.items()
        ],
    }


def _worst(store: FeatureStore, finding: Finding, row: int) -> dict[str, Any]:
    table, classes = store.images, (None, *map(printable, store.classes))
    suggested = -1 if finding.suggested is None else int(finding.suggested[row])
    return {
        "path": printable(table.paths[row]),
        "sha256": table.sha256[row].tobytes().hex(),
        "split": SPLITS[table.splits[row]],
        "score": round(float(finding.score[row]), 6),
        "label": classes[table.labels[row] + 1],
        "suggested": classes[suggested + 1],
    }


def summary(described: dict[str, Any], shown: int = 5) -> str:
    """Summarise `document` for a person: a line for each check, and the worst suspects."""
    rows = ", ".join(f"{name} {count}" for name, count in described["rows"].items())
    lines = [f"{described['features']}: {rows}; {described['seconds']:.1f} s"]
    table = [
        {"check": one["check"], "judged": one["judged"], "flagged": one["flagged"], "": one["summary"]}
        for one in described["checks"]
    ]
    lines.append(table_text(table, "  "))
    for one in described["checks"]:
        if one["check"] == "suspect-label" and one["worst"]:
            suspects = [
                {
                    "most suspect labels": row["path"],
                    "label": row["label"],
                    "suggested": row["suggested"] or "-",
                    "score": row["score"],
                }
                for row in one["worst"][:shown]
            ]
            lines.append(table_text(suspects, "  "))
    return "\n".join(lines)
