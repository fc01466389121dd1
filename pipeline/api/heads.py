"""Stage two from Python: train heads, compare runs, open one.

store, options --> pipeline.stages.train_head | pipeline.sweeps --> run folders --> Result
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import ConfigurationError, nearest
from features.machine import hosts_allowed
from features.progress import Progress
from features.shown import showing
from pipeline.api.places import Place, RunPlace
from pipeline.api.results import Leaderboard, OpenedRun, Report, Sweep, TrainedHead

if TYPE_CHECKING:
    from features.store.reader import FeatureStore
    from pipeline.sweeps.sweep_file import SweepFile

ONE_GROUP_OUT = "leave-one-group-out"


def train_head(
    store: Place | FeatureStore,
    head: str = "logistic",
    *,
    runs: Place = "runs",
    features: str | None = None,
    pool: str | None = None,
    params: Mapping[str, Any] | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    by: Sequence[str] = (),
    abstain_precision: float | None = None,
    set_coverage: float | None = None,
    test: bool = False,
    average_views: bool = False,
    tensorboard: Place | None = None,
    track: str | None = None,
    labels: Place | None = None,
    progress: bool | Progress = True,
) -> TrainedHead:
    """Train one head on the features of a store; a head that is trained already is not trained again.

    Parameters
    ----------
    store : path or FeatureStore
        Cached features.
    head : str
        Name of a head (pipeline/README.md), or a class such as ``sklearn.svm.LinearSVC``.
    runs : path
        Folder of run folders.
    features : str, optional
        Feature set, if the store has several.
    pool : {"avg", "max", "flatten"}, optional
        Pooling of spatial features; default: that of the head.
    params : dict, optional
        Parameters of the head, such as ``{"C": 0.1}``.
    seed : int, 0 to 2**32 - 1
        Random seed.
    memory : int or str, optional
        Bytes that training may use, or text such as ``"2GB"``; default: half of the free memory.
    by : sequence of str
        Columns of the manifest, or ``group``: also give the accuracy for each of their values.
    abstain_precision, set_coverage : float, optional
        Share of the answers that shall be right, and chance with which a set of classes shall hold the true one, 0.5 to 0.9999.
    test : bool
        Also score the test split.
    average_views : bool
        Also score validation with probabilities averaged over the views of each image.
    tensorboard : path, optional
        Folder for TensorBoard's event files.
    track : str, optional
        ``mlflow:URI``: also send the run to an MLflow server.
    labels : path, optional
        Labels file that is put over the labels of the store.
    progress : bool or callable
        See `features.shown.showing`.

    Raises
    ------
    ConfigurationError, HeadError
        If a name or value cannot be used, or the head cannot be trained on these images.

    Examples
    --------
    >>> from pipeline import train_head
    >>> trained = train_head("features.h5", "logistic", params={"C": 0.1})
    >>> trained.metrics["validation"]["n"], trained.cached
    (12, False)
    """
    from pipeline.heads.costs import parse_memory
    from pipeline.heads.gather import needs_rows
    from pipeline.heads.promises import Asked
    from pipeline.stages import train_head as stage
    from pipeline.sweeps.leakage import warn_near_duplicates
    from pipeline.tasks.table import task_of

    budget = parse_memory(memory) if isinstance(memory, str) else memory
    asked = Asked(abstain_precision, set_coverage, tuple(by))
    opened = opened_store(store, labels)
    names = [] if features is None else [features]
    check_head(head, pool, params or {})
    needs_rows(opened, "train", "validation")
    finish = _finisher([opened], names, runs, tensorboard, track, average_views=average_views)
    with showing(progress) as told:
        result = stage.train_head(
            opened, head, runs=runs, name=features, pool=pool, seed=seed, params=params, memory=budget, test=test,
            asked=asked, ready=lambda: warn_near_duplicates(opened, names), progress=told,
        )  # fmt: skip
    if result.cached:
        _renew(runs, [result.run_id])
    document = {
        "format": 1,
        "run": str(result.folder),
        "cached": result.cached,
        "fit_seconds": result.fit_seconds,
        "metrics": finish(result.folder),
    }
    columns = task_of(opened).columns
    return TrainedHead(document, lambda document: _trained_text(document, columns, streamed=result.streamed))


def train_heads(
    stores: Place | FeatureStore | Sequence[Place | FeatureStore],
    heads: Place | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    *,
    runs: Place = "runs",
    features: Sequence[str] = (),
    seed: int | None = None,
    n_jobs: int | None = None,
    folds: int | str | None = None,
    memory: int | str | None = None,
    choose: str | None = None,
    by: Sequence[str] = (),
    abstain_precision: float | None = None,
    set_coverage: float | None = None,
    test: bool = False,
    average_views: bool = False,
    tensorboard: Place | None = None,
    track: str | None = None,
    labels: Place | None = None,
    cluster: str | None = None,
    progress: bool | Progress = True,
) -> Sweep:
    """Train many heads and choose one; heads that are trained already are not trained again.

    Parameters
    ----------
    stores : path, FeatureStore, or a sequence of them
        Every head is trained on each.
    heads : path, dict or list
        A sweep file, or what stands in one: ``{"version": 1, "heads": [{"head": "logistic", "grid": {"C": [0.1, 1]}}]}``,
        or its heads only: ``["ridge", {"head": "logistic", "grid": {"C": [0.1, 1]}}]``.
    features : sequence of str
        Feature sets to use; default: all.
    seed, choose : optional
        Instead of those of the sweep.
    n_jobs : int, optional
        Number of processes; default: one for each processor.
    folds : int or "leave-one-group-out", optional
        Also cross-validate each head on the training images. Default: 5 for several heads and fewer than 30 validation
        images, else 0.
    cluster : str, optional
        ``local:N``, or the address of a Dask scheduler.
    runs, memory, by, abstain_precision, set_coverage, test, average_views, tensorboard, track, labels, progress
        As for `train_head`; only the chosen head is scored on the test split and promises something.

    Raises
    ------
    ConfigurationError, HeadError
        If a name or value cannot be used. A head that fails is listed in ``failed`` and does not stop the others.

    Examples
    --------
    >>> from pipeline import train_heads
    >>> swept = train_heads("features.h5", {"version": 1, "heads": [{"head": "logistic", "grid": {"C": [0.1, 1.0]}}]}, folds=0)
    >>> len(swept.board), swept.chosen == swept.board[0]["run_id"]
    (2, True)
    """
    import contextlib

    from pipeline.heads.costs import parse_memory
    from pipeline.heads.gather import needs_rows
    from pipeline.heads.promises import Asked
    from pipeline.runs.board import check_choice
    from pipeline.sweeps.leakage import warn_near_duplicates
    from pipeline.sweeps.sweep import result_document, run_sweep, summary

    budget = parse_memory(memory) if isinstance(memory, str) else memory
    asked = Asked(abstain_precision, set_coverage, tuple(by))
    if choose is not None:
        check_choice(choose)
    opened = [opened_store(store, labels) for store in _listed(stores)]
    sweep, where = _sweep_of(heads)
    for store in opened:
        needs_rows(store, "train", "validation")
    count = folds_of(folds, opened)
    finish = _finisher(opened, features, runs, tensorboard, track, average_views=average_views)
    given = {"seed": seed, "choose": choose}
    sweep = sweep.model_copy(update={name: value for name, value in given.items() if value is not None})
    folder = Path(runs)

    def ready() -> None:
        for store in opened:
            warn_near_duplicates(store, features)

    with contextlib.ExitStack() as stack:
        told = stack.enter_context(showing(progress))
        if cluster is not None:
            from pipeline.cluster.connection import sweeping

            stack.enter_context(sweeping(cluster, folder))
            folder = folder.absolute()  # workers have working folders of their own
        result = run_sweep(
            opened, sweep, runs=folder, names=features, jobs=n_jobs, folds=count, memory=budget, test=test,
            asked=asked, where=where, ready=ready, progress=told,
        )  # fmt: skip
    for run_id in result.runs if tensorboard is not None or average_views or track is not None else ():
        finish(Path(runs) / run_id)
    if result.cached:
        _renew(runs, result.runs)
    return Sweep(result_document(result, runs), lambda document, width=None: summary(result, runs, width=width))


def leaderboard(
    runs: Place = "runs", *, choose: str = "accuracy", folds: bool | None = None, data_set: str | None = None
) -> Leaderboard:
    """Compare runs, the best first.

    Parameters
    ----------
    runs : path
        Folder of run folders.
    choose : {"accuracy", "balanced_accuracy", "worst_group_accuracy"}
        Score to compare by.
    folds : bool, optional
        Compare by cross-validation. Default: if there are fewer than 30 validation images.
    data_set : str, optional
        Only this data set: its name, its source, or digits of its digest.

    Raises
    ------
    ConfigurationError
        If there is no such score, fold or data set.

    Examples
    --------
    >>> from pipeline import leaderboard
    >>> board = leaderboard("runs")
    >>> board.chosen == board.rows[0]["run_id"], len(board.to_dict()["rows"]) == len(board.rows)
    (True, True)
    """
    from pipeline.runs.board import board_of, check_choice
    from pipeline.runs.folder import find_runs
    from pipeline.tables import board_text

    check_choice(choose)
    found = find_runs(runs)
    rows = board_of(found.runs, by=choose, folds=folds, data_set=data_set)
    chosen = next((row["run_id"] for row in rows if row["chosen"]), None)
    document = {"format": 1, "rows": rows, "chosen": chosen, "damaged": list(found.damaged)}
    return Leaderboard(document, lambda document: board_text(document["rows"]))


def open_run(run: RunPlace, *, data_set: str | None = None) -> OpenedRun:
    """Open a run, or the chosen one of a folder of runs.

    Parameters
    ----------
    run : path
        Run folder, or folder of run folders.
    data_set : str, optional
        Data set, if the folder holds runs of several.

    Raises
    ------
    RunError
        If there is no such run, or one of its files is damaged.

    Examples
    --------
    >>> from pipeline import open_run
    >>> run = open_run("runs")
    >>> run.classes, run.metrics["validation"]["n"]
    (['cat', 'dog'], 12)
    """
    from pipeline.api.mistakes import mistakes_of
    from pipeline.runs.board import take_run
    from pipeline.tables import metrics_text

    chosen, damaged = take_run(os.fspath(run), data_set=data_set)
    document = {
        "format": 1,
        "run": str(chosen.folder),
        "run_id": chosen.run_id,
        "task": chosen.task.name,
        "classes": list(chosen.classes),
        "metrics": chosen.metrics,
        "config": chosen.config,
        "mistakes": mistakes_of(chosen) if chosen.task.one_class else [],
        "damaged": list(damaged),
    }
    return OpenedRun(document, lambda document: metrics_text(document["metrics"], chosen.task.columns))


def report(
    runs: Place = "runs",
    out: Place = "report.html",
    *,
    images: Sequence[str] = (),
    features: Sequence[Place] = (),
    choose: str = "accuracy",
    folds: bool | None = None,
    data_set: str | None = None,
    labels: Place | None = None,
    audit: Place | None = None,
    allow_host: str = "",
    progress: bool | Progress = True,
) -> Report:
    """Write one self-contained page about runs: compared, with mistakes, confusion, calibration, and how to reproduce.

    Parameters
    ----------
    runs, out : path
        Folder of run folders, or one run; HTML file to write.
    images, features : sequence
        Where the images and the stores are now, if they have moved.
    choose, folds, data_set
        As for `leaderboard`.
    labels : path, optional
        Where the labels file is now under which runs were trained, if it has moved.
    audit : path, optional
        CSV file of an audit, whose worst images are shown.
    allow_host : str
        Hosts inside a private network that addresses of images may reach, with commas.
    progress : bool or callable
        See `features.shown.showing`.

    Raises
    ------
    RunError, ConfigurationError
        If there is no finished run, or a value cannot be used.

    Examples
    --------
    >>> from pipeline import report
    >>> report("runs", "report.html").out
    'report.html'
    """
    from pipeline.stages import report as stage

    with showing(progress) as told, hosts_allowed(allow_host):
        document = stage.make_report(
            runs, out, images=images, stores=features, by=choose, folds=folds, data_set=data_set, labels=labels,
            audit=audit, progress=told,
        )  # fmt: skip
    return Report(document, stage.summary)


def opened_store(store: Place | FeatureStore, labels: Place | None = None) -> FeatureStore:
    """Open a store where its path is given, and put a labels file over it where one is named."""
    from features.store.reader import FeatureStore
    from pipeline.labels.overlay import with_labels

    opened = FeatureStore.open(store) if isinstance(store, str | Path) else store
    return opened if labels is None else with_labels(opened, labels)


def _listed(stores: Place | FeatureStore | Sequence[Place | FeatureStore]) -> list[Place | FeatureStore]:
    if isinstance(stores, Sequence) and not isinstance(stores, str):
        return list(stores)
    return [stores]


def check_head(head: str, pool: str | None, params: Mapping[str, Any]) -> None:
    """Check a name and values before features are read, which may take a while."""
    from pipeline.heads.kinds import make_head

    if not {"pool", "seed", "classes", "layer", "fingerprint"} & set(params):  # these are refused with a reason later
        make_head(head, pool=pool, **params)


def only(head: str, params: Mapping[str, Any], pool: str | None = None) -> dict[str, Any]:
    """Return a sweep of a single head."""
    grid = {name: [value] for name, value in ({**params, "pool": pool} if pool else params).items()}
    return {"version": 1, "heads": [{"head": head, "grid": grid}]}


def _sweep_of(heads: Place | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]) -> tuple[SweepFile, str]:
    """Return a checked sweep, and its name in messages."""
    from pipeline.config import parse
    from pipeline.sweeps import sweep_file

    if isinstance(heads, Sequence) and not isinstance(heads, str):
        heads = {"version": 1, "heads": [{"head": one} if isinstance(one, str) else one for one in heads]}
    if isinstance(heads, Mapping):
        where = "heads"
        sweep = parse(sweep_file.SweepFile, dict(heads), where)
    else:
        where = str(heads)
        sweep = sweep_file.read_sweep(heads)
    sweep_file.expand(sweep, where)
    return sweep, where


def folds_of(folds: int | str | None, stores: Sequence[FeatureStore]) -> int | None:
    """Return the number of folds: a number, or one for each group of the training rows.

    Raises
    ------
    ConfigurationError
        If it is neither.
    HeadError
        If one group cannot be left out at a time.
    """
    from pipeline.heads.gather import groups_to_leave_out

    if folds is None or isinstance(folds, int):
        return folds
    if folds.strip().removeprefix("-").isdecimal():
        return int(folds)
    if folds != ONE_GROUP_OUT:
        raise ConfigurationError(
            f"--folds: received {folds!r}, expected a number, or {ONE_GROUP_OUT}{nearest(folds, [ONE_GROUP_OUT])}"
        )
    return max(groups_to_leave_out(store) for store in stores)


def _finisher(
    stores: Sequence[FeatureStore],
    names: Sequence[str],
    runs: Place,
    tensorboard: Place | None,
    track: str | None,
    *,
    average_views: bool,
) -> Callable[[Path], dict[str, Any]]:
    """Check what was asked for after training, and return what does it and gives the metrics of a run."""
    from features.files import creatable_folder
    from pipeline.runs.folder import Run
    from pipeline.runs.tensorboard import log_run, require_tensorboard
    from pipeline.runs.tracking import tracker
    from pipeline.stages.train_head import add_averaged, needs_views

    for store in stores if average_views else ():
        needs_views(store, names)
    creatable_folder(Path(runs))
    if tensorboard is not None:
        require_tensorboard()
    send = None if track is None else tracker(track)

    def finish(folder: Path) -> dict[str, Any]:
        if tensorboard is not None:
            log_run(Path(tensorboard), folder)
        run = Run.open(folder)
        metrics = (add_averaged(run, stores) if average_views else run).metrics
        if send is not None:
            send(folder)
        return metrics

    return finish


def _renew(runs: Place, run_ids: Sequence[str]) -> None:
    """Make the state of runs that were there before the newest."""
    from pipeline.runs.board import renew_states

    renew_states(runs, run_ids)


def _trained_text(document: dict[str, Any], columns: Callable[..., dict[str, Any]], *, streamed: bool) -> str:
    from pipeline.tables import group_lines, metrics_text, promise_lines

    metrics = document["metrics"]
    done = "already trained" if document["cached"] else f"trained in {document['fit_seconds']:.1f} s"
    done += ", from rows that were streamed from the store" if streamed else ""
    further = [*promise_lines(metrics.get("answers")), *group_lines(metrics.get("groups"))]
    return "\n".join([f"{document['run']}: {done}", metrics_text(metrics, columns), *further])
