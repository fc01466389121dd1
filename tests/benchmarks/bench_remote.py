"""How much longer an extraction takes from a web server with 5 ms latency than from a folder, and what it costs the processor.

    python tests/benchmarks/bench_remote.py [IMAGES]

It prints ratios. The server is a process of its own; the network is MobileNetV2 at 224 pixels with random weights; images are
those of ``BOTTLENECK_ASSETS`` (cats and dogs), else painted ones of the same size. Each way runs in a process of its own, one
after the other, three times; the median counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3

# As little work as possible: a real server would have processors of its own.
SERVE = """
import asyncio, hashlib, sys
from pathlib import Path

answers = {}
for path in Path(sys.argv[1]).rglob("*.*"):
    data = path.read_bytes()
    head = f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(data)}\\r\\nETag: {hashlib.sha1(data).hexdigest()}\\r\\n\\r\\n".encode()
    answers[f"/{path.name}"] = head, data

async def serve(reader, writer):
    while not reader.at_eof():
        try:
            request = await reader.readuntil(b"\\r\\n\\r\\n")
        except asyncio.IncompleteReadError:  # the client has gone
            break
        method, path, _ = request.split(b" ", 2)
        head, data = answers[path.decode()]
        await asyncio.sleep(0.005)
        writer.write(head if method == b"HEAD" else head + data)
        await writer.drain()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
EXTRACT = """
import json, resource, sys, time
from pathlib import Path
from features.extraction.extraction import prepare
from features.extraction.options import ExtractionOptions
options = ExtractionOptions(weights="random", allow_host="127.0.0.1", overwrite=True)
first = prepare(sys.argv[1], Path(sys.argv[2] + ".warm.h5"), options)
first.network.engine(first.network.recipes, batch_size=32)
begun, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
result = prepare(sys.argv[1], Path(sys.argv[2]), options).run()
after = resource.getrusage(resource.RUSAGE_SELF)
cost = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
print(json.dumps([time.monotonic() - begun, cost, result.inferred]))
"""


def images(folder: Path, count: int) -> Path:
    """Copy or paint some images, all in one class folder each."""
    from PIL import Image

    assets = os.environ.get("BOTTLENECK_ASSETS")
    found = sorted(Path(assets, "images", "cats_and_dogs_filtered", "train").rglob("*.jpg")) if assets else []
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if found:
            path.write_bytes(found[number * len(found) // count].read_bytes())
        else:
            Image.effect_noise((500, 374), 40 + number % 20).convert("RGB").save(path)
    return folder


def measured(source: str, out: Path) -> tuple[float, float]:
    """Seconds of wall time and of the processor."""
    command = [sys.executable, "-c", EXTRACT, source, str(out)]
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT))
    )
    wall, cost, _ = json.loads(done.stdout.splitlines()[-1])
    return wall, cost


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as name:
        folder = images(Path(name, "images"), count)
        command = [sys.executable, "-c", SERVE, str(folder)]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            manifest = Path(name, "m.csv")
            rows = [f"{address}/{path.name},{path.parent.name}\n" for path in sorted(folder.rglob("*.jpg"))]
            manifest.write_text("path,label\n" + "".join(rows))
            found: dict[str, list[tuple[float, float]]] = {"folder": [], "server": []}
            for number in range(ROUNDS):
                for way, source in (("folder", str(folder)), ("server", str(manifest))):
                    found[way].append(measured(source, Path(name, f"{way}-{number}.h5")))
                    time.sleep(0.5)
            server.kill()
        wall, cost = (
            [statistics.median(pair[column] for pair in found[way]) for way in ("folder", "server")]
            for column in (0, 1)
        )
        print(f"{count} images from a server with 5 ms latency, against a folder")
        print(f"  throughput {wall[0] / wall[1]:.2f}   processor time {cost[1] / cost[0]:.2f}")


if __name__ == "__main__":
    main()
