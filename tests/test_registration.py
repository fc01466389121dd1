"""A new kind of head, export format or network is one registration, and goes through the whole pipeline."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import SIZE, TinyWorld, paint_noise, tiny_world
from test_train_head import make_store

from features.extraction.extraction import extract_features
from features.networks.backbones import Backbone
from features.networks.finding import FINDERS
from pipeline.config import HeadFile, Settings
from pipeline.exporting.formats import FORMATS, Format, Runtime, Writer
from pipeline.heads import kinds
from pipeline.heads.head import Head
from pipeline.heads.kinds import can_finetune, head_of, register
from pipeline.heads.prepared import Prepared
from pipeline.presets import PRESETS, Preset
from pipeline.reporting.reproduce import commands
from pipeline.runs.board import leaderboard
from pipeline.runs.folder import Run
from pipeline.scores.metrics import softmax
from pipeline.stages.predict import predict
from pipeline.stages.train_head import train_head
from pipeline.sweeps.sweep import run_sweep
from pipeline.sweeps.sweep_file import SweepFile, SweepHead

tiny = pytest.fixture(scope="module", name="tiny")(lambda tiny_world: tiny_world)
__all__ = ["tiny_world"]


# -------------------------------------------------------------------------------------------------- a kind of head
class CentroidParameters(Settings):
    """``sharpness`` multiplies the negative squared distances."""

    sharpness: float = 1.0


class CentroidHead(Head):
    """Softmax of negative squared distances to the mean row of each class."""

    parameters: CentroidParameters
    files = ("head.json", "centres.npz")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.centres = np.zeros((0, 0))

    def warm_up(self) -> None:
        pass

    @classmethod
    def restored(cls, path: Path, stored: HeadFile) -> tuple[str, Settings]:
        return "centroid", CentroidParameters()

    @property
    def parameter_count(self) -> int | None:
        return self.centres.size

    def as_dense(self) -> Head:
        raise NotImplementedError

    def _train(self, data: Prepared, progress: Any) -> dict[str, list[float]]:
        rows = np.concatenate([piece for _, piece in data.train.pieces()])
        self.centres = np.stack([rows[data.y == k].mean(axis=0) for k in range(len(self.classes))])
        return {"rows": [float(len(rows))]}

    def _probabilities(self, Z: np.ndarray) -> np.ndarray:
        distances = np.square(Z[:, None] - self.centres).mean(axis=2)
        return softmax(-self.parameters.sharpness * distances)

    def _network(self) -> Any:
        raise NotImplementedError

    def _save_weights(self, folder: Path) -> dict[str, Any]:
        np.savez(folder / "centres.npz", centres=self.centres)
        return {}

    def _load_weights(self, folder: Path, stored: HeadFile, *, trust: bool) -> None:
        with np.load(folder / "centres.npz", allow_pickle=False) as archive:
            self.centres = archive["centres"]


@pytest.fixture
def centroid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))
    monkeypatch.setattr(kinds, "PRESETS", PRESETS)
    register("centroid", Preset("centroid", CentroidParameters()), CentroidHead)
    monkeypatch.setitem(PRESETS, "centroid", PRESETS.pop("centroid"))  # taken out again afterwards


@pytest.mark.slow
@pytest.mark.usefixtures("centroid", "without_plots")
@pytest.mark.parametrize("parallel", [True, False])
def test_a_third_kind_of_head_is_trained_swept_saved_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: bool
) -> None:
    monkeypatch.setattr(CentroidHead, "parallel", parallel)
    store = make_store()
    alone = train_head(store, "centroid", runs=tmp_path / "alone", params={"sharpness": 0.5})
    assert train_head(store, "centroid", runs=tmp_path / "alone", params={"sharpness": 0.5}).cached
    heads = [SweepHead(head="centroid", grid={"sharpness": [0.5, 2.0]}), SweepHead(head="ridge", grid={})]
    result = run_sweep([store], SweepFile(version=1, heads=heads), runs=tmp_path / "sweep", jobs=1, folds=3)
    assert (result.trained, result.failed, len(result.board)) == (3, [], 3)
    run = Run.open(tmp_path / "sweep" / alone.run_id)
    assert run.metrics["validation"] == alone.metrics["validation"]
    assert run.metrics["cv"]["folds"] == 3
    X, y = store.load("validation", "last.avg")
    head = head_of(run)
    assert isinstance(head, CentroidHead)
    assert (head.predict_proba(X).argmax(axis=1) == y).mean() == run.metrics["validation"]["accuracy"] > 0.5
    assert {row["settings"] for row in leaderboard(tmp_path / "sweep") if row["head"] == "centroid"} == {
        "sharpness=0.5",
        "sharpness=2.0",
    }
    assert not can_finetune(run)
    assert any("--head centroid --param sharpness=0.5" in line for line in commands(run))


def test_a_head_that_a_sweep_cannot_place_does_not_exist() -> None:
    """Every head is either trained by processes side by side or in this one: there is no third answer."""
    assert {type(kind.parallel) for kind in (*kinds.KINDS.values(), kinds.EstimatorHead)} == {bool}


# ------------------------------------------------------------------------------------------------ an export format
def bundle(model: Any, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        model.save(path.with_suffix(".keras"))
        archive.write(path.with_suffix(".keras"), "model.keras")
        path.with_suffix(".keras").unlink()


def open_bundle(path: Path) -> Runtime:
    import keras

    folder = path.with_suffix(".opened")
    with zipfile.ZipFile(path) as archive:
        archive.extract("model.keras", folder)
    model = keras.saving.load_model(folder / "model.keras", compile=False)
    return lambda images: np.asarray(model(images, training=False))


def put(path: Path, text: str) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("card.json", text)


def get(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        return archive.read("card.json").decode()


@pytest.mark.slow
def test_a_new_export_format_is_proven_and_predicts(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.exporting.artefacts import open_artefact
    from pipeline.stages import export as stage

    row = Format(
        "bundle", ".bundle", "", (), {"keras": Writer(bundle)}, open_bundle, put, get, tolerance=1e-5, note="a zip"
    )
    monkeypatch.setitem(FORMATS, "bundle", row)

    def run_here(made: Path, probes: Any) -> np.ndarray:  # another process would not know the registration
        artefact = open_artefact(made)
        return np.concatenate([artefact(probe.pixels[None]) for probe in probes])

    monkeypatch.setattr(stage, "run_elsewhere", run_here)
    document = stage.export(tiny.run, format="bundle", out=tmp_path / "m.bundle", images=tiny.images)
    assert (document["artefact"], document["tolerance"], document["note"]) == ("bundle", 1e-5, "a zip")
    assert document["parity_gap"] <= 1e-5
    for model, name in ((tmp_path / "m.bundle", "exported.jsonl"), (tiny.run, "run.jsonl")):
        predict(model, tiny.images, out=tmp_path / name)
    exported, own = (
        [list(json.loads(line)["probabilities"].values()) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("exported.jsonl", "run.jsonl")
    )
    np.testing.assert_allclose(exported, own, atol=2e-5)


# ------------------------------------------------------------------------------------------------ a kind of network
@dataclasses.dataclass(frozen=True)
class Striped(Backbone):
    """A network that is built by a function and drawn at random: ``striped:FILTERS``."""

    filters: int

    def build(self, size: tuple[int, int]) -> Any:
        import keras

        image = keras.Input((*size, 3), name="image")
        tensor = keras.layers.Rescaling(1 / 255, name="rescaling")(image)
        for number in (1, 2):
            tensor = keras.layers.Conv2D(self.filters, 3, 2, activation="relu", name=f"conv_{number}")(tensor)
        return keras.Model(image, tensor, name="striped")


@pytest.mark.slow
def test_a_new_kind_of_network_is_extracted_trained_finetuned_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.finetune import finetune

    def find(name: str) -> Backbone | None:
        kind, _, filters = name.partition(":")
        return Striped(f"striped-{filters}", "none", SIZE, filters=int(filters)) if kind == "striped" else None

    monkeypatch.setattr("features.networks.finding.FINDERS", [find, *FINDERS])
    images = paint_noise(tmp_path / "images")
    options = {"backbone": "striped:6", "weights": "random", "batch_size": 16}
    store = extract_features(images, tmp_path / "f.h5", **options)
    recipe = store.recipes["conv_2.avg"]
    assert (recipe.backbone, store.shape("conv_2.avg")[2:]) == ("striped-6", (6,))
    run = train_head(store, "dropout-linear", runs=tmp_path / "runs", params={"epochs": 3})
    document = predict(run.folder, images, out=tmp_path / "p.csv")
    assert (document["predicted"], document["unreadable"]) == (len(store), 0)
    tuned = finetune(run.folder, images, epochs=1, unfreeze="conv_2")
    assert tuned["parity_gap"] < 1e-4
    assert tuned["trainable_parameters"] == 6 * 6 * 9 + 6 + 7
