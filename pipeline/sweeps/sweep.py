"""Train many heads on cached features. Each becomes a run, finished runs are kept, and the best run is chosen.

stores x feature sets x trials -> jobs -> prepared rows -> workers (scikit-learn) | bank | Keras -> run folders
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, FormatVersionError, HeadError, RunError
from features.files import writable_folder
from features.machine import processors
from features.progress import Progress
from features.temporary import temporary_path
from pipeline.heads.costs import announcement, check_bytes, usable_memory
from pipeline.heads.fitting import Fitted, fit_companions, fit_one, reason_of
from pipeline.heads.gather import Source, can_fold, feature_set, needs_folds, needs_rows, views_seen
from pipeline.heads.head import Head
from pipeline.heads.kinds import head_of, make_head, resolve_pool
from pipeline.heads.pooling import pooled_width
from pipeline.heads.prepared import Prepared
from pipeline.heads.promises import (
    FOLDS,
    NOTHING,
    VALIDATION,
    Asked,
    check_rows,
    has_tables,
    promised,
    tabled,
    with_default,
)
from pipeline.heads.records import run_id_of, test_scores, write_fitted
from pipeline.runs.board import answered, check_choice, judged_by, leaderboard
from pipeline.runs.folder import Run, find_runs, is_finished
from pipeline.runs.writing import add_plots, add_scores
from pipeline.scores.selection import FEW, USUAL_FOLDS
from pipeline.sweeps.sweep_file import SweepFile, Trial, expand
from pipeline.sweeps.workers import Lost, in_parallel
from pipeline.tables import board_text, promise_lines
from pipeline.tasks.table import names_of, targets_of, task_of

logger = logging.getLogger(__name__)

SHOWN = 10  # rows in the summary
PLOTTED = 5  # runs of a sweep that get plots: 0.15 s each, which is longer than most heads take to train
BANK_HEADS = 256  # heads trained together at most; their runs are written before the next heads are trained


@dataclasses.dataclass(frozen=True)
class Job:
    """One head to train on one feature set of one store.

    Parameters
    ----------
    trial : Trial
        The trial of the sweep that this job belongs to.
    head : Head
        The untrained head, with its pooling resolved.
    store : FeatureStore
        The store to train on.
    name : str
        Name of the feature set.
    run_id : str
        Id of the run that the job produces.
    """

    trial: Trial
    head: Head
    store: Any
    name: str
    run_id: str

    @property
    def rows(self) -> tuple[int, str, str, bool]:
        """Key that is equal for jobs which can be trained on the same prepared rows."""
        return id(self.store), self.name, self.head.pool or "", self.head.scale

    def __str__(self) -> str:
        return f"{self.trial} on {self.name}"


@dataclasses.dataclass
class SweepResult:
    """The result of `run_sweep`.

    Parameters
    ----------
    runs : list of str
        Ids of the sweep's runs that exist now.
    trained, cached : int
        Number of heads that were trained now, and number of runs that already existed.
    failed : list of dict
        ``head`` and ``reason`` of each head that could not be trained.
    board : list of dict
        Leaderboard of the runs; the chosen run is marked.
    seconds : float
        Time of the whole sweep.
    """

    runs: list[str]
    trained: int
    cached: int
    failed: list[dict[str, str]]
    board: list[dict[str, Any]]
    seconds: float


def run_sweep(
    stores: Sequence[Any],
    sweep: SweepFile,
    *,
    runs: str | Path,
    names: Sequence[str] = (),
    jobs: int | None = None,
    folds: int | None = 0,
    memory: int | None = None,
    test: bool = False,
    asked: Asked = NOTHING,
    where: str = "sweep",
    ready: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Train the heads of a sweep that have no finished run yet, and choose one run.

    Parameters
    ----------
    stores : sequence of FeatureStore
        Stores to train on; every head is trained on each of them.
    sweep : SweepFile
        The heads to train.
    runs : Path
        Folder of run folders.
    names : sequence of str
        Feature sets of each store to use; default: all.
    jobs : int, optional
        Number of processes for scikit-learn heads; default: the number of processors. Fewer are used if `memory` does
        not suffice.
    folds : int, optional
        Number of folds. Each head is then also scored by stratified cross-validation on the training rows, groups kept
        together, and the choice is made by that score. 0: the choice is made by the validation split. None: `USUAL_FOLDS`
        for the heads that are trained now, if there are several heads and fewer than `FEW` validation images.
    memory : int, optional
        Bytes that training may use; default: half of the available memory. Rows that do not fit are read from the store
        piece by piece, and heads that cannot be trained in this way fail.
    test : bool
        Whether to score the chosen head, and no other, on the test split.
    asked : Asked
        What is asked of answers. All heads get tables by group, default: of the columns that the sweep names; only
        the chosen head gets a precision and sets.
    where : str
        Name of the sweep in messages.
    ready : callable, optional
        Called once all checks have passed and there is something to train, before rows are read.
    progress : callable, optional
        Called with ("heads", done, total).

    Returns
    -------
    SweepResult
        A head that fails is listed in `failed` and does not stop the others.

    Raises
    ------
    ConfigurationError
        A head, parameter or feature set is unknown; raised before anything is trained.
    HeadError
        A split cannot be used.
    RunError
        A run folder cannot be written, for example because the disk is full.
    """
    started = time.monotonic()
    if folds and folds < 2:
        raise ConfigurationError(f"--folds: received {folds}, expected 2 or more, or 0 for none")
    if jobs is not None and jobs < 1:
        raise ConfigurationError(f"--n-jobs: received {jobs}, expected 1 or more")
    by, runs = sweep.choose, Path(runs)
    check_choice(by)
    asked = with_default(dataclasses.replace(asked, by=asked.by or sweep.by), by, stores)
    every, failed = _plan(stores, sweep, names, where)
    every, missing = _to_train(every, failed, runs, folds or 0, asked)
    for store in {id(job.store): job.store for job in missing}.values():
        needs_rows(store, "train", "validation")
        if folds:
            needs_folds(store)
    judged_by_folds = None if folds is None else bool(folds)
    folds = _usual_folds(every, missing) if folds is None else folds
    _check_promises(asked, every, folds)
    _announce_long(missing, folds)
    if test:
        for store in stores:
            needs_rows(store, "test")
    writable_folder(runs)
    tell = progress or (lambda stage, done, total: None)
    memory = memory or usable_memory()
    trained, lost, out_of_fold = 0, set(), dict[str, np.ndarray | None]()
    alone = {group[0].run_id for group in _by_data(every) if len(group) == 1}
    for job, outcome in _train_all(missing, runs, jobs or processors(), folds, memory, ready):
        reason = outcome if isinstance(outcome, str) else _write(job, outcome, runs, folds, memory, asked)
        if job.run_id in alone and not isinstance(outcome, str):
            out_of_fold[job.run_id] = outcome.out_of_fold
        if reason:
            failed.append({"head": str(job), "reason": reason})
            lost.add(job.run_id)
            logger.warning("%s failed: %s", job, reason)
        else:
            trained += 1
        tell("heads", trained + len(lost), len(missing))
    made = [job.run_id for job in every if job.run_id not in lost]
    _table_finished(every, missing, runs, asked)
    board = leaderboard(runs, by=by, folds=judged_by_folds, only=set(made)) if made else []
    for row in board[:PLOTTED]:
        try:
            add_plots(Run.open(runs / row["run_id"]))
        except (RunError, OSError) as problem:  # an existing run that was damaged, or a full disk
            logger.warning("%s: the plots could not be drawn: %s", row["run_id"], problem)
    if test and board:
        _test_chosen(every, board, runs)
    if asked.option and board:
        _promise_chosen(every, board, runs, asked, judged_by_folds, out_of_fold)
    return SweepResult(made, trained, len(every) - len(missing), failed, board, time.monotonic() - started)


