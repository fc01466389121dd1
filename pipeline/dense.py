"""Heads of dense layers, trained with Keras."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.backend import load_keras
from features.errors import ConfigurationError, HeadError
from pipeline.config import DenseParameters
from pipeline.head import Head, History, Progress, check_finite, two_columns
from pipeline.metrics import softmax

DENSE = "dense"  # the kind, in head.json


class KerasHead(Head):
    """Dense layers on pooled, standardised features, trained with Keras. Two classes have one logit."""

    parameters: DenseParameters
    files = ("head.json", "head.weights.h5")

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._built: tuple[Any, Any] | None = None

    def warm_up(self) -> None:
        load_keras()

    @property
    def parameter_count(self) -> int | None:
        return int(self._network().count_params())

    def _train(
        self, Z: np.ndarray, y: np.ndarray, held_out: tuple[np.ndarray, np.ndarray] | None, progress: Progress
    ) -> History:
        keras = load_keras()

        settings = self.parameters
        keras.utils.set_random_seed(self.seed)
        self._built = build_network(self, settings)
        body = self._built[1]
        binary = self._outputs == 1
        body.compile(
            optimizer=_optimizer(settings),
            loss=keras.losses.BinaryCrossentropy(from_logits=True)
            if binary
            else keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy") if binary else "accuracy"],
        )
        report = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: progress("train-head", epoch + 1, settings.epochs)
        )
        callbacks, validation = [report], None
        if held_out is not None:
            validation = held_out[0], self._targets(held_out[1])
            patience = settings.patience or settings.epochs
            callbacks.append(
                keras.callbacks.EarlyStopping(monitor="val_loss", patience=patience, restore_best_weights=True)
            )
        # fit shuffles all rows anew each epoch: rows sorted by class are no trouble.
        log = body.fit(
            Z,
            self._targets(y),
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            shuffle=True,
            validation_data=validation,
            validation_batch_size=1024,
            callbacks=callbacks,
            verbose=0,
        ).history
        if not np.isfinite(log["loss"]).all():
            raise HeadError(
                f"training diverged in epoch {int(np.argmin(np.isfinite(log['loss']))) + 1}: "
                f"lower learning_rate (now {settings.learning_rate:g})"
            )
        columns = {
            name: [float(value) for value in log[name]] for name in ("loss", "val_loss", "val_accuracy") if name in log
        }
        return {"epoch": [float(epoch + 1) for epoch in range(len(log["loss"]))], **columns}

    def _targets(self, y: np.ndarray) -> np.ndarray:
        return y.astype(np.float32)[:, None] if self._outputs == 1 else y

    def _probabilities(self, Z: np.ndarray) -> np.ndarray:
        keras = load_keras()

        _, body = self._parts()
        logits = keras.ops.convert_to_numpy(body(Z, training=False)).astype(np.float64)
        return softmax(two_columns(logits) / self.temperature)

    def _network(self) -> Any:
        return self._parts()[0]

    def _parts(self) -> tuple[Any, Any]:
        if self._built is None:
            self._built = build_network(self, self.parameters)
        return self._built

    def _save_weights(self, folder: Path) -> None:
        self._network().save_weights(folder / "head.weights.h5")

    def _load_weights(self, folder: Path) -> None:
        path = folder / "head.weights.h5"
        network = self._network()
        try:
            network.load_weights(path)
        except (OSError, ValueError, KeyError) as problem:
            shapes = [tuple(variable.shape) for variable in network.trainable_variables]
            raise HeadError(
                f"{path}: the weights do not fit head.json, which asks for {shapes}: {problem}"
            ) from problem
        check_finite(path, network.get_weights())

    def _description(self) -> dict[str, Any]:
        settings = self.parameters
        more = {"hidden": settings.hidden, "activation": settings.activation, "dropout": settings.dropout}
        return {**super()._description(), **more}


@functools.cache
def standardize_layer() -> Any:
    """The Keras layer class ``(x - mean) / std``: constants, no weights. Made late, as Keras is slow to import."""
    keras = load_keras()
    base: Any = keras.layers.Layer

    @keras.saving.register_keras_serializable(package="bottleneck")
    class Standardize(base):
        """``(x - mean) / std`` over the last axis."""

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


def build_network(head: Head, settings: DenseParameters) -> tuple[Any, Any]:
    """The whole network of a head, and the part after pooling and standardisation; they share their layers."""
    keras = load_keras()

    layers = keras.layers
    pooling = {
        "none": [],
        "avg": [layers.GlobalAveragePooling2D(data_format="channels_last", name="pool")],
        "max": [layers.GlobalMaxPooling2D(data_format="channels_last", name="pool")],
        "flatten": [layers.Flatten(data_format="channels_last", name="pool")],
    }[head.pool or "none"]
    dense = [
        layers.Dense(units, activation=settings.activation, name=f"hidden_{number}")
        for number, units in enumerate(settings.hidden, 1)
    ]
    # Zeros: a head starts at even chances, and a linear one needs no luck.
    dense.append(layers.Dense(head._outputs, kernel_initializer="zeros", name="logits"))
    chain = []
    for number, (rate, layer) in enumerate(zip(_dropout_rates(settings), dense, strict=True), 1):
        chain += [layers.Dropout(rate, name=f"dropout_{number}"), layer] if rate else [layer]
    features = keras.Input(head.input_shape, name="features")
    vector = keras.Input((len(head.mean),), name="standardized")
    standardize = standardize_layer()(head.mean, head.std, name="standardize")
    network = keras.Model(features, _apply([*pooling, standardize, *chain], features), name="head")
    return network, keras.Model(vector, _apply(chain, vector), name="head_body")


def _apply(layers: Sequence[Any], tensor: Any) -> Any:
    return functools.reduce(lambda value, layer: layer(value), layers, tensor)


def _dropout_rates(settings: DenseParameters) -> list[float]:
    """Rate in front of each dense layer."""
    layers = len(settings.hidden) + 1
    if isinstance(settings.dropout, tuple):
        if len(settings.dropout) != layers:
            raise ConfigurationError(
                f"dropout: received {len(settings.dropout)} rates, expected {layers}, one in front of each dense layer"
            )
        return list(settings.dropout)
    return [0.0] + [settings.dropout] * (layers - 1) if layers > 1 else [settings.dropout]


def _optimizer(settings: DenseParameters) -> Any:
    keras = load_keras()

    common = {"learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay or None}
    if settings.optimizer == "sgd":
        return keras.optimizers.SGD(momentum=settings.momentum, nesterov=settings.nesterov, **common)
    if settings.optimizer == "rmsprop":
        return keras.optimizers.RMSprop(momentum=settings.momentum, **common)
    return keras.optimizers.Adam(**common)
