"""The scikit-learn transformer: values by hand, each image inferred once, cross-validation over processes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import STRESS, NumpyNetwork, extract, listing, paint, paint_folder, recipe, run_pipeline
from joblib.externals.loky import get_reusable_executor
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import validate_data

from features.errors import ConfigurationError, LockedError, UnreadableImageError
from features.extraction.extraction import pack_store
from features.extraction.growing import GrowingStore
from features.files import locked
from features.store.reader import FeatureStore
from features.transformer import SOURCE, FeatureExtractor
from pipeline import BottleneckClassifier

pytestmark = pytest.mark.slow  # whole extractions, scikit-learn


class CountingExtractor(FeatureExtractor):
    """Channel means of 8 x 8 pixels; ``network`` counts."""

    network = NumpyNetwork()

    def _network(self):
        return self.network


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> NumpyNetwork:
    fresh = NumpyNetwork()
    monkeypatch.setattr(CountingExtractor, "network", fresh)
    return fresh


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """12 reddish and 12 greenish images, in an order of their own."""
    made = []
    for number in range(24):
        colour = (200 + number, 20, 7) if number % 2 else (20, 200 + number, 7)
        made.append(str(paint(tmp_path / "images" / f"{(number * 7) % 24:02d}.png", colour)))
    return made


def means(paths: list[str]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path), np.float32).mean(axis=(0, 1)) for path in paths])


def files_under(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, modification time and bytes of every file."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
    return found


LABELS = np.arange(24) % 2


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_store", [False, True])
def test_rows_are_those_of_the_images_in_their_order(paths, tmp_path, network, with_store: bool) -> None:
    extractor = CountingExtractor(store=tmp_path / "cache.h5" if with_store else None, batch_size=5)
    X = extractor.fit_transform(paths)
    assert X.dtype == np.float32
    np.testing.assert_allclose(X, means(paths), rtol=1e-6)
    again = paths[::-2] + paths[:3] + paths[:3]
    np.testing.assert_allclose(extractor.transform(again), means(again), rtol=1e-6)
    assert sum(network.batches) == (24 if with_store else 24 + len(set(again)))


def test_the_store_grows_by_what_it_lacks(paths, tmp_path, network) -> None:
    cache = tmp_path / "cache.h5"
    CountingExtractor(store=cache).transform(paths[:10])
    assert network.batches == [10]
    extractor = CountingExtractor(store=cache)
    np.testing.assert_allclose(extractor.transform(paths), means(paths), rtol=1e-6)
    assert network.batches == [10, 14]
    before = cache.stat().st_mtime_ns
    CountingExtractor(store=cache).transform(paths[5:])
    assert network.batches == [10, 14]
    assert cache.stat().st_mtime_ns == before
    store = FeatureStore.open(cache)
    assert (len(store), store.source, store.images.paths) == (24, SOURCE, tuple(paths))
    assert store.verify() > 0
    shards = [f"cache.h5.parts/{name}.h5" for name in store.shards.names]
    others = ["cache.h5", "cache.h5.parts", "cache.h5.parts/manifest.jsonl", "images"]
    assert len(shards) == 2
    assert listing(tmp_path) == sorted([*others, *shards, *(f"images/{Path(path).name}" for path in paths)])


def test_moved_and_copied_files_are_found_by_their_content(paths, tmp_path, network) -> None:
    extractor = CountingExtractor(store=tmp_path / "cache.h5")
    expected = extractor.transform(paths)
    moved = [str(Path(path).rename(Path(path).with_suffix(".moved"))) for path in paths]
    np.testing.assert_array_equal(extractor.transform(moved), expected)
    assert sum(network.batches) == 24


def test_a_file_with_other_content_is_computed_again(paths, tmp_path, network) -> None:
    extractor = CountingExtractor(store=tmp_path / "cache.h5")
    extractor.transform(paths)
    paint(Path(paths[3]), (1, 2, 3), size=(9, 9))
    np.testing.assert_allclose(extractor.transform(paths), means(paths), rtol=1e-6)
    assert network.batches[-1] == 1


def test_unchanged_files_are_not_read_again(paths, tmp_path, network, monkeypatch) -> None:
    extractor = CountingExtractor(store=tmp_path / "cache.h5")
    expected = extractor.transform(paths)

    def read(path: str) -> bytes:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("features.transformer.read_bytes", read)
    np.testing.assert_array_equal(extractor.transform(paths), expected)


def exchange(first: str, second: str) -> None:
    """Exchange two files and give both one time."""
    before = Path(first).read_bytes()
    Path(first).write_bytes(Path(second).read_bytes())
    Path(second).write_bytes(before)
    for path in (first, second):
        os.utime(path, ns=(0, 0))


def test_files_of_equal_size_and_time_that_change_places(tmp_path, network, monkeypatch) -> None:
    paths = [str(paint(tmp_path / f"{number}.bmp", (9, 9, 40 * number))) for number in range(4)]
    for path in paths:
        os.utime(path, ns=(0, 0))
    cache = tmp_path / "cache.h5"
    before = CountingExtractor(store=cache).transform(paths)
    exchange(paths[0], paths[3])
    trusting = CountingExtractor(store=cache, trust_times=True).transform(paths)
    np.testing.assert_array_equal(trusting, before)  # as asked for
    np.testing.assert_allclose(CountingExtractor(store=cache).transform(paths), means(paths), rtol=1e-6)
    assert sum(network.batches) == 4
    read = []
    monkeypatch.setattr("features.transformer.read_bytes", lambda path: read.append(path) or Path(path).read_bytes())
    CountingExtractor(store=cache).transform(paths[:2])
    assert read == []
    np.testing.assert_allclose(CountingExtractor(store=cache, rehash=True).transform(paths), means(paths), rtol=1e-6)
    assert sorted(read) == paths
    with pytest.raises(ConfigurationError, match="give one of them"):
        FeatureExtractor(rehash=True, trust_times=True).fit(paths)


def test_pixels_are_inputs_too(tmp_path, network) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    pixels[4] = pixels[1]
    extractor = CountingExtractor(store=tmp_path / "cache.h5")
    for _ in range(2):
        np.testing.assert_allclose(extractor.transform(pixels), pixels.mean(axis=(1, 2)), rtol=1e-5)
    assert network.batches == [6]
    grey = extractor.transform(pixels[..., 0])
    np.testing.assert_allclose(grey, np.repeat(pixels[..., 0].mean(axis=(1, 2))[:, None], 3, axis=1), rtol=1e-5)


def test_a_tensor_is_flattened(paths, network) -> None:
    spatial = NumpyNetwork([recipe("map", "none")])
    spatial.row_bytes = 4 * 8 * 8 * 3
    spatial.engine = lambda recipes, batch_size, device: lambda batch: {"map": batch.astype(np.float32)}
    extractor = CountingExtractor()
    extractor.network = spatial
    X = extractor.transform(paths[:2])
    np.testing.assert_array_equal(X[1], np.asarray(Image.open(paths[1]), np.float32).reshape(-1))
    assert extractor.get_feature_names_out()[[0, -1]].tolist() == ["map_0", "map_191"]


def test_no_images_are_no_rows(network, tmp_path) -> None:
    assert CountingExtractor(store=tmp_path / "cache.h5").fit_transform([]).shape == (0, 3)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_store", [False, True])
def test_an_unreadable_image_is_named_and_the_others_are_kept(paths, tmp_path, network, with_store: bool) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(paths[0]).read_bytes()[:40])
    extractor = CountingExtractor(store=tmp_path / "cache.h5" if with_store else None)
    with pytest.raises(UnreadableImageError, match=r"1 of 4 images cannot be read: .*broken\.png \(") as caught:
        extractor.transform([*paths[:2], str(broken), paths[2]])
    assert "paths[0]" not in str(caught.value)
    if with_store:
        assert len(FeatureStore.open(tmp_path / "cache.h5")) == 3
        extractor.transform(paths[:3])
        assert network.batches == [3]


def test_a_missing_file_is_named_before_anything_is_computed(paths, tmp_path, network) -> None:
    with pytest.raises(UnreadableImageError, match=r"2 of 26 .*gone1\.png.*gone2\.png"):
        CountingExtractor().transform([*paths, tmp_path / "gone1.png", tmp_path / "gone2.png"])
    assert network.batches == []


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ("folder", "received 'folder', expected a list of image paths"),
        (None, "expected a list"),
        (np.zeros((2, 3)), r"X\[0\]: received float64 \(3,\)"),
        (np.zeros((2, 8, 8, 3)), r"X\[0\]: received float64 \(8, 8, 3\), expected .* uint8"),
        (["a.png", Image.new("RGB", (8, 8))], r"X\[1\]: received <PIL.*of a PIL image give np\.asarray"),
        (["a.png", 3], r"X\[1\]: received 3"),
    ],
)
def test_what_is_no_image_is_refused(X, message: str, network) -> None:
    if isinstance(X, list):
        X = X[::-1]
        message = message.replace("1", "0")
    with pytest.raises(ConfigurationError, match=message):
        CountingExtractor().fit(X)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ("photos", r"X: received 'photos', expected a list of image paths"),
        ((path for path in ("a.png", "b.png")), r"X: received '<generator.*of a generator list\(X\)"),
        (np.zeros((8, 9, 3), np.uint8), r"X: received uint8 \(8, 9, 3\), which looks like one image.*give \[X\]"),
    ],
)
def test_what_is_no_list_of_images_is_refused_by_the_classifier(X, message: str, network) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BottleneckClassifier(CountingExtractor(), "knn").fit(X, ["cat"] * 3 + ["dog"] * 3)
    assert network.batches == []


def test_a_classifier_that_is_not_fitted_says_so(paths) -> None:
    with pytest.raises(NotFittedError, match="BottleneckClassifier"):
        BottleneckClassifier().predict(paths)


def test_a_file_of_another_recipe_is_refused_and_a_folder_holds_both(paths, tmp_path, network) -> None:
    CountingExtractor(store=tmp_path / "cache.h5").transform(paths)
    CountingExtractor(store=tmp_path / "caches").transform(paths)
    CountingExtractor.network = NumpyNetwork([recipe("corner", "none")])
    with pytest.raises(ConfigurationError, match=r"another recipe \(layer is last, not corner; .*or a folder"):
        CountingExtractor(store=tmp_path / "cache.h5").transform(paths)
    X = CountingExtractor(store=tmp_path / "caches").transform(paths)
    np.testing.assert_array_equal(X, means(paths))
    assert len(list((tmp_path / "caches").glob("*.h5"))) == 2
    assert len(list((tmp_path / "caches").iterdir())) == 4  # each with the folder of its shards


def test_a_store_that_an_extraction_made_is_read_and_never_changed(tmp_path, network, caplog) -> None:
    source = paint_folder(tmp_path / "images", {"a": 5, "b": 5})
    store = extract(source, tmp_path / "features.h5").store
    before = (tmp_path / "features.h5").read_bytes()
    inside = [str(source / path) for path in reversed(store.images.paths)]
    extractor = CountingExtractor(store=tmp_path / "features.h5")
    np.testing.assert_allclose(extractor.transform(inside), means(inside), rtol=1e-6)
    assert network.batches == []
    more = [*inside, str(paint(tmp_path / "new.png", (9, 9, 9)))]
    np.testing.assert_allclose(extractor.transform(more), means(more), rtol=1e-6)
    assert network.batches == [1]
    assert "lacks 1 of these images" in caplog.text
    assert (tmp_path / "features.h5").read_bytes() == before


def test_a_kill_while_it_is_written_leaves_the_store_as_it_was(paths, tmp_path, network, monkeypatch) -> None:
    extractor = CountingExtractor(store=tmp_path / "cache.h5")
    extractor.transform(paths[:4])
    before = {name: data for name, (*_, data) in files_under(tmp_path).items()}
    monkeypatch.setattr(
        "features.store.writer.StoreWriter.finish", lambda self, **tables: (_ for _ in ()).throw(OSError(5))
    )
    with pytest.raises(OSError, match="could not be written"):
        extractor.transform(paths)
    assert {name: data for name, (*_, data) in files_under(tmp_path).items()} == before


def test_what_was_computed_before_a_failure_is_kept(paths, tmp_path, network, monkeypatch) -> None:
    monkeypatch.setattr("features.transformer.SHARD_SECONDS", -1.0)  # a shard is one batch
    network.fail_after = 2  # Ctrl-C in the third batch
    extractor = CountingExtractor(store=tmp_path / "cache.h5", batch_size=5)
    with pytest.raises(KeyboardInterrupt):
        extractor.transform(paths)
    assert len(FeatureStore.open(tmp_path / "cache.h5")) == 10
    network.fail_after, before = None, sum(network.batches)
    np.testing.assert_allclose(extractor.transform(paths), means(paths), rtol=1e-6)
    assert sum(network.batches) - before == 14


# --- growing ----------------------------------------------------------------------------------------------


class WideNetwork(NumpyNetwork):
    """16 KiB of features an image: channel means, and zeros."""

    row_bytes = 4 * 4096

    def engine(self, recipes, *, batch_size, device):
        infer = super().engine(recipes, batch_size=batch_size, device=device)
        return lambda pixels: {"last.avg": np.pad(infer(pixels)["last.avg"], ((0, 0), (0, 4093)))}


def test_appending_writes_what_is_new_and_touches_no_shard(paths, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(CountingExtractor, "network", WideNetwork())
    pixels = np.random.default_rng(1).integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)
    written = []
    for already in (8, 400):
        extractor = CountingExtractor(store=tmp_path / f"{already}.h5", batch_size=100)
        extractor.transform(pixels[:already])
        before = files_under(tmp_path)
        features = extractor.transform(paths[:4])
        after = files_under(tmp_path)
        np.testing.assert_allclose(features[:, :3], means(paths[:4]), rtol=1e-6)
        assert not features[:, 3:].any()
        assert {name for name in before if after[name] != before[name]} == {
            f"{already}.h5", f"{already}.h5.parts/manifest.jsonl"
        }  # fmt: skip
        assert len(after) == len(before) + 1
        written.append(sum(len(data) for name, (*_, data) in after.items() if before.get(name) != after[name]))
        np.testing.assert_array_equal(extractor.transform(paths[:4]), features)
        np.testing.assert_allclose(
            extractor.transform(pixels[:already])[:, :3], pixels[:already].mean(axis=(1, 2)), rtol=1e-5
        )
    small, large = written
    assert 4 * WideNetwork.row_bytes < small < 2 * 4 * WideNetwork.row_bytes
    assert large - small < 200 * (400 - 8)  # of a row that was there, its line in the index: 1 % of it


def test_many_small_appends_leave_few_shards(paths, tmp_path, network, monkeypatch) -> None:
    monkeypatch.setattr("features.extraction.growing.SMALL_SHARDS", 3)
    cache = tmp_path / "cache.h5"
    extractor = CountingExtractor(store=cache)
    extractor.transform(paths[:1])
    early = GrowingStore(cache, recipe(), SOURCE)
    opened = FeatureStore.open(cache)
    for number in range(1, 24):
        if number == 2:
            opened = FeatureStore.open(cache)
        extractor.transform(paths[number : number + 1])
        store = FeatureStore.open(cache)
        assert (len(store), len(store.shards.names) <= 3) == (number + 1, True)
        assert len(list((tmp_path / "cache.h5.parts").glob("*.h5"))) <= 3 + 4  # and those of the state before
        if number == 3:  # the shards that this append has merged are there for whoever has the store open
            np.testing.assert_allclose(opened.array()[:, 0], means(paths[:2]), rtol=1e-6)
    assert network.batches == [1] * 24
    assert store.images.paths == tuple(paths)
    np.testing.assert_allclose(extractor.transform(paths), means(paths), rtol=1e-6)
    assert store.verify() > 0
    # The only shard of the store that was read first has long been removed; the store is read again.
    assert not (tmp_path / "cache.h5.parts" / f"{early.store.shards.names[0]}.h5").exists()
    features = np.zeros((2, 3), np.float32)
    early.copy({hashlib.sha256(Path(paths[0]).read_bytes()).digest(): [1]}, features)
    np.testing.assert_allclose(features[1:], means(paths[:1]), rtol=1e-6)


def test_large_shards_are_not_merged(paths, tmp_path, network, monkeypatch) -> None:
    monkeypatch.setattr("features.extraction.growing.SMALL_SHARDS", 3)
    monkeypatch.setattr("features.transformer.SHARD_BYTES", 6 * network.row_bytes)
    extractor = CountingExtractor(store=tmp_path / "cache.h5")
    extractor.transform(paths[:5])
    (large,) = FeatureStore.open(tmp_path / "cache.h5").shards.names
    for number in range(5, 24):
        extractor.transform(paths[number : number + 1])
    store = FeatureStore.open(tmp_path / "cache.h5")
    assert large in store.shards.names
    rows = np.bincount(store.places("last.avg")[:, 0, 0])
    assert (rows.max() <= 6, sum(rows <= 3) <= 3) == (True, True)
    np.testing.assert_allclose(extractor.transform(paths), means(paths), rtol=1e-6)


def test_a_packed_store_of_an_earlier_release_is_extended(paths, tmp_path, network) -> None:
    extractor = CountingExtractor(store=tmp_path / "cache.h5")
    extractor.transform(paths[:10])
    pack_store(tmp_path / "cache.h5")
    before = files_under(tmp_path)
    assert "cache.h5.parts/manifest.jsonl" not in before
    np.testing.assert_allclose(extractor.transform(paths[:10]), means(paths[:10]), rtol=1e-6)
    assert files_under(tmp_path) == before
    np.testing.assert_allclose(extractor.transform(paths), means(paths), rtol=1e-6)
    store = FeatureStore.open(tmp_path / "cache.h5")
    assert (store.kind, len(store), store.images.paths) == ("index", 24, tuple(paths))
    np.testing.assert_allclose(store.array()[:, 0], means(paths), rtol=1e-6)
    assert network.batches == [10, 14]


def test_rows_of_a_missing_shard_are_computed_again(paths, tmp_path, network) -> None:
    extractor = CountingExtractor(store=tmp_path / "cache.h5")
    extractor.transform(paths[:10])
    extractor.transform(paths)
    (tmp_path / "cache.h5.parts" / f"{FeatureStore.open(tmp_path / 'cache.h5').shards.names[0]}.h5").unlink()
    np.testing.assert_allclose(extractor.transform(paths), means(paths), rtol=1e-6)
    assert network.batches == [10, 14, 10]
    store = FeatureStore.open(tmp_path / "cache.h5")
    assert (len(store), store.verify() > 0) == (24, True)


def test_shards_of_an_interrupted_extraction_are_left_alone(paths, tmp_path, network) -> None:
    interrupted = NumpyNetwork()
    interrupted.fail_after = 1
    with pytest.raises(KeyboardInterrupt):
        extract(paint_folder(tmp_path / "folder", {"a": 30, "b": 30}), tmp_path / "cache.h5", interrupted)
    before = files_under(tmp_path)
    with pytest.raises(ConfigurationError, match=r"cache\.h5\.parts: holds images of an interrupted extraction"):
        CountingExtractor(store=tmp_path / "cache.h5").transform(paths)
    assert files_under(tmp_path) == before
    assert network.batches == []


def test_the_commands_read_it(paths, tmp_path, network) -> None:
    CountingExtractor(store=tmp_path / "cache.h5").transform(paths)
    assert "24 rows" in run_pipeline("verify", tmp_path / "cache.h5").stdout
    document = json.loads(run_pipeline("inspect", tmp_path / "cache.h5", "--json").stdout)
    assert (document["rows"], document["source"]) == (24, SOURCE)


COUNTING_MODULE = """
import os
import numpy as np
from features.recipe import PixelRule, Recipe
from features.transformer import FeatureExtractor

