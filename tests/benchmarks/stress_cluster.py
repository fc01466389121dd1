"""Kill workers and schedulers at random, run again until the store is there, and compare it with an undisturbed one.

    python tests/benchmarks/stress_cluster.py     # KILLS=20 SCHEDULERS=3 ROUNDS=5 IMAGES=600 SEED=0

Scheduler and workers are processes as ``dask scheduler`` and ``dask worker`` start them; the network is of numpy, slowed
down. After the scheduler was killed the run is finished on a new cluster, or here, in turn. Prints what it did; exits 1
where a promise was broken.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from clusters import WIDTH, Faults, Processes, extraction, processes  # noqa: E402
from faults import differences, inferred  # noqa: E402
from helpers import listing, paint_folder  # noqa: E402

from features.errors import BottleneckError  # noqa: E402
from features.store.reader import FeatureStore  # noqa: E402
from pipeline.cluster.run import ClusterShards  # noqa: E402

WORKERS, SHARD = 3, 16
TRIES = 20


class Killer(threading.Thread):
    """Kills so many workers (the processes, not their nannies), and a scheduler among them, while a run goes on."""

    def __init__(self, cluster: Processes, kills: int, scheduler: Any, generator: random.Random, total: int) -> None:
        super().__init__(daemon=True)
        self._cluster, self._kills, self._scheduler, self._random = cluster, kills, scheduler, generator
        self._total, self.done, self.stopped = total, 0, threading.Event()
        self.killed: Counter[str] = Counter()

    def run(self) -> None:
        while not self.stopped.is_set() and (self._kills or self._scheduler):
            # So far apart that the images last for all kills.
            self.stopped.wait(self._random.uniform(0.1, 1.2))
            if self.stopped.is_set():
                return
            if self._scheduler and (not self._kills or self._random.random() < 0.2):
                os.kill(self._scheduler.pid, signal.SIGKILL)
                self._scheduler = None
                self.killed["scheduler"] += 1
                return  # its workers end with it
            alive = [child for process in self._cluster.processes for child in _children(process.pid)]
            if alive and self._kills:
                victim = self._random.choice(alive)
                try:
                    victim.kill()
                except psutil.NoSuchProcess:
                    continue
                self._kills -= 1
                self.killed["worker"] += 1

    @property
    def left(self) -> int:
        return self._kills


def _children(pid: int) -> list[psutil.Process]:
    """Worker processes of a nanny; the resource tracker of Python is none."""
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def one_round(folder: Path, source: Path, whole: Path, faults: Faults, kills: int, scheduler: bool, seed: int) -> Any:
    generator = random.Random(seed)
    out, log = folder / "out" / "f.h5", folder / "log"
    faults.set(numpy=WIDTH, log=str(log), delay=0.35)
    killed: Counter[str] = Counter()
    total, ends = len(FeatureStore.open(whole)), []
    for number in range(TRIES):
        with processes(folder / f"processes{number}", faults.environment) as cluster:
            process = cluster.scheduler()
            for _ in range(WORKERS):
                cluster.worker()
            killer = Killer(cluster, kills, process if scheduler else None, generator, total)
            killer.start()
            try:
                runner = ClusterShards(cluster.address, patience=60)
                result = extraction(source, out, runner, shard_rows=SHARD, workers=1).run()
                ends.append("finished")
            except BottleneckError as error:
                ends.append(str(error).partition(". ")[0].partition(": ")[2])
                result = None
            killer.stopped.set()
            killer.join()
            killed, kills = killed + killer.killed, killer.left
            scheduler = scheduler and not killer.killed["scheduler"]
        if result is None and seed % 2:
            result = extraction(source, out, shard_rows=SHARD).run()
            ends.append("finished here")
        if result is not None:
            break
    store = FeatureStore.open(out)
    return {
        "killed": dict(killed),
        "ends": ends,
        "differences": differences(whole, out),
        "rows": len(store),
        "rows twice": len(store) - len(set(store.images.paths)),
        "left behind": [name for name in listing(out.parent) if name != "f.h5"],
        "inferred on workers": inferred(log),
    }


def main() -> int:
    kills, schedulers = int(os.environ.get("KILLS", "20")), int(os.environ.get("SCHEDULERS", "3"))
    rounds, count = int(os.environ.get("ROUNDS", "5")), int(os.environ.get("IMAGES", "600"))
    seed = int(os.environ.get("SEED", "0"))
    good, killed = True, Counter[str]()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = paint_folder(folder / "images", {"cat": count // 2, "dog": count - count // 2})
        whole = folder / "whole.h5"
        extraction(source, whole, shard_rows=SHARD).run()
        faults = Faults(folder / "faults.json", numpy=WIDTH)
        os.environ.update(faults.environment)
        number = 0
        while number < rounds or killed["worker"] < kills or killed["scheduler"] < schedulers:
            wanted = max(1, -(-kills // rounds))
            place = folder / f"round{number}"
            said = one_round(place, source, whole, faults, wanted, killed["scheduler"] < schedulers, seed + number)
            killed.update(said["killed"])
            print(json.dumps(said), flush=True)
            good &= not said["differences"] and not said["left behind"] and said["rows"] == count
            good &= not said["rows twice"]
            number += 1
    summary = {"rounds": number, "killed": dict(killed), "seconds": round(time.monotonic() - started), "good": good}
    print(json.dumps(summary))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
