"""What a backend writes while it starts is held back, and shown if it fails or the process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

_PROGRAM = """
import os, sys
from features.networks.backend import held_back
os.write(2, b"before\\n")
try:
    with held_back():
        os.write(2, b"chatter from C++\\n")
        print("chatter from Python", file=sys.stderr)
        {end}
except ValueError:
    pass
os.write(2, b"after\\n")
"""
CHATTER = "chatter from C++\nchatter from Python\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "shown", "code"),
    [
        ("pass", "before\nafter\n", 0),
        ("raise ValueError", f"before\n{CHATTER}after\n", 0),
        ("raise KeyboardInterrupt", f"before\n{CHATTER}", -signal.SIGINT),
        ("sys.stderr.flush(); os.abort()", f"before\n{CHATTER}", -signal.SIGABRT),
        ("sys.stderr.flush(); os._exit(7)", f"before\n{CHATTER}", 7),
    ],
)
def test_messages_are_held_back_unless_something_goes_wrong(tmp_path: Path, end: str, shown: str, code: int) -> None:
    (tmp_path / "temporary").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(end=end)],
        **{"cwd": ROOT, "env": {**os.environ, "TMPDIR": str(tmp_path / "temporary")}},
        **{"capture_output": True, "text": True, "check": False},
    )
    assert (result.stderr.partition("Traceback")[0], result.returncode) == (shown, code)
    assert list((tmp_path / "temporary").iterdir()) == []


_THREADS = """
import logging, os, sys, threading
from features.networks.backend import held_back
from pipeline.progress import StderrHandler
logging.getLogger().addHandler(StderrHandler())
kept = []
def another():
    logging.getLogger("pipeline").warning("said by another thread")
    print("printed by another thread", file=sys.stderr)
with held_back():
    kept.append(sys.stderr)
    print("chatter from Python", file=sys.stderr)
    thread = threading.Thread(target=another)
    thread.start()
    thread.join()
    os.write(2, b"chatter from C++\\n")
print("kept by a library", file=kept[0])
thread = threading.Thread(target=another)
thread.start()
thread.join()
"""


@pytest.mark.slow
def test_what_other_threads_say_meanwhile_is_shown() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _THREADS],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": False},
    )
    said = "WARNING: said by another thread\nprinted by another thread\n"
    assert (result.stderr, result.returncode) == (f"{said}kept by a library\n{said}", 0)


_LEAVES_OUT = """
import sys
from features.networks.backend import load_keras
from pipeline.cli import main
assert main(["--version"]) == 0
keras = load_keras()
print(sorted({"matplotlib", "pandas", "sklearn"} & set(sys.modules)))
import matplotlib.pyplot, sklearn.linear_model  # as the command line itself does
print(keras.wrappers.SKLearnClassifier.__name__)
"""


@pytest.mark.slow
def test_the_command_line_starts_keras_without_what_it_does_not_use() -> None:
    result = subprocess.run([sys.executable, "-c", _LEAVES_OUT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1:] == ["[]", "SKLearnClassifier"]


@pytest.mark.slow
def test_products_are_exact_and_a_gpu_is_not_taken_whole_even_where_keras_was_imported_before() -> None:
    program = """
import os
import keras
from features.networks.backend import load_keras
backend = load_keras().backend.backend()
if backend == "tensorflow":
    import tensorflow
    exact = not tensorflow.config.experimental.tensor_float_32_execution_enabled()
elif backend == "jax":
    import jax
    exact = jax.config.jax_default_matmul_precision == "highest"
else:
    from torch import backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    exact = [part.fp32_precision for part in parts] == ["ieee"] * 3
print(exact, os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH"), os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"))
"""
    for before, expected in (("", "True true false"), ("import keras\n", "True None None")):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "XLA_"))}
        result = subprocess.run(
            [sys.executable, "-c", program.replace("import keras\n", before)],
            **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False},
        )
        assert result.stdout.strip() == expected, result.stderr
