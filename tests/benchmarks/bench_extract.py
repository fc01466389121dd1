"""Extraction against what people use today, and against what the machine could do; ratios of medians.

    python tests/benchmarks/bench_extract.py [IMAGES] [--weights FILE] [--backbone vgg16 --size 224] [--rounds 5] [--json OUT]

Every contender is a process of its own, held to the same processors; each round runs all of them in turn. What is timed
begins when the network is built, warm, and no image has been read, and ends when the features are in memory (Keras) or
committed to disk (ours). The bound is what this machine could do if decoding and the forward pass shared its processors
without loss: 1 / (seconds of decoding alone + seconds of the forward pass alone), each an image on all processors.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BATCH = 32
TUNED, TUTORIAL = "keras predict, tuned", "a batch at a time, Pillow + predict"


@dataclasses.dataclass(frozen=True)
class Ours:
    """One way of extracting: engine, precision and decoding."""

    engine: str
    precision: str = "float32"
    decode: str = "full"

    @property
    def name(self) -> str:
        return f"ours, {self.engine} {self.precision}" + (", decode fast" if self.decode == "fast" else "")


def contenders() -> dict[str, Ours | None]:
    """Name -> how; None for those that are not ours."""
    found: dict[str, Ours | None] = {TUNED: None, TUTORIAL: None}
    ways = [Ours("keras")]
    from features.networks.engines import engine_names

    if "openvino" in engine_names():
        precisions = ("float32", "bfloat16")
        ways += [Ours("openvino", precision, decode) for decode in ("full", "fast") for precision in precisions]
    return found | {way.name: way for way in ways}


# ------------------------------------------------------------------------------------------- one process each
def keras_model(options: argparse.Namespace) -> tuple[Any, Callable[[Any], Any]]:
    from features.networks.backbones import preprocess
    from features.networks.finding import find_backbone
    from features.networks.network import resolve_network
    from features.recipe import NetworkOptions

    network = resolve_network(
        NetworkOptions(options.backbone, weights=options.weights, image_size=(options.size, options.size))
    )
    base = network.load()
    import keras

    pooled = keras.layers.GlobalAveragePooling2D()(base.output)
    return keras.Model(base.input, pooled), preprocess(find_backbone(options.backbone).preprocessing)


def tuned(options: argparse.Namespace) -> dict[str, float]:
    """`image_dataset_from_directory` into `predict`, with parallel preprocessing and prefetching."""
    model, preprocess = keras_model(options)
    import keras
    import tensorflow as tf

    images = keras.utils.image_dataset_from_directory(
        options.images,
        labels=None,
        image_size=(options.size, options.size),
        batch_size=BATCH,
        shuffle=False,
        verbose=False,
    )
    images = images.map(preprocess, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    model.predict(images.take(1), verbose=0)
    started = time.perf_counter()
    features = model.predict(images, verbose=0)
    return {"images": len(features), "seconds": time.perf_counter() - started}


def tutorial(options: argparse.Namespace) -> dict[str, float]:
    """The way of the tutorials: load a batch with Pillow, `predict` it, keep the result, next."""
    model, preprocess = keras_model(options)
    import keras

    paths = sorted(Path(options.images).rglob("*.jpg"))

    def batch(chosen: Sequence[Path]) -> np.ndarray:
        size = (options.size, options.size)
        images = [keras.utils.img_to_array(keras.utils.load_img(path, target_size=size)) for path in chosen]
        return np.asarray(preprocess(np.stack(images)))

    model.predict(batch(paths[:BATCH]), verbose=0)
    started = time.perf_counter()
    parts = [model.predict(batch(paths[at : at + BATCH]), verbose=0) for at in range(0, len(paths), BATCH)]
    return {"images": len(np.concatenate(parts)), "seconds": time.perf_counter() - started}


def prepared(options: argparse.Namespace, way: Ours, out: Path) -> tuple[Any, Any]:
    """An extraction whose network is built and warm, and that engine."""
    from features.extraction.extraction import prepare
    from features.extraction.options import ExtractionOptions

    asked = ExtractionOptions(
        options.backbone,
        weights=options.weights,
        image_size=options.size,
        engine=way.engine,
        precision=way.precision,
        decode=way.decode,
        batch_size=BATCH,
    )
    extraction = prepare(options.images, out, asked)
    return extraction, warm_up(extraction, options.size, batch_size=BATCH)


def warm_up(extraction: Any, size: int, **options: Any) -> Any:
    """Build the engine of an extraction, which then takes it as it is, and run one batch."""
    network = extraction.network
    engine = network.engine(network.recipes, **options)
    engine(np.zeros((options["batch_size"], size, size, 3), np.uint8))
    extraction.network = WarmNetwork(network, engine, network.quantised)
    return engine


@dataclasses.dataclass(frozen=True)
class WarmNetwork:
    """A network whose engine is there already."""

    network: Any
    warm: Any
    quantised: Path | None = None  # extraction names the copy beside the store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def engine(self, *_: Any, **__: Any) -> Any:
        return self.warm


@contextlib.contextmanager
def timed_writing() -> Iterator[list[float]]:
    """Seconds that processors spend on writing: shards and the store."""
    from features.extraction import extraction
    from features.extraction import shard as shards

    spent: list[float] = []

    def watch(module: Any, name: str) -> None:
        function = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.thread_time() - started)

        setattr(module, name, watched)

    watch(shards, "write_shard")
    watch(extraction, "assemble")
    yield spent


def ours(options: argparse.Namespace, way: Ours) -> dict[str, float]:
    """The whole of stage one, and then its parts alone, on the same images."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        extraction, engine = prepared(options, way, Path(folder) / "f.h5")
        start_up = time.perf_counter() - begun
        with timed_writing() as writing:
            started, processor = time.perf_counter(), time.process_time()
            result = extraction.run()
            seconds, processor = time.perf_counter() - started, time.process_time() - processor
        assert result.inferred == len(result.store)
    return {
        "images": result.inferred,
        "seconds": seconds,
        "writing": sum(writing) / processor,  # share of the processor time
        "start_up": start_up,
        **decode_alone(options, extraction),
        **forward_alone(options, engine),
    }


