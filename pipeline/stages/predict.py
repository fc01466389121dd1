"""File, class and probabilities of new images, from pixels, by a run's own backbone and head, or by an exported model.

images, or a list of paths -> read, decode (threads) -> engine -> head ───────┐
                                                     -> artefact's runtime ───┴-> rows, in order, as they come
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from features.augmentation import PRESETS, AugmentSpec
from features.errors import ConfigurationError, SourceError, TooManyUnreadableError, UnreadableImageError
from features.files import printable
from features.machine import processors
from features.networks.reference import evenly_spread
from features.pixels.decode import read_bytes
from features.progress import Progress
from features.sources.imageset import ImageSet
from features.sources.reading import Reading, split_of
from features.sources.scan import scan
from features.sources.splits import SPLITS
from pipeline.exporting.artefacts import open_artefact
from pipeline.intervals import wilson_interval
from pipeline.outputs import files_of, output_file, refuse_overwriting
from pipeline.predicting.files import Prediction, Rows, choose_format, destination
from pipeline.predicting.loop import WARNED, Item, predictions
from pipeline.predicting.options import PredictOptions
from pipeline.predicting.predictors import ArtefactModel, Model, RunModel, promises_of, taken
from pipeline.predicting.targets import TargetRows, refuse_options_of_classes
from pipeline.reporting.grids import PredictedImage, check_picture, prediction_grid
from pipeline.runs.folder import FILES, Run
from pipeline.tables import shortened, table_text
from pipeline.tasks.task import Task

logger = logging.getLogger(__name__)
NAMED = 3  # folders that are no class, named in the judgement
SHOWN = 20  # classes listed in the summary
PICTURES = 36  # images of a grid


def predict(
    run: str | Path,
    images: str | Path | Iterable[str],
    *,
    out: str | Path | None = None,
    stream: TextIO | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predict the class of every image. Rows are written while later images are read, so memory does not grow.

    Parameters
    ----------
    run : str or Path
        Run folder, folder of runs (`pipeline.runs.board.take_run` says which one is taken), or exported model.
    images : str, Path or iterable of str
        Image source, whose labels are not used for the predictions; or paths of image files, any number of them, which
        are read as they arrive.
    out : Path, optional
        File to write, completely or not at all. Without it, rows are written to ``stream``.
    stream : text stream, optional
        Standard output by default.
    progress : callable, optional
        Called with ``("predict", done, total)``; ``total`` is 0 where it is not known.
    **options
        Fields of `pipeline.predicting.options.PredictOptions`: ``views``, ``augment``, ``weights``, ``device``, ...

    Returns
    -------
    dict
        ``run``, ``out``, ``rows`` (the format of the rows), ``images``, ``predicted``, ``unreadable``, ``classes`` (how often
        each was predicted), ``withheld`` (answers that are not sure enough, if the run has a threshold), ``labelled`` (predicted images in folders named like a class of the run), ``right`` (how many of
        them were given that class), ``others`` (predicted images in each folder of another name), ``grid``, and ``damaged``, the names of damaged runs that were left out.

    Raises
    ------
    ConfigurationError
        For a wrong option, views of an exported model, an output file that is one of the inputs, or a folder with runs of
        several data sets.
    SourceError
        If there are no such images, or the list is empty.
    RunError
        If the run cannot be opened, or has other weights.
    TooManyUnreadableError
        If no image could be read; ``out`` is then not written.
    """
    asked = PredictOptions(**options)
    kind, grid = choose_format(asked.format, None if out is None else Path(out)), asked.grid
    written: dict[str, Path] = {}
    if out is not None:
        written["--out"] = output_file(out, "--out", "predictions.csv")
    if grid is not None:
        check_picture(Path(grid))
        written["--grid"] = output_file(grid, "--grid", "grid.png")
    source = _scanned(images, written) if isinstance(images, str | Path) else images
    chosen, damaged = taken(run, asked)
    augmentation = _augmentation(chosen, run, asked.views, asked.augment)
    rows: Rows | TargetRows
    if chosen is not None:
        for option, path in written.items():
            refuse_overwriting(path, option, [os.path.realpath(chosen.folder / name) for name in FILES])
        if chosen.metrics.get("answers") and asked.views > 1:
            logger.warning(
                "the threshold and the sets of %s were found on single views; they are left out for means of %d views",
                *(chosen.run_id, asked.views),
            )
        task, before = chosen.task, chosen.metrics["validation"]
        answers = promises_of(chosen, asked)
        rows = _rows_of(kind, chosen.classes, asked, task, before, answers)  # before the network is loaded
        model: Model = RunModel(chosen, options=asked, augment=augmentation)
    else:
        model = exported = ArtefactModel(open_artefact(run))
        task, before = exported.task, exported.before
        rows = _rows_of(kind, model.classes, asked, task, before, model.answers)
    if isinstance(source, ImageSet):
        named = _labels(source, model.classes, chosen) if task.one_class else [""] * len(source)
        items, total = _items(source, named), len(source)
    else:
        items, total = _listed(source, written), 0
    gallery = Gallery(model.classes, total if grid is not None else None)
    counts: Counter[int] = Counter()  # 0 counts images, -1 unreadable ones
    given: Counter[int] = Counter()  # how often each class or label was
    numbers = {name: number for number, name in enumerate(model.classes)}
    judged: Counter[bool] = Counter()  # of the labelled images, how many are right and wrong
    others: Counter[str] = Counter()  # predicted images in folders that are no class
    withheld = 0
    with (
        ThreadPoolExecutor(asked.workers or processors()) as pool,
        destination(written.get("--out"), stream or sys.stdout, kind) as write,
    ):
        for batch in predictions(model, items, pool):
            write("".join(["" if counts else rows.header, *(rows.text(prediction) for _, prediction in batch)]))
            for item, prediction in batch:
                gallery.look(counts.total(), item, prediction)
                best = -1 if prediction.probabilities is None else int(prediction.probabilities.argmax())
                counts[min(best, 0)] += 1
                if prediction.probabilities is not None:
                    given.update(task.given(prediction.probabilities, model.classes, before))
                withheld += rows.withholds(prediction)
                if best >= 0 and item.label in numbers:
                    judged[best == numbers[item.label]] += 1
                elif best >= 0 and item.label:
                    others[item.label] += 1
            if progress:
                progress("predict", counts.total(), total)
        if not counts:
            raise SourceError("the list of images is empty; expected one path in each line, relative to this folder")
        if counts[-1] == counts.total():
            nothing = "" if out is None else "; nothing was written"
            what = images if isinstance(images, str | Path) else "the list"
            raise TooManyUnreadableError(f"{what}: none of {counts[-1]} images could be read{nothing}")
    if grid is not None:
        prediction_grid(gallery.pictures, written["--grid"], title=model.name)
    if counts[-1] > WARNED:
        logger.warning("%d more images are unreadable; their rows say why", counts[-1] - WARNED)
    return {
        "format": 1,
        "run": model.name,
        "out": None if out is None else str(out),
        "rows": kind,
        "images": counts.total(),
        "predicted": counts.total() - counts[-1],
        "unreadable": counts[-1],
        "classes": {name: given[index] for index, name in enumerate(model.classes)} if task.answers else {},
        "labelled": judged.total(),
        "right": judged[True],
        "others": dict(others) if judged else {},
        "grid": None if grid is None else str(grid),
        **({"withheld": withheld} if rows.withholding is not None else {}),
        "damaged": damaged,
    }


