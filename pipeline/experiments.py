"""Published recipes, and your own: a YAML file of steps -> features, runs and one table of what each gave.

    file -> Experiment -> images (all, or a sample) -> per way: extract -> train_head -> finetune -> predict -> results

Ways share a folder: equal extractions and equal heads are computed once.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import numpy as np
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, create_model, model_validator

from features.canonical import digest_of
from features.errors import ConfigurationError, HeadError, SourceError, nearest
from features.extraction.options import ExtractionOptions
from features.files import atomic_file, printable, writable_folder, writing
from features.progress import Progress
from features.sources.scan import ImageSet, scan
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from pipeline import extract, finetune, predict
from pipeline.config import Settings, load_yaml, parse
from pipeline.presets import find_preset
from pipeline.runs.folder import Run
from pipeline.sweeps.sweep import run_sweep
from pipeline.sweeps.sweep_file import expand, single
from pipeline.tables import table_text
from pipeline.tuning.settings import settings_of

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "recipes"


# Options of stage one that are no matter of an experiment.
NOT_IN_A_STEP = ("device", "workers", "target", "overwrite", "rehash", "strict", "layout", "check_precision")


class _ExtractStep(Settings):
    """Stage one: all other fields of ``ExtractionOptions``, as it has them where they are not given."""

    @property
    def options(self) -> dict[str, Any]:
        """What is given."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    @model_validator(mode="after")
    def _known(self) -> _ExtractStep:
        ExtractionOptions(**self.options)
        return self


if TYPE_CHECKING:
    ExtractStep = _ExtractStep
else:  # the fields are declared where the options are
    _types = {**get_type_hints(ExtractionOptions), "augment": str}  # of an augmentation the name of a preset only
    _fields = [field for field in dataclasses.fields(ExtractionOptions) if field.name not in NOT_IN_A_STEP]
    ExtractStep = create_model(
        "ExtractStep", __base__=_ExtractStep, **{field.name: (_types[field.name], field.default) for field in _fields}
    )


class HeadStep(Settings):
    """Stage two: a head, its parameters, and the data set it is trained on where there are several."""

    head: str
    params: dict[str, Any] = Field(default_factory=dict)
    pool: str | None = None
    features: str | None = None
    folds: NonNegativeInt = 0

    @model_validator(mode="after")
    def _known(self) -> HeadStep:
        expand(single(self.head, self.params, self.pool), "train_head")
        return self


def _tunable(options: dict[str, Any]) -> dict[str, Any]:
    """Options of stage three, refused before anything is computed."""
    settings = {name: value for name, value in options.items() if name != "from_cache"}
    settings_of(settings)
    if not isinstance(options.get("from_cache", False), bool):
        raise ConfigurationError("from_cache: expected true (the features of the last extract step) or false")
    return options


class PredictStep(Settings):
    """Classes of some validation images by the way's last run."""

    images: PositiveInt = 1


class Step(Settings):
    """One of them."""

    extract: ExtractStep | None = None
    train_head: HeadStep | None = None
    finetune: Annotated[dict[str, Any], AfterValidator(_tunable)] | None = None
    predict: PredictStep | None = None

    @model_validator(mode="after")
    def _one(self) -> Step:
        if len(self.model_fields_set) != 1 or getattr(self, self.kind) is None:
            raise ValueError(f"expected one of {', '.join(type(self).model_fields)}, with its options behind the colon")
        return self

    @property
    def kind(self) -> str:
        """Name of the one that it is."""
        return next(iter(self.model_fields_set))


class Way(Settings):
    """One of the ways to go about it."""

    about: str = ""
    steps: Annotated[list[Step], Field(min_length=1)]

    @model_validator(mode="after")
    def _in_order(self) -> Way:
        kinds = [step.kind for step in self.steps]
        for number, kind in enumerate(kinds):
            needed = {"extract": None, "train_head": "extract"}.get(kind, "train_head")
            if needed and needed not in kinds[:number]:
                raise ValueError(f"expected {needed} in a step before {kind}, which is step {number + 1}")
        return self


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
    return parse(Experiment, load_yaml(path), str(path))


