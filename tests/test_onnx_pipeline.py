"""What comes after the extraction by an ONNX file: heads, predictions, reports and exports, or a refusal with the way."""

from __future__ import annotations

import csv
import io
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import call_pipeline, listing, paint_folder
from onnx import TensorProto
from sklearn.base import clone
from test_onnx_networks import HOW, centre, convolved, network, normalised

import pipeline.stages.export
from features.errors import ConfigurationError, ParityError, RunError
from features.extraction.extraction import extract_features, prepare
from features.extraction.options import ExtractionOptions
from features.networks.onnx_engine import run as session_run
from features.networks.onnx_engine import session_of
from features.networks.onnx_graph import INPUT, PREFIX, Output, composed, outline_of, read_model
from features.networks.reference import reference_images, relative_difference
from features.recipe import Normalisation
from features.transformer import FeatureExtractor
from pipeline.exporting.artefacts import open_artefact
from pipeline.exporting.onnx_graph import OnnxAssembled
from pipeline.reporting.reproduce import commands
from pipeline.runs.folder import Run
from pipeline.stages.export import export
from pipeline.stages.predict import predict
from pipeline.stages.train_head import train_head

BYTES = {**HOW, "scale": 1, "mean": [0, 0, 0], "std": [1, 1, 1]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_folder(tmp_path_factory.mktemp("pipeline") / "images", {"cat": 10, "dog": 10})


def trained(
    folder: Path,
    images: Path,
    head: str = "logistic",
    params: dict[str, Any] | None = None,
    *,
    made: dict[str, Any] | None = None,
    how: dict[str, Any] = HOW,
    **options: Any,
) -> Path:
    """Make a network, features and a head that is not certain; return the folder of the run."""
    path = network(folder / "net.onnx", **(made or {}))
    (folder / "how.json").write_text(json.dumps(how))
    store = extract_features(
        images, folder / "f.h5", backbone=str(path), preprocess=str(folder / "how.json"), **options
    )
    weak = {"C": 3e-3} if head == "logistic" else {}
    return train_head(store, head, runs=folder / "runs", params={**weak, **(params or {})}).folder


def rows_of(run: Path, images: Path) -> np.ndarray:
    predict(run, images, stream=(text := io.StringIO()))
    return np.array([[float(row["cat"]), float(row["dog"])] for row in csv.DictReader(text.getvalue().splitlines())])


# -------------------------------------------------------------------------------------------------- export
@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "how", "options", "head", "params", "formats"),
    [
        ({"opset": 21}, HOW, {}, "logistic", {}, ("onnx", "openvino")),
        (
            {"end": "tokens"}, HOW, {"prefix_tokens": 1, "pooling": "cls+tokens"}, "dense",
            {"epochs": 5, "hidden": [8, 8], "activation": "silu"}, ("onnx",),
        ),
        (
            {"dtype": TensorProto.FLOAT16, "opset": 11}, HOW, {"pooling": "none"}, "dense",
            {"epochs": 2, "hidden": [8], "activation": "gelu"}, ("openvino",),
        ),
    ],
)  # fmt: skip
def test_a_network_from_an_onnx_file_is_exported_with_its_head(
    made: Any, how: Any, options: Any, head: str, params: Any, formats: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    run = trained(tmp_path / "made", images, head, params, made=made, how=how, **options)
    expected = rows_of(run, images)
    assert np.ptp(expected[:, 0]) > 1e-4  # nothing passes because all is the same
    assert np.all(np.abs(expected[:, 0] - 0.5) < 0.4999)  # nor because all is certain
    for name in formats:
        out = tmp_path / ("model.onnx" if name == "onnx" else "model")
        document = export(run, format=name, out=out, images=images)
        assert document["images"] == 20
        assert document["parity_gap"] <= 2e-6
        np.testing.assert_allclose(rows_of(out, images), expected, atol=3e-6)
        assert open_artefact(out)(np.zeros((2, 40, 30, 3), np.uint8)).shape == (2, 2)
    if "onnx" in formats:
        graph = onnx.load(tmp_path / "model.onnx").graph
        assert [[value.name for value in side] for side in (graph.input, graph.output)] == [
            ["images"],
            ["probabilities"],
        ]


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"), images)


@pytest.mark.slow
def test_what_differs_is_named_and_nothing_is_left(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disturbed(name: str, stage: str) -> None:
        def join(*arguments: Any) -> OnnxAssembled:
            whole = OnnxAssembled.join(*arguments)
            (tensor,) = (tensor for tensor in whole.model.graph.initializer if tensor.name == name)
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 3 + 1, name))
            return whole

        monkeypatch.setitem(pipeline.stages.export.ASSEMBLERS, "onnx", join)
        with pytest.raises(ParityError, match=f"assembled network: .*The first layer that differs is '{stage}'"):
            export(run, format="onnx", out=tmp_path / "model.onnx")

    disturbed("bias", "relu")
    disturbed(f"{PREFIX}head/constant_0", "probabilities")
    assert listing(tmp_path) == []


