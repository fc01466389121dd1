"""Images, labels and splits: who is listed, in which order, and on which side."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import string
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import rounds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from features.cache import cache_path
from features.errors import ConfigurationError, SourceError, UnreadableImageError
from features.machine import how_to_install
from features.sources import sample, splits
from features.sources import scan as sources
from features.sources.imageset import ImageSet
from features.sources.reading import Reading
from features.sources.scan import scan
from features.sources.splits import SPLITS, SplitRule, assign_splits, find_leakage, warnings_about


def touch(root: Path, *names: str) -> Path:
    """Files whose content is their name: the scan opens none of them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    return root


def labelled(images: ImageSet) -> dict[str, str | None]:
    return {path: images.classes[label] if label >= 0 else None for path, label in columns(images, "labels")}


def split_names(images: ImageSet) -> dict[str, str | None]:
    return {path: SPLITS[code] if code >= 0 else None for path, code in columns(images, "given_splits")}


def columns(images: ImageSet, name: str) -> list[tuple[str, int]]:
    return list(zip(images.paths, getattr(images, name).tolist(), strict=True))


def refusal(source: str | Path, **options: str) -> str:
    with pytest.raises(SourceError) as caught:
        scan(source, **options)
    return str(caught.value)


# --- folders ----------------------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    images = scan(touch(tmp_path, "dog/b.jpg", "dog/a.PNG", "cat/1.jpeg", "Zebra/z.webp", "cat/deep/er/2.gif"))
    assert images.paths == ("Zebra/z.webp", "cat/1.jpeg", "cat/deep/er/2.gif", "dog/a.PNG", "dog/b.jpg")
    assert images.classes == ("Zebra", "cat", "dog")  # by code point: capitals first
    assert images.labels.tolist() == [0, 1, 1, 2, 2]
    assert images.given_splits.tolist() == [-1] * 5
    assert (images.labels.dtype, images.given_splits.dtype) == (np.int32, np.int8)
    assert (images.sizes.dtype, images.mtimes_ns.dtype) == (np.int64, np.int64)
    assert images.groups is None
    assert len(images) == 5
    assert images.read(3) == b"dog/a.PNG"
    status = (tmp_path / "dog/a.PNG").stat()
    assert (images.sizes[3], images.mtimes_ns[3]) == (status.st_size, status.st_mtime_ns)
    assert images.description == str(tmp_path)


@pytest.mark.pain(1)
def test_pain_01_order_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in "cab" for number in (10, 9, 1)]
    first = scan(touch(tmp_path / "one", *names))
    second = scan(touch(tmp_path / "two", *reversed(names)))
    assert first.paths == second.paths == tuple(sorted(names))
    assert labelled(first) == labelled(second) == {name: name[0] for name in names}


@pytest.mark.parametrize("validation", ["validation", "val", "Valid"])
def test_split_folders(tmp_path: Path, validation: str) -> None:
    touch(
        tmp_path, "train/a/1.png", "train/b/1.png", f"{validation}/b/2.png", f"{validation}/c/x/3.png", "test/a/4.png"
    )
    images = scan(tmp_path)
    assert images.classes == ("a", "b", "c")  # the union; 'a' may be missing in one split
    assert labelled(images)[f"{validation}/c/x/3.png"] == "c"
    assert split_names(images) == {
        "train/a/1.png": "train",
        "train/b/1.png": "train",
        f"{validation}/b/2.png": "validation",
        f"{validation}/c/x/3.png": "validation",
        "test/a/4.png": "test",
    }


def test_train_alone_and_two_others_are_split_folders(tmp_path: Path) -> None:
    assert scan(touch(tmp_path / "one", "train/a/1.png", "train/b/1.png")).classes == ("a", "b")
    assert scan(touch(tmp_path / "two", "val/a/1.png", "test/b/1.png")).classes == ("a", "b")


def test_flat_test_folder_is_unlabelled(tmp_path: Path) -> None:
    images = scan(touch(tmp_path, "train/a/1.png", "train/b/1.png", "test/x.png"))
    assert labelled(images) == {"test/x.png": None, "train/a/1.png": "a", "train/b/1.png": "b"}
    assert split_names(images)["test/x.png"] == "unlabelled"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    images = scan(touch(tmp_path, "train/1.png", "plane/1.png"), reading=Reading(class_level=1))
    assert images.classes == ("plane", "train")
    assert images.given_splits.tolist() == [-1, -1]


def test_folders_that_mix_layouts_are_refused(tmp_path: Path) -> None:
    message = refusal(touch(tmp_path / "a", "train/x/1.png", "test/x/1.png", "plane/1.png"))
    assert "mixes split folders ('test', 'train')" in message
    assert "'plane'" in message
    assert "'val' and 'validation' both mean validation" in refusal(
        touch(tmp_path / "b", "train/x/1.png", "val/x/1.png", "validation/x/1.png")
    )
    assert "expected train/CLASS/IMAGE" in refusal(touch(tmp_path / "c", "train/1.png", "test/2.png"))


def test_flat_folder_and_single_image_are_unlabelled(tmp_path: Path) -> None:
    images = scan(touch(tmp_path, "b.jpg", "a.jpg"))
    assert (images.paths, images.classes) == (("a.jpg", "b.jpg"), ())
    assert (images.labels.tolist(), images.given_splits.tolist()) == ([-1, -1], [3, 3])
    single = scan(tmp_path / "b.jpg")
    assert (single.paths, single.root, single.labels.tolist()) == (("b.jpg",), tmp_path, [-1])
    assert single.read(0) == b"b.jpg"


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a/1.png", "b/1.png", "b/notes.txt", "b/2.heic", "b/3.heic", "loose.jpg", "empty/readme.txt")
    touch(tmp_path, ".hidden/1.png", "a/.hidden.png", "__MACOSX/a/1.png", "a/Thumbs.db", "a/jpg")
    images = scan(tmp_path)
    assert images.paths == ("a/1.png", "b/1.png")
    assert images.classes == ("a", "b")
    assert "left out: 5 files of other kinds: .heic 2, .txt 2, no suffix 1" in caplog.text
    assert "left out: 1 image beside the class folders" in caplog.text
    assert "folders without images are not classes: 'empty'" in caplog.text
    assert "MACOSX" not in caplog.text
    assert ".db" not in caplog.text


