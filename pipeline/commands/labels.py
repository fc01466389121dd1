"""Commands about labels files: labels show, merge, apply, import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from features.canonical import check_choice
from features.errors import ConfigurationError
from features.files import atomic_file, printable
from features.progress import counted
from pipeline.commands.common import Json, app, arg, guarded, open_stores, opt, print_document, print_next, print_note

if TYPE_CHECKING:
    from pipeline.labels.agreement import Agreement
    from pipeline.labels.file import Labels

SHOWN = 10  # values, people and disagreements that the text lists
NAMED = 3  # images of an export that a note names

labels_app = typer.Typer(name="labels", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(labels_app, help="Look into labels files, merge them, apply them, and import those of other tools.")


@labels_app.command()
@guarded
def show(
    file: Annotated[Path, arg("Labels file.", metavar="FILE")],
    features: Annotated[list[Path] | None, opt("Feature store that it is about; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a labels file holds: decisions by value and by person, how far people agree, what it does to a store."""
    from pipeline.labels.agreement import agreement
    from pipeline.labels.file import read_labels

    labels = read_labels(file)
    stores = open_stores(features or [], file if features else None)
    document = {**_about(file, labels, agreement(labels)), "stores": {}}
    document["stores"] = {str(store.path): dict(store.labelled_by) for store in stores}
    print_document(document, as_json, _text(document))


@labels_app.command()
@guarded
def merge(
    files: Annotated[list[Path], arg("Labels files.", metavar="FILE...")],
    out: Annotated[Path, opt("Labels file to write; it must not exist.")],
    as_json: Json = False,
) -> None:
    """Make one labels file of several: all decisions once, in the order of time; disagreement is listed."""
    from pipeline.labels.agreement import agreement
    from pipeline.labels.file import FIRST_LINE, HEADER, read_labels

    if out.exists():
        raise ConfigurationError(f"--out {out}: exists; give a new name")
    for file in files:
        for remark in read_labels(file).remarks:  # also refuses what is no labels file, by its own name
            print_note(f"{file}: {remark}")
    with atomic_file(out) as temporary:
        with open(temporary, "wb") as stream:
            stream.write(f"{FIRST_LINE}\n{HEADER}\n".encode())
            for file in files:
                stream.writelines(line.rstrip(b"\r\n") + b"\n" for line in read_labels(file).lines())
        merged = read_labels(temporary)
        temporary.unlink()  # it stays open
        with open(temporary, "xb") as stream:
            stream.write(f"{FIRST_LINE}\n{HEADER}\n".encode())
            stream.writelines(merged.lines())
    document = _about(out, merged, agreement(merged))
    print_document(document, as_json, _text(document))


@labels_app.command()
@guarded
def apply(
    file: Annotated[Path, arg("Feature store.", metavar="FEATURES")],
    labels: Annotated[Path, arg("Labels file.", metavar="LABELS")],
    out: Annotated[Path, opt("Manifest to write: CSV.")],
    images: Annotated[Path | None, opt("Folder of the images, if it has moved.")] = None,
    as_json: Json = False,
) -> None:
    """Write a manifest with the labels in effect, which extract reads; excluded images are left out of it."""
    from pipeline.labels.applying import write_manifest
    from pipeline.labels.file import read_labels
    from pipeline.labels.overlay import excluded_rows
    from pipeline.outputs import output_file

    (store,) = open_stores([file], labels)
    out = output_file(out, "--out", "manifest.csv")
    count = write_manifest(store, out, without=excluded_rows(store, read_labels(labels)), root=images)
    document = {"format": 1, "out": str(out), "images": count, "labels": dict(store.labelled_by)}
    print_document(document, as_json, f"{out}: {counted(count, 'image')}")
    print_next("bottleneck", "extract", out, "--out", file)


