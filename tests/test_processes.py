"""Processes that decode give the same store as threads, and none of them outlives its work or its parent."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import ROOT, extract, paint_folder
from PIL import Image

from features.augmentation import PRESETS
from features.errors import ConfigurationError, ExtractionError, UnreadableImageError
from features.extraction import running
from features.pixels import limits, processes
from features.pixels.processes import SETTING, DecodeProcesses, Job, how_many
from features.pixels.views import decode_views
from features.recipe import PixelRule

PARENT = """
import sys, time
from features.pixels.processes import DecodeProcesses, Job
from features.recipe import PixelRule

job = Job(sys.argv[1], PixelRule(8, 8), None, 0, (0,))
with DecodeProcesses(2, job.size, 1) as decoders:
    for _ in decoders.decoded(job, ["cat/00.png"] * 100):
        pass
    print("ready", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = paint_folder(tmp_path / "images", {"cat": 30, "dog": 33})
    (root / "cat" / "bad.png").write_bytes(b"no image")
    (root / "dog" / "empty.jpg").write_bytes(b"")
    return root


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def children_of(number: int) -> list[psutil.Process]:
    return psutil.Process(number).children(recursive=True)


def decoding() -> list[psutil.Process]:
    """The processes that decode for this one, which earlier tests may have left others."""
    return [child for child in children_of(os.getpid()) if "features.pixels.processes" in child.cmdline()]


# -------------------------------------------------------------------------------------------------- what they give
@pytest.mark.slow
def test_the_store_is_the_same_byte_for_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for count in ("0", "2"):
        monkeypatch.setenv(SETTING, count)
        out = tmp_path / count / "features.h5"
        store = extract(source, out, views=2, augment="flip", max_unreadable=0.5, shard_rows=20, batch_size=4).store
        made.append(out.read_bytes())
        assert (len(store.images.paths), sorted(store.quarantine.reasons)) == (63, ["empty", "not-an-image"])
    assert made[0] == made[1]
    assert not decoding()


@pytest.mark.slow
def test_each_image_is_that_of_decode_views(tmp_path: Path) -> None:
    paths = [f"{number}.jpg" for number in range(45)]
    for number, path in enumerate(paths):
        levels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3)).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / path)
    (tmp_path / "7.jpg").unlink()
    (tmp_path / "8.jpg").write_bytes((tmp_path / "9.jpg").read_bytes()[:-300])
    rule, spec = PixelRule(16, 12, "bicubic", "crop"), PRESETS["crop-flip"]
    jobs = [Job(str(tmp_path), rule, spec, 3, views) for views in ((0,), (0, 1, 2), (5,), tuple(range(20)))]
    with DecodeProcesses(2, max(job.size for job in jobs), 1) as decoders:
        for job in jobs:
            seen = []
            for index, sha256, found in decoders.decoded(job, paths):
                seen.append(index)
                if isinstance(found, UnreadableImageError):
                    assert (index, found.reason) in {(7, "missing"), (8, "truncated")}
                    assert (sha256 == bytes(32)) == (index == 7)
                    continue
                data = (tmp_path / paths[index]).read_bytes()
                expected = decode_views(data, rule, spec, seed=3, sha256=sha256, views=job.views)
                np.testing.assert_array_equal(found.pixels, expected.pixels)
                assert found[1:] == expected[1:] == (30, 20 + index)
            assert seen == list(range(45))


