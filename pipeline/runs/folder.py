"""Run folders: write them whole or not at all, open, find and compare them."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from features.errors import BottleneckError, ConfigurationError, FormatVersionError, RunError, nearest
from features.files import atomic_file, sync_folder
from features.recipe import Recipe
from pipeline.config import FORMAT_VERSION, EstimatorParameters, MetricsFile, RunConfig, load_yaml, parse
from pipeline.heads.classifiers import CLASSIFIERS
from pipeline.heads.head import Head, History
from pipeline.heads.presets import PRESETS, load_head
from pipeline.runs.notes import environment, readme
from pipeline.runs.plots import plot_run
from pipeline.scratch import scratch_folder

logger = logging.getLogger(__name__)

FILES = ("config.yaml", "metrics.json", "history.csv", "predictions.csv", "environment.json", "README.md")
BACKBONE_WEIGHTS = "backbone.npz"
BACKBONE_MODEL = "backbone.keras"
LARGEST = 1e15  # seconds and parameters


class Predictions(NamedTuple):
    """Validation rows: path, content hash uint8 (n, 32), label int32 (n,), probabilities float64 (n, c)."""

    paths: Sequence[str]
    sha256: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    folder : Path
        Where it is.
    config, metrics, environment : dict
        Plain values of ``config.yaml``, ``metrics.json``, ``environment.json``.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    environment: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Read a run folder; the head itself is loaded when it is asked for.

        Raises
        ------
        RunError
            No run, a file of it missing or malformed; the file is named.
        FormatVersionError
            Written by another release.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise RunError(f"{folder}: is no run folder (there is no config.yaml); bottleneck leaderboard lists runs")
        try:
            values = load_yaml(folder / "config.yaml")
        except ConfigurationError as problem:
            raise RunError(str(problem)) from problem
        config = parse(RunConfig, values, str(folder / "config.yaml"), error=RunError)
        missing = [name for name in (*FILES, *config.model) if not (folder / name).is_file()]
        if missing:
            raise RunError(f"{folder}: the run is incomplete, {', '.join(missing)} is missing; train it again")
        metrics = parse(MetricsFile, _read_json(folder / "metrics.json"), str(folder / "metrics.json"), error=RunError)
        if metrics.run_id != config.run_id:
            raise RunError(f"{folder / 'metrics.json'}: belongs to {metrics.run_id}, config.yaml to {config.run_id}")
        environment = _read_json(folder / "environment.json")
        if not isinstance(environment, dict):
            raise RunError(f"{folder / 'environment.json'}: expected a mapping")
        for name, kinds in (("fit_seconds", (int, float)), ("parameters", (int,))):
            value = environment.get(name)
            if value is not None and not (type(value) in kinds and 0 <= value <= LARGEST):
                raise RunError(
                    f"{folder / 'environment.json'}: {name}: received {str(value)[:40]!r}, expected a number"
                )
        return cls(folder, config.model_dump(mode="json"), metrics.model_dump(mode="json"), environment)

    @property
    def run_id(self) -> str:
        """``<head>-<10 hexadecimal digits>``."""
        return self.config["run_id"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return tuple(self.config["classes"])

    @functools.cached_property
    def recipe(self) -> Recipe:
        """Recipe of the features; of a fine-tuned run: with its own weights."""
        try:
            recipe = Recipe.from_dict(self.config["features"]["recipe"])
        except (ConfigurationError, TypeError) as problem:
            raise RunError(f"{self.folder / 'config.yaml'}: features.recipe: {problem}") from problem
        if recipe.fingerprint != self.config["features"]["fingerprint"]:
            raise RunError(
                f"{self.folder / 'config.yaml'}: the recipe has fingerprint {recipe.fingerprint}, "
                f"{self.config['features']['fingerprint']} is noted; one of them was edited"
            )
        return recipe

    @property
    def split_rule(self) -> str:
        """Text of the split rule, as ``extract --split`` takes it."""
        return self.config["features"]["split_rule"]

    @property
    def backbone_argument(self) -> str:
        """What ``extract --backbone`` would be given: a name, or the path of a model file."""
        own = BACKBONE_MODEL in self.config["model"]
        return str(self.folder / BACKBONE_MODEL) if own else self.config["features"]["backbone"]

    @property
    def weights_argument(self) -> str:
        """What ``extract --weights`` would be given; of a fine-tuned run: its own file."""
        own = BACKBONE_WEIGHTS in self.config["model"]
        return str(self.folder / BACKBONE_WEIGHTS) if own else self.config["features"]["weights"]

    @property
    def target(self) -> str | None:
        """Label column of the manifest that the features were made of."""
        return self.config["features"]["target"] or None

    @property
    def finetunable(self) -> bool:
        """Whether its head is a Keras network, or equal to one."""
        name = self.config["head"]["name"]
        kind = PRESETS[name].kind if name in PRESETS else name
        return "head.weights.h5" in self.config["model"] or (kind in CLASSIFIERS and CLASSIFIERS[kind].linear)

    @property
    def settings(self) -> str:
        """Parameters, pooling and seed that are not the usual ones of its head, ``name=value``."""
        head, usual = self.config["head"], EstimatorParameters().described()
        if head["name"] in PRESETS:
            usual = PRESETS[head["name"]].parameters.described()
        given = {name: value for name, value in head["parameters"].items() if usual.get(name) != value}
        if head["pool"] not in ("none", PRESETS[head["name"]].pool if head["name"] in PRESETS else "avg"):
            given["pool"] = head["pool"]
        if self.config["seed"]:
            given["seed"] = self.config["seed"]
        return " ".join(f"{name}={value}" for name, value in given.items())

    def load_head(self) -> Head:
        """The head, rebuilt from its files.

        Raises
        ------
        HeadError
            If a file of it is malformed.
        RunError
            If it is not the head of this run.
        """
        head = load_head(self.folder)
        for name, own, noted in (
            ("classes", head.classes, self.classes),
            ("fingerprint", head.fingerprint, self.config["features"]["fingerprint"]),
        ):
            if own != noted:
                raise RunError(f"{self.folder / 'head.json'}: {name} is {own!r}, config.yaml says {noted!r}")
        head.name = self.config["head"]["name"]
        return head


def write_run(
    root: str | Path,
    run_id: str,
    *,
    head: Head,
    history: History,
    scores: Mapping[str, Any],
    predictions: Predictions,
    seconds: float,
    features: Mapping[str, Any] | None = None,
    start: Run | None = None,
    backbone: Any = None,
    settings: Mapping[str, Any] | None = None,
    test: Mapping[str, Any] | None = None,
    cv: Mapping[str, Any] | None = None,
    plots: bool = True,
    notes: Mapping[str, Any] | None = None,
    prove: Callable[[Path], object] | None = None,
) -> Path:
    """Write a run folder under a temporary name and rename it.

    Parameters
    ----------
    root : Path
        Folder of run folders.
    run_id : str
        Name of the new one. A finished run of that name is kept, an incomplete one replaced.
    head : Head
        Trained.
    history : dict of str to list of float
        Columns of ``history.csv``.
    scores, test : dict
        What `pipeline.runs.metrics.evaluate` gave for validation and, where asked, test.
    cv : dict, optional
        The same for held-out training rows, and ``folds``.
    plots : bool
        Draw them, which takes longer than everything else; `add_plots` does it later.
    notes : dict, optional
        More for ``environment.json``: how it was trained, where that decides nothing.
    prove : callable, optional
        Called with the folder while it has its temporary name; what it raises leaves nothing.
    predictions : Predictions
        Validation rows.
    seconds : float
        Time spent training.
    features : dict
        Fields of `RunFeatures`; or, for fine-tuning:
    start, backbone, settings
        The run begun from, the fine-tuned backbone (a ``keras.Model``) and the settings of stage three.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    root = Path(root)
    folder = root / run_id
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = scratch_folder(root, run_id)
        if start is not None and features is None:
            features = start.config["features"]
        if features is None:
            raise RunError(f"{folder}: neither the features nor the run it began with are given")
        model, count = list(head.files), head.parameter_count
        if backbone is not None:
            name, recipe = _save_backbone(temporary, backbone, Recipe.from_dict(features["recipe"]))
            features = {**features, "recipe": recipe.to_dict(), "fingerprint": recipe.fingerprint}
            head.fingerprint = recipe.fingerprint
            model, count = [*model, name], (count or 0) + backbone.count_params()
        described = {"name": head.name, "pool": head.pool, "parameters": head.parameters.described()}
        config = {
            "format": FORMAT_VERSION,
            "run_id": run_id,
            "stage": "head" if start is None else "finetune",
            "seed": (settings or {}).get("seed", head.seed),
            "classes": list(head.classes),
            "head": described if start is None else start.config["head"],
            "features": features,
            "finetune": None if settings is None else dict(settings),
            "model": model,
        }
        metrics = {"format": FORMAT_VERSION, "run_id": run_id, "validation": scores, "test": test, "cv": cv}
        parse(RunConfig, config, str(folder / "config.yaml"), error=RunError)
        head.save(temporary)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (temporary / "config.yaml").write_text(text, encoding="utf-8")
        _write_json(temporary / "metrics.json", metrics)
        noted = {**environment(), "fit_seconds": seconds, "parameters": count, **(notes or {})}
        _write_json(temporary / "environment.json", noted)
        _write_csv(temporary / "history.csv", list(history), zip(*history.values(), strict=True))
        _write_predictions(temporary / "predictions.csv", predictions, head.classes)
        (temporary / "README.md").write_text(readme(config, metrics, seconds), encoding="utf-8")
        if plots:
            plot_run(temporary / "plots", history, predictions.labels, predictions.probabilities, head.classes)
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


