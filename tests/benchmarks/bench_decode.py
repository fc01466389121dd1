"""Decoding and resizing of photographs with the compiled resize and simplejpeg against Pillow alone: pixels and time.

    python tests/benchmarks/bench_decode.py [--each 20] [--rounds 5] [--pixels-only]    # BOTTLENECK_ASSETS

First, tiny images and a network that costs nothing: what threads, one process and two make, and what is left to this
process, which holds Python's lock. Then photographs. Times are processor-milliseconds of one thread an image: of each image the best of the rounds, in which all take turns,
then the mean over the images. All pixels are compared, at every size and by every rule; one that differs ends the script.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from features.extraction.shard import ShardSpec, infer_shard
from features.pixels import jpeg, resizing
from features.pixels.decode import decode_image, decode_upright, read_bytes
from features.pixels.processes import DecodeProcesses
from features.recipe import PixelRule, Recipe

FOLDERS = ("cats_and_dogs_filtered", "flowers17")
SIZES, RESIZES, FITS = (160, 224, 260), ("antialias", "bicubic"), ("stretch", "crop", "pad", "crop:288")
TINY = 4000  # images
WAYS = ("Pillow", "compiled resize", "and simplejpeg")
EXTENSION, DECODER = resizing.extension, jpeg.decoder


def use(way: str) -> None:
    """Decode and resize in one of the ways from now on."""
    resizing.extension = EXTENSION if way != WAYS[0] else lambda: None  # type: ignore[assignment]
    jpeg.decoder = DECODER if way == WAYS[2] else lambda: None  # type: ignore[assignment]


def milliseconds(files: Sequence[bytes], rule: PixelRule, rounds: int) -> list[float]:
    """Return the processor-milliseconds of an image, by way."""
    best = np.full((len(WAYS), len(files)), np.inf)
    for index, data in enumerate(files):
        for _, way in itertools.product(range(rounds), range(len(WAYS))):
            use(WAYS[way])
            started = time.thread_time()
            decode_image(data, rule)
            best[way, index] = min(best[way, index], time.thread_time() - started)
    return [float(mean) * 1e3 for mean in best.mean(axis=1)]


def compare(files: Sequence[bytes]) -> int:
    """Compare all pixels, at their own size, and at all sizes by all rules; return the number of resized pictures."""
    count = 0
    for data in files:
        use(WAYS[0])
        image = decode_upright(data, PixelRule(224, 224)).image
        use(WAYS[2])
        if decode_upright(data, PixelRule(224, 224)).image.tobytes() != image.tobytes():
            sys.exit(f"other pixels decoded: {image.size}")
        for size, resize, fit in itertools.product(SIZES, RESIZES, FITS):
            rule = PixelRule(size, size, resize, fit)
            use(WAYS[1])
            pixels = resizing.resize_image(image, rule)
            use(WAYS[0])
            if not np.array_equal(pixels, resizing.resize_image(image, rule)):
                sys.exit(f"other pixels: {image.size}, {rule}")
            count += 1
    return count


def tiny(folder: Path) -> None:
    """Print images a second, and what an image costs this process, for threads and for processes that decode."""
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(levels).save(folder / "tiny.jpg")
    recipe = Recipe("none", "0" * 64, "last", "avg", PixelRule(8, 8), "none")
    times = (0,) * TINY
    spec = ShardSpec(str(folder), ("tiny.jpg",) * TINY, times, times, (recipe,))
    print("| decoded by | images/s | processor-ms in this process |\n| --- | --- | --- |")
    for count in (0, 1, 2):
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(2))
            children = stack.enter_context(DecodeProcesses(count, spec.job.size, 1)) if count else None
            rates, spent = [], []
            for _ in range(4):  # in the first, the processes start
                wall, processor = time.perf_counter(), time.process_time()
                infer_shard(
                    spec,
                    read=lambda path: read_bytes(folder / path),
                    infer=lambda batch: {recipe.name: np.zeros((len(batch), 1), np.float32)},
                    decoders=pool,
                    batch_size=32,
                    processes=children,
                )
                rates.append(TINY / (time.perf_counter() - wall))
                spent.append((time.process_time() - processor) / TINY * 1e3)
        print(f"| {f'{count} processes' if count else '2 threads'} | {max(rates):.0f} | {min(spent):.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="take every so many-th photograph")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pixels-only", action="store_true", help="measure no time")
    options = parser.parse_args()
    if EXTENSION() is None or DECODER() is None:
        sys.exit("install the project where a C compiler is, with its extra jpeg")
    if not options.pixels_only:
        with tempfile.TemporaryDirectory() as place:
            tiny(Path(place))
    for folder in FOLDERS:
        paths = sorted(Path(os.environ["BOTTLENECK_ASSETS"], "images", folder).rglob("*.jpg"))[:: options.each]
        files = [path.read_bytes() for path in paths]
        print(f"{folder}: {compare(files)} pictures of {len(files)} photographs are equal")
        if options.pixels_only:
            continue
        print(f"| size | rule | {', ms | '.join(WAYS)}, ms | share |\n| --- | --- | --- | --- | --- | --- |")
        for size, resize in itertools.product(SIZES[:2], RESIZES):
            spent = milliseconds(files, PixelRule(size, size, resize), options.rounds)
            shares = " | ".join(f"{each:.2f}" for each in spent)
            print(f"| {size} | `{resize}` | {shares} | {spent[-1] / spent[0]:.2f} |")


if __name__ == "__main__":
    main()
