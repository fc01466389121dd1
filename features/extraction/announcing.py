"""Say that an extraction will take long, and what would be faster here: in a dry run, and once the first batches are measured.

batches of images --Announcer--> seconds for all --announcement--> one warning, or none if it is short
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from features.extraction.options import ExtractionOptions
from features.files import printable
from features.machine import has_bfloat16, may_have_gpu
from features.networks.openvino_engine import is_installed
from features.networks.quantising import can_quantise
from features.progress import duration

logger = logging.getLogger(__name__)
LONG = 1800.0  # seconds from which an extraction is announced
MEASURED = (
    10.0  # seconds after the first batch from which the rate is trusted; that batch is slow, as it starts the engine
)
SMALL = "mobilenetv2"  # the network that is offered in place of a slow one


def announcement(network: Any, options: ExtractionOptions, images: int, seconds: float) -> str:
    """Say that an extraction takes long, and what would be faster; empty if it takes less than `LONG` seconds.

    Parameters
    ----------
    network : Network
        Its ``backbone_argument`` and ``recipes`` are used.
    options : ExtractionOptions
        ``precision``, ``device`` and ``engine`` decide what is offered.
    images : int
        Number of images that go through the network.
    seconds : float
        Expected time for all of them.
    """
    if seconds < LONG:
        return ""
    faster = _precisions(options)
    if not network.recipes[0].backbone.startswith("mobilenet"):
        faster.append(f"a smaller network (--backbone {SMALL}; bottleneck compare tells what it costs in accuracy)")
    if options.decode == "full":
        faster.append("--decode fast for large JPEGs")
    offers = f"; faster here: {', or '.join(faster)}" if faster else ""
    return (
        f"{printable(network.backbone_argument)} takes about {duration(seconds)} for {images:,} images, "
        f"{images / seconds:.1f} a second{offers}"
    )


def _precisions(options: ExtractionOptions) -> list[str]:
    """Say in which precisions OpenVINO would be faster on this processor."""
    if options.engine not in ("auto", "openvino") or not is_installed() or may_have_gpu(options.device):
        return []
    found = []
    if options.precision == "float32" and has_bfloat16():
        found.append("--precision bfloat16, in about half the time if the network takes most of it")
    if options.precision in ("float32", "bfloat16") and can_quantise():
        found.append("--precision int8, mostly faster still (--check-precision 1000 tells what it costs in accuracy)")
    return found


class Announcer:
    """Measures a running extraction after its first batch, and warns once if all of it will take long.

    Parameters
    ----------
    network, options, images
        As for `announcement`.
    clock : callable, optional
        Seconds that never run back.
    """

    def __init__(
        self, network: Any, options: ExtractionOptions, images: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._network, self._options, self._images, self._clock = network, options, images, clock
        self._lock, self._done, self._decided = threading.Lock(), 0, False
        self._began: tuple[float, int] | None = None  # when the first batch was finished, and its images

    def __call__(self, more: int) -> None:
        """Count images that have just been finished; may be called from several threads."""
        with self._lock:
            if self._decided:
                return
            self._done += more
            now = self._clock()
            began, first = self._began = self._began or (now, self._done)
            if now - began < MEASURED or self._done == first:
                return
            self._decided = True
            seconds = self._images * (now - began) / (self._done - first)
        if said := announcement(self._network, self._options, self._images, seconds):
            logger.warning("%s. Ctrl-C keeps what is finished", said)
