"""Export: resize, preprocessing, network, head and class names in one artefact, from pixels to probabilities.

run -> network + head -> one model -> parity -> convert -> parity by its own runtime, in a new process -> rename
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from features.children import run_module
from features.errors import ConfigurationError, ParityError, TooManyUnreadableError, UnreadableImageError
from features.files import enough_room, printable, sync_folder, writable_folder, writing
from features.machine import keras_backend, processors
from features.networks.network import Network
from features.networks.reference import evenly_spread, reference_images
from features.pixels.resizing import resize_image
from features.progress import Progress, counted
from features.recipe import Recipe
from features.sources.scan import scan
from features.temporary import sweep_dead, temporary_folder
from pipeline.exporting.artefacts import AnsweringCard, Card, TargetCard, full_pixels, write_card
from pipeline.exporting.assembled import Assembled, Assembler, exact_recipe, head_and_layers
from pipeline.exporting.formats import FORMATS, INPUT, Format, convert, find_format
from pipeline.exporting.keras_graph import KerasAssembled
from pipeline.exporting.onnx_graph import OnnxAssembled
from pipeline.exporting.resizing import longest_side
from pipeline.heads.head import Head
from pipeline.runs.board import take_run
from pipeline.runs.folder import Run
from pipeline.runs.notes import environment
from pipeline.tables import promise_lines
from pipeline.tuning.endtoend import network_of
from pipeline.tuning.parity import largest_gap

logger = logging.getLogger(__name__)
PARITY_IMAGES = 50  # images that are compared at most
# By kind of network: what joins it with a head.
ASSEMBLERS: dict[str, Assembler] = {"keras": KerasAssembled.join, "onnx": OnnxAssembled.join}
_FEW = 8  # images that are compared before the conversion
# Heights and widths of the painted images, beside the network's own: larger, smaller, narrow, and one pixel.
_REFERENCE_SIZES = ((375, 500), (500, 333), (96, 61), (640, 211), (1, 1))


class Probe(NamedTuple):
    """An image to compare on: its name, and its pixels, uint8 (h, w, 3), not resized."""

    name: str
    pixels: np.ndarray


def export(
    run: str | Path,
    *,
    format: str,
    out: str | Path,
    images: str | Path | None = None,
    weights: str | None = None,
    quantised: str | None = None,
    data_set: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a run as one artefact and prove that it gives the run's probabilities; otherwise leave nothing behind.

    Parameters
    ----------
    run : str or Path
        Run folder, or a folder of runs; `pipeline.runs.board.take_run` says which one is taken.
    format : {"keras", "saved_model", "onnx", "litert", "openvino"}
        Format of the artefact.
    out : str or Path
        File to make; a folder for ``saved_model`` and ``openvino``. It must not exist.
    images : str or Path, optional
        Source of the images to compare on; up to `PARITY_IMAGES` are used. By default images are painted.
    weights : str, optional
        Where the network's weights are now, if they have moved since the extraction.
    quantised : str, optional
        File of the quantised network of a run in int8, if it is in none of the usual places.
    data_set : str, optional
        Data set whose run is taken from a folder of runs.
    progress : callable, optional
        Called with ``("export", done, total)``.

    Returns
    -------
    dict
        ``format`` 1, ``artefact``, ``path``, ``run``, ``classes``, ``bytes``, ``images`` (number compared),
        ``parity_gap`` (largest difference in probability), ``precision_gap`` (that between the run's own precision and
        float32, in which the artefact computes; None for a run in float32), ``tolerance``, ``note``, and ``damaged``, the names
        of damaged runs that were left out.

    Raises
    ------
    ConfigurationError
        If the format is unknown, its runtime is missing, ``out`` exists or has another suffix, or no graph can compute
        the pixel rule exactly.
    HeadError
        If the head is neither linear nor a Keras model.
    RunError
        If the weights are not those of the run.
    ParityError
        If graph or artefact give other probabilities than the run; the artefact is not kept.
    """
    row, path = find_format(format), Path(out)
    _check_target(row, path)
    report = progress or (lambda stage, done, total: None)
    chosen, damaged = take_run(run, data_set=data_set)
    recipe = exact_recipe(chosen)
    head, dense = head_and_layers(chosen)
    writable_folder(path.parent)
    network = network_of(chosen, weights, quantised=quantised)
    kind = network.backbone.runtime
    row.check_writer(kind, keras_backend())
    probes = _painted(recipe) if images is None else _from(images, recipe)
    report("export", 1, 4)
    expected = predicted(network, recipe, head, probes)
    gate = Gate(probes, expected, chosen.task.parity_unit(expected))
    precision_gap = _precision_gap(chosen, network, head, gate)
    whole = ASSEMBLERS[kind](network, recipe, dense)
    some = gate.first(_FEW)
    received = np.concatenate([whole(probe.pixels) for probe in some.probes])
    some.check("the assembled network", received, FORMATS["keras"].tolerance, lambda: whole)
    report("export", 2, 4)
    card = _card(row, chosen, recipe)
    with writing(path), temporary_folder(path) as temporary:
        made = temporary / f"model{row.suffix}"
        with enough_room(temporary, whole.bytes):
            convert(whole.model, kind, row, made)
            write_card(made, card)
        report("export", 3, 4)
        received = run_elsewhere(made, probes)
        what = f"{row.name}, loaded by its own runtime"
        gap = gate.check(what, received, row.tolerance, _opener(whole, row, made))
        size = sum(file.stat().st_size for file in [made, *made.rglob("*")] if file.is_file())
        _publish(made, path)
    report("export", 4, 4)
    return {
        "format": 1,
        "artefact": row.name,
        "path": str(path),
        "run": chosen.run_id,
        "classes": list(chosen.classes),
        "bytes": size,
        "images": len(probes),
        "parity_gap": gap,
        "precision_gap": precision_gap,
        "tolerance": row.tolerance,
        "note": row.note,
        **({"answers": answers} if (answers := chosen.metrics.get("answers")) else {}),
        "damaged": damaged,
    }


