"""Which folders are classes and which are splits, which labels are one: read rightly, or refused with the way out."""

from __future__ import annotations

import json
import logging
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import NumpyNetwork, extract, paint_folder
from test_sources import columns, labelled, manifest, refusal, split_names, touch

from features.errors import ConfigurationError, SourceError
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources.imageset import ImageSet
from features.sources.reading import Reading, look_alikes, split_of
from features.sources.scan import scan
from features.sources.splits import find_conflicts
from features.store.reader import FeatureStore
from pipeline.cli import main
from pipeline.reporting.reproduce import commands
from pipeline.runs.folder import Run
from pipeline.stages.train_head import train_head

CLASSES = ("glioma", "notumor", "pituitary")


def tree(root: Path, *tops: str, classes: tuple[str, ...] = CLASSES) -> Path:
    return touch(root, *(f"{top}/{name}/{number}.jpg" for top in tops for name in classes for number in range(2)))


def zipped(folder: Path, outer: str = "") -> Path:
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.jpg")):
            archive.write(path, outer + str(path.relative_to(folder)))
    return target


def counts(images: ImageSet) -> dict[str | None, int]:
    return dict(Counter(split_names(images).values()))


# --- split folders of any name ----------------------------------------------------------------------------


@pytest.mark.pain(16)
@pytest.mark.parametrize(
    "tops",
    [
        ("Training", "Testing"),
        ("Training", "Test"),
        ("training", "validation"),
        ("seg_train", "seg_test"),
        ("training_set", "test_set"),
        ("TrainSet", "ValSet", "TestSet"),
        ("train", "Testing"),
        ("fruits-360_Training", "fruits-360_Test"),
        ("trainval", "test"),
    ],
)
@pytest.mark.parametrize("outer", [None, "", "data/"])
def test_split_folders_of_other_names_are_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tops: tuple[str, ...], outer: str | None
) -> None:
    """Outer is the folder around them in an archive; None: a folder."""
    root = tree(tmp_path / "photos", *tops)
    images = scan(root if outer is None else zipped(root, outer))
    assert images.classes == CLASSES
    wanted = {top: ("train", "validation", "test")[split_of(top) or 0] for top in tops}
    assert counts(images) == dict.fromkeys(wanted.values(), 6)
    names = {path.removeprefix(outer or "").split("/")[0]: split for path, split in split_names(images).items()}
    assert names == wanted
    assert images.groups is None
    assert "split folders, as their names say: " in caplog.text
    assert "--class-level 1" in caplog.text


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("tops", [("seg_train", "seg_test"), ("train", "test"), ("Training", "Val", "Test")])
def test_a_split_folder_in_a_folder_of_its_own_name_is_read_through(
    tmp_path: Path, tops: tuple[str, ...], archive: bool
) -> None:
    """As Kaggle unpacks Intel's image classification: seg_train/seg_train/CLASS."""
    folder = tree(tmp_path / "photos", *(f"{top}/{top}" for top in tops))
    root = zipped(folder) if archive else folder
    images = scan(root)
    wanted = ("train", "validation", "test") if len(tops) == 3 else ("train", "test")
    assert (images.classes, counts(images)) == (CLASSES, dict.fromkeys(wanted, 6))
    assert sorted(images.paths)[0].split("/")[:3] == [min(tops), min(tops), "glioma"]
    again = scan(root, reading=Reading.recorded(images.reading))
    assert (labelled(again), counts(again)) == (labelled(images), counts(images))
    if tops != ("Training", "Val", "Test"):  # earlier releases refused it
        assert set(scan(root, reading=Reading(settled=True)).classes) == set(tops)


def test_pictures_without_classes_in_a_doubled_folder(tmp_path: Path) -> None:
    tree(tmp_path, "seg_train/seg_train")
    images = scan(touch(tmp_path, "seg_test/seg_test/1.jpg"))
    assert (images.classes, counts(images)) == (CLASSES, {"train": 6, "unlabelled": 1})
    touch(tmp_path, "seg_test/seg_test/sea/1.jpg", "seg_pred/seg_pred/1.jpg")
    assert "--split-folders test=seg_test,train=seg_train, which leaves other folders out" in refusal(tmp_path)
    (tmp_path / "seg_test/seg_test/sea/1.jpg").unlink()
    given = scan(tmp_path, reading=Reading("train=seg_train,test=seg_test"))
    assert (given.classes, counts(given)) == (CLASSES, {"train": 6, "unlabelled": 1})


