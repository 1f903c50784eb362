"""The healthy fundus as geometry: disc, cup, fovea and a branching tree of vessels, before any pixel exists.

Everything is drawn in one frame, that of a **right eye** as a camera sees it, in square field coordinates: x runs to
the right and y down, both 0..1 across the full field of view, whose circle has its centre at (0.5, 0.5) and radius
0.5. In a right eye the disc (nasal) lies to the right of the fovea. A left eye is the mirror image, made at the end
of the drawing by one flip. Lengths are fractions of the field's width unless they say DD (disc diameters).

Proportions follow textbook anatomy: disc diameter about a seventh of a 45-degree field, fovea 2.5 DD temporal and a
little below the disc centre, arteriole to venule calibre about 2:3 (Wong et al., Ophthalmology 2004), calibres at a
branching by Murray's cube law (PNAS 1926), no vessels in the foveal avascular zone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Side = Literal["R", "L"]

QUADRANTS = ("superotemporal", "superonasal", "inferonasal", "inferotemporal")
"""The four quadrants of the retina, by the lines through the fovea."""

GLAUCOMA_VCDR = 0.65
"""An eye is labelled glaucoma when, and only when, its vertical cup-disc ratio is at least this."""

SAFE_RADIUS = 0.395
SAFE_HEIGHT = 0.335
"""Lesions lie within this distance of the field's centre (and its horizontal), so that every camera sees them all."""

VEIN_CALIBRE = 0.074  # of a disc diameter, at the disc margin: about 125 um of 1.7 mm
ARTERY_TO_VEIN = 0.68
THINNEST = 0.0013
"""No branch starts thinner: a photograph would not resolve it (0.7 pixels of 512)."""
_STEPS = 40  # points along a branch
_TRUNK_STEPS = 72

# Trunks as control points in DD from the disc centre: temporal is negative x, up is positive y (an upper vessel).
_TEMPORAL = np.array(
    [
        (0.06, 0),
        (0.04, 0.42),
        (-0.22, 0.98),
        (-0.86, 1.56),
        (-1.85, 1.95),
        (-3.0, 2.06),
        (-4.2, 1.92),
        (-5.5, 1.6),
        (-6.8, 1.2),
    ]
)
_NASAL = np.array([(0.08, 0), (0.17, 0.42), (0.42, 1.0), (0.78, 1.75), (1.12, 2.6), (1.4, 3.7)])
_MACULAR = np.array([(0.0, 0), (-0.45, 0.22), (-0.95, 0.42), (-1.45, 0.55), (-1.95, 0.52)])
_NASAL_SMALL = np.array([(0.1, 0), (0.45, 0.16), (0.9, 0.42), (1.5, 0.7), (2.2, 0.95)])
_TRUNKS = ((_TEMPORAL, True, 1.0), (_NASAL, False, 0.82), (_MACULAR, False, 0.36), (_NASAL_SMALL, False, 0.45))
"""Shape, whether the patient's arcade height scales it, and calibre relative to an arcade's."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What the two eyes of one patient share. All but `age` are 0..1 unless said otherwise."""

    age: float
    """Years, 18..88."""
    pigment: float
    """0 a blond fundus, 1 a dark one."""
    tessellation: float
    """How plainly the choroidal vessels shine through."""
    tortuosity: float
    calibre: float
    """Factor on every vessel's width, 0.85..1.15."""
    disc_diameter: float
    """Vertical, of the field's width, 0.125..0.15."""
    arcade: float
    """Height of the arcades, a factor, 0.96..1.22."""
    redness: float
    """-1 yellower, +1 redder than the mean."""


@dataclass(frozen=True, slots=True)
class Disc:
    """The optic nerve head of one eye. `x`, `y`, `diameter` (vertical) in field units."""

    x: float
    y: float
    diameter: float
    aspect: float
    """Horizontal over vertical diameter, 0.86..0.97."""
    tilt: float
    """Radians, clockwise on the image; a few degrees."""
    vcdr: float
    cup_aspect: float
    """Horizontal over vertical cup-disc ratio: glaucomatous cups grow vertically."""
    cup_dx: float
    cup_dy: float
    """Cup centre from the disc centre, in units of the disc's half axes: the rim is thinnest where it points."""
    crescent: float
    """Strength of the pale temporal crescent, 0..1."""


