"""Which run of a folder is taken: one rule for all commands, within one data set, on its newest state."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetuning import paint_noise, save_network
from helpers import call_pipeline, extract, paint_folder
from made_runs import made_run

import pipeline.stages.report
from features.errors import ConfigurationError, RunError
from features.store.reader import FeatureStore
from pipeline.cli import main
from pipeline.config import load_yaml
from pipeline.heads.records import describe_features
from pipeline.runs.board import leaderboard, note_on_older_state, renew_states, take_run
from pipeline.runs.datasets import data_sets, source_of
from pipeline.runs.folder import Run, find_runs
from pipeline.stages.finetune import advised, best_head, summary
from pipeline.stages.report import make_report
from pipeline.tables import board_text

ANTS, BRAIN, OLD = "a" * 64, "b" * 64, "0" * 64


def taken(root: Path, **options: Any) -> str:
    return take_run(root, **options).run.run_id


def two_data_sets(root: Path) -> Path:
    """Ants with the higher accuracy, and brains, which are newer."""
    made_run(root, "logistic-ants", source="/data/ants", digest=ANTS, accuracy=0.99, minute=1)
    made_run(root, "logistic-brain", source="/data/brain", digest=BRAIN, accuracy=0.9, minute=2)
    return root


# --- one data set -------------------------------------------------------------------------------------------
def test_the_run_with_the_asterisk_is_taken_not_the_highest_accuracy(tmp_path: Path) -> None:
    made_run(tmp_path, "logistic-large", accuracy=0.95, parameters=10_000)
    made_run(tmp_path, "logistic-small", accuracy=0.94, parameters=10)
    made_run(tmp_path, "logistic-poor", accuracy=0.5, parameters=1, minute=5)
    (starred,) = (row["run_id"] for row in leaderboard(tmp_path) if row["chosen"])
    assert taken(tmp_path) == starred == "logistic-small"


@pytest.mark.slow
@pytest.mark.parametrize(("images", "best"), [(29, "steady"), (30, "not-judged")])
def test_few_validation_images_leave_the_choice_to_cross_validation(
    images: int, best: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A simple head was lucky with 29 images. Cross-validation saw it, and nobody had to ask for its scores."""
    made_run(tmp_path, "lucky", images=images, accuracy=1.0, cv=0.5, parameters=3)
    made_run(tmp_path, "steady", images=images, accuracy=0.9, cv=0.95)
    made_run(tmp_path, "not-judged", images=images, accuracy=1.0, parameters=1)
    board = leaderboard(tmp_path)
    assert taken(tmp_path) == best
    assert [row["run_id"] for row in board if row["chosen"]] == [best]
    names = ["steady", "lucky", "not-judged"] if images < 30 else ["lucky", "not-judged", "steady"]
    assert [row["run_id"] for row in board] == names
    document = make_report(tmp_path, tmp_path / "report.html")
    assert document["groups"][0]["chosen"] == best
    for folds, chosen in ((True, "steady"), (False, "not-judged")):
        caplog.clear()
        assert [row["run_id"] for row in leaderboard(tmp_path, folds=folds) if row["chosen"]] == [chosen]
        said = f"the asterisk stands at {chosen} because of how you compare; predict, evaluate, export and finetune take {best}"
        assert (said in caplog.text) == (chosen != best)


def test_heads_whose_epoch_the_validation_images_chose_are_named_beside_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline.runs.board")
    dense = made_run(tmp_path, "dense", head="dense", cv=0.9)
    leaderboard(tmp_path)
    assert "too good" not in caplog.text  # there is no other
    made_run(tmp_path, "logistic", cv=0.9)
    leaderboard(tmp_path, folds=True)
    assert "too good" not in caplog.text
    leaderboard(tmp_path)
    assert "photos: validation scores of dense are slightly too good beside those of other heads" in caplog.text
    assert dense.stops_on_validation
    caplog.clear()
    config = tmp_path / "dense" / "config.yaml"
    values = load_yaml(config)
    values["head"]["parameters"]["stop_on"] = "train"
    config.write_text(yaml.safe_dump(values))
    leaderboard(tmp_path)
    assert "too good" not in caplog.text


