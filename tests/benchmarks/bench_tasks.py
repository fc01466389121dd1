"""Several labels and numbers on real images: composed grids of flowers, and how far a photograph was turned.

    flowers --split by photograph--> grids of two or three of one split, labelled with their classes --> multilabel
    cats and dogs --turned by -45 to 45 degrees, the largest inner square, grouped by photograph--> regression

Usage: python tests/benchmarks/bench_tasks.py [FOLDER]; BOTTLENECK_ASSETS names the images and weights.
Prints one line of JSON for each figure. Images and stores are kept in FOLDER, so that a second run trains only.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier

from features.extraction.extraction import extract_features
from features.store.reader import FeatureStore
from pipeline.heads.fitting import fit_companions
from pipeline.heads.kinds import make_head
from pipeline.heads.prepared import prepare
from pipeline.runs.folder import Run
from pipeline.stages.evaluate import evaluate
from pipeline.stages.finetune import finetune
from pipeline.stages.train_head import train_head
from pipeline.tasks.table import TASKS

SPLITS = ("train", "validation", "test")
FLOWERS, ANIMALS = "flowers17", "cats_and_dogs_filtered/train"  # a flower looks alike from all sides, an animal stands
CELL, SIDE = 112, 224  # pixels of a photograph in a grid, and of a grid
WEIGHTS = "weights/mobilenet_v2_1.0_224_no_top.weights.h5"


def assets() -> Path:
    """The folder of real images and weights."""
    return Path(os.environ["BOTTLENECK_ASSETS"])


def photographs(most: int | None = None, name: str = FLOWERS) -> dict[str, list[Path]]:
    """Paths of photographs by class; at most so many of each."""
    root = assets() / "images" / name
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return {folder.name: sorted(folder.glob("*.jpg"))[:most] for folder in folders}


def split_photographs(found: dict[str, list[Path]]) -> dict[str, list[tuple[str, Path]]]:
    """Photographs of each split, three in five of each class to train: the split comes first, composition later."""
    by_split: dict[str, list[tuple[str, Path]]] = {name: [] for name in SPLITS}
    for name, paths in found.items():
        for number, path in enumerate(paths):
            by_split[SPLITS[(0, 0, 0, 1, 2)[number % 5]]].append((name, path))
    return by_split


def compose(folder: Path, images: int, most: int | None = None) -> Path:
    """Write grids of two or three photographs, each within one split, and a manifest ``path,tags,split``.

    No photograph is in grids of two splits, which is asserted.
    """
    manifest = folder / "grids.csv"
    if manifest.exists():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    generator, lines = np.random.default_rng(0), ["path,tags,split"]
    used: dict[Path, str] = {}  # photograph -> the split of its grids
    by_split = split_photographs(photographs(most))
    shares = dict(zip(SPLITS, (0.6, 0.2, 0.2), strict=True))
    for split, pool in by_split.items():
        for number in range(round(shares[split] * images)):
            chosen = [pool[place] for place in generator.choice(len(pool), 2 + number % 2, replace=False)]
            grid = Image.new("RGB", (SIDE, SIDE), (127, 127, 127))
            for cell, (_, path) in zip(generator.permutation(4), chosen, strict=False):
                with Image.open(path) as picture:
                    square = picture.convert("RGB").resize((CELL, CELL))
                grid.paste(square, (CELL * int(cell % 2), CELL * int(cell // 2)))
                assert used.setdefault(path, split) == split, f"{path} is in grids of two splits"
            name = f"{split}-{number:05d}.jpg"
            grid.save(folder / name, quality=90)
            lines.append(f"{name},{';'.join(sorted({label for label, _ in chosen}))},{split}")
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def turn(folder: Path, images: int, most: int | None = None) -> Path:
    """Write photographs turned by -45 to 45 degrees, and a manifest ``path,angle,split,group``, grouped by photograph."""
    manifest = folder / "turned.csv"
    if manifest.exists():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    generator, lines = np.random.default_rng(1), ["path,angle,split,group"]
    pool = [
        (split, path) for split, found in split_photographs(photographs(most, ANIMALS)).items() for _, path in found
    ]
    for number in range(images):
        split, path = pool[number % len(pool)]
        angle = float(generator.uniform(-45, 45))
        with Image.open(path) as picture:
            side = min(picture.size)
            turned = picture.convert("RGB").rotate(angle, Image.Resampling.BICUBIC)
        inner = int(side / math.sqrt(2)) - 2  # a square of this side lies inside whatever the angle is
        left, top = (turned.width - inner) // 2, (turned.height - inner) // 2
        name = f"{number:05d}.jpg"
        turned.crop((left, top, left + inner, top + inner)).resize((SIDE, SIDE)).save(folder / name, quality=92)
        lines.append(f"{name},{angle:.4f},{split},{path.parent.name}-{path.stem}")
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def border_r2(manifest: Path, border: int = 16) -> float:
    """R2 of a linear head on the pixels of the border, which must not tell the angle."""
    rows = [line.split(",") for line in manifest.read_text().splitlines()[1:]]
    pixels, angles, splits = [], [], []
    for name, angle, split, _ in rows:
        with Image.open(manifest.parent / name) as picture:
            small = np.asarray(picture.convert("L").resize((SIDE // 4, SIDE // 4)), np.float32) / 255
        edge, width = np.ones(small.shape, bool), border // 4
        edge[width:-width, width:-width] = False
        pixels.append(small[edge])
        angles.append(float(angle))
        splits.append(split)
    X, y, train = np.array(pixels), np.array(angles), np.array(splits) == "train"
    found = Ridge(alpha=100.0).fit(X[train], y[train]).predict(X[~train])
    return float(1 - np.square(found - y[~train]).sum() / np.square(y[~train] - y[~train].mean()).sum())


def store_of(manifest: Path, task: Literal["multilabel", "regression"], target: str, size: int = SIDE) -> FeatureStore:
    """Features of MobileNetV2 with genuine weights."""
    return extract_features(
        manifest, manifest.with_suffix(".h5"), task=task, target=target, weights=str(assets() / WEIGHTS),
        image_size=(size, size),
    )  # fmt: skip


def bank_ratio(store: FeatureStore, task: str, heads: int, epochs: int) -> dict[str, float]:
    """How many times as fast the bank trains heads as Keras's ``fit`` does one after another, and how far heads differ."""
    X, y = store.load("train")
    X_validation, y_validation = store.load("validation")
    data = prepare(X, y, pool="none", X_validation=X_validation, y_validation=y_validation)
    rates = np.geomspace(1e-4, 1e-2, heads)
    common: dict[str, Any] = {"task": TASKS[task], "epochs": epochs, "patience": 0}
    many = [make_head("dense", learning_rate=float(rate), **common) for rate in rates]
    fit_companions(many[:1], data, 0)  # what is compiled once is not counted
    many = [make_head("dense", learning_rate=float(rate), **common) for rate in rates]
    started = time.perf_counter()
    fit_companions(many, data, 0)
    together = time.perf_counter() - started
    gaps, alone = [], 0.0
    for place in range(heads):
        single = make_head("dense", learning_rate=float(rates[place]), **common)
        single.fit_prepared(data)
        gaps.append(float(abs(single.predict_proba(X_validation) - many[place].predict_proba(X_validation)).max()))
    for place in (0, heads // 2, heads - 1):
        by_fit = make_head("dense", learning_rate=float(rates[place]), schedule="cosine", **common)  # Keras trains it
        started = time.perf_counter()
        by_fit.fit_prepared(data)
        alone += (time.perf_counter() - started) / 3
    return {"ratio": heads * alone / together, "gap": max(gaps), "bank_seconds": together}


def scores_of(store: FeatureStore, heads: Sequence[str], folder: Path) -> dict[str, Any]:
    """Validation and test scores of heads, by name."""
    found = {}
    for name in heads:
        run = Run.open(train_head(store, name, runs=folder / "runs", test=True).folder)
        first = run.task.choices[0]
        found[name] = {part: run.metrics[part][first] for part in ("validation", "test")}
        found[name]["interval"] = run.metrics["validation"][f"{first}_interval"]
        found[name]["seconds"] = run.environment["fit_seconds"]
    return found


def one_vs_rest(store: FeatureStore) -> float:
    """Largest difference in probability between `logistic` and scikit-learn's of one against the rest, with the same penalty."""
    X, y = store.load("train")
    head = make_head("logistic", task=TASKS["multilabel"], C=0.01)
    data = prepare(X, y, pool="none")
    head.fit_prepared(data)
    Z = (X - head.mean) / head.std
    other = OneVsRestClassifier(LogisticRegression(C=0.01, tol=1e-10, max_iter=10_000)).fit(Z.astype(np.float64), y)
    return float(abs(other.predict_proba(Z.astype(np.float64)) - head.predict_proba(X)).max())


def tuned(store: FeatureStore, manifest: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """Scores of the dense head before and after the last block was fine-tuned with it; the test split is scored, too."""
    start = train_head(store, "dense", runs=folder / "runs", test=True).folder
    document = finetune(start, manifest, runs=folder / "tuned", weights=str(assets() / WEIGHTS), **settings)
    run = Run.open(document["run"])
    first = run.task.choices[0]
    test = evaluate(run.folder, manifest, split="test", target=run.target)["scores"]
    return {
        "before": {"validation": document["before"][first], "test": Run.open(start).metrics["test"][first]},
        "after": {"validation": document["after"][first], "test": test[first], "interval": test[f"{first}_interval"]},
        "parity_gap": document["parity_gap"],
        "minutes": document["minutes"],
    }


def main(folder: Path) -> None:
    """Measure everything at full size."""
    grids = store_of(compose(folder / "grids", 3000), "multilabel", "tags")
    print(json.dumps({"multilabel": scores_of(grids, ("logistic", "knn", "dense", "mlp-256"), folder)}), flush=True)
    print(json.dumps({"one_vs_rest": one_vs_rest(grids)}), flush=True)
    print(json.dumps({"bank": bank_ratio(grids, "multilabel", 100, 10)}), flush=True)
    manifest = turn(folder / "turned", 2000)
    print(json.dumps({"border_r2": border_r2(manifest)}), flush=True)
    turned = store_of(manifest, "regression", "angle")
    print(json.dumps({"regression": scores_of(turned, ("ridge", "knn", "dense", "mlp-256"), folder)}), flush=True)
    settings = {"learning_rate": 2e-4, "epochs": 10, "patience": 0, "unfreeze": "block_6_expand"}
    print(json.dumps({"tuned": tuned(turned, manifest, folder, **settings)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench-tasks"))
