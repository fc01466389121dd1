"""Heads on labels and numbers from stores that do not fit into memory, and with several views of each image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from targeted import labels_of, numbers_of, target_store, thirds

from features.errors import HeadError
from pipeline.runs.folder import Run, read_predictions
from pipeline.stages.train_head import train_head

pytestmark = pytest.mark.usefixtures("without_plots")


def predicted(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    found = read_predictions(Run.open(folder))
    return found.labels, found.probabilities


def test_a_head_that_needs_all_rows_says_which_do_not(tmp_path: Path) -> None:
    X, y = numbers_of(400)
    store = target_store(tmp_path / "t.h5", X, y, thirds(400), ("a", "b"))
    with pytest.raises(HeadError, match=r"needs all rows in memory.*piece by piece: ridge, knn, dense, dropout-linear"):
        train_head(store, "sklearn.linear_model.Lasso", runs=tmp_path / "runs", memory=2_000)
    with pytest.raises(HeadError, match=r"the products of 8 columns take 1\.5 kB, but only .* are left.*--memory"):
        train_head(store, "ridge", runs=tmp_path / "runs", memory=4_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "head", "name", "params"),
    [
        (labels_of, "logistic", "C", {}),
        (labels_of, "logistic", "C", {"C": 0.3, "class_weight": "balanced"}),
        (labels_of, "knn", "n_neighbors", {}),
        (numbers_of, "ridge", "alpha", {}),
        (numbers_of, "knn", "n_neighbors", {"n_neighbors": 7}),
    ],
)
def test_rows_that_stay_in_the_store_give_the_same_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any, head: str, name: str, params: dict[str, Any]
) -> None:
    """The same value is chosen, as the rows that are compared on are the same, and predictions are equal to 1e-5."""
    for module in ("pipeline.tasks.folds", "pipeline.scores.selection"):
        monkeypatch.setattr(f"{module}.SEARCH_ROWS", 100)
    monkeypatch.setattr("pipeline.heads.models.columns.WORKING", 4000)  # neighbours are looked for in several parts
    monkeypatch.setattr("pipeline.heads.streaming.READ_BYTES", 8000)
    X, y = made(2000, unknown=0.1)
    views = np.stack([X, X + 0.1], axis=1)
    store = target_store(tmp_path / "t.h5", views, y, thirds(2000), [f"c{k}" for k in range(y.shape[1])])
    whole = train_head(store, head, runs=tmp_path / "whole", params=params)
    pieces = train_head(store, head, runs=tmp_path / "pieces", params=params, memory=100_000)
    assert (whole.streamed, pieces.streamed) == (False, True)
    chosen = [json.loads((run.folder / "head.json").read_text())["chosen"][name] for run in (whole, pieces)]
    assert chosen[0] == chosen[1] == params.get(name, chosen[0])
    (truth, expected), (also, found) = predicted(whole.folder), predicted(pieces.folder)
    np.testing.assert_array_equal(truth, also)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(("made", "score"), [(labels_of, "average_precision"), (numbers_of, "r2")])
def test_a_store_that_is_read_in_pieces_gives_as_good_a_head(tmp_path: Path, made: Any, score: str) -> None:
    X, y = made(2000, unknown=0.1)
    store = target_store(tmp_path / "t.h5", X, y, thirds(2000), [f"c{k}" for k in range(y.shape[1])])
    params = {"epochs": 6, "learning_rate": 0.05}
    whole = train_head(store, "dense", runs=tmp_path / "whole", params=params)
    pieces = train_head(store, "dense", runs=tmp_path / "pieces", params=params, memory=60_000)
    assert (whole.streamed, pieces.streamed) == (False, True)
    assert predicted(whole.folder)[0].shape == predicted(pieces.folder)[0].shape == (400, y.shape[1])
    found = [run.metrics["validation"][score] for run in (whole, pieces)]
    assert min(found) > 0.7
    assert abs(found[0] - found[1]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("made", "head"), [(labels_of, "logistic"), (numbers_of, "ridge")])
def test_each_view_of_an_image_has_its_targets(tmp_path: Path, made: Any, head: str) -> None:
    """Views that are copies weigh as much as the images: the same predictions as from one view at the same penalty a row."""
    X, y = made(200)
    columns = [f"c{k}" for k in range(y.shape[1])]
    one = target_store(tmp_path / "one.h5", X, y, thirds(200), columns)
    two = target_store(tmp_path / "two.h5", np.stack([X, X], axis=1), y, thirds(200), columns)
    single, double = ({"C": 0.3}, {"C": 0.15}) if head == "logistic" else ({"alpha": 1.0}, {"alpha": 2.0})
    left = train_head(one, head, runs=tmp_path / "runs", params=single)
    right = train_head(two, head, runs=tmp_path / "runs", params=double)
    assert Run.open(right.folder).config["features"]["views"] == 2
    np.testing.assert_allclose(predicted(left.folder)[1], predicted(right.folder)[1], rtol=1e-4, atol=1e-5)
