"""Fetch JSON and large files from a hub by plain HTTPS: redirects, a token that stays with its host, resumed downloads.

    Server.json(path) -> object of JSON | Server.fetch(path, target) -> sha256 of the whole file

A server is a stranger: what it sends is limited in length and time, and a file is taken only if it has the size and the
hash that the hub promised for it. It is written completely or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO

from features.errors import ConfigurationError, FetchError, WeightsError, brief
from features.files import printable, whole_file

logger = logging.getLogger(__name__)
_DEFAULT_ENDPOINT = "https://huggingface.co"
_LOCAL = ("127.0.0.1", "localhost")
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_TIMEOUT = 10  # seconds without data
_ATTEMPTS = 5  # to receive one file; each goes on where the last one ended
_PAUSE = 0.5  # seconds before another attempt
_LARGEST_JSON = 8 << 20  # bytes
_LONGEST_JSON = 60  # seconds
_LARGEST_UNSAID = 64 << 20  # bytes of a file whose size the server does not say
_CHUNK = 1 << 20  # bytes
_BETWEEN_NEWS = 10  # seconds


def _failure(url: str, reason: str, status: int = 0, code: str = "") -> FetchError:
    """Say what could not be fetched and why; the query of the address is not shown, because it may hold a signature."""
    return FetchError(f"{brief(printable(url.partition('?')[0]), 300)}: {brief(printable(reason), 300)}", status, code)


@dataclasses.dataclass(frozen=True)
class _Promise:
    """What the hub says of a file before it comes: its size in bytes, and a sha256 or git's sha1 of it; empty if unsaid."""

    size: int | None = None
    digest: str = ""

    def completed(self, headers: Message, *, whole: bool) -> _Promise:
        """Add what an answer says; of a large file, the ``X-Linked`` headers of a redirect say it, and stay."""
        linked, length = _digest(headers.get("X-Linked-Etag")), _length(headers.get("X-Linked-Size"))
        if linked:
            return _Promise(length if length is not None else self.size, linked)
        size = _length(headers.get("Content-Length")) if whole and self.size is None else self.size
        return _Promise(size, self.digest or _digest(headers.get("ETag")))


@dataclasses.dataclass(frozen=True)
class Server:
    """A hub.

    Parameters
    ----------
    endpoint : str
        Address without a slash at its end; https, or http on this machine.
    token : str
        Sent to the host of the endpoint, and to no other; empty for none.
    offline : bool
        Whether nothing may be fetched.
    """

    endpoint: str
    token: str = dataclasses.field(default="", repr=False)
    offline: bool = False

    @classmethod
    def from_environment(cls) -> Server:
        """Read ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``; ``ConfigurationError`` if one cannot be meant."""
        endpoint = (os.environ.get("HF_ENDPOINT", "").strip() or _DEFAULT_ENDPOINT).rstrip("/")
        parts = _split(endpoint)
        if parts is None or "@" in endpoint or parts.query or parts.fragment or not _is_allowed(parts, local=True):
            shown = "an address with a password" if "@" in endpoint else repr(brief(printable(endpoint), 200))
            raise ConfigurationError(
                f"HF_ENDPOINT: received {shown}, expected an address such as {_DEFAULT_ENDPOINT}; http is taken for 127.0.0.1 and "
                "localhost only."
            )
        token = os.environ.get("HF_TOKEN", "").strip()
        if not re.fullmatch(r"[!-~]*", token):
            raise ConfigurationError("HF_TOKEN: it holds blanks or other characters that no token has.")
        return cls(endpoint, token, os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"))

    def json(self, path: str) -> Any:
        """Fetch an object of JSON of at most 8 MB; ``WeightsError`` if it does not come or is none."""
        url, data, end = f"{self.endpoint}{path}", bytearray(), time.monotonic() + _LONGEST_JSON
        response, _ = self._open(url)
        with response:
            while chunk := _read(response, url):
                data += chunk
                if len(data) > _LARGEST_JSON or time.monotonic() > end:
                    limit = f"more than {_LARGEST_JSON:,} bytes or {_LONGEST_JSON} seconds"
                    raise WeightsError(f"{printable(url)}: the answer takes {limit}")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{printable(url)}: the answer is not JSON ({brief(str(error), 100)})") from error

    def fetch(self, path: str, target: Path) -> str:
        """Download a file and return its sha256, 64 hexadecimal digits; a whole one that is there already is kept.

        Raises
        ------
        FetchError
            If it does not come; ``target`` is then as it was before.
        WeightsError
            If it is not what the hub promised; likewise.
        OSError
            If it cannot be written.
        """
        url = f"{self.endpoint}{path}"
        response, promise = self._open(url)
        with contextlib.ExitStack() as stack:
            stack.enter_context(response)
            if promise.digest and target.is_file() and (sha256 := _sha256_if_promised(target, promise)):
                return sha256  # an earlier run was killed before it could note it
            if promise.size is None and not promise.digest:
                raise WeightsError(f"{printable(url)}: the server says neither the size nor the hash of the file")
            file = stack.enter_context(whole_file(target))
            if (promise.size or 0) > shutil.disk_usage(target.parent).free:
                raise OSError(errno.ENOSPC, f"{promise.size or 0:,} bytes are needed", str(target))
            self._receive(url, response, promise, file)
            file.flush()
            written = _sha256_if_promised(Path(file.name), promise)
            if not written:
                raise WeightsError(
                    f"{printable(url)}: received other bytes than those of the hash {promise.digest}; nothing is kept"
                )
        return written

    def _receive(self, url: str, response: http.client.HTTPResponse, promise: _Promise, file: BinaryIO) -> None:
        """Write a file in one or more attempts; each goes on where the last one ended, if the server can do that."""
        news = _News(url, promise.size)
        limit = _LARGEST_UNSAID if promise.size is None else promise.size
        failure: Exception | None = None
        for attempt in range(_ATTEMPTS):
            try:
                if attempt:
                    time.sleep(_PAUSE)
                    response, _ = self._open(url, start=file.tell())
                    if response.status != 206 or not _starts_at(response, file.tell()):
                        file.seek(0)
                        file.truncate()
                with response:
                    while chunk := _read(response, url):
                        file.write(chunk)
                        news.tell(file.tell())
                        if file.tell() > limit:
                            raise WeightsError(
                                f"{printable(url)}: received more than the {limit:,} bytes expected; nothing is kept"
                            )
                if promise.size is None or file.tell() == promise.size:
                    return
                failure = _failure(url, f"received {file.tell():,} of {promise.size:,} bytes")
            except FetchError as error:
                failure = error
        assert failure is not None
        raise failure

    def _open(self, url: str, *, start: int = 0) -> tuple[http.client.HTTPResponse, _Promise]:
        """Follow redirects to the answer; what the endpoint's own host says of the file is its promise."""
        if self.offline:
            raise _failure(url, "HF_HUB_OFFLINE is set")
        own, promise = _split(self.endpoint), _Promise()
        assert own is not None
        for _ in range(_MOST_REDIRECTS + 1):
            parts = _split(url)
            if parts is None or not _is_allowed(parts, local=own.hostname in _LOCAL):
                raise _failure(url, "a redirect to an address that is not https")
            is_own = (parts.scheme, parts.netloc) == (own.scheme, own.netloc)
            response = self._ask(url, start, with_token=is_own)
            if is_own:
                promise = promise.completed(response.headers, whole=response.status == 200)
            if response.status in (200, 206):
                if promise.size is None and response.status == 200:
                    promise = dataclasses.replace(promise, size=_length(response.headers.get("Content-Length")))
                return response, promise
            response.close()
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                code = response.headers.get("X-Error-Code", "")
                raise _failure(url, f"HTTP status {response.status}", response.status, code)
            with contextlib.suppress(ValueError):
                url = urllib.parse.urljoin(url, location)
        raise _failure(url, f"more than {_MOST_REDIRECTS} redirects")

    def _ask(self, url: str, start: int, *, with_token: bool) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            url, headers={"User-Agent": "bottleneck-features", "Accept-Encoding": "identity"}
        )
        if start:
            request.add_header("Range", f"bytes={start}-")
        if with_token and self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            response: http.client.HTTPResponse = urllib.request.build_opener(_AnyStatus).open(request, timeout=_TIMEOUT)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise _failure(url, str(reason) or type(error).__name__) from error
        return response


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Give every answer as it is: redirects are followed here, where the token can be left out."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


