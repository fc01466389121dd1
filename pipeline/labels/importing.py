"""Take over decisions from the CSV files that other tools export.

    CSV --the tool's columns--> image, class, who, when --paths of the store--> decisions

How each file looks is known from the tools' own code and pages: Label Studio's converter (``csv2.py``), FiftyOne's
``CSVDatasetExporter``, and CVAT's Open Images V6.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from features.errors import LabelsError, nearest
from features.sources.folders import IMAGE_SUFFIXES, suffix_of
from features.store.reader import FeatureStore
from pipeline.labels.file import MACHINE, WITHDRAWN, Decision, moment_text, value_of
from pipeline.labels.overlay import target_of

_UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # Label Studio puts eight digits before the name of an uploaded file
LISTED = 5  # images that a message lists


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One line of an export: the image as the tool names it, the class, who gave it, and when (empty if not known)."""

    image: str
    name: str
    by: str
    when: str


@dataclasses.dataclass(frozen=True)
class Imported:
    """Decisions found in an export, and images of it that are not in the store, or that it gives several classes."""

    decisions: list[Decision]
    elsewhere: list[str]
    several: list[str]


def read_export(
    path: Path, tool: str, store: FeatureStore, column: str | None = None, by: str | None = None
) -> Imported:
    """Read an export of another tool.

    Parameters
    ----------
    path : Path
        The CSV file.
    tool : str
        Key of `TOOLS`.
    store : FeatureStore
        The images. They are found by path: the longest common end of folders and name, which must be that of one image.
    column : str, optional
        Column of the class, where there are several that could be it.
    by : str, optional
        Who decided; default: what the file says, or the name of the tool.

    Raises
    ------
    LabelsError
        If the file is no such export, or none of its images is in the store.
    """
    if store.images.target is not None:
        raise LabelsError(
            f"{store.path}: is for --task {store.images.target.task}, and exports of classes are read only"
        )
    rows = _rows(path)
    annotations = list(TOOLS[tool](path, rows, column))
    places = _Places(store.images.paths)
    usual = moment_text(path.stat().st_mtime_ns // 1000)
    found: dict[tuple[int, str], dict[str, Decision]] = {}
    elsewhere: dict[str, None] = {}
    for one in annotations:
        row = places.find(one.image)
        if row < 0:
            elsewhere[one.image] = None
            continue
        decision = _decision(store, row, one, by or one.by or tool, _utc(path, one.when) or usual)
        found.setdefault((row, decision.by), {})[decision.value] = decision
    if annotations and not found:
        raise LabelsError(
            f"{path}: none of its {len(elsewhere):,} images is one of {store.path}, such as {next(iter(elsewhere))!r:.120}; "
            f"the store has {store.images.paths[0]!r:.120}. Give the store of the images that were exported"
        )
    several = [store.images.paths[row] for (row, _), values in found.items() if len(values) > 1]
    decisions = [next(iter(values.values())) for values in found.values() if len(values) == 1]
    return Imported(decisions, list(elsewhere), several)


def _decision(store: FeatureStore, row: int, one: Annotation, by: str, utc: str) -> Decision:
    table, value = store.images, value_of(one.name)
    earlier = value_of(store.classes[table.labels[row]]) if table.labels[row] >= 0 else WITHDRAWN
    digest = table.sha256[row].tobytes().hex()
    said = (digest, table.paths[row], target_of(store), value, earlier, by, utc)
    # The same decision gives the same id, so that a file that is imported twice counts once; copies have their own paths.
    return Decision(*said, hashlib.sha256(json.dumps(said).encode("ascii")).hexdigest()[:32])


def _utc(path: Path, when: str) -> str:
    if not when:
        return ""
    try:
        moment = datetime.datetime.fromisoformat(when)
    except ValueError as problem:
        raise LabelsError(f"{path}: received the time {when!r:.40}, expected such as 2023-10-02T09:12:27Z") from problem
    moment = moment.replace(tzinfo=moment.tzinfo or datetime.UTC).astimezone(datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class _Places:
    """Find images by the longest common end of their paths."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = [PurePosixPath(path).parts for path in paths]
        self._by_name: dict[str, list[int]] = {}
        for row, parts in enumerate(self._paths):
            for name in dict.fromkeys((parts[-1], PurePosixPath(parts[-1]).stem)):
                self._by_name.setdefault(name, []).append(row)

    def find(self, image: str) -> int:
        """Return the row of an image, or -1 if there is none, or several are as likely."""
        parts = PurePosixPath(image).parts
        if not parts:
            return -1
        uploaded = _UPLOADED.fullmatch(parts[-1])
        candidates = self._by_name.get(parts[-1]) or (self._by_name.get(uploaded[1]) if uploaded else None) or []
        lengths = [self._common(self._paths[row][:-1], parts[:-1]) for row in candidates]
        best = [row for row, length in zip(candidates, lengths, strict=True) if length == max(lengths)]
        return best[0] if len(best) == 1 else -1

    def _common(self, one: Sequence[str], other: Sequence[str]) -> int:
        count = 0
        for mine, theirs in zip(reversed(one), reversed(other), strict=False):
            if mine != theirs:
                break
            count += 1
        return count


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise LabelsError(f"{path}: is not UTF-8 text: {problem}") from problem
    try:
        rows = list(csv.DictReader(text.splitlines(keepends=True), strict=True))
    except csv.Error as problem:
        raise LabelsError(f"{path}: not valid CSV: {problem}") from problem
    if not rows:
        raise LabelsError(f"{path}: holds no annotations")
    if any(None in row or None in row.values() for row in rows):
        raise LabelsError(f"{path}: lines have other numbers of fields than its first line")
    return rows


def _columns(path: Path, rows: Sequence[Mapping[str, str]], needed: Sequence[str], tool: str) -> None:
    if missing := [name for name in needed if name not in rows[0]]:
        raise LabelsError(
            f"{path}: has no column {missing[0]!r} and is no CSV export of {tool}; received {', '.join(rows[0])[:200]}"
        )


def _chosen(path: Path, candidates: Sequence[str], column: str | None, columns: Sequence[str]) -> str:
    """Return the column of the class."""
    if column is not None and column in columns:
        return column
    if column is not None:
        raise LabelsError(f"{path}: has no column {column!r}{nearest(column, columns)}")
    if len(candidates) != 1:
        said = f"any of {', '.join(candidates)}" if candidates else f"none of {', '.join(columns)[:200]}"
        raise LabelsError(f"{path}: the class could be in {said}; name its column with --column")
    return candidates[0]


def _of_label_studio(path: Path, rows: Sequence[Mapping[str, str]], column: str | None) -> Iterator[Annotation]:
    """Columns in alphabetical order: those below, one of each control tag, and those of the task, one of them the image."""
    own = {"annotator", "annotation_id", "created_at", "updated_at", "lead_time", "was_cancelled", "id", "agreement"}
    _columns(path, rows, ["annotator", "annotation_id", "updated_at"], "Label Studio")
    places = {name: [_place(row[name]) for row in rows] for name in rows[0] if name not in own}
    images = [name for name, found in places.items() if all(suffix_of(place) in IMAGE_SUFFIXES for place in found)]
    if len(images) != 1:
        raise LabelsError(f"{path}: {len(images)} of the columns {', '.join(places)[:200]} hold images, expected one")
    label = _chosen(path, [name for name in places if name not in images], column, list(rows[0]))
    for row, image in zip(rows, places[images[0]], strict=True):
        name = row[label]
        if row.get("was_cancelled") == "True" or not name:
            continue  # the annotator skipped it
        if name.startswith(("{", "[")):
            raise LabelsError(
                f"{path}: the column {label!r} holds {name!r:.80}, expected one class; export a single choice for each image, "
                "or name another column with --column"
            )
        yield Annotation(image, name, f"label-studio {row['annotator']}".strip(), row["updated_at"])


def _place(text: str) -> str:
    """The path in the address of an image: of an upload, of a local file, of a bucket, or of a server."""
    parts = urlsplit(text)
    local = parse_qs(parts.query).get("d")
    return unquote(local[0] if local else parts.path if parts.scheme or parts.path.startswith("/data/") else text)


def _of_fiftyone(path: Path, rows: Sequence[Mapping[str, str]], column: str | None) -> Iterator[Annotation]:
    """``filepath`` and the fields that the user exported, such as ``ground_truth.label``."""
    _columns(path, rows, ["filepath"], "FiftyOne")
    labels = [name for name in rows[0] if name == "label" or name.endswith(".label")]
    label = _chosen(path, labels, column, list(rows[0]))
    yield from (Annotation(row["filepath"].replace("\\", "/"), row[label], "", "") for row in rows if row[label])


def _of_cvat(path: Path, rows: Sequence[Mapping[str, str]], column: str | None) -> Iterator[Annotation]:
    """``SUBSET-annotations-human-imagelabels.csv`` of Open Images V6; ``class-descriptions.csv`` beside it names the classes.

    A confidence of 0 says that the class is absent.
    """
    _columns(path, rows, ["ImageID", "LabelName", "Confidence"], "CVAT (Open Images V6)")
    names = path.with_name("class-descriptions.csv")
    if not names.is_file():
        raise LabelsError(f"{names}: is missing; it names the classes of {path.name}. Put it beside that file")
    with open(names, encoding="utf-8-sig", newline="") as stream:
        known = {line[0]: line[1] for line in csv.reader(stream) if len(line) > 1}
    for row in rows:
        try:
            present = float(row["Confidence"] or 1) > 0
        except ValueError as problem:
            raise LabelsError(f"{path}: Confidence: received {row['Confidence']!r:.40}, expected 0 to 1") from problem
        if present:
            by = f"{MACHINE}cvat" if row.get("Source") == "machine" else ""
            yield Annotation(row["ImageID"], known.get(row["LabelName"], row["LabelName"]), by, "")


TOOLS: dict[str, Callable[[Path, Sequence[Mapping[str, str]], str | None], Iterator[Annotation]]] = {
    "label-studio": _of_label_studio,
    "cvat": _of_cvat,
    "fiftyone": _of_fiftyone,
}
