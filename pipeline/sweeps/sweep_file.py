"""The file that says which heads to try, and what it comes to: one trial per head and combination of parameters."""

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
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class SweepHead(Settings):
    """One head and what is tried of it.

    Parameters
    ----------
    head : str
        A preset, or the import path of a scikit-learn classifier.
    grid : dict of str to list
        Values by parameter; ``pool`` and ``seed`` count as parameters. All combinations are tried.
    log : dict of str to [low, high, n]
        n values from low to high, each as many times the one before, rounded to 6 digits.
    random : int, optional
        Only so many of the combinations, drawn with the sweep's seed.
    """

    head: str
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    log: dict[str, tuple[PositiveFloat, PositiveFloat, Annotated[PositiveInt, Field(le=MOST_TRIALS)]]] = Field(
        default_factory=dict
    )
    random: PositiveInt | None = None


class SweepFile(Settings):
    """A sweep. ``seed`` is that of every head and of the order of rows, ``choose`` what the best one is best at."""

    version: Literal[1]
    seed: Annotated[NonNegativeInt, Field(lt=2**32)] = 0
    choose: Literal["accuracy", "balanced_accuracy"] = "accuracy"
    heads: Annotated[list[SweepHead], Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One head of a sweep: preset or import path, its parameters, pooling (None: its own) and seed."""

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
        No valid YAML, or not of the schema; the file and the key are named.
    """
    return parse(SweepFile, _numbers(load_yaml(path)), str(path))


def single(name: str, params: dict[str, Any], pool: str | None = None) -> SweepFile:
    """A sweep of one head."""
    grid = {key: [value] for key, value in ({**params, "pool": pool} if pool else params).items()}
    return SweepFile(version=1, heads=[SweepHead(head=name, grid=grid)])


def expand(sweep: SweepFile, where: str = "sweep") -> list[Trial]:
    """The trials of a sweep, in its order.

    Raises
    ------
    ConfigurationError
        An unknown head or parameter (the nearest is named), a value that it does not take, or more than
        `MOST_TRIALS` combinations.
    """
    trials: list[Trial] = []
    for number, entry in enumerate(sweep.heads):
        place = f"{where}: heads.{number}"
        both = sorted(set(entry.grid) & set(entry.log))
        if both:
            raise ConfigurationError(f"{place}: {', '.join(both)} stands in grid and in log; give it once")
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
                f"{place}: the sweep comes to more than {MOST_TRIALS:,} heads; give fewer values, or random: N"
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
            params.setdefault("order_seed", seed)  # the heads of a sweep see the same batches
        make_head(name, seed=own, **params)
    except ConfigurationError as problem:
        raise ConfigurationError(f"{place}: {problem}") from problem
    return Trial(name, params, pool, own)


def _geometric(low: float, high: float, count: int) -> list[float]:
    """Rounded, so that a value, and the name of its run, is the same on every machine."""
    values = np.geomspace(low, high, count) if count > 1 else np.array([low])
    return [float(f"{value:.6g}") for value in values]


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; here it is a number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
