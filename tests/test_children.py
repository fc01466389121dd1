"""No child process lives on after its parent, even if that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT

from features import children
from features.children import run_module

SECONDS = 5.0
# Each starts a child that would stay for minutes, and prints its number.
STARTED = {
    "module": "import threading; threading.Timer(1.0, lambda: None).start(); run_module('timeit', '-n1', '-r1', '-s', "
    "'import os, time; print(os.getpid(), file=open(\"child\", \"w\"), flush=True)', 'time.sleep(300)')",
    "workers": "list(in_parallel(stay, [(n,) for n in range(3)], 3))",
}
PARENT = """
import os, sys, time
from features.children import run_module
from pipeline.sweeps.workers import in_parallel

def stay(number):
    with open("child", "a") as file:
        file.write(f"{os.getpid()}\\n")
    if number != 1:  # one of them waits for work, as those do that have no more
        time.sleep(300)

if __name__ == "__main__":
    exec(sys.argv[1])
"""


def alive(number: int) -> bool:
    return psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("way", STARTED)
def test_children_end_with_a_parent_that_is_killed(way: str, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    code = f"import parent; from parent import *; {STARTED[way]}"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    count = 3 if way == "workers" else 1
    end = time.monotonic() + 60
    while not (tmp_path / "child").exists() or len((tmp_path / "child").read_text().split()) < count:
        assert time.monotonic() < end
        assert parent.poll() is None
        time.sleep(0.05)
    family = {*map(int, (tmp_path / "child").read_text().split())}
    family |= {child.pid for child in psutil.Process(parent.pid).children(recursive=True)}
    assert all(map(alive, family))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + SECONDS
    while any(map(alive, family)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [number for number in family if alive(number)]


@pytest.mark.slow
def test_a_module_runs_as_with_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "given.py").write_text(
        "import os, sys\nprint(__name__, sys.argv, os.environ['A'], sys.stdin.read())\nsys.exit('no: ü')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_module("given", "a b", "-c", environment={"A": "1"})
    assert (done.returncode, done.stderr) == (1, "no: ü\n")
    assert done.stdout == f"__main__ {[str(tmp_path / 'given.py'), 'a b', '-c']} 1 \n"
    with pytest.raises(subprocess.TimeoutExpired):
        run_module("timeit", "-n1", "-r1", "import time; time.sleep(60)", timeout=0.5)


def test_files_of_the_working_folder_take_the_place_of_no_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The working folder may be somebody's data, or a project with a features.py of its own."""
    for name in ("features.py", "runpy.py", "this.py"):
        (tmp_path / name).write_text("raise SystemExit('a stranger ran')")
    monkeypatch.chdir(tmp_path)
    done = run_module("this")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The Zen of Python")


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_a_process_whose_parent_has_gone_already_ends_at_once(known: bool) -> None:
    hide = "" if known else "children.ctypes.CDLL = lambda name: None; children._SECONDS = 0.05; "
    code = f"import os, time; from features import children; {hide}"
    late = f"{code}children.end_with(1234567); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", late], cwd=ROOT, check=False, timeout=10).returncode == 1
    fine = f"{code}children.end_with(os.getppid()); time.sleep(0.2); print('here')"
    done = subprocess.run(
        [sys.executable, "-c", fine], cwd=ROOT, capture_output=True, text=True, check=False, timeout=10
    )
    assert done.stdout == "here\n"


def test_elsewhere_than_on_linux_a_thread_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, parents = list[int](), iter([7, 7, 1])
    monkeypatch.setattr(children, "_SECONDS", 0.0)
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    monkeypatch.setattr("os._exit", ended.append)
    children._watch(7)
    assert ended == [1]
