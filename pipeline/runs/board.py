"""Compare runs: the leaderboard, and the one rule for the run of a folder.

runs --pipeline.runs.datasets--> data sets --newest state--> runs that compare --choose--> the run with the asterisk
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from features import canonical
from features.errors import ConfigurationError, RunError, StoreError
from features.files import printable
from features.progress import counted
from pipeline.runs.datasets import OLDER, DataSet, State, data_sets, only_one
from pipeline.runs.folder import Run, find_runs, is_run_folder, read_predictions
from pipeline.runs.writing import renew
from pipeline.scores.groups import name_of, worst_of
from pipeline.scores.selection import (
    FEW,
    USUAL_FOLDS,
    Candidate,
    choose,
)
from pipeline.tasks.table import ALL_CHOICES, WORST_GROUPS
from pipeline.tasks.task import Task

logger = logging.getLogger(__name__)


class Taken(NamedTuple):
    """The run that a command takes, and the names of the damaged runs that were left out."""

    run: Run
    damaged: list[str]


def take_run(
    path: str | Path,
    *,
    data_set: str | None = None,
    likely: str | None = None,
    accept: Callable[[Run], bool] | None = None,
    fitting: Callable[[Task], Sequence[str]] = lambda task: (),
) -> Taken:
    """Return the run in ``path``, or the one that the leaderboard of that folder marks. Every command uses this rule.

    Of a folder of runs it is the run with the asterisk among those on the newest state of the data set. Runs of older
    states, and of trials with ``extract --limit`` beside runs on all images, are never taken, unless the digits of their
    data digest are given. The run is named in the log.

    Parameters
    ----------
    path : Path
        Run folder, or folder of run folders.
    data_set : str, optional
        Name or source of the data set, or first digits of a data digest; needed if the folder holds several data sets.
    likely : str, optional
        Source or data digest that tells which data set is meant if the folder holds several and ``data_set`` names none.
    accept : callable, optional
        Says whether fine-tuning can start from a run. Only such runs are compared, and in a folder of runs none that was
        fine-tuned itself.
    fitting : callable
        Gives the names of the heads of a task that ``accept`` takes, for the error.

    Raises
    ------
    RunError
        If there is no such run.
    ConfigurationError
        If the folder holds runs of several data sets and ``data_set`` names none of them; they are listed.
    """
    found = find_runs(path)
    if not found.runs:
        damaged = f" ({counted(len(found.damaged), 'damaged run')} left out)" if found.damaged else ""
        raise RunError(f"{path}: holds no finished run{damaged}; bottleneck train-head makes one")
    known, several = data_sets(found.runs), not is_run_folder(path)
    if data_set is None and len(known) > 1 and any(one.is_likely(likely) for one in known):
        data_set = likely
    one, state = only_one(known, data_set, str(path))
    runs = [
        run
        for run in state.runs
        if accept is None or (accept(run) and not (several and run.config["stage"] == "finetune"))
    ]
    if not runs:
        where = f" on the newest state of {one.name}" if several and one.stale else ""
        raise RunError(
            f"{path}: holds no run of a Keras head or a linear one{where}, and fine-tuning needs one "
            f"({', '.join(fitting(state.runs[0].task))}); train it with bottleneck train-head --head dropout-linear"
        )
    run = starred(runs)
    logger.info("%s", _account(run, one, state, accept is not None) if several else f"run taken: {run.folder}")
    if len(runs) > 1 and (run.metrics.get("answers") or {}).get("rows") == judged_by(runs):
        logger.warning(
            "%s: the images that set its threshold also chose it among %d runs, so that it promises a little too much; name "
            "the run that train-head --folds %d chose",
            *(run.folder, len(runs), USUAL_FOLDS),
        )
    return Taken(run, found.damaged)


def _account(run: Run, one: DataSet, state: State, for_tuning: bool) -> str:
    """Say which run of a folder was taken, and of how many."""
    of = f"{one.name} {state.digest[:10]}, of {counted(len(state.runs), 'run')}"
    stale = one.stale if state is one.states[0] else 0
    older = f"; {counted(stale, 'stale run')} of other states left out" if stale else ""
    best = starred(state.runs)
    instead = f"; {best.run_id} cannot be fine-tuned again" if for_tuning and best is not run else ""
    return printable(f"run taken: {run.folder} ({of}{older}{instead})")


def renew_states(root: str | Path, run_ids: Collection[str]) -> None:
    """Make the older state of runs that were asked for again the newest of its data set: a change was taken back.

    Nothing is written if one of the runs is of the newest state. A trial never comes before runs on all images.
    """
    for one in data_sets(find_runs(root, warn=False).runs):
        asked = [(state, run) for state in one.states for run in state.runs if run.run_id in run_ids]
        if asked and asked[0][0] is not one.states[0] and (asked[0][0].kind == OLDER or one.states[0].kind != OLDER):
            with contextlib.suppress(StoreError):  # of others, who let us read alone
                renew(asked[0][1])


def note_on_older_state(root: str | Path, run_ids: Collection[str]) -> str:
    """Say that runs which were asked for again are not of the newest state of their data set; empty if they are."""
    for one in data_sets(find_runs(root, warn=False).runs):
        for state in one.states[1:]:
            if stale := [run.run_id for run in state.runs if run.run_id in run_ids]:
                above = "newer" if state.kind == OLDER else "on all its images"
                return (
                    f"{stale[0]} was trained on {state.digest[:10]}, {state.kind} of {one.name}. Runs on "
                    f"{one.states[0].digest[:10]} are {above}, and other commands take one of those: name the run, or add "
                    f"--data-set {state.digest[:10]}"
                )
    return ""


def leaderboard(
    root: str | Path, *, by: str = "accuracy", folds: bool | None = None, only: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Make the leaderboard of a folder of runs; see `board_of`.

    Parameters
    ----------
    root : Path
        Folder of run folders.
    by, folds
        As in `board_of`.
    only : collection of str, optional
        Ids of the runs to include; default: all.
    """
    return board_of([run for run in find_runs(root).runs if only is None or run.run_id in only], by=by, folds=folds)


