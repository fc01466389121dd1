"""Calls spread over processes; the only module that uses joblib, and of it only `Parallel`."""

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
    """Have `in_parallel` use the workers of a Dask cluster, which see the same files, instead of processes here."""
    token = _cluster.set(client)
    try:
        yield
    finally:
        _cluster.reset(token)


def in_parallel(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """Results of ``function(*arguments)`` as they come, in any order; in this process where one is enough.

    Arrays that lie in files are mapped by the workers, not copied to them. Each worker has one thread.

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
                    "a worker was killed, most likely by the system for want of memory. What was finished is kept: "
                    "run the same command again with a smaller --memory, or with --n-jobs 1"
                ) from problem


def _by_dask(client: Any, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """By joblib's backend, one call at a time in each thread of the workers; what a lost worker did is done again."""
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
                    "a head has killed every worker that trained it, most likely for want of memory. What was finished is "
                    "kept: give the workers more, or leave that head out"
                ) from problem


def _in_one_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """As loky's processes compute, so that the results are the same."""
    import threadpoolctl  # type: ignore[import-untyped]

    with threadpoolctl.threadpool_limits(1):
        return function(*arguments)
