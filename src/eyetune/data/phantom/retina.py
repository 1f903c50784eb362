"""From a plan to pixels: the retina as an ideal camera sees it, a full square without a field stop.

The order is that of the tissue: pigment and choroid, laser scars, disc and cup, deep exudates, vessels, blood, cotton
wool, new vessels, preretinal blood. What absorbs (blood, pigment) multiplies each channel by a transmission; what
scatters (exudate, disc, scar) is blended towards its own colour. The picture is kept as three planes, float32[3, n, n]
of 0..255, until it is finished: whole-plane arithmetic is several times faster than on interleaved colours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from eyetune.data.phantom.anatomy import Disc, Vessel, quadrant_of, vessel_tree
from eyetune.data.phantom.lesions import LESIONS, Lesion
from eyetune.data.phantom.plan import EyePlan

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]

_SHIFT = 4  # cv2 draws polygons in sixteenths of a pixel
_COARSE = 256  # side of the grid that pigment and choroid are computed on; both are blurred by nature
_BLOOD = {  # transmission of red, green, blue where the layer is full
    "vein": (0.66, 0.36, 0.42),
    "artery": (0.84, 0.53, 0.55),
    "microaneurysm": (0.60, 0.20, 0.25),
    "blot_haemorrhage": (0.58, 0.22, 0.28),
    "flame_haemorrhage": (0.60, 0.22, 0.27),
    "irma": (0.66, 0.32, 0.38),
    "nvd": (0.72, 0.34, 0.38),
    "nve": (0.72, 0.34, 0.38),
}


@dataclass(frozen=True, slots=True)
class DrawnEye:
    """A drawn retina. Masks run 0..255 and are empty unless they were asked for.

    `image` uint8[n, n, 3] RGB; `vessels`, `arteries`, `veins`, `disc`, `cup` uint8[n, n]; `lesions` a mask for every
    kind present.
    """

    image: Image
    vessels: Image | None = None
    arteries: Image | None = None
    veins: Image | None = None
    disc: Image | None = None
    cup: Image | None = None
    lesions: dict[str, Image] = field(default_factory=dict)


def draw_eye(plan: EyePlan, pixels: int, *, masks: bool = False) -> DrawnEye:
    """Draw `plan` at `pixels` x `pixels`; the same eye at every size.

    Args:
        plan: The eye, from :func:`plan_patient`.
        pixels: Side of the square, 64 or more.
        masks: Also return what was drawn where.
    """
    tree = vessel_tree(plan.traits, plan.disc, plan.fovea, plan.shared_seed, plan.own_seed)
    veins = _vessel_layer(plan, [v for v in tree if not v.artery], pixels)
    arteries = _vessel_layer(plan, [v for v in tree if v.artery], pixels)
    layers = {kind: _lesion_layer(kind, plan, pixels) for kind in _kinds_drawn(plan)}

    image = _background(plan, pixels)
    _blend_lesions(image, layers, "laser_scar")
    disc, cup = _blend_disc(image, plan, pixels)
    _blend_lesions(image, layers, "hard_exudate")
    _absorb(image, veins, "vein")
    _absorb(image, arteries, "artery")
    _reflexes(image, tree, pixels)
    for kind in ("irma", "flame_haemorrhage", "blot_haemorrhage", "microaneurysm"):
        _absorb(image, layers.get(kind), kind)
    _blend_lesions(image, layers, "cotton_wool_spot")
    for kind in ("nvd", "nve"):
        _absorb(image, layers.get(kind), kind)
    _blend_lesions(image, layers, "preretinal_haemorrhage")  # it lies before the vessels and hides them

    flip = plan.eye == "L"
    picture = np.asarray(cv2.merge([cv2.convertScaleAbs(np.maximum(plane, 0)) for plane in image]), np.uint8)
    if not masks:
        return DrawnEye(_mirrored(picture, flip))
    if "venous_beading" in {lesion.kind for lesion in plan.lesions}:
        layers["venous_beading"] = _beaded_layer(plan, tree, pixels)
    return DrawnEye(
        image=_mirrored(picture, flip),
        vessels=_mirrored(np.maximum(veins, arteries), flip),
        arteries=_mirrored(arteries, flip),
        veins=_mirrored(veins, flip),
        disc=_mirrored(_as_mask(disc), flip),
        cup=_mirrored(_as_mask(cup), flip),
        lesions={kind: _mirrored(layers[kind], flip) for kind in LESIONS if kind in layers},
    )


def _mirrored(image: Image, flip: bool) -> Image:
    return np.ascontiguousarray(image[:, ::-1]) if flip else image


def _as_mask(alpha: Floats) -> Image:
    return np.asarray(np.rint(alpha * 255), np.uint8)


def _kinds_drawn(plan: EyePlan) -> list[str]:
    present = {lesion.kind for lesion in plan.lesions}
    return [kind for kind in LESIONS if kind in present and kind != "venous_beading"]


# --- pigment, choroid, macula ------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, cells: int, side: int = _COARSE) -> Floats:
    """Smooth unit-variance noise, float32[side, side], with features of 1/`cells` of the field."""
    grid = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    big = cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.asarray(big, np.float32)


@lru_cache(maxsize=1)
def _coarse_axes() -> tuple[Floats, Floats]:
    axis = (np.arange(_COARSE, dtype=np.float32) + 0.5) / _COARSE
    x, y = np.meshgrid(axis, axis)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)


@lru_cache(maxsize=4)
def grain(side: int) -> Floats:
    """A fixed tile of white noise, float32[side, side], unit variance: cut at random offsets instead of drawn anew."""
    return np.random.default_rng(20031110).standard_normal((side, side), dtype=np.float32)


def _background(plan: EyePlan, pixels: int) -> Floats:
    """Retina without disc, vessels or lesions: float32[3, pixels, pixels], 0..255."""
    rng = np.random.default_rng([plan.own_seed, 2])
    traits = plan.traits
    x, y = _coarse_axes()
    dark, light = np.array([138, 60, 29], np.float32), np.array([220, 95, 50], np.float32)
    base = light + (dark - light) * np.float32(traits.pigment)
    base = base * np.array(
        [1.0 + 0.03 * traits.redness, 1.0 - 0.17 * traits.redness, 1.0 - 0.06 * traits.redness], np.float32
    )

    mottle = 0.055 * _noise(rng, 4) + 0.04 * _noise(rng, 9) + 0.03 * _noise(rng, 22) + 0.02 * _noise(rng, 55)
    dx, dy = x - plan.fovea[0], y - plan.fovea[1]
    from_fovea = dx * dx + 1.15 * dy * dy
    macula = 0.42 * np.exp(-from_fovea / (2 * 0.062**2)) + 0.30 * np.exp(-from_fovea / (2 * 0.024**2))
    from_disc = np.hypot(x - plan.disc.x, y - plan.disc.y)
    density = mottle + macula - 0.16 * np.exp(-((from_disc / 0.2) ** 2))
    density += _choroid(rng, traits.tessellation, from_fovea, from_disc)
    # Pigment takes green and blue more than red; far less so in the fovea, which is brown, not red.
    tint = np.array([0.72, 1.0, 1.12], np.float32)
    sheen = _nerve_fibres(rng, plan, from_disc)
    out = np.empty((3, pixels, pixels), np.float32)
    for channel, silver in enumerate((26, 40, 34)):
        colour = base[channel] * np.exp(-tint[channel] * density) + silver * sheen
        cv2.resize(colour.astype(np.float32), (pixels, pixels), dst=out[channel], interpolation=cv2.INTER_CUBIC)
    out *= _fine_grain(rng, pixels)
    if rng.random() < 0.75 - traits.age / 160:
        _foveal_reflex(out, plan, pixels, float(rng.uniform(18, 55)))
    return out


def _choroid(rng: np.random.Generator, strength: float, from_fovea: Floats, from_disc: Floats) -> Floats:
    """Tessellation: dark pigment between the pale, worm-like choroidal vessels, density on the coarse grid."""
    ridges = np.abs(_noise(rng, 34) + 0.45 * _noise(rng, 60)) + 0.5 * np.abs(_noise(rng, 20))
    pattern = np.clip(ridges - 0.95, -0.95, 1.0)
    away = 1 - 0.75 * np.exp(-from_fovea / (2 * 0.11**2)) - 0.3 * np.exp(-((from_disc / 0.13) ** 2))
    return np.asarray(0.2 * strength * pattern * away, np.float32)


def _nerve_fibres(rng: np.random.Generator, plan: EyePlan, from_disc: Floats) -> Floats:
    """The silvery sheen of the nerve fibre layer above and below the disc, bright in the young; 0..about 1."""
    x, y = _coarse_axes()
    angle = np.arctan2(y - plan.disc.y, x - plan.disc.x)
    streaks = np.convolve(rng.standard_normal(736), np.hanning(9) / 2.0, "same")[8:728].astype(np.float32)
    line = streaks[np.clip((angle + np.pi) / (2 * np.pi) * 719, 0, 719).astype(np.int32)]
    vertical = np.abs(np.sin(angle)) ** 1.5
    reach = np.exp(-(((from_disc - 0.11) / 0.11) ** 2))
    strength = max(0.0, 1.0 - plan.traits.age / 75)
    return np.asarray(strength * vertical * reach * (0.7 + 0.3 * line), np.float32)


def _fine_grain(rng: np.random.Generator, pixels: int) -> Floats:
    """Granularity of the pigment epithelium, a factor near 1; its grain is a fixed share of the field, not a pixel."""
    row, column = rng.integers(0, 512, 2)
    tile = grain(1024)[row : row + 512, column : column + 512]
    fine = cv2.resize(tile, (pixels, pixels), interpolation=cv2.INTER_LINEAR if pixels > 512 else cv2.INTER_AREA)
    return np.asarray(1 + 0.016 * fine, np.float32)


def _foveal_reflex(image: Floats, plan: EyePlan, pixels: int, strength: float) -> None:
    """A pinpoint of light in the foveal pit."""
    layer = np.zeros((pixels, pixels), np.uint8)
    centre = _fixed(np.array([plan.fovea]), pixels)[0]
    cv2.circle(layer, centre.tolist(), max(8, int(0.0035 * pixels * 16)), 255, -1, cv2.LINE_AA, _SHIFT)
    box = _box(layer, margin=int(0.02 * pixels) + 2)
    if box is not None:
        soft = cv2.GaussianBlur(layer[box], (0, 0), max(0.6, 0.0025 * pixels)).astype(np.float32) / 255
        image[:, box[0], box[1]] += soft * _planes(strength, 0.9 * strength, 0.7 * strength)


def _planes(red: float, green: float, blue: float) -> Floats:
    """A colour that broadcasts over planes."""
    return np.array([red, green, blue], np.float32)[:, None, None]


# --- disc --------------------------------------------------------------------------------------------------------


def _smooth_below(value: Floats, edge: float, soft: float) -> Floats:
    """1 where `value` is below `edge`, 0 above, over a ramp of width 2 `soft` centred on the edge."""
    t = np.clip((edge + soft - value) / (2 * soft), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def disc_coordinates(disc: Disc, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Points in the disc's own axes, where its margin is the unit circle."""
    cos, sin = np.cos(disc.tilt), np.sin(disc.tilt)
    u, v = x - disc.x, y - disc.y
    half = disc.diameter / 2
    return np.asarray((u * cos + v * sin) / (half * disc.aspect)), np.asarray((v * cos - u * sin) / half)


