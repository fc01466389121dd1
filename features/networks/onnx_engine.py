"""The ONNX Runtime engine: runs the very graph of an ONNX file, and is what its conversion by OpenVINO is compared with."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import resource
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, check_batch
from features.machine import how_to_install, processors
from features.networks.onnx_graph import INPUT, output_name, shown
from features.recipe import Recipe

_limiting = threading.Lock()  # of two threads, one would restore what the other has set


def is_installed() -> bool:
    """Whether the package ``onnxruntime`` is installed; it is not imported."""
    found = importlib.util.find_spec("onnxruntime") if sys.modules.get("onnxruntime", True) else None
    return found is not None and found.origin is not None


def import_onnxruntime() -> Any:
    """Import ONNX Runtime with its telemetry off, here and in child processes.

    It would write a device id into the home folder and a session file into the temporary folder, and send events.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the library is loaded, so before the first import
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigurationError(
            f"an ONNX file needs ONNX Runtime, which is not installed: {how_to_install('onnx-backbones')}"
        ) from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def session_of(model: bytes, *, device: str = "cpu") -> Any:
    """Load a model; with ``device="gpu"`` on a CUDA GPU, and without TensorFloat-32, which multiplies with 10 bits.

    Raises
    ------
    ConfigurationError
        If ONNX Runtime cannot load the model, as when its operators are newer than the package; or if there is no GPU.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = processors()
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "gpu":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ConfigurationError(
                "device: a GPU was asked for, but this ONNX Runtime has none. Install onnxruntime-gpu, or use --device cpu"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
    return _load(model, options, providers)


def _load(model: bytes, options: Any, providers: Sequence[Any]) -> Any:
    onnxruntime = import_onnxruntime()
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # the classes of its errors are not public
        if is_memory_error(error):
            raise
        raise ConfigurationError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the network: {_reason(error)}"
        ) from error


def try_out(model: bytes, batches: Sequence[np.ndarray], count: int) -> list[list[np.ndarray]]:
    """Run a model that nobody has run before, with limits of memory and time, and return its outputs for each batch.

    A small file can ask for any amount of both. The limits grow with the size of the file and of the images, and are far
    above what networks need. The limit of memory is one of this process, and only on Linux.

    Raises
    ------
    ConfigurationError
        If the model cannot be loaded, refuses the images, or needs more than the limits.
    """
    onnxruntime = import_onnxruntime()
    pixels = max(images.size for images in batches) // 3
    memory = memory_of(len(model), pixels)
    seconds = (8 + 1e-7 * len(model)) * max(1, pixels / 224**2)
    options, running = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # which would compute constants
    options.intra_op_num_threads = processors()
    options.log_severity_level = running.log_severity_level = 4
    ended = threading.Event()

    def end() -> None:
        ended.set()
        running.terminate = True
        options.set_load_cancellation_flag(True)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        with limited_memory(memory):
            session = _load(model, options, ["CPUExecutionProvider"])
            return [run(session, images, count, running) for images in batches]
    except Exception as error:
        height, width = batches[0].shape[1:3]
        if ended.is_set() or is_memory_error(error):
            needed = f"{seconds:.0f} seconds" if ended.is_set() else f"{memory / 1e6:.0f} MB of memory"
            raise ConfigurationError(
                f"the network needs more than {needed} for {len(batches[0])} images of {height}x{width} pixels, which no "
                "network of its size does. Check where the file comes from, or export it again"
            ) from error
        raise
    finally:
        timer.cancel()


def memory_of(length: int, pixels: int) -> int:
    """Return how many bytes a model of so many bytes may take for images of so many pixels, far above what networks need."""
    return (1 << 30) + 4 * length + 4096 * pixels


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Limit the memory of this process to what it has now and ``more`` bytes, where the system can."""
    used = re.search(r"VmData:\s+(\d+) kB", _status())
    if used is None:
        yield
        return
    with _limiting:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([1024 * int(used[1]) + more, *limits]), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _status() -> str:
    try:
        return Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return ""


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ended: ONNX Runtime has no class of errors for that."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in ("memory", "bad_alloc"))


def run(session: Any, images: np.ndarray, count: int, options: Any = None) -> list[np.ndarray]:
    """Run a session on a batch and return its ``count`` outputs.

    Raises
    ------
    ConfigurationError
        If the network refuses the images, as those of a size that it was not made for.
    """
    try:
        names = [output_name(index) for index in range(count)]
        return [np.asarray(array) for array in session.run(names, {INPUT: images}, options)]
    except Exception as error:
        if is_memory_error(error) or (options is not None and options.terminate):
            raise
        height, width = images.shape[1:3]
        raise ConfigurationError(
            f"the network cannot take images of {height}x{width} pixels: {_reason(error)}. Give the size that it was made "
            "for with --image-size; it is often a multiple of its patches of 14, 16 or 32 pixels"
        ) from error


class OnnxRuntimeEngine:
    """A composed model as a function of batches.

    Parameters
    ----------
    model : bytes
        As ``features.networks.onnx_graph.composed`` makes it.
    recipes : sequence of Recipe
        The feature sets, one per output; they share the pixel rule.
    batch_size : int
        Largest number of images in one call.
    step : int or None
        Images per forward pass, where the model takes no other number; None for ``batch_size``.
    device : {"cpu", "gpu"}
        Where to run.
    """

    name = "onnxruntime"
    concurrent = False  # a batch uses all processors already

    def __init__(
        self, model: bytes, recipes: Sequence[Recipe], *, batch_size: int, step: int | None = None, device: str = "cpu"
    ) -> None:
        rule = recipes[0].pixels
        self.names = [recipe.name for recipe in recipes]
        self.device = device
        self.batch_size = batch_size
        self.images_inferred = 0
        self._fixed, self._step = step is not None, step or batch_size
        self._shape = (batch_size, rule.height, rule.width, 3)
        self._session = session_of(model, device=device)

    def __call__(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Compute the features of one batch; shapes and dtypes are those of ``features.networks.engines.Engine``."""
        check_batch(images, self._shape)
        parts = [self._infer(images[start : start + self._step]) for start in range(0, len(images), self._step)]
        self.images_inferred += len(images)
        return {name: np.concatenate(arrays) for name, arrays in zip(self.names, zip(*parts, strict=True), strict=True)}

    def _infer(self, images: np.ndarray) -> list[np.ndarray]:
        count = len(images)
        if self._fixed and count < self._step:
            images = np.concatenate([images, np.zeros((self._step - count, *images.shape[1:]), np.uint8)])
        return [array[:count].astype(np.float32, copy=False) for array in run(self._session, images, len(self.names))]


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # without places in its source
    line = re.sub(r"\S+\.(h|cc):\d+ (\S* ?\S+\(.*?\) )?", "", lines[0].rpartition(" : ")[2], count=1)
    newer = ". Update onnxruntime, or export the network again with a lower opset" if "version" in line.lower() else ""
    return shown(line.rstrip("."), 300) + newer
