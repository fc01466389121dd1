"""The command about published recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from features.errors import ConfigurationError
from pipeline.commands.common import Device, Json, app, guarded, parse_size, print_document, print_next


@app.command()
@guarded
def recipe(
    name: Annotated[
        str | None, typer.Argument(help="A recipe, or a .yaml file of your own. Without one they are listed.")
    ] = None,
    images: Annotated[str | None, typer.Argument(help="Any source that extract takes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of all that it makes. Default: recipe-NAME.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Only this way; repeatable. Default: all.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take so many images only, for a try.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Train at most so many epochs, for a try.")] = None,
    image_size: Annotated[str | None, typer.Option(help="Pixels, instead of the recipe's.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Another network than the recipe's, or a .keras file.")] = None,
    weights: Annotated[str | None, typer.Option(help="A weights file, or random.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run a published recipe on your images, from its file."""
    from pipeline import experiments
    from pipeline.progress import ConsoleProgress

    if name is None:
        rows = [
            {"recipe": found, "ways": ", ".join(read.ways), "about": read.about}
            for found in experiments.recipe_names()
            for read in [experiments.read_experiment(found)]
        ]
        print_document({"format": 1, "recipes": rows}, as_json, "\n".join(_described(row) for row in rows))
        return
    experiment = experiments.read_experiment(name)
    if images is None:
        raise ConfigurationError(f"recipe {name}: give the images, as in: bottleneck recipe {name} my/photos")
    folder = out or Path(f"recipe-{Path(name).stem}")
    with ConsoleProgress() as progress:
        results = experiments.run_experiment(
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
            progress=progress,
        )
    document = {"format": 1, "recipe": name, "folder": str(folder), "steps": results}
    print_document(document, as_json, experiments.summary(results, experiment))
    print_next("bottleneck", "leaderboard", folder / "runs")


def _described(row: dict[str, str]) -> str:
    return f"{row['recipe']}\n  {row['about']}\n  ways: {row['ways']}"
