"""Images in object stores and on web servers: listed once, read when they are needed, tried again when a store fails.

    address --closed list of protocols--> Bucket (fsspec) or Web --look, get, list--> Found, bytes --Reader--> one image

A further kind of store is a line of ``_BUCKETS``. Nothing that is written holds a query or a password of an address.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib
import logging
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from features.errors import SourceError, UnreadableImageError, nearest
from features.machine import HOSTS, how_to_install
from features.pixels.decode import read_bytes
from features.sources.folders import IMAGE_SUFFIXES, File, is_ignored, suffix_of, warn_left_out
from features.sources.objects import Found, UnavailableError, without_secrets
from features.sources.web import Web

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Protocol -> package that fsspec needs for it, options of reading one object, and how to say who one is.
_BUCKETS: dict[str, tuple[str, Mapping[str, Any], str]] = {
    # Without this option it asks for the size before each object.
    "s3": ("s3fs", {"max_concurrency": 1}, "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "gs": ("gcsfs", {}, "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"),
    "memory": ("fsspec", {}, ""),
}
_WEB = ("https", "http")
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]*://|[a-z]+::")
_CHAIN = re.compile("^[A-Za-z0-9+]+::|::[A-Za-z][A-Za-z0-9+.-]*://")
_ATTEMPTS, _FIRST_PAUSE, _LONGEST_PAUSE = 8, 0.1, 10.0  # seconds
_LOOKING = 32  # threads that ask for sizes and versions
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError")
_WRONG = (
    "ParamValidationError",
    "ValidationError",
    "ProfileNotFound",
    "ConfigParseError",
    "InvalidRegionError",
    "NoRegionError",
)
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "requests", "urllib3", "asyncio")


class Store(Protocol):
    """Where objects lie. Errors are ``FileNotFoundError``, ``PermissionError``, and ``UnavailableError`` for another try."""

    def look(self, address: str) -> Found: ...

    def get(self, address: str) -> tuple[bytes, Found]: ...


def is_address(text: str) -> bool:
    """Whether a text is the address of an object, or would be one."""
    return _ADDRESS.match(text) is not None


def checked(text: str, *, buckets_only: bool = False) -> str:
    """Return an address of a protocol that is read; others, and chains of them, are refused.

    Raises
    ------
    SourceError
        The message names the protocols.
    """
    protocol = text.partition("://")[0].lower()
    known = [name for name in (*_BUCKETS, *(() if buckets_only else _WEB)) if name != "memory"]
    if _CHAIN.search(text) or protocol not in (*_BUCKETS, *_WEB):
        listed = ", ".join(f"{name}://" for name in known)
        raise SourceError(
            f"{without_secrets(text)}: expected an address of {listed}, and no chain of them{nearest(protocol, known)}"
        )
    if not text.partition("://")[2].strip("/"):
        raise SourceError(
            f"{text}: names no {'host' if protocol in _WEB else f'bucket; expected {protocol}://BUCKET/FOLDER'}"
        )
    if buckets_only and protocol in _WEB:
        raise SourceError(
            f"{without_secrets(text)}: a web server has no listing. Write the addresses of its images into a manifest "
            "(path,label), or download the file"
        )
    return text


def hosts_of(given: str = "") -> frozenset[str]:
    """Return the hosts that may be reached inside a private network: those given, with commas, and those of the environment."""
    return frozenset(host.strip().lower() for host in f"{given},{os.environ.get(HOSTS, '')}".split(",") if host.strip())


class Bucket:
    """A store that fsspec knows."""

    def __init__(self, protocol: str) -> None:
        package, self._reading, self._account = _BUCKETS[protocol]
        try:
            importlib.import_module(package)
            fsspec = importlib.import_module("fsspec")
        except ImportError as error:
            command = "pip install gcsfs" if package == "gcsfs" else how_to_install("remote")
            raise SourceError(f"{protocol}:// needs {package}: {command}") from error
        timeouts = {"connect_timeout": 10, "read_timeout": 60, "max_pool_connections": 64}
        options = {"config_kwargs": {**timeouts, "retries": {"max_attempts": 1}}} if protocol == "s3" else {}
        self._files = fsspec.filesystem(protocol, use_listings_cache=False, **options)
        if protocol == "s3":
            self._files.retries = 1  # tried() tries again

    def look(self, address: str) -> Found:
        with self._translated(address):
            return _found(self._files.info(address))

    def get(self, address: str) -> tuple[bytes, Found]:
        """Return the bytes, and as their version their MD5, which is the ETag of most objects."""
        with self._translated(address):
            data = bytes(self._files.cat_file(address, **self._reading))
        return data, Found(len(data), hashlib.md5(data, usedforsecurity=False).hexdigest())

    def get_range(self, address: str, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to before ``stop``."""
        with self._translated(address):
            return bytes(self._files.cat_file(address, start=start, end=stop)) if start < stop else b""

    def list(self, address: str) -> dict[str, Found]:
        """Return all objects below an address by their names inside it; page by page, however many there are."""
        with self._translated(address):
            root = self._files._strip_protocol(address).strip("/")
            found = self._files.find(address, detail=True)
            if not found:
                self._files.ls(root.partition("/")[0])  # raises an error if there is no such bucket
        return {
            name.strip("/")[len(root) :].lstrip("/"): _found(info)
            for name, info in found.items()
            if info.get("type") == "file"
        }

    @contextlib.contextmanager
    def _translated(self, address: str) -> Iterator[None]:
        """Turn the errors of the libraries into those of ``Store``; what no further try can mend is a ``SourceError``."""
        try:
            yield
        except (FileNotFoundError, PermissionError, UnavailableError):
            raise
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            if any(name in kinds for name in _NO_CREDENTIALS):
                raise PermissionError(f"no credentials were found; {self._account}") from error
            text = f"{kinds[0]}: {' '.join(str(error).split())[:200]}"
            if type(error) is ValueError or any(name in kinds for name in _WRONG):
                raise SourceError(
                    f"{without_secrets(address)}: cannot be asked for ({text}). Check the address, and the variables and files of "
                    "the store's own tools, such as AWS_PROFILE and AWS_ENDPOINT_URL"
                ) from error
            ours = type(error).__module__.partition(".")[0] in _LIBRARIES or isinstance(error, OSError | TimeoutError)
            if not ours:
                raise
            raise UnavailableError(text) from error


