"""The commands of stage one: extract, compare, inspect, verify, pack; and doctor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from features.augmentation import PRESETS
from features.errors import ConfigurationError, IntegrityError
from pipeline.commands.common import (
    BatchSize,
    ClassLevel,
    Cluster,
    Device,
    Json,
    MergeLabels,
    Runs,
    Seed,
    SplitFolders,
    Weights,
    Workers,
    app,
    arg,
    guarded,
    opt,
    parse_size,
    print_document,
    print_next,
)


@app.command()
@guarded
def extract(
    images: Annotated[
        str,
        arg(
            "Folder of class folders, archive, tars of WebDataset, Parquet files with images, a bucket (s3://, gs://), "
            "manifest (CSV, Parquet) whose rows may be addresses, .npz, or sample:digits."
        ),
    ],
    out: Annotated[Path, opt("HDF5 file to create or update.")] = Path("features.h5"),
    backbone: Annotated[
        str,
        opt(
            "Network: a name such as mobilenetv2, a .keras or .onnx file, a folder with an ONNX file, or preset:FOLDER of KerasHub."
        ),
    ] = "mobilenetv2",
    weights: Weights = "imagenet",
    layer: Annotated[
        list[str] | None,
        opt("Layer to keep; may be repeated. 'boundary' is the layer before the last block. Default: the last layer."),
    ] = None,
    pooling: Annotated[
        str | None,
        opt(
            "How features are pooled: avg, max, flatten or none; for tokens also cls, tokens or cls+tokens. Default: none "
            "with --layer; else avg, or cls where there is a class token."
        ),
    ] = None,
    image_size: Annotated[str | None, opt("Image size in pixels: 224 or HEIGHTxWIDTH. Default: the network's.")] = None,
    prefix_tokens: Annotated[
        int | None, opt("Tokens before those of the image: 1 for a class token. Default: what the description says.")
    ] = None,
    preprocess: Annotated[
        str | None, opt("JSON file that says how pixels become the input of an ONNX file. Default: the one beside it.")
    ] = None,
    resize: Annotated[
        str | None,
        opt(
            "antialias, bicubic, or keras for the pixels of image_dataset_from_directory. Default: what the network's "
            "description says, else antialias."
        ),
    ] = None,
    fit: Annotated[
        str | None,
        opt(
            "How images of another shape are fitted: stretch, crop, pad, or crop:EDGE (shorter edge to EDGE, then the "
            "centre). Default: what the network's description says, else stretch."
        ),
    ] = None,
    views: Annotated[
        int,
        opt("Number of views of each image: the plain one, then variations by --augment and --seed."),
    ] = 1,
    augment: Annotated[str, opt(f"How all views but the first are varied: {', '.join(PRESETS)}.")] = "none",
    dtype: Annotated[str, opt("Type of the stored features: float32 or float16.")] = "float32",
    split: Annotated[
        str | None,
        opt(
            "Split rule: hash[:0.8,0.1,0.1] or stratified[:0.75,0.25]. Given splits are kept. Default: that of the store; "
            "hash for a new one."
        ),
    ] = None,
    validation_from_train: Annotated[float, opt("Share of the given training images to move to validation.")] = 0.0,
    test_from_validation: Annotated[float, opt("Share of the given validation images to move to test.")] = 0.0,
    seed: Seed = 0,
    task: Annotated[
        str, opt("What is to be predicted: classification, multilabel (any number of labels) or regression (numbers).")
    ] = "classification",
    target: Annotated[
        str | None, opt("Manifest column that holds the label; for other tasks also several, with commas between them.")
    ] = None,
    split_folders: SplitFolders = "",
    class_level: ClassLevel = 0,
    merge_labels: MergeLabels = False,
    limit: Annotated[int | None, opt("Use at most this many images, for a trial run.", min=1)] = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = "auto",
    engine: Annotated[
        str,
        opt(
            "What runs the network: auto, keras, openvino (for CPUs; extra 'openvino'), or onnxruntime for an ONNX file."
        ),
    ] = "auto",
    precision: Annotated[
        str,
        opt("Arithmetic: float32, bfloat16, float16 or int8. Each is a recipe of its own."),
    ] = "float32",
    quantised: Annotated[
        str | None,
        opt(
            "File of the quantised network for int8. Default: that of the store; a new store makes one (extra 'int8')."
        ),
    ] = None,
    check_precision: Annotated[int, opt("Compare this many images with float32; the store keeps the difference.")] = 0,
    decode: Annotated[str, opt("full, or fast to shrink JPEGs while decoding. Each is a recipe of its own.")] = "full",
    channels: Annotated[
        str,
        opt(
            "Channels of images that have others than RGB: three numbers counted from 1, such as 3,2,1; one; first or mean."
        ),
    ] = "",
    scale: Annotated[
        str,
        opt("Values that become black and white: LOW:HIGH, percentile:LOW,HIGH or dtype. Default: as the file says."),
    ] = "",
    frame: Annotated[int, opt("Frame of DICOM files that have several, counted from 1.", min=0)] = 0,
    shard_rows: Annotated[int | None, opt("Number of images in one shard. Default: about 64 MiB of features.")] = None,
    layout: Annotated[
        str | None,
        opt(
            "packed for one file, sharded for an index and its shards. Default: that of the store; packed for a new one."
        ),
    ] = None,
    max_unreadable: Annotated[float, opt("Largest allowed share of unreadable images; exit code 4 above it.")] = 0.05,
    rehash: Annotated[bool, opt("Read every image again, even if it looks unchanged.", "--rehash")] = False,
    trust_times: Annotated[
        bool, opt("Take an image of the same size and modification time for unchanged.", "--trust-times")
    ] = False,
    strict: Annotated[bool, opt("Refuse a source that has the same image bytes in two splits.", "--strict")] = False,
    overwrite: Annotated[bool, opt("Replace a store that has another recipe or other images.", "--overwrite")] = False,
    cluster: Cluster = None,
    dry_run: Annotated[bool, opt("Print what would be done and its cost; write nothing.", "--dry-run")] = False,
    as_json: Json = False,
) -> None:
    """Stage one: push every image through a frozen network once and keep the features."""
    from features.extraction.options import ExtractionOptions
    from pipeline.progress import ConsoleProgress
    from pipeline.stages import extract as stage

    options = ExtractionOptions(
        backbone=backbone,
        weights=weights,
        layers=tuple(layer or ()),
        pooling=pooling,
        prefix_tokens=prefix_tokens,
        preprocess=preprocess,
        image_size=parse_size(image_size),
        resize=resize,
        fit=fit,
        views=views,
        augment=augment,
        dtype=dtype,
        split=_with_moves(split, validation_from_train, test_from_validation),
        seed=seed,
        target=target,
        task=task,
        split_folders=split_folders,
        class_level=class_level,
        merge_labels=merge_labels,
        limit=limit,
        batch_size=batch_size,  # type: ignore[arg-type]  # None: as many as usual
        workers=workers,
        device=device,
        engine=engine,
        precision=precision,
        quantised=quantised,
        decode=decode,
        channels=channels,
        scale=scale,
        frame=frame,
        check_precision=check_precision,
        shard_rows=shard_rows,
        layout=layout,
        max_unreadable=max_unreadable,
        overwrite=overwrite,
        rehash=rehash,
        trust_times=trust_times,
        strict=strict,
    )
    if dry_run:
        with ConsoleProgress() as progress:
            document = stage.plan(images, out, options, progress=progress, cluster=cluster)
        print_document(document, as_json, stage.plan_summary(document))
        return
    with ConsoleProgress() as progress:
        document = stage.run(images, out, options, progress=progress, cluster=cluster)
    print_document(document, as_json, stage.summary(document))
    _print_next(document, out, options.layers)


def _print_next(document: dict[str, Any], out: Path, layers: Sequence[str]) -> None:
    """Suggest the next command that works on the store: none if it cannot be trained on, which warnings have explained."""
    if layers == ("boundary",):
        print_next("bottleneck", "finetune", "runs", "--from-cache", out)
    elif (len(document["classes"]) > 1 or "target" in document) and {"train", "validation"} <= document[
        "splits"
    ].keys():
        several = ["--features", min(document["data_sets"])] if len(document["data_sets"]) > 1 else []
        head = "ridge" if document.get("target", {}).get("task") == "regression" else "logistic"
        print_next("bottleneck", "train-head", out, "--head", head, *several)


def _with_moves(split: str | None, validation_from_train: float, test_from_validation: float) -> str | None:
    """Add the two options that move given images to the text of a split rule; None if none of the three is given."""
    shares = {"validation-from-train": validation_from_train, "test-from-validation": test_from_validation}
    added = [f"{name}:{share}" for name, share in shares.items() if share]
    return "+".join([split or "hash", *added]) if added else split


@app.command()
@guarded
def compare(
    images: Annotated[str, arg("Image source with labels, as for extract.")],
    backbones: Annotated[
        list[str],
        opt("Networks, as --backbone of extract, separated by commas; may be repeated, as for paths with commas."),
    ],
    limit: Annotated[int, opt("Number of images of the sample.", min=2)] = 500,
    weights: Annotated[
        list[str] | None,
        opt("Weights file of one of the networks; may be repeated.", metavar="NETWORK=FILE"),
    ] = None,
    preprocess: Annotated[
        list[str] | None,
        opt("How images are prepared for one of the networks; may be repeated.", metavar="NETWORK=FILE.json"),
    ] = None,
    stores: Annotated[
        Path | None,
        opt("Folder for the features, which extract takes up. Default: compare/ and the name of the source."),
    ] = None,
    out: Annotated[
        Path | None, opt("PNG or JPEG file to write. Default: compare.png in the folder of --stores.")
    ] = None,
    image_size: Annotated[
        str | None, opt("Image size in pixels: 224 or HEIGHTxWIDTH. Default: each network's.")
    ] = None,
    precision: Annotated[str, opt("Arithmetic: float32, bfloat16, float16 or int8.")] = "float32",
    engine: Annotated[str, opt("What runs the networks: auto, keras, openvino or onnxruntime.")] = "auto",
    device: Device = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    seed: Seed = 0,
    target: Annotated[str | None, opt("Manifest column that holds the label.")] = None,
    split_folders: SplitFolders = "",
    class_level: ClassLevel = 0,
    merge_labels: MergeLabels = False,
    as_json: Json = False,
) -> None:
    """Compare networks on a sample: accuracy of a cross-validated head, images per second, time for all images."""
    from pipeline.api import looking
    from pipeline.progress import ConsoleProgress
    from pipeline.stages import compare as stage

    names = [name for item in backbones for name in stage.names_in(item)]
    with ConsoleProgress() as progress:
        compared = looking.compare_networks(
            images,
            names,
            limit=limit,
            weights=stage.files_of_networks("--weights", weights or [], names),
            preprocess=stage.files_of_networks("--preprocess", preprocess or [], names),
            stores=stores,
            out=out,
            progress=progress,
            image_size=parse_size(image_size),
            precision=precision,  # type: ignore[arg-type]  # text, which is checked
            engine=engine,  # type: ignore[arg-type]  # text, which is checked
            device=device,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            target=target,
            split_folders=split_folders,
            class_level=class_level,
            merge_labels=merge_labels,
        )
    print_document(compared.to_dict(), as_json, str(compared))
    if not compared.networks:
        raise typer.Exit(1)
    print_next(*compared.next)


@app.command()
@guarded
def inspect(file: Annotated[Path, arg("A feature store.")], as_json: Json = False) -> None:
    """Describe a store: rows, classes, splits, feature sets, recipes, unreadable images."""
    from features.store.reader import FeatureStore
    from pipeline.stages import extract as stage

    document = stage.describe(FeatureStore.open(file))
    classes = f"\n{stage.class_table(document)}" if document["classes"] else ""
    classes += f"\n{stage.target_table(document)}" if "target" in document else ""
    print_document(document, as_json, f"{stage.summary(document)}\n{stage.origin(document)}{classes}")


@app.command()
@guarded
def verify(
    file: Annotated[Path, arg("A feature store.")],
    gone: Annotated[
        list[str] | None,
        opt(
            "Hash of a forgotten image, or a file of hashes: search every byte of store and runs for it; may be repeated."
        ),
    ] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Recompute every checksum of a store; exit code 3 if one differs, or if a trace of a forgotten image is found."""
    from features.store.reader import FeatureStore
    from pipeline.progress import ConsoleProgress
    from pipeline.stages import extract as stage
    from pipeline.stages.forget import found_again

    with ConsoleProgress() as progress:
        store = FeatureStore.open(file)
        blocks = store.verify(progress)
        stage.verify_networks(store)
    document: dict[str, Any] = {"format": 1, "file": str(file), "rows": len(store), "blocks": blocks, "ok": True}
    said = f"{file}: {len(store)} rows, {blocks} blocks, every checksum holds"
    if gone:
        document["remaining"] = found_again(file, gone, runs)
        document["ok"] = not document["remaining"]
        said += "".join(f"\n{name}: holds a hash that should be gone" for name in document["remaining"])
        said += "" if document["remaining"] else "; no byte of it, its shards and the runs holds one of these hashes"
    print_document(document, as_json, said)
    if not document["ok"]:
        raise typer.Exit(IntegrityError.exit_code)


