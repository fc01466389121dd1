"""Steps of the GPU check, one process each: python gpu_kit.py STEP [ARGUMENTS]. Called by on_device.sh.

Each step writes $WORK/results/NAME.json, whole, and prints one line or a few. Without a GPU the same runs on the
processors with tiny counts (a rehearsal), and every result says so.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import contextlib
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
CARRIED = ROOT / ".whl"  # filled by prepare.sh: wheels, photographs, weights
WORK = Path(os.environ.get("WORK", Path(tempfile.gettempdir()) / "gpu-check"))
RESULTS = WORK / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
os.environ.setdefault("BOTTLENECK_CACHE", str(WORK / "cache"))


def card_there() -> bool:
    if Path("/dev/nvidia0").exists():
        return True
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20).returncode == 0
    return False


THERE = card_there()
GPU = THERE and os.environ.get("CUDA_VISIBLE_DEVICES", "all") != ""
DEVICE = "gpu" if GPU else "cpu"
TINY = not THERE or os.environ.get("TINY") == "1"
SIDE = 64 if TINY else 224  # pixels of an image
# VGG16 has the product's own random weights: the same numbers on every backend, and nothing to carry.
WEIGHTS = {"mobilenetv2": str(CARRIED / "mobilenetv2.weights.h5"), "vgg16": "random"}
SMALL, BIG = WORK / "small", WORK / "big"


def save(name: str, document: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    temporary = RESULTS / f".{name}.tmp"
    temporary.write_text(json.dumps({"device": DEVICE, **document}, indent=1))
    temporary.replace(RESULTS / f"{name}.json")


def say(*words: object) -> None:
    print(*words, flush=True)


def attempt(function: Any, *arguments: Any) -> Any:
    """A result, or what went wrong as text: one failure costs only itself."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error)[:300]}"


def number(value: Any, digits: int = 1) -> Any:
    return round(float(value), digits) if isinstance(value, int | float) else value


# ------------------------------------------------------------------------------------------------- environment
def env(_: Any) -> None:
    import importlib.metadata as metadata

    names = ["torch", "torchvision", "jax", "jaxlib", "jax-cuda13-plugin", "tensorflow", "keras", "optree", "numpy"]
    names += ["h5py", "pillow", "simplejpeg", "scikit-learn", "skops", "pydantic", "typer", "rich", "filelock"]
    names += ["dask", "distributed"]
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout if GPU else ""
    cpu = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    from PIL import features as pil

    from features.pixels.resizing import extension

    document = {
        "versions": versions,
        "python": sys.version,
        "processors": len(os.sched_getaffinity(0)),
        "cpu": [line for line in cpu.splitlines() if line.startswith(("Model name", "CPU(s)", "Thread", "Flags"))],
        "nvidia_smi": smi.splitlines()[:15],
        "compiled_resizing": extension() is not None,  # else decoding takes twice as long
        "pillow_turbo": bool(pil.check_feature("libjpeg_turbo")),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
    }
    save("env", document)
    say("env", versions, document["processors"], "processors", (smi.splitlines() or ["no GPU"])[0])
    say("compiled resizing:", document["compiled_resizing"])


# ------------------------------------------------------------------------------------------------------- data
def data(options: Any) -> None:
    """Unpack the JPEGs, and make many distinct files of them: bytes behind the end-of-image marker change the hash only."""
    import tarfile

    started = time.perf_counter()
    with tarfile.open(CARRIED / "images.tar") as archive:
        archive.extractall(SMALL, filter="data")
    sources = sorted(SMALL.rglob("*.jpg"), key=lambda path: path.name[::-1])  # both classes in turn, by their numbers
    count = 48 if TINY else options.count
    contents = [path.read_bytes() for path in sources]

    def write(index: int) -> None:
        source = sources[index % len(sources)]
        path = BIG / source.parent.name / f"{index:06d}.jpg"
        path.write_bytes(contents[index % len(sources)] + b"\n#%08d" % index)

    for folder in {source.parent.name for source in sources}:
        (BIG / folder).mkdir(parents=True, exist_ok=True)
    with futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(count)))
    seconds = time.perf_counter() - started
    size = sum(map(len, contents)) / len(contents)
    save("data", {"unique": len(sources), "count": count, "mean_bytes": size, "seconds": seconds})
    say(f"data {len(sources)} photographs, {count} files of {size / 1024:.1f} KiB, {seconds:.1f} s")


