"""The page of `eyetune serve` in a real browser: dropped, read, looked at, set right, downloaded, forgotten."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser_kit import CHROMIUM, needs_browser
from serve_kit import Client, eye, reader_of, served, tiny_run

from eyetune.serving.reader import Reader

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = [pytest.mark.slow, needs_browser]

SCRIPT = "<img src=x onerror=document.title=666>.png"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return reader_of(tiny_run(tmp_path_factory.mktemp("serve")))


@pytest.fixture(scope="module")
def home(reader: Reader) -> Iterator[Client]:
    with served(reader) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, home: Client) -> Iterator[Page]:
    """A page that asks nobody but the server, and in which nothing goes wrong."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    context.set_default_timeout(30_000)
    opened = context.new_page()
    asked: list[str] = []
    faults: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.goto(f"http://127.0.0.1:{home.port}/")
    opened.wait_for_selector("body[data-ready]")
    yield opened
    context.close()
    assert not faults
    assert all(re.match(rf"(blob:)?http://127\.0\.0\.1:{home.port}/", url) for url in asked)


def png(name: str, seed: int = 1, **changes: Any) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": eye(seed, **changes)}


def give(page: Page, *files: dict[str, Any]) -> None:
    """Choose files, and wait until all that were given so far have been read."""
    before = page.locator(".eye-card").count()
    page.set_input_files("#files", list(files))
    settled(page, before + len(files))


def settled(page: Page, count: int) -> None:
    page.locator(".eye-card[data-state=done], .eye-card[data-state=failed]").nth(count - 1).wait_for()


def card(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=name, exact=True)


def seen(picture: Locator) -> None:
    """The picture is there, and was decoded."""
    picture.wait_for()
    for _ in range(100):
        if picture.evaluate("one => one.complete && one.naturalWidth") == 260:
            return
        time.sleep(0.02)
    raise AssertionError("not decoded")


def test_drop_a_folder_and_see_the_results(page: Page, reader: Reader, tmp_path: Path) -> None:
    """Really dropped, as from a file manager: a folder with a folder in it, a file beside, what is no photograph."""
    (tmp_path / "eyes" / "more").mkdir(parents=True)
    (tmp_path / "eyes" / "a.png").write_bytes(eye(1))
    (tmp_path / "eyes" / "more" / "b.jpg").write_bytes(eye(2, ".jpg"))
    (tmp_path / "eyes" / "notes.txt").write_text("none")
    (tmp_path / "eyes" / ".hidden.png").write_bytes(b"none")
    (tmp_path / "alone.dat").write_bytes(eye(3))
    session = page.context.new_cdp_session(page)
    given = {"items": [], "files": [str(tmp_path / "eyes"), str(tmp_path / "alone.dat")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 600, "y": 300, "data": given})
    settled(page, 3)
    names = page.locator(".eye-card h3").all_text_contents()
    assert sorted(names) == ["alone.dat", "eyes/a.png", "eyes/more/b.jpg"]
    assert page.locator("#trouble").text_content() == ("2 files of the folder are no photographs and were left aside.")
    (found,) = reader.read([("a", eye(1))])
    assert found[0] is not None
    row = reader.row("specificity", "a", *found)
    shown = card(page, "eyes/a.png")
    assert shown.locator(".title").text_content() == f"Grade {row['predicted']}"
    shares = [f"{100 * float(str(row[f'prob_{grade}'])):.1f}\N{NO-BREAK SPACE}%" for grade in "01234"]
    assert shown.locator(".share").all_text_contents() == shares
    assert f"Referable: {'yes' if row['referable'] else 'no'}" in (shown.locator(".decision").text_content() or "")
    assert "Plausible" in (shown.locator(".result").text_content() or "")
    seen(shown.locator("img"))


