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
        list[str] | None, typer.Option(help="Current place of the images, if they have moved; may be repeated.")
    ] = None,
    features: Annotated[
        list[Path] | None, typer.Option(help="Current place of a feature store, if it has moved; may be repeated.")
    ] = None,
    choose: Annotated[str, typer.Option(help="Score to compare runs by: accuracy or balanced_accuracy.")] = "accuracy",
    folds: Annotated[bool, typer.Option("--folds", help="Compare by the scores of cross-validation.")] = False,
    as_json: Json = False,
) -> None:
    """Write one self-contained page: runs compared, mistakes, confusion, calibration, feature map, data, how to reproduce."""
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
    images: Annotated[str, typer.Argument(help="Image source, as for extract.")],
    out: Annotated[Path, typer.Option(help="PNG or JPEG file to write.")] = Path("preview.png"),
    backbone: Annotated[
        str, typer.Option(help="Network whose image size is used, unless --image-size is given.")
    ] = "mobilenetv2",
    image_size: Annotated[str | None, typer.Option(help="Image size in pixels: 224 or HEIGHTxWIDTH.")] = None,
    resize: Annotated[str, typer.Option(help="Resize rule, as for extract: antialias or keras.")] = "antialias",
    fit: Annotated[str, typer.Option(help="Fit rule, as for extract: stretch, crop or pad.")] = "stretch",
    decode: Annotated[str, typer.Option(help="Decode rule, as for extract: full or fast.")] = "full",
    augment: Annotated[str, typer.Option(help=f"Show views drawn with one of {', '.join(PRESETS)}.")] = "none",
    views: Annotated[
        int | None, typer.Option(help="Number of views of each image, the plain one included. Default: 6.")
    ] = None,
    seed: Seed = 0,
    count: Annotated[int | None, typer.Option(help="Number of images. Default: 24, or 5 with --augment.")] = None,
    target: Annotated[str | None, typer.Option(help="Manifest column that holds the label.")] = None,
    as_json: Json = False,
) -> None:
    """Draw what the network will see: sample images of all classes, or all views of a few images."""
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
