"""Training from a store in pieces: every row once, mixed, equal statistics, equal accuracy, little memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, recipe

from features.errors import HeadError
from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec, ImageTable, Quarantine
from features.store.writer import StoreWriter
from pipeline.heads.kinds import head_of
from pipeline.heads.streaming import FeatureStream
from pipeline.runs.folder import Run
from pipeline.stages.train_head import train_head
from pipeline.sweeps.sweep import run_sweep
from pipeline.sweeps.sweep_file import SweepFile, SweepHead

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]  # stores of tens of megabytes

MEGABYTE = 1 << 20


def write_store(
    path: Path, blocks: Sequence[np.ndarray], labels: np.ndarray, splits: np.ndarray, views: int = 1
) -> FeatureStore:
    """A store of ready-made features, (k, ...) each, or (k, views, ...)."""
    count = len(labels)
    shape = blocks[0].shape[1 if views == 1 else 2 :]
    spec = FeatureSpec(recipe(pooling="none" if len(shape) > 1 else "avg"), views, shape)
    writer = StoreWriter(path, kind="store", rows=count, features={spec.recipe.name: spec})
    for block in blocks:
        writer.append(spec.recipe.name, block[:, None] if views == 1 else block)
    sha256 = np.zeros((count, 32), np.uint8)
    sha256[:, :8] = np.arange(count, dtype="<i8").view(np.uint8).reshape(count, 8)
    ones = np.ones(count, np.int32)
    paths = tuple(f"{label}/{row:07d}.png" for row, label in enumerate(labels.tolist()))
    wide = ones.astype(np.int64)
    writer.finish(
        images=ImageTable(paths, sha256, labels.astype(np.int32), splits.astype(np.int8), None, ones, ones, wide, wide),
        quarantine=Quarantine((), sha256[:0], (), wide[:0], wide[:0]),
        classes=[str(label) for label in range(labels.max() + 1)],
    )
    return FeatureStore.open(path)


def sorted_store(path: Path, count: int = 6000, columns: int = 64, classes: int = 6, gap: float = 3.2) -> FeatureStore:
    """Gaussian classes, one after the other, in columns of very different scale; 80 % train, 20 % validation."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(classes, columns)).astype(np.float32)
    centres *= gap / np.linalg.norm(centres, axis=1, keepdims=True)
    labels = np.arange(count) * classes // count
    scale = np.exp(generator.uniform(-2, 2, columns)).astype(np.float32)
    blocks = []
    for start in range(0, count, 1000):
        y = labels[start : start + 1000]
        noise = generator.standard_normal((len(y), columns), dtype=np.float32)
        blocks.append((noise + centres[y]) * scale + 5)
    return write_store(path, blocks, labels, (generator.random(count) < 0.2).astype(np.int8))


def stream_of(store: FeatureStore, split: str, memory: int = MEGABYTE, pool: str = "none") -> FeatureStream:
    rows = store.rows(split)
    return FeatureStream(store, store.names[0], rows, store.images.labels[rows], memory, pool)


def standardised(
    store: FeatureStore, memory: int = MEGABYTE, pool: str = "none"
) -> tuple[FeatureStream, FeatureStream]:
    """Training and validation rows, alike."""
    mean, std = stream_of(store, "train", memory, pool).statistics()
    train, validation = (stream_of(store, split, memory, pool) for split in ("train", "validation"))
    return tuple(dataclasses.replace(rows, mean=mean, std=std) for rows in (train, validation))  # type: ignore[return-value]


