"""The script that counts code lines, on a snippet whose counts are known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT

SNIPPET = '''"""A module.

Its docstring has four lines.
"""

import os  # a comment behind code

# a comment alone
TEXT = """two
lines"""


@app.command("many")
def many(a, b, c, d, e, f, g, h, i, j, k, l, m, n):
    """One line."""
    return (
        a,

        # in brackets
        b,
    )


class Thing:
    """One line."""

    def method(self, one, /, two, *rest, three=3, **more):
        def inner():
            """Only this."""

        return inner


def twelve_and_one(a, b, c, d, e, f, g, h, i, j, k, l, *, m):
    pass
'''


@pytest.fixture(scope="module")
def lines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("code_lines", ROOT / "tests" / "benchmarks" / "code_lines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["code_lines"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_each_line_is_code_docstring_comment_or_blank(lines: ModuleType) -> None:
    file = lines.read(SNIPPET, "snippet.py")
    assert (file.code, file.docstrings, file.comments, file.blank) == (15, 7, 2, 11)
    assert file.lines == len(SNIPPET.splitlines()) == 35


def test_functions_are_measured_without_docstrings_and_self(lines: ModuleType) -> None:
    found = {item.name: item for item in lines.read(SNIPPET, "snippet.py").functions}
    assert {name: (item.length, item.parameters, item.command) for name, item in found.items()} == {
        "snippet.py:many": (7, 14, True),
        "snippet.py:method": (5, 3, False),
        "snippet.py:inner": (1, 0, False),
        "snippet.py:twelve_and_one": (2, 13, False),
    }


def test_a_summary_leaves_commands_out_of_those_with_too_many_parameters(lines: ModuleType) -> None:
    summary = lines.summarise([lines.read(SNIPPET, "snippet.py"), lines.read("x = 1\n", "small.py")])
    assert (summary["files"], summary["code"], summary["lines"]) == (2, 16, 36)
    assert summary["largest_file"] == {"path": "snippet.py", "lines": 35}
    functions = summary["functions"]
    assert functions["too_many"] == {"snippet.py:twelve_and_one": 13}
    assert (functions["count"], functions["share_many"]) == (4, 0.5)
    assert (functions["median"], functions["ninety"], functions["longest"]) == (3.5, 7, 7)
    assert functions["longest_name"] == "snippet.py:many"


def test_packages_inside_a_package_are_listed_and_counted_once(lines: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "a.py").write_text("a = 1\nb = 2\n")
    (tmp_path / "outer" / "inner" / "c.py").write_text('"""C."""\n\nc = 3\n')
    document = lines.count([tmp_path / "outer"])
    assert {name: row["code"] for name, row in document["packages"].items()} == {"outer": 3, "outer.inner": 1}
    assert (document["total"]["code"], document["total"]["files"], document["total"]["docstrings"]) == (3, 2, 1)
    assert "functions" not in document["total"]
    assert "  of it outer.inner" in lines.table(document)