def _blend_disc(image: Floats, plan: EyePlan, pixels: int) -> tuple[Floats, Floats]:
    """Paint rim, cup and crescent; returns the disc's and the cup's coverage, float32[pixels, pixels], 0..1."""
    disc, traits = plan.disc, plan.traits
    reach = 0.9 * disc.diameter
    low_x, high_x = (int(np.clip((disc.x + s * reach) * pixels, 0, pixels)) for s in (-1, 1))
    low_y, high_y = (int(np.clip((disc.y + s * reach) * pixels, 0, pixels)) for s in (-1, 1))
    box = (slice(low_y, high_y), slice(low_x, high_x))
    x = (np.arange(low_x, high_x, dtype=np.float32) + 0.5)[None] / np.float32(pixels)
    y = (np.arange(low_y, high_y, dtype=np.float32) + 0.5)[:, None] / np.float32(pixels)
    u, v = disc_coordinates(disc, x, y)
    radius = np.hypot(u, v)
    cup_radius = np.hypot((u - disc.cup_dx) / disc.cup_aspect, v - disc.cup_dy) / disc.vcdr
    pixel = 2 / (disc.diameter * pixels)
    inside = _smooth_below(radius, 1.0, max(0.045, pixel))
    cup = _smooth_below(cup_radius, 1.0, max(0.13 if plan.glaucoma else 0.2, pixel))

    rng = np.random.default_rng([plan.own_seed, 3])
    patch = image[:, box[0], box[1]]
    patch += np.exp(-np.clip(radius - 1, 0, None) / 0.22) * _planes(20, 17, 10)
    if disc.crescent > 0:
        crescent = _smooth_below(np.hypot(u + 0.16, v), 1.06, 0.06)
        patch += 0.55 * disc.crescent * crescent * (_planes(238, 196, 140) - patch)
    brightness = 0.93 + 0.07 * (1 - traits.pigment) + float(rng.uniform(-0.04, 0.04))
    rim = _planes(253, 180, 118) * brightness
    pallor = np.clip(-u, -1, 1) * _planes(6, 22, 24)  # the temporal rim is paler
    shade = 1 - 0.07 * np.clip(radius, 0, 1) ** 3
    patch += inside * ((rim + pallor) * shade - patch)
    bowl = _planes(255, 226, 172) * min(1.0, brightness + 0.04) * (1 - 0.05 * np.clip(cup_radius, 0, 1) ** 2)
    patch += 0.93 * cup * inside * (bowl - patch)
    full_disc, full_cup = np.zeros((2, pixels, pixels), np.float32)
    full_disc[box], full_cup[box] = inside, cup * inside
    return full_disc, full_cup


