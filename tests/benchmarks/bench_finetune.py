"""Last-block fine-tuning from cached cut features against end to end: seconds per epoch on the same batches, as ratios.

    taskset -c 0,1 python tests/benchmarks/bench_finetune.py [--json OUT.json] [--rounds 5]

Needs BOTTLENECK_ASSETS. End to end is ours: each image is decoded, flipped at random, and goes through the frozen trunk
(compiled apart, BatchNorm folded) and the trained tail, in every epoch, as augmentation on the fly demands. From the cache
the same rows of the same batches are read from the store. Both live in one process, and their epochs take turns; the
first epoch of each, which compiles, does not count. An epoch is its training steps; measuring validation costs both
the same, as the trunk's features of plain images are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np  # noqa: E402

from features.extraction.extraction import extract_features  # noqa: E402
from features.machine import processors  # noqa: E402
from features.sources.scan import scan  # noqa: E402
from pipeline.runs.folder import Run  # noqa: E402
from pipeline.stages.finetune import make_inputs, prepare, read_rows  # noqa: E402
from pipeline.stages.train_head import train_head  # noqa: E402
from pipeline.tuning.endtoend import trunk_function  # noqa: E402
from pipeline.tuning.inputs import ImagePass  # noqa: E402
from pipeline.tuning.settings import settings_of  # noqa: E402
from pipeline.tuning.training import Tail  # noqa: E402

# backbone: weights, training images, ratio asked for
CASES = {
    "mobilenetv2": ("mobilenet_v2_1.0_224", 256, 2.5),
    "vgg16": ("vgg16", 64, 3.5),
}
BATCH = 32


def some_images(assets: Path, folder: Path, count: int) -> Path:
    """So many training and 32 validation images of cats and dogs, as links."""
    for split, number in (("train", count), ("validation", 32)):
        for kind in ("cats", "dogs"):
            (folder / split / kind).mkdir(parents=True)
            images = sorted((assets / "images" / "cats_and_dogs_filtered" / split / kind).iterdir())
            for path in images[: number // 2]:
                (folder / split / kind / path.name).symlink_to(path)
    return folder


class Contender:
    """One way of training: its inputs, its own copy of the network."""

    def __init__(self, run: Run, images: Path, cache: Path | None, pool: ThreadPoolExecutor, folder: Path) -> None:
        settings = settings_of({"batch_size": BATCH, "augment": "none" if cache else "flip"})
        job = prepare(run, settings, cache, None)
        source = scan(images)
        self._data = read_rows(job, source, pool)
        trunk = trunk_function(job.split, job.network, run.recipe, batch_size=BATCH, device="cpu")
        passing = ImagePass(source, trunk, run.recipe.pixels, pool, BATCH)
        self._inputs = make_inputs(job, self._data, passing, folder=folder, device="auto", progress=None)
        self._tail = Tail(job.split, job.head.temperature, settings)
        self._rows = self._data.by_content(self._data.rows("train"))

    def epoch(self, number: int) -> float:
        """Seconds of one epoch."""
        started = time.perf_counter()
        order = np.random.default_rng([0, number]).permutation(self._rows)
        with self._tail.training(0, number):
            for batch, features in self._inputs.batches(order, number):
                self._tail.step(features, self._data.labels[batch], rate=1e-5)
        return time.perf_counter() - started


def measure(backbone: str, assets: Path, rounds: int) -> dict[str, Any]:
    """Seconds per epoch of both, and the ratio of their medians."""
    weights, count, asked = CASES[backbone]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(processors()) as pool:
        folder = Path(temporary)
        images = some_images(assets, folder / "images", count)
        options: dict[str, Any] = {
            "backbone": backbone,
            "weights": str(assets / "weights" / f"{weights}_no_top.weights.h5"),
        }
        store = extract_features(images, folder / "f.h5", **options)
        started = time.perf_counter()
        cache = extract_features(images, folder / "cut.h5", layers=["boundary"], **options).path
        extraction = time.perf_counter() - started
        run = Run.open(train_head(store, "dropout-linear", runs=folder / "runs", params={"epochs": 2}).folder)
        contenders = {
            "end to end": Contender(run, images, None, pool, folder),
            "from the cache": Contender(run, images, cache, pool, folder),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(1, rounds + 2):
            for name, contender in contenders.items():
                seconds[name].append(contender.epoch(number))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "images": count,
        "seconds": {name: values[1:] for name, values in seconds.items()},
        "medians": medians,
        "ratio": medians["end to end"] / medians["from the cache"],
        "asked": asked,
        "extraction_seconds": extraction,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", choices=list(CASES), action="append")
    options = parser.parse_args()
    if "BOTTLENECK_ASSETS" not in os.environ:
        print("BOTTLENECK_ASSETS is not set: real weights and images are needed")
        return 1
    assets, found = Path(os.environ["BOTTLENECK_ASSETS"]).resolve(), {}
    for backbone in options.backbone or CASES:
        result = found[backbone] = measure(backbone, assets, options.rounds)
        medians = result["medians"]
        print(
            f"{backbone}, {result['images']} images of 224 pixels, batch {BATCH}: end to end {medians['end to end']:.2f} s, from "
            f"the cache {medians['from the cache']:.2f} s per epoch: {result['ratio']:.1f} times as fast "
            f"(at least {result['asked']} asked for; making the cache took {result['extraction_seconds']:.1f} s)",
            flush=True,
        )
    document = {"processors": processors(), "machine": platform.processor(), "rounds": options.rounds, "results": found}
    if options.json:
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(result["ratio"] >= result["asked"] for result in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