def test_a_tidy_folder_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    scan(touch(tmp_path, "a/1.png", "b/1.png"))
    assert caplog.text == ""


def test_folders_named_like_images_are_folders(tmp_path: Path) -> None:
    assert scan(touch(tmp_path, "a.jpg/1.png", "b/x.png/2.png")).paths == ("a.jpg/1.png", "b/x.png/2.png")


def test_class_folders_one_level_too_deep(tmp_path: Path) -> None:
    message = refusal(touch(tmp_path, "data/images/cat/1.png", "data/images/dog/1.png"))
    assert "single folder, 'data'" in message
    assert f"'cat', 'dog'): give {tmp_path}/data/images" in message
    inner = touch(tmp_path / "outer", "data/train/cat/1.png", "data/val/cat/1.png")
    assert f"give {inner}/data." in refusal(inner)
    assert scan(inner / "data").classes == ("cat",)


def test_one_class_is_scanned(tmp_path: Path) -> None:
    assert scan(touch(tmp_path, "cat/1.png", "cat/more/2.png")).labels.tolist() == [0, 0]


def test_special_files_and_dead_links_stay_in_the_list(tmp_path: Path) -> None:
    """They end up in quarantine with a name, instead of being gone."""
    touch(tmp_path, "a/1.png", "b/1.png")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    (tmp_path / "a/dead.jpg").symlink_to("nowhere")
    (tmp_path / "a/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "a/alive.jpg").symlink_to("1.png")
    with socket.socket(socket.AF_UNIX) as endpoint:
        directory = os.getcwd()
        os.chdir(tmp_path / "a")  # the address of a socket is short
        endpoint.bind("socket.jpg")
        os.chdir(directory)
    images = scan(tmp_path)
    assert images.paths == (
        "a/1.png",
        "a/alive.jpg",
        "a/dead.jpg",
        "a/loop.jpg",
        "a/pipe.jpg",
        "a/socket.jpg",
        "b/1.png",
    )
    assert images.sizes.tolist()[:3] == [7, 7, -1]
    assert images.mtimes_ns[2] == -1
    assert images.read(1) == b"a/1.png"
    reasons = []
    for index in (2, 3, 4, 5):
        with pytest.raises(UnreadableImageError) as caught:
            images.read(index)
        reasons.append(caught.value.reason)
    assert reasons == ["missing", "missing", "not-a-file", "not-a-file"]


def test_links_to_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path / "elsewhere", "1.png", "2.png")
    root = touch(tmp_path / "root", "b/1.png", "b/sub/2.png")
    (root / "a").symlink_to(tmp_path / "elsewhere")  # a class that lives elsewhere
    (root / "again").symlink_to(root / "b")  # the same class twice
    (root / "b/loop").symlink_to(root)
    (root / "b/sub/loop").symlink_to(".")
    (root / "b/itself").symlink_to("itself")
    (root / "self").symlink_to(".")
    (tmp_path / "elsewhere/back").symlink_to(root)
    start = time.process_time()
    images = scan(root)
    assert time.process_time() - start < 1
    assert images.paths == ("a/1.png", "a/2.png", "b/1.png", "b/sub/2.png")
    assert images.classes == ("a", "b")
    assert images.read(0) == b"1.png"
    assert "not followed" in caplog.text
    assert "'again'" in caplog.text


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    touch(tmp_path, "a/ok.png", "b/ü.png")
    raw = os.fsencode(tmp_path) + b"/a/caf\xe9.png"
    with open(raw, "wb") as file:
        file.write(b"coffee")
    images = scan(tmp_path)
    index = next(number for number, path in enumerate(images.paths) if os.fsencode(path) == b"a/caf\xe9.png")
    assert images.read(index) == b"coffee"
    assert "b/ü.png" in images.paths
    assert images.paths[index].encode("utf-8", "surrogateescape") == b"a/caf\xe9.png"


def test_class_names_must_be_text(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png")
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    (tmp_path / os.fsdecode(b"caf\xe9") / "1.png").touch()
    assert "not plain UTF-8 text; rename it" in refusal(tmp_path)


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.png", "b/1.png")
    listing = os.scandir

    def refuse(folder: str):
        if str(folder).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/b cannot be listed (Permission denied)")


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    touch(tmp_path, "images/a/1.png")
    assert refusal(tmp_path / "imagse").endswith(f"no 'imagse' in {tmp_path}; did you mean 'images'?")
    assert "no 'nowhere'" in refusal(tmp_path / "nowhere/at/all")
    assert "does not exist" in refusal(f"{tmp_path}/images\0")
    assert "source is empty" in refusal("")
    (tmp_path / "bare").mkdir()
    message = refusal(tmp_path / "bare")
    assert "holds no images" in message
    assert ".jpg" in message


def test_sources_of_another_kind(tmp_path: Path) -> None:
    touch(tmp_path, "a.7z", "b.tar.zst", "c.gz", "d.docx")
    for name in ("a.7z", "b.tar.zst", "c.gz"):
        assert "archives of this kind cannot be read, only .csv .parquet .zip .tar " in refusal(tmp_path / name)
        assert "unpack it and give the folder" in refusal(tmp_path / name)
    assert "neither a folder, an image, nor one of .csv .parquet .zip" in refusal(tmp_path / "d.docx")
    assert "there is no sample" in refusal("sample:cats")
    with pytest.raises(ConfigurationError, match=r"column of a manifest \(CSV, Parquet\)"):
        scan(touch(tmp_path / "x", "a/1.png"), target="species")


def test_the_kind_of_a_source_is_what_it_is_not_its_name(tmp_path: Path) -> None:
    for name in ("a.zip", "b.csv", "c.npz", "d.jpg"):
        assert scan(touch(tmp_path / name, "cat/1.png", "dog/1.png")).classes == ("cat", "dog")
    for name in ("e.zip", "f.csv", "g.npz", "h.parquet", "i.tar.gz"):
        os.mkfifo(tmp_path / name)
        assert "is neither a folder, an image" in refusal(tmp_path / name)  # and nothing waits for a writer
    (tmp_path / "k.zip").symlink_to("k.zip")
    assert "does not exist" in refusal(tmp_path / "k.zip")
    os.mkfifo(tmp_path / "l.jpg")
    with pytest.raises(UnreadableImageError, match="not-a-file"):
        scan(tmp_path / "l.jpg").read(0)


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "pictures/a/1.png")
    assert scan("~/pictures").root == tmp_path / "pictures"


