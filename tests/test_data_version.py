"""What becomes of a photograph is pinned: who changes it has to raise `fundus.VERSION`, or caches serve old pictures.

PYTHONPATH=src python tests/test_data_version.py --write     # after raising it
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from data_kit import save
from dicom_kit import write
from PIL import Image

from eyetune.data import fundus
from eyetune.data.fundus import VERSION, FundusSettings, load_square

GOLDEN = Path(__file__).parent / "golden"
PIXELS = 32

#: Gray levels. Other versions of OpenCV and Pillow, and other processors, round otherwise; contrast makes four of one.
MEAN, MOST = 0.4, 10.0


def drawn(height: int = 240, width: int = 320, radius: float = 100) -> npt.NDArray[np.uint8]:
    """uint8[height, width, 3]: a striped disc right of the middle on black, by arithmetic alone, so that it is the same
    picture everywhere and shows where every pixel went."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    x, y = (x - 0.53 * width) / radius, (y - 0.5 * height) / radius
    stripes = np.stack([150 + 60 * np.sin(17 * x), 100 + 50 * np.sin(13 * y), 70 + 40 * np.sin(11 * (x + y))], axis=-1)
    return np.where((np.hypot(x, y) <= 1)[..., None], stripes.round(), 2).astype(np.uint8)


def jpeg(path: Path, *, turned: bool = False) -> Path:
    """A photograph large enough to be decoded small; `turned`: with the EXIF mark of a camera held upright."""
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    Image.fromarray(drawn(960, 1280, 400)).save(path, quality=95, subsampling=0, exif=exif)
    return path


def deep(path: Path) -> Path:
    """Gray of twelve bits."""
    assert cv2.imwrite(str(path), drawn()[..., 1].astype(np.uint16) * 16)
    return path


def squares(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """uint8[32, 32, 3] by what was done: every setting, and the ways a file can be read."""
    gray = drawn()[..., 1].astype(np.uint16) * 16
    dicom = write(folder / "a.dcm", gray, BitsStored=12, HighBit=11, WindowCenter=2000, WindowWidth=3000)
    photo, small = save(folder / "photo.png", drawn()), save(folder / "small.jpg", drawn(1200, 1600, 300))
    made = {
        "pad": (photo, {}),
        "squash": (photo, {"fit": "squash"}),
        "no crop": (photo, {"crop": False}),
        "clahe": (photo, {"contrast": "clahe"}),
        "ben-graham": (photo, {"contrast": "ben-graham"}),
        "JPEG, decoded small": (jpeg(folder / "large.jpg"), {}),
        "JPEG, turned": (jpeg(folder / "turned.jpg", turned=True), {"crop": False}),
        "small field in a large JPEG": (small, {}),
        "12 bits": (deep(folder / "deep.png"), {"bits": 12}),
        "DICOM, 12 bits in a window": (dicom, {}),
    }
    return {
        name: load_square(path, FundusSettings(PIXELS, **{"fit": "pad", **chosen}))  # type: ignore[arg-type]
        for name, (path, chosen) in made.items()
    }


def test_a_square_looks_as_it_did_in_this_version(tmp_path: Path) -> None:
    file = GOLDEN / f"prepared-{VERSION}.png"
    assert file.is_file(), f"VERSION was raised: python {Path(__file__).name} --write draws {file.name}"
    kept = cv2.imread(str(file))[..., ::-1].astype(float)
    made = squares(tmp_path)
    assert kept.shape == (PIXELS, PIXELS * len(made), 3)
    for place, (name, square) in enumerate(made.items()):
        away = np.abs(kept[:, place * PIXELS : (place + 1) * PIXELS] - square)
        assert away.mean() <= MEAN and away.max() <= MOST, (  # noqa: PT018 - one message
            f"{name}: a prepared square is not what it was, {away.mean():.2f} gray levels on average and "
            f"{away.max():.0f} at most. Where that is meant, raise VERSION in eyetune/data/fundus.py, or caches go on "
            f"serving the old squares; then python tests/{Path(__file__).name} --write, and look at the picture."
        )


@pytest.mark.parametrize("change", ["one pixel", "a shade"])
def test_a_small_change_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """The comparison can fail: a field of view one pixel narrower, or everything one gray level brighter."""
    find, prepare = fundus.find_field, fundus.prepare
    if change == "one pixel":
        monkeypatch.setattr(fundus, "find_field", lambda image: replace(find(image), left=find(image).left + 1))
    else:
        monkeypatch.setattr(fundus, "prepare", lambda *given: np.minimum(prepare(*given), 254) + 1)
    with pytest.raises(AssertionError, match="raise VERSION"):
        test_a_square_looks_as_it_did_in_this_version(tmp_path)


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    target = GOLDEN / f"prepared-{VERSION}.png"
    if target.exists():
        sys.exit(f"{target.name} is there already: raise VERSION in eyetune/data/fundus.py first.")
    with tempfile.TemporaryDirectory() as name:
        save(target, np.hstack(list(squares(Path(name)).values())))
    for old in set(GOLDEN.glob("prepared-*.png")) - {target}:
        old.unlink()
