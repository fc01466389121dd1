"""Make the golden runs: run folders, stores and exports that every later release must open, with the predictions below.

    python tests/golden/make_golden_runs.py FOLDER

writes everything into FOLDER, which must not exist: images, a network of a few thousand parameters, its stores, runs of every
kind of head, one fine-tuned on images and one from a store, a sweep, an export in each format, and ``frozen.json``, what this
release says of them. What lies in ``runs`` beside this script was written by commit b0cdac5f0d546e81441d58104d4040cf21e6a682
and is never written again; this script is kept to say how. Made by later code, new files go into a folder of their own.

Everything is done by the command line, as a user would, from within FOLDER. Two things are not as a release leaves them:

- Absolute paths (of the network and the images in a store, of the store in a run) are written relative to FOLDER, so that a
  checkout may lie anywhere. A run is opened from within FOLDER, or a copy of it.
- Pictures are removed from all runs but one; they are larger than everything else.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16  # of the network; some images are of other sizes
CLASSES = ("brick", "leaf", "wave")
COUNT = 12  # images per class
IMAGES = [f"{name}/{number:02d}.png" for name in CLASSES for number in range(COUNT)]
SIZES = ((16, 16), (24, 18), (13, 20))
TIME = 1_500_000_000_000_000_000  # of every image file, in nanoseconds
SPLIT, GROUPED = "stratified:0.6,0.25,0.15", "hash:0.6,0.4@2"

# Arguments of `train-head features.h5`, one run each: three classes, vectors of 12 columns.
HEADS: dict[str, list[str]] = {
    "logistic": ["--head", "logistic", "--test"],
    "logistic, balanced": ["--head", "logistic", "--param", "class_weight=balanced", "--param", "choose=balanced_accuracy"],
    "logistic on principal components": ["--head", "logistic", "--param", "pca=4"],
    "logistic, judged by folds": ["--head", "logistic", "--param", "C=0.03", "--folds", "3"],
    "ridge": ["--head", "ridge"],
    "linear-svm": ["--head", "linear-svm"],
    "lda": ["--head", "lda"],
    "sgd": ["--head", "sgd", "--seed", "3"],
    "knn": ["--head", "knn"],
    "random forest": ["--head", "sklearn.ensemble.RandomForestClassifier", "--param", "n_estimators=3", "--param", "max_depth=3"],
    "radius neighbours": [
        *("--head", "sklearn.neighbors.RadiusNeighborsClassifier", "--param", "radius=20.0"),
        *("--param", "weights=distance"),
    ],
    "ball tree on principal components": [
        *("--head", "sklearn.neighbors.KNeighborsClassifier", "--param", "algorithm=ball_tree"),
        *("--param", "n_neighbors=4", "--param", "weights=distance", "--param", "pca=5", "--param", "scale=false"),
    ],
    "support vectors": ["--head", "sklearn.svm.SVC", "--param", "C=2.0"],
    "dense": [
        *("--head", "dense", "--param", "hidden=[8]", "--param", "batch_norm=true", "--param", "l2=0.001"),
        *("--param", "epochs=8", "--param", "schedule=cosine", "--param", "learning_rate=0.05"),
    ],
    "dropout-linear": ["--head", "dropout-linear", "--param", "learning_rate=0.02", "--param", "epochs=12"],
    "mlp-256, calibrated": [
        *("--head", "mlp-256", "--param", "calibrate=true", "--param", "epochs=8", "--param", "learning_rate=0.01"),
    ],
    "linear-sgd": ["--head", "linear-sgd", "--param", "epochs=8", "--param", "learning_rate=0.1"],
    "mlp-256-sgd": [
        *("--head", "mlp-256-sgd", "--param", "hidden=[8]", "--param", "epochs=8", "--param", "learning_rate=0.1"),
    ],
    "mlp-1024-1024": [
        *("--head", "mlp-1024-1024", "--param", "hidden=[12,4]", "--param", "epochs=9", "--param", "learning_rate=0.1"),
    ],
}  # fmt: skip
# Of `train-head pairs.h5`: two classes, 2x2x12 features in float16, two views of each image, groups.
PAIRS: dict[str, list[str]] = {
    "logistic of two": ["--head", "logistic", "--average-views"],
    "linear-svm of two": ["--head", "linear-svm", "--pool", "max"],
    "histogram boosting of two": [
        *("--head", "sklearn.ensemble.HistGradientBoostingClassifier", "--param", "max_iter=2"),
        *("--param", "min_samples_leaf=3", "--param", "max_leaf_nodes=4"),
    ],
    "calibrated of two": [
        *("--head", "sklearn.calibration.CalibratedClassifierCV", "--param", "cv=2"),
        *("--param", 'estimator={"sklearn.svm.LinearSVC": {"C": 0.5}}'),
    ],
    "perceptron of two": [
        *("--head", "sklearn.neural_network.MLPClassifier", "--param", "hidden_layer_sizes=[6]", "--param", "max_iter=40"),
    ],
    "dropout-linear of two": [
        *("--head", "dropout-linear", "--param", "epochs=6", "--param", "views=plain", "--param", "learning_rate=0.02"),
    ],
    "mlp-256 of two": [
        *("--head", "mlp-256", "--param", "hidden=[8]", "--param", "epochs=6", "--param", "learning_rate=0.02"),
    ],
}  # fmt: skip
SWEEP = """\
version: 1
seed: 5
heads:
  - head: dropout-linear           # these three are trained together, as a bank
    grid: {epochs: [10]}
    log: {learning_rate: [0.01, 0.1, 3]}
  - head: mlp-256
    grid: {hidden: [[6]], epochs: [6], learning_rate: [0.02]}
  - head: logistic
    grid: {C: [0.001, 1.0]}
  - head: knn
    grid: {n_neighbors: [3]}