def board_of(
    runs: Sequence[Run], *, by: str = "accuracy", folds: bool | None = None, data_set: str | None = None
) -> list[dict[str, Any]]:
    """Make the leaderboard: one row per run, grouped by data set and state, those with the newest run first.

    Within a group the best score on the validation split comes first, then the lowest log loss.

    Parameters
    ----------
    runs : sequence of Run
        The runs.
    by : str
        Score to compare, one of the ``choices`` of the task; ``accuracy`` stands for the usual one of any task.
    folds : bool, optional
        Compare by cross-validation; runs without it come last. Default: see `by_folds`.
    data_set : str, optional
        Only the runs of this data set or state, named as for `take_run`.

    Returns
    -------
    list of dict
        ``chosen`` marks one run of the newest state of each data set, see `starred`. ``comparable`` is False if images,
        labels or splits differ from those of the first row (``data`` differs), as such scores do not measure the same
        thing. Only if there are several data sets, ``data_set`` names that of each row; only if there are several states,
        ``stale`` says whether the row is of another than the first of its data set, and ``state`` what it is. Only if a run has
        tables by group, ``worst_group`` names the group of the lowest accuracy, or of the largest error (see `pipeline.scores.groups`), with
        ``worst_group_accuracy``, or ``worst_group_mae``, and ``worst_group_interval``; only if a run withholds answers that are not sure,
        ``answered`` is the share that it gives.
    """
    check_choice(by)
    check_folds(runs, folds)
    check_tables(runs, by)
    found = data_sets(runs)
    groups = [(one, state) for one in found for state in one.states]
    if data_set is not None:
        one, state = only_one(found, data_set, "runs")
        found, groups = [one], [(one, older) for older in one.states if one.is_called(data_set) or older is state]
    rows, asked = [], [name for name in _FURTHER if any(run.metrics.get(name) for run in runs)]
    for one, state in groups:
        first = len(groups) == 1 or state is one.states[0]
        if first and (said := _judging(state.runs, folds)):
            logger.info("%s: %s", printable(one.name), said)
        chosen = starred(state.runs, by, folds=folds) if first else None
        if chosen is not None and (usual := starred(state.runs)) is not chosen:
            logger.warning(
                "the asterisk stands at %s because of how you compare; predict, evaluate, export and finetune take %s from this "
                "folder: name the run to take another",
                chosen.run_id, usual.run_id,
            )  # fmt: skip
        for run in ranked(state.runs, by, folds=folds):
            further: dict[str, Any] = {"data_set": one.name} if len(found) > 1 else {}
            if len(groups) > len(found):
                further["stale"] = state is not one.states[0]
                further["state"] = state.kind if further["stale"] else "newest"
            for name in asked:
                further |= _FURTHER[name](run, judged_by(state.runs, folds))
            rows.append(_row(run, groups[0][1].digest, chosen=run is chosen) | further)
    return rows


