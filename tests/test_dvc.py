"""The stages of DVC on the page, run by DVC itself, which is installed into an environment of its own."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, STRESS, call_pipeline, paint, paint_folder

SMALL = "--backbone mobilenetv2-0.35 --weights random --image-size 32"


def stages() -> dict[str, dict[str, object]]:
    """The stages that the page shows."""
    text = (ROOT / "pipeline" / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(stages:\n.*?)```", text, re.DOTALL)
    found: dict[str, dict[str, object]] = yaml.safe_load(block)["stages"]
    return found


def test_the_stages_name_what_their_commands_read_and_write() -> None:
    found = stages()
    assert list(found) == ["extract", "train"]
    for stage in found.values():
        words = str(stage["cmd"]).split()
        assert words[0] == "bottleneck"
        for name in [*stage["deps"], *(name for out in stage["outs"] for name in out)]:  # type: ignore[attr-defined, misc]
            assert name in words
        assert all(options == {"persist": True} for out in stage["outs"] for options in out.values())  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_store_that_is_made_again_is_the_same_file(tmp_path: Path) -> None:
    """Which DVC compares: were the bytes others, every later stage would run again."""
    photos = paint_folder(tmp_path / "photos", {"cat": 6, "dog": 6})
    seen = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        done = call_pipeline("extract", photos, "--out", tmp_path / name / "features.h5", *SMALL.split())
        assert done.returncode == 0, done.stderr
        seen.add(hashlib.sha256((tmp_path / name / "features.h5").read_bytes()).hexdigest())
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.skipif(not STRESS, reason="STRESS is not set: DVC itself is in `make stress`")
def test_dvc_skips_what_has_not_changed_and_adds_what_is_new(tmp_path: Path) -> None:
    home, project = tmp_path / "home", tmp_path / "project"
    venv.create(home, with_pip=True)
    subprocess.run([home / "bin" / "pip", "install", "--quiet", "dvc>=3"], check=True)
    program = home / "bin" / "bottleneck"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m pipeline "$@"\n')
    program.chmod(0o755)
    photos = paint_folder(project / "photos", {"cat": 30, "dog": 30})
    document = stages()
    document["extract"]["cmd"] = f"{document['extract']['cmd']} {SMALL}"
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": document}))
    environment = {**os.environ, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}

    def dvc(*words: str) -> str:
        done = subprocess.run(
            [home / "bin" / "dvc", *words], cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    dvc("init", "--no-scm")
    assert re.findall(r"Running stage '(\w+)'", dvc("repro")) == ["extract", "train"]
    before = (project / "features.h5").read_bytes()
    assert re.findall(r"Running stage '(\w+)'", dvc("repro")) == []
    assert re.findall(r"Running stage '(\w+)'", dvc("repro", "--force", "extract")) == ["extract"]
    assert (project / "features.h5").read_bytes() == before
    assert re.findall(r"Running stage '(\w+)'", dvc("repro")) == []
    paint(photos / "dog" / "new.png", (9, 9, 9))
    said = dvc("repro")
    assert re.findall(r"Running stage '(\w+)'", said) == ["extract", "train"]
    assert len(list((project / "runs").iterdir())) == 2
