"""The GPU check runs where nobody develops: what it uses of the packages is looked up here, without a GPU and without running it."""

from __future__ import annotations

import ast
import importlib
import re

import pytest
from helpers import ROOT

KIT = ROOT / "tests" / "benchmarks" / "gpu"
TREE = ast.parse((KIT / "gpu_kit.py").read_text())
IMPORTS = sorted(
    {
        (node.module, alias.name)
        for node in ast.walk(TREE)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("features", "pipeline")
        for alias in node.names
    }
)


def attributes(tree: ast.AST, owner: str) -> set[str]:
    """Names that stand behind `owner.`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == owner
    }


@pytest.mark.parametrize(("module", "name"), IMPORTS, ids=lambda value: value)
def test_what_the_kit_imports_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), f"{module} has no {name}: mend gpu_kit.py"


def test_the_kit_imports_the_parts_it_is_to_check() -> None:
    modules = {module for module, _ in IMPORTS}
    assert {
        "features.networks.keras_engine",
        "features.extraction.extraction",
        "features.pixels.decode",
        "pipeline.heads.bank",
        "pipeline.heads.logistic",
    } <= modules


def test_what_the_kit_imports_of_another_benchmark_is_there() -> None:
    other = ast.parse((KIT.parent / "bench_extract.py").read_text())
    defined = {node.name for node in other.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = {
        alias.name
        for node in ast.walk(TREE)
        if isinstance(node, ast.ImportFrom) and node.module == "bench_extract"
        for alias in node.names
    }
    assert used == {"WarmNetwork", "warm_up"}
    assert used <= defined


def test_the_keras_engine_has_what_the_kit_reads_of_it() -> None:
    tree = ast.parse((ROOT / "features" / "networks" / "keras_engine.py").read_text())
    (engine,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "KerasEngine"]
    used = attributes(TREE, "engine")
    assert used == {"device", "_scope", "_forward", "_graph", "_step"}
    assert used <= attributes(engine, "self")


def test_every_step_of_the_script_is_a_step_of_the_kit() -> None:
    wanted = re.findall(
        r"^.*\bstep [a-z0-9-]+ \d+ (?:torch|jax) (\w+)", (KIT / "on_device.sh").read_text(), re.MULTILINE
    )
    (table,) = [
        node.value for node in TREE.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STEPS"
    ]
    steps = {node.id for node in ast.walk(table) if isinstance(node, ast.Name)} & {
        node.name for node in TREE.body if isinstance(node, ast.FunctionDef)
    }
    assert len(wanted) == 30
    assert set(wanted) | {"summary"} == steps
