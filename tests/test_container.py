"""The container's file, where no Docker runs: its instructions are checked, and its commands are run as a script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

FILE = ROOT / ".docker" / "Dockerfile"
LINTER = shutil.which("hadolint", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Keyword and the rest of every instruction, continued lines joined, comments left out."""
    lines = [line for line in FILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined]


def of_kind(keyword: str) -> list[str]:
    return [rest for kind, rest in instructions() if kind == keyword]


def test_both_stages_have_the_base_that_is_given() -> None:
    assert [rest.split()[0] for rest in of_kind("FROM")] == ["${BASE}", "${BASE}"]
    defaults = dict(rest.split("=") for rest in of_kind("ARG"))
    tag = defaults["BASE"].partition(":")[2]
    assert re.match(r"3\.1[123]-", tag), "a version of Python that the project takes, never `latest`"
    assert set(defaults["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()


def test_it_copies_what_is_there_and_starts_the_program_as_a_user() -> None:
    for rest in of_kind("COPY"):
        if not rest.startswith("--from"):
            *sources, _ = rest.split()
            assert all((ROOT / name).exists() for name in sources), rest
    kinds = [kind for kind, _ in instructions()]
    assert kinds.index("USER") < kinds.index("ENTRYPOINT")
    assert "root" not in of_kind("USER")
    assert of_kind("ENTRYPOINT") == [f'["{next(iter(PROJECT["scripts"]))}"]']
    for rest in of_kind("RUN"):  # lists of packages would stay in the layer
        assert "apt-get update" not in rest or "rm -rf /var/lib/apt/lists/*" in rest


@pytest.mark.skipif(LINTER is None, reason="hadolint is not here; make setup installs it")
def test_the_linter_finds_nothing() -> None:
    done = subprocess.run([str(LINTER), FILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_command_is_one_that_a_shell_understands() -> None:
    for command in of_kind("RUN"):
        done = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_installation_runs_as_a_script(tmp_path: Path) -> None:
    """The command that installs, with a pip that asks no index and takes this project alone."""
    (install,) = (command for command in of_kind("RUN") if "pip install" in command)
    for name in (name for rest in of_kind("COPY") if not rest.startswith("--from") for name in rest.split()[:-1]):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / "src" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            (tmp_path / "src").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "src")
    packages = tmp_path / "packages"  # what the program needs, without what the environment knows of the program itself
    packages.mkdir()
    for path in (path for folder in sys.path if folder.endswith("-packages") for path in Path(folder).iterdir()):
        if "bottleneck" not in path.name and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    prefix = tmp_path / "opt"
    given = {
        **{"PREFIX": str(prefix), "BACKEND": "numpy", "EXTRAS": "parquet", "PYTHONPATH": str(packages)},
        **{"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"},  # 0: the option is given
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
    }
    done = subprocess.run(
        ["sh", "-c", install],
        cwd=tmp_path / "src",
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"bottleneck-features {PROJECT['version']}"
    assert (prefix / "bin" / "bottleneck").exists()
