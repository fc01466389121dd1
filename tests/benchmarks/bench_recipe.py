"""The published cats-and-dogs recipe, every image through the network in every epoch, against our way: whole commands.

python tests/benchmarks/bench_recipe.py [OUT.json] [--epochs N]    # with BOTTLENECK_ASSETS; a quarter of an hour
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "mobilenet_v2_1.0_224_no_top.weights.h5"
OURS = ("cached", "cached-bfloat16")


def recipe(way: str, folder: Path, *options: str) -> dict[str, Any]:
    """One way in a folder of its own: seconds of the whole command, and what its runs reached."""
    assets = Path(os.environ["BOTTLENECK_ASSETS"])
    images, weights = assets / "images" / "cats_and_dogs_filtered", assets / "weights" / WEIGHTS
    command = [sys.executable, "-m", "pipeline", "recipe", "mobilenetv2-cats-dogs", str(images), "--way", way]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--out", str(folder), "--weights", str(weights), "--json", *options],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds = time.perf_counter() - started
    steps = json.loads(done.stdout)["steps"]
    kept = ("step", "accuracy", "accuracy_interval", "n", "seconds")
    return {"way": way, "seconds": seconds, "steps": [{name: step[name] for name in kept} for step in steps]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--epochs", help="of each phase; default: as published, 10 and 10")
    options = parser.parse_args()
    few = ("--epochs", options.epochs) if options.epochs else ()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = [recipe(way, folder / f"{way} before") for way in OURS]
        results.append(recipe("published", folder / "published", *few))
        results += [recipe(way, folder / f"{way} {number}") for number in range(2) for way in OURS]
    published = next(result for result in results if result["way"] == "published")
    # The steps that our runner puts before the two that were published, features and an untrained head, do not count.
    added = sum(step["seconds"] for step in published["steps"] if "finetune" not in step["step"])
    ratios = {
        way: (published["seconds"] - added)
        / statistics.median(result["seconds"] for result in results if result["way"] == way)
        for way in OURS
    }
    document = {"results": results, "ratios": ratios, "asked": 15}
    if options.out:
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    for result in results:
        reached = [f"{step['step']} {step['accuracy']:.4f}" for step in result["steps"] if step["accuracy"] is not None]
        print(f"{result['way']}: {result['seconds']:.1f} s; {', '.join(reached)}")
    for way, ratio in ratios.items():
        print(f"the published recipe takes {ratio:.1f} times as long as our way {way}")


if __name__ == "__main__":
    main()
