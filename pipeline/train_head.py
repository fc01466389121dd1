"""Stage two: one head on cached features -> one run folder.

store --`pipeline.heads.gather`--> rows --`pipeline.sweeps.fitting`--> head, probabilities --scores--> run folder
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from features.canonical import digest_of
from features.errors import ConfigurationError, HeadError, RunError, check_range, nearest
from pipeline.heads.classifiers import SklearnHead
from pipeline.heads.costs import check_bytes, usable_memory
from pipeline.heads.gather import Source, rows_for, train_groups
from pipeline.heads.head import Head, Progress
from pipeline.heads.pooling import pooled_width
from pipeline.heads.prepared import group_codes
from pipeline.heads.presets import make_head, resolve_pool
from pipeline.runs.folder import Predictions, Run, add_scores, is_finished, write_run
from pipeline.runs.metrics import evaluate
from pipeline.sweeps.fitting import Fitted, fit_head
from pipeline.sweeps.selection import stratified_folds

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What `train_head` did.

    Parameters
    ----------
    run_id : str
        Name of the run.
    folder : Path
        Its folder.
    metrics : dict
        Content of ``metrics.json``.
    fit_seconds : float
        Time the training took, now or when it was done.
    cached : bool
        The run was there already; nothing was trained.
    streamed : bool
        Rows were read piece by piece, as they did not fit into memory.
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
    ready: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Train a head, score it on validation and write its run folder.

    Parameters
    ----------
    store : FeatureStore
        Cached features.
    head_name : str
        Key of `pipeline.heads.presets.PRESETS`.
    runs : Path
        Folder of run folders.
    name : str, optional
        Feature data set; may be left out where the store has one.
    pool : {"avg", "max", "flatten"}, optional
        Pooling of spatial features; default: the head's.
    seed : int
        Of everything that is drawn.
    params : dict, optional
        Parameters of the head.
    memory : int, optional
        Bytes that training may take; default: half of what is free. Rows that do not fit are read piece by piece, by
        heads that can be trained so. It does not decide the run id, though the order of rows then is another.
    test : bool
        Score the test split too. It takes no part in any choice.
    ready : callable, optional
        Called when there is something to train and nothing speaks against it, before rows are read.
    progress : callable, optional
        Called with ("train-head", done, total).

    Returns
    -------
    RunResult
        The same head configuration, features, data and seed are trained once: a finished run is returned as it is.

    Raises
    ------
    ConfigurationError
        Unknown head, parameter or data set.
    HeadError
        Splits or features that a head cannot be trained on.
    """
    check_range("seed", seed, 0, 2**32 - 1)
    name = data_set(store, name)
    recipe = store.recipes[name]
    head = make_head(
        head_name,
        pool=pool,
        seed=seed,
        classes=store.classes,
        layer=recipe.layer,
        fingerprint=recipe.fingerprint,
        **_checked(params or {}),
    )
    head.pool = resolve_pool(head_name, pool, store.shape(name)[2:])
    run_id = identity(head, store, name)
    folder = Path(runs) / run_id
    if test:
        needs_rows(store, "test")
    if is_finished(folder) and _loads(Run.open(folder)):
        return _finished(store, name, Run.open(folder), test=test)
    needs_rows(store, "train", "validation")
    memory = memory or usable_memory()
    source = Source(store, name, head.pool, views_seen(head, store, name), memory)
    source.check(head)
    if isinstance(head, SklearnHead) and not source.streamed:
        width = pooled_width(store.shape(name)[2:], head.pool)
        check_bytes(head, len(store.rows("train")), width, memory, source.views)
    if ready:
        ready()
    fitted = fit_head(head, source.prepare(scale=head.scale), progress=progress)
    scores = test_scores(store, name, head, seed) if test else None
    write_fitted(runs, run_id, store, name, fitted, memory=memory, test=scores)
    return RunResult(run_id, folder, Run.open(folder).metrics, fitted.seconds, cached=False, streamed=fitted.streamed)


def write_fitted(
    runs: str | Path,
    run_id: str,
    store: Any,
    name: str,
    fitted: Fitted,
    *,
    memory: int,
    test: Mapping[str, Any] | None = None,
    cv: Mapping[str, Any] | None = None,
    plots: bool = True,
) -> None:
    """Score a trained head on validation and write its run folder; see `pipeline.runs.folder.write_run`."""
    head, rows = fitted.head, store.rows("validation")
    y = store.images.labels[rows]
    write_run(
        runs,
        run_id,
        head=head,
        features=describe_features(store, name, views_seen(head, store, name)),
        history=fitted.history,
        scores=evaluate(fitted.probabilities, y, store.classes, head.seed),
        test=test,
        cv=cv,
        predictions=Predictions(
            [store.images.paths[row] for row in rows], store.images.sha256[rows], y, fitted.probabilities
        ),
        seconds=fitted.seconds,
        plots=plots,
        notes={"streamed": True, "memory": memory} if fitted.streamed else None,
    )


def needs_rows(store: Any, *splits: str) -> None:
    """Refuse a store in which a split is empty.

    Raises
    ------
    HeadError
        With the way out.
    """
    if not store.classes:
        raise HeadError(
            f"{store.path}: none of its images has a label, so there is nothing to learn. Put the images of each class into a "
            "folder of its name, or write a CSV manifest path,label, and extract again (features are kept)"
        )
    for split in splits:
        if not len(store.rows(split)):
            out = ", or leave --test out" if split == "test" else ""
            raise HeadError(
                f"{store.path}: there are no {split} rows; extract again with --split hash:0.8,0.1,0.1, or, where the "
                f"images bring their own splits, --validation-from-train 0.1 (features are kept){out}"
            )


