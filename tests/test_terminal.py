"""What a person sees: progress with rate and time left on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, paint

from pipeline.cli import main
from pipeline.commands.common import app, print_document, print_note
from pipeline.progress import QUIET, ConsoleProgress, StderrHandler, set_quiet

# predict with a model that needs no network, slowly enough for a bar to be drawn
CHILD = """
import pathlib, sys, time
from types import SimpleNamespace
import numpy as np
import features.shown, pipeline.stages.predict
from features.sources.reading import Reading
from pipeline.cli import main
from pipeline.tasks.table import CLASSIFICATION

class Slow:
    name, classes, batch_size, answers = "slow", ("cat", "dog"), 2, None
    def load(self, data):
        return np.zeros(3)
    def __call__(self, images):
        time.sleep(0.02)
        return np.full((len(images), 2), 0.5)

plain = Reading(settled=True)
run = SimpleNamespace(classes=Slow.classes, recipe=SimpleNamespace(augmentation=None), folder=pathlib.Path("run"), reading=plain, metrics={"validation": {}}, task=CLASSIFICATION)
pipeline.stages.predict.taken = lambda path, *_: (run, [])
pipeline.stages.predict.RunModel = lambda run, **options: Slow()
features.shown.PLAIN_SECONDS = 0.15
sys.exit(main(sys.argv[1:]))
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*(?<![0-9])(3[0-8]|4[0-8]|9[0-7])[;m]")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(60):
        paint(folder / f"{number:02d}.png", (number, 0, 0))
    return folder


def run(*arguments: object, stdin: bytes = b"", terminal: bool, **environment: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error, the latter a terminal or a pipe."""
    values = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    values |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    if not terminal:
        done = subprocess.run(command, input=stdin, env=values, capture_output=True, check=False)
        return done.returncode, done.stdout.decode(), done.stderr.decode()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=values, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(stdin)
    process.stdin.close()
    seen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end has gone
            data = b""
        if not data:
            break
        seen += data
    os.close(ours)
    output = process.stdout.read().decode()
    process.stdout.close()
    return process.wait(), output, seen.decode()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.slow
def test_a_terminal_shows_rate_and_time_left_and_the_rows_stay_clean(images: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("\n".join([*map(str, sorted(images.iterdir())), "none.png"]))
    code, output, seen = run("predict", "run", images, terminal=True)
    assert code == 0, seen
    rows = output.splitlines()
    assert len(rows) == 61
    assert rows[1] == "00.png,cat,0.5,0.5,0.5,"
    assert "\x1b" not in output
    assert re.search(r"predict .*\d+/60 \d+\.\d images/s 0:00:0\d left", plain(seen)), seen
    assert COLOUR.search(seen)
    assert seen.endswith("\x1b[2K")  # the bar is wiped away when the work is done
    # of a list nobody knows the length; its warnings stand above the bar, on lines of their own
    code, output, seen = run("predict", "run", "-", stdin=(tmp_path / "list").read_bytes(), terminal=True)
    assert code == 0, seen
    assert re.search(r"predict .*\d+/\? \d+\.\d images/s", plain(seen)), seen
    assert re.search(r"(^|[\r\n])WARNING: none\.png is unreadable", plain(seen)), seen


@pytest.mark.slow
def test_no_color_is_respected_and_a_dumb_terminal_gets_lines(images: Path) -> None:
    _, _, seen = run("predict", "run", images, terminal=True, NO_COLOR="1")
    assert "images/s" in seen
    assert not COLOUR.search(seen)
    _, _, seen = run("predict", "run", images, terminal=True, TERM="dumb")
    assert "\x1b" not in seen
    assert re.search(r"^predict: \d+ of 60, \d+\.\d images/s, \d+ s left\r$", seen, re.MULTILINE)


@pytest.mark.slow
def test_without_a_terminal_there_are_plain_lines_now_and_then(images: Path, tmp_path: Path) -> None:
    code, output, errors = run("predict", "run", images, "--out", tmp_path / "rows.csv", terminal=False)
    assert code == 0
    assert output.startswith(f"{tmp_path}/rows.csv: 60 predictions by slow\n")
    lines = errors.splitlines()
    assert 2 <= len(lines) <= 6, errors
    assert all(re.fullmatch(r"predict: \d+ of 60, \d+\.\d images/s, \d+ s left", line) for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", output + errors)


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_keeps_the_document_and_the_errors(images: Path, tmp_path: Path, terminal: bool) -> None:
    listed = b"\n".join([*(os.fsencode(path) for path in sorted(images.iterdir())[:20]), b"none.png"])
    command = ("predict", "run", "-", "--out", tmp_path / "rows.csv", "--json")
    for arguments in (("-q", *command), (*command, "--quiet")):
        code, output, errors = run(*arguments, stdin=listed, terminal=terminal)
        assert (code, json.loads(output)["images"], errors) == (0, 21, "")
    code, output, errors = run("--quiet", "predict", "run", tmp_path / "none", terminal=terminal)
    assert (code, output) == (1, "")
    assert "error: " in errors
    assert "does not exist: no 'none'" in errors


# ------------------------------------------------------------------------------------------------ without processes
def test_lines_say_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), 100.0
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("time.monotonic", lambda: now)
    with ConsoleProgress() as progress:
        # what was there before does not count as speed
        for now, stage, done, total in (  # noqa: B007  the clock reads it
            (100.0, "extract", 500, 1000), (110.0, "extract", 550, 1000), (130.0, "extract", 650, 1000),
            (131.0, "extract", 655, 1000), (140.0, "predict", 0, 0), (160.0, "predict", 80, 0),
        ):  # fmt: skip
            progress(stage, done, total)
    assert stream.getvalue() == "extract: 650 of 1000, 5.0 images/s, 70 s left\npredict: 80, 4.0 images/s\n"


def test_no_escape_sequence_of_a_name_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Results, hints, warnings and errors of all commands are printed by these."""
    name = "a\x1b[2J\x07\u202eb"
    print_document({}, False, f"{name}\nc")
    print_note(name)
    record = logging.makeLogRecord({"levelno": logging.WARNING, "levelname": "WARNING", "msg": f"{name} is unreadable"})
    assert StderrHandler().format(record) == "WARNING: a\\x1b[2J\\x07\\u202eb is unreadable"
    assert capsys.readouterr() == ("a\\x1b[2J\\x07\\u202eb\nc\n", "a\\x1b[2J\\x07\\u202eb\n")
    assert main(["train-head", f"/nowhere/{name}.h5"]) == 1
    assert "error: /nowhere/a\\x1b[2J\\x07\\u202eb.h5: no such feature store" in capsys.readouterr().err


def test_quiet_ends_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_quiet(quiet=True)
    assert main(["--quiet", "leaderboard", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("no runs\n", "")
    assert not QUIET.is_set()


def test_every_command_has_quiet_and_those_with_a_document_have_json() -> None:
    import typer

    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {"extract", "train-head", "finetune", "predict", "export", "leaderboard"} <= set(commands)
    groups = [name for name, command in commands.items() if hasattr(command, "commands")]
    for name in groups:
        commands |= {f"{name} {inner}": command for inner, command in commands.pop(name).commands.items()}
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--quiet", "-q"} <= options, name
