"""What every calibration is, whatever was learnt."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

from pydantic import Field

from eyetune.metrics.part import Part, Sample
from eyetune.metrics.strangeness import Strangeness
from eyetune.metrics.table import Table

SCHEMA = 1
"""Version of calibration.json; raised when a reader of the old form would misunderstand the new one."""

FEW_IMAGES = 100
"""Below so many labelled images a temperature may do more harm than good: docs/calibration.md, measured."""

Said = TypeVar("Said", bound=Table)


class Fitted(Part):
    """The content of calibration.json that all tasks share."""

    schema_number: int = Field(default=SCHEMA, alias="schema", ge=1)
    classes: tuple[str, ...]
    """In the order of the logits; of several labels theirs; of a number its name."""
    model: str | None = None
    """SHA-256 of the checkpoint's tensors: with other weights none of this holds."""
    fitted_on: Sample
    ood: Strangeness | None = None
    """Above which score an image is unlike validation; None where training had too few images. A site's is the run's
    own: new probabilities do not make its photographs more alike to those the network learnt from."""
    photographs: tuple[str, ...] = ()
    """Of a site's: digests of the photographs it was fitted on, so that scoring it on them is noticed."""
    warnings: tuple[str, ...] = ()
    """What its reader must not overlook."""
    versions: dict[str, str] = Field(default_factory=dict)

    @abstractmethod
    def apply(self, predictions: Said) -> Said:
        """The predictions with calibrated probabilities. Raises TypeError for predictions of another task."""

    def to_dict(self) -> dict[str, Any]:
        """JSON content."""
        return self.model_dump(mode="json", by_alias=True)


def wrong_task(predictions: Table, wanted: str) -> TypeError:
    """The error for a table that a calibration is not for."""
    return TypeError(f"a calibration of {wanted} is not for predictions of a {predictions.task} task")
