"""Stage three: train the last block together with the head, from where the head already is.

run + images -> split network -> parity gate -> trunk features -> train tail, keep the best epoch -> parity -> run
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, RunError
from features.extraction import processors, writable_folder
from features.recipe import digest_of
from features.sources import SplitRule, scan
from pipeline.endtoend import (
    cached_predictions,
    check_parity,
    network_of,
    split_for_training,
    trunk_engine,
)
from pipeline.runs import Run, newest_run, write_run

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
KEPT_BYTES = 1 << 30  # trunk features up to this size are kept in memory, larger ones are computed every epoch
PARITY_IMAGES = 64
WEIGHTS_FILE = "backbone.npz"


def finetune(
    run: str | Path,
    images: str | Path,
    *,
    unfreeze: str = "last-block",
    bn: str = "frozen",
    weights: str | None = None,
    epochs: int = 5,
    patience: int = 2,
    learning_rate: float = 1e-5,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "auto",
    runs: Path | None = None,
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
        Where the backbone's weights are now.
    epochs, patience : int
        Most epochs; epochs without a lower validation log loss before stopping.
    learning_rate : float
        Of Adam, larger than 0.
    batch_size, workers, device, seed
        As everywhere.
    runs : Path, optional
        Folder of the new run; that of the given one without it.
    progress : callable, optional
        Called with ``(stage, done, total)``.

    Returns
    -------
    dict
        ``run``, ``before`` and ``after`` (validation scores), ``parity_gap``, ``minutes``, ``trainable_variables``, ...

    Raises
    ------
    ParityError
        If backbone and head together do not give the probabilities of the cached head; nothing is trained.
    RunError
        If the run cannot be fine-tuned on these images.
    """
    if not 0 < learning_rate <= 1 or epochs < 1 or patience < 1 or batch_size < 1:
        raise ConfigurationError(
            f"finetune: received learning rate {learning_rate}, epochs {epochs}, patience {patience}, batch size "
            f"{batch_size}; expected a rate above 0 and at most 1, and at least 1 of the others"
        )
    started = time.monotonic()
    start = newest_run(Path(run), finetunable=True)
    runs = Path(runs) if runs is not None else Path(start.folder).parent
    writable_folder(runs)
    settings = {
        "unfreeze": unfreeze,
        "bn": bn,
        "epochs": epochs,
        "patience": patience,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
    }
    source = scan(images)
    if source.classes != start.classes:
        raise RunError(_class_difference(start, source))
    import keras

    keras.utils.set_random_seed(seed)
    network = network_of(start, weights)
    head = start.load_head()
    split = split_for_training(network, start.recipe, head, unfreeze=unfreeze, bn=bn)
    with ThreadPoolExecutor(workers or processors()) as pool:
        data = _read_data(source, SplitRule.parse(start.split_rule, 0), pool)
        trunk = trunk_engine(split, network, start.recipe, batch_size=batch_size, device=device)
        cut = CutFeatures(data, trunk, pool, start, progress)
        tail = Tail(split, head.temperature, learning_rate, batch_size)
        paths, expected = cached_predictions(start, PARITY_IMAGES)
        gap = check_parity(tail.probabilities(cut.of_paths(paths)), expected, paths, "before fine-tuning")
        history, before, after = _train(tail, cut, data, settings, progress)
        report = {
            "start": str(start.folder),
            "cut": split.cut,
            "trainable_variables": len(split.tail.trainable_variables),
            "trainable_parameters": int(sum(np.prod(variable.shape) for variable in split.tail.trainable_variables)),
            "parity_gap": gap,
            "before": before,
            "after": after,
            "epochs_trained": len(history["epoch"]),
        }
        validation = data.rows("validation")
        rows = [data.images.paths[row] for row in validation]
        final = tail.probabilities(cut.of_rows(validation))
        identity = f"finetune-{head.name}-" + digest_of([settings, start.run_id, data.digest])[:10]
        folder = write_run(
            runs,
            identity,
            settings={**settings, "start": start.run_id},
            start=start,
            head=head,
            backbone=split.backbone,
            history=history,
            scores=after,
            predictions=(rows, data.labels[validation], final),
            seconds=time.monotonic() - started,
        )
        saved = _probabilities_of_saved(Run.open(folder), data, paths, pool, batch_size, device)
        report["parity_gap_after"] = check_parity(
            saved, tail.probabilities(cut.of_paths(paths)), paths, "after fine-tuning"
        )
    return {"format": 1, "run": str(folder), **report, "minutes": (time.monotonic() - started) / 60}
