"""What the user says about the data and the augmentation. Importable without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from eyetune.section import Section

IGNORE = "none"
"""A column set to this is not looked for, even when the table has one with a standard name."""

Contrast = Literal["none", "clahe", "ben-graham"]
Fit = Literal["pad", "squash"]

AugmentLevel = Literal["none", "light", "medium", "strong"]
AugmentConfig = AugmentLevel | tuple[str | dict[str, dict[str, Any]], ...]
"""A level, or a list of torchvision.transforms.v2 class names, each alone or with its arguments:
`[RandomHorizontalFlip, {RandomRotation: {degrees: 20}}]`."""


class TableConfig(Section):
    """Where the photographs and their labels are."""

    table: str
    """A CSV, TSV or JSONL file, a folder of class folders (train/val/test may stand above them), or hf:NAME."""
    images: Path | None = None
    """The folder that image names are relative to. Not given: the table's folder, or an images folder beside it."""
    image_column: str | None = None
    """Column with the image names. Not given: image, id_code, filename, … whichever the table has."""
    label_column: str | tuple[str, ...] | None = None
    """Column with the labels; several columns of 0 and 1, as [glaucoma, referable], for several labels an image. Not
    given: label, diagnosis, dr_grade, level, … whichever the table has."""
    patient_column: str | None = None
    """Column with the patients, each kept in one split. Not given: patient or patient_id. "none" ignores it."""
    eye_column: str | None = None
    """Column with left or right. Not given: eye or laterality. "none" ignores it."""
    split_column: str | None = None
    """Column with train, val or test. Not given: split. "none" ignores it and cuts new splits."""
    classes: tuple[str, ...] | None = None
    """The classes in order. Not given: 0..K-1 for numbers, the names in natural order for text and folders."""
    val: float = Field(default=0.1, ge=0, lt=1)
    """Share of the images cut for validation when the data has no val split."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Share of the images cut for the test when the data has no test split."""
    split_seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed of the cut alone: other trainings on the same splits. Not given: the run's `seed`."""


class PhotoConfig(Section):
    """How photographs are prepared, and where the prepared ones are kept."""

    crop: bool = True
    """Crop to the field of view, the lit disc on its dark surround."""
    contrast: Contrast = "none"
    """Local contrast: clahe (on lightness), ben-graham (subtract the local average), or none."""
    fit: Fit | None = None
    """Make the image square by pad or squash. Not given: as the backbone was trained."""
    bits: int | None = Field(default=None, ge=9, le=16)
    """Bits that gray images of more than 8 bits use, 12 for many cameras. Not given: what the file says, else 16."""
    cache: Path | bool = True
    """Where prepared images and features are kept: true in the user's cache folder, a folder there, false (--no-cache)
    nowhere."""
    cache_limit: float = Field(default=50.0, gt=0, allow_inf_nan=False)
    """GiB the cache may take. Beyond that, what was not used for longest is deleted."""

    @field_validator("cache", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        """A truth value that came as text: not the name of a folder."""
        return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


class DataConfig(PhotoConfig, TableConfig):
    """Where the photographs and their labels are, and how they are prepared."""

    skip_unreadable: bool = False
    """Leave out images that cannot be read, and report them, instead of stopping."""

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Accept numbers for names, and `mild,severe` for the list."""
        if isinstance(value, str):
            value = value.split(",")
        if isinstance(value, (list, tuple)):
            if any(isinstance(name, bool) for name in value):
                raise ValueError("YAML reads no, yes, on and off as truth values: put quotes around such names")
            return tuple(str(name).strip() if isinstance(name, (int, str)) else name for name in value)
        return value

    @model_validator(mode="after")
    def _coherent(self) -> DataConfig:
        if self.val + self.test >= 1:
            raise ValueError(f"val + test must leave something to train on, but {self.val:g} + {self.test:g} >= 1")
        if self.classes is not None:
            if len(self.classes) < 2:
                raise ValueError("classes needs at least two names")
            if len(set(self.classes)) < len(self.classes):
                raise ValueError(f"classes names one class twice: {', '.join(self.classes)}")
        return self
