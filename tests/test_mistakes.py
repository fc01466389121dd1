"""Mistakes that a newcomer makes, through the real command line: what the message says, and that nothing is destroyed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from helpers import extract, paint, paint_folder, run_pipeline

from features.store.reader import FeatureStore
from pipeline.cli import main
from pipeline.stages.train_head import train_head

SMALL = "--backbone mobilenetv2-0.35 --weights random --image-size 32 --engine keras"


class Mistake(NamedTuple):
    """What is typed, what the exit code is, and what the message has to say: received, expected, what to do."""

    what: str
    typed: str
    code: int
    says: tuple[str, ...]


# Nothing of these loads a network.
QUICK = [
    # ---------------------------------------------------------------------------------------- images
    Mistake("a wrong path", "extract photoz", 1, ("photoz does not exist: no 'photoz' in ", "did you mean 'photos'?")),
    Mistake("a file that is no image source", "extract notes.txt", 1,
            ("notes.txt is neither a folder, an image, nor one of .csv", ".zip", "Give the folder that holds your class folders")),
    Mistake("an address", "extract https://example.org/cats.zip", 1,
            ("https://example.org/cats.zip: a web server has no listing", "or download the file")),
    Mistake("an archive that is not read", "extract cats.rar", 1, ("cats.rar: archives of this kind cannot be read", "unpack it and give the folder")),
    Mistake("a damaged zip", "extract damaged.zip", 1, ("damaged.zip cannot be read as a zip archive", "truncated or damaged", "Download or pack it again")),
    Mistake("labels one level too deep", "extract deep", 1,
            ("deep holds a single folder, 'dataset'", "('cat', 'dog')", "give {place}/deep/dataset/train")),
    Mistake("split folders without class folders", "extract splits", 1, ("train holds images but no class folders", "expected train/CLASS/IMAGE")),
    Mistake("an empty folder", "extract empty", 1, ("empty holds no images: 1 folder was searched for", ".jpg", "one folder for each class")),
    Mistake("half a manifest", "extract half.csv", 1, ("half.csv, line 1: no column 'path', received 'file', 'label'", "rename 'file' to 'path'")),
    Mistake("a manifest with a slip of the pen", "extract slip.csv", 1,
            ("slip.csv, line 1: no column 'label', received 'path', 'lable'", "name the column of classes with --target, or rename it to 'label'")),
    Mistake("a manifest of files that are not there", "extract missing.csv", 1,
            ("missing.csv: none of its 2 files exists, for example {place}/a.png", "expected paths that are absolute or relative to the manifest's folder")),
    Mistake("a wrong label column", "extract breeds.csv --target bred", 1, ("no column 'bred' for the target, received 'path', 'label', 'breed'", "did you mean 'breed'?")),
    Mistake("a label column of a folder", "extract photos --target breed", 2, ("'breed' names a column of a manifest", "Leave --target out, or give the manifest")),
    Mistake("an image size with a comma", "extract photos --image-size 224,224", 2, ("--image-size: received '224,224'", "such as 224 or 192x256")),
    Mistake("an unknown command", "extrct photos", 2, ("No such command 'extrct'", "Did you mean 'extract'")),
    Mistake("an unknown option", "extract photos --bakcbone vgg16", 2, ("No such option: --bakcbone", "--backbone")),
    Mistake("no images named", "extract", 2, ("Missing argument 'images'", "Try ")),
    # ---------------------------------------------------------------------------------------- features
    Mistake("features that were never made", "train-head features.h5", 1, ("features.h5: no such feature store", "bottleneck extract IMAGES --out features.h5")),
    Mistake("a text for features", "train-head notes.txt", 3, ("notes.txt: not a readable feature store, nor any HDF5 file", "Give the file that bottleneck extract wrote")),
    Mistake("images for features", "train-head photos", 3,
            ("photos: is a folder, and a feature store is a file", "bottleneck extract photos --out features.h5")),
    Mistake("features that were cut off", "train-head cut.h5", 3, ("cut.h5: not a readable feature store (", "truncated", "extract again")),
    Mistake("a data set that is not there", "train-head f.h5 --features last.max", 2, ("f.h5: no feature set 'last.max'", "it holds last.avg", "did you mean 'last.avg'")),
    # ---------------------------------------------------------------------------------------- heads
    Mistake("an unknown head", "train-head f.h5 --head logisitc", 2, ("head: received 'logisitc'", "expected one of logistic, ridge", "did you mean 'logistic' or")),
    Mistake("an unknown parameter", "train-head f.h5 --head knn --param neighbours=3", 2, ("head 'knn': unknown key 'neighbours'", "did you mean 'n_neighbors'?")),
    Mistake("a parameter that is no number", "train-head f.h5 --param C=big", 2, ("head 'logistic': C: received 'big'", "expected a valid number")),
    Mistake("a parameter without a value", "train-head f.h5 --param C", 2, ("--param: received 'C'", "expected NAME=VALUE")),
    Mistake("an unknown pooling of a head", "train-head f.h5 --pool average", 2, ("pool: received 'average'", "none, avg, max, flatten", "did you mean 'avg'")),
    Mistake("a negative seed", "train-head f.h5 --seed -1", 2, ("seed: received -1", "expected 0 to 4294967295")),
    Mistake("memory in words", "train-head f.h5 --memory lots", 2, ("--memory: received 'lots'", "such as 2GB or 500MB")),
    Mistake("too little memory", "train-head f.h5 --memory 1KB", 1, ("head 'logistic'", "48 x 3 features", "1.0 kB are allowed", "ive more (--memory)")),
    Mistake("a sweep with a typo", "train-head f.h5 --heads typo.yaml", 2, ("typo.yaml: unknown key 'heads.0.haed'", "did you mean 'head'?")),
    Mistake("a sweep that is no YAML", "train-head f.h5 --heads broken.yaml", 2, ("broken.yaml: not valid YAML in line 3", "node content")),
    Mistake("a sweep that is not there", "train-head f.h5 --heads sweeps.yaml", 2, ("sweeps.yaml: cannot be read as a configuration file: No such file",)),
    Mistake("a head and a sweep", "train-head f.h5 --head knn --heads sweep.yaml", 2, ("--head, --param and --pool name one head, --heads a sweep", "give one or the other")),
    Mistake("one fold", "train-head f.h5 --folds 1", 2, ("--folds: received 1", "expected 2 or more")),
    Mistake("runs below a file", "train-head f.h5 --runs notes.txt/runs", 1, ("notes.txt is a file, not a folder", "Give another folder")),
    Mistake("images without labels", "train-head unlabelled.h5", 1, ("unlabelled.h5: none of its images has a label", "a folder named after the class", "path,label")),
    Mistake("one class", "train-head one.h5", 1, ("all training rows are of one class ('cat')", "Add images of another class and extract again")),
    Mistake("no training rows", "train-head test.h5", 1, ("test.h5: there are no train rows: the source gives splits, but no train images: add them", "(features are kept)")),
    Mistake("no validation rows", "train-head train.h5", 1, ("train.h5: there are no validation rows: the source gives its splits", "extract again with --validation-from-train 0.25 (features are kept)")),
    # ---------------------------------------------------------------------------------------- runs
    Mistake("a folder of runs that is not there", "leaderboard rums", 1, ("rums: there is no such folder of runs", "train-head makes one", "did you mean 'runs'?")),
    Mistake("features for runs", "leaderboard f.h5", 1, ("f.h5: is a file, expected a run or a folder of runs", "bottleneck train-head f.h5")),
    Mistake("an unknown score", "leaderboard runs --choose acuracy", 2, ("choose: received 'acuracy'", "did you mean 'accuracy'")),
    Mistake("two forms of one list", "leaderboard runs --csv --json", 2, ("--csv and --json are two forms", "give one of them")),
    Mistake("folds that nobody trained", "leaderboard runs --folds", 2, ("--folds: none of 1 run was cross-validated", "Train with --folds 5")),
    Mistake("a report of folds that nobody trained", "report runs --folds", 2, ("--folds: none of 1 run was cross-validated",)),
    Mistake("a choice among one head", "train-head f.h5 --head knn --choose accuracy", 2, ("--choose: compares heads, and there is only one", "leave it out")),
    Mistake("weights for an exported model", "predict mine.onnx photos --weights w.h5", 2, ("--weights w.h5: mine.onnx is an exported model, which holds its own weights",)),
    Mistake("a GPU for an exported model", "evaluate mine.onnx photos --device gpu", 2, ("mine.onnx is an exported model, which runs on the processor",)),
    Mistake("prediction without a run", "predict empty photos", 1, ("empty: holds no finished run", "bottleneck train-head makes one")),
    Mistake("prediction from features", "predict f.h5 photos", 1, ("f.h5: is a file, expected a run", "bottleneck train-head f.h5")),
    Mistake("prediction of a folder without images", "predict runs docs", 1, ("docs holds no images", "Give the folder that holds them")),
    Mistake("prediction into a folder", "predict runs photos --out empty", 2, ("--out empty: is a folder", "such as empty/predictions.csv")),
    Mistake("prediction of more classes than there are", "predict runs photos --top 5", 2, ("--top: received 5", "expected 1 to 2")),
    Mistake("fine-tuning of a head that has no layers", "finetune runs --images photos", 1, ("runs: holds no run of a Keras head or a linear one", "train-head --head dropout-linear")),
    Mistake("an unknown kind of export", "export runs --format onx --out model.onnx", 2, ("format: received 'onx'", "did you mean 'onnx'?")),
    Mistake("an export over a file", "export runs --format onnx --out mine.onnx", 2, ("mine.onnx exists", "remove it or give another name")),
    Mistake("a report of no runs", "report docs", 1, ("docs: holds no finished run", "bottleneck train-head makes one")),
]  # fmt: skip

# These load Keras, or look for weights.
SLOW = [
    Mistake("an unknown backbone", "extract photos --backbone mobilnetv2", 2, ("backbone: received 'mobilnetv2'", "expected the name of a network, a .keras or .onnx file", "did you mean 'mobilenetv2'")),
    Mistake("a text for a model", "extract photos --backbone fake.keras", 2, ("fake.keras is not a Keras model file", "Write one with model.save('NAME.keras')")),
    Mistake("an unknown layer", f"extract photos {SMALL} --layer out_rleu", 2, ("has no layer 'out_rleu'", "did you mean 'out_relu'", "Its last layers are")),
    Mistake("images too small for the backbone", "extract photos --weights random --image-size 8", 2, ("mobilenetv2 cannot be built for images of 8x8 pixels", "at least 32x32", "Choose a larger --image-size")),
    Mistake("an unknown pooling", f"extract photos {SMALL} --pooling average", 2, ("pooling: received 'average'", "none, avg, max, flatten", "did you mean 'avg'")),
    Mistake("an unknown number type", f"extract photos {SMALL} --dtype half", 2, ("dtype: received 'half'", "expected one of float32, float16")),
    Mistake("an unknown split", f"extract photos {SMALL} --split 80/20", 2, ("split: received '80/20'", "expected hash or stratified", "such as stratified:0.8,0.1,0.1")),
    Mistake("shares that do not add up", f"extract photos {SMALL} --split hash:0.5,0.1", 2, ("(0.5, 0.1, 0.0)", "which add up to 1, such as 0.8,0.1,0.1")),
    Mistake("negative views", f"extract photos {SMALL} --views -2 --augment flip", 2, ("views: received -2", "expected 1 to 1000")),
    Mistake("views of nothing", f"extract photos {SMALL} --views 4", 2, ("views: received 4, which without an augmentation would all be the plain image", "Add --augment with one of flip,")),
    Mistake("an unknown augmentation", f"extract photos {SMALL} --views 4 --augment flip-rotate", 2, ("augmentation: received 'flip-rotate'", "did you mean 'flip-rotation'")),
    Mistake("a GPU that is not there", f"extract photos {SMALL} --device gpu", 2, ("a GPU was asked for, but Keras sees none", "tensorflow[and-cuda]", "nvidia-smi", "use --device auto")),
    Mistake("a device of another name", f"extract photos {SMALL} --device cuda", 2, ("device: received 'cuda'", "expected one of auto, cpu, gpu; use gpu")),
    Mistake("an output below a file", f"extract photos --out notes.txt/f.h5 {SMALL}", 1, ("notes.txt: cannot write there", "is a file, not a folder", "Give another folder")),
    Mistake("a folder as output", f"extract photos --out empty {SMALL}", 3, ("empty: is a folder, and a feature store is a file, such as empty/features.h5",)),
    Mistake("another file as output", f"extract photos --out notes.txt {SMALL}", 3, ("notes.txt: not a readable feature store", "for --out a name that is free")),
    Mistake("an output of another recipe", f"extract photos --out g.h5 {SMALL} --image-size 48", 2, ("g.h5: holds features of another recipe (height: 32 -> 48; width: 32 -> 48)", "Choose another --out, or add --overwrite")),
    Mistake("an output of other images", f"extract other --out g.h5 {SMALL}", 2, ("g.h5: holds 60 images of", "only 0 of them are in", "choose another --out or add --overwrite")),
    Mistake("a weights file that is not there", "extract photos --weights none.h5", 1, ("weights: received 'none.h5', which is not a file", "Expected 'imagenet', 'random', or a file")),
    Mistake("a text for weights", "extract photos --weights notes.txt", 1, ("notes.txt is not a weights file", "expected HDF5 (.weights.h5, .h5)")),
    Mistake("fine-tuning without images", "finetune kerasruns", 2, ("nothing to train on: give --images",)),
    Mistake("fine-tuning on other classes", "finetune kerasruns --images birds", 1, ("its classes are not those of dropout-linear-", "without its classes 'cat', 'dog'; 'ape', 'bee' are no classes of the run", "Give the images that its features were made of")),
    Mistake("fine-tuning on other images", "finetune kerasruns --images other", 1, ("other: 6 of 6 validation images of dropout-linear-", "are not here", "Extract and train the head again")),
    Mistake("an unknown layer to train", "finetune kerasruns --images photos --unfreeze block_16_expnd", 2, ("has no layer 'block_16_expnd'", "did you mean 'block_16_expand'", "Use last-block")),
    Mistake("prediction of what is no image", "predict kerasruns fake.jpg --out rows.csv", 4, ("fake.jpg is unreadable (not-an-image", "none of 1 images could be read; nothing was written")),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newcomer's working folder: photos, features, runs, and what goes wrong."""
    place = tmp_path_factory.mktemp("newcomer")
    photos = paint_folder(place / "photos", {"cat": 30, "dog": 30})
    extract(photos, place / "f.h5", split="stratified")
    train_head(FeatureStore.open(place / "f.h5"), "knn", runs=place / "runs")
    for name in ("empty", "docs"):
        (place / name).mkdir()
    (place / "docs" / "letter.txt").write_text("Dear reader")
    for name in ("notes.txt", "mine.onnx", "fake.jpg", "fake.keras"):
        (place / name).write_text("my notes")
    (place / "cats.rar").write_bytes(b"Rar!")
    (place / "damaged.zip").write_bytes(b"PK\3\4 and no more")
    (place / "cut.h5").write_bytes((place / "f.h5").read_bytes()[:5000])
    paint_folder(place / "deep" / "dataset" / "train", {"cat": 3, "dog": 3})
    for split in ("train", "validation"):
        paint(place / "splits" / split / "1.png", (1, 2, 3))
    (place / "half.csv").write_text("file,label\na.png,cat\n")
    (place / "slip.csv").write_text("path,lable\nphotos/cat/0000.png,cat\n")
    (place / "missing.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
    (place / "breeds.csv").write_text("path,label,breed\nphotos/cat/0000.png,cat,siam\nphotos/dog/0000.png,dog,pug\n")
    (place / "typo.yaml").write_text("version: 1\nheads:\n  - haed: logistic\n")
    (place / "sweep.yaml").write_text("version: 1\nheads:\n  - head: knn\n")
    (place / "broken.yaml").write_text("version: 1\nheads: [\n")
    sets = place / "sets"
    extract(paint_folder(sets / "unlabelled", {"": 8}), place / "unlabelled.h5")
    extract(paint_folder(sets / "one", {"cat": 12}), place / "one.h5")
    extract(paint_folder(sets / "train", {"train/cat": 4, "train/dog": 4}), place / "train.h5")
    extract(paint_folder(sets / "test", {"test/cat": 4, "test/dog": 4, "validation/cat": 3}), place / "test.h5")
    shutil.rmtree(sets)
    return place


def snapshot(place: Path) -> dict[str, str]:
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in place.rglob("*")
    }


