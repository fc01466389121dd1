"""The notebook of the first hour: what its outputs show, and its cells executed by any Python that has nbclient and ipykernel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from helpers import ROOT

PLACE = ROOT / "pipeline" / "notebooks" / "first-hour.ipynb"
RICH = {  # cell: what its output shows
    "leaderboard": ("Leaderboard(runs=4", "<svg"),
    "mistakes": ("OpenedRun(", 'src="data:image/'),
    "evaluate": ("Evaluation(", "true \\ predicted"),
    "similar": ("Similar(file=&#39;features.h5&#39;, images=1)", "similarity</th>"),
    "report": ("Report(out=&#39;report.html&#39;", "<table"),
}


def cells(place: Path = PLACE) -> list[dict[str, Any]]:
    return list(json.loads(place.read_text())["cells"])


def output(cell: dict[str, Any], kind: str) -> str:
    return "".join(text for output in cell["outputs"] for text in output.get("data", {}).get(kind, ""))


def printed(cell: dict[str, Any]) -> str:
    return "".join(text for output in cell["outputs"] if output.get("name") == "stdout" for text in output["text"])


def check_outputs(kept: list[dict[str, Any]]) -> None:
    """That every cell ran, and showed what it is there for."""
    code = {cell["id"]: cell for cell in kept if cell["cell_type"] == "code"}
    assert [cell["execution_count"] for cell in code.values()] == list(range(1, len(code) + 1))
    assert printed(code["extract"]) == "400 images of 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"
    assert printed(code["sweep"]) == "3 trained, 0 there before, 0 failed\n"
    for name, shown in RICH.items():
        assert all(text in output(code[name], "text/html") for text in shown), name


def execute(python: Path | str, folder: Path, **variables: str) -> list[dict[str, Any]]:
    """Execute the notebook in a folder; return its cells with their outputs."""
    place = Path(shutil.copy(PLACE, folder))
    code = "import sys; from nbclient.cli import main; sys.exit(main())"
    with tempfile.TemporaryDirectory() as own:  # not the user's settings and history
        places = dict.fromkeys(("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"), own)
        done = subprocess.run(
            [str(python), "-c", code, "--inplace", "--timeout=500", place.name],
            cwd=folder,
            env={**os.environ, **places, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return cells(place)