def needs_folds(store: Any) -> None:
    """Refuse a store of whose training rows none can be held out for the others.

    Raises
    ------
    HeadError
        With the way out.
    """
    names = train_groups(store)
    y = store.images.labels[store.rows("train")]
    if stratified_folds(y, 2, 0, None if names is None else group_codes(names)).max() < 0:
        raise HeadError(
            f"--folds: {store.path}: no class has two training rows, of two groups where there are groups, so that one could "
            "be held out; leave --folds out"
        )


def identity(head: Head, store: Any, name: str) -> str:
    """Run id: the same id means the same head configuration, features, views, data and seed."""
    parameters = head.parameters.described()
    parameters.pop("views", None)  # what it comes to is said below
    decided = {
        "head": {"name": head.name, "pool": head.pool, "parameters": parameters},
        "fingerprint": head.fingerprint,
        "data": store.data_digest,
        "seed": head.seed,
        **_several(views_seen(head, store, name)),
    }
    return f"{head.name}-{digest_of(decided)[:10]}"


def views_seen(head: Head, store: Any, name: str) -> int:
    """Views of each image that a head is trained on."""
    return head.views_used(store.shape(name)[1])


def _several(views: int) -> dict[str, int]:
    """Said only of more than one, so that older run ids hold."""
    return {"views": views} if views > 1 else {}


def _loads(run: Run) -> bool:
    """Whether the head of a finished run is whole; one that is not is trained again."""
    try:
        run.load_head()
    except (HeadError, RunError) as problem:
        logger.warning("%s; it is trained again", problem)
        shutil.rmtree(run.folder)
        return False
    return True


def _finished(store: Any, name: str, run: Run, *, test: bool) -> RunResult:
    if test and run.metrics["test"] is None:
        run = add_scores(run, test=test_scores(store, name, run.load_head(), run.config["seed"]))
    seconds = float(run.environment.get("fit_seconds", 0))
    return RunResult(run.run_id, run.folder, run.metrics, seconds, cached=True)


def test_scores(store: Any, name: str, head: Head, seed: int) -> dict[str, Any]:
    """Scores of a head on the test split."""
    rows = rows_for(head, store, name, "test")
    return evaluate(head.predict_rows(rows), rows.labels, store.classes, seed)


def needs_views(store: Any, names: Sequence[str] = ()) -> None:
    """Refuse a store that has one view of each image.

    Raises
    ------
    ConfigurationError
        With the way out.
    """
    for name in names or store.names:
        if name in store.names and store.shape(name)[1] == 1:
            raise ConfigurationError(
                f"--average-views: {store.path} has one view of each image in {name}; extract again with --views 4 "
                "--augment flip-rotation (only the new views are computed)"
            )


def add_averaged(run: Run, stores: Sequence[Any]) -> Run:
    """Put into ``metrics.json`` of a run what averaging probabilities over the views of each validation image scores.

    Parameters
    ----------
    run : Run
        Finished.
    stores : sequence of FeatureStore
        One of them is what it was trained on; see `needs_views`.
    """
    features = run.config["features"]
    name, decided = features["name"], (features["data_digest"], features["fingerprint"])
    store = next(
        store
        for store in stores
        if name in store.names and (store.data_digest, store.recipes[name].fingerprint) == decided
    )
    head, views = run.load_head(), store.shape(name)[1]
    rows = rows_for(head, store, name, "validation")
    scores = evaluate(head.predict_views(rows.all_views(views)), rows.labels, store.classes, run.config["seed"])
    return add_scores(run, averaged={**scores, "views": views})


def data_set(store: Any, name: str | None) -> str:
    """A data set of the store by name, or the only one.

    Raises
    ------
    ConfigurationError
        If there is none of that name (the nearest is named), or several and none is named.
    """
    if name is not None and name in store.names:
        return name
    if name is not None:
        held = ", ".join(store.names)
        raise ConfigurationError(f"{store.path}: no data set {name!r}, it holds {held}{nearest(name, store.names)}")
    if len(store.names) != 1:
        raise ConfigurationError(f"{store.path}: several data sets, name one of {', '.join(store.names)} (--features)")
    return store.names[0]


def _checked(params: Mapping[str, Any]) -> Mapping[str, Any]:
    options = sorted({"pool", "seed", "classes", "layer", "fingerprint"} & set(params))
    if options:
        raise ConfigurationError(
            f"{', '.join(options)}: no parameter of a head; pool and seed are options of their own"
        )
    return params


def describe_features(store: Any, name: str, views: int = 1) -> dict[str, Any]:
    """Fields of `pipeline.config.RunFeatures`, of a head that was trained on so many views."""
    recipe = store.recipes[name]
    provenance = getattr(store, "provenance", {})
    return {
        "store": str(Path(store.path).resolve()),
        "name": name,
        "recipe": recipe.to_dict(),
        "fingerprint": recipe.fingerprint,
        "data_digest": store.data_digest,
        "split_rule": str(getattr(store, "split_rule", "")),
        "source": str(getattr(store, "source", "")),
        "backbone": str(provenance.get("backbone", recipe.backbone)),
        "weights": str(provenance.get("weights", "imagenet")),
        "target": str(provenance.get("target", "")),
        **_several(views),
    }
