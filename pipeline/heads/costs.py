"""The memory that training a head needs in addition to its rows, and the memory that is available."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, HeadError
from pipeline.heads.head import Head

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