@pytest.mark.slow
def test_classes_and_labels_equal_those_of_keras(tmp_path: Path) -> None:
    import keras

    for number, name in enumerate(["b", "B", "10", "9", "é", "a b", "a", "a.b", "Ω", "_", "𝔸", "\uffee"]):
        (tmp_path / name / "deep").mkdir(parents=True)
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / name / "x.png")
        Image.new("RGB", (2, 2), (number, 1, 0)).save(tmp_path / name / "deep" / "y.png")
    images = scan(tmp_path)
    dataset = keras.utils.image_dataset_from_directory(
        tmp_path, image_size=(2, 2), shuffle=False, batch_size=None, verbose=False, label_mode="int"
    )
    assert list(images.classes) == dataset.class_names
    theirs = {
        os.path.relpath(path, tmp_path): int(label)
        for path, (_, label) in zip(dataset.file_paths, dataset.as_numpy_iterator(), strict=True)
    }
    assert dict(columns(images, "labels")) == theirs


# --- manifests --------------------------------------------------------------------------------------------


def manifest(root: Path, text: str | bytes, *files: str) -> Path:
    touch(root, *files)
    path = root / "images.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_manifest(tmp_path: Path) -> None:
    outside = touch(tmp_path / "other", "9.png") / "9.png"
    root = tmp_path / "data"
    text = (
        "\ufeffpath,label,split,group,weight\r\n"
        "x/2.png,dog,train,p1,1\r\n"
        '"x/1.png","a ""big"", cat",val,p1,2\r\n'
        "\r\n"
        f"{outside},dog,,p2,3\r\n"
        f"{root}/x/3.png,,,,4\r\n"
        "./x//4.png,dog,TEST,,5\r\n"
    )
    images = scan(manifest(root, text, "x/1.png", "x/2.png", "x/3.png", "x/4.png"))
    assert images.paths == ("x/2.png", "x/1.png", str(outside), "x/3.png", "x/4.png")  # the manifest's order
    assert images.classes == ('a "big", cat', "dog")
    assert images.labels.tolist() == [1, 0, 1, -1, 1]
    assert images.given_splits.tolist() == [0, 1, -1, 3, 2]
    assert images.groups == ("p1", "p1", "p2", "", "")
    assert [images.read(index) for index in range(3)] == [b"x/2.png", b"x/1.png", b"9.png"]
    assert images.root == root
    assert images.columns == {"weight": ("1", "2", "3", "4", "5")}


def test_further_columns_are_kept_as_they_are(tmp_path: Path) -> None:
    text = "Path, Age ,label,species,,Notes\n1.png,40,x,cat,0, a \n2.png,,x,dog,1,\n"
    path = manifest(tmp_path, text, "1.png", "2.png")
    assert scan(path).columns == {"Age": ("40", ""), "species": ("cat", "dog"), "Notes": (" a ", "")}
    assert scan(path, target="Species").columns == {"Age": ("40", ""), "label": ("x", "x"), "Notes": (" a ", "")}
    assert scan(touch(tmp_path / "folder", "a/1.png")).columns == {}


def test_a_manifest_may_name_what_is_no_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg/1.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    images = scan(manifest(tmp_path, "path,label\na.jpg,x\npipe.jpg,x\n"))
    for index in (0, 1):
        with pytest.raises(UnreadableImageError, match="not-a-file"):
            images.read(index)


def test_manifest_target_picks_the_label_column(tmp_path: Path) -> None:
    path = manifest(tmp_path, "Path,Label,species\n1.png,x,cat\n2.png,x,dog\n", "1.png", "2.png")
    assert scan(path).classes == ("x",)
    assert scan(path, target="species").classes == ("cat", "dog")
    assert "no column 'specie' for the target" in refusal(path, target="specie")
    assert "did you mean 'species'" in refusal(path, target="specie")
    assert "cannot be the target" in refusal(path, target="path")


def test_manifest_without_labels(tmp_path: Path) -> None:
    images = scan(manifest(tmp_path, "path,group\n1.png,g\n", "1.png"))
    assert (images.labels.tolist(), images.given_splits.tolist(), images.classes) == ([-1], [3], ())
    assert "no column 'label'" in refusal(manifest(tmp_path, "path,species\n1.png,cat\n"))


