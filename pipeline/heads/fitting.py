"""Train heads on prepared rows and predict held-out rows, alone or with companions; failures are returned as text.

heads, `Prepared` --fit, folds--> `Fitted`: history, probabilities of validation rows and of held-out training rows
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from features.errors import BottleneckError, HeadError
from features.progress import Progress
from pipeline.config import History
from pipeline.heads.head import Head
from pipeline.heads.prepared import Prepared


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The result of training a head.

    ``seconds`` is the training time, ``probabilities`` float64 (n, c) those of the validation rows, ``out_of_fold``
    those of the held-out training rows; ``streamed`` says whether the rows were read from the store piece by piece.
    """

    head: Head
    history: History
    seconds: float
    probabilities: np.ndarray
    out_of_fold: np.ndarray | None = None
    streamed: bool = False


def fit_one(head: Head, prepared: Prepared, folds: int) -> Fitted | str:
    """Run `fit_head`; a text is the reason of a failure."""
    try:
        return fit_head(head, prepared, folds)
    except BottleneckError as problem:
        return reason_of(problem)


def fit_head(head: Head, prepared: Prepared, folds: int = 0, progress: Progress | None = None) -> Fitted:
    """Train one head and predict the validation rows and, with ``folds``, the held-out training rows.

    Raises
    ------
    HeadError
        If a library raises an error of any type.
    """
    try:
        return _fitted(head, prepared, folds, progress)
    except BottleneckError:
        raise
    except Exception as problem:
        raise HeadError(f"head {head.name!r}: {reason_of(problem)}") from problem


def _fitted(head: Head, prepared: Prepared, folds: int, progress: Progress | None) -> Fitted:
    head.warm_up()
    fresh = head.fresh()
    head.folds = folds
    started = time.perf_counter()
    history = head.fit_prepared(prepared, progress)
    seconds = time.perf_counter() - started
    assert prepared.held_out is not None
    out_of_fold = head.out_of_fold
    if folds and out_of_fold is None:
        out_of_fold = cross_validate(fresh, prepared, folds)
    head.out_of_fold = None
    probabilities = head.predict_rows(prepared.held_out)
    return Fitted(head, history, seconds, probabilities, out_of_fold, prepared.streamed)


def cross_validate(head: Head, prepared: Prepared, folds: int) -> np.ndarray:
    """Predict the training rows by cross-validation: each by a head trained, and its penalty chosen, without its fold.

    The columns are standardised only once, with all training rows. Early stopping uses the validation rows.

    Returns
    -------
    float64, (n, c)
        Probabilities; NaN for rows that are in no fold.
    """
    numbers = head.task.folds(prepared.y, folds, head.seed, prepared.groups)
    found = np.full((len(prepared.y), len(head.classes)), np.nan)
    for fold in range(numbers.max() + 1):
        rows, tested = (numbers != -2) & (numbers != fold), numbers == fold
        one = head.fresh()
        one.fit_prepared(prepared.part(np.flatnonzero(rows)))
        found[tested] = one.predict_rows(prepared.train.take(tested))
    return found


def fit_companions(heads: Sequence[Head], prepared: Prepared, folds: int) -> list[Fitted | str]:
    """Do what `fit_head` does for heads with equal `Head.companions`, together; a text is the reason of a failure."""
    assert prepared.held_out is not None
    try:
        heads[0].warm_up()
        started = time.perf_counter()
        histories = heads[0].train_together(heads, prepared)
        seconds = (time.perf_counter() - started) / len(heads)
        out_of_fold = _companion_folds(heads, prepared, folds) if folds else [None] * len(heads)
        return [
            reason_of(history)
            if isinstance(history, HeadError)
            else Fitted(head, history, seconds, head.predict_rows(prepared.held_out), held_out, prepared.streamed)
            for head, history, held_out in zip(heads, histories, out_of_fold, strict=True)
        ]
    except BottleneckError as problem:  # about the rows, which they share
        return [reason_of(problem)] * len(heads)
    except Exception as problem:  # noqa: BLE001  libraries raise errors of any type; the reason is reported
        if len(heads) == 1:
            return [reason_of(problem)]
    half = len(heads) // 2  # one of them may be the culprit, or they were too many for the memory
    return [*fit_companions(heads[:half], prepared, folds), *fit_companions(heads[half:], prepared, folds)]


def _companion_folds(heads: Sequence[Head], prepared: Prepared, folds: int) -> list[np.ndarray | None]:
    """Do what `cross_validate` does for companions; None where training diverged in a fold."""
    found: list[np.ndarray | None] = [None] * len(heads)
    by_seed = collections.defaultdict(list)
    for number, head in enumerate(heads):
        by_seed[head.seed].append(number)
    for seed, numbers in by_seed.items():
        fold_of_row = heads[0].task.folds(prepared.y, folds, seed, prepared.groups)
        fresh = [heads[number].fresh() for number in numbers]
        columns = [np.full((len(prepared.y), len(heads[0].classes)), np.nan) for _ in numbers]
        diverged: set[int] = set()
        for fold in range(fold_of_row.max() + 1):
            rows, tested = np.flatnonzero((fold_of_row != -2) & (fold_of_row != fold)), fold_of_row == fold
            histories = fresh[0].train_together(fresh, prepared.part(rows))
            held_back = prepared.train.take(tested)
            for k, (head, history) in enumerate(zip(fresh, histories, strict=True)):
                if isinstance(history, HeadError):
                    diverged.add(k)
                else:
                    columns[k][tested] = head.predict_rows(held_back)
        for k, number in enumerate(numbers):
            found[number] = None if k in diverged else columns[k]
    return found


def reason_of(problem: BaseException) -> str:
    """Describe a failure in one line; the exception type is named unless the message is one of ours."""
    text, kind = str(problem).strip(), type(problem).__name__
    if isinstance(problem, BottleneckError):
        return text or kind
    return f"{kind}: {text.splitlines()[0]}" if text else kind
