"""The report of runs on labels and on numbers: what it says is what the runs say, in a browser too."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import NumpyNetwork, chromium, paint

from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources.scan import scan
from pipeline.heads.promises import Asked
from pipeline.reporting.data import Rows, card, reliability
from pipeline.reporting.reproduce import commands
from pipeline.runs.folder import Run
from pipeline.stages.report import make_report, summary
from pipeline.stages.train_head import train_head
from pipeline.tasks.table import TASKS

HOSTILE = "<b>grün"
TARGETS = {"multilabel": f"rot,{HOSTILE},blau", "regression": "helle,tiefe"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two runs for labels and two for numbers of painted images, and the report of all."""
    folder = tmp_path_factory.mktemp("report-tasks")
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (90, 3))
    noisy = colours + generator.normal(0, 40, colours.shape)
    cells = {"multilabel": (noisy > 128).astype(int), "regression": np.round(noisy[:, :2] * [1, 100], 2)}
    for task, target in TARGETS.items():
        lines = [f"path,{target},light"]
        for number, (colour, values) in enumerate(zip(colours.tolist(), cells[task].tolist(), strict=True)):
            paint(folder / task / f"{number:03}.png", colour, (48, 48))
            said = [*map(str, values)]
            said[0] = "" if number % 10 == 3 else said[0]  # not known
            lines.append(f"{task}/{number:03}.png,{','.join(said)},{('day', 'night')[number % 2]}")
        manifest = folder / f"{task}.csv"
        manifest.write_text("\n".join(lines) + "\n")
        images = scan(manifest, task=task, target=target)
        options = ExtractionOptions(
            batch_size=16, shard_rows=64, workers=2, split="stratified:0.5,0.5@0", target=target
        )
        store = Extraction(images, NumpyNetwork(), folder / f"{task}.h5", options).run().store  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:  # plots of runs are not on the page
            patch.setattr("pipeline.runs.writing.plot_run", lambda folder, *_: folder.mkdir())
            for name in ({"multilabel": "logistic", "regression": "ridge"}[task], "knn"):
                train_head(store, name, runs=folder / "runs", asked=Asked(by=("light",)))
    document = make_report(folder / "runs", folder / "report.html")
    return {"folder": folder, "document": document, "html": (folder / "report.html").read_text()}


def chosen(made: dict[str, Any], task: str) -> Run:
    group = next(one for one in made["document"]["groups"] if f"{task}.csv" in one["name"])
    return Run.open(made["folder"] / "runs" / group["chosen"])


@pytest.mark.slow
@pytest.mark.parametrize("task", TARGETS)
def test_the_page_has_the_scores_of_the_run(made: dict[str, Any], task: str) -> None:
    run, html = chosen(made, task), made["html"]
    scores = run.metrics["validation"]
    assert run.task.headline(scores) in html
    for tile in run.task.tiles(scores):
        assert f"<dt>{tile.label}</dt>" in html
        assert tile.value is None or f"{tile.value:.4f}" in html
    table = run.task.table(scores)
    assert table is not None
    for line, column in itertools.product(table.lines, table.columns):
        assert f'data-v="{line[column.key]}"' in html
    worst = max if task == "regression" else min
    groups = run.metrics["groups"]["validation"]["light"]
    score = {"multilabel": "Accuracy", "regression": "Mean absolute error"}[task]
    by_light = html[html.index(f'<caption class="vh">{score} by light') :]
    first = worst(groups, key=lambda line: line[run.task.group_score])
    assert by_light.index(first["value"]) == min(by_light.index(line["value"]) for line in groups)
    assert f'data-v="{first[run.task.group_score]}"' in by_light[: by_light.index("</tr>", by_light.index("<tbody>"))]
    assert min(group["pictures"] for group in made["document"]["groups"]) > 40
    assert "<b>grün" not in html
    assert "&lt;b&gt;grün" in html
    assert f"{summary(made['document']).count('2 runs, chosen')}" == "2"


