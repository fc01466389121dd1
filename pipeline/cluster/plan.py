"""What workers are told: a plan file on the shared path, and tasks that name a few bytes of it.

    plan --PlanFile--> features.h5.parts/.plan-TOKEN.tmp     first line: what all shards share; then one line per shard
    task (path, token, where its line lies, which of its rows) --OpenPlan--> ShardSpec

A million paths never pass the scheduler. The file is JSON; nothing of it is ever executed or unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from features.canonical import canonical_json
from features.errors import ClusterError
from features.extraction.shard import ShardSpec
from features.files import writing
from features.machine import keras_backend, software_versions
from features.recipe import Recipe
from features.store.schema import FORMAT_VERSION

PLAN_FORMAT = 1
# Compared only where both sides have them: a GPU node has no use for OpenVINO, nor one without Keras's TensorFlow for it.
OPTIONAL = ("openvino", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all shards of a plan share beside the plan itself: from this a worker makes its engine.

    Parameters
    ----------
    backbone, weights : str
        As of ``features.recipe.NetworkOptions``, paths absolute.
    engine, device : str
        As they were asked for: each worker chooses by what its own machine has.
    batch_size : int
        Pictures of one forward pass.
    threads : int or None
        Threads that read and decode; the processors of the worker process without it.
    """

    backbone: str
    weights: str
    engine: str
    device: str
    batch_size: int
    threads: int | None


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard, or rows ``start`` to ``stop - 1`` of one: this is all that passes the scheduler.

    Parameters
    ----------
    plan : str
        Path of the plan file.
    token : str
        What its first line says, so that another disk at the same path is noticed.
    offset, length : int
        Where the line of the shard lies, in bytes.
    start, stop : int
        Rows of it.
    key : str
        Under which progress is told.
    """

    plan: str
    token: str
    offset: int
    length: int
    start: int
    stop: int
    key: str


class PlanFile:
    """A plan as it lies on the shared path; ``place`` of each spec is in ``places``."""

    def __init__(self, path: Path, token: str, places: Sequence[tuple[int, int]]) -> None:
        self.path, self.token, self.places = path, token, places

    @classmethod
    @contextlib.contextmanager
    def written(
        cls, folder: Path, specs: Sequence[ShardSpec], setting: Setting, image: str | None = None
    ) -> Iterator[PlanFile]:
        """Write a plan, and remove it in the end. Its name is that of a temporary file: a killed run's one is swept.

        Parameters
        ----------
        folder : Path
            Where results go.
        specs, setting
            What to make.
        image : str, optional
            A file that every worker has to see.

        Raises
        ------
        StoreError
            If it cannot be written.
        """
        token = secrets.token_hex(8)
        path = Path(os.path.abspath(folder)) / f".plan-{token}.tmp"
        places = []
        try:
            with writing(path), open(path, "xb") as stream:
                header = {
                    "format": PLAN_FORMAT,
                    "token": token,
                    "setting": dataclasses.asdict(setting),
                    "versions": versions(),
                    "image": image,
                }
                stream.write(canonical_json(header).encode("ascii") + b"\n")
                for spec in specs:
                    line = canonical_json(_document(spec)).encode("ascii") + b"\n"
                    places.append((stream.tell(), len(line)))
                    stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            yield cls(path, token, places)
        finally:
            path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class OpenPlan:
    """The first line of a plan file, as a worker reads it."""

    path: Path
    setting: Setting
    versions: Mapping[str, str]
    image: str | None

    @classmethod
    def open(cls, path: Path, token: str) -> OpenPlan:
        """Read it.

        Raises
        ------
        ClusterError
            If another file lies there.
        OSError
            If there is none.
        """
        with open(path, "rb") as stream:
            header = json.loads(stream.readline())
        if header.get("token") != token or header.get("format") != PLAN_FORMAT:
            raise ClusterError(f"{path}: is another file than the one that was written")
        return cls(path, Setting(**header["setting"]), header["versions"], header["image"])

    def spec(self, task: ShardTask) -> ShardSpec:
        """The spec of a task."""
        with open(self.path, "rb") as stream:
            stream.seek(task.offset)
            values = json.loads(stream.read(task.length))
        return _spec(values).part(task.start, task.stop)


def versions() -> dict[str, str]:
    """What has to be alike on all machines, read without importing it."""
    found = {**software_versions(), "feature format": str(FORMAT_VERSION)}
    return {**found, "keras backend": keras_backend(), "python": ".".join(platform.python_version_tuple()[:2])}


def differences(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """``"keras 3.12.0 instead of 3.15.1"`` for each version of theirs that is not mine.

    Examples
    --------
    >>> differences({"keras": "3.15.1", "openvino": "2026.0"}, {"keras": "3.12.0", "openvino": "not installed"})
    ['keras 3.12.0 instead of 3.15.1']
    """
    found = []
    for name in sorted({*mine, *theirs}):
        one, other = mine.get(name, "not installed"), theirs.get(name, "not installed")
        if one != other and not (name in OPTIONAL and "not installed" in (one, other)):
            found.append(f"{name} {other} instead of {one}")
    return found


def _document(spec: ShardSpec) -> dict[str, Any]:
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {**values, "recipes": [recipe.to_dict() for recipe in spec.recipes]}


def _spec(values: Mapping[str, Any]) -> ShardSpec:
    columns: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    columns["recipes"] = tuple(map(Recipe.from_dict, values["recipes"]))
    return ShardSpec(**columns)
