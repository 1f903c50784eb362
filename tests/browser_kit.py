"""A real browser for the pages EyeTune writes: headless Chromium takes a picture; no test needs one to be there."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), "")


def _runs(path: str) -> bool:
    """Whether it is a browser: on some systems the name leads to a note on how to install one."""
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


needs_browser = pytest.mark.skipif(
    not (CHROMIUM and _runs(CHROMIUM)), reason="no Chromium here (Debian: apt-get install chromium)"
)

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


@dataclass(frozen=True)
class Measured:
    """What a browser made of a page.

    Attributes:
        width: pixels that its content is wide: more than the window would have to be scrolled.
        smallest: pixels of its smallest visible text, that in drawings at the size they are shown at.
        pictures: how many it shows.
        broken: how many of them could not be decoded.
    """

    width: int
    smallest: float
    pictures: int
    broken: int


_MEASURE = """
const page = this.contentDocument, sizes = [];
const walk = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const box = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || !box.getClientRects().length) continue;
  const scale = box.ownerSVGElement ? box.getScreenCTM().a : 1;
  sizes.push(scale * parseFloat(page.defaultView.getComputedStyle(box).fontSize));
}
const pictures = [...page.images];
document.title = 'measured ' + [page.documentElement.scrollWidth, Math.min(...sizes), pictures.length,
  pictures.filter(one => !one.naturalWidth).length].join(' ');
"""


def measured(page: Path, window: int) -> Measured:
    """The page in a window of so many pixels.

    The page lies in a frame, for a window of Chromium is never narrower than 500 pixels; a script beside the frame
    measures, for the page itself may run none.
    """
    frame = html.escape(page.read_text(encoding="utf-8"), quote=True)
    with tempfile.TemporaryDirectory() as folder:
        outer = Path(folder) / "outer.html"
        outer.write_text(
            f'<!doctype html><title></title><iframe width="{window}" height="800" frameborder="0" '
            f'onload="{html.escape(_MEASURE, quote=True)}" srcdoc="{frame}"></iframe>',
            encoding="utf-8",
        )
        found = re.search(r"<title>measured (\d+) ([\d.]+) (\d+) (\d+)</title>", dom(outer))
    assert found is not None, "the frame was not measured"
    return Measured(int(found[1]), float(found[2]), int(found[3]), int(found[4]))


def _run(*words: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *words], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    return done.stdout
