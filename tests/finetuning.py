"""A small world for the tests of stage three: images, a network of three convolutions, its store and a weak head."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from features.extraction.extraction import extract_features
from features.store.reader import FeatureStore

SIZE = 24
TRAIN, VALIDATION = 32, 12  # images per class


@dataclasses.dataclass(frozen=True)
class TinyWorld:
    """Where everything lies. The network's layers are ``conv_1 norm_1 relu_1`` to ``relu_3``; the boundary is ``relu_2``."""

    folder: Path
    images: Path
    backbone: Path
    store: Path
    run: Path

    def finetune(self, **options: Any) -> dict[str, Any]:
        """From the weak head, on the images."""
        from pipeline.stages.finetune import finetune

        return finetune(self.run, self.images, **options)

    def extract(self, name: str, **options: Any) -> FeatureStore:
        """Another store of the same images and network."""
        options = {"backbone": str(self.backbone), "batch_size": 16, **options}
        return extract_features(self.images, self.folder / name, **options)


def paint_noise(root: Path, classes: tuple[str, ...] = ("brick", "leaf")) -> Path:
    """Train and validation folders of noisy images; stripes of a class lie the other way round."""
    generator = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                stripes = 40 * np.sin(np.arange(SIZE) * generator.uniform(0.5, 1.2))
                pixels = 128 + (stripes[:, None] if number else stripes[None, :])[..., None]
                pixels = pixels + generator.normal(0, 40, (SIZE, SIZE, 3))
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.save(root / split / name / f"{index:03d}.png")
    return root


def save_network(path: Path, seed: int = 7) -> Path:
    """Three convolutions with BatchNorm, statistics not those of a new layer."""
    import keras

    keras.utils.set_random_seed(seed)
    layers = keras.layers
    tensor = image = keras.Input((SIZE, SIZE, 3), name="image")
    tensor = layers.Rescaling(1 / 127.5, -1, name="rescaling")(tensor)
    for number, (filters, strides) in enumerate(((8, 1), (12, 2), (16, 2)), 1):
        tensor = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False, name=f"conv_{number}")(tensor)
        tensor = layers.BatchNormalization(name=f"norm_{number}")(tensor)
        tensor = layers.ReLU(name=f"relu_{number}")(tensor)
    model = keras.Model(image, tensor, name="tiny")
    generator = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(generator.normal(0, 0.1, layer.moving_mean.shape))
            layer.moving_variance.assign(generator.uniform(0.5, 1.5, layer.moving_variance.shape))
    model.save(path)
    return path


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    from pipeline.stages.train_head import train_head

    folder = tmp_path_factory.mktemp("tiny")
    images, backbone = paint_noise(folder / "images"), save_network(folder / "tiny.keras")
    store = extract_features(images, folder / "f.h5", backbone=str(backbone), batch_size=16)
    params = {"epochs": 2, "learning_rate": 1e-3}
    run = train_head(store, "dropout-linear", runs=folder / "runs", params=params).folder
    return TinyWorld(folder, images, backbone, store.path, run)


CHILD = """
import sys, time
from pathlib import Path
from pipeline.stages.finetune import finetune
def progress(stage, done, total):
    print(stage, done, flush=True)
    if f"{{stage}} {{done}}".startswith(sys.argv[1]):
        time.sleep(600)  # until it is killed
document = finetune({run!r}, {images!r}, runs={runs!r}, progress=progress, **{settings!r})
print("resumed", document["resumed"], flush=True)
"""


def killed_training(
    run: Path, images: Path | None, runs: Path, settings: dict[str, Any], when: str
) -> tuple[int, str, str, str]:
    """Fine-tune in a process of its own, which is killed when it says ``when``: ``epoch 2/5``, or ``epoch 2/5 16``.

    Its exit code, the first epoch that it began, its last words, and what it wrote to stderr.
    """
    values = {"run": str(run), "images": images and str(images), "runs": str(runs), "settings": settings}
    command = [sys.executable, "-c", CHILD.format(**values), when]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first, last = "", ""
    for line in child.stdout:
        first = first or (line if line.startswith("epoch") else "")
        last = line
        if line.startswith(when):
            child.kill()
            break
    _, errors = child.communicate(timeout=500)
    return child.returncode, first, last, errors


def weights_of_run(folder: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a run, backbone and head, by name."""
    import keras

    from pipeline.heads.kinds import head_of
    from pipeline.runs.folder import Run
    from pipeline.tuning.endtoend import network_of

    run = Run.open(folder)
    found = {
        f"{layer.name}/{variable.name}": np.asarray(keras.ops.convert_to_numpy(variable))
        for layer in network_of(run).load().layers
        for variable in layer.weights
    }
    head = head_of(run).as_dense()
    return found | {f"head/{number}": np.asarray(part) for number, part in enumerate(head.weights)}
