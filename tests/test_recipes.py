"""Published recipes from their files, through the command line, shortened; and recipe files that are wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import STRESS, listing, paint_folder
from kitchen import MOBILENET, assert_best_epoch_is_kept, cook, history, predicted
from photographs import CATS_DOGS

from features.store.reader import FeatureStore
from pipeline.cli import main
from pipeline.experiments.sampling import name_in_a_folder
from pipeline.experiments.schema import experiment_names, read_experiment
from pipeline.runs.folder import Run


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_mobilenetv2_cats_dogs(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ("mobilenetv2-cats-dogs", assets / CATS_DOGS, "--out", tmp_path / "out", "--image-size", 96)
    typed += ("--weights", assets / MOBILENET)  # type: ignore[assignment]
    ways = cook(capsys, *typed)
    assert {way: list(steps) for way, steps in ways.items()} == {
        "published": ["1 extract", "2 train_head", "3 finetune", "4 finetune"],
        "cached": ["1 extract", "2 train_head", "3 predict"],
        "cached-bfloat16": ["1 extract", "2 train_head", "3 predict"],
    }
    published, cached, fast = ways.values()
    exact, rounded = (FeatureStore.open(way["1 extract"]["document"]["file"]) for way in (cached, fast))
    assert [store.recipes["out_relu.avg"].precision.partition(":")[0] for store in (exact, rounded)] == [
        "float32",
        "bfloat16",
    ]
    difference = np.linalg.norm(rounded.load()[0] - exact.load()[0]) / np.linalg.norm(exact.load()[0])
    assert 1e-3 < difference < 0.4  # of two precisions
    extracted = published["1 extract"]["document"]
    assert (extracted["classes"], extracted["rows"]) == ({"cats": 32, "dogs": 32}, 64)
    assert extracted["splits"] == {"train": 32, "validation": 22, "test": 10}  # a part of validation is for testing
    head, tail = published["3 finetune"]["document"], published["4 finetune"]["document"]
    assert (head["trainable_variables"], head["trainable_parameters"], head["cut"]) == (2, 1_281, "out_relu")
    assert (tail["trainable_variables"], tail["trainable_parameters"]) == (56, 1_862_721)
    assert tail["cut"] == "block_10_project_BN"
    assert (head["parity_gap"], tail["parity_gap"] < 1e-4) == (None, True)
    assert tail["start"] == Path(head["run"]).name
    assert tail["before"]["accuracy"] == head["after"]["accuracy"]
    assert tail["before"]["log_loss"] == pytest.approx(head["after"]["log_loss"], abs=1e-5)
    assert history(head["run"])["epoch"] == [0, 1, 2]
    assert history(tail["run"])["epoch"] == [10, 11, 12]
    for line in (published["3 finetune"], published["4 finetune"]):
        assert_best_epoch_is_kept(line)
    settings = Run.open(tail["run"]).config["finetune"]
    assert (settings["bn"], settings["optimizer"], settings["learning_rate"]) == ("affine", "rmsprop", 3e-5)
    # The prediction names images of the way's own validation split, and is what the run noted of them.
    rows = predicted(cached["3 predict"])
    with open(Path(cached["2 train_head"]["document"]["run"]) / "predictions.csv", newline="") as stream:
        noted = {row["path"]: row for row in csv.DictReader(stream)}
    assert len(rows) == 5
    for row in rows:
        assert (assets / CATS_DOGS / row["file"]).is_file()
        assert float(row["cats"]) == pytest.approx(float(noted[row["file"]]["cats"]), abs=1e-4)
    # A second time nothing is computed.
    runs = tmp_path / "out" / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    again = cook(capsys, *typed)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    for way, steps in again.items():
        assert steps["1 extract"]["document"]["inferred"] == 0
        for name, line in steps.items():
            assert line["made"] == ways[way][name]["made"]
            assert line["document"].get("cached", True)


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.skipif(not STRESS, reason="only `make stress` does it")
@pytest.mark.usefixtures("without_plots")
def test_resnet_recipes(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--image-size", 64, "--weights", "random")
    (way,) = cook(capsys, "resnet50-dense256", assets / CATS_DOGS, "--out", tmp_path / "dense", *small).values()
    (features,) = way["1 extract"]["document"]["data_sets"].values()
    assert features["shape"] == [64, 1, 2048]
    assert way["2 train_head"]["n"] == 32  # these images bring their splits
    assert history(way["2 train_head"]["document"]["run"])["epoch"][-1] == 2
    assert len(predicted(way["3 predict"])) == 5
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pixels = np.clip(generator.normal(128, 30, (60, 32, 32, 3)) + 50 * (labels - 1)[:, None, None, None], 0, 255)
    pixels, column = pixels.astype(np.uint8), labels[:, None]
    parts = {"x_train": pixels[:48], "y_train": column[:48], "x_test": pixels[48:], "y_test": column[48:]}
    np.savez(tmp_path / "cifar.npz", **parts)  # type: ignore[arg-type]
    ways = cook(capsys, "resnet-cifar10", tmp_path / "cifar.npz", "--out", tmp_path / "cifar", *small)
    assert list(ways) == ["random-crops", "mild-crops"]
    for steps in ways.values():
        document = steps["1 extract"]["document"]
        assert document["classes"] == {"0": 20, "1": 20, "2": 20}
        assert (document["splits"]["test"], document["splits"]["train"] + document["splits"]["validation"]) == (12, 48)
        (features,) = document["data_sets"].values()
        assert features["shape"] == [60, 4, 2048]
        assert steps["2 train_head"]["n"] == document["splits"]["validation"]
        assert history(steps["2 train_head"]["document"]["run"])["epoch"][-1] == 2
    first, second = (steps["1 extract"]["document"]["data_sets"].popitem()[1] for steps in ways.values())
    assert (first["augment"], second["augment"]) == ("crop-flip", "crop-rotation-jitter")


# -------------------------------------------------------------------------------------------- without TensorFlow
GOOD = """version: 1
about: mine
ways:
  mine:
    steps:
      - extract: {backbone: mobilenetv2, image_size: 64}
      - train_head: {head: logistic}
      - finetune: {epochs: 2}
      - predict: {images: 1}