# --- vessels -----------------------------------------------------------------------------------------------------


def _supersample(pixels: int) -> int:
    return 2 if pixels <= 1100 else 1


def _fixed(points: NDArray[np.float32] | NDArray[np.float64], pixels: int) -> NDArray[np.int32]:
    """Field coordinates as cv2's fixed-point pixels."""
    return np.asarray(np.rint((points * pixels - 0.5) * (1 << _SHIFT)), np.int32)


def _ribbon(vessel: Vessel, widths: Floats, pixels: int) -> NDArray[np.int32]:
    """The outline of a vessel of these `widths`, fixed-point int32[2n, 1, 2]."""
    points = vessel.points
    tangent = np.empty_like(points)
    tangent[1:-1] = points[2:] - points[:-2]
    tangent[0], tangent[-1] = points[1] - points[0], points[-1] - points[-2]
    tangent /= np.sqrt((tangent * tangent).sum(1, keepdims=True)) + 1e-9
    # cv2 adds about half a pixel to each side of a filled, antialiased outline
    half = np.maximum(widths / 2 - 0.45 / pixels, 0.12 / pixels)[:, None]
    offset = np.stack([-tangent[:, 1], tangent[:, 0]], 1) * half
    return _fixed(np.concatenate([points + offset, (points - offset)[::-1]]), pixels)[:, None, :]


