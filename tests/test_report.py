"""The report: what it says is what the run's files say; bad input is said, and never a failure."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import NumpyNetwork, extract, paint_folder, recipe
from PIL import Image

from features.augmentation import AugmentSpec
from features.errors import ConfigurationError, RunError
from features.recipe import PixelRule
from features.store.reader import FeatureStore
from pipeline.heads.records import describe_features
from pipeline.presets import LogisticParameters
from pipeline.reporting import charts
from pipeline.reporting import data as report_data
from pipeline.reporting.data import Rows
from pipeline.reporting.reproduce import commands
from pipeline.reporting.thumbnails import Pictures
from pipeline.runs.folder import Predictions, Run
from pipeline.runs.writing import Outcome, write_run
from pipeline.scores.metrics import calibration_error, evaluate
from pipeline.stages.report import make_report, summary
from pipeline.tasks.table import CLASSIFICATION

HOSTILE = '"><script>window.hacked=1</script>'


def rows(labels: Sequence[int], probabilities: Sequence[Sequence[float]], classes: Sequence[str] = ("a", "b")) -> Rows:
    paths = tuple(f"{classes[label]}/{number}.png" for number, label in enumerate(labels))
    digests = tuple(bytes([number % 256]) * 32 for number in range(len(labels)))
    return Rows(paths, digests, np.array(labels, np.int32), np.array(probabilities, np.float64), tuple(classes))


def run_folder(
    root: Path,
    name: str,
    classes: Sequence[str],
    paths: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    *,
    sha256: np.ndarray | None = None,
    features: dict[str, Any] | None = None,
    history: dict[str, list[float]] | None = None,
    **options: Any,
) -> Run:
    """A finished run of made-up predictions; its head is never opened."""
    head = SimpleNamespace(
        files=("head.json",), name="logistic", pool="none", parameters=LogisticParameters(C=0.5), seed=0,
        classes=tuple(classes), parameter_count=7, task=CLASSIFICATION, save=lambda folder: (folder / "head.json").write_text("{}"),
    )  # fmt: skip
    if features is None:
        values = {
            "store": "/nowhere/features.h5",
            "name": "last.avg",
            "source": "/nowhere/images",
            "split_rule": "hash",
        }
        values |= {"recipe": recipe().to_dict(), "fingerprint": recipe().fingerprint, "data_digest": "d" * 64}
        features = {**values, "backbone": "numpy", "weights": "none"}
    digests = np.zeros((len(labels), 32), np.uint8) if sha256 is None else sha256
    folder = write_run(
        root,
        name,
        Outcome(
            head,  # type: ignore[arg-type]
            history or {"rows": [1.0]},
            evaluate(probabilities, labels, classes),
            Predictions(paths, digests, labels, probabilities),
            1.5,
        ),
        features=features,
        plots=False,
        **options,
    )
    return Run.open(folder)


def guesses(labels: np.ndarray, classes: int, wrong: float, seed: int = 0) -> np.ndarray:
    """Probabilities, of which about the share ``wrong`` point at another class."""
    generator = np.random.default_rng(seed)
    aims = np.where(generator.random(len(labels)) < wrong, generator.integers(0, classes, len(labels)), labels)
    values = generator.dirichlet(np.full(classes, 0.5), len(labels)) * 0.4
    values[np.arange(len(labels)), aims] += 0.6
    return values


def stored_run(store: FeatureStore, root: Path, name: str, wrong: float, seed: int, **options: Any) -> Run:
    """A run on the validation rows of a store."""
    chosen = store.rows("validation")
    labels = store.images.labels[chosen]
    paths = [store.images.paths[row] for row in chosen]
    values = guesses(labels, len(store.classes), wrong, seed)
    features = describe_features(store, store.names[0])
    return run_folder(
        *(root, name, store.classes, paths, labels, values),
        sha256=store.images.sha256[chosen],
        features=features,
        **options,
    )


# --- what is worked out ------------------------------------------------------------------------------------


def test_the_class_table_is_precision_recall_and_f1() -> None:
    found = rows([0, 0, 0, 1], [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]], ("cat", "dog"))
    cat, dog = report_data.class_table(found)
    assert cat == {"name": "cat", "n": 3, "predicted": 2, "precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    assert dog == {"name": "dog", "n": 1, "predicted": 2, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    never = report_data.class_table(rows([0], [[0.9, 0.1, 0.0]], ("a", "b", "c")))[1]
    assert (never["precision"], never["recall"], never["f1"]) == (None, None, None)


def test_the_matrix_has_counts_and_shares_and_the_pairs_come_by_count() -> None:
    found = rows([0] * 4 + [1] * 5, [[0.9, 0.1]] * 3 + [[0.2, 0.8]] + [[0.6, 0.4]] * 2 + [[0.1, 0.9]] * 3)
    first, second = report_data.matrix(found)
    assert [(cell["count"], cell["share"], cell["hit"]) for cell in first["cells"]] == [
        (3, 0.75, True),
        (1, 0.25, False),
    ]
    assert [cell["step"] for cell in first["cells"]] == [8, 5]
    assert [cell["count"] for cell in second["cells"]] == [2, 3]
    pairs = report_data.confused_pairs(found)
    assert [(pair["label"], pair["predicted"], pair["count"], pair["share"]) for pair in pairs] == [
        ("b", "a", 2, 0.4),
        ("a", "b", 1, 0.25),
    ]


def test_the_bins_add_up_to_the_calibration_error() -> None:
    labels = np.random.default_rng(3).integers(0, 3, 200).astype(np.int32)
    found = rows(labels.tolist(), guesses(labels, 3, 0.3).tolist(), ("a", "b", "c"))
    bins = report_data.reliability(found)
    assert sum(one["n"] for one in bins) == 200
    total = sum(one["n"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / 200
    assert total == pytest.approx(calibration_error(found.probabilities, found.labels), abs=1e-12)


def test_mistakes_come_by_confidence_and_hits_by_doubt() -> None:
    found = rows([0, 0, 1, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.95, 0.05], [0.1, 0.9]])
    assert report_data.most_confident_mistakes(found) == [3, 1]
    assert report_data.least_confident_hits(found) == [2, 0, 4]
    card = report_data.card(found, 3)
    assert (card["file"], card["correct"]) == ("b/3.png", False)
    assert card["lines"] == [("", "a", 0.95), ("is:", "b", 0.05)]
    assert report_data.card(found, 0)["lines"] == [("", "a", 0.9), ("next:", "b", 0.1)]


def test_a_sample_keeps_mistakes_and_is_the_same_each_time() -> None:
    labels = np.zeros(300, np.int32)
    values = np.tile([0.9, 0.1], (300, 1))
    values[::30] = [0.1, 0.9]
    found = rows(labels.tolist(), values.tolist())
    chosen = report_data.sample_rows(found, 60)
    assert len(chosen) == len(set(chosen.tolist())) == 60
    assert set(range(0, 300, 30)) <= set(chosen.tolist())
    np.testing.assert_array_equal(chosen, report_data.sample_rows(found, 60))
    assert len(report_data.sample_rows(found, 1000)) == 300


def test_files_with_the_same_bytes_in_two_splits_are_named() -> None:
    sha256 = np.repeat(np.array([[1], [1], [2], [2], [3]], np.uint8), 32, axis=1)
    found = report_data.exact_duplicates(
        sha256, np.array([0, 1, 0, 0, 1]), np.array([0, 0, 0, 1, 1]), ("a", "b", "c", "d", "e")
    )
    assert found == {"copies": 2, "crossing": [["a", "b"]], "conflicts": 1}


def test_numbers_on_an_axis_have_as_many_decimals() -> None:
    assert charts.ticks(0.0, 0.31) == [0.0, 0.1, 0.2, 0.3]
    assert charts.numbers([0.0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert charts.numbers([1e-5, 1.0, 1e5]) == ["1e-5", "1e0", "1e5"]
    assert charts.log_ticks(1e-3, 50) == [1e-3, 1e-2, 0.1, 1.0, 10.0]
    assert charts.ticks(2.0, 2.0) == [2.0]


def test_text_in_a_chart_is_escaped() -> None:
    series = [charts.Series("training", [1, 2], [0.5, 0.4], 0)]
    drawn = charts.line_chart(series, title=HOSTILE, x_label="<b>", y_label="y", kept=(2, "<i>"))
    assert "<script" not in drawn
    assert "<b>" not in drawn
    assert "&lt;i&gt;" in drawn


def test_a_picture_that_is_gone_changed_or_broken_is_counted(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"a": 4, "b": 1})
    (source / "a" / "0003.png").write_bytes(b"no image")
    missing = "a/0009.png"
    wanted = [("a/0000.png", None), ("a/0001.png", b"x" * 32), ("a/0003.png", None), (missing, None)]
    pictures = Pictures([str(tmp_path / "elsewhere"), str(source)], ["a/0000.png"])
    cards = pictures.cards(wanted)
    assert [bool(card) for card in cards] == [True, False, False, False]
    assert dict(pictures.failures) == {"changed": 1, "not-an-image": 1, "missing": 1}
    sprite, places = pictures.sprite(wanted)
    assert (sprite[:23], places) == ("data:image/jpeg;base64,", [0, -1, -1, -1])
    none = Pictures([str(tmp_path / "elsewhere")], ["a/0000.png"])
    assert "does not exist" in none.missing
    assert none.cards(wanted) == [""] * 4


def test_the_commands_say_what_differs_from_the_usual(tmp_path: Path) -> None:
    labels = np.array([0, 1], np.int32)
    run = run_folder(tmp_path / "my runs", "logistic-1", ("a", "b"), ["a/0.png", "b/1.png"], labels, np.eye(2))
    made = [shlex.split(line) for line in commands(run)]
    assert made[0][:5] == ["bottleneck", "extract", "/nowhere/images", "--out", "/nowhere/features.h5"]
    assert made[0][made[0].index("--image-size") + 1] == "8x8"
    assert "--dtype" not in made[0]
    assert made[1][1:7] == ["train-head", "/nowhere/features.h5", "--features", "last.avg", "--head", "logistic"]
    assert made[1][7:] == ["--param", "C=0.5", "--runs", str(tmp_path / "my runs")]


@pytest.mark.parametrize(
    ("backbone", "resize", "fit", "said"),
    [
        ("mobilenetv2", "antialias", "stretch", ""),
        ("mobilenetv2", "bicubic", "crop:256", "--resize bicubic --fit crop:256"),
        ("efficientnet-lite0", "bicubic", "crop:256", ""),
        ("efficientnet-lite0", "antialias", "stretch", "--resize antialias --fit stretch"),
        ("model", "antialias", "stretch", ""),
    ],
)
def test_the_commands_say_which_pixels_unless_the_network_has_them(
    tmp_path: Path, backbone: str, resize: str, fit: str, said: str
) -> None:
    run = run_folder(tmp_path, "logistic-1", ("a", "b"), ["a/0.png", "b/1.png"], np.array([0, 1], np.int32), np.eye(2))
    made = dataclasses.replace(recipe(backbone=backbone), pixels=PixelRule(224, 224, resize, fit))
    run.config["features"]["recipe"] = made.to_dict()
    words = shlex.split(commands(run)[0])
    start, end = words.index("224x224") + 1, words.index("--split")
    assert words[start:end] == said.split()


# --- the page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Images of four classes, one of them hostile, one file that cannot be read, features by hand."""
    folder = tmp_path_factory.mktemp("report")
    source = paint_folder(folder / "pictures", {"cat": 40, "dog": 40, "<b>hen": 40, "yak": 40})
    (source / "cat" / "<img src=x onerror=window.hacked=1>.png").write_bytes((source / "cat" / "0000.png").read_bytes())
    (source / "dog" / "torn.png").write_bytes(b"nothing")
    return extract(source, folder / "features.h5", split="stratified:0.6,0.4").store


