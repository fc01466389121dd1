"""Stage three on a small network: settings, augmentation on the fly, training from scratch, and the parity gate."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import SIZE, TRAIN, TinyWorld, save_network, tiny_world, weights_of_run
from helpers import listing

import pipeline.runs.writing
from features.canonical import digest_of
from features.errors import ConfigurationError, ParityError, RunError
from features.networks.backend import _is_news
from features.pixels.views import decode_views
from features.store.reader import FeatureStore
from pipeline.cli import main
from pipeline.heads.kinds import head_of
from pipeline.runs.folder import Run, read_predictions
from pipeline.stages import finetune as stage
from pipeline.stages.train_head import train_head
from pipeline.tuning.endtoend import PIXELS, network_of, split_for_training
from pipeline.tuning.settings import TuningSettings, learning_rate, settings_of
from pipeline.tuning.training import Tail

tiny = tiny_world


# --------------------------------------------------------------------------------------------------- settings
def test_ids_of_older_runs_hold_and_new_settings_change_them() -> None:
    usual = settings_of({}).described()
    assert usual == {  # what a run's id was made of when these were all the settings there were
        "unfreeze": "last-block",
        "bn": "frozen",
        "epochs": 5,
        "patience": 2,
        "learning_rate": 1e-5,
        "batch_size": 32,
        "seed": 0,
    }
    assert settings_of({"augment": "none", "schedule": "constant", "unfreeze": "last-block"}).described() == usual
    changes: list[dict[str, Any]] = [
        {"unfreeze": 100},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9},
        {"schedule": "cosine"},
        {"warmup_epochs": 1},
        {"augment": "flip"},
        {"augment": {"horizontal_flip": True, "rotation_degrees": 10}},
        {"scratch": True},
        {"new_head": True},
        {"scratch": True, "bn": "train"},
        {"class_weight": "balanced"},
        {"initial_epoch": 10},
        {"weight_decay": 1e-3},
        {"mixed_precision": True},
        {"patience": 0},
    ]
    digests = {digest_of(settings_of(values).described()) for values in [{}, *changes]}
    assert len(digests) == len(changes) + 1
    by_name, by_fields = settings_of({"augment": "flip"}), settings_of({"augment": {"horizontal_flip": True}})
    assert by_name.described() == by_fields.described()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learnin_rate": 0.1}, "unknown key 'learnin_rate'; did you mean 'learning_rate'"),
        ({"learning_rate": 0}, "learning_rate: received 0, expected greater than 0|to be greater than 0"),
        ({"epochs": 0}, "epochs: received 0"),
        ({"batch_size": 5000}, "batch_size: received 5000"),
        ({"optimizer": "adamw"}, "optimizer: received 'adamw', expected 'adam', 'rmsprop' or 'sgd'"),
        ({"bn": "train"}, "from scratch"),
        ({"scratch": True, "unfreeze": "3"}, "received '3' with --scratch"),
        ({"momentum": 0.9}, "--optimizer sgd or rmsprop"),
        ({"optimizer": "sgd", "nesterov": True}, "momentum above 0"),
        ({"augment": "flips"}, "received 'flips', expected one of none, flip, .*did you mean"),
        ({"augment": {"rotation": 3}}, "augmentation has no field 'rotation'; did you mean"),
    ],
)
def test_settings_that_are_wrong_or_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settings_of(values)


def test_the_learning_rate_warms_up_and_falls() -> None:
    settings = TuningSettings(learning_rate=0.1, epochs=3, warmup_epochs=1, schedule="cosine")
    rates = [learning_rate(settings, step, 4) for step in range(12)]
    np.testing.assert_allclose(rates[:5], [0.025, 0.05, 0.075, 0.1, 0.1])
    np.testing.assert_allclose(rates[8], 0.05)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.01
    flat = TuningSettings(learning_rate=0.1, epochs=3)
    assert {learning_rate(flat, step, 4) for step in range(12)} == {0.1}


def test_of_what_tensorflow_logs_only_its_counting_of_compilations_is_held_back() -> None:
    said = "5 out of the last 9 calls to %s triggered tf.function retracing. Tracing is expensive and ..."
    assert not _is_news(logging.makeLogRecord({"name": "tensorflow", "msg": said}))
    assert _is_news(logging.makeLogRecord({"name": "tensorflow", "msg": "the disk is full"}))


# ------------------------------------------------------------------------------------------------ on the fly
@pytest.mark.slow
def test_each_epoch_trains_on_its_own_view_with_its_own_rate_and_weights(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole network from pixels, so that what a step receives can be compared with the views themselves."""
    images = tmp_path / "images"
    images.symlink_to(tiny.images)
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray, float]] = []
    original = Tail.step

    def step(tail: Tail, features: np.ndarray, labels: np.ndarray, *, weights: Any, rate: float) -> float:
        loss = original(tail, features, labels, weights=weights, rate=rate)
        steps.append((features.copy(), labels, weights, float(tail.model.optimizer.learning_rate)))
        return loss

    monkeypatch.setattr(Tail, "step", step)
    settings = {
        "unfreeze": "all",
        "augment": "flip-rotation",
        "seed": 3,
        "epochs": 2,
        "initial_epoch": 10,
        "batch_size": 24,
        "class_weight": "balanced",
        "optimizer": "sgd",
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "schedule": "cosine",
        "learning_rate": 1e-4,
    }
    document = tiny.finetune(runs=tmp_path / "runs", tensorboard=tmp_path / "logs", **settings)
    assert document["cut"] == PIXELS
    assert listing(tmp_path / "logs")[0] == Path(document["run"]).name
    store = FeatureStore.open(tiny.store)
    rule, spec = store.recipes["relu_3.avg"].pixels, settings_of({"augment": "flip-rotation"}).augmentation
    assert [len(features) for features, *_ in steps] == [24, 24, 16] * 2
    for epoch, batches in ((11, steps[:3]), (12, steps[3:])):
        shown = {}
        for row in store.rows("train").tolist():
            data, sha256 = (tiny.images / store.images.paths[row]).read_bytes(), store.images.sha256[row].tobytes()
            pixels = decode_views(data, rule, spec, seed=3, sha256=sha256, views=[epoch]).pixels[0]
            shown[pixels.tobytes()] = int(store.images.labels[row])
        received = {
            pixels.tobytes(): int(label)
            for features, labels, _, _ in batches
            for pixels, label in zip(features, labels, strict=True)
        }
        assert received == shown
        assert len(received) == 2 * TRAIN
    rates = [rate for *_, rate in steps]
    np.testing.assert_allclose(rates, [learning_rate(settings_of(settings), n, 3) for n in range(6)], rtol=1e-6)
    assert all((weights == 1).all() for _, _, weights, _ in steps)  # as many of each class
    history = (Path(document["run"]) / "history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in history] == ["epoch", "10", "11", "12"]


@pytest.mark.slow
def test_a_new_head_is_trained_end_to_end_and_then_the_last_block(tiny: TinyWorld, tmp_path: Path) -> None:
    """As tutorials do: a frozen network with augmentation, then its end, counting on."""
    options = {"augment": "flip", "patience": 0, "epochs": 4, "runs": tmp_path, "batch_size": 16}
    first = tiny.finetune(unfreeze="head", new_head=True, learning_rate=3e-2, **options)
    assert (first["cut"], first["trainable_variables"], first["parity_gap"]) == ("relu_3", 2, None)
    assert first["after"]["log_loss"] < first["before"]["log_loss"]
    before, after = weights_of_run(tiny.run), weights_of_run(first["run"])
    assert {name for name in after if not np.array_equal(after[name], before[name])} == {"head/0", "head/1"}
    assert head_of(Run.open(first["run"])).std.tolist() == [1.0] * 16
    second = stage.finetune(first["run"], tiny.images, learning_rate=1e-3, initial_epoch=4, **options)
    assert second["before"]["accuracy"] == first["after"]["accuracy"]
    assert second["before"]["log_loss"] == pytest.approx(first["after"]["log_loss"], abs=1e-6)
    assert (second["parity_gap"] < 1e-4, second["trainable_variables"]) == (True, 3)
    history = (Path(second["run"]) / "history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in history[1:]] == ["4", "5", "6", "7", "8"]


@pytest.mark.slow
def test_an_unreadable_image_is_left_out_in_every_epoch_and_said_once(
    tiny: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tiny.images / "train" / "leaf" / "000.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    try:
        with caplog.at_level(logging.WARNING):
            tiny.finetune(runs=tmp_path, augment="flip", epochs=3, patience=0)
    finally:
        broken.write_bytes(whole)
    assert caplog.text.count("train/leaf/000.png is unreadable (truncated") == 1


@pytest.mark.slow
@pytest.mark.pain(5)
def test_pain_05_statistics_move_from_scratch_only(tiny: TinyWorld, tmp_path: Path) -> None:
    options = {"epochs": 3, "patience": 0, "learning_rate": 1e-2, "runs": tmp_path, "batch_size": 16}
    before = weights_of_run(tiny.run)
    scratch = tiny.finetune(scratch=True, bn="train", optimizer="rmsprop", **options)
    assert (scratch["cut"], scratch["parity_gap"], scratch["trainable_variables"]) == (PIXELS, None, 11)
    run = Run.open(scratch["run"])
    config = run.config["finetune"]
    assert (config["scratch"], config["unfreeze"], config["bn"]) == (True, "all", "train")
    split = split_for_training(
        network_of(Run.open(tiny.run)), run.recipe, head_of(run), unfreeze="all", bn="train", scratch=True
    )
    tail = Tail(split, 1.0, TuningSettings(scratch=True, bn="train", learning_rate=1e-3, batch_size=8))
    statistics, moved = split.statistics(), tail.snapshot()
    pixels = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3)).astype(np.uint8)
    tail.step(pixels, np.arange(8, dtype=np.int32) % 2)
    assert not any(map(np.array_equal, statistics, split.statistics()))
    tail.restore(moved)  # a snapshot has the statistics too
    assert all(map(np.array_equal, statistics, split.statistics()))
    for bn in ("frozen", "affine"):
        document = tiny.finetune(bn=bn, unfreeze="all", **options)
        assert document["after"]["log_loss"] < document["before"]["log_loss"]
        after = weights_of_run(document["run"])
        changed = {name for name in after if name in before and not np.array_equal(after[name], before[name])}
        trained = {f"conv_{n}/kernel" for n in (1, 2, 3)} | {"head/0", "head/1"}
        trained |= {f"norm_{n}/{part}" for n in (1, 2, 3) for part in ("gamma", "beta") if bn == "affine"}
        assert changed == trained
    again = tiny.finetune(scratch=True, bn="train", optimizer="rmsprop", **{**options, "runs": tmp_path / "again"})
    assert again["before"] == scratch["before"]  # new weights come from the seed
    other = tiny.finetune(scratch=True, bn="train", seed=1, **options)
    assert other["before"]["log_loss"] != scratch["before"]["log_loss"]


@pytest.mark.slow
def test_half_precision_trains_in_bfloat16_and_measures_in_float32(tiny: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"faster only on a GPU.*leave --mixed-precision out"):
        tiny.finetune(mixed_precision=True, device="cpu", runs=tmp_path)
    start = Run.open(tiny.run)
    features = np.random.default_rng(0).normal(size=(8, 12, 12, 12)).astype(np.float32)
    results = {}
    for half in (False, True):
        split = split_for_training(network_of(start), start.recipe, head_of(start))
        tail = Tail(split, 1.0, TuningSettings(learning_rate=1e-3, batch_size=8, mixed_precision=half))
        before = tail.probabilities_of([features])
        with tail.training(seed=0, epoch=1):
            computed = {layer.name: layer.compute_dtype for layer in split.layers_of_tail() if layer.weights}
            loss = tail.step(features, np.arange(8, dtype=np.int32) % 2)
        assert set(computed.values()) == {"bfloat16" if half else "float32"}
        assert {str(variable.dtype) for variable in tail.model.trainable_variables} == {"float32"}
        results[half] = before, loss, tail.probabilities_of([features])
    np.testing.assert_array_equal(results[True][0], results[False][0])
    assert 0 < abs(results[True][1] - results[False][1]) < 0.02
    np.testing.assert_allclose(results[True][2], results[False][2], atol=0.02)


@pytest.mark.slow
def test_bad_input_is_refused_before_any_training(
    tiny: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FeatureStore.open(tiny.store)
    votes = train_head(store, "knn", runs=tmp_path / "knn")
    with pytest.raises(RunError, match=r"no run of a Keras head or a linear one.*lda, logistic-shrunk, nearest-mean"):
        stage.finetune(votes.folder, tiny.images)
    for unfreeze, message in (
        ("99", "received layer 99, expected one of the network's layers 0 to 10"),
        ("relu3", "has no layer 'relu3'; did you mean 'relu_3'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            tiny.finetune(unfreeze=unfreeze, runs=tmp_path / "runs")
    assert listing(tmp_path / "runs") == []
    for arguments, message in (
        ([], "nothing to train on: give --images, or --from-cache"),
        (["--images", str(tiny.images), "--param", "epochs=3"], "--param: epochs has an option of its own: --epochs"),
        (["--images", str(tiny.images), "--param", "momentun=0.9"], "did you mean 'momentum'"),
        (["--images", str(tiny.images), "--bn", "train"], "from scratch (--scratch)"),
    ):
        assert main(["finetune", str(tiny.run), *arguments]) == 2
        assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- parity gate
@pytest.mark.slow
@pytest.mark.pain(4)
def test_pain_04_the_gate_names_the_first_layer_that_differs(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ParityError, match=message) as caught:
            tiny.finetune(runs=tmp_path / "runs", epochs=1, **options)
        assert caught.value.exit_code == 3

    def wrong_layer(name: str) -> Any:
        def split(*arguments: Any, **options: Any) -> Any:
            found = split_for_training(*arguments, **options)
            layer = found.backbone.get_layer(name)
            layer.set_weights([value * 1.5 for value in layer.get_weights()])
            return found

        return split

    for name, options in (("conv_3", {}), ("norm_2", {"unfreeze": "all"})):
        monkeypatch.setattr(stage, "split_for_training", wrong_layer(name))
        refused(rf"^before fine-tuning: .* The first layer that differs is '{name}' \(relative", **options)
    monkeypatch.undo()

    def wrong_trunk(*arguments: Any, **options: Any) -> Any:
        return lambda pixels: 1.1 * trunk(*arguments, **options)(pixels)

    trunk = stage.trunk_function
    cache = tiny.extract("cut.h5", layers=["relu_2"]).path
    monkeypatch.setattr(stage, "trunk_function", wrong_trunk)
    refused(r"^before fine-tuning: .* The first layer that differs is 'relu_3': its features in .*f\.h5 differ from")
    refused(r"from pixels: .* cached features at 'relu_2' differ from those of its pixels", from_cache=cache)
    monkeypatch.undo()
    assert listing(tmp_path / "runs") == []

    def saved_wrongly(folder: Path, backbone: Any, recipe: Any) -> Any:
        saved = save_backbone(folder, backbone, recipe)
        layer = backbone.get_layer("conv_3")
        layer.set_weights([value * 1.5 for value in layer.get_weights()])
        return saved

    save_backbone = pipeline.runs.writing._save_backbone
    monkeypatch.setattr(pipeline.runs.writing, "_save_backbone", saved_wrongly)
    refused(r"loaded again after fine-tuning: .* The first layer that differs is 'conv_3'")
    refused(r"loaded again after fine-tuning: .* The first layer that differs is 'conv_3'", from_cache=cache)
    assert all(name.endswith(".checkpoint") for name in listing(tmp_path / "runs"))
    monkeypatch.undo()
    assert tiny.finetune(runs=tmp_path / "runs", epochs=1)["resumed"] == 1  # trained, written and proven now
    assert len([name for name in (tmp_path / "runs").iterdir() if not name.name.startswith(".")]) == 1


@pytest.mark.slow
def test_features_that_stay_on_the_device_train_the_same(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for device in ("cpu", "gpu"):
        monkeypatch.setattr("pipeline.stages.finetune.choose_device", lambda _, device=device: device)
        run = tiny.finetune(runs=tmp_path / device, epochs=2)["run"]
        found.append((Path(run, "predictions.csv").read_bytes(), Path(run, "history.csv").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_run_fine_tuned_from_a_linear_head_predicts_what_it_says(tiny: TinyWorld, tmp_path: Path) -> None:
    head = train_head(FeatureStore.open(tiny.store), "logistic", runs=tmp_path)
    document = stage.finetune(tmp_path, tiny.images, epochs=3, patience=0, learning_rate=3e-3)
    assert document["start"] == head.run_id
    rows = read_predictions(Run.open(document["run"]))
    assert (rows.probabilities.argmax(axis=1) == rows.labels).mean() == document["after"]["accuracy"]
    after = document["after"]
    assert re.search(rf"^  after  +{after['n']} +{after['accuracy']:.4f}  ", stage.summary(document), re.MULTILINE)


# ------------------------------------------------------------------------------------------------ moved networks
@pytest.mark.slow
def test_a_network_that_has_moved_is_found_by_its_digest(
    tiny: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where --weights or --backbone says, or beside the run; the run keeps its id, and another network is refused."""
    from pipeline.stages.predict import predict

    gone = tmp_path / "gone" / "tiny.keras"
    run = Path(shutil.copytree(tiny.run, tmp_path / "work" / "runs" / tiny.run.name))
    config = run / "config.yaml"
    assert str(tiny.backbone) in config.read_text()
    config.write_text(config.read_text().replace(str(tiny.backbone), str(gone)))
    images = [str(path) for path in sorted(tiny.images.rglob("*.png"))[:2]]

    def probabilities(folder: Path, name: str, **options: Any) -> str:
        predict(folder, images, out=tmp_path / name, **options)
        return (tmp_path / name).read_text()

    expected = probabilities(tiny.run, "as_ever.csv")
    with pytest.raises(RunError, match=rf"the file of its network, {gone}, is no longer there. .* with --weights FILE"):
        network_of(Run.open(run))
    moved = Path(shutil.copy(tiny.backbone, tmp_path / "other_name.keras"))
    assert probabilities(run, "named.csv", weights=str(moved)) == expected
    assert main(["predict", str(run), images[0], "--backbone", str(moved)]) == 0
    (_, row) = capsys.readouterr().out.splitlines()
    assert row.split(",")[1:] == expected.splitlines()[1].split(",")[1:]
    other = save_network(tmp_path / "stranger.keras", seed=8)
    with pytest.raises(RunError, match=r"features of another network \(weights: \w+ -> \w+\)"):
        network_of(Run.open(run), str(other))

    caplog.clear()
    shutil.copy(tiny.backbone, tmp_path / "work" / "tiny.keras")
    assert probabilities(run, "beside.csv") == expected
    assert f"{gone} is no longer there; using {tmp_path / 'work' / 'tiny.keras'}" in caplog.text
    assert Run.open(run).run_id == tiny.run.name
    shutil.copy(other, tmp_path / "work" / "tiny.keras")
    with pytest.raises(RunError, match="features of another network"):
        network_of(Run.open(run))
