"""What the commands write to stderr: log lines, above the bar that `features.shown` draws, and nothing if they are quiet."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from features.errors import brief
from features.files import printable_lines
from features.shown import QUIET, ConsoleProgress

__all__ = ["QUIET", "ConsoleProgress", "StderrHandler", "set_quiet"]


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
