"""`eyetune predict`: every photograph one row, whatever comes in, and the columns that say what to doubt."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from serve_kit import Client, served

import eyetune as et
from eyetune.cli import main
from eyetune.data.fundus import load_square
from eyetune.data.phantom import write_cohort
from eyetune.data.record import Record
from eyetune.data.records import Manifest
from eyetune.errors import DataError, RunError, UserError
from eyetune.heatmaps import explain
from eyetune.interrupt import Interrupted
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.scores import score
from eyetune.predicting import Predictor, Sources, choose_format, output
from eyetune.predicting.model import TrainedModel, heat_map, open_model
from eyetune.predicting.rows import choose_points, prepared
from eyetune.predicting.sources import chunks, read_paths
from eyetune.progress import counted_by, meter, track
from eyetune.serving.reader import Reader
from eyetune.train import results
from eyetune.train.mirrored import Mirrored
from eyetune.verbs.predict import _write

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn eyes in `eyes/`, and in `run/` a network that was taught, briefly, which are referable."""
    folder = tmp_path_factory.mktemp("predict")
    write_cohort(folder / "eyes", patients=20, size=96, seed=4)
    table = folder / "eyes" / "labels.csv"
    with open(table, newline="", encoding="utf-8") as stream:
        lines = [[row["image"], row["patient"], int(row["dr_grade"]) // 2 and 1] for row in csv.DictReader(stream)]
    with open(table, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["image", "patient", "referable"], *lines])
    words = ["--data.table", str(folder / "eyes" / "labels.csv"), "--data.label_column", "referable"]
    words += ["--model.weights", "random", "--model.pixels", "64", "--adapt.kind", "linear", "--augment", "none"]
    words += ["--data.val", "0.4", "--data.test", "0.2", "--train.epochs", "1", "--train.batch_size", "8"]
    words += ["--workers", "0", "--precision", "fp32", "--train.tensorboard", "false", "--out", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:  # its pictures, report and intervals are tested elsewhere
        patch.setattr(results, "_draw", lambda *_: None)
        patch.setattr(results, "trust", lambda *_, **__: {})
        patch.setattr(results, "score", functools.partial(score, resamples=10))
        patch.setattr("eyetune.report.page.refresh", lambda *_, **__: None)
        assert main(["finetune", *words]) == 0
    return folder


@pytest.fixture
def eyes(home: Path) -> list[Path]:
    return sorted((home / "eyes" / "images").iterdir())


def predict(home: Path, out: Path | None, *words: object) -> tuple[int, list[dict[str, Any]]]:
    code = main(
        ["predict", str(home / "run"), *map(str, words), "--workers", "0", *(["--out", str(out)] if out else [])]
    )
    if out is None or not out.is_file():
        return code, []
    if out.suffix == ".jsonl":
        return code, [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        return code, list(csv.DictReader(stream))


@pytest.mark.slow
def test_the_page_says_what_predict_and_python_say(home: Path, eyes: list[Path], tmp_path: Path) -> None:
    """As people start and end it: the address on stdout, Ctrl-C with a photograph on its way, the kept rows."""
    some = eyes[:6]
    words = [
        sys.executable,
        "-m",
        "eyetune",
        "serve",
        str(home / "run"),
        "--port",
        "0",
        "--keep",
        str(tmp_path / "kept"),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            page = Client(int(server.stdout.readline().rstrip("/\n").rpartition(":")[2])).open()
            for path in some:
                assert page.send(path.name, path.read_bytes()).status == 201
            cards = page.cards()
            with socket.create_connection(("127.0.0.1", page.port)) as line:
                line.sendall(b"GET /api/mo")
                server.send_signal(signal.SIGINT)
                assert server.wait(30) == 130
        finally:
            server.kill()
        said = server.stderr.read()
    assert "For research; not a diagnosis." in said
    assert "Traceback" not in said
    assert "interrupted" in said
    _, rows = predict(home, tmp_path / "a.csv", *some)
    (kept,) = (tmp_path / "kept").iterdir()
    lines = list(csv.DictReader(kept.read_text(encoding="utf-8").splitlines()))
    python = et.load_run(home / "run").predict(some, calibrated=True)
    for card, line, row, probabilities in zip(cards, lines, rows, python, strict=True):
        shown = [bar["share"] for bar in card["bars"]]
        np.testing.assert_allclose(shown, probabilities, atol=1e-6)
        for name in line.keys() - {"image", "notice", "ood", *(key for key in line if key.startswith("prob_"))}:
            assert line[name] == row[name]
        np.testing.assert_allclose(shown, [float(row[key]) for key in row if key.startswith("prob_")], atol=1e-6)
        assert float(line["ood"]) == pytest.approx(float(row["ood"]), rel=1e-5)


@pytest.mark.slow
def test_the_page_says_of_an_exported_model_what_predict_and_python_say(
    home: Path, eyes: list[Path], tmp_path: Path
) -> None:
    """To 1e-6, and without heat maps, which it says."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file, some = tmp_path / "model.onnx", eyes[:6]
    assert main(["export", str(home / "run"), "--to", "onnx", "--out", str(file)]) == 0
    model = open_model(file)
    reader = Reader(model, calibration=model.calibration, most_pixels=10**6)
    with served(reader) as client:
        page = client.open()
        for path in some:
            page.send(path.name, path.read_bytes())
        shown = [[bar["share"] for bar in card["bars"]] for card in page.cards()]
        assert "an exported model hides" in page.ask("GET", "/api/model").json["no_heat_maps"]
        key = page.cards()[0]["key"]
        assert page.ask("GET", f"/api/photographs/{key}/heat").status == 400
    squares = [load_square(path, model.settings) for path in some]
    python = reader.predictor("specificity").table_of([path.name for path in some], squares)
    assert isinstance(python, Predictions)
    np.testing.assert_allclose(shown, python.probabilities, atol=1e-6)
    assert main(["predict", str(file), *map(str, some), "--workers", "0", "--out", str(tmp_path / "a.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()))
    told = [[float(cell) for name, cell in row.items() if name.startswith("prob_")] for row in rows]
    np.testing.assert_allclose(shown, told, atol=1e-6)


@pytest.mark.slow
def test_probabilities_are_the_calibrated_ones_and_the_call_is_the_stored_threshold(
    home: Path, eyes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = et.load_run(home / "run")
    calibration = run.calibration
    assert calibration is not None
    code, rows = predict(home, tmp_path / "a.csv", *eyes)
    said = capsys.readouterr().err
    assert code == 0
    assert f"calibrated on {calibration.fitted_on.n} images of val" in said
    raw = run.predictions(Manifest(tuple(Record(p, None, str(p), "") for p in eyes), run.classes, ""))
    expected = calibration.apply(raw).probabilities
    found = np.array([[float(row[f"prob_{name}"]) for name in run.classes] for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(run.predict(eyes, calibrated=True), expected, atol=1e-6)
    np.testing.assert_allclose(run.predict(eyes), raw.probabilities, atol=1e-6)
    assert [row["predicted"] for row in rows] == [run.classes[k] for k in expected.argmax(axis=1)]
    assert [row["image"] for row in rows] == [str(path) for path in eyes]
    assert raw.ood is not None
    assert calibration.ood is not None
    scores = np.array([float(row["ood"]) for row in rows])
    np.testing.assert_allclose(scores, raw.ood, rtol=1e-5)
    flags = [row["out_of_distribution"] == "yes" for row in rows]
    assert flags == (scores > calibration.ood.threshold).tolist()
    assert len(set(flags)) == 2, "some are, some are not: or this shows nothing"
    for target in ("specificity", "sensitivity"):
        point = calibration.point(run.classes[1], target)
        if point is not None:
            _, rows = predict(home, tmp_path / "b.csv", *eyes, "--operating-point", target)
            assert [row["positive"] == "yes" for row in rows] == (expected[:, 1] >= point.threshold).tolist()
            _, named = predict(home, tmp_path / "b.csv", *eyes, "--operating-point", point.name)
            assert named == rows
    _, rows = predict(home, tmp_path / "c.csv", *eyes, "--no-calibration")
    assert "positive" not in rows[0]
    found = np.array([[float(row[f"prob_{name}"]) for name in run.classes] for row in rows])
    np.testing.assert_allclose(found, raw.probabilities, atol=1e-6)


def test_the_thresholds_of_grades_are_of_referable_disease(home: Path) -> None:
    run = et.load_run(home / "run")
    point = next(iter(run.calibration.operating_points))
    graded = point.model_copy(
        update={"positive": "grade >= 2", "name": "x", "classes": (2, 3, 4), "target": {"specificity": 0.95}}
    )
    calibration = run.calibration.model_copy(update={"operating_points": (graded,)})
    run.card = run.card.__class__(**{**run.card.__dict__, "classes": ("0", "1", "2", "3", "4")})
    points = choose_points(run, calibration, "specificity")
    assert points == {"referable": graded}
    assert choose_points(run, calibration, "sensitivity") == {}
    assert choose_points(run, None, "specificity") == {}
    assert "referable" in Predictor(run, calibration=calibration, points=points).columns
    with pytest.raises(RunError, match="There are: x"):
        choose_points(run, calibration, "y")


def test_quality_and_heat_maps_and_json_lines(home: Path, tmp_path: Path) -> None:
    write_cohort(tmp_path / "large", patients=1, size=512, seed=4)
    sharp = min((tmp_path / "large" / "images").iterdir())
    blurred = tmp_path / "smeared eye.png"
    cv2.imwrite(str(blurred), cv2.GaussianBlur(cv2.imread(str(sharp)), (0, 0), 5))
    (tmp_path / "text.jpg").write_text("no picture")
    words = [sharp, blurred, tmp_path / "text.jpg", sharp]
    maps = tmp_path / "maps"
    code, rows = predict(home, tmp_path / "rows.jsonl", *words, "--heatmaps", maps)
    assert code == 0
    assert [row["image"] for row in rows] == [str(word) for word in words], "twice in, twice out"
    assert "blurred" in rows[1]["quality"]
    assert rows[0]["quality"] == []
    assert [row["quality"] is None for row in rows] == [False, False, True, False]
    assert [row["predicted"] is None for row in rows] == [row["error"] is not None for row in rows]
    assert all(isinstance(row["prob_1"], float) for row in rows if row["error"] is None)
    names = [row["heat_map"] for row in rows]
    assert names == [f"000001_{sharp.stem}.png", "000002_smeared_eye.png", None, f"000004_{sharp.stem}.png"]
    assert sorted(path.name for path in maps.iterdir()) == [name for name in names if name]
    picture = cv2.imread(str(maps / names[1]))
    assert picture.shape[0] == 64
    plain = {key: cell for key, cell in rows[0].items() if key not in ("quality", "heat_map")}
    _, without = predict(home, tmp_path / "plain.jsonl", *words, "--no-quality")
    assert without[0] == plain
    table = io.StringIO(newline="")
    csv.writer(table).writerow(rows[1])
    _, same = predict(home, tmp_path / "rows.csv", *words)
    assert same[1]["quality"] == " ".join(rows[1]["quality"])
    assert float(same[1]["prob_1"]) == rows[1]["prob_1"]


def test_mirrored_is_the_mean_of_both_views(home: Path, eyes: list[Path], tmp_path: Path) -> None:
    run = et.load_run(home / "run")
    manifest = Manifest(tuple(Record(path, None, str(path), "") for path in eyes[:5]), run.classes, "")
    plain, both = run.predictions(manifest), run.predictions(manifest, mirrored=True)
    flipped = []
    for path in eyes[:5]:
        (tmp_path / path.name).write_bytes(b"")
        cv2.imwrite(str(tmp_path / (path.stem + ".png")), cv2.imread(str(path))[:, ::-1])
        flipped.append(Record(tmp_path / (path.stem + ".png"), None, path.name, ""))
    other = run.predictions(Manifest(tuple(flipped), run.classes, ""))
    np.testing.assert_allclose(both.logits, (plain.logits + other.logits) / 2, atol=0.02)
    assert not np.allclose(both.logits, plain.logits, atol=1e-4)
    images = torch.randn(2, 3, 8, 8)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    expected = (network(images) + network(images.flip(3))) / 2
    torch.testing.assert_close(Mirrored(network)(images), expected)
    _, rows = predict(home, tmp_path / "a.csv", *eyes[:5], "--tta")
    np.testing.assert_allclose([float(row["ood"]) for row in rows], plain.ood, rtol=1e-4)
    found = [float(row["prob_1"]) for row in rows]
    np.testing.assert_allclose(found, run.calibration.apply(both).probabilities[:, 1], atol=1e-6)


# What comes in.


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        (b"a.jpg\nb c.png\n", ["a.jpg", "b c.png"]),
        (b"a.jpg\r\n\r\n\nb.png", ["a.jpg", "b.png"]),
        (b"a\nb.jpg\0c.jpg\0", ["a\nb.jpg", "c.jpg"]),
        ("é/ü.jpg\n".encode(), ["é/ü.jpg"]),
        (b"caf\xe9.jpg", [os.fsdecode(b"caf\xe9.jpg")]),
        (b"", []),
        (b"\n\n", []),
    ],
)
@pytest.mark.parametrize("block", [1, 4, 1 << 16])
def test_a_stream_of_paths(given: bytes, paths: list[str], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyetune.predicting.sources._BLOCK", block)
    if b"\0" in given and block < len(given):
        pytest.skip("the first NUL has to come within the first block")
    assert list(read_paths(io.BytesIO(given))) == paths


def test_a_stream_that_is_no_list_of_paths_is_refused_early() -> None:
    with pytest.raises(DataError, match="expects paths"):
        list(read_paths(io.BytesIO(b"\xff\xd8\xff" + b"x" * 200_000)))


def test_every_source_in_its_order(home: Path, eyes: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"image\n{eyes[3].name}\n{eyes[1].name}\n", encoding="utf-8")
    words = [eyes[5], eyes[0].parent, table, Path("-"), Path("gone.jpg")]
    sources = Sources(words, images=eyes[0].parent, stream=io.BytesIO(b"x.jpg\nfolder\n"))
    names = [eye.name for eye in eyes]
    expected = [str(eyes[5]), *names, eyes[3].name, eyes[1].name, "x.jpg", "folder", "gone.jpg"]
    assert [record.name for record in sources] == expected
    assert sources.total is None
    known = Sources(words[:3], images=eyes[0].parent)
    assert known.total == len(list(known)) == len(eyes) + 3
    assert all(record.image.is_file() for record in known)
    for wrong, said in (([Path("-"), Path("-")], "one standard input"), ([tmp_path / "no"], "no file or folder")):
        with pytest.raises(DataError, match=said):
            Sources(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        Sources([tmp_path / "empty"])


def test_chunks() -> None:
    records = [Record(Path(str(n)), None, str(n), "") for n in range(7)]
    assert [[record.name for record in part] for part in chunks(records, 3)] == [list("012"), list("345"), ["6"]]


def test_paths_on_standard_input(
    home: Path, eyes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "\n".join(map(str, [*eyes[:3], tmp_path, tmp_path / "gone.jpg"])).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, rows = predict(home, tmp_path / "a.csv", "-")
    assert code == 0
    assert [bool(row["error"]) for row in rows] == [False, False, False, True, True]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    capsys.readouterr()
    code, _ = predict(home, tmp_path / "b.csv", "-")
    assert code == 2
    assert "no paths came" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_file_that_goes_while_the_others_are_predicted_is_one_row(
    home: Path, eyes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = et.load_run(home / "run", cache=False)
    copies = [Path(shutil.copy(path, tmp_path)) for path in eyes[:4]]
    table, left = run.table, [copies[2]]

    def slowly(*args: Any, **options: Any) -> Any:
        if left:
            left.pop().unlink()
        return table(*args, **options)

    monkeypatch.setattr(run, "table", slowly)
    rows = Predictor(run, quality=True, workers=0).rows([Record(path, None, path.name, path.name) for path in copies])
    assert ["no such file" in str(row["error"]) for row in rows] == [False, False, True, False]
    assert [row["predicted"] is None for row in rows] == [False, False, True, False]


def test_seven_times_the_paths_take_no_more_memory(home: Path, tmp_path: Path) -> None:
    """Paths, rows and what is remembered of them; docs/benchmarks.md has whole commands over 100,000 files."""
    run = et.load_run(home / "run", cache=False)
    predictor = Predictor(run)
    none = dict.fromkeys(predictor.columns)

    class Echo(Predictor):
        def rows(self, records: Sequence[Record], **options: Any) -> list[dict[str, Any]]:
            return [none | {"image": record.name, "error": "none of it is read"} for record in records]

    def peak(count: int) -> int:
        names = (b"%060d.png\n" % number for number in range(count))
        tracemalloc.start()
        try:
            sources = Sources([Path("-")], stream=Lines(names))
            assert _write(Echo(run), sources, tmp_path / "rows.csv", "csv", False) == (0, count)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(15_000) < 1.2 * peak(2_100)
    with open(tmp_path / "rows.csv", encoding="utf-8") as stream:
        assert sum(1 for _ in stream) == 1 + 2_100


class Lines(io.RawIOBase):
    """A stream of lines that are made when they are read."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self.lines = lines

    def read(self, size: int = -1) -> bytes:
        return b"".join(itertools.islice(self.lines, 500))


def test_a_heat_map_that_cannot_be_drawn_any_more_is_missing_and_no_more(
    home: Path, eyes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlucky(model: TrainedModel, path: Path) -> Any:
        if path == eyes[1]:
            raise DataError("gone")
        return prepared(model, path)

    monkeypatch.setattr("eyetune.predicting.rows.prepared", unlucky)
    run = et.load_run(home / "run", cache=False)
    done: list[int] = []
    records = [Record(path, None, path.name, path.name) for path in eyes[:3]]
    rows = Predictor(run, heat_maps=tmp_path / "maps", workers=0).rows(records, update=done.append)
    assert [row["heat_map"] is None for row in rows] == [False, True, False]
    assert all(row["predicted"] and row["error"] is None for row in rows)
    assert done == sorted(done)
    assert done[-1] == 3


def test_squares_are_predicted_as_the_files_they_were_made_of(home: Path, eyes: list[Path]) -> None:
    model = open_model(home / "run", cache=False)
    squares = [prepared(model, path) for path in eyes[:5]]
    names = [path.name for path in eyes[:5]]
    predictor = Predictor(model, calibration=model.calibration, workers=0)
    table = predictor.table_of(names, squares)
    rows = predictor.rows([Record(path, None, path.name, path.name) for path in eyes[:5]])
    assert len({row["prob_1"] for row in rows}) == 5
    for place, row in enumerate(rows):
        said = predictor.said(table, place)
        assert said["predicted"] == row["predicted"]
        np.testing.assert_allclose([said["prob_1"], said["ood"]], [row["prob_1"], row["ood"]], rtol=1e-5)
    one = explain(model.as_run(), eyes[0], target="1")
    np.testing.assert_array_equal(heat_map(model, squares[0], target="1").values, one.values)


def test_heat_maps_do_not_lie_among_the_photographs(
    home: Path, eyes: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = eyes[0].parent
    assert main(["predict", str(home / "run"), str(folder), "--heatmaps", str(folder / "maps")]) == 2
    assert "choose another" in capsys.readouterr().err
    assert not (folder / "maps").exists()


# What goes out.


def test_the_format_follows_the_suffix() -> None:
    assert (
        choose_format(None, None) == choose_format(Path("a.txt"), None) == choose_format(Path("a.csv"), None) == "csv"
    )
    assert choose_format(Path("a.JSONL"), None) == choose_format(Path("a.csv"), "jsonl") == "jsonl"
    with pytest.raises(UserError, match=r"call it \.jsonl"):
        choose_format(Path("a.json"), None)


@pytest.mark.parametrize("name", ["=1+1.jpg", 'a"b,c.jpg', "two\nlines.jpg", "–.jpg", os.fsdecode(b"caf\xe9.jpg")])
def test_hostile_names_come_back_as_they_are(name: str) -> None:
    columns = ["image", "p", "flag", "words", "error"]
    row = {"image": name, "p": 0.1, "flag": True, "words": ("a", "b"), "error": None}
    line = output.encode(row, columns, "csv").decode("utf-8", "surrogateescape")
    assert list(csv.reader(io.StringIO(line, newline=""))) == [[name, "0.1", "yes", "a b", ""]]
    line = output.encode(row, columns, "jsonl").decode()
    assert json.loads(line) == row | {"words": ["a", "b"]}
    assert line.count("\n") == 1


def stop_after(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come when `rows` rows are written."""
    add = output.Rows.add

    def interrupted(self: output.Rows, given: Any) -> None:
        add(self, given)
        if self.count >= rows:
            raise Interrupted("", signal.SIGINT)

    monkeypatch.setattr(output.Rows, "add", interrupted)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_interrupted_file_is_gone_on_with(
    home: Path,
    eyes: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
) -> None:
    monkeypatch.setattr("eyetune.verbs.predict.CHUNK", 4)
    words = [*eyes[:10], tmp_path / "gone.jpg"]
    predict(home, tmp_path / f"whole.{suffix}", *words)
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    out = tmp_path / f"rows.{suffix}"
    partial = tmp_path / f"rows.partial.{suffix}"
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        assert predict(home, out, *words)[0] == 130
    assert not out.exists()
    assert whole.startswith(partial.read_bytes())
    assert "8 rows are in" in capsys.readouterr().err
    assert predict(home, out, *words)[0] == 2
    assert "Add --resume" in capsys.readouterr().err
    assert predict(home, out, *words, "--resume", "--no-quality")[0] == 2
    assert "columns differ" in capsys.readouterr().err
    assert predict(home, out, *reversed(words), "--resume")[0] == 2
    assert "not those that have rows" in capsys.readouterr().err
    # A kill may leave more than was sure of, and half a row.
    partial.write_bytes(partial.read_bytes() + b"half a r")
    assert predict(home, out, *words, "--resume")[0] == 0
    assert out.read_bytes() == whole
    assert "10 predicted, 1 refused" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"rows.{suffix}", f"whole.{suffix}"])
    assert predict(home, out, *words, "--resume")[0] == 2
    assert "nothing to go on with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_it_in_words(home: Path, eyes: list[Path]) -> None:
    """`eyetune predict … | head -1`"""
    read, write = os.pipe()
    os.close(read)
    words = ["predict", str(home / "run"), *map(str, eyes[:2]), "--workers", "0"]
    done = subprocess.run([sys.executable, "-m", "eyetune", *words], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 130
    assert b"the reader of the rows has gone" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_message(home: Path, eyes: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(home, Path("/dev/full"), eyes[0])[0] == 2
    said = capsys.readouterr().err
    assert "cannot write /dev/full" in said
    assert "Traceback" not in said


def test_what_went_wrong_before_the_first_row_leaves_nothing(
    home: Path, eyes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(output.Rows, "add", lambda *_: (_ for _ in ()).throw(Interrupted("", signal.SIGTERM)))
        assert predict(home, tmp_path / "a.csv", eyes[0])[0] == 143
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.csv").write_text("old")
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        predict(home, tmp_path / "old.csv", eyes[0])
    assert (tmp_path / "old.csv").read_text() == "old", "it stays until the new one is whole"
    (tmp_path / "old.partial.state.json").write_text("{")
    capsys.readouterr()
    assert predict(home, tmp_path / "old.csv", eyes[0], "--resume")[0] == 2
    assert "missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--operating-point", "specifity"], "has no operating point 'specifity'"),
        (["--calibration", "nowhere"], "no calibration for 'nowhere'"),
        (["--calibration", "x", "--no-calibration"], "exclude each other"),
        (["--out", "."], "is a folder"),
        (["--out", "rows.json"], "call it .jsonl"),
        (["--resume"], "it needs --out"),
        (["--format", "xml"], "xml"),
        (["nothing/here"], "no file or folder at nothing/here"),
        (["-", "-"], "one standard input"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_one_message(
    home: Path, eyes: list[Path], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["predict", str(home / "run"), str(eyes[0]), *words]) == 2
    found = capsys.readouterr()
    assert said in found.err
    assert "Traceback" not in found.err
    assert not found.out


def test_meters_inside_a_longer_job_report_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    with counted_by(seen.append):
        assert list(track("abc", 3, "Checking")) == list("abc")
        with meter(2, "Predicting") as update:
            update(2)
    assert seen == [1, 2, 3, 2]
    assert not capsys.readouterr().err
