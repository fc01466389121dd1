"""How near the estimated times of heads are: processor seconds of fitting, search included, against `Head.fit_seconds`.

Rows are drawn around a centre for each class, as features of an average-pooled layer are; one thread. The estimates decide
which heads `train-head` announces before they start.

    python tests/benchmarks/bench_costs.py [ROWSxCOLUMNSxCLASSES ...]
"""

from __future__ import annotations

import sys
import time
import warnings

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline.heads.kinds import make_head
from pipeline.heads.prepared import prepare

SIZES = ("500x1280x2", "500x1280x10", "2000x512x5")
HEADS = (
    "logistic",
    "ridge",
    "linear-svm",
    "lda",
    "knn",
    "sgd",
    "sklearn.ensemble.RandomForestClassifier",
    "sklearn.svm.SVC",
)


def drawn(rows: int, columns: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, float32, (rows, columns), none negative, and labels, int32, (rows,)."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(classes, columns)) * 0.12
    labels = np.arange(rows, dtype=np.int32) % classes
    return np.maximum(centres[labels] + generator.normal(size=(rows, columns)), 0).astype(np.float32), labels


def main() -> None:
    """Print one line for each head and size."""
    for size in sys.argv[1:] or SIZES:
        rows, columns, classes = map(int, size.split("x"))
        prepared = prepare(*drawn(rows, columns, classes), pool="none")
        for name in HEADS:
            head = make_head(name, classes=[str(k) for k in range(classes)])
            head.warm_up()
            started = time.process_time()
            with warnings.catch_warnings(), threadpool_limits(1):
                warnings.simplefilter("ignore")  # about convergence
                head.fit_prepared(prepared)
            taken, said = time.process_time() - started, head.fit_seconds(rows, columns)
            print(f"{size:14} {name:40} {taken:8.1f} s, estimated {said:8.1f} s", flush=True)


if __name__ == "__main__":
    main()
