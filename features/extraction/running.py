"""Make the shards of a plan: here, in this process, or wherever a ``ShardRunner`` that is given makes them.

specs --runner()--> made shards, as they are finished --Reconciliation--> every planned row once, or an error
"""

from __future__ import annotations

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
from features.extraction.options import ExtractionOptions
from features.extraction.shard import Infer, ShardRecord, ShardSpec, extract_shard
from features.files import printable
from features.machine import processors
from features.recipe import Recipe
from features.sources.scan import ImageSet
from features.store.reader import FeatureStore

logger = logging.getLogger(__name__)
SHARDS_IN_FLIGHT = 2  # one is inferred while the other is read
NAMED = 5  # missing rows that an error lists


@dataclasses.dataclass(frozen=True)
class Work:
    """Shards to make, and all that is needed for it.

    Parameters
    ----------
    specs : tuple of ShardSpec
        What to make.
    folder : Path
        Where shard files go.
    images : ImageSet
        The source that the specs name images of.
    network : Network
        ``engine(recipes, batch_size=, device=)`` infers.
    options : ExtractionOptions
        How they are made: ``batch_size``, ``workers``, ``device``, ``engine``.
    """

    specs: tuple[ShardSpec, ...]
    folder: Path
    images: ImageSet
    network: Any
    options: ExtractionOptions

    def engine(self, recipes: Sequence[Recipe]) -> Any:
        """An engine for these data sets; it knows nothing of views."""
        plain = tuple(recipe.plain for recipe in recipes)
        return self.network.engine(plain, batch_size=self.options.batch_size, device=self.options.device)

    def reader(self) -> Callable[[str], bytes]:
        """Path -> bytes."""
        index_of = {path: index for index, path in enumerate(self.images.paths)}
        return lambda path: self.images.read(index_of[path])


@dataclasses.dataclass(frozen=True)
class MadeShard:
    """A shard that lies in the folder: whole as it was planned, or a part of that; and the engine that made it."""

    planned: ShardSpec
    record: ShardRecord
    engine: str


# Told how many images more (or, where a machine was lost, fewer) have been dealt with.
Advance = Callable[[int], None]
# Gives every shard when it is finished. On an error or Ctrl-C it starts no more, gives what was in flight, and raises.
ShardRunner = Callable[[Work, Advance], Generator[MadeShard, None, None]]


def run_here(work: Work, advance: Advance) -> Generator[MadeShard, None, None]:
    """Make shards in this process, few at a time."""
    read, engine = work.reader(), _LazyEngine(work)

    def make(spec: ShardSpec) -> MadeShard:
        record = extract_shard(
            spec,
            work.folder,
            read=read,
            infer=engine.for_recipes(spec.recipes),
            decoders=decoders,
            batch_size=work.options.batch_size,
            advance=advance,
        )
        return MadeShard(spec, record, engine.name)

    with (
        ThreadPoolExecutor(work.options.workers or processors(), "decode") as decoders,
        ThreadPoolExecutor(SHARDS_IN_FLIGHT, "shard") as runners,
    ):
        try:
            yield from _bounded(runners, make, work.specs)
        except KeyboardInterrupt:
            engine.stop.set()  # after a second Ctrl-C the shards in flight end at their next batch
            raise
        # Who takes the shards was interrupted instead: those in flight are finished, and the next run finds their files.


class _LazyEngine:
    """Build an engine per group of data sets when it is first needed; forward passes overlap only where it allows."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._engines: dict[tuple[str, ...], Infer] = {}
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
                    self.name = getattr(self._engines[names], "name", "function")
                engine = self._engines[names]
                if not getattr(engine, "concurrent", False):
                    return engine(batch)
            return engine(batch)

        return infer


def _bounded(
    pool: ThreadPoolExecutor, function: Callable[[ShardSpec], MadeShard], specs: Sequence[ShardSpec]
) -> Iterator[MadeShard]:
    """Run with few in flight. On an error or Ctrl-C start no more, and hand out what was in flight first."""
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
            logger.warning("stopping after the shards in flight; press Ctrl-C again to drop them")
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
    """The plan is the truth: each planned row comes in exactly one shard, or there is an error that names it.

    Parameters
    ----------
    specs : sequence of ShardSpec
        What was planned. A planned shard may come in parts; the same shard may come twice and counts once.
    """

    def __init__(self, specs: Sequence[ShardSpec]) -> None:
        self._waiting = {spec.identity: spec for spec in specs}
        self._partly: dict[str, Counter[str]] = {}  # rows that a planned shard still lacks
        self._seen: set[str] = set()

    def enter(self, made: MadeShard, shard: FeatureStore) -> bool:
        """Check a shard against what was planned; False if it was entered before.

        Raises
        ------
        IntegrityError
            If it holds rows, data sets or views that were not planned for it.
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
            what = f"holds {printable(min(excess))}" if excess else "holds data sets or views"
            raise IntegrityError(
                f"{shard.path}: {what} that was not planned for it. Remove that file and run the same command again."
            )
        self._seen.add(record.identity)
        if left - found:
            self._partly[planned.identity] = left - found
        else:
            del self._waiting[planned.identity]
        return True

    def finish(self) -> None:
        """Raise IntegrityError, naming the first rows, unless every planned row has come."""
        if not self._waiting:
            return
        lacking = [self._partly.get(identity, Counter(spec.paths)) for identity, spec in self._waiting.items()]
        paths = [printable(path) for rows in lacking[:NAMED] for path in sorted(rows)[:NAMED]][:NAMED]
        count = sum(rows.total() for rows in lacking)
        raise IntegrityError(
            f"{count} planned rows are in no shard: {', '.join(paths)}{' and others' if count > len(paths) else ''}. What was "
            "finished is kept; run the same command again to make them."
        )
