"""An extraction process that can be watched, slowed and killed, and what compares the stores it leaves.

Run as a script it is ``python -m pipeline`` with three additions, so that a test knows what happens inside and when:

    faults.py LOG [--numpy WIDTH] [--delay SECONDS] [--stall assembly|clean-up] -- extract IMAGES --out FILE ...

Every batch appends its number of images to LOG before it is inferred, a stalled place its name, and the end the
peak memory of the process. ``--numpy`` puts a stand-in of numpy, with WIDTH features, where the backbone would be.
Nothing else is changed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STALL_SECONDS = 0.15  # before each step of a stalled place
DEADLINE = 300.0


class NumpyNetwork:
    """Means of the colour channels, repeated with factors: cheap, exact, and different for every image."""

    backbone_argument, weights_argument = "numpy", "none"
    license: str | None = None

    def __init__(self, width: int, size: int = 8) -> None:
        from features.recipe import PixelRule, Recipe

        self.width, self.row_bytes = width, 4 * width
        pixels = PixelRule(size, size)
        self.recipes = (
            Recipe(
                backbone="numpy",
                weights="0" * 64,
                layer="last",
                pooling="avg",
                pixels=pixels,
                preprocessing="none",
            ),
        )

    def engine(self, recipes: Sequence[Any], *, batch_size: int, device: str = "auto") -> Any:
        factors = np.arange(1, self.width + 1, dtype=np.float32)

        def infer(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            means = batch.reshape(len(batch), -1, 3).astype(np.float32).mean(axis=1) @ np.float32([1, 256, 65536])
            return {"last.avg": means[:, None] / factors}

        infer.name, infer.device, infer.concurrent = "function", "cpu", False
        return infer


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("log", type=Path)
    parser.add_argument("--numpy", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--stall", choices=("assembly", "clean-up"))
    cut = arguments.index("--")
    options = parser.parse_args(arguments[:cut])
    descriptor = os.open(options.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def note(text: object) -> None:
        os.write(descriptor, f"{text}\n".encode())

    _watch_engines(options, note)
    if options.stall == "assembly":
        _stall_assembly(note)
    elif options.stall == "clean-up":
        _stall_clean_up(note)
    from features.machine import peak_memory
    from pipeline.cli import main as pipeline

    code = pipeline(arguments[cut + 1 :])
    note(f"peak {peak_memory() // 1024}")  # kilobytes
    os.close(descriptor)
    return code


def _watch_engines(options: argparse.Namespace, note: Any) -> None:
    from features.networks import network as networks

    inner = networks.Network.engine

    def engine(self: Any, recipes: Sequence[Any], **settings: Any) -> Any:
        infer = inner(self, recipes, **settings)

        def watched(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            note(len(batch))
            time.sleep(options.delay)
            return infer(batch)

        watched.name, watched.device, watched.concurrent = "function", "cpu", False
        return watched

    if options.numpy is None:
        networks.Network.engine = engine  # type: ignore[method-assign]
    else:
        inner = NumpyNetwork.engine  # type: ignore[assignment]
        NumpyNetwork.engine = engine  # type: ignore[method-assign]
        networks.resolve_network = lambda *_, **__: NumpyNetwork(options.numpy)  # type: ignore


def _stall_assembly(note: Any) -> None:
    from features.extraction import assembly

    class Slow(assembly.StoreWriter):
        def append(self, name: str, block: np.ndarray) -> None:
            for half in np.array_split(block, 2):
                note("assembly")
                time.sleep(STALL_SECONDS)
                super().append(name, half)

        def finish(self, **tables: Any) -> None:
            for step in (lambda: None, lambda: super(Slow, self).finish(**tables)):
                step()
                note("assembly")
                time.sleep(STALL_SECONDS)

    assembly.StoreWriter = Slow  # type: ignore[misc]


def _stall_clean_up(note: Any) -> None:
    inner = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.parent.name.endswith(".parts") and not self.name.endswith(".tmp"):
            note("clean-up")
            time.sleep(STALL_SECONDS)
        inner(self, missing_ok)

    Path.unlink = unlink  # type: ignore[method-assign]


def start(
    log: Path, *command: object, options: Sequence[object] = (), quiet: bool = False, session: bool = False
) -> subprocess.Popen[str]:
    """The process; its output is a pipe, or nowhere. With ``session`` it leads a group of its own, as in a terminal."""
    arguments = [sys.executable, __file__, log, *options, "--", *command]
    return subprocess.Popen(
        list(map(str, arguments)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else subprocess.PIPE,
        text=True,
        start_new_session=session,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error."""
    _, errors = process.communicate(timeout=DEADLINE)
    return process.returncode, errors


