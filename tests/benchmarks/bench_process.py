"""Whole commands from start to exit against a frozen Keras script: wall time and processor time, as ratios of medians.

    python tests/benchmarks/bench_process.py [--images 2000] [--rounds 5] [--code DIR] [--json OUT]    # BOTTLENECK_ASSETS

Every contender is a process of its own, start-up included, and all of them take turns in every round. `extract` finds its
kept conversion from the first round, which is not counted, and the quantised network that this calibrated; its output is
absent before each run. The yardstick is
`baseline_keras.py`, whose sha256 a test holds. With `--code DIR`, every command of ours is run by the code in that folder
too, a checkout of another commit, and the last column says how many times as fast as that this checkout is.

Processor time is that of the process and of those it waited for. On a machine that others use it is the steadier figure.

A second table says where the milliseconds of our commands go, in processor-ms an image. In every round each stage is measured
alone by one more process; `start` is the command on one batch of images; `the rest` is Python, and whatever several threads
cost each other. The bound is what the machine could do, decoding and the forward pass each alone: 1 / (decode + forward).
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TUNED = "keras predict, tuned"
FEW = 32  # images of the command that measures the start: one batch
STAGES = ("reading", "decoding", "resizing", "forward", "writing")
WEIGHTS = "mobilenet_v2_1.0_224_no_top.weights.h5"
WAYS = {
    "ours, float32": (),
    "ours, bfloat16": ("--precision", "bfloat16"),
    "ours, bfloat16, decode fast": ("--precision", "bfloat16", "--decode", "fast"),
    "ours, int8": ("--precision", "int8"),
    "ours, int8, decode fast": ("--precision", "int8", "--decode", "fast"),
    "ours, engine keras": ("--engine", "keras"),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A command of ours, run by the code in a folder, or the yardstick, which has no code of ours."""

    name: str
    arguments: tuple[str, ...] = ()
    code: Path | None = None

    def command(self, options: argparse.Namespace, out: Path, *more: str) -> list[str]:
        if self.code is None:
            script = [str(HERE / "baseline_keras.py"), str(options.folder), str(out)]
            return [sys.executable, *script, "--weights", str(options.weights), "--size", str(options.size)]
        extract = ["-m", "pipeline", "extract", str(options.folder), "--out", str(out), "--backbone", "mobilenetv2"]
        size = ["--image-size", str(options.size), "--weights", str(options.weights), "--json"]
        return [sys.executable, *extract, *size, *self.arguments, *more]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one process cost: seconds from start to exit, seconds of processors, MiB at most."""

    wall: float
    processor: float
    peak_mib: float


def measure(command: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> tuple[Cost, str]:
    """Run a command; what it cost, and what it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, env=dict(environment), stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}: {errors.read().decode()[-2000:]}")
        peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return Cost(wall, usage.ru_utime + usage.ru_stime, peak), out.read().decode()


def environment_of(code: Path, scratch: Path) -> dict[str, str]:
    # Another commit may keep its conversions in another form.
    cache = str(scratch / f"cache {code.name} {code == ROOT}")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as users have it
    return {**kept, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(code), "BOTTLENECK_CACHE": cache}


def run(contender: Contender, options: argparse.Namespace, scratch: Path, limit: int | None = None) -> Cost:
    """Run a contender once, with its output absent before; the run must have made features of every image, or of ``limit``."""
    more: tuple[str, ...] = () if limit is None else ("--limit", str(limit))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / ("features.npz" if contender.code is None else "features.h5")
        cwd = Path(folder) if contender.code is None else contender.code
        environment = environment_of(contender.code or ROOT, scratch)
        quantised = scratch / f"{contender.name}.int8"
        if quantised.exists():
            more += ("--quantised", str(quantised))
        cost, said = measure(contender.command(options, out, *more), cwd=cwd, environment=environment)
        for made in Path(f"{out}.networks").glob("*.int8"):
            shutil.copyfile(made, quantised)
        images = features_in(out) if contender.code is None else json.loads(said)["inferred"]
    if images != (limit or options.images):
        sys.exit(f"{contender.name}: features of {images} images instead of {options.images}")
    return cost


def features_in(path: Path) -> int:
    import numpy as np

    with np.load(path) as arrays:
        return len(arrays["features"])


