"""Published recipes, and your own: a YAML file of steps -> features, runs and one table of what each gave.

    file -> Experiment -> images (all, or a sample) -> per way: extract -> train_head -> finetune -> predict -> results

Ways share a folder: equal extractions and equal heads are computed once.
"""

from __future__ import annotations

import csv
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, PositiveInt, model_validator

from features.errors import ConfigurationError, HeadError, SourceError, nearest
from features.extraction import prepare
from features.files import printable, writable_folder
from features.recipe import digest_of
from features.sources import ImageSet, scan
from features.splits import SPLITS
from features.store import FeatureStore
from pipeline import extract, finetune, predict
from pipeline.config import Settings, parse
from pipeline.runs import Run
from pipeline.sweep_file import single
from pipeline.sweeps import run_sweep
from pipeline.tables import table_text

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
FOLDER = Path(__file__).parent / "recipes"


class HeadStep(Settings):
    """Stage two: a head, its parameters, and the data set it is trained on where there are several."""

    head: str
    params: dict[str, Any] = Field(default_factory=dict)
    pool: str | None = None
    features: str | None = None
    folds: Annotated[int, Field(ge=0)] = 0


class PredictStep(Settings):
    """Classes of some validation images by the way's last run."""

    images: PositiveInt = 1


class Step(Settings):
    """One of them."""

    extract: dict[str, Any] | None = None
    train_head: HeadStep | None = None
    finetune: dict[str, Any] | None = None
    predict: PredictStep | None = None

    @model_validator(mode="after")
    def _one(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"a step is one of {', '.join(type(self).model_fields)}")
        return self


class Way(Settings):
    """One of the ways to go about it."""

    about: str = ""
    steps: Annotated[list[Step], Field(min_length=1)]


class Experiment(Settings):
    """A recipe file.

    Parameters
    ----------
    version : int
        Of this layout: 1.
    about, source, published : str
        What it is, where it was published, and the figures given there.
    classes : list of str
        Take only these classes of a source that has more.
    ways : dict of str to Way
        In the order in which they are run.
    """

    version: Literal[1]
    about: str
    source: str = ""
    published: str = ""
    classes: list[str] = Field(default_factory=list)
    ways: Annotated[dict[str, Way], Field(min_length=1)]


def recipe_names() -> list[str]:
    """Names of the recipes that come with this package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_experiment(name: str | Path) -> Experiment:
    """A recipe by name, or from a YAML file.

    Raises
    ------
    ConfigurationError
        An unknown name (the nearest is named), or a file that does not follow `Experiment`.
    """
    path = FOLDER / f"{name}.yaml"
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif str(name) not in recipe_names():
        known = recipe_names()
        raise ConfigurationError(
            f"recipe: received {str(name)!r}, expected one of {', '.join(known)}, or a .yaml file{nearest(str(name), known)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as problem:
        raise ConfigurationError(f"{path}: cannot be read as YAML: {problem}") from problem
    return parse(Experiment, values, str(path))


def run_experiment(
    experiment: Experiment,
    images: str,
    folder: str | Path,
    *,
    ways: Sequence[str] = (),
    limit: int | None = None,
    epochs: int | None = None,
    image_size: tuple[int, int] | None = None,
    backbone: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run the ways of an experiment on a source of images.

    Parameters
    ----------
    experiment : Experiment
        What to do.
    images : str
        Image source, see `features.sources.scan`.
    folder : Path
        Where features, runs and predictions go. What is there already is not computed again.
    ways : sequence of str
        Which ways; default: all.
    limit : int, optional
        Take so many images only, as evenly from classes and splits as they allow; for a try.
    epochs : int, optional
        Train heads and networks for at most so many epochs; for a try.
    image_size, backbone, weights : optional
        Other ones than the recipe's: height and width; a name or a model file; a weights file.
    device : {"auto", "cpu", "gpu"}
        Where it is to run.
    progress : callable, optional
        Called with (stage, done, total).

    Returns
    -------
    list of dict
        One per step that gave a run: ``way step run accuracy accuracy_interval cv_accuracy n seconds``.

    Raises
    ------
    ConfigurationError
        An unknown way or option.
    BottleneckError
        Whatever a step raises.
    """
    chosen = list(ways) or list(experiment.ways)
    for name in chosen:
        if name not in experiment.ways:
            raise ConfigurationError(
                f"recipe: no way {name!r}, there are {', '.join(experiment.ways)}{nearest(name, experiment.ways)}"
            )
    for name in chosen:
        _check(experiment.ways[name], name)
    writable_folder(Path(folder))
    given = {
        "image_size": image_size,
        "backbone": backbone,
        "weights": weights,
        "device": device if device != "auto" else None,
    }
    kitchen = _Kitchen(
        Path(folder),
        _sample(images, Path(folder), experiment.classes, limit),
        epochs,
        {name: value for name, value in given.items() if value is not None},
        progress,
    )
    return [line for name in chosen for line in kitchen.cook(name, experiment.ways[name])]


