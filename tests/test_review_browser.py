"""The review in a real browser: Chromium, by keyboard, killed, in two tabs, with 50,000 images, light and dark, attacked.

Screenshots are kept in the folder that BOTTLENECK_SCREENSHOTS names, else nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, STRESS, chromium, folder_served, rounds
from reviewing import TRAIN, VALIDATION, painted_store, two_classes, written_store

from features.store.reader import FeatureStore
from pipeline.labels.file import read_labels
from pipeline.review.server import Review

pytestmark = pytest.mark.slow

HOSTILE_CLASS = '"><img src=x onerror=window.hacked=1>'
HOSTILE_FILE = "<svg onload=window.hacked=1>.png"
SCREENS = [(width, scheme) for width in (400, 1000, 1600) for scheme in ("light", "dark")]
SCREENS = SCREENS if STRESS or os.environ.get("BOTTLENECK_SCREENSHOTS") else [(400, "dark"), (1600, "light")]
DECISIONS = max(40, rounds(200))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium("the page") as launched:
        yield launched


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """3,000 rows, 240 of them with a painted image, a tenth of the training labels wrong; hostile names of class, file, group."""
    rows, generator = 3000, np.random.default_rng(0)
    truth, X = two_classes(rows, columns=96)
    X[:, 0] -= 6 * truth
    splits = np.where(np.arange(rows) < 2400, TRAIN, VALIDATION)
    wrong = (splits == TRAIN) & (generator.random(rows) < 0.1)
    folder = tmp_path_factory.mktemp("reviewed")
    few = painted_store(folder, truth[:240], splits[:240], X[:240, :1])
    (folder / "photos" / few.images.paths[0]).rename(folder / "photos" / HOSTILE_FILE)
    sha256 = generator.integers(0, 256, (rows, 32), np.uint8)
    sha256[:240] = few.images.sha256
    return written_store(
        folder / "reviewed.h5",
        np.where(wrong, 1 - truth, truth),
        splits,
        X,
        names=(HOSTILE_CLASS, "dog"),
        source=str(folder / "photos"),
        paths=(HOSTILE_FILE, *few.images.paths[1:], *(f"gone/{row}.png" for row in range(240, rows))),
        sha256=sha256,
        groups=tuple(HOSTILE_CLASS if row % 100 == 0 else f"group {row}" for row in range(rows)),
    )


class Server:
    """``bottleneck review`` as a process of its own."""

    def __init__(self, store: Path, labels: Path, port: int = 0) -> None:
        self.labels = labels
        arguments = [sys.executable, "-m", "pipeline", "review", str(store), "--labels", str(labels), "--json"]
        self._process = subprocess.Popen(
            [*arguments, "--port", str(port), "--by", "tester"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        text = ""
        assert self._process.stdout is not None
        while not text.rstrip().endswith("}"):
            line = self._process.stdout.readline()
            assert line, "the server ended"
            text += line
        self.address = json.loads(text)["address"]
        self.origin, _, self.start = self.address.partition("/start")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def interrupt(self) -> int:
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(timeout=20)

    def decisions(self) -> int:
        return len(read_labels(self.labels)) if self.labels.exists() else 0


@pytest.fixture(scope="module")
def server(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(store.path, tmp_path_factory.mktemp("labels") / "labels.csv")
    yield made
    assert made.interrupt() == 0


@contextlib.contextmanager
def opened(browser: Any, address: str, *, learned: bool = True, **options: Any) -> Iterator[Any]:
    """A page in a context of its own, and nothing in its console but what the browser says of pictures that are gone."""
    context = browser.new_context(**{"viewport": {"width": 1600, "height": 1000}, **options})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#grid .tile")
    if learned:
        page.wait_for_selector("#learning[data-status=ready]", state="attached")
    yield page
    context.close()
    assert [text for text in said if not text.startswith("Failed to load resource")] == []


def until(page: Any, expression: str, seconds: float = 120) -> None:
    """Wait until an expression is true; the page's policy forbids what `page.wait_for_function` does."""
    ends = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < ends, f"never became true: {expression}"
        page.wait_for_timeout(20)


def settle(page: Any) -> None:
    """Wait until nothing is left to save."""
    until(page, "!document.querySelector('#saved').dataset.busy")


