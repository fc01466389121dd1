"""Training the end of a network: images with their splits, trunk features computed once, the tail's training loop.

images -> Data -> trunk -> CutFeatures -> train(Tail) -> best epoch
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from features.engines import compiled
from features.errors import RunError, StoreError, UnreadableImageError
from features.files import printable
from features.layout import data_digest
from features.recipe import PixelRule
from features.sources import ImageSet
from features.splits import SPLITS, SplitRule, assign_splits
from pipeline.endtoend import Split, decoded_batches, probabilities_of
from pipeline.metrics import evaluate

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
KEPT_BYTES = 1 << 30  # trunk features up to this size are kept in memory, larger ones in a file


@dataclasses.dataclass(frozen=True)
class Data:
    """Images of a source with the splits that extraction gave them.

    Parameters
    ----------
    images : ImageSet
        The source.
    splits : int8, (images,)
        Index into ``SPLITS``; images that could not be read are in ``unlabelled``.
    sha256 : uint8, (images, 32)
        Content; zeros where it could not be read.
    digest : str
        ``features.layout.data_digest`` of those that could, as a feature store of them would have it.
    """

    images: ImageSet
    splits: np.ndarray
    sha256: np.ndarray
    digest: str

    @property
    def labels(self) -> np.ndarray:
        """int32, (images,)."""
        return self.images.labels

    def rows(self, split: str) -> np.ndarray:
        """Image numbers of one split, ascending."""
        return np.flatnonzero(self.splits == SPLITS.index(split))


def read_data(images: ImageSet, rule: SplitRule, pool: Executor) -> Data:
    """Hash every image and give it its split.

    Raises
    ------
    RunError
        If none could be read.
    """

    def digest(row: int) -> bytes:
        try:
            return hashlib.sha256(images.read(row)).digest()
        except UnreadableImageError as error:
            logger.warning("%s is unreadable (%s); left out", printable(images.paths[row]), error)
            return b""

    hashes = list(pool.map(digest, range(len(images))))
    readable = np.array([row for row, value in enumerate(hashes) if value], dtype=np.int64)
    if not len(readable):
        raise RunError(f"{images.description}: none of {len(images)} images could be read")
    sha256 = np.zeros((len(images), 32), np.uint8)
    sha256[readable] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    groups = None if images.groups is None else [images.groups[row] for row in readable]
    splits = np.full(len(images), SPLITS.index("unlabelled"), np.int8)
    labels, given = images.labels[readable], images.given_splits[readable]
    splits[readable], _ = assign_splits(labels, given, groups, sha256[readable], rule)
    return Data(images, splits, sha256, data_digest(images.classes, sha256[readable], labels, splits[readable]))


class CutFeatures:
    """Trunk features of the images that are trained on and measured, computed once.

    The trunk is frozen and the images are plain, so an image's features are the same in every epoch. They are kept
    in memory up to 1 GiB, above that in a file that is removed afterwards.

    Parameters
    ----------
    data : Data
        Train and validation images are taken.
    trunk : callable
        ``uint8, (n, h, w, 3)`` -> dict with one array, ``float32, (n, ...)``.
    rule : PixelRule
        How the images are decoded.
    pool : Executor
        Threads that read and decode.
    batch_size : int
        Images of one forward pass.
    folder : Path
        Where the file goes, if one is needed.
    progress : callable, optional
        Called with ``(stage, done, total)``.
    """

    def __init__(
        self,
        data: Data,
        trunk: Callable[[np.ndarray], Any],
        rule: PixelRule,
        pool: Executor,
        *,
        batch_size: int,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        wanted = np.concatenate([data.rows("train"), data.rows("validation")]).tolist()
        self._place: dict[int, int] = {}
        self._array: np.ndarray = np.zeros((0,), np.float32)
        for rows, pixels, refused in decoded_batches(data.images.read, wanted, rule, pool, batch_size):
            for row, error in refused.items():
                logger.warning("%s is unreadable (%s); left out", printable(data.images.paths[row]), error)
            if not rows:
                continue
            (features,) = trunk(pixels).values()
            start = len(self._place)
            if not start:
                self._array = _room((len(wanted), *features.shape[1:]), folder)
            self._array[start : start + len(rows)] = features
            self._place |= {row: start + offset for offset, row in enumerate(rows)}
            if progress:
                progress("trunk", len(self._place), len(wanted))

    def readable(self, rows: np.ndarray) -> np.ndarray:
        """Those rows that have features."""
        return np.array([row for row in rows.tolist() if row in self._place], dtype=np.int64)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Features of some rows, float32, (k, ...)."""
        return self._array[[self._place[int(row)] for row in rows]]


