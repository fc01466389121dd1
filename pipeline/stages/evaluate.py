"""Score a run, or an exported model, on labelled images: accuracy, confusion, each class, calibration.

labelled images -> the loop of prediction -> probabilities -> scores, with what was set aside counted
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from features.canonical import check_choice
from features.errors import (
    BottleneckError,
    ConfigurationError,
    RunError,
    SourceError,
    TooManyUnreadableError,
    UnreadableImageError,
    nearest,
)
from features.files import printable
from features.machine import processors
from features.progress import Progress, counted
from features.sources.imageset import ImageSet
from features.sources.reading import Reading
from features.sources.scan import scan, takes_target, united
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from features.targets import Target
from pipeline.exporting.artefacts import open_artefact
from pipeline.labels.file import LABEL, Labels, read_labels
from pipeline.labels.overlay import as_trained, labelled_images, record_of
from pipeline.predicting.loop import Item, predictions
from pipeline.predicting.options import PredictOptions
from pipeline.predicting.predictors import ArtefactModel, Model, RunModel, taken
from pipeline.predicting.targets import targets_of_source
from pipeline.reporting.data import Rows, class_table, confused_pairs, reliability
from pipeline.runs.datasets import absolute
from pipeline.runs.folder import Run, read_predictions
from pipeline.scores.metrics import evaluate as scores_of
from pipeline.tables import score_columns, shortened, table_text
from pipeline.tasks.table import CLASSIFICATION, TASKS

logger = logging.getLogger(__name__)
NAMED = 5  # classes named in a message
MATRIX = 10  # with more classes, the summary lists the most confused pairs instead of the matrix
SHOWN = 20  # classes, or pairs of them, in the summary


def evaluate(
    run: str | Path,
    images: str | Path,
    *,
    split: str | None = None,
    target: str | None = None,
    reading: Reading | None = None,
    labels: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predict labelled images and compare with their labels.

    Parameters
    ----------
    run : str or Path
        Run folder, folder of runs, or exported model; see `pipeline.stages.predict.predict`.
    images : str or Path
        Labelled image source: a folder of class folders, an archive of one, a manifest, ...
    split : {"train", "validation", "test"}, optional
        Score only the images that the source itself puts into this split; default: all images.
    target : str, optional
        Label column of a manifest; default: that of the run.
    reading : Reading, optional
        How classes and splits are read from the folders; default: as the run's features were read.
    labels : Path, optional
        Labels file that is put over the labels of the images.
    progress : callable, optional
        Called with ``("evaluate", done, total)``.
    **options
        Fields of `pipeline.predicting.options.PredictOptions`: ``weights``, ``batch_size``, ``workers``, ``device``,
        ``trust``, ``data_set`` (default: that of the images, if there are several).

    Returns
    -------
    dict
        ``run``, ``source``, ``split``; the counts ``images`` (with a label), ``evaluated``, ``unreadable`` (by reason) and
        ``unlabelled``; ``scores`` by `pipeline.scores.metrics.evaluate`; ``confusion``, counts by true class (row) and
        predicted class (column), in the order of ``classes``; ``confused``, pairs of classes, the most often confused first;
        ``per_class``; ``reliability``, the bins of confidence
        behind ``scores.ece``; ``answers``, if the model promises something of them, by `pipeline.scores.answers.kept`;
        ``absent``, classes of the run without an image; ``seen``, how many of the images the run
        was trained or chosen with (``train`` is None where its store is gone or has changed, ``validation`` where its
        predictions are damaged); with a labels file ``labels``, what it did, as `pipeline.labels.overlay.record_of` says;
        ``damaged``, the names of damaged runs that were left out.

    Raises
    ------
    SourceError
        If no image has a label, or labels are not classes of the run.
    TooManyUnreadableError
        If no image could be read.
    """
    asked = PredictOptions(**options)
    chosen, damaged = taken(run, asked, likely=absolute(str(images)))
    if chosen is not None:
        target = target or (chosen.target if takes_target(images) else None)
    over = None
    if labels is not None:
        about = target or (chosen and chosen.target) or LABEL
        over = partial(_under, labels=read_labels(labels), target=about, workers=asked.workers)
    exported = None if chosen is not None else ArtefactModel(open_artefact(run))
    task = CLASSIFICATION if chosen is None else chosen.task
    task = task if exported is None else exported.task
    if not task.one_class:
        source = _one_each(scan(images, target=target, reading=reading, task=task.name), asked.workers)
        made: Model | None = exported if chosen is None else RunModel(chosen, options=asked)
        assert made is not None
        return _of_target(made, chosen, source, split, asked, progress, over) | {"damaged": damaged}
    source, record = _scanned(images, target, reading, chosen), None
    if over is not None:
        source, record = over(source)
    rows = _rows_of(source, split)
    if chosen is None:
        assert exported is not None
        model: Model = exported
        numbers = _labels(source, rows, model.name, model.classes)
    else:
        numbers = _labels(source, rows, chosen.run_id, chosen.classes)  # before the network is loaded
        model = RunModel(chosen, options=asked)
    scored, reasons = _predicted(model, source, rows, numbers, asked.workers, progress)
    seen = None if chosen is None else _seen(chosen, scored)
    _warn_seen(seen or {}, len(scored), source, split)
    return {
        "format": 1,
        "run": model.name,
        "source": source.description,
        "split": split,
        "images": len(rows),
        "evaluated": len(scored),
        "unreadable": reasons,
        "unlabelled": int(np.sum(source.labels < 0)) if split is None else 0,
        "scores": scores_of(scored.probabilities, scored.labels, scored.classes),
        "classes": list(scored.classes),
        "absent": [name for name, n in zip(scored.classes, scored.table.sum(axis=1), strict=True) if not n],
        "confusion": scored.table.tolist(),
        "confused": confused_pairs(scored, SHOWN),
        "per_class": [{**line, "name": name} for line, name in zip(class_table(scored), scored.classes, strict=True)],
        "reliability": reliability(scored),
        "seen": seen,
        **({"answers": model.task.kept(scored.probabilities, scored.labels, model.answers)} if model.answers else {}),
        **({"labels": record} if record else {}),
        "damaged": damaged,
    }


