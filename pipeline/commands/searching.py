"""Commands about single images of a store: similar, suggest, forget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from features.errors import IntegrityError
from pipeline.commands.common import BatchSize, Device, Json, Runs, Seed, app, arg, guarded, opt, print_document

FeatureSet = Annotated[str | None, opt("Feature set, if the store has several.", "--features")]


@app.command()
@guarded
def similar(
    file: Annotated[Path, arg("A feature store.", metavar="FILE")],
    images: Annotated[list[str], arg("Paths as the store has them, or image files.", metavar="IMAGE...")],
    k: Annotated[int, opt("Number of neighbours of each image.", "-k", min=1)] = 20,
    features: FeatureSet = None,
    out: Annotated[Path | None, opt("CSV file to write.")] = None,
    grid: Annotated[Path | None, opt("PNG or JPEG file to draw: each image and its neighbours.")] = None,
    sources: Annotated[
        list[str] | None, opt("Where the images of the store are now, if they have moved; may be repeated.", "--images")
    ] = None,
    weights: Annotated[str | None, opt("Weights or model file of the store's network, if it has moved.")] = None,
    quantised: Annotated[str | None, opt("File of the store's quantised network, if it has moved.")] = None,
    device: Device = "auto",
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> None:
    """Find the stored images most similar to given ones, exactly, by the cosine of their features."""
    from pipeline.api import looking
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        found = looking.similar(
            file,
            images,
            k=k,
            features=features,
            out=out,
            grid=grid,
            sources=sources or [],
            weights=weights,
            quantised=quantised,
            device=device,
            batch_size=batch_size,
            progress=progress,
        )
    print_document(found.to_dict(), as_json, str(found))


@app.command()
@guarded
def forget(
    file: Annotated[Path, arg("A feature store.", metavar="FILE")],
    sha256: Annotated[list[str] | None, opt("Hash of an image's bytes; may be repeated.", "--sha256")] = None,
    listed: Annotated[
        list[Path] | None, opt("File with a hash, or a path of the store, on each line; may be repeated.", "--list")
    ] = None,
    runs: Runs = Path("runs"),
    labels: Annotated[list[Path] | None, opt("Labels file; may be repeated.")] = None,
    reports: Annotated[
        list[Path] | None, opt("Page of report that lies elsewhere than store and runs; may be repeated.", "--report")
    ] = None,
    dry_run: Annotated[bool, opt("Print what would be removed; change nothing.", "--dry-run")] = False,
    as_json: Json = False,
) -> None:
    """Remove images from a store, and all that is kept of them in runs, labels and reports; exit code 3 if a trace is left."""
    from pipeline.progress import ConsoleProgress
    from pipeline.stages import forget as stage

    hashes = stage.hashes_in(sha256 or [], listed or [], file)
    with ConsoleProgress() as progress:
        document = stage.forget(
            file, hashes, runs=runs, labels=labels or [], reports=reports or [], dry_run=dry_run, progress=progress
        )
    print_document(document, as_json, stage.summary(document))
    if document["remaining"]:
        raise typer.Exit(IntegrityError.exit_code)


@app.command()
@guarded
def suggest(
    file: Annotated[Path, arg("A feature store with images without a label.", metavar="FILE")],
    n: Annotated[int, opt("Number of images.", "-n", min=1)] = 50,
    strategy: Annotated[
        str, opt("mix, typical, margin, spread-margin, entropy, k-centre or random; see pipeline/README.md.")
    ] = "mix",
    purpose: Annotated[
        str, opt("train; or validation: drawn at random, and entered in --labels before anyone labels them.", "--for")
    ] = "train",
    labels: Annotated[Path | None, opt("Labels file whose decisions hold over the labels of the store.")] = None,
    run: Annotated[
        Path | None, opt("Run whose head gives the probabilities. Default: one is trained on what is labelled.")
    ] = None,
    features: FeatureSet = None,
    seed: Seed = 0,
    out: Annotated[Path | None, opt("CSV file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Say which images to label next: typical ones first, then those about which the head is in doubt."""
    from pipeline.api import looking

    found = looking.suggest(
        file, run, n=n, strategy=strategy, purpose=purpose, labels=labels, features=features, seed=seed, out=out
    )
    print_document(found.to_dict(), as_json, str(found))
