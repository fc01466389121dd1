"""The formats of exported models: how each is written, run by its own runtime, and where its card is stored.

Each format is one row of `FORMATS`. Runtimes and converters are imported only when a row needs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.canonical import check_choice
from features.errors import ConfigurationError, RunError
from features.machine import how_to_install, processors
from features.networks.backend import held_back, load_keras
from features.networks.modelfile import open_model
from features.networks.onnx_engine import import_onnxruntime
from features.networks.openvino_engine import import_openvino, write_graph
from features.temporary import temporary_folder
from pipeline.exporting.saved_model import check_saved_model

CARD = "bottleneck.json"  # name of the card, if it is a file
KEY = "bottleneck"  # name of the card, if it is a metadata entry
INPUT, OUTPUT = "images", "probabilities"
_LARGEST_CARD = 16 << 20
Runtime = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Writer:
    """How a format is written from one kind of network.

    Parameters
    ----------
    write : callable
        (model of this kind, path) -> None; raises whatever its converter raises.
    packages : tuple of str
        Modules needed besides Keras and those that run the format.
    backend : str
        Backend of Keras whose models the converter takes; empty if it takes all.
    """

    write: Callable[[Any, Path], None]
    packages: tuple[str, ...] = ()
    backend: str = ""


@dataclasses.dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    Parameters
    ----------
    name : str
        Value of ``export --format``.
    suffix : str
        Suffix of the file; empty if the artefact is a folder.
    main : str
        File in the folder that every runtime opens; empty if the artefact is a file.
    packages : tuple of str
        Modules needed to run it, besides Keras.
    writers : dict of str to Writer
        By kind of network (``keras``, ``onnx``).
    load : callable
        Path -> function that takes uint8 (n, h, w, 3) and returns float (n, c).
    put, get : callable
        Write the card's text into a finished artefact; read it, None if there is none.
    reopen : callable, optional
        Path -> a model of the kind that was written, in which the outputs of the layers can be seen.
    tolerance : float
        Largest accepted difference in probability from the run, 0-1.
    note : str
        What everyone must know who runs the artefact without this project.
    """

    name: str
    suffix: str
    main: str
    packages: tuple[str, ...]
    writers: Mapping[str, Writer]
    load: Callable[[Path], Runtime]
    put: Callable[[Path, str], None]
    get: Callable[[Path], str | None]
    reopen: Callable[[Path], Any] | None = None
    tolerance: float = 1e-4
    note: str = ""

    def require(self) -> None:
        """Raise ``ConfigurationError``, which says what to install, if a package that runs the format is missing."""
        _require(self.name, self.packages)

    def check_writer(self, kind: str, backend: str) -> None:
        """Raise ``ConfigurationError`` if networks of this kind cannot be written in this format by this backend of Keras."""
        writer = self.writers.get(kind)
        if writer is None:
            able = " or ".join(row.name for row in FORMATS.values() if kind in row.writers)
            raise ConfigurationError(
                f"format {self.name}: its converter needs a network of Keras, but this network is an ONNX file. "
                f"Use --format {able}"
            )
        if writer.backend and backend != writer.backend:
            able = " or ".join(
                name for name, row in FORMATS.items() if kind in row.writers and not row.writers[kind].backend
            )
            raise ConfigurationError(
                f"format {self.name}: the conversion needs TensorFlow, but Keras runs on {backend}. Use --format {able}, or "
                f"pip install tensorflow and {how_to_install('export')}, and set KERAS_BACKEND=tensorflow"
            )
        _require(self.name, writer.packages)


def _require(name: str, packages: tuple[str, ...]) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigurationError(
            f"format {name}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"{'pip install tensorflow' if 'tensorflow' in missing else how_to_install('export')}"
        )


def find_format(name: str) -> Format:
    """Look up a format; ``ConfigurationError`` with the nearest name if there is none."""
    check_choice("format", name, tuple(FORMATS))
    return FORMATS[name]


def format_of(path: Path) -> Format | None:
    """Recognise the format of a path by its name and files; nothing is loaded."""
    for row in FORMATS.values():
        if (path / row.main).is_file() if row.main else path.name.endswith(row.suffix) and path.is_file():
            return row
    return None


