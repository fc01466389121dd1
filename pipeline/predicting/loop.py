"""The loop of prediction: images are read a little ahead, predicted in batches, and given back in order."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np

from features.files import printable
from features.pixels.batches import loaded
from pipeline.predicting.files import Prediction
from pipeline.predicting.predictors import Model

logger = logging.getLogger(__name__)
WARNED = 10  # unreadable images named in warnings


class Item(NamedTuple):
    """An image to predict: its name, a function that reads its bytes, and its class if it is known."""

    name: str
    read: Callable[[], bytes]
    label: str = ""


def predictions(model: Model, items: Iterable[Item], pool: Executor) -> Iterator[list[tuple[Item, Prediction]]]:
    """Yield predictions in the order of the images, a batch at a time. Only a few images are in memory.

    Parameters
    ----------
    model : Model
        The model.
    items : iterable of Item
        Images, which are read a little ahead.
    pool : Executor
        Threads that read and decode.
    """
    named = 0

    coming = loaded(pool, lambda item: model.load(item.read()), items, 2 * model.batch_size)
    while batch := list(itertools.islice(coming, model.batch_size)):
        pixels = [found for _, found in batch if isinstance(found, np.ndarray)]
        probabilities = iter(model(pixels) if pixels else ())
        answers = []
        for item, found in batch:
            if isinstance(found, np.ndarray):
                answers.append((item, Prediction(item.name, next(probabilities))))
                continue
            answers.append((item, Prediction(item.name, None, found.reason)))
            named += 1
            if named <= WARNED:
                logger.warning("%s is unreadable (%s)", printable(item.name), found)
        yield answers
