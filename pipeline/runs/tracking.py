"""Send finished runs to a tracking server, which shows the runs of many people and programs side by side.

    run folder --parameters, scores, history, files--> MLflow

Training never depends on the server: what cannot be sent is said once, and the run folder stays the record. Rerunning the
command trains nothing again and sends what the server does not have.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, brief, nearest
from features.machine import how_to_install
from features.sources.objects import without_secrets
from pipeline.intervals import interval_of
from pipeline.runs.folder import Run, read_history

logger = logging.getLogger(__name__)

Track = Callable[[Path], None]  # sends the run of a folder

RUN_ID = "bottleneck.run_id"
EXPERIMENT = "bottleneck-features"
MOST = 500  # scores in one request; MLflow takes 1,000, and 100 parameters
# Seconds and tries, so that a server that is down holds nobody up; nothing is told to the makers of MLflow.
_USUAL = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def tracker(text: str) -> Track:
    """Return what sends runs to the server that ``--track`` names; no request is made yet.

    Parameters
    ----------
    text : str
        ``mlflow:URI``, where the URI is the address of an MLflow server such as ``http://localhost:5000``, or whatever
        else MLflow takes.

    Raises
    ------
    ConfigurationError
        If the text has another form, or the package is not installed.
    """
    kind, _, uri = text.partition(":")
    if kind not in KINDS or not uri:
        raise ConfigurationError(
            f"--track: received {without_secrets(text)!r}, expected mlflow:URI such as mlflow:http://localhost:5000"
            f"{nearest(kind, list(KINDS))}"
        )
    return KINDS[kind](uri)


def _mlflow(uri: str) -> Track:
    for name, value in _USUAL.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as problem:
        raise ConfigurationError(
            f"--track: the package mlflow cannot be imported ({problem}): {how_to_install('mlflow')}"
        ) from problem
    lost = False

    def track(folder: Path) -> None:
        nonlocal lost
        if lost:
            return
        run = Run.open(folder)
        history = {name: values for name, values in read_history(folder).items() if name != "epoch"}
        try:
            _send(MlflowClient(tracking_uri=uri), run, history)
        except (MlflowException, OSError) as problem:  # that of requests is an OSError
            lost = True
            said = _reason(problem).replace(uri, without_secrets(uri))
            logger.warning(
                "--track: %s did not take %s (%s). Runs are kept in %s as always; the same command or call again sends them",
                *(without_secrets(uri), run.run_id, brief(said, 300), folder.parent),
            )

    return track


def _reason(problem: BaseException) -> str:
    """What the network said, such as "Connection refused", without what each library wrapped around it."""
    first = problem
    while before := first.__cause__ or first.__context__:
        first = before
    return first.strerror if isinstance(first, OSError) and first.strerror else str(problem)


KINDS: dict[str, Callable[[str], Track]] = {"mlflow": _mlflow}


def _send(client: Any, run: Run, history: Mapping[str, list[float]]) -> None:
    """Send a run as a whole; of one that the server has, only the scores that are new or differ."""
    from mlflow.entities import Metric, Param

    experiment = client.get_experiment_by_name(EXPERIMENT)
    place = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    tags = {
        RUN_ID: run.run_id,
        "bottleneck.fingerprint": run.config["features"]["fingerprint"],
        "bottleneck.data": run.data_digest,
        "bottleneck.source": run.source,
    }
    same = " and ".join(f"tags.`{name}` = '{tags[name]}'" for name in (RUN_ID, "bottleneck.data"))
    found = client.search_runs([place], f"{same} and attributes.status = 'FINISHED'", max_results=1)
    known = found[0].data.metrics if found else {}
    sent = found[0].info.run_id if found else client.create_run(place, tags=tags, run_name=run.run_id).info.run_id
    time = int(run.created * 1000)
    figures = [Metric(name, value, time, 0) for name, value in scores_of(run) if known.get(name) != value]
    if not found:
        figures += [
            Metric(f"history/{name}", float(value), time, step)
            for name, values in history.items()
            for step, value in enumerate(values, 1)
        ]
        parameters = list(parameters_of(run).items())
        for start in range(0, len(parameters), 100):
            client.log_batch(sent, params=[Param(name, value) for name, value in parameters[start : start + 100]])
    for start in range(0, len(figures), MOST):
        client.log_batch(sent, metrics=figures[start : start + MOST])
    if figures or not found:
        client.log_artifacts(sent, str(run.folder))
        client.set_terminated(sent)


def scores_of(run: Run) -> Iterator[tuple[str, float]]:
    """Yield the name and value of every score: ``validation/accuracy``, its interval ``validation/accuracy_low`` and ``_high``."""
    for split in ("validation", "test", "cv", "averaged"):
        scores = run.metrics.get(split) or {}
        intervals = {name: value for name, value in scores.items() if name.endswith("_interval") and value}
        if "accuracy" in scores and scores.get("n"):
            intervals["accuracy_interval"] = interval_of(scores)
        for name, value in scores.items():
            if isinstance(value, int | float):
                yield f"{split}/{name}", float(value)
        for name, (low, high) in intervals.items():
            yield f"{split}/{name.removesuffix('_interval')}_low", float(low)
            yield f"{split}/{name.removesuffix('_interval')}_high", float(high)


def parameters_of(run: Run) -> dict[str, str]:
    """Return what decided the run, each as a text of at most 500 characters: the head, its parameters, the features."""
    head, features, recipe = run.config["head"], run.config["features"], run.recipe
    values = {
        "stage": run.config["stage"],
        "seed": run.config["seed"],
        "head": head["name"],
        "pool": head["pool"],
        "features": features["name"],
        "network": recipe.backbone,
        "layer": recipe.layer,
        "precision": recipe.precision,
        "classes": len(run.classes),
        **{f"head.{name}": value for name, value in head["parameters"].items()},
    }
    return {name: str(value)[:500] for name, value in values.items() if value is not None}
