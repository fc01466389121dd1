"""Write run folders atomically, and add scores and plots to them."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from features.errors import BottleneckError, ConfigurationError, RunError
from features.files import atomic_file, file_stamp, sync_folder
from features.networks.quantised import find, keep, networks_of_runs, networks_of_store, place_in, read
from features.recipe import Recipe
from features.temporary import temporary_folder, temporary_path
from pipeline.config import History, RunConfig, Settings, TargetRunConfig, metrics_format, parse, yaml_text
from pipeline.runs.folder import (
    BACKBONE_MODEL,
    BACKBONE_WEIGHTS,
    RENEWED,
    Predictions,
    Run,
    is_finished,
    read_history,
    read_predictions,
)
from pipeline.runs.notes import environment, readme
from pipeline.runs.plots import plot_run
from pipeline.tasks.task import Task

logger = logging.getLogger(__name__)


class TrainedHead(Protocol):
    """What writing a run needs from a head: its description, and a way to save it."""

    name: str
    pool: str | None
    parameters: Settings
    seed: int
    task: Task
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def files(self) -> tuple[str, ...]: ...

    @property
    def parameter_count(self) -> int | None: ...

    def save(self, folder: Path) -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a training, as its run records it.

    Parameters
    ----------
    head : TrainedHead
        The trained head.
    history : dict of str to list of float
        Columns of ``history.csv``.
    scores, test : dict
        Scores by `pipeline.scores.metrics.evaluate` on the validation split and, if requested, the test split.
    predictions : Predictions
        Predictions of the validation rows.
    seconds : float
        Training time.
    cv : dict, optional
        Scores of the training rows by cross-validation, and the number of ``folds``.
    notes : dict, optional
        Further entries of ``environment.json`` about the training, which do not affect the result.
    """

    head: TrainedHead
    history: History
    scores: Mapping[str, Any]
    predictions: Predictions
    seconds: float
    test: Mapping[str, Any] | None = None
    cv: Mapping[str, Any] | None = None
    notes: Mapping[str, Any] | None = None


def write_run(
    root: str | Path,
    run_id: str,
    outcome: Outcome,
    *,
    features: Mapping[str, Any] | None = None,
    start: Run | None = None,
    backbone: Any = None,
    settings: Mapping[str, Any] | None = None,
    plots: bool = True,
    prove: Callable[[Path], object] | None = None,
) -> Path:
    """Write a run folder under a temporary name, then rename it.

    Parameters
    ----------
    root : Path
        Folder of run folders.
    run_id : str
        Name of the new run folder. A finished run of that name is kept, an incomplete one is replaced.
    outcome : Outcome
        The trained head and its scores.
    features : dict, optional
        Fields of `RunFeatures`; default: those of ``start``.
    start, backbone, settings
        For fine-tuning: the run that it started from, the fine-tuned network (a ``keras.Model``) and the settings.
    plots : bool
        Whether to draw the plots, which takes longer than the rest; `add_plots` can draw them later.
    prove : callable, optional
        Called with the folder under its temporary name. If it raises an exception, the run is not written.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    RunError
        If the folder cannot be written.
    """
    root = Path(root)
    folder, head = root / run_id, outcome.head
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(folder)
        temporary.mkdir()
        if start is not None and features is None:
            features = {key: value for key, value in start.config["features"].items() if key != "reading" or value}
        if features is None:
            raise RunError(f"{folder}: received neither features nor start, expected one of them")
        if (digest := Recipe.from_dict(features["recipe"]).quantised) is not None:
            _keep_quantised(root, Path(features["store"]), digest)
        model, count = list(head.files), head.parameter_count
        if backbone is not None:
            name, recipe = _save_backbone(temporary, backbone, Recipe.from_dict(features["recipe"]))
            features = {**features, "recipe": recipe.to_dict(), "fingerprint": recipe.fingerprint}
            head.fingerprint = recipe.fingerprint
            model, count = [*model, name], (count or 0) + backbone.count_params()
        described = {"name": head.name, "pool": head.pool, "parameters": head.parameters.described()}
        config = {
            **head.task.run_file,
            "run_id": run_id,
            "stage": "head" if start is None else "finetune",
            "seed": (settings or {}).get("seed", head.seed),
            "classes": list(head.classes),
            "head": described if start is None else start.config["head"],
            "features": features,
            "finetune": None if settings is None else dict(settings),
            "model": model,
        }
        metrics = {
            "format": head.task.format,
            "run_id": run_id,
            "validation": outcome.scores,
            "test": outcome.test,
            "cv": outcome.cv,
        }
        parse(TargetRunConfig if "task" in config else RunConfig, config, str(folder / "config.yaml"), error=RunError)
        _write_files(temporary, outcome, config, metrics, count)
        if plots:
            rows = outcome.predictions
            plot_run(
                temporary / "plots", outcome.history, rows.labels, rows.probabilities, head.classes, head.task.name
            )
        if prove:
            prove(temporary)
        _publish(temporary, folder)
    except OSError as problem:
        if isinstance(problem, BottleneckError):
            raise
        raise RunError(
            f"{folder}: the run could not be written ({problem.strerror or problem}); nothing was left behind. Make room, or "
            "give another folder with --runs"
        ) from problem
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _keep_quantised(root: Path, store: Path, digest: str) -> None:
    """Keep one copy of a quantised network for all runs of a folder: without it, none of them can predict."""
    kept = place_in(networks_of_runs(root), digest)
    if kept.is_file() and _is_whole(kept, digest, file_stamp(kept)):
        return
    try:
        found = find(digest, [networks_of_runs(root), networks_of_store(store)])
    except ConfigurationError as problem:
        logger.warning("%s. The head is trained all the same, but cannot predict new images", problem)
    else:
        keep(found, digest, networks_of_runs(root))


