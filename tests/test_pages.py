"""What the pages say to type: every command is understood, every link leads somewhere, the first hour and the examples run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
import typer
import yaml
from helpers import ROOT
from PIL import Image

from pipeline.cli import app

FOLDERS = (ROOT / ".github", ROOT / "features", ROOT / "pipeline", ROOT / "tests" / "benchmarks")
PATHS = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in folder.rglob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
WORKFLOW = ".github/workflows/ci.yml"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
GROUP = typer.main.get_command(app)
assert isinstance(GROUP, click.Group) or hasattr(GROUP, "get_command")
COMMAND = re.compile(
    r"(\w+=\S+ )*(find .* \| )?(taskset |bottleneck |make |python3? |\S*bin/\w+ |bash |pip |dask )[-\w.]"
)
OTHERS = re.compile(r"(git|cd|export|source) ")  # what a shell or git understands, and we do not check
of_pages = pytest.mark.parametrize("page", PAGES)


def blocks(page: str) -> list[tuple[str, str]]:
    """Kind and text of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def command_of(line: str) -> str:
    """A line without its prompt and comment."""
    return re.sub(r"^(\w*\$ )", "", line.strip()).split("  #")[0].strip()


def commands_of(page: str) -> list[str]:
    """Every line of a code block, indented block, table cell or sentence that starts a command."""
    found = [line for _, block in blocks(page) for line in block.splitlines()]
    found += [line[4:] for line in PAGES[page].splitlines() if line.startswith("    ")]
    found += re.findall(r"`([^`\n]+)`", PAGES[page].replace("\\|", "|"))
    return sorted({line for line in map(command_of, found) if COMMAND.match(line)})


COMMANDS = [(page, line) for page in PAGES for line in commands_of(page)]


def understood(line: str) -> None:
    """Options and arguments of a command are parsed as they would be; nothing is run."""
    words = shlex.split(line.rpartition("| ")[2], comments=True)
    while re.fullmatch(r"\w+=.*", words[0]):  # variables of the environment
        words.pop(0)
    if words[0] == "taskset":
        del words[:3]
    program, *arguments = words
    program = Path(program).name
    if program.startswith("python") and arguments[0] == "-m":
        _, program, *arguments = arguments
    if program in ("bottleneck", "pipeline"):
        name, *arguments = arguments
        command = GROUP.get_command(click.Context(click.Command("bottleneck")), name)
        assert command is not None, f"no command {name!r}"
        command.make_context(name, arguments)
    elif program == "dask":
        name, *arguments = arguments
        importlib.import_module(f"distributed.cli.dask_{name}").main.make_context(name, arguments)
    elif program == "make":
        targets = {word for word in arguments if "=" not in word}
        assert targets <= set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE)), line
        variables = {word.partition("=")[0] for word in arguments if "=" in word}
        assert variables <= set(re.findall(r"\$\((?:call quoted,)?([A-Z]+)\)", MAKEFILE)), line
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"(?:bottleneck.features\S*|-e '?\.)\[(.*?)\]", line):
            assert set(named.split(",")) <= extras.keys(), line
    elif program.startswith("python") or program == "bash":
        script = (ROOT / arguments[0]).read_text(encoding="utf-8")
        for option in (word for word in arguments if word.startswith("--")):
            assert f'"{option}"' in script, f"{line}: no option {option}"
    else:
        assert importlib.util.find_spec(program), line
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/")), line


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_is_understood(page: str, line: str) -> None:
    understood(line)


@of_pages
def test_every_line_of_a_block_of_commands_is_one(page: str) -> None:
    """A command that nobody checks would be passed over in silence."""
    for kind, block in blocks(page):
        assert kind in ("sh", "console", "python", "yaml", "text"), f"{page}: a block of kind {kind!r}"
        lines = block.splitlines() if kind == "sh" else re.findall(r"^\w*\$ .*", block, re.MULTILINE)
        for line in map(command_of, lines):
            assert COMMAND.match(line) or OTHERS.match(line), f"{page}: {line}"


