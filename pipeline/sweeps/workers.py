"""Run calls in parallel processes. This is the only module that uses joblib, and it uses only `Parallel`."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from features.children import end_with
from features.temporary import system_root


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
    copies. Each worker has one thread, and ends with this process. If a worker is killed, or a value cannot be sent back, the calls that the workers
    had in hand are repeated one at a time, and one that fails again is `Lost`. All other calls give their values.
    """
    client = _cluster.get()
    if client is None and min(jobs, len(calls)) < 2:
        yield from ((number, function(*arguments)) for number, arguments in enumerate(calls))
        return
    at_once = jobs if client is None else max(1, sum(client.nthreads().values()))
    left = dict(enumerate(calls))
    while left:
        try:
            for number, value in _values(function, left, at_once, client):
                del left[number]
                yield number, value
        except Exception:  # noqa: BLE001  whatever it was, the calls in hand are repeated, and the culprit then has a reason
            for number in list(left)[:at_once]:  # calls are handed out in order
                yield number, _alone(function, number, left.pop(number), client)


def _alone(function: Callable[..., Any], number: int, arguments: tuple[Any, ...], client: Any) -> Any:
    """The value of a single call, made in another process; `Lost` if there is none."""
    try:
        ((_, value),) = _values(function, {number: arguments}, 2, client)
    except Exception as problem:  # noqa: BLE001  returned as the reason
        return Lost(_reason(problem))
    return value


def _reason(problem: Exception) -> str:
    if isinstance(problem, BrokenProcessPool) or type(problem).__name__ == "KilledWorker":  # the latter is Dask's
        return (
            "its process was killed, and again when nothing ran beside it, most likely because memory ran out; leave this "
            "head out, or give it fewer columns (another pooling, or pca) or more memory"
        )
    return f"its result cannot be sent between processes ({type(problem).__name__}); train it with --n-jobs 1"


def _values(
    function: Callable[..., Any], calls: Mapping[int, tuple[Any, ...]], jobs: int, client: Any
) -> Iterator[tuple[int, Any]]:
    """Make calls in ``jobs`` processes here, or by joblib's Dask backend with one for each thread of the workers."""
    import joblib

    if client is None:
        ending = {"initializer": end_with, "initargs": (os.getpid(),)}
        backend: dict[str, Any] = {"backend": "loky", "inner_max_num_threads": 1, **ending}
        options: dict[str, Any] = {"n_jobs": jobs, "max_nbytes": None, "temp_folder": str(system_root())}
    else:
        backend, options = {"backend": "dask", "client": client}, {}
    with joblib.parallel_config(**backend):
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, **options)
        made = (joblib.delayed(_numbered)(function, number, *arguments) for number, arguments in calls.items())
        with contextlib.closing(parallel(made)) as results:
            yield from results


def _numbered(function: Callable[..., Any], number: int, *arguments: Any) -> tuple[int, Any]:
    """Call a function with a single thread, wherever it runs, so that the results are the same."""
    import threadpoolctl  # type: ignore[import-untyped]

    with threadpoolctl.threadpool_limits(1):
        return number, function(*arguments)
