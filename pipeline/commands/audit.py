"""The command ``audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from features.errors import ConfigurationError
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
    from features.store.reader import FeatureStore
    from pipeline.auditing import applying, stage
    from pipeline.labels.overlay import labels_said
    from pipeline.outputs import output_file, refuse_overwriting
    from pipeline.progress import ConsoleProgress

    for option, wanted in (("--apply", apply), ("--include-test", include_test)):
        if wanted and labels is None:
            raise ConfigurationError(f"{option}: records what it does in a labels file; name one with --labels FILE")
    path = output_file(out, "--out", "audit.csv")
    refuse_overwriting(path, "--out", [str(name.resolve()) for name in (features, labels) if name is not None])
    store = applying.labelled(FeatureStore.open(features), labels, may_be_new=apply or include_test)
    with ConsoleProgress() as progress:
        found = stage.audit(
            store,
            data_set,
            checks=check or (),
            include_test=include_test,
            exact=exact,
            read=None if images is None else applying.reader(store, images),
            seed=seed,
            progress=progress,
        )
    stage.write_csv(found, path)
    document: dict[str, Any] = {**stage.document(found), "out": str(out)}
    if labels is not None:
        document["labels"] = applying.record(found, labels, apply=apply)
    print_document(document, as_json, stage.summary(document))
    if store.labelled_by:
        print_note(labels_said(store.labelled_by))
    if labels is not None and apply:
        print_note(applying.said(document["labels"]))
    print_next("bottleneck", "report", "runs", "--audit", out)