def test_research_use_cannot_be_missed(page: Page) -> None:
    give(page, *(png(f"{number}.png", number) for number in range(5)))
    page.mouse.wheel(0, 5000)
    notice = page.get_by_text("Research use only. Not a medical device; not a diagnosis.")
    for media in ("screen", "print"):
        page.emulate_media(media=media)  # type: ignore[arg-type]
        assert notice.is_visible()
        assert page.locator(".use:visible").count() == 5
        assert page.get_by_label("Threshold").is_visible(), "a decision without its threshold says little"
    page.emulate_media(media="screen")
    box = notice.bounding_box()
    assert box is not None
    assert 0 <= box["y"] < 60, "it stays in sight wherever one has scrolled to"


def test_heat_map_on_and_off(page: Page) -> None:
    give(page, png("a.png"))
    shown = card(page, "a.png")
    seen(shown.locator("img"))
    plain = shown.locator("img").get_attribute("src")
    button = shown.get_by_role("button", name="Heat map")
    for pressed in ("true", "false"):
        button.click()
        shown.locator(f"button[aria-pressed={pressed}]").wait_for()
        shown.locator(".legend").wait_for(state="visible" if pressed == "true" else "hidden")
        seen(shown.locator("img"))
        assert (shown.locator("img").get_attribute("src") == plain) == (pressed == "false")
    page.get_by_label("Heat maps").check()
    shown.get_by_text("bright: it counted more").wait_for()


def test_a_bad_file_and_a_script_in_a_name_are_only_text(page: Page) -> None:
    give(page, {"name": "cut.jpg", "mimeType": "image/jpeg", "buffer": eye(1, ".jpg")[:900]}, png(SCRIPT))
    bad = card(page, "cut.jpg")
    assert "Not read" in (bad.text_content() or "")
    assert "Damaged or cut short" in (bad.text_content() or "")
    assert card(page, SCRIPT).locator("h3").text_content() == SCRIPT
    card(page, SCRIPT).get_by_role("button", name="Heat map").click()
    card(page, SCRIPT).locator(".legend").wait_for()
    assert "666" not in page.title()
    assert page.locator(".eye-card img[onerror]").count() == 0
    page.get_by_label("Show").select_option("failed")
    assert page.locator(".eye-card").count() == 1
    assert "1 not read" in (page.locator("#progress").text_content() or "")


def test_both_eyes_side_by_side_and_set_right(page: Page) -> None:
    give(page, png("12_left.png", 1), png("7.png", 2), png("12_right.png", 3), png("x_OD.png", 4), png("x_OD.jpg", 5))
    pair = page.get_by_role("region", name="Both eyes of 12")
    assert pair.locator("h3 bdi").all_text_contents() == ["12", "12_right.png", "12_left.png"]
    assert "assumed from the names: “right” and “left”" in (pair.text_content() or "")
    assert page.locator(".pair").count() == 1
    assert "2 photographs share a patient's name" in (page.locator("#paired").text_content() or "")
    pair.get_by_role("button", name="Not one patient").click()
    assert page.locator(".pair").count() == 0
    assert card(page, "12_left.png").get_by_text("Left eye?").is_visible()
    # 7.png is the left eye of x, and the second photograph of its right eye is somebody else's.
    for name, side, patient in (("7.png", "left", "x"), ("x_OD.jpg", "", "")):
        shown = card(page, name)
        shown.get_by_text("Patient and eye").click()
        shown.get_by_label("Patient", exact=True).fill(patient)
        shown.get_by_label("Eye", exact=True).select_option(side)
    pair = page.get_by_role("region", name="Both eyes of x")
    assert pair.locator("h3 bdi").all_text_contents() == ["x", "x_OD.png", "7.png"]
    assert "as you said" in (pair.text_content() or "")
    page.get_by_label("Both eyes side by side").uncheck()
    assert page.locator(".pair").count() == 0
    assert page.locator(".eye-card").count() == 5


