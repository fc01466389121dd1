"""One bit of a store flipped, anywhere: it is found, or it changes nothing. None is silent, none hangs, none crashes.

The checks run in processes of their own, many flips in each, under a watch that ends one that takes too long.
``FLIPS=20000`` sets the number, ``FLIP_SEED`` where they fall.
"""

from __future__ import annotations

import hashlib
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import rounds

ROOT = Path(__file__).resolve().parent.parent
SECONDS_PER_FLIP = 20.0
STANDSTILL = -1  # no bit of a file: the process stands still at it
ROWS = 40


def write(path: Path) -> Path:
    from helpers import recipe

    from features.files import atomic_file
    from features.store.schema import FeatureSpec, ImageTable, Quarantine
    from features.store.writer import StoreWriter

    generator = np.random.default_rng(0)
    specs = {
        "last.avg": FeatureSpec(recipe(), 2, (30,)),
        "spatial": FeatureSpec(recipe("spatial", "none", dtype="float16"), 2, (2, 3, 4)),
    }
    table = ImageTable(
        paths=tuple(f"class/ü{index}.png" for index in range(ROWS)),
        sha256=generator.integers(0, 256, (ROWS, 32)).astype(np.uint8),
        labels=generator.integers(-1, 2, ROWS).astype(np.int32),
        splits=generator.integers(0, 4, ROWS).astype(np.int8),
        groups=tuple(f"patient {index % 7}" for index in range(ROWS)),
        widths=np.full(ROWS, 30, np.int32),
        heights=np.full(ROWS, 20, np.int32),
        sizes=np.arange(ROWS, dtype=np.int64),
        mtimes_ns=np.arange(ROWS, dtype=np.int64) + (1 << 60),
    )
    quarantine = Quarantine(("bad.png",), np.zeros((1, 32), np.uint8), ("truncated",), np.array([3]), np.array([4]))
    with atomic_file(path) as temporary:
        writer = StoreWriter(temporary, kind="store", rows=ROWS, features=specs)
        for name, spec in specs.items():
            writer.append(name, generator.normal(size=(ROWS, spec.views, *spec.shape)).astype(spec.recipe.dtype))
        writer.finish(
            images=table,
            quarantine=quarantine,
            classes=("cat", "dög"),
            source="here",
            split_rule="hash:0.8,0.1,0.1@0",
            provenance={"engine": "numpy", "batch_size": 32},
        )
    return path


def everything(path: Path) -> str:
    """Hash of all that a store can be asked for."""
    from features.store.reader import FeatureStore

    store = FeatureStore.open(path)
    digest = hashlib.sha256()
    for table in (store.images, store.quarantine):
        for name, value in sorted(vars(table).items()):
            digest.update(f"{name}|".encode())
            digest.update(
                value.tobytes() + str(value.dtype).encode() if hasattr(value, "tobytes") else repr(value).encode()
            )
    for name in store.names:
        features, labels = store.load(name=name, views="all")
        digest.update(f"{name}|{features.dtype}|{features.shape}|{store.recipes[name].canonical}".encode())
        digest.update(features.tobytes() + labels.tobytes())
    digest.update(repr((store.classes, store.source, store.split_rule, store.provenance, len(store))).encode())
    return digest.hexdigest()


def outcome(path: Path, expected: str) -> str:
    """``equal`` or ``found``, or in words what must not be."""
    from features.errors import StoreError
    from features.store.reader import FeatureStore

    said = []
    for check in (lambda: FeatureStore.open(path).verify() and expected, lambda: everything(path)):
        try:
            said.append("equal" if check() == expected else "ANOTHER VALUE")
        except StoreError as error:
            said.append("found" if str(path) in str(error) else f"ERROR WITHOUT THE FILE: {error}")
        except Exception as error:  # noqa: BLE001  any other is what the test looks for
            said.append(f"ODD {type(error).__name__}: {error}")
    return said[0] if said[0] == said[1] else f"VERIFY {said[0]}, LOAD {said[1]}"


def main(path: Path, copy: Path, bits: list[str]) -> None:
    data, expected = bytearray(path.read_bytes()), everything(path)
    print("ready", flush=True)
    for bit in map(int, bits):
        if bit == STANDSTILL:
            time.sleep(600)
        data[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(data)
        print(bit, outcome(copy, expected), flush=True)
        data[bit // 8] ^= 1 << bit % 8


def read_lines(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")  # the end


def check_flips(path: Path, folder: Path, bits: list[int], limit: float = SECONDS_PER_FLIP) -> dict[int, str]:
    """Outcome of each flip. A process that crashes or stands still is one more outcome; the next goes on behind it."""
    outcomes: dict[int, str] = {}
    rest = list(bits)
    while rest:
        copy = folder / f"flipped{rest[0]}.h5"
        command = [sys.executable, __file__, path, copy, *rest[:500]]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=read_lines, args=(process, lines))
        reader.start()
        batch, trouble = rest[:500], ""
        if lines.get(timeout=60) != "ready\n":
            raise RuntimeError("the checking process did not start")
        for bit in batch:
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                trouble = f"HUNG for {limit:.0f} s"
                process.kill()
            if trouble or not line:
                outcomes[bit] = trouble or f"CRASHED with {process.wait()}"
                rest = rest[rest.index(bit) + 1 :]
                break
            outcomes[bit] = line.split(" ", 1)[1].strip()
        else:
            rest = rest[500:]
        process.wait(timeout=60)
        reader.join()
        copy.unlink(missing_ok=True)
    return outcomes


def random_bits(path: Path, count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(8 * path.stat().st_size), count)


def judge(outcomes: dict[int, str]) -> tuple[Counter[str], dict[int, str]]:
    """How many of each, and those that must not be."""
    wrong: dict[int, str] = {bit: said for bit, said in outcomes.items() if said not in ("equal", "found")}
    return Counter("wrong" if bit in wrong else said for bit, said in outcomes.items()), wrong


@pytest.mark.slow
@pytest.mark.stress
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    count, seed = int(os.environ.get("FLIPS", rounds(2000))), int(os.environ.get("FLIP_SEED", "1"))
    path = write(tmp_path / "features.h5")
    outcomes = check_flips(path, tmp_path, random_bits(path, count, seed))
    counts, wrong = judge(outcomes)
    print(f"{count} flips of {path.stat().st_size} bytes: {dict(counts)}")
    assert not wrong
    assert len(outcomes) == count
    assert counts["found"] > count / 2  # the checks are awake


@pytest.mark.slow
def test_the_watch_sees_a_process_that_hangs_or_dies(tmp_path: Path) -> None:
    """Flips that are no bits of the file: the process fails at them, and the others are still checked."""
    path = write(tmp_path / "features.h5")
    beyond = 8 * path.stat().st_size + 5
    outcomes = check_flips(path, tmp_path, [8, beyond, 16])
    assert outcomes[beyond] == "CRASHED with 1"
    assert {outcomes[8], outcomes[16]} == {"found"}
    assert check_flips(path, tmp_path, [STANDSTILL], limit=1.0) == {STANDSTILL: "HUNG for 1 s"}


if __name__ == "__main__":
    arguments: list[Any] = sys.argv[1:]
    main(Path(arguments[0]), Path(arguments[1]), arguments[2:])