def convert(model: Any, kind: str, row: Format, path: Path) -> None:
    """Write a model, which is of this kind, in a format.

    Raises
    ------
    RunError
        If the network has an operation that the format's converter does not support.
    """
    try:
        with silenced():
            row.writers[kind].write(model, path)
    except OSError:  # such as a full disk, which is not the fault of the network
        raise
    except Exception as error:  # converters raise errors of any type, even plain Exception
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise RunError(f"{row.name}: this network cannot be converted ({reason}); give another --format") from error


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence converters, which warn about their own deprecated calls; a failed conversion raises an error."""
    loggers = [logging.getLogger(name) for name in ("tensorflow", "tf2onnx")]
    levels = [item.level for item in loggers]
    try:
        for item in loggers:
            item.setLevel(logging.CRITICAL)
        yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)


# -------------------------------------------------------------------------------------------------- writers
def _write_keras(model: Any, path: Path) -> None:
    model.save(path)


def _reopen_keras(path: Path) -> Any:
    return load_keras().saving.load_model(path, compile=False)


def _write_saved_model(model: Any, path: Path) -> None:
    """Write what ``model.export`` writes, which traces every layer by itself on its way and takes twice as long."""
    keras = load_keras()
    archive = keras.export.ExportArchive()
    shape = [keras.InputSpec("uint8", (None, None, None, 3), name=INPUT)]
    archive.add_endpoint("serve", functools.partial(model, training=False), shape)
    for name in ("variables", "trainable_variables", "non_trainable_variables"):
        archive.add_variable_collection(name, getattr(model, name))
    archive.write_out(str(path), verbose=False)


def _write_litert(model: Any, path: Path) -> None:
    """Convert the SavedModel for LiteRT, as Keras does; operations that LiteRT does not have are left to TensorFlow's."""
    import tensorflow as tf

    with temporary_folder(path) as folder:
        _write_saved_model(model, folder)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
        converter.experimental_enable_resource_variables = True
        path.write_bytes(converter.convert())


def _write_openvino(model: Any, path: Path) -> None:
    path.mkdir()
    write_graph(model, path / "model.xml")


def _write_onnx(model: Any, path: Path) -> None:
    """Write ONNX. tf2onnx may write operations that ONNX does not have; the checker raises an error."""
    import onnx

    converted = to_onnx(model, OUTPUT)
    onnx.checker.check_model(converted)
    onnx.save(converted, path)


def _save_onnx(model: Any, path: Path) -> None:
    path.write_bytes(model.SerializeToString())


def _onnx_to_openvino(model: Any, path: Path) -> None:
    openvino = import_openvino()
    path.mkdir()
    converted = openvino.Core().read_model(model.SerializeToString())
    openvino.save_model(converted, path / "model.xml", compress_to_fp16=False)


def to_onnx(model: Any, output: str, opset: int | None = None) -> Any:
    """Convert a Keras model from images to one output to an ``onnx.ModelProto``.

    Keras's own exporter lists constants of the graph, such as the means of preprocessing, as inputs.

    Parameters
    ----------
    model : keras.Model
        uint8 (n, h, w, 3) -> any; its input is called ``images`` in the result.
    output : str
        Name of the output in the result.
    opset : int, optional
        Version of the operators.
    """
    import tensorflow as tf

    import_onnxruntime()  # switches its telemetry off before tf2onnx imports it
    import tf2onnx
    from tf2onnx import tf_loader

    # it would name each Erfc, which is replaced below; what else it cannot convert is found by the checker
    logging.getLogger("tf2onnx.tfonnx").setLevel(logging.CRITICAL)
    function = tf.function(lambda images: model(images, training=False))
    traced = function.get_concrete_function(tf.TensorSpec((None, None, None, 3), tf.uint8, name=INPUT))
    inputs, outputs = [traced.inputs[0].name], [traced.outputs[0].name]
    with tf.device("cpu:0"):
        frozen = tf_loader.from_function(traced, inputs, outputs)
        converted, _ = tf2onnx.convert.from_graph_def(frozen, input_names=inputs, output_names=outputs, opset=opset)
    names = {inputs[0]: INPUT, outputs[0]: output}
    for value in (converted.graph.input[0], converted.graph.output[0]):
        value.name = names[value.name]
    for node in converted.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
    _replace_erfc(converted.graph)
    return converted


def _replace_erfc(graph: Any) -> None:
    """Write TensorFlow's ``Erfc``, which ONNX does not have, as 1 - ``Erf``; Keras computes the exact GELU by it."""
    import onnx

    one, nodes = onnx.numpy_helper.from_array(np.float32(1), "one of erfc"), []
    for node in graph.node:
        if node.op_type != "Erfc":
            nodes.append(node)
            continue
        erf = f"{node.output[0]}/erf"
        nodes.append(onnx.helper.make_node("Erf", node.input, [erf], name=erf))
        nodes.append(onnx.helper.make_node("Sub", [one.name, erf], node.output, name=node.name))
    if len(nodes) > len(graph.node):
        graph.initializer.append(one)
        del graph.node[:]
        graph.node.extend(nodes)


# -------------------------------------------------------------------------------------------------- runtimes
def _load_keras(path: Path) -> Runtime:
    keras = load_keras()
    model = open_model(path)

    def forward(images: Any) -> Any:
        return model(images, training=False)

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Compiled once for images of all sizes, this is six times as fast as running one operation after the other.
        forward = tf.function(
            forward, input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)], autograph=False
        )
    return lambda images: keras.ops.convert_to_numpy(forward(keras.ops.convert_to_tensor(images)))


