"""The command line, in this process and in others: exit codes, messages, and what is left on disk after a mistake."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest
from helpers import call_pipeline, listing, paint, paint_folder, run_pipeline, run_without

from features.store.reader import FeatureStore

pytestmark = pytest.mark.slow
# An untrained network is enough where only the path through the program counts.
SMALL = ("--backbone", "mobilenetv2-0.35", "--weights", "random", "--image-size", "32", "--engine", "keras")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_folder(tmp_path_factory.mktemp("images"), {"cat": 30, "dog": 30})


@pytest.fixture(scope="module")
def extracted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A store, and what the process that made it said."""
    path = tmp_path_factory.mktemp("store") / "f.h5"
    result = run_pipeline("extract", source, "--out", path, "--split", "stratified", *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["format"], document["rows"], document["inferred"]) == (1, 60, 60)
    return path, result


@pytest.fixture(scope="module")
def store(extracted: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return extracted[0]


def test_a_locale_that_misreads_file_names_is_refused() -> None:
    """With LC_ALL=C alone Python reads names as UTF-8; this needs more, or a locale such as Latin-1."""
    asked = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_pipeline("inspect", "photos.h5", **asked)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the locale takes file names for ascii")
    assert "Set PYTHONUTF8=1, or LC_ALL=C.UTF-8" in done.stderr
    assert "no such feature store" in run_pipeline("inspect", "photos.h5", LC_ALL="C").stderr


def test_a_home_that_cannot_be_written_is_no_hindrance(source: Path, tmp_path: Path) -> None:
    home = {
        "HOME": "/dev/null",
        "BOTTLENECK_CACHE": "",
        "XDG_CACHE_HOME": "",
        "XDG_CONFIG_HOME": "",
        "MPLCONFIGDIR": "",
    }
    done = run_pipeline("extract", source, "--out", tmp_path / "f.h5", *SMALL, **home, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.h5"]


def test_the_backends_chatter_is_held_back(extracted: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert [line for line in extracted[1].stderr.splitlines() if not line.startswith(("next: ", "extract: "))] == []


def test_inspect_verify_and_a_second_extract(store: Path, source: Path) -> None:
    document = json.loads(call_pipeline("inspect", store, "--json").stdout)
    assert document["splits"] == {"train": 48, "validation": 6, "test": 6}
    assert document["classes"] == {"cat": 30, "dog": 30}
    assert document["data_sets"]["out_relu.avg"]["shape"] == [60, 1, 1280]
    assert document["provenance"]["engine"] == "keras-tensorflow"
    assert "every checksum holds" in call_pipeline("verify", store).stdout
    again = call_pipeline("extract", source, "--out", store, "--split", "stratified", *SMALL)
    assert "nothing to do: 60 rows cached, 0 inferred" in again.stdout


def test_a_run_with_nothing_to_do_imports_no_keras(store: Path, source: Path) -> None:
    heavy = {"keras", "tensorflow", "sklearn"}
    result = run_without(heavy, "extract", source, "--out", store, "--split", "stratified", *SMALL)
    assert (result.returncode, result.stderr.count("keras")) == (0, 0), result.stderr


def test_verify_finds_one_changed_byte(store: Path, tmp_path: Path) -> None:
    data = bytearray(store.read_bytes())
    opened = FeatureStore.open(store)
    data[opened.array().offset + opened.array().nbytes // 2] ^= 1
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(data)
    result = call_pipeline("verify", damaged)
    assert result.returncode == 3
    assert "/features/out_relu.avg rows 0 to 59 are not what was written" in result.stderr


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = call_pipeline("extract", source, "--out", tmp_path / "f.h5", *SMALL, "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert (document["new"], document["to_infer"], document["cached"]) == (60, 60, 0)
    assert listing(tmp_path) == []


def test_head_leaderboard_and_prediction(store: Path, source: Path, tmp_path: Path) -> None:
    first = call_pipeline("train-head", store, "--head", "knn", "--runs", tmp_path / "runs", "--json")
    assert first.returncode == 0, first.stderr
    document = json.loads(first.stdout)
    assert (document["cached"], document["metrics"]["validation"]["n"]) == (False, 6)
    again = json.loads(
        call_pipeline("train-head", store, "--head", "knn", "--runs", tmp_path / "runs", "--json").stdout
    )
    assert again == {**document, "cached": True, "fit_seconds": again["fit_seconds"]}
    rows = json.loads(call_pipeline("leaderboard", tmp_path / "runs", "--json").stdout)
    assert [row["head"] for row in rows] == ["knn"]
    assert rows[0]["accuracy"] == document["metrics"]["validation"]["accuracy"]
    table = list(csv.DictReader(call_pipeline("leaderboard", tmp_path / "runs", "--csv").stdout.splitlines()))
    assert table[0]["run_id"] == rows[0]["run_id"]
    predicted = call_pipeline("predict", tmp_path / "runs", source / "cat")
    assert predicted.returncode == 0, predicted.stderr
    lines = list(csv.DictReader(predicted.stdout.splitlines()))
    assert [line["file"] for line in lines] == [f"{index:04d}.png" for index in range(30)]
    assert all(abs(float(line["cat"]) + float(line["dog"]) - 1) < 1e-4 for line in lines)


def mistakes(source: Path, store: Path, folder: Path) -> dict[str, tuple[tuple[object, ...], int, str]]:
    empty = folder / "empty"
    empty.mkdir()
    one = paint_folder(folder / "one", {"cat": 4}, start=500)
    (folder / "file").touch()
    (folder / "text.weights.h5").write_text("no weights")
    other = folder / "other.h5"
    out = folder / "out.h5"
    return {
        "no such folder": (("extract", folder / "imgaes", "--out", out, *SMALL), 1, "imgaes"),
        "empty folder": (("extract", empty, "--out", out, *SMALL), 1, "holds no images"),
        "unknown backbone": (("extract", source, "--out", out, "--backbone", "mobilenetv22"), 2, "did you mean 'mobilenetv2'"),
        "unknown layer": (("extract", source, "--out", out, *SMALL, "--layer", "out_rleu"), 2, "did you mean 'out_relu'"),
        "unknown resize": (("extract", source, "--out", out, *SMALL, "--resize", "lanczos"), 2, "antialias, keras"),
        "image size in words": (("extract", source, "--out", out, "--image-size", "big"), 2, "such as 224 or 192x256"),
        "image too small": (("extract", source, "--out", out, "--weights", "random", "--image-size", "8"), 2, "--image-size"),
        "split that does not add up": (("extract", source, "--out", out, *SMALL, "--split", "hash:0.5,0.1"), 2, "add up to 1"),
        "batch size 0": (("extract", source, "--out", out, *SMALL, "--batch-size", "0"), 2, "received 0, expected 1 to 4096"),
        "negative workers": (("predict", folder, source, "--workers", "-1"), 2, "received -1, expected 1 to 1024"),
        "negative seed of a head": (("train-head", store, "--seed", "-1", "--runs", folder / "r"), 2, "received -1"),
        "missing weights": (("extract", source, "--out", out, "--weights", folder / "none.h5"), 1, "none.h5"),
        "weights that are none": (("extract", source, "--out", out, "--weights", folder / "text.weights.h5"), 1, "is not a weights file"),
        "no GPU": (("extract", source, "--out", out, *SMALL, "--device", "gpu"), 2, "Keras sees none"),
        "folder that cannot be written": (("extract", source, "--out", folder / "file" / "f.h5", *SMALL), 1, "cannot write there"),
        "another recipe": (("extract", source, "--out", store, *SMALL[:4], "--image-size", "48"), 2, "height: 32 -> 48"),
        "other images": (("extract", one, "--out", store, *SMALL), 2, "choose another --out or add --overwrite"),
        "no store": (("train-head", other), 1, "no such feature store"),
        "a text for a store": (("inspect", folder / "text.weights.h5"), 3, "not a readable feature store"),
        "unknown head": (("train-head", store, "--head", "logisitc", "--runs", folder / "r"), 2, "did you mean 'logistic'"),
        "unknown parameter": (("train-head", store, "--head", "knn", "--param", "neighbours=3", "--runs", folder / "r"), 2, "neighbours"),
        "parameter without a value": (("train-head", store, "--param", "C", "--runs", folder / "r"), 2, "expected NAME=VALUE"),
        "unknown data set": (("train-head", store, "--features", "out_relu.max", "--runs", folder / "r"), 2, "out_relu.avg"),
        "no runs": (("leaderboard", folder / "noruns"), 1, "no such folder of runs"),
        "no run to fine-tune": (("finetune", empty, "--images", source), 1, "holds no finished run"),
        "unknown option": (("extract", source, "--bakcbone", "vgg16"), 2, "bakcbone"),
    }  # fmt: skip


def test_mistakes_get_one_clear_error_and_leave_everything_as_it_was(store: Path, source: Path, tmp_path: Path) -> None:
    cases = mistakes(source, store, tmp_path)
    before, kept = listing(tmp_path), store.read_bytes()
    for name, (arguments, code, message) in cases.items():
        result = call_pipeline(*arguments)
        assert (name, result.returncode) == (name, code), result.stderr
        assert message in result.stderr, (name, result.stderr)
        assert "Traceback" not in result.stderr, (name, result.stderr)
        assert result.stdout == "", name
    assert listing(tmp_path) == before
    assert store.read_bytes() == kept


def test_one_class_and_a_class_with_one_image(tmp_path: Path) -> None:
    one = paint_folder(tmp_path / "one", {"cat": 12})
    result = call_pipeline("extract", one, "--out", tmp_path / "one.h5", *SMALL)
    assert result.returncode == 0
    assert "only one class has images, 'cat': training needs two" in result.stderr
    result = call_pipeline("train-head", tmp_path / "one.h5", "--runs", tmp_path / "runs")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "'cat'" in result.stderr
    paint(tmp_path / "one" / "dog" / "single.png", (1, 99, 1))
    result = call_pipeline("extract", one, "--out", tmp_path / "one.h5", *SMALL)
    assert result.returncode == 0
    assert "classes with fewer than 2 images: 'dog'" in result.stderr
    assert "1 inferred" in result.stdout


def test_wrong_shaped_weights_name_the_tensor(source: Path, assets: Path, tmp_path: Path) -> None:
    weights = assets / "weights" / "mobilenet_v2_0.35_224_no_top.weights.h5"
    result = call_pipeline("extract", source, "--out", tmp_path / "f.h5", "--weights", weights, "--image-size", "32")
    assert result.returncode == 1
    assert (
        "the first mismatch is 'Conv1/kernel', received shape (3, 3, 3, 16), expected shape (3, 3, 3, 32)"
        in result.stderr
    )
    assert listing(tmp_path) == []


def test_prediction_needs_no_labels(store: Path, source: Path, tmp_path: Path) -> None:
    run = call_pipeline("train-head", store, "--runs", tmp_path / "runs", "--json")
    assert run.returncode == 0, run.stderr
    first = sorted(source.rglob("*.png"))[0]
    (tmp_path / "new.csv").write_text(f"path,camera\n{first},left\n")
    result = call_pipeline("predict", json.loads(run.stdout)["run"], tmp_path / "new.csv")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1].startswith(f"{first},{first.parent.name},")
