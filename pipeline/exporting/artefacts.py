"""Exported models: what is written about them inside, and running one with its own runtime.

    open_artefact(path) -> card (classes, recipe) + runtime -> probabilities of uint8 images of any size

Nothing here needs the run, the backbone or the head that an artefact was made of.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from features.canonical import canonical_json
from features.errors import ConfigurationError, RunError
from features.pixels.decode import decode_upright
from features.recipe import PixelRule, Recipe
from pipeline.config import Settings, parse
from pipeline.exporting.formats import FORMATS, Format, Runtime, format_of
from pipeline.exporting.resizing import longest_side


class Card(Settings):
    """What an artefact says about itself, as JSON.

    Parameters
    ----------
    artefact : str
        Key of `pipeline.exporting.formats.FORMATS`.
    run : str
        Run that it was made of.
    classes : tuple of str
        Names of the output's columns.
    recipe : dict
        Of the features that the head was trained on; see ``features.recipe.Recipe``.
    input, output : str
        Shape and meaning, for a person.
    note : str
        What whoever runs it without this project must know.
    packages : dict
        Versions that it was made with.
    """

    format: Literal[1] = 1
    artefact: str
    run: str
    classes: tuple[str, ...]
    recipe: dict[str, Any]
    input: str
    output: str
    note: str = ""
    packages: dict[str, str]


class Artefact:
    """An exported model with its runtime.

    Attributes
    ----------
    path : Path
        Where it is.
    card : Card
        What it says about itself.
    classes : tuple of str
        Class names, in the order of the probabilities.
    recipe : Recipe
        What its pixels go through.
    longest_side : int
        Of an image, in pixels.
    """

    def __init__(self, path: Path, card: Card, runtime: Runtime) -> None:
        self.path = path
        self.card = card
        self.classes = card.classes
        self.recipe = _recipe(path, card)
        self.longest_side = min(longest_side(side) for side in (self.recipe.pixels.height, self.recipe.pixels.width))
        self._runtime = runtime

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities.

        Parameters
        ----------
        images : uint8, (n, h, w, 3), 0-255
            Upright RGB pixels, of any size.

        Returns
        -------
        float64, (n, c), 0-1, rows sum to 1

        Raises
        ------
        RunError
            If the runtime fails, or gives something else.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise ConfigurationError(
                f"images: received {images.dtype} {images.shape}, expected uint8 (n, height, width, 3)"
            )
        if max(images.shape[1:3]) > self.longest_side:
            raise ConfigurationError(
                f"images: received {images.shape[1:3]}, this model takes sides up to {self.longest_side} pixels"
            )
        try:
            received = np.asarray(self._runtime(np.ascontiguousarray(images)), np.float64)
        except Exception as error:  # the runtimes raise whatever they meet, plain Exception too
            raise RunError(f"{self.path}: {self.card.artefact} cannot run it: {_first_line(error)}") from error
        expected = (len(images), len(self.classes))
        if received.shape != expected:
            raise RunError(f"{self.path}: its output is {received.shape}, its card promises {expected}")
        return received


def open_artefact(path: str | Path) -> Artefact:
    """Load an exported model with its own runtime.

    Parameters
    ----------
    path : str or Path
        What ``export`` wrote.

    Raises
    ------
    RunError
        If it is none, damaged, or of another kind than its card says.
    ConfigurationError
        If its runtime is missing; the message says what to install.
    FormatVersionError
        If another release wrote the card.
    """
    path = Path(path)
    found, card = read_card(path)
    found.require()
    try:
        runtime = found.load(path)
    except Exception as error:  # as above
        raise RunError(f"{path}: {found.name} cannot load it: {_first_line(error)}") from error
    return Artefact(path, card, runtime)


def is_artefact(path: str | Path) -> bool:
    """Whether a path looks like something that ``export`` wrote; nothing is loaded."""
    return format_of(Path(path)) is not None


def read_card(path: Path) -> tuple[Format, Card]:
    """Format and card of an artefact; no runtime is loaded, but OpenVINO's, whose files only it reads."""
    found = format_of(path)
    if found is None:
        raise RunError(
            f"{path}: is no exported model (expected a file ending in .keras, .onnx or .tflite, or a folder with "
            "saved_model.pb or model.xml). bottleneck export makes one."
        )
    found.require()
    try:
        text = found.get(path)
        values = None if text is None else json.loads(text)
    except Exception as error:  # a zip, a protocol buffer, XML, JSON: whatever their readers raise
        raise RunError(f"{path}: what it says about itself cannot be read: {_first_line(error)}") from error
    if values is None:
        raise RunError(f"{path}: says nothing about classes and pixels; bottleneck export did not make it")
    card = parse(Card, values, f"{path}: card", error=RunError)
    if card.artefact != found.name:
        raise RunError(f"{path}: its card says {card.artefact}, it is {found.name}")
    return found, card


def write_card(path: Path, card: Card) -> None:
    """Put the card into a finished artefact."""
    FORMATS[card.artefact].put(path, canonical_json(card.model_dump(mode="json")))


def full_pixels(data: bytes, rule: PixelRule) -> np.ndarray:
    """Upright RGB pixels of a whole image file: uint8 (h, w, 3), not resized; raises as ``decode_upright``."""
    return np.asarray(decode_upright(data, rule).image)


def _recipe(path: Path, card: Card) -> Recipe:
    try:
        return Recipe.from_dict(card.recipe)
    except (ConfigurationError, TypeError) as error:
        raise RunError(f"{path}: card: recipe: {error}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def main(arguments: Sequence[str]) -> int:
    """``ARTEFACT IMAGES.npz OUT.npy``: probabilities of the arrays of an ``.npz``, by this process alone."""
    path, images, out = arguments
    artefact = open_artefact(path)
    with np.load(images, allow_pickle=False) as archive:
        rows = [artefact(archive[name][None])[0] for name in archive.files]
    np.save(out, np.stack(rows), allow_pickle=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
