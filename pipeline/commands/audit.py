"""The command ``audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pipeline.commands.common import Json, Seed, app, arg, guarded, opt, print_document, print_next, print_note


@app.command()
@guarded
def audit(
    features: Annotated[Path, arg("Feature store.")],
    data_set: Annotated[str | None, opt("Feature set, if the store has several.", "--features")] = None,
    check: Annotated[list[str] | None, opt("Make only this check; may be repeated. Default: all.")] = None,
    images: Annotated[
        str | None, opt("Where the images are, for the checks of pixels: dark, flat and blurred images.")
    ] = None,
    labels: Annotated[Path | None, opt("Labels file that goes over the labels of the store.")] = None,
    apply: Annotated[
        bool,
        opt(
            "Append suggestions of which an estimated 95 % are right to the labels file, for training images only.",
            "--apply",
        ),
    ] = False,
    include_test: Annotated[
        bool, opt("Judge the test images too. The labels file records it, and test scores say it.", "--include-test")
    ] = False,
    exact: Annotated[bool, opt("Search neighbours without projection, which takes longer.", "--exact")] = False,
    out: Annotated[Path, opt("CSV file of all scores.")] = Path("audit.csv"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Look for wrong labels, odd images, duplicates and weak groups in a store; no image goes through the network."""
    from pipeline.api import looking
    from pipeline.auditing import applying
    from pipeline.labels.overlay import labels_said
    from pipeline.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        found = looking.audit(
            features,
            features=data_set,
            checks=check or (),
            images=images,
            labels=labels,
            apply=apply,
            include_test=include_test,
            exact=exact,
            out=out,
            seed=seed,
            progress=progress,
        )
    print_document(found.to_dict(), as_json, str(found))
    if found.labelled_by:
        print_note(labels_said(found.labelled_by))
    if labels is not None and apply:
        print_note(applying.said(found.to_dict()["labels"]))
    print_next("bottleneck", "review", features, *(() if labels is None else ("--labels", labels)))
