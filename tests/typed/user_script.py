"""A script of a user. ``make check`` reads it strictly: what each public function gives has its type (never run)."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np

import features
import pipeline
from pipeline.api import results


def types() -> None:
    store = features.extract_features("photos", "f.h5", backbone="mobilenetv2", image_size=96)
    assert_type(store, features.FeatureStore)
    assert_type(store.classes, tuple[str, ...])
    trained = pipeline.train_head(store, "logistic", params={"C": 0.1})
    assert_type(trained, results.TrainedHead)
    assert_type(trained.cached, bool)
    assert_type(pipeline.train_heads([store], {"version": 1}).failed, list[dict[str, str]])
    board = pipeline.leaderboard()
    assert_type(board, results.Leaderboard)
    assert_type(board.chosen, str | None)
    assert_type(board.to_dict(), dict[str, Any])
    assert_type(pipeline.open_run("runs").classes, list[str])
    assert_type(pipeline.finetune("runs", "photos", bn="affine").advised, str)
    assert_type(pipeline.predict("runs", "photos").predictions, list[dict[str, Any]] | None)
    assert_type(pipeline.evaluate("runs", "photos", split="test").confusion, list[list[int]])
    assert_type(pipeline.export("runs", "model.onnx", format="onnx").parity_gap, float)
    assert_type(pipeline.report().out, str)
    assert_type(pipeline.audit(store)["outlier"].flag, np.ndarray)
    assert_type(pipeline.similar(store, "a.png").similarity, np.ndarray)
    assert_type(pipeline.suggest(store, n=5).scores, np.ndarray)
    assert_type(features.compare_networks("photos", ["vgg16"]).chosen, str | None)
    pipeline.train_head(store, pol="avg")  # type: ignore[call-arg]  # reported, so the options are known
    features.extract_features("photos", "f.h5", dtype="float8")  # type: ignore[arg-type]  # so are their values