def test_manifest_names_with_other_bytes(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(b"coffee")
    assert scan(manifest(tmp_path, b"path,label\ncaf\xe9.png,a\n")).read(0) == b"coffee"
    assert "line 2: label" in refusal(manifest(tmp_path, b"path,label\n1.png,caf\xe9\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,label,split\n1.png,a,train\n2.png,b,trian\n",
            "line 3: unknown split 'trian'; expected train, validation",
        ),
        ("path,label,split\n1.png,a,traim\n", "did you mean 'train'"),
        ("path,label\n1.png,a\n\n2.png,a\n./1.png,b\n", "line 5: '1.png' is already listed in line 2"),
        ("path,label\n1.png,a,b\n", "line 2: received 3 fields, expected 2"),
        ('path,label\n"1.png\nx",a\n2.png,a,b\n', "line 4: received 3 fields"),
        ("path,label\n1.png,a\n,b\n", "line 3: the path is empty"),
        ("path,label\n1.png,a\nhttp://x.org/1.png,b\n", "http://x.org/1.png: expected an address of https://"),
        ("path,label\n1.png,a\nftp://x.org/1.png,b\n", "line 3: ftp://x.org/1.png: expected an address of s3://"),
        ('path,label\n1.png,a\n"2.png" x,b\n', "line 3: not valid CSV"),
        ('path,label\n1.png,"a\n', "line 2: not valid CSV"),
        ("path,label\n1.png,a\n2.p\0ng,b\n", "line 3: a NUL character; expected UTF-8 text"),
        ('path,label\n1.png,"a\tb"\n', "line 2: label 'a\\tb' is not plain"),
        ("paht,label\n1.png,a\n", "no column 'path', received 'paht', 'label'; expected"),
        ("paht,label\n1.png,a\n", "did you mean 'paht'"),
        ("filename,label\n1.png,a\n", "rename 'filename' to 'path'"),
        ("path;label\n1.png;a\n", "separated by commas"),
        ("1.png,a\n2.png,b\n", "line 1 seems to be an image: write the names of the columns above it"),
        ('path,label\n1.png, "a"\n', "line 2: a blank before the quotes of the label '\"a\"'"),
        ("path,label\nx\\1.png,a\n", "Here the paths have backslashes, as in Windows: write / instead"),
        ("label,path\na, 1.png\n", "Here the paths have blanks around their names: remove them"),
        ("path,label,label\n1.png,a,b\n", "two columns are named 'label'"),
        ("path,label\n", "lists no images"),
        ("", "no column 'path', received nothing"),
        ("path,label\nabsent/1.png,a\n", "none of its 1 files exists, for example"),
        ("path,label\n1.png,a\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_manifest_errors(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = manifest(tmp_path, text, "1.png", "2.png")
    received = refusal(path)
    assert received.startswith(str(path))
    assert message in received


def test_manifest_with_some_missing_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = scan(manifest(tmp_path, "path,label\n1.png,a\n2.png,b\n", "1.png"))
    assert images.sizes.tolist() == [5, -1]  # the missing one goes to quarantine, by name
    assert "1 file does not exist: '2.png'" in caplog.text


def test_a_manifest_may_have_long_fields(tmp_path: Path) -> None:
    text = "path,label,note\n1.png,a," + "x" * 140_000 + '\n2.png,b,"' + "y\n" * 90_000 + '"\n'
    assert [len(note) for note in scan(manifest(tmp_path, text, "1.png", "2.png")).columns["note"]] == [
        140_000,
        180_000,
    ]


def test_blanks_after_commas_are_no_part_of_a_label(tmp_path: Path) -> None:
    assert scan(manifest(tmp_path, "path, label, split\n1.png, a, test\n", "1.png")).classes == ("a",)


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_manifest_names_in_the_other_unicode_form_are_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, written: str
) -> None:
    there = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[written], "café/ü.png")
    images = scan(manifest(tmp_path, f"path,label\n{unicodedata.normalize(written, there)},a\n", there))
    assert images.paths == (there,)
    assert images.read(0) == there.encode()
    assert "1 path is in another Unicode form than the file it names" in caplog.text


def test_recycle_bins_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("#recycle", "@Recycle", "$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information", "@eaDir", "lost+found", "RECYCLER",
             ".Trash-1000", "__MACOSX", "#snapshot", "@Recently-Snapshot")  # fmt: skip
    root = touch(tmp_path / "photos", "cat/1.png", "dog/1.png", "recycled/1.png", *(f"{name}/2.png" for name in names))
    assert scan(root).classes == ("cat", "dog", "recycled")
    assert caplog.text == ""


def test_manifest_train_without_label_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = scan(manifest(tmp_path, "path,label,split\n1.png,a,train\n2.png,,train\n", "1.png", "2.png"))
    assert images.given_splits.tolist() == [0, 3]
    assert "1 image has no label, in train or validation" in caplog.text


def labels_manifest(root: Path, labels: list[str]) -> Path:
    rows = "".join(f'{number}.png,"{label}"\n' for number, label in enumerate(labels))
    return manifest(root, "path,label\n" + rows, *(f"{number}.png" for number in range(len(labels))))


@pytest.mark.parametrize(
    "labels", [["0.12", "3.5", "2.25"], ["1e-3", "1", "2.5", "2.5", "-7"], ["41.5", "12.0", "13.25", "41.5"]]
)
def test_regression_targets_are_refused(tmp_path: Path, labels: list[str]) -> None:
    assert "looks like a measurement" in refusal(labels_manifest(tmp_path, labels))


@pytest.mark.parametrize("labels", [["a|b", "c", "d|e|f"], ["a", "b", "c", "d", "a;b"], ["a|b", "b|c", "x", "y", "z"]])
def test_multi_label_targets_are_refused(tmp_path: Path, labels: list[str]) -> None:
    message = refusal(labels_manifest(tmp_path, labels))
    assert "several classes per image" in message
    assert "'label'" in message


@pytest.mark.parametrize(
    "labels",
    [
        ["1", "2", "3"],
        ["0.5", "1.0", "0.5", "1.0"],
        ["1.5", "x", "2.5"],
        ["a|", "b", "c"],
        ["salt;pepper", "oil", "sand"],
    ],
)
def test_class_names_that_look_odd_are_classes(tmp_path: Path, labels: list[str]) -> None:
    assert scan(labels_manifest(tmp_path, labels)).classes == tuple(sorted(set(labels)))


# --- Parquet ----------------------------------------------------------------------------------------------


def parquet(root: Path, **columns: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.table(columns), root / "images.parquet", row_group_size=2)
    return root / "images.parquet"


def test_parquet_manifest(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    names = ["3.png", "ü/1.png", "2.png"]
    path = parquet(
        touch(tmp_path, *names),
        path=names,
        label=pyarrow.array(["b", "a", None]).dictionary_encode(),
        split=["train", "val", None],
        group=pyarrow.array([7, 7, None], pyarrow.int64()),
        age=[41.5, None, 3.0],
        seen=pyarrow.array([0, 1, None], pyarrow.timestamp("s")),
    )
    images = scan(path)
    assert images.paths == tuple(names)  # the manifest's order
    assert (images.classes, images.labels.tolist()) == (("a", "b"), [1, 0, -1])
    assert images.given_splits.tolist() == [0, 1, 3]
    assert images.groups == ("7", "7", "")
    assert images.columns == {"age": ("41.5", "", "3.0"), "seen": ("1970-01-01 00:00:00", "1970-01-01 00:00:01", "")}
    assert [images.read(index) for index in range(3)] == [name.encode() for name in names]
    assert scan(path, target="seen").classes == ("1970-01-01 00:00:00", "1970-01-01 00:00:01")


def test_parquet_equals_csv(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(5)]
    rows = [("path", "label", "split"), *((name, str(len(name) % 2), "test") for name in names)]
    written = manifest(tmp_path, "".join(",".join(row) + "\n" for row in rows), *names)
    first = scan(written)
    second = scan(parquet(tmp_path, path=names, label=[1] * 5, split=["test"] * 5))
    for name in ("paths", "classes", "groups"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("labels", "given_splits", "sizes", "mtimes_ns"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_parquet_columns_that_are_no_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = parquet(touch(tmp_path, "1.png"), path=["1.png"], box=[[1, 2]], label=["a"], image=[b"x"], size=[{"w": 1}])
    assert scan(path).columns == {}
    assert "columns that hold no plain values are left out: 'box', 'image', 'size'" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"path": ["1.png", "2.png"], "label": ["a", "a"], "split": ["train", "trian"]},
            ", row 2: unknown split 'trian'",
        ),
        ({"path": ["1.png", "./1.png"], "label": ["a", "b"]}, ", row 2: '1.png' is already listed in row 1"),
        ({"path": ["1.png", "2\0.png"], "label": ["a", "b"]}, ", row 2: a NUL character in the path '2\\x00.png'"),
        ({"path": ["1.png", None], "label": ["a", "b"]}, ", row 2: the path is empty"),
        ({"path": ["1.png"], "label": ["a\tb"]}, ", row 1: label 'a\\tb' is not plain UTF-8 text"),
        ({"file": ["1.png"], "label": ["a"]}, ", columns: no column 'path', received 'file', 'label'"),
        ({"path": ["1.png"], "label": [["a", "b"]]}, ", columns: 'label' holds list<"),
        ({"path": ["1.png"], "label": [b"a"]}, ", columns: 'label' holds binary; expected one plain value per image"),
        ({"path": ["1.png"], "label": ["a"], "Group": [["a"]]}, ", columns: 'Group' holds list<"),
        ({"path": ["1.png"] * 0, "label": ["a"] * 0}, "lists no images"),
        ({"path": ["1.png", "2.png", "3.png"], "label": [0.1, 0.2, 0.3]}, "looks like a measurement"),
    ],
)
def test_parquet_errors(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    path = parquet(touch(tmp_path, "1.png", "2.png", "3.png"), **columns)
    received = refusal(path)
    assert received.startswith(str(path))
    assert message in received


def test_damaged_parquet(tmp_path: Path) -> None:
    path = parquet(touch(tmp_path, "1.png"), path=["1.png"], label=["a"])
    data = path.read_bytes()
    for damaged in (b"", b"no table", data[:-1], data[len(data) // 2 :], bytes(len(data) - 8) + data[-8:]):
        path.write_bytes(damaged)
        assert "is not Parquet, or is damaged" in refusal(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal(touch(tmp_path, "images.parquet") / "images.parquet")
    assert f"{how_to_install('parquet')}. Or save the manifest as CSV" in message


# --- the sample -------------------------------------------------------------------------------------------


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "own"))
    assert cache_path() == tmp_path / "own"
    monkeypatch.delenv("BOTTLENECK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_path() == tmp_path / "xdg" / "bottleneck-features"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_path() == tmp_path / "home" / ".cache" / "bottleneck-features"
    assert list(tmp_path.iterdir()) == []  # asking makes nothing


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("BOTTLENECK_CACHE", str(folder))
    return folder


@pytest.mark.slow
def test_sample_is_scikit_learns_digits(cache: Path) -> None:
    from sklearn.datasets import load_digits

    images = scan("sample:digits")
    assert os.listdir(cache) == ["digits"]  # nothing temporary is left
    assert images.classes == tuple(string.digits)
    assert (len(images), images.description) == (1797, "sample:digits")
    digits = load_digits()
    for index, path in enumerate(images.paths):
        number = int(Path(path).stem)
        assert images.labels[index] == digits.target[number]
        if index % 50 == 0:
            with Image.open(images.root / path) as picture:
                assert (picture.mode, picture.size, picture.format) == ("L", (32, 32), "PNG")
                pixels = np.asarray(picture)
            np.testing.assert_array_equal(np.rint(pixels[2::4, 1::4] * (16 / 255)), digits.images[number])
            np.testing.assert_array_equal(pixels[::4, ::4], pixels[3::4, 3::4])
    digest = hashlib.sha256(b"".join(hashlib.sha256(images.read(index)).digest() for index in range(1797)))
    assert digest.hexdigest() == "85c7aa2c0b27194de1abf2a3510fb2fd2e36702239515ec0ac8d8ade7fabf12f"
    path = images.root / images.paths[0]
    data = path.read_bytes()
    path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])  # a flipped bit
    assert scan("sample:digits").read(0) == data


@pytest.mark.slow
def test_sample_is_written_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scan("sample:digits")
    monkeypatch.setattr(sample, "_write_digits", lambda folder: pytest.fail("written again"))
    second = scan(Path("sample:digits"))
    assert first.paths == second.paths
    np.testing.assert_array_equal(first.mtimes_ns, second.mtimes_ns)


def few_digits(folder: Path) -> None:
    touch(folder, "0/1.png", "1/2.png")


def test_sample_interrupted_or_made_twice(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [hashlib.sha256(path.encode()).digest() for path in ("0/1.png", "1/2.png")]
    monkeypatch.setattr(sources, "SAMPLE_DIGEST", hashlib.sha256(b"".join(two)).hexdigest())

    def interrupted(folder: Path) -> None:
        few_digits(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "_write_digits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan("sample:digits")
    assert os.listdir(cache) == []

    def overtaken(folder: Path) -> None:
        few_digits(folder)
        few_digits(cache / "digits")  # another process finishes first

    monkeypatch.setattr(sample, "_write_digits", overtaken)
    assert len(scan("sample:digits")) == 2
    assert os.listdir(cache) == ["digits"]


@pytest.mark.parametrize("damage", ["0/1.png", "1/3.png", "0/1.png removed", "all removed"])
def test_a_damaged_sample_is_made_again(
    damage: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    two = [hashlib.sha256(path.encode()).digest() for path in ("0/1.png", "1/2.png")]
    monkeypatch.setattr(sources, "SAMPLE_DIGEST", hashlib.sha256(b"".join(two)).hexdigest())
    monkeypatch.setattr(sample, "_write_digits", few_digits)
    scan("sample:digits")
    path, _, removed = damage.partition(" ")
    if path == "all":
        for image in (cache / "digits").rglob("*.png"):
            image.unlink()
    elif removed:
        (cache / "digits" / path).unlink()
    else:
        (cache / "digits" / path).write_bytes(b"flipped")
    images = scan("sample:digits")
    assert [images.read(row) for row in range(len(images))] == [b"0/1.png", b"1/2.png"]
    assert caplog.text.count("does not hold the images that were written, so they are written again") == 1
    assert os.listdir(cache) == ["digits"]


def test_sample_that_stays_damaged_or_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_write_digits", few_digits)
    assert "does not hold the images that were just written" in refusal("sample:digits")
    monkeypatch.setenv("BOTTLENECK_CACHE", str(touch(cache, "file") / "file"))
    assert "set BOTTLENECK_CACHE" in refusal("sample:digits")


# --- split rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "fractions"),
    [
        ("hash", "hash", (0.8, 0.1, 0.1)),
        ("hash:0.7,0.15,0.15", "hash", (0.7, 0.15, 0.15)),
        ("stratified", "stratified", (0.8, 0.1, 0.1)),
        ("stratified:0.75,0.25", "stratified", (0.75, 0.25, 0.0)),
        ("stratified:0.6,0.2,0.2", "stratified", (0.6, 0.2, 0.2)),
        ("hash:0.5,0.0,0.5", "hash", (0.5, 0.0, 0.5)),
        ("hash+test-from-validation:0.2", "hash", (0.8, 0.1, 0.1)),
        ("hash:0.5,0.0,0.5+validation-from-train:0.1+test-from-validation:0.2", "hash", (0.5, 0.0, 0.5)),
        ("stratified:0.6,0.4+test-from-validation:0.5", "stratified", (0.6, 0.4, 0.0)),
    ],
)
def test_split_rules_are_read_and_written_back(text: str, kind: str, fractions: tuple[float, ...]) -> None:
    rule = SplitRule.parse(text, 7)
    assert (rule.kind, rule.fractions, rule.seed) == (kind, fractions, 7)
    assert str(rule) == f"{text}@7"
    assert str(SplitRule.parse(text)) == text
    assert SplitRule.parse(f" {text} ", 7) == SplitRule.parse(str(rule)) == rule


WRONG = """hsah hash: hash:0.8 hash:0.8,0.1 hash:a,b hash:0.5,0.2,0.2,0.1 hash:1.1,-0.1 hash:0,1 hash:nan,0.5,0.5
    hash:inf,0 stratified:0.8,0.2,0.1 hash:0.8,0.1,0.100000002 hash+validation:0.2 hash+test-from-validation:x"""


@pytest.mark.parametrize("text", ["", *WRONG.split(), pytest.param("hash@" + 5000 * "9", id="a seed of 5000 digits")])
def test_wrong_split_rules(text: str) -> None:
    with pytest.raises(ConfigurationError, match="split: received"):
        SplitRule.parse(text)


def test_a_misspelt_rule_gets_a_hint() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'stratified'"):
        SplitRule.parse("stratify")


def contents(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def split(
    sha256: np.ndarray,
    rule: str = "hash",
    labels: np.ndarray | None = None,
    given_splits: np.ndarray | None = None,
    groups: list[str] | None = None,
    seed: int = 0,
) -> list[int]:
    labels = np.zeros(len(sha256), np.int32) if labels is None else labels
    given_splits = np.full(len(sha256), -1, np.int8) if given_splits is None else given_splits
    splits, _ = assign_splits(labels, given_splits, groups, sha256, SplitRule.parse(rule, seed))
    assert splits.dtype == np.int8
    return splits.tolist()


def expected_split(key: bytes, seed: int) -> int:
    """The rule of splits in one line per step, without numpy."""
    draw = int.from_bytes(hashlib.sha256(str(seed).encode() + key).digest()[:8], "big") / 2**64
    return 0 if draw < 0.8 else 1 if draw < 0.9 else 2


@pytest.mark.parametrize("seed", [0, 12, -3])
def test_hash_rule_follows_the_definition(seed: int) -> None:
    sha256 = contents(300)
    assert split(sha256, seed=seed) == [expected_split(row.tobytes(), seed) for row in sha256]
    groups = [f"patient {number % 40} ü" if number % 3 else "" for number in range(300)]
    keys = [group.encode() if group else row.tobytes() for group, row in zip(groups, sha256, strict=True)]
    assert split(sha256, groups=groups, seed=seed) == [expected_split(key, seed) for key in keys]


def test_hash_rule_is_frozen() -> None:
    """A changed value here moves the images of every user across the splits."""
    sha256 = np.stack([np.frombuffer(hashlib.sha256(bytes([number])).digest(), np.uint8) for number in range(40)])
    assert "".join(map(str, split(sha256))) == "0010100001002200000000002000000000000000"


@pytest.mark.slow
@pytest.mark.stress
@given(count=st.integers(1, 60), more=st.integers(1, 60), seed=st.integers(0, 2**31), order=st.randoms())
@settings(max_examples=rounds(200), deadline=None)
def test_hash_added_images_never_move_others(count: int, more: int, seed: int, order) -> None:
    before = contents(count, seed)
    every = np.concatenate([before, contents(more, seed + 1)])
    shuffled = list(range(count + more))
    order.shuffle(shuffled)
    after = dict(zip(shuffled, split(every[shuffled], seed=seed), strict=True))
    assert split(before, seed=seed) == [after[index] for index in range(count)]


@pytest.mark.stress
@given(
    st.lists(st.text("ab é漢\U0001f600\n\0", min_size=1, max_size=4), min_size=2, max_size=80), st.integers(0, 2**31)
)
@settings(max_examples=rounds(200), deadline=None)
def test_hash_groups_never_cross(groups: list[str], seed: int) -> None:
    sides: dict[str, set[int]] = {}
    for group, code in zip(groups, split(contents(len(groups), seed), groups=groups, seed=seed), strict=True):
        sides.setdefault(group, set()).add(code)
    assert all(len(codes) == 1 for codes in sides.values())


@pytest.mark.stress
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from(["hash", "stratified:0.5,0.3,0.2"]))
@settings(max_examples=rounds(200), deadline=None)
def test_identical_files_of_a_class_stay_together(kinds: list[int], rule: str) -> None:
    sha256 = contents(6)[kinds]
    sides: dict[int, set[int]] = {}
    for kind, code in zip(kinds, split(sha256, rule), strict=True):
        sides.setdefault(kind, set()).add(code)
    assert all(len(codes) == 1 for codes in sides.values())
    splits = np.array(split(sha256, rule), np.int8)
    assert find_leakage(sha256, splits, [str(index) for index in range(len(kinds))]) == []


def test_hash_proportions_in_expectation() -> None:
    counts = np.bincount(split(contents(20_000)), minlength=3) / 20_000
    np.testing.assert_allclose(counts, [0.8, 0.1, 0.1], atol=0.01)  # 3.5 standard deviations
    counts = np.bincount(split(contents(20_000), "hash:0.5,0.2,0.3", seed=5), minlength=3) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.2, 0.3], atol=0.015)
    assert split(contents(500)) != split(contents(500), seed=1)


def test_a_share_of_nothing_stays_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "_draws", lambda keys, seed: np.array([0.0, 0.3, 0.999, 1.0])[: len(list(keys))])
    four = contents(4)
    assert split(four, "hash:0.9,0.1") == [0, 0, 1, 1]
    assert split(four, "hash:1,0") == [0, 0, 0, 0]
    assert split(four, "hash:0.3,0,0.7") == [0, 2, 2, 2]
    assert split(four, "hash:0.3,0.7,0") == [0, 1, 1, 1]


