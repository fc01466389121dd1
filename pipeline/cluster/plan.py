"""What workers receive: a plan file on the shared path, and tasks that point to a few bytes of it.

    plan --PlanFile--> features.h5.parts/.plan.OWNER.tmp     first line: what all shards share; then one line per shard
    task (path, token, position of its line, range of rows) --OpenPlan--> ShardSpec

A million paths never pass through the scheduler. The file is JSON; nothing in it is executed or unpickled.
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
from features.machine import installed_version, keras_backend, software_versions
from features.recipe import Recipe
from features.store.schema import FORMAT_VERSIONS
from features.temporary import temporary_path

PLAN_FORMAT = 1
# Compared only if both sides have them: a GPU node does not need OpenVINO, nor a node with another backend TensorFlow.
OPTIONAL = ("openvino", "tensorflow", "jax", "torch", "onnxruntime", "keras-hub")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all shards of a plan share: a worker builds its engine from it.

    Parameters
    ----------
    backbone, weights : str
        As of ``features.recipe.NetworkOptions``, paths absolute.
    engine, device : str
        As requested; each worker chooses according to its own machine.
    batch_size : int
        Pictures of one forward pass.
    threads : int or None
        Number of threads that read and decode; default: one for each processor of the worker.
    quantised : str or None
        File of the quantised network for int8, beside the store.
    """

    backbone: str
    weights: str
    engine: str
    device: str
    batch_size: int
    threads: int | None
    quantised: str | None = None


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard, or rows ``start`` to ``stop - 1`` of one. Nothing else passes through the scheduler.

    Parameters
    ----------
    plan : str
        Path of the plan file.
    token : str
        Token in the first line of the plan file, so that another disk at the same path is noticed.
    offset, length : int
        Position and length of the line of the shard, in bytes.
    start, stop : int
        Range of rows of the shard.
    key : str
        Name under which progress is reported.
    """

    plan: str
    token: str
    offset: int
    length: int
    start: int
    stop: int
    key: str


class PlanFile:
    """A plan file on the shared path; ``places`` has the position and length of the line of each spec."""

    def __init__(self, path: Path, token: str, places: Sequence[tuple[int, int]]) -> None:
        self.path, self.token, self.places = path, token, places

    @classmethod
    @contextlib.contextmanager
    def written(
        cls, folder: Path, specs: Sequence[ShardSpec], setting: Setting, image: str | None = None
    ) -> Iterator[PlanFile]:
        """Write a plan and remove it at the end. It has the name of a temporary file, so that of a killed run is swept.

        Parameters
        ----------
        folder : Path
            Folder of results.
        specs, setting
            The shards to make, and what they share.
        image : str, optional
            An image that every worker has to see.

        Raises
        ------
        StoreError
            If it cannot be written.
        """
        token = secrets.token_hex(8)
        path = temporary_path(Path(os.path.abspath(folder), "plan"))
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
        """Read the first line of a plan file.

        Raises
        ------
        ClusterError
            If the file is not the plan that this run wrote: its token or its format differs.
        OSError
            If there is no such file.
        """
        with open(path, "rb") as stream:
            header = json.loads(stream.readline())
        if header.get("token") != token or header.get("format") != PLAN_FORMAT:
            raise ClusterError(f"{path}: is not the plan file that was written")
        return cls(path, Setting(**header["setting"]), header["versions"], header["image"])

    def spec(self, task: ShardTask) -> ShardSpec:
        """Read the spec of a task."""
        with open(self.path, "rb") as stream:
            stream.seek(task.offset)
            values = json.loads(stream.read(task.length))
        return _spec(values).part(task.start, task.stop)


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all machines, read without importing the packages."""
    found = {**{name: installed_version(name) for name in ("onnxruntime", "keras-hub")}, **software_versions()}
    found["feature format"] = str(max(FORMAT_VERSIONS))
    return {**found, "keras backend": keras_backend(), "python": ".".join(platform.python_version_tuple()[:2])}


def differences(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """List each version that differs, as ``"keras 3.12.0 instead of 3.15.1"``: theirs instead of mine.

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
