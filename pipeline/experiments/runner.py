"""Run an experiment: its steps become features, runs and one table of what each step gave.

    Experiment, images (all, or a sample) --> per way: extract -> train_head -> finetune -> predict --> results

Ways share a folder, so equal extractions and equal heads are computed once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.canonical import digest_of
from features.errors import ConfigurationError, HeadError, nearest
from features.extraction.options import ExtractionOptions
from features.files import writable_folder
from features.progress import Progress
from features.sources.scan import scan
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from pipeline.experiments.sampling import copied, sample
from pipeline.experiments.schema import Experiment, ExtractStep, HeadStep, PredictStep, Way
from pipeline.intervals import interval_of
from pipeline.labels.overlay import with_labels
from pipeline.presets import find_preset
from pipeline.runs.folder import Run
from pipeline.stages import extract, finetune, predict
from pipeline.sweeps.sweep import run_sweep
from pipeline.sweeps.sweep_file import single
from pipeline.tables import table_text

logger = logging.getLogger(__name__)


def run_experiment(
    experiment: Experiment,
    images: str,
    folder: str | Path,
    *,
    ways: Sequence[str] = (),
    limit: int | None = None,
    epochs: int | None = None,
    device: str = "auto",
    labels: str | Path | None = None,
    progress: Progress | None = None,
    **instead: Any,
) -> list[dict[str, Any]]:
    """Run the ways of an experiment on a source of images.

    Parameters
    ----------
    experiment : Experiment
        The ways and their steps.
    images : str
        Image source, see `features.sources.scan.scan`.
    folder : Path
        Folder for features, runs and predictions. Nothing that is already there is computed again.
    ways : sequence of str
        Names of the ways to run; all by default.
    limit : int, optional
        Use at most this many images, taken evenly from classes and splits; for a trial run.
    epochs : int, optional
        Train heads and networks for at most this many epochs; for a trial run.
    device : {"auto", "cpu", "gpu"}
        Device that the networks run on.
    labels : Path, optional
        Labels file under which heads are trained and networks fine-tuned.
    progress : callable, optional
        Called with (stage, done, total).
    **instead
        Fields of ``NetworkOptions`` that replace those of every extract step: ``image_size``, ``backbone``, ``weights``.
        None leaves the step's own.

    Returns
    -------
    list of dict
        One per step: ``way step made accuracy accuracy_interval cv_accuracy n seconds``, and ``document``, which is what
        the stage returned.

    Raises
    ------
    ConfigurationError
        An unknown way or option.
    BottleneckError
        If a step fails.
    """
    chosen = list(ways) or list(experiment.ways)
    for name in chosen:
        if name not in experiment.ways:
            raise ConfigurationError(
                f"way: received {name!r}, expected one of {', '.join(experiment.ways)}{nearest(name, experiment.ways)}"
            )
    writable_folder(Path(folder))
    runner = _Runner(
        Path(folder),
        sample(images, Path(folder), experiment.classes, limit),
        epochs,
        {name: value for name, value in instead.items() if value is not None},
        device,
        labels,
        progress,
    )
    return [line for name in chosen for line in runner.carry_out(name, experiment.ways[name])]


def summary(results: Sequence[dict[str, Any]], experiment: Experiment) -> str:
    """Describe the results for a person: a table of the steps, and the published figures."""
    published = f"\npublished: {experiment.published}" if experiment.published else ""
    shown = [{key: value for key, value in line.items() if key != "document"} for line in results]
    return table_text(shown) + published


class _Runner:
    """Carry out steps one after the other; keep the latest store and run of the way."""

    def __init__(
        self,
        folder: Path,
        images: str,
        epochs: int | None,
        given: dict[str, Any],
        device: str,
        labels: str | Path | None,
        progress: Progress | None,
    ) -> None:
        self.folder, self.images, self.epochs, self.given = folder, images, epochs, given
        self.device, self.labels, self.progress = device, labels, progress
        self.runs = folder / "runs"
        self.store: Path
        self.run: Path | None = None

    def carry_out(self, name: str, way: Way) -> list[dict[str, Any]]:
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
        scores: dict[str, Any] = {"accuracy": None, "accuracy_interval": None, "cv_accuracy": None, "n": None}
        if self.run is not None and "run" in document:
            metrics = Run.open(self.run).metrics
            held_out = metrics["validation"]
            scores |= {"accuracy": held_out["accuracy"], "accuracy_interval": interval_of(held_out), "n": held_out["n"]}
            scores["cv_accuracy"] = metrics["cv"]["accuracy"] if metrics.get("cv") else None
        made = Path(document.get("run") or document.get("file") or document["out"]).name
        return {"way": way, "step": step, "made": made, **scores, "seconds": round(seconds, 1), "document": document}

    def _extract(self, step: ExtractStep) -> dict[str, Any]:
        options = {**step.options, **self.given}
        self.store = self.folder / f"features-{digest_of([str(self.images), options])[:10]}.h5"
        asked = ExtractionOptions(device=self.device, **options)
        return extract.run(self.images, self.store, asked, progress=self.progress)

    def _opened(self) -> FeatureStore:
        """The store of the latest extraction, under the labels file if there is one."""
        store = FeatureStore.open(self.store)
        return store if self.labels is None else with_labels(store, self.labels)

    def _train_head(self, step: HeadStep) -> dict[str, Any]:
        params = dict(step.params)
        if self.epochs is not None and "epochs" in type(find_preset(step.head).parameters).model_fields:
            params["epochs"] = min(self.epochs, params.get("epochs", self.epochs))
        swept = run_sweep(
            [self._opened()],
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
        assert self.run is not None  # `Way` has checked the order of the steps
        options |= {"labels": self.labels, "runs": self.runs, "device": self.device, "progress": self.progress}
        document = finetune.finetune(self.run, **options)
        self.run = Path(document["run"])
        return document

    def _predict(self, step: PredictStep) -> dict[str, Any]:
        assert self.run is not None
        table, images = self._opened().images, scan(self.images)
        held_out = {table.paths[row] for row in np.flatnonzero(table.splits == SPLITS.index("validation")).tolist()}
        rows = np.flatnonzero([path in held_out for path in images.paths])
        some = copied(images, images.evenly(step.images, rows), self.folder / "predict", splits=False)
        out = self.folder / f"predictions-{self.run.name}.csv"
        predict.predict(self.run, some, out=out, device=self.device, progress=self.progress)
        return {"out": str(out)}
