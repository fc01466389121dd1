"""The commands of stage two: train-head, leaderboard."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from features.errors import ConfigurationError
from features.files import printable_lines
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
    from pipeline.api import heads as api
    from pipeline.progress import ConsoleProgress
    from pipeline.runs.board import check_choice
    from pipeline.scores.selection import FEW, USUAL_FOLDS

    if choose is not None:
        check_choice(choose)
    if heads is not None and (head or param or pool):
        raise ConfigurationError("--head, --param and --pool name one head, --heads a sweep; give one or the other")
    stores, names, params = open_stores(files, labels), data_set or [], parse_params(param or [])
    one = heads is None and len(stores) == 1 and len(names) < 2
    if choose is not None and one:
        raise ConfigurationError(
            "--choose: compares heads, and there is only one; leave it out, or train --heads SWEEP"
        )
    if heads is None:
        api.check_head(head or "logistic", pool, params)
    folds = api.folds_of(n_folds, stores)
    common: dict[str, Any] = {
        "runs": runs,
        "memory": memory,
        "by": by or (),
        "abstain_precision": abstain_precision,
        "set_coverage": set_coverage,
        "test": test,
        "average_views": average_views,
        "tensorboard": tensorboard,
        "track": track,
    }
    with ConsoleProgress() as progress:
        if one and not folds and cluster is None:
            chosen: dict[str, Any] = {"features": names[0] if names else None, "pool": pool, "params": params}
            trained = api.train_head(
                stores[0], head or "logistic", seed=seed or 0, progress=progress, **chosen, **common
            )
        else:
            trained = None
            sweep = heads or api.only(head or "logistic", params, pool)
            swept = api.train_heads(
                stores, sweep, features=names, seed=seed, n_jobs=n_jobs, folds=folds, choose=choose, cluster=cluster,
                progress=progress, **common,
            )  # fmt: skip
    if trained is not None:
        print_document(trained.to_dict(), as_json, str(trained))
        few = trained.metrics["validation"]["n"]
        if few < FEW and folds is None:
            print_note(
                f"only {counted(few, 'validation image')}: each makes up {100 / few:.0f} % of the score. --folds {USUAL_FOLDS} "
                "compares heads by the training images"
            )
        _note_stale(runs, [Path(trained.run).name], stores, cached=trained.cached)
        print_next("bottleneck", "leaderboard", runs)
        return
    print_document(swept.to_dict(), as_json, swept.text(columns_of_terminal()))
    _note_stale(runs, swept.runs, stores, cached=bool(swept.cached))
    if swept.runs:
        print_next("bottleneck", "leaderboard", runs, *(["--folds"] if folds else []))
    if swept.failed:
        raise typer.Exit(1)


def _note_stale(runs: Path, run_ids: Sequence[str], stores: Sequence[FeatureStore], *, cached: bool) -> None:
    """Say if other commands take another run, although the state of runs that were there before is the newest now."""
    from pipeline.runs.board import note_on_older_state

    trial = any(store.provenance.get("limit") for store in stores)
    if (cached or trial) and (note := note_on_older_state(runs, run_ids)):
        print_note(note)


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
    from pipeline.api import heads as api
    from pipeline.predicting.files import destination
    from pipeline.scores.selection import WORST_GROUP
    from pipeline.tables import board_text, csv_text

    if as_csv and as_json:
        raise ConfigurationError("--csv and --json are two forms of the same list; give one of them")
    if worst_group:
        if choose not in ("accuracy", WORST_GROUP):
            raise ConfigurationError(f"--worst-group and --choose {choose} compare by two scores; give one of them")
        choose = WORST_GROUP
    board = api.leaderboard(runs, choose=choose, folds=folds, data_set=data_set)
    rows = board.rows
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif as_csv:
        with destination(None, sys.stdout, "csv") as write:
            write(csv_text(rows))
    else:
        typer.echo(printable_lines(board_text(rows, width=columns_of_terminal())))
    if not as_json and not as_csv:
        print_next("bottleneck", *(["report", runs] if rows else ["train-head", "FEATURES", "--runs", runs]))
    exit_if_damaged(board.damaged)
