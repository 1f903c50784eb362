"""A picture of how predicted and true numbers agree: one against the other, and their differences (Bland-Altman)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eyetune.metrics.plots import COLOURS, FAINT, INK, finish_figure, folded, new_figure, plain_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from eyetune.metrics.predictions import ValuePredictions

MANY = 400
"""From so many images on the points are small and faint, so that where they crowd is seen."""


def draw(table: ValuePredictions, metrics: Mapping[str, Mapping[str, Any]], path: Path, *, title: str = "") -> None:
    """Draw predicted against true numbers, and beside it their differences over their means, to the PNG file `path`.

    The second is the plot of Bland and Altman (Lancet 1986): the middle line is the bias, the outer ones the limits of
    agreement, each with its 95% interval as a band.

    Args:
        table: rows whose number is not known are left out; one row at least is.
        metrics: `metrics` of the table's scores.
        title: a line above, for example the dataset's name.
    """
    known = table.labelled()
    truth, said = known.targets, known.predicted
    figure = new_figure(11.0, 5.2)
    left, right = figure.subplots(1, 2)
    crowded = len(known) >= MANY
    points = {"s": 9 if crowded else 22, "alpha": 0.35 if crowded else 0.65, "color": COLOURS[0], "linewidths": 0}
    low, high = (float(edge(np.concatenate([truth, said]))) for edge in (np.min, np.max))
    margin = 0.04 * (high - low) or 1.0
    span = (low - margin, high + margin)
    left.plot(span, span, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), label="identity")
    left.scatter(truth, said, **points)
    name = folded(table.name, 30)
    left.set(xlabel=f"True {name}", ylabel=f"Predicted {name}", xlim=span, ylim=span, aspect="equal")
    lines = [f"{label} {_number(metrics, key)}" for key, label in (("mae", "MAE"), ("r2", "R²"), ("ccc", "CCC"))]
    left.text(0.03, 0.97, "\n".join([*lines, f"n = {len(known)}"]), transform=left.transAxes, va="top", fontsize=9)
    right.scatter((truth + said) / 2, said - truth, **points)
    right.axhline(0, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
    for key, label in (("loa_high", "upper limit"), ("bias", "bias"), ("loa_low", "lower limit")):
        _line(right, metrics.get(key, {}), label, solid=key == "bias")
    right.set(xlabel=f"Mean of true and predicted {name}", ylabel="Predicted less true")
    for axes in (left, right):
        plain_axes(axes)
    finish_figure(figure, left, title)
    save_figure(figure, path)


def _number(metrics: Mapping[str, Mapping[str, Any]], key: str) -> str:
    value = metrics.get(key, {}).get("value")
    return "–" if value is None else f"{value:.3g}"


def _line(axes: Axes, entry: Mapping[str, Any], label: str, *, solid: bool) -> None:
    """A level line over the differences with its value, and its interval as a band."""
    value, (low, high) = entry.get("value"), entry.get("ci", (None, None))
    if value is None:
        return
    colour = INK if solid else COLOURS[1]
    axes.axhline(value, color=colour, linewidth=1.5, linestyle="-" if solid else (0, (5, 1.5)))
    if low is not None:
        axes.axhspan(low, high, color=colour, alpha=0.1, linewidth=0)
    text = f"{label} {value:+.3g}"
    axes.annotate(
        text,
        xy=(1.0, value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8.5,
        color=colour,
        va="center",
    )
