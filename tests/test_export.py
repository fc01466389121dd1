"""Exported models: every format by its own runtime, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import ROOT, listing
from PIL import Image
from test_endtoend import CATS_DOGS, some_cats_and_dogs, weights_of

import pipeline.export
from features.errors import (
    ConfigurationError,
    FormatVersionError,
    HeadError,
    ParityError,
    RunError,
    StoreError,
)
from features.extraction.extraction import extract_features
from features.recipe import PixelRule
from pipeline.export import Probe, export, predicted
from pipeline.exporting.artefacts import Card, full_pixels, open_artefact, read_card, write_card
from pipeline.exporting.formats import FORMATS, convert, find_format
from pipeline.exporting.keras_graph import KerasAssembled, assemble
from pipeline.heads.kinds import head_of
from pipeline.predict import predict
from pipeline.runs.folder import Run
from pipeline.train_head import train_head
from pipeline.tuning.endtoend import network_of

pytestmark = pytest.mark.slow


# -------------------------------------------------------------------------------------------------- whole models
@pytest.fixture(scope="module")
def runs(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("export")
    pictures = some_cats_and_dogs(assets, folder / "pictures", 48)
    weights = weights_of(assets, "mobilenet_v2_1.0_224")
    options = {"backbone": "mobilenetv2", "weights": weights, "image_size": (160, 160)}
    store = extract_features(pictures, folder / "f.h5", **options)
    # barely trained and strongly penalised: a head that is certain would hide what differs
    params: dict[str, dict[str, Any]] = {"dropout-linear": {"epochs": 3}, "logistic": {"C": 3e-4}, "knn": {}}
    return {
        head: train_head(store, head, runs=folder / "runs", params=values).folder for head, values in params.items()
    }


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


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_gives_the_probabilities_of_predict_by_its_own_runtime(
    runs: dict[str, Path], photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    tolerance, suffix = 1e-3 if name == "litert" else 1e-4, find_format(name).suffix
    (tmp_path / "few").mkdir()
    for path in sorted(photos.iterdir())[::7]:
        shutil.copy(path, tmp_path / "few")
    asked = {"logistic": (photos, 50)}
    if name == "onnx":  # converters see the same layers in both heads
        asked = {"dropout-linear": (tmp_path / "few", 8), **asked}
    for head, (images, count) in asked.items():
        out = tmp_path / f"{head}{suffix}"
        document = export(runs[head], format=name, out=out, images=images)
        assert (document["images"], document["classes"]) == (count, ["cats", "dogs"])
        assert document["parity_gap"] <= document["tolerance"] == tolerance
    assert {path.name for path in tmp_path.iterdir()} == {
        "few",
        *(f"{head}{suffix}" for head in asked),
    }  # and no temporary name
    (tmp_path / "elsewhere").mkdir()
    found, card = read_card(Path(shutil.move(out, tmp_path / "elsewhere" / out.name)))
    run = Run.open(runs["logistic"])
    assert (found.name, card.run, card.classes, card.recipe) == (name, run.run_id, run.classes, run.recipe.to_dict())
    capfd.readouterr()
    assert open_artefact(tmp_path / "elsewhere" / out.name)(np.zeros((1, 40, 30, 3), np.uint8)).shape == (1, 2)
    assert capfd.readouterr().err == ""  # runtimes announce themselves from C++


def test_an_artefact_predicts_batches_and_files_and_refuses_what_is_no_image(
    runs: dict[str, Path], photos: Path, probes: list[Probe], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    export(runs["logistic"], format="onnx", out=tmp_path / "model.onnx")
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
    runs: dict[str, Path], probes: list[Probe], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    run = Run.open(runs["logistic"])
    model = assemble(network_of(run), run.recipe, head_of(run).as_dense())  # type: ignore[arg-type]
    convert(model, "keras", find_format("keras"), tmp_path / "model.keras")
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


def disturbed(layer: str) -> Any:
    def assemble_wrongly(*arguments: Any) -> Any:
        whole = KerasAssembled.join(*arguments)
        found = whole.model.get_layer("backbone").get_layer(layer)
        found.set_weights([values + 0.1 for values in found.get_weights()])
        return whole

    return assemble_wrongly


def test_a_full_disk_is_not_blamed_on_the_network(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], write={"keras": full}))
    with pytest.raises(StoreError, match=r"model\.onnx: could not be written \(No space left on device.*Make room"):
        export(runs["logistic"], format="onnx", out=tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_other_probabilities_name_the_layer_and_leave_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(pipeline.export.ASSEMBLERS, "keras", disturbed("block_12_depthwise"))
        with pytest.raises(
            ParityError, match=r"assembled network: .*first layer that differs is 'block_12_depthwise'"
        ) as caught:
            export(runs["logistic"], format="onnx", out=tmp_path / "model.onnx")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []

    def convert_wrongly(model: Any, kind: str, row: Any, path: Path) -> None:
        kernel = model.get_layer("backbone").get_layer("block_3_expand")
        kernel.set_weights([values * 1.5 for values in kernel.get_weights()])
        convert(model, kind, row, path)

    monkeypatch.setattr(pipeline.export, "convert", convert_wrongly)
    with pytest.raises(ParityError, match=r"keras, loaded by its own runtime: .*differs is 'block_3_expand'"):
        export(runs["logistic"], format="keras", out=tmp_path / "model.keras")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- refusals
def test_bad_requests_are_refused_before_any_work(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["logistic"]
    with pytest.raises(ConfigurationError, match=r"received 'onx'.*did you mean 'onnx'"):
        export(run, format="onx", out=tmp_path / "model.onnx")
    with pytest.raises(ConfigurationError, match=r"model\.h5, expected a name ending in \.keras for keras"):
        export(run, format="keras", out=tmp_path / "model.h5")
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(ConfigurationError, match=r"there\.onnx exists; remove it"):
        export(run, format="onnx", out=tmp_path / "there.onnx")
    with pytest.raises(HeadError, match=r"'knn' is neither linear nor a network.*logistic, ridge, linear-svm"):
        export(runs["knn"], format="onnx", out=tmp_path / "model.onnx")
    with pytest.raises(RunError, match=r"another network \(weights: [0-9a-f]{64} -> [0-9a-f]{64}\)"):
        export(run, format="onnx", out=tmp_path / "model.onnx", weights="random")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"onnxruntime is not installed; pip install .*\[export\]"):
        export(run, format="onnx", out=tmp_path / "model.onnx")
    assert listing(tmp_path) == ["there.onnx"]
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"


def test_what_a_converter_needs_is_asked_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("tensorflow", "tf2onnx") else "there")
    find_format("onnx").require()  # an artefact runs without what made it
    for name, kind, backend in (
        *(("keras", "keras", backend) for backend in ("tensorflow", "jax", "torch")),
        *((name, "onnx", backend) for name in ("onnx", "openvino") for backend in ("tensorflow", "jax")),
        *((name, "keras", "tensorflow") for name in ("litert", "openvino")),
    ):
        find_format(name).check_writer(kind, backend)
    for name in ("saved_model", "onnx", "litert", "openvino"):
        with pytest.raises(
            ConfigurationError,
            match=rf"format {name}: the conversion needs TensorFlow, but Keras runs on jax. Use --format keras, or pip "
            r"install 'bottleneck-features\[tensorflow,export\]' and set KERAS_BACKEND=tensorflow",
        ):
            find_format(name).check_writer("keras", "jax")
    with pytest.raises(ConfigurationError, match=r"tf2onnx is not installed; pip install 'bottleneck-features\[export"):
        find_format("onnx").check_writer("keras", "tensorflow")
    with pytest.raises(ConfigurationError, match=r"is an ONNX file\. Use --format onnx or openvino"):
        find_format("litert").check_writer("onnx", "jax")


def test_files_that_export_did_not_make_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    import keras

    with pytest.raises(RunError, match="is no exported model"):
        open_artefact(runs["logistic"])
    (tmp_path / "text.keras").write_text("text")
    with pytest.raises(RunError, match="holds no card with classes"):
        open_artefact(tmp_path / "text.keras")
    image = keras.Input((4,))
    keras.Model(image, keras.layers.Dense(2)(image)).save(tmp_path / "other.keras")
    with pytest.raises(RunError, match="holds no card with classes and recipe, so bottleneck export did not make it"):
        open_artefact(tmp_path / "other.keras")
    recipe = Run.open(runs["logistic"]).recipe.to_dict()
    values = {"run": "r", "classes": ("a", "b", "c"), "recipe": recipe, "input": "", "output": "", "packages": {}}
    write_card(tmp_path / "other.keras", Card(artefact="keras", **values))
    with pytest.raises(RunError, match="keras cannot run it"):
        open_artefact(tmp_path / "other.keras")(np.zeros((1, 4, 4, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "later.keras", "w") as archive:
        archive.writestr("bottleneck.json", json.dumps({"format": 2}))
    with pytest.raises(FormatVersionError, match="format 2 is not known here"):
        open_artefact(tmp_path / "later.keras")


# ---------------------------------------------------------------------------------------------- files of strangers
def tiny_onnx(path: Path, **changes: Any) -> Path:
    """An ONNX model that gives the constant probabilities 0.25 and 0.75."""
    from onnx import TensorProto, helper, numpy_helper

    rows = numpy_helper.from_array(np.array([[0.25, 0.75]], np.float32), "rows")
    if changes.get("external"):
        rows.data_location = TensorProto.EXTERNAL
        rows.external_data.add(key="location", value="rows.bin")
        rows.ClearField("raw_data")
    graph = helper.make_graph(
        [helper.make_node("Identity", ["rows"], ["probabilities"])],
        "constant",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [None, None, None, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [1, 2])],
        [rows],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


_QUIET_RUNTIME = """
import json, os, subprocess, sys, time
from pathlib import Path
import numpy as np
from pipeline.exporting.formats import FORMATS
rows = FORMATS["onnx"].load(Path(sys.argv[1]))(np.zeros((1, 2, 2, 3), np.uint8))
child = "import onnxruntime, sys, time; onnxruntime.InferenceSession(sys.argv[1]); time.sleep(0.5)"
subprocess.run([sys.executable, "-c", child, sys.argv[1]], check=True)
links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
opened = [os.readlink(link) for link in links if os.path.lexists(link)]
print(json.dumps({"rows": rows.tolist(), "sockets": [name for name in opened if name.startswith("socket")]}))
"""


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """Neither here nor in a child process: no socket, no device id in home, no session in the temporary folder."""
    model = tiny_onnx(tmp_path / "m.onnx")
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    environment.pop("XDG_CACHE_HOME", None)
    result = subprocess.run(
        [sys.executable, "-c", _QUIET_RUNTIME, str(model)],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"rows": [[0.25, 0.75]], "sockets": []}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["home", "m.onnx", "temporary"]


def test_an_onnx_file_that_reads_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.bin").write_bytes(np.array([[0.5, 0.5]], np.float32).tobytes())
    model = tiny_onnx(tmp_path / "m.onnx", external=True)
    with pytest.raises(ValueError, match="it takes weights from another file, which is not followed"):
        FORMATS["onnx"].load(model)
    assert FORMATS["onnx"].load(tiny_onnx(tmp_path / "own.onnx"))(np.zeros((1, 2, 2, 3), np.uint8)).tolist() == [
        [0.25, 0.75]
    ]
