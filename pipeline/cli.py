"""The command line (DESIGN section 3). Everything heavy is imported inside a command."""

from __future__ import annotations

import logging
import sys

from pipeline.commands import features, heads, models  # noqa: F401  # each adds its commands
from pipeline.commands.common import app


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code (DESIGN section 3)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)

    try:
        app(args=arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