def _beaded(plan: EyePlan, vessel: Vessel) -> Floats:
    """A vein's widths with beading, sausage-like, in the quadrants that have it."""
    quadrants = {lesion.quadrant for lesion in plan.lesions if lesion.kind == "venous_beading"}
    if vessel.artery or vessel.order > 0 or not quadrants:
        return vessel.widths
    hit = _beaded_points(plan, vessel, quadrants)
    steps = np.hypot(*np.diff(vessel.points, axis=0, prepend=vessel.points[:1]).T)
    wave = 1.05 + 0.5 * np.sin(2 * np.pi * np.cumsum(steps) / 0.026)
    return np.asarray(vessel.widths * np.where(hit, wave, 1.0), np.float32)


def _beaded_points(plan: EyePlan, vessel: Vessel, quadrants: set[str]) -> NDArray[np.bool_]:
    off_disc = np.hypot(vessel.points[:, 0] - plan.disc.x, vessel.points[:, 1] - plan.disc.y) > 0.7 * plan.disc.diameter
    here = [quadrant_of(float(x), float(y), plan.fovea) in quadrants for x, y in vessel.points]
    return np.asarray(off_disc & np.array(here))


def _vessel_layer(plan: EyePlan, vessels: list[Vessel], pixels: int) -> Image:
    """Coverage of these vessels, uint8[pixels, pixels]."""
    factor = _supersample(pixels)
    side = pixels * factor
    layer = np.zeros((side, side), np.uint8)
    for vessel in vessels:
        # Thin vessels hold little blood in the line of sight, so they are fainter, not only narrower.
        depth = int(np.clip(95 + 200 * float(vessel.widths[0]) / 0.0075, 90, 255))
        cv2.fillPoly(layer, [_ribbon(vessel, _beaded(plan, vessel), side)], depth, cv2.LINE_AA, _SHIFT)
    return _reduced(layer, pixels)


