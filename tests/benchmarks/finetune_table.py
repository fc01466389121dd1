"""Was it worth it? Validation accuracy of the head, and after fine-tuning its last block, three seeds each.

Prints the table of README.md beside this file and writes one JSON file. What the folder holds already is not computed again,
so the script may be stopped and run again.

    python tests/benchmarks/finetune_table.py FOLDER     # with BOTTLENECK_ASSETS; an hour on two cores
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from accuracy import IMAGES, WEIGHTS, pipeline

SEEDS = (0, 1, 2)
TUNING = ("--learning-rate", "1e-4", "--schedule", "cosine", "--param", "warmup_epochs=1", "--epochs", "5")
# Row -> backbone, whether it is fed from the cache, further arguments of finetune
ROWS: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "MobileNetV2, end to end, flips": ("mobilenetv2", False, ("--augment", "flip")),
    "MobileNetV2, from the cache": ("mobilenetv2", True, ()),
    "VGG16, from the cache": ("vgg16", True, ("--patience", "1")),
}


def store_of(folder: Path, images: str, backbone: str) -> Path:
    """One store with the last layer and the boundary, both as they are."""
    assets = Path(os.environ["BOTTLENECK_ASSETS"])
    store = folder / f"{images}-{backbone}.h5"
    if not store.exists():
        split = ("--split", "stratified:0.75,0.25") if images == "flowers17" else ()
        weights = assets / "weights" / f"{WEIGHTS[backbone]}.weights.h5"
        last = {"mobilenetv2": "out_relu", "vgg16": "block5_pool"}[backbone]
        layers = ("--layer", last, "--layer", "boundary", "--pooling", "none")
        source = assets / "images" / IMAGES[images]
        pipeline("extract", source, "--out", store, "--backbone", backbone, "--weights", weights, *layers, *split)
    return store


def tuned(folder: Path, images: str, row: str, seed: int) -> dict[str, Any]:
    """Scores before and after, and minutes."""
    backbone, cached, options = ROWS[row]
    store = store_of(folder, images, backbone)
    features = {"mobilenetv2": "out_relu", "vgg16": "block5_pool"}[backbone]
    runs = ("--runs", folder / "runs")
    head = pipeline(
        "train-head", store, "--head", "dropout-linear", "--features", features, "--pool", "avg", "--seed", seed, *runs
    )
    source = Path(os.environ["BOTTLENECK_ASSETS"]) / "images" / IMAGES[images]
    fed = ("--from-cache", store) if cached else ("--images", source)
    return pipeline("finetune", head["run"], *fed, "--seed", seed, *TUNING, *options, *runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", nargs="+", choices=tuple(IMAGES), default=list(IMAGES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| images | fine-tuned | head alone | fine-tuned, three seeds | minutes |\n| --- | --- | --- | --- | --- |")
    found = []
    for images in options.images:
        for row in ROWS:
            documents = [tuned(options.folder, images, row, seed) for seed in SEEDS]
            found.append({"images": images, "row": row, "documents": documents})
            before = ", ".join(f"{document['before']['accuracy']:.3f}" for document in documents)
            after = ", ".join(f"{document['after']['accuracy']:.3f}" for document in documents)
            minutes = sorted(document["minutes"] for document in documents)[1]
            print(f"| {images} | {row} | {before} | {after} | {minutes:.1f} |", flush=True)
            for document in documents:
                assert document["after"]["accuracy"] >= document["before"]["accuracy_interval"][0], document
    (options.folder / "finetune.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
