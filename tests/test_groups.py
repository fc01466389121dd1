"""Whole groups in splits and folds, and advice about empty splits that looks at the cause and leads out of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import NumpyNetwork, paint
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import HeadError
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources.advice import empty_splits
from features.sources.scan import scan
from features.sources.splits import SplitRule, assign_splits
from features.store.reader import FeatureStore
from pipeline.api.heads import folds_of as parse_folds
from pipeline.cli import main
from pipeline.heads.gather import needs_rows
from pipeline.scores.selection import stratified_folds


def divided(
    groups: Sequence[str], labels: Sequence[int], rule: str = "stratified", given_splits: Sequence[int] | None = None
) -> list[int]:
    contents = np.random.default_rng(0).integers(0, 256, (len(groups), 32), dtype=np.uint8)
    before = np.full(len(groups), -1, np.int8) if given_splits is None else np.array(given_splits, np.int8)
    splits, warnings = assign_splits(np.array(labels), before, list(groups), contents, SplitRule.parse(rule))
    assert not warnings
    return [int(split) for split in splits]


def of_groups(groups: Sequence[str], splits: Sequence[int]) -> dict[str, int]:
    return dict(zip(groups, splits, strict=True))


# --- the split rule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_four_speakers_fill_three_splits(seed: int) -> None:
    """Each says all words. By hash all four of them may be in train."""
    groups = [f"speaker {number // 10}" for number in range(40)]
    splits = divided(groups, [number % 2 for number in range(40)], f"stratified:0.6,0.2,0.2@{seed}")
    assert sorted(of_groups(groups, splits).values()) == [0, 0, 1, 2]
    assert of_groups(groups, splits) == of_groups(groups[::-1], splits[::-1])  # a group is in one split


def test_whole_groups_meet_the_shares_of_each_class() -> None:
    generator = np.random.default_rng(1)
    groups, labels = [], []
    for number in range(200):
        for label in generator.choice(4, generator.integers(1, 12), p=[0.6, 0.25, 0.1, 0.05]):
            groups.append(f"g{number}")
            labels.append(int(label))
    splits = np.array(divided(groups, labels, "stratified:0.7,0.15,0.15"))
    for label in range(4):
        shares = np.bincount(splits[np.array(labels) == label], minlength=3) / labels.count(label)
        np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=0.04)


def test_a_rare_class_is_in_train_first_and_then_elsewhere() -> None:
    groups = [f"g{number}" for number in range(12) for _ in range(5)]
    labels = [1 if group in ("g3", "g7", "g8") else 0 for group in groups]
    splits = of_groups(groups, divided(groups, labels))
    assert sorted(splits[group] for group in ("g3", "g7", "g8")) == [0, 1, 2]
    assert of_groups(["a"] * 5, divided(["a"] * 5, [0] * 5)) == {"a": 0}
    lone = divided(["a"] * 5 + ["b"] * 50, [1] * 5 + [0] * 50)
    assert set(lone) == {0}  # a class of one group is in train, whatever the shares


def test_images_without_a_group_are_divided_as_without_groups() -> None:
    groups = ["a"] * 4 + ["b"] * 4 + [""] * 10
    splits = divided(groups, [0] * 18, "stratified:0.5,0.5")
    assert [splits[8:].count(split) for split in (0, 1)] == [5, 5]
    assert len(set(splits[:4])) == len(set(splits[4:8])) == 1


def test_given_train_images_are_moved_in_whole_groups() -> None:
    groups = [f"speaker {number // 10}" for number in range(50)]
    labels, before = [number % 2 for number in range(50)], [0] * 40 + [2] * 10
    splits = divided(groups, labels, "stratified+validation-from-train:0.25", before)
    assert sorted(of_groups(groups, splits).values()) == [0, 0, 0, 1, 2]
    assert set(splits[40:]) == {2}


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=60),
    st.sampled_from(["stratified", "stratified:0.5,0.5", "stratified:0.4,0.3,0.3"]),
)
def test_groups_never_cross_and_no_split_is_empty_for_lack_of_will(rows: list[tuple[int, int]], rule: str) -> None:
    groups, labels = [f"g{group}" for group, _ in rows], [0 for _ in rows]
    splits = of_groups(groups, divided(groups, labels, rule))
    wanted = 2 if rule.endswith("0.5,0.5") else 3
    assert len(set(splits.values())) == min(wanted, len(splits))
    assert 0 in splits.values()
    divided(groups, [label for _, label in rows], rule)  # and for several classes no group crosses, as it asserts


# --- advice -----------------------------------------------------------------------------------------------


def advice(
    count: int,
    rule: str = "hash",
    *,
    groups: list[str] | None = None,
    before: list[int] | None = None,
    known: bool = False,
) -> dict[str, str]:
    contents = np.random.default_rng(3).integers(0, 256, (count, 32), dtype=np.uint8)
    labels, start = np.arange(count) % 2, np.full(count, -1, np.int8) if before is None else np.array(before, np.int8)
    splits, _ = assign_splits(labels, start, groups, contents, SplitRule.parse(rule))
    return empty_splits(labels, splits, groups, contents, rule, start if known else None)


def test_the_advice_looks_at_the_cause() -> None:
    speakers = [f"speaker {number % 4}" for number in range(40)]
    assert advice(400) == {}
    assert advice(40, "hash:1.0,0.0,0.0")["validation"] == (
        "the split rule hash:1.0,0.0 leaves none for it: extract again with --split hash:0.8,0.1,0.1"
    )
    [few] = advice(4).values()
    assert (
        few
        == "chance left none of 4 images for it: extract again with --split stratified:0.6,0.2,0.2, which is exact even for few images"
    )
    of_speakers = advice(40, "hash:0.98,0.01,0.01", groups=speakers)["validation"]
    assert "chance left none of 4 groups for it: extract again with --split stratified:0.6,0.2,0.2" in of_speakers
    assert advice(40, "stratified:0.6,0.2,0.2", groups=speakers) == {}
    assert "all images are of one group" in advice(40, groups=["me"] * 40)["validation"]
    assert (
        "2 groups cannot fill three splits: extract again with --split stratified:0.75,0.25"
        in advice(40, "stratified", groups=[f"g{number % 2}" for number in range(40)])["test"]
    )
    assert advice(200, before=[0] * 150 + [2] * 50)["validation"] == (
        "the source gives its splits: extract again with --validation-from-train 0.1"
    )
    grouped = advice(40, before=[0] * 40, groups=speakers, known=True)["validation"]
    assert grouped.endswith(
        "extract again with --split stratified --validation-from-train 0.25, which takes whole groups"
    )
    assert "--test-from-validation 0.5" in advice(200, before=[0] * 150 + [1] * 50)["test"]
    assert "no train images: add them" in advice(20, before=[1] * 10 + [2] * 10)["train"]
    assert "no validation images: add them" in advice(20, before=[0] * 20)["test"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("groups", [None, [f"speaker {number % 4}" for number in range(40)]])
@pytest.mark.parametrize("before", [None, [0] * 40, [0] * 30 + [2] * 10])
@pytest.mark.parametrize("rule", ["hash", "hash:0.98,0.01,0.01", "hash:1.0,0.0,0.0", "stratified:0.98,0.01,0.01"])
def test_following_the_advice_gives_validation_images(
    rule: str, before: list[int] | None, groups: list[str] | None, known: bool
) -> None:
    """In two steps; in four where a store does not say whether its source gave the splits."""
    said: str | None = None
    for _ in range(3 if known else 5):
        said = advice(40, rule, groups=groups, before=before, known=known).get("validation")
        if said is None:
            return
        words = said.partition("extract again with ")[2].replace(", which", "").split()
        options = dict(zip(words[::2], words[1::2], strict=False))
        share = options.get("--validation-from-train")
        rule = options.get("--split", rule.partition("+")[0]) + (f"+validation-from-train:{share}" if share else "")
    pytest.fail(f"the advice loops: {said}")


def test_classes_of_which_no_image_could_be_read() -> None:
    table = SimpleNamespace(
        labels=np.full(2, -1), splits=np.full(2, 3), groups=None, sha256=np.zeros((2, 32), np.uint8), target=None,
        strata=np.full(2, -1),
    )  # fmt: skip
    store = SimpleNamespace(
        path="f.h5", classes=("cat",), images=table, split_rule="hash", rows=lambda split: (), labelled_by={}
    )
    with pytest.raises(HeadError, match="no train rows: no image with a label could be read"):
        needs_rows(store, "train")


def test_it_is_said_at_extraction_and_again_at_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "photos"
    for number in range(40):
        split, kind = ("train", "test")[number // 30], ("cat", "dog")[number % 2]
        paint(root / split / kind / f"{number}.png", (number, 9, 9))
    options = ExtractionOptions(batch_size=8, workers=1)
    store = Extraction(scan(root), NumpyNetwork(), tmp_path / "f.h5", options).run().store  # type: ignore[arg-type]
    said = "the source gives its splits: extract again with --validation-from-train 0.25"
    assert f"no labelled image is in validation: {said}" in caplog.text
    with pytest.raises(HeadError, match="there are no validation rows: ") as caught:
        needs_rows(store, "train", "validation")
    assert f"{said} (features are kept)" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "splits", "sets", "expected"),
    [
        ("", ("train", "validation"), ("out_relu.avg",), "train-head f.h5 --head logistic\n"),
        ("", ("train", "validation"), ("a", "b"), "train-head f.h5 --head logistic --features a\n"),
        ("", ("train", "test"), ("out_relu.avg",), ""),
        ("--layer boundary", ("train", "validation"), ("block|15",), "finetune runs --from-cache f.h5\n"),
    ],
)
def test_the_next_command_works_on_the_store(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, splits: tuple[str, ...],
    sets: tuple[str, ...], expected: str,
) -> None:  # fmt: skip
    document = {"classes": {"cat": 1, "dog": 1}, "splits": dict.fromkeys(splits, 1), "data_sets": dict.fromkeys(sets)}
    monkeypatch.setattr("pipeline.stages.extract.run", lambda *_, **__: document)
    monkeypatch.setattr("pipeline.stages.extract.summary", lambda _: "")
    assert main(["extract", "photos", "--out", "f.h5", *options.split()]) == 0
    assert capsys.readouterr().err == (f"next: bottleneck {expected}" if expected else "")


# --- folds ------------------------------------------------------------------------------------------------


def test_one_group_is_left_out_at_a_time() -> None:
    groups = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    y = np.array([0, 1, 0, 1, 1, 0, 1, 0, 1, 0])
    folds = stratified_folds(y, 4, 0, groups)
    assert folds.tolist() == groups.tolist()
    assert stratified_folds(y, 9, 1, groups).tolist() == groups.tolist()
    assert len(np.unique(stratified_folds(y, 2, 0, groups))) == 2


@pytest.mark.slow
def test_folds_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    rows = "".join(f"{number}.png,{'ab'[number % 2]},g{number % 5},train\n" for number in range(30))
    for number in range(30):
        paint(tmp_path / f"{number}.png", (number, 1, 1))
    (tmp_path / "m.csv").write_text("path,label,group,split\n" + rows)
    options = ExtractionOptions(batch_size=8, workers=1)
    source = scan(tmp_path / "m.csv")
    store = Extraction(source, NumpyNetwork(), tmp_path / "f.h5", options).run().store  # type: ignore[arg-type]
    assert parse_folds("leave-one-group-out", [store]) == 5
    assert (parse_folds("3", [store]), parse_folds(None, [store])) == (3, None)
    with pytest.raises(ValueError, match="--folds: received 'many', expected a number, or leave-one-group-out"):
        parse_folds("many", [store])
    (tmp_path / "n.csv").write_text(
        "path,label\n" + "".join(f"{number}.png,{'ab'[number % 2]}\n" for number in range(30))
    )
    plain = Extraction(scan(tmp_path / "n.csv"), NumpyNetwork(), tmp_path / "g.h5", options).run().store  # type: ignore[arg-type]
    with pytest.raises(HeadError, match="has no groups"):
        parse_folds("leave-one-group-out", [FeatureStore.open(plain.path)])