def test_labels_are_judged_at_their_thresholds() -> None:
    before = {"per_class": [{"name": "a", "threshold": 0.5}, {"name": "b", "threshold": 0.2}]}
    values = np.array([[0.9, 0.1], [0.4, 0.3], [0.6, 0.9], [0.2, 0.21]])
    y = np.array([[1, 0], [1, 255], [1, 0], [0, 1]], np.uint8)
    rows = Rows(("x/0", "x/1", "x/2", "x/3"), (b"",) * 4, y, values, ("a", "b"), TASKS["multilabel"], before)
    assert rows.judged.wrong.tolist() == [False, True, True, False]
    np.testing.assert_allclose(rows.judged.surety, [0.1, 0.1, 0.7, 0.01])
    assert card(rows, 0)["lines"] == [("", "a", None), ("nearest:", "b", 0.1)]
    assert card(rows, 1)["lines"] == [("", "b", None), ("is:", "a", 0.4)]
    assert card(rows, 2)["lines"] == [("", "a, b", None), ("is not:", "b", 0.9)]
    bins = reliability(rows)
    assert sum(one["n"] for one in bins) == 7  # the unknown one counts nowhere
    assert sum(one["n"] * one["accuracy"] for one in bins) == 4
    assert TASKS["multilabel"].kinds(np.array([[1, 1], [1, 0], [0, 0]], np.uint8), ("a", "b"))[0].tolist() == [1, 0, 2]


def test_numbers_are_judged_in_units_of_their_deviation() -> None:
    y = np.array([[1.0, 0], [3, 100], [5, np.nan]])
    values = np.array([[1.0, 50], [3, 100], [9, 7]])
    rows = Rows(("x/0", "x/1", "x/2"), (b"",) * 3, y, values, ("a", "b"), TASKS["regression"])
    np.testing.assert_allclose(rows.judged.surety, [0.5, 0, 4 / np.sqrt(8 / 3)])
    assert rows.judged.wrong.tolist() == [False, False, True]
    assert card(rows, 2)["correct"] is None
    assert card(rows, 2)["lines"] == [("a:", "9, is 5", None), ("b:", "7", None)]
    assert reliability(rows) == []
    (name, true, predicted), _ = TASKS["regression"].pairs(values, y, ("a", "b"))
    assert (name, true.tolist(), predicted.tolist()) == ("a", [1, 3, 5], [1, 3, 9])


@pytest.mark.slow
@pytest.mark.parametrize("task", TARGETS)
def test_the_commands_name_the_task(made: dict[str, Any], task: str) -> None:
    words = shlex.split(commands(chosen(made, task))[0])
    assert words[words.index("--task") + 1] == task
    assert words[words.index("--target") + 1] == TARGETS[task]


@pytest.mark.slow
def test_it_reads_well_in_a_browser(made: dict[str, Any], tmp_path: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    kept = Path(os.environ.get("BOTTLENECK_SCREENSHOTS") or tmp_path)
    with chromium("the report of labels and numbers") as launched:
        for width, scheme in ((400, "dark"), (1600, "light")):
            page = launched.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
            said: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.goto((made["folder"] / "report.html").as_uri())
            page.screenshot(path=kept / f"report-tasks-{width}-{scheme}.png", full_page=True)
            page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = Axe().run(page).response["violations"]
            assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
        facts = [json.loads(one) for one in page.locator("figure.maps script").all_text_contents()]
        for number, tip in enumerate(page.locator("figure.maps .tip").all()):
            page.locator("figure.maps").nth(number).locator("svg.map").first.focus()
            page.keyboard.press("ArrowRight")
            first, *_, file = tip.inner_text().split("\n")
            assert {one["file"]: one["said"].split("\n")[0] for one in facts[number]["images"]}[file] == first
        labels = page.locator("[data-part$=-scores] table").first
        labels.locator("thead button", has_text="Threshold").click()
        values = labels.evaluate("(table) => [...table.tBodies[0].rows].map((row) => Number(row.cells[4].dataset.v))")
        assert values == sorted(values)
        assert said == []