def run(log: Path, *command: object, options: Sequence[object] = ()) -> None:
    """To the end, without a fault; with the stand-in of numpy it needs no process of its own."""
    if "--numpy" not in options:
        code, errors = finish(start(log, *command, options=options))
        assert code == 0, errors
        return
    from features.networks import network as networks

    kept = networks.resolve_network, NumpyNetwork.engine
    try:
        code = main([str(log), *map(str, options), "--", *map(str, command)])
    finally:
        networks.resolve_network, NumpyNetwork.engine = kept  # type: ignore[method-assign]
    assert code == 0


def inferred(log: Path) -> int:
    """Images that went into the network, over all runs that wrote this log."""
    return sum(int(line) for line in _lines(log) if line.isdecimal())


def _lines(log: Path) -> list[str]:
    return log.read_text().split("\n")[:-1] if log.exists() else []


def wait_for_images(process: subprocess.Popen[str], log: Path, count: int) -> bool:
    """Until so many images more were inferred; False if the process ended first."""
    goal = inferred(log) + count
    return _wait(process, lambda: inferred(log) >= goal)


def wait_for_place(process: subprocess.Popen[str], log: Path, place: str, steps: int = 1) -> bool:
    """Until a stalled place was reached so many times more; False if the process ended first."""
    goal = _lines(log).count(place) + steps
    return _wait(process, lambda: _lines(log).count(place) >= goal)


def _wait(process: subprocess.Popen[str], reached: Any) -> bool:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if reached():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    process.kill()
    raise TimeoutError(f"no progress in {DEADLINE:.0f} s")


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, and wait until it is gone."""
    process.send_signal(signal.SIGKILL)
    process.communicate()


def kill_often(
    kills: int, images: int, log: Path, command: Sequence[object], options: Sequence[object], seed: int
) -> dict[str, int]:
    """Start an extraction again and again and kill it; the last two kills of five hit assembly and clean-up.

    Returns
    -------
    dict of str to int
        How many kills hit which stage: ``start``, ``extract``, ``assembly``, ``clean-up``.
    """
    generator = random.Random(seed)
    late = max(1, kills // 5)
    hits = dict.fromkeys(("start", "extract", "assembly", "clean-up"), 0)
    early = max(1, kills // 10)
    for number in range(kills - 2 * late):
        process = start(log, *command, options=options)
        if number < early:
            time.sleep(generator.uniform(0.0, 1.0))
            place = "start"
        else:
            # So many that the images are not used up before the kills are.
            if not wait_for_images(process, log, generator.randint(1, max(1, images // kills))):
                raise AssertionError(f"ended before it was killed: {finish(process)}")
            time.sleep(generator.uniform(0.0, 0.1))
            place = "extract"
        kill(process)
        hits[place] += 1
    for place in ("assembly", "clean-up"):
        for _ in range(late):
            process = start(log, *command, options=[*options, "--stall", place])
            if not wait_for_place(process, log, place, generator.randint(1, 4)):
                raise AssertionError(f"never came to {place}: {finish(process)}")
            time.sleep(generator.uniform(0.0, STALL_SECONDS))
            kill(process)
            hits[place] += 1
    return hits


def contents(path: Path) -> dict[str, Any]:
    """Every data set and attribute of a file, but what is said about its making."""
    import h5py

    found: dict[str, Any] = {}
    with h5py.File(path, "r") as file:

        def visit(name: str, item: Any) -> None:
            for key, value in item.attrs.items():
                if key not in ("provenance", "attributes_sha256"):
                    found[f"{name}@{key}"] = value
            if isinstance(item, h5py.Dataset):
                found[name] = (item.dtype.str, item[()].tobytes(), item.shape)

        visit("/", file)
        file.visititems(visit)
    return found


def differences(first: Path, second: Path) -> list[str]:
    """Names of the data sets and attributes in which two files differ."""
    one, two = contents(first), contents(second)
    return sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
