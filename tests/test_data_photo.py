"""Reading photographs of every kind: what comes out, and what is refused before it can do harm."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from data_kit import fundus
from hostile_kit import HARMLESS, HOSTILE, png
from PIL import Image

from eyetune.data.photo import read_image
from eyetune.errors import DataError

PHOTO = fundus(seed=3)


def near(got: np.ndarray, wanted: np.ndarray, tolerance: float = 3.0) -> bool:
    return got.shape == wanted.shape and float(np.abs(got.astype(float) - wanted).mean()) <= tolerance


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"quality": 95}),
        ("a.jpg", {"quality": 95, "progressive": True}),
        ("A.JPEG", {"quality": 95}),
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.tiff", {}),
        ("a.webp", {"lossless": True}),
        ("name with spaces é (1).png", {}),
    ],
)
def test_formats(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    Image.fromarray(PHOTO).save(tmp_path / name, **options)
    read = read_image(tmp_path / name)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    assert near(read, PHOTO)


def test_the_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.jpg", format="PNG")
    assert (read_image(tmp_path / "a.jpg") == PHOTO).all()


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "YCbCr"])
def test_modes(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(PHOTO).convert(mode)
    image.save(tmp_path / "a.tif")
    assert near(read_image(tmp_path / "a.tif"), np.asarray(image.convert("RGB")), 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_black(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(PHOTO).convert(mode)
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 100, 240))
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert (read[:, :100] == 0).all()
    assert near(read[:, 100:], np.asarray(image.convert("RGB"))[:, 100:])


def test_transparent_palette_colour(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([255, 255, 255, 200, 80, 30])
    image.paste(0, (0, 0, 10, 20))
    image.save(tmp_path / "a.png", transparency=0)
    read = read_image(tmp_path / "a.png")
    assert read[0, 0].tolist() == [0, 0, 0]
    assert read[0, 19].tolist() == [200, 80, 30]


@pytest.mark.parametrize("bits", [None, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_deep_gray(tmp_path: Path, bits: int | None, suffix: str) -> None:
    gray = PHOTO[..., 1].astype(np.uint16)
    deep = (gray.astype(float) / 255 * (2 ** (bits or 16) - 1)).round().astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"a{suffix}"), deep)
    read = read_image(tmp_path / f"a{suffix}", bits=bits)
    assert np.abs(read[..., 0].astype(int) - gray).max() <= 1
    assert (read[..., 0] == read[..., 2]).all()


@pytest.mark.parametrize("bits", [None, 12, 16])
@pytest.mark.parametrize("share", [0.5, 0.26, 0.0])
def test_a_dark_frame_of_a_camera_stays_dark(tmp_path: Path, bits: int | None, share: float) -> None:
    bright = np.linspace(0, 2 ** (bits or 16) - 1, 64 * 64).reshape(64, 64)
    for name, values in (("bright", bright), ("dark", share * bright)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), values.astype(np.uint16))
    read = [read_image(tmp_path / f"{name}.png", bits=bits).astype(float) for name in ("bright", "dark")]
    assert np.abs(read[1] - share * read[0]).max() <= 1


def test_gray_of_fewer_bits_than_its_format_is_refused_until_they_are_said(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.linspace(0, 4095, 400).reshape(20, 20).astype(np.uint16))
    with pytest.raises(DataError, match=r"4095 of 65535.*data\.bits"):
        read_image(path)
    assert read_image(path, bits=12).max() == 255
    with pytest.raises(DataError, match="more than 10 bits"):
        read_image(path, bits=10)


def test_a_tiff_may_say_how_many_bits_it_uses(tmp_path: Path) -> None:
    deep = np.linspace(0, 4000, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.tif", tiffinfo={281: 4095})
    assert read_image(tmp_path / "a.tif").max() == round(4000 / 4095 * 255)


@pytest.mark.parametrize(("values", "said"), [([0.1, np.nan], "not finite"), ([0.0, 900.0], "up to 900")])
def test_floats_without_a_scale(tmp_path: Path, values: list[float], said: str) -> None:
    Image.fromarray(np.tile(np.array(values, np.float32), (8, 8))).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=said):
        read_image(tmp_path / "a.tif")


def test_float_gray(tmp_path: Path) -> None:
    Image.fromarray((PHOTO[..., 1] / 255).astype(np.float32)).save(tmp_path / "a.tif")
    assert np.abs(read_image(tmp_path / "a.tif")[..., 1].astype(int) - PHOTO[..., 1]).max() <= 1


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 1), (8, 3)])
def test_exif_orientation(tmp_path: Path, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.rot90(PHOTO, turns)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert near(read_image(tmp_path / "a.jpg"), PHOTO)


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PHOTO).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\0" * 128 + b"DICM" + b"\0" * 100, "DICOM file without a picture"),
        (b"hello", "not an image EyeTune reads"),
        (jpeg()[:-2000], "damaged or cut short"),
        (jpeg()[:100], "damaged or cut short"),
        (png(20_000), "million pixels"),
        (b"GIF89a" + b"\0" * 50, "not an image EyeTune reads"),
    ],
    ids=["empty", "html", "lfs", "dicom", "text", "cut", "cut in the head", "huge", "gif"],
)
@pytest.mark.parametrize("short_side", [None, 8])
def test_what_cannot_be_read(tmp_path: Path, content: bytes, said: str, short_side: int | None) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read_image(path, short_side=short_side)
    assert str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "x.jpg")
    with pytest.raises(DataError, match="a folder, not an image"):
        read_image(tmp_path)
    with pytest.raises(DataError, match="cannot be opened"):
        read_image(tmp_path / "zero\0byte.jpg")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="a pipe or a device"):
        read_image(tmp_path / "a.jpg")


# Several pictures in one file


def test_a_preview_is_left_aside_and_a_stack_is_refused(tmp_path: Path) -> None:
    photo, other = Image.fromarray(PHOTO), Image.fromarray(PHOTO[::-1].copy())
    preview = photo.resize((80, 60))
    photo.save(tmp_path / "preview.tif", save_all=True, append_images=[preview])
    assert (read_image(tmp_path / "preview.tif") == PHOTO).all()
    photo.copy().save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=[other.copy()], quality=95)
    assert near(read_image(tmp_path / "camera.jpg"), PHOTO)
    for name in ("stack.tif", "stack.webp", "stack.png"):
        photo.save(tmp_path / name, save_all=True, append_images=[other])
        with pytest.raises(DataError, match="several pictures"):
            read_image(tmp_path / name)


# Small files that ask for much

WEIGH = """
import resource, sys, time
from pathlib import Path
from eyetune.data.photo import read_image
from eyetune.errors import DataError
for path in sys.argv[1:]:
    before = time.process_time()
    try:
        said = "read " + str(read_image(Path(path)).shape)
    except DataError as error:
        said = "refused: " + str(error)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
    print(time.process_time() - before, memory, said)
"""


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, int, str]]:
    """Processor seconds, peak of the memory so far in MB, and what was said, of every hostile file in turn."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, make in HOSTILE.items():
        (folder / name).write_bytes(make())
    # Through a shell: the peak of a process begins with that of the process it was forked from, here a large one.
    words = ["sh", "-c", '"$0" -c "$@"; true', sys.executable, WEIGH, *(str(folder / name) for name in HOSTILE)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    assert len(lines) == len(HOSTILE), done.stderr
    found = [line.split(" ", 2) for line in lines]
    return {name: (float(line[0]), int(line[1]), line[2]) for name, line in zip(HOSTILE, found, strict=True)}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.slow
def test_small_files_that_ask_for_much(weighed: dict[str, tuple[float, int, str]], name: str) -> None:
    seconds, megabytes, said = weighed[name]
    assert said == "read (64, 64, 3)" if name in HARMLESS else said.startswith("refused:")
    assert megabytes < 300
    assert seconds < 1  # of the processor; most take 0.02
