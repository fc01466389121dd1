"""What `make dist` builds, installed into an environment of its own, works in an empty folder far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, STRESS
from notebooks import check_outputs, execute

pytestmark = pytest.mark.slow
PACKAGES = ("features", "pipeline")


def run(*words: object, cwd: Path, **variables: str) -> str:
    """What a command prints; it sees neither the checkout nor what the tests have set."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    result = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copied(place: Path) -> Path:
    """The sources, in a folder of their own, as the build leaves files beside them."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return place


def build(place: Path, **variables: str) -> Path:
    """The wheel, made without the network: setuptools is part of the dev extra."""
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", "dist", ".", cwd=place, **variables)
    (built,) = (place / "dist").glob("*.whl")
    return built


def git(place: Path, *words: str) -> None:
    run("git", "-c", "user.name=someone", "-c", "user.email=someone@example.org", *words, cwd=place)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One commit of the sources, which `make dist` has built, and rubbish beside it that git ignores."""
    place = copied(tmp_path_factory.mktemp("build"))
    for name in (".ci/dist", ".github/CHANGELOG.md", ".gitignore", "Makefile"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    git(place, "init", "--quiet")
    git(place, "add", ".")
    git(place, "commit", "--quiet", "-m", "All that is needed")
    (place / "build" / "lib" / "features").mkdir(parents=True)
    (place / "build" / "lib" / "features" / "rubbish.py").touch()
    python = place / ".venv" / "bin" / "python"  # as `make setup` leaves it
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (place / ".venv" / ".installed").touch()
    run("make", "dist", cwd=place)
    return place


@pytest.fixture(scope="module")
def wheel(repository: Path) -> Path:
    """The wheel, which was built from the sdist."""
    (built,) = (repository / "dist").glob("*.whl")
    return built


def test_it_is_built_from_commits_only_and_a_tag_must_say_the_version(repository: Path) -> None:
    def refusal() -> str:
        result = subprocess.run(
            ["bash", ".ci/dist"],
            cwd=repository,
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        return result.stderr

    before = sorted(path.name for path in (repository / "dist").iterdir())
    (repository / "forgotten.py").touch()
    assert "not committed" in (said := refusal())
    assert "forgotten.py" in said
    (repository / "forgotten.py").unlink()
    version = before[0].split("-")[1]
    for tag in ("v99.0", f"v{version}"):  # another version; and this one, of which the changelog does not tell yet
        git(repository, "tag", tag)
        assert f"the tag is {tag} and the version in pyproject.toml {version}" in refusal()
        git(repository, "tag", "-d", tag)
    assert sorted(path.name for path in (repository / "dist").iterdir()) == before


def test_the_sdist_holds_the_sources_and_nothing_else(repository: Path) -> None:
    (built,) = (repository / "dist").glob("*.tar.gz")
    with tarfile.open(built) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    files = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in sources(name)}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in found if "egg-info" not in name} == files | made | {
        "LICENSE",
        "README.md",
        "pyproject.toml",
    }


@pytest.fixture(scope="module")
def bottleneck(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in a fresh environment, which borrows everything but this project from the one that runs the tests."""
    place = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(place)
    (packages,) = place.glob("lib/python*/site-packages")
    # Folders named in a .pth file come last on the path, and their own .pth files, such as the checkout's, are not read.
    (packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    python = place / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=place,
    )
    return place / "bin" / "bottleneck"


def sources(package: str) -> list[Path]:
    return [
        path
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    ]


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix().removeprefix("pipeline/names/") for name in PACKAGES for path in sources(name)
    }
    assert {"features/py.typed", "features/FORMAT.md", "pipeline/templates/report.html.j2"} <= files
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    # Where there is a compiler, the extension is there too; without one the wheel is whole without it.
    compiled = {"features/pixels/_resize.abi3.so"} if shutil.which("cc") or shutil.which("gcc") else set()
    assert names == files | compiled


def test_without_a_compiler_it_is_installed_without_the_extension(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(copied(tmp_path), CC="no-such-compiler")) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert "features/pixels/resizing.py" in archive.namelist()


def test_it_works_in_an_empty_folder(bottleneck: Path, tmp_path: Path) -> None:
    code = (
        "import features, pipeline, bottleneck_features as bf; print(bf.__file__, bf.train_head.__code__.co_filename)\n"
    )
    code += "print(features.__file__, pipeline.__file__, bf.__version__)"
    *files, version = run(bottleneck.parent / "python", "-c", code, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(bottleneck.parent.parent) for file in files)
    assert run(bottleneck, "--version", cwd=tmp_path) == f"bottleneck-features {version}\n"
    assert "mobilenetv2-cats-dogs" in run(bottleneck, "recipe", cwd=tmp_path)
    small = ("--backbone", "mobilenetv2-0.35", "--weights", "random", "--image-size", "32")
    run(bottleneck, "extract", "sample:digits", "--out", "f.h5", *small, cwd=tmp_path)
    run(bottleneck, "train-head", "f.h5", "--head", "knn", cwd=tmp_path)
    run(bottleneck, "report", "runs", "--out", "report.html", cwd=tmp_path)
    assert "</html>" in (tmp_path / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"f.h5", "runs", "report.html"}


@pytest.mark.stress
@pytest.mark.skipif(
    not STRESS, reason="STRESS is not set: `make stress` installs the wheel with all it needs from the index"
)
def test_the_notebook_runs_on_the_wheel_alone(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "BOTTLENECK_ASSETS"):
        monkeypatch.delenv(name, raising=False)
    home, folder = tmp_path / "home", tmp_path / "folder"
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, "nbclient", "ipykernel", cwd=tmp_path)
    for place in (home, folder):
        place.mkdir()
    check_outputs(execute(python, folder, HOME=str(home), BOTTLENECK_CACHE=str(home / "cache")))
    assert {path.name for path in folder.iterdir() if path.suffix != ".lock"} == {
        "features.h5",
        "first-hour.ipynb",
        "report.html",
        "runs",
    }