"""
TUNING = ["--epochs", "3", "--learning-rate", "0.003", "--batch-size", "8"]
EXPORTS = {  # name -> format, and the run that it is made of
    "exports/dropout-linear.keras": ("keras", "dropout-linear"),
    "exports/mlp-256-calibrated": ("saved_model", "mlp-256, calibrated"),
    "exports/linear-svm-of-two.onnx": ("onnx", "linear-svm of two"),
    "exports/tuned.tflite": ("litert", "tuned"),
    "exports/logistic-pca": ("openvino", "logistic on principal components"),
}


def paint(folder: Path) -> None:
    """Small noisy images: stripes that lie across, lie along, or wave. Some are grey, some half transparent."""
    generator = np.random.Generator(np.random.Philox(key=1))
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(COUNT):
            width, height = SIZES[number % len(SIZES)]
            x, y = np.arange(width)[None, :], np.arange(height)[:, None]
            bend = (x * 0 + y, x + y * 0, x + 2.5 * np.sin(y / 2.5))[label]
            stripes = 30 * np.sin(bend * generator.uniform(0.6, 1.3) + generator.uniform(0, 6))
            colour = generator.uniform(75, 110, 3) + np.eye(3)[label] * 70
            pixels = colour + stripes[:, :, None] + generator.normal(0, 15, (height, width, 1))
            image = Image.fromarray((np.clip(pixels, 0, 255) // 8 * 8).astype(np.uint8))
            if number == 5:
                image = image.convert("L")
            if number == 6:
                image.putalpha(Image.new("L", image.size, 160))
            path = folder / name / f"{number:02d}.png"
            image.save(path, optimize=True)
            os.utime(path, ns=(TIME, TIME))


def write_manifest(path: Path, images: Path) -> None:
    """The same images as two classes, with groups of four."""
    rows = [
        [f"{images.name}/{name}/{number:02d}.png", "flat" if label == 0 else "upright", f"{name} {number // 4}"]
        for label, name in enumerate(CLASSES)
        for number in range(COUNT)
    ]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["path", "lies", "group"], *rows])


def save_network(path: Path) -> None:
    """Two convolutions with BatchNorm whose statistics are not those of a new layer."""
    import keras

    keras.utils.set_random_seed(7)
    layers = keras.layers
    tensor = image = keras.Input((SIZE, SIZE, 3), name="image")
    tensor = layers.Rescaling(1 / 127.5, -1, name="rescaling")(tensor)
    for number, (filters, width, strides) in enumerate(((6, 5, 4), (12, 3, 2)), 1):
        tensor = layers.Conv2D(filters, width, strides, padding="same", use_bias=False, name=f"conv_{number}")(tensor)
        tensor = layers.BatchNormalization(name=f"norm_{number}")(tensor)
        tensor = layers.ReLU(name=f"relu_{number}")(tensor)
    model = keras.Model(image, tensor, name="tiny")
    generator = np.random.Generator(np.random.Philox(key=2))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.gamma.assign(generator.uniform(0.7, 1.3, layer.gamma.shape))
            layer.beta.assign(generator.normal(0.2, 0.3, layer.beta.shape))
            layer.moving_mean.assign(generator.normal(0, 0.1, layer.moving_mean.shape))
            layer.moving_variance.assign(generator.uniform(0.03, 0.1, layer.moving_variance.shape))
    model.save(path)


def recipes() -> list[dict[str, Any]]:
    """Recipes of real networks, in every field that people change."""
    from features.augmentation import PRESETS
    from features.recipe import PixelRule, Recipe

    mobilenet = "c90665295fb2cb27a687c2935542fe0a4c8ecede7004096ed874bb3b18c0a7e8"
    vgg = "d35d892f0363f5aa55af32a78c1861f2831cac7c59a8866aa8be6b66e1e05f5a"
    plain = Recipe("mobilenetv2", mobilenet, "out_relu", "avg", PixelRule(224, 224), "mobilenet_v2")
    return [
        recipe.to_dict()
        for recipe in (
            plain,
            plain.augmented(PRESETS["flip-rotation"], 11),
            Recipe("mobilenetv2", mobilenet, "block_15_add", "none", PixelRule(160, 160, decode="fast"), "mobilenet_v2"),
            Recipe(
                *("mobilenetv2", mobilenet, "out_relu", "max", PixelRule(192, 256, fit="pad"), "mobilenet_v2"),
                dtype="float16",
                precision="bfloat16:openvino",
            ),
            Recipe("vgg16", vgg, "block5_pool", "flatten", PixelRule(150, 150, resize="keras", fit="crop"), "caffe"),
            Recipe("resnet50", "5" * 64, "conv5_block3_out", "avg", PixelRule(224, 224), "caffe"),
        )
    ]  # fmt: skip


def call(*words: str) -> str:
    """A command in this process; its standard output."""
    from pipeline.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main([*words, "--quiet"])
    if code:
        raise SystemExit(f"{' '.join(words)}: exit code {code}")
    return said.getvalue()


def predict(model: str, *words: str) -> dict[str, Any]:
    """Class names and the probabilities of each image, as ``predict`` prints them."""
    lines = [json.loads(line) for line in call("predict", model, "images", "--format", "jsonl", *words).splitlines()]
    assert [line["file"] for line in lines] == IMAGES
    return {
        "classes": list(lines[0]["probabilities"]),
        "probabilities": [list(line["probabilities"].values()) for line in lines],
    }


def write_relative_paths() -> None:
    """Make stores note where network and images are relative to the working folder."""
    from features.extraction.extraction import Extraction

    noted = Extraction._provenance

    def relative(self: Any, plan: Any, done: Any) -> dict[str, object]:
        here = f"{Path.cwd()}{os.sep}"
        return {
            name: value.removeprefix(here) if isinstance(value, str) else value
            for name, value in {**noted(self, plan, done), "root": os.path.relpath(self.images.root)}.items()
        }

    Extraction._provenance = relative  # type: ignore[method-assign]


def make(folder: Path) -> dict[str, Any]:
    """Everything within the working folder, which is `folder`; what is frozen of it."""
    from features.store.reader import FeatureStore

    paint(folder / "images")
    write_manifest(folder / "pairs.csv", folder / "images")
    save_network(folder / "tiny.keras")
    (folder / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    write_relative_paths()
    network = ["--backbone", "tiny.keras"]
    usual = [*network, "--split", SPLIT]
    extractions = {
        "features.h5": ["images", *usual],
        "boundary.h5": ["images", *usual, "--layer", "boundary"],
        "pairs.h5": [
            *(
                "pairs.csv",
                "--target",
                "lies",
                *network,
                "--split",
                GROUPED,
                "--layer",
                "relu_2",
                "--pooling",
                "none",
                "--dtype",
                "float16",
            ),
            *("--views", "2", "--augment", "flip-rotation", "--seed", "9"),
        ],
    }
    stores = {}
    for name, words in extractions.items():
        call("extract", *words, "--out", name)
        store = FeatureStore.open(name)
        stores[name] = {
            "command": ["extract", *words],
            "data_digest": store.data_digest,
            "fingerprints": {key: recipe.fingerprint for key, recipe in store.recipes.items()},
        }

    runs: dict[str, dict[str, Any]] = {}

    def keep(kind: str, command: list[str], run: str) -> None:
        """Note a run by the folder that it has now."""
        runs[kind] = {"command": command, "run": str(Path(os.path.relpath(run)))}

    for store, where, heads in (("features.h5", "heads", HEADS), ("pairs.h5", "pairs", PAIRS)):
        for kind, words in heads.items():
            command = ["train-head", store, *words, "--runs", where]
            document = json.loads(call(*command, "--json"))
            keep(kind, command, document.get("run") or f"{where}/{document['runs'][0]}")
    for kind, words in (("tuned", ["--images", "images"]), ("tuned from a store", ["--from-cache", "boundary.h5"])):
        start = runs["dropout-linear" if kind == "tuned" else "linear-sgd"]["run"]
        command = ["finetune", start, *words, *TUNING]
        keep(kind, command, json.loads(call(*command, "--json"))["run"])
    command = ["train-head", "features.h5", "--heads", "sweep.yaml", "--runs", "sweep", "--test"]
    swept = json.loads(call(*command, "--json"))
    for number, run in enumerate(swept["runs"]):
        keep(f"sweep {number}", command, f"sweep/{run}")

    for config in folder.glob("*/*/config.yaml"):
        config.write_text(config.read_text(encoding="utf-8").replace(f"{folder}{os.sep}", ""), encoding="utf-8")
    for plots in folder.glob("*/*/plots"):
        if plots.parent.name != Path(runs["logistic"]["run"]).name:
            shutil.rmtree(plots)
    (folder / "exports").mkdir()
    exports = {}
    for path, (format, kind) in EXPORTS.items():
        call("export", runs[kind]["run"], "--format", format, "--out", path, "--images", "images")
        exports[path] = {"format": format, "kind": kind, **predict(path)}
    for entry in runs.values():
        entry |= predict(entry["run"])
    views = {"kind": "logistic of two", "views": 4, **predict(runs["logistic of two"]["run"], "--views", "4")}

    boards = {}
    for where in ("heads", "pairs", "sweep"):
        boards[where] = json.loads(call("leaderboard", where, "--json"))
        for row in boards[where]:
            row.pop("fit_seconds")
    return {
        "commit": _commit(),
        "images": IMAGES,
        "stores": stores,
        "recipes": [{"recipe": values, "fingerprint": _fingerprint(values)} for values in recipes()],
        "chosen of the sweep": swept["chosen"],
        "runs": runs,
        "exports": exports,
        "views": views,
        "leaderboards": boards,
    }


def _fingerprint(values: dict[str, Any]) -> str:
    from features.recipe import Recipe

    return Recipe.from_dict(values).fingerprint


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def lines(values: Any, depth: int) -> str:
    """JSON with a line for each entry of the outer levels, and one for all that lies deeper."""
    if depth == 0 or not isinstance(values, dict | list) or not values:
        return json.dumps(values)
    margin = "\n" + " " * (4 - depth)
    if isinstance(values, dict):
        inner = [f"{json.dumps(key)}: {lines(value, depth - 1)}" for key, value in values.items()]
        return "{" + margin + f",{margin}".join(inner) + margin[:-1] + "}"
    return "[" + margin + f",{margin}".join(lines(value, depth - 1) for value in values) + margin[:-1] + "]"


def main(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    folder.mkdir(parents=True)
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as cache, contextlib.chdir(folder):
        os.environ["BOTTLENECK_CACHE"] = cache
        frozen = make(folder)
        (folder / "frozen.json").write_text(lines(frozen, 3) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