def test_the_hint_on_epochs_speaks_of_heads_on_the_newest_state_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fine-tuned logistic head has epochs, but the head logistic has none, and fine-tuning has no folds."""
    caplog.set_level(logging.INFO, "pipeline.runs.board")
    made_run(tmp_path, "dense", head="dense", digest=OLD, minute=1)
    made_run(tmp_path, "knn", head="knn", digest=OLD, minute=2)
    made_run(tmp_path, "logistic", digest=ANTS, minute=3)
    tuned = made_run(tmp_path, "finetune-logistic", digest=ANTS, minute=4, settings={"start": "logistic"})
    assert tuned.stops_on_validation
    leaderboard(tmp_path)
    assert "too good" not in caplog.text
    made_run(tmp_path, "dense-new", head="dense", digest=ANTS, minute=5)
    leaderboard(tmp_path)
    assert caplog.text.count("too good") == 1
    assert "photos: validation scores of dense are slightly too good" in caplog.text


def test_one_cross_validated_run_is_no_comparison(tmp_path: Path) -> None:
    made_run(tmp_path, "judged", images=20, accuracy=0.6, cv=0.6)
    made_run(tmp_path, "better", images=20, accuracy=1.0)
    assert taken(tmp_path) == "better"


def test_a_newer_state_makes_the_runs_of_older_ones_stale(tmp_path: Path) -> None:
    """After renaming a class, the better run of before neither wins nor keeps the asterisk."""
    made_run(tmp_path, "logistic-before", digest=OLD, accuracy=0.99, minute=1, classes=("cat", "dogs"))
    made_run(tmp_path, "logistic-after", digest=ANTS, accuracy=0.9, minute=2)
    assert taken(tmp_path) == "logistic-after"
    rows = leaderboard(tmp_path)
    assert [(row["run_id"], row["chosen"], row["stale"], row["comparable"]) for row in rows] == [
        ("logistic-after", True, False, True),
        ("logistic-before", False, True, False),
    ]
    # chosen only if they are named
    assert taken(tmp_path, data_set=OLD[:10]) == "logistic-before"
    assert taken(tmp_path / "logistic-before") == "logistic-before"


def test_a_trial_with_a_limit_never_makes_runs_on_all_images_stale(tmp_path: Path) -> None:
    made_run(tmp_path, "logistic-whole", digest=ANTS, accuracy=0.9, minute=1)
    made_run(tmp_path, "logistic-trial", digest=OLD, accuracy=0.99, minute=2, limit=50)
    made_run(tmp_path, "logistic-tiny", digest=BRAIN, accuracy=0.99, minute=3, limit=20)
    assert taken(tmp_path) == "logistic-whole"
    assert [(row["run_id"], row["chosen"], row["stale"], row["state"]) for row in leaderboard(tmp_path)] == [
        ("logistic-whole", True, False, "newest"),
        ("logistic-tiny", False, True, "a trial with --limit 20"),
        ("logistic-trial", False, True, "a trial with --limit 50"),
    ]
    assert board_text(leaderboard(tmp_path)).count(", a trial with --limit 20 (stale)") == 1
    assert taken(tmp_path, data_set=OLD[:10]) == "logistic-trial"
    note = note_on_older_state(tmp_path, ["logistic-trial"])
    assert note.startswith(
        f"logistic-trial was trained on {OLD[:10]}, a trial with --limit 50 of photos. Runs on {ANTS[:10]} are on"
    )
    shutil.rmtree(tmp_path / "logistic-whole")
    assert taken(tmp_path) == "logistic-tiny"  # of trials alone, the newest
    made_run(tmp_path, "knn-later", head="knn", digest=BRAIN, accuracy=0.8, minute=4)  # these were all of them by then
    assert [(row["run_id"], row["state"]) for row in leaderboard(tmp_path)][:2] == [
        ("logistic-tiny", "newest"),
        ("knn-later", "newest"),
    ]


def test_a_trial_beside_images_that_moved_leaves_them_one_data_set(tmp_path: Path) -> None:
    made_run(tmp_path, "logistic-1", source="/a/photos", digest=ANTS, minute=1)
    made_run(tmp_path, "logistic-2", source="/a/photos", digest=OLD, minute=2, limit=50)
    made_run(tmp_path, "logistic-3", source="/b/photos", digest=ANTS, minute=3)
    made_run(tmp_path, "logistic-4", source="/b/photos", digest=BRAIN, minute=4, limit=60)
    (one,) = data_sets(find_runs(tmp_path).runs)
    assert [state.digest for state in one.states] == [ANTS, BRAIN, OLD]


def test_a_folder_that_is_no_run_and_cannot_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as lost+found, where the folder of runs is a disk of its own; what is named like a run is missed."""
    made_run(tmp_path, "logistic-1")
    for name in ("lost+found", "notes", "knn-0123456789"):
        (tmp_path / name).mkdir()
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent.name in ("lost+found", "knn-0123456789"):
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert find_runs(tmp_path).damaged == ["knn-0123456789"]
    assert "lost+found" not in caplog.text
    assert f"run left out: {tmp_path}/knn-0123456789/config.yaml: cannot be read: Permission denied" in caplog.text


