"""Exports that are refused, that differ from the run, or that find no room; and files that export did not make."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exports import exported_runs
from helpers import ROOT, listing

import pipeline.stages.export
from features.errors import (
    ConfigurationError,
    FormatVersionError,
    HeadError,
    ParityError,
    RunError,
    StoreError,
)
from pipeline.exporting.artefacts import Card, open_artefact, write_card
from pipeline.exporting.formats import FORMATS, Writer, convert, find_format
from pipeline.exporting.keras_graph import KerasAssembled
from pipeline.runs.folder import Run
from pipeline.stages.export import export

pytestmark = pytest.mark.slow

runs = exported_runs


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

    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], writers={"keras": Writer(full)}))
    with pytest.raises(StoreError, match=r"model\.onnx: could not be written \(No space left on device.*Make room"):
        export(runs["logistic"], format="onnx", out=tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_other_probabilities_name_the_layer_and_leave_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(pipeline.stages.export.ASSEMBLERS, "keras", disturbed("block_12_depthwise"))
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

    monkeypatch.setattr(pipeline.stages.export, "convert", convert_wrongly)
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
    with pytest.raises(
        ConfigurationError, match=r"ending in \.keras for keras; for a name ending in \.onnx choose format onnx"
    ):
        export(run, format="keras", out=tmp_path / "model.onnx")
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(ConfigurationError, match=r"there\.onnx exists; remove it"):
        export(run, format="onnx", out=tmp_path / "there.onnx")
    with pytest.raises(HeadError, match=r"'knn' is neither linear nor a network.*logistic, ridge, linear-svm"):
        export(runs["knn"], format="onnx", out=tmp_path / "model.onnx")
    with pytest.raises(RunError, match=r"another network \(weights: [0-9a-f]{64} -> [0-9a-f]{64}\)"):
        export(run, format="onnx", out=tmp_path / "model.onnx", weights="random")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"onnxruntime is not installed: pip install .*\[export\]"):
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
            r"install tensorflow and pip install .*\[export\]'?, and set KERAS_BACKEND=tensorflow",
        ):
            find_format(name).check_writer("keras", "jax")
    with pytest.raises(ConfigurationError, match=r"tf2onnx is not installed: pip install .*\[export\]"):
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
        archive.writestr("bottleneck.json", json.dumps({"format": 9}))
    with pytest.raises(FormatVersionError, match="format 9 is not known here"):
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
