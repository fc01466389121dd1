"""Exported models: the card that is stored inside each of them, and running one with its own runtime.

    open_artefact(path) -> card (classes, recipe) + runtime -> probabilities of uint8 images of any size

Nothing here needs the run, the network or the head that an artefact was made from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import model_serializer

from features.canonical import canonical_json
from features.errors import ConfigurationError, RunError
from features.networks.backend import leave_out
from features.pixels.decode import decode_upright
from features.recipe import PixelRule, Recipe
from pipeline.config import Answers, LabelAnswers, NumberAnswers, Settings, Share, parse_one_of
from pipeline.exporting.formats import FORMATS, Format, Runtime, format_of
from pipeline.exporting.resizing import longest_side
from pipeline.tasks.table import CLASSIFICATION, TASKS
from pipeline.tasks.task import Task


class Card(Settings):
    """Description of an artefact, stored inside it as JSON.

    Parameters
    ----------
    artefact : str
        Key of `pipeline.exporting.formats.FORMATS`.
    run : str
        Id of the run that it was made from.
    classes : tuple of str
        Class names, in the order of the output's columns.
    recipe : dict
        Recipe of the features that the head was trained on; see ``features.recipe.Recipe``.
    input, output : str
        Shape and meaning of input and output, for a person.
    note : str
        What everyone must know who runs the artefact without this project.
    packages : dict
        Versions of the packages that made it.
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


class AnsweringCard(Card):
    """Description of an artefact of a run that promises something of its answers.

    An answer whose probability, in float32, is below ``answers.abstain.threshold`` is not sure enough; null: none is. The
    classes of at least the probability ``answers.sets.least`` are the set of an image.
    """

    format: Literal[2] = 2  # type: ignore[assignment]
    answers: Answers


