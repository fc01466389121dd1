"""What one image may cost: memory over all threads, time, and ten files made to cost much."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, STRESS
from PIL import Image

from features.errors import UnreadableImageError
from features.pixels import limits
from features.pixels.decode import decode_image
from features.pixels.limits import FREE_BYTES, DecodeMemory
from features.recipe import PixelRule


def test_memory_is_shared_by_all_threads() -> None:
    memory, together, most, lock = DecodeMemory(3 * FREE_BYTES), 0, 0, threading.Lock()

    def decode(need: int) -> None:
        nonlocal together, most
        with memory.held(need):
            with lock:
                together += need
                most = max(most, together)
            time.sleep(0.005)
            with lock:
                together -= need

    needs = [FREE_BYTES, 2 * FREE_BYTES, 3 * FREE_BYTES] * 5
    threads = [threading.Thread(target=decode, args=(need,)) for need in needs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert together == 0
    assert FREE_BYTES < most <= 3 * FREE_BYTES
    with (
        memory.held(9 * FREE_BYTES),
        memory.held(FREE_BYTES - 1),
    ):  # the largest takes all there is; small ones never wait
        pass


def test_memory_is_given_back_after_an_error() -> None:
    memory = DecodeMemory(FREE_BYTES)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), memory.held(FREE_BYTES):
            _ = 1 // 0


def test_deep_grey_is_scaled_by_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is scaled in bands of rows to save memory; the largest value may be in the last."""
    values = np.linspace(0, 1000, 700 * 3, dtype=np.float32).reshape(700, 3)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    pixels = decode_image(stream.getvalue(), PixelRule(700, 3)).pixels
    np.testing.assert_array_equal(pixels[..., 0], np.floor(values * np.float32(255 / 65535) + np.float32(0.5)))


@pytest.mark.parametrize("largest", [1, 100, 254, 256, 1000, 4095, 65535])
@pytest.mark.parametrize("kind", [b"P5", b"P6"])
def test_pixmaps_of_any_depth_are_scaled_as_pillow_does(kind: bytes, largest: int) -> None:
    size, channels = (9, 7), {b"P5": 1, b"P6": 3}[kind]
    values = np.random.default_rng(largest).integers(0, min(65536, largest + 3), 63 * channels)
    samples = np.minimum(values, 255 if largest < 256 else 65535).astype(np.uint8 if largest < 256 else ">u2")
    data = kind + b" 9 7 %d\n" % largest + samples.tobytes()
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image)
    if image.mode == "I":
        expected = np.floor(expected.astype(np.float32) * np.float32(255 / 65535) + np.float32(0.5)).astype(np.uint8)
    found = decode_image(data, PixelRule(size[1], size[0])).pixels
    np.testing.assert_array_equal(found, expected if channels == 3 else np.repeat(expected[..., None], 3, axis=2))


def test_a_decoder_that_never_ends_is_ended(tmp_path: Path) -> None:
    """No row is decided: the process ends, as it would in a crash of the decoder."""
    code = (
        "import time\nfrom features.pixels.limits import watch\nwith watch.over('cat/slow\\n.jpg'):\n    time.sleep(30)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BOTTLENECK_DECODE_SECONDS": "0.3"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=25, check=False
    )
    assert time.monotonic() - began < 15
    assert done.returncode == 1
    assert "error: cat/slow\\n.jpg: has been decoding for 0 s" in done.stderr
    assert "--cluster local:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_time_in_which_a_process_is_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and a batch system stop a process for hours; what it was decoding is no heavy image."""
    watch, ended, naps = limits._Watch(), list[int](), iter([1000.0] + 30 * [30.0])
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += next(naps)

    def leave(code: int) -> None:
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(os, "_exit", leave)
    watch._process = os.getpid()  # so that no thread is started
    with watch.over("a.jpg"), pytest.raises(SystemExit):
        watch._look()
    assert ended == [1]
    assert now == 1000.0 + 10 * 30.0  # ten looks after the one that came late


def test_segments_between_scans_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PARTS", 20)
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    data = stream.getvalue()[:-2] + b"\xff\xfe\0\2" * 30 + b"\xff\xda\0\2" * 101 + b"\xff\xd9"
    with pytest.raises(UnreadableImageError, match="too-large: more than 20 segments"):
        limits.check_picture(Image.open(io.BytesIO(data)), data)