def test_download_the_table_at_another_threshold(page: Page, reader: Reader, tmp_path: Path) -> None:
    give(page, png("=b.png", 2), png("a.png"))
    point = "grade >= 1 at 95% sensitivity"
    page.get_by_label("Threshold").select_option(point)
    card(page, "a.png").get_by_text("grade ≥ 1:").first.wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the table").click()
    download.value.save_as(tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()))
    (found,) = reader.read([("a.png", eye(1))])
    expected = reader.header(point) + reader.line(point, reader.row(point, "a.png", *found))
    for column, cell in next(csv.DictReader(expected.decode().splitlines())).items():
        number = column.startswith("prob_") or column == "ood"
        assert (float(rows[1][column]) == pytest.approx(float(cell), abs=1e-6)) if number else rows[1][column] == cell
    assert [row["image"] for row in rows] == ["'=b.png", "a.png"]
    assert "positive" in rows[0]


def test_keyboard_alone(page: Page) -> None:
    """Every step by Tab, Enter, Space and arrows; what has the focus is seen."""

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            if focused.count() and name in (focused.get_attribute("aria-label") or focused.text_content() or ""):
                assert focused.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
                return
        raise AssertionError(f"no way to {name}")

    # Listened for from the beginning: a chooser that opens before the browser knows is not told.
    page.on("filechooser", lambda chooser: chooser.set_files([png("a.png"), png("b.png", 2)]))  # type: ignore[list-item]
    tab_to("Choose photographs")
    page.keyboard.press("Enter")
    settled(page, 2)
    tab_to("Heat map of a.png")
    page.keyboard.press("Space")
    card(page, "a.png").locator(".legend").wait_for()
    tab_to("Remove a.png")
    page.keyboard.press("Enter")
    card(page, "a.png").wait_for(state="detached")
    assert page.locator(":focus").get_attribute("aria-label") == "Remove b.png"
    page.keyboard.press("Shift+Tab")
    assert page.locator(":focus").get_attribute("aria-label") == "Heat map of b.png"


@pytest.mark.parametrize("width", [320, 400])
def test_on_a_phone_nothing_has_to_be_scrolled_sideways(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    give(page, png("12_left.png"), png("12_right.png", 2), png(f"{'long' * 40}.png", 3, brightness=0.2))
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    boxes = [button.bounding_box() for button in page.get_by_role("button").all()]
    assert all(box is not None and box["height"] >= 30 for box in boxes), "large enough for a thumb"
    left, right = (card(page, f"12_{side}.png").bounding_box() for side in ("left", "right"))
    assert left is not None
    assert right is not None
    assert right["x"] < left["x"], "side by side on a phone, too"


def test_stop_clear_and_close_forget(page: Page, home: Client, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reader.read

    def slow(files: Any) -> Any:
        time.sleep(0.8)
        return whole(files)

    monkeypatch.setattr(reader, "read", slow)
    page.set_input_files("#files", [png(f"{number}.png", number) for number in range(30)])
    page.locator(".eye-card[data-state=done]").first.wait_for()
    assert "waiting" in (page.locator("#progress").text_content() or "")
    page.get_by_role("button", name="Stop").click()
    page.locator("#progress", has_text=re.compile(r"^\d+ done$")).wait_for()
    assert 0 < page.locator(".eye-card").count() < 30
    with page.expect_request(lambda request: request.method == "DELETE") as asked:
        page.get_by_role("button", name="Clear").click()
    assert page.locator(".eye-card").count() == 0
    token = asked.value.headers["x-eyetune-page"]
    page.goto("about:blank")
    gone = Client(home.port, token)
    for _ in range(100):
        if gone.ask("GET", "/api/photographs").status == 404:
            return
        time.sleep(0.02)
    raise AssertionError("a page that was left is forgotten")


def test_a_server_that_has_gone_is_said(browser: Browser, reader: Reader) -> None:
    with served(reader) as client:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.wait_for_selector("body[data-ready]")
    page.set_input_files("#files", [png("a.png")])
    page.get_by_text("It could not be sent. Is the server still there, and the file?").wait_for(timeout=30_000)
    assert page.get_by_role("button", name="Try again").is_visible()
    page.close()