@pytest.mark.stress
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    shares=st.lists(st.integers(0, 10), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=rounds(200), deadline=None)
def test_stratified_is_exact_per_class_and_ignores_order(sizes: list[int], shares: list[int], seed: int) -> None:
    assume(shares[0] > 0 and sum(sizes) > 0)
    fractions = np.array(shares) / sum(shares)
    assume(abs(fractions.sum() - 1) < 1e-12)
    labels = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rule = "stratified:" + ",".join(map(repr, fractions.tolist()))
    sha256 = contents(len(labels), seed)
    splits = np.array(split(sha256, rule, labels, seed=seed))
    for label, size in enumerate(sizes):
        counts = np.bincount(splits[labels == label], minlength=3)
        assert counts.sum() == size
        assert (np.abs(counts - fractions * size) < 1).all()
        assert (counts[fractions == 0] == 0).all()
    order = np.random.default_rng(seed).permutation(len(labels))
    assert split(sha256[order], rule, labels[order], seed=seed) == splits[order].tolist()


def test_stratified_largest_remainders() -> None:
    def counts(size: int, rule: str) -> list[int]:
        return np.bincount(split(contents(size), rule), minlength=3).tolist()

    assert counts(10, "stratified") == [8, 1, 1]
    assert counts(80, "stratified:0.75,0.25") == [60, 20, 0]
    assert counts(1, "stratified") == [1, 0, 0]
    assert counts(5, "stratified") == [4, 1, 0]  # validation before test where remainders are equal
    assert counts(7, "stratified:0.6,0.2,0.2") == [4, 2, 1]


