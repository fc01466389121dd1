"""What the functions of this package return: the document of a command as an object.

document (JSON) of a stage --> attributes | to_dict() | to_pandas() | repr, text, HTML
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from features.errors import ConfigurationError, nearest
from pipeline.api import pages

if TYPE_CHECKING:
    import numpy as np

    from pipeline.auditing.check import Finding

Text = Callable[..., str]  # of the document; that of a sweep also of the columns of a terminal


class Result:
    """A result: the keys of its document are its attributes; ``print`` shows what the command shows.

    Parameters
    ----------
    document : dict
        Plain values, as the command prints them with ``--json``.
    text : callable
        Makes the text for a person of the document.
    **arrays
        Further attributes that are no JSON, such as arrays.
    """

    _named: ClassVar[tuple[str, ...]] = ()  # keys of the repr
    _table: ClassVar[str] = ""  # key of the lines that ``to_pandas`` gives

    def __init__(self, document: dict[str, Any], text: Text, **arrays: Any) -> None:
        self._document, self._text, self._arrays = document, text, arrays

    if not TYPE_CHECKING:  # the classes below declare what there is

        def __getattr__(self, name: str) -> Any:
            values = vars(self).get("_document", {}) | vars(self).get("_arrays", {})
            if name.startswith("_") or name not in values:
                raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(values)}")
            return values[name]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._document, *self._arrays})

    def __str__(self) -> str:
        return self._text(self._document)

    def __repr__(self) -> str:
        named = ", ".join(f"{name}={pages.short(value)}" for name, value in self._summary().items())
        return f"{type(self).__name__}({named})"

    def _summary(self) -> dict[str, Any]:
        return {name: self._document[name] for name in self._named if name in self._document}

    def _lines(self) -> list[dict[str, Any]]:
        return list(self._document[self._table]) if self._table else [self._summary()]

    def _repr_html_(self) -> str:
        return pages.table(self._lines(), caption=repr(self))

    def to_dict(self) -> dict[str, Any]:
        """Return the document, a copy: plain values that are valid JSON."""
        return copy.deepcopy(self._document)

    def to_pandas(self) -> Any:
        """Return the lines as a ``pandas.DataFrame``.

        Raises
        ------
        ConfigurationError
            If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as missing:
            raise ConfigurationError(
                "to_pandas: pandas is not installed; pip install pandas, or take to_dict()"
            ) from missing
        return pandas.DataFrame(self._lines())


class OneRun(Result):
    """A result that is a run, and the path of its folder wherever a run is asked for."""

    run: str

    def __fspath__(self) -> str:
        return self.run


class TrainedHead(OneRun):
    """A trained head: ``run``, its folder; ``cached``, whether it was there already; ``metrics``, its scores."""

    run: str
    cached: bool
    fit_seconds: float
    metrics: dict[str, Any]

    def _summary(self) -> dict[str, Any]:
        scores = self.metrics["validation"]
        return {"run": self.run, **{name: scores[name] for name in pages.SCORES if name in scores}}


class Leaderboard(Result):
    """Runs, the best first: ``rows``; ``chosen``, the id of the run that other functions take."""

    rows: list[dict[str, Any]]
    chosen: str | None
    damaged: list[str]
    _table = "rows"

    def _summary(self) -> dict[str, Any]:
        return {"runs": len(self.rows), "chosen": self.chosen}

    def _repr_html_(self) -> str:
        return pages.board(self.rows, caption=repr(self))


class Sweep(Leaderboard):
    """Many trained heads: ``board``, the best first; ``runs``, their ids; ``failed``, with reasons; ``chosen``."""

    folder: str
    runs: list[str]
    trained: int
    cached: int
    failed: list[dict[str, str]]
    board: list[dict[str, Any]]
    seconds: float
    _table = "board"

    def text(self, width: int | None = None) -> str:
        """What ``print`` shows, fitted to a number of columns."""
        return self._text(self._document, width)

    def _summary(self) -> dict[str, Any]:
        return {"trained": self.trained, "cached": self.cached, "failed": len(self.failed), "chosen": self.chosen}

    def _repr_html_(self) -> str:
        return pages.board(self.board, caption=repr(self))


