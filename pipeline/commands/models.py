"""Commands about whole models, from pixels to probabilities: finetune, predict, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.common import (
    BatchSize,
    Device,
    Json,
    Seed,
    Workers,
    app,
    guarded,
    print_document,
    print_next,
)


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
    print_document(document, as_json, stage.summary(document))
    print_next(f"bottleneck predict {document['run']} IMAGES")


@app.command()
@guarded
def predict(
    run: Annotated[
        Path, typer.Argument(help="A run folder, a folder of runs (the best one is taken), or an exported model.")
    ],
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
    print_next(f"bottleneck predict {out} IMAGES")
