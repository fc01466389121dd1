"""The server of the page: plain JSON, one stream of events, pictures by row number.

    browser --> Guard --> routes --> Session (decisions, orders) and Album (pictures);   learner --> events --> every open page

Starlette and uvicorn come with the extra ``review``.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from features.errors import BottleneckError, ConfigurationError, RequestError
from features.files import printable
from features.machine import how_to_install
from features.store.reader import FeatureStore
from pipeline.labels.file import this_user
from pipeline.labels.overlay import with_labels
from pipeline.outputs import output_file
from pipeline.review.pictures import SIDES, Album
from pipeline.review.security import EVERYWHERE, LOOPBACK, App, Guard, Keys
from pipeline.review.session import MOST_ITEMS, Query, Session

TEMPLATES = Path(__file__).parent.parent / "templates"
PORT = 8765
MOST_BODY = 256 << 10  # bytes of a request
MOST_STREAMS = 16  # open pages
MOST_WAITING = 256  # events that wait for a page that does not read; then its stream ends, and it asks for all anew
BEAT_SECONDS = 15.0


class Events:
    """Passes events from any thread on to every open stream."""

    def __init__(self) -> None:
        self._streams: dict[asyncio.Queue[tuple[str, Any] | None], asyncio.AbstractEventLoop] = {}

    def tell(self, name: str, value: Any) -> None:
        """Send an event to all streams."""
        for queue, loop in list(self._streams.items()):
            loop.call_soon_threadsafe(self._put, queue, (name, value))

    def close(self) -> None:
        """End all streams."""
        for queue, loop in list(self._streams.items()):
            loop.call_soon_threadsafe(queue.put_nowait, None)

    @staticmethod
    def _put(queue: asyncio.Queue[tuple[str, Any] | None], event: tuple[str, Any] | None) -> None:
        if queue.qsize() < MOST_WAITING:
            queue.put_nowait(event)
        elif queue.qsize() == MOST_WAITING:
            queue.put_nowait(None)

    @property
    def full(self) -> bool:
        """Whether no further stream may be opened."""
        return len(self._streams) >= MOST_STREAMS

    async def stream(self, first: Callable[[], tuple[str, Any]]) -> AsyncIterator[str]:
        """Yield the text of each event; the first one is asked for once nothing can be missed any more."""
        queue: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()
        self._streams[queue] = asyncio.get_running_loop()
        try:
            yield _event(*first())
            while True:
                try:
                    event = await asyncio.wait_for(queue.get(), BEAT_SECONDS)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if event is None:
                    return
                yield _event(*event)
        finally:
            del self._streams[queue]


def _event(name: str, value: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n"


class Desk:
    """Answers the requests of the page."""

    def __init__(self, session: Session, album: Album, keys: Keys, events: Events) -> None:
        self.session, self.album, self.keys, self.events = session, album, keys, events

    async def page(self, request: Any) -> Any:
        from jinja2 import Environment, FileSystemLoader
        from starlette.responses import HTMLResponse

        template = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True).get_template("review.html.j2")
        return HTMLResponse(template.render(token=self.keys.writing, title=printable(self.session.store.path.name)))

    async def script(self, request: Any) -> Any:
        return _file("review.js", "text/javascript; charset=utf-8")

    async def style(self, request: Any) -> Any:
        return _file("review.css", "text/css; charset=utf-8")

    async def icon(self, request: Any) -> Any:
        return _file("review.svg", "image/svg+xml")

    async def state(self, request: Any) -> Any:
        return await _json(self._state)

    def _state(self) -> dict[str, Any]:
        return {**self.session.describe(), "missing": printable(self.album.missing)}

    async def order(self, request: Any) -> Any:
        given = dict(request.query_params)
        near = given.pop("near", "-1")

        def answer() -> dict[str, Any]:
            if unknown := set(given) - set(Query.__dataclass_fields__):
                raise RequestError(
                    f"order: received {min(unknown)!r:.40}, expected {', '.join(Query.__dataclass_fields__)}"
                )
            return self.session.order(Query(**given, near=_number(near)))

        return await _json(answer)

    async def items(self, request: Any) -> Any:
        rows = request.query_params.get("rows", "").split(",")[: MOST_ITEMS + 1]
        return await _json(lambda: {"items": self.session.items([_number(row) for row in rows])})

    async def detail(self, request: Any) -> Any:
        return await _json(lambda: self.session.detail(_number(request.path_params["row"])))

    async def decide(self, request: Any) -> Any:
        body = await _body(request, {"rows", "value"})
        return await _json(lambda: self.session.decide(body()["rows"], body()["value"]))

    async def undo(self, request: Any) -> Any:
        body = await _body(request, {"batch"})

        def answer() -> dict[str, Any]:
            batch = body()["batch"]
            if not isinstance(batch, list) or not all(isinstance(one, str) for one in batch):
                raise RequestError("batch: expected a list of ids")
            return self.session.undo(batch)

        return await _json(answer)

    async def picture(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import PlainTextResponse, Response

        row, size = request.path_params["row"], request.path_params["size"]
        shown = (
            row.isdecimal() and len(row) < 19 and int(row) < len(self.session.shown) and self.session.shown[int(row)]
        )
        data = await run_in_threadpool(self.album.jpeg, int(row), size) if shown and size in SIDES else None
        if data is None:
            return PlainTextResponse("There is no picture of this row.\n", 404)
        return Response(data, media_type="image/jpeg")

    async def stream(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse, StreamingResponse

        if self.events.full:
            return PlainTextResponse(f"{MOST_STREAMS} pages are open already.\n", 503)
        learner = self.session.learner
        return StreamingResponse(
            self.events.stream(lambda: ("learning", learner.summary())), media_type="text/event-stream"
        )


def _file(name: str, kind: str) -> Any:
    from starlette.responses import Response

    return Response((TEMPLATES / name).read_bytes(), media_type=kind)


def _number(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or len(text) > 18:
        raise RequestError(f"received {text!r:.40}, expected the number of a row")
    return int(text)


async def _body(request: Any, names: set[str]) -> Callable[[], dict[str, Any]]:
    """Read a JSON object with exactly these names; what is wrong with it is raised when it is asked for."""
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > MOST_BODY:
            break

    def read() -> dict[str, Any]:
        if len(data) > MOST_BODY:
            raise RequestError(f"the request has more than {MOST_BODY} bytes")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as problem:
            raise RequestError(f"the request is no JSON: {problem}") from problem
        if not isinstance(values, dict) or set(values) != names:
            raise RequestError(f"the request: expected an object of {', '.join(sorted(names))}")
        return values

    return read


async def _json(make: Callable[[], dict[str, Any]]) -> Any:
    """Answer with what a function returns; it runs in another thread. Its errors are answers as well."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse

    try:
        return JSONResponse(await run_in_threadpool(make))
    except RequestError as problem:
        return JSONResponse({"error": printable(str(problem))}, 400)
    except (BottleneckError, OSError) as problem:
        return JSONResponse({"error": printable(str(problem))}, 500)


