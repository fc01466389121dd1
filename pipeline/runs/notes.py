"""The description of a run in its folder: software versions, and a README for whoever opens it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from features.machine import keras_backend
from pipeline.tables import cell_text
from pipeline.tasks.task import Task

PACKAGES = (
    "bottleneck-features",
    "numpy",
    "scikit-learn",
    "skops",
    "keras",
    "tensorflow",
    "jax",
    "torch",
    "h5py",
    "pillow",
)


def environment() -> dict[str, Any]:
    """Python version, machine and package versions, found without importing the packages."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "keras_backend": keras_backend(),
        "packages": dict(_versions()),
    }


@functools.cache
def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def readme(config: Mapping[str, Any], metrics: Mapping[str, Any], seconds: float, task: Task) -> str:
    """Text of the ``README.md`` of a run, made from its ``config.yaml`` and ``metrics.json``."""
    features, head = config["features"], config["head"]
    recipe = features["recipe"]
    lines = [
        f"# {config['run_id']}",
        "",
        f"A `{head['name']}` head on `{features['name']}` features of `{recipe['backbone']}` "
        f"({recipe['height']}x{recipe['width']} pixels), {len(config['classes'])} {task.things}, "
        f"trained in {seconds:.1f} s with seed {config['seed']}.",
    ]
    if config["stage"] == "finetune":
        lines.append(
            f"Fine-tuned from `{(config['finetune'] or {}).get('start', 'another run')}`; the backbone is its own."
        )
    shown = {split: task.columns(metrics[split]) for split in ("validation", "test") if metrics[split]}
    titles = ["split", *next(iter(shown.values()))]
    lines += ["", f"| {' | '.join(titles)} |", f"| {' | '.join('---' for _ in titles)} |"]
    for split, columns in shown.items():
        lines.append(f"| {' | '.join([split, *map(cell_text, columns.values())])} |")
    lines += [
        "",
        "    bottleneck predict THIS_FOLDER IMAGES     # classes and probabilities of new images",
        "    bottleneck leaderboard THIS_FOLDER/..     # compare with other runs",
        "",
        "`config.yaml` decided this run, `metrics.json` scores it (all of them), `predictions.csv` has every validation",
        "image, `history.csv` the training, `environment.json` the software. No file here is a pickle.",
    ]
    return "\n".join(lines) + "\n"
