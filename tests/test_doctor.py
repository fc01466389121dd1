"""``doctor`` on a machine that works, and with one breakage after another: each is named with its fix."""

from __future__ import annotations

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

from features.networks import weights
from pipeline.stages import doctor

Breakage = Callable[[pytest.MonkeyPatch, Path], None]
Usage = namedtuple("Usage", "total used free")


def environment(name: str, value: str) -> Breakage:
    return lambda patch, _: patch.setenv(name, value)


def old_python(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(sys, "version_info", (3, 9, 1))


def package_is_missing(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["numpy>=2", "nonesuch>=1", "extra-only; extra == 'x'"]
    )


def backend_is_missing(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(doctor, "keras_backend", lambda: "jax")
    patch.setattr(doctor.importlib.util, "find_spec", lambda _: None)


def disk_is_full(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 1000))


def cache_is_a_file(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "cache").write_text("")
    patch.setenv("BOTTLENECK_CACHE", str(folder / "cache"))


def cache_of_everybody(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "cache").mkdir()
    (folder / "cache").chmod(0o777)
    patch.setenv("BOTTLENECK_CACHE", str(folder / "cache"))


def driver_is_missing(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "nvidia0").touch()
    patch.setattr(doctor, "CARDS", str(folder / "nvidia0"))
    patch.setattr(doctor, "DRIVER", folder / "none")


def gpu_is_hidden(patch: pytest.MonkeyPatch, folder: Path) -> None:
    driver_is_missing(patch, folder)
    patch.setattr(doctor, "DRIVER", folder / "nvidia0")
    patch.setenv("CUDA_VISIBLE_DEVICES", "")


def weights_are_damaged(patch: pytest.MonkeyPatch, folder: Path) -> None:
    from features.networks.backbones import BACKBONES

    official = BACKBONES["vgg16"].official
    assert official is not None
    (folder / official.file).write_bytes(b"half")
    patch.setattr(weights, "_keras_models", lambda: folder)


BREAKAGES: list[tuple[Breakage, str, str, str]] = [
    (old_python, "Python", "3.", "make an environment with Python 3.11 to 3.13"),
    (package_is_missing, "packages", "missing: nonesuch", "python -m pip install nonesuch"),
    (backend_is_missing, "backend", "jax is not installed", "pip install jax, or unset KERAS_BACKEND"),
    (environment("KERAS_BACKEND", "theano"), "backend", "KERAS_BACKEND is 'theano'", "set KERAS_BACKEND to one of tensorflow"),
    (driver_is_missing, "GPU", "and no driver", "install NVIDIA's driver"),
    (gpu_is_hidden, "GPU", "hidden: CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES"),
    (environment("OMP_NUM_THREADS", "4096"), "threads", "OMP_NUM_THREADS is '4096'", "unset OMP_NUM_THREADS, or set it to"),
    (environment("BOTTLENECK_DECODE_PROCESSES", "many"), "settings", "is 'many'", "set BOTTLENECK_DECODE_PROCESSES to a number"),
    (disk_is_full, "disk", "0.0 GB free", "free some space"),
    (cache_is_a_file, "cache", "cache is a file", "move it away, or set BOTTLENECK_CACHE"),
    (cache_of_everybody, "cache", "is not used, because", "set BOTTLENECK_CACHE to a folder that only you can write"),
    (weights_are_damaged, "weights of vgg16", "It is not used", "remove that file"),
]  # fmt: skip


@pytest.mark.parametrize(("breaks", "what", "found", "fix"), BREAKAGES)
def test_each_breakage_is_named_with_its_fix(
    breaks: Breakage, what: str, found: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = {row["what"] for row in doctor.examine()["checks"] if row["state"] == doctor.FAIL}
    if "keras" in sys.modules and what == "backend" and "theano" in found:
        monkeypatch.setattr(doctor, "keras_backend", lambda: "theano")  # Keras has been loaded with another one
    breaks(monkeypatch, tmp_path)
    document = doctor.examine()
    failed = [row for row in document["checks"] if row["state"] == doctor.FAIL and row["what"] not in sound]
    assert [row["what"] for row in failed] == [what]
    assert found in failed[0]["found"]
    assert fix in failed[0]["fix"]
    assert not document["ok"]
    assert f"{what}: {failed[0]['fix']}" in doctor.summary(document)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("memory://nowhere/x", "does not exist: there is no such bucket or folder"),
        ("ftp://host/x", "expected an address of s3://"),
        ("http://127.0.0.1:9/x", "expected an address of https://"),
    ],
)
def test_an_address_that_cannot_be_reached_is_named(url: str, found: str) -> None:
    row = next(row for row in doctor.examine(url)["checks"] if row["what"] == "remote")
    assert row["state"] == doctor.FAIL
    assert found in row["found"]
    assert row["fix"]


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


def test_this_machine_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    for name in (*doctor.THREADS, *doctor.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "CARDS", str(tmp_path / "none"))
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
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
    assert not (tmp_path / "cache").exists()  # nothing was made


def test_an_address_inside_is_reached_if_its_host_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOTTLENECK_ALLOW_HOSTS", raising=False)
    with objects() as server:
        server.objects = {"/a.png": b"12345"}
        asked = ("doctor", "--json", "--url", f"{server.address}/a.png")
        found = [call_pipeline(*asked, *more).stdout for more in ((), ("--allow-host", "127.0.0.1"))]
    rows = [next(row for row in json.loads(text)["checks"] if row["what"] == "remote") for text in found]
    assert [row["state"] for row in rows] == [doctor.FAIL, doctor.OK]
    assert ": 5 bytes, " in rows[1]["found"]
    assert "BOTTLENECK_ALLOW_HOSTS" not in os.environ


def test_every_command_that_reads_images_takes_hosts() -> None:
    from pipeline.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    taking = {name for name, command in commands.items() if any(p.name == "allow_host" for p in command.params)}
    assert taking == {
        "audit", "compare", "doctor", "evaluate", "export", "extract", "finetune", "predict", "preview", "recipe", "report",
        "review", "similar",
    }  # fmt: skip
