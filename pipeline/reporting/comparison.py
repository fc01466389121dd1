"""The picture of a comparison of networks: accuracy with its interval against the time for all images, one point a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from features.files import atomic_file
from pipeline.runs.plots import BLUE, DPI, INK, PAGE, STYLE, VERMILLION, new_figure
from pipeline.tables import shortened

MINUTE, HOUR, DAY = 60, 3600, 86_400
# Times that may be marked on the axis, in seconds.
TIMES = [
    *(1, 2, 5, 10, 20, 30),
    *(MINUTE * count for count in (1, 2, 5, 10, 20, 30)),
    *(HOUR * count for count in (1, 2, 5, 10)),
    *(DAY * count for count in (1, 2, 5, 10, 20, 50, 100, 200, 500)),
]
MOST_MARKS = 9
APART = 1.8  # smallest factor between the ends of the axis and the points
# Where a label may stand beside its point: points to the right and upwards, and which of its sides is there.
PLACES = [(7, 5, "left"), (-7, 5, "right"), (7, -11, "left"), (-7, -11, "right"), (7, 17, "left"), (-7, 17, "right")]


def draw_comparison(document: Mapping[str, Any], path: Path) -> None:
    """Draw the networks of a document by `pipeline.stages.compare.compare`; the chosen one is a vermillion square.

    Parameters
    ----------
    document : dict
        ``networks``, ``chosen``, ``source``, ``scored``, ``images`` are used.
    path : Path
        PNG or JPEG file to write.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = _drawn(document)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format=path.suffix.lstrip(".").lower())


def _drawn(document: Mapping[str, Any]) -> Any:
    figure, axes = new_figure(PAGE, 4.0)
    networks, boxes = document["networks"], []
    for one in networks:
        chosen = one["network"] == document["chosen"]
        low, high = one["accuracy_interval"]
        style = {"color": VERMILLION if chosen else BLUE, "marker": "s" if chosen else "o", "markersize": 5}
        errors = [[one["accuracy"] - low], [high - one["accuracy"]]]
        axes.errorbar(one["seconds"], one["accuracy"], errors, capsize=3, elinewidth=1, **style)
    _mark_times(axes, [one["seconds"] for one in networks])
    axes.margins(y=0.12)
    axes.grid()
    axes.set_axisbelow(True)
    axes.set(xlabel=f"time for all {document['images']:,} images on this machine", ylabel="accuracy, 95 % interval")
    title = (
        f"{shortened(Path(document['source']).name)}: {document['scored']:,} images, a {document['head']} head in "
        f"{document['folds']} folds. * the fastest of those not told from the best"
    )
    axes.set_title(title, parse_math=False)
    figure.canvas.draw()  # fixes the layout, so that labels can be placed
    for one in networks:
        boxes.append(_box(axes, [(one["seconds"], bound) for bound in one["accuracy_interval"]]))
    for one in networks:
        text = shortened(one["network"], 30) + (" *" if one["network"] == document["chosen"] else "")
        boxes.append(_labelled(axes, text, (one["seconds"], one["accuracy"]), boxes))
    return figure


def _mark_times(axes: Any, seconds: list[float]) -> None:
    """Make the axis logarithmic, with ends and marks at round times."""
    low, high = min(seconds) / APART, max(seconds) * APART
    low, high = min(low, high / 10), max(high, low * 10)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    marks = [time for time in TIMES if low <= time <= high]
    marks = marks[:: max(1, -(-len(marks) // MOST_MARKS))]
    axes.set_xticks(marks, [_time(mark) for mark in marks])
    axes.set_xticks([], minor=True)


def _time(seconds: float) -> str:
    """Format a mark of the axis.

    Examples
    --------
    >>> [_time(seconds) for seconds in (5, 120, 7200, 172_800)]
    ['5 s', '2 min', '2 h', '2 days']
    """
    if seconds < HOUR:
        return f"{seconds:g} s" if seconds < MINUTE else f"{seconds / MINUTE:g} min"
    return f"{seconds / HOUR:g} h" if seconds < DAY else f"{seconds / DAY:g} day{'s' if seconds > DAY else ''}"


def _box(axes: Any, points: list[tuple[float, float]]) -> Any:
    """The rectangle on the canvas around some points, a few pixels wider."""
    from matplotlib.transforms import Bbox

    places = axes.transData.transform(points)
    return Bbox([places.min(axis=0) - 8, places.max(axis=0) + 8])


def _labelled(axes: Any, text: str, point: tuple[float, float], taken: list[Any]) -> Any:
    """Write a label beside a point where it covers nothing; return its rectangle."""
    best, least = None, None
    for right, up, side in PLACES:
        label = axes.annotate(
            text, point, (right, up), textcoords="offset points", ha=side, fontsize=8, color=INK, parse_math=False
        )
        box = label.get_window_extent()
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        clashes = sum(box.overlaps(other) for other in taken) + (0 if inside else 10)
        if least is None or clashes < least:
            if best is not None:
                best.remove()
            best, least = label, clashes
        else:
            label.remove()
    assert best is not None
    return best.get_window_extent()
