"""The loop that trains the tail, the same for images, augmented images and cached features.

Inputs ─ batches(rows, epoch) ─▶ Tail.step ─▶ scores on validation ─▶ checkpoint ─▶ best epoch
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from features.errors import RunError
from features.networks.backend import load_keras
from features.networks.keras_engine import xla_of
from features.progress import Progress
from pipeline.config import History
from pipeline.heads.bank_math import BankSpec
from pipeline.heads.epochs import Patience
from pipeline.heads.keras_fit import keras_loss
from pipeline.tasks.table import CLASSIFICATION
from pipeline.tasks.task import Task
from pipeline.tuning.checkpoints import Checkpoint, State
from pipeline.tuning.endtoend import Split
from pipeline.tuning.inputs import PLAIN, Data, Inputs
from pipeline.tuning.settings import TuningSettings, learning_rate, make_optimizer

logger = logging.getLogger(__name__)
Scale = tuple[np.ndarray, np.ndarray] | None  # mean and deviation of each number


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
    task : Task
        Loss and activation of the outputs.
    """

    def __init__(self, split: Split, temperature: float, settings: TuningSettings, task: Task = CLASSIFICATION) -> None:
        self.model, self._temperature, self.batch_size = split.tail, temperature, settings.batch_size
        self._task, self._last = task, split.head.layers[-1]
        self._scale: Scale = None
        layers = split.layers_of_tail()
        self._half = layers if settings.mixed_precision else []
        loss = _loss(task, split.tail.output_shape[-1])
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
        labels : int32 (n,), or float32 (n, 2 c)
            What `pipeline.tasks.task.Task.network_targets` makes of the targets.
        weights : float, (n,), optional
            Weights of the rows in the loss.
        rate : float, optional
            Learning rate from this step on.
        """
        single = labels.ndim == 1 and self.model.output_shape[-1] == 1
        targets = labels[:, None].astype(np.float32) if single else labels
        if rate is not None:
            self.model.optimizer.learning_rate = rate
        self.model.reset_metrics()  # otherwise Keras returns the mean over all batches so far
        values = _float32(features)
        weights = None if weights is None else weights.astype(np.float32)
        return float(self.model.train_on_batch(values, targets, sample_weight=weights))

    def probabilities(self, inputs: Inputs, rows: np.ndarray) -> np.ndarray:
        """Compute predictions, such as class probabilities, of the plain images of rows, float64, (n, c)."""
        return self.probabilities_of(features for _, features in inputs.batches(rows, PLAIN))

    def probabilities_of(self, batches: Iterable[Any]) -> np.ndarray:
        """Compute predictions of batches of cut features, float64, (n, c)."""
        parts = []
        for features in batches:
            count = len(features)
            missing = [(0, self.batch_size - count), *[(0, 0)] * (len(features.shape) - 1)]
            batch = load_keras().ops.pad(_float32(features), missing)  # one shape, so compiled only once
            parts.append(self.model.predict_on_batch(batch)[:count])  # reads the current variables
        outputs = np.concatenate(parts).astype(np.float64)
        if self._scale is not None:
            outputs = outputs * self._scale[1] + self._scale[0]
        return self._task.activate(outputs, self._temperature)

    def standardise(self, scale: Scale, *, new: bool) -> None:
        """Let the last layer give standardised numbers, as those that it is trained on; predictions stay in their unit.

        Parameters
        ----------
        scale : pair of float64 (c,), optional
            Mean and deviation of the targets; without them nothing changes.
        new : bool
            Its weights are new, and have no unit yet.
        """
        self._scale = scale
        if scale is not None and not new:
            self._reweigh(1 / scale[1], -scale[0] / scale[1])

    def restore_unit(self) -> None:
        """Let the last layer give numbers in the unit of the targets again, as it is saved."""
        if self._scale is not None:
            self._reweigh(self._scale[1], self._scale[0])
        self._scale = None

    def _reweigh(self, factor: np.ndarray, offset: np.ndarray) -> None:
        kernel, bias = (np.asarray(part, np.float64) for part in self._last.get_weights())
        self._last.set_weights([kernel * factor, bias * factor + offset])

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


class Measured(NamedTuple):
    """Validation scores after an epoch, the validation loss, and the usual score."""

    scores: dict[str, Any]
    loss: float
    value: float


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
    task: Task = CLASSIFICATION,
    classes: Sequence[str],
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train, and end with the weights of the best epoch: highest usual score on validation, then lowest loss.

    Numbers are standardised while they are trained on. The state before training counts as epoch 0, so the result is never worse on validation. If an earlier process was
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
    y, known = data.labels[rows], data.labels[validation]
    scale, balanced = _scale_of(task, y), settings.class_weight is not None
    made, weighed = task.network_targets(y, scale, balanced=balanced), task.row_weights(y) if balanced else None
    place = np.zeros(len(data.labels), np.int64)
    place[rows] = np.arange(len(rows))
    tail.standardise(scale, new=settings.scratch or settings.new_head)

    def measure() -> Measured:
        predicted = tail.probabilities(inputs, validation)
        scores = task.evaluate(predicted, known, classes)
        return Measured(scores, task.network_loss(predicted, known, y), task.value(scores, task.choices[0]))

    first = measure()
    if not np.isfinite(first.value):
        raise RunError(
            f"the validation images have no {task.score}, by which the best epoch is chosen, as their {task.things} are all "
            "equal. Extract with another --split"
        )
    state = _first_state(tail, first, settings.initial_epoch, f"val_{task.choices[0]}")
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
                    made[place[batch]],
                    weights=None if weighed is None else weighed[place[batch]],
                    rate=learning_rate(settings, (epoch - settings.initial_epoch - 1) * steps + number, steps),
                )
                total, seen = total + loss * len(batch), seen + len(batch)
                if progress:
                    progress(f"epoch {epoch}/{last}", seen, len(order))
        if not seen or not np.isfinite(total):
            why = f"training diverged; lower the learning rate (now {settings.learning_rate:g})"
            raise RunError(f"epoch {epoch}: {why if seen else 'no training image could be read'}")
        _close_epoch(state, tail, epoch, total / seen, measure(), task)
        if checkpoint:
            checkpoint.save(state)
    tail.restore(state.kept)
    tail.restore_unit()
    return Outcome(state.history, state.before, state.best, resumed)


def _loss(task: Task, outputs: int) -> Any:
    classes = 2 if outputs == task.outputs(2) else outputs
    return keras_loss(BankSpec(classes=classes, loss=task.loss_name), sparse=True)


def _scale_of(task: Task, y: np.ndarray) -> Scale:
    scale = task.scale(y)
    return None if scale is None else (scale[0], np.where(scale[1] > 0, scale[1], 1.0))


def _first_state(tail: Tail, measured: Measured, epoch: int, name: str) -> State:
    # No step has been taken yet, so the validation loss also stands for the training loss of epoch 0.
    loss, scores = measured.loss, measured.scores
    history: History = {"epoch": [epoch], "loss": [loss], "val_loss": [loss], name: [measured.value]}
    variables = tail.snapshot()
    return State(epoch, history, scores, scores, 0, loss, variables, tail.optimizer_snapshot(), variables)


def _close_epoch(state: State, tail: Tail, epoch: int, loss: float, measured: Measured, task: Task) -> None:
    for name, value in zip(state.history, (epoch, loss, measured.loss, measured.value), strict=True):
        state.history[name].append(value)
    state.epoch, state.variables, state.optimizer = epoch, tail.snapshot(), tail.optimizer_snapshot()
    if task.better(measured.scores, state.best):
        state.best, state.kept = measured.scores, state.variables
    waiting = Patience(0, state.lowest, state.waited)
    waiting.lower(measured.loss)
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
