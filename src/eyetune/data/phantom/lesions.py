"""The lesions of diabetic retinopathy as a list of facts, and the international scale that grades them.

The scale (Wilkinson et al., Ophthalmology 2003;110:1677): 0 none; 1 microaneurysms only; 2 more than that, less than
3; 3 the 4-2-1 rule: 20 or more haemorrhages in each of four quadrants, or venous beading in two or more, or IRMA in
one or more; 4 new vessels or preretinal haemorrhage. Sizes are diameters (or lengths) in field widths; for scale, a
disc is 0.14 and 512 pixels make one pixel 0.002.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eyetune.data.phantom.anatomy import QUADRANTS, SAFE_HEIGHT, SAFE_RADIUS, Disc, Vessel, quadrant_of

HAEMORRHAGES = ("blot_haemorrhage", "flame_haemorrhage")
LESIONS = (
    "microaneurysm",
    *HAEMORRHAGES,
    "hard_exudate",
    "cotton_wool_spot",
    "venous_beading",
    "irma",
    "nvd",
    "nve",
    "preretinal_haemorrhage",
    "laser_scar",
)
"""Every kind of lesion, in the order of the international scale."""

_SIZES: dict[str, tuple[float, float]] = {
    "microaneurysm": (0.0075, 0.0115),
    "blot_haemorrhage": (0.0135, 0.030),
    "flame_haemorrhage": (0.030, 0.060),
    "hard_exudate": (0.006, 0.017),
    "cotton_wool_spot": (0.030, 0.055),
    "irma": (0.045, 0.075),
    "nvd": (0.075, 0.11),
    "nve": (0.065, 0.110),
    "preretinal_haemorrhage": (0.09, 0.17),
    "laser_scar": (0.018, 0.026),
}
_MAP = 192
_OFF_VESSELS = frozenset({"microaneurysm", "hard_exudate", "blot_haemorrhage", "irma"})


@dataclass(frozen=True, slots=True)
class Lesion:
    """One lesion. `x`, `y` in the right-eye frame, `size` in field widths, `angle` in radians, `seed` its shape."""

    kind: str
    x: float
    y: float
    size: float
    angle: float
    quadrant: str
    seed: int
    group: int = 0
    """Exudates of one cluster or ring share a number above zero; the rest have 0."""


def grade_of(lesions: Iterable[Lesion]) -> int:
    """The grade 0..4 that the international scale gives these lesions. Laser scars alone do not raise it."""
    lesions = [lesion for lesion in lesions if lesion.kind != "laser_scar"]
    kinds = {lesion.kind for lesion in lesions}
    if kinds & {"nvd", "nve", "preretinal_haemorrhage"}:
        return 4
    bleeding = dict.fromkeys(QUADRANTS, 0)
    for lesion in lesions:
        if lesion.kind in HAEMORRHAGES:
            bleeding[lesion.quadrant] += 1
    beaded = {lesion.quadrant for lesion in lesions if lesion.kind == "venous_beading"}
    if min(bleeding.values()) >= 20 or len(beaded) >= 2 or "irma" in kinds:
        return 3
    if kinds - {"microaneurysm"}:
        return 2
    return 1 if kinds else 0


def _distance_to(vessels: list[Vessel]) -> NDArray[np.float32]:
    """Distance to the nearest of these vessels' walls, in field widths, on a grid of _MAP x _MAP."""
    free = np.full((_MAP, _MAP), 255, np.uint8)
    for vessel in vessels:
        thick = max(1, round(float(vessel.widths.mean()) * _MAP))
        cv2.polylines(free, [np.rint(vessel.points * _MAP - 0.5).astype(np.int32)[:, None]], False, 0, thick)
    return np.asarray(cv2.distanceTransform(free, cv2.DIST_L2, 3) / _MAP, np.float32)


