"""Predictions: the same numbers whichever way images come and rows go; any number of images in the same memory."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import listing, paint
from PIL import Image

import pipeline.stages.predict
from features.augmentation import PRESETS
from features.errors import ConfigurationError, SourceError, TooManyUnreadableError
from features.extraction.extraction import extract_features
from features.pixels.decode import decode_image, read_bytes
from features.pixels.views import decode_views
from features.recipe import PixelRule
from features.sources.reading import Reading
from pipeline.cli import main
from pipeline.heads.kinds import head_of
from pipeline.predicting.files import Prediction, Rows
from pipeline.predicting.loop import Item, predictions
from pipeline.predicting.options import PredictOptions
from pipeline.reporting.grids import PredictedImage, prediction_grid
from pipeline.runs.folder import Run
from pipeline.stages.predict import Gallery, predict, summary
from pipeline.stages.train_head import train_head
from pipeline.tasks.table import CLASSIFICATION
from pipeline.tuning.endtoend import network_of

CLASSES = ("ape", "bee", "file")
PAINT = {"red": (200, 30, 20), "green": (0, 255, 0), "blue": (10, 20, 220), "grey": (80, 80, 80)}
# of the three colours, as far as they are in the image; green is 0, 1, 0, and grey three equal ones
EXPECTED = {
    "red.png": (0.8, 0.12, 0.08),
    "green.png": (0, 1, 0),
    "blue.png": (0.04, 0.08, 0.88),
    "grey.png": (1 / 3,) * 3,
}


class Colours:
    """A model without a network: the shares of red, green and blue in the first pixel."""

    name, classes, batch_size, answers, task = "colours", CLASSES, 2, None, CLASSIFICATION

    def load(self, data: bytes) -> np.ndarray:
        return decode_image(data, PixelRule(4, 4)).pixels

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        pixels = np.stack(images)[:, 0, 0].astype(np.float64)
        return pixels / pixels.sum(axis=1, keepdims=True)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = Reading(settled=True)
    run = SimpleNamespace(
        classes=CLASSES, recipe=SimpleNamespace(augmentation=None), folder=tmp_path / "run", reading=plain,
        metrics={"validation": {}}, task=CLASSIFICATION,
    )  # fmt: skip
    monkeypatch.setattr(pipeline.stages.predict, "taken", lambda path, *_: (run, []))
    monkeypatch.setattr(pipeline.stages.predict, "RunModel", lambda run, **options: Colours())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, colour in PAINT.items():
        paint(tmp_path / "images" / f"{name}.png", colour)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return tmp_path / "images"


def written(images: Any, **options: Any) -> str:
    predict("run", images, stream=(stream := io.StringIO()), **options)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------ rows
def test_csv_and_json_lines_say_the_same_of_a_folder_and_of_a_list(colours: None, images: Path) -> None:
    rows = list(csv.DictReader(written(images).splitlines()))
    assert list(rows[0]) == ["file", "class", "probability", "ape", "bee", "p:file", "error"]
    assert [row["file"] for row in rows] == ["blue.png", "broken.png", "green.png", "grey.png", "red.png"]
    assert rows.pop(1) == dict.fromkeys(rows[0], "") | {"file": "broken.png", "error": "not-an-image"}
    for row in rows:
        values = [float(row[name]) for name in ("ape", "bee", "p:file")]
        np.testing.assert_allclose(values, EXPECTED[row["file"]], atol=1e-6)
        assert (row["class"], float(row["probability"])) == (CLASSES[int(np.argmax(values))], max(values))
    assert {row["file"]: row["class"] for row in rows} == {
        "blue.png": "file", "green.png": "bee", "grey.png": "ape", "red.png": "ape"
    }  # fmt: skip
    lines = [json.loads(line) for line in written(images, format="jsonl").splitlines()]
    broken = lines.pop(1)
    assert broken.pop("error") == "not-an-image"
    assert broken == {"file": "broken.png", "class": None, "probability": None, "probabilities": None}
    for line, row in zip(lines, rows, strict=True):
        assert line["error"] is None
        assert (line["file"], line["class"], line["probability"]) == (
            row["file"],
            row["class"],
            float(row["probability"]),
        )
        columns = {"ape": "ape", "bee": "bee", "file": "p:file"}
        assert line["probabilities"] == {name: float(row[column]) for name, column in columns.items()}
    paths = sorted(map(str, images.iterdir()))
    assert written(iter(paths)).replace(f"{images}/", "") == written(images)
    assert written(images / "red.png") == "".join(written(images).splitlines(keepends=True)[:: len(paths)])


PROMISE: dict[str, Any] = {
    "rows": "validation", "grouped": False, "sets": {"coverage": 0.9, "least": 0.3},
    "abstain": {
        "precision": 0.9, "threshold": 0.85, "n": 40, "answered": 30, "right": 30, "bound": 0.9, "needed": 29,
        "coverage": 0.75,
    },
}  # fmt: skip


def test_answers_that_are_not_sure_enough_are_withheld(
    colours: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = pipeline.stages.predict.taken("run", PredictOptions())
    monkeypatch.setattr(run, "metrics", {"answers": PROMISE, "validation": {}})
    document = predict("run", images, out=tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as stream:
        rows = {row["file"]: row for row in csv.DictReader(stream)}
    assert {file: (row["abstain"], row["set"]) for file, row in rows.items()} == {
        "blue.png": ("false", '["file"]'),
        "broken.png": ("", ""),
        "green.png": ("false", '["bee"]'),
        "grey.png": ("true", '["ape", "bee", "file"]'),
        "red.png": ("true", '["ape"]'),
    }
    assert document["withheld"] == 2
    assert "2 of 4 answers are withheld" in summary(document)
    monkeypatch.setattr(run, "run_id", "colours", raising=False)
    assert "abstain" not in written(images, views=2, augment="flip")
    assert "found on single views; they are left out for means of 2 views" in caplog.text


def test_top_k_is_sorted_and_equal_ones_keep_the_order_of_the_classes(colours: None, images: Path) -> None:
    rows = {row["file"]: row for row in csv.DictReader(written(images, top=2).splitlines())}
    assert list(rows["red.png"].values()) == ["red.png", "ape", "0.8", "bee", "0.12", ""]
    assert list(rows["red.png"]) == ["file", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert list(rows["grey.png"].values()) == ["grey.png", "ape", "0.333333", "bee", "0.333333", ""]
    assert list(rows["broken.png"].values()) == ["broken.png", "", "", "", "", "not-an-image"]
    lines = {line["file"]: line for line in map(json.loads, written(images, top=3, format="jsonl").splitlines())}
    assert lines["blue.png"]["top"] == [
        {"class": "file", "probability": 0.88},
        {"class": "bee", "probability": 0.08},
        {"class": "ape", "probability": 0.04},
    ]
    assert "probabilities" not in lines["blue.png"]
    assert lines["broken.png"]["top"] is None
    with pytest.raises(ConfigurationError, match="--top: received 4, expected 1 to 3"):
        written(images, top=4)


def test_rows_of_a_name_that_is_not_utf8_give_the_name_back(colours: None, images: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9, \xc3\xbc.png")
    shutil.copy(images / "green.png", images / odd)
    for name in ("rows.csv", "rows.jsonl"):
        predict("run", images, out=tmp_path / name)
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        assert odd in [row["file"] for row in csv.DictReader(stream)]
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert odd in [json.loads(line)["file"] for line in lines]
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    predict("run", images, stream=narrow)
    assert b"caf\\udce9, \\xfc.png" in narrow.buffer.getvalue()  # type: ignore[attr-defined]


def test_damaged_runs_beside_the_one_that_is_taken_decide_the_exit_code(
    colours: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = pipeline.stages.predict.taken("run", None)
    monkeypatch.setattr(pipeline.stages.predict, "taken", lambda path, *_: (run, ["logistic-torn"]))
    assert main(["predict", "run", str(images), "--out", str(tmp_path / "rows.csv")]) == 3
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 6  # the rows are written nevertheless


def test_formats_follow_the_name_of_the_file_and_a_document_counts(
    colours: None, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.csv", "b.jsonl", "c.ndjson", "d.txt"):
        assert main(["predict", "run", str(images), "--out", str(tmp_path / name), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document == {
            "format": 1, "run": "colours", "out": str(tmp_path / name), "rows": "csv" if name[0] in "ad" else "jsonl",
            "images": 5, "predicted": 4, "unreadable": 1, "classes": {"ape": 2, "bee": 1, "file": 1}, "labelled": 0, "right": 0,
            "others": {},
            "grid": None, "damaged": [],
        }  # fmt: skip
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "d.txt").read_text() == written(images)
    assert (tmp_path / "b.jsonl").read_text() == (tmp_path / "c.ndjson").read_text() == written(images, format="jsonl")
    assert main(["predict", "run", str(images), "--out", str(tmp_path / "a.csv")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{tmp_path}/a.csv: 4 predictions by colours, 1 unreadable", *said[1:]]
    assert [line.split() for line in said[1:]] == [["class", "images"], ["ape", "2"], ["bee", "1"], ["file", "1"]]


def test_several_images_are_named_and_a_dash_is_standard_output(
    colours: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("red", "green"):
        paint(tmp_path / f"{name}.png", PAINT[name])
    assert main(["predict", "run", "red.png", "green.png", "--out", "-", "--top", "1"]) == 0
    assert [line.split(",")[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["file", "class_1"],
        ["red.png", "ape"],
        ["green.png", "bee"],
    ]
    for further in (".", "-", "rows.csv", "new.zip"):
        assert main(["predict", "run", "red.png", further]) == 2
        said = f"error: {further}: is no image, and of 2 names each has to be one."
        assert capsys.readouterr().err.startswith(said)
    for typed in ("report", "preview red.png", "extract red.png", "pack red.png", "export run"):
        assert main([*typed.split(), "--out", "-"]) == 2
        assert capsys.readouterr().err == "error: --out -: this command cannot write to standard output; give a name\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["green.png", "red.png"]


def test_predict_on_a_labelled_folder_says_how_many_were_right(
    colours: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, out = tmp_path / "known", tmp_path / "rows.csv"
    for label, names in (("ape", ("red", "green", "grey")), ("bee", ("green", "blue")), ("other", ("red",))):
        for name in names:
            paint(known / label / f"{name}.png", PAINT[name])
    (known / "bee" / "broken.png").write_bytes(b"no image")
    said = "3 of 5 images are right, going by the names of their folders: accuracy 0.6000 (0.2307 to 0.8824)"
    left_out = "says more. 1 in 'other', which is no class of the run, are left out of this"
    assert main(["predict", "run", str(known), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["images"], document["labelled"], document["right"]) == (7, 5, 3)
    assert document["others"] == {"other": 1}
    assert main(["predict", "run", str(known), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert said in printed
    assert left_out in printed
    assert main(["predict", "run", str(known)]) == 0
    printed = capsys.readouterr()
    assert (said in printed.err, said in printed.out) == (True, False)
    assert main(["predict", "run", str(known), "--quiet"]) == 0
    assert said not in capsys.readouterr().err
    for label in ("ape", "bee"):  # none of the folders is a class
        (known / label).rename(known / f"{label}s")
    assert main(["predict", "run", str(known)]) == 0
    assert "are right" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "tops", [("Training", "Testing"), ("train", "test"), ("seg_train/seg_train", "seg_test/seg_test")]
)
def test_predict_finds_the_classes_below_split_folders(
    tops: tuple[str, str],
    colours: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for top, names in zip(tops, (("red", "green", "grey"), ("green",)), strict=True):
        for name in names:
            paint(tmp_path / "known" / top / "ape" / f"{name}.png", PAINT[name])
        paint(tmp_path / "known" / top / "bee" / "green.png", PAINT["green"])
    assert main(["predict", "run", str(tmp_path / "known"), "--out", str(tmp_path / "rows.csv"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["images"], document["labelled"], document["right"]) == (6, 6, 4)
    assert "split" not in caplog.text
    named = [line[0] for line in csv.reader((tmp_path / "rows.csv").read_text().splitlines()[1:])]
    assert named == sorted(named)
    assert {name.split("/")[0] for name in named} == {top.split("/")[0] for top in tops}


# ------------------------------------------------------------------------------------------------ lists and streams
def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_list_on_standard_input_skips_blank_lines_and_survives_missing_files(
    colours: None, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(images.parent)
    feed(monkeypatch, b"images/red.png\n\n   \nimages/none.png\r\nimages\nimages/green.png\nimages/red.png")
    assert main(["predict", "run", "-", "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "file,class_1,probability_1,error",
        "images/red.png,ape,0.8,",
        "images/none.png,,,missing",
        "images,,,not-a-file",
        "images/green.png,bee,1,",
        "images/red.png,ape,0.8,",
    ]
    for data, code, message in (
        (b"\n \n", 1, "the list of images is empty; expected one path in each line"),
        (b"images/red.png\0images/green.png\0", 2, "one per line, such as find photos -name '*.jpg' gives"),
        (b"one.png\ntwo.png\n", 4, "the list: none of 2 images could be read; nothing was written"),
    ):
        feed(monkeypatch, data)
        assert main(["predict", "run", "-", "--out", "rows.csv"]) == code
        said = capsys.readouterr()
        assert (said.out, message in said.err) == ("", True), said.err
    assert listing(images.parent) == sorted(["images", *(f"images/{path.name}" for path in images.iterdir())])


def test_rows_are_written_while_the_list_is_still_being_made(colours: None, images: Path) -> None:
    stream, seen = io.StringIO(), []

    def paths() -> Iterator[str]:
        for number in range(100):
            seen.append(len(stream.getvalue().splitlines()))
            yield str(images / f"{list(PAINT)[number % 4]}.png")

    predict("run", paths(), stream=stream)
    assert len(stream.getvalue().splitlines()) == 101
    assert min(number - rows for number, rows in enumerate(seen[50:], 50)) >= 0
    assert max(number - rows for number, rows in enumerate(seen)) <= 10  # what is read ahead


@pytest.mark.slow
@pytest.mark.pain(15)
def test_pain_15_a_list_ten_times_as_long_needs_no_more_memory(colours: None, images: Path) -> None:
    class Nowhere(io.StringIO):
        rows = 0

        def write(self, text: str) -> int:
            self.rows += text.count("\n")
            return len(text)

    peaks = {}
    broken = b"no image" * 20_000  # an error must not keep the file that it is about
    (images / "broken.png").write_bytes(broken)
    for count in (30, 100, 1000):
        stream = Nowhere()
        names = ("red", "broken", "blue", "none")
        tracemalloc.start()
        document = predict("run", (str(images / f"{names[n % 4]}.png") for n in range(count)), stream=stream)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (document["predicted"], document["unreadable"], stream.rows) == (count // 2, count // 2, count + 1)
    # 40 MB of broken files went through; how many of the 10 that are read ahead are there at a time depends on the load
    assert peaks[1000] < peaks[100] + 10 * len(broken), peaks


def test_unreadable_images_are_named_ten_times_and_then_counted(
    colours: None, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written([str(images / "red.png"), *[f"none{number}.png" for number in range(25)]])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 11
    assert messages[0].startswith("none0.png is unreadable (missing: none0.png: ")
    assert messages[-1] == "15 more images are unreadable; their rows say why"


def test_batches_keep_the_order_of_the_list(images: Path) -> None:
    names = ["red", "broken", "green", "broken", "broken", "broken", "blue"]
    items = [Item(str(number), (images / f"{name}.png").read_bytes) for number, name in enumerate(names)]
    with ThreadPoolExecutor(3) as pool:
        found = list(predictions(Colours(), iter(items), pool))
    assert [len(batch) for batch in found] == [2, 2, 2, 1]
    flat = [prediction for batch in found for _, prediction in batch]
    assert [prediction.file for prediction in flat] == [str(number) for number in range(7)]
    assert [prediction.error for prediction in flat] == ["" if n in (0, 2, 6) else "not-an-image" for n in range(7)]
    np.testing.assert_allclose(flat[6].probabilities, EXPECTED["blue.png"])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ pictures
@pytest.mark.slow
def test_a_grid_marks_right_and_wrong_where_folders_say_what_images_are(
    colours: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[PredictedImage], str]] = []

    def draw(items: Sequence[PredictedImage], path: Path, *, title: str) -> int:
        drawn.append((list(items), title))
        return prediction_grid(items, path, title=title)

    monkeypatch.setattr(pipeline.stages.predict, "prediction_grid", draw)
    for name, label, count in (("red", "ape", 50), ("green", "bee", 30), ("blue", "bee", 20)):
        for number in range(count):
            paint(tmp_path / "known" / label / f"{name}{number:02d}.png", PAINT[name])
            paint(tmp_path / "days" / f"{label}day" / f"{name}{number:02d}.png", PAINT[name])
    out = tmp_path / "grid.png"
    predict("run", tmp_path / "known", stream=io.StringIO(), grid=out)
    ((items, title),) = drawn
    assert title == "colours"
    assert len(items) == 36  # of all 100, evenly
    seen = Counter((item.predicted, item.label) for item in items)
    assert seen == {("ape", "ape"): 18, ("file", "bee"): 7, ("bee", "bee"): 11}
    assert {round(item.probability, 6) for item in items} == {0.8, 0.88, 1.0}
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 6 * 112
    # folders of which none is a class of the run say something else, and a list says nothing
    predict("run", tmp_path / "days", stream=io.StringIO(), grid=out)
    paths = [str(path) for path in sorted((tmp_path / "known" / "bee").iterdir())]
    predict("run", [*paths[:2], "none.png", *paths[2:]], stream=io.StringIO(), grid=out)
    assert {item.label for items, _ in drawn[1:] for item in items} == {""}
    assert [len(items) for items, _ in drawn] == [36, 36, 36]
    assert drawn[2][0][2].data == Path(paths[2]).read_bytes()
    predict("run", tmp_path / "known", stream=io.StringIO())
    assert len(drawn) == 3


def test_another_image_takes_the_place_of_one_that_cannot_be_drawn(colours: None, images: Path, tmp_path: Path) -> None:
    gallery = Gallery(CLASSES, 100)  # draws 36, evenly
    for position in range(100):
        broken = position < 60  # 21 of those 36
        values = None if broken else np.array([0.2, 0.7, 0.1])
        name = "none" if position in (60, 62) else "green"  # gone since it was predicted
        item = Item(str(position), partial(read_bytes, images / f"{name}.png"))
        gallery.look(position, item, Prediction(str(position), values))
    assert len(gallery.pictures) == 36


def test_a_terminal_is_not_steered_by_a_name(colours: None, images: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shutil.copy(images / "green.png", images / "\x1b[2Jgr\x9b1me\u202een.png")
    predict("run", images, stream=(screen := Terminal()))
    assert "\\x1b[2Jgr\\x9b1me\\u202een.png,bee,1,0,1,0,\n" in screen.getvalue()
    assert written(images).count("\x1b[2Jgr\x9b1me\u202een.png,bee") == 1  # a program gets the name back


def test_a_summary_stays_narrow_and_every_line_of_json_parses(colours: None, images: Path) -> None:
    document = {"out": "a.csv", "predicted": 1, "unreadable": 0, "run": "r", "grid": None, "labelled": 0}
    document |= {"classes": {"x" * 200: 1}}
    assert max(map(len, summary(document).splitlines())) < 80
    shutil.copy(images / "green.png", images / '\u2028 "\n\t=1.png')
    lines = written(images, format="jsonl").split("\n")
    names = [json.loads(line, parse_constant=pytest.fail)["file"] for line in lines[:-1]]
    assert names == sorted(path.name for path in images.iterdir())
    assert lines[-1] == ""


# ------------------------------------------------------------------------------------------------ refusals
def test_wrong_options_are_refused_and_an_older_file_is_kept(colours: None, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    out.write_text("mine")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"format": "cvs"}, "received 'cvs', expected csv or jsonl; did you mean 'csv'"),
        ({"out": tmp_path / "rows.json"}, r"a line of JSON for each image.*type --out .*rows\.jsonl"),
        ({"out": tmp_path}, r"is a folder; expected a file, such as .*predictions\.csv"),
        ({"top": 0}, "--top: received 0, expected 1 to 3"),
        ({"views": 0, "augment": "flip"}, "views: received 0, expected 1 to 1000"),
        ({"views": 3}, "received 3, which without an augmentation .* Add --augment with one of flip,"),
        ({"views": 3, "augment": "none"}, "Add --augment with"),
        ({"augment": "flip"}, "Add --views with 2 or more"),
        ({"views": 3, "augment": "filp"}, "received 'filp', expected one of .*; did you mean 'flip'"),
        ({"batch_size": 0}, "batch size: received 0"),
        ({"grid": tmp_path / "grid.txt"}, r"grid\.txt: received '\.txt', expected the name of an image file: \.png"),
    ]
    before = listing(tmp_path)
    for options, message in refused:
        with pytest.raises(ConfigurationError, match=message):
            predict("run", images, **{"out": out, **options})
    with pytest.raises(TooManyUnreadableError, match=r"broken\.png: none of 1 images could be read; nothing was writ"):
        predict("run", images / "broken.png", out=out)
    with pytest.raises(SourceError, match=r"does not exist: no .imgaes. in .*; did you mean 'images'"):
        predict("run", images.parent / "imgaes", out=out)

    refuse: list[tuple[dict[str, Any], str]] = [
        (
            {"out": tmp_path / "rows.png"},
            r"predictions are lines of text; type --out .*rows\.csv; --grid draws a picture",
        ),
        ({"out": tmp_path / "features.h5"}, r"type --out .*features\.csv$"),
        ({"out": tmp_path / "run" / "predictions.csv"}, r"predictions\.csv: is itself one of the files that are read"),
        ({"grid": images / "red.png"}, r"--grid .*red\.png: is itself one of the files that are read"),
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "predictions.csv").write_text("the run's own")
    (tmp_path / "list.csv").write_text("path\nimages/red.png\n")
    before, red = listing(tmp_path), (images / "red.png").read_bytes()
    for options, message in refuse:
        for given in (images, [str(images / "green.png"), str(images / "red.png")]):
            with pytest.raises(ConfigurationError, match=message):
                predict("run", given, stream=io.StringIO(), **options)
    with pytest.raises(ConfigurationError, match=r"--out .*list\.csv: is itself one"):
        predict("run", tmp_path / "list.csv", out=tmp_path / "list.csv")
    assert (images / "red.png").read_bytes() == red

    def stopped() -> Iterator[str]:
        yield str(images / "red.png")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict("run", stopped(), out=out)
    assert listing(tmp_path) == before
    assert out.read_text() == "mine"


def test_json_needs_a_file_to_describe(colours: None, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "run", str(images), "--json"]) == 2
    assert "for rows as JSON type --format jsonl" in capsys.readouterr().err


def test_headers_and_rows_have_the_same_number_of_columns() -> None:
    values = np.array([0.1, 0.7, 0.2])
    for top in (None, 1, 2, 3):
        rows = Rows("csv", CLASSES, top)
        lines = [rows.header, rows.text(Prediction("a,b", values)), rows.text(Prediction("a", None, "missing"))]
        assert len({len(next(csv.reader([line]))) for line in lines}) == 1


# ------------------------------------------------------------------------------------------------ a real run
@pytest.fixture(scope="module")
def pictures(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for split, kind in itertools.product(("train", "validation"), ("cats", "dogs")):
        (folder / split / kind).mkdir(parents=True)
        source = assets / "images" / "cats_and_dogs_filtered" / split / kind
        for path in sorted(source.iterdir())[: 24 if split == "train" else 12]:
            shutil.copy(path, folder / split / kind)
    return folder


@pytest.fixture(scope="module")
def run(assets: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options: dict[str, Any] = {"backbone": "mobilenetv2-0.35", "image_size": (96, 96)}
    options["weights"] = str(assets / "weights" / "mobilenet_v2_0.35_224_no_top.weights.h5")
    store = extract_features(pictures, folder / "f.h5", **options)
    return train_head(store, "logistic", runs=folder / "runs", params={"C": 3e-4}).folder  # far from certain


@pytest.mark.slow
def test_every_way_in_and_out_gives_the_same_probabilities(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures / "validation" / "cats"
    names = sorted(path.name for path in folder.iterdir())
    assert main(["predict", str(run), str(folder)]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["file"] for row in rows] == names
    values = np.array([[float(row["cats"]), float(row["dogs"])] for row in rows])
    assert np.ptp(values[:, 0]) > 0.05  # not all the same
    assert np.abs(values[:, 0] - 0.5).max() < 0.49
    assert main(["predict", str(run), str(folder), "--out", str(tmp_path / "rows.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(line["file"], line["probabilities"]) for line in lines] == [
        (row["file"], {"cats": float(row["cats"]), "dogs": float(row["dogs"])}) for row in rows
    ]
    monkeypatch.chdir(folder)
    feed(monkeypatch, "\n".join(names).encode())
    capsys.readouterr()
    assert main(["predict", str(run.parent), "-"]) == 0
    assert list(csv.DictReader(capsys.readouterr().out.splitlines())) == rows
    assert main(["predict", str(run), str(folder), "--top", "2", "--batch-size", "5"]) == 0
    for top, row in zip(csv.DictReader(capsys.readouterr().out.splitlines()), rows, strict=True):
        best, other = ("cats", "dogs") if float(row["cats"]) > float(row["dogs"]) else ("dogs", "cats")
        assert (top["file"], top["class_1"], top["class_2"]) == (row["file"], best, other)
        np.testing.assert_allclose(float(top["probability_1"]), float(row[best]), atol=2e-6)
    assert main(["predict", str(run), names[3]]) == 0
    (one,) = csv.DictReader(capsys.readouterr().out.splitlines())
    np.testing.assert_allclose(float(one["cats"]), float(rows[3]["cats"]), atol=2e-6)


@pytest.mark.slow
def test_averaging_over_views_is_the_mean_of_their_probabilities(run: Path, pictures: Path) -> None:
    folder, opened = pictures / "validation" / "dogs", Run.open(run)
    stream = io.StringIO()
    predict(run, folder, views=3, augment="crop-rotation-jitter", batch_size=5, stream=stream)
    rows = list(csv.DictReader(stream.getvalue().splitlines()))
    network, head = network_of(opened), head_of(opened)
    engine = network.engine(network.recipes, batch_size=3)
    single, averaged = [], []
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        digest = hashlib.sha256(data).digest()
        spec = PRESETS["crop-rotation-jitter"]
        views = decode_views(data, opened.recipe.pixels, spec, seed=0, sha256=digest, views=range(3)).pixels
        values = head.predict_proba(engine(views)[network.recipes[0].name])
        single.append(values[0])
        averaged.append(values.mean(axis=0))
    received = np.array([[float(row["cats"]), float(row["dogs"])] for row in rows])
    np.testing.assert_allclose(received, averaged, atol=3e-6)
    assert np.abs(np.array(single) - averaged).max() > 0.01  # the views count


@pytest.mark.slow
@pytest.mark.pain(15)
def test_pain_15_predicting_does_not_leak(run: Path, pictures: Path) -> None:
    path, process = str(next((pictures / "train" / "cats").iterdir())), psutil.Process()
    resident = []

    def paths() -> Iterator[str]:
        for number in range(3000):
            if number % 500 == 0:
                resident.append(process.memory_info().rss)
            yield path

    assert predict(run, paths(), stream=io.StringIO())["predicted"] == 3000
    assert resident[-1] - resident[2] < 16 * 2**20, resident
