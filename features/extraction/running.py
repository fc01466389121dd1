"""Make the shards of a plan, in this process or with another ``ShardRunner``, and check that no row is missing.

specs --runner()--> made shards, as they are finished --Reconciliation--> every planned row once, or an error
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import IntegrityError
from features.extraction.announcing import Announcer
from features.extraction.options import ExtractionOptions
from features.extraction.shard import Infer, ShardRecord, ShardSpec, extract_shard
from features.files import printable
from features.networks.engines import Engine
from features.pixels.processes import DecodeProcesses, how_many
from features.recipe import Recipe
from features.sources.imageset import ImageSet
from features.store.reader import FeatureStore

logger = logging.getLogger(__name__)
SHARDS_IN_FLIGHT = 2  # one goes through the network while the other is read
NAMED = 5  # most missing rows that an error lists


@dataclasses.dataclass(frozen=True)
class Work:
    """The shards to make, and everything that is needed to make them.

    Parameters
    ----------
    specs : sequence of ShardSpec
        The shards to make.
    folder : Path
        Folder for the shard files.
    images : ImageSet
        The source of the images that the specs name.
    network : Network
        The network; its ``engine(recipes, batch_size=, device=)`` computes the features.
    options : ExtractionOptions
        The options, of which ``batch_size``, ``workers``, ``device`` and ``engine`` are used.
    """

    specs: Sequence[ShardSpec]
    folder: Path
    images: ImageSet
    network: Any
    options: ExtractionOptions

    def engine(self, recipes: Sequence[Recipe]) -> Engine:
        """Open an engine for the feature sets of these recipes; views do not matter to it."""
        plain = tuple(recipe.plain for recipe in recipes)
        engine: Engine = self.network.engine(plain, batch_size=self.options.batch_size, device=self.options.device)
        return engine

    def reader(self) -> Callable[[str], bytes]:
        """Return a function that takes the path of an image and returns its bytes."""
        return self.images.read_path


@dataclasses.dataclass(frozen=True)
class MadeShard:
    """A finished shard in the folder, the planned shard that it covers fully or partly, and the engine's name."""

    planned: ShardSpec
    record: ShardRecord
    engine: str


# Called with the number of images finished since the last call; negative if the work of a lost machine is undone.
Advance = Callable[[int], None]
# Yields every shard when it is finished. After an error or Ctrl-C it starts no more shards, yields those in flight, and
# then raises.
ShardRunner = Callable[[Work, Advance], Generator[MadeShard, None, None]]


def run_here(work: Work, advance: Advance) -> Generator[MadeShard, None, None]:
    """Make the shards in this process, ``SHARDS_IN_FLIGHT`` at a time; a long run is announced after its first batches."""
    read, engine = work.reader(), _LazyEngine(work)
    announce = Announcer(work.network, work.options, sum(map(len, work.specs)))

    def finished(images: int) -> None:
        announce(images)
        advance(images)

    def make(spec: ShardSpec) -> MadeShard:
        record = extract_shard(
            spec,
            work.folder,
            read=read,
            infer=engine.for_recipes(spec.recipes),
            decoders=decoders,
            batch_size=work.options.batch_size,
            advance=finished,
            processes=processes,
        )
        return MadeShard(spec, record, engine.name)

    with (
        _decode_processes(work) as processes,
        ThreadPoolExecutor(work.options.workers or work.images.threads, "decode") as decoders,
        ThreadPoolExecutor(SHARDS_IN_FLIGHT, "shard") as runners,
    ):
        try:
            yield from _bounded(runners, make, work.specs)
        except KeyboardInterrupt:
            engine.stop.set()  # after a second Ctrl-C the shards in flight end at their next batch
            raise
        # If the consumer of this generator is interrupted instead, the shards in flight are finished, and the next run
        # finds their files.


def _decode_processes(work: Work) -> contextlib.AbstractContextManager[DecodeProcesses | None]:
    """Start processes that decode if they pay; None where threads do as well, or the images are no files."""
    count = how_many(sum(map(len, work.specs)), work.options.workers) if work.images.reader is None else 0
    if not count:
        return contextlib.nullcontext()
    try:
        return DecodeProcesses(count, max(spec.job.size for spec in work.specs), SHARDS_IN_FLIGHT)
    except OSError as error:
        logger.warning(
            "%d processes that decode cannot be started (%s); threads decode", count, error.strerror or error
        )
        return contextlib.nullcontext()


