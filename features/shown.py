"""Progress that a person sees: on a terminal and in a notebook one bar with rate and time left.

stage, done, total --> Meter: rate, time left --> bar on stderr | line on stderr | bar of a notebook
"""

from __future__ import annotations

import contextlib
import html
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from features.progress import Progress, duration

PLAIN_SECONDS = 15.0  # between lines if stderr is not a terminal
NOTEBOOK_SECONDS = 0.2  # between two pictures of a notebook's bar
QUIET = threading.Event()  # set if the whole process is quiet; see `pipeline.progress.set_quiet`
_UNITS = {
    "list": "files",
    "extract": "images",
    "hash": "images",
    "calibrate": "images",
    "assemble": "rows",
    "verify": "blocks",
    "predict": "images",
    "trunk": "images",
    "heads": "heads",
}


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


class NotebookProgress:
    """Shows progress in the output of a notebook cell: one bar, which is removed when the work ends."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._stage, self._first = "", 0
        self._started = self._drawn = 0.0

    def __enter__(self) -> NotebookProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.update(_Html(""))

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._started = stage, done, now
        elif now - self._drawn < NOTEBOOK_SECONDS and done != total:
            return
        self._drawn = now
        drawn = _Html(self._bar(done, total, now - self._started))
        if self._handle is None:
            from IPython.display import display

            self._handle = display(drawn, display_id=True)
        else:
            self._handle.update(drawn)

    def _bar(self, done: int, total: int, seconds: float) -> str:
        rate = (done - self._first) / max(1e-9, seconds)
        said = f"{done} of {total}" if total else f"{done}"
        said += f", {rate:.1f} {_unit(self._stage)}/s" if rate else ""
        said += f", {duration((total - done) / rate)} left" if rate and total > done else ""
        limits = f' value="{done}" max="{total}"' if total else ""
        return f"<div>{html.escape(self._stage)} <progress{limits}></progress> {html.escape(said)}</div>"


class _Html:
    """What a notebook shows as HTML, and everything else as nothing."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return ""

    def _repr_html_(self) -> str:
        return self._text


def in_notebook() -> bool:
    """Whether a cell of a notebook runs this."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@contextlib.contextmanager
def showing(progress: bool | Progress) -> Iterator[Progress | None]:
    """Yield what is told about progress.

    Parameters
    ----------
    progress : bool or callable
        True: a bar on a terminal and in a notebook, and nothing elsewhere. False: nothing. A callable gets
        ``(stage, done, total)``.
    """
    if not isinstance(progress, bool):
        yield progress
    elif not progress or QUIET.is_set() or not (in_notebook() or sys.stderr.isatty()):
        yield None
    else:
        with NotebookProgress() if in_notebook() else ConsoleProgress() as shown:
            yield shown
