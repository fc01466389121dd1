"""The documentation site: built without a warning, no broken link, nothing from another host, searched and read in a browser."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from helpers import ROOT, chromium, folder_served

import features
import pipeline

pytestmark = pytest.mark.slow
READ = ("", "features/FORMAT/", "pipeline/", "reference/features/", "tests/benchmarks/")


class Page(HTMLParser):
    """What a page names: its anchors, links, and what it loads; and the text of its paragraphs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.paragraphs: list[str] = []
        self.headings: list[str] = []
        self.inside = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") != "canonical" and "href" in given:
            self.loaded.append(given["href"])
        elif "src" in given:
            self.loaded.append(given["src"])
        if tag in ("p", "h2"):
            self.inside = tag
            (self.paragraphs if tag == "p" else self.headings).append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside:
            (self.paragraphs if self.inside == "p" else self.headings)[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        [sys.executable, str(ROOT / ".docs" / "build.py"), str(folder)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_of_the_project_is_there(site: Path, pages: dict[Path, Page]) -> None:
    written = [
        path for path in ROOT.rglob("*.md") if path.parts[len(ROOT.parts)] in ("features", "pipeline", ".github")
    ]
    assert len(written) > 8
    for path in written:
        name = path.relative_to(ROOT).with_suffix("")
        assert (site / (name.parent if name.name == "README" else name) / "index.html") in pages, path


def test_no_link_is_broken_and_nothing_comes_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links start at the root of the host
        for link in page.loaded:
            assert "//" not in link, f"{path}: {link}"
        for link in [*page.links, *page.loaded]:
            if link.startswith(("http://", "https://")):
                continue
            file, anchor = urldefrag(unquote(link).partition("?")[0])
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site.resolve()), f"{path}: {link}"
            assert target.exists(), f"{path}: {link}"
            assert not anchor or anchor in pages[target].anchors, f"{path}: {link}"
            checked += 1
    assert checked > 200


def test_markdown_is_read_as_it_was_meant(pages: dict[Path, Page]) -> None:
    """A list or a table that begins without an empty line would become a part of the paragraph."""
    for path, page in pages.items():
        for text in page.paragraphs:
            for line in text.splitlines()[1:]:
                assert not line.lstrip().startswith(("- ", "| ", "```", "1. ")), f"{path}: {text}"


@pytest.mark.parametrize("package", [features, pipeline])
def test_the_reference_has_every_public_name(site: Path, pages: dict[Path, Page], package: object) -> None:
    page = pages[site / "reference" / package.__name__ / "index.html"]  # type: ignore[attr-defined]
    assert [heading.strip("¶") for heading in page.headings] == sorted(package.__all__)  # type: ignore[attr-defined]


def test_it_reads_well_on_a_telephone_and_is_searched(site: Path, tmp_path: Path) -> None:
    with folder_served(site) as port, chromium("the documentation") as browser:
        address = f"http://127.0.0.1:{port}/"
        page = browser.new_page(viewport={"width": 400, "height": 800})
        asked: list[str] = []
        trouble: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        # One that is under way when the page is left is no trouble.
        page.on("requestfailed", lambda request: request.failure == "net::ERR_ABORTED" or trouble.append(request.url))
        for name in READ:
            page.goto(address + name)
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
            page.screenshot(path=str(tmp_path / f"{name.strip('/').replace('/', '-') or 'start'}.png"))
        page.set_viewport_size({"width": 1200, "height": 800})
        page.goto(address)
        page.locator(".md-search__input").click()
        page.locator(".md-search__input").press_sequentially("quarantine")
        page.locator('.md-search-result__link[href*="/features/"]').first.wait_for()  # after those of the first letters
        assert all(url.startswith((address, "data:", "blob:")) for url in asked)
        assert trouble == []
