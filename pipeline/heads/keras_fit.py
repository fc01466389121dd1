"""Train dense heads with Keras where the bank cannot: several hidden layers, SGD, BatchNorm, mixup.

rows --shuffled each epoch, one view of each--> batches --mixup--> train_on_batch --> plain dense layers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from features.errors import ConfigurationError, HeadError
from features.networks.backend import load_keras
from features.progress import Progress
from pipeline.config import History
from pipeline.heads.bank_math import LOSSES, BankSpec
from pipeline.heads.epochs import train_epochs
from pipeline.heads.prepared import Prepared
from pipeline.presets import DenseParameters
from pipeline.scores.metrics import log_loss, softmax, two_columns


def fit_dense(
    settings: DenseParameters,
    data: Prepared,
    *,
    classes: int,
    seed: int,
    class_weights: Sequence[float] | None,
    loss: str = "softmax",
    progress: Progress,
) -> tuple[list[np.ndarray], History]:
    """Train dense layers.

    Parameters
    ----------
    settings : DenseParameters
        Layers and training settings.
    data : Prepared
        Training and validation rows, read one batch at a time.
    classes : int
        Number of classes; two classes have a single logit.
    seed : int
        Random seed of initial weights, dropout, noise and mixup.
    class_weights : sequence of float, optional
        Weight of each class in the loss.
    loss : str
        As in `pipeline.heads.bank_math.BankSpec`, and so are the labels of the rows.
    progress : callable
        Called with ("train-head", epochs done, epochs).

    Returns
    -------
    weights : list of float32 arrays
        Kernel and bias of each dense layer, with BatchNorm folded in.
    history : dict of str to list of float
        ``epoch loss`` and, with validation rows, ``val_loss val_accuracy`` (of numbers ``val_r2``).

    Raises
    ------
    HeadError
        If training diverges.
    """
    keras = load_keras()
    keras.utils.set_random_seed(seed)
    spec = BankSpec(classes=classes, loss=loss)
    outputs, of_rows = spec.outputs, LOSSES[loss]
    train, held_out = data.train, data.held_out
    body, folded = _training_body(settings, train.width, outputs)
    steps = -(-len(train) // settings.batch_size)
    body.compile(optimizer=_optimizer(settings, steps), loss=keras_loss(spec))
    targets = np.arange(2, dtype=np.float32)[:, None] if outputs == 1 else np.eye(classes, dtype=np.float32)
    targets = targets * (1 - settings.label_smoothing) + settings.label_smoothing / classes
    weights = np.ones(classes, np.float32) if class_weights is None else np.asarray(class_weights, np.float32)

    def encoded(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (targets[y], weights[y]) if y.ndim == 1 else (y, np.ones(len(y), np.float32))

    def pass_over(epoch: int) -> dict[str, float]:
        total = 0.0
        batches = train.epoch(
            epoch - 1, size=settings.batch_size, seed=settings.order_seed, draws=(settings.views == "draw",)
        )
        for number, (X, y) in enumerate(batches):
            batch: tuple[np.ndarray, ...] = X[:, 0], *encoded(y)
            if settings.mixup:
                batch = _mixed(batch, settings.mixup, seed, (epoch - 1) * steps + number)
            body.reset_metrics()  # otherwise Keras returns the mean over all batches so far
            total += len(y) * float(body.train_on_batch(*batch, return_dict=True)["loss"])
        if not np.isfinite(total):
            raise HeadError(f"training diverged in epoch {epoch}: lower learning_rate (now {settings.learning_rate:g})")
        return {"loss": total / len(train)}

    def measure() -> tuple[float, float]:
        assert held_out is not None
        parts = [keras.ops.convert_to_numpy(body(Z, training=False)) for _, Z in held_out.pieces()]
        if held_out.labels.ndim > 1:
            made, theirs = map(keras.ops.convert_to_tensor, (np.concatenate(parts), held_out.labels))
            means = of_rows.values(spec, made, theirs, 0.0)[0], of_rows.measure(spec, made, theirs)
            lost, right = (float(keras.ops.convert_to_numpy(one).mean()) for one in means)
            return lost, right
        logits = two_columns(np.concatenate(parts).astype(np.float64))
        right = float(np.mean(logits.argmax(axis=1) == held_out.labels))
        return log_loss(softmax(logits), held_out.labels), right  # without the l2 penalty

    history, best = train_epochs(
        pass_over,
        measure if held_out is not None else None,
        body.get_weights,
        epochs=settings.epochs,
        patience=settings.patience,
        progress=progress,
        measured=of_rows.name,
    )
    body.set_weights(best)
    return folded(), history


def _mixed(batch: tuple[np.ndarray, ...], mixup: float, seed: int, step: int) -> tuple[np.ndarray, ...]:
    """Mix the rows, targets and weights of a batch in pairs, all with the same share."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
    share = np.float32(generator.beta(mixup, mixup))
    other = generator.permutation(len(batch[0]))
    return tuple(share * part + (1 - share) * part[other] for part in batch)


def dropout_rates(settings: DenseParameters) -> list[float]:
    """Dropout rate before each dense layer.

    Raises
    ------
    ConfigurationError
        If the number of rates is not the number of dense layers.
    """
    layers = len(settings.hidden) + 1
    if isinstance(settings.dropout, tuple):
        if len(settings.dropout) != layers:
            raise ConfigurationError(
                f"dropout: received {len(settings.dropout)} rates, expected {layers}, one before each dense layer"
            )
        return list(settings.dropout)
    return [0.0] + [settings.dropout] * (layers - 1) if layers > 1 else [settings.dropout]


def _training_body(settings: DenseParameters, width: int, outputs: int) -> tuple[Any, Any]:
    """The layers to train, and a function that returns their weights as plain dense layers."""
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
            # With zeros all classes are equally likely at first, and a linear head does not depend on the seed.
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


def keras_loss(spec: BankSpec, *, sparse: bool = False) -> Any:
    """The loss of a bank as Keras takes it; ``sparse``: more than two classes are given as their numbers."""
    losses = load_keras().losses
    if spec.loss != "softmax":
        return lambda y, logits: LOSSES[spec.loss].values(spec, logits, y, 0.0)[0]
    of_several = losses.SparseCategoricalCrossentropy if sparse else losses.CategoricalCrossentropy
    return (losses.BinaryCrossentropy if spec.outputs == 1 else of_several)(from_logits=True)


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
