"""Stage three: train the last block together with the head, from where the head already is.

run + images -> split network -> trunk features -> parity gate -> train the tail -> run folder -> parity again
"""

from __future__ import annotations

import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from features.backend import load_keras
from features.errors import ConfigurationError, ParityError, RunError, check_range
from features.files import writable_folder
from features.machine import processors
from features.recipe import digest_of
from features.sources import ImageSet, is_manifest, scan
from features.splits import SplitRule
from pipeline.endtoend import (
    LAST_BLOCK,
    cached_predictions,
    check_parity,
    decoded_batches,
    network_of,
    split_for_training,
    trunk_engine,
)
from pipeline.runs import Predictions, Run, is_finished, newest_run, write_run
from pipeline.training import CutFeatures, Data, Progress, Tail, read_data, train

PARITY_IMAGES = 64


def finetune(
    run: str | Path,
    images: str | Path,
    *,
    unfreeze: str = LAST_BLOCK,
    bn: str = "frozen",
    weights: str | None = None,
    epochs: int = 5,
    patience: int = 2,
    learning_rate: float = 1e-5,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "auto",
    runs: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune from a run of a Keras head.

    Parameters
    ----------
    run : str or Path
        Run folder, or a folder of runs, of which the newest one with a Keras head is taken.
    images : str or Path
        The images that the features were made of.
    unfreeze, bn : str
        See ``pipeline.endtoend.split_for_training``.
    weights : str, optional
        Where the backbone's weights are now, if not where the extraction found them.
    epochs, patience : int
        Most epochs; epochs without a lower validation log loss before stopping.
    learning_rate : float
        Of Adam, above 0, at most 1.
    batch_size, workers, device, seed
        As everywhere.
    runs : Path, optional
        Folder of the new run; that of the given one without it.
    progress : callable, optional
        Called with ``(stage, done, total)``.

    Returns
    -------
    dict
        ``run``, ``before`` and ``after`` (validation scores), ``parity_gap`` (largest difference in probability
        before the first step), ``minutes``, ``trainable_variables``, ...

    Raises
    ------
    ParityError
        If backbone and head together do not give the probabilities of the cached head; nothing is trained.
    RunError
        If the run cannot be fine-tuned on these images.
    """
    if not 0 < learning_rate <= 1 or min(epochs, patience) < 1:
        raise ConfigurationError(
            f"finetune: received learning rate {learning_rate}, epochs {epochs}, patience {patience}; "
            "expected a rate above 0 and at most 1, and at least 1 of the others"
        )
    check_range("batch size", batch_size, 1, 4096)
    check_range("workers", 1 if workers is None else workers, 1, 1024)
    check_range("seed", seed, 0, 2**32 - 1)
    started = time.monotonic()
    start = newest_run(run, finetunable=True)
    runs = Path(runs) if runs is not None else start.folder.parent
    writable_folder(runs)
    settings = {
        "unfreeze": unfreeze,
        "bn": bn,
        "epochs": epochs,
        "patience": patience,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "start": start.run_id,
    }
    source = scan(images, target=start.target if is_manifest(images) else None)
    _check_classes(start, source)
    load_keras().utils.set_random_seed(seed)
    network, head = network_of(start, weights), start.load_head().as_dense()
    split = split_for_training(network, start.recipe, head, unfreeze=unfreeze, bn=bn)
    with ThreadPoolExecutor(workers or processors()) as pool:
        data = read_data(source, SplitRule.parse(start.split_rule), pool)
        identity = f"finetune-{head.name}-{digest_of([settings, start.recipe.fingerprint, data.digest])[:10]}"
        if is_finished(runs / identity):
            return _report(Run.open(runs / identity), cached=True)
        trunk = trunk_engine(split, network, start.recipe, batch_size=batch_size, device=device)
        cut = CutFeatures(data, trunk, start.recipe.pixels, pool, batch_size=batch_size, folder=runs, progress=progress)
        tail = Tail(split, head.temperature, learning_rate, batch_size)
        hashes, expected = cached_predictions(start, PARITY_IMAGES)
        rows = _rows_of(hashes, data, start)
        paths, dtype = [source.paths[row] for row in rows], start.recipe.dtype
        gap = check_parity(tail.probabilities(cut, rows), expected, paths, "before fine-tuning", dtype)
        statistics = split.statistics()
        history, before, after = train(
            tail, cut, data, classes=start.classes, epochs=epochs, patience=patience, seed=seed, progress=progress
        )
        if not all(map(np.array_equal, statistics, split.statistics())):
            raise ParityError("BatchNorm statistics moved during fine-tuning, which must never happen; nothing is kept")
        validation = cut.readable(data.rows("validation"))
        folder = write_run(
            runs,
            identity,
            head=head,
            history=history,
            scores=after,
            predictions=Predictions(
                [source.paths[row] for row in validation],
                data.sha256[validation],
                data.labels[validation],
                tail.probabilities(cut, validation),
            ),
            seconds=time.monotonic() - started,
            features={**start.config["features"], "data_digest": data.digest, "source": source.description},
            start=start,
            backbone=split.trained_backbone(),
            settings={
                **settings,
                "cut": split.cut,
                "trainable_variables": len(split.tail.trainable_variables),
                "trainable_parameters": sum(int(np.prod(item.shape)) for item in split.tail.trainable_variables),
                "parity_gap": gap,
                "before": before,
            },
        )
        finished = Run.open(folder)
        again = _from_pixels(finished, source, rows, pool, batch_size, device)
        check_parity(again, tail.probabilities(cut, rows), paths, f"{folder}, loaded again after fine-tuning", dtype)
    return _report(finished, cached=False)


def summary(document: dict[str, Any]) -> str:
    """The result for a person: was it worth the minutes?"""
    before, after = document["before"], document["after"]
    gained = (after["accuracy"] - before["accuracy"]) * after["n"]
    low, high = before["accuracy_interval"]
    if after["accuracy"] > high:
        verdict = "worth it: above the interval of the head alone"
    elif gained > 0:
        verdict = "within the interval of the head alone: perhaps chance"
    else:
        verdict = "not worth it: no validation image more is right"
    lines = [
        f"{document['run']}{': already fine-tuned' if document['cached'] else ''}",
        f"  {document['trainable_variables']} variables, {document['trainable_parameters']:,} parameters trained behind "
        f"{document['cut']}; parity gap before the first step {document['parity_gap']:.1e}",
        f"  before: accuracy {before['accuracy']:.4f} (95 % {low:.4f} to {high:.4f}), log loss {before['log_loss']:.4f}",
        f"  after:  accuracy {after['accuracy']:.4f}, log loss {after['log_loss']:.4f}, {document['minutes']:.1f} minutes",
        f"  {verdict} ({gained:+.0f} of {after['n']})",
    ]
    return "\n".join(lines)


def _report(run: Run, *, cached: bool) -> dict[str, Any]:
    settings = run.config["finetune"]
    kept = ("start", "cut", "trainable_variables", "trainable_parameters", "parity_gap", "before")
    return {
        "format": 1,
        "run": str(run.folder),
        "cached": cached,
        **{name: settings[name] for name in kept},
        "after": run.metrics["validation"],
        "minutes": run.environment["fit_seconds"] / 60,
    }


def _check_classes(run: Run, source: ImageSet) -> None:
    if source.classes == run.classes:
        return
    missing = sorted(set(run.classes) - set(source.classes))
    added = sorted(set(source.classes) - set(run.classes))
    raise RunError(
        f"{source.description}: its classes are not those of {run.run_id} (missing {missing[:10]}, not in the run "
        f"{added[:10]}). Give the images that its features were made of: {run.config['features']['source']}"
    )


def _rows_of(hashes: list[bytes], data: Data, run: Run) -> np.ndarray:
    """Image numbers of the validation images that the run's predictions name, found by content."""
    validation = {data.sha256[row].tobytes(): row for row in data.rows("validation").tolist()}
    missing = sum(sha256 not in validation for sha256 in hashes)
    if missing:
        raise RunError(
            f"{data.images.description}: {missing} of {len(hashes)} validation images of {run.run_id} are not here, "
            "changed, or in another split. Extract and train the head again on these images."
        )
    return np.array([validation[sha256] for sha256 in hashes], dtype=np.int64)


def _from_pixels(
    run: Run, images: ImageSet, rows: np.ndarray, pool: Executor, batch_size: int, device: str
) -> np.ndarray:
    """Probabilities of some images by a finished run, as ``predict`` computes them."""
    network, head = network_of(run), run.load_head()
    engine = network.engine(network.recipes, batch_size=batch_size, device=device)
    parts = []
    for _, pixels, _ in decoded_batches(images.read, rows.tolist(), run.recipe.pixels, pool, batch_size):
        (features,) = engine(pixels).values()
        parts.append(head.predict_proba(features))
    return np.concatenate(parts)
