"""``--labels`` of the commands: what is trained, recorded and said, and what happens to wrong files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import NumpyNetwork, call_pipeline, paint
from labelling import Book, coloured_store, sha256_of

from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources.scan import scan
from features.store.reader import FeatureStore
from pipeline.heads.kinds import head_of, make_head
from pipeline.labels.file import EXCLUDE, UNKNOWN, WITHDRAWN
from pipeline.labels.overlay import with_labels
from pipeline.runs.board import take_run
from pipeline.runs.datasets import data_sets
from pipeline.runs.folder import Run, find_runs, read_predictions

HEAD = ("--head", "lda")


pytestmark = pytest.mark.filterwarnings("ignore:Only one sample")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return coloured_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "labels.csv")


def trained(store: FeatureStore, runs: Path, *options: object) -> tuple[Run, str, dict[str, Any]]:
    """Train by the command; the run, what was said on stderr, and the document."""
    done = call_pipeline("train-head", store.path, "--runs", runs, "--json", *(options or HEAD))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    return Run.open(document["run"]), done.stderr, document


@pytest.mark.slow
def test_a_corrected_label_trains_anew_and_taking_it_back_finds_the_earlier_run(
    store: FeatureStore, book: Book, tmp_path: Path
) -> None:
    before, _, _ = trained(store, tmp_path / "runs")
    assert "labels" not in yaml.safe_load((before.folder / "config.yaml").read_text())["features"]
    image = sha256_of(store, "train/cat/0.png")
    book.add(image, "dog")
    after, said, _ = trained(store, tmp_path / "runs", *HEAD, "--labels", book.path)
    assert f"{book.path}: 1 label corrected\n" in said
    assert after.run_id != before.run_id
    assert after.data_digest == with_labels(store, book.path).data_digest
    assert after.labels == with_labels(store, book.path).labelled_by
    assert (after.labels["corrected"], after.source) == (1, before.source)
    (one,) = data_sets(find_runs(tmp_path / "runs").runs)
    assert [state.digest for state in one.states] == [after.data_digest, before.data_digest]
    assert take_run(tmp_path / "runs").run.run_id == after.run_id

    book.add(image, WITHDRAWN)
    again, said, document = trained(store, tmp_path / "runs", *HEAD, "--labels", book.path)
    assert (again.run_id, document["cached"]) == (before.run_id, True)
    assert "no label changed" in said
    assert take_run(tmp_path / "runs").run.run_id == before.run_id  # the newest state again


@pytest.mark.slow
def test_excluded_and_unknown_rows_are_neither_trained_on_nor_scored(
    store: FeatureStore, book: Book, tmp_path: Path
) -> None:
    book.add(sha256_of(store, "train/cat/0.png"), UNKNOWN).add(sha256_of(store, "validation/dog/1.png"), EXCLUDE)
    run, said, _ = trained(store, tmp_path / "runs", *HEAD, "--labels", book.path)
    assert "1 unknown and 1 excluded (not trained on, not scored)" in said
    assert run.metrics["validation"]["n"] == 7
    assert "validation/dog/1.png" not in (run.folder / "predictions.csv").read_text()


@pytest.mark.slow
def test_a_new_class_is_trained_without_reading_an_image(store: FeatureStore, book: Book, tmp_path: Path) -> None:
    for number in range(3):
        book.add(sha256_of(store, f"train/cat/{number}.png"), "wolf")
    run, said, _ = trained(store, tmp_path / "runs", *HEAD, "--labels", book.path)
    assert run.classes == ("cat", "dog", "wolf")
    assert "3 labels corrected; new: 'wolf'" in said


@pytest.mark.slow
def test_a_sweep_with_folds_sees_the_same_labels(store: FeatureStore, book: Book, tmp_path: Path) -> None:
    book.add(sha256_of(store, "train/cat/0.png"), "wolf").add(sha256_of(store, "train/cat/1.png"), "wolf")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("version: 1\nheads:\n  - head: lda\n  - head: knn\n    grid: {n_neighbors: [1, 2]}\n")
    done = call_pipeline(
        "train-head",
        store.path,
        "--heads",
        sweep,
        "--folds",
        2,
        "--n-jobs",
        1,
        "--runs",
        tmp_path / "runs",
        "--labels",
        book.path,
    )
    assert done.returncode == 0, done.stderr
    runs = find_runs(tmp_path / "runs").runs
    assert [run.classes for run in runs] == 3 * [("cat", "dog", "wolf")]
    assert {run.metrics["cv"]["n"] for run in runs} == {12}
    assert {run.data_digest for run in runs} == {with_labels(store, book.path).data_digest}
    assert {run.labels["sha256"] for run in runs} == {with_labels(store, book.path).labelled_by["sha256"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "said"), [("train", "takes out all train rows"), ("both", "none of its images has a")]
)
def test_labels_that_leave_nothing_are_named(
    store: FeatureStore, book: Book, tmp_path: Path, split: str, said: str
) -> None:
    for row, path in enumerate(store.images.paths):
        if path.startswith("train") or split == "both":
            book.add(store.images.sha256[row].tobytes().hex(), UNKNOWN)
    done = call_pipeline("train-head", store.path, "--runs", tmp_path / "runs", "--labels", book.path, *HEAD)
    assert done.returncode == 1
    assert said in done.stderr
    assert f"{book.path} ({12 if split == 'train' else 20} unknown, 0 excluded)" in done.stderr


def test_wrong_labels_files_are_named_in_one_line(store: FeatureStore, book: Book, tmp_path: Path) -> None:
    book.add("another image", "dog")
    for path, said in (
        (book.path, "none of its 1 decision is about one of the 20 images of"),
        (tmp_path / "none.csv", "there is no such labels file"),
        (store.path, "is not a labels file: received"),
    ):
        done = call_pipeline("train-head", store.path, "--runs", tmp_path / "runs", "--labels", path, *HEAD)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_unknown_hashes_and_incomplete_lines_are_counted(store: FeatureStore, book: Book, tmp_path: Path) -> None:
    book.add(sha256_of(store, "train/cat/0.png"), "dog").add("another image", "dog").add("and one more", "cat")
    book.path.write_bytes(book.path.read_bytes()[:-3])
    _, said, _ = trained(store, tmp_path / "runs", *HEAD, "--labels", book.path)
    assert f"{book.path}: 1 label corrected; 1 image not here; 1 line is incomplete, left out: 5\n" in said


@pytest.mark.slow
def test_the_report_says_under_which_labels_a_run_was_trained(store: FeatureStore, book: Book, tmp_path: Path) -> None:
    trained(store, tmp_path / "runs")
    book.add(sha256_of(store, "train/cat/0.png"), "dog").add(sha256_of(store, "validation/cat/0.png"), "dog")
    run, _, _ = trained(store, tmp_path / "runs", *HEAD, "--labels", book.path)
    book.add(sha256_of(store, "train/cat/1.png"), "dog")  # later decisions do not matter to the run
    out = tmp_path / "report.html"
    done = call_pipeline("report", tmp_path / "runs", "--out", out)
    assert done.returncode == 0, done.stderr
    page = out.read_text(encoding="utf-8")
    assert f"Trained under the labels file {book.path}: 2 labels corrected." in page
    assert "Quarantine, duplicates and leakage are not known" not in page
    assert "<summary>1 run on older states</summary>" in page
    assert f"--labels {book.path}" in page
    moved = book.path.rename(tmp_path / "moved.csv")
    call_pipeline("report", tmp_path / "runs", "--out", out)
    assert "does not begin any more as the labels file under which the run was trained" in out.read_text("utf-8")
    call_pipeline("report", tmp_path / "runs", "--out", out, "--labels", moved)
    assert "Quarantine, duplicates and leakage are not known" not in out.read_text("utf-8")
    assert run.folder.name in out.read_text("utf-8")


def targets_of(task: str, folder: Path) -> tuple[FeatureStore, str]:
    """A store of 40 painted images with targets, whose images are gone, and the name of the target."""
    target = "tags" if task == "multilabel" else "age,weight"
    lines = [f"path,{target},split"]
    for row in range(40):
        paint(folder / "images" / f"{row}.png", (5 * row, 250 - 6 * row, row), (8, 8))
        cell = ("red", "big", "big;red", ";")[row % 4] if task == "multilabel" else f"{row},{1000 - 3 * row}"
        lines.append(f"{row}.png,{cell},{('train', 'validation')[row % 5 == 0]}")
    manifest = folder / "images" / "m.csv"
    manifest.write_text("\n".join(lines) + "\n")
    asked = ExtractionOptions(batch_size=8, workers=1, task=task, target=target)
    source = scan(manifest, task=task, target=target)
    store = Extraction(source, NumpyNetwork(), folder / "features.h5", asked).run().store  # type: ignore[arg-type]
    shutil.rmtree(folder / "images")
    return store, target


@pytest.mark.slow
def test_a_changed_target_of_one_row_trains_anew_without_an_inference(tmp_path: Path) -> None:
    """Through train-head and report; the images are gone, and taking the decisions back finds the earlier runs."""
    kinds = {"multilabel": ("logistic", "big;red", [1, 1]), "regression": ("ridge", "2.5;1e3", [2.5, 1000])}
    undo = []
    for task, (head, value, expected) in kinds.items():
        store, target = targets_of(task, tmp_path / task)
        before, _, _ = trained(store, tmp_path / "runs", "--head", head)
        book = Book(tmp_path / f"{task}.csv")
        for path in ("0.png", "1.png"):  # of validation, and of train
            book.add(sha256_of(store, path), value, target)
        command = store, tmp_path / "runs", "--head", head, "--labels", book.path
        after, said, _ = trained(*command)
        assert f"{book.path}: 2 labels corrected\n" in said
        assert after.run_id != before.run_id
        truths = [read_predictions(run).labels for run in (before, after)]
        place = next(k for k, path in enumerate(read_predictions(after).paths) if path == "0.png")
        assert truths[0][place].tolist() != expected
        truths[0][place] = expected
        np.testing.assert_array_equal(*truths)
        X, y = store.load("train")
        y[store.images.paths.index("1.png") - 1] = expected  # of the rows before it only row 0 is not one of train
        alone = make_head(head, task=after.task, classes=after.classes)
        alone.fit(X, y)
        np.testing.assert_allclose(head_of(after).predict_proba(X), alone.predict_proba(X), rtol=1e-6)
        undo.append((book, [sha256_of(store, path) for path in ("0.png", "1.png")], target, before, command))
    call_pipeline("report", tmp_path / "runs", "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    for book, images, target, before, command in undo:
        assert f"Trained under the labels file {book.path}: 2 labels corrected." in page
        for image in images:
            book.add(image, WITHDRAWN, target)
        again, _, document = trained(*command)
        assert (again.run_id, document["cached"]) == (before.run_id, True)
