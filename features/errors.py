"""One exception tree. Each class also inherits the builtin that a caller would expect to catch.

``exit_code`` is what the command line returns when the error reaches it: 1 failed, 2 wrong usage or
configuration, 3 integrity failure, 4 too many unreadable images.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class BottleneckError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 1


class ConfigurationError(BottleneckError, ValueError):
    """A name, option or combination of options that does not exist."""

    exit_code = 2


class SourceError(BottleneckError, ValueError):
    """An image source that cannot be used: missing, empty, one class only, a malformed manifest."""


class UnreadableImageError(BottleneckError, OSError):
    """One image that cannot be decoded. ``reason`` is one of ``features.pixels.decode.REASONS``.

    Parameters
    ----------
    reason : str
        A word of the fixed vocabulary.
    detail : str
        What exactly was met, for a person.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class TooManyUnreadableError(BottleneckError, ValueError):
    """More images are unreadable than the user allowed."""

    exit_code = 4


class WeightsError(BottleneckError, ValueError):
    """Weights that do not fit the backbone, or are not what their checksum promises."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """No route led to the weights; the message names every route tried."""


class StoreError(BottleneckError, OSError):
    """A feature store that cannot be written or opened."""


class IntegrityError(StoreError, ValueError):
    """A feature store whose content is not what was written."""

    exit_code = 3


class FormatVersionError(StoreError, ValueError):
    """A feature store, shard or run of a format version that this release does not know."""


class LockedError(StoreError, BlockingIOError):
    """Another process is writing the same store."""


class ExtractionError(BottleneckError, RuntimeError):
    """A forward pass whose result cannot be stored, such as a value that is not finite."""


class ClusterError(BottleneckError, RuntimeError):
    """A cluster that cannot be reached, or workers that cannot do the work; the message names the way out."""


class OpenVinoError(BottleneckError, RuntimeError):
    """OpenVINO cannot run this network here, or not correctly; Keras can."""


class HeadError(BottleneckError, ValueError):
    """A head that cannot be trained on these features, or be loaded."""


class RunError(BottleneckError, ValueError):
    """A run folder that is missing, incomplete or does not fit what it is used for."""


class ParityError(BottleneckError, ArithmeticError):
    """The assembled model does not give the probabilities of the cached head."""

    exit_code = 3


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ``ConfigurationError`` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ConfigurationError(f"{name}: received {value}, expected {low} to {high}")


def check_batch(images: Any, shape: tuple[int, ...]) -> None:
    """Raise ``ConfigurationError`` unless an engine can take ``images``: uint8, at most ``shape[0]`` of ``shape[1:]``."""
    if len(images) > shape[0] or images.shape[1:] != shape[1:] or images.dtype != "uint8":
        raise ConfigurationError(f"engine: received {images.dtype} {images.shape}, expected uint8 {shape}")


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint that names the known words nearest to ``name``.

    Examples
    --------
    >>> nearest("vgg61", ["vgg16", "vgg19", "resnet50"])
    "; did you mean 'vgg16' or 'vgg19'?"
    >>> nearest("xyz", ["vgg16"])
    ''
    """
    by_lower = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.55)
    return "; did you mean " + " or ".join(repr(by_lower[word]) for word in found) + "?" if found else ""
