"""Runs, stores and exports that an earlier release wrote open for ever, and predict what they predicted then.

Every command runs in this process, in a copy of the folder, so that TensorFlow is loaded once. Their paths are relative to it.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from features.recipe import Recipe
from features.store.reader import FeatureStore
from pipeline.cli import main

GOLDEN = Path(__file__).resolve().parent / "golden" / "runs"
DIGEST = "8884ff58f8997b23858e965c17ebe36beda5487dd574ac0df143474ae2dd46b3"
FROZEN: dict[str, Any] = json.loads((GOLDEN / "frozen.json").read_text(encoding="utf-8"))
RUNS, EXPORTS, STORES, BOARDS = (FROZEN[name] for name in ("runs", "exports", "stores", "leaderboards"))
TOLERANCE = 1e-5  # in probability: predictions have six digits, and engines add in different orders
# A feature that is stored in float16 may be rounded the other way; LiteRT multiplies in another order.
TOLERANCE_HALF = TOLERANCE_LITERT = 1e-3


def digest_of_folder(folder: Path) -> str:
    """Of all names and contents."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def call(*words: object) -> str:
    """A command; its standard output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main([*map(str, words), "--quiet"])
    assert code == 0
    return said.getvalue()


def document(*words: object) -> Any:
    return json.loads(call(*words, "--json"))


def check_predictions(model: str, expected: dict[str, Any], tolerance: float, *words: object) -> None:
    """From the images to probabilities: names, classes and values are those that were written."""
    lines = [json.loads(line) for line in call("predict", model, "images", "--format", "jsonl", *words).splitlines()]
    assert [line["file"] for line in lines] == FROZEN["images"]
    assert {tuple(line["probabilities"]) for line in lines} == {tuple(expected["classes"])}
    received = [list(line["probabilities"].values()) for line in lines]
    np.testing.assert_allclose(received, expected["probabilities"], rtol=0, atol=tolerance)


def validation_probabilities(run: str | Path) -> np.ndarray:
    with open(Path(run) / "predictions.csv", newline="", encoding="utf-8") as stream:
        return np.array([line[5:] for line in list(csv.reader(stream))[1:]], np.float64)


def tolerance_of(kind: str) -> float:
    return TOLERANCE_HALF if RUNS[kind]["run"].startswith("pairs/") else TOLERANCE


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of a test: a copy, which no command here may change. What they write goes elsewhere."""
    folder = tmp_path_factory.mktemp("golden") / "runs"
    shutil.copytree(GOLDEN, folder)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    assert digest_of_folder(folder) == digest_of_folder(GOLDEN) == DIGEST


