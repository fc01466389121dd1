"""Decoding and resizing of photographs with the compiled resize against Pillow alone: the same pixels, and the time.

    python tests/benchmarks/bench_decode.py [--each 20] [--rounds 5] [--pixels-only]    # BOTTLENECK_ASSETS

Times are processor-milliseconds of one thread an image: of each image the best of the rounds, in which both take turns,
then the mean over the images. All pixels are compared, at every size and by every rule; one that differs ends the script.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from features.pixels import resizing
from features.pixels.decode import decode_image, decode_upright
from features.recipe import PixelRule

FOLDERS = ("cats_and_dogs_filtered", "flowers17")
SIZES, RESIZES, FITS = (160, 224, 260), ("antialias", "bicubic"), ("stretch", "crop", "pad", "crop:288")
COMPILED = resizing.extension


def use(compiled: bool) -> None:
    """Take the compiled resize from now on, or Pillow's."""
    resizing.extension = COMPILED if compiled else lambda: None  # type: ignore[assignment]


def seconds(files: Sequence[bytes], rule: PixelRule, rounds: int) -> tuple[float, float]:
    """Return the seconds of an image with Pillow's resize and with the compiled one."""
    best = np.full((2, len(files)), np.inf)
    for index, data in enumerate(files):
        for _, way in itertools.product(range(rounds), (0, 1)):
            use(bool(way))
            started = time.thread_time()
            decode_image(data, rule)
            best[way, index] = min(best[way, index], time.thread_time() - started)
    pillow, compiled = best.mean(axis=1)
    return float(pillow), float(compiled)


def compare(files: Sequence[bytes]) -> int:
    """Compare all pixels of both ways at all sizes and by all rules; return the number of pictures."""
    count = 0
    for data in files:
        image = decode_upright(data, PixelRule(224, 224)).image
        for size, resize, fit in itertools.product(SIZES, RESIZES, FITS):
            rule = PixelRule(size, size, resize, fit)
            use(True)
            pixels = resizing.resize_image(image, rule)
            use(False)
            if not np.array_equal(pixels, resizing.resize_image(image, rule)):
                sys.exit(f"other pixels: {image.size}, {rule}")
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="take every so many-th photograph")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pixels-only", action="store_true", help="measure no time")
    options = parser.parse_args()
    if COMPILED() is None:
        sys.exit("the compiled resize was not built: install the project where a C compiler is")
    for folder in FOLDERS:
        paths = sorted(Path(os.environ["BOTTLENECK_ASSETS"], "images", folder).rglob("*.jpg"))[:: options.each]
        files = [path.read_bytes() for path in paths]
        print(f"{folder}: {compare(files)} pictures of {len(files)} photographs are equal")
        if options.pixels_only:
            continue
        print("| size | rule | Pillow, ms | compiled resize, ms | share |\n| --- | --- | --- | --- | --- |")
        for size, resize in itertools.product(SIZES[:2], RESIZES):
            pillow, compiled = seconds(files, PixelRule(size, size, resize), options.rounds)
            print(f"| {size} | `{resize}` | {pillow * 1e3:.2f} | {compiled * 1e3:.2f} | {compiled / pillow:.2f} |")


if __name__ == "__main__":
    main()