@pytest.mark.slow
def test_exports_that_cannot_be_are_refused_in_one_line(run: Path, images: Path, tmp_path: Path) -> None:
    for name, out in (("keras", "m.keras"), ("saved_model", "m"), ("litert", "m.tflite")):
        with pytest.raises(
            ConfigurationError, match=f"format {name}: .* is an ONNX file. Use --format onnx or openvino$"
        ):
            export(run, format=name, out=tmp_path / out)
    fixed = trained(tmp_path / "fixed", images, made={"batch": 2})
    with pytest.raises(
        ConfigurationError, match=r"net\.onnx: takes batches of 2 images only, but an artefact takes any"
    ):
        export(fixed, format="onnx", out=tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed"]


# -------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    "name", ["output_0", "images", "probabilities", INPUT, f"{PREFIX}Cast_1", f"{PREFIX}constant_0"]
)
def test_a_network_may_have_names_of_ours(name: str, tmp_path: Path) -> None:
    """As one that was exported here has, and as those of other exporters often do."""
    path = network(tmp_path / "net.onnx")
    model = onnx.load(path)
    for old in ("pixels", "conv", "relu", "kernel"):
        other = onnx.ModelProto()
        other.CopyFrom(model)
        for node in other.graph.node:
            for names in (node.input, node.output):
                names[:] = [name if one == old else one for one in names]
        for value in (*other.graph.input, *other.graph.output, *other.graph.initializer):
            value.name = name if value.name == old else value.name
        renamed = tmp_path / "renamed.onnx"
        onnx.save(other, renamed)
        read = read_model(renamed)
        layer = name if old == "relu" else "relu"
        made = composed(
            read, outline_of(renamed, read), [Output(layer, "avg", 4)], normalisation=Normalisation(), size=(8, 8)
        )
        batch = reference_images(8, 8, 2)
        (received,) = run_of(made, batch)
        plain = composed(
            model, outline_of(path, model), [Output("relu", "avg", 4)], normalisation=Normalisation(), size=(8, 8)
        )
        np.testing.assert_array_equal(received, run_of(plain, batch)[0])


def run_of(model: Any, batch: np.ndarray) -> list[np.ndarray]:
    return session_run(session_of(model.SerializeToString()), batch, 1)


# -------------------------------------------------------------------------------------------------- other ways
@pytest.mark.slow
def test_a_file_that_moved_is_found_and_one_that_changed_is_not(images: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "made", images)
    expected = rows_of(run, images)
    old = tmp_path / "made" / "net.onnx"
    new = old.rename(tmp_path / "elsewhere.onnx")
    with pytest.raises(
        RunError, match=r"net\.onnx, is no longer there. Name the place where it is now with --weights FILE"
    ):
        rows_of(run, images)
    predict(run, images, weights=str(new), stream=(text := io.StringIO()))
    rows = [[float(row["cat"]), float(row["dog"])] for row in csv.DictReader(text.getvalue().splitlines())]
    np.testing.assert_array_equal(rows, expected)
    beside = run.parent / old.name
    new.rename(beside)
    np.testing.assert_array_equal(rows_of(run, images), expected)  # under its own name beside the run
    model = onnx.load(beside)
    model.producer_name = "another"
    onnx.save(model, beside)
    with pytest.raises(RunError, match=r"another network \(weights: [0-9a-f]{64} -> [0-9a-f]{64}\)"):
        rows_of(run, images)


