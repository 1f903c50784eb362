"""What is fitted on labelled images that training did not see, and what it does on others.

:class:`Calibration` is the content of calibration.json: temperature, operating points, conformal quantiles. All of it
comes from one sample: the validation split, or the images of a new site. :func:`trust` says what comes of it on a
dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError, model_validator

from eyetune import __version__
from eyetune.metrics.conformal import Conformal, conformal_scores, fit_conformal
from eyetune.metrics.intervals import RESAMPLES, Clusters
from eyetune.metrics.metric import METRICS, add_intervals
from eyetune.metrics.operating import OperatingPoint, choose_points, point_scores, questions
from eyetune.metrics.outcomes import Outcomes
from eyetune.metrics.part import Part, Sample
from eyetune.metrics.predictions import Predictions
from eyetune.metrics.reliability import error_by_chance, reliability_bins
from eyetune.metrics.scores import is_graded_dr, is_ordered
from eyetune.metrics.selective import selective_scores
from eyetune.metrics.strangeness import Strangeness, strangeness_scores
from eyetune.metrics.table import Table
from eyetune.metrics.temperature import Temperature, fit_temperature, temperature_interval

SCHEMA = 1
"""Version of calibration.json; raised when a reader of the old form would misunderstand the new one."""

FEW_IMAGES = 100
"""Below so many labelled images a temperature may do more harm than good: docs/calibration.md, measured."""

CALIBRATED = ("ece", "ece_equal_mass", "brier", "nll")
"""Metrics that a temperature changes on purpose."""


class Calibration(Part):
    """The content of calibration.json, or of calibration/SITE.json."""

    schema_number: int = Field(default=SCHEMA, alias="schema", ge=1)
    classes: tuple[str, ...]
    """In the order of the logits."""
    model: str | None = None
    """SHA-256 of the checkpoint's tensors: with other weights none of this holds."""
    fitted_on: Sample
    temperature: Temperature
    bias: tuple[FiniteFloat, ...] | None = None
    """Shift of each class's log-odds, for a site with other shares of the classes; None for the run's own."""
    operating_points: tuple[OperatingPoint, ...] = ()
    conformal: Conformal | None = None
    ood: Strangeness | None = None
    """Above which score an image is unlike validation; None where training had too few images."""
    warnings: tuple[str, ...] = ()
    """What its reader must not overlook."""
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Calibration:
        count = len(self.classes)
        if self.bias is not None and len(self.bias) != count:
            raise ValueError(f"bias: {len(self.bias)} numbers for {count} classes")
        if self.conformal is not None and len(self.conformal.by_class) != count:
            raise ValueError(f"conformal.by_class: {len(self.conformal.by_class)} numbers for {count} classes")
        if any(not 0 <= k < count for point in self.operating_points for k in point.classes):
            raise ValueError(f"operating_points: a class outside 0..{count - 1}")
        return self

    def apply(self, predictions: Predictions) -> Predictions:
        """The predictions with calibrated probabilities."""
        return predictions.calibrated(self.temperature.value, self.bias)

    def point(self, positive: str, target: str) -> OperatingPoint | None:
        """The operating point of a question ("grade >= 2", or a class) that was chosen for "specificity" or
        "sensitivity"; None where the sample gave none."""
        found = (one for one in self.operating_points if one.positive == positive and target in one.target)
        return next(found, None)

    def to_dict(self) -> dict[str, Any]:
        """JSON content."""
        return self.model_dump(mode="json", by_alias=True)


def read_calibration(content: Mapping[str, Any]) -> Calibration:
    """The calibration that JSON content says. Raises ValueError, in one line, for what is none."""
    found = content.get("schema")
    if isinstance(found, int) and found > SCHEMA:
        raise ValueError(f"it has schema {found}, and this EyeTune reads {SCHEMA}: use the version that wrote it")
    try:
        return Calibration.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc'])) or 'as a whole'}: {one['msg']}" for one in error.errors()]
        raise ValueError("; ".join(faults[:3])) from error


