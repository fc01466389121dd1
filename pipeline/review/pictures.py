"""Pictures of rows for the page: found in the source, checked by content, decoded, and encoded anew.

    row -> path -> bytes of the source -> sha256 of the row? -> decoded, small -> JPEG

A store is untrusted: it may name any file. A file is shown only if its bytes have the hash that the row has, so whoever made
the store must have had them already; and what a browser gets is a JPEG of our own, whatever the file was.
"""

from __future__ import annotations

import collections
import io
import threading
from collections.abc import Sequence

from features.errors import BottleneckError, UnreadableImageError
from features.machine import processors
from features.sources.reading import Reading
from features.sources.scan import lists_addresses
from features.store.reader import FeatureStore
from pipeline.reporting.thumbnails import Pictures, whole_image

SIDES = {"small": 256, "large": 1600}  # pixels
QUALITY = {"small": 78, "large": 88}
KEPT_BYTES = 64 << 20  # encoded pictures that are kept in memory
REMOTE = "://"


def _is_local(source: str) -> bool:
    """Whether a source that a store names asks no other machine: scanning a manifest asks about each of its addresses."""
    try:
        return REMOTE not in source and not lists_addresses(source)
    except (BottleneckError, OSError):
        return True  # scanning it fails as well, and says why


class Album:
    """Encoded pictures of the rows of a store.

    Parameters
    ----------
    store : FeatureStore
        The store, which names its source.
    sources : sequence of str
        Places to look first, given by the user.
    """

    def __init__(self, store: FeatureStore, sources: Sequence[str] = ()) -> None:
        self._store, self._given = store, tuple(sources)
        self._pixels = store.recipes[store.names[0]].pixels
        self._pictures: Pictures | None = None
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._at_once = threading.Semaphore(processors())
        self._kept: collections.OrderedDict[tuple[int, str], bytes] = collections.OrderedDict()
        self._size = 0

    @property
    def missing(self) -> str:
        """Why pictures cannot be shown; empty if the images were found."""
        if not self._given and any(REMOTE in path for path in self._store.images.paths):
            return "images that lie at an address are fetched only if you name their source with --images"
        return self._open().missing

    def jpeg(self, row: int, size: str) -> bytes | None:
        """Return a picture as JPEG, at most ``SIDES[size]`` pixels wide and high; None if the image cannot be shown."""
        key = (row, size)
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        table = self._store.images
        pictures = self._open()
        with self._at_once:
            data = pictures.read(table.paths[row], table.sha256[row].tobytes())
            if data is None:
                return None
            try:
                image = whole_image(data, SIDES[size], self._pixels)
            except UnreadableImageError:
                return None
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=QUALITY[size])
        made = stream.getvalue()
        self._keep(key, made)
        return made

    def _keep(self, key: tuple[int, str], made: bytes) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._size += len(made)
            while self._size > KEPT_BYTES:
                _, oldest = self._kept.popitem(last=False)
                self._size -= len(oldest)

    def _open(self) -> Pictures:
        with self._opening:
            if self._pictures is None:
                store, told = self._store, self._store.provenance
                named = [store.source, str(told.get("root", ""))]
                local = [source for source in named if _is_local(source)]
                reading = Reading.recorded(told.get("reading", {}))
                self._pictures = Pictures([*self._given, *local], store.images.paths[:1000], reading, self._pixels)
            return self._pictures
