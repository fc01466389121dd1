"""The bank of heads: equal to Keras's fit, to heads trained alone, and the same in however many pieces."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import part

from features.errors import ConfigurationError, HeadError
from pipeline.heads import bank
from pipeline.heads.bank import BankHead, BankResult, BankSpec, initial_weights, predict, train_bank
from pipeline.heads.bank_math import SLOPES, draws
from pipeline.heads.prepared import row_order
from pipeline.presets import DenseParameters
from pipeline.scores.metrics import softmax

RATES = [BankHead(1e-3), BankHead(1e-2, weight_decay=1e-2, seed=1, label_smoothing=0.1), BankHead(3e-3, 0.3, seed=2)]


def blobs(rows: int, columns: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping Gaussians around corners that do not depend on the seed."""
    corners = 0.3 * np.random.default_rng(99).normal(size=(classes, columns))
    generator = np.random.default_rng(seed)
    y = generator.integers(0, classes, rows).astype(np.int32)
    return (corners[y] + generator.normal(size=(rows, columns))).astype(np.float32), y


def keras_fit(spec: BankSpec, head: BankHead, X: np.ndarray, y: np.ndarray) -> tuple[Any, list[float]]:
    """The same head by ``fit``: same initial values, same batches."""
    import keras

    layers = [keras.layers.Dense(spec.hidden, activation=spec.activation)] if spec.hidden else []
    model = keras.Sequential([keras.Input(X.shape[1:]), *layers, keras.layers.Dense(spec.outputs)])
    model.set_weights(initial_weights(spec, head.seed, X.shape[1]))
    loss = keras.losses.BinaryCrossentropy if spec.outputs == 1 else keras.losses.CategoricalCrossentropy
    model.compile(
        optimizer=keras.optimizers.Adam(head.learning_rate, weight_decay=head.weight_decay or None),
        loss=loss(from_logits=True, label_smoothing=head.label_smoothing),
    )
    targets = y[:, None].astype(np.float32) if spec.outputs == 1 else np.eye(spec.classes, dtype=np.float32)[y]
    weights = np.ones(len(y), np.float32) if spec.class_weights is None else np.array(spec.class_weights, np.float32)[y]
    losses = []
    for epoch in range(spec.epochs):
        order = row_order(spec.order_seed, epoch, len(X))
        log = model.fit(
            X[order],
            targets[order],
            sample_weight=weights[order],
            shuffle=False,
            batch_size=spec.batch_size,
            verbose=0,
        )
        losses.append(log.history["loss"][0])
    return model, losses


def keras_probabilities(model: Any, X: np.ndarray) -> np.ndarray:
    logits = np.asarray(model(X), np.float64)
    return softmax(np.hstack([np.zeros_like(logits), logits]) if logits.shape[1] == 1 else logits)