def _worst(run: Run, judged: str) -> dict[str, Any]:
    """Columns of the leaderboard about the group of the lowest accuracy."""
    tables = (run.metrics.get("groups") or {}).get(judged)
    line, score = _worst_line(run, tables) if tables else None, run.task.group_score
    return {
        "worst_group": name_of(line) if line else "",
        run.task.worst_group: line and line[score],
        "worst_group_interval": line and line[f"{score}_interval"],
    }


def _worst_line(run: Run, tables: Any) -> dict[str, Any]:
    return worst_of(tables, lambda line: run.task.group_worth(line)[0])


def answered(run: Run, judged: str = "") -> dict[str, Any]:
    """Columns of the leaderboard about answers that are withheld, whatever the runs are compared by."""
    abstain = (run.metrics.get("answers") or {}).get("abstain")
    return {"answered": abstain and abstain["coverage"], "answered_precision": abstain and abstain["precision"]}


# Entry of metrics.json that is there only if requested -> its columns of the leaderboard.
_FURTHER: dict[str, Callable[[Run, str], dict[str, Any]]] = {"groups": _worst, "answers": answered}


def _judging(runs: Sequence[Run], folds: bool | None) -> str:
    """Say how runs on one state were compared, or what is unlike about their scores; empty where there is nothing to say."""
    if by_folds(runs, folds):
        return "compared by cross-validation, as it has few validation images" if folds is None else ""
    heads = [run for run in runs if run.config["stage"] == "head"]  # fine-tuned runs have no folds and no stop_on
    ahead = sorted({run.config["head"]["name"] for run in heads if run.stops_on_validation})
    if not ahead or all(run.stops_on_validation for run in heads):
        return ""
    return (
        f"validation scores of {', '.join(ahead)} are slightly too good beside those of other heads, because the same images "
        f"chose their best epoch; train-head with --folds {USUAL_FOLDS} or --param stop_on=train compares like with like"
    )


def check_choice(by: str) -> None:
    """Raise ``ConfigurationError`` unless ``by`` is a score that runs can be compared by."""
    canonical.check_choice("choose", by, ALL_CHOICES)


def check_folds(runs: Sequence[Run], folds: bool | None) -> None:
    """Raise ``ConfigurationError`` if runs are to be compared by cross-validation and none of them has it."""
    if folds and runs and not any(run.metrics["cv"] for run in runs):
        raise ConfigurationError(
            f"--folds: none of {counted(len(runs), 'run')} was cross-validated, so they cannot be compared by it. Train with "
            "--folds 5, or leave it out."
        )


def check_tables(runs: Sequence[Run], by: str) -> None:
    """Raise ``ConfigurationError`` if runs are to be compared by their worst group and none of them has tables by group."""
    if by in WORST_GROUPS and runs and not any(run.metrics.get("groups") for run in runs):
        raise ConfigurationError(
            f"{by}: none of {counted(len(runs), 'run')} has tables by group. Train with --by and a column of the manifest, "
            "such as --by group; runs that are there get their tables without being trained again"
        )


