"""What a run promises of its answers, and its tables by group: from rows that had no part in making or choosing it.

run, store, scores out of fold --`promised`--> confidence to answer from, sets --> metrics.json
                               --`tabled`----> accuracy by value of a column --> metrics.json
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from features.errors import ConfigurationError, HeadError, RunError, check_range
from pipeline.heads.head import Head
from pipeline.heads.prepared import group_codes
from pipeline.runs.folder import Run, read_predictions
from pipeline.runs.writing import add_scores
from pipeline.scores.answers import faultless
from pipeline.scores.groups import GROUP, lines_by, values_of
from pipeline.scores.selection import USUAL_FOLDS
from pipeline.tasks.table import WORST_GROUPS, targets_of

USUAL_COVERAGE = 0.9  # of sets where only a precision is asked for
VALIDATION, FOLDS = "validation", "cv"  # the rows that can tell, by their names in metrics.json


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of the answers of a run.

    Parameters
    ----------
    precision : float, optional
        Share of the answers that shall be right, 0.5 to 0.9999; answers that are not sure enough are then withheld.
    coverage : float, optional
        Chance with which the set of an image shall hold its true class, 0.5 to 0.9999. Default with ``precision``:
        `USUAL_COVERAGE`.
    by : tuple of str
        Columns of the manifest, or ``group``, for which there shall be tables.

    Raises
    ------
    ConfigurationError
        For a share out of range.
    """

    precision: float | None = None
    coverage: float | None = None
    by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision is not None:
            check_range("--abstain-precision", self.precision, 0.5, 0.9999)
            object.__setattr__(self, "coverage", self.coverage or USUAL_COVERAGE)
        if self.coverage is not None:
            check_range("--set-coverage", self.coverage, 0.5, 0.9999)

    @property
    def option(self) -> str:
        """The option that asks for a promise; empty if none does."""
        if self.precision is not None:
            return "--abstain-precision"
        return "" if self.coverage is None else "--set-coverage"

    def met_by(self, run: Run, *rows: str) -> bool:
        """Whether a run has the promise that is asked for, made by one of these kinds of rows."""
        answers = run.metrics.get("answers")
        if not answers or answers["rows"] not in rows:
            return False
        precision = (answers.get("abstain") or {}).get("precision")
        return bool((precision, coverage_of(answers)) == (self.precision, self.coverage))


NOTHING = Asked()


def coverage_of(answers: Mapping[str, Any]) -> float:
    """The chance with which sets or intervals were promised to hold what is true."""
    return float((answers.get("sets") or answers["intervals"])["coverage"])


class HeldOut(NamedTuple):
    """Rows with their predictions: the split they are from, probabilities, labels, and rows of the store."""

    rows: str
    probabilities: np.ndarray
    labels: np.ndarray
    places: np.ndarray


def with_default(asked: Asked, choose: str, stores: Iterable[Any]) -> Asked:
    """Ask for tables by ``group`` where runs are compared by their worst group and no column is named.

    Raises
    ------
    ConfigurationError
        If a store lacks a column that is asked for.
    """
    stores = list(stores)
    if choose in WORST_GROUPS and not asked.by:
        asked = dataclasses.replace(asked, by=(GROUP,))
    for store in stores:
        values_of(store.images, asked.by, str(store.path))
    return asked


def check_rows(asked: Asked, heads: Iterable[Head], chosen_by: str, *, folds: bool) -> None:
    """Refuse a promise, before training, for which no rows would be left that had no part in making or choosing a head.

    Parameters
    ----------
    asked : Asked
        What is asked for.
    heads : iterable of Head
        The heads of one data set, untrained.
    chosen_by : {"validation", "cv", ""}
        Rows by which one of them is chosen; empty if there is only one.
    folds : bool
        Whether they are cross-validated.

    Raises
    ------
    ConfigurationError
        If so; the message says how to keep some.
    """
    heads = list(heads)
    for option in (asked.option, "--by" if asked.by else ""):
        for head in heads:
            if option and option not in head.task.promises:
                raise ConfigurationError(
                    f"{option}: does not fit --task {head.task.name}, which the store is for: {head.task.no_promise}. What fits is "
                    f"{' and '.join(head.task.promises)}"
                )
    if not asked.option:
        return
    if chosen_by == VALIDATION:
        raise ConfigurationError(
            f"{asked.option}: one of these heads is chosen by the validation images, so that they promise too much of it. "
            f"Add --folds {USUAL_FOLDS}: heads are then compared by the training images, and validation keeps out of it"
        )
    if folds and not chosen_by:
        return
    stopping = [head.name for head in heads if getattr(head.parameters, "stop_on", "") == VALIDATION]
    if stopping:
        other = "" if chosen_by else f", or --folds {USUAL_FOLDS}"
        raise ConfigurationError(
            f"{asked.option}: head {stopping[0]!r} keeps the epoch that is best on the validation images, so that they promise too "
            f"much of it. Add --param stop_on=train{other} (in a sweep file, grid: {{stop_on: [train]}})"
        )