@pytest.mark.slow
def test_a_grid_over_layers_and_poolings_finds_the_features_of_numpy(images: Path, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline

    path = network(tmp_path / "net.onnx", end="tokens")
    (tmp_path / "how.json").write_text(json.dumps(HOW))
    files = sorted(map(str, images.rglob("*.png")))
    extractor = FeatureExtractor(
        backbone=str(path), preprocess=str(tmp_path / "how.json"), prefix_tokens=1, store=str(tmp_path / "stores")
    )
    poolings = ["cls", "tokens", "cls+tokens"]
    grid = {"features__pooling": poolings, "features__layer": [None, "last_hidden_state"]}
    search = GridSearchCV(Pipeline([("features", extractor), ("head", LogisticRegression())]), grid, cv=2)
    search.fit(files, [Path(file).parent.name for file in files])
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    tokens = convolved(normalised(np.stack([centre(Path(file)) for file in files]))).reshape(len(files), 16, 5)
    parts = {"cls": -tokens.mean(axis=1), "tokens": tokens.mean(axis=1)}
    for pooling in poolings:
        expected = np.hstack([parts[part] for part in pooling.split("+")])
        for store in (extractor.store, None):  # from the stores that the search made, and computed now
            made = clone(extractor).set_params(pooling=pooling, store=store).fit_transform(files)
            assert relative_difference(made, expected) < 2e-6


@pytest.mark.slow
def test_the_commands_of_a_report_make_the_same_features_without_the_description(images: Path, tmp_path: Path) -> None:
    options = {"prefix_tokens": 1, "pooling": "cls+tokens", "image_size": 12, "fit": "stretch"}
    run = Run.open(trained(tmp_path / "made", images, made={"end": "tokens", "size": ("h", "w")}, **options))
    (tmp_path / "made" / "how.json").unlink()
    store = tmp_path / "made" / "f.h5"
    before = store.rename(tmp_path / "before.h5")
    description, extract, _ = commands(run)
    subprocess.run(["/bin/sh", "-c", description], check=True)
    done = call_pipeline(*shlex.split(extract)[1:])
    assert done.returncode == 0, done.stderr
    assert f"\n  network: {tmp_path / 'made' / 'net.onnx'}\n" in call_pipeline("inspect", store).stdout
    assert store.read_bytes() == before.read_bytes()


_KILLED = """
import os, signal, sys
from features.extraction.extraction import extract_features, prepare
from features.extraction.options import ExtractionOptions
from features.networks.openvino_engine import OpenVinoEngine
real = OpenVinoEngine.__call__
def call(self, images):
    if self.images_inferred >= 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, images)
OpenVinoEngine.__call__ = call
source, out, net, how = sys.argv[1:]
extract_features(source, out, backbone=net, preprocess=how, layout="sharded", shard_rows=3, batch_size=3)
"""


@pytest.mark.slow
def test_a_killed_extraction_goes_on_to_the_same_bytes(images: Path, tmp_path: Path) -> None:
    net, how = str(network(tmp_path / "net.onnx")), str(tmp_path / "how.json")
    Path(how).write_text(json.dumps(HOW))
    options = {"backbone": net, "preprocess": how, "layout": "sharded", "shard_rows": 3, "batch_size": 3}
    extract_features(images, tmp_path / "whole.h5", **options)  # the kept conversion is proven with 8 images
    line = [sys.executable, "-c", _KILLED, str(images), str(tmp_path / "killed.h5"), net, how]
    assert subprocess.run(line, capture_output=True, check=False).returncode == -signal.SIGKILL
    left = len(list((tmp_path / "killed.h5.parts").glob("*.h5")))
    assert 1 <= left < 7
    assert not (tmp_path / "killed.h5").exists()
    done = prepare(images, tmp_path / "killed.h5", ExtractionOptions(**options)).run()
    assert done.inferred == 20 - 3 * left
    for file in (tmp_path / "whole.h5.parts").glob("*.h5"):
        assert file.read_bytes() == (tmp_path / "killed.h5.parts" / file.name).read_bytes()
    assert (tmp_path / "whole.h5").read_bytes() == (tmp_path / "killed.h5").read_bytes()


@pytest.mark.slow
def test_the_cost_of_less_precision_is_measured_against_the_networks_own_engine(images: Path, tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    (tmp_path / "how.json").write_text(json.dumps(HOW))
    options = {"backbone": str(path), "preprocess": str(tmp_path / "how.json")}
    exact = extract_features(images, tmp_path / "exact.h5", **options)
    half = extract_features(images, tmp_path / "half.h5", **options, dtype="float16", check_precision=100)
    (name,) = half.recipes
    whole, rounded = (store.array(name)[:].astype(np.float64) for store in (exact, half))
    found = half.provenance["precision_check"][name]
    expected = np.linalg.norm(rounded - whole) / np.linalg.norm(whole)
    assert found["images"] == 20
    assert 1e-5 < expected < 1e-3
    assert found["relative_error"] == pytest.approx(expected, rel=0.02)


def test_preview_reads_how_images_are_prepared(images: Path, tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", size=("h", "w"))
    (tmp_path / "how.json").write_text(json.dumps({**HOW, "size": [20, 30], "fit": "stretch"}))
    arguments = ["preview", str(images), "--backbone", str(path), "--out", str(tmp_path / "p.png"), "--json"]
    done = call_pipeline(*arguments, "--preprocess", str(tmp_path / "how.json"))
    assert (done.returncode, json.loads(done.stdout)["image_size"]) == (0, [20, 30])
    assert "nothing says how images are prepared" in call_pipeline(*arguments).stderr