class Network:
    backbone_argument, weights_argument, row_bytes = "numpy", "none", 12
    license: str | None = None
    recipes = (Recipe("numpy", "0" * 64, "last", "avg", PixelRule(8, 8), "none"),)

    def engine(self, recipes, *, batch_size, device):
        def infer(batch):
            with open(os.environ["COUNT_FILE"], "a") as file:
                file.write(f"{os.getpid()} {len(batch)}\\n")
            return {"last.avg": batch.astype(np.float32).mean(axis=(1, 2))}
        return infer

class ProcessExtractor(FeatureExtractor):
    def _network(self):
        return Network()
"""

KILLED = """
import os, signal, sys
import features.transformer
from counting_extractor import Network, ProcessExtractor
from features.extraction import growing

folder, *paths = sys.argv[1:]
features.transformer.SHARD_SECONDS = -1.0  # a shard is one batch
growing.SMALL_SHARDS = 3

def killed(owner, name, calls):
    function, left = getattr(owner, name), calls
    def call(*arguments, **options):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    setattr(owner, name, call)

def work(there, where, calls):
    extractor = ProcessExtractor(store=f"{folder}/{there}-{where}-{calls}.h5", batch_size=4)
    if there:
        extractor.transform(paths[:there])
    owners = {"infer": ProcessExtractor, "commit": growing.PartsFolder, "keep": growing.PartsFolder}
    name = "_infer" if where == "infer" else where
    killed(owners.get(where, growing), name, calls)
    extractor.transform(paths[:there + 16])

