"""Numbers for each image: squared loss, R2 and mean absolute error. An unknown number counts nowhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeFloat

from features.errors import HeadError
from features.sources.splits import listed
from features.targets import known_cells, strata_of
from pipeline.config import Count, NumberAnswers, NumberGroupLine, Settings
from pipeline.intervals import wilson_interval
from pipeline.scores.answers import half_width
from pipeline.scores.selection import stratified_folds
from pipeline.tasks.bootstrap import percentiles, row_weights
from pipeline.tasks.shown import Column, Judged, Line, Table, Tile, Words
from pipeline.tasks.task import Rows, Scores, Task, metrics_file, squared_loss

FAR = 0.9  # share of the images whose errors are smaller than those of the ones that a report rings
SHOWN = 4  # numbers that are drawn and named for one image
KINDS = 5  # ranges of the first number that have a colour
Correlation = Annotated[float, Field(ge=-1, le=1)]
UpToOne = Annotated[float, Field(le=1)]


class ColumnScores(Settings):
    """Scores of one number; R2 and the correlation are None where all values are equal."""

    name: str
    n: int = Field(ge=0, le=10**12)
    mae: NonNegativeFloat | None
    rmse: NonNegativeFloat | None
    r2: UpToOne | None
    spearman: Correlation | None


class RegressionScores(Settings):
    """Scores of one split: means over the columns that have a score."""

    r2: UpToOne | None
    r2_interval: tuple[UpToOne, UpToOne] | None
    mae: NonNegativeFloat
    mae_interval: tuple[NonNegativeFloat, NonNegativeFloat]
    rmse: NonNegativeFloat
    spearman: Correlation | None
    n: Count
    per_column: Annotated[tuple[ColumnScores, ...], Field(min_length=1)]


class Regression(Task):
    """Targets float64 (n, c), NaN for unknown. Predictions are numbers in the unit of the targets."""

    name = "regression"
    answers = False
    things = "numbers"
    choices = ("r2", "mae", "rmse", "spearman", "worst_group_mae")
    group_score, group_best_first = "mae", "ascending"
    promises = ("--set-coverage", "--by")
    no_promise = "a number comes with no confidence by which an image could be left without an answer"
    metrics_models = (metrics_file(RegressionScores, NumberAnswers, NumberGroupLine),)
    score = "R2"
    no_gain = f"the {score} is no higher than that of"
    scores_model = RegressionScores

    def check(self, y: np.ndarray, rows: int, names: Sequence[str]) -> tuple[str, ...]:
        if y.ndim != 2 or len(y) != rows or y.shape[1] != (len(names) or y.shape[1]) or not y.size:
            raise HeadError(f"numbers: received {y.shape}, expected {rows} rows of {len(names) or 'some'} numbers")
        names = tuple(names) or tuple(str(k) for k in range(y.shape[1]))
        known = known_cells(y)
        constant = [
            name
            for name, column, there in zip(names, y.T, known.T, strict=True)
            if not there.any() or column[there].min() == column[there].max()
        ]
        if constant:
            raise HeadError(
                f"all training images have the same value of {listed(constant)}, or none, so there is nothing to learn. Add "
                "images with other values, or extract again with other columns (--target; features are kept)"
            )
        return names

    def folds(self, y: np.ndarray, folds: int, seed: int, groups: np.ndarray | None) -> np.ndarray:
        return stratified_folds(strata_of(y), folds, seed, groups)

    def outputs(self, names: int) -> int:
        return names

    def activate(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        return np.asarray(logits, np.float64)

    loss_name = "squared"
    activation = "linear"
    predicted = "numbers"

    def parity_unit(self, expected: np.ndarray) -> np.ndarray:
        largest = np.abs(expected).max(axis=0)
        return np.where(largest > 0, largest, 1.0)

    refused = ("calibrate", "mixup", "label_smoothing", "class_weight")

    def scale(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        return np.nanmean(y, axis=0), np.nanstd(y, axis=0)

    def loss(self, predictions: np.ndarray, y: np.ndarray, trained: np.ndarray) -> float:
        return squared_loss(predictions, y, trained)

    def network_loss(self, predictions: np.ndarray, y: np.ndarray, trained: np.ndarray) -> float:
        return self.loss(predictions, y, trained) / 2

    def evaluate(
        self, predictions: np.ndarray, y: np.ndarray, names: Sequence[str], before: Mapping[str, Any] | None = None
    ) -> Scores:
        values = np.asarray(predictions, np.float64)
        if values.shape != y.shape or y.shape != (len(y), len(names)) or not known_cells(y).any():
            raise HeadError(f"predictions: received {values.shape} for targets {y.shape}, some of them known")
        if not np.isfinite(values).all():
            raise HeadError("predictions: some are not finite")
        lines = [_column_scores(name, values[:, k], y[:, k]) for k, name in enumerate(names)]
        weights = row_weights(len(y))
        r2, mae = _mean(lines, "r2"), _mean(lines, "mae") or 0.0
        sampled = [_sampled(values[:, k], y[:, k], weights) for k in range(len(names))]
        means = {name: _known_means(np.array([one[name] for one in sampled])) for name in ("r2", "mae")}
        return {
            "r2": r2,
            "r2_interval": None if r2 is None else percentiles(means["r2"], r2),
            "mae": mae,
            "mae_interval": percentiles(means["mae"], mae),
            "rmse": _mean(lines, "rmse") or 0.0,
            "spearman": _mean(lines, "spearman"),
            "n": len(y),
            "per_column": lines,
        }

    def order(self, scores: Mapping[str, Any], by: str) -> tuple[float, float]:
        return -self.value(scores, by), scores["rmse"]

    def low(self, scores: Mapping[str, Any], by: str, rows: Callable[[], Rows] | None) -> float:
        """The interval of R2 or of the mean absolute error; that of the others is taken to be as wide as these."""
        alike = {"rmse": "mae", "spearman": "r2"}.get(by, by)
        interval = scores[f"{alike}_interval"]
        width = 0.0 if interval is None else scores[alike] - interval[0]
        if alike == "mae":
            width = interval[1] - scores["mae"]
        return self.value(scores, by) - width

    def value(self, scores: Mapping[str, Any], by: str) -> float:
        """A score of which a higher one is better."""
        value = scores[by]
        return -np.inf if value is None else float(value if by in ("r2", "spearman") else -value)

    def columns(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "images": scores["n"],
            "R2": scores["r2"],
            "95 % interval": scores["r2_interval"],
            "mean absolute error": scores["mae"],
            "RMSE": scores["rmse"],
            "Spearman": scores["spearman"],
        }

    def board(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        names = ("r2", "r2_interval", "mae", "mae_interval", "rmse", "spearman", "n")
        return {name: scores[name] for name in names}

    def group(self, values: np.ndarray, y: np.ndarray, before: Mapping[str, Any]) -> dict[str, Any]:
        names = [line["name"] for line in before["per_column"]]
        scores = self.evaluate(values, y, names)
        return {name: scores[name] for name in ("mae", "mae_interval", "rmse")}

    def group_worth(self, line: Mapping[str, Any]) -> tuple[float, float]:
        return -float(line["mae"]), -float(line["mae_interval"][1])

    def promise(
        self, values: np.ndarray, y: np.ndarray, asked: tuple[float | None, float], groups: np.ndarray | None
    ) -> dict[str, Any]:
        """Intervals of each number by itself, from the rows where it is known; no width where these are too few."""
        widths = []
        for truth, predicted in zip(y.T, values.T, strict=True):
            known = np.isfinite(truth)
            codes = None if groups is None else groups[known]
            width = half_width(truth[known], predicted[known], asked[1], codes) if known.any() else np.inf
            widths.append(float(width) if np.isfinite(width) else None)
        return {"intervals": {"coverage": asked[1], "half_widths": widths}}

    def kept(self, values: np.ndarray, y: np.ndarray, answers: Mapping[str, Any]) -> dict[str, Any]:
        asked, found = answers["intervals"], []
        for truth, predicted, width in zip(y.T, values.T, asked["half_widths"], strict=True):
            known = np.isfinite(truth)
            count = int(known.sum())
            hits = int((np.abs(truth - predicted)[known] <= (np.inf if width is None else width)).sum())
            share = {"coverage": hits / count, "interval": wilson_interval(hits, count)} if count else {}
            found.append({"n": count, "coverage": None, "interval": None, "half_width": width, **share})
        return {"intervals": {"asked": asked["coverage"], "numbers": found}}

    def told(self, values: np.ndarray, names: Sequence[str], answers: Mapping[str, Any]) -> dict[str, Any]:
        """The ends of each number's interval; null where it has none."""
        widths = zip(names, values.tolist(), answers["intervals"]["half_widths"], strict=True)
        ends = {
            name: width and [float(f"{value - width:.9g}"), float(f"{value + width:.9g}")]
            for name, value, width in widths
        }
        return {"interval": ends}

    board_columns = (
        Column("r2", "R2", "descending", "Share of the variance that is explained, mean over the numbers"),
        Column("mae", "Mean error", hint="Mean absolute error, in the unit of the numbers"),
        Column("rmse", "RMSE", hint="Root of the mean squared error"),
        Column("spearman", "Spearman", "descending", "Rank correlation of predictions and true values"),
    )
    mistakes = Words(
        "Largest errors", "Farthest from the true value: look here for wrong values.", "There are no errors among"
    )
    hits = None
    ring = "the tenth with the largest errors"
    loss_label = "squared error"

    def headline(self, scores: Mapping[str, Any]) -> str:
        return f"is off by {scores['mae']:.4g} on average over {scores['n']:,} validation images"

    def tiles(self, scores: Mapping[str, Any]) -> list[Tile]:
        low, high = scores["mae_interval"]
        return [
            Tile("Mean absolute error", scores["mae"], f"{low:.4g} to {high:.4g}"),
            Tile("RMSE", scores["rmse"]),
            Tile("Spearman", scores["spearman"]),
        ]

    def judge(self, values: np.ndarray, y: np.ndarray, before: Mapping[str, Any]) -> Judged:
        """How far off: the mean of the errors of an image, each in units of the deviation of its number."""
        known = known_cells(y)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.array(
                [np.std(column[there]) if there.any() else 1 for column, there in zip(y.T, known.T, strict=True)]
            )
            far = np.where(known, np.abs(values - y), 0) / np.where(spread > 0, spread, 1)
            far = far.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
        return Judged((far > 0) & (far >= np.quantile(far, FAR)), far)

    def lines(self, values: np.ndarray, y: Any, names: Sequence[str], before: Mapping[str, Any]) -> list[Line]:
        told = (
            f"{value:.4g}, is {truth:.4g}" if np.isfinite(truth) else f"{value:.4g}"
            for value, truth in zip(values, y, strict=True)
        )
        return [Line(f"{name}:", text) for name, text in zip(names, told, strict=True)][:SHOWN]

    def kinds(self, y: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """The fifth in which the first number lies."""
        known = np.isfinite(y[:, 0])
        edges = np.unique(np.quantile(y[known, 0], np.linspace(0, 1, KINDS + 1))) if known.any() else np.zeros(1)
        codes = np.searchsorted(edges[1:-1], y[:, 0], side="right")
        titles = [f"{names[0]} {low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges)] or [names[0]]
        return np.where(known, codes, len(titles)), (*titles, *(() if known.all() else ("unknown",)))

    def table(self, scores: Mapping[str, Any]) -> Table:
        hint = (
            "Mean and root mean squared error are in the unit of the number. R2: the share of its variance that is "
            "explained. Spearman: the rank correlation."
        )
        columns = (
            Column("mae", "Mean error"),
            Column("rmse", "RMSE"),
            Column("r2", "R2"),
            Column("spearman", "Spearman"),
            Column("n", "Known", "descending"),
        )
        return Table("Numbers", hint, "Number", columns, tuple(scores["per_column"]))

    def pairs(
        self, values: np.ndarray, y: np.ndarray, names: Sequence[str]
    ) -> list[tuple[str, np.ndarray, np.ndarray]]:
        known = known_cells(y)
        found = zip(names, y.T, values.T, known.T, strict=True)
        return [(name, truth[there], value[there]) for name, truth, value, there in found if there.any()][:SHOWN]

    def given(self, values: np.ndarray, names: Sequence[str], before: Mapping[str, Any]) -> list[int]:
        return []

    def header(self, names: Sequence[str]) -> list[str]:
        return [*(f"true:{name}" for name in names), *names]

    def cells(self, y: Any, values: np.ndarray, names: Sequence[str]) -> list[str]:
        return [*(f"{value:.17g}" if np.isfinite(value) else "" for value in y), *(f"{value:.9g}" for value in values)]

    def parsed(self, lines: Sequence[Sequence[str]], names: Sequence[str]) -> Rows:
        shape = len(lines), len(names)
        y = [[float(cell or "nan") for cell in line[2 : 2 + len(names)]] for line in lines]
        values = np.array([line[2 + len(names) :] for line in lines], np.float64).reshape(shape)
        if not np.isfinite(values).all():
            raise ValueError("a prediction is not finite")
        return np.array(y, np.float64).reshape(shape), values


def _column_scores(name: str, values: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    from scipy.stats import spearmanr
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    known = np.isfinite(y)
    y, values = y[known], values[known]
    varies = len(y) > 1 and y.min() < y.max()
    ranked = varies and values.min() < values.max()
    return {
        "name": name,
        "n": len(y),
        "mae": float(mean_absolute_error(y, values)) if len(y) else None,
        "rmse": float(root_mean_squared_error(y, values)) if len(y) else None,
        "r2": float(r2_score(y, values)) if varies else None,
        "spearman": float(np.clip(spearmanr(y, values).statistic, -1, 1)) if ranked else None,
    }


def _sampled(values: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """R2 and mean absolute error of each sample of the bootstrap, float64, (samples,)."""
    known = np.isfinite(y)
    errors, centred = values[known] - y[known], y[known] - np.mean(y[known], dtype=np.float64)
    weights = weights[:, known].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        count = weights.sum(axis=1)
        spread = weights @ np.square(centred) - np.square(weights @ centred) / count
        return {"r2": 1 - weights @ np.square(errors) / spread, "mae": weights @ np.abs(errors) / count}


def _known_means(values: np.ndarray) -> np.ndarray:
    """Mean over the columns, of those that are finite; NaN where none is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(axis=0) / known.sum(axis=0))


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [line[name] for line in lines if line[name] is not None]
    return float(np.mean(found)) if found else None
