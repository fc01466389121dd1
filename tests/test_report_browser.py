"""The report of real runs in a real browser: Chromium, narrow and wide, light and dark, by mouse and by keyboard.

Screenshots are kept in the folder that BOTTLENECK_SCREENSHOTS names, else in pytest's own.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import call_pipeline, chromium

pytestmark = pytest.mark.slow

HOSTILE_CLASS = '"><script>window.hacked=1</script>'
HOSTILE_COLUMN = "<b>light"
HOSTILE_FILE = "<img src=x onerror=window.hacked=1>.jpg"
ANSWERS = ("--abstain-precision", "0.6", "--by", HOSTILE_COLUMN)
SIZE = ("--image-size", "96", "--split", "stratified:0.5,0.5")


@pytest.fixture(scope="module")
def made(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of some cats and dogs and of some flowers, by the command line, and their report."""
    folder = tmp_path_factory.mktemp("browser")
    for name in ("cats", "dogs"):
        target = folder / "cats-dogs" / name
        target.mkdir(parents=True)
        for image in sorted((assets / "images/cats_and_dogs_filtered/validation" / name).iterdir())[:50]:
            shutil.copy(image, target)
    (folder / "cats-dogs" / "cats" / HOSTILE_FILE).write_bytes(image.read_bytes())
    (folder / "cats-dogs" / "dogs" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    with open(folder / "flowers <i>17.csv", "w", newline="", encoding="utf-8") as stream:
        lines = csv.writer(stream)
        lines.writerow(["path", "label", HOSTILE_COLUMN])
        for name in ("bluebell", "daisy", "iris", "pansy", "tigerlily", "tulip"):
            label = HOSTILE_CLASS if name == "tulip" else name
            for number, image in enumerate(sorted((assets / "images/flowers17" / name).iterdir())[:10]):
                lines.writerow([image, label, ("day", HOSTILE_CLASS)[number % 2]])
    weights = ("--weights", assets / "weights/mobilenet_v2_1.0_224_no_top.weights.h5")
    for source, store in (("cats-dogs", "cats.h5"), ("flowers <i>17.csv", "flowers.h5")):
        result = call_pipeline("extract", folder / source, "--out", folder / store, *weights, *SIZE)
        assert result.returncode == 0, result.stderr
    for store, *arguments in (
        ("cats.h5", "--head", "knn"),
        ("cats.h5", "--head", "logistic", "--param", "C=0.01", "--seed", "3", "--folds", "3"),
        ("flowers.h5", "--head", "dropout-linear", "--param", "epochs=8"),
        ("flowers.h5", "--head", "knn", "--param", "n_neighbors=5", *ANSWERS),
        ("flowers.h5", "--head", "ridge", "--param", "alpha=100", *ANSWERS),
    ):
        result = call_pipeline("train-head", folder / store, *arguments, "--runs", folder / "runs")
        assert result.returncode == 0, result.stderr
    result = call_pipeline("report", folder / "runs", "--out", folder / "report.html", "--json")
    assert result.returncode == 0, result.stderr
    return {"folder": folder, "document": json.loads(result.stdout)}


@pytest.fixture(scope="module")
def browser(made: dict[str, Any]) -> Iterator[Any]:
    with chromium("the report") as launched:
        yield launched


@pytest.fixture
def page(browser: Any, made: dict[str, Any]) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1600, "height": 1000})
    opened.goto((made["folder"] / "report.html").as_uri())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("BOTTLENECK_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_answers_and_groups_are_told(page: Any, made: dict[str, Any], screenshots: Path) -> None:
    """The figures of the page are those of metrics.json, and a column's name and values are text."""
    chosen = next(group["chosen"] for group in made["document"]["groups"] if group["name"].startswith("flowers"))
    metrics = json.loads((made["folder"] / "runs" / chosen / "metrics.json").read_text())
    abstain, (table,) = metrics["answers"]["abstain"], metrics["groups"]["validation"].values()
    panel = page.locator("[data-part$=-answers]")
    panel.screenshot(path=screenshots / "report-answers.png")
    assert f"{abstain['answered']} of {abstain['n']} validation images answered" in panel.inner_text()
    assert panel.locator(".figure").inner_text() == f"{abstain['coverage']:.4f}"
    groups = page.locator("[data-part$=-groups]")
    groups.screenshot(path=screenshots / "report-groups.png")
    assert f"By {HOSTILE_COLUMN}, validation images" in groups.inner_text()
    shown = {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in groups.locator("tbody tr").all()
    }
    assert shown.keys() == {"day", HOSTILE_CLASS}
    for line in table:
        assert shown[line["value"]][0] == f"{line['accuracy']:.4f}"
        assert shown[line["value"]][2:] == [str(line["right"]), str(line["n"])]
    assert page.evaluate("window.hacked") is None


def test_without_script_it_says_nothing_of_what_would_not_work(browser: Any, made: dict[str, Any]) -> None:
    context = browser.new_context(viewport={"width": 320, "height": 800}, java_script_enabled=False)
    page = context.new_page()
    page.goto((made["folder"] / "report.html").as_uri())
    text = page.inner_text("main")
    assert "Click a heading" not in text
    assert "use the arrow keys" not in text
    assert page.locator(".board tbody tr").count() == 5
    assert page.locator(".card img").first.bounding_box()["width"] > 100  # two to a row
    context.close()


def test_on_paper_it_is_pale_and_nothing_is_cut_off(browser: Any, made: dict[str, Any], screenshots: Path) -> None:
    page = browser.new_page(viewport={"width": 760, "height": 1000}, color_scheme="dark")
    page.goto((made["folder"] / "report.html").as_uri())
    page.emulate_media(media="print")
    page.screenshot(path=screenshots / "report-print.png", full_page=True)
    colour = page.evaluate("getComputedStyle(document.querySelector('h1')).color")
    assert max(map(int, re.findall(r"\d+", colour)[:3])) < 90
    assert page.evaluate("document.documentElement.scrollWidth") <= 760
    # white numbers on blue would vanish where the browser leaves backgrounds out
    assert page.evaluate("getComputedStyle(document.querySelector('.matrix td')).printColorAdjust") == "exact"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_reads_well_and_is_quiet(
    browser: Any, made: dict[str, Any], screenshots: Path, width: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    address = (made["folder"] / "report.html").as_uri()
    page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_load_state("networkidle")
    page.screenshot(path=screenshots / f"report-{width}-{scheme}.png", full_page=True)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found] == []
    assert said == []
    assert [url for url in asked if url != address and not url.startswith("data:")] == []
    assert page.evaluate("[window.hacked, document.title]") == [None, "Runs compared"]
    page.close()


def test_hostile_names_are_shown_and_do_not_run(page: Any) -> None:
    shown = page.locator("main").inner_text()
    assert HOSTILE_CLASS in shown
    assert "flowers <i>17.csv" in shown
    assert page.locator("h2 i").count() == 0
    data = page.evaluate("[...document.querySelectorAll('script[type]')].map((one) => JSON.parse(one.textContent))")
    assert HOSTILE_CLASS in data[1]["classes"]
    for number in range(len(data[1]["images"])):  # every tip once, as that is where script writes text
        page.locator("svg.map").nth(2).locator(f"use[data-i='{number}']").dispatch_event("pointermove")
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 3
    # An injected script is refused by the page's policy, whatever the escaping does.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hacked=1>')")
    page.evaluate(
        "const s = document.createElement('script'); s.textContent = 'window.hacked=1'; document.body.append(s)"
    )
    page.wait_for_timeout(50)
    assert page.evaluate("window.hacked") is None


def column(page: Any, table: Any, number: int) -> list[str]:
    return table.evaluate("(table, k) => [...table.tBodies[0].rows].map((row) => row.cells[k].dataset.v)", number)


def test_tables_are_sorted_by_mouse_and_keyboard(page: Any) -> None:
    board = page.locator("#g2-board-table")
    start = [float(value) for value in column(page, board, 1)]
    assert start == sorted(start, reverse=True)
    accuracy, loss = (board.locator("thead button", has_text=name) for name in ("Accuracy", "Log loss"))
    heading = loss.locator("xpath=..")
    assert (accuracy.locator("xpath=..").get_attribute("aria-sort"), heading.get_attribute("aria-sort")) == (
        "descending",
        "none",
    )
    loss.click()
    losses = [float(value) for value in column(page, board, 4)]
    assert losses == sorted(losses)
    assert heading.get_attribute("aria-sort") == "ascending"
    assert accuracy.locator("xpath=..").get_attribute("aria-sort") == "none"
    assert page.locator("#announce").inner_text() == "Sorted by Log loss, ascending."
    # By keyboard: focus goes to the button by Tab, Enter and Space press it.
    head = board.locator("thead button", has_text="Head")
    head.focus()
    page.keyboard.press("Enter")
    names = column(page, board, 0)
    assert names == sorted(names)
    page.keyboard.press("Space")
    assert column(page, board, 0) == sorted(names, reverse=True)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Accuracy"
    page.keyboard.press("Enter")
    assert [float(value) for value in column(page, board, 1)] == start
    # A head without a count of parameters has an empty cell, which comes last either way.
    parameters = board.locator("thead button", has_text="Parameters")
    for _ in range(2):
        parameters.click()
        assert column(page, board, 9)[-1] == ""


def test_the_map_is_read_by_mouse_and_keyboard(page: Any, screenshots: Path) -> None:
    figure, tip = page.locator("figure.maps").first, page.locator("figure.maps .tip").first
    facts = json.loads(figure.locator("script").text_content())
    assert tip.is_hidden()
    chart = figure.locator("svg.map").first
    chart.scroll_into_view_if_needed()
    point = chart.locator("use").nth(20)
    number = int(point.get_attribute("data-i"))
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible()
    fact = facts["images"][number]
    text = tip.inner_text()
    assert fact["file"] in text
    assert facts["classes"][fact["label"]] in text
    assert f"confidence {fact['confidence']:.3f}" in text
    picture = tip.locator("img")
    assert picture.get_attribute("alt") == fact["file"]
    across, tile = (int(figure.get_attribute(f"data-{name}")) for name in ("across", "tile"))
    place = picture.evaluate("(image) => [parseInt(image.style.left), parseInt(image.style.top)]")
    assert place == [-(fact["tile"] % across) * tile, -(fact["tile"] // across) * tile]
    assert figure.locator(".cursor[visibility=visible]").count() == 2
    page.screenshot(path=screenshots / "report-hover.png")
    page.mouse.move(2, 2)
    assert tip.is_hidden()
    seen = set()
    chart.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
        assert tip.is_visible()
        seen.add(tip.inner_text())
    assert len(seen) >= 3
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_counts_and_rates_and_details_work_by_keyboard(page: Any, made: dict[str, Any]) -> None:
    block = page.locator(".matrix-block").first
    cell = block.locator("td").first
    count = int(cell.locator(".c").inner_text())
    block.locator("input").first.focus()
    page.keyboard.press("ArrowRight")
    assert cell.locator(".c").is_hidden()
    images = int(block.locator("tbody tr").first.locator("td.num").inner_text())
    assert cell.locator(".r").inner_text() == f"{100 * count / images:.1f}"
    page.keyboard.press("ArrowLeft")
    assert cell.locator(".r").is_hidden()
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.evaluate("(one) => one.open")


def test_the_skip_link_is_the_first_stop(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


def test_the_report_says_what_the_runs_say(page: Any, made: dict[str, Any]) -> None:
    groups = made["document"]["groups"]
    assert [(group["name"], group["runs"]) for group in groups] == [("cats-dogs", 2), ("flowers <i>17.csv", 3)]
    assert "torn.jpg" in page.locator("section[data-part='g1-data']").inner_text()
    for number, group in enumerate(groups, 1):
        metrics = json.loads((made["folder"] / "runs" / group["chosen"] / "metrics.json").read_text())
        tiles = page.locator(f"section[data-part='g{number}-run'] .tile")
        shown = {tile.locator("dt").inner_text(): tile.locator(".figure").inner_text() for tile in tiles.all()}
        scores = metrics["validation"]
        assert shown["Accuracy"] == f"{scores['accuracy']:.4f}"
        assert shown["Calibration error"] == f"{scores['ece']:.4f}"
        rows = page.locator(f"section[data-part='g{number}-classes'] tbody tr")
        counted = rows.evaluate_all("(rows) => rows.map((row) => Number(row.cells[4].dataset.v))")
        assert sum(counted) == scores["n"]


def test_the_commands_in_the_report_make_the_same_runs(page: Any, made: dict[str, Any]) -> None:
    """Typed as they stand they find everything done: the same recipe, splits and run ids."""
    for number in range(1, len(made["document"]["groups"]) + 1):
        lines = page.locator(f"section[data-part='g{number}-again'] pre").inner_text().strip().splitlines()
        extract, train = (shlex.split(line)[1:] for line in lines)
        again = call_pipeline(*extract)
        assert re.search(r"nothing to do: \d+ rows cached", again.stdout), again.stdout + again.stderr
        result = call_pipeline(*train, "--json")
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        cached = answer["cached"] if "run" in answer else answer["trained"] == 0
        assert cached, answer
