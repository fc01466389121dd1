"""The command line: read options, call a stage, print one document. Everything heavy is imported inside a command."""

from __future__ import annotations

import errno
import functools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from features.augmentation import PRESETS
from features.errors import BottleneckError, ConfigurationError

app = typer.Typer(
    name="bottleneck",
    help="Compute the features of a frozen backbone once, train heads on them in seconds, fine-tune the last block.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn this project's errors and Ctrl-C into one line on stderr and the exit code that belongs to them."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; what was finished is kept. Run the same command again to go on.\n")
            raise typer.Exit(130) from None
        except BottleneckError as error:
            sys.stderr.write(f"error: {error}\n")
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone
                raise
            sys.stderr.write(f"error: {error.filename or 'the system'}: {error.strerror or error}\n")
            raise typer.Exit(1) from None

    return wrapper


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Runs = Annotated[Path, typer.Option(help="Folder of run folders.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Device = Annotated[str, typer.Option(help="auto, cpu or gpu.")]
BatchSize = Annotated[int, typer.Option(help="Images of one forward pass.")]
Workers = Annotated[int | None, typer.Option(help="Threads that read and decode. Default: the processors.")]
Weights = Annotated[str, typer.Option(help="imagenet, random, or a weights file.")]


@app.command()
@guarded
def extract(
    images: Annotated[
        str, typer.Argument(help="Folder of class folders, archive, manifest (CSV, Parquet), .npz, or sample:digits.")
    ],
    out: Annotated[Path, typer.Option(help="The HDF5 file to make or bring up to date.")] = Path("features.h5"),
    backbone: Annotated[str, typer.Option(help="Name such as mobilenetv2 or vgg16, or a .keras file.")] = "mobilenetv2",
    weights: Weights = "imagenet",
    layer: Annotated[
        list[str] | None, typer.Option(help="Layer to keep; repeatable; 'boundary' is before the last block.")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="avg, max, flatten or none. Default: avg for the last layer, none with --layer.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Pixels: 224 or HEIGHTxWIDTH. Default: the backbone's.")
    ] = None,
    resize: Annotated[
        str, typer.Option(help="antialias, or keras as image_dataset_from_directory does.")
    ] = "antialias",
    fit: Annotated[str, typer.Option(help="stretch, crop or pad.")] = "stretch",
    views: Annotated[
        int,
        typer.Option(help="Views of each image: the plain one, and random variations of it by --augment and --seed."),
    ] = 1,
    augment: Annotated[str, typer.Option(help=f"Of all views but the first: {', '.join(PRESETS)}.")] = "none",
    dtype: Annotated[str, typer.Option(help="float32 or float16, as stored.")] = "float32",
    split: Annotated[
        str, typer.Option(help="hash[:0.8,0.1,0.1] or stratified[:0.75,0.25]; given splits are kept.")
    ] = "hash",
    seed: Seed = 0,
    target: Annotated[str | None, typer.Option(help="Manifest column that holds the label.")] = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    engine: Annotated[str, typer.Option(help="auto, keras or openvino (processors; extra 'openvino').")] = "auto",
    precision: Annotated[
        str, typer.Option(help="Arithmetic: float32, bfloat16 or float16; each is another recipe.")
    ] = "float32",
    check_precision: Annotated[
        int, typer.Option(help="Compare so many images with float32, and keep the difference in the store.")
    ] = 0,
    decode: Annotated[
        str, typer.Option(help="full, or fast: JPEGs shrunk while they are decoded; another recipe.")
    ] = "full",
    shard_rows: Annotated[
        int | None, typer.Option(help="Images of one shard. Default: about 64 MiB of features.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="packed: one file; sharded: an index, and shards that stay. Default: as it is.")
    ] = None,
    max_unreadable: Annotated[
        float, typer.Option(help="Largest share of unreadable images; exit code 4 above it.")
    ] = 0.05,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read every image again, unchanged or not.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse the same bytes in two splits.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store of another recipe or other images.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Stage one: push every image through a frozen backbone once and keep the features."""
    from pipeline import extract as stage
    from pipeline.progress import ConsoleProgress

    options: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights,
        "layers": tuple(layer or ()),
        "pooling": pooling,
        "image_size": parse_size(image_size),
        "resize": resize,
        "fit": fit,
        "views": views,
        "augment": augment,
        "dtype": dtype,
        "split": split,
        "seed": seed,
        "target": target,
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "engine": engine,
        "precision": precision,
        "decode": decode,
        "check_precision": check_precision,
        "shard_rows": shard_rows,
        "layout": layout,
        "max_unreadable": max_unreadable,
        "overwrite": overwrite,
        "rehash": rehash,
        "strict": strict,
    }
    if dry_run:
        document = stage.plan(images, out, **options)
        _print(document, as_json, stage.plan_summary(document))
        return
    with ConsoleProgress() as progress:
        document = stage.run(images, out, progress=progress, **options)
    _print(document, as_json, stage.summary(document))
    _next(f"bottleneck train-head {out} --head logistic")


@app.command()
@guarded
def inspect(file: Annotated[Path, typer.Argument(help="A feature store.")], as_json: Json = False) -> None:
    """What is in a store: rows, classes, splits, data sets, recipes, unreadable images."""
    from features.store import FeatureStore
    from pipeline import extract as stage

    document = stage.describe(FeatureStore.open(file))
    _print(document, as_json, stage.summary(document))


@app.command()
@guarded
def verify(file: Annotated[Path, typer.Argument(help="A feature store.")], as_json: Json = False) -> None:
    """Recompute every checksum of a store; exit code 3 if one differs."""
    from features.store import FeatureStore
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        store = FeatureStore.open(file)
        blocks = store.verify(progress)
    document = {"format": 1, "file": str(file), "rows": len(store), "blocks": blocks, "ok": True}
    _print(document, as_json, f"{file}: {len(store)} rows, {blocks} blocks, every checksum holds")


@app.command()
@guarded
def pack(
    file: Annotated[Path, typer.Argument(help="A sharded store.")],
    out: Annotated[Path | None, typer.Option(help="Another file to write. Default: in place of the store.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a sharded store into one file."""
    from features.extraction import pack_store
    from pipeline import extract as stage
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        store = pack_store(file, out, progress=progress)
    document = stage.describe(store)
    _print(document, as_json, stage.summary(document))


@app.command("train-head")
@guarded
def train_head(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Feature stores.")],
    head: Annotated[
        str | None,
        typer.Option(help="A preset (README), or a classifier such as sklearn.svm.LinearSVC. Default: logistic."),
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
        str | None, typer.Option(help="What training may take, such as 2GB. Default: half of what is free.")
    ] = None,
    choose: Annotated[str | None, typer.Option(help="accuracy or balanced_accuracy.")] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Also measure on the test split; of a sweep only the chosen head.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stage two: train a head, or a sweep of heads, on cached features."""
    from features.store import FeatureStore
    from pipeline import train_head as stage
    from pipeline.costs import parse_memory
    from pipeline.leakage import warn_near_duplicates
    from pipeline.progress import ConsoleProgress

    budget = None if memory is None else parse_memory(memory)
    stores = [FeatureStore.open(file) for file in files]
    names = data_set or []
    for store in stores:
        warn_near_duplicates(store, names)
    if heads is None and len(stores) == 1 and len(names) < 2 and not folds:
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
                progress=progress,
            )
        document = {
            "format": 1,
            "run": str(result.folder),
            "cached": result.cached,
            "fit_seconds": result.fit_seconds,
            "metrics": result.metrics,
        }
        done = "already trained" if result.cached else f"trained in {result.fit_seconds:.1f} s"
        _print(document, as_json, f"{result.folder}: {done}\n{metrics_lines(result.metrics)}")
        _next(f"bottleneck leaderboard {runs}")
        return
    from pipeline.sweep_file import read_sweep, single
    from pipeline.sweeps import result_document, run_sweep, summary

    if heads is not None and (head or param or pool):
        raise ConfigurationError("--head, --param and --pool name one head, --heads a sweep; give one or the other")
    sweep = read_sweep(heads) if heads else single(head or "logistic", parse_params(param or []), pool)
    if seed is not None:
        sweep = sweep.model_copy(update={"seed": seed})
    with ConsoleProgress() as progress:
        swept = run_sweep(
            stores,
            sweep,
            runs=runs,
            names=names,
            jobs=n_jobs,
            folds=folds,
            memory=budget,
            choose=choose,
            test=test,
            where=str(heads or "--head"),
            progress=progress,
        )
    _print(result_document(swept, runs), as_json, summary(swept, runs))
    if not swept.runs:
        raise typer.Exit(1)
    _next(f"bottleneck leaderboard {runs}{' --folds' if folds else ''}")


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
    from pipeline.board import leaderboard as rows_of
    from pipeline.tables import board_text, csv_text

    rows = rows_of(runs, by=choose, folds=folds)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        typer.echo(csv_text(rows) if as_csv else board_text(rows), nl=not as_csv)


@app.command()
@guarded
def finetune(
    run: Annotated[
        Path, typer.Argument(help="A run of a Keras head, or a folder of runs (the newest such run is taken).")
    ],
    images: Annotated[str, typer.Option(help="The images that the features were made of.")],
    unfreeze: Annotated[str, typer.Option(help="last-block, a layer name, or a layer number.")] = "last-block",
    bn: Annotated[
        str, typer.Option(help="frozen, or affine to train gamma and beta; statistics are never touched.")
    ] = "frozen",
    weights: Annotated[str | None, typer.Option(help="Weights file, where that of the extraction has moved.")] = None,
    epochs: Annotated[int, typer.Option(help="Most epochs.")] = 5,
    patience: Annotated[int, typer.Option(help="Epochs without a better validation loss before stopping.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-5,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    runs: Annotated[Path | None, typer.Option(help="Folder for the new run. Default: beside the head's.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Stage three: fine-tune the last block end to end, from a run's head."""
    from pipeline import finetune as stage
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        document = stage.finetune(
            run,
            images,
            unfreeze=unfreeze,
            bn=bn,
            weights=weights,
            epochs=epochs,
            patience=patience,
            learning_rate=learning_rate,
            batch_size=batch_size,
            workers=workers,
            device=device,
            runs=runs,
            seed=seed,
            progress=progress,
        )
    _print(document, as_json, stage.summary(document))
    _next(f"bottleneck predict {document['run']} IMAGES")


@app.command()
@guarded
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs (the best one is taken).")],
    images: Annotated[str, typer.Argument(help="A folder of images, one image, or any source that extract takes.")],
    out: Annotated[Path | None, typer.Option(help="CSV file. Default: standard output.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights file, where that of the extraction has moved.")] = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """File, class and probabilities of new images, as CSV."""
    from pipeline import predict as stage
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        text = stage.predict_csv(
            run,
            images,
            out=out,
            weights=weights,
            batch_size=batch_size,
            workers=workers,
            device=device,
            progress=progress,
        )
    typer.echo(text, nl=False)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``"224"`` -> (224, 224); ``"192x256"`` -> (192, 256), height first.

    Raises
    ------
    ConfigurationError
        For anything else.
    """
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ConfigurationError(
            f"--image-size: received {text!r}, expected PIXELS or HEIGHTxWIDTH, such as 224 or 192x256"
        )
    return int(numbers[0]), int(numbers[-1])


def parse_params(items: list[str]) -> dict[str, Any]:
    """``["C=0.1", "hidden=[256]"]`` -> values, read as JSON where they are JSON, else as text."""
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--param: received {item!r}, expected NAME=VALUE")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def metrics_lines(metrics: dict[str, Any]) -> str:
    """One line per split that was measured."""
    lines = []
    for split in ("validation", "test"):
        values = metrics.get(split)
        if values:
            low, high = values["accuracy_interval"]
            lines.append(
                f"  {split}: accuracy {values['accuracy']:.4f} (95 % {low:.4f} to {high:.4f}), "
                f"log loss {values['log_loss']:.4f}, {values['n']} images"
            )
    return "\n".join(lines)


def _print(document: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(document, indent=2) if as_json else text)


def _next(command: str) -> None:
    typer.echo(f"next: {command}", err=True)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code (DESIGN section 3)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)

    try:
        app(args=arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