def test_the_golden_runs_are_those_that_were_written() -> None:
    assert digest_of_folder(GOLDEN) == DIGEST
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", STORES)
def test_after_an_upgrade_images_are_hashed_once_and_never_inferred_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(GOLDEN, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    before = {key: np.array(FeatureStore.open(name).array(key)) for key in FeatureStore.open(name).names}
    where = "pairs" if name == "pairs.h5" else "heads"
    runs = digest_of_folder(Path(where))
    command = [*STORES[name]["command"], "--out", name]
    for hashed in (len(FROZEN["images"]), 0):
        answer = document(*command)
        assert (answer["hashed"], answer["inferred"], answer["new"], answer["changed"]) == (hashed, 0, 0, 0)
        store = FeatureStore.open(name)
        store.verify()
        assert store.data_digest == STORES[name]["data_digest"]
        assert {key: item.fingerprint for key, item in store.recipes.items()} == STORES[name]["fingerprints"]
        for key, features in before.items():
            np.testing.assert_array_equal(store.array(key)[:], features)
    assert answer["written"] is False
    board = document("leaderboard", where)
    assert {row["data"] for row in board} == {STORES[name]["data_digest"][:10]}  # the runs fit the store as before
    assert [row["run_id"] for row in board if row["chosen"]] == [
        row["run_id"] for row in BOARDS[where] if row["chosen"]
    ]
    assert digest_of_folder(Path(where)) == runs


@pytest.mark.parametrize("number", range(len(FROZEN["recipes"])))
def test_recipes_of_real_networks_keep_their_fingerprints(number: int) -> None:
    frozen = FROZEN["recipes"][number]
    recipe = Recipe.from_dict(frozen["recipe"])
    assert recipe.to_dict() == frozen["recipe"]
    assert recipe.fingerprint == frozen["fingerprint"]


@pytest.mark.parametrize("name", STORES)
def test_a_golden_store_opens(name: str) -> None:
    store = FeatureStore.open(GOLDEN / name)
    store.verify()
    assert store.data_digest == STORES[name]["data_digest"]
    for data_set, recipe in store.recipes.items():
        assert recipe.fingerprint == STORES[name]["fingerprints"][data_set]
        assert Recipe.from_dict(recipe.to_dict()).fingerprint == recipe.fingerprint
    assert set(store.recipes) == set(STORES[name]["fingerprints"])


@pytest.mark.parametrize("kind", RUNS)
def test_ids_of_a_golden_run(kind: str) -> None:
    """The folder's name is the id; a run notes the data and the recipe that it was made of."""
    folder = GOLDEN / RUNS[kind]["run"]
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    features = config["features"]
    assert config["run_id"] == folder.name
    assert Recipe.from_dict(features["recipe"]).fingerprint == features["fingerprint"]
    assert features["data_digest"] == STORES[features["store"]]["data_digest"]
    if config["stage"] == "head":
        assert STORES[features["store"]]["fingerprints"][features["name"]] == features["fingerprint"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STORES)
def test_the_same_images_and_network_give_the_golden_store(name: str, copy: Path, tmp_path: Path) -> None:
    call(*STORES[name]["command"], "--out", tmp_path / name)
    made, golden = FeatureStore.open(tmp_path / name), FeatureStore.open(name)
    assert made.data_digest == STORES[name]["data_digest"]
    assert {key: recipe.fingerprint for key, recipe in made.recipes.items()} == STORES[name]["fingerprints"]
    for data_set in golden.names:
        half = golden.array(data_set).dtype == np.float16
        assert made.array(data_set).dtype == golden.array(data_set).dtype
        np.testing.assert_allclose(
            made.array(data_set)[:].astype(float), golden.array(data_set)[:], rtol=1e-3 if half else 1e-5, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_golden_run_predicts_what_it_predicted(kind: str, copy: Path) -> None:
    check_predictions(RUNS[kind]["run"], RUNS[kind], tolerance_of(kind))


@pytest.mark.slow
def test_a_golden_run_and_its_export_are_scored_on_the_labelled_images(copy: Path) -> None:
    frozen = RUNS["dropout-linear"]
    right = [
        frozen["classes"][int(np.argmax(values))] == name.partition("/")[0]
        for name, values in zip(FROZEN["images"], frozen["probabilities"], strict=True)
    ]
    answers = [document("evaluate", model, "images") for model in (frozen["run"], "exports/dropout-linear.keras")]
    for answer in answers:
        assert (answer["images"], answer["evaluated"], answer["run"]) == (36, 36, Path(frozen["run"]).name)
        assert answer["scores"]["accuracy"] == np.mean(right)
        assert np.trace(answer["confusion"]) == sum(right)
    rows = len(FeatureStore.open("features.h5").rows("train"))
    assert [answer["seen"] for answer in answers] == [{"train": rows, "validation": 9}, None]


@pytest.mark.slow
def test_a_golden_run_predicts_the_same_over_views(copy: Path) -> None:
    frozen = FROZEN["views"]
    check_predictions(RUNS[frozen["kind"]]["run"], frozen, TOLERANCE_HALF, "--views", frozen["views"])


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPORTS)
def test_a_golden_export_predicts_what_it_predicted(path: str, copy: Path) -> None:
    frozen = EXPORTS[path]
    tolerance = TOLERANCE_LITERT if frozen["format"] == "litert" else TOLERANCE
    check_predictions(path, frozen, tolerance)
    # The run's own prediction; an artefact computes in float32 throughout.
    both = frozen["probabilities"], RUNS[frozen["kind"]]["probabilities"]
    np.testing.assert_allclose(*both, rtol=0, atol=max(tolerance, tolerance_of(frozen["kind"])))


@pytest.mark.slow
@pytest.mark.parametrize("where", BOARDS)
def test_leaderboards_of_golden_runs(where: str, copy: Path) -> None:
    rows = json.loads(call("leaderboard", where, "--json"))
    assert all(row.pop("fit_seconds") >= 0 for row in rows)
    assert rows == BOARDS[where]


# The golden runs have no plots, and a finished sweep draws those that are missing.
@pytest.mark.usefixtures("without_plots")
@pytest.mark.slow
def test_a_golden_run_that_is_asked_for_again_is_there(copy: Path) -> None:
    """The same command gives the same id, or it would train, and write into the folder."""
    for frozen in RUNS.values():
        if "--heads" in frozen["command"]:
            continue
        answer = document(*frozen["command"])
        if "--folds" in frozen["command"]:
            assert (answer["runs"], answer["trained"], answer["cached"]) == ([Path(frozen["run"]).name], 0, 1)
        else:
            assert (answer["run"], answer["cached"]) == (frozen["run"], True)


@pytest.mark.usefixtures(
    "without_plots"
)  # the golden runs have none, and a finished sweep draws those that are missing
@pytest.mark.slow
def test_the_golden_sweep_that_is_asked_for_again_is_there(copy: Path) -> None:
    runs = [frozen for kind, frozen in RUNS.items() if kind.startswith("sweep")]
    answer = document(*runs[0]["command"])
    assert answer["runs"] == [Path(frozen["run"]).name for frozen in runs]
    assert (answer["trained"], answer["cached"], answer["failed"]) == (0, len(runs), [])
    assert answer["chosen"] == FROZEN["chosen of the sweep"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("kind", ["logistic on principal components", "random forest", "calibrated of two"])
def test_a_golden_head_trained_anew_has_the_same_id_and_says_the_same(kind: str, copy: Path, tmp_path: Path) -> None:
    golden = RUNS[kind]["run"]
    command = RUNS[kind]["command"]
    answer = document(*command[: command.index("--runs")], "--runs", tmp_path)
    assert (Path(answer["run"]), answer["cached"]) == (tmp_path / Path(golden).name, False)
    np.testing.assert_allclose(validation_probabilities(answer["run"]), validation_probabilities(golden), atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_the_golden_bank_trained_anew_has_the_same_ids_and_says_the_same(copy: Path, tmp_path: Path) -> None:
    runs = [Path(frozen["run"]) for kind, frozen in RUNS.items() if kind.startswith("sweep")]
    answer = document("train-head", "features.h5", "--heads", "sweep.yaml", "--runs", tmp_path, "--n-jobs", 1)
    assert answer["runs"] == [run.name for run in runs]
    for run in runs:
        made, golden = validation_probabilities(tmp_path / run.name), validation_probabilities(run)
        np.testing.assert_allclose(made, golden, atol=1e-3)


@pytest.mark.slow
def test_a_golden_head_fine_tuned_anew_has_the_same_id_and_says_the_same(copy: Path, tmp_path: Path) -> None:
    frozen = RUNS["tuned from a store"]
    answer = document(*frozen["command"], "--runs", tmp_path)
    assert (Path(answer["run"]), answer["cached"]) == (tmp_path / Path(frozen["run"]).name, False)
    made, golden = validation_probabilities(answer["run"]), validation_probabilities(frozen["run"])
    np.testing.assert_allclose(made, golden, atol=1e-3)


@pytest.mark.slow
def test_a_report_on_golden_runs(copy: Path, tmp_path: Path) -> None:
    answer = document("report", "heads", "--out", tmp_path / "report.html")
    (group,) = answer["groups"]
    chosen = next(row["run_id"] for row in BOARDS["heads"] if row["chosen"])
    assert (answer["runs"], group["runs"], group["chosen"]) == (len(BOARDS["heads"]), len(BOARDS["heads"]), chosen)
    assert group["digest"] == STORES["features.h5"]["data_digest"]
    assert group["pictures"] >= len(FROZEN["images"]) // 2  # the images and the store were found
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(row["run_id"] in page for row in BOARDS["heads"])


@pytest.mark.slow
def test_a_golden_run_is_exported_again(copy: Path, tmp_path: Path) -> None:
    frozen = EXPORTS["exports/linear-svm-of-two.onnx"]
    out = tmp_path / "again.onnx"
    answer = document("export", RUNS[frozen["kind"]]["run"], "--format", "onnx", "--out", out, "--images", "images")
    assert (answer["run"], answer["classes"]) == (Path(RUNS[frozen["kind"]]["run"]).name, frozen["classes"])
    assert answer["parity_gap"] <= answer["tolerance"]
    check_predictions(str(out), frozen, TOLERANCE)