def result_document(result: SweepResult, runs: str | Path) -> dict[str, Any]:
    """The document that ``--json`` prints."""
    chosen = next((row["run_id"] for row in result.board if row["chosen"]), None)
    values = dataclasses.asdict(result)
    return {"format": 1, "folder": str(runs), "chosen": chosen, **values}


def summary(result: SweepResult, runs: str | Path, *, width: int | None = None) -> str:
    """The result as text for a person: counts, failures, the best heads."""
    failed = f", {len(result.failed)} failed" if result.failed else ""
    lines = [f"{runs}: {result.trained} trained, {result.cached} already there{failed}, in {result.seconds:.1f} s"]
    for reason, number in collections.Counter(item["reason"] for item in result.failed).most_common(SHOWN):
        first = next(item["head"] for item in result.failed if item["reason"] == reason)
        lines.append(f"  failed: {first}{f' and {number - 1} more' if number > 1 else ''}: {reason}")
    if result.board:
        lines.append(board_text(result.board, SHOWN, width=width))
        lines.append("* chosen: the simplest and fastest head whose score lies within the interval of the best one")
        lines += [line for row in result.board for line in promise_lines(row.get("answers"))]
    return "\n".join(lines)


def _plan(
    stores: Sequence[Any], sweep: SweepFile, names: Sequence[str], where: str
) -> tuple[list[Job], list[dict[str, str]]]:
    """All jobs of a sweep without repetitions, and the heads whose pooling does not fit, with the reason."""
    trials = expand(sweep, where)
    jobs: dict[tuple[int, str], Job] = {}
    failed = []
    for store in stores:
        for name in [feature_set(store, name) for name in names] or store.names:
            recipe, shape = store.recipes[name], store.shape(name)[2:]
            for trial in trials:
                head = make_head(
                    trial.name,
                    seed=trial.seed,
                    classes=names_of(store),
                    layer=recipe.layer,
                    fingerprint=recipe.fingerprint,
                    task=task_of(store),
                    **trial.params,
                )
                try:
                    # Vectors need no pooling, whatever the sweep says for its spatial feature sets.
                    head.pool = resolve_pool(trial.name, None if len(shape) == 1 else trial.pool, shape)
                except HeadError as problem:
                    failed.append({"head": f"{trial} on {name}", "reason": str(problem)})
                    continue
                run_id = run_id_of(head, store, name)
                jobs.setdefault((id(store), run_id), Job(trial, head, store, name, run_id))
    return list({job.run_id: job for job in jobs.values()}.values()), failed


