"""Synthetic eyes: fundus photographs drawn from a plan, so that every label is true by construction.

Plan a patient, draw an eye, photograph it, describe it; or write a whole cohort. Deterministic by seed: the same
patient comes out whatever the number of workers, the order, or the size of the picture.

    right, left = plan_patient(seed=0, patient=1)
    photo = sample(0, 1, "R", "clinic", 512).image
    write_cohort(Path("eyes"), patients=100)
"""

from eyetune.data.phantom.camera import CAMERAS, Camera, photograph
from eyetune.data.phantom.caption import describe
from eyetune.data.phantom.cohort import CohortSummary, write_cohort
from eyetune.data.phantom.defects import DEFECTS
from eyetune.data.phantom.lesions import LESIONS, Lesion, grade_of
from eyetune.data.phantom.plan import GRADE_WEIGHTS, EyePlan, plan_patient
from eyetune.data.phantom.retina import DrawnEye, draw_eye
from eyetune.data.phantom.sample import Sample, sample

__all__ = [
    "CAMERAS",
    "DEFECTS",
    "GRADE_WEIGHTS",
    "LESIONS",
    "Camera",
    "CohortSummary",
    "DrawnEye",
    "EyePlan",
    "Lesion",
    "Sample",
    "describe",
    "draw_eye",
    "grade_of",
    "photograph",
    "plan_patient",
    "sample",
    "write_cohort",
]
