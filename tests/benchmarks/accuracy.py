"""What each choice is worth: validation accuracy by network, size, layer, pooling, numbers and head, on real images.

Prints the tables of README.md beside this file and writes one JSON file. Features are computed once per row and kept in the
folder, so that a second run, or one with another head, takes seconds.

    python tests/benchmarks/accuracy.py FOLDER [--images cats-dogs flowers17]   # with BOTTLENECK_ASSETS; ten minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {"cats-dogs": "cats_and_dogs_filtered", "flowers17": "flowers17"}
WEIGHTS = {
    "mobilenetv2": "mobilenet_v2_1.0_224_no_top",
    "mobilenetv2-0.35": "mobilenet_v2_0.35_224_no_top",
    "vgg16": "vgg16_no_top",
}
USUAL = ("--backbone", "mobilenetv2", "--image-size", "224")
# Table -> row -> (arguments of extract, arguments of train-head)
TABLES: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "network and size": {
        "MobileNetV2 0.35, 160 px": (("--backbone", "mobilenetv2-0.35", "--image-size", "160"), ()),
        "MobileNetV2 0.35, 224 px": (("--backbone", "mobilenetv2-0.35", "--image-size", "224"), ()),
        "MobileNetV2, 96 px": (("--backbone", "mobilenetv2", "--image-size", "96"), ()),
        "MobileNetV2, 160 px": (("--backbone", "mobilenetv2", "--image-size", "160"), ()),
        "MobileNetV2, 224 px": (USUAL, ()),
        "MobileNetV2, 288 px": (("--backbone", "mobilenetv2", "--image-size", "288"), ()),
        "EfficientNet-Lite0, 224 px": (("--backbone", "efficientnet-lite0"), ()),
        "EfficientNet-Lite2, 260 px": (("--backbone", "efficientnet-lite2"), ()),
        "VGG16, 224 px": (("--backbone", "vgg16", "--image-size", "224"), ()),
    },
    "layer and pooling": {
        "last layer, average": (USUAL, ()),
        "last layer, maximum": ((*USUAL, "--layer", "out_relu", "--pooling", "max"), ()),
        "`block_16_project`, average": ((*USUAL, "--layer", "block_16_project_BN", "--pooling", "avg"), ()),
        "boundary (`block_15_add`), average": ((*USUAL, "--layer", "boundary", "--pooling", "avg"), ()),
        "boundary, all of it (7,840 columns)": ((*USUAL, "--layer", "boundary", "--pooling", "flatten"), ()),
    },
    "pixels and numbers": {
        "as it is": (USUAL, ()),
        "`--dtype float16`": ((*USUAL, "--dtype", "float16"), ()),
        "`--precision bfloat16`": ((*USUAL, "--precision", "bfloat16"), ()),
        "`--decode fast`": ((*USUAL, "--decode", "fast"), ()),
        "`--resize keras`": ((*USUAL, "--resize", "keras"), ()),
        "`--fit crop`": ((*USUAL, "--fit", "crop"), ()),
        "`--fit pad`": ((*USUAL, "--fit", "pad"), ()),
    },
    "views": {
        "plain images": (USUAL, ("--head", "dropout-linear")),
        "4 views, flip and rotation": (
            (*USUAL, "--views", "4", "--augment", "flip-rotation"),
            ("--head", "dropout-linear"),
        ),
        "4 views, random crop and flip": (
            (*USUAL, "--views", "4", "--augment", "crop-flip"),
            ("--head", "dropout-linear"),
        ),
        "plain images, `logistic`": (USUAL, ()),
        "4 views, flip and rotation, `logistic`": ((*USUAL, "--views", "4", "--augment", "flip-rotation"), ()),
    },
    "head": {
        name: (USUAL, ("--head", head))
        for name, head in {
            "`logistic`": "logistic",
            "`ridge`": "ridge",
            "`linear-svm`": "linear-svm",
            "`lda`": "lda",
            "`sgd`": "sgd",
            "`knn`": "knn",
            "`dropout-linear`": "dropout-linear",
            "`mlp-256`": "mlp-256",
            "random forest": "sklearn.ensemble.RandomForestClassifier",
        }.items()
    },
}


def pipeline(*arguments: object) -> dict[str, Any]:
    """The JSON document of one command."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments), "--json"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def measure(images: str, folder: Path, extract: tuple[str, ...], head: tuple[str, ...]) -> dict[str, Any]:
    """Validation scores of one row, and the seconds that its head took."""
    assets = Path(os.environ["BOTTLENECK_ASSETS"])
    backbone = extract[extract.index("--backbone") + 1]
    words = [word.strip("-") for word in extract if word not in ("--backbone", "--image-size", "--layer", "--pooling")]
    store = folder / f"{images}-{'-'.join(words).replace(' ', '')}.h5"
    if not store.exists():
        weights = assets / "weights" / f"{WEIGHTS[backbone]}.weights.h5" if backbone in WEIGHTS else "imagenet"
        split = ("--split", "stratified:0.75,0.25") if images == "flowers17" else ()
        pipeline("extract", assets / "images" / IMAGES[images], "--out", store, "--weights", weights, *extract, *split)
    trained = pipeline("train-head", store, "--runs", folder / "runs", *(head or ("--head", "logistic")))
    return {**trained["metrics"]["validation"], "fit_seconds": trained["fit_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", nargs="+", choices=tuple(IMAGES), default=list(IMAGES))
    parser.add_argument("--tables", nargs="+", choices=tuple(TABLES), default=list(TABLES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for table in options.tables:
        lines = [f"| {table} | {' | '.join(options.images)} |", "| --- |" + " --- |" * len(options.images)]
        for row, (extract, head) in TABLES[table].items():
            cells = []
            for images in options.images:
                scores = measure(images, options.folder, extract, head)
                found.setdefault(table, {}).setdefault(row, {})[images] = scores
                low, high = scores["accuracy_interval"]
                cells.append(f"{scores['accuracy']:.3f} ({low:.3f} to {high:.3f}), {scores['log_loss']:.3f}")
            lines.append(f"| {row} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
        print("\n".join(lines), end="\n\n", flush=True)
    (options.folder / "accuracy.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
