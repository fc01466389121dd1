"""A store as a Parquet file: other tools read the same values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import NumpyNetwork, paint_folder, recipe

from features.errors import ConfigurationError
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources.scan import scan
from features.store.columns import write_parquet
from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec, ImageTable, Quarantine, digest_rows
from features.store.writer import StoreWriter
from features.targets import Target
from pipeline.stages.extract import to_parquet


def spatial_store(
    path: Path, rows: int, shape: tuple[int, ...], dtype: str = "float32", target: Target | None = None
) -> np.ndarray:
    """A store of numbers that say where they stand."""
    made = recipe("out_relu", "none", dtype=dtype)
    values = np.arange(rows * int(np.prod(shape)), dtype=np.float32).reshape(rows, 1, *shape).astype(dtype)
    features = {made.name: FeatureSpec(made, 1, shape)}
    writer = StoreWriter(path, kind="store", rows=rows, features=features, version=1 if target is None else 2)
    writer.append(made.name, values)
    empty = Quarantine((), np.zeros((0, 32), np.uint8), (), np.zeros(0, np.int64), np.zeros(0, np.int64))
    numbers = np.zeros(rows, np.int64)
    writer.finish(
        images=ImageTable(
            paths=tuple(f"cat/{row}.png" for row in range(rows)),
            sha256=digest_rows(bytes([row]) * 32 for row in range(rows)),
            labels=np.array([row % 3 - 1 for row in range(rows)], np.int32),
            splits=np.array([row % 3 for row in range(rows)], np.int8),
            groups=tuple(f"g{row}" for row in range(rows)),
            widths=numbers.astype(np.int32),
            heights=numbers.astype(np.int32),
            sizes=numbers,
            mtimes_ns=numbers,
            columns={"camera": tuple(f"c{row}" for row in range(rows))},
            target=target,
        ),
        quarantine=empty,
        classes=("cat", "dog"),
    )
    return values[:, 0]


@pytest.mark.slow
def test_pandas_and_duckdb_read_the_values_of_a_spatial_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas, duckdb = pytest.importorskip("pandas"), pytest.importorskip("duckdb")
    values = spatial_store(tmp_path / "s.h5", 5, (7, 7, 1280))
    monkeypatch.setattr("features.store.columns.GROUP_BYTES", 2 * 4 * 7 * 7 * 1280)  # two rows
    out = tmp_path / "s.parquet"
    assert write_parquet(FeatureStore.open(tmp_path / "s.h5"), out) == 5
    frame = pandas.read_parquet(out)
    assert frame["path"].tolist() == [f"cat/{row}.png" for row in range(5)]
    assert [label if isinstance(label, str) else None for label in frame["label"]] == [None, "cat", "dog", None, "cat"]
    assert frame["split"].tolist() == ["train", "validation", "test", "train", "validation"]
    assert frame["sha256"].tolist()[1] == "01" * 32
    assert frame["camera"].tolist()[4] == "c4"
    np.testing.assert_array_equal(np.stack(frame["out_relu"].to_list()).reshape(5, 7, 7, 1280), values)
    rows = duckdb.sql(f"select path, \"group\", out_relu from '{out}' where label = 'cat' order by path").fetchall()
    assert [row[:2] for row in rows] == [("cat/1.png", "g1"), ("cat/4.png", "g4")]
    np.testing.assert_array_equal(np.array(rows[1][2], np.float32).reshape(7, 7, 1280), values[4])
    file = pq.ParquetFile(out)
    assert [file.metadata.row_group(number).num_rows for number in range(3)] == [2, 2, 1]
    field = file.schema_arrow.field("out_relu")
    assert json.loads(field.metadata[b"shape"]) == [7, 7, 1280]
    assert field.metadata[b"fingerprint"].decode() == recipe("out_relu", "none").fingerprint
    assert json.loads(file.schema_arrow.metadata[b"bottleneck"])["classes"] == ["cat", "dog"]


def test_float16_is_widened_unless_it_is_asked_for(tmp_path: Path) -> None:
    values = spatial_store(tmp_path / "s.h5", 3, (4,), dtype="float16")
    store = FeatureStore.open(tmp_path / "s.h5")
    for wanted, kind in ((False, "float"), (True, "halffloat")):
        out = tmp_path / f"{kind}.parquet"
        write_parquet(store, out, float16=wanted)
        column = pq.read_table(out)["out_relu"]
        assert str(column.type.value_type) == kind
        np.testing.assert_array_equal(np.array(column.to_pylist(), np.float16), values)


def test_views_are_rows_and_labels_those_of_the_labels_file(tmp_path: Path) -> None:
    from pipeline.labels.file import append_decisions, new_decision

    images = scan(paint_folder(tmp_path / "images", {"cat": 3, "dog": 2}))
    options = ExtractionOptions(views=2, augment="flip")
    Extraction(images, NumpyNetwork(), tmp_path / "s.h5", options).run()  # type: ignore[arg-type]
    store = FeatureStore.open(tmp_path / "s.h5")
    labels: Any = tmp_path / "labels.csv"
    sha256 = store.images.sha256[0].tobytes().hex()
    append_decisions(
        labels, [new_decision(sha256=sha256, path=store.images.paths[0], value="dog", earlier="cat", by="me")]
    )
    document = to_parquet(tmp_path / "s.h5", tmp_path / "s.parquet", views="all", labels=labels)
    assert document["rows"] == 10
    table = pq.read_table(tmp_path / "s.parquet")
    assert table["view"].to_pylist() == [0, 1] * 5
    assert table["label"].to_pylist()[:4] == ["dog", "dog", "cat", "cat"]
    np.testing.assert_array_equal(np.array(table["last.avg"].to_pylist()).reshape(5, 2, 3), store.array("last.avg"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[1, 0], [255, 1]], np.uint8), {"t.a": [True, None], "t.b": [False, True]}),
        (np.array([[1.5, np.nan], [-2.0, 3.0]]), {"t.a": [1.5, -2.0], "t.b": [None, 3.0]}),
    ],
)
def test_targets_are_columns(tmp_path: Path, values: np.ndarray, expected: dict[str, list[Any]]) -> None:
    spatial_store(tmp_path / "s.h5", 2, (4,), target=Target("t", ("a", "b"), values))
    write_parquet(FeatureStore.open(tmp_path / "s.h5"), tmp_path / "s.parquet")
    assert pq.read_table(tmp_path / "s.parquet", columns=["t.a", "t.b"]).to_pydict() == expected


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    spatial_store(tmp_path / "s.h5", 1, (4,))
    store = FeatureStore.open(tmp_path / "s.h5")
    (tmp_path / "there.parquet").write_text("mine")
    with pytest.raises(ConfigurationError, match="exists already"):
        write_parquet(store, tmp_path / "there.parquet")
    with pytest.raises(ConfigurationError, match=r"expected a file that ends in \.parquet"):
        to_parquet(tmp_path / "s.h5", tmp_path / "s.csv")
    with pytest.raises(ConfigurationError, match="--views: received '3'"):
        to_parquet(tmp_path / "s.h5", tmp_path / "s.parquet", views="3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.h5", "there.parquet"]
