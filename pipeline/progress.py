"""Progress on stderr: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_SECONDS = 15.0  # between lines where stderr is not a terminal
_UNITS = {
    "extract": "images",
    "assemble": "rows",
    "verify": "blocks",
    "predict": "images",
    "trunk": "images",
    "heads": "heads",
}


class ConsoleProgress:
    """Called with ``(stage, done, total)``; a context manager, so that a bar never outlives its work."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""
        self._started = self._said = 0.0

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stop()
            self._stage, self._started = stage, time.monotonic()
            self._said = self._started
            if sys.stderr.isatty():
                self._start_bar(stage, total)
        if self._bar is not None:
            rate = f"{done / max(1e-9, time.monotonic() - self._started):.1f}/s"
            self._bar.update(self._task, completed=done, total=total, rate=rate)
        elif time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            sys.stderr.write(self._line(stage, done, total) + "\n")

    def _line(self, stage: str, done: int, total: int) -> str:
        rate = done / max(1e-9, time.monotonic() - self._started)
        left = (total - done) / rate if rate else float("inf")
        return f"{stage}: {done}/{total} {_unit(stage)}, {rate:.1f}/s, {left:.0f} s left"

    def _start_bar(self, stage: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(stage, total=total, unit=_unit(stage), rate="")

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._stage = ""


def _unit(stage: str) -> str:
    return "images" if stage.startswith("epoch") else _UNITS.get(stage, "steps")