@labels_app.command("import")
@guarded
def import_(
    file: Annotated[Path, arg("CSV file that the tool exported.", metavar="FILE")],
    tool: Annotated[str, opt("label-studio, cvat (Open Images V6) or fiftyone.", "--from")],
    features: Annotated[Path, opt("Feature store of the images.")],
    out: Annotated[Path, opt("Labels file to append to.")] = Path("labels.csv"),
    column: Annotated[str | None, opt("Column of the class, if there are several.")] = None,
    by: Annotated[str | None, opt("Who decided. Default: as the file says, else the name of the tool.")] = None,
    as_json: Json = False,
) -> None:
    """Take over labels from the CSV export of Label Studio, CVAT or FiftyOne; images are found by their path."""
    from features.store.reader import FeatureStore
    from pipeline.labels.file import append_decisions
    from pipeline.labels.importing import TOOLS, read_export

    check_choice("--from", tool, tuple(TOOLS))
    found = read_export(file, tool, FeatureStore.open(features), column, by)
    for names, what in ((found.elsewhere, "not one of the store"), (found.several, "given several classes, left out")):
        if names:
            more = ", ..." if len(names) > NAMED else ""
            print_note(f"{counted(len(names), 'image')} {what}: {', '.join(map(printable, names[:NAMED]))}{more}")
    if found.decisions:
        append_decisions(out, found.decisions, dated=True)
    document = {"format": 1, "out": str(out), "imported": len(found.decisions)}
    document |= {"elsewhere": found.elsewhere, "several": found.several}
    print_document(document, as_json, f"{out}: {counted(len(found.decisions), 'decision')} from {file}")
    print_next("bottleneck", "train-head", features, "--labels", out)


def _about(file: Path, labels: Labels, agreed: Agreement) -> dict[str, Any]:
    """What a labels file holds, as a document."""
    import numpy as np

    from pipeline.labels.file import moment_text

    def by_word(codes: np.ndarray, words: tuple[str, ...]) -> dict[str, int]:
        counts = np.bincount(codes, minlength=len(words)).tolist()
        return dict(sorted(zip(words, counts, strict=True), key=lambda item: -item[1]))

    return {
        "format": 1,
        "file": str(file),
        "decisions": len(labels),
        "images": len(np.unique(labels.sha256, axis=0)),
        "first": moment_text(int(labels.times[0])) if len(labels) else None,
        "last": moment_text(int(labels.times[-1])) if len(labels) else None,
        "targets": by_word(*labels.targets),
        "values": by_word(*labels.values),
        "people": by_word(*labels.people),
        "agreement": {
            "images": agreed.images,
            "alike": agreed.alike,
            "rate": agreed.rate,
            "disagreements": [{"path": path, "values": values} for path, values in agreed.disagreements],
        },
        "torn": list(labels.torn),
        "doubled": labels.doubled,
        "remarks": labels.remarks,
    }


def _text(document: dict[str, Any]) -> str:
    """The same for a person."""
    dated = f", {document['first'][:10]} to {document['last'][:10]}" if document["decisions"] else ""
    lines = [
        f"{document['file']}: {counted(document['decisions'], 'decision')} about {counted(document['images'], 'image')}{dated}"
    ]
    lines += [f"  {remark}" for remark in document["remarks"]]
    for title, key in (("decided", "values"), ("by", "people")):
        known = list(document[key].items())
        more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        said = ", ".join(f"{printable(word) or '(withdrawn)'} {count:,}" for word, count in known[:SHOWN])
        lines += [f"  {title}: {said}{more}"] if known else []
    agreed = document["agreement"]
    if agreed["images"]:
        lines.append(
            f"  {counted(agreed['images'], 'image')} judged by several people: {agreed['alike']:,} alike ({agreed['rate']:.2f})"
        )
    lines += [
        f"    {printable(one['path'])}: {', '.join(f'{by} {value}' for by, value in one['values'].items())}"
        for one in agreed["disagreements"][:SHOWN]
    ]
    return "\n".join(lines)
