"""Stage two: one head on cached features -> one run folder."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, HeadError, RunError, check_range, nearest
from features.recipe import digest_of
from pipeline.classifiers import SklearnHead
from pipeline.costs import check_bytes, usable_memory
from pipeline.head import Head, Progress
from pipeline.heads import make_head, resolve_pool
from pipeline.metrics import evaluate
from pipeline.pooling import pooled_width
from pipeline.runs import Predictions, Run, add_scores, is_finished, write_run

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
    """

    run_id: str
    folder: Path
    metrics: dict[str, Any]
    fit_seconds: float
    cached: bool


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
    progress: Progress | None = None,
) -> RunResult:
    """Train a head, score it on validation and write its run folder.

    Parameters
    ----------
    store : FeatureStore
        Cached features.
    head_name : str
        Key of `pipeline.heads.PRESETS`.
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
        Bytes that a scikit-learn solver may take; default: half of what is free.
    test : bool
        Score the test split too. It takes no part in any choice.
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
    run_id = identity(head, store.data_digest)
    folder = Path(runs) / run_id
    if test:
        needs_rows(store, "test")
    if is_finished(folder) and _loads(Run.open(folder)):
        return _finished(store, name, Run.open(folder), test=test)
    needs_rows(store, "train", "validation")
    X, y = store.load("train", name)
    X_validation, y_validation = store.load("validation", name)
    if isinstance(head, SklearnHead):
        width = pooled_width(X.shape[1:], head.pool)
        check_bytes(head, len(y), width, memory or usable_memory())
    groups = getattr(store.images, "groups", None)
    if groups is not None:
        groups = [groups[row] for row in store.rows("train")]
    head.warm_up()
    started = time.perf_counter()
    history = head.fit(X, y, X_validation=X_validation, y_validation=y_validation, groups=groups, progress=progress)
    seconds = time.perf_counter() - started
    probabilities = head.predict_proba(X_validation)
    write_run(
        runs,
        run_id,
        head=head,
        features=describe_features(store, name),
        history=history,
        scores=evaluate(probabilities, y_validation, store.classes, seed),
        test=test_scores(store, name, head, seed) if test else None,
        predictions=Predictions(
            [store.images.paths[row] for row in store.rows("validation")],
            store.images.sha256[store.rows("validation")],
            y_validation,
            probabilities,
        ),
        seconds=seconds,
    )
    return RunResult(run_id, folder, Run.open(folder).metrics, seconds, cached=False)


def needs_rows(store: Any, *splits: str) -> None:
    """Refuse a store in which a split is empty.

    Raises
    ------
    HeadError
        With the way out.
    """
    for split in splits:
        if not len(store.rows(split)):
            out = ", or leave --test out" if split == "test" else ""
            raise HeadError(
                f"{store.path}: there are no {split} rows; extract again with --split hash:0.8,0.1,0.1 "
                f"(features are kept, only the splits change){out}"
            )


def identity(head: Head, data_digest: str) -> str:
    """Run id: the same id means the same head configuration, features, data and seed."""
    decided = {
        "head": {"name": head.name, "pool": head.pool, "parameters": head.parameters.described()},
        "fingerprint": head.fingerprint,
        "data": data_digest,
        "seed": head.seed,
    }
    return f"{head.name}-{digest_of(decided)[:10]}"


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
    X, y = store.load("test", name)
    return evaluate(head.predict_proba(X), y, store.classes, seed)


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


def describe_features(store: Any, name: str) -> dict[str, Any]:
    """Fields of `pipeline.config.RunFeatures`."""
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
    }
