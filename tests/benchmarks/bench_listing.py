"""How much anonymous memory of the process, and of the processor, each image costs: tars and Parquet files of many images.

    python tests/benchmarks/bench_listing.py [IMAGES IMAGES ...]

Synthetic 32 px images of several numbers (100,000, 300,000 and 1,000,000 by default) go through a network of numpy: they are
listed; extracted for the first time; planned again, when nothing has changed; and the store is opened. Each step runs in a
process of its own, in which a small source went through all of them before: what is loaded once does not count. ``RssAnon``
is looked at 50 times a second; it prints the slope of the peaks, by least squares, and the processor time an image.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("listing", "first extraction", "unchanged plan", "opening")
RUN = """
import json, sys, threading, time
from pathlib import Path
sys.path[:0] = ["tests"]
from faults import NumpyNetwork
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources.scan import scan
from features.store.reader import FeatureStore

def extraction(source, out):
    return Extraction(scan(source), NumpyNetwork(8), Path(out), ExtractionOptions())

def opened(source, out):
    store = FeatureStore.open(out)
    return store.images, store.quarantine, store.data_digest, store.array("last.avg")[-1]

WAYS = {
    "listing": lambda source, out: scan(source),
    "first extraction": lambda source, out: extraction(source, out).run(),
    "unchanged plan": lambda source, out: extraction(source, out).run(),
    "opening": opened,
}

def anonymous():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def look():
    while not done.wait(0.02):
        peak.append(max(peak.pop(), anonymous()))

step, small, source, out = sys.argv[1:]
for way in WAYS.values():
    way(small, out + ".small.h5")
Path(out + ".small.h5").unlink()
before, done, used = anonymous(), threading.Event(), time.process_time()
peak = [before]
watch = threading.Thread(target=look)
watch.start()
kept = WAYS[step](source, out)
done.set()
watch.join()
print(json.dumps([peak[0] - before, time.process_time() - used]))
"""


def png(number: int) -> bytes:
    """Return a PNG of 32 x 32 pixels of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colour = bytes([number >> 16 & 255, number >> 8 & 255, number & 255])
    pixels = zlib.compress((b"\0" + colour * 32) * 32, 1)
    header = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tar(path: Path, count: int) -> Path:
    """Write a tar of images and their labels."""
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            for ending, data in (("png", png(number)), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number:08d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def parquet(path: Path, count: int) -> Path:
    """Write a Parquet file of images and their labels."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())])
    with ParquetWriter(path, schema) as file:
        for start in range(0, count, 1000):
            rows = range(start, min(start + 1000, count))
            images = pa.array([{"bytes": png(row), "path": None} for row in rows], kind)
            file.write_table(pa.table({"image": images, "label": [row % 2 for row in rows]}, schema))
    return path


def main() -> None:
    sizes = [*map(int, sys.argv[1:])] or [100_000, 300_000, 1_000_000]
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "BOTTLENECK_CACHE": str(Path(name, "cache"))}
        for make in (parquet, tar):
            small = make(Path(name, f"small.{make.__name__}"), 300)
            found: dict[str, list[list[float]]] = {step: [] for step in STEPS}
            for size in sizes:
                source, out = make(Path(name, f"{size}.{make.__name__}"), size), Path(name, "f.h5")
                for step in STEPS:
                    command = [sys.executable, "-c", RUN, step, str(small), str(source), str(out)]
                    done = subprocess.run(
                        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment
                    )
                    found[step].append(json.loads(done.stdout))
                    shown = [f"{value:.4g}" for value in found[step][-1]]
                    print(
                        f"  {make.__name__} {size} {step}: {shown[0]} bytes, {shown[1]} s", file=sys.stderr, flush=True
                    )
                for path in (source, out):
                    path.unlink()
            for step in STEPS:
                memory, cost = np.polyfit(sizes, np.array(found[step]), 1)[0]
                print(
                    f"{make.__name__}, {step}: {memory:.0f} bytes and {1e6 * cost:.0f} us of the processor an image",
                    flush=True,
                )


if __name__ == "__main__":
    main()