@pytest.fixture(scope="module")
def page(store: FeatureStore) -> tuple[str, dict[str, Any], Run]:
    root = store.path.parent / "runs"
    stored_run(store, root, "logistic-worse", 0.5, 1)
    history = {
        "epoch": [1.0, 2.0, 3.0],
        "loss": [1.0, 0.5, 0.4],
        "val_loss": [0.9, 0.6, 0.7],
        "val_accuracy": [0.5, 0.7, 0.6],
    }
    best = stored_run(store, root, "logistic-best", 0.2, 2, history=history)
    labels = np.array([0, 1] * 10, np.int32)
    paths = [f"x/{number}.png" for number in range(20)]
    run_folder(root, "logistic-other", ("x", HOSTILE), paths, labels, guesses(labels, 2, 0.3))
    document = make_report(root, root.parent / "report.html")
    return (root.parent / "report.html").read_text(encoding="utf-8"), document, best


@pytest.mark.slow
def test_groups_are_apart_and_the_best_of_each_is_chosen(page: tuple[str, dict[str, Any], Run]) -> None:
    html, document, best = page
    assert [(group["name"], group["runs"], group["chosen"]) for group in document["groups"]] == [
        ("images", 1, "logistic-other"),
        ("pictures", 2, "logistic-best"),
    ]
    assert document["bytes"] == len(html.encode())
    assert "3 runs on 2 data sets" in html
    assert "do not measure the same thing" in html
    assert "logistic-best, " in summary(document)
    assert best.run_id == "logistic-best"


