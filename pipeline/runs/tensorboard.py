"""Write the histories of runs as TensorBoard logs.

    history.csv --scalars, one step per row--> DIR/<run id>/events.out.tfevents...

The logs are written with TensorBoard's own record writer, without TensorFlow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, RunError
from features.files import atomic_file
from features.machine import how_to_install
from pipeline.runs.folder import read_history

NAME = "events.out.tfevents.0.bottleneck"  # a single file per run, which is replaced when it is written again


def require_tensorboard() -> Any:
    """Import TensorBoard's event and summary messages and its record writer.

    Raises
    ------
    ConfigurationError
        If the package is not installed; the message names the extra to install.
    """
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
    except ImportError as problem:
        raise ConfigurationError(
            f"--tensorboard: the package tensorboard cannot be imported ({problem}); "
            f"install it with {how_to_install('tensorboard')}"
        ) from problem
    return event_pb2.Event, summary_pb2.Summary, RecordWriter


def write_history(folder: Path, run_id: str, history: Mapping[str, Sequence[float]]) -> Path:
    """Write a history as scalars. The log is written atomically and replaces an earlier log of the same run.

    Parameters
    ----------
    folder : Path
        Folder for ``tensorboard --logdir``.
    run_id : str
        Name of the run in TensorBoard.
    history : mapping of str to sequence of float
        Columns. The column ``epoch``, if there is one, gives the steps; otherwise they are counted from 1.

    Returns
    -------
    Path
        The event file.

    Raises
    ------
    ConfigurationError
        If TensorBoard is not installed.
    RunError
        If the file cannot be written.
    """
    event, summary, writer = require_tensorboard()
    columns = {name: values for name, values in history.items() if name != "epoch"}
    length = max(map(len, columns.values()), default=0)
    steps = [int(epoch) for epoch in history.get("epoch", range(1, length + 1))]
    path, now = folder / run_id / NAME, time.time()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, open(temporary, "wb") as stream:
            records = writer(stream)
            records.write(event(wall_time=now, file_version="brain.Event:2").SerializeToString())
            for row, step in enumerate(steps):
                scalars = [summary.Value(tag=name, simple_value=values[row]) for name, values in columns.items()]
                records.write(event(wall_time=now, step=step, summary=summary(value=scalars)).SerializeToString())
            records.flush()
    except OSError as problem:
        raise RunError(f"{path}: the log cannot be written ({problem.strerror or problem})") from problem
    return path


def log_run(folder: Path, run_folder: Path) -> Path:
    """Call `write_history` with the ``history.csv`` of a finished run."""
    return write_history(folder, run_folder.name, read_history(run_folder))