for scenario in SCENARIOS:
    child = os.fork()
    if not child:
        work(*scenario)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, scenario
"""
# Rows that are there, what is killed at which call, rows lost. Four shards of 4 images are added and, in the end, merged.
SCENARIOS = {
    (0, "infer", 3): 8,
    (0, "write_store", 1): 0,
    (8, "infer", 1): 16,
    (8, "infer", 3): 8,
    (8, "write_shard", 3): 8,  # before the third one is written
    (8, "commit", 3): 4,  # it lies there, and is in no journal
    (8, "write_store", 1): 0,
    (8, "write_shard", 5): 0,  # the one that they are merged to
    (8, "write_store", 2): 0,
    (8, "keep", 1): 0,
}


@pytest.fixture(scope="module")
def counting_module(tmp_path_factory) -> Iterator[Path]:
    """Folder of ``counting_extractor``, which other processes import, too, and of the file in which it counts."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "counting_extractor.py").write_text(COUNTING_MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("COUNT_FILE", str(folder / "count.txt"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        get_reusable_executor().shutdown(wait=True)  # processes that earlier tests left do not know this folder
        yield folder


@pytest.fixture(scope="module")
def killed_stores(tmp_path_factory, counting_module) -> tuple[Path, list[str]]:
    """Stores whose writers were killed, one for each scenario, and their images, made in one process and its forks."""
    folder = tmp_path_factory.mktemp("killed")
    paths = [str(paint(folder / "images" / f"{number:02d}.png", (number, 7, 250 - number))) for number in range(25)]
    script = KILLED.replace("SCENARIOS", repr([*SCENARIOS]))
    subprocess.run([sys.executable, "-c", script, str(folder), *paths], check=True)
    return folder, paths


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_loses_at_most_the_shard_in_flight(counting_module, killed_stores, scenario) -> None:
    from counting_extractor import ProcessExtractor

    (folder, paths), (there, where, calls), lost = killed_stores, scenario, SCENARIOS[scenario]
    cache, images = folder / f"{there}-{where}-{calls}.h5", paths[: there + 16]
    extractor = ProcessExtractor(store=cache)
    if there:  # the store is whole at any moment
        assert FeatureStore.open(cache).verify() > 0
        merging = scenario[1:] in [("write_shard", 5), ("write_store", 2), ("keep", 1)]
        assert len(FeatureStore.open(cache)) == (len(images) if merging else there)
    (counting_module / "count.txt").write_text("")
    np.testing.assert_allclose(extractor.transform(images), means(images), rtol=1e-6)
    counted = (counting_module / "count.txt").read_text().splitlines()
    assert sum(int(line.split()[1]) for line in counted) == lost
    images = [*images, paths[-1]]
    np.testing.assert_allclose(extractor.transform(images), means(images), rtol=1e-6)
    store = FeatureStore.open(cache)
    assert sorted(store.images.paths) == sorted(images)
    row_of = {path: row for row, path in enumerate(store.images.paths)}
    np.testing.assert_allclose(store.array()[[row_of[path] for path in images], 0], means(images), rtol=1e-6)
    assert store.verify() > 0
    assert not [name for name in listing(folder) if cache.name in name and "/." in f"/{name}"]


