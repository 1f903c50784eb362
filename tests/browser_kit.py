"""A real browser for the pages EyeTune writes: headless Chromium takes a picture; no test needs one to be there."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), "")

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (Debian: apt-get install chromium)")

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def screenshot(page: Path, png: Path, *, width: int = 1200, height: int = 2400, dark: bool = False) -> Path:
    """A picture of an HTML file as a window of that many pixels shows it; 400 wide is a phone."""
    words = [f"--window-size={width},{height}", f"--screenshot={png}"]
    if dark:
        words.append("--blink-settings=preferredColorScheme=0")
    _run(*words, page.resolve().as_uri())
    return png


def to_pdf(page: Path, pdf: Path) -> Path:
    """The page as it prints."""
    _run(f"--print-to-pdf={pdf}", "--no-pdf-header-footer", page.resolve().as_uri())
    return pdf


def dom(page: Path) -> str:
    """The document as the browser understood it."""
    return _run("--dump-dom", page.resolve().as_uri())


def content_width(page: Path, window: int) -> int:
    """Pixels that the page's content is wide in a window of so many: more than that would have to be scrolled.

    The page lies in a frame, for a window of Chromium is never narrower than 500 pixels; a script beside the frame
    measures, for the page itself may run none.
    """
    frame = html.escape(page.read_text(encoding="utf-8"), quote=True)
    measure = "document.title = 'width ' + this.contentDocument.documentElement.scrollWidth"
    with tempfile.TemporaryDirectory() as folder:
        outer = Path(folder) / "outer.html"
        outer.write_text(
            f'<!doctype html><title></title><iframe width="{window}" height="800" frameborder="0" '
            f'onload="{measure}" srcdoc="{frame}"></iframe>',
            encoding="utf-8",
        )
        found = re.search(r"<title>width (\d+)</title>", dom(outer))
    assert found is not None, "the frame was not measured"
    return int(found[1])


def _run(*words: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *words], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    return done.stdout
