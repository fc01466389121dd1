"""Forecast the time and space that an extraction needs, by measuring a few batches of its own images.

plan -> decode and infer a few batches -> seconds, bytes on disk, bytes in memory
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from features.errors import UnreadableImageError
from features.extraction.planning import Plan
from features.extraction.running import SHARDS_IN_FLIGHT, Work
from features.extraction.shard import Infer
from features.machine import peak_memory
from features.pixels.batches import loaded
from features.pixels.views import DecodedViews

MEASURED_BATCHES = 3  # the first one is not counted, because it compiles the network


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Expected time and space of a plan.

    Parameters
    ----------
    images_per_second : float
        Measured rate of decoding and inference together, counting an image once with all its views.
    seconds : float
        Time for all images of the plan, without start-up.
    disk_bytes : int
        Peak disk space in bytes: the shards of new rows, and the store assembled from them.
    memory_bytes : int
        Peak memory of the process in bytes.
    """

    images_per_second: float
    seconds: float
    disk_bytes: int
    memory_bytes: int


def forecast(plan: Plan, work: Work, decoders: Executor) -> Forecast:
    """Measure a few batches and extrapolate to the whole plan.

    Parameters
    ----------
    plan : Plan
        A plan with at least one shard to make.
    work : Work
        The shards of the plan, with their images and network.
    decoders : Executor
        Threads that read and decode images.
    """
    spec, read, batch_size = plan.specs[0], work.reader(), work.options.batch_size
    infer = work.engine(spec.recipes)
    paths = spec.paths[: -(-MEASURED_BATCHES * batch_size // len(spec.views))]

    def load(path: str) -> DecodedViews:
        data = read(path)
        return spec.render(data, hashlib.sha256(data).digest())

    started = time.perf_counter()
    outcomes = [outcome for _, outcome in loaded(decoders, load, paths, len(paths))]
    decoding = (time.perf_counter() - started) / (len(paths) * len(spec.views))
    decoded = [pixels for item in outcomes if not isinstance(item, UnreadableImageError) for pixels in item.pixels]
    inference = _seconds_per_picture(infer, decoded, batch_size)
    # With a GPU, decoding and inference overlap fully, so only the slower of the two counts.
    each = decoding + inference if infer.device == "cpu" else max(decoding, inference)
    seconds, row_bytes = each * plan.passes, work.network.row_bytes
    return Forecast(
        images_per_second=plan.to_infer / max(seconds, 1e-9),
        seconds=seconds,
        disk_bytes=row_bytes * (plan.views * len(plan.images) + plan.passes),
        memory_bytes=peak_memory() + SHARDS_IN_FLIGHT * 2 * row_bytes * len(spec) * len(spec.views),
    )


def _seconds_per_picture(infer: Infer, pictures: Sequence[np.ndarray], batch_size: int) -> float:
    batches = [np.stack(pictures[start : start + batch_size]) for start in range(0, len(pictures), batch_size)]
    if not batches:
        return 0.0
    infer(batches[0])  # compiles the network
    counted = batches[1:] or batches
    started = time.perf_counter()
    for batch in counted:
        infer(batch)
    return (time.perf_counter() - started) / sum(map(len, counted))
