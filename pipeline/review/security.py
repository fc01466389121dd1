"""Who may ask the review server for what: everything is refused that a page of another origin could send.

    request -> Host -> start link or cookie -> Sec-Fetch-Site -> token and JSON of writes -> the application -> headers

A browser sends a page's requests to any address, 127.0.0.1 included, and cookies of 127.0.0.1 to all of its ports. So nobody
gets anything by being here: the page lies at a path that only the start link leads to, its cookie is sent to this path alone,
reads must come from the page itself, and writes carry a token that only the page holds. No answer has a CORS header.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_HEADER = "x-review-token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), usb=()",
    "cache-control": "no-store",
}


def _secret() -> str:
    return secrets.token_urlsafe(32)


@dataclasses.dataclass(frozen=True)
class Keys:
    """The secrets of one server, made anew at each start.

    Parameters
    ----------
    token : str
        Token of the start link; it is exchanged for the cookie.
    place : str
        First part of the path of the page and of all it loads.
    cookie : str
        Value of the cookie.
    writing : str
        Token that the page sends in a header with each write.
    """

    token: str = dataclasses.field(default_factory=_secret, repr=False)
    place: str = dataclasses.field(default_factory=_secret, repr=False)
    cookie: str = dataclasses.field(default_factory=_secret, repr=False)
    writing: str = dataclasses.field(default_factory=_secret, repr=False)


class Guard:
    """An ASGI application around another one, which sees only requests that its own page has sent.

    Parameters
    ----------
    app : callable
        The application; it is called with the path behind ``Keys.place``.
    keys : Keys
        Secrets of this server.
    host : str
        Address that the server listens on.
    """

    cookie_name = "bottleneck-review"

    def __init__(self, app: App, keys: Keys, host: str = "127.0.0.1") -> None:
        self._app, self._keys, self._host = app, keys, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websocket is served
            return
        answer = self._answer(scope)
        if answer is not None:
            status, text, headers = answer
            await _send_text(send, status, text, headers)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [
                    (key, value) for key, value in message.get("headers", []) if key.decode("latin-1") not in HEADERS
                ]
                message["headers"] = own + _raw(HEADERS)
            await send(message)

        path = scope["path"].removeprefix(f"/{self._keys.place}")
        await self._app({**scope, "path": path, "raw_path": path.encode("utf-8")}, receive, guarded)

    def _answer(self, scope: Scope) -> tuple[int, str, dict[str, str]] | None:
        """Return the answer to a request that does not reach the application: a refusal, or the redirect to the page."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        method, path = scope["method"], scope["path"]
        if not self.is_own_host(headers.get("host", "")):
            return 421, "This server answers only under the address that it printed.\n", {}
        if path in ("/", "/start"):
            return self._start(scope, method)
        if not path.startswith(f"/{self._keys.place}/"):
            return 404, "There is no such page. Open the link that the server printed.\n", {}
        if not _equal(_cookie(headers.get("cookie", ""), self.cookie_name), self._keys.cookie):
            return 403, "Open the link that the server printed: this browser has no cookie of this server.\n", {}
        is_page = path == f"/{self._keys.place}/" and method == "GET"
        site = headers.get("sec-fetch-site", "")
        if not (site == "same-origin" or (is_page and site == "none") or (not site and self._host not in LOOPBACK)):
            return 403, "The request came from another page, which may not use this server.\n", {}
        if method not in ("GET", "HEAD"):
            if method != "POST":
                return 405, "Only GET and POST are answered.\n", {"allow": "GET, HEAD, POST"}
            if not _equal(headers.get(TOKEN_HEADER, ""), self._keys.writing):
                return 403, "The request has no token of the page. Load the page again.\n", {}
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return 415, "Only JSON is read.\n", {}
        return None

    def _start(self, scope: Scope, method: str) -> tuple[int, str, dict[str, str]]:
        """Exchange the token of the start link for the cookie, and lead to the page."""
        given = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")[:1000])).get("token", "")
        if method != "GET" or not _equal(given, self._keys.token):
            return 403, "Open the link that the server printed, with its token.\n", {}
        path = f"/{self._keys.place}/"
        cookie = f"{self.cookie_name}={self._keys.cookie}; Path={path}; HttpOnly; SameSite=Strict"
        return 303, "", {"location": path, "set-cookie": cookie}

    def is_own_host(self, text: str) -> bool:
        """Whether a ``Host`` is this server's: an attacker's name that resolves to this address is not (DNS rebinding)."""
        name = text.rpartition("]")[0].lstrip("[") if text.startswith("[") else text.partition(":")[0]
        name = name.lower().rstrip(".")
        if self._host in LOOPBACK:
            return name in LOOPBACK
        if self._host in EVERYWHERE:
            return name in ("localhost", socket.gethostname().lower()) or _is_address(name)
        return name in (self._host.lower(), *LOOPBACK)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _equal(given: str, expected: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode("ascii"))


def _cookie(text: str, name: str) -> str:
    try:
        found = SimpleCookie(text).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def _send_text(send: Send, status: int, text: str, headers: Mapping[str, str]) -> None:
    data = text.encode("utf-8")
    more = {**HEADERS, "content-type": "text/plain; charset=utf-8", "content-length": str(len(data)), **headers}
    await send({"type": "http.response.start", "status": status, "headers": _raw(more)})
    await send({"type": "http.response.body", "body": data})
