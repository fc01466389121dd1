"""Whether promises about answers are kept, and which heads are right at 1 to 20 images a class.

For each seed the images of a data set are divided anew at random: some train a head, some tell what it can promise, and the rest,
which it has never seen, say whether that is kept.

    python tests/benchmarks/bench_answers.py                             # features of the images in BOTTLENECK_ASSETS
    python tests/benchmarks/bench_answers.py my.h5 other.h5 --seeds 20   # of stores that are there
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from features.store.reader import FeatureStore
from pipeline.heads.fitting import cross_validate
from pipeline.heads.kinds import make_head
from pipeline.heads.prepared import prepare
from pipeline.intervals import wilson_interval
from pipeline.scores.answers import class_sets, find_threshold, is_answered, least_probability
from pipeline.scores.metrics import evaluate
from pipeline.tables import table_text
from pipeline.tasks.table import TASKS
from pipeline.tasks.task import Task

COVERAGES, PRECISIONS, SHOTS = (0.8, 0.9, 0.95), (0.9, 0.95, 0.99), (1, 2, 5, 10, 20)
HEADS = ("nearest-mean", "logistic-shrunk", "logistic", "ridge")


def rows_of(path: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    store = FeatureStore.open(path)
    known = store.images.labels >= 0
    return np.asarray(store.array(store.names[0])[:, 0])[known], store.images.labels[known], store.classes


def extracted(folder: Path) -> list[str]:
    """Stores of flowers17 and of cats and dogs, by MobileNetV2 at 224 pixels."""
    assets, root = Path(os.environ["BOTTLENECK_ASSETS"]), Path(__file__).resolve().parents[2]
    weights, stores = assets / "weights" / "mobilenet_v2_1.0_224_no_top.weights.h5", []
    for name, source in (("flowers17", "flowers17"), ("cats-dogs", "cats_and_dogs_filtered")):
        stores.append(str(folder / f"{name}.h5"))
        words = ["extract", str(assets / "images" / source), "--out", stores[-1], "--weights", str(weights)]
        subprocess.run(
            [sys.executable, "-m", "pipeline", *words],
            cwd=folder,
            check=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
    return stores


def brightness(path: str) -> np.ndarray:
    """The mean grey value of each labelled image of a store, float64 (n, 1), 0-255."""
    from PIL import Image

    store = FeatureStore.open(path)
    root, table = Path(str(store.provenance["root"])), store.images
    found = []
    for row in np.flatnonzero(table.labels >= 0):
        with Image.open(root / table.paths[int(row)]) as picture:
            found.append(float(np.asarray(picture.convert("L").resize((32, 32))).mean()))
    return np.array(found)[:, None]


def promises_of_targets(X: np.ndarray, y: np.ndarray, task: Task, seeds: int) -> list[dict[str, object]]:
    """Coverage of sets of labels, or of intervals of a number, over seeds: a third trains, a third tells, a third is new."""
    held: dict[float, list[float]] = {coverage: [] for coverage in COVERAGES}
    for seed in range(seeds):
        train, tell, new = np.array_split(np.random.default_rng(seed).permutation(len(y)), 3)
        ridge = task.name == "regression"
        head = make_head("ridge", task=task, alpha=100.0) if ridge else make_head("logistic", task=task, C=0.01)
        head.fit(X[train], y[train])
        told, found = head.predict_proba(X[tell]), head.predict_proba(X[new])
        for coverage in COVERAGES:
            kept = task.kept(found, y[new], task.promise(told, y[tell], (None, coverage), None))
            held[coverage].append((kept.get("sets") or kept["intervals"]["numbers"][0])["coverage"])
    return [
        {
            "promised": coverage,
            "mean": float(np.mean(one)),
            "standard error": float(np.std(one, ddof=1) / np.sqrt(seeds)),
        }
        for coverage, one in held.items()
    ]


def promises(X: np.ndarray, y: np.ndarray, seeds: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Tables of the coverage of sets and of the precision of answers, over seeds: a third trains, a third tells, a third is new."""
    held: dict[float, list[float]] = {coverage: [] for coverage in COVERAGES}
    sizes: dict[float, list[float]] = {coverage: [] for coverage in COVERAGES}
    kept: dict[float, list[tuple[int, int, int]]] = {precision: [] for precision in PRECISIONS}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(y))
        train, tell, new = np.array_split(order, 3)
        head = make_head("logistic", C=0.01)
        head.fit(X[train], y[train])
        told, found = head.predict_proba(X[tell]), head.predict_proba(X[new])
        for coverage in COVERAGES:
            sets = class_sets(found, least_probability(told, y[tell], coverage))
            held[coverage].append(float(sets[np.arange(len(new)), y[new]].mean()))
            sizes[coverage].append(float(sets.sum(axis=1).mean()))
        for precision in PRECISIONS:
            rule = find_threshold(told.max(axis=1), told.argmax(axis=1) == y[tell], precision)
            given = is_answered(found.max(axis=1), rule.threshold)
            right = int(np.sum(found.argmax(axis=1)[given] == y[new][given]))
            kept[precision].append((int(given.sum()), right, len(new)))
    coverage_lines: list[dict[str, object]] = [
        {
            "promised": coverage,
            "mean coverage": float(np.mean(held[coverage])),
            "standard error": float(np.std(held[coverage], ddof=1) / np.sqrt(seeds)),
            "classes in a set": float(np.mean(sizes[coverage])),
        }
        for coverage in COVERAGES
    ]
    precision_lines: list[dict[str, object]] = []
    for precision, counts in kept.items():
        answered, right, n = np.array(counts).T
        precision_lines.append(
            {
                "asked": precision,
                "pooled precision": float(right.sum() / max(1, answered.sum())),
                "answered": float(answered.sum() / n.sum()),
                "seeds without answers": int(np.sum(answered == 0)),
                "seeds below": int(np.sum(right < precision * answered)),
            }
        )
    return coverage_lines, precision_lines


