"""Forecast an extraction on many machines: arithmetic on a few measured figures, not a simulation.

seconds of one image -> of one shard -> of all shards on so many workers -> with start-up, losses and assembly
"""

from __future__ import annotations

import dataclasses
import math

from features.errors import ConfigurationError
from features.extraction.shard import SHARD_ROWS_MAX

# Memory of the process that runs the command, and of each image in it: path, hash, label, places (measured).
CLIENT_BYTES = 70_000_000
IMAGE_BYTES = 1300


@dataclasses.dataclass(frozen=True)
class Worker:
    """One worker process: two measurements and its hardware.

    Parameters
    ----------
    decode_seconds : float
        Seconds of one processor to read, decode and resize one view of one image.
    network_seconds : float
        Seconds of one processor, or of the device, for the forward pass of one view.
    processors : float
        Number of processors of the worker.
    separate_device : bool
        Whether the forward pass leaves the processors to decoding, as on a GPU. Then the slower of the two counts, else
        their sum.
    """

    decode_seconds: float
    network_seconds: float
    processors: float = 1.0
    separate_device: bool = False

    @property
    def images_per_second(self) -> float:
        """Images per second of one worker while it works.

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
    """Seconds of a run by phase; peak bytes on the shared disk and in the process that runs the command."""

    start: float
    planning: float
    extraction: float
    assembly: float
    disk_bytes: int
    memory_bytes: int

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return self.start + self.planning + self.extraction + self.assembly


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of a run apart from the work on images.

    Parameters
    ----------
    shard_rows : int
        Number of images in one shard.
    row_bytes : int
        Bytes of the features of one image.
    shard_seconds : float
        Seconds of a shard apart from its images: the task, filling the pipeline, writing and syncing the file.
    start_seconds : float
        Seconds until the workers are connected and warm.
    losses_per_hour : float
        Losses of each worker per hour.
    restart_seconds : float
        Seconds until the successor of a lost worker is warm.
    image_bytes : int
        Bytes of one image file.
    link_bytes_per_second : float
        Bandwidth of the shared file system for all workers together.
    assembly_bytes_per_second : float
        Rate at which features are read from shards and written to the store.
    planning_seconds : float
        Seconds of the command for one image: listing, planning, entering it in the tables (measured: 20 us).
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

    All shards take the same time, so the busiest worker makes ``ceil(shards / workers)`` of them one after the other; the
    last shard takes time in proportion to its rows. A lost worker costs half a shard on average, and the time until its
    successor is warm, so with ``losses_per_hour`` of each worker every second of work takes
    ``1 + losses_per_hour / 3600 * (shard / 2 + restart_seconds)`` seconds. No run is faster than the link over which
    all images are read. At the end one process writes the rows of all shards into one store (``--layout sharded`` writes an
    index instead: give ``assembly_bytes_per_second=math.inf``).

    Parameters
    ----------
    images : int
        Number of forward passes: images times views.
    workers : int
        Number of worker processes.
    worker : Worker
        Every worker.
    costs : Costs
        Costs apart from the work on images.

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