@functools.lru_cache(maxsize=8)
def _is_whole(path: Path, digest: str, stamp: tuple[int, ...]) -> bool:
    """Whether a copy is not damaged; asked once for all runs of this process, as ``stamp`` changes with the file."""
    try:
        read(path, digest)
    except OSError:
        return False
    return True


def _write_files(
    folder: Path, outcome: Outcome, config: Mapping[str, Any], metrics: Mapping[str, Any], parameters: int | None
) -> None:
    """Write all files of a run but the network and the plots."""
    outcome.head.save(folder)
    (folder / "config.yaml").write_text(yaml_text(config), encoding="utf-8")
    _write_json(folder / "metrics.json", metrics)
    noted = {**environment(), "fit_seconds": outcome.seconds, "parameters": parameters, **(outcome.notes or {})}
    _write_json(folder / "environment.json", noted)
    _write_csv(folder / "history.csv", list(outcome.history), zip(*outcome.history.values(), strict=True))
    _write_predictions(folder / "predictions.csv", outcome.predictions, outcome.head.classes, outcome.head.task)
    (folder / "README.md").write_text(readme(config, metrics, outcome.seconds, outcome.head.task), encoding="utf-8")


def add_scores(run: Run, **scores: Mapping[str, Any]) -> Run:
    """Add scores (``test``, ``cv``, ``averaged``, ``answers`` or ``groups``) to ``metrics.json`` of a finished run."""
    path = run.folder / "metrics.json"
    metrics = {**run.metrics, **{name: dict(values) for name, values in scores.items()}}
    with atomic_file(path) as temporary:
        _write_json(temporary, {**metrics, "format": max(run.task.format, metrics_format(metrics))})
    return Run.open(run.folder)


def renew(run: Run) -> None:
    """Note in ``environment.json`` that a finished run was asked for now, so that its state is the newest again."""
    path = run.folder / "environment.json"
    with atomic_file(path) as temporary:
        _write_json(temporary, {**run.environment, RENEWED: environment()["created"]})


def add_plots(run: Run) -> None:
    """Draw the plots of a run that has none yet, from its ``predictions.csv`` and ``history.csv``."""
    if (run.folder / "plots").exists():
        return
    rows, history = read_predictions(run), read_history(run.folder)
    with temporary_folder(run.folder / "plots") as temporary:
        plot_run(temporary / "plots", history, rows.labels, rows.probabilities, run.classes, run.task.name)
        os.rename(temporary / "plots", run.folder / "plots")


def _save_backbone(folder: Path, backbone: Any, recipe: Recipe) -> tuple[str, Recipe]:
    """Save a fine-tuned network; return the file name and the recipe with the digest of the new weights."""
    from features.networks.weights import model_digest, save_weights

    if recipe.backbone == "model":
        backbone.save(folder / BACKBONE_MODEL)
        return BACKBONE_MODEL, dataclasses.replace(recipe, weights=model_digest(backbone))
    digest = save_weights(backbone, folder / BACKBONE_WEIGHTS)
    return BACKBONE_WEIGHTS, dataclasses.replace(recipe, weights=digest)


def _publish(temporary: Path, folder: Path) -> None:
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
    if folder.exists():
        if is_finished(folder):
            return  # another process was faster; equal ids mean equal runs
        logger.warning("%s: the run was incomplete and is replaced", folder)
        old = temporary_path(folder)
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)
    sync_folder(folder.parent)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_csv(path: Path, header: Sequence[str], rows: Any) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_predictions(path: Path, predictions: Predictions, classes: Sequence[str], task: Task) -> None:
    """Write ``predictions.csv``, with nine digits: enough to check a network with this head against them."""
    rows = []
    for name, sha256, label, values in zip(*predictions, strict=True):
        rows.append([name, sha256.tobytes().hex(), *task.cells(label, values, classes)])
    _write_csv(path, ["path", "sha256", *task.header(classes)], rows)
