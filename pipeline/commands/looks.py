"""Commands for the eye: report, preview."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from features.augmentation import PRESETS
from pipeline.commands.common import Json, Seed, app, guarded, parse_size, print_document


@app.command()
@guarded
def report(
    runs: Annotated[Path, typer.Argument(help="Folder of run folders, or one run.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    images: Annotated[
        list[str] | None, typer.Option(help="Where the images are now, if they have moved; repeatable.")
    ] = None,
    features: Annotated[
        list[Path] | None, typer.Option(help="Where a feature store is now, if it has moved; repeatable.")
    ] = None,
    choose: Annotated[str, typer.Option(help="Compare by accuracy or balanced_accuracy.")] = "accuracy",
    folds: Annotated[bool, typer.Option("--folds", help="Compare by cross-validation.")] = False,
    as_json: Json = False,
) -> None:
    """One self-contained page: runs compared, mistakes, confusion, calibration, feature map, data, how to reproduce."""
    from pipeline import report as stage
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        document = stage.make_report(
            runs, out, images=images or [], stores=features or [], by=choose, folds=folds, progress=progress
        )
    print_document(document, as_json, stage.summary(document))


@app.command()
@guarded
def preview(
    images: Annotated[str, typer.Argument(help="Any source that extract takes.")],
    out: Annotated[Path, typer.Option(help="PNG or JPEG file to write.")] = Path("preview.png"),
    backbone: Annotated[
        str, typer.Option(help="Whose image size is used, where --image-size is not given.")
    ] = "mobilenetv2",
    image_size: Annotated[str | None, typer.Option(help="Pixels: 224 or HEIGHTxWIDTH.")] = None,
    resize: Annotated[str, typer.Option(help="antialias, or keras.")] = "antialias",
    fit: Annotated[str, typer.Option(help="stretch, crop or pad.")] = "stretch",
    decode: Annotated[str, typer.Option(help="full, or fast.")] = "full",
    augment: Annotated[str, typer.Option(help=f"Show views by one of {', '.join(PRESETS)}.")] = "none",
    views: Annotated[int | None, typer.Option(help="Views of each image, the plain one counted. Default: 6.")] = None,
    seed: Seed = 0,
    count: Annotated[int | None, typer.Option(help="Images. Default: 24, with --augment 5.")] = None,
    target: Annotated[str | None, typer.Option(help="Manifest column that holds the label.")] = None,
    as_json: Json = False,
) -> None:
    """A picture of what the network will see: sample images of all classes, or some under each of their views."""
    from pipeline import preview as stage

    document = stage.preview(
        images,
        out,
        backbone=backbone,
        image_size=parse_size(image_size),
        resize=resize,
        fit=fit,
        decode=decode,
        augment=augment,
        views=views,
        seed=seed,
        count=count,
        target=target,
    )
    print_document(document, as_json, stage.summary(document))
