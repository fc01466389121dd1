"""Confidences from which on answers are right often enough, sets and intervals that hold the truth, tables by group."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from features.errors import ConfigurationError
from pipeline.scores.answers import (
    class_sets,
    conformal_quantile,
    faultless,
    find_threshold,
    half_width,
    is_answered,
    is_enough,
    least_probability,
    lower_bound,
    steps,
)
from pipeline.scores.groups import group_table, values_of, worst_of


@pytest.mark.parametrize(("right", "n"), [(299, 299), (298, 300), (1, 1), (50, 60), (0, 5)])
def test_the_bound_is_that_of_clopper_and_pearson(right: int, n: int) -> None:
    """At the bound, so many right answers or more are seen in one of twenty draws."""
    bound = lower_bound(right, n)
    if right:
        more = sum(math.comb(n, k) * bound**k * (1 - bound) ** (n - k) for k in range(right, n + 1))
        assert more == pytest.approx(0.05, abs=1e-9)
    for precision in (0.5, 0.8, 0.99):
        assert is_enough(right, n, precision) == (bound >= precision)


def test_each_step_is_the_least_number_of_answers_that_forgives_one_more_fault() -> None:
    found = list(steps(1000, 0.99))
    assert found == [299, 473, 628, 773, 913, 1000]
    for faults, n in enumerate(found[:-1]):
        assert is_enough(n - faults, n, 0.99)
        assert not is_enough(n - 1 - faults, n - 1, 0.99)
    assert list(steps(298, 0.99)) == []
    assert list(steps(299, 0.99)) == [299]
    assert faultless(0.99) == 299


def test_fewer_rows_than_the_bound_needs_give_no_answer() -> None:
    found = find_threshold(np.linspace(0.5, 1, 298), np.ones(298, bool), 0.99)
    assert (found.threshold, found.answered, found.coverage, found.bound, found.needed) == (None, 0, 0.0, 0.0, 299)
    assert not is_answered(np.array([1.0]), None).any()
    enough = find_threshold(np.linspace(0.5, 1, 299), np.ones(299, bool), 0.99)
    assert (enough.threshold, enough.answered, enough.coverage) == (0.5, 299, 1.0)
    assert enough.bound == pytest.approx(0.05 ** (1 / 299))


def test_the_sequence_ends_at_the_first_step_that_fails() -> None:
    """29 answers forgive no fault, 46 one, 61 two; that 61 would have passed does not count after 46 have failed."""
    confidence, right = np.linspace(1, 0, 61), np.ones(61, bool)
    right[[30, 31]] = False
    found = find_threshold(confidence, right, 0.9)
    assert (found.answered, found.right) == (29, 29)
    assert found.threshold == pytest.approx(confidence[28], abs=1e-7)
    assert is_enough(59, 61, 0.9)
    right[31] = True
    assert find_threshold(confidence, right, 0.9).answered == 61


def test_a_fault_among_the_surest_withholds_all() -> None:
    right = np.ones(500, bool)
    right[3] = False
    assert find_threshold(np.linspace(1, 0, 500), right, 0.99).threshold is None


def test_rows_that_are_just_as_sure_are_answered_too() -> None:
    confidence = np.r_[np.ones(100), np.full(100, 0.5)]
    found = find_threshold(confidence, np.arange(200) < 100, 0.9)
    assert (found.threshold, found.answered, found.right) == (1.0, 100, 100)
    assert (
        find_threshold(confidence, np.arange(200) >= 10, 0.9).threshold is None
    )  # ten of those of confidence 1 are wrong
    assert is_answered(confidence, found.threshold).sum() == 100


def test_a_threshold_means_the_same_in_float32() -> None:
    confidence = 1 - np.geomspace(1e-9, 1e-1, 100)
    found = find_threshold(confidence, np.ones(100, bool), 0.9)
    assert found.threshold == float(np.float32(found.threshold))
    assert (
        is_answered(confidence, found.threshold).sum()
        == is_answered(confidence.astype(np.float32), found.threshold).sum()
    )


def test_of_each_group_one_row_counts() -> None:
    groups = np.repeat(np.arange(40), 10)
    found = find_threshold(np.linspace(1, 0.5, 400), np.ones(400, bool), 0.9, groups)
    assert (found.n, found.answered) == (40, 40)
    assert find_threshold(np.linspace(1, 0.5, 400), np.ones(400, bool), 0.99, groups).threshold is None


def test_the_precision_asked_for_is_missed_in_at_most_one_of_twenty_draws() -> None:
    """Answers of confidence x are right with chance x, so that the precision above t is (1 + t) / 2."""
    generator, missed = np.random.default_rng(0), []
    for _ in range(300):
        confidence = generator.random(300)
        found = find_threshold(confidence, generator.random(300) < confidence, 0.8)
        if found.threshold is not None:
            missed.append((1 + found.threshold) / 2 < 0.8)
    assert len(missed) > 150
    assert np.mean(missed) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(missed))


def test_the_quantile_is_that_of_one_more_row() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))
    assert [conformal_quantile(scores, coverage) for coverage in (0.9, 0.905, 0.99, 0.995)] == [90, 91, 99, math.inf]
    assert conformal_quantile(scores[:8], 0.9) == math.inf  # nine rows are the fewest for 90 %
    assert conformal_quantile(np.arange(9), 0.9) == 8


def test_groups_count_not_their_rows() -> None:
    scores = np.arange(99.0)
    assert conformal_quantile(scores, 0.9, np.arange(99)) == conformal_quantile(scores, 0.9)
    assert conformal_quantile(scores, 0.9, np.repeat(np.arange(9), 11)) == 98
    assert conformal_quantile(scores, 0.9, np.repeat(np.arange(8), 13)[:99]) == math.inf
    large_and_small = np.r_[np.zeros(90, int), np.arange(1, 10)]  # 90 rows of one group weigh as much as one of another
    assert conformal_quantile(np.r_[np.zeros(90), np.arange(1, 10)], 0.5, large_and_small) == 5


def test_sets_hold_the_true_class_as_often_as_promised() -> None:
    """Mean coverage over draws is between the promise and the promise + 1 / (n + 1)."""
    generator, held, sizes = np.random.default_rng(1), [], []
    for _ in range(300):
        logits = generator.normal(size=(250, 4))
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        labels = np.sum(np.cumsum(probabilities, axis=1) < generator.random((250, 1)), axis=1)
        least = least_probability(probabilities[:50], labels[:50], 0.8)
        sets = class_sets(probabilities[50:], least)
        held.append(sets[np.arange(200), labels[50:]].mean())
        sizes.append(sets.sum(axis=1).mean())
    error = np.std(held) / math.sqrt(len(held))
    assert 0.8 - 3 * error <= np.mean(held) <= 0.8 + 1 / 51 + 3 * error
    assert 1 < np.mean(sizes) < 4
    assert least_probability(probabilities[:3], labels[:3], 0.8) == 0.0


def test_intervals_of_numbers_hold_the_truth_as_often_as_promised() -> None:
    generator, held = np.random.default_rng(2), []
    for _ in range(300):
        errors = generator.standard_t(3, 150)
        held.append(np.mean(np.abs(errors[50:]) <= half_width(errors[:50], np.zeros(50), 0.9)))
    error = np.std(held) / math.sqrt(len(held))
    assert 0.9 - 3 * error <= np.mean(held) <= 0.9 + 1 / 51 + 3 * error
    assert half_width(np.zeros(5), np.ones(5), 0.9) == math.inf


# --- by group ----------------------------------------------------------------------------------------------


def test_a_table_has_a_line_for_each_value_and_one_for_the_rare_ones() -> None:
    values = ["night"] * 20 + ["day"] * 30 + ["fog", "rain"]
    right = np.r_[np.arange(20) < 12, np.arange(30) < 27, True, False].astype(bool)
    day, night, others = group_table(values, right)
    assert (day["value"], day["n"], day["right"], day["accuracy"]) == ("day", 30, 27, 0.9)
    assert (night["value"], night["n"], night["right"], night["accuracy"]) == ("night", 20, 12, 0.6)
    assert night["accuracy_interval"] == pytest.approx([0.3866, 0.7812], abs=1e-4)
    assert (others["value"], others["n"], others["right"]) == (None, 2, 1)
    assert worst_of({"light": [day, night], "other": [day]}) == {**night, "column": "light"}
    assert worst_of({"light": [day, night, others]})["value"] == "night"  # rare values are no group


def test_columns_that_are_not_there_or_have_too_many_values_are_refused() -> None:
    many = tuple(str(number // 10) for number in range(3000))
    images = SimpleNamespace(columns={"camera": ("a",) * 3000, "patient": many}, groups=("g",) * 3000)
    assert values_of(images, ["camera", "group"], "x.h5") == {"camera": ("a",) * 3000, "group": ("g",) * 3000}
    with pytest.raises(
        ConfigurationError, match=r"--by camra: x\.h5 has no such column: it has camera, group, patient; did you"
    ):
        values_of(images, ["camra"], "x.h5")
    with pytest.raises(
        ConfigurationError, match="has 300 values of 10 or more images in this column; a table takes at most 200"
    ):
        values_of(images, ["patient"], "x.h5")
    with pytest.raises(ConfigurationError, match=r"has no such column: it has none\. Columns come from a manifest"):
        values_of(SimpleNamespace(columns={}, groups=None), ["camera"], "x.h5")
