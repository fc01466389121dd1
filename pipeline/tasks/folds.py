"""Folds in which each of several labels is as frequent as in all rows."""

from __future__ import annotations

import numpy as np

from pipeline.scores.selection import SEARCH_ROWS


def iterative_folds(holds: np.ndarray, folds: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Distribute rows over folds by iterative stratification; the rows of a group are in one fold.

    Rows of the rarest label come first; each goes to the fold that lacks most of it, then to the one that lacks most rows
    (Sechidis, Tsoumakas, Vlahavas, On the Stratification of Multi-label Data, ECML PKDD 2011, algorithm 1).

    Parameters
    ----------
    holds : bool, (n, labels)
        Whether a label holds.
    folds : int
        Number of folds; fewer if there are fewer rows or groups.
    seed : int
        Decides between equals.
    groups : int64, (n,), optional
        Group of each row.

    Returns
    -------
    int64, (n,)
        Fold of each row; -2: not used, so that about `SEARCH_ROWS` rows are; all -1 if there is a single row or group.
    """
    units = np.arange(len(holds)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(units.max()) + 1
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    kept = order[: max(2, round(count * min(1.0, SEARCH_ROWS / len(holds))))]
    folds = min(folds, len(kept))
    if folds < 2:
        return np.full(len(holds), -1, np.int64)
    held = np.zeros((count, holds.shape[1] + 1))
    np.add.at(held, units, np.hstack([holds, np.ones((len(holds), 1))]))
    lacking = np.tile(held[kept].sum(axis=0) / folds, (folds, 1))  # of each label, and of rows
    of_unit, free = np.full(count, -2, np.int64), np.ones(count, bool)
    free[np.setdiff1d(order, kept)] = False
    while free.any():
        left = held[free][:, :-1].sum(axis=0)
        label = int(np.where(left > 0, left, np.inf).argmin()) if left.any() else holds.shape[1]
        members = kept[free[kept] & (held[kept, label] > 0)]
        for unit in members[np.argsort(-held[members, label], kind="stable")].tolist():
            most = np.flatnonzero(lacking[:, label] == lacking[:, label].max())
            most = most[lacking[most, -1] == lacking[most, -1].max()]
            fold = int(generator.choice(most))
            of_unit[unit] = fold
            lacking[fold] -= held[unit]
        free[members] = False
    return of_unit[units]
