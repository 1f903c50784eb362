"""A folder as people have it, from end to end: every kind of file, one row each, the same pixels in every verb."""

from __future__ import annotations

import csv
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from data_kit import fundus
from dicom_kit import JPEG_BASELINE, write
from PIL import Image

import eyetune.data.loader as loader_room
from eyetune.cli import main
from eyetune.data.fundus import FundusSettings, load_square
from eyetune.data.photo import read_image
from eyetune.errors import DataError

PHOTO = fundus(96, 128, radius=44, seed=1)

Make = Callable[[Path], Any]


def saved(photo: np.ndarray = PHOTO, mode: str | None = None, **options: Any) -> Make:
    def make(path: Path) -> None:
        image = Image.fromarray(photo)
        (image if mode is None else image.convert(mode)).save(path, **options)

    return make


def rotated(orientation: int, turns: int) -> Make:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(np.rot90(PHOTO, turns), quality=95, exif=exif)


def palette(path: Path) -> None:
    Image.fromarray(PHOTO).quantize(256).save(path)


def gray16(path: Path) -> None:
    cv2.imwrite(str(path), PHOTO[..., 1].astype(np.uint16) * 257)


def cut(share: float) -> Make:
    def make(path: Path) -> None:
        saved(quality=95)(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return make


GOOD: dict[str, tuple[Make, np.ndarray]] = {
    "plain.jpg": (saved(quality=95), PHOTO),
    "progressive.jpg": (saved(quality=95, progressive=True), PHOTO),
    "UPPER.JPG": (saved(quality=95), PHOTO),
    "exif_3.jpg": (rotated(3, 2), PHOTO),
    "exif_6.jpg": (rotated(6, 1), PHOTO),
    "exif_8.jpg": (rotated(8, 3), PHOTO),
    "cmyk.jpg": (saved(mode="CMYK", quality=95), PHOTO),
    "gray.jpg": (saved(mode="L", quality=95), np.asarray(Image.fromarray(PHOTO).convert("L").convert("RGB"))),
    "gray16.png": (gray16, PHOTO[..., [1, 1, 1]]),
    "gray16.tif": (gray16, PHOTO[..., [1, 1, 1]]),
    "palette.png": (palette, PHOTO),
    "alpha.png": (saved(mode="RGBA"), PHOTO),
    "alpha_la.png": (saved(mode="LA"), np.asarray(Image.fromarray(PHOTO).convert("L").convert("RGB"))),
    "lzw.tif": (saved(compression="tiff_lzw"), PHOTO),
    "photo.bmp": (saved(), PHOTO),
    "photo.webp": (saved(quality=95), PHOTO),
    "png_saved_as.jpg": (saved(format="PNG"), PHOTO),
    "name with spaces é (1).jpg": (saved(quality=95), PHOTO),
    "tiny.jpg": (saved(PHOTO[40:51, 60:76], quality=95, subsampling=0), PHOTO[40:51, 60:76]),
    "one_pixel_wide.png": (saved(PHOTO[:, 60:61]), PHOTO[:, 60:61]),
    "all_black.png": (saved(np.zeros_like(PHOTO)), np.zeros_like(PHOTO)),
    "eye.dcm": (lambda path: write(path, PHOTO), PHOTO),
    "eye_jpeg.dcm": (lambda path: write(path, PHOTO, syntax=JPEG_BASELINE, kind="YBR_FULL_422"), PHOTO),
}
"""The kinds of file that are read, each with what comes out."""

BAD: dict[str, tuple[Make, str]] = {
    "empty.jpg": (lambda path: path.write_bytes(b""), "empty file"),
    "page.jpg": (lambda path: path.write_bytes(b"<html>sign in</html>"), "web page"),
    "cut_60.jpg": (cut(0.6), "cut short"),
    "cut_head.jpg": (cut(0.05), "cut short"),
    "stack.tif": (lambda path: Image.fromarray(PHOTO).save(path, save_all=True, append_images=[Image.fromarray(PHOTO)]),
                  "several pictures"),
    "frames.dcm": (lambda path: write(path, PHOTO, NumberOfFrames=2, PixelData=PHOTO.tobytes() * 2), "2 frames"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("awkward") / "images"
    made.mkdir()
    for name, (make, _) in {**GOOD, **BAD}.items():
        make(made / name)
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run trained for one epoch on all that can be read."""
    table = folder.parent / "labels.csv"
    names = [*GOOD, *BAD]
    rows = [f'"{name}",{number % 2},p{number}' for number, name in enumerate(names)]
    table.write_text("image,label,patient\n" + "\n".join(rows) + "\n", encoding="utf-8")
    out = folder.parent / "run"
    words = ["--data.table", str(table), "--model.weights", "random", "--model.pixels", "32", "--augment", "none"]
    words += ["--adapt.kind", "linear", "--train.epochs", "1", "--train.batch_size", "4", "--data.val", "0.2"]
    words += ["--data.test", "0.2", "--workers", "0", "--precision", "fp32", "--train.tensorboard", "false"]
    words += ["--data.cache", str(folder.parent / "cache"), "--skip-unreadable"]
    assert main(["finetune", *words, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_is_read(folder: Path, name: str) -> None:
    read, wanted = read_image(folder / name), GOOD[name][1]
    assert read.shape == wanted.shape
    # Lossy formats, four inks and 256 colours change a little.
    assert np.abs(read.astype(float) - wanted).mean() < 4


@pytest.mark.parametrize("name", BAD)
def test_every_fault_is_named(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match=BAD[name][1]):
        read_image(folder / name)


def predicted(run: Path, *words: str) -> tuple[int, list[dict[str, str]]]:
    out = run.parent / "rows.csv"
    code = main(["predict", str(run), *words, "--out", str(out), "--workers", "0"])
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        return code, list(csv.DictReader(stream))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4096, 5])
@pytest.mark.parametrize("cache", [(), ("--no-cache",)], ids=["cache", "no cache"])
def test_as_many_rows_come_out_as_files_go_in(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, cache: tuple[str, ...]
) -> None:
    monkeypatch.setattr("eyetune.verbs.predict.CHUNK", chunk)
    code, rows = predicted(run, str(folder), *cache)
    assert code == 0
    assert [row["image"] for row in rows] == sorted([*GOOD, *BAD])
    for row in rows:
        bad = BAD.get(row["image"])
        assert (row["predicted"] == "") == (bad is not None) == (row["prob_0"] == "")
        assert (bad[1] in row["error"]) if bad else not row["error"]


def test_a_table_may_name_files_twice_or_not_there(run: Path, folder: Path) -> None:
    table = folder.parent / "questions.csv"
    table.write_text("image\nplain.jpg\nnowhere.jpg\nplain.jpg\nempty.jpg\n", encoding="utf-8")
    code, rows = predicted(run, str(table))
    assert code == 0
    assert [row["image"] for row in rows] == ["plain.jpg", "nowhere.jpg", "plain.jpg", "empty.jpg"]
    assert ["no such file" in rows[1]["error"], rows[0]] == [True, rows[2]]


def test_nothing_predicted_is_exit_code_2_with_its_rows(run: Path, folder: Path) -> None:
    code, rows = predicted(run, str(folder / "empty.jpg"), str(folder / "gone.jpg"))
    assert code == 2
    assert ["empty file" in rows[0]["error"], "no such file" in rows[1]["error"]] == [True, True]


@pytest.mark.skipif(os.name != "posix", reason="names that are no text exist on Unix only")
def test_a_name_that_is_no_text_comes_back_as_it_is(
    run: Path, folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(folder / "all_black.png", tmp_path / name)
    except OSError:
        pytest.skip("this file system takes only text")
    code, rows = predicted(run, str(tmp_path))
    assert (code, rows[0]["image"], rows[0]["error"]) == (0, name, "")


@pytest.mark.slow
def test_what_is_decoded_is_the_same_in_every_verb(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, evaluation and prediction, with and without the cache, see the bytes of `load_square`."""
    seen: dict[str, dict[str, bytes]] = {}
    stage = ""
    real = loader_room.FundusDataset.square

    def square(self: Any, index: int) -> Any:
        made = real(self, index)
        seen.setdefault(stage, {})[self.records[index].image.name] = made.numpy().tobytes()
        return made

    monkeypatch.setattr(loader_room.FundusDataset, "square", square)
    table = str(run.parent / "labels.csv")
    config, overrides = str(run / "config.yaml"), ["--train.epochs", "1", "--workers", "0"]
    for cache in ("cold", "warm", "none"):
        where = ["--no-cache"] if cache == "none" else ["--data.cache", str(tmp_path / "cache")]
        out, none = str(tmp_path / cache), ["--no-cache"] if cache == "none" else []
        stage = f"train {cache}"
        assert main(["finetune", config, *overrides, *where, "--adapt.kind", "full", "--out", out]) == 0
        stage = f"evaluate {cache}"
        assert main(["evaluate", out, "--data", f"all={table}", "--skip-unreadable", "--workers", "0", *none]) == 0
        stage = f"predict {cache}"
        rows = tmp_path / f"{cache}.csv"
        assert main(["predict", out, str(folder), "--out", str(rows), "--workers", "0", *none]) == 0
    wanted = {name: load_square(folder / name, FundusSettings(32)).transpose(2, 0, 1).tobytes() for name in GOOD}
    assert len(seen) == 9
    for stage, squares in seen.items():
        assert squares == wanted, stage


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_are_one_letter_or_two(tmp_path: Path, on_disk: str, in_table: str) -> None:
    from eyetune.data.records import Manifest

    name = "rétine é.png"
    Image.fromarray(PHOTO).save(tmp_path / unicodedata.normalize(on_disk, name))
    table = tmp_path / "t.csv"
    table.write_text(f"image,label\n{unicodedata.normalize(in_table, name)},1\n", encoding="utf-8")
    found = Manifest.from_table(table, classes=("0", "1"))
    assert (read_image(found[0].image) == PHOTO).all()


# Tables from DICOM headers


def test_a_table_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images" / "visit"
    images.mkdir(parents=True)
    write(images / "1.2.840.17", PHOTO)
    write(images / "b.dcm", PHOTO, ImageLaterality="L", PatientID="MRN-2")
    (images / "c.dcm").write_bytes(bytes(128) + b"DICM" + b"\x08\x00\xff\xff\xff" * 40)
    saved()(images / "d.png")
    (images / "notes.txt").write_text("no image")
    out = tmp_path / "tables" / "eyes.csv"
    assert main(["data", "table", str(tmp_path / "images"), "--out", str(out)]) == 0
    with open(out, newline="", encoding="utf-8") as stream:
        rows = {Path(row["image"]).name: row for row in csv.DictReader(stream)}
    assert sorted(rows) == ["1.2.840.17", "b.dcm", "c.dcm", "d.png"]
    assert [rows["1.2.840.17"][key] for key in ("patient", "eye", "date")] == ["MRN-4711", "right", "2026-03-14"]
    assert [rows["b.dcm"][key] for key in ("patient", "eye")] == ["MRN-2", "left"]
    assert all((out.parent / row["image"]).is_file() for row in rows.values())
    said = capsys.readouterr()
    assert "MRN" not in said.out + said.err

    from eyetune.data.records import Manifest

    found = Manifest.from_table(out, labels_required=False)
    assert [(record.patient, record.eye) for record in found][:2] == [("MRN-4711", "right"), ("MRN-2", "left")]
    assert main(["data", "table", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
