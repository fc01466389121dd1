"""One artefact from pixels to probabilities: resize, preprocessing, backbone, head and class names in one graph.

run -> network + head -> one Keras model -> parity -> convert -> parity by its own runtime, in a new process -> rename
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from features.errors import (
    ConfigurationError,
    ParityError,
    TooManyUnreadableError,
    UnreadableImageError,
)
from features.files import printable, sync_folder, writable_folder, writing
from features.machine import processors
from features.networks.backend import load_keras
from features.networks.network import Network
from features.networks.openvino_engine import reference_images
from features.networks.reference import evenly_spread
from features.pixels.decode import resize_image
from features.progress import Progress
from features.recipe import Recipe
from features.sources.scan import scan
from pipeline.exporting.artefacts import Card, full_pixels, write_card
from pipeline.exporting.assembled import as_network, assemble, exact_recipe, first_stage_that_differs, outputs_of
from pipeline.exporting.formats import FORMATS, INPUT, Format, convert, find_format
from pipeline.exporting.resizing import longest_side
from pipeline.heads.head import Head
from pipeline.heads.kinds import head_of
from pipeline.runs.folder import choose_run
from pipeline.runs.notes import environment
from pipeline.tuning.endtoend import network_of
from pipeline.tuning.parity import largest_gap

logger = logging.getLogger(__name__)
# In probability, from the run's own prediction. LiteRT multiplies in another order, and in half precision on some chips.
PARITY_IMAGES = 50
_FEW = 8  # of them, by the network before it is converted
# Exactly the network's size, larger, smaller, narrow, and one pixel: height and width.
_REFERENCE_SIZES = ((375, 500), (500, 333), (96, 61), (640, 211), (1, 1))


class Probe(NamedTuple):
    """An image to compare on: its name, and uint8 (h, w, 3), not resized."""

    name: str
    pixels: np.ndarray


def export(
    run: str | Path,
    *,
    format: str,
    out: str | Path,
    images: str | Path | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a run as one artefact, prove it, or leave nothing.

    Parameters
    ----------
    run : str or Path
        Run folder, or a folder of runs, of which the best one is taken.
    format : {"keras", "saved_model", "onnx", "litert", "openvino"}
        Kind of artefact.
    out : str or Path
        File to make; of ``saved_model`` and ``openvino`` a folder. It must not exist.
    images : str or Path, optional
        Images to compare on, any source; up to `PARITY_IMAGES` of them are taken. Without it: painted ones.
    weights : str, optional
        Where the backbone's weights are now, if not where the extraction found them.
    progress : callable, optional
        Called with ``("export", done, total)``.

    Returns
    -------
    dict
        ``format`` 1, ``artefact``, ``path``, ``run``, ``classes``, ``bytes``, ``images`` compared, ``parity_gap``
        (largest difference in probability), ``tolerance`` and ``note``.

    Raises
    ------
    ConfigurationError
        An unknown format, a missing runtime, an ``out`` that exists or has another suffix, a pixel rule that no graph
        computes exactly.
    HeadError
        A head that is not linear and no network.
    RunError
        A run of other weights.
    ParityError
        If graph or artefact give other probabilities than the run; the artefact is not kept.
    """
    row, path = find_format(format), Path(out)
    _check_target(row, path)
    report = progress or (lambda stage, done, total: None)
    chosen = choose_run(run)
    recipe = exact_recipe(chosen)
    head = head_of(chosen)
    dense = as_network(head)
    writable_folder(path.parent)
    keras = load_keras()
    _check_backend(row, keras.backend.backend())
    network = network_of(chosen, weights)
    probes = _painted(recipe) if images is None else _from(images, recipe)
    report("export", 1, 4)
    gate = Gate(network, recipe, probes, predicted(network, recipe, head, probes))
    model = assemble(network, recipe, dense)
    some = gate.first(_FEW)
    received = np.concatenate([_call(model, probe.pixels) for probe in some.probes])
    some.check("the assembled network", received, FORMATS["keras"].tolerance, lambda: model)
    report("export", 2, 4)
    card = Card(
        artefact=row.name,
        run=chosen.run_id,
        classes=chosen.classes,
        recipe=recipe.to_dict(),
        input=f"{INPUT}: uint8 (n, height, width, 3), 0-255, upright RGB, any height and width",
        output="float32 (n, classes), probabilities",
        note=row.note,
        packages=environment()["packages"],
    )
    with _new(path) as temporary:
        made = temporary / f"model{row.suffix}"
        convert(model, row, made)
        write_card(made, card)
        report("export", 3, 4)
        received = run_elsewhere(made, probes)
        what = f"{row.name}, loaded by its own runtime"
        gap = gate.check(what, received, row.tolerance, _opener(row, made))
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
        "tolerance": row.tolerance,
        "note": row.note,
    }


def summary(document: dict[str, Any]) -> str:
    """The result for a person."""
    text = (
        f"{document['path']}: {document['artefact']} of {document['run']}, {document['bytes'] / 1e6:.1f} MB\n"
        f"  probabilities of {document['images']} images by its own runtime: at most {document['parity_gap']:.1e} from "
        f"those of predict ({document['tolerance']:.0e} is allowed)"
    )
    return text + (f"\n  note: {document['note']}" if document["note"] else "")


