"""Grids of small images with captions, drawn with Pillow. Pixels are only repeated to enlarge them, never interpolated."""

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
LEAST_SIDE = 112  # pixels; smaller images are enlarged by a whole factor, so that a caption fits below them
GAP, FRAME, MARGIN = 12, 4, 20  # pixels
TEXT, SMALL, TITLE = 14, 12, 18  # font sizes in pixels
INK, MUTED, PAPER, SOFT, EMPTY = (27, 33, 41), (87, 96, 108), (255, 255, 255), (225, 229, 234), (238, 241, 244)
# Green and vermillion of Okabe and Ito, darkened for text; marks tell right from wrong as well.
RIGHT, WRONG = (0, 110, 80), (176, 72, 0)
COLUMNS = 6  # cells of a row by default
TITLE_WIDTH = 560  # pixels; a page is at least as wide as its title, up to this
LONGEST_SIDE, MOST_PIXELS = 65_000, 250_000_000  # limits of a page: of the JPEG format, and 750 MB of memory
TILE = 160  # side of a prediction's picture in pixels


class Cell(NamedTuple):
    """One image of a grid.

    Parameters
    ----------
    pixels : uint8, (h, w, 3), 0-255
        RGB; all cells of a grid have the same size.
    caption, second : str
        First and second line below the image; long ones are shortened.
    right : bool, optional
        True draws a green frame and a tick, False an orange frame and a cross, None neither.
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
        The true class; empty if it is unknown, and then neither tick nor cross is drawn.
    """

    data: bytes
    predicted: str
    probability: float
    label: str = ""


def prediction_grid(items: Sequence[PredictedImage], path: str | Path, *, title: str = "") -> int:
    """Draw predictions, right ones with a green tick, wrong ones with an orange cross and the true class.

    Parameters
    ----------
    items : sequence of PredictedImage
        Images in the order in which they are shown, six to a row.
    path : Path
        PNG or JPEG file, written as a whole or not at all.
    title : str
        Line at the top, to which the number of right predictions is added if labels are known.

    Returns
    -------
    int
        Number of images drawn; those that cannot be decoded are left out.

    Raises
    ------
    ConfigurationError
        If there is nothing to draw, or the file name does not end as that of a PNG or JPEG file.
    """
    cells = []
    for item in items:
        pixels = square(item.data)
        if pixels is None:  # predict has already reported it
            continue
        right = None if not item.label else item.label == item.predicted
        second = f"is {item.label}" if right is False else ""
        cells.append(Cell(pixels, f"{item.predicted} {item.probability:.2f}", second, right))
    known = [cell.right for cell in cells if cell.right is not None]
    counted = f"{sum(known)} of {len(known)} right" if known else ""
    draw_grid(rows_of(cells), path, title=": ".join(filter(None, (title, counted))))
    return len(cells)


def square(data: bytes) -> np.ndarray | None:
    """Draw a whole image on a square, uint8 (TILE, TILE, 3); None if it cannot be decoded."""
    try:
        image = whole_image(data, TILE)
    except UnreadableImageError:
        return None
    page = Image.new("RGB", (TILE, TILE), EMPTY)
    page.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return np.asarray(page)


def rows_of(cells: Sequence[Cell], columns: int = COLUMNS) -> list[Sequence[Cell]]:
    """Arrange cells in rows of ``columns``."""
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def draw_grid(
    rows: Sequence[Sequence[Cell]], path: str | Path, *, title: str = "", headings: Sequence[str] = ()
) -> None:
    """Draw rows of cells into an image file.

    Parameters
    ----------
    rows : sequence of sequence of Cell
        Rows with at least one cell in all.
    path : Path
        PNG or JPEG file, written as a whole or not at all.
    title : str
        Line at the top.
    headings : sequence of str
        Headings of the columns.

    Raises
    ------
    ConfigurationError
        If there is nothing to draw, or the file name does not end as that of a PNG or JPEG file.
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
    """Return the image format that a file's suffix stands for.

    Raises
    ------
    ConfigurationError
        If it is not that of a PNG or JPEG file.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ConfigurationError(
            f"{path}: received {path.suffix or 'no suffix'!r}, expected the name of an image file: {', '.join(FORMATS)}"
        )
    return kind


def check_page(rows: int, columns: int, height: int, width: int) -> None:
    """Check, before any image is decoded, that a page with this many images of this size in pixels can be drawn.

    Raises
    ------
    ConfigurationError
        If the page would be too large.
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
    """Factor by which small pictures are enlarged."""
    return max(1, -(-LEAST_SIDE // max(height, width)))


def _step(height: int, width: int, lines: int) -> tuple[int, int]:
    """Distance from one cell to the next in pixels, across and down."""
    scale = _scale(height, width)
    return scale * width + 2 * FRAME + GAP, scale * height + 2 * FRAME + 6 + lines * (TEXT + 4) + GAP


def _draw_cell(page: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, x: int, y: int, scale: int) -> None:
    pixels = cell.pixels.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else cell.pixels
    height, width = pixels.shape[:2]
    colour = SOFT if cell.right is None else RIGHT if cell.right else WRONG
    inset = FRAME - 1 if cell.right is None else 0  # a thin line instead of a full frame
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
    """Draw a tick or a cross of 11 pixels, because not every font has these characters."""
    if right:
        pen.line([(x, y + 6), (x + 4, y + 10), (x + 11, y + 1)], colour, 2, joint="curve")
    else:
        pen.line([(x + 1, y + 1), (x + 10, y + 10)], colour, 2)
        pen.line([(x + 10, y + 1), (x + 1, y + 10)], colour, 2)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load DejaVu Sans, which comes with matplotlib and has Latin, Greek, Cyrillic and more; else Pillow's own font."""
    found = importlib.util.find_spec("matplotlib")
    path = Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if found and found.origin else None
    return ImageFont.truetype(path, size) if path and path.is_file() else ImageFont.load_default(size)


def shortened(text: str, width: int, size: int) -> str:
    """Shorten text to ``width`` pixels at a font ``size``. The middle is cut, since names differ at both ends."""
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
