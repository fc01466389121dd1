"""Commands about heads: train-head, leaderboard."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from features.errors import ConfigurationError
from features.files import creatable_folder
from pipeline.commands.common import (
    Cluster,
    Json,
    Runs,
    app,
    guarded,
    parse_params,
    print_document,
    print_next,
)


@app.command("train-head")
@guarded
def train_head(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Feature stores.")],
    head: Annotated[
        str | None,
        typer.Option(help="A head (pipeline/README.md), or a class such as sklearn.svm.LinearSVC. Default: logistic."),
    ] = None,
    heads: Annotated[Path | None, typer.Option(help="A sweep file: many heads at once.")] = None,
    data_set: Annotated[
        list[str] | None, typer.Option("--features", help="Data set of the store, where it has several; repeatable.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="avg, max or flatten for spatial features. Default: the head's.")
    ] = None,
    param: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the head; repeatable.")] = None,
    runs: Runs = Path("runs"),
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn. Default: 0, or the sweep's.")] = None,
    n_jobs: Annotated[int | None, typer.Option(help="Processes of a sweep. Default: the processors.")] = None,
    folds: Annotated[
        int, typer.Option(help="Judge each head by that many folds of the training rows too; 0: by validation only.")
    ] = 0,
    memory: Annotated[
        str | None,
        typer.Option(help="Of training, such as 2GB; rows beyond it stay in the store. Default: half of what is free."),
    ] = None,
    choose: Annotated[str | None, typer.Option(help="accuracy or balanced_accuracy.")] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Also measure on the test split; of a sweep only the chosen head.")
    ] = False,
    average_views: Annotated[
        bool, typer.Option("--average-views", help="Also score validation by the mean over the views of each image.")
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the history of each run for TensorBoard.")
    ] = None,
    cluster: Cluster = None,
    as_json: Json = False,
) -> None:
    """Stage two: train a head, or a sweep of heads, on cached features."""
    from features.store.reader import FeatureStore
    from pipeline import train_head as stage
    from pipeline.heads.costs import parse_memory
    from pipeline.progress import ConsoleProgress
    from pipeline.runs.board import check_choice
    from pipeline.runs.folder import Run
    from pipeline.runs.tensorboard import log_run, require_tensorboard
    from pipeline.sweeps.leakage import warn_near_duplicates
    from pipeline.tables import metrics_text

    def finish(run: Path) -> dict[str, Any]:
        """What is asked for beside training; the metrics then."""
        if tensorboard is not None:
            log_run(tensorboard, run)
        return stage.add_averaged(Run.open(run), stores).metrics if average_views else Run.open(run).metrics

    budget = None if memory is None else parse_memory(memory)
    if choose is not None:
        check_choice(choose)
    stores = [FeatureStore.open(file) for file in files]
    names = data_set or []
    _refuse_slips(head, heads, pool, parse_params(param or []))
    for store in stores:
        stage.needs_rows(store, "train", "validation")
        if average_views:
            stage.needs_views(store, names)
    creatable_folder(runs)
    if tensorboard is not None:
        require_tensorboard()

    def ready() -> None:
        for store in stores:
            warn_near_duplicates(store, names)

    if heads is None and len(stores) == 1 and len(names) < 2 and not folds and cluster is None:
        with ConsoleProgress() as progress:
            result = stage.train_head(
                stores[0],
                head or "logistic",
                runs=runs,
                name=names[0] if names else None,
                pool=pool,
                seed=seed or 0,
                params=parse_params(param or []),
                memory=budget,
                test=test,
                ready=ready,
                progress=progress,
            )
        metrics = finish(result.folder)
        document = {
            "format": 1,
            "run": str(result.folder),
            "cached": result.cached,
            "fit_seconds": result.fit_seconds,
            "metrics": metrics,
        }
        done = "already trained" if result.cached else f"trained in {result.fit_seconds:.1f} s"
        done += ", from rows read piece by piece" if result.streamed else ""
        print_document(document, as_json, f"{result.folder}: {done}\n{metrics_text(metrics)}")
        print_next("bottleneck", "leaderboard", runs)
        return
    from pipeline.sweeps.sweep import result_document, run_sweep, summary
    from pipeline.sweeps.sweep_file import read_sweep, single

    if heads is not None and (head or param or pool):
        raise ConfigurationError("--head, --param and --pool name one head, --heads a sweep; give one or the other")
    sweep = read_sweep(heads) if heads else single(head or "logistic", parse_params(param or []), pool)
    if seed is not None:
        sweep = sweep.model_copy(update={"seed": seed})
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ConsoleProgress())
        if cluster is not None:
            from pipeline.cluster.connection import sweeping

            stack.enter_context(sweeping(cluster, runs))
        swept = run_sweep(
            stores,
            sweep,
            runs=runs if cluster is None else runs.absolute(),  # workers have folders of their own
            names=names,
            jobs=n_jobs,
            folds=folds,
            memory=budget,
            choose=choose,
            test=test,
            where=str(heads or "--head"),
            ready=ready,
            progress=progress,
        )
    for run_id in swept.runs if tensorboard is not None or average_views else ():
        finish(runs / run_id)
    print_document(result_document(swept, runs), as_json, summary(swept, runs))
    if not swept.runs:
        raise typer.Exit(1)
    print_next("bottleneck", "leaderboard", runs, *(["--folds"] if folds else []))


def _refuse_slips(head: str | None, heads: Path | None, pool: str | None, params: dict[str, Any]) -> None:
    """Say that a name or value is wrong before features are read, which may take a while."""
    from pipeline.heads.kinds import make_head
    from pipeline.sweeps.sweep_file import expand, read_sweep

    if heads is not None:
        expand(read_sweep(heads), str(heads))
    elif not {"pool", "seed", "classes", "layer", "fingerprint"} & set(params):  # these are refused with a reason later
        make_head(head or "logistic", pool=pool, **params)


@app.command()
@guarded
def leaderboard(
    runs: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path("runs"),
    choose: Annotated[str, typer.Option(help="Compare by accuracy or balanced_accuracy.")] = "accuracy",
    folds: Annotated[bool, typer.Option("--folds", help="Compare by cross-validation.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Json = False,
) -> None:
    """The table of runs, best first; an asterisk marks the one to choose."""
    from pipeline.runs.board import leaderboard as rows_of
    from pipeline.tables import board_text, csv_text

    rows = rows_of(runs, by=choose, folds=folds)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        typer.echo(csv_text(rows) if as_csv else board_text(rows), nl=not as_csv)
    if not as_json and not as_csv:
        print_next("bottleneck", *(["report", runs] if rows else ["train-head", "FEATURES", "--runs", runs]))
