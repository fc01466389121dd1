"""Networks with their heads from Python: fine-tune, predict, evaluate, export.

run, images, options --> pipeline.stages.finetune | predict | evaluate | export --> Result
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from features.machine import hosts_allowed, take_device
from features.progress import Progress
from features.shown import showing
from pipeline.api.places import Place, RunPlace, image_files
from pipeline.api.results import Evaluation, Exported, FineTuned, Predictions

if TYPE_CHECKING:
    from features.sources.reading import Reading


def finetune(
    run: RunPlace,
    images: Place | None = None,
    *,
    from_cache: Place | None = None,
    unfreeze: str | int = "last-block",
    bn: Literal["frozen", "affine", "train"] = "frozen",
    scratch: bool = False,
    new_head: bool = False,
    epochs: int = 5,
    initial_epoch: int = 0,
    patience: int = 2,
    learning_rate: float = 1e-5,
    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam",
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    schedule: Literal["constant", "cosine"] = "constant",
    warmup_epochs: float = 0.0,
    class_weight: Literal["balanced"] | None = None,
    augment: str | dict[str, Any] = "none",
    mixed_precision: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    weights: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    data_set: str | None = None,
    labels: Place | None = None,
    runs: Place | None = None,
    tensorboard: Place | None = None,
    track: str | None = None,
    allow_host: str = "",
    progress: bool | Progress = True,
) -> FineTuned:
    """Fine-tune the last block of the network with the head of a run. After an interruption the same call resumes.

    Parameters
    ----------
    run : path
        Run folder, or a folder of runs: of those that can be fine-tuned the chosen one is taken.
    images : optional
        The images that the features were made of.
    from_cache : path, optional
        Store of the features before the trained layers; then no images are needed.
    unfreeze, bn, scratch, new_head, epochs, initial_epoch, patience, learning_rate, optimizer, momentum, nesterov, weight_decay, \
