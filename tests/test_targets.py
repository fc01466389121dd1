"""Targets that are not one class: how they are read from manifests and folders, kept in a store, and checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import NumpyNetwork, call_pipeline, paint, paint_folder
from test_sources import manifest, refusal

from features.errors import ConfigurationError, IntegrityError
from features.extraction.extraction import Extraction, ExtractionResult, pack_store
from features.extraction.options import ExtractionOptions
from features.sources.scan import scan
from features.store.reader import FeatureStore

U = 255


def listed(root: Path, header: str, *rows: str) -> Path:
    """A manifest whose first column is the path of an image of its own."""
    text = "".join(f"{number}.png,{row}\n" for number, row in enumerate(rows))
    return manifest(root, f"path,{header}\n{text}", *(f"{number}.png" for number in range(len(rows))))


def tags_of(path: Path, target: str | None = None) -> tuple[tuple[str, ...], list[list[int]]]:
    found = scan(path, target=target, task="multilabel").target
    assert found is not None
    assert found.values.dtype == np.uint8
    return found.columns, found.values.tolist()


@pytest.mark.parametrize("mark", [";", "|"])
def test_lists_of_labels(tmp_path: Path, mark: str) -> None:
    path = listed(tmp_path, "tags", f"sea {mark}sun", "", "sun", mark, f"{mark}fog{mark}sun{mark}")
    columns, values = tags_of(path, "tags")
    assert columns == ("fog", "sea", "sun")
    assert values == [[0, 1, 1], [U, U, U], [0, 0, 1], [0, 0, 0], [1, 0, 1]]
    images = scan(path, target="tags", task="multilabel")
    assert images.classes == ()
    assert images.labels.tolist() == [-1] * 5
    assert images.given_splits.tolist() == [-1, 3, -1, -1, -1]  # a row is labelled where its target is known
    assert images.strata.tolist() == [1, -1, 2, 3, 0]


def test_columns_of_truths(tmp_path: Path) -> None:
    path = listed(tmp_path, "cat,dog,note", "1,0,x", ",True,y", "0.0,,z")
    assert tags_of(path, "Cat, dog") == (("cat", "dog"), [[1, 0], [U, 1], [0, U]])
    assert tags_of(path, "dog") == (("dog",), [[0], [1], [U]])
    assert scan(path, target="cat", task="multilabel").columns == {"dog": ("0", "True", ""), "note": ("x", "y", "z")}


def test_numbers(tmp_path: Path) -> None:
    path = listed(tmp_path, "age,weight,split", "1,2.5,train", "nan,-3e2,test", ",,train")
    target = scan(path, target="weight,age", task="regression").target
    assert target is not None
    assert (target.columns, target.name) == (("weight", "age"), "weight,age")
    np.testing.assert_array_equal(target.values, [[2.5, 1], [-300, np.nan], [np.nan, np.nan]])
    assert target.known.tolist() == [True, True, False]
    assert scan(path, target="weight,age", task="regression").given_splits.tolist() == [0, 2, 3]


def test_a_column_with_a_comma_in_its_name(tmp_path: Path) -> None:
    assert tags_of(listed(tmp_path, '"a,b",a,b', "1,0,0"), "a,b")[0] == ("a,b",)


@pytest.mark.parametrize(
    ("task", "header", "rows", "target", "said"),
    [
        ("multilabel", "tags", ("a;b", "c", "a|b"), "tags", "line 4: tags is 'a|b', with another separator than 'a;b'"),
        ("multilabel", "tags", ("a;b|c",), "tags", "with another separator"),
        ("multilabel", "cat,dog", ("1,0", "1,2"), "cat,dog", "line 3: dog is '2', expected 1, 0, or nothing"),
        ("multilabel", "cat,dog", ("1,0",), "cat,dgo", "no column 'dgo' for the target"),
        ("multilabel", "cat,dog", ("1,0",), "cat,cat", "each once"),
        ("multilabel", "cat,group", ("1,0",), "cat,group", "other columns than path, split and group"),
        ("multilabel", "tags", ("", ""), "tags", "every cell of 'tags' is blank"),
        ("regression", "age", ("1", "old"), "age", "line 3: age is 'old', expected a number"),
        ("regression", "age", ('"3,5"',), "age", "write 3.5"),
        ("regression", "age", ("1", "inf"), "age", "line 3: age is 'inf', expected a finite number"),
        ("regression", "age", ("", "nan"), "age", "every cell of 'age' is blank"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, task: str, header: str, rows: tuple[str, ...], target: str, said: str
) -> None:
    message = refusal(listed(tmp_path, header, *rows), task=task, target=target)
    assert said in message
    assert len(message) <= 1000
    assert "images.csv" in message


def test_the_row_that_is_no_number_is_named_however_late(tmp_path: Path) -> None:
    rows = ["7"] * 9_000
    rows[-1] = "seven"
    (tmp_path / "0.png").write_bytes(b"x")
    text = "".join(f"{number}.png,{row}\n" for number, row in enumerate(rows))
    message = refusal(manifest(tmp_path, "path,age\n" + text), task="regression", target="age")
    assert "line 9001: age is 'seven'" in message


def test_messages_lead_to_the_tasks(tmp_path: Path) -> None:
    assert "--task regression" in refusal(listed(tmp_path, "label", "0.12", "3.5", "2.25"))
    assert "--task multilabel" in refusal(listed(tmp_path / "b", "label", "a|b", "c", "d|e"))
    with pytest.raises(ConfigurationError, match="class folders, not numbers"):
        scan(paint_folder(tmp_path / "c", {"cat": 1, "dog": 1}), task="regression")
    with pytest.raises(
        ConfigurationError, match=r"expected one of classification, multilabel, regression; did you mean 'multilabel'"
    ):
        scan(tmp_path / "c", task="multi-label")


# --- the store ----------------------------------------------------------------------------------------------


def stored(source: Path, out: Path, task: str, target: str | None = None, **more: Any) -> tuple[ExtractionResult, int]:
    """Extract by channel means; return the result and the number of images that went through the network."""
    network = NumpyNetwork()
    options = ExtractionOptions(batch_size=4, workers=1, task=task, target=target, **more)
    images = scan(source, task=task, target=target)
    return Extraction(images, network, out, options).run(), sum(network.batches)  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    for number in range(40):
        paint(tmp_path / "photos" / f"{number}.png", (number, 2 * number, 7))

    def write(*cells: str, header: str = "tags") -> Path:
        path = tmp_path / "photos" / "images.csv"
        lines = [f"{number}.png,{cell}" for number, cell in enumerate(cells)]
        path.write_text("\n".join([f"path,{header}", *lines]) + "\n")
        return path

    return write


def tags(count: int = 40) -> list[str]:
    return [["sea", "sun", "sea;sun", ";", ""][number % 5] for number in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "sharded"])
def test_a_store_keeps_its_target(tmp_path: Path, photos: Callable[..., Path], layout: str) -> None:
    result, inferred = stored(photos(*tags()), tmp_path / "f.h5", "multilabel", "tags", layout=layout)
    store = FeatureStore.open(tmp_path / "f.h5")
    assert inferred == 40
    assert result.written
    assert store.classes == ()
    assert store.images.target is not None
    assert (store.images.target.columns, store.images.target.name) == (("sea", "sun"), "tags")
    X, y = store.load("train")
    assert y.dtype == np.uint8
    assert y.shape == (len(X), 2)
    assert set(y.ravel().tolist()) == {0, 1}
    rows = {path: row.tolist() for path, row in zip(store.images.paths, store.y, strict=True)}
    assert [rows[f"{number}.png"] for number in range(5)] == [[1, 0], [0, 1], [1, 1], [0, 0], [U, U]]
    assert len(store.rows("unlabelled")) == 8
    store.verify()
    with h5py.File(tmp_path / "f.h5") as file:
        assert file.attrs["format_version"] == 2
        assert file["/targets/tags/values"].dtype == np.uint8
    assert not stored(photos(*tags()), tmp_path / "f.h5", "multilabel", "tags")[0].written
    packed = pack_store(tmp_path / "f.h5", tmp_path / "g.h5")
    assert packed.images.target == store.images.target
    assert packed.data_digest == store.data_digest


@pytest.mark.slow
def test_one_changed_target_is_taken_up_without_inference(tmp_path: Path, photos: Callable[..., Path]) -> None:
    ages = [str(number) for number in range(40)]
    before = stored(photos(*ages, header="age"), tmp_path / "f.h5", "regression", "age")[0].store.data_digest
    ages[3] = "77.5"
    result, inferred = stored(photos(*ages, header="age"), tmp_path / "f.h5", "regression", "age")
    assert inferred == 0
    assert result.written
    assert result.store.data_digest != before
    assert result.store.y[list(result.store.images.paths).index("3.png")].tolist() == [77.5]
    ages[3] = ""  # the row is no longer labelled
    result, inferred = stored(photos(*ages, header="age"), tmp_path / "f.h5", "regression", "age")
    assert inferred == 0
    assert result.store.images.splits[list(result.store.images.paths).index("3.png")] == 3


@pytest.mark.slow
def test_the_task_and_the_names_of_columns_are_part_of_the_digest(tmp_path: Path, photos: Callable[..., Path]) -> None:
    cells = ["1", "0"] * 20
    digests = [
        stored(photos(*cells, header=name), tmp_path / "f.h5", task, name)[0].store.data_digest
        for task, name in [("multilabel", "a"), ("multilabel", "b"), ("regression", "a"), ("classification", "a")]
    ]
    assert len(set(digests)) == 4


def test_stores_without_a_target_stay_version_1(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"cat": 3, "dog": 3})
    stored(source, tmp_path / "f.h5", "classification")
    with h5py.File(tmp_path / "f.h5") as file:
        assert file.attrs["format_version"] == 1
        assert "targets" not in file


def test_an_image_in_several_class_folders_has_all_their_labels(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"cat": 20, "dog": 20})
    shutil.copy(source / "cat" / "0000.png", source / "dog" / "copy.png")
    store = stored(source, tmp_path / "f.h5", "multilabel")[0].store
    assert store.images.target is not None
    assert store.images.target.columns == ("cat", "dog")
    rows = dict(zip(store.images.paths, store.y.tolist(), strict=True))
    assert len(rows) == 40
    assert "dog/copy.png" not in rows
    assert rows["cat/0000.png"] == [1, 1]
    assert rows["cat/0001.png"] == [1, 0]
    assert rows["dog/0001.png"] == [0, 1]
    result, inferred = stored(source, tmp_path / "f.h5", "multilabel")
    assert not result.written
    assert not inferred


@pytest.mark.slow
def test_stratified_splits_have_each_label_and_small_and_large_numbers(
    tmp_path: Path, photos: Callable[..., Path]
) -> None:
    store = stored(photos(*tags()), tmp_path / "f.h5", "multilabel", "tags", split="stratified:0.5,0.5")[0].store
    assert [store.y[store.rows(name)].sum(axis=0).tolist() for name in ("train", "validation")] == [[8, 8], [8, 8]]
    ages = [str(number) for number in range(40)]
    store = stored(photos(*ages, header="age"), tmp_path / "g.h5", "regression", "age", split="stratified:0.5,0.5")[
        0
    ].store
    low, high = (np.sort(store.y[store.rows(name)].ravel()) for name in ("train", "validation"))
    assert len(low) == len(high) == 20
    assert abs(low - high).max() < 8


def test_columns_without_any_difference_are_said(
    tmp_path: Path, photos: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    stored(photos(*["1,1", "1,0"] * 20, header="a,b"), tmp_path / "f.h5", "multilabel", "a,b")
    assert "all images have the same value, or none, of 'a'" in caplog.text


@pytest.mark.parametrize(("task", "thing"), [("multilabel", "label"), ("regression", "range of numbers")])
def test_the_advice_about_splits_speaks_of_the_task(
    tmp_path: Path, photos: Callable[..., Path], caplog: pytest.LogCaptureFixture, task: str, thing: str
) -> None:
    cells = ["1,0"] + ["0,1", "0,0"] * 19 + ["0,1"]
    stored(photos(*cells, header="a,b"), tmp_path / "f.h5", task, "a,b")
    assert "have the same value of 'a'" in caplog.text
    assert f"gives each split some of every {thing} that has 4 images" in caplog.text
    assert "class" not in caplog.text


@pytest.mark.parametrize("damage", ["value", "infinite", "second", "rows", "version"])
def test_a_damaged_target_is_refused(
    tmp_path: Path, photos: Callable[..., Path], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from features.store import schema, untrusted

    out = tmp_path / "f.h5"
    task, cells = (
        ("regression", [str(number) for number in range(40)]) if damage == "infinite" else ("multilabel", tags())
    )
    stored(photos(*cells, header="t"), out, task, "t")
    with h5py.File(out, "r+") as file:
        group = file["/targets/t"]
        if damage == "value":
            group["values"][0] = 7
        elif damage == "infinite":
            group["values"][0] = np.inf
        elif damage == "second":
            file["/targets/u"] = group
        elif damage == "rows":
            del group["values"]
            group["values"] = np.zeros((39, 2), np.uint8)
        else:
            file.attrs.modify("format_version", np.int64(1))
    # as one who forges the checksums, too
    monkeypatch.setattr(untrusted, "attributes_digest", lambda attributes: _stated(out))
    monkeypatch.setattr(schema, "attributes_digest", lambda attributes: _stated(out))
    with pytest.raises(IntegrityError, match=r"f\.h5"):
        _ = FeatureStore.open(out).images


def _stated(path: Path) -> str:
    with h5py.File(path) as file:
        return bytes(file.attrs["attributes_sha256"]).decode()


@pytest.mark.slow
def test_inspect_shows_the_target(tmp_path: Path, photos: Callable[..., Path]) -> None:
    stored(photos(*tags()), tmp_path / "f.h5", "multilabel", "tags")
    said = call_pipeline("inspect", tmp_path / "f.h5").stdout
    assert "40 rows, multilabel of 2 columns (sea, sun)" in said
    assert "name  known  images\n  sea      32      16\n  sun      32      16" in said
    stored(photos(*map(str, range(40)), header="age"), tmp_path / "g.h5", "regression", "age")
    assert "age      40  0.0000  19.5000   39.0000" in call_pipeline("inspect", tmp_path / "g.h5").stdout