def test_there_are_as_many_commands_as_there_were() -> None:
    assert len([line for _, line in COMMANDS if "bottleneck" in line]) > 40
    assert len({line for _, line in COMMANDS if line.startswith("make ")}) > 12
    assert {"make demo", "make test"} <= {line for page, line in COMMANDS if page == "README.md"}


def test_the_workflow_runs_what_there_is() -> None:
    jobs = yaml.safe_load((ROOT / WORKFLOW).read_text())["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert lines == ["make check", "make test"]
    for line in lines:
        understood(line)
        assert line in (ROOT / ".ci" / "run").read_text()


def test_a_release_is_tested_and_built_before_it_is_published() -> None:
    """Only a tag starts it, every other step is done before the one that may write to the index, and nothing else may."""
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    document = yaml.safe_load(text)
    jobs = document["jobs"]
    assert document[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    lines = [step["run"] for step in jobs["sdist"]["steps"] if "run" in step]
    assert lines == ["make test", "make dist"]
    for line in lines:
        understood(line)
    for line in jobs["wheels"]["steps"][2]["env"]["CIBW_TEST_COMMAND"].split(" && "):
        understood(line)
    assert set(jobs["publish"]["needs"]) == jobs.keys() - {"publish"}
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    assert text.count("gh-action-pypi-publish") == 1
    assert "secrets" not in text


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def headings(text: str) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@of_pages
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = folder / path if path else ROOT / page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), f"{page}: {link}"


def test_every_picture_and_page_is_linked() -> None:
    linked = {ROOT / "README.md"}
    for page, text in PAGES.items():
        linked |= {((ROOT / page).parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)", text)}
    assert set(PATHS) | set((ROOT / ".pictures").iterdir()) <= linked


@of_pages
def test_files_and_modules_that_a_page_names_are_there(page: str) -> None:
    text, folder = PAGES[page], (ROOT / page).parent
    for name in re.findall(r"[\w./-]*\w\.md\b", text):
        assert (folder / name).exists() or (ROOT / name).exists(), f"{page}: {name}"
    for name in re.findall(r"`((?:features|pipeline|tests|\.github|\.ci)/[\w./-]+)", text):
        assert (ROOT / name).exists(), f"{page}: {name}"
    for name in re.findall(r"`((?:features|pipeline)(?:\.\w+)+)", text):
        path = ROOT.joinpath(*name.split("."))
        assert name.startswith("features.h5") or path.is_dir() or path.with_suffix(".py").exists(), f"{page}: {name}"


@pytest.mark.parametrize("package", ["features", "pipeline"])
def test_the_maps_name_every_room(package: str) -> None:
    rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    (drawn,) = re.findall(r"## Map\n\n```text\n(.*?)```", PAGES[f"{package}/README.md"], re.DOTALL)
    assert rooms <= set(re.findall(r"(\w+)/", drawn))


def test_the_page_about_benchmarks_names_every_script() -> None:
    scripts = {path.name for path in (ROOT / "tests" / "benchmarks").glob("*.py")}
    assert scripts <= set(re.findall(r"`(\w+\.py)`", PAGES["tests/benchmarks/README.md"]))


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
    transcript = next(block for _, block in blocks("README.md") if block.startswith("$ git clone"))
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
    """The examples of each page as one script, in the order of the pages; one process starts TensorFlow for all."""
    scripts = {}
    for page in PAGES:
        examples = [block for kind, block in blocks(page) if kind == "python"]
        if ours := [block for block in examples if "from features" in block or "from pipeline" in block]:
            scripts[page] = ours
    script = checkout / "examples.py"
    script.write_text(
        f"for page, blocks in {scripts!r}.items():\n"
        "    exec(compile('\\n'.join(blocks), page, 'exec'), {'__name__': '__main__'})\n"
    )
    result = run(f"{sys.executable} {script}", checkout)
    assert result.returncode == 0, result.stderr[-2000:]
    accuracies = [float(number) for number in re.findall(r"^accuracy (\S+)", result.stdout, re.MULTILINE)]
    count = sum(map(len, scripts.values()))
    assert count >= 4
    assert len(accuracies) >= 2
    assert min(accuracies) > 0.9
