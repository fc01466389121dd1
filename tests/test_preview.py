"""Previews: every tile is, pixel for pixel, what extraction gives the network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import call_pipeline, paint_folder, run_without
from PIL import Image

from features.augmentation import AugmentSpec
from features.errors import ConfigurationError, TooManyUnreadableError
from features.pixels.decode import decode_image
from features.pixels.views import decode_views
from features.recipe import PixelRule
from features.sources.scan import scan
from pipeline.reporting.grids import (
    FRAME,
    GAP,
    LEAST_SIDE,
    MARGIN,
    RIGHT,
    WRONG,
    PredictedImage,
    check_page,
    prediction_grid,
    shortened,
)
from pipeline.stages.preview import preview, sample_images, summary

SIZE = 120


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise, 150x130 pixels, and a file that is no image."""
    folder = tmp_path_factory.mktemp("preview") / "images"
    generator = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (130, 150, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    (folder / "ant" / "torn.png").write_bytes(b"no image")
    return folder


def tiles(path: Path, rows: int, columns: int, side: int, top: int) -> np.ndarray:
    """Pictures of a grid, uint8, (rows, columns, side, side, 3)."""
    with Image.open(path) as image:
        page = np.asarray(image.convert("RGB"))
    height = (page.shape[0] - top - MARGIN + GAP) // rows
    width = side + 2 * FRAME + GAP
    return np.array(
        [
            [page[y : y + side, x : x + side] for x in range(MARGIN + FRAME, MARGIN + FRAME + columns * width, width)]
            for y in range(top + FRAME, top + FRAME + rows * height, height)
        ]
    )


def test_the_grid_shows_every_class_as_the_network_gets_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    document = preview(source, out, image_size=(SIZE, SIZE), fit="crop", count=6)
    names = document["images"]
    assert sorted({name.partition("/")[0] for name in names}) == ["ant", "bee", "cow"]
    assert names == sorted(names)
    assert len(names) == 6
    shown = tiles(out, 1, 6, SIZE, MARGIN + 32)[0]
    for name, tile in zip(names, shown, strict=True):
        pixels = decode_image((source / name).read_bytes(), PixelRule(SIZE, SIZE, fit="crop")).pixels
        np.testing.assert_array_equal(tile, pixels)
    assert "6 images at 120x120" in summary(document)


@pytest.mark.slow
def test_rows_are_the_views_that_extraction_renders(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    options = {"augment": "crop-rotation-jitter", "views": 4, "seed": 7, "count": 3}
    document = preview(source, out, image_size=(SIZE, SIZE), **options)  # type: ignore[arg-type]
    assert (document["views"], len(document["images"])) == (4, 3)
    shown = tiles(out, 3, 4, SIZE, MARGIN + 32 + 20)
    for name, row in zip(document["images"], shown, strict=True):
        data = (source / name).read_bytes()
        spec, digest = AugmentSpec.parse("crop-rotation-jitter"), hashlib.sha256(data).digest()
        made = decode_views(data, PixelRule(SIZE, SIZE), spec, seed=7, sha256=digest, views=range(4))
        np.testing.assert_array_equal(row, made.pixels)
    again = tmp_path / "again.png"
    preview(source, again, image_size=(SIZE, SIZE), **options)  # type: ignore[arg-type]
    assert again.read_bytes() == out.read_bytes()
    preview(source, again, image_size=(SIZE, SIZE), **{**options, "seed": 8})  # type: ignore[arg-type]
    assert again.read_bytes() != out.read_bytes()


def test_small_images_are_enlarged_by_whole_steps(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"a": 2})
    out = tmp_path / "grid.png"
    preview(source, out, image_size=(8, 8))
    side = 8 * (LEAST_SIDE // 8)
    first, second = tiles(out, 1, 2, side, MARGIN + 32)[0]
    assert np.unique(first.reshape(-1, 3), axis=0).tolist() == [[0, 0, 7]]
    assert np.unique(second.reshape(-1, 3), axis=0).tolist() == [[1, 0, 7]]


def test_unreadable_images_are_passed_over_and_said(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = preview(source, tmp_path / "grid.png", image_size=(SIZE, SIZE))
    assert (len(document["images"]), document["unreadable"]) == (12, 1)
    assert "torn.png is unreadable (not-an-image" in caplog.text
    assert "1 unreadable images skipped" in summary(document)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"nothing")
    with pytest.raises(TooManyUnreadableError, match="none of 1 images could be read; nothing was drawn"):
        preview(tmp_path / "broken", tmp_path / "other.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "grid.png"]


def test_what_cannot_be_drawn_is_refused_first(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--views 3 needs --augment.*add --augment flip-rotation"):
        preview(source, tmp_path / "a.png", views=3)
    with pytest.raises(ConfigurationError, match=r"received '.gif', expected the name of an image file: .png, .jpg"):
        preview(source, tmp_path / "a.gif")
    with pytest.raises(ConfigurationError, match="did you mean 'flip'"):
        preview(source, tmp_path / "a.png", augment="flipp")
    with pytest.raises(ConfigurationError, match="there is no image to draw"):
        prediction_grid([], tmp_path / "a.png")
    with pytest.raises(
        ConfigurationError, match=r"6 pictures of 4000x4000 in each of 3 rows .* type a smaller --count"
    ):
        preview(source, tmp_path / "a.png", image_size=(4000, 4000))
    with pytest.raises(ConfigurationError, match=r"expected at most .* 65,000 to a side"):
        check_page(200, 1, 400, 8)
    assert list(tmp_path.iterdir()) == []
    (folder := tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigurationError, match=r"--out .*: is a folder; expected a file, such as .*preview\.png"):
        preview(source, folder)
    mine = (source / "bee" / "1.png").read_bytes()
    for images in (source, source / "bee", source / "bee" / "1.png"):
        with pytest.raises(ConfigurationError, match=r"1\.png: is itself one of the files that are read"):
            preview(images, source / "bee" / "1.png")
    assert (source / "bee" / "1.png").read_bytes() == mine


def test_one_view_is_the_plain_image_and_a_narrow_page_has_room_for_its_title(source: Path, tmp_path: Path) -> None:
    for augment in ("none", "flip"):
        document = preview(source / "bee" / "1.png", tmp_path / "one.png", views=1, augment=augment)
        assert document["views"] == 1
        assert summary(document).endswith("one.png: 1 image at 224x224")
        with Image.open(tmp_path / "one.png") as image:
            assert image.width > 2 * MARGIN + 224 + 2 * FRAME  # of the tile alone


def test_what_is_beside_a_predicted_image_is_pale(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), (200, 0, 0)).save(tmp_path / "wide.png")
    item = PredictedImage((tmp_path / "wide.png").read_bytes(), "bee", 0.9)
    prediction_grid([item], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        tile = np.asarray(image.convert("RGB"))[MARGIN + FRAME :, MARGIN + FRAME : MARGIN + FRAME + 160][:160]
    assert tile[0].min() > 230
    assert tile[159].min() > 230
    assert tile[80].tolist() == [[200, 0, 0]] * 160


def test_classes_take_turns(source: Path) -> None:
    images = scan(source)
    chosen = sample_images(images, 6, seed=1)
    assert sorted(images.labels[chosen].tolist()) == [0, 0, 1, 1, 2, 2]
    assert len(set(images.labels[chosen[:3]].tolist())) == 3
    assert chosen == sample_images(images, 6, seed=1)
    assert sorted(sample_images(images, 99)) == list(range(13))


def test_predictions_are_marked_right_wrong_or_neither(source: Path, tmp_path: Path) -> None:
    data = [(source / "bee" / f"{number}.png").read_bytes() for number in range(3)]
    items = [
        PredictedImage(data[0], "bee", 0.9, "bee"),
        PredictedImage(data[1], "cow", 0.6, "bee"),
        PredictedImage(data[2], "bee", 0.7),
        PredictedImage(b"broken", "bee", 0.7, "bee"),
    ]
    out = tmp_path / "predictions.png"
    assert prediction_grid(items, out, title="bees") == 3
    with Image.open(out) as image:
        page = np.asarray(image.convert("RGB"))
    top = page[MARGIN + 32 + 1]  # inside the frames
    step = 160 + 2 * FRAME + GAP
    frames = [tuple(top[MARGIN + column * step + 40].tolist()) for column in range(3)]
    assert frames == [RIGHT, WRONG, (255, 255, 255)]


def test_long_names_are_cut_in_the_middle() -> None:
    assert shortened("bee", 200, 14) == "bee"
    cut = shortened("a very long name of a class that ends in 17", 120, 14)
    assert cut.startswith("a very")
    assert cut.endswith(" 17")
    assert "…" in cut
    assert "\\u202e" in shortened("a\u202eb", 400, 14)


@pytest.mark.slow
def test_the_command_draws_and_loads_no_network(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "views.jpg"
    arguments = ("preview", source, "--out", out, "--augment", "flip-rotation", "--views", "3", "--image-size", "96")
    result = call_pipeline(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["views"], document["image_size"], document["augment"]) == (3, [96, 96], "flip-rotation")
    with Image.open(out) as image:
        assert image.format == "JPEG"
        assert image.width == 2 * MARGIN + 3 * (2 * 96 + 2 * FRAME + GAP) - GAP
    plain = run_without({"keras", "tensorflow", "sklearn", "matplotlib"}, "preview", source, "--out", out)
    assert plain.returncode == 0, plain.stderr
    refused = call_pipeline("preview", source, "--out", tmp_path / "x.png", "--image-size", "big")
    assert (refused.returncode, "--image-size: received 'big'" in refused.stderr) == (2, True)
