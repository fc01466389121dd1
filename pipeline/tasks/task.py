"""The interface of tasks. Everything that differs between them is behind it, so that no other module asks which one it is.

targets --check--> heads: logits --activate--> predictions --evaluate--> scores --order, low--> one run is chosen
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, create_model

from features.errors import ConfigurationError, nearest
from features.targets import known_cells
from pipeline.config import AnsweringMetricsFile, Count, MetricsFile, Settings, TargetHeadFile
from pipeline.intervals import wilson_interval
from pipeline.scores.groups import accuracy_of
from pipeline.scores.selection import WORST_GROUP
from pipeline.tasks.shown import Calibration, Column, Judged, Line, Table, Tile, Words

Scores = dict[str, Any]
Rows = tuple[np.ndarray, np.ndarray]  # targets and predictions of the same rows


def metrics_file(scores: type[Settings], answers: type[Settings], line: type[Settings]) -> type[MetricsFile]:
    """Make the schema of ``metrics.json``, format 2, from those of the scores of a split, of promises, and of a group."""
    tables: Any = dict[Literal["validation", "cv"], dict[str, Annotated[tuple[line, ...], Field(min_length=1)]]]  # type: ignore[valid-type]
    of_folds: Any = create_model("FoldScores", __base__=scores, folds=(Count, ...))
    of_views: Any = create_model("ViewScores", __base__=scores, views=(Count, ...))
    fields: dict[str, Any] = {
        "format": (Literal[2], 2),
        "validation": (scores, ...),
        "test": (scores | None, ...),
        "cv": (of_folds | None, ...),
        "averaged": (of_views | None, None),
        "answers": (answers | None, None),
        "groups": (tables | None, None),
    }
    return create_model("TargetMetricsFile", __base__=AnsweringMetricsFile, **fields)


def squared_loss(predictions: np.ndarray, y: np.ndarray, trained: np.ndarray) -> float:
    """Mean squared error over the known cells, each column in units of the variance that it has in ``trained``."""
    known, seen = known_cells(y), known_cells(trained)
    count = np.maximum(seen.sum(axis=0), 1)
    mean = np.where(seen, trained, 0).sum(axis=0) / count
    variance = np.square(np.where(seen, trained - mean, 0)).sum(axis=0) / count
    gaps = np.where(known, predictions - np.where(known, y, 0), 0) / np.sqrt(np.where(variance > 0, variance, 1))
    return float(np.square(gaps).sum() / max(1, known.sum()))


def packed(y: np.ndarray, scale: tuple[np.ndarray, np.ndarray] | None, weights: np.ndarray | None = None) -> np.ndarray:
    """Targets and their weights side by side, float32 (n, 2c), as networks are trained on: weight 0 where one is unknown.

    Parameters
    ----------
    y : uint8 or float64, (n, c)
    scale : pair of float64 (c,), optional
        Mean that is subtracted from each column, and deviation that it is divided by.
    weights : float64, (n, c), optional
        Weights of the known cells; 1 by default.
    """
    known = known_cells(y)
    mean, deviation = (0.0, 1.0) if scale is None else scale
    targets = np.where(known, (np.where(known, y, 0) - mean) / deviation, 0)
    return np.hstack([targets, known * (1.0 if weights is None else weights)]).astype(np.float32)


class Task(abc.ABC):
    """One kind of prediction.

    Attributes
    ----------
    name : str
        As ``extract --task`` takes it.
    format : int
        Format of ``config.yaml`` and ``metrics.json`` of its runs.
    things : str
        What the names of a run are.
    choices : tuple of str
        Scores by which runs can be compared; the first one is usual.
    score, no_gain : str
        Words for the usual score, and for a fine-tuned run that does not gain by it.
    metrics_models : tuple of type
        Schemas of ``metrics.json``, one for each format.
    scores_model : type
        Schema of the scores of one split.
    promises : tuple of str
        The options of `pipeline.heads.promises` that mean something here.
    no_promise : str
        Why another one does not.
    one_class : bool
        Whether each image has one class, which a confusion matrix and a grid need.
    answers : bool
        Whether images are given classes or labels, which are counted.
    group_score : str
        Entry of a line of a table by group by which groups are compared.
    group_best_first : {"descending", "ascending"}
        The order of this entry in which the best group comes first.
    """

    name: ClassVar[str]
    format: ClassVar[int] = 2
    things: ClassVar[str]
    choices: ClassVar[tuple[str, ...]]
    score: ClassVar[str]
    no_gain: ClassVar[str]
    metrics_models: ClassVar[tuple[type[MetricsFile], ...]]
    scores_model: ClassVar[type[Settings]]
    promises: ClassVar[tuple[str, ...]]
    no_promise: ClassVar[str] = ""
    one_class: ClassVar[bool] = False
    answers: ClassVar[bool] = True
    group_score: ClassVar[str] = "accuracy"
    group_best_first: ClassVar[str] = "descending"

    @property
    def head_file(self) -> dict[str, Any]:
        """What ``head.json`` says of the task, and its format where it does."""
        return {"format": TargetHeadFile.model_fields["format"].default, "task": self.name}

    @property
    def run_file(self) -> dict[str, Any]:
        """The same for ``config.yaml``."""
        return {"format": self.format, "task": self.name}

    # -- targets
    @abc.abstractmethod
    def check(self, y: np.ndarray, rows: int, names: Sequence[str]) -> tuple[str, ...]:
        """Refuse targets that no head can be trained on; return the names of what is predicted.

        Parameters
        ----------
        y : int32 (n,), or uint8 or float64 (n, c)
            Labels or values of the training rows; see `features.targets.Target`.
        rows : int
            Number of rows of features.
        names : sequence of str
            Names of the classes or columns; may be empty if there are classes.

        Raises
        ------
        HeadError
            If a class or column has nothing to learn from; the message names it.
        """

    @abc.abstractmethod
    def folds(self, y: np.ndarray, folds: int, seed: int, groups: np.ndarray | None) -> np.ndarray:
        """Distribute rows over folds, alike in each: see `pipeline.scores.selection.stratified_folds`."""

    # -- predictions
    @abc.abstractmethod
    def outputs(self, names: int) -> int:
        """Number of outputs of a network that predicts so many classes or columns."""

    @abc.abstractmethod
    def activate(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Turn the outputs of a network, (n, o), into predictions, float64 (n, c)."""

    @abc.abstractmethod
    def loss(self, predictions: np.ndarray, y: np.ndarray, trained: np.ndarray) -> float:
        """Loss of predictions for rows that were held out; ``trained``: the targets of the rows that were not."""

    # -- networks
    activation: ClassVar[str]  # of the outputs of an exported model, as Keras calls it
    predicted: ClassVar[str] = "probabilities"  # what these are

    def parity_unit(self, expected: np.ndarray) -> np.ndarray:
        """Unit of each column, float64 (c,), in which two forms of a model may differ."""
        return np.ones(expected.shape[1])

    loss_name: ClassVar[str]  # key of `pipeline.heads.bank_math.LOSSES`
    refused: ClassVar[tuple[str, ...]] = ("calibrate", "mixup")  # parameters of networks that mean nothing here

    def scale(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and deviation of each column to standardise targets with, float64 (c,); None if they are not."""
        return None

    def network_targets(
        self, y: np.ndarray, scale: tuple[np.ndarray, np.ndarray] | None, *, balanced: bool = False
    ) -> np.ndarray:
        """What a network is trained on; ``balanced``: with weights, where a task has them for each cell."""
        return packed(y, scale)

    def network_loss(self, predictions: np.ndarray, y: np.ndarray, trained: np.ndarray) -> float:
        """The loss that a network is trained on, of predictions for rows that were held out; parameters are those of `loss`."""
        return self.loss(predictions, y, trained)

    def row_weights(self, y: np.ndarray) -> np.ndarray | None:
        """Weight of each row, float64 (n,), with ``class_weight=balanced``; None if cells are weighted, or nothing is."""
        return None

    # -- scores
    @abc.abstractmethod
    def evaluate(
        self, predictions: np.ndarray, y: np.ndarray, names: Sequence[str], before: Mapping[str, Any] | None = None
    ) -> Scores:
        """Score the predictions of one split.

        Parameters
        ----------
        predictions : float64, (n, c)
        y : as in `check`
        names : sequence of str, c names
        before : mapping, optional
            Scores of the validation split, where something was chosen that is used on other splits.
        """

    def chosen(self, rows: Callable[[], Rows], names: Sequence[str]) -> Scores | None:
        """What `evaluate` needs as ``before``, from the validation rows, which are read only where something is chosen."""
        return None

    @abc.abstractmethod
    def order(self, scores: Mapping[str, Any], by: str) -> tuple[float, float]:
        """Key by which scores are sorted, the best first."""

    def value(self, scores: Mapping[str, Any], by: str) -> float:
        """A score to choose by, of which a higher one is better."""
        return float(scores[by])

    @abc.abstractmethod
    def low(self, scores: Mapping[str, Any], by: str, rows: Callable[[], Rows] | None) -> float:
        """Lower end of the 95 % interval of `value`; ``rows`` reads the predictions that were scored, if it is given."""

    def better(self, scores: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
        """Whether scores are better than others by the usual score, and where that is equal by the loss."""
        first = self.choices[0]
        return self.order(scores, first) < self.order(than, first)

    def gained(self, scores: Mapping[str, Any], rival: Mapping[str, Any]) -> str:
        """Say by how much the usual score is higher than a rival's."""
        first = self.choices[0]
        return f"{self.value(scores, first) - self.value(rival, first):+.4f}"

    @abc.abstractmethod
    def columns(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """The scores that a person looks at first, as columns of a table."""

    @abc.abstractmethod
    def board(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """The scores of a row of the leaderboard."""

    def board_folds(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """The scores of cross-validation in a row of the leaderboard."""
        first = self.choices[0]
        return {f"cv_{first}": scores.get(first), "cv_interval": scores.get(f"{first}_interval")}

    def choice(self, by: str | None) -> str:
        """The score to compare by: the usual one if none is named, or ``accuracy``, which is usual for classes.

        `WORST_GROUP` stands for the `worst_group` of every task.

        Raises
        ------
        ConfigurationError
            If these runs have no such score.
        """
        if by == WORST_GROUP:
            return self.worst_group
        if by is None or by in self.choices or by == "accuracy":
            return by if by in self.choices else self.choices[0]
        raise ConfigurationError(
            f"choose: received {by!r}, expected {' or '.join(self.choices)} for runs of --task {self.name}"
            f"{nearest(by, self.choices)}"
        )

    # -- tables by group, see `pipeline.scores.groups`
    @property
    def worst_group(self) -> str:
        """The choice that compares by the worst group."""
        return f"worst_group_{self.group_score}"

    def group(self, values: np.ndarray, y: np.ndarray, before: Mapping[str, Any]) -> dict[str, Any]:
        """What a line of a table says of the images of a group, given their predictions (k, c) and targets."""
        return accuracy_of(~self.judge(values, y, before).wrong)

    def group_worth(self, line: Mapping[str, Any]) -> tuple[float, float]:
        """The score of a group, of which a higher one is better, and the lower end of its 95 % interval."""
        return float(line["accuracy"]), wilson_interval(line["right"], line["n"])[0]

    # -- promises, see `pipeline.heads.promises`
    @abc.abstractmethod
    def promise(
        self, values: np.ndarray, y: np.ndarray, asked: tuple[float | None, float], groups: np.ndarray | None
    ) -> dict[str, Any]:
        """What held-out rows promise of answers: entries of `pipeline.config.Answers`.

        Parameters
        ----------
        values, y
            Predictions (n, c) and targets of rows that had no part in making or choosing a run.
        asked : tuple of float
            Precision of the answers, None if none is asked for, and chance that a set or interval holds the truth.
        groups : int, (n,), optional
            Group of each row.
        """

    @abc.abstractmethod
    def kept(self, values: np.ndarray, y: np.ndarray, answers: Mapping[str, Any]) -> dict[str, Any]:
        """Count how far a promise is kept on other images; see `pipeline.scores.answers.kept`."""

    def told(self, values: np.ndarray, names: Sequence[str], answers: Mapping[str, Any]) -> dict[str, Any]:
        """What a promise says of one image, by name of a column of ``predict``; as in `answer`."""
        return {}

    # -- what a report shows, see `pipeline.tasks.shown`
    board_columns: ClassVar[tuple[Column, ...]]  # of `board`: the score that is chosen by, and further ones
    mistakes: ClassVar[Words]  # the images whose predictions are most wrong
    hits: ClassVar[Words | None]  # those that are right, but only just
    ring: ClassVar[str] = "mistake"  # what a ring in the feature map means
    loss_label: ClassVar[str] = "log loss"  # of learning curves

    def interval(self, scores: Mapping[str, Any]) -> list[float] | None:
        """The 95 % interval of the score that is chosen by, [low, high]; None where there is none."""
        found = scores[f"{self.choices[0]}_interval"]
        return None if found is None else list(found)

    @abc.abstractmethod
    def headline(self, scores: Mapping[str, Any]) -> str:
        """What a run does, after its name: "gets 3 of 5 validation images right"."""

    @abc.abstractmethod
    def tiles(self, scores: Mapping[str, Any]) -> list[Tile]:
        """The scores that stand out, after that which is chosen by."""

    @abc.abstractmethod
    def judge(self, values: np.ndarray, y: np.ndarray, before: Mapping[str, Any]) -> Judged:
        """Say which predictions are wrong, and how sure they are: mistakes are shown the surest first, hits the least sure."""

    @abc.abstractmethod
    def lines(self, values: np.ndarray, y: Any, names: Sequence[str], before: Mapping[str, Any]) -> list[Line]:
        """What is said of one image: its prediction (c,), and then what is true, or what was nearly predicted."""

    @abc.abstractmethod
    def kinds(self, y: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """A kind of each image, int (n,), by what is true, and the names of the kinds: the colours of a feature map."""

    def table(self, scores: Mapping[str, Any]) -> Table | None:
        """The scores of each label or number."""
        return None

    def calibration(self, values: np.ndarray, y: np.ndarray) -> Calibration | None:
        """What tells whether probabilities can be trusted; None for numbers."""
        return None

    def pairs(
        self, values: np.ndarray, y: np.ndarray, names: Sequence[str]
    ) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Name, true and predicted values of numbers, to be drawn against each other."""
        return []

    # -- predictions.csv of a run: path, sha256, then these
    @abc.abstractmethod
    def header(self, names: Sequence[str]) -> list[str]:
        """Names of the columns."""

    @abc.abstractmethod
    def cells(self, y: Any, values: np.ndarray, names: Sequence[str]) -> list[str]:
        """One row: its target and its prediction, with nine digits."""

    @abc.abstractmethod
    def parsed(self, lines: Sequence[Sequence[str]], names: Sequence[str]) -> Rows:
        """Read such rows; raises KeyError, ValueError or IndexError if they are not such rows."""

    def __reduce__(self) -> tuple[Any, ...]:
        from pipeline.tasks.table import task_named  # the same object in every process

        return task_named, (self.name,)

    # -- answers of predict
    @abc.abstractmethod
    def given(self, values: np.ndarray, names: Sequence[str], before: Mapping[str, Any]) -> list[int]:
        """Numbers of the classes or labels that an image is given, to be counted; none for numbers."""

    def answer(self, values: np.ndarray, names: Sequence[str], before: Mapping[str, Any]) -> dict[str, Any]:
        """What is said of an image before its values; ``before``: the scores of the validation split."""
        return {}
