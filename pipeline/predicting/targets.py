"""Predictions of several labels or numbers as rows of text, and such targets of new images in the order of a run.

values -> TargetRows: file, what the task says of an image, values, error        source, run -> targets (n, columns)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from features.errors import ConfigurationError, SourceError, nearest
from features.sources.imageset import ImageSet
from features.sources.splits import listed
from features.targets import UNKNOWN
from pipeline.predicting.files import Prediction, csv_line
from pipeline.tasks.task import Task

DIGITS = 9  # significant ones of a value


class TargetRows:
    """Turns predictions into text, as `pipeline.predicting.files.Rows` does for classes.

    Parameters
    ----------
    format : {"csv", "jsonl"}
        CSV with a header line, or one JSON object per line.
    names : sequence of str
        Labels or names of the numbers, in the order of the values.
    task : Task
        What is predicted.
    before : mapping
        Scores of the validation split, which hold what was chosen there.
    answers : dict, optional
        What the model promises, `pipeline.config.Answers`. Rows then give the ``set`` of labels, or the ``interval`` of each
        number, as JSON, and whether no label is sure enough (``abstain``) beside those that are (``sure``).
    """

    def __init__(
        self,
        format: str,
        names: Sequence[str],
        task: Task,
        before: Mapping[str, Any],
        answers: Mapping[str, Any] | None = None,
    ) -> None:
        self.format, self.names, self._task, self._before = format, tuple(names), task, before
        self._answers = answers
        self._said = tuple(self._told(np.zeros(len(self.names))))

    @property
    def header(self) -> str:
        """First line of the file; empty for JSON lines."""
        fixed = ("file", *self._said, "error")
        named = [f"p:{name}" if name in fixed else name for name in self.names]
        return "" if self.format == "jsonl" else csv_line(["file", *self._said, *named, "error"])

    @property
    def withholding(self) -> Mapping[str, Any] | None:
        """The promise by which labels that are not sure enough are withheld; None if none is."""
        return (self._answers or {}).get("abstain")

    def withholds(self, prediction: Prediction) -> bool:
        """Whether no label is sure enough to be given."""
        return prediction.probabilities is not None and bool(self._told(prediction.probabilities).get("abstain"))

    def _told(self, values: np.ndarray) -> dict[str, Any]:
        promised = self._task.told(values, self.names, self._answers) if self._answers else {}
        return self._task.answer(values, self.names, self._before) | promised

    def text(self, prediction: Prediction) -> str:
        """Format one line with its line end."""
        values = prediction.probabilities
        said: dict[str, Any] = dict.fromkeys(self._said)
        shown = [""] * len(self.names)
        if values is not None:
            said = self._told(values)
            shown = [f"{value:.{DIGITS}g}" for value in values]
        if self.format == "csv":
            told = ["" if value is None else json.dumps(value, ensure_ascii=False) for value in said.values()]
            return csv_line([prediction.file, *told, *shown, prediction.error])
        numbers = None if values is None else dict(zip(self.names, map(float, shown), strict=True))
        line = {"file": prediction.file, **said, "predictions": numbers, "error": prediction.error or None}
        return json.dumps(line, ensure_ascii=False) + "\n"


def refuse_options_of_classes(task: Task, **given: Any) -> None:
    """Raise ``ConfigurationError`` for options of ``predict`` that mean something for classes alone."""
    for option, value in given.items():
        if value is not None:
            raise ConfigurationError(f"--{option}: is for runs of classes, and this one is for --task {task.name}")


def targets_of_source(source: ImageSet, names: Sequence[str], model: str) -> np.ndarray:
    """Targets of new images in the order of the columns of a model, uint8 or float64 (n, columns).

    A label that no new image has, holds nowhere; a number that is missing is an error.

    Raises
    ------
    SourceError
        If the images have other columns than the model.
    """
    target = source.target
    assert target is not None
    places = {name: place for place, name in enumerate(target.columns)}
    strange = [name for name in target.columns if name not in names]
    missing = [name for name in names if name not in places] if target.values.dtype.kind == "f" else []
    if strange or missing:
        found = f"has {listed(strange)}, which {model} does not know{nearest(strange[0], names)}" if strange else ""
        lacks = f"lacks {listed(missing)}" if missing else ""
        raise SourceError(
            f"{source.description}: {' and '.join(filter(None, [found, lacks]))}; expected {listed(names, 3)}. Rename them, "
            "or name the columns with --target"
        )
    values = np.zeros((len(source), len(names)), target.values.dtype)
    for place, name in enumerate(names):
        if name in places:
            values[:, place] = target.values[:, places[name]]
    if target.values.dtype.kind == "u":
        values[~target.known] = UNKNOWN
    return values
