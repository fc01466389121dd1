"""The labels file: what a line is, what a kill leaves, copies, order, people who disagree, many rows."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import listing

from features.errors import FormatVersionError, LabelsError, StoreError
from pipeline.labels.file import (
    EXCLUDE,
    FIRST_LINE,
    HEADER,
    UNKNOWN,
    WITHDRAWN,
    Decision,
    append_decisions,
    class_of,
    moment_text,
    new_decision,
    read_labels,
    value_of,
)

CAT, DOG = (hashlib.sha256(name.encode()).hexdigest() for name in ("cat", "dog"))


def decision(number: int = 0, *, sha256: str = CAT, value: str = "dog", by: str = "ann", second: int = 0) -> Decision:
    return Decision(
        sha256, "a/b.png", "label", value, "cat", by, f"2026-01-01T00:00:{second:02d}.000000Z", f"{number:032x}"
    )


def test_a_new_file_has_its_first_line_and_one_line_for_each_decision(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    append_decisions(path, [decision(1)])
    append_decisions(path, [decision(2, value=UNKNOWN, second=5)])
    assert path.read_text() == (
        "# bottleneck-labels 1\nsha256,path,target,value,earlier,by,utc,id\n"
        f"{CAT},a/b.png,label,dog,cat,ann,2026-01-01T00:00:00.000000Z,{1:032x}\n"
        f"{CAT},a/b.png,label,unknown,cat,ann,2026-01-01T00:00:05.000000Z,{2:032x}\n"
    )
    labels = read_labels(path)
    assert list(labels.decisions) == [decision(1), decision(2, value=UNKNOWN, second=5)]
    assert labels.decisions[-1].value == UNKNOWN
    assert labels.decisions[0:1] == [decision(1)]
    assert (labels.digest, labels.size) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    assert (labels.torn, labels.doubled) == ((), 0)
    assert listing(tmp_path) == ["labels.csv"]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ('a "b", c', '"a ""b"", c"'),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("café \u2028 back\\slash", r"café \u2028 back\\slash"),
        ("\x00\x85", r"\u0000\u0085"),
    ],
)
def test_whatever_a_path_or_class_holds_is_one_physical_line(tmp_path: Path, text: str, written: str) -> None:
    path = tmp_path / "labels.csv"
    one = dataclasses.replace(decision(), path=text, value=text, by=text)
    append_decisions(path, [one])
    lines = path.read_bytes().decode("utf-8").splitlines()
    assert len(lines) == 3
    assert lines[2] == f"{CAT},{written},label,{written},cat,{written},2026-01-01T00:00:00.000000Z,{0:032x}"
    assert list(read_labels(path).decisions) == [one]


@pytest.mark.parametrize("name", ["cat", "unknown", "exclude", "", "class:cat", "class:"])
def test_a_class_may_have_any_name(name: str) -> None:
    assert value_of(name) not in (UNKNOWN, EXCLUDE, WITHDRAWN)
    assert class_of(value_of(name)) == name


def test_a_torn_last_line_is_ignored_reported_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    append_decisions(path, [decision(1)])
    whole = path.read_bytes()
    append_decisions(path, [decision(2)])
    longer = path.read_bytes()
    for end in range(len(whole) + 1, len(longer) - 1):
        path.write_bytes(longer[:end])
        torn = read_labels(path)
        assert (list(torn.decisions), torn.torn, torn.size) == ([decision(1)], (4,), len(whole))
    path.write_bytes(longer[:-1])  # an editor that writes no last end of line
    assert [one.id for one in read_labels(path).decisions] == [f"{1:032x}", f"{2:032x}"]
    append_decisions(path, [decision(3)])
    assert path.read_bytes() == longer + longer[len(whole) :].replace(f"{2:032x}".encode(), f"{3:032x}".encode())
    path.write_bytes(longer[:-5])
    append_decisions(path, [decision(2)])
    assert path.read_bytes() == longer


def test_files_of_several_people_concatenate_even_behind_a_torn_line(tmp_path: Path) -> None:
    ann, bob = tmp_path / "ann.csv", tmp_path / "bob.csv"
    append_decisions(ann, [decision(1, second=9)])
    append_decisions(ann, [decision(2)])
    append_decisions(bob, [decision(3, by="bob", second=4), decision(1, second=9)])
    both = tmp_path / "both.csv"
    both.write_bytes(ann.read_bytes() + bob.read_bytes())
    labels = read_labels(both)
    # by time and then by place; the second decision of ann came when a clock was behind, and took the time before it
    assert [int(one.id, 16) for one in labels.decisions] == [3, 1, 2]
    assert (labels.doubled, labels.torn) == (1, ())
    assert [one.utc[17:19] for one in labels.decisions] == ["04", "09", "09"]
    append_decisions(both, [decision(4, second=1)], dated=True)
    assert [int(one.id, 16) for one in read_labels(both).decisions] == [4, 3, 1, 2]
    both.write_bytes(ann.read_bytes()[:-3] + bob.read_bytes())
    labels = read_labels(both)
    assert [int(one.id, 16) for one in labels.decisions] == [3, 1]
    assert labels.torn == (4,)


def test_two_decisions_of_one_id_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    append_decisions(path, [decision(1), decision(1, value="wolf")])
    with pytest.raises(LabelsError, match=f"labels.csv: two different decisions have the id {1:032x} .*was edited"):
        read_labels(path)


def test_the_decision_in_effect_is_the_last_one_that_was_not_withdrawn(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    append_decisions(path, [decision(1), decision(2, sha256=DOG, value="cat"), decision(3, value=UNKNOWN)])
    hashes = np.array([list(bytes.fromhex(text)) for text in (DOG, CAT, "00" * 32, CAT)], np.uint8)
    assert read_labels(path).latest(hashes, "label").tolist() == [1, 2, -1, 2]
    assert read_labels(path).latest(hashes, "weather").tolist() == [-1, -1, -1, -1]
    append_decisions(path, [decision(4, value=WITHDRAWN)])
    assert read_labels(path).latest(hashes, "label").tolist() == [1, -1, -1, -1]


def test_new_decisions_are_later_than_those_before_whatever_the_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_decision(bytes.fromhex(CAT), "a.png", "dog", by="ann", earlier="cat")
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    second = new_decision(CAT, "a.png", "dog", by="ann")
    assert first.utc < second.utc
    assert (first.sha256, first.target, first.value, first.earlier, first.by) == (CAT, "label", "dog", "cat", "ann")
    assert re.fullmatch("[0-9a-f]{32}", first.id)
    assert first.id != second.id


def test_the_file_as_it_was_is_found_again_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    append_decisions(path, [decision(1)])
    before = read_labels(path)
    append_decisions(path, [decision(2, value="cat")])
    again = read_labels(path, before.size)
    assert (again.digest, list(again.decisions)) == (before.digest, [decision(1)])
    assert before.decisions[0] == decision(1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a labels file: received '', expected the first line '# bottleneck-labels 1'"),
        ("path,label\na.png,cat\n", "is not a labels file: received 'path,label'"),
        (f"{FIRST_LINE}\n{HEADER}\na,b\n", "line 3: received 2 fields, expected 8: sha256,path"),
        (f"{FIRST_LINE}\n{'A' * 64},a,label,dog,,ann,2026-01-01T00:00:00Z,{1:032x}\n", "line 2: sha256: received 'AAA"),
        (
            f"{FIRST_LINE}\n{CAT},a,label,dog,,ann,2026-01-01T00:00:00Z,7\n",
            "line 2: id: received '7', expected 32 hexa",
        ),
        (
            f"{FIRST_LINE}\n{CAT},a,label,dog,,ann,yesterday,{1:032x}\n",
            "line 2: utc: received 'yesterday', expected such",
        ),
        (f"{FIRST_LINE}\n{CAT},a,label,dog,,ann,2026-13-01T00:00:00Z,{1:032x}\n", "line 2: month must be in 1..12"),
        (
            f"{FIRST_LINE}\n{CAT},a,label,dog,,ann,2026-02-30T00:00:00.000000Z,{1:032x}\n",
            "a line has a time that does not exist",
        ),
        (f"{FIRST_LINE}\n{CAT},a\\b,label,dog,,ann,2026-01-01T00:00:00Z,{1:032x}\n", "line 2: unknown escape"),
        (f"{FIRST_LINE}\n" + "x" * 70_000 + "\n", "line 2: is longer than 65,536 bytes"),
        (f"{FIRST_LINE}\n\xff\n", "line 2: 'utf-8' codec"),
    ],
)
def test_a_line_that_cannot_be_understood_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LabelsError) as problem:
        read_labels(path)
    assert str(problem.value).startswith(str(path))
    assert said in str(problem.value)
    if text and not text.startswith("#"):
        with pytest.raises(LabelsError):
            append_decisions(path, [decision()])
        assert path.read_bytes() == text.encode("latin-1")


def test_another_version_a_missing_file_and_a_pipe_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("# bottleneck-labels 2\n")
    with pytest.raises(FormatVersionError, match="received '# bottleneck-labels 2', expected '# bottleneck-labels 1'"):
        read_labels(path)
    with pytest.raises(FormatVersionError):
        append_decisions(path, [decision()])
    with pytest.raises(LabelsError, match="no such labels file"):
        read_labels(tmp_path / "none.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(LabelsError, match="not a regular file"):
        read_labels(tmp_path / "pipe.csv")


def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    append_decisions(path, [decision(1)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b" 1\n", b" 1,,,,,,,\n").replace(b"\n", b"\r\n"))
    assert list(read_labels(path).decisions) == [decision(1)]


def test_a_decision_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    append_decisions(path, [decision(1)])
    before = path.read_bytes()
    for wrong in (dataclasses.replace(decision(2), id="7"), dataclasses.replace(decision(2), utc="now")):
        with pytest.raises(LabelsError, match=r"a decision about 'a/b\.png' cannot be written: "):
            append_decisions(path, [decision(3), wrong])
        assert path.read_bytes() == before


def test_a_file_that_cannot_be_written_is_named_and_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "labels.csv"
    append_decisions(path, [decision(1)])
    before = path.read_bytes()
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match=r"labels.csv: could not be written \(No space left"):
        append_decisions(path, [decision(2)])
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["labels.csv"]
    with pytest.raises(StoreError, match="could not be written"):
        append_decisions(path / "labels.csv", [decision(2)])
    with pytest.raises(LabelsError, match="not a regular file"):
        os.mkfifo(tmp_path / "pipe.csv")
        append_decisions(tmp_path / "pipe.csv", [decision(2)])


def _append(path: Path, who: int) -> None:
    for number in range(20):
        append_decisions(path, [decision(100 * who + number, by=f"person {who}")])


@pytest.mark.slow
def test_two_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(path, who)) for who in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    labels = read_labels(path)
    assert {int(one.id, 16) for one in labels.decisions} == {100 * who + k for who in (1, 2) for k in range(20)}
    assert labels.torn == ()
    assert path.read_text().count(FIRST_LINE) == 1


def write_many(path: Path, count: int) -> None:
    """Write decisions about as many images, in order of time, without the checks of ``append_decisions``."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(f"{FIRST_LINE}\n{HEADER}\n")
        for number in range(count):
            digest = hashlib.sha256(b"%d" % number).hexdigest()
            utc = moment_text(1_700_000_000_000_000 + number)
            stream.write(f"{digest},photos/{number}.jpg,label,class {number % 10},,ann,{utc},{number:032x}\n")


@pytest.mark.slow
def test_memory_grows_by_what_a_line_needs(tmp_path: Path) -> None:
    import tracemalloc

    path, count = tmp_path / "labels.csv", 5_000
    write_many(path, count)
    read_labels(path)  # what is imported then is not counted
    tracemalloc.start()
    labels = read_labels(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(labels) == count
    assert kept < 200_000 + 65 * count
    assert peak < 2_000_000 + 400 * count  # a block of 65,536 lines, which does not grow with the file
    wanted = np.array([list(hashlib.sha256(b"%d" % number).digest()) for number in (7, count - 1, count)], np.uint8)
    assert labels.latest(wanted, "label").tolist() == [7, count - 1, -1]
