"""How many labels the order of labelling saves: batches of 17 images, a head on what is labelled, accuracy on the validation images.

The loop begins without any label. Each strategy of ``suggest`` is compared with labels drawn at random, by the labels it takes until
the mean accuracy of the seeds reaches a share of that of all labels. All heads are logistic, with the same C.

    python tests/benchmarks/bench_suggest.py FOLDER [--seeds 5] [--first-seed 0] [--strategies random,mix,k-centre] [--draw suggest.png]

FOLDER keeps the features; with BOTTLENECK_ASSETS they are made of flowers17 and of cats and dogs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
BATCH = 17
COMPARED = "random,mix,margin,entropy"
# Folder of the images, split rule, share of the full accuracy that is to be reached, largest number of labels.
SETS = {
    "flowers17": ("flowers17", "stratified:0.75,0.25", 0.95, 408),
    "cats-dogs": ("cats_and_dogs_filtered", "hash", 0.985, 136),
}


def store_of(name: str, folder: Path) -> Any:
    from features.store.reader import FeatureStore

    path, (images, split, *_) = folder / f"{name}.h5", SETS[name]
    if not path.exists():
        assets = Path(os.environ["BOTTLENECK_ASSETS"])
        weights = assets / "weights" / "mobilenet_v2_1.0_224_no_top.weights.h5"
        command = [sys.executable, "-m", "pipeline", "extract", assets / "images" / images, "--out", path]
        subprocess.run([*map(str, command), "--weights", str(weights), "--split", split], cwd=ROOT, check=True)
    return FeatureStore.open(path)


def head_of(X: np.ndarray, y: np.ndarray) -> Any:
    from pipeline.heads.kinds import make_head
    from pipeline.stages.suggest import PENALTY

    present = np.unique(y)
    if len(present) < 2:
        return None
    head = make_head("logistic", classes=[str(label) for label in present], C=PENALTY)
    head.fit(X, np.searchsorted(present, y).astype(np.int32))
    return head


def accuracy(head: Any, y: np.ndarray, V: np.ndarray, truth: np.ndarray) -> float:
    guess = (
        np.full(len(V), y[0])
        if head is None
        else np.array([int(name) for name in head.classes])[head.predict_proba(V).argmax(1)]
    )
    return float((guess == truth).mean())


def curve(store: Any, strategy: str, seed: int, most: int) -> list[float]:
    """Accuracy after each batch of labels."""
    from features.sources.splits import SPLITS, UNLABELLED
    from features.store.relabelled import RelabelledStore
    from pipeline.search.choosing import STRATEGIES
    from pipeline.stages.suggest import suggest

    truth, train = store.images.labels, store.rows("train")
    X, (V, answers) = store.array()[:, 0], store.load("validation")
    # Validation images have no label here: they are no candidates either, and judge only.
    held = np.setdiff1d(np.arange(len(store)), train)
    known, head = np.zeros(len(store), bool), None
    found: list[float] = []
    while known.sum() < most:
        labels = np.where(known, truth, -1).astype(np.int32)
        labels[held] = truth[held]
        splits = np.where(known, 0, UNLABELLED).astype(np.int8)
        splits[held] = SPLITS.index("validation")
        state = RelabelledStore(store, store.classes, labels, splits, {})
        now = "typical" if head is None and STRATEGIES[strategy].needs_head else strategy
        chosen = suggest(state, head, n=BATCH, strategy=now, seed=1000 * seed + len(found))
        known[chosen.rows] = True
        rows = np.flatnonzero(known)
        head = head_of(np.asarray(X[rows]), truth[rows])
        found.append(accuracy(head, truth[rows], V, answers))
    return found


def measured(name: str, strategies: list[str], seeds: range, folder: Path) -> dict[str, Any]:
    store = store_of(name, folder)
    (_, _, share, most), rows = SETS[name], store.rows("train")
    X, y = np.asarray(store.array()[rows, 0]), store.images.labels[rows]
    full = accuracy(head_of(X, y), y, *store.load("validation"))
    result: dict[str, Any] = {
        "images": len(rows),
        "accuracy": round(full, 4),
        "target": round(share * full, 4),
        "curves": {},
        "labels": {},
    }
    for strategy in strategies:
        mean = np.mean([curve(store, strategy, seed, most) for seed in seeds], axis=0)
        result["curves"][strategy] = [round(float(value), 4) for value in mean]
        there = np.flatnonzero(mean >= share * full)
        result["labels"][strategy] = int(BATCH * (there[0] + 1)) if len(there) else None
        print(name, strategy, result["labels"][strategy], result["curves"][strategy], file=sys.stderr, flush=True)
    by_chance = result["labels"].get("random")
    result["share_of_random"] = {
        strategy: None if labels is None or by_chance is None else round(labels / by_chance, 2)
        for strategy, labels in result["labels"].items()
    }
    return result


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 3.6), squeeze=False)
    colours = ["#57606c", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for colour, (strategy, values) in zip(colours, result["curves"].items(), strict=False):
            labels = BATCH * np.arange(1, len(values) + 1)
            style = {"random": (2.0, "--"), "mix": (2.4, "-")}.get(strategy, (1.2, "-"))
            axis.plot(labels, values, style[1], color=colour, linewidth=style[0], label=strategy)
        axis.axhline(result["target"], color="#b0b7c0", linewidth=1)
        told = f"{100 * SETS[name][2]:g} % of\nthat of all"
        axis.annotate(told, (1.01, result["target"]), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axis.set(
            title=f"{name}: {result['images']:,} training images",
            xlabel="labels",
            ylim=(min(values[0] for values in result["curves"].values()) - 0.02, 1),
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("accuracy, mean of the seeds")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="draws on which nothing was chosen: give a number above those used"
    )
    parser.add_argument("--strategies", default=COMPARED)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--draw", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    strategies = options.strategies.split(",")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = {name: measured(name, strategies, seeds, options.folder) for name in options.sets.split(",")}
    if options.draw:
        draw(results, options.draw)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
