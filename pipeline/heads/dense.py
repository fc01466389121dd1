"""Heads of dense layers: trained by the bank where possible, otherwise by Keras."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from features.errors import ConfigurationError, HeadError, WeightsError
from features.networks.backbones import pooling_layer
from features.networks.backend import load_keras
from features.networks.tensors import assign_from_file
from features.progress import Progress
from pipeline.config import HeadFile, History, Settings, TargetHeadFile, parse
from pipeline.heads.bank import BankHead, BankResult, train_rows
from pipeline.heads.bank_math import BankSpec
from pipeline.heads.head import Head, check_finite
from pipeline.heads.keras_fit import dropout_rates, fit_dense
from pipeline.heads.prepared import Prepared
from pipeline.presets import DENSE, DenseParameters, Preset
from pipeline.scores.metrics import class_weights, fit_temperature, two_columns

BANK_STEP, KERAS_STEP, FLOP = 2e-4, 3e-3, 5e-11  # seconds on one core, measured on features of 1,280 columns
Scale = tuple[np.ndarray, np.ndarray] | None  # mean and deviation of the targets of a network
INNER_FOLDS = 10  # one of them decides when training stops, with ``stop_on=train``


class KerasHead(Head):
    """A head of dense layers on pooled, standardised features. Two classes have a single logit."""

    parameters: DenseParameters
    files = ("head.json", "head.weights.h5")
    file_models = (HeadFile, TargetHeadFile)
    parallel = False  # Keras is loaded in one process only, and the bank trains many heads together

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._weights: list[np.ndarray] = []
        self._built: Any = None

    def warm_up(self) -> None:
        load_keras()

    @property
    def weights(self) -> list[np.ndarray]:
        """Present kernel and bias of each layer, float32; fine-tuning changes them through `network`."""
        return self._weights if self._built is None else self._built.get_weights()

    @weights.setter
    def weights(self, values: Sequence[np.ndarray]) -> None:
        self._weights, self._built = [np.asarray(value, np.float32) for value in values], None

    @property
    def parameter_count(self) -> int | None:
        return sum(int(part.size) for part in self.weights)

    @classmethod
    def parse_parameters(cls, name: str, preset: Preset, params: Mapping[str, Any], classes: int) -> Settings:
        parameters = super().parse_parameters(name, preset, params, classes)
        assert isinstance(parameters, DenseParameters)
        dropout_rates(parameters)
        return parameters

    @classmethod
    def restored(cls, path: Path, stored: HeadFile) -> tuple[str, Settings]:
        values = {"hidden": stored.hidden, "activation": stored.activation, "dropout": stored.dropout}
        parameters = parse(DenseParameters, values, str(path), error=HeadError)
        try:
            dropout_rates(parameters)
        except ConfigurationError as problem:
            raise HeadError(f"{path}: {problem}") from problem
        return DENSE, parameters

    @classmethod
    def has_dense_form(cls, kind: str) -> bool:
        return True

    @property
    def bank_spec(self) -> BankSpec | None:
        """Settings shared with the heads that it can be trained with; None if the bank cannot train this head."""
        settings = self.parameters
        other = settings.batch_norm or settings.l2 or settings.mixup or settings.schedule != "constant"
        if settings.optimizer != "adam" or len(settings.hidden) > 1 or other:
            return None
        return BankSpec(
            classes=len(self.classes),
            hidden=(*settings.hidden, 0)[0],
            activation=settings.activation,
            epochs=settings.epochs,
            patience=settings.patience,
            batch_size=settings.batch_size,
            order_seed=settings.order_seed,
            loss=self.task.loss_name,
        )

    @property
    def bank_head(self) -> BankHead:
        """Settings that belong to this head alone."""
        settings = self.parameters
        return BankHead(
            settings.learning_rate,
            settings.weight_decay,
            settings.dropout,
            self.seed,
            settings.label_smoothing,
            settings.feature_noise,
            settings.views == "draw",
        )

    @property
    def companions(self) -> Hashable | None:
        settings = self.parameters
        return None if self.bank_spec is None else (self.bank_spec, settings.class_weight, settings.stop_on)

    @classmethod
    def train_together(cls, heads: Sequence[Self], data: Prepared) -> list[History | HeadError]:
        for head in heads:
            head.adopt(data)
        stopping = heads[0].stopping(data)
        data, scale = heads[0].encoded(stopping)
        spec = heads[0].bank_spec
        assert spec is not None
        results = train_rows(
            spec.weighted(heads[0].class_weights(stopping.y)),
            [head.bank_head for head in heads],
            data.train,
            data.held_out,
            memory_bytes=data.memory,
        )
        histories: list[History | HeadError] = []
        for head, result in zip(heads, results, strict=True):
            try:
                histories.append(head.take(result, stopping, scale))
            except HeadError as problem:
                histories.append(problem)
        return histories

    @property
    def streams(self) -> bool:
        return True

    def fit_seconds(self, rows: int, columns: int, views: int = 1) -> float:
        settings = self.parameters
        sizes = (columns, *self._widths())
        weights = sum(a * b for a, b in itertools.pairwise(sizes))
        steps = -(-rows // settings.batch_size) * settings.epochs
        # A step of the bank is short, and its heads share it; a step of Keras is a call of a compiled function.
        return steps * (BANK_STEP if self.companions else KERAS_STEP) + FLOP * 6 * weights * rows * settings.epochs

    def cheaper(self, columns: int) -> list[dict[str, Any]]:
        settings = self.parameters
        fewer: list[dict[str, Any]] = [{"epochs": 10}] if settings.epochs > 10 else []
        return [*fewer, {"batch_size": 256}] if settings.batch_size < 256 else fewer

    def views_used(self, stored: int) -> int:
        return stored if self.parameters.views == "draw" else 1

    def class_weights(self, y: np.ndarray) -> tuple[float, ...] | None:
        """Weight of each class: n / (c x rows of the class), like scikit-learn's "balanced"; None for equal weights."""
        if self.parameters.class_weight is None or y.ndim > 1:  # of several labels, each cell has its weight
            return None
        return tuple(class_weights(y, len(self.classes)).tolist())

    def stopping(self, data: Prepared) -> Prepared:
        """Replace the validation rows by some training rows, if these shall decide when training stops.

        Raises
        ------
        HeadError
            If no training row can be held back.
        """
        if self.parameters.stop_on == "validation":
            return data
        folds = self.task.folds(data.y, INNER_FOLDS, self.parameters.order_seed, data.groups)
        if folds.max() < 0:
            raise HeadError("stop_on=train: no class has two training rows (or groups); leave stop_on out")
        held_out = data.train.take(np.flatnonzero(folds == 0))
        return dataclasses.replace(data.part(np.flatnonzero(folds != 0)), held_out=held_out)

    def encoded(self, data: Prepared) -> tuple[Prepared, Scale]:
        """Rows with what a network is trained on instead of their targets, and the scale of these."""
        scale, balanced = self.task.scale(data.y), self.parameters.class_weight is not None
        train: Any = data.train
        held_out: Any = data.held_out
        train = dataclasses.replace(train, labels=self.task.network_targets(data.y, scale, balanced=balanced))
        if held_out is not None:
            held_out = dataclasses.replace(held_out, labels=self.task.network_targets(held_out.labels, scale))
        return dataclasses.replace(data, train=train, held_out=held_out, folder=None), scale

    def _train(self, data: Prepared, progress: Progress) -> History:
        data, spec = self.stopping(data), self.bank_spec
        rows, scale = self.encoded(data)
        if spec is None:
            weights, history = fit_dense(
                self.parameters,
                rows,
                classes=len(self.classes),
                seed=self.seed,
                class_weights=self.class_weights(data.y),
                loss=self.task.loss_name,
                progress=progress,
            )
            return self._finish(weights, history, data, scale)
        spec = spec.weighted(self.class_weights(data.y))
        (result,) = train_rows(
            spec, [self.bank_head], rows.train, rows.held_out, memory_bytes=data.memory, progress=progress
        )
        return self.take(result, data, scale)

    def take(self, result: BankResult, data: Prepared, scale: Scale = None) -> History:
        """Take over the weights and the history that the bank has trained.

        Raises
        ------
        HeadError
            If training diverged.
        """
        return self._finish(result.weights, result.history, data, scale)

    def _finish(self, weights: Sequence[np.ndarray], history: History, data: Prepared, scale: Scale = None) -> History:
        finite = np.isfinite(history["loss"])
        if not finite.all():
            raise HeadError(
                f"training diverged in epoch {int(np.argmin(finite)) + 1}: "
                f"lower learning_rate (now {self.parameters.learning_rate:g})"
            )
        weights = list(weights)
        if scale is not None:  # back to the unit of the targets
            mean, deviation = scale
            weights[-2:] = weights[-2] * deviation, weights[-1] * deviation + mean
        self.weights = weights
        if self.parameters.calibrate and data.held_out is not None:
            logits = np.concatenate([self._logits(Z) for _, Z in data.held_out.pieces()])
            self.temperature, _ = fit_temperature(two_columns(logits), data.held_out.labels)
        return history

    def _logits(self, Z: np.ndarray) -> np.ndarray:
        keras = load_keras()

        values = keras.ops.convert_to_tensor(np.asarray(Z, np.float32))
        parts = self.weights
        for number in range(0, len(parts), 2):
            values = keras.ops.add(keras.ops.matmul(values, parts[number]), parts[number + 1])
            if number + 2 < len(parts):
                values = getattr(keras.activations, self.parameters.activation)(values)
        return np.asarray(keras.ops.convert_to_numpy(values), np.float64)

    def _probabilities(self, Z: np.ndarray) -> np.ndarray:
        return self.task.activate(self._logits(Z), self.temperature)

    def as_dense(self) -> KerasHead:
        return self

    def _network(self) -> Any:
        if self._built is None:
            network = build_network(self)
            if self._weights:
                network.set_weights(self._weights)
            self._built = network
        return self._built

    def _save_weights(self, folder: Path) -> Mapping[str, Any]:
        network = self._built
        if network is None:
            # Building one network for each of hundreds of heads would take longer than training them.
            layers = dropout_rates(self.parameters)
            network = _template(self.input_shape, self.pool or "none", self._widths(), tuple(map(bool, layers)))
            network.set_weights(self._weights)
        network.save_weights(folder / "head.weights.h5")
        return {}

    def _widths(self) -> tuple[int, ...]:
        return (*self.parameters.hidden, self._outputs)

    def _load_weights(self, folder: Path, stored: HeadFile, *, trust: bool) -> None:
        path = folder / "head.weights.h5"
        widths = (len(self.mean), *self._widths())
        shapes = [shape for pair in itertools.pairwise(widths) for shape in (pair, pair[1:])]
        expected = f"{path}: the weights do not fit head.json, which expects {shapes[:20]}"
        size = path.stat().st_size if path.is_file() else 0
        if 4 * sum(map(math.prod, shapes)) > size:
            raise HeadError(f"{expected}: {len(widths) - 1} layers in a file of {size} bytes")
        network = build_network(self)
        try:
            assign_from_file(network, path)
        except WeightsError as problem:
            raise HeadError(f"{expected}: {problem}") from problem
        check_finite(path, network.get_weights())
        self._built = network

    def _description(self) -> dict[str, Any]:
        settings = self.parameters
        more = {"hidden": settings.hidden, "activation": settings.activation, "dropout": settings.dropout}
        return {**super()._description(), **more}


