"""Models that combine other models: means of probabilities, weighted votes, calibration."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from pipeline.heads.models.linear import single
from pipeline.heads.models.model import Model, check_floats, check_integers, need


@dataclasses.dataclass(frozen=True, eq=False)
class Averaged(Model):
    """The mean of the members' probabilities, weighted by ``weights``, float64 (m,), which sum to 1.

    ``columns`` is empty, or has the integer columns that each member sees.
    """

    kind: ClassVar[str] = "averaged"
    members: tuple[Model, ...]
    weights: np.ndarray
    columns: tuple[np.ndarray, ...]

    def check(self, columns: int, classes: int) -> None:
        need(len(self.members) > 0, "it has no members")
        check_floats("weights", self.weights, len(self.members), least=0)
        need(abs(float(self.weights.sum()) - 1) < 1e-9, "weights do not sum to 1")
        need(len(self.columns) in (0, len(self.members)), "columns are not those of the members")
        for seen in self.columns:
            check_integers("columns", seen, None, least=0, below=columns)
            need(len(seen) <= columns, f"a member sees {len(seen)} of {columns} columns")
        for number, member in enumerate(self.members):
            member.check(len(self.columns[number]) if self.columns else columns, classes)

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        parts = (Z[:, seen] for seen in self.columns) if self.columns else (Z for _ in self.members)
        total: np.ndarray | float = 0.0
        for member, weight, part in zip(self.members, self.weights, parts, strict=True):
            total = total + weight * member.probabilities(part)
        return np.asarray(total)


@dataclasses.dataclass(frozen=True, eq=False)
class Voting(Model):
    """AdaBoost by the algorithm SAMME (Zhu and others, 2009): votes weighted by ``weights``, float64 (m,)."""

    kind: ClassVar[str] = "voting"
    softened: ClassVar[bool] = True
    members: tuple[Model, ...]
    weights: np.ndarray
    classes: int

    def check(self, columns: int, classes: int) -> None:
        need(len(self.members) > 0, "it has no members")
        need(self.classes == classes, f"classes is {self.classes}, expected {classes}")
        check_floats("weights", self.weights, len(self.members), least=0)
        need(self.weights.sum() > 0, "weights are 0")
        for member in self.members:
            member.check(columns, classes)

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        others = self.classes - 1
        total = np.zeros((len(Z), self.classes))
        for member, weight in zip(self.members, self.weights, strict=True):
            guess = member.outputs(Z).argmax(axis=1)[:, None]
            total += np.where(guess == np.arange(self.classes), weight, -weight / others)
        total /= self.weights.sum()
        if self.classes == 2:
            return np.stack([np.zeros(len(Z)), total[:, 1] - total[:, 0]], axis=1)
        return np.asarray(total / others)


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrated(Model):
    """A sigmoid of each output of a model, 1 / (1 + exp(slope x + offset)), normalised over the classes (Platt, 2000).

    ``slopes`` and ``offsets`` are float64, (o,), with o = 1 for two classes.
    """

    kind: ClassVar[str] = "calibrated"
    model: Model
    slopes: np.ndarray
    offsets: np.ndarray

    def check(self, columns: int, classes: int) -> None:
        self.model.check(columns, classes)
        check_floats("slopes", self.slopes, single(classes))
        check_floats("offsets", self.offsets, single(classes))

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        from scipy import special

        values = self.model.outputs(Z)
        found = special.expit(-(self.slopes * values[:, -len(self.slopes) :] + self.offsets))
        if found.shape[1] == 1:
            return np.hstack([1 - found, found])
        total = found.sum(axis=1, keepdims=True)
        return np.asarray(np.where(total == 0, 1 / found.shape[1], found / np.where(total == 0, 1, total)))
