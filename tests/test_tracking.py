"""Runs on a tracking server: sent whole, sent once, and never in the way of training.

The client's package is an extra that the tests do not need: a double with its names takes its place, and under STRESS a real
server and its client, installed into an environment of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
import venv
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, STRESS, call_pipeline
from test_streaming import write_store

from features.errors import ConfigurationError
from features.machine import how_to_install
from pipeline.intervals import interval_of
from pipeline.runs.folder import Run, read_history
from pipeline.runs.tracking import tracker

GOLDEN = ROOT / "tests" / "golden" / "runs" / "heads" / "dropout-linear-788bbeed8f"
PASSWORD = "mlflow:http://me:secret@localhost:5000"
Metric = namedtuple("Metric", "key value timestamp step")
Param = namedtuple("Param", "key value")


class MlflowError(Exception):
    """Stands for ``mlflow.exceptions.MlflowException``."""


class Server:
    """What a server of MLflow keeps, and the methods of its client that are called."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.away: bool | OSError = False  # the error that libraries wrap

    def __call__(self, tracking_uri: str) -> Server:
        self.calls.append(tracking_uri)
        if self.away:
            wrapped = self.away if isinstance(self.away, OSError) else None
            raise MlflowError(f"API request to {tracking_uri} failed: connection refused") from wrapped
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id="1") if self.runs else None

    def create_experiment(self, name: str) -> str:
        return "1"

    def search_runs(self, places: list[str], filter_string: str, max_results: int) -> list[Any]:
        wanted = dict(re.findall(r"tags\.`(.*?)` = '(.*?)'", filter_string))
        assert "attributes.status = 'FINISHED'" in filter_string
        return [
            types.SimpleNamespace(
                info=types.SimpleNamespace(run_id=name),
                data=types.SimpleNamespace(
                    metrics={item.key: item.value for item in sorted(run["metrics"], key=lambda item: item.step)}
                ),
            )
            for name, run in self.runs.items()
            if run["finished"] and wanted.items() <= run["tags"].items()
        ][:max_results]

    def create_run(self, place: str, tags: dict[str, str], run_name: str) -> Any:
        self.runs[run_name] = {"tags": tags, "metrics": [], "params": {}, "files": [], "finished": False}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_name))

    def log_batch(self, name: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.runs[name]["metrics"] += metrics
        self.runs[name]["params"] |= dict(params)

    def log_artifacts(self, name: str, folder: str) -> None:
        self.runs[name]["files"] = sorted(os.listdir(folder))

    def set_terminated(self, name: str) -> None:
        self.runs[name]["finished"] = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    for name, values in {
        "mlflow": {},
        "mlflow.exceptions": {"MlflowException": MlflowError},
        "mlflow.tracking": {"MlflowClient": made},
        "mlflow.entities": {"Metric": Metric, "Param": Param},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "runs" / GOLDEN.name))


def test_a_run_is_sent_whole(server: Server, folder: Path) -> None:
    tracker("mlflow:http://localhost:5000")(folder)
    run, sent = Run.open(folder), server.runs[folder.name]
    validation, history = run.metrics["validation"], read_history(folder)
    metrics = {item.key: item.value for item in sent["metrics"]}
    assert metrics["validation/accuracy"] == validation["accuracy"]
    assert [metrics[f"validation/accuracy_{end}"] for end in ("low", "high")] == interval_of(validation)
    assert metrics["validation/log_loss"] == validation["log_loss"]
    curve = [(item.step, item.value) for item in sent["metrics"] if item.key == "history/val_loss"]
    assert curve == list(enumerate(history["val_loss"], 1))
    assert sent["tags"]["bottleneck.fingerprint"] == run.config["features"]["fingerprint"]
    assert sent["params"]["head"] == "dropout-linear"
    assert sent["params"]["seed"] == "0"
    assert {"config.yaml", "metrics.json", "predictions.csv", "head.weights.h5"} <= set(sent["files"])
    assert sent["finished"]


def test_what_the_server_has_is_not_sent_again(server: Server, folder: Path) -> None:
    tracker("mlflow:http://localhost:5000")(folder)
    before = len(server.runs[folder.name]["metrics"])
    tracker("mlflow:http://localhost:5000")(folder)
    assert len(server.runs) == 1
    assert len(server.runs[folder.name]["metrics"]) == before
    document = json.loads((folder / "metrics.json").read_text())
    document["test"] = document["validation"]
    (folder / "metrics.json").write_text(json.dumps(document))
    tracker("mlflow:http://localhost:5000")(folder)
    new = server.runs[folder.name]["metrics"][before:]
    assert new
    assert {item.key.partition("/")[0] for item in new} == {"test"}