def promised(run: Run, store: Any, asked: Asked, chosen_by: str = "", out_of_fold: np.ndarray | None = None) -> Run:
    """Find the confidence to answer from, and the sets, and note them in ``metrics.json``.

    Parameters
    ----------
    run : Run
        A finished run.
    store : FeatureStore
        The store that it was trained on.
    asked : Asked
        What is asked for; nothing is done where that is no promise.
    chosen_by : {"validation", "cv", ""}
        Rows by which the run was chosen among others.
    out_of_fold : float64, (n, c), optional
        Probabilities of the training rows by heads that were not trained on them; NaN for rows in no fold.

    Returns
    -------
    Run
        The run with its ``answers``. Validation rows tell, unless they had a part in making or choosing the run, or are
        fewer than the bound needs; then the rows out of fold, if there are more of them.

    Raises
    ------
    HeadError
        If all rows had a part in making or choosing the run.
    """
    if not asked.option:
        return run
    found = []
    if not run.uses_validation and chosen_by != VALIDATION:
        found.append(_validation_rows(run, store))
    if chosen_by != FOLDS and out_of_fold is not None:
        found.append(_rows_out_of_fold(store, out_of_fold))
    elif chosen_by != FOLDS and asked.met_by(run, FOLDS):
        return run
    if not found:
        raise HeadError(
            f"{asked.option}: {run.folder}: validation images decided when its training ended, or which head was chosen, so that they "
            f"promise too much of it. The run is kept. Train with --folds {USUAL_FOLDS}, and Keras heads with --param "
            "stop_on=train"
        )
    needed = 0 if asked.precision is None else faultless(asked.precision)
    groups = [_groups(store, rows) for rows in found]
    counts = [
        len(rows.labels) if codes is None else len(np.unique(codes)) for rows, codes in zip(found, groups, strict=True)
    ]
    enough = [number for number, count in enumerate(counts) if count >= needed]
    number = enough[0] if enough else int(np.argmax(counts))
    return add_scores(run, answers=_answers(run, found[number], groups[number], asked))


def _answers(run: Run, held: HeldOut, groups: np.ndarray | None, asked: Asked) -> dict[str, Any]:
    assert asked.coverage is not None
    found = run.task.promise(held.probabilities, held.labels, (asked.precision, asked.coverage), groups)
    return {"rows": held.rows, "grouped": groups is not None, **found}


def tabled(run: Run, store: Any, asked: Asked, out_of_fold: np.ndarray | None = None) -> Run:
    """Note the accuracy, or the error of numbers, by value of each column that is asked for, in ``metrics.json``, beside that of other columns.

    Parameters are those of `promised`. Tables of the rows out of fold are made where ``out_of_fold`` is given.
    """
    if not asked.by:
        return run
    columns = values_of(store.images, asked.by, str(store.path))
    held = [_validation_rows(run, store)] + ([] if out_of_fold is None else [_rows_out_of_fold(store, out_of_fold)])
    groups = dict(run.metrics.get("groups") or {})
    for rows in held:
        scored = functools.partial(_scored, run, rows)
        tables = {name: lines_by([values[row] for row in rows.places], scored) for name, values in columns.items()}
        groups[rows.rows] = {**groups.get(rows.rows, {}), **tables}
    return add_scores(run, groups=groups)


def _scored(run: Run, held: HeldOut, some: np.ndarray) -> dict[str, Any]:
    return run.task.group(held.probabilities[some], held.labels[some], run.metrics["validation"])


def has_tables(run: Run, asked: Asked, rows: str) -> bool:
    """Whether a run has all the tables that are asked for, of these rows."""
    return set(asked.by) <= set((run.metrics.get("groups") or {}).get(rows, {}))


def _validation_rows(run: Run, store: Any) -> HeldOut:
    """The validation rows of a run, found in the store by content, as its order may be another than that of the run."""
    found, places = read_predictions(run), dict[bytes, list[int]]()
    for row in reversed(store.rows("validation").tolist()):
        places.setdefault(store.images.sha256[row].tobytes(), []).append(row)
    try:
        rows = [places[digest.tobytes()].pop() for digest in found.sha256]
    except LookupError as problem:
        raise RunError(
            f"{run.folder / 'predictions.csv'}: names images that are not validation rows of {store.path}; train the run again"
        ) from problem
    return HeldOut(VALIDATION, found.probabilities, found.labels, np.array(rows, np.int64))


def _rows_out_of_fold(store: Any, out_of_fold: np.ndarray) -> HeldOut:
    rows = np.asarray(store.rows("train"))
    known = np.isfinite(out_of_fold).all(axis=1)
    return HeldOut(FOLDS, out_of_fold[known], targets_of(store, rows[known]), rows[known])


def _groups(store: Any, held: HeldOut) -> np.ndarray | None:
    """Number of the group of each row; None where the store has no groups, or each row is one."""
    if store.images.groups is None:
        return None
    codes = group_codes([store.images.groups[row] for row in held.places])
    return codes if len(np.unique(codes)) < len(codes) else None
