"""``bottleneck labels``: what a file holds, merging, applying, and the exports of other tools."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import NumpyNetwork, call_pipeline, extract, paint
from labelling import Book, coloured_store, sha256_of

from features.store.reader import FeatureStore
from pipeline.labels.file import EXCLUDE, UNKNOWN, WITHDRAWN, read_labels
from pipeline.labels.overlay import with_labels


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return coloured_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "labels.csv")


def said(*arguments: object) -> dict[str, Any]:
    done = call_pipeline("labels", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def refused(*arguments: object) -> str:
    done = call_pipeline("labels", *arguments)
    assert done.returncode in (1, 2)
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    return last


def test_show_counts_decisions_and_says_how_far_people_agree(book: Book) -> None:
    book.add("a", "dog").add("a", "dog", by="bob").add("a", "wolf", by="machine:audit")
    book.add("b", "cat").add("b", "dog", by="bob").add("c", UNKNOWN).add("c", "cat", by="bob")
    book.add("c", WITHDRAWN)  # ann has no opinion on c any more
    book.add("d", "dog").add("d", "cat").add("d", "cat", by="eve").add("a", "sunny", "weather", by="eve")
    document = said("show", book.path)
    assert (document["decisions"], document["images"], document["first"][:10]) == (12, 4, "2026-01-01")
    assert document["people"] == {"ann": 6, "bob": 3, "eve": 2, "machine:audit": 1}
    assert document["values"] == {"dog": 4, "cat": 4, "wolf": 1, "unknown": 1, "": 1, "sunny": 1}
    agreed = document["agreement"]
    assert (agreed["images"], agreed["alike"], agreed["rate"]) == (3, 2, 2 / 3)
    assert agreed["disagreements"] == [{"path": "b", "values": {"ann": "cat", "bob": "dog"}}]
    text = call_pipeline("labels", "show", book.path).stdout.splitlines()
    assert text[0] == f"{book.path}: 12 decisions about 4 images, 2026-01-01 to 2026-01-01"
    assert text[1:] == [
        "  decided: dog 4, cat 4, wolf 1, unknown 1, (withdrawn) 1, sunny 1",
        "  by: ann 6, bob 3, eve 2, machine:audit 1",
        "  3 images judged by several people: 2 alike (0.67)",
        "    b: ann cat, bob dog",
    ]


@pytest.mark.slow
def test_show_says_what_a_file_does_to_a_store(store: FeatureStore, book: Book) -> None:
    book.add(sha256_of(store, "train/cat/0.png"), "dog")
    done = call_pipeline("labels", "show", book.path, "--features", store.path)
    assert f"{book.path}: 1 label corrected" in done.stderr
    assert said("show", book.path, "--features", store.path)["stores"] == {
        str(store.path): with_labels(store, book.path).labelled_by
    }


def test_files_of_two_people_are_merged_in_the_order_of_time(tmp_path: Path) -> None:
    ann, bob = Book(tmp_path / "ann.csv"), Book(tmp_path / "bob.csv")
    ann.add("a", "dog").add("b", "cat")
    bob.add("a", "cat", by="bob")
    both = tmp_path / "both.csv"
    document = said("merge", ann.path, bob.path, ann.path, "--out", both)
    assert (document["decisions"], document["doubled"]) == (3, 2)
    assert document["agreement"]["disagreements"] == [{"path": "a", "values": {"ann": "dog", "bob": "cat"}}]
    merged = read_labels(both)
    assert [(one.by, one.path) for one in merged.decisions] == [("ann", "a"), ("bob", "a"), ("ann", "b")]
    assert (merged.torn, merged.doubled) == ((), 0)
    assert sorted(os.listdir(tmp_path)) == ["ann.csv", "bob.csv", "both.csv"]
    assert "exists; give a new name" in refused("merge", ann.path, bob.path, "--out", both)
    (tmp_path / "other.csv").write_text("a,b\n")
    assert "other.csv: is not a labels file" in refused(
        "merge", ann.path, tmp_path / "other.csv", "--out", tmp_path / "new"
    )


@pytest.mark.slow
def test_an_applied_labels_file_is_the_data_sets_own(book: Book, tmp_path: Path) -> None:
    store = coloured_store(tmp_path / "data")
    book.add(sha256_of(store, "train/cat/0.png"), "wolf").add(sha256_of(store, "train/dog/0.png"), UNKNOWN)
    expected = with_labels(store, book.path)
    beside = tmp_path / "data" / "images" / "list.csv"
    assert (
        said("apply", store.path, book.path, "--out", beside, "--images", tmp_path / "data" / "images")["images"] == 20
    )
    with open(beside, newline="") as stream:
        rows = {row["path"]: row for row in csv.DictReader(stream)}
    assert rows["train/cat/0.png"] == {"path": "train/cat/0.png", "label": "wolf", "split": "train"}
    assert rows["train/dog/0.png"] == {"path": "train/dog/0.png", "label": "", "split": ""}
    book.add(sha256_of(store, "train/dog/1.png"), EXCLUDE)
    assert said("apply", store.path, book.path, "--out", beside)["images"] == 19
    assert "train/dog/1.png" not in beside.read_text()
    book.add(sha256_of(store, "train/dog/1.png"), WITHDRAWN)
    gone = refused("apply", store.path, book.path, "--out", beside, "--images", tmp_path / "none")
    assert "is not a folder, and a manifest lists files in folders" in gone

    manifest = tmp_path / "elsewhere" / "manifest.csv"
    document = said("apply", store.path, book.path, "--out", manifest)
    assert document["images"] == 20
    network = NumpyNetwork()
    applied = extract(manifest, store.path, network).store
    assert network.batches == []
    assert applied.classes == ("cat", "dog", "wolf")
    by_hash = [
        {table.sha256[row].tobytes(): (table.labels[row], table.splits[row]) for row in range(20)}
        for table in (expected.images, applied.images)
    ]
    assert by_hash[0] == by_hash[1]


LABEL_STUDIO = (  # as its converter writes it: sorted columns, text in quotes, a task without an answer
    '"annotation_id","annotator","choice","created_at","id","image","lead_time","updated_at","was_cancelled"\n'
    '7,"ann@example.org","dog","2023-10-02T09:12:20.480432Z",1,"/data/upload/3/0a1b2c3d-0.png",16.135,"2023-10-02T09:12:27.480432Z",False\n'
    '8,"bob@example.org","wolf","2023-10-02T09:12:32Z",2,"/data/local-files/?d=photos/train/cat/1.png",3.5,"2023-10-02T09:12:33Z",False\n'
    '9,"bob@example.org","","2023-10-02T09:12:40Z",3,"s3://bucket/photos/train/cat/2.png",1.5,"2023-10-02T09:12:41Z",True\n'
    '10,"bob@example.org","cat","2023-10-02T09:12:50Z",4,"https://host/photos/train/cat/3.png?x=1",1.5,"2023-10-02T11:12:51+02:00",False\n'
    '11,"bob@example.org","cat","2023-10-02T09:12:55Z",5,"/data/upload/3/0a1b2c3e-new.png",1.5,"2023-10-02T09:12:56Z",False\n'
)


def test_label_studio(store: FeatureStore, tmp_path: Path) -> None:
    export, out = tmp_path / "project.csv", tmp_path / "labels.csv"
    export.write_text(LABEL_STUDIO)
    document = said("import", export, "--from", "label-studio", "--features", store.path, "--out", out)
    # an upload has lost its folders: 0.png could be any of four images, so it is not guessed
    assert document["elsewhere"] == ["/data/upload/3/0a1b2c3d-0.png", "/data/upload/3/0a1b2c3e-new.png"]
    assert document["imported"] == 2
    found = [(one.path, one.value, one.earlier, one.by, one.utc) for one in read_labels(out).decisions]
    assert found == [
        ("train/cat/1.png", "wolf", "cat", "label-studio bob@example.org", "2023-10-02T09:12:33.000000Z"),
        ("train/cat/3.png", "cat", "cat", "label-studio bob@example.org", "2023-10-02T09:12:51.000000Z"),
    ]
    assert with_labels(store, out).labelled_by["corrected"] == 1
    said("import", export, "--from", "label-studio", "--features", store.path, "--out", out)  # once more
    assert (len(read_labels(out)), read_labels(out).doubled) == (2, 2)


def test_label_studio_with_what_cannot_be_taken(store: FeatureStore, tmp_path: Path) -> None:
    export = tmp_path / "project.csv"
    common = ("import", export, "--from", "label-studio", "--features", store.path, "--out", tmp_path / "labels.csv")
    export.write_text(LABEL_STUDIO.replace('"wolf"', '"{""choices"": [""cat"", ""dog""]}"'))
    assert 'the column \'choice\' holds \'{"choices": ["cat", "dog"]}\', expected one class' in refused(*common)
    export.write_text(LABEL_STUDIO.replace('"lead_time"', '"quality"'))
    assert "the class could be in any of choice, quality; name its column with --column" in refused(*common)
    assert said(*common, "--column", "choice")["imported"] == 2
    export.write_text(LABEL_STUDIO.replace("photos/train/cat", "photos").replace("/1.png", "/other.png"))
    assert "none of its" in refused(*common)
    export.write_text("path,label\n1.png,cat\n")
    assert "has no column 'annotator' and is no CSV export of Label Studio; received path, label" in refused(*common)
    assert "did you mean 'label-studio'" in refused("import", export, "--from", "labelstudio", "--features", store.path)


def test_fiftyone(store: FeatureStore, tmp_path: Path) -> None:
    export, out = tmp_path / "labels.csv", tmp_path / "out.csv"
    export.write_text(  # export_dir/labels.csv with fields=["filepath", "tags", "ground_truth.label"], abs_paths=True
        "filepath,tags,ground_truth.label\n"
        '/home/me/fiftyone/photos/train/dog/0.png,"train,checked",cat\n'
        "train/dog/1.png,train,dog\n"
        "/home/me/fiftyone/photos/train/dog/2.png,train,\n"
    )
    document = said("import", export, "--from", "fiftyone", "--features", store.path, "--out", out, "--by", "ann")
    assert (document["imported"], document["elsewhere"]) == (2, [])
    found = [(one.path, one.value, one.earlier, one.by) for one in read_labels(out).decisions]
    assert sorted(found) == [("train/dog/0.png", "cat", "dog", "ann"), ("train/dog/1.png", "dog", "dog", "ann")]


@pytest.mark.slow
def test_copies_of_a_file_are_imported_and_the_file_can_be_read(tmp_path: Path) -> None:
    """Also a second time, when the store has other labels by then."""
    for name in ("a", "b"):
        paint(tmp_path / "images" / "train" / "cat" / f"{name}.png", (200, 9, 40))
    paint(tmp_path / "images" / "train" / "dog" / "c.png", (40, 9, 200))
    store = extract(tmp_path / "images", tmp_path / "f.h5").store
    export, out = tmp_path / "export.csv", tmp_path / "out.csv"
    export.write_text("filepath,label\ntrain/cat/a.png,dog\ntrain/cat/b.png,dog\n")
    for _ in range(2):
        document = said("import", export, "--from", "fiftyone", "--features", store.path, "--out", out)
        assert document["imported"] == 2
        assert sorted(one.path for one in read_labels(out).decisions) == ["train/cat/a.png", "train/cat/b.png"]
    (tmp_path / "images" / "train" / "cat").rename(tmp_path / "images" / "train" / "puma")
    store = extract(tmp_path / "images", tmp_path / "f.h5").store
    export.write_text(export.read_text().replace("cat", "puma"))
    os.utime(export, ns=(0, read_labels(out).times[0] * 1000))
    said("import", export, "--from", "fiftyone", "--features", store.path, "--out", out)
    assert {one.earlier for one in read_labels(out).decisions} == {"cat", "puma"}


def test_cvat(store: FeatureStore, tmp_path: Path) -> None:
    folder, out = tmp_path / "annotations", tmp_path / "out.csv"
    folder.mkdir()
    export = folder / "default-annotations-human-imagelabels.csv"
    export.write_text(  # Open Images V6: image ids have no suffix; a confidence of 0 says that a class is absent
        "ImageID,Source,LabelName,Confidence\n"
        "train/cat/0,,/m/1,1\n"
        "train/cat/0,,/m/0,0\n"
        "train/cat/1,machine,/m/1,0.9\n"
        "train/dog/3,,/m/0,1\n"
        "train/dog/3,,/m/1,1\n"
        "train/dog/9,,/m/1,1\n"
    )
    arguments = ("import", export, "--from", "cvat", "--features", store.path, "--out", out)
    assert "class-descriptions.csv: is missing; it names the classes" in refused(*arguments)
    (folder / "class-descriptions.csv").write_text("/m/0,cat\n/m/1,dog\n")
    document = said(*arguments)
    assert document == {
        "format": 1,
        "out": str(out),
        "imported": 2,
        "elsewhere": ["train/dog/9"],
        "several": ["train/dog/3.png"],
    }
    found = [(one.path, one.value, one.earlier, one.by) for one in read_labels(out).decisions]
    assert sorted(found) == [
        ("train/cat/0.png", "dog", "cat", "cvat"),
        ("train/cat/1.png", "dog", "cat", "machine:cvat"),
    ]
