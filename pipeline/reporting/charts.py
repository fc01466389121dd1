"""Charts as inline SVG. Text is escaped; colours are classes of the style sheet, so that they fit its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 420, 264
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40  # margins for the axes
MARKERS = 4  # shapes defined in the page: circle, square, triangle, diamond
MOST_POINTS = 800  # of a chart of pairs
COLOURS = 8  # colours defined in the style sheet


class Series(NamedTuple):
    """One line of a chart: name, positions and values, and the number of its colour, dash and marker."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Choose round numbers from ``low`` to ``high``, in steps of 1, 2 or 5 times a power of ten.

    Examples
    --------
    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(3, 48)
    [10.0, 20.0, 30.0, 40.0]
    """
    span = high - low
    if not span > 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Choose powers of ten from ``low`` to ``high``, at most seven; if there are fewer than two, both ends."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, -(-(last - first) // 6))
    found = [10.0**k for k in range(first, last + 1, step)]
    return found if len(found) > 1 else [low, high]


def numbers(values: Sequence[float]) -> list[str]:
    """Format the tick labels of one axis, all with the same number of decimals.

    Examples
    --------
    >>> numbers([0.0, 0.05, 0.1]), numbers([1e-05, 40000.0])
    (['0.00', '0.05', '0.10'], ['1e-5', '4e4'])
    """
    if any(value and not 1e-4 <= abs(value) < 1e4 for value in values):
        parts = [f"{value:.2e}".split("e") for value in values]
        return [f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if float(digits) else "0" for digits, power in parts]
    shown = [f"{value:.6f}".rstrip("0").partition(".")[2] for value in values]
    return [f"{value:.{max(map(len, shown))}f}" for value in values]


class _Scale:
    """Maps values to positions in the picture, rounded to a tenth of a pixel."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, log: bool = False) -> None:
        self.log = log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        share = (place - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.stop - self.start), 1)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    kept: tuple[float, str] | None = None,
) -> Markup:
    """Draw lines with markers.

    Parameters
    ----------
    series : sequence of Series
        The lines, with at least one point in all.
    title : str
        Description of the chart for screen readers.
    log_x : bool
        Use a logarithmic x axis; all positions must be above 0.
    kept : (float, str), optional
        A position to mark with a vertical line, and its caption.
    """
    xs = [x for line in series for x in line.xs]
    ys = [y for line in series for y in line.ys]
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.06 or max(abs(high) * 0.05, 0.01)
    x_scale = _Scale(min(xs), max(xs), LEFT + 6, WIDTH - RIGHT - 6, log=log_x)
    y_scale = _Scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    marks = log_ticks(min(xs), max(xs)) if log_x else ticks(min(xs), max(xs))
    if not log_x and all(x == int(x) for x in xs):
        marks = [x for x in marks if x == int(x)]
    parts = [_axes(x_scale, y_scale, marks, ticks(low - margin, high + margin), x_label, y_label)]
    if kept is not None:
        x = x_scale(kept[0])
        at_end = x > WIDTH * 0.7
        parts.append(
            Markup(
                '<line class="guide" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/><text class="said" x="{3}" y="{4}"{5}>{6}</text>'
            ).format(
                *(x, TOP, HEIGHT - BOTTOM, x - 5 if at_end else x + 5, TOP + 11),
                Markup(' text-anchor="end"') if at_end else "",
                kept[1],
            )
        )
    for line in series:
        points = [(x_scale(x), y_scale(y)) for x, y in zip(line.xs, line.ys, strict=True)]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(line.style, path))
        step = max(1, len(points) // 12)
        parts += [
            Markup('<use href="#m{}" class="mark s{}" x="{}" y="{}"/>').format(line.style, line.style, x, y)
            for x, y in points[::step]
        ]
    return _picture(parts, title)


def reliability_chart(
    bins: Sequence[Mapping[str, Any]],
    title: str,
    *,
    x_label: str = "confidence",
    y_label: str = "accuracy",
    things: str = "images",
    holds: str = "correct",
) -> Markup:
    """Draw accuracy over confidence, one bar for each bin, and below it the number of images in each bin."""
    strip = 34  # height of the bars that show the numbers of images
    x_scale = _Scale(0, 1, LEFT, WIDTH - RIGHT)
    floor = HEIGHT - BOTTOM - strip - 8
    y_scale = _Scale(0, 1, floor, TOP)
    most = max(found["n"] for found in bins)
    parts = [_axes(x_scale, y_scale, ticks(0, 1), ticks(0, 1), x_label, y_label, floor=floor)]
    for found in bins:
        x, width = x_scale(found["low"]) + 1, round(x_scale(found["high"]) - x_scale(found["low"]) - 2, 1)
        y, tall = y_scale(found["accuracy"]), round(strip * found["n"] / most, 1)
        said = (
            f"{x_label} {found['low']:.2f} to {found['high']:.2f}: "
            f"{found['n']} {things}, {found['accuracy']:.1%} {holds}, {found['confidence']:.1%} expected"
        )
        parts.append(
            Markup(
                '<g><title>{}</title><rect class="bar" x="{}" y="{}" width="{}" height="{}"/>'
                '<rect class="count" x="{}" y="{}" width="{}" height="{}"/>'
                '<circle class="gap" cx="{}" cy="{}" r="3"/></g>'
            ).format(
                *(said, x, y, width, round(floor - y, 1)),
                *(x, round(HEIGHT - BOTTOM - tall, 1), width, max(tall, 1)),
                *(x_scale(found["confidence"]), y),
            )
        )
    parts.append(
        Markup('<line class="diagonal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            x_scale(0), y_scale(0), x_scale(1), y_scale(1)
        )
    )
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="end">n</text>').format(LEFT - 7, HEIGHT - BOTTOM)
    )
    return _picture(parts, title)


