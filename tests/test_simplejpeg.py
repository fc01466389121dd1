"""simplejpeg decodes what Pillow decodes, to the same levels; everything else, and every refusal, is Pillow's."""

from __future__ import annotations

import io
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from features.errors import UnreadableImageError
from features.pixels import jpeg
from features.pixels.decode import decoding
from features.recipe import PixelRule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on files damaged on purpose


def outcome(data: bytes, rule: PixelRule) -> tuple[object, ...]:
    """All that a decoded file or its refusal says."""
    try:
        with decoding(data, rule) as upright:
            return upright.image.mode, upright.image.size, upright.image.tobytes(), upright.width, upright.height
    except UnreadableImageError as error:
        return error.reason, str(error)


def check(data: bytes, rule: PixelRule, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    found = outcome(data, rule)
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "decoder", lambda: None)
        assert found == outcome(data, rule)
    return found


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each JPEG, whether simplejpeg decoded it."""
    if jpeg.decoder() is None:
        pytest.skip("simplejpeg or the extension is not installed")
    whole, seen = jpeg.loaded, list[bool]()

    def loaded(image: Image.Image, data: bytes) -> Image.Image | None:
        pixels = whole(image, data)
        seen.append(pixels is not None)
        return pixels

    monkeypatch.setattr(jpeg, "loaded", loaded)
    return seen


def drawn(generator: random.Random) -> bytes:
    """A JPEG of any ordinary kind."""
    width, height = generator.randint(8, 60), generator.randint(8, 60)
    levels = np.random.default_rng(generator.getrandbits(30)).integers(0, 256, (height, width, 4)).astype(np.uint8)
    image = Image.fromarray(levels).convert(generator.choice(["RGB", "RGB", "RGB", "L", "CMYK"]))
    options: dict[str, object] = {"quality": generator.choice([10, 75, 95]), "progressive": generator.random() < 0.4}
    if image.mode == "RGB":
        options["subsampling"] = generator.choice(["4:4:4", "4:2:2", "4:2:0"])
        options["keep_rgb"] = options["subsampling"] == "4:4:4" and generator.random() < 0.3
    if generator.random() < 0.2:
        options["restart_marker_blocks"] = 2
    if generator.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = generator.randint(0, 9)
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def damaged(data: bytes, generator: random.Random) -> bytes:
    """The file cut off, with some bytes changed, or with others in their place; or whole."""
    way, place = generator.random(), generator.randrange(len(data))
    if way < 0.3:
        return data[: generator.randint(len(data) - 60, len(data)) if generator.random() < 0.5 else place]
    if way < 0.7:
        changed = bytearray(data)
        for _ in range(generator.choice([1, 1, 2, 8])):
            changed[generator.randrange(len(data))] = generator.choice([0, 255, generator.randrange(256)])
        return bytes(changed)
    if way < 0.8:
        return data[:place] + generator.randbytes(generator.randint(1, 9)) + data[place + generator.randint(0, 9) :]
    return data


@pytest.mark.slow
def test_whole_and_damaged_files_are_decoded_and_refused_as_by_pillow(
    used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(0)
    for _ in range(300):
        side = generator.choice([4, 9, 20])
        rule = PixelRule(side, side, decode=generator.choice(["full", "full", "fast"]))
        check(damaged(drawn(generator), generator), rule, monkeypatch)
    assert 30 < sum(used) < len(used)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["cats_and_dogs_filtered", "flowers17"])
def test_photographs_are_decoded_as_by_pillow(
    folder: str, assets: Path, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in sorted((assets / "images" / folder).rglob("*.jpg"))[::100]:
        for decode in ("full", "fast"):
            assert check(file.read_bytes(), PixelRule(64, 64, decode=decode), monkeypatch)[0] == "RGB"
    assert used.count(True) == len(used) / 2  # the other half is Pillow's share of the comparison


@pytest.fixture
def fresh() -> Iterator[None]:
    jpeg.decoder.cache_clear()
    yield
    jpeg.decoder.cache_clear()


def test_without_simplejpeg_pillow_decodes(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert jpeg.decoder() is None
    assert outcome(drawn(random.Random(1)), PixelRule(20, 20))[0] == "RGB"


def test_a_decoder_that_gives_other_levels_is_not_used(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong:
        @staticmethod
        def decode_jpeg(
            data: bytes, colorspace: str, *, min_height: int, min_width: int, buffer: memoryview
        ) -> np.ndarray:
            buffer[:] = bytes(len(buffer))
            return np.zeros((min_height, min_width, 4), np.uint8)

    monkeypatch.setitem(sys.modules, "simplejpeg", Wrong)
    if jpeg.extension() is None:
        pytest.skip("the extension was not built")
    with caplog.at_level(logging.WARNING, jpeg.__name__):
        assert jpeg.decoder() is None
    assert "does not give the grey levels of this Pillow" in caplog.text


def test_a_picture_of_another_size_than_pillow_found_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Smaller:
        @staticmethod
        def decode_jpeg(data: bytes, colorspace: str, **_: object) -> np.ndarray:
            return np.zeros((8, 9, 4), np.uint8)  # into a larger buffer, of which the rest is whatever was there

    class Extension:
        @staticmethod
        def memory(*_: object) -> bytearray:
            return bytearray(1 << 16)

    monkeypatch.setattr(jpeg, "extension", Extension)
    data = drawn(random.Random(1))
    assert jpeg._decoded(Smaller, Image.open(io.BytesIO(data)), data) is None
