"""The OpenVINO engine for CPUs. A network is converted once and cached; later starts do not need Keras.

    open_engine: cached file -> check against the outputs of Keras or ONNX Runtime -> engine
                 else convert -> check -> write to the cache -> engine

A cached file is signed (``features.cache``) and holds an ``.npz``: model, weights, reference batch, the outputs for it of
the library that the network came from and, if the model takes only batches of one size, that size. The check is noted by
the signature of the file, and repeated on another processor, with another precision or another number of images per pass.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import queue
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from features.cache import cache_path, keep_json, kept_json, seal_of, signed_file, write_signed
from features.canonical import canonical_json, digest_of
from features.errors import ConfigurationError, OpenVinoError, check_batch
from features.files import enough_room
from features.machine import how_to_install, processor, processors
from features.networks.backend import place_of
from features.networks.reference import reference_images, relative_difference
from features.networks.sizes import Size, kin, reaches, shape_at
from features.recipe import PixelRule, Recipe
from features.temporary import system_folder

logger = logging.getLogger(__name__)

FORMAT = 3
# Largest accepted relative L2 difference from Keras float32 on the reference batch. Deep networks amplify the rounding
# of bfloat16 to 8 significant bits (0.2 in MobileNetV2), so its bound only tells rounding from a wrong result; the
# effect on accuracy is measured by ``features.extraction.precision``.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.5}
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # int8: of what is not quantised
_OTHER = "other"  # array of a cached file: reference images of a second size
# Images per inference request. The activations of a few images fit into the processor's cache: with 4 instead of 32,
# MobileNetV2 was 1.15-1.3 times as fast and used half the memory.
_REQUEST_IMAGES = 4


def is_installed() -> bool:
    """Whether the package ``openvino`` is installed; it is not imported."""
    found = importlib.util.find_spec("openvino") if sys.modules.get("openvino", True) else None
    return found is not None and found.origin is not None  # a folder that happens to have this name has no origin


def supports(precision: str) -> bool:
    """Whether OpenVINO computes in this precision on this processor; if not, it would silently use float32."""
    if precision == "float32":
        return True
    if precision not in _HINTS:
        return False
    try:
        return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except RuntimeError as error:
        raise OpenVinoError(f"OpenVINO cannot query the processor: {reason(error)}") from error


def open_engine(
    recipes: Sequence[Recipe],
    convert: Callable[[], dict[str, np.ndarray]],
    *,
    source: str,
    by: str = "keras",
    batch_size: int,
    precision: str = "float32",
    threads: int | None = None,
) -> OpenVinoEngine:
    """Open an engine from a usable file in the cache; otherwise convert the network, check it and cache it.

    Parameters
    ----------
    recipes : sequence of Recipe
        The feature sets, one per output; they share the pixel rule.
    convert : callable
        Returns the arrays of a cached file, as ``from_keras`` or ``from_onnx``. Called only if there is no usable file.
    source : str
        sha256 of the weights or model file: the tensors alone do not determine what a model file computes.
    by : {"keras", "onnxruntime"}
        Package whose outputs the conversion must reproduce.
    batch_size, precision, threads
        See ``OpenVinoEngine``.

    Raises
    ------
    OpenVinoError
        If OpenVINO is missing, cannot convert the network, differs from the original by more than ``TOLERANCES``, or does
        not support the precision on this processor.
    """
    if not is_installed():
        raise OpenVinoError(f"OpenVINO is not installed; install it with {how_to_install('openvino')}")
    if not supports(precision):
        raise OpenVinoError(f"OpenVINO does not compute in {precision} on this processor")
    asked = _Asked(recipes, batch_size, precision, threads)
    about, of_kin = _keys(recipes, source, by)
    for key in (about, of_kin):
        if (kept := _kept_engine(key, asked)) is not None:
            return kept
    made = convert()
    for each in dict.fromkeys(("float32", precision)):  # always checked against the strict bound
        engine = dataclasses.replace(asked, precision=each).open(made)
        _check(engine, made, asked)
    seal = _write(of_kin if _serves_kin(made, asked) else about, made)
    if seal is not None:
        _note_proof(engine, seal)
    return engine


def conversion(
    recipes: Sequence[Recipe], convert: Callable[[], dict[str, np.ndarray]], *, source: str, by: str
) -> Mapping[str, np.ndarray]:
    """Return the arrays of a cached file, made and proven if there is none; parameters and errors as of ``open_engine``."""
    made: list[dict[str, np.ndarray]] = []

    def converting() -> dict[str, np.ndarray]:
        made.append(convert())
        return made[-1]

    engine = open_engine(recipes, converting, source=source, by=by, batch_size=_REQUEST_IMAGES)
    for key in _keys(recipes, source, by):
        if not made and (found := _usable(key, engine.size)) is not None:
            return found[0]
    if not made:
        raise OpenVinoError("the conversion of the network was removed from the cache meanwhile; run again")
    return made[-1]


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What an engine is opened for; see ``open_engine``."""

    recipes: Sequence[Recipe]
    batch_size: int
    precision: str
    threads: int | None

    @property
    def size(self) -> Size:
        """Height and width of the images in pixels."""
        return self.recipes[0].pixels.height, self.recipes[0].pixels.width

    def open(self, kept: Mapping[str, np.ndarray]) -> OpenVinoEngine:
        """Open an engine with a kept network."""
        return OpenVinoEngine(
            kept["model"],
            kept["weights"],
            self.recipes,
            batch_size=self.batch_size,
            precision=self.precision,
            threads=self.threads,
            step=int(kept["step"][0]) if "step" in kept else None,
        )

    def at(self, size: Size) -> _Asked:
        """The same for images of another height and width."""
        rule = PixelRule(*size)
        return dataclasses.replace(self, recipes=[dataclasses.replace(item, pixels=rule) for item in self.recipes])