def summary(document: dict[str, Any]) -> str:
    """Describe for a person how many images were given each class."""
    unread = f", {document['unreadable']} unreadable" if document["unreadable"] else ""
    classes = sorted(document["classes"].items(), key=lambda pair: -pair[1])
    lines = [{"class": shortened(name), "images": count} for name, count in classes[:SHOWN]]
    table = table_text(lines, "  ") if lines else "  numbers of each image, in the unit of the manifest"
    rest = f"\n  and {len(classes) - SHOWN} more classes" if len(classes) > SHOWN else ""
    drawn = f"\n{document['grid']}: some of them" if document["grid"] else ""
    said = f"{document['out']}: {document['predicted']} predictions by {document['run']}{unread}\n{table}{rest}{drawn}"
    if "withheld" in document:
        said += f"\n  {withholding(document)}"
    return f"{said}\n  {judgement(document)}" if document["labelled"] else said


def withholding(document: dict[str, Any]) -> str:
    """Say for a person how many answers are withheld."""
    return (
        f"{document['withheld']} of {document['predicted']} answers are withheld, because they are not sure enough (column "
        "abstain)"
    )


def judgement(document: dict[str, Any]) -> str:
    """Say for a person how many of the labelled images were right."""
    right, labelled = document["right"], document["labelled"]
    low, high = wilson_interval(right, labelled)
    others = Counter(document["others"]).most_common()
    named = " and ".join(f"{count} in {shortened(printable(name), 40)!r}" for name, count in others[:NAMED])
    more = f" and {len(others) - NAMED} more folders" if len(others) > NAMED else ""
    which = "is no class" if len(others) == 1 else "are no classes"
    rest = f". {named}{more}, which {which} of the run, are left out of this" if others else ""
    return (
        f"{right} of {labelled} images are right, going by the names of their folders: accuracy {right / labelled:.4f} "
        f"({low:.4f} to {high:.4f}); bottleneck evaluate says more{rest}"
    )