def _found(info: Mapping[str, Any]) -> Found:
    """Read what fsspec says of an object."""
    modified = info.get("LastModified") or info.get("updated") or info.get("created")
    if isinstance(modified, str):
        with contextlib.suppress(ValueError):
            modified = datetime.datetime.fromisoformat(modified)
    seconds = modified.timestamp() if isinstance(modified, datetime.datetime) else modified
    time_ns = round(seconds * 1e6) * 1000 if isinstance(seconds, float) else 0
    version = str(info.get("ETag") or info.get("etag") or "").strip('"')
    return Found(int(info.get("size") or 0), version or (str(time_ns) if time_ns else ""), time_ns)


_stores: dict[tuple[str, frozenset[str], int], Store] = {}
_opening = threading.Lock()


def store_of(address: str, hosts: frozenset[str]) -> Store:
    """Return the store of an address; each is opened once in a process."""
    protocol = checked(address).partition("://")[0].lower()
    key = (protocol if protocol in _BUCKETS else "web", hosts, os.getpid())
    with _opening:
        if key not in _stores:
            _stores[key] = Bucket(protocol) if protocol in _BUCKETS else Web(hosts)
        return _stores[key]


def tried(call: Callable[[], T], address: str) -> T:
    """Call until the store answers, with pauses that grow, differ by chance and have a limit.

    Raises
    ------
    FileNotFoundError
        If there is no such object.
    SourceError
        If it may not be read, or the store does not answer; the message says what to do.
    """
    pause, name = _FIRST_PAUSE, without_secrets(address)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except PermissionError as error:
            raise SourceError(
                f"{name}: may not be read ({error}). Check the credentials and the rights of this account"
            ) from error
        except FileNotFoundError:
            raise
        except UnavailableError as error:
            if attempt == _ATTEMPTS:
                raise SourceError(
                    f"{name}: no answer in {_ATTEMPTS} tries ({str(error)[:200]}). What is finished is kept: run again later"
                ) from error
            logger.debug("%s: %s; tried again", name, error)
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)
    raise AssertionError


