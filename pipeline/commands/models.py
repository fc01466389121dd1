"""The commands about networks with their heads: finetune, predict, evaluate, export."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from features.augmentation import PRESETS
from features.errors import ConfigurationError
from pipeline.commands.common import (
    BatchSize,
    ClassLevel,
    DataSetName,
    Device,
    Json,
    LabelsFile,
    Seed,
    SplitFolders,
    Trust,
    Workers,
    app,
    arg,
    exit_if_damaged,
    guarded,
    listed_paths,
    opt,
    parse_params,
    print_document,
    print_next,
    print_note,
)
from pipeline.streams import is_closed

Moved = Annotated[
    str | None,
    opt(
        "Where the weights or the model file of the extraction are now, if they have moved.", "--weights", "--backbone"
    ),
]
Quantised = Annotated[
    str | None, opt("File of the quantised network of an int8 run, if it is neither beside the runs nor the store.")
]


@app.command()
@guarded
def finetune(
    run: Annotated[
        Path,
        arg(
            "Run of a Keras or linear head, or a folder of runs: of those that can be fine-tuned the chosen one is taken."
        ),
    ],
    images: Annotated[str | None, opt("Images that the features were made of.")] = None,
    from_cache: Annotated[
        Path | None,
        opt("Store of the features before the trained layers (extract --layer boundary); then no images are needed."),
    ] = None,
    unfreeze: Annotated[
        str,
        opt(
            "What to train: last-block, all, head, the name of the first layer to train, or the number of layers to keep frozen."
        ),
    ] = "last-block",
    bn: Annotated[
        str,
        opt("BatchNorm: frozen; affine to train gamma and beta; train to update statistics too, with --scratch only."),
    ] = "frozen",
    scratch: Annotated[bool, opt("Use the architecture only: new weights, every layer trained.", "--scratch")] = False,
    augment: Annotated[str, opt(f"Show another view of each image in each epoch: {', '.join(PRESETS)}.")] = "none",
    weights: Moved = None,
    epochs: Annotated[int, opt("Largest number of epochs.")] = 5,
    patience: Annotated[int, opt("Epochs without a lower validation loss before training stops; 0: never.")] = 2,
    learning_rate: Annotated[float, opt("Learning rate of the optimizer.")] = 1e-5,
    optimizer: Annotated[str, opt("Optimizer: adam, rmsprop or sgd.")] = "adam",
    schedule: Annotated[str, opt("Schedule of the learning rate: constant or cosine.")] = "constant",
    param: Annotated[
        list[str] | None,
        opt(
            "NAME=VALUE: momentum, nesterov, weight_decay, warmup_epochs, class_weight=balanced, initial_epoch, new_head."
        ),
    ] = None,
    mixed_precision: Annotated[bool, opt("Train in bfloat16; needs a GPU.", "--mixed-precision")] = False,
    batch_size: Annotated[int, opt("Number of images in one step of training.")] = 32,
    workers: Workers = None,
    device: Device = "auto",
    data_set: DataSetName = None,
    labels: LabelsFile = None,
    runs: Annotated[Path | None, opt("Folder for the new run. Default: that of the given run.")] = None,
    tensorboard: Annotated[Path | None, opt("Folder for TensorBoard's event files.")] = None,
    track: Annotated[
        str | None, opt("Also send the run to a server: mlflow:http://localhost:5000.", metavar="mlflow:URI")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Stage three: fine-tune the last block with the head of a run. The same command resumes after the last finished epoch."""
    from pipeline.api import models
    from pipeline.progress import ConsoleProgress
    from pipeline.tuning.settings import settings_of

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
    settings_of(settings | further)  # refuses names that the function does not have
    with ConsoleProgress() as progress:
        tuned = models.finetune(
            run,
            images,
            from_cache=from_cache,
            weights=weights,
            workers=workers,
            device=device,
            data_set=data_set,
            labels=labels,
            runs=runs,
            tensorboard=tensorboard,
            track=track,
            progress=progress,
            **settings,  # type: ignore[arg-type]  # text and numbers, which are checked
            **further,
        )
    print_document(tuned.to_dict(), as_json, str(tuned))
    print_next("bottleneck", "predict", tuned.advised, "IMAGES")
    exit_if_damaged(tuned.damaged)


def _none_for_dash(out: Path | None) -> Path | None:
    return None if out == Path("-") else out


def _source_of(images: Sequence[str]) -> str | Iterable[str]:
    """Return the only source of images, or the paths of several images, from standard input for ``-``."""
    from features.sources.archives import ARCHIVE_SUFFIXES
    from features.sources.scan import is_manifest

    if images[0] == "-" and len(images) == 1:
        if is_closed(0):
            raise ConfigurationError("standard input is closed; expected a list of paths there, one per line")
        return listed_paths(sys.stdin.buffer)
    if len(images) == 1:
        return images[0]
    for name in images:
        if (
            name == "-"
            or Path(name).is_dir()
            or is_manifest(name)
            or name.lower().endswith((*ARCHIVE_SUFFIXES, ".npz"))
        ):
            raise ConfigurationError(
                f"{name}: is no image, and of {len(images)} names each has to be one. Give one source of images alone, or "
                "images, or - and their names on standard input; --out names the file to write"
            )
    return images


