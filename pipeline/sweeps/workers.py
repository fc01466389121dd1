"""Run calls in parallel processes. This is the only module that uses joblib, and it uses only `Parallel`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from features.errors import HeadError

_cluster: contextvars.ContextVar[Any] = contextvars.ContextVar("cluster", default=None)


@contextlib.contextmanager
def on_cluster(client: Any) -> Iterator[None]:
    """Make `in_parallel` use the workers of a Dask cluster, which must see the same files, instead of local processes."""
    token = _cluster.set(client)
    try:
        yield
    finally:
        _cluster.reset(token)


def in_parallel(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """Yield the results of ``function(*arguments)`` as they come, in any order.

    A single call, or ``jobs`` of 1, needs no other process. Workers map arrays that are in files instead of receiving
    copies. Each worker has one thread.

    Raises
    ------
    HeadError
        If a worker was killed.
    """
    client = _cluster.get()
    if client is not None:
        yield from _by_dask(client, function, calls)
        return
    if min(jobs, len(calls)) < 2:
        yield from (function(*arguments) for arguments in calls)
        return
    import joblib

    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", max_nbytes=None)
        with contextlib.closing(parallel(joblib.delayed(function)(*arguments) for arguments in calls)) as results:
            try:
                yield from results
            except BrokenProcessPool as problem:
                raise HeadError(
                    "a worker process was killed, most likely by the system because memory ran out. Finished heads are kept: "
                    "run the same command again with a smaller --memory, or with --n-jobs 1"
                ) from problem


def _by_dask(client: Any, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Run calls by joblib's Dask backend, one per thread of the workers; calls of a lost worker are run again."""
    import distributed
    import joblib

    with joblib.parallel_config(backend="dask", client=client):
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        with contextlib.closing(
            parallel(joblib.delayed(_in_one_thread)(function, *arguments) for arguments in calls)
        ) as results:
            try:
                yield from results
            except distributed.scheduler.KilledWorker as problem:
                raise HeadError(
                    "every worker that trained a certain head was killed, most likely because memory ran out. Finished heads "
                    "are kept: give the workers more memory, or leave that head out"
                ) from problem


def _in_one_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with a single thread, as in loky's processes, so that the results are the same."""
    import threadpoolctl  # type: ignore[import-untyped]

    with threadpoolctl.threadpool_limits(1):
        return function(*arguments)