def test_given_splits_and_unlabelled_images_stay() -> None:
    labels = np.array([0, 1, -1, 0, -1, 1], np.int32)
    given_splits = np.array([2, 1, -1, 0, 3, -1], np.int8)
    for rule in ("hash", "stratified"):
        splits = split(contents(6), rule, labels, given_splits)
        assert splits[:5] == [2, 1, 3, 0, 3]
        assert splits[5] in (0, 1, 2)
    assert given_splits.tolist() == [2, 1, -1, 0, 3, -1]  # not changed in place


def test_a_share_of_given_validation_becomes_test() -> None:
    count = 3000
    given_splits = np.array([0, 1, 1] * (count // 3), np.int8)
    labels, digests = np.zeros(count, np.int32), contents(count)
    plain = np.array(split(digests, "hash", labels, given_splits))
    splits = np.array(split(digests, "hash+test-from-validation:0.2", labels, given_splits))
    assert plain.tolist() == given_splits.tolist()
    moved = splits != plain
    assert set(plain[moved]) == {1}
    assert set(splits[moved]) == {2}
    assert 0.17 < moved.sum() / 2000 < 0.23
    some = slice(0, 300)  # the others do not matter
    assert (
        split(digests[some], "hash+test-from-validation:0.2", labels[some], given_splits[some]) == splits[some].tolist()
    )
    groups = [f"animal {row // 10}" for row in range(count)]
    grouped = np.array(split(digests, "hash+test-from-validation:0.2", labels, given_splits, groups))
    assert all(len(set(ten[ten > 0])) == 1 for ten in grouped.reshape(-1, 10))
    both = np.array(split(digests, "hash+validation-from-train:0.5+test-from-validation:0.2", labels, given_splits))
    assert both[plain == 1].tolist() == splits[plain == 1].tolist()
    assert set(both[plain == 0]) == {0, 1}
    with pytest.raises(ConfigurationError, match="expected a share from 0 to below 1"):
        SplitRule.parse("hash+test-from-validation:1")


def test_groups_that_given_splits_tear_apart_are_warned_about() -> None:
    labels, given_splits = np.array([0, 0, 0, -1], np.int32), np.array([0, 1, 0, -1], np.int8)
    splits, warnings = assign_splits(labels, given_splits, ("p1", "p1", "p2", "p2"), contents(4), SplitRule())
    assert splits.tolist() == [0, 1, 0, 3]
    assert warnings == ["1 group lies in more than one split, because of given splits: 'p1'"]


@pytest.mark.parametrize(
    ("rule", "given", "said"),
    [
        ("hash", [0, 1, 0, 1], []),
        ("stratified", [0, 1, 0, -1], []),
        ("stratified:0.5,0.5", [0, 1, 0, 1], ["--split stratified has no effect: every image has a split of its own"]),
        (
            "hash+validation-from-train:0.5",
            [-1, 1, -1, 1],
            ["--validation-from-train 0.5 has no effect: no image lies in"],
        ),
        ("hash+validation-from-train:0.5", [0, 1, -1, -1], []),
        ("hash+test-from-validation:0.2", [0, 0, 0, 0], ["--test-from-validation 0.2 has no effect: no image lies in"]),
    ],
)
def test_a_part_of_the_split_rule_that_concerns_no_image_is_warned_about(
    rule: str, given: list[int], said: list[str]
) -> None:
    _, warnings = assign_splits(
        np.zeros(4, np.int32), np.array(given, np.int8), None, contents(4), SplitRule.parse(rule)
    )
    assert [any(text in warning for warning in warnings) for text in said] == [True] * len(said)
    assert len(warnings) == len(said)


def test_nothing_to_split() -> None:
    for rule in ("hash", "stratified"):
        assert split(np.zeros((0, 32), np.uint8), rule) == []
    assert find_leakage(np.zeros((0, 32), np.uint8), np.zeros(0, np.int8), ()) == []


# --- leakage and warnings ---------------------------------------------------------------------------------


def test_find_leakage() -> None:
    four = contents(4)
    sha256 = four[[0, 1, 0, 2, 1, 0, 3, 2, 3]]
    splits = np.array([2, 0, 0, 1, 0, 1, 0, 3, -1], np.int8)
    paths = list("abcdefghi")
    # content 0: a (test), c (train), f (validation); 1 stays in train; 2 and 3 meet only unlabelled or open rows
    assert find_leakage(sha256, splits, paths) == [("a", "c"), ("a", "f")]
    nearly = np.zeros((3, 32), np.uint8)
    nearly[0, 31] = nearly[1, 30] = 1
    assert find_leakage(nearly, np.array([0, 1, 2], np.int8), "xyz") == []
    nearly[:2] = 0
    assert find_leakage(nearly, np.array([0, 1, 2], np.int8), "xyz") == [("x", "y"), ("x", "z")]


@pytest.mark.stress
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 3)), max_size=30))
@settings(max_examples=rounds(200), deadline=None)
def test_find_leakage_against_the_plain_definition(rows: list[tuple[int, int]]) -> None:
    sha256 = contents(5)[[kind for kind, _ in rows]] if rows else contents(0)
    found = find_leakage(sha256, np.array([code for _, code in rows], np.int8), list(range(len(rows))))  # type: ignore[arg-type]
    expected = []
    for kind in range(5):
        members = [(row, code) for row, (other, code) in enumerate(rows) if other == kind and 0 <= code < 3]
        firsts = {code: row for row, code in reversed(members)}
        ordered = sorted(firsts.values())
        expected += [(ordered[0], row) for row in ordered[1:]]
    assert found == sorted(expected)


