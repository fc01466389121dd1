"""OpenVINO on CPUs: convert a backbone once, prove it against Keras, keep it; later starts need no Keras.

    open_engine: kept file -> recheck -> engine
                 else build with Keras -> convert -> prove -> keep -> engine

A kept file is 32 bytes of sha256, then an ``.npz``: model, weights, reference batch, Keras's outputs for it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import queue
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from features.canonical import canonical_json, digest_of
from features.errors import ConfigurationError, OpenVinoError, check_batch
from features.files import cache_folder, whole_file
from features.machine import processors
from features.networks.reference import reference_images, relative_difference
from features.recipe import Recipe

logger = logging.getLogger(__name__)

FORMAT = 1
# Largest relative L2 difference from Keras float32 on the reference batch. bfloat16 has 8 significant bits, which
# deep networks amplify (0.2 in MobileNetV2): its bound only tells rounding from a wrong result; what it
# costs is measured elsewhere.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.5}
_HINTS = {"float32": "f32", "bfloat16": "bf16"}
# Images of one request. The activations of few images stay in the processor's cache: with 4 instead of 32,
# MobileNetV2 was 1.15-1.3 times as fast and took half the memory.
_REQUEST_IMAGES = 4
_CHECKSUM_BYTES = 32


def is_installed() -> bool:
    """Whether the package ``openvino`` can be found; it is not imported."""
    found = importlib.util.find_spec("openvino") if sys.modules.get("openvino", True) else None
    return found is not None and found.origin is not None  # a mere folder of that name has none


def supports(precision: str) -> bool:
    """Whether this processor computes in that precision; OpenVINO would take float32 for it without saying so."""
    if precision == "float32":
        return True
    if precision not in _HINTS:
        return False
    try:
        return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except RuntimeError as error:
        raise OpenVinoError(f"OpenVINO cannot look at the processor: {_reason(error)}") from error


def open_engine(
    recipes: Sequence[Recipe],
    build: Callable[[], tuple[Any, Callable[[Any], Any]]],
    *,
    source: str,
    batch_size: int,
    precision: str = "float32",
    threads: int | None = None,
) -> OpenVinoEngine:
    """An engine from the kept file where there is a good one, else converted from Keras, proven and kept.

    Parameters
    ----------
    recipes : sequence of Recipe
        Data sets, one per output; they share the pixel rule.
    build : callable
        Gives the Keras model (float32 pixels after preprocessing -> one output per recipe) and the preprocessing.
        Called only if nothing good is kept.
    source : str
        sha256 of the weights or model file: tensors alone do not say what a model file does with them.
    batch_size, precision, threads
        See ``OpenVinoEngine``.

    Raises
    ------
    OpenVinoError
        If OpenVINO is missing, cannot convert the network, differs from Keras by more than ``TOLERANCES``, or the
        processor lacks the precision.
    """
    if not is_installed():
        raise OpenVinoError("OpenVINO is not installed (pip install openvino)")
    if not supports(precision):
        raise OpenVinoError(f"OpenVINO does not compute in {precision} on this processor")
    about = _about(recipes, source)
    path = cache_folder() / "openvino" / f"{digest_of(about)}.model"
    kept = _read(path, about)
    if kept is not None:
        try:
            return _proven(kept, recipes, batch_size, precision, threads)
        except (OpenVinoError, ConfigurationError, KeyError, ValueError) as error:
            logger.warning("%s is of no use here (%s); the network is converted again", path, error)
    model, preprocess = build()
    made = _convert(model, preprocess, recipes[0].pixels.height, recipes[0].pixels.width)
    engine = _proven(made, recipes, batch_size, "float32", threads)  # the strict bound, whatever is asked for
    if precision != "float32":
        engine = _proven(made, recipes, batch_size, precision, threads)
    _write(path, about, made)
    return engine


class OpenVinoEngine:
    """A converted model as a function of batches. Threads may call it at the same time.

    A batch is cut into requests of a few images that run side by side, one processor each: nothing waits at
    the end of every layer, which is what costs when decoding shares the processors. The last request of a
    batch is padded with zeros, so an image's features do not depend on its neighbours.

    Parameters
    ----------
    model, weights : uint8, (bytes,)
        The two files of OpenVINO's intermediate representation: uint8 (n, h, w, 3) -> one output per recipe.
    recipes : sequence of Recipe
        Data sets, one per output; they share the pixel rule.
    batch_size : int
        Most images of one call.
    precision : {"float32", "bfloat16"}
        Arithmetic inside; outputs are float32.
    threads : int, optional
        Processors to use; those of this process without it.
    """

    name = "openvino"
    device = "cpu"
    concurrent = True  # the end of one caller's batch runs beside the beginning of another's

    def __init__(
        self,
        model: np.ndarray,
        weights: np.ndarray,
        recipes: Sequence[Recipe],
        *,
        batch_size: int,
        precision: str = "float32",
        threads: int | None = None,
    ) -> None:
        openvino = _openvino()
        rule = recipes[0].pixels
        self.names = [recipe.name for recipe in recipes]
        self.batch_size = batch_size
        self.precision = precision
        self.images_inferred = 0
        self._lock = threading.Lock()
        threads = threads or processors()
        self._images = max(1, min(_REQUEST_IMAGES, batch_size // threads))
        self._shape = (batch_size, rule.height, rule.width, 3)
        streams = min(threads, -(-batch_size // self._images))
        try:
            core = openvino.Core()
            graph = core.read_model(model.tobytes(), openvino.Tensor(weights))
            graph.reshape([self._images, *self._shape[1:]])
            compiled = core.compile_model(
                graph,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": _HINTS[precision],  # the default is bfloat16 where there is one
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": threads,
                    "ENABLE_CPU_PINNING": False,  # decoding runs on the same processors
                },
            )
            self._ports = [compiled.output(_output(index)) for index in range(len(recipes))]
        except RuntimeError as error:
            raise OpenVinoError(f"OpenVINO cannot load the network: {_reason(error)}") from error
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(compiled.create_infer_request())
        self._workers = ThreadPoolExecutor(streams, "openvino")

    def __call__(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Features of one batch.

        Parameters
        ----------
        images : uint8, (n, h, w, 3), 0-255, n <= batch_size
            RGB pixels.

        Returns
        -------
        dict of str to float32, (n, ...)
            Features by data set.
        """
        count = len(images)
        check_batch(images, self._shape)
        arrays = [np.empty((count, *tuple(port.shape)[1:]), np.float32) for port in self._ports]
        starts = range(0, count, self._images)
        for _ in self._workers.map(lambda start: self._infer(images, start, arrays), starts):
            pass  # raises what a request raised
        with self._lock:
            self.images_inferred += count
        return dict(zip(self.names, arrays, strict=True))

    def _infer(self, images: np.ndarray, start: int, arrays: list[np.ndarray]) -> None:
        part = np.ascontiguousarray(images[start : start + self._images])
        count = len(part)
        if count < self._images:
            part = np.concatenate([part, np.zeros((self._images - count, *part.shape[1:]), np.uint8)])
        request = self._requests.get()
        try:
            request.infer({0: part}, share_inputs=True, share_outputs=True)
            for port, array in zip(self._ports, arrays, strict=True):
                array[start : start + count] = request.get_tensor(port).data[:count]
        finally:
            self._requests.put(request)


