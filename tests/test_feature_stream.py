"""A store read in pieces: every row once, mixed, the statistics of all rows, and classifiers that learn from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import extract, paint_folder
from test_streaming import MEGABYTE, sgd, sorted_store, standardised, stream_of, write_store

from features.errors import ConfigurationError, HeadError, IntegrityError
from features.store.reader import FeatureStore
from pipeline.heads.pooling import column_statistics, pool_features
from pipeline.heads.streaming import FeatureStream, fit_sgd_streaming
from pipeline.scores.metrics import fit_temperature

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]  # stores of tens of megabytes


def whole(stream: FeatureStream) -> np.ndarray:
    return np.concatenate([Z for _, Z in stream.pieces()])


def batches(stream: FeatureStream, size: int, seed: int = 0, epoch: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(X[:, 0], y) for X, y in stream.epoch(epoch, size=size, seed=seed)]


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
        batches(stream_of(opened, "train"), 10)


def test_a_sharded_store_streams_the_same(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"a": 20, "b": 25})
    packed = extract(source, tmp_path / "packed.h5").store
    sharded = extract(source, tmp_path / "sharded.h5", layout="sharded").store
    first, second = (batches(stream_of(made, "train"), 7, seed=3) for made in (packed, sharded))
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
    made = batches(stream_of(store, "train", memory), batch_size, seed=1)
    assert {len(y) for _, y in made[:-1]} <= {batch_size}
    assert len(made) == -(-len(rows) // batch_size)
    seen = {row.tobytes(): label for X, y in made for row, label in zip(X, y, strict=True)}
    assert sum(len(y) for _, y in made) == len(rows)
    assert seen == expected


def test_the_order_is_that_of_the_seed(store: FeatureStore) -> None:
    stream = stream_of(store, "train")

    def labels(seed: int, epoch: int) -> list[int]:
        return np.concatenate([y for _, y in batches(stream, 32, seed, epoch)]).tolist()

    assert labels(0, 1) == labels(0, 1)
    assert labels(0, 1) != labels(0, 2)
    assert labels(0, 1) != labels(1, 1)


@pytest.mark.pain(13)
def test_pain_13_a_store_sorted_by_class_gives_mixed_batches(store: FeatureStore) -> None:
    """A third of the rows fit into the window; each batch of 64 still has all six classes."""
    stream = stream_of(store, "train", memory=800_000)
    assert stream.nbytes > 3 * stream.memory_bytes // 2
    labels = [y for _, y in batches(stream, 64)][:-1]
    assert min(len(set(y.tolist())) for y in labels) == 6
    shares = np.stack([np.bincount(y, minlength=6) for y in labels]) / 64
    # Drawn one by one the shares would vary by 0.047 around 1/6.
    assert 0.03 < shares.std() < 0.06
    thirds = np.stack([part.mean(axis=0) for part in np.array_split(shares, 3)])
    assert np.abs(thirds - 1 / 6).max() < 0.05


def test_batches_stay_as_they_are(store: FeatureStore) -> None:
    stream = stream_of(store, "train")
    kept = [(X, X.copy()) for X, _ in batches(stream, 512)]
    for X, copy in kept:
        np.testing.assert_array_equal(X, copy)


def test_memory_for_less_than_four_batches_is_refused(store: FeatureStore) -> None:
    with pytest.raises(
        ConfigurationError, match=r"batches of 4096 rows of 64 columns need at least 4\.19 MB; received 1\.05 MB"
    ):
        batches(stream_of(store, "train"), 4096)
    stream = stream_of(store, "train")
    assert stream.at_once == 256
    assert len(batches(stream, stream.at_once)) == -(-len(stream) // 256)


def test_unlabelled_rows_and_rows_out_of_order_are_refused(store: FeatureStore) -> None:
    rows = store.rows("train")
    with pytest.raises(HeadError, match="2 training rows are unlabelled"):
        batches(FeatureStream(store, "last.avg", rows[:9], np.array([0, -1, -1, 0, 0, 0, 0, 0, 0]), MEGABYTE), 2)
    with pytest.raises(ConfigurationError, match="ascending row numbers from 0 to 5999"):
        FeatureStream(store, "last.avg", rows[::-1], store.images.labels[rows], MEGABYTE)
    with pytest.raises(ConfigurationError, match=r"labels: received \(\d+,\), expected \(\d+,\)"):
        FeatureStream(store, "last.avg", rows, store.images.labels[rows][1:], MEGABYTE)


# --- statistics -------------------------------------------------------------------------------------------


def test_statistics_of_one_pass_are_those_of_the_array(store: FeatureStore) -> None:
    X, _ = store.load("train")
    mean, std = column_statistics([pool_features(X, "none")], X.shape[-1])
    stream, _ = standardised(store)
    np.testing.assert_allclose(stream.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(stream.std, std, rtol=1e-6)
    np.testing.assert_allclose(whole(stream), (X - mean) / std, atol=1e-5)
    regrouped = [*stream.pieces(1000)]
    assert [piece.stop - piece.start for piece, _ in regrouped] == [1000] * 4 + [len(X) - 4000]
    np.testing.assert_array_equal(np.concatenate([Z for _, Z in regrouped]), whole(stream))


def test_statistics_of_large_values_constant_columns_and_tensors(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    X = generator.normal(size=(300, 4, 4, 5)).astype(np.float32) + 1e4
    X[..., 2] = 0.1
    made = write_store(tmp_path / "features.h5", [X[:170], X[170:]], np.arange(300) % 2, np.zeros(300))
    for pool in ("avg", "max", "flatten"):
        pooled = pool_features(X, pool)
        mean, std = column_statistics([pooled], pooled.shape[1])
        found = stream_of(made, "train", pool=pool).statistics()
        np.testing.assert_allclose(found[0], mean, rtol=1e-6)
        np.testing.assert_allclose(found[1], std, rtol=1e-4)
    flat = write_store(tmp_path / "flat.h5", [np.full((9, 3), 0.1, np.float32)], np.arange(9) % 2, np.zeros(9))
    assert stream_of(flat, "train").statistics()[1].tolist() == [1.0, 1.0, 1.0]


# --- training ---------------------------------------------------------------------------------------------


def test_sgd_from_pieces_is_as_accurate_as_in_memory(store: FeatureStore) -> None:
    train, validation = standardised(store, 600_000)
    parameters = {"loss": "log_loss", "alpha": 1e-3}
    found = fit_sgd_streaming(sgd(**parameters), train, validation, classes=6, epochs=5, patience=0)
    X, X_validation = whole(train), whole(validation)
    in_memory = sgd(max_iter=5, tol=None, **parameters).fit(X, train.labels)
    accuracy = found.estimator.score(X_validation, validation.labels)
    assert accuracy >= in_memory.score(X_validation, validation.labels) - 0.005
    assert accuracy > 0.93
    best = int(np.argmin(found.history["val_loss"]))
    assert found.history["val_accuracy"][best] == pytest.approx(accuracy)
    assert found.history["epoch"] == [float(epoch) for epoch in range(1, 6)]
    assert found.temperature > 0


@pytest.mark.parametrize("size", [8, 1024])
def test_averages_over_partial_fits_are_those_of_one_fit(store: FeatureStore, size: int) -> None:
    """Across partial fits scikit-learn's own average goes wrong, the more the smaller they are."""
    train, validation = standardised(store, 64 * MEGABYTE)
    parameters = {"loss": "log_loss", "alpha": 0.03, "average": True}
    found = fit_sgd_streaming(sgd(**parameters), train, validation, classes=6, epochs=2, patience=0, batch_size=size)
    in_memory = sgd(max_iter=2, tol=None, **parameters).fit(whole(train), train.labels)
    _, loss = fit_temperature(in_memory.decision_function(whole(validation)), validation.labels)
    assert min(found.history["val_loss"]) == pytest.approx(loss, abs=0.006)
    assert found.history["val_loss"][-1] == pytest.approx(loss, abs=0.006)
    assert found.estimator.average is True