# --- scikit-learn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        "check_estimator_cloneable",
        "check_estimator_tags_renamed",
        "check_valid_tag_types",
        "check_estimator_repr",
        "check_no_attributes_set_in_init",
        "check_do_not_raise_errors_in_init_or_set_params",
        "check_mixin_order",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
    ],
)
def test_scikit_learns_own_checks(check: str) -> None:
    """Those that need no matrix of numbers as input."""
    from sklearn.utils import estimator_checks

    getattr(estimator_checks, check)("FeatureExtractor", FeatureExtractor())


class OfRows(CountingExtractor):
    """Rows of numbers as grey pictures of one line, so that scikit-learn's checks have their matrices."""

    def _pictures(self, X, *, reset: bool) -> list[np.ndarray]:
        X = validate_data(self, X, dtype="numeric", reset=reset)
        return [np.clip(np.abs(row) * 10, 0, 255).astype(np.uint8)[None, :] for row in X]

    def fit(self, X, y=None):
        return super().fit(self._pictures(X, reset=True), y)

    def transform(self, X):
        return super().transform(self._pictures(X, reset=not hasattr(self, "n_features_in_")))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array, tags.input_tags.string = True, False, False
        tags.no_validation = False
        return tags


EXPECTED = {
    "check_transformer_preserve_dtypes": "features are float32, as the network computes them, whatever the type of the pixels",
    "check_dict_unchanged": "the engine is kept after the first images, so that it is built once; it is no state that is saved",
}