def decode_alone(options: argparse.Namespace, extraction: Any) -> dict[str, float]:
    from concurrent.futures import ThreadPoolExecutor

    from features.pixels.decode import decode_image

    images, rule = extraction.images, extraction.network.recipes[0].pixels
    chosen = range(min(len(images), 1000))
    with ThreadPoolExecutor(extraction.workers) as pool:
        started = time.perf_counter()
        for _ in pool.map(lambda index: decode_image(images.read(index), rule), chosen):
            pass
        return {"decode_each": (time.perf_counter() - started) / len(chosen)}


def forward_alone(options: argparse.Namespace, engine: Any) -> dict[str, float]:
    """Batches from two threads, as an extraction has two shards in flight."""
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, options.size, options.size, 3), dtype=np.uint8)
    batches = max(2, options.forward // BATCH // 2)
    lock = contextlib.nullcontext() if getattr(engine, "concurrent", False) else threading.Lock()

    def loop() -> None:
        for _ in range(batches):
            with lock:
                engine(pixels)

    threads = [threading.Thread(target=loop) for _ in range(2)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"forward_each": (time.perf_counter() - started) / (2 * batches * BATCH)}


def run_one(options: argparse.Namespace) -> None:
    from features.machine import peak_memory

    way = contenders()[options.contender]
    if way is not None:
        values = ours(options, way)
    else:
        values = (tuned if options.contender == TUNED else tutorial)(options)
    values["peak_mib"] = peak_memory() / 2**20
    values["tensorflow"] = "tensorflow" in sys.modules
    print(json.dumps(values))


# ------------------------------------------------------------------------------------------- all of them
def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, options.images, "--backbone", options.backbone, "--size", str(options.size)]
    command += ["--weights", options.weights, "--forward", str(options.forward), "--contender", name]
    hold = (lambda: os.sched_setaffinity(0, options.held)) if options.held else None
    result = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=hold)
    if result.returncode:
        sys.exit(f"{name}: {result.stderr[-2000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def summarise(measured: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    def median(name: str, key: str) -> float | None:
        values = [values[key] for values in measured[name] if key in values]
        return statistics.median(values) if values else None

    def rate(name: str) -> float:
        return float(statistics.median(values["images"] / values["seconds"] for values in measured[name]))

    rows = []
    for name in measured:
        row: dict[str, Any] = {"contender": name, "images_per_second": rate(name), "peak_mib": median(name, "peak_mib")}
        row["to_tuned"], row["to_tutorial"] = rate(name) / rate(TUNED), rate(name) / rate(TUTORIAL)
        if "forward_each" in measured[name][0]:
            bound = 1 / statistics.median(values["decode_each"] + values["forward_each"] for values in measured[name])
            row |= {
                "of_bound": rate(name) / bound,
                "forward_per_second": 1 / float(median(name, "forward_each") or 1),
                "decode_per_second": 1 / float(median(name, "decode_each") or 1),
                "writing_share": median(name, "writing"),
                "start_up": median(name, "start_up"),
                "tensorflow": any(values["tensorflow"] for values in measured[name]),
            }
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown, as README.md beside this file has them, and what the bound is made of."""
    head = ("contender", "images/s", "times tuned Keras", "times the tutorials' way", "of what the machine could do")
    more = ("forward/s", "decode/s", "writing", "start", "peak memory")
    lines = [f"| {' | '.join(head + more)} |", "| --- " * len(head + more) + "|"]
    for row in rows:
        cells = [
            row["contender"],
            f"{row['images_per_second']:.0f}",
            f"{row['to_tuned']:.2f}",
            f"{row['to_tutorial']:.2f}",
        ]
        if "of_bound" in row:
            cells += [f"{row['of_bound']:.0%}", f"{row['forward_per_second']:.0f}", f"{row['decode_per_second']:.0f}"]
            cells += [f"{row['writing_share']:.1%}", f"{row['start_up']:.1f} s"]
        else:
            cells += [""] * 5
        cells.append(f"{row['peak_mib']:.0f} MiB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(held: Sequence[int]) -> dict[str, Any]:
    model = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {"processor": model or platform.machine(), "processors_used": len(held), "python": platform.python_version()}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", help="JPEGs; cats and dogs of BOTTLENECK_ASSETS without it, else noise")
    parser.add_argument("--backbone", default="mobilenetv2")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--limit", type=int, help="so many of the images, at even distances")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processors", type=int, default=2)
    parser.add_argument("--forward", type=int, default=1024, help="images of the forward pass alone")
    parser.add_argument("--only", nargs="*", help="contenders whose name contains one of these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        run_one(options)
        return
    assets = os.environ.get("BOTTLENECK_ASSETS")
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None and assets:
            options.images = str(Path(assets) / "images" / "cats_and_dogs_filtered")
        elif options.images is None:
            from gpu_check import noise

            options.images = noise(Path(folder) / "noise", 2000)
        if options.limit:
            options.images = some(Path(options.images), options.limit, Path(folder) / "some")
        compare(options)


def some(source: Path, limit: int, folder: Path) -> str:
    """A folder with links to some of the images."""
    paths = sorted(source.rglob("*.jpg"))
    for path in paths[:: max(1, len(paths) // limit)][:limit]:
        link = folder / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return str(folder)


def compare(options: argparse.Namespace) -> None:
    options.held = sorted(os.sched_getaffinity(0))[: options.processors] if hasattr(os, "sched_getaffinity") else []
    wanted = [name for name in contenders() if not options.only or any(part in name for part in options.only)]
    names = list(dict.fromkeys([TUNED, TUTORIAL, *wanted]))
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(options.rounds + 1):
        for name in names:
            values = measure(options, name)
            if number or options.rounds == 0:  # the first round fills caches: files, bytecode, converted networks
                measured[name].append(values)
            print(f"round {number}: {name}: {values['images'] / values['seconds']:.0f} images/s", file=sys.stderr)
    rows = summarise(measured)
    print(table(rows))
    document = {
        "machine": machine(options.held),
        "backbone": options.backbone,
        "size": options.size,
        "rounds": options.rounds,
        "rows": rows,
        "measured": measured,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
