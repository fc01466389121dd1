"""Stage two: what is in a run folder, runs are trained once, and a folder is whole or absent."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import listing, recipe

from features.errors import ConfigurationError, HeadError, RunError
from features.recipe import Recipe
from pipeline.config import load_yaml
from pipeline.heads.classifiers import SklearnHead
from pipeline.heads.kinds import can_finetune, head_of, load_head
from pipeline.runs.board import leaderboard, take_run
from pipeline.runs.folder import BACKBONE_WEIGHTS, Predictions, Run, find_runs
from pipeline.runs.writing import Outcome, write_run
from pipeline.scores.metrics import evaluate
from pipeline.stages.train_head import train_head

pytestmark = pytest.mark.slow  # writes dozens of whole run folders, plots included

SPLITS = ("train", "validation", "test", "unlabelled")
COMMON = ["README.md", "config.yaml", "environment.json", "head.json", "history.csv", "metrics.json", "plots"]


@dataclasses.dataclass
class Images:
    paths: tuple[str, ...]
    labels: np.ndarray
    splits: np.ndarray
    sha256: np.ndarray
    groups: list[str] | None = None
    columns: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    target: None = None

    @property
    def strata(self) -> np.ndarray:
        return self.labels


@dataclasses.dataclass
class Store:
    """What `train_head` uses of a feature store, in memory."""

    arrays: dict[str, np.ndarray]
    recipes: dict[str, Recipe]
    classes: tuple[str, ...]
    images: Images
    data_digest: str = "d" * 64
    labelled_by: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: Path = Path("features.h5")
    split_rule: str = "hash:0.8,0.1,0.1"
    source: str = "folder of images"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    @property
    def provenance(self) -> dict[str, str]:
        return {"backbone": "numpy", "weights": "some.weights.h5"}

    def shape(self, name: str) -> tuple[int, ...]:
        array = self.arrays[name]
        return (len(array), 1, *array.shape[1:])

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.images.splits == SPLITS.index(split))

    def __len__(self) -> int:
        return len(self.images.labels)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.arrays[name][start:stop, None]

    def load(self, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows(split)
        return self.arrays[name][rows], self.images.labels[rows]


def make_store(
    rows: int = 120, columns: int = 4, classes: tuple[str, ...] = ("cat", "dog"), shift: float = 2.0
) -> Store:
    """Rows sorted by class; of every ten, seven are train, two validation, one test."""
    labels = np.sort(np.arange(rows) % len(classes)).astype(np.int32)
    splits = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 2], np.int8)[np.arange(rows) % 10]
    corners = np.random.default_rng(1).normal(size=(len(classes), columns)) * shift
    X = (corners[labels] + np.random.default_rng(2).normal(size=(rows, columns))).astype(np.float32)
    paths = tuple(f"{classes[label]}/{row:04d}.png" for row, label in enumerate(labels))
    features = recipe()
    return Store(
        {features.name: X},
        {features.name: features},
        classes,
        Images(paths, labels, splits, np.random.default_rng(3).integers(0, 256, (rows, 32)).astype(np.uint8)),
    )


def write_head(folder: Path, **changes: Any) -> Run:
    return Run.open(train_head(make_store(), "logistic", runs=folder, **changes).folder)


def spoil_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(SklearnHead, "_train", refuse)


# ---------------------------------------------------------------------------------------------- the folder
def test_a_run_folder_holds_what_it_should(tmp_path: Path) -> None:
    store = make_store()
    result = train_head(store, "logistic", runs=tmp_path, params={"C": 0.1}, seed=3)
    assert result.folder == tmp_path / result.run_id
    assert not result.cached
    assert listing(tmp_path) == [
        result.run_id,
        *sorted(f"{result.run_id}/{name}" for name in [*COMMON, "head.npz", "plots/confusion.png", "predictions.csv"]),
    ]
    config = load_yaml(result.folder / "config.yaml")
    features = store.recipes["last.avg"]
    assert config == {
        "format": 1,
        "run_id": result.run_id,
        "stage": "head",
        "seed": 3,
        "classes": ["cat", "dog"],
        "head": {"name": "logistic", "pool": "none", "parameters": {"C": 0.1, "folds": 5}},
        "features": {
            "store": str(Path("features.h5").resolve()),
            "name": "last.avg",
            "recipe": features.to_dict(),
            "fingerprint": features.fingerprint,
            "data_digest": "d" * 64,
            "split_rule": "hash:0.8,0.1,0.1",
            "source": "folder of images",
            "backbone": "numpy",
            "weights": "some.weights.h5",
            "target": "",
        },
        "finetune": None,
        "model": ["head.json", "head.npz"],
    }
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["fit_seconds"] == pytest.approx(result.fit_seconds)
    assert environment["parameters"] == 5
    assert environment["packages"]["numpy"] == np.__version__
    readme = (result.folder / "README.md").read_text()
    assert f"| validation | 24 | {result.metrics['validation']['accuracy']:.4f} |" in readme
    assert (result.folder / "history.csv").read_text() == "C\n0.1\n"


def test_metrics_are_those_of_the_predictions_beside_them(tmp_path: Path) -> None:
    store = make_store(shift=0.7)
    result = train_head(store, "ridge", runs=tmp_path, test=True)
    metrics = json.loads((result.folder / "metrics.json").read_text())
    assert metrics == result.metrics
    assert list(metrics) == ["format", "run_id", "validation", "test", "cv"]
    assert (metrics["format"], metrics["run_id"], metrics["cv"]) == (1, result.run_id, None)
    with open(result.folder / "predictions.csv", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["path", "sha256", "label", "predicted", "correct", "cat", "dog"]
    validation = store.rows("validation")
    assert [row[0] for row in rows] == [store.images.paths[row] for row in validation]
    assert [row.pop(1) for row in rows] == [store.images.sha256[row].tobytes().hex() for row in validation]
    assert [row[1] for row in rows] == [store.classes[store.images.labels[row]] for row in validation]
    probabilities = np.array([[float(value) for value in row[4:]] for row in rows])
    assert [row[2] for row in rows] == [store.classes[k] for k in probabilities.argmax(axis=1)]
    assert [row[3] for row in rows] == [str(row[1] == row[2]).lower() for row in rows]
    scores = evaluate(probabilities, store.images.labels[validation], store.classes)
    assert metrics["validation"].pop("accuracy_interval") == scores.pop("accuracy_interval")
    assert metrics["validation"] == pytest.approx(scores, abs=1e-7)
    assert 0.5 < scores["accuracy"] < 1  # not all right: the numbers above could not be
    head = head_of(Run.open(result.folder))
    assert head.predict_proba(store.load("validation", "last.avg")[0]) == pytest.approx(probabilities, abs=1e-8)
    X, y = store.load("test", "last.avg")
    assert metrics["test"] == evaluate(head.predict_proba(X), y, store.classes)


def test_history_of_a_search_is_its_grid(tmp_path: Path) -> None:
    result = train_head(make_store(), "knn", runs=tmp_path)
    with open(result.folder / "history.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["n_neighbors"]) for row in rows] == [1, 3, 5, 7, 11, 15, 21, 31]
    assert all(0 <= float(row["score"]) <= 2 and 0 <= float(row["accuracy"]) <= 1 for row in rows)


# ------------------------------------------------------------------------------------------------ run id
def test_the_run_id_is_frozen(tmp_path: Path) -> None:
    """A changed id costs users every run they have: only ever change it on purpose."""
    assert write_head(tmp_path, seed=3).run_id == "logistic-b0818c2824"


def test_the_run_id_covers_head_features_data_and_seed(tmp_path: Path) -> None:
    ids = {write_head(tmp_path / "a").run_id, write_head(tmp_path / "a", seed=1).run_id}
    ids.add(write_head(tmp_path / "a", params={"folds": 3}).run_id)
    ids.add(train_head(dataclasses.replace(make_store(), data_digest="e" * 64), "logistic", runs=tmp_path).run_id)
    store = make_store()
    store.recipes = {"last.avg": dataclasses.replace(store.recipes["last.avg"], weights="1" * 64)}
    ids.add(train_head(store, "logistic", runs=tmp_path).run_id)
    assert len(ids) == 5
    assert write_head(tmp_path, pool="none").run_id in ids  # what would be chosen anyway is the same run


def test_the_same_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_head(make_store(), "logistic", runs=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    spoil_fit(monkeypatch)
    again = train_head(make_store(), "logistic", runs=tmp_path)
    assert again == dataclasses.replace(first, cached=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_test_scores_can_be_had_later_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_head(make_store(), "logistic", runs=tmp_path)
    assert first.metrics["test"] is None
    spoil_fit(monkeypatch)
    later = train_head(make_store(), "logistic", runs=tmp_path, test=True)
    assert later.cached
    assert later.metrics["test"]["n"] == 12
    assert later.metrics["validation"] == first.metrics["validation"]
    assert Run.open(first.folder).metrics == later.metrics
    assert train_head(make_store(), "logistic", runs=tmp_path).metrics == later.metrics  # and they stay


@pytest.mark.parametrize("lost", ["metrics.json", "head.npz", "config.yaml"])
def test_an_incomplete_folder_is_replaced(lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = train_head(make_store(), "logistic", runs=tmp_path)
    whole = listing(tmp_path)
    (first.folder / lost).unlink()
    (first.folder / "stray").touch()
    again = train_head(make_store(), "logistic", runs=tmp_path)
    assert not again.cached
    assert listing(tmp_path) == whole
    assert "was incomplete and is replaced" in caplog.text


def test_a_run_that_cannot_be_read_now_is_not_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_head(make_store(), "logistic", runs=tmp_path)
    whole = listing(tmp_path)

    def fail(_: Run) -> None:
        raise HeadError("head.npz: cannot be loaded") from OSError(5, "Input/output error")

    monkeypatch.setattr("pipeline.stages.train_head.head_of", fail)
    with pytest.raises(HeadError, match="cannot be loaded"):
        train_head(make_store(), "logistic", runs=tmp_path)
    monkeypatch.undo()
    assert listing(tmp_path) == whole
    assert train_head(make_store(), "logistic", runs=tmp_path) == dataclasses.replace(first, cached=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(SklearnHead, "_save_weights", fail)
    expected = RunError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        train_head(make_store(), "logistic", runs=tmp_path)
    assert expected is KeyboardInterrupt or "No space left on device" in str(raised.value)
    assert listing(tmp_path) == []


# ---------------------------------------------------------------------------------------------- refusals
def edit_splits(store: Store, change: Callable[[np.ndarray, np.ndarray], None]) -> Store:
    change(store.images.splits, store.images.labels)
    return store


def test_splits_that_cannot_be_used_are_refused_with_the_fix(tmp_path: Path) -> None:
    none = edit_splits(make_store(), lambda splits, _: splits.__setitem__(splits == 1, 0))
    with pytest.raises(HeadError, match=r"no validation rows: .*--validation-from-train 0\.1"):
        train_head(none, "logistic", runs=tmp_path)
    one = edit_splits(make_store(), lambda splits, labels: splits.__setitem__((splits == 0) & (labels == 1), 2))
    with pytest.raises(HeadError, match="no training rows of 'dog'"):
        train_head(one, "logistic", runs=tmp_path)
    untested = edit_splits(make_store(), lambda splits, _: splits.__setitem__(splits == 2, 0))
    with pytest.raises(HeadError, match="no test rows"):
        train_head(untested, "logistic", runs=tmp_path, test=True)
    assert listing(tmp_path) == []


def test_a_class_may_be_missing_in_validation(tmp_path: Path) -> None:
    store = make_store(classes=("cat", "dog", "eel"))
    edit_splits(store, lambda splits, labels: splits.__setitem__((splits == 1) & (labels == 2), 0))
    scores = train_head(store, "logistic", runs=tmp_path).metrics["validation"]
    assert scores["roc_auc"] is None
    assert scores["accuracy"] > 0.8


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    store = make_store()
    store.arrays["last.avg"][store.rows("train")[:3]] = np.nan
    with pytest.raises(HeadError, match="3 of 84 rows"):
        train_head(store, "logistic", runs=tmp_path)
    assert listing(tmp_path) == []


def test_the_data_set_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    store = make_store()
    spatial = recipe("block", "none")
    store.arrays["block"] = np.repeat(store.arrays["last.avg"][:, None, None], 2, axis=1)
    store.recipes["block"] = spatial
    with pytest.raises(ConfigurationError, match=r"several feature sets, use --features with last\.avg or block"):
        train_head(store, "logistic", runs=tmp_path)
    with pytest.raises(ConfigurationError, match=r"no feature set 'blok'.*did you mean 'block'"):
        train_head(store, "logistic", runs=tmp_path, name="blok")
    result = train_head(store, "logistic", runs=tmp_path, name="block")
    assert Run.open(result.folder).config["head"]["pool"] == "avg"
    averaged = train_head(store, "logistic", runs=tmp_path, name="last.avg")
    assert averaged.metrics["validation"]["log_loss"] == pytest.approx(
        result.metrics["validation"]["log_loss"], rel=1e-4
    )


@pytest.mark.parametrize("params", [{"seed": 3}, {"pool": "avg"}, {"classes": []}, {"name": "x"}, {"c": 1}])
def test_what_is_no_parameter_of_a_head_is_refused(params: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(params))):
        train_head(make_store(), "logistic", runs=tmp_path, params=params)


# ----------------------------------------------------------------------------------------- opening, finding
def test_a_run_tells_what_the_next_stage_needs(tmp_path: Path) -> None:
    run = write_head(tmp_path)
    assert run.classes == ("cat", "dog")
    assert run.recipe == make_store().recipes["last.avg"]
    assert (run.split_rule, run.backbone_argument, run.weights_argument) == (
        "hash:0.8,0.1,0.1",
        "numpy",
        "some.weights.h5",
    )
    assert can_finetune(run)  # linear: equal to a dense layer
    assert head_of(run).name == "logistic"
    assert not can_finetune(Run.open(train_head(make_store(), "knn", runs=tmp_path).folder))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("config.yaml", lambda text: text + "sead: 1\n", r"config\.yaml: unknown key 'sead'; did you mean 'seed'"),
        ("config.yaml", lambda text: text + "seed: 1\n", r"config\.yaml: not valid YAML.*'seed' is given twice"),
        ("config.yaml", lambda text: text.replace("head.npz", "../x"), r"model\.1: received '\.\./x'"),
        ("config.yaml", lambda text: "- 1\n", r"config\.yaml: expected a mapping of keys to values"),
        ("metrics.json", lambda text: text.replace("ece", "ecc"), r"metrics\.json: unknown key 'validation\.ecc'"),
        ("metrics.json", lambda text: text.replace("logistic-", "other-"), r"metrics\.json: belongs to other-"),
        ("metrics.json", lambda text: text[:20], r"metrics\.json: cannot be read"),
        ("environment.json", lambda text: "[]", r"environment\.json: expected a mapping"),
    ],
)
def test_an_edited_run_is_refused_and_the_file_named(
    name: str, edit: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    run = write_head(tmp_path)
    path = run.folder / name
    path.write_text(edit(path.read_text()))
    with pytest.raises(RunError, match=message):
        Run.open(run.folder)


def test_a_head_or_recipe_of_another_run_is_noticed(tmp_path: Path) -> None:
    run = write_head(tmp_path)
    path = run.folder / "head.json"
    path.write_text(path.read_text().replace(run.recipe.fingerprint, "0" * 64))
    with pytest.raises(RunError, match=r"head\.json: fingerprint is '000"):
        head_of(run)
    config = load_yaml(run.folder / "config.yaml")
    config["features"]["recipe"]["seed"] = 9
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(RunError, match="one of them was edited"):
        _ = Run.open(run.folder).recipe


def test_find_runs_leaves_out_the_broken_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = write_head(tmp_path), write_head(tmp_path, seed=1)
    (bad.folder / "head.npz").unlink()
    (tmp_path / "notes").mkdir()
    shutil.copytree(good.folder, tmp_path / ".copy.tmp")
    with caplog.at_level(logging.WARNING):
        found = find_runs(tmp_path)
    assert ([run.run_id for run in found.runs], found.damaged) == ([good.run_id], [bad.run_id])
    assert f"{bad.folder}: the run is incomplete, missing: head.npz" in caplog.text
    assert [run.run_id for run in find_runs(good.folder).runs] == [good.run_id]
    for path, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "notes", "holds no finished run")):
        with pytest.raises(RunError, match=message):
            take_run(path)
    with pytest.raises(RunError, match="is not a run folder"):
        Run.open(tmp_path)


def test_leaderboard_is_sorted_and_flags_other_data(tmp_path: Path) -> None:
    hard = make_store(shift=0.7)
    for name in ("logistic", "knn", "ridge"):
        train_head(hard, name, runs=tmp_path)
    other = dataclasses.replace(make_store(shift=5.0), data_digest="e" * 64)
    best = train_head(other, "logistic", runs=tmp_path)
    rows = leaderboard(tmp_path)
    assert len(rows) == 4
    assert rows[0]["run_id"] == best.run_id == take_run(tmp_path).run.run_id
    assert [row["accuracy"] for row in rows] == sorted((row["accuracy"] for row in rows), reverse=True)
    ties = [(-row["accuracy"], row["log_loss"]) for row in rows]
    assert ties == sorted(ties)
    assert [row["comparable"] for row in rows] == [True, False, False, False]
    assert {row["data"] for row in rows} == {"d" * 10, "e" * 10}
    assert rows[0] == {
        "run_id": best.run_id,
        "chosen": True,
        "stage": "head",
        "head": "logistic",
        "settings": "",
        "features": "numpy/last.avg",
        "accuracy": best.metrics["validation"]["accuracy"],
        "accuracy_interval": best.metrics["validation"]["accuracy_interval"],
        "balanced_accuracy": best.metrics["validation"]["balanced_accuracy"],
        "log_loss": best.metrics["validation"]["log_loss"],
        "ece": best.metrics["validation"]["ece"],
        "n": 24,
        "cv_accuracy": None,
        "cv_interval": None,
        "test_accuracy": None,
        "fit_seconds": pytest.approx(best.fit_seconds),
        "parameters": 5,
        "data": "e" * 10,
        "comparable": True,
        "stale": False,
        "state": "newest",
    }
    assert [row["stale"] for row in rows] == [False, True, True, True]


def test_fine_tuning_starts_from_a_head_that_it_can_take(tmp_path: Path) -> None:
    train_head(make_store(), "knn", runs=tmp_path)
    with pytest.raises(RunError, match=r"no run of a Keras head.*--head dropout-linear"):
        take_run(tmp_path, accept=can_finetune)


# -------------------------------------------------------------------------------------------------- Keras
def test_a_keras_run(tmp_path: Path) -> None:
    store = make_store(classes=("cat", "dog", "eel"))
    result = train_head(store, "dropout-linear", runs=tmp_path, params={"epochs": 60, "learning_rate": 0.03})
    names = [*COMMON, "head.weights.h5", "plots/confusion.png", "plots/learning.png", "predictions.csv"]
    assert listing(result.folder) == sorted(names)
    with open(result.folder / "history.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["epoch", "loss", "val_loss", "val_accuracy"]
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert result.metrics["validation"]["log_loss"] == pytest.approx(float(best["val_loss"]), rel=1e-4)
    assert result.metrics["validation"]["accuracy"] == pytest.approx(float(best["val_accuracy"]))
    assert result.metrics["validation"]["accuracy"] > 0.8
    run = take_run(tmp_path, accept=can_finetune).run
    assert run.run_id == result.run_id
    assert run.environment["parameters"] == 15
    again = train_head(store, "dropout-linear", runs=tmp_path, params={"epochs": 60, "learning_rate": 0.03})
    assert again.cached


@pytest.mark.parametrize("name", ["logistic", "ridge", "lda", "sklearn.svm.LinearSVC"])
def test_fine_tuning_may_start_from_a_linear_scikit_learn_head(name: str, tmp_path: Path) -> None:
    store = make_store(classes=("cat", "dog", "eel"))
    train_head(store, name, runs=tmp_path)
    run = take_run(tmp_path, accept=can_finetune).run
    X, _ = store.load("validation", "last.avg")
    head, dense = head_of(run), head_of(run).as_dense()
    assert dense.predict_proba(X) == pytest.approx(head.predict_proba(X), abs=1e-5)
    # what fine-tuning does: the network is trained in place, and the head that has it is saved
    layer = dense.network.get_layer("logits")
    layer.set_weights([2 * part for part in layer.get_weights()])
    (tmp_path / "tuned").mkdir()
    dense.save(tmp_path / "tuned")
    assert listing(tmp_path / "tuned") == ["head.json", "head.weights.h5"]
    assert load_head(tmp_path / "tuned").predict_proba(X) == pytest.approx(dense.predict_proba(X), abs=1e-6)
    assert np.abs(dense.predict_proba(X) - head.predict_proba(X)).max() > 0.01


def test_a_fine_tuned_run_brings_its_own_backbone(tmp_path: Path) -> None:
    import keras

    from features.networks.weights import tensor_digest

    store = make_store()
    start = Run.open(train_head(store, "dropout-linear", runs=tmp_path, params={"epochs": 2}).folder)
    pixels = keras.Input((8, 8, 3))
    backbone = keras.Model(pixels, keras.layers.Conv2D(4, 3, name="last")(pixels))
    X, y = store.load("validation", "last.avg")
    head = head_of(start)
    probabilities = head.predict_proba(X)
    folder = write_run(
        tmp_path,
        "finetune-dropout-linear-0123456789",
        Outcome(
            head,
            {"epoch": [1.0], "loss": [0.5], "val_loss": [0.4], "val_accuracy": [1.0]},
            evaluate(probabilities, y, store.classes),
            Predictions(
                [store.images.paths[row] for row in store.rows("validation")],
                store.images.sha256[store.rows("validation")],
                y,
                probabilities,
            ),
            2.0,
        ),
        start=start,
        backbone=backbone,
        settings={"seed": 5, "start": start.run_id, "unfreeze": "last-block"},
    )
    run = Run.open(folder)
    assert (run.config["stage"], run.config["seed"]) == ("finetune", 5)
    assert run.config["head"] == start.config["head"]
    assert run.recipe == dataclasses.replace(start.recipe, weights=tensor_digest(backbone))
    assert run.weights_argument == str(folder / BACKBONE_WEIGHTS)
    assert (head_of(run).predict_proba(X) == probabilities).all()
    assert run.environment["parameters"] == 5 + 3 * 3 * 3 * 4 + 4
    assert take_run(tmp_path, accept=can_finetune).run.run_id == start.run_id
    assert take_run(folder, accept=can_finetune).run.run_id == run.run_id
    assert {row["stage"] for row in leaderboard(tmp_path)} == {"head", "finetune"}


def test_scikit_learn_heads_never_import_keras(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nsys.path[:0] = ['.', 'tests']\nfrom pathlib import Path\nimport test_train_head as t\n"
        f"t.head_of(t.write_head(Path({str(tmp_path)!r})))\n"
        "sys.exit(bool({'keras', 'tensorflow'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
