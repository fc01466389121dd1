"""Every preset on real features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import STRESS

from pipeline.heads.kinds import make_head
from pipeline.presets import PRESETS
from pipeline.scores.metrics import evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def features(assets: Path) -> tuple[np.ndarray, ...]:
    """Training rows and labels, validation rows and labels."""
    import keras
    from PIL import Image

    model = keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, include_top=False, weights=None, pooling="avg")
    model.load_weights(assets / "weights" / "mobilenet_v2_0.35_224_no_top.weights.h5")
    parts: list[np.ndarray] = []
    for split, count in (("train", 200), ("validation", 100)):
        folder = assets / "images" / "cats_and_dogs_filtered" / split
        paths = [path for name in ("cats", "dogs") for path in sorted((folder / name).iterdir())[:count]]
        pixels = [np.asarray(Image.open(path).convert("RGB").resize((96, 96)), np.float32) for path in paths]
        parts += [model.predict(np.stack(pixels) / 127.5 - 1, verbose=0), np.repeat([0, 1], count).astype(np.int32)]
    return tuple(parts)


@pytest.mark.stress
@pytest.mark.parametrize("name", [name for name in PRESETS if STRESS or name != "mlp-1024-1024"])
def test_presets_reach_what_they_promise_on_real_features(name: str, features: tuple[np.ndarray, ...]) -> None:
    """MobileNetV2 0.35 features of 200 + 200 cats and dogs at 96 pixels: far from chance, with every head."""
    X, y, held_out, labels = features
    head = make_head(name, classes=("cats", "dogs"))
    head.fit(X, y, X_validation=held_out, y_validation=labels)
    assert evaluate(head.predict_proba(held_out), labels, head.classes)["accuracy"] > 0.8
