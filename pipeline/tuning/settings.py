"""Settings of fine-tuning, from the command line, an experiment or Python, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt

from features.augmentation import AugmentSpec
from features.errors import ConfigurationError
from features.networks.backend import load_keras
from pipeline.config import Rate, Settings, parse
from pipeline.presets import EPOCHS

LAST_BLOCK = "last-block"
ALL = "all"
HEAD = "head"
# The first settings there were; the others enter a run's id only if they are not the default, so that older ids stay.
_ALWAYS = ("unfreeze", "bn", "epochs", "patience", "learning_rate", "batch_size", "seed")


class TuningSettings(Settings):
    """Settings of fine-tuning. All of them decide the id of the run.

    Parameters
    ----------
    unfreeze : str
        ``last-block``, ``all``, ``head`` (no layer of the network), the name of the first layer to train, or its number
        in ``model.layers`` (so ``15`` freezes the first 15 layers).
    bn : {"frozen", "affine", "train"}
        ``frozen``: BatchNorm layers are not trained. ``affine``: their gamma and beta are trained, while they normalise
        with stored statistics. ``train``: they use and update the statistics of each batch, from scratch only.
    scratch : bool
        Keep only the architecture: draw new weights for network and head, and train all of them.
    new_head : bool
        Draw new weights for the head and do not standardise its features, to train a head end to end as tutorials do.
    epochs, initial_epoch : int
        Largest number of epochs to train; number of epochs trained before, from which the count continues.
    patience : int
        Epochs without a lower validation log loss before training stops; 0 trains all epochs. The best epoch is kept.
    learning_rate : float
        Step size, above 0, at most 1.
    optimizer : {"adam", "rmsprop", "sgd"}
        ``momentum`` applies to ``sgd`` and ``rmsprop``, ``nesterov`` to ``sgd``.
    weight_decay : float
        Decoupled from the loss (Loshchilov and Hutter, ICLR 2019).
    schedule : {"constant", "cosine"}
        Course of the learning rate; ``cosine`` falls to 0 over all epochs (Loshchilov and Hutter, SGDR, ICLR 2017).
    warmup_epochs : float
        Epochs over which the learning rate rises linearly from 0. Without them Adam's first steps, whose second moments
        are still unknown, may spoil a good head (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.2).
    class_weight : {"balanced"}, optional
        Weight each row by rows / (classes x rows of its class), as scikit-learn does.
    augment : str or dict
        Preset of ``features.augmentation``, or the fields of an ``AugmentSpec``. Each epoch trains on a new view of each
        image, drawn from it.
    mixed_precision : bool
        Compute the trained layers in bfloat16 during training, on a GPU; weights and scores stay float32.
    batch_size, seed : int
        Images per step; seed of row order, views, dropout and new weights.
    """

    unfreeze: Annotated[str, BeforeValidator(str)] = LAST_BLOCK
    bn: Literal["frozen", "affine", "train"] = "frozen"
    scratch: bool = False
    new_head: bool = False
    epochs: Annotated[int, Field(ge=1, le=EPOCHS)] = 5
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
        """The plain values that decide the result, without newer ones that are the default, so that older run ids stay."""
        values, usual = super().described(), TuningSettings().model_dump(mode="json")
        if self.augmentation is None:
            values["augment"] = usual["augment"]
        else:
            values["augment"] = self.augmentation.to_dict()
        return {name: value for name, value in values.items() if name in _ALWAYS or value != usual[name]}

    @property
    def augmentation(self) -> AugmentSpec | None:
        """The augmentation that views are drawn from; None if every view would be the plain image."""
        if isinstance(self.augment, str):
            spec = AugmentSpec.parse(self.augment)
        elif "version" in self.augment:
            spec = AugmentSpec.from_dict(self.augment)
        else:
            spec = AugmentSpec.from_dict({**AugmentSpec().to_dict(), **self.augment})
        return None if spec.is_plain else spec


def settings_of(values: Mapping[str, Any]) -> TuningSettings:
    """Make settings from plain values, which are checked one by one and together.

    Raises
    ------
    ConfigurationError
        If a name is unknown (the nearest one is offered), a value is out of range, or settings contradict each other.
    """
    settings = parse(TuningSettings, values, "finetune")
    if settings.bn == "train" and not settings.scratch:
        raise ConfigurationError(
            "bn: train is only for training from scratch (--scratch). Trained weights keep their stored statistics, which "
            "a few images would spoil; give frozen, or affine to train gamma and beta"
        )
    if settings.scratch and settings.unfreeze not in (LAST_BLOCK, ALL):
        raise ConfigurationError(
            f"unfreeze: received {settings.unfreeze!r} with --scratch, which trains every layer; leave one of them out"
        )
    if settings.momentum and settings.optimizer == "adam":
        raise ConfigurationError("momentum: adam does not take it; give --optimizer sgd or rmsprop")
    if settings.nesterov and not (settings.optimizer == "sgd" and settings.momentum):
        raise ConfigurationError("nesterov: needs --optimizer sgd and a momentum above 0")
    _ = settings.augmentation  # raises an error if it is invalid
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
    """Make the Keras optimizer; its learning rate is set before each step."""
    optimizers = load_keras().optimizers
    common = {"learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay or None}
    if settings.optimizer == "sgd":
        return optimizers.SGD(momentum=settings.momentum, nesterov=settings.nesterov, **common)
    if settings.optimizer == "rmsprop":
        return optimizers.RMSprop(momentum=settings.momentum, **common)
    return optimizers.Adam(**common)
