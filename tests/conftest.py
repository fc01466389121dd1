"""Fixtures. Real weights and images are found through BOTTLENECK_ASSETS; without it those tests are skipped."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Bytecode is kept, whatever the shell says: each of some 500 processes would compile the packages again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Typer builds the whole command line at every call; one is enough for all that a process makes.
typer.main.get_command = functools.cache(typer.main.get_command)
# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Thousands of small folders: a disk takes milliseconds to remove each of them, memory takes none.
SHARED_MEMORY = "/dev/shm"
if os.access(SHARED_MEMORY, os.W_OK):
    memory = os.statvfs(SHARED_MEMORY)
    if memory.f_bavail * memory.f_frsize > 8 << 30 and not memory.f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", SHARED_MEMORY)


@pytest.fixture(scope="session")
def assets() -> Path:
    folder = os.environ.get("BOTTLENECK_ASSETS")
    if not folder:
        pytest.skip("BOTTLENECK_ASSETS is not set: real weights and images are not at hand")
    path = Path(folder).resolve()
    assert (path / "weights").is_dir(), f"BOTTLENECK_ASSETS={folder} holds no weights"
    assert (path / "images").is_dir(), f"BOTTLENECK_ASSETS={folder} holds no images"
    return path


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without pictures, which take longer to draw than small heads to train."""
    monkeypatch.setattr("pipeline.runs.writing.plot_run", lambda folder, *_: folder.mkdir())


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests use neither the user's cache nor the user's key; what all processes of a session keep is made once."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        for variable, name in (("BOTTLENECK_CACHE", "cache"), ("XDG_CONFIG_HOME", "config")):
            (base / name).mkdir(mode=0o700, exist_ok=True)
            patch.setenv(variable, str(base / name))
        yield base / "cache"
