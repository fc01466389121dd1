"""Stores whose images have several labels or numbers, made of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from helpers import recipe

from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec, ImageTable, Quarantine
from features.store.writer import StoreWriter
from features.targets import UNKNOWN, Target


def target_store(
    path: Path,
    X: np.ndarray,
    values: np.ndarray,
    splits: np.ndarray,
    columns: Sequence[str],
    groups: tuple[str, ...] | None = None,
) -> FeatureStore:
    """A store of features (n, d), or of views (n, k, d), with these targets."""
    blocks = X[:, None] if X.ndim == 2 else X
    count, spec = len(X), FeatureSpec(recipe(), blocks.shape[1], blocks.shape[2:])
    writer = StoreWriter(path, kind="store", rows=count, features={spec.recipe.name: spec}, version=2)
    writer.append(spec.recipe.name, blocks.astype(np.float32))
    sha256 = np.zeros((count, 32), np.uint8)
    sha256[:, :8] = np.arange(count, dtype="<i8").view(np.uint8).reshape(count, 8)
    ones, wide = np.ones(count, np.int32), np.ones(count, np.int64)
    images = ImageTable(
        tuple(f"{row}.png" for row in range(count)), sha256, -ones, splits.astype(np.int8), groups, ones, ones, wide, wide,
        target=Target("t", tuple(columns), values),
    )  # fmt: skip
    writer.finish(
        images=images, quarantine=Quarantine((), sha256[:0], (), wide[:0], wide[:0]), source="images", split_rule="hash"
    )
    return FeatureStore.open(path)


def labels_of(
    rows: int = 300, labels: int = 3, columns: int = 8, unknown: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Features, and labels that depend on them: float32 (n, d), uint8 (n, labels); some cells may be unknown."""
    generator = np.random.default_rng(0)
    X = generator.normal(size=(rows, columns)).astype(np.float32)
    margins = X @ generator.normal(size=(columns, labels)) + generator.normal(size=(rows, labels)) - 0.5
    values = (margins > 0).astype(np.uint8)
    values[generator.random(values.shape) < unknown] = UNKNOWN
    return X, values


def numbers_of(
    rows: int = 300, numbers: int = 2, columns: int = 8, unknown: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Features, and numbers that depend on them, of different sizes: float32 (n, d), float64 (n, numbers)."""
    generator = np.random.default_rng(1)
    X = generator.normal(size=(rows, columns)).astype(np.float32)
    values = X @ generator.normal(size=(columns, numbers)) + 0.3 * generator.normal(size=(rows, numbers))
    values = values * 10.0 ** np.arange(numbers) + 100
    values[generator.random(values.shape) < unknown] = np.nan
    return X, values


def thirds(rows: int) -> np.ndarray:
    """Splits: three of five rows train, one validation, one test."""
    return np.array([0, 0, 0, 1, 2])[np.arange(rows) % 5]