def few_images(X: np.ndarray, y: np.ndarray, classes: Sequence[str], seeds: int) -> list[dict[str, object]]:
    """Accuracy and log loss of heads on all other images, by number of training images a class."""
    lines: list[dict[str, object]] = []
    for shots in SHOTS:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in HEADS}
        for seed in range(seeds):
            train, rest = drawn(y, shots, seed)
            for name in HEADS:
                head = make_head(name, classes=classes)
                head.fit(X[train], y[train])
                scores = evaluate(head.predict_proba(X[rest]), y[rest], classes)
                found[name].append((scores["accuracy"], scores["log_loss"]))
        means = {name: np.mean(values, axis=0) for name, values in found.items()}
        lines.append(
            {"images a class": shots}
            | {name: f"{accuracy:.3f} ({loss:.2f})" for name, (accuracy, loss) in means.items()}
        )
    return lines


def intervals(X: np.ndarray, y: np.ndarray, classes: Sequence[str], seeds: int) -> list[dict[str, object]]:
    """How often the 95 % interval of an accuracy holds that on all other images: by folds, and by as many of these others."""
    lines: list[dict[str, object]] = []
    for shots in SHOTS[1:]:
        by_folds, by_validation = [], []
        for seed in range(seeds):
            train, rest = drawn(y, shots, seed)
            head = make_head("nearest-mean", classes=classes)
            head.fit(X[train], y[train])
            right = head.predict_proba(X[rest]).argmax(axis=1) == y[rest]
            truth, told = float(right.mean()), right[: len(train)]
            prepared = prepare(X[train], y[train], pool="none", scale=False)
            fresh = make_head("nearest-mean", classes=classes, pool="none")
            guessed = cross_validate(fresh, prepared, 5).argmax(axis=1) == y[train]
            by_folds.append((wilson_interval(int(guessed.sum()), len(guessed)), truth))
            by_validation.append((wilson_interval(int(told.sum()), len(told)), truth))
        lines.append({"images a class": shots, **said("folds", by_folds), **said("validation", by_validation)})
    return lines


def said(name: str, found: Sequence[tuple[list[float], float]]) -> dict[str, object]:
    """Shares of intervals that hold the truth, and that are too low and too high."""
    low, high = np.array([interval for interval, _ in found]).T
    truth = np.array([value for _, value in found])
    return {name: float(np.mean((low <= truth) & (truth <= high))), f"{name} too high": float(np.mean(truth < low))}


def drawn(y: np.ndarray, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """So many rows of each class, and all others in random order."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(y))
    train = np.concatenate([order[y[order] == k][:shots] for k in range(int(y.max()) + 1)])
    return train, order[~np.isin(order, train)]


def show(stores: Sequence[str], seeds: int) -> None:
    for path in stores:
        X, y, classes = rows_of(path)
        print(f"{path}: {len(y)} images, {len(classes)} classes, {seeds} seeds", flush=True)
        for title, table in zip(("sets", "answers"), promises(X, y, seeds), strict=True):
            print(f"\n{title}\n{table_text(table)}", flush=True)
        holds = np.eye(len(classes), dtype=np.uint8)[y]
        for title, task, target in (
            ("each class as a label", "multilabel", holds),
            ("brightness as a number", "regression", brightness(path)),
        ):
            print(f"\n{title}\n{table_text(promises_of_targets(X, target, TASKS[task], seeds))}", flush=True)
        print(f"\naccuracy (log loss)\n{table_text(few_images(X, y, classes, max(1, seeds // 4)))}", flush=True)
        print(f"\nintervals\n{table_text(intervals(X, y, classes, 5 * seeds))}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="*", help="feature stores, vectors of any network")
    parser.add_argument("--seeds", type=int, default=20)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")  # solvers that stop early
    with tempfile.TemporaryDirectory() as folder:
        show(asked.stores or extracted(Path(folder)), asked.seeds)


if __name__ == "__main__":
    main()
