"""What tests and benchmarks of clusters share: a scheduler and workers as processes, faults for them, an extraction."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import ROOT, NumpyNetwork

from features.extraction.extraction import Extraction, ExtractionResult
from features.extraction.options import ExtractionOptions
from features.extraction.running import run_here
from features.sources.scan import scan
from pipeline.cluster.run import ClusterShards

PRELOAD = "DASK_DISTRIBUTED__WORKER__PRELOAD"
WIDTH = 64


WRONG_CLOCK = """
import os, time
now, now_ns, skew = time.time, time.time_ns, int(os.environ["CLUSTER_CLOCK"])
time.time, time.time_ns = lambda: now() + skew, lambda: now_ns() + skew * 10**9
open(os.path.join(os.path.dirname(__file__), "skewed"), "w").close()
"""


def wrong_clock(folder: Path, seconds: int) -> dict[str, str]:
    """An environment in which every Python that starts has a clock that is wrong by so much."""
    (folder / "sitecustomize.py").write_text(WRONG_CLOCK)
    return {"CLUSTER_CLOCK": str(seconds), "PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}


class Faults:
    """The file that workers read what shall go wrong from; ``environment`` leads them to it."""

    def __init__(self, path: Path, **faults: Any) -> None:
        self.path = path
        self.environment = {
            PRELOAD: str(ROOT / "tests" / "cluster_worker.py"),
            "CLUSTER_FAULTS": str(path),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self.set(**faults)

    def set(self, **faults: Any) -> None:
        """These, and no others."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(faults))
        part.replace(self.path)


def extraction(source: str | Path, out: Path, cluster: ClusterShards | None = None, **options: Any) -> Extraction:
    """One with the network of numpy; here, or on a cluster."""
    asked = ExtractionOptions(**{"shard_rows": 32, "workers": 2, **options})
    return Extraction(scan(source), NumpyNetwork(WIDTH), out, asked, cluster or run_here)


def extract(source: str | Path, out: Path, cluster: ClusterShards | None = None, **options: Any) -> ExtractionResult:
    return extraction(source, out, cluster, **options).run()


class Traffic:
    """Counts the bytes that this process, which is client and scheduler, sends and receives over TCP.

    What one of the two says to the other is counted twice.
    """

    def __init__(self) -> None:
        from distributed.comm import tcp

        self.bytes, write, read = 0, tcp.TCP.write, tcp.read_bytes_rw

        async def counted_write(this: Any, message: Any, *arguments: Any, **options: Any) -> Any:
            size = await write(this, message, *arguments, **options)
            self.bytes += size or 0
            return size

        async def counted_read(stream: Any, size: int) -> Any:
            self.bytes += size
            return await read(stream, size)

        self._before = tcp, write, read
        tcp.TCP.write, tcp.read_bytes_rw = counted_write, counted_read

    def stop(self) -> None:
        tcp, write, read = self._before
        tcp.TCP.write, tcp.read_bytes_rw = write, read


class Processes:
    """A scheduler and workers on 127.0.0.1, each a process as ``dask scheduler`` and ``dask worker`` start it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, {**os.environ, **environment}
        folder.mkdir(parents=True, exist_ok=True)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.address = ""

    def scheduler(self, port: int = 0) -> subprocess.Popen[bytes]:
        file = self.folder / f"scheduler-{len(self.processes)}.json"
        process = self._start(
            "dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard", "--scheduler-file", file
        )
        end = time.monotonic() + 60
        while not self.address or port:
            with contextlib.suppress(OSError, ValueError):
                self.address = json.loads(file.read_text())["address"]
                return process
            assert process.poll() is None, "the scheduler ended"
            assert time.monotonic() < end
            time.sleep(0.05)
        return process

    def worker(self, *options: object) -> subprocess.Popen[bytes]:
        local = self.folder / f"worker-{len(self.processes)}"
        return self._start(
            "dask_worker",
            self.address,
            *("--nthreads", 1, "--no-dashboard", "--host", "127.0.0.1", "--local-directory", local),
            *("--memory-limit", 0, "--death-timeout", 20, *options),
        )

    def _start(self, module: str, *arguments: object) -> subprocess.Popen[bytes]:
        log = open(self.folder / f"{module}-{len(self.processes)}.log", "wb")  # noqa: SIM115  closed with the process
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{module}", *map(str, arguments)],
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        self.processes.append(process)
        return process

    def stop(self) -> None:
        import signal

        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def processes(folder: Path, environment: dict[str, str]) -> Iterator[Processes]:
    """Stopped in the end, whatever happens."""
    found = Processes(folder, environment)
    try:
        yield found
    finally:
        found.stop()
