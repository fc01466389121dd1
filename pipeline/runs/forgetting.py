"""Leave images out of the predictions that runs keep, and score what is left again.

    predictions.csv without some rows --> metrics.json, README.md, plots of the others

The model in the folder is not changed: its weights were computed with the image if that was a training image.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection

from features.errors import RunError
from features.files import atomic_file, read_small
from pipeline.runs.folder import JSON_BYTES, Run, read_predictions
from pipeline.runs.notes import readme
from pipeline.runs.writing import add_plots, add_scores

MARK = ".forgetting"  # a file in a run folder whose scores are being made again
_KEEPS_ROWS = re.compile(rb'"kind": *"(neighbours|support-vectors)"')


def holds_predictions(run: Run, hashes: Collection[str]) -> int:
    """Number of rows of ``predictions.csv`` about images with these content hashes, 64 hexadecimal digits each."""
    return sum(_is_about(line, hashes) for line in _lines(run))


def keeps_rows(run: Run) -> bool:
    """Whether the head of a run consists of training rows, as nearest neighbours and support vectors do."""
    if "head.skops" in run.config["model"]:
        return True  # objects of scikit-learn, which are not looked into
    return _KEEPS_ROWS.search(read_small(run.folder / "head.json", 64 * JSON_BYTES)) is not None


def forget_predictions(run: Run, hashes: Collection[str]) -> int:
    """Remove the rows about these images from ``predictions.csv``, and score the validation rows that are left.

    A call that was killed is finished by the next one. Scores by folds and of the test split stay as they are: they are means
    over all images.

    Returns
    -------
    int
        Number of rows removed.

    Raises
    ------
    RunError
        If no validation image would be left, or the predictions cannot be read.
    """
    mark = run.folder / MARK
    lines = _lines(run)
    kept = [line for line in lines if not _is_about(line, hashes)]
    if len(kept) == len(lines) and not mark.exists():
        return 0
    if len(kept) < 2:
        raise RunError(
            f"{run.folder}: all its validation images are to be forgotten; remove this folder, then run again"
        )
    mark.touch()
    with atomic_file(run.folder / "predictions.csv") as temporary:
        temporary.write_bytes(b"".join(kept))
    counted = {**run.metrics, "validation": {**run.metrics["validation"], "n": len(kept) - 1}}
    rows = read_predictions(Run(run.folder, run.config, counted, run.environment))
    before = run.metrics["validation"]
    scores = {**before, **run.task.evaluate(rows.probabilities, rows.labels, run.classes, before)}
    changed = add_scores(run, validation=scores)
    with atomic_file(run.folder / "README.md") as temporary:
        seconds = float(run.environment.get("fit_seconds") or 0)
        temporary.write_text(readme(run.config, changed.metrics, seconds, run.task), encoding="utf-8")
    if (run.folder / "plots").exists():
        shutil.rmtree(run.folder / "plots")
        add_plots(changed)
    mark.unlink()
    return len(lines) - len(kept)


def _lines(run: Run) -> list[bytes]:
    """Records of ``predictions.csv``, each with its line end; the first one is the header."""
    path = run.folder / "predictions.csv"
    try:
        data = read_small(path, path.stat().st_size)
    except OSError as problem:
        raise RunError(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    records: list[bytes] = []
    for line in data.splitlines(keepends=True):  # a path in quotes may hold line ends
        if records and records[-1].count(b'"') % 2:
            records[-1] += line
        else:
            records.append(line)
    return records


def _is_about(line: bytes, hashes: Collection[str]) -> bool:
    return any(f",{sha256},".encode() in line for sha256 in hashes)