def test_a_run_of_an_older_state_that_is_asked_for_again_is_said_to_be_one(tmp_path: Path) -> None:
    made_run(tmp_path, "logistic-1", digest=OLD, minute=1)
    made_run(tmp_path, "logistic-2", digest=ANTS, minute=2)
    assert note_on_older_state(tmp_path, ["logistic-2"]) == ""
    note = note_on_older_state(tmp_path, ["logistic-1"])
    assert note.startswith(
        f"logistic-1 was trained on {OLD[:10]}, an older state of photos. Runs on {ANTS[:10]} are newer"
    )
    assert note.endswith(f"--data-set {OLD[:10]}")
    made_run(tmp_path, "knn-3", digest=ANTS, head="knn", minute=3)
    with pytest.raises(RunError, match="linear one on the newest state of photos, and fine-tuning needs one"):
        take_run(tmp_path, accept=lambda run: run.run_id == "logistic-1")


def test_the_newest_state_is_that_of_the_newest_run(tmp_path: Path) -> None:
    made_run(tmp_path, "logistic-1", digest=OLD, accuracy=0.99, minute=1)
    made_run(tmp_path, "logistic-2", digest=ANTS, accuracy=0.6, minute=2)
    made_run(tmp_path, "logistic-3", digest=OLD, accuracy=0.7, minute=3)  # the change was taken back
    assert taken(tmp_path) == "logistic-1"


@pytest.mark.slow
def test_a_state_that_is_trained_on_again_is_the_newest_again(tmp_path: Path) -> None:
    """A class was renamed, and named back: the first run is there already, and is the one to take."""
    first = made_run(tmp_path, "logistic-1", digest=OLD, accuracy=0.7, minute=1)
    made_run(tmp_path, "logistic-2", digest=ANTS, accuracy=0.9, minute=2)
    trial = made_run(tmp_path, "logistic-3", digest=BRAIN, minute=3, limit=50)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    renew_states(tmp_path, ["logistic-2"])  # it is of the newest state
    renew_states(tmp_path, ["logistic-2", "logistic-1"])
    renew_states(tmp_path, [trial.run_id])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert taken(tmp_path) == "logistic-2"
    renew_states(tmp_path, ["logistic-1"])
    assert taken(tmp_path) == "logistic-1"
    assert note_on_older_state(tmp_path, ["logistic-1"]) == ""
    after = {path for path, old in before.items() if path.read_bytes() != old}
    assert after == {first.folder / "environment.json"}
    renewed = Run.open(first.folder).environment
    assert renewed == first.environment | {"renewed": renewed["renewed"]}
    shutil.rmtree(tmp_path / "logistic-1")
    shutil.rmtree(tmp_path / "logistic-2")
    made_run(tmp_path, "logistic-4", digest=ANTS, minute=4, limit=60)
    renew_states(tmp_path, [trial.run_id])  # of trials alone
    assert taken(tmp_path) == trial.run_id


@pytest.mark.parametrize("created", ["2026-99-99", "soon", None, 7, "9999-12-31T23:59:59+00:00junk", "0001-01-01"])
def test_a_time_that_is_none_is_the_oldest(created: Any, tmp_path: Path) -> None:
    made_run(tmp_path, "logistic-good", digest=ANTS, minute=1)
    path = made_run(tmp_path, "logistic-odd", digest=OLD, minute=2).folder / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created": created}))
    assert taken(tmp_path) == "logistic-good"