def make_app(session: Session, album: Album, keys: Keys, events: Events, host: str = "127.0.0.1") -> App:
    """Make the ASGI application of one review."""
    require_starlette()
    from starlette.applications import Starlette
    from starlette.routing import Route

    desk = Desk(session, album, keys, events)
    routes = [
        Route("/", desk.page),
        Route("/review.js", desk.script),
        Route("/review.css", desk.style),
        Route("/review.svg", desk.icon),
        Route("/state", desk.state),
        Route("/order", desk.order),
        Route("/items", desk.items),
        Route("/detail/{row}", desk.detail),
        Route("/picture/{row}/{size}", desk.picture),
        Route("/events", desk.stream),
        Route("/decide", desk.decide, methods=["POST"]),
        Route("/undo", desk.undo, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), keys, host)


def require_starlette() -> None:
    """Refuse to go on without the packages of the extra ``review``.

    Raises
    ------
    ConfigurationError
        If one is missing; the message says how to install it.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as problem:
        raise ConfigurationError(
            f"review needs {problem.name}, which is not installed: {how_to_install('review')}"
        ) from problem


def listen(host: str, port: int) -> socket.socket:
    """Bind the address of the server.

    Raises
    ------
    ConfigurationError
        If the port is in use or the address is none of this machine; the message says what to give instead.
    """
    if not 0 <= port < 65536:
        raise ConfigurationError(f"--port: received {port}, expected 0 to 65535; 0 takes any free port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(128)
    except OSError as problem:
        bound.close()
        reason = problem.strerror or str(problem)
        if problem.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"--port {port}: another program listens on {host}:{port}, perhaps another review. End it, or give another "
                "port; --port 0 takes any free one"
            ) from problem
        raise ConfigurationError(
            f"--host {host} --port {port}: {reason}; expected an address of this machine"
        ) from problem
    return bound


class Review:
    """A review that is ready to be served: its address is known, and nothing has been answered yet.

    Parameters
    ----------
    store : FeatureStore
        The store.
    path : Path
        The labels file.
    images : sequence of str
        Where the images are, if they have moved.
    host, port
        Address to listen on; port 0 takes any free one.
    by : str, optional
        Who decides. Default: the name of the user.
    """

    def __init__(
        self,
        store: FeatureStore,
        path: Path,
        *,
        images: list[str],
        host: str = "127.0.0.1",
        port: int = PORT,
        by: str | None = None,
    ) -> None:
        require_starlette()
        store.feature_set(None)
        if store.images.target is not None:
            raise ConfigurationError(
                f"{store.path}: its target is not one class for each image; the page corrects classes. Correct the file "
                "that the targets came from, and extract again (features are kept)"
            )
        if path.exists():
            with_labels(store, path)  # refuses a file of other images
        output_file(path, "--labels", "labels.csv")
        self._events = Events()
        self.session = Session(store, path, by=this_user() if by is None else by, tell=self._events.tell)
        self._keys = Keys()
        self._app = make_app(self.session, Album(store, images), self._keys, self._events, host)
        self._server: Any = None
        self._socket = listen(host, port)
        self.host, self.port = host, int(self._socket.getsockname()[1])

    @property
    def address(self) -> str:
        """The start link, with its token."""
        host = socket.gethostname() if self.host in EVERYWHERE else self.host
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self.port}/start?token={self._keys.token}"

    @property
    def is_private(self) -> bool:
        """Whether only programs of this machine can reach it."""
        return self.host in LOOPBACK

    def serve(self) -> None:
        """Answer until the process is interrupted, or another thread calls `stop`."""
        import uvicorn

        events = self._events

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                events.close()  # open pages would hold it up
                await super().shutdown(sockets)

        config = uvicorn.Config(
            self._app,
            log_config=None,  # that of uvicorn ends every log handler of this process
            log_level="warning",
            access_log=False,
            server_header=False,
            http="h11",
            ws="none",
            lifespan="off",
            limit_concurrency=256,
            timeout_graceful_shutdown=1,
        )
        self._server = Server(config)
        self.session.learner.start()
        try:
            self._server.run(sockets=[self._socket])
        except KeyboardInterrupt:
            return
        finally:
            self.session.learner.close()
            self._socket.close()

    def stop(self) -> None:
        """Let `serve` return."""
        if self._server is not None:
            self._server.should_exit = True
