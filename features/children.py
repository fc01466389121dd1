"""Child processes that end with the process that started them, however that ends.

run_module("pip", "download", ...)  -->  python -m features.children PARENT pip download ...
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)
_SECONDS = 1.0


def end_with(parent: int) -> None:
    """Make this process end, at the latest a second later, when the process ``parent`` that started it has ended.

    On Linux the kernel kills it, when the thread that started it ends. Elsewhere a thread looks, which has to wait
    for code that holds Python's lock.
    """
    try:
        known = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    except (OSError, AttributeError):
        known = False
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)
    if not known:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    os._exit(1)


def run_module(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE ARGUMENTS`` to its end, without input; its output is captured as text.

    Parameters
    ----------
    module, arguments : str
        The module, which may be one of this project, and its arguments.
    environment : dict of str to str, optional
        Environment variables that differ from those of this process.
    timeout : float, optional
        Seconds after which it is killed and ``subprocess.TimeoutExpired`` is raised.
    """
    command, variables = _command(module, arguments)
    return subprocess.run(
        command,
        env={**variables, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def start_module(module: str, *arguments: str, pass_fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE ARGUMENTS`` without input, out of reach of Ctrl-C, with some open files of this process."""
    command, variables = _command(module, arguments)
    return subprocess.Popen(
        command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=pass_fds, process_group=0
    )


def _command(module: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the words and the environment of a child that finds this project and ends with this process."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # -P: a file of the working folder, which may be the data, must not take the place of a module
    words = [sys.executable, "-P", "-m", "features.children", str(os.getpid()), module, *arguments]
    return words, {**os.environ, "PYTHONPATH": paths}


def _main() -> None:
    end_with(int(sys.argv[1]))
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
