"""What sweeps cost, on two CPUs: a whole command against Keras's ``fit``, a mixed sweep twice, memory of four workers.

- linear: 200 linear heads (20 learning rates x 10 weight decays, 50 epochs) through ``train-head --heads``, start-up and
  200 run folders included, against the same heads one after another by ``fit``, extrapolated from 12 of them.
- mixed: 100 heads (60 of the bank, 40 of scikit-learn), every one judged by 5 folds too; then the same command again.
- memory: four workers on one array of 1 GB; growth of the anonymous memory of all of them, and of the bank's process.

    python tests/benchmarks/bench_sweep.py [OUT.json]     # with BOTTLENECK_ASSETS: flowers17, cats and dogs; else digits
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FIT_HEADS, EPOCHS = 12, 50
WEIGHTS = "mobilenet_v2_1.0_224_no_top.weights.h5"
LINEAR = """
version: 1
heads:
- {head: dense, log: {learning_rate: [1e-5, 1e-1, 20], weight_decay: [1e-5, 1e-1, 10]}, grid: {patience: [0]}}
"""
MIXED = """
version: 1
heads:
- {head: dense, log: {learning_rate: [1e-4, 1e-1, 10], weight_decay: [1e-4, 1e-1, 3]}, grid: {dropout: [0, 0.3]}}
- {head: logistic, log: {C: [1e-5, 10, 10]}}
- {head: ridge, log: {alpha: [10, 1e6, 8]}}
- {head: linear-svm, log: {C: [1e-6, 1, 8]}}
- {head: sgd, log: {alpha: [1e-4, 10, 5]}}
- {head: knn, grid: {n_neighbors: [3, 7, 11, 21]}}
- {head: lda, grid: {shrinkage: [0.03, 0.1, 0.3, 0.6, 0.9]}}
"""


def pipeline(*arguments: object) -> tuple[float, str]:
    """Seconds and output of one command."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return time.perf_counter() - started, done.stdout


def store_of(name: str, split: str, folder: Path) -> Path:
    out, assets = folder / f"{name}.h5", os.environ.get("BOTTLENECK_ASSETS")
    if assets:
        images: object = Path(assets) / "images" / name
        pipeline("extract", images, "--out", out, "--split", split, "--weights", Path(assets) / "weights" / WEIGHTS)
    else:
        pipeline("extract", "sample:digits", "--out", out, "--split", split)
    return out