# ------------------------------------------------------------------------------------------ convert and prove
def _convert(model: Any, preprocess: Callable[[Any], Any], height: int, width: int) -> dict[str, np.ndarray]:
    """The arrays of a kept file, from Keras."""
    import keras

    _openvino()
    images = keras.Input((height, width, 3), dtype="uint8", name="images")
    # Preprocessing is part of the graph: only bytes go in.
    outputs = model(preprocess(keras.ops.cast(images, "float32")), training=False)
    listed = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    # By name, because conversion does not keep their order.
    whole = keras.Model(images, {_output(index): output for index, output in enumerate(listed)})
    batch = reference_images(height, width)
    with keras.device("cpu:0"):
        expected = whole(keras.ops.convert_to_tensor(batch), training=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        level = logging.getLogger().level
        try:
            whole.export(str(path), format="openvino", verbose=False)
            files = [np.frombuffer(file.read_bytes(), np.uint8) for file in (path, path.with_suffix(".bin"))]
        except Exception as error:  # the converters raise whatever they meet, plain Exception too
            raise OpenVinoError(f"OpenVINO cannot convert {model.name}: {_reason(error)}") from error
        finally:
            logging.getLogger().setLevel(level)  # a failed conversion leaves it so high that warnings are lost
    kept = {"model": files[0], "weights": files[1], "batch": batch}
    return kept | {name: keras.ops.convert_to_numpy(value).astype(np.float32) for name, value in expected.items()}


def _proven(
    kept: Mapping[str, np.ndarray], recipes: Sequence[Recipe], batch_size: int, precision: str, threads: int | None
) -> OpenVinoEngine:
    """An engine that gives Keras's outputs for the reference batch, or OpenVinoError."""
    engine = OpenVinoEngine(
        kept["model"], kept["weights"], recipes, batch_size=batch_size, precision=precision, threads=threads
    )
    batch = kept["batch"]
    parts = [engine(batch[start : start + batch_size]) for start in range(0, len(batch), batch_size)]
    for index, name in enumerate(engine.names):
        found = relative_difference(np.concatenate([part[name] for part in parts]), kept[_output(index)])
        if not found <= TOLERANCES[precision]:
            raise OpenVinoError(
                f"{name}: OpenVINO {precision} differs from Keras by {found:.2g} (relative L2), at most "
                f"{TOLERANCES[precision]:g} is allowed"
            )
    engine.images_inferred = 0
    return engine


# -------------------------------------------------------------------------------------------------- kept files
def _about(recipes: Sequence[Recipe], source: str) -> dict[str, Any]:
    """What decides the converted model; precision, batch size, resizing and stored dtype do not."""
    rule = recipes[0].pixels
    return {
        "format": FORMAT,
        "source": source,
        "size": [rule.height, rule.width],
        "outputs": [[item.backbone, item.weights, item.layer, item.pooling, item.preprocessing] for item in recipes],
        "versions": {name: importlib.metadata.version(name) for name in ("keras", "openvino")},
    }


def _read(path: Path, about: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """The arrays of a kept file whose checksum holds; None if there is none, with a warning if it is damaged."""
    try:
        with open(path, "rb") as file:
            promised = file.read(_CHECKSUM_BYTES)
            if hashlib.file_digest(file, "sha256").digest() != promised:
                raise ValueError("checksum differs")
            file.seek(_CHECKSUM_BYTES)
            with np.load(file, allow_pickle=False) as archive:
                kept = {name: archive[name] for name in archive.files}
        if json.loads(kept.pop("about").tobytes()) != about:
            raise ValueError("it is about something else")
        return kept
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s); the network is converted again", path, error)
        return None


def _write(path: Path, about: Mapping[str, Any], kept: Mapping[str, np.ndarray]) -> None:
    arrays = {"about": np.frombuffer(canonical_json(about).encode("ascii"), np.uint8), **kept}
    archive = io.BytesIO()
    np.savez(archive, **arrays)  # type: ignore[arg-type]
    try:
        with whole_file(path) as file:
            file.write(hashlib.sha256(archive.getbuffer()).digest())
            file.write(archive.getbuffer())
    except OSError as error:  # it only saves time
        logger.warning("%s could not be written (%s); the next start converts again", path, error)


def _openvino() -> Any:
    """Import OpenVINO. Its package reports every import and conversion over the network where it finds this module."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino

        _ = openvino.Core
    except (ImportError, AttributeError, OSError) as error:
        raise OpenVinoError(f"OpenVINO is installed and cannot be imported: {_reason(error)}") from error
    return openvino


def _output(index: int) -> str:
    return f"output_{index}"


def _reason(error: BaseException) -> str:
    """The line of a long message that says most: what has no rule, else the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "No conversion rule" in line), lines[-1])