@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (("cat/cat/1.jpg", "dog/dog/1.jpg"), ("cat", "dog")),
        (("test tubes/test tubes/1.jpg", "cups/1.jpg"), ("cups", "test tubes")),
        (("train/train/1.jpg", "train/cat/1.jpg", "test/cat/1.jpg"), ("cat", "train")),
        (("train/train/1.jpg", "train/cat/1.jpg", "test/test/1.jpg", "test/cat/1.jpg"), ("cat", "test", "train")),
    ],
)
def test_classes_that_are_called_like_the_folder_around_them_stay(
    paths: tuple[str, ...], classes: tuple[str, ...], tmp_path: Path
) -> None:
    assert scan(touch(tmp_path, *paths)).classes == classes


def test_a_class_that_one_split_lacks_changes_nothing(tmp_path: Path) -> None:
    tree(tmp_path, "Training")
    tree(tmp_path, "Testing", classes=CLASSES[:2])
    assert scan(tmp_path).classes == CLASSES


def test_a_flat_folder_of_test_images_is_unlabelled(tmp_path: Path) -> None:
    images = scan(touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test1/1.jpg"))
    assert images.classes == ("cat", "dog")
    assert split_names(images) == {"train/cat/1.jpg": "train", "train/dog/1.jpg": "train", "test1/1.jpg": "unlabelled"}


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("tops", [("fold_0", "fold_1"), ("2019", "2020"), ("Aachen", "Bonn"), ("train1", "train2")])
def test_what_is_not_certain_is_refused_with_three_ways(tmp_path: Path, tops: tuple[str, str], archive: bool) -> None:
    root = tree(tmp_path / "photos", *tops)
    message = refusal(zipped(root) if archive else root)
    for text in ("all hold the same folders, 'glioma', 'notumor', 'pituitary'", "rename them to train, validation and test",
                 f"--split-folders train={tops[0]},test={tops[1]}", "--class-level 2 if 'glioma'",
                 f"--class-level 1 if {tops[0]!r}"):  # fmt: skip
        assert text in message
    assert len(message) < 1000


@pytest.mark.parametrize("archive", [False, True])
def test_the_three_ways_lead_on(tmp_path: Path, archive: bool) -> None:
    folder = tree(tmp_path / "photos", "Aachen", "Bonn")
    root = zipped(folder) if archive else folder
    given = scan(root, reading=Reading("train=Aachen,test=Bonn"))
    assert (given.classes, counts(given), given.groups) == (CLASSES, {"train": 6, "test": 6}, None)
    second = scan(root, reading=Reading(class_level=2))
    assert (second.classes, counts(second)) == (CLASSES, {None: 12})
    assert second.groups == ("Aachen",) * 6 + ("Bonn",) * 6
    first = scan(root, reading=Reading(class_level=1))
    assert (first.classes, counts(first)) == (("Aachen", "Bonn"), {None: 12})
    assert first.groups == tuple(name for _ in range(2) for name in CLASSES for _ in range(2))
    for images in (given, second, first):  # what a store records gives the same again, and without a word
        again = scan(root, reading=Reading.recorded(images.reading))
        assert labelled(again) == labelled(images)
        assert (split_names(again), again.groups, again.reading) == (split_names(images), images.groups, images.reading)


def test_several_folders_of_one_split_and_folders_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path, "fold_0", "fold_1", "fold_2", "extra")
    images = scan(root, reading=Reading("train=fold_0,train=fold_1,validation=fold_2"))
    assert counts(images) == {"train": 12, "validation": 6}
    assert "left out: 6 images beside the class folders, those in 'extra' too" in caplog.text
    assert "--split-folders test=test,train=train" in refusal(
        tree(tmp_path / "a", "train", "test", "extra", classes=("x",))
    )