def _usual_folds(every: Sequence[Job], missing: Sequence[Job]) -> int:
    """Number of folds to compare heads by if the user names none: 0 where the validation images suffice."""
    few = min((len(job.store.rows("validation")) for job in missing), default=FEW)
    if len(every) < 2 or few >= FEW or not all(can_fold(job.store) for job in missing):
        return 0
    logger.warning(
        "there are only %d validation images, so heads are compared by %d folds of the training images (--folds 0: by "
        "validation)",
        few,
        USUAL_FOLDS,
    )
    return USUAL_FOLDS


def _announce_long(missing: Sequence[Job], folds: int) -> None:
    """Name the heads that take long, each name once for the feature set on which it takes longest, and what is cheaper."""
    longest: dict[str, tuple[float, str]] = {}
    for job in missing:
        count, shape = len(job.store.rows("train")), job.store.shape(job.name)[2:]
        views, width = views_seen(job.head, job.store, job.name), pooled_width(shape, job.head.pool or "none")
        said = announcement(job.head, count, width, views, folds)
        if said:
            found = job.head.fit_seconds(count, width, views), said
            longest[job.head.name] = max(longest.get(job.head.name, found), found)
    for _, said in sorted(longest.values(), reverse=True):
        logger.warning("%s", said)


def _by_data(every: Sequence[Job]) -> list[list[Job]]:
    """The jobs on the same images, labels and splits together: one of them is chosen."""
    together = collections.defaultdict(list)
    for job in every:
        together[job.store.data_digest].append(job)
    return list(together.values())


def _check_promises(asked: Asked, every: Sequence[Job], folds: int) -> None:
    """Refuse, before training, promises for which no rows would be left; see `check_rows`."""
    for jobs in _by_data(every):
        chosen_by = "" if len(jobs) == 1 else FOLDS if folds else VALIDATION
        check_rows(asked, [job.head for job in jobs], chosen_by, folds=bool(folds))


