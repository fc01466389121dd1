"""What the cache saves: one head by the network against one head from the cache, as ratios of medians.

Each round runs, as processes of their own and in turn: extraction into a new file, the same again with nothing to do,
and a logistic head on the cached features. The machine is noisy, so only ratios within this run mean something.

    make bench                # scikit-learn's digits; with BOTTLENECK_ASSETS, 512 cats and dogs too
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5


def seconds(*arguments: object, folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)], cwd=folder, check=True, capture_output=True
    )
    return time.perf_counter() - started


def some_images(folder: Path) -> str:
    assets = os.environ.get("BOTTLENECK_ASSETS")
    if not assets:
        return "sample:digits"
    for kind in ("cats", "dogs"):
        source = Path(assets) / "images" / "cats_and_dogs_filtered" / "train" / kind
        (folder / "images" / kind).mkdir(parents=True)
        for path in sorted(source.iterdir())[:256]:
            shutil.copy(path, folder / "images" / kind)
    return str(folder / "images")


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    os.environ["PYTHONPATH"] = str(root)
    times: dict[str, list[float]] = {"extract": [], "extract, nothing to do": [], "logistic head from cache": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = some_images(folder)
        seconds("extract", images, "--out", "warm.h5", folder=folder)  # weights found, bytecode compiled
        for number in range(ROUNDS):
            store = f"{number}.h5"
            times["extract"].append(seconds("extract", images, "--out", store, folder=folder))
            times["extract, nothing to do"].append(seconds("extract", images, "--out", store, folder=folder))
            times["logistic head from cache"].append(
                seconds("train-head", store, "--head", "logistic", "--runs", f"runs{number}", folder=folder)
            )
    base = statistics.median(times["extract"])
    rows = {name: round(base / statistics.median(values), 2) for name, values in times.items()}
    for name, ratio in rows.items():
        print(f"{name:28} {ratio:8.2f} x as fast as extracting")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "images": images.split("/")[-1],
    }
    print(json.dumps({"machine": machine, "rounds": ROUNDS, "ratios": rows, "seconds": times}))


if __name__ == "__main__":
    main()