def _reduced(layer: Image, pixels: int) -> Image:
    if layer.shape[0] != pixels:
        layer = cv2.resize(layer, (pixels, pixels), interpolation=cv2.INTER_AREA)
    return layer


def _reflexes(image: Floats, tree: list[Vessel], pixels: int) -> None:
    """The bright line along the middle of an artery (weaker on veins)."""
    layer = np.zeros((pixels, pixels), np.uint8)
    for vessel in tree:
        if vessel.widths[0] > 0.0042 and vessel.order < 2:
            outline = _ribbon(vessel, vessel.widths * (0.34 if vessel.artery else 0.2), pixels)
            cv2.fillPoly(layer, [outline], 215 if vessel.artery else 80, cv2.LINE_AA, _SHIFT)
    soft = cv2.GaussianBlur(layer, (0, 0), max(0.5, 0.0009 * pixels)).astype(np.float32)
    for channel, gain in enumerate((0.13, 0.115, 0.08)):
        image[channel] += soft * np.float32(gain)


def _beaded_layer(plan: EyePlan, tree: list[Vessel], pixels: int) -> Image:
    """Mask of the beaded stretches."""
    quadrants = {lesion.quadrant for lesion in plan.lesions if lesion.kind == "venous_beading"}
    layer = np.zeros((pixels, pixels), np.uint8)
    for vessel in tree:
        if vessel.artery or vessel.order > 0:
            continue
        hit = _beaded_points(plan, vessel, quadrants)
        widths = _beaded(plan, vessel)
        for point, width in zip(vessel.points[hit], widths[hit], strict=True):
            centre = _fixed(point[None], pixels)[0]
            cv2.circle(layer, centre.tolist(), max(16, int(width * pixels * 8)), 255, -1, cv2.LINE_AA, _SHIFT)
    return layer


# --- lesions -----------------------------------------------------------------------------------------------------


def _box(layer: Image, margin: int = 0) -> tuple[slice, slice] | None:
    """The bounding box of what is not zero, or None for an empty layer."""
    x, y, w, h = cv2.boundingRect(layer)
    if w == 0 or h == 0:
        return None
    return (
        slice(max(0, y - margin), min(layer.shape[0], y + h + margin)),
        slice(max(0, x - margin), min(layer.shape[1], x + w + margin)),
    )


def _absorb(image: Floats, layer: Image | None, kind: str) -> None:
    """Multiply the image by the transmission of blood where `layer` covers it."""
    box = None if layer is None else _box(layer)
    if layer is None or box is None:
        return
    loss = (1 - np.array(_BLOOD[kind], np.float32)) / 255
    cover = layer[box].astype(np.float32)
    for channel in range(3):
        image[channel][box] *= 1 - cover * loss[channel]


_COLOURS = {
    "hard_exudate": ((246, 226, 128), 0.92),
    "cotton_wool_spot": ((246, 232, 196), 0.85),
    "laser_scar": ((214, 176, 112), 0.62),
    "preretinal_haemorrhage": ((104, 16, 14), 0.94),
}


