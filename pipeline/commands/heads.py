"""The commands of stage two: train-head, leaderboard."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from features.errors import ConfigurationError, nearest
from features.files import creatable_folder, printable_lines
from features.progress import counted
from pipeline.commands.common import (
    Cluster,
    DataSetName,
    Json,
    LabelsFile,
    Runs,
    app,
    arg,
    columns_of_terminal,
    exit_if_damaged,
    guarded,
    open_stores,
    opt,
    parse_params,
    print_document,
    print_next,
    print_note,
)

if TYPE_CHECKING:
    from features.store.reader import FeatureStore
    from pipeline.sweeps.sweep import SweepResult
    from pipeline.sweeps.sweep_file import SweepFile


ONE_GROUP_OUT = "leave-one-group-out"


@app.command("train-head")
@guarded
def train_head(
    files: Annotated[list[Path], arg("Feature stores.", metavar="FILE...")],
    head: Annotated[
        str | None,
        opt("Name of a head (pipeline/README.md), or a class such as sklearn.svm.LinearSVC. Default: logistic."),
    ] = None,
    heads: Annotated[Path | None, opt("Sweep file, to train many heads.")] = None,
    data_set: Annotated[
        list[str] | None, opt("Feature set, if the store has several; repeatable.", "--features")
    ] = None,
    pool: Annotated[
        str | None,
        opt("Pooling of spatial features: avg, max or flatten. Default: the head's."),
    ] = None,
    param: Annotated[list[str] | None, opt("Parameter of the head, NAME=VALUE; may be repeated.")] = None,
    runs: Runs = Path("runs"),
    seed: Annotated[int | None, opt("Random seed. Default: 0, or that of the sweep file.")] = None,
    n_jobs: Annotated[int | None, opt("Number of processes of a sweep. Default: one for each processor.")] = None,
    n_folds: Annotated[
        str | None,
        opt(
            "Also cross-validate each head with this many folds of the training rows, or leave-one-group-out; 0: do not. "
            "Default: 5 for several heads and fewer than 30 validation images, else 0.",
            "--folds",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        opt(
            "Memory for training, such as 2GB. Rows that do not fit stay in the store. Default: half of the free memory."
        ),
    ] = None,
    choose: Annotated[
        str | None, opt("Score to compare heads by: accuracy, balanced_accuracy or worst_group_accuracy.")
    ] = None,
    by: Annotated[
        list[str] | None,
        opt("Column of the manifest, or group: also give the accuracy for each of its values. May be repeated."),
    ] = None,
    abstain_precision: Annotated[
        float | None,
        opt("Find the confidence from which on this share of the answers is right, such as 0.99; others are withheld."),
    ] = None,
    set_coverage: Annotated[
        float | None,
        opt("Find sets of classes that hold the true one with this chance. Default with --abstain-precision: 0.9."),
    ] = None,
    test: Annotated[bool, opt("Also score the test split; in a sweep only for the chosen head.", "--test")] = False,
    average_views: Annotated[
        bool,
        opt("Also score validation with probabilities averaged over the views of each image.", "--average-views"),
    ] = False,
    tensorboard: Annotated[Path | None, opt("Write the history of each run for TensorBoard.", metavar="DIR")] = None,
    track: Annotated[
        str | None, opt("Also send the run to a server: mlflow:http://localhost:5000.", metavar="mlflow:URI")
    ] = None,
    labels: LabelsFile = None,
    cluster: Cluster = None,
    as_json: Json = False,
) -> None:
    """Stage two: train a head, or a sweep of heads, on cached features."""
    from pipeline.heads.costs import parse_memory
    from pipeline.heads.gather import needs_rows
    from pipeline.heads.promises import Asked
    from pipeline.runs.board import check_choice
    from pipeline.runs.folder import Run
    from pipeline.runs.tensorboard import log_run, require_tensorboard
    from pipeline.runs.tracking import tracker
    from pipeline.scores.selection import FEW, USUAL_FOLDS
    from pipeline.stages.train_head import add_averaged, needs_views
    from pipeline.sweeps.leakage import warn_near_duplicates

    def finish(run: Path) -> dict[str, Any]:
        """Do what was asked for after training, and return the metrics of the run."""
        if tensorboard is not None:
            log_run(tensorboard, run)
        metrics = add_averaged(Run.open(run), stores).metrics if average_views else Run.open(run).metrics
        if send is not None:
            send(run)
        return metrics

    budget = None if memory is None else parse_memory(memory)
    asked = Asked(abstain_precision, set_coverage, tuple(by or ()))
    if choose is not None:
        check_choice(choose)
    stores = open_stores(files, labels)
    names = data_set or []
    _refuse_slips(head, heads, pool, parse_params(param or []))
    for store in stores:
        needs_rows(store, "train", "validation")
        if average_views:
            needs_views(store, names)
    folds = parse_folds(n_folds, stores)
    creatable_folder(runs)
    if tensorboard is not None:
        require_tensorboard()
    send = tracker(track) if track is not None else None

    def ready() -> None:
        for store in stores:
            warn_near_duplicates(store, names)

    one = heads is None and len(stores) == 1 and len(names) < 2
    if choose is not None and one:
        raise ConfigurationError(
            "--choose: compares heads, and there is only one; leave it out, or train --heads SWEEP"
        )
    common: dict[str, Any] = {"runs": runs, "memory": budget, "test": test, "asked": asked, "ready": ready}
    if one and not folds and cluster is None:
        chosen: dict[str, Any] = {
            "name": names[0] if names else None,
            "pool": pool,
            "params": parse_params(param or []),
        }
        document, text = _train_one(stores[0], head or "logistic", finish, seed=seed or 0, **chosen, **common)
        print_document(document, as_json, text)
        few = document["metrics"]["validation"]["n"]
        if few < FEW and folds is None:
            print_note(
                f"only {counted(few, 'validation image')}: each makes up {100 / few:.0f} % of the score. --folds {USUAL_FOLDS} "
                "compares heads by the training images"
            )
        _note_stale(runs, [Path(document["run"]).name], stores, cached=document["cached"])
        print_next("bottleneck", "leaderboard", runs)
        return
    from pipeline.sweeps.sweep import result_document, summary
    from pipeline.sweeps.sweep_file import read_sweep, single

    if heads is not None and (head or param or pool):
        raise ConfigurationError("--head, --param and --pool name one head, --heads a sweep; give one or the other")
    sweep = read_sweep(heads) if heads else single(head or "logistic", parse_params(param or []), pool)
    given = {"seed": seed, "choose": choose}
    sweep = sweep.model_copy(update={name: value for name, value in given.items() if value is not None})
    options: dict[str, Any] = {
        "names": names,
        "jobs": n_jobs,
        "folds": folds,
        "where": str(heads or "--head"),
    }
    swept = _train_many(stores, sweep, cluster, **options, **common)
    for run_id in swept.runs if tensorboard is not None or average_views or send is not None else ():
        finish(runs / run_id)
    print_document(result_document(swept, runs), as_json, summary(swept, runs, width=columns_of_terminal()))
    _note_stale(runs, swept.runs, stores, cached=bool(swept.cached))
    if swept.runs:
        print_next("bottleneck", "leaderboard", runs, *(["--folds"] if folds else []))
    if swept.failed:
        raise typer.Exit(1)


def parse_folds(text: str | None, stores: Sequence[FeatureStore]) -> int | None:
    """Return the number of folds that ``--folds`` asks for: a number, or one for each group of the training rows.

    Raises
    ------
    ConfigurationError
        If it is neither.
    HeadError
        If one group cannot be left out at a time.
    """
    from pipeline.heads.gather import groups_to_leave_out

    if text is None or text.strip().removeprefix("-").isdecimal():
        return None if text is None else int(text)
    if text != ONE_GROUP_OUT:
        raise ConfigurationError(
            f"--folds: received {text!r}, expected a number, or {ONE_GROUP_OUT}{nearest(text, [ONE_GROUP_OUT])}"
        )
    return max(groups_to_leave_out(store) for store in stores)


def _note_stale(runs: Path, run_ids: Sequence[str], stores: Sequence[FeatureStore], *, cached: bool) -> None:
    """Make the state of runs that were there before the newest; say if other commands take another run even so."""
    from pipeline.runs.board import note_on_older_state, renew_states

    if cached:
        renew_states(runs, run_ids)
    trial = any(store.provenance.get("limit") for store in stores)
    if (cached or trial) and (note := note_on_older_state(runs, run_ids)):
        print_note(note)


def _train_one(
    store: FeatureStore, head: str, finish: Callable[[Path], dict[str, Any]], **options: Any
) -> tuple[dict[str, Any], str]:
    """Train one head; return the document and its text for a person."""
    from pipeline.progress import ConsoleProgress
    from pipeline.runs.folder import Run
    from pipeline.stages import train_head as stage
    from pipeline.tables import group_lines, metrics_text, promise_lines

    with ConsoleProgress() as progress:
        result = stage.train_head(store, head, progress=progress, **options)
    metrics = finish(result.folder)
    document = {
        "format": 1,
        "run": str(result.folder),
        "cached": result.cached,
        "fit_seconds": result.fit_seconds,
        "metrics": metrics,
    }
    done = "already trained" if result.cached else f"trained in {result.fit_seconds:.1f} s"
    done += ", from rows that were streamed from the store" if result.streamed else ""
    further = [*promise_lines(metrics.get("answers")), *group_lines(metrics.get("groups"))]
    columns = Run.open(result.folder).task.columns
    return document, "\n".join([f"{result.folder}: {done}", metrics_text(metrics, columns), *further])


def _train_many(
    stores: Sequence[FeatureStore], sweep: SweepFile, cluster: str | None, *, runs: Path, **options: Any
) -> SweepResult:
    """Train a sweep, on a cluster where one is named."""
    from pipeline.progress import ConsoleProgress
    from pipeline.sweeps.sweep import run_sweep

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ConsoleProgress())
        if cluster is not None:
            from pipeline.cluster.connection import sweeping

            stack.enter_context(sweeping(cluster, runs))
            runs = runs.absolute()  # workers have working folders of their own
        return run_sweep(stores, sweep, runs=runs, progress=progress, **options)


def _refuse_slips(head: str | None, heads: Path | None, pool: str | None, params: dict[str, Any]) -> None:
    """Check names and values before features are read, which may take a while."""
    from pipeline.heads.kinds import make_head
    from pipeline.sweeps.sweep_file import expand, read_sweep

    if heads is not None:
        expand(read_sweep(heads), str(heads))
    elif not {"pool", "seed", "classes", "layer", "fingerprint"} & set(params):  # these are refused with a reason later
        make_head(head or "logistic", pool=pool, **params)


@app.command()
@guarded
def leaderboard(
    runs: Annotated[Path, arg("Folder of run folders.")] = Path("runs"),
    choose: Annotated[
        str, opt("Score to compare runs by: accuracy, balanced_accuracy or worst_group_accuracy.")
    ] = "accuracy",
    worst_group: Annotated[
        bool,
        opt(
            "Compare by the worst group (train-head --by): its accuracy, or the mean error of its numbers.",
            "--worst-group",
        ),
    ] = False,
    folds: Annotated[
        bool | None,
        opt(
            "Compare by cross-validation. Default: if there are fewer than 30 validation images.", "--folds/--no-folds"
        ),
    ] = None,
    data_set: DataSetName = None,
    as_csv: Annotated[bool, opt("Print CSV.", "--csv")] = False,
    as_json: Json = False,
) -> None:
    """List runs, the best first; an asterisk marks the one that predict, evaluate, export and finetune take.

    With --folds or --choose it may mark another; a warning says so.
    """
    from pipeline.predicting.files import destination
    from pipeline.runs.board import board_of, check_choice
    from pipeline.runs.folder import find_runs
    from pipeline.scores.selection import WORST_GROUP
    from pipeline.tables import board_text, csv_text

    if as_csv and as_json:
        raise ConfigurationError("--csv and --json are two forms of the same list; give one of them")
    if worst_group:
        if choose not in ("accuracy", WORST_GROUP):
            raise ConfigurationError(f"--worst-group and --choose {choose} compare by two scores; give one of them")
        choose = WORST_GROUP
    check_choice(choose)
    found = find_runs(runs)
    rows = board_of(found.runs, by=choose, folds=folds, data_set=data_set)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif as_csv:
        with destination(None, sys.stdout, "csv") as write:
            write(csv_text(rows))
    else:
        typer.echo(printable_lines(board_text(rows, width=columns_of_terminal())))
    if not as_json and not as_csv:
        print_next("bottleneck", *(["report", runs] if rows else ["train-head", "FEATURES", "--runs", runs]))
    exit_if_damaged(found.damaged)