"""
WRONG = [
    ("about", "abuot", "unknown key 'abuot'; did you mean 'about'"),
    ("steps:", "stepz:", "unknown key 'ways.mine.stepz'; did you mean 'steps'?"),
    ("train_head:", "train-head:", "unknown key 'ways.mine.steps.1.train-head'; did you mean 'train_head'?"),
    ("{head:", "{haed:", "unknown key 'ways.mine.steps.1.train_head.haed'; did you mean 'head'?"),
    ("logistic", "logisitc", "head: received 'logisitc', expected one of logistic"),
    ("logistic}", "logistic, params: {c: 3}}", "head 'logistic': unknown key 'c'; did you mean 'C'?"),
    ("{head: logistic}", "", "expected one of extract, train_head, finetune, predict, with its options"),
    ("image_size", "imagesize", "unknown key 'ways.mine.steps.0.extract.imagesize'; did you mean 'image_size'"),
    ("image_size: 64", "layers: 3", "ways.mine.steps.0.extract.layers: received 3, expected a valid tuple"),
    ("image_size: 64", "image_size: big", "image_size: received 'big', expected a valid integer"),
    ("epochs: 2", "epoch: 2", "finetune: unknown key 'epoch'; did you mean 'epochs'"),
    ("epochs: 2", "epochs: 0", "finetune: epochs: received 0, expected greater than or equal to 1"),
    ("epochs: 2", "bn: train", "from scratch"),
    ("epochs: 2", "from_cache: f.h5", "from_cache: expected true"),
    ("images: 1", "images: 0", "ways.mine.steps.3.predict.images: received 0, expected greater than 0"),
    ("      - train_head: {head: logistic}\n", "", "expected train_head in a step before finetune, which is step 2"),
    ("version: 1", "version: 2", "version: received 2, expected 1"),
    ("about: mine", "about: mine\nabout: yours", "not valid YAML in line 3: the key 'about' is given twice"),
    ("ways:", "ways: [", "not valid YAML in line "),
]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return paint_folder(tmp_path / "photos", {"cat": 6, "dog": 6})


def refused(capsys: pytest.CaptureFixture[str], typed: list[str], message: str) -> None:
    assert main(["recipe", *typed]) == 2, typed
    out, errors = capsys.readouterr()
    assert (out, message in errors) == ("", True), errors
    assert errors.startswith(("error: ", "Usage: ")), errors
    assert "Traceback" not in errors


def test_a_wrong_recipe_file_is_one_clear_error_and_nothing_is_made(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = photos.parent / "mine.yaml"
    for old, new, message in WRONG:
        assert old in GOOD
        file.write_text(GOOD.replace(old, new, 1))
        refused(capsys, ["mine.yaml", "photos"], message)
    for content, message in ((b"", "received None"), (b"- 1", "received [1]"), (b"\xff\xfe", "cannot be read")):
        file.write_bytes(content)
        refused(capsys, ["mine.yaml", "photos"], message)
    file.unlink()
    refused(capsys, ["mine.yaml", "photos"], "mine.yaml: cannot be read as a configuration file: No such file")
    assert [name for name in listing(photos.parent) if not name.startswith("photos")] == []


def test_unknown_recipes_ways_and_options(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["vgg-flowers", "photos"], "expected one of mobilenetv2-cats-dogs")
    refused(capsys, ["vgg-flowers", "photos"], "did you mean 'vgg16-flowers'")
    refused(
        capsys,
        ["vgg16-flowers", "photos", "--way", "cache"],
        "way: received 'cache', expected one of published, cached; did you mean 'cached'?",
    )
    refused(capsys, ["vgg16-flowers"], "give the images, as in: bottleneck recipe vgg16-flowers my/photos")
    refused(capsys, ["vgg16-flowers", "photos", "--image-size", "x"], "such as 224 or 192x256")
    refused(capsys, ["vgg16-flowers", "photos", "--limits", "3"], "--limit")
    refused(capsys, ["vgg16-flowers", "photos", "--limit", "0"], "--limit")
    assert [name for name in listing(photos.parent) if not name.startswith("photos")] == []
    paint_folder(photos, {"owl": 2}, start=50)
    assert main(["recipe", "vgg16-flowers", "photos"]) == 1  # neither those two classes nor any two
    assert (
        "has the classes cat, dog, owl; this experiment is about daffodil and colts_foot, or any 2"
        in capsys.readouterr().err
    )


def test_copies_keep_their_names_and_stay_in_their_folder() -> None:
    for name, expected in (("cats/1.jpg", "cats/1.jpg"), ("x_train/000007", "x_train/000007.png")):
        assert name_in_a_folder(name) == expected
    for name in ("/photos/1.jpg", "../1.jpg", "a/../../1.jpg"):
        folder, file = name_in_a_folder(name).split("/")
        assert (len(folder), file) == (16, "1.jpg")


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--json"]) == 0
    listed = {row["recipe"]: row["ways"] for row in json.loads(capsys.readouterr().out)["recipes"]}
    assert list(listed) == experiment_names()
    assert listed["vgg16-three-ways"] == "a-architecture-only, b-bottleneck-features, c-last-block, d-fc-layer"
    for name in experiment_names():
        assert read_experiment(name).about
