"""The charts of a dataset and of a run, from the predictions, metrics.json and history.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eyetune.metrics.outcomes import Curve, Outcomes
from eyetune.metrics.predictions import LabelPredictions, Predictions, ValuePredictions
from eyetune.metrics.scores import better, is_graded_dr, referable_curve
from eyetune.metrics.table import Table
from eyetune.pages.charts import Axis, Series, plot, ticks
from eyetune.report.content import Dataset
from eyetune.report.glossary import label

if TYPE_CHECKING:
    from markupsafe import Markup

#: More lines than colours cannot be told apart: of more classes the most frequent are drawn.
MOST_CURVES = 6

#: Dots of a scatter plot; more are one cloud.
MOST_DOTS = 1000


def _percent(value: float) -> str:
    return f"{100 * value:g} %"


def ranking_charts(table: Table) -> list[Markup]:
    """The ROC and the precision-recall curve: each class against the rest (of two classes the second), and for grades
    of retinopathy referable against less; of several labels each. None where nothing has both sides, or of a number."""
    curves = _label_curves(table) if isinstance(table, LabelPredictions) else _class_curves(table)
    curves = [(name, curve, strong) for name, curve, strong in curves if curve.defined]
    if not curves:
        return []
    chance = Series("chance", [(0, 0), (1, 1)], faint=True)
    roc = [Series(f"{name}: {curve.auroc:.3f}", _roc(curve), strong=strong) for name, curve, strong in curves]
    precision = [
        Series(
            f"{name}: {curve.average_precision:.3f} (chance {_share(curve):.2f})", _pr(curve), step=True, strong=strong
        )
        for name, curve, strong in curves
    ]
    return [
        plot(
            [*roc, chance],
            Axis("1 − specificity", number=_percent),
            Axis("Sensitivity", number=_percent),
            title="ROC curve (area in the legend)",
        ),
        plot(
            precision,
            Axis("Sensitivity (recall)", number=_percent),
            Axis("PPV (precision)", number=_percent),
            title="Precision-recall curve (area in the legend)",
        ),
    ]


def _label_curves(table: LabelPredictions) -> list[tuple[str, Curve, bool]]:
    alone = {name: Outcomes.of_table(table.label(name)) for name in table.labels}
    order = sorted(alone, key=lambda name: -alone[name].support[1])[:MOST_CURVES]
    return [(name, alone[name].curves[1], False) for name in table.labels if name in order]


def _class_curves(table: Table) -> list[tuple[str, Curve, bool]]:
    if not isinstance(table, Predictions):
        return []
    outcomes, classes = Outcomes.of_table(table), table.classes
    order = [1] if len(classes) == 2 else sorted(range(len(classes)), key=lambda k: -outcomes.support[k])
    curves = [(classes[k], outcomes.curves[k], False) for k in sorted(order[:MOST_CURVES])]
    if is_graded_dr(classes):
        curves.append(("grade 2 or worse", referable_curve(outcomes), True))
    return curves


def agreement_charts(table: Table, found: Dataset) -> list[Markup]:
    """Predicted against true numbers, and their difference against their mean (Bland and Altman, Lancet 1986) with the
    limits of agreement; none of anything but a number. Of more than 1,000 photographs evenly taken ones are drawn."""
    if not isinstance(table, ValuePredictions) or not table.known.any():
        return []
    known = table.labelled()
    step = -(-len(known) // MOST_DOTS)
    truth, called = known.targets[::step].tolist(), known.predicted[::step].tolist()
    marks = ticks(min(*truth, *called), max(*truth, *called))
    gap = marks[1] - marks[0] if len(marks) > 1 else 1.0
    low, high = marks[0] - gap, marks[-1] + gap
    across = Axis("Labelled", low, high)
    differences = [b - a for a, b in zip(truth, called, strict=True)]
    levels = {"bias": "bias", "loa_low": "lower limit of agreement", "loa_high": "upper limit of agreement"}
    scores = {words: found.metrics[name].value for name, words in levels.items() if name in found.metrics}
    lines = [
        Series(f"{words}: {value:.3g}", [(low, value), (high, value)], faint=words != "bias", strong=words == "bias")
        for words, value in scores.items()
        if value is not None
    ]
    reach = max(abs(value) for value in [*differences, *(one for one in scores.values() if one is not None), 1e-12])
    end = _round_up(reach)
    return [
        plot(
            [
                Series("equal", [(low, low), (high, high)], faint=True),
                Series("photographs", list(zip(truth, called, strict=True)), dots=True, loose=True),
            ],
            across,
            Axis("Predicted", low, high),
            title="Predicted against labelled",
        ),
        plot(
            [
                *lines,
                Series(
                    "photographs",
                    [((a + b) / 2, b - a) for a, b in zip(truth, called, strict=True)],
                    dots=True,
                    loose=True,
                ),
            ],
            Axis("Mean of labelled and predicted", low, high),
            Axis("Predicted less labelled", -end, end),
            title="Difference against mean (Bland and Altman)",
        ),
    ]


def _share(curve: Curve) -> float:
    return float(curve.hits[-1] / (curve.hits[-1] + curve.alarms[-1]))


def _roc(curve: Curve) -> list[tuple[float, float]]:
    return list(zip((1 - curve.specificity).tolist(), curve.sensitivity.tolist(), strict=True))


def _pr(curve: Curve) -> list[tuple[float, float]]:
    """From the first image called positive on: before it there is no precision."""
    recall, hits, alarms = curve.sensitivity.tolist(), curve.hits.tolist(), curve.alarms.tolist()
    return [(r, h / (h + a)) for r, h, a in zip(recall, hits, alarms, strict=True) if h + a]


def reliability_chart(found: Dataset, title: str = "Reliability") -> Markup | None:
    """Confidence against accuracy, before and after calibration; None where metrics.json has no bins."""
    if found.reliability is None:
        return None
    series = [Series("perfect", [(0, 0), (1, 1)], faint=True)]
    for name, bins in (("as trained", found.reliability.before), ("calibrated", found.reliability.after)):
        known = [
            (b.confidence, b.accuracy, b.n) for b in bins if b.n and b.confidence is not None and b.accuracy is not None
        ]
        if known:
            shares = [count / sum(count for *_, count in known) for *_, count in known]
            series.append(Series(name, [(x, y) for x, y, _ in known], dots=True, weights=shares))
    if len(series) == 1:
        return None
    return plot(
        series,
        Axis("How sure it is", number=_percent),
        Axis("How often it is right", number=_percent),
        title=f"{title} (the larger a dot, the more photographs)",
    )


def selective_chart(found: Dataset) -> Markup | None:
    """The risk-coverage curve; None where metrics.json has none."""
    if found.selective is None:
        return None
    points = [(point.coverage, point.risk) for point in found.selective.curve if point.risk is not None]
    if not points:
        return None
    top = max(0.1, *(risk for _, risk in points))
    area = found.selective.aurc
    name = "errors among the answered"
    if area.value is not None:
        name += f"; area {area.value:.3f}" + ("" if area.ci[0] is None else " ({:.3f} to {:.3f})".format(*area.ci))
    lines = [Series(name, points)]
    if found.selective.aurc_of_chance.value is not None:
        level = found.selective.aurc_of_chance.value
        lines.append(Series(f"in random order: {level:.3f}", [(0, level), (1, level)], faint=True))
    return plot(
        lines,
        Axis("Answered, the surest first", number=_percent),
        Axis("Errors among them", high=_round_up(top), number=_percent),
        title="Risk and coverage",
    )


def history_charts(history: Sequence[Mapping[str, Any]], metric: str) -> list[Markup]:
    """The losses and the chosen metric on validation over the epochs; none without an epoch."""
    epochs = [float(row["epoch"]) if isinstance(row.get("epoch"), int) else n for n, row in enumerate(history, 1)]
    if not epochs:
        return []
    across = Axis("Epoch", min(epochs[0], 1), max(epochs[-1], 2), whole=True)
    charts = []
    losses = {
        name: _column(history, column) for name, column in (("training", "train_loss"), ("validation", "val_loss"))
    }
    losses = {name: values for name, values in losses.items() if any(map(math.isfinite, values))}
    if losses:
        every = [value for values in losses.values() for value in values if math.isfinite(value)]
        upwards = Axis("Loss", 0.0, _round_up(max(every)) if max(every) > 0 else 1.0)
        lines = [Series(name, list(zip(epochs, values, strict=True)), dots=True) for name, values in losses.items()]
        charts.append(plot(lines, across, upwards, title="Loss by epoch"))
    values = _column(history, f"val_{metric}")
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        best = finite[0]
        for value in finite:
            best = value if better(metric, value, best) else best
        low, high = min(0.0, *finite), max(1.0, *finite)
        charts.append(
            plot(
                [Series(f"{label(metric)}, validation", list(zip(epochs, values, strict=True)), dots=True)],
                across,
                Axis(label(metric), math.floor(low), _round_up(high)),
                title=f"{label(metric)} by epoch (ring: the epoch that was kept)",
                marks=[(epochs[values.index(best)], best)],
            )
        )
    return charts


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(value) if isinstance(value := row.get(name), (int, float)) else math.nan for row in rows]


def _round_up(value: float) -> float:
    """The next round number, for the end of an axis."""
    marks = ticks(0.0, value)
    step = marks[1] if len(marks) > 1 else value
    return marks[-1] if marks[-1] >= value - 1e-9 else round(marks[-1] + step, 12)
