"""Heads on labels and numbers from stores that do not fit into memory, and with several views of each image."""

from __future__ import annotations

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


@pytest.mark.parametrize(("made", "head"), [(labels_of, "logistic"), (numbers_of, "ridge"), (numbers_of, "knn")])
def test_a_head_that_needs_all_rows_says_which_do_not(tmp_path: Path, made: Any, head: str) -> None:
    X, y = made(400)
    store = target_store(tmp_path / "t.h5", X, y, thirds(400), [f"c{k}" for k in range(y.shape[1])])
    with pytest.raises(
        HeadError, match=rf"head '{head}' needs all rows in memory.*piece by piece: dense, dropout-linear"
    ):
        train_head(store, head, runs=tmp_path / "runs", memory=2_000)


@pytest.mark.slow
@pytest.mark.parametrize(("made", "score"), [(labels_of, "average_precision"), (numbers_of, "r2")])
def test_a_store_that_is_read_in_pieces_gives_as_good_a_head(tmp_path: Path, made: Any, score: str) -> None:
    X, y = made(4000, unknown=0.1)
    store = target_store(tmp_path / "t.h5", X, y, thirds(4000), [f"c{k}" for k in range(y.shape[1])])
    params = {"epochs": 8, "learning_rate": 0.03}
    whole = train_head(store, "dense", runs=tmp_path / "whole", params=params)
    pieces = train_head(store, "dense", runs=tmp_path / "pieces", params=params, memory=60_000)
    assert (whole.streamed, pieces.streamed) == (False, True)
    assert predicted(whole.folder)[0].shape == predicted(pieces.folder)[0].shape == (800, y.shape[1])
    found = [run.metrics["validation"][score] for run in (whole, pieces)]
    assert min(found) > 0.7
    assert abs(found[0] - found[1]) < 0.05


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