def fit_calibration(
    predictions: Table, dataset: str, *, model: str | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Calibration | None:
    """Everything that is fitted on the labelled rows of a sample; None when none is labelled, and for other tasks than
    one class an image.

    Args:
        predictions: raw, as the network gave them, of images that it was not trained on.
        dataset: what the sample is called.
        model: SHA-256 of the network's weights.
        resamples: how many the temperature's interval rests on.
        seed: of the resampling.
    """
    import scipy  # type: ignore[import-untyped]

    if not isinstance(predictions, Predictions) or not predictions.known.any():
        return None
    known = predictions.labelled()
    clusters = Clusters.of(known.patients, known.targets)
    temperature, warnings = fit_temperature(known.logits, known.targets)
    ends: tuple[float | None, float | None] = (None, None)
    if not warnings:
        draws = clusters.draws(resamples, seed)
        ends = temperature_interval(known.logits, known.targets, draws, temperature)
    if len(known) < FEW_IMAGES:
        few = f"{dataset} has {len(known)} labelled images: below {FEW_IMAGES} a temperature is as likely to harm as to"
        warnings = [f"{few} help; read its interval", *warnings]
    outcomes = Outcomes.of_table(known.calibrated(temperature))
    graded = is_graded_dr(known.classes)
    ordered = is_ordered(known.classes) if known.ordered is None else known.ordered
    points, of_points = choose_points(outcomes, questions(known.classes, graded=graded, ordered=ordered), dataset)
    conformal, of_sets = fit_conformal(outcomes, clusters, dataset)
    patients = {patient for patient in known.patients if patient is not None}
    return Calibration(
        classes=tuple(known.classes),
        model=model,
        fitted_on=Sample(dataset=dataset, n=len(known), patients=len(patients) or None, unit=clusters.unit),
        temperature=Temperature(value=temperature, ci=ends),
        operating_points=tuple(points),
        conformal=conformal,
        warnings=(*warnings, *of_points, *of_sets),
        versions={"eyetune": __version__, "numpy": np.__version__, "scipy": scipy.__version__},
    )


def trust(
    predictions: Table,
    calibration: Calibration | None,
    val: Table | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """How far a dataset's probabilities can be believed, as it stands in metrics.json beside its scores.

    Args:
        predictions: raw; rows with an unknown target are left out of all but `ood`.
        calibration: what was fitted on validation; None leaves out what needs it, and judges the raw probabilities.
        val: the run's validation split, which `ood` is compared with; None where it is not at hand.
        resamples: how many the intervals rest on.
        seed: of the resampling.

    Returns `calibrated_metrics`, `reliability`, `operating_points`, `selective`, `conformal` and `ood` (see
    docs/calibration.md); without labelled rows `ood` alone, and nothing for other tasks than one class an image.
    """
    if not isinstance(predictions, Predictions):
        return {}
    strange: dict[str, Any] = {}
    if calibration is not None and calibration.ood is not None:
        found = strangeness_scores(calibration.ood, predictions, val, resamples=resamples, seed=seed)
        strange = {"ood": found} if found else {}
    if not predictions.known.any():
        return strange
    known = predictions.labelled()
    raw = Outcomes.of_table(known)
    clusters = Clusters.of(known.patients, known.targets)
    result: dict[str, Any] = strange | {"reliability": {"before": reliability_bins(raw, clusters.of_image)}}
    result["reliability"]["by_chance_before"] = error_by_chance(raw, seed)
    if calibration is None:
        return result | {"selective": selective_scores(raw, clusters, resamples=resamples, seed=seed)}
    after = Outcomes.of_table(calibration.apply(known))
    result["calibrated_metrics"] = {name: METRICS.get(name).entry(after) for name in CALIBRATED}
    if resamples:
        add_intervals(result["calibrated_metrics"], after, clusters, resamples=resamples, seed=seed, method="")
    result["reliability"] |= {"after": reliability_bins(after, clusters.of_image)}
    result["reliability"]["by_chance_after"] = error_by_chance(after, seed)
    result["operating_points"] = point_scores(
        calibration.operating_points, after, clusters, resamples=resamples, seed=seed
    )
    result["selective"] = selective_scores(after, clusters, resamples=resamples, seed=seed)
    if calibration.conformal is not None:
        result["conformal"] = conformal_scores(
            calibration.conformal, after, clusters, known.classes, resamples=resamples, seed=seed
        )
    return result
