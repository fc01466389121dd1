"""Compare runs: the leaderboard, and the choice of one run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from features import canonical
from features.errors import RunError
from pipeline.intervals import interval_of
from pipeline.runs.folder import Run, find_runs, rank, read_predictions
from pipeline.scores.selection import CHOICES, Candidate, balanced_accuracy_interval, choose

logger = logging.getLogger(__name__)


def leaderboard(
    root: str | Path, *, by: str = "accuracy", folds: bool = False, only: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Make the leaderboard: one row per run, best score on the validation split first, then lowest log loss.

    Parameters
    ----------
    root : Path
        Folder of run folders.
    by : {"accuracy", "balanced_accuracy"}
        Score to compare.
    folds : bool
        Compare by cross-validation; runs without it come last.
    only : collection of str, optional
        Ids of the runs to include; default: all.

    Returns
    -------
    list of dict
        ``comparable`` is False if images, labels or splits differ from those of the first row (``data`` differs), as
        such scores do not measure the same thing. ``chosen`` marks one of the comparable runs, see
        `pipeline.scores.selection.choose`.
    """
    check_choice(by)
    runs = [run for run in find_runs(root) if only is None or run.run_id in only]
    runs.sort(key=functools.partial(rank, by=by, folds=folds))
    rows = [_row(run, runs[0]) for run in runs]
    if rows:
        like = [number for number, row in enumerate(rows) if row["comparable"]]
        rows[like[_choose([runs[number] for number in like], by, folds)]]["chosen"] = True
    return rows


def check_choice(by: str) -> None:
    """Raise ``ConfigurationError`` unless ``by`` is a score that runs can be compared by."""
    canonical.check_choice("choose", by, CHOICES)


def _row(run: Run, first: Run) -> dict[str, Any]:
    scores, features = run.metrics["validation"], run.config["features"]
    held_out = run.metrics["cv"] or {}
    return {
        "run_id": run.run_id,
        "chosen": False,
        "stage": run.config["stage"],
        "head": run.config["head"]["name"],
        "settings": run.settings,
        "features": f"{features['recipe'].get('backbone')}/{features['name']}",
        "accuracy": scores["accuracy"],
        "accuracy_interval": scores["accuracy_interval"],
        "balanced_accuracy": scores["balanced_accuracy"],
        "log_loss": scores["log_loss"],
        "ece": scores["ece"],
        "n": scores["n"],
        "cv_accuracy": held_out.get("accuracy"),
        "cv_interval": held_out.get("accuracy_interval"),
        "test_accuracy": (run.metrics["test"] or {}).get("accuracy"),
        "fit_seconds": run.environment.get("fit_seconds"),
        "parameters": run.environment.get("parameters"),
        "data": features["data_digest"][:10],
        "comparable": features["data_digest"] == first.config["features"]["data_digest"],
    }


def _choose(runs: Sequence[Run], by: str, folds: bool) -> int:
    """Index of the run to choose from comparable runs, which are given best first."""
    judged = "cv" if folds and runs[0].metrics["cv"] else "validation"
    runs = [run for run in runs if run.metrics[judged]]
    best = runs[0].metrics[judged]
    low = interval_of(best)[0]
    if by == "balanced_accuracy":
        # First guess: the interval of the accuracy, shifted, as both intervals are about equally wide.
        low += best["balanced_accuracy"] - best["accuracy"]
        if judged == "validation":
            try:
                rows = read_predictions(runs[0])
                low = balanced_accuracy_interval(rows.labels, rows.probabilities.argmax(axis=1))[0]
            except RunError as problem:
                logger.warning("%s; the interval of its accuracy is used instead", problem)
    candidates = [
        Candidate(
            run.metrics[judged][by], run.environment.get("parameters"), float(run.environment.get("fit_seconds") or 0)
        )
        for run in runs
    ]
    return choose(candidates, low)
