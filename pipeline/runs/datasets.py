"""The data sets that the runs of a folder were trained on.

    runs --source, data digest--> data sets --data digest--> states, newest first

A data set is the source of its images: a folder, an archive or a manifest with its label column. Each change of its images,
labels or splits makes another state of it. Scores of different states do not measure the same thing. A state of some of
the images (``extract --limit``) comes after those of all.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from features.errors import ConfigurationError, nearest
from features.files import printable
from features.progress import counted
from features.sources.remote import is_address
from features.sources.scan import source_in
from pipeline.runs.folder import Run
from pipeline.tables import shortened

SHOWN = 6  # data sets that an error lists
OLDER = "an older state"
SAMPLE = "sample:"  # start of the name of a built-in sample
LEAST_DIGITS = 4  # fewest hexadecimal digits of a data digest that name a state


@dataclasses.dataclass(frozen=True)
class State:
    """A state of a data set: its data digest, and its runs, newest first."""

    digest: str
    runs: tuple[Run, ...]

    @property
    def kind(self) -> str:
        """What a state is that is not the first of its data set."""
        return f"a trial with --limit {self.runs[0].limit}" if _is_trial(self.runs) else OLDER


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set: the sources that its runs record, the one of the newest run first, and its states.

    The newest state comes first; states of some images (``extract --limit``) come last.
    """

    sources: tuple[str, ...]
    target: str
    states: tuple[State, ...]

    @property
    def name(self) -> str:
        """Last component of its source; the label column of a manifest, if one was named, follows a colon."""
        return short_name(self.sources[0]) + (f":{self.target}" if self.target else "")

    @property
    def stale(self) -> int:
        """Number of runs of older states, and of trials."""
        return sum(len(state.runs) for state in self.states[1:])

    def is_called(self, name: str) -> bool:
        """Whether ``name`` is its name, or one of its sources."""
        return name == self.name or name in self.sources or absolute(name) in self.sources

    def is_likely(self, hint: str | None) -> bool:
        """Whether ``hint`` is one of its sources, or the data digest of one of its states."""
        return hint in self.sources or any(state.digest == hint for state in self.states)


def absolute(source: str) -> str:
    """Return a source as an absolute path without links, and that of a sample as it is."""
    return source if source.startswith(SAMPLE) else os.path.realpath(os.path.expanduser(source))


def source_of(description: str, root: str) -> str:
    """Return the source that a run records: an absolute path without links, so that it names one place on this machine.

    Parameters
    ----------
    description : str
        The source as the user gave it.
    root : str
        Root of the images as a scan found it, or a store notes it; empty if it is not known.
    """
    if not root or description.startswith(SAMPLE):
        return description
    source = source_in(root, description)
    return source if is_address(source) else os.path.realpath(source)


def short_name(source: str) -> str:
    """Return the last component of a source."""
    return source if source.startswith(SAMPLE) else PurePath(source).name or source or "images"


def data_sets(runs: Iterable[Run]) -> list[DataSet]:
    """Group runs by data set and state, the data set with the newest run first.

    Runs belong to one data set if they record the same source. Two sources are one data set if one of them has the newest
    images, labels and splits of the other: images that were moved stay the same data set, copies that both went on do not.
    """
    newest_first = sorted(runs, key=lambda run: (run.created, run.run_id), reverse=True)
    newest: dict[tuple[str, ...], str] = {}  # source -> digest of its newest state
    for run in newest_first:
        newest.setdefault(_key(run), run.data_digest)
    newest |= {_key(run): run.data_digest for run in reversed(newest_first) if not run.limit}
    holders: dict[str, dict[tuple[str, ...], None]] = {}  # digest -> sources
    for run in newest_first:
        holders.setdefault(run.data_digest, {})[_key(run)] = None
    order, parent = {key: place for place, key in enumerate(newest)}, {key: key for key in newest}

    def root_of(key: tuple[str, ...]) -> tuple[str, ...]:
        while (above := parent[key]) != key:
            parent[key] = key = parent[above]
        return key

    for key, digest in newest.items():
        if others := holders[digest].keys() - {key}:
            parent[root_of(key)] = root_of(min(others, key=order.__getitem__))
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in newest_first:
        members.setdefault(root_of(_key(run)), []).append(run)
    return [_data_set(alike) for alike in members.values()]


def _key(run: Run) -> tuple[str, ...]:
    """What a source is told apart by; runs without one by their data digest."""
    return (run.source, run.target or "") if run.source else (run.data_digest,)


def _data_set(runs: Sequence[Run]) -> DataSet:
    states: dict[str, list[Run]] = {}
    for run in runs:
        states.setdefault(run.data_digest, []).append(run)
    sources = tuple(dict.fromkeys(run.source for run in runs))
    ordered = sorted(states.items(), key=lambda item: _is_trial(item[1]))
    return DataSet(sources, runs[0].target or "", tuple(State(digest, tuple(alike)) for digest, alike in ordered))


def _is_trial(runs: Iterable[Run]) -> bool:
    """Whether the runs of a state are on some of the images alone."""
    return all(run.limit for run in runs)


def only_one(found: Sequence[DataSet], name: str | None, where: str) -> tuple[DataSet, State]:
    """Return the data set to choose a run of, and its newest state; with the digits of a digest, the state they name.

    Parameters
    ----------
    found : sequence of DataSet
        At least one.
    name : str, optional
        Name or source of a data set, or the first digits of a data digest. May be left out if there is only one data set.
    where : str
        The folder of runs, for messages.

    Raises
    ------
    ConfigurationError
        If there are several, or there is no such data set; the message lists them.
    """
    if name is None:
        named = [(one, one.states[0]) for one in found]
    else:
        named = [(one, one.states[0]) for one in found if one.is_called(name)]
        if not named and len(name) >= LEAST_DIGITS:
            named = [(one, state) for one in found for state in one.states if state.digest.startswith(name.lower())]
    if len(named) == 1:
        return named[0]
    if named:
        what = f"holds runs of {len(named)} data sets" + ("" if name is None else f" that are called {name!r}")
        known = [one for one, _ in named]
    else:
        what = f"holds no runs of a data set {name!r}{nearest(str(name), [one.name for one in found])}"
        known = list(found)
    rest = f"\n  and {len(known) - SHOWN} more: bottleneck leaderboard lists all" if len(known) > SHOWN else ""
    listed = "".join(f"\n  {_described(one)}" for one in known[:SHOWN])
    raise ConfigurationError(f"{where}: {what}; name one by its name, source or digest with --data-set:{listed}{rest}")


def _described(one: DataSet) -> str:
    runs = counted(sum(len(state.runs) for state in one.states), "run")
    source = printable(shortened(one.sources[0] or "an unknown place"))
    return f"{printable(shortened(one.name, 30))} {one.states[0].digest[:10]}: {runs}, {source}"