# --- what a data set is -------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_source_is_recorded_as_one_place_whatever_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = paint_folder(tmp_path / "real" / "photos", {"cat": 12, "dog": 12})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    stores = []
    monkeypatch.chdir(tmp_path / "real")
    for number, given in enumerate((Path("photos"), images, tmp_path / "link" / "photos", Path("../real/photos/"))):
        stores.append(extract(given, tmp_path / f"{number}.h5").store)
    assert {describe_features(store, "last.avg")["source"] for store in stores} == {str(images)}
    manifest = "path,label,lies\n" + "".join(f"{path},{path[:3]},x\n" for path in stores[0].images.paths)
    (images / "list.csv").write_text(manifest)
    by_list = extract(images / "list.csv", tmp_path / "list.h5").store
    assert describe_features(by_list, "last.avg")["source"] == str(images / "list.csv")
    assert source_of("sample:digits", "/cache/digits") == "sample:digits"
    assert source_of("photos.zip", "/data/photos.zip") == "/data/photos.zip"


@pytest.mark.slow
def test_runs_belong_together_by_source_or_by_content(tmp_path: Path) -> None:
    states = [f"{number:064x}" for number in range(6)]
    made_run(tmp_path, "logistic-1", source="/a/photos", digest=states[0], minute=1)
    made_run(tmp_path, "logistic-2", source="/a/photos", digest=states[1], minute=2)  # ten images more
    made_run(tmp_path, "logistic-3", source="/b/photos", digest=states[1], minute=3)  # the folder was moved
    made_run(tmp_path, "logistic-4", source="/b/photos", digest=states[2], minute=4)  # and a label corrected
    made_run(tmp_path, "logistic-5", source="/c/photos", digest=states[3], minute=5)  # another folder of that name
    made_run(tmp_path, "logistic-6", source="/c/list.csv", digest=states[4], minute=6)
    made_run(tmp_path, "logistic-7", source="/c/list.csv", digest=states[5], minute=7, target="breed")
    found = {one.name: [state.digest for state in one.states] for one in data_sets(find_runs(tmp_path).runs)}
    assert list(found) == ["list.csv:breed", "list.csv", "photos"]  # two of the last name
    assert [len(one.states) for one in data_sets(find_runs(tmp_path).runs)] == [1, 1, 1, 3]
    with pytest.raises(ConfigurationError, match="2 data sets that are called 'photos'") as refused:
        take_run(tmp_path, data_set="photos")
    assert "/b/photos" in str(refused.value)
    assert "/c/photos" in str(refused.value)
    assert taken(tmp_path, data_set="/c/photos") == "logistic-5"
    assert taken(tmp_path, data_set="/a/photos") == "logistic-4"  # where it once was
    assert taken(tmp_path, data_set=states[1][:64]) in ("logistic-2", "logistic-3")


def test_copies_that_both_went_on_are_two_data_sets(tmp_path: Path) -> None:
    """The newer copy is not taken for the older one, which was trained on again after it had been copied."""
    states = [f"{number:064x}" for number in range(3)]
    made_run(tmp_path, "logistic-1", source="/a/photos", digest=states[0], minute=1)
    made_run(tmp_path, "logistic-2", source="/b/copy", digest=states[0], minute=2)
    made_run(tmp_path, "logistic-3", source="/c/backup", digest=states[0], minute=3)  # this one did not go on
    made_run(tmp_path, "logistic-4", source="/a/photos", digest=states[1], minute=4)
    assert taken(tmp_path) == "logistic-4"  # up to here, the images may have been moved to and fro
    made_run(tmp_path, "logistic-5", source="/b/copy", digest=states[2], minute=5)
    with pytest.raises(ConfigurationError, match="holds runs of 2 data sets"):
        take_run(tmp_path)
    assert taken(tmp_path, data_set="/a/photos") == taken(tmp_path, likely="/a/photos") == "logistic-4"
    assert taken(tmp_path, data_set="copy") == taken(tmp_path, data_set="/c/backup") == "logistic-5"
    assert len(leaderboard(tmp_path)) == 5


