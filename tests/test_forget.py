"""Forgetting images everywhere: store, runs, labels, report pages. What cannot be removed is said; every byte is searched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from helpers import call_pipeline, extract, paint_folder
from test_forgetting import traces

from features.errors import ConfigurationError, RunError
from features.store.reader import FeatureStore
from pipeline.labels.file import append_decisions, new_decision, read_labels
from pipeline.labels.overlay import with_labels
from pipeline.runs.folder import Run, read_predictions
from pipeline.runs.forgetting import MARK, forget_predictions
from pipeline.stages.forget import forget, summary
from pipeline.stages.report import make_report
from pipeline.stages.train_head import train_head


@pytest.fixture
def project(tmp_path: Path, without_plots: None) -> Path:
    """A store, two heads, a report, and a labels file, all in one folder beside the images."""
    folder = tmp_path / "project"
    folder.mkdir()
    paint_folder(tmp_path / "photos", {"cat": 60, "dog": 60})
    extract(tmp_path / "photos", folder / "features.h5")
    store = FeatureStore.open(folder / "features.h5")
    for name, params in (("logistic", {"C": 1.0}), ("knn", {"n_neighbors": 3})):
        train_head(store, name, params=params, runs=folder / "runs")
    make_report(folder / "runs", folder / "report.html")
    append_decisions(
        folder / "labels.csv",
        [
            new_decision(hash_of(tmp_path, path), path, "dog", earlier="cat", by="ann")
            for path in store.images.paths[:50]
        ],
    )
    return folder


def hash_of(folder: Path, path: str) -> str:
    return hashlib.sha256((folder / "photos" / path).read_bytes()).hexdigest()


def validation_and_train(project: Path) -> tuple[str, str]:
    """An image that the runs have predictions of, and a training image about which there is a decision."""
    store = FeatureStore.open(project / "features.h5")
    paths = store.images.paths
    train = next(row for row in store.rows("train").tolist() if row < 50)
    return paths[store.rows("validation")[0]], paths[train]


@pytest.mark.slow
def test_no_byte_of_the_project_holds_the_images(project: Path) -> None:
    gone = validation_and_train(project)
    hashes = [hash_of(project.parent, path) for path in gone]
    needles = [*(text.encode() for text in hashes), *map(bytes.fromhex, hashes), *(path.encode() for path in gone)]
    before = traces(project, needles)
    assert {"features.h5", "labels.csv", "report.html"} <= set(before)
    assert sum(name.endswith("predictions.csv") for name in before) == 2
    [logistic] = (project / "runs").glob("logistic-*")
    rows = read_predictions(Run.open(logistic))

    listed = project.parent / "list.txt"
    listed.write_text(f"{hashes[0]}\n\n{gone[1]}\n")
    asked = ("--runs", project / "runs", "--labels", project / "labels.csv", "--list", listed)
    plan = call_pipeline("forget", project / "features.h5", *asked, "--dry-run")
    assert "2 rows and 0 unreadable images would be forgotten" in plan.stdout
    assert traces(project, needles) == before
    done = call_pipeline("forget", project / "features.h5", *asked, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)

    assert traces(project, needles) == []
    assert document["remaining"] == []
    assert (document["rows"], set(document["paths"])) == (2, set(gone))
    assert len(document["predictions"]) == 2
    assert len(document["seen"]) == 2
    assert [name.split("-")[0] for name in document["kept_rows"]] == ["knn"]
    assert document["source"] == [str(project.parent / "photos" / path) for path in document["paths"]]
    assert document["reports"] == [str(project / "report.html")]
    run = Run.open(logistic)
    left = read_predictions(run)
    assert list(left.paths) == [path for path in rows.paths if path != gone[0]]
    right = int((left.probabilities.argmax(axis=1) == left.labels).sum())
    assert run.metrics["validation"]["accuracy"] == right / len(left.paths)
    assert len(read_labels(project / "labels.csv")) == 50 - len({*gone} & {*rows.paths} | {gone[1]})
    make_report(project / "runs", project / "report.html")  # which is made again without them
    assert traces(project, needles) == []


@pytest.mark.slow
def test_verify_shows_that_they_are_gone(project: Path) -> None:
    gone, _ = validation_and_train(project)
    sha256 = hash_of(project.parent, gone)
    asked = ("verify", project / "features.h5", "--gone", sha256, "--runs", project / "runs")
    there = call_pipeline(*asked)
    assert there.returncode == 3
    assert "features.h5: holds a hash that should be gone" in there.stdout
    assert "predictions.csv: holds a hash that should be gone" in there.stdout
    forget(project / "features.h5", [sha256], runs=project / "runs")
    done = call_pipeline(*asked)
    assert done.returncode == 0, done.stdout
    assert "no byte of it, its shards and the runs holds one of these hashes" in done.stdout


@pytest.mark.slow
def test_a_labels_file_that_a_run_records_is_named_and_not_changed(project: Path) -> None:
    store, file = FeatureStore.open(project / "features.h5"), project / "labels.csv"
    train_head(with_labels(store, file), "knn", params={"n_neighbors": 3}, runs=project / "runs")
    sha256, before = hash_of(project.parent, store.images.paths[0]), file.read_bytes()
    document = forget(store.path, [sha256], runs=project / "runs", dry_run=True)
    assert document["labels_left"] == {str(file.resolve()): 1}
    assert f"{file.resolve()}, under which a run was trained, holds 1 decision; name it with --labels" in summary(
        document
    )
    assert file.read_bytes() == before
    assert forget(store.path, [sha256], runs=project / "runs", labels=[file], dry_run=True)["labels_left"] == {}
    file.unlink()
    assert forget(store.path, [sha256], runs=project / "runs", dry_run=True)["labels_left"] == {}


@pytest.mark.slow
def test_what_is_unknown_changes_nothing(project: Path) -> None:
    before = (project / "features.h5").read_bytes()
    document = forget(project / "features.h5", ["ab" * 32], runs=project / "runs", labels=[project / "labels.csv"])
    assert (document["rows"], document["labels"], document["predictions"], document["seen"]) == (0, {}, {}, [])
    assert (project / "features.h5").read_bytes() == before
    for wrong in (["xyz"], [], ["0" * 64]):
        with pytest.raises(ConfigurationError, match="sha256: "):
            forget(project / "features.h5", wrong)
    done = call_pipeline("forget", project / "features.h5", "--list", project / "labels.csv")
    assert done.returncode == 2
    assert "is neither a sha256 of 64 hexadecimal digits nor a path of" in done.stderr
    (project / "paths.txt").write_text("dog/1.png\n")
    done = call_pipeline("verify", project / "features.h5", "--gone", project / "paths.txt")
    assert done.returncode == 2
    assert "paths.txt: dog/1.png: is not a sha256 of 64 hexadecimal digits. The store holds no path" in done.stderr


@pytest.mark.slow
def test_a_run_that_would_lose_all_its_validation_images_is_named_first(project: Path) -> None:
    store = FeatureStore.open(project / "features.h5")
    hashes = [store.images.sha256[row].tobytes().hex() for row in store.rows("validation")]
    before = (project / "features.h5").read_bytes()
    with pytest.raises(RunError, match=r"all its validation images are to be forgotten.*Nothing was changed"):
        forget(project / "features.h5", hashes, runs=project / "runs")
    assert (project / "features.h5").read_bytes() == before


@pytest.mark.slow
def test_scores_that_a_kill_left_half_made_are_made_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, _ = validation_and_train(project)
    sha256 = hash_of(project.parent, gone)
    [logistic] = (project / "runs").glob("logistic-*")

    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.runs.forgetting.add_scores", killed)
        with pytest.raises(SystemExit):
            forget_predictions(Run.open(logistic), [sha256])
    assert (logistic / MARK).exists()
    forget(project / "features.h5", [sha256], runs=project / "runs")
    assert not (logistic / MARK).exists()
    assert len(read_predictions(Run.open(logistic)).paths) == Run.open(logistic).metrics["validation"]["n"]


@pytest.mark.slow
def test_pages_of_others_stay(project: Path) -> None:
    """A page that a person wrote about the same images is no report, also where it names this project."""
    gone, _ = validation_and_train(project)
    own = project / "notes.html"
    own.write_text(f"<p>My notes on bottleneck and {gone}</p>")
    document = forget(project / "features.h5", [hash_of(project.parent, gone)], runs=project / "runs")
    assert document["reports"] == [str(project / "report.html")]
    assert own.exists()