@app.command()
@guarded
def predict(
    run: Annotated[Path, arg("Run, folder of runs (the one with the asterisk is taken), or exported model.")],
    images: Annotated[
        list[str],
        arg("Folder of images, images, any image source of extract, or - for paths on standard input, one per line."),
    ],
    out: Annotated[
        Path | None, opt("File to write. Default: standard output, as with -.", callback=_none_for_dash)
    ] = None,
    format: Annotated[str | None, opt("csv or jsonl. Default: from the suffix of --out, else csv.", "--format")] = None,
    top: Annotated[int | None, opt("Write only this many classes, the most probable first.")] = None,
    views: Annotated[
        int,
        opt("Average over this many views: the plain image, then variations by --augment."),
    ] = 1,
    augment: Annotated[
        str | None,
        opt(f"How views vary: {', '.join(PRESETS)}. Default: as in the run."),
    ] = None,
    grid: Annotated[Path | None, opt("PNG or JPEG file for a picture of some images with their predictions.")] = None,
    weights: Moved = None,
    quantised: Quantised = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = "auto",
    data_set: DataSetName = None,
    trust: Trust = False,
    as_json: Annotated[bool, opt("Print one JSON document about the file that --out names.", "--json")] = False,
) -> None:
    """Predict the classes of images: file, class and probabilities, as CSV or JSON lines."""
    from pipeline.api import models
    from pipeline.progress import ConsoleProgress

    if as_json and out is None:
        raise ConfigurationError("--json describes the file that --out names; for rows as JSON type --format jsonl")
    if out is None and is_closed(1):
        raise ConfigurationError("standard output is closed, so the rows would be lost; give a file with --out")
    source = _source_of(images)
    on_screen = out is None and sys.stdout.isatty()  # rows are progress enough
    with ConsoleProgress() as progress:
        found = models.predict(
            run,
            source,
            out=out or sys.stdout,
            format=format,  # type: ignore[arg-type]  # text, which is checked
            top=top,
            views=views,
            augment=augment,
            grid=grid,
            weights=weights,
            quantised=quantised,
            batch_size=batch_size,
            workers=workers,
            device=device,
            data_set=data_set,
            trust=trust,
            progress=False if on_screen else progress,
        )
    if out is not None:
        print_document(found.to_dict(), as_json, str(found))
    elif found.judgement:
        print_note(found.judgement)
    exit_if_damaged(found.damaged)


@app.command()
@guarded
def evaluate(
    run: Annotated[Path, arg("Run, folder of runs (the one with the asterisk is taken), or exported model.")],
    images: Annotated[str, arg("Labelled images: folder of class folders, archive, manifest (CSV, Parquet), ...")],
    split: Annotated[
        str | None, opt("Only the images that lie in this split of the source: train, validation or test.")
    ] = None,
    target: Annotated[str | None, opt("Label column of a manifest. Default: that of the run.")] = None,
    split_folders: SplitFolders = "",
    class_level: ClassLevel = 0,
    labels: LabelsFile = None,
    weights: Moved = None,
    quantised: Quantised = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = "auto",
    data_set: DataSetName = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Score a run on labelled images: accuracy with its interval, confusion, each class, calibration."""
    from features.sources.reading import Reading
    from pipeline.api import models
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        scored = models.evaluate(
            run,
            images,
            split=split,  # type: ignore[arg-type]  # text, which is checked
            target=target,
            reading=Reading(split_folders, class_level) if split_folders or class_level else None,
            labels=labels,
            weights=weights,
            quantised=quantised,
            batch_size=batch_size,
            workers=workers,
            device=device,
            data_set=data_set,
            trust=trust,
            progress=progress,
        )
    print_document(scored.to_dict(), as_json, str(scored))
    exit_if_damaged(scored.damaged)


@app.command()
@guarded
def export(
    run: Annotated[Path, arg("Run, or folder of runs (the one with the asterisk is taken).")],
    out: Annotated[Path, opt("File to write, or for saved_model and openvino a folder. It must not exist.")],
    format: Annotated[str, opt("Format: keras, saved_model, onnx, litert or openvino.", "--format")] = "keras",
    images: Annotated[
        str | None,
        opt("Images to compare model and run on. Default: generated ones."),
    ] = None,
    weights: Moved = None,
    quantised: Quantised = None,
    data_set: DataSetName = None,
    as_json: Json = False,
) -> None:
    """Export one model from pixels of any size to probabilities. It is run and compared; the exit code is 3 if it differs."""
    from pipeline.api import models
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        exported = models.export(
            run,
            out,
            format=format,  # type: ignore[arg-type]  # text, which is checked
            images=images,
            weights=weights,
            quantised=quantised,
            data_set=data_set,
            progress=progress,
        )
    print_document(exported.to_dict(), as_json, str(exported))
    print_next("bottleneck", "predict", out, "IMAGES")
    exit_if_damaged(exported.damaged)