def _room(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    needed = 4 * int(np.prod(shape, dtype=np.int64))
    if needed <= KEPT_BYTES:
        return np.empty(shape, np.float32)
    free = shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise StoreError(
            f"{folder}: the features before the trained layers need {needed >> 20} MiB there, {free >> 20} MiB are "
            "free. Free some space, give another --runs folder, or unfreeze from a later layer."
        )
    with tempfile.TemporaryFile(dir=folder, prefix=".finetune-") as file:  # without a name: gone once unmapped
        return np.memmap(file, np.float32, "w+", shape=shape)


class Tail:
    """The trainable end of a network: compiled training step, compiled inference, snapshots."""

    def __init__(self, split: Split, temperature: float, learning_rate: float, batch_size: int) -> None:
        import keras

        self.model, self._temperature, self.batch_size = split.tail, temperature, batch_size
        self._binary = split.tail.output_shape[-1] == 1
        loss = (
            keras.losses.BinaryCrossentropy(from_logits=True)
            if self._binary
            else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        # Compiled after `trainable` was set: Keras looks at it when it compiles.
        self.model.compile(optimizer=keras.optimizers.Adam(learning_rate), loss=loss)
        self._forward = compiled(lambda features: split.tail(features, training=False))

    def step(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Train on one batch; its mean loss."""
        targets = labels[:, None].astype(np.float32) if self._binary else labels
        self.model.reset_metrics()  # else Keras gives the mean over all batches so far
        return float(self.model.train_on_batch(features, targets))

    def probabilities(self, cut: CutFeatures, rows: np.ndarray) -> np.ndarray:
        """Class probabilities of rows, float64, (n, c)."""
        import keras

        parts = []
        for start in range(0, len(rows), self.batch_size):
            batch = cut.of(rows[start : start + self.batch_size])
            count = len(batch)
            if count < self.batch_size:  # one shape, compiled once
                batch = np.concatenate([batch, np.zeros((self.batch_size - count, *batch.shape[1:]), np.float32)])
            logits = keras.ops.convert_to_numpy(self._forward(keras.ops.convert_to_tensor(batch)))[:count]
            parts.append(probabilities_of(logits, self._temperature))
        return np.concatenate(parts)

    def snapshot(self) -> list[np.ndarray]:
        """Copies of all trainable variables."""
        import keras

        return [np.array(keras.ops.convert_to_numpy(variable)) for variable in self.model.trainable_variables]

    def restore(self, values: Sequence[np.ndarray]) -> None:
        """Set all trainable variables."""
        for variable, value in zip(self.model.trainable_variables, values, strict=True):
            variable.assign(value)


def train(
    tail: Tail,
    cut: CutFeatures,
    data: Data,
    *,
    classes: Sequence[str],
    epochs: int,
    patience: int,
    seed: int,
    progress: Progress | None,
) -> tuple[dict[str, list[float]], dict[str, Any], dict[str, Any]]:
    """Train, and end with the best epoch: the highest validation accuracy, then the lowest log loss.

    The head as it came counts as epoch 0, so the result is never worse than that on validation.

    Returns
    -------
    history : dict of str to list of float
        One entry per epoch, epoch 0 first (its loss is that of validation, as no step was taken).
    before, after : dict
        Validation scores.

    Raises
    ------
    RunError
        If train or validation is empty.
    """
    rows, validation = cut.readable(data.rows("train")), cut.readable(data.rows("validation"))
    if not len(rows) or not len(validation):
        raise RunError(
            f"fine-tuning needs train and validation images, received {len(rows)} and {len(validation)}. "
            "Extract with another --split."
        )

    def measure() -> dict[str, Any]:
        return evaluate(tail.probabilities(cut, validation), data.labels[validation], classes)

    before = best = measure()
    kept, waited, lowest = tail.snapshot(), 0, before["log_loss"]
    history: dict[str, list[float]] = {
        "epoch": [0],
        "loss": [before["log_loss"]],
        "val_loss": [before["log_loss"]],
        "val_accuracy": [before["accuracy"]],
    }
    for epoch in range(1, epochs + 1):
        # The order depends on seed and epoch only, whatever the rows' order in the source.
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        total = 0.0
        for start in range(0, len(order), tail.batch_size):
            batch = order[start : start + tail.batch_size]
            total += tail.step(cut.of(batch), data.labels[batch]) * len(batch)
            if progress:
                progress(f"epoch {epoch}/{epochs}", start + len(batch), len(order))
        scores = measure()
        for name, value in zip(
            history, (epoch, total / len(order), scores["log_loss"], scores["accuracy"]), strict=True
        ):
            history[name].append(value)
        if (scores["accuracy"], -scores["log_loss"]) > (best["accuracy"], -best["log_loss"]):
            best, kept = scores, tail.snapshot()
        waited = 0 if scores["log_loss"] < lowest else waited + 1
        lowest = min(lowest, scores["log_loss"])
        if waited >= patience:
            break
    tail.restore(kept)
    return history, before, best