HEADERS = [
    b"P6 #%b\n2 2 255\n",
    b"P6 2 2 #%b\n255\n",
    b"P6 2 2 25#%b\n5\n",
    b"P6 2#\n2 2 #%b\n255\n",
    b"P4 2 2#%b\n",
    b"Pf 2 2 #%b\n-1.0\n",
    b"PyRGBA 2 2 #%b\n255\n",
    b"P0CMYK #%b\n2 2 255\n",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_comment_anywhere_in_the_header_of_a_pixmap_is_limited(header: bytes) -> None:
    with pytest.raises(UnreadableImageError, match="too-large: the header of a PPM"):
        limits.check_file(header % (limits.MAX_HEADER * b"x") + bytes(16))


@pytest.mark.parametrize(
    "header",
    [b"P6\n# GIMP\n99 99\n255\n", b"P5 9 9\t65535 ", b"P4\r\n#\r\n9\r\n9\r\n", b"Pf\n9 9\n-1.0\n", b"P1\n9 9\n"],
)
def test_a_usual_header_of_a_large_pixmap_is_read(header: bytes) -> None:
    limits.check_file(header + bytes(2 * limits.MAX_HEADER))


def png(width: int, height: int, colour: int, channels: int, bits: int = 8) -> bytes:
    """A black PNG; its data are one row again and again, and small."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = bytes(1 + width * channels * bits // 8)
    coder, many = zlib.compressobj(1), max(1, (4 << 20) // len(row))
    data = [coder.compress(row * min(many, height - top)) for top in range(0, height, many)]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(data) + coder.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def saved(mode: str, size: tuple[int, int], kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind, **options)
    return stream.getvalue()


def many_scans(side: int, count: int) -> bytes:
    data = saved("RGB", (side, side), "JPEG", progressive=True)
    tables, end = data.rindex(b"\xff\xc4"), data.rindex(b"\xff\xd9")
    return data[:end] + data[tables:end] * count + data[end:]


# Each decoded, or set aside, in under 10 s and 1.5 GB; before, they took up to minutes and 7 GB.
HEAVY: dict[str, tuple[Callable[[], bytes], bool]] = {
    "column-of-10-million.png": (lambda: png(1, 10_000_000, 2, 3), False),
    "row-of-10-million.png": (lambda: png(10_000_000, 1, 2, 3), False),
    "5000-scans.jpg": (lambda: many_scans(2000, 5000), False),
    "40-scans-of-49-megapixels.jpg": (lambda: many_scans(7000, 30), True),
    "comment-of-48-MB.ppm": (lambda: b"P6\n#" + b"x" * 48_000_000 + b"\n2 2\n255\n" + bytes(12), False),
    "text-of-54-MB.ppm": (lambda: b"P3\n3000 3000\n255\n" + b"0 " * 27_000_000, False),
    "100-megapixels-with-alpha.png": (lambda: png(10_000, 10_000, 6, 4), True),
    "100-megapixels-of-16-bits.png": (lambda: png(10_000, 10_000, 0, 1, 16), True),
    "100-megapixels-of-floats.tif": (lambda: saved("F", (10_000, 10_000), "TIFF", compression="packbits"), True),
    "62-megapixels.webp": (lambda: saved("RGBA", (16_383, 3_800), "WEBP", quality=1, method=0), False),
    "million-segments.jpg": (lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 5_000_000, False),
}
SECONDS_LONG = (
    "40-scans",
    "row-of",
    "62-megapixels",
    "100-megapixels-of",
)  # begin the names of those that are made in `make stress`
CODE = """
import sys, time
from features.machine import peak_memory
from features.errors import UnreadableImageError
from features.pixels.decode import decode_image
from features.recipe import PixelRule
data = open(sys.argv[1], "rb").read()
begun = time.process_time()
try:
    outcome = decode_image(data, PixelRule(224, 224)).pixels.shape == (224, 224, 3)
except UnreadableImageError as error:
    outcome = error.reason
print(outcome, time.process_time() - begun, peak_memory())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HEAVY if STRESS or not name.startswith(SECONDS_LONG)])
def test_heavy_images_cost_little(name: str, tmp_path: Path) -> None:
    make, decoded = HEAVY[name]
    (tmp_path / name).write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / name)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    outcome, seconds, memory = done.stdout.split() or pytest.fail(done.stderr)
    assert outcome == ("True" if decoded else "too-large")
    assert float(seconds) < 10
    assert int(memory) < 1_500_000_000


@pytest.mark.parametrize(
    ("text", "seconds"), [("0.5", 0.5), ("", 300), ("soon", 300), ("-1", 300), ("nan", 300), ("inf", 300)]
)
def test_the_time_that_a_decoder_has(text: str, seconds: float) -> None:
    assert limits._decode_seconds(text) == seconds