def _of_target(
    model: Model,
    run: Run | None,
    source: ImageSet,
    split: str | None,
    asked: PredictOptions,
    progress: Progress | None,
    over: Callable[[ImageSet], tuple[ImageSet, dict[str, Any]]] | None,
) -> dict[str, Any]:
    """Score a run, or an exported model, of several labels or numbers; ``over`` puts a labels file over the images."""
    assert source.target is not None
    values, record = targets_of_source(source, model.classes, model.name), None
    source = dataclasses.replace(source, target=Target(source.target.name, tuple(model.classes), values))
    if over is not None:
        source, record = over(source)
    assert source.target is not None
    values, chosen = source.target.values, source.strata >= 0
    if split is not None:
        check_choice("split", split, SPLITS[:3])
        chosen &= source.given_splits == SPLITS.index(split)
    rows = np.flatnonzero(chosen)
    if not len(rows):
        raise SourceError(f"{source.description}: has no labelled image{f' in the split {split!r}' if split else ''}")
    scored, reasons = _predicted(model, source, rows, values[rows], asked.workers, progress)
    scores = model.task.evaluate(scored.probabilities, scored.labels, model.classes, model.before)
    seen = {} if run is None else _seen(run, scored)
    _warn_seen(seen, len(scored), source, split)
    return {
        "format": 1,
        "run": model.name,
        "task": model.task.name,
        "source": source.description,
        "split": split,
        "images": len(rows),
        "evaluated": len(scored),
        "unreadable": reasons,
        "unlabelled": int((source.strata < 0).sum()) if split is None else 0,
        "scores": scores,
        "classes": list(model.classes),
        "seen": seen,
        **({"answers": model.task.kept(scored.probabilities, scored.labels, model.answers)} if model.answers else {}),
        **({"labels": record} if record else {}),
    }


