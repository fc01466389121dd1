"""A cluster on 127.0.0.1: a scheduler and three workers, one of which is killed in the middle of an extraction.

    make cluster-demo        # BOTTLENECK_ASSETS: all of cats and dogs; else scikit-learn's digits

The store that comes out is compared with one that this machine makes alone. Exits 1 where they differ.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from clusters import processes  # noqa: E402
from faults import differences  # noqa: E402
from helpers import listing  # noqa: E402

from features.store.reader import parts_folder  # noqa: E402

WORKERS, SHARD_ROWS = 3, 128


def source() -> list[str]:
    """Images and the network for them, as arguments of ``extract``."""
    assets = os.environ.get("BOTTLENECK_ASSETS")
    if not assets:
        return ["sample:digits", "--weights", "random", "--image-size", "96"]
    weights = next((Path(assets) / "weights").glob("mobilenet_v2_1.0_*"))
    images = Path(assets) / "images" / "cats_and_dogs_filtered"
    return [str(images), "--weights", str(weights), "--image-size", "160"]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def extract(out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = ["extract", *source(), "--out", str(out), "--shard-rows", str(SHARD_ROWS), *more]
    return subprocess.Popen([sys.executable, "-m", "pipeline", *command], cwd=ROOT)


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone, out = folder / "alone" / "features.h5", folder / "cluster" / "features.h5"
        with processes(folder / "processes", {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}) as cluster:
            cluster.scheduler()
            workers = [cluster.worker("--no-nanny", "--name", number) for number in range(WORKERS)]
            say(
                f"scheduler at {cluster.address}, {WORKERS} workers: processes {', '.join(str(w.pid) for w in workers)}"
            )
            run = extract(out, "--cluster", cluster.address)
            while len(list(parts_folder(out).glob("*.h5"))) < 5:
                if run.poll() is not None:
                    say(f"the extraction ended early, with exit code {run.returncode}")
                    return 1
                time.sleep(0.05)
            os.kill(workers[0].pid, signal.SIGKILL)
            say(f"worker {workers[0].pid} was killed, with {len(list(parts_folder(out).glob('*.h5')))} shards finished")
            if run.wait():
                say(f"the extraction failed, with exit code {run.returncode}")
                return 1
        say("finished by the two others; now the same on this machine alone")
        if extract(alone).wait():
            return 1
        wrong, left = differences(alone, out), [name for name in listing(out.parent) if name != out.name]
        same = "the same, data set for data set" if not wrong else f"DIFFERENT in {', '.join(wrong)}"
        say(f"the two stores are {same}; left behind: {', '.join(left) or 'nothing'}")
        return 1 if wrong or left else 0


if __name__ == "__main__":
    sys.exit(main())
