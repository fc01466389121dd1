"""What several tests share: small image folders, a numpy stand-in for the network, whole processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from features.recipe import PixelRule, Recipe

ROOT = Path(__file__).resolve().parent.parent


def recipe(layer: str = "last", pooling: str = "avg", size: int = 8, **changes: object) -> Recipe:
    values = {"backbone": "numpy", "weights": "0" * 64, "preprocessing": "none", **changes}
    return Recipe(layer=layer, pooling=pooling, pixels=PixelRule(size, size), **values)  # type: ignore[arg-type]


def numpy_network(batch: np.ndarray) -> dict[str, np.ndarray]:
    """Channel means: a 'network' whose features can be worked out by hand from the pixels of each image."""
    return {"last.avg": batch.astype(np.float32).mean(axis=(1, 2))}


def paint(path: Path, colour: Sequence[int], size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)
    return path


def paint_folder(root: Path, classes: Mapping[str, int], start: int = 0) -> Path:
    """Class folders of one-coloured PNGs, every image of another colour."""
    number = start
    for name, count in classes.items():
        for index in range(count):
            paint(root / name / f"{index:04d}.png", (number % 256, number // 256 % 256, 7))
            number += 1
    return root


def listing(folder: Path) -> list[str]:
    """Every name under a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def run_pipeline(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m pipeline ...`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
