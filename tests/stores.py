"""A web server of our own on this machine that can be slow and unreliable, a proxy that cuts connections, and kill series."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers import ROOT, STRESS, NumpyNetwork

from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources.scan import scan

EXTRACT = """
import sys
sys.path[:0] = ["tests"]
from stores import extract
extract(sys.argv[1], sys.argv[2], lambda line: print(line, flush=True))
"""


def extract(source: str, out: str | Path, told: Callable[[str], None] = lambda line: None) -> None:
    """Extract with a stand-in of numpy, in small shards, and tell each step: the listing, images, and rows of the store."""
    images, options = scan(source), ExtractionOptions(batch_size=4, shard_rows=4)
    told("listed 0")
    Extraction(images, NumpyNetwork(), Path(out), options).run(lambda stage, done, total: told(f"{stage} {done}"))  # type: ignore[arg-type]


class Objects(ThreadingHTTPServer):
    """Serves ``objects`` (path -> bytes) with ETags, or with the times of ``modified``; ``fault`` may answer instead, and returns
    whether it has.

    ``asked`` lists what was requested, as ``METHOD path``.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.asked: list[str] = []
        self.fault: Callable[[int, Any], bool] = lambda number, request: False
        self.with_etags = True
        self.modified: dict[str, str] = {}
        self.latency = 0.0
        self.rate = 0  # bytes a second of each answer; 0: as fast as it goes
        self._numbers = itertools.count(1)
        super().__init__(("127.0.0.1", 0), _Request)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, request: _Request) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(f"{request.command} {path}")
        time.sleep(self.latency)
        if self.fault(next(self._numbers), request):
            return
        if path in self.redirects:
            request.reply(302, b"", {"Location": self.redirects[path]})
        elif path in self.objects:
            data = self.objects[path]
            tags = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'} if self.with_etags else {}
            tags |= {"Last-Modified": self.modified[path]} if path in self.modified else {}
            request.reply(200, data, tags)
        else:
            request.reply(404, b"", {})


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the other side
    server: Objects

    def reply(self, status: int, data: bytes, headers: dict[str, str], *, sent: int | None = None) -> None:
        """Send an answer, of which only the first ``sent`` bytes come."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(data[:sent]), 500) if self.server.rate else ():
                self.wfile.write(data[:sent][start : start + 500])
                time.sleep(500 / self.server.rate)
            if not self.server.rate:
                self.wfile.write(data[:sent])
        if sent is not None:
            self.close_connection = True

    def do_GET(self) -> None:
        self.server.answer(self)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def objects() -> Iterator[Objects]:
    with Objects() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def cutting_proxy(port: int, every: int = 10) -> Iterator[int]:
    """Pass connections on to a port; each tenth is cut after its first bytes, so that an answer ends in the middle."""
    listener = socket.create_server(("127.0.0.1", 0))
    numbers, stopped = itertools.count(1), threading.Event()

    def passed(source: socket.socket, target: socket.socket, *, cut: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data[:200] if cut else data)
                if cut:
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while not stopped.is_set():
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
            except OSError:
                return
            cut = next(numbers) % every == 0
            threading.Thread(target=passed, args=(client, server), kwargs={"cut": False}, daemon=True).start()
            threading.Thread(target=passed, args=(server, client), kwargs={"cut": cut}, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        stopped.set()
        listener.close()


def tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def table(
    path: Path, images: Sequence[bytes | None], rows: int = 1000, names: Sequence[str] = (), **columns: Any
) -> Path:
    """A file as ``datasets`` writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    structs = pa.array(
        [{"bytes": data, "path": None} for data in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    metadata = {}
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        metadata[b"huggingface"] = json.dumps({"info": {"features": features}}).encode()
    made = pa.table({"image": structs, **{name: pa.array(values) for name, values in columns.items()}})
    pq.write_table(made.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def kill_series(source: str, folder: Path) -> None:
    """Kill extractions of a source at steps from first to last; rerun, each gives the bytes of one that was left alone."""
    steps: list[str] = []
    extract(source, folder / "whole.h5", steps.append)
    whole = (folder / "whole.h5").read_bytes()
    for number in range(20) if STRESS else (9,):
        out = folder / f"{number}.h5"
        command = [sys.executable, "-c", EXTRACT, source, str(out)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for _ in range(1 + number * len(steps) // 20):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        extract(source, out)
        assert out.read_bytes() == whole, (number, steps[number * len(steps) // 20])
