"""Stage one's shards, and stage two's sweeps, on a Dask cluster.

    plan -> tasks, few in flight -> workers: extract_shard -> shard files on the shared path -> records -> the same assembly

Dask moves tasks and records between machines that trust each other, as pickles; it schedules, notices machines that are
lost and gives their tasks to others. What was made is told by the files alone: a run that began on a cluster can be
finished anywhere, and the other way round. No time of another machine's clock is ever compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import itertools
import logging
import os
import queue
import re
import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from features.errors import BottleneckError, ConfigurationError, StoreError
from features.files import printable, writable_folder, writing
from features.running import Advance, MadeShard, Work
from features.shards import KILLS_WORKER, ShardRecord, refuse_image
from features.store import shard_path
from pipeline.cluster_plan import ClusterError, PlanFile, Setting, ShardTask, versions
from pipeline.cluster_worker import PROCESSORS, make_shard, probe, topic_of
from pipeline.workers import on_cluster

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 300.0  # without any worker: batch systems start them late, nannies start them again
DEATHS = 3  # workers that a shard may kill before it is split; on other clusters Dask's allowed-failures + 1
PARTS = 8  # into which it is split: of 2048 images the one that kills is found in four steps
RETRIES = 2  # after an error that may pass
AHEAD = 2  # shards in flight for each thread of the workers: one is made, one waits there
TICK_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between looks at which workers there are
MAX_LOCAL = 256
GPU = "GPU"  # the resource that workers announce with `dask worker --resources GPU=1`


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
            client = distributed.Client(target, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, ImportError) as error:
            raise ClusterError(
                f"{cluster}: no Dask scheduler answers there ({_first_line(error)}). Start one with "
                "`dask scheduler --port 8786`, and give the address that it prints; check name, port and firewall."
            ) from error
        stack.enter_context(client)
        try:
            client.wait_for_workers(1, timeout=patience)
        except TimeoutError as error:
            raise ClusterError(_no_workers(cluster, patience)) from error
        yield client


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
    preload = [*([preload] if isinstance(preload, str) else preload), "pipeline.cluster_worker"]
    environ = dask.config.get("distributed.nanny.pre-spawn-environ")
    common = {"host": "127.0.0.1", "protocol": "tcp://", "dashboard": False}
    with tempfile.TemporaryDirectory(prefix="bottleneck-cluster-") as folder:
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
            # Dask's value has glibc map and unmap the memory of every image: 8 % of an extraction.
            "distributed.nanny.pre-spawn-environ": {**environ, "MALLOC_TRIM_THRESHOLD_": None},
        }
        with (
            dask.config.set(settings),
            distributed.SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
        ):
            yield cluster


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
            problems.append(f"{worker} has no pipeline like this one ({_first_line(answer)}). Install the same version")
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


class ClusterShards:
    """A ``features.running.ShardRunner`` that has shards made by the workers of a Dask cluster.

    Parameters
    ----------
    cluster : str
        As for `parse_cluster`.
    engine : {"auto", "keras", "openvino"}
        As it was asked for; each worker chooses by what its machine has.
    threads : int, optional
        Threads that read and decode in each worker; the processors of its process without it.
    patience : float
        Seconds without any worker after which the run ends.
    """

    def __init__(
        self, cluster: str, *, engine: str = "auto", threads: int | None = None, patience: float = PATIENCE_SECONDS
    ) -> None:
        parse_cluster(cluster)
        self.cluster, self.engine, self.threads, self.patience = cluster, engine, threads, patience

    def __call__(self, work: Work, advance: Advance) -> Generator[MadeShard, None, None]:
        network = work.network
        setting = Setting(
            backbone=network.backbone_argument,
            weights=network.weights_argument,
            engine=self.engine,
            device=work.device,
            batch_size=work.batch_size,
            threads=self.threads,
        )
        with (
            connected(self.cluster, self.patience) as client,
            PlanFile.written(work.folder, work.specs, setting) as plan,
        ):
            check_workers(client, plan.path, plan.token, _first_image(work))
            yield from _Run(self, client, plan, work, advance).shards()


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows of a planned shard, and how often making them went wrong."""

    number: int
    start: int
    stop: int
    failures: int = 0


