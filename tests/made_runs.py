"""Run folders made by hand: scores, data and times as a test wants them, and a head that is never opened."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from helpers import recipe

from pipeline.presets import PRESETS
from pipeline.runs.folder import Predictions, Run
from pipeline.runs.writing import Outcome, write_run
from pipeline.scores.metrics import evaluate
from pipeline.tasks.table import CLASSIFICATION

IMAGES = 100  # validation images of a made run


def made_run(
    root: Path,
    name: str,
    *,
    source: str = "/photos",
    digest: str = "d" * 64,
    accuracy: float = 0.9,
    minute: int = 0,
    head: str = "logistic",
    parameters: int | None = 7,
    cv: float | None = None,
    images: int = IMAGES,
    classes: tuple[str, ...] = ("cat", "dog"),
    settings: dict[str, Any] | None = None,
    **features: Any,
) -> Run:
    """A finished run, made in the given minute of a day; exactly ``accuracy`` of its validation images are right."""
    labels = np.arange(images, dtype=np.int32) % 2
    right = np.arange(images) < round(accuracy * images)
    aims = np.where(right, labels, 1 - labels)
    probabilities = np.where(np.eye(len(classes))[aims] > 0, 0.8, 0.2 / (len(classes) - 1))
    trained = SimpleNamespace(
        task=CLASSIFICATION, files=("head.json",), name=head, pool="none", parameters=PRESETS[head].parameters, seed=0,
        classes=classes, parameter_count=parameters, save=lambda folder: (folder / "head.json").write_text("{}"),
    )  # fmt: skip
    described = {
        "store": "/stores/features.h5", "name": "last.avg", "recipe": recipe().to_dict(), "source": source,
        "fingerprint": recipe().fingerprint, "data_digest": digest, "split_rule": "hash",
        "backbone": "numpy", "weights": "none", **features,
    }  # fmt: skip
    scores = evaluate(probabilities, labels, classes)
    paths = [f"{classes[label]}/{number}.png" for number, label in enumerate(labels.tolist())]
    predictions = Predictions(paths, np.zeros((images, 32), np.uint8), labels, probabilities)
    held_out = (
        None if cv is None else {**scores, "accuracy": cv, "accuracy_interval": [cv - 0.05, cv + 0.05], "folds": 5}
    )
    start = None if settings is None else Run.open(root / settings["start"])
    folder = write_run(
        root,
        name,
        Outcome(trained, {"rows": [1.0]}, scores, predictions, 1.0, cv=held_out),  # type: ignore[arg-type]
        features=described,
        start=start,
        settings=settings,
        plots=False,
    )
    path = folder / "environment.json"
    created = f"2026-11-27T{minute // 60:02d}:{minute % 60:02d}:00.000000+00:00"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created": created}))
    return Run.open(folder)