# ----------------------------------------------------------------------------------------------------- ceilings
def ceilings(_: Any) -> None:
    import torch

    device = torch.device("cuda" if GPU else "cpu")

    def sync() -> None:
        if GPU:
            torch.cuda.synchronize()

    def seconds(function: Any, repeats: int = 10) -> float:
        function()
        sync()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            function()
            sync()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    side = 8192 if GPU else 256
    found: dict[str, Any] = {}
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, True),
        ("float16", torch.float16, True),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        found[f"matmul_{name}_tflops"] = number(2 * side**3 / seconds(lambda a=a, b=b: a @ b) / 1e12)
    megabytes = 256 if GPU else 4
    host = torch.randint(0, 256, (megabytes << 20,), dtype=torch.uint8)
    dev = host.to(device)
    other = torch.empty_like(dev)
    size = megabytes / 1024
    found["copy_on_device_gb_s"] = number(2 * size / seconds(lambda: other.copy_(dev)))
    found["pageable_to_device_gb_s"] = number(size / seconds(lambda: dev.copy_(host)))
    found["device_to_pageable_gb_s"] = number(size / seconds(lambda: host.copy_(dev)))
    if GPU:
        pinned = host.pin_memory()
        found["pinned_to_device_gb_s"] = number(size / seconds(lambda: dev.copy_(pinned, non_blocking=True)))
        found["device_to_pinned_gb_s"] = number(size / seconds(lambda: pinned.copy_(dev, non_blocking=True)))
    array = np.random.default_rng(0).integers(0, 256, megabytes << 20, dtype=np.uint8)
    target = np.empty_like(array)
    found["memcpy_gb_s"] = number(size / seconds(lambda: np.copyto(target, array)))
    save("ceilings", found)
    say("ceilings", found)


# ------------------------------------------------------------------------------------------------------- decode
def _files(count: int) -> list[bytes]:
    paths = sorted(SMALL.rglob("*.jpg"), key=lambda path: path.name[::-1])
    return [paths[index % len(paths)].read_bytes() for index in range(count)]


def _rule(size: int = SIDE, decode: str = "full") -> Any:
    from features.recipe import PixelRule

    return PixelRule(size, size, decode=decode)


def _ways(only: str = "") -> dict[str, Any]:
    """Name -> function of the bytes of a JPEG; with ``only``, no library is loaded that this one does not need."""
    from PIL import Image

    from features.pixels.decode import decode_image, decode_upright
    from features.pixels.resizing import resize_image

    full, fast = _rule(), _rule(decode="fast")
    ways: dict[str, Any] = {
        "ours full": lambda data: decode_image(data, full),
        "ours fast": lambda data: decode_image(data, fast),
        "ours full, without resizing": lambda data: decode_upright(data, full),
        "pillow decode alone": lambda data: Image.open(io.BytesIO(data)).load(),
        "pillow decode to array": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    }
    if only in ways:
        return ways
    upright = [decode_upright(data, full).image for data in _files(8)]
    ways["ours, resizing alone"] = lambda data: resize_image(upright[len(data) % 8], full)
    with contextlib.suppress(ImportError):
        import simplejpeg

        ways["simplejpeg decode"] = lambda data: simplejpeg.decode_jpeg(data, "RGB")
        ways["simplejpeg decode + Pillow resize"] = lambda data: resize_image(
            Image.fromarray(simplejpeg.decode_jpeg(data, "RGB")), full
        )
    if only in ways:
        return ways
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        ways["opencv decode"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        torch.set_num_threads(1)
        ways["torchvision decode"] = lambda data: decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
        )
    return ways


def _threads_rate(way: Any, files: list[bytes], threads: int, seconds: float) -> float:
    """Images a second on so many threads, each taking the next file until the time is up."""
    counts, stop = [0] * threads, time.perf_counter() + seconds

    def loop(number: int) -> None:
        index = number
        while time.perf_counter() < stop:
            way(files[index % len(files)])
            counts[number] += 1
            index += threads

    started = time.perf_counter()
    workers = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - started)


def _child(name: str, seconds: float, barrier: Any, queue: Any, number: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {mine[number % len(mine)]})
    way, files = _ways(name)[name], _files(64)
    way(files[0])
    barrier.wait()
    queue.put(_threads_rate(way, files, 1, seconds))