def by_fit(file: str) -> None:
    """Some heads of the grid one after another, spread over it; imports are not counted."""
    from features.networks.backend import load_keras
    from features.store.reader import FeatureStore

    keras, store = load_keras(), FeatureStore.open(file)
    X, y = store.load("train")
    held_out, labels = store.load("validation")
    mean, std = X.mean(axis=0), X.std(axis=0) + 1e-6
    Z, V = (X - mean) / std, (held_out - mean) / std
    grid = [(a, b) for a in np.geomspace(1e-5, 1e-1, 20) for b in np.geomspace(1e-5, 1e-1, 10)]
    best, started = 0.0, time.perf_counter()
    for rate, decay in grid[5 :: len(grid) // FIT_HEADS][:FIT_HEADS]:
        model = keras.Sequential([keras.Input(Z.shape[1:]), keras.layers.Dense(len(store.classes))])
        model.compile(
            optimizer=keras.optimizers.Adam(float(rate), weight_decay=float(decay)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        log = model.fit(Z, y, batch_size=32, epochs=EPOCHS, validation_data=(V, labels), verbose=0)
        best = max(best, log.history["val_accuracy"][int(np.argmin(log.history["val_loss"]))])
    seconds = (time.perf_counter() - started) / FIT_HEADS * len(grid)
    print(json.dumps({"seconds": seconds, "best": float(best), "validation": len(labels)}))


def linear(folder: Path) -> dict[str, Any]:
    file = store_of("flowers17", "stratified:0.75,0.25", folder)
    (folder / "linear.yaml").write_text(LINEAR)
    done = subprocess.run([sys.executable, __file__, "--fit", str(file)], check=True, stdout=subprocess.PIPE, text=True)
    fit = json.loads(done.stdout.splitlines()[-1])
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    seconds, text = pipeline(
        "train-head", file, "--heads", folder / "linear.yaml", "--runs", folder / "linear", "--json"
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    document = json.loads(text)
    return {
        "ratio": round(fit["seconds"] / seconds, 1),
        "seconds": round(seconds, 1),
        "fit_seconds_extrapolated": round(fit["seconds"], 1),
        "trained": document["trained"],
        "best": document["board"][0]["accuracy"],
        "best_by_fit": fit["best"],
        "images_apart": round((document["board"][0]["accuracy"] - fit["best"]) * fit["validation"]),
        "peak_mib": max(peak, before) // 1024,
    }


def mixed(folder: Path) -> dict[str, Any]:
    file = store_of("cats_and_dogs_filtered", "hash", folder)
    (folder / "mixed.yaml").write_text(MIXED)
    arguments = [
        "train-head",
        file,
        "--heads",
        folder / "mixed.yaml",
        "--folds",
        5,
        "--runs",
        folder / "mixed",
        "--json",
    ]
    (first, text), (second, again) = pipeline(*arguments), pipeline(*arguments)
    document, repeated = json.loads(text), json.loads(again)
    assert (repeated["trained"], repeated["cached"]) == (0, 100)
    chosen = next(row for row in document["board"] if row["chosen"])
    return {
        "seconds": round(first, 1),
        "again_seconds": round(second, 1),
        "trained": document["trained"],
        "best": max(row["accuracy"] for row in document["board"]),
        "chosen": {name: chosen[name] for name in ("run_id", "accuracy", "cv_accuracy", "parameters")},
    }


# ------------------------------------------------------------------------------------------------ memory
def anonymous(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")), 0)


def children(parent: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            yield int(path.parent.name)
            yield from children(int(path.parent.name))


def growth(act: Callable[[], Any], processes: Callable[[], list[int]]) -> int:
    """By how many bytes the anonymous memory of processes grows at most while something is done."""
    before, peak, done = sum(map(anonymous, processes())), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, sum(map(anonymous, processes())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        act()
    finally:
        done.set()
        watcher.join()
    return max(0, peak - before)


def memory(folder: Path) -> dict[str, Any]:
    from pipeline.heads.fitting import fit_one
    from pipeline.heads.kinds import make_head
    from pipeline.heads.prepared import prepare
    from pipeline.sweeps.workers import in_parallel

    rows, columns, classes = 200_000, 1280, [str(k) for k in range(10)]
    path = folder / "rows.npy"
    X, y = np.lib.format.open_memmap(path, "w+", np.float32, (rows, columns)), (np.arange(rows) % 10).astype(np.int32)
    generator = np.random.default_rng(0)
    corners = 0.1 * generator.normal(size=(10, columns)).astype(np.float32)
    for start in range(0, rows, 20_000):
        part = slice(start, start + 20_000)
        X[part] = generator.standard_normal((20_000, columns), dtype=np.float32) + corners[y[part]]
    (folder / "prepared").mkdir()
    few = prepare(np.array(X[:200]), y[:200], pool="none", X_validation=np.array(X[:20]), y_validation=y[:20])
    whole: list[Any] = []

    def make() -> None:
        held_out: dict[str, Any] = {"X_validation": X[:1000], "y_validation": y[:1000]}
        whole.append(prepare(X, y, pool="none", folder=folder / "prepared", **held_out))

    found = {"preparing": growth(make, lambda: [os.getpid()])}
    for name, params in (("knn", {"n_neighbors": 5}), ("logistic", {"C": 1e-4})):
        heads = [make_head(name, classes=classes, seed=seed, **params) for seed in range(4)]
        list(in_parallel(fit_one, [(head.fresh(), few, 0) for head in heads * 2], 4))  # imports

        def fit(heads: list[Any] = heads) -> None:
            outcomes = list(in_parallel(fit_one, [(head, whole[0], 0) for head in heads], 4))
            assert not any(isinstance(outcome, str) for _, outcome in outcomes), outcomes

        found[name] = growth(fit, lambda: list(children(os.getpid())))
    bank: list[Any] = [
        make_head("dense", classes=classes, epochs=1, batch_size=256, learning_rate=10.0**-k) for k in range(1, 5)
    ]
    bank[0].warm_up()
    bank[0].train_together([head.fresh() for head in bank], few)
    found["bank"] = growth(lambda: bank[0].train_together(bank, whole[0]), lambda: [os.getpid()])
    return {name: round(grown / (4 * rows * columns), 3) for name, grown in found.items()}


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # processes started from here inherit it
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)
    folder = Path(tempfile.mkdtemp())
    try:
        found = {part.__name__: part(folder) for part in (linear, mixed, memory)}
    finally:
        shutil.rmtree(folder)
    print(f"200 linear heads, the whole command: {found['linear']['ratio']:.1f} x as fast as fit one after another")
    print(f"100 mixed heads with 5 folds: {found['mixed']['seconds']} s, again {found['mixed']['again_seconds']} s")
    print(f"anonymous memory of 4 workers grows by this share of a 1 GB array: {found['memory']}")
    machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "used": 2}
    text = json.dumps({"machine": machine, **found})
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fit"]:
        by_fit(sys.argv[2])
    else:
        main()