def sgd(**parameters: object):
    from sklearn.linear_model import SGDClassifier

    return SGDClassifier(random_state=0, **parameters)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return sorted_store(tmp_path_factory.mktemp("streaming") / "features.h5")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A sixth of the rows, for what is trained many times."""
    return sorted_store(tmp_path_factory.mktemp("streaming") / "small.h5", count=1000, gap=3.2)


# --- runs -------------------------------------------------------------------------------------------------

FEW = {"epochs": 8, "batch_size": 64}
HEADS: dict[str, dict[str, Any]] = {
    "dense": {**FEW, "learning_rate": 3e-3, "dropout": 0.1},  # by the bank
    "linear-sgd": {**FEW, "learning_rate": 0.03, "class_weight": "balanced", "label_smoothing": 0.02},  # by Keras
    "mlp-256": {**FEW, "hidden": (32,), "optimizer": "rmsprop", "batch_norm": True, "mixup": 0.1},
    "sgd": {"alpha": 0.03},
    "logistic": {"C": 0.1, "solver": "keras"},
    "sklearn.linear_model.SGDClassifier": {"loss": "hinge", "alpha": 1e-3, "class_weight": "balanced"},
}


@pytest.mark.pain(13)
@pytest.mark.parametrize("name", HEADS)
def test_pain_13_a_run_from_pieces_of_a_sorted_store_is_as_good_as_one_in_memory(
    name: str, store: FeatureStore, tmp_path: Path
) -> None:
    """A budget of half of what they take; the run id is the same, and the run says how it was trained."""
    found = {}
    for where, memory in (("memory", 1 << 30), ("pieces", 1_200_000)):
        result = train_head(store, name, runs=tmp_path / where, params=HEADS[name], memory=memory, test=False)
        run = Run.open(result.folder)
        assert run.environment.get("streamed", False) is result.streamed is (where == "pieces")
        X, y = store.load("validation")
        accuracy = float(np.mean(head_of(run).predict_proba(X).argmax(axis=1) == y))
        assert result.metrics["validation"]["accuracy"] == accuracy  # the head that was saved is the one scored
        found[where] = result.run_id, accuracy
    assert found["pieces"][0] == found["memory"][0]
    # Two orders of the batches leave a deep head further apart than a linear one.
    assert found["pieces"][1] >= found["memory"][1] - (0.02 if name == "mlp-256" else 0.005)
    assert 0.9 < found["pieces"][1] < 0.98


def test_a_head_that_needs_all_rows_is_refused_with_the_figures(store: FeatureStore, tmp_path: Path) -> None:
    message = (
        r"head 'logistic' needs all rows in memory: 4\d+ x 64 features .* take 2\.\d MB, but only 1\.0 MB are allowed\. Give more "
        r"\(--memory\), or use another pooling or a head that reads rows piece by piece: sgd, dense, dropout-linear,"
    )
    with pytest.raises(HeadError, match=message):
        train_head(store, "logistic", runs=tmp_path, memory=1_000_000)
    with pytest.raises(HeadError, match="head 'sgd' needs all rows in memory"):
        train_head(store, "sgd", runs=tmp_path, params={"pca": 8}, memory=1_000_000)
    assert not list(tmp_path.iterdir())


def test_a_sweep_from_pieces(small: FeatureStore, tmp_path: Path) -> None:
    """Heads side by side, folds and searched strengths, all from pieces; what cannot is named."""
    sweep = SweepFile(
        version=1,
        heads=[
            SweepHead(head="dense", grid={"epochs": [3], "learning_rate": [1e-3, 1e-2], "batch_size": [32]}),
            SweepHead(head="sgd", grid={"alpha": [0.03]}),
            SweepHead(head="knn"),
        ],
    )
    swept = run_sweep([small], sweep, runs=tmp_path / "pieces", folds=2, memory=300_000)
    assert (swept.trained, [item["head"] for item in swept.failed]) == (3, ["knn on last.avg"])
    assert "needs all rows in memory" in swept.failed[0]["reason"]
    assert not [path for path in (tmp_path / "pieces").iterdir() if path.name.startswith(".")]
    sweep = sweep.model_copy(update={"heads": sweep.heads[:2]})
    whole = run_sweep([small], sweep, runs=tmp_path / "memory", folds=2, memory=1 << 30)
    rows = {row["run_id"]: row for row in whole.board}
    for row in swept.board:
        assert Run.open(tmp_path / "pieces" / row["run_id"]).environment["streamed"] is True
        for score in ("accuracy", "cv_accuracy"):
            assert 0.98 > row[score] >= rows[row["run_id"]][score] - 0.015  # 3 of 200 rows
    assert {Run.open(tmp_path / "pieces" / row["run_id"]).metrics["cv"]["n"] for row in swept.board} == {
        len(small.rows("train"))
    }


def test_a_penalty_is_searched_on_some_rows(store: FeatureStore, tmp_path: Path) -> None:
    found = [train_head(store, "sgd", runs=tmp_path / str(memory), memory=memory) for memory in (2_000_000, 1 << 30)]
    assert [result.streamed for result in found] == [True, False]
    accuracies = [result.metrics["validation"]["accuracy"] for result in found]
    assert accuracies[0] >= accuracies[1] - 0.01
    alphas = [head_of(Run.open(result.folder)).chosen["alpha"] for result in found]  # type: ignore[attr-defined]
    assert abs(np.log10(alphas[0] / alphas[1])) <= 1


def test_heads_of_a_bank_are_trained_from_pieces_as_alone(small: FeatureStore) -> None:
    from pipeline.heads.bank import BankHead, BankSpec, train_rows

    train, validation = standardised(small, 150_000)
    spec = BankSpec(6, epochs=3, batch_size=20)
    heads = [BankHead(1e-3), BankHead(1e-2, 1e-3, dropout=0.3, seed=1), BankHead(3e-3, feature_noise=0.1)]
    together = train_rows(spec, heads, train, validation)
    for head, result in zip(heads, together, strict=True):
        (alone,) = train_rows(spec, [head], train, validation)
        for ours, theirs in zip(result.weights, alone.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert alone.history["val_accuracy"][-1] > 0.85


def test_keras_that_diverges_from_pieces_is_an_error(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"diverged in epoch 1: lower learning_rate \(now 1e\+38\)"):
        train_head(store, "linear-sgd", runs=tmp_path, params={"learning_rate": 1e38}, memory=600_000)


MEASURED = """
import json, sys
from test_streaming import sgd, standardised
from features.machine import peak_memory
from features.store.reader import FeatureStore
from pipeline.heads.streaming import fit_sgd_streaming

