"""Training from a store in pieces: every row once, mixed, equal statistics, equal accuracy, little memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, extract, paint_folder, recipe

from features.errors import ConfigurationError, HeadError, IntegrityError
from features.layout import FeatureSpec, ImageTable, Quarantine
from features.store import FeatureStore
from features.writer import StoreWriter
from pipeline.pooling import column_statistics, pool_features
from pipeline.streaming import FeatureStream, fit_keras_streaming, fit_sgd_streaming, over_pieces, stream_batches

pytestmark = pytest.mark.slow  # stores of tens of megabytes

MEGABYTE = 1 << 20


def write_store(path: Path, blocks: Sequence[np.ndarray], labels: np.ndarray, splits: np.ndarray) -> FeatureStore:
    """A store of ready-made features, (k, ...) each."""
    count = len(labels)
    spec = FeatureSpec(recipe(pooling="none" if blocks[0].ndim > 2 else "avg"), 1, blocks[0].shape[1:])
    writer = StoreWriter(path, kind="store", rows=count, features={spec.recipe.name: spec})
    for block in blocks:
        writer.append(spec.recipe.name, block[:, None])
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


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return sorted_store(tmp_path_factory.mktemp("streaming") / "features.h5")


# --- reading ----------------------------------------------------------------------------------------------


def test_read_gives_the_rows_of_the_array(store: FeatureStore) -> None:
    array = np.asarray(store.array())
    for start, stop in ((0, 6000), (3, 4), (4095, 4097), (5990, 9999), (7, 7), (9, 3)):
        np.testing.assert_array_equal(store.read(None, start, stop), array[start:stop])


def test_read_verifies_the_blocks_it_touches_and_only_those(tmp_path: Path) -> None:
    made = sorted_store(tmp_path / "features.h5", count=9000)
    offset = made._entries["/features/last.avg"].offset
    with open(made.path, "r+b") as file:
        file.seek(offset + 5000 * 256)
        file.write(b"\xff")
    opened = FeatureStore.open(made.path)
    assert opened.read(None, 0, 4096).shape == (4096, 1, 64)  # the first block of 1 MiB
    for _ in range(2):
        with pytest.raises(IntegrityError, match="rows 4096 to 8191 are not what was written"):
            opened.read(None, 4090, 4100)
    with pytest.raises(IntegrityError, match="not what was written"):
        list(stream_of(opened, "train").batches(batch_size=10, seed=0))


def test_a_sharded_store_streams_the_same(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"a": 20, "b": 25})
    packed = extract(source, tmp_path / "packed.h5").store
    sharded = extract(source, tmp_path / "sharded.h5", layout="sharded").store
    first, second = ([*stream_of(made, "train").batches(batch_size=7, seed=3)] for made in (packed, sharded))
    assert len(first) == len(second)
    for (X, y), (X_other, y_other) in zip(first, second, strict=True):
        np.testing.assert_array_equal(X, X_other)
        np.testing.assert_array_equal(y, y_other)


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 32, 1000])
@pytest.mark.parametrize("memory", [MEGABYTE, 64 * MEGABYTE])
def test_every_row_comes_once_with_its_label(store: FeatureStore, batch_size: int, memory: int) -> None:
    rows = store.rows("train")
    expected = {row.tobytes(): label for row, label in zip(*store.load("train"), strict=True)}
    batches = [
        *stream_batches(
            store, "last.avg", rows, store.images.labels[rows], batch_size=batch_size, seed=1, memory_bytes=memory
        )
    ]
    assert {len(y) for _, y in batches[:-1]} <= {batch_size}
    assert len(batches) == -(-len(rows) // batch_size)
    seen = {row.tobytes(): label for X, y in batches for row, label in zip(X, y, strict=True)}
    assert sum(len(y) for _, y in batches) == len(rows)
    assert seen == expected


def test_the_order_is_that_of_the_seed(store: FeatureStore) -> None:
    stream = stream_of(store, "train")

    def labels(seed: tuple[int, ...]) -> list[int]:
        return np.concatenate([y for _, y in stream.batches(batch_size=32, seed=seed)]).tolist()

    assert labels((0, 1)) == labels((0, 1))
    assert labels((0, 1)) != labels((0, 2))


@pytest.mark.pain(13)
def test_pain_13_a_store_sorted_by_class_gives_mixed_batches(store: FeatureStore) -> None:
    """A third of the rows fit into the window; each batch of 64 still has all six classes."""
    stream = stream_of(store, "train", memory=800_000)
    assert stream.nbytes > 3 * stream.memory_bytes // 2
    batches = [y for _, y in stream.batches(batch_size=64, seed=0)][:-1]
    assert min(len(set(y.tolist())) for y in batches) == 6
    shares = np.stack([np.bincount(y, minlength=6) for y in batches]) / 64
    # Drawn one by one the shares would vary by 0.047 around 1/6.
    assert 0.03 < shares.std() < 0.06
    thirds = np.stack([part.mean(axis=0) for part in np.array_split(shares, 3)])
    assert np.abs(thirds - 1 / 6).max() < 0.05


def test_batches_stay_as_they_are(store: FeatureStore) -> None:
    stream = stream_of(store, "train")
    kept = [(X, X.copy()) for X, _ in stream.batches(batch_size=512, seed=0)]
    for X, copy in kept:
        np.testing.assert_array_equal(X, copy)


def test_memory_for_less_than_two_batches_is_refused(store: FeatureStore) -> None:
    with pytest.raises(
        ConfigurationError, match=r"batches of 4096 rows of 64 columns need at least 4 MB; received 1 MB"
    ):
        next(stream_of(store, "train").batches(batch_size=4096, seed=0))


def test_unlabelled_rows_and_rows_out_of_order_are_refused(store: FeatureStore) -> None:
    rows = store.rows("train")
    with pytest.raises(HeadError, match="2 training rows are unlabelled"):
        next(stream_batches(store, "last.avg", rows[:9], np.array([0, -1, 1] * 3)[[0, 1, 1, 0, 0, 0, 0, 0, 0]],
                            batch_size=2, seed=0, memory_bytes=MEGABYTE))  # fmt: skip
    with pytest.raises(ConfigurationError, match="ascending row numbers, 0 to 5999"):
        FeatureStream(store, "last.avg", rows[::-1], store.images.labels[rows], MEGABYTE)
    with pytest.raises(ConfigurationError, match=r"\(4800,\) rows|expected as many"):
        FeatureStream(store, "last.avg", rows, store.images.labels[rows][1:], MEGABYTE)


# --- statistics -------------------------------------------------------------------------------------------


def test_statistics_of_one_pass_are_those_of_the_array(store: FeatureStore) -> None:
    X, _ = store.load("train")
    mean, std = column_statistics(pool_features(X, "none"))
    stream = stream_of(store, "train").standardised()
    np.testing.assert_allclose(stream.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(stream.std, std, rtol=1e-6)
    Z = np.concatenate([Z for _, Z in stream.in_order()])
    np.testing.assert_allclose(Z, (X - mean) / std, atol=1e-5)


def test_statistics_of_large_values_constant_columns_and_tensors(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    X = generator.normal(size=(300, 4, 4, 5)).astype(np.float32) + 1e4
    X[..., 2] = 0.1
    made = write_store(tmp_path / "features.h5", [X[:170], X[170:]], np.arange(300) % 2, np.zeros(300))
    for pool in ("avg", "max", "flatten"):
        mean, std = column_statistics(pool_features(X, pool))
        stream = stream_of(made, "train", pool=pool).standardised()
        np.testing.assert_allclose(stream.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(stream.std, std, rtol=1e-4)
    flat = write_store(tmp_path / "flat.h5", [np.full((9, 3), 0.1, np.float32)], np.arange(9) % 2, np.zeros(9))
    assert stream_of(flat, "train").standardised().std.tolist() == [1.0, 1.0, 1.0]


# --- training ---------------------------------------------------------------------------------------------


def standardised(store: FeatureStore, memory: int) -> tuple[FeatureStream, FeatureStream]:
    train = stream_of(store, "train", memory).standardised()
    return train, dataclasses.replace(stream_of(store, "validation", memory), mean=train.mean, std=train.std)


def test_sgd_from_pieces_is_as_accurate_as_in_memory(store: FeatureStore) -> None:
    from sklearn.linear_model import SGDClassifier

    train, validation = standardised(store, 600_000)
    parameters = {"loss": "log_loss", "alpha": 1e-3}
    found = fit_sgd_streaming(train, validation, parameters=parameters, classes=6, epochs=10, patience=0)
    X, X_validation = (over_pieces(lambda Z: Z, part) for part in (train, validation))
    in_memory = SGDClassifier(random_state=0, max_iter=10, tol=None, **parameters).fit(X, train.labels)
    accuracy = found.estimator.score(X_validation, validation.labels)
    assert accuracy >= in_memory.score(X_validation, validation.labels) - 0.005
    assert accuracy > 0.93
    best = int(np.argmin(found.history["val_loss"]))
    assert found.history["val_accuracy"][best] == pytest.approx(accuracy)
    assert found.history["epoch"] == [float(epoch) for epoch in range(1, 11)]
    assert found.temperature > 0


@pytest.mark.pain(13)
def test_pain_13_the_same_rows_in_their_order_do_not_converge(store: FeatureStore) -> None:
    """What the shuffling is for: fed class after class, the classifier knows the last one best."""
    from sklearn.linear_model import SGDClassifier

    train, validation = standardised(store, 600_000)
    naive = SGDClassifier(random_state=0, loss="log_loss", alpha=1e-3, shuffle=False)
    for _ in range(3):
        for piece, Z in train.in_order():
            naive.partial_fit(Z, train.labels[piece], classes=np.arange(6))
    found = fit_sgd_streaming(train, validation, parameters={"loss": "log_loss", "alpha": 1e-3}, classes=6, epochs=3)
    Z = over_pieces(lambda Z: Z, validation)
    assert found.estimator.score(Z, validation.labels) > naive.score(Z, validation.labels) + 0.05


def test_sgd_stops_early_and_keeps_the_best_epoch(store: FeatureStore) -> None:
    train, validation = standardised(store, 600_000)
    seen: list[int] = []
    found = fit_sgd_streaming(
        train,
        validation,
        parameters={"learning_rate": "constant", "eta0": 0.5},
        classes=6,
        epochs=50,
        patience=2,
        progress=lambda stage, done, total: seen.append(done),
    )
    losses = found.history["val_loss"]
    assert len(losses) < 50
    assert seen == list(range(1, len(losses) + 1))
    assert int(np.argmin(losses)) == len(losses) - 3
    accuracy = found.estimator.score(over_pieces(lambda Z: Z, validation), validation.labels)
    assert accuracy == pytest.approx(found.history["val_accuracy"][-3])


def test_two_classes_and_no_validation(tmp_path: Path) -> None:
    made = sorted_store(tmp_path / "features.h5", count=2000, classes=2, gap=4.0)
    train, validation = standardised(made, MEGABYTE)
    found = fit_sgd_streaming(train, None, classes=2, epochs=2)
    assert found.history == {"epoch": [1.0, 2.0]}
    assert found.estimator.score(over_pieces(lambda Z: Z, validation), validation.labels) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 6])
def test_keras_from_pieces_is_as_accurate_as_fit(tmp_path: Path, classes: int) -> None:
    import keras

    made = sorted_store(tmp_path / "features.h5", classes=classes, gap=3.2 if classes > 2 else 2.5)
    train, validation = standardised(made, 600_000)

    def network():
        keras.utils.set_random_seed(0)
        outputs = 1 if classes == 2 else classes
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(outputs, kernel_initializer="zeros")])
        losses = keras.losses
        loss = losses.BinaryCrossentropy if classes == 2 else losses.SparseCategoricalCrossentropy
        model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=loss(from_logits=True))
        return model

    model = network()
    history = fit_keras_streaming(model, train, validation, epochs=8, patience=0, batch_size=64)
    X, X_validation = (over_pieces(lambda Z: Z, part) for part in (train, validation))
    reference = network()
    log = reference.fit(X, train.labels, batch_size=64, epochs=8, verbose=0).history

    def accuracy(fitted) -> float:
        outputs = keras.ops.convert_to_numpy(fitted(X_validation))
        predicted = (outputs[:, 0] > 0) if classes == 2 else outputs.argmax(axis=1)
        return float(np.mean(predicted == validation.labels))

    assert abs(accuracy(model) - accuracy(reference)) <= 0.005
    assert accuracy(model) == history["val_accuracy"][int(np.argmin(history["val_loss"]))]
    np.testing.assert_allclose(history["loss"], log["loss"], rtol=0.05)


@pytest.mark.slow
def test_keras_that_diverges_is_an_error(store: FeatureStore) -> None:
    import keras

    train, validation = standardised(store, MEGABYTE)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(6)])
    model.compile(optimizer=keras.optimizers.SGD(1e38), loss=keras.losses.SparseCategoricalCrossentropy(True))
    with pytest.raises(HeadError, match="diverged in epoch 1"):
        fit_keras_streaming(model, train, validation, epochs=2, patience=1, batch_size=64)


MEASURED = """
import json, re, sys
from pathlib import Path
import sklearn.linear_model
from test_streaming import standardised
from features.store import FeatureStore
from pipeline.streaming import fit_sgd_streaming

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

