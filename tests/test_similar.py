"""Similar images: stored rows by path, files by their hash or through the network, as a table, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import NumpyNetwork, call_pipeline, extract, paint, paint_folder
from PIL import Image

from features.errors import ConfigurationError, UnreadableImageError
from features.store.reader import FeatureStore
from pipeline.stages import similar as stage
from pipeline.stages.similar import similar

NETWORK = NumpyNetwork()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """Images of the colours (0, 0, 7) to (29, 0, 7): their features are their colours."""
    paint_folder(tmp_path / "photos", {"cat": 20, "dog": 10})
    extract(tmp_path / "photos", tmp_path / "features.h5")
    monkeypatch.setattr(stage, "network_from", lambda *_, **__: NETWORK)
    NETWORK.batches.clear()
    return FeatureStore.open(tmp_path / "features.h5")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.slow
def test_a_stored_image_is_found_by_its_path_and_is_not_its_own_neighbour(store: FeatureStore) -> None:
    found = similar(store, ["cat/0010.png", "dog/0009.png"], k=3)
    names = [[store.images.paths[row] for row in line] for line in found.rows.tolist()]
    assert names == [
        ["cat/0011.png", "cat/0009.png", "cat/0012.png"],
        ["dog/0008.png", "dog/0007.png", "dog/0006.png"],
    ]
    expected = cosine(np.array([10.0, 0, 7]), np.array([11.0, 0, 7]))
    assert found.similarity[0, 0] == pytest.approx(expected, abs=1e-6)
    assert NETWORK.batches == []


@pytest.mark.slow
def test_a_file_whose_bytes_are_stored_needs_no_network(store: FeatureStore, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.png"
    copy.write_bytes((tmp_path / "photos/dog/0002.png").read_bytes())
    found = similar(store, [copy], k=2)
    assert store.images.paths[found.rows[0, 0]] == "dog/0002.png"
    assert found.similarity[0, 0] == pytest.approx(1, abs=1e-6)
    assert NETWORK.batches == []


@pytest.mark.slow
def test_a_new_image_goes_through_the_network(store: FeatureStore, tmp_path: Path) -> None:
    new = [paint(tmp_path / f"new{red}.png", (red, 0, 7), (9, 9)) for red in (3, 26)]
    found = similar(store, [*new, "cat/0000.png"], k=1)
    assert [store.images.paths[row] for row in found.rows[:, 0]] == ["cat/0003.png", "dog/0006.png", "cat/0001.png"]
    assert NETWORK.batches == [2]


@pytest.mark.slow
def test_more_neighbours_than_rows_are_all_rows(store: FeatureStore) -> None:
    found = similar(store, ["cat/0000.png"], k=100)
    assert sorted(found.rows[0, :29].tolist()) == [
        row for row in range(30) if store.images.paths[row] != "cat/0000.png"
    ]
    assert found.rows[0, 29:].tolist() == [-1]


@pytest.mark.slow
def test_what_is_no_image_is_refused_with_a_name_that_is_near(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"cat/0040\.png: is neither a path of .*features\.h5 nor an image file"
    ):
        similar(store, ["cat/0040.png"])
    with pytest.raises(
        ConfigurationError, match=r"did you mean 'cat/0017\.png'\? Paths of the store are like cat/0000\.png"
    ):
        similar(store, ["my/new/photos/of/animals/0017.png"])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=r"broken\.png .*leave it out, or repair it"):
        similar(store, [broken])
    with pytest.raises(ConfigurationError, match="no image"):
        similar(store, [])
    with pytest.raises(ConfigurationError, match="no feature set 'boundary'"):
        similar(store, ["cat/0000.png"], name="boundary")


@pytest.mark.slow
def test_the_command_writes_json_csv_and_a_picture(store: FeatureStore, tmp_path: Path) -> None:
    out, grid = tmp_path / "found.csv", tmp_path / "found.png"
    (tmp_path / "photos/cat/0006.png").unlink()  # one thumbnail is missing
    done = call_pipeline(
        "similar", store.path, "cat/0005.png", "cat/0019.png", "-k", 7, "--out", out, "--grid", grid, "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["format"], document["features"], document["rows"]) == (1, "last.avg", 30)
    first = document["images"][0]["neighbours"][0]
    assert (first["path"], first["label"]) == ("cat/0006.png", "cat")
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows[:7]] == [item["path"] for item in document["images"][0]["neighbours"]]
    assert [row["rank"] for row in rows] == [str(rank) for rank in [*range(1, 8)] * 2]
    assert rows[0]["sha256"] == first["sha256"]
    assert document["drawn"] == 15
    with Image.open(grid) as picture:
        assert picture.width > 6 * 160
    text = call_pipeline("similar", store.path, "cat/0005.png", "-k", 1).stdout
    assert "cat/0005.png (stored):" in text
    assert "cat/0006.png" in text


@pytest.mark.slow
def test_a_query_whose_file_is_another_one_now_is_not_drawn(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "photos/cat/0005.png").write_bytes((tmp_path / "photos/dog/0001.png").read_bytes())
    assert stage.search(store, ["cat/0005.png"], k=3, grid=tmp_path / "found.png")[0]["drawn"] == 3


@pytest.mark.slow
def test_overlong_requests_are_usage_errors(store: FeatureStore) -> None:
    done = call_pipeline("similar", store.path, "cat/0005.png", "--grid", "picture.gif")
    assert done.returncode == 2
    assert "expected the name of an image file" in done.stderr


@pytest.mark.slow
def test_a_new_photograph_is_nearest_to_the_one_it_was_made_from(assets: Path, tmp_path: Path) -> None:
    """Through the store's own network, found again from what the store notes."""
    from features import extract_features

    source = assets / "images" / "cats_and_dogs_filtered" / "validation" / "cats"
    for path in sorted(source.iterdir())[:24]:
        (tmp_path / "photos/cats").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos/cats" / path.name).write_bytes(path.read_bytes())
    weights = str(assets / "weights" / "mobilenet_v2_1.0_224_no_top.weights.h5")
    made = extract_features(tmp_path / "photos", tmp_path / "features.h5", weights=weights)
    original = made.images.paths[7]
    with Image.open(tmp_path / "photos" / original) as picture:
        picture.convert("RGB").save(tmp_path / "new.jpg", quality=80)
    found = similar(made, [tmp_path / "new.jpg", original], k=3)
    assert made.images.paths[found.rows[0, 0]] == original
    assert 0.95 < found.similarity[0, 0] < 0.99999
    assert original not in {made.images.paths[row] for row in found.rows[1]}