schedule, warmup_epochs, class_weight, augment, mixed_precision, batch_size, seed
        See `pipeline.tuning.settings.TuningSettings`.
    weights : str, optional
        Where the weights or the model file of the extraction are now, if they have moved.
    workers, device, data_set, labels, runs, tensorboard, track
        As for the command.
    allow_host : str
        Hosts inside a private network that addresses of images may reach, with commas.
    progress : bool or callable
        See `features.shown.showing`.

    Raises
    ------
    ConfigurationError, ParityError, RunError, HeadError
        As `pipeline.stages.finetune.finetune`.

    Examples
    --------
    >>> from pipeline import finetune, train_head
    >>> start = train_head("features.h5", "dropout-linear", params={"epochs": 2})
    >>> tuned = finetune(start.run, "photos", unfreeze="head", epochs=1)
    >>> tuned.after["n"], tuned.cached
    (12, False)
    """
    given = locals()
    from pipeline.runs.tracking import tracker
    from pipeline.stages import finetune as stage
    from pipeline.tuning.settings import TuningSettings

    settings = {name: given[name] for name in TuningSettings.model_fields}
    send = None if track is None else tracker(track)
    with showing(progress) as told, hosts_allowed(allow_host):
        document = stage.finetune(
            os.fspath(run), images, from_cache=from_cache, weights=weights, workers=workers, device=take_device(device),
            data_set=data_set, labels=labels, runs=runs, tensorboard=tensorboard, progress=told, **settings,
        )  # fmt: skip
    if send is not None:
        send(Path(document["run"]))
    return FineTuned(document, stage.summary)


def predict(
    run: RunPlace,
    images: Place | Iterable[str | os.PathLike[str]],
    *,
    out: Place | TextIO | None = None,
    format: Literal["csv", "jsonl"] | None = None,
    top: int | None = None,
    views: int = 1,
    augment: str | None = None,
    grid: Place | None = None,
    weights: str | None = None,
    quantised: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    data_set: str | None = None,
    trust: bool = False,
    allow_host: str = "",
    progress: bool | Progress = True,
) -> Predictions:
    """Predict the classes of images. Without ``out`` the lines are kept in memory, as ``predictions``.

    Parameters
    ----------
    run : path
        Run, folder of runs (the chosen one is taken), or exported model.
    images : path or iterable of paths
        Image source; or image files, which are read as they arrive.
    out : path or text stream, optional
        File to write, or an open stream, for any number of images: lines are written while later images are read.
    format, top, views, augment, grid, weights, quantised, batch_size, workers, device, data_set, trust
        See `pipeline.predicting.options.PredictOptions`.
    allow_host : str
        Hosts inside a private network that addresses of images may reach, with commas.
    progress : bool or callable
        See `features.shown.showing`.

    Raises
    ------
    ConfigurationError, SourceError, RunError, TooManyUnreadableError
        As `pipeline.stages.predict.predict`.

    Examples
    --------
    >>> from pipeline import predict
    >>> found = predict("runs", "photos")
    >>> found.predicted, sorted(found.predictions[0])[:2]
    (40, ['class', 'error'])
    """
    from pipeline.stages import predict as stage

    source = images if isinstance(images, str | Path) else image_files(images)
    kept = io.StringIO() if out is None else None
    file, stream = (out, None) if isinstance(out, str | Path) else (None, out)
    with showing(progress) as told, hosts_allowed(allow_host):
        document = stage.predict(
            os.fspath(run), source, out=file, stream=stream or kept, progress=told,
            format=format if kept is None else "jsonl", top=top, views=views, augment=augment, grid=grid,
            weights=weights, quantised=quantised, batch_size=batch_size, workers=workers, device=take_device(device),
            data_set=data_set, trust=trust,
        )  # fmt: skip
    if kept is not None:
        document["predictions"] = [json.loads(line) for line in kept.getvalue().splitlines()]
    place = "in memory" if kept is not None else "a stream"
    return Predictions(document, lambda document: stage.summary(document | {"out": document["out"] or place}))


def evaluate(
    run: RunPlace,
    images: Place,
    *,
    split: Literal["train", "validation", "test"] | None = None,
    target: str | None = None,
    reading: Reading | None = None,
    labels: Place | None = None,
    weights: str | None = None,
    quantised: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    data_set: str | None = None,
    trust: bool = False,
    allow_host: str = "",
    progress: bool | Progress = True,
) -> Evaluation:
    """Score a run on labelled images: accuracy with its interval, confusion, each class, calibration.

    Parameters
    ----------
    run : path
        Run, folder of runs (the chosen one is taken), or exported model.
    images : path
        Labelled images: folder of class folders, archive, manifest.
    split : {"train", "validation", "test"}, optional
        Only the images that lie in this split of the source.
    target : str, optional
        Label column of a manifest; default: that of the run.
    reading : features.sources.reading.Reading, optional
        How classes and splits are read from folders; default: as for the features of the run.
    labels : path, optional
        Labels file that is put over the labels of the images.
    weights, quantised, batch_size, workers, device, data_set, trust
        See `pipeline.predicting.options.PredictOptions`.
    allow_host : str
        Hosts inside a private network that addresses of images may reach, with commas.
    progress : bool or callable
        See `features.shown.showing`.

    Raises
    ------
    SourceError, TooManyUnreadableError
        As `pipeline.stages.evaluate.evaluate`.

    Examples
    --------
    >>> from pipeline import evaluate
    >>> scored = evaluate("runs", "photos")
    >>> scored.evaluated, scored.classes, sum(map(sum, scored.confusion))
    (40, ['cat', 'dog'], 40)
    """
    from pipeline.stages import evaluate as stage

    with showing(progress) as told, hosts_allowed(allow_host):
        document = stage.evaluate(
            os.fspath(run), images, split=split, target=target, reading=reading, labels=labels, weights=weights,
            quantised=quantised, batch_size=batch_size, workers=workers, device=take_device(device),
            data_set=data_set, trust=trust, progress=told,
        )  # fmt: skip
    return Evaluation(document, stage.summary)


def export(
    run: RunPlace,
    out: Place,
    *,
    format: Literal["keras", "saved_model", "onnx", "litert", "openvino"] = "keras",
    images: Place | None = None,
    weights: str | None = None,
    quantised: str | None = None,
    data_set: str | None = None,
    allow_host: str = "",
    progress: bool | Progress = True,
) -> Exported:
    """Export one model from pixels of any size to probabilities. It is run and compared; one that differs is not kept.

    Parameters
    ----------
    run : path
        Run, or folder of runs (the chosen one is taken).
    out : path
        File to write, or for ``saved_model`` and ``openvino`` a folder. It must not exist.
    format : {"keras", "saved_model", "onnx", "litert", "openvino"}
        Format of the model.
    images : path, optional
        Images to compare model and run on. Default: generated ones.
    weights, quantised, data_set
        See `pipeline.predicting.options.PredictOptions`.
    allow_host : str
        Hosts inside a private network that addresses of images may reach, with commas.
    progress : bool or callable
        See `features.shown.showing`.

    Raises
    ------
    ConfigurationError, HeadError, RunError, ParityError
        As `pipeline.stages.export.export`.

    Examples
    --------
    >>> from pipeline import export
    >>> exported = export("runs", "model.keras")
    >>> exported.artefact, exported.parity_gap <= exported.tolerance
    ('keras', True)
    """
    from pipeline.stages import export as stage

    with showing(progress) as told, hosts_allowed(allow_host):
        document = stage.export(
            os.fspath(run), format=format, out=out, images=images, weights=weights, quantised=quantised, data_set=data_set,
            progress=told,
        )  # fmt: skip
    return Exported(document, stage.summary)
