"""Closed, full and broken standard streams: the work is done, no file gets the messages, and no traceback is printed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import differences
from helpers import ROOT, paint_folder

PIPELINE = [sys.executable, "-m", "pipeline"]
CLOSED = ["2>&-", "<&- >&- 2>&-"]


def shell(command: list[object], streams: str) -> tuple[int, str, str]:
    """Run a command with redirections, and return exit code, standard output and standard error."""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {streams}', "bash", *map(str, command)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_folder(tmp_path_factory.mktemp("streams") / "images", {"cat": 20, "dog": 20})


def extraction(images: Path, out: Path) -> list[object]:
    log = out.with_suffix(".log")
    return [sys.executable, ROOT / "tests" / "faults.py", log, "--numpy", 8, "--", "extract", images, "--out", out]


@pytest.mark.slow
def test_an_extraction_with_closed_streams_makes_the_same_store(images: Path, tmp_path: Path) -> None:
    code, output, errors = shell(extraction(images, tmp_path / "open.h5"), "")
    assert (code, "40 inferred" in output, "next: " in errors) == (0, True, True)
    for number, streams in enumerate(CLOSED):
        out = tmp_path / f"{number}.h5"
        code, output, errors = shell(extraction(images, out), streams)
        assert (code, "Traceback" in errors) == (0, False), (streams, errors)
        assert ("40 inferred" in output) == (">&-" not in streams.replace("2>&-", "")), streams
        assert ("next: " in errors) == ("2>&-" not in streams), streams
        assert differences(tmp_path / "open.h5", out) == [], streams


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "streams", "code", "said"),
    [
        (["leaderboard", "RUNS"], ">/dev/full", 1, "error: standard output: No space left on device\n"),
        (["--help"], ">/dev/full", 1, "error: standard output: No space left on device\n"),
        (["leaderboard", "RUNS"], "2>/dev/full", 0, ""),
        (["nosuch"], "2>&-", 2, ""),
        (["predict", "RUNS", "-"], "<&-", 2, "error: standard input is closed; expected a list of paths there, "),
        (["predict", "RUNS", "x"], ">&-", 2, "error: standard output is closed, so the rows would be lost; "),
        (["leaderboard", "RUNS"], "2> >(true)", 0, ""),
    ],
)
def test_a_stream_that_cannot_be_written_is_said_in_a_line(
    arguments: list[str], streams: str, code: int, said: str, tmp_path: Path
) -> None:
    received, _, errors = shell(
        [*PIPELINE, *(str(tmp_path) if word == "RUNS" else word for word in arguments)], streams
    )
    assert received == code
    assert errors.startswith(said)
    assert len(errors.splitlines()) == (1 if said else 0)


WRITER = """
import sys, time
from pipeline.streams import standard_streams
with standard_streams():
    stream = getattr(sys, sys.argv[1])
    for number in range(3000):
        stream.write(f"{number:099}\\n")
    stream.flush()
"""


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_full_pipe_that_does_not_wait_loses_nothing(name: str) -> None:
    """As where another program has set O_NONBLOCK on the pipe, and reads slowly."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    process = subprocess.Popen([sys.executable, "-c", WRITER, name], cwd=ROOT, **{name: write})
    os.close(write)
    received = b""
    while data := os.read(read, 20_000):
        received += data
        time.sleep(0.005)
    os.close(read)
    assert process.wait() == 0
    assert received == b"".join(b"%099d\n" % number for number in range(3000))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_has_gone(name: str) -> None:
    read, write = os.pipe()
    os.close(read)
    other = {"stderr" if name == "stdout" else "stdout": subprocess.PIPE}
    done = subprocess.run([sys.executable, "-c", WRITER, name], cwd=ROOT, check=False, **{name: write}, **other)
    os.close(write)
    if name == "stderr":  # what it says is lost, the work is not
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        assert b"BrokenPipeError" in done.stderr
