"""The command `recipe`, which runs an experiment: a published one, or a YAML file of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from features.errors import ConfigurationError
from features.files import quoted
from pipeline.commands.common import (
    Device,
    Json,
    LabelsFile,
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
def recipe(
    name: Annotated[
        str | None,
        arg("Name of a published experiment, or a .yaml file of your own. Without it the published ones are listed."),
    ] = None,
    images: Annotated[str | None, arg("Image source, as for extract.")] = None,
    out: Annotated[Path | None, opt("Folder for all results. Default: recipe-NAME.")] = None,
    way: Annotated[list[str] | None, opt("Run only this way; may be repeated. Default: all.")] = None,
    limit: Annotated[int | None, opt("Use at most this many images, for a trial run.", min=1)] = None,
    epochs: Annotated[int | None, opt("Train for at most this many epochs, for a trial run.", min=1)] = None,
    image_size: Annotated[str | None, opt("Image size in pixels, in place of the file's.")] = None,
    backbone: Annotated[str | None, opt("Network, in place of the file's: a name or a .keras file.")] = None,
    weights: Annotated[str | None, opt("A weights file, or random.")] = None,
    device: Device = "auto",
    labels: LabelsFile = None,
    as_json: Json = False,
) -> None:
    """Run a published experiment on your images."""
    from pipeline.experiments.runner import run_experiment, summary
    from pipeline.experiments.schema import experiment_names, read_experiment
    from pipeline.progress import ConsoleProgress

    if name is None:
        rows = [
            {"recipe": found, "ways": ", ".join(read.ways), "about": read.about}
            for found in experiment_names()
            for read in [read_experiment(found)]
        ]
        print_document({"format": 1, "recipes": rows}, as_json, "\n".join(_described(row) for row in rows))
        return
    experiment = read_experiment(name)
    if images is None:
        raise ConfigurationError(f"recipe {name}: give the images, as in: bottleneck recipe {quoted(name)} my/photos")
    folder = out or Path(f"recipe-{Path(name).stem}")
    with ConsoleProgress() as progress:
        results = run_experiment(
            experiment,
            images,
            folder,
            ways=way or (),
            limit=limit,
            epochs=epochs,
            image_size=parse_size(image_size),
            backbone=backbone,
            weights=weights,
            device=device,
            labels=labels,
            progress=progress,
        )
    document = {"format": 1, "recipe": name, "folder": str(folder), "steps": results}
    print_document(document, as_json, summary(results, experiment))
    print_next("bottleneck", "leaderboard", folder / "runs")


def _described(row: dict[str, str]) -> str:
    return f"{row['recipe']}\n  {row['about']}\n  ways: {row['ways']}"