@dataclass(frozen=True, slots=True)
class Vessel:
    """One branch. `points` float32[n, 2] and `widths` float32[n] (full calibre), both in field units."""

    points: Floats
    widths: Floats
    artery: bool
    order: int
    """0 a trunk, 1 its branches, 2 theirs."""


def draw_traits(rng: np.random.Generator) -> Traits:
    """One patient's traits; older eyes show more choroid."""
    age = float(rng.uniform(18, 88))
    pigment = float(rng.beta(2.0, 2.0))
    return Traits(
        age=age,
        pigment=pigment,
        tessellation=float(np.clip(rng.beta(1.0, 3.2) * (0.6 + age / 110) * (1.25 - 0.5 * pigment), 0, 1)),
        tortuosity=float(rng.beta(2.0, 3.0)),
        calibre=float(rng.uniform(0.88, 1.14)),
        disc_diameter=float(rng.uniform(0.128, 0.149)),
        arcade=float(rng.uniform(0.96, 1.22)),
        redness=float(rng.uniform(-1, 1)),
    )


def draw_disc(rng: np.random.Generator, traits: Traits, vcdr: float) -> tuple[Disc, tuple[float, float]]:
    """One eye's disc, and its fovea (x, y)."""
    diameter = traits.disc_diameter * float(rng.uniform(0.98, 1.02))
    fovea = (0.452 + float(rng.uniform(-0.014, 0.014)), 0.512 + float(rng.uniform(-0.012, 0.012)))
    distance = float(rng.uniform(2.4, 2.6)) * diameter
    below = float(rng.uniform(0.08, 0.32)) * diameter
    free = 1.0 - vcdr
    disc = Disc(
        x=fovea[0] + float(np.sqrt(distance**2 - below**2)),
        y=fovea[1] - below,
        diameter=diameter,
        aspect=float(rng.uniform(0.87, 0.96)),
        tilt=float(rng.uniform(-0.10, 0.10)),
        vcdr=vcdr,
        cup_aspect=float(rng.uniform(0.82, 0.9)) if vcdr >= GLAUCOMA_VCDR else float(rng.uniform(0.94, 1.04)),
        cup_dx=-free * float(rng.uniform(0.05, 0.3)),
        cup_dy=free * (float(rng.uniform(0.2, 0.5)) if vcdr >= GLAUCOMA_VCDR else float(rng.uniform(-0.15, 0.15))),
        crescent=float(rng.beta(1.0, 2.4)) if rng.random() < 0.45 else 0.0,
    )
    return disc, fovea


def quadrant_of(x: float, y: float, fovea: tuple[float, float]) -> str:
    """The quadrant of a point given in the right-eye frame."""
    return ("supero" if y < fovea[1] else "infero") + ("temporal" if x < fovea[0] else "nasal")


@lru_cache(maxsize=8)
def _spline(knots: int, steps: int) -> NDArray[np.float64]:
    """The matrix [steps, knots] that draws a Catmull-Rom curve through that many control points."""
    t = np.linspace(0, knots - 1 - 1e-9, steps)
    row, i = np.arange(steps), t.astype(int)
    f = t - i
    padded = np.zeros((steps, knots + 2))
    padded[row, i] = 0.5 * (-f + 2 * f**2 - f**3)
    padded[row, i + 1] = 0.5 * (2 - 5 * f**2 + 3 * f**3)
    padded[row, i + 2] = 0.5 * (f + 4 * f**2 - 3 * f**3)
    padded[row, i + 3] = 0.5 * (f**3 - f**2)
    # The outer two points are not given: each is its neighbour's neighbour, mirrored.
    matrix = padded[:, 1:-1].copy()
    matrix[:, 0] += 2 * padded[:, 0]
    matrix[:, 1] -= padded[:, 0]
    matrix[:, -1] += 2 * padded[:, -1]
    matrix[:, -2] -= padded[:, -1]
    return matrix


