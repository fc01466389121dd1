"""Decisions over a store: which labels and splits are in effect, what is counted, and what never changes."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import paint_folder
from labelling import Book, coloured_store
from targeted import labels_of, target_store, thirds

from features.errors import ConfigurationError, LabelsError
from features.sources.scan import scan
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from features.store.relabelled import RelabelledStore
from features.targets import Target
from pipeline.labels.file import EXCLUDE, LABEL, SEEN, UNKNOWN, WITHDRAWN, append_decisions, new_decision, read_labels
from pipeline.labels.overlay import (
    Counts,
    effective,
    effective_target,
    excluded_rows,
    labelled_images,
    target_of,
    with_labels,
)

CLASSES = ("cat", "dog")
NAMES = "abcdefgh"
HASHES = np.array([list(hashlib.sha256(name.encode()).digest()) for name in NAMES], np.uint8)
# a, b: cats of train; c, d: dogs of train; e: cat of validation; f: dog of test; g, h: unlabelled
GIVEN, SPLIT = np.array([0, 0, 1, 1, 0, 1, -1, -1], np.int32), np.array([0, 0, 0, 0, 1, 2, 3, 3], np.int8)


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "labels.csv")


def applied(book: Book, groups: Sequence[str] | None = None, sha256: np.ndarray = HASHES) -> tuple[dict, Counts]:
    """Name -> class and split of each row, and the counts."""
    found = effective(read_labels(book.path), CLASSES, GIVEN, SPLIT, groups, sha256)
    labels = [None if label < 0 else found.classes[label] for label in found.labels]
    return dict(zip(NAMES, zip(labels, [SPLITS[k] for k in found.splits], strict=True), strict=True)), found.counts


def plain() -> dict:
    labels = [None if label < 0 else CLASSES[label] for label in GIVEN]
    return dict(zip(NAMES, zip(labels, [SPLITS[k] for k in SPLIT], strict=True), strict=True))


def test_corrections_keep_every_split(book: Book) -> None:
    book.add("a", "dog").add("e", "dog").add("f", "cat").add("b", "cat")
    rows, counts = applied(book)
    assert rows == plain() | {"a": ("dog", "train"), "e": ("dog", "validation"), "f": ("cat", "test")}
    assert counts == Counts(decided=4, corrected=3, tested=1)
    assert str(counts) == "3 labels corrected; 1 of these in the test split"


def test_unknown_and_excluded_rows_take_no_part_and_come_back(book: Book) -> None:
    book.add("a", UNKNOWN).add("e", EXCLUDE).add("g", UNKNOWN)
    rows, counts = applied(book)
    assert rows == plain() | {"a": (None, "unlabelled"), "e": (None, "unlabelled")}
    assert counts == Counts(decided=3, unknown=2, excluded=1)
    assert str(counts) == "2 unknown and 1 excluded (not trained on, not scored)"
    book.add("a", WITHDRAWN).add("e", "cat")
    rows, counts = applied(book)
    assert rows == plain()
    assert counts == Counts(decided=2, unknown=1)


def test_a_row_that_is_labelled_becomes_a_training_row(book: Book) -> None:
    book.add("g", "wolf").add("h", "cat")
    rows, counts = applied(book)
    assert rows == plain() | {"g": ("wolf", "train"), "h": ("cat", "train")}
    assert counts == Counts(decided=2, added=2, new_classes=("wolf",))
    assert str(counts) == "2 labels added; new: 'wolf'"


def test_a_row_takes_the_split_of_its_group_and_of_its_bytes(book: Book) -> None:
    book.add("g", "cat").add("h", "dog")
    groups = ["", "", "", "", "farm", "", "farm", ""]
    sha256 = HASHES.copy()
    sha256[5] = sha256[7]  # f, a row of test, has the bytes of h
    rows, _ = applied(book, groups, sha256)
    assert rows == plain() | {"g": ("cat", "validation"), "h": ("dog", "test")}
    book.add("e", EXCLUDE)  # a row that takes no part keeps its split for the others of its group
    assert applied(book, groups, sha256)[0]["g"] == ("cat", "validation")


def test_an_image_that_was_drawn_for_validation_goes_there_when_it_is_labelled(book: Book) -> None:
    book.add("g", "validation", "split").add("a", "validation", "split")
    assert applied(book)[0] == plain()
    book.add("g", "dog").add("h", "dog")
    assert applied(book)[0] == plain() | {"g": ("dog", "validation"), "h": ("dog", "train")}
    book.add("h", "validation", "split").add("g", "train", "split")  # too late: a split never changes
    assert applied(book)[0] == plain() | {"g": ("dog", "validation"), "h": ("dog", "train")}
    assert applied(book)[1] == Counts(decided=2, added=2)


def test_the_first_of_a_group_that_is_labelled_decides_for_the_group(book: Book) -> None:
    groups = ["", "", "", "", "", "", "farm", "farm"]
    book.add("h", "validation", "split").add("g", "cat").add("h", "cat")
    expected = plain() | {"g": ("cat", "train"), "h": ("cat", "train")}
    assert applied(book, groups)[0] == expected
    book.add("g", WITHDRAWN)
    assert applied(book, groups)[0] == expected | {"g": (None, "unlabelled")}


def test_a_drawn_split_may_be_withdrawn_and_another_word_is_refused(book: Book) -> None:
    book.add("g", "test", "split").add("g", WITHDRAWN, "split").add("g", "cat").add("h", "validation", "split")
    assert applied(book)[0]["g"] == ("cat", "train")
    book.add("h", "holdout", "split")
    with pytest.raises(
        LabelsError, match="about the split of an image says 'holdout'; expected train, validation or test"
    ):
        applied(book)


def test_classes_that_no_row_has_any_more_go_and_classes_stay_sorted(book: Book) -> None:
    book.add("c", "ape").add("d", "zebra").add("f", "class:unknown")
    found = effective(read_labels(book.path), CLASSES, GIVEN, SPLIT, None, HASHES)
    assert found.classes == ("ape", "cat", "unknown", "zebra")
    assert found.labels.tolist() == [1, 1, 0, 3, 1, 2, -1, -1]
    assert (found.counts.new_classes, found.counts.gone_classes) == (("ape", "unknown", "zebra"), ("dog",))
    # a class of the data set that had no row before, because its images could not be read, stays
    found = effective(read_labels(book.path), (*CLASSES, "emu"), GIVEN, SPLIT, None, HASHES)
    assert found.classes == ("ape", "cat", "emu", "unknown", "zebra")


def test_decisions_about_other_images_and_targets_are_counted(book: Book) -> None:
    book.add("a", "dog").add("x", "dog").add("x", "cat").add("y", "cat").add("a", "sunny", "weather")
    rows, counts = applied(book)
    assert rows == plain() | {"a": ("dog", "train")}
    assert counts == Counts(decided=1, corrected=1, elsewhere=2, other_targets=1)
    assert str(counts) == "1 label corrected; 2 images not here; 1 decision about another target"


def test_the_target_of_a_manifest_is_named(book: Book) -> None:
    book.add("a", "dog", "species").add("b", "dog", "genus")
    labels = read_labels(book.path)
    assert effective(labels, CLASSES, GIVEN, SPLIT, None, HASHES, "species").labels[:2].tolist() == [1, 0]


# -- over a real store, with a numpy function for the network
@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return coloured_store(tmp_path_factory.mktemp("store"), train=4, validation=2)


def digest(store: FeatureStore, row: int) -> str:
    return store.images.sha256[row].tobytes().hex()


def test_a_store_under_labels_is_a_store(store: FeatureStore, book: Book) -> None:
    row = int(store.rows("train")[0])
    book.add(digest(store, row), "dog").add(digest(store, 1), EXCLUDE)
    labelled = with_labels(store, book.path)
    assert (store.classes[store.images.labels[row]], labelled.classes[labelled.images.labels[row]]) == ("cat", "dog")
    assert 1 in store.rows("train")
    assert labelled.rows("train").tolist() == [k for k in store.rows("train").tolist() if k != 1]
    assert labelled.rows("unlabelled").tolist() == [1]
    assert labelled.data_digest != store.data_digest
    assert (labelled.names, labelled.recipes, len(labelled)) == (store.names, store.recipes, len(store))
    assert np.array_equal(labelled.array(), store.array())
    X, y = labelled.load("train")
    assert (len(X), y[0]) == (len(y), 1)
    assert excluded_rows(store, read_labels(book.path)).tolist() == [k == 1 for k in range(len(store))]
    assert labelled.labelled_by == {
        "path": str(book.path),
        "sha256": hashlib.sha256(book.path.read_bytes()).hexdigest(),
        "size": book.path.stat().st_size,
        "decisions": 2,
        "decided": 2,
        "corrected": 1,
        "added": 0,
        "unknown": 0,
        "excluded": 1,
        "tested": 0,
        "new_classes": 0,
        "gone_classes": 0,
        "elsewhere": 0,
        "other_targets": 0,
        "seen": 0,
    }
    assert (store.labelled_by, target_of(store), labelled.original is store) == ({}, "label", True)


def test_taking_a_decision_back_gives_the_same_data_digest(store: FeatureStore, book: Book) -> None:
    book.add(digest(store, 0), "wolf")
    assert with_labels(store, book.path).classes == ("cat", "dog", "wolf")
    book.add(digest(store, 0), WITHDRAWN)
    assert with_labels(store, book.path).data_digest == store.data_digest
    assert with_labels(store, book.path).classes == store.classes


def test_another_process_sees_the_same_labels(store: FeatureStore, book: Book) -> None:
    labelled = with_labels(store, book.add(digest(store, 0), "wolf").path)
    book.path.unlink()
    again = pickle.loads(pickle.dumps(labelled))  # noqa: S301  # our own
    assert isinstance(again, RelabelledStore)
    assert (again.data_digest, again.classes, again.labelled_by) == (
        labelled.data_digest,
        labelled.classes,
        labelled.labelled_by,
    )
    assert np.array_equal(again.images.labels, labelled.images.labels)
    assert np.array_equal(again.array(), store.array())


def test_a_labels_file_of_another_data_set_is_refused(store: FeatureStore, book: Book) -> None:
    book.add("x", "dog").add("y", "dog")
    with pytest.raises(
        LabelsError, match=r"labels.csv: none of its 2 decisions is about one of the 12 images of .*\.h5"
    ):
        with_labels(store, book.path)
    book.path.write_text("# bottleneck-labels 1\n")
    assert with_labels(store, book.path).data_digest == store.data_digest


def test_labels_of_another_length_are_refused(store: FeatureStore) -> None:
    few = np.zeros(3, np.int32)
    with pytest.raises(ConfigurationError, match=r"labels: received \(3,\), expected 12 numbers from -1 to 1"):
        RelabelledStore(store, store.classes, few, few.astype(np.int8), {})


# -- stores of another task
def target_of_rows(values: list[list[float]], kind: str) -> Target:
    return Target("tags", ("big", "red")[: len(values[0])], np.array(values, kind))


def test_several_labels_and_their_splits(book: Book) -> None:
    given = target_of_rows([[1, 0]] * 6 + [[255, 255]] * 2, "u1")
    book.add("a", "red").add("b", ";").add("e", "big | red").add("f", UNKNOWN).add("g", "red;big", "tags")
    found, splits, counts = effective_target(read_labels(book.path), given, SPLIT, None, HASHES, "tags")
    expected = [[0, 1], [0, 0], [1, 0], [1, 0], [1, 1], [255, 255], [1, 1], [255, 255]]
    assert (found.values.tolist(), found.values.dtype, found.columns) == (expected, np.uint8, ("big", "red"))
    assert [SPLITS[k] for k in splits] == [*4 * ["train"], "validation", "unlabelled", "train", "unlabelled"]
    assert counts == Counts(decided=5, corrected=3, added=1, unknown=1, tested=1)
    book.add("a", "blue")
    with pytest.raises(LabelsError, match="the label 'blue' is none of the target, expected big, red"):
        effective_target(read_labels(book.path), given, SPLIT, None, HASHES, "tags")


def test_numbers(book: Book) -> None:
    given = target_of_rows([[1.5, 2]] * 6 + [[np.nan, np.nan]] * 2, "<f8")
    book.add("a", "1.5;2").add("b", "-3; 4e2").add("c", ";7").add("g", "0;0")
    found, splits, counts = effective_target(read_labels(book.path), given, SPLIT, None, HASHES, "tags")
    np.testing.assert_array_equal(
        found.values[[0, 1, 2, 6, 7]], [[1.5, 2], [-3, 400], [np.nan, 7], [0, 0], 2 * [np.nan]]
    )
    assert counts == Counts(decided=4, corrected=2, added=1)
    assert splits.tolist() == [0, 0, 0, 0, 1, 2, 0, 3]
    for wrong in ("1", "1;x", "1;inf", "1;2;3"):
        book.add("a", wrong)
        with pytest.raises(
            LabelsError, match=f"received '{wrong}', expected 2 numbers with ';' between them, of big, red"
        ):
            effective_target(read_labels(book.path), given, SPLIT, None, HASHES, "tags")


def test_a_store_of_another_task_under_labels(book: Book, tmp_path: Path) -> None:
    X, values = labels_of(20)
    store = target_store(tmp_path / "tags.h5", X, values, thirds(20), ("a", "b", "c"))
    book.add(digest(store, 0), "a;c" if values[0].tolist() != [1, 0, 1] else "b").add(digest(store, 1), EXCLUDE)
    labelled = with_labels(store, book.path)
    assert labelled.y[0].tolist() == ([1, 0, 1] if values[0].tolist() != [1, 0, 1] else [0, 1, 0])
    np.testing.assert_array_equal(labelled.y[2:], values[2:])
    assert labelled.rows("unlabelled").tolist() == [1]
    assert labelled.data_digest != store.data_digest
    again = pickle.loads(pickle.dumps(labelled))  # noqa: S301  # our own
    assert again.data_digest == labelled.data_digest
    book.add(digest(store, 0), WITHDRAWN).add(digest(store, 1), WITHDRAWN)
    assert with_labels(store, book.path).data_digest == store.data_digest
    with pytest.raises(LabelsError, match="none of its 1 decision is about one of the 20 images"):
        with_labels(store, Book(tmp_path / "other.csv").add("x", "a").path)


def test_images_that_an_audit_has_judged_before_are_counted_where_files_are_scored(tmp_path: Path) -> None:
    """Files have no split there; they were test images when the audit noted them."""
    folder, file = paint_folder(tmp_path / "photos", {"cat": 3, "dog": 2}), tmp_path / "labels.csv"
    hashes = [hashlib.sha256((folder / name).read_bytes()).digest() for name in ("cat/0000.png", "dog/0001.png")]
    append_decisions(file, [new_decision(sha256, "", "audit", target=SEEN) for sha256 in hashes])
    append_decisions(file, [new_decision(hashes[0], "", "dog", by="ann")])
    with ThreadPoolExecutor(1) as pool:
        found, counts = labelled_images(scan(folder), read_labels(file), LABEL, pool)
    assert (counts.seen, counts.corrected) == (2, 1)
    assert "2 test images judged by an audit before" in str(counts)
    assert [found.classes[label] for label in found.labels] == ["dog", "cat", "cat", "dog", "dog"]
