"""What one image may cost: limits that decide whether it is decoded, and guards of memory and time that decide nothing.

The limits look only at the bytes of the file, so every machine sets the same images aside.

    data --check_file()--> opened image --check_picture()--> memory.held(bytes) --> decoded
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator

from PIL import Image

from features.errors import UnreadableImageError
from features.files import printable

MAX_PIXELS = 100_000_000
NO_MEMORY = "no-memory"  # the reason that is perhaps the fault of the machine, so it decides nothing for good
MAX_BYTES = 1 << 30  # of a file
MAX_SIDE = 65_535  # pixels, the largest that JPEG allows; resizing a longer side would take gigabytes
MAX_DECODED = 1_200_000_000  # bytes that decoding takes, by `decoded_bytes`
MAX_SCANS, MAX_SCANNED = (
    100,
    4_000_000_000,
)  # of a JPEG: passes over the picture, and passes times pixels; usual are 1 to 10
MAX_PARTS = 200_000  # chunks, segments, blocks or tiles in one file: each takes Pillow a microsecond or more
MAX_HEADER = 1 << 16  # bytes of a PPM before its pixels
MAX_PLAIN = 24_000_000  # bytes of a PPM whose numbers are text: Pillow reads 3 MB of them a second

# Bytes per pixel at the peak of decoding, measured with Pillow 13.0 at 60 to 100 million pixels and rounded up: what the
# decoder itself keeps, and the image in the modes that it goes through.
_BYTES_PER_PIXEL = {"JPEG": 8, "MPO": 8, "JPEG2000": 24, "WEBP": 20}
_PROGRESSIVE, _OTHER = 12, 12
FREE_BYTES = 200_000_000  # an image that takes less never waits for others: 25 million pixels of a JPEG


def _decode_seconds(text: str) -> float:
    """Return the seconds that ``text`` gives; 300 if it is no positive number."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    return 300.0


# After this time the process ends, because nothing else ends a decoder. Not a limit: an image is set aside only if it ends
# worker after worker (`kills-worker`), as a crash of the decoder would.
DECODE_SECONDS = _decode_seconds(os.environ.get("BOTTLENECK_DECODE_SECONDS", ""))

# A word of the header with what comes before it. To Pillow, a word does not end where a comment begins.
_PPM_TOKEN = rb"\s(?:\s|#[^\r\n]*[\r\n])*[^\s#]+"
_PPM_HEADER = re.compile(rb"P(?:[14](?:%b){2}|[0-9A-Za-z]+(?:%b){3})\s" % (_PPM_TOKEN, _PPM_TOKEN))
_MARKER = re.compile(
    rb"\xff[\x01-\xcf\xd8-\xfe]"
)  # in the data of a scan, where 0xff is followed by 0 or a restart marker
_TIFF_OFFSETS = (273, 279, 324, 325)  # where strips and tiles are, and how many bytes they take
_STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length


def refuse(what: str) -> UnreadableImageError:
    """Return the error for a file that exceeds a limit; ``what`` says which and by how much."""
    return UnreadableImageError("too-large", what)


def check_file(data: bytes) -> None:
    """Refuse a file whose parts would take too long to read, before it is opened.

    Raises
    ------
    UnreadableImageError
        With the reason ``too-large``.
    """
    if data[:1] == b"P" and data[1:2] in b"0123456fy":
        if not _PPM_HEADER.match(data[:MAX_HEADER]) and len(data) > MAX_HEADER:
            raise refuse(f"the header of a PPM takes more than {MAX_HEADER} bytes")
        if data[1:2] in b"123" and len(data) > MAX_PLAIN:
            raise refuse(
                f"{len(data)} bytes of a PPM written as text; the limit is {MAX_PLAIN}. Save it in binary form"
            )
    elif data[:2] == b"\xff\xd8" and len(data) > 4 * MAX_PARTS:
        _check_parts(jpeg_segments(data))
    elif data[:4] == b"\x89PNG" and len(data) > 12 * MAX_PARTS:
        _check_parts(png_chunks(data))
    elif data[:2] in (b"II", b"MM") and len(data) > 4 * MAX_PARTS and (parts := _tiff_parts(data)) > MAX_PARTS:
        raise refuse(f"{parts} strips or tiles; the limit is {MAX_PARTS}")
    elif data[:4] == b"GIF8" and len(data) > 2 * MAX_PARTS:
        _check_parts(_gif_blocks(data))


def _check_parts(parts: Iterator[object]) -> None:
    if any(number >= MAX_PARTS for number, _ in enumerate(parts)):
        raise refuse(f"more than {MAX_PARTS} segments, chunks or blocks")


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each segment of a JPEG begins and ends, from its marker on; that of the first scan is the last."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, end = data[position + 1], position + 2
        if marker == 0xFF:
            end = position + 1
        elif marker not in _STANDALONE:
            end += max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
        yield position, end
        if marker in (0xD9, 0xDA):
            return
        position = end


