"""What training a head costs: memory in addition to its rows, against the memory that is available, and time."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, HeadError
from features.progress import duration
from pipeline.heads.head import Head

LONG = 60  # seconds from which a head is announced before it starts
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_memory(text: str) -> int:
    """Parse a size in bytes: ``"2GB"`` gives 2000000000, ``"512MiB"`` gives 536870912.

    Raises
    ------
    ConfigurationError
        If the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None or float(match[1]) == 0:
        raise ConfigurationError(f"--memory: received {text!r}, expected a size such as 2GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def usable_memory() -> int:
    """Half of the memory that is available now, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return free // 2


def shown(size: float) -> str:
    """Format a number of bytes for a person.

    Examples
    --------
    >>> shown(5_036_000_000), shown(3e5)
    ('5.0 GB', '0.3 MB')
    """
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_bytes(head: Head, rows: int, columns: int, memory: int, views: int = 1) -> int:
    """Return the bytes that fitting a head allocates (see `pipeline.heads.head.Head.fit_bytes`) if they are allowed.

    Raises
    ------
    HeadError
        If they exceed ``memory``; the message gives both figures.
    """
    need = head.fit_bytes(rows, columns, views)
    if need > memory:
        raise HeadError(
            f"head {head.name!r} needs about {shown(need)} of memory for {rows * views} x {columns} features, but only "
            f"{shown(memory)} are allowed; give more (--memory), or use another solver or pooling, or fewer columns (pca)"
        )
    return need


def solver_bytes(name: str, params: Mapping[str, Any], rows: int, columns: int, outputs: int) -> int:
    """Bytes that the solver of a scikit-learn class allocates, by class name; a generous guess for unknown classes."""
    values = rows * columns
    square = columns**2
    if name == "LogisticRegression":
        solver = params.get("solver", "lbfgs")
        if solver == "newton-cholesky":  # a Hessian over all coefficients, and its factor
            return 2 * 8 * (outputs * (columns + 1)) ** 2
        if solver in ("liblinear", "sag", "saga"):
            return (24 if solver == "liblinear" else 8) * values
        return 8 * (24 * outputs * columns + 4 * rows * outputs)
    if name in ("RidgeClassifier", "RidgeClassifierCV"):
        return 4 * values + 2 * 8 * min(rows, columns) ** 2
    if name == "LinearSVC":
        return 24 * values  # liblinear makes a sparse copy of its own, 16 bytes per value
    if name == "LinearDiscriminantAnalysis":
        return 8 * values + 4 * 8 * square
    if name == "QuadraticDiscriminantAnalysis":
        return 8 * values + 2 * 8 * outputs * square
    if name in ("SVC", "NuSVC"):
        return 16 * values + (int(params.get("cache_size", 200)) << 20)
    if name == "KNeighborsClassifier" and params.get("algorithm") == "brute":
        return 16 << 20
    if name in ("RandomForestClassifier", "ExtraTreesClassifier"):
        return 4 * values + 128 * rows * int(params.get("n_estimators", 100))
    if name == "HistGradientBoostingClassifier":
        return 9 * values + 64 * rows * outputs
    if name in ("SGDClassifier", "Perceptron", "PassiveAggressiveClassifier"):
        return 8 * 8 * outputs * columns
    if name in ("GaussianProcessClassifier", "LabelPropagation", "LabelSpreading"):
        return 8 * values + 4 * 8 * rows**2 * outputs
    return 24 * values


# Seconds of one fit on one core, measured (tests/benchmarks/bench_costs.py) on standardised features of 320 and 1,280 columns, 400 and 1,600 rows, and 2 and
# 10 classes, by scikit-learn class, from rows n, columns d, outputs k (1 for two classes) and the arguments of the class.
_SECONDS: dict[str, Callable[[float, float, float, Mapping[str, Any]], float]] = {
    "LogisticRegression": lambda n, d, k, _: 3e-9 * n * d * (k + 3),
    "RidgeClassifier": lambda n, d, k, _: 5e-11 * n * d * min(n, d),
    "LinearSVC": lambda n, d, k, _: 5e-8 * n * d * k,
    "SGDClassifier": lambda n, d, k, _: 2.5e-7 * n * d * k,  # 13 to 180 epochs, by the penalty
    "LinearDiscriminantAnalysis": lambda n, d, k, _: 4e-10 * d**3 + 4e-11 * n * d**2,
    "KNeighborsClassifier": lambda n, d, k, _: 4e-11 * n**2 * d,  # predicting a fold, as fitting is nothing
    "SVC": lambda n, d, k, _: 6e-10 * n**2 * d,
    "GradientBoostingClassifier": lambda n, d, k, given: 1.7e-7 * n * d * k * given.get("n_estimators", 100),
    "HistGradientBoostingClassifier": lambda n, d, k, given: 1e-7 * n * d * k * given.get("max_iter", 100),
    **dict.fromkeys(
        ("RandomForestClassifier", "ExtraTreesClassifier"),
        lambda n, d, k, given: 6e-8 * n * d**0.5 * math.log2(n + 1) * given.get("n_estimators", 100),
    ),
}


def solver_seconds(name: str, params: Mapping[str, Any], rows: int, columns: int, outputs: int) -> float:
    """Estimate the seconds that one fit of a scikit-learn class takes, by class name; 0 for classes without an estimate."""
    return _SECONDS[name](rows, columns, outputs, params) if name in _SECONDS else 0.0


def announcement(head: Head, rows: int, columns: int, views: int = 1, folds: int = 0) -> str:
    """Say before it starts that a head takes long, and what would be cheaper; empty if it takes less than `LONG` seconds."""

    def seconds(one: Head) -> float:
        return one.fit_seconds(rows, columns, views) * (1 + max(0, folds - 1))

    whole = seconds(head)
    if whole < LONG:
        return ""
    offers = []
    for params in head.cheaper(columns):
        other = head.fresh()
        other.parameters = other.parameters.model_copy(update=params)
        if seconds(other) < whole / 2:
            named = ", ".join(f"{name}={value:g}" for name, value in params.items())
            offers.append(f"{named} takes about {duration(seconds(other))}")
    cheaper = f"; cheaper: {', '.join(offers)}" if offers else ""
    return (
        f"{head.name} takes about {duration(whole)} on one core for {rows * views:,} x {columns:,} features and "
        f"{len(head.classes)} classes{f', with {folds} folds' if folds else ''}{cheaper}"
    )
