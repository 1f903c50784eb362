"""Probabilities that mean what they say: a temperature fitted on labelled images, and what else is fitted beside it.

:class:`Calibration` is the content of calibration.json. All of it comes from one labelled sample that training did not
see: the validation split, or the images of a new site.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from eyetune import __version__
from eyetune.metrics.intervals import RESAMPLES, Clusters, interval_entry
from eyetune.metrics.outcomes import Floats
from eyetune.metrics.predictions import Predictions

SCHEMA = 1
"""Version of calibration.json; raised when a reader of the old form would misunderstand the new one."""

HOTTEST = 20.0
"""The highest temperature; 1 / HOTTEST is the lowest. At either end it says something about the sample, not a value."""

FEW_IMAGES = 100
"""Below so many labelled images a temperature may do more harm than good: docs/calibration.md, measured."""

_LARGEST_GAP = 1e6
"""Logits further than this below the largest are taken for this far: their share is 0 at every temperature."""


class Part(BaseModel):
    """A part of calibration.json: frozen, nothing unknown, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Estimate(Part):
    """A number and its 95% interval; [None, None] where there is none."""

    value: FiniteFloat
    ci: tuple[FiniteFloat | None, FiniteFloat | None] = (None, None)


class Temperature(Part):
    """What logits are divided by."""

    value: float = Field(gt=0, allow_inf_nan=False)
    ci: tuple[FiniteFloat | None, FiniteFloat | None] = (None, None)


class Sample(Part):
    """The labelled images a calibration was fitted on."""

    dataset: str
    n: int = Field(ge=1)
    patients: int | None
    unit: str
    """What intervals resample: "patient", or "image" where no patient is known."""


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
    warnings: tuple[str, ...] = ()
    """What its reader must not overlook."""
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits(self) -> Calibration:
        if self.bias is not None and len(self.bias) != len(self.classes):
            raise ValueError(f"bias: {len(self.bias)} numbers for {len(self.classes)} classes")
        return self

    def apply(self, predictions: Predictions) -> Predictions:
        """The predictions with calibrated probabilities."""
        return predictions.calibrated(self.temperature.value, self.bias)

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
    predictions: Predictions, dataset: str, *, model: str | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Calibration | None:
    """Everything that is fitted on the labelled rows of a sample; None when none is labelled.

    Args:
        predictions: raw, as the network gave them, of images that it was not trained on.
        dataset: what the sample is called.
        model: SHA-256 of the network's weights.
        resamples: how many the temperature's interval rests on.
        seed: of the resampling.
    """
    import scipy  # type: ignore[import-untyped]

    known = predictions.labelled()
    if not len(known):
        return None
    clusters = Clusters.of(known.patients, known.targets)
    temperature, warnings = fit_temperature(known.logits, known.targets)
    ends: tuple[float | None, float | None] = (None, None)
    if not warnings:
        draws = clusters.draws(resamples, seed)
        ends = temperature_interval(known.logits, known.targets, draws, temperature)
    patients = {patient for patient in known.patients if patient is not None}
    if len(known) < FEW_IMAGES:
        warnings = [
            f"{dataset} has {len(known)} labelled images: below {FEW_IMAGES} a temperature is as likely to harm as to "
            "help; read its interval",
            *warnings,
        ]
    return Calibration(
        classes=tuple(known.classes),
        model=model,
        fitted_on=Sample(dataset=dataset, n=len(known), patients=len(patients) or None, unit=clusters.unit),
        temperature=Temperature(value=temperature, ci=ends),
        warnings=tuple(warnings),
        versions={"eyetune": __version__, "numpy": np.__version__, "scipy": scipy.__version__},
    )


def fit_temperature(logits: Floats, targets: NDArray[np.int64]) -> tuple[float, list[str]]:
    """The temperature with the smallest negative log-likelihood (Guo et al., 2017), and what is wrong with it if not
    inside its bounds.

    The loss is convex in 1 / temperature: its slope has one root, found by Brent's method.

    Args:
        logits: float64[N, K], N >= 1.
        targets: int64[N], 0..K-1.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    gaps = _gaps(logits)
    images = np.arange(len(targets))

    def slope(log_inverse: float) -> float:
        scaled = np.exp(gaps * math.exp(log_inverse))
        expected = (scaled * gaps).sum(axis=1) / scaled.sum(axis=1)
        return float((expected - gaps[images, targets]).mean())

    end = math.log(HOTTEST)
    if not gaps.any():
        return 1.0, ["every class has the same logit in every image: no temperature says anything; left at 1"]
    if slope(end) <= 0:
        return 1.0, ["no image speaks against ever surer probabilities: the temperature has no lower bound; left at 1"]
    if slope(-end) >= 0:
        return HOTTEST, [f"the network knows nothing of these images: the temperature is at its end, {HOTTEST:g}"]
    return math.exp(-float(brentq(slope, -end, end, xtol=1e-12))), []


def temperature_interval(
    logits: Floats, targets: NDArray[np.int64], draws: Iterable[NDArray[np.int64]], temperature: float
) -> tuple[float | None, float | None]:
    """The 95% interval of `temperature`, from resamples: how often each image was drawn, int64[N] each.

    Each resample's temperature is where its slope crosses zero on a grid of temperatures; the slopes of the images on
    the grid are computed once. Between grid points, 5% apart, a line is off by less than 0.1%.
    """
    gaps, images, end = _gaps(logits), np.arange(len(targets)), math.log(HOTTEST)
    grid = np.linspace(-end, end, 1 + round(2 * end / 0.05))
    slopes = np.empty((len(targets), len(grid)))
    for place, log_inverse in enumerate(grid):
        scaled = np.exp(gaps * math.exp(log_inverse))
        slopes[:, place] = (scaled * gaps).sum(axis=1) / scaled.sum(axis=1) - gaps[images, targets]
    found = [_crossings(grid, np.array(block, dtype=np.float64) @ slopes) for block in _blocks(draws, 100)]
    low, high = interval_entry(np.exp(-np.concatenate(found)), temperature)["ci"]
    return low, high


def _blocks(draws: Iterable[NDArray[np.int64]], size: int) -> Iterator[tuple[NDArray[np.int64], ...]]:
    waiting = iter(draws)
    while block := tuple(itertools.islice(waiting, size)):
        yield block


def _crossings(grid: Floats, slopes: Floats) -> Floats:
    """Where each row of float64[R, G], rising along the grid float64[G], crosses zero; the grid's end if nowhere."""
    after = np.clip((slopes < 0).sum(axis=1), 1, len(grid) - 1)
    rows = np.arange(len(slopes))
    left, right = slopes[rows, after - 1], slopes[rows, after]
    part = np.where(right > left, -left / np.where(right > left, right - left, 1.0), 0.0)
    crossing: Floats = grid[after - 1] + np.clip(part, 0.0, 1.0) * (grid[after] - grid[after - 1])
    return crossing


def _gaps(logits: Floats) -> Floats:
    """float64[N, K]: how far each logit lies below the largest of its row, <= 0."""
    with np.errstate(over="ignore"):
        return np.maximum(logits - logits.max(axis=1, keepdims=True), -_LARGEST_GAP)
