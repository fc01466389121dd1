"""Open and find run folders. They are written by `pipeline.runs.writing`; `pipeline.runs.board` chooses one."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import logging
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from features.errors import ConfigurationError, FormatVersionError, RunError, nearest
from features.files import quoted, read_small
from features.recipe import Recipe
from features.sources.reading import Reading
from pipeline.config import History, RunConfig, TargetRunConfig, load_yaml, parse, parse_one_of
from pipeline.presets import DENSE, EPOCHS, PRESETS, EstimatorParameters, Preset
from pipeline.tasks.table import CLASSIFICATION, TASKS
from pipeline.tasks.task import Task

logger = logging.getLogger(__name__)

FILES = ("config.yaml", "metrics.json", "history.csv", "predictions.csv", "environment.json", "README.md")
RENEWED = "renewed"  # key of environment.json: when a run of an older state was last asked for
BACKBONE_WEIGHTS = "backbone.npz"
BACKBONE_MODEL = "backbone.keras"
# Upper limits of what is accepted from a file: seconds and parameter counts, bytes of a JSON file and of a history.
LARGEST, JSON_BYTES, HISTORY_BYTES = 1e15, 1_000_000, 30_000_000
_RUN_NAME = re.compile(r"-[0-9a-f]{10}$")  # the end of a run id
ROW_BYTES = 20_000  # of predictions.csv: the path and the digest of an image; classes and probabilities come on top


class Found(NamedTuple):
    """The runs in a folder, and the names of the damaged ones, which were left out."""

    runs: list[Run]
    damaged: list[str]


class Predictions(NamedTuple):
    """Predictions of the validation rows: paths, content hashes, labels and probabilities.

    ``sha256`` is uint8 (n, 32), ``labels`` int32 (n,), ``probabilities`` float64 (n, c); of another task targets (n, c) and
    what was predicted.
    """

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
        The run folder.
    config, metrics, environment : dict
        Plain values of ``config.yaml``, ``metrics.json`` and ``environment.json``.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    environment: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Read a run folder, but not yet the head in it.

        Raises
        ------
        RunError
            The folder is not a run, or one of its files is missing or malformed; the message names the file.
        FormatVersionError
            The run was written by another release.
        """
        folder = Path(folder)
        if not is_run_folder(folder):
            raise RunError(f"{folder}: is not a run folder (it has no config.yaml); bottleneck leaderboard lists runs")
        try:
            values = load_yaml(folder / "config.yaml", aliases=False)
        except ConfigurationError as problem:
            raise RunError(str(problem)) from problem
        schema = (
            TargetRunConfig if values.get("format") == TargetRunConfig.model_fields["format"].default else RunConfig
        )
        config = parse(schema, values, str(folder / "config.yaml"), error=RunError)
        task = TASKS[getattr(config, "task", CLASSIFICATION.name)]
        missing = [name for name in (*FILES, *config.model) if not _is_file(folder / name)]
        if missing:
            raise RunError(f"{folder}: the run is incomplete, missing: {', '.join(missing)}; train it again")
        values = _read_json(folder / "metrics.json")
        metrics = parse_one_of(task.metrics_models, values, str(folder / "metrics.json"), error=RunError)
        if metrics.run_id != config.run_id:
            raise RunError(f"{folder / 'metrics.json'}: belongs to {metrics.run_id}, config.yaml to {config.run_id}")
        environment = _read_json(folder / "environment.json")
        if not isinstance(environment, dict):
            raise RunError(f"{folder / 'environment.json'}: expected a mapping of keys to values")
        for name, kinds in (("fit_seconds", (int, float)), ("parameters", (int,))):
            value = environment.get(name)
            if value is not None and not (type(value) in kinds and 0 <= value <= LARGEST):
                raise RunError(
                    f"{folder / 'environment.json'}: {name}: received {str(value)[:40]!r}, expected a number of 0 or more"
                )
        run = cls(folder, config.model_dump(mode="json"), metrics.model_dump(mode="json"), environment)
        _ = run.recipe, run.reading  # raises an error if one of them is wrong
        return run

    @property
    def run_id(self) -> str:
        """``<head>-<10 hexadecimal digits>``."""
        return str(self.config["run_id"])

    @property
    def task(self) -> Task:
        """What it predicts."""
        return TASKS[self.config.get("task", CLASSIFICATION.name)]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order; of another task the columns of the target."""
        return tuple(self.config["classes"])

    @functools.cached_property
    def recipe(self) -> Recipe:
        """Recipe of the features; for a fine-tuned run with the weights of its own network."""
        try:
            recipe = Recipe.from_dict(self.config["features"]["recipe"])
        except (ConfigurationError, TypeError, ValueError, LookupError, AttributeError) as problem:
            raise RunError(f"{self.folder / 'config.yaml'}: features.recipe: {problem}") from problem
        if recipe.fingerprint != self.config["features"]["fingerprint"]:
            raise RunError(
                f"{self.folder / 'config.yaml'}: the recipe has fingerprint {recipe.fingerprint}, but the file says "
                f"{self.config['features']['fingerprint']}; one of them was edited, so train the run again"
            )
        return recipe

    @property
    def data_digest(self) -> str:
        """Digest of the images, labels and splits that it was trained on."""
        return str(self.config["features"]["data_digest"])

    @property
    def source(self) -> str:
        """Source of its images, an absolute path without links, or a sample.

        Runs of release 0.1.0 noted it as the user gave it. If that was relative, it is taken from the folder of the store,
        where most users were when they typed it.
        """
        features = self.config["features"]
        if not features["source"] or features["source"].startswith("sample:"):
            return str(features["source"])
        folder = os.path.dirname(str(features["store"]))
        return os.path.realpath(os.path.join(folder, str(features["source"])))

    @property
    def created(self) -> float:
        """When it was made, or last renewed (`pipeline.runs.writing.renew`), in seconds since 1970; 0 if it does not say so."""
        return max(_seconds(self.environment.get(name)) for name in ("created", RENEWED))

    @property
    def split_rule(self) -> str:
        """Split rule, in the form that ``extract --split`` accepts."""
        return str(self.config["features"]["split_rule"])

    @property
    def backbone_argument(self) -> str:
        """Value for ``extract --backbone``: a name, or the path of a model file."""
        own = BACKBONE_MODEL in self.config["model"]
        return str(self.folder / BACKBONE_MODEL) if own else self.config["features"]["backbone"]

    @property
    def weights_argument(self) -> str:
        """Value for ``extract --weights``; for a fine-tuned run the weights file in its folder."""
        own = BACKBONE_WEIGHTS in self.config["model"]
        return str(self.folder / BACKBONE_WEIGHTS) if own else self.config["features"]["weights"]

    @property
    def target(self) -> str | None:
        """Label column of the manifest that the features were made from; None if there was no choice."""
        return self.config["features"]["target"] or None

    @property
    def limit(self) -> int:
        """Number of images of its data set that ``extract --limit`` took; 0 if it took all."""
        return int(self.config["features"].get("limit", 0))

    @property
    def labels(self) -> dict[str, Any] | None:
        """The labels file under which it was trained (`pipeline.config.LabelsRecord`); None if there was none."""
        labels: dict[str, Any] | None = self.config["features"].get("labels")
        return labels

    @property
    def reading(self) -> Reading:
        """How classes and splits were read from the images that the features were made from."""
        try:
            return Reading.recorded(self.config["features"]["reading"])
        except ConfigurationError as problem:
            raise RunError(f"{self.folder / 'config.yaml'}: features.{problem}") from problem

    @property
    def stops_on_validation(self) -> bool:
        """Whether the validation images decided which epoch was kept, so that their scores are slightly too good."""
        head = self.config["head"]
        dense = head["name"] in PRESETS and PRESETS[head["name"]].kind == DENSE
        return self.config["stage"] == "finetune" or (dense and head["parameters"].get("stop_on") != "train")

    @property
    def uses_validation(self) -> bool:
        """Whether validation images had a part in training: they chose the epoch, or ended that of a streamed ``sgd`` head."""
        streamed = bool(self.environment.get("streamed")) and "solver" not in self.config["head"]["parameters"]
        return self.stops_on_validation or streamed

    @property
    def settings(self) -> str:
        """Parameters, pooling and seed that differ from the defaults of the head, as ``name=value`` separated by spaces."""
        head = self.config["head"]
        preset = PRESETS.get(head["name"], Preset(head["name"], EstimatorParameters(), by_path=True))
        usual = preset.parameters.described()
        given = {name: value for name, value in head["parameters"].items() if usual.get(name) != value}
        if head["pool"] not in ("none", preset.pool):
            given["pool"] = head["pool"]
        if self.config["seed"]:
            given["seed"] = self.config["seed"]
        return " ".join(f"{name}={value}" for name, value in given.items())


def _seconds(moment: object) -> float:
    """A moment as ``environment.json`` notes it, in seconds since 1970; 0 for anything else."""
    try:
        return datetime.fromisoformat(str(moment)).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def read_predictions(run: Run) -> Predictions:
    """Read the predictions of the validation rows from ``predictions.csv`` of a run.

    Raises
    ------
    RunError
        If the file is malformed, or does not have as many images as ``metrics.json`` says.
    """
    path, names = run.folder / "predictions.csv", run.classes
    longest = max(len(name.encode("utf-8", "surrogateescape")) for name in names)
    most = (run.metrics["validation"]["n"] + 1) * (ROW_BYTES + (4 * longest + 32) * len(names))
    try:
        text = read_small(path, most).decode("utf-8", "surrogateescape")
        lines = list(csv.reader(io.StringIO(text, newline="")))[1:]
        digests = np.array([list(bytes.fromhex(line[1])) for line in lines], np.uint8).reshape(len(lines), 32)
        labels, probabilities = run.task.parsed(lines, names)
    except (OSError, KeyError, ValueError, IndexError, csv.Error) as problem:
        raise RunError(f"{path}: cannot be read as predictions of {len(names)} classes: {problem!r}") from problem
    expected = run.metrics["validation"]["n"]
    if len(lines) != expected:
        raise RunError(
            f"{path}: holds {len(lines)} images, expected {expected} from metrics.json; one of the two files was edited or "
            "truncated; train the head again"
        )
    return Predictions([line[0] for line in lines], digests, labels, probabilities)


def read_history(folder: Path) -> History:
    """Read the columns of ``history.csv`` from a run folder.

    Raises
    ------
    RunError
        If the file is malformed.
    """
    path = folder / "history.csv"
    try:
        text = read_small(path, HISTORY_BYTES).decode("utf-8")
        names, *lines = csv.reader(io.StringIO(text, newline=""))
        if len(lines) > EPOCHS or len(set(names)) < len(names) or {len(line) for line in lines} - {len(names)}:
            raise ValueError(f"{len(lines)} rows; expected at most {EPOCHS:,}, each with one number for each column")
    except (OSError, ValueError, csv.Error) as problem:
        raise RunError(f"{path}: cannot be read as the history of a run: {problem!r}; train it again") from problem
    history: History = {}
    for number, name in enumerate(names if lines else ()):
        try:
            history[name] = [float(line[number]) for line in lines]
        except ValueError as problem:
            raise RunError(f"{path}: column {name!r} holds a value that is not a number: {problem}") from problem
    return history


def is_finished(folder: str | Path) -> bool:
    """Whether a folder exists and holds a complete run."""
    try:
        Run.open(folder)
    except RunError:
        return False
    return True


def find_runs(root: str | Path, *, warn: bool = True) -> Found:
    """Find all finished runs in a folder, sorted by name; the folder may also be a run itself.

    Damaged runs are left out, and named in warnings unless ``warn`` is False.

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
                f"bottleneck train-head {quoted(root)}"
            )
        beside = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
        raise RunError(
            f"{root}: there is no such folder of runs; bottleneck train-head makes one{nearest(root.name, beside)}"
        )
    if is_run_folder(root):
        return Found([Run.open(root)], [])
    found = Found([], [])
    for folder in sorted(root.iterdir()):
        try:
            if _may_be_run(folder):
                found.runs.append(Run.open(folder))
        except (RunError, FormatVersionError) as problem:
            found.damaged.append(folder.name)
            if warn:
                logger.warning("run left out: %s", problem)
    return found


def _may_be_run(folder: Path) -> bool:
    """Whether a folder of a folder of runs is to be opened. One that may not be looked into is if it is named like a run."""
    if folder.name.startswith("."):
        return False
    try:
        return any(_is_file(folder / name) for name in FILES[:2])
    except RunError:
        if _RUN_NAME.search(folder.name):
            raise
        return False


def is_run_folder(path: str | Path) -> bool:
    """Whether a path is a run itself, and not a folder of runs."""
    return _is_file(Path(path) / "config.yaml")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as problem:  # permission denied, for example
        raise RunError(f"{path}: cannot be read: {problem.strerror or problem}") from problem


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_small(path, JSON_BYTES))
    except (OSError, ValueError, RecursionError) as problem:
        raise RunError(f"{path}: cannot be read: {problem}") from problem