store = FeatureStore.open(sys.argv[1])
_ = store.images, store.rows("train")
before = peak()
train, validation = standardised(store, int(sys.argv[2]))
found = fit_sgd_streaming(train, validation, parameters={"alpha": 1e-4}, classes=10, epochs=2)
print(json.dumps([peak() - before, max(found.history["val_accuracy"])]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_400_mb_store_is_trained_within_50_mb(tmp_path: Path) -> None:
    """The budget, and 50 MB for what scikit-learn and the reading of rows need beside it."""
    generator = np.random.default_rng(0)
    labels = np.arange(80_000) // 8_000
    centres = generator.normal(size=(10, 1280)).astype(np.float32)
    centres *= 3.6 / np.linalg.norm(centres, axis=1, keepdims=True)
    blocks = (generator.standard_normal((8_000, 1280), dtype=np.float32) + centres[label] for label in range(10))

    class Blocks(list):
        def __iter__(self):
            yield self[0]
            yield from blocks

    first = next(blocks)
    made = write_store(tmp_path / "features.h5", Blocks([first]), labels, (generator.random(80_000) < 0.1).astype(int))
    assert made.path.stat().st_size > 400_000_000
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(made.path), str(50 * MEGABYTE)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    grown, accuracy = json.loads(result.stdout)
    assert grown < 100 * MEGABYTE
    X, y = made.load("train")
    X_validation, y_validation = made.load("validation")

    from sklearn.linear_model import SGDClassifier

    in_memory = SGDClassifier(random_state=0, alpha=1e-4, max_iter=2, tol=None).fit(X, y)
    assert accuracy >= in_memory.score(X_validation, y_validation) - 0.005
