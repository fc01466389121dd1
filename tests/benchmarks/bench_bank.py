"""What the bank saves: heads side by side against Keras's ``fit`` one after another, as ratios of medians.

1020 rows of 1280 float32 features, 17 classes, batch 32, 50 epochs of Adam; 20 learning rates x 10 weight decays. Each
round trains some heads by ``fit`` and then all of them by the bank, as processes of their own on the same two CPUs;
the time of ``fit`` is extrapolated from its heads to all. Imports are not counted, compiling is, in both.

    python tests/benchmarks/bench_bank.py [OUT.json]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, EPOCHS, FIT_HEADS = 3, 50, 4
ROWS, COLUMNS, CLASSES, BATCH = 1020, 1280, 17, 32
CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear, dropout 0.2": {"dropout": 0.2},
    "hidden 64, dropout 0.5": {"dropout": 0.5, "hidden": 64},
}


def grid() -> list[tuple[float, float]]:
    """Learning rates and weight decays."""
    return [(float(a), float(b)) for a in np.geomspace(1e-5, 1e-1, 20) for b in np.geomspace(1e-5, 1e-1, 10)]


def rows() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    y = generator.integers(0, CLASSES, ROWS).astype(np.int32)
    corners = 0.1 * generator.normal(size=(CLASSES, COLUMNS))
    return (corners[y] + generator.normal(size=(ROWS, COLUMNS))).astype(np.float32), y


def by_bank(case: dict[str, Any]) -> float:
    from features.networks.backend import load_keras
    from pipeline.heads.bank import BankHead, train_bank
    from pipeline.heads.bank_math import BankSpec

    load_keras()
    X, y = rows()
    spec = BankSpec(classes=CLASSES, hidden=case.get("hidden", 0), epochs=EPOCHS, patience=0, batch_size=BATCH)
    heads = [BankHead(rate, decay, dropout=case.get("dropout", 0.0)) for rate, decay in grid()]
    started = time.perf_counter()
    results = train_bank(spec, heads, X, y)
    seconds = time.perf_counter() - started
    assert len(results) == len(heads)
    assert min(result.history["loss"][-1] for result in results) < 0.1
    return seconds


def by_fit(case: dict[str, Any], heads: int, first: int) -> float:
    """Seconds for some heads of the grid, spread over it."""
    from features.networks.backend import load_keras

    keras = load_keras()
    X, y = rows()
    started = time.perf_counter()
    for rate, decay in grid()[first :: len(grid()) // heads][:heads]:
        layers = [keras.layers.Dense(case["hidden"], activation="relu")] if "hidden" in case else []
        layers += [keras.layers.Dropout(case["dropout"])] if "dropout" in case else []
        model = keras.Sequential([keras.Input((COLUMNS,)), *layers, keras.layers.Dense(CLASSES)])
        model.compile(
            optimizer=keras.optimizers.Adam(rate, weight_decay=decay),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(X, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return time.perf_counter() - started


def measure(*arguments: object) -> dict[str, float]:
    """One part in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--part", *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def part(kind: str, name: str, first: str) -> None:
    from features.machine import peak_memory

    seconds = by_bank(CASES[name]) if kind == "bank" else by_fit(CASES[name], FIT_HEADS, int(first))
    print(json.dumps({"seconds": seconds, "peak_mib": peak_memory() / 2**20}))


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # processes started from here inherit it
    found = {}
    for name in CASES:
        bank, fit = [], []
        for number in range(ROUNDS):
            fit.append(measure("fit", name, number)["seconds"] / FIT_HEADS * len(grid()))
            bank.append(measure("bank", name, number))
        seconds = [run["seconds"] for run in bank]
        found[name] = {
            "ratio": round(statistics.median(fit) / statistics.median(seconds), 1),
            "bank_seconds": seconds,
            "fit_seconds_extrapolated": fit,
            "bank_peak_mib": max(run["peak_mib"] for run in bank),
        }
        print(
            f"{name:24} {found[name]['ratio']:8.1f} x as fast as fit one after another, "
            f"peak {found[name]['bank_peak_mib']:.0f} MiB"
        )
    machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "used": 2}
    text = json.dumps({"machine": machine, "heads": len(grid()), "fit_heads": ROUNDS * FIT_HEADS, "cases": found})
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(*sys.argv[2:])
    else:
        main()
