"""How soon the page shows what a decision has changed: from the decision on disk to the head's new figures.

    python tests/benchmarks/bench_review.py [--rows 3000] [--columns 1280] [--batches 5]

Made features: 2 classes that overlap, a tenth of the labels wrong. Prints one line for each batch of 20 decisions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reviewing import TRAIN, VALIDATION, two_classes, written_store

from pipeline.review.session import Query, Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--columns", type=int, default=1280)
    parser.add_argument("--batches", type=int, default=5)
    asked = parser.parse_args()
    generator = np.random.default_rng(0)
    truth, X = two_classes(asked.rows, columns=asked.columns)
    X[:, 0] -= 6 * truth
    X[:, 1:60] += 0.15 * truth[:, None]
    splits = np.where(np.arange(asked.rows) % 3, TRAIN, VALIDATION)
    labels = np.where(generator.random(asked.rows) < 0.1, 1 - truth, truth)
    digests = generator.integers(0, 256, (asked.rows, 32), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        store = written_store(
            Path(folder, "f.h5"),
            labels,
            splits,
            X,
            names=("cat", "dog"),
            source="",
            paths=tuple(f"{row}.jpg" for row in range(asked.rows)),
            sha256=digests,
        )
        session = Session(store, Path(folder, "labels.csv"), by="benchmark")
        started = time.monotonic()
        session.learner.start()
        while not session.learner.summary()["ranked"]:
            time.sleep(0.02)
        print(f"{asked.rows:,} rows x {asked.columns:,}: first suspicion after {time.monotonic() - started:.2f} s")
        seconds: list[float] = []
        made = 0
        for _ in range(asked.batches):
            rows = session.order(Query(state="open"))["rows"][:20]
            for row in rows:
                session.decide([row], ("cat", "dog")[truth[row]])
            saved = time.monotonic()
            made += len(rows)
            while (said := session.learner.summary())["curve"][-1]["decisions"] < made or said["status"] != "ready":
                time.sleep(0.01)
            seconds.append(time.monotonic() - saved)
            said = session.learner.summary()["corrected"]
            print(
                f"20 decisions, new figures {seconds[-1]:.2f} s after the last was saved; validation {said['after']:.3f}"
            )
        print(f"median {statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s; asked: 2 s")
        session.learner.close()


if __name__ == "__main__":
    main()
