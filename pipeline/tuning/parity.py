"""The parity gate: the assembled network gives the probabilities that the cached head gave, or a layer is named.

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
from pipeline.tuning.cached import CachedCut
from pipeline.tuning.endtoend import PIXELS, Split, network_of, split_for_training
from pipeline.tuning.inputs import PLAIN, Data, Inputs, Trunk
from pipeline.tuning.settings import TuningSettings
from pipeline.tuning.training import Tail

PARITY_IMAGES = 64
# In probability. Heads trained on float16 features were trained on rounded numbers, the network gives them unrounded.
PARITY_TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
LAYER_TOLERANCE = 1e-3  # relative difference of a layer that is named as the first to differ


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a run's head gave from cached features.

    Parameters
    ----------
    rows : int64, (n,)
        Rows of the data, of its validation split.
    paths : list of str
        Their names, for messages.
    probabilities : float64, (n, c)
        What is to be met.
    tolerance : float
        In probability.
    """

    rows: np.ndarray
    paths: list[str]
    probabilities: np.ndarray
    tolerance: float

    def check(self, received: np.ndarray, what: str, explain: Callable[[int], str]) -> float:
        """Largest difference in probability.

        Parameters
        ----------
        received : float64, (n, c)
            Probabilities of the same rows.
        what : str
            Where the comparison is made, for the message.
        explain : callable
            Says of a row what is to blame.

        Raises
        ------
        ParityError
            If it exceeds the tolerance, or is not finite.
        """
        worst, gap = largest_gap(received, self.probabilities)
        if gap <= self.tolerance:
            return gap
        raise ParityError(
            f"{what}: probabilities of {printable(self.paths[worst])} differ by {gap:.2e}, at most "
            f"{self.tolerance:.0e} is allowed. {explain(int(self.rows[worst]))}"
        )

    def to_meet(self, probabilities: np.ndarray) -> Reference:
        """The same rows with other probabilities to be met."""
        return dataclasses.replace(self, probabilities=probabilities)


def largest_gap(received: np.ndarray, expected: np.ndarray) -> tuple[int, float]:
    """Row and size of the largest difference between probabilities (n, c); where one is not finite, that row."""
    gaps = np.abs(received - expected).max(axis=1)
    worst = int(np.argmax(np.nan_to_num(gaps, nan=np.inf)))
    return worst, float(gaps[worst])