class FineTuned(OneRun):
    """A fine-tuned network: ``run``; ``before`` and ``after``, scores of the validation split; ``advised``, the run to use."""

    run: str
    cached: bool
    resumed: bool
    before: dict[str, Any]
    after: dict[str, Any]
    best_head: dict[str, Any] | None
    parity_gap: float | None
    minutes: float
    damaged: list[str]

    @property
    def advised(self) -> str:
        """The run to predict with: this one, or the head beside it that it is no better than."""
        from pipeline.stages.finetune import advised

        return str(advised(self._document))

    def _summary(self) -> dict[str, Any]:
        return {"run": self.run, "before": self.before["accuracy"], "after": self.after["accuracy"]}

    def _lines(self) -> list[dict[str, Any]]:
        return [
            {"": name, **{key: getattr(self, name).get(key) for key in pages.SCORES}} for name in ("before", "after")
        ]


class Predictions(Result):
    """Predictions: ``predictions``, a line for each image, unless they were written to ``out``; ``classes`` counts them."""

    run: str
    images: int
    predicted: int
    unreadable: int
    classes: dict[str, int]
    out: str | None
    damaged: list[str]
    _named = ("run", "images", "predicted", "unreadable", "out")

    @property
    def predictions(self) -> list[dict[str, Any]] | None:
        """A line for each image, as in a file of JSON lines; None if they were written to ``out``."""
        return self._document.get("predictions")

    @property
    def judgement(self) -> str:
        """How many images are right, going by the names of their folders; empty if no folder has the name of a class."""
        from pipeline.stages.predict import judgement

        return judgement(self._document) if self._document["labelled"] else ""

    def _lines(self) -> list[dict[str, Any]]:
        counted = [{"class": name, "images": count} for name, count in self.classes.items()]
        return counted if self.predictions is None else list(self.predictions)


class Evaluation(Result):
    """Scores on labelled images: ``scores``; of classes also ``confusion``, true by predicted, and ``per_class``."""

    run: str
    source: str
    split: str | None
    images: int
    evaluated: int
    scores: dict[str, Any]
    classes: list[str]
    confusion: list[list[int]]
    confused: list[dict[str, Any]]
    per_class: list[dict[str, Any]]
    damaged: list[str]

    def _summary(self) -> dict[str, Any]:
        scores = {name: self.scores[name] for name in pages.SCORES if name in self.scores}
        return {"run": self.run, "images": self.images, **scores}

    def _lines(self) -> list[dict[str, Any]]:
        return list(self._document.get("per_class", [self.scores]))

    def _repr_html_(self) -> str:
        matrix = self._document.get("confusion")
        drawn = pages.confusion(matrix, self.classes) if matrix else ""
        return super()._repr_html_() + drawn


class Exported(Result):
    """An exported model: ``path``; ``artefact``, its format; ``parity_gap``, how far its probabilities are from the run's."""

    artefact: str
    path: str
    run: str
    classes: list[str]
    bytes: int
    parity_gap: float
    tolerance: float
    damaged: list[str]
    _named = ("path", "artefact", "run", "bytes", "parity_gap")


class Report(Result):
    """A written report: ``out``, the page; ``runs``, how many it compares."""

    out: str
    bytes: int
    runs: int
    damaged: list[str]
    _named = ("out", "runs", "bytes")


