"""Decision trees as flat arrays: forests, which average probabilities, and boosted trees, which add logits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from pipeline.heads.models.linear import single
from pipeline.heads.models.model import Model, check_floats, check_integers, in_pieces, need
from pipeline.scores.metrics import two_columns

DEEPEST = 4096  # levels of a tree


@dataclasses.dataclass(frozen=True, eq=False)
class Trees(Model):
    """The nodes of all trees, one tree after the other.

    ``starts`` is integer, (t,), the roots; ``left`` and ``right`` integer, (k,), the children, -1 at a leaf; ``feature``
    the column that an inner node tests, ``threshold`` float64: rows whose value is at most this go left; ``missing``
    uint8: whether NaN goes left. ``values`` is float64, (k, v): what a leaf says. With ``float32``, values of a row are
    rounded to float32 before they are compared, as scikit-learn does in all trees but histogram ones.
    """

    starts: np.ndarray
    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    missing: np.ndarray
    values: np.ndarray
    float32: bool

    def check_nodes(self, columns: int) -> None:
        """Check that every tree is a tree: children come later and have one parent; columns exist."""
        count = len(self.left)
        check_integers("starts", self.starts, None, least=0, below=count)
        ordered = len(self.starts) > 0 and self.starts[0] == 0 and bool((np.diff(self.starts) > 0).all())
        need(ordered, "starts are not in order")
        for name in ("left", "right"):
            check_integers(name, getattr(self, name), count, least=-1, below=count)
        inner = np.flatnonzero(self.left >= 0)
        need(np.array_equal(inner, np.flatnonzero(self.right >= 0)), "a node has a single child")
        children = np.concatenate([self.left[inner], self.right[inner]])
        need((children > np.tile(inner, 2)).all(), "a child comes before its parent")
        parents = np.bincount(children, minlength=count)
        roots = np.zeros(count, np.int64)
        roots[self.starts] = 1
        need((parents + roots == 1).all(), "a node has several parents, or none")
        check_integers("feature of inner nodes", self.feature[inner], None, least=0, below=columns)
        for name in ("feature", "threshold", "missing"):
            need(getattr(self, name).shape == (count,), f"{name} has another length than left")
        need(self.threshold.dtype.kind == "f" and not np.isnan(self.threshold[inner]).any(), "a threshold is NaN")
        check_integers("missing", self.missing, count, least=0, below=2)
        level = self.starts
        for _ in range(DEEPEST):
            level = level[self.left[level] >= 0]
            if not len(level):
                return
            level = np.concatenate([self.left[level], self.right[level]])
        need(False, f"a tree has more than {DEEPEST} levels")

    def leaves(self, Z: np.ndarray) -> np.ndarray:
        """The leaf that each row reaches in each tree: integer, (n, t)."""
        trees = len(self.starts)
        at = np.tile(self.starts.astype(np.int64), len(Z))
        active = np.flatnonzero(self.left[at] >= 0)
        while len(active):
            node = at[active]
            values = Z[active // trees, self.feature[node]]
            on = values <= self.threshold[node]
            gaps = np.isnan(values)
            if gaps.any():
                on = np.where(gaps, self.missing[node] != 0, on)
            at[active] = np.where(on, self.left[node], self.right[node])
            active = active[self.left[at[active]] >= 0]
        return at.reshape(len(Z), trees)

    def tested(self, Z: np.ndarray) -> np.ndarray:
        """The rows in the precision in which they are compared."""
        return np.asarray(Z, np.float32) if self.float32 else Z


@dataclasses.dataclass(frozen=True, eq=False)
class Forest(Trees):
    """The mean of the trees' probabilities; ``values`` is (k, c)."""

    kind: ClassVar[str] = "forest"

    def check(self, columns: int, classes: int) -> None:
        check_floats("values", self.values, len(self.left), classes, least=0)
        self.check_nodes(columns)

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        Z, classes = self.tested(Z), self.values.shape[1]
        found, rows = in_pieces(Z, len(self.starts) * classes, classes)
        for part in rows:
            found[part] = self.values[self.leaves(Z[part])].mean(axis=1)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Boosting(Trees):
    """``base``, float64 (o,), plus ``scale`` times the sum of the trees; tree t adds to output t modulo o.

    ``values`` is (k, 1), and o = 1 for two classes.
    """

    kind: ClassVar[str] = "boosting"
    softened: ClassVar[bool] = True
    base: np.ndarray
    scale: float

    def check(self, columns: int, classes: int) -> None:
        check_floats("base", self.base, single(classes))
        check_floats("values", self.values, len(self.left), 1)
        self.check_nodes(columns)
        need(len(self.starts) % len(self.base) == 0, f"expected as many trees for each of {len(self.base)} outputs")

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        Z, count = self.tested(Z), len(self.base)
        found, rows = in_pieces(Z, len(self.starts), count)
        for part in rows:
            said = self.values[self.leaves(Z[part]), 0]
            found[part] = self.base + self.scale * said.reshape(len(said), -1, count).sum(axis=1)
        return two_columns(found)
