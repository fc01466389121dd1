"""ONNX networks: processor time of OpenVINO's conversion against ONNX Runtime, float32, and what an extraction adds to it.

    python tests/benchmarks/bench_onnx.py FILE.onnx PREPROCESS.json [LAYER] [--batch 32] [--rounds 5] [--images FOLDER]
    python tests/benchmarks/bench_onnx.py efficientnet-lite0 --images FOLDER

A network of the table is exported to ONNX first. Both engines are opened as an extraction opens them, with the same number
of threads, and run the same batch in turn. The figure is the median over the rounds of the ratio of their processor times.

With images, features of some of them are extracted from end to end, of 1 in 4 and of all: the difference is what an image
costs in a long run. The figure is the share of it that decoding and the forward pass take when each is measured alone, in
processor time: 1 is the bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from features.extraction.extraction import extract_features
from features.networks.network import resolve_network
from features.networks.reference import reference_images
from features.pixels.decode import decode_image
from features.recipe import NetworkOptions, PixelRule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("preprocess", nargs="?")
    parser.add_argument("layer", nargs="?")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images")
    parser.add_argument("--limit", type=int, default=400)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file, how = (asked.file, asked.preprocess) if asked.preprocess else exported(asked.file, Path(folder))
        options: dict[str, Any] = {"preprocess": how, "layers": (asked.layer,) if asked.layer else (), "device": "cpu"}
        forward, rule = side_by_side(file, options, asked.batch, asked.rounds)
        if asked.images:
            common = {"backbone": file, "batch_size": asked.batch, "engine": "openvino", **options}

            def extract(limit: int, number: int) -> object:
                return extract_features(asked.images, Path(folder) / f"{limit}-{number}.h5", limit=limit, **common)

            from_end_to_end(asked.images, extract, asked.limit, forward, rule, asked.rounds)


def exported(name: str, folder: Path) -> tuple[str, str]:
    """Export a network of the table, which takes its pixels as they are, and describe it."""
    network = resolve_network(NetworkOptions(name, engine="keras"))
    rule, model = network.recipes[0].pixels, network.load()
    model(np.zeros((1, rule.height, rule.width, 3), np.float32))  # the exporter wants a model that was called
    model.export(str(folder / "model.onnx"), format="onnx", verbose=False)
    how: dict[str, Any] = {
        "format": "bottleneck-preprocess 1",
        "size": [rule.height, rule.width],
        "resize": rule.resize,
    }
    how |= {"fit": rule.fit, "scale": 1.0, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    (folder / "how.json").write_text(json.dumps(how))
    return str(folder / "model.onnx"), str(folder / "how.json")


def side_by_side(file: str, options: dict[str, Any], batch: int, rounds: int) -> tuple[Callable[[], float], PixelRule]:
    """Print the processor time of both engines; return a measurement of OpenVINO's, and the rule of the pixels."""
    engines = {}
    for name in ("onnxruntime", "openvino"):
        network = resolve_network(NetworkOptions(file, engine=name, **options))
        engines[name] = network.engine(network.recipes, batch_size=batch)
        assert engines[name].name == name, engines[name].name
    rule = network.recipes[0].pixels
    images = reference_images(rule.height, rule.width, batch)

    def measured(name: str) -> float:
        return processor_ms(lambda: engines[name](images)) / batch

    each: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name in engines:
            took = measured(name)
            if number:  # the first round warms up
                each[name].append(took)
    for name, times in each.items():
        print(f"{name:<12} {statistics.median(times):8.1f} processor-ms an image")
    ratios = [ours / theirs for ours, theirs in zip(each["openvino"], each["onnxruntime"], strict=True)]
    print(f"openvino / onnxruntime {statistics.median(ratios):.3f}")
    return lambda: measured("openvino"), rule


def from_end_to_end(
    images: str,
    extract: Callable[[int, int], object],
    limit: int,
    forward: Callable[[], float],
    rule: PixelRule,
    rounds: int,
) -> None:
    """Print what an image costs in an extraction, and the share of decoding and the forward pass in it."""
    columns: dict[str, list[float]] = {"decode": [], "forward": [], "extraction": [], "share of the bound": []}
    files = sorted(Path(images).rglob("*.jpg"))
    few = files[:: max(1, len(files) // 100)]
    for number in range(rounds):
        decode = processor_ms(lambda: [decode_image(path.read_bytes(), rule) for path in few]) / len(few)
        alone = statistics.median(forward() for _ in range(3))
        part, whole = (processor_ms(lambda: extract(count, number)) for count in (limit // 4, limit))  # noqa: B023
        each = (whole - part) / (limit - limit // 4)
        for column, value in zip(columns.values(), (decode, alone, each, (decode + alone) / each), strict=True):
            column.append(value)
    for name, values in columns.items():
        print(f"{name:<18} {statistics.median(values):8.3f}{'' if 'share' in name else ' processor-ms an image'}")


def processor_ms(work: Callable[[], object]) -> float:
    """Return the processor time of this process while it does some work, of all threads together."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


if __name__ == "__main__":
    main()
