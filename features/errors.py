"""The exceptions of this project. Each also inherits the built-in exception that a caller would expect to catch.

``exit_code`` is the exit code of the command line when the error reaches it: 1 failed, 2 wrong usage or
configuration, 3 integrity failure, 4 too many unreadable images.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

LONGEST_MESSAGE = 1000  # characters of an error that are shown


class BottleneckError(Exception):
    """Base of every error that this project raises on purpose. Its text has at most 1,000 characters.

    Examples
    --------
    >>> from features import BottleneckError, FeatureStore
    >>> try:
    ...     FeatureStore.open("nowhere.h5")
    ... except BottleneckError as error:
    ...     print(type(error).__name__, "nowhere.h5" in str(error))
    StoreError True
    """

    exit_code = 1

    def __str__(self) -> str:
        return brief(super().__str__())


class ConfigurationError(BottleneckError, ValueError):
    """A name, option or combination of options that does not exist."""

    exit_code = 2


class SourceError(BottleneckError, ValueError):
    """An image source that cannot be used, for example a missing or empty folder, or a malformed manifest."""


class UnreadableImageError(BottleneckError, OSError):
    """One image that cannot be read or decoded.

    Parameters
    ----------
    reason : str
        One of ``features.pixels.decode.REASONS``.
    detail : str
        What exactly was found, in words for the user.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class TooManyUnreadableError(BottleneckError, ValueError):
    """More images are unreadable than the user allowed."""

    exit_code = 4


class WeightsError(BottleneckError, ValueError):
    """Weights that do not fit the network, or whose checksum is not the expected one."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """Weights that were not found; the message lists every place that was searched."""


class FetchError(WeightsError):
    """Something could not be fetched. ``status`` is that of HTTP, 0 if there was no answer; ``code`` is the hub's own."""

    def __init__(self, message: str, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class StoreError(BottleneckError, OSError):
    """A feature store that cannot be written or opened."""


class IntegrityError(StoreError, ValueError):
    """A feature store whose content differs from what was written."""

    exit_code = 3


class FormatVersionError(StoreError, ValueError):
    """A feature store, shard or run of a format version that this release does not know."""


class LockedError(StoreError, BlockingIOError):
    """Another process is writing the same store."""


class ExtractionError(BottleneckError, RuntimeError):
    """A forward pass whose result cannot be stored, such as a value that is not finite."""


class ClusterError(BottleneckError, RuntimeError):
    """A cluster that cannot be reached, or workers that cannot do the work; the message says what to do."""


class OpenVinoError(BottleneckError, RuntimeError):
    """A network that OpenVINO cannot run on this machine, or not correctly; the Keras engine can."""


class HeadError(BottleneckError, ValueError):
    """A head that cannot be trained on these features, or cannot be loaded."""


class UntrustedHeadError(HeadError):
    """A head in a file of a kind that must be trusted before it is loaded, and that this user has not signed."""


class RunError(BottleneckError, ValueError):
    """A run folder that is missing or incomplete, or that does not fit its use."""


class LabelsError(BottleneckError, ValueError):
    """A labels file that cannot be understood, or that belongs to other images."""


class RequestError(ConfigurationError):
    """A request to the page of a review that the page does not send."""


class ParityError(BottleneckError, ArithmeticError):
    """An assembled model whose probabilities differ from those of its head on the cached features."""

    exit_code = 3


def brief(text: str, limit: int = LONGEST_MESSAGE) -> str:
    """Shorten a text to at most ``limit`` characters. Its end is kept, because an error ends with what to do.

    Examples
    --------
    >>> brief("one line", 40)
    'one line'
    >>> brief("received " + 100 * "x" + ", expected y", 40)
    'received xxxxxxxxxxxxx ... x, expected y'
    """
    if len(text) <= limit:
        return text
    end = limit * 2 // 5 - 1
    return f"{text[: limit - end - 5]} ... {text[-end:]}"


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ``ConfigurationError`` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ConfigurationError(f"{name}: received {value}, expected {low} to {high}")


def check_batch(images: Any, shape: tuple[int, ...]) -> None:
    """Raise ``ConfigurationError`` unless ``images`` are uint8, at most ``shape[0]`` of them, each ``shape[1:]``."""
    if len(images) > shape[0] or images.shape[1:] != shape[1:] or images.dtype != "uint8":
        raise ConfigurationError(f"engine: received {images.dtype} {images.shape}, expected uint8 {shape}")


def nearest(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.55) -> str:
    """Return a hint that names the known words nearest to ``name``; empty if none is near.

    ``cutoff``, 0-1, is the least likeness: names that are words of a language are like each other by chance up to 0.6.

    Examples
    --------
    >>> nearest("vgg61", ["vgg16", "vgg19", "resnet50"])
    "; did you mean 'vgg19' or 'vgg16'?"
    >>> nearest("xyz", ["vgg16"])
    ''
    """
    by_lower = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=cutoff)
    return "; did you mean " + " or ".join(repr(by_lower[word]) for word in found) + "?" if found else ""
