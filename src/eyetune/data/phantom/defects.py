"""Faults planted in a finished cohort, as the ground truth that an audit is tested against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from eyetune.data.phantom.plan import patient_name
from eyetune.errors import UserError, did_you_mean

DEFECTS = (
    "duplicates",
    "near_duplicates",
    "patient_leaks",
    "truncated",
    "mislabelled",
    "reencoded",
    "conflicts",
    "blank",
    "missing",
    "out_of_range",
)
"""What can be planted. Under another patient, in any split: byte copies; altered copies; the same pixels as PNG; byte
copies with another grade. Beside these: a patient in two splits; files cut short, black, or not there; wrong grades in
the table, and a grade that no scale has."""

Row = dict[str, Any]
Image = NDArray[np.uint8]


def check_defects(defects: Mapping[str, int] | None, splits: Mapping[str, float] | None) -> dict[str, int]:
    """The defects to plant, or a UserError."""
    wanted = {kind: int(count) for kind, count in (defects or {}).items()}
    for kind, count in wanted.items():
        if kind not in DEFECTS:
            raise UserError(f"There is no defect {kind!r}.{did_you_mean(kind, DEFECTS)} Known: {', '.join(DEFECTS)}.")
        if count < 0:
            raise UserError(f"The number of {kind} cannot be negative; got {count}.")
    if wanted.get("patient_leaks") and len(splits or {}) < 2:
        raise UserError("patient_leaks puts a patient in two splits: ask for two or more splits as well.")
    return {kind: wanted[kind] for kind in DEFECTS if wanted.get(kind)}


def plant(folder: Path, rows: list[Row], wanted: Mapping[str, int], *, seed: int, new_patient: int) -> list[Row]:
    """Plant the `wanted` defects in the images of `folder` and in `rows` (changed and extended in place).

    No image has two defects. Copies belong to patients numbered from `new_patient` on.

    Returns:
        The ground truth, one entry a defect: `kind`, `images` (file names), `patients`, and what was done.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 77]))
    victims = _victims(rng, rows, wanted)
    truth: list[Row] = []
    for kind, chosen in victims.items():
        for row in chosen:
            if kind in _COPIES or kind == "near_duplicates":
                how, change, suffix = _COPIES.get(kind) or (*_altered_by(new_patient), None)
                truth.append(
                    _copy(rng, folder, rows, row, patient=new_patient, kind=kind, how=how, change=change, suffix=suffix)
                )
                new_patient += 1
            else:
                truth.append(_SPOILT[kind](rng, folder, rows, row))
    rows.sort(key=lambda row: str(row["image"]))
    return truth


def _victims(rng: np.random.Generator, rows: list[Row], wanted: Mapping[str, int]) -> dict[str, list[Row]]:
    """Rows for each kind of defect, no patient for two of them."""
    patients = [str(p) for p in rng.permutation(sorted({row["patient"] for row in rows}))]
    if sum(wanted.values()) > len(patients):
        raise UserError(
            f"{sum(wanted.values())} defects need as many patients, one each; there are {len(patients)}. "
            "Ask for more patients or fewer defects."
        )
    chosen: dict[str, list[Row]] = {}
    for kind, count in wanted.items():
        picked, patients = patients[:count], patients[count:]
        chosen[kind] = []
        for patient in picked:
            own = [row for row in rows if row["patient"] == patient]
            chosen[kind].append(own[int(rng.integers(len(own)))])
    return chosen


def _copy(
    rng: np.random.Generator,
    folder: Path,
    rows: list[Row],
    row: Row,
    *,
    patient: int,
    kind: str,
    how: str,
    change: Callable[[bytes], bytes],
    suffix: str | None,
) -> Row:
    new = dict(row, patient=patient_name(patient))
    new["image"] = str(row["image"]).replace(str(row["patient"]), str(new["patient"]))
    if suffix is not None:
        new["image"] = str(Path(new["image"]).with_suffix(suffix))
    if "split" in row:
        splits = sorted({str(other["split"]) for other in rows})
        new["split"] = splits[int(rng.integers(len(splits)))]
    entry = {"kind": kind, "images": [row["image"], new["image"]], "patients": [row["patient"], new["patient"]],
             "change": how}  # fmt: skip
    if kind == "conflicts":
        new["dr_grade"] = (int(row["dr_grade"]) + 2) % 5
        entry["written"] = [row["dr_grade"], new["dr_grade"]]
    (folder / new["image"]).write_bytes(change((folder / row["image"]).read_bytes()))
    rows.append(new)
    return entry


