"""Exported models: every format by its own runtime, which predicts files and batches."""

from __future__ import annotations

import csv
import functools
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exports import exported_runs
from photographs import CATS_DOGS
from PIL import Image

import pipeline.stages.export
from features.errors import (
    ConfigurationError,
)
from features.recipe import PixelRule
from pipeline.exporting.artefacts import full_pixels, open_artefact, read_card
from pipeline.exporting.formats import FORMATS, convert, find_format, to_onnx
from pipeline.exporting.keras_graph import KerasAssembled
from pipeline.heads.kinds import head_of
from pipeline.runs.folder import Run
from pipeline.stages.export import Probe, export, predicted
from pipeline.stages.predict import predict
from pipeline.tuning.endtoend import network_of

pytestmark = pytest.mark.slow

runs = exported_runs


@pytest.fixture(scope="module")
def photos(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 real pictures of 50 sizes: as they are, tiny, narrow, large, and grey."""
    folder = tmp_path_factory.mktemp("photos")
    files = [
        assets / CATS_DOGS / "train" / kind / f"{kind[:-1]}.{number}.jpg"
        for kind in ("cats", "dogs")
        for number in range(100, 125)
    ]
    for index, file in enumerate(files):
        if index < 38:
            shutil.copy(file, folder)
            continue
        picture = Image.open(file)
        sizes = [(9, 12), (1, 40), (160, 160), (1600, 1200), (90, 700), (2000, 333), (33, 31), (161, 159)]
        if index < 46:
            picture = picture.resize(sizes[index - 38])
        else:
            picture = picture.convert("L")
        picture.save(folder / f"{file.stem}.{picture.width}x{picture.height}.png")
    return folder


@pytest.fixture(scope="module")
def probes(photos: Path) -> list[Probe]:
    found = [Probe(path.name, full_pixels(path.read_bytes(), PixelRule(160, 160))) for path in sorted(photos.iterdir())]
    assert len(found) == 50
    assert len({probe.pixels.shape for probe in found}) > 35
    return found


@pytest.fixture(scope="module")
def expected(runs: dict[str, Path], photos: Path) -> dict[str, np.ndarray]:
    """What ``predict`` says of the files, in the order of their names."""
    found = {}
    for head in ("dropout-linear", "logistic"):
        predict(runs[head], photos, stream=(text := io.StringIO()))
        rows = list(csv.DictReader(text.getvalue().splitlines()))
        assert [row["file"] for row in rows] == sorted(path.name for path in photos.iterdir())
        found[head] = np.array([[float(row["cats"]), float(row["dogs"])] for row in rows])
        assert np.ptp(found[head][:, 0]) > 0.5  # nothing passes because all is the same
        assert np.mean(np.abs(found[head][:, 0] - 0.5) < 0.45) > 0.8  # nor because all is certain
    return found


def test_the_reference_of_the_gate_is_what_predict_says(
    runs: dict[str, Path], probes: list[Probe], expected: dict[str, np.ndarray]
) -> None:
    for head, values in expected.items():
        run = Run.open(runs[head])
        received = predicted(network_of(run), run.recipe, head_of(run), probes)
        np.testing.assert_allclose(received, values, atol=2e-6)  # predict writes six digits


@pytest.fixture(scope="module")
def joined(runs: dict[str, Path]) -> KerasAssembled:
    """Network and logistic head in one model, put together once."""
    run = Run.open(runs["logistic"])
    return KerasAssembled.join(network_of(run), run.recipe, head_of(run).as_dense())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(
    runs: dict[str, Path], photos: Path, joined: KerasAssembled, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """The logistic run exported in a format, once: the artefact, and the document about it."""

    @functools.cache
    def make(name: str) -> tuple[Path, dict[str, Any]]:
        out = tmp_path_factory.mktemp(name) / f"logistic{find_format(name).suffix}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(pipeline.stages.export.ASSEMBLERS, "keras", lambda *_: joined)
            return out, export(runs["logistic"], format=name, out=out, images=photos)

    return make


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_gives_the_probabilities_of_predict_by_its_own_runtime(
    runs: dict[str, Path],
    photos: Path,
    made: Callable[[str], tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    tolerance = 1e-3 if name == "litert" else 1e-4
    documents = [(made(name), 50)]
    if name == "onnx":  # converters see the same layers in both heads
        (tmp_path / "few").mkdir()
        for path in sorted(photos.iterdir())[::7]:
            shutil.copy(path, tmp_path / "few")
        (tmp_path / "out").mkdir()
        other = tmp_path / "out" / "dropout-linear.onnx"
        document = export(runs["dropout-linear"], format=name, out=other, images=tmp_path / "few")
        documents.append(((other, document), 8))
    for (out, document), count in documents:
        assert (document["images"], document["classes"]) == (count, ["cats", "dogs"])
        assert document["parity_gap"] <= document["tolerance"] == tolerance
        assert [path.name for path in out.parent.iterdir()] == [out.name]  # and no temporary name
    out, _ = made(name)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / out.name
    (shutil.copytree if out.is_dir() else shutil.copy)(out, moved)
    found, card = read_card(moved)
    run = Run.open(runs["logistic"])
    assert (found.name, card.run, card.classes, card.recipe) == (name, run.run_id, run.classes, run.recipe.to_dict())
    capfd.readouterr()
    opened = open_artefact(moved)
    assert opened(np.zeros((1, 40, 30, 3), np.uint8)).shape == (1, 2)
    assert opened.answers == run.metrics["answers"]
    assert run.metrics["answers"]["abstain"]["precision"] == 0.6
    assert capfd.readouterr().err == ""  # runtimes announce themselves from C++


def test_an_artefact_predicts_batches_and_files_and_refuses_what_is_no_image(
    made: Callable[[str], tuple[Path, dict[str, Any]]],
    photos: Path,
    probes: list[Probe],
    expected: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    shutil.copy(made("onnx")[0], tmp_path / "model.onnx")
    artefact = open_artefact(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [[value.name for value in side] for side in (graph.input, graph.output)] == [["images"], ["probabilities"]]
    assert artefact.classes == ("cats", "dogs")
    pair = np.stack([probes[0].pixels, probes[0].pixels[::-1]])
    np.testing.assert_allclose(artefact(pair), np.concatenate([artefact(pair[:1]), artefact(pair[1:])]), atol=1e-6)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (30_000, 1)).save(tmp_path / "long.png")
    files = [*sorted(photos.iterdir())[:3], tmp_path / "broken.jpg", tmp_path / "long.png"]
    predict(tmp_path / "model.onnx", map(str, files), out=tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    received = [[float(row["cats"]), float(row["dogs"])] for row in rows[:3]]
    np.testing.assert_allclose(received, expected["logistic"][:3], atol=1e-4)
    assert [row["error"] for row in rows] == ["", "", "", "not-an-image", "too-large"]
    with pytest.raises(ConfigurationError, match=r"exported model, which cannot draw views.*Give the run"):
        predict(tmp_path / "model.onnx", photos, views=3, augment="flip")
    for wrong in (pair[0], pair.astype(np.float32), pair[..., :1], pair[:0]):
        with pytest.raises(ConfigurationError, match=r"expected uint8 \(n, height, width, 3\)"):
            artefact(wrong)
    with pytest.raises(ConfigurationError, match="height and width of at most 25905 pixels"):
        artefact(np.zeros((1, 1, 30_000, 3), np.uint8))


def test_a_keras_file_opens_without_this_project_and_ignores_training_mode(
    joined: KerasAssembled, probes: list[Probe], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    convert(joined.model, "keras", find_format("keras"), tmp_path / "model.keras")
    np.save(tmp_path / "pixels.npy", probes[0].pixels)
    code = (
        "import keras, numpy as np\n"
        "model = keras.saving.load_model('model.keras')\n"
        "images = np.load('pixels.npy')[None]\n"
        "print([np.asarray(model(images, training=mode))[0].tolist() for mode in (False, True)])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    for received in json.loads(done.stdout.splitlines()[-1]):
        np.testing.assert_allclose(received, expected["logistic"][0], atol=1e-4)


def test_the_exact_gelu_is_written_in_operations_of_onnx(tmp_path: Path) -> None:
    import keras
    import onnxruntime

    images = keras.Input((None, None, 3), dtype="uint8", name="images")
    maps = keras.layers.Conv2D(4, 3, activation="gelu")(keras.layers.Rescaling(1 / 127.5, -1)(images))
    model = keras.Model(images, keras.layers.GlobalAveragePooling2D()(keras.layers.Activation("gelu")(maps)))
    onnx.checker.check_model(made := to_onnx(model, "features"))
    assert [node.op_type for node in made.graph.node].count("Erf") == 2
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 8, 3), dtype=np.uint8)
    (found,) = onnxruntime.InferenceSession(made.SerializeToString()).run(["features"], {"images": pixels})
    np.testing.assert_allclose(found, keras.ops.convert_to_numpy(model(pixels)), atol=1e-6)
