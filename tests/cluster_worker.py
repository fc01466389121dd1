"""Preloaded into Dask's worker processes by tests: the network of numpy, and whatever shall go wrong with a worker.

    DASK_DISTRIBUTED__WORKER__PRELOAD=tests/cluster_worker.py  CLUSTER_FAULTS=faults.json  PYTHONPATH=.:tests

``faults.json`` is read again whenever it matters, so a test may change it while the workers live:

    numpy      width of the features of a stand-in for the network, see `faults.NumpyNetwork`
    delay      seconds before each batch
    log        file to which each batch appends its number of images
    poison     part of the path of an image; whoever reads it dies
    stall_once file; a worker that begins a shard makes it and is stuck for ever, if it is not there yet
    die_once   file; a worker that has written a shard makes it and dies, if it is not there yet
    versions   what the worker says it has installed, beside the truth
    visible    seconds that it waits for a file to be seen
    blind      a worker of this name cannot see files of which the name begins with a dot
    stranger   whether the worker finds other weights
    error      file; as long as it is there, every shard fails with what stands in it
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def fault(name: str) -> Any:
    try:
        return json.loads(Path(os.environ["CLUSTER_FAULTS"]).read_text()).get(name)
    except (OSError, ValueError):  # it is being written
        return None


def first(file: str) -> bool:
    with contextlib.suppress(FileExistsError):
        Path(file).touch(exist_ok=False)
        return True
    return False


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dask_setup(worker: Any) -> None:
    from faults import NumpyNetwork

    from features.networks import network as networks
    from features.pixels import decode as images
    from pipeline.cluster import plan as cluster_plan
    from pipeline.cluster import worker as cluster_worker

    if fault("numpy"):
        networks.resolve_network = lambda *_, **__: _stranger(NumpyNetwork(fault("numpy")))  # type: ignore
    _watch_engine(NumpyNetwork if fault("numpy") else networks.Network)

    read_bytes, extract_shard, software = (
        images.read_bytes,
        cluster_worker.extract_shard,
        cluster_plan.software_versions,
    )

    def read(path: str) -> bytes:
        if fault("poison") and fault("poison") in str(path):
            die()
        return read_bytes(path)

    def extract(*arguments: Any, **settings: Any) -> Any:
        if fault("error") and Path(fault("error")).exists():
            raise RuntimeError(Path(fault("error")).read_text())
        if fault("stall_once") and first(fault("stall_once")):
            time.sleep(10**6)
        record = extract_shard(*arguments, **settings)
        if fault("die_once") and first(fault("die_once")):
            die()
        return record

    images.read_bytes = read  # type: ignore[assignment]
    cluster_worker.extract_shard = extract
    cluster_worker.VISIBLE_SECONDS = fault("visible") or cluster_worker.VISIBLE_SECONDS
    cluster_plan.software_versions = lambda: {**software(), **(fault("versions") or {})}
    _make_blind(str(worker.name))


def _stranger(network: Any) -> Any:
    if fault("stranger"):
        network.recipes = tuple(dataclasses.replace(item, weights="1" * 64) for item in network.recipes)
    return network


def _watch_engine(owner: Any) -> None:
    inner = owner.engine

    def engine(self: Any, recipes: Sequence[Any], **settings: Any) -> Any:
        infer = inner(self, recipes, **settings)

        def watched(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            if fault("log"):
                with open(fault("log"), "a") as log:
                    log.write(f"{len(batch)}\n")
            time.sleep(fault("delay") or 0.0)
            return infer(batch)

        watched.name, watched.device, watched.concurrent = "function", "cpu", False
        return watched

    owner.engine = engine


def _make_blind(name: str) -> None:
    inner = Path.read_text

    def read_text(self: Path, *arguments: Any, **settings: Any) -> str:
        if self.name.startswith(".") and name == str(fault("blind")):
            raise FileNotFoundError(self)
        return inner(self, *arguments, **settings)

    Path.read_text = read_text  # type: ignore[method-assign]