def _blend_lesions(image: Floats, layers: dict[str, Image], kind: str) -> None:
    """Blend what scatters light towards its own colour."""
    layer = layers.get(kind)
    box = None if layer is None else _box(layer)
    if layer is None or box is None:
        return
    colour, opacity = _COLOURS[kind]
    patch = image[:, box[0], box[1]]
    level = float(np.clip(patch.mean() / 105, 0.75, 1.1))  # nothing glows: a dark fundus has duller exudates
    cover = layer[box].astype(np.float32) * np.float32(opacity / 255)
    patch += cover * (_planes(*colour) * level - patch)
    if kind == "laser_scar":  # old burns gather pigment in the middle
        core = np.clip(layer[box].astype(np.float32) - 225, 0, 30) / 30
        patch *= 1 - 0.45 * core * _planes(1.0, 0.95, 0.8)


def _outline(lesion: Lesion, length: float, width: float, roughness: float) -> NDArray[np.float64]:
    """An irregular closed outline around the lesion, field coordinates [n, 2]."""
    rng = np.random.default_rng(lesion.seed)
    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    wave = sum(rng.normal() / k**1.3 * np.cos(k * t + rng.uniform(0, 6.3)) for k in (2, 3, 4, 5, 7))
    radius = 1 + roughness * np.asarray(wave)
    px, py = radius * np.cos(t) * length / 2, radius * np.sin(t) * width / 2
    cos, sin = np.cos(lesion.angle), np.sin(lesion.angle)
    return np.stack([lesion.x + px * cos - py * sin, lesion.y + px * sin + py * cos], 1)


def _lesion_layer(kind: str, plan: EyePlan, pixels: int) -> Image:
    """Coverage of all lesions of one kind, uint8[pixels, pixels]."""
    layer = np.zeros((pixels, pixels), np.uint8)
    lesions = [lesion for lesion in plan.lesions if lesion.kind == kind]
    if kind in ("irma", "nvd", "nve"):
        return _curly_layer(kind, lesions, pixels)
    for lesion in lesions:
        _SHAPES[kind](layer, lesion, pixels)
    blur = {"cotton_wool_spot": 0.0060, "flame_haemorrhage": 0.0012, "blot_haemorrhage": 0.0010, "laser_scar": 0.0016}
    if kind in blur and blur[kind] * pixels > 0.3:
        box = _box(layer, margin=int(0.03 * pixels))
        if box is not None:
            layer[box] = cv2.GaussianBlur(layer[box], (0, 0), blur[kind] * pixels)
    return layer


def _fill(layer: Image, outline: NDArray[np.float64], value: int = 255) -> None:
    cv2.fillPoly(layer, [_fixed(outline, layer.shape[0])[:, None, :]], value, cv2.LINE_AA, _SHIFT)


def _draw_dot(layer: Image, lesion: Lesion, pixels: int) -> None:
    _fill(layer, _outline(lesion, lesion.size, lesion.size * 0.9, 0.08))


def _draw_blot(layer: Image, lesion: Lesion, pixels: int) -> None:
    aspect = 0.6 + 0.35 * ((lesion.seed % 97) / 97)
    _fill(layer, _outline(lesion, lesion.size, lesion.size * aspect, 0.16), 205 + lesion.seed % 50)


def _draw_flame(layer: Image, lesion: Lesion, pixels: int) -> None:
    """Blood between nerve fibres: a bundle of streaks with frayed ends."""
    rng = np.random.default_rng(lesion.seed)
    cos, sin = np.cos(lesion.angle), np.sin(lesion.angle)
    for streak in range(7):
        # the middle streak is always there, so that a flame never falls into two
        spread = 0.0 if streak == 0 else lesion.size
        across, along = rng.normal(0, 0.065) * spread, rng.normal(0, 0.12) * spread
        length, width = lesion.size * rng.uniform(0.45, 0.8), lesion.size * rng.uniform(0.07, 0.13)
        ends = np.array([(-0.5, 0), (-0.2, 0.5), (0.15, 0.45), (0.5, 0), (0.15, -0.5), (-0.2, -0.45)])
        px, py = ends[:, 0] * length + along, ends[:, 1] * width + across
        _fill(layer, np.stack([lesion.x + px * cos - py * sin, lesion.y + px * sin + py * cos], 1), 235)


def _draw_exudate(layer: Image, lesion: Lesion, pixels: int) -> None:
    _fill(layer, _outline(lesion, lesion.size, lesion.size * (0.65 + 0.3 * ((lesion.seed % 89) / 89)), 0.2))