def test_a_server_that_is_away_is_said_once(server: Server, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.away = True
    send = tracker(PASSWORD)
    send(folder)
    send(folder)
    assert server.calls == [PASSWORD.removeprefix("mlflow:")]  # and nobody waits for it twice
    (said,) = caplog.messages
    assert said.startswith(f"--track: http://localhost:5000 did not take {folder.name} (API request to ")
    assert "the same command or call again sends them" in said
    assert "secret" not in said


def test_the_reason_is_what_the_network_said(server: Server, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.away = ConnectionRefusedError(111, "Connection refused")
    tracker("mlflow:http://localhost:5000")(folder)
    (said,) = caplog.messages
    assert f"did not take {folder.name} (Connection refused). Runs are kept" in said


@pytest.mark.parametrize("text", ["wandb:http://x", "mlflow", "mlflow:", "http://me:secret@localhost:5000"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"expected mlflow:URI such as mlflow:http://localhost:5000") as caught:
        tracker(text)
    assert "secret" not in str(caught.value)


def test_the_package_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigurationError, match="the package mlflow cannot be imported") as caught:
        tracker("mlflow:http://localhost:5000")
    assert str(caught.value).endswith(how_to_install("mlflow"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    labels = np.arange(120) // 60
    X = 3 * labels[:, None, None] + generator.normal(size=(120, 1, 4))
    splits = np.array([0, 0, 0, 1])[np.arange(120) % 4]
    return Path(write_store(tmp_path_factory.mktemp("track") / "f.h5", [X.astype(np.float32)], labels, splits, 1).path)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_training_goes_on_without_the_server(server: Server, store: Path, tmp_path: Path) -> None:
    server.away = True
    runs = tmp_path / "runs"
    words = ("train-head", store, "--head", "knn", "--runs", runs, "--track", "mlflow:http://localhost:5000")
    done = call_pipeline(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("did not take") == 1
    server.away = False
    again = call_pipeline(*words)
    assert "already trained" in again.stdout
    (made,) = runs.iterdir()
    assert server.runs[made.name]["finished"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The Python of an environment with MLflow, which borrows the rest from ours, and the address of a server."""
    place = tmp_path_factory.mktemp("mlflow")
    given = os.environ.get("BOTTLENECK_MLFLOW")  # an environment that has it already
    python = Path(given or place / "venv") / "bin" / "python"
    if not given:
        venv.create(place / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "mlflow>=3.1"], check=True, timeout=1800)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", port, "--backend-store-uri", f"sqlite:///{place}/m.db"]
    words += ["--artifacts-destination", place / "artefacts", "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen([python, "-m", "mlflow", "server", *map(str, words)], cwd=place, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:  # the time limit of the test ends it
            assert server.poll() is None
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:  # refused, or no answer in time
                time.sleep(1)
        yield python, address
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.skipif(not STRESS, reason="STRESS is not set: the real server of MLflow is in `make stress`")
def test_a_real_server_has_the_run(real: tuple[Path, str], store: Path, tmp_path: Path) -> None:
    python, address = real
    borrowed = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("-packages"))])
    # Folders of PYTHONPATH would come before those of MLflow's environment: ours are added behind them.
    code = f"import sys; sys.path += {borrowed.split(os.pathsep)!r}; from pipeline.cli import main; sys.exit(main())"
    words = ["train-head", store, "--head", "knn", "--runs", tmp_path / "runs", "--track", f"mlflow:{address}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for _ in range(2):  # the second time nothing is trained, and nothing is sent
        done = subprocess.run(
            [python, "-c", code, *map(str, words)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "--track" not in done.stderr
    (made,) = (tmp_path / "runs").iterdir()
    script = (
        "import json, sys\nfrom mlflow.tracking import MlflowClient\nclient = MlflowClient(sys.argv[1])\n"
        "(run,) = client.search_runs([client.get_experiment_by_name('bottleneck-features').experiment_id])\n"
        "files = [item.path for item in client.list_artifacts(run.info.run_id)]\n"
        "print(json.dumps([run.info.status, run.data.metrics, run.data.params, run.data.tags, files]))\n"
    )
    done = subprocess.run([python, "-c", script, address], env=environment, capture_output=True, text=True, check=True)
    status, metrics, params, tags, files = json.loads(done.stdout.splitlines()[-1])
    run = Run.open(made)
    scores = run.metrics["validation"]
    assert status == "FINISHED"
    assert metrics["validation/accuracy"] == pytest.approx(scores["accuracy"])
    assert metrics["validation/accuracy_low"] == pytest.approx(interval_of(scores)[0])
    assert params["head"] == "knn"
    assert tags["bottleneck.fingerprint"] == run.config["features"]["fingerprint"]
    assert {"config.yaml", "metrics.json", "predictions.csv"} <= set(files)
