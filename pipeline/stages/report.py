"""The report: one self-contained page of HTML about a folder of runs, which loads nothing and runs only its own script.

    runs --by data set--> groups, older states listed --chosen run--> tables, charts, thumbnails, feature map --template--> HTML

Jinja2 escapes all text. The page's Content-Security-Policy allows its one script, by hash, and images embedded in the page.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from features.errors import BottleneckError, ConfigurationError, LabelsError, RunError
from features.files import atomic_file, printable
from features.progress import Progress, counted
from features.store.reader import FeatureStore
from pipeline.labels.overlay import as_trained
from pipeline.outputs import output_file
from pipeline.reporting.audited import read_audit
from pipeline.reporting.charts import interval_bar
from pipeline.reporting.chosen import Detail, describe_run
from pipeline.runs.board import board_of, by_folds, check_choice, check_folds, check_tables, starred
from pipeline.runs.datasets import DataSet, State, data_sets, only_one
from pipeline.runs.folder import Run, find_runs
from pipeline.tables import shortened

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent.parent / "templates"
DETAILED = 8  # data sets that get more than a leaderboard
BOARD_ROWS = 500  # rows of a leaderboard
MAP_POINTS, MAP_POINTS_ALL = 400, 1200  # points of one feature map, and of all maps in the page
PAGE_BYTES = 5_000_000  # size above which pictures are left out
PARTS = {
    "board": "Leaderboard",
    "run": "Chosen run",
    "mistakes": "Mistakes",
    "confusion": "Confusion",
    "classes": "Classes",
    "scores": "Scores",
    "calibration": "Calibration",
    "answers": "Answers",
    "groups": "Groups",
    "learning": "Training",
    "map": "Feature map",
    "data": "Data",
    "audit": "Audit",
    "recipe": "Recipe",
    "again": "Make it again",
}
OPTIONAL = (
    "confusion",
    "classes",
    "scores",
    "calibration",
    "answers",
    "groups",
)  # there only if there is something to say


def make_report(
    root: str | Path,
    out: str | Path,
    *,
    images: Sequence[str] = (),
    stores: Sequence[str | Path] = (),
    by: str = "accuracy",
    folds: bool | None = None,
    data_set: str | None = None,
    labels: str | Path | None = None,
    audit: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the report.

    Parameters
    ----------
    root : Path
        Folder of run folders, or one run.
    out : Path
        HTML file, written as a whole or not at all.
    images : sequence of str
        Where the images are now, if they have moved; any source that ``extract`` takes.
    stores : sequence of Path
        Where the feature stores are now, if they have moved.
    by : {"accuracy", "balanced_accuracy", "worst_group_accuracy"}
        Score by which the runs are compared.
    folds : bool, optional
        Compare by cross-validation instead of validation. Default: see `pipeline.runs.board.by_folds`.
    data_set : str, optional
        Only this data set, named as for `pipeline.runs.board.take_run`; default: all in the folder.
    labels : Path, optional
        Where the labels file is now under which runs were trained, if it has moved.
    audit : Path, optional
        An ``audit.csv``, as `pipeline.auditing.stage.write_csv` writes it.
    progress : callable, optional
        Called with ``("report", done, total)``.

    Returns
    -------
    dict
        ``out``, ``bytes``, ``runs``, ``damaged`` (names of damaged runs that were left out), and for each data set ``name``,
        and of its newest state ``digest``, ``runs``, ``chosen`` and ``pictures``, the number of thumbnails; ``older`` lists
        ``state``, ``digest``, ``runs`` and ``chosen`` of its other states.

    Raises
    ------
    RunError
        If there is no finished run.
    ConfigurationError
        If ``out`` is a folder, a device or a file other than an HTML page, ``by`` is unknown, or ``audit`` is malformed.
    """
    check_choice(by)
    runs, damaged = find_runs(root)
    if not runs:
        raise RunError(f"{root}: holds no finished run to report on; bottleneck train-head makes one")
    check_folds(runs, folds)
    check_tables(runs, by)
    given, out = out, output_file(out, "--out", "report.html")
    if out.exists() and not _is_page(out):
        raise ConfigurationError(f"--out {given}: exists and is not an HTML page; give another name, or remove it")
    opened = [FeatureStore.open(path) for path in stores]
    for store in opened:
        if not any(_is_of(store, run, labels) for run in runs):
            logger.warning("--features %s: no run was trained on its images, labels and splits", store.path)
    if labels is not None and not any(run.labels for run in runs):
        logger.warning("--labels %s: no run was trained under a labels file", labels)
    order = _groups_of(runs, data_set, str(root))
    titles = Counter(one.name for one in order)
    points = max(60, min(MAP_POINTS, MAP_POINTS_ALL // min(len(titles), DETAILED)))
    audited = None if audit is None else read_audit(audit)
    describe = functools.partial(
        describe_run, beside=runs, images=images, stores=opened, points=points, labels=labels, audit=audited
    )
    groups: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    for number, one in enumerate(order):
        state = one.states[0]
        judged = by_folds(state.runs, folds)
        chosen, detail, failure = starred(state.runs, by, folds=judged), None, ""
        if number < DETAILED:
            try:
                detail = describe(chosen)
            except BottleneckError as problem:
                failure = printable(str(problem))
                damaged.append(chosen.folder.name)
                logger.warning("the chosen run is damaged, and only its scores are shown: %s", problem)
        name = printable(one.name if titles[one.name] == 1 else f"{one.name} {state.digest[:6]}")
        board = board_of(state.runs, by=by, folds=judged)
        older = [(other, board_of(other.runs, by=by, folds=by_folds(other.runs, folds))) for other in one.states[1:]]
        about = {"id": f"g{number + 1}", "name": name, "failure": failure, "older": _older(older), "stale": one.stale}
        groups.append(_group(about, chosen, board, by=by, folds=judged, detail=detail))
        listed.append({"name": name, "digest": state.digest, "runs": len(board), "chosen": chosen.run_id})
        listed[-1] |= {"pictures": detail.pictures if detail else 0, "older": _listed(older)}
        if progress:
            progress("report", number + 1, len(order))
    count = sum(group["runs"] + sum(other["runs"] for other in group["older"]) for group in listed)
    page = _fitting(groups, printable(str(root)), count)
    try:
        with atomic_file(out) as temporary:
            temporary.write_bytes(page)
    except OSError as problem:
        if isinstance(problem, BottleneckError):
            raise
        raise RunError(f"{out}: the report could not be written ({problem}); nothing was left behind") from problem
    return {"format": 1, "out": str(given), "bytes": len(page), "runs": count, "groups": listed, "damaged": damaged}


def _groups_of(runs: Sequence[Run], data_set: str | None, where: str) -> list[DataSet]:
    """The data sets to show, by name."""
    found = data_sets(runs)
    if data_set is not None:
        found = [only_one(found, data_set, where)[0]]
    return sorted(found, key=lambda one: (one.name, one.sources))


def _is_of(store: FeatureStore, run: Run, labels: str | Path | None) -> bool:
    """Whether a run was trained on the images, labels and splits of a store, under its labels file if it has one."""
    try:
        return as_trained(store, run.labels, labels).data_digest == run.data_digest
    except LabelsError:
        return False


def _older(states: Sequence[tuple[State, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """The rows of older states for the template, at most as many as a leaderboard has."""
    rows = [{**row, "state": f"{state.kind}, {state.digest[:10]}"} for state, board in states for row in board]
    keys = ("state", "run_id", "head", "settings")
    return [{**row, **{key: printable(str(row[key])) for key in keys}} for row in rows[:BOARD_ROWS]]


def _listed(states: Sequence[tuple[State, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    return [
        {"state": state.kind, "digest": state.digest, "runs": len(board), "chosen": chosen["run_id"]}
        for state, board in states
        if (chosen := next(row for row in board if row["chosen"]))
    ]


def summary(document: dict[str, Any]) -> str:
    """Summarise the result for a person."""
    runs = counted(document["runs"], "run")
    lines = [f"{document['out']}: {runs}, {document['bytes'] / 1e6:.1f} MB; open it in a browser"]
    for group in document["groups"]:
        pictures = counted(group["pictures"], "thumbnail") if group["pictures"] else "no thumbnails"
        lines.append(f"  {group['name']}: {counted(group['runs'], 'run')}, chosen {group['chosen']}, {pictures}")
        lines += [
            f"  {group['name']}, {other['state']} {other['digest'][:10]}: {counted(other['runs'], 'stale run')}"
            for other in group["older"]
        ]
    return "\n".join(lines)


def _is_page(path: Path) -> bool:
    with open(path, "rb") as stream:
        start = stream.read(512).lstrip().lower()
    return not start or start.startswith((b"<!doctype html", b"<html"))


def _group(
    about: dict[str, Any],
    chosen: Run,
    board: list[dict[str, Any]],
    *,
    by: str,
    folds: bool,
    detail: Detail | None,
) -> dict[str, Any]:
    task = chosen.task
    first, by = task.choices[0], task.choice(by)
    board = [{**row, "score": row[first], "interval": task.interval(row)} for row in board]
    known = [row for row in board if row["interval"] is not None]
    span = min([row["interval"][0] for row in known] or [0.0]), max([row["interval"][1] for row in known] or [1.0])
    threshold = max(known, key=lambda row: row["score"])["interval"][0] if known else span[0]
    features = chosen.config["features"]
    has_cv = any(row[f"cv_{first}"] is not None for row in board)
    judged = "cross-validation" if folds and has_cv else "validation"
    column = f"cv_{first}" if folds and has_cv and by == first else by
    on = {row["features"] for row in board}
    rows = []
    for row in board[:BOARD_ROWS] if not any(row["chosen"] for row in board[BOARD_ROWS:]) else _with_chosen(board):
        interval = row["interval"]
        bar = "" if interval is None else interval_bar(interval[0], row["score"], interval[1], span, threshold)
        texts = {key: printable(str(row[key])) for key in ("run_id", "head", "settings", "features")}
        rows.append({**row, **texts, "bar": bar})
    return {
        **about,
        "source": printable(features["source"]) or "an unknown place",
        "digest": features["data_digest"],
        "count": len(chosen.classes),
        "things": task.things if len(chosen.classes) != 1 else task.things.rstrip("s"),
        "columns": task.board_columns,
        "first": task.board_columns[0],
        "n": chosen.metrics["validation"]["n"],
        "judged": judged if by == first else f"{by.replace('_', ' ')} on {judged}",
        "board": rows,
        "features": printable(on.pop()) if len(on) == 1 else "",
        "left_out": len(board) - len(rows),
        "span": span,
        "sorted": {column: next((one.first for one in task.board_columns if one.key == column), task.group_best_first)},
        "worst": {"key": task.worst_group, "first": task.group_best_first},
        "has_cv": has_cv,
        "has_groups": any(row.get("worst_group") for row in board),
        "has_answers": any(row.get("answered") is not None for row in board),
        "has_test": any(row[f"test_{first}"] is not None for row in board),
        "seen": max(row.get("test_seen", 0) for row in board),
        "detail": detail.values if detail else None,
        "parts": [
            {"id": key, "name": _title(key, text, detail)} for key, text in PARTS.items() if key in _shown(detail)
        ],
    }


def _shown(detail: Detail | None) -> set[str]:
    """The parts of the page that there is something to say in."""
    if detail is None:
        return {"board"}
    return {key for key in PARTS if detail.values.get(key) or key not in OPTIONAL}


def _title(part: str, text: str, detail: Detail | None) -> str:
    """The title of a part of the page; the table of scores is called after what it is about."""
    return str(detail.values["scores"].title) if part == "scores" and detail is not None else text


def _with_chosen(board: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for number, row in enumerate(board) if number < BOARD_ROWS - 1 or row["chosen"]]


def _fitting(groups: list[dict[str, Any]], folder: str, run_count: int) -> bytes:
    """Render the page; if it is too large, without the pictures of the feature maps, and then without any pictures."""
    page = _render(groups, folder, run_count)
    for said, drop in (("in the feature maps", _drop_sprites), ("at all", _drop_cards)):
        if len(page) <= PAGE_BYTES:
            break
        logger.warning("the report has no thumbnails %s: with them it would be %d bytes large", said, len(page))
        for group in groups:
            drop(group["detail"])
        page = _render(groups, folder, run_count)
    return page


def _drop_sprites(detail: dict[str, Any] | None) -> None:
    if detail and detail["map"]:
        detail["map"]["sprite"] = ""


def _drop_cards(detail: dict[str, Any] | None) -> None:
    if detail:
        audited = [card for check in detail["audit"] for card in check["cards"]]
        for item in (*detail["mistakes"], *detail["hits"], *audited):
            item["picture"] = ""
        if detail["data"]:
            detail["data"]["leakage"]["pairs"] = [
                {**pair, "pictures": ("", "")} for pair in detail["data"]["leakage"]["pairs"]
            ]


def _render(groups: list[dict[str, Any]], folder: str, run_count: int) -> bytes:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = shortened
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    try:
        version = importlib.metadata.version("bottleneck-features")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    text = environment.get_template("report.html.j2").render(
        groups=groups,
        title="Runs compared" if run_count > 1 else "A run",
        folder=folder,
        run_count=run_count,
        detailed=DETAILED,
        data_sets=len(groups),
        version=version,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return text.encode("utf-8", "backslashreplace")


def _hash(text: str) -> str:
    """Hash of a style sheet or script, in the notation of a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
