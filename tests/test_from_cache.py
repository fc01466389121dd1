"""Fine-tuning from cached cut features: it follows end-to-end training, and refuses what does not belong to the run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import TinyWorld, save_network, tiny_world
from photographs import some_cats_and_dogs, weights_of

from features.errors import ConfigurationError, RunError
from features.extraction.extraction import extract_features
from pipeline.runs.folder import Run
from pipeline.stages.finetune import finetune
from pipeline.stages.train_head import train_head
from pipeline.tuning.cached import drawn_views
from pipeline.tuning.training import Tail

tiny = tiny_world
STEPS = {"epochs": 4, "patience": 0, "learning_rate": 1e-4, "batch_size": 24}


def test_the_view_of_an_epoch_depends_on_seed_epoch_and_content_only() -> None:
    sha256 = np.frombuffer(b"".join(hashlib.sha256(bytes([k])).digest() for k in range(250)), np.uint8).reshape(-1, 32)
    drawn = drawn_views(sha256, 4, seed=0, epoch=1)
    np.testing.assert_array_equal(drawn[::-1], drawn_views(sha256[::-1], 4, seed=0, epoch=1))
    assert set(Counter(drawn.tolist())) == {0, 1, 2, 3}
    assert min(Counter(drawn.tolist()).values()) > 40  # 62 expected of each
    for other in (drawn_views(sha256, 4, seed=0, epoch=2), drawn_views(sha256, 4, seed=1, epoch=1)):
        assert 0.15 < (other == drawn).mean() < 0.35  # a quarter by chance
    assert drawn[:6].tolist() == [0, 1, 2, 3, 1, 0]  # for ever: a resumed training draws the same


@pytest.fixture(scope="module")
def real(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """96 training and 48 validation cats and dogs, MobileNetV2 0.35 at 96 pixels, a weak head."""
    folder = tmp_path_factory.mktemp("real")
    weights = weights_of(assets, "mobilenet_v2_0.35_224")
    small = {"backbone": "mobilenetv2-0.35", "weights": weights, "image_size": (96, 96)}
    images = some_cats_and_dogs(assets, folder / "images", 48)
    store = extract_features(images, folder / "f.h5", **small)
    head = train_head(store, "dropout-linear", runs=folder / "runs", params={"epochs": 1, "learning_rate": 1e-3})
    return {"folder": folder, "small": small, "images": images, "run": head.folder}


def after_twelve_steps(
    real: dict[str, Any], name: str, images: Path | None, cache: Path | None
) -> tuple[list[np.ndarray], dict[str, list[float]]]:
    """Variables and history after the third of four epochs: there it is interrupted, and the checkpoint tells."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "epoch 4/4":
            raise KeyboardInterrupt

    runs = real["folder"] / f"runs-{name}"
    with pytest.raises(KeyboardInterrupt):
        finetune(real["run"], images, from_cache=cache, runs=runs, progress=interrupt, bn="affine", **STEPS)
    (path,) = runs.iterdir()
    with np.load(path) as file:
        state = json.loads(file["about"].tobytes())["state"]
        assert int(file["optimizer_0"]) == 12
        return [file[key] for key in file.files if key.startswith("variables")], state["history"]


@pytest.mark.slow
@pytest.mark.pain(4)
def test_pain_04_from_the_cache_follows_end_to_end_training(real: dict[str, Any]) -> None:
    folder, images = real["folder"], real["images"]
    expected, live = after_twelve_steps(real, "live", images, None)
    assert len(expected) == 14  # four kernels and gamma and beta behind each, kernel and bias of the head
    differences = {}
    for name, options in {"keras": {"engine": "keras"}, "half": {"dtype": "float16"}}.items():
        store = extract_features(images, folder / f"{name}.h5", layers=["boundary"], **options, **real["small"])
        received, history = after_twelve_steps(real, name, None, store.path)
        differences[name] = max(
            float(np.linalg.norm(one - other) / np.linalg.norm(other))
            for one, other in zip(received, expected, strict=True)
        )
        gaps = np.abs(np.subtract(history["val_accuracy"], live["val_accuracy"]))
        assert gaps.max() <= 1 / 48 + 1e-9, name
    assert differences["keras"] <= 1e-4
    assert 0 < differences["half"] <= 1e-2  # by another engine, and half precision