class Audited(Result):
    """What an audit found: ``checks``, each with ``flagged``, ``summary`` and its ``worst`` images.

    ``found["suspect-label"]`` is what that check says of all rows of the store: arrays ``score`` (float32, 0-1, 1 most suspicious,
    NaN where not judged), ``flag`` (bool) and ``suggested`` (int32, index of a class or -1; None if it suggests none).
    """

    findings: dict[str, Finding]
    labelled_by: Mapping[str, Any]
    features: str
    feature_set: str
    checks: list[dict[str, Any]]
    seconds: float
    out: str | None

    def __getitem__(self, check: str) -> Finding:
        """Return what a check says of all rows; ``ConfigurationError`` if it was not made."""
        if check not in self.findings:
            made = ", ".join(self.findings)
            raise ConfigurationError(
                f"check: received {check!r}, expected one of {made}{nearest(str(check), self.findings)}"
            )
        return self.findings[check]

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the checks that were made."""
        return iter(self.findings)

    def _summary(self) -> dict[str, Any]:
        return {"features": self.features, **{one["check"]: one["flagged"] for one in self.checks if one["flagged"]}}

    def _lines(self) -> list[dict[str, Any]]:
        return [{"check": one["check"], **row} for one in self.checks for row in one["worst"]]

    def _repr_html_(self) -> str:
        shown = ("check", "judged", "flagged", "summary")
        return pages.table([{name: one[name] for name in shown} for one in self.checks], caption=repr(self))


class Similar(Result):
    """Neighbours of images: ``images``, each with its ``neighbours``, the most similar first.

    The same as arrays: ``row_numbers``, int64 (images, k), of the store, -1 where there are fewer; ``similarity``, float32 (images, k), -1 to 1.
    """

    row_numbers: np.ndarray
    similarity: np.ndarray
    file: str
    images: list[dict[str, Any]]
    out: str | None
    grid: str | None

    def _summary(self) -> dict[str, Any]:
        return {"file": self.file, "images": len(self.images)}

    def _lines(self) -> list[dict[str, Any]]:
        return [
            {"image": line["image"], "rank": rank, **item}
            for line in self.images
            for rank, item in enumerate(line["neighbours"], 1)
        ]


class Suggestions(Result):
    """Images to label next: ``images``, the most useful first.

    The same as arrays: ``row_numbers``, int64 (n,), of the store; ``scores``, float64 (n,), higher for more useful.
    """

    row_numbers: np.ndarray
    scores: np.ndarray
    file: str
    strategy: str
    labelled: int
    images: list[dict[str, Any]]
    out: str | None
    _table = "images"

    def _summary(self) -> dict[str, Any]:
        return {"file": self.file, "strategy": self.strategy, "images": len(self.images)}


class Comparison(Result):
    """Networks compared: ``networks``, the best first; ``chosen``, the fastest of those that are not told from the best."""

    networks: list[dict[str, Any]]
    failed: list[dict[str, str]]
    best: str | None
    chosen: str | None
    next: list[str]
    stores: str
    out: str | None
    _named = ("best", "chosen")
    _table = "networks"


class OpenedRun(OneRun):
    """A finished run: ``run``, its folder; ``classes``; ``metrics``; ``config``, what it was made of; ``mistakes``."""

    run: str
    run_id: str
    task: str
    classes: list[str]
    metrics: dict[str, Any]
    config: dict[str, Any]
    mistakes: list[dict[str, Any]]
    damaged: list[str]
    _table = "mistakes"

    def _summary(self) -> dict[str, Any]:
        scores = self.metrics["validation"]
        return {"run_id": self.run_id, **{name: scores[name] for name in pages.SCORES if name in scores}}

    def _repr_html_(self) -> str:
        from pipeline.api.mistakes import pictures_of
        from pipeline.runs.folder import Run

        shown = pictures_of(Run.open(self.run)) if self.mistakes else []
        named = [f"{line['file']}: {line['label']}, taken for {line['predicted']}" for line in self.mistakes]
        cards = [(picture, said) for picture, said in zip(shown, named, strict=True) if picture]
        return pages.table(self.mistakes, caption=repr(self)) + pages.pictures(cards)