def by_folds(runs: Sequence[Run], folds: bool | None = None) -> bool:
    """Whether runs on the same state of a data set are compared by cross-validation instead of by validation.

    If ``folds`` does not say so, they are where there are fewer than `FEW` validation images, which one of them moves by
    more than 3 points, and at least two runs have been cross-validated.
    """
    if folds is not None:
        return folds
    judged = [run for run in runs if run.metrics["cv"]]
    return len(judged) > 1 and judged[0].metrics["validation"]["n"] < FEW


def ranked(runs: Sequence[Run], by: str = "accuracy", *, folds: bool | None = None) -> list[Run]:
    """Sort runs, the best first: by the score, then by log loss; see `by_folds`, runs without folds come last then."""
    by = runs[0].task.choice(by) if runs else by
    return sorted(runs, key=functools.partial(_rank, by=by, judged=judged_by(runs, folds)))


def judged_by(runs: Sequence[Run], folds: bool | None = None) -> str:
    """The scores by which runs on the same state of a data set are compared: ``cv`` or ``validation``; see `by_folds`."""
    return "cv" if by_folds(runs, folds) and any(run.metrics["cv"] for run in runs) else "validation"


def _score(run: Run, by: str, judged: str) -> float | None:
    """The score of a run to compare; None if it has none."""
    if by == run.task.worst_group:
        tables = (run.metrics.get("groups") or {}).get(judged)
        return run.task.group_worth(_worst_line(run, tables))[0] if tables else None
    return run.task.value(run.metrics[judged], by) if run.metrics[judged] else None


def _rank(run: Run, by: str, judged: str) -> tuple[bool, float, float, str]:
    score, scores = _score(run, by, judged), run.metrics[judged] or run.metrics["validation"]
    usual = run.task.choices[0]
    value = run.task.value(scores, by if by in scores else usual) if score is None else score
    return score is None, -value, run.task.order(scores, usual)[1], run.run_id


def _row(run: Run, digest: str, *, chosen: bool) -> dict[str, Any]:
    scores, features = run.metrics["validation"], run.config["features"]
    held_out = run.metrics["cv"] or {}
    seen = (run.labels or {}).get("seen", 0) if run.metrics["test"] else 0
    return {
        "run_id": run.run_id,
        "chosen": chosen,
        "stage": run.config["stage"],
        "head": run.config["head"]["name"],
        "settings": run.settings,
        "features": f"{features['recipe'].get('backbone')}/{features['name']}",
        **run.task.board(scores),
        **run.task.board_folds(held_out),
        f"test_{run.task.choices[0]}": (run.metrics["test"] or {}).get(run.task.choices[0]),
        **({"test_seen": seen} if seen else {}),
        "fit_seconds": run.environment.get("fit_seconds"),
        "parameters": run.environment.get("parameters"),
        "data": run.data_digest[:10],
        "comparable": run.data_digest == digest,
    }


def starred(runs: Sequence[Run], by: str = "accuracy", *, folds: bool | None = None) -> Run:
    """Return the run with the asterisk, of runs on the same state of a data set.

    It is the simplest and fastest of those whose score lies within the interval of the best one, see
    `pipeline.scores.selection.choose`.
    """
    judged, by = judged_by(runs, folds), runs[0].task.choice(by)
    if all(_score(run, by, judged) is None for run in runs):
        by = runs[0].task.choices[0]
    order = [run for run in ranked(runs, by, folds=folds) if _score(run, by, judged) is not None]
    low = _low(order[0], by, judged)
    candidates = [
        Candidate(
            _score(run, by, judged) or 0.0,
            run.environment.get("parameters"),
            float(run.environment.get("fit_seconds") or 0),
        )
        for run in order
    ]
    return order[choose(candidates, low)]


def _low(run: Run, by: str, judged: str) -> float:
    """Lower end of the 95 % interval of a run's score."""
    best = run.metrics[judged]
    if by == run.task.worst_group:
        return run.task.group_worth(_worst_line(run, run.metrics["groups"][judged]))[1]

    def rows() -> tuple[Any, Any]:
        found = read_predictions(run)
        return found.labels, found.probabilities

    try:
        return run.task.low(best, by, rows if judged == "validation" else None)
    except RunError as problem:
        logger.warning("%s; the interval of its accuracy is used instead", problem)
        return run.task.low(best, by, None)