def _one_each(source: ImageSet, workers: int | None) -> ImageSet:
    """Make one image of those with the same bytes in several class folders, which are read for that."""

    def digest(row: int) -> bytes:
        try:
            return hashlib.sha256(source.read(row)).digest()
        except UnreadableImageError:
            return b""

    if not source.united:
        return source
    with ThreadPoolExecutor(workers or processors()) as pool:
        return united(source, list(pool.map(digest, range(len(source)))))[0]


def _predicted(
    model: Model, source: ImageSet, rows: np.ndarray, labels: np.ndarray, workers: int | None, progress: Progress | None
) -> tuple[Rows, dict[str, int]]:
    """Predict rows of a source; return those that could be read, and how many could not, by reason."""
    digests: dict[int, bytes] = {}

    def read(row: int) -> bytes:
        data = source.read(row)
        digests[row] = hashlib.sha256(data).digest()
        return data

    items = (Item(source.paths[row], partial(read, row)) for row in rows.tolist())
    found: list[np.ndarray | None] = []
    reasons: Counter[str] = Counter()
    with ThreadPoolExecutor(workers or processors()) as pool:
        for batch in predictions(model, items, pool):
            found += [prediction.probabilities for _, prediction in batch]
            reasons.update(prediction.error for _, prediction in batch if prediction.probabilities is None)
            if progress:
                progress("evaluate", len(found), len(rows))
    kept = [place for place, values in enumerate(found) if values is not None]
    if not kept:
        raise TooManyUnreadableError(f"{source.description}: none of {len(rows)} labelled images could be read")
    scored = Rows(
        tuple(source.paths[row] for row in rows[kept]),
        tuple(digests[row] for row in rows[kept].tolist()),
        labels[kept],
        np.stack([values for values in found if values is not None]),
        model.classes,
    )
    return scored, dict(sorted(reasons.items()))


def _scanned(images: str | Path, target: str | None, reading: Reading | None, run: Run | None) -> ImageSet:
    """Read the folders as asked; else as the run's were read, or plainly if these have another form."""
    if reading is None and run is not None and run.reading.record:
        with contextlib.suppress(ConfigurationError, SourceError):
            return scan(images, target=target, reading=run.reading)
    return scan(images, target=target, reading=reading)


def _under(source: ImageSet, *, labels: Labels, target: str, workers: int | None) -> tuple[ImageSet, dict[str, Any]]:
    """Put a labels file over the labels of the images; return what it did, too."""
    with ThreadPoolExecutor(workers or processors()) as pool:
        found, counts = labelled_images(source, labels, target, pool)
    if not (found.strata >= 0).any():
        raise SourceError(f"{labels.path}: leaves no image of {source.description} a label ({counts})")
    logger.warning("%s: %s", labels.path, "; ".join([str(counts), *labels.remarks]))
    return found, record_of(labels, counts)


def _rows_of(source: ImageSet, split: str | None) -> np.ndarray:
    """The labelled rows of a source, or of one of its own splits."""
    if not source.classes:
        raise SourceError(
            f"{source.description}: no image has a label, so there is nothing to compare with. Put the images of each class "
            "into a folder named after the class, or give a manifest path,label; bottleneck predict needs no labels"
        )
    chosen = source.labels >= 0
    if split is not None:
        check_choice("split", split, SPLITS[:3])
        chosen &= source.given_splits == SPLITS.index(split)
        if not chosen.any():
            own = [name for k, name in enumerate(SPLITS[:3]) if (source.given_splits == k).any()]
            raise SourceError(
                f"{source.description}: has no labelled images in the split {split!r} (its own splits: "
                f"{', '.join(own) or 'none'}); leave --split out, or score the test split that extract made with "
                "bottleneck train-head --test"
            )
    return np.flatnonzero(chosen)


