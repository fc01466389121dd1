"""What half precision costs: the figures that are kept are those of the images compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import save_network
from helpers import as_engine, call_pipeline, paint, paint_folder, recipe

from features.extraction.precision import check_precision, some_rows
from features.recipe import Recipe
from features.sources.scan import scan


@dataclasses.dataclass(frozen=True)
class Network:
    """Means of the channels; in half precision 10 % too large."""

    recipes: tuple[Recipe, ...]
    engine_name: str = "openvino"
    own_engine: str = "keras"
    asked: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def engine(self, recipes: tuple[Recipe, ...], *, batch_size: int, device: str) -> Any:
        exact = recipes[0].precision == "float32"
        assert self.engine_name == ("keras" if exact else "openvino")

        def infer(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            self.asked.append((recipes[0].precision, len(batch)))
            means = batch.astype(np.float32).mean(axis=(1, 2))
            return {item.name: means * np.float32(1.0 if exact else 1.1) for item in recipes}

        return as_engine(infer)


def check(source: Path, count: int, **changes: Any) -> tuple[dict[str, Any], Network]:
    network = Network((recipe(**{"precision": "bfloat16:openvino", **changes}),))
    images = scan(source)
    readable = [row for row, path in enumerate(images.paths) if "bad" not in path]
    rows = some_rows(images.labels, readable, count)
    with ThreadPoolExecutor(2) as decoders:
        return check_precision(network, images, rows, decoders=decoders, batch_size=4), network  # type: ignore[arg-type]


@pytest.mark.slow
def test_error_and_accuracy_are_those_of_the_images(tmp_path: Path) -> None:
    for number in range(20):
        paint(tmp_path / "dark" / f"{number}.png", (number, 0, 0))
        paint(tmp_path / "light" / f"{number}.png", (200 + number, 0, 0))
    (tmp_path / "dark" / "bad.png").write_bytes(b"")
    report, network = check(tmp_path, 10)
    found = report["last.avg"]
    assert found["images"] == 10
    assert found["relative_error"] == pytest.approx(0.1, rel=1e-5)
    assert (found["accuracy"], found["accuracy_float32"]) == (1.0, 1.0)
    assert sorted({precision for precision, _ in network.asked}) == ["bfloat16:openvino", "float32"]
    assert all(size <= 4 for _, size in network.asked)
    assert check(tmp_path, 1000)[0]["last.avg"]["images"] == 40
    assert check(tmp_path, 0)[0] == {}


def test_rows_are_labelled_readable_and_spread() -> None:
    labels = np.array([0, -1, 1, 1, 0, -1], np.int32)
    assert some_rows(labels, range(6), 2) == [0, 4]
    assert some_rows(labels, [1, 2, 3], 9) == [2, 3]
    assert some_rows(labels, [1, 5], 9) == [1, 5]  # none is labelled
    assert some_rows(labels, [], 9) == []


@pytest.mark.slow
def test_the_stored_type_counts_too(tmp_path: Path) -> None:
    paint_folder(tmp_path, {"cat": 6, "dog": 6})
    report, _ = check(tmp_path, 12, dtype="float16")
    rounded = report["last.avg"]["relative_error"]
    exact = check(tmp_path, 12)[0]["last.avg"]["relative_error"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=1e-3)


def test_without_two_classes_there_is_no_accuracy(tmp_path: Path) -> None:
    paint_folder(tmp_path / "one", {"cat": 6})
    assert check(tmp_path / "one", 6)[0]["last.avg"]["accuracy"] is None
    paint_folder(tmp_path / "single", {"cat": 1, "dog": 1})
    assert check(tmp_path / "single", 6)[0]["last.avg"]["accuracy"] is None


@pytest.mark.slow
def test_the_command_line_keeps_and_shows_what_was_found(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"cat": 10, "dog": 10})
    network = ("--backbone", save_network(tmp_path / "tiny.keras"), "--engine", "keras")
    half = ("--dtype", "float16", "--check-precision", 12)
    result = call_pipeline("extract", source, "--out", tmp_path / "f.h5", *network, *half)
    assert result.returncode == 0, result.stderr
    assert "differs from float32 by " in result.stdout
    document = json.loads(call_pipeline("inspect", tmp_path / "f.h5", "--json").stdout)
    kept = document["provenance"]["precision_check"]
    assert kept["relu_3.avg"]["images"] == 12
    assert 1e-6 < kept["relu_3.avg"]["relative_error"] < 2**-10
    again = call_pipeline("extract", source, "--out", tmp_path / "f.h5", *network, "--dtype", "float16")
    assert "file untouched" in again.stdout  # what was found stays
