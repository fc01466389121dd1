"""What an installer and a shell see: declared dependencies, the version, completion."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, run_without

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]
HEAVY = {"numpy", "keras", "tensorflow", "sklearn", "h5py", "PIL"}
# Modules whose distribution has another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "ai_edge_litert": "ai-edge-litert",
    "keras_hub": "keras-hub",
    "axe_playwright_python": "axe-playwright-python",
    "mlflow": "mlflow-skinny",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# What results of functions use where a user has them, and say how to get where not.
GUESTS = {"IPython", "pandas"}
# What the GPU kit carries along; a module that a test writes.
UNDECLARED = {"torchvision", "simplejpeg", "cv2", "pynvml", "counting_extractor"}


def declared(requirements: list[str]) -> set[str]:
    """Names of the distributions."""
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


@functools.cache
def third_party(folder: str) -> set[tuple[str, str]]:
    """(file, distribution) of every import in a folder of the checkout, late ones too."""
    files = sorted((ROOT / folder).rglob("*.py"))
    known = {
        *sys.stdlib_module_names,
        "features",
        "pipeline",
        "bottleneck_features",
        *(path.stem for path in files),
        *UNDECLARED,
    }
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found |= {
                (str(path), DISTRIBUTIONS.get(module, module))
                for module in {name.split(".")[0] for name in names} - known
            }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["features", "pipeline"])
def test_what_the_packages_import_is_declared(folder: str) -> None:
    names = declared([*REQUIRED, *(item for name, extra in EXTRAS.items() if name != "dev" for item in extra)])
    found = third_party(folder)
    assert {"numpy", "keras", "scikit-learn", "pillow"} <= {name for _, name in found}
    assert not [(path, name) for path, name in found if name not in names | GUESTS]


@pytest.mark.slow
def test_what_the_tests_import_is_declared() -> None:
    names = declared([*REQUIRED, *(item for extra in EXTRAS.values() for item in extra)])
    assert not [(path, name) for path, name in third_party("tests") if name not in names]


@pytest.mark.slow
def test_every_requirement_is_imported() -> None:
    used = {name for folder in ("features", "pipeline") for _, name in third_party(folder)}
    assert declared(REQUIRED) <= used


def test_advice_to_install_an_extra_is_made_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No index has the package yet: a checkout is named as the folder it is, and a copy from a wheel by its name."""
    from features import machine

    monkeypatch.chdir(ROOT)
    assert machine.how_to_install("int8", "review") == "pip install -e '.[int8,review]'"
    monkeypatch.chdir(tmp_path)
    assert machine.how_to_install("int8") == f"pip install -e {shlex.quote(f'{ROOT}[int8]')}"
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site-packages" / "features" / "machine.py"))
    assert machine.how_to_install("int8") == "pip install 'bottleneck-features[int8]'"
    for path in [*(ROOT / "features").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert path.name == "machine.py" or not re.search(r"bottleneck-features\[|pip install -e", text), path
        for named in re.findall(r"how_to_install\(((?:[\"'][\w-]+[\"'](?:, )?)+)\)", text):
            assert set(re.findall(r"[\w-]+", named)) <= EXTRAS.keys(), path


def test_every_requirement_has_a_floor() -> None:
    for requirement in [*REQUIRED, *(item for extra in EXTRAS.values() for item in extra)]:
        assert ">=" in requirement or requirement.startswith("bottleneck-features["), requirement


@pytest.mark.slow
def test_the_version_is_that_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    import features
    import pipeline
    from features.machine import installed_version

    assert features.__version__ == pipeline.__version__ == importlib.metadata.version("bottleneck-features")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    installed_version.cache_clear()
    try:
        assert features.__version__ == pipeline.__version__ == "0+unknown"
    finally:
        installed_version.cache_clear()


@pytest.mark.slow
def test_the_command_line_says_the_version() -> None:
    result = run_without(HEAVY, "--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"bottleneck-features {importlib.metadata.version('bottleneck-features')}\n"


def test_the_packages_are_marked_as_typed() -> None:
    assert (ROOT / "features" / "py.typed").exists()
    assert (ROOT / "pipeline" / "py.typed").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "expected"), [("bottleneck ex", "extract\nexport\n"), ("bottleneck extract --backb", "--backbone\n")]
)
def test_the_shell_completes_commands_and_options(typed: str, expected: str) -> None:
    result = run_in_bash(typed, _BOTTLENECK_COMPLETE="complete_bash")
    assert (result.returncode, result.stdout, result.stderr) == (0, expected, "")


def run_in_bash(typed: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as bash calls it to complete what was typed; exit code 9 if it imports anything heavy."""
    code = (
        "import atexit, os, sys\nfrom pipeline.cli import main\n"
        f"atexit.register(lambda: {HEAVY!r} & set(sys.modules) and os._exit(9))\nmain()"
    )
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **words, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_completion_is_installed_for_the_command(tmp_path: Path) -> None:
    for words in (["--install-completion"], ["--show-completion"]):
        result = subprocess.run(
            ["bash", "-c", '"$0" -m pipeline "$@"; exit $?', sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert "_BOTTLENECK_COMPLETE=complete_bash" in result.stdout
    assert (tmp_path / ".bash_completions" / "bottleneck.sh").read_text() == result.stdout.rstrip("\n")
    assert "bottleneck.sh" in (tmp_path / ".bashrc").read_text()