class OpenVinoEngine:
    """A converted network as a function of batches; several threads may call it at the same time.

    A batch is divided into requests of a few images, which run in parallel on one processor core each. The cores
    therefore do not wait for each other after every layer, which would be slow while decoding uses the same cores.
    The last request of a batch is padded with zeros, so the features of an image do not depend on its neighbours.

    Parameters
    ----------
    model, weights : uint8, (bytes,)
        The two files of OpenVINO's intermediate representation; the model takes uint8 (n, h, w, 3) and has one output
        per recipe.
    recipes : sequence of Recipe
        The feature sets, one per output; they share the pixel rule.
    batch_size : int
        Largest number of images in one call.
    precision : {"float32", "bfloat16", "int8"}
        Arithmetic of the forward pass; the outputs are float32. For ``int8`` the model is a quantised one.
    threads : int, optional
        Number of processor cores to use; by default, all that this process may use.
    step : int, optional
        Images in one request, if the model takes no other number.
    outputs : sequence of int, optional
        Number of the model's output for each recipe; by default, they are in the same order.
    """

    name = "openvino"
    device = "cpu"
    concurrent = True  # the end of one batch overlaps with the beginning of the next

    def __init__(
        self,
        model: np.ndarray,
        weights: np.ndarray,
        recipes: Sequence[Recipe],
        *,
        batch_size: int,
        precision: str = "float32",
        threads: int | None = None,
        step: int | None = None,
        outputs: Sequence[int] | None = None,
    ) -> None:
        openvino = import_openvino()
        rule = recipes[0].pixels
        self.names = [recipe.name for recipe in recipes]
        self.batch_size = batch_size
        self.precision = precision
        self.images_inferred = 0
        self._lock = threading.Lock()
        threads = threads or processors()
        self.images_per_pass = images_per_pass(batch_size, threads, step)
        self.size = rule.height, rule.width
        self._shape = (batch_size, *self.size, 3)
        streams = min(threads, -(-batch_size // self.images_per_pass))
        try:
            core = openvino.Core()
            graph = core.read_model(model.tobytes(), openvino.Tensor(weights))
            graph.reshape([self.images_per_pass, *self._shape[1:]])
            compiled = core.compile_model(
                graph,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": _HINTS[precision],  # the default is bfloat16 if supported
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": threads,
                    "ENABLE_CPU_PINNING": False,  # decoding runs on the same cores
                },
            )
            self._ports = [compiled.output(output_name(index)) for index in outputs or range(len(recipes))]
            if any(port.partial_shape.is_dynamic for port in self._ports):
                raise OpenVinoError("OpenVINO cannot tell the shape of the features before it computes them")
        except RuntimeError as error:
            raise OpenVinoError(f"OpenVINO cannot load the network: {reason(error)}") from error
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(compiled.create_infer_request())
        self._workers = ThreadPoolExecutor(streams, "openvino")

    def __call__(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Compute the features of one batch; shapes and dtypes are those of ``features.networks.engines.Engine``."""
        count = len(images)
        check_batch(images, self._shape)
        arrays = [np.empty((count, *tuple(port.shape)[1:]), np.float32) for port in self._ports]
        starts = range(0, count, self.images_per_pass)
        for _ in self._workers.map(lambda start: self._infer(images, start, arrays), starts):
            pass  # raises the error of a failed request
        with self._lock:
            self.images_inferred += count
        return dict(zip(self.names, arrays, strict=True))

    def _infer(self, images: np.ndarray, start: int, arrays: list[np.ndarray]) -> None:
        part = np.ascontiguousarray(images[start : start + self.images_per_pass])
        count = len(part)
        if count < self.images_per_pass:
            part = np.concatenate([part, np.zeros((self.images_per_pass - count, *part.shape[1:]), np.uint8)])
        request = self._requests.get()
        try:
            request.infer({0: part}, share_inputs=True, share_outputs=True)
            for port, array in zip(self._ports, arrays, strict=True):
                array[start : start + count] = request.get_tensor(port).data[:count]
        finally:
            self._requests.put(request)


def images_per_pass(batch_size: int, threads: int, step: int | None) -> int:
    """Return the number of images in one inference request of an ``OpenVinoEngine``."""
    return step or max(1, min(_REQUEST_IMAGES, batch_size // threads))


# ------------------------------------------------------------------------------------------ convert and check
def from_onnx(
    model: bytes, batch: np.ndarray, expected: Sequence[np.ndarray], step: int | None
) -> dict[str, np.ndarray]:
    """Convert a composed ONNX model and return the arrays of a cached file.

    Parameters
    ----------
    model : bytes
        As ``features.networks.onnx_graph.composed`` makes it.
    batch : uint8, (n, h, w, 3), 0-255
        Reference images.
    expected : sequence of float32, (n, ...)
        Outputs of ONNX Runtime for them.
    step : int or None
        Images per pass, if the model takes no other number.

    Raises
    ------
    OpenVinoError
        If OpenVINO does not take an operator of the model.
    """
    openvino = import_openvino()
    with system_folder() as folder:
        path = folder / "model.xml"
        try:
            graph = openvino.Core().read_model(model)
            graph.reshape([step or -1, *batch.shape[1:]])
            fold_constants(graph)  # for any number of images
            graph.reshape([step or len(batch), *batch.shape[1:]])
            with enough_room(folder, len(model)):
                openvino.serialize(graph, path)
        except OSError as error:
            raise OpenVinoError(
                f"the network that OpenVINO converted cannot be written: {folder.parent}: {error.strerror or error}"
            ) from error
        except Exception as error:  # the converter raises errors of any class
            raise OpenVinoError(f"OpenVINO cannot convert the network: {reason(error)}") from error
        files = [np.frombuffer(file.read_bytes(), np.uint8) for file in (path, path.with_suffix(".bin"))]
    kept = {"model": files[0], "weights": files[1], "batch": batch}
    kept |= {output_name(index): values for index, values in enumerate(expected)}
    return kept if step is None else kept | {"step": np.array([step])}


def fold_constants(graph: Any) -> None:
    """Compute what depends on no image, once: every compilation would do so again, which took 2 of 3 seconds for a ViT."""
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(graph)


def from_keras(model: Any, preprocess: Callable[[Any], Any], height: int, width: int) -> dict[str, np.ndarray]:
    """Convert a Keras model (preprocessed pixels -> features) and return the arrays of a cached file."""
    import keras

    images = keras.Input((height, width, 3), dtype="uint8", name="images")
    # The converted graph contains the preprocessing; its input is uint8 pixels.
    outputs = model(preprocess(keras.ops.cast(images, "float32")), training=False)
    listed = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    # The outputs are named, because the conversion does not keep their order.
    whole = keras.Model(images, {output_name(index): output for index, output in enumerate(listed)})
    batch = reference_images(height, width)
    expected = _outputs(model, preprocess, batch)
    with system_folder() as folder:
        path = folder / "model.xml"
        level = logging.getLogger().level
        try:
            with enough_room(folder, 4 * whole.count_params()):  # float32
                write_graph(whole, path)
            files = [np.frombuffer(file.read_bytes(), np.uint8) for file in (path, path.with_suffix(".bin"))]
        except OSError as error:
            raise OpenVinoError(
                f"the network that OpenVINO converted cannot be written: {folder.parent}: {error.strerror or error}"
            ) from error
        except Exception as error:  # the converters raise errors of any class, even plain Exception
            raise OpenVinoError(f"OpenVINO cannot convert {model.name}: {reason(error)}") from error
        finally:
            logging.getLogger().setLevel(level)  # a failed conversion raises it, hiding later warnings
    kept = {"model": files[0], "weights": files[1], "batch": batch}
    return kept | {output_name(index): values for index, values in enumerate(expected)}


def second_size(model: Any, preprocess: Callable[[Any], Any], height: int, width: int) -> dict[str, np.ndarray]:
    """Return arrays for a cached file that let its network serve all sizes of the same graph: outputs at one more of them.

    Raises
    ------
    ConfigurationError
        If the model does not take that size.
    """
    batch = reference_images(height, width)
    try:
        outputs = _outputs(model, preprocess, batch)
    except Exception as error:  # layers raise errors of any type
        raise ConfigurationError(f"{model.name} cannot take {height}x{width} pixels: {reason(error)}") from error
    return {_OTHER: batch} | {output_name(index, _OTHER): values for index, values in enumerate(outputs)}


def _outputs(model: Any, preprocess: Callable[[Any], Any], batch: np.ndarray) -> list[np.ndarray]:
    import keras

    with keras.device(place_of("cpu")):
        outputs = model(preprocess(keras.ops.convert_to_tensor(batch.astype(np.float32))), training=False)
    listed = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    return [keras.ops.convert_to_numpy(values).astype(np.float32) for values in listed]


def write_graph(model: Any, path: Path) -> None:
    """Write a Keras model as OpenVINO's pair of files, ``path`` (.xml) and the weights beside it (.bin).

    TensorFlow traces the model once. Keras's own export traces it three times, and gives the same operations and bytes
    of weights in twice the processor time; it is used with other backends.

    Raises
    ------
    Exception
        Of any class, if the converter does not know an operation.
    """
    import keras

    openvino = import_openvino()
    if keras.backend.backend() != "tensorflow":
        model.export(str(path), format="openvino", verbose=False)
        return
    import tensorflow as tf

    specs = [tf.TensorSpec(tensor.shape, tensor.dtype, name=tensor.name) for tensor in model.inputs]
    traced = tf.function(lambda images: model(images, training=False), input_signature=specs, autograph=False)
    openvino.serialize(openvino.convert_model(traced.get_concrete_function()), path)


def _references(kept: Mapping[str, np.ndarray]) -> dict[Size, tuple[np.ndarray, list[np.ndarray]]]:
    """Return the reference images of a cached file and the original's outputs for them, by height and width."""
    found = {}
    for name in ("batch", _OTHER):
        if name in kept:
            keys = itertools.takewhile(kept.__contains__, (output_name(index, name) for index in itertools.count()))
            found[kept[name].shape[1:3]] = kept[name], [kept[key] for key in keys]
    return found


def _prove(engine: OpenVinoEngine, batch: np.ndarray, expected: Sequence[np.ndarray]) -> None:
    """Check that an engine reproduces the original's outputs for a reference batch; else OpenVinoError."""
    allowed = TOLERANCES[engine.precision]
    for (name, values), original in zip(all_of(engine, batch).items(), expected, strict=True):
        found = relative_difference(values, original)
        if not found <= allowed:
            raise OpenVinoError(
                f"{name}: OpenVINO {engine.precision} differs from the original by {found:.2g} (relative L2), at most "
                f"{allowed:g} is allowed"
            )


def all_of(engine: OpenVinoEngine, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the features of reference images, however many the engine takes at a time; they are not counted."""
    parts = [engine(batch[start : start + engine.batch_size]) for start in range(0, len(batch), engine.batch_size)]
    engine.images_inferred = 0
    return {name: np.concatenate([part[name] for part in parts]) for name in engine.names}


def _check(engine: OpenVinoEngine, kept: Mapping[str, np.ndarray], asked: _Asked) -> None:
    """Check an engine with a kept network; else OpenVinoError.

    At a size for which the original's outputs are kept, it reproduces them. At another one, it reproduces them at the size
    of the conversion; and here its outputs have the shapes that follow from those at two sizes, and are the same if every
    image is computed alone.
    """
    references = _references(kept)
    if asked.size in references:
        _prove(engine, *references[asked.size])
        return
    first = next(iter(references))
    _prove(asked.at(first).open(kept), *references[first])
    batch = reference_images(*asked.size)
    alone = all_of(dataclasses.replace(asked, batch_size=1).open(kept), batch)
    for index, (name, values) in enumerate(all_of(engine, batch).items()):
        shapes = [(size, outputs[index].shape[1:]) for size, (_, outputs) in references.items()]
        if values.shape[1:] != shape_at(asked.size, shapes):
            raise OpenVinoError(f"{name}: OpenVINO gives {values.shape[1:]} at {asked.size[0]}x{asked.size[1]} pixels")
        if not relative_difference(alone[name], values) <= TOLERANCES[asked.precision]:
            raise OpenVinoError(
                f"{name}: the numbers that OpenVINO gives depend on how many images it computes at a time"
            )


def _serves_kin(made: Mapping[str, np.ndarray], asked: _Asked) -> bool:
    """Whether a conversion is right at a second size, too."""
    if _OTHER not in made:
        return False
    size = made[_OTHER].shape[1:3]
    try:
        engine = dataclasses.replace(asked.at(size), precision="float32").open(made)
        _prove(engine, *_references(made)[size])
    except (OpenVinoError, ConfigurationError) as error:
        logger.debug("the conversion serves one size alone: %s", error)
        return False
    return True


# -------------------------------------------------------------------------------------------------- cached files
def _about(recipes: Sequence[Recipe], source: str, by: str) -> dict[str, Any]:
    """Return what identifies a converted model; precision, batch size, resizing and stored dtype do not matter."""
    rule = recipes[0].pixels
    later = [
        [] if item.normalisation is None else [item.normalisation.to_dict(), item.prefix_tokens] for item in recipes
    ]
    return {
        "format": FORMAT,
        "source": source,
        "size": [rule.height, rule.width],
        "outputs": [
            [item.backbone, item.weights, item.layer, item.pooling, item.preprocessing, *more]
            for item, more in zip(recipes, later, strict=True)
        ],
        "versions": {name: importlib.metadata.version(name) for name in (by, "openvino")},
    }


def _keys(recipes: Sequence[Recipe], source: str, by: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what identifies a conversion for this size alone, and one that serves others, too."""
    about = _about(recipes, source, by)
    return about, {**about, "size": ["kin", *kin((about["size"][0], about["size"][1]))]}


def _usable(about: Mapping[str, Any], size: Size) -> tuple[dict[str, np.ndarray], str] | None:
    """Return what ``_read`` does of a cached file, if it serves images of this size; else None."""
    found = _read(_path(about), about)
    if found is None:
        return None
    references = _references(found[0])
    return found if size in references or reaches(size, [*references]) else None


def _kept_engine(about: Mapping[str, Any], asked: _Asked) -> OpenVinoEngine | None:
    """Open an engine with a cached file, and check it unless that was done before; None if there is none that can be used."""
    found = _usable(about, asked.size)
    if found is None:
        return None
    kept, seal = found
    try:
        engine = asked.open(kept)
        if not _is_proven(engine, seal):
            _check(engine, kept, asked)
            _note_proof(engine, seal)
        return engine
    except (OpenVinoError, ConfigurationError, KeyError, ValueError) as error:
        logger.warning("%s cannot be used here (%s); the network is converted again", _path(about), error)
        return None


def _is_proven(engine: OpenVinoEngine, seal: str) -> bool:
    """Whether this very file has been checked on this processor, in this precision and with as many images per pass."""
    path = _proof(engine, seal)
    return path is not None and kept_json(path) is not None


def _note_proof(engine: OpenVinoEngine, seal: str) -> None:
    if (path := _proof(engine, seal)) is not None:
        keep_json(path, seal)


def _proof(engine: OpenVinoEngine, seal: str) -> Path | None:
    if (machine := processor()) is None:  # another one might be taken for it
        return None
    shape = [engine.images_per_pass, *engine.size]
    return cache_path("proofs", f"{digest_of([seal, engine.precision, shape, machine])}.json")


def _read(path: Path, about: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str] | None:
    """Read the arrays of a cached file, and its signature; None if there is no file or, with a warning, if it is not usable."""
    try:
        with signed_file(path) as file, np.load(file, allow_pickle=False) as archive:
            kept = {name: archive[name] for name in archive.files}
            seal = seal_of(file)
        if json.loads(kept.pop("about").tobytes()) != about:
            raise ValueError("it describes another network")
        return kept, seal
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is not used (%s); the network is converted again", path, error)
        return None


def _path(about: Mapping[str, Any]) -> Path:
    return cache_path("openvino", f"{digest_of(about)}.model")


def _write(about: Mapping[str, Any], kept: Mapping[str, np.ndarray]) -> str | None:
    """Write a cached file and return its signature; None, with a warning, if that fails."""
    path = _path(about)
    arrays = {"about": np.frombuffer(canonical_json(about).encode("ascii"), np.uint8), **kept}
    archive = io.BytesIO()
    np.savez(archive, **arrays)  # type: ignore[arg-type]
    try:
        return write_signed(path, archive.getbuffer())
    except OSError as error:  # the cache only saves time
        logger.warning("%s could not be written (%s); the next run converts the network again", path, error)
        return None


def import_openvino() -> Any:
    """Import OpenVINO without ``openvino_telemetry``, which would report every import and conversion to its makers."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino

        _ = openvino.Core
    except (ImportError, AttributeError, OSError) as error:
        raise OpenVinoError(f"OpenVINO is installed, but cannot be imported: {reason(error)}") from error
    return openvino


def output_name(index: int, batch: str = "batch") -> str:
    """Name of an output of a converted model; of its values in a cached file, also for the second batch."""
    return f"output_{index}" if batch == "batch" else f"{batch}_output_{index}"


def reason(error: BaseException) -> str:
    """Pick the most useful line of a long message: the one about a missing conversion rule, else the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "No conversion rule" in line), lines[-1])
