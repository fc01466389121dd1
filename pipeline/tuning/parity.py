"""The parity gate: network and head, joined, must give the cached head's probabilities; if not, an error names a layer.

predictions.csv of a run -> Reference ─ check(probabilities) ─▶ largest gap, or ParityError with the first layer that differs
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from features.errors import BottleneckError, ParityError, RunError
from features.files import printable
from features.networks.backbones import preprocess
from features.networks.backend import load_keras
from features.networks.graph import layer_tensors
from features.networks.network import Network
from features.networks.reference import evenly_spread, relative_difference
from features.store.reader import FeatureStore
from pipeline.heads.head import Head
from pipeline.heads.kinds import head_of
from pipeline.runs.folder import Run, read_predictions
from pipeline.tasks.table import CLASSIFICATION
from pipeline.tasks.task import Task
from pipeline.tuning.cached import CachedCut
from pipeline.tuning.endtoend import PIXELS, Split, network_of, split_for_training
from pipeline.tuning.inputs import PLAIN, Data, Inputs, Trunk
from pipeline.tuning.settings import TuningSettings
from pipeline.tuning.training import Tail

PARITY_IMAGES = 64
# Largest difference in probability, by dtype of the stored features. float16 features are rounded, the network's are not.
PARITY_TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
LAYER_TOLERANCE = 1e-3  # relative difference above which a layer counts as different


@dataclasses.dataclass(frozen=True)
class Reference:
    """Predictions that a run's head gave from cached features, such as probabilities, to compare with.

    Parameters
    ----------
    rows : int64, (n,)
        Rows of the data, all in the validation split.
    paths : list of str
        Names of these images, for messages.
    probabilities : float64, (n, c)
        Expected predictions.
    tolerance : float
        Largest accepted difference, in the unit of the task.
    task : Task
        What is predicted.
    """

    rows: np.ndarray
    paths: list[str]
    probabilities: np.ndarray
    tolerance: float
    task: Task = CLASSIFICATION

    def check(self, received: np.ndarray, what: str, explain: Callable[[int], str]) -> float:
        """Return the largest difference in probability, or in the unit of the task, see `Task.parity_unit`.

        Parameters
        ----------
        received : float64, (n, c)
            Predictions of the same rows.
        what : str
            Stage at which they are compared, with which the message begins.
        explain : callable
            Takes a row and returns a sentence about the cause of its difference.

        Raises
        ------
        ParityError
            If the difference exceeds the tolerance or is not finite.
        """
        unit = self.task.parity_unit(self.probabilities)
        worst, gap = largest_gap(received / unit, self.probabilities / unit)
        if gap <= self.tolerance:
            return gap
        raise ParityError(
            f"{what}: {self.task.predicted} of {printable(self.paths[worst])} differ by {gap:.2e}; at most "
            f"{self.tolerance:.0e} is allowed. {explain(int(self.rows[worst]))}"
        )

    def expecting(self, probabilities: np.ndarray) -> Reference:
        """Make a reference for the same rows with other expected probabilities."""
        return dataclasses.replace(self, probabilities=probabilities)


def largest_gap(received: np.ndarray, expected: np.ndarray) -> tuple[int, float]:
    """Row and size of the largest difference between probabilities (n, c); one that is not finite counts as largest."""
    gaps = np.abs(received - expected).max(axis=1)
    worst = int(np.argmax(np.nan_to_num(gaps, nan=np.inf)))
    return worst, float(gaps[worst])


def reference_of(run: Run, data: Data, *dtypes: str) -> Reference:
    """Take up to `PARITY_IMAGES` predictions of a run, evenly spread over validation, and find their images in the data.

    Parameters
    ----------
    run : Run
        The run whose ``predictions.csv`` is read.
    data : Data
        Rows to search by content hash, as images may have been renamed.
    *dtypes : {"float32", "float16"}
        Dtypes of the stored features on both sides, which decide the tolerance.

    Raises
    ------
    RunError
        If images of the run are missing, or its predictions are missing or damaged.
    """
    found = read_predictions(run)
    if not found.paths:
        raise RunError(f"{run.folder / 'predictions.csv'}: holds no predictions to compare with; train the head again")
    chosen = evenly_spread(len(found.paths), PARITY_IMAGES)
    hashes, values = [found.sha256[row].tobytes() for row in chosen], found.probabilities[chosen]
    validation = {data.sha256[row].tobytes(): row for row in data.rows("validation").tolist()}
    missing = sum(sha256 not in validation for sha256 in hashes)
    if missing:
        raise RunError(
            f"{data.description}: {missing} of {len(hashes)} validation images of {run.run_id} are not here, "
            "have changed, or are in another split. Extract and train the head again on these images."
        )
    rows = np.array([validation[sha256] for sha256 in hashes], dtype=np.int64)
    tolerance = max(PARITY_TOLERANCE[dtype] for dtype in dtypes)
    return Reference(rows, [data.paths[row] for row in rows], values, tolerance, run.task)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is fine-tuned, and how.

    Parameters
    ----------
    start : Run
        The run that fine-tuning starts from.
    settings : TuningSettings
        Settings of the training.
    network : Network
        The network and its weights.
    head : Head
        The run's head as a Keras model, or a new one with the same layers.
    split : Split
        Network and head, joined and cut in two.
    cached : CachedCut or None
        The stored feature set that is trained on; None if the cut features are computed from images.
    """

    start: Run
    settings: TuningSettings
    network: Network
    head: Head
    split: Split
    cached: CachedCut | None

    @property
    def decided(self) -> dict[str, Any]:
        """The values that decide the result besides features and data, and so the new run's id."""
        cache = {} if self.cached is None else {"from_cache": self.cached.identity}
        return {**self.settings.described(), "start": self.start.run_id, **cache}

    def noted(self) -> dict[str, Any]:
        """Collect all settings for ``config.yaml``."""
        variables = self.split.tail.trainable_variables
        return {
            **self.settings.model_dump(mode="json"),
            "start": self.start.run_id,
            "from_cache": None
            if self.cached is None
            else {"path": str(self.cached.store.path), **self.cached.identity},
            "cut": self.split.cut,
            "trainable_variables": len(variables),
            "trainable_parameters": sum(int(np.prod(item.shape)) for item in variables),
        }


