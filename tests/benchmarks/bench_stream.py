"""What training from pieces costs: a store larger than memory, through the command line, against training in memory.

A store of 4 GB (781,250 rows of 1280 float32 columns, ten classes one after the other, a tenth of each is validation) is
made, and each head is trained twice, as a process of its own: with ``--memory 500MB``, and with memory for everything.

    python tests/benchmarks/bench_stream.py [OUT.json] [GB]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, CLASSES, BLOCK = 1280, 10, 5000
HEADS = {
    "dense": ["epochs=2"],
    "linear-sgd": ["epochs=2", "learning_rate=0.01"],
    "sklearn.linear_model.SGDClassifier": ["loss=log_loss", "alpha=0.01", "average=true", "max_iter=3"],
}


class Blocks:
    """Gaussian classes so near each other that about 0.93 can be told apart."""

    def __init__(self, labels: np.ndarray) -> None:
        centres = np.random.default_rng(0).normal(size=(CLASSES, COLUMNS)).astype(np.float32)
        self.labels, self.centres = labels, 3.3 * centres / np.linalg.norm(centres, axis=1, keepdims=True)

    def __getitem__(self, number: int) -> np.ndarray:
        y = self.labels[number * BLOCK : (number + 1) * BLOCK]
        noise = np.random.default_rng([1, number]).standard_normal((len(y), COLUMNS), dtype=np.float32)
        return np.asarray(noise + self.centres[y])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(-(-len(self.labels) // BLOCK)))


def make(path: Path, gigabytes: float) -> None:
    from test_streaming import write_store

    count = int(gigabytes * 1e9) // (4 * COLUMNS)
    labels = np.arange(count) * CLASSES // count
    splits = (np.random.default_rng(0).random(count) < 0.1).astype(np.int8)
    write_store(path, Blocks(labels), labels, splits)


def train(path: Path, head: str, memory: str, runs: Path) -> dict[str, Any]:
    """One command; its peak memory, its seconds, and what it says."""
    command = [sys.executable, "-m", "pipeline", "train-head", str(path), "--head", head, "--memory", memory]
    for param in HEADS[head]:
        command += ["--param", param]
    started = time.perf_counter()
    pid = os.fork()
    if not pid:
        done = subprocess.run([*command, "--runs", str(runs), "--json"], capture_output=True, text=True, check=False)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        (runs.parent / "said.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr, peak]))
        os._exit(0)
    os.waitpid(pid, 0)
    code, out, err, peak = json.loads((runs.parent / "said.json").read_text())
    assert code == 0, err
    said = json.loads(out)
    accuracy = said["metrics"]["validation"]["accuracy"]
    return {"peak": peak, "seconds": time.perf_counter() - started, "fit": said["fit_seconds"], "accuracy": accuracy}


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # processes started from here inherit it
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["PYTHONPATH"] = str(ROOT)
    gigabytes = float(sys.argv[2]) if len(sys.argv) > 2 else 4.0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.h5"
        make(path, gigabytes)
        for head in HEADS:
            pieces = train(path, head, "500MB", Path(folder) / "pieces")
            whole = train(path, head, f"{4 * gigabytes}GB", Path(folder) / "whole")
            found[head] = {"pieces": pieces, "whole": whole}
            print(
                f"{head:34} from pieces: peak {pieces['peak'] / 1e9:.2f} GB ({whole['peak'] / pieces['peak']:.1f} times less "
                f"than in memory), {pieces['fit'] / whole['fit']:.1f} times the time, accuracy {pieces['accuracy']:.4f} "
                f"(in memory {whole['accuracy']:.4f})"
            )
    text = json.dumps({"gigabytes": gigabytes, "heads": found})
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