def test_warnings_about() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, -1], np.int32)
    splits = np.array([0, 1, 2, 0, 0, 1, 3], np.int8)
    assert warnings_about(labels, splits, ("cat", "dog", "emu", "fox")) == [
        "classes with fewer than 2 images: 'emu', 'fox'",
        "classes without images in train: 'emu'",
        "classes without images in validation: 'dog'",
        "classes without images in test: 'dog', 'emu'",
    ]
    two = np.array([0, 0, 1, 1], np.int32)
    assert warnings_about(two, np.array([0, 1, 0, 1], np.int8), ("a", "b")) == []
    hinted = warnings_about(labels, splits, ("cat", "dog", "emu", "fox"), ". Do this")
    assert [message.endswith(". Do this") for message in hinted] == [False, True, False, False]
    helped = warnings_about(labels, splits, ("cat", "dog", "emu", "fox"), ". Do this", 2)
    assert [message.endswith(". Do this") for message in helped] == [False, False, True, False]
    assert not any(". Do" in text for text in warnings_about(labels, splits, ("cat", "dog", "emu", "fox"), ". Do", 4))
    only = warnings_about(np.zeros(4, np.int32), np.array([0, 0, 1, 1], np.int8), ("a",))
    assert only == ["only one class has images, 'a': training needs two"]
    assert "nothing can be trained" in warnings_about(np.full(3, -1, np.int32), np.full(3, 3, np.int8), ())[0]
    many = warnings_about(
        np.arange(30, dtype=np.int32), np.zeros(30, np.int8), [f"c{number:02d}" for number in range(30)]
    )
    assert many[0].endswith("'c07' and 22 more")


@pytest.mark.slow
def test_real_folders(assets: Path) -> None:
    images = scan(assets / "images/cats_and_dogs_filtered")
    assert (len(images), images.classes) == (3000, ("cats", "dogs"))
    counts = np.zeros((2, 2), int)
    np.add.at(counts, (images.given_splits, images.labels), 1)
    assert counts.tolist() == [[1000, 1000], [500, 500]]
    assert all(("cats" in path) == (label == 0) for path, label in columns(images, "labels"))
    flowers = scan(assets / "images/flowers17")
    assert len(flowers) == 17 * 80
    assert np.bincount(flowers.labels).tolist() == [80] * 17
