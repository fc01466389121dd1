"""Quantise a network to 8-bit integers with NNCF, and run a quantised network with OpenVINO.

    conversion for OpenVINO, calibration images --quantise()--> QuantisedNetwork -> a file, for ever
    file, recipes --open_quantised()--> child with limits: is it harmless, and right on this processor? --> engine

Activations take 8 bits and weights 7. Products of two neighbours then never exceed 16 bits, in which processors without
VNNI add them: with weights of 8 bits such a processor gave features 0.41 (relative) from the right ones, with 7 bits 0.07,
as far as rounding goes. So one network gives the same features on every processor, and none has to be refused. What is
not quantised is computed in float32 everywhere, for the same reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.cache import cache_path, keep_json, kept_json
from features.canonical import digest_of
from features.errors import OpenVinoError
from features.files import enough_room, writing
from features.machine import how_to_install, installed_version, processor, processors
from features.networks.limited import limits_of, run_limited
from features.networks.openvino_engine import (
    OpenVinoEngine,
    all_of,
    images_per_pass,
    import_openvino,
    output_name,
    reason,
)
from features.networks.quantised import QuantisedNetwork, read
from features.networks.reference import REFERENCES, reference_images, relative_difference
from features.recipe import Recipe
from features.temporary import system_folder

# Largest accepted relative L2 difference of the engine from exact integers, on the reference batch. Sums are rounded to 8
# bits again and again, and a last bit more or less grows on its way through a deep network: to 0.08 in MobileNetV2, where
# a processor that overflows is 0.34 off.
TOLERANCE = 0.25
LARGEST_TENSOR = 4 << 30  # bytes of one tensor inside the network, for one pass
ALONE = 1e-4  # largest accepted relative difference of an image that is computed alone
# Operations whose time or result depends on pixels, on earlier images or on chance, so that a trial tells nothing.
_REFUSED = {"Assign", "If", "Loop", "Multinomial", "RandomUniform", "ReadValue", "TensorIterator"}
_RULES = 1  # raised with the rules of the trial
_ASKED = "asked.json"
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
    path: Path, recipes: Sequence[Recipe], *, batch_size: int, threads: int | None = None
) -> OpenVinoEngine:
    """Open the engine of a quantised network, and prove that this processor computes it as it was made.

    Parameters
    ----------
    path : Path
        Its file, which may come from a stranger.
    recipes : sequence of Recipe
        The feature sets to compute, all of them outputs of the network; their ``quantised`` is the sha256 of the file.
    batch_size, threads : int
        See ``OpenVinoEngine``.

    Raises
    ------
    IntegrityError
        If the file is damaged or another one.
    OpenVinoError
        If OpenVINO cannot run it, it would need unreasonable memory or time, or it gives other numbers than where it was made.
    """
    network, _ = read(path, recipes[0].quantised)
    asked = _Asked(path, tuple(recipes), batch_size, threads or processors())
    tried = asked.note(network.step)
    if tried is None or kept_json(tried) is None:
        _try_out(asked, path.stat().st_size)
        if tried is not None:
            keep_json(tried, True)
    return asked.open(network)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What an engine is opened for; see ``open_quantised``."""

    path: Path
    recipes: tuple[Recipe, ...]
    batch_size: int
    threads: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.recipes[0].pixels.height, self.recipes[0].pixels.width

    def numbers(self, network: QuantisedNetwork) -> list[int]:
        """Return which output of a network each recipe is."""
        found = [network.number_of(recipe) for recipe in self.recipes]
        if None in found:
            raise OpenVinoError(f"{self.path}: does not compute the features that are asked of it")
        return [number for number in found if number is not None]

    def open(self, network: QuantisedNetwork) -> OpenVinoEngine:
        """Open an engine with a network that is known to be harmless."""
        return OpenVinoEngine(
            network.model,
            network.weights,
            self.recipes,
            batch_size=self.batch_size,
            precision="int8",
            threads=self.threads,
            step=network.step,
            outputs=self.numbers(network),
        )

    def note(self, step: int | None) -> Path | None:
        """Return the file of the cache that says that the network was tried so on this processor; None if that is unknown."""
        if (machine := processor()) is None:  # another one might be taken for it
            return None
        shape = [images_per_pass(self.batch_size, self.threads, step), self.threads, *self.size]
        outputs = [recipe.to_dict() for recipe in self.recipes]
        key = digest_of([_RULES, outputs, shape, machine, installed_version("openvino")])
        return cache_path("proofs", f"{key}.json")


