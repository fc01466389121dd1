"""The audit: what each check finds in made-up features, by value; its file and document; what it writes into labels.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import call_pipeline, recipe
from PIL import Image, ImageFilter

from features.errors import ConfigurationError
from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec, ImageTable, Quarantine
from features.store.writer import StoreWriter
from pipeline.auditing import audit, confident
from pipeline.auditing.applying import suggestions
from pipeline.auditing.pixels import measures_of
from pipeline.auditing.stage import CHECKS, COLUMNS, document, summary, write_csv
from pipeline.labels.file import SEEN, read_labels
from pipeline.labels.overlay import with_labels
from pipeline.reporting.audited import read_audit
from pipeline.reporting.thumbnails import Pictures

TRAIN, VALIDATION, TEST, UNLABELLED = range(4)


def made_store(
    path: Path,
    X: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    splits: Sequence[int] | np.ndarray | None = None,
    *,
    same: Mapping[int, int] | None = None,
    groups: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    sizes: np.ndarray | None = None,
) -> FeatureStore:
    """A store of ready-made vectors; ``same`` names rows that have the bytes of another row."""
    labels, count = np.asarray(labels, np.int32), len(labels)
    splits = np.zeros(count, np.int8) if splits is None else np.asarray(splits, np.int8)
    sizes = np.full(count, 200, np.int32) if sizes is None else sizes.astype(np.int32)
    spec = FeatureSpec(recipe(), 1, X.shape[1:])
    writer = StoreWriter(path, kind="store", rows=count, features={spec.recipe.name: spec})
    writer.append(spec.recipe.name, X[:, None].astype(np.float32))
    sha256 = np.zeros((count, 32), np.uint8)
    sha256[:, :8] = np.arange(count, dtype="<i8").view(np.uint8).reshape(count, 8)
    for row, other in (same or {}).items():
        sha256[row] = sha256[other]
    long = np.ones(count, np.int64)
    paths = tuple(f"{label}/{row:04d}.png" for row, label in enumerate(labels.tolist()))
    table = ImageTable(
        paths,
        sha256,
        labels,
        splits,
        None if groups is None else tuple(groups),
        sizes,
        sizes,
        long,
        long,
        {name: tuple(values) for name, values in (columns or {}).items()},
    )
    none = Quarantine((), sha256[:0], (), long[:0], long[:0])
    writer.finish(images=table, quarantine=none, classes=[f"class {k}" for k in range(labels.max() + 1)])
    return FeatureStore.open(path)


def blobs(count: int, classes: int = 3, columns: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around one centre for each class, and their labels, in turn."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = 4 * np.eye(columns)[:classes]
    return 2 + centres[labels] + 0.7 * generator.normal(size=(count, columns)), labels


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, np.ndarray, np.ndarray]:
    """300 rows of three classes in three splits, 12 training labels and one of each other split wrong; truth, wrong rows."""
    X, truth = blobs(300)
    splits = np.repeat([TRAIN, VALIDATION, TEST], [240, 40, 20])
    wrong = np.array([*range(0, 240, 20), 250, 290])
    labels = truth.copy()
    labels[wrong] = (labels[wrong] + 1) % 3
    return made_store(tmp_path_factory.mktemp("audit") / "f.h5", X, labels, splits), truth, wrong


def test_the_confident_joint_by_hand() -> None:
    """Six rows of two classes, worked out with pencil and paper."""
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7], [0.2, 0.8], [0.5, 0.5]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(confident.thresholds(p, labels), [0.6, 2 / 3])
    # Rows 0, 1 count for 0, rows 2, 3, 4 for 1, row 5 for none: of three labelled 0 one is 1; all labelled 1 are.
    np.testing.assert_allclose(confident.joint(p, labels), [[2, 1], [0, 3]])


def test_the_threshold_of_a_class_without_rows_is_never_reached() -> None:
    p, labels = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]), np.array([0, 1])
    assert confident.thresholds(p, labels).tolist() == [0.6, 0.7, np.inf]
    assert confident.joint(p, labels).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_probability_of_a_class_by_hand() -> None:
    """Half of class 1 is labelled 0, nothing of class 0 is labelled 1; squared probabilities at temperature 0.5."""
    noise = confident.Noise(np.array([[1, 0.5], [0, 0.5]]), 0.5)
    p = np.array([[0.2, 0.8], [0.2, 0.8]])
    np.testing.assert_allclose(noise.of_class(p, np.array([0, 1])), [[0.04 / 0.36, 0.32 / 0.36], [0, 1]])


@pytest.mark.slow
def test_noise_is_learned_from_a_head_that_it_has_made_doubtful() -> None:
    """20 % of class 0 are labelled 1, 5 % of the others anything; the head predicts labels, not classes."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 18_000)
    p_class = np.full((18_000, 3), 0.01)
    p_class[np.arange(18_000), truth] = 0.98
    given = np.array([[0.8, 0.025, 0.025], [0.2, 0.95, 0.025], [0, 0.025, 0.95]])
    labels = (generator.random(18_000)[:, None] > np.cumsum(given, axis=0).T[truth]).sum(axis=1)
    noise = confident.learn(p_class @ given.T, labels)
    np.testing.assert_allclose(noise.given, given, atol=0.05)  # the prior pulls a fifth down a little
    likely = noise.of_class(p_class @ given.T, labels)
    assert (likely.argmax(axis=1) == truth).mean() > 0.99
    wrong = labels != truth
    assert (1 - likely[np.arange(18_000), labels]).mean() == pytest.approx(wrong.mean(), abs=0.02)