@app.command()
@guarded
def pack(
    file: Annotated[Path, arg("A store.")],
    out: Annotated[Path | None, opt("File to write. Default: replace the store.")] = None,
    to: Annotated[Path | None, opt("Parquet file to write for other tools; the store stays as it is.")] = None,
    views: Annotated[str | None, opt("With --to: all writes one row per view. Default: view 0 alone.")] = None,
    float16: Annotated[bool, opt("With --to: keep what is stored in float16 so.", "--float16")] = False,
    labels: Annotated[Path | None, opt("With --to: labels file that is put over the labels of the store.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a sharded store into a packed one, or write a store as a Parquet file."""
    from features.extraction.extraction import pack_store
    from pipeline.progress import ConsoleProgress
    from pipeline.stages import extract as stage

    with ConsoleProgress() as progress:
        if to is not None:
            if out is not None:
                raise ConfigurationError("--out and --to: received both, expected one of them")
            document = stage.to_parquet(file, to, views=views, float16=float16, labels=labels, progress=progress)
            print_document(document, as_json, stage.parquet_summary(document))
            return
        if views is not None or float16 or labels is not None:
            raise ConfigurationError("--views, --float16 and --labels are for Parquet files: add --to FILE.parquet")
        store = pack_store(file, out, progress=progress)
    document = stage.describe(store)
    print_document(document, as_json, stage.summary(document))


@app.command()
@guarded
def doctor(
    url: Annotated[str | None, opt("Address that must be reachable, such as s3://bucket/photos.")] = None,
    as_json: Json = False,
) -> None:
    """Examine this machine: Python, packages, GPU, disk, cache, weights, access to an address; exit code 1 if one fails."""
    from pipeline.stages import doctor as stage

    document = stage.examine(url)
    print_document(document, as_json, stage.summary(document))
    if not document["ok"]:
        raise typer.Exit(1)