class _Placer:
    """Finds free places: inside every camera's view, off the disc and fovea, off other lesions, off large vessels."""

    def __init__(self, rng: np.random.Generator, disc: Disc, fovea: tuple[float, float], trunks: list[Vessel]) -> None:
        self.rng, self.disc, self.fovea = rng, disc, fovea
        self.lesions: list[Lesion] = []
        self._taken = np.empty((1024, 3))  # x, y, radius of the first `len(lesions)` places
        self._off_vessels = _distance_to(trunks)
        self._groups = 0

    def free(self, kind: str, spots: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of `spots` [n, 2] may hold a lesion of `sizes` [n], lesions already placed apart."""
        x, y = spots[:, 0], spots[:, 1]
        half = sizes / 2
        clear = np.hypot(x - 0.5, y - 0.5) + half < SAFE_RADIUS
        clear &= np.abs(y - 0.5) + half < SAFE_HEIGHT
        clear &= np.hypot(x - self.disc.x, y - self.disc.y) > 0.56 * self.disc.diameter + half
        clear &= np.hypot(x - self.fovea[0], y - self.fovea[1]) > 0.016 + half
        if kind in _OFF_VESSELS:
            cells = np.clip(spots * _MAP, 0, _MAP - 1).astype(int)
            clear &= self._off_vessels[cells[:, 1], cells[:, 0]] > 0.005 + half
        return np.asarray(clear)

    def add(self, kind: str, x: float, y: float, size: float, *, angle: float | None = None, group: int = 0) -> None:
        """Place one lesion here, whatever is there."""
        turn = float(self.rng.uniform(0, np.pi)) if angle is None else angle
        seed = int(self.rng.integers(2**31))
        lesion = Lesion(kind, float(x), float(y), float(size), turn, quadrant_of(x, y, self.fovea), seed, group)
        self.note(lesion)
        self._taken[len(self.lesions) - 1] = (x, y, size / 2)

    def note(self, lesion: Lesion) -> None:
        """List a lesion that takes no room."""
        self.lesions.append(lesion)
        self._taken[len(self.lesions) - 1] = (-9, -9, 0)

    def settle(self, kind: str, spots: NDArray[np.float64], count: int, *, group: int = 0, gap: float = 0.004) -> int:
        """Take up to `count` of the candidate `spots`, in their order; returns how many found room."""
        low, high = _SIZES[kind]
        sizes = low + (high - low) * self.rng.beta(1.1, 2.0, len(spots))
        clear = self.free(kind, spots, sizes)
        placed = 0
        for (x, y), size in zip(spots[clear], sizes[clear], strict=True):
            if placed == count:
                break
            taken = self._taken[: len(self.lesions)]
            apart = (taken[:, 0] - x) ** 2 + (taken[:, 1] - y) ** 2
            if (apart < (taken[:, 2] + size / 2 + gap) ** 2).any():
                continue
            angle = None
            if kind == "flame_haemorrhage":  # flames follow the nerve fibres, which fan out from the disc
                angle = float(np.arctan2(y - self.disc.y, x - self.disc.x))
            self.add(kind, x, y, size, angle=angle, group=group)
            placed += 1
        return placed

    def scatter(self, kind: str, count: int, *, reach: float = 0.36, quadrant: str | None = None) -> int:
        """Place `count` lesions at random within `reach` of the fovea (all of one quadrant, if named)."""
        n = 10 * count + 60
        turn = self.rng.uniform(0, 2 * np.pi, n)
        if quadrant is not None:
            start = {"inferonasal": 0.0, "inferotemporal": 0.5, "superotemporal": 1.0, "superonasal": 1.5}[quadrant]
            turn = np.pi * (start + 0.5 * self.rng.uniform(0.02, 0.98, n))
        radius = reach * np.sqrt(self.rng.uniform(0.02, 1, n))
        spots = np.stack([self.fovea[0] + radius * np.cos(turn), self.fovea[1] + radius * np.sin(turn)], 1)
        return self.settle(kind, spots, count)

    def exudates(self, count: int) -> None:
        """A cluster or a circinate ring of hard exudates beside the fovea."""
        self._groups += 1
        rng = self.rng
        for _ in range(4):
            turn, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.06, 0.17)
            centre = np.array([self.fovea[0] + away * np.cos(turn), self.fovea[1] + away * np.sin(turn)])
            n = 5 * count + 20
            if rng.random() < 0.5:
                arc = rng.uniform(0, 2 * np.pi) + rng.uniform(0, rng.uniform(3.2, 6.2), n)
                radius = rng.uniform(0.03, 0.055) + rng.normal(0, 0.004, n)
                spots = centre + np.stack([radius * np.cos(arc), radius * np.sin(arc)], 1)
            else:
                spots = centre + rng.normal(0, rng.uniform(0.018, 0.034), (n, 2))
            if self.settle("hard_exudate", spots, count, group=self._groups, gap=0.0008) >= 3:
                return


def plan_lesions(
    grade: int, rng: np.random.Generator, disc: Disc, fovea: tuple[float, float], trunks: list[Vessel]
) -> tuple[Lesion, ...]:
    """Lesions of an eye of this grade: :func:`grade_of` gives it back, for every seed."""
    if grade == 0:
        return ()
    place = _Placer(rng, disc, fovea, trunks)
    if grade == 1:
        place.scatter("microaneurysm", int(rng.integers(4, 16)), reach=0.30)
    elif grade == 2:
        _moderate(place, rng)
    elif grade == 3:
        _severe(place, rng)
    elif grade == 4:
        _proliferative(place, rng)
    return tuple(place.lesions)


def _moderate(place: _Placer, rng: np.random.Generator) -> None:
    if rng.random() < 0.8:
        place.exudates(int(rng.integers(6, 20)))
    if rng.random() < 0.25:
        place.exudates(int(rng.integers(4, 12)))
    place.scatter("cotton_wool_spot", int(rng.integers(0, 5)))
    place.scatter("blot_haemorrhage", int(rng.integers(3, 15)))
    place.scatter("flame_haemorrhage", int(rng.integers(0, 4)))
    place.scatter("microaneurysm", int(rng.integers(5, 22)), reach=0.32)
    if rng.random() < 0.08:
        _bead(place, rng, 1)


def _bead(place: _Placer, rng: np.random.Generator, quadrants: int) -> None:
    """Venous beading: a fact about the veins of a quadrant; x and y mark the quadrant's middle."""
    for quadrant in rng.permutation(QUADRANTS)[:quadrants]:
        x = place.fovea[0] + (-0.17 if str(quadrant).endswith("temporal") else 0.17)
        y = place.fovea[1] + (-0.25 if str(quadrant).startswith("super") else 0.25)
        seed = int(rng.integers(2**31))
        place.note(Lesion("venous_beading", x, y, 0.1, 0.0, str(quadrant), seed))


def _severe(place: _Placer, rng: np.random.Generator) -> None:
    bleeding, beading, irma = rng.random() < 0.75, rng.random() < 0.5, rng.random() < 0.6
    if not (bleeding or beading or irma):
        irma = True
    place.scatter("cotton_wool_spot", int(rng.integers(1, 7)))
    if irma:
        place.scatter("irma", int(rng.integers(1, 5)), reach=0.33)
    if beading:
        _bead(place, rng, int(rng.integers(2, 5)))
    full = True
    for quadrant in QUADRANTS:
        flames = int(rng.integers(1, 4))
        wanted = int(rng.integers(21, 27)) if bleeding else int(rng.integers(8, 16))
        flames = place.scatter("flame_haemorrhage", flames, quadrant=quadrant)
        blots = place.scatter("blot_haemorrhage", wanted - flames, quadrant=quadrant)
        full &= flames + blots >= 20
    if not (beading or full or any(lesion.kind == "irma" for lesion in place.lesions)):
        _bead(place, rng, 2)  # a crowded quadrant had no room for twenty: another criterion carries the grade
    if rng.random() < 0.6:
        place.exudates(int(rng.integers(5, 16)))
    place.scatter("microaneurysm", int(rng.integers(8, 24)), reach=0.34)


def _proliferative(place: _Placer, rng: np.random.Generator) -> None:
    signs = rng.permutation(["nvd", "nve", "preretinal_haemorrhage"])[: 1 + int(rng.integers(3))]
    if "nvd" in signs:
        low, high = _SIZES["nvd"]
        turn, size = rng.uniform(0, 2 * np.pi), float(rng.uniform(low, high))
        off = 0.18 * place.disc.diameter
        place.add("nvd", place.disc.x + off * np.cos(turn), place.disc.y + off * np.sin(turn), size)
    placed = 0
    if "preretinal_haemorrhage" in signs:
        placed += place.scatter("preretinal_haemorrhage", 1)
    if "nve" in signs:
        placed += place.scatter("nve", int(rng.integers(1, 4)))
    if not placed and "nvd" not in signs:
        place.add("nve", place.fovea[0] - 0.17, place.fovea[1] - 0.2, 0.07)
    if rng.random() < 0.5:
        place.scatter("cotton_wool_spot", int(rng.integers(1, 5)))
    place.scatter("blot_haemorrhage", int(rng.integers(5, 24)))
    place.scatter("flame_haemorrhage", int(rng.integers(0, 5)))
    if rng.random() < 0.5:
        place.exudates(int(rng.integers(4, 12)))
    place.scatter("microaneurysm", int(rng.integers(5, 18)), reach=0.33)
    if rng.random() < 0.4:
        _laser(place, rng)


def _laser(place: _Placer, rng: np.random.Generator) -> None:
    """Panretinal laser: rows of burns outside the arcades, none at the posterior pole."""
    pitch = float(rng.uniform(0.040, 0.052))
    axis = np.arange(0.08, 0.93, pitch)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2) + rng.normal(0, 0.12 * pitch, (len(axis) ** 2, 2))
    pole = np.hypot(grid[:, 0] - place.fovea[0], 1.15 * (grid[:, 1] - place.fovea[1])) < 0.235
    near_disc = np.hypot(grid[:, 0] - place.disc.x, grid[:, 1] - place.disc.y) < 0.95 * place.disc.diameter
    place.settle("laser_scar", rng.permutation(grid[~(pole | near_disc)]), 400, gap=0.002)