def test_runs_of_the_first_release_noted_what_was_typed(tmp_path: Path) -> None:
    """It was mostly typed in the folder of the store, so that is where a relative path is taken from."""
    first = made_run(tmp_path, "logistic-1", source="photos", store="/home/me/features.h5", digest=OLD, minute=1)
    assert first.source == "/home/me/photos"
    made_run(tmp_path, "logistic-2", source="/home/me/photos", digest=ANTS, minute=2)
    made_run(tmp_path, "logistic-3", source="sample:digits", digest=BRAIN, minute=3)
    assert [(one.name, len(one.states)) for one in data_sets(find_runs(tmp_path).runs)] == [
        ("sample:digits", 1),
        ("photos", 2),
    ]


def test_a_source_that_the_first_release_noted_through_a_link_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "data" / "photos").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")
    runs, place = tmp_path / "runs", tmp_path / "data" / "photos"
    made_run(runs, "logistic-1", source=str(tmp_path / "link" / "photos"), digest=OLD, minute=1)
    made_run(runs, "logistic-2", source=str(place), digest=ANTS, minute=2)
    made_run(runs, "logistic-3", source="/data/brain", digest=BRAIN, minute=3)
    assert [one.sources for one in data_sets(find_runs(runs).runs)] == [("/data/brain",), (str(place),)]
    assert taken(runs, likely=str(place)) == "logistic-2"


# --- several data sets --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_several_data_sets_are_refused_and_listed_and_one_may_be_named(tmp_path: Path) -> None:
    two_data_sets(tmp_path)
    with pytest.raises(ConfigurationError) as refused:
        take_run(tmp_path)
    said = str(refused.value)
    assert "holds runs of 2 data sets; name one by its name, source or digest with --data-set" in said
    assert f"ants {ANTS[:10]}: 1 run, /data/ants" in said
    assert f"brain {BRAIN[:10]}: 1 run, /data/brain" in said
    for name in ("brain", "/data/brain", BRAIN, BRAIN[:10], BRAIN[:4].upper()):
        assert taken(tmp_path, data_set=name) == "logistic-brain"
    assert taken(tmp_path, data_set="ants") == "logistic-ants"
    for name in ("ant", "bbb", "c" * 10, ""):
        with pytest.raises(ConfigurationError, match=f"holds no runs of a data set '{name}'"):
            take_run(tmp_path, data_set=name)
    for number in range(12):
        made_run(tmp_path, f"knn-{number}", head="knn", source=f"/{'x' * 200}/{number}", digest=f"{number:064}")
    with pytest.raises(ConfigurationError, match="and 8 more: bottleneck leaderboard lists all") as refused:
        take_run(tmp_path)
    assert len(str(refused.value)) <= 1000 + len(str(tmp_path))


@pytest.mark.slow
def test_the_leaderboard_and_the_report_mark_one_run_of_each(tmp_path: Path) -> None:
    runs = two_data_sets(tmp_path / "runs")
    made_run(runs, "ridge-brain", head="ridge", source="/data/brain", digest=BRAIN, accuracy=0.5, minute=3)
    made_run(runs, "logistic-old", source="/data/brain", digest=OLD, accuracy=1.0, minute=0)
    rows = leaderboard(runs)
    assert [(row["data_set"], row["run_id"], row["chosen"], row["stale"]) for row in rows] == [
        ("brain", "logistic-brain", True, False),
        ("brain", "ridge-brain", False, False),
        ("brain", "logistic-old", False, True),
        ("ants", "logistic-ants", True, False),
    ]
    document = make_report(runs, tmp_path / "report.html")
    assert [(group["name"], group["chosen"], group["runs"]) for group in document["groups"]] == [
        ("ants", "logistic-ants", 1),
        ("brain", "logistic-brain", 2),
    ]
    older = {"state": "an older state", "digest": OLD, "runs": 1, "chosen": "logistic-old"}
    assert [group["older"] for group in document["groups"]] == [[], [older]]
    assert f"  brain, an older state {OLD[:10]}: 1 stale run" in pipeline.stages.report.summary(document).splitlines()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "4 runs on 2 data sets" in page
    assert page.count("<h2 ") == 2
    assert "<summary>1 run on older states</summary>" in page
    assert page.count("<code>logistic-old</code>") == 1
    one = make_report(runs, tmp_path / "one.html", data_set="ants")
    assert ([group["name"] for group in one["groups"]], one["runs"]) == (["ants"], 1)


