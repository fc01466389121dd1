"""A hub on 127.0.0.1 that answers as that of Hugging Face does, and misbehaves where a test tells it to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote


@dataclasses.dataclass
class Hub:
    """What a hub has, and how it behaves. Large files are served by a second server on another port.

    ``commits`` maps the names of revisions to commits, ``files`` each path to its content, ``large`` names the paths that
    have a sha256, ``answers`` replaces fields of the answer about a repository. ``seen`` notes each request: server, path,
    token, range.
    """

    endpoint: str = ""
    storage: str = ""
    repository: str = "owner/name"
    commits: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    large: set[str] = dataclasses.field(default_factory=set)
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)
    raw: bytes | None = None  # instead of the answer about a repository
    status: tuple[int, str] = (0, "")  # of every answer, with X-Error-Code
    cut: int = -1  # bytes after which a large file ends
    cuts: int = 0  # how often it does
    slow: float = 0.0  # seconds before each kilobyte of a large file
    altered: bytes | None = None  # instead of the content of files
    length: bool = True  # whether the size of large files is said
    elsewhere: str = ""  # where large files are redirected to
    ranges: bool = True
    promises: bool = True
    seen: list[tuple[str, str, str | None, str | None]] = dataclasses.field(default_factory=list)

    def paths(self, server: str = "") -> list[str]:
        """The paths that were asked for, of one server or of both."""
        return [path for name, path, *_ in self.seen if server in ("", name)]


def commit(letter: str) -> str:
    return letter * 40


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a small network of images on a free port until the block ends."""
    hub = Hub(commits={"main": commit("a"), commit("a"): commit("a")})
    hub.files = {
        "config.json": b'{"model_type": "dinov2"}',
        "onnx/model.onnx": bytes(range(256)) * 40,
        "README.md": b"#",
    }
    hub.large = {"onnx/model.onnx"}
    hub.answers = {"gated": False, "cardData": {"license": "apache-2.0"}}
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, name)) for name in ("hub", "storage")]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def _handler(hub: Hub, name: str) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.seen.append((name, path, self.headers.get("Authorization"), self.headers.get("Range")))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if hub.status[0]:
                    self.answer(hub.status[0], b"no", {"X-Error-Code": hub.status[1]})
                elif name == "storage":
                    self.large(hub.files[path.removeprefix("/blob/")])
                elif path.startswith("/api/"):
                    self.about(path)
                else:
                    self.file(path)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def about(self, path: str) -> None:
            repository, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            if repository != hub.repository:
                self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif revision not in hub.commits:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [{"rfilename": file} for file in hub.files]
                about = {"sha": hub.commits[revision], "siblings": siblings, **hub.answers}
                self.answer(200, json.dumps(about).encode() if hub.raw is None else hub.raw, {})

        def file(self, path: str) -> None:
            file = path.partition("/resolve/")[2].partition("/")[2]
            content = hub.files[file]
            if file in hub.large:
                promise = {
                    "X-Linked-Size": str(len(content)),
                    "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                }
                place = f"{hub.elsewhere or hub.storage}/blob/{file}?signature=secret"
                self.answer(302, b"", {"Location": place, **(promise if hub.promises else {})})
            else:
                digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.answer(200, content if hub.altered is None else hub.altered, {"ETag": f'"{digest}"'})

        def large(self, content: bytes) -> None:
            content = content if hub.altered is None else hub.altered
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if hub.ranges else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header(
                *(("Content-Length", str(len(content) - start)) if hub.length else ("Connection", "close"))
            )
            self.end_headers()
            hub.cuts -= hub.cut >= 0
            end = hub.cut if hub.cut >= 0 and hub.cuts >= 0 else len(content)
            for begin in range(start, end, 1024):
                time.sleep(hub.slow)
                self.wfile.write(content[begin : min(begin + 1024, end)])
            self.close_connection = end < len(content) or not hub.length

    return Handler
