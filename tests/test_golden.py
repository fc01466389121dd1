"""A file that the first release wrote opens for ever, with the values it was given."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
from faults import differences

from features.extraction.extraction import pack_store
from features.recipe import PixelRule, Recipe
from features.store.reader import FeatureStore, parts_folder

FOLDER = Path(__file__).resolve().parent / "golden"
STORE, SHARDED = FOLDER / "store-v1.h5", FOLDER / "sharded-v1.h5"
FINGERPRINTS = {
    "block|add": "c3139556c7aef8b927245290a68f40eb6d4d34ba95e638f80a82cbd366078a70",
    "out_relu.avg": "6a44c2bb47a63a25d388c01b3da50b228e625039410dcd239263047192d160c1",
}


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", FOLDER / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_golden_store_is_the_one_that_was_written() -> None:
    digest = hashlib.sha256(STORE.read_bytes()).hexdigest()
    assert digest == "498ea0cf0f4792cac42fc3bd246887da5a1187cacbebf66f1b2d54e35ba106bf"
    assert STORE.stat().st_size < 50_000


def test_the_golden_index_is_the_one_that_was_written() -> None:
    files = [SHARDED, *sorted(parts_folder(SHARDED).iterdir())]
    assert [path.name for path in files] == ["sharded-v1.h5", f"{'0' * 20}.h5", f"{'f' * 20}.h5"]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files]
    assert digests == ["ec85b13a1d130642", "12f1ac76e2f7bee0", "78c9d23e2c4d01fd"]


@pytest.mark.slow
def test_the_golden_index_has_the_values_of_the_golden_store(golden: ModuleType, tmp_path: Path) -> None:
    index, store = FeatureStore.open(SHARDED), FeatureStore.open(STORE)
    assert index.kind == "index"
    for name, values in golden.features().items():
        np.testing.assert_array_equal(index.array(name)[:], values)
        np.testing.assert_array_equal(index.load("train", name=name, views=1)[0], values[:23:3, 1])
    assert index.data_digest == store.data_digest
    assert index.verify() == 22 + 3 + 2 * 11  # tables, shards, and what each shard holds
    pack_store(SHARDED, tmp_path / "packed.h5")
    assert differences(STORE, tmp_path / "packed.h5") == []


def test_the_golden_store_opens_with_its_values(golden: ModuleType) -> None:
    store = FeatureStore.open(STORE)
    assert store.verify() == 22
    assert store.names == ("block|add", "out_relu.avg")
    for name, values in golden.features().items():
        np.testing.assert_array_equal(store.array(name), values)
        assert store.array(name).dtype == values.dtype
        np.testing.assert_array_equal(store.load("train", name=name, views=1)[0], values[:23:3, 1])
    assert store.array("out_relu.avg")[3, 1, 5] == 103.625
    assert store.array("block|add")[8, 0, 1, 0, 2] == 10
    assert (store.source, store.split_rule) == ("images/ä", "hash:0.8,0.1,0.1@7")
    assert store.provenance == {"engine": "golden", "batch_size": 32, "software": {"numpy": "2.0"}}
    assert store.classes == ("cat", "dög")
    assert store.data_digest == "90540f547eb2927508b5d810d560f9188644cdd4994a3bddf26e5d1f9f7cde7e"


def test_the_golden_tables(golden: ModuleType) -> None:
    store = FeatureStore.open(STORE)
    for name, expected in golden.table().items():
        if isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(getattr(store.images, name), expected)
        else:
            assert getattr(store.images, name) == expected
    assert store.images.paths[0].encode("utf-8", "surrogateescape") == b"cat/\xff\xfe.png"
    assert store.rows("unlabelled").tolist() == [23]
    assert store.rows("validation").tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    assert store.images.labels.tolist() == [0] * 12 + [1] * 11 + [-1]
    assert store.quarantine.paths == ("cat/bad.png", "dög/empty.jpg")
    assert store.quarantine.reasons == ("truncated", "empty")
    np.testing.assert_array_equal(store.quarantine.sha256, golden.QUARANTINE["sha256"])
    assert store.quarantine.sizes.tolist() == [5000, 0]


def test_the_golden_recipes_and_their_fingerprints() -> None:
    recipes = FeatureStore.open(STORE).recipes
    assert {name: recipe.fingerprint for name, recipe in recipes.items()} == FINGERPRINTS
    pixels = PixelRule(96, 128, resize="keras", fit="crop")
    expected = Recipe("mobilenetv2", "0" * 64, "block/add", "none", pixels, "mobilenet_v2", seed=7, dtype="float16")
    assert recipes["block|add"] == expected
    with h5py.File(STORE, "r") as file:
        written = json.loads(file["features/out_relu.avg"].attrs["recipe"])
        assert (written["version"], written["height"], written["width"], written["fit"]) == (1, 96, 128, "crop")
        assert dict(file.attrs)["format"] == b"bottleneck-features"
        assert file.attrs["format_version"] == 1


@pytest.mark.slow
def test_this_release_writes_the_same(golden: ModuleType, tmp_path: Path) -> None:
    golden.main(tmp_path)
    assert differences(STORE, tmp_path / "store-v1.h5") == []
    assert differences(SHARDED, tmp_path / SHARDED.name) == []
