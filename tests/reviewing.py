"""A review for tests: a store of painted images with features as a test wants them, and requests without a network."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from helpers import paint, recipe

from features.sources.scan import scan
from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec, ImageTable, Quarantine, digest_rows
from features.store.writer import StoreWriter
from pipeline.review.pictures import Album
from pipeline.review.security import Guard, Keys
from pipeline.review.server import Events, make_app
from pipeline.review.session import Session

TRAIN, VALIDATION, TEST, UNLABELLED = range(4)


def painted_store(
    folder: Path, labels: np.ndarray, splits: np.ndarray, X: np.ndarray, *, names: tuple[str, ...] = ("cat", "dog")
) -> FeatureStore:
    """Images of one colour each in ``folder/photos``, and a store ``folder/f.h5`` in which row k has the features ``X[k]``."""
    for number in range(len(labels)):
        paint(folder / "photos" / f"{number:05d}.png", (number % 256, number // 256, 90))
    images = scan(folder / "photos")
    data = [(folder / "photos" / path).read_bytes() for path in images.paths]
    return written_store(
        folder / "f.h5", labels, splits, X, names=names, source=str(folder / "photos"), paths=images.paths,
        sha256=digest_rows(hashlib.sha256(one).digest() for one in data),
    )  # fmt: skip


def written_store(
    path: Path, labels: np.ndarray, splits: np.ndarray, X: np.ndarray, *, names: tuple[str, ...], source: str,
    paths: tuple[str, ...], sha256: np.ndarray, groups: tuple[str, ...] | None = None,
) -> FeatureStore:  # fmt: skip
    """A store of rows whose images may exist or not."""
    rows = len(labels)
    side = np.full(rows, 8, np.int32)
    table = ImageTable(
        tuple(paths), sha256, labels.astype(np.int32), splits.astype(np.int8), groups, side, side,
        np.zeros(rows, np.int64), np.zeros(rows, np.int64),
    )  # fmt: skip
    used = recipe()
    writer = StoreWriter(path, kind="store", rows=rows, features={used.name: FeatureSpec(used, 1, (X.shape[1],))})
    writer.append(used.name, X.astype(np.float32)[:, None])
    none = Quarantine((), np.zeros((0, 32), np.uint8), (), np.zeros(0, np.int64), np.zeros(0, np.int64))
    writer.finish(images=table, quarantine=none, classes=names, source=source, split_rule="given")
    writer.close()
    return FeatureStore.open(path)


def two_classes(rows: int, columns: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True classes, in turn, and features that tell them apart."""
    truth = np.arange(rows) % 2
    X = np.random.default_rng(seed).normal(size=(rows, columns))
    X[:, 0] += 8 * truth
    return truth, X


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    """A review without a network: requests are passed to its application, by default as its own page sends them."""

    def __init__(
        self, store: FeatureStore, labels: Path, host: str = "127.0.0.1", images: tuple[str, ...] = ()
    ) -> None:
        self.keys, self.events = Keys(), Events()
        self.told: list[tuple[str, Any]] = []
        self.session = Session(store, labels, by="me", tell=lambda name, value: self.told.append((name, value)))
        self.app = make_app(self.session, Album(store, images), self.keys, self.events, host)
        self.own = {
            "host": "127.0.0.1:8765",
            "cookie": f"{Guard.cookie_name}={self.keys.cookie}",
            "sec-fetch-site": "same-origin",
            "x-review-token": self.keys.writing,
            "content-type": "application/json",
        }

    def ask(self, path: str, body: Any = None, *, method: str = "", **changes: str | None) -> Answer:
        """Send a request; ``changes`` replace headers, None removes one. A path without a leading slash is the page's."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = {**self.own, **{name.replace("_", "-"): value for name, value in changes.items()}}
        raw = [(name.encode(), value.encode()) for name, value in headers.items() if value is not None]
        path, _, query = (path if path.startswith("/") else f"/{self.keys.place}/{path}").partition("?")
        method = method or ("GET" if body is None else "POST")
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
            "headers": raw, "root_path": "", "scheme": "http", "http_version": "1.1", "server": ("127.0.0.1", 8765),
        }  # fmt: skip
        return asyncio.run(_answer(self.app, scope, data))


async def _answer(app: Any, scope: dict[str, Any], data: bytes) -> Answer:
    sent: list[Any] = []
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:]))