def listing(address: str) -> tuple[list[File], list[str], Reader]:
    """List the images below an address, as ``features.sources.folders.walk`` does for a folder.

    Raises
    ------
    SourceError
        If the bucket does not exist or may not be read.
    """
    root = checked(address, buckets_only=True).rstrip("/")
    if "//" in root.partition("://")[2]:
        raise SourceError(f"{root}: a folder has no name; expected one / between names")
    bucket = Bucket(root.partition("://")[0].lower())
    try:
        found = tried(functools.partial(bucket.list, root), root)
    except FileNotFoundError as error:
        raise SourceError(f"{root} does not exist: there is no such bucket or folder") from error
    files, folders, left_out, listed = list[File](), {""}, Counter[str](), dict[str, Found]()
    for path, about in found.items():
        parts = path.split("/")
        if not path or any(part == "" or is_ignored(part) for part in parts):
            continue
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
        if suffix_of(path) in IMAGE_SUFFIXES:
            files.append(about.file(path))
            listed[path] = about
        else:
            left_out[suffix_of(path) or "no suffix"] += 1
    warn_left_out(root, left_out)
    return sorted(files), sorted(folders), Reader(root, frozenset(), listed)


def look_at_rows(root: str, addresses: Mapping[str, str], hosts: frozenset[str]) -> tuple[dict[str, File], Reader]:
    """Ask for size and version of the objects that a manifest names; ``addresses`` are the whole ones by path."""

    def look(path: str) -> Found | None:
        address = addresses[path]
        try:
            return tried(lambda: store_of(address, hosts).look(address), address)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_LOOKING, "look") as pool:
        found = dict(zip(addresses, pool.map(look, addresses), strict=True))
    files = {path: File(path, -1, -1) if about is None else about.file(path) for path, about in found.items()}
    listed = {path: about for path, about in found.items() if about is not None}
    return files, Reader(root, hosts, listed, dict(addresses))


@dataclasses.dataclass(eq=False)
class Reader:
    """The function path -> bytes, for images of which some or all lie in a store; may be called from many threads.

    Parameters
    ----------
    root : str
        Address or folder to which paths are relative.
    hosts : frozenset of str
        Hosts inside a private network that may be reached.
    listed : dict of str to Found
        What was known of an object when it was listed.
    addresses : dict of str to str
        Whole addresses by path, where they are not the path: with their query.
    replaced : set of str
        Paths of objects that were another version when they were read; nothing is noted about them.
    """

    root: str
    hosts: frozenset[str] = dataclasses.field(default_factory=hosts_of)
    listed: dict[str, Found] = dataclasses.field(default_factory=dict, repr=False)
    addresses: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    replaced: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, path: str) -> bytes:
        address = self.addresses.get(path, path)
        if not is_address(address):
            if not is_address(self.root):
                return read_bytes(os.path.join(self.root, path))
            address = f"{self.root}/{path}"
        store = store_of(address, self.hosts)
        try:
            data, version = tried(lambda: store.get(address), address)
            listed = self.listed.get(path)
            # An ETag that is no MD5 has to be asked for; one that is, is known from the bytes.
            if listed is not None and version[:2] != listed[:2]:
                version = tried(lambda: store.look(address), address)
                if version[:2] != listed[:2] or not listed.version:
                    self.replaced.add(path)
        except FileNotFoundError as error:
            raise UnreadableImageError("missing", f"{without_secrets(address)}: no such object") from error
        return data
