"""Stage three, fine-tuning: train the last block of the network together with the trained head.

run + images, or a store of cut features -> split network -> parity gate -> train -> run folder -> parity again
"""

from __future__ import annotations

import functools
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from features.canonical import digest_of
from features.errors import ConfigurationError, ParityError, RunError, check_range
from features.files import locked, printable, seems_locked, writable_folder
from features.machine import processors
from features.networks.backend import load_keras
from features.networks.engines import choose_device
from features.pixels.decode import decode_image
from features.progress import Progress
from features.recipe import PixelRule
from features.sources.imageset import ImageSet
from features.sources.scan import scan, takes_target
from features.sources.splits import SplitRule
from features.store.reader import FeatureStore
from pipeline.config import parse
from pipeline.heads.kinds import can_finetune, head_of, layered
from pipeline.labels.file import LABEL, Labels, read_labels
from pipeline.labels.overlay import with_labels
from pipeline.runs.board import ranked, take_run
from pipeline.runs.datasets import absolute, source_of
from pipeline.runs.folder import Predictions, Run, find_runs, is_finished, is_run_folder
from pipeline.runs.writing import Outcome, write_run
from pipeline.tables import table_text
from pipeline.tasks.table import CLASSIFICATION, task_named
from pipeline.tasks.task import Task
from pipeline.tuning.cached import CachedCut, CachedFeatures, data_of, open_cut, unlike
from pipeline.tuning.checkpoints import Checkpoint, checkpoint_path
from pipeline.tuning.endtoend import check_float32, network_of, split_for_training, trunk_function, untrained_head
from pipeline.tuning.inputs import Data, ImagePass, Inputs, KeptFeatures, LiveViews, on_device, read_data
from pipeline.tuning.parity import Gate, Job
from pipeline.tuning.settings import TuningSettings, settings_of
from pipeline.tuning.training import Tail, train

logger = logging.getLogger(__name__)