@pytest.mark.pain(13)
def test_pain_13_the_same_rows_in_their_order_do_not_converge(store: FeatureStore) -> None:
    """What the shuffling is for: fed class after class, the classifier knows the last one best."""
    train, validation = standardised(store, 600_000)
    naive = sgd(loss="log_loss", alpha=1e-3, shuffle=False)
    for _ in range(3):
        for piece, Z in train.pieces():
            naive.partial_fit(Z, train.labels[piece], classes=np.arange(6))
    found = fit_sgd_streaming(sgd(loss="log_loss", alpha=1e-3), train, validation, classes=6, epochs=3)
    Z = whole(validation)
    assert found.estimator.score(Z, validation.labels) > naive.score(Z, validation.labels) + 0.05


def test_sgd_stops_early_and_keeps_the_best_epoch(store: FeatureStore) -> None:
    train, validation = standardised(store, 600_000)
    seen: list[int] = []
    found = fit_sgd_streaming(
        sgd(learning_rate="constant", eta0=0.5),
        train,
        validation,
        classes=6,
        epochs=50,
        patience=2,
        progress=lambda stage, done, total: seen.append(done),
    )
    losses = found.history["val_loss"]
    assert len(losses) < 50
    assert seen == list(range(1, len(losses) + 1))
    assert int(np.argmin(losses)) == len(losses) - 3
    accuracy = found.estimator.score(whole(validation), validation.labels)
    assert accuracy == pytest.approx(found.history["val_accuracy"][-3])


def test_two_classes_and_no_validation(tmp_path: Path) -> None:
    made = sorted_store(tmp_path / "features.h5", count=2000, classes=2, gap=4.0)
    train, validation = standardised(made, MEGABYTE)
    found = fit_sgd_streaming(sgd(), train, None, classes=2, epochs=2)
    assert found.history == {"epoch": [1.0, 2.0]}
    assert found.estimator.score(whole(validation), validation.labels) > 0.9
