"""What the README says to type: every command is understood, the first hour and the Python examples run as written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import typer
from helpers import ROOT
from PIL import Image

from pipeline.cli import app

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def lines_of_commands() -> list[str]:
    """Every line of a code block, indented block or table cell that starts one of our commands."""
    found = []
    for _, block in BLOCKS:
        found += block.splitlines()
    found += [line[4:] for line in README.splitlines() if line.startswith("    ")]
    found += re.findall(r"`([^`\n]+)`", README.replace("\\|", "|"))
    lines = [line.strip().removeprefix("$ ").split("  #")[0].strip() for line in found]
    return sorted({line for line in lines if re.match(r"(find .* \| )?(bottleneck|make) [a-z]", line)})


COMMANDS = [line.rpartition("| ")[2] for line in lines_of_commands() if "bottleneck" in line]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line: str) -> None:
    """Its options and arguments are parsed as they would be; nothing is run."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "get_command")
    _, name, *arguments = shlex.split(line.replace("|", " "), comments=True)
    command = group.get_command(click.Context(click.Command("bottleneck")), name)
    assert command is not None, f"no command {name!r}"
    command.make_context(name, arguments)


def test_every_make_target_and_variable_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"\$\(([A-Z]+)\)", makefile))
    lines = [line for line in lines_of_commands() if line.startswith("make ")]
    assert len(lines) > 8
    for line in lines:
        _, target, *assignments = shlex.split(line, comments=True)
        assert target in targets, line
        assert {item.partition("=")[0] for item in assignments} <= variables, line


def test_pictures_and_files_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert any(link.endswith(".png") for link in local)
    assert not [link for link in local if not (ROOT / link).exists()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, as ``git clone`` would make it, with the virtual environment that is here already."""
    place = tmp_path_factory.mktemp("newcomer") / "bottleneck-features"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    (place / ".venv" / "bin").mkdir(parents=True)
    for name, words in {"python": "", "bottleneck": " -m pipeline"}.items():
        program = place / ".venv" / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        program.chmod(0o755)
    (place / ".venv" / ".installed").touch()
    os.utime(place / "pyproject.toml", (0, 0))
    generator = np.random.default_rng(0)
    for number in range(60):
        name = "cat" if number % 2 else "dog"
        path = place / "my" / "photos" / name / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = np.array([150 * (number % 2), 60, 90])
        Image.fromarray((generator.integers(0, 60, (90, 120, 3)) + colour).astype(np.uint8)).save(path)
    return place


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    path = f"{place / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # Variables of the `make` that runs the tests, such as ARGS, are not meant for those that they run.
    ours = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS")
    }
    environment = {**ours, "PATH": path, "PYTHONPATH": str(place)}
    return subprocess.run(
        command, shell=True, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
def test_the_first_hour_as_written(checkout: Path) -> None:
    """At most five commands from nothing to a page about one's own folder; each answers as the README shows."""
    transcript = next(block for _, block in BLOCKS if block.startswith("$ git clone"))
    shown = re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]
    assert len(shown) <= 5
    for step in shown[1:]:
        command, _, expected = step.partition("\n")
        result = run(command, checkout)
        assert result.returncode == 0, result.stdout + result.stderr
        said = (result.stdout + result.stderr).splitlines()
        for line in expected.splitlines():
            if line.strip():
                assert any(alike(line, other) for other in said), f"{command}\n{line!r} is not in\n" + "\n".join(said)
    page = (checkout / "report.html").read_text()
    assert "<title>" in page
    assert "dog" in page


def alike(shown: str, said: str) -> bool:
    """The same words; numbers, identifiers and spaces may differ."""

    def words(line: str) -> list[str]:
        return [word for word in re.split(r"[^A-Za-z]+", re.sub(r"\b(?=\w*\d)[\w.-]+", " ", line)) if word]

    return words(shown) == words(said)


@pytest.mark.slow
def test_the_python_examples_run(checkout: Path) -> None:
    examples = [block for kind, block in BLOCKS if kind == "python"]
    ours = [block for block in examples if "from features" in block or "from pipeline" in block]
    assert len(ours) >= 3
    script = checkout / "examples.py"
    script.write_text("\n".join(ours))
    result = run(f"{sys.executable} {script}", checkout)
    assert result.returncode == 0, result.stderr[-2000:]
    accuracies = [float(number) for number in re.findall(r"\b[01]\.\d+|\b1\.0", result.stdout)]
    assert accuracies
    assert min(accuracies[:2]) > 0.9
