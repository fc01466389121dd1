"""Run folders that strangers made or that a crash left: each is skipped and named, and stops no reader of the others."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, call_pipeline, paint
from made_runs import made_run

from features.errors import BottleneckError, RunError
from pipeline.config import YAML_BYTES
from pipeline.reporting.reproduce import commands
from pipeline.runs.board import take_run
from pipeline.runs.folder import Run, find_runs, read_history, read_predictions

pytestmark = pytest.mark.slow  # whole commands on 33 run folders

GOOD = "logistic-good"
SECONDS = 10  # at most, for any reader
Spoil = Callable[[Path], object]


def text(name: str, before: str, after: str) -> Spoil:
    """Replace a part of a file."""

    def spoil(folder: Path) -> None:
        old = (folder / name).read_text(encoding="utf-8")
        assert before in old, (name, before)
        (folder / name).write_text(old.replace(before, after, 1), encoding="utf-8")

    return spoil


def whole(name: str, content: str | bytes) -> Spoil:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    return lambda folder: (folder / name).write_bytes(data)


def field(path: str, value: object) -> Spoil:
    """Set a field of ``config.yaml``."""

    def spoil(folder: Path) -> None:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        *parents, last = path.split(".")
        place = config
        for name in parents:
            place = place[name]
        place[last] = value
        (folder / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper), encoding="utf-8")

    return spoil


def scores(**values: object) -> Spoil:
    """Set values of the validation scores in ``metrics.json``."""

    def spoil(folder: Path) -> None:
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["validation"] |= values
        (folder / "metrics.json").write_text(json.dumps(metrics))

    return spoil


def large(name: str, size: int = 100_000_000) -> Spoil:
    return lambda folder: os.truncate(folder / name, size)


def replaced(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
ATTACKS: dict[str, tuple[Spoil, str]] = {
    # values that are not what they say
    "an impossible date": (text("config.yaml", "seed: 0", "seed: 2026-99-99"), "month must be in 1..12"),
    "an impossible time": (text("config.yaml", "seed: 0", "seed: 2026-01-01 99:99:99"), "holds a value that YAML does not"),
    "a float that is a word": (text("config.yaml", "seed: 0", "seed: !!float abc"), "aliases and tags are not allowed"),
    "a timestamp that is a word": (text("config.yaml", "seed: 0", "seed: !!timestamp x"), "aliases and tags are not allowed"),
    "a huge integer": (text("config.yaml", "seed: 0", f"seed: {'9' * 100_000}"), "a number has 100000 characters"),
    "a number to the base of sixty": (text("config.yaml", "seed: 0", f"seed: {'1:' * 90_000}1"), "a number has 180001"),
    "a huge integer in JSON": (whole("metrics.json", '{"format": ' + "9" * 5000 + "}"), "metrics.json: cannot be read"),
    "a count beyond all floats": (scores(n=10**400), "validation.n: received"),
    "scores that are no numbers": (scores(accuracy=float("nan")), "validation.accuracy: received nan"),
    "an accuracy above 1": (scores(accuracy=7), "validation.accuracy: received 7"),
    # structures without end
    "an alias cycle": (text("config.yaml", "parameters:", "parameters: &x {a: *x}\n  other:"), "aliases and tags"),
    "an alias bomb": (whole("config.yaml", BOMB), "aliases and tags are not allowed"),
    "a deep list": (whole("config.yaml", "a: " + "[" * 1_000_000), "nest"),
    "a deep mapping": (text("config.yaml", "seed: 0", "seed: " + "{a: " * 50 + "1" + "}" * 50), "nested more than 40 deep"),
    "deep JSON": (whole("environment.json", "[" * 500_000), "environment.json: cannot be read"),
    "200,000 classes": (field("classes", [f"c{n}" for n in range(200_000)]), "holds more than 100,000 values"),
    "30,000 classes that are no names": (field("classes", list(range(30_000))), "classes.0: received 0"),
    "a run id of another folder": (field("run_id", "../../logistic-good"), "run_id: received"),
    "a run id with an escape sequence": (field("run_id", "x\x1b[2J"), "run_id: received"),
    # sizes
    "a configuration of 100 MB": (large("config.yaml"), f"larger than {YAML_BYTES:,} bytes"),
    "metrics of 100 MB": (large("metrics.json"), "larger than 1,000,000 bytes"),
    "an environment of 100 MB": (large("environment.json"), "larger than 1,000,000 bytes"),
    # files that are none
    "a pipe as configuration": (replaced("config.yaml", os.mkfifo), "is not a run folder"),
    "a device as metrics": (replaced("metrics.json", lambda path: path.symlink_to("/dev/zero")), "missing: metrics.json"),
    "a link to itself": (replaced("history.csv", lambda path: path.symlink_to(path)), "missing: history.csv"),
    "bytes that are no text": (whole("config.yaml", b"\xff\xfe\x00"), "cannot be read as a configuration file"),
    "control characters": (whole("config.yaml", "a: \x1b[2J\x07"), "not valid YAML"),
    "another document": (text("config.yaml", "seed: 0", "seed: 0\n---\nseed: 1"), "not valid YAML"),
    # what a report would trip over
    "a recipe that is a list": (field("features.recipe", []), "features.recipe: received"),
    "a recipe of words": (field("features.recipe", {"version": 1, "backbone": ["x"]}), "features.recipe: recipe: unknown"),
    "fine-tuned from a list": (field("finetune", {"start": ["x"]}), "finetune.start: received"),
    "a cache that is a text": (field("finetune", {"start": "x", "from_cache": "y"}), "finetune.from_cache: received"),
    "settings of folders that are none": (field("features.reading", {"x": 1}), "features.reading: received 'x'"),
}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    made_run(tmp_path / "runs", GOOD, accuracy=0.7)
    made_run(tmp_path / "runs", "logistic-bad", accuracy=0.99)
    return tmp_path / "runs"


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_run_is_skipped_and_named_and_the_exit_code_says_so(attack: str, runs: Path, tmp_path: Path) -> None:
    spoil, message = ATTACKS[attack]
    spoil(runs / "logistic-bad")
    began = time.process_time()
    for command in (
        ["leaderboard", str(runs), "--json"],
        ["report", str(runs), "--out", str(tmp_path / "r.html"), "--json"],
    ):
        done = call_pipeline(*command)
        assert done.returncode == 3
        document = json.loads(done.stdout)
        rows = document if isinstance(document, list) else document["groups"]
        assert [row.get("run_id", row.get("chosen")) for row in rows] == [GOOD]
        assert "logistic-bad" in done.stderr
        assert len(done.stderr) < 1100
        assert "\x1b" not in done.stderr
    taken = take_run(runs)
    assert (taken.run.run_id, taken.damaged) == (GOOD, ["logistic-bad"])
    with pytest.raises(RunError, match="logistic-bad") as refused:
        Run.open(runs / "logistic-bad")
    assert message in str(refused.value)
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("predictions.csv", None, "larger than"),
        ("predictions.csv", b"path\n" + b'"' * 1000, "cannot be read as predictions"),
        ("predictions.csv", b"\0" * 1000, "holds 0 images, expected 100"),
        ("history.csv", None, "larger than 30,000,000 bytes"),
        ("history.csv", b"epoch,loss\n" + b"1,2\n" * 200_000, "200000 rows; expected at most 100,000"),
        ("history.csv", b"epoch,epoch\n1,2\n", "cannot be read as the history"),
        ("history.csv", b"epoch\n1,2,3\n", "cannot be read as the history"),
    ],
)
def test_a_chosen_run_with_damaged_tables_costs_its_details_and_no_report(
    name: str, content: bytes | None, message: str, runs: Path, tmp_path: Path
) -> None:
    path = runs / "logistic-bad" / name
    if content is None:
        os.truncate(path, 100_000_000)
    else:
        path.write_bytes(content)
    began = time.process_time()
    done = call_pipeline("report", runs, "--out", tmp_path / "r.html", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 3
    assert (document["runs"], document["damaged"]) == (2, ["logistic-bad"])
    assert message in done.stderr
    assert "The chosen run is damaged, and only its scores are shown" in (tmp_path / "r.html").read_text()
    assert call_pipeline("leaderboard", runs, "--choose", "balanced_accuracy", "--json").returncode == 0
    assert time.process_time() - began < SECONDS


def test_many_classes_cost_no_matrix_of_all_pairs(runs: Path, tmp_path: Path) -> None:
    """A confusion matrix of 50,000 classes would take 20 GB."""
    folder = runs / "logistic-bad"
    classes = ["cat", "dog", *(f"e{n}" for n in range(50_000))]
    field("classes", classes)(folder)
    with open(folder / "predictions.csv", newline="") as stream:
        header, *rows = csv.reader(stream)
    with open(folder / "predictions.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([[*header, *classes[2:]], *([*row, *["0"] * 50_000] for row in rows[:2])])
    scores(n=2)(folder)
    code = (
        "import sys\nfrom features.machine import peak_memory\nfrom pipeline.cli import main\n"
        f"code = main(['report', {str(runs)!r}, '--out', {str(tmp_path / 'r.html')!r}])\n"
        "sys.exit(code or peak_memory() > 1_500_000_000)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "49,002 more classes are left out here" in (tmp_path / "r.html").read_text()


def test_a_folder_that_may_not_be_read_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_file, bad = Path.is_file, (runs / "logistic-bad").rename(runs / "logistic-0badbadbad")

    def refuse(path: Path) -> bool:
        if path.parent.name == bad.name:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    found = find_runs(runs)
    assert ([run.run_id for run in found.runs], found.damaged) == ([GOOD], [bad.name])
    with pytest.raises(RunError, match=r"config\.yaml: cannot be read: Permission denied"):
        Run.open(bad)


def test_only_damaged_runs(runs: Path, tmp_path: Path) -> None:
    for name in (GOOD, "logistic-bad"):
        (runs / name / "metrics.json").write_text("{")
    board = call_pipeline("leaderboard", runs)
    assert (board.returncode, board.stdout) == (3, "no runs\n")
    done = call_pipeline("predict", runs, paint(tmp_path / "new" / "1.png", (1, 2, 3)))
    assert done.returncode == 1
    assert "holds no finished run (2 damaged runs left out)" in done.stderr


def test_names_with_escape_sequences_are_printed_as_text(tmp_path: Path) -> None:
    """Names come from files, and could otherwise move the cursor, set the title of the window or hide lines."""
    made_run(tmp_path, "logistic-1", source="/x/\x1b]0;owned\x07photos", classes=("\x1b[31mcat", "dog\u202e"))
    made_run(tmp_path, "logistic-2", source="/x/bees\n* logistic-1", digest="b" * 64, minute=1)
    config = tmp_path / "logistic-1" / "config.yaml"
    config.write_text(config.read_text().replace("name: logistic\n", 'name: "log\\e[2Jistic"\n'))
    (tmp_path / "logistic-\x1b[1m").mkdir()
    (tmp_path / "logistic-\x1b[1m" / "metrics.json").touch()
    commands = (["leaderboard"], ["leaderboard", "--csv"], ["report", "--out", str(tmp_path / "r.html")])
    for command in (*commands, ["predict", paint(tmp_path / ".new" / "1.png", (1, 2, 3))]):
        done = call_pipeline(command[0], tmp_path, *command[1:])
        assert done.returncode in (2, 3)
        shown = done.stderr + (done.stdout if "--csv" not in command else "")
        assert not [mark for mark in shown if not mark.isprintable() and mark != "\n"], command
        assert "\\x1b" in shown
        assert "\n* logistic-1" not in shown


# --- lines to be pasted -------------------------------------------------------------------------------------
COMMAND = "; touch PROOF; $(touch PROOF) `touch PROOF`"
HOSTILE = (
    f"x'{COMMAND} '",
    f'x"{COMMAND}"',
    f"x\n{COMMAND[2:]}\n",
    f"x\r{COMMAND}",
    f"#{COMMAND}",
    f"--runs={COMMAND}",
)


def text_fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all texts in nested values, keys of settings included; a number of fine-tuning may be a text as well."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from text_fields(inner, (*path, key))
    elif isinstance(value, str) or path[:1] == ("finetune",):
        yield path


def with_text(config: dict[str, Any], path: tuple[Any, ...], text: str) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = text
    return changed


def typed(lines: Sequence[str], folder: Path) -> list[list[str]]:
    """What a shell makes of lines that are pasted into it: the words of each command."""
    script = 'bottleneck() { printf "%s\\0" bottleneck "$@" END; }\n' + "\n".join(lines) + "\n"
    done = subprocess.run(
        ["sh"], input=script.encode("utf-8", "surrogateescape"), cwd=folder, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b""), lines
    assert os.listdir(folder) == [], lines
    words, commands = done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1], [[]]
    for word in words:
        commands[-1:] = [[*commands[-1]], []] if word == "END" else [[*commands[-1], word]]
    return commands[:-1]


def test_no_text_of_a_run_becomes_a_command_when_the_report_is_pasted(tmp_path: Path) -> None:
    """Each text field of a run holds a command in turn; the lines stay as many, and their words whole."""
    runs = tmp_path / "ru'ns; touch PROOF"
    made = made_run(runs, "logistic-start", reading={"split_folders": "train=Training,test=Testing"})
    settings = {
        "start": "logistic-start", "unfreeze": "block", "optimizer": "sgd", "schedule": "cosine", "momentum": 0.5,
        "augment": "flip", "class_weight": "balanced", "from_cache": {"path": "b.h5"}, "learning_rate": 0.5,
    }  # fmt: skip
    tuned = made_run(runs, "finetune-logistic-1", settings=settings)
    (shell := tmp_path / "shell").mkdir()
    plain = typed(commands(tuned, start=made), shell)
    assert [words[1] for words in plain] == ["extract", "train-head", "finetune"]
    tried = 0
    for run, start in ((made, None), (tuned, made), (tuned, None)):
        usual = typed(commands(run, start=start), shell)
        for path in {*text_fields(run.config), ("head", "parameters", "C"), ("features", "target")} - {("stage",)}:
            for hostile in HOSTILE:
                changed = dataclasses.replace(run, config=with_text(run.config, path, hostile))
                try:
                    lines = commands(changed, start=start)
                except BottleneckError:  # it is no recipe any more
                    continue
                found = typed(lines, shell)
                assert [words[:2] for words in found] == [words[:2] for words in usual], (path, lines)
                assert all("\n" not in line and line.startswith(("bottleneck ", "# ")) for line in lines)
                tried += 1
    assert tried > 200


def test_histories_and_predictions_of_a_good_run_are_read(runs: Path) -> None:
    run = Run.open(runs / GOOD)
    assert read_history(run.folder) == {"rows": [1.0]}
    assert len(read_predictions(run).paths) == 100
