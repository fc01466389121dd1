"""What an extraction on many machines will take: arithmetic on a few measured figures, no simulation.

seconds of one image -> of one shard -> of all shards on so many workers -> with start-up, losses and assembly
"""

from __future__ import annotations

import dataclasses
import math

from features.errors import ConfigurationError
from features.extraction.shard import SHARD_ROWS_MAX

CLIENT_BYTES = (
    70_000_000  # of the asking process, and what it keeps of each image: path, hash, label, places (measured)
)
IMAGE_BYTES = 1300


@dataclasses.dataclass(frozen=True)
class Worker:
    """One worker process, from two measurements and what it has.

    Parameters
    ----------
    decode_seconds : float
        Of one processor, to read, decode and resize one view of one image.
    network_seconds : float
        For the forward pass of one: of one processor, or of the device.
    processors : float
        That the worker has for itself.
    separate_device : bool
        Whether the forward pass leaves the processors to decoding, as on a GPU. Then the slower of both counts, else
        their sum.
    """

    decode_seconds: float
    network_seconds: float
    processors: float = 1.0
    separate_device: bool = False

    @property
    def images_per_second(self) -> float:
        """How fast one worker is while it is at work.

        Examples
        --------
        >>> Worker(0.001, 0.003, processors=2).images_per_second
        500.0
        >>> Worker(0.002, 0.0005, processors=8, separate_device=True).images_per_second
        2000.0
        """
        if self.separate_device:
            return 1 / max(self.decode_seconds / self.processors, self.network_seconds)
        return self.processors / (self.decode_seconds + self.network_seconds)


@dataclasses.dataclass(frozen=True)
class ClusterForecast:
    """Seconds of a run by what they go into; bytes on the shared disk at its fullest, and in the asking process."""

    start: float
    planning: float
    extraction: float
    assembly: float
    disk_bytes: int
    memory_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.start + self.planning + self.extraction + self.assembly


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a run costs beside the work of its workers.

    Parameters
    ----------
    shard_rows : int
        Images of one shard.
    row_bytes : int
        Bytes of one image's features.
    shard_seconds : float
        What a shard costs beside its images: the task, filling the pipeline, writing and syncing the file.
    start_seconds : float
        Until the workers are there and warm.
    losses_per_hour : float
        Of each worker.
    restart_seconds : float
        Until a lost worker's successor is warm.
    image_bytes : int
        Of one image file.
    link_bytes_per_second : float
        Of the shared file system, all workers together.
    assembly_bytes_per_second : float
        Of features, read from shards and written into the store.
    planning_seconds : float
        Of the asking process for one image: listing it, planning it, entering it in the tables (measured: 20 us).
    """

    shard_rows: int = SHARD_ROWS_MAX
    row_bytes: int = 5120
    shard_seconds: float = 0.1
    start_seconds: float = 5.0
    losses_per_hour: float = 0.0
    restart_seconds: float = 15.0
    image_bytes: int = 0
    link_bytes_per_second: float = math.inf
    assembly_bytes_per_second: float = 400e6
    planning_seconds: float = 20e-6


def forecast_cluster(images: int, workers: int, worker: Worker, costs: Costs = Costs()) -> ClusterForecast:
    """Predict how long a run takes.

    All shards take the same time, so ``ceil(shards / workers)`` of them follow each other on the busiest worker; the last
    one is as long as it has rows. A worker that is lost costs half of a shard on average, and the time until its successor is
    warm; so with ``losses_per_hour`` of each worker every second of work takes
    ``1 + losses_per_hour / 3600 * (shard / 2 + restart_seconds)`` seconds. No run is faster than the link over which
    all images come. At the end one process writes the rows of all shards into one store (``--layout sharded`` writes an
    index instead: give ``assembly_bytes_per_second=math.inf``).

    Parameters
    ----------
    images : int
        Pictures that go through the network: images times views.
    workers : int
        Worker processes.
    worker : Worker
        Each of them.
    costs : Costs
        What comes to their work.

    Examples
    --------
    >>> round(forecast_cluster(10_000_000, 10, Worker(0.0, 0.01)).seconds / 3600, 1)
    2.9
    """
    if min(images, workers, costs.shard_rows) < 1:
        raise ConfigurationError(
            f"forecast: received {images} images, {workers} workers, {costs.shard_rows} rows of a shard"
        )
    shards = math.ceil(images / costs.shard_rows)
    turns = math.ceil(shards / workers)
    last = images - (shards - 1) * costs.shard_rows
    alone = shards - (turns - 1) * workers == 1  # whether the last shard is made when all others are done
    rows = (turns - 1) * costs.shard_rows + (last if alone else costs.shard_rows)
    busy = rows / worker.images_per_second + turns * costs.shard_seconds
    shard = busy / turns
    busy *= 1 + costs.losses_per_hour / 3600 * (shard / 2 + costs.restart_seconds)
    return ClusterForecast(
        start=costs.start_seconds,
        planning=images * costs.planning_seconds,
        extraction=max(busy, images * costs.image_bytes / costs.link_bytes_per_second),
        assembly=images * costs.row_bytes / costs.assembly_bytes_per_second,
        disk_bytes=images * costs.row_bytes * (1 if math.isinf(costs.assembly_bytes_per_second) else 2),
        memory_bytes=CLIENT_BYTES + images * IMAGE_BYTES,
    )