def _to_train(
    every: Sequence[Job], failed: list[dict[str, str]], runs: Path, folds: int, asked: Asked
) -> tuple[list[Job], list[Job]]:
    """The jobs, and those without a finished run. A run of another release is kept, and its job counts as failed."""
    kept, missing = list[Job](), list[Job]()
    alone = {jobs[0].run_id for jobs in _by_data(every) if len(jobs) == 1}
    for job in every:
        try:
            done = _is_done(runs / job.run_id, folds, asked, alone=job.run_id in alone)
        except FormatVersionError as problem:
            failed.append({"head": str(job), "reason": str(problem)})
            continue
        kept.append(job)
        if not done:
            missing.append(job)
    return kept, missing


def _is_done(folder: Path, folds: int, asked: Asked, *, alone: bool) -> bool:
    """Whether a run has all that is asked of it and that needs rows out of fold, which no run keeps."""
    if not is_finished(folder):
        return False
    if not folds:
        return True
    run = Run.open(folder)
    held_out = run.metrics["cv"]
    promised_too = not (alone and asked.option) or asked.met_by(run, VALIDATION, FOLDS)
    return bool(held_out and held_out["folds"] == folds and has_tables(run, asked, FOLDS) and promised_too)


def _table_finished(every: Sequence[Job], missing: Sequence[Job], runs: Path, asked: Asked) -> None:
    """Give runs that were there before the tables by group that they lack."""
    trained = {job.run_id for job in missing}
    for job in every:
        if job.run_id not in trained and not has_tables(run := Run.open(runs / job.run_id), asked, VALIDATION):
            tabled(run, job.store, asked)


def _promise_chosen(
    every: Sequence[Job],
    board: list[dict[str, Any]],
    runs: Path,
    asked: Asked,
    judged_by_folds: bool | None,
    out_of_fold: Mapping[str, np.ndarray | None],
) -> None:
    """Find what the chosen head of each data set, and no other, can promise of its answers; note it in the board too."""
    for jobs in _by_data(every):
        found = [row for row in board if row["chosen"] and row["run_id"] in {job.run_id for job in jobs}]
        for row in found:
            job = next(job for job in jobs if job.run_id == row["run_id"])
            beside = [Run.open(runs / other["run_id"]) for other in board if other["data"] == row["data"]]
            chosen_by = "" if len(jobs) == 1 else judged_by(beside, judged_by_folds)
            run = promised(Run.open(runs / job.run_id), job.store, asked, chosen_by, out_of_fold.get(job.run_id))
            row |= {**answered(run), "answers": run.metrics["answers"]}


def _train_all(
    missing: Sequence[Job], runs: Path, jobs: int, folds: int, memory: int, ready: Callable[[], None] | None
) -> Iterator[tuple[Job, Fitted | str]]:
    """Train the missing jobs and yield their results as they come; a text is the reason of a failure."""
    together = collections.defaultdict(list)
    for job in missing:
        together[job.rows].append(job)
    turns = []
    for alike in together.values():
        source, left = source_of(alike, memory), []
        for job in alike:
            try:
                source.check(job.head)
            except HeadError as problem:
                yield job, str(problem)
            else:
                left.append(job)
        if left:
            turns.append((left, source))
    if turns and ready:
        ready()
    for left, source in turns:
        yield from _train_alike(left, source, runs, jobs, folds)