def apart(one: BankResult, other: BankResult) -> float:
    """Greatest difference between weights."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one.weights, other.weights, strict=True))


# ------------------------------------------------------------------------------------------------ without Keras
def test_order_comes_from_the_seed_and_the_epoch() -> None:
    assert row_order(0, 0, 6).tolist() == [0, 5, 1, 2, 4, 3]
    assert row_order(0, 1, 6).tolist() != row_order(0, 0, 6).tolist() != row_order(1, 0, 6).tolist()
    assert sorted(row_order(7, 3, 1000)) == list(range(1000))


def test_initial_values_come_from_the_seed() -> None:
    spec = BankSpec(classes=3, hidden=4)
    kernel, bias, last, last_bias = initial_weights(spec, 5, 20)
    assert np.abs(kernel).max() <= np.sqrt(6 / 24)
    assert kernel.std() == pytest.approx(np.sqrt(2 / 24), rel=0.2)
    assert not bias.any()
    assert not last.any()
    assert not last_bias.any()
    assert (last.shape, last_bias.shape) == ((4, 3), (3,))
    assert (initial_weights(spec, 5, 20)[0] == kernel).all()
    assert (initial_weights(spec, 6, 20)[0] != kernel).all()
    assert [part.shape for part in initial_weights(BankSpec(classes=2), 5, 20)] == [(20, 1), (1,)]


def test_activations_are_those_of_dense_heads() -> None:
    assert set(SLOPES) == set(DenseParameters.model_fields["activation"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BankHead(learning_rate=0), "learning_rate: received 0, expected a number above 0"),
        (lambda: BankHead(learning_rate=float("nan")), "learning_rate: received nan"),
        (lambda: BankHead(weight_decay=-1), "weight_decay: received -1"),
        (lambda: BankHead(feature_noise=float("inf")), "feature_noise: received inf"),
        (lambda: BankHead(label_smoothing=1.5), "label_smoothing: received 1.5, expected a number from 0 to 1"),
        (lambda: BankHead(dropout=1.0), "dropout: received 1.0, expected 0 <= rate < 1"),
        (lambda: BankHead(dropout=(0.0, -0.1)), r"dropout: received \(0.0, -0.1\)"),
        (lambda: BankHead(seed=2**32), "seed: received 4294967296"),
        (lambda: BankSpec(classes=1), "classes: received 1, expected 2 or more"),
        (lambda: BankSpec(classes=2, epochs=0), "epochs: received 0, expected 1 or more"),
        (lambda: BankSpec(classes=2, activation="relo"), "activation: received relo, .*did you mean 'relu'"),
        (
            lambda: BankSpec(classes=3, class_weights=(1.0, 2.0)),
            "class_weights: .*expected 3 finite numbers of 0 or more",
        ),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.zeros((4, 2))}, "training rows: received float64"),
        ({"X": np.zeros((4, 2, 2), np.float32)}, r"training rows: received float32 \(4, 2, 2\)"),
        ({"X": np.zeros((0, 2), np.float32), "y": np.zeros(0, int)}, "training rows"),
        ({"X": np.full((4, 2), np.nan, np.float16)}, "training rows: 4 of 4 hold values that are not finite"),
        ({"y": np.array([0, 1, 2])}, r"with labels \(3,\)"),
        ({"y": np.array([0, 1, 2, 3])}, "training labels: .*from 0 to 3, expected integers from 0 to 2"),
        ({"y": np.array([0, 1, -1, 0])}, "training labels: .*from -1 to 1"),
        ({"y": np.array([0.0, 1, 1, 0])}, "training labels: received float64"),
        ({"X_validation": np.zeros((4, 3), np.float32), "y_validation": np.zeros(4, int)}, "3 columns, expected 2"),
        ({"heads": []}, "heads: received none, expected at least one"),
        ({"heads": [BankHead(dropout=(0.1, 0.2))]}, r"dropout: received \(0.1, 0.2\), expected 1 rates"),
        (
            {"memory_bytes": 100},
            r"memory: 0\.0001 MB are left for training, but one such head needs 0\.\d+ MB; give more \(--memory\)",
        ),
    ],
)
def test_bad_data_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "heads": [BankHead()],
        "X": np.zeros((4, 2), np.float32),
        "y": np.array([0, 1, 2, 0]),
    } | change
    with pytest.raises((ConfigurationError, HeadError), match=message):
        train_bank(BankSpec(classes=3), **given)


# ------------------------------------------------------------------------------------------------ Keras's fit
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        {"classes": 4},
        {"classes": 4, "class_weights": (1.0, 2.0, 0.5, 3.0)},
        {"classes": 2, "class_weights": (1.0, 2.0)},
        {"classes": 4, "hidden": 16, "class_weights": (1.0, 2.0, 0.5, 3.0)},
        {"classes": 2, "hidden": 8, "activation": "gelu", "batch_size": 300},
    ],
)
def test_without_dropout_a_head_is_that_of_fit(shape: dict[str, Any]) -> None:
    spec = BankSpec(**{"epochs": 5, "order_seed": 3, **shape})
    X, y = blobs(205, 20, spec.classes)  # the last batch has 13 rows
    others = blobs(77, 20, spec.classes, seed=1)[0]
    for head, result in zip(RATES, train_bank(spec, RATES, X, y), strict=True):
        model, losses = keras_fit(spec, head, X, y)
        expected = keras_probabilities(model, others)
        assert predict(spec, result, others) == pytest.approx(expected, abs=1e-3)
        assert result.history["loss"] == pytest.approx(losses, abs=1e-4)
        assert losses[-1] < losses[0]  # something was learnt
        assert result.best_epoch == 5


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0, 16])
def test_at_a_high_learning_rate_the_first_epoch_is_that_of_fit(hidden: int) -> None:
    spec, head = BankSpec(classes=4, hidden=hidden, epochs=1), BankHead(0.3, weight_decay=0.1)
    X, y = blobs(205, 20, 4)
    model, _ = keras_fit(spec, head, X, y)
    (result,) = train_bank(spec, [head], X, y)
    for ours, theirs in zip(result.weights, model.get_weights(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOPES)
def test_slopes_are_those_of_the_activations(name: str) -> None:
    import keras

    z = np.linspace(-4, 4, 80)
    function = getattr(keras.activations, name)
    expected = (np.asarray(function(z + 1e-5)) - np.asarray(function(z - 1e-5))) / 2e-5
    assert np.asarray(SLOPES[name](keras.ops.convert_to_tensor(z, "float32"))) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------ neighbours
def varied(hidden: int) -> list[BankHead]:
    """Heads that differ in everything, some of them sharing inputs."""
    rates: list[Any] = [0.0, 0.3, (0.2, 0.5), (0.2, 0.0)] if hidden else [0.0, 0.3, 0.5, 0.3]
    return [
        BankHead(
            1e-3 * (1 + k), 1e-3 * k, rates[k % 4], seed=k % 3, label_smoothing=0.02 * k, feature_noise=0.1 * (k % 2)
        )
        for k in range(10)
    ]


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize("hidden", part([0, 12], 12))
def test_a_head_does_not_depend_on_its_neighbours(hidden: int) -> None:
    spec, heads = BankSpec(classes=4, hidden=hidden, epochs=6), varied(hidden)
    X, y = blobs(150, 20, 4)
    together = train_bank(spec, heads, X, y)
    others = blobs(77, 20, 4, seed=1)[0]
    for k in (0, 1, 2, 5, 9):
        (alone,) = train_bank(spec, [heads[k]], X, y)
        assert predict(spec, together[k], others) == pytest.approx(predict(spec, alone, others), abs=1e-3)
        assert apart(together[k], alone) < 1e-4
    assert min(apart(together[a], together[b]) for a in range(10) for b in range(a)) > 1e-3  # they are ten heads


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize("hidden", part([0, 12], 12))
def test_pieces_change_nothing(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in turn, several chunks, rows sent in several parts."""
    spec, heads = BankSpec(classes=4, hidden=hidden, epochs=4, patience=1), varied(hidden)
    X, y = blobs(150, 20, 4)
    held_out = blobs(60, 20, 4, seed=1)
    whole = train_bank(spec, heads, X, y, *held_out)
    told: list[tuple[str, int, int]] = []
    one = 120_000 if hidden else 26_000
    monkeypatch.setattr(bank, "ROWS_BYTES", 2 * 32 * 20 * 4)
    monkeypatch.setattr(bank, "VALIDATION_ROWS", 25)
    monkeypatch.setattr(bank, "CACHE_BYTES", 3 * 12 * 22 * max(4, hidden))
    pieces = train_bank(spec, heads, X, y, *held_out, memory_bytes=4 * one, progress=lambda *words: told.append(words))
    turns = told[0][2] // spec.epochs
    assert 1 < turns < 10
    assert told[-1][0] == "train-head"
    assert told[-1][1] <= told[-1][2]
    for a, b in zip(whole, pieces, strict=True):
        assert apart(a, b) < 1e-4
        assert a.best_epoch == b.best_epoch
        assert a.history == {name: pytest.approx(values, abs=1e-4) for name, values in b.history.items()}


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize("hidden", part([0, 12], 12))
def test_each_head_stops_by_itself(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "CACHE_BYTES", 2 * 12 * 32 * max(4, hidden))  # so that chunks are packed anew
    taken, take = [], bank._Bank._taken

    def taken_once_more(self: bank._Bank, kind: int) -> dict[int, list[np.ndarray]]:
        taken.append(kind)
        return take(self, kind)

    monkeypatch.setattr(bank._Bank, "_taken", taken_once_more)
    spec = BankSpec(classes=4, hidden=hidden, epochs=25, patience=4)
    heads = [BankHead(rate, dropout=0.2, seed=k % 2) for k, rate in enumerate(np.geomspace(2e-3, 3e-2, 7))]
    X, y = blobs(90, 30, 4)
    held_out = blobs(80, 30, 4, seed=1)
    together = train_bank(spec, heads, X, y, *held_out)
    assert len(taken) > 4  # not only at the end
    assert len({len(result.history["epoch"]) for result in together}) > 2
    for head, result in zip(heads, together, strict=True):
        (alone,) = train_bank(spec, [head], X, y, *held_out)
        losses, epochs = result.history["val_loss"], len(result.history["epoch"])
        assert result.best_epoch == alone.best_epoch == int(np.argmin(losses)) + 1
        assert epochs == min(25, result.best_epoch + 4) == len(alone.history["epoch"])
        assert result.history["epoch"] == [float(epoch + 1) for epoch in range(epochs)]
        assert apart(result, alone) < 1e-4
        # what is kept is what the best epoch left, and is scored right
        (shorter,) = train_bank(dataclasses.replace(spec, epochs=result.best_epoch), [head], X, y)
        assert apart(result, shorter) < 1e-4
        probabilities = predict(spec, result, held_out[0])
        chances = probabilities[np.arange(80), held_out[1]]
        assert losses[result.best_epoch - 1] == pytest.approx(-np.log(chances).mean(), abs=1e-5)
        accuracy = float((probabilities.argmax(axis=1) == held_out[1]).mean())
        assert result.history["val_accuracy"][result.best_epoch - 1] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.slow