def test_twenty_images_by_keyboard_alone_and_the_head_learns_at_once(browser: Any, server: Server) -> None:
    with opened(browser, server.address) as page:
        page.wait_for_timeout(800)  # the order of the first ranking
        trained = int(page.get_attribute("#learning", "data-trained"))
        before = server.decisions()
        keys = ["1", "2", "k", "u", "x", "ArrowRight", "Shift+ArrowRight", "2"]
        for number in range(20):
            page.keyboard.press(keys[number % 5])
        settle(page)
        decided = time.monotonic()
        until(
            page,
            f"Number(document.querySelector('#learning').dataset.trained) > {trained}"
            " && document.querySelector('#learning').dataset.status === 'ready'",
            20,
        )
        seconds = time.monotonic() - decided
        assert server.decisions() == before + 20
        assert page.get_attribute("#saved", "data-saved") == "20"
        shown = float(page.inner_text("#learning").split()[2])
        print(f"retraining seen {seconds:.2f} s after the last decision was saved; fitting took {shown} s")
        assert shown < 2
        assert seconds < 10  # 2 on an idle machine: tests/benchmarks; here others work too
        assert page.locator("#changes .change").count() == 2
        assert page.locator("#curve svg").count() == 1
        # several at once, and back
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+ArrowRight")
        assert page.inner_text("#chosen") == "3 selected"
        page.keyboard.press("x")
        settle(page)
        assert server.decisions() == before + 23
        page.keyboard.press("z")
        settle(page)
        assert server.decisions() == before + 26
        assert "taken back" in page.inner_text("#said")
        # a new class, by name
        page.keyboard.press("c")
        page.keyboard.type("bird")
        page.keyboard.press("Enter")
        settle(page)
        assert page.locator("#given button", has_text="bird").count() == 1
        page.keyboard.press("z")
        settle(page)
        # closely, and similar ones
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        page.wait_for_selector("#probable li")
        page.keyboard.press("s")
        until(page, "document.querySelector('[name=by]').value === 'similar'")
        assert page.evaluate("document.activeElement.id") == "grid"
        page.keyboard.press("/")
        page.keyboard.type("00012")
        until(page, "document.querySelector('#count').textContent.startsWith('1 image')")


def test_two_tabs_see_each_other_and_reopening_goes_on(browser: Any, server: Server) -> None:
    with opened(browser, server.address) as first, opened(browser, server.address) as second:
        before = server.decisions()
        for page in (first, second):
            for name, value in (("by", "file"), ("state", "")):
                with page.expect_response(lambda answer: "/order?" in answer.url):
                    page.select_option(f"[name={name}]", value)
            until(page, "document.getElementById('t0')?.title.includes('svg onload')")
            page.wait_for_timeout(300)  # all filters show it first: the last answer is drawn in this time
            page.focus("#grid")
        for _ in range(5):
            first.keyboard.press("k")
            second.keyboard.press("x")  # the same images
        for page in (first, second):
            settle(page)
        assert server.decisions() == before + 10
        states = "[...document.querySelectorAll('.tile')].filter((one) => Number(one.dataset.place) < 5).map((one) => one.dataset.state).join()"
        until(first, f"{states} !== ''")
        ends = time.monotonic() + 120
        while first.evaluate(states) != second.evaluate(states):
            assert time.monotonic() < ends, (first.evaluate(states), second.evaluate(states))
            second.wait_for_timeout(20)
    with opened(browser, server.address) as page:
        page.select_option("[name=state]", "decided")
        until(page, "Number(document.querySelector('#count').textContent.split(' ')[0]) < 100")
        assert int(page.inner_text("#count").split()[0]) >= 5
        page.click("#undo")
        settle(page)
        assert server.decisions() == before + 11


def test_killed_in_the_middle_nothing_shown_as_saved_is_lost(browser: Any, store: FeatureStore, tmp_path: Path) -> None:
    killed = Server(store.path, tmp_path / "labels.csv")
    with opened(browser, killed.address, learned=False) as page:
        until(page, "document.activeElement.id === 'grid'")
        for number in range(DECISIONS):
            page.keyboard.press("u")
            if number == DECISIONS // 2:
                until(page, "Number(document.getElementById('saved').dataset.saved) > 0")
                killed.kill()
        page.wait_for_selector("#trouble:not([hidden])")
        shown = int(page.get_attribute("#saved", "data-saved"))
        assert killed.decisions() >= shown
        assert shown > 0
        assert "not saved" in page.inner_text("#trouble")
        left = DECISIONS - shown
        assert f"{left:,}" in page.inner_text("#saved .long")
        page.on("dialog", lambda dialog: dialog.accept())


