"""Grids of small images with captions, drawn with Pillow: pixels are shown as they are, never resampled in between."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from features.errors import ConfigurationError, UnreadableImageError
from features.files import atomic_file, printable
from pipeline.reporting.thumbnails import whole_image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
LEAST_SIDE = 112  # pixels; smaller images are enlarged by whole steps, so that a caption fits under them
GAP, FRAME, MARGIN = 12, 4, 20
TEXT, SMALL, TITLE = 14, 12, 18  # pixels of type
INK, MUTED, PAPER, SOFT, EMPTY = (27, 33, 41), (87, 96, 108), (255, 255, 255), (225, 229, 234), (238, 241, 244)
RIGHT, WRONG = (
    (0, 110, 80),
    (176, 72, 0),
)  # green and vermillion of Okabe and Ito, darkened for text; told apart by marks
COLUMNS = 6
TITLE_WIDTH = 560  # pixels; a page is at least as wide as its title, up to this
LONGEST_SIDE, MOST_PIXELS = 65_000, 250_000_000  # what a JPEG file can hold, and 750 MB of memory
TILE = 160  # pixels of a prediction's picture


class Cell(NamedTuple):
    """One image of a grid.

    Parameters
    ----------
    pixels : uint8, (h, w, 3), 0-255
        RGB; all cells of a grid have the same size.
    caption, second : str
        Lines under it; what is too long is cut.
    right : bool, optional
        Frame and mark: True a tick, False a cross, None neither.
    """

    pixels: np.ndarray
    caption: str
    second: str = ""
    right: bool | None = None


class PredictedImage(NamedTuple):
    """One image of a grid of predictions.

    Parameters
    ----------
    data : bytes
        The image file.
    predicted : str
        The most probable class.
    probability : float, 0-1
        Its probability.
    label : str
        The true class; empty where it is not known, and then neither tick nor cross is drawn.
    """

    data: bytes
    predicted: str
    probability: float
    label: str = ""


def prediction_grid(items: Sequence[PredictedImage], path: str | Path, *, title: str = "") -> int:
    """Draw predictions, right ones with a green tick and wrong ones with an orange cross and the true class.

    Parameters
    ----------
    items : sequence of PredictedImage
        In the order they are shown, six to a row.
    path : Path
        PNG or JPEG file, written whole or not at all.
    title : str
        Line above; how many are right is added where labels are known.

    Returns
    -------
    int
        Images drawn: one that cannot be decoded is left out.

    Raises
    ------
    ConfigurationError
        Nothing to draw, or a file name that stands for no image.
    """
    cells = []
    for item in items:
        try:
            image = whole_image(item.data, TILE)
        except UnreadableImageError:  # predict has said so
            continue
        square = Image.new("RGB", (TILE, TILE), EMPTY)
        square.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
        pixels = np.asarray(square)
        right = None if not item.label else item.label == item.predicted
        second = f"is {item.label}" if right is False else ""
        cells.append(Cell(pixels, f"{item.predicted} {item.probability:.2f}", second, right))
    known = [cell.right for cell in cells if cell.right is not None]
    counted = f"{sum(known)} of {len(known)} right" if known else ""
    draw_grid(rows_of(cells), path, title=": ".join(filter(None, (title, counted))))
    return len(cells)


def rows_of(cells: Sequence[Cell], columns: int = COLUMNS) -> list[Sequence[Cell]]:
    """Cells, so many to a row."""
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def draw_grid(
    rows: Sequence[Sequence[Cell]], path: str | Path, *, title: str = "", headings: Sequence[str] = ()
) -> None:
    """Draw rows of cells into an image file.

    Parameters
    ----------
    rows : sequence of sequence of Cell
        At least one cell in all.
    path : Path
        PNG or JPEG file, written whole or not at all.
    title : str
        Line above.
    headings : sequence of str
        Of the columns.

    Raises
    ------
    ConfigurationError
        Nothing to draw, or a file name that stands for no image.
    """
    path = Path(path)
    kind = check_picture(path)
    if not any(rows):
        raise ConfigurationError(f"{path}: there is no image to draw")
    height, width = rows[0][0].pixels.shape[:2]
    scale = _scale(height, width)
    lines = 2 if any(cell.second for row in rows for cell in row) else 1
    step_x, step_y = _step(height, width, lines)
    height, width = scale * height, scale * width
    top = MARGIN + (TITLE + 14 if title else 0) + (SMALL + 8 if headings else 0)
    columns = max(len(row) for row in rows)
    titled = min(TITLE_WIDTH, int(font(TITLE).getlength(printable(title)[:500])) + 1)
    size = (2 * MARGIN + max(columns * step_x - GAP, titled), top + len(rows) * step_y - GAP + MARGIN)
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((MARGIN, MARGIN - 2), shortened(title, size[0] - 2 * MARGIN, TITLE), INK, font(TITLE))
    for column, text in enumerate(headings):
        place = (MARGIN + column * step_x + FRAME, top - SMALL - 8)
        pen.text(place, shortened(text, width, SMALL), MUTED, font(SMALL))
    for line, row in enumerate(rows):
        for column, cell in enumerate(row):
            _draw_cell(page, pen, cell, MARGIN + column * step_x, top + line * step_y, scale)
    with atomic_file(path) as temporary:
        page.save(temporary, kind, **({"quality": 92} if kind == "JPEG" else {"optimize": True}))


def check_picture(path: Path) -> str:
    """The kind of image that a file's name stands for.

    Raises
    ------
    ConfigurationError
        If it stands for none that is written here.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ConfigurationError(
            f"{path}: received {path.suffix or 'no suffix'!r}, expected the name of an image file: {', '.join(FORMATS)}"
        )
    return kind