# -------------------------------------------------------------------------------------------------- writing
def _check_target(row: Format, path: Path) -> None:
    row.require()
    if row.suffix and path.suffix != row.suffix:
        raise ConfigurationError(f"out: received {path}, a file of format {row.name} ends in {row.suffix}")
    if path.exists() or path.is_symlink():
        raise ConfigurationError(f"out: {path} exists; remove it or give another name")


def _check_backend(row: Format, backend: str) -> None:
    if row.name != "keras" and backend != "tensorflow":
        raise ConfigurationError(
            f"format {row.name}: is converted with TensorFlow, Keras runs on {backend}; unset KERAS_BACKEND"
        )


@contextlib.contextmanager
def _new(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, removed in any case."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _publish(made: Path, path: Path) -> None:
    for file in [*made.rglob("*"), made]:
        if file.is_dir():
            sync_folder(file)
        else:
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
    if path.exists():
        raise ConfigurationError(f"out: {path} was made by someone else meanwhile; it is left as it is")
    os.rename(made, path)
    sync_folder(path.parent)


# -------------------------------------------------------------------------------------------------- parity
def predicted(network: Network, recipe: Recipe, head: Head, probes: Sequence[Probe]) -> np.ndarray:
    """Probabilities as ``predict`` computes them: float64, (n, c)."""
    pixels = np.stack([resize_image(Image.fromarray(probe.pixels), recipe.pixels) for probe in probes])
    engine = network.engine([recipe], batch_size=16)
    parts = []
    for start in range(0, len(pixels), 16):
        (features,) = engine(pixels[start : start + 16]).values()
        parts.append(head.predict_proba(features))
    return np.concatenate(parts)


def run_elsewhere(path: Path, probes: Sequence[Probe]) -> np.ndarray:
    """Probabilities by a new process that has only the artefact and its runtime: float64, (n, c).

    Raises
    ------
    ParityError
        If it cannot load or run it.
    """
    images, out = path.with_name("probes.npz"), path.with_name("probabilities.npy")
    arrays = {f"image_{number:04d}": probe.pixels for number, probe in enumerate(probes)}
    np.savez(images, **arrays)  # type: ignore[arg-type]
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.exporting.artefacts", str(path), str(images), str(out)],
        env={**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not out.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ParityError(f"a new process cannot run the artefact ({lines[-1]}); it is not kept")
    return np.load(out, allow_pickle=False)


@dataclasses.dataclass(frozen=True)
class Gate:
    """What every form of the network is compared with: the run's own prediction, float64 (n, c), of some images."""

    network: Network
    recipe: Recipe
    probes: Sequence[Probe]
    expected: np.ndarray

    def first(self, count: int) -> Gate:
        """The same of the first few images."""
        return dataclasses.replace(self, probes=self.probes[:count], expected=self.expected[:count])

    def check(self, what: str, received: np.ndarray, tolerance: float, opened: Callable[[], Any] | None) -> float:
        """Largest difference in probability.

        Parameters
        ----------
        what : str
            What gave ``received``, for the message.
        received : float64, (n, c)
            Its probabilities.
        tolerance : float
            In probability.
        opened : callable, optional
            Gives the Keras model behind them, to look for the layer that is to blame.

        Raises
        ------
        ParityError
            If it exceeds the tolerance, or is not finite.
        """
        worst, gap = largest_gap(received, self.expected)
        if gap <= tolerance:
            return gap
        probe, where = self.probes[worst], ""
        if opened is not None:
            layer = first_stage_that_differs(opened(), self.network, self.recipe, probe.pixels)
            where = f" The first layer that differs is {layer!r}."
        raise ParityError(
            f"{what}: probabilities of {printable(probe.name)} differ by {gap:.2e} from those of predict, at most "
            f"{tolerance:.0e} is allowed.{where} The artefact is not kept."
        )


def _opener(row: Format, path: Path) -> Callable[[], Any] | None:
    """Only in Keras's own format do layers have outputs to look at."""
    return functools.partial(load_keras().saving.load_model, path, compile=False) if row.name == "keras" else None


def _call(model: Any, pixels: np.ndarray) -> np.ndarray:
    (output,) = outputs_of(model, pixels[None])
    return np.asarray(load_keras().ops.convert_to_numpy(output), np.float64)


def _painted(recipe: Recipe) -> list[Probe]:
    """Pictures of blotches with grain, of several sizes, always the same ones."""
    probes = []
    for number, (height, width) in enumerate([(recipe.pixels.height, recipe.pixels.width), *_REFERENCE_SIZES]):
        grain = np.random.Generator(np.random.Philox(key=number)).integers(-24, 25, (height, width, 3))
        soft = reference_images(height, width, number + 1)[number]
        probes.append(Probe(f"a painted image of {height}x{width}", np.clip(soft + grain, 0, 255).astype(np.uint8)))
    return probes


def _from(images: str | Path, recipe: Recipe) -> list[Probe]:
    """Images spread evenly over a source; unreadable ones are left out."""
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
