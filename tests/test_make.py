"""The Makefile passes every variable on as one word, whatever characters are in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

NAMES = [
    "my photos",
    "it's",
    'a "b" c',
    "photos (2)",
    "a & b; touch c",
    "$(shell touch d) `touch e` $f $$g",
    "*",
    "a\\b",
    "#1",
    "~x",
    "-",
]
COMMANDS = {
    "extract": ("extract DATA --out FEATURES --backbone BACKBONE", 'ARGS=--image-size 96 --split "by hand"'),
    "train-head": ("train-head FEATURES --head HEAD --runs RUNS", "ARGS=--seed 1"),
    "finetune": ("finetune RUN --images DATA", ""),
    "predict": ("predict RUN IMAGES --out PREDICTIONS", ""),
    "evaluate": ("evaluate RUN IMAGES", ""),
    "leaderboard": ("leaderboard RUNS", ""),
    "report": ("report RUNS --out report.html", ""),
    "preview": ("preview DATA --out preview.png", ""),
    "export": ("export RUN", "ARGS=--format onnx"),
    "recipe": ("recipe NAME DATA", ""),
}
SHELL_WORDS = {"": [], "ARGS=--seed 1": ["--seed", "1"], "ARGS=--format onnx": ["--format", "onnx"]}


def make(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """Run a target with a stand-in of Python, and return the words that follow ``-m pipeline``."""
    program = folder / ".venv" / "bin" / "python"
    if not program.exists():
        program.parent.mkdir(parents=True)
        program.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >> words\n')
        program.chmod(0o755)
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        (folder / ".venv" / ".installed").touch()
    (folder / "words").unlink(missing_ok=True)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    done = subprocess.run(
        ["make", "-s", *arguments], cwd=folder, env={**ours, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    words = (folder / "words").read_text().split("\0")[:-1]
    assert words[:2] == ["-m", "pipeline"]
    return words[2:]


@pytest.mark.slow
@pytest.mark.pain(17)
@pytest.mark.parametrize("target", COMMANDS)
def test_every_variable_is_one_word(target: str, tmp_path: Path) -> None:
    template, args = COMMANDS[target]
    variables = [word for word in template.split() if word.isupper()]
    more = SHELL_WORDS.get(args, ["--image-size", "96", "--split", "by hand"])
    for name in NAMES:
        values = {variable: f"{name} {variable}" for variable in variables}
        given = [f"{variable}={value}" for variable, value in values.items()]
        assert make(tmp_path, target, *given, *([args] if args else [])) == [
            *(values.get(word, word) for word in template.split()),
            *more,
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".venv", "Makefile", "pyproject.toml", "words"]


def test_no_target_is_forgotten() -> None:
    text = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"^([a-z-]+):.*\n\t\$\(RUNNER\)", text, re.MULTILINE)) == set(COMMANDS)


def test_run_and_images_follow_runs_and_data(tmp_path: Path) -> None:
    assert make(tmp_path, "predict") == ["predict", "runs", "sample:digits", "--out", "predictions.csv"]
    words = ["predict", "my runs", "my (photos)", "--out", "predictions.csv"]
    assert make(tmp_path, "predict", "RUNS=my runs", "DATA=my (photos)") == words
    assert make(tmp_path, "predict", RUNS="my runs", DATA="my (photos)") == words
    words[1:3] = ["one run", "new photos"]
    assert make(tmp_path, "predict", "RUNS=x", "DATA=y", "RUN=one run", "IMAGES=new photos") == words


def test_the_home_folder_may_be_a_tilde(tmp_path: Path) -> None:
    words = make(tmp_path, "extract", "DATA=~/my photos", "FEATURES=it's/~/f.h5", HOME="/home/me")
    assert words[1:4] == ["/home/me/my photos", "--out", "it's/~/f.h5"]


def test_help_prints_names_and_runs_nothing(tmp_path: Path) -> None:
    make(tmp_path, "leaderboard")
    done = subprocess.run(
        ["make", "help", 'DATA="`touch a`" & touch b $(shell touch c)'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'DATA="`touch a`" & touch b $(shell touch c) BACKBONE=mobilenetv2' in done.stdout
    assert not {"a", "b", "c"} & {path.name for path in tmp_path.iterdir()}
