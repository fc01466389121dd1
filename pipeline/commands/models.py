"""Commands about whole models, from pixels to probabilities: finetune, predict, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from features.augmentation import PRESETS
from features.errors import ConfigurationError
from pipeline.commands.common import (
    BatchSize,
    Device,
    Json,
    Seed,
    Workers,
    app,
    guarded,
    listed_paths,
    parse_params,
    print_document,
    print_next,
)


@app.command()
@guarded
def finetune(
    run: Annotated[
        Path, typer.Argument(help="A run of a Keras head, or a folder of runs (the newest such run is taken).")
    ],
    images: Annotated[str | None, typer.Option(help="The images that the features were made of.")] = None,
    from_cache: Annotated[
        Path | None,
        typer.Option(
            help="A store of the features before the trained layers (extract --layer boundary); no images needed."
        ),
    ] = None,
    unfreeze: Annotated[
        str, typer.Option(help="last-block, all, head, the first layer to train, or its number (so many are frozen).")
    ] = "last-block",
    bn: Annotated[
        str,
        typer.Option(help="frozen; affine to train gamma and beta; train to update statistics too, from scratch only."),
    ] = "frozen",
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Architecture only: draw all weights anew and train every layer.")
    ] = False,
    augment: Annotated[str, typer.Option(help=f"Another view in each epoch: {', '.join(PRESETS)}.")] = "none",
    weights: Annotated[str | None, typer.Option(help="Weights file, where that of the extraction has moved.")] = None,
    epochs: Annotated[int, typer.Option(help="Most epochs.")] = 5,
    patience: Annotated[
        int, typer.Option(help="Epochs without a better validation loss before stopping; 0: train all.")
    ] = 2,
    learning_rate: Annotated[float, typer.Option(help="Of the optimizer.")] = 1e-5,
    optimizer: Annotated[str, typer.Option(help="adam, rmsprop or sgd.")] = "adam",
    schedule: Annotated[str, typer.Option(help="constant, or cosine.")] = "constant",
    param: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE: momentum, nesterov, weight_decay, warmup_epochs, class_weight=balanced, initial_epoch, new_head."
        ),
    ] = None,
    mixed_precision: Annotated[bool, typer.Option("--mixed-precision", help="Train in bfloat16, on a GPU.")] = False,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    runs: Annotated[Path | None, typer.Option(help="Folder for the new run. Default: beside the head's.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's event files.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Stage three: fine-tune the last block, from a run's head. Interrupted, it goes on after the last finished epoch."""
    from pipeline import finetune as stage
    from pipeline.progress import ConsoleProgress

    settings = {
        "unfreeze": unfreeze,
        "bn": bn,
        "scratch": scratch,
        "augment": augment,
        "epochs": epochs,
        "patience": patience,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "schedule": schedule,
        "mixed_precision": mixed_precision,
        "batch_size": batch_size,
        "seed": seed,
    }
    further = parse_params(param or [])
    if twice := sorted(settings.keys() & further.keys()):
        raise ConfigurationError(
            f"--param: {', '.join(twice)} has an option of its own: --{twice[0].replace('_', '-')}"
        )
    with ConsoleProgress() as progress:
        document = stage.finetune(
            run,
            images,
            from_cache=from_cache,
            weights=weights,
            workers=workers,
            device=device,
            runs=runs,
            tensorboard=tensorboard,
            progress=progress,
            **settings,
            **further,
        )
    print_document(document, as_json, stage.summary(document))
    print_next("bottleneck", "predict", document["run"], "IMAGES")


@app.command()
@guarded
def predict(
    run: Annotated[
        Path, typer.Argument(help="A run folder, a folder of runs (the best one is taken), or an exported model.")
    ],
    images: Annotated[
        str,
        typer.Argument(
            help="A folder of images, one image, any source that extract takes, or -: paths from standard input, one per line."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="File to write. Default: standard output.")] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="csv or jsonl. Default: by the name of --out, else csv.")
    ] = None,
    top: Annotated[int | None, typer.Option(help="Only so many classes, the most probable first.")] = None,
    views: Annotated[
        int, typer.Option(help="Average over so many views of each image: the plain one, and variations by --augment.")
    ] = 1,
    augment: Annotated[
        str | None, typer.Option(help=f"{', '.join(PRESETS)}. Default: what the run's features were drawn from.")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="Picture to draw of some images, right and wrong marked: PNG or JPEG.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weights file, where that of the extraction has moved.")] = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document about what --out holds.")] = False,
) -> None:
    """File, class and probabilities of new images, as CSV or JSON lines."""
    from pipeline import predict as stage
    from pipeline.progress import ConsoleProgress

    if as_json and out is None:
        raise ConfigurationError("--json describes the file that --out names; for rows as JSON type --format jsonl")
    on_screen = out is None and sys.stdout.isatty()  # rows are progress enough
    with ConsoleProgress() as progress:
        document = stage.predict(
            run,
            listed_paths(sys.stdin.buffer) if images == "-" else images,
            out=out,
            format=format,
            top=top,
            views=views,
            augment=augment,
            grid=grid,
            weights=weights,
            batch_size=batch_size,
            workers=workers,
            device=device,
            progress=None if on_screen else progress,
        )
    if out is not None:
        print_document(document, as_json, stage.summary(document))


@app.command()
@guarded
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs (the best one is taken).")],
    out: Annotated[Path, typer.Option(help="File to make; of saved_model and openvino a folder. It must not exist.")],
    format: Annotated[str, typer.Option("--format", help="keras, saved_model, onnx, litert or openvino.")] = "keras",
    images: Annotated[
        str | None, typer.Option(help="Images to compare on, before and after. Default: painted ones.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weights file, where that of the extraction has moved.")] = None,
    as_json: Json = False,
) -> None:
    """One artefact from pixels of any size to probabilities, proven by its own runtime; exit code 3 if it differs."""
    from pipeline import export as stage
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        document = stage.export(run, format=format, out=out, images=images, weights=weights, progress=progress)
    print_document(document, as_json, stage.summary(document))
    print_next("bottleneck", "predict", out, "IMAGES")
