"""How much anonymous memory of the process, and of the processor, each image of a listing costs: tars and Parquet files.

    python tests/benchmarks/bench_listing.py [IMAGES IMAGES]

Synthetic sources of two sizes (100,000 and 300,000 images by default) are listed, each in a process of its own. The peak of
``RssAnon`` is looked at 50 times a second; it prints the slope between the two sizes.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = """
import json, sys, threading, time
from features.sources.scan import scan
def anonymous():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
def look():
    while not done.wait(0.02):
        peak.append(max(peak.pop(), anonymous()))
scan(sys.argv[1])  # what is loaded once does not count
before, done, used = anonymous(), threading.Event(), time.process_time()
peak = [before]
watch = threading.Thread(target=look)
watch.start()
images = scan(sys.argv[2])
done.set()
watch.join()
print(json.dumps([peak[0] - before, time.process_time() - used, len(images)]))
"""


def tar(path: Path, count: int) -> Path:
    """Write a tar of images and their labels."""
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            for ending, data in (("png", bytes(300)), ("cls", b"%d" % (number % 2))):
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
            rows = min(1000, count - start)
            images = pa.array([{"bytes": bytes(300), "path": None}] * rows, kind)
            file.write_table(pa.table({"image": images, "label": [row % 2 for row in range(rows)]}, schema))
    return path


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:3]] or [100_000, 300_000]
    with tempfile.TemporaryDirectory() as name:
        for make in (parquet, tar):
            small = make(Path(name, f"small.{make.__name__}"), 100)
            found = []
            for size in sizes:
                source = make(Path(name, f"{size}.{make.__name__}"), size)
                command = [sys.executable, "-c", LIST, str(small), str(source)]
                done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout))
                source.unlink()
            more = sizes[1] - sizes[0]
            memory, cost = ((found[1][column] - found[0][column]) / more for column in (0, 1))
            print(f"{make.__name__}: {memory:.1f} bytes and {1e6 * cost:.0f} us of the processor an image", flush=True)


if __name__ == "__main__":
    main()