@pytest.mark.slow
def test_neither_images_nor_trunk_are_needed_and_images_prove_parity(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny.extract("cut.h5", layers=["boundary"])
    assert cache.names == ("relu_2",)
    proven = tiny.finetune(from_cache=cache.path, runs=tmp_path / "proven", epochs=2)
    away = tmp_path / "away"
    tiny.images.rename(away)
    monkeypatch.setattr("features.networks.keras_engine.KerasEngine.__call__", None)  # no trunk, no pixels
    alone = finetune(tiny.run, from_cache=cache.path, runs=tmp_path / "alone", epochs=2)
    away.rename(tiny.images)
    assert (alone["cut"], alone["parity_gap"] < 1e-5) == ("relu_2", True)
    assert alone["after"] == proven["after"]
    note = Run.open(alone["run"]).config["finetune"]["from_cache"]
    assert (note["fingerprint"], note["views"]) == (cache.recipes["relu_2"].fingerprint, 1)


@pytest.mark.slow
@pytest.mark.pain(14)
def test_pain_14_of_several_cached_views_each_epoch_sees_one(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny.extract("views.h5", layers=["relu_1", "relu_2"], views=3, augment="flip-rotation", seed=5)
    seen: dict[int, set[int]] = {}
    array = cache.array("relu_2")
    views = {hash(array[row, view].tobytes()): (row, view) for row in range(len(cache)) for view in range(3)}

    def step(tail: Any, features: np.ndarray, labels: np.ndarray, **options: Any) -> float:
        for one, label in zip(features, labels, strict=True):
            row, view = views[hash(one.tobytes())]
            assert (cache.images.labels[row], cache.images.splits[row]) == (label, 0)
            seen.setdefault(row, set()).add(view)
        return original(tail, features, labels, **options)

    original = Tail.step
    monkeypatch.setattr(Tail, "step", step)
    finetune(tiny.run, from_cache=cache.path, runs=tmp_path, epochs=6, patience=0, learning_rate=1e-6)
    assert len(seen) == 64
    assert sum(map(len, seen.values())) > 2.4 * 64  # of 3 views in 6 epochs, 2.74 are expected
    # An earlier layer does as well: the layers between are frozen.
    monkeypatch.undo()
    earlier = finetune(tiny.run, from_cache=tiny.extract("earlier.h5", layers=["relu_1"]).path, runs=tmp_path, epochs=1)
    assert (earlier["cut"], earlier["trainable_variables"]) == ("relu_1", 3)  # kernel, and the head


@pytest.mark.slow
def test_a_cache_that_does_not_belong_to_the_run_is_refused(tiny: TinyWorld, tmp_path: Path) -> None:
    def refused(cache: Path, message: str, kind: type[Exception] = RunError, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            finetune(tiny.run, from_cache=cache, runs=tmp_path / "runs", **options)

    resized = tiny.extract("resized.h5", layers=["relu_2"], resize="keras", fit="crop").path
    refused(
        resized,
        r"relu_2 has another recipe than the features of .* \(resize: antialias -> keras; fit: stretch -> crop\)",
    )
    other = save_network(tmp_path / "other.keras", seed=8)
    refused(
        tiny.extract("other.h5", layers=["relu_2"], backbone=str(other)).path,
        r"\(weights: [0-9a-f]{64} -> [0-9a-f]{64}\)",
    )
    pooled = tiny.extract("pooled.h5", layers=["relu_2"], pooling="avg").path
    refused(pooled, r"holds relu_2\.avg; expected relu_2 without pooling .*--layer relu_2", ConfigurationError)
    late = tiny.extract("late.h5", layers=["relu_3"]).path
    refused(late, r"holds relu_3; expected relu_2", ConfigurationError)
    good = tiny.extract("cut.h5", layers=["relu_2"]).path
    refused(good, "leave --augment out", ConfigurationError, augment="flip")
    refused(good, "leave --from-cache out", ConfigurationError, scratch=True)
    refused(good, "nothing to cache", ConfigurationError, unfreeze="all")
    fewer = tmp_path / "images"
    shutil.copytree(tiny.images, fewer)
    (fewer / "train" / "leaf" / "000.png").unlink()
    options = {"backbone": str(tiny.backbone), "layers": ["relu_2"]}
    cut = extract_features(fewer, tmp_path / "fewer.h5", **options).path
    refused(cut, r"images, labels or splits differ \(the split rule is the same; 87 rows\)")
    (fewer / "train" / "leaf").rename(fewer / "train" / "moss")
    cut = extract_features(fewer, tmp_path / "moss.h5", **options).path
    refused(cut, r"not those that dropout-linear-\w+ was trained on \('moss' is no class of the run\)")
    with pytest.raises(ConfigurationError, match="give --images, or --from-cache"):
        finetune(tiny.run, runs=tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []
