"""Fine-tuning for several labels and numbers: loss, choice of the epoch, parity, resuming, and what the runs then predict."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from finetuning import SIZE, killed_training, save_network, weights_of_run
from helpers import STRESS
from PIL import Image
from scipy.special import expit

from features.extraction.extraction import extract_features
from features.store.reader import FeatureStore
from pipeline.exporting.formats import FORMATS
from pipeline.runs.folder import Run, read_history, read_predictions
from pipeline.stages.evaluate import evaluate
from pipeline.stages.export import export
from pipeline.stages.finetune import advised, finetune, summary
from pipeline.stages.predict import predict
from pipeline.stages.train_head import train_head
from pipeline.tasks.table import CLASSIFICATION, TASKS

MULTILABEL, REGRESSION = TASKS["multilabel"], TASKS["regression"]
TRAIN, VALIDATION = 32, 12
EPOCHS = 4
# An epoch is a single step, whose loss is that of the weights before it.
SETTINGS: dict[str, Any] = {"epochs": EPOCHS, "learning_rate": 3e-3, "batch_size": 64, "patience": 0}


class World(NamedTuple):
    """Images of one task, the features of a small network, and a head that is trained too little."""

    images: Path
    store: FeatureStore
    run: Path


def picture(light: float, across: bool, generator: np.random.Generator) -> Image.Image:
    wave = 40 * np.sin(np.arange(SIZE) * 0.9)
    pixels = light + (wave[:, None] if across else wave[None, :])[..., None] + generator.normal(0, 20, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def folders_of_labels(root: Path) -> Path:
    """Class folders; an image with both labels lies in both."""
    generator = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        for number in range(count):
            light, across = number % 3 != 0, number % 2 == 0 or number % 3 == 0
            image = picture(150 if light else 90, across, generator)
            for name in [*(["light"] if light else []), *(["across"] if across else [])]:
                (root / split / name).mkdir(parents=True, exist_ok=True)
                image.save(root / split / name / f"{number}.png")
    return root


def manifest_of_numbers(root: Path) -> Path:
    """Two numbers of very different size, a few of them unknown."""
    generator, lines = np.random.default_rng(1), ["path,light,angle,split"]
    root.mkdir()
    for number in range(TRAIN + VALIDATION):
        light, across = float(generator.uniform(80, 180)), bool(generator.integers(2))
        picture(light, across, generator).save(root / f"{number}.png")
        cells = [f"{light * 1000:.2f}", "" if number % 9 == 4 else f"{0.01 * across + 0.001 * generator.normal():.6f}"]
        lines.append(f"{number}.png,{','.join(cells)},{'train' if number < TRAIN else 'validation'}")
    (root / "m.csv").write_text("\n".join(lines) + "\n")
    return root / "m.csv"


@pytest.fixture(scope="module", params=["multilabel", "regression"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp(request.param)
    target = {"multilabel": None, "regression": "light,angle"}[request.param]
    images = (folders_of_labels if target is None else manifest_of_numbers)(folder / "images")
    options: dict[str, Any] = {
        "task": request.param,
        "target": target,
        "backbone": str(save_network(folder / "n.keras")),
    }
    store = extract_features(images, folder / "f.h5", batch_size=16, **options)
    run = train_head(store, "dense", runs=folder / "runs", params={"epochs": 3, "learning_rate": 3e-2}).folder
    return World(images, store, run)


@pytest.fixture(scope="module")
def tuned(world: World) -> dict[str, Any]:
    """The document of fine-tuning from the images, uninterrupted."""
    return finetune(world.run, world.images, runs=world.store.path.parent / "tuned", **SETTINGS)


def loss_of(run: Run, store: FeatureStore, split: str) -> float:
    """The loss that a network is trained on, by hand, of the head on stored features."""
    from pipeline.heads.kinds import head_of

    X, y = store.load(split)
    values = head_of(run).predict_proba(X)
    if run.task is MULTILABEL:
        return float(-np.log(np.where(y == 1, values, 1 - values)).mean())
    trained = store.load("train")[1]
    gaps = (values - y) / np.nanstd(trained, axis=0)
    return float(np.nansum(np.square(gaps), axis=1).mean() / 4)  # half the mean over two columns


@pytest.mark.slow
def test_a_network_is_trained_on_the_loss_of_its_task(
    world: World, tuned: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start, document = Run.open(world.run), tuned
    assert document["task"] == start.task.name
    assert document["parity_gap"] < 1e-4
    run, first = Run.open(document["run"]), start.task.choices[0]
    history = read_history(run.folder)
    assert list(history) == ["epoch", "loss", "val_loss", f"val_{first}"]
    assert history["loss"][1] == pytest.approx(loss_of(start, world.store, "train"), rel=1e-4)
    assert history["loss"][4] < history["loss"][1]
    assert document["before"][first] == pytest.approx(start.metrics["validation"][first], abs=1e-4)
    best = max(range(5), key=lambda epoch: (history[f"val_{first}"][epoch], -history["val_loss"][epoch]))
    assert document["after"][first] == pytest.approx(history[f"val_{first}"][best], abs=1e-6)
    assert best > 0
    found = read_predictions(run)
    scores = run.task.evaluate(found.probabilities, found.labels, run.classes)
    assert scores[first] == pytest.approx(run.metrics["validation"][first], abs=1e-5)
    assert (run.folder / "plots" / "learning.png").is_file()
    gained = document["after"][first] - document["before"][first]
    assert f"({gained:+.4f})" in summary(document)
    assert advised(document) == run.folder  # the head does not lie beside it
    # what the run says of new images is what it was measured to say
    predict(run.folder, world.images, out=tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as stream:
        lines = list(csv.reader(stream))[1:]
    rows = {line[0]: np.array(line[-3:-1], float) for line in lines}
    mine = np.array([rows[path] for path in found.paths])
    unit = run.task.parity_unit(found.probabilities)
    assert abs((mine - found.probabilities) / unit).max() < 1e-4
    document = evaluate(run.folder, world.images, split="validation")
    assert f"the run was made with {document['seen']['validation']} to validate it" in caplog.text
    assert document["images"] == VALIDATION  # one that lies in two folders counts once, with both labels
    assert document["scores"][first] == pytest.approx(run.metrics["validation"][first], abs=1e-4)
    assert finetune(world.run, world.images, runs=run.folder.parent, **SETTINGS)["cached"]


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_a_training_that_was_killed_is_the_uninterrupted_one(
    world: World, tuned: dict[str, Any], tmp_path: Path
) -> None:
    """Killed in the middle of an epoch: once and for labels, in `make stress` in each epoch of both tasks."""
    if not (STRESS or Run.open(world.run).task is MULTILABEL):
        pytest.skip("numbers are interrupted in the process below; killed with STRESS=1")
    runs = tmp_path / "runs"
    for epoch in range(1, EPOCHS + 1) if STRESS else (3,):
        code, first, _, errors = killed_training(world.run, world.images, runs, SETTINGS, f"epoch {epoch}/{EPOCHS}")
        assert code == -9, errors
        assert first.startswith(f"epoch {max(1, epoch - 1) if STRESS else 1}/{EPOCHS} "), errors
        assert [path.name for path in runs.iterdir() if not path.name.startswith(".")] == []
    resumed = finetune(world.run, world.images, runs=runs, **SETTINGS)
    assert resumed["resumed"] == (EPOCHS - 1 if STRESS else 2)
    assert Path(resumed["run"]).name == Path(tuned["run"]).name
    assert_equal_runs(world.run, resumed, tuned)


@pytest.mark.slow
def test_a_training_of_labels_or_numbers_may_read_a_cache(world: World, tuned: dict[str, Any], tmp_path: Path) -> None:
    """It resumes after Ctrl-C, too, and comes to what images come to."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == f"epoch 3/{EPOCHS}":
            raise KeyboardInterrupt

    backbone = str(world.store.path.parent / "n.keras")
    target = {"task": Run.open(world.run).task.name, "target": Run.open(world.run).target}
    cut = extract_features(
        world.images, tmp_path / "cut.h5", backbone=backbone, layers=["boundary"], batch_size=16, **target
    )
    settings: dict[str, Any] = {"from_cache": cut.path, **SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        finetune(world.run, runs=tmp_path / "runs", progress=interrupt, **settings)
    resumed = finetune(world.run, runs=tmp_path / "runs", **settings)
    assert resumed["resumed"] == 2
    assert_equal_runs(world.run, resumed, tuned)


def assert_equal_runs(start: Path, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Weights and losses are equal up to the order of sums, and the weights have moved."""
    before, found, expected = (weights_of_run(run) for run in (start, mine["run"], theirs["run"]))
    for name in expected:
        assert np.linalg.norm(found[name] - expected[name]) <= 1e-3 * np.linalg.norm(expected[name]), name
    assert sum(not np.array_equal(before[name], expected[name]) for name in expected) == 3  # a kernel and the head
    losses = [read_history(Path(one["run"]))["val_loss"] for one in (mine, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_words_and_choices_of_each_task() -> None:
    first, second = {"average_precision": 0.5, "log_loss": 1.0}, {"average_precision": 0.5, "log_loss": 0.9}
    assert MULTILABEL.better(second, first)
    assert not MULTILABEL.better(first, second)
    assert REGRESSION.better({"r2": 0.5, "rmse": 9.0}, {"r2": 0.4, "rmse": 1.0})
    assert REGRESSION.gained({"r2": 0.5}, {"r2": 0.25}) == "+0.2500"
    assert CLASSIFICATION.gained({"accuracy": 0.75, "n": 8}, {"accuracy": 0.5, "n": 8}) == "+2 of 8 images"
    np.testing.assert_allclose(REGRESSION.parity_unit(np.array([[1.0, -2000.0], [-3.0, 10.0]])), [3, 2000])
    np.testing.assert_allclose(MULTILABEL.parity_unit(expit(np.zeros((4, 2)))), 1)
    assert MULTILABEL.row_weights(np.zeros((3, 2), np.uint8)) is None
    weights = CLASSIFICATION.row_weights(np.array([0, 0, 1]))
    assert weights is not None
    np.testing.assert_allclose(weights, [0.75, 0.75, 1.5])


@pytest.mark.slow
@pytest.mark.skipif(not STRESS, reason="converts ten networks; set STRESS=1")
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_fine_tuned_run_is_exported_as_it_predicts(
    world: World, tuned: dict[str, Any], tmp_path: Path, name: str
) -> None:
    run = tuned["run"]
    out = tmp_path / f"model{ {'keras': '.keras', 'onnx': '.onnx', 'litert': '.tflite'}.get(name, '') }"
    document = export(run, format=name, out=out, images=world.images)
    assert document["parity_gap"] <= document["tolerance"] <= (1e-3 if name == "litert" else 1e-4)
    first = Run.open(run).task.choices[0]
    asked: dict[str, Any] = {"split": "validation", "target": Run.open(run).target}  # an exported model knows no target
    scores = [evaluate(model, world.images, **asked)["scores"][first] for model in (run, out)]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)