def add_scores(run: Run, **scores: Mapping[str, Any]) -> Run:
    """Put the scores of ``test`` or ``cv`` into ``metrics.json`` of a finished run."""
    path = run.folder / "metrics.json"
    with atomic_file(path) as temporary:
        _write_json(temporary, {**run.metrics, **{name: dict(values) for name, values in scores.items()}})
    return Run.open(run.folder)


def add_plots(run: Run) -> None:
    """Draw the plots of a run that was written without them, from its ``predictions.csv`` and ``history.csv``."""
    if (run.folder / "plots").exists():
        return
    labels, probabilities = read_predictions(run)
    history = read_history(run.folder)
    temporary = run.folder / f".plots.{secrets.token_hex(4)}.tmp"
    try:
        plot_run(temporary, history, labels, probabilities, run.classes)
        os.rename(temporary, run.folder / "plots")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_predictions(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 (n,) and probabilities float64 (n, c) of the validation rows.

    Raises
    ------
    RunError
        If the file is not what a run writes.
    """
    path, numbers = run.folder / "predictions.csv", {name: k for k, name in enumerate(run.classes)}
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
            lines = list(csv.reader(stream))[1:]
        labels = np.array([numbers[line[2]] for line in lines], np.int32)
        probabilities = np.array([line[5:] for line in lines], np.float64).reshape(len(lines), len(numbers))
    except (KeyError, ValueError, IndexError, csv.Error) as problem:
        raise RunError(f"{path}: is not what a run of {len(numbers)} classes writes: {problem!r}") from problem
    return labels, probabilities


def read_history(folder: Path) -> History:
    """Columns of ``history.csv`` of a run.

    Raises
    ------
    RunError
        If the file is not what a run writes.
    """
    path = folder / "history.csv"
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            header, *lines = csv.reader(stream)
        return {name: [float(line[k]) for line in lines] for k, name in enumerate(header)}
    except (ValueError, IndexError, csv.Error) as problem:
        raise RunError(f"{path}: is not what a run writes: {problem!r}") from problem


def is_finished(folder: str | Path) -> bool:
    """Whether a run folder is whole; a missing one is not."""
    try:
        Run.open(folder)
    except RunError:
        return False
    return True


def find_runs(root: str | Path) -> list[Run]:
    """All finished runs in a folder, by name; the folder may be a run itself. Broken ones are warned about.

    Raises
    ------
    RunError
        If the folder does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        if root.is_file():
            raise RunError(
                f"{root}: is a file, expected a run or a folder of runs. If it holds features, train a head on it first: "
                f"bottleneck train-head {root}"
            )
        beside = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
        raise RunError(
            f"{root}: there is no such folder of runs; bottleneck train-head makes one{nearest(root.name, beside)}"
        )
    if (root / "config.yaml").is_file():
        return [Run.open(root)]
    found = []
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not any((folder / name).is_file() for name in FILES[:2]):
            continue
        try:
            found.append(Run.open(folder))
        except (RunError, FormatVersionError) as problem:
            logger.warning("left out: %s", problem)
    return found


def choose_run(path: str | Path) -> Run:
    """The run in ``path``, or the best one below it: see `pipeline.runs.board.leaderboard`."""
    return _some(path, sorted(find_runs(path), key=rank))[0]


def newest_run(path: str | Path, *, finetunable: bool = False) -> Run:
    """The run in ``path``, or the newest one below it.

    Parameters
    ----------
    path : Path
        Run folder, or folder of run folders.
    finetunable : bool
        Only runs of a Keras head, or of a linear one; below a folder of runs, those of stage three are passed over.

    Raises
    ------
    RunError
        If there is none.
    """
    runs = _some(path, find_runs(path))
    if finetunable:
        several = not (Path(path) / "config.yaml").is_file()
        runs = [run for run in runs if run.finetunable and not (several and run.config["stage"] == "finetune")]
        if not runs:
            raise RunError(
                f"{path}: holds no run of a Keras head or a linear one, which fine-tuning starts from (dense, dropout-linear, "
                "mlp-256, logistic, ridge, linear-svm, sgd, lda); train one with bottleneck train-head --head dropout-linear"
            )
    return max(runs, key=lambda run: (str(run.environment.get("created", "")), run.run_id))


def rank(run: Run, by: str = "accuracy", *, folds: bool = False) -> tuple[bool, float, float, str]:
    """What runs are sorted by: the best first; with ``folds`` by cross-validation, those without it last."""
    scores = run.metrics["cv"] if folds and run.metrics["cv"] else run.metrics["validation"]
    return folds and not run.metrics["cv"], -scores[by], scores["log_loss"], run.run_id


def _some(path: str | Path, runs: list[Run]) -> list[Run]:
    if not runs:
        raise RunError(f"{path}: holds no finished run; bottleneck train-head makes one")
    return runs


def _save_backbone(folder: Path, backbone: Any, recipe: Recipe) -> tuple[str, Recipe]:
    """Save a fine-tuned backbone; the recipe of its features has its weights."""
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
            return  # another process was faster; the same id means the same run
        logger.warning("%s was incomplete and is replaced", folder)
        old = temporary.with_suffix(".old")
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)
    sync_folder(folder.parent)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise RunError(f"{path}: cannot be read: {problem}") from problem


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_csv(path: Path, header: Sequence[str], rows: Any) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_predictions(path: Path, predictions: Predictions, classes: Sequence[str]) -> None:
    """Nine digits: enough to check the assembled network against."""
    rows = []
    for name, sha256, label, values in zip(*predictions, strict=True):
        guess = int(values.argmax())
        right = str(guess == label).lower()
        rows.append(
            [name, sha256.tobytes().hex(), classes[label], classes[guess], right, *(f"{value:.9g}" for value in values)]
        )
    _write_csv(path, ["path", "sha256", "label", "predicted", "correct", *classes], rows)
