"""Run calls in parallel processes. This is the only module that uses joblib, and it uses only `Parallel`."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from features.children import end_with


class Lost(NamedTuple):
    """The outcome of a call that gave no value even in a process of its own, and the reason."""

    reason: str


_cluster: contextvars.ContextVar[Any] = contextvars.ContextVar("cluster", default=None)


@contextlib.contextmanager
def on_cluster(client: Any) -> Iterator[None]:
    """Make `in_parallel` use the workers of a Dask cluster, which must see the same files, instead of local processes."""
    token = _cluster.set(client)
    try:
        yield
    finally:
        _cluster.reset(token)


def in_parallel(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[tuple[int, Any]]:
    """Yield the number of each call and the value of ``function(*arguments)`` as they come, in any order.

    A single call, or ``jobs`` of 1, needs no other process. Workers map arrays that are in files instead of receiving
    copies. Each worker has one thread, and ends with this process. If a worker is killed, or a value cannot be sent back,
    the calls that the workers had in hand are repeated one at a time, and one that fails again is `Lost`. All other calls
    give their values.
    """
    client = _cluster.get()
    if client is not None:
        yield from _by_dask(client, function, calls)
        return
    if min(jobs, len(calls)) < 2:
        yield from ((number, function(*arguments)) for number, arguments in enumerate(calls))
        return
    left = dict(enumerate(calls))
    while left:
        try:
            for number, value in _values(function, left, jobs):
                del left[number]
                yield number, value
        except Exception:  # noqa: BLE001  whatever it was, the calls in hand are repeated, and the culprit then has a reason
            for number in list(left)[:jobs]:  # calls are handed out in order
                yield number, _alone(function, number, left.pop(number))


def _alone(function: Callable[..., Any], number: int, arguments: tuple[Any, ...]) -> Any:
    """The value of a single call, made in another process; `Lost` if there is none."""
    try:
        ((_, value),) = _values(function, {number: arguments}, 2)
    except Exception as problem:  # noqa: BLE001  returned as the reason
        return Lost(_reason(problem))
    return value


def _reason(problem: Exception) -> str:
    if _was_killed(problem):
        return (
            "its process was killed each time, at last with nothing beside it, most likely because memory ran out; leave this "
            "head out, or give it fewer columns (another pooling, or pca) or more memory"
        )
    return f"its result cannot be sent between processes ({type(problem).__name__}); train it with --n-jobs 1"


def _was_killed(problem: Exception) -> bool:
    return isinstance(problem, BrokenProcessPool) or type(problem).__name__ == "KilledWorker"  # the latter is Dask's


def _values(function: Callable[..., Any], calls: Mapping[int, tuple[Any, ...]], jobs: int) -> Iterator[tuple[int, Any]]:
    """Make calls in ``jobs`` processes; raises an exception if one of them gives no value."""
    import joblib

    ending = {"initializer": end_with, "initargs": (os.getpid(),)}
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1, **ending):
        parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", max_nbytes=None, batch_size=1)
        made = (joblib.delayed(_numbered)(function, number, *arguments) for number, arguments in calls.items())
        results = parallel(made)
        try:
            while True:
                with _without_advice():
                    found = next(results, None)
                if found is None:
                    return
                yield found
        finally:
            with _without_advice():
                results.close()


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Without joblib's advice to its caller about tasks that an interruption cancels."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="(?s).*You could benefit from adjusting the input", category=UserWarning
        )
        yield


def _by_dask(client: Any, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Make calls on a cluster, one for each thread of its workers.

    Dask runs the calls of a killed worker again and gives up those that were on several: the culprit, and whatever was often
    beside it. These are made once more when all others are done, one at a time, so that only the culprit is lost.

    joblib has a backend for Dask, but it waits for ever for a call that failed (seen in 1.6).
    """
    import distributed

    left = enumerate(calls)
    given_up: list[int] = []
    alone = False
    flying: dict[Any, int] = {}
    done = distributed.as_completed(loop=client.loop)
    try:
        while True:
            room = 2 * max(1, sum(client.nthreads().values())) - len(flying)
            next_calls = list(itertools.islice(left, max(0, room)))
            if not flying and not next_calls:
                if not given_up:
                    return
                alone = True
                number = given_up.pop(0)
                next_calls = [(number, calls[number])]
            for number, arguments in next_calls:
                future = client.submit(_numbered, function, number, *arguments, pure=False)
                flying[future] = number
                done.add(future)
            future = next(done)
            number = flying.pop(future)
            try:
                _, value = future.result()
            except Exception as problem:  # noqa: BLE001  returned as the reason
                if _was_killed(problem) and not alone:
                    given_up.append(number)
                    continue
                value = Lost(_reason(problem))
            yield number, value
    finally:
        client.cancel(list(flying))


def _numbered(function: Callable[..., Any], number: int, *arguments: Any) -> tuple[int, Any]:
    """Call a function with a single thread, wherever it runs, so that the results are the same."""
    import threadpoolctl  # type: ignore[import-untyped]

    with threadpoolctl.threadpool_limits(1):
        return number, function(*arguments)