def _rows_of(
    kind: str,
    classes: Sequence[str],
    asked: PredictOptions,
    task: Task,
    before: Mapping[str, Any],
    answers: Mapping[str, Any] | None,
) -> Rows | TargetRows:
    """What turns predictions into text."""
    if task.one_class:
        return Rows(kind, classes, asked.top, answers)
    refuse_options_of_classes(task, top=asked.top, grid=asked.grid)
    return TargetRows(kind, classes, task, before, answers)


class Gallery:
    """Collects the images of a grid: evenly spread over the source, or the first ones if their number is unknown.

    Parameters
    ----------
    classes : sequence of str
        Classes of the model. Labels are ignored if none of them is a class of the model.
    total : int or None
        Number of images, 0 if it is unknown; None for no grid.
    """

    def __init__(self, classes: Sequence[str], total: int | None) -> None:
        self._classes = classes
        self._chosen = frozenset(evenly_spread(total, PICTURES)) if total else None
        self._most = 0 if total is None else PICTURES
        self._owed = 0  # images that should have been drawn and could not be read; the next ones replace them
        self._pictures: list[PredictedImage] = []

    def look(self, position: int, item: Item, prediction: Prediction) -> None:
        """Keep the image if it belongs in the grid."""
        if len(self._pictures) >= self._most:
            return
        self._owed += self._chosen is None or position in self._chosen
        if prediction.probabilities is None or not self._owed:
            return
        best = int(prediction.probabilities.argmax())
        with contextlib.suppress(UnreadableImageError):  # the file has been removed
            data = item.read()
            self._pictures.append(
                PredictedImage(data, self._classes[best], float(prediction.probabilities[best]), item.label)
            )
            self._owed -= 1

    @property
    def pictures(self) -> list[PredictedImage]:
        """The pictures to draw."""
        if any(picture.label in self._classes for picture in self._pictures):
            return self._pictures
        return [picture._replace(label="") for picture in self._pictures]


def _scanned(images: str | Path, written: Mapping[str, Path]) -> ImageSet:
    """Find the images of a source; refuse an output file that is one of them."""
    source = scan(images, labelled=False)
    for option, path in written.items():
        refuse_overwriting(path, option, files_of(source))
    return source


def _items(source: ImageSet, labels: Sequence[str]) -> Iterator[Item]:
    pairs = zip(source.paths, labels, strict=True)
    return (Item(path, partial(source.read, row), label) for row, (path, label) in enumerate(pairs))


def _listed(paths: Iterable[str], written: Mapping[str, Path]) -> Iterator[Item]:
    """The images of a list; refuse an output file that is one of them."""
    old = {option: path for option, path in written.items() if path.exists()}
    for path in paths:
        for option, place in old.items():
            refuse_overwriting(place, option, [os.path.realpath(path)])
        yield Item(os.fspath(path), partial(read_bytes, path))


def _labels(source: ImageSet, classes: Sequence[str], run: Run | None) -> list[str]:
    """The label of each image, empty if it has none, by a reading of the folders that gives classes of the model.

    If the folders as they stand give none, they may lie as those that the run was trained on, or be split folders of any
    name.
    """
    readings = [run.reading] if run is not None and run.reading.record else []
    codes = {name: split_of(name, alone=True) for name in source.classes}
    if codes and None not in codes.values() and "," not in "".join(codes):
        pairs = ",".join(f"{SPLITS[code or 0]}={name}" for name, code in codes.items())
        readings.append(Reading(pairs, settled=True))
    found = source
    for reading in readings:
        if set(found.classes) & set(classes):
            break
        with contextlib.suppress(ConfigurationError, SourceError):  # the folders have another form
            found = scan(source.description, labelled=False, reading=reading)
    names = (*found.classes, "")  # -1 for an image without a label
    label_of = {path: names[label] for path, label in zip(found.paths, found.labels.tolist(), strict=True)}
    return [label_of.get(path, "") for path in source.paths]


def _augmentation(run: Run | None, given: str | Path, views: int, augment: str | None) -> AugmentSpec | None:
    """Return the augmentation of the views; None for one view."""
    if run is None and (views > 1 or augment is not None):
        raise ConfigurationError(
            f"views: {given} is an exported model, which cannot draw views of an image. Give the run that it was exported "
            "from, or leave out --views and --augment."
        )
    spec = run.recipe.augmentation if run is not None and augment is None else AugmentSpec.parse(augment or "none")
    plain = spec is None or spec.is_plain
    if views > 1 and plain:
        known = ", ".join(name for name in PRESETS if name != "none")
        raise ConfigurationError(
            f"views: received {views}, which without an augmentation would all be the plain image. Add --augment with "
            f"one of {known}."
        )
    if views == 1 and augment is not None and not plain:
        raise ConfigurationError(
            f"augment: received {augment}, but one view is the plain image alone. Add --views with 2 or more."
        )
    return spec if views > 1 else None
