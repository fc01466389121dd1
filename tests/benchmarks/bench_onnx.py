"""ONNX networks: processor time of OpenVINO's conversion against ONNX Runtime, float32, side by side in one process.

    python tests/benchmarks/bench_onnx.py FILE.onnx PREPROCESS.json [LAYER] [--batch 32] [--rounds 5]

Both engines are opened as an extraction opens them, with the same number of threads, and run the same batch in turn. The
figure is the median over the rounds of the ratio of their processor times.
"""

from __future__ import annotations

import argparse
import statistics
import time

from features.networks.network import resolve_network
from features.networks.reference import reference_images
from features.recipe import NetworkOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("preprocess")
    parser.add_argument("layer", nargs="?")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    engines = {}
    for name in ("onnxruntime", "openvino"):
        layers = (asked.layer,) if asked.layer else ()
        network = resolve_network(
            NetworkOptions(asked.file, preprocess=asked.preprocess, layers=layers, engine=name, device="cpu")
        )
        engines[name] = network.engine(network.recipes, batch_size=asked.batch)
        assert engines[name].name == name, engines[name].name
    rule = network.recipes[0].pixels
    images = reference_images(rule.height, rule.width, asked.batch)
    each: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(asked.rounds + 1):
        for name, engine in engines.items():
            start = time.process_time()
            engine(images)
            if number:  # the first round warms up
                each[name].append((time.process_time() - start) / asked.batch * 1e3)
    for name, times in each.items():
        print(f"{name:<12} {statistics.median(times):8.1f} processor-ms an image")
    ratios = [ours / theirs for ours, theirs in zip(each["openvino"], each["onnxruntime"], strict=True)]
    print(f"openvino / onnxruntime {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