def summary(results: Sequence[dict[str, Any]], experiment: Experiment) -> str:
    """The results for a person."""
    published = f"\npublished: {experiment.published}" if experiment.published else ""
    shown = [{key: value for key, value in line.items() if key != "document"} for line in results]
    return table_text(shown) + published


class _Kitchen:
    """Carries out steps; knows the way's latest store and run."""

    def __init__(
        self, folder: Path, images: str, epochs: int | None, given: dict[str, Any], progress: Progress | None
    ) -> None:
        self.folder, self.images, self.epochs, self.given, self.progress = folder, images, epochs, given, progress
        self.runs = folder / "runs"
        self.store: Path | None = None
        self.run: Path | None = None

    def cook(self, name: str, way: Way) -> list[dict[str, Any]]:
        self.store = self.run = None
        results = []
        for number, step in enumerate(way.steps, start=1):
            (kind,) = step.model_fields_set
            logger.info("%s, step %d: %s", name, number, kind)
            started = time.monotonic()
            document = getattr(self, f"_{kind}")(getattr(step, kind))
            results.append(self._line(name, f"{number} {kind}", document, time.monotonic() - started))
        return results

    def _line(self, way: str, step: str, document: dict[str, Any], seconds: float) -> dict[str, Any]:
        scores = {"accuracy": None, "accuracy_interval": None, "cv_accuracy": None, "n": None}
        if self.run is not None and "run" in document:
            metrics = Run.open(self.run).metrics
            scores = {name: metrics["validation"][name] for name in ("accuracy", "accuracy_interval", "n")}
            scores["cv_accuracy"] = metrics["cv"]["accuracy"] if metrics.get("cv") else None
        made = Path(document.get("run") or document.get("file") or document["out"]).name
        return {"way": way, "step": step, "made": made, **scores, "seconds": round(seconds, 1), "document": document}

    def _extract(self, options: dict[str, Any]) -> dict[str, Any]:
        options = {**options, **self.given}
        if "layers" in options:
            options["layers"] = tuple(options["layers"])
        self.store = self.folder / f"features-{digest_of([str(self.images), options])[:10]}.h5"
        return {**extract.run(self.images, self.store, progress=self.progress, **options), "file": str(self.store)}

    def _train_head(self, step: HeadStep) -> dict[str, Any]:
        store = FeatureStore.open(self._held(self.store, "train_head", "an extract step"))
        params = dict(step.params)
        if self.epochs is not None and "epochs" in self._parameters(step.head):
            params["epochs"] = min(self.epochs, params.get("epochs", self.epochs))
        swept = run_sweep(
            [store],
            single(step.head, params, step.pool),
            runs=self.runs,
            names=[step.features] if step.features else [],
            folds=step.folds,
            where="recipe",
            progress=self.progress,
        )
        if not swept.runs:
            raise HeadError(f"{step.head}: {swept.failed[0]['reason']}")
        self.run = self.runs / swept.runs[0]
        return {"run": str(self.run)}

    def _finetune(self, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        if self.epochs is not None:
            options["epochs"] = min(self.epochs, options.get("epochs", self.epochs))
        if options.pop("from_cache", False):
            options["from_cache"] = self._held(self.store, "finetune", "an extract step")
        else:
            options["images"] = self.images
        start = self._held(self.run, "finetune", "a train_head step")
        document = finetune.finetune(
            start, runs=self.runs, device=self.given.get("device", "auto"), progress=self.progress, **options
        )
        self.run = Path(document["run"])
        return document

    def _predict(self, step: PredictStep) -> dict[str, Any]:
        run = Run.open(self._held(self.run, "predict", "a train_head or finetune step"))
        some = _sample(self.images, self.folder / "predict", [], step.images, split="validation")
        out = self.folder / f"predictions-{run.run_id}.csv"
        predict.predict(run.folder, some, out=out, progress=self.progress)
        return {"out": str(out)}

    @staticmethod
    def _parameters(head: str) -> set[str]:
        from pipeline.heads import find_preset

        return set(type(find_preset(head).parameters).model_fields)

    @staticmethod
    def _held(path: Path | None, step: str, needed: str) -> Path:
        if path is None:
            raise ConfigurationError(f"recipe: {step} has to come after {needed}")
        return path


def _check(way: Way, name: str) -> None:
    """Refuse unknown options before anything is computed."""
    known = {
        "extract": set(inspect.signature(prepare).parameters) - {"images", "out", "options"}
        | {"batch_size", "shard_rows", "max_unreadable"},
        "finetune": {"from_cache", *_tuning_fields()},
    }
    for number, step in enumerate(way.steps, start=1):
        (kind,) = step.model_fields_set
        for option in getattr(step, kind) if kind in known else ():
            if option not in known[kind]:
                raise ConfigurationError(
                    f"recipe: {name}, step {number}: {kind} has no option {option!r}{nearest(option, known[kind])}"
                )


def _tuning_fields() -> set[str]:
    from pipeline.tuning import TuningSettings

    return set(TuningSettings.model_fields)


def _sample(source: str, folder: Path, classes: Sequence[str], limit: int | None, split: str | None = None) -> str:
    """The source itself, or a manifest of copies of some of its images."""
    images = scan(source)
    only = [images.classes.index(name) for name in classes if name in images.classes]
    if classes and len(only) < len(classes) and len(images.classes) != len(classes):
        raise SourceError(
            f"{images.description}: has the classes {', '.join(images.classes[:20])}; this recipe is about "
            f"{' and '.join(classes)}, or any {len(classes)} classes of your own"
        )
    some_classes = 0 < len(only) < len(images.classes)
    if not some_classes and limit is None and split is None:
        return source
    rows = np.flatnonzero(np.isin(images.labels, only) if some_classes else np.ones(len(images), bool))
    if split is not None and (images.given_splits == SPLITS.index(split)).any():
        rows = rows[images.given_splits[rows] == SPLITS.index(split)]
    if limit is not None:
        rows = _evenly(images, rows, limit)
    return str(_copied(images, rows, folder / "images", splits=split is None))


def _evenly(images: ImageSet, rows: np.ndarray, limit: int) -> np.ndarray:
    """At most so many rows, dealt in turn from every class and given split; ascending."""
    kinds = images.labels[rows].astype(np.int64) * 8 + images.given_splits[rows]
    place = np.empty(len(rows), np.int64)  # how many of its kind come before a row
    for kind in np.unique(kinds):
        of_kind = np.flatnonzero(kinds == kind)
        place[of_kind] = np.arange(len(of_kind))
    return np.sort(rows[np.lexsort((rows, place))[:limit]])


def _copied(images: ImageSet, rows: np.ndarray, folder: Path, *, splits: bool) -> Path:
    """Files of some images, and a manifest of them; files that are there already stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows.tolist():
        suffix = PurePosixPath(images.paths[row]).suffix or ".png"
        data = images.read(row)
        path = folder / f"{digest_of(images.paths[row])[:16]}{suffix}"
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
        label = images.classes[images.labels[row]] if images.labels[row] >= 0 else ""
        given = SPLITS[images.given_splits[row]] if splits and images.given_splits[row] >= 0 else ""
        lines.append([path.name, label, given, images.groups[row] if images.groups else ""])
    manifest = folder / "images.csv"
    with open(manifest, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "split", "group"])
        writer.writerows(lines)
    logger.info("%s: %d of %d images", printable(str(manifest)), len(lines), len(images))
    return manifest
