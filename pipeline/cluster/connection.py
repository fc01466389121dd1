"""A connection to a Dask cluster, and whether its workers can do the work.

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
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from features.errors import ClusterError, ConfigurationError
from features.files import writable_folder, writing
from pipeline.cluster.plan import versions
from pipeline.cluster.worker import PROCESSORS, probe
from pipeline.sweeps.workers import on_cluster

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 300.0  # without any worker: batch systems start them late, nannies start them again
DEATHS = 3  # workers that a shard may kill before it is split; on other clusters Dask's allowed-failures + 1
MAX_LOCAL = 256
SCRATCH = "bottleneck-cluster-"  # folders of workers on this machine, in that for temporary files


def parse_cluster(text: str) -> int | str:
    """``"local:3"`` -> 3 worker processes here; ``"tcp://HOST:PORT"`` (or ``tls://``) as it is.

    Raises
    ------
    ConfigurationError
        For anything else, or where Dask is not installed.

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
        raise ConfigurationError("--cluster needs Dask: pip install 'bottleneck-features[cluster]'")
    return int(local[1]) if local else text


@contextlib.contextmanager
def connected(cluster: str, patience: float = PATIENCE_SECONDS) -> Iterator[Any]:
    """A Dask client of a cluster that has a worker; worker processes on this machine are stopped in the end.

    Parameters
    ----------
    cluster : str
        As for `parse_cluster`.
    patience : float
        Seconds to wait for the first worker.

    Raises
    ------
    ClusterError
        If no scheduler answers, or no worker comes.
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
        except (OSError, ValueError, ImportError, MemoryError) as error:  # the last is what other protocols read like
            raise ClusterError(
                f"{cluster}: no Dask scheduler answers there ({first_line(error)}). Start one with "
                "`dask scheduler --port 8786`, and give the address that it prints; check name, port and firewall."
            ) from error
        stack.enter_context(client)
        if not client.scheduler_info()["workers"]:
            logger.warning("%s: no worker is there yet; waiting for one", cluster)
        try:
            client.wait_for_workers(1, timeout=patience)
        except TimeoutError as error:
            raise ClusterError(no_workers(cluster, patience)) from error
        yield client
        if isinstance(address, int):
            with contextlib.suppress(TimeoutError):  # one that is just coming again would complain of being stopped
                client.wait_for_workers(address, timeout=CONNECT_SECONDS)


def _check_answer(address: str) -> None:
    """Raise OSError, or what its words lead to, unless Dask is what listens there; a client would wait for ever."""
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
    """Dask speaks of every worker that is lost, and twice; we say once what becomes of its shard."""
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
    """Scheduler in this process, ``count`` worker processes, each with its share of the processors and of memory."""
    import dask
    import distributed
    from distributed.system import MEMORY_LIMIT

    preload = dask.config.get("distributed.worker.preload")
    preload = [*([preload] if isinstance(preload, str) else preload), "pipeline.cluster.worker"]
    environ = dask.config.get("distributed.nanny.pre-spawn-environ")
    common = {"host": "127.0.0.1", "protocol": "tcp://", "dashboard": False}
    with _scratch() as folder:
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
                "options": {**options, "env": {PROCESSORS: ",".join(map(str, share))} if share else {}},
            }
            for number, share in enumerate(shares(count))
        }
        scheduler = {"cls": distributed.Scheduler, "options": {**common, "port": 0, "dashboard_address": "127.0.0.1:0"}}
        settings = {
            "distributed.scheduler.allowed-failures": DEATHS - 1,
            "temporary-directory": folder,
            # Dask's 15 s after a death it gives a worker up that has just died again, as where one image kills it.
            "distributed.deploy.lost-worker-timeout": "1000 days",
            # Dask's value has glibc map and unmap the memory of every image: 8 % of an extraction.
            "distributed.nanny.pre-spawn-environ": {**environ, "MALLOC_TRIM_THRESHOLD_": None},
        }
        with (
            dask.config.set(settings),
            distributed.SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
        ):
            yield cluster


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A folder for the workers here. Those that a killed command left go: nobody holds their lock any more."""
    import filelock

    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/lock"):
        with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(left).acquire(timeout=0):
            shutil.rmtree(left.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as folder,
        filelock.FileLock(Path(folder, "lock")),
    ):
        yield folder


def shares(count: int) -> list[list[int]]:
    """Processors of this process, divided among ``count`` workers; where there are too few, some share one."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(count)]
    mine = sorted(os.sched_getaffinity(0))
    bounds = [number * len(mine) // count for number in range(count + 1)]
    return [mine[low : max(high, low + 1)] for low, high in itertools.pairwise(bounds)]


def check_workers(client: Any, path: Path, token: str, image: str | None = None) -> None:
    """Have every worker show that it has our versions, sees the shared path, and may write there.

    Parameters
    ----------
    client : distributed.Client
    path, token : Path, str
        A file in the folder of results, and what stands in it.
    image : str, optional
        A file that has to be there too.

    Raises
    ------
    ClusterError
        Naming each worker that cannot do the work, and why.
    """
    answers = client.run(probe, str(path), token, versions(), image, on_error="return")
    problems = []
    for worker, answer in sorted(answers.items()):
        if isinstance(answer, ImportError | AttributeError):
            problems.append(f"{worker} has no pipeline like this one ({first_line(answer)}). Install the same version")
        elif isinstance(answer, list):  # any other error: it is being lost, and is checked when it comes again
            problems += [f"{worker} {problem}" for problem in answer]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ClusterError(f"workers cannot do this work: {'; '.join(problems[:5])}{more}.")


@contextlib.contextmanager
def shared_folder(client: Any, folder: Path) -> Iterator[None]:
    """Make sure that all workers see a folder, before anything is done with it."""
    token = secrets.token_hex(8)
    path = Path(os.path.abspath(folder)) / f".cluster-{token}.tmp"
    try:
        with writing(path):
            path.write_text(token)
        check_workers(client, path, token)
    finally:
        path.unlink(missing_ok=True)
    yield


@contextlib.contextmanager
def sweeping(cluster: str, runs: Path, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Train the heads of a sweep on a cluster, whose workers map the prepared rows that lie under ``runs``."""
    writable_folder(runs)
    with connected(cluster, patience) as client, shared_folder(client, runs), on_cluster(client):
        yield


def no_workers(cluster: str, patience: float) -> str:
    """What to say when there is none."""
    address = "ADDRESS" if cluster.startswith("local") else cluster
    return (
        f"{cluster}: no worker for {patience:.0f} s. What was finished is kept: start workers with "
        f"`dask worker {address} --nthreads 1`, and run the same command again."
    )


def first_line(error: BaseException) -> str:
    """Of its message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