# -------------------------------------------------------------------------------------------------- how they end
@pytest.mark.slow
def test_a_process_that_dies_is_named_with_its_images(source: Path) -> None:
    job = Job(str(source), PixelRule(8, 8), None, 0, (0,))
    with DecodeProcesses(1, job.size, 1) as decoders:
        (child,) = decoding()
        assert len(list(decoders.decoded(job, ["cat/00.png"]))) == 1
        child.send_signal(signal.SIGSEGV)
        with pytest.raises(ExtractionError, match=r"exit code -11\) at one of 2 images in .*: cat/00.png, dog/01.png"):
            list(decoders.decoded(job, ["cat/00.png", "dog/01.png"]))
    assert not decoding()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_none_outlives_its_parent(how: signal.Signals, source: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(source)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        process_group=0, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    family = children_of(parent.pid)
    assert len(family) == 2
    os.killpg(parent.pid, how)  # as Ctrl-C in a terminal does
    _, said = parent.communicate(timeout=30)
    assert said.count("Traceback") == (how == signal.SIGINT)  # the parent's; no child was interrupted
    end = time.monotonic() + 10
    while any(map(alive, family)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [child for child in family if alive(child)]


@pytest.mark.slow
def test_one_large_image_at_a_time_is_decoded_by_all_processes(tmp_path: Path) -> None:
    with open(tmp_path / "shared", "w+b") as file:
        memory = limits.DecodeMemory()
        memory.share(file.fileno())
        command = f"import fcntl; fcntl.lockf(open({file.name!r}, 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

        def others_may() -> bool:
            return subprocess.run([sys.executable, "-c", command], capture_output=True, check=False).returncode == 0

        with memory.held(limits.FREE_BYTES):
            assert not others_may()
        assert others_may()
        with memory.held(limits.FREE_BYTES - 1):  # smaller ones do not wait
            assert others_may()
        fcntl.lockf(file, fcntl.LOCK_UN)


@pytest.mark.slow
def test_an_interrupt_does_not_wait_for_an_image(source: Path) -> None:
    job = Job(str(source), PixelRule(8, 8), None, 0, (0,))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), DecodeProcesses(1, job.size, 1) as decoders:
        (child,) = decoding()
        found = decoders.decoded(job, ["cat/00.png"] * 100)
        next(found)
        child.send_signal(signal.SIGSTOP)  # as if the next image took for ever
        begun = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 30
    assert not decoding()


def test_threads_decode_if_processes_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(*_: object, **__: object) -> subprocess.Popen[bytes]:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(subprocess.Popen(["sleep", "300"]))
        return started[0]

    monkeypatch.setattr(processes, "start_module", start)
    monkeypatch.setenv(SETTING, "2")
    specs = [_Spec(Job("", PixelRule(8, 8), None, 0, (0,)))]
    work: Any = SimpleNamespace(specs=specs, images=SimpleNamespace(reader=None), options=SimpleNamespace(workers=None))
    with running._decode_processes(work) as found:
        assert found is None
    assert "2 processes that decode cannot be started (Resource temporarily unavailable)" in caplog.text
    assert started[0].poll() is not None


class _Spec(list[int]):
    def __init__(self, job: Job) -> None:
        super().__init__([0])
        self.job = job


def test_memory_is_bounded_whatever_the_size_of_images() -> None:
    jobs = [Job("", PixelRule(side, side), None, 0, (0,)) for side in (8, 224, 1024, 4096)]
    assert [job.chunk for job in jobs] == [16, 16, 5, 1]
    assert Job("", PixelRule(8, 8), None, 0, tuple(range(40))).chunk == 1


# -------------------------------------------------------------------------------------------------- when they are used
def test_they_are_used_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    monkeypatch.setattr(processes, "processors", lambda: 4)
    assert how_many(10**6, None) == how_many(10**6, 8) == 0
    monkeypatch.setattr(processes, "processors", lambda: 64)
    assert [how_many(images, None) for images in (0, 999, 1000, 3000, 10**6)] == [0, 0, 2, 6, 16]
    assert [how_many(10**6, workers) for workers in (1, 2, 5)] == [0, 2, 5]
    monkeypatch.setenv(SETTING, "3")
    assert how_many(10, None) == 3
    monkeypatch.setenv(SETTING, "0")
    assert how_many(10**6, None) == 0
    monkeypatch.setenv(SETTING, "two")
    with pytest.raises(ConfigurationError, match="BOTTLENECK_DECODE_PROCESSES: received 'two', expected a number"):
        how_many(10, None)