def _load_saved_model(path: Path) -> Runtime:
    load_keras()  # suppresses TensorFlow's messages at start-up
    import tensorflow as tf

    check_saved_model(path)
    loaded = tf.saved_model.load(str(path))

    def run(images: np.ndarray) -> np.ndarray:
        # The signature is looked up at each call, because it does not keep the variables alive.
        (output,) = loaded.signatures["serving_default"](**{INPUT: tf.constant(images)}).values()
        return np.asarray(output.numpy())

    return run


def _load_onnx(path: Path) -> Runtime:
    onnxruntime = import_onnxruntime()
    if _reads_other_files(_onnx_model(path)):
        raise ValueError("it takes weights from another file, which is not followed; export keeps them in the model")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def _load_litert(path: Path) -> Runtime:
    from ai_edge_litert.interpreter import Interpreter

    with held_back():  # it announces from C++ what it is going to use
        interpreter = Interpreter(str(path), num_threads=processors())
        interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: np.ndarray) -> np.ndarray:
        interpreter.resize_tensor_input(source["index"], images.shape, strict=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(target["index"]))

    return run


def _load_openvino(path: Path) -> Runtime:
    core = import_openvino().Core()
    compiled = core.compile_model(str(path / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # see _F32
    return lambda images: compiled(images)[0]


# -------------------------------------------------------------------------------------------------- cards
def _put_zip(path: Path, text: str) -> None:
    """Append a zip member. A .keras file is a zip; a LiteRT file may end in one, as with TensorFlow's own metadata."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(CARD, text)


def _get_zip(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if CARD not in archive.namelist():
            return None
        if archive.getinfo(CARD).file_size > _LARGEST_CARD:
            raise ValueError(f"{CARD} is larger than {_LARGEST_CARD} bytes")
        return archive.read(CARD).decode("ascii")


def _put_asset(path: Path, text: str) -> None:
    """Write to ``assets.extra``, which TensorFlow reserves for files of others and does not load."""
    (path / "assets.extra").mkdir(exist_ok=True)
    (path / "assets.extra" / CARD).write_text(text, encoding="ascii")


def _get_asset(path: Path) -> str | None:
    file = path / "assets.extra" / CARD
    if not file.is_file():
        return None
    if file.stat().st_size > _LARGEST_CARD:
        raise ValueError(f"{CARD} is larger than {_LARGEST_CARD} bytes")
    return file.read_text(encoding="ascii")


def _put_onnx(path: Path, text: str) -> None:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {KEY: text})
    onnx.save(model, path)


def _get_onnx(path: Path) -> str | None:
    return {item.key: item.value for item in _onnx_model(path).metadata_props}.get(KEY)


def _onnx_model(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False)


def _reads_other_files(message: Any) -> bool:
    """Whether a tensor anywhere in an ONNX message, in a subgraph or function too, has its values in another file."""
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        return bool(message.data_location == TensorProto.EXTERNAL or message.external_data)
    for field, value in message.ListFields():
        if field.message_type is not None:
            inner = value if hasattr(value, "__len__") else [value]
            if any(_reads_other_files(item) for item in inner):
                return True
    return False


def _put_openvino(path: Path, text: str) -> None:
    openvino = import_openvino()
    model = openvino.Core().read_model(path / "model.xml")
    model.set_rt_info(text, [KEY])
    other = path / "with_card.xml"
    openvino.save_model(model, other, compress_to_fp16=False)
    for suffix in (".bin", ".xml"):
        os.replace(other.with_suffix(suffix), path / f"model{suffix}")


def _get_openvino(path: Path) -> str | None:
    model = import_openvino().Core().read_model(path / "model.xml")
    return model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None


_F32 = (
    "compile it with INFERENCE_PRECISION_HINT f32: where the processor has bfloat16 OpenVINO takes that by itself, which "
    "was off by 0.09 in probability"
)
FORMATS = {
    row.name: row
    for row in (
        Format(
            *("keras", ".keras", "", (), {"keras": Writer(_write_keras)}, _load_keras, _put_zip, _get_zip),
            reopen=_reopen_keras,
        ),
        Format(
            *("saved_model", "", "saved_model.pb", ("tensorflow",)),
            *({"keras": Writer(_write_saved_model, (), "tensorflow")}, _load_saved_model, _put_asset, _get_asset),
        ),
        Format(
            *("onnx", ".onnx", "", ("onnxruntime",)),
            {"keras": Writer(_write_onnx, ("tf2onnx",), "tensorflow"), "onnx": Writer(_save_onnx)},
            *(_load_onnx, _put_onnx, _get_onnx),
        ),
        Format(
            *("litert", ".tflite", "", ("ai_edge_litert",)),
            *({"keras": Writer(_write_litert, (), "tensorflow")}, _load_litert, _put_zip, _get_zip),
            tolerance=1e-3,  # LiteRT multiplies in another order, and in half precision on some processors
        ),
        Format(
            *("openvino", "", "model.xml", ("openvino",)),
            {"keras": Writer(_write_openvino, (), "tensorflow"), "onnx": Writer(_onnx_to_openvino)},
            *(_load_openvino, _put_openvino, _get_openvino),
            note=_F32,
        ),
    )
}
