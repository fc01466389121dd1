"""The loop that trains the tail, the same for images, augmented images and cached features.

Inputs ─ batches(rows, epoch) ─▶ Tail.step ─▶ scores on validation ─▶ checkpoint ─▶ best epoch
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from features.errors import RunError
from features.networks.backend import load_keras
from features.networks.keras_engine import xla_of
from features.progress import Progress
from pipeline.config import History
from pipeline.heads.epochs import Patience
from pipeline.scores.metrics import balanced_weights, evaluate
from pipeline.tuning.checkpoints import Checkpoint, State
from pipeline.tuning.endtoend import Split, probabilities_of
from pipeline.tuning.inputs import PLAIN, Data, Inputs
from pipeline.tuning.settings import TuningSettings, learning_rate, make_optimizer

logger = logging.getLogger(__name__)


class Tail:
    """The trained layers and the head: trained in batches, measured at inference.

    Parameters
    ----------
    split : Split
        Holds the ``tail`` to train.
    temperature : float
        The logits are divided by it.
    settings : TuningSettings
        Optimizer, batch size and so on.
    """

    def __init__(self, split: Split, temperature: float, settings: TuningSettings) -> None:
        keras = load_keras()
        self.model, self._temperature, self.batch_size = split.tail, temperature, settings.batch_size
        self._binary = split.tail.output_shape[-1] == 1
        layers = split.layers_of_tail()
        self._half = layers if settings.mixed_precision else []
        loss = (
            keras.losses.BinaryCrossentropy(from_logits=True)
            if self._binary
            else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        # This comes after `trainable` was set, because Keras reads it when it compiles.
        self.model.compile(optimizer=make_optimizer(settings), loss=loss, jit_compile=xla_of(layers))
        self.model.optimizer.build(self.model.trainable_variables)
        statistics = split.statistics_variables() if settings.bn == "train" else []
        self._variables = [*self.model.trainable_variables, *statistics]
        self._generators = [
            variable for variable in self.model.variables if variable.path.endswith("seed_generator_state")
        ]

    def step(
        self, features: Any, labels: np.ndarray, *, weights: np.ndarray | None = None, rate: float | None = None
    ) -> float:
        """Train on one batch and return its mean loss.

        Parameters
        ----------
        features : array or tensor, (n, ...)
            Cut features.
        labels : int32, (n,)
            Class indices.
        weights : float, (n,), optional
            Weights of the rows in the loss.
        rate : float, optional
            Learning rate from this step on.
        """
        targets = labels[:, None].astype(np.float32) if self._binary else labels
        if rate is not None:
            self.model.optimizer.learning_rate = rate
        self.model.reset_metrics()  # otherwise Keras returns the mean over all batches so far
        values = _float32(features)
        weights = None if weights is None else weights.astype(np.float32)
        return float(self.model.train_on_batch(values, targets, sample_weight=weights))

    def probabilities(self, inputs: Inputs, rows: np.ndarray) -> np.ndarray:
        """Compute class probabilities of the plain images of rows, float64, (n, c)."""
        return self.probabilities_of(features for _, features in inputs.batches(rows, PLAIN))

    def probabilities_of(self, batches: Iterable[Any]) -> np.ndarray:
        """Compute class probabilities of batches of cut features, float64, (n, c)."""
        parts = []
        for features in batches:
            count = len(features)
            missing = [(0, self.batch_size - count), *[(0, 0)] * (len(features.shape) - 1)]
            batch = load_keras().ops.pad(_float32(features), missing)  # one shape, so compiled only once
            parts.append(self.model.predict_on_batch(batch)[:count])  # reads the current variables
        return probabilities_of(np.concatenate(parts), self._temperature)

    @contextlib.contextmanager
    def training(self, seed: int, epoch: int) -> Iterator[None]:
        """Prepare the steps of one epoch: dropout is seeded by seed and epoch only; half precision if asked for.

        Measuring stays in float32: it was compiled separately before the first step, and a backend that does not
        compile reads the layers' precision at each call.
        """
        for number, generator in enumerate(self._generators):
            words = np.random.SeedSequence([seed, epoch, number]).generate_state(2) >> 1
            generator.assign(words.astype(generator.dtype).reshape(generator.shape))
        for layer in self._half:
            layer.dtype_policy = "mixed_bfloat16"
        try:
            yield
        finally:
            for layer in self._half:
                layer.dtype_policy = "float32"

    def snapshot(self) -> list[np.ndarray]:
        """Copy all variables that training changes."""
        return _values(self._variables)

    def restore(self, values: Sequence[np.ndarray]) -> None:
        """Restore a `snapshot`."""
        _assign(self._variables, values)

    def optimizer_snapshot(self) -> list[np.ndarray]:
        """Copy the optimizer's variables."""
        return _values(self.model.optimizer.variables)

    def restore_optimizer(self, values: Sequence[np.ndarray]) -> None:
        """Restore an `optimizer_snapshot`."""
        _assign(self.model.optimizer.variables, values)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of `train`: the columns of ``history.csv``, the validation scores before the first and after the best epoch,
    and the epoch after which an interrupted training was resumed (None if it was not)."""

    history: History
    before: dict[str, Any]
    after: dict[str, Any]
    resumed: int | None


def train(
    tail: Tail,
    inputs: Inputs,
    data: Data,
    settings: TuningSettings,
    *,
    classes: Sequence[str],
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train, and end with the weights of the best epoch: highest validation accuracy, then lowest log loss.

    The state before training counts as epoch 0, so the result is never worse on validation. If an earlier process was
    killed, training resumes after its last finished epoch.

    Raises
    ------
    RunError
        If there are no train or no validation images, or training diverges.
    """
    rows = inputs.readable(data.by_content(data.rows("train")))
    validation = inputs.readable(data.rows("validation"))
    if not len(rows) or not len(validation):
        raise RunError(
            f"fine-tuning needs train and validation images, received {len(rows)} and {len(validation)}. "
            "Extract with another --split."
        )
    weights = np.zeros(len(data.labels))
    weights[rows] = balanced_weights(data.labels[rows]) if settings.class_weight else 1.0

    def measure() -> dict[str, Any]:
        return evaluate(tail.probabilities(inputs, validation), data.labels[validation], classes)

    state = _first_state(tail, measure(), settings.initial_epoch)
    found = checkpoint.load(state) if checkpoint else None
    resumed = None if found is None else found.epoch
    if found is not None:
        state = found
        tail.restore(state.variables)
        tail.restore_optimizer(state.optimizer)
        logger.info("%s: training resumes after epoch %d", checkpoint.path if checkpoint else "", state.epoch)
    steps, last = -(-len(rows) // tail.batch_size), settings.initial_epoch + settings.epochs
    while state.epoch < last and not Patience(settings.patience, state.lowest, state.waited).over:
        epoch = state.epoch + 1
        # The order depends only on seed, epoch and the images' content, not on the order or kind of the source.
        order = np.random.default_rng([settings.seed, epoch]).permutation(rows)
        total, seen = 0.0, 0
        with tail.training(settings.seed, epoch):
            for number, (batch, features) in enumerate(inputs.batches(order, epoch)):
                loss = tail.step(
                    features,
                    data.labels[batch],
                    weights=weights[batch] if settings.class_weight else None,
                    rate=learning_rate(settings, (epoch - settings.initial_epoch - 1) * steps + number, steps),
                )
                total, seen = total + loss * len(batch), seen + len(batch)
                if progress:
                    progress(f"epoch {epoch}/{last}", seen, len(order))
        if not seen or not np.isfinite(total):
            why = f"training diverged; lower the learning rate (now {settings.learning_rate:g})"
            raise RunError(f"epoch {epoch}: {why if seen else 'no training image could be read'}")
        _close_epoch(state, tail, epoch, total / seen, measure())
        if checkpoint:
            checkpoint.save(state)
    tail.restore(state.kept)
    return Outcome(state.history, state.before, state.best, resumed)


def _first_state(tail: Tail, scores: dict[str, Any], epoch: int) -> State:
    # No step has been taken yet, so the validation loss also stands for the training loss of epoch 0.
    losses = [scores["log_loss"]]
    history: History = {
        "epoch": [epoch],
        "loss": losses,
        "val_loss": list(losses),
        "val_accuracy": [scores["accuracy"]],
    }
    variables = tail.snapshot()
    return State(epoch, history, scores, scores, 0, losses[0], variables, tail.optimizer_snapshot(), variables)


def _close_epoch(state: State, tail: Tail, epoch: int, loss: float, scores: dict[str, Any]) -> None:
    for name, value in zip(state.history, (epoch, loss, scores["log_loss"], scores["accuracy"]), strict=True):
        state.history[name].append(value)
    state.epoch, state.variables, state.optimizer = epoch, tail.snapshot(), tail.optimizer_snapshot()
    if (scores["accuracy"], -scores["log_loss"]) > (state.best["accuracy"], -state.best["log_loss"]):
        state.best, state.kept = scores, state.variables
    waiting = Patience(0, state.lowest, state.waited)
    waiting.lower(scores["log_loss"])
    state.lowest, state.waited = float(waiting.lowest), int(waiting.waited)


def _float32(features: Any) -> Any:
    ops = load_keras().ops
    return ops.cast(ops.convert_to_tensor(features), "float32")


def _values(variables: Sequence[Any]) -> list[np.ndarray]:
    convert = load_keras().ops.convert_to_numpy
    return [np.array(convert(variable)) for variable in variables]


def _assign(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
