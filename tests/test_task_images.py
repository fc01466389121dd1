"""The real images of the benchmark of tasks: composition inside a split, and a border that does not tell the angle."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

sys.path.append(str(ROOT / "tests" / "benchmarks"))
from bench_tasks import border_r2, compose, photographs, split_photographs, turn

from features.sources.scan import scan

pytestmark = pytest.mark.slow  # reads real images


def test_photographs_are_split_before_grids_are_composed(assets: Path, tmp_path: Path) -> None:
    images = scan(compose(tmp_path / "grids", 100, most=5), task="multilabel", target="tags")
    assert images.target is not None
    assert len(images) == 100
    assert np.bincount(images.given_splits).tolist() == [60, 20, 20]
    assert set(images.target.values.sum(axis=1).tolist()) <= {1, 2, 3}
    by_split = split_photographs(photographs(5))
    held = [{path for _, path in found} for found in by_split.values()]
    assert not held[0] & held[1] | held[0] & held[2] | held[1] & held[2]


def test_the_border_of_a_turned_photograph_does_not_tell_the_angle(assets: Path, tmp_path: Path) -> None:
    manifest = turn(tmp_path / "turned", 170, most=85)
    assert border_r2(manifest) < 0.1
    images = scan(manifest, task="regression", target="angle")
    assert images.groups is not None
    assert len(set(images.groups)) == 170
    with Image.open(manifest.parent / images.paths[0]) as picture:
        assert picture.size == (224, 224)