@functools.cache
def standardize_layer() -> Any:
    """The Keras layer class ``(x - mean) / std``, without weights. It is made on first use: Keras imports slowly."""
    keras = load_keras()
    base: Any = keras.layers.Layer

    @keras.saving.register_keras_serializable(package="bottleneck")
    class Standardize(base):
        """Computes ``(x - mean) / std`` along the last axis."""

        def __init__(self, mean: Sequence[float], std: Sequence[float], **keywords: Any) -> None:
            super().__init__(**keywords)
            self.mean = np.asarray(mean, dtype=np.float32)
            self.std = np.asarray(std, dtype=np.float32)

        def call(self, inputs: Any) -> Any:
            mean, std = (keras.ops.convert_to_tensor(value, dtype=inputs.dtype) for value in (self.mean, self.std))
            return (inputs - mean) / std

        def compute_output_shape(self, input_shape: Any) -> Any:
            return input_shape

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "mean": self.mean.tolist(), "std": self.std.tolist()}

    return Standardize


def build_network(head: KerasHead) -> Any:
    """Build the network of a head, from a stored row to logits, with new weights."""
    settings = head.parameters
    standardize = standardize_layer()(head.mean, head.std, name="standardize")
    pool = head.pool or "none"
    return _chain(
        head.input_shape, pool, standardize, head._widths(), dropout_rates(settings), activation=settings.activation
    )


