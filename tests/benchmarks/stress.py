"""Kill a real extraction 50 times, run it again each time, and compare the end with a run that nothing disturbed.

MobileNetV2 on cats and dogs (BOTTLENECK_ASSETS) or on scikit-learn's digits. Prints what it did; exits 1 where a
promise was broken. `make stress` then runs the tests marked ``stress`` in full, of which the suite runs a tenth.

    make stress               # KILLS=50 IMAGES=1000 SEED=0
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import differences, inferred, kill_often, run  # noqa: E402

SHARD_ROWS = 32


def some_images(folder: Path, count: int) -> tuple[Path, list[object]]:
    """A folder of images and the network for them."""
    assets = os.environ.get("BOTTLENECK_ASSETS")
    if not assets:
        from features.sources.scan import scan

        found = scan("sample:digits")
        for name in found.paths[:: max(1, len(found) // count)][:count]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(found.root) / name, folder / name)
        return folder, ["--backbone", "mobilenetv2", "--weights", "random", "--image-size", 96]
    for kind in ("cats", "dogs"):
        source = Path(assets) / "images" / "cats_and_dogs_filtered" / "train" / kind
        (folder / kind).mkdir(parents=True)
        for path in sorted(source.iterdir())[: count // 2]:
            shutil.copy(path, folder / kind)
    weights = next((Path(assets) / "weights").glob("mobilenet_v2_1.0_224_no_top*"))
    return folder, ["--backbone", "mobilenetv2", "--weights", weights, "--image-size", 160]


def main() -> int:
    kills = int(os.environ.get("KILLS", "50"))
    count, seed = int(os.environ.get("IMAGES", "1000")), int(os.environ.get("SEED", "0"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ.setdefault("BOTTLENECK_CACHE", str(folder / "cache"))
        os.environ["XDG_CONFIG_HOME"] = str(folder / "config")  # not the user's own key
        images, network = some_images(folder / "images", count)
        total = sum(path.is_file() for path in images.rglob("*"))
        whole, out, log = folder / "whole" / "f.h5", folder / "out" / "f.h5", folder / "log"
        command: list[object] = ["extract", images, "--shard-rows", SHARD_ROWS, *network, "--out"]
        started = time.perf_counter()
        run(folder / "whole-log", *command, whole)
        undisturbed = time.perf_counter() - started
        started = time.perf_counter()
        hits = kill_often(kills, total, log, [*command, out], [], seed=seed)
        run(log, *command, out)
        summary = {
            "images": total,
            "kills": hits,
            "seconds": {"undisturbed": round(undisturbed), "killed": round(time.perf_counter() - started)},
            "inferred again": inferred(log) - total,
            "allowed again": kills * 2 * SHARD_ROWS,
            "differences": differences(whole, out),
            "left behind": sorted(path.name for path in out.parent.iterdir() if path != out),
        }
    good = (
        0 <= int(summary["inferred again"]) <= int(summary["allowed again"])
        and not summary["differences"]
        and not summary["left behind"]
    )
    print(json.dumps({**summary, "ok": good}, indent=2))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
