"""search.html: what was searched, how it went, which fields mattered, in one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyetune import __version__
from eyetune.errors import plural
from eyetune.pages.charts import Axis, Points, Series, plot, ticks
from eyetune.pages.page import write_page
from eyetune.searching.plan import COSTS, Objective
from eyetune.searching.results import FEWEST, PAGE, Outcome, Row, count_rows, describe, good, honest
from eyetune.searching.space import Choices, Dimension, Range

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_CURVES = 100
"""Learning curves drawn; the latest of more."""


def write_search(found: Outcome, command: str, shown: str) -> Path:
    """Write search.html into the folder of the search; returns its path.

    Args:
        found: what is known.
        command: as it may be written down.
        shown: where the trials are kept, as people may see it.
    """
    first = found.objectives[0]
    counts = count_rows(found.rows)
    largest = max(found.importance.values(), default=1.0) or 1.0
    return write_page(
        found.plan.out / PAGE,
        "search.html.j2",
        title=f"Search: {plural(len(found.rows), 'trial')}",
        found=found,
        plan=found.plan,
        best=found.best,
        counts=[f"{number} {state}" for state, number in counts.items() if number],
        honest=honest(counts["complete"] + counts["pruned"], first),
        history=[_history(found, index) for index in range(len(found.objectives))] if found.front else [],
        curves=_curves(found),
        pareto=_pareto(found),
        slices=_slices(found),
        importance=[(path, share, round(100 * share / largest)) for path, share in found.importance.items()],
        fewest=FEWEST,
        good=good(counts["complete"]),
        rows=sorted(found.rows, key=lambda row: _order(row, first)),
        front={row.number for row in found.front},
        fields=_short_names(list(found.plan.space.fields)),
        label=_label,
        text=describe,
        value=_written,
        command=command,
        shown=shown,
        version=__version__,
        cost=COSTS,
    )


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path -> the name of the field, without its section where no other is called so."""
    names = [path.rpartition(".")[2] for path in paths]
    return {path: name if names.count(name) == 1 else path for path, name in zip(paths, names, strict=True)}


def _order(row: Row, objective: Objective) -> tuple[bool, float, int]:
    """Complete trials first, the best of them on top."""
    if not row.values:
        return True, 0.0, row.number
    return False, -row.values[0] if objective.higher else row.values[0], row.number


def _label(value: Any) -> str:
    return Choices.label(float(f"{value:.3g}") if isinstance(value, float) else value)


def _written(value: float) -> str:
    """A value of an objective: scores to three places, counts in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _axis(name: str, values: Sequence[float]) -> Axis:
    """An axis that the values fill, with round ends."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - max(0.01, 0.05 * abs(low)), high + max(0.01, 0.05 * abs(high))
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(name, bottom, top, number=_tick)


def _tick(value: float) -> str:
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{sign}"
    return f"{round(value, 6):g}"


def _history(found: Outcome, index: int) -> Markup:
    """The value of each complete trial, and the best up to then."""
    objective, rows = found.objectives[index], found.complete()
    points = [(float(row.number), row.values[index]) for row in rows]
    best, line = None, []
    for number, value in points:
        best = value if best is None else max(best, value) if objective.higher else min(best, value)
        line.append((number, best))
    last = max(2.0, float(found.rows[-1].number))
    series = [
        Series("best so far", [*line, (last, line[-1][1])], step=True, strong=True),
        Series("trial", points, dots=True, loose=True),
    ]
    return plot(
        series,
        Axis("trial", 0, last, whole=True),
        _axis(objective.name, [value for _, value in points]),
        title=f"{objective.name}, trial by trial",
    )


def _curves(found: Outcome) -> Markup | None:
    """The best value up to each epoch, by which trials are stopped: those that were end early."""
    rows = [row for row in found.rows if row.course][-MOST_CURVES:]
    if not rows:
        return None
    best = found.best
    groups: dict[str, list[tuple[float, float]]] = {"complete": [], "stopped early": []}
    for row in rows:
        if best is not None and row.number == best.number:
            continue
        name = "stopped early" if row.state == "pruned" else "complete"
        course: Points = [(float(epoch), value) for epoch, value in row.course]
        groups[name] += [*course, (course[-1][0], math.nan)]
    series = [Series(name, points, dots=True) for name, points in groups.items() if points]
    if best is not None and best.course:
        series.append(Series(f"trial {best.number}, the best", [(float(e), v) for e, v in best.course], strong=True))
    values = [value for row in rows for _, value in row.course]
    last = max(epoch for row in rows for epoch, _ in row.course)
    return plot(
        series,
        Axis("epoch", 1, max(2, last), whole=True),
        _axis(found.objectives[0].name, values),
        title=f"{found.objectives[0].name} on validation, the best up to each epoch",
    )


def _pareto(found: Outcome) -> list[Markup]:
    """Each further objective against the first: the front, and what it beats."""
    charts = []
    for index in range(1, len(found.objectives)):
        if not found.front:
            break
        first, other = found.objectives[0], found.objectives[index]
        points = [(row.values[index], row.values[0]) for row in found.complete()]
        line = sorted((row.values[index], row.values[0]) for row in found.front)
        across = _axis(other.name, [x for x, _ in points])
        series = [
            Series("beaten by another trial", [p for p in points if p not in line], dots=True, loose=True),
            Series("Pareto front", line, dots=True, loose=len(found.objectives) > 2),
        ]
        charts.append(
            plot(
                [one for one in series if one.points],
                across,
                _axis(first.name, [y for _, y in points]),
                title=f"{first.name} against {other.name}",
            )
        )
    return charts


def _slices(found: Outcome) -> list[Markup]:
    """Each field against the first objective: a dot a complete trial, a ring around the best."""
    rows, best = found.complete(), found.best
    charts = []
    for path, dimension in found.plan.space.fields.items():
        there = [row for row in rows if path in row.parameters]
        if not there or best is None:
            continue
        axis, place = _scale(path, dimension)
        points = [(place(row.parameters[path]), row.values[0]) for row in there]
        marks = [(place(best.parameters[path]), best.values[0])] if path in best.parameters else []
        charts.append(
            plot(
                [Series("trial (the ring: the best)", points, dots=True, loose=True)],
                axis,
                _axis(found.objectives[0].name, [row.values[0] for row in rows]),
                title=path,
                marks=marks,
            )
        )
    return charts


def _scale(path: str, dimension: Dimension) -> tuple[Axis, Any]:
    """The axis of a field, and where on it a value lies."""
    if isinstance(dimension, Range) and dimension.log:
        axis = Axis(
            f"{path} (each step a factor)",
            math.log10(dimension.low),
            math.log10(dimension.high),
            number=lambda power: f"{10**power:.2g}",
        )
        return axis, math.log10
    if isinstance(dimension, Range):
        return Axis(path, dimension.low, dimension.high, number=_tick), float
    labels = [Choices.label(value) for value in dimension.values]

    def name(place: float) -> str:
        return labels[round(place)] if 0 <= round(place) < len(labels) else ""

    return Axis(path, -0.5, len(labels) - 0.5, number=name, whole=True), lambda value: float(
        labels.index(Choices.label(value))
    )
