"""How the end of a network is trained: frozen settings from flags, a recipe or Python; the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from features.augmentation import AugmentSpec
from features.errors import ConfigurationError
from features.networks.backend import load_keras
from pipeline.config import Rate, Settings, parse

LAST_BLOCK = "last-block"
ALL = "all"
HEAD = "head"
# What there was before the other settings: the identity of older runs holds where the others are as usual.
_ALWAYS = ("unfreeze", "bn", "epochs", "patience", "learning_rate", "batch_size", "seed")


class TuningSettings(Settings):
    """Settings of stage three. Everything here is part of a run's identity.

    Parameters
    ----------
    unfreeze : str
        ``last-block``, ``all``, ``head`` (nothing of the backbone), the name of the first layer to train, or its number
        in ``model.layers`` (so ``15`` freezes the first 15 layers).
    bn : {"frozen", "affine", "train"}
        ``frozen``: BatchNorm layers are not trained. ``affine``: their gamma and beta are, while they normalise with
        their stored statistics. ``train``: they use and update the statistics of each batch, from scratch only.
    scratch : bool
        Architecture only: all weights of backbone and head are drawn anew, and trained.
    new_head : bool
        Draw the head's weights anew, and do not standardise its features: to train a head end to end as tutorials do.
    epochs, initial_epoch : int
        Most epochs to train; number of epochs that the head had before, from which the count goes on.
    patience : int
        Epochs without a lower validation log loss before stopping; 0: train all epochs. The best epoch is kept.
    learning_rate : float
        Step size, above 0, at most 1.
    optimizer : {"adam", "rmsprop", "sgd"}
        ``momentum`` applies to ``sgd`` and ``rmsprop``, ``nesterov`` to ``sgd``.
    weight_decay : float
        Decoupled from the loss (Loshchilov and Hutter, ICLR 2019).
    schedule : {"constant", "cosine"}
        Of the learning rate; cosine falls to 0 over all epochs (Loshchilov and Hutter, SGDR, ICLR 2017).
    warmup_epochs : float
        The rate rises from 0 in a straight line over these. Adam's first steps, whose second moments are still
        unknown, otherwise shake a good head (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.2).
    class_weight : {"balanced"}, optional
        Weigh each row by rows / (classes x rows of its class), as scikit-learn does.
    augment : str or dict
        Preset of ``features.augmentation``, or the fields of an ``AugmentSpec``: each epoch sees another view of each
        training image, drawn from it.
    mixed_precision : bool
        The trained layers compute in bfloat16 while training, on a GPU; weights and measurements are float32.
    batch_size, seed : int
        Images of one step; seed of order, views, dropout and, from scratch, the weights.
    """

    unfreeze: Annotated[str, BeforeValidator(str)] = LAST_BLOCK
    bn: Literal["frozen", "affine", "train"] = "frozen"
    scratch: bool = False
    new_head: bool = False
    epochs: PositiveInt = 5
    initial_epoch: NonNegativeInt = 0
    patience: NonNegativeInt = 2
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    momentum: Rate = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: NonNegativeFloat = 0.0
    class_weight: Literal["balanced"] | None = None
    augment: str | dict[str, Any] = "none"
    mixed_precision: bool = False
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def described(self) -> dict[str, Any]:
        """What decides the result, as plain values, without what is as usual: older run ids hold."""
        values, usual = super().described(), TuningSettings().model_dump(mode="json")
        if self.augmentation is None:
            values["augment"] = usual["augment"]
        else:
            values["augment"] = self.augmentation.to_dict()
        return {name: value for name, value in values.items() if name in _ALWAYS or value != usual[name]}

    @property
    def augmentation(self) -> AugmentSpec | None:
        """What views are drawn from; None where every view would be the plain image."""
        if isinstance(self.augment, str):
            spec = AugmentSpec.parse(self.augment)
        elif "version" in self.augment:
            spec = AugmentSpec.from_dict(self.augment)
        else:
            spec = AugmentSpec.from_dict({**AugmentSpec().to_dict(), **self.augment})
        return None if spec.is_plain else spec


def settings_of(values: Mapping[str, Any]) -> TuningSettings:
    """Settings from plain values, checked one by one and together.

    Raises
    ------
    ConfigurationError
        An unknown name (the nearest is offered), a value out of range, or settings that do not go together.
    """
    settings = parse(TuningSettings, values, "finetune")
    if settings.bn == "train" and not settings.scratch:
        raise ConfigurationError(
            "bn: train is for training from scratch (--scratch). Trained weights keep their stored statistics, which a "
            "few images would spoil: give frozen, or affine to train gamma and beta"
        )
    if settings.scratch and settings.unfreeze not in (LAST_BLOCK, ALL):
        raise ConfigurationError(
            f"unfreeze: received {settings.unfreeze!r} with --scratch, which trains every layer; leave one of them out"
        )
    if settings.momentum and settings.optimizer == "adam":
        raise ConfigurationError("momentum: adam has its own; give --optimizer sgd or rmsprop")
    if settings.nesterov and not (settings.optimizer == "sgd" and settings.momentum):
        raise ConfigurationError("nesterov: needs --optimizer sgd and a momentum above 0")
    _ = settings.augmentation  # its own checks
    return settings.model_copy(update={"unfreeze": ALL}) if settings.scratch else settings


def learning_rate(settings: TuningSettings, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0 over all epochs.

    Examples
    --------
    >>> settings = TuningSettings(learning_rate=0.1, epochs=2, warmup_epochs=0.5, schedule="cosine")
    >>> [round(learning_rate(settings, step, 4), 4) for step in range(8)]
    [0.05, 0.1, 0.1, 0.0933, 0.075, 0.05, 0.025, 0.0067]
    """
    warm, total = round(settings.warmup_epochs * steps_per_epoch), settings.epochs * steps_per_epoch
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    if settings.schedule == "constant":
        return settings.learning_rate
    share = (step - warm) / max(1, total - warm)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(settings: TuningSettings) -> Any:
    """A Keras optimizer; its learning rate is set before each step."""
    optimizers = load_keras().optimizers
    common = {"learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay or None}
    if settings.optimizer == "sgd":
        return optimizers.SGD(momentum=settings.momentum, nesterov=settings.nesterov, **common)
    if settings.optimizer == "rmsprop":
        return optimizers.RMSprop(momentum=settings.momentum, **common)
    return optimizers.Adam(**common)
