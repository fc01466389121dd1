"""Extraction and sweeps on a cluster by the command line, with a real network of Keras."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faults import differences
from helpers import call_pipeline, paint_folder, run_pipeline

from features.store.reader import FeatureStore
from pipeline.cluster.connection import sweeping
from pipeline.labels.file import append_decisions, new_decision
from pipeline.labels.overlay import with_labels
from pipeline.runs.folder import Run
from pipeline.sweeps.workers import in_parallel

SWEEP = """
version: 1
heads:
- {head: logistic, log: {C: [1e-3, 10, 3]}}
- {head: ridge, log: {alpha: [1, 100, 2]}}
- {head: knn, grid: {n_neighbors: [3, 5]}}
"""


@pytest.mark.slow
def test_the_command_line_extracts_and_sweeps_on_workers(tmp_path: Path) -> None:
    """A real network of Keras, found by the worker by its name; sweeps under a labels file here and there at the same time."""
    network = ["--backbone", "mobilenetv2-0.35", "--weights", "random", "--image-size", 32]
    source = paint_folder(tmp_path / "images", {"cat": 70, "dog": 80})
    here, there = tmp_path / "here.h5", tmp_path / "there.h5"

    def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    extract = ["extract", source, "--shard-rows", 64, *network, "--json", "--out"]
    assert document(call_pipeline(*extract, here))["inferred"] == 150  # converts the network, the other uses that
    assert document(run_pipeline(*extract, there, "--cluster", "local:1"))["inferred"] == 150
    assert differences(here, there) == []
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    store, labels = FeatureStore.open(here), tmp_path / "labels.csv"
    first = store.rows("train")[:5]
    paths, hashes = [store.images.paths[row] for row in first], store.images.sha256[first]
    append_decisions(labels, [new_decision(*one, "exclude") for one in zip(hashes, paths, strict=True)])
    train = ["train-head", here, "--heads", tmp_path / "sweep.yaml", "--labels", labels, "--json", "--runs"]
    boards = []
    with ThreadPoolExecutor(2) as pool:
        commands = [*train, tmp_path / "one", "--n-jobs", 1], [*train, tmp_path / "two", "--cluster", "local:2"]
        documents = [document(done) for done in pool.map(lambda command: run_pipeline(*command), commands)]
    for swept in documents:
        assert (swept["trained"], swept["failed"]) == (7, [])
        timed = {"fit_seconds", "chosen"}
        rows = [{key: value for key, value in row.items() if key not in timed} for row in swept["board"]]
        boards.append(sorted(rows, key=lambda row: str(row["run_id"])))
    assert boards[0] == boards[1]
    corrected = with_labels(store, labels)
    assert len(corrected.rows("train")) == len(store.rows("train")) - 5
    for row in boards[1]:
        assert Run.open(tmp_path / "two" / str(row["run_id"])).data_digest == corrected.data_digest
    for name in ("one", "two"):
        assert not [path for path in (tmp_path / name).iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_head_that_kills_every_worker_of_a_cluster_takes_no_other_with_it(tmp_path: Path) -> None:
    def call(number: int) -> Any:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return (item for item in ()) if number == 5 else number**2

    with sweeping("local:1", tmp_path):  # the next call is always beside the culprit
        found = dict(in_parallel(call, [(number,) for number in range(8)], 2))
    lost = {number: found.pop(number) for number in (3, 5)}
    assert found == {number: number**2 for number in (0, 1, 2, 4, 6, 7)}
    assert "its process was killed each time" in lost[3].reason
    assert "cannot be sent between processes" in lost[5].reason