class _News:
    """Say on the log what is downloaded, and every ten seconds how far it is."""

    def __init__(self, url: str, size: int | None) -> None:
        self._name, self._size, self._last = printable(url.rpartition("/")[2]), size, time.monotonic()
        logger.info("downloading %s (%s) from %s", self._name, _megabytes(size), printable(url.rpartition("/")[0]))

    def tell(self, received: int) -> None:
        if time.monotonic() - self._last >= _BETWEEN_NEWS:
            self._last = time.monotonic()
            logger.info("%s: %s of %s", self._name, _megabytes(received), _megabytes(self._size))


def _megabytes(size: int | None) -> str:
    return "unknown size" if size is None else f"{size / 1e6:.1f} MB"


def _read(response: http.client.HTTPResponse, url: str) -> bytes:
    try:
        return response.read1(_CHUNK)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failure(url, str(error) or type(error).__name__, response.status) from error


def _sha256_if_promised(path: Path, promise: _Promise) -> str:
    """Return the sha256 of a file; empty if it has not the size and the hash that were promised."""
    size = path.stat().st_size
    if promise.size is not None and size != promise.size:
        return ""
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    hashes = [sha256, git] if len(promise.digest) == 40 else [sha256]
    for chunk in _chunks(path):
        for item in hashes:
            item.update(chunk)
    return sha256.hexdigest() if promise.digest in ("", hashes[-1].hexdigest()) else ""


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _starts_at(response: http.client.HTTPResponse, start: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _digest(etag: str | None) -> str:
    """Return the hash in an ETag: a sha256 for large files, git's sha1 for small ones; empty for anything else."""
    value = (etag or "").strip().removeprefix("W/").strip('"').lower()
    return value if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", value) else ""


def _length(value: str | None) -> int | None:
    return int(value) if value is not None and re.fullmatch(r"[0-9]{1,15}", value.strip()) else None


def _split(url: str) -> urllib.parse.SplitResult | None:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts if parts.hostname and parts.port != 0 else None
    except ValueError:
        return None


def _is_allowed(parts: urllib.parse.SplitResult, *, local: bool) -> bool:
    return parts.scheme == "https" or (local and parts.scheme == "http" and parts.hostname in _LOCAL)