class Gate:
    """Compares the joined network with the cached head before training, and with its saved copy afterwards.

    Parameters
    ----------
    job : Job
        What is fine-tuned.
    data : Data
        The rows.
    inputs : Inputs
        Cut features of the rows.
    tail : Tail
        The trained layers and the head.
    """

    def __init__(self, job: Job, data: Data, inputs: Inputs, tail: Tail) -> None:
        self._job, self._data, self._inputs, self._tail = job, data, inputs, tail
        dtypes = [item.recipe.dtype for item in (job.start, job.cached) if item is not None]
        self._reference = reference_of(job.start, data, *dtypes)

    @property
    def rows(self) -> np.ndarray:
        """The rows that are compared, int64, (n,)."""
        return self._reference.rows

    def before(self) -> float:
        """Return the largest difference in probability between network and cached head; ``ParityError`` if too large."""
        received = self._tail.probabilities(self._inputs, self.rows)
        return self._reference.check(received, "before fine-tuning", self._explain_before)

    def before_from_pixels(self, pixels: np.ndarray, trunk: Trunk) -> float:
        """Compare as `before` does, but from pixels, if the training starts from stored cut features.

        Parameters
        ----------
        pixels : uint8, (n, h, w, 3), 0-255
            Pixels of `rows`.
        trunk : callable
            Pixels -> cut features.
        """
        size = self._tail.batch_size
        cut = [trunk(pixels[start : start + size]) for start in range(0, len(pixels), size)]

        def explain(row: int) -> str:
            place = self.rows.tolist().index(row)
            difference = relative_difference(np.concatenate(cut)[place : place + 1], self._features(row))
            return f"Its cached features at {self._job.split.cut!r} differ from those of its pixels (relative difference {difference:.1e})."

        return self._reference.check(self._tail.probabilities_of(cut), "before fine-tuning, from pixels", explain)

    def after(self, finished: Run, pixels: np.ndarray | None, device: str) -> float:
        """Return the largest difference in probability between the network in memory and the saved run, loaded again.

        Parameters
        ----------
        finished : Run
            The new run.
        pixels : uint8, (n, h, w, 3), 0-255, optional
            Pixels of `rows`, which are predicted as ``predict`` does it. Without them, cut features are passed through
            the saved layers.
        device : {"auto", "cpu", "gpu"}
            Where the network runs.
        """
        job, network, head = self._job, network_of(finished), head_of(finished)
        saved = functools.partial(
            split_for_training,
            network,
            finished.recipe.plain,
            head.as_dense(),
            unfreeze=job.settings.unfreeze,
            cut_of=lambda cuts: job.split.cut,
        )

        def explain(row: int) -> str:
            found = differing_layer(saved(), job.split, self._features(row), network)
            return found or f"The layer that differs comes before {job.split.cut!r}."

        if pixels is None:
            received = Tail(saved(), head.temperature, job.settings, head.task).probabilities(self._inputs, self.rows)
        else:
            size = self._tail.batch_size
            engine = network.engine(network.recipes, batch_size=size, device=device)
            parts = (engine(pixels[start : start + size]) for start in range(0, len(pixels), size))
            received = np.concatenate([head.predict_proba(*part.values()) for part in parts])
        reference = self._reference.expecting(self._tail.probabilities(self._inputs, self.rows))
        return reference.check(received, f"{finished.run_id}, loaded again after fine-tuning", explain)

    def _features(self, row: int) -> np.ndarray:
        _, features = next(iter(self._inputs.batches(np.array([row]), PLAIN)))
        return np.asarray(load_keras().ops.convert_to_numpy(features))

    def _explain_before(self, row: int) -> str:
        job, features = self._job, self._features(row)
        again = split_for_training(
            job.network,
            job.start.recipe.plain,
            head_of(job.start).as_dense(),
            unfreeze=job.settings.unfreeze,
            cut_of=lambda cuts: job.split.cut,
        )
        found = differing_layer(job.split, again, features, job.network)
        return found or cached_difference(job.start, self._data.sha256[row].tobytes(), job.split, features, job.network)