@pytest.mark.slow
def test_the_numbers_are_those_of_the_run(page: tuple[str, dict[str, Any], Run]) -> None:
    html, _, best = page
    scores = json.loads((best.folder / "metrics.json").read_text())["validation"]
    line = html[html.index('<tr class="chosen">', html.index("Runs on pictures")) :]
    shown = re.findall(r'class="num" data-v="([^"]+)"', line)[:4]
    assert [float(value) for value in shown] == [
        scores[name] for name in ("accuracy", "balanced_accuracy", "log_loss", "ece")
    ]
    low, high = scores["accuracy_interval"]
    assert f"{low:.4f} to {high:.4f}" in line
    tiles = dict(re.findall(r'<dt>([^<]+)</dt><dd><span class="figure">([^<]+)<', html[html.index('id="g2-run"') :]))
    for label, name in (("Macro F1", "macro_f1"), ("ROC AUC", "roc_auc"), ("Log loss", "log_loss")):
        assert tiles[label] == f"{scores[name]:.4f}"
    assert f"gets {round(scores['accuracy'] * scores['n'])} of {scores['n']} validation images right" in html
    assert "kept: epoch 2" in html


@pytest.mark.slow
def test_the_data_of_the_page(page: tuple[str, dict[str, Any], Run], store: FeatureStore) -> None:
    html, document, _ = page
    part = html[html.index('id="g2-data"') :]
    assert "1 file could not be read" in part
    assert "dog/torn.png" in part
    assert "not-an-image" in part
    listed = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', html)[-1])
    assert listed["classes"] == list(store.classes)
    validation = [store.images.paths[row] for row in store.rows("validation")]
    assert sorted(item["file"] for item in listed["images"]) == sorted(validation)
    assert all(item["tile"] >= 0 for item in listed["images"])
    assert document["groups"][1]["pictures"] >= len(validation)