def _draw_cotton(layer: Image, lesion: Lesion, pixels: int) -> None:
    _fill(layer, _outline(lesion, lesion.size * 0.85, lesion.size * 0.52, 0.14), 245)


def _draw_scar(layer: Image, lesion: Lesion, pixels: int) -> None:
    level = 140 + lesion.seed % 60
    _fill(layer, _outline(lesion, lesion.size, lesion.size * 0.92, 0.06), level)
    if lesion.seed % 5 < 2:
        _fill(layer, _outline(lesion, lesion.size * 0.5, lesion.size * 0.42, 0.16), 255)


def _draw_boat(layer: Image, lesion: Lesion, pixels: int) -> None:
    """Blood before the retina settles: a level above, a keel below, like a boat."""
    rng = np.random.default_rng(lesion.seed)
    t = np.linspace(0, np.pi, 24)
    depth = lesion.size * rng.uniform(0.36, 0.5)
    px = np.cos(t) * lesion.size / 2
    py = np.sin(t) ** 0.8 * depth - depth / 2
    surface = np.linspace(-1, 1, 10)[1:-1]
    top = np.stack([surface * lesion.size / 2, -depth / 2 + 0.004 * np.sin(3 * surface)], 1)
    _fill(layer, np.vstack([np.stack([px, py], 1), top]) + np.array([lesion.x, lesion.y]), 250)


_SHAPES = {
    "microaneurysm": _draw_dot,
    "blot_haemorrhage": _draw_blot,
    "flame_haemorrhage": _draw_flame,
    "hard_exudate": _draw_exudate,
    "cotton_wool_spot": _draw_cotton,
    "laser_scar": _draw_scar,
    "preretinal_haemorrhage": _draw_boat,
}


def _curly_layer(kind: str, lesions: list[Lesion], pixels: int) -> Image:
    """IRMA (a few wandering strands) and new vessels (a frond of fine loops), uint8[pixels, pixels]."""
    factor = _supersample(pixels)
    side = factor * pixels
    layer = np.zeros((side, side), np.uint8)
    calibre = 0.0026 if kind == "irma" else 0.0021
    for lesion in lesions:
        rng = np.random.default_rng(lesion.seed)
        for path in _wandering(lesion, rng) if kind == "irma" else _frond(rng):
            points = path * lesion.size / 2 + np.array([lesion.x, lesion.y])
            thick = max(1, round(calibre * side * rng.uniform(0.6, 1.15)))
            cv2.polylines(layer, [_fixed(points, side)[:, None, :]], False, 225, thick, cv2.LINE_AA, _SHIFT)
    return _reduced(layer, pixels)


def _wandering(lesion: Lesion, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Three crooked strands side by side, in the unit circle: dilated capillaries of an IRMA."""
    t = np.linspace(-1, 1, 36)
    strands = []
    for _ in range(3):
        low, high = sorted(rng.uniform(-1, 1, 2) * 0.4 + (-0.6, 0.6))
        along = np.clip(t, low, high)
        waves = sum(rng.normal(0, 0.11) * np.sin(k * along + 6.3 * rng.random()) for k in (5, 9, 14))
        across = rng.normal(0, 0.16) + np.asarray(waves)
        cos, sin = np.cos(lesion.angle), np.sin(lesion.angle)
        strands.append(np.stack([along * cos - across * sin, along * sin + across * cos], 1) * 0.9)
    return strands


def _frond(rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """A wheel of fine, winding vessels that end in loops, in the unit circle."""
    t = np.linspace(0, 1, 30)
    strands = []
    spokes = int(rng.integers(9, 14))
    for spoke in range(spokes):
        angle = 2 * np.pi * (spoke + rng.uniform(-0.3, 0.3)) / spokes
        reach = rng.uniform(0.55, 0.95)
        out = np.sin(np.pi * np.minimum(t * rng.uniform(0.62, 0.95), 0.95)) * reach  # out, and part of the way back
        swing = rng.choice((-1.0, 1.0)) * rng.uniform(0.35, 0.9) * t**1.5
        heading = angle + swing + 0.22 * np.sin(rng.uniform(10, 18) * t + 6.3 * rng.random()) * t
        strands.append(np.stack([out * np.cos(heading), out * np.sin(heading)], 1))
    return strands
