"""Checkpoints: one file beside the run, replaced after each epoch, from which an interrupted training resumes."""

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
    *(MemoryError, RecursionError),  # raised for absurd array shapes and deeply nested JSON
)


@dataclasses.dataclass
class State:
    """Everything that the next epoch depends on. The order of rows, views, dropout and the learning rate follow from
    seed and epoch, so they are not kept.

    Parameters
    ----------
    epoch : int
        Last finished epoch; ``initial_epoch`` (by default 0) before the first.
    history : dict of str to list of float
        Columns of ``history.csv`` so far.
    before, best : dict
        Validation scores before the first epoch, and after the best one.
    waited : int
        Epochs since the lowest validation loss.
    lowest : float
        Lowest validation loss so far.
    variables, optimizer, kept : list of arrays
        Values of the trained layers' variables, of the optimizer's, and of the trained layers' after the best epoch.
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
    """The checkpoint file of one training. The caller must hold the run's lock.

    Parameters
    ----------
    path : Path
        ``.<run id>.checkpoint`` in the folder of runs.
    configuration : dict
        Plain values that decide the training. Only a training with the same values may use the checkpoint.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any]) -> None:
        self.path, self._configuration = path, _plain(configuration)

    def load(self, like: State) -> State | None:
        """Read the state after the last finished epoch; None if there is no file, or a damaged one, which is logged.

        Parameters
        ----------
        like : State
            A state of the same training, which gives the expected number and shapes of the arrays.

        Raises
        ------
        RunError
            If the checkpoint belongs to another configuration.
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
            logger.warning("%s is damaged (%s); training starts from the beginning", self.path, error)
            return None
        _check_same(self.path, theirs, self._configuration)
        for name in _ARRAYS:
            shapes = [[value.shape for value in getattr(item, name)] for item in (state, like)]
            if shapes[0] != shapes[1]:
                raise RunError(f"{self.path}: belongs to a network with other {name}; remove it to start again")
        return state

    def save(self, state: State) -> None:
        """Replace the file as a whole, or leave it as it was.

        Raises
        ------
        StoreError
            If the file cannot be written; the checkpoint of the previous epoch is then untouched.
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
        """Remove the file, once the run is finished."""
        self.path.unlink(missing_ok=True)

    def others(self) -> list[str]:
        """List other checkpoints in the folder whose training started from the same run, and how their settings differ."""
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
    """Path of a run's checkpoint while the run is trained."""
    return runs / f".{run_id}.checkpoint"


def _plain(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(canonical_json({"checkpoint": CHECKPOINT_VERSION, **configuration})))


def _about(file: Any) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(file[_ABOUT].tobytes())
    return about


def _check_values(state: State, like: State) -> None:
    """Raise ValueError for values that no training with the same configuration saves."""
    if not (type(state.epoch) is int and state.epoch >= like.epoch and type(state.waited) is int):
        raise ValueError(f"received epoch {state.epoch!r}, waited {state.waited!r}")
    lengths = {name: len(values) for name, values in dict(state.history).items()}
    if lengths != dict.fromkeys(like.history, state.epoch - like.epoch + 1):
        raise ValueError(f"after epoch {state.epoch} the columns of the history have the lengths {lengths}")
    for name, scores in (("before", state.before), ("best", state.best)):
        if set(scores) != set(like.before):
            raise ValueError(f"{name!r} holds unexpected scores")
    numbers = [
        state.lowest,
        *(
            scores[key]
            for scores in (state.before, state.best)
            for key, own in like.before.items()
            if type(own) is float
        ),
    ]
    if not np.isfinite(np.array([*numbers, *(value for values in state.history.values() for value in values)])).all():
        raise ValueError("it holds scores that are not finite")
    for name in _ARRAYS:
        for value, own in zip(getattr(state, name), getattr(like, name), strict=False):
            if value.dtype != own.dtype or not np.isfinite(value).all():
                raise ValueError(f"{name!r} holds {value.dtype} instead of {own.dtype}, or values that are not finite")


def _check_same(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    if theirs != mine:
        raise RunError(
            f"{path}: is the checkpoint of another configuration ({_differences(theirs, mine)}). Give its settings to "
            "resume that training, or remove it to start again."
        )


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    names: Sequence[str] = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    return "; ".join(f"{name}: {theirs.get(name, 'default')} -> {mine.get(name, 'default')}" for name in names)
