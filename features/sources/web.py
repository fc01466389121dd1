"""Read single objects by HTTPS, from hosts that a stranger may have named: no address inside a private network is reached.

    address --host allowed, or all its numbers public--> connection, kept for the thread --redirects, each checked--> bytes

The number that was checked is the one that is connected to, so a name that changes its meaning in between gains nothing.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import email.utils
import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator

from features.errors import SourceError, UnreadableImageError
from features.pixels.limits import MAX_BYTES
from features.sources.objects import Found, UnavailableError, without_secrets

# An IPv4 address is their last 32 bits: translation (RFC 6052), and the compatible form of RFC 4291, which is no longer used.
_WRAPPING = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
_TRANSLATED_HERE = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215: into whatever the local network decides
_TIMEOUT = 30  # seconds without data
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_GONE, _FORBIDDEN, _LATER = (404, 410), (401, 403), (408, 425, 429)
_NO_HEAD = (*_FORBIDDEN, 400, 405, 501)  # signed addresses often allow nothing but GET


def is_public(number: str) -> bool:
    """Whether an IP address lies in the public internet; addresses that wrap another one are as that one is."""
    address = ipaddress.ip_address(number.partition("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if address.version == 6 and any(address in network for network in _WRAPPING):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _TRANSLATED_HERE:
        return False
    address = inner or address
    return address.is_global and not address.is_multicast


def _dial(host: str, port: int, *, allowed: bool) -> socket.socket:
    """Connect to a host all of whose numbers are public, or to any that is allowed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise UnavailableError(f"{host}: {error}") from error
    if not allowed and (inside := [place[4][0] for place in found if not is_public(str(place[4][0]))]):
        raise SourceError(
            f"{host} is {inside[0]}, inside a private network, which addresses in a manifest may not reach. If the manifest is "
            f"yours, add --allow-host {host}, or set BOTTLENECK_ALLOW_HOSTS={host}"
        )
    failure: OSError = UnavailableError(f"{host}: has no number")
    for family, kind, protocol, _, place in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_TIMEOUT)
            connection.connect(place)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as http.client does
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise UnavailableError(f"{host}: {failure}") from failure


class _Http(http.client.HTTPConnection):
    allowed = False

    def connect(self) -> None:
        self.sock = _dial(self.host, self.port, allowed=self.allowed)


class _Https(http.client.HTTPSConnection):
    allowed = False

    def connect(self) -> None:
        plain = _dial(self.host, self.port, allowed=self.allowed)
        self.sock = _encryption().wrap_socket(plain, server_hostname=self.host)


@functools.cache
def _encryption() -> ssl.SSLContext:
    return ssl.create_default_context()


_local = threading.local()


@dataclasses.dataclass(frozen=True)
class Web:
    """What is read by HTTPS; and by HTTP from the hosts that are allowed by name.

    Parameters
    ----------
    hosts : frozenset of str
        Hosts that may be reached whatever their numbers, also without encryption.
    """

    hosts: frozenset[str] = frozenset()

    def look(self, address: str) -> Found:
        """Return size and version of an object without reading it; of one whose server does not say, nothing is known."""
        with self._answer("HEAD", address) as answer:
            if answer.status in _NO_HEAD:
                return Found()
            return _found(answer)

    def get(self, address: str) -> tuple[bytes, Found]:
        """Return the bytes of an object, and the version that they are."""
        with self._answer("GET", address) as answer:
            if answer.status in _FORBIDDEN:
                raise PermissionError(f"the server answers {answer.status} {answer.reason}")
            data = answer.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise UnreadableImageError("too-large", f"{without_secrets(address)}: more than {MAX_BYTES} bytes")
            if answer.length:
                raise UnavailableError(f"{answer.length} bytes are missing")
            return data, _found(answer)._replace(size=len(data))

    @contextlib.contextmanager
    def _answer(self, method: str, address: str) -> Iterator[http.client.HTTPResponse]:
        """Yield the answer to a request after redirects, in a connection that is kept if the answer is read to its end."""
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                answer, close = self._asked(method, address)
                if answer.status not in _REDIRECTS:
                    break
                target = urllib.parse.urljoin(address, answer.headers.get("Location", ""))
                answer.read(1 << 16)
                close()
                address = target
            else:
                raise UnreadableImageError(
                    "unreadable", f"{without_secrets(address)}: more than {_MOST_REDIRECTS} redirects"
                )
            if answer.status in _GONE:
                raise FileNotFoundError(f"the server answers {answer.status} {answer.reason}")
            if answer.status >= 500 or answer.status in _LATER:
                raise UnavailableError(f"the server answers {answer.status} {answer.reason}")
            if answer.status != 200 and answer.status not in (*_FORBIDDEN, *(_NO_HEAD if method == "HEAD" else ())):
                raise UnreadableImageError(
                    "unreadable", f"{without_secrets(address)}: the server answers {answer.status}"
                )
            yield answer
            if (
                not answer.isclosed()
            ):  # what is left of a short answer is read, so that the connection can be used again
                answer.read(1 << 16)
            if not answer.isclosed():
                close()
        except (SourceError, UnreadableImageError, FileNotFoundError, PermissionError):
            _local.connections = {}
            raise
        except (OSError, http.client.HTTPException) as error:
            _local.connections = {}  # whatever state they are in
            raise (
                error if isinstance(error, UnavailableError) else UnavailableError(f"{type(error).__name__}: {error}")
            ) from error

    def _asked(self, method: str, address: str) -> tuple[http.client.HTTPResponse, Callable[[], None]]:
        parts = urllib.parse.urlsplit(address)
        host = (parts.hostname or "").lower()
        allowed = host in self.hosts
        if not host or parts.scheme not in (("https", "http") if allowed else ("https",)):
            hint = f"; if the manifest is yours, add --allow-host {host}" if parts.scheme == "http" else ""
            raise SourceError(f"{without_secrets(address)}: expected an address of https://{hint}")
        kept: dict[tuple[str, str, int | None], _Http | _Https] = _local.__dict__.setdefault("connections", {})
        key = (parts.scheme, host, parts.port)
        if key not in kept:
            kept[key] = (_Https if parts.scheme == "https" else _Http)(host, parts.port, timeout=_TIMEOUT)
        connection = kept[key]
        connection.allowed = allowed
        headers = {"Accept-Encoding": "identity", "User-Agent": "bottleneck-features"}
        if parts.username is not None:
            user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        connection.request(method, f"{path}?{parts.query}" if parts.query else path, headers=headers)
        answer = connection.getresponse()

        def close() -> None:
            connection.close()
            kept.pop(key, None)

        return answer, close


def _found(answer: http.client.HTTPResponse) -> Found:
    """Read size and version from the headers of an answer.

    Without an ETag, a time within the second of the answer is no version: more may be written in it (RFC 9110, 8.8.2.2).
    """
    modified = _nanoseconds(answer, "Last-Modified")
    length, version = answer.headers.get("Content-Length", ""), answer.headers.get("ETag", "").strip()
    if not version and modified and not 0 < _nanoseconds(answer, "Date") <= modified:
        version = str(modified)
    return Found(int(length) if length.isdecimal() else 0, version, modified)


def _nanoseconds(answer: http.client.HTTPResponse, name: str) -> int:
    """Return the time that a header names, in nanoseconds since 1970; 0 if it names none."""
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        return int(email.utils.parsedate_to_datetime(answer.headers.get(name, "")).timestamp()) * 10**9
    return 0
