"""Commands for the eye: report, preview, review."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from features.augmentation import PRESETS
from pipeline.commands.common import (
    ClassLevel,
    DataSetName,
    Json,
    Seed,
    SplitFolders,
    app,
    arg,
    exit_if_damaged,
    guarded,
    opt,
    parse_size,
    print_document,
    print_note,
)


@app.command()
@guarded
def report(
    runs: Annotated[Path, arg("Folder of run folders, or one run.")] = Path("runs"),
    out: Annotated[Path, opt("HTML file to write.")] = Path("report.html"),
    images: Annotated[list[str] | None, opt("Where the images are now, if they have moved; may be repeated.")] = None,
    features: Annotated[list[Path] | None, opt("Where a store is now, if it has moved; may be repeated.")] = None,
    choose: Annotated[
        str, opt("Score to compare runs by: accuracy, balanced_accuracy or worst_group_accuracy.")
    ] = "accuracy",
    folds: Annotated[
        bool | None,
        opt(
            "Compare by cross-validation. Default: if there are fewer than 30 validation images.", "--folds/--no-folds"
        ),
    ] = None,
    data_set: DataSetName = None,
    labels: Annotated[
        Path | None, opt("Where the labels file of runs that were trained under one is now, if it has moved.")
    ] = None,
    audit: Annotated[Path | None, opt("CSV file of an audit, whose worst images are shown.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained page: runs compared, mistakes, confusion, calibration, feature map, data, how to reproduce."""
    from pipeline.api.heads import report as make_report
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        written = make_report(
            runs,
            out,
            images=images or [],
            features=features or [],
            choose=choose,
            folds=folds,
            data_set=data_set,
            labels=labels,
            audit=audit,
            progress=progress,
        )
    print_document(written.to_dict(), as_json, str(written))
    exit_if_damaged(written.damaged)


@app.command()
@guarded
def preview(
    images: Annotated[str, arg("Image source, as for extract.")],
    out: Annotated[Path, opt("PNG or JPEG file to write.")] = Path("preview.png"),
    backbone: Annotated[str, opt("Network whose image size is used, unless --image-size is given.")] = "mobilenetv2",
    image_size: Annotated[str | None, opt("Image size in pixels: 224 or HEIGHTxWIDTH.")] = None,
    preprocess: Annotated[str | None, opt("JSON file that says how images are prepared, as for extract.")] = None,
    resize: Annotated[str | None, opt("Resize rule, as for extract: antialias, bicubic or keras.")] = None,
    fit: Annotated[str | None, opt("Fit rule, as for extract: stretch, crop, pad or crop:EDGE.")] = None,
    decode: Annotated[str, opt("Decode rule, as for extract: full or fast.")] = "full",
    channels: Annotated[str, opt("Channels, as for extract.")] = "",
    scale: Annotated[str, opt("Values that become black and white, as for extract.")] = "",
    frame: Annotated[int, opt("Frame of DICOM files, as for extract.", min=0)] = 0,
    augment: Annotated[str, opt(f"Show views drawn with one of {', '.join(PRESETS)}.")] = "none",
    views: Annotated[int | None, opt("Number of views of each image, the plain one included. Default: 6.")] = None,
    seed: Seed = 0,
    count: Annotated[int | None, opt("Number of images. Default: 24, or 5 with --augment.")] = None,
    target: Annotated[str | None, opt("Manifest column that holds the label.")] = None,
    split_folders: SplitFolders = "",
    class_level: ClassLevel = 0,
    as_json: Json = False,
) -> None:
    """Draw what the network will see: sample images of all classes, or all views of a few images."""
    from pipeline.stages import preview as stage

    document = stage.preview(
        images,
        out,
        backbone=backbone,
        image_size=parse_size(image_size),
        preprocess=preprocess,
        resize=resize,
        fit=fit,
        decode=decode,
        channels=channels,
        scale=scale,
        frame=frame,
        augment=augment,
        views=views,
        seed=seed,
        count=count,
        target=target,
        split_folders=split_folders,
        class_level=class_level,
    )
    print_document(document, as_json, stage.summary(document))


@app.command()
@guarded
def review(
    file: Annotated[Path, arg("Feature store.", metavar="FEATURES")],
    labels: Annotated[Path, opt("Labels file: its decisions are shown, and new ones are added.")] = Path("labels.csv"),
    images: Annotated[list[str] | None, opt("Where the images are now, if they have moved; may be repeated.")] = None,
    by: Annotated[str | None, opt("Who decides; recorded with each decision. Default: your user name.")] = None,
    host: Annotated[str, opt("Address to listen on. Others than 127.0.0.1 are not encrypted.")] = "127.0.0.1",
    port: Annotated[int, opt("Port to listen on; 0: any free one.")] = 8765,
    as_json: Json = False,
) -> None:
    """Serve a local page where people correct labels and a head learns from them at once; Ctrl-C ends it."""
    from features.store.reader import FeatureStore
    from pipeline.review.server import Review

    served = Review(FeatureStore.open(file), labels, images=images or [], host=host, port=port, by=by)
    if not served.is_private:
        print_note(f"warning: others can reach {host}, and what is sent is not encrypted; ssh -L is safer")
    document = {"format": 1, "address": served.address, "labels": str(labels)}
    print_document(document, as_json, f"open {served.address}\ndecisions go to {labels}; Ctrl-C ends the server")
    sys.stdout.flush()
    served.serve()
