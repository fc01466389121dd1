"""The notebook: twelve cells with outputs, executed as they stand, each output the one of a result."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from notebooks import PLACE, cells, check_outputs, execute


def test_twelve_cells_use_public_names_and_their_outputs_are_kept() -> None:
    from features import __all__ as of_features
    from pipeline import __all__ as of_pipeline

    found = cells()
    assert len(found) == 12
    code = "\n".join("".join(cell["source"]) for cell in found if cell["cell_type"] == "code")
    used = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert used - {"classes", "images", "paths", "trained", "cached", "failed", "join"} <= {*of_features, *of_pipeline}
    check_outputs(found)
    assert "Traceback" not in PLACE.read_text()
    assert str(Path.home()) not in PLACE.read_text()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    packages = os.pathsep.join([str(ROOT), str(ROOT / "pipeline" / "names")])
    check_outputs(execute(sys.executable, tmp_path, PYTHONPATH=packages))
    page, runs = (tmp_path / "report.html").read_text(), sorted(path.name for path in (tmp_path / "runs").glob("*-*"))
    assert len(runs) == 4
    assert [run for run in runs if run not in page] == []