def test_the_checks_of_scikit_learn_pass(network) -> None:
    found = check_estimator(OfRows(), expected_failed_checks=EXPECTED, on_fail=None, on_skip=None)
    assert len(found) > 40
    assert [(line["check_name"], line["exception"]) for line in found if line["status"] == "failed"] == []
    assert {line["check_name"] for line in found if line["status"] == "xfail"} == EXPECTED.keys()


def test_parameters_survive_clone_pickle_and_set_params(paths, network) -> None:
    extractor = CountingExtractor("vgg16", layer="block4_pool", store="a.h5", image_size=(64, 96))
    copied = clone(extractor).set_params(pooling="max")
    assert copied.get_params() == {**extractor.get_params(), "pooling": "max"}
    assert FeatureExtractor(**extractor.get_params()).get_params() == extractor.get_params()
    with pytest.raises(ValueError, match="Invalid parameter 'poling'"):
        extractor.set_params(poling="max")
    extractor.set_params(store=None).transform(paths[:2])
    again = pickle.loads(pickle.dumps(extractor))  # noqa: S301  our own bytes
    assert again.get_params() == extractor.get_params()
    assert "_kept" in vars(extractor)
    assert "_kept" not in vars(again)


def pipeline(store: Path, **options: object) -> Pipeline:
    return Pipeline([("features", CountingExtractor(store=store, **options)), ("clf", LogisticRegression())])


