"""The code that runs in worker processes: the usual ``extract_shard``, with an engine that is kept warm.

    task -> plan file -> spec -> extract_shard -> shard file on the shared path -> record

Dask loads this module when it starts a worker of ``--cluster local:N``, because Ctrl-C in a terminal reaches the workers
too, but is meant for the command. Workers that are started in another way do not need it before their first task.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from features.children import end_with
from features.errors import BottleneckError, ClusterError
from features.extraction.shard import ShardRecord, ShardSpec, extract_shard, find_shard
from features.machine import processors
from features.networks.engines import Engine
from features.recipe import Recipe
from features.store.reader import shard_path
from pipeline.cluster.plan import OpenPlan, Setting, ShardTask, differences, versions

PROCESSORS = (
    "BOTTLENECK_PROCESSORS"  # environment variable of a local worker: numbers of its processors, separated by commas
)
OWNER = "BOTTLENECK_OWNER"  # environment variable of a local worker: number of the process that starts it
VISIBLE_SECONDS = 5.0  # a network file system may show a new file late
TELLINGS = 8  # largest number of progress messages for one shard
TELL_SECONDS = 1.0  # shortest time between two of them

_building = threading.Lock()


def dask_setup(worker: Any) -> None:
    """Prepare a worker. Dask calls this when a worker starts with this module as its preload."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ.get(OWNER) == str(os.getppid()):
        end_with(os.getppid())
    wanted = os.environ.get(PROCESSORS)
    if wanted and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(number) for number in wanted.split(",")})


def probe(path: str, token: str | None, theirs: Mapping[str, str], image: str | None) -> list[str]:
    """Return what prevents this worker from doing the work, as sentences; empty if nothing does.

    Parameters
    ----------
    path : str
        A file on the shared path, in the folder of results.
    token : str or None
        Text that its first line must contain.
    theirs : dict of str to str
        Versions on the machine that runs the command.
    image : str or None
        An image that the worker has to see.
    """
    problems = []
    wrong = differences(theirs, versions())
    if wrong:
        problems.append(f"has {', '.join(wrong)}. Install the same versions on every machine")
    if not _seen(path, token):
        problems.append(
            f"cannot see {path}. Mount that folder at the same path on every machine, or give an --out that all share"
        )
    elif not os.access(os.path.dirname(path), os.W_OK | os.X_OK):
        problems.append(f"may not write in {os.path.dirname(path)}. Give it the right to, or mount it writable")
    if image is not None and not os.path.exists(image):
        problems.append(f"cannot see the image {image}. Mount the images at the same path on every machine")
    return problems


def _seen(path: str, token: str | None) -> bool:
    end = time.monotonic() + VISIBLE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            text = Path(path).read_text(errors="replace").partition("\n")[0]
            return token is None or token in text
        if time.monotonic() > end:
            return False
        time.sleep(0.25)


def make_shard(task: ShardTask) -> tuple[ShardRecord, str]:
    """Make the shard of a task; return its record and the name of the engine.

    A shard that already exists, because a worker wrote it and was lost before it could report it, is used as it is.
    """
    plan = _plan(task.plan, task.token)
    spec, folder = plan.spec(task), plan.path.parent
    path = shard_path(folder, spec.identity)
    tell = _Teller(task.token, task.key)
    if path.is_file() and (record := find_shard(path)) is not None:
        return record, ""
    setting = plan.setting
    engine = _LateEngine(setting, tuple(recipe.plain for recipe in spec.recipes))
    with ThreadPoolExecutor(setting.threads or processors(), "decode") as decoders:
        record = extract_shard(
            spec,
            folder,
            read=_reader(spec),
            infer=engine,
            decoders=decoders,
            batch_size=setting.batch_size,
            advance=functools.partial(tell, len(spec)),
        )
    return record, engine.name


@functools.lru_cache(maxsize=4)
def _plan(path: str, token: str) -> OpenPlan:
    """Open the plan after checking that this process can work on it. Workers that connect late are checked here too."""
    if not _seen(path, token):
        raise ClusterError(f"worker on {socket.gethostname()} {probe(path, token, versions(), None)[0]}.")
    plan = OpenPlan.open(Path(path), token)
    wrong = probe(path, token, plan.versions, plan.image)
    if wrong:
        raise ClusterError(f"worker on {socket.gethostname()} {wrong[0]}.")
    logging.getLogger("features.extraction.shard").setLevel(logging.ERROR)  # the command itself names unreadable images
    return plan


def _reader(spec: ShardSpec) -> Callable[[str], bytes]:
    from features.sources.remote import Reader

    return _source_reader(spec.root) or Reader(spec.root)


@functools.lru_cache(maxsize=4)
def _source_reader(root: str) -> Callable[[str], bytes] | None:
    """Return the reader of an archive, of arrays or of tables; None for images that are files."""
    from features.sources.scan import reader_of

    return reader_of(root)


class _LateEngine:
    """The engine of a setting, built for the first batch. The threads of a worker share it."""

    def __init__(self, setting: Setting, recipes: tuple[Recipe, ...]) -> None:
        self._setting, self._recipes = setting, recipes
        self.name = ""

    def __call__(self, batch: np.ndarray) -> Mapping[str, np.ndarray]:
        with _building:
            engine, lock = _engine(self._setting, self._recipes)
        self.name = engine.name
        if engine.concurrent:
            return engine(batch)
        with lock:
            return engine(batch)


@functools.lru_cache(maxsize=2)
def _engine(setting: Setting, recipes: tuple[Recipe, ...]) -> tuple[Engine, threading.Lock]:
    """Return an engine, kept warm for later shards. The network is found by name here and must be the same one."""
    from features.networks import network as networks

    first = recipes[0]
    try:
        options = first.options(
            *(setting.backbone, setting.weights),
            engine=setting.engine,
            device=setting.device,
            quantised=setting.quantised,
        )
        network = networks.resolve_network(options)
        other = first.difference(network.recipes[0])
        if other:
            listed = ", ".join(f"{name}: {here} instead of {there}" for name, (there, here) in sorted(other.items()))
            raise ClusterError(
                f"this machine finds another network ({listed}). Give weights on the shared path with --weights, and "
                "--engine where precision is not float32"
            )
        engine = network.engine(recipes, batch_size=setting.batch_size, device=setting.device)
    except BottleneckError as error:
        raise ClusterError(f"worker on {socket.gethostname()}: {error}") from error
    return engine, threading.Lock()


class _Teller:
    """Reports the progress of a shard to the client: when it begins, and a few times while it is made."""

    def __init__(self, token: str, key: str) -> None:
        self._topic, self._key, self._done, self._said, self._when = topic_of(token), key, 0, 0, time.monotonic()
        self._lock = threading.Lock()
        self._send()

    def __call__(self, total: int, more: int) -> None:
        with self._lock:
            self._done += more
            enough = self._done - self._said >= total / TELLINGS and time.monotonic() - self._when >= TELL_SECONDS
            if enough and self._done < total:
                self._send()

    def _send(self) -> None:
        from distributed import get_worker

        self._said, self._when = self._done, time.monotonic()
        worker = get_worker()
        worker.log_event(self._topic, {"key": self._key, "done": self._done, "worker": worker.address})


def topic_of(token: str) -> str:
    """Return the Dask topic on which the progress of a run is reported."""
    return "bottleneck-" + token
