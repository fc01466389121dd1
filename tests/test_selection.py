"""Folds that respect groups, intervals, and the rule that chooses one of many heads."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.scores.selection import Candidate, balanced_accuracy_interval, choose, stratified_folds


def test_rows_of_a_group_stay_together() -> None:
    generator = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 100)
    groups = generator.integers(0, 12, 300) + 12 * y
    folds = stratified_folds(y, 5, 0, groups)
    assert sorted(np.unique(folds)) == [0, 1, 2, 3, 4]
    for group in np.unique(groups):
        assert len(np.unique(folds[groups == group])) == 1
    for fold in range(5):
        assert set(y[folds != fold]) == {0, 1, 2}
        assert 30 <= (folds == fold).sum() <= 90
    assert (folds == stratified_folds(y, 5, 0, groups)).all()
    assert (folds != stratified_folds(y, 5, 1, groups)).any()


def test_a_class_of_one_group_is_only_trained_on() -> None:
    y = np.repeat([0, 1], 20)
    groups = np.concatenate([np.zeros(20, int), 1 + np.arange(20) // 5])
    folds = stratified_folds(y, 4, 0, groups)
    assert (folds[:20] == -1).all()
    assert (folds[20:] >= 0).any()
    assert (stratified_folds(y, 4, 0, np.repeat([0, 1], 20)) == -1).all()  # no fold would know both classes


def test_groups_of_one_row_are_no_groups() -> None:
    y = np.repeat([0, 1], 20)
    assert (stratified_folds(y, 4, 0, np.arange(40)) == stratified_folds(y, 4, 0)).all()


def test_many_grouped_rows_use_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.scores.selection.SEARCH_ROWS", 100)
    folds = stratified_folds(np.arange(1000) % 2, 5, 0, np.arange(1000) // 10)
    assert (folds >= 0).sum() == 100


@pytest.mark.parametrize(
    ("candidates", "low", "expected"),
    [
        ([(0.99, 500, 1), (0.985, 100, 1), (0.97, 10, 1)], 0.98, 1),  # simplest within the interval
        ([(0.99, 100, 30), (0.985, 100, 2)], 0.98, 1),  # as simple: faster
        ([(0.99, 100, 3), (0.985, 100, 2)], 0.98, 0),  # hardly faster: better
        ([(0.99, None, 1), (0.985, 100, 1)], 0.98, 1),  # neighbours after what has a count
        ([(0.99, None, 0.01), (0.98, None, 0.01)], 0.985, 0),
    ],
)
def test_ties_go_to_the_simpler_and_faster(
    candidates: list[tuple[float, int | None, float]], low: float, expected: int
) -> None:
    assert choose([Candidate(*values) for values in candidates], low) == expected


def test_interval_of_balanced_accuracy_is_that_of_resampled_classes() -> None:
    labels = np.repeat([0, 1], [900, 100])
    predicted = labels.copy()
    predicted[:90], predicted[900:940] = 1, 0  # recalls 0.9 and 0.6
    low, high = balanced_accuracy_interval(labels, predicted)
    deviation = np.sqrt(0.9 * 0.1 / 900 + 0.6 * 0.4 / 100) / 2
    assert (low, high) == pytest.approx((0.75 - 1.96 * deviation, 0.75 + 1.96 * deviation), abs=0.005)