def _processes_rate(name: str, processes: int, seconds: float) -> float:
    import multiprocessing

    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(processes), context.Queue()
    children = [
        context.Process(target=_child, args=(name, seconds, barrier, queue, number)) for number in range(processes)
    ]
    for child in children:
        child.start()
    total = sum(queue.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    return float(total)


def decode(options: Any) -> None:
    """Decode rates by threads and processes; in processes of its own, so that the interpreter's lock does not count."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, 2, min(4, cores), min(8, cores), cores} if not TINY else {1, min(2, cores)})
    seconds = options.seconds if not TINY else 0.3
    found: dict[str, Any] = {}
    plans: dict[str, list[int]] = {"ours full": counts, "ours fast": counts}
    if importlib.util.find_spec("simplejpeg"):
        plans["simplejpeg decode"] = sorted({1, cores})
    for name, processes_counts in plans.items():  # processes first: forked before any thread is started
        for processes in processes_counts:
            found.setdefault(name, {})[f"{processes} processes"] = number(
                attempt(_processes_rate, name, processes, seconds)
            )
    files, ways = _files(64), _ways()
    for name, way in ways.items():
        for threads in counts if name in ("ours full", "ours fast") else sorted({1, cores}):
            found.setdefault(name, {})[f"{threads} threads"] = number(
                attempt(_threads_rate, way, files, threads, seconds)
            )
    save("decode", {"rates": found, "cores": cores, "pixels": SIDE})
    for name, rates in found.items():
        say(f"decode {name}: {rates}")


# ----------------------------------------------------------------------------------------------------- networks
def network_of(backbone: str, precision: str = "float32", device: str = DEVICE, **more: Any) -> Any:
    from features.networks.network import resolve_network
    from features.recipe import NetworkOptions

    options = {"weights": WEIGHTS[backbone], "engine": "keras", "precision": precision, "device": device, **more}
    return resolve_network(NetworkOptions(backbone, image_size=(SIDE, SIDE), **options))


def pixels_of(count: int) -> np.ndarray:
    from features.pixels.decode import decode_image

    path = WORK / f"pixels-{count}.npy"
    if not path.exists():
        files = _files(count)
        np.save(path, np.stack([decode_image(data, _rule()).pixels for data in files]))
    return np.asarray(np.load(path))


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


CHECKED = 4 if TINY else 32


def reference(_: Any) -> None:
    """Features on the processors in float32, without a GPU in sight: what everything is compared with."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    found = {}
    for backbone in ("mobilenetv2", "vgg16"):
        network = network_of(backbone, device="cpu")
        engine = network.engine(network.recipes, batch_size=CHECKED, device="cpu")
        started = time.perf_counter()
        (features,) = engine(pixels_of(CHECKED)).values()
        found[backbone] = time.perf_counter() - started
        np.save(WORK / f"reference-{backbone}.npy", features)
    save("reference", {"device": "cpu", "seconds": found, "images": CHECKED})
    say("reference on the processors", {name: f"{seconds:.1f} s" for name, seconds in found.items()})


def _backend() -> str:
    import keras

    return str(keras.backend.backend())


def _wait(value: Any) -> None:
    if _backend() == "torch":
        import torch

        if GPU:
            torch.cuda.synchronize()
    elif _backend() == "jax":
        import jax

        jax.block_until_ready(value)


def rate_of(function: Any, batch: int, seconds: float) -> float:
    """Images a second: as many calls as fit, waited for at the end; the median of several such rounds."""
    _wait(function())
    started = time.perf_counter()
    _wait(function())
    once = max(time.perf_counter() - started, 1e-6)
    repeats, rounds = max(1, min(200, int(seconds / 3 / once))), []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(repeats):
            value = function()
        _wait(value)
        rounds.append(batch * repeats / (time.perf_counter() - started))
    return statistics.median(rounds)


def peak_mb() -> Any:
    if not GPU:
        return None
    if _backend() == "torch":
        import torch

        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return number(peak)
    import jax

    return number(jax.devices()[0].memory_stats().get("peak_bytes_in_use", 0) / 2**20)


def _free() -> None:
    import gc

    gc.collect()
    if GPU and _backend() == "torch":
        import torch

        torch.cuda.empty_cache()


def forward(options: Any) -> None:
    """The product's engine: right? How fast, bytes in and features out; and the network alone, bytes already there."""
    from features.networks.backend import load_keras

    started = time.perf_counter()
    keras = load_keras()
    backbone, backend = options.backbone, _backend()
    expected = np.load(WORK / f"reference-{backbone}.npy")
    half = ("bfloat16",) if TINY or backend == "jax" else ("bfloat16", "float16")  # JAX compiles each for many seconds
    batches = [64, 256, 512] if backbone == "mobilenetv2" else [64, 256]
    batches = [4] if TINY else [256] if backend == "jax" else batches
    document: dict[str, Any] = {
        "backend": backend,
        "backbone": backbone,
        "load_keras_s": number(time.perf_counter() - started),
        "rows": [],
    }
    name = f"forward-{backend}-{backbone}"
    for precision in ("float32", *half):
        row: dict[str, Any] = {
            "precision": precision,
            "difference": {},
            "engine": {},
            "resident": {},
            "build_s": {},
            "first_call_s": {},
        }
        document["rows"].append(row)
        for batch in batches:

            def measure(batch: int = batch, precision: str = precision, row: dict[str, Any] = row) -> None:
                started = time.perf_counter()
                network = network_of(backbone, precision)
                engine = network.engine(network.recipes, batch_size=batch, device=DEVICE)
                row["where"] = engine.device
                images = np.resize(pixels_of(CHECKED), (batch, SIDE, SIDE, 3))
                row["build_s"][batch] = number(time.perf_counter() - started, 2)
                started = time.perf_counter()
                (features,) = engine(images).values()
                row["first_call_s"][batch] = number(time.perf_counter() - started, 2)
                count = min(CHECKED, batch)
                row["difference"][batch] = relative(features[:count], expected[:count])
                row["engine"][batch] = number(rate_of(lambda: engine(images), batch, options.seconds))
                row["graph"] = engine._graph is not None
                with engine._scope():
                    there = keras.ops.convert_to_tensor(images, dtype="uint8")
                    alone = engine._graph.replay if row["graph"] else lambda: engine._forward(there)
                    row["resident"][batch] = number(rate_of(alone, batch, options.seconds))

            error = attempt(measure)
            if error:
                row.setdefault("errors", {})[batch] = error
            _free()
            save(name, {**document, "peak_mb": peak_mb()})
        say(f"{name} {row}")


def variants(options: Any) -> None:
    """What could be gained with torch: BatchNorm folded, a CUDA graph, torch.compile, TensorFloat-32. Bytes already on the device."""
    import keras
    import torch

    from features.networks.backbones import feature_model, preprocess
    from features.networks.backend import exact_float32, place_of
    from features.networks.folding import fold_batch_norms
    from features.networks.keras_engine import compute_in

    backbone = options.backbone
    expected = np.load(WORK / f"reference-{backbone}.npy")
    batch = 256 if not TINY else 4
    found: dict[str, Any] = {}
    name = f"variants-torch-{backbone}"
    images = np.resize(pixels_of(CHECKED), (batch, SIDE, SIDE, 3))
    there = torch.from_numpy(images.copy()).to("cuda" if GPU else "cpu")

    def built(fold: bool, precision: str) -> Any:
        exact_float32()
        network = network_of(backbone)
        model = feature_model(network.load(), [(item.layer, item.pooling) for item in network.recipes])
        prepare = preprocess(network.backbone.preprocessing)
        if fold:
            with keras.device(place_of(DEVICE)):
                sample = keras.ops.convert_to_numpy(
                    prepare(keras.ops.cast(keras.ops.convert_to_tensor(images[:2]), "float32"))
                )
                model = fold_batch_norms(model, sample)
        if precision in ("bfloat16", "float16"):
            compute_in(model, precision)
        if precision == "tf32":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True

        def prepared(values: Any) -> Any:
            return prepare(keras.ops.cast(values, "float32"))

        def run(values: Any) -> Any:
            out = model(values, training=False)
            return out[0] if isinstance(out, list | tuple) else out

        return prepared, run

    def graphed(prepared: Any, run: Any) -> Any:
        static = prepared(there).clone()  # outside the graph: preprocessing of VGG16 copies its means from the host
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(3):
                run(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            out = run(static)

        def replay(values: Any) -> Any:
            static.copy_(prepared(values))
            graph.replay()
            return out

        return replay

    plans = [
        ("eager", p, f)
        for f in (False, True)
        for p in (("float32", "bfloat16") if TINY else ("float32", "tf32", "bfloat16", "float16"))
    ]
    plans += [("graph", p, True) for p in ("tf32", "bfloat16")] if GPU else []
    plans += [("compile", p, True) for p in (("float32",) if TINY else ("bfloat16",))] if options.compile else []
    plans += [("compile+graph", "bfloat16", True)] if GPU and options.compile else []
    for way, precision, fold in plans:

        def measure(way: str = way, precision: str = precision, fold: bool = fold) -> Any:
            prepared, run = built(fold, precision)
            started = time.perf_counter()
            if way.startswith("compile"):
                run = torch.compile(run, dynamic=False)
            with torch.inference_mode():
                run(prepared(there))
                whole = graphed(prepared, run) if way.endswith("graph") else lambda values: run(prepared(values))

            def call() -> Any:
                with torch.inference_mode():
                    return whole(there)

            out = call()
            _wait(out)
            first = time.perf_counter() - started
            values = out.float().cpu().numpy()[: min(CHECKED, batch)]
            return {
                "images_s": number(rate_of(call, batch, options.seconds)),
                "difference": relative(values, expected[: len(values)]),
                "first_call_s": number(first, 2),
                "peak_mb": peak_mb(),
            }

        key = f"{way} {precision}{' folded' if fold else ''}"
        found[key] = attempt(measure)
        say(f"{name} {key}: {found[key]}")
        _free()
        save(name, {"batch": batch, "rows": found})


def ideal(options: Any) -> None:
    """torchvision's own network, channels last, no Keras: how fast can this card be?"""
    import torch
    import torchvision

    found: dict[str, Any] = {}
    device = "cuda" if GPU else "cpu"
    batch = 256 if not TINY else 4
    os.environ.setdefault("KERAS_BACKEND", "torch")
    for name, make in (
        ("mobilenetv2", lambda: torchvision.models.mobilenet_v2(weights=None).features),
        ("vgg16", lambda: torchvision.models.vgg16(weights=None).features),
    ):
        for precision, dtype in (("tf32", torch.float32), ("bfloat16", torch.bfloat16)):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True

            def measure(make: Any = make, dtype: Any = dtype) -> Any:
                from torch.fx.experimental.optimization import fuse

                model = fuse(make().eval())
                model = model.to(device, dtype, memory_format=torch.channels_last)
                x = torch.randn(batch, 3, SIDE, SIDE, device=device, dtype=dtype).to(memory_format=torch.channels_last)
                result = {}
                with torch.inference_mode():
                    result["eager"] = number(rate_of(lambda: model(x), batch, options.seconds))
                    if GPU:
                        graph = torch.cuda.CUDAGraph()
                        for _ in range(3):
                            model(x)
                        torch.cuda.synchronize()
                        with torch.cuda.graph(graph):
                            model(x)
                        result["graph"] = number(rate_of(graph.replay, batch, options.seconds))
                    if options.compile and not TINY:
                        fast = torch.compile(model)
                        result["compile"] = number(rate_of(lambda: fast(x), batch, options.seconds))
                return result

            found[f"{name} {precision}"] = attempt(measure)
            say(f"ideal {name} {precision}: {found[f'{name} {precision}']}")
            save("ideal", {"batch": batch, "rows": found})


def nvjpeg(options: Any) -> None:
    """torchvision's decoder on the card: rate, and how far its pixels are from libjpeg's."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    device = "cuda" if GPU else "cpu"
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in _files(256 if not TINY else 8)]
    found: dict[str, Any] = {}

    def once() -> Any:
        return decode_jpeg(files, ImageReadMode.RGB, device=device)

    from PIL import Image

    pictures = once()
    levels = []
    for data, picture in zip(_files(32), pictures, strict=False):
        mine = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        levels.append(np.abs(mine - picture.permute(1, 2, 0).cpu().numpy().astype(int)))
    found["mean_levels"] = number(np.mean([item.mean() for item in levels]), 3)
    found["largest_level"] = int(max(item.max() for item in levels))
    os.environ.setdefault("KERAS_BACKEND", "torch")
    found["images_s"] = number(rate_of(once, len(files), options.seconds))
    save("nvjpeg", found)
    say("nvjpeg", found)


# --------------------------------------------------------------------------------------------------- end to end
class Stub:
    """An engine that costs nothing: what is left is reading, decoding, batching and writing."""

    concurrent, name = False, "stub"

    def __init__(self, network: Any) -> None:
        self._names = [recipe.name for recipe in network.recipes]

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.zeros((len(images), 1280), np.float32) for name in self._names}


class Watch:
    """The card's load while something runs, as its driver tells it, ten times a second."""

    def __enter__(self) -> Watch:
        self.loads: list[int] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        with contextlib.suppress(Exception):
            if GPU:
                import pynvml

                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByIndex(0)

                def look() -> None:
                    while not self._stop.wait(0.1):
                        self.loads.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

                self._thread = threading.Thread(target=look, daemon=True)
                self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def load(self) -> Any:
        return number(statistics.mean(self.loads)) if self.loads else None


def _extraction(images: Path, out: Path, **options: Any) -> Any:
    from features.extraction.extraction import prepare
    from features.extraction.options import ExtractionOptions

    network = options.pop("backbone", "mobilenetv2")
    weights = WEIGHTS[options.pop("of", "mobilenetv2")]
    chosen = ExtractionOptions(network, weights=weights, image_size=SIDE, engine="keras", **options)
    return prepare(str(images), out, chosen)


def _run(name: str, extraction: Any) -> dict[str, Any]:
    with Watch() as watch:
        started, processor = time.perf_counter(), time.process_time()
        result = extraction.run()
        seconds = time.perf_counter() - started
    found = {
        "images_s": number(result.inferred / seconds),
        "images": result.inferred,
        "seconds": number(seconds, 2),
        "processors_used": number((time.process_time() - processor) / seconds, 2),
        "gpu_load": watch.load,
    }
    say(f"{name}: {found}")
    return found


def stub(options: Any) -> None:
    """The pipeline without a network: what threads of one process can decode and batch."""
    from bench_extract import WarmNetwork

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {}
    for decode_way in ("full", "fast"):
        for workers in sorted({1, 4, 8, cores, 2 * cores}) if not TINY else (1, 2):
            out = WORK / "stub.h5"
            extraction = _extraction(
                _part(workers * 400 if not TINY else 16),
                out,
                decode=decode_way,
                workers=workers,
                batch_size=256 if not TINY else 8,
                device="cpu",
            )
            extraction.network = WarmNetwork(extraction.network, Stub(extraction.network))
            key = f"{decode_way}, {workers} threads"
            found[key] = attempt(_run, f"stub {key}", extraction)
            out.unlink(missing_ok=True)
    save("stub", {"rows": found, "cores": cores})


def _part(count: int) -> Path:
    """A folder of the first so many files, hard links."""
    paths = sorted(BIG.rglob("*.jpg"), key=lambda path: path.name)[: max(count, 4)]
    folder = WORK / f"part-{len(paths)}"
    if not folder.exists():
        for path in paths:
            target = folder / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    return folder


def endtoend(options: Any) -> None:
    """From JPEG files to a finished store; the network is built and warm before."""
    from bench_extract import warm_up

    from features.networks.backend import load_keras

    load_keras()
    backend = _backend()
    cores = len(os.sched_getaffinity(0))
    name = f"endtoend-{backend}"
    plans: list[dict[str, Any]] = [
        {"precision": "float32", "batch_size": 32},
        {"precision": "float32", "batch_size": 256},
        {"precision": "bfloat16", "batch_size": 256},
        {"precision": "bfloat16", "batch_size": 256, "decode": "fast"},
        {"precision": "bfloat16", "batch_size": 256, "workers": 2 * cores},
        {"precision": "bfloat16", "batch_size": 512},
        {"of": "vgg16", "backbone": "vgg16", "precision": "bfloat16", "batch_size": 128},
        {"of": "vgg16", "backbone": "vgg16", "precision": "float32", "batch_size": 128},
    ]
    if TINY:
        plans = [
            {"precision": "float32", "batch_size": 8},
            {"precision": "bfloat16", "batch_size": 8, "decode": "fast"},
        ]
    if options.few:
        plans = plans[2:4] if not TINY else plans[:1]
    images = _part(options.count if not TINY else 24)
    found: dict[str, Any] = {}
    for plan in plans:

        def measure(plan: dict[str, Any] = plan) -> Any:
            out = WORK / f"{name}.h5"
            out.unlink(missing_ok=True)
            batch = plan["batch_size"]
            extraction = _extraction(images, out, device=DEVICE, **plan)
            warm_up(extraction, SIDE, batch_size=batch, device=DEVICE)
            found_here = _run(f"{name} {plan}", extraction)
            out.unlink(missing_ok=True)
            return {**found_here, "peak_mb": peak_mb()}

        found[json.dumps(plan)] = attempt(measure)
        if isinstance(found[json.dumps(plan)], str):
            say(name, plan, found[json.dumps(plan)])
        _free()
        save(name, {"rows": found, "images": str(images)})


def command(
    name: str, *arguments: str, environment: dict[str, str] | None = None, limit: float = 120
) -> dict[str, Any]:
    """One command of the product in a process of its own: seconds, exit code, its JSON or the end of what it said."""
    started = time.perf_counter()
    if os.environ.get("INPROC") == "1":  # a rehearsal on a busy machine: no new process, nothing imported again
        from pipeline.cli import main as product

        out_text, err_text = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out_text), contextlib.redirect_stderr(err_text):
            code: Any = attempt(product, list(arguments))
        return _told(name, time.perf_counter() - started, code, out_text.getvalue(), err_text.getvalue())
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=limit * float(os.environ.get("SLOW", "1")),
            env={**os.environ, **(environment or {})},
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, out, err = 124, "", "timed out"
    return _told(name, time.perf_counter() - started, code, out, err)


FAILED: list[str] = []  # commands of this step: it is not done


def _told(name: str, seconds: float, code: Any, out: str, err: str) -> dict[str, Any]:
    document = None
    with contextlib.suppress(ValueError):
        document = json.loads(out)
    found = {
        "seconds": number(seconds, 2),
        "rc": code,
        "document": document,
        "stderr": err[-600:] if code or not document else err[-200:],
    }
    if code:
        FAILED.append(name)
    say(f"{name}: rc {code}, {seconds:.1f} s{'' if not code else ' ' + err[-300:]}")
    return found


def commands(options: Any) -> None:
    """The product's own commands, start-up included, under this backend."""
    backend = os.environ["KERAS_BACKEND"]
    w = ["--weights", WEIGHTS["mobilenetv2"], "--engine", "keras", "--image-size", str(SIDE)]
    out = WORK / f"commands-{backend}"
    out.mkdir(exist_ok=True)
    images, small = str(_part(options.count if not TINY else 24)), str(SMALL if not TINY else _part(24))
    batch = ["--batch-size", "256" if not TINY else "8"]
    found: dict[str, Any] = {}

    def step(name: str, *arguments: str, environment: dict[str, str] | None = None, limit: float = 120) -> None:
        found[name] = command(f"commands-{backend} {name}", *arguments, "--json", environment=environment, limit=limit)
        document = found[name]["document"]
        if isinstance(document, dict):  # keep what matters
            keep = (
                "inferred",
                "parity_gap",
                "before",
                "after",
                "minutes",
                "cached",
                "metrics",
                "run",
                "trainable_parameters",
                "rows",
                "ok",
            )
            found[name]["document"] = {key: document[key] for key in keep if key in document}
        save(f"commands-{backend}", {"rows": found})

    step(
        "extract many, bfloat16",
        "extract",
        images,
        "--out",
        str(out / "many.h5"),
        *w,
        *batch,
        "--precision",
        "bfloat16",
    )
    step("extract", "extract", small, "--out", str(out / "f.h5"), *w, "--check-precision", "32")
    step("verify", "verify", str(out / "f.h5"))
    step("train logistic", "train-head", str(out / "f.h5"), "--head", "logistic", "--runs", str(out / "logistic"))
    step("train dense", "train-head", str(out / "f.h5"), "--head", "dropout-linear", "--runs", str(out / "runs"))
    step("boundary", "extract", small, "--out", str(out / "b.h5"), *w, "--layer", "boundary")
    tune = ["finetune", str(out / "runs"), "--patience", "0", "--learning-rate", "1e-5"]
    step("finetune cache 1", *tune, "--from-cache", str(out / "b.h5"), "--epochs", "1", "--runs", str(out / "t1"))
    step(
        "finetune cache 9",
        *tune,
        "--from-cache",
        str(out / "b.h5"),
        "--epochs",
        "3" if TINY else "9",
        "--runs",
        str(out / "t9"),
    )
    step(
        "finetune end to end 1",
        *tune,
        "--images",
        small,
        "--augment",
        "flip",
        "--epochs",
        "1",
        "--runs",
        str(out / "e1"),
    )
    step(
        "finetune end to end 5",
        *tune,
        "--images",
        small,
        "--augment",
        "flip",
        "--epochs",
        "2" if TINY else "5",
        "--runs",
        str(out / "e5"),
    )
    if GPU:
        step(
            "finetune mixed 9",
            *tune,
            "--from-cache",
            str(out / "b.h5"),
            "--epochs",
            "9",
            "--mixed-precision",
            "--runs",
            str(out / "m9"),
        )
    step("predict", "predict", str(out / "runs"), small, "--out", str(out / "p.csv"))
    found["predict"]["document"] = None
    save(f"commands-{backend}", {"rows": found})


def processes(options: Any) -> None:
    """Several worker processes share the one card: `--cluster local:N`, with the backend's usual memory and with little."""
    backend = os.environ["KERAS_BACKEND"]
    images = str(_part(options.count if not TINY else 24))
    found: dict[str, Any] = {}
    counts = (2, 4) if not TINY else (2,)
    small_memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if backend == "jax" else {}
    for number_of in counts:
        for label, more in [("as it is", {})] + ([("no preallocation", small_memory)] if small_memory else []):
            out = WORK / f"cluster-{backend}.h5"
            out.unlink(missing_ok=True)
            key = f"local:{number_of}, {label}"
            found[key] = command(
                f"processes-{backend} {key}",
                *("extract", images, "--out", str(out), "--weights", WEIGHTS["mobilenetv2"], "--engine", "keras"),
                *("--image-size", str(SIDE)),
                *(
                    "--precision",
                    "bfloat16",
                    "--batch-size",
                    "128" if not TINY else "8",
                    "--shard-rows",
                    "512" if not TINY else "8",
                ),
                *("--cluster", f"local:{number_of}", "--json"),
                environment=more,
                limit=60,
            )
            if isinstance(found[key]["document"], dict):
                found[key]["document"] = {"inferred": found[key]["document"].get("inferred")}
            save(f"processes-{backend}", {"rows": found})


def bank(options: Any) -> None:
    """200 linear heads and 24 with a hidden layer, side by side: seconds for the same training."""
    from features.networks.backend import load_keras

    load_keras()
    from features.networks.engines import choose_device
    from pipeline.heads.bank import BankHead, train_bank
    from pipeline.heads.bank_math import BankSpec

    generator = np.random.default_rng(0)
    rows, width = (4000, 1280) if not TINY else (200, 64)
    epochs = 10 if not TINY else 2
    X = generator.standard_normal((rows, width)).astype(np.float32)
    y = (X[:, :8].sum(axis=1) > 0).astype(int)
    found: dict[str, Any] = {"device": choose_device("auto"), "backend": _backend()}
    for name, hidden, count in (("200 linear", 0, 200), ("24 mlp-256", 256, 24)):
        heads = [
            BankHead(learning_rate=10 ** (-4 + 3 * k / count), weight_decay=1e-4, dropout=0.3 if k % 2 else 0.0, seed=k)
            for k in range(count if not TINY else 8)
        ]
        spec = BankSpec(classes=2, hidden=hidden, epochs=epochs, patience=0, batch_size=32)

        def measure(spec: Any = spec, heads: Any = heads) -> Any:
            started = time.perf_counter()
            results = train_bank(spec, heads, X, y, X[:400], y[:400], memory_bytes=8 << 30)
            seconds = time.perf_counter() - started
            return {
                "seconds": number(seconds, 2),
                "accuracy": number(max(max(item.history["val_accuracy"]) for item in results), 4),
            }

        found[name] = attempt(measure)
    save(f"bank-{_backend()}-{found['device']}", found)
    say("bank", found)


def logistic(options: Any) -> None:
    """Logistic regression by Keras against scikit-learn's own solver: seconds, and the probabilities' difference."""
    from sklearn.linear_model import LogisticRegression

    from features.networks.backend import load_keras
    from pipeline.heads.logistic import fit_logistic

    load_keras()
    generator = np.random.default_rng(0)
    rows, width, classes = (50_000, 1280, 100) if not TINY else (300, 32, 4)
    y = generator.integers(0, classes, rows)
    X = (generator.standard_normal((classes, width))[y] + 4 * generator.standard_normal((rows, width))).astype(
        np.float32
    )
    found: dict[str, Any] = {"rows": rows, "columns": width, "classes": classes}

    def pieces(size: int) -> Any:
        return (X[start : start + size] for start in range(0, rows, size))

    def fitted(name: str, fit: Any) -> np.ndarray:
        started = time.perf_counter()
        model = fit(LogisticRegression(C=0.01, max_iter=1000))
        found[name] = number(time.perf_counter() - started, 2)
        return np.asarray(model.predict_proba(X[:1000]))

    mine = fitted("keras_s", lambda model: fit_logistic(model, pieces, y, width))
    save(f"logistic-{_backend()}", found)
    # In float32, or with its own tolerance, scikit-learn's solver stops further from the minimum than 1e-4.
    theirs = fitted("scikit_learn_s", lambda model: model.set_params(tol=1e-6).fit(X.astype(np.float64), y))
    found["difference"] = float(np.abs(mine - theirs).max())
    save(f"logistic-{_backend()}", found)
    say("logistic", found)


def parity(options: Any) -> None:
    """Is the head's matrix product on this card float32, as the parity gate of 1e-4 supposes, or TensorFloat-32?"""
    import keras  # not by load_keras, which turns TensorFloat-32 off

    from features.networks.backend import exact_float32

    generator = np.random.default_rng(0)
    X, W = (
        generator.standard_normal((512, 1280)).astype(np.float32),
        (generator.standard_normal((1280, 8)) / 8).astype(np.float32),
    )
    exact = X.astype(np.float64) @ W

    def product() -> np.ndarray:
        return np.asarray(keras.ops.convert_to_numpy(keras.ops.matmul(keras.ops.convert_to_tensor(X), W)))

    before = relative(product(), exact)
    exact_float32()
    after = relative(product(), exact)
    found = {"as_it_starts": before, "after_exact_float32": after, "tf32_at_start": before > 1e-5}
    save(f"parity-{_backend()}", found)
    say(f"parity-{_backend()}", found)


def memory(options: Any) -> None:
    """Out of memory on purpose, with little memory allowed: does the engine halve its batches and go on?"""
    import logging

    logging.basicConfig(level=logging.WARNING)
    from features.networks.backend import is_out_of_memory, load_keras

    found: dict[int, Any] = {}
    if os.environ["KERAS_BACKEND"] == "torch" and GPU:
        import torch

        torch.cuda.set_per_process_memory_fraction(0.08)
    load_keras()
    backend = _backend()
    for batch in (256, 512, 1024, 2048) if GPU else (4,):
        network = network_of("vgg16")
        engine = network.engine(network.recipes, batch_size=batch, device=DEVICE)
        images = np.resize(pixels_of(CHECKED), (batch, SIDE, SIDE, 3))
        try:
            (features,) = engine(images).values()
            found[batch] = {
                "step": engine._step,
                "difference": relative(features[:CHECKED], np.load(WORK / "reference-vgg16.npy"))
                if batch >= CHECKED
                else None,
            }
        except Exception as error:  # noqa: BLE001
            found[batch] = {
                "error": f"{type(error).__name__}: {str(error)[:200]}",
                "recognised": is_out_of_memory(error),
            }
        say(f"memory-{backend} {batch}: {found[batch]}")
        save(f"memory-{backend}", {"rows": found})
        del engine
        _free()


def summary(_: Any) -> None:
    """Everything into one file, and the shares of the bound."""
    document: dict[str, Any] = {}
    for path in sorted(RESULTS.glob("*.json")):
        with contextlib.suppress(ValueError):
            document[path.stem] = json.loads(path.read_text())
    shares: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        rates = document["decode"]["rates"]
        best = {
            way: max(v for k, v in rates[f"ours {way}"].items() if isinstance(v, float | int))
            for way in ("full", "fast")
        }
        shares["decode_bound"] = best
        for backend in ("torch", "jax"):
            for plan_text, row in document.get(f"endtoend-{backend}", {}).get("rows", {}).items():
                if not isinstance(row, dict):
                    continue
                plan = json.loads(plan_text)
                backbone = plan.get("backbone", "mobilenetv2")
                raw = [
                    v
                    for item in document.get(f"forward-{backend}-{backbone}", {}).get("rows", [])
                    if item["precision"] == plan["precision"]
                    for v in item["resident"].values()
                    if isinstance(v, float | int)
                ]
                bound = min([best[plan.get("decode", "full")], *([max(raw)] if raw else [])])
                shares[f"{backend} {plan_text}"] = {
                    "images_s": row["images_s"],
                    "bound": bound,
                    "raw": max(raw, default=None),
                    "share": number(row["images_s"] / bound, 3),
                }
    document["shares"] = shares
    document["published"] = against_published(document)
    out = Path(os.environ.get("OUT", WORK))
    (out / "gpu.json").write_text(json.dumps(document, indent=1))
    say("---- shares of the bound (slower of raw forward and decoding on all processors)")
    for name, row in [*shares.items(), *document["published"].items()]:
        say(name, row)


PUBLISHED = {"mobilenetv2": 16293, "vgg16": 3852}  # images/s of the network alone: timm, RTX 4090, AMP, compiled


def against_published(document: dict[str, Any]) -> dict[str, Any]:
    """The best bfloat16 rates: the network alone, through the engine, and how many times what timm publishes."""
    found: dict[str, Any] = {}
    for backbone, published in PUBLISHED.items():
        for backend in ("torch", "jax"):
            rows = document.get(f"forward-{backend}-{backbone}", {}).get("rows", [])
            rates = {
                way: max((v for row in rows if row["precision"] == "bfloat16" for v in row[way].values()), default=None)
                for way in ("resident", "engine")
            }
            if rates["resident"]:
                times = number(rates["resident"] / published, 3)
                found[f"{backbone} bfloat16, {backend}"] = {**rates, "published": published, "times": times}
    return found


STEPS = {
    function.__name__: function
    for function in (
        env,
        data,
        ceilings,
        decode,
        reference,
        forward,
        variants,
        ideal,
        nvjpeg,
        stub,
        endtoend,
        commands,
        processes,
        bank,
        logistic,
        parity,
        memory,
        summary,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--backbone", default="mobilenetv2")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--few", action="store_true")
    options = parser.parse_args()
    if TINY:
        options.seconds = min(options.seconds, 0.3)
    STEPS[options.step](options)
    if FAILED:
        sys.exit(f"failed: {', '.join(FAILED)}")


if __name__ == "__main__":
    main()
