"""Scores: values worked out by hand, and scikit-learn's on random predictions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from features.errors import HeadError
from pipeline.intervals import interval_of, wilson_interval
from pipeline.scores.metrics import (
    brier_score,
    calibration_error,
    confusion,
    evaluate,
    fit_temperature,
    softmax,
)

KEYS = {"accuracy", "accuracy_interval", "balanced_accuracy", "macro_f1", "log_loss", "roc_auc", "ece", "n"}


def predictions(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, rows).astype(np.int32)
    outputs = generator.normal(size=(rows, classes)).round(1)  # rounded: ties
    outputs[np.arange(rows), labels] += 1
    return softmax(outputs), labels


def test_scores_worked_out_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    scores = evaluate(probabilities, np.array([0, 0, 1, 1]), ("cat", "dog"))
    assert set(scores) == KEYS
    assert scores["accuracy"] == 0.75
    assert scores["balanced_accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    assert scores["log_loss"] == pytest.approx(-np.log([0.9, 0.6, 0.7, 0.2]).mean())
    assert scores["roc_auc"] == pytest.approx(3 / 4)  # of four (cat, dog) pairs one is the wrong way round
    assert scores["ece"] == pytest.approx((0.1 + 0.4 + 0.3 + 0.8) / 4)  # every row in a bin of its own
    assert scores["n"] == 4
    assert scores["accuracy_interval"] == pytest.approx([0.300642, 0.954413], abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_equal_those_of_scikit_learn(classes: int) -> None:
    from sklearn import metrics

    probabilities, labels = predictions(300, classes)
    guess = probabilities.argmax(axis=1)
    scores = evaluate(probabilities, labels, [str(k) for k in range(classes)])
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(labels, guess))
    assert scores["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, guess))
    assert scores["macro_f1"] == pytest.approx(metrics.f1_score(labels, guess, average="macro"))
    assert scores["log_loss"] == pytest.approx(metrics.log_loss(labels, probabilities))
    if classes == 2:
        assert scores["roc_auc"] == pytest.approx(metrics.roc_auc_score(labels, probabilities[:, 1]))
    else:
        expected = metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
        assert scores["roc_auc"] == pytest.approx(expected)
    assert (confusion(labels, guess, classes) == metrics.confusion_matrix(labels, guess)).all()


def test_a_class_that_does_not_occur() -> None:
    from sklearn import metrics

    probabilities, labels = predictions(60, 3)
    labels[labels == 2] = 0
    scores = evaluate(probabilities, labels, ("a", "b", "c"))
    assert scores["roc_auc"] is None
    recall = metrics.recall_score(labels, probabilities.argmax(axis=1), labels=[0, 1], average="macro")
    assert scores["balanced_accuracy"] == pytest.approx(recall)
    assert scores["macro_f1"] == pytest.approx(metrics.f1_score(labels, probabilities.argmax(axis=1), average="macro"))


def test_certain_and_wrong_is_finite() -> None:
    scores = evaluate(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 1]), ("a", "b"))
    assert scores["log_loss"] == pytest.approx(-np.log(np.finfo(float).eps) / 2)
    assert scores["ece"] == 0.5


def test_calibration_error_bins_are_open_below() -> None:
    confident = np.array([[0.6, 0.4]] * 5)  # 0.6 = 9/15 belongs to the bin (8/15, 9/15]
    assert calibration_error(confident, np.array([0, 0, 0, 1, 1])) == pytest.approx(0)
    assert calibration_error(confident, np.array([0, 0, 0, 0, 0])) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("correct", "n", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_intervals_are_those_that_are_printed_in_the_literature(
    correct: int, n: int, interval: tuple[float, float]
) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3: Wilson's score interval."""
    assert wilson_interval(correct, n) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize(("n", "low"), [(5, 0.565518), (340, 0.988828), (1000, 0.996173)])
def test_interval_of_all_right_is_wilsons(n: int, low: float) -> None:
    """Every resample would be the same: a bootstrap would claim certainty. Values from n / (n + 1.959964 ** 2)."""
    assert wilson_interval(n, n) == pytest.approx([low, 1.0], abs=1e-6)
    assert wilson_interval(0, n) == pytest.approx([0.0, 1 - low], abs=1e-6)


@pytest.mark.parametrize("n", [*range(1, 60), 186, 1000])
def test_a_better_count_never_has_bounds_below_those_of_a_worse_one(n: int) -> None:
    """A bootstrap gave 23 of 24 right a higher lower bound than 24 of 24."""
    intervals = [wilson_interval(correct, n) for correct in range(n + 1)]
    for worse, better in itertools.pairwise(intervals):
        assert worse[0] < better[0]
        assert worse[1] < better[1]
    for correct, (low, high) in enumerate(intervals):
        assert 0 <= low <= correct / n <= high <= 1
        scores = {"accuracy": correct / n, "n": n, "accuracy_interval": [0.1, 0.2]}  # whatever an old run recorded
        assert interval_of(scores) == [low, high]


def test_brier_score() -> None:
    assert brier_score(np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), np.array([0, 0, 1])) == pytest.approx(2.5 / 3)


def test_temperature_is_found_again() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 3)) * 2
    labels = (softmax(logits).cumsum(axis=1) > generator.random((len(logits), 1))).argmax(axis=1)
    temperature, loss = fit_temperature(logits * 0.05, labels)
    assert temperature == pytest.approx(0.05, rel=0.03)
    assert loss == pytest.approx(-np.log(softmax(logits)[np.arange(len(labels)), labels]).mean(), rel=1e-3)


def test_separated_margins_do_not_drive_the_temperature_to_zero() -> None:
    margins = np.array([[0, -1.0]] * 5 + [[0, 1.0]] * 5)
    temperature, _ = fit_temperature(margins, np.repeat([0, 1], 5))
    assert softmax(margins / temperature).max() == pytest.approx(10 / 11, abs=1e-3)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "at least one row"),
        (np.ones((3, 2)) / 2, np.zeros(2, int), r"received shape \(3, 2\), expected \(2, 2\)"),
        (np.array([[np.nan, 1.0], [0.5, 0.5]]), np.zeros(2, int), "1 of 2 rows are not finite"),
        (np.ones((2, 2)) / 2, np.array([0, -1]), "received values -1 to 0, expected 0 to 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(probabilities: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        evaluate(probabilities, labels, ("a", "b"))
