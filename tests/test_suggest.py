"""Which images to label next: each strategy by its definition, and the command with and without labels."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import call_pipeline
from test_streaming import write_store

from features.errors import ConfigurationError
from features.sources.splits import SPLITS, UNLABELLED
from features.store.reader import FeatureStore
from pipeline.labels.file import SPLIT, UNKNOWN, append_decisions, new_decision, read_labels
from pipeline.labels.overlay import with_labels
from pipeline.search.choosing import STRATEGIES, Situation, typicality
from pipeline.search.vectors import normalised
from pipeline.stages.suggest import suggest

NOTHING = np.zeros((0, 4), np.float32)


def clusters(sizes: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around as many axes, and the cluster of each."""
    generator = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(sizes)), sizes)
    return normalised((np.eye(4)[of] + 0.05 * generator.normal(size=(len(of), 4))).astype(np.float32)), of


def test_typical_images_are_the_centres_of_clusters_without_a_label() -> None:
    X, of = clusters((30, 20, 10))
    chosen, scores = STRATEGIES["typical"].choose(Situation(X, NOTHING, np.zeros((60, 0))), 3)
    assert of[chosen].tolist() == [0, 1, 2]  # large clusters first
    for place, cluster in zip(chosen.tolist(), range(3), strict=True):
        rows = np.flatnonzero(of == cluster)
        assert place == rows[typicality(X[rows]).argmax()]
    assert (scores > 1).all()
    labelled = np.eye(4, dtype=np.float32)[[0]]
    chosen, _ = STRATEGIES["typical"].choose(Situation(X, labelled, np.zeros((60, 0))), 2)
    assert of[chosen].tolist() == [1, 2]


def test_typicality_is_the_inverse_of_the_mean_distance_to_the_nearest() -> None:
    X, _ = clusters((26, 0))
    distances = np.linalg.norm(X[:, None].astype(np.float64) - X[None], axis=2)
    expected = 1 / np.sort(distances, axis=1)[:, 1:21].mean(axis=1)
    np.testing.assert_allclose(typicality(X), expected, rtol=1e-3)


def test_doubtful_images_by_margin_and_by_entropy() -> None:
    P = np.array([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.6, 0.3, 0.1]])
    now = Situation(np.eye(4, dtype=np.float32), NOTHING, P)
    chosen, scores = STRATEGIES["margin"].choose(now, 3)
    assert chosen.tolist() == [1, 2, 3]
    np.testing.assert_allclose(scores, [1, 0.9, 0.7])
    chosen, scores = STRATEGIES["entropy"].choose(now, 4)
    assert chosen.tolist() == [2, 3, 1, 0]
    assert scores[2] == pytest.approx(np.log(2) / np.log(3))


def test_doubtful_images_that_are_alike_are_not_all_chosen() -> None:
    X, of = clusters((20, 3, 3))
    P = np.full((26, 2), 0.5)
    P[of > 0] = [0.6, 0.4]  # less doubtful than twenty that are alike
    chosen, _ = STRATEGIES["spread-margin"].choose(Situation(X, NOTHING, P), 3)
    assert sorted(of[chosen].tolist()) == [0, 1, 2]
    assert of[STRATEGIES["margin"].choose(Situation(X, NOTHING, P), 3)[0]].tolist() == [0, 0, 0]


def test_the_farthest_image_comes_first() -> None:
    X, of = clusters((5, 5, 5))
    labelled = np.eye(4, dtype=np.float32)[[1]]
    chosen, scores = STRATEGIES["k-centre"].choose(Situation(X, labelled, np.zeros((15, 0))), 6)
    known = [*labelled]
    for place, score in zip(chosen.tolist(), scores.tolist(), strict=True):
        far = 1 - (X @ np.stack(known).T).max(axis=1)
        assert place == far.argmax()
        assert score == pytest.approx(far.max(), abs=1e-6)
        known.append(X[place])
    assert set(of[chosen[:2]].tolist()) == {0, 2}
    assert len(set(STRATEGIES["k-centre"].choose(Situation(X, NOTHING, np.zeros((15, 0))), 15)[0].tolist())) == 15


def store_of(path: Path, sizes: tuple[int, ...] = (40, 40), labelled: int = 0) -> FeatureStore:
    """Rows of clusters; the first ``labelled`` of each have it as their label and are in train, the others are free."""
    X, of = clusters(sizes)
    place = np.arange(len(of)) - np.concatenate([[0], np.cumsum(sizes)])[of]
    labels = np.where(place < labelled, of, -1)
    return write_store(path, [X], labels, np.where(labels >= 0, 0, UNLABELLED))


