"""What a cluster costs and gains, on one machine: against the local run, with 1, 2 and 3 workers, and in messages.

    taskset -c 0,1 python tests/benchmarks/bench_cluster.py [OUT.json] [--rounds 3]    # BOTTLENECK_ASSETS: cats and dogs

- overhead: the command with one worker, which has all processors, against the same one without; start-up apart, which
  is what either takes for 32 images, as a longer run does not pay more for it. Rounds take turns; ratio of medians.
- workers: 1, 2 and 3 of them with one processor each, as far as there are any, against what ``cluster_model`` predicts from
  the seconds of decoding and of the forward pass alone. Every store has to be the same, data set for data set.
- messages: bytes that client and scheduler send and receive for each shard; what they say to each other counts twice.
- sweep: the same 40 heads here and on 2 workers; their leaderboards have to be the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from clusters import Traffic  # noqa: E402
from faults import differences  # noqa: E402

from features.extraction.extraction import Extraction, prepare  # noqa: E402
from features.extraction.options import ExtractionOptions  # noqa: E402
from features.extraction.running import Work  # noqa: E402
from features.pixels.views import DecodedViews  # noqa: E402
from pipeline.cluster.model import Costs, Worker, forecast_cluster  # noqa: E402
from pipeline.cluster.run import ClusterShards  # noqa: E402

SIZE, BATCH = 160, 32
HEADS = """
version: 1
heads:
- {head: logistic, log: {C: [1e-5, 10, 10]}}
- {head: ridge, log: {alpha: [10, 1e6, 8]}}
- {head: linear-svm, log: {C: [1e-6, 1, 8]}}
- {head: sgd, log: {alpha: [1e-4, 10, 5]}}
- {head: knn, grid: {n_neighbors: [3, 7, 11, 21]}}
- {head: lda, grid: {shrinkage: [0.03, 0.1, 0.3, 0.6, 0.9]}}
"""


def extraction(images: Path, out: Path, weights: Path, shard_rows: int, **by: Any) -> Extraction:
    asked = ExtractionOptions(
        weights=str(weights), image_size=SIZE, batch_size=BATCH, shard_rows=shard_rows, overwrite=True
    )
    return prepare(images, out, asked, **by)


def command_seconds(images: Path, out: Path, weights: Path, *more: str) -> float:
    """Of a whole command."""
    out.unlink(missing_ok=True)
    options = ["--weights", weights, "--image-size", SIZE, "--batch-size", BATCH, "--shard-rows", 1024]
    command = [sys.executable, "-m", "pipeline", "extract", images, "--out", out, *options, *more]
    started = time.perf_counter()
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def some_of(images: Path, folder: Path) -> Path:
    """32 of the images, which take no time beside the start."""
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True)
        for path in sorted((images / "train" / kind).iterdir())[:16]:
            shutil.copy(path, folder / kind)
    return folder


def seconds_of(images: Path, out: Path, weights: Path, shard_rows: int, by: str, traffic: Traffic) -> dict[str, float]:
    """Seconds from plan to store by workers, and the bytes that were sent."""
    out.unlink(missing_ok=True)
    work = extraction(images, out, weights, shard_rows, run_shards=ClusterShards(by))
    traffic.bytes = 0
    started = time.perf_counter()
    work.run()
    return {"seconds": time.perf_counter() - started, "bytes": traffic.bytes}


def single_costs(images: Path, weights: Path, processors: int) -> tuple[float, float]:
    """Processor-seconds of decoding and of the forward pass, each alone, for one image."""
    work = extraction(images, Path("unused.h5"), weights, 2048)
    plan = work.plan()
    task = Work(plan.specs, Path(), work.images, work.network, work.options)
    engine, read, spec = task.engine(plan.specs[0].recipes), task.reader(), plan.specs[0]
    paths = spec.paths[:640]
    with ThreadPoolExecutor(processors) as pool:
        list(pool.map(lambda path: spec.render(read(path), bytes(32)), paths))
        started = time.perf_counter()
        decoded = list(pool.map(lambda path: spec.render(read(path), bytes(32)), paths))
        decoding = (time.perf_counter() - started) * processors / len(paths)
    import numpy as np

    pixels = [item.pixels[0] for item in decoded if isinstance(item, DecodedViews)]
    batches = [np.stack(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
    engine(batches[0])
    started = time.perf_counter()
    for batch in batches:
        engine(batch)
    return decoding, (time.perf_counter() - started) * processors / len(paths)


def board(features: Path, runs: Path, sweep: Path, *more: str) -> tuple[float, list[dict[str, Any]]]:
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "train-head",
        features,
        "--heads",
        sweep,
        "--runs",
        runs,
        "--json",
        *more,
    ]
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    rows = json.loads(done.stdout)["board"]
    assert len(rows) == 40
    kept = [{key: value for key, value in row.items() if key not in ("fit_seconds", "chosen")} for row in rows]
    return time.perf_counter() - started, sorted(kept, key=lambda row: row["run_id"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("json", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    assets = Path(os.environ["BOTTLENECK_ASSETS"])
    images, weights = (
        assets / "images" / "cats_and_dogs_filtered",
        next((assets / "weights").glob("mobilenet_v2_1.0_*")),
    )
    mine = sorted(os.sched_getaffinity(0))
    traffic, found = Traffic(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        one, local = folder / "one.h5", folder / "local.h5"
        few = some_of(images, folder / "few")
        command_seconds(few, one, weights)  # the network is converted; files and programs are cached
        times: dict[str, list[dict[str, float]]] = {"local": [], "one worker": []}
        for _ in range(options.rounds):
            for (name, runs), out, more in zip(
                times.items(), (local, one), ([], ["--cluster", "local:1"]), strict=True
            ):
                start = command_seconds(few, out, weights, *more)
                whole = command_seconds(images, out, weights, *more)
                runs.append({"start": start, "whole": whole, "rest": whole - start})
                print(name, runs[-1], file=sys.stderr)
        assert differences(local, one) == []
        found["overhead"] = {
            "images": 3000,
            **{
                name: {part: statistics.median(run[part] for run in runs) for part in runs[0]}
                for name, runs in times.items()
            },
            "ratios of rounds, start-up apart": [b["rest"] / a["rest"] for a, b in zip(*times.values(), strict=True)],
        }
        both = found["overhead"]
        both["ratio, start-up apart"] = both["one worker"]["rest"] / both["local"]["rest"]
        both["ratio, start-up included"] = both["one worker"]["whole"] / both["local"]["whole"]
        # One processor for each worker, as long as there are any; what an image costs is measured anew before each run,
        # as other work on the machine changes it.
        tries: dict[int, list[dict[str, float]]] = {1: [], 2: [], 3: []}
        for _ in range(options.rounds):
            for count, runs in tries.items():
                os.sched_setaffinity(0, mine[:1])
                decoding, network = single_costs(images, weights, 1)
                os.sched_setaffinity(0, mine[: min(count, len(mine))])
                start = seconds_of(few, one, weights, 256, f"local:{count}", traffic)["seconds"]
                run = seconds_of(images, one, weights, 256, f"local:{count}", traffic)
                assert differences(local, one) == []
                worker = Worker(decoding, network, processors=min(count, len(mine)) / count)
                predicted = forecast_cluster(3000, count, worker, Costs(shard_rows=256, start_seconds=start)).seconds
                runs.append({**run, "predicted": predicted, "decode": decoding, "network": network})
                print(count, runs[-1], file=sys.stderr)
        os.sched_setaffinity(0, mine)

        def middle(name: str, runs: Sequence[dict[str, float]]) -> float:
            return statistics.median(run[name] for run in runs)

        every = [run for runs in tries.values() for run in runs]
        decoding, network = middle("decode", every), middle("network", every)
        found["processor-seconds of an image"] = {"decode": decoding, "network": network}
        found["workers"] = {
            count: {
                "measured seconds": middle("seconds", runs),
                "predicted seconds": middle("predicted", runs),
                "measured / predicted": [run["seconds"] / run["predicted"] for run in runs],
                "images/s": 3000 / middle("seconds", runs),
            }
            for count, runs in tries.items()
        }
        traffic_of = {rows: seconds_of(images, one, weights, rows, "local:1", traffic)["bytes"] for rows in (250, 50)}
        found["bytes of messages for each shard"] = (traffic_of[50] - traffic_of[250]) / (60 - 12)
        plain = Worker(decoding, network, processors=8)
        found["predicted for 100 workers of 8 such processors, hours"] = {
            f"{count:,}": dataclasses.asdict(forecast_cluster(count, 100, plain, Costs(losses_per_hour=0.01)))
            for count in (10**7, 10**9)
        }
        sweep = folder / "sweep.yaml"
        sweep.write_text(HEADS)
        here = board(local, folder / "here", sweep, "--n-jobs", "2")
        there = board(local, folder / "there", sweep, "--cluster", "local:2")
        found["sweep"] = {"here": here[0], "2 workers": there[0], "same leaderboard": here[1] == there[1]}
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0 if found["sweep"]["same leaderboard"] else 1


if __name__ == "__main__":
    sys.exit(main())
