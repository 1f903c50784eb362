"""Finding the field of view, preparing the square."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from data_kit import PREPROCESS, fundus, save

from eyetune.data import fundus as room
from eyetune.data.config import DataConfig
from eyetune.data.fundus import Field, FundusSettings, find_field, load_square, prepare
from eyetune.data.photo import read_image

PHOTO = fundus(seed=3)


def near(got: np.ndarray, wanted: np.ndarray, tolerance: float = 3.0) -> bool:
    return got.shape == wanted.shape and float(np.abs(got.astype(float) - wanted).mean()) <= tolerance


# The field of view


def box(field: Field) -> tuple[int, int, int, int]:
    return field.left, field.top, field.right, field.bottom


def assert_box(photo: np.ndarray, wanted: tuple[int, int, int, int], tolerance: int = 4) -> None:
    got = box(find_field(photo))
    assert all(abs(a - b) <= tolerance for a, b in zip(got, wanted, strict=True)), (got, wanted)


@pytest.mark.parametrize("surround", [(0, 0, 0), (12, 10, 8), (128, 128, 128), (255, 255, 255), (60, 60, 64)])
def test_field_on_any_surround(surround: tuple[int, int, int]) -> None:
    assert_box(fundus(surround=surround, centre=(150, 120)), (50, 20, 250, 220))


@pytest.mark.parametrize("brightness", [1.0, 0.5, 0.25, 0.12])
def test_field_of_dark_photographs(brightness: float) -> None:
    assert_box(fundus(brightness=brightness), (60, 20, 260, 220), 7)


def test_field_cut_off_above_and_below() -> None:
    assert_box(fundus(160, 320, radius=120), (40, 0, 280, 160))


def test_field_of_a_large_photograph() -> None:
    assert_box(fundus(1200, 1600, radius=520), (280, 80, 1320, 1120), 14)


def test_printed_date_is_not_the_field() -> None:
    photo = fundus(radius=80)
    cv2.putText(photo, "2026-11-20", (2, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1)
    cv2.rectangle(photo, (300, 220), (318, 238), (255, 255, 255), -1)
    assert_box(photo, (80, 40, 240, 200))


@pytest.mark.parametrize(
    "photo",
    [
        fundus(radius=400),
        np.full((100, 120, 3), (150, 60, 30), np.uint8),
        np.zeros((100, 120, 3), np.uint8),
        np.full((100, 120, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (100, 120, 3)).astype(np.uint8),
        np.random.default_rng(0).integers(0, 5, (100, 120, 3)).astype(np.uint8),
        np.zeros((1, 400, 3), np.uint8),
        np.zeros((11, 16, 3), np.uint8),
    ],
    ids=["disc crop", "flat colour", "black", "white", "noise", "dark noise", "one row", "tiny"],
)
def test_whole_image_where_there_is_no_surround(photo: np.ndarray) -> None:
    assert box(find_field(photo)) == (0, 0, photo.shape[1], photo.shape[0])


def test_a_single_spot_is_no_field() -> None:
    photo = np.zeros((200, 200, 3), np.uint8)
    cv2.circle(photo, (60, 60), 20, (255, 255, 255), -1)
    assert box(find_field(photo)) == (0, 0, 200, 200)


# The square


def test_pad_keeps_the_shape_and_squash_fills_the_square() -> None:
    photo = fundus(160, 320, radius=120)
    padded = prepare(photo, FundusSettings(96, fit="pad"))
    assert padded.shape == (96, 96, 3)
    assert (padded[:14] == 0).all()
    assert (padded[-14:] == 0).all()
    assert padded[20:76].mean() > 50
    squashed = prepare(photo, FundusSettings(96, fit="squash"))
    assert squashed.shape == (96, 96, 3)
    assert squashed[:8, 30:60].mean() > 50


def test_crop_is_a_setting() -> None:
    photo = fundus(radius=60)
    assert (prepare(photo, FundusSettings(64, crop=True)) > 30).mean() > 1.5 * (
        prepare(photo, FundusSettings(64, crop=False)) > 30
    ).mean()


@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (11, 16), (1, 1), (33, 32)])
@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("contrast", ["none", "clahe", "ben-graham"])
def test_any_shape_becomes_a_square(shape: tuple[int, int], fit: str, contrast: str) -> None:
    photo = np.full((*shape, 3), 90, np.uint8)
    made = prepare(photo, FundusSettings(32, fit=fit, contrast=contrast))  # type: ignore[arg-type]
    assert made.shape == (32, 32, 3)
    assert made.dtype == np.uint8


def test_contrast_lifts_detail_and_leaves_the_surround() -> None:
    photo = fundus(400, 400, radius=190, brightness=0.4)
    plain = prepare(photo, FundusSettings(128))
    inside = np.hypot(*(np.mgrid[:128, :128] - 63.5)) < 50
    corner = (slice(0, 8), slice(0, 8))
    for contrast, surround in (("clahe", 0), ("ben-graham", 128)):
        made = prepare(photo, FundusSettings(128, contrast=contrast))  # type: ignore[arg-type]
        assert made[inside].std() > plain[inside].std() or contrast == "ben-graham"
        assert (made[corner] == surround).all()
        detail = [cv2.Laplacian(image[..., 1], cv2.CV_32F)[inside].std() for image in (made, plain)]
        assert detail[0] > 1.3 * detail[1]


def test_file_and_array_give_the_same_square(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", PHOTO)
    settings = FundusSettings(64)
    assert (load_square(path, settings) == prepare(PHOTO, settings)).all()


def test_scaled_decoding_changes_next_to_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", fundus(960, 1280, radius=450))
    settings = FundusSettings(96)
    assert near(load_square(path, settings), prepare(read_image(path), settings), 2.5)


def test_a_small_field_is_not_enlarged_from_a_scaled_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(
        room,
        "read_image",
        lambda path, short_side=None, bits=None: asked.append(short_side) or read_image(path, short_side=short_side),
    )
    load_square(save(tmp_path / "a.jpg", fundus(960, 1280, radius=160)), FundusSettings(200))
    load_square(save(tmp_path / "b.jpg", fundus(960, 1280, radius=450)), FundusSettings(200))
    assert asked == [300, None, 300]


def test_settings_come_from_data_and_backbone_and_survive_json() -> None:
    settings = FundusSettings.of(DataConfig(table="t.csv"), PREPROCESS)
    assert settings == FundusSettings(32, "pad", True, "none", None)
    squashing = SimpleNamespace(pixels=392, fit="squash")
    assert FundusSettings.of(DataConfig(table="t.csv"), squashing).fit == "squash"  # type: ignore[arg-type]
    settings = FundusSettings.of(DataConfig(table="t", fit="pad", crop=False, contrast="clahe", bits=12), squashing)  # type: ignore[arg-type]
    assert settings == FundusSettings(392, "pad", False, "clahe", 12)
    assert FundusSettings.from_dict(settings.to_dict()) == settings
