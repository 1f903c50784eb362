"""The base of what calibration.json is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

Ends = tuple[FiniteFloat | None, FiniteFloat | None]
"""A 95% interval; (None, None) where there is none."""


class Part(BaseModel):
    """A part of calibration.json: frozen, nothing unknown, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Sample(Part):
    """The labelled images a calibration was fitted on."""

    dataset: str
    n: int = Field(ge=1)
    patients: int | None
    unit: str
    """What intervals resample: "patient", or "image" where no patient is known."""