def test_splits_below_the_classes(tmp_path: Path) -> None:
    root = tree(tmp_path, "cat", "dog", classes=("train", "test"))
    message = refusal(root)
    assert "--class-level 1 --split-folders test=test,train=train" in message
    images = scan(root, reading=Reading("test=test,train=train", 1))
    assert (images.classes, counts(images)) == (("cat", "dog"), {"train": 4, "test": 4})
    assert split_names(images)["dog/test/0.jpg"] == "test"


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("cat/old/1.jpg", "cat/new/1.jpg", "dog/1.jpg"), ("cat", "dog")),  # a class with folders inside
        (("cat/images/1.jpg", "dog/images/1.jpg"), ("cat", "dog")),  # as Tiny ImageNet has them
        (("animals/cat/1.jpg", "animals/dog/1.jpg", "things/car/1.jpg", "things/cup/1.jpg"), ("animals", "things")),
        (("train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg", "test/b/1.jpg"), ("a", "b")),
    ],
)
def test_what_is_certain_is_read_as_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    caplog.set_level(logging.DEBUG)
    images = scan(touch(tmp_path, *names))
    assert (images.classes, images.groups, images.reading) == (classes, None, {})
    assert ("add --class-level 2" in caplog.text) == ("animals" in classes)
    assert len(caplog.records) == ("animals" in classes)


def test_a_class_named_like_a_split_is_refused(tmp_path: Path) -> None:
    kaggle = touch(tmp_path / "kaggle", "train/cat.0.jpg", "train/dog.0.jpg", "test1/1.jpg")
    message = refusal(kaggle)
    assert "'test1', 'train' would be classes, but such names are those of splits" in message
    for fix in ("as in train/cat/1.jpg", "a CSV manifest path,label", "add --class-level 1"):
        assert fix in message
    vehicles = touch(tmp_path / "vehicles", "train/1.jpg", "plane/1.jpg")
    assert "'train' would be a class" in refusal(vehicles)
    assert scan(vehicles, reading=Reading(class_level=1)).classes == ("plane", "train")
    nested = touch(tmp_path / "intel", "seg_train/seg_train/sea/1.jpg", "seg_test/seg_test/sea/1.jpg")
    assert scan(nested).classes == ("sea",)
    assert "'seg_test', 'seg_train' would be classes" in refusal(touch(nested, "seg_test/1.jpg", "seg_train/1.jpg"))
    beside = touch(tmp_path / "beside", "seg_train/sea/1.jpg", "seg_test/sea/1.jpg", "seg_pred/1.jpg")
    assert "If they are splits, add --split-folders test=seg_test,train=seg_train, which leaves" in refusal(beside)
    assert scan(beside, reading=Reading("test=seg_test,train=seg_train")).classes == ("sea",)
    assert scan(touch(tmp_path / "fine", "test tubes/1.jpg", "flasks/1.jpg")).classes == ("flasks", "test tubes")
    text = "path,label\n1.png,train\n2.png,test\n"
    assert "name that column 'split'" in refusal(manifest(tmp_path / "m", text, "1.png", "2.png"))
    assert scan(tmp_path / "m" / "images.csv", target="label").classes == ("test", "train")


def test_names_of_folders_are_quoted_in_what_may_be_pasted(tmp_path: Path) -> None:
    """They may come from a stranger's archive."""
    assert "--split-folders 'train=$(date),test=a;b'" in refusal(tree(tmp_path / "a", "$(date)", "a;b"))
    beside = touch(tmp_path / "c", "Train `w`/sea/1.jpg", "test_1/sea/1.jpg", "other/1.jpg")
    assert "add --split-folders 'train=Train `w`,test=test_1'" in refusal(beside)


