"""The conversion of an ONNX model for OpenVINO, in a process of its own with limits of memory and processor time.

    model, recipes --convert()--> child: outputs of ONNX Runtime, conversion, one compilation --> arrays of a cached file

A conversion that is kept has passed here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from features.errors import ConfigurationError, OpenVinoError
from features.networks.limited import limits_of, run_limited
from features.networks.onnx_engine import OnnxRuntimeEngine
from features.networks.openvino_engine import OpenVinoEngine, from_onnx
from features.networks.reference import REFERENCES, reference_images
from features.recipe import Recipe
from features.temporary import system_folder

_MODEL, _ASKED, _RAN, _ARRAYS = "model.onnx", "asked.json", "ran", "arrays.npz"


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
    limits = limits_of(len(model), REFERENCES * rule.height * rule.width)
    with system_folder() as folder:
        try:
            (folder / _MODEL).write_bytes(model)
            (folder / _ASKED).write_text(json.dumps({"step": step, "recipes": [item.to_dict() for item in recipes]}))
        except OSError as error:
            raise OpenVinoError(
                f"the network cannot be converted: {folder.parent}: {error.strerror or error}"
            ) from error
        failure = run_limited(__name__, folder, limits)
        if failure is None:
            with np.load(folder / _ARRAYS, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        ran = (folder / _RAN).exists()
    if failure.said:
        raise (OpenVinoError if ran else ConfigurationError)(failure.said)
    if ran:
        raise OpenVinoError(f"OpenVINO cannot convert the network: {failure.reason}")
    raise ConfigurationError(
        f"ONNX Runtime cannot run the network: {failure.reason}. Check where the file comes from, or export it again"
    )


def work(folder: Path) -> None:
    """Convert what lies in a folder, in a process of its own: see ``features.networks.limited``."""
    asked = json.loads((folder / _ASKED).read_text())
    recipes, step = [Recipe.from_dict(item) for item in asked["recipes"]], asked["step"]
    model, rule = (folder / _MODEL).read_bytes(), recipes[0].pixels
    batch = reference_images(rule.height, rule.width)
    expected = [*OnnxRuntimeEngine(model, recipes, batch_size=len(batch), step=step)(batch).values()]
    (folder / _RAN).touch()
    arrays = from_onnx(model, batch, expected, step)
    OpenVinoEngine(arrays["model"], arrays["weights"], recipes, batch_size=len(batch), step=step)  # compiles it
    np.savez(folder / _ARRAYS, **arrays)  # type: ignore[arg-type]