def check_page(rows: int, columns: int, height: int, width: int) -> None:
    """Make sure, before any image is decoded, that a page of so many of this size can be drawn.

    Raises
    ------
    ConfigurationError
        If it would be too large.
    """
    step_x, step_y = _step(height, width, 2)
    size = columns * step_x + 2 * MARGIN, rows * step_y + 3 * MARGIN
    if max(size) > LONGEST_SIDE or size[0] * size[1] > MOST_PIXELS:
        raise ConfigurationError(
            f"{columns} pictures of {height}x{width} in each of {rows:,} rows make a page of {size[0]:,}x{size[1]:,} pixels, "
            f"expected at most {MOST_PIXELS:,} in all and {LONGEST_SIDE:,} to a side; type a smaller --count, --views or "
            "--image-size"
        )


def _scale(height: int, width: int) -> int:
    """By how much small pictures are enlarged."""
    return max(1, -(-LEAST_SIDE // max(height, width)))


def _step(height: int, width: int, lines: int) -> tuple[int, int]:
    """Pixels from one cell to the next, across and down."""
    scale = _scale(height, width)
    return scale * width + 2 * FRAME + GAP, scale * height + 2 * FRAME + 6 + lines * (TEXT + 4) + GAP


def _draw_cell(page: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, x: int, y: int, scale: int) -> None:
    pixels = cell.pixels.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else cell.pixels
    height, width = pixels.shape[:2]
    colour = SOFT if cell.right is None else RIGHT if cell.right else WRONG
    inset = FRAME - 1 if cell.right is None else 0  # a thin line, or a frame
    pen.rectangle((x + inset, y + inset, x + width + 2 * FRAME - 1 - inset, y + height + 2 * FRAME - 1 - inset), colour)
    page.paste(Image.fromarray(np.ascontiguousarray(pixels)), (x + FRAME, y + FRAME))
    left, below = x + FRAME, y + height + 2 * FRAME + 4
    if cell.right is not None:
        _draw_mark(pen, left, below + 2, colour, right=cell.right)
    room = width - (16 if cell.right is not None else 0)
    ink = INK if cell.right is None else colour
    pen.text((left + width - room, below), shortened(cell.caption, room, TEXT), ink, font(TEXT))
    if cell.second:
        pen.text((left, below + TEXT + 4), shortened(cell.second, width, SMALL), MUTED, font(SMALL))


def _draw_mark(pen: ImageDraw.ImageDraw, x: int, y: int, colour: tuple[int, int, int], *, right: bool) -> None:
    """A tick or a cross of 11 pixels: not every font has them."""
    if right:
        pen.line([(x, y + 6), (x + 4, y + 10), (x + 11, y + 1)], colour, 2, joint="curve")
    else:
        pen.line([(x + 1, y + 1), (x + 10, y + 10)], colour, 2)
        pen.line([(x + 10, y + 1), (x + 1, y + 10)], colour, 2)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which comes with matplotlib and has Latin, Greek, Cyrillic and more; else Pillow's own."""
    found = importlib.util.find_spec("matplotlib")
    path = Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if found and found.origin else None
    return ImageFont.truetype(path, size) if path and path.is_file() else ImageFont.load_default(size)


def shortened(text: str, width: int, size: int) -> str:
    """Text that takes at most so many pixels; the middle of a longer one goes, as names differ at both ends."""
    text, face = printable(text)[:500], font(size)
    if face.getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 1:
        kept -= 1
        cut = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if face.getlength(cut) <= width:
            return cut
    return "…"