def run_experiment(
    experiment: Experiment,
    images: str,
    folder: str | Path,
    *,
    ways: Sequence[str] = (),
    limit: int | None = None,
    epochs: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **instead: Any,
) -> list[dict[str, Any]]:
    """Run the ways of an experiment on a source of images.

    Parameters
    ----------
    experiment : Experiment
        What to do.
    images : str
        Image source, see `features.sources.scan.scan`.
    folder : Path
        Where features, runs and predictions go. What is there already is not computed again.
    ways : sequence of str
        Which ways; default: all.
    limit : int, optional
        Take so many images only, as evenly from classes and splits as they allow; for a try.
    epochs : int, optional
        Train heads and networks for at most so many epochs; for a try.
    device : {"auto", "cpu", "gpu"}
        Where it is to run.
    progress : callable, optional
        Called with (stage, done, total).
    **instead
        Fields of ``NetworkOptions`` that replace those of every extract step: ``image_size``, ``backbone``, ``weights``.
        None leaves the step's own.

    Returns
    -------
    list of dict
        One per step: ``way step made accuracy accuracy_interval cv_accuracy n seconds``, and the ``document`` of the stage.

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
    writable_folder(Path(folder))
    kitchen = _Kitchen(
        Path(folder),
        _sample(images, Path(folder), experiment.classes, limit),
        epochs,
        {name: value for name, value in instead.items() if value is not None},
        device,
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
        self,
        folder: Path,
        images: str,
        epochs: int | None,
        given: dict[str, Any],
        device: str,
        progress: Progress | None,
    ) -> None:
        self.folder, self.images, self.epochs, self.given = folder, images, epochs, given
        self.device, self.progress = device, progress
        self.runs = folder / "runs"
        self.store: Path
        self.run: Path | None = None

    def cook(self, name: str, way: Way) -> list[dict[str, Any]]:
        self.run = None
        results = []
        for number, step in enumerate(way.steps, start=1):
            kind = step.kind
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

    def _extract(self, step: ExtractStep) -> dict[str, Any]:
        options = {**step.options, **self.given}
        self.store = self.folder / f"features-{digest_of([str(self.images), options])[:10]}.h5"
        asked = ExtractionOptions(device=self.device, **options)
        return extract.run(self.images, self.store, asked, progress=self.progress)

    def _train_head(self, step: HeadStep) -> dict[str, Any]:
        params = dict(step.params)
        if self.epochs is not None and "epochs" in type(find_preset(step.head).parameters).model_fields:
            params["epochs"] = min(self.epochs, params.get("epochs", self.epochs))
        swept = run_sweep(
            [FeatureStore.open(self.store)],
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
            options["from_cache"] = self.store
        else:
            options["images"] = self.images
        assert self.run is not None  # `Way` saw to it
        document = finetune.finetune(self.run, runs=self.runs, device=self.device, progress=self.progress, **options)
        self.run = Path(document["run"])
        return document

    def _predict(self, step: PredictStep) -> dict[str, Any]:
        assert self.run is not None
        table, images = FeatureStore.open(self.store).images, scan(self.images)
        held_out = {table.paths[row] for row in np.flatnonzero(table.splits == SPLITS.index("validation"))}
        rows = np.flatnonzero([path in held_out for path in images.paths])
        some = _copied(images, _evenly(images, rows, step.images), self.folder / "predict", splits=False)
        out = self.folder / f"predictions-{self.run.name}.csv"
        predict.predict(self.run, some, out=out, device=self.device, progress=self.progress)
        return {"out": str(out)}


def _sample(source: str, folder: Path, classes: Sequence[str], limit: int | None) -> str:
    """The source itself, or a manifest of copies of some of its images."""
    images = scan(source)
    only = [images.classes.index(name) for name in classes if name in images.classes]
    if classes and len(only) < len(classes) and len(images.classes) != len(classes):
        raise SourceError(
            f"{images.description}: has the classes {', '.join(images.classes[:20])}; this recipe is about "
            f"{' and '.join(classes)}, or any {len(classes)} classes of your own"
        )
    some_classes = 0 < len(only) < len(images.classes)
    if not some_classes and limit is None:
        return source
    rows = np.flatnonzero(np.isin(images.labels, only) if some_classes else np.ones(len(images), bool))
    if limit is not None:
        rows = _evenly(images, rows, limit)
    return str(_copied(images, rows, folder / "images", splits=True))


def _evenly(images: ImageSet, rows: np.ndarray, limit: int) -> np.ndarray:
    """At most so many rows, dealt in turn from every class and given split; ascending."""
    kinds = images.labels[rows].astype(np.int64) * 8 + images.given_splits[rows]
    place = np.empty(len(rows), np.int64)  # how many of its kind come before a row
    for kind in np.unique(kinds):
        of_kind = np.flatnonzero(kinds == kind)
        place[of_kind] = np.arange(len(of_kind))
    return np.sort(rows[np.lexsort((rows, place))[:limit]])


def _copied(images: ImageSet, rows: np.ndarray, folder: Path, *, splits: bool) -> Path:
    """Files of some images under their own names, and a manifest of them; files that are there already stay as they are."""
    lines = []
    for row in rows.tolist():
        name = _name_in_a_folder(images.paths[row])
        data, path = images.read(row), folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)
        label = images.classes[images.labels[row]] if images.labels[row] >= 0 else ""
        given = SPLITS[images.given_splits[row]] if splits and images.given_splits[row] >= 0 else ""
        lines.append([name, label, given, images.groups[row] if images.groups else ""])
    manifest = folder / "images.csv"
    with (
        atomic_file(manifest) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "split", "group"])
        writer.writerows(lines)
    logger.info("%s: %d of %d images", printable(str(manifest)), len(lines), len(images))
    return manifest


def _name_in_a_folder(name: str) -> str:
    """The name itself, where it leads to no place outside; images from arrays get the suffix of what they are read as."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        path = PurePosixPath(digest_of(name)[:16], path.name)
    return str(path if path.suffix else path.with_suffix(".png"))