@pytest.mark.slow
def test_a_report_on_many_data_sets_opens_each_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        made_run(tmp_path / "runs", f"logistic-{number}", source=f"/data/{number}", digest=f"{number:064}")
    opened: list[Path] = []
    first = Run.open

    def count(folder: Path) -> Run:
        opened.append(folder)
        return first(folder)

    monkeypatch.setattr(Run, "open", count)
    assert len(make_report(tmp_path / "runs", tmp_path / "report.html")["groups"]) == 10
    assert len(opened) == len(set(opened)) == 10


def test_the_run_is_named_and_what_is_stale_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two_data_sets(tmp_path)
    made_run(tmp_path, "logistic-old", source="/data/brain", digest=OLD, accuracy=1.0, minute=0)
    with caplog.at_level(logging.INFO, "pipeline.runs.board"):
        take_run(tmp_path, data_set="brain")
        take_run(tmp_path / "logistic-ants")
    assert caplog.messages == [
        f"run taken: {tmp_path}/logistic-brain (brain {BRAIN[:10]}, of 1 run; 1 stale run of other states left out)",
        f"run taken: {tmp_path}/logistic-ants",
    ]


# --- fine-tuning --------------------------------------------------------------------------------------------
def test_fine_tuning_starts_from_the_asterisk_among_heads_that_it_can_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def linear(run: Run) -> bool:
        return run.config["head"]["name"] == "logistic"

    made_run(tmp_path, "knn-best", head="knn", accuracy=0.97, parameters=1, minute=1)
    made_run(tmp_path, "logistic-good", accuracy=0.95, parameters=99, minute=2)
    made_run(tmp_path, "logistic-newest-and-worst", accuracy=0.5, parameters=1, minute=9)
    with caplog.at_level(logging.INFO, "pipeline.runs.board"):
        assert taken(tmp_path, accept=linear) == "logistic-good"
    assert "; knn-best cannot be fine-tuned again)" in caplog.text
    with pytest.raises(RunError, match=r"no run of a Keras head .* needs one \(any of classification\); train it"):
        take_run(tmp_path, accept=lambda run: False, fitting=lambda task: [f"any of {task.name}"])


def test_the_images_say_which_data_set_is_fine_tuned(tmp_path: Path) -> None:
    two_data_sets(tmp_path)
    assert taken(tmp_path, likely="/data/ants") == taken(tmp_path, likely=ANTS) == "logistic-ants"
    assert taken(tmp_path, likely="/data/ants", data_set="brain") == "logistic-brain"
    with pytest.raises(ConfigurationError, match="holds runs of 2 data sets"):
        take_run(tmp_path, likely="/data/bees")


def test_the_verdict_compares_with_the_best_head_of_the_same_data(tmp_path: Path) -> None:
    made_run(tmp_path, "logistic-weak", accuracy=0.6)
    made_run(tmp_path, "ridge-best", head="ridge", accuracy=0.95)
    made_run(tmp_path, "ridge-other", head="ridge", accuracy=1.0, source="/data/brain", digest=BRAIN)
    start = {"start": "logistic-weak"}
    tuned = made_run(tmp_path, "finetune-logistic-1", accuracy=0.9, settings=start)
    found = best_head(tuned)
    assert found is not None
    assert (found["run"], found["accuracy"]) == ("ridge-best", 0.95)
    weak = Run.open(tmp_path / "logistic-weak").metrics["validation"]
    document = {
        "run": "r", "cached": False, "resumed": None, "parity_gap": 0.0, "minutes": 1.0, "trainable_variables": 1,
        "trainable_parameters": 1, "cut": "c", "before": weak, "after": tuned.metrics["validation"], "best_head": found,
    }  # fmt: skip
    assert (
        "not worth it: no more validation images are classified correctly than by the best head, ridge-best (-5 of 100 images)"
        in summary(document)
    )
    assert "worth it: the accuracy is above the confidence interval of the head alone (+30 of 100 images)" in summary(
        {**document, "best_head": None}
    )
    document |= {"run": str(tuned.folder), "start": "logistic-weak"}
    assert advised(document) == tmp_path / "ridge-best"  # not the fine-tuned run, which is no better
    assert advised({**document, "best_head": None}) == tuned.folder  # better than the head alone
    assert advised({**document, "best_head": None, "after": weak}) == tmp_path / "logistic-weak"
    assert advised({**document, "best_head": None, "after": weak, "start": "elsewhere"}) == tuned.folder


