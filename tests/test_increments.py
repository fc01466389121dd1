"""Real photographs that change: only new bytes are inferred, and a run with nothing to do loads nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import NumpyNetwork, call_pipeline, extract, run_without
from PIL import Image, ImageOps

from features.store.reader import FeatureStore

pytestmark = pytest.mark.slow  # 3,000 photographs


@pytest.fixture
def photographs(assets: Path, tmp_path: Path) -> Path:
    """The 3,000 cats and dogs, as links to their files, in folders of our own."""
    source = assets / "images" / "cats_and_dogs_filtered"
    root = tmp_path / "cats_and_dogs"
    for path in source.rglob("*.jpg"):
        link = root / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return root


@pytest.mark.pain(21)
def test_one_per_cent_more_images_infer_only_those_and_a_renamed_class_none(photographs: Path, tmp_path: Path) -> None:
    network, out, options = NumpyNetwork(), tmp_path / "f.h5", {"batch_size": 32, "shard_rows": None, "workers": None}
    before = extract(photographs, out, network, **options).store
    assert (len(before), sum(network.batches)) == (3000, 3000)
    old = dict(zip(before.images.paths, before.array()[:, 0], strict=True))
    for number, path in enumerate(sorted((photographs / "train" / "cats").iterdir())[:30]):
        with Image.open(path) as image:
            ImageOps.mirror(image).save(photographs / "train" / ("cats", "dogs")[number % 2] / f"new{number}.jpg")
    after = extract(photographs, out, network, **options).store
    assert (len(after), sum(network.batches)) == (3030, 3030)
    rows = {path: row for row, path in enumerate(after.images.paths)}
    for path, values in old.items():
        np.testing.assert_array_equal(after.array()[rows[path], 0], values)

    for split in ("train", "validation"):
        (photographs / split / "cats").rename(photographs / split / "katzen")
    renamed = extract(photographs, out, network, **options).store
    assert sum(network.batches) == 3030
    assert renamed.classes == ("dogs", "katzen")
    assert {len(renamed.rows(split)) for split in ("train", "validation")} == {2030, 1000}
    for row, path in enumerate(renamed.images.paths):
        assert renamed.classes[renamed.images.labels[row]] == path.split("/")[1]
        if "new" not in path:
            np.testing.assert_array_equal(renamed.array()[row, 0], old[path.replace("katzen", "cats")])


def test_a_run_with_nothing_to_do_over_3000_photographs_loads_nothing_heavy(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.h5"
    arguments = ["extract", str(photographs), "--out", str(out), "--backbone", "mobilenetv2-0.35", "--image-size", "32"]
    arguments += ["--weights", "random"]
    first = call_pipeline(*arguments)
    assert first.returncode == 0, first.stderr
    before = out.stat()
    again = run_without({"tensorflow", "keras", "sklearn", "jax", "torch", "scipy"}, *arguments)
    assert again.returncode == 0, again.stderr
    assert "3000 rows cached, 0 inferred, file untouched" in again.stdout
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(FeatureStore.open(out)) == 3000