def summary(document: dict[str, Any]) -> str:
    """Summarise the result for a person."""
    exact = document["precision_gap"] is None
    text = (
        f"{document['path']}: {document['artefact']} of {document['run']}, {document['bytes'] / 1e6:.1f} MB\n"
        f"  probabilities of {document['images']} images, computed by its own runtime, differ by at most "
        f"{document['parity_gap']:.1e} from those of {'predict' if exact else 'the run in float32'} "
        f"({document['tolerance']:.0e} is allowed)"
    )
    lines = [
        text,
        *([f"  note: {document['note']}"] if document["note"] else []),
        *promise_lines(document.get("answers")),
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- writing
def _card(row: Format, run: Run, recipe: Recipe) -> Card:
    """The card of an artefact, with what the run promises of its answers if it does."""
    values: dict[str, Any] = {
        "artefact": row.name,
        "run": run.run_id,
        "classes": run.classes,
        "recipe": recipe.to_dict(),
        "input": f"{INPUT}: uint8 (n, height, width, 3), 0-255, upright RGB, any height and width",
        "output": f"float32 (n, {run.task.things}), {run.task.predicted}",
        "note": row.note,
        "packages": environment()["packages"],
    }
    answers = run.metrics.get("answers")
    if not run.task.one_class:
        lines = run.metrics["validation"].get("per_class")
        thresholds = None if lines is None else tuple(line["threshold"] for line in lines)
        return TargetCard(**values, task=run.task.name, thresholds=thresholds, answers=answers)  # type: ignore[arg-type]
    return AnsweringCard(**values, answers=answers) if answers else Card(**values)


def _check_target(row: Format, path: Path) -> None:
    sweep_dead(path.parent)
    row.require()
    if row.suffix and path.suffix != row.suffix:
        fitting = [name for name, one in FORMATS.items() if path.suffix and one.suffix == path.suffix]
        hint = f"; for a name ending in {path.suffix} choose format {' or '.join(fitting)}" if fitting else ""
        raise ConfigurationError(f"out: received {path}, expected a name ending in {row.suffix} for {row.name}{hint}")
    if path.exists() or path.is_symlink():
        raise ConfigurationError(f"out: {path} exists; remove it or give another name")


def _publish(made: Path, path: Path) -> None:
    for file in [*made.rglob("*"), made]:
        if file.is_dir():
            sync_folder(file)
        else:
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
    if path.exists():
        raise ConfigurationError(f"out: another process made {path} meanwhile; remove it or give another name")
    os.rename(made, path)
    sync_folder(path.parent)


# -------------------------------------------------------------------------------------------------- parity
def predicted(network: Network, recipe: Recipe, head: Head, probes: Sequence[Probe]) -> np.ndarray:
    """Compute probabilities as ``predict`` does: float64, (n, c)."""
    pixels = np.stack([resize_image(Image.fromarray(probe.pixels), recipe.pixels) for probe in probes])
    engine = network.engine([recipe], batch_size=16)
    parts = []
    for start in range(0, len(pixels), 16):
        (features,) = engine(pixels[start : start + 16]).values()
        parts.append(head.predict_proba(features))
    return np.concatenate(parts)


def _precision_gap(run: Run, network: Network, head: Head, gate: Gate) -> float | None:
    """Say by how much the run's probabilities differ from those in float32, which the artefact gives; None if in nothing."""
    recipe = run.recipe.plain
    if recipe.precision == "float32":
        return None
    _, gap = largest_gap(predicted(network, recipe, head, gate.probes), gate.expected)
    logger.warning(
        "%s: its features were computed in %s, and the artefact computes in float32: the probabilities of %s differ by up to "
        "%.2g from those of predict, which is no fault",
        *(run.folder, recipe.precision, counted(len(gate.probes), "image"), gap),
    )
    return gap


def run_elsewhere(path: Path, probes: Sequence[Probe]) -> np.ndarray:
    """Compute probabilities in a new process that has only the artefact and its runtime: float64, (n, c).

    Raises
    ------
    ParityError
        If the process cannot load or run the artefact.
    """
    images, out = path.with_name("probes.npz"), path.with_name("probabilities.npy")
    arrays = {f"image_{number:04d}": probe.pixels for number, probe in enumerate(probes)}
    np.savez(images, **arrays)  # type: ignore[arg-type]
    words = ("pipeline.exporting.artefacts", str(path), str(images), str(out))
    done = run_module(*words, environment={"TF_CPP_MIN_LOG_LEVEL": "3", "TMPDIR": str(out.parent)})
    if done.returncode or not out.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ParityError(f"a new process cannot run the artefact ({lines[-1]}); it is not kept")
    return np.asarray(np.load(out, allow_pickle=False))


@dataclasses.dataclass(frozen=True)
class Gate:
    """Compares each form of the model with the run's own probabilities, float64 (n, c), of some images."""

    probes: Sequence[Probe]
    expected: np.ndarray
    unit: np.ndarray | float = 1.0

    def first(self, count: int) -> Gate:
        """Make a gate for the first images only."""
        return dataclasses.replace(self, probes=self.probes[:count], expected=self.expected[:count])

    def check(self, what: str, received: np.ndarray, tolerance: float, opened: Callable[[], Assembled] | None) -> float:
        """Return the largest difference in probability.

        Parameters
        ----------
        what : str
            The form of the model, with which the message begins.
        received : float64, (n, c)
            Probabilities that it gave.
        tolerance : float
            Largest accepted difference in probability.
        opened : callable, optional
            Returns the model that gave them, in which to look for the first stage that differs.

        Raises
        ------
        ParityError
            If the difference exceeds the tolerance or is not finite.
        """
        worst, gap = largest_gap(received / self.unit, self.expected / self.unit)
        if gap <= tolerance:
            return gap
        probe, where = self.probes[worst], ""
        if opened is not None:
            where = f" The first layer that differs is {opened().stage_that_differs(probe.pixels)!r}."
        raise ParityError(
            f"{what}: probabilities of {printable(probe.name)} differ by {gap:.2e} from those of predict; at most "
            f"{tolerance:.0e} is allowed.{where} The artefact is not kept."
        )


def _opener(whole: Assembled, row: Format, path: Path) -> Callable[[], Assembled] | None:
    """Return a function that loads the artefact again, or None if its format hides the layers' outputs."""
    if row.reopen is None:
        return None
    reopen = row.reopen
    return lambda: whole.reopened(reopen(path))


def _painted(recipe: Recipe) -> list[Probe]:
    """Paint grainy blotches in several sizes; the images are always the same."""
    probes = []
    for number, (height, width) in enumerate([(recipe.pixels.height, recipe.pixels.width), *_REFERENCE_SIZES]):
        grain = np.random.Generator(np.random.Philox(key=number)).integers(-24, 25, (height, width, 3))
        soft = reference_images(height, width, number + 1)[number]
        probes.append(Probe(f"a painted image of {height}x{width}", np.clip(soft + grain, 0, 255).astype(np.uint8)))
    return probes


def _from(images: str | Path, recipe: Recipe) -> list[Probe]:
    """Take images spread evenly over a source; unreadable and too large ones are left out."""
    source = scan(images, labelled=False)
    rows = evenly_spread(len(source), PARITY_IMAGES)
    longest = min(longest_side(side) for side in (recipe.pixels.height, recipe.pixels.width))

    def load(row: int) -> Probe | None:
        try:
            pixels = full_pixels(source.read(row), recipe.pixels)
        except UnreadableImageError as error:
            logger.warning("%s is unreadable (%s)", printable(source.paths[row]), error)
            return None
        return Probe(source.paths[row], pixels) if max(pixels.shape) <= longest else None

    with ThreadPoolExecutor(processors()) as pool:
        probes = [probe for probe in pool.map(load, rows) if probe is not None]
    if not probes:
        raise TooManyUnreadableError(f"{images}: none of {len(rows)} images could be read; nothing was exported")
    return probes
