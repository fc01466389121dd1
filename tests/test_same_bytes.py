"""The same images give the same file, byte for byte, whenever and wherever it is written."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import extract, listing, paint_folder

from features.store.reader import FeatureStore, parts_folder

OPTIONS = {"views": 2, "augment": "flip", "max_unreadable": 0.5}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = paint_folder(tmp_path / "images", {"cat": 30, "dog": 33})
    (root / "cat" / "bad.png").write_bytes(b"no image")
    return root


def wait_for_another_second() -> None:
    """HDF5 counts time in seconds."""
    time.sleep(1.01 - time.time() % 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "sharded"])
def test_two_extractions_of_one_folder_are_the_same_bytes(source: Path, tmp_path: Path, layout: str) -> None:
    outs = [tmp_path / "first" / "a.h5", tmp_path / "second" / "other name.h5"]
    for out in outs:
        extract(source, out, layout=layout, **OPTIONS)
        wait_for_another_second()
    first, second = outs
    assert first.read_bytes() == second.read_bytes()
    shards = [name for name in listing(parts_folder(first)) if name.endswith(".h5")]
    assert (len(shards) > 0) == (layout == "sharded")
    for name in shards:
        assert (parts_folder(first) / name).read_bytes() == (parts_folder(second) / name).read_bytes()
    extract(source, second, rehash=True, layout=layout, **OPTIONS)  # nothing to do
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_images_that_were_copied_elsewhere_differ_in_their_times_only(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "elsewhere" / "images", copy_function=shutil.copyfile)
    first, second = (
        extract(root, out, **OPTIONS).store
        for root, out in [(source, tmp_path / "a.h5"), (tmp_path / "elsewhere" / "images", tmp_path / "b.h5")]
    )
    assert first.data_digest == second.data_digest
    for table in ("images", "quarantine"):
        mine, theirs = vars(getattr(first, table)), vars(getattr(second, table))
        different = {
            name
            for name, value in mine.items()
            if not (np.array_equal(value, theirs[name]) if isinstance(value, np.ndarray) else value == theirs[name])
        }
        assert different == {"mtimes_ns"}
    np.testing.assert_array_equal(first.array("last.avg")[:], second.array("last.avg")[:])
    assert FeatureStore.open(first.path).classes == second.classes
