"""The conversion of an ONNX model for OpenVINO, in a process of its own with limits of memory and processor time.

    model, recipes --convert()--> child: outputs of ONNX Runtime, conversion, one compilation --> arrays of a cached file

A small file can make either library work for hours, or take any amount of memory, before it has seen an image; and neither
can be stopped within a process. A conversion that is kept has passed here.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from features.children import run_module
from features.errors import BottleneckError, ConfigurationError, OpenVinoError
from features.networks.onnx_engine import OnnxRuntimeEngine, is_memory_error, limited_memory, memory_of
from features.networks.openvino_engine import OpenVinoEngine, from_onnx
from features.networks.reference import REFERENCES, reference_images
from features.recipe import Recipe
from features.temporary import system_folder

_MEMORY = "memory"  # in the place of a message
_MODEL, _ASKED, _RAN, _ARRAYS, _ERROR = "model.onnx", "asked.json", "ran", "arrays.npz", "error"


def limits_of(length: int, pixels: int) -> tuple[int, int]:
    """Return how much memory (bytes) and processor time (seconds) a model of so many bytes may take for so many pixels.

    Both are far above what networks need: a vision transformer of 97 MB takes 10 of its 313 seconds.
    """
    return 2 * memory_of(length, pixels), int((30 + 5e-7 * length) * max(1, pixels / 224**2))


def convert(model: bytes, recipes: Sequence[Recipe], step: int | None) -> dict[str, np.ndarray]:
    """Convert a composed ONNX model and return the arrays of a cached file, as ``from_onnx`` does.

    Parameters
    ----------
    model : bytes
        As ``features.networks.onnx_graph.composed`` makes it.
    recipes : sequence of Recipe
        The feature sets, one per output.
    step : int or None
        Images per pass, if the model takes no other number.

    Raises
    ------
    ConfigurationError
        If ONNX Runtime cannot load it within the limits.
    OpenVinoError
        If OpenVINO cannot convert it within them.
    """
    rule = recipes[0].pixels
    memory, seconds = limits_of(len(model), REFERENCES * rule.height * rule.width)
    with system_folder() as folder:
        try:
            (folder / _MODEL).write_bytes(model)
            (folder / _ASKED).write_text(json.dumps({"step": step, "recipes": [item.to_dict() for item in recipes]}))
        except OSError as error:
            raise OpenVinoError(
                f"the network cannot be converted: {folder.parent}: {error.strerror or error}"
            ) from error
        done = run_module(
            "features.networks.converting", *map(str, (folder, memory, seconds)), environment={"TMPDIR": str(folder)}
        )
        if done.returncode == 0:
            with np.load(folder / _ARRAYS, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        said = (folder / _ERROR).read_text() if (folder / _ERROR).exists() else ""
        ran = (folder / _RAN).exists()
    if said and said != _MEMORY:
        raise (OpenVinoError if ran else ConfigurationError)(said)
    if done.returncode == -signal.SIGXCPU:
        reason = f"it takes more than {seconds} seconds of processor time"
    elif said:
        reason = f"it takes more than {memory / 1e6:.0f} MB of memory"
    else:
        reason = f"the process ended with status {done.returncode}: {done.stderr.strip()[-200:]}"
    if ran:
        raise OpenVinoError(f"OpenVINO cannot convert the network: {reason}")
    raise ConfigurationError(
        f"ONNX Runtime cannot run the network: {reason}. Check where the file comes from, or export it again"
    )


def _work(folder: Path) -> None:
    asked = json.loads((folder / _ASKED).read_text())
    recipes, step = [Recipe.from_dict(item) for item in asked["recipes"]], asked["step"]
    model, rule = (folder / _MODEL).read_bytes(), recipes[0].pixels
    batch = reference_images(rule.height, rule.width)
    expected = [*OnnxRuntimeEngine(model, recipes, batch_size=len(batch), step=step)(batch).values()]
    (folder / _RAN).touch()
    arrays = from_onnx(model, batch, expected, step)
    OpenVinoEngine(arrays["model"], arrays["weights"], recipes, batch_size=len(batch), step=step)  # compiles it
    np.savez(folder / _ARRAYS, **arrays)  # type: ignore[arg-type]


def _main(folder: Path, memory: int, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        with limited_memory(memory):
            _work(folder)
    except Exception as error:  # the classes of ONNX Runtime's errors are not public
        if is_memory_error(error):
            (folder / _ERROR).write_text(_MEMORY)
        elif isinstance(error, BottleneckError):
            (folder / _ERROR).write_text(str(error))
        raise


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