def test_cross_validation_infers_each_image_once(paths, tmp_path, network) -> None:
    scores = cross_val_score(pipeline(tmp_path / "cache.h5"), paths, LABELS, cv=4, error_score="raise")
    assert scores.tolist() == [1.0] * 4
    assert sum(network.batches) == 24


def test_threads_that_share_a_store_infer_each_image_once(paths, tmp_path, network) -> None:
    results: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        results[number] = CountingExtractor(store=tmp_path / "cache.h5").transform(paths[number:])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        np.testing.assert_allclose(results[number], means(paths[number:]), rtol=1e-6)
    assert sum(network.batches) == 24


def test_a_writer_is_waited_for_and_not_for_ever(paths, tmp_path, network) -> None:
    cache = tmp_path / "cache.h5"
    with locked(cache), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        CountingExtractor(store=cache, lock_timeout=0.2).transform(paths)
    assert network.batches == []
    CountingExtractor(store=cache).transform(paths)
    with locked(cache):  # nothing to write: nothing to wait for
        CountingExtractor(store=cache, lock_timeout=0).transform(paths[:5])


class Column:
    """As much of a column of a data frame as is used."""

    def __init__(self, values: list[str]) -> None:
        self.values = np.array(values, dtype=object)

    def to_numpy(self) -> np.ndarray:
        return self.values


