"""Connect to a Dask cluster and check that its workers can do the work.

"local:3" or "tcp://node1:8786" --connected()--> client of a cluster that has a worker --check_workers()--> or an error
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from features.errors import ClusterError, ConfigurationError
from features.files import writable_folder, writing
from features.machine import VISIBLE, gpus, how_to_install
from features.temporary import system_folder, temporary_path
from pipeline.cluster.plan import versions
from pipeline.cluster.worker import OWNER, PROCESSORS, probe
from pipeline.sweeps.workers import on_cluster

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 300.0  # to wait without any worker: batch systems start workers late, and nannies restart them
DEATHS = 3  # how many workers a shard may kill before it is split; on other clusters Dask's allowed-failures + 1
MAX_LOCAL = 256
GPU = "GPU"  # the resource that workers announce, as with `dask worker --resources GPU=1`


def parse_cluster(text: str) -> int | str:
    """Parse ``--cluster``: ``"local:3"`` -> 3 local worker processes; ``"tcp://HOST:PORT"`` or ``tls://`` unchanged.

    Raises
    ------
    ConfigurationError
        For anything else, or if Dask is not installed.

    Examples
    --------
    >>> parse_cluster("local:3"), parse_cluster("tcp://node1:8786")
    (3, 'tcp://node1:8786')
    """
    local = re.fullmatch(r"local:(\d{1,3})", text)
    if not (local and 1 <= int(local[1]) <= MAX_LOCAL) and not re.fullmatch(r"(tcp|tls)://[^/\s]+:\d{1,5}", text):
        raise ConfigurationError(
            f"--cluster: received {text!r}, expected local:N for N worker processes on this machine (1 to {MAX_LOCAL}), or "
            "the address of a Dask scheduler such as tcp://node1:8786"
        )
    if importlib.util.find_spec("distributed") is None:
        raise ConfigurationError(f"--cluster needs Dask: {how_to_install('cluster')}")
    return int(local[1]) if local else text


@contextlib.contextmanager
def connected(cluster: str, patience: float = PATIENCE_SECONDS) -> Iterator[Any]:
    """Yield a Dask client of a cluster that has at least one worker. Local worker processes are stopped at the end.

    Parameters
    ----------
    cluster : str
        As for `parse_cluster`.
    patience : float
        Seconds to wait for the first worker.

    Raises
    ------
    ClusterError
        If no scheduler answers, or no worker connects.
    """
    address = parse_cluster(cluster)
    import distributed

    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        if isinstance(address, int):
            target: Any = stack.enter_context(_local(address))
        else:
            target = address
        try:
            if isinstance(target, str):
                _check_answer(target)
            client = distributed.Client(target, timeout=CONNECT_SECONDS, set_as_default=False)
        except (
            OSError,
            ValueError,
            ImportError,
            MemoryError,
        ) as error:  # MemoryError: what a reply in another protocol looks like
            raise ClusterError(
                f"{cluster}: no Dask scheduler answers there ({first_line(error)}). Start one with "
                "`dask scheduler --port 8786`, and give the address that it prints; check name, port and firewall."
            ) from error
        stack.enter_context(client)
        if not client.scheduler_info()["workers"]:
            logger.warning("%s: no worker has connected yet; waiting for one", cluster)
        try:
            client.wait_for_workers(1, timeout=patience)
        except TimeoutError as error:
            raise ClusterError(no_workers(cluster, patience)) from error
        yield client
        if isinstance(address, int):
            with contextlib.suppress(TimeoutError):  # a worker that is just restarting would report that it was stopped
                client.wait_for_workers(address, timeout=CONNECT_SECONDS)


def _check_answer(address: str) -> None:
    """Raise an error unless a Dask scheduler listens at the address; a client would wait for ever."""
    from distributed import Security
    from distributed.comm import connect
    from distributed.utils import LoopRunner, sync

    runner = LoopRunner()
    runner.start()
    try:
        options = Security().get_connection_args("client")
        wait = {"timeout": CONNECT_SECONDS, "callback_timeout": CONNECT_SECONDS + 1}
        sync(runner.loop, connect, address, **wait, **options).abort()
    finally:
        runner.stop()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Dask's log, which reports each lost worker twice; this module reports once what happens to its shard."""
    known = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("distributed")]
    before = [(chatter, chatter.level) for chatter in known]
    for chatter in known:
        chatter.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for chatter, level in before:
            chatter.setLevel(level)


