"""Everything about an eye that is decided before a pixel is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eyetune.data.phantom.anatomy import (
    GLAUCOMA_VCDR,
    Disc,
    Side,
    Traits,
    draw_disc,
    draw_traits,
    trunks,
)
from eyetune.data.phantom.lesions import LESIONS, Lesion, plan_lesions
from eyetune.errors import UserError

GRADE_WEIGHTS = (0.30, 0.15, 0.25, 0.15, 0.15)
"""Default shares of the DR grades 0..4: rarer than balanced where the disease is, common enough to train on."""

GLAUCOMA_SHARE = 0.2
HEALTHY_VCDR = (0.22, 0.56)
GLAUCOMA_RANGE = (0.69, 0.88)
"""No eye lies between the two ranges, so the label is never a matter of a pixel."""

_SIDES: tuple[Side, Side] = ("R", "L")


@dataclass(frozen=True, slots=True)
class EyePlan:
    """One eye, wholly determined: :func:`draw_eye` adds nothing that is not a function of these fields.

    `disc`, `fovea` and `lesions` are in the right-eye frame (see :mod:`.anatomy`); :meth:`facts` gives positions as
    they lie in the picture.
    """

    seed: int
    patient: int
    eye: Side
    grade: int
    vcdr: float
    traits: Traits
    disc: Disc
    fovea: tuple[float, float]
    lesions: tuple[Lesion, ...]
    shared_seed: int
    """Seeds what both eyes' trunks have in common."""
    own_seed: int
    """Seeds this eye's own vessels and texture."""

    @property
    def glaucoma(self) -> bool:
        """Whether the vertical cup-disc ratio is at least 0.65."""
        return self.vcdr >= GLAUCOMA_VCDR

    @property
    def name(self) -> str:
        """`P00001_R`."""
        return f"{patient_name(self.patient)}_{self.eye}"

    def facts(self) -> dict[str, Any]:
        """What is true of the picture, JSON-ready.

        Returns:
            `patient`, `eye`, `dr_grade` 0..4, `vcdr` 0..1, `glaucoma` 0/1, `disc` and `fovea` as [x, y] and
            `disc_diameter`, in 0..1 of the square field as pictured (mirrored for a left eye); `counts` by kind of
            lesion (all kinds, zeros included); `lesions`, each with kind, x, y, size and quadrant.
        """
        counts = Counter(lesion.kind for lesion in self.lesions)
        return {
            "patient": patient_name(self.patient),
            "eye": self.eye,
            "dr_grade": self.grade,
            "vcdr": self.vcdr,
            "glaucoma": int(self.glaucoma),
            "disc": [self.as_pictured(self.disc.x), self.disc.y],
            "disc_diameter": self.disc.diameter,
            "fovea": [self.as_pictured(self.fovea[0]), self.fovea[1]],
            "counts": {kind: counts.get(kind, 0) for kind in LESIONS},
            "lesions": [
                {"kind": s.kind, "x": self.as_pictured(s.x), "y": s.y, "size": s.size, "quadrant": s.quadrant}
                for s in self.lesions
            ],
        }

    def as_pictured(self, x: float) -> float:
        """An x of the right-eye frame as it lies in this eye's picture."""
        return x if self.eye == "R" else 1.0 - x


def patient_name(patient: int) -> str:
    """`P00001` for patient 1."""
    return f"P{patient:05d}"


def check_weights(grades: Sequence[float] | None) -> tuple[float, ...]:
    """Five grade weights as shares that sum to one."""
    weights = tuple(float(w) for w in (GRADE_WEIGHTS if grades is None else grades))
    if len(weights) != 5 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise UserError(
            f"Grade weights must be five numbers, none negative, for DR grades 0 to 4; got {list(weights)}. "
            "For example: 30,15,25,15,15"
        )
    return tuple(w / sum(weights) for w in weights)


def plan_patient(
    seed: int, patient: int, *, grades: Sequence[float] | None = None, vcdr: float | None = None
) -> tuple[EyePlan, EyePlan]:
    """Both eyes of a patient, right then left; the same for the same arguments, whatever was planned before.

    Args:
        seed: The cohort's seed.
        patient: The patient's number, 0 or more.
        grades: Five weights for the DR grades 0..4 (default :data:`GRADE_WEIGHTS`). The fellow eye has the same grade
            in two of three patients and a neighbouring one otherwise, where its weight is not zero.
        vcdr: Vertical cup-disc ratio of both eyes, 0.1..0.95; drawn when absent.
    """
    shares = check_weights(grades)
    if vcdr is not None and not 0.1 <= vcdr <= 0.95:
        raise UserError(f"A vertical cup-disc ratio must lie between 0.1 and 0.95; got {vcdr}.")
    rng = np.random.default_rng(np.random.SeedSequence([seed, patient]))
    traits = draw_traits(rng)
    first = int(rng.choice(5, p=shares))
    neighbours = [g for g in (first - 1, first + 1) if 0 <= g <= 4 and shares[g] > 0]
    second = int(rng.choice(neighbours)) if neighbours and rng.random() < 1 / 3 else first
    pair = (first, second) if rng.random() < 0.5 else (second, first)
    low, high = GLAUCOMA_RANGE if rng.random() < GLAUCOMA_SHARE else HEALTHY_VCDR
    middle = float(rng.uniform(low, high))
    shared_seed = int(rng.integers(2**31))
    eyes = []
    for index, eye in enumerate(_SIDES):
        own = np.random.default_rng(np.random.SeedSequence([seed, patient, 1 + index]))
        ratio = round(vcdr if vcdr is not None else float(np.clip(middle + own.uniform(-0.05, 0.05), low, high)), 3)
        disc, fovea = draw_disc(own, traits, ratio)
        own_seed = int(own.integers(2**31))
        vessels = trunks(traits, disc, shared_seed, own_seed) if pair[index] else []
        eyes.append(
            EyePlan(
                seed=seed,
                patient=patient,
                eye=eye,
                grade=pair[index],
                vcdr=ratio,
                traits=traits,
                disc=disc,
                fovea=fovea,
                lesions=plan_lesions(pair[index], own, disc, fovea, vessels),
                shared_seed=shared_seed,
                own_seed=own_seed,
            )
        )
    return eyes[0], eyes[1]