def _labels(source: ImageSet, rows: np.ndarray, model: str, classes: Sequence[str]) -> np.ndarray:
    """Labels of some rows as numbers of the classes of a model, int32, (n,).

    Raises
    ------
    SourceError
        If a label is not one of these classes.
    """
    known = {name: number for number, name in enumerate(classes)}
    names = [source.classes[label] for label in source.labels[rows].tolist()]
    strange = Counter(name for name in names if name not in known)
    if strange:
        named = [
            f"{shortened(printable(name), 40)!r} ({counted(n, 'image')}){nearest(name, classes, cutoff=0.75)}"
            for name, n in strange.most_common(NAMED)
        ]
        more = f" and {len(strange) - NAMED} more" if len(strange) > NAMED else ""
        expected = ", ".join(shortened(printable(name), 40) for name in classes[:NAMED])
        rest = f" and {len(classes) - NAMED} more" if len(classes) > NAMED else ""
        raise SourceError(
            f"{source.description}: {counted(strange.total(), 'image')} of classes that {model} does not know: "
            f"{', '.join(named)}{more}; expected {expected}{rest}. Rename the folders or labels, or leave these "
            "images out"
        )
    return np.array([known[name] for name in names], np.int32)


def _warn_seen(seen: Mapping[str, int | None], count: int, source: ImageSet, split: str | None) -> None:
    """Warn if the run was trained or validated with some of the images."""
    if known := [f"{n} to {'train' if part == 'train' else 'validate'} it" for part, n in seen.items() if n]:
        logger.warning(
            "of these %d images, the run was made with %s; on new images it may be worse. Give images that it has not seen%s",
            count,
            " and ".join(known),
            ", or --split test" if split is None and (source.given_splits == SPLITS.index("test")).any() else "",
        )


def _seen(run: Run, scored: Rows) -> dict[str, int | None]:
    """Count the images, by content, that the run was trained with, and those that it was validated with."""
    features = run.config["features"]
    known: dict[str, set[bytes] | None] = {"train": None, "validation": None}
    try:
        store = as_trained(FeatureStore.open(features["store"]), run.labels)
        if store.data_digest == features["data_digest"]:
            known["train"] = {digest.tobytes() for digest in store.images.sha256[store.rows("train")]}
    except (BottleneckError, OSError) as problem:  # it may have been moved or removed
        logger.debug("%s: %s", features["store"], problem)
    try:
        known["validation"] = {digest.tobytes() for digest in read_predictions(run).sha256}
    except RunError as problem:  # the scores are right all the same
        logger.warning("%s; whether the run was validated with these images is not known", problem)
    return {
        part: None if digests is None else sum(digest in digests for digest in scored.sha256)
        for part, digests in known.items()
    }


def _target_summary(document: dict[str, Any], about: str) -> str:
    """Describe scores of several labels or numbers for a person."""
    scores = document["scores"]
    lines = scores.get("per_class") or scores["per_column"]
    each = [{**line, "name": shortened(printable(line["name"]), 40)} for line in lines[:SHOWN]]
    rest = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    whole = table_text([TASKS[document["task"]].columns(scores)], "  ")
    return "\n".join([about, whole, table_text(each, "  "), *rest, *_target_promises(document)])


def _target_promises(document: dict[str, Any]) -> list[str]:
    """Say how far promises on labels or numbers are kept on these images."""
    answers = document.get("answers", {})
    lines = _answered(answers.get("abstain"), document["evaluated"], "with labels that are sure, all right in")
    if sets := answers.get("sets"):
        low, high = sets["interval"]
        lines.append(
            f"sets: {sets['coverage']:.4f} hold all labels ({low:.4f} to {high:.4f}; {sets['asked']:.4g} was asked for), of "
            f"{sets['mean_size']:.2f} labels on average"
        )
    for name, one in zip(document["classes"], answers.get("intervals", {}).get("numbers", ()), strict=False):
        if one["n"]:
            low, high = one["interval"]
            lines.append(
                f"intervals: {one['coverage']:.4f} hold the true {shortened(printable(name), 40)} ({low:.4f} to {high:.4f}; "
                f"{answers['intervals']['asked']:.4g} was asked for)"
            )
    return [f"  {line}" for line in lines]


