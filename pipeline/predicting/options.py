"""The options of prediction, declared in one place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from features.errors import check_range
from features.machine import usual_batch

MOST_VIEWS = 1000


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Options of a prediction, apart from the run, the images and the output.

    Parameters
    ----------
    format : {"csv", "jsonl"}, optional
        Default: from the suffix of ``out``, else CSV. Columns: ``file``, ``class``, ``probability``, one per class name,
        and ``error``, the reason if an image has no prediction.
    top : int, optional
        Number of classes to write, the most probable first; all by default.
    views : int
        Number of views of each image, 1-1000, whose probabilities are averaged: the plain image, then variations of it.
    augment : str, optional
        Name of the preset for the other views. Default: the augmentation of the run's features.
    grid : Path, optional
        PNG or JPEG file for a picture of some images with their predictions, marked right or wrong where the source
        has labels.
    weights : str, optional
        Weights file of the network, if that of the extraction has moved.
    quantised : str, optional
        File of the quantised network of a run in int8, if it is in none of the usual places.
    batch_size : int, optional
        Number of images in one forward pass, 1-4096. Default: 256 where Keras may have a GPU, else 32.
    workers : int, optional
        Number of threads that read and decode, 1-1024; default: one for each processor.
    device : {"auto", "cpu", "gpu"}
        Device that the network runs on.
    data_set : str, optional
        Data set whose run is taken from a folder of runs; see `pipeline.runs.board.take_run`.
    trust : bool
        Load the head even if it needs to be trusted and this user has not signed it; see `pipeline.heads.kinds.load_head`.

    Raises
    ------
    ConfigurationError
        For a number out of range.
    """

    format: str | None = None
    top: int | None = None
    views: int = 1
    augment: str | None = None
    grid: str | Path | None = None
    weights: str | None = None
    quantised: str | None = None
    batch_size: int = None  # type: ignore[assignment]  # filled in by __post_init__
    workers: int | None = None
    device: str = "auto"
    data_set: str | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", usual_batch("auto", self.device))
        check_range("batch size", self.batch_size, 1, 4096)
        check_range("workers", 1 if self.workers is None else self.workers, 1, 1024)
        check_range("views", self.views, 1, MOST_VIEWS)