def finetune(
    run: str | Path,
    images: str | Path | None = None,
    *,
    from_cache: str | Path | None = None,
    weights: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    data_set: str | None = None,
    labels: str | Path | None = None,
    runs: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fine-tune network and head of a run, whose head is a Keras head or a linear one of scikit-learn.

    If it is killed or interrupted, the same call resumes after the last finished epoch.

    Parameters
    ----------
    run : str or Path
        Run folder, or a folder of runs, of which `pipeline.runs.board.take_run` takes one that can be fine-tuned.
    images : str or Path, optional
        The images that the features were made of. With ``from_cache`` they are optional, and only used to prove parity
        from pixels.
    from_cache : str or Path, optional
        A store of the features just before the first trained layer (``extract --layer boundary``), which replaces the
        images and the layers before it. If it has several views, each epoch reads one per image.
    weights : str, optional
        Where the network's weights are now, if they have moved since the extraction.
    workers : int, optional
        Threads that read and decode images, 1-1024; by default one per processor.
    device : {"auto", "cpu", "gpu"}
        Where the network runs.
    data_set : str, optional
        Data set whose run is taken from a folder of runs; default: that of the images or the store, if there are several.
    labels : Path, optional
        Labels file that is put over the labels of the images or the store; needed if the run was trained under one.
    runs : Path, optional
        Folder for the new run; by default the folder that holds the given run.
    tensorboard : Path, optional
        Folder for TensorBoard's event files.
    progress : callable, optional
        Called with ``(stage, done, total)``.
    **settings
        Fields of `pipeline.tuning.settings.TuningSettings`: ``unfreeze``, ``bn``, ``epochs``, ``augment``, ...

    Returns
    -------
    dict
        ``run``, ``before`` and ``after`` (validation scores), ``best_head`` (run id and validation scores of the best head
        on the same data; None if there is none), ``parity_gap`` (largest difference in probability before the first
        step; None with new weights), ``minutes``, ``trainable_variables``, ``resumed``, ``damaged`` (names of damaged
        runs that were left out), ...

    Raises
    ------
    ConfigurationError
        If settings are unknown or contradict each other, or a folder holds runs of several data sets.
    ParityError
        If network and head together do not give the probabilities of the cached head; nothing is trained.
    RunError
        If the run cannot be fine-tuned on these images or features.
    HeadError
        If its head is neither linear nor a Keras model.
    """
    chosen = settings_of(settings)
    check_range("workers", 1 if workers is None else workers, 1, 1024)
    _check_sources(images, from_cache, chosen)
    started = time.monotonic()
    decisions = None if labels is None else read_labels(labels)
    likely = absolute(str(images)) if images is not None else _digest_of(str(from_cache), decisions)
    start, damaged = take_run(run, data_set=data_set, likely=likely, accept=can_finetune, fitting=layered)
    _check_task(start, chosen)
    _check_labels(start, decisions)
    runs = Path(runs) if runs is not None else start.folder.parent
    writable_folder(runs)
    source = None
    if images is not None:
        named = start.target if takes_target(images) else None
        source = scan(images, target=named, reading=start.reading, task=start.task.name)
    if source is not None and decisions is None:
        _check_classes(start, source.description, source.classes if source.target is None else source.target.columns)
    log = _logger_of(tensorboard)
    load_keras().utils.set_random_seed(chosen.seed)
    if chosen.mixed_precision and choose_device(device) != "gpu":
        raise ConfigurationError("mixed_precision: faster only on a GPU, Keras finds none; leave --mixed-precision out")
    job = prepare(start, chosen, from_cache, weights, decisions)
    with ThreadPoolExecutor(workers or processors()) as pool:
        data = read_rows(job, source, pool, decisions)
        if decisions is not None:
            _check_classes(start, f"{data.description} under {decisions.path}", data.classes)
        identity = f"finetune-{job.head.name}-{digest_of([job.decided, start.recipe.fingerprint, data.digest])[:10]}"
        decided = {**job.decided, "fingerprint": start.recipe.fingerprint, "data": data.digest}
        checkpoint = Checkpoint(checkpoint_path(runs, identity), decided)
        if is_finished(runs / identity):
            if checkpoint.path.exists() or seems_locked(
                runs / identity
            ):  # left by a process that was killed at its end
                with locked(runs / identity, seconds=10):
                    checkpoint.remove()
            log(runs / identity)
            return _report(Run.open(runs / identity), damaged, cached=True)
        with locked(runs / identity):
            _sweep(runs, identity, checkpoint)
            trunk = trunk_function(job.split, job.network, start.recipe, batch_size=chosen.batch_size, device=device)
            rule = start.recipe.pixels
            passing = None if source is None else ImagePass(source, trunk, rule, pool, chosen.batch_size)
            inputs = make_inputs(job, data, passing, folder=runs, device=device, progress=progress)
            tail = Tail(job.split, job.head.temperature, chosen, start.task)
            gate = Gate(job, data, inputs, tail)
            pixels = None if source is None else _pixels(source, data, gate.rows, rule, pool)
            gap = None if chosen.scratch or chosen.new_head else gate.before()
            if gap is not None and pixels is not None and job.cached is not None:
                gate.before_from_pixels(pixels, trunk)
            statistics = job.split.statistics()
            about: dict[str, Any] = {"task": start.task, "classes": start.classes, "checkpoint": checkpoint}
            outcome = train(tail, inputs, data, chosen, **about, progress=progress)
            if chosen.bn != "train" and not all(map(np.array_equal, statistics, job.split.statistics())):
                raise ParityError("the stored BatchNorm statistics changed, which must never happen; nothing is kept")
            validation = inputs.readable(data.rows("validation"))
            predicted = _predictions(data, validation, tail.probabilities(inputs, validation))
            folder = write_run(
                runs,
                identity,
                Outcome(job.head, outcome.history, outcome.after, predicted, time.monotonic() - started),
                features=_features(job, data, source),
                start=start,
                backbone=job.split.trained_backbone(),
                settings={**job.noted(), "parity_gap": gap, "before": outcome.before},
                prove=lambda written: gate.after(Run.open(written), pixels, device),
            )
            checkpoint.remove()
    log(folder)
    return _report(Run.open(folder), damaged, cached=False, resumed=outcome.resumed)


def _rival(document: dict[str, Any]) -> dict[str, Any]:
    """The scores that fine-tuning has to beat: those of the best head, or of the head alone."""
    before, best, task = document["before"], document["best_head"], _task_of(document)
    return dict(best if best is not None and _higher(task, best, before) else before)


def _task_of(document: dict[str, Any]) -> Task:
    return task_named(document.get("task", CLASSIFICATION.name))


def _higher(task: Task, scores: dict[str, Any], than: dict[str, Any]) -> bool:
    return task.value(scores, task.choices[0]) > task.value(than, task.choices[0])


def advised(document: dict[str, Any]) -> Path:
    """The run to predict with: the fine-tuned one, or the head beside it that it is no better than."""
    tuned, rival = Path(document["run"]), _rival(document)
    head = tuned.parent / rival.get("run", document["start"])
    return tuned if _higher(_task_of(document), document["after"], rival) or not is_run_folder(head) else head


def summary(document: dict[str, Any]) -> str:
    """Summarise the result for a person: was it worth the minutes?"""
    before, after, rival, task = document["before"], document["after"], _rival(document), _task_of(document)
    name = f"the best head, {rival['run']}" if "run" in rival else "the head alone"
    if document["parity_gap"] is None:
        verdict, proof = "started from new weights", "no parity to prove"
    else:
        proof = f"parity gap before the first step {document['parity_gap']:.1e}"
        if task.value(after, task.choices[0]) > (task.interval(rival) or [0, np.inf])[1]:
            verdict = f"worth it: the {task.score} is above the confidence interval of {name}"
        elif _higher(task, after, rival):
            verdict = f"perhaps by chance: the {task.score} is within the confidence interval of {name}"
        else:
            verdict = f"not worth it: {task.no_gain} {name}"
    compared = {"before": before, **({"best head": rival} if "run" in rival else {}), "after": after}
    scores = [{"": title, **task.columns(values)} for title, values in compared.items()]
    lines = [
        f"{document['run']}: {'already fine-tuned' if document['cached'] else 'fine-tuned'}, in {document['minutes']:.1f} minutes",
        f"  {document['trainable_variables']} variables with {document['trainable_parameters']:,} parameters trained after "
        f"{document['cut']}; {proof}",
        table_text(scores, "  "),
        f"  {verdict} ({task.gained(after, rival)})",
    ]
    if document["resumed"] is not None:
        lines.insert(1, f"  resumed after epoch {document['resumed']}, where it had been interrupted")
    return "\n".join(lines)


def best_head(run: Run) -> dict[str, Any] | None:
    """Run id and validation scores of the best head beside a fine-tuned run, on the same images, labels and splits."""
    beside = [
        other
        for other in find_runs(run.folder.parent, warn=False).runs
        if other.config["stage"] == "head" and other.data_digest == run.data_digest
    ]
    return (
        {"run": beside[0].run_id, **beside[0].metrics["validation"]}
        if (beside := ranked(beside, folds=False))
        else None
    )


def _report(run: Run, damaged: list[str], *, cached: bool, resumed: int | None = None) -> dict[str, Any]:
    settings = run.config["finetune"] or {}
    kept = ("start", "cut", "trainable_variables", "trainable_parameters", "parity_gap", "before")
    if missing := [name for name in kept if name not in settings]:
        raise RunError(
            f"{run.folder / 'config.yaml'}: finetune lacks {', '.join(missing)}; remove the run, and train it again"
        )
    where = f"{run.folder / 'config.yaml'}: finetune.before"
    before = parse(run.task.scores_model, settings["before"], where, error=RunError).model_dump(mode="json")
    return {
        "format": 1,
        "run": str(run.folder),
        **({} if run.task is CLASSIFICATION else {"task": run.task.name}),
        "cached": cached,
        "resumed": resumed,
        **{name: settings[name] for name in kept},
        "before": before,
        "after": run.metrics["validation"],
        "best_head": best_head(run),
        "minutes": (run.environment.get("fit_seconds") or 0) / 60,
        "damaged": damaged,
    }


def _check_sources(images: str | Path | None, cache: str | Path | None, settings: TuningSettings) -> None:
    if images is None and cache is None:
        raise ConfigurationError(
            "nothing to train on: give --images, or --from-cache with a store made by extract --layer boundary"
        )
    if cache is not None and settings.augmentation is not None:
        raise ConfigurationError(
            "augment: the views of a store were drawn when it was made (extract --layer boundary --views K --augment "
            "PRESET), and each epoch reads one of them; leave --augment out"
        )
    if cache is not None and settings.scratch:
        raise ConfigurationError("scratch: every layer is trained, from pixels; leave --from-cache out, give --images")


def _logger_of(folder: str | Path | None) -> Callable[[Path], object]:
    """Return a function that logs a run's history for TensorBoard; without a folder it does nothing. Fails early."""
    if folder is None:
        return lambda run_folder: None
    from pipeline.runs.tensorboard import log_run, require_tensorboard

    require_tensorboard()
    return functools.partial(log_run, Path(folder))


def _digest_of(store: str, labels: Labels | None) -> str:
    opened = FeatureStore.open(store)
    return opened.data_digest if labels is None else with_labels(opened, labels).data_digest


def _check_task(run: Run, settings: TuningSettings) -> None:
    if settings.class_weight is not None and "class_weight" in run.task.refused:
        raise ConfigurationError(
            f"class_weight: received {settings.class_weight!r}, which does not fit --task {run.task.name}; leave it out"
        )


def _check_labels(run: Run, labels: Labels | None) -> None:
    """Refuse to go on silently with labels that the head of the run has not seen."""
    if labels is None and run.labels:
        raise RunError(
            f"{run.folder}: its head was trained under the labels file {run.labels['path']}; give it with --labels, or name "
            "a run that was trained without one"
        )
    if labels is not None and labels.remarks:
        logger.warning("%s: %s", labels.path, "; ".join(labels.remarks))


def _check_classes(run: Run, description: str, classes: Sequence[str]) -> None:
    if tuple(classes) == run.classes:
        return
    raise RunError(
        f"{description}: its classes are not those of {run.run_id} ({unlike(run.classes, classes)}). Give the images that its "
        f"features were made of, {run.config['features']['source']}, and the labels file under which it was trained, if any"
    )


def prepare(
    start: Run, settings: TuningSettings, cache: str | Path | None, weights: str | None, labels: Labels | None = None
) -> Job:
    """Join network and head, and cut the result where the inputs come in."""
    check_float32(start.recipe)
    network, head = network_of(start, weights), head_of(start).as_dense()
    head = untrained_head(head) if settings.scratch or settings.new_head else head
    cached: list[CachedCut] = []

    def cut_of(cuts: list[str]) -> str:
        if cache is None:
            return cuts[-1]
        cached.append(open_cut(cache, start, cuts, labels))
        return cached[0].recipe.layer

    split = split_for_training(
        network,
        start.recipe.plain,
        head,
        unfreeze=settings.unfreeze,
        bn=settings.bn,
        scratch=settings.scratch,
        cut_of=cut_of,
    )
    return Job(start, settings, network, head, split, cached[0] if cached else None)


def read_rows(job: Job, source: ImageSet | None, pool: Executor, labels: Labels | None = None) -> Data:
    """Read the rows to train on from the store, or else from the images."""
    if job.cached is not None:
        return data_of(job.cached.store)
    assert source is not None
    return read_data(source, SplitRule.parse(job.start.split_rule), pool, labels, job.start.target or LABEL)


def make_inputs(
    job: Job, data: Data, source: ImagePass | None, *, folder: Path, device: str, progress: Progress | None
) -> Inputs:
    """Choose the source of cut features: a store, the images once, or views of the images in each epoch."""
    settings = job.settings
    spec, plain = settings.augmentation, data.rows("validation")
    if spec is None:
        plain = np.concatenate([data.rows("train"), plain])
    kept: Inputs
    if job.cached is not None:
        kept = CachedFeatures(job.cached, batch_size=settings.batch_size, seed=settings.seed)
        same = job.cached.store.views(job.cached.name) == 1
    else:
        assert source is not None
        kept, same = KeptFeatures(source, plain, folder, progress), True
    if same and choose_device(device) == "gpu":
        kept = on_device(kept, plain, settings.batch_size)
    if spec is None:
        return kept
    assert source is not None
    return LiveViews(source, data, spec, settings.seed, kept)


def _sweep(runs: Path, identity: str, checkpoint: Checkpoint) -> None:
    """Remove what a killed process left, except its checkpoint, and warn about checkpoints with other settings."""
    for leftover in runs.glob(f".{identity}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for other in checkpoint.others():
        logger.warning(
            "an interrupted training with other settings is not resumed: %s. Remove it if you do not need it", other
        )


def _predictions(data: Data, rows: np.ndarray, probabilities: np.ndarray) -> Predictions:
    return Predictions([data.paths[row] for row in rows], data.sha256[rows], data.labels[rows], probabilities)


def _features(job: Job, data: Data, source: ImageSet | None) -> dict[str, Any]:
    """Describe the new run's features: those of the run that it started from, on the current data."""
    about = {**job.start.config["features"], "data_digest": data.digest}
    about.pop("limit", None)
    about.pop("labels", None)
    if data.labelled_by:
        about["labels"] = dict(data.labelled_by)
    if job.cached and "limit" in job.cached.store.provenance:
        about["limit"] = job.cached.store.provenance["limit"]
    return about if source is None else {**about, "source": source_of(source.description, str(source.root))}


def _pixels(source: ImageSet, data: Data, rows: np.ndarray, rule: PixelRule, pool: Executor) -> np.ndarray:
    """Decode the images of some rows, found in the source by path and checked by content: uint8, (n, h, w, 3).

    Raises
    ------
    RunError
        If an image is missing or has changed.
    """
    places = {path: number for number, path in enumerate(source.paths)}
    fix = "give the original images; with --from-cache they may be left out"

    def load(row: int) -> np.ndarray:
        path = data.paths[row]
        if path not in places:
            raise RunError(f"{source.description}: {printable(path)} is missing, although it has features; {fix}")
        content = source.read(places[path])
        if hashlib.sha256(content).digest() != data.sha256[row].tobytes():
            raise RunError(f"{source.description}: {printable(path)} changed after its features were made; {fix}")
        return decode_image(content, rule).pixels

    return np.stack(list(pool.map(load, rows.tolist())))