def test_columns_of_data_frames_and_names_of_features(paths, network) -> None:
    extractor = CountingExtractor().set_output(transform="default")
    for X in (Column(paths), np.array(paths)[:, None], tuple(map(Path, paths))):
        np.testing.assert_allclose(extractor.fit_transform(X), means(paths), rtol=1e-6)
    assert extractor.get_feature_names_out().tolist() == ["last.avg_0", "last.avg_1", "last.avg_2"]
    assert (extractor.n_features_out_, extractor.recipe_) == (3, recipe())


@pytest.mark.slow
def test_cross_validation_in_two_processes_infers_each_image_once(paths, tmp_path, counting_module) -> None:
    (counting_module / "count.txt").write_text("")
    from counting_extractor import ProcessExtractor

    model = Pipeline([("features", ProcessExtractor(store=tmp_path / "cache.h5")), ("clf", LogisticRegression())])
    scores = cross_val_score(model, paths, LABELS, cv=6, n_jobs=2, error_score="raise")
    assert scores.tolist() == [1.0] * 6
    counted = [line.split() for line in (counting_module / "count.txt").read_text().splitlines()]
    assert sum(int(count) for _, count in counted) == 24
    assert str(os.getpid()) not in {process for process, _ in counted}


GRID = (20, 500) if STRESS else (3, 50)  # heads, images


