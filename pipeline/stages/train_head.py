"""Stage two: train one head on cached features and write its run folder.

store --`pipeline.heads.gather`--> rows --`pipeline.heads.fitting`--> head, probabilities --scores--> run folder
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, HeadError, RunError, UntrustedHeadError, check_range
from features.progress import Progress
from pipeline.heads.costs import announcement, check_bytes, usable_memory
from pipeline.heads.fitting import fit_head
from pipeline.heads.gather import Source, feature_set, needs_rows, rows_for, views_seen
from pipeline.heads.kinds import head_of, make_head, resolve_pool
from pipeline.heads.pooling import pooled_width
from pipeline.heads.promises import NOTHING, Asked, check_rows, promised, tabled
from pipeline.heads.records import run_id_of, test_scores, write_fitted
from pipeline.runs.folder import Run, is_finished
from pipeline.runs.writing import add_scores
from pipeline.scores.groups import values_of
from pipeline.tasks.table import names_of, task_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of `train_head`.

    Parameters
    ----------
    run_id : str
        Name of the run.
    folder : Path
        The run folder.
    metrics : dict
        Content of ``metrics.json``.
    fit_seconds : float
        Training time in seconds, now or when the run was made.
    cached : bool
        True: the run already existed, and nothing was trained.
    streamed : bool
        True: rows were read piece by piece, as they did not fit into memory.
    """

    run_id: str
    folder: Path
    metrics: dict[str, Any]
    fit_seconds: float
    cached: bool
    streamed: bool = False


def train_head(
    store: Any,
    head_name: str,
    *,
    runs: str | Path,
    name: str | None = None,
    pool: str | None = None,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
    memory: int | None = None,
    test: bool = False,
    asked: Asked = NOTHING,
    ready: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Train a head, score it on the validation split and write its run folder.

    Parameters
    ----------
    store : FeatureStore
        Cached features.
    head_name : str
        Key of `pipeline.presets.PRESETS`, or the import path of a scikit-learn classifier.
    runs : Path
        Folder of run folders.
    name : str, optional
        Feature set; may be left out if the store has only one.
    pool : {"avg", "max", "flatten"}, optional
        Pooling of spatial features; default: that of the head.
    seed : int, 0 to 2**32 - 1
        Random seed.
    params : dict, optional
        Parameters of the head.
    memory : int, optional
        Bytes that training may use; default: half of the available memory. Rows that do not fit are read piece by piece
        if the head can be trained in this way. The run id does not depend on it, although the order of rows then differs.
    test : bool
        Whether to score the test split too. It never influences a choice.
    asked : Asked
        What is asked of its answers: a precision, sets, tables by group. A finished run gets them without being trained
        again.
    ready : callable, optional
        Called once all checks have passed and there is something to train, before rows are read.
    progress : callable, optional
        Called with ("train-head", done, total).

    Returns
    -------
    RunResult
        If a run with the same head configuration, features, data and seed is finished, it is returned unchanged.

    Raises
    ------
    ConfigurationError
        The head, a parameter, the feature set or a column is unknown, or a promise has no images left to be based on.
    HeadError
        The head cannot be trained on these splits or features.
    """
    check_range("seed", seed, 0, 2**32 - 1)
    values_of(store.images, asked.by, str(store.path))
    name = feature_set(store, name)
    recipe = store.recipes[name]
    head = make_head(
        head_name,
        pool=pool,
        seed=seed,
        classes=names_of(store),
        layer=recipe.layer,
        fingerprint=recipe.fingerprint,
        task=task_of(store),
        **_checked(params or {}),
    )
    head.pool = resolve_pool(head_name, pool, store.shape(name)[2:])
    check_rows(asked, [head], "", folds=False)
    run_id = run_id_of(head, store, name)
    folder = Path(runs) / run_id
    if test:
        needs_rows(store, "test")
    if is_finished(folder) and _loads(Run.open(folder)):
        return _finished(store, name, Run.open(folder), asked, test=test)
    needs_rows(store, "train", "validation")
    memory = memory or usable_memory()
    source = Source(store, name, head.pool, views_seen(head, store, name), memory)
    source.check(head)
    count, width = len(store.rows("train")), pooled_width(store.shape(name)[2:], head.pool)
    if not source.streamed:
        check_bytes(head, count, width, memory, source.views)
    if said := announcement(head, count, width, source.views):
        logger.warning("%s", said)
    if ready:
        ready()
    fitted = fit_head(head, source.prepare(scale=head.scale), progress=progress)
    scores = test_scores(store, name, head) if test else None
    write_fitted(runs, run_id, store, name, fitted, memory=memory, test=scores)
    run = promised(tabled(Run.open(folder), store, asked), store, asked)
    return RunResult(run_id, folder, run.metrics, fitted.seconds, cached=False, streamed=fitted.streamed)


def _loads(run: Run) -> bool:
    """Whether the head of a finished run can be loaded; if not, the run is removed, to be trained again.

    A head that only lacks trust is not loaded, and its run is kept. One that the system does not let us read now (a disk
    error, rights, too many open files) may be whole: the error is passed on.
    """
    try:
        head_of(run)
    except UntrustedHeadError:
        return True
    except (HeadError, RunError) as problem:
        code = getattr(problem.__cause__, "errno", None)  # HDF5's and our own errors about content have none
        if code not in (None, errno.ENOENT):
            raise
        logger.warning("%s; the run is trained again now", problem)
        shutil.rmtree(run.folder)
        return False
    return True


def _finished(store: Any, name: str, run: Run, asked: Asked, *, test: bool) -> RunResult:
    run = promised(tabled(run, store, asked), store, asked)
    if test and run.metrics["test"] is None:
        run = add_scores(run, test=test_scores(store, name, head_of(run)))
    seconds = float(run.environment.get("fit_seconds") or 0)
    return RunResult(run.run_id, run.folder, run.metrics, seconds, cached=True)


def needs_views(store: Any, names: Sequence[str] = ()) -> None:
    """Check that a store has several views of each image.

    Raises
    ------
    ConfigurationError
        If not; the message says how to add views.
    """
    for name in names or store.names:
        if name in store.names and store.shape(name)[1] == 1:
            raise ConfigurationError(
                f"--average-views: {store.path} has only one view of each image in {name}; extract again with --views 4 "
                "--augment flip-rotation (only the new views are computed)"
            )


def add_averaged(run: Run, stores: Sequence[Any]) -> Run:
    """Score a run with probabilities averaged over the views of each validation image; add this to ``metrics.json``.

    Scores over as many views that are there already are kept.

    Parameters
    ----------
    run : Run
        A finished run.
    stores : sequence of FeatureStore
        Stores that include the one the run was trained on; see `needs_views`.
    """
    features = run.config["features"]
    name, decided = features["name"], (features["data_digest"], features["fingerprint"])
    store = next(
        store
        for store in stores
        if name in store.names and (store.data_digest, store.recipes[name].fingerprint) == decided
    )
    views = store.shape(name)[1]
    if (run.metrics.get("averaged") or {}).get("views") == views:
        return run
    head = head_of(run)
    rows = rows_for(head, store, name, "validation")
    scores = head.task.evaluate(head.predict_views(rows.all_views(views)), rows.labels, head.classes)
    return add_scores(run, averaged={**scores, "views": views})


def _checked(params: Mapping[str, Any]) -> Mapping[str, Any]:
    options = sorted({"pool", "seed", "classes", "layer", "fingerprint", "task"} & set(params))
    if options:
        raise ConfigurationError(
            f"{', '.join(options)}: received as a parameter of the head; give pool and seed as options, and leave out others"
        )
    return params