def _try_out(asked: _Asked, length: int) -> None:
    """Open and prove a network of a stranger in a process of its own, with limits."""
    limits = limits_of(length, REFERENCES * asked.size[0] * asked.size[1])
    values = dataclasses.asdict(asked) | {"path": str(asked.path.absolute())}
    values["recipes"] = [recipe.to_dict() for recipe in asked.recipes]
    with system_folder() as folder:
        with writing(folder / _ASKED):
            (folder / _ASKED).write_text(json.dumps(values))
        failure = run_limited(__name__, folder, limits)
    if failure is not None:
        raise OpenVinoError(
            failure.said
            or f"{asked.path}: OpenVINO cannot run the network: {failure.reason}. Use the file that this project made"
        )


def work(folder: Path) -> None:
    """Prove the network that is named in a folder, in a process of its own: see ``features.networks.limited``."""
    values = json.loads((folder / _ASKED).read_text())
    recipes = tuple(Recipe.from_dict(item) for item in values["recipes"])
    asked = _Asked(Path(values["path"]), recipes, values["batch_size"], values["threads"])
    _prove(asked, read(asked.path, recipes[0].quantised)[0])


def _prove(asked: _Asked, network: QuantisedNetwork) -> None:
    """Open a network, and check that it gives the numbers that it gave where it was made; else ``OpenVinoError``."""
    numbers = asked.numbers(network)
    _check_size(asked.path, network, (network.step or 4, *asked.size, 3))
    images = reference_images(*asked.size)
    try:
        engine = asked.open(network)
    except OpenVinoError as error:
        raise OpenVinoError(f"{asked.path}: {error}") from error
    received, alone = all_of(engine, images), engine(images[-1:])
    for recipe, number in zip(asked.recipes, numbers, strict=True):
        found = relative_difference(received[recipe.name], network.expected[number])
        if not found <= TOLERANCE:
            raise OpenVinoError(
                f"{asked.path}: {recipe.name}: this processor gives other numbers than exact integers do ({found:.2g} relative "
                f"L2, at most {TOLERANCE:g} is allowed)"
            )
        if not relative_difference(alone[recipe.name], received[recipe.name][-1:]) <= ALONE:
            raise OpenVinoError(
                f"{asked.path}: {recipe.name}: the features of an image depend on the others of its batch"
            )


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
        endless = sorted({node.get_type_name() for node in graph.get_ops()} & _REFUSED)
    except Exception as error:  # as above
        raise OpenVinoError(f"{path}: OpenVINO cannot load the network: {reason(error)}") from error
    if endless:
        raise OpenVinoError(
            f"{path}: the network has the operation {endless[0]}, which none that this project made has. Use the file that it made"
        )
    if not whole or largest > LARGEST_TENSOR:
        raise OpenVinoError(
            f"{path}: a tensor of this network would take {'an unknown number of' if not whole else f'{largest:,}'} bytes; at "
            f"most {LARGEST_TENSOR:,} are allowed. Use the file that this project made"
        )


def _nncf() -> Any:
    """Import NNCF, after OpenVINO, which blocks ``openvino_telemetry`` for both."""
    if not can_quantise():
        raise OpenVinoError(
            f"NNCF, which quantises networks, is not installed: {how_to_install('int8')}. Only the first "
            "extraction needs it"
        )
    assert "openvino_telemetry" in sys.modules
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own function also sets handlers that are not its own
    return nncf
