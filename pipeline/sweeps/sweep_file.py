"""The sweep file, which lists the heads to try, and its trials: one per head and combination of parameter values."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from features.errors import ConfigurationError
from features.recipe import POOLINGS
from pipeline.config import Settings, load_yaml, parse
from pipeline.heads.kinds import make_head
from pipeline.presets import find_preset

MOST_TRIALS = 100_000
# Those of all tasks; a test compares them with `pipeline.tasks.table.ALL_CHOICES`.
Choice = Literal[
    "accuracy", "balanced_accuracy", "worst_group_accuracy", "average_precision", "micro_average_precision", "f1", "r2",
    "mae", "rmse", "spearman", "worst_group_mae",
]  # fmt: skip
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class SweepHead(Settings):
    """One head and the parameter values to try for it.

    Parameters
    ----------
    head : str
        Name of a preset, or import path of a scikit-learn classifier.
    grid : dict of str to list
        Values of each parameter; ``pool`` and ``seed`` may be listed too. All combinations are tried.
    log : dict of str to [low, high, n]
        For each parameter n values from low to high with constant ratio, rounded to 6 digits.
    random : int, optional
        Number of combinations to draw at random, with the sweep's seed; default: all are tried.
    """

    head: str
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    log: dict[str, tuple[PositiveFloat, PositiveFloat, Annotated[PositiveInt, Field(le=MOST_TRIALS)]]] = Field(
        default_factory=dict
    )
    random: PositiveInt | None = None


class SweepFile(Settings):
    """A sweep. ``seed`` is the random seed of every head and of the row order, ``choose`` the score to choose by.

    ``by`` are the columns for which every head gets a table by group.
    """

    version: Literal[1]
    seed: Annotated[NonNegativeInt, Field(lt=2**32)] = 0
    choose: Choice = "accuracy"  # for other tasks, their usual score
    by: tuple[str, ...] = ()
    heads: Annotated[list[SweepHead], Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One head of a sweep: preset or import path, parameters, pooling (None: the default of the head) and seed."""

    name: str
    params: dict[str, Any]
    pool: str | None
    seed: int

    def __str__(self) -> str:
        pool = {"pool": self.pool} if self.pool else {}
        return " ".join([self.name, *(f"{key}={json.dumps(value)}" for key, value in {**self.params, **pool}.items())])


def read_sweep(path: str | Path) -> SweepFile:
    """Read a sweep file.

    Raises
    ------
    ConfigurationError
        The file is not valid YAML or does not match the schema; the message names the file and the key.
    """
    return parse(SweepFile, _numbers(load_yaml(path)), str(path))


def single(name: str, params: dict[str, Any], pool: str | None = None) -> SweepFile:
    """Make a sweep of a single head."""
    grid = {key: [value] for key, value in ({**params, "pool": pool} if pool else params).items()}
    return SweepFile(version=1, heads=[SweepHead(head=name, grid=grid)])


def expand(sweep: SweepFile, where: str = "sweep") -> list[Trial]:
    """List the trials of a sweep, in the order of the sweep.

    Raises
    ------
    ConfigurationError
        A head or parameter is unknown (the nearest name is suggested), a value is not accepted, or there are more than
        `MOST_TRIALS` combinations.
    """
    trials: list[Trial] = []
    for number, entry in enumerate(sweep.heads):
        place = f"{where}: heads.{number}"
        both = sorted(set(entry.grid) & set(entry.log))
        if both:
            raise ConfigurationError(f"{place}: {', '.join(both)} is given in both grid and log; give it once")
        values = {**entry.grid, **{name: _geometric(*given) for name, given in entry.log.items()}}
        count = math.prod(map(len, values.values()))
        chosen = range(count)
        if entry.random is not None and entry.random < count:
            if count >= 1 << 63:
                raise ConfigurationError(
                    f"{place}: {count:.0e} combinations are too many to draw from; give fewer values"
                )
            generator = np.random.default_rng([sweep.seed, number])
            chosen = sorted(generator.choice(count, entry.random, replace=False).tolist())  # type: ignore[assignment]
        if len(trials) + len(chosen) > MOST_TRIALS:
            raise ConfigurationError(
                f"{place}: the sweep has more than {MOST_TRIALS:,} heads; give fewer values, or limit them with random: N"
            )
        sizes = [len(column) for column in values.values()]
        for index in chosen:
            places = np.unravel_index(index, sizes) if sizes else ()
            params = {name: column[k] for (name, column), k in zip(values.items(), places, strict=True)}
            trials.append(_trial(entry.head, params, sweep.seed, place))
    return trials


def _trial(name: str, params: dict[str, Any], seed: int, place: str) -> Trial:
    pool, own = params.pop("pool", None), params.pop("seed", seed)
    if pool is not None and pool not in POOLINGS:
        raise ConfigurationError(f"{place}: pool: received {pool!r}, expected one of {', '.join(POOLINGS)}")
    if not isinstance(own, int) or isinstance(own, bool) or not 0 <= own < 2**32:
        raise ConfigurationError(f"{place}: seed: received {own!r}, expected a whole number from 0 to 4294967295")
    try:
        if seed and find_preset(name).kind == "dense":
            params.setdefault("order_seed", seed)  # so that all heads of a sweep see the same batches
        make_head(name, seed=own, **params)
    except ConfigurationError as problem:
        raise ConfigurationError(f"{place}: {problem}") from problem
    return Trial(name, params, pool, own)


def _geometric(low: float, high: float, count: int) -> list[float]:
    """A geometric series, rounded so that the values, and with them the run ids, are equal on every machine."""
    values = np.geomspace(low, high, count) if count > 1 else np.array([low])
    return [float(f"{value:.6g}") for value in values]


def _numbers(value: Any) -> Any:
    """Convert texts such as 1e-4 to numbers, as YAML 1.1 does not read them as numbers."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