def reference_of(run: Run, data: Data, *dtypes: str) -> Reference:
    """Up to `PARITY_IMAGES` predictions of a run, evenly spread over validation, found by content in the data.

    Parameters
    ----------
    run : Run
        Its ``predictions.csv`` is read.
    data : Data
        Images may have been renamed since.
    *dtypes : {"float32", "float16"}
        How the features on both sides were stored, which decides the tolerance.

    Raises
    ------
    RunError
        If images of the run are missing, or the file is damaged.
    """
    found = read_predictions(run)
    if not found.paths:
        raise RunError(f"{run.folder / 'predictions.csv'}: holds no predictions to compare with")
    chosen = evenly_spread(len(found.paths), PARITY_IMAGES)
    hashes, values = [found.sha256[row].tobytes() for row in chosen], found.probabilities[chosen]
    validation = {data.sha256[row].tobytes(): row for row in data.rows("validation").tolist()}
    missing = sum(sha256 not in validation for sha256 in hashes)
    if missing:
        raise RunError(
            f"{data.description}: {missing} of {len(hashes)} validation images of {run.run_id} are not here, "
            "changed, or in another split. Extract and train the head again on these images."
        )
    rows = np.array([validation[sha256] for sha256 in hashes], dtype=np.int64)
    tolerance = max(PARITY_TOLERANCE[dtype] for dtype in dtypes)
    return Reference(rows, [data.paths[row] for row in rows], values, tolerance)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is fine-tuned.

    Parameters
    ----------
    start : Run
        Where it begins.
    settings : TuningSettings
        How.
    network : Network
        The backbone, and where its weights are.
    head : Head
        The run's, as a network; from scratch a new one.
    split : Split
        Both, cut in two.
    cached : CachedCut or None
        Where cut features come from, if not from images.
    """

    start: Run
    settings: TuningSettings
    network: Network
    head: Head
    split: Split
    cached: CachedCut | None

    @property
    def decided(self) -> dict[str, Any]:
        """What decides the result beside the features and the data: the identity of the new run."""
        cache = {} if self.cached is None else {"from_cache": self.cached.identity}
        return {**self.settings.described(), "start": self.start.run_id, **cache}

    def noted(self) -> dict[str, Any]:
        """All settings, for ``config.yaml``."""
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
    """Compares the network with the cached head before training, and with itself after it was saved.

    Parameters
    ----------
    job : Job
        What is fine-tuned.
    data : Data
        Rows.
    inputs : Inputs
        Cut features of them.
    tail : Tail
        What is trained.
    """

    def __init__(self, job: Job, data: Data, inputs: Inputs, tail: Tail) -> None:
        self._job, self._data, self._inputs, self._tail = job, data, inputs, tail
        dtypes = [item.recipe.dtype for item in (job.start, job.cached) if item is not None]
        self._reference = reference_of(job.start, data, *dtypes)

    @property
    def rows(self) -> np.ndarray:
        """Rows that are compared."""
        return self._reference.rows

    def before(self) -> float:
        """Largest difference in probability between the network and the cached head; ``ParityError`` if too large."""
        received = self._tail.probabilities(self._inputs, self.rows)
        return self._reference.check(received, "before fine-tuning", self._explain_before)

    def before_from_pixels(self, pixels: np.ndarray, trunk: Trunk) -> float:
        """The same of the network from pixels, where training begins from cached cut features.

        Parameters
        ----------
        pixels : uint8, (n, h, w, 3), 0-255
            Of `rows`.
        trunk : callable
            Pixels -> cut features.
        """
        size = self._tail.batch_size
        cut = [trunk(pixels[start : start + size]) for start in range(0, len(pixels), size)]

        def explain(row: int) -> str:
            place = self.rows.tolist().index(row)
            difference = relative_difference(np.concatenate(cut)[place : place + 1], self._features(row))
            return f"Its cached features at {self._job.split.cut!r} differ from those of its pixels by {difference:.1e} relative."

        return self._reference.check(self._tail.probabilities_of(cut), "before fine-tuning, from pixels", explain)

    def after(self, finished: Run, pixels: np.ndarray | None, device: str) -> float:
        """Largest difference in probability between the network in memory and the run that was saved, opened again.

        Parameters
        ----------
        finished : Run
            The new one.
        pixels : uint8, (n, h, w, 3), 0-255, optional
            Of `rows`: they go the way that ``predict`` goes. Without them, cut features go through the saved layers.
        device : str
            As everywhere.
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
            return found or f"It is a layer before {job.split.cut!r}."

        if pixels is None:
            received = Tail(saved(), head.temperature, job.settings).probabilities(self._inputs, self.rows)
        else:
            size = self._tail.batch_size
            engine = network.engine(network.recipes, batch_size=size, device=device)
            parts = (engine(pixels[start : start + size]) for start in range(0, len(pixels), size))
            received = np.concatenate([head.predict_proba(*part.values()) for part in parts])
        reference = self._reference.to_meet(self._tail.probabilities(self._inputs, self.rows))
        return reference.check(received, f"{finished.run_id}, loaded again after fine-tuning", explain)

    def _features(self, row: int) -> np.ndarray:
        _, features = next(iter(self._inputs.batches(np.array([row]), PLAIN)))
        return features

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
    """First layer whose output differs between two models of the same layers, and the relative difference.

    Parameters
    ----------
    received, expected : keras.Model
        One input; layers are compared by name, in topological order.
    inputs : float32, (n, ...)
        What both are given.
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
    """The first layer of a tail that differs from another one's, as a sentence; empty if none does.

    Parameters
    ----------
    received, expected : Split
        Two forms of a network, cut at the same layer.
    features : (n, ...)
        Cut features of both.
    network : Network
        Its preprocessing is used.
    """
    model, values = _opened(received, features, network)
    found = first_difference(model, _opened(expected, features, network)[0], values)
    return f"The first layer that differs is {found[0]!r}, by {found[1]:.1e} relative." if found else ""


def cached_difference(run: Run, sha256: bytes, split: Split, features: np.ndarray, network: Network) -> str:
    """Whether the features that the head was trained on are those of the network, as a sentence.

    Parameters
    ----------
    run : Run
        Its store is looked at, if it is still where it was.
    sha256 : bytes
        Content of an image.
    split, features, network
        As of `differing_layer`, of that image.
    """
    about = run.config["features"]
    try:
        store = FeatureStore.open(about["store"])
        if store.recipes[about["name"]].fingerprint != about["fingerprint"]:
            raise RunError("they are of another recipe by now")
        (row, *_) = np.flatnonzero((store.images.sha256 == np.frombuffer(sha256, np.uint8)).all(axis=1))
        cached = np.asarray(store.array(about["name"])[[int(row)], [0]], np.float32)
    except (BottleneckError, KeyError, ValueError, OSError) as error:
        return f"The network is the run's own; the features that its head was trained on cannot be read ({error})."
    keras = load_keras()
    model, values = _opened(split, features, network)
    pooled = keras.Model(model.inputs[0], layer_tensors(model)[split.pool])(values, training=False)
    difference = relative_difference(keras.ops.convert_to_numpy(pooled), cached)
    if difference > LAYER_TOLERANCE:
        return (
            f"The first layer that differs is {run.recipe.layer!r}: its features in {about['store']} differ by "
            f"{difference:.1e} relative from those of now. The images, or what computed them, changed: extract again and "
            "train the head again."
        )
    return f"The features of {run.recipe.layer!r} are the same, so it is the head: its files or predictions.csv were changed."


def _opened(split: Split, features: np.ndarray, network: Network) -> tuple[Any, np.ndarray]:
    """The tail as a model whose layers can be looked at, and its input."""
    values = np.asarray(features, np.float32)
    if split.cut != PIXELS:
        return split.tail, values
    prepared = preprocess(network.backbone)(values)
    return split.tail.get_layer("end_to_end"), load_keras().ops.convert_to_numpy(prepared)
