"""The options of predicting, declared once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from features.errors import check_range

MOST_VIEWS = 1000


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """What predicting is asked for, beside the run, the images and where the rows go.

    Parameters
    ----------
    format : {"csv", "jsonl"}, optional
        By default that of ``out``'s name, else CSV. Columns: ``file``, ``class``, ``probability``, one per class name,
        and ``error``, which says why an image has no prediction.
    top : int, optional
        Only so many classes, the most probable first.
    views : int
        Average the probabilities over so many views of each image, 1-1000: the plain one, and variations of it.
    augment : str, optional
        Preset that they are drawn from. By default what the run's features were drawn from.
    grid : Path, optional
        Picture of some of the images with their predictions, PNG or JPEG. Right and wrong are marked where the source
        says what the images are.
    weights : str, optional
        Where the network's weights are now, if not where the extraction found them.
    batch_size : int
        Images of one forward pass, 1-4096.
    workers : int, optional
        Threads that read and decode, 1-1024; the processors of this process without it.
    device : {"auto", "cpu", "gpu"}
        Where the network runs.

    Raises
    ------
    ConfigurationError
        For a number out of its range.
    """

    format: str | None = None
    top: int | None = None
    views: int = 1
    augment: str | None = None
    grid: str | Path | None = None
    weights: str | None = None
    batch_size: int = 32
    workers: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_range("batch size", self.batch_size, 1, 4096)
        check_range("workers", 1 if self.workers is None else self.workers, 1, 1024)
        check_range("views", self.views, 1, MOST_VIEWS)
