"""Where an interrupted training goes on: one file beside the run, written whole after each epoch, gone at the end."""

from __future__ import annotations

import dataclasses
import json
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.canonical import canonical_json
from features.errors import RunError
from features.files import atomic_file, sweep

logger = logging.getLogger(__name__)
CHECKPOINT_VERSION = 1
_ABOUT = "about"
_DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError),
    *(MemoryError, RecursionError),  # of shapes and brackets that nobody saved
)


@dataclasses.dataclass
class State:
    """Everything that the next epoch depends on. The order of rows, views, dropout and the learning rate follow from
    seed and epoch, so they need not be kept.

    Parameters
    ----------
    epoch : int
        The last finished one; 0 before the first.
    history : dict of str to list of float
        Columns of ``history.csv`` so far.
    before, best : dict
        Validation scores before the first epoch and of the best one.
    waited : int
        Epochs since the lowest validation log loss.
    lowest : float
        That log loss.
    variables, optimizer, kept : list of arrays
        Variables of the trained layers, of the optimizer, and those of the best epoch.
    """

    epoch: int
    history: dict[str, list[float]]
    before: dict[str, Any]
    best: dict[str, Any]
    waited: int
    lowest: float
    variables: list[np.ndarray]
    optimizer: list[np.ndarray]
    kept: list[np.ndarray]


_ARRAYS = ("variables", "optimizer", "kept")


class Checkpoint:
    """The file of one training. Whoever uses it holds the run's lock.

    Parameters
    ----------
    path : Path
        ``.<run id>.checkpoint`` in the folder of runs.
    configuration : dict
        What decides the training, as plain values; a checkpoint is bound to it.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any]) -> None:
        self.path, self._configuration = path, _plain(configuration)

    def load(self, like: State) -> State | None:
        """The state after the last finished epoch; None where there is none, or where the file is damaged, which is logged.

        Parameters
        ----------
        like : State
            Of the same training, for the number and shapes of its arrays.

        Raises
        ------
        RunError
            If the checkpoint is of another configuration.
        """
        sweep(self.path)
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                about = _about(file)
                fields = dict(about["state"])
                for name in _ARRAYS:
                    fields[name] = [file[f"{name}_{number}"] for number in range(about["arrays"][name])]
                state = State(**fields)
            theirs = dict(about["configuration"])
            if theirs == self._configuration:
                _check_values(state, like)
        except _DAMAGED as error:
            logger.warning("%s is damaged (%s); training begins anew", self.path, error)
            return None
        _check_same(self.path, theirs, self._configuration)
        for name in _ARRAYS:
            shapes = [[value.shape for value in getattr(item, name)] for item in (state, like)]
            if shapes[0] != shapes[1]:
                raise RunError(f"{self.path}: is a checkpoint of a network with other {name}; remove it to begin anew")
        return state

    def save(self, state: State) -> None:
        """Replace the file, whole or not at all.

        Raises
        ------
        StoreError
            If it cannot be written; the one of the epoch before is then untouched.
        """
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(State)}
        lists = {name: fields.pop(name) for name in _ARRAYS}
        about = {
            "configuration": self._configuration,
            "state": fields,
            "arrays": {name: len(values) for name, values in lists.items()},
        }
        text = np.frombuffer(json.dumps(about).encode("utf-8"), np.uint8)
        arrays = {f"{name}_{number}": value for name, values in lists.items() for number, value in enumerate(values)}
        with atomic_file(self.path) as temporary, open(temporary, "xb") as stream:
            np.savez(stream, **{_ABOUT: text}, **arrays)  # type: ignore[arg-type]

    def remove(self) -> None:
        """After the run is finished."""
        self.path.unlink(missing_ok=True)

    def others(self) -> list[str]:
        """Checkpoints beside this one that began from the same run with other settings, and what differs."""
        found = []
        for path in sorted(self.path.parent.glob(".*.checkpoint")):
            if path == self.path:
                continue
            try:
                with np.load(path, allow_pickle=False) as file:
                    theirs = dict(_about(file)["configuration"])
            except _DAMAGED as error:
                logger.debug("%s: %s", path, error)
                continue
            if theirs.get("start") == self._configuration.get("start"):
                found.append(f"{path} ({_differences(theirs, self._configuration)})")
        return found


def checkpoint_path(runs: Path, run_id: str) -> Path:
    """Where the checkpoint of a run lies while it is trained."""
    return runs / f".{run_id}.checkpoint"


def _plain(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(canonical_json({"checkpoint": CHECKPOINT_VERSION, **configuration}))


def _about(file: Any) -> dict[str, Any]:
    return json.loads(file[_ABOUT].tobytes())


def _check_values(state: State, like: State) -> None:
    """Refuse, with ValueError, what no training of the same configuration has saved."""
    if not (type(state.epoch) is int and state.epoch >= like.epoch and type(state.waited) is int):
        raise ValueError(f"epoch {state.epoch!r}, waited {state.waited!r}")
    lengths = {name: len(values) for name, values in dict(state.history).items()}
    if lengths != dict.fromkeys(like.history, state.epoch - like.epoch + 1):
        raise ValueError(f"{state.epoch} epochs, history {lengths}")
    for name, scores in (("before", state.before), ("best", state.best)):
        if set(scores) != set(like.before):
            raise ValueError(f"{name} holds other scores")
    numbers = [
        state.lowest,
        *(scores[key] for scores in (state.before, state.best) for key in ("accuracy", "log_loss")),
    ]
    if not np.isfinite(np.array([*numbers, *(value for values in state.history.values() for value in values)])).all():
        raise ValueError("it holds scores that are not finite")
    for name in _ARRAYS:
        for value, own in zip(getattr(state, name), getattr(like, name), strict=False):
            if value.dtype != own.dtype or not np.isfinite(value).all():
                raise ValueError(f"{name} hold {value.dtype}, or numbers that are not finite")


def _check_same(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    if theirs != mine:
        raise RunError(
            f"{path}: is a checkpoint of another configuration ({_differences(theirs, mine)}). Give those settings to go on "
            "with it, or remove it to begin anew."
        )


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    names: Sequence[str] = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    return "; ".join(f"{name}: {theirs.get(name, 'as usual')} -> {mine.get(name, 'as usual')}" for name in names)