def pairs_chart(name: str, true: np.ndarray, predicted: np.ndarray) -> Markup:
    """Draw predicted over true values, at most `MOST_POINTS` of them, with the line on which both are equal."""
    rows = np.unique(np.linspace(0, len(true) - 1, min(MOST_POINTS, len(true))).astype(int))
    low, high = float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))
    margin = (high - low) * 0.03 or max(abs(high) * 0.05, 0.01)
    low, high = low - margin, high + margin
    x_scale, y_scale = _Scale(low, high, LEFT, WIDTH - RIGHT), _Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x_scale, y_scale, ticks(low, high), ticks(low, high), "true", "predicted")]
    parts.append(
        Markup('<line class="diagonal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            x_scale(low), y_scale(low), x_scale(high), y_scale(high)
        )
    )
    points = zip(true[rows].tolist(), predicted[rows].tolist(), strict=True)
    parts += [Markup('<circle class="gap" cx="{}" cy="{}" r="2"/>').format(x_scale(x), y_scale(y)) for x, y in points]
    return _picture(parts, f"{name}: predicted over true values of {len(true)} images, from {low:.4g} to {high:.4g}")


def interval_bar(low: float, value: float, high: float, span: tuple[float, float], threshold: float) -> Markup:
    """Draw a value and its interval on the scale ``span``, with a line at ``threshold``; the page shows them as text too."""
    scale = _Scale(*span, 4, 156)
    return Markup(
        '<svg class="interval" viewBox="0 0 160 16" width="160" height="16" aria-hidden="true" focusable="false">'
        '<line class="track" x1="0" x2="160" y1="8" y2="8"/><line class="guide" x1="{t}" x2="{t}" y1="0" y2="16"/>'
        '<rect class="reach" x="{x}" y="5" width="{w}" height="6" rx="3"/><circle class="dot" cx="{v}" cy="8" r="4.5"/></svg>'
    ).format(t=scale(threshold), x=scale(low), w=round(max(1, scale(high) - scale(low)), 1), v=scale(value))


def scatter(places: np.ndarray, styles: Sequence[tuple[int, int]], wrong: Sequence[bool], name: str) -> Markup:
    """Draw the points of a feature map; the page's data describe each point, by its number.

    Parameters
    ----------
    places : float, (n, 2)
        Positions, in any unit that is the same for both axes.
    styles : sequence of (int, int)
        Number of each point's marker, and of its colour.
    wrong : sequence of bool
        Whether each point is a mistake; mistakes get a ring and are drawn above the others.
    name : str
        Name of the map.
    """
    side, edge = 480, 14
    low, high = places.min(axis=0), places.max(axis=0)
    factor = (side - 2 * edge) / max(float((high - low).max()), 1e-12)
    shown = np.round(side / 2 + (places - (low + high) / 2) * factor, 1)
    parts = []
    for k in sorted(range(len(shown)), key=lambda k: bool(wrong[k])):
        marker, colour = styles[k]
        ring = " w" if wrong[k] else ""
        x, y = shown[k].tolist()
        parts.append(f'<use href="#m{marker}" class="c{colour}{ring}" data-i="{k}" x="{x:g}" y="{side - y:g}"/>')
    return Markup(
        '<svg class="map" viewBox="0 0 {0} {0}" role="group" tabindex="0" data-map aria-roledescription="scatter plot" '
        'aria-label="{1}, {2} images. The arrow keys move from image to image.">'
        '{3}<circle class="cursor" r="9" visibility="hidden"/></svg>'
    ).format(side, name, len(shown), Markup("").join(map(Markup, parts)))


def _axes(
    x_scale: _Scale,
    y_scale: _Scale,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    *,
    floor: float = HEIGHT - BOTTOM,
) -> Markup:
    parts = []
    for value, shown in zip(y_ticks, numbers(y_ticks), strict=True):
        y = y_scale(value)
        line = '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text class="tick" x="{3}" y="{4}" text-anchor="end">{5}</text>'
        parts.append(Markup(line).format(LEFT, WIDTH - RIGHT, y, LEFT - 7, y + 4, shown))
    for value, shown in zip(x_ticks, numbers(x_ticks), strict=True):
        text = '<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>'
        parts.append(Markup(text).format(x_scale(value), HEIGHT - BOTTOM + 16, shown))
    parts.append(
        Markup(
            '<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>'
            '<text class="label" x="{3}" y="{4}" text-anchor="middle">{5}</text>'
            '<text class="label" transform="translate(12 {6}) rotate(-90)" text-anchor="middle">{7}</text>'
        ).format(
            *(LEFT, WIDTH - RIGHT, floor, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label, (TOP + floor) / 2, y_label)
        )
    )
    return Markup("").join(parts)


def _picture(parts: Sequence[Markup], title: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )
