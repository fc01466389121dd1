"""The functions for Python: each example runs, results are plain, nothing is printed, and nothing heavy is imported early."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from finetuning import TinyWorld, tiny_world
from helpers import ROOT, STRESS
from PIL import Image
from sklearn.svm import LinearSVC

import features
import pipeline
from features.errors import ConfigurationError, SourceError
from features.machine import HOSTS
from features.shown import NotebookProgress, showing
from pipeline.api import pages
from pipeline.api.results import Evaluation, Leaderboard, Result, Suggestions

world = tiny_world
FUNCTIONS = ["FeatureStore", "train_head", "train_heads", "leaderboard", "open_run", "report", "audit", "similar"]
NETWORKS = ["suggest", "predict", "evaluate", "export", "finetune", "FeatureExtractor", "BottleneckClassifier"]
ROW = {"run_id": "<i>x</i>", "chosen": True, "head": "logistic", "accuracy": 0.5, "accuracy_interval": [0.25, 0.75]}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 20 cats, 20 dogs and a small network, as the examples expect them."""
    from finetuning import SIZE, save_network

    folder, generator = tmp_path_factory.mktemp("studio"), np.random.default_rng(0)
    for channel, name in enumerate(("cat", "dog")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(20):  # 12 of the 40 images are for validation
            pixels = generator.integers(0, 60, (SIZE, SIZE, 3)).astype(np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number:02d}.png")
    save_network(folder / "network.keras")
    return folder


def run_examples(owner: Any, name: str) -> int:
    """Run the examples of a public name; return how many there are."""
    public = getattr(owner, name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    parsed = doctest.DocTestParser().get_doctest(inspect.getdoc(public) or "", {}, name, None, None)
    said: list[str] = []
    runner.run(parsed, out=said.append)
    assert not said, f"{name}: {''.join(said)}"
    assert not any(example.options for example in parsed.examples), f"{name}: an example is left out"
    return len(parsed.examples)


@pytest.mark.slow
@pytest.mark.stress  # elsewhere the example of export is not run, which compares its file in a process of its own
def test_every_public_name_has_an_example_that_runs(
    studio: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(studio)
    handlers = list(logging.getLogger().handlers)
    names = ["extract_features", *FUNCTIONS, *NETWORKS, "compare_networks"]
    names += ["AugmentSpec", "BottleneckError", "PixelRule", "Recipe"]
    assert sorted(names) == sorted({*features.__all__, *pipeline.__all__})
    for name in names:
        if name == "suggest":
            plain = {"backbone": "network.keras", "progress": False}
            features.extract_features(studio / "photos" / "cat", "unlabelled.h5", **plain)
        if name == "export" and not STRESS:
            continue
        owner = features if name in features.__all__ else pipeline
        assert run_examples(owner, name), name
    assert capfd.readouterr().out == ""
    assert logging.getLogger().handlers == handlers
    board = pipeline.leaderboard()
    assert [row["run_id"] for row in board.rows] == board.to_pandas()["run_id"].tolist()
    opened = pipeline.open_run("runs")
    assert opened.run_id == board.chosen
    wrong = pipeline.train_head("features.h5", "knn", params={"n_neighbors": 28}, progress=False)  # one class for all
    shown = pipeline.open_run(wrong.run)
    assert {line["predicted"] == line["label"] for line in shown.mistakes} == {False}
    assert shown._repr_html_().count('src="data:image/') == len(shown.mistakes) == 6


@pytest.mark.slow
def test_an_interrupted_extraction_is_resumed(studio: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "extract" and done >= 16:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"backbone": str(studio / "network.keras"), "batch_size": 8, "shard_rows": 8}
    with pytest.raises(KeyboardInterrupt):
        features.extract_features(studio / "photos", tmp_path / "f.h5", progress=interrupt, **options)
    done: list[int] = []
    seen = lambda stage, count, total: done.append(total) if stage == "extract" else None  # noqa: E731
    store = features.extract_features(studio / "photos", tmp_path / "f.h5", progress=seen, **options)
    assert len(store) == 40
    assert max(done) < 40  # what was finished is not computed again


def test_names_cost_nothing_before_they_are_used() -> None:
    code = (
        "import sys, features, pipeline\n"
        "assert 'predict' in dir(pipeline) and 'extract_features' in dir(features)\n"
        "print(sorted({'numpy', 'tensorflow', 'keras', 'sklearn', 'h5py', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_extract_features_names_every_option_with_its_default() -> None:
    from features.extraction.options import ExtractionOptions

    given = inspect.signature(features.extract_features).parameters
    options = {field.name: field.default for field in dataclasses.fields(ExtractionOptions)}
    assert {name: given[name].default for name in list(given)[2:-1]} == options
    assert {given[name].kind for name in options} == {inspect.Parameter.KEYWORD_ONLY}


def test_finetune_and_predict_name_every_option_with_its_default() -> None:
    from pipeline.predicting.options import PredictOptions
    from pipeline.tuning.settings import TuningSettings

    given = inspect.signature(pipeline.finetune).parameters
    assert {name: given[name].default for name in TuningSettings.model_fields} == TuningSettings().model_dump()
    given = inspect.signature(pipeline.predict).parameters
    usual = {field.name: field.default for field in dataclasses.fields(PredictOptions)}
    assert {name: given[name].default for name in usual} == usual


READ_IMAGES = {  # function: the stage that reads, and arguments
    "audit": ("pipeline.auditing.stage.audit", ("f.h5",)),
    "compare_networks": ("pipeline.stages.compare.compare", ("photos", ["vgg16"])),
    "evaluate": ("pipeline.stages.evaluate.evaluate", ("runs", "photos")),
    "export": ("pipeline.stages.export.export", ("runs", "a.keras")),
    "finetune": ("pipeline.stages.finetune.finetune", ("runs", "photos")),
    "predict": ("pipeline.stages.predict.predict", ("runs", "photos")),
    "report": ("pipeline.stages.report.make_report", ()),
    "similar": ("pipeline.stages.similar.search", ("f.h5", "a.png")),
}


@pytest.mark.parametrize("name", READ_IMAGES)
def test_hosts_are_allowed_while_a_function_reads_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, given = READ_IMAGES[name]
    seen: list[str | None] = []

    def reading(*args: object, **options: object) -> None:
        seen.append(os.environ.get(HOSTS))
        raise InterruptedError

    monkeypatch.setenv(HOSTS, "images.lan")
    monkeypatch.setattr(stage, reading)
    monkeypatch.setattr("features.store.reader.FeatureStore.open", lambda path: SimpleNamespace(path=path))
    with pytest.raises(InterruptedError):
        getattr(pipeline, name)(*given, allow_host="10.0.0.7", progress=False)
    assert (seen, os.environ[HOSTS]) == (["images.lan,10.0.0.7"], "images.lan")


def test_every_function_that_reads_images_takes_hosts() -> None:
    taking = {
        name for name in pipeline.__all__ if "allow_host" in inspect.signature(getattr(pipeline, name)).parameters
    }
    assert taking == READ_IMAGES.keys()


@pytest.mark.slow
def test_results_give_arrays_about_rows_of_the_store(tmp_path: Path) -> None:
    from helpers import extract, paint_folder

    class Head:
        """Sure of the first images, in doubt about the last."""

        classes = ("cat", "dog")

        def predict_proba(self, X: np.ndarray) -> np.ndarray:
            first = np.linspace(1, 0.5, len(X))
            return np.stack([first, 1 - first], axis=1)

    photos = paint_folder(tmp_path / "photos", {"cat": 12, "dog": 12})
    store = extract(photos, tmp_path / "f.h5").store
    found = pipeline.similar(store, ["cat/0003.png", "dog/0001.png"], k=4)
    listed = [[item["path"] for item in line["neighbours"]] for line in found.images]
    assert [[store.images.paths[row] for row in rows] for rows in found.row_numbers.tolist()] == listed
    assert found.similarity[0, 0] == pytest.approx(found.images[0]["neighbours"][0]["similarity"], abs=1e-6)
    assert found.to_dict()["rows"] == 24
    audited = pipeline.audit(store, checks=["outlier", "same-bytes"])
    assert {check["check"]: check["flagged"] for check in audited.checks} == {
        name: int(audited[name].flag.sum()) for name in ("outlier", "same-bytes")
    }
    assert audited["outlier"].score.shape == (24,)
    assert list(audited) == ["same-bytes", "outlier"]
    with pytest.raises(
        ConfigurationError, match=r"received 'outliers', expected one of same-bytes, outlier; did you mean 'outl"
    ):
        audited["outliers"]
    bare = extract(photos / "cat", tmp_path / "bare.h5").store
    chosen = pipeline.suggest(bare, Head(), n=3, strategy="margin")
    assert [bare.images.paths[row] for row in chosen.row_numbers] == [line["path"] for line in chosen.images]
    assert chosen.row_numbers.tolist() == [11, 10, 9]
    np.testing.assert_allclose(chosen.scores, [1, 1 - 1 / 11, 1 - 2 / 11])


def test_a_result_is_plain() -> None:
    result = Evaluation(
        {"run": "a", "images": 2, "scores": {"accuracy": 0.51239, "n": 2}, "classes": ["x"], "confusion": [[2]]},
        lambda document: f"of {document['run']}",
    )
    assert repr(result) == "Evaluation(run='a', images=2, accuracy=0.5124, n=2)"
    assert (str(result), result.run, "scores" in dir(result)) == ("of a", "a", True)
    plain = result.to_dict()
    plain["scores"]["accuracy"] = 0
    assert result.scores["accuracy"] == 0.51239
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    with pytest.raises(AttributeError, match="Evaluation has no 'score'; it has run, images, scores"):
        _ = result.score  # type: ignore[attr-defined]


def test_html_is_escaped_and_shows_intervals() -> None:
    board = Leaderboard({"rows": [ROW], "chosen": "<i>x</i>", "damaged": []}, str)
    shown = board._repr_html_()
    assert "<i>" not in shown
    assert "&lt;i&gt;x&lt;/i&gt;" in shown
    assert 'x="25.0%"' in shown  # where the interval begins
    assert 'width="50.0%"' in shown
    assert "<script" not in pages.confusion([[1, 0], [0, 1]], ["<script>", "b"])
    cards = pages.pictures([("data:image/png;base64,AA", '"><script>')])
    assert "<script" not in cards


def test_a_board_shows_the_folds_that_decide_and_the_score_of_the_task() -> None:
    folded = ROW | {"cv_accuracy": 0.9, "cv_interval": [0.8, 0.95]}
    shown = pages.board([folded, ROW])
    assert "90.0 %, interval 80.0 to 95.0 % by folds" in shown
    assert (shown.count("<svg"), "cv_accuracy" in shown) == (1, True)  # no bar of another score beside it
    plain = {name: value for name, value in ROW.items() if "accuracy" not in name}
    shown = pages.board([plain | {"r2": 0.25, "r2_interval": [-0.1, 0.5], "mae": 3.5, "cv_r2": None}])
    assert ("<svg" in shown, ">r2<" in shown, ">0.25<" in shown, ">3.5<" in shown, "cv_r2" in shown) == (
        False,
        True,
        True,
        True,
        False,
    )
    shown = pages.board([plain | {"average_precision": 0.5, "average_precision_interval": [0.25, 0.75]}])
    assert "50.0 %, interval 25.0 to 75.0 %" in shown


def test_a_table_leaves_digests_out_and_breaks_long_texts_into_lines() -> None:
    image = {"path": "a.png", "sha256": "0" * 64, "why": "word " * 20}
    found = Suggestions({"file": "f.h5", "strategy": "mix", "images": [image]}, str)
    shown = found._repr_html_()
    assert re.findall("<th [^>]*>([^<]*)</th>", shown) == ["path", "why"]
    assert ["nowrap" in style for style in re.findall('<td style="([^"]*)">', shown)] == [True, False]
    assert found.to_pandas()["sha256"].tolist() == ["0" * 64]


def test_without_pandas_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigurationError, match=r"pandas is not installed; pip install pandas, or take to_dict"):
        Result({}, str).to_pandas()


def test_progress_is_shown_where_somebody_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with showing(True) as told:
        assert told is None  # neither a terminal nor a notebook
    with showing(False) as told:
        assert told is None
    calls: list[int] = []
    with showing(lambda stage, done, total: calls.append(done)) as told:
        assert told is not None
        told("extract", 3, 4)
    assert calls == [3]
    monkeypatch.setattr("features.shown.in_notebook", lambda: True)
    with showing(True) as told:
        assert isinstance(told, NotebookProgress)
        assert "<progress" in told._bar(10, 40, 2.0)
        assert "10 of 40, 5.0 steps/s, 6 s left" in told._bar(10, 40, 2.0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("features", "import pipeline"),
        ("pipeline", "import bottleneck_features"),
        ("features", "import bottleneck_features"),
    ],
)
def test_a_file_that_hides_a_package_is_named(name: str, code: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("")
    places = [str(tmp_path), str(ROOT), str(ROOT / "pipeline" / "names")]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {places}; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert f"ImportError: {tmp_path / name}.py hides the package {name} of bottleneck-features" in result.stderr


def test_one_module_has_the_names_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "pipeline" / "names")
    import bottleneck_features as bf

    assert bf.__all__ == sorted({*features.__all__, *pipeline.__all__})
    assert (bf.predict, bf.BottleneckError) == (pipeline.predict, features.BottleneckError)


def test_the_script_of_a_user_that_mypy_checks_uses_every_function() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert settings["mypy"]["strict"]
    assert "tests/typed" in settings["mypy"]["files"]
    assert "py.typed" in settings["setuptools"]["package-data"]["*"]
    script = (ROOT / "tests" / "typed" / "user_script.py").read_text()
    functions = {"extract_features", *pipeline.__all__} - {"BottleneckClassifier"}  # scikit-learn has no types
    assert [name for name in sorted(functions) if f".{name}(" not in script] == []


def test_a_store_of_another_version_is_refused_by_each_function_that_opens_one(tmp_path: Path) -> None:
    import shutil

    import h5py

    from features.errors import StoreError

    path = tmp_path / "later.h5"
    shutil.copy(ROOT / "tests" / "golden" / "store-v1.h5", path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    for asked in (
        pipeline.train_head,
        pipeline.audit,
        pipeline.suggest,
        lambda place: pipeline.train_heads(place, {"version": 1, "heads": [{"head": "logistic"}]}),
        lambda place: pipeline.similar(place, "a.png"),
    ):
        with pytest.raises(StoreError, match=r"later\.h5.*99"):
            asked(path)


@pytest.mark.slow
def test_the_heads_of_a_sweep_may_be_a_list(tmp_path: Path) -> None:
    from helpers import extract, paint_folder

    store = extract(paint_folder(tmp_path / "photos", {"cat": 12, "dog": 12}), tmp_path / "f.h5").store
    swept = pipeline.train_heads(store, ["nearest-mean", {"head": "knn"}], runs=tmp_path / "runs", folds=0, n_jobs=1)
    assert (swept.trained, sorted(line["head"] for line in swept.board)) == (2, ["knn", "nearest-mean"])
    with pytest.raises(ConfigurationError, match=r"heads: .*received 'logistc'.*did you mean 'logistic'"):
        pipeline.train_heads(store, ["logistc"], runs=tmp_path / "runs")


@pytest.mark.slow
def test_a_result_that_is_a_run_is_taken_as_its_path(world: TinyWorld, tmp_path: Path) -> None:
    runs, photos = tmp_path / "runs", world.images / "validation"
    trained = pipeline.train_head(world.store, "knn", runs=runs, progress=False)
    plain = {"progress": False, "weights": str(world.backbone)}
    asked = [trained, pipeline.open_run(trained), trained.run]
    assert len({str(pipeline.predict(run, photos, **plain).predictions) for run in asked}) == 1
    assert pipeline.evaluate(trained, photos, **plain).run == trained.run.split("/")[-1]
    said = str(trained)
    shutil.move(trained.run, tmp_path / "elsewhere")
    assert str(trained) == said
    assert pipeline.open_run(tmp_path / "elsewhere").metrics == trained.metrics


@pytest.mark.slow
def test_what_is_no_path_and_no_name_is_refused_with_what_is(world: TinyWorld, tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    for images in (picture, [picture], np.asarray(picture)):
        with pytest.raises(
            ConfigurationError,
            match=r"images: received an object of type .*, expected the paths of image files.*takes pixels",
        ):
            pipeline.predict(world.run, images, progress=False)
        with pytest.raises(
            ConfigurationError, match=r"images: received an object of type .*, expected the paths of image files"
        ):
            pipeline.similar(world.store, images, progress=False)
    for images in (["a.png"], None):
        with pytest.raises(
            SourceError,
            match=r"images: received an object of type .*manifest path,label, or give it to FeatureExtractor",
        ):
            features.extract_features(images, tmp_path / "f.h5")
    with pytest.raises(
        ConfigurationError, match=r"head: received LinearSVC\(\), expected a name .*'sklearn\.svm\.LinearSVC'"
    ):
        pipeline.train_head(world.store, LinearSVC())


def test_a_run_of_another_machine_is_opened_without_its_images() -> None:
    folder = next(path.parent for path in sorted((ROOT / "tests/golden/runs").glob("*/*/metrics.json")))
    run = pipeline.open_run(folder)
    assert run.metrics == json.loads((folder / "metrics.json").read_text())
    assert run.mistakes == [] or "<table" in run._repr_html_()
    assert "data:image" not in run._repr_html_()
    assert pipeline.leaderboard(folder.parent).rows
