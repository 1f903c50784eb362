"""An English description of an eye, made of nothing but what was drawn."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from eyetune.data.phantom.anatomy import QUADRANTS
from eyetune.data.phantom.lesions import LESIONS, Lesion
from eyetune.data.phantom.plan import EyePlan

GRADES = (
    "No diabetic retinopathy",
    "Mild non-proliferative diabetic retinopathy",
    "Moderate non-proliferative diabetic retinopathy",
    "Severe non-proliferative diabetic retinopathy",
    "Proliferative diabetic retinopathy",
)
"""The international names of the grades 0..4."""

_NOUNS = {  # singular, plural
    "microaneurysm": ("microaneurysm", "microaneurysms"),
    "blot_haemorrhage": ("blot haemorrhage", "blot haemorrhages"),
    "flame_haemorrhage": ("flame haemorrhage", "flame haemorrhages"),
    "hard_exudate": ("hard exudate", "hard exudates"),
    "cotton_wool_spot": ("cotton-wool spot", "cotton-wool spots"),
    "irma": ("intraretinal microvascular abnormality", "intraretinal microvascular abnormalities"),
    "nvd": ("frond of new vessels on the disc", "fronds of new vessels on the disc"),
    "nve": ("frond of new vessels elsewhere", "fronds of new vessels elsewhere"),
    "preretinal_haemorrhage": ("preretinal haemorrhage", "preretinal haemorrhages"),
    "laser_scar": ("laser scar", "laser scars"),
}


def describe(plan: EyePlan) -> str:
    """What an ophthalmologist would dictate: eye, disc, every kind of lesion with number and quadrants, the grade.

    Numbers are digits and equal those of :meth:`EyePlan.facts`.
    """
    side = "right" if plan.eye == "R" else "left"
    parts = [f"Fundus photograph of the {side} eye.", _disc(plan)]
    found = sorted(plan.lesions, key=lambda lesion: LESIONS.index(lesion.kind))
    for kind, group in groupby(found, key=lambda lesion: lesion.kind):
        parts.append(_sentence(kind, list(group)))
    if not plan.lesions:
        parts.append("No lesions.")
    parts.append(f"{GRADES[plan.grade]} (grade {plan.grade}).")
    return " ".join(parts)


def _disc(plan: EyePlan) -> str:
    text = f"The vertical cup-disc ratio is {plan.vcdr:.2f}"
    return text + (", with a thin rim: glaucoma." if plan.glaucoma else ": no sign of glaucoma.")


def _sentence(kind: str, lesions: list[Lesion]) -> str:
    """`7 microaneurysms: 4 superotemporal, 3 inferonasal.`"""
    counts = Counter(lesion.quadrant for lesion in lesions)
    if kind == "venous_beading":
        return f"Venous beading: {_joined([q for q in QUADRANTS if q in counts])}."
    noun = _NOUNS[kind][0 if len(lesions) == 1 else 1]
    if kind == "nvd":
        return f"{len(lesions)} {noun}."
    if len(counts) == 1:
        return f"{len(lesions)} {noun}, {next(iter(counts))}."
    places = _joined([f"{counts[q]} {q}" for q in QUADRANTS if q in counts])
    return f"{len(lesions)} {noun}: {places}."


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
