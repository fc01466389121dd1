"""What int8 costs in accuracy and gains in speed, for networks with trained weights, as rows of a table.

    python tests/benchmarks/bench_int8.py FOLDER [--networks mobilenetv2 ...] [--images cats-dogs] [--limit 500]
        [--seeds 0 1 2] [--model vit=FILE.onnx --preprocess vit=FILE.json --layer vit=NAME] [--json OUT.json]

Needs BOTTLENECK_ASSETS, and the extra int8. FOLDER keeps the stores, so that the command can be stopped and run again. Both
stores of a network are made by the product. A logistic head is cross-validated in five folds on each, for three strengths;
the calibration images are drawn anew for each seed. Speed is the forward pass alone, batches of both taking turns; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np  # noqa: E402

from features.extraction.extraction import prepare  # noqa: E402
from features.extraction.options import ExtractionOptions  # noqa: E402
from features.networks.network import resolve_network  # noqa: E402
from features.networks.reference import reference_images, relative_difference  # noqa: E402
from features.store.reader import FeatureStore  # noqa: E402

STRENGTHS = (0.001, 0.01, 0.1)
WEIGHTS = {
    "mobilenetv2": "mobilenet_v2_1.0_224_no_top.weights.h5",
    "mobilenetv2-0.35": "mobilenet_v2_0.35_224_no_top.weights.h5",
    "vgg16": "vgg16_no_top.weights.h5",
}
FOLDERS = {"cats-dogs": "cats_and_dogs_filtered", "flowers17": "flowers17"}
ROUNDS, BATCH = 5, 32


def accuracies(features: np.ndarray, labels: np.ndarray) -> dict[float, float]:
    """Accuracy of a logistic head by its strength C, over five stratified folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    heads = {c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in STRENGTHS}
    return {c: float(cross_val_score(head, features, labels, cv=folds).mean()) for c, head in heads.items()}


def speed(options: list[ExtractionOptions]) -> list[float]:
    """Images per second of each network's forward pass."""
    networks = [resolve_network(asked) for asked in options]
    engines = [network.engine(network.recipes, batch_size=BATCH) for network in networks]
    rule = networks[0].recipes[0].pixels
    images = np.tile(reference_images(rule.height, rule.width), (BATCH // 4, 1, 1, 1))
    taken: list[list[float]] = [[] for _ in engines]
    for number in range(ROUNDS + 1):
        for engine, times in zip(engines, taken, strict=True):
            began = time.perf_counter()
            engine(images)
            if number:  # the first one warms up
                times.append(time.perf_counter() - began)
    return [BATCH / statistics.median(times) for times in taken]


def made(source: Path, out: Path, asked: ExtractionOptions) -> FeatureStore:
    return prepare(source, out, asked).run().store


def table(store: FeatureStore) -> tuple[np.ndarray, np.ndarray]:
    """Features, averaged over all axes but the last, and labels."""
    values = store.array(store.names[0])[:, 0]
    return values.reshape(len(values), -1, values.shape[-1]).mean(axis=1), store.images.labels


def measured(name: str, model: dict[str, Any], images: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    source = Path(os.environ["BOTTLENECK_ASSETS"]) / "images" / FOLDERS[images]
    folder = Path(arguments.folder)
    shared = {"limit": arguments.limit, "split": "hash", **model}
    stem = f"{name}-{images}-{arguments.limit or 'all'}"
    exact, labels = table(made(source, folder / f"{stem}-float32.h5", ExtractionOptions(**shared)))
    before, found, differences = accuracies(exact, labels), [], []
    for seed in arguments.seeds:
        asked = ExtractionOptions(precision="int8", seed=seed, **shared)
        store = made(source, folder / f"{stem}-int8-{seed}.h5", asked)
        rounded, _ = table(store)
        found.append(accuracies(rounded, labels))
        differences.append(relative_difference(rounded, exact))
    recipe = store.recipes[store.names[0]]
    file = folder / f"{stem}-int8-{arguments.seeds[-1]}.h5.networks" / f"{recipe.quantised}.int8"
    plain = {key: value for key, value in model.items() if key != "limit"}
    rates = speed([ExtractionOptions(**plain), ExtractionOptions(**plain, precision="int8", quantised=str(file))])
    lost = [max(before.values()) - max(each.values()) for each in found]
    return {
        "network": name,
        "images": f"{images}, {len(labels):,}",
        "float32": before,
        "int8": found,
        "lost": lost,
        "relative_difference": differences,
        "images_per_second": rates,
        "bytes": file.stat().st_size,
    }


def line(row: dict[str, Any]) -> str:
    """The row of the table in Markdown."""
    best, each = max(row["float32"].values()), [max(found.values()) for found in row["int8"]]
    lost = statistics.mean(row["lost"])
    slow, fast = row["images_per_second"]
    return (
        f"| {row['network']} | {row['images']} | {best:.4f} | {' '.join(f'{value:.4f}' for value in each)} | {lost:+.4f} | "
        f"{statistics.mean(row['relative_difference']):.2f} | {slow:.1f} | {fast:.1f} | {fast / slow:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--networks", nargs="*", default=list(WEIGHTS))
    parser.add_argument("--images", nargs="*", default=list(FOLDERS), choices=list(FOLDERS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--model", nargs="*", default=[], help="NAME=FILE of a network that comes as a file")
    parser.add_argument("--preprocess", nargs="*", default=[], help="NAME=FILE of its description")
    parser.add_argument("--layer", nargs="*", default=[], help="NAME=LAYER whose features are compared")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    assets, rows = Path(os.environ["BOTTLENECK_ASSETS"]), []
    pairs = (arguments.model, arguments.preprocess, arguments.layer)
    files, how, layers = (dict(item.split("=", 1) for item in given) for given in pairs)
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    for name in [*arguments.networks, *files]:
        model: dict[str, Any] = {"backbone": files.get(name, name)}
        if name in WEIGHTS:
            model["weights"] = str(assets / "weights" / WEIGHTS[name])
        if name in how:
            model["preprocess"] = how[name]
        if name in layers:
            model["layers"] = (layers[name],)
        for images in arguments.images:
            rows.append(measured(name, model, images, arguments))
            print(line(rows[-1]), flush=True)
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
