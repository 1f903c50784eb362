"""The site: it builds without a warning, every link in it leads somewhere, and it asks nothing of the network."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser_kit import CHROMIUM, needs_browser

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` writes."""
    folder = tmp_path_factory.mktemp("site")
    words = ["-W", "--keep-going", "-q", "-c", "docs", "-b", "html", "-d", folder / "doctrees", ".", folder / "html"]
    built = subprocess.run([sys.executable, "-m", "sphinx", *words], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "html"


FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "embed": "src", "object": "data"}
"""The attribute by which a tag has the browser fetch something."""


class Document(HTMLParser):
    """What a page of the site names: its anchors, what it links to, and what a browser fetches to show it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("next", "prev", "index", "search", "canonical"):
            self.fetched.append(given["href"])
        if given.get(FETCHED.get(tag, "")):
            self.fetched.append(given[FETCHED[tag]])


@cache
def read(page: Path) -> Document:
    return Document(page.read_text(encoding="utf-8"))


def test_every_page_is_there(site: Path) -> None:
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert {page.stem for page in (site / "docs").glob("*.html")} == pages
    assert {"README.html", "CONTRIBUTING.html", "CHANGELOG.html"} <= {page.name for page in site.iterdir()}
    front = (site / "index.html").read_text(encoding="utf-8")
    assert "docs/index.html" in front


def test_links_lead_somewhere(site: Path) -> None:
    broken, seen = [], 0
    for page in site.rglob("*.html"):
        for link in read(page).links:
            parts = urlsplit(link)
            if parts.scheme or link in ("", "#"):
                continue
            seen += 1
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            known = target.is_file() and (not parts.fragment or unquote(parts.fragment) in read(target).anchors)
            if not known:
                broken.append(f"{page.relative_to(site)}: {link}")
    assert seen > 1000
    assert not broken, "\n".join(broken)


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    fetched = [(page, address) for page in pages for address in read(page).fetched]
    assert len(fetched) > len(pages)
    assert [(page.name, address) for page, address in fetched if urlsplit(address).netloc] == []
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.findall(r"@import|url\(\s*[\"']?(?:https?:)?//", text), sheet.name
    scripts = {script.name: script.read_text(encoding="utf-8") for script in site.rglob("*.js")}
    asks = re.compile(r"(?:fetch|importScripts|import|open)\(\s*[\"'`](?:https?:)?//")
    assert [name for name, text in scripts.items() if asks.search(text)] == []


WIDEST = """
Math.max(document.documentElement.scrollWidth, ...[...document.querySelectorAll("article *")]
  .filter(one => !one.closest(".table-wrapper, pre"))
  .map(one => one.getBoundingClientRect().right))
"""
"""Pixels that the page takes: tables and listings scroll by themselves where they are wider."""


@needs_browser
def test_pages_fit_on_a_phone_and_ask_for_nothing(site: Path) -> None:
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    wide = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        for name in (
            "docs/index",
            "docs/configuration",
            "docs/commands",
            "docs/api",
            "docs/tutorial-clinic",
            "genindex",
        ):
            page.goto((site / f"{name}.html").as_uri())
            assert page.inner_text("h1").strip()
            if (width := page.evaluate(WIDEST)) > 400.5:
                wide[name] = width
        browser.close()
    assert wide == {}
    assert len(asked) > 20
    assert [address for address in asked if not address.startswith("file:")] == []