@pytest.mark.stress
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_grid_of_heads_infers_each_image_once(tmp_path, counting_module, n_jobs: int) -> None:
    (counting_module / "count.txt").write_text("")
    from counting_extractor import ProcessExtractor

    heads, images = GRID
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 100, (images, 8, 8, 3)).astype(np.uint8)
    y = np.array(["red", "green"])[np.arange(images) % 2]
    pixels[y == "red", ..., 0] += 100
    model = clone(BottleneckClassifier(ProcessExtractor(store=tmp_path / "cache"), "knn"))
    grid = {"head__n_neighbors": list(range(1, heads + 1))}
    search = GridSearchCV(model, grid, cv=2, n_jobs=n_jobs, error_score="raise").fit(pixels, y)
    assert (len(search.cv_results_["params"]), search.best_score_) == (heads, 1.0)
    assert clone(search.best_estimator_).fit(pixels, y).score(pixels, y) == 1.0
    assert search.predict(pixels[:2]).tolist() == ["red", "green"]
    counted = [line.split() for line in (counting_module / "count.txt").read_text().splitlines()]
    assert sum(int(count) for _, count in counted) == images


@pytest.mark.slow
def test_a_real_backbone_in_a_grid_search(assets: Path, tmp_path: Path) -> None:
    """Cats and dogs; both poolings of the grid come from one folder, and equal an extraction's features."""
    for name in ("cats", "dogs"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for path in sorted((assets / "images" / "cats_and_dogs_filtered" / "train" / name).iterdir())[:30]:
            shutil.copy(path, tmp_path / "train" / name)
    folder = tmp_path / "train"
    chosen = sorted((folder / "cats").iterdir())[:20] + sorted((folder / "dogs").iterdir())[:20]
    labels = np.repeat([0, 1], 20)
    weights = str(assets / "weights" / "mobilenet_v2_0.35_224_no_top.weights.h5")
    extractor = FeatureExtractor(
        "mobilenetv2-0.35", weights=weights, image_size=96, store=tmp_path / "caches", layer="out_relu", batch_size=16
    )
    model = Pipeline([("features", extractor), ("clf", LogisticRegression())])
    search = GridSearchCV(model, {"features__pooling": ["avg", "max"], "clf__C": [0.01, 1.0]}, cv=2)
    search.fit(chosen, labels)
    assert search.best_score_ >= 0.8
    files = sorted((tmp_path / "caches").glob("*.h5"))
    assert [len(FeatureStore.open(file)) for file in files] == [40, 40]
    times = [file.stat().st_mtime_ns for file in files]
    X = clone(extractor).set_params(pooling="avg").fit_transform(chosen)
    assert [file.stat().st_mtime_ns for file in files] == times
    assert X.shape == (40, 1280)

    from features import extract_features

    store = extract_features(
        folder, tmp_path / "all.h5", backbone="mobilenetv2-0.35", weights=weights, image_size=96, layers="out_relu",
        pooling="avg", batch_size=16,
    )  # fmt: skip
    row_of = {path: row for row, path in enumerate(store.images.paths)}
    expected = store.array()[[row_of[path.relative_to(folder).as_posix()] for path in chosen], 0]
    np.testing.assert_allclose(X, expected, atol=1e-4 * np.abs(expected).max())
    sha256 = {hashlib.sha256(path.read_bytes()).digest() for path in chosen}
    assert sha256 == {row.tobytes() for row in FeatureStore.open(files[0]).images.sha256}


def test_only_this_module_needs_scikit_learn() -> None:
    import ast

    import features

    for path in Path(features.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "features.transformer" not in names or path.stem == "__init__", path
