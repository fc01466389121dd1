"""Near-duplicates across splits: found by value, capped and said so, and what real altered copies give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_streaming import write_store

from features.errors import ConfigurationError
from features.store.reader import FeatureStore
from pipeline.sweeps import leakage
from pipeline.sweeps.leakage import THRESHOLD, near_duplicates


def near(vector: np.ndarray, cosine: float, generator: np.random.Generator) -> np.ndarray:
    """A vector at that cosine."""
    unit = vector / np.linalg.norm(vector)
    other = generator.normal(size=vector.shape)
    other -= (other @ unit) * unit
    return 7 * (cosine * unit + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Random vectors; some in validation and test are close to one of train, or of each other."""
    path, count = tmp_path_factory.mktemp("leakage") / "features.h5", 3000
    generator = np.random.default_rng(0)
    X = generator.normal(size=(count, 256))
    splits = np.arange(count) % 3
    pairs = {(0, 301): 0.999, (3, 302): 0.96, (6, 304): 0.94, (307, 602): 0.93, (9, 310): 0.9, (12, 900): 0.99}
    for (first, second), cosine in pairs.items():
        X[second] = near(X[first], cosine, generator)
    return write_store(path, [X.astype(np.float32)], np.arange(count) % 2, splits)


@pytest.mark.slow
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("memory", [16 << 20, 1 << 30])
def test_planted_pairs_are_found_with_their_cosines(
    planted: FeatureStore, monkeypatch: pytest.MonkeyPatch, projected: bool, memory: int
) -> None:
    if projected:
        monkeypatch.setattr(leakage, "EXACT_WORK", 0)
    found = near_duplicates(planted, memory_bytes=memory)
    # Not (12, 900), which are both in train, nor (9, 310), which are less alike.
    expected = [(0, 301), (3, 302), (6, 304), (307, 602)]
    paths = planted.images.paths
    assert [(pair.first, pair.second) for pair in found.pairs] == [(paths[a], paths[b]) for a, b in expected]
    np.testing.assert_allclose([pair.similarity for pair in found.pairs], [0.999, 0.96, 0.94, 0.93], atol=1e-5)
    assert [pair.splits for pair in found.pairs] == [
        ("train", "validation"),
        ("train", "test"),
        ("train", "validation"),
        ("validation", "test"),
    ]
    assert (found.found, found.checked, found.possible, found.capped) == (4, 3_000_000, 3_000_000, "")


@pytest.mark.slow
def test_a_lower_threshold_finds_more(planted: FeatureStore) -> None:
    assert [round(pair.similarity, 2) for pair in near_duplicates(planted, threshold=0.85).pairs][-1] == 0.9


@pytest.mark.slow
def test_the_list_is_capped_and_says_how_many_there_are(tmp_path: Path) -> None:
    """All images the same: a million pairs, and neither memory nor the list grow with them."""
    X = np.ones((2000, 8), np.float32)
    store = write_store(tmp_path / "features.h5", [X], np.arange(2000) % 2, np.arange(2000) % 2)
    found = near_duplicates(store, limit=5)
    assert (len(found.pairs), found.found) == (5, 1_000_000)
    assert found.capped == "only the 100 most similar of 1000000 candidates were compared exactly"
    assert [pair.similarity for pair in found.pairs] == pytest.approx([1.0] * 5, abs=1e-6)


