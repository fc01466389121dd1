"""Models that predict: the network and head of a run, or an exported model. Image file -> pixels -> probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from features.augmentation import AugmentSpec
from features.errors import ConfigurationError, UnreadableImageError
from features.pixels.views import decode_views
from pipeline.exporting.artefacts import Artefact, full_pixels, is_artefact
from pipeline.heads.kinds import head_of
from pipeline.predicting.options import PredictOptions
from pipeline.runs.board import Taken, take_run
from pipeline.runs.folder import Run
from pipeline.tasks.task import Task
from pipeline.tuning.endtoend import network_of


class Model(Protocol):
    """A model from image files to class probabilities."""

    name: str
    classes: tuple[str, ...]
    batch_size: int
    task: Task
    before: Mapping[str, Any]  # scores of the validation split, or as much of them as `Task.answer` needs
    answers: Mapping[str, Any] | None  # `pipeline.config.Answers`: what it promises

    def load(self, data: bytes) -> np.ndarray:
        """Decode an image file to the pixels that `__call__` takes; raises ``UnreadableImageError``."""

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the probabilities, float64 (n, c), of at most ``batch_size`` images."""


def taken(path: str | Path, asked: PredictOptions, likely: str | None = None) -> Taken | tuple[None, list[str]]:
    """Return the run to predict with as `pipeline.runs.board.take_run` does; None for an exported model.

    Raises
    ------
    ConfigurationError
        If ``path`` is an exported model, and an option is given that means something only for a run.
    """
    if not is_artefact(path):
        return take_run(path, data_set=asked.data_set, likely=likely)
    for option, given, holds in (
        ("--data-set", asked.data_set, "is made of one run"),
        ("--weights", asked.weights, "holds its own weights"),
        ("--quantised", asked.quantised, "holds its own network"),
        ("--device", None if asked.device != "gpu" else "gpu", "runs on the processor"),
        ("--trust", "" if asked.trust else None, "holds no head that needs it"),
    ):
        if given is not None:
            raise ConfigurationError(
                f"{f'{option} {given}'.strip()}: {path} is an exported model, which {holds}; leave it out"
            )
    return None, []


def promises_of(run: Run, options: PredictOptions) -> Mapping[str, Any] | None:
    """What a run promises of its answers; None where it promises nothing of the mean over several views."""
    return run.metrics.get("answers") if options.views == 1 else None


class RunModel:
    """The network and head of a run. Probabilities are averaged over the views of each image.

    Parameters
    ----------
    run : Run
        Run with any kind of head.
    options : PredictOptions
        ``views`` (view 0 is the plain image), ``weights``, ``quantised``, ``batch_size``, ``device`` and ``trust`` are used.
    augment : AugmentSpec, optional
        Augmentation from which the other views are drawn.
    """

    def __init__(self, run: Run, *, options: PredictOptions, augment: AugmentSpec | None = None) -> None:
        self.name, self.classes = run.run_id, run.classes
        self.answers = promises_of(run, options)
        self.task, self.before = run.task, run.metrics["validation"]
        self.batch_size = options.batch_size
        self._recipe, self._views, self._augment = run.recipe, options.views, augment
        network = network_of(run, options.weights, device=options.device, quantised=options.quantised)
        self._head = head_of(run, trust=options.trust)
        self._engine = network.engine(network.recipes, batch_size=options.batch_size, device=options.device)
        self._features = network.recipes[0].name

    def load(self, data: bytes) -> np.ndarray:
        """Return the pixels of the views, uint8 (views, h, w, 3)."""
        recipe, views = self._recipe, range(self._views)
        digest = hashlib.sha256(data).digest() if self._views > 1 else b""
        return decode_views(data, recipe.pixels, self._augment, seed=recipe.seed, sha256=digest, views=views).pixels

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        pixels = np.concatenate(images)
        starts = range(0, len(pixels), self.batch_size)
        batches = (pixels[start : start + self.batch_size] for start in starts)
        found = [self._head.predict_proba(self._engine(batch)[self._features]) for batch in batches]
        return np.asarray(np.concatenate(found).reshape(len(images), self._views, -1).mean(axis=1))


class ArtefactModel:
    """An exported model. It predicts one image at a time, because image sizes differ."""

    batch_size = 1

    def __init__(self, artefact: Artefact) -> None:
        self.name, self.classes, self.answers = artefact.card.run, artefact.classes, artefact.answers
        self.task: Task = artefact.task
        self.before: Mapping[str, Any] = artefact.before
        self._artefact = artefact

    def load(self, data: bytes) -> np.ndarray:
        """Return the pixels in the size of the file, uint8 (h, w, 3)."""
        pixels, longest = full_pixels(data, self._artefact.recipe.pixels), self._artefact.longest_side
        if max(pixels.shape) > longest:
            raise UnreadableImageError(
                "too-large", f"{pixels.shape[1]}x{pixels.shape[0]}, the model takes sides up to {longest} pixels"
            )
        return pixels

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([self._artefact(pixels[None]) for pixels in images])
