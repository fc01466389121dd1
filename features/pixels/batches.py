"""Read images ahead, decode them and make batches: the only loop between images and a network.

    items --loaded()--> (item, pixels or error), in order --batches()--> pixels for one forward pass after another

The caller passes ``load``, which turns an item into an object with ``pixels`` or raises ``UnreadableImageError``; or takes
``features.pixels.processes`` instead of ``loaded``.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Generic, Protocol, TypeVar

import numpy as np

from features.errors import UnreadableImageError
from features.recipe import PixelRule

WINDOW_MIN = 8  # fewest images to read ahead, however many views each has


class Pictures(Protocol):
    """What ``load`` must return: an object with the pixels of an image's views, uint8, ``(views, h, w, 3)``."""

    @property
    def pixels(self) -> Sequence[np.ndarray] | np.ndarray: ...


Item = TypeVar("Item")
Result = TypeVar("Result")
Loaded = TypeVar("Loaded", bound=Pictures)


@dataclasses.dataclass(frozen=True)
class Batch(Generic[Item, Loaded]):
    """The pictures of one forward pass, and the images that are complete after it.

    Parameters
    ----------
    pixels : uint8, (k, h, w, 3), 0-255
        Views of one or several images, in order; valid until the next batch is requested. ``k`` is 0 if no image
        since the last batch could be read.
    done : list of (item, loaded)
        Images whose last view is in this batch, in order.
    refused : list of (item, UnreadableImageError)
        Images since the last batch that could not be read.
    """

    pixels: np.ndarray
    done: list[tuple[Item, Loaded]]
    refused: list[tuple[Item, UnreadableImageError]]


def batches(
    outcomes: Iterable[tuple[Item, Loaded | UnreadableImageError]], rule: PixelRule, batch_size: int
) -> Iterator[Batch[Item, Loaded]]:
    """Yield full batches of the pictures, in their order.

    Parameters
    ----------
    outcomes : iterable of (item, object with ``pixels`` (views, h, w, 3), or UnreadableImageError)
        The images, as ``loaded`` yields them.
    rule : PixelRule
        Gives the height and width of a picture.
    batch_size : int
        Number of pictures in a batch; only the last batch may have fewer.
    """
    pixels = np.empty((batch_size, rule.height, rule.width, 3), np.uint8)
    batch: Batch[Item, Loaded] = Batch(pixels, [], [])
    filled = 0
    for item, outcome in outcomes:
        if isinstance(outcome, UnreadableImageError):
            batch.refused.append((item, outcome))
            continue
        last = len(outcome.pixels) - 1
        for number, picture in enumerate(outcome.pixels):
            pixels[filled] = picture
            filled += 1
            if number == last:
                batch.done.append((item, outcome))
            if filled == batch_size:
                yield batch
                batch, filled = Batch(pixels, [], []), 0
    if filled or batch.refused:
        yield dataclasses.replace(batch, pixels=pixels[:filled])


def loaded(
    pool: Executor, load: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Iterator[tuple[Item, Result | UnreadableImageError]]:
    """Load items on threads and yield each with its result or its error. At least 8 items are read ahead."""

    def attempt(item: Item) -> tuple[Item, Result | UnreadableImageError]:
        try:
            return item, load(item)
        except UnreadableImageError as error:
            return item, error.with_traceback(None)  # the traceback would keep the bytes of the file in memory

    return ahead(pool, attempt, items, max(WINDOW_MIN, window))


def ahead(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], window: int) -> Iterator[Result]:
    """Yield results in the order of the items; at most ``window`` of them wait, so that memory stays constant."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