class TargetCard(Card):
    """Description of an artefact of several labels or numbers.

    ``classes`` are the names of the outputs. A label is given from its threshold on; numbers have no ``thresholds``. With
    ``answers``, the labels of at least the probability ``answers.abstain.threshold``, in float32, are sure (null: none is), those of
    at least ``answers.sets.least`` are the set of an image, and the interval of a
    number is its prediction plus and minus that of ``answers.intervals.half_widths``. A release that knows none refuses it.
    """

    format: Literal[3] = 3  # type: ignore[assignment]
    task: Literal["multilabel", "regression"]
    thresholds: tuple[Share, ...] | None = None
    answers: LabelAnswers | NumberAnswers | None = None

    @model_serializer(mode="wrap")
    def _without_what_was_not_asked(self, handler: Callable[[TargetCard], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "answers" or value is not None}


CARDS = (Card, AnsweringCard, TargetCard)


class Artefact:
    """An exported model with its runtime.

    Attributes
    ----------
    path : Path
        File or folder of the artefact.
    card : Card
        Its description.
    classes : tuple of str
        Class names, in the order of the probabilities.
    recipe : Recipe
        Recipe of the features that it computes.
    answers : dict or None
        What it promises of its answers, `pipeline.config.Answers`.
    task : Task
        What it predicts.
    before : dict
        The thresholds of labels, as `Task.answer` takes them.
    longest_side : int
        Largest height or width of an image that it takes, in pixels.
    """

    def __init__(self, path: Path, card: Card, runtime: Runtime) -> None:
        self.path = path
        self.card = card
        self.classes = card.classes
        self.answers = card.model_dump(mode="json").get("answers")
        self.task: Task = TASKS[getattr(card, "task", CLASSIFICATION.name)]
        given = zip(card.classes, getattr(card, "thresholds", None) or (), strict=False)
        self.before: Mapping[str, Any] = {
            "per_class": [{"name": name, "threshold": threshold} for name, threshold in given]
        }
        self.recipe = _recipe(path, card)
        self.longest_side = min(longest_side(side) for side in (self.recipe.pixels.height, self.recipe.pixels.width))
        self._runtime = runtime

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Compute class probabilities.

        Parameters
        ----------
        images : uint8, (n, h, w, 3), 0-255
            Upright RGB pixels; height and width up to `longest_side`.

        Returns
        -------
        float64, (n, c), 0-1, rows sum to 1

        Raises
        ------
        ConfigurationError
            If the images have another dtype or shape, or are too large.
        RunError
            If the runtime fails, or its output has another shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise ConfigurationError(
                f"images: received {images.dtype} {images.shape}, expected uint8 (n, height, width, 3)"
            )
        if max(images.shape[1:3]) > self.longest_side:
            raise ConfigurationError(
                f"images: received {images.shape[1:3]}, expected height and width of at most {self.longest_side} pixels"
            )
        try:
            received = np.asarray(self._runtime(np.ascontiguousarray(images)), np.float64)
        except Exception as error:  # runtimes raise errors of any type, even plain Exception
            raise RunError(f"{self.path}: {self.card.artefact} cannot run it: {_first_line(error)}") from error
        expected = (len(images), len(self.classes))
        if received.shape != expected:
            raise RunError(f"{self.path}: its output has the shape {received.shape}, expected {expected} from its card")
        return received


def open_artefact(path: str | Path) -> Artefact:
    """Load an exported model with its own runtime.

    Parameters
    ----------
    path : str or Path
        File or folder that ``export`` wrote.

    Raises
    ------
    RunError
        If the path is no exported model, is damaged, or has another format than its card says.
    ConfigurationError
        If its runtime is not installed; the message says what to install.
    FormatVersionError
        If the card has a format version that this release does not know.
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
    """Tell whether a path looks like something that ``export`` wrote; nothing is loaded.

    A run and a folder of runs are none, whatever else lies in them.
    """
    path = Path(path)
    return format_of(path) is not None and not any(any(path.glob(name)) for name in ("config.yaml", "*/config.yaml"))


def read_card(path: Path) -> tuple[Format, Card]:
    """Read format and card of an artefact. No runtime is loaded, except OpenVINO, which alone can read its files."""
    found = format_of(path)
    if found is None:
        raise RunError(
            f"{path}: is no exported model (expected a file ending in .keras, .onnx or .tflite, or a folder with "
            "saved_model.pb or model.xml). Make one with bottleneck export."
        )
    found.require()
    try:
        text = found.get(path)
        values = None if text is None else json.loads(text)
    except Exception as error:  # readers of zip, protocol buffers, XML and JSON raise errors of any type
        raise RunError(f"{path}: its card cannot be read ({_first_line(error)}); export the run again") from error
    if values is None:
        raise RunError(f"{path}: holds no card with classes and recipe, so bottleneck export did not make it")
    card = parse_one_of(CARDS, values, f"{path}: card", error=RunError)
    if card.artefact != found.name:
        raise RunError(f"{path}: its card says that the format is {card.artefact}, but it is {found.name}")
    return found, card


def write_card(path: Path, card: Card) -> None:
    """Store the card inside a finished artefact."""
    FORMATS[card.artefact].put(path, canonical_json(card.model_dump(mode="json")))


def full_pixels(data: bytes, rule: PixelRule) -> np.ndarray:
    """Decode an image file to upright RGB pixels, uint8 (h, w, 3), not resized; raises what ``decode_upright`` raises."""
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
    """``ARTEFACT IMAGES.npz OUT.npy``: compute probabilities of the images in an ``.npz``, by this process alone."""
    path, images, out = arguments
    artefact = open_artefact(path)
    with np.load(images, allow_pickle=False) as archive:
        rows = [artefact(archive[name][None])[0] for name in archive.files]
    np.save(out, np.stack(rows), allow_pickle=False)
    return 0


if __name__ == "__main__":
    leave_out("matplotlib", "pandas", "sklearn")
    sys.exit(main(sys.argv[1:]))
