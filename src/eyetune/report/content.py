"""metrics.json as the report reads it: what is there is checked once, at the door; what is not there is left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eyetune.errors import RunError, listing

Ends = tuple[float | None, float | None]


class Part(BaseModel):
    """A part of metrics.json; keys that the report has no use for are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)


class Score(Part):
    """One number with its interval; `value` None when it is not defined, with the reason."""

    value: float | None = None
    ci: Ends = (None, None)
    reason: str | None = None
    ci_reason: str | None = None
    note: str | None = None

    @property
    def width(self) -> float | None:
        """How long the interval is; None without one."""
        low, high = self.ci
        return None if low is None or high is None else high - low


def _bare(value: Any) -> Any:
    """Some numbers stand without an interval."""
    return {"value": value} if value is None or isinstance(value, (int, float)) else value


#: A score, or a bare number.
Figure = Annotated[Score, BeforeValidator(_bare)]
Scores = dict[str, Figure]


class Bin(Part):
    """One bin of a reliability diagram."""

    low: float
    high: float
    n: int
    confidence: float | None = None
    accuracy: float | None = None


class Reliability(Part):
    """How often the model is right where it is so sure: as trained, and with the temperature fitted on validation."""

    before: tuple[Bin, ...] = ()
    after: tuple[Bin, ...] = ()
    by_chance_before: dict[str, float | None] = Field(default_factory=dict)
    by_chance_after: dict[str, float | None] = Field(default_factory=dict)


class OperatingPoint(Part):
    """A threshold chosen on the validation split, and what it does here."""

    name: str
    positive: str
    threshold: float | None = None
    chosen_on: str = "val"
    target: dict[str, float] = Field(default_factory=dict)
    sensitivity: Figure = Score()
    specificity: Figure = Score()
    ppv: Figure = Score()
    npv: Figure = Score()


class Covered(Part):
    """One point of the risk-coverage curve."""

    coverage: float
    risk: float | None = None


class Selective(Part):
    """What answering only the surest photographs would do to the errors."""

    aurc: Figure = Score()
    aurc_of_chance: Figure = Score()
    aurc_of_best: Figure = Score()
    curve: tuple[Covered, ...] = ()


class Sets(Part):
    """How often prediction sets hold the truth, and how large they are."""

    coverage: Figure = Score()
    mean_size: float | None = None
    single: float | None = None
    empty: float | None = None
    by_class: Scores = Field(default_factory=dict)


class Conformal(Part):
    """Prediction sets meant to hold the truth with the probability `level`."""

    level: float
    marginal: Sets | None = None
    by_class: Sets | None = None


class PredictionInterval(Part):
    """An interval about every predicted number, meant to hold the true one with the probability `level`."""

    level: float
    half_width: float
    coverage: Figure = Score()


class Ood(Part):
    """How unlike the training images the images of this dataset are."""

    score: str = ""
    threshold: float | None = None
    share_above: float | None = None
    auroc_against_val: Figure = Score()


class Group(Part):
    """The images that share a value of a column."""

    n: int
    patients: int | None = None
    metrics: Scores = Field(default_factory=dict)
    too_small: str | None = None


class Gap(Score):
    """The largest difference between two groups, and which."""

    between: tuple[str, str] | None = None


class Subgroups(Part):
    """The groups of one column."""

    groups: dict[str, Group] = Field(default_factory=dict)
    gap: dict[str, Gap] = Field(default_factory=dict)


class PatientLevel(Part):
    """Both eyes joined to one prediction a patient."""

    n: int
    rule: str = ""
    metrics: Scores = Field(default_factory=dict)


class LeftOut(Part):
    """Images of a dataset that were not scored."""

    why: str
    images: int


class Intervals(Part):
    """How the intervals came about."""

    level: float = 0.95
    method: str = ""
    unit: str = "image"
    resamples: int = 0


class CalibratedBy(Part):
    """Which calibration the calibrated numbers rest on: "val" is the run's own, any other that of a site."""

    dataset: str
    n: int


class Dataset(Part):
    """`datasets.NAME`."""

    n: int
    task: str = "classification"
    unlabelled: int = 0
    patients: int | None = None
    classes: tuple[str, ...] = ()
    metrics: Scores = Field(default_factory=dict)
    intervals: Intervals | None = None
    per_class: dict[str, Scores] = Field(default_factory=dict)
    per_class_ci: dict[str, dict[str, Ends | None]] = Field(default_factory=dict)
    confusion_matrix: tuple[tuple[int, ...], ...] = ()
    calibrated_by: CalibratedBy | None = None
    calibrated_metrics: Scores = Field(default_factory=dict)
    reliability: Reliability | None = None
    operating_points: tuple[OperatingPoint, ...] = ()
    selective: Selective | None = None
    conformal: Conformal | None = None
    prediction_interval: PredictionInterval | None = None
    ood: Ood | None = None
    subgroups: dict[str, Subgroups] = Field(default_factory=dict)
    merged: dict[str, str] = Field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    patient_level: PatientLevel | None = None
    label_map: dict[str, str | None] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    target: str | None = None
    per_label: dict[str, Dataset] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _matrix_fits(self) -> Dataset:
        matrix, k = self.confusion_matrix, len(self.classes)
        if matrix and (len(matrix) != k or any(len(row) != k for row in matrix)):
            raise ValueError(f"the confusion matrix is not {k} by {k}")
        return self


class Joined(Part):
    """The reference dataset, scored with the classes joined as those of an outside dataset are."""

    classes: tuple[str, ...] = ()
    metrics: Scores = Field(default_factory=dict)


class Generalization(Part):
    """The reference dataset, and the gaps to the others: positive is worse there."""

    reference: str
    external: dict[str, Scores] = Field(default_factory=dict)
    joined_reference: dict[str, Joined] = Field(default_factory=dict)


class Metrics(Part):
    """metrics.json."""

    datasets: dict[str, Dataset] = Field(default_factory=dict)
    generalization: Generalization | None = None


Model = TypeVar("Model", bound=BaseModel)


def read_content(model: type[Model], content: Mapping[str, Any], path: Path) -> Model:
    """`content` of the file `path` as a `model`. Raises RunError naming the places that are not as they should be."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise RunError(
            f"{path} is damaged, or of another version of EyeTune:\n{listing(faults)}\n"
            "Score the run again: eyetune finetune --resume RUN, then eyetune evaluate for other datasets."
        ) from error