# --- the command line ---------------------------------------------------------------------------------------
def test_commands_refuse_several_data_sets_and_name_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = two_data_sets(tmp_path / "runs")
    image = paint_folder(tmp_path / "new", {"cat": 1}) / "cat"
    out = str(tmp_path / "model.keras")
    for command in (
        ["predict", str(runs), str(image)],
        ["evaluate", str(runs), str(image)],
        ["export", str(runs), "--out", out],
        ["finetune", str(runs), "--images", str(image)],
    ):
        assert main(command) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert f"brain {BRAIN[:10]}: 1 run, /data/brain" in said.err
    assert main(["predict", out, str(image), "--data-set", "ants"]) == 1
    capsys.readouterr()
    assert main(["leaderboard", str(runs), "--data-set", "ants", "--json"]) == 0
    assert [row["run_id"] for row in json.loads(capsys.readouterr().out)] == ["logistic-ants"]
    assert main(["leaderboard", str(runs), "--csv"]) == 0
    listed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["data_set"] for row in listed] == ["brain", "ants"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_after_a_first_data_set_every_command_answers_about_the_right_one(tmp_path: Path) -> None:
    """As `make demo` does, the three stages of one data set, and then another of other classes in the same folder."""
    backbone, runs = save_network(tmp_path / "tiny.keras"), tmp_path / "runs"
    demo, own = paint_noise(tmp_path / "demo"), paint_noise(tmp_path / "own", ("ant", "bee"))
    for path in own.rglob("*.png"):  # other images
        path.write_bytes(path.read_bytes() + b"\0")

    def call(*words: object, code: int = 0) -> tuple[str, str]:
        done = call_pipeline(*words)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    def prepare(images: Path, head: str, *options: object) -> Path:
        store = tmp_path / f"{images.name}.h5"
        call("extract", images, "--out", store, "--backbone", backbone, "--batch-size", 16)
        call("train-head", store, "--head", head, "--runs", runs, *options)
        return store

    prepare(demo, "logistic")
    first = json.loads(call("finetune", runs, "--images", demo, "--epochs", 1, "--json")[0])["run"]
    assert f"run taken: {runs}/" in call("predict", runs, own / "validation")[1]
    prepare(own, "dropout-linear", "--param", "epochs=2")
    boards = json.loads(call("leaderboard", runs, "--json")[0])
    assert {row["data_set"]: row["chosen"] for row in boards if row["chosen"]} == {"demo": True, "own": True}
    assert [row["data_set"] for row in boards] == ["own", "demo", "demo"]
    # unnamed: refused, with both listed
    for words in (("predict", runs, own / "validation"), ("export", runs, "--out", tmp_path / "x.keras")):
        _, said = call(*words, code=2)
        assert "holds runs of 2 data sets" in said
        assert "own" in said
        assert "demo" in said
    # named: the right classes
    rows, said = call("predict", runs, own / "validation", "--data-set", "own", "--format", "jsonl")
    assert {tuple(json.loads(line)["probabilities"]) for line in rows.splitlines()} == {("ant", "bee")}
    assert f"run taken: {runs}/dropout-linear-" in said
    # the images say which data set is fine-tuned
    tuned = json.loads(call("finetune", runs, "--images", own, "--epochs", 1, "--json")[0])
    assert Run.open(tuned["run"]).classes == ("ant", "bee")
    assert tuned["run"] != first
    assert tuned["best_head"]["run"].startswith("dropout-linear-")
    report = json.loads(call("report", runs, "--out", tmp_path / "report.html", "--json")[0])
    assert [(group["name"], group["runs"]) for group in report["groups"]] == [("demo", 2), ("own", 2)]
    # ten images more, and a class renamed: another state, whose run is taken although it is not better
    (own / "train" / "bee").rename(own / "train" / "wasp")
    (own / "validation" / "bee").rename(own / "validation" / "wasp")
    for path in sorted((demo / "train" / "brick").iterdir())[:10]:
        shutil.copy(path, own / "train" / "ant" / f"more-{path.name}")
    prepare(own, "knn")
    _, said = call("predict", runs, own / "validation", "--data-set", "own", "--format", "jsonl")
    assert f"run taken: {runs}/knn-" in said
    assert "2 stale runs of other states left out" in said
    assert len(FeatureStore.open(tmp_path / "own.h5")) == 2 * 44 + 10