def test_prediction_asks_nothing(tmp_path: Path) -> None:
    assert len(scan(tree(tmp_path, "Aachen", "Bonn"), labelled=False)) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_folders": "train"}, "expected SPLIT=FOLDER pairs"),
        ({"split_folders": "trian=a"}, "did you mean 'train'"),
        ({"split_folders": "train=a,test=a"}, "each folder once"),
        ({"class_level": 3}, "class level: received 3, expected 1 or 2"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ExtractionOptions(**options)


def test_options_that_the_source_cannot_meet(tmp_path: Path) -> None:
    root = tree(tmp_path / "a", "one", "two")
    with pytest.raises(SourceError, match=r"no folder 'tow' with images .* did you mean 'two'"):
        scan(root, reading=Reading("train=one,test=tow"))
    with pytest.raises(SourceError, match="no image lies in a class folder; leave --class-level out"):
        scan(touch(tmp_path / "b", "cat/1.jpg", "dog/1.jpg"), reading=Reading(class_level=2))
    with pytest.raises(ConfigurationError, match=r"--class-level: .* has no class folders"):
        scan(manifest(tmp_path / "c", "path,label\n1.png,a\n", "1.png"), reading=Reading(class_level=2))
    flat = touch(tmp_path / "d", "1.jpg", "2.jpg")
    for reading in (Reading("train=one"), Reading(class_level=1)):
        with pytest.raises(SourceError, match="no class folders, so --split-folders and --class-level mean nothing"):
            scan(flat, reading=reading)
        assert len(scan(flat, reading=Reading.recorded(reading.record))) == 2  # as predict does
    with pytest.raises(ConfigurationError, match="reading: received 'colour'"):
        Reading.recorded({"colour": 1})
    with pytest.raises(ConfigurationError, match=r"reading: received \[1\], expected a mapping"):
        Reading.recorded([1])  # type: ignore[arg-type]


@pytest.mark.slow
def test_stores_of_such_folders_made_earlier_still_open(tmp_path: Path) -> None:
    """They hold the split folders as classes; the same features get the right classes, and none is computed again."""
    root = tmp_path / "photos"
    paint_folder(root, {f"{top}/{name}": 3 for top in ("Training", "Testing") for name in ("a", "b")})
    network = NumpyNetwork()
    asked = ExtractionOptions(batch_size=4, workers=2)
    before = scan(root, reading=Reading(settled=True))  # as earlier releases read it
    assert before.classes == ("Testing", "Training")
    Extraction(before, network, tmp_path / "f.h5", asked).run()  # type: ignore[arg-type]
    assert FeatureStore.open(tmp_path / "f.h5").classes == ("Testing", "Training")
    result = Extraction(scan(root), network, tmp_path / "f.h5", asked).run()  # type: ignore[arg-type]
    assert (result.store.classes, result.inferred, result.written) == (("a", "b"), 0, True)
    assert [len(result.store.rows(split)) for split in ("train", "test")] == [6, 6]
    assert result.store.provenance["reading"] == {"split_folders": "test=Testing,train=Training"}


@pytest.mark.slow
def test_runs_remember_how_their_images_were_read(tmp_path: Path) -> None:
    root = paint_folder(tmp_path / "photos", {f"{top}/{name}": 9 for top in ("Training", "Val") for name in ("a", "b")})
    store = extract(root, tmp_path / "f.h5").store
    run = Run.open(train_head(store, "knn", runs=tmp_path / "runs").folder)
    assert run.config["features"]["reading"] == {"split_folders": "train=Training,validation=Val"}
    again = scan(root, reading=run.reading)
    assert (again.classes, counts(again)) == (("a", "b"), {"train": 18, "validation": 18})
    assert "--split-folders train=Training,validation=Val" in "\n".join(commands(run))
    plain = extract(paint_folder(tmp_path / "plain", {"a": 20, "b": 20}), tmp_path / "g.h5", split="stratified").store
    run = Run.open(train_head(plain, "knn", runs=tmp_path / "runs").folder)
    assert "reading" not in (run.folder / "config.yaml").read_text()
    assert run.reading == Reading(settled=True)


@pytest.mark.slow
def test_plain_stores_record_no_reading(tmp_path: Path) -> None:
    store = extract(paint_folder(tmp_path / "photos", {"a": 3, "b": 3}), tmp_path / "f.h5").store
    assert "reading" not in store.provenance


# --- labels that look alike -------------------------------------------------------------------------------


@pytest.mark.pain(20)
def test_labels_that_look_alike_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ["Cat", "cat", "cat", "0", "0.0", "nan", "dog", "cafe\u0301", "caf\u00e9"]
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    path = manifest(tmp_path, "path,label\n" + rows, *(f"{number}.png" for number in range(len(labels))))
    images = scan(path)
    assert images.classes == tuple(sorted(set(labels)))
    assert (
        "classes that look alike: '0' (1) and '0.0' (1); 'cafe\\u0301' (1) and 'caf\\xe9' (1); 'cat' (2) and 'Cat' (1)"
        in caplog.text
    )
    assert "the class 'nan' (1) looks like a missing label" in caplog.text
    assert caplog.text.count("--merge-labels") == 2
    caplog.clear()
    merged = scan(path, reading=Reading(merge_labels=True))
    assert merged.classes == ("0", "cafe\u0301", "cat", "dog")
    assert [name for _, name in sorted(labelled(merged).items())] == ["cat"] * 3 + ["0"] * 2 + [None, "dog"] + [
        "cafe\u0301"
    ] * 2
    assert dict(columns(merged, "given_splits"))["5.png"] == 3
    assert merged.reading == {"merge_labels": True}
    assert caplog.text == ""


def test_folders_that_look_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = touch(tmp_path, "cat/1.png", "cat /2.png", "Cat/3.png", "Cat/4.png", "dog/1.png")
    scan(root)
    assert "'Cat' (2) and 'cat' (1) and 'cat ' (1)" in caplog.text
    assert scan(root, reading=Reading(merge_labels=True)).classes == ("Cat", "dog")


def test_labels_that_are_different() -> None:
    assert look_alikes(dict.fromkeys(["a", "b", "1", "2", "10", "1.5", "nan", "a b", "ab", "1_0"], 1)) == []
    assert look_alikes({"1": 1, "1.0": 2, "01": 3}) == [["01", "1.0", "1"]]
    assert look_alikes({"12345678901234567": 1, "12345678901234568": 1}) == []  # equal as floats


def test_the_same_bytes_under_two_labels_of_one_split() -> None:
    contents = np.zeros((6, 32), np.uint8)
    contents[:, 0] = [1, 1, 2, 2, 1, 1]
    labels, splits = np.array([0, 1, 0, 0, 1, -1]), np.array([0, 0, 0, 0, 1, 0])
    assert find_conflicts(contents, labels, splits, list("abcdef")) == [("a", "b")]
    assert find_conflicts(contents[:0], labels[:0], splits[:0], []) == []


def test_the_same_image_in_two_class_folders_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = paint_folder(tmp_path / "photos", {"cat": 3, "dog": 3})
    (root / "dog" / "again.png").write_bytes((root / "cat" / "0001.png").read_bytes())
    extract(root, tmp_path / "f.h5", split="hash:1,0,0")
    assert "1 image has the same bytes as one of another class in the same split" in caplog.text
    assert "cat/0001.png = dog/again.png" in caplog.text


@pytest.mark.slow
def test_inspect_prints_classes_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = paint_folder(tmp_path / "photos", {"train/cat": 3, "train/a dog": 12, "test/cat": 2, "test/": 1})
    extract(root, tmp_path / "f.h5")
    assert main(["inspect", str(tmp_path / "f.h5")]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-3:]] == [
        ["class", "images", "train", "test"],
        ["a", "dog", "12", "12", "0"],
        ["cat", "5", "3", "2"],
    ]
    assert main(["inspect", str(tmp_path / "f.h5"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes_by_split"]["cat"] == {"train": 3, "test": 2}


@pytest.mark.slow
def test_inspect_names_the_licence_of_the_network_if_it_has_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, network = paint_folder(tmp_path / "photos", {"cat": 3, "dog": 3}), NumpyNetwork()
    assert "license" not in extract(root, tmp_path / "f.h5", network).store.provenance
    network.license = "apache-2.0"
    assert extract(root, tmp_path / "f.h5", network).store.provenance["license"] == "apache-2.0"
    assert main(["inspect", str(tmp_path / "f.h5")]) == 0
    assert "\n  network: numpy; licence: apache-2.0\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ("photos/daisy/1.png", "photos/tulip/2.png", "more/iris/3.png"),
            "the classes are 'more', 'photos'; no image lies in them directly. If the folders inside are the classes "
            "('daisy', 'iris', 'tulip'), add --class-level 2",
        ),
        (("cat/images/1.png", "dog/images/2.png"), ""),  # as in Tiny ImageNet
        (("cat/1.png", "dog/big/2.png", "dog/small/3.png"), ""),
    ],
)
def test_collections_of_class_folders_are_warned_about(
    files: tuple[str, ...], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = touch(tmp_path, *files)
    scan(root)
    assert caplog.messages == ([f"{root}: {said}"] if said else [])
    caplog.clear()
    if said:
        assert scan(root, reading=Reading(class_level=2)).classes == ("daisy", "iris", "tulip")
        assert caplog.messages == []
