"""File, class and probabilities of new images, from pixels, by a run's own backbone and head, or by an exported model.

images -> decode (threads) -> engine -> head -> CSV
                           -> artefact, by its own runtime -> CSV
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from features.errors import TooManyUnreadableError, UnreadableImageError, check_range
from features.files import atomic_file, printable, writable_folder
from features.machine import processors
from features.sources import ImageSet, scan
from pipeline.artefacts import is_artefact, open_artefact, predictions
from pipeline.endtoend import decoded_batches, network_of
from pipeline.runs import Run, choose_run

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Outcomes = Iterator[tuple[int, np.ndarray | UnreadableImageError]]


def predict_csv(
    run: str | Path,
    images: str | Path,
    *,
    out: Path | None = None,
    weights: str | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> str:
    """Predict the class of every image.

    Parameters
    ----------
    run : str or Path
        Run folder, a folder of runs, of which the best one is taken, or what ``export`` wrote.
    images : str or Path
        Any image source; its labels, if it has some, are not looked at.
    out : Path, optional
        CSV file to write, whole or not at all.
    weights : str, optional
        Where the backbone's weights are now.
    batch_size, workers, device, progress
        As everywhere.

    Returns
    -------
    str
        The CSV, or a line that says where it is. Columns: ``file``, ``class``, ``probability``, one per class name,
        and ``error``, which says why an image has no prediction.
    """
    check_range("batch size", batch_size, 1, 4096)
    check_range("workers", 1 if workers is None else workers, 1, 1024)
    if out is not None:
        writable_folder(Path(out).parent)
    source = scan(images, labelled=False)
    lines: dict[int, list[str]] = {}
    with ThreadPoolExecutor(workers or processors()) as pool:
        if is_artefact(run):
            artefact = open_artefact(run)
            name, classes = artefact.card.run, artefact.classes
            outcomes = predictions(artefact, source.read, range(len(source)), pool)
        else:
            chosen = choose_run(Path(run))
            name, classes = chosen.run_id, chosen.classes
            outcomes = _by_run(chosen, source, pool, weights=weights, batch_size=batch_size, device=device)
        for row, found in outcomes:
            if isinstance(found, UnreadableImageError):
                lines[row] = _refusal(source.paths[row], found, len(classes))
            else:
                best = int(found.argmax())
                shown = [f"{value:.6g}" for value in found]
                lines[row] = [source.paths[row], classes[best], shown[best], *shown, ""]
            if progress:
                progress("predict", len(lines), len(source))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    fixed = ["file", "class", "probability", "error"]
    columns = [f"p:{title}" if title in fixed else title for title in classes]
    writer.writerow([*fixed[:3], *columns, "error"])
    writer.writerows(lines[row] for row in sorted(lines))
    text = stream.getvalue()
    unread = sum(line[1] == "" for line in lines.values())
    if unread == len(lines):
        raise TooManyUnreadableError(f"{images}: none of {len(lines)} images could be read; nothing was written")
    if out is None:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    with atomic_file(Path(out)) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    return f"{out}: {len(lines) - unread} predictions by {name}" + (f", {unread} unreadable\n" if unread else "\n")


def _by_run(
    run: Run, source: ImageSet, pool: Executor, *, weights: str | None, batch_size: int, device: str
) -> Outcomes:
    network, head = network_of(run, weights, device=device), run.load_head()
    engine = network.engine(network.recipes, batch_size=batch_size, device=device)
    name = network.recipes[0].name
    for rows, pixels, refused in decoded_batches(source.read, range(len(source)), run.recipe.pixels, pool, batch_size):
        if rows:
            yield from zip(rows, head.predict_proba(engine(pixels)[name]), strict=True)
        yield from refused.items()


def _refusal(path: str, error: UnreadableImageError, classes: int) -> list[str]:
    logger.warning("%s is unreadable (%s)", printable(path), error)
    return [path, "", "", *[""] * classes, error.reason]