def _leak(rng: np.random.Generator, folder: Path, rows: list[Row], row: Row) -> Row:
    own = [other for other in rows if other["patient"] == row["patient"]]
    others = sorted({str(other["split"]) for other in rows} - {str(row["split"])})
    if not others:
        raise UserError("patient_leaks needs images in two splits: ask for more patients.")
    row["split"] = others[int(rng.integers(len(others)))]
    return {
        "kind": "patient_leaks",
        "images": [other["image"] for other in own],
        "patients": [row["patient"]],
        "splits": [other["split"] for other in own],
    }


def _truncate(rng: np.random.Generator, folder: Path, rows: list[Row], row: Row) -> Row:
    path = folder / row["image"]
    content = path.read_bytes()
    kept = int(len(content) * rng.uniform(0.3, 0.7))
    path.write_bytes(content[:kept])
    return {"kind": "truncated", "images": [row["image"]], "patients": [row["patient"]],
            "bytes": [len(content), kept]}  # fmt: skip


def _mislabel(rng: np.random.Generator, folder: Path, rows: list[Row], row: Row) -> Row:
    true = int(row["dr_grade"])
    wrong = [grade for grade in range(5) if abs(grade - true) >= 2]
    row["dr_grade"] = wrong[int(rng.integers(len(wrong)))]
    return {"kind": "mislabelled", "images": [row["image"]], "patients": [row["patient"]],
            "true": true, "written": row["dr_grade"]}  # fmt: skip


def _blank(rng: np.random.Generator, folder: Path, rows: list[Row], row: Row) -> Row:
    path = folder / row["image"]
    path.write_bytes(_altered(path.read_bytes(), 92, np.zeros_like))
    return {"kind": "blank", "images": [row["image"]], "patients": [row["patient"]]}


def _remove(rng: np.random.Generator, folder: Path, rows: list[Row], row: Row) -> Row:
    (folder / row["image"]).unlink()
    return {"kind": "missing", "images": [row["image"]], "patients": [row["patient"]]}


def _beyond(rng: np.random.Generator, folder: Path, rows: list[Row], row: Row) -> Row:
    true = int(row["dr_grade"])
    row["dr_grade"] = (-1, 9, 44)[int(rng.integers(3))]
    return {"kind": "out_of_range", "images": [row["image"]], "patients": [row["patient"]],
            "true": true, "written": row["dr_grade"]}  # fmt: skip


def _same_bytes(content: bytes) -> bytes:
    return content


def _as_png(content: bytes) -> bytes:
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return bytes(cv2.imencode(".png", np.asarray(image, np.uint8))[1])


def _altered(content: bytes, quality: int, change: Callable[[Image], Image]) -> bytes:
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return bytes(cv2.imencode(".jpg", change(np.asarray(image, np.uint8)), [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _smaller(image: Image, share: float) -> Image:
    size = (round(image.shape[1] * share), round(image.shape[0] * share))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _cropped(image: Image, share: float) -> Image:
    border = max(2, round(share * min(image.shape[:2])))
    return np.ascontiguousarray(image[border:-border, border:-border])


_ALTERATIONS: dict[str, Callable[[bytes], bytes]] = {
    "resized to four fifths": lambda content: _altered(content, 92, lambda i: _smaller(i, 0.8)),
    "recompressed at JPEG quality 45": lambda content: _altered(content, 45, lambda image: image),
    "border cropped": lambda content: _altered(content, 92, lambda i: _cropped(i, 0.03)),
    "flipped left to right": lambda content: _altered(content, 92, lambda i: np.ascontiguousarray(i[:, ::-1])),
    "flipped top to bottom": lambda content: _altered(content, 92, lambda i: np.ascontiguousarray(i[::-1])),
    "resized to half": lambda content: _altered(content, 92, lambda i: _smaller(i, 0.5)),
    "border of 6 % cropped": lambda content: _altered(content, 92, lambda i: _cropped(i, 0.06)),
    "flipped left to right, resized, recompressed": lambda content: _altered(
        content, 60, lambda i: _smaller(np.ascontiguousarray(i[:, ::-1]), 0.7)
    ),
}

_COPIES: dict[str, tuple[str, Callable[[bytes], bytes], str | None]] = {
    "duplicates": ("the same bytes", _same_bytes, None),
    "conflicts": ("the same bytes", _same_bytes, None),
    "reencoded": ("the same pixels as PNG", _as_png, ".png"),
}

_SPOILT: dict[str, Callable[[np.random.Generator, Path, list[Row], Row], Row]] = {
    "patient_leaks": _leak,
    "truncated": _truncate,
    "mislabelled": _mislabel,
    "blank": _blank,
    "missing": _remove,
    "out_of_range": _beyond,
}


def _altered_by(number: int) -> tuple[str, Callable[[bytes], bytes]]:
    """The alterations in turn."""
    return list(_ALTERATIONS.items())[number % len(_ALTERATIONS)]