@pytest.mark.slow
def test_suspect_labels(flipped: tuple[FeatureStore, np.ndarray, np.ndarray]) -> None:
    store, truth, wrong = flipped
    found = audit(store, checks=["suspect-label"])["suspect-label"]
    seen = wrong[wrong < 280]
    assert found.judged.tolist() == [row < 280 for row in range(300)]  # test rows are left out
    assert sorted(np.argsort(-np.nan_to_num(found.score, nan=-1))[: len(seen)].tolist()) == seen.tolist()
    assert np.flatnonzero(found.flag).tolist() == seen.tolist()
    assert found.suggested[seen].tolist() == truth[seen].tolist()
    assert found.summary.startswith("13 labels are more likely wrong than right; an estimated 5.")
    with_test = audit(store, checks=["suspect-label"], include_test=True)["suspect-label"]
    assert np.flatnonzero(with_test.flag).tolist() == wrong.tolist()


@pytest.mark.slow
def test_copies_and_groups_never_vouch_for_each_other(tmp_path: Path) -> None:
    """A wrong label that stands on all rows of a group, or all copies, is found: its rows are judged together."""
    X, truth = blobs(200, classes=2)
    labels, groups = truth.copy(), [f"g{row}" for row in range(200)]
    labels[[0, 2, 4]] = 1
    X[[2, 4]] = X[0]
    for row in (0, 2):
        groups[row] = "burst"
    store = made_store(tmp_path / "f.h5", X, labels, same={4: 2}, groups=groups)
    assert np.flatnonzero(audit(store, checks=["suspect-label"])["suspect-label"].flag).tolist() == [0, 2, 4]
    alone = made_store(tmp_path / "g.h5", X, labels, same={2: 0, 4: 0})
    assert np.flatnonzero(audit(alone, checks=["suspect-label"])["suspect-label"].flag).tolist() == [0, 2, 4]


def test_nothing_to_tell_apart(tmp_path: Path) -> None:
    X, _ = blobs(20)
    store = made_store(tmp_path / "f.h5", X, [0] * 19 + [-1])
    found = audit(store)["suspect-label"]
    assert not found.judged.any()
    assert "not two classes" in found.summary
    one_each = made_store(tmp_path / "g.h5", X[:3], [0, 1, 2])
    assert not audit(one_each)["suspect-label"].flag.any()
    none = made_store(tmp_path / "h.h5", X[:4], [-1] * 4, [UNLABELLED] * 4)
    found_nothing = audit(none)
    assert not any(finding.flag.any() for name, finding in found_nothing.findings.items() if name != "near-duplicate")
    assert suggestions(found_nothing)[0].tolist() == []