def png_chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each chunk of a PNG begins and ends, from its length to after its checksum."""
    position = 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        yield position, end
        position = end


def _tiff_parts(data: bytes) -> int:
    """Return the number of strips or tiles of the first picture in a TIFF or BigTIFF; 0 if it cannot be read."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        if struct.unpack_from(f"{order}H", data, 2)[0] == 43:
            [start], counted, entry = struct.unpack_from(f"{order}Q", data, 8), "Q", f"{order}HHQ8x"
        else:
            [start], counted, entry = struct.unpack_from(f"{order}I", data, 4), "H", f"{order}HHI4x"
        count = min(struct.unpack_from(order + counted, data, start)[0], 65_536)
        first, size = start + struct.calcsize(order + counted), struct.calcsize(entry)
        tags = [struct.unpack_from(entry, data, first + size * number) for number in range(count)]
    except struct.error:
        return 0
    return max((held for tag, _, held in tags if tag in _TIFF_OFFSETS), default=0)


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Yield the position of each block of the extensions before the first picture."""
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while position + 2 < len(data) and data[position] == 0x21:
        position += 2
        while position < len(data) and data[position]:
            yield position
            position += 1 + data[position]
        position += 1


def check_picture(image: Image.Image, data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an opened image that would take too much memory or time to decode.

    Raises
    ------
    UnreadableImageError
        With the reason ``too-large``.
    """
    width, height = image.size
    check_size(width, height, decoded_bytes(image), image.format or "image", max_pixels)
    if len(getattr(image, "tile", ())) > MAX_PARTS:
        raise refuse(f"more than {MAX_PARTS} tiles")
    if image.format in ("JPEG", "MPO"):
        most = min(MAX_SCANS, MAX_SCANNED // max(1, width * height))
        if data.count(b"\xff\xda") > most and (scans := _scans(data)) > most:
            raise refuse(f"{scans} scans of {width}x{height} pixels; the limit is {most}")


def check_size(width: int, height: int, need: int, kind: str, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image of more pixels than the limits, or one that takes more than ``MAX_DECODED`` bytes (``need``).

    Raises
    ------
    UnreadableImageError
        With the reason ``too-large``.
    """
    if width * height > max_pixels:
        raise refuse(f"{width}x{height} pixels; the limit is {max_pixels} in total")
    if max(width, height) > MAX_SIDE:
        raise refuse(f"{width}x{height} pixels; the limit is {MAX_SIDE} on a side")
    if need > MAX_DECODED:
        raise refuse(f"{width}x{height} pixels take {need} bytes to decode from {kind}; the limit is {MAX_DECODED}")


def _scans(data: bytes) -> int:
    """Count the scans of a JPEG, up to its end; pictures in its metadata or after it do not count."""
    position = max((end for _, end in jpeg_segments(data)), default=2)
    scans, parts = 1, 0
    while found := _MARKER.search(data, position):
        if (parts := parts + 1) > MAX_PARTS:
            raise refuse(f"more than {MAX_PARTS} segments")
        marker, position = data[found.start() + 1], found.end()
        scans += marker == 0xDA
        if marker == 0xD9:
            break
        if marker not in _STANDALONE:
            with contextlib.suppress(struct.error):
                position += struct.unpack_from(">H", data, position)[0]
    return scans


def decoded_bytes(image: Image.Image) -> int:
    """Return about how many bytes decoding an opened image takes at its peak, whatever its file says about depth."""
    each = _BYTES_PER_PIXEL.get(image.format or "", _OTHER)
    if image.info.get("progressive") or image.info.get("progression"):
        each = _PROGRESSIVE
    return image.width * image.height * each


class DecodeMemory:
    """The bytes that all threads of this process may take to decode large images at the same time.

    Parameters
    ----------
    limit : int
        Bytes; a single image may take all of them.
    """

    def __init__(self, limit: int = MAX_DECODED) -> None:
        self._free, self._limit = limit, limit
        self._changed = threading.Condition()
        self._file: int | None = None

    def share(self, file: int) -> None:
        """From now on, let one large image at a time be decoded by all processes that have this file open."""
        self._file = file

    @contextlib.contextmanager
    def held(self, need: int) -> Iterator[None]:
        """Hold ``need`` bytes, and wait until they are free; images below `FREE_BYTES` are not counted."""
        need = 0 if need < FREE_BYTES else min(need, self._limit)
        if need:
            with self._changed:
                self._changed.wait_for(lambda: self._free >= need)
                self._free -= need
            if self._file is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX)  # which the system takes back from a process that ends
        try:
            yield
        finally:
            if need:
                if self._file is not None:
                    fcntl.lockf(self._file, fcntl.LOCK_UN)
                with self._changed:
                    self._free += need
                    self._changed.notify_all()


memory = DecodeMemory()


class _Watch:
    """Ends the process if one image has been decoding for too long."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[int, str]] = {}
        self._ticks = 0  # of a clock that stands still while the process is stopped (Ctrl-Z, a job that gives way)
        self._lock = threading.Lock()
        self._process = 0

    @contextlib.contextmanager
    def over(self, name: str) -> Iterator[None]:
        """Watch the decoding of the image ``name`` in this thread."""
        if self._process != os.getpid():
            with self._lock:
                if self._process != os.getpid():
                    self._process, self._running = os.getpid(), {}
                    threading.Thread(target=self._look, name="decode-watch", daemon=True).start()
        key = threading.get_ident()
        self._running[key] = (self._ticks, name)
        try:
            yield
        finally:
            self._running.pop(key, None)

    def _look(self) -> None:
        while True:
            time.sleep(DECODE_SECONDS / 10)
            self._ticks += 1
            begun, name = min(list(self._running.values()), default=(self._ticks, ""))
            if self._ticks - begun > 10:
                sys.stderr.write(
                    f"error: {printable(name)}: has been decoding for {DECODE_SECONDS:.0f} s, so this process ends; finished "
                    "shards are kept. Remove or repair that image and run again; or add --cluster local:1, which sets an "
                    "image aside that ends its worker each time.\n"
                )
                sys.stderr.flush()
                os._exit(1)


watch = _Watch()
