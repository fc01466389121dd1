"""The path through a GPU: is it right, how fast is the forward pass, how much of that do real JPEGs reach.

    KERAS_BACKEND=tensorflow|jax|torch python tests/benchmarks/gpu_check.py [IMAGES] [--backbone vgg16] [--weights FILE]

Without a GPU the same is run on the processors, with small batches, and the table says so. Without IMAGES, noise is
written as JPEGs. Numbers are medians; the table's last column is the share of the raw rate that whole extraction reached.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.4, "float16": 0.05}  # relative L2; a GPU's float32 may be TensorFloat-32


def main() -> int:
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?")
    parser.add_argument("--backbone", default="mobilenetv2")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from features.networks.backend import load_keras
    from features.networks.engines import choose_device

    load_keras()
    device = choose_device("auto")
    precisions = ("float32", "bfloat16", "float16") if device == "gpu" else ("float32", "bfloat16")
    batches = (32, 64, 128, 256, 512) if device == "gpu" else (8, 32)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        images = options.images or noise(Path(folder) / "noise", 4000 if device == "gpu" else 64)
        reference = features_of(options, "float32", "cpu", 8)
        for precision in precisions:
            difference = np.linalg.norm(features_of(options, precision, device, 8) - reference) / np.linalg.norm(
                reference
            )
            rates = {batch: forward_rate(options, precision, device, batch) for batch in batches}
            best = max(rates, key=lambda batch: rates[batch])
            whole = end_to_end(options, images, precision, device, best, Path(folder) / f"{precision}.h5")
            rows.append(
                {
                    "precision": precision,
                    "difference": float(difference),
                    "right": bool(difference <= TOLERANCE[precision]),
                    "forward": rates,
                    "best_batch": best,
                    "end_to_end": whole,
                    "share": whole / rates[best],
                }
            )
    import keras

    where = device if device == "gpu" else "cpu (no GPU is seen: these are no GPU figures)"
    print(f"{options.backbone} {options.size} px, {keras.backend.backend()} on {where}")
    for row in rows:
        rates_text = " ".join(f"{batch}:{rate:.0f}" for batch, rate in row["forward"].items())
        print(
            f"{row['precision']:9} {'right' if row['right'] else 'WRONG'} ({row['difference']:.1e})  forward images/s by batch "
            f"{rates_text}  end to end {row['end_to_end']:.0f} images/s, {row['share']:.0%} of the raw rate"
        )
    if options.json:
        document = {"backend": keras.backend.backend(), "device": device, "backbone": options.backbone, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1))
    return 0 if all(row["right"] for row in rows) else 1


def network_of(options: argparse.Namespace, precision: str) -> Any:
    from features.networks.network import resolve_network
    from features.recipe import NetworkOptions

    return resolve_network(
        NetworkOptions(options.backbone, options.weights, image_size=options.size, engine="keras", precision=precision)
    )


def features_of(options: argparse.Namespace, precision: str, device: str, count: int) -> np.ndarray:
    from features.networks.reference import reference_images

    network = network_of(options, precision)
    engine = network.engine(network.recipes, batch_size=count, device=device)
    return np.asarray(next(iter(engine(reference_images(options.size, options.size, count)).values())))


def forward_rate(options: argparse.Namespace, precision: str, device: str, batch: int) -> float:
    """Images a second through the engine, bytes in and features out, the median of single batches."""
    network = network_of(options, precision)
    engine = network.engine(network.recipes, batch_size=batch, device=device)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, options.size, options.size, 3), dtype=np.uint8)
    engine(pixels)
    times: list[float] = []
    end = time.perf_counter() + options.seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        engine(pixels)
        times.append(time.perf_counter() - started)
    return batch / statistics.median(times)


def end_to_end(options: argparse.Namespace, images: str, precision: str, device: str, batch: int, out: Path) -> float:
    """Images a second from JPEG files to a finished store; the network is built and warm before."""
    from bench_extract import warm_up

    from features.extraction.extraction import prepare
    from features.extraction.options import ExtractionOptions

    asked = ExtractionOptions(
        options.backbone,
        options.weights,
        image_size=options.size,
        engine="keras",
        precision=precision,
        device=device,
        batch_size=batch,
    )
    extraction = prepare(images, out, asked)
    warm_up(extraction, options.size, batch_size=batch, device=device)
    started = time.perf_counter()
    result = extraction.run()
    return result.inferred / (time.perf_counter() - started)


def noise(folder: Path, count: int) -> str:
    """JPEGs of 500x375 soft noise."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(count):
        small = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        path = folder / f"class{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((500, 375), Image.Resampling.BILINEAR).save(path, quality=90)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
