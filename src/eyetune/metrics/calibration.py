"""What is fitted on labelled images that training did not see, and what it does on others.

:class:`Calibration` is the content of calibration.json: temperature, operating points, conformal quantiles. Of several
labels it is one for each (:class:`LabelCalibration`), of a number a prediction interval
(:class:`~eyetune.metrics.ranges.ValueCalibration`). All of it comes from one sample: the validation split, or the
images of a new site. :func:`trust` says what comes of it on a dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from pydantic import FiniteFloat, ValidationError, model_validator

from eyetune import __version__
from eyetune.errors import DataError
from eyetune.metrics.conformal import Conformal, conformal_scores, fit_conformal
from eyetune.metrics.fitted import FEW_IMAGES, SCHEMA, Fitted, Said, wrong_task
from eyetune.metrics.intervals import RESAMPLES, Clusters
from eyetune.metrics.metric import METRICS, add_intervals
from eyetune.metrics.operating import OperatingPoint, choose_points, point_scores, questions
from eyetune.metrics.outcomes import Outcomes
from eyetune.metrics.part import Ends, Sample
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.ranges import ValueCalibration, fit_range, range_scores
from eyetune.metrics.reliability import error_by_chance, reliability_bins
from eyetune.metrics.scores import has_order, is_graded_dr, sample
from eyetune.metrics.selective import selective_scores
from eyetune.metrics.site import JUDGED, Brought, fit_scaling, judge, remarks, too_few, unseen
from eyetune.metrics.strangeness import strangeness_scores
from eyetune.metrics.table import Table
from eyetune.metrics.temperature import Temperature, fit_temperature, temperature_interval


class Calibration(Fitted):
    """The content of calibration.json, or of calibration/SITE.json, where one class an image was learnt."""

    temperature: Temperature
    bias: tuple[FiniteFloat, ...] | None = None
    """Shift of each class's log-odds, for a site with other shares of the classes; None for the run's own."""
    operating_points: tuple[OperatingPoint, ...] = ()
    conformal: Conformal | None = None
    brought: Brought | None = None
    """Of a site's: what it does to patients of the site that it was not fitted on."""

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

    def apply(self, predictions: Said) -> Said:
        """The predictions with calibrated probabilities. Raises TypeError for predictions of another task."""
        if not isinstance(predictions, Predictions):
            raise wrong_task(predictions, "classes")
        return cast(Said, predictions.calibrated(self.temperature.value, self.bias))

    def point(self, positive: str, target: str) -> OperatingPoint | None:
        """The operating point of a question ("grade >= 2", or a class) that was chosen for "specificity" or
        "sensitivity"; None where the sample gave none."""
        found = (one for one in self.operating_points if one.positive == positive and target in one.target)
        return next(found, None)


class LabelCalibration(Fitted):
    """calibration.json of a run that learnt several labels: for each what there is of two classes, having it or not.
    Each label has a temperature of its own: they are separate questions, and one may be answered too surely while
    another is not surely enough."""

    labels: dict[str, Calibration]
    """Those of which validation knows anything."""

    def apply(self, predictions: Said) -> Said:
        """The predictions with calibrated probabilities; of a label without a calibration as they are. What is called
        stays: a temperature moves no probability across 0.5. Raises TypeError for predictions of another task."""
        if not isinstance(predictions, LabelPredictions):
            raise wrong_task(predictions, "several labels")
        temperatures = {name: one.temperature.value for name, one in self.labels.items()}
        return cast(Said, predictions.calibrated(temperatures))


def read_calibration(content: Mapping[str, Any]) -> Fitted:
    """The calibration that JSON content says. Raises ValueError, in one line, for what is none."""
    found = content.get("schema")
    if isinstance(found, int) and found > SCHEMA:
        raise ValueError(f"it has schema {found}, and this EyeTune reads {SCHEMA}: use the version that wrote it")
    kind: type[Fitted] = (
        LabelCalibration if "labels" in content else ValueCalibration if "interval" in content else Calibration
    )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc'])) or 'as a whole'}: {one['msg']}" for one in error.errors()]
        raise ValueError("; ".join(faults[:3])) from error