def summary(document: dict[str, Any]) -> str:
    """Describe the result for a person."""
    aside = ", ".join(f"{count} {reason}" for reason, count in document["unreadable"].items())
    parts = [f"{counted(document['evaluated'], 'image')} by {document['run']}"]
    parts += [f"set aside: {aside}"] if aside else []
    parts += [f"{document['unlabelled']} without a label"] if document["unlabelled"] else []
    where = f"{document['source']}{', ' + document['split'] if document['split'] else ''}"
    scores = document["scores"]
    if "task" in document:
        return _target_summary(document, f"{where}: {'; '.join(parts)}")
    shares = [
        {
            "class": shortened(printable(line["name"]), 40),
            **{key: line[key] for key in ("n", "precision", "recall", "f1")},
        }
        for line in document["per_class"][:SHOWN]
    ]
    rest = len(document["per_class"]) - SHOWN
    bins = [
        {"confidence": f"{line['low']:.2f} to {line['high']:.2f}", "images": line["n"], "mean": line["confidence"]}
        | {"accuracy": line["accuracy"]}
        for line in document["reliability"]
    ]
    lines = [
        f"{where}: {'; '.join(parts)}",
        table_text([{**score_columns(scores), "balanced": scores["balanced_accuracy"], "ece": scores["ece"]}], "  "),
        table_text(shares, "  "),
        *([f"  and {rest} more classes"] if rest > 0 else []),
        *_mistakes(document),
        "  calibration: the mean confidence of a bin should be its accuracy",
        table_text(bins, "  "),
        *_promises(document),
    ]
    return "\n".join(lines)


def _promises(document: dict[str, Any]) -> list[str]:
    """Say how far the promises of the model are kept on these images."""
    if "answers" not in document:
        return []
    abstain, sets = document["answers"]["abstain"], document["answers"]["sets"]
    lines = _answered(abstain, document["evaluated"], "right in")
    low, high = sets["interval"]
    lines.append(
        f"sets: {sets['coverage']:.4f} hold the true class ({low:.4f} to {high:.4f}; {sets['asked']:.4g} was asked for), of "
        f"{sets['mean_size']:.2f} classes on average, {sets['empty']} empty"
    )
    return [f"  {line}" for line in lines]


def _answered(abstain: Mapping[str, Any] | None, evaluated: int, right: str) -> list[str]:
    """Say how many images are answered, and how often these answers are right; nothing where no precision was asked for."""
    if not abstain:
        return []
    if not abstain["answered"]:
        return [f"answered: none of {evaluated} images, as none is sure enough"]
    low, high = abstain["interval"]
    return [
        f"answered: {abstain['answered']} of {evaluated} images ({abstain['coverage']:.4f}), {right} "
        f"{abstain['precision']:.4f} of them ({low:.4f} to {high:.4f}; at least {abstain['asked']:.4g} was asked for)"
    ]


def _mistakes(document: dict[str, Any]) -> Sequence[str]:
    """The confusion matrix as lines of text, or the pairs of classes that are most often confused."""
    names = [shortened(printable(name), 12) for name in document["classes"]]
    if len(names) <= MATRIX and len(set(names)) == len(names):
        rows = [
            {"true class": name, **dict(zip(names, counts, strict=True))}
            for name, counts in zip(names, document["confusion"], strict=True)
        ]
        return ["  confusion: columns are predicted classes", table_text(rows, "  ")]
    pairs = [
        {
            "true class": shortened(pair["label"], 40),
            "taken for": shortened(pair["predicted"], 40),
            "images": pair["count"],
        }
        for pair in document["confused"]
    ]
    return ["  most often confused", table_text(pairs, "  ")] if pairs else []
