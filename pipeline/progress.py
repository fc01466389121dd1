"""Progress on stderr: on a terminal a bar with rate and time left, elsewhere a plain line now and then."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, TextIO

from features.errors import brief
from features.files import printable_lines

PLAIN_SECONDS = 15.0  # between lines if stderr is not a terminal
QUIET = threading.Event()  # set if the whole process is quiet; see `set_quiet`
_UNITS = {
    "extract": "images",
    "hash": "images",
    "calibrate": "images",
    "assemble": "rows",
    "verify": "blocks",
    "predict": "images",
    "trunk": "images",
    "heads": "heads",
}


def set_quiet(*, quiet: bool) -> None:
    """Make this process quiet or not. A quiet process writes only errors to stderr: no progress, hints or warnings."""
    if quiet:
        QUIET.set()
    else:
        QUIET.clear()
    logging.disable(logging.WARNING if quiet else logging.NOTSET)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes log lines to the ``sys.stderr`` of the moment; while a bar is drawn, this puts them above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(brief(super().format(record)))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class ConsoleProgress:
    """Shows progress. It is called with ``(stage, done, total)``, where a total of 0 means unknown.

    It is a context manager, so that the bar is removed when the work ends.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""
        self._started = self._said = 0.0
        self._first = 0  # value of ``done`` when the clock was started

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if QUIET.is_set():
            return
        if stage != self._stage:
            self._stop()
            self._stage, self._first = stage, done
            self._started = self._said = time.monotonic()
            if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
                self._start_bar(stage, total)
        if self._bar is not None:
            rate = self._rate(done)
            shown = f"{rate:.1f} {_unit(stage)}/s" if rate else _unit(stage)
            self._bar.update(self._task, completed=done, total=total or None, rate=shown)
        elif time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            sys.stderr.write(self._line(stage, done, total) + "\n")

    def _rate(self, done: int) -> float:
        return (done - self._first) / max(1e-9, time.monotonic() - self._started)

    def _line(self, stage: str, done: int, total: int) -> str:
        rate = self._rate(done)
        speed = f"{rate:.1f} {_unit(stage)}/s"
        if not total:
            return f"{stage}: {done}, {speed}"
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        return f"{stage}: {done} of {total}, {speed}{left}"

    def _start_bar(self, stage: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # what a command prints there belongs to another program
        )
        self._bar.start()
        self._task = self._bar.add_task(stage, total=total or None, rate="")

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._stage = ""


def _unit(stage: str) -> str:
    return "images" if stage.startswith("epoch") else _UNITS.get(stage, "steps")