@pytest.mark.slow
def test_text_is_escaped_and_only_our_own_script_may_run(page: tuple[str, dict[str, Any], Run]) -> None:
    html, _, _ = page
    assert html.count("<script") == 2  # ours, and the data of the group that has features
    assert "<script>window" not in html
    assert "<b>hen" not in html
    assert "&lt;b&gt;hen" in html
    assert "<img src=x" not in html
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1] or "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    assert not re.findall(r'(?:src|href)="(?!#|data:image/)', html)
    assert " style=" not in html  # would be blocked
    assert not re.findall(r"<[a-z][^>]* on[a-z]+=", html)


@pytest.mark.slow
def test_a_run_without_images_or_store_says_so(page: tuple[str, dict[str, Any], Run]) -> None:
    html, document, _ = page
    first = html[html.index('id="g1-run"') : html.index('id="g2"')]
    assert "There are no thumbnails, because the images were not found" in first
    assert "There is no feature map: /nowhere/features.h5: no such feature store" in first
    assert "Quarantine, duplicates and leakage are not known" in first
    assert document["groups"][0]["pictures"] == 0


@pytest.mark.slow
def test_a_damaged_store_costs_the_map_and_no_more(store: FeatureStore, tmp_path: Path) -> None:
    data = bytearray(store.path.read_bytes())
    values = store.array()
    data[values.offset + values.nbytes // 2] ^= 1  # type: ignore[union-attr]
    (tmp_path / "damaged.h5").write_bytes(data)
    run = stored_run(store, tmp_path / "runs", "logistic-1", 0.2, 2)
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace(str(store.path), str(tmp_path / "damaged.h5")))
    document = make_report(tmp_path / "runs", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("are not what was written (checksum differs)") == 2  # instead of the map, and of the data
    assert document["groups"][0]["pictures"] == 24


@pytest.mark.slow
def test_moved_images_and_stores_are_found_where_one_says(store: FeatureStore, tmp_path: Path) -> None:
    images, features = tmp_path / "moved", tmp_path / "moved.h5"
    shutil.copytree(store.path.parent / "pictures", images)
    shutil.copy(store.path, features)
    run = stored_run(store, tmp_path / "runs", "logistic-1", 0.2, 2)
    text = (run.folder / "config.yaml").read_text()
    changed = text.replace(f"store: {store.path}", "store: /gone.h5").replace(
        f"source: {store.source}", "source: /gone"
    )
    assert changed.count("/gone") == 2
    (run.folder / "config.yaml").write_text(changed)
    lost = make_report(tmp_path / "runs", tmp_path / "lost.html")
    assert lost["groups"][0]["pictures"] == 0
    found = make_report(tmp_path / "runs", tmp_path / "found.html", images=[str(images)], stores=[features])
    assert found["groups"][0]["pictures"] > 64
    # Without the images, but with the store, which knows where they were.
    known = make_report(tmp_path / "runs", tmp_path / "known.html", stores=[features])
    assert known["groups"][0]["pictures"] == found["groups"][0]["pictures"]


@pytest.mark.slow
def test_a_thousand_classes_are_listed_not_drawn(tmp_path: Path) -> None:
    classes = [f"class {number:04d}" for number in range(1000)]
    labels = np.arange(2000, dtype=np.int32) % 1000
    values = guesses(labels, 1000, 0.3)
    run_folder(tmp_path / "runs", "logistic-1", classes, [f"{n}.png" for n in range(2000)], labels, values)
    document = make_report(tmp_path / "runs", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert document["bytes"] < 2_000_000
    assert "1000 classes are too many for a matrix" in html
    assert '<table class="matrix">' not in html
    wrong = values.argmax(axis=1) != labels
    pairs = np.unique(np.stack([labels[wrong], values.argmax(axis=1)[wrong]]), axis=1, return_counts=True)[1]
    part = html[html.index("Most confused pairs</caption>") :]
    assert f'data-v="{pairs.max()}"' in part[: part.index("</tr>", part.index("<tbody>"))]
    assert html.count('<th scope="row" class="text sticky" data-v="class ') == 1000 + report_data.PAIRS


@pytest.mark.slow
def test_a_hundred_runs_of_1500_images_are_fast_and_small(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(1800):  # noise is what JPEG takes most bytes for
        folder = tmp_path / "images" / ("train" if number < 300 else "validation") / f"class{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.jpg")
    store = extract(tmp_path / "images", tmp_path / "features.h5", NumpyNetwork(), batch_size=64, shard_rows=900).store
    first = stored_run(store, tmp_path / "runs", "logistic-000", 0.2, 0)
    for number in range(1, 100):
        folder = shutil.copytree(first.folder, tmp_path / "runs" / f"logistic-{number:03d}")
        for name in ("config.yaml", "metrics.json"):
            text = (folder / name).read_text().replace("logistic-000", folder.name)
            (folder / name).write_text(text)
    started = time.process_time()
    document = make_report(tmp_path / "runs", tmp_path / "report.html")
    assert time.process_time() - started < 20
    assert (document["runs"], document["groups"][0]["runs"]) == (100, 100)
    assert document["bytes"] == (tmp_path / "report.html").stat().st_size < 5_000_000
    assert document["groups"][0]["pictures"] == 400 + 24
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "400 of 1,500 validation images" in html
    assert html.count("<code>logistic-") >= 100


@pytest.mark.slow
def test_a_page_that_would_be_too_large_goes_without_pictures(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stored_run(store, tmp_path / "runs", "logistic-1", 0.2, 2)
    monkeypatch.setattr("pipeline.stages.report.PAGE_BYTES", 60_000)
    make_report(tmp_path / "runs", tmp_path / "report.html")
    assert "the report has no thumbnails in the feature maps" in caplog.text
    assert "data:image" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_runs_and_a_folder_as_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"runs: there is no such folder of runs; bottleneck train-head makes one"):
        make_report(tmp_path / "runs", tmp_path / "report.html")
    (tmp_path / "runs").mkdir()
    with pytest.raises(RunError, match=r"runs: holds no finished run to report on; bottleneck train-head makes one"):
        make_report(tmp_path / "runs", tmp_path / "report.html")
    (tmp_path / "ruins").write_text("a file, which is no folder of runs")
    with pytest.raises(RunError, match=r"rums: there is no such folder of runs.*; did you mean 'runs'\?$"):
        make_report(tmp_path / "rums", tmp_path / "report.html")
    with pytest.raises(ConfigurationError, match="choose: received 'acuracy'"):
        make_report(tmp_path / "runs", tmp_path / "report.html", by="acuracy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ruins", "runs"]


@pytest.mark.slow
def test_what_a_report_would_destroy_is_kept(tmp_path: Path) -> None:
    labels = np.array([0, 1], np.int32)
    run = run_folder(tmp_path / "runs", "logistic-1", ("a", "b"), ["a/0.png", "b/1.png"], labels, np.eye(2))
    config, pipe, link = run.folder / "config.yaml", tmp_path / "pipe", tmp_path / "link.html"
    os.mkfifo(pipe)
    for out, message in (
        (tmp_path, r"--out .*: is a folder; expected a file, such as .*report\.html"),
        (config, r"config\.yaml: exists and is not an HTML page"),
        (pipe, "is a device or a pipe"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make_report(tmp_path / "runs", out)
    assert pipe.is_fifo()
    assert Run.open(run.folder).run_id == "logistic-1"
    link.symlink_to("real.html")
    for _ in range(2):  # a page may replace a page
        assert make_report(tmp_path / "runs", link)["out"] == str(link)
    assert link.is_symlink()
    assert (tmp_path / "real.html").stat().st_size > 10_000


@pytest.mark.slow
def test_an_edited_run_is_named_and_never_a_crash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = np.array([0, 1, 1], np.int32)
    folder = run_folder(
        *(tmp_path / "runs", "logistic-1", ("a", "b"), ["a/0.png", "b/1.png", "b/2.png"], labels),
        np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]),
    ).folder
    left_out = (  # before anything is said of it
        ("environment.json", '{"fit_seconds": "long"}', "fit_seconds: received 'long', expected a number"),
        ("environment.json", '{"fit_seconds": NaN}', "fit_seconds: received 'nan'"),
        ("environment.json", '{"parameters": [7]}', "parameters: received '[7]'"),
        ("environment.json", '{"parameters": true}', "parameters: received 'True'"),
        ("metrics.json", "{}", "metrics.json"),
    )
    lines = (folder / "predictions.csv").read_text().splitlines(keepends=True)
    refused = (
        ("predictions.csv", "".join(lines[:-1]), r"holds 2 images, expected 3 from metrics\.json"),
        ("predictions.csv", "".join(lines).replace("0.9,0.1", "1e300,0"), "probabilities that are not between 0 and 1"),
        ("predictions.csv", "".join(lines).replace("0.9,0.1", "nan,0"), "probabilities that are not between 0 and 1"),
        ("predictions.csv", "".join(lines) + "x" * 200_000, "cannot be read as predictions of 2 classes"),
        ("history.csv", "epoch,loss\n1,low\n", "column 'loss' holds a value that is not a number"),
        ("history.csv", "\udcff", "history.csv: cannot be read as the history of a run"),
    )
    for name, text, message in (*left_out, *refused):
        before = (folder / name).read_bytes()
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        caplog.clear()
        if (name, text, message) in refused:  # only its scores are shown
            document = make_report(tmp_path / "runs", tmp_path / "report.html")
            assert (document["damaged"], document["groups"][0]["pictures"]) == (["logistic-1"], 0)
        else:
            with pytest.raises(RunError, match="holds no finished run"):
                make_report(tmp_path / "runs", tmp_path / "report.html")
        assert re.search(message if (name, text, message) in refused else re.escape(message), caplog.text)
        (folder / name).write_bytes(before)
    # a loss that exploded is no curve, and no failure
    (folder / "history.csv").write_text("epoch,loss,val_loss\n1,1e308,0.5\n2,-1e308,0.4\n3,inf,0.6\n")
    make_report(tmp_path / "runs", tmp_path / "report.html")
    assert "log loss by epoch: validation from 0.5 to 0.6" in (tmp_path / "report.html").read_text()


def test_a_finetuned_run_is_made_again_by_three_commands(tmp_path: Path) -> None:
    labels = np.array([0, 1], np.int32)
    start = run_folder(tmp_path, "logistic-1", ("a", "b"), ["a/0.png", "b/1.png"], labels, np.eye(2))
    text = (start.folder / "config.yaml").read_text()
    settings = {
        "start": "logistic-1",
        "unfreeze": "15",
        "bn": "affine",
        "epochs": 5,
        "optimizer": "sgd",
        "momentum": 0.9,
    }
    settings |= {"augment": AugmentSpec.parse("flip").to_dict(), "mixed_precision": True, "trainable_variables": 6}
    changed = yaml.safe_load(text) | {"run_id": "finetune-1", "stage": "finetune", "finetune": settings}
    folder = shutil.copytree(start.folder, tmp_path / "finetune-1")
    (folder / "config.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    (folder / "metrics.json").write_text((folder / "metrics.json").read_text().replace("logistic-1", "finetune-1"))
    run = Run.open(folder)
    *before, last = commands(run, start=start)
    assert before == commands(start)
    assert shlex.split(last) == [
        *("bottleneck", "finetune", str(tmp_path / "logistic-1"), "--images", "/nowhere/images", "--augment", "flip"),
        *("--unfreeze", "15", "--bn", "affine", "--optimizer", "sgd", "--param", "momentum=0.9", "--mixed-precision"),
        *("--runs", str(tmp_path)),
    ]
    assert commands(run)[0] == "# the run it was fine-tuned from, logistic-1, is not here"
    run.config["finetune"]["augment"] = AugmentSpec(zoom=0.2).to_dict()  # of no preset, which no option names
    *before, note, last = commands(run, start=start)
    assert before == commands(start)
    assert note == "# AUGMENT: AugmentSpec(zoom=0.2) is not a preset; it can be given in Python only (augment=...)"
    assert "--augment AUGMENT --unfreeze 15" in last
    start.config["features"]["recipe"] = recipe(augmentation=AugmentSpec(zoom=0.2)).to_dict()
    note, line = commands(start, views=4)[:2]
    assert note.startswith("# AUGMENT: AugmentSpec(zoom=0.2) is not a preset")
    assert "--views 4 --augment AUGMENT --seed 0" in line


def test_a_relative_source_becomes_absolute_where_the_store_knows(tmp_path: Path) -> None:
    labels = np.array([0, 1], np.int32)
    run = run_folder(tmp_path, "logistic-1", ("a", "b"), ["a/0.png", "b/1.png"], labels, np.eye(2))
    for source, root, expected in (
        ("data/pets", "/home/me/data/pets", "/home/me/data/pets"),
        ("data/pets.csv", "/home/me/data", "/home/me/data/pets.csv"),
        ("data/link", "/elsewhere/pets", "data/link"),
        ("sample:digits", "/cache/digits", "sample:digits"),
    ):
        run.config["features"]["source"] = source
        assert shlex.split(commands(run, root=root)[0])[2] == expected
