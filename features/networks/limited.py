"""Run what the file of a stranger decides in a process of its own, with limits of memory and processor time.

    module, folder --run_limited()--> child: module.work(folder), which leaves there what it made --> None, or why not

A small file can make a library work for hours, or take any amount of memory, before it has seen an image; and neither can
be stopped within a process.
"""

from __future__ import annotations

import dataclasses
import importlib
import resource
import signal
import sys
from pathlib import Path

from features.children import run_module
from features.errors import BottleneckError
from features.networks.onnx_engine import is_memory_error, limited_memory, memory_of

_MEMORY = "memory"  # in the place of a message
_ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why the work was not done.

    Parameters
    ----------
    said : str
        Message of the error of this project that the work raised; empty if it raised none.
    reason : str
        What ended it otherwise: a limit, or the status of the process.
    """

    said: str
    reason: str


def limits_of(length: int, pixels: int) -> tuple[int, int]:
    """Return how much memory (bytes) and processor time (seconds) a model of so many bytes may take for so many pixels.

    Both are far above what networks need: a vision transformer of 97 MB takes 10 of its 313 seconds.
    """
    return 2 * memory_of(length, pixels), int((30 + 5e-7 * length) * max(1, pixels / 224**2))


def run_limited(module: str, folder: Path, limits: tuple[int, int]) -> Failure | None:
    """Call ``work(folder)`` of a module in a child process, and wait for it.

    Parameters
    ----------
    module : str
        Name of a module of this project.
    folder : Path
        A folder of the caller's own, which also takes the child's temporary files.
    limits : tuple of int
        Bytes of memory, on Linux only, and seconds of processor time.

    Returns
    -------
    Failure or None
        None if the work was done.
    """
    memory, seconds = limits
    done = run_module(
        "features.networks.limited", *map(str, (module, folder, memory, seconds)), environment={"TMPDIR": str(folder)}
    )
    if done.returncode == 0:
        return None
    said = (folder / _ERROR).read_text() if (folder / _ERROR).exists() else ""
    if said and said != _MEMORY:
        return Failure(said, "")
    if done.returncode == -signal.SIGXCPU:
        return Failure("", f"it takes more than {seconds} seconds of processor time")
    if said:
        return Failure("", f"it takes more than {memory / 1e6:.0f} MB of memory")
    return Failure("", f"the process ended with status {done.returncode}: {done.stderr.strip()[-200:]}")


def _main(module: str, folder: Path, memory: int, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        with limited_memory(memory):
            importlib.import_module(module).work(folder)
    except Exception as error:  # the classes of ONNX Runtime's and OpenVINO's errors are not public
        if is_memory_error(error):
            (folder / _ERROR).write_text(_MEMORY)
        elif isinstance(error, BottleneckError):
            (folder / _ERROR).write_text(str(error))
        raise


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
