"""Make the shards of an extraction on a Dask cluster.

    plan -> tasks, few in flight -> workers: extract_shard -> shard files on the shared path -> records -> the same assembly

Dask moves tasks and records, as pickles, between machines that trust each other. It schedules them, notices lost machines
and gives their tasks to others. Only the files say what is finished, so a run that began on a cluster can be finished
anywhere, and the other way round. Clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import logging
import os
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Generator
from typing import Any

from features.errors import BottleneckError, ClusterError, ConfigurationError, StoreError
from features.extraction.running import Advance, MadeShard, Work
from features.extraction.shard import KILLS_WORKER, ShardRecord, find_shard, refuse_image
from features.files import printable
from features.store.reader import FeatureStore, shard_path
from pipeline.cluster.connection import (
    CONNECT_SECONDS,
    GPU,
    PATIENCE_SECONDS,
    check_workers,
    connected,
    first_line,
    no_workers,
    parse_cluster,
)
from pipeline.cluster.plan import PlanFile, Setting, ShardTask
from pipeline.cluster.worker import make_shard, topic_of

logger = logging.getLogger(__name__)

PARTS = 8  # number of parts into which a shard that kills workers is split: one image of 2048 is found in four steps
RETRIES = 2  # after an error that may be temporary
AHEAD = 2  # shards in flight for each worker thread: one is made, one waits
TICK_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between two queries for the list of workers
STUCK_SECONDS = 600.0  # a worker is stuck if it reports nothing for this long, and for
STUCK_TIMES = 10  # times the usual time of such a shard (it reports every eighth of a shard)


class ClusterShards:
    """A ``features.extraction.running.ShardRunner`` whose shards are made by the workers of a Dask cluster.

    Parameters
    ----------
    cluster : str
        As for `parse_cluster`.
    patience : float
        Seconds without any worker after which the run ends.
    """

    def __init__(self, cluster: str, *, patience: float = PATIENCE_SECONDS) -> None:
        parse_cluster(cluster)
        self.cluster, self.patience = cluster, patience

    def __call__(self, work: Work, advance: Advance) -> Generator[MadeShard, None, None]:
        network, options = work.network, work.options
        setting = Setting(
            backbone=network.backbone_argument,
            weights=network.weights_argument,
            engine=options.engine,
            device=options.device,
            batch_size=options.batch_size,
            threads=options.workers,
            quantised=str(network.quantised) if network.recipes[0].quantised is not None else None,
        )
        image = _first_image(work)
        with (
            connected(self.cluster, self.patience) as client,
            PlanFile.written(work.folder, work.specs, setting, image) as plan,
        ):
            check_workers(client, plan.path, plan.token, image)
            yield from _Run(self, client, plan, work, advance).shards()


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows of a planned shard, the number of failures, and whether nothing else may run at the same time."""

    number: int
    start: int
    stop: int
    failures: int = 0
    alone: bool = False

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass
class _Flight:
    """A submitted piece and its progress: number of images done, address of the worker, times of the first and last report."""

    piece: _Piece
    future: Any
    done: int = 0
    worker: str = ""
    begun: float = 0.0
    heard: float = 0.0