class _Run:
    """One plan on one cluster."""

    def __init__(self, runner: ClusterShards, client: Any, plan: PlanFile, work: Work, advance: Advance) -> None:
        self._runner, self._client, self._plan, self._work, self._advance = runner, client, plan, work, advance
        self._waiting = deque(_Piece(number, 0, len(spec)) for number, spec in enumerate(work.specs))
        self._flying: dict[str, tuple[_Piece, Any]] = {}
        self._finished: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._heard: dict[str, int] = {}  # images that are done of the shards that were begun
        self._lock = threading.Lock()
        self._submitted = 0
        self._resources: dict[str, float] = {}
        self._window = AHEAD
        self._looked = self._alive = time.monotonic()

    def shards(self) -> Generator[MadeShard, None, None]:
        """Every shard when it is there. On an error or Ctrl-C nothing more is begun, and what was begun is finished."""
        self._look()
        topic = topic_of(self._plan.token)
        self._client.subscribe_topic(topic, self._hear)
        failure: BaseException | None = None
        key = None
        try:
            while True:
                try:
                    self._watch()
                    if failure is None:
                        self._submit()
                    if not self._flying and (failure is not None or not self._waiting):
                        break
                    with contextlib.suppress(queue.Empty):
                        key = self._finished.get(timeout=TICK_SECONDS)
                        outcome = self._outcome(key)
                    if key is None:
                        continue
                except KeyboardInterrupt as interrupt:
                    if failure is not None:
                        raise
                    logger.warning("stopping after the shards in flight; press Ctrl-C again to drop them")
                    failure = interrupt
                    if key is not None:
                        self._finished.put(key)
                    self._drop_unbegun()
                    continue
                key = None
                if isinstance(outcome, MadeShard):
                    yield outcome
                elif outcome is not None and failure is None:
                    failure = outcome
                    self._drop_unbegun()
            if failure is not None:
                raise failure
        finally:
            for _, future in self._flying.values():
                future.cancel()
            if self._client.status == "running":
                self._client.unsubscribe_topic(topic)

    def _submit(self) -> None:
        while self._waiting and len(self._flying) < self._window and self._client.status == "running":
            piece = self._waiting.popleft()
            self._submitted += 1
            key = f"{self._plan.token}/{self._submitted}"
            offset, length = self._plan.places[piece.number]
            task = ShardTask(str(self._plan.path), self._plan.token, offset, length, piece.start, piece.stop, key)
            future = self._client.submit(
                make_shard, task, key=key, pure=False, resources=self._resources or None, priority=-piece.number
            )
            self._flying[key] = piece, future
            future.add_done_callback(lambda future: self._finished.put(future.key))

    def _outcome(self, key: str) -> MadeShard | BaseException | None:
        """What came of a task: a shard, an error that ends the run, or nothing, where it is tried again."""
        import distributed

        if key not in self._flying:
            return None
        piece, future = self._flying[key]
        status = future.status
        error: BaseException | None = None
        if status == "error":
            error = future.exception()
        elif status == "finished":
            try:
                record, engine = future.result(timeout=CONNECT_SECONDS)
            except (TimeoutError, OSError, distributed.client.FutureCancelledError):
                status = "cancelled"  # the worker that held the record is lost; the shard is there
        del self._flying[key]
        with self._lock:
            heard = self._heard.pop(key, 0)
        if status == "finished":
            made = self._made(piece, record, engine)
            if isinstance(made, MadeShard):
                self._advance(piece.stop - piece.start - heard)
            return made
        self._advance(-heard)
        if isinstance(error, distributed.scheduler.KilledWorker):
            return self._split(piece)
        if error is None:  # the scheduler was lost, and all it knew
            self._waiting.appendleft(piece)
            return None
        return self._again(piece, error)

    def _made(self, piece: _Piece, record: ShardRecord, engine: str) -> MadeShard | BaseException:
        path = shard_path(self._work.folder, record.identity)
        end = time.monotonic() + CONNECT_SECONDS
        while not path.is_file():  # a network file system may show a new file late
            if time.monotonic() > end:
                return ClusterError(
                    f"{path}: a worker has written it, but it cannot be seen here. Mount that folder at the same path on "
                    "every machine, and run the same command again."
                )
            time.sleep(0.1)
        return MadeShard(self._work.specs[piece.number], record, engine)

    def _split(self, piece: _Piece) -> MadeShard | None:
        """A shard that killed its workers: it is made in parts, until one image is left, which is set aside."""
        spec = self._work.specs[piece.number].part(piece.start, piece.stop)
        count = len(spec)
        if count == 1:
            logger.warning("%s kills the worker that reads it, each time; set aside", printable(spec.paths[0]))
            record = refuse_image(spec, self._work.folder, read=self._work.reader(), reason=KILLS_WORKER)
            self._advance(1)
            return MadeShard(self._work.specs[piece.number], record, "")
        logger.warning(
            "a shard of %d images (%s to %s) has killed its workers; it is made in parts, to find the image that does",
            *(count, printable(spec.paths[0]), printable(spec.paths[-1])),
        )
        bounds = sorted({piece.start + count * part // PARTS for part in range(PARTS + 1)})
        for low, high in reversed(list(itertools.pairwise(bounds))):
            self._waiting.appendleft(_Piece(piece.number, low, high))
        return None

    def _again(self, piece: _Piece, error: BaseException) -> BaseException | None:
        """Errors of the surroundings may pass, others and a full disk do not."""
        full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
        lasting = full or (isinstance(error, BottleneckError) and not isinstance(error, StoreError))
        if not lasting and piece.failures < RETRIES:
            logger.warning("a shard failed (%s); it is tried again", _first_line(error))
            self._waiting.appendleft(dataclasses.replace(piece, failures=piece.failures + 1))
            return None
        if isinstance(error, BottleneckError):
            return error
        return ClusterError(
            f"a shard failed {piece.failures + 1} times on the workers ({type(error).__name__}: {_first_line(error)}). "
            "Their logs say more; what was finished is kept. Run the same command again."
        )

    def _drop_unbegun(self) -> None:
        with self._lock:
            begun = set(self._heard)
        for key in [key for key in self._flying if key not in begun]:
            _, future = self._flying.pop(key)
            future.cancel()

    def _hear(self, event: tuple[Any, dict[str, Any]]) -> None:
        """Progress of one shard. Where it begins anew because its worker was lost, the count goes back."""
        key, done = event[1]["key"], event[1]["done"]
        with self._lock:
            if key not in self._flying:
                return
            before = self._heard.get(key)
            self._heard[key] = done
        if before is not None and done == 0:
            logger.warning("a worker was lost; its shard is made by another")
        self._advance(done - (before or 0))

    def _watch(self) -> None:
        """Notice that the scheduler or all workers are lost."""
        if self._client.status not in ("running", "connecting"):
            raise ClusterError(
                f"{self._runner.cluster}: the scheduler was lost, and does not come back. What was finished is kept: start "
                "it again, or leave --cluster out, and run the same command."
            )
        if self._client.status == "running" and time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()

    def _look(self) -> None:
        try:
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        except (OSError, KeyError):  # the connection is being lost, which is noticed elsewhere
            return
        self._looked = now = time.monotonic()
        with_gpu = [worker for worker in workers if worker.get("resources", {}).get(GPU)]
        if self._work.device == "gpu" and workers and not with_gpu and not self._resources:
            raise ConfigurationError(
                "device: a GPU was asked for, but no worker announces one. Start workers with "
                "`dask worker ADDRESS --nthreads 1 --resources GPU=1`, or use --device auto."
            )
        if with_gpu and self._work.device != "cpu":
            self._resources = {GPU: 1}
        useful = with_gpu if self._resources else list(workers)
        if useful:
            self._alive = now
            self._window = max(AHEAD, AHEAD * sum(worker["nthreads"] for worker in useful))
        elif now - self._alive > self._runner.patience:
            raise ClusterError(_no_workers(self._runner.cluster, self._runner.patience))


def _no_workers(cluster: str, patience: float) -> str:
    address = "ADDRESS" if cluster.startswith("local") else cluster
    return (
        f"{cluster}: no worker for {patience:.0f} s. What was finished is kept: start workers with "
        f"`dask worker {address} --nthreads 1`, and run the same command again."
    )


def _first_image(work: Work) -> str | None:
    """An image that is there, or the archive that all are in."""
    root = str(work.images.root)
    if os.path.isfile(root):
        return root
    spec = work.specs[0]
    there = (path for path, size in zip(spec.paths, spec.sizes, strict=True) if size >= 0)
    return next((os.path.join(root, path) for path in there), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
