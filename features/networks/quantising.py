"""Quantise a network to 8-bit integers with NNCF, and run a quantised network with OpenVINO.

    conversion for OpenVINO, calibration images --quantise()--> QuantisedNetwork -> a file, for ever
    file, recipes --open_quantised()--> engine, proven on this processor

Activations take 8 bits and weights 7. Products of two neighbours then never exceed 16 bits, in which processors without
VNNI add them: with weights of 8 bits such a processor gave features 0.41 (relative) from the right ones, with 7 bits 0.07,
as far as rounding goes. So one network gives the same features on every processor, and none has to be refused. What is
not quantised is computed in float32 everywhere, for the same reason.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import OpenVinoError
from features.files import enough_room
from features.networks.openvino_engine import OpenVinoEngine, all_of, import_openvino, output_name, reason
from features.networks.quantised import QuantisedNetwork, read
from features.networks.reference import reference_images, relative_difference
from features.recipe import Recipe
from features.temporary import system_folder

# Largest accepted relative L2 difference of the engine from exact integers, on the reference batch. Sums are rounded to 8
# bits again and again, and a last bit more or less grows on its way through a deep network: to 0.08 in MobileNetV2, where
# a processor that overflows is 0.34 off.
TOLERANCE = 0.25
LARGEST_TENSOR = 4 << 30  # bytes of one tensor inside the network, for one pass
_ATTENTION = {"Softmax", "ScaledDotProductAttention"}


def can_quantise() -> bool:
    """Whether the package ``nncf`` is installed; it is not imported."""
    return importlib.util.find_spec("nncf") is not None


def quantise(
    converted: Mapping[str, np.ndarray],
    recipes: Sequence[Recipe],
    images: Iterable[np.ndarray],
    count: int,
    calibration: Mapping[str, Any],
) -> QuantisedNetwork:
    """Quantise a network after training, by the ranges that its tensors have for some images.

    Parameters
    ----------
    converted : mapping of str to array
        The network as ``features.networks.openvino_engine.conversion`` gives it.
    recipes : sequence of Recipe
        The plain recipe in float32 of each output.
    images : iterable of uint8, (1, h, w, 3), 0-255
        Calibration images; iterated more than once.
    count : int
        Their number.
    calibration : dict
        What the file will say about them.

    Raises
    ------
    OpenVinoError
        If NNCF is missing, or cannot quantise this network.
    """
    openvino, nncf = import_openvino(), _nncf()
    rule = recipes[0].pixels
    step = int(converted["step"][0]) if "step" in converted else None
    try:
        graph = openvino.Core().read_model(converted["model"].tobytes(), openvino.Tensor(converted["weights"]))
        graph.reshape([step or 1, rule.height, rule.width, 3])
        attention = any(node.get_type_name() in _ATTENTION for node in graph.get_ops())
        batches = _Batches(images, step or 1)
        with contextlib.redirect_stdout(io.StringIO()):  # it draws its own progress there
            quantised = nncf.quantize(
                graph,
                nncf.Dataset(batches),
                subset_size=-(-count // (step or 1)),
                model_type=nncf.ModelType.TRANSFORMER if attention else None,
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=nncf.OverflowFix.ENABLE  # weights of 7 bits
                ),
            )
        model, weights = _serialised(openvino, quantised, converted["weights"].nbytes)
        expected = _by_exact_integers(
            openvino, quantised, reference_images(rule.height, rule.width), len(recipes), step
        )
    except OSError as error:
        raise OpenVinoError(f"the quantised network cannot be written: {error.strerror or error}") from error
    except Exception as error:  # libraries in C++ raise errors of any class
        raise OpenVinoError(f"the network cannot be quantised: {reason(error)}") from error
    software = {name: importlib.metadata.version(name) for name in ("nncf", "openvino")}
    return QuantisedNetwork(
        tuple(recipes), model, weights, tuple(expected), step, {**calibration, "software": software}
    )


class _Batches:
    """Calibration images in batches of the size that the network takes; the last batch is filled up with its own images."""

    def __init__(self, images: Iterable[np.ndarray], step: int) -> None:
        self._images, self._step = images, step

    def __iter__(self) -> Iterator[np.ndarray]:
        batch: list[np.ndarray] = []
        for image in self._images:
            batch.append(image)
            if len(batch) == self._step:
                yield np.concatenate(batch)
                batch = []
        if batch:
            yield np.concatenate([batch[number % len(batch)] for number in range(self._step)])


def _serialised(openvino: Any, graph: Any, most: int) -> tuple[np.ndarray, np.ndarray]:
    with system_folder() as folder:
        path = folder / "model.xml"
        with enough_room(folder, most):
            openvino.serialize(graph, path)
        model, weights = (np.frombuffer(file.read_bytes(), np.uint8) for file in (path, path.with_suffix(".bin")))
    return model, weights


def _by_exact_integers(
    openvino: Any, graph: Any, images: np.ndarray, outputs: int, step: int | None
) -> list[np.ndarray]:
    """Compute the outputs of a quantised graph with every rounding spelled out in float32, which no instruction set changes.

    ``y = round((clip(x, low, high) - low) / (high - low) * (levels - 1)) / (levels - 1) * (high' - low') + low'``, the
    definition of OpenVINO's FakeQuantize.
    """
    from openvino import opset13 as op

    whole = graph.clone()
    for node in whole.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        value, low, high, to_low, to_high = (node.input_value(number) for number in range(5))
        steps = op.constant(np.float32(node.get_attributes()["levels"] - 1))
        clipped = op.maximum(op.minimum(value, high), low)
        level = op.multiply(op.subtract(clipped, low), op.divide(steps, op.subtract(high, low)))
        scaled = op.multiply(op.round(level, "half_to_even"), op.divide(op.subtract(to_high, to_low), steps))
        node.output(0).replace(op.add(scaled, to_low).output(0))
    count = step or len(images)
    whole.reshape([count, *images.shape[1:]])
    compiled = openvino.Core().compile_model(whole, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    padded = images[np.arange(-(-len(images) // count) * count) % len(images)]
    found = [compiled(padded[start : start + count]) for start in range(0, len(padded), count)]
    ports = [compiled.output(output_name(number)) for number in range(outputs)]
    return [np.concatenate([part[port] for part in found])[: len(images)].astype(np.float32) for port in ports]


def open_quantised(
    path: Path, digest: str, recipes: Sequence[Recipe], *, batch_size: int, threads: int | None = None
) -> OpenVinoEngine:
    """Open the engine of a quantised network, and prove that this processor computes it as it was made.

    Parameters
    ----------
    path : Path
        Its file, which may come from a stranger.
    digest : str
        The sha256 that the file must have.
    recipes : sequence of Recipe
        The feature sets to compute, all of them outputs of the network.
    batch_size, threads : int
        See ``OpenVinoEngine``.

    Raises
    ------
    IntegrityError
        If the file is damaged or another one.
    OpenVinoError
        If OpenVINO cannot run it, it would need unreasonable memory, or it gives other numbers than where it was made.
    """
    network, _ = read(path, digest)
    numbers = [network.number_of(recipe) for recipe in recipes]
    if None in numbers:
        raise OpenVinoError(f"{path}: does not compute the features that are asked of it")
    rule = recipes[0].pixels
    _check_size(path, network, (network.step or 4, rule.height, rule.width, 3))
    engine = OpenVinoEngine(
        network.model,
        network.weights,
        recipes,
        batch_size=batch_size,
        precision="int8",
        threads=threads,
        step=network.step,
        outputs=[number for number in numbers if number is not None],
    )
    received = all_of(engine, reference_images(rule.height, rule.width))
    for recipe, number in zip(recipes, numbers, strict=True):
        found = relative_difference(received[recipe.name], network.expected[number or 0])
        if not found <= TOLERANCE:
            raise OpenVinoError(
                f"{path}: {recipe.name}: this processor gives other numbers than exact integers do ({found:.2g} relative L2, at "
                f"most {TOLERANCE:g} is allowed)"
            )
    return engine


def _check_size(path: Path, network: QuantisedNetwork, shape: tuple[int, ...]) -> None:
    """Refuse a network that does not take such images, or whose tensors would not fit into memory."""
    openvino = import_openvino()
    try:
        graph = openvino.Core().read_model(network.model.tobytes(), openvino.Tensor(network.weights))
        graph.reshape([*shape])
        tensors = [port for node in graph.get_ops() for port in node.outputs()]
        largest = max(
            int(np.prod([length.get_max_length() for length in port.partial_shape], dtype=object))
            * port.element_type.size
            for port in tensors
            if port.partial_shape.rank.is_static
        )
        whole = all(port.partial_shape.is_static for port in tensors)
    except Exception as error:  # as above
        raise OpenVinoError(f"{path}: OpenVINO cannot load the network: {reason(error)}") from error
    if not whole or largest > LARGEST_TENSOR:
        raise OpenVinoError(
            f"{path}: a tensor of this network would take {'an unknown number of' if not whole else f'{largest:,}'} bytes; at "
            f"most {LARGEST_TENSOR:,} are allowed. Use the file that this project made"
        )


def _nncf() -> Any:
    """Import NNCF, after OpenVINO, which blocks ``openvino_telemetry`` for both."""
    if not can_quantise():
        raise OpenVinoError(
            "NNCF, which quantises networks, is not installed: pip install 'bottleneck-features[int8]'. Only the first "
            "extraction needs it"
        )
    assert "openvino_telemetry" in sys.modules
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own function also sets handlers that are not its own
    return nncf
