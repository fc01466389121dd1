"""Folds that respect groups, intervals, and the rule that chooses one of many heads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.scores.selection import Candidate, balanced_accuracy_interval, choose, stratified_folds
from pipeline.stages import finetune
from pipeline.tables import board_text, metrics_text


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


def test_interval_of_balanced_accuracy_is_about_that_of_resampled_classes() -> None:
    labels = np.repeat([0, 1], [900, 100])
    predicted = labels.copy()
    predicted[:90], predicted[900:940] = 1, 0  # recalls 0.9 and 0.6
    low, high = balanced_accuracy_interval(labels, predicted)
    deviation = np.sqrt(0.9 * 0.1 / 900 + 0.6 * 0.4 / 100) / 2
    assert (low, high) == pytest.approx((0.75 - 1.96 * deviation, 0.75 + 1.96 * deviation), abs=0.005)


def test_what_an_earlier_release_recorded_as_interval_is_neither_shown_nor_compared() -> None:
    """It recorded a bootstrap, [0.875, 1] for 23 of 24, which reaches further than Wilson's interval of 24 of 24."""
    before = {"accuracy": 23 / 24, "accuracy_interval": [0.875, 1.0], "log_loss": 0.1, "n": 24}
    after = {"accuracy": 1.0, "accuracy_interval": [0.862, 1.0], "log_loss": 0.1, "n": 24}
    named = {
        "run_id": "a",
        "head": "b",
        "settings": "",
        "features": "c",
        "chosen": False,
        "data": "",
        "comparable": True,
    }
    more = dict.fromkeys(("cv_accuracy", "cv_interval", "test_accuracy", "ece", "fit_seconds", "parameters"))
    assert [
        line.split()[1:5]
        for line in board_text([{**named, **more, **before}, {**named, **more, **after}]).split("\n")[1:3]
    ] == [
        ["0.9583", "0.7976", "to", "0.9926"],
        ["1.0000", "0.8620", "to", "1.0000"],
    ]
    assert "0.9583  0.7976 to 0.9926" in metrics_text({"validation": before})
    document = {
        "run": "r",
        "cached": True,
        "minutes": 1.0,
        "trainable_variables": 1,
        "trainable_parameters": 1,
        "cut": "x",
    }
    said = finetune.summary(
        {**document, "resumed": None, "best_head": None, "parity_gap": 0.0, "before": before, "after": after}
    )
    assert "worth it: the accuracy is above the confidence interval of the head alone (+1 of 24 images)" in said


def test_a_better_class_never_lowers_the_interval_of_balanced_accuracy() -> None:
    """Of classes that are all right the bootstrap claimed certainty: [1, 1]."""
    sizes = (2, 5, 9)
    labels = np.repeat([0, 1, 2], sizes)

    def interval(*right: int) -> list[float]:
        predicted = [k if row < right[k] else (k + 1) % 3 for k, size in enumerate(sizes) for row in range(size)]
        return balanced_accuracy_interval(labels, np.array(predicted))

    for right in itertools.product(*(range(size + 1) for size in sizes)):
        for k, size in enumerate(sizes):
            if right[k] < size:
                better = interval(*(count + (k == j) for j, count in enumerate(right)))
                assert interval(*right)[0] < better[0]
                assert interval(*right)[1] < better[1]
    assert interval(*sizes)[0] == pytest.approx(
        1 - np.sqrt(0.710727) / 3, abs=1e-6
    )  # shortfalls 0.657620, 0.434482, 0.299145
    assert interval(*sizes)[1] == 1
