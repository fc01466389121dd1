"""Models whose outputs are matrix products: linear ones, principal components, dense layers, kernels, Gaussians."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from pipeline.heads.models.model import Model, check_floats, check_integers, in_pieces, need
from pipeline.scores.metrics import two_columns


def single(classes: int) -> int:
    """Number of outputs of a linear classifier: one for two classes."""
    return 1 if classes == 2 else classes


@dataclasses.dataclass(frozen=True, eq=False)
class Product(Model):
    """``Z @ coef.T + intercept``: float, (o, d) and (o,)."""

    softened: ClassVar[bool] = True
    coef: np.ndarray
    intercept: np.ndarray

    def product(self, Z: np.ndarray) -> np.ndarray:
        """Return the sums, float64, (n, o)."""
        return np.asarray(Z @ self.coef.T + self.intercept, np.float64)

    @property
    def parameter_count(self) -> int | None:
        return self.coef.size + len(self.intercept)

    def dense(self) -> tuple[np.ndarray, np.ndarray] | None:
        return self.coef.T, self.intercept


@dataclasses.dataclass(frozen=True, eq=False)
class Linear(Product):
    """A product with one output for each class, or one for two classes."""

    kind: ClassVar[str] = "linear"

    def check(self, columns: int, classes: int) -> None:
        check_floats("coef", self.coef, single(classes), columns)
        check_floats("intercept", self.intercept, single(classes))

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        return two_columns(self.product(Z))


@dataclasses.dataclass(frozen=True, eq=False)
class Projected(Model):
    """A model of principal components: float, (k, d) components and (d,) means; see `sklearn.decomposition.PCA`."""

    kind: ClassVar[str] = "projected"
    components: np.ndarray
    mean: np.ndarray
    model: Model

    def check(self, columns: int, classes: int) -> None:
        check_floats("components", self.components, None, columns)
        check_floats("mean", self.mean, columns)
        need(len(self.components) <= columns, f"{len(self.components)} components of {columns} columns")
        self.model.check(len(self.components), classes)

    @property
    def soft(self) -> bool:
        return self.model.soft

    def _project(self, Z: np.ndarray) -> np.ndarray:
        onto = self.components.T
        return np.asarray(Z @ onto - self.mean[None] @ onto)

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        return self.model.outputs(self._project(Z))

    @property
    def parameter_count(self) -> int | None:
        return self.model.parameter_count

    def dense(self) -> tuple[np.ndarray, np.ndarray] | None:
        inner = self.model.dense()
        if inner is None:
            return None
        kernel, bias = inner
        onto = self.components.T
        return onto @ kernel, bias - self.mean @ onto @ kernel


def _logistic(values: np.ndarray) -> np.ndarray:
    from scipy import special

    return np.asarray(special.expit(values))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda values: values,
    "logistic": _logistic,
    "tanh": np.tanh,
    "relu": lambda values: np.maximum(values, 0),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Layers(Model):
    """Dense layers with an activation between them; the last one gives logits. See `sklearn.neural_network`."""

    kind: ClassVar[str] = "layers"
    softened: ClassVar[bool] = True
    activation: str
    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def check(self, columns: int, classes: int) -> None:
        need(
            self.activation in ACTIVATIONS, f"activation is {self.activation[:40]!r}, expected {', '.join(ACTIVATIONS)}"
        )
        need(0 < len(self.weights) == len(self.biases), "expected as many biases as weights")
        for weights, bias in zip(self.weights, self.biases, strict=True):
            check_floats("weights", weights, columns, None)
            columns = weights.shape[1]
            check_floats("biases", bias, columns)
        need(columns == single(classes), f"the last layer has {columns} outputs, expected {single(classes)}")

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        for number, (weights, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            Z = (Z if number == 0 else ACTIVATIONS[self.activation](Z)) @ weights + bias
        return two_columns(np.asarray(Z, np.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class SupportVectors(Model):
    """A support vector machine with a kernel: one decision for each pair of classes, combined to a margin per class.

    ``vectors`` is float64, (s, d), sorted by class, with ``counts`` integers (c,) of each; ``dual`` is float64
    (c - 1, s), ``intercept`` float64 (c (c - 1) / 2,). The sums are those of LIBSVM (Chang and Lin, 2011, section 4 and 7),
    the combination is ``_ovr_decision_function`` of scikit-learn.
    """

    kind: ClassVar[str] = "support-vectors"
    softened: ClassVar[bool] = True
    kernel: str
    gamma: float
    coef0: float
    degree: int
    vectors: np.ndarray
    counts: np.ndarray
    dual: np.ndarray
    intercept: np.ndarray

    def check(self, columns: int, classes: int) -> None:
        need(self.kernel in ("linear", "poly", "rbf", "sigmoid"), f"kernel is {self.kernel[:40]!r}")
        need(self.gamma >= 0, f"gamma is {self.gamma:g}, expected 0 or more")
        need(0 <= self.degree <= 100, f"degree is {self.degree}, expected 0 to 100")
        check_floats("vectors", self.vectors, None, columns)
        count = len(self.vectors)
        check_integers("counts", self.counts, classes, least=0, below=count + 1)
        need(int(self.counts.sum(dtype=np.int64)) == count, f"counts do not add up to {count} support vectors")
        check_floats("dual", self.dual, classes - 1, count)
        check_floats("intercept", self.intercept, classes * (classes - 1) // 2)

    def _kernel(self, Z: np.ndarray) -> np.ndarray:
        products = Z @ self.vectors.T
        if self.kernel == "linear":
            return np.asarray(products)
        if self.kernel == "rbf":
            squares = np.square(Z).sum(axis=1)[:, None] + np.square(self.vectors).sum(axis=1)
            return np.asarray(np.exp(-self.gamma * np.maximum(squares - 2 * products, 0)))
        inner = self.gamma * products + self.coef0
        return np.asarray(inner**self.degree if self.kernel == "poly" else np.tanh(inner))

    def _decisions(self, Z: np.ndarray) -> np.ndarray:
        """One for each pair i < j of classes, positive for i: float64, (n, c (c - 1) / 2)."""
        similar, ends = self._kernel(np.asarray(Z, np.float64)), np.cumsum(self.counts)
        of = [slice(end - count, end) for end, count in zip(ends.tolist(), self.counts.tolist(), strict=True)]
        found = np.empty((len(Z), len(self.intercept)))
        for number, (i, j) in enumerate(itertools.combinations(range(len(of)), 2)):
            ours = similar[:, of[i]] @ self.dual[j - 1, of[i]] + similar[:, of[j]] @ self.dual[i, of[j]]
            found[:, number] = ours + self.intercept[number]
        return found

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        found, rows = in_pieces(Z, len(self.vectors) + len(self.intercept), len(self.counts))
        for part in rows:
            decisions = self._decisions(Z[part])
            if len(self.counts) == 2:
                found[part, 1] = -decisions[:, 0]
                continue
            votes, sums = np.zeros_like(found[part]), np.zeros_like(found[part])
            for number, (i, j) in enumerate(itertools.combinations(range(len(self.counts)), 2)):
                for_j = decisions[:, number] < 0
                votes[:, i] += ~for_j
                votes[:, j] += for_j
                sums[:, i] += decisions[:, number]
                sums[:, j] -= decisions[:, number]
            found[part] = votes + sums / (3 * (np.abs(sums) + 1))
        return found


_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian(Model):
    """Naive Bayes with a normal distribution for each class and column: float, (c, d) means and variances, (c,) shares."""

    kind: ClassVar[str] = "gaussian"
    softened: ClassVar[bool] = True
    mean: np.ndarray
    variance: np.ndarray
    prior: np.ndarray

    def check(self, columns: int, classes: int) -> None:
        check_floats("mean", self.mean, classes, columns)
        check_floats("variance", self.variance, classes, columns, least=_TINY)
        check_floats("prior", self.prior, classes, least=_TINY)

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        found = np.empty((len(Z), len(self.prior)))
        for k, (mean, variance, prior) in enumerate(zip(self.mean, self.variance, self.prior, strict=True)):
            spread = -0.5 * np.log(2 * np.pi * variance).sum()
            found[:, k] = np.log(prior) + (spread - 0.5 * (np.square(Z - mean) / variance).sum(axis=1))
        return found
