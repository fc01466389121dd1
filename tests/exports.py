"""Trained runs that the tests of exported models start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from photographs import some_cats_and_dogs, weights_of

from features.extraction.extraction import extract_features
from pipeline.heads.promises import NOTHING, Asked
from pipeline.stages.train_head import train_head


@pytest.fixture(scope="module")
def exported_runs(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("export")
    pictures = some_cats_and_dogs(assets, folder / "pictures", 48)
    weights = weights_of(assets, "mobilenet_v2_1.0_224")
    options = {"backbone": "mobilenetv2", "weights": weights, "image_size": (160, 160)}
    store = extract_features(pictures, folder / "f.h5", **options)
    # barely trained and strongly penalised: a head that is certain would hide what differs
    params: dict[str, dict[str, Any]] = {"dropout-linear": {"epochs": 3}, "logistic": {"C": 3e-4}, "knn": {}}
    asked = {"logistic": Asked(0.6)}  # whose promise every format carries
    return {
        head: train_head(store, head, runs=folder / "runs", params=values, asked=asked.get(head, NOTHING)).folder
        for head, values in params.items()
    }
