"""Training of dense heads by Keras's ``fit``, for what the bank does not do: deep heads, SGD, BatchNorm, mixup."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from features.backend import load_keras
from features.errors import ConfigurationError
from pipeline.bank import row_order
from pipeline.config import DenseParameters
from pipeline.head import History, Progress
from pipeline.prepared import Prepared


def fit_dense(
    settings: DenseParameters,
    data: Prepared,
    *,
    classes: int,
    seed: int,
    class_weights: Sequence[float] | None,
    progress: Progress,
) -> tuple[list[np.ndarray], History]:
    """Train dense layers.

    Parameters
    ----------
    settings : DenseParameters
        What and how.
    data : Prepared
        Rows; a read-only memory map will do, a batch is read at a time.
    classes : int
        Two classes have one logit.
    seed : int
        Of initial values, dropout, noise and mixup.
    class_weights : sequence of float, optional
        Weight of a row in the loss by its class.
    progress : callable
        Called with ("train-head", epochs done, epochs).

    Returns
    -------
    weights : list of float32 arrays
        Kernel and bias of each dense layer, BatchNorm folded in.
    history : dict of str to list of float
        ``epoch loss``, with validation rows ``val_loss val_accuracy``.
    """
    keras = load_keras()
    keras.utils.set_random_seed(seed)
    outputs = 1 if classes == 2 else classes
    body, folded = _training_body(settings, data.Z.shape[1], outputs)
    steps = -(-len(data.Z) // settings.batch_size)
    crossed, right = _measures(outputs)
    body.compile(optimizer=_optimizer(settings, steps), loss=_loss(outputs), metrics=[crossed, right])
    callbacks = [
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: progress("train-head", epoch + 1, settings.epochs)
        )
    ]
    validation = None
    if data.held_out is not None:
        rows, labels = data.held_out
        validation = _batches()(rows, _targets(labels, outputs, classes), np.ones(len(labels)), 1024)
        callbacks.append(
            keras.callbacks.EarlyStopping(
                monitor="val_log_loss",  # not val_loss, which has the penalty of l2 in it
                mode="min",
                patience=settings.patience or settings.epochs,
                restore_best_weights=True,
            )
        )
    targets = _targets(data.y, outputs, classes)
    targets = targets * (1 - settings.label_smoothing) + settings.label_smoothing / classes
    weights = np.ones(len(data.y)) if class_weights is None else np.asarray(class_weights)[data.y]
    batches = _batches()(
        data.Z,
        targets,
        weights,
        settings.batch_size,
        order_seed=settings.order_seed,
        mixup=settings.mixup,
        seed=seed,
    )
    log = body.fit(
        batches, epochs=settings.epochs, shuffle=False, validation_data=validation, callbacks=callbacks, verbose=0
    ).history
    names = {"loss": "loss", "val_log_loss": "val_loss", "val_accuracy": "val_accuracy"}
    history = {to: [float(value) for value in log[name]] for name, to in names.items() if name in log}
    return folded(), {"epoch": [float(epoch + 1) for epoch in range(len(log["loss"]))], **history}


def dropout_rates(settings: DenseParameters) -> list[float]:
    """Rate in front of each dense layer.

    Raises
    ------
    ConfigurationError
        For another number of rates than of dense layers.
    """
    layers = len(settings.hidden) + 1
    if isinstance(settings.dropout, tuple):
        if len(settings.dropout) != layers:
            raise ConfigurationError(
                f"dropout: received {len(settings.dropout)} rates, expected {layers}, one in front of each dense layer"
            )
        return list(settings.dropout)
    return [0.0] + [settings.dropout] * (layers - 1) if layers > 1 else [settings.dropout]


def _training_body(settings: DenseParameters, width: int, outputs: int) -> tuple[Any, Any]:
    """The network as it is trained, and a function that gives its weights as plain dense layers."""
    keras = load_keras()
    layers = keras.layers
    penalty = keras.regularizers.L2(settings.l2) if settings.l2 else None
    tensor = start = keras.Input((width,))
    if settings.feature_noise:
        tensor = layers.GaussianNoise(settings.feature_noise)(tensor)
    pairs = []
    for rate, units in zip(dropout_rates(settings), (*settings.hidden, None), strict=True):
        if rate:
            tensor = layers.Dropout(rate)(tensor)
        if units is None:
            # Zeros: a head starts at even chances, and a linear one needs no luck.
            dense = layers.Dense(outputs, kernel_initializer="zeros", kernel_regularizer=penalty)
            tensor = dense(tensor)
            pairs.append((dense, None))
            continue
        dense = layers.Dense(units, kernel_regularizer=penalty)
        norm = layers.BatchNormalization() if settings.batch_norm else None
        tensor = dense(tensor)
        tensor = layers.Activation(settings.activation)(tensor if norm is None else norm(tensor))
        pairs.append((dense, norm))

    def folded() -> list[np.ndarray]:
        found = []
        for dense, norm in pairs:
            kernel, bias = dense.get_weights()
            if norm is not None:
                gamma, beta, mean, variance = norm.get_weights()
                factor = gamma / np.sqrt(variance + norm.epsilon)
                kernel, bias = kernel * factor, (bias - mean) * factor + beta
            found += [kernel.astype(np.float32), bias.astype(np.float32)]
        return found

    return keras.Model(start, tensor), folded


def _targets(y: np.ndarray, outputs: int, classes: int) -> np.ndarray:
    return y.astype(np.float32)[:, None] if outputs == 1 else np.eye(classes, dtype=np.float32)[y]


def _loss(outputs: int) -> Any:
    losses = load_keras().losses
    kind = losses.BinaryCrossentropy if outputs == 1 else losses.CategoricalCrossentropy
    return kind(from_logits=True)


def _measures(outputs: int) -> tuple[Any, Any]:
    metrics = load_keras().metrics
    if outputs == 1:
        return (
            metrics.BinaryCrossentropy(from_logits=True, name="log_loss"),
            metrics.BinaryAccuracy(threshold=0.0, name="accuracy"),
        )
    return (
        metrics.CategoricalCrossentropy(from_logits=True, name="log_loss"),
        metrics.CategoricalAccuracy(name="accuracy"),
    )


def _optimizer(settings: DenseParameters, steps: int) -> Any:
    optimizers = load_keras().optimizers
    rate: Any = settings.learning_rate
    if settings.schedule == "cosine":
        rate = optimizers.schedules.CosineDecay(rate, decay_steps=settings.epochs * steps)
    common = {"learning_rate": rate, "weight_decay": settings.weight_decay or None}
    if settings.optimizer == "sgd":
        return optimizers.SGD(momentum=settings.momentum, nesterov=settings.nesterov, **common)
    if settings.optimizer == "rmsprop":
        return optimizers.RMSprop(momentum=settings.momentum, **common)
    return optimizers.Adam(**common)


@functools.cache
def _batches() -> Any:
    """The class of what ``fit`` reads batches from. Made late, as Keras is slow to import."""
    base: Any = load_keras().utils.PyDataset

    class Batches(base):
        """Rows in batches; in the order of `pipeline.bank.row_order` with ``order_seed``, else as they stand."""

        def __init__(
            self,
            Z: np.ndarray,
            targets: np.ndarray,
            weights: np.ndarray,
            size: int,
            *,
            order_seed: int | None = None,
            mixup: float = 0.0,
            seed: int = 0,
        ) -> None:
            super().__init__()
            self._Z, self._targets, self._weights, self._size = Z, targets, weights.astype(np.float32), size
            self._order_seed, self._mixup, self._seed, self._epoch = order_seed, mixup, seed, 0
            self._sort()

        def __len__(self) -> int:
            return -(-len(self._Z) // self._size)

        def on_epoch_end(self) -> None:
            self._epoch += 1
            self._sort()

        def _sort(self) -> None:
            count = len(self._Z)
            self._order = (
                np.arange(count) if self._order_seed is None else row_order(self._order_seed, self._epoch, count)
            )

        def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            rows = self._order[number * self._size : (number + 1) * self._size]
            batch = self._Z[rows], self._targets[rows], self._weights[rows]
            if not self._mixup:
                return batch
            key = np.array([self._seed, self._epoch * len(self) + number], np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            share = np.float32(generator.beta(self._mixup, self._mixup))
            other = generator.permutation(len(rows))
            x, target, weight = (share * part + (1 - share) * part[other] for part in batch)
            return x, target, weight

    return Batches