def _wobble(rng: np.random.Generator, arc: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smooth noise of about unit size along the arc lengths `arc` [count, steps]."""
    waves = rng.uniform(7.0, 45.0, (4, len(arc), 1))  # radians per field width: bends of a seventh to one field width
    phases = rng.uniform(0, 2 * np.pi, (4, len(arc), 1))
    return np.asarray(np.sin(waves * arc + phases).sum(axis=0) / 2.0)


def trunks(traits: Traits, disc: Disc, shared_seed: int, own_seed: int) -> list[Vessel]:
    """The 16 vessels that leave the disc: arcades, nasal trunks, small macular and nasal ones.

    `shared_seed` is the patient's (both eyes' trunks run alike), `own_seed` the eye's (alike, not equal).
    """
    shared, own = np.random.default_rng(shared_seed), np.random.default_rng(own_seed)
    upper = np.array([1.0, 1.0, -1.0, -1.0])  # of each shape: vein and artery above, vein and artery below
    artery = np.array([False, True, False, True])
    curves, calibres = [], []
    for shape, height, calibre in _TRUNKS:
        knots = len(shape)
        control = shape * np.stack([np.ones(4), upper * (traits.arcade if height else 1.0)], 1)[:, None]
        spread = np.linspace(0.02, 0.2, knots)[:, None]
        size = (4, knots, 2)
        control = control + spread * (shared.normal(size=size) + 0.45 * own.normal(size=size))
        # Artery and vein leave side by side and stay a few calibres apart: the vein usually runs outside.
        outward = np.where(artery, -0.09, 0.09) * np.sign(shape[-1, 0])
        apart = outward[:, None] * np.linspace(0.3, 2.2, knots)
        control[..., 0] -= 0.5 * apart
        control[..., 1] -= 0.9 * upper[:, None] * apart
        control[:, 0, 0] = 0.02 + 0.03 * own.normal(size=4)
        control[:, 0, 1] = 0.03 * upper
        curves.append(_spline(knots, _TRUNK_STEPS) @ control)
        calibres.append(calibre * np.where(artery, ARTERY_TO_VEIN, 1.0) * own.uniform(0.94, 1.06, 4))
    points = np.concatenate(curves) * np.array([1.0, -1.0]) * disc.diameter + np.array([disc.x, disc.y])
    points = _bend(own, points, 0.0035 + 0.0075 * traits.tortuosity).astype(np.float32)
    # Past the disc a trunk loses calibre to its branches (Murray), roughly linearly in what remains.
    taper = np.linspace(1.0, 0.5, _TRUNK_STEPS)
    taper[:6] *= np.linspace(0.45, 1.0, 6)  # it rises out of the depth of the cup
    width = np.concatenate(calibres)[:, None] * (VEIN_CALIBRE * disc.diameter * traits.calibre) * taper
    width = width.astype(np.float32)
    return [Vessel(points[i], width[i], bool(artery[i % 4]), 0) for i in range(len(points))]


def _bend(rng: np.random.Generator, points: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """Move curves [n, steps, 2] sideways by a smooth noise that starts from nothing at the disc."""
    steps = np.diff(points, axis=1, prepend=points[:, :1])
    length = np.hypot(steps[..., 0], steps[..., 1])
    arc = length.cumsum(axis=1)
    normal = np.stack([-steps[..., 1], steps[..., 0]], -1) / (length[..., None] + 1e-9)
    noise = _wobble(rng, arc) * amount * np.clip(arc / 0.1, 0, 1)
    return np.asarray(points + normal * noise[..., None])


def vessel_tree(
    traits: Traits, disc: Disc, fovea: tuple[float, float], shared_seed: int, own_seed: int
) -> list[Vessel]:
    """The whole tree, trunks first, thinnest last; about 250 branches."""
    tree = trunks(traits, disc, shared_seed, own_seed)
    rng = np.random.default_rng([own_seed, 1])
    level = tree
    for order in (1, 2):
        level = _branches(rng, level, order=order, traits=traits, disc=disc, fovea=fovea)
        tree = tree + level
    return tree


def _branches(
    rng: np.random.Generator,
    parents: list[Vessel],
    *,
    order: int,
    traits: Traits,
    disc: Disc,
    fovea: tuple[float, float],
) -> list[Vessel]:
    """The side branches of `parents`, grown all at once: [n, steps, 2]."""
    starts, headings, calibres, arteries, sides = [], [], [], [], []
    for parent in parents:
        length = float(np.hypot(*np.diff(parent.points, axis=0).T).sum())
        count = int(np.clip(length / (0.062 if order == 1 else 0.055) * (0.7 + 0.6 * rng.random()), 0, 9))
        if count == 0:
            continue
        where = (np.arange(count) + rng.uniform(0.2, 0.8, count)) / count * 0.86 + 0.12
        at = (where * (len(parent.points) - 1)).astype(int)
        ahead = np.minimum(at + 2, len(parent.points) - 1)
        direction = parent.points[ahead] - parent.points[np.maximum(ahead - 4, 0)]
        side = np.where((np.arange(count) + rng.integers(2)) % 2 == 0, 1.0, -1.0)
        starts.append(parent.points[at])
        headings.append(np.arctan2(direction[:, 1], direction[:, 0]))
        calibres.append(parent.widths[at] * rng.uniform(0.42, 0.74, count))
        arteries.append(np.full(count, parent.artery))
        sides.append(side)
    if not starts:
        return []
    start = np.concatenate(starts).astype(np.float64)
    heading, calibre = np.concatenate(headings), np.concatenate(calibres)
    artery, side = np.concatenate(arteries), np.concatenate(sides)
    n = len(start)
    first = heading + side * np.radians(rng.uniform(32, 62, n))
    # Inner branches turn to the fovea, outer ones away from it; nasal ones keep to their course.
    to_fovea = np.arctan2(fovea[1] - start[:, 1], fovea[0] - start[:, 0])
    inner = np.cos(first - to_fovea) > 0
    target = np.where(inner, to_fovea, to_fovea + np.pi) + rng.normal(0, 0.35, n)
    turn = np.angle(np.exp(1j * (target - first))) * np.where(inner, 0.75, 0.45) * rng.uniform(0.4, 1.1, n)
    turn = np.where(start[:, 0] > disc.x, 0.3 * turn, turn)
    reach = rng.uniform(0.6, 1.3, n) * np.where(inner, 0.19, 0.25) * (1.0 if order == 1 else 0.42)
    t = np.linspace(0, 1, _STEPS)
    arc = t[None] * reach[:, None]
    noise = _wobble(rng, arc) * (0.16 + 0.42 * traits.tortuosity)
    angle = first[:, None] + turn[:, None] * (t * t * (3 - 2 * t))[None] + noise - noise[:, :1]
    step = (reach / (_STEPS - 1))[:, None]
    points = np.stack([np.cos(angle) * step, np.sin(angle) * step], -1).cumsum(axis=1)
    points += start[:, None, :] - points[:, :1]
    widths = calibre[:, None] * np.linspace(1.0, 0.3, _STEPS)[None]
    keep = _allowed(points, start, disc, fovea)
    # A branch that is stopped short fades like one that ends by itself.
    widths = widths * np.clip((keep[:, None] - np.arange(_STEPS)) / 10, 0.2, 1.0)
    return [
        Vessel(points[i, : keep[i]].astype(np.float32), widths[i, : keep[i]].astype(np.float32), bool(artery[i]), order)
        for i in range(n)
        if keep[i] >= 6 and calibre[i] > THINNEST
    ]


def _allowed(
    points: NDArray[np.float64], start: NDArray[np.float64], disc: Disc, fovea: tuple[float, float]
) -> NDArray[np.int64]:
    """How many points of each branch [n, steps, 2] come before the avascular zone, the raphe, the disc or the edge."""
    x, y = points[..., 0], points[..., 1]
    avascular = np.hypot(x - fovea[0], y - fovea[1]) < 0.36 * disc.diameter
    side = np.sign(start[:, 1] - fovea[1])[:, None]
    across = (side * (y - fovea[1]) < -0.12 * disc.diameter) & (x < disc.x)
    on_disc = np.hypot(x - disc.x, y - disc.y) < 0.55 * disc.diameter
    outside = np.hypot(x - 0.5, y - 0.5) > 0.56
    bad = avascular | across | on_disc | outside
    return np.where(bad.any(axis=1), bad.argmax(axis=1), points.shape[1])
