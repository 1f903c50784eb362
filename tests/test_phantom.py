"""Synthetic eyes: what the labels say is what the pixels show."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from eyetune.data.phantom import (
    CAMERAS,
    DEFECTS,
    LESIONS,
    EyePlan,
    Lesion,
    describe,
    draw_eye,
    grade_of,
    photograph,
    plan_patient,
    sample,
    write_cohort,
)
from eyetune.data.phantom.anatomy import QUADRANTS, quadrant_of, vessel_tree
from eyetune.data.phantom.camera import field_diameter
from eyetune.data.phantom.caption import _NOUNS
from eyetune.errors import UserError
from eyetune.verbs.data import synth

PIXELS = 320


def only(grade: int) -> list[float]:
    return [float(g == grade) for g in range(5)]


def lesion(kind: str, quadrant: str = "superonasal") -> Lesion:
    return Lesion(kind, 0.4, 0.4, 0.02, 0.0, quadrant, 0)


def bleeding(each: int) -> list[Lesion]:
    return [lesion("blot_haemorrhage", q) for q in QUADRANTS for _ in range(each)]


# --- the scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lesions", "grade"),
    [
        ([], 0),
        ([lesion("laser_scar")] * 50, 0),
        ([lesion("microaneurysm")] * 30, 1),
        ([lesion("microaneurysm"), lesion("hard_exudate")], 2),
        ([lesion("cotton_wool_spot")], 2),
        ([lesion("blot_haemorrhage", "superonasal")] * 80, 2),
        (bleeding(19), 2),
        (bleeding(19) + [lesion("flame_haemorrhage", q) for q in QUADRANTS], 3),
        (bleeding(20), 3),
        (bleeding(20)[:-1], 2),
        ([lesion("venous_beading", "superonasal")] * 2, 2),
        ([lesion("venous_beading", "superonasal"), lesion("venous_beading", "inferonasal")], 3),
        ([lesion("irma")], 3),
        ([*bleeding(25), lesion("nve")], 4),
        ([lesion("nvd")], 4),
        ([lesion("preretinal_haemorrhage")], 4),
    ],
)
def test_the_international_scale(lesions: list[Lesion], grade: int) -> None:
    assert grade_of(lesions) == grade


@pytest.mark.slow
def test_every_plan_has_the_grade_its_lesions_give() -> None:
    seen = []
    for patient in range(400):
        pair = plan_patient(7, patient)
        for plan in pair:
            assert grade_of(plan.lesions) == plan.grade, plan.name
            seen.append(plan.grade)
        assert abs(pair[0].grade - pair[1].grade) <= 1
    shares = np.bincount(seen, minlength=5) / len(seen)
    assert np.abs(shares - (0.30, 0.15, 0.25, 0.15, 0.15)).max() < 0.08
    for grade in range(5):
        for patient in range(120):
            for plan in plan_patient(8, patient, grades=only(grade)):
                assert plan.grade == grade_of(plan.lesions) == grade, plan.name


def test_lesions_keep_off_disc_and_fovea_and_inside_the_field() -> None:
    for patient in range(60):
        plan = plan_patient(3, patient, grades=only(2 + patient % 3))[0]
        for spot in plan.lesions:
            if spot.kind in ("nvd", "venous_beading"):
                continue
            assert np.hypot(spot.x - plan.disc.x, spot.y - plan.disc.y) > plan.disc.diameter / 2 + spot.size / 2
            assert np.hypot(spot.x - plan.fovea[0], spot.y - plan.fovea[1]) > spot.size / 2
            assert np.hypot(spot.x - 0.5, spot.y - 0.5) + spot.size / 2 < 0.4
            assert spot.quadrant == quadrant_of(spot.x, spot.y, plan.fovea)


# --- anatomy, measured in the pixels -----------------------------------------------------------------------------


def bright_spot(image: np.ndarray) -> tuple[float, float]:
    """Where the brightest patch of a picture lies, 0..1."""
    green = cv2.GaussianBlur(image[..., 1], (0, 0), 0.02 * image.shape[0])
    y, x = np.unravel_index(int(green.argmax()), green.shape)
    return float(x) / image.shape[1], float(y) / image.shape[0]


@pytest.mark.parametrize("patient", range(4))
def test_disc_and_fovea_lie_on_their_side(patient: int) -> None:
    for plan in plan_patient(1, patient, grades=only(0)):
        facts, drawn = plan.facts(), draw_eye(plan, PIXELS)
        nasal = facts["disc"][0] > 0.5
        assert nasal == (plan.eye == "R")
        assert (facts["fovea"][0] < facts["disc"][0]) == (plan.eye == "R")
        assert facts["fovea"][1] > facts["disc"][1], "the fovea lies below the disc's centre"
        apart = np.hypot(facts["fovea"][0] - facts["disc"][0], facts["fovea"][1] - facts["disc"][1])
        assert 2.3 < apart / facts["disc_diameter"] < 2.7
        assert np.hypot(*np.subtract(bright_spot(drawn.image), facts["disc"])) < 0.05, "the disc is the brightest"
        macula, around = (
            float(np.median(patch(drawn.image, facts["fovea"][0], y, 0.02)[..., 1]))
            for y in (facts["fovea"][1], facts["fovea"][1] + 0.16)
        )
        assert macula < 0.85 * around, "the macula is darker than the retina below it"


def patch(image: np.ndarray, x: float, y: float, half: float) -> np.ndarray:
    n = image.shape[0]
    return image[int((y - half) * n) : int((y + half) * n), int((x - half) * n) : int((x + half) * n)]


def height(mask: np.ndarray) -> int:
    rows = np.flatnonzero((mask > 127).any(axis=1))
    return int(rows[-1] - rows[0] + 1)


@pytest.mark.parametrize("vcdr", [0.3, 0.45, 0.6, 0.7, 0.85])
def test_cup_disc_ratio_of_masks_and_pixels(vcdr: float) -> None:
    plan = plan_patient(4, 2, grades=only(0), vcdr=vcdr)[0]
    drawn = draw_eye(plan, 1200, masks=True)
    assert drawn.cup is not None
    assert drawn.disc is not None
    assert height(drawn.cup) / height(drawn.disc) == pytest.approx(vcdr, abs=0.02)
    assert plan.glaucoma == (vcdr >= 0.65)
    # In the picture: the cup is the paler part of the disc.
    half = plan.disc.diameter / 2
    x, w, y, h = plan.disc.x + half * plan.disc.cup_dx, 0.35 * vcdr * half, plan.disc.y, 0.96 * half
    band = drawn.image[int((y - h) * 1200) : int((y + h) * 1200), int((x - w) * 1200) : int((x + w) * 1200), 2]
    profile = np.percentile(band, 85, axis=1)  # between the vessels
    pale = np.flatnonzero(profile > (np.percentile(profile, 4) + np.percentile(profile, 90)) / 2)
    assert (pale[-1] - pale[0] + 1) / (2 * half * 1200) == pytest.approx(vcdr, abs=0.05)


def test_no_ratio_near_the_threshold() -> None:
    ratios = np.array([plan.vcdr for patient in range(300) for plan in plan_patient(2, patient, grades=only(0))])
    assert not ((ratios > 0.56) & (ratios < 0.69)).any()
    assert 0.1 < (ratios >= 0.65).mean() < 0.3


def test_veins_are_wider_and_darker_than_arteries() -> None:
    plan = plan_patient(1, 1, grades=only(0))[0]
    tree = vessel_tree(plan.traits, plan.disc, plan.fovea, plan.shared_seed, plan.own_seed)
    calibre = {
        artery: np.mean([v.widths[10:40].mean() for v in tree if v.order == 0 and v.artery == artery])
        for artery in (True, False)
    }
    assert 0.6 < calibre[True] / calibre[False] < 0.76
    drawn = draw_eye(plan, 800, masks=True)
    arteries, veins = drawn.arteries, drawn.veins
    assert arteries is not None
    assert veins is not None
    # The radius of the largest disc that fits into the vessels: measured on the mask, not on the plan.
    radius = {name: cv2.distanceTransform((m > 127).astype(np.uint8), cv2.DIST_L2, 5) for name, m in
              (("artery", arteries), ("vein", veins))}  # fmt: skip
    assert np.percentile(radius["artery"][radius["artery"] > 1], 95) < 0.85 * np.percentile(
        radius["vein"][radius["vein"] > 1], 95
    )
    red = {
        "artery": drawn.image[(radius["artery"] > 1) & (veins == 0)].mean(axis=0),
        "vein": drawn.image[(radius["vein"] > 1) & (arteries == 0)].mean(axis=0),
    }
    assert red["vein"][0] < red["artery"][0] - 10
    assert red["vein"][1] < red["artery"][1] - 8


def test_vessels_narrow_towards_their_ends_and_spare_the_fovea() -> None:
    for patient in range(5):
        plan = plan_patient(6, patient, grades=only(0))[0]
        tree = vessel_tree(plan.traits, plan.disc, plan.fovea, plan.shared_seed, plan.own_seed)
        assert len(tree) > 80
        means = [np.mean([v.widths.mean() for v in tree if v.order == order]) for order in range(3)]
        assert means[0] > means[1] > means[2]
        points = np.concatenate([v.points for v in tree if v.order > 0])
        assert np.hypot(points[:, 0] - plan.fovea[0], points[:, 1] - plan.fovea[1]).min() > 0.04


def test_two_eyes_of_a_patient_resemble_each_other() -> None:
    def arcade(plan: EyePlan) -> np.ndarray:
        tree = vessel_tree(plan.traits, plan.disc, plan.fovea, plan.shared_seed, plan.own_seed)
        return np.concatenate([v.points - (plan.disc.x, plan.disc.y) for v in tree[:4]])

    pairs = [plan_patient(1, patient) for patient in range(12)]
    own = np.mean([np.abs(arcade(right) - arcade(left)).mean() for right, left in pairs])
    other = np.mean([np.abs(arcade(a[0]) - arcade(b[0])).mean() for a, b in itertools.pairwise(pairs)])
    assert own < 0.75 * other
    assert all(right.traits == left.traits for right, left in pairs)
    assert not np.array_equal(draw_eye(pairs[0][0], 128).image, draw_eye(pairs[0][1], 128).image[:, ::-1])


# --- lesions in the pixels ---------------------------------------------------------------------------------------


def test_counts_in_the_masks_equal_the_facts() -> None:
    for patient in range(3):
        plan = plan_patient(1, patient, grades=only(1))[patient % 2]
        drawn = draw_eye(plan, 700, masks=True)
        found = cv2.connectedComponents((drawn.lesions["microaneurysm"] > 100).astype(np.uint8))[0] - 1
        assert found == plan.facts()["counts"]["microaneurysm"] == len(plan.lesions)
        for spot in plan.facts()["lesions"]:
            assert drawn.lesions["microaneurysm"][int(spot["y"] * 700), int(spot["x"] * 700)] > 200


def test_microaneurysms_are_seen_at_512_and_at_224() -> None:
    plan = plan_patient(1, 5, grades=only(1))[0]
    for spot in plan.lesions:
        assert 3 <= spot.size * 512 <= 6
    image = draw_eye(plan, 512).image
    for pixels, contrast in ((512, 25), (224, 8)):
        small = cv2.resize(image, (pixels, pixels), interpolation=cv2.INTER_AREA)[..., 1].astype(float)
        for spot in plan.lesions:
            x, y = int(spot.x * pixels), int(spot.y * pixels)
            window = small[y - 6 : y + 7, x - 6 : x + 7]
            centre = small[y - 1 : y + 2, x - 1 : x + 2].min()
            assert centre < np.median(window) - contrast, (pixels, spot)


def test_dark_lesions_darken_and_bright_ones_brighten() -> None:
    for kind, grade, sign in (
        ("blot_haemorrhage", 3, -1),
        ("flame_haemorrhage", 3, -1),
        ("preretinal_haemorrhage", 4, -1),
        ("hard_exudate", 2, 1),
        ("cotton_wool_spot", 2, 1),
        ("laser_scar", 4, 1),
    ):
        plan = next(p for n in range(60) for p in plan_patient(1, n, grades=only(grade))
                    if kind in {s.kind for s in p.lesions})  # fmt: skip
        drawn = draw_eye(plan, 512, masks=True)
        green = drawn.image[..., 1].astype(float)
        mask = drawn.lesions[kind] > 100
        ring = cv2.dilate(drawn.lesions[kind], np.ones((15, 15), np.uint8)) == 0
        assert sign * (green[mask].mean() - np.median(green[ring])) > 8, kind


def test_every_lesion_is_in_every_photograph() -> None:
    for patient, camera in enumerate(CAMERAS):
        taken = sample(5, patient, "L", camera, (400, 300), masks=True, grades=only(4))
        present = {kind for kind, count in taken.facts["counts"].items() if count}
        assert present <= set(taken.masks)
        lit = taken.image.max(axis=2) > 25
        for kind in present:
            inside = taken.masks[kind] > 60
            assert inside.any(), kind
            assert lit[inside].mean() > 0.97, kind


def test_venous_beading_shows_in_the_veins_of_its_quadrants() -> None:
    plan = next(
        p for n in range(60) for p in plan_patient(2, n, grades=only(3)) if p.facts()["counts"]["venous_beading"]
    )
    plain = replace(plan, lesions=tuple(s for s in plan.lesions if s.kind != "venous_beading"))
    drawn, smooth = draw_eye(plan, 600, masks=True), draw_eye(plain, 600, masks=True)
    assert drawn.veins is not None
    assert smooth.veins is not None
    changed = np.abs(drawn.veins.astype(int) - smooth.veins) > 60
    around = cv2.dilate(drawn.lesions["venous_beading"], np.ones((9, 9), np.uint8)) > 0
    assert (changed & around).sum() > 0.97 * changed.sum()
    y, x = np.nonzero(changed)
    canonical = x / 600 if plan.eye == "R" else 1 - x / 600
    for quadrant in QUADRANTS:
        here = [quadrant_of(a, b, plan.fovea) == quadrant for a, b in zip(canonical, y / 600, strict=True)]
        beaded = any(s.kind == "venous_beading" and s.quadrant == quadrant for s in plan.lesions)
        assert sum(here) > 40 if beaded else sum(here) < 10, quadrant


# --- captions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grade", range(5))
def test_caption_says_the_facts(grade: int) -> None:
    for patient in range(15):
        for plan in plan_patient(9, patient, grades=only(grade)):
            text, facts = describe(plan), plan.facts()
            assert f"{'right' if plan.eye == 'R' else 'left'} eye" in text
            assert f"ratio is {plan.vcdr:.2f}" in text
            assert f"(grade {grade})" in text
            for kind in LESIONS:
                if kind == "venous_beading":
                    assert ("Venous beading" in text) == bool(facts["counts"][kind])
                    continue
                said = re.findall(rf"(\d+) (?:{'|'.join(_NOUNS[kind])})\b([^.]*)\.", text)
                assert sum(int(number) for number, _ in said) == facts["counts"][kind], (kind, text)
                for number, where in said:
                    parts = [int(n) for n in re.findall(r"(\d+) \w+(?:nasal|temporal)", where)]
                    assert not parts or sum(parts) == int(number)


# --- cameras -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shots() -> dict[str, np.ndarray]:
    plan = plan_patient(1, 3, grades=only(0))[0]
    eye = draw_eye(plan, PIXELS)
    return {name: photograph(eye, camera, np.random.default_rng(0), 300, 300) for name, camera in CAMERAS.items()}


def test_black_outside_the_field(shots: dict[str, np.ndarray]) -> None:
    y, x = np.mgrid[:300, :300]
    radius = np.hypot(x - 149.5, y - 149.5)
    for name, shot in shots.items():
        half = field_diameter(CAMERAS[name], 300, 300) / 2
        assert shot[radius > 1.05 * half].max() == 0, name
        inside = (radius < 0.8 * half) & (np.abs(y - 149.5) < 0.75 * CAMERAS[name].cut * half)
        assert shot[inside].max(axis=-1).min() > 20, name


def test_cameras_differ_measurably(shots: dict[str, np.ndarray]) -> None:
    centre = {name: shot[100:200, 100:200].astype(float) for name, shot in shots.items()}
    ratio = {name: c[..., 0].mean() / c[..., 1].mean() for name, c in centre.items()}
    assert ratio["legacy"] < 0.8 * ratio["clinic"] < 0.9 * ratio["handheld"]
    lit = {name: float((shot.max(axis=2) > 20).mean()) for name, shot in shots.items()}
    assert lit["legacy"] < 0.9 * lit["clinic"]
    assert shots["handheld"][:15].max() == 0, "the hand-held camera cuts the field above and below"
    assert shots["clinic"][15].max() > 40
    noise = {name: float(np.std(c[..., 1] - cv2.GaussianBlur(c[..., 1], (0, 0), 1))) for name, c in centre.items()}
    assert noise["handheld"] > 1.3 * noise["clinic"]
    contrast = {
        name: float(np.std(cv2.GaussianBlur(shot, (0, 0), 2)[100:200, 150:270, 1])) for name, shot in shots.items()
    }
    assert contrast["legacy"] < 0.85 * contrast["clinic"]


@pytest.mark.parametrize("size", [(64, 64), (96, 200), (200, 96), (640, 480)])
@pytest.mark.parametrize("camera", list(CAMERAS))
def test_any_shape(size: tuple[int, int], camera: str) -> None:
    image = sample(1, 1, "R", camera, size).image
    assert image.shape == (size[1], size[0], 3)
    assert image.dtype == np.uint8
    assert image[0, 0].max() == 0
    assert image[size[1] // 2, size[0] // 2].max() > 40


def test_same_eye_at_another_size() -> None:
    small = sample(1, 4, "L", "clinic", 256, grades=only(3)).image.astype(float)
    large = sample(1, 4, "L", "clinic", 768, grades=only(3)).image
    shrunk = cv2.resize(large, (256, 256), interpolation=cv2.INTER_AREA).astype(float)
    assert np.corrcoef(small[..., 1].ravel(), shrunk[..., 1].ravel())[0, 1] > 0.985
    other = sample(1, 5, "L", "clinic", 256, grades=only(3)).image.astype(float)
    assert np.abs(small - shrunk).mean() < 0.5 * np.abs(small - other).mean()


# --- cohorts -----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_bytes_for_one_and_two_workers(tmp_path: Path) -> None:
    options = {
        "patients": 3,
        "seed": 3,
        "size": 128,
        "cameras": ("clinic", "legacy"),
        "splits": {"train": 2, "test": 1},
    }
    seen: list[tuple[int, int]] = []
    write_cohort(tmp_path / "one", workers=1, progress=lambda done, total: seen.append((done, total)), **options)
    write_cohort(tmp_path / "two", workers=2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert seen == [(2, 6), (4, 6), (6, 6)]
    write_cohort(tmp_path / "other", **{**options, "seed": 4})
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_a_patient_does_not_depend_on_the_cohort(tmp_path: Path) -> None:
    write_cohort(tmp_path / "a", patients=3, size=96)
    write_cohort(tmp_path / "b", patients=1, size=96, first_patient=3)
    name = "images/P00003_L_clinic.jpg"
    assert contents(tmp_path / "a")[name] == contents(tmp_path / "b")[name]


def test_table_tells_the_truth(tmp_path: Path) -> None:
    summary = write_cohort(tmp_path / "eyes", patients=4, size=(160, 120), every_camera=True, cameras=list(CAMERAS))
    table = pd.read_csv(summary.table)
    assert list(table) == ["image", "patient", "eye", "camera", "dr_grade", "vcdr", "glaucoma", "caption"]
    assert len(table) == summary.images == 4 * 2 * 3 == len(list(summary.folder.iterdir()))
    for row in table.itertuples():
        plan = plan_patient(0, int(row.patient[1:]))["RL".index(row.eye)]
        assert (row.dr_grade, row.vcdr, row.glaucoma) == (plan.grade, plan.vcdr, int(plan.glaucoma))
        assert row.caption == describe(plan)
        assert row.image == f"{row.patient}_{row.eye}_{row.camera}.jpg"
        assert cv2.imread(str(summary.folder / row.image)).shape == (120, 160, 3)
    assert np.bincount(table.dr_grade, minlength=5).tolist() == list(summary.grades)


def test_defects_planted_are_the_defects_listed(tmp_path: Path) -> None:
    splits = {"train": 0.6, "val": 0.2, "test": 0.2}
    clean = write_cohort(tmp_path / "clean", patients=20, size=96, splits=splits)
    dirty = write_cohort(tmp_path / "dirty", patients=20, size=96, splits=splits, defects=dict.fromkeys(DEFECTS, 2))
    truth = json.loads((tmp_path / "dirty" / "defects.json").read_text())["defects"]
    assert {kind: sum(d["kind"] == kind for d in truth) for kind in DEFECTS} == dict.fromkeys(DEFECTS, 2)
    before, after = pd.read_csv(clean.table).set_index("image"), pd.read_csv(dirty.table).set_index("image")
    files, original = contents(dirty.folder), contents(clean.folder)
    gone = {name for d in truth if d["kind"] == "missing" for name in d["images"]}
    assert set(files) == set(after.index) - gone

    listed = {kind: {name for d in truth if d["kind"] == kind for name in d["images"]} for kind in DEFECTS}
    changed = {name for name in original if files.get(name) not in (original[name], None)}
    assert changed == listed["truncated"] | listed["blank"]
    for name in listed["truncated"]:
        assert original[name].startswith(files[name])
    relabelled = {name for name in before.index if before.dr_grade[name] != after.dr_grade[name]}
    assert relabelled == listed["mislabelled"] | listed["out_of_range"]
    assert not set(after.dr_grade[list(listed["out_of_range"])]) & set(range(5))
    for name in listed["blank"]:
        assert cv2.imread(str(dirty.folder / name)).max() == 0
    patients = after.groupby("patient")["split"].nunique()
    assert set(patients.index[patients > 1]) == {
        p for d in truth if d["kind"] == "patient_leaks" for p in d["patients"]
    }
    new = set(after.index) - set(before.index)
    copies = [d for d in truth if d["kind"] in ("duplicates", "near_duplicates", "reencoded", "conflicts")]
    assert new == {d["images"][1] for d in copies}
    assert {after.split[name] for name in new} > {"train"}, "copies lie in other splits, too"
    for defect in truth:
        if defect["kind"] in ("duplicates", "conflicts"):
            assert files[defect["images"][0]] == files[defect["images"][1]]
        if defect["kind"] == "near_duplicates":
            assert files[defect["images"][0]] != files[defect["images"][1]]
        if defect["kind"] == "conflicts":
            assert after.dr_grade[defect["images"][0]] != after.dr_grade[defect["images"][1]]
        if defect["kind"] == "reencoded":
            one, other = (cv2.imread(str(dirty.folder / name)) for name in defect["images"])
            assert (one == other).all()
    assert before.groupby("patient")["split"].nunique().max() == 1
    assert before.split.value_counts().to_dict() == {"train": 24, "val": 8, "test": 8}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patients": 0}, "one patient"),
        ({"cameras": ("clinik",)}, "Did you mean 'clinic'"),
        ({"cameras": ()}, "at least one camera"),
        ({"size": 10}, "64 to"),
        ({"grades": [1, 2]}, "five numbers"),
        ({"grades": [0, 0, 0, 0, 0]}, "five numbers"),
        ({"defects": {"truncate": 1}}, "Did you mean 'truncated'"),
        ({"defects": {"truncated": 9}}, "need as many patients"),
        ({"defects": {"patient_leaks": 1}}, "two or more splits"),
        ({"splits": {"train": -1.0, "test": 2.0}}, "positive"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        write_cohort(tmp_path / "out", **{"patients": 2, "size": 64, **options})
    assert not (tmp_path / "out" / "labels.csv").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        write_cohort(tmp_path, patients=1, size=64)
    with pytest.raises(UserError, match="precious"):
        write_cohort(tmp_path / "precious.txt" / "eyes", patients=1, size=64)
    assert contents(tmp_path) == {"precious.txt": b"mine"}


def test_bad_eye_and_ratio_are_told() -> None:
    with pytest.raises(UserError, match="'R' or 'L'"):
        sample(0, 1, "OD", "clinic", 64)
    with pytest.raises(UserError, match=r"between 0.1 and 0.95"):
        plan_patient(0, 1, vcdr=1.2)


# --- the verb ----------------------------------------------------------------------------------------------------


def test_synth_writes_and_says_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "eyes"
    shares = {"grades": "1,0,0,0,1", "splits": "train=.5,test=.5"}
    synth(out, patients=10, size="96x80", cameras="clinic, legacy", defects="1", **shares)
    said = capsys.readouterr()
    table = pd.read_csv(out / "labels.csv")
    assert set(table.camera) == {"clinic", "legacy"}
    assert len(table) == 24
    assert len(json.loads((out / "defects.json").read_text())["defects"]) == len(DEFECTS)
    assert cv2.imread(str(out / "images" / "P00001_R_clinic.jpg")).shape == (80, 96, 3)
    assert "24 images of 14 patients" in said.out
    assert f"--data.table {out / 'labels.csv'}" in said.out
    assert "Drawing: 20/20 images (100%)" in said.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": "big"}, "--size must be"),
        ({"grades": "1,x"}, "'x' is not a number"),
        ({"splits": "train"}, "NAME=NUMBER"),
        ({"defects": "duplicate=1"}, "Did you mean 'duplicates'"),
        ({"cameras": "lagacy"}, "Did you mean 'legacy'"),
    ],
)
def test_synth_tells_mistakes(tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        synth(tmp_path / "out", **{"patients": 2, **options})
    assert not (tmp_path / "out").exists()
