"""Calls spread over processes; the only module that uses joblib, and of it only `Parallel`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from features.errors import HeadError


def in_parallel(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """Results of ``function(*arguments)`` as they come, in any order; in this process where one is enough.

    Arrays that lie in files are mapped by the workers, not copied to them. Each worker has one thread.

    Raises
    ------
    HeadError
        If a worker was killed.
    """
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