class _Run:
    """The run of one plan on one cluster."""

    def __init__(self, runner: ClusterShards, client: Any, plan: PlanFile, work: Work, advance: Advance) -> None:
        self._runner, self._client, self._plan, self._work, self._advance = runner, client, plan, work, advance
        self._waiting = deque(_Piece(number, 0, len(spec)) for number, spec in enumerate(work.specs))
        self._flying: dict[str, _Flight] = {}
        self._left: list[Any] = []  # futures at stuck workers: while these exist, such a worker gets no other task
        self._stuck: set[str] = set()
        self._finished: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._image_seconds: deque[float] = deque(maxlen=101)  # of shards that are finished
        self._lock = threading.Lock()
        self._submitted = 0
        self._resources: dict[str, float] = {}
        self._useful: list[str] = []  # addresses of workers
        self._window = AHEAD
        self._looked = self._alive = time.monotonic()

    def shards(self) -> Generator[MadeShard, None, None]:
        """Yield each shard when it is finished. After an error or Ctrl-C no shard is begun, and those in flight are finished."""
        import h5py  # noqa: F401 - first used between two presses of Ctrl-C: an import that one ends cannot be done again

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
                    logger.warning("stopping after the shards in flight; interrupt again (Ctrl-C) to drop them")
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
            for future in [*(flight.future for flight in self._flying.values()), *self._left]:
                future.cancel()
            if self._client.status == "running":
                self._client.unsubscribe_topic(topic)

    def _submit(self) -> None:
        while self._waiting and self._client.status == "running" and self._has_room(self._waiting[0]):
            piece = self._waiting.popleft()
            self._submitted += 1
            key = f"shard-{self._plan.token}-{self._submitted}"  # Dask learns what tasks cost that are called alike
            offset, length = self._plan.places[piece.number]
            task = ShardTask(str(self._plan.path), self._plan.token, offset, length, piece.start, piece.stop, key)
            others = [address for address in self._useful if address not in self._stuck]
            future = self._client.submit(
                make_shard,
                task,
                key=key,
                pure=False,
                resources=self._resources or None,
                workers=others or None if self._stuck else None,
                allow_other_workers=bool(self._stuck),  # those that come later
                priority=-piece.number,
            )
            self._flying[key] = _Flight(piece, future)
            future.add_done_callback(lambda future: self._finished.put(future.key))

    def _has_room(self, piece: _Piece) -> bool:
        if piece.alone or any(flight.piece.alone for flight in self._flying.values()):
            return not self._flying
        return len(self._flying) < self._window

    def _outcome(self, key: str) -> MadeShard | BaseException | None:
        """What came of a task: a shard, an error that ends the run, or nothing, where it is tried again."""
        import distributed

        if key not in self._flying:
            return None
        future = self._flying[key].future
        error, answer = None, None
        if future.status == "finished":
            try:
                answer = future.result(timeout=CONNECT_SECONDS)
            except Exception as problem:  # noqa: BLE001  the worker that held the record is lost; the shard is there
                logger.debug("%s: %s", key, first_line(problem))
        if answer is None and future.status == "error":  # of the task, or of the one that made the record again
            error = future.exception()
        with self._lock:
            flight = self._flying.pop(key)
        piece = flight.piece
        if answer is not None:
            made = self._made(piece, *answer)
            if isinstance(made, MadeShard):
                self._advance(len(piece) - flight.done)
                if flight.begun:
                    self._image_seconds.append((time.monotonic() - flight.begun) / len(piece))
            return made
        self._advance(-flight.done)
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
        refused = FeatureStore.open_shard(path).quarantine
        for name, reason in zip(refused.paths, refused.reasons, strict=True):
            logger.warning("%s is unreadable (%s); quarantined", printable(name), reason)
        return MadeShard(self._work.specs[piece.number], record, engine)

    def _split(self, piece: _Piece) -> MadeShard | None:
        """Split a shard that killed its workers, until one image is left, which is quarantined."""
        spec = self._work.specs[piece.number].part(piece.start, piece.stop)
        count, path = len(spec), shard_path(self._work.folder, spec.identity)
        if path.is_file() and (record := find_shard(path)) is not None:  # a worker that survived has written it
            self._advance(count)
            return MadeShard(self._work.specs[piece.number], record, "")
        if count == 1 and not piece.alone:
            # Dask blames every task that waits at a worker that dies, so another image may be the cause: try this one alone.
            self._waiting.appendleft(dataclasses.replace(piece, alone=True))
            return None
        if count == 1:
            logger.warning("%s kills each worker that reads it; quarantined", printable(spec.paths[0]))
            record = refuse_image(spec, self._work.folder, read=self._work.reader(), reason=KILLS_WORKER)
            self._advance(1)
            return MadeShard(self._work.specs[piece.number], record, "")
        logger.warning(
            "a shard of %d images (%s to %s) has killed its workers; it is split to find the image that does",
            *(count, printable(spec.paths[0]), printable(spec.paths[-1])),
        )
        bounds = sorted({piece.start + count * part // PARTS for part in range(PARTS + 1)})
        for low, high in reversed(list(itertools.pairwise(bounds))):
            self._waiting.appendleft(_Piece(piece.number, low, high))
        return None

    def _again(self, piece: _Piece, error: BaseException) -> BaseException | None:
        """Retry a piece after an error of the environment; return the error if it is a lasting one or a full disk."""
        full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
        lasting = full or (isinstance(error, BottleneckError) and not isinstance(error, StoreError))
        if not lasting and piece.failures < RETRIES:
            logger.warning("a shard failed (%s); trying it again", first_line(error))
            self._waiting.appendleft(dataclasses.replace(piece, failures=piece.failures + 1))
            return None
        if isinstance(error, BottleneckError):
            return error
        return ClusterError(
            f"a shard failed {piece.failures + 1} times on the workers ({type(error).__name__}: {first_line(error)}). "
            "See their logs. All finished work is kept; run the same command again."
        )

    def _drop_unbegun(self) -> None:
        for flight in self._take_unbegun():
            flight.future.cancel()

    def _take_unbegun(self) -> list[_Flight]:
        with self._lock:
            return [self._flying.pop(key) for key in [key for key, item in self._flying.items() if not item.begun]]

    def _hear(self, event: tuple[Any, dict[str, Any]]) -> None:
        """Take a progress report of one shard. If the shard starts again because its worker was lost, the count goes back."""
        said, now = event[1], time.monotonic()
        with self._lock:
            flight = self._flying.get(said["key"])
            if flight is None:
                return
            again = flight.begun and said["done"] == 0
            if said["done"] == 0:
                flight.begun = now
            more = said["done"] - flight.done
            flight.done, flight.worker, flight.heard = said["done"], said["worker"], now
        if again:
            logger.warning("a worker was lost; another one makes its shard")
        self._advance(more)

    def _watch(self) -> None:
        """Notice when the scheduler or all workers are lost."""
        if self._client.status not in ("running", "connecting"):
            raise ClusterError(
                f"{self._runner.cluster}: the scheduler was lost and has not come back. All finished work is kept: start "
                "it again, or leave out --cluster, and run the same command."
            )
        if self._client.status == "running" and time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
            self._leave_stuck()

    def _leave_stuck(self) -> None:
        """Give the shards of a stuck worker to others: it is alive, but its disk, its device or a library hangs."""
        if not self._image_seconds:
            return
        usual, now = statistics.median(self._image_seconds), time.monotonic()
        for key, flight in list(self._flying.items()):
            limit = max(STUCK_SECONDS, STUCK_TIMES * usual * len(flight.piece))
            if not flight.begun or now - flight.heard < limit or not {*self._useful} - {*self._stuck, flight.worker}:
                continue
            logger.warning(
                "%s has reported nothing for %.0f s; other workers make its shard", flight.worker, now - flight.heard
            )
            self._stuck.add(flight.worker)
            with self._lock:
                del self._flying[key]
            self._left.append(flight.future)
            self._advance(-flight.done)
            self._waiting.appendleft(flight.piece)
            for waiting in self._take_unbegun():  # some of them wait at that worker
                waiting.future.cancel()
                self._waiting.append(waiting.piece)

    def _look(self) -> None:
        try:
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
        except (OSError, KeyError):  # the connection is being lost, which is handled elsewhere
            return
        self._looked = now = time.monotonic()
        with_gpu = {address: worker for address, worker in workers.items() if worker.get("resources", {}).get(GPU)}
        if self._work.options.device == "gpu" and workers and not with_gpu and not self._resources:
            raise ConfigurationError(
                "device: a GPU was asked for, but no worker announces one. Start workers with "
                "`dask worker ADDRESS --nthreads 1 --resources GPU=1`, or use --device auto."
            )
        if with_gpu and self._work.options.device != "cpu":
            self._resources = {GPU: 1}
        useful = with_gpu if self._resources else workers
        self._useful = list(useful)
        if useful:
            self._alive = now
            self._window = max(AHEAD, AHEAD * sum(worker["nthreads"] for worker in useful.values()))
        elif now - self._alive > self._runner.patience:
            raise ClusterError(no_workers(self._runner.cluster, self._runner.patience))


def _first_image(work: Work) -> str | None:
    """Return an image that exists, or the archive that holds all of them; None if there are several archives."""
    root = str(work.images.root)
    if os.path.isfile(root) or work.images.reader is not None:
        return root if os.path.isfile(root) else None
    spec = work.specs[0]
    there = (path for path, size in zip(spec.paths, spec.sizes, strict=True) if size >= 0)
    return next((os.path.join(root, path) for path in there), None)