def _train_alike(
    alike: Sequence[Job], source: Source, runs: Path, jobs: int, folds: int
) -> Iterator[tuple[Job, Fitted | str]]:
    """Train jobs that use the same prepared rows."""
    folder = temporary_path(runs / "sweep")
    folder.mkdir()
    try:
        prepared = source.prepare(scale=alike[0].head.scale, folder=folder)
    except (HeadError, MemoryError) as problem:  # not a damaged store, which stops the whole sweep
        yield from ((job, reason_of(problem)) for job in alike)
    else:
        yield from _in_parallel([job for job in alike if job.head.parallel], prepared, source, jobs, folds)
        yield from _in_this_process([job for job in alike if not job.head.parallel], prepared, folds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def source_of(alike: Sequence[Job], memory: int) -> Source:
    """Make the source of rows that jobs share, with the most views that any of them uses."""
    store, name, head = alike[0].store, alike[0].name, alike[0].head
    views = max(views_seen(job.head, store, name) for job in alike)
    return Source(store, name, head.pool or "none", views, memory)


def _in_parallel(
    jobs: Sequence[Job], prepared: Prepared, source: Source, count: int, folds: int
) -> Iterator[tuple[Job, Fitted | str]]:
    """Train jobs in up to ``count`` processes, in fewer where each needs much memory."""
    turns: dict[int, list[int]] = collections.defaultdict(list)
    for number, job in enumerate(jobs):
        job.head.folds = folds
        try:
            need = source.memory
            if not source.streamed:
                train = prepared.train
                need = check_bytes(job.head, len(train), train.width, source.memory, train.views)
        except HeadError as problem:
            yield job, str(problem)
        else:
            turns[min(count, source.memory // max(1, need))].append(number)
    for workers in sorted(turns, reverse=True):
        calls = [(jobs[number].head, prepared, folds) for number in turns[workers]]
        for place, outcome in in_parallel(fit_one, calls, workers):
            yield jobs[turns[workers][place]], outcome.reason if isinstance(outcome, Lost) else outcome


def _in_this_process(jobs: Sequence[Job], prepared: Prepared, folds: int) -> Iterator[tuple[Job, Fitted | str]]:
    """Train jobs in this process: companions together, other heads one by one."""
    together = collections.defaultdict(list)
    for job in jobs:
        if job.head.companions is None:
            yield job, fit_one(job.head, prepared, folds)
        else:
            together[type(job.head), job.head.companions].append(job)
    for group in together.values():
        for start in range(0, len(group), BANK_HEADS):
            part = group[start : start + BANK_HEADS]
            yield from zip(part, fit_companions([job.head for job in part], prepared, folds), strict=True)


def _write(job: Job, fitted: Fitted, runs: Path, folds: int, memory: int, asked: Asked) -> str:
    """Score a trained head and write its run; return the reason if the head cannot be scored or saved, else ``""``."""
    try:
        held_out = _fold_scores(job, fitted.out_of_fold, folds)
        if not is_finished(runs / job.run_id):
            write_fitted(runs, job.run_id, job.store, job.name, fitted, memory=memory, cv=held_out, plots=False)
        elif held_out is not None:
            add_scores(Run.open(runs / job.run_id), cv=held_out)
        if asked.by:
            tabled(Run.open(runs / job.run_id), job.store, asked, fitted.out_of_fold)
    except (RunError, OSError):  # the folder cannot be written, which would stop every head
        raise
    except Exception as problem:  # noqa: BLE001  predictions that are no numbers, a classifier that cannot be saved, ...
        return reason_of(problem)
    return ""


def _fold_scores(job: Job, out_of_fold: np.ndarray | None, folds: int) -> dict[str, Any] | None:
    if out_of_fold is None:
        return None
    y = targets_of(job.store, job.store.rows("train"))
    known = np.isfinite(out_of_fold).all(axis=1)
    if not known.any():
        return None
    scores = job.head.task.evaluate(out_of_fold[known], y[known], job.head.classes)
    return {**scores, "folds": folds}


def _test_chosen(jobs: Iterable[Job], board: list[dict[str, Any]], runs: Path) -> None:
    """Score the chosen head of each data set, and no other, on the test split."""
    by_id = {job.run_id: job for job in jobs}
    for row in board:
        if not row["chosen"]:
            continue
        job = by_id[row["run_id"]]
        run = Run.open(runs / job.run_id)
        if run.metrics["test"] is None:
            alike = [other for other in find_runs(runs, warn=False).runs if other.data_digest == run.data_digest]
            seen = [other.run_id for other in alike if other.metrics["test"] is not None]
            if seen:
                logger.warning(
                    "the test split was already used for %s: the more often it is used, the less its score means",
                    ", ".join(seen[:3]) + (", ..." if len(seen) > 3 else ""),
                )
            run = add_scores(run, test=test_scores(job.store, job.name, head_of(run)))
        first = run.task.choices[0]
        row[f"test_{first}"] = run.metrics["test"][first]