@contextlib.contextmanager
def _local(count: int) -> Iterator[Any]:
    """Start a scheduler in this process and ``count`` worker processes, which share the processors and the memory."""
    import dask
    import distributed
    from distributed.system import MEMORY_LIMIT

    preload = dask.config.get("distributed.worker.preload")
    preload = [*([preload] if isinstance(preload, str) else preload), "pipeline.cluster.worker"]
    environ = dask.config.get("distributed.nanny.pre-spawn-environ")
    common = {"host": "127.0.0.1", "protocol": "tcp://", "dashboard": False}
    with system_folder() as folder:
        owner = {OWNER: str(os.getpid()), "TMPDIR": str(folder)}
        options = {
            **common,
            "nthreads": 1,
            "memory_limit": MEMORY_LIMIT // count,
            "preload": preload,
            "silence_logs": logging.CRITICAL,
        }
        workers = {
            number: {
                "cls": distributed.Nanny,
                "options": {
                    **options,
                    "env": {**owner, **environment},
                    "resources": {GPU: 1} if VISIBLE in environment else {},
                },
            }
            for number, environment in enumerate(parts(count))
        }
        scheduler = {"cls": distributed.Scheduler, "options": {**common, "port": 0, "dashboard_address": "127.0.0.1:0"}}
        settings = {
            "distributed.scheduler.allowed-failures": DEATHS - 1,
            "temporary-directory": str(folder),
            # With its default Dask gives up a worker that dies again within 15 s, as happens when one image kills workers.
            "distributed.deploy.lost-worker-timeout": "1000 days",
            # With Dask's value glibc maps and unmaps memory for every image, which costs 8 % of an extraction.
            "distributed.nanny.pre-spawn-environ": {**environ, "MALLOC_TRIM_THRESHOLD_": None},
        }
        with (
            dask.config.set(settings),
            distributed.SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
        ):
            yield cluster


def parts(count: int) -> list[dict[str, str]]:
    """Environment of each of ``count`` workers: its processors, and its GPU, of which several workers may share one."""
    cards = gpus()
    found = []
    for number, share in enumerate(shares(count)):
        part = {PROCESSORS: ",".join(map(str, share))} if share else {}
        found.append(part | ({VISIBLE: cards[number % len(cards)]} if cards else {}))
    return found


def shares(count: int) -> list[list[int]]:
    """Divide the processors of this process among ``count`` workers; if there are too few, some workers share one."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(count)]
    mine = sorted(os.sched_getaffinity(0))
    bounds = [number * len(mine) // count for number in range(count + 1)]
    return [mine[low : max(high, low + 1)] for low, high in itertools.pairwise(bounds)]


def check_workers(client: Any, path: Path, token: str, image: str | None = None) -> None:
    """Check on every worker that it has the same versions, sees the shared path, and may write there.

    Parameters
    ----------
    client : distributed.Client
    path, token : Path, str
        A file in the folder of results, and its first line.
    image : str, optional
        An image that every worker has to see.

    Raises
    ------
    ClusterError
        If a worker cannot do the work; the message names each such worker and the reason.
    """
    answers = client.run(probe, str(path), token, versions(), image, on_error="return")
    problems = []
    for worker, answer in sorted(answers.items()):
        if isinstance(answer, ImportError | AttributeError):
            problems.append(
                f"{worker} has no such version of this package ({first_line(answer)}). Install the same version"
            )
        elif isinstance(answer, list):  # any other error: the worker is being lost, and is checked when it reconnects
            problems += [f"{worker} {problem}" for problem in answer]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ClusterError(f"workers cannot do this work: {'; '.join(problems[:5])}{more}.")


@contextlib.contextmanager
def shared_folder(client: Any, folder: Path) -> Iterator[None]:
    """Check that all workers see a folder before it is used."""
    token = secrets.token_hex(8)
    path = temporary_path(Path(os.path.abspath(folder), "cluster"))
    try:
        with writing(path):
            path.write_text(token)
        check_workers(client, path, token)
    finally:
        path.unlink(missing_ok=True)
    yield


@contextlib.contextmanager
def sweeping(cluster: str, runs: Path, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Train the heads of a sweep on a cluster whose workers map the prepared rows stored under ``runs``."""
    writable_folder(runs)
    with connected(cluster, patience) as client, shared_folder(client, runs), on_cluster(client):
        yield


def no_workers(cluster: str, patience: float) -> str:
    """Return the message for a cluster without workers."""
    address = "ADDRESS" if cluster.startswith("local") else cluster
    return (
        f"{cluster}: no worker for {patience:.0f} s. All finished work is kept: start workers with "
        f"`dask worker {address} --nthreads 1`, and run the same command again."
    )


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