def fit_calibration(
    predictions: Table, dataset: str, *, model: str | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Fitted | None:
    """Everything that is fitted on the labelled rows of a sample; None when none is labelled.

    Args:
        predictions: raw, as the network gave them, of images that it was not trained on.
        dataset: what the sample is called.
        model: SHA-256 of the network's weights.
        resamples: how many the temperature's interval rests on.
        seed: of the resampling.
    """
    if not predictions.known.any():
        return None
    if isinstance(predictions, LabelPredictions):
        return _fit_labels(predictions, dataset, model, resamples, seed)
    if isinstance(predictions, ValuePredictions):
        return fit_range(predictions, dataset, model)
    if not isinstance(predictions, Predictions):
        raise TypeError(f"nothing is known of how to calibrate {type(predictions).__name__}")
    return _fit_classes(predictions, dataset, model, resamples, seed)


def _fit_labels(
    table: LabelPredictions, dataset: str, model: str | None, resamples: int, seed: int
) -> LabelCalibration:
    alone = {name: table.label(name) for name in table.labels}
    found = {name: _fit_classes(one, dataset, None, resamples, seed) for name, one in alone.items() if one.known.any()}
    unknown = [f"{name}: no image of {dataset} says whether it has it" for name in table.labels if name not in found]
    known = table.labelled()
    patients = {patient for patient in known.patients if patient is not None}
    _, clusters = sample(known)
    return LabelCalibration(
        classes=table.names,
        model=model,
        fitted_on=Sample(dataset=dataset, n=len(known), patients=len(patients) or None, unit=clusters.unit),
        labels=found,
        warnings=(*unknown, *(f"{name}: {text}" for name, one in found.items() for text in one.warnings)),
        versions=next(iter(found.values())).versions,
    )


def _fit_classes(predictions: Predictions, dataset: str, model: str | None, resamples: int, seed: int) -> Calibration:
    known = predictions.labelled()
    clusters = Clusters.of(known.patients, known.targets)
    temperature, warnings = fit_temperature(known.logits, known.targets)
    ends: Ends = (None, None)
    if not warnings:
        ends = temperature_interval(known.logits, known.targets, clusters.draws(resamples, seed), temperature)
    if len(known) < FEW_IMAGES:
        few = f"{dataset} has {len(known)} labelled images: below {FEW_IMAGES} a temperature is as likely to harm as to"
        warnings = [f"{few} help; read its interval", *warnings]
    scaled = Temperature(value=temperature, ci=ends)
    return _fitted(known, known.calibrated(temperature), scaled, warnings=warnings, dataset=dataset, model=model)


def fit_site(
    predictions: Predictions,
    own: Calibration | None,
    site: str,
    *,
    model: str | None = None,
    photographs: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Calibration:
    """A calibration for a site, from a labelled sample of it alone, and what it brings there.

    Operating points and conformal quantiles are chosen on probabilities that each patient got from the others: a
    temperature and shifts fitted on the very same images would make both too bold (docs/calibration.md, measured).

    Args:
        predictions: raw, of the sample, which the run was not trained on.
        own: the run's own calibration, which it is held against; None where the run has none.
        site: what it is called.
        model: SHA-256 of the network's weights.
        photographs: digests of the sample's photographs.
        resamples: how many intervals rest on.
        seed: of folds and resampling.

    Raises DataError where the sample is too small, or of one class only.
    """
    if why := too_few(predictions):
        raise DataError(f"{site}: {why}.")
    known = predictions.labelled()
    scaling = fit_scaling(known, seed)
    ends: Ends = (None, None)
    if scaling.bias is None and not scaling.warnings:
        draws = Clusters.of(known.patients, known.targets).draws(resamples, seed)
        ends = temperature_interval(known.logits, known.targets, draws, scaling.temperature)
    after = replace(known, logits=unseen(known, seed), calls=known.calls if scaling.bias is None else None)
    before = known if own is None else own.apply(known)
    against = "no calibration" if own is None else "the run's own calibration"
    brought = judge(before, after, against, resamples=resamples, seed=seed)
    fitted = Temperature(value=scaling.temperature, ci=ends)
    warnings = remarks(scaling, known, brought)
    found = _fitted(known, after, fitted, warnings=warnings, dataset=site, model=model)
    return found.model_copy(
        update={
            "bias": None if scaling.bias is None else tuple(scaling.bias.tolist()),
            "ood": None if own is None else own.ood,
            "brought": brought,
            "photographs": tuple(photographs),
        }
    )


def _fitted(
    known: Predictions,
    calibrated: Predictions,
    temperature: Temperature,
    *,
    warnings: Sequence[str],
    dataset: str,
    model: str | None,
) -> Calibration:
    """The calibration of a labelled sample with this temperature; what follows is chosen on `calibrated`, of the same
    images."""
    import scipy  # type: ignore[import-untyped]

    clusters = Clusters.of(known.patients, known.targets)
    outcomes = Outcomes.of_table(calibrated)
    graded = is_graded_dr(known.classes)
    asked = questions(known.classes, graded=graded, ordered=has_order(known))
    points, of_points = choose_points(outcomes, asked, dataset)
    conformal, of_sets = fit_conformal(outcomes, clusters, dataset)
    patients = {patient for patient in known.patients if patient is not None}
    return Calibration(
        classes=tuple(known.classes),
        model=model,
        fitted_on=Sample(dataset=dataset, n=len(known), patients=len(patients) or None, unit=clusters.unit),
        temperature=temperature,
        operating_points=tuple(points),
        conformal=conformal,
        warnings=(*warnings, *of_points, *of_sets),
        versions={"eyetune": __version__, "numpy": np.__version__, "scipy": scipy.__version__},
    )


def trust(
    predictions: Table,
    calibration: Fitted | None,
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

    Returns `calibrated_by`, `calibrated_metrics`, `reliability`, `operating_points`, `selective`, `conformal` and `ood`
    (see docs/calibration.md); of several labels `ood`, and the rest label by label under `per_label`; of a number `ood`
    and `prediction_interval`. Without labelled rows `ood` alone.
    """
    result: dict[str, Any] = {}
    if calibration is not None and calibration.ood is not None:
        found = strangeness_scores(calibration.ood, predictions, val, resamples=resamples, seed=seed)
        result = {"ood": found} if found else {}
    if not predictions.known.any():
        return result
    if isinstance(predictions, LabelPredictions):
        fitted = calibration.labels if isinstance(calibration, LabelCalibration) else {}
        return result | {
            "per_label": {
                name: _trust_classes(predictions.label(name), fitted.get(name), resamples, seed)
                for name in predictions.labels
            }
        }
    if isinstance(predictions, ValuePredictions):
        interval = calibration.interval if isinstance(calibration, ValueCalibration) else None
        found = {} if interval is None else range_scores(interval, predictions, resamples=resamples, seed=seed)
        return result | ({"prediction_interval": found} if found else {})
    if not isinstance(predictions, Predictions):
        raise TypeError(f"nothing is known of how far {type(predictions).__name__} can be believed")
    own = calibration if isinstance(calibration, Calibration) else None
    return result | _trust_classes(predictions, own, resamples, seed)


def _trust_classes(
    predictions: Predictions, calibration: Calibration | None, resamples: int, seed: int
) -> dict[str, Any]:
    """As :func:`trust`, of one class an image, without `ood`; nothing without labelled rows."""
    known = predictions.labelled()
    if not len(known):
        return {}
    raw = Outcomes.of_table(known)
    clusters = Clusters.of(known.patients, known.targets)
    result: dict[str, Any] = {"reliability": {"before": reliability_bins(raw, clusters.of_image)}}
    result["reliability"]["by_chance_before"] = error_by_chance(raw, seed)
    if calibration is None:
        return result | {"selective": selective_scores(raw, clusters, resamples=resamples, seed=seed)}
    after = Outcomes.of_table(calibration.apply(known))
    result["calibrated_by"] = {
        "dataset": calibration.fitted_on.dataset,
        "n": calibration.fitted_on.n,
        "temperature": calibration.temperature.value,
        "bias": None if calibration.bias is None else dict(zip(calibration.classes, calibration.bias, strict=True)),
    }
    result["calibrated_metrics"] = {name: METRICS.get(name).entry(after) for name in JUDGED}
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
