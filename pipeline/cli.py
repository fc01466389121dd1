"""The command line. Everything heavy is imported inside a command."""

from __future__ import annotations

import errno
import logging
import sys

from features.files import printable
from features.networks.backend import leave_out

# Each adds its commands.
from pipeline.commands import audit, features, heads, labels, looks, models, recipes, searching  # noqa: F401
from pipeline.commands.common import app
from pipeline.progress import StderrHandler, set_quiet
from pipeline.streams import standard_streams

# They say when a download begins, which network is being compared, and which run of a folder is taken.
TELLING = (
    "features.networks.fetching",
    "features.networks.hub",
    "features.networks.weights",
    "features.networks.wheels",
    "pipeline.stages.compare",
    "pipeline.runs.board",
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done; 1 failed; 2 wrong usage or configuration; 3 integrity failure; 4 too many unreadable images; 130 interrupted.
    """
    with standard_streams():
        try:
            code = _run(arguments)
            sys.stdout.flush()
        except OSError as error:
            if error.errno != errno.EPIPE:  # else whoever read our output has closed it
                sys.stderr.write(
                    printable(f"error: {error.filename or 'the system'}: {error.strerror or error}") + "\n"
                )
            code = 1
    return code


def _run(arguments: list[str] | None) -> int:
    logging.basicConfig(level=logging.WARNING, handlers=[StderrHandler()])
    leave_out("matplotlib", "pandas", "sklearn")
    for name in TELLING:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        app(args=arguments, prog_name="bottleneck")  # also under `python -m pipeline`: completion scripts name it
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        set_quiet(quiet=False)
    return 0
