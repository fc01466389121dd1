"""What joins network and head into one model, from pixels of any size to probabilities; the kind of network decides how.

network, recipe, head --KerasAssembled or OnnxAssembled--> runs, is written by a format, names the stage that differs
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from features.errors import HeadError
from features.networks.network import Network
from features.recipe import Recipe
from pipeline.exporting.resizing import check_rule
from pipeline.heads.dense import KerasHead
from pipeline.heads.head import Head
from pipeline.heads.kinds import can_finetune, head_of, layered
from pipeline.runs.folder import Run


class Assembled(Protocol):
    """Network and head as one model."""

    @property
    def model(self) -> Any:
        """What the writers of this kind of network take: see ``pipeline.exporting.formats.Format``."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes that its weights take."""
        ...

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the probabilities of one image: uint8 (h, w, 3), 0-255 -> float64 (1, c)."""
        ...

    def stage_that_differs(self, pixels: np.ndarray) -> str:
        """Name the first stage, or even layer, whose output for this image differs from that of the run's own network."""
        ...

    def reopened(self, model: Any) -> Assembled:
        """Make the same of a model that was written and loaded again."""
        ...


class Assembler(Protocol):
    """Joins one kind of network with heads."""

    def __call__(self, network: Network, recipe: Recipe, head: KerasHead) -> Assembled:
        """Join; ``recipe`` is that of the features which the head takes."""
        ...


def folded(head: KerasHead) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute kernel and bias of each layer of a head, with scaler and temperature folded in and one column per class.

    Returns
    -------
    list of (float32 (d, u), float32 (u,))
        `Task.activation` of the last layer's output gives the predictions; softmax of classes.
    """
    parts = [np.asarray(part, np.float64) for part in head.weights]
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    kernel, bias = pairs[0]
    kernel = kernel / head.std[:, None].astype(np.float64)
    pairs[0] = kernel, bias - head.mean.astype(np.float64) @ kernel
    kernel, bias = (part / head.temperature for part in pairs[-1])
    if len(bias) < len(head.classes):  # a single logit m for two classes means [0, m]
        kernel, bias = np.hstack([np.zeros_like(kernel), kernel]), np.append(0.0, bias)
    pairs[-1] = kernel, bias
    return [(kernel.astype(np.float32), bias.astype(np.float32)) for kernel, bias in pairs]


def head_and_layers(run: Run) -> tuple[Head, KerasHead]:
    """Return the head of a run, and the same as dense layers.

    Raises
    ------
    HeadError
        If no layers can replace it; the message lists the heads that they can.
    """
    if not can_finetune(run):
        raise HeadError(
            f"head {run.config['head']['name']!r} is neither linear nor a network, so no layers can replace it. Heads that can be exported: "
            f"{', '.join(layered(run.task))}"
        )
    head = head_of(run)
    return head, head.as_dense()  # type: ignore[return-value]


def exact_recipe(run: Run) -> Recipe:
    """Return the run's recipe in float32; ``ConfigurationError`` if a graph cannot compute its pixels exactly."""
    recipe = run.recipe
    check_rule(recipe.pixels)
    return dataclasses.replace(recipe, precision="float32", quantised=None)
