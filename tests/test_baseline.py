"""The yardstick of the benchmark of whole processes stays as it is, and the benchmark's arithmetic is right."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT

BENCHMARKS = ROOT / "tests" / "benchmarks"
SHA256 = "ef43ad71b466d70280e4a6c89f35b72954828d843ad1e070e295210a68c5aba6"


def test_the_yardstick_is_the_one_that_all_ratios_were_measured_against() -> None:
    digest = hashlib.sha256((BENCHMARKS / "baseline_keras.py").read_bytes()).hexdigest()
    assert digest == SHA256, "baseline_keras.py has changed: put it back, and write a better yardstick as a new file"


def test_the_yardstick_uses_keras_and_nothing_of_ours() -> None:
    tree = ast.parse((BENCHMARKS / "baseline_keras.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "argparse", "os", "keras", "numpy", "tensorflow"}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_process", BENCHMARKS / "bench_process.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_process"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ratios_are_those_of_medians_and_two_means_half_of_the_time(bench: ModuleType) -> None:
    costs = {
        bench.TUNED: [bench.Cost(40, 60, 900), bench.Cost(50, 60, 1000), bench.Cost(90, 66, 1100)],
        "ours": [bench.Cost(20, 30, 200), bench.Cost(25, 20, 300), bench.Cost(30, 40, 200)],
        "ours, before": [bench.Cost(80, 15, 400), bench.Cost(75, 15, 400), bench.Cost(10, 15, 400)],
    }
    tuned, ours, before = bench.summarise(costs, {"ours": "ours, before"})
    assert tuned == {
        **{"contender": bench.TUNED, "wall": 1, "wall_lowest": 1, "wall_highest": 1, "processor": 1, "peak_mib": 1000}
    }
    assert (ours["wall"], ours["processor"], ours["peak_mib"]) == (2, 2, 200)
    assert (ours["wall_lowest"], ours["wall_highest"]) == (2, 3)
    assert (ours["wall_to_code"], ours["processor_to_code"]) == (3, 0.5)
    assert "wall_to_code" not in before
    assert "ours, before" in bench.table([tuned, ours, before])


def test_the_table_of_stages_adds_up(bench: ModuleType) -> None:
    whole = [bench.Cost(wall=20, processor=30, peak_mib=1)] * 3  # of 2,000 images: 10 ms and 15 processor-ms each
    start = [bench.Cost(wall=2 + 32 * 0.010, processor=4 + 32 * 0.015, peak_mib=1)] * 3
    alone = {"reading": 1.0, "decoding": 2.0, "resizing": 1.5, "forward": 7.0, "writing": 0.5}
    row = bench.where(whole, start, [{**alone, "decode_each": 0.003, "forward_each": 0.005}] * 3, 2000)
    assert {name: row[name] for name in alone} == alone
    assert (row["start"], row["whole"], row["start_seconds"]) == pytest.approx((2, 15, 2))
    assert row["rest"] == pytest.approx(15 - 2 - 12)
    assert row["bound_per_second"] == pytest.approx(125)
    assert (row["of_bound"], row["of_bound_after_start"]) == pytest.approx((0.8, 8 / 9))
    cells = bench.where_table({"ours": row}).splitlines()
    assert cells[2] == "| ours | 2.00 | 1.00 | 2.00 | 1.50 | 7.00 | 0.50 | 1.00 | 15.00 | 2.0 s | 125/s | 80% | 89% |"
    assert cells[0].count("|") == cells[1].count("|") == cells[2].count("|")


@pytest.mark.slow
def test_processor_time_counts_processes_that_a_command_waits_for(bench: ModuleType, tmp_path: Path) -> None:
    work = "import time\nwhile time.process_time() < 0.3: pass"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {work!r}], check=True)\nprint('done')"
    cost, said = bench.measure([sys.executable, "-c", code], cwd=tmp_path, environment={})
    assert said == "done\n"
    assert 0.3 <= cost.processor < 5
    assert cost.wall >= 0.3
    assert cost.peak_mib > 3


def test_a_command_that_fails_ends_the_benchmark_with_its_message(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"exit code 1: no such network"):
        bench.measure([sys.executable, "-c", "import sys; sys.exit('no such network')"], cwd=tmp_path, environment={})