def stages(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the processor-ms an image of each stage alone, and the seconds an image of the two halves of the bound."""
    import hashlib

    from bench_extract import Ours, decode_alone, forward_alone, prepared, timed_writing

    from features.pixels.decode import decode_image, decode_upright

    given = dict(zip(WAYS[way][::2], WAYS[way][1::2], strict=True))
    asked = Ours(given.get("--engine", "auto"), given.get("--precision", "float32"), given.get("--decode", "full"))
    with tempfile.TemporaryDirectory() as folder, timed_writing() as writing:
        extraction, engine = prepared(options, asked, Path(folder) / "f.h5")
        count = extraction.run().inferred
    source, rule = extraction.images, extraction.network.recipes[0].pixels
    chosen = range(0, len(source), max(1, len(source) // 500))
    files = [source.read(index) for index in chosen]

    def each(function: Callable[[Any], object], items: Sequence[Any]) -> float:
        started = time.process_time()
        for item in items:
            function(item)
        return 1000 * (time.process_time() - started) / len(items)

    reading = each(lambda index: hashlib.sha256(source.read(index)).digest(), chosen)
    decoding = each(lambda data: decode_upright(data, rule), files)
    both = each(lambda data: decode_image(data, rule), files)
    bound = decode_alone(options, extraction)
    started = time.process_time()
    bound |= forward_alone(options, engine)
    forward = 1000 * (time.process_time() - started) / options.forward
    parts = (reading, decoding, both - decoding, forward, 1000 * sum(writing) / count)
    return {**dict(zip(STAGES, parts, strict=True)), **bound}


def stages_of(way: str, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Call ``stages`` in a process of its own."""
    command = [sys.executable, __file__, "--stages", way, "--folder", str(options.folder), "--size", str(options.size)]
    _, said = measure(command, cwd=ROOT, environment=environment_of(ROOT, scratch))
    return dict(json.loads(said))


def where(
    whole: Sequence[Cost], start: Sequence[Cost], parts: Sequence[Mapping[str, float]], images: int
) -> dict[str, float]:
    """Return where the processor-ms of an image go, and the shares of the bound that a command reaches.

    ``of_bound`` counts the seconds from start to exit, ``of_bound_after_start`` those without the start.
    """
    row = {stage: statistics.median(part[stage] for part in parts) for stage in STAGES}
    each, wall = (statistics.median(getattr(cost, what) for cost in whole) / images for what in ("processor", "wall"))
    begun = {
        what: statistics.median(getattr(cost, what) for cost in start) - FEW * own
        for what, own in (("processor", each), ("wall", wall))
    }
    started = {what: max(0.0, value) / images for what, value in begun.items()}
    bound = statistics.median(part["decode_each"] + part["forward_each"] for part in parts)
    return {
        "start": 1000 * started["processor"],
        **row,
        "rest": 1000 * (each - started["processor"]) - sum(row.values()),
        "whole": 1000 * each,
        "start_seconds": images * started["wall"],
        "bound_per_second": 1 / bound,
        "of_bound": bound / wall,
        "of_bound_after_start": bound / (wall - started["wall"]),
    }


def where_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    names = ("start", *STAGES, "rest", "whole")
    lines = [f"| processor-ms an image | {' | '.join(names)} | start | bound | of it | after the start |"]
    lines.append("| --- " * (len(names) + 5) + "|")
    for way, row in rows.items():
        cells = [way, *(f"{row[name]:.2f}" for name in names), f"{row['start_seconds']:.1f} s"]
        cells += [f"{row['bound_per_second']:.0f}/s", f"{row['of_bound']:.0%}", f"{row['of_bound_after_start']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def contenders(options: argparse.Namespace) -> list[Contender]:
    """The yardstick; our commands; and each of them by other code."""
    wanted = {name: more for name, more in WAYS.items() if not options.only or name in options.only}
    found = [Contender(TUNED)]
    for name, more in wanted.items():
        found.append(Contender(name, more, ROOT))
        if options.code and "int8" not in more:
            found.append(Contender(f"{name}, {commit(options.code)}", more, options.code))
    return found


def commit(folder: Path) -> str:
    """The short name of the commit that a folder holds, or the folder's name where git does not know it."""
    done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else folder.name


def summarise(costs: Mapping[str, Sequence[Cost]], other: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of ratios. `other` names the row of other code for each of ours that has one.

    A ratio of 2 means half of the time. The lowest and highest ratio within a round tell how noisy the machine was.
    """

    def ratio(base: str, name: str, what: str) -> float:
        first, second = ([getattr(cost, what) for cost in costs[key]] for key in (base, name))
        return float(statistics.median(first) / statistics.median(second))

    rows = []
    for name, own in costs.items():
        by_round = [tuned.wall / cost.wall for tuned, cost in zip(costs[TUNED], own, strict=True)]
        row: dict[str, Any] = {
            "contender": name,
            "wall": ratio(TUNED, name, "wall"),
            "wall_lowest": min(by_round),
            "wall_highest": max(by_round),
            "processor": ratio(TUNED, name, "processor"),
            "peak_mib": statistics.median(cost.peak_mib for cost in own),
        }
        if name in other:
            row["wall_to_code"] = ratio(other[name], name, "wall")
            row["processor_to_code"] = ratio(other[name], name, "processor")
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("x tuned:", "wall", "by round", "processor", "peak", "x code: wall", "processor")
    lines = ["{:44} {:>6} {:>13} {:>10} {:>9} {:>13} {:>10}".format(*head)]
    for row in rows:
        spread = f"{row['wall_lowest']:.2f} to {row['wall_highest']:.2f}"
        line = (
            f"{row['contender']:44} {row['wall']:6.2f} {spread:>13} {row['processor']:10.2f} {row['peak_mib']:5.0f} MiB"
        )
        if "wall_to_code" in row:
            line += f" {row['wall_to_code']:13.2f} {row['processor_to_code']:10.2f}"
        lines.append(line)
    return "\n".join(lines)


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from bench_extract import machine, some

    from features.machine import has_bfloat16

    held = sorted(os.sched_getaffinity(0))[: options.processors] if hasattr(os, "sched_getaffinity") else []
    if held:
        os.sched_setaffinity(0, held)  # the processes that are started inherit it
    photographs = Path(os.environ["BOTTLENECK_ASSETS"]).resolve() / "images" / "cats_and_dogs_filtered" / "train"
    options.folder = some(photographs, options.images, scratch / "images")
    options.images = len(list(Path(options.folder).rglob("*.jpg")))
    chosen = contenders(options)
    costs: dict[str, list[Cost]] = {contender.name: [] for contender in chosen}
    mine = [contender for contender in chosen if contender.code == ROOT]
    starts: dict[str, list[Cost]] = {contender.name: [] for contender in mine}
    parts: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in mine}
    for number in range(options.rounds + 1):
        for contender in chosen:
            cost = run(contender, options, scratch)
            if number:  # the first round fills caches: files, bytecode, kept conversions
                costs[contender.name].append(cost)
            print(
                f"round {number}: {contender.name}: {cost.wall:.1f} s, {cost.processor:.1f} s of processors",
                file=sys.stderr,
            )
        for contender in mine if number else ():
            starts[contender.name].append(run(contender, options, scratch, FEW))
            parts[contender.name].append(stages_of(contender.name, options, scratch))
    other = {
        one.name: theirs.name
        for one in mine
        for theirs in chosen
        if options.code and theirs.code == options.code and theirs.arguments == one.arguments
    }
    return {
        "machine": {**machine(held), "bfloat16": has_bfloat16()},
        "images": options.images,
        "size": options.size,
        "rounds": options.rounds,
        "commit": commit(ROOT),
        "rows": summarise(costs, other),
        "where": {name: where(costs[name], starts[name], parts[name], options.images) for name in starts},
        "measured": {name: [dataclasses.asdict(cost) for cost in values] for name, values in costs.items()},
    }


def main() -> None:
    sys.path[:0] = [str(ROOT), str(HERE)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="so many cats and dogs, at even distances")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processors", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=WAYS, help="these of our commands")
    parser.add_argument("--code", type=Path, help="a checkout of another commit, to be timed too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stages", choices=WAYS, help=argparse.SUPPRESS)  # of one way; called by this script
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.code:
        options.code = options.code.resolve()
        if not (options.code / "pipeline" / "__main__.py").is_file():
            parser.error(f"{options.code} holds no checkout: pipeline/__main__.py is missing")
    assets = os.environ.get("BOTTLENECK_ASSETS")
    if not assets:
        print("BOTTLENECK_ASSETS is not set: there are no photographs and weights; skipped", file=sys.stderr)
        return
    options.weights = Path(assets).resolve() / "weights" / WEIGHTS
    if options.stages:
        of_ours = {
            "images": options.folder,
            "backbone": "mobilenetv2",
            "forward": 1024,
            "weights": str(options.weights),
        }
        print(json.dumps(stages(options.stages, argparse.Namespace(size=options.size, **of_ours))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        document = compare(options, Path(scratch))
    print(table(document["rows"]))
    print(where_table(document["where"]))
    if not document["machine"]["bfloat16"]:
        print("this processor has no bfloat16: in those rows Keras emulates it")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
