"""The notebook: twelve cells with outputs, which `make stress` runs as they stand, each output the one of a result."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, STRESS

PLACE = ROOT / "pipeline" / "notebooks" / "first-hour.ipynb"
RICH = {  # cell: what its output shows
    "leaderboard": ("Leaderboard(runs=4", "<svg"),
    "mistakes": ("OpenedRun(", 'src="data:image/'),
    "evaluate": ("Evaluation(", "true \\ predicted"),
    "report": ("Report(out=&#39;report.html&#39;", "<table"),
}


def cells() -> list[dict[str, Any]]:
    return list(json.loads(PLACE.read_text())["cells"])


def html_of(cell: dict[str, Any]) -> str:
    return "".join(text for output in cell["outputs"] for text in output.get("data", {}).get("text/html", ""))


def test_twelve_cells_use_public_names_and_their_outputs_are_kept() -> None:
    from features import __all__ as of_features
    from pipeline import __all__ as of_pipeline

    found = cells()
    assert len(found) == 12
    code = "\n".join("".join(cell["source"]) for cell in found if cell["cell_type"] == "code")
    used = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert used - {"classes", "images", "paths", "trained", "cached", "failed", "join"} <= {*of_features, *of_pipeline}
    kept = {cell["id"]: cell for cell in found if cell["cell_type"] == "code"}
    assert all(cell["execution_count"] for cell in kept.values())
    for name, shown in RICH.items():
        assert all(text in html_of(kept[name]) for text in shown), name
    assert "Traceback" not in PLACE.read_text()
    assert str(Path.home()) not in PLACE.read_text()


@pytest.mark.slow
@pytest.mark.stress
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not STRESS:
        pytest.skip("STRESS is not set: the notebook is executed in `make stress`")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "pipeline" / "names")]))
    notebook = nbformat.read(PLACE, 4)
    nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    kept = {cell["id"]: cell for cell in notebook.cells if cell["cell_type"] == "code"}
    for name, shown in RICH.items():
        assert all(text in html_of(kept[name]) for text in shown), name
    assert (tmp_path / "report.html").read_text().count("<title>") == 1
