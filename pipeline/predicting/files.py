"""Predictions as rows of CSV or JSON lines, for all classes or the most probable ones, written as they arrive.

Names are written unchanged, so that a program can read them back. A spreadsheet takes a name that begins with ``=``, ``+``,
``-`` or ``@`` for a formula unless the column is imported as text.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from features.errors import ConfigurationError, check_range, nearest
from features.files import atomic_file, printable_lines, quoted
from pipeline.scores.answers import class_sets, is_answered

FORMATS = ("csv", "jsonl")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl"}
_OTHERS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".h5",
    ".hdf5",
    ".npz",
    ".zip",
    ".parquet",
    ".xlsx",
)  # suffixes of files that cannot hold rows of text
_FIXED = ("file", "class", "probability", "error")


class Prediction(NamedTuple):
    """The prediction for one image.

    Parameters
    ----------
    file : str
        Name of the image in the source.
    probabilities : float64, (c,), 0-1, or None
        Probability of every class; None if the image could not be read.
    error : str
        Why the image could not be read, one of ``features.pixels.decode.REASONS``; else empty.
    """

    file: str
    probabilities: np.ndarray | None
    error: str = ""


def choose_format(name: str | None, out: Path | None) -> str:
    """Return the requested format, else the one that the suffix of the file stands for, else CSV.

    Raises
    ------
    ConfigurationError
        For an unknown format, a ``.json`` file (the rows are not one JSON document), or a file with the suffix of another
        kind of file.
    """
    if out is not None and out.suffix.lower() in _OTHERS:
        picture = "; --grid draws a picture" if out.suffix.lower() in _OTHERS[:3] else ""
        raise ConfigurationError(
            f"--out {out}: predictions are lines of text; type --out {quoted(out.with_suffix('.csv'))}{picture}"
        )
    if name is not None:
        if name not in FORMATS:
            raise ConfigurationError(f"--format: received {name!r}, expected csv or jsonl{nearest(name, FORMATS)}")
        return name
    if out is None:
        return "csv"
    if out.suffix.lower() == ".json":
        raise ConfigurationError(
            f"--out {out}: predictions are a line of JSON for each image, not one document; "
            f"type --out {quoted(out.with_suffix('.jsonl'))}"
        )
    return _SUFFIXES.get(out.suffix.lower(), "csv")


class Rows:
    """Turns predictions into text.

    Parameters
    ----------
    format : {"csv", "jsonl"}
        CSV with a header line, or one JSON object per line.
    classes : sequence of str
        Class names, in the order of the probabilities.
    top : int, optional
        Number of classes to write, the most probable first; ties are in the order of ``classes``.
    answers : dict, optional
        What the model promises, `pipeline.config.Answers`. Rows then say whether the answer is withheld (``abstain``), where a
        precision was asked for, and the ``set`` of classes, a JSON list.

    Raises
    ------
    ConfigurationError
        If there are fewer classes than ``top``.
    """

    def __init__(
        self, format: str, classes: Sequence[str], top: int | None = None, answers: Mapping[str, Any] | None = None
    ) -> None:
        if top is not None:
            check_range("--top", top, 1, len(classes))
        self.classes = tuple(classes)
        self.top = top
        self.format = format
        self._answers = answers or {}
        self._told = tuple(
            name for name, entry in (("abstain", "abstain"), ("set", "sets")) if self._answers.get(entry)
        )

    @property
    def header(self) -> str:
        """First line of the file; empty for JSON lines."""
        if self.format == "jsonl":
            return ""
        if self.top:
            numbered = [f"{name}_{place}" for place in range(1, self.top + 1) for name in ("class", "probability")]
            return csv_line(["file", *numbered, *self._told, "error"])
        fixed = (*_FIXED, *self._told)
        named = [f"p:{name}" if name in fixed else name for name in self.classes]
        return csv_line([*_FIXED[:3], *self._told, *named, "error"])

    @property
    def withholding(self) -> Mapping[str, Any] | None:
        """The promise by which answers that are not sure enough are withheld; None if none is."""
        return self._answers.get("abstain")

    def withholds(self, prediction: Prediction) -> bool:
        """Whether the answer is not sure enough to be given."""
        if self.withholding is None or prediction.probabilities is None:
            return False
        return not is_answered(prediction.probabilities.max(), self.withholding["threshold"])

    def text(self, prediction: Prediction) -> str:
        """Format one line with its line end. Probabilities have six significant digits."""
        return self._json(prediction) if self.format == "jsonl" else self._csv(prediction)

    def _csv(self, prediction: Prediction) -> str:
        values = prediction.probabilities
        if values is None:
            blank = len(self._told) + (2 * self.top if self.top else 2 + len(self.classes))
            return csv_line([prediction.file, *[""] * blank, prediction.error])
        best, said = ranked(values), self._said(values)
        told = [json.dumps(said[name], ensure_ascii=False) for name in self._told]
        if self.top:
            pairs = [cell for index in best[: self.top] for cell in (self.classes[index], f"{values[index]:.6g}")]
            return csv_line([prediction.file, *pairs, *told, ""])
        shown = [f"{value:.6g}" for value in values]
        return csv_line([prediction.file, self.classes[best[0]], shown[best[0]], *told, *shown, ""])

    def _said(self, values: np.ndarray) -> dict[str, Any]:
        """What the row says beside the probabilities: ``abstain`` and ``set``, where the model promises them."""
        said: dict[str, Any] = {}
        if self.withholding is not None:
            said["abstain"] = not is_answered(values.max(), self.withholding["threshold"])
        if sets := self._answers.get("sets"):
            inside = class_sets(values, sets["least"])
            said["set"] = [self.classes[k] for k in ranked(values) if inside[k]]
        return said

    def _json(self, prediction: Prediction) -> str:
        line: dict[str, Any] = {"file": prediction.file, "class": None, "probability": None}
        key = "top" if self.top else "probabilities"
        values = prediction.probabilities
        if values is None:
            line |= {**dict.fromkeys(self._told), key: None, "error": prediction.error}
        else:
            best, shown = ranked(values), [float(f"{value:.6g}") for value in values]
            line |= {"class": self.classes[best[0]], "probability": shown[best[0]], **self._said(values)}
            if self.top:
                line[key] = [{"class": self.classes[k], "probability": shown[k]} for k in best[: self.top]]
            else:
                line[key] = dict(zip(self.classes, shown, strict=True))
            line["error"] = None
        return json.dumps(line, ensure_ascii=False) + "\n"


def ranked(probabilities: np.ndarray) -> list[int]:
    """Return class numbers, the most probable first; ties keep their order.

    Examples
    --------
    >>> ranked(np.array([0.2, 0.4, 0.4]))
    [1, 2, 0]
    """
    return [int(k) for k in np.argsort(-probabilities, kind="stable")]


@contextlib.contextmanager
def destination(out: Path | None, stream: TextIO, format: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes text: to a file that appears complete or not at all, or to a stream immediately.

    A name that is not UTF-8 is kept in a CSV file; elsewhere its invalid bytes are escaped (in JSON as ``\\udcXX``, which
    ``os.fsencode`` reverses). On a terminal, control characters are escaped too, so that names cannot control it.
    """
    if out is None:
        codec = getattr(stream, "encoding", None) or "utf-8"
        on_screen = stream.isatty()

        def write(text: str) -> None:
            if on_screen:
                text = printable_lines(text)
            stream.write(text.encode(codec, "backslashreplace").decode(codec))
            stream.flush()

        yield write
        return
    errors = "surrogateescape" if format == "csv" else "backslashreplace"
    with atomic_file(out) as temporary, open(temporary, "w", encoding="utf-8", errors=errors, newline="") as file:

        def keep(text: str) -> None:
            file.write(text)

        yield keep


def csv_line(cells: Sequence[str]) -> str:
    """Format one line of CSV with its line end."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