def first_difference(received: Any, expected: Any, inputs: np.ndarray) -> tuple[str, float] | None:
    """Find the first layer whose output differs between two models, and the relative difference; None if none differs.

    Parameters
    ----------
    received, expected : keras.Model
        Models with one input. Layers are compared by name, in topological order.
    inputs : float32, (n, ...)
        Input of both.
    """
    keras = load_keras()
    mine, theirs = layer_tensors(received), layer_tensors(expected)
    names = [name for name in theirs if name in mine]
    values = [
        keras.Model(model.inputs[0], [tensors[name] for name in names])(inputs, training=False)
        for model, tensors in ((received, mine), (expected, theirs))
    ]
    for name, one, other in zip(names, *values, strict=True):
        difference = relative_difference(*(keras.ops.convert_to_numpy(value) for value in (one, other)))
        if not difference <= LAYER_TOLERANCE:
            return name, difference
    return None


def differing_layer(received: Split, expected: Split, features: np.ndarray, network: Network) -> str:
    """Name the first layer in which two tails differ, as a sentence; empty if none does.

    Parameters
    ----------
    received, expected : Split
        Two copies of a network, cut at the same layer.
    features : (n, ...)
        Cut features, which both receive.
    network : Network
        Supplies the preprocessing.
    """
    model, values = _opened(received, features, network)
    found = first_difference(model, _opened(expected, features, network)[0], values)
    return f"The first layer that differs is {found[0]!r} (relative difference {found[1]:.1e})." if found else ""


def cached_difference(run: Run, sha256: bytes, split: Split, features: np.ndarray, network: Network) -> str:
    """Compare the features that the head was trained on with the network's, and describe the result in a sentence.

    Parameters
    ----------
    run : Run
        The run whose store is read, if it is still where it was.
    sha256 : bytes
        Content hash of an image.
    split, features, network
        As for `differing_layer`, for that image.
    """
    about = run.config["features"]
    try:
        store = FeatureStore.open(about["store"])
        if store.recipes[about["name"]].fingerprint != about["fingerprint"]:
            raise RunError("they have another recipe now")
        (row, *_) = np.flatnonzero((store.images.sha256 == np.frombuffer(sha256, np.uint8)).all(axis=1))
        cached = np.asarray(store.array(about["name"])[[int(row)], [0]], np.float32)
    except (BottleneckError, KeyError, ValueError, OSError) as error:
        return f"The network is the run's own, but the features that its head was trained on cannot be read ({error})."
    keras = load_keras()
    model, values = _opened(split, features, network)
    pooled = keras.Model(model.inputs[0], layer_tensors(model)[split.pool])(values, training=False)
    difference = relative_difference(keras.ops.convert_to_numpy(pooled), cached)
    if difference > LAYER_TOLERANCE:
        return (
            f"The first layer that differs is {run.recipe.layer!r}: its features in {about['store']} differ from those "
            f"computed now (relative difference {difference:.1e}). The images, or the software that computed the features, "
            "have changed: extract again and train the head again."
        )
    return f"The features of {run.recipe.layer!r} agree, so the head differs: its files or predictions.csv changed."


def _opened(split: Split, features: np.ndarray, network: Network) -> tuple[Any, np.ndarray]:
    """Return the tail as a model whose layers can be inspected, and the input of that model."""
    values = np.asarray(features, np.float32)
    if split.cut != PIXELS:
        return split.tail, values
    prepared = preprocess(network.recipes[0].preprocessing, network.recipes[0].normalisation)(values)
    return split.tail.get_layer("end_to_end"), load_keras().ops.convert_to_numpy(prepared)
