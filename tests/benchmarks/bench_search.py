"""Nearest neighbours: one query on many float16 rows, and all rows with each other, at three sizes each.

Features are made: 1,280 columns whose spectrum falls like that of MobileNetV2's, no value below zero. "First" reads the file and
compares all checksums; "later" is the next query of the same process. Memory is anonymous: pages of the file do not count.
Of all neighbours, the recall of the ten nearest is measured on 5,000 rows whose neighbours are computed exactly.

    python tests/benchmarks/bench_search.py FOLDER [--similar 250000,500000,1000000] [--all 25000,50000,100000]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
COLUMNS, BLOCK, BASE, PROBES = 1280, 5000, 20_000, 5000


def made(path: Path, count: int, dtype: str) -> None:
    """A store whose rows are variations of 20,000 base rows."""
    import dataclasses

    from helpers import recipe

    from features.store.schema import FeatureSpec, ImageTable, Quarantine
    from features.store.writer import StoreWriter

    generator = np.random.default_rng(0)
    spectrum = np.arange(1, COLUMNS + 1, dtype=np.float32) ** -0.6
    turn = np.linalg.qr(generator.normal(size=(COLUMNS, COLUMNS)))[0].astype(np.float32)
    base = np.maximum((generator.standard_normal((BASE, COLUMNS), dtype=np.float32) * spectrum) @ turn + 0.02, 0)
    spec = FeatureSpec(dataclasses.replace(recipe(), dtype=dtype), 1, (COLUMNS,))
    writer = StoreWriter(path, kind="store", rows=count, features={spec.recipe.name: spec})
    noise = (generator.standard_normal((BLOCK, COLUMNS), dtype=np.float32) * 0.4 * spectrum) @ turn
    for start in range(0, count, BLOCK):
        rows = base[generator.integers(0, BASE, BLOCK)] * generator.uniform(0.8, 1.2, (BLOCK, 1)).astype(np.float32)
        block = np.maximum(rows + noise[generator.permutation(BLOCK)], 0)
        writer.append(spec.recipe.name, block[: min(BLOCK, count - start), None].astype(dtype))
    sha256 = np.zeros((count, 32), np.uint8)
    sha256[:, :8] = np.arange(count, dtype="<i8").view(np.uint8).reshape(count, 8)
    ones = np.ones(count, np.int32)
    labels = (np.arange(count) * 10 // count).astype(np.int32)
    paths = tuple(f"{label}/{row:07d}.jpg" for row, label in enumerate(labels.tolist()))
    table = ImageTable(
        paths, sha256, labels, np.zeros(count, np.int8), None, ones, ones, ones.astype(np.int64), ones.astype(np.int64)
    )
    nothing = Quarantine((), sha256[:0], (), ones[:0].astype(np.int64), ones[:0].astype(np.int64))
    writer.finish(images=table, quarantine=nothing, classes=[str(label) for label in range(10)])


def anonymous() -> int:
    """Anonymous memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1000 for line in lines if line.startswith("RssAnon"))


def timed(work: Any) -> tuple[Any, dict[str, float]]:
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, {
        "seconds": round(time.perf_counter() - wall, 2),
        "processor": round(time.process_time() - processor, 2),
        "anonymous_mb": anonymous(),
    }


def one_query(path: Path) -> dict[str, Any]:
    from features.store.reader import FeatureStore
    from pipeline.stages.similar import similar

    store = FeatureStore.open(path)
    _, first = timed(lambda: similar(store, ["0/0000005.jpg"]))
    _, later = timed(lambda: similar(store, ["0/0000007.jpg"]))
    return {"rows": len(store), "first": first, "later": later}


def all_rows(path: Path) -> dict[str, Any]:
    from features.store.reader import FeatureStore
    from pipeline.search.neighbours import nearest, nearest_of_all
    from pipeline.search.vectors import Vectors

    store = FeatureStore.open(path)
    vectors = Vectors(store)
    found, took = timed(lambda: nearest_of_all(vectors, 10))
    rows = np.sort(np.random.default_rng(1).choice(len(store), min(PROBES, len(store)), replace=False))
    exact = nearest(vectors, vectors.at(rows), 11).rows
    true = [[row for row in line if row != own][:10] for own, line in zip(rows.tolist(), exact.tolist(), strict=True)]
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(true, found.rows[rows].tolist(), strict=True)]
    return {"rows": len(store), **took, "recall": round(float(np.mean(shared)), 4)}


def exponent(results: list[dict[str, Any]], key: Any) -> float | None:
    """Slope of the logarithm of a figure against that of the number of rows."""
    if len(results) < 2:
        return None
    points = np.log([[result["rows"], max(key(result), 1e-3)] for result in results])
    return round(float(np.polyfit(points[:, 0], points[:, 1], 1)[0]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--similar", default="250000,500000,1000000")
    parser.add_argument("--all", default="25000,50000,100000")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work = {"similar": one_query, "all": all_rows}[options.one[0]]
        print(json.dumps(work(Path(options.one[1]))))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {"similar": [], "all": []}
    for kind, sizes, dtype in (("similar", options.similar, "float16"), ("all", options.all, "float32")):
        for count in map(int, filter(None, sizes.split(","))):
            path = options.folder / f"{kind}-{count}.h5"
            if not path.exists():
                made(path, count, dtype)
            # Each in a process of its own.
            command = [sys.executable, __file__, str(options.folder), "--one", kind, str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[kind].append(json.loads(done.stdout))
            print(kind, results[kind][-1], file=sys.stderr, flush=True)
    growth = {
        "similar, first": exponent(results["similar"], lambda result: result["first"]["processor"]),
        "similar, later": exponent(results["similar"], lambda result: result["later"]["processor"]),
        "all": exponent(results["all"], lambda result: result["processor"]),
    }
    print(json.dumps({**results, "exponents of processor time": growth}, indent=1))


if __name__ == "__main__":
    main()
