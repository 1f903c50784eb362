"""Pages are one file each, hold what they were given, and run nothing."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser_kit import needs_browser, screenshot
from jinja2 import UndefinedError
from matplotlib.figure import Figure

from eyetune.pages import page
from eyetune.pages.page import chart, picture, write_page


def test_a_page_is_one_file_that_fetches_nothing_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    file = write_page(tmp_path / "page.html", "base.html.j2", title="<script>alert(1)</script> \udcff.jpg")
    text = file.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    assert "Not a medical device" in text


def test_a_name_that_the_content_lacks_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UndefinedError, match="title"):
        write_page(tmp_path / "page.html", "base.html.j2")
    assert not list(tmp_path.iterdir())


def test_pictures_and_charts_lie_inside_the_page() -> None:
    pixels = np.full((40, 80, 3), (200, 30, 10), np.uint8)
    uri = picture(pixels, side=20)
    data = np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8)
    shown = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
    assert shown.shape == (10, 20, 3)
    assert np.abs(shown.astype(int) - (200, 30, 10)).max() < 12
    figure = Figure()
    figure.add_subplot().set_title("a < b")
    svg = chart(figure)
    assert svg.startswith("<svg")
    assert "<script" not in svg


def test_numbers_that_are_not_there_are_dashes() -> None:
    filters = page._environment().filters
    assert filters["number"](None) == filters["interval"]([None, None]) == filters["percent"](None) == "–"
    assert filters["interval"]([0.8101, 0.9]) == "0.810 to 0.900"


@needs_browser
@pytest.mark.slow
def test_the_page_is_dark_in_the_dark(tmp_path: Path) -> None:
    file = write_page(tmp_path / "page.html", "base.html.j2", title="A page")
    light = cv2.imread(str(screenshot(file, tmp_path / "light.png", height=400)))
    dark = cv2.imread(str(screenshot(file, tmp_path / "dark.png", height=400, dark=True)))
    assert light.mean() > 200
    assert dark.mean() < 80