def test_same_bytes(tmp_path: Path) -> None:
    X, labels = blobs(60)
    labels[[50, 51, 52]] = [0, 1, 0]
    same = {51: 50, 52: 50, 10: 7, 59: 1}  # 10 and 7 have one label; 59 has another one than 1, but is a test image
    store = made_store(tmp_path / "f.h5", X, labels, [TRAIN] * 59 + [TEST], same=same)
    found = audit(store, checks=["same-bytes"])["same-bytes"]
    assert np.flatnonzero(found.flag).tolist() == [50, 51, 52]
    assert (
        found.summary == "1 file has several labels: 0/0050.png (class 0) = 1/0051.png (class 1) = 0/0052.png (class 0)"
    )
    np.testing.assert_allclose(found.score[[50, 51, 52]], [1 / 3, 2 / 3, 1 / 3], rtol=1e-6)
    assert found.suggested[[50, 51, 52]].tolist() == [-1, 0, -1]
    assert np.isnan(found.score[59])


def test_near_duplicates_within_and_across(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    X = generator.normal(size=(90, 64))
    X[1] = X[0] + 0.05 * generator.normal(size=64)  # same class, same split
    X[5] = X[3] * 2  # another class
    X[88] = X[6]  # test
    splits = [TRAIN] * 60 + [VALIDATION] * 20 + [TEST] * 10
    store = made_store(tmp_path / "f.h5", X, [k % 3 if k > 1 else 0 for k in range(90)], splits)
    found = audit(store, checks=["near-duplicate"])["near-duplicate"]
    assert np.flatnonzero(found.flag).tolist() == [0, 1, 3, 5, 6]
    assert found.summary == "3 pairs: 0 of equal files, 1 across classes, 1 across splits"
    first, second, third = found.info["pairs"]
    assert (first["splits"], first["labels"]) == (
        ["train", "test"],
        ["class 0", None],
    )  # a label of a test image stays hidden
    assert second["labels"] == ["class 0", "class 2"]
    assert third["similarity"] == pytest.approx(0.9988, abs=1e-3)


def test_outliers(tmp_path: Path) -> None:
    X, labels = blobs(200)
    X[7] = -X[7][::-1]
    X[9] = 9 * np.eye(12)[11]
    store = made_store(tmp_path / "f.h5", X, labels)
    found = audit(store, checks=["outlier"])["outlier"]
    assert np.flatnonzero(found.flag).tolist() == [7, 9]
    assert (found.score[[7, 9]] > 0.5).all()
    assert found.score[np.setdiff1d(np.arange(200), [7, 9])].max() <= 0.5


@pytest.mark.slow
def test_weak_groups(tmp_path: Path) -> None:
    X, labels = blobs(400, classes=2)
    camera = np.where(np.arange(400) % 8 < 6, "good", "bad")
    rows = np.flatnonzero(camera == "bad")
    X[rows] = X.mean(axis=0) + 0.7 * np.random.default_rng(1).normal(
        size=(len(rows), 12)
    )  # says nothing about the class
    columns = {"camera": camera.tolist(), "name": [f"n{row}" for row in range(400)], "empty": [""] * 400}
    store = made_store(tmp_path / "f.h5", X, labels, columns=columns)
    found = audit(store, checks=["weak-group"])["weak-group"]
    assert np.flatnonzero(found.flag).tolist() == rows.tolist()
    weak, strong = found.info["groups"]
    assert (weak["column"], weak["value"], weak["n"], weak["weak"]) == ("camera", "bad", 100, True)
    assert weak["interval"][0] < weak["accuracy"] < weak["interval"][1] < strong["accuracy"] == weak["rest"]
    np.testing.assert_allclose(found.score[rows], 1 - weak["accuracy"], rtol=1e-6)


def test_small_classes(tmp_path: Path) -> None:
    X, _ = blobs(40)
    labels = [0] * 30 + [1] * 8 + [2] * 2
    store = made_store(tmp_path / "f.h5", X, labels, same={31: 30})
    found = audit(store, checks=["small-class"])["small-class"]
    assert np.flatnonzero(found.flag).tolist() == list(range(30, 40))
    assert found.info["classes"] == {"class 1": 7, "class 2": 2}  # a copy counts once
    np.testing.assert_allclose(found.score[[0, 30, 39]], [10 / 40, 10 / 17, 10 / 12], rtol=1e-6)


def test_tiny_images(tmp_path: Path) -> None:
    X, labels = blobs(30)
    sizes = np.full(30, 300)
    sizes[[3, 4]] = [20, 70]
    found = audit(made_store(tmp_path / "f.h5", X, labels, sizes=sizes), checks=["tiny"])["tiny"]
    assert np.flatnonzero(found.flag).tolist() == [3]
    small = audit(made_store(tmp_path / "g.h5", X, labels, sizes=np.full(30, 28)), checks=["tiny"])["tiny"]
    assert not small.flag.any()  # a data set of small images


@pytest.mark.slow
def test_dark_flat_and_blurred_images(tmp_path: Path) -> None:
    X, labels = blobs(12)
    store = made_store(tmp_path / "f.h5", X, labels)
    generator = np.random.default_rng(0)
    plain = Image.fromarray(generator.integers(0, 255, (8, 12, 3), np.uint8)).resize(
        (600, 400), Image.Resampling.NEAREST
    )
    pictures = {
        "dark": plain.point(lambda value: value // 8),
        "flat": Image.new("RGB", (300, 300), (180, 190, 200)),
        "blurred": plain.filter(ImageFilter.GaussianBlur(8)),
    }

    def read(path: str, sha256: bytes) -> bytes | None:
        if path.endswith("0003.png"):
            return None
        stream = io.BytesIO()
        [*pictures.values(), plain][min(int(path[-8:-4]), 3)].save(stream, "PNG")
        return stream.getvalue()

    found = audit(store, checks=list(pictures), read=read)
    for row, name in enumerate(pictures):
        assert row in np.flatnonzero(found[name].flag).tolist(), name
        assert np.isnan(found[name].score[3])
        assert not found[name].flag[4:].any()
    assert found["dark"].summary == "1 image is dark; 1 image could not be read"
    with pytest.raises(ConfigurationError, match="--images"):
        audit(store, checks=["dark"])


def test_measures_of_pixels_by_hand() -> None:
    pixels = np.zeros((4, 4, 3), np.float32)
    pixels[1, 1] = 1
    brightness, spread, sharpness = measures_of(pixels)
    assert brightness == pytest.approx(0.85, abs=1e-3)  # the 99 % quantile of 15 zeros and a one
    assert spread == pytest.approx(np.sqrt(15) / 16)
    # The Laplacian is -4, 1, 1, 0 on the four inner pixels: its deviation over that of the pixels.
    assert sharpness == pytest.approx(np.std([-4, 1, 1, 0]) / (np.sqrt(15) / 16), rel=1e-4)


@pytest.mark.slow
def test_every_check_keeps_the_interface(flipped: tuple[FeatureStore, np.ndarray, np.ndarray]) -> None:
    store = flipped[0]
    found = audit(store)
    assert list(found.findings) == [check.name for check in CHECKS if not check.pixels]
    for name, finding in found.findings.items():
        assert finding.score.shape == finding.flag.shape == (300,), name
        assert finding.score.dtype == np.float32
        known = finding.score[finding.judged]
        assert ((known >= 0) & (known <= 1)).all()
        assert not finding.flag[~finding.judged].any()
        assert not finding.judged[280:].any(), f"{name} judged test rows"
        assert finding.suggested is None or finding.suggested.dtype == np.int32
        assert finding.summary
        assert "\n" not in finding.summary
    text = summary(document(found))
    assert "suspect-label" in text
    json.dumps(document(found))
    with pytest.raises(ConfigurationError, match="did you mean 'outlier'"):
        audit(store, checks=["outliers"])


@pytest.mark.slow
def test_the_file_has_every_score(flipped: tuple[FeatureStore, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    store = flipped[0]
    found = audit(store)
    count = write_csv(found, tmp_path / "audit.csv")
    lines = list(csv.DictReader((tmp_path / "audit.csv").open(newline="")))
    assert len(lines) == count == sum(int(finding.judged.sum()) for finding in found.findings.values())
    assert tuple(lines[0]) == COLUMNS
    suspects = [line for line in lines if line["check"] == "suspect-label"]
    assert [line["flag"] for line in suspects] == ["1"] * 13 + ["0"] * 267
    assert float(suspects[0]["score"]) >= float(suspects[12]["score"])
    row = store.images.paths.index(suspects[0]["path"])
    assert suspects[0]["sha256"] == store.images.sha256[row].tobytes().hex()
    assert suspects[0]["label"] == store.classes[store.images.labels[row]]
    assert suspects[0]["suggested"] == store.classes[found["suspect-label"].suggested[row]]


@pytest.mark.slow
def test_suggestions_that_are_certain_enough(flipped: tuple[FeatureStore, np.ndarray, np.ndarray]) -> None:
    store, truth, wrong = flipped
    rows, classes, sure = suggestions(audit(store, checks=["suspect-label"]))
    assert rows.tolist() == wrong[wrong < 240].tolist()  # training rows alone
    assert classes.tolist() == truth[rows].tolist()
    assert sure.mean() >= 0.97


def test_as_many_suggestions_are_applied_as_keep_their_precision() -> None:
    """The surest ones whose mean probability is 0.97: 0.99, 0.98 and 0.95 are, with 0.93 it would be 0.9625."""
    own = np.array([0.01, 0.07, 0.97, 0.05, 0.02, 0.45])
    likely = np.stack([own, 1 - own], axis=1)
    rows = np.arange(3, 9)
    material = SimpleNamespace(
        likely=(rows, likely), labels=np.zeros(9, np.int32), copies=np.arange(9), splits=np.full(9, TRAIN)
    )
    found, classes, sure = suggestions(SimpleNamespace(material=material))  # type: ignore[arg-type]
    assert (found.tolist(), classes.tolist()) == ([3, 6, 7], [1, 1, 1])
    assert sure.tolist() == pytest.approx([0.99, 0.95, 0.98])
    found, _, sure = suggestions(SimpleNamespace(material=material), but=np.array([3]))  # type: ignore[arg-type]
    assert (found.tolist(), sure.tolist()) == ([7], pytest.approx([0.98]))  # 0.98 and 0.95 have a mean of 0.965


@pytest.mark.slow
def test_apply_leaves_alone_what_a_person_has_to_decide(tmp_path: Path) -> None:
    """A file that lies in validation too, or has two labels: a decision is about the bytes, so it would change both."""
    X, truth = blobs(240)
    labels = truth.copy()
    labels[[0, 1, 2, 3]] = (truth[[0, 1, 2, 3]] + 1) % 3
    X[200], X[201] = X[1], X[2]
    labels[200], labels[201] = labels[1], truth[2]
    splits = np.repeat([TRAIN, VALIDATION], [201, 39])
    splits[[200, 201]] = [VALIDATION, TRAIN]
    store = made_store(tmp_path / "f.h5", X, labels, splits, same={200: 1, 201: 2})
    rows, _, _ = suggestions(audit(store, checks=["suspect-label"]))
    assert rows.tolist() == [0, 3]


@pytest.mark.slow
def test_apply_writes_decisions_of_a_machine(
    flipped: tuple[FeatureStore, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    store, truth, _ = flipped
    file, out = tmp_path / "labels.csv", tmp_path / "audit.csv"
    command = ["audit", store.path, "--labels", file, "--apply", "--check", "suspect-label", "--out", out]
    done = call_pipeline(*command, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["labels"]["applied"] == 12
    decisions = read_labels(file).decisions
    assert {decision.by for decision in decisions} == {"machine:audit"}
    corrected = with_labels(store, file)
    assert corrected.images.labels[:240].tolist() == truth[:240].tolist()
    assert corrected.images.labels[240:].tolist() == store.images.labels[240:].tolist()
    again = call_pipeline(*command)  # the corrected labels are audited, and nothing is left to change
    assert again.returncode == 0, again.stderr
    assert len(read_labels(file)) == 12


@pytest.mark.slow
def test_what_a_person_decided_stays(flipped: tuple[FeatureStore, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    from pipeline.labels.file import append_decisions, new_decision, value_of

    store, _, wrong = flipped
    file, table = tmp_path / "labels.csv", store.images
    kept = int(wrong[3])
    value = value_of(store.classes[table.labels[kept]])
    append_decisions(file, [new_decision(table.sha256[kept], table.paths[kept], value, by="ann")])
    done = call_pipeline("audit", store.path, "--labels", file, "--apply", "--out", tmp_path / "audit.csv")
    assert done.returncode == 0, done.stderr
    assert f"{file}: no label changed" in done.stderr  # by what was decided before
    assert "11 labels changed" in done.stderr
    assert "1 image that people decided about left alone" in done.stderr
    assert with_labels(store, file).images.labels[kept] == table.labels[kept]


@pytest.mark.slow
def test_what_a_person_took_back_is_not_applied_again(
    flipped: tuple[FeatureStore, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """And the estimate is that of the labels that were changed, not of those that were left alone."""
    from pipeline.auditing.applying import record
    from pipeline.labels.file import WITHDRAWN, append_decisions, new_decision

    store, _, _ = flipped
    file, table = tmp_path / "labels.csv", store.images
    found = audit(store, checks=["suspect-label"])
    rows, _, sure = suggestions(found)
    back = int(rows[sure.argmin()])
    for value, by in (("c1", "machine:audit"), (WITHDRAWN, "ann")):
        append_decisions(file, [new_decision(table.sha256[back], table.paths[back], value, by=by)])
    recorded = record(found, file, apply=True)
    assert (recorded["applied"], recorded["left_to_people"]) == (len(rows) - 1, 1)
    assert recorded["estimated_precision"] == pytest.approx(np.delete(sure, sure.argmin()).mean())
    assert with_labels(store, file).images.labels[back] == table.labels[back]


@pytest.mark.slow
def test_a_look_at_the_test_split_is_recorded_once(
    flipped: tuple[FeatureStore, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    store = flipped[0]
    file, out = tmp_path / "labels.csv", tmp_path / "audit.csv"
    for option in ("--include-test", "--apply"):
        refused = call_pipeline("audit", store.path, option, "--out", out)
        assert (refused.returncode, "--labels FILE" in refused.stderr) == (2, True)
    for _ in range(2):
        done = call_pipeline("audit", store.path, "--labels", file, "--include-test", "--out", out)
        assert done.returncode == 0, done.stderr
    noted = read_labels(file).decisions
    assert [decision.target for decision in noted] == [SEEN] * 20
    assert with_labels(store, file).data_digest == store.data_digest  # no label changed


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_look_at_the_test_split_is_shown_beside_later_test_scores(
    flipped: tuple[FeatureStore, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    store, file, runs, said = (
        flipped[0],
        tmp_path / "labels.csv",
        tmp_path / "runs",
        "20 test images judged by an audit before",
    )
    call_pipeline("audit", store.path, "--labels", file, "--include-test", "--apply", "--out", tmp_path / "audit.csv")
    head = ("--param", "C=1", "--test", "--runs", runs)
    trained = call_pipeline("train-head", store.path, "--labels", file, *head)
    assert trained.returncode == 0, trained.stderr
    assert said in trained.stderr
    assert said in call_pipeline("leaderboard", runs).stdout
    page = tmp_path / "report.html"
    done = call_pipeline("report", runs, "--out", page, "--audit", tmp_path / "audit.csv")
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert said in text
    assert "20 images judged by an audit before" in text
    assert ">suspect-label</h4>" in text
    plain = call_pipeline("train-head", store.path, *head)
    assert said not in plain.stderr


@pytest.mark.slow
def test_the_report_takes_the_worst_of_each_check_and_refuses_other_files(
    flipped: tuple[FeatureStore, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    store, file = flipped[0], tmp_path / "audit.csv"
    write_csv(audit(store), file)
    read = read_audit(file)
    suspect = read.checks[0]
    assert (suspect.name, suspect.judged, suspect.flagged, len(suspect.worst)) == ("suspect-label", 280, 13, 12)
    known = {digest.tobytes() for digest in store.images.sha256}
    nowhere = Pictures([], [])
    section = read.section(known, nowhere)
    assert [check["name"] for check in section] == [check.name for check in read.checks]
    assert section[0]["cards"][0]["picture"] == ""
    assert read.section({b"another"}, nowhere) == []
    lines = file.read_text().splitlines()
    for number, line in ((1, "a,b"), (2, "x"), (3, lines[2].replace(",1,", ",2,", 1)), (2, "Check,a,b,0.5,1,c,d")):
        file.write_text("\n".join([*lines[: number - 1], line, *lines[number:]]))
        with pytest.raises(ConfigurationError, match=f"line {number}: "):
            read_audit(file)