class _LazyEngine:
    """Engines for groups of feature sets, each built when first needed; calls overlap only if it is ``concurrent``."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._engines: dict[tuple[str, ...], Engine] = {}
        self._lock = threading.Lock()
        self.name = ""
        self.stop = threading.Event()

    def for_recipes(self, recipes: tuple[Recipe, ...]) -> Infer:
        names = tuple(recipe.name for recipe in recipes)

        def infer(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            if self.stop.is_set():
                raise KeyboardInterrupt
            with self._lock:
                if names not in self._engines:
                    self._engines[names] = self._work.engine(recipes)
                    self.name = self._engines[names].name
                engine = self._engines[names]
                if not engine.concurrent:
                    return engine(batch)
            return engine(batch)

        return infer


def _bounded(
    pool: ThreadPoolExecutor, function: Callable[[ShardSpec], MadeShard], specs: Sequence[ShardSpec]
) -> Iterator[MadeShard]:
    """Run ``function`` on all specs, ``SHARDS_IN_FLIGHT`` at a time, and yield results as they are finished.

    After an error or Ctrl-C no more are started; the results in flight are yielded before the error is raised.
    """
    pending: set[Future[MadeShard]] = set()
    queue = iter(specs)
    failure: BaseException | None = None
    while True:
        try:
            while failure is None and len(pending) < SHARDS_IN_FLIGHT and (spec := next(queue, None)) is not None:
                pending.add(pool.submit(function, spec))
            if not pending:
                break
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
        except KeyboardInterrupt as interrupt:
            if failure is not None:
                raise
            logger.warning("stopping after the shards in flight; interrupt again (Ctrl-C) to drop them")
            failure = interrupt
            continue
        for future in finished:
            error = future.exception()
            if error is None:
                yield future.result()
            else:
                failure = failure or error
    if failure is not None:
        raise failure


class Reconciliation:
    """Check that every planned row arrives in exactly one shard; otherwise an error names the rows.

    Parameters
    ----------
    specs : sequence of ShardSpec
        The planned shards. One may arrive as several smaller shards; a shard that arrives twice counts once.
    """

    def __init__(self, specs: Sequence[ShardSpec]) -> None:
        self._specs, self._waiting = specs, {spec.identity: number for number, spec in enumerate(specs)}
        self._partly: dict[str, Counter[str]] = {}  # the rows that are still missing of a planned shard
        self._seen: set[str] = set()

    def enter(self, made: MadeShard, shard: FeatureStore) -> bool:
        """Check a shard against the plan; False if it has arrived before.

        Raises
        ------
        IntegrityError
            If the shard contains rows, feature sets or views that were not planned for it.
        """
        planned, record = made.planned, made.record
        if record.identity in self._seen:
            return False
        found = Counter([*shard.images.paths, *shard.quarantine.paths])
        left = self._partly.pop(planned.identity, None)
        if left is None:
            left = Counter(planned.paths if planned.identity in self._waiting else ())
        excess = found - left
        prints = [recipe.fingerprint for recipe in planned.recipes]
        same = sorted(recipe.fingerprint for recipe in shard.recipes.values()) == sorted(prints)
        if excess or not same or tuple(record.views) != planned.views:
            what = printable(min(excess)) if excess else "other feature sets or views"
            raise IntegrityError(
                f"{shard.path}: was not planned to hold {what}. Remove that file and run the same command again."
            )
        self._seen.add(record.identity)
        if left - found:
            self._partly[planned.identity] = left - found
        else:
            del self._waiting[planned.identity]
        return True

    def finish(self) -> None:
        """Raise ``IntegrityError``, which names the first missing rows, unless every planned row has arrived."""
        if not self._waiting:
            return
        waiting = self._waiting.items()
        lacking = [self._partly.get(identity) or Counter(self._specs[number].paths) for identity, number in waiting]
        paths = [printable(path) for rows in lacking[:NAMED] for path in sorted(rows)[:NAMED]][:NAMED]
        count = sum(rows.total() for rows in lacking)
        raise IntegrityError(
            f"{count} planned rows are in no shard: {', '.join(paths)}{' and others' if count > len(paths) else ''}. "
            "The finished shards are kept; run the same command again to make the missing rows."
        )