store = FeatureStore.open(sys.argv[1])
_ = store.images, store.rows("train")
sgd()  # scikit-learn is imported
before = peak_memory()
train, validation = standardised(store, int(sys.argv[2]))
found = fit_sgd_streaming(sgd(alpha=1e-4), train, validation, classes=10, epochs=2)
print(json.dumps([peak_memory() - before, max(found.history["val_accuracy"])]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_150_mb_store_is_trained_within_25_mb(tmp_path: Path) -> None:
    """The budget of 25 MB, and 50 MB for what scikit-learn and the reading of rows need beside it."""
    generator = np.random.default_rng(0)
    labels = np.arange(30_000) // 3_000
    centres = generator.normal(size=(10, 1280)).astype(np.float32)
    centres *= 3.6 / np.linalg.norm(centres, axis=1, keepdims=True)
    blocks = (generator.standard_normal((3_000, 1280), dtype=np.float32) + centres[label] for label in range(10))

    class Blocks(list):
        def __iter__(self):
            yield self[0]
            yield from blocks

    first = next(blocks)
    made = write_store(tmp_path / "features.h5", Blocks([first]), labels, (generator.random(30_000) < 0.1).astype(int))
    assert made.path.stat().st_size > 150_000_000
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(made.path), str(25 * MEGABYTE)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    grown, accuracy = json.loads(result.stdout)
    assert grown < 75 * MEGABYTE
    X, y = made.load("train")
    X_validation, y_validation = made.load("validation")
    in_memory = sgd(alpha=1e-4, max_iter=2, tol=None).fit(X, y)
    assert accuracy >= in_memory.score(X_validation, y_validation) - 0.005