@pytest.mark.slow
def test_the_most_similar_are_kept(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    centre = generator.normal(size=64)
    X = np.stack([near(centre, 0.99, generator) for _ in range(1200)])
    X[7] = X[1000]
    store = write_store(tmp_path / "features.h5", [X.astype(np.float32)], np.arange(1200) % 2, np.arange(1200) % 2)
    found = near_duplicates(store, limit=3)
    assert (found.pairs[0].first, found.pairs[0].second) == (store.images.paths[1000], store.images.paths[7])
    cosines = X / np.linalg.norm(X, axis=1, keepdims=True)
    expected = np.sort((cosines[::2] @ cosines[1::2].T).ravel())[::-1][:3]
    np.testing.assert_allclose([pair.similarity for pair in found.pairs], expected, atol=1e-5)


def test_too_many_comparisons_are_cut_to_a_share_that_is_named(planted: FeatureStore) -> None:
    found = near_duplicates(planted, pairs_checked=750_000)
    assert found.possible == 3_000_000
    assert found.checked == 750_000
    assert found.capped == "50% of the images of each split were compared, chosen at random"
    assert 0 < len(found.pairs) < 4 or found.found == 0


def test_zeros_resemble_nothing_and_empty_splits_are_no_trouble(tmp_path: Path) -> None:
    X = np.zeros((40, 8), np.float32)
    zeros = write_store(tmp_path / "zeros.h5", [X], np.arange(40) % 2, np.arange(40) % 2)
    assert near_duplicates(zeros).found == 0
    alone = write_store(tmp_path / "alone.h5", [X + 1], np.arange(40) % 2, np.zeros(40))
    found = near_duplicates(alone)
    assert (found.pairs, found.checked, found.possible, found.capped) == ((), 0, 0, "")


def test_spatial_features_are_averaged(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    X = generator.random((10, 4, 4, 6)).astype(np.float32) * np.exp(generator.normal(size=(10, 1, 1, 6)))
    X[1] = X[0, ::-1]  # turned over: the same mean
    store = write_store(tmp_path / "features.h5", [X.astype(np.float32)], np.arange(10) % 2, np.arange(10) % 2)
    assert near_duplicates(store, threshold=0.9999).pairs[0].first == store.images.paths[0]


def test_options_are_checked(planted: FeatureStore) -> None:
    for options in ({"threshold": 1.5}, {"limit": 0}, {"memory_bytes": 1}):
        with pytest.raises(ConfigurationError, match="received"):
            near_duplicates(planted, **options)
    with pytest.raises(ConfigurationError, match=r"no feature set 'last\.max'"):
        near_duplicates(planted, "last.max")


@pytest.mark.slow
def test_altered_copies_of_real_images_are_found(assets: Path, tmp_path: Path) -> None:
    """What the default threshold rests on: copies of 60 cats and dogs against 240 other images."""
    from features import extract_features

    source = assets / "images" / "cats_and_dogs_filtered" / "train"
    alterations = {
        "encoded": lambda image: image,
        "mirrored": ImageOps.mirror,
        "cropped": lambda image: image.crop(
            (image.width // 40, image.height // 40, image.width * 39 // 40, image.height * 39 // 40)
        ),
    }
    for kind in ("cats", "dogs"):
        for number, path in enumerate(sorted((source / kind).iterdir())[:150]):
            image = Image.open(path).convert("RGB")
            target = tmp_path / "images" / "train" / kind
            target.mkdir(parents=True, exist_ok=True)
            (target / path.name).write_bytes(path.read_bytes())
            if number < 30:
                target = tmp_path / "images" / "validation" / kind
                target.mkdir(parents=True, exist_ok=True)
                for name, alter in alterations.items():
                    alter(image).save(target / f"{path.stem}-{name}.jpg", quality=75)
    store = extract_features(
        tmp_path / "images",
        tmp_path / "features.h5",
        weights=str(assets / "weights" / "mobilenet_v2_1.0_224_no_top.weights.h5"),
    )
    found = near_duplicates(store, limit=1000)
    stems = [(Path(pair.first).stem, Path(pair.second).stem) for pair in found.pairs]
    assert all(second.startswith(first + "-") for first, second in stems)  # no pair of different images
    shares = {name: sum(second.endswith(name) for _, second in stems) / 60 for name in alterations}
    assert shares["encoded"] == 1
    assert shares["cropped"] >= 0.95
    assert shares["mirrored"] >= 0.8
    assert found.threshold == THRESHOLD


def test_they_are_said_once_before_training(
    planted: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    leakage.warn_near_duplicates(planted)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{planted.path}: 4 pairs of near-duplicates are in different splits, such as ")
    assert f"{planted.images.paths[0]} ~ {planted.images.paths[301]}; the report shows them" in said
    assert "\n" not in said
    caplog.clear()
    leakage.warn_near_duplicates(planted)
    assert caplog.text == ""
    leakage.warn_near_duplicates(planted, ["no such data set"])  # which is refused where it is used
    assert caplog.text == ""