def test_early_stopping_is_that_of_keras() -> None:
    import keras

    spec, head = BankSpec(classes=2, epochs=30, patience=2), BankHead(2e-2)
    X, y = blobs(100, 30, 2)
    X_validation, y_validation = blobs(80, 30, 2, seed=1)
    (result,) = train_bank(spec, [head], X, y, X_validation, y_validation)
    model, _ = keras_fit(dataclasses.replace(spec, epochs=1), dataclasses.replace(head, learning_rate=1e-9), X, y)
    stopper = keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True)
    stopper.set_model(model)
    stopper.on_train_begin()
    model.stop_training = False
    for epoch, loss in enumerate(result.history["val_loss"]):
        assert not model.stop_training
        stopper.on_epoch_end(epoch, {"val_loss": loss})
    assert model.stop_training
    assert stopper.best_epoch + 1 == result.best_epoch < len(result.history["epoch"]) < 30
    guessed = predict(spec, result, X_validation).argmax(axis=1) == y_validation
    assert result.history["val_accuracy"][result.best_epoch - 1] == pytest.approx(guessed.mean())


@pytest.mark.slow
def test_one_that_diverges_does_not_harm_the_others() -> None:
    spec = BankSpec(classes=3, epochs=4)
    X, y = blobs(100, 10, 3)
    held_out = blobs(40, 10, 3, seed=1)
    fine, lost = train_bank(spec, [BankHead(1e-3), BankHead(1e37)], X, y, *held_out)
    (alone,) = train_bank(spec, [BankHead(1e-3)], X, y, *held_out)
    assert apart(fine, alone) < 1e-5
    assert fine.best_epoch == 4
    assert not np.isfinite(lost.history["loss"][-1])
    assert len(lost.history["loss"]) == 1
    assert lost.best_epoch == 0
    assert not any(part.any() for part in lost.weights)