@functools.lru_cache(maxsize=8)
def _template(input_shape: tuple[int, ...], pool: str, widths: tuple[int, ...], drops: tuple[bool, ...]) -> Any:
    """A reusable network that saves the weights of any head of this shape under the same names as `build_network`."""
    identity = load_keras().layers.Identity(name="standardize")
    return _chain(input_shape, pool, identity, widths, [0.5 * drop for drop in drops], activation="relu")


def _chain(
    input_shape: tuple[int, ...],
    pool: str,
    standardize: Any,
    widths: Sequence[int],
    rates: Sequence[float],
    *,
    activation: str,
) -> Any:
    keras = load_keras()

    layers = keras.layers
    pooling = [] if pool == "none" else [pooling_layer(pool, len(input_shape), name="pool")]
    dense = [
        layers.Dense(units, activation=activation, name=f"hidden_{number}")
        for number, units in enumerate(widths[:-1], 1)
    ]
    dense.append(layers.Dense(widths[-1], name="logits"))
    chain = [*pooling, standardize]
    for number, (rate, layer) in enumerate(zip(rates, dense, strict=True), 1):
        chain += [layers.Dropout(rate, name=f"dropout_{number}"), layer] if rate else [layer]
    features = keras.Input(input_shape, name="features")
    return keras.Model(features, functools.reduce(lambda value, layer: layer(value), chain, features), name="head")