def check(
    mistakes: list[Mistake], place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before, wrong = snapshot(place), []
    for mistake in mistakes:
        capsys.readouterr()
        caplog.clear()
        code = main(mistake.typed.split())
        out, errors = capsys.readouterr()
        said = caplog.text + errors
        problems = [f"exit code {code}, not {mistake.code}"] * (code != mistake.code)
        problems += [f"does not say {text!r}" for text in mistake.says if text.format(place=place) not in said]
        problems += ["prints on standard output"] * (out != "")
        problems += ["shows a traceback"] * ("Traceback" in said)
        problems += ["changes what was there"] * (snapshot(place) != before)
        if problems:
            wrong.append(f"{mistake.what}: {', '.join(problems)}\n  $ bottleneck {mistake.typed}\n  {said}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers the proxies of its first use


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_mistakes_say_what_why_and_what_to_type(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    check(QUICK, here, capsys, caplog)


def test_there_are_forty_mistakes_and_no_two_alike() -> None:
    assert len(QUICK) >= 40
    assert len({mistake.typed for mistake in QUICK + SLOW}) == len({mistake.what for mistake in QUICK + SLOW})
    assert len({mistake.typed for mistake in QUICK + SLOW}) == len(QUICK) + len(SLOW)


@pytest.fixture(scope="module")
def with_network(place: Path) -> Path:
    """The same folder with features of a real network, and the run of a head that can be fine-tuned."""
    paint_folder(place / "other", {"cat": 15, "dog": 15}, start=900)
    paint_folder(place / "birds", {"ape": 5, "bee": 5}, start=300)
    typed = f"extract {place}/photos --out {place}/g.h5 --split stratified {SMALL}"
    assert main(["--quiet", *typed.split()]) == 0
    typed = f"train-head {place}/g.h5 --head dropout-linear --param epochs=1 --runs {place}/kerasruns"
    assert main(["--quiet", *typed.split()]) == 0
    return place


@pytest.mark.slow
def test_mistakes_with_networks(
    with_network: Path, here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    check(SLOW, here, capsys, caplog)


@pytest.mark.slow
def test_the_next_command_works_for_a_store_of_several_feature_sets(
    with_network: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = "--layer block_16_project --layer out_relu --pooling avg"
    assert main(f"extract photos --out two.h5 --split stratified {layers} {SMALL}".split()) == 0
    (typed,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("next: bottleneck ")]
    assert typed.endswith("train-head two.h5 --head logistic --features block_16_project.avg")
    assert main([*typed.split()[2:], "--runs", "two-runs"]) == 0


@pytest.mark.slow
def test_what_looks_like_a_mistake_and_works(
    with_network: Path, here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.make_archive("packed", "zip", "photos")
    shutil.copytree("photos", "gap")
    (here / "gap" / "bird").mkdir()
    for number in range(5):
        paint(here / "flat" / f"{number}.png", (number, 90, 90))
    paint_folder(here / "lone", {"cat": 5}, start=700)
    for source, rows, warning in (
        ("packed.zip", "60 rows, 2 classes (cat, dog)", ""),  # not unpacked
        ("gap", "60 rows, 2 classes", "folders without images are not classes: 'bird'"),
        (
            "flat",
            "5 rows, 0 classes",
            "no image has a label: features can be kept, but nothing can be trained. To train,",
        ),
        ("lone", "5 rows, 1 class (cat)", "only one class has images, 'cat': training needs two"),
    ):
        caplog.clear()
        assert main(f"extract {source} --out {source}.h5 {SMALL}".split()) == 0
        out, errors = capsys.readouterr()
        assert rows in out
        assert warning in caplog.text
        assert ("next: bottleneck train-head" in errors) == ("2 classes" in rows), errors
    for path in ("packed.zip", "packed.zip.h5", "gap.h5", "flat.h5", "lone.h5"):
        os.unlink(path)
    for path in ("gap", "flat", "lone"):
        shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_weights_without_a_network(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    says = ("the ImageNet weights of 'mobilenetv2' were not found. Tried:", "4. download: https://")
    says += (
        "What to do: download the file of route 4",
        "save it at the path of route 3",
        "--weights FILE",
        "--weights random",
    )
    check([Mistake("no network", "extract photos", 1, says)], here, capsys, caplog)


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_there(
    with_network: Path, here: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shutil.copytree("other", "more")
    shutil.copytree("photos", "more", dirs_exist_ok=True)

    def full(*arguments: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)  # the last moment at which a disk says so
    says = (
        "could not be written (No space left on device",
        "what was there before is untouched",
        "Make room and run the same command again",
    )
    mistakes = [
        Mistake("a full disk while predicting", "predict kerasruns photos --out notes.txt", 1, ("notes.txt: ", *says)),
        Mistake("a full disk while training", "train-head f.h5 --head logistic --runs runs", 1, ("No space left on device); nothing was left behind", "Make room")),
    ]  # fmt: skip
    check(mistakes, here, capsys, caplog)
    kept = snapshot(here)
    assert main(f"extract more --out g.h5 {SMALL}".split()) == 1
    errors = capsys.readouterr().err
    assert all(
        text in errors for text in ("g.h5", "No space left on device", "Make room and run the same command again")
    ), errors
    assert {name: value for name, value in snapshot(here).items() if name in kept} == kept  # shards may lie beside it
    monkeypatch.undo()
    shutil.rmtree(here / "more")
    shutil.rmtree(here / "g.h5.parts", ignore_errors=True)


@pytest.mark.slow
def test_a_backend_that_is_not_installed(here: Path) -> None:
    before = snapshot(here)
    done = run_pipeline("extract", "photos", *SMALL.split(), cwd=here, KERAS_BACKEND="torhc")
    assert (done.returncode, done.stdout) == (2, "")
    for text in ("Keras cannot start with KERAS_BACKEND='torhc'", "Install that backend", "or unset KERAS_BACKEND"):
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(here) == before


@pytest.mark.slow
def test_ctrl_c_is_no_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> Iterator[None]:
        raise KeyboardInterrupt

    before = snapshot(here)
    monkeypatch.setattr("pipeline.stages.train_head.train_head", interrupted)
    assert main(["train-head", "f.h5"]) == 130
    assert "interrupted; all finished work is kept. Run the same command again" in capsys.readouterr().err
    assert snapshot(here) == before