def test_it_begins_without_any_label(tmp_path: Path) -> None:
    store = store_of(tmp_path / "features.h5")
    found = suggest(store, n=4)
    assert sorted((found.rows[:2] // 40).tolist()) == [0, 1]
    assert len(set(found.rows.tolist())) == 4
    assert found.predicted == ("",) * 4
    assert sorted(suggest(store, n=1000).rows.tolist()) == list(range(80))
    with pytest.raises(ConfigurationError, match="needs labelled training images of two classes, or a head"):
        suggest(store, strategy="margin")


def test_a_head_is_trained_on_what_is_labelled(tmp_path: Path) -> None:
    store = store_of(tmp_path / "features.h5", labelled=8)
    found = suggest(store, n=10)
    assert not set(found.rows.tolist()) & set(np.flatnonzero(store.images.labels >= 0).tolist())
    assert [int(name) for name in found.predicted] == (found.rows // 40).tolist()

    class Head:
        classes = ("a", "b", "c")

        def predict_proba(self, X: np.ndarray) -> np.ndarray:
            P = np.tile([0.8, 0.2, 0.0], (len(X), 1))
            P[np.abs(X[:, 0] - store.array()[:, 0][33, 0]) < 1e-7] = [0.1, 0.4, 0.5]
            return P

    found = suggest(store, Head(), n=1, strategy="margin")
    assert (found.rows.tolist(), found.predicted) == ([33], ("c",))
    assert found.scores[0] == pytest.approx(0.9)


@pytest.mark.slow
def test_labels_of_validation_images_teach_nothing(tmp_path: Path) -> None:
    """A head never learns from them: they end no cold start, and their clusters still want a training label."""
    X, of = clusters((60, 40))
    labels, splits = np.full(100, -1), np.full(100, UNLABELLED)
    labels[:30], splits[:30] = 0, SPLITS.index("validation")
    store = write_store(tmp_path / "held.h5", [X], labels, splits)
    for strategy in ("mix", "typical"):
        assert sorted(of[suggest(store, n=2, strategy=strategy).rows]) == [0, 1]
    labels[[30, 60]], splits[[30, 60]] = [0, 1], SPLITS.index("train")
    store = write_store(tmp_path / "begun.h5", [X], labels, splits)
    begun, typical = (suggest(store, n=2, strategy=strategy) for strategy in ("mix", "typical"))
    assert begun.rows.tolist() == typical.rows.tolist()
    assert (begun.scores > 1).all()  # typicality; a doubt is 1 at most
    labels[:30], splits[:30] = -1, UNLABELLED
    alone = write_store(tmp_path / "alone.h5", [X[30:]], labels[30:], splits[30:])
    farthest = suggest(alone, n=3, strategy="k-centre").rows + 30
    assert suggest(store, n=3, strategy="k-centre").rows.tolist() == farthest.tolist()


def test_what_was_decided_is_not_suggested_again(tmp_path: Path) -> None:
    store, path = store_of(tmp_path / "features.h5"), tmp_path / "labels.csv"
    hashes = store.images.sha256
    append_decisions(
        path,
        [new_decision(hashes[row], "", str(row // 40), by="ann") for row in (0, 1, 2, 3, 4, 5, 40, 41, 42, 43, 44)],
    )
    append_decisions(path, [new_decision(hashes[row], "", UNKNOWN, by="ann") for row in (6, 45)])
    found = suggest(store, n=80, labels=path)
    assert sorted(found.rows.tolist()) == [*range(7, 40), *range(46, 80)]
    assert set(found.predicted) == {"0", "1"}


def test_images_for_validation_are_drawn_at_random_and_entered_first(tmp_path: Path) -> None:
    store, path = store_of(tmp_path / "features.h5"), tmp_path / "labels.csv"
    done = call_pipeline("suggest", store.path, "-n", 12, "--for", "validation", "--labels", path, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["strategy"], len(document["images"])) == ("random", 12)
    drawn = [int(item["path"].split("/")[1][:7]) for item in document["images"]]
    assert 2 < sum(row < 40 for row in drawn) < 10
    assert [decision.value for decision in read_labels(path).decisions] == ["validation"] * 12
    assert not set(suggest(store, n=80, labels=path).rows.tolist()) & set(drawn)
    append_decisions(path, [new_decision(store.images.sha256[row], "", str(row // 40)) for row in [*drawn, 0, 79]])
    states = with_labels(store, path)
    assert states.rows("validation").tolist() == sorted(drawn)
    assert set(states.rows("train").tolist()) == {0, 79} - set(drawn)
    refused = call_pipeline("suggest", store.path, "--for", "validation")
    assert refused.returncode == 2
    assert "needs --labels FILE" in refused.stderr


def test_a_store_whose_images_all_have_a_label_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "features.h5", labelled=40)
    done = call_pipeline("suggest", store.path)
    assert done.returncode == 2
    assert "no image is left to suggest: of its 80 images, 80 have a label. bottleneck audit" in done.stderr


def test_images_that_would_not_become_training_images_are_not_suggested_for_training(tmp_path: Path) -> None:
    X, of = clusters((20, 20))
    labels, splits = np.where(np.arange(40) < 10, of, -1), np.where(np.arange(40) < 10, 0, UNLABELLED)
    labels[20], splits[20] = 1, 1  # validation, of the group of rows 21 and 22
    store, path = write_store(tmp_path / "features.h5", [X], labels, splits), tmp_path / "labels.csv"
    groups = [f"g{row}" for row in range(40)]
    groups[21] = groups[22] = groups[20]
    groups[31] = groups[30]
    groups[11] = groups[0]  # a training image
    store.__dict__["images"] = dataclasses.replace(store.images, groups=tuple(groups))
    assert sorted(suggest(store, n=40).rows.tolist()) == [*range(10, 20), *range(23, 40)]
    append_decisions(path, [new_decision(store.images.sha256[30], "", "validation", target=SPLIT)])
    assert sorted(suggest(store, n=40, labels=path).rows.tolist()) == [*range(10, 20), *range(23, 30), *range(32, 40)]
    validation = suggest(store, n=40, purpose="validation", labels=path).rows.tolist()
    assert validation == [10, *range(12, 20), *range(23, 30), *range(31, 40)]


def test_the_list_is_written_best_first(tmp_path: Path) -> None:
    store = store_of(tmp_path / "features.h5", labelled=6)
    done = call_pipeline("suggest", store.path, "-n", 5, "--strategy", "margin", "--out", tmp_path / "next.csv")
    assert done.returncode == 0, done.stderr
    assert "12 images labelled; next, by margin:" in done.stdout
    with open(tmp_path / "next.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert len({row["sha256"] for row in rows}) == 5
    assert SPLITS[store.images.splits[-1]] == "unlabelled"