# ------------------------------------------------------------------------------------------------ randomness
@pytest.mark.slow
def test_draws_depend_on_seed_and_step_only() -> None:
    seeds = np.array([0, 1, 2**32 - 1], np.uint32).view(np.int32)
    all_of_them = np.asarray(draws(seeds, np.int32(7), 2, 5, 9))
    assert (np.asarray(draws(seeds[2:], np.int32(7), 2, 5, 9))[0] == all_of_them[2]).all()
    assert (np.asarray(draws(seeds, np.int32(7), 2, 3, 4)) == all_of_them[:, :3, :4]).all()
    for other in (draws(seeds, np.int32(8), 2, 5, 9), draws(seeds, np.int32(7), 3, 5, 9)):
        assert (np.asarray(other) != all_of_them).all()
    # frozen: other numbers are another training
    assert (all_of_them[:, 0, 0] * 2**24).astype(int).tolist() == [3683304, 8702413, 14141198]


@pytest.mark.slow
def test_draws_look_random() -> None:
    seeds = np.arange(4, dtype=np.int32)
    values = np.stack([np.asarray(draws(seeds, np.int32(step), 2, 32, 500)) for step in range(20)])
    assert values.min() >= 0
    assert values.max() < 1
    flat = values.reshape(20, 4, 32, 500)
    counts = np.histogram(flat, bins=50, range=(0, 1))[0]
    assert (np.square(counts - flat.size / 50) / (flat.size / 50)).sum() < 100  # chi square with 49 degrees of freedom
    for axis in range(4):  # steps, seeds, rows, columns next to each other
        count = flat.size * (flat.shape[axis] - 1) / flat.shape[axis]
        first, second = (
            np.take(flat, np.arange(flat.shape[axis])[part], axis).ravel() for part in (slice(1, None), slice(-1))
        )
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(count)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0, 5])
def test_dropout_and_noise_by_hand(hidden: int) -> None:
    """Two epochs with everything switched on, in NumPy and float64."""
    from scipy.special import ndtri

    spec = BankSpec(classes=3, hidden=hidden, epochs=2, batch_size=16, order_seed=4)
    rates = (0.3, 0.4) if hidden else (0.3,)
    head = BankHead(1e-2, 1e-2, dropout=rates, seed=11, label_smoothing=0.1, feature_noise=0.5)
    X, y = blobs(40, 6, 3)
    (result,) = train_bank(spec, [head], X, y)
    first = initial_weights(spec, 11, 6)
    kernels = [np.vstack(layer).astype(float) for layer in zip(first[::2], first[1::2], strict=True)]
    means, squares = ([np.zeros_like(kernel) for kernel in kernels] for _ in range(2))
    step, total = 0, 0.0
    for epoch in range(2):
        order, total = row_order(4, epoch, 40), 0.0
        for start in (0, 16, 32):
            rows = order[start : start + 16]
            noise, kept, kept_units = (
                np.asarray(draws(np.array([11], np.int32), np.int32(step), purpose, 16, columns))[0, : len(rows)]
                for purpose, columns in ((1, 6), (2, 6), (3, hidden))
            )
            x = with_ones((X[rows] + 0.5 * ndtri(noise.astype(float) + 2.0**-25)) * (kept >= 0.3) / 0.7)
            values, mask = x @ kernels[0], (kept_units >= 0.4) / 0.6
            last = with_ones(np.maximum(values, 0) * mask) if hidden else x
            target = 0.9 * np.eye(3)[y[rows]] + 0.1 / 3
            chances = softmax(last @ kernels[-1])
            total -= (target * np.log(chances)).sum() / 40
            slope = (chances - target) / len(rows)
            slopes = [last.T @ slope]
            if hidden:
                slopes.insert(0, x.T @ (slope @ kernels[1][:-1].T * mask * (values > 0)))
            step += 1
            for kernel, mean, square, g in zip(kernels, means, squares, slopes, strict=True):
                mean += 0.1 * (g - mean)
                square += 0.001 * (g**2 - square)
                kernel *= 1 - 1e-4
                kernel -= 1e-2 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * mean / (np.sqrt(square) + 1e-7)
    for kernel, weights, bias in zip(kernels, result.weights[::2], result.weights[1::2], strict=True):
        assert weights == pytest.approx(kernel[:-1], abs=1e-5)
        assert bias == pytest.approx(kernel[-1], abs=1e-5)
    assert result.history["loss"][-1] == pytest.approx(total, abs=1e-5)


def with_ones(x: np.ndarray) -> np.ndarray:
    return np.hstack([x, np.ones((len(x), 1))])


# ------------------------------------------------------------------------------------------------ rows
@pytest.mark.slow
def test_a_read_only_float16_map_is_its_float32_copy(tmp_path: Path) -> None:
    X, y = blobs(100, 10, 3)
    np.save(tmp_path / "X.npy", X.astype(np.float16))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    spec = BankSpec(classes=3, epochs=3)
    (half,) = train_bank(spec, RATES[:1], mapped, y, mapped[:20], y[:20])
    (full,) = train_bank(spec, RATES[:1], np.array(mapped, np.float32), y, np.array(mapped[:20], np.float32), y[:20])
    assert apart(half, full) == 0
    assert half.history == full.history
    assert (mapped == X.astype(np.float16)).all()


@pytest.mark.slow
def test_the_order_seed_matters_and_the_same_seed_is_the_same_training() -> None:
    X, y = blobs(100, 10, 3)
    first, again, other = (train_bank(BankSpec(classes=3, epochs=2, order_seed=s), RATES, X, y)[1] for s in (0, 0, 1))
    assert apart(first, again) == 0
    assert apart(first, other) > 1e-4
