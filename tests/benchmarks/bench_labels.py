"""How long a labels file of many rows takes to read, and how much memory: ``python tests/benchmarks/bench_labels.py 1000000``.

Prints processor seconds and the growth of resident memory of reading it, of finding the decision about each image, and of
how far people agree. The file is written first, which is not measured.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.labels.agreement import agreement
from pipeline.labels.file import FIRST_LINE, HEADER, moment_text, read_labels


def write(path: Path, count: int) -> None:
    """Write decisions of three people, one in ten about an image that has one already."""
    with open(path, "w", encoding="ascii") as stream:
        stream.write(f"{FIRST_LINE}\n{HEADER}\n")
        for number in range(count):
            image = number - 7 if number % 10 == 9 else number
            digest = hashlib.sha256(b"%d" % image).hexdigest()
            utc = moment_text(1_700_000_000_000_000 + number)
            value, by = f"class {number % 17}", f"person {number % 3}"
            stream.write(f"{digest},photos/{image:08d}.jpg,label,{value},,{by},{utc},{number:032x}\n")


def peak() -> float:
    """Largest resident memory so far in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", type=int, nargs="*", default=[100_000, 1_000_000])
    for count in parser.parse_args().counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "labels.csv")
            write(path, count)
            wanted = np.frombuffer(
                b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(0, count, 10)), np.uint8
            ).reshape(-1, 32)
            before, start = peak(), time.process_time()
            labels = read_labels(path)
            read = time.process_time()
            found = labels.latest(wanted, "label")
            latest = time.process_time()
            agreed = agreement(labels)
            end = time.process_time()
            sys.stdout.write(
                f"{count:>11,} rows, {path.stat().st_size / 1e6:,.0f} MB: read {read - start:.1f} s, decisions about "
                f"{len(wanted):,} images {latest - read:.1f} s, agreement {end - latest:.1f} s of processor time; memory "
                f"+{peak() - before:,.0f} MB ({(found >= 0).sum():,} found, {agreed.images:,} judged by several)\n"
            )


if __name__ == "__main__":
    main()
