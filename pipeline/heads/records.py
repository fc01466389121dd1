"""Turn a trained head into a run: its run id, the description of its features, its scores and its folder.

store, head --run_id_of()--> id        fitted head --write_fitted()--> run folder
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from features.canonical import digest_of
from pipeline.heads.fitting import Fitted
from pipeline.heads.gather import rows_for, views_seen
from pipeline.heads.head import Head
from pipeline.runs.datasets import source_of
from pipeline.runs.folder import Predictions
from pipeline.runs.writing import Outcome, write_run
from pipeline.tasks.table import targets_of


def run_id_of(head: Head, store: Any, name: str) -> str:
    """Compute the run id. Equal ids mean equal head configuration, features, views, data and seed."""
    parameters = head.parameters.described()
    parameters.pop("views", None)  # the resulting number of views is added below
    decided = {
        "head": {"name": head.name, "pool": head.pool, "parameters": parameters},
        "fingerprint": head.fingerprint,
        "data": store.data_digest,  # which covers the task and its targets
        "seed": head.seed,
        **_several(views_seen(head, store, name)),
    }
    return f"{head.name}-{digest_of(decided)[:10]}"


def describe_features(store: Any, name: str, views: int = 1) -> dict[str, Any]:
    """Fields of `pipeline.config.RunFeatures` for a head that was trained on ``views`` views of each image."""
    recipe = store.recipes[name]
    provenance = store.provenance
    return {
        "store": str(Path(store.path).resolve()),
        "name": name,
        "recipe": recipe.to_dict(),
        "fingerprint": recipe.fingerprint,
        "data_digest": store.data_digest,
        "split_rule": store.split_rule,
        "source": source_of(store.source, str(provenance.get("root", ""))),
        "backbone": str(provenance.get("backbone", recipe.backbone)),
        "weights": str(provenance.get("weights", "imagenet")),
        "target": str(provenance.get("target", "")),
        **{name: provenance[name] for name in ("reading", "limit") if provenance.get(name)},
        **({"labels": dict(store.labelled_by)} if store.labelled_by else {}),
        **_several(views),
    }


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
    """Score a trained head on the validation split and write its run folder with `pipeline.runs.writing.write_run`."""
    head, rows = fitted.head, store.rows("validation")
    y = targets_of(store, rows)
    paths = [store.images.paths[row] for row in rows]
    outcome = Outcome(
        head,
        fitted.history,
        head.task.evaluate(fitted.probabilities, y, head.classes),
        Predictions(paths, store.images.sha256[rows], y, fitted.probabilities),
        fitted.seconds,
        test=test,
        cv=cv,
        notes={"streamed": True, "memory": memory} if fitted.streamed else None,
    )
    features = describe_features(store, name, views_seen(head, store, name))
    write_run(runs, run_id, outcome, features=features, plots=plots)


def test_scores(store: Any, name: str, head: Head) -> dict[str, Any]:
    """Score a head on the test split, with what was chosen on the validation split."""
    rows, held_out = (rows_for(head, store, name, split) for split in ("test", "validation"))
    before = head.task.chosen(lambda: (held_out.labels, head.predict_rows(held_out)), head.classes)
    return head.task.evaluate(head.predict_rows(rows), rows.labels, head.classes, before)


def _several(views: int) -> dict[str, int]:
    """The number of views, given only where there are several, so that earlier run ids stay valid."""
    return {"views": views} if views > 1 else {}
