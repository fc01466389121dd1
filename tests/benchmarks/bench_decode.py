"""Decoding and resizing of photographs with the compiled resize and simplejpeg against Pillow alone: pixels and time.

    python tests/benchmarks/bench_decode.py [--each 20] [--rounds 5] [--pixels-only]    # BOTTLENECK_ASSETS

Times are processor-milliseconds of one thread an image: of each image the best of the rounds, in which all take turns,
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

from features.pixels import jpeg, resizing
from features.pixels.decode import decode_image, decode_upright
from features.recipe import PixelRule

FOLDERS = ("cats_and_dogs_filtered", "flowers17")
SIZES, RESIZES, FITS = (160, 224, 260), ("antialias", "bicubic"), ("stretch", "crop", "pad", "crop:288")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="take every so many-th photograph")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pixels-only", action="store_true", help="measure no time")
    options = parser.parse_args()
    if EXTENSION() is None or DECODER() is None:
        sys.exit("install the project where a C compiler is, with its extra jpeg")
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
