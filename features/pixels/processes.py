"""Decode image files in processes of their own: on many processors, one Python cannot keep all of them busy.

    paths, a few at a time --> child: read, hash, decode, render --> pixels in shared memory; sizes and reasons come back

The children are started as fresh programs. They end with this process, and the shared memory, which has no name, with
the last of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import mmap
import os
import queue
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO

import numpy as np

from features.augmentation import AugmentSpec
from features.children import start_module
from features.errors import ConfigurationError, ExtractionError, UnreadableImageError
from features.files import printable
from features.machine import processors
from features.pixels.batches import ahead
from features.pixels.decode import read_bytes
from features.pixels.limits import memory, watch
from features.pixels.views import DecodedViews, decode_views
from features.recipe import PixelRule

logger = logging.getLogger(__name__)

SETTING = "BOTTLENECK_DECODE_PROCESSES"
FEW_PROCESSORS = 4  # up to this many, threads of one process decode as fast
MOST = 16
IMAGES_EACH = 500  # fewer are decoded before a process has started
CHUNK = 16  # views that are asked for at a time
CHUNK_BYTES = 16 << 20  # of their pixels, unless one image has more
_SECONDS = 5.0  # a child may take to end

# What a child says of an image: its sha256, then width and height, or a reason and a text.
Answer = tuple[bytes, int, int] | tuple[bytes, str, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is done with every image.

    Parameters
    ----------
    root : str
        Folder of the images.
    rule : PixelRule
        Decoding and resizing.
    augmentation : AugmentSpec or None
        Ranges of the views' parameters.
    seed : int
        The recipe's seed.
    views : tuple of int
        Numbers of the views.
    """

    root: str
    rule: PixelRule
    augmentation: AugmentSpec | None
    seed: int
    views: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of an image's views."""
        return len(self.views), self.rule.height, self.rule.width, 3

    @property
    def chunk(self) -> int:
        """Number of images that a child is asked for at a time."""
        return max(1, min(CHUNK // len(self.views), CHUNK_BYTES // int(np.prod(self.shape))))

    @property
    def size(self) -> int:
        """Bytes of a chunk's pixels."""
        return self.chunk * int(np.prod(self.shape))

    def answer(self, path: str, pixels: np.ndarray) -> Answer:
        """Decode one image into ``pixels``, uint8, (views, h, w, 3)."""
        sha256 = bytes(32)
        try:
            data = read_bytes(os.path.join(self.root, path))
            sha256 = hashlib.sha256(data).digest()
            with watch.over(path):
                views = decode_views(
                    data, self.rule, self.augmentation, seed=self.seed, sha256=sha256, views=self.views
                )
        except UnreadableImageError as error:
            return sha256, error.reason, str(error)
        pixels[:] = views.pixels
        return sha256, views.width, views.height


def how_many(images: int, workers: int | None) -> int:
    """Return the number of processes that pay for so many images; 0 if threads are as good.

    ``workers`` is the wish of the user; ``BOTTLENECK_DECODE_PROCESSES`` overrides all, and 0 means threads.

    Raises
    ------
    ConfigurationError
        If the environment variable is not a number of 0 or more.
    """
    if setting := os.environ.get(SETTING):
        if not setting.isdecimal():
            raise ConfigurationError(f"{SETTING}: received {setting!r}, expected a number of processes; 0 for threads")
        return int(setting)
    if processors() <= FEW_PROCESSORS:
        return 0
    count = min(workers or processors(), MOST, images // IMAGES_EACH)
    return count if count > 1 else 0


class DecodeProcesses:
    """Processes that decode, and the memory that they write to.

    Parameters
    ----------
    count : int
        Number of processes.
    size : int
        Largest ``Job.size`` that will be asked for.
    streams : int
        Number of ``decoded`` that may run at the same time, each in its thread.

    Raises
    ------
    OSError
        If not so many processes, or not so much memory, can be had.
    """

    def __init__(self, count: int, size: int, streams: int) -> None:
        self._window = count + 1
        slots = streams * (self._window + 1)
        self._children: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[tuple[Connection, subprocess.Popen[bytes]]] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._connections: list[Connection] = []
        self._threads = ThreadPoolExecutor(count, "decode")
        with _nameless(slots * size) as file, contextlib.ExitStack() as started:
            started.push(self)  # those that have started end if another cannot
            self._memory = mmap.mmap(file.fileno(), slots * size)
            for _ in range(count):
                self._start(file.fileno(), slots * size)
            started.pop_all()
        for slot in range(slots):
            self._free.put(slot * size)

    def _start(self, file: int, size: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            numbers = (theirs.fileno(), file, size)
            child = start_module("features.pixels.processes", *map(str, numbers), pass_fds=numbers[:2])
        connection = Connection(ours.detach())
        self._children.append(child)
        self._connections.append(connection)
        self._idle.put((connection, child))
        logger.debug("process %d decodes images", child.pid)

    def decoded(
        self, job: Job, paths: Sequence[str]
    ) -> Iterator[tuple[int, bytes, DecodedViews | UnreadableImageError]]:
        """Yield index, sha256 (zeros where no byte was read) and result of each image, in order.

        The pixels are valid until the next one is asked for.

        Raises
        ------
        ExtractionError
            If a process has ended.
        """

        def ask(start: int) -> tuple[int, int, list[Answer]]:
            slot = self._free.get()
            connection, child = self._idle.get()
            chunk = tuple(paths[start : start + job.chunk])
            try:
                connection.send((job, slot, chunk))
                return start, slot, connection.recv()
            except (EOFError, OSError) as error:
                raise ExtractionError(_ended(child, job, chunk)) from error
            finally:
                self._idle.put((connection, child))

        for start, slot, answers in ahead(self._threads, ask, range(0, len(paths), job.chunk), self._window):
            pixels = _pixels(self._memory, slot, job)
            for number, (sha256, first, second) in enumerate(answers):
                if isinstance(first, str):
                    yield start + number, sha256, UnreadableImageError(first, str(second))
                else:
                    yield start + number, sha256, DecodedViews(pixels[number], first, int(second))
            self._free.put(slot)

    def __enter__(self) -> DecodeProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # a thread may be waiting for an image that nobody needs any more
            for child in self._children:
                child.kill()
        self._threads.shutdown(cancel_futures=True)
        for connection in self._connections:  # a child that waits for work ends
            connection.close()
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_SECONDS)
            child.kill()
            child.wait()


def _nameless(size: int) -> IO[bytes]:
    """Return a file of ``size`` bytes that has no name: in memory on Linux, else among the temporary files."""
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("pixels"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    file.truncate(size)
    return file


def _pixels(shared: mmap.mmap, slot: int, job: Job) -> np.ndarray:
    """Return the pixels of a chunk, uint8, (images, views, h, w, 3), at a place in the shared memory."""
    return np.frombuffer(shared, np.uint8, job.size, slot).reshape(job.chunk, *job.shape)


def _ended(child: subprocess.Popen[bytes], job: Job, paths: Sequence[str]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_SECONDS)
    named = ", ".join(printable(path) for path in (paths[0], paths[-1]))
    return (
        f"a process that decodes images ended (exit code {child.returncode}) at one of {len(paths)} images in {job.root}: "
        f"{named} or between. Finished shards are kept; run again, or add --cluster local:1, which sets an image aside that "
        "ends its worker each time."
    )


def _serve(connection: Connection, shared: mmap.mmap) -> None:
    """Answer one request after another until the other process closes the connection or ends."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            job, slot, paths = connection.recv()
            pixels = _pixels(shared, slot, job)
            connection.send([job.answer(path, pixels[number]) for number, path in enumerate(paths)])


def _main() -> None:
    connection, file, size = map(int, sys.argv[1:])
    memory.share(file)
    _serve(Connection(connection), mmap.mmap(file, size))


if __name__ == "__main__":
    _main()