def test_fifty_thousand_images_are_light(browser: Any, tmp_path: Path) -> None:
    rows = 50_000
    truth, X = two_classes(rows, columns=8)
    made = written_store(
        tmp_path / "many.h5", truth, np.where(np.arange(rows) % 5, TRAIN, VALIDATION), X, names=("cat", "dog"),
        source=str(tmp_path / "nowhere"), paths=tuple(f"{row:05d}.jpg" for row in range(rows)),
        sha256=np.random.default_rng(0).integers(0, 256, (rows, 32), np.uint8),
    )  # fmt: skip
    many = Review(made, tmp_path / "labels.csv", images=[], port=0)
    thread = threading.Thread(target=many.serve)
    thread.start()
    try:
        with opened(browser, many.address) as page:
            page.wait_for_timeout(500)
            page.evaluate(
                "() => { window.long = []; new PerformanceObserver((list) => { for (const one of list.getEntries()) "
                "window.long.push(one.duration); }).observe({ type: 'longtask' }); }"
            )
            protocol = page.context.new_cdp_session(page)
            protocol.send("Performance.enable")

            def worked() -> float:
                """Processor seconds of the page's main thread so far: other programs do not count."""
                return next(
                    one["value"]
                    for one in protocol.send("Performance.getMetrics")["metrics"]
                    if one["name"] == "ThreadTime"
                )

            most, busiest = 0, 0.0
            for key in (
                "End",
                "Home",
                *["PageDown"] * 6,
                *["ArrowDown"] * 6,
                "k",
                "2",
                "r",
                "scroll",
                "scroll",
                "scroll",
            ):
                before = worked()
                if key == "scroll":
                    page.evaluate("document.querySelector('#grid').scrollTop = 1e6 * Math.random()")
                else:
                    page.keyboard.press(key)
                page.wait_for_timeout(25)
                busiest = max(busiest, worked() - before)
                most = max(most, page.evaluate("document.querySelectorAll('#grid *').length"))
            longest = max(page.evaluate("window.long"), default=0)
            print(
                f"{most} nodes in the grid, longest task {longest:.0f} ms, most work of one key {1000 * busiest:.0f} ms"
            )
            assert most <= 300
            assert page.locator("#count").inner_text() == "50,000 images" or "49,99" in page.inner_text("#count")
            assert longest < 100 or busiest < 0.1
    finally:
        many.stop()
        thread.join()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_it_reads_well_and_is_quiet(browser: Any, server: Server, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    folder = os.environ.get("BOTTLENECK_SCREENSHOTS")
    asked: list[str] = []
    with opened(browser, server.address, viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        page.on("request", lambda request: asked.append(request.url))

        def check(name: str) -> None:
            if folder:
                page.wait_for_timeout(400)
                page.screenshot(path=Path(folder) / f"review-{name}-{width}-{scheme}.png")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = Axe().run(page).response["violations"]
            assert [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found] == [], name

        page.select_option("[name=state]", "") if width > 400 else None
        page.wait_for_timeout(300)
        check("grid")
        for button in ("#show-panel", "#show-filters"):
            if page.is_visible(button):
                page.click(button)
                check(button[6:])
                page.click(button)
        page.focus("#grid")
        for key, name in (("Enter", "zoom"), ("c", "picker"), ("?", "help")):
            page.keyboard.press(key)
            page.wait_for_selector("dialog[open]")
            check(name)
            page.keyboard.press("Escape")
        assert [url for url in asked if not url.startswith(server.origin)] == []


def test_charts_keep_their_size_where_the_panel_is_wide(browser: Any, server: Server) -> None:
    with opened(browser, server.address, viewport={"width": 1000, "height": 900}) as page:
        page.click("#show-panel")
        widths = page.evaluate(
            "[...document.querySelectorAll('#panel svg')].map((one) => one.getBoundingClientRect().width)"
        )
        assert widths
        assert all(250 < width <= 384 for width in widths), widths
        assert page.evaluate("document.documentElement.scrollWidth") <= 1000
        if folder := os.environ.get("BOTTLENECK_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "review-wide-panel-1000.png")


def test_without_script_a_plain_page_says_so(browser: Any, server: Server) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800}, java_script_enabled=False)
    page = context.new_page()
    page.goto(server.address)
    assert "needs JavaScript" in page.inner_text("main.plain")
    assert page.locator("#app").is_hidden()
    context.close()


ATTACK = """async (place) => {
  const tried = {};
  const attempt = async (name, work) => { try { tried[name] = await work(); } catch (error) { tried[name] = 'refused'; } };
  const send = (mode, headers) => fetch(place + 'decide', { method: 'POST', mode, credentials: 'include', headers, body: '{"rows":[0],"value":"cat"}' });
  await attempt('read', async () => (await fetch(place + 'state', { credentials: 'include' })).status);
  await attempt('simple', async () => (await send('no-cors', { 'Content-Type': 'text/plain' })).type);
  await attempt('json', async () => (await send('cors', { 'Content-Type': 'application/json', 'X-Review-Token': 'x' })).status);
  await attempt('picture', () => new Promise((resolve, reject) => {
    const image = new Image(); image.onload = () => resolve('shown'); image.onerror = reject; image.src = place + 'picture/0/small'; }));
  await attempt('frame', () => new Promise((resolve) => {
    const frame = document.createElement('iframe'); frame.src = place; document.body.append(frame);
    setTimeout(() => { try { resolve(frame.contentDocument === null ? 'closed' : 'blank'); } catch { resolve('closed'); } }, 500); }));
  return tried;
}"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_another_page_of_this_machine_reads_and_writes_nothing(
    browser: Any, store: FeatureStore, server: Server, tmp_path: Path, host: str
) -> None:
    """From another port, and from another site: even if it knew the secret path of the page, and the browser the cookie."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.address)
    page.wait_for_selector("#grid .tile")
    place, before = page.url, server.decisions()
    (tmp_path / "index.html").write_text("<!doctype html><title>other</title>")
    with folder_served(tmp_path) as port:
        attacker = context.new_page()
        attacker.goto(f"http://{host}:{port}/")
        tried = attacker.evaluate(ATTACK, place)
        assert [tried[name] for name in ("read", "json", "picture")] == ["refused"] * 3
        assert tried["simple"] in ("opaque", "refused")  # nobody can read the answer, and it says 403
        assert tried["frame"] == "closed"
    assert server.decisions() == before
    context.close()


def test_a_name_that_resolves_to_this_machine_is_refused(browser: Any, server: Server) -> None:
    address = server.address.replace("127.0.0.1", "rebound.localhost")  # browsers resolve it to the loopback address
    context = browser.new_context()
    page = context.new_page()
    answer = page.goto(address)
    assert answer.status == 421
    context.close()


def test_of_two_orders_the_one_that_was_asked_for_last_is_shown(browser: Any, server: Server) -> None:
    """Whichever answer comes last."""
    with opened(browser, server.address) as page:
        held: list[Any] = []
        page.route("**/order?*", lambda route: route.continue_() if held else held.append(route))
        before = page.inner_text("#count")
        page.select_option("[name=split]", "validation")
        page.select_option("[name=split]", "train")
        until(page, f"document.getElementById('count').textContent !== {before!r}")
        shown = page.inner_text("#count")
        with page.expect_response("**/order?*"):
            held[0].continue_()
        page.wait_for_timeout(300)
        assert page.inner_text("#count") == shown


def test_script_in_names_is_text(browser: Any, server: Server) -> None:
    with opened(browser, server.address) as page:
        page.select_option("[name=state]", "")
        page.select_option("[name=by]", "file")
        until(page, "document.getElementById('t0')?.title.includes('svg onload')")
        page.focus("#grid")
        page.keyboard.press("1")
        page.keyboard.press("c")
        page.keyboard.type("<b onclick=window.hacked=1>new")
        page.keyboard.press("Enter")
        settle(page)
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        page.wait_for_selector("#probable li")
        assert page.inner_text("#zoom-name") == HOSTILE_FILE
        assert page.evaluate("window.hacked") is None
        assert page.locator("img[onerror], svg[onload], [onclick], script:not([src])").count() == 0
        assert HOSTILE_CLASS in page.inner_text("#given")
        assert HOSTILE_CLASS in page.inner_text("[name=group]")
